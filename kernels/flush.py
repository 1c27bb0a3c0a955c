"""``quantspec::flush``: quantize the oldest full group of the recent buffer of every sequence that holds 2G or more.

Decided per sequence from ``length - quantized_len``, so one call serves a ragged batch. The caller moves
``quantized_len`` once all layers are flushed.
"""

from __future__ import annotations

from torch import Tensor

from .block_table import groups_of
from .cache_layout import part_names
from .cache_op import cache_op
from .encode import encode_oldest_groups
from .hierarchical import encode_keys, encode_values, write_groups


@cache_op("quantspec::flush", mutates_args=part_names())
def flush(
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
    block_table: Tensor | None = None,
) -> None:
    """Move the oldest group of one layer from the recent buffer into the planes, in sequences that hold 2G or more.

    Args:
        k_recent, v_recent: as in ``quantspec::cached_attention``, mutated: what is left slides to the front.
        k_upper, k_lower, k_scale, k_zero, v_upper, v_lower, v_scale, v_zero: as there, mutated; none of them None.
        quantized_len, length: ``(B,)`` int64, tokens in the planes and tokens cached; ``length`` counts verified tokens
            only, so nothing unverified is ever quantized. The caller moves ``quantized_len`` after the last layer.
        block_table: as there; it names the block that a group moves into.
    """
    group_size = 2 * k_upper.shape[3]
    for b, (quantized, tokens) in enumerate(zip(quantized_len.tolist(), length.tolist(), strict=True)):
        if tokens - quantized < 2 * group_size:
            continue
        group = quantized // group_size
        oldest = groups_of(k_upper, block_table, b, group, group + 1)
        write_groups(k_recent[b, :, :group_size], oldest, encode_keys, k_upper, k_lower, k_scale, k_zero)
        write_groups(v_recent[b, :, :group_size], oldest, encode_values, v_upper, v_lower, v_scale, v_zero)
        for recent in (k_recent, v_recent):
            recent[b, :, :-group_size] = recent[b, :, group_size:].clone()


@flush.register_fake
def _(*cache):
    return None


@flush.register_kernel("cuda")
def flush_triton(
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
    block_table: Tensor | None = None,
) -> None:
    """Launch the kernels; as ``quantspec::flush``."""
    planes = (k_upper, k_lower, k_scale, k_zero, v_upper, v_lower, v_scale, v_zero)
    encode_oldest_groups(None, k_recent, v_recent, *planes, quantized_len, length, block_table)
