"""Let INT4 linears do what follows them in their own launch."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from quantspec.kernels.epilogue import GATE_ROWS

from .epilogues import GatedProduct, added, gated_products, piece, read_only_by
from .graph import add_buffer, add_call, aten, finish, get_tensor
from .weight_formats import PACKED_LINEARS, WeightLayout, check_packed, format_of, plain_parts

_LINEAR = torch.ops.quantspec.int4_linear.default


class FuseInt4Epilogues(WeightLayout):
    """Matches what reads ``quantspec::int4_linear`` alone, writes ``quantspec::int4_fused_linear``.

    ``mul(silu(gate), factor)``, where gates and factors are the halves of one linear, becomes one over weights whose
    rows alternate; so do both GELUs. ``add(linear, residual)`` becomes a linear that adds it.

    Requires plain-layout weights that name their linears. Ensures the same outputs up to rounding, and that no such
    product and no such addition is left.
    """

    op = torch.ops.quantspec.int4_fused_linear.default

    def requires(self, graph_module: fx.GraphModule) -> None:
        check_packed(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        gates = _gates(graph_module.graph)
        for match, linear in gates:
            self._fuse_gate(graph_module, match, linear)
        graph_module.graph.eliminate_dead_code()
        sums = added(graph_module.graph, _may_add)
        for node, linear in sums:
            self._fuse_sum(graph_module, node, linear)
        if gates or sums:
            finish(graph_module)
        return PassResult(graph_module, bool(gates or sums))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        check_packed(graph_module)
        assert not _gates(graph_module.graph)
        assert not added(graph_module.graph, _may_add)

    @staticmethod
    def plain(gm: fx.GraphModule, node: fx.Node) -> tuple[Tensor, ...]:
        """Plain-layout ``qdata`` and ``scale_and_zero`` with the rows in the order of the node's linears."""
        weight_format = format_of(node)
        tensors = tuple(get_tensor(gm, part) for part in node.args[1:3])  # type: ignore[arg-type]
        if not node.args[5]:
            return tensors
        order = torch.argsort(_alternating(node.meta["gate_first"], tensors[0].shape[0]))
        parts = zip(weight_format.parts, tensors, strict=True)
        return tuple(tensor.index_select(part.row_axis, order.to(tensor.device)) for part, tensor in parts)

    @staticmethod
    def _fuse_gate(gm: fx.GraphModule, match: GatedProduct, linear: fx.Node) -> None:
        x, bias = linear.args[0], linear.args[-1]
        weight_format, tensors = format_of(linear), plain_parts(gm, linear)
        gate_first = piece(match.gate).start == 0
        order = _alternating(gate_first, tensors[0].shape[0]).to(tensors[0].device)
        with gm.graph.inserting_before(match.product):
            weights = [
                add_buffer(gm, f"{linear.name}_alternating_{part.name}", tensor.index_select(part.row_axis, order))
                for part, tensor in zip(weight_format.parts, tensors, strict=True)
            ]
            if bias is not None:
                rows = add_buffer(gm, f"{linear.name}_alternating_rows", order)
                bias = add_call(gm.graph, aten.index_select.default, (bias, 0, rows), linear)
            new = add_call(
                gm.graph,
                FuseInt4Epilogues.op,
                (x, *weights, bias, None, match.activation),
                linear,
                value=match.product.meta["val"],
            )
        new.meta[PACKED_LINEARS] = linear.meta[PACKED_LINEARS]
        new.meta["gate_first"] = gate_first
        match.product.replace_all_uses_with(new)

    @staticmethod
    def _fuse_sum(gm: fx.GraphModule, node: fx.Node, linear: fx.Node) -> None:
        # Read now: the residual may be a sum that has just been rewritten.
        residual = next(term for term in node.args[:2] if term is not linear)
        activation = linear.args[5] if linear.target is FuseInt4Epilogues.op else ""
        with gm.graph.inserting_before(node):
            args = (*linear.args[:4], residual, activation)
            new = add_call(gm.graph, FuseInt4Epilogues.op, args, linear, value=node.meta["val"])
        new.meta |= {key: linear.meta[key] for key in (PACKED_LINEARS, "gate_first") if key in linear.meta}
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def _gates(graph: fx.Graph) -> list[tuple[GatedProduct, fx.Node]]:
    """Products of the halves of a linear that nothing else reads."""
    found = []
    for match in gated_products(graph):
        gate, factor = piece(match.gate), piece(match.factor)
        linear, length = gate.whole, gate.length
        halves = {gate.start, factor.start} == {0, length} and linear.meta["val"].shape[-1] == 2 * length
        fits = factor.whole is linear and linear.target is _LINEAR and halves and length % GATE_ROWS == 0
        if fits and read_only_by(linear, {match.gate, match.factor}):
            found.append((match, linear))
    return found


def _may_add(node: fx.Node) -> bool:
    return node.target is _LINEAR or (node.target is FuseInt4Epilogues.op and node.args[4] is None)


def _alternating(gate_first: bool, rows: int) -> Tensor:
    """Where each row of the alternating weight lies in the stacked one, ``(rows,)`` int64."""
    halves = torch.arange(rows).view(2, -1, GATE_ROWS)
    return (halves if gate_first else halves.flip(0)).transpose(0, 1).flatten()
