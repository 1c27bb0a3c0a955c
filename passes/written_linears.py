"""Linears that a decoder writes as products of matrices."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import add_call, aten, find_calls, finish

_TRANSPOSES = (aten.numpy_T.default, aten.t.default, aten.transpose.int, aten.mT.default)


class MarkWrittenLinears(PassBase):
    """Matches ``matmul(x, W.T)`` and ``matmul(x, W.T) + b`` of a matrix W and a vector b of the model; writes
    ``linear(x, W)`` and ``linear(x, W, b)``, whose weights other passes know.

    Requires value metadata. Ensures the same values, but for rounding.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        found = [node for node in find_calls(graph, aten.matmul.default) if _weight(node) is not None]
        for product in found:
            bias = _bias(product)
            last = product if bias is None else next(iter(product.users))
            with graph.inserting_before(last):
                arguments = (product.args[0], _weight(product), bias)
                linear = add_call(graph, aten.linear.default, arguments, product, value=last.meta["val"])
            last.replace_all_uses_with(linear)
        if found:
            finish(graph_module)
        return PassResult(graph_module, bool(found))


def _weight(product: fx.Node) -> fx.Node | None:
    """The matrix of which ``product`` reads the transpose."""
    transposed: Any = product.args[1]
    if transposed.target not in _TRANSPOSES or transposed.args[0].op != "get_attr":
        return None
    weight = transposed.args[0]
    axes = {axis % 2 for axis in transposed.args[1:]}
    return weight if weight.meta["val"].dim() == 2 and axes in (set(), {0, 1}) else None


def _bias(product: fx.Node) -> fx.Node | None:
    """The vector that is added to ``product``, which nothing else reads."""
    user = next(iter(product.users))
    if len(product.users) != 1 or user.target is not aten.add.Tensor or user.kwargs or product not in user.args[:2]:
        return None
    other: Any = user.args[1] if user.args[0] is product else user.args[0]
    is_vector = isinstance(other, fx.Node) and other.op == "get_attr" and other.meta["val"].dim() == 1
    return other if is_vector and other.meta["val"].shape[0] == product.meta["val"].shape[-1] else None
