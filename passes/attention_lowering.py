"""Turn attention markers into ops that read the hierarchical cache."""

from __future__ import annotations

from collections import defaultdict
from enum import StrEnum

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from quantspec.kernels.hierarchical import num_value_groups

from .graph import add_call, add_placeholder, describe, fake_mode_of, find_calls, finish


class Role(StrEnum):
    """What a lowered graph does with the cache."""

    TARGET = "target"
    """Reads both planes, at 8 bits."""
    DRAFT = "draft"
    """Reads the upper planes alone, at 4 bits."""
    PREFILL = "prefill"
    """Reads a prompt in chunks and fills the cache; earlier chunks at 8 bits."""


CACHE_PARTS = (
    "k_recent",
    "v_recent",
    "k_upper",
    "k_lower",
    "k_scale",
    "k_zero",
    "v_upper",
    "v_lower",
    "v_scale",
    "v_zero",
)
"""Parts of one layer's cache in the order the attention ops take them."""
_LOWER = ("k_lower", "v_lower")


def cache_parts(role: Role) -> tuple[str, ...]:
    """The parts of a layer's cache that a role's graph takes as inputs: the draft never sees the lower planes."""
    return tuple(part for part in CACHE_PARTS if role is not Role.DRAFT or part not in _LOWER)


class LowerAttention(PassBase):
    """Matches ``quantspec::attention(q, k, v, layer, ...)`` markers, writes the role's cache op for each.

    - target: ``quantspec::cached_attention`` over both planes (INT8)
    - draft: ``quantspec::cached_attention`` over the upper planes (INT4)
    - prefill: ``quantspec::prefill_attention``

    Adds the inputs ``quantized_len`` and ``length`` (B,) int64, for prefill ``num_new`` (B,) int64, and then for every
    layer in order its :func:`cache_parts`, named ``cache_{layer}_{part}``.

    Requires one marker per layer index, else raises ``ValueError``. Ensures that no marker is left.
    """

    def __init__(self, role: Role, group_size: int) -> None:
        """``role`` chooses the op, ``group_size`` is the cache's tokens per group (G)."""
        super().__init__()
        self.role = role
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
        names = ["quantized_len", "length"] + (["num_new"] if self.role is Role.PREFILL else [])
        counts = query.new_empty(query.shape[:1], dtype=torch.int64)
        state = [add_placeholder(graph, name, counts) for name in names]
        values = _CacheValues(graph, self.group_size)
        for marker in markers:
            self._lower(graph, marker, state, values)
        finish(graph_module)
        return PassResult(graph_module, True)

    def _lower(self, graph: fx.Graph, marker: fx.Node, state: list[fx.Node], values: _CacheValues) -> None:
        query, key, value, layer, scale, window, softcap, sinks = marker.args
        dense = {"k": key.meta["val"], "v": value.meta["val"]}  # type: ignore[union-attr]
        parts = {
            part: add_placeholder(graph, f"cache_{layer}_{part}", values.of(part, dense[part[0]]))
            for part in cache_parts(self.role)
        }
        options = (scale, window, softcap, sinks)
        if self.role is Role.PREFILL:
            target = torch.ops.quantspec.prefill_attention.default
        else:
            target = torch.ops.quantspec.cached_attention.default
        cache = tuple(parts.get(part) for part in CACHE_PARTS)
        with graph.inserting_before(marker):
            arguments = (query, key, value, *cache, *state, *options)
            lowered = add_call(graph, target, arguments, marker, value=marker.meta.get("val"))
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
        self.groups, self.recent = (self.mode.shape_env.create_unbacked_symint() for _ in range(2))

    def of(self, part: str, dense: torch.Tensor) -> torch.Tensor:
        """The value of ``part`` for a layer whose keys or values are ``dense (B, K, T, D)``."""
        batch, heads, _, dim = dense.shape
        shape: tuple
        if part.endswith("recent"):
            shape, dtype = (batch, heads, self.recent, dim), dense.dtype
        elif part.endswith(("upper", "lower")):
            shape, dtype = (batch, heads, self.groups, self.group_size // 2, dim), torch.uint8
        elif part.startswith("k"):
            shape, dtype = (batch, heads, self.groups, dim), torch.float16
        else:
            shape, dtype = (batch, heads, self.groups, self.group_size, num_value_groups(dim)), torch.float16
        key = (*map(str, shape), dtype)
        if key not in self.made:
            with self.mode:  # type: ignore[union-attr]
                self.made[key] = torch.empty(shape, dtype=dtype, device=dense.device)
        return self.made[key]
