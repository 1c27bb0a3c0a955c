"""``quantspec::attention``: the marker that capture leaves where a layer attends.

It is the whole of a decoder's token mixing in one node: causal attention of T new tokens among themselves,

    out[b, t, h] = softmax_j(softcap(scale * q[b, h, t] . k[b, h // (H/K), j])) v[b, h // (H/K), j], t - window < j <= t

with an optional attention sink (a learned logit per head that takes probability and gives no value, as in gpt_oss).
The attention-lowering pass replaces it by an op that reads the hierarchical cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from .cpu_features import cpu_lacks_half_matmul

# Of flash attention.
_MOST_FLASH_DIMS = 256
# Query rows that are scored at a time where scores or masks are written out; at least, for windows.
QUERY_BLOCK = 256
# At most, for windows: the mask of a block has this many rows and as many columns more than the window.
_MOST_WINDOW_ROWS = 2048


def first_visible(position: Any, window: int) -> Any:
    """The oldest key that a query at ``position``, an int or an integer tensor, sees.

    Its own and the ``window - 1`` before it are visible, or where ``window`` is -C those of its chunk of C; all for 0.
    """
    if window <= 0:
        return position // -window * -window if window else position * 0
    oldest = position - window + 1
    return oldest.clamp(min=0) if isinstance(oldest, Tensor) else max(0, oldest)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half-precision inputs are attended in float32, float64 stays."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention_dtype(x: Tensor) -> torch.dtype:
    """What a prompt like ``x`` is attended in: float32 for half precision that a CPU emulates or is no faster in.

    One with AVX-512 BF16 or AMX attends to 3,000 tokens in bfloat16 in a third of the time, in float16 in the same.
    """
    if x.device.type == "cpu" and (x.dtype != torch.bfloat16 or cpu_lacks_half_matmul()):
        return compute_dtype(x.dtype)
    return x.dtype


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Probabilities over the last axis of ``(..., H, T, S)`` scores; ``sinks`` (H,) join the normalizer only."""
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offset: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention of ``(B, H, T, D)`` queries whose first sits at position ``offset`` of ``(B, K, S, D)`` keys.

    Returns ``(B, T, H, Dv)`` in the query's dtype. Through torch's fused kernels unless scores are soft-capped, which
    those do not offer.
    """
    num_keys = offset + query.shape[2]
    key, value = key[:, :, :num_keys], value[:, :, :num_keys]
    window = 0 if abs(window) >= num_keys else window
    if softcap == 0:
        return _fused_attention(query, key, value, offset, scale, window, sinks)
    return _soft_capped_attention(query, key, value, offset, scale, window, softcap, sinks)


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, offset: int, scale: float, window: int, sinks: Tensor | None
) -> Tensor:
    """:func:`masked_attention` by ``scaled_dot_product_attention``.

    A window is a mask over the keys that a block of as many queries sees. A sink is one more key, before all others,
    that two more dims of the query multiply by the head's logit: its two halves, for dtypes of few bits.
    """
    num_tokens, value_dim = query.shape[2], value.shape[-1]
    dtype = attention_dtype(query)
    q, k, v = (x.to(dtype) for x in (query, key, value))
    if sinks is not None:
        logit = (sinks.to(torch.float64) / scale).view(1, -1, 1, 1)
        high = logit.to(dtype)
        low = (logit - high).to(dtype)
        q = torch.cat((q, *(half.expand(*q.shape[:3], 1) for half in (high, low))), -1)
        k, v = F.pad(k, (0, 2, 1, 0)), F.pad(v, (0, 0, 1, 0))
        k[:, :, 0, -2:] = 1
    # Flash attention wants one head dim, a multiple of 8.
    dim = max(q.shape[-1], value_dim)
    if dim > _MOST_FLASH_DIMS and q.device.type == "cuda":
        # The kernel that takes so many wants as many key heads as query heads; one head is not copied for that.
        repeat = q.shape[1] // k.shape[1]
        k, v = (x.unsqueeze(2).expand(-1, -1, repeat, -1, -1).flatten(1, 2) for x in (k, v))
    if not q.shape[-1] == k.shape[-1] == value_dim:
        dim += -dim % 8
    q, k, v = (F.pad(x, (0, dim - x.shape[-1])) if x.shape[-1] < dim else x for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if window:
        out = _windowed(q, k, v, offset, scale, window, sinks is not None)
    elif num_tokens == k.shape[2]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        mask: Any = causal_lower_right(num_tokens, k.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out[..., :value_dim].transpose(1, 2).to(query.dtype).contiguous()


def _windowed(q: Tensor, k: Tensor, v: Tensor, offset: int, scale: float, window: int, has_sink: bool) -> Tensor:
    """``(B, H, T, D)`` outputs of queries from position ``offset`` on; a sink is key 0 and seen by all."""
    num_tokens, repeat = q.shape[2], q.shape[1] // k.shape[1]
    sink = slice(0, int(has_sink))
    out = torch.empty_like(q)
    for rows in _blocks(num_tokens, min(max(QUERY_BLOCK, abs(window)), _MOST_WINDOW_ROWS)):
        first, last = first_visible(offset + rows.start, window), offset + rows.stop
        visible = ~_hidden(slice(offset + rows.start, last), slice(first, last), window, q.device)
        visible = F.pad(visible, (sink.stop, 0), value=True)
        seen = slice(sink.stop + first, sink.stop + last)
        # The fused kernel that takes a mask wants as many key heads as query heads.
        keys, values = (torch.cat((x[:, :, sink], x[:, :, seen]), 2).repeat_interleave(repeat, 1) for x in (k, v))
        out[:, :, rows] = F.scaled_dot_product_attention(q[:, :, rows], keys, values, attn_mask=visible, scale=scale)
    return out


def _soft_capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offset: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """:func:`masked_attention`, scored ``QUERY_BLOCK`` rows at a time so that memory is linear in S."""
    dtype = compute_dtype(query.dtype)
    repeat = query.shape[1] // key.shape[1]
    key_t = key.to(dtype).repeat_interleave(repeat, 1).transpose(-1, -2)
    value_r = value.to(dtype).repeat_interleave(repeat, 1)
    out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    for rows in _blocks(query.shape[2], QUERY_BLOCK):
        first, last = first_visible(offset + rows.start, window), offset + rows.stop
        scores = (query[:, :, rows].to(dtype) * scale) @ key_t[..., first:last]
        scores = softcap * torch.tanh(scores / softcap)
        hidden = _hidden(slice(offset + rows.start, last), slice(first, last), window, query.device)
        probs = softmax_with_sinks(scores.masked_fill(hidden, float("-inf")), sinks)
        out[:, rows] = (probs @ value_r[..., first:last, :]).transpose(1, 2)
    return out


def _blocks(num_tokens: int, size: int) -> Iterator[slice]:
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def _hidden(rows: slice, columns: slice, window: int, device: torch.device) -> Tensor:
    """Keys at positions ``columns`` that queries at positions ``rows`` do not see: newer, or before the first."""
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    column = torch.arange(columns.start, columns.stop, device=device)
    hidden = column > row
    return hidden | (column < first_visible(row, window)) if window else hidden


@torch.library.custom_op("quantspec::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention of a whole sequence; the reference that cached decoding must reproduce.

    ``out[b, t, h] = sum_j p_j v[b, h // (H/K), j]`` over ``t - window < j <= t``, with
    ``p = softmax_j(softcap(scale * q[b, h, t] . k[b, h // (H/K), j]))``.

    Args:
        query: ``(B, H, T, D)`` of a float dtype, after RoPE.
        key: ``(B, K, T, D)`` of the query's dtype, after RoPE, with K dividing H.
        value: ``(B, K, T, Dv)`` of the query's dtype.
        layer: index of this attention call in forward order; names its part of the cache.
        scale: factor on the scores.
        window: sliding window in tokens including the current one; -C for chunks of C tokens, each of which sees no
            other, the first from position 0 on; 0 for neither.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 for none.
        sinks: ``(H,)`` sink logits of a float dtype, or None.

    Returns:
        ``(B, T, H, Dv)`` in the query's dtype.
    """
    return masked_attention(query, key, value, 0, scale, window, softcap, sinks)


@attention.register_fake
def _(query, key, value, layer, scale, window, softcap, sinks):
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])
