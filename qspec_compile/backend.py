"""``torch.compile(model, backend="quantspec", options={"role": "draft"})``: the weight passes as a dynamo backend.

A compiled model has no hierarchical cache of its own, so the backend runs the passes that need none: role ``"draft"``
gets INT4 weights (the same passes as ``convert``), role ``"target"`` keeps the weights; inductor compiles the result.

Dynamo runs one compiled graph for every model that its guards let pass, and hands it that model's parameters. So the
INT4 weights are inputs of the graph too, and are made anew for parameters that are not those of an earlier call.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import compile_fx

from quantspec.kernels.compiled_by import compiled_by_these_kernels
from quantspec.passes import INT4, LinearReport, Role
from quantspec.passes.graph import add_buffer, add_placeholder, get_tensor

from .config import ALIASES, QuantSpecConfig
from .pair.recipes import run_passes, weight_passes

_ROLES = (Role.TARGET, Role.DRAFT)
_DRAFT_OPTIONS = ("weight_group_size", "weight_quantizer", "quantize_lm_head")
_FROZEN = "frozen_"
_ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p")
# Models of one class whose INT4 weights a compiled graph keeps.
_MOST_MODELS = 8


def quantspec_backend(
    graph_module: fx.GraphModule,
    example_inputs: list[Tensor],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one dynamo graph; registered under the entry-point group ``torch_dynamo_backends``.

    Args:
        graph_module: dynamo's graph of one compiled function.
        example_inputs: one tensor per input of the graph, those that are parameters being the weights.
        options: ``role`` (``"draft"`` or ``"target"``, default ``"draft"``); for the draft also ``weight_group_size``,
            ``weight_quantizer`` and ``quantize_lm_head`` of :class:`quantspec.QuantSpecConfig`.

        mode: of Inductor; not supported.

    Returns:
        The compiled function, which takes the graph's inputs and returns its outputs. The draft's quantizes parameters
        that it has not met, or that have changed in place since.

    Raises:
        ValueError, TypeError: an unknown role, an option that the role has no use for, a mode, or a draft that is to
            be trained. ``torch.compile`` wraps it in ``torch._dynamo.exc.BackendCompilerFailed``, which the first call
            of the compiled model raises.
    """
    if mode is not None:
        raise ValueError(f"the backend has no use for mode={mode!r}: leave it out")
    settings = dict(options or {})
    role = settings.pop("role", Role.DRAFT.value)
    if role not in [choice.value for choice in _ROLES]:
        raise ValueError(f"role must be 'draft' or 'target', not {role!r}")
    config = QuantSpecConfig.from_options(None, settings)
    used = _DRAFT_OPTIONS if role == Role.DRAFT.value else ()
    for name in settings:
        if ALIASES.get(name, name) not in used:
            choices = ", ".join(("role", *used))
            raise ValueError(f"the backend has no use for option '{name}' in role '{role}'; it takes {choices}")
    if role == Role.DRAFT.value:
        _refuse_training(graph_module, example_inputs)
        return _Draft(graph_module, example_inputs, config)
    compiled: Callable[..., Any] = compile_fx(graph_module, example_inputs)  # type: ignore[assignment]
    return compiled


class _Draft:
    """A graph compiled with INT4 weights as inputs, and those of the models that called it latest."""

    def __init__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], config: QuantSpecConfig) -> None:
        for node in graph_module.graph.nodes:
            if "example_value" in node.meta:
                node.meta.setdefault("val", node.meta["example_value"])
        self._graph_module = graph_module
        self._config = config
        self._own = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
        self._places = [
            place
            for place, (node, value) in enumerate(zip(_placeholders(graph_module), example_inputs, strict=True))
            if isinstance(value, nn.Parameter) and node.users
        ]
        self._known: list[_Weights] = []
        parameters = [example_inputs[place] for place in self._places]
        lowered, report = self._lower(parameters)
        if not any(entry.group_size for entry in report):
            _warn_of_no_int4(report)
        weights = self._lift(lowered)
        self._remember(parameters, weights)
        # AOTAutograd would look for a source in user code of every tensor; the INT4 weights have none.
        lowered = fx.GraphModule(lowered, lowered.graph)
        lowered.meta.pop("dynamo_compile_id", None)
        fake_mode = detect_fake_mode(example_inputs)
        # Nor has a guard on one of their sizes, so none is a symbol.
        shown = weights if fake_mode is None else [fake_mode.from_tensor(x, static_shapes=True) for x in weights]
        with compiled_by_these_kernels():
            compiled = compile_fx(lowered, [*example_inputs, *shown])
        self._compiled: Callable[..., Any] = compiled  # type: ignore[assignment]

    def __call__(self, *inputs: Any) -> Any:
        parameters = [inputs[place] for place in self._places]
        found = next((known for known in self._known if known.are_of(parameters)), None)
        if found is None:
            weights = self._lift(self._lower(parameters)[0])
            self._remember(parameters, weights)
        else:
            weights = found.tensors
            # The latest used is the last.
            self._known = [*(known for known in self._known if known is not found), found]
        return self._compiled(*inputs, *weights)

    def _lower(self, parameters: Sequence[Tensor]) -> tuple[fx.GraphModule, Sequence[LinearReport]]:
        """The graph with INT4 weights as buffers, and what became of its linears; others read ``parameters``."""
        with torch.inference_mode(False), torch.no_grad():
            graph = fx.Graph()
            graph.output(graph.graph_copy(self._graph_module.graph, {}))
            graph_module = fx.GraphModule(self._graph_module, graph)
            placeholders = _placeholders(graph_module)
            for place, parameter in zip(self._places, parameters, strict=True):
                node = placeholders[place]
                # A pass quantizes what is an attribute.
                with graph.inserting_after(placeholders[-1]):
                    attribute = add_buffer(graph_module, f"{_FROZEN}{node.name}", parameter.detach())
                node.replace_all_uses_with(attribute)
            graph_module.recompile()
            quantize, passes = weight_passes(INT4, self._config)
            return run_passes(graph_module, passes), quantize.report

    def _lift(self, graph_module: fx.GraphModule) -> list[Tensor]:
        """Turn the buffers that the passes made into inputs after the others, and return them in that order."""
        graph = graph_module.graph
        inputs = {f"{_FROZEN}{node.name}": node for node in _placeholders(graph_module)}
        lifted: dict[str, fx.Node] = {}
        tensors = []
        for node in list(graph.nodes):
            name = str(node.target)
            if node.op != "get_attr" or name in self._own:
                continue
            if name not in inputs and name not in lifted:
                tensors.append(get_tensor(graph_module, node))
                lifted[name] = add_placeholder(graph, name, node.meta.get("val"))
            node.replace_all_uses_with(inputs.get(name) or lifted[name])
            graph.erase_node(node)
        graph_module.recompile()
        return tensors

    def _remember(self, parameters: Sequence[Tensor], tensors: list[Tensor]) -> None:
        def forget(_: weakref.ref) -> None:
            self._known = [known for known in self._known if known.are_alive()]

        known = _Weights(tuple(weakref.ref(parameter, forget) for parameter in parameters), _state(parameters), tensors)
        self._known = [*self._known[-_MOST_MODELS + 1 :], known]


@dataclass(frozen=True)
class _Weights:
    """INT4 weights and what they were made from, which they do not keep alive."""

    parameters: tuple[weakref.ref, ...]
    state: list[tuple[int, int]]
    tensors: list[Tensor]

    def are_alive(self) -> bool:
        return all(parameter() is not None for parameter in self.parameters)

    def are_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these parameters are the same objects, unchanged."""
        same = all(known() is parameter for known, parameter in zip(self.parameters, parameters, strict=True))
        return same and self.state == _state(parameters)


def _state(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Address of each parameter's data, and the number of changes in place; tensors of inference mode count none."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]


def _placeholders(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"]


def _refuse_training(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Raise ``ValueError`` where gradients are asked for, or a layer behaves as in training."""
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in example_inputs):
        raise ValueError(
            "the draft's INT4 weights have no gradients: call the compiled model under torch.no_grad() or "
            "torch.inference_mode()"
        )
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        try:
            arguments = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
        except (TypeError, ValueError):
            # A builtin without a signature; of those attention alone drops something, by its fifth argument.
            arguments = {**dict(zip(_ATTENTION_ARGUMENTS, node.args, strict=False)), **node.kwargs}
            arguments = arguments if node.target is nn.functional.scaled_dot_product_attention else {}
        if arguments.get("training") is True or arguments.get("dropout_p", 0) != 0:
            raise ValueError(
                f"the draft is for inference, and {node.target.__name__} ('{node.name}') runs as in training: call "
                "model.eval() before the compiled model"
            )


def _warn_of_no_int4(report: Sequence[LinearReport]) -> None:
    reasons = ", ".join(f"{entry.name} ({entry.note})" for entry in report)
    warnings.warn(
        f"role 'draft' gave no linear of this graph INT4 weights: {reasons or 'it has none'}. The last linear is taken "
        "for the language-model head; quantize_lm_head=True quantizes it too",
        stacklevel=2,
    )
