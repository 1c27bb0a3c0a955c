"""Modules of a model that run as they are, where no export follows their forward."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.utils._pytree import TreeSpec, tree_unflatten

from quantspec.kernels import called_module

from .graph import ORIGIN_KEYS, find_calls, finish


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module.

    Attributes:
        path: dotted name of the module in the model.
        module: the module itself.
        leaves: its arguments, flattened by ``spec``; None in the place of each tensor.
        tensors: the places of tensors.
        spec: puts positional and keyword arguments together again.
        like: which of the tensors has the shape and dtype of the output.
    """

    path: str
    module: nn.Module
    leaves: tuple[Any, ...]
    tensors: tuple[int, ...]
    spec: TreeSpec
    like: int


class CalledModule(nn.Module):
    """Calls a module of the model in full precision: a copy in eval mode around the same tensors."""

    def __init__(self, call: ModuleCall) -> None:
        super().__init__()
        shared = {id(tensor): tensor for tensor in chain(call.module.parameters(), call.module.buffers())}
        self.module = copy.deepcopy(call.module, shared).eval()
        self.path = call.path
        self._leaves, self._tensors, self._spec = call.leaves, call.tensors, call.spec
        self._like = call.like

    def forward(self, *tensors: Tensor) -> Tensor:
        """What the module makes of ``tensors``, in the shape and dtype of one of them.

        Raises:
            ValueError: its output is of another shape or dtype.
        """
        leaves = list(self._leaves)
        for place, tensor in zip(self._tensors, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        out = self.module(*args, **kwargs)
        like = tensors[self._like]
        if not isinstance(out, Tensor) or (out.shape, out.dtype) != (like.shape, like.dtype):
            raise ValueError("what it returns is not of the shape and dtype of what it is given")
        return out


class CallModules(PassBase):
    """Matches ``quantspec::called_module(inputs, like, number)``, writes a call of that :class:`CalledModule`.

    Requires nothing. Ensures that no such marker is left.
    """

    def __init__(self, calls: Sequence[ModuleCall]) -> None:
        """``calls``: by their numbers."""
        super().__init__()
        self.calls = calls

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        markers = list(find_calls(graph, called_module._opoverload))
        for marker in markers:
            inputs, _, number = marker.args
            name = f"called_module_{number}"
            graph_module.add_module(name, CalledModule(self.calls[number]))  # type: ignore[index]
            with graph.inserting_before(marker):
                made = graph.call_module(name, tuple(inputs))  # type: ignore[arg-type]
            made.meta.update({key: marker.meta[key] for key in (*ORIGIN_KEYS, "val") if key in marker.meta})
            marker.replace_all_uses_with(made)
        if markers:
            finish(graph_module)
        return PassResult(graph_module, bool(markers))


def called_modules(graph_module: fx.GraphModule) -> list[CalledModule]:
    """The modules that a graph calls as they are, in forward order."""
    called = [graph_module.get_submodule(str(node.target)) for node in graph_module.graph.find_nodes(op="call_module")]
    return [module for module in called if isinstance(module, CalledModule)]
