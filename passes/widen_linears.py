"""Prefill half-precision models on CPUs that have no half-precision matmul."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import add_call, aten, find_calls, finish

_HALF = (torch.bfloat16, torch.float16)


class WidenLinears(PassBase):
    """Matches ``aten.linear`` of half-precision tensors, writes it in float32 with casts around.

    ``linear(x, W, b)`` becomes ``to(linear(float(x), float(W), float(b)), dtype)``. Without native instructions a
    bfloat16 matmul over a long prompt takes several times as long as casting the weights and multiplying in float32;
    the wide copy of a weight lives only as long as its matmul.

    Requires nothing. Ensures the same outputs up to the (better) accumulation, and that no such linear is left.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        found = _narrow(graph)
        for node in found:
            value = node.meta["val"]
            with graph.inserting_before(node):
                wide = [
                    None if arg is None else add_call(graph, aten.to.dtype, (arg, torch.float32), node)
                    for arg in node.args
                ]
                out = add_call(graph, aten.linear.default, tuple(wide), node)
                out = add_call(graph, aten.to.dtype, (out, value.dtype), node, value=value)
            node.replace_all_uses_with(out)
            graph.erase_node(node)
        if found:
            finish(graph_module)
        return PassResult(graph_module, bool(found))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        assert not _narrow(graph_module.graph)


def _narrow(graph: fx.Graph) -> list[fx.Node]:
    """Linears in half precision on a CPU."""
    calls = [node for node in find_calls(graph, aten.linear.default) if "val" in node.meta]
    return [node for node in calls if node.meta["val"].dtype in _HALF and node.meta["val"].device.type == "cpu"]
