"""How many bytes a cache takes, from the shapes of a model's attention layers alone.

Nothing is allocated here, and no weights are needed: ``capture(model).layers`` has such shapes, and so has a model's
configuration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from quantspec.kernels.cache_layout import parts_on

from .cache.geometry import (
    AttentionShape,
    HeldState,
    StateShape,
    layer_groups,
    part_shape,
    planned_groups,
    recent_slots,
    state_slots,
)
from .config import DEFAULT_SPECULATIVE_TOKENS, QuantSpecConfig


def cache_bytes_per_token(
    layers: Sequence[AttentionShape], kv_group_size: int = QuantSpecConfig.kv_group_size
) -> dict[str, float]:
    """Bytes that a quantized token takes in all layers, by part: ``upper``, ``lower`` and ``scales`` (with zeros).

    A draft step reads ``upper`` and ``scales``, a verification all three.

    Args:
        layers: the model's attention layers.
        kv_group_size: tokens quantized together (G).
    """
    group = _bytes_by_part(layers, 1, 1, kv_group_size, 0, torch.uint8, "cuda")
    return {kind: size / kv_group_size for kind, size in group.items() if kind != "recent"}


def _bytes_by_part(
    layers: Sequence[AttentionShape],
    batch_size: int,
    groups: int,
    group_size: int,
    recent: int,
    dtype: torch.dtype,
    device: torch.device | str,
    pooled: bool = False,
) -> dict[str, int]:
    """Bytes of a cache with room for ``groups`` groups of each sequence and ``recent`` slots."""
    parts = parts_on(device)
    totals = {str(part.kind): 0 for part in parts}
    for layer in (layer for layer in layers if layer.reads is None):
        places = groups if pooled else layer_groups(layer, groups, group_size)
        for part in parts:
            shape = part_shape(part, layer, batch_size, places, group_size, recent)
            totals[part.kind] += math.prod(shape) * (part.dtype or dtype).itemsize
    return totals


def expected_memory(
    layers: Sequence[AttentionShape],
    context: int,
    batch_size: int = 1,
    *,
    kv_group_size: int = QuantSpecConfig.kv_group_size,
    num_speculative_tokens: int = DEFAULT_SPECULATIVE_TOKENS,
    dtype: torch.dtype = torch.bfloat16,
    max_cache_len: int | None = None,
    device: torch.device | str = "cuda",
    states: Sequence[StateShape] = (),
    pooled: bool = False,
) -> dict[str, int]:
    """Bytes of a new cache with room for ``context`` tokens per sequence, prompt and output.

    Args:
        layers: the model's attention layers.
        context: tokens per sequence, prompt and output.
        batch_size: sequences.
        kv_group_size: tokens quantized together (G).
        num_speculative_tokens: most tokens drafted per cycle.
        dtype: of the recent buffer and the decoded copy, the model's.
        max_cache_len: most tokens that a sequence may hold; ``context`` if None.
        device: where the cache is. On a CPU it has a decoded copy, which takes what transformers' own cache does.
        states: what layers keep besides keys and values.
        pooled: whether planes are in an engine's pool, where layers with a window have every group.

    Returns:
        Bytes by part, those of :meth:`HierarchicalCache.bytes_by_part` after ``reserve(context)``: ``upper``,
        ``lower``, ``scales`` (with zeros), ``recent``, on a CPU ``decoded`` and, where layers keep any, ``state``.
        What a sparse draft keeps of pages, less than a thousandth of that, is left out.
    """
    groups = planned_groups(context, kv_group_size, max_cache_len or context)
    slots = recent_slots(kv_group_size, num_speculative_tokens)
    totals = _bytes_by_part(layers, batch_size, groups, kv_group_size, slots, dtype, device, pooled)
    if states:
        totals["state"] = batch_size * state_slots(num_speculative_tokens) * _state_bytes(states)
    return totals


def full_precision_bytes(
    layers: Sequence[AttentionShape],
    context: int,
    batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    states: Sequence[StateShape] = (),
) -> int:
    """Bytes of transformers' own cache.

    A layer of a capture knows what that cache holds for it: latent vectors, or nothing where layers share keys and
    values. Of any other layer it is taken to hold keys and values, one token less than a sliding window.

    Args:
        layers: the model's attention layers.
        context: tokens per sequence.
        batch_size: sequences.
        dtype: of keys and values.
        states: what layers keep besides, once for each sequence.
    """
    held = [_held(layer) for layer in layers]
    elements = sum(min(context, state.most or context) * state.per_token for state in held)
    return batch_size * (elements * dtype.itemsize + _state_bytes(states))


def _state_bytes(states: Sequence[StateShape]) -> int:
    return sum(math.prod(state.shape) * state.dtype.itemsize for state in states)


def _held(layer: AttentionShape) -> HeldState:
    known = getattr(layer, "held", None)
    return known or HeldState(layer.kv_heads * (layer.key_dim + layer.value_dim), max(0, layer.window - 1))
