"""Let INT4 linears do what follows them in their own launch."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from .epilogues import GatedProduct, added, gated_products, piece, read_only_by
from .graph import add_call, finish, get_tensor
from .weight_formats import PACKED_LINEARS, WeightLayout, check_packed

_LINEAR = torch.ops.quantspec.int4_linear.default


class FuseInt4Epilogues(WeightLayout):
    """Matches what alone reads ``quantspec::int4_linear``, writes ``quantspec::int4_fused_linear``.

    ``mul(silu(gate), factor)``, where gates and factors are the halves of one linear, becomes a linear that multiplies
    them; so do both GELUs. ``add(linear, residual)`` becomes a linear that adds it.

    Requires plain-layout weights that name their linears. Ensures the same outputs up to rounding, and that no such
    product and no such addition is left.
    """

    op = torch.ops.quantspec.int4_fused_linear.default

    def requires(self, graph_module: fx.GraphModule) -> None:
        check_packed(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        gates = _gates(graph)
        for match, linear in gates:
            gate_first = piece(match.gate).start == 0
            _replace(graph, match.product, linear, (*linear.args, None, match.activation, gate_first, None, 0.0))
        graph.eliminate_dead_code()
        sums = added(graph, _may_add)
        for node, linear in sums:
            # Read now: the residual may be a sum that has just been rewritten.
            residual = next(term for term in node.args[:2] if term is not linear)
            _replace(graph, node, linear, (*linear.args[:4], residual, *(linear.args[5:] or ("", True, None, 0.0))))
        if gates or sums:
            finish(graph_module)
        return PassResult(graph_module, bool(gates or sums))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        check_packed(graph_module)
        assert not _gates(graph_module.graph)
        assert not added(graph_module.graph, _may_add)

    @staticmethod
    def plain(gm: fx.GraphModule, node: fx.Node) -> tuple[Tensor, ...]:
        """``qdata`` and ``scale_and_zero``, which stay as they are."""
        return tuple(get_tensor(gm, part) for part in node.args[1:3])  # type: ignore[arg-type]


def _replace(graph: fx.Graph, node: fx.Node, linear: fx.Node, args: tuple) -> None:
    """Put a linear with these arguments in the place of what reads ``linear``."""
    with graph.inserting_before(node):
        new = add_call(graph, FuseInt4Epilogues.op, args, linear, value=node.meta["val"])
    new.meta[PACKED_LINEARS] = linear.meta[PACKED_LINEARS]
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _gates(graph: fx.Graph) -> list[tuple[GatedProduct, fx.Node]]:
    """Products of the halves of a linear that nothing else reads."""
    found = []
    for match in gated_products(graph):
        gate, factor = piece(match.gate), piece(match.factor)
        linear, length = gate.whole, gate.length
        halves = {gate.start, factor.start} == {0, length} and linear.meta["val"].shape[-1] == 2 * length
        fits = factor.whole is linear and linear.target is _LINEAR and halves
        if fits and read_only_by(linear, {match.gate, match.factor}):
            found.append((match, linear))
    return found


def _may_add(node: fx.Node) -> bool:
    return node.target is _LINEAR or (node.target is FuseInt4Epilogues.op and node.args[4] is None)
