"""``quantspec::teaching_attention`` and ``quantspec::tuning_attention``: whole texts, as target and draft see them.

Tuning runs every token of a text at once. The target attends as in ``quantspec::attention`` and keeps its keys and
values. At position t the draft then attends to what its cache would hold there, and to itself:

    out[b, t, h] = sum_{j < t} p_j v_j + p_t v'_t,   p = softmax_j(softcap(scale * q_t . k_j)), with k'_t at j = t

where k_j, v_j are the target's, at 4 bits for ``j < max(0, t // G - 1) * G`` and exact for later ones, and k'_t, v'_t
are the draft's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention_dtype, compute_dtype, first_visible, masked_attention, softmax_with_sinks
from .cache_layout import part_names
from .cache_op import cache_op
from .cached_attention import append_recent
from .hierarchical import decode_keys, decode_values, num_flushed_groups

# Queries that attend at a time.
_ROWS = 512


@cache_op("quantspec::teaching_attention", mutates_args=part_names("recent"))
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


class _Block(NamedTuple):
    """Queries at positions ``rows``, and what they see.

    Attributes:
        keys, values: ``(B, K, S, D)``, ``(B, K, S, Dv)``: the target's at 4 bits, its exact ones, and the queries' own.
        visible: ``(rows, S)``, whether a query sees a key.
    """

    rows: slice
    keys: Tensor
    values: Tensor
    visible: Tensor


def _blocks(
    key: Tensor, value: Tensor, recent: tuple[Tensor, Tensor], planes: tuple[Tensor, ...], window: int
) -> Iterator[_Block]:
    """A text cut after every ``_ROWS`` tokens. ``planes`` are ``upper, scale, zero`` of keys, then of values."""
    k_upper, k_scale, k_zero, v_upper, v_scale, v_zero = planes
    old_keys = decode_keys(k_upper, None, k_scale, k_zero, key.dtype)
    if v_upper.shape[-1]:
        old = (old_keys, decode_values(v_upper, None, v_scale, v_zero, key.dtype))
    else:
        old = (old_keys, old_keys[..., : value.shape[3]])
        recent = (recent[0], recent[0][..., : value.shape[3]])
    group_size, num_tokens = 2 * k_upper.shape[-2], key.shape[2]
    for start in range(0, num_tokens, _ROWS):
        stop = min(start + _ROWS, num_tokens)
        row = torch.arange(start, stop, device=key.device)[:, None]
        quantized = num_flushed_groups(row, group_size) * group_size
        first = first_visible(start, window)
        at_4_bits = slice(first, num_flushed_groups(stop - 1, group_size) * group_size)
        exact = slice(max(first, num_flushed_groups(start, group_size) * group_size), stop - 1)
        column = torch.arange(num_tokens, device=key.device)
        seen = column >= first_visible(row, window)
        earlier = (column < quantized) & seen, (column >= quantized) & (column < row) & seen
        visible = (earlier[0][:, at_4_bits], earlier[1][:, exact], (column == row)[:, start:stop])
        keys, values = (
            torch.cat(
                (coded.flatten(2, 3)[:, :, at_4_bits], whole[:, :, exact].to(own.dtype), own[:, :, start:stop]), 2
            )
            for coded, whole, own in zip(old, recent, (key, value), strict=True)
        )
        yield _Block(slice(start, stop), keys, values, torch.cat(visible, 1))


def _attend(query: Tensor, block: _Block, scale: float, softcap: float, sinks: Tensor | None) -> Tensor:
    """Queries ``(B, H, rows, D)`` of a block to what they see; ``(B, H, rows, Dv)``."""
    kv_heads = block.keys.shape[1]
    if softcap == 0 and sinks is None:
        # The fused kernel that takes a mask wants as many key heads as query heads.
        keys, values = (x.repeat_interleave(query.shape[1] // kv_heads, 1) for x in (block.keys, block.values))
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=block.visible, scale=scale)
    grouped = query.unflatten(1, (kv_heads, -1)) * scale
    scores = (grouped @ block.keys.unsqueeze(2).transpose(-1, -2)).to(compute_dtype(query.dtype))
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    probs = softmax_with_sinks(scores.masked_fill(~block.visible, float("-inf")).flatten(1, 2), sinks)
    return (probs.to(query.dtype).unflatten(1, (kv_heads, -1)) @ block.values.unsqueeze(2)).flatten(1, 2)


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

    Differentiable by query, key and value; the cache, the target's, is constant. Some queries attend at a time, and for
    the gradient again, so that memory is linear in T.

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
    q, k, v = (x.to(attention_dtype(query)) for x in (query, key, value))
    for block in _blocks(k, v, (k_recent, v_recent), planes, window):
        out[:, block.rows] = _attend(q[:, :, block.rows], block, scale, softcap, sinks).transpose(1, 2)
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
    own = [x.detach().to(attention_dtype(query)).requires_grad_() for x in (query, key, value)]
    with torch.enable_grad():
        for block in _blocks(own[1], own[2], (k_recent, v_recent), tuple(planes), window):
            attended = _attend(own[0][:, :, block.rows], block, scale, softcap, sinks)
            attended.backward(grad[:, block.rows].transpose(1, 2).to(attended.dtype))
    gradients = (x.grad.to(query.dtype) for x in own)
    return (*gradients, *(None,) * 16)


tuning_attention.register_autograd(_gradients, setup_context=_keep)
