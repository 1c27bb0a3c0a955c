"""Run linears that read the same input as one."""

from __future__ import annotations

import operator
from collections import defaultdict

from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from quantspec.freed_memory import FreedMemory

from .graph import add_buffer, add_call, aten, finish, release
from .weight_formats import PACKED_LINEARS, PackedLinears, check_packed, format_of, plain_parts


class FuseSharedInputLinears(PassBase):
    """Matches several packed linears of one input (Q/K/V, gate/up), writes one over their stacked rows.

    ``[y_i = linear(x, W_i)]`` becomes ``split(linear(x, cat(W_i)))``. Only packed weights are fused: they belong to the
    draft, while the target's weights are the model's own tensors and must not be copied.

    Requires that every packed linear names what it holds. Ensures the same outputs, and that no two packed linears of
    one input are left that differ in rows alone (other formats, group sizes, or a bias on one of them only).
    """

    def requires(self, graph_module: fx.GraphModule) -> None:
        check_packed(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        fused, freed = _alike(graph_module), FreedMemory()
        for nodes in fused:
            for tensor in self._fuse(graph_module, nodes):
                freed.after(tensor)
        if fused:
            finish(graph_module)
        return PassResult(graph_module, bool(fused))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        check_packed(graph_module)
        assert not _alike(graph_module)

    @staticmethod
    def _fuse(gm: fx.GraphModule, nodes: list[fx.Node]) -> tuple[Tensor, ...]:
        """Returns the stacked weights."""
        graph, first = gm.graph, nodes[0]
        weight_format = format_of(first)
        stacked = weight_format.stacked([plain_parts(gm, node) for node in nodes])
        with graph.inserting_before(first):
            weights = [
                add_buffer(gm, f"{first.name}_fused_{part.name}", tensor)
                for part, tensor in zip(weight_format.parts, stacked, strict=True)
            ]
            bias = None
            if first.args[-1] is not None:
                biases = [graph.node_copy(node.args[-1]) for node in nodes]  # type: ignore[arg-type]
                bias = add_call(graph, aten.cat.default, (biases,), first)
            out = add_call(graph, first.target, (first.args[0], *weights, bias), first)
            linears = [linear for node in nodes for linear in node.meta[PACKED_LINEARS].rows]
            out.meta[PACKED_LINEARS] = PackedLinears(weight_format.name, tuple(linears))
            sizes = [sum(rows for _, rows in node.meta[PACKED_LINEARS].rows) for node in nodes]
            parts = add_call(graph, aten.split_with_sizes.default, (out, sizes, -1), first)
            for index, node in enumerate(nodes):
                node.replace_all_uses_with(
                    add_call(graph, operator.getitem, (parts, index), node, value=node.meta.get("val"))
                )
        for node in nodes:
            weights_before = node.all_input_nodes
            graph.erase_node(node)
            release(gm, weights_before)
        return stacked


def _alike(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """Packed linears of one input that differ in rows alone, where there are several."""
    sets: dict[tuple, list[fx.Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        if PACKED_LINEARS in node.meta and node.target is format_of(node).linear:
            parts = zip(format_of(node).parts, plain_parts(gm, node), strict=True)
            columns = tuple((_without(tensor, part.row_axis), tensor.dtype) for part, tensor in parts)
            sets[(node.args[0], format_of(node).name, columns, node.args[-1] is None)].append(node)
    return [nodes for nodes in sets.values() if len(nodes) > 1]


def _without(tensor: Tensor, axis: int) -> tuple[int, ...]:
    """A tensor's shape without one axis, which is counted from the end."""
    return (*tensor.shape[:axis], *tensor.shape[tensor.dim() + axis + 1 :])
