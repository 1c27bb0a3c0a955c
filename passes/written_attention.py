"""Attention that a decoder computes by itself, told by what its scores become, as attention markers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import add_buffer, add_call, aten, describe, finish, get_tensor

_SOFTMAXES = (aten.softmax.int, aten._softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
_SUMS = (aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor)
_SHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.contiguous.default,
    aten.clone.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.type_as.default,
)
# Read of an input its shape and dtype alone: of the only one, or of the second.
_LIKE = (aten.ones_like.default, aten.zeros_like.default, aten.full_like.default, aten.sym_size.int)
_AS = (aten.expand_as.default, aten.reshape_as.default, aten.view_as.default, aten.type_as.default)
# A score this far below the best has no probability left in any dtype.
_HIDDEN = 5e3
_FEWEST_TOKENS, _MOST_TOKENS = 40, 4096
# Positions that a key tells of itself where a bias grows with the distance: one bit each.
_POSITION_BITS = 16


class WrittenAttentionError(ValueError):
    """Attention that is computed otherwise than the markers do."""


@dataclass
class _Found:
    """``weights = softmax(rule(product)) @ values``; ``rule`` are the nodes in between, in order."""

    product: fx.Node
    rule: list[fx.Node]
    softmax: fx.Node
    after: list[fx.Node]
    output: fx.Node


@dataclass(frozen=True)
class _Rule:
    """Makes ``scale * s + slopes[h] * (j - i)`` of the score ``s`` of query i and key j, which sees ``window`` keys."""

    scale: float
    window: int
    slopes: Tensor | None


class MarkWrittenAttention(PassBase):
    """Matches ``softmax(rule(q @ k^T)) @ v`` over all tokens; writes ``quantspec::attention`` markers, in order.

    What stands between the product and the softmax is not read but tried: of scores that are 0, 1 and random it has to
    make ``scale * s + slope[h] * (j - i)`` for a causal j with an optional window, and hide the rest. A slope (ALiBi)
    becomes further dims of queries and keys: a key's are the bits of its position, which both planes of the cache hold
    exactly, and a query's are what each is worth.

    Requires value metadata and no no-ops (:class:`RemoveNoOps`). Raises :class:`WrittenAttentionError` for a rule that
    is another. Ensures that no matched softmax is left.
    """

    def __init__(self, max_window: int) -> None:
        """``max_window``: tokens of the longest window or chunk that a mask of the model tells of, 0 for none."""
        super().__init__()
        self.max_window = max_window

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        free = _free_of_tokens(graph)
        found = [match for node in graph.nodes if (match := _match(node, free)) is not None]
        rules = _Rules(graph_module, free, self.max_window)
        ruled = [(match, rules.of(match)) for match in found]
        bits = None
        for layer, (match, rule) in enumerate(ruled):
            if rule.slopes is not None and bits is None:
                bits = _position_bits(graph_module, match.product)
            _replace(graph_module, layer, match, rule, bits)
        if found:
            finish(graph_module)
        return PassResult(graph_module, bool(found))


def _free_of_tokens(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose values sizes, positions and constants determine."""
    free: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            if node.target == "position_ids":
                free.add(node)
        elif all(source in free for source in _read(node)):
            free.add(node)
    return free


def _read(node: fx.Node) -> list[fx.Node]:
    """Inputs whose values are read."""
    unread = node.args[0] if node.target in _LIKE else node.args[1] if node.target in _AS else None
    return [source for source in node.all_input_nodes if source is not unread]


def _match(softmax: fx.Node, free: set[fx.Node]) -> _Found | None:
    if softmax.op != "call_function" or softmax.target not in _SOFTMAXES or softmax in free:
        return None
    rank = softmax.meta["val"].dim()
    if softmax.args[1] not in (-1, rank - 1) or not _is_of_scores(softmax):
        return None
    rule: list[fx.Node] = []
    node: Any = softmax.args[0]
    while node.target not in _PRODUCTS:
        sources = [source for source in _read(node) if source not in free]
        if len(sources) != 1 or not (_is_elementwise(node) or node.target in _SHAPES):
            raise WrittenAttentionError(_reason(softmax, node, len(sources)))
        rule.insert(0, node)
        node = sources[0]
    after: list[fx.Node] = []
    output = softmax
    while output is softmax or output.target in _SHAPES:
        if output is not softmax:
            after.append(output)
        users = [user for user in output.users if user.target is not aten.sym_size.int]
        output = users[0]
        if len(users) != 1 or (output.target in _PRODUCTS and output.args[0] is not (after or [softmax])[-1]):
            break
    if output.target not in _PRODUCTS[:2]:
        raise WrittenAttentionError(f"{describe(softmax)} weighs something else than values")
    return _Found(node, rule, softmax, after, output)


def _reason(softmax: fx.Node, node: fx.Node, sources: int) -> str:
    """Why scores that ``node`` makes of ``sources`` values of the tokens are no rule of queries times keys."""
    if node.target in _SUMS and sources > 1:
        return (
            f"{describe(softmax)} is of scores to which {describe(node)} adds a bias that follows from what the tokens "
            "say"
        )
    return f"{describe(softmax)} is of scores that {describe(node)} makes of other than queries times keys"


def _is_of_scores(node: fx.Node) -> bool:
    """Whether a node has an axis of all tokens, and another of all."""
    tokens = node.graph.find_nodes(op="placeholder")[0].meta["val"].shape[1]
    sizes = [str(size) for size in node.meta["val"].shape]
    return len(sizes) > 2 and sizes[-2:] == [str(tokens)] * 2


def _is_elementwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in node.target.tags or node.target.name().startswith(("aten::masked_fill", "aten::where"))
    )


class _Rules:
    """What the rules of a graph do, each computed once."""

    def __init__(self, graph_module: fx.GraphModule, free: set[fx.Node], max_window: int) -> None:
        self.graph_module = graph_module
        self.free = free
        self.max_window = max_window
        self.known: dict[Any, _Rule] = {}

    def of(self, match: _Found) -> _Rule:
        """Raises :class:`WrittenAttentionError` for one that no marker has."""
        nodes = [match.product, *match.rule]
        number = {node: index for index, node in enumerate(nodes)}
        bias = match.product.args[:1] if match.product.target is aten.baddbmm.default else ()
        arguments = [(bias, match.product.kwargs), *((node.args, node.kwargs) for node in match.rule)]
        key = repr([(node.target, fx.map_arg(of, number.get)) for node, of in zip(nodes, arguments, strict=True)])
        key += repr([source.name for node in nodes for source in node.all_input_nodes if source in self.free])
        if key not in self.known:
            self.known[key] = self._tried(match)
        return self.known[key]

    def _tried(self, match: _Found) -> _Rule:
        upstream = self._upstream(match)
        tables = [node for node in upstream if node.op == "get_attr"]
        sizes = [get_tensor(self.graph_module, node).shape for node in tables]
        # A table of which tokens see each other tells of windows up to its size.
        square = [size[-1] for size in sizes if len(size) > 1 and size[-1] == size[-2] > 1]
        tokens = min(square) if square else max(_FEWEST_TOKENS, 2 * self.max_window + 1)
        if tokens > _MOST_TOKENS:
            raise WrittenAttentionError(f"{describe(match.softmax)} attends in a window of {self.max_window} tokens")
        tried = _Trial(self.graph_module, match, upstream, tokens)
        shape = (1, _heads(match.product), tokens, tokens)
        generator = torch.Generator("cpu").manual_seed(0)
        random = torch.randn(shape, generator=generator, device="cpu")
        zero, one, other = (tried.of(scores) for scores in (torch.zeros(shape), torch.ones(shape), random))
        return _rule_of(match, zero, one, other, random)

    def _upstream(self, match: _Found) -> list[fx.Node]:
        """What the rule reads besides scores, in order."""
        needed = set(match.rule) | ({match.product} if match.product.target is aten.baddbmm.default else set())
        found: set[fx.Node] = set()
        for node in reversed(list(self.graph_module.graph.nodes)):
            if node in needed or node in found:
                found.update(source for source in _read(node) if source in self.free)
        return [node for node in self.graph_module.graph.nodes if node in found]


class _Trial(fx.Interpreter):
    """Runs a rule on given scores, of one text."""

    def __init__(self, graph_module: fx.GraphModule, match: _Found, upstream: list[fx.Node], tokens: int) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.match = match
        device = next(graph_module.parameters()).device
        ids, positions = graph_module.graph.find_nodes(op="placeholder")[:2]
        self.env = {
            ids: torch.zeros(1, tokens, dtype=torch.long, device=device),
            positions: torch.arange(tokens, device=device)[None],
        }
        self.device = device
        self.sizes = {size.node.expr: known for size, known in zip(ids.meta["val"].shape, (1, tokens), strict=True)}
        with torch.no_grad():
            for node in upstream:
                for source in node.all_input_nodes:
                    if source not in self.env:
                        self.env[source] = self._of_shape(source)
                if node not in self.env:
                    self.env[node] = self.run_node(node)

    def _of_shape(self, node: fx.Node) -> Tensor:
        """In place of a value that only its shape is read of."""
        value = node.meta["val"]
        shape = [size if isinstance(size, int) else int(size.node.expr.subs(self.sizes)) for size in value.shape]
        return torch.zeros(shape, dtype=value.dtype, device=self.device)

    @torch.no_grad()
    def of(self, scores: Tensor) -> Tensor:
        """``(H, T, T)`` float32, of scores ``(1, H, T, T)``."""
        product, dtype = self.match.product, self.match.product.meta["val"].dtype
        scores = scores.to(self.device, dtype)
        scores = scores.flatten(0, 1) if product.meta["val"].dim() == 3 else scores
        if product.target is aten.baddbmm.default:
            factors = {"beta": 1, "alpha": 1} | product.kwargs
            scores = factors["beta"] * self.env[product.args[0]] + factors["alpha"] * scores  # type: ignore[operator,index]
        self.env[product] = scores.clone()
        for node in self.match.rule:
            self.env[node] = self.run_node(node)
        # In place or not, the last node has what the softmax reads.
        made = self.env[self.match.softmax.args[0]]  # type: ignore[index]
        return made.float().reshape(-1, *made.shape[-2:]).cpu()


def _rule_of(match: _Found, zero: Tensor, one: Tensor, other: Tensor, random: Tensor) -> _Rule:
    """The rule that makes ``zero``, ``one`` and ``other`` ``(H, T, T)`` of scores that are 0, 1 and ``random``."""
    if zero.is_meta:
        # A graph that is looked at and not run.
        return _Rule(1.0, 0, None)
    tokens = zero.shape[-1]
    distance = torch.arange(tokens)[None] - torch.arange(tokens)[:, None]
    hidden = zero < zero.amax(-1, keepdim=True) - _HIDDEN
    seen = int((~hidden[0, -1]).sum())
    window = seen if seen < tokens else 0
    expected = (distance > 0) | (distance <= -window if window else distance > tokens)
    if not bool((hidden == expected).all()):
        raise WrittenAttentionError(f"{describe(match.softmax)} is of scores that are not causal, with a window or not")
    precision = torch.finfo(match.product.meta["val"].dtype).eps
    visible = ~expected
    bias = (zero - zero.diagonal(dim1=1, dim2=2)[..., None]).masked_fill(expected, 0)
    farthest = min(tokens, seen) - 1
    slopes = -bias[:, -1, tokens - 1 - farthest] / farthest
    scale = float((one - zero)[:, visible].mean())
    # Both the bias and scores were rounded to the model's dtype.
    largest = slopes.abs().amax() * farthest + abs(scale) * random.abs().amax()
    off = torch.stack(((bias - slopes[:, None, None] * distance), other - zero - scale * random[0]))
    if not off[:, :, visible].abs().amax() <= 8 * precision * largest:
        raise WrittenAttentionError(
            f"{describe(match.softmax)} is of scores that are not a multiple of queries times keys, and a bias that "
            "grows with the distance or none"
        )
    return _Rule(scale, window, slopes if slopes.abs().amax() > 0 else None)


def _heads(node: fx.Node) -> int:
    """Heads of ``(B, H, ...)`` or ``(B * H, ...)``."""
    value = node.meta["val"]
    if value.dim() == 4:
        return int(value.shape[1])
    ids = next(iter(node.graph.find_nodes(op="placeholder")))
    return int(value.shape[0].node.expr / ids.meta["val"].shape[0].node.expr)


def _position_bits(graph_module: fx.GraphModule, product: fx.Node) -> fx.Node:
    """``(B, T, bits)``, the bits of each token's position, looked up in a table of all there are."""
    graph = graph_module.graph
    positions = graph.find_nodes(op="placeholder")[1]
    query = product.args[-2].meta["val"]  # type: ignore[union-attr]
    numbers = torch.arange(2**_POSITION_BITS, device=query.device)[:, None]
    table = (numbers >> torch.arange(_POSITION_BITS, device=query.device)) & 1
    with graph.inserting_before(positions.next if positions.next.op != "placeholder" else product):
        bits = add_buffer(graph_module, "position_bits", table.to(query.dtype))
        return add_call(graph, aten.embedding.default, (bits, positions), product)


def _replace(graph_module: fx.GraphModule, layer: int, match: _Found, rule: _Rule, bits: fx.Node | None) -> None:
    graph, output = graph_module.graph, match.output
    query, key = match.product.args[-2:]
    with graph.inserting_before(output):
        key = add_call(graph, aten.transpose.int, (key, -1, -2), output)
        dtype = output.args[1].meta["val"].dtype  # type: ignore[union-attr]
        query, key, value = (_by_head(graph, x, dtype, output) for x in (query, key, output.args[1]))
        if rule.slopes is not None:
            assert bits is not None
            query, key = _with_positions(graph_module, query, key, bits, rule, output)
        arguments = (query, key, value, layer, rule.scale, rule.window, 0.0, None)
        marker = add_call(graph, torch.ops.quantspec.attention.default, arguments, output)
        heads_first = add_call(graph, aten.transpose.int, (marker, 1, 2), output)
        if output.meta["val"].dim() == 3:
            heads_first = add_call(graph, aten.flatten.using_ints, (heads_first, 0, 1), output)
    output.replace_all_uses_with(heads_first)
    # What works in place would not go by itself.
    for node in (output, *reversed(match.after), match.softmax, *reversed(match.rule), match.product):
        for user in [user for user in node.users if user.target is aten.sym_size.int]:
            if user.users:
                break
            graph.erase_node(user)
        if not node.users:
            graph.erase_node(node)


def _by_head(graph: fx.Graph, x: Any, dtype: torch.dtype, origin: fx.Node) -> fx.Node:
    """``(B, H, ...)`` of ``(B, H, ...)`` or ``(B * H, ...)``, in ``dtype``."""
    if x.meta["val"].dim() == 3:
        ids = next(iter(graph.find_nodes(op="placeholder")))
        batch = add_call(graph, aten.sym_size.int, (ids, 0), origin)
        x = add_call(graph, aten.unflatten.int, (x, 0, [batch, _heads(x)]), origin)
    return x if x.meta["val"].dtype == dtype else add_call(graph, aten.to.dtype, (x, dtype), origin)


def _with_positions(
    graph_module: fx.GraphModule, query: fx.Node, key: fx.Node, bits: fx.Node, rule: _Rule, origin: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """Queries and keys whose product has ``slope * j / scale`` too: the softmax does not see what all keys share."""
    graph = graph_module.graph
    assert rule.slopes is not None
    like = query.meta["val"]
    # A step of the key's codes, of which there are 15, is a power of 2 and exact. Half of a bit's worth stands in the
    # key, so that nothing overflows in float16.
    powers = torch.arange(_POSITION_BITS)
    in_query = rule.slopes[:, None].double() / rule.scale * 2.0 ** (powers - powers // 2) / 15
    in_key = 15 * 2.0 ** (powers // 2)
    worth, part = (
        add_buffer(graph_module, f"position_{name}_{origin.name}", x.to(like.device, like.dtype))
        for name, x in (("worth", in_query[None, :, None]), ("part", in_key))
    )
    ids = next(iter(graph.find_nodes(op="placeholder")))
    sizes = [add_call(graph, aten.sym_size.int, (ids, axis), origin) for axis in (0, 1)]
    heads = key.meta["val"].shape[1]
    worth = add_call(graph, aten.expand.default, (worth, [sizes[0], like.shape[1], sizes[1], _POSITION_BITS]), origin)
    own = add_call(graph, aten.mul.Tensor, (bits, part), origin)
    own = add_call(graph, aten.unsqueeze.default, (own, 1), origin)
    own = add_call(graph, aten.expand.default, (own, [sizes[0], heads, sizes[1], _POSITION_BITS]), origin)
    return (
        add_call(graph, aten.cat.default, ([query, worth], -1), origin),
        add_call(graph, aten.cat.default, ([key, own], -1), origin),
    )
