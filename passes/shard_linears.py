"""Tensor parallelism: every rank computes its own heads, channels of a gated product, and part of the vocabulary."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import (
    add_call,
    aten,
    describe,
    fake_mode_of,
    find_calls,
    finish,
    get_tensor,
    module_path,
    own_name,
    value_of,
)
from .held_axes import FACTORIES, Link, is_pointwise, links, reduced_axes, shape_of, slice_of, split_of
from .join_written_parts import JoinWrittenParts
from .logit_rows import LINEAR_TARGETS, logits_linear
from .pieces import Piece, Ranges, even, length, overlapping, place_of, union

_EXPERTS = torch.ops.quantspec.expert_linear.default
_MARKER = torch.ops.quantspec.attention.default
_REDUCE = torch.ops.quantspec.reduce_ranks.default
_GATHER = torch.ops.quantspec.gather_ranks.default
_PRODUCTS = (aten.bmm.default, aten.mm.default, aten.matmul.default)
_LINEARS = (*LINEAR_TARGETS, *_PRODUCTS, aten.addmm.default, _EXPERTS)
_SIZED = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default)


class CannotShardError(ValueError):
    """A part of the graph cannot be split over this many ranks; the message names it."""


@dataclass(frozen=True)
class Place:
    """A process among those that split a model.

    Attributes:
        rank: this process's number, 0 to ``world - 1``.
        world: how many there are.
        group: the name of their process group.
    """

    rank: int
    world: int
    group: str


@dataclass(frozen=True)
class Held:
    """What this rank holds of a value: ``ranges`` of one axis, counted from the front."""

    axis: int
    ranges: Ranges


@dataclass
class _Sources:
    """What makes a part of a value.

    Attributes:
        ranges: of the outputs of linears and markers.
        asked: nodes, axes and ranges that are made of these; a value may be read along more ways than can be gone.
    """

    ranges: dict[fx.Node, list[tuple[int, int]]] = field(default_factory=dict)
    asked: set[tuple[fx.Node, int, Ranges]] = field(default_factory=set)


class ShardLinears(PassBase):
    """Matches linears, embeddings of tokens and attention markers, writes what one rank computes of them.

    Where a linear's rows are split (by *columns* in the words of transformers' ``base_model_tp_plan``), a rank has its
    part of the output, and all that follows works on that part; where such a part comes to a linear, that one's input
    channels are split (by *rows*) and the ranks' outputs are summed, ``quantspec::reduce_ranks``. What is split follows
    from the graph: queries, keys and values by heads, with everything between their linear and the marker; what comes
    out of attention, or of a product of linears, by the channels of the linear that reads it; the language-model head
    and embeddings of tokens by the vocabulary, whose logits ``quantspec::gather_ranks`` puts together. Experts are
    split like linears, within each of them, so that all ranks have as much to do whichever are chosen. Of KV heads that
    are fewer than ranks, several ranks hold the same one.

    A linear that cannot be split (a router, the way down to a low rank) is computed by every rank and is in
    :attr:`whole`; no attention, no gated product and no head is. Parameters keep their names and become pieces.

    Requires value metadata. Ensures that outputs are those of the whole graph, the same on all ranks, whose graphs have
    the same shapes. Raises :class:`CannotShardError`, naming the node.

    Attributes:
        pieces: of each parameter that is split, by the name its ``get_attr`` node has.
        whole: names of the modules of linears that every rank computes whole.
    """

    def __init__(self, place: Place, plan: Mapping[str, str] | None = None) -> None:
        """``plan`` is transformers': linears that it splits and this pass leaves whole are refused."""
        super().__init__()
        self.place = place
        self.plan = plan or {}
        self.pieces: dict[str, Piece] = {}
        self.whole: list[str] = []
        self._held: dict[fx.Node, Held] = {}
        self._columns: dict[fx.Node, Ranges] = {}
        self._rows: set[fx.Node] = set()
        # Linears of a single KV head, which every rank has.
        self._of_all: set[fx.Node] = set()
        # What cannot be made of linears' parts alone, and why; more linears split by rows never change that.
        self._obstacles: dict[tuple[fx.Node, int, Ranges], fx.Node] = {}

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        if self.place.world == 1 or any(find_calls(graph, _REDUCE)):
            return PassResult(graph_module, False)
        JoinWrittenParts()(graph_module)
        linears = [node for node in find_calls(graph, *_LINEARS) if _weight(node).op == "get_attr"]
        self._choose(graph, linears)
        for node, ranges in list(self._columns.items()):
            if length(ranges) == shape_of(node)[-1]:
                del self._columns[node]
                self._of_all.add(node)
        split = self._of_all | self._rows | self._columns.keys()
        self.whole = [module_path(node) for node in linears if node not in split]
        self.whole += _other_matrices(graph_module, linears)
        self._check_plan()
        for node in list(graph.nodes):
            if node.op in ("call_function", "call_module"):
                self._rewrite(graph_module, node)
        self._check_output(graph)
        graph.eliminate_dead_code()
        for name, piece in self.pieces.items():
            _replace(graph_module, name, piece)
        _renew_values(graph_module)
        finish(graph_module)
        return PassResult(graph_module, True)

    # What is split.

    def _choose(self, graph: fx.Graph, linears: Sequence[fx.Node]) -> None:
        rank, world = self.place.rank, self.place.world
        head = logits_linear(graph)
        if head is not None:
            vocabulary = shape_of(head)[-1]
            self._check_vocabulary(head, vocabulary)
            self._columns[head] = overlapping(vocabulary, rank, world)
        for marker in find_calls(graph, _MARKER):
            heads, kv_heads = (shape_of(marker.args[number])[1] for number in (0, 1))  # type: ignore[arg-type]
            self._check_size(marker, heads, "query heads")
            if kv_heads % world and world % kv_heads:
                raise CannotShardError(
                    f"cannot split {describe(marker)}: {kv_heads} KV heads are neither a multiple nor a divisor of "
                    f"{world} ranks; use as many ranks as divide them"
                )
            one = rank * kv_heads // world
            of_keys = ((one, one + 1),) if kv_heads < world else even(kv_heads, rank, world)
            for number, ranges in enumerate((even(heads, rank, world), of_keys, of_keys)):
                if number and kv_heads == 1:
                    self._take_whole(marker.args[number], set())  # type: ignore[arg-type]
                    continue
                found = _Sources()
                obstacle = self._ask(marker.args[number], 1, ranges, found)  # type: ignore[arg-type]
                if obstacle is not None:
                    raise CannotShardError(
                        f"cannot split {describe(marker)}: its heads do not follow from a linear's rows, since "
                        f"{describe(obstacle)} stands between; use one rank"
                    )
                self._take(found)
        for node in linears:
            width = shape_of(_weight(node))[_column_axis(node)]
            if node in self._columns:
                continue
            found = _Sources()
            ranges = ((0, width),) if width % world else even(width, rank, world)
            if self._ask(_operand(node), -1, ranges, found) is None and found.ranges:
                self._check_size(node, width, "input channels")
                self._take(found)
                self._rows.add(node)

    def _check_size(self, node: fx.Node, size: int, what: str) -> None:
        if size % self.place.world:
            raise CannotShardError(
                f"cannot split {describe(node)}: its {size} {what} are no multiple of {self.place.world} ranks; use as "
                "many ranks as divide them"
            )

    def _check_vocabulary(self, node: fx.Node, size: int) -> None:
        if (self.place.world - 1) * -(-size // self.place.world) >= size:
            raise CannotShardError(
                f"cannot split {describe(node)}: its {size} tokens are too few for {self.place.world} ranks; use fewer"
            )

    def _take(self, found: _Sources) -> None:
        for source, ranges in found.ranges.items():
            if source.target is not _MARKER:
                self._columns[source] = union([*self._columns.get(source, ()), *ranges])

    def _take_whole(self, node: fx.Node, seen: set[fx.Node]) -> None:
        """Let every rank have all of a value, which may be a part of what a linear makes."""
        if node in seen:
            return
        seen.add(node)
        found = _Sources()
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            size = shape_of(node)[-1]
            if isinstance(size, int) and self._ask(node, -1, ((0, size),), found) is None and found.ranges:
                self._take(found)
                return
        for one in node.all_input_nodes:
            self._take_whole(one, seen)

    def _ask(self, node: fx.Node, axis: int, ranges: Ranges | None, found: _Sources) -> fx.Node | None:
        """Which linears and markers make ``ranges`` of an axis of ``node``, into ``found``.

        Returns:
            The node that keeps them from being made of these alone; None if nothing does.
        """
        if ranges is None:
            return node
        key = (node, axis, ranges)
        if key in found.asked:
            return None
        if key not in self._obstacles:
            obstacle = self._find(node, axis, ranges, found)
            if obstacle is None:
                found.asked.add(key)
                return None
            self._obstacles[key] = obstacle
        return self._obstacles[key]

    def _find(self, node: fx.Node, axis: int, ranges: Ranges, found: _Sources) -> fx.Node | None:
        """As :meth:`_ask`, of what was not asked before."""
        if node.op == "get_attr":
            return None
        if node.op != "call_function":
            return node
        if node.target in FACTORIES:
            # Every rank has all of it.
            return None
        dim = node.meta["val"].dim() if isinstance(node.meta.get("val"), Tensor) else 0
        axis = axis % dim if dim else axis
        if node.target in _LINEARS and _weight(node).op == "get_attr":
            if axis != dim - 1 or node in self._rows:
                return node
            found.ranges.setdefault(node, []).extend(ranges)
            return None
        if node.target is _MARKER:
            if axis != 2 or ranges != even(shape_of(node)[2], self.place.rank, self.place.world):
                return node
            found.ranges.setdefault(node, []).extend(ranges)
            return None
        followed = links(node)
        if followed is None:
            return node
        asked = [link for link in followed if link.outer == axis]
        if not asked and not _repeats(node, axis):
            return node
        for link in asked:
            obstacle = self._ask(link.node, link.inner, link.backward(ranges), found)
            if obstacle is not None:
                return obstacle
        return None

    def _check_plan(self) -> None:
        """Refuse where transformers splits what would be computed whole here."""
        for name in self.whole:
            pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
            style = self.plan.get(name) or self.plan.get(pattern)
            if style in ("colwise", "rowwise"):
                raise CannotShardError(
                    f"cannot split module '{name}': transformers' plan splits it ({style}), and nothing of the graph "
                    "says how; use one rank"
                )

    # What is written.

    def _rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        if node.target in _LINEARS and _weight(node).op == "get_attr":
            self._linear(gm, node)
        elif node.target is aten.embedding.default and _counts_tokens(node):
            self._embedding(gm, node)
        elif node.target is _MARKER:
            self._marker(gm.graph, node)
        elif node.op == "call_module" and any(one in self._held for one in node.all_input_nodes):
            raise self._stuck(node)
        elif node.target not in FACTORIES and any(one in self._held for one in _read(node)):
            self._follow(gm.graph, node)

    def _linear(self, gm: fx.GraphModule, node: fx.Node) -> None:
        weight, bias, x = _weight(node), _bias(node), _operand(node)
        columns, held = self._columns.get(node), self._held.get(x)
        others = [one for one in node.all_input_nodes if one is not x and one in self._held]
        if others or (held is not None and (columns is not None or held.axis != x.meta["val"].dim() - 1)):
            raise self._stuck(node)
        rank = self.place.rank
        if held is not None:
            size = shape_of(x)[-1]
            if length(held.ranges) * self.place.world != size:
                raise self._stuck(node)
            self._cut(weight, _column_axis(node), held.ranges)
            if bias is not None and rank:
                self._name(bias, Piece(-1, (), shape_of(bias)[-1], is_zero=True))
            self._after(gm.graph, node, _REDUCE, (self.place.group,))
        elif columns is not None:
            self._cut(weight, _row_axis(node), columns)
            if bias is not None:
                self._cut(bias, -1, columns)
            self._held[node] = Held(node.meta["val"].dim() - 1, columns)

    def _embedding(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """Tokens of other ranks read row 0 and count as zeros in the sum."""
        graph, (weight, ids) = gm.graph, node.args[:2]
        rows = shape_of(weight)[0]  # type: ignore[arg-type]
        self._check_vocabulary(node, rows)
        ((first, last),) = ranges = overlapping(rows, self.place.rank, self.place.world)
        # What two ranks hold counts once.
        shared = self.place.rank * (last - first) - first
        self._cut(weight, -2, ranges)  # type: ignore[arg-type]
        with graph.inserting_before(node):
            own = add_call(graph, aten.sub.Tensor, (ids, first), node)
            below = add_call(graph, aten.lt.Scalar, (own, shared), node)
            above = add_call(graph, aten.ge.Scalar, (own, last - first), node)
            foreign = add_call(graph, aten.bitwise_or.Tensor, (below, above), node)
            node.args = (weight, add_call(graph, aten.masked_fill.Scalar, (own, foreign, 0), node))
            node.kwargs = {}
        with graph.inserting_after(node):
            mask = add_call(graph, aten.unsqueeze.default, (foreign, -1), node)
        with graph.inserting_after(mask):
            zeroed = add_call(graph, aten.masked_fill.Scalar, (node, mask, 0), node, value=node.meta["val"])
        with graph.inserting_after(zeroed):
            total = add_call(graph, _REDUCE, (zeroed, self.place.group), node, value=node.meta["val"])
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not zeroed)

    def _marker(self, graph: fx.Graph, node: fx.Node) -> None:
        query, key, value = node.args[:3]
        held = [self._held.get(one) for one in (query, key, value)]  # type: ignore[arg-type]
        kv_heads = shape_of(key)[1]  # type: ignore[arg-type]
        if held[0] is None or (kv_heads > 1 and (held[1] is None or held[1] != held[2])):
            raise self._stuck(node)
        sinks = node.args[7] if len(node.args) > 7 else None
        if sinks is not None:
            node.update_arg(7, self._narrowed(graph, node, sinks, Held(0, held[0].ranges)))  # type: ignore[arg-type]
        self._held[node] = Held(2, held[0].ranges)

    def _follow(self, graph: fx.Graph, node: fx.Node) -> None:
        """A call that reads a part: its output is a part too."""
        if node is graph.output_node():
            return
        followed = links(node)
        if followed is None:
            raise self._stuck(node)
        if not isinstance(node.meta.get("val"), Tensor):
            # The parts of a split are asked.
            return
        every = list(followed)
        found = {self._through(link) for link in every if self._reads(link)}
        if not found:
            self._reduce(graph, node)
            return
        if len(found) > 1 or None in found:
            raise self._stuck(node)
        (held,) = found
        assert held is not None
        if length(held.ranges) < shape_of(node)[held.axis]:
            self._held[node] = held
        for link in every:
            if link.outer == held.axis and link.node not in self._held:
                ranges = link.backward(held.ranges)
                assert ranges is not None
                part = self._narrowed(graph, node, link.node, Held(link.inner, ranges))
                node.replace_input_with(link.node, part)
        self._resize(graph, node, held)

    def _reads(self, link: Link) -> bool:
        return link.node in self._held and link.inner == self._held[link.node].axis

    def _through(self, link: Link) -> Held | None:
        ranges = link.forward(self._held[link.node].ranges)
        return None if not ranges else Held(link.outer, ranges)

    def _resize(self, graph: fx.Graph, node: fx.Node, held: Held) -> None:
        """Sizes and bounds that the call names become those of the part."""
        target: Any = node.target
        if target in _SIZED:
            sizes = list(node.args[1])  # type: ignore[arg-type]
            if isinstance(sizes[held.axis], int) and sizes[held.axis] > 0:
                sizes[held.axis] = length(held.ranges)
            node.update_arg(1, sizes)
        elif target is aten.unflatten.int:
            source, axis = cast(Any, node.args)[:2]
            at = axis % source.meta["val"].dim()
            sizes = list(node.args[2])  # type: ignore[arg-type]
            if at <= held.axis < at + len(sizes) and sizes[held.axis - at] > 0:
                sizes[held.axis - at] = length(held.ranges)
            node.update_arg(2, sizes)
        elif target is aten.slice.Tensor:
            axis, start, stop, step = slice_of(node)
            if axis == held.axis:
                source = self._held[node.args[0]].ranges  # type: ignore[index]
                first = start if step > 1 else place_of(source, start)
                node.args, node.kwargs = (node.args[0], axis, first, place_of(source, stop), step), {}
        elif target is operator.getitem:
            axis, start, stop = split_of(node)
            split: Any = node.args[0]
            if axis == held.axis:
                source = self._held[split.args[0]].ranges
                arguments = (split.args[0], axis, place_of(source, start), place_of(source, stop))
                with graph.inserting_before(node):
                    part = add_call(graph, aten.slice.Tensor, arguments, split, value=node.meta["val"])
                if node in self._held:
                    self._held[part] = held
                node.replace_all_uses_with(part)

    def _reduce(self, graph: fx.Graph, node: fx.Node) -> None:
        """A mean over the axis that is held is the mean of the ranks' means, since all hold as much of it."""
        x: Any = node.args[0]
        if node.target is not aten.mean.dim or self._held[x].axis not in reduced_axes(node)[0]:
            raise self._stuck(node)
        held = self._held[x].ranges
        if len(held) != 1 or shape_of(x)[self._held[x].axis] % length(held):
            raise self._stuck(node)
        total = self._after(graph, node, _REDUCE, (self.place.group,))
        self._after(graph, total, aten.div.Tensor, (self.place.world,))

    def _narrowed(self, graph: fx.Graph, before: fx.Node, node: fx.Node, held: Held) -> fx.Node:
        """The part of a value that this rank has whole."""
        parts = []
        with graph.inserting_before(before):
            for first, last in held.ranges:
                parts.append(add_call(graph, aten.slice.Tensor, (node, held.axis, first, last), before))
            part = parts[0] if len(parts) == 1 else add_call(graph, aten.cat.default, (parts, held.axis), before)
        self._held[part] = held
        return part

    def _check_output(self, graph: fx.Graph) -> None:
        """The logits' parts are put together."""
        output = graph.output_node()
        for node in output.all_input_nodes:
            held = self._held.get(node)
            if held is None:
                continue
            size = shape_of(node)[-1]
            if held.axis != node.meta["val"].dim() - 1 or held.ranges != overlapping(
                size, self.place.rank, self.place.world
            ):
                raise self._stuck(output)
            arguments = (self.place.world, size, self.place.group)
            self._after(graph, node, _GATHER, arguments)

    def _after(self, graph: fx.Graph, node: fx.Node, target: Any, arguments: tuple) -> fx.Node:
        """``target(node, *arguments)`` in the place of ``node``."""
        with graph.inserting_after(node):
            new = add_call(graph, target, (node, *arguments), node, value=node.meta["val"])
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        return new

    def _cut(self, parameter: fx.Node, axis: int, ranges: Ranges) -> None:
        self._name(parameter, Piece(axis, ranges, shape_of(parameter)[axis]))

    def _name(self, parameter: fx.Node, piece: Piece) -> None:
        name = str(parameter.target)
        if self.pieces.setdefault(name, piece) != piece:
            raise CannotShardError(
                f"cannot split parameter '{name}': what reads it needs different parts of it; use one rank"
            )

    def _stuck(self, node: fx.Node) -> CannotShardError:
        return CannotShardError(
            f"cannot split {describe(node)}: a rank has only a part of what it reads, and it would need the whole; use "
            "one rank"
        )


def _weight(node: fx.Node) -> fx.Node:
    place = 2 if node.target in (aten.addmm.default, _EXPERTS) else 1
    return node.args[place] if len(node.args) > place else node.kwargs["weight"]  # type: ignore[return-value]


def _bias(node: fx.Node) -> fx.Node | None:
    place = 0 if node.target is aten.addmm.default else 3 if node.target is _EXPERTS else 2
    return node.args[place] if len(node.args) > place else node.kwargs.get("bias")  # type: ignore[return-value]


def _operand(node: fx.Node) -> fx.Node:
    return node.args[1 if node.target is aten.addmm.default else 0]  # type: ignore[return-value]


def _is_transposed(node: fx.Node) -> bool:
    """Whether the weight is stored as ``(..., K, N)``."""
    return node.target in (*_PRODUCTS, aten.addmm.default) or (node.target is _EXPERTS and bool(node.args[4]))


def transposed_weights(graph: fx.Graph) -> set[str]:
    """Names of the weights of linears that are stored as ``(..., K, N)``."""
    linears = [node for node in find_calls(graph, *_LINEARS) if _weight(node).op == "get_attr"]
    return {str(_weight(node).target) for node in linears if _is_transposed(node)}


def _row_axis(node: fx.Node) -> int:
    return -1 if _is_transposed(node) else -2


def _column_axis(node: fx.Node) -> int:
    return -2 if _is_transposed(node) else -1


def _repeats(node: fx.Node, axis: int) -> bool:
    """Whether a broadcast repeats its input along ``axis``, where any part of it is made of all of that."""
    return node.target is aten.expand.default or is_pointwise(node)


def _read(node: fx.Node) -> list[fx.Node]:
    """The tensors that a call reads; of a part of a split, what is split."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return node.args[0].all_input_nodes
    return node.all_input_nodes


def _other_matrices(gm: fx.GraphModule, linears: Sequence[fx.Node]) -> list[str]:
    """Names of matrices of the model that something else reads than a linear or an embedding."""
    parameters = dict(gm.named_parameters(remove_duplicate=False))
    matrices = [
        node
        for node in gm.graph.find_nodes(op="get_attr")
        if node.target in parameters and parameters[node.target].dim() > 1
    ]
    read = [
        node
        for node in matrices
        if any(user not in linears and user.target is not aten.embedding.default for user in node.users)
    ]
    return [own_name(str(node.target)) for node in read]


def _counts_tokens(embedding: fx.Node) -> bool:
    """Whether an embedding is looked up by token ids, and not by positions."""
    seen, waiting = set(), [embedding.args[1]]
    while waiting:
        node: Any = waiting.pop()
        if node not in seen and isinstance(node.meta.get("val"), Tensor):
            seen.add(node)
            waiting += node.all_input_nodes
    names = {node.target for node in seen if node.op == "placeholder"}
    return "input_ids" in names and embedding.args[0].op == "get_attr"  # type: ignore[union-attr]


def _replace(gm: fx.GraphModule, name: str, piece: Piece) -> None:
    """Let a parameter of the graph be its piece."""
    path, _, leaf = name.rpartition(".")
    (node, *_) = [node for node in gm.graph.find_nodes(op="get_attr") if node.target == name]
    whole = get_tensor(gm, node)
    part = piece.of(whole.detach())
    owner = gm.get_submodule(path)
    if isinstance(whole, torch.nn.Parameter):
        part = torch.nn.Parameter(part, requires_grad=False)
    setattr(owner, leaf, part)


def _renew_values(gm: fx.GraphModule) -> None:
    """Value metadata of what is a part now, and of what is made of that; most follow a sum, and are as they were."""
    mode = fake_mode_of(gm.graph)
    assert mode is not None
    changed: set[fx.Node] = set()
    for node in gm.graph.nodes:
        before = node.meta.get("val")
        if node.op == "get_attr":
            node.meta["val"] = mode.from_tensor(get_tensor(gm, node), static_shapes=True)
        elif node.op == "call_function" and not changed.isdisjoint(node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: one.meta["val"])
            node.meta["val"] = value_of(mode, node.target, *args, **kwargs)
        if _described(node.meta.get("val")) != _described(before):
            changed.add(node)


def _described(value: Any) -> str:
    """What value metadata says, also of sizes that are not known."""
    return f"{value!r} {value.stride()}" if isinstance(value, Tensor) else repr(value)
