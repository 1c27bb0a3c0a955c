"""Small helpers that every pass uses: reading and adding tensors of a GraphModule, adding calls with metadata."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

aten = torch.ops.aten
# What an export calls the model within its wrapper.
WRAPPER = "model."
# The sizes that vary in a graph and an example of each; slots are those of states.
SIZES = {"batch": 2, "tokens": 7, "slots": 11}
# Where a fake mode keeps what operators made of arguments that look alike.
_KNOWN = "_quantspec_known_values"

# Metadata of the node a rewrite replaces that still holds for its replacement.
ORIGIN_KEYS = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn")


def find_calls(graph: fx.Graph, *targets: Any) -> Iterator[fx.Node]:
    """Call nodes of these targets in graph order; safe to iterate while rewriting."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in targets:
            yield node


def get_tensor(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor a ``get_attr`` node reads."""
    value: Any = gm
    for atom in str(node.target).split("."):
        value = getattr(value, atom)
    if not isinstance(value, Tensor):
        raise TypeError(f"'{node.target}' is a {type(value).__name__}, not a tensor")
    return value


def from_positions(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that ``position_ids`` and constants determine, that input included; constants alone are not."""
    constant: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "placeholder" and node.target == "position_ids":
            found.add(node)
        elif node.op == "get_attr" or node.target is aten.sym_size.int:
            constant.add(node)
        elif node.op == "call_function" and all(i in constant or i in found for i in inputs):
            (found if any(i in found for i in inputs) else constant).add(node)
    return found


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    """The fake mode the graph's metadata was made with, or None where it carries none."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def module_path(node: fx.Node) -> str:
    """Dotted name of the module that made a node, without the capture wrapper; '' if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] if isinstance(entry, tuple) else "" for entry in stack.values()]
    return own_name(paths[-1]) if paths else ""


def own_name(name: str) -> str:
    """What the model itself calls a tensor or a module of the graph."""
    return name.removeprefix(WRAPPER)


def describe(node: fx.Node) -> str:
    """A node's name, target and module, for error messages."""
    return f"node '{node.name}' ({node.target}) of module '{module_path(node)}'"


def add_buffer(gm: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    """Register ``tensor`` as a buffer and return a ``get_attr`` node for it at the current insertion point."""
    name = name.replace(".", "_")
    gm.register_buffer(name, tensor)
    node = gm.graph.get_attr(name)
    mode = fake_mode_of(gm.graph)
    if mode is not None:
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
    return node


def looks(tensor: Tensor) -> tuple[Any, ...]:
    """All that an export sees of a tensor, but its values."""
    sizes = (*tensor.shape, *tensor.stride())
    expressions = tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)
    return type(tensor), expressions, tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad


def graph_sizes(shape_env: ShapeEnv) -> dict[str, Any]:
    """New symbols for the sizes that vary in a graph, by their names."""
    sizes = {}
    for name, example in SIZES.items():
        source = ConstantSource(name)
        symbol = shape_env.create_symbol(example, source, dynamic_dim=DimDynamic.DYNAMIC)
        sizes[name] = shape_env.create_symintnode(symbol, hint=example, source=source)
    return sizes


def value_of(mode: FakeTensorMode, target: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``target`` makes of fake tensors of ``mode``."""
    # torch 2.11 decomposes a linear of symbolic sizes by what knows plain sizes alone, unless Python dispatches.
    with mode, enable_python_dispatcher():
        return target(*args, **kwargs)


def add_call(graph: fx.Graph, target: Any, args: tuple, origin: fx.Node, value: Any = None) -> fx.Node:
    """Insert a call at the current insertion point, with its value metadata.

    The metadata is ``value`` where the caller knows it (propagating symbolic shapes is slow), otherwise what the
    arguments imply.
    """
    node = graph.call_function(target, args)
    node.meta.update({key: origin.meta[key] for key in ORIGIN_KEYS if key in origin.meta})
    if value is not None:
        node.meta["val"] = value
        return node
    values = fx.node.map_arg(args, lambda argument: argument.meta.get("val"))
    mode = fake_mode_of(graph)
    if mode is not None and all("val" in argument.meta for argument in node.all_input_nodes):
        # What a rewrite writes in one layer it writes in the next.
        known = vars(mode).setdefault(_KNOWN, {})
        key = (target, _likeness(values))
        if key not in known:
            known[key] = value_of(mode, target, *values)
        node.meta["val"] = known[key]
    return node


def _likeness(value: Any) -> Any:
    """A key for arguments of which an operator makes results that look alike."""
    if isinstance(value, Tensor):
        return looks(value)
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_likeness, value))
    return type(value), value.node.expr if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def add_placeholder(graph: fx.Graph, name: str, value: Any) -> fx.Node:
    """Append a placeholder after the existing ones, with this value metadata."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def finish(gm: fx.GraphModule) -> None:
    """Drop what a rewrite left unused, check the graph and regenerate its code."""
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in gm.named_buffers(recurse=False)]:
        if name not in read:
            delattr(gm, name)
    gm.recompile()


def release(gm: fx.GraphModule, nodes: Iterable[fx.Node]) -> None:
    """Drop those of ``nodes`` that read a buffer for nobody, and buffers that are read no more; others are left.

    What replaces weights one by one would else hold all of the old ones until :func:`finish`.
    """
    for node in nodes:
        if node.op != "get_attr" or node.users:
            continue
        gm.graph.erase_node(node)
        name = str(node.target)
        if name in gm._buffers and not any(name == other.target for other in gm.graph.find_nodes(op="get_attr")):
            delattr(gm, name)


def clone(gm: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with its own graph and the same tensors; holds only the tensors its graph reads.

    Its code is made when it is first called or read, not after each of the passes that it goes through.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, copied)
    if isinstance(output, tuple | list) and len(output) == 1:
        output = output[0]
    graph.output(output)
    # Which says what its modules do besides computing.
    graph.owning_module = gm
    graph.eliminate_dead_code()
    return _LazyGraphModule(gm, graph)
