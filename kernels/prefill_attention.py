"""``quantspec::prefill_attention``: attend over a prompt in full precision and store it in the hierarchical cache.

The ``num_new[b]`` new tokens attend to each other and to the recent buffer at full precision, and to tokens already in
the planes through the target's INT8 read (chunked prompts, continued conversations). Of the tokens then unquantized,
the oldest whole groups go into the planes such that G..2G-1 stay in the recent buffer; fewer than 2G all stay there.

Which kernels attend, and over how many keys, follows from the lengths, so the host has to know them. Who calls every
layer with the same ones passes them: no layer then waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .attention import attention_dtype, first_visible, masked_attention
from .block_table import groups_of, num_places
from .cache_layout import part_names
from .cache_op import cache_op
from .dense_tokens import dense_tokens, dense_tokens_triton
from .encode import encode_oldest_groups
from .hierarchical import encode_keys, encode_values, num_flushed_groups, write_groups


def _lengths_of(lengths: tuple[Tensor, Tensor, Tensor], host_lengths: Tensor | None) -> list[tuple[int, ...]]:
    """(quantized, cached, new) tokens of each sequence; without ``host_lengths`` one copy waits for the device."""
    known = torch.stack(lengths) if host_lengths is None else host_lengths
    return list(zip(*known.tolist(), strict=True))


def _attend_prompts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: tuple[Tensor, ...],
    state: Sequence[tuple[int, ...]],
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    block_table: Tensor | None,
    dense: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:
    """Attention of the new tokens; ``state`` holds (quantized, cached, new) tokens per sequence. Padding rows are 0.

    ``cache`` is the planes, scales and zeros of keys, those of values, and the two recent buffers; ``dense`` is
    :func:`dense_tokens`, or what does the same.
    """
    batch, heads, tokens, _ = query.shape
    if all(start == 0 and new == tokens for _, start, new in state):
        return masked_attention(query, key, value, 0, scale, window, softcap, sinks)
    dtype = attention_dtype(query)
    planes, recent = cache[:-2], (cache[-2], cache[-1])

    def attended(b: int, quantized: int, start: int, new: int) -> Tensor:
        keys, values = key[b, :, :new], value[b, :, :new]
        oldest = first_visible(start, window)
        if start:
            keys, values = dense(keys, values, oldest, start, b, quantized, dtype, planes, recent, block_table)
        rows, offset = query[b : b + 1, :, :new].to(keys.dtype), start - oldest
        return masked_attention(rows, keys[None], values[None], offset, scale, window, softcap, sinks)

    # A single sequence without padding is the output itself.
    if batch == 1 and state[0][2] == tokens:
        return attended(0, *state[0]).to(query.dtype)
    out = query.new_zeros(batch, tokens, heads, value.shape[3])
    for b, (quantized, start, new) in enumerate(state):
        if new:
            out[b, :new] = attended(b, quantized, start, new)[0]
    return out


@cache_op("quantspec::prefill_attention", mutates_args=part_names())
def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_recent: Tensor,
    v_recent: Tensor,
    k_upper: Tensor,
    k_lower: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_upper: Tensor,
    v_lower: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    quantized_len: Tensor,
    length: Tensor,
    num_new: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    block_table: Tensor | None = None,
    stores: bool = True,
    host_lengths: Tensor | None = None,
) -> Tensor:
    """Attend over right-padded new tokens and cache the valid ones.

    Args:
        query: ``(B, H, T, D)`` of a float dtype, after RoPE; token t of sequence b sits at position ``length[b] + t``,
            and rows from ``num_new[b]`` on are padding.
        key, value: ``(B, K, T, D)`` and ``(B, K, T, Dv)`` of the query's dtype; padding is not cached.
        k_recent, v_recent: as in ``quantspec::cached_attention``, mutated.
        k_upper, k_lower, k_scale, k_zero, v_upper, v_lower, v_scale, v_zero: as there, mutated; none of them None.
        quantized_len, length: ``(B,)`` int64, the cache's state before this call; the caller advances them after the
            last layer (``HierarchicalCache.advance_prefill``).
        num_new: ``(B,)`` int64, valid new tokens per sequence.
        scale, window, softcap, sinks: as in ``quantspec::attention``.
        block_table: as in ``quantspec::cached_attention``; it names the blocks that groups are written to, too.
        stores: False leaves the cache as it is, for a later layer that reads the same keys and values.
        host_lengths: ``(3, B)`` int64 on the CPU, what ``quantized_len``, ``length`` and ``num_new`` hold. Without it
            the op reads those, and on a GPU waits for them.

    Returns:
        ``(B, T, H, Dv)`` in the query's dtype; zero in padding rows.
    """
    planes = (k_upper, k_lower, k_scale, k_zero, v_upper, v_lower, v_scale, v_zero)
    state = _lengths_of((quantized_len, length, num_new), host_lengths)
    cache = (*planes, k_recent, v_recent)
    out = _attend_prompts(query, key, value, cache, state, scale, window, softcap, sinks, block_table, dense_tokens)
    if not stores:
        return out
    group_size = 2 * k_upper.shape[3]
    for b, (quantized, start, new) in enumerate(state):
        k_tail = torch.cat((k_recent[b, :, : start - quantized], key[b, :, :new]), 1)
        v_tail = torch.cat((v_recent[b, :, : start - quantized], value[b, :, :new, : v_recent.shape[3]]), 1)
        flushed = num_flushed_groups(k_tail.shape[1], group_size) * group_size
        # Where a window is all that has places, earlier groups would be overwritten.
        lost = max(0, flushed - num_places(k_upper, block_table) * group_size)
        bounds = ((quantized + lost) // group_size, (quantized + flushed) // group_size)
        oldest = groups_of(k_upper, block_table, b, *bounds)
        write_groups(k_tail[:, lost:flushed], oldest, encode_keys, k_upper, k_lower, k_scale, k_zero)
        write_groups(v_tail[:, lost:flushed], oldest, encode_values, v_upper, v_lower, v_scale, v_zero)
        kept = k_tail.shape[1] - flushed
        k_recent[b, :, :kept] = k_tail[:, flushed:]
        v_recent[b, :, :kept] = v_tail[:, flushed:]
    return out


@prefill_attention.register_fake
def _(query, key, value, *cache_and_options):
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])


@prefill_attention.register_kernel("cuda")
def prefill_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_recent: Tensor,
    v_recent: Tensor,
    k_upper: Tensor,
    k_lower: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_upper: Tensor,
    v_lower: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    quantized_len: Tensor,
    length: Tensor,
    num_new: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    block_table: Tensor | None = None,
    stores: bool = True,
    host_lengths: Tensor | None = None,
) -> Tensor:
    """Attention by torch's kernels, decoding and encoding by Triton's; as ``quantspec::prefill_attention``."""
    planes = (k_upper, k_lower, k_scale, k_zero, v_upper, v_lower, v_scale, v_zero)
    state = _lengths_of((quantized_len, length, num_new), host_lengths)
    cache = (*planes, k_recent, v_recent)
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    options = (scale, window, softcap, sinks, block_table)
    out = _attend_prompts(query, key, value, cache, state, *options, dense_tokens_triton)
    if stores:
        encode_oldest_groups((key, value, num_new), k_recent, v_recent, *planes, quantized_len, length, block_table)
    return out
