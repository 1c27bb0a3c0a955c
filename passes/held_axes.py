"""How the axes of an op's output follow those of its inputs: what part of one is held tells what of the other is."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .graph import aten
from .pieces import Ranges, scaled, within

_VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
_SAME = (
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.dropout.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
)
_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
_REDUCTIONS = (
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.amin.default,
    aten.var.correction,
    aten.linalg_vector_norm.default,
)
_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten.cumsum.default)
_NORMS = (aten.rms_norm.default, aten.layer_norm.default)
# What they make follows from sizes alone.
FACTORIES = (
    aten.empty.memory_format,
    aten.zeros.default,
    aten.full.default,
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
)
_END = 2**62


@dataclass(frozen=True)
class Link:
    """Axis ``inner`` of an input ``node`` becomes axis ``outer`` of the output.

    ``forward`` turns what is held of the one into what is held of the other, ``backward`` the other way; None where
    that is no such part.
    """

    node: fx.Node
    inner: int
    outer: int
    forward: Callable[[Ranges], Ranges | None]
    backward: Callable[[Ranges], Ranges | None]


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of a node's tensor."""
    return tuple(node.meta["val"].shape)


def is_pointwise(node: fx.Node) -> bool:
    """Whether a call acts on each element by itself."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def links(node: fx.Node) -> Iterator[Link] | None:
    """The links of a call's axes; None where the op is not known, and nothing can be said."""
    target: Any = node.target
    if target is operator.getitem and _input(node).target in _SPLITS:
        return _of_part(node)
    if target in _VIEWS:
        return _of_view(node)
    if target in _SAME:
        return _by_number(node, list(range(node.meta["val"].dim())))
    if target in (aten.view_as_real.default, aten.view_as_complex.default):
        dims = (node.meta["val"].dim(), _input(node).meta["val"].dim())
        return _by_number(node, list(range(min(dims))))
    if target in _SPLITS:
        # Their parts are asked.
        return iter(())
    if target in (aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim):
        return _by_number(node, _order(node))
    if target is aten.slice.Tensor:
        return _of_slice(node)
    if target is aten.select.int:
        kept = [axis for axis in range(_input(node).meta["val"].dim()) if axis != _axis(node, 1)]
        return _by_number(node, kept)
    if target in (aten.cat.default, aten.stack.default):
        return _of_cat(node)
    if target is aten.slice_scatter.default:
        return _of_scatter(node)
    if target in _REDUCTIONS or target in _SOFTMAX or target in _NORMS:
        return _of_reduction(node)
    if is_pointwise(node) or target in (aten.expand.default, aten.copy.default):
        return _broadcast(node)
    return None


def split_of(part: fx.Node) -> tuple[int, int, int]:
    """Axis of a split, and where in it ``part``, one of its results, starts and ends."""
    split: Any = part.args[0]
    axis = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    parts = [value.shape[axis] for value in split.meta["val"]]
    number: Any = part.args[1]
    start = sum(parts[:number])
    return axis % _input(split).meta["val"].dim(), start, start + parts[number]


def slice_of(node: fx.Node) -> tuple[int, int, int, int]:
    """Axis, start, stop and step of a slice; bounds that are symbols are those of the whole axis."""
    source = _input(node)
    given: dict[str, Any] = {
        **dict(zip(("self", "dim", "start", "end", "step"), node.args, strict=False)),
        **node.kwargs,
    }
    axis = given.get("dim", 0) % source.meta["val"].dim()
    size = shape_of(source)[axis]
    start, stop, step = given.get("start") or 0, given.get("end", _END), given.get("step", 1)
    if not all(isinstance(number, int) for number in (start, stop, step, size)):
        return axis, 0, size, 1
    first, last, every = slice(start, stop, step).indices(size)
    return axis, first, last, every


def reduced_axes(node: fx.Node) -> tuple[list[int], bool]:
    """Axes that a reduction, softmax or norm mixes, and whether the output has all axes of the input."""
    dim = _input(node).meta["val"].dim()
    if node.target in _NORMS:
        return list(range(dim - len(node.args[1]), dim)), True  # type: ignore[arg-type]
    position = 2 if node.target is aten.linalg_vector_norm.default else 1
    axes: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    axes = list(range(dim)) if axes is None else [axes] if isinstance(axes, int) else axes
    keeps = node.meta["val"].dim() == dim
    return [axis % dim for axis in axes], keeps


def _input(node: fx.Node) -> fx.Node:
    return node.args[0]  # type: ignore[return-value]


def _axis(node: fx.Node, position: int) -> int:
    axis: Any = node.args[position]
    return axis % _input(node).meta["val"].dim()


def _same(ranges: Ranges) -> Ranges:
    return ranges


def _by_number(node: fx.Node, order: list[int]) -> Iterator[Link]:
    """Axis ``order[i]`` of the first input is axis i of the output; below 0 for none."""
    for outer, inner in enumerate(order):
        if inner >= 0:
            yield Link(_input(node), inner, outer, _same, _same)


def _order(node: fx.Node) -> list[int]:
    dim = _input(node).meta["val"].dim()
    order = list(range(dim))
    if node.target is aten.permute.default:
        axes: Any = node.args[1]
        return [axis % dim for axis in axes]
    if node.target is aten.transpose.int:
        a, b = _axis(node, 1), _axis(node, 2)
        order[a], order[b] = b, a
    elif node.target is aten.unsqueeze.default:
        at: Any = node.args[1]
        order.insert(at % (dim + 1), -1)
    elif node.meta["val"].dim() < dim:
        del order[_axis(node, 1)]
    return order


def _of_view(node: fx.Node) -> Iterator[Link]:
    """An axis is another one, or several, where as many elements stand before both."""
    inner_sizes, outer_sizes = shape_of(_input(node)), shape_of(node)
    for inner, size in enumerate(inner_sizes):
        for outer, other in enumerate(outer_sizes):
            if not (isinstance(size, int) and isinstance(other, int) and size > 1 and other > 1):
                continue
            if _product(inner_sizes[:inner]) == _product(outer_sizes[:outer]):
                yield Link(_input(node), inner, outer, _scale(other, size), _scale(size, other))


def _scale(factor: int, divisor: int) -> Callable[[Ranges], Ranges | None]:
    return lambda ranges: scaled(ranges, factor, divisor)


def _product(sizes: tuple[Any, ...]) -> Any:
    """Of sizes, as an expression of the symbols among them."""
    product: Any = 1
    for size in sizes:
        product = product * (size.node.expr if isinstance(size, torch.SymInt) else size)
    return product


def _of_slice(node: fx.Node) -> Iterator[Link]:
    axis, start, stop, step = slice_of(node)
    for number in range(node.meta["val"].dim()):
        if number != axis:
            yield Link(_input(node), number, number, _same, _same)
        elif step == 1:
            yield _shifted(_input(node), axis, start, stop)
        elif start < step:
            # Every step-th of what is held is held.
            yield Link(_input(node), axis, axis, _scale(1, step), _scale(step, 1))


def _of_part(node: fx.Node) -> Iterator[Link]:
    source = _input(_input(node))
    axis, start, stop = split_of(node)
    for number in range(node.meta["val"].dim()):
        if number != axis:
            yield Link(source, number, number, _same, _same)
        else:
            yield _shifted(source, axis, start, stop)


def _shifted(source: fx.Node, axis: int, start: int, stop: int) -> Link:
    def back(ranges: Ranges) -> Ranges:
        return tuple((first + start, last + start) for first, last in ranges)

    return Link(source, axis, axis, lambda ranges: within(ranges, start, stop), back)


def _of_cat(node: fx.Node) -> Iterator[Link]:
    dim = node.meta["val"].dim()
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    joined = given % dim
    is_new = node.target is aten.stack.default
    for one in node.args[0]:  # type: ignore[union-attr]
        if shape_of(one) == (0,):  # type: ignore[arg-type]
            # Nothing, whatever the others' axes are.
            continue
        for axis in range(dim):
            if axis != joined:
                inner = axis - 1 if is_new and axis > joined else axis
                yield Link(one, inner, axis, _same, _same)  # type: ignore[arg-type]


def _of_scatter(node: fx.Node) -> Iterator[Link]:
    """What is written into covers a part of one axis, and all of the others."""
    given: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    dim = node.meta["val"].dim()
    for one in node.args[:2]:
        for axis in range(dim):
            if axis != given % dim:
                yield Link(one, axis, axis, _same, _same)  # type: ignore[arg-type]


def _of_reduction(node: fx.Node) -> Iterator[Link]:
    axes, keeps = reduced_axes(node)
    outer = 0
    for inner in range(_input(node).meta["val"].dim()):
        if inner not in axes:
            yield Link(_input(node), inner, outer, _same, _same)
        outer += keeps or inner not in axes


def _broadcast(node: fx.Node) -> Iterator[Link]:
    sizes = shape_of(node)
    for one in node.all_input_nodes:
        if not isinstance(one.meta.get("val"), Tensor):
            continue
        shift = len(sizes) - one.meta["val"].dim()
        for inner, size in enumerate(shape_of(one)):
            outer = inner + shift
            if isinstance(size, int) and size > 1 and size == sizes[outer]:
                yield Link(one, inner, outer, _same, _same)
