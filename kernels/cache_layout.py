"""The parts of one layer's hierarchical cache: their names, order, shapes and dtypes, and what each counts as.

The ops take the parts in this order; the cache, the graphs' inputs and the memory estimates are made from it. Only a
cache on a CPU has the parts of ``DECODED_PARTS``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from .hierarchical import num_value_groups

Kind = Literal["upper", "lower", "scales", "recent", "decoded", "pages"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What parts count as where memory is told: the two planes, scales with zeros, the recent buffer, the decoded copy, and
what is known of pages."""


@dataclass(frozen=True)
class CachePart:
    """One tensor of a layer's cache.

    Attributes:
        name: of the ops' argument.
        holds: what is in it, ``"keys"`` or ``"values"``.
        kind: what it counts as.
        axes: its axes in order. B batch, K key/value heads, R recent slots, N groups of G tokens, D channels of a head,
            V groups of channels, each with a value scale (:func:`quantspec.kernels.hierarchical.num_value_groups`),
            S = N * G + R cached tokens, P pages that have scores, W pages that may be chosen.
        dtype: None for the model's.
        tokens_adjacent_on_cuda: whether CUDA stores its last two axes the other way round, since tokens are what the
            product with a value plane sums over.
    """

    name: str
    holds: Literal["keys", "values"]
    kind: Kind
    axes: tuple[str, ...]
    dtype: torch.dtype | None
    tokens_adjacent_on_cuda: bool = False

    @property
    def group_axis(self) -> int | None:
        """The axis that grows with the number of groups; None for a part that has none."""
        return next((index for index, axis in enumerate(self.axes) if axis in ("N", "S", "P", "W")), None)

    @property
    def is_pooled(self) -> bool:
        """Whether a pool has it for all sequences, if there is one."""
        return "N" in self.axes

    def shape(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        groups: int,
        group_size: int,
        recent: int,
        pages: tuple[int, int] = (0, 0),
    ) -> tuple[int, ...]:
        """Its shape for ``kv_heads`` heads of ``head_dim`` channels, ``groups`` groups and ``recent`` slots.

        ``pages`` are those that have scores and those that may be chosen. All but the heads and dims may be symbols.
        """
        sizes = {
            "B": batch,
            "K": kv_heads,
            "R": recent,
            "N": groups,
            "S": groups * group_size + recent,
            "G": group_size,
            "G/2": group_size // 2,
            "D": head_dim,
            "V": num_value_groups(head_dim),
            "P": pages[0],
            "W": pages[1],
            "2": 2,
        }
        return tuple(sizes[axis] for axis in self.axes)


_RECENT = ("B", "K", "R", "D")
_PLANE = ("B", "K", "N", "G/2", "D")
_PER_CHANNEL = ("B", "K", "N", "D")
_PER_TOKEN = ("B", "K", "N", "G", "V")
_CACHED = ("B", "K", "S", "D")

CACHE_PARTS = (
    CachePart("k_recent", "keys", "recent", _RECENT, None),
    CachePart("v_recent", "values", "recent", _RECENT, None),
    CachePart("k_upper", "keys", "upper", _PLANE, torch.uint8),
    CachePart("k_lower", "keys", "lower", _PLANE, torch.uint8),
    CachePart("k_scale", "keys", "scales", _PER_CHANNEL, torch.float16),
    CachePart("k_zero", "keys", "scales", _PER_CHANNEL, torch.float16),
    CachePart("v_upper", "values", "upper", _PLANE, torch.uint8, tokens_adjacent_on_cuda=True),
    CachePart("v_lower", "values", "lower", _PLANE, torch.uint8, tokens_adjacent_on_cuda=True),
    CachePart("v_scale", "values", "scales", _PER_TOKEN, torch.float16),
    CachePart("v_zero", "values", "scales", _PER_TOKEN, torch.float16),
)
"""Parts of one layer's cache, in the order in which every op takes them."""

DECODED_PARTS = (
    CachePart("k_decoded", "keys", "decoded", _CACHED, None),
    CachePart("v_decoded", "values", "decoded", _CACHED, None),
)
"""The same tokens by position, those of the planes decoded at 8 bits; ``quantspec::decoded_attention`` reads them.

A CPU would spend most of a step on decoding the planes again, and has the memory.
"""

PAGE_PARTS = (
    CachePart("page_scores", "keys", "pages", ("B", "K", "P"), torch.float32),
    CachePart("chosen_pages", "keys", "pages", ("B", "K", "W"), torch.int32),
    CachePart("num_chosen", "keys", "pages", ("B", "K", "2"), torch.int32),
)
"""What sparse draft attention knows of pages, see ``quantspec::choose_pages``; a cache for another draft has none.

They are rows of tensors that serve all layers."""

TABLE_PART = CachePart("block_table", "keys", "pages", ("B", "N"), torch.int32)
"""Where a pool that all sequences share has the groups of each, in all layers; see ``block_table``.

Its N is the most groups of a sequence; planes and scales have a B of 1 then, and the blocks of the pool for N. A cache
without a pool has one without elements."""


def parts_on(device: torch.device | str) -> tuple[CachePart, ...]:
    """Parts that a layer's cache has on ``device``."""
    return (*CACHE_PARTS, *DECODED_PARTS) if torch.device(device).type == "cpu" else CACHE_PARTS


def part_names(*kinds: Kind) -> tuple[str, ...]:
    """Names of the parts of these kinds in :data:`CACHE_PARTS`, in order; of all of them if no kind is named."""
    return tuple(part.name for part in CACHE_PARTS if not kinds or part.kind in kinds)
