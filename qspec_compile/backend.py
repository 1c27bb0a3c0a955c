"""``torch.compile(model, backend="quantspec", options={"role": "draft"})``: the weight passes as a dynamo backend.

A compiled model has no hierarchical cache of its own, so the backend runs the passes that need none: role ``"draft"``
gets INT4 weights (the same passes as ``convert``), role ``"target"`` keeps the weights; inductor compiles the result.
Weights are read when the graph is compiled: load them first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx

from quantspec.passes import Role
from quantspec.passes.graph import add_buffer

from .config import QuantSpecConfig
from .pair.recipes import draft_weight_passes, run_passes

_ROLES = (Role.TARGET, Role.DRAFT)


def quantspec_backend(
    graph_module: fx.GraphModule, example_inputs: list[Tensor], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile one dynamo graph; registered under the entry-point group ``torch_dynamo_backends``.

    Args:
        graph_module: dynamo's graph of one compiled function.
        example_inputs: one tensor per input of the graph, those that are parameters being the weights.
        options: ``role`` (``"draft"`` or ``"target"``, default ``"draft"``) and any field of
            :class:`quantspec.QuantSpecConfig` that concerns weights.

    Returns:
        The compiled function, which takes the graph's inputs and returns its outputs.

    Raises:
        ValueError, TypeError: an unknown role or option. ``torch.compile`` wraps it in
            ``torch._dynamo.exc.BackendCompilerFailed``, which the first call of the compiled model raises.
    """
    settings = dict(options or {})
    role = settings.pop("role", Role.DRAFT.value)
    if role not in [choice.value for choice in _ROLES]:
        raise ValueError(f"role must be 'draft' or 'target', not {role!r}")
    config = QuantSpecConfig.from_options(None, settings)
    if role == Role.DRAFT.value:
        for node in graph_module.graph.nodes:
            if "example_value" in node.meta:
                node.meta.setdefault("val", node.meta["example_value"])
        _freeze_parameters(graph_module, example_inputs)
        graph_module = run_passes(graph_module, draft_weight_passes(config)[1])
        # AOTAutograd would look for a source in user code of every tensor; the INT4 weights have none.
        graph_module = fx.GraphModule(graph_module, graph_module.graph)
        graph_module.meta.pop("dynamo_compile_id", None)
    compiled: Callable[..., Any] = compile_fx(graph_module, example_inputs)  # type: ignore[assignment]
    return compiled


def _freeze_parameters(graph_module: fx.GraphModule, example_inputs: list[Tensor]) -> None:
    """Let nodes read parameters as attributes: dynamo passes them in as inputs, which a pass cannot quantize."""
    graph = graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, example_inputs, strict=True):
        if isinstance(value, nn.Parameter) and node.users:
            with graph.inserting_after(placeholders[-1]):
                attribute = add_buffer(graph_module, f"frozen_{node.name}", value.detach())
            node.replace_all_uses_with(attribute)
    graph_module.recompile()
