"""Run linears that read the same input as one."""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import add_buffer, add_call, aten, find_calls, finish, get_tensor
from .int4_weights import INT4_LINEARS


class FuseSharedInputLinears(PassBase):
    """Matches several ``quantspec::int4_linear`` of one input (Q/K/V, gate/up), writes one over their stacked rows.

    ``[y_i = int4_linear(x, W_i)]`` becomes ``split(int4_linear(x, cat(W_i)))``. Only INT4 weights are fused: they
    belong to the draft, while the target's weights are the model's own tensors and must not be copied.

    Requires equal group sizes within a fused set (others are left alone). Ensures the same outputs.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        sets: dict[tuple, list[fx.Node]] = defaultdict(list)
        for node in find_calls(graph, torch.ops.quantspec.int4_linear.default):
            x, _, params, bias = node.args
            groups = get_tensor(graph_module, params).shape[0]  # type: ignore[arg-type]
            sets[(x, groups, bias is None)].append(node)
        fused = [nodes for nodes in sets.values() if len(nodes) > 1]
        for nodes in fused:
            self._fuse(graph_module, nodes)
        if fused:
            finish(graph_module)
        return PassResult(graph_module, bool(fused))

    @staticmethod
    def _fuse(gm: fx.GraphModule, nodes: list[fx.Node]) -> None:
        graph, first = gm.graph, nodes[0]
        qdata, params = ([get_tensor(gm, node.args[i]) for node in nodes] for i in (1, 2))  # type: ignore[arg-type]
        with graph.inserting_before(first):
            weights = (
                add_buffer(gm, f"{first.name}_fused_qdata", torch.cat(qdata)),
                add_buffer(gm, f"{first.name}_fused_scale_and_zero", torch.cat(params, dim=1)),
            )
            bias = None
            if first.args[3] is not None:
                biases = [graph.node_copy(node.args[3]) for node in nodes]  # type: ignore[arg-type]
                bias = add_call(graph, aten.cat.default, (biases,), first)
            out = add_call(graph, first.target, (first.args[0], *weights, bias), first)
            out.meta[INT4_LINEARS] = tuple(linear for node in nodes for linear in node.meta[INT4_LINEARS])
            sizes = [tensor.shape[0] for tensor in qdata]
            parts = add_call(graph, aten.split_with_sizes.default, (out, sizes, -1), first)
            for index, node in enumerate(nodes):
                node.replace_all_uses_with(
                    add_call(graph, operator.getitem, (parts, index), node, value=node.meta.get("val"))
                )
        for node in nodes:
            graph.erase_node(node)
