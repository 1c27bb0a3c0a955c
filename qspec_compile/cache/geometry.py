"""How large a cache is: its slots, groups and parts, from the shapes of a model's attention layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from quantspec.kernels.cache_layout import CachePart


@dataclass(frozen=True)
class HeldState:
    """What transformers' own cache holds for an attention call, which may be less than its keys and values.

    Attributes:
        per_token: numbers of each token; 0 where the call reads what another has cached.
        most: tokens that are kept; 0 for all.
    """

    per_token: int
    most: int


@dataclass(frozen=True)
class StateShape:
    """A state that is not keys and values, as a layer of transformers' own cache holds it.

    Attributes:
        layer: of that cache.
        kind: its attribute there.
        index: which of the layer's states of that kind.
        shape: of one sequence.
        dtype: of the model's own, full precision.
    """

    layer: int
    kind: str
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class AttentionShape(Protocol):
    """One attention layer: key/value heads, head dims, and tokens of its sliding window or chunks (0 for none).

    ``reads`` is the number of the earlier one whose keys and values it attends to; None for its own. If it has a true
    ``values_in_keys``, values are the first channels of keys and not cached by themselves.
    """

    @property
    def kv_heads(self) -> int: ...
    @property
    def key_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def chunk(self) -> int: ...
    @property
    def reads(self) -> int | None: ...


def recent_slots(kv_group_size: int, num_speculative_tokens: int) -> int:
    """Tokens of the recent buffer: fewer than 2G between cycles, and the block that is being verified."""
    return 2 * kv_group_size + num_speculative_tokens + 1


def state_slots(num_speculative_tokens: int) -> int:
    """Places of a state: after the verified tokens, and after each of the block that is being verified."""
    return num_speculative_tokens + 2


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


def layer_groups(layer: AttentionShape, groups: int, kv_group_size: int) -> int:
    """Of so many groups of a sequence those that ``layer`` has places for: all, or what its window needs.

    A query behind all groups sees the ``window - 1`` tokens before it. One group more lets a text go back by one.
    """
    seen = layer.window or layer.chunk
    # At least two, as above.
    return min(groups, max(2, -(-(seen - 1) // kv_group_size) + 1)) if seen else groups


def part_shape(
    part: CachePart,
    layer: AttentionShape,
    batch: int,
    groups: int,
    group_size: int,
    recent: int,
    pages: tuple[int, int] = (0, 0),
) -> tuple[int, ...]:
    """Shape of a part of ``layer``'s cache for ``groups`` groups of ``group_size`` tokens and ``recent`` slots.

    ``pages`` are those that have scores and those that may be chosen.
    """
    value_dim = 0 if getattr(layer, "values_in_keys", False) else layer.value_dim
    head_dim = layer.key_dim if part.holds == "keys" else value_dim
    return part.shape(batch, layer.kv_heads, head_dim, groups, group_size, recent, pages)
