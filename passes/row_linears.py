"""Multiply single rows of bfloat16 as vectors on a CPU."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import add_call, aten, find_calls, finish

_ROW_LINEAR = torch.ops.quantspec.row_linear.default


class RowLinears(PassBase):
    """Matches ``aten.linear`` of bfloat16 tensors on a CPU, writes ``quantspec::row_linear``.

    It is for CPUs with native bfloat16. Requires value metadata. Ensures the same outputs up to rounding, and that no
    such linear is left.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        found = _linears(graph)
        for node in found:
            args = (*node.args, None)[:3]
            with graph.inserting_before(node):
                new = add_call(graph, _ROW_LINEAR, args, node, value=node.meta["val"])
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        if found:
            finish(graph_module)
        return PassResult(graph_module, bool(found))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        assert not _linears(graph_module.graph)


def _linears(graph: fx.Graph) -> list[fx.Node]:
    found = [(node, node.meta["val"]) for node in find_calls(graph, aten.linear.default)]
    return [node for node, value in found if value.dtype == torch.bfloat16 and value.device.type == "cpu"]
