"""Multiply single rows of bfloat16 as vectors, on CPUs that have it."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from quantspec.kernels.cpu_features import cpu_lacks_half_matmul

from .graph import add_call, aten, find_calls, finish

_ROW_LINEAR = torch.ops.quantspec.row_linear.default


class RowLinears(PassBase):
    """Matches ``aten.linear`` of bfloat16 tensors on a CPU with native bfloat16, writes ``quantspec::row_linear``.

    Requires value metadata. Ensures the same outputs up to rounding, and that no such linear is left.
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
    if cpu_lacks_half_matmul():
        return []
    calls = [node for node in find_calls(graph, aten.linear.default) if "val" in node.meta]
    values = [node.meta["val"] for node in calls]
    return [
        node
        for node, value in zip(calls, values, strict=True)
        if value.dtype == torch.bfloat16 and value.device.type == "cpu"
    ]
