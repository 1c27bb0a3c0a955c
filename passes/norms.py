"""Root mean square norms: the pattern that passes over what stands before and behind them share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, fx

from .graph import add_buffer, aten, get_tensor

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


def match(node: fx.Node) -> Norm | None:
    """The root mean square norm whose result ``node`` is, or None."""
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


def weight_of(gm: fx.GraphModule, norm: Norm) -> fx.Node:
    """The norm's weight: the model's own tensor where there is but that, else a buffer with what the graph computes."""
    if len(norm.weights) == 1 and norm.weights[0].op == "get_attr":
        return gm.graph.node_copy(norm.weights[0])
    values = [_constant(gm, node) for node in norm.weights]
    return add_buffer(gm, f"{norm.node.name}_weight", torch.stack(torch.broadcast_tensors(*values)).prod(0))


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
    seen, waiting = {node}, [node]
    # Not by recursion: a chain of additions to a residual stream is as long as the model is deep.
    while waiting:
        one = waiting.pop()
        if one.op == "get_attr":
            continue
        if one.op != "call_function" or not one.all_input_nodes:
            return False
        waiting += [read for read in one.all_input_nodes if read not in seen]
        seen.update(one.all_input_nodes)
    return True


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


def _constant(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    if node.op == "get_attr":
        return get_tensor(gm, node)
    arguments = fx.node.map_arg((node.args, node.kwargs), lambda read: _constant(gm, read))
    return node.target(*arguments[0], **arguments[1])  # type: ignore[operator]
