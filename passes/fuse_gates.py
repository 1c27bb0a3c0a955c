"""Let the target's linears do what stands around them in their own launch."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from . import group_linears
from .epilogues import GatedProduct, gated_products, piece, read_only_by
from .graph import add_call, aten, find_calls, finish
from .group_linears import module_linears, weights_of
from .int4_norms import Norm, match_norm, norm_weight

_LINEARS = torch.ops.quantspec.linears.default
_FUSED = torch.ops.quantspec.fused_linears.default


class _Gates(NamedTuple):
    """A product of gates and factors, and the linears that make them: two of one input, or one with both halves."""

    match: GatedProduct
    linears: list[fx.Node]


class FuseGates(PassBase):
    """Matches gates of the target's MLPs, writes ``quantspec::fused_linears``.

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


class FuseNorms(PassBase):
    """Matches root mean square norms that only the target's grouped linears read, writes ``quantspec::fused_linears``.

    A norm becomes that of the calls that read it. Where it is one of a sum, so does the sum, that of the first of them.

    Requires nothing. Ensures the same outputs up to rounding, and that no such norm is left, but of float16, where a
    sum that is not normalized yet might overflow.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        norms = _norms(graph_module)
        for norm in norms:
            _fuse_norm(graph_module, norm)
        if norms:
            finish(graph_module)
        return PassResult(graph_module, bool(norms))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        assert not _norms(graph_module)


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
        args = (linears[0].args[0], weights, biases, None, None, 0.0, match.activation)
        _replace(graph, match.product, args)


def _rows(graph: fx.Graph, tensor: fx.Node, start: int, length: int, some: bool) -> fx.Node:
    """A copy of the node that reads a tensor, and where but ``some`` of its rows are wanted a view of them."""
    copy = graph.node_copy(tensor)
    return add_call(graph, aten.slice.Tensor, (copy, 0, start, start + length), tensor) if some else copy


def _fuse_norm(gm: fx.GraphModule, norm: Norm) -> None:
    graph = gm.graph
    x, residual = _terms(norm)
    places = {node: place for place, node in enumerate(graph.nodes)}
    readers = sorted(norm.node.users, key=places.__getitem__)
    for reader in readers:
        with graph.inserting_before(reader):
            weights, biases, *_, activation = reader.args[1:] if reader.target is _FUSED else (*reader.args[1:], "")
            args = (x, weights, biases, residual, norm_weight(gm, norm), norm.eps, activation)
            total = _replace(graph, reader, args)
        if residual is not None:
            norm.x.replace_all_uses_with(total, lambda user: places.get(user, -1) > places[readers[0]])
            x, residual = total, None


def _replace(graph: fx.Graph, node: fx.Node, args: tuple) -> fx.Node:
    """Put a call with these arguments in the place of a node or, of a call itself, of its first result; returns the
    node of the sum."""
    of_calls = node.target is _FUSED
    out = node.meta["val"][0] if of_calls else node.meta["val"]
    residual = args[3]
    total = out.new_empty(0) if residual is None else residual.meta["val"]
    new = add_call(graph, _FUSED, args, node, value=(out, total))
    y, total = (add_call(graph, operator.getitem, (new, i), node, value=new.meta["val"][i]) for i in range(2))
    if of_calls:
        for user in list(node.users):
            if user.args[1] == 0:
                user.replace_all_uses_with(y)
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(y)
    graph.erase_node(node)
    return total


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


def _norms(gm: fx.GraphModule) -> list[Norm]:
    """Norms that only calls of several weights read, in graph order."""
    nodes = {node.args[0]: None for node in find_calls(gm.graph, _LINEARS, _FUSED)}
    norms = (match_norm(gm, node) for node in nodes if isinstance(node, fx.Node))
    return [norm for norm in norms if norm is not None and _may_fuse(norm)]


def _may_fuse(norm: Norm) -> bool:
    dtype = norm.node.meta["val"].dtype
    alike = norm.x.meta["val"].dtype is dtype is not torch.float16
    return alike and all(_may_normalize(user) and user.args[0] is norm.node for user in norm.node.users)


def _may_normalize(node: fx.Node) -> bool:
    if node.target is _LINEARS:
        return len(node.args[1]) > 1  # type: ignore[arg-type]
    return node.target is _FUSED and node.args[4] is None


def _terms(norm: Norm) -> tuple[fx.Node, fx.Node | None]:
    """What is normalized: both terms of a sum of alike tensors that nothing reads before the norm, or itself."""
    node = norm.x
    terms = [term for term in node.args[:2] if isinstance(term, fx.Node)]
    if node.target is not aten.add.Tensor or node.kwargs or len(terms) < 2:
        return node, None
    values = [str((term.meta["val"].dtype, *term.meta["val"].shape)) for term in (*terms, node)]
    return (terms[0], terms[1]) if len(set(values)) == 1 else (node, None)
