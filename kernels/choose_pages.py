"""``quantspec::choose_pages``: the pages that the next draft steps read, for all layers at once.

Of the n whole pages in a sequence's planes each KV head keeps

    k(n) = max(least, ceil(share * n))

the first one, which holds what most models pay attention to throughout, and those of the highest scores; of equal ones
the earlier. Where k(n) >= n nothing is chosen, which stands for everything.

On CUDA a program per row finds the k-th highest score bit by bit, in the order of the bits of floats, so nothing is
sorted and nothing waits for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache_op import cache_op
from .current_device import on_tensors_device
from .optional_triton import FUSED, tl, triton
from .pages import PAGE_TOKENS

SHARE_UNIT = 1 << 16
"""Shares are counted in parts of this, so that the host and the device round alike."""


def num_kept(pages: int, share: int, least: int) -> int:
    """How many of so many pages are read: all, or k(n); ``share`` in parts of :data:`SHARE_UNIT`."""
    return min(pages, max(least, -(-pages * share // SHARE_UNIT)))


@cache_op("quantspec::choose_pages", mutates_args=("chosen_pages", "num_chosen"))
def choose_pages(
    page_scores: Tensor,
    chosen_pages: Tensor,
    num_chosen: Tensor,
    sequence: Tensor,
    quantized_len: Tensor,
    share: int,
    least: int,
) -> None:
    """Choose pages for R rows: the KV heads of all layers and sequences.

    Args:
        page_scores: ``(R, P)`` float32, as ``quantspec::scored_attention`` leaves them.
        chosen_pages: ``(R, W)`` int32, mutated: the chosen pages in order. W is at least k of the pages that a sequence
            may have.
        num_chosen: ``(R, 2)`` int32, mutated: how many they are, and n; both 0 for everything. Pages that no query saw,
            of a score of -inf, are never chosen, so there may be fewer than k(n).
        sequence: ``(R,)`` int64, the sequence of each row.
        quantized_len: ``(B,)`` int64, tokens in the planes of each.
        share: in parts of :data:`SHARE_UNIT`.
        least: pages that are read in any case, at least 1.
    """
    for row, tokens in enumerate(quantized_len[sequence].tolist()):
        pages = tokens // PAGE_TOKENS
        count = num_kept(pages, share, least)
        if count == pages:
            num_chosen[row] = 0
            continue
        scores = page_scores[row, :pages].clone()
        count = min(count, int((scores > float("-inf")).sum()))
        scores[:1] = torch.where(scores[:1] > float("-inf"), float("inf"), scores[:1])
        chosen_pages[row, :count] = scores.sort(descending=True, stable=True).indices[:count].sort().values.int()
        num_chosen[row] = torch.tensor([count, pages])


@choose_pages.register_fake
def _(*arguments):
    return None


@triton.jit
def _ordered(scores, page, inside):
    """Scores as unsigned integers of the same order, that of the first page highest; 0 for those outside."""
    bits = scores.to(tl.float32).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    key = tl.where((page == 0) & (scores > float("-inf")), 0xFFFFFFFF, key.to(tl.int64))
    return tl.where(inside, key, 0)


@triton.jit
def _choose_kernel(
    page_scores,
    chosen_pages,
    num_chosen,
    sequence,
    quantized_len,
    score_stride,
    chosen_stride,
    share,
    least,
    SHARE_UNIT: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0)
    pages = tl.load(quantized_len + tl.load(sequence + row)) // PAGE_TOKENS
    count = tl.maximum(least, (pages * share + SHARE_UNIT - 1) // SHARE_UNIT)
    i = tl.arange(0, BLOCK)
    scores = page_scores + row.to(tl.int64) * score_stride
    if count >= pages:
        tl.store(num_chosen + 2 * row + tl.arange(0, 2), tl.zeros((2,), tl.int32))
    else:
        visible = tl.zeros((), tl.int64)
        for first in range(0, pages, BLOCK):
            score = tl.load(scores + first + i, first + i < pages, other=float("-inf"))
            visible += tl.sum((score > float("-inf")).to(tl.int64))
        count = tl.minimum(count, visible)
        # The highest number that at least ``count`` keys reach.
        threshold = tl.zeros((), tl.int64)
        bit = tl.full((), 1 << 31, tl.int64)
        for _ in range(32):
            reached = tl.zeros((), tl.int64)
            for first in range(0, pages, BLOCK):
                page = first + i
                key = _ordered(tl.load(scores + page, page < pages, other=0.0), page, page < pages)
                reached += tl.sum((key >= threshold + bit).to(tl.int64))
            threshold += tl.where(reached >= count, bit, 0)
            bit = bit // 2
        above = tl.zeros((), tl.int64)
        for first in range(0, pages, BLOCK):
            page = first + i
            key = _ordered(tl.load(scores + page, page < pages, other=0.0), page, page < pages)
            above += tl.sum((key > threshold).to(tl.int64))
        # Of those at the threshold the first ones fill up.
        equal_before = tl.zeros((), tl.int32)
        before = tl.zeros((), tl.int32)
        for first in range(0, pages, BLOCK):
            page = first + i
            key = _ordered(tl.load(scores + page, page < pages, other=0.0), page, page < pages)
            equal = ((key == threshold) & (page < pages)).to(tl.int32)
            rank = equal_before + tl.cumsum(equal, 0)
            take = (key > threshold) | ((equal > 0) & (rank <= count - above))
            place = before + tl.cumsum(take.to(tl.int32), 0) - 1
            tl.store(chosen_pages + row.to(tl.int64) * chosen_stride + place, page.to(tl.int32), take)
            equal_before += tl.sum(equal)
            before += tl.sum(take.to(tl.int32))
        tl.store(num_chosen + 2 * row, count.to(tl.int32))
        tl.store(num_chosen + 2 * row + 1, pages.to(tl.int32))


@choose_pages.register_kernel("cuda")
@on_tensors_device
def choose_pages_triton(
    page_scores: Tensor,
    chosen_pages: Tensor,
    num_chosen: Tensor,
    sequence: Tensor,
    quantized_len: Tensor,
    share: int,
    least: int,
) -> None:
    """Launch the kernel; as ``quantspec::choose_pages``."""
    rows, pages = page_scores.shape
    _choose_kernel[(rows,)](
        page_scores,
        chosen_pages,
        num_chosen,
        sequence,
        quantized_len,
        page_scores.stride(0),
        chosen_pages.stride(0),
        share,
        least,
        SHARE_UNIT=SHARE_UNIT,
        PAGE_TOKENS=PAGE_TOKENS,
        BLOCK=min(4096, triton.next_power_of_2(pages)),
        num_warps=8,
        **FUSED,
    )
