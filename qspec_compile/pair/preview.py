"""What a conversion would make of a model, told from its config alone: the model is built without data and captured."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch.nn import Parameter
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from quantspec.cache.geometry import StateShape
from quantspec.capture import CapturedLayer, capture, converting, rope_context_of, with_latents
from quantspec.config import QuantSpecConfig
from quantspec.errors import UnsupportedModelError
from quantspec.passes import LinearReport, RemoveNoOps, Role, WeightFormat
from quantspec.passes.graph import clone
from quantspec.passes.pieces import Piece
from quantspec.passes.shard_linears import Place

from .layer_kinds import shorten
from .pair import whole_bytes
from .recipes import recipes_for, run_passes, weight_passes
from .split import pieces_by_id, split_capture


@dataclass(frozen=True)
class LinearSize:
    """One of the draft's weights: what becomes of it, and its bytes in the model and (if packed) in the draft."""

    report: LinearReport
    model_bytes: int
    draft_bytes: int


@dataclass(frozen=True)
class Structure:
    """A model's attention layers and linears as ``convert`` would see them, or of it what one of several ranks has.

    Attributes:
        model_type: transformers' class name.
        dtype: of the weights and of the recent buffer.
        layers: attention calls in forward order.
        linears: the draft's weights in forward order.
        weight_bytes: ``target`` (the model) and ``draft_int4`` (what the draft adds).
        states: what layers keep besides keys and values.
        max_len: the model's ``max_position_embeddings``, or None.
        whole: bytes of what every rank has whole and computes, by the name of the module or parameter.
    """

    model_type: str
    dtype: torch.dtype
    layers: tuple[CapturedLayer, ...]
    linears: tuple[LinearSize, ...]
    weight_bytes: dict[str, int]
    states: tuple[StateShape, ...]
    max_len: int | None
    whole: dict[str, int] = field(default_factory=dict)


class _Size(NamedTuple):
    """Bytes of a part of the model."""

    name: str
    bytes: int


class _Found(NamedTuple):
    """What a capture tells of a model that may be shortened; ``saved`` is what a rank does without."""

    layers: Sequence[CapturedLayer]
    linears: Sequence[LinearSize]
    states: Sequence[StateShape]
    whole: Sequence[_Size] = ()
    saved: Sequence[_Size] = ()


def structure_of(
    config: PreTrainedConfig,
    options: QuantSpecConfig,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    num_ranks: int = 1,
) -> Structure:
    """The structure of the model that ``config`` describes, in ``dtype`` (the config's own if None).

    With ``num_ranks`` above 1 it is of rank 0 of so many; the others have as much. Nothing is downloaded or allocated.
    What only real weights show is not checked (``convert`` does): whether tokens mix outside attention, and whether
    keys survive quantization.

    Raises:
        UnsupportedModelError: the model cannot be captured, or split.
        ValueError: not a causal decoder that transformers knows.
    """
    model = _built(config, dtype, trust_remote_code)
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    target = sum(tensor.nbytes for tensor in tensors.values())
    kinds = shorten(model)
    try:
        found = _captured(model, options, num_ranks)
    except UnsupportedModelError:
        if kinds is None:
            raise
        # The message names a layer of the whole model, and some layers need the others.
        kinds = None
    if kinds is None or any(layer.held is None for layer in found.layers):
        found = _captured(_built(config, dtype, trust_remote_code), options, num_ranks)
    else:
        states = [
            replace(state, layer=number)
            for number, kind in enumerate(kinds.kinds)
            for state in found.states
            if state.layer == kind
        ]
        sizes = (kinds.expand(of, lambda size: size.name, _named) for of in (found.whole, found.saved))
        found = _Found(
            list(kinds.expand(found.layers, lambda layer: layer.module, lambda one, name: replace(one, module=name))),
            list(kinds.expand(found.linears, lambda linear: linear.report.name, _renamed)),
            states,
            *map(list, sizes),
        )
    return Structure(
        type(model).__name__,
        model.dtype,
        tuple(found.layers),
        tuple(found.linears),
        {
            "target": target - sum(size.bytes for size in found.saved),
            "draft_int4": sum(linear.draft_bytes for linear in found.linears),
        },
        tuple(found.states),
        getattr(config.get_text_config(), "max_position_embeddings", None),
        {size.name: size.bytes for size in found.whole},
    )


def _built(config: PreTrainedConfig, dtype: torch.dtype | None, trust_remote_code: bool) -> PreTrainedModel:
    """The model without data, with a configuration of its own."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            dtype=dtype or config.dtype or config.get_text_config().dtype or torch.float32,
            trust_remote_code=trust_remote_code,
        )


def _captured(model: PreTrainedModel, options: QuantSpecConfig, num_ranks: int) -> _Found:
    """Attention layers, the draft's weights and the states of a model, or of the part of rank 0."""
    with converting():
        captured = capture(model, structure_only=True, rope_context=rope_context_of(model, options))
        if num_ranks > 1:
            captured = split_capture(captured, model, Place(0, num_ranks, ""))
    captured = with_latents(captured, options, "cuda")
    pieces, parameters = pieces_by_id(model, captured), dict(model.named_parameters())
    whole = [_Size(name, size) for name, size in whole_bytes(model, captured.whole).items()]
    sizes = (whole, _saved(parameters, pieces))
    weight_format = recipes_for(options)[Role.DRAFT].weight_format
    if weight_format is None:
        return _Found(captured.layers, (), captured.states, *sizes)
    quantize, _ = weight_passes(weight_format, options)
    quantize.plan(run_passes(clone(captured.graph_module), [RemoveNoOps()]))
    linears = [_size(model, pieces, report, weight_format) for report in quantize.report]
    return _Found(captured.layers, linears, captured.states, *sizes)


def _saved(parameters: Mapping[str, Parameter], pieces: Mapping[int, Piece]) -> list[_Size]:
    """Of each parameter that is split the bytes that a rank does without."""
    split = ((name, p, pieces[id(p)]) for name, p in parameters.items() if id(p) in pieces)
    return [_Size(name, p.nbytes - piece.nbytes_of(p)) for name, p, piece in split]


def _named(size: _Size, name: str) -> _Size:
    return size._replace(name=name)


def _renamed(linear: LinearSize, name: str) -> LinearSize:
    return replace(linear, report=replace(linear.report, name=name))


def _size(
    model: PreTrainedModel, pieces: Mapping[int, Piece], report: LinearReport, weight_format: WeightFormat
) -> LinearSize:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weight = parameters.get(f"{report.name}.weight", parameters.get(report.name))
    assert weight is not None, report.name
    piece = pieces.get(id(weight))
    num_bytes = weight.nbytes if piece is None else piece.nbytes_of(weight)
    if report.group_size is None:
        return LinearSize(report, num_bytes, 0)
    matrix = report.out_features, report.in_features
    shape = (*weight.shape[:-2], *matrix)
    return LinearSize(report, num_bytes, weight_format.nbytes(shape, report.group_size, weight.dtype))
