"""What a conversion would make of a model, told from its config alone: the model is built without data and captured."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from quantspec.cache.geometry import StateShape
from quantspec.capture import CapturedLayer, capture, converting, rope_context_of, with_latents
from quantspec.config import QuantSpecConfig
from quantspec.errors import UnsupportedModelError
from quantspec.passes import LinearReport, RemoveNoOps, Role, WeightFormat
from quantspec.passes.graph import clone

from .layer_kinds import shorten
from .recipes import recipes_for, run_passes, weight_passes


@dataclass(frozen=True)
class LinearSize:
    """One of the draft's weights: what becomes of it, and its bytes in the model and (if packed) in the draft."""

    report: LinearReport
    model_bytes: int
    draft_bytes: int


@dataclass(frozen=True)
class Structure:
    """A model's attention layers and linears as ``convert`` would see them.

    Attributes:
        model_type: transformers' class name.
        dtype: of the weights and of the recent buffer.
        layers: attention calls in forward order.
        linears: the draft's weights in forward order.
        weight_bytes: ``target`` (the model) and ``draft_int4`` (what the draft adds).
        states: what layers keep besides keys and values.
        max_len: the model's ``max_position_embeddings``, or None.
    """

    model_type: str
    dtype: torch.dtype
    layers: tuple[CapturedLayer, ...]
    linears: tuple[LinearSize, ...]
    weight_bytes: dict[str, int]
    states: tuple[StateShape, ...]
    max_len: int | None


def structure_of(
    config: PreTrainedConfig,
    options: QuantSpecConfig,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Structure:
    """The structure of the model that ``config`` describes, in ``dtype`` (the config's own if None).

    Nothing is downloaded or allocated. What only real weights show is not checked (``convert`` does): whether tokens
    mix outside attention, and whether keys survive quantization.

    Raises:
        UnsupportedModelError: the model cannot be captured.
        ValueError: not a causal decoder that transformers knows.
    """
    model = _built(config, dtype, trust_remote_code)
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    target = sum(tensor.nbytes for tensor in tensors.values())
    kinds = shorten(model)
    try:
        layers, linears, states = _captured(model, options)
    except UnsupportedModelError:
        if kinds is None:
            raise
        # The message names a layer of the whole model, and some layers need the others.
        kinds = None
    if kinds is None or any(layer.held is None for layer in layers):
        layers, linears, states = _captured(_built(config, dtype, trust_remote_code), options)
    else:
        layers = tuple(
            kinds.expand(layers, lambda layer: layer.module, lambda layer, name: replace(layer, module=name))
        )
        linears = tuple(kinds.expand(linears, lambda linear: linear.report.name, _renamed))
        states = tuple(
            replace(state, layer=number)
            for number, kind in enumerate(kinds.kinds)
            for state in states
            if state.layer == kind
        )
    return Structure(
        type(model).__name__,
        model.dtype,
        layers,
        linears,
        {"target": target, "draft_int4": sum(linear.draft_bytes for linear in linears)},
        states,
        getattr(config.get_text_config(), "max_position_embeddings", None),
    )


def _built(config: PreTrainedConfig, dtype: torch.dtype | None, trust_remote_code: bool) -> PreTrainedModel:
    """The model without data, with a configuration of its own."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            dtype=dtype or config.dtype or config.get_text_config().dtype or torch.float32,
            trust_remote_code=trust_remote_code,
        )


def _captured(
    model: PreTrainedModel, options: QuantSpecConfig
) -> tuple[tuple[CapturedLayer, ...], tuple[LinearSize, ...], tuple[StateShape, ...]]:
    """Attention layers, the draft's weights and the states of a model."""
    with converting():
        captured = capture(model, structure_only=True, rope_context=rope_context_of(model, options))
    captured = with_latents(captured, options, "cuda")
    weight_format = recipes_for(options)[Role.DRAFT].weight_format
    if weight_format is None:
        return captured.layers, (), captured.states
    quantize, _ = weight_passes(weight_format, options)
    quantize.plan(run_passes(clone(captured.graph_module), [RemoveNoOps()]))
    linears = tuple(_size(model, report, weight_format) for report in quantize.report)
    return captured.layers, linears, captured.states


def _renamed(linear: LinearSize, name: str) -> LinearSize:
    return replace(linear, report=replace(linear.report, name=name))


def _size(model: PreTrainedModel, report: LinearReport, weight_format: WeightFormat) -> LinearSize:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weight = parameters.get(f"{report.name}.weight", parameters.get(report.name))
    assert weight is not None, report.name
    if report.group_size is None:
        return LinearSize(report, weight.nbytes, 0)
    matrix = report.out_features, report.in_features
    shape = (*weight.shape[:-2], *matrix)
    return LinearSize(report, weight.nbytes, weight_format.nbytes(shape, report.group_size, weight.dtype))
