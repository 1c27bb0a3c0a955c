"""``quantspec::decoded_attention``: a few new tokens attend to the decoded copy of the hierarchical cache, on a CPU.

    out[b, t, h] = sum_j p_j v_j,   p = softmax_j(softcap(scale * q[b, h, t] . k_j)),   j <= length[b] + t

as ``quantspec::cached_attention`` with both planes, but tokens ``j < quantized_len[b]`` were decoded when they went
into the planes: the copy holds every cached token by position, so that a step appends and attends.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import first_visible, masked_attention
from .hierarchical import stored_values


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Queries ``(B, H, T, D)`` from position ``start`` on over ``(B, K, S, D)`` keys; returns ``(B, T, H, Dv)``."""
    batch, heads, tokens, head_dim = query.shape
    kv_heads, last = keys.shape[1], start + tokens
    # Where this cuts, it cuts between chunks, so that they begin at multiples of their size still.
    first = first_visible(start, window)
    keys, values = keys[:, :, first:last], values[:, :, first:last]
    if softcap > 0 or sinks is not None:
        return masked_attention(query, keys, values, start - first, scale, window, softcap, sinks)
    mask = None
    if tokens > 1:
        positions, own = torch.arange(first, last), torch.arange(start, last)[:, None]
        mask = positions <= own
        if window:
            mask &= positions >= first_visible(own, window)
        mask = mask.repeat(heads // kv_heads, 1)
    # The query heads of a key head are rows of one product, so its keys are read once.
    rows = query.reshape(batch, kv_heads, -1, head_dim)
    # A model may compute its queries in more precision than it caches keys in.
    keys, values = keys.to(query.dtype), values.to(query.dtype)
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, tokens, -1).transpose(1, 2)


@torch.library.custom_op(
    "quantspec::decoded_attention", mutates_args=("k_recent", "v_recent", "k_decoded", "v_decoded"), device_types="cpu"
)
def decoded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_recent: Tensor,
    v_recent: Tensor,
    k_decoded: Tensor,
    v_decoded: Tensor,
    quantized_len: Tensor,
    length: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Append T new tokens to the recent buffer and the decoded copy, and attend from them to everything cached.

    Args:
        query, key, value: as in ``quantspec::cached_attention``.
        k_recent, v_recent: as there, mutated.
        k_decoded, v_decoded: ``(B, K, S, D)`` and ``(B, K, S, Dv)`` in the model's dtype, mutated; slot j holds
            position j, with ``S >= length + T``.
        quantized_len, length, scale, window, softcap, sinks: as there.

    Returns:
        ``(B, T, H, Dv)`` in the query's dtype.
    """
    options = (scale, window, softcap, sinks)
    return attend_decoded(query, key, value, k_recent, v_recent, k_decoded, v_decoded, quantized_len, length, options)


def attend_decoded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_recent: Tensor,
    v_recent: Tensor,
    k_decoded: Tensor,
    v_decoded: Tensor,
    quantized_len: Tensor,
    length: Tensor,
    options: tuple[float, int, float, Tensor | None],
) -> Tensor:
    """What :func:`decoded_attention` does; ``options`` are its last four."""
    state = list(zip(quantized_len.tolist(), length.tolist(), strict=True))
    # Sequences of equal lengths are one call.
    rows = [slice(None)] if len(set(state)) == 1 else [slice(b, b + 1) for b in range(len(state))]
    outputs = []
    for row, (quantized, start) in zip(rows, state, strict=False):
        first, last = start - quantized, start - quantized + query.shape[2]
        k_recent[row, :, first:last] = k_decoded[row, :, start : start + query.shape[2]] = key[row]
        if v_recent.shape[3]:
            v_recent[row, :, first:last] = v_decoded[row, :, start : start + query.shape[2]] = value[row]
        values = stored_values(v_decoded[row], k_decoded[row], value.shape[3])
        outputs.append(_attend(query[row], k_decoded[row], values, start, *options))
    return torch.cat(outputs)


@decoded_attention.register_fake
def _(query, key, value, *cache_and_options):
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])
