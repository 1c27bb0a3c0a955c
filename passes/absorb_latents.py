"""Keys and values that every head makes of one latent vector per token, attended as that vector (DeepSeek-V2, arXiv
2405.04434, section 2.1)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import add_call, aten, find_calls, finish

# Ops whose outputs are numbers of their inputs at other places.
_MOVES = frozenset(
    {
        operator.getitem,
        aten.alias.default,
        aten.cat.default,
        aten.chunk.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.copy.default,
        aten.expand.default,
        aten.flatten.using_ints,
        aten.permute.default,
        aten.repeat.default,
        aten.repeat_interleave.self_int,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.slice_scatter.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.squeeze.dim,
        aten.stack.default,
        aten.transpose.int,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten._unsafe_view.default,
        aten.view.default,
    }
)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.contiguous.default)
# Sequences and tokens of the example on which numbers are followed: no likely sizes of anything else.
_BATCH, _TOKENS = 2, 3


class _Piece(NamedTuple):
    """Channels ``first`` and on, ``size`` of them, of a node with one vector per token."""

    node: fx.Node
    first: int
    size: int


class Factor(NamedTuple):
    """Rows ``base + head * stride`` and on, ``size`` of them for each of ``heads``, of a weight ``(N, r)``."""

    weight: fx.Node
    heads: int
    base: int
    stride: int
    size: int

    @property
    def name(self) -> str:
        """The graph's for the weight."""
        return str(self.weight.target)

    def of(self, weight: Any, call: Callable[..., Any]) -> Any:
        """``(heads, size, r)``, a view of ``weight``, by ``call(op, *args)``."""
        base = self.base
        if self.stride == self.size:
            weight = call(aten.slice.Tensor, weight, 0, base, base + self.heads * self.size)
            base = 0
        by_head = call(aten.view.default, weight, [self.heads, self.stride, self.weight.meta["val"].shape[1]])
        return call(aten.slice.Tensor, by_head, 1, base, base + self.size)


@dataclass(frozen=True)
class Latent:
    """``key[h] = [shared, key_up[h] @ latent]`` with the product at channel ``first``, ``value[h] = value_up[h] @
    latent``; ``before`` and ``after`` are the shared channels on both sides of the product."""

    marker: fx.Node
    latent: fx.Node
    key_up: Factor
    value_up: Factor
    first: int
    before: list[_Piece]
    after: list[_Piece]


def values_in_keys(marker: fx.Node) -> bool:
    """Whether the values of an attention marker are the first channels of its keys."""
    _, key, value = marker.args[:3]
    if value is key:
        return True
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    dims = (-1, key.meta["val"].dim() - 1)
    return value.target is aten.slice.Tensor and value.args[0] is key and value.args[1] in dims and not value.args[2]


class AbsorbLatents(PassBase):
    """Matches ``quantspec::attention`` markers of ``k[h] = [W_k[h] c, r]`` and ``v[h] = W_v[h] c``, writes attention to
    one head, whose keys are ``[c, r]`` and whose values are the first channels of those:

        out[h] = W_v[h] attention([W_k[h]^T q_c[h], q_r[h]], [c, r], c)

    ``c`` is one vector of each token, ``W`` are rows of linears without bias, and ``r`` is the same in all heads. Where
    the numbers of k and v come from is not read off a pattern: they are followed through views, splits, joins and
    copies on a small example.

    A marker is left as it is where ``[c, r]`` is not smaller than keys and values, or larger than ``max_bytes``, and
    where ``c`` is as wide as keys or values: of a layer without RoPE it may be the hidden state, which no head could
    attend to as fast.

    Requires value metadata. Ensures the same outputs but for rounding.

    Attributes:
        absorbed: what was found, by the markers' layer index; filled by the call.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        """``max_bytes``: of ``[c, r]``, in the model's dtype; None for any number."""
        super().__init__()
        self.max_bytes = max_bytes
        self.absorbed: dict[int, Latent] = {}

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        markers = find_calls(graph_module.graph, torch.ops.quantspec.attention.default)
        found = [match for marker in markers if (match := _match(marker)) is not None]
        if self.max_bytes is not None:
            found = [match for match in found if _bytes(match) <= self.max_bytes]
        for match in found:
            self.absorbed[match.marker.args[3]] = match  # type: ignore[index]
            _rewrite(graph_module.graph, match)
        if found:
            finish(graph_module)
        return PassResult(graph_module, bool(found))


def _width(match: Latent) -> int:
    return match.latent.meta["val"].shape[-1] + sum(piece.size for piece in (*match.before, *match.after))


def _bytes(match: Latent) -> int:
    return _width(match) * match.latent.meta["val"].dtype.itemsize


def _match(marker: fx.Node) -> Latent | None:
    inputs: Any = marker.args[:3]
    if inputs[1].meta["val"].shape[1] == 1 or len({node.meta["val"].dtype for node in inputs}) > 1:
        return None
    keys, values = (_Origins(marker.graph, node) for node in inputs[1:])
    if not (keys.known and values.known):
        return None
    value_up = values.factor(0, values.channels)
    if value_up is None:
        return None
    latent = _linear_input(values.leaf(0))
    made = [d for d in range(keys.channels) if not keys.is_shared(d)]
    if not made or made != list(range(made[0], made[-1] + 1)):
        return None
    first, last = made[0], made[-1] + 1
    key_up = keys.factor(first, last)
    if key_up is None or _unshaped(_linear_input(keys.leaf(first))) is not _unshaped(latent):
        return None
    match = Latent(marker, latent, key_up, value_up, first, keys.pieces(0, first), keys.pieces(last, keys.channels))
    made_of_it = keys.heads * (key_up.size + value_up.size)
    is_narrow = 2 * latent.meta["val"].shape[-1] < made_of_it
    return match if is_narrow and _width(match) < keys.heads * (keys.channels + values.channels) else None


class _Origins:
    """From which nodes the numbers of ``node (B, K, T, D)`` are.

    Attributes:
        known: whether each comes from the same token's vector of some node, and from the same channel for all tokens.
        heads, channels: K and D.
    """

    def __init__(self, graph: fx.Graph, node: Any) -> None:
        # A graph with states may have sizes that are numbers, with torch 2.11 even where they are symbols.
        sizes = graph.find_nodes(op="placeholder")[0].meta["val"].shape
        self._batch, self._tokens = map(_number, sizes, (_BATCH, _TOKENS))
        self._sizes = {
            size.node.expr: number
            for size, number in zip(sizes, (self._batch, self._tokens), strict=True)
            if isinstance(size, torch.SymInt)
        }
        _, self.heads, _, self.channels = node.meta["val"].shape
        self._leaves: list[fx.Node] = []
        region = self._region(node)
        places = self._places(node, region)
        self.known = bool((places >= 0).all()) and all(map(self._is_vector, self._leaves)) and not _is_changed(region)
        if not self.known:
            return
        widths = torch.tensor([leaf.meta["val"].shape[-1] for leaf in self._leaves], device="cpu")
        starts = torch.cat((widths.new_zeros(1), (widths * self._batch * self._tokens).cumsum(0)))
        which = torch.bucketize(places.contiguous(), starts, right=True) - 1
        token = torch.arange(self._batch * self._tokens, device="cpu").view(self._batch, 1, self._tokens, 1)
        channel = places - starts[which] - token * widths[which]
        self._which, self._channel = which[0, :, 0], channel[0, :, 0]
        self.known = bool(
            (which == which[:1, :, :1]).all()
            and (channel == channel[:1, :, :1]).all()
            and ((channel >= 0) & (channel < widths[which])).all()
        )

    def leaf(self, d: int) -> fx.Node:
        """What channel ``d`` of the first head is from."""
        return self._leaves[int(self._which[0, d])]

    def is_shared(self, d: int) -> bool:
        """Whether channel ``d`` is the same in all heads."""
        return bool(
            (self._which[:, d] == self._which[0, d]).all() and (self._channel[:, d] == self._channel[0, d]).all()
        )

    def pieces(self, first: int, last: int) -> list[_Piece]:
        """The shared channels ``first`` to ``last``."""
        pieces: list[_Piece] = []
        for d in range(first, last):
            leaf, channel = self.leaf(d), int(self._channel[0, d])
            if pieces and pieces[-1].node is leaf and sum(pieces[-1][1:]) == channel:
                pieces[-1] = pieces[-1]._replace(size=pieces[-1].size + 1)
            else:
                pieces.append(_Piece(leaf, channel, 1))
        return pieces

    def factor(self, first: int, last: int) -> Factor | None:
        """The rows of one linear's weight that make channels ``first`` to ``last``, if they are evenly laid out."""
        linear, rows = self.leaf(first), self._channel[:, first:last]
        if linear.target is not aten.linear.default or len(linear.args) != 2 or linear.kwargs:
            return None
        weight: Any = linear.args[1]
        if weight.op != "get_attr" or not bool((self._which[:, first:last] == self._which[0, first]).all()):
            return None
        base, stride = int(rows[0, 0]), int(rows[1, 0] - rows[0, 0])
        count, heads = last - first, self.heads
        even = base + stride * torch.arange(heads, device="cpu")[:, None]
        even = even + torch.arange(count, device="cpu")
        whole = stride * heads == weight.meta["val"].shape[0] and base + count <= stride
        if not torch.equal(rows, even) or not (whole or stride == count):
            return None
        return Factor(weight, heads, base, stride, count)

    def _region(self, node: fx.Node) -> set[fx.Node]:
        """Nodes that move numbers of leaves to ``node``, itself included; collects the leaves."""
        region: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            node = waiting.pop()
            if node in region or node in self._leaves:
                continue
            if node.target is aten.new_empty.default:
                # Filled in place.
                region.add(node)
                for part in node.users:
                    for copy in part.users if part.target is aten.slice.Tensor else ():
                        if copy.target is aten.copy_.default and copy.args[0] is part:
                            region.update((part, copy))
                            waiting.append(copy.args[1])  # type: ignore[arg-type]
            elif node.target in _MOVES and (not self._is_vector(node) or self._is_part_of_vector(node)):
                region.add(node)
                waiting += [source for source in node.all_input_nodes if not _is_size(source)]
            else:
                self._leaves.append(node)
        return region

    def _places(self, node: fx.Node, region: set[fx.Node]) -> Tensor:
        """``(B, K, T, D)``, the place of each number of the example among those of all leaves."""
        done: dict[fx.Node, Any] = {}
        start = 0
        for leaf in self._leaves:
            shape = self._shape(leaf)
            done[leaf] = torch.arange(start, start + shape.numel(), device="cpu").view(shape)
            start += shape.numel()
        for step in sorted(region):
            args, kwargs = fx.map_arg((step.args, step.kwargs), lambda source: self._value(source, done))
            done[step] = step.target(*args, **kwargs)  # type: ignore[operator]
            if step.target is aten.new_empty.default:
                done[step].fill_(-1)
        return done[node]

    def _value(self, node: fx.Node, done: dict[fx.Node, Any]) -> Any:
        if node in done:
            return done[node]
        value = node.meta["val"]
        return self._size(value) if _is_size(node) else torch.empty(0, dtype=torch.long, device="cpu")

    def _size(self, size: Any) -> int:
        return int(size.node.expr.subs(self._sizes)) if isinstance(size, torch.SymInt) else size

    def _shape(self, node: fx.Node) -> torch.Size:
        return torch.Size(map(self._size, node.meta["val"].shape))

    def _is_part_of_vector(self, node: fx.Node) -> bool:
        """Whether a node has numbers of one other node with a vector of each token."""
        sources = [source for source in node.all_input_nodes if not _is_size(source)]
        # What splits has several outputs.
        if node.target is operator.getitem:
            sources = sources[0].all_input_nodes[:1]
        return len(sources) == 1 and self._is_vector(sources[0])

    def _is_vector(self, node: fx.Node) -> bool:
        """Whether a node has one vector of each token, one after the other."""
        value = node.meta["val"]
        if not isinstance(value, Tensor) or value.dim() < 2:
            return False
        shape = self._shape(node)
        return shape.numel() == self._batch * self._tokens * shape[-1]


def _number(size: int | torch.SymInt, example: int) -> int:
    """A size of the graph's inputs: ``example`` where any would do."""
    return example if isinstance(size, torch.SymInt) and not size.node.expr.is_number else int(size)


def _is_changed(region: set[fx.Node]) -> bool:
    """Whether something else writes in place to a node, or to a part of it."""
    seen, waiting = set(region), list(region)
    while waiting:
        node = waiting.pop()
        for user in node.users.keys() - seen:
            mutates = isinstance(user.target, torch._ops.OpOverload) and user.target._schema.is_mutable
            if mutates and user.args[0] is node:
                return True
            if user.target in _MOVES:
                seen.add(user)
                waiting.append(user)
    return False


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def _linear_input(linear: fx.Node) -> fx.Node:
    return linear.args[0]  # type: ignore[return-value]


def _unshaped(node: fx.Node) -> fx.Node:
    """What has the same vectors before their tokens were given other axes."""
    while node.target in _RESHAPES:
        before: Any = node.args[0]
        if before.meta["val"].shape[-1] != node.meta["val"].shape[-1]:
            break
        node = before
    return node


def _rewrite(graph: fx.Graph, match: Latent) -> None:
    marker = match.marker
    query, key, _, *options = cast(Any, marker.args)
    heads, dims = query.meta["val"].shape[1], query.meta["val"].shape[3]
    kv_heads, width = match.key_up.heads, match.latent.meta["val"].shape[-1]
    repeat = heads // kv_heads
    ids = graph.find_nodes(op="placeholder")[0]
    first, last = match.first, match.first + match.key_up.size
    with graph.inserting_before(marker):

        def call(target: Any, *args: Any) -> fx.Node:
            return add_call(graph, target, args, marker)

        batch, tokens = (call(aten.sym_size.int, ids, axis) for axis in (0, 1))

        def vectors(piece: _Piece) -> fx.Node:
            whole = call(aten.reshape.default, piece.node, [batch, 1, tokens, piece.node.meta["val"].shape[-1]])
            part = call(aten.slice.Tensor, whole, 3, piece.first, piece.first + piece.size)
            # What was copied into a key took its dtype.
            return call(aten.to.dtype, part, key.meta["val"].dtype)

        # One product for each head, whatever the batch.
        own = call(aten.slice.Tensor, query, 3, first, last)
        own = call(aten.reshape.default, own, [batch, kv_heads, repeat, tokens, match.key_up.size])
        own = call(aten.permute.default, own, [1, 0, 2, 3, 4])
        own = call(aten.reshape.default, own, [kv_heads, -1, match.key_up.size])
        own = call(aten.bmm.default, own, match.key_up.of(match.key_up.weight, call))
        own = call(aten.reshape.default, own, [kv_heads, batch, repeat, tokens, width])
        own = call(aten.permute.default, own, [1, 0, 2, 3, 4])
        queries = [call(aten.reshape.default, own, [batch, heads, tokens, width])]
        queries += [
            call(aten.slice.Tensor, query, 3, *ends) for ends in ((0, first), (last, dims)) if ends[0] < ends[1]
        ]
        keys = [call(aten.reshape.default, match.latent, [batch, 1, tokens, width])]
        keys += map(vectors, (*match.before, *match.after))
        new_query, new_key = (call(aten.cat.default, parts, -1) for parts in (queries, keys))
        new_value = call(aten.slice.Tensor, new_key, 3, 0, width)
        out = call(torch.ops.quantspec.attention.default, new_query, new_key, new_value, *options)
        out = call(aten.reshape.default, out, [batch, tokens, kv_heads, repeat, width])
        out = call(aten.permute.default, out, [2, 0, 1, 3, 4])
        out = call(aten.reshape.default, out, [kv_heads, -1, width])
        up = match.value_up.of(match.value_up.weight, call)
        out = call(aten.bmm.default, out, call(aten.transpose.int, up, 1, 2))
        out = call(aten.reshape.default, out, [kv_heads, batch, tokens, repeat, match.value_up.size])
        out = call(aten.permute.default, out, [1, 2, 0, 3, 4])
        out = call(aten.reshape.default, out, [batch, tokens, heads, match.value_up.size])
    marker.replace_all_uses_with(out)
    graph.erase_node(marker)
    _erase_copies(graph, key)


def _erase_copies(graph: fx.Graph, key: Any) -> None:
    """Erase what fills ``key`` in place where nothing else reads it, which would not go by itself."""
    copies = [copy for part in key.users for copy in part.users if copy.target is aten.copy_.default]
    if key.target is aten.new_empty.default and all(
        part.target is aten.slice.Tensor and set(part.users) <= set(copies) for part in key.users
    ):
        for copy in copies:
            if not copy.users:
                graph.erase_node(copy)
