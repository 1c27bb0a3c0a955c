"""Let INT4 linears normalize what passes between them."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from .graph import add_buffer, add_call, aten, find_calls, finish, get_tensor
from .int4_epilogues import FuseInt4Epilogues
from .weight_formats import PACKED_LINEARS, WeightLayout, check_packed

_LINEARS = (torch.ops.quantspec.int4_linear.default, FuseInt4Epilogues.op)
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default)


class Norm(NamedTuple):
    """``x * rsqrt(mean(x^2) + eps) * weight``, over the last axis.

    Attributes:
        node: of the result.
        x: what is normalized.
        weights: constants whose product is the weight.
        eps: what is added to the mean.
    """

    node: fx.Node
    x: fx.Node
    weights: list[fx.Node]
    eps: float


class FuseInt4Norms(WeightLayout):
    """Matches a root mean square norm of a linear's sum with the residual that linears alone read.

    ``linear(norm(fused_linear(..., residual)))`` becomes ``fused_linear(scaled, ..., squares)``, where ``sum, scaled,
    squares = linear_to_norm(..., residual, norm_weight)``: a row's factor may follow the product.

    Requires plain-layout weights that name their linears. Ensures the same outputs up to rounding, and that no such
    norm is left, but of float16, where a sum that is not normalized yet might overflow.
    """

    op = torch.ops.quantspec.int4_linear_to_norm.default

    def requires(self, graph_module: fx.GraphModule) -> None:
        check_packed(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        norms = _norms(graph_module)
        for norm in norms:
            _fuse(graph_module, norm)
        if norms:
            finish(graph_module)
        return PassResult(graph_module, bool(norms))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        check_packed(graph_module)
        assert not _norms(graph_module)

    @staticmethod
    def plain(gm: fx.GraphModule, node: fx.Node) -> tuple[Tensor, ...]:
        """``qdata`` and ``scale_and_zero``, which stay as they are."""
        return FuseInt4Epilogues.plain(gm, node)


def _fuse(gm: fx.GraphModule, norm: Norm) -> None:
    graph, producer = gm.graph, norm.x
    with graph.inserting_before(producer):
        weight = _product(gm, norm)
        new = add_call(graph, FuseInt4Norms.op, (*producer.args[:5], weight), producer)
        new.meta[PACKED_LINEARS] = producer.meta[PACKED_LINEARS]
        values = new.meta.get("val") or (producer.meta["val"],) * 3
        y, scaled, squares = (
            add_call(graph, operator.getitem, (new, index), producer, value=value) for index, value in enumerate(values)
        )
    for node in list(norm.node.users):
        arguments = (*node.args[1:4], *(node.args[4:7] or (None, "", True)))
        with graph.inserting_before(node):
            args = (scaled, *arguments, squares, norm.eps)
            reader = add_call(graph, FuseInt4Epilogues.op, args, node, value=node.meta["val"])
        reader.meta[PACKED_LINEARS] = node.meta[PACKED_LINEARS]
        node.replace_all_uses_with(reader)
        graph.erase_node(node)
    producer.replace_all_uses_with(y)


def _product(gm: fx.GraphModule, norm: Norm) -> fx.Node:
    """The norm's weight: the model's own tensor where there is but that, else a buffer with what the graph computes."""
    if len(norm.weights) == 1 and norm.weights[0].op == "get_attr":
        return gm.graph.node_copy(norm.weights[0])
    values = [_constant(gm, node) for node in norm.weights]
    return add_buffer(gm, f"{norm.node.name}_weight", torch.stack(torch.broadcast_tensors(*values)).prod(0))


def _norms(gm: fx.GraphModule) -> list[Norm]:
    """What the pass matches, in graph order."""
    nodes = {node.args[0]: None for node in find_calls(gm.graph, *_LINEARS) if isinstance(node.args[0], fx.Node)}
    norms = (_match(gm, node) for node in nodes)
    return [norm for norm in norms if norm is not None and _may_fuse(norm)]


def _may_fuse(norm: Norm) -> bool:
    producer, dtype = norm.x, norm.node.meta["val"].dtype
    if producer.target is not FuseInt4Epilogues.op or not _reads_plain(producer) or producer.args[4] is None:
        return False
    alike = producer.meta["val"].dtype is dtype is not torch.float16
    reads = all(
        user.target in _LINEARS and user.args[0] is norm.node and _reads_plain(user) for user in norm.node.users
    )
    # What follows a product must be the sum alone.
    return alike and reads and not producer.args[5]


def _reads_plain(linear: fx.Node) -> bool:
    """Whether a linear does not normalize what it reads yet."""
    return len(linear.args) < 8 or linear.args[7] is None


def _match(gm: fx.GraphModule, node: fx.Node) -> Norm | None:
    leaves = list(_leaves(node))
    weights = [leaf for leaf in leaves if _is_constant(leaf)]
    others = [leaf for leaf in leaves if leaf not in weights]
    factors = [leaf for leaf in others if leaf.target is aten.rsqrt.default]
    if len(others) != 2 or len(factors) != 1 or not weights:
        return None
    (x,) = (leaf for leaf in others if leaf is not factors[0])
    eps = _eps(factors[0], x)
    width = x.meta["val"].shape[-1]
    whole = all(tuple(leaf.meta["val"].shape) == (width,) for leaf in weights)
    return Norm(node, x, weights, eps) if eps is not None and whole else None


def _leaves(node: fx.Node) -> Iterator[fx.Node]:
    """What a product multiplies, through products and casts."""
    node = _uncast(node)
    if node.target is aten.mul.Tensor and not _is_constant(node) and all(isinstance(a, fx.Node) for a in node.args):
        for factor in node.args:
            yield from _leaves(factor)  # type: ignore[arg-type]
    else:
        yield node


def _uncast(node: fx.Node) -> fx.Node:
    while node.target in _CASTS:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_constant(node: fx.Node) -> bool:
    """Whether a node depends on the module's tensors alone."""
    if node.op == "get_attr":
        return True
    return node.op == "call_function" and bool(node.all_input_nodes) and all(map(_is_constant, node.all_input_nodes))


def _constant(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    if node.op == "get_attr":
        return get_tensor(gm, node)
    arguments = fx.node.map_arg((node.args, node.kwargs), lambda read: _constant(gm, read))
    return node.target(*arguments[0], **arguments[1])  # type: ignore[operator]


def _eps(rsqrt: fx.Node, x: fx.Node) -> float | None:
    """What is added to the mean of the squares of ``x``, if that is what the root is of."""
    total = rsqrt.args[0]
    if not isinstance(total, fx.Node) or total.target is not aten.add.Tensor or total.kwargs:
        return None
    mean, eps = total.args
    if not isinstance(eps, float) or not isinstance(mean, fx.Node) or mean.target is not aten.mean.dim:
        return None
    square = mean.args[0]
    last = mean.args[1] in ([-1], [x.meta["val"].dim() - 1]) and (
        mean.args[2:3] == (True,) or mean.kwargs.get("keepdim")
    )
    if (
        not last
        or not isinstance(square, fx.Node)
        or square.target is not aten.pow.Tensor_Scalar
        or square.args[1] != 2
    ):
        return None
    return eps if _uncast(square.args[0]) is x else None  # type: ignore[arg-type]
