"""Let the op that reads the cache rotate queries and keys (RoPE), instead of kernels of its own before every layer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import add_call, aten, finish, from_positions


class _Term(NamedTuple):
    """``sign * source[..., channel] * table[..., angle]``, or without the table."""

    sign: int
    channel: int
    angle: int


# What a channel is the sum of, by table; None stands for no table.
_Channel = dict[fx.Node | None, _Term]


class _Value(NamedTuple):
    """The channels of the last axis, all of one source."""

    source: fx.Node
    channels: list[_Channel]


class _Rotation(NamedTuple):
    """What a query or key is rotated by, as ``quantspec::cached_attention`` takes it, with the first ``num_angles`` of
    the tables."""

    cos: fx.Node
    sin: fx.Node
    num_angles: int
    rotary_dim: int
    interleaved: bool


class _Matched(NamedTuple):
    """``rotation`` of the ``size`` channels from ``first`` on of a source, its axes 1 and 2 swapped or not."""

    rotation: _Rotation
    source: fx.Node
    first: int
    size: int
    swapped: bool


def _is_last(node: fx.Node, dim: Any) -> bool:
    return dim in (-1, node.meta["val"].dim() - 1)


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


class _Reader:
    """Reads what a node computes from heads of queries or keys and from tables of positions.

    Every spelling of a rotation is a sum of products, a channel at a time: halves that are sliced or split, joined by
    ``cat`` or interleaved by ``stack``. A node that is none of these is the source.
    """

    def __init__(self, tables: set[fx.Node], axis: int) -> None:
        """``tables`` depend on positions alone, and get the axis of heads at ``axis``."""
        self.tables = tables
        self.axis = axis
        self.values: dict[fx.Node, _Value] = {}

    def __call__(self, node: fx.Node) -> _Value:
        if node not in self.values:
            self.values[node] = self._read(node) or self._source(node)
        return self.values[node]

    def _source(self, node: fx.Node) -> _Value:
        return _Value(node, [{None: _Term(1, channel, 0)} for channel in range(node.meta["val"].shape[-1])])

    def _read(self, node: fx.Node) -> _Value | None:
        read: Callable[[fx.Node], _Value | None] | None = {
            aten.mul.Tensor: self._product,
            aten.add.Tensor: self._sum,
            aten.sub.Tensor: self._sum,
            aten.neg.default: self._negative,
            aten.cat.default: self._joined,
            aten.view.default: self._interleaved,
            aten.reshape.default: self._interleaved,
            aten.flatten.using_ints: self._interleaved,
            aten.slice.Tensor: self._slice,
            operator.getitem: self._piece,
            aten.to.dtype: lambda node: self(node.args[0]),  # type: ignore[arg-type]
            aten.alias.default: lambda node: self(node.args[0]),  # type: ignore[arg-type]
        }.get(node.target)
        return read(node) if read and node.op == "call_function" else None

    def _product(self, node: fx.Node) -> _Value | None:
        for x, table in (node.args, node.args[::-1]):
            if not (isinstance(x, fx.Node) and isinstance(table, fx.Node)) or table not in self.tables:
                continue
            value, found = self(x), self._angles(table)
            plain = all(channel.keys() == {None} for channel in value.channels)
            if not plain or found is None or len(found[1]) != len(value.channels):
                return None
            flat, angles = found
            channels: list[_Channel] = [
                {flat: channel[None]._replace(angle=angle)}
                for angle, channel in zip(angles, value.channels, strict=True)
            ]
            return _Value(value.source, channels)
        return None

    def _angles(self, table: fx.Node) -> tuple[fx.Node, Sequence[int]] | None:
        """The table ``(B, T, N)`` without an axis of heads, and which of its N each channel is multiplied by."""
        if table.meta["val"].dim() == 3:
            return table, range(table.meta["val"].shape[-1])
        inner = table.args[0] if table.args else None
        found = self._angles(inner) if isinstance(inner, fx.Node) else None
        if found is None:
            return None
        flat, angles = found
        match table.target:
            case aten.unsqueeze.default:
                return found if table.args[1] in (self.axis, self.axis - 4) else None
            case aten.slice.Tensor:
                part = _sliced(table)
                return None if part is None else (flat, angles[part])
            case aten.repeat_interleave.self_int if _is_last(table, _argument(table, 2, "dim")):
                return flat, [angle for angle in angles for _ in range(table.args[1])]  # type: ignore[arg-type]
            case torch.ops.quantspec.materialize.default:
                return found
        return None

    def _sum(self, node: fx.Node) -> _Value | None:
        if node.kwargs or not all(isinstance(x, fx.Node) for x in node.args):
            return None
        first, second = (self(x) for x in node.args)  # type: ignore[arg-type]
        if node.target is aten.sub.Tensor:
            second = _negated(second)
        if first.source is not second.source or len(first.channels) != len(second.channels):
            return None
        pairs = list(zip(first.channels, second.channels, strict=True))
        return None if any(a.keys() & b.keys() for a, b in pairs) else _Value(first.source, [a | b for a, b in pairs])

    def _negative(self, node: fx.Node) -> _Value:
        return _negated(self(node.args[0]))  # type: ignore[arg-type]

    def _joined(self, node: fx.Node) -> _Value | None:
        if not _is_last(node, _argument(node, 1, "dim", 0)):
            return None
        return self._of_one_source(node, lambda parts: [channel for part in parts for channel in part])

    def _interleaved(self, node: fx.Node) -> _Value | None:
        stack = node.args[0]
        if not isinstance(stack, fx.Node) or stack.target is not aten.stack.default:
            return None
        before, after = stack.meta["val"].shape, node.meta["val"].shape
        is_last = _is_last(stack, _argument(stack, 1, "dim", 0))
        if not is_last or len(after) != len(before) - 1 or after[-1] != before[-1] * before[-2]:
            return None
        return self._of_one_source(
            stack, lambda parts: [channel for each in zip(*parts, strict=True) for channel in each]
        )

    def _of_one_source(self, node: fx.Node, join: Callable[[list[list[_Channel]]], list[_Channel]]) -> _Value | None:
        parts = [self(part) for part in node.args[0]]  # type: ignore[union-attr, arg-type]
        sources = {part.source for part in parts}
        return _Value(parts[0].source, join([part.channels for part in parts])) if len(sources) == 1 else None

    def _slice(self, node: fx.Node) -> _Value | None:
        part = _sliced(node)
        if part is None:
            return None
        value = self(node.args[0])  # type: ignore[arg-type]
        return value._replace(channels=value.channels[part])

    def _piece(self, node: fx.Node) -> _Value | None:
        split: Any = node.args[0]
        index: Any = node.args[1]
        kinds = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
        if not isinstance(split, fx.Node) or not any(split.target is kind for kind in kinds):
            return None
        whole: Any = split.args[0]
        if not _is_last(whole, _argument(split, 2, "dim", 0)):
            return None
        sizes = [piece.shape[-1] for piece in split.meta["val"]]
        value, first = self(whole), sum(sizes[:index])
        return value._replace(channels=value.channels[first : first + sizes[index]])


def _sliced(node: fx.Node) -> slice | None:
    """What ``aten.slice`` leaves of the last axis; None for another axis or symbolic bounds."""
    bounds = [_argument(node, 2, "start"), _argument(node, 3, "end"), _argument(node, 4, "step", 1)]
    if not _is_last(node, _argument(node, 1, "dim", 0)) or any(isinstance(bound, fx.Node) for bound in bounds):
        return None
    return slice(*bounds)


def _negated(value: _Value) -> _Value:
    return value._replace(
        channels=[
            {table: term._replace(sign=-term.sign) for table, term in channel.items()} for channel in value.channels
        ]
    )


def _rotation(value: _Value) -> tuple[_Rotation, int] | None:
    """The rotation that a value is, and the first channel of its source that it reads."""
    channels = value.channels
    by_sign = {term.sign: (table, term) for table, term in channels[0].items()}
    if len(channels[0]) != 2 or by_sign.keys() != {1, -1} or None in channels[0]:
        return None
    (cos, own), (sin, other) = by_sign[1], by_sign[-1]
    size = sum(len(channel) == 2 for channel in channels)
    interleaved = other.channel == own.channel + 1
    num_angles = 1 + max(term.angle for channel in channels for term in channel.values())
    step = 1 if interleaved else size // 2
    expected: list[_Channel] = []
    for i in range(size):
        is_first = i % 2 == 0 if interleaved else i < step
        angle = i * num_angles // size if interleaved else i % num_angles
        partner = i + step if is_first else i - step
        expected.append(
            {
                cos: _Term(1, own.channel + i, angle),
                sin: _Term(-1 if is_first else 1, own.channel + partner, angle),
            }
        )
    expected += [{None: _Term(1, own.channel + i, 0)} for i in range(size, len(channels))]
    if channels != expected or num_angles not in (size, size // 2):
        return None
    return _Rotation(cos, sin, num_angles, size, interleaved), own.channel  # type: ignore[arg-type]


def _match(node: fx.Node, tables: set[fx.Node]) -> _Matched | None:
    """The rotation whose result ``node (B, H, T, D)`` is, if it is one."""
    top, swapped = node, False
    while top.target in (aten.transpose.int, aten.to.dtype, aten.alias.default, aten.contiguous.default):
        if top.target is aten.transpose.int:
            if {dim % 4 for dim in top.args[1:]} != {1, 2}:  # type: ignore[operator]
                return None
            swapped = not swapped
        top = top.args[0]  # type: ignore[assignment]
    value = _Reader(tables, 2 if swapped else 1)(top)
    found = _rotation(value)
    before, after = value.source.meta["val"], node.meta["val"]
    if found is None or before.dtype != after.dtype or before.dim() != after.dim():
        return None
    return _Matched(found[0], value.source, found[1], len(value.channels), swapped)


def _of_tokens(rotation: _Rotation, key: fx.Node) -> bool:
    """Whether both tables are ``(B, T, N)``, B perhaps 1, for the tokens of ``key (B, K, T, D)``."""
    batch, _, tokens, _ = key.meta["val"].shape
    shapes = [table.meta["val"].shape for table in (rotation.cos, rotation.sin)]
    return all(
        len(shape) == 3
        and statically_known_true(shape[1] == tokens)
        and (statically_known_true(shape[0] == batch) or statically_known_true(shape[0] == 1))
        for shape in shapes
    ) and statically_known_true(shapes[0][0] == shapes[1][0])


def _takes_rotation(node: fx.Node) -> int | None:
    """Where a call's op takes the tables, if it does and the call has none."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    names = [argument.name for argument in node.target._schema.arguments]
    return names.index("cos") if "rotary_dim" in names and len(node.args) <= names.index("cos") else None


class FuseRotation(PassBase):
    """Matches calls of ops with arguments ``cos, sin, rotary_dim, interleaved``, as ``quantspec::cached_attention``,
    whose query and key are the same rotation ``x * cos + rotate_half(x) * sin`` by tables of positions, of all channels
    or the first ones, of halves or of neighbours, however it is spelled; writes the call with the unrotated query and
    key, and the tables.

    Requires nothing. Ensures the same outputs up to rounding: the op rotates in float32, while a model may round each
    product to its dtype. A query or key that anything else reads is rotated there as before.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        calls = [node for node in graph.nodes if _takes_rotation(node) is not None]
        tables = from_positions(graph) if calls else set()
        matches = []
        for node in calls:
            query, key = (_match(x, tables) for x in node.args[:2])
            if query and key and query.rotation == key.rotation and _of_tokens(query.rotation, node.args[1]):
                matches.append((node, query, key))
        for node, query, key in matches:
            rotation = query.rotation
            with graph.inserting_before(node):
                heads = [_unrotated(graph, matched, node) for matched in (query, key)]
                angles = [_part(graph, table, 0, rotation.num_angles, node) for table in (rotation.cos, rotation.sin)]
            node.args = (*heads, *node.args[2:], *angles, rotation.rotary_dim, rotation.interleaved)
        if matches:
            finish(graph_module)
        return PassResult(graph_module, bool(matches))


def _unrotated(graph: fx.Graph, matched: _Matched, origin: fx.Node) -> fx.Node:
    """The query or key before its rotation."""
    x = _part(graph, matched.source, matched.first, matched.size, origin)
    return add_call(graph, aten.transpose.int, (x, 1, 2), origin) if matched.swapped else x


def _part(graph: fx.Graph, x: fx.Node, first: int, size: int, origin: fx.Node) -> fx.Node:
    """``size`` channels of ``x`` from ``first`` on."""
    value = x.meta["val"]
    if size == value.shape[-1]:
        return x
    return add_call(graph, aten.slice.Tensor, (x, value.dim() - 1, first, first + size), origin)
