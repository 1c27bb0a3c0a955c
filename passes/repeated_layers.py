"""Layers that an export left out, since they are like one that it traced, put in their places."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from quantspec.kernels import repeated_layer

from .graph import WRAPPER, find_calls, finish, get_tensor, own_name

# Metadata of nodes: the traced layer that made a node, and of which traced layers it is what place, or the output.
MADE_BY = "quantspec_traced_layer"
ENDS = "quantspec_ends_of_layers"
OUTPUT = -1


class LostLayerError(Exception):
    """Nodes of a traced layer are not those that they were when it was traced."""


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer that is like a traced one.

    Attributes:
        traced: number of the traced layer.
        paths: dotted names of the traced layer and of this one in the model.
        places: the arguments of the traced layer that the marker's inputs stand for.
        attention: what to add to the numbers of attention calls.
    """

    traced: int
    paths: tuple[str, str]
    places: tuple[int, ...]
    attention: int


def moved(path: str, old: str, new: str) -> str:
    """What ``path`` in module ``old`` is in module ``new``; any other path is as it was."""
    return new + path[len(old) :] if path == old or path.startswith(f"{old}.") else path


class RepeatLayers(PassBase):
    """Matches ``quantspec::repeated_layer(inputs, like, number)``, writes a copy of the nodes of the traced layer.

    Copies read the tensors of their own layer, and the numbers of their attention calls follow on. Requires the
    metadata ``MADE_BY`` and ``ENDS``. Ensures that no such marker is left, nor that metadata.
    """

    def __init__(self, model: nn.Module, calls: Sequence[LayerCall]) -> None:
        """``calls`` of layers of ``model``, by their numbers."""
        super().__init__()
        self.model = model
        self.calls = calls

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Raises :class:`LostLayerError` where nodes have lost their metadata."""
        graph = graph_module.graph
        bodies: dict[int, list[fx.Node]] = defaultdict(list)
        ends: dict[tuple[int, int], fx.Node] = {}
        for node in graph.nodes:
            made_by = node.meta.pop(MADE_BY, None)
            if made_by is not None:
                bodies[made_by].append(node)
            ends.update(dict.fromkeys(node.meta.pop(ENDS, ()), node))
        markers = list(find_calls(graph, repeated_layer._opoverload))
        for marker in markers:
            call = self.calls[marker.args[2]]  # type: ignore[index]
            edges = {place: node for (traced, place), node in ends.items() if traced == call.traced}
            if not edges.keys() >= {*call.places, OUTPUT}:
                raise LostLayerError(call.paths[0])
            # What both layers are given stays.
            given = {node: node for place, node in edges.items() if place != OUTPUT}
            given |= zip([edges[place] for place in call.places], marker.args[0], strict=True)  # type: ignore[arg-type]
            with graph.inserting_before(marker):
                copies = self._copy(graph_module, bodies[call.traced], given, call)
            marker.replace_all_uses_with(copies[edges[OUTPUT]])
            graph.erase_node(marker)
        if markers:
            finish(graph_module)
        return PassResult(graph_module, bool(markers))

    def _copy(
        self, graph_module: fx.GraphModule, body: Sequence[fx.Node], given: dict[fx.Node, fx.Node], call: LayerCall
    ) -> dict[fx.Node, fx.Node]:
        """Copies of ``body`` at the current insertion point, by the nodes that they are of."""
        made = dict(given)
        tensors = self._own_tensors(call)

        def counterpart(node: fx.Node) -> fx.Node:
            if node not in made:
                if node.op == "get_attr":
                    made[node] = _own_tensor(graph_module, node, tensors)
                elif isinstance(node.meta.get("val"), Tensor):
                    raise LostLayerError(call.paths[0])
                else:
                    # Sizes are those of the text.
                    made[node] = node
            return made[node]

        for node in body:
            copy = graph_module.graph.node_copy(node, counterpart)
            stack = node.meta.get("nn_module_stack", {})
            copy.meta["nn_module_stack"] = {
                key: (WRAPPER + moved(own_name(path), *call.paths) if path.startswith(WRAPPER) else path, kind)
                for key, (path, kind) in stack.items()
            }
            if copy.target is torch.ops.quantspec.attention.default:
                copy.update_arg(3, copy.args[3] + call.attention)  # type: ignore[operator]
            made[node] = copy
        return made

    def _own_tensors(self, call: LayerCall) -> dict[int, tuple[str, Tensor]]:
        """The layer's tensors and what the graph calls them, by the ids of those of the traced one."""
        found: dict[int, tuple[str, Tensor]] = {}
        traced, own = (dict(_tensors(self.model.get_submodule(path))) for path in call.paths)
        for name, tensor in traced.items():
            named = (f"{WRAPPER}{call.paths[1]}.{name}", own[name])
            if found.setdefault(id(tensor), named)[1] is not own[name]:
                raise LostLayerError(call.paths[1])
        return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))


def _own_tensor(graph_module: fx.GraphModule, node: fx.Node, tensors: dict[int, tuple[str, Tensor]]) -> fx.Node:
    """What reads the layer's own tensor in place of that of the traced one, or ``node`` where both are one."""
    value = get_tensor(graph_module, node)
    name, tensor = tensors.get(id(value), ("", value))
    if tensor is value:
        return node
    read = graph_module.graph.get_attr(name)
    read.meta.update(node.meta)
    return read
