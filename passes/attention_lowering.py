"""Turn attention markers into ops that read the hierarchical cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from quantspec.kernels.cache_layout import CACHE_PARTS, DECODED_PARTS, PAGE_PARTS, TABLE_PART, CachePart, part_names

from .absorb_latents import values_in_keys
from .graph import add_call, add_placeholder, describe, fake_mode_of, find_calls, finish


class Role(StrEnum):
    """What a lowered graph does with the cache."""

    TARGET = "target"
    """Reads both planes, at 8 bits."""
    DRAFT = "draft"
    """Reads the upper planes alone, at 4 bits; on a CPU what the target reads."""
    PREFILL = "prefill"
    """Reads a prompt in chunks and fills the cache; earlier chunks at 8 bits."""


_PARTS = tuple(part.name for part in (*CACHE_PARTS, *DECODED_PARTS, *PAGE_PARTS, TABLE_PART))


@dataclass(frozen=True)
class CacheAccess:
    """How a graph's attention reads the cache.

    Attributes:
        op: called as ``op(query, key, value, *arguments, quantized_len, length, *state, scale, window, softcap,
            sinks)``; returns ``(B, T, H, Dv)``. Where it goes on with ``cos, sin, rotary_dim, interleaved``, each None
            or left out, :class:`quantspec.passes.FuseRotation` has it rotate query and key.
        parts: names of the parts that the graph takes as inputs.
        state: names of further ``(B,)`` int64 inputs.
        arguments: names of the parts that the op takes, None for those that are not in ``parts``.
        by_name: names of the parts that it takes by keyword, after all its other arguments; ``block_table`` for an op
            that reads planes or scales out of a pool, too.
        fills: whether the op moves tokens into the planes; it takes ``stores`` and ``host_lengths`` by keyword then,
            and the graph has ``host_lengths`` as an input.
        scores: whether the op leaves scores of pages; it takes ``joins`` by keyword then.

    Raises:
        ValueError: a part that no cache has.
    """

    op: torch._ops.OpOverload
    parts: tuple[str, ...]
    state: tuple[str, ...] = ()
    arguments: tuple[str, ...] = part_names()
    by_name: tuple[str, ...] = ()
    fills: bool = False
    scores: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in (*self.parts, *self.arguments, *self.by_name) if name not in _PARTS]
        if unknown:
            raise ValueError(f"no cache has a part {', '.join(map(repr, unknown))}; it has {', '.join(_PARTS)}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of all parts that the graph takes, in order."""
        return (*self.parts, *self.by_name)

    @property
    def reads_pools(self) -> bool:
        """Whether the cache's planes may be in a pool."""
        planes = set(part_names("upper", "lower", "scales"))
        return TABLE_PART.name in self.by_name or planes.isdisjoint(self.parts)


_TABLE = (TABLE_PART.name,)

ACCESSES: dict[str, CacheAccess] = {
    Role.TARGET: CacheAccess(torch.ops.quantspec.cached_attention.default, part_names(), by_name=_TABLE),
    Role.DRAFT: CacheAccess(
        torch.ops.quantspec.cached_attention.default, part_names("recent", "upper", "scales"), by_name=_TABLE
    ),
    Role.PREFILL: CacheAccess(
        torch.ops.quantspec.prefill_attention.default, part_names(), state=("num_new",), by_name=_TABLE, fills=True
    ),
}
"""How each role's graph reads the cache; a further kind of draft adds its own."""


_DECODED = (*part_names("recent"), *(part.name for part in DECODED_PARTS))
DECODED_ACCESS = CacheAccess(torch.ops.quantspec.decoded_attention.default, _DECODED, arguments=_DECODED)
"""How a CPU's graphs read the cache: dense, old tokens as the planes decode at 8 bits."""

_SCORED = (*part_names(), "page_scores")
SCORED_ACCESS = CacheAccess(
    torch.ops.quantspec.scored_attention.default, _SCORED, arguments=_SCORED, by_name=_TABLE, scores=True
)
"""How the target reads the cache for a sparse draft: it leaves the scores of pages."""

_SCORED_DECODED = (*_DECODED, "v_scale", "page_scores")
SCORED_DECODED_ACCESS = CacheAccess(
    torch.ops.quantspec.scored_decoded_attention.default,
    _SCORED_DECODED,
    arguments=_SCORED_DECODED,
    by_name=_TABLE,
    scores=True,
)
"""The same on a CPU."""

_SPARSE = (*part_names("recent", "upper", "scales"), "chosen_pages", "num_chosen")
SPARSE_ACCESS = CacheAccess(torch.ops.quantspec.sparse_attention.default, _SPARSE, arguments=_SPARSE, by_name=_TABLE)
"""How a sparse draft reads the cache: of the upper planes the chosen pages."""


def cache_parts(role: str, device: torch.device | str = "cuda") -> tuple[str, ...]:
    """Names of the cache's parts that a role's graph takes for every layer, the draft's by the usual recipe.

    On a GPU it sees no lower planes.
    """
    on_cpu = role != Role.PREFILL and torch.device(device).type == "cpu"
    return (DECODED_ACCESS if on_cpu else ACCESSES[role]).inputs


class LowerAttention(PassBase):
    """Matches ``quantspec::attention(q, k, v, layer, ...)`` markers, writes the op of a :class:`CacheAccess` for each.

    Adds the inputs ``quantized_len`` and ``length`` (B,) int64, the access's ``state``, for an op that fills the cache
    ``host_lengths (2 + len(state), B)`` with the same numbers on the CPU, and then for every layer in order the
    access's ``inputs``, named ``cache_{layer}_{part}`` and with their :class:`CachePart` as ``meta["cache_part"]``. Of
    layers that read the same keys and values, the last one fills their cache, and all but the first join their scores
    of pages to those that are there.

    Requires one marker per layer index, else raises ``ValueError``. Ensures that no marker is left.
    """

    def __init__(self, access: CacheAccess, group_size: int, shared: Mapping[int, int] | None = None) -> None:
        """``access`` says what is read by which op, ``group_size`` is the cache's tokens per group (G).

        ``shared`` has each layer that reads the keys and values of an earlier one, with the number of that.
        """
        super().__init__()
        self.shared = shared or {}
        self.last_readers = {home: layer for layer, home in sorted(self.shared.items())}
        self.access = access
        self.group_size = group_size

    def requires(self, graph_module: fx.GraphModule) -> None:
        markers: dict[object, list[fx.Node]] = defaultdict(list)
        for node in find_calls(graph_module.graph, torch.ops.quantspec.attention.default):
            markers[node.args[3]].append(node)
        for layer, nodes in markers.items():
            if len(nodes) > 1:
                raise ValueError(f"attention markers share layer index {layer}: {', '.join(map(describe, nodes))}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        markers = list(find_calls(graph, torch.ops.quantspec.attention.default))
        if not markers:
            return PassResult(graph_module, False)
        query = markers[0].args[0].meta["val"]  # type: ignore[union-attr]
        counts = query.new_empty(query.shape[:1], dtype=torch.int64)
        state = [add_placeholder(graph, name, counts) for name in ("quantized_len", "length", *self.access.state)]
        named = {}
        if self.access.fills:
            known = counts.new_empty((len(state), *counts.shape), device="cpu")
            named["host_lengths"] = add_placeholder(graph, "host_lengths", known)
        values = _CacheValues(graph, self.group_size)
        for marker in markers:
            self._lower(graph, marker, state, named, values)
        finish(graph_module)
        return PassResult(graph_module, True)

    def _lower(
        self,
        graph: fx.Graph,
        marker: fx.Node,
        state: list[fx.Node],
        named: Mapping[str, fx.Node],
        values: _CacheValues,
    ) -> None:
        query, key, value, layer, *options = marker.args
        dense = {"keys": key.meta["val"], "values": value.meta["val"]}  # type: ignore[union-attr]
        if values_in_keys(marker):
            dense["values"] = dense["values"][..., :0]
        parts = {part.name: part for part in (*CACHE_PARTS, *DECODED_PARTS, *PAGE_PARTS, TABLE_PART)}
        inputs: dict[str, fx.Node] = {}
        for name in self.access.inputs:
            part = parts[name]
            inputs[name] = add_placeholder(graph, f"cache_{layer}_{name}", values.of(part, dense[part.holds]))
            inputs[name].meta["cache_part"] = part
        cache = tuple(inputs.get(name) for name in self.access.arguments)
        with graph.inserting_before(marker):
            arguments = (query, key, value, *cache, *state, *options)
            lowered = add_call(graph, self.access.op, arguments, marker, value=marker.meta.get("val"))
        lowered.kwargs = {**{name: inputs[name] for name in self.access.by_name}, **named}
        number: Any = layer
        if self.access.fills and self.last_readers.get(self.shared.get(number, number), number) != number:
            lowered.kwargs = {**lowered.kwargs, "stores": False}
        if self.access.scores and number in self.shared:
            lowered.kwargs = {**lowered.kwargs, "joins": True}
        marker.replace_all_uses_with(lowered)
        graph.erase_node(marker)


class _CacheValues:
    """Value metadata of cache inputs; one fake tensor per distinct shape, since making them is slow."""

    def __init__(self, graph: fx.Graph, group_size: int) -> None:
        self.mode = fake_mode_of(graph)
        self.group_size = group_size
        self.made: dict[tuple, torch.Tensor] = {}
        assert self.mode is not None
        assert self.mode.shape_env is not None
        # The allocated sizes are the cache's affair: no graph depends on them.
        self.groups: Any
        self.recent: Any
        self.groups, self.recent, *self.pages = (self.mode.shape_env.create_unbacked_symint() for _ in range(4))

    def of(self, part: CachePart, dense: torch.Tensor) -> torch.Tensor:
        """The value of ``part`` for a layer whose keys or values are ``dense (B, K, T, D)``."""
        batch, heads, _, dim = dense.shape
        shape = part.shape(batch, heads, dim, self.groups, self.group_size, self.recent, tuple(self.pages))
        dtype = part.dtype or dense.dtype
        key = (*map(str, shape), dtype)
        if key not in self.made:
            with self.mode:  # type: ignore[union-attr]
                self.made[key] = torch.empty(shape, dtype=dtype, device=dense.device)
        return self.made[key]
