"""Turn attention markers into ops that read the hierarchical cache."""

from __future__ import annotations

from enum import Enum

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from quantspec.kernels.hierarchical import num_value_groups

from .graph import add_call, add_placeholder, fake_mode_of, find_calls, finish


class Role(str, Enum):
    """What a lowered graph does with the cache."""

    TARGET = "target"
    DRAFT = "draft"
    PREFILL = "prefill"


# Parts of one layer's cache in the order the attention ops take them.
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
_LOWER = ("k_lower", "v_lower")


def cache_parts(role: Role) -> tuple[str, ...]:
    """The parts of a layer's cache that a role's graph takes as inputs: the draft never sees the lower planes."""
    return tuple(part for part in CACHE_PARTS if role is not Role.DRAFT or part not in _LOWER)


class LowerAttention(PassBase):
    """Matches ``quantspec::attention(q, k, v, layer, ...)`` markers, writes the role's cache op for each.

    target   ``quantspec::cached_attention`` over both planes (INT8)
    draft    ``quantspec::cached_attention`` over the upper planes (INT4)
    prefill  ``quantspec::prefill_attention``

    Adds the inputs ``quantized_len`` and ``length`` (B,) int64, for prefill ``num_new`` (B,) int64, and then for every
    layer in order its :func:`cache_parts`, named ``cache_{layer}_{part}``.

    Requires one marker per layer index. Ensures that no marker is left.
    """

    def __init__(self, role: Role, group_size: int) -> None:
        super().__init__()
        self.role = role
        self.group_size = group_size

    def requires(self, graph_module: fx.GraphModule) -> None:
        layers = [node.args[3] for node in find_calls(graph_module.graph, torch.ops.quantspec.attention.default)]
        if len(set(layers)) != len(layers):
            raise ValueError(f"attention markers share a layer index: {layers}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        markers = list(find_calls(graph, torch.ops.quantspec.attention.default))
        if not markers:
            return PassResult(graph_module, False)
        query = markers[0].args[0].meta["val"]  # type: ignore[union-attr]
        names = ["quantized_len", "length"] + (["num_new"] if self.role is Role.PREFILL else [])
        state = [add_placeholder(graph, name, (query.shape[0],), torch.int64, query.device) for name in names]
        for marker in markers:
            self._lower(graph, marker, state)
        finish(graph_module)
        return PassResult(graph_module, True)

    def _lower(self, graph: fx.Graph, marker: fx.Node, state: list[fx.Node]) -> None:
        query, key, value, layer, scale, window, softcap, sinks = marker.args
        k, v = key.meta["val"], value.meta["val"]  # type: ignore[union-attr]
        parts = self._cache_placeholders(graph, layer, k, v)  # type: ignore[arg-type]
        options = (scale, window, softcap, sinks)
        if self.role is Role.PREFILL:
            target = torch.ops.quantspec.prefill_attention.default
        else:
            target = torch.ops.quantspec.cached_attention.default
        cache = tuple(parts.get(part) for part in CACHE_PARTS)
        with graph.inserting_before(marker):
            lowered = add_call(graph, target, (query, key, value, *cache, *state, *options), marker)
        marker.replace_all_uses_with(lowered)
        graph.erase_node(marker)

    def _cache_placeholders(
        self, graph: fx.Graph, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> dict[str, fx.Node]:
        mode = fake_mode_of(graph)
        assert mode is not None
        assert mode.shape_env is not None
        # The allocated sizes are the cache's affair: no graph depends on them.
        groups, recent = (mode.shape_env.create_unbacked_symint() for _ in range(2))
        for size in (groups, recent):
            torch._check(size >= 0)
        half = self.group_size // 2
        batch, heads = key.shape[:2]
        shapes = {}
        for prefix, dense in (("k", key), ("v", value)):
            dim = dense.shape[3]
            params = (groups, dim) if prefix == "k" else (groups, self.group_size, num_value_groups(dim))
            shapes[f"{prefix}_recent"] = ((batch, heads, recent, dim), key.dtype)
            for plane in ("upper", "lower"):
                shapes[f"{prefix}_{plane}"] = ((batch, heads, groups, half, dim), torch.uint8)
            for parameter in ("scale", "zero"):
                shapes[f"{prefix}_{parameter}"] = ((batch, heads, *params), torch.float16)
        return {
            part: add_placeholder(graph, f"cache_{layer}_{part}", *shapes[part], key.device)
            for part in cache_parts(self.role)
        }
