"""Let the linears of the target's MLPs multiply gates and factors in their own launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from . import group_linears
from .epilogues import GatedProduct, gated_products, piece, read_only_by
from .graph import add_call, aten, finish
from .group_linears import module_linears, weights_of

_GATED = torch.ops.quantspec.gated_linears.default


class _Gates(NamedTuple):
    """A product of gates and factors, and the linears that make them: two of one input, or one with both halves."""

    match: GatedProduct
    linears: list[fx.Node]


class FuseGates(PassBase):
    """Matches gates of the target's MLPs, writes ``quantspec::gated_linears``.

    ``mul(silu(linear(x, W_0)), linear(x, W_1))`` becomes one call over the model's own weights, which may be halves of
    one; so do both GELUs.

    Requires nothing. Ensures the same outputs up to rounding, that no weight is copied, and that none of these is left.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        gates = _gates(graph_module)
        for gate in gates:
            _fuse_gates(graph_module.graph, gate)
        if gates:
            finish(graph_module)
        return PassResult(graph_module, bool(gates))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        assert not _gates(graph_module)


def _fuse_gates(graph: fx.Graph, gates: _Gates) -> None:
    match, linears = gates
    with graph.inserting_before(match.product):
        weights: list[fx.Node] = []
        biases: list[fx.Node] = []
        for side, linear in zip((match.gate, match.factor), (linears * 2)[:2], strict=True):
            part = piece(side)
            for argument, into in zip(linear.args[1:], (weights, biases), strict=False):
                if isinstance(argument, fx.Node):
                    into.append(_rows(graph, argument, part.start, part.length, len(linears) == 1))
        args = (linears[0].args[0], weights, biases, match.activation)
        new = add_call(graph, _GATED, args, match.product, value=match.product.meta["val"])
    match.product.replace_all_uses_with(new)
    graph.erase_node(match.product)


def _rows(graph: fx.Graph, tensor: fx.Node, start: int, length: int, some: bool) -> fx.Node:
    """A copy of the node that reads a tensor, and where but ``some`` of its rows are wanted a view of them."""
    copy = graph.node_copy(tensor)
    return add_call(graph, aten.slice.Tensor, (copy, 0, start, start + length), tensor) if some else copy


def _gates(gm: fx.GraphModule) -> list[_Gates]:
    candidates = set(module_linears(gm))
    found = []
    for match in gated_products(gm.graph):
        gate, factor = piece(match.gate), piece(match.factor)
        linears = list(dict.fromkeys((gate.whole, factor.whole)))
        if not candidates.issuperset(linears) or not group_linears.worth_fusing(weights_of(gm, linears)):
            continue
        if len(linears) == 2:
            first, second = linears
            whole = all(side.length == side.whole.meta["val"].shape[-1] for side in (gate, factor))
            fits = whole and group_linears.kind(first) == group_linears.kind(second)
        else:
            halves = {gate.start, factor.start} == {0, gate.length}
            width = linears[0].meta["val"].shape[-1]
            fits = halves and width == 2 * gate.length and read_only_by(linears[0], {match.gate, match.factor})
        if fits:
            found.append(_Gates(match, linears))
    return found
