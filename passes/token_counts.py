"""What a captured decoder makes of the number of tokens: conditions that the export took for granted, and values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

from .graph import aten, fake_mode_of, get_tensor

# Readers that take a tensor's shape, dtype or device alone.
SHAPE_READERS = (
    aten.sym_size,
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.empty_like,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.new_empty,
)
# Of equal values along an axis they make what follows its size or an index into it.
_COUNTING = (aten.cumsum, aten.cumprod, aten.sum, aten.softmax, aten._softmax, aten.sort, aten.argsort, aten.nonzero)
_INDEXING_LISTS = (aten.index, aten.index_put)
_INDEXING_AXES = (
    aten.gather,
    aten.index_select,
    aten.index_add,
    aten.index_copy,
    aten.scatter,
    aten.scatter_add,
    aten.scatter_reduce,
)
_TORCH = Path(torch.__file__).parent


def frozen_condition(graph: fx.Graph, max_tokens: int) -> str | None:
    """A condition on sizes that held in the export and fails for some text of at most ``max_tokens``; None if none.

    Conditions of torch's own code choose between ways to compute the same; those of the model's choose what it
    computes.
    """
    mode = fake_mode_of(graph)
    ids = next(node for node in graph.nodes if node.op == "placeholder")
    if mode is None or mode.shape_env is None:
        return None
    batch, tokens = (size.node.expr for size in ids.meta["val"].shape)
    powers = (2**exponent + offset for exponent in range(6, 31) for offset in (-1, 0, 1))
    counts = [count for count in (*range(2, 64), *powers, max_tokens) if count <= max_tokens]
    for guard in mode.shape_env.guards:
        condition = mode.shape_env.replace(guard.expr)
        where = guard.sloc.framework_loc
        if _TORCH in Path(getattr(where, "filename", "")).parents or not condition.free_symbols <= {batch, tokens}:
            continue
        for sizes in itertools.product((2, 3, 64), counts):
            if condition.subs(dict(zip((batch, tokens), sizes, strict=True))) == sympy.false:
                named = condition.subs({batch: sympy.Symbol("batch"), tokens: sympy.Symbol("tokens")})
                return f"{named} {guard.sloc}"
    return None


def value_from_sizes(graph_module: fx.GraphModule) -> tuple[fx.Node, fx.Node] | None:
    """A value that sizes and constants alone make, such as ``arange(T)``, and a node that computes with it.

    Indexing an axis of variable size with it only names tokens, and is not counted. Requires real weights.

    Returns:
        The node that first made the value and its reader, which depends on tokens or positions; None without such.
    """
    graph = graph_module.graph
    constant: set[fx.Node] = set()
    # Values that differ with the sizes or along an axis of variable size, and where each began.
    begun: dict[fx.Node, fx.Node] = {}
    needed = _needed(graph)
    for node in graph.nodes:
        if node.op == "get_attr":
            constant.add(node)
        elif node.op == "call_function" and node.target is aten.sym_size.int:
            constant.add(node)
            begun[node] = node
        elif node.op == "call_function" and all(source in constant for source, _ in _values_read(node)):
            constant.add(node)
            sources = [source for source, _ in _values_read(node) if source in begun or _counts(node, source)]
            if sources and not _is_slice_of_equals(graph_module, node, begun):
                tensors = [source for source in sources if isinstance(source.meta.get("val"), Tensor)]
                begun[node] = begun.get(tensors[0], node) if tensors else node
        elif node.op == "call_function" and node in needed:
            for source, kind in _values_read(node):
                if source in begun and ("Tensor" in kind or "number" in kind) and not _names_tokens(node, source):
                    return begun[source], node
    return None


def follows_tokens(value: Tensor) -> bool:
    """Whether the values of a tensor of an export that is under way follow from those of the token ids, its first
    matrix of integers; False outside of an export.
    """
    mode = get_proxy_mode()
    slot: Any = None if mode is None else get_proxy_slot(value, mode.tracer, None)
    if slot is None:
        return False
    graph = slot.proxy.node.graph
    matrices = [n for n in graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), Tensor)]
    ids = next(n for n in matrices if n.meta["val"].dim() == 2 and n.meta["val"].dtype == torch.int64)
    seen: set[fx.Node] = set()
    reached = [slot.proxy.node]
    while reached:
        node = reached.pop()
        if node not in seen:
            seen.add(node)
            reached += [source for source, _ in _values_read(node)] if node.op == "call_function" else []
    return ids in seen


def _needed(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output depends on."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in needed:
            needed.update(node.all_input_nodes)
    return needed


def _values_read(node: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    """Inputs that decide a node's values, not only its shape, with the type that the node's schema gives them."""
    if not isinstance(node.target, torch._ops.OpOverload):
        yield from ((source, "") for source in node.all_input_nodes)
        return
    if node.target.overloadpacket in SHAPE_READERS:
        return
    arguments = node.target._schema.arguments
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False)) | node.kwargs
    for argument in arguments:
        kind = str(argument.type)
        if kind != "List[int]":
            found: list[fx.Node] = []
            fx.node.map_arg(given.get(argument.name), found.append)
            yield from ((source, kind) for source in found)


def _counts(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``node`` adds up or orders ``source``, which has an axis of variable size."""
    value = source.meta.get("val")
    counting = getattr(node.target, "overloadpacket", None) in _COUNTING
    return counting and isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape)


def _names_tokens(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``node`` reads ``source`` as an index into an axis of variable size alone."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet in _INDEXING_LISTS:
        axes = [axis for axis, index in enumerate(node.args[1]) if index is source]  # type: ignore[arg-type]
    elif packet in _INDEXING_AXES and node.args[2] is source:
        axes = [node.args[1]]  # type: ignore[list-item]
    else:
        return False
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    return bool(axes) and all(isinstance(shape[axis], torch.SymInt) for axis in axes)


def _is_slice_of_equals(graph_module: fx.GraphModule, node: fx.Node, begun: dict[fx.Node, fx.Node]) -> bool:
    """Whether a node takes as many rows as there are tokens of a constant whose rows are all equal."""
    if node.target is not aten.slice.Tensor or node.args[0] in begun:
        return False
    values = _evaluate(graph_module, node.args[0])
    axis = node.args[1] if len(node.args) > 1 else 0
    return bool((values == values.narrow(axis, 0, 1)).all())


def _evaluate(graph_module: fx.GraphModule, node: Any) -> Any:
    """What a node of constants alone computes; its shape is the export's."""
    if node.op == "get_attr":
        return get_tensor(graph_module, node)
    if node.target is aten.sym_size.int:
        return node.meta["val"].node.hint
    value = lambda source: _evaluate(graph_module, source)  # noqa: E731
    return node.target(*fx.node.map_arg(node.args, value), **fx.node.map_arg(node.kwargs, value))
