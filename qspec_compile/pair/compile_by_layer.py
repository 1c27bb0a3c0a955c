"""Compile a decoder's identical layers once.

torch.compile takes a second or two per layer, and a decoder's layers differ in their tensors only. The graph is cut
after the last linear or custom op of every layer, so that the addition to the residual stream stays with the norm that
reads it; cuts of equal structure share one compiled function, which takes the tensors as inputs.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from quantspec.kernels.compiled_by import compiled_by_these_kernels
from quantspec.kernels.inline_asm import launches_overlap
from quantspec.passes.graph import get_tensor, module_path
from quantspec.passes.weight_formats import PACKED_LINEARS

aten = torch.ops.aten
_HEAVY = (aten.linear.default, aten.addmm.default, aten.mm.default)
# Fewer than this would not be worth the cuts.
_LEAST_LAYERS = 3
# Batch sizes and caches that one function is compiled for; torch.compile's own limit of 8 would end in slow eager code.
_MOST_SHAPES = 64
# Besides pointwise ops, views and our own, what inductor turns into kernels that read something.
_READING = (
    *_HEAVY,
    aten.matmul.default,
    aten.bmm.default,
    aten.embedding.default,
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.rms_norm.default,
    aten.layer_norm.default,
    aten.cat.default,
    aten.stack.default,
    aten.type_as.default,
    aten.gather.default,
)


class Region(NamedTuple):
    """Consecutive nodes of a graph.

    Attributes:
        nodes: what it computes, in order.
        inputs: nodes of earlier regions, and placeholders, that it reads.
        tensors: ``get_attr`` nodes it reads.
        outputs: its nodes that later regions or the graph's output read.
    """

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    tensors: list[fx.Node]
    outputs: list[fx.Node]


def _layer_index(node: fx.Node) -> int | None:
    """Number of the layer that a node belongs to: the first number in its module's path."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module_path(node))
    return int(found[1]) if found else None


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a number; it is computed again where it is read, since numbers are guarded by value."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), int | torch.SymInt)


def _cuts(nodes: list[fx.Node]) -> list[int]:
    """Position after the last heavy node of each layer, in order."""
    last: dict[int, int] = {}
    for position, node in enumerate(nodes):
        layer = _layer_index(node)
        if layer is not None and _is_heavy(node):
            last[layer] = position + 1
    cuts = [last[layer] for layer in sorted(last)]
    return cuts if cuts == sorted(set(cuts)) else []


def _is_heavy(node: fx.Node) -> bool:
    """Whether a node is a linear, a custom op, or one of several results of such."""
    if node.target is operator.getitem:
        return _is_heavy(node.args[0])  # type: ignore[arg-type]
    ours = PACKED_LINEARS in node.meta or getattr(node.target, "namespace", None) == "quantspec"
    return ours or node.target in _HEAVY


def _with_sizes(node: fx.Node) -> Iterator[fx.Node]:
    """A node's inputs, sizes replaced by what they are computed from."""
    for value in node.all_input_nodes:
        if _is_size(value):
            yield from _with_sizes(value)
        else:
            yield value


def split_regions(graph: fx.Graph) -> list[Region] | None:
    """Regions of a lowered decoder graph, in order; None where it has few layers or a cut would part a tuple."""
    nodes = _computing(graph)
    cuts = _cuts(nodes)
    return None if len(cuts) < _LEAST_LAYERS else _regions(graph, nodes, cuts)


def layer_regions(graph: fx.Graph) -> list[Region]:
    """Regions of a lowered decoder graph of any number of layers; a single one where it cannot be cut."""
    nodes = _computing(graph)
    regions = _regions(graph, nodes, _cuts(nodes)) or _regions(graph, nodes, [])
    assert regions is not None
    return regions


def _computing(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op in ("call_function", "call_module") and not _is_size(node)]


def _regions(graph: fx.Graph, nodes: list[fx.Node], cuts: list[int]) -> list[Region] | None:
    """The regions between ``cuts``; None where one would part a tuple."""
    bounds = [0, *cuts, len(nodes)]
    parts = [nodes[first:last] for first, last in itertools.pairwise(bounds)]
    home = {node: index for index, part in enumerate(parts) for node in part}
    results = set(_with_sizes(graph.output_node()))
    read_later = {
        value for node in nodes for value in _with_sizes(node) if value in home and home[value] < home[node]
    } | results
    if not all(isinstance(node.meta.get("val"), Tensor) for node in read_later):
        return None
    regions = []
    for index, part in enumerate(parts):
        read = dict.fromkeys(value for node in part for value in _with_sizes(node) if home.get(value) != index)
        tensors = [value for value in read if value.op == "get_attr"]
        inputs = [value for value in read if value.op != "get_attr"]
        regions.append(Region(part, inputs, tensors, [node for node in part if node in read_later]))
    return regions


def region_graph(region: Region) -> fx.Graph:
    """The region as a graph of its own: ``inputs``, then ``tensors``, to a tuple of ``outputs``."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for index, value in enumerate((*region.inputs, *region.tensors)):
        copies[value] = graph.placeholder(f"input_{index}")

    def copied(value: fx.Node) -> fx.Node:
        if value not in copies:
            copies[value] = graph.node_copy(value, copied)
        return copies[value]

    for node in region.nodes:
        copied(node)
    graph.output(tuple(copies[node] for node in region.outputs))
    return graph


def _signature(graph_module: fx.GraphModule, region: Region, graph: fx.Graph) -> Hashable:
    """Equal for regions that one compiled function serves."""
    number = {node: index for index, node in enumerate(graph.nodes)}
    steps = tuple(
        (node.op, str(node.target), str(fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")))
        for node in graph.nodes
        if node.op != "placeholder"
    )
    tensors = tuple((t.shape, t.stride(), t.dtype) for t in (get_tensor(graph_module, n) for n in region.tensors))
    inputs = tuple((str(tuple(n.meta["val"].shape)), n.meta["val"].dtype) for n in region.inputs)
    return steps, tensors, inputs


def compile_graph(graph_module: fx.GraphModule) -> Callable[..., Tensor]:
    """``graph_module.forward`` under torch.compile, region by region where it has layers.

    It is not compiled again when the number of cached groups or, from 2 on, of tokens differs between calls; with every
    size a symbol compilation takes twice as long.

    Args:
        graph_module: a role's graph as :class:`quantspec.pair.Pair` describes it.
    """
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    symbols = _varying_symbols(placeholders)
    regions = split_regions(graph_module.graph)
    if regions is None:
        # torch.compile traces the code that is there.
        _LazyGraphModule.force_recompile(graph_module)
        whole = _Marked(torch.compile(graph_module.forward), [_dims_with(symbols, node) for node in placeholders])
        return _with_many_shapes(whole)
    device = placeholders[0].meta["val"].device
    functions: dict[Hashable, Callable] = {}
    calls = []
    for region in regions:
        graph = region_graph(region)
        key = _signature(graph_module, region, graph)
        if key not in functions:
            functions[key] = _compile(graph, device)
        tensors = [get_tensor(graph_module, node) for node in region.tensors]
        calls.append((_Marked(functions[key], [_dims_with(symbols, node) for node in region.inputs]), region, tensors))
    last_use = {value: index for index, region in enumerate(regions) for value in region.inputs}
    result = next(_with_sizes(graph_module.graph.output_node()))

    def forward(*inputs: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
        for index, (function, region, tensors) in enumerate(calls):
            outputs = function(*(values[node] for node in region.inputs), *tensors)
            # What no later region reads is given back.
            for node in region.inputs:
                if last_use[node] == index:
                    del values[node]
            values.update(zip(region.outputs, outputs, strict=True))
        return values[result]

    return _with_many_shapes(forward)


def _with_many_shapes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*inputs: Tensor) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES), compiled_by_these_kernels():
            return function(*inputs)

    return call


def _compile(graph: fx.Graph, device: torch.device) -> Callable[..., Any]:
    """A graph whose tensors are its inputs under torch.compile, with what helps many small kernels on ``device``.

    Programmatic dependent launch sets a kernel up while the one before it ends. Inductor's kernels await their
    predecessor unless they read nothing, so graphs that might fill a tensor with constants do without.
    """
    options: dict[str, Any] = {}
    if device.type == "cuda":
        # Independent small kernels, as the rotations of queries and of keys, become one.
        options["combo_kernels"] = True
        overlap = "triton.enable_pdl" in torch._inductor.list_options() and launches_overlap(device)
        options["triton.enable_pdl"] = overlap and all(
            _reads(node) for node in graph.nodes if node.op == "call_function"
        )
    # torch.compile refuses an exported GraphModule object, but takes a forward.
    return torch.compile(fx.GraphModule(torch.nn.Module(), graph).forward, options=options or None)


def _reads(node: fx.Node) -> bool:
    target: Any = node.target
    if node.target is operator.getitem or node.target in _READING or PACKED_LINEARS in node.meta:
        return True
    if getattr(target, "namespace", "") == "quantspec":
        return True
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags or target.is_view or _is_size(node)
    )


def _varying_symbols(placeholders: list[fx.Node]) -> set[Any]:
    """Symbols of the sizes that vary between calls: tokens, and groups of the planes."""
    sizes = [node.meta["val"].shape[1] for node in placeholders if node.target == "input_ids"]
    for node in placeholders:
        part = node.meta.get("cache_part")
        if part is not None and part.group_axis is not None:
            sizes.append(node.meta["val"].shape[part.group_axis])
    return {symbol for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}


def _dims_with(symbols: set[Any], node: fx.Node) -> tuple[int, ...]:
    """Dims of a node's value whose size depends on one of ``symbols``."""
    shape = enumerate(node.meta["val"].shape)
    return tuple(d for d, size in shape if isinstance(size, torch.SymInt) and size.node.expr.free_symbols & symbols)


class _Marked:
    """A compiled function whose inputs are marked with their dynamic dims before each call."""

    def __init__(self, function: Callable, dims: list[tuple[int, ...]]) -> None:
        self.function = function
        self.dims = dims

    def __call__(self, *inputs: Tensor) -> Any:
        for tensor, dims in zip(inputs, self.dims, strict=False):
            for dim in dims:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return self.function(*inputs)
