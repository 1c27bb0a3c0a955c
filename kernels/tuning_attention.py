"""``quantspec::teaching_attention`` and ``quantspec::tuning_attention``: whole texts, as target and draft see them.

Tuning runs every token of a text at once. The target attends as in ``quantspec::attention`` and keeps its keys and
values. At position t the draft then attends to what its cache would hold there, and to itself:

    out[b, t, h] = sum_{j < t} p_j v_j + p_t v'_t,   p = softmax_j(softcap(scale * q_t . k_j)), with k'_t at j = t

where k_j, v_j are the target's, at 4 bits for ``j < max(0, t // G - 1) * G`` and exact for later ones, and k'_t, v'_t
are the draft's own. So G queries in a row share their old tokens, and are attended together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import attention_dtype, compute_dtype, masked_attention, softmax_with_sinks
from .cache_layout import part_names
from .cached_attention import append_recent
from .hierarchical import decode_keys, decode_values, num_flushed_groups


@torch.library.custom_op("quantspec::teaching_attention", mutates_args=part_names("recent"))
def teaching_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_recent: Tensor,
    v_recent: Tensor,
    k_upper: Tensor | None,
    k_lower: Tensor | None,
    k_scale: Tensor | None,
    k_zero: Tensor | None,
    v_upper: Tensor | None,
    v_lower: Tensor | None,
    v_scale: Tensor | None,
    v_zero: Tensor | None,
    quantized_len: Tensor,
    length: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """``quantspec::attention`` of whole texts that also keeps their keys and values.

    Args:
        query, key, value, scale, window, softcap, sinks: as in ``quantspec::attention``.
        k_recent, v_recent: ``(B, K, T, D)`` and ``(B, K, T, Dv)``, mutated: they receive all keys and values.
        k_upper, k_lower, k_scale, k_zero, v_upper, v_lower, v_scale, v_zero: not read.
        quantized_len, length: ``(B,)`` int64 zeros: a text begins.

    Returns:
        ``(B, T, H, Dv)`` in the query's dtype.
    """
    append_recent(key, value, k_recent, v_recent, quantized_len, length)
    return masked_attention(query, key, value, 0, scale, window, softcap, sinks)


@teaching_attention.register_fake
def _(query, key, value, *cache_and_options):
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    first: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Queries ``(B, H, t, D)`` from position ``start`` on to ``keys (B, K, S, D)`` from ``first`` on, themselves last.

    ``key`` and ``value`` ``(B, K, t, ·)`` are the queries' own and stand in for the last t of ``keys`` and ``values``
    wherever a query meets itself. Returns ``(B, H, t, Dv)`` in the dtype of ``keys``.
    """
    kv_heads, tokens = keys.shape[1], query.shape[2]
    q = query.unflatten(1, (kv_heads, -1)) * scale
    own = (q * key.unsqueeze(2)).sum(-1, keepdim=True, dtype=compute_dtype(q.dtype))
    row = torch.arange(start, start + tokens, device=q.device)[:, None]
    column = torch.arange(first, first + keys.shape[2], device=q.device)
    scores = torch.where(column == row, own, (q @ keys.unsqueeze(2).transpose(-1, -2)).to(own.dtype))
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = column > row
    if window > 0:
        hidden |= column <= row - window
    probs = softmax_with_sinks(scores.masked_fill(hidden, float("-inf")).flatten(1, 2), sinks)
    probs = probs.to(keys.dtype).unflatten(1, (kv_heads, -1))
    of_own = probs.diagonal(start - first, -2, -1).unsqueeze(-1)
    out = probs.masked_fill(column == row, 0) @ values.unsqueeze(2) + of_own * value.unsqueeze(2)
    return out.flatten(1, 2)


class _Block(NamedTuple):
    """Queries at positions ``rows``, and ``keys`` and ``values`` from position ``first`` on as they see them."""

    rows: slice
    first: int
    keys: Tensor
    values: Tensor


def _blocks(
    recent: tuple[Tensor, Tensor], planes: tuple[Tensor, ...], window: int, dtype: torch.dtype
) -> Iterator[_Block]:
    """A text cut after every G tokens. ``planes`` are ``upper, scale, zero`` of keys, then of values."""
    old = (decode_keys(planes[0], None, *planes[1:3], dtype), decode_values(planes[3], None, *planes[4:], dtype))
    num_tokens, group_size = recent[0].shape[2], 2 * planes[0].shape[-2]
    for start in range(0, num_tokens, group_size):
        stop = min(start + group_size, num_tokens)
        quantized = num_flushed_groups(start, group_size) * group_size
        first = max(0, start - window + 1) if window > 0 else 0
        keys, values = (
            torch.cat(
                (coded.flatten(2, 3)[:, :, first:quantized], exact[:, :, max(first, quantized) : stop].to(dtype)), 2
            )
            for coded, exact in zip(old, recent, strict=True)
        )
        yield _Block(slice(start, stop), first, keys, values)


@torch.library.custom_op("quantspec::tuning_attention", mutates_args=())
def tuning_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_recent: Tensor,
    v_recent: Tensor,
    k_upper: Tensor,
    k_lower: Tensor | None,
    k_scale: Tensor,
    k_zero: Tensor,
    v_upper: Tensor,
    v_lower: Tensor | None,
    v_scale: Tensor,
    v_zero: Tensor,
    quantized_len: Tensor,
    length: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """The draft's attention at every token of whole texts, each read from the cache of the tokens before it.

    Differentiable by query, key and value; the cache, the target's, is constant. Scores are made and, for the gradient,
    made again for G queries at a time, so that memory is linear in T.

    Args:
        query, key, value: the draft's, as in ``quantspec::attention``.
        k_recent, v_recent: ``(B, K, T, D)`` and ``(B, K, T, Dv)``, the target's keys and values of all tokens.
        k_upper, k_scale, k_zero, v_upper, v_scale, v_zero: of their first ``T // G`` groups, as in
            ``quantspec::cached_attention``.
        k_lower, v_lower: not read.
        quantized_len, length: ``(B,)`` int64 zeros: a text begins.
        scale, window, softcap, sinks: as in ``quantspec::attention``.

    Returns:
        ``(B, T, H, Dv)`` in the query's dtype.
    """
    out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    planes = (k_upper, k_scale, k_zero, v_upper, v_scale, v_zero)
    dtype = attention_dtype(query)
    q, k, v = (x.to(dtype) for x in (query, key, value))
    for rows, first, keys, values in _blocks((k_recent, v_recent), planes, window, dtype):
        own = (x[:, :, rows] for x in (q, k, v))
        attended = _attend(*own, keys, values, rows.start, first, scale, window, softcap, sinks)
        out[:, rows] = attended.transpose(1, 2)
    return out


@tuning_attention.register_fake
def _(query, key, value, *cache_and_options):
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, k_recent, v_recent, k_upper, _, k_scale, k_zero, v_upper, _, v_scale, v_zero, *rest = inputs
    _, _, *ctx.options, sinks = rest
    planes = (k_upper, k_scale, k_zero, v_upper, v_scale, v_zero)
    ctx.save_for_backward(query, key, value, k_recent, v_recent, *planes, sinks)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, k_recent, v_recent, *planes, sinks = ctx.saved_tensors
    scale, window, softcap = ctx.options
    dtype = attention_dtype(query)
    gradients = [torch.empty_like(x) for x in (query, key, value)]
    for rows, first, keys, values in _blocks((k_recent, v_recent), tuple(planes), window, dtype):
        own = [x[:, :, rows].detach().to(dtype).requires_grad_() for x in (query, key, value)]
        with torch.enable_grad():
            attended = _attend(*own, keys, values, rows.start, first, scale, window, softcap, sinks)
        parts = torch.autograd.grad(attended, own, grad[:, rows].transpose(1, 2).to(dtype))
        for gradient, part in zip(gradients, parts, strict=True):
            gradient[:, :, rows] = part
    return (*gradients, *(None,) * 16)


tuning_attention.register_autograd(_gradients, setup_context=_keep)
