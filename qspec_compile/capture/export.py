"""Capture: one ``torch.export`` of a Hugging Face decoder into an FX graph with an attention marker per layer."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from quantspec.cache.geometry import StateShape
from quantspec.errors import UnsupportedModelError
from quantspec.locks import LockOfProcess
from quantspec.passes.absorb_latents import Latent
from quantspec.passes.called_modules import CallModules
from quantspec.passes.counted_positions import FollowPositionIds
from quantspec.passes.graph import find_calls, module_path
from quantspec.passes.out_of_place import OutOfPlaceError, WriteOutOfPlace
from quantspec.passes.pieces import Piece
from quantspec.passes.remove_no_ops import RemoveNoOps
from quantspec.passes.repeated_layers import LostLayerError
from quantspec.passes.state_steps import StateStepsError, StepStates
from quantspec.passes.written_attention import MarkWrittenAttention, WrittenAttentionError
from quantspec.passes.written_linears import MarkWrittenLinears

from .basic_causes import naming_basic_cause, sees_later_tokens
from .checks import check_head_dims, check_model, check_precision, chunked_layers, first_position
from .held_state import held_states
from .interfaces import (
    NOT_CAUSAL,
    CapturedLayer,
    MaskReadError,
    Recorder,
    RefuseConvolutions,
    StateError,
    capture_interfaces,
)
from .opaque import DataDependentError, OpaqueModules, telling_data_dependence
from .repeated import RepeatedLayers
from .rope import follows_length, rope_at
from .state import WithState, state_shapes

_LOGGER = logging.getLogger(__name__)

# Tokens of a text in which a model that chooses blocks of tokens has some to choose from.
_TEXT_OF_CHOICE = 130

_CONVERSION = LockOfProcess()
_HERE = threading.local()

# An exported program, and its graph with the model's own tensors.
_Export = tuple[torch.export.ExportedProgram, fx.GraphModule]


@dataclass(frozen=True)
class Capture:
    """The captured decoder.

    Attributes:
        graph_module: ``graph_module(input_ids, position_ids) -> logits`` with ``(B, T)`` int64 inputs and ``(B, T, V)``
            logits in the model's dtype, both B and T dynamic; its parameters are the model's own tensors.
        layers: its attention calls, in forward order.
        states: what layers keep besides keys and values. The graph then takes further inputs, ``(B, S, ...)`` for each:
            the state before the tokens, and room for that after each of them, which it writes.
        latents: of which latents the heads of attention calls are made that the graph attends to, by their number.
        pieces: what the graph holds of each parameter that is split over ranks, by its name in the graph; else empty.
        whole: names of the linears that every one of several ranks computes.
    """

    graph_module: fx.GraphModule
    layers: tuple[CapturedLayer, ...]
    states: tuple[StateShape, ...] = ()
    latents: Mapping[int, Latent] = field(default_factory=dict)
    pieces: Mapping[str, Piece] = field(default_factory=dict)
    whole: Sequence[str] = ()


class _Logits(nn.Module):
    """The decoder as a function of token ids and positions alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        # An explicit mask keeps transformers from reading packed sequences out of the positions.
        mask = torch.ones_like(input_ids)
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
        with telling_data_dependence():
            return self.model(**inputs, use_cache=False).logits


def check_can_convert() -> None:
    """Refuse what would wait for this thread itself, which is :func:`converting`.

    Raises:
        RuntimeError: it is.
    """
    if getattr(_HERE, "converts", False):
        raise RuntimeError("this thread converts or tunes a model: convert, load or save another one after that")


@contextlib.contextmanager
def converting() -> Iterator[None]:
    """Let one thread at a time convert or tune, since registries are the process's, and none under autocast.

    Raises:
        RuntimeError: this thread does so already.
    """
    check_can_convert()
    with _CONVERSION(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        _HERE.converts = True
        try:
            yield
        finally:
            _HERE.converts = False


def capture(model: PreTrainedModel, structure_only: bool = False, rope_context: int | None = None) -> Capture:
    """Export ``model`` once, with dynamic batch and token axes.

    Args:
        model: a loaded decoder with a language-model head, on one device, in float32, float16 or bfloat16. It is
            left as it was.
        structure_only: the weights may be on the meta device, for a graph that is looked at and not run.
        rope_context: the length of text whose frequencies a RoPE that follows the length has; needed for such a model.

    Returns:
        The graph, with one ``quantspec::attention`` marker per attention call.

    Raises:
        TypeError: not a transformers model.
        UnsupportedModelError: it cannot be captured, or attends outside transformers' attention interface.
    """
    check_model(model, structure_only)
    _LOGGER.info("capturing the graph")
    with contextlib.nullcontext() if structure_only else naming_basic_cause(model):
        return _capture(model, structure_only, rope_context)


def _capture(model: PreTrainedModel, structure_only: bool, rope_context: int | None) -> Capture:
    positions = torch.arange(7, device=model.device).expand(2, 7).clone()
    follow_length = set(filter(follows_length, model.modules()))
    held_rope = rope_at(model, rope_context)
    # A RoPE that follows the length is refused for that.
    opaque = OpaqueModules(model, never=follow_length)
    with held_rope, capture_interfaces(model) as recorder, torch.no_grad():
        try:
            states = state_shapes(model)
            program, graph_module = _export_with(opaque, recorder, lambda: _export(model, states, recorder))
        except UnsupportedModelError:
            raise
        except Exception as error:
            module = recorder.module_of(error)
            if isinstance(error, MaskReadError):
                _raise_reason_of_reading(model, recorder)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if not isinstance(error, MaskReadError | StateError | DataDependentError):
                reason = f"torch.export cannot capture it: {reason}"
            if module in follow_length:
                reason = "its RoPE reads the length of a text by itself, besides what transformers does for it"
            if "Constraints violated" in reason and ".size()[1]" in reason:
                reason = "its forward fixes the number of tokens, as a loop over tokens does (recurrent state)"
            elif "Constraints violated" in reason:
                reason = "its forward fixes the number of sequences of a batch"
            raise recorder.unsupported(model if module is None else module, reason) from error
        layers, masks, first = tuple(recorder.layers), recorder.masks.copy(), 0
        if not structure_only:
            first = first_position(model, recorder, positions)
            # Rules that hold tensors can be asked only where those are real.
            masks = recorder.masks[len(layers) : 2 * len(layers)]
        if not layers:
            layers = _written_layers(model, graph_module, recorder.max_window)
        calls = opaque.calls
        with opaque.marked():
            held = held_states(model, [layer.window for layer in layers])
    if recorder.not_causal is not None and not structure_only and sees_later_tokens(model):
        raise recorder.unsupported(recorder.not_causal, NOT_CAUSAL)
    layers = tuple(replace(layer, held=state) for layer, state in zip(layers, held, strict=True))
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} computes attention by itself instead of through transformers' attention "
            "interface, so its key/value cache cannot be replaced"
        )
    check_precision(model, program, recorder)
    check_head_dims(layers, model.device, model.dtype)
    chunked = chunked_layers(recorder, masks, model.device)
    if states:
        try:
            StepStates(len(states))(graph_module)
        except StateStepsError as error:
            raise UnsupportedModelError(f"cannot convert {type(model).__name__}: {error}") from error
    else:
        RemoveNoOps()(graph_module)
        MarkWrittenLinears()(graph_module)
        FollowPositionIds()(graph_module)
    if first:
        _count_from(graph_module, first)
    CallModules(calls)(graph_module)
    for marker in find_calls(graph_module.graph, torch.ops.quantspec.attention.default):
        if marker.args[3] in chunked:
            marker.update_arg(5, -marker.args[5])
    graph_module.recompile()
    # A prefill by the model's own forward stores what each call attends to.
    shared = {} if states else _shared(graph_module)
    layers = tuple(replace(layer, reads=shared.get(number)) for number, layer in enumerate(layers))
    return Capture(
        graph_module,
        tuple(
            replace(layer, window=0, chunk=layer.window) if number in chunked else layer
            for number, layer in enumerate(layers)
        ),
        states,
    )


def _shared(graph_module: fx.GraphModule) -> dict[int, int]:
    """Attention calls whose keys, values and window are those of an earlier one, and the number of that."""
    first: dict[Any, int] = {}
    shared = {}
    for marker in find_calls(graph_module.graph, torch.ops.quantspec.attention.default):
        _, key, value, number, _, window, *_ = cast(Any, marker.args)
        home = first.setdefault((key, value, window), number)
        if home != number:
            shared[number] = home
    return shared


def _count_from(graph_module: fx.GraphModule, first: int) -> None:
    """Let the graph's positions be those of texts whose first is ``first``."""
    graph = graph_module.graph
    positions = graph.find_nodes(op="placeholder")[1]
    with graph.inserting_after(positions):
        shifted = graph.call_function(torch.ops.aten.add.Tensor, (positions, first))
    shifted.meta.update(positions.meta)
    positions.replace_all_uses_with(shifted, delete_user_cb=lambda user: user is not shifted)


def _written_layers(model: PreTrainedModel, graph_module: fx.GraphModule, max_window: int) -> tuple[CapturedLayer, ...]:
    """Mark what ``model`` attends by itself, and tell of it as of calls of the interface."""
    RemoveNoOps()(graph_module)
    try:
        MarkWrittenAttention(max_window)(graph_module)
    except WrittenAttentionError as error:
        raise UnsupportedModelError(f"cannot convert {type(model).__name__}: {error}") from error
    layers = []
    for marker in find_calls(graph_module.graph, torch.ops.quantspec.attention.default):
        arguments: Any = marker.args
        (_, heads, _, key_dim), (_, kv_heads, _, value_dim) = (arguments[at].meta["val"].shape for at in (0, 2))
        window = arguments[5]
        layers.append(CapturedLayer(module_path(marker), heads, kv_heads, key_dim, value_dim, window, 0.0, False))
    return tuple(layers)


def _export_with(opaque: OpaqueModules, recorder: Recorder, export: Callable[[], _Export]) -> _Export:
    """``export``, again and again, with one more kind of module called as it is where that keeps it from going on."""
    while True:
        recorder.forget()
        try:
            with opaque.marked():
                return export()
        except Exception as error:
            if not opaque.take(recorder.module_of(error), error):
                raise


def _export(model: PreTrainedModel, states: tuple[StateShape, ...], recorder: Recorder) -> _Export:
    return _export_token(model, states) if states else _export_tokens(model, recorder)


def _raise_reason_of_reading(model: PreTrainedModel, recorder: Recorder) -> None:
    """Raise ``UnsupportedModelError`` if a mask that can be read shows what a model with states reads it for."""
    recorder.forget()
    recorder.writes_masks = True
    try:
        states = state_shapes(model, _TEXT_OF_CHOICE)
        _export(model, states, recorder)
    except UnsupportedModelError:
        raise
    except Exception as error:
        _LOGGER.debug("what the mask is read for is not known: %s", error)


def _export_tokens(model: PreTrainedModel, recorder: Recorder) -> _Export:
    """``model`` as a function of the tokens of each sequence; with masks as tensors where it attends by itself."""
    ids = torch.zeros(2, 7, dtype=torch.long, device=model.device)
    inputs = (ids, torch.arange(7, device=model.device).expand(2, 7).clone())
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with RefuseConvolutions():
        try:
            return _export_repeating(model, inputs, axes, recorder)
        except MaskReadError:
            recorder.forget()
            recorder.writes_masks = True
            return _export_repeating(model, inputs, axes, recorder)


def _export_repeating(model: PreTrainedModel, inputs: tuple[Tensor, ...], axes: dict, recorder: Recorder) -> _Export:
    """The export of what ``inputs`` give, with layers that are alike traced once."""

    def export() -> _Export:
        program = torch.export.export(_Logits(model), inputs, dynamic_shapes=(axes, axes), strict=False)
        return program, program.module(check_guards=False)

    repeated = RepeatedLayers(model, recorder)
    with repeated.marked():
        program, graph_module = export()
    try:
        repeated.put_in_place(graph_module)
    except LostLayerError as error:
        _LOGGER.debug("every layer is traced, since torch.export does not keep the nodes of %s", error)
        recorder.forget()
        return export()
    return program, graph_module


def _export_token(model: PreTrainedModel, states: tuple[StateShape, ...]) -> _Export:
    """``model`` as a function of one token of each sequence and of the states before it, without side effects."""
    ids = torch.zeros(2, 1, dtype=torch.long, device=model.device)
    before = tuple(torch.zeros(2, *state.shape, dtype=state.dtype, device=model.device) for state in states)
    batch = {0: torch.export.Dim.DYNAMIC}
    inputs = (ids, torch.full_like(ids, 7), *before)
    shapes = (batch, batch, tuple(batch for _ in before))
    program = torch.export.export(WithState(model, states), inputs, dynamic_shapes=shapes, strict=False)
    graph_module = program.module(check_guards=False)
    try:
        WriteOutOfPlace()(graph_module)
    except OutOfPlaceError as error:
        _LOGGER.debug("the graph is traced again, for the writes of %s", error)
        program = program.run_decompositions({})
        return program, program.module(check_guards=False)
    RemoveNoOps()(graph_module)
    return program, graph_module
