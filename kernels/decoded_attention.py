"""``quantspec::decoded_attention``: a few new tokens attend to the decoded copy of the hierarchical cache, on a CPU.

    out[b, t, h] = sum_j p_j v_j,   p = softmax_j(softcap(scale * q[b, h, t] . k_j)),   j <= length[b] + t

as ``quantspec::cached_attention`` with both planes, but tokens ``j < quantized_len[b]`` were decoded when they went
into the planes: the copy holds every cached token by position, so that a step appends and attends. Position j is in
slot ``j % S`` of S, so that with a window there may be fewer slots than tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import first_visible, masked_attention
from .cache_op import cache_op
from .hierarchical import stored_values


def tokens_of(copy: Tensor, first: int, last: int) -> Tensor:
    """Tokens ``first`` to ``last`` of a decoded copy ``(..., S, D)``; a view where they lie in a row."""
    slots = copy.shape[-2]
    begin = first % slots
    end = begin + last - first
    if end <= slots:
        return copy[..., begin:end, :]
    return torch.cat((copy[..., begin:, :], copy[..., : end - slots, :]), -2)


def put_tokens(copy: Tensor, first: int, tokens: Tensor) -> None:
    """Write ``tokens (..., T, D)`` from position ``first`` on to a decoded copy ``(..., S, D)``, in place."""
    slots, count = copy.shape[-2], tokens.shape[-2]
    begin = first % slots
    before_end = min(count, slots - begin)
    copy[..., begin : begin + before_end, :] = tokens[..., :before_end, :]
    copy[..., : count - before_end, :] = tokens[..., before_end:, :]


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
    """Queries ``(B, H, T, D)`` from position ``start`` on over a copy's ``(B, K, S, D)`` keys; ``(B, T, H, Dv)``."""
    batch, heads, tokens, head_dim = query.shape
    kv_heads, last = keys.shape[1], start + tokens
    # Where this cuts, it cuts between chunks, so that they begin at multiples of their size still.
    first = first_visible(start, window)
    keys, values = tokens_of(keys, first, last), tokens_of(values, first, last)
    if softcap > 0 or sinks is not None:
        return masked_attention(query, keys, values, start - first, scale, window, softcap, sinks)
    # A model may compute its queries in more precision than it caches keys in.
    keys, values = keys.to(query.dtype), values.to(query.dtype)
    few = heads <= 3 * kv_heads and keys.shape[-1] == values.shape[-1]
    if tokens == 1 and query.dtype == torch.bfloat16 and few:
        # A row a query head took 0.5 to 0.9 of the time of reading keys once: on an Intel Xeon with AMX, two or three
        # query heads a key head, of 64 or 128 channels. With eight it took 1.6 times as long, in float16 1.6 to 2.4.
        return F.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True).transpose(1, 2)
    mask = None
    if tokens > 1:
        positions, own = torch.arange(first, last), torch.arange(start, last)[:, None]
        mask = positions <= own
        if window:
            mask &= positions >= first_visible(own, window)
        mask = mask.repeat(heads // kv_heads, 1)
    # The query heads of a key head are rows of one product, so its keys are read once.
    rows = query.reshape(batch, kv_heads, -1, head_dim)
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, tokens, -1).transpose(1, 2)


@cache_op(
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
        k_decoded, v_decoded: ``(B, K, S, D)`` and ``(B, K, S, Dv)`` in the model's dtype, mutated; slot
            ``j % S`` holds position j, of all that a query sees.
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
        k_recent[row, :, first:last] = key[row]
        put_tokens(k_decoded[row], start, key[row])
        if v_recent.shape[3]:
            v_recent[row, :, first:last] = value[row]
            put_tokens(v_decoded[row], start, value[row])
        values = stored_values(v_decoded[row], k_decoded[row], value.shape[3])
        outputs.append(_attend(query[row], k_decoded[row], values, start, *options))
    return torch.cat(outputs)


@decoded_attention.register_fake
def _(query, key, value, *cache_and_options):
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])
