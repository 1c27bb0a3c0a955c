"""``quantspec::cut_off``: what top-p and typical sampling leave of scores, as Hugging Face's processors define them.

With p = softmax(scores), H its entropy, and tokens by an ascending value v, equal ones as in the vocabulary:

    top-p:   v = scores,       removed are the first tokens whose running sum of p is at most the limit
    typical: v = |-log p - H|, removed are tokens with v above that of the first whose running sum reaches the limit

On CUDA one program reads a row several times instead of sorting it: the value at the limit lies between two, each pass
splits them at their mean and moves one to a value that a token has. A pass sums in one order whatever the split, so no
two contradict.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .current_device import on_tensors_device
from .optional_triton import FUSED, tl, triton

# Tokens that a program reads together.
BLOCK = 8192
WARPS = 32


def _by_sorting(scores: Tensor, limit: Tensor, typical: bool, least: int, filter_value: float) -> Tensor:
    scores = scores.contiguous()
    if typical:
        normalized = scores.log_softmax(-1)
        entropy = -(normalized * normalized.exp()).nansum(-1, keepdim=True)
        ordered, indices = (-normalized - entropy).abs().sort()
        cumulative = scores.gather(-1, indices).softmax(-1).cumsum(-1)
        last = (cumulative < limit).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        removed = ordered > ordered.gather(-1, last)
        removed[..., :least] = False
    else:
        ordered, indices = scores.sort()
        removed = ordered.softmax(-1).cumsum(-1) <= limit
        removed[..., -least:] = False
    return scores.masked_fill(removed.scatter(-1, indices, removed), filter_value)


@torch.library.custom_op("quantspec::cut_off", mutates_args=())
def cut_off(scores: Tensor, limit: Tensor, typical: bool, least: int, filter_value: float) -> Tensor:
    """Scores with ``filter_value`` where tokens are removed; this implementation sorts.

    Args:
        scores: ``(..., V)`` of a float dtype.
        limit: ``(..., 1)``, of the running sum: 1 - p of top-p, or the mass of typical sampling.
        typical: typical sampling instead of top-p.
        least: tokens kept at least, the last ones of top-p or the first ones of typical sampling.
        filter_value: the score of removed tokens.

    Returns:
        ``(..., V)``, contiguous.
    """
    return _by_sorting(scores, limit, typical, least, filter_value)


@cut_off.register_fake
def _(scores, limit, typical, least, filter_value):
    return scores.new_empty(scores.shape)


@triton.jit
def _value(s, high, log_total, entropy, TYPICAL: tl.constexpr):
    """What tokens are ordered by."""
    if TYPICAL:
        s = tl.abs(log_total - (s - high) - entropy)
    return s


@triton.jit
def _cut_off_kernel(scores, limit, out, vocab, filter_value, TYPICAL: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row; masses are relative to the likeliest token's."""
    INF: tl.constexpr = float("inf")
    row = tl.program_id(0).to(tl.int64)
    scores += row * vocab
    at = tl.arange(0, BLOCK)

    least = tl.full((BLOCK,), INF, tl.float32)
    greatest = tl.full((BLOCK,), -INF, tl.float32)
    for start in range(0, vocab, BLOCK):
        s = tl.load(scores + start + at, start + at < vocab, other=-INF).to(tl.float32)
        least = tl.minimum(least, tl.where(s > -INF, s, INF))
        greatest = tl.maximum(greatest, s)
    low, high = tl.min(least, 0), tl.max(greatest, 0)

    mass = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        s = tl.load(scores + start + at, start + at < vocab, other=-INF).to(tl.float32)
        p = tl.exp(s - high)
        mass += p
        weighted += p * tl.where(p > 0, s - high, 0.0)
    total = tl.sum(mass, 0)
    log_total = tl.log(total)
    entropy = log_total - tl.sum(weighted, 0) / total
    bound = tl.load(limit + row).to(tl.float32) * total

    # The value of the token at the limit is one of these or lies between; the least and the likeliest deviate most.
    top = high
    if TYPICAL:
        of_least = _value(low, high, log_total, entropy, TYPICAL)
        top = tl.maximum(of_least, _value(high, high, log_total, entropy, TYPICAL))
        low = 0.0
    while low < top:
        middle = low + (top - low) * 0.5
        middle = tl.where(middle > low, middle, top)
        mass = tl.zeros((BLOCK,), tl.float32)
        least = tl.full((BLOCK,), INF, tl.float32)
        greatest = tl.full((BLOCK,), -INF, tl.float32)
        for start in range(0, vocab, BLOCK):
            s = tl.load(scores + start + at, start + at < vocab, other=-INF).to(tl.float32)
            v = _value(s, high, log_total, entropy, TYPICAL)
            below = v < middle
            mass += tl.where(below, tl.exp(s - high), 0.0)
            greatest = tl.maximum(greatest, tl.where(below & (s > -INF), v, -INF))
            least = tl.minimum(least, tl.where(below, INF, v))
        below_middle = tl.sum(mass, 0)
        reached = (below_middle >= bound) & (below_middle > 0) if TYPICAL else below_middle > bound
        if reached:
            top = tl.max(greatest, 0)
        else:
            low = tl.min(least, 0)

    dropped = 0
    if not TYPICAL:
        # Of equal tokens at the limit, as many go as still fit below it, and one stays.
        mass = tl.zeros((BLOCK,), tl.float32)
        equal = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, vocab, BLOCK):
            s = tl.load(scores + start + at, start + at < vocab, other=-INF).to(tl.float32)
            mass += tl.where(s < low, tl.exp(s - high), 0.0)
            equal += (s == low).to(tl.int32)
        fit = (bound - tl.sum(mass, 0)) / tl.exp(low - high)
        dropped = tl.minimum(fit, (tl.sum(equal, 0) - 1).to(tl.float32)).to(tl.int32)
    seen = 0
    for start in range(0, vocab, BLOCK):
        s = tl.load(scores + start + at, start + at < vocab, other=-INF).to(tl.float32)
        v = _value(s, high, log_total, entropy, TYPICAL)
        removed = v > low if TYPICAL else v < low
        if dropped > seen:
            equal = (v == low).to(tl.int32)
            removed = removed | ((v == low) & (seen + tl.cumsum(equal, 0) <= dropped))
            seen += tl.sum(equal, 0)
        tl.store(out + row * vocab + start + at, tl.where(removed, filter_value, s), start + at < vocab)


@cut_off.register_kernel("cuda")
@on_tensors_device
def cut_off_triton(scores: Tensor, limit: Tensor, typical: bool, least: int, filter_value: float) -> Tensor:
    """Launch the kernel, which keeps one token at least; as ``quantspec::cut_off``."""
    if least > 1:
        return _by_sorting(scores, limit, typical, least, filter_value)
    scores, limit = scores.contiguous(), limit.contiguous()
    out = torch.empty_like(scores)
    vocab = scores.shape[-1]
    block = min(BLOCK, triton.next_power_of_2(vocab))
    _cut_off_kernel[(limit.numel(),)](
        scores, limit, out, vocab, filter_value, TYPICAL=typical, BLOCK=block, num_warps=WARPS, **FUSED
    )
    return out
