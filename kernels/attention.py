"""``quantspec::attention``: the marker that capture leaves where a layer attends.

It is the whole of a decoder's token mixing in one node: causal attention of T new tokens among themselves,

    out[b, t, h] = softmax_j(softcap(scale * q[b, h, t] . k[b, h // (H/K), j])) v[b, h // (H/K), j], t - window < j <= t

with an optional attention sink (a learned logit per head that takes probability and gives no value, as in gpt_oss).
The attention-lowering pass replaces it by an op that reads the hierarchical cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

# Query rows scored at a time on the general path; bounds its score matrix to this many rows.
QUERY_BLOCK = 256


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half-precision inputs are attended in float32, float64 stays."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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

    Returns ``(B, T, H, Dv)`` in the query's dtype. Scores are formed in blocks of ``QUERY_BLOCK`` rows, so memory is
    linear in S.
    """
    num_tokens, num_keys = query.shape[2], key.shape[2]
    if softcap == 0 and sinks is None and window == 0 and key.shape[-1] == value.shape[-1]:
        # Half precision is emulated by most CPUs, several times slower than float32.
        dtype = compute_dtype(query.dtype) if query.device.type == "cpu" else query.dtype
        q, k, v = (x.to(dtype) for x in (query, key[:, :, : offset + num_tokens], value[:, :, : offset + num_tokens]))
        if offset == 0:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        else:
            mask: Any = causal_lower_right(num_tokens, offset + num_tokens)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).to(query.dtype).contiguous()
    dtype = compute_dtype(query.dtype)
    repeat = query.shape[1] // key.shape[1]
    key_t = key.to(dtype).repeat_interleave(repeat, 1).transpose(-1, -2)
    value_r = value.to(dtype).repeat_interleave(repeat, 1)
    out = query.new_empty(query.shape[0], num_tokens, query.shape[1], value.shape[-1])
    positions = torch.arange(num_keys, device=query.device)
    for start in range(0, num_tokens, QUERY_BLOCK):
        rows = query[:, :, start : start + QUERY_BLOCK].to(dtype)
        first = 0 if window == 0 else max(0, offset + start - window + 1)
        last = min(num_keys, offset + start + rows.shape[2])
        row_positions = offset + start + torch.arange(rows.shape[2], device=query.device)[:, None]
        scores = (rows * scale) @ key_t[..., first:last]
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        hidden = positions[first:last] > row_positions
        if window > 0:
            hidden |= positions[first:last] <= row_positions - window
        probs = softmax_with_sinks(scores.masked_fill(hidden, float("-inf")), sinks)
        out[:, start : start + rows.shape[2]] = (probs @ value_r[..., first:last, :]).transpose(1, 2)
    return out


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

    Args:
        query: ``(B, H, T, D)``, after RoPE.
        key: ``(B, K, T, D)``, after RoPE, with K dividing H.
        value: ``(B, K, T, Dv)``.
        layer: index of this attention call in forward order; names its part of the cache.
        scale: factor on the scores.
        window: sliding window in tokens including the current one; 0 for none.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 for none.
        sinks: ``(H,)`` sink logits, or None.

    Returns:
        ``(B, T, H, Dv)`` in the query's dtype.
    """
    return masked_attention(query, key, value, 0, scale, window, softcap, sinks)


@attention.register_fake
def _(query, key, value, layer, scale, window, softcap, sinks):
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])
