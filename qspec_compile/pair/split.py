"""One rank's part of a model: captured whole without its weights, split, and only then given what it holds of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantspec.capture import Capture, capture, converting, rope_context_of
from quantspec.capture.kept import kept_or_captured
from quantspec.capture.stored import CannotStore, from_json, to_json
from quantspec.config import QuantSpecConfig
from quantspec.errors import UnsupportedModelError
from quantspec.passes import WeightSource
from quantspec.passes.called_modules import called_modules
from quantspec.passes.graph import clone, find_calls, get_tensor, own_name
from quantspec.passes.pieces import Piece
from quantspec.passes.shard_linears import CannotShardError, Place, ShardLinears
from quantspec.ranks import Seat

from .pair import Pair

Read = Callable[[str, Piece | None], Tensor]
"""Looks up a parameter of the model by name, or a piece of it, in memory of its own."""
SplitSource = Callable[[Capture], WeightSource]
StoredCapture = tuple[Mapping[str, Any], Mapping[str, Tensor]]
"""A capture as :func:`quantspec.capture.stored.to_json` describes it."""


def hollow(model: PreTrainedModel, device: torch.device) -> Read:
    """Move ``model`` to ``device`` without its parameters, which are single zeros, repeated, from then on.

    Returns:
        What reads the parameters that it had.
    """
    whole = dict(model.named_parameters(remove_duplicate=False))
    made: dict[int, nn.Parameter] = {}
    for module, name, parameter in _parameters(model):
        if id(parameter) not in made:
            zeros = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
            made[id(parameter)] = nn.Parameter(zeros, requires_grad=False)
        module._parameters[name] = made[id(parameter)]
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)

    def read(name: str, piece: Piece | None) -> Tensor:
        tensor = whole[name].detach()
        return (tensor if piece is None else piece.of(tensor)).clone(memory_format=torch.contiguous_format)

    return read


def plan(model: PreTrainedModel, config: QuantSpecConfig, world: int) -> StoredCapture | None:
    """What ``world`` ranks need to know of ``model`` to split it, once it is known that they can.

    Args:
        model: may be hollow.
        config: the options.
        world: how many ranks there shall be; none is needed yet.

    Returns:
        What was captured, for all of them; None if each has to capture it by itself.

    Raises:
        TypeError, UnsupportedModelError: it cannot be captured, or split over so many; names the node or module.
    """
    with converting():
        captured = kept_or_captured(model, rope_context_of(model, config), capture)
        pieces_by_id(model, split_capture(captured, model, Place(0, world, "")))
        with contextlib.suppress(CannotStore):
            graph, constants = to_json(captured, model)
            return graph, {name: constant.cpu() for name, constant in constants.items()}
    return None


def split_capture(captured: Capture, model: PreTrainedModel, place: Place) -> Capture:
    """The part of ``captured`` that one rank computes; parameters in pieces, none of them the model's.

    Raises:
        UnsupportedModelError: the model cannot be split over so many ranks; names the node or module.
    """
    called = called_modules(captured.graph_module)
    if called:
        raise UnsupportedModelError(
            f"cannot split {type(model).__name__} over ranks: its '{called[0].path}' runs as it is, whole; use one rank"
        )
    shard = ShardLinears(place, getattr(model, "_tp_plan", None))
    graph_module = clone(captured.graph_module)
    try:
        shard(graph_module)
    except CannotShardError as error:
        raise UnsupportedModelError(str(error)) from error
    markers = find_calls(graph_module.graph, torch.ops.quantspec.attention.default)
    layers = []
    for layer, marker in zip(captured.layers, markers, strict=True):
        query, key = cast(Any, marker.args)[:2]
        heads, kv_heads = (states.meta["val"].shape[1] for states in (query, key))
        layers.append(replace(layer, query_heads=heads, kv_heads=kv_heads))
    return replace(captured, graph_module=graph_module, layers=tuple(layers), pieces=shard.pieces, whole=shard.whole)


def fill(model: PreTrainedModel, captured: Capture, read: Read, device: torch.device) -> None:
    """Give ``model`` and the graph of its ``captured`` part the same tensors: this rank's piece of each parameter."""
    shared = pieces_by_id(model, captured)
    made: dict[int, nn.Parameter] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module, leaf, parameter in _parameters(model):
        key = id(parameter)
        if key not in made:
            tensor = read(names[key], shared.get(key)).to(device, memory_format=torch.contiguous_format)
            made[key] = nn.Parameter(tensor, requires_grad=False)
        module._parameters[leaf] = made[key]
    own = dict(model.named_parameters(remove_duplicate=False))
    for node in captured.graph_module.graph.find_nodes(op="get_attr"):
        path, _, leaf = str(node.target).rpartition(".")
        if isinstance(get_tensor(captured.graph_module, node), nn.Parameter):
            setattr(captured.graph_module.get_submodule(path), leaf, own[own_name(str(node.target))])


def pieces_by_id(model: PreTrainedModel, captured: Capture) -> dict[int, Piece]:
    """:func:`same_pieces` of a ``captured`` part of ``model``."""
    return same_pieces(model, {own_name(name): piece for name, piece in captured.pieces.items()})


def same_pieces(model: PreTrainedModel, pieces: dict[str, Piece]) -> dict[int, Piece]:
    """The piece of each parameter, by its id; it may have several names.

    Raises:
        UnsupportedModelError: pieces of one parameter differ.
    """
    found: dict[int, Piece] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in pieces and found.setdefault(id(parameter), pieces[name]) != pieces[name]:
            raise UnsupportedModelError(
                f"cannot split weight '{name}' over ranks: it is tied to one that is split in another way; use one rank"
            )
    return found


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every place of a parameter: the module that holds it, its name there, and itself."""
    places = ((module, name) for module in model.modules() for name in module._parameters)
    return ((module, name, p) for module, name in list(chain(places)) if (p := module._parameters[name]) is not None)


def captured_or_stored(model: PreTrainedModel, config: QuantSpecConfig, stored: StoredCapture | None) -> Capture:
    """The capture of ``model``, which may be hollow: what :func:`plan` gave for it, or made here."""
    return capture(model, rope_context=rope_context_of(model, config)) if stored is None else from_json(*stored, model)


def split_pair(
    seat: Seat,
    model: PreTrainedModel,
    read: Read,
    config: QuantSpecConfig,
    stored: StoredCapture | None,
    source: SplitSource | None = None,
) -> Pair:
    """A rank's part of the pair of ``model``, which is hollow.

    Args:
        seat: the rank's.
        model: hollow; it is given the rank's part of its parameters.
        read: has them.
        config: the options.
        stored: what :func:`plan` gave for it.
        source: makes what looks up ready weights of the draft out of the capture that was split; without it they are
            quantized.

    Raises:
        UnsupportedModelError: the model cannot be split over so many ranks, or converted; names the node or module.
    """
    with converting():
        whole = captured_or_stored(model, config, stored)
        captured = split_capture(whole, model, seat.place)
        fill(model, captured, read, seat.device)
        return Pair(model, config, source and source(captured), captured, seat)
