"""Let positions that a decoder counts by itself, from the number of tokens, be those that it is given."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import add_call, aten, finish, value_of

_COUNTS = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_LOOKUPS = (aten.embedding.default,)
_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default)
_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten.reshape_as.default,
    aten.unsqueeze.default,
    aten.expand.default,
)
# Ops along one axis, with the place of it among their arguments.
_ALONG = {aten.chunk.default: 2, aten.split.Tensor: 2, aten.stack.default: 1, aten.cat.default: 1}


class _CannotFollow(Exception):
    """A count is used in a way that this file does not know."""


class FollowPositionIds(PassBase):
    """Matches ``arange(first, first + T)``, T the number of tokens, that meets the tokens' values elementwise at last,
    through casts, arithmetic with constants, lookups and reshapes, as in learned positions and in queries that are
    scaled by their position; writes the same of ``position_ids + first``, with an axis of the batch in front.

    A count that is used otherwise, as an index of tokens, is left as it is.

    Requires value metadata and no no-ops (:class:`RemoveNoOps`). Ensures that every matched value is, of positions 0,
    1, 2, ..., what it was.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        ids, positions = graph.find_nodes(op="placeholder")[:2]
        tokens = ids.meta["val"].shape[1]
        modified = False
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in _COUNTS and _counts_tokens(node, tokens):
                # Without a user it had sizes of its own.
                positions.meta["val"] = ids.meta["val"]
                try:
                    _Followed(graph, node, ids, positions).rewrite()
                    modified = True
                except _CannotFollow:
                    continue
        if modified:
            finish(graph_module)
        return PassResult(graph_module, modified)


def _counts_tokens(node: fx.Node, tokens: torch.SymInt) -> bool:
    """Whether a node is ``arange`` of as many integers as there are tokens."""
    first, step = _first_and_step(node)
    size = node.meta["val"].shape[0]
    is_of_tokens = isinstance(size, torch.SymInt) and size.node.expr == tokens.node.expr
    return is_of_tokens and isinstance(first, int) and step == 1 and not node.meta["val"].is_floating_point()


def _first_and_step(node: fx.Node) -> tuple[Any, Any]:
    if node.target is aten.arange.default:
        return 0, 1
    return node.args[0], node.args[2] if len(node.args) > 2 else 1


class _Followed:
    """What is made of one count, until it meets the tokens.

    Of a value ``(1, ...)`` or ``(B, ...)`` the counterpart is ``(B, ...)``; of any other ``(T, ...)`` it is
    ``(B, T, ...)``, which takes its place against values with a batch axis only.
    """

    def __init__(self, graph: fx.Graph, count: fx.Node, ids: fx.Node, positions: fx.Node) -> None:
        self.graph = graph
        self.count = count
        self.ids = ids
        self.positions = positions
        self.counterparts: dict[fx.Node, fx.Node] = {}
        # Of nodes that depend on neither tokens nor positions.
        self.constant: set[fx.Node] = set()
        for node in graph.nodes:
            inputs = node.all_input_nodes
            if node.op == "get_attr" or (node.op == "call_function" and all(i in self.constant for i in inputs)):
                self.constant.add(node)

    def rewrite(self) -> None:
        """Raise :class:`_CannotFollow` before anything is changed, or let every user read the positions."""
        region, users = self._region()
        batch, tokens = (self._size(axis) for axis in (0, 1))
        first, _ = _first_and_step(self.count)
        with self.graph.inserting_before(self.count):
            shifted = add_call(self.graph, aten.add.Tensor, (self.positions, first), self.count)
            dtype = self.count.meta["val"].dtype
            self.counterparts[self.count] = add_call(self.graph, aten.to.dtype, (shifted, dtype), self.count)
        for node in region:
            with self.graph.inserting_before(node):
                self.counterparts[node] = self._counterpart(node, batch, tokens)
        for user, read in users:
            user.replace_input_with(read, self.counterparts[read])

    def _region(self) -> tuple[list[fx.Node], list[tuple[fx.Node, fx.Node]]]:
        """Nodes of the count and constants alone, in order, and the users of their values with what they read."""
        inside = {self.count}
        region: list[fx.Node] = []
        users = []
        for node in self.graph.nodes:
            read = [source for source in node.all_input_nodes if source in inside]
            if not read:
                continue
            others = [source for source in node.all_input_nodes if source not in inside]
            if all(source in self.constant or self._is_size(node, source) for source in others):
                self._check_followed(node)
                inside.add(node)
                region.append(node)
            else:
                self._check_user(node, read)
                users += [(node, source) for source in read]
        return region, users

    def _check_followed(self, node: fx.Node) -> None:
        # A shape alone is read of the second.
        sources = node.all_input_nodes[:1] if node.target is aten.reshape_as.default else node.all_input_nodes
        counted = [source for source in sources if source not in self.constant and _rank(source)]
        kinds = {(_rank(source), self._has_batch(source)) for source in counted}
        if len(kinds) != 1 or not self._has_known_sizes(node):
            raise _CannotFollow
        ((rank, has_batch),) = kinds
        if node.target is aten.expand.default:
            # The batch's axis stays in front, or is the one that is added.
            keeps = self._has_batch(node) if has_batch else _rank(node) == rank
            adds = not has_batch and self._has_batch(node) and _rank(node) == rank + 1
            known = adds or (keeps and _rank(node) == rank)
        elif node.target in _LOOKUPS:
            known = node.args[1] in counted
        elif node.target in _ALONG:
            # Behind the first axis, counted from the end where the batch's is added in front.
            place = _ALONG[node.target]
            axis: Any = node.args[place] if len(node.args) > place else 0
            known = -_rank(node) < axis < 0 or (has_batch and axis > 0)
        elif node.target is operator.getitem:
            known = True
        else:
            # A constant joins from the right, and may not reach the batch's axis.
            constants = [source for source in node.all_input_nodes if source in self.constant]
            joins = _rank(node) == rank and all(_rank(source) <= rank - has_batch for source in constants)
            known = node.target in (*_CASTS, *_RESHAPES) or (_is_elementwise(node) and joins)
        if not known:
            raise _CannotFollow

    def _check_user(self, node: fx.Node, read: list[fx.Node]) -> None:
        meets = any(_rank(other) == _rank(node) for other in node.all_input_nodes if other not in read)
        fits = all(_rank(node) == _rank(source) + (not self._has_batch(source)) for source in read)
        if not (_is_elementwise(node) and meets and fits):
            raise _CannotFollow

    def _is_size(self, node: fx.Node, source: fx.Node) -> bool:
        return node.target in _RESHAPES and isinstance(source.meta.get("val"), torch.SymInt | int)

    def _has_batch(self, node: fx.Node) -> bool:
        """Whether the first axis of a value, all alike for the rows of a batch, takes theirs."""
        first = _value(node).shape[0] if _rank(node) > 1 else None
        batch = self.ids.meta["val"].shape[0]
        return first == 1 if isinstance(first, int) else first is not None and first.node.expr == batch.node.expr

    def _has_known_sizes(self, node: fx.Node) -> bool:
        expressions = [size.node.expr for size in self.ids.meta["val"].shape]
        sizes = _value(node).shape
        return all(isinstance(size, int) or size.node.expr in expressions for size in sizes)

    def _size(self, axis: int) -> fx.Node:
        with self.graph.inserting_before(self.count):
            return add_call(self.graph, aten.sym_size.int, (self.ids, axis), self.count)

    def _counterpart(self, node: fx.Node, batch: fx.Node, tokens: fx.Node) -> fx.Node:
        if node.target not in _RESHAPES:
            args = fx.map_arg(node.args, lambda source: self.counterparts.get(source, source))
            made = self.graph.call_function(node.target, args, node.kwargs)  # type: ignore[arg-type]
            made.meta.update(node.meta)
            return self._with_value(made)
        by_expression = {s.node.expr: n for s, n in zip(self.ids.meta["val"].shape, (batch, tokens), strict=True)}
        sizes = [size if isinstance(size, int) else by_expression[size.node.expr] for size in node.meta["val"].shape]
        sizes = [batch, *(sizes[1:] if self._has_batch(node) else sizes)]
        source = self.counterparts[node.args[0]]  # type: ignore[index]
        target = aten.expand.default if node.target is aten.expand.default else aten.reshape.default
        return add_call(self.graph, target, (source, sizes), node)

    def _with_value(self, made: fx.Node) -> fx.Node:
        """``made`` with metadata, keyword arguments included."""
        args, kwargs = fx.map_arg((made.args, made.kwargs), lambda source: source.meta["val"])
        made.meta["val"] = value_of(self.ids.meta["val"].fake_mode, made.target, *args, **kwargs)
        return made


def _value(node: fx.Node) -> Any:
    """A node's value; the first of several, which have one rank."""
    value = node.meta.get("val")
    return value[0] if isinstance(value, list | tuple) else value


def _rank(node: fx.Node) -> int:
    value = _value(node)
    return value.dim() if isinstance(value, Tensor) else 0


def _is_elementwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
