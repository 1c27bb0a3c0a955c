"""How the weights of a draft may be stored: what passes, saving and loading ask of a format; one file per format."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.passes.infra.pass_base import PassBase

from quantspec.config import GROUP_SIZES, WeightQuantizer

from .graph import get_tensor

# Node metadata: the PackedLinears whose weights a call holds.
PACKED_LINEARS = "packed_linears"
# Of a weight that is packed: 2 MiB in float32, some of which stay in a CPU's cache, and 128 MiB, which keep a GPU busy.
_ELEMENTS_AT_ONCE, _ELEMENTS_AT_ONCE_ON_GPU = 2**19, 2**25


@dataclass(frozen=True)
class PackedLinears:
    """Metadata of a call that reads packed weights.

    Attributes:
        format: name of the weights' :class:`WeightFormat`.
        rows: name and rows of each linear in the call's weights, in the order of their rows.
    """

    format: str
    rows: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Part:
    """One of the tensors that hold a packed weight ``(N, K)``.

    Attributes:
        name: of the tensor in graphs and, as ``draft.LINEAR.NAME``, in saved folders.
        shape: from N, K and the group size to the tensor's shape.
        dtype: from the weight's dtype to the tensor's.
        row_axis: axis of the tensor that has the N rows, counted from the end.
    """

    name: str
    shape: Callable[[int, int, int], tuple[int, ...]]
    dtype: Callable[[torch.dtype], torch.dtype]
    row_axis: int


class WeightLayout(PassBase):
    """A pass that lays a format's weights out for another op, such as one that only some devices have.

    Attributes:
        op: what it writes in place of the format's linear.
    """

    op: ClassVar[OpOverload]

    @staticmethod
    @abstractmethod
    def plain(gm: fx.GraphModule, node: fx.Node) -> tuple[Tensor, ...]:
        """The format's parts, as ``WeightFormat.pack`` makes them, of a call of :attr:`op`."""

    @classmethod
    def store(cls, gm: fx.GraphModule, node: fx.Node, parts: Sequence[Tensor]) -> None:
        """Put other parts where a call of :attr:`op` reads its own; of a layout whose :meth:`plain` gives views."""
        for place, part in zip(cls.plain(gm, node), parts, strict=True):
            place.copy_(part)


def adapted_group_size(in_features: int, group_size: int) -> int | None:
    """The largest supported group size up to ``group_size`` that divides ``in_features``, or None."""
    return max((g for g in GROUP_SIZES if g <= group_size and in_features % g == 0), default=None)


@dataclass(frozen=True)
class WeightFormat:
    """A way to store weights. A stack of experts' ``(E, N, K)`` has every part of its matrices along a new first axis.

    Attributes:
        name: in node metadata and in the registry.
        parts: the tensors of a weight.
        pack: from rows ``(N, K)`` of a weight, a group size and a quantizer to their parts.
        linear: op ``(x (..., K), *parts, bias) -> (..., N)``.
        expert_linear: op ``(x (R, K), expert_ids (R,), *parts, bias) -> (R, N)``, or None where experts stay in full
            precision.
        group_size: from K and the group size asked for to the one used, None where the weight stays in full precision.
        layouts: passes that run on packed linears, in order.
        learned: name of the part with scales and zeros, along its last axis, that tuning learns; None where it learns
            nothing. The ops have gradients for it, and every layout's ``plain`` gives views of it.
    """

    name: str
    parts: tuple[Part, ...]
    pack: Callable[[Tensor, int, WeightQuantizer], tuple[Tensor, ...]]
    linear: OpOverload
    expert_linear: OpOverload | None = None
    group_size: Callable[[int, int], int | None] = adapted_group_size
    layouts: tuple[type[WeightLayout], ...] = ()
    learned: str | None = None

    def packed(self, weight: Tensor, group_size: int, quantizer: WeightQuantizer) -> tuple[Tensor, ...]:
        """The parts of a weight ``(N, K)``, or of a stack of experts' ``(E, N, K)``.

        Rows are packed block by block: quantizers work on several float32 copies of what they are given, which of a
        whole language-model head are more than many a layer's weights.

        Raises:
            ValueError: ``pack`` makes other tensors than ``parts`` say.
        """
        made = tuple(
            torch.empty(shape, dtype=part.dtype(weight.dtype), device=weight.device)
            for part, shape in zip(self.parts, self.shapes(weight.shape, group_size), strict=True)
        )
        at_once = _ELEMENTS_AT_ONCE if weight.device.type == "cpu" else _ELEMENTS_AT_ONCE_ON_GPU
        matrices = [(weight, *made)] if weight.dim() == 2 else list(zip(weight, *made, strict=True))
        for matrix, *parts in matrices:
            rows, width = matrix.shape
            length = max(1, at_once // width)
            for start in range(0, rows, length):
                block = matrix[start : start + length]
                ours = self.rows(tuple(parts), start, len(block))
                packed = self.pack(block, group_size, quantizer)
                self._check_packed(packed, ours)
                for place, tensor in zip(ours, packed, strict=True):
                    place.copy_(tensor)
        return made

    def _check_packed(self, packed: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        """Refuse what ``pack`` made where it is not what ``parts`` say, by name."""
        wanted = {part.name: tuple(place.shape) for part, place in zip(self.parts, expected, strict=True)}
        made = [tuple(tensor.shape) for tensor in packed]
        if made != list(wanted.values()):
            raise ValueError(
                f"pack of weight format '{self.name}' made tensors of shapes {made}; its parts are {wanted}"
            )

    def shapes(self, shape: Sequence[int], group_size: int) -> list[tuple[int, ...]]:
        """Shape of each part of a weight of this shape, ``(N, K)`` or ``(E, N, K)``."""
        *experts, rows, width = shape
        return [(*experts, *part.shape(rows, width, group_size)) for part in self.parts]

    def nbytes(self, shape: Sequence[int], group_size: int, dtype: torch.dtype) -> int:
        """Bytes of a weight of this shape and dtype, once packed."""
        sizes = map(math.prod, self.shapes(shape, group_size))
        return sum(size * part.dtype(dtype).itemsize for part, size in zip(self.parts, sizes, strict=True))

    def stacked(self, weights: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The parts of one weight with the rows of all ``weights``, in order."""
        tensors = zip(self.parts, zip(*weights, strict=True), strict=True)
        return tuple(torch.cat(same, part.row_axis) for part, same in tensors)

    def rows(self, tensors: tuple[Tensor, ...], start: int, length: int) -> tuple[Tensor, ...]:
        """Views of ``length`` rows of a weight's parts, from ``start`` on."""
        return tuple(
            tensor.narrow(part.row_axis, start, length) for part, tensor in zip(self.parts, tensors, strict=True)
        )


_FORMATS: dict[str, WeightFormat] = {}


def register(weight_format: WeightFormat) -> WeightFormat:
    """Make a format known by its name.

    Raises:
        ValueError: another has this name.
    """
    if _FORMATS.setdefault(weight_format.name, weight_format) is not weight_format:
        raise ValueError(f"a weight format named {weight_format.name!r} is registered already; choose another name")
    return weight_format


def format_of(node: fx.Node) -> WeightFormat:
    """The format of a call's packed weights; the call has :data:`PACKED_LINEARS`."""
    return _FORMATS[node.meta[PACKED_LINEARS].format]


def plain_parts(gm: fx.GraphModule, node: fx.Node) -> tuple[Tensor, ...]:
    """A call's packed weights as its format's ``pack`` makes them; the call has :data:`PACKED_LINEARS`."""
    weight_format = format_of(node)
    for layout in weight_format.layouts:
        if node.target is layout.op:
            return layout.plain(gm, node)
    return tuple(get_tensor(gm, part) for part in part_nodes(node).values())


def store_parts(gm: fx.GraphModule, node: fx.Node, parts: Sequence[Tensor]) -> None:
    """Put others in place of what :func:`plain_parts` returns, where the call reads them."""
    for layout in format_of(node).layouts:
        if node.target is layout.op:
            layout.store(gm, node, parts)
            return
    for place, part in zip(plain_parts(gm, node), parts, strict=True):
        place.copy_(part)


def part_nodes(node: fx.Node) -> dict[str, fx.Node]:
    """The nodes of a call's packed weights by the names of their parts; the call is of its format's own ops."""
    weight_format = format_of(node)
    first = 2 if node.target is weight_format.expert_linear else 1
    nodes = node.args[first : first + len(weight_format.parts)]
    return dict(zip((part.name for part in weight_format.parts), nodes, strict=True))  # type: ignore[arg-type]


def check_packed(gm: fx.GraphModule) -> None:
    """Check that every call of a format's linears says which linears are in its weights, and that their rows add up."""
    operations = {op for known in _FORMATS.values() for op in (known.linear, known.expert_linear) if op is not None}
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in operations:
            continue
        assert PACKED_LINEARS in node.meta, f"{node.format_node()} does not say which linears it holds"
        rows = sum(rows for _, rows in node.meta[PACKED_LINEARS].rows)
        for part, tensor in zip(format_of(node).parts, plain_parts(gm, node), strict=True):
            assert tensor.shape[part.row_axis] == rows, f"{node.format_node()} has other rows than its linears"
