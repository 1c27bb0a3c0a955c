"""Let the sums of ranks do what follows them in their own launch."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, cast

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import add_call, aten, find_calls, finish
from .norms import Norm, match, weight_of

_REDUCE = torch.ops.quantspec.reduce_ranks.default
_TO_NORM = torch.ops.quantspec.reduce_ranks_to_norm.default


class _Sum(NamedTuple):
    """A norm and the sum of ranks in front of it, which is what is normalized or a term of that."""

    norm: Norm
    reduce: fx.Node


class FuseRankNorms(PassBase):
    """Matches the root mean square norm of a sum of ranks, writes ``quantspec::reduce_ranks_to_norm``.

    ``y = add(reduce_ranks(x), residual); norm(y)``, or the norm of the sum alone, becomes one call with both results.

    Requires value metadata. Ensures the same outputs up to rounding, the same on all ranks, and that none is left.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        sums = _sums(graph_module.graph)
        for found in sums:
            _fuse(graph_module, found)
        if sums:
            finish(graph_module)
        return PassResult(graph_module, bool(sums))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        assert not _sums(graph_module.graph)


def _fuse(gm: fx.GraphModule, found: _Sum) -> None:
    graph, norm, total = gm.graph, found.norm, found.norm.x
    x, group = found.reduce.args
    # Read now: the residual may be a sum that has just been rewritten.
    terms = () if total is found.reduce else total.args
    residual = next((term for term in terms if term is not found.reduce), None)
    with graph.inserting_before(total):
        arguments = (x, residual, weight_of(gm, norm), norm.eps, group)
        values = (total.meta["val"], norm.node.meta["val"])
        new = add_call(graph, _TO_NORM, arguments, total, value=values)
        y, normed = (
            add_call(graph, operator.getitem, (new, index), total, value=value) for index, value in enumerate(values)
        )
    total.replace_all_uses_with(y)
    norm.node.replace_all_uses_with(normed)


def _sums(graph: fx.Graph) -> list[_Sum]:
    """What the pass matches, in graph order."""
    if not any(find_calls(graph, _REDUCE)):
        return []
    found: dict[fx.Node, _Sum] = {}
    for node in find_calls(graph, aten.mul.Tensor, aten.to.dtype, aten._to_copy.default, aten.type_as.default):
        norm = match(node)
        one = None if norm is None else _of_sum(norm)
        if one is not None:
            # The last cast of a product stands behind it.
            found[one.norm.x] = one
    return list(found.values())


def _of_sum(norm: Norm) -> _Sum | None:
    if norm.node.meta["val"].dtype is not norm.x.meta["val"].dtype:
        return None
    if norm.x.target is _REDUCE:
        return _Sum(norm, norm.x)
    if norm.x.target is not aten.add.Tensor or norm.x.kwargs:
        return None
    for reduce, residual in (norm.x.args, norm.x.args[::-1]):
        is_other = isinstance(residual, fx.Node) and residual is not reduce
        if is_other and _is_sum_alone(reduce) and _is_like(reduce, norm.x) and _is_like(residual, norm.x):
            return _Sum(norm, cast(fx.Node, reduce))
    return None


def _is_sum_alone(node: object) -> bool:
    """Whether a node is a sum of ranks that nothing but one call reads."""
    return isinstance(node, fx.Node) and node.target is _REDUCE and len(node.users) == 1


def _is_like(term: Any, total: fx.Node) -> bool:
    """Whether a term has the dtype and shape of the total."""
    first, second = term.meta["val"], total.meta["val"]
    return first.dtype is second.dtype and list(map(str, first.shape)) == list(map(str, second.shape))
