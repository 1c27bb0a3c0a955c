"""A capture as JSON and tensors, so that a saved pair is loaded without exporting its model again.

Neither code nor pickles: an operator is named and looked up among those of aten, ``quantspec`` and Python's arithmetic,
and a size is an expression of the batch size and the number of tokens. torch.fx makes Python code of a graph, so
whatever it would write there as it stands has to be a name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PreTrainedModel

from quantspec.cache.geometry import HeldState, StateShape
from quantspec.passes.graph import SIZES, WRAPPER, get_tensor, graph_sizes, module_path, own_name
from quantspec.passes.state_steps import StateSteps
from quantspec.passes.token_counts import frozen_condition

from .export import Capture
from .interfaces import CapturedLayer

# Raised with every change of what a capture holds.
FORMAT = 5
_NAMESPACES = ("aten", "prims", "quantspec")
_NAMED = ("placeholder", "get_attr", "output", "call_module")
_ARITHMETIC = ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg")
# Of nodes that call no function, and of arguments; a tensor's is dotted.
_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
# Kinds of torch's constants, by the name that stands before theirs.
_CONSTANTS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
# Kinds of a size, and what combines their parts.
_EXPRESSIONS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "Min": torch.sym_min,
    "Max": torch.sym_max,
}


class CannotStore(ValueError):
    """A capture holds this, for which this file has no words; it is caught, and the capture is not kept."""


def key_of(model: PreTrainedModel, options: Mapping[str, Any]) -> dict[str, str] | None:
    """What a capture of ``model`` follows from; None where the installed versions do not tell its code.

    Args:
        model: on its device and in its dtype.
        options: those of its config that a forward may read.
    """
    if any(type(module).__module__.partition(".")[0] not in ("torch", "transformers") for module in model.modules()):
        return None
    # As JSON, which is what a config has been through once it is loaded.
    described = json.dumps(
        [type(model).__qualname__, str(model.dtype), model.device.type, options], sort_keys=True, default=str
    )
    packages = {package: version(package) for package in ("quantspec", "torch", "transformers")}
    return {**packages, "format": str(FORMAT), "model": hashlib.sha256(described.encode()).hexdigest()}


def to_json(captured: Capture, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description of a capture of ``model``, and the tensors of its graph that are none of the model's, by name.

    Raises:
        CannotStore: a node, a size or a condition of the export that :func:`from_json` could not bring back.
    """
    graph = captured.graph_module.graph
    condition = frozen_condition(graph, torch.iinfo(torch.int32).max)
    if condition is not None:
        raise CannotStore(condition)
    writer = _Writer(graph, model.device)
    steps = _state_steps(captured.graph_module)
    stored = {
        "layers": [asdict(layer) for layer in captured.layers],
        "states": [asdict(state) | {"dtype": writer.argument(state.dtype)} for state in captured.states],
        "nodes": writer.nodes(graph),
        "steps": {
            name: {"is_token": moved.is_token, "nodes": writer.nodes(moved.step.graph)} for name, moved in steps.items()
        },
        "values": writer.values,
    }
    names = {str(node.target): get_tensor(captured.graph_module, node) for node in graph.find_nodes(op="get_attr")}
    own = _tensors(model)
    return stored, {name: tensor for name, tensor in names.items() if not _is(own.get(own_name(name)), tensor)}


def from_json(stored: Mapping[str, Any], constants: Mapping[str, Tensor], model: PreTrainedModel) -> Capture:
    """The capture that :func:`to_json` described, of ``model``, whose key is the same.

    Raises:
        Exception: of any kind, where the description is not one of this model's.
    """
    reader = _Reader(stored["values"], model.device)
    own = _tensors(model)
    attributes: dict[str, Any] = {}
    for name, moved in stored["steps"].items():
        _check_name(name)
        attributes[name] = StateSteps(fx.GraphModule({}, reader.graph(moved["nodes"])), moved["is_token"])
    graph = reader.graph(stored["nodes"], attributes)
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        tensor = constants[name].to(model.device) if name in constants else own[own_name(name)]
        if (tensor.shape, tensor.dtype) != (node.meta["val"].shape, node.meta["val"].dtype):
            raise ValueError(name)
        attributes[name] = tensor
    layers = [layer | {"held": layer["held"] and HeldState(**layer["held"])} for layer in stored["layers"]]
    states = [
        state | {"shape": tuple(state["shape"]), "dtype": reader.argument(state["dtype"])} for state in stored["states"]
    ]
    return Capture(
        # Its code is made if it is run, which a pair does not.
        _LazyGraphModule(attributes, graph),
        tuple(CapturedLayer(**layer) for layer in layers),
        tuple(StateShape(**state) for state in states),
    )


def _state_steps(graph_module: fx.GraphModule) -> dict[str, StateSteps]:
    """The modules that a graph calls, by name."""
    found = {}
    for node in graph_module.graph.find_nodes(op="call_module"):
        called = graph_module.get_submodule(str(node.target))
        if not isinstance(called, StateSteps):
            raise CannotStore(type(called))
        found[str(node.target)] = called
    return found


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    every = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return dict(every)


def _is(own: Tensor | None, tensor: Tensor) -> bool:
    places = [None if one is None else (one.data_ptr(), one.shape, one.stride(), one.dtype) for one in (own, tensor)]
    return places[0] == places[1]


class _Writer:
    """Nodes as JSON; ``values`` are what they are said to compute, each once."""

    def __init__(self, graph: fx.Graph, device: torch.device) -> None:
        """``graph`` is the captured one, whose inputs tell what the sizes are called."""
        self.values: list[Any] = []
        self._device = device
        self._value_numbers: dict[str, int] = {}
        self._numbers: dict[fx.Node, int] = {}
        ids, _, *states = graph.find_nodes(op="placeholder")
        sizes = [*ids.meta["val"].shape, *(state.meta["val"].shape[1] for state in states[:1])]
        self._symbols = {size.node.expr: name for size, name in zip(sizes, SIZES, strict=False)}

    def nodes(self, graph: fx.Graph) -> list[dict[str, Any]]:
        """Those of the captured graph, or of the step of a state, whose sizes are its caller's."""
        self._numbers |= {node: number for number, node in enumerate(graph.nodes)}
        return [self._node(node) for node in graph.nodes]

    def _node(self, node: fx.Node) -> dict[str, Any]:
        entry = {
            "op": node.op,
            "name": node.name,
            "target": _target_name(node),
            "args": self.argument(node.args),
            "kwargs": {name: self.argument(value) for name, value in node.kwargs.items()},
            "module": module_path(node),
        }
        # Assertions compute nothing.
        if node.meta.get("val") is not None:
            entry["value"] = self._number(self._value(node.meta["val"]))
        return entry

    def _number(self, value: Any) -> int:
        number = self._value_numbers.setdefault(repr(value), len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number

    def argument(self, value: Any) -> Any:
        """What an operator is called with; a node is the number of its place."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, fx.Node):
            return {"node": self._numbers[value]}
        if isinstance(value, list | tuple):
            return {"list" if isinstance(value, list) else "tuple": [self.argument(one) for one in value]}
        if isinstance(value, torch.device):
            return {"device": None if value == self._device else str(value)}
        for kind, of_kind in _CONSTANTS.items():
            if isinstance(value, of_kind):
                return {kind: str(value).removeprefix("torch.")}
        raise CannotStore(type(value))

    def _value(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            shape, stride = ([self._size(size) for size in sizes] for sizes in (value.shape, value.stride()))
            return {"tensor": [shape, stride, self.argument(value.dtype), self.argument(value.device)]}
        if isinstance(value, list | tuple):
            return {"tuple": [self._value(one) for one in value]}
        if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
            return {"size": self._size(value)}
        raise CannotStore(type(value))

    def _size(self, size: int | torch.SymInt) -> Any:
        return size if isinstance(size, int) else self._expression(size.node.expr)

    def _expression(self, expression: Any) -> Any:
        if expression in self._symbols:
            return self._symbols[expression]
        if expression.is_Integer:
            return int(expression)
        kind = type(expression).__name__
        if kind in _EXPRESSIONS:
            return {kind: [self._expression(part) for part in expression.args]}
        raise CannotStore(expression)


class _Reader:
    """Nodes from JSON."""

    def __init__(self, values: list[Any], device: torch.device) -> None:
        self._device = device
        shape_env = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=shape_env, static_shapes=False)
        self._sizes: Mapping[str, Any] = graph_sizes(shape_env)
        with self._mode:
            self._values = [self._value(value) for value in values]

    def graph(self, entries: list[Mapping[str, Any]], modules: Collection[str] = ()) -> fx.Graph:
        """The nodes that :meth:`_Writer.nodes` described, which may call those ``modules``."""
        graph = fx.Graph()
        nodes: list[fx.Node] = []
        for entry in entries:
            if entry["op"] == "call_module" and entry["target"] not in modules:
                raise ValueError(entry["op"])
            nodes.append(self._node(graph, entry, nodes))
        graph.lint()
        return graph

    def _node(self, graph: fx.Graph, entry: Mapping[str, Any], nodes: list[fx.Node]) -> fx.Node:
        args = self.argument(entry["args"], nodes)
        kwargs = {name: self.argument(value, nodes) for name, value in entry["kwargs"].items()}
        op, target = entry["op"], entry["target"]
        for name in (*kwargs, entry["name"], *([] if op == "call_function" else [target])):
            _check_name(name)
        if op not in ("call_function", *_NAMED):
            raise ValueError(op)
        node = graph.create_node(
            op, _call_target(target) if op == "call_function" else target, args, kwargs, entry["name"]
        )
        node.meta["nn_module_stack"] = {"": (WRAPPER + entry["module"], "")}
        if "value" in entry:
            node.meta["val"] = self._values[entry["value"]]
        return node

    def argument(self, value: Any, nodes: Sequence[fx.Node] = ()) -> Any:
        """What :meth:`_Writer.argument` described."""
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        if kind == "node":
            return nodes[inner]
        if kind in ("list", "tuple"):
            parts = [self.argument(one, nodes) for one in inner]
            return parts if kind == "list" else tuple(parts)
        if kind == "device":
            return self._device if inner is None else torch.device(inner)
        found = getattr(torch, inner)
        if not isinstance(found, _CONSTANTS[kind]):
            raise TypeError(inner)
        return found

    def _value(self, value: Mapping[str, Any]) -> Any:
        ((kind, inner),) = value.items()
        if kind == "size":
            return self._size(inner)
        if kind == "tuple":
            return tuple(map(self._value, inner))
        shape, stride, dtype, device = inner
        sizes = [[self._size(size) for size in part] for part in (shape, stride)]
        return torch.empty_strided(*sizes, dtype=self.argument(dtype), device=self.argument(device))

    def _size(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        if isinstance(size, str):
            return self._sizes[size]
        ((kind, parts),) = size.items()
        return functools.reduce(_EXPRESSIONS[kind], map(self._size, parts))


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(name)


def _target_name(node: fx.Node) -> str:
    target: Any = node.target
    if node.op in _NAMED:
        return str(target)
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return str(target)
    name = getattr(target, "__name__", "")
    if name in _ARITHMETIC and target is getattr(operator, name):
        return name
    raise CannotStore(target)


def _call_target(name: str) -> Any:
    if name in _ARITHMETIC:
        return getattr(operator, name)
    namespace, _, rest = name.partition(".")
    if namespace not in _NAMESPACES:
        raise LookupError(name)
    op, overload = rest.split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), op), overload)
    # TorchScript has operators of its own among them, and one of aten's opens a file that it is told.
    if not isinstance(found, torch._ops.OpOverload) or not torch._C._dispatch_has_kernel(found.name()):
        raise LookupError(name)
    if any(argument.name == "filename" for argument in found._schema.arguments):
        raise LookupError(name)
    return found
