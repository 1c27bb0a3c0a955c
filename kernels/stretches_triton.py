"""What the kernels of attention to a cache have in common: each program attends to one stretch of it, and a last kernel
merges the stretches by their log-sum-exp.

The merge is a launch of its own since it needs many multiprocessors: where the last program to arrive merged what all
had written, a layer at 4k took 13.6 us instead of 8.4 (one H100, 32 query and 8 key heads of 128, one token, the best
number of stretches for each), and 23.5 with as many stretches.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .inline_asm import centred_bytes, centred_nibbles, fast_exp2, fast_log2
from .optional_triton import FUSED, gdc_launch_dependents, gdc_wait, tl, triton
from .pages import PAGE_BYTES

# Score of a key that a query must not see; finite, so that a column of them gives no NaN.
HIDDEN = tl.constexpr(-1.0e30)
# Weights reach 2^15, near the top of float16, so that the small ones of a long context stay normal numbers.
WEIGHT_SHIFT = tl.constexpr(15.0)


@triton.jit
def centred_codes(upper, lower, at, mask, dtype: tl.constexpr, HAS_LOWER: tl.constexpr, USE_ASM: tl.constexpr):
    """Centred codes of the low and of the high nibbles at byte offsets ``at``."""
    packed = tl.load(upper + at, mask, other=0)
    if HAS_LOWER:
        return centred_bytes(packed, tl.load(lower + at, mask, other=0), dtype, USE_ASM)
    else:
        return centred_nibbles(packed, dtype, USE_ASM)


@triton.jit
def stored_group(table, group, inside, places, HAS_WINDOW: tl.constexpr, PAGED: tl.constexpr):
    """Where a group is stored, or each of several: in the block that the table names or, without one, at its own
    number; with a window, places are taken in turns."""
    if PAGED:
        group = tl.load(table + group, inside, other=0)
    elif HAS_WINDOW:
        group = group % places
    return group


@triton.jit
def place_of_tile(tile, chosen, first_unjudged, SPARSE: tl.constexpr):
    """The tile that number ``tile`` stands for: before ``first_unjudged`` that of the list ``chosen``, else itself."""
    if SPARSE:
        return tl.load(chosen + tile, tile < first_unjudged, other=0) + tl.where(tile < first_unjudged, 0, tile)
    else:
        return tile


@triton.jit
def stored_tile(
    table,
    tile,
    num_bytes,
    places,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PAGED: tl.constexpr,
):
    """Where the group of a tile of ``BLOCK`` bytes is stored, or that of each of its bytes ``(BLOCK,)`` if they are of
    several."""
    if HALF >= BLOCK:
        group = tile // (HALF // BLOCK)
        inside = tile * BLOCK < num_bytes
    else:
        byte = tile * BLOCK + tl.arange(0, BLOCK)
        group = byte // HALF
        inside = byte < num_bytes
    return stored_group(table, group, inside, places, HAS_WINDOW, PAGED)


@triton.jit
def load_value_scales(
    v_scale,
    v_zero,
    stored,
    byte,
    num_bytes,
    SCALES: tl.constexpr,
    HALF: tl.constexpr,
):
    """Scale and zero, as stored, of the low and of the high tokens of bytes ``(BLOCK, 1)``, of that shape."""
    inside = byte < num_bytes
    low_at = (stored * (2 * HALF) + byte % HALF) * SCALES
    high_at = low_at + HALF * SCALES
    vs_low = tl.load(v_scale + low_at, inside, other=1)
    vs_high = tl.load(v_scale + high_at, inside, other=1)
    vz_low = tl.load(v_zero + low_at, inside, other=0)
    vz_high = tl.load(v_zero + high_at, inside, other=0)
    return vs_low, vs_high, vz_low, vz_high


@triton.jit
def value_factors(scale, zero, step: tl.constexpr, USE_ASM: tl.constexpr):
    """Of stored value scales and zeros: the logarithm of a code's unit, its inverse, and what a weight adds for zero.

    The scale of a token rides in the exponent: its weight 2^(score + log2 s - top) is the factor of its codes. Weight
    over scale is the probability, so the normalizer and the zeros need no second exponential.
    """
    log = fast_log2(scale.to(tl.float32) * step, USE_ASM)
    inverse = fast_exp2(-log, USE_ASM)
    return log, inverse, zero.to(tl.float32) * inverse + 8 / step


@triton.jit
def normalizer(norm, top):
    """The inverse of the sum of ``norm`` over its first axis, and the log2-sum-exp2."""
    total = tl.sum(norm, 0).to(tl.float32)
    divisor = tl.where(total > 0, total, 1.0)
    return (1.0 / divisor)[None, :], tl.where(total > 0, top - WEIGHT_SHIFT + tl.log2(divisor), float("-inf"))


@triton.jit
def newest_hidden(newest, window, HAS_WINDOW: tl.constexpr):
    """The last position before what queries at the positions ``newest`` see; a negative window is the size of
    chunks."""
    # Without a window everything is newer than -1.
    oldest = tl.full(newest.shape, -1, tl.int32)
    chunk = tl.maximum(-window, 1)
    if HAS_WINDOW:
        oldest = tl.where(window > 0, newest - window, newest // chunk * chunk - 1)
    return oldest


@triton.jit
def first_seen_tile(start, window, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """The tile of ``BLOCK`` bytes where the first group begins of which a query at ``start`` sees something."""
    chunk = tl.maximum(-window, 1)
    first = tl.where(window > 0, tl.maximum(start - window + 1, 0), start // chunk * chunk)
    return first // (2 * HALF) * HALF // BLOCK


@triton.jit
def soft_cap(score_log2, cap_log2, USE_ASM: tl.constexpr):
    """``cap tanh(score / cap)`` of scores and cap in units of log2; tanh(x) = 1 - 2 / (e^2x + 1)."""
    double = fast_exp2(score_log2 / cap_log2 * 2.8853900817779268, USE_ASM)
    return cap_log2 * (1 - 2 / (double + 1))


@triton.jit
def recent_weights(
    scores,
    slot,
    inside,
    position,
    oldest,
    newest,
    softcap_log2,
    HAS_SOFTCAP: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Weights ``(slots, rows)`` of recent slots from scores in units of log2, the inverse of their sums, and the
    log2-sum-exp2.

    ``position`` is that of slot 0; a row sees slots ``inside`` of positions in ``(oldest, newest]``.
    """
    if HAS_SOFTCAP:
        scores = soft_cap(scores, softcap_log2, USE_ASM)
    at = (position + slot)[:, None]
    visible = inside[:, None] & (at > oldest[None, :]) & (at <= newest[None, :])
    scores = tl.where(visible, scores, HIDDEN)
    top = tl.max(scores, 0)
    weights = tl.where(visible, fast_exp2(scores - top[None, :], USE_ASM), 0)
    total = tl.sum(weights, 0)
    divisor = tl.where(total > 0, total, 1.0)
    inverse = (1.0 / divisor)[None, :]
    lse = tl.where(total > 0, top + tl.log2(divisor), float("-inf"))
    return weights, inverse, lse


@triton.jit
def _score_pages(
    partial_lse,
    sinks,
    tile_tops,
    page_scores,
    quantized_len,
    length,
    window,
    num_tiles,
    num_pages,
    num_splits,
    pair,
    block,
    KV_HEADS: tl.constexpr,
    REPEAT: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    JOINS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Scores of the ``block``-th 32 pages of a KV head, from what its rows found in tiles and splits.

    It takes ``COLUMNS`` rows of ``BLOCK_SPLITS`` splits at a time. With ``JOINS`` those that are there stay where they
    are higher.
    """
    ROWS: tl.constexpr = REPEAT * TOKENS
    quantized = tl.load(quantized_len + pair // KV_HEADS).to(tl.int32)
    first_page = 0
    if HAS_WINDOW:
        # Pages before it were not read.
        first_page = first_seen_tile(tl.load(length + pair // KV_HEADS).to(tl.int32), window, HALF, PAGE)
    if block * 32 * PAGE < quantized // 2:
        page = block * 32 + tl.arange(0, 32)
        seen = (page >= first_page) & (page * PAGE < quantized // 2)
        stored = page_scores + pair.to(tl.int64) * num_pages + page
        before = tl.full((32,), float("-inf"), tl.float32)
        if JOINS:
            before = tl.load(stored, page < num_pages, other=float("-inf"))
        s = tl.arange(0, BLOCK_SPLITS)
        score = tl.full((32,), float("-inf"), tl.float32)
        for first in range(0, ROWS, COLUMNS):
            row = first + tl.arange(0, COLUMNS)
            tops_at = (pair.to(tl.int64) * num_tiles + page)[:, None] * ROWS + row[None, :]
            highest = tl.load(tile_tops + tops_at, seen[:, None] & (row < ROWS)[None, :], other=HIDDEN)
            top = tl.full((COLUMNS,), HIDDEN, tl.float32)
            total = tl.zeros((COLUMNS,), tl.float32)
            if HAS_SINKS:
                head = (pair % KV_HEADS) * REPEAT + row // TOKENS
                top = tl.load(sinks + head, row < ROWS, other=0).to(tl.float32) * 1.4426950408889634
                total += 1.0
            for split in range(0, num_splits, BLOCK_SPLITS):
                at = (pair.to(tl.int64) * num_splits + split + s)[:, None] * ROWS + row[None, :]
                inside = (split + s < num_splits)[:, None] & (row < ROWS)[None, :]
                lse = tl.load(partial_lse + at, inside, other=float("-inf"))
                new_top = tl.maximum(top, tl.max(lse, 0))
                total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(lse - new_top[None, :]), 0)
                top = new_top
            total = tl.where(row < ROWS, total, 1.0)
            weight = tl.where(highest > 0.5 * HIDDEN, highest - (top + tl.log2(total))[None, :], float("-inf"))
            score = tl.maximum(score, tl.max(weight, 1))
        # Value scales came in sixteenths, as codes of both planes count.
        tl.store(stored, tl.maximum((score + 4) * 0.6931471805599453, before), page < num_pages)


@triton.jit
def _merge_kernel(
    partial,
    partial_lse,
    sinks,
    out,
    tile_tops,
    page_scores,
    quantized_len,
    length,
    window,
    num_tiles,
    num_pages,
    num_splits,
    KV_HEADS: tl.constexpr,
    REPEAT: tl.constexpr,
    TOKENS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SCORES: tl.constexpr,
    JOINS: tl.constexpr,
    OVERLAP: tl.constexpr,
    SCORED_ROWS: tl.constexpr,
    SCORED_SPLITS: tl.constexpr,
):
    """``BLOCK_C`` channels of one output row from the partial results of its splits; a sink joins the normalizer.

    With ``SCORES`` the programs after those of the rows make the scores of pages, from ``SCORED_ROWS`` rows of
    ``SCORED_SPLITS`` splits at a time.
    """
    if OVERLAP:
        # What follows may load its weights while the planes are still read.
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    pair = tl.program_id(1)
    if SCORES and row >= REPEAT * TOKENS:
        _score_pages(
            partial_lse,
            sinks,
            tile_tops,
            page_scores,
            quantized_len,
            length,
            window,
            num_tiles,
            num_pages,
            num_splits,
            pair,
            (row - REPEAT * TOKENS) * tl.num_programs(2) + tl.program_id(2),
            KV_HEADS,
            REPEAT,
            TOKENS,
            HALF,
            PAGE,
            HAS_SINKS,
            HAS_WINDOW,
            JOINS,
            SCORED_ROWS,
            SCORED_SPLITS,
        )
        return
    head = (pair % KV_HEADS) * REPEAT + row // TOKENS
    s = tl.arange(0, BLOCK_SPLITS)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    base = pair.to(tl.int64) * num_splits * (REPEAT * TOKENS) + row
    top = tl.full((), HIDDEN, tl.float32)
    total = tl.zeros((), tl.float32)
    if HAS_SINKS:
        top = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        total = total + 1.0
    acc = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, num_splits, BLOCK_SPLITS):
        at = base + (first + s) * (REPEAT * TOKENS)
        lse = tl.load(partial_lse + at, first + s < num_splits, other=float("-inf"))
        # Rows of splits that saw nothing are not written, so they must not be read.
        mask = (lse > float("-inf"))[:, None] & (c[None, :] < DV)
        part = tl.load(partial + at[:, None] * DV + c[None, :], mask, other=0)
        new_top = tl.maximum(top, tl.max(lse, 0))
        decay = tl.exp2(top - new_top)
        weight = tl.exp2(lse - new_top)
        acc = acc * decay + tl.sum(part * weight[:, None], 0)
        total = total * decay + tl.sum(weight, 0)
        top = new_top
    token = (pair // KV_HEADS) * TOKENS + row % TOKENS
    tl.store(out + (token.to(tl.int64) * (KV_HEADS * REPEAT) + head) * DV + c, acc / total, c < DV)


class DeviceLimits(NamedTuple):
    """What a device has: multiprocessors, bytes of shared memory in each, and whether four warps multiply 64 rows at
    once."""

    multiprocessors: int
    shared_bytes: int
    multiplies_64_rows: bool


@lru_cache
def device_limits(device: torch.device) -> DeviceLimits:
    """Of this device; the interpreter's is one multiprocessor of an H100."""
    if device.type != "cuda":
        return DeviceLimits(1, 228 * 1024, True)
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        properties.multi_processor_count, properties.shared_memory_per_multiprocessor, properties.major == 9
    )


def widest_head(limits: DeviceLimits, element_size: int) -> int:
    """Most dims of a head that a GPU of these limits attends to, with queries of so many bytes a number.

    In float32 heads of 512 dims take 178 KB of shared memory, those of 256 take 105.
    """
    kilobytes = limits.shared_bytes // 1024
    return 512 if element_size == 2 or kilobytes >= 200 else 256 if kilobytes >= 128 else 128


def merged(
    partial: Tensor,
    partial_lse: Tensor,
    out: Tensor,
    sinks: Tensor | None,
    window: int,
    quantized_len: Tensor,
    length: Tensor,
    half: int,
    kv_heads: int,
    tile_tops: Tensor | None = None,
    page_scores: Tensor | None = None,
    joins: bool = False,
    overlap: bool = False,
) -> Tensor:
    """``out (B, T, H, Dv)``, written from ``partial (B*K, splits, rows, Dv)`` and ``partial_lse (B*K, splits, rows)``.

    With ``page_scores (B, K, P)`` those are written too, from ``tile_tops (B*K, tiles, rows)``; with ``joins`` where
    they are higher than what is there.
    """
    pairs, splits, rows, value_dim = partial.shape
    tokens, heads = out.shape[1:3]
    num_tiles, num_pages = (
        (0, 0) if tile_tops is None or page_scores is None else (tile_tops.shape[1], page_scores.shape[2])
    )
    slices = triton.cdiv(value_dim, 32)
    _merge_kernel[(rows + triton.cdiv(num_pages, 32 * slices), pairs, slices)](
        partial,
        partial_lse,
        out if sinks is None else sinks,
        out,
        partial_lse if tile_tops is None else tile_tops,
        out if page_scores is None else page_scores,
        quantized_len,
        length,
        window,
        num_tiles,
        num_pages,
        splits,
        KV_HEADS=kv_heads,
        REPEAT=heads // kv_heads,
        TOKENS=tokens,
        DV=value_dim,
        BLOCK_C=32,
        BLOCK_SPLITS=min(128, triton.next_power_of_2(splits)),
        HALF=half,
        PAGE=PAGE_BYTES,
        HAS_SINKS=sinks is not None,
        HAS_WINDOW=window != 0,
        SCORES=num_pages > 0,
        JOINS=joins,
        OVERLAP=overlap,
        SCORED_ROWS=min(64, triton.next_power_of_2(rows)),
        SCORED_SPLITS=min(64, triton.next_power_of_2(splits)),
        num_warps=4,
        **FUSED,
        **launch_options(overlap),
    )
    return out


def launch_options(overlap: bool) -> dict[str, bool]:
    """Of a launch that may begin before what it follows has ended; the interpreter does not know the option."""
    return {"launch_pdl": True} if overlap else {}


def last_contiguous(x: Tensor) -> Tensor:
    """``x`` with adjacent channels, a copy if need be."""
    return x if x.stride(-1) == 1 else x.contiguous()
