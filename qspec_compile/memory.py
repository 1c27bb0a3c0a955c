"""How many bytes a cache takes, from the shapes of a model's attention layers alone.

Nothing is allocated here, and no weights are needed: ``capture(model).layers`` has such shapes, and so has a model's
configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from quantspec.kernels.hierarchical import num_value_groups

from .config import QuantSpecConfig

_SCALE_BYTES = torch.float16.itemsize


@dataclass(frozen=True)
class HeldState:
    """What transformers' own cache holds for an attention call, which may be less than its keys and values.

    Attributes:
        per_token: numbers of each token; 0 where the call reads what another has cached.
        most: tokens that are kept; 0 for all.
    """

    per_token: int
    most: int


class AttentionShape(Protocol):
    """One attention layer: key/value heads, head dims, and the sliding window in tokens (0 for none)."""

    @property
    def kv_heads(self) -> int: ...
    @property
    def key_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...
    @property
    def window(self) -> int: ...


def recent_slots(kv_group_size: int, num_speculative_tokens: int) -> int:
    """Tokens of the recent buffer: fewer than 2G between cycles, and the block that is being verified."""
    return 2 * kv_group_size + num_speculative_tokens + 1


def planned_groups(num_tokens: int, kv_group_size: int, max_cache_len: int) -> int:
    """Groups that a cache has planes for, once there is room for ``num_tokens`` per sequence."""
    # The newest G tokens are never quantized.
    groups = max(0, -(-num_tokens // kv_group_size) - 1)
    if groups == 0:
        return 0
    # In steps of a sixteenth, so that a slightly longer text finds its storage and graphs as they were.
    step = 1 << max(0, groups.bit_length() - 5)
    # At least two groups: torch.compile takes sizes of 0 and 1 for constants.
    return min(max(2, -(-groups // step) * step), -(-max_cache_len // kv_group_size) - 1)


def cache_bytes_per_token(
    layers: Sequence[AttentionShape], kv_group_size: int = QuantSpecConfig.kv_group_size
) -> dict[str, float]:
    """Bytes that a quantized token takes in all layers, by part: ``upper``, ``lower`` and ``scales`` (with zeros).

    A draft step reads ``upper`` and ``scales``, a verification all three.

    Args:
        layers: the model's attention layers.
        kv_group_size: tokens quantized together (G).
    """
    plane = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers) / 2
    # Keys have a scale and a zero per channel of a group, values per 128 channels of a token.
    parameters = sum(
        2 * layer.kv_heads * (layer.key_dim / kv_group_size + num_value_groups(layer.value_dim)) for layer in layers
    )
    return {"upper": plane, "lower": plane, "scales": parameters * _SCALE_BYTES}


def expected_memory(
    layers: Sequence[AttentionShape],
    context: int,
    batch_size: int = 1,
    *,
    kv_group_size: int = QuantSpecConfig.kv_group_size,
    num_speculative_tokens: int = QuantSpecConfig.num_speculative_tokens,  # type: ignore[assignment]
    dtype: torch.dtype = torch.bfloat16,
    max_cache_len: int | None = None,
) -> dict[str, int]:
    """Bytes of a new cache with room for ``context`` tokens per sequence, prompt and output.

    Args:
        layers: the model's attention layers.
        context: tokens per sequence, prompt and output.
        batch_size: sequences.
        kv_group_size: tokens quantized together (G).
        num_speculative_tokens: most tokens drafted per cycle.
        dtype: of the recent buffer, the model's.
        max_cache_len: most tokens that a sequence may hold; ``context`` if None.

    Returns:
        Bytes by part, those of :meth:`HierarchicalCache.bytes_by_part` after ``reserve(context)``: ``upper``,
        ``lower``, ``scales`` (with zeros) and ``recent``.
    """
    groups = planned_groups(context, kv_group_size, max_cache_len or context)
    quantized = {
        part: round(batch_size * groups * kv_group_size * size)
        for part, size in cache_bytes_per_token(layers, kv_group_size).items()
    }
    slots = recent_slots(kv_group_size, num_speculative_tokens)
    per_slot = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers) * dtype.itemsize
    return {**quantized, "recent": batch_size * slots * per_slot}


def full_precision_bytes(
    layers: Sequence[AttentionShape], context: int, batch_size: int = 1, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Bytes of transformers' own cache.

    A layer of a capture knows what that cache holds for it: latent vectors, or nothing where layers share keys and
    values. Of any other layer it is taken to hold keys and values, one token less than a sliding window.

    Args:
        layers: the model's attention layers.
        context: tokens per sequence.
        batch_size: sequences.
        dtype: of keys and values.
    """
    held = [_held(layer) for layer in layers]
    elements = sum(min(context, state.most or context) * state.per_token for state in held)
    return batch_size * elements * dtype.itemsize


def _held(layer: AttentionShape) -> HeldState:
    known = getattr(layer, "held", None)
    return known or HeldState(layer.kv_heads * (layer.key_dim + layer.value_dim), max(0, layer.window - 1))
