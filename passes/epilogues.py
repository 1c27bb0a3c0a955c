"""What follows a linear and fits into its launch: patterns that passes over several kinds of linears share."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import fx

from .graph import aten, find_calls


class GatedProduct(NamedTuple):
    """``activation(gate) * factor``, all of one shape.

    Attributes:
        product: the node of the product.
        activation: its name in ``quantspec.kernels.epilogue``.
        gate, factor: what it multiplies; nothing else reads them.
    """

    product: fx.Node
    activation: str
    gate: fx.Node
    factor: fx.Node


class Piece(NamedTuple):
    """``length`` channels of a node's last axis, from ``start`` on."""

    whole: fx.Node
    start: int
    length: int


def gated_products(graph: fx.Graph) -> Iterator[GatedProduct]:
    """Products of an activated tensor and another one, in graph order."""
    for product in find_calls(graph, aten.mul.Tensor):
        for activated, factor in (product.args, product.args[::-1]):
            if not (isinstance(activated, fx.Node) and isinstance(factor, fx.Node)) or activated is factor:
                continue
            name = _activation(activated)
            if name is None:
                continue
            gate: fx.Node = activated.args[0]  # type: ignore[assignment]
            alone = all(len(node.users) == 1 for node in (activated, gate, factor))
            if alone and _alike(gate, factor) and _alike(gate, product):
                yield GatedProduct(product, name, gate, factor)
                break


def added(graph: fx.Graph, fits: Callable[[fx.Node], bool]) -> list[tuple[fx.Node, fx.Node]]:
    """Additions, with the linear in each that fits and that nothing else reads; of two the last one in the graph."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    found = []
    for node in find_calls(graph, aten.add.Tensor):
        terms = [term for term in node.args[:2] if isinstance(term, fx.Node)]
        if len(terms) < 2 or terms[0] is terms[1] or node.kwargs or not all(_alike(term, node) for term in terms):
            continue
        linears = [term for term in terms if fits(term) and len(term.users) == 1]
        if linears:
            found.append((node, max(linears, key=places.__getitem__)))
    return found


def piece(node: fx.Node) -> Piece:
    """Which channels of which node this one is: those of a split or slice along the last axis, else all of itself."""
    length = int(node.meta["val"].shape[-1])
    whole = node.args[0] if node.args else None
    if node.target is aten.slice.Tensor and len(node.args) >= 4 and _is_last(whole, node.args[1]):
        step = node.args[4] if len(node.args) > 4 else 1
        start = node.args[2]
        if step == 1 and isinstance(start, int) and start >= 0:
            return Piece(whole, start, length)  # type: ignore[arg-type]
    if node.target is operator.getitem and isinstance(whole, fx.Node) and isinstance(whole.args[0], fx.Node):
        tensor, index = whole.args[0], node.args[1]
        axis = whole.args[2] if len(whole.args) > 2 else whole.kwargs.get("dim", 0)
        if not isinstance(index, int) or not _is_last(tensor, axis):
            return Piece(node, 0, length)
        if whole.target is aten.split_with_sizes.default:
            return Piece(tensor, sum(whole.args[1][:index]), length)  # type: ignore[index, arg-type]
        if whole.target is aten.split.Tensor:
            return Piece(tensor, index * whole.args[1], length)  # type: ignore
        if whole.target is aten.chunk.default:
            return Piece(tensor, index * -(-int(tensor.meta["val"].shape[-1]) // whole.args[1]), length)  # type: ignore
    return Piece(node, 0, length)


def read_only_by(node: fx.Node, readers: set[fx.Node]) -> bool:
    """Whether all that reads a node, directly or through a split, is among ``readers``."""
    direct = {user for user in node.users if user not in readers}
    return all(user.target is not operator.getitem and set(user.users) <= readers for user in direct)


def _activation(node: fx.Node) -> str | None:
    if node.target is aten.silu.default:
        return "silu"
    if node.target is aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(node.kwargs.get("approximate", "none")))
    return None


def _alike(first: fx.Node, second: fx.Node) -> bool:
    """Whether both have one shape and dtype, by what export knows of their symbols."""
    a, b = first.meta.get("val"), second.meta.get("val")
    if a is None or b is None or isinstance(a, tuple | list) or isinstance(b, tuple | list):
        return False
    return (a.dtype, *map(str, a.shape)) == (b.dtype, *map(str, b.shape))


def _is_last(node: object, axis: object) -> bool:
    return isinstance(node, fx.Node) and axis in (-1, node.meta["val"].dim() - 1)
