"""Layers that are alike are traced once: an export leaves a marker where one is like a layer before it.

What a layer computes follows from its class, its attributes, its tensors and what it is given. Two are alike where all
of these are, but for the values of tensors and for what counts layers, as ``layer_idx``, if the forward never reads it.
A layer of a llama takes 0.6 s of a processor where it is traced, and 0.2 s where its nodes are copied.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers import PreTrainedConfig

from quantspec.kernels import called_module, repeated_layer
from quantspec.passes.graph import looks
from quantspec.passes.repeated_layers import ENDS, MADE_BY, OUTPUT, LayerCall, RepeatLayers, moved

from .interfaces import MaskSpec, Recorder

# An attribute that counts layers, such as layer_idx.
COUNTS = re.compile(r"idx|index|layer_id|number")
# What stands for nodes that are not there yet.
_MARKERS = (called_module._opoverload, repeated_layer._opoverload)
# Arguments and outputs that are what they say.
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, MaskSpec)


@dataclass(frozen=True)
class _Traced:
    """A layer that was traced.

    Attributes:
        number: what its nodes are marked with.
        path, module, attributes: of the layer, before it ran.
        leaves, spec: its arguments, flattened.
        outputs, out_spec: what it returned, flattened, with one tensor at ``out_place``.
        reads: what counts layers and was read, by module and attribute.
        attention: numbers of its attention calls.
    """

    number: int
    path: str
    module: nn.Module
    attributes: dict[tuple[str, str], Any]
    leaves: list[Any]
    spec: TreeSpec
    outputs: list[Any]
    out_spec: TreeSpec
    out_place: int
    reads: frozenset[tuple[str, str]]
    attention: range


class RepeatedLayers:
    """The layers of ``model`` that leave a marker in an export where one before them is alike."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self._model = model
        self._recorder = recorder
        self._traced: list[_Traced] = []
        self._calls: list[LayerCall] = []

    @contextlib.contextmanager
    def marked(self) -> Iterator[None]:
        """Let them leave markers, whose calls begin anew."""
        self._traced, self._calls = [], []
        layers = [(path, layer) for path, layer in _layers(self._model) if "forward" not in vars(layer)]
        for path, layer in layers:
            layer.forward = partial(self._call, path, layer)
        try:
            yield
        finally:
            for _, layer in layers:
                del layer.forward

    def put_in_place(self, graph_module: fx.GraphModule) -> None:
        """Put copies of the layers in the places of the markers.

        Raises:
            LostLayerError: the export did not keep the nodes that it had traced.
        """
        RepeatLayers(self._model, self._calls)(graph_module)

    def _call(self, path: str, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = partial(type(layer).forward, layer)
        leaves, spec = tree_flatten((args, kwargs))
        mode = get_proxy_mode()
        if mode is None or not all(isinstance(leaf, (Tensor, *_CONSTANTS)) for leaf in leaves):
            return forward(*args, **kwargs)
        for traced in self._traced:
            call = self._repetition(traced, path, layer, leaves, spec)
            if call is not None:
                return self._marker(traced, call, leaves)
        return self._trace(path, layer, forward, (args, kwargs), mode.tracer)

    def _repetition(
        self, traced: _Traced, path: str, layer: nn.Module, leaves: list[Any], spec: TreeSpec
    ) -> LayerCall | None:
        """The call of ``layer`` as a repetition of ``traced``, if it is one."""
        if spec != traced.spec:
            return None
        # Each tensor of the traced layer's stands for one of this one's.
        stands_for: dict[int, Tensor] = {}
        for old, new in zip(traced.leaves, leaves, strict=True):
            if isinstance(old, Tensor) and isinstance(new, Tensor):
                if stands_for.setdefault(id(old), new) is not new or looks(old) != looks(new):
                    return None
            elif not _same(old, new):
                return None
        places = {
            id(old): place
            for place, (old, new) in enumerate(zip(traced.leaves, leaves, strict=True))
            if isinstance(old, Tensor) and old is not new
        }
        if not places or not _alike(traced, layer):
            return None
        out = looks(traced.outputs[traced.out_place])
        if not any(looks(leaves[place]) == out for place in places.values()):
            return None
        shift = len(self._recorder.layers) - traced.attention.start
        return LayerCall(traced.number, (traced.path, path), tuple(places.values()), shift)

    def _marker(self, traced: _Traced, call: LayerCall, leaves: list[Any]) -> Any:
        """What the layer returns in the export, with its attention calls recorded."""
        recorder = self._recorder
        for number in traced.attention:
            layer, (mask, module) = recorder.layers[number], recorder.masks[number]
            place = moved(layer.module, *call.paths)
            if place != layer.module:
                layer, module = replace(layer, module=place), self._model.get_submodule(place)
            recorder.layers.append(layer)
            recorder.masks.append((mask, module))
        inputs = [leaves[place] for place in call.places]
        out = looks(traced.outputs[traced.out_place])
        like = next(place for place, tensor in enumerate(inputs) if looks(tensor) == out)
        self._calls.append(call)
        outputs = list(traced.outputs)
        outputs[traced.out_place] = repeated_layer(inputs, like, len(self._calls) - 1)
        return tree_unflatten(outputs, traced.out_spec)

    def _trace(self, path: str, layer: nn.Module, forward: Callable, given: tuple, tracer: Any) -> Any:
        """What ``forward`` returns, with the layer kept for those that are like it if it may be repeated."""
        args, kwargs = given
        leaves, spec = tree_flatten(given)
        recorder = self._recorder
        last = next(iter(reversed(tracer.graph.nodes)))
        first, masks, written = len(recorder.layers), len(recorder.masks), len(recorder.written_masks)
        attributes = _attributes(layer)
        # Told now, since a no-op makes its input a result of its own.
        ends = [(place, _node_of(leaf, tracer)) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        with _noting_reads(layer) as reads:
            result = forward(*args, **kwargs)
        outputs, out_spec = tree_flatten(result)
        tensors = [place for place, leaf in enumerate(outputs) if isinstance(leaf, Tensor)]
        if len(tensors) != 1 or not all(isinstance(leaf, (Tensor, *_CONSTANTS)) for leaf in outputs):
            return result
        made = list(takewhile(lambda node: node is not last, reversed(tracer.graph.nodes)))
        out = _node_of(outputs[tensors[0]], tracer)
        attention = range(first, len(recorder.layers))
        one_by_one = (len(recorder.masks), len(recorder.written_masks)) == (masks + len(attention), written)
        if (
            out not in made
            or first != masks
            or not one_by_one
            or not _same(attributes, _attributes(layer))
            or not _same((leaves, spec), tree_flatten(given))
            or any(node.op != "call_function" or node.target in _MARKERS for node in made)
            # A layer within this one is kept, and a node is of one layer.
            or any(MADE_BY in node.meta for node in made)
            # A size that follows from values is of this layer alone.
            or any(free_unbacked_symbols(node.meta.get("val")) for node in made)
        ):
            return result
        number = len(self._traced)
        for node in made:
            node.meta[MADE_BY] = number
        for place, node in [*ends, (OUTPUT, out)]:
            if node is not None:
                node.meta.setdefault(ENDS, set()).add((number, place))
        self._traced.append(
            _Traced(
                number,
                path,
                layer,
                attributes,
                leaves,
                spec,
                outputs,
                out_spec,
                tensors[0],
                frozenset(reads),
                attention,
            )
        )
        return result


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The members of the outermost lists of at least two modules, each once."""
    found: list[str] = []
    layers: dict[nn.Module, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not any(path.startswith(f"{p}.") for p in found):
            found.append(path)
            for name, layer in module.named_children():
                layers.setdefault(layer, f"{path}.{name}")
    return ((path, layer) for layer, path in layers.items())


def _node_of(value: Tensor, tracer: Any) -> fx.Node | None:
    slot: Any = get_proxy_slot(value, tracer, None)
    return None if slot is None else slot.proxy.node


def _attributes(layer: nn.Module) -> dict[tuple[str, str], Any]:
    """Everything that a layer holds now, by module and attribute; what is registered as ``_parameters.weight``."""
    found: dict[tuple[str, str], Any] = {}
    for name, module in layer.named_modules(remove_duplicate=False):
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                found.update({(name, f"{key}.{inner}"): one for inner, one in value.items()})
            else:
                found[name, key] = value
    # That of the layer itself is what tells here.
    found.pop(("", "forward"), None)
    return found


def _alike(traced: _Traced, layer: nn.Module) -> bool:
    """Whether ``layer`` computes what the traced one did of the same tensors."""
    attributes, others, reads = traced.attributes, _attributes(layer), traced.reads
    if type(traced.module) is not type(layer) or attributes.keys() != others.keys():
        return False
    for (name, key), value in attributes.items():
        another = others[name, key]
        if key.startswith("_modules.") and value is not None:
            if type(value) is not type(another) or "forward" in vars(value):
                return False
        elif key.startswith(("_parameters.", "_buffers.")) and value is not None:
            if another is None or looks(value) != looks(another):
                return False
        elif not _same(value, another):
            counts = COUNTS.search(key) and type(value) is type(another) is int
            if not counts or (name, key) in reads:
                return False
    return True


def _same(one: Any, other: Any) -> bool:
    """Whether two values say the same; tensors, modules and others that may be of a layer only if they are one."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, partial):
        return _same((one.func, one.args, one.keywords), (other.func, other.args, other.keywords))
    return isinstance(one, (*_CONSTANTS, set, TreeSpec, PreTrainedConfig)) and bool(one == other)


@contextlib.contextmanager
def _noting_reads(layer: nn.Module) -> Iterator[set[tuple[str, str]]]:
    """What counts layers and is read meanwhile, by module and attribute."""
    reads: set[tuple[str, str]] = set()
    hidden: dict[int, tuple[str, dict[str, int]]] = {}
    for name, module in layer.named_modules():
        counts = {key: value for key, value in vars(module).items() if type(value) is int and COUNTS.search(key)}
        hidden[id(vars(module))] = (name, counts)
        for key in counts:
            del vars(module)[key]
    inner = nn.Module.__getattr__

    # Modules ask for this only where they have no such attribute.
    def noted(module: nn.Module, key: str) -> Any:
        name, counts = hidden.get(id(vars(module)), ("", {}))
        if key not in counts:
            return inner(module, key)
        reads.add((name, key))
        return counts[key]

    nn.Module.__getattr__ = noted  # type: ignore[method-assign]
    try:
        yield reads
    finally:
        nn.Module.__getattr__ = inner  # type: ignore[method-assign]
        for module in layer.modules():
            vars(module).update(hidden[id(vars(module))][1])
