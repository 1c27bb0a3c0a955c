"""Remove what export records but decoding does not need."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import aten, finish


class RemoveNoOps(PassBase):
    """Matches nodes that return their input unchanged, writes that input.

    Pattern: ``aten.slice(x, d, 0, maxint)`` and others of x's own shape, ``aten.to(x, ...)`` to the dtype and device x
    has, ``aten.dropout(x, p, False)``, and assertions.

    Requires value metadata to decide on ``aten.to``; nodes without it are kept. Ensures the same outputs, bit for
    bit, and that no such node is left.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        removed = 0
        for node in list(graph_module.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in (aten._assert_tensor_metadata.default, aten._assert_scalar.default):
                graph_module.graph.erase_node(node)
                removed += 1
            elif self._returns_input(node):
                node.replace_all_uses_with(node.args[0])
                graph_module.graph.erase_node(node)
                removed += 1
        if removed:
            finish(graph_module)
        return PassResult(graph_module, removed > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        calls = [node for node in graph_module.graph.nodes if node.op == "call_function"]
        assert not any(self._returns_input(node) for node in calls)

    @staticmethod
    def _returns_input(node: fx.Node) -> bool:
        if node.target is aten.slice.Tensor:
            given = dict(zip(("self", "dim", "start", "end", "step"), node.args, strict=False)) | node.kwargs
            start, end, step = given.get("start"), given.get("end"), given.get("step", 1)
            whole = start in (0, None) and (end is None or end == sys.maxsize)
            return bool(step == 1 and (whole or _has_the_same_shape(node, node.args[0])))
        if node.target is aten.dropout.default:
            return node.args[2] is False
        if node.target in (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default):
            before, after = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
            return (
                isinstance(before, torch.Tensor)
                and isinstance(after, torch.Tensor)
                and (before.dtype, before.device) == (after.dtype, after.device)
            )
        return False


def _has_the_same_shape(node: fx.Node, other: Any) -> bool:
    value, other_value = (one.meta.get("val") for one in (node, other))
    if not (isinstance(value, torch.Tensor) and isinstance(other_value, torch.Tensor)):
        return False
    # Compared as they are written, since a comparison of sizes would be a condition on them.
    return list(map(str, value.shape)) == list(map(str, other_value.shape))
