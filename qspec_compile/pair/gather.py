"""The whole pair in host memory, put together out of what the ranks have of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from quantspec.capture import converting
from quantspec.errors import SavedModelError
from quantspec.passes import LinearReport, Role, WeightFormat, plain_weights
from quantspec.passes.graph import own_name
from quantspec.passes.pieces import Piece, scaled
from quantspec.passes.shard_linears import transposed_weights
from quantspec.passes.weight_formats import Part
from quantspec.ranks import Seat

from .pair import Pair
from .split import same_pieces


def gather_pair(seat: Seat, pair: Pair) -> Pair | None:
    """The pair whose part ``pair`` is, with the same weights and codes, on the CPU; None above rank 0. All call this.

    Raises:
        SavedModelError: a rank's part of a linear is quantized in smaller groups than the whole would be.
    """
    pieces = {own_name(name): piece for name, piece in pair.captured.pieces.items()}
    shared = same_pieces(pair.model, pieces)
    parameters = dict(pair.model.named_parameters())
    of_parameters = {name: shared[id(p)] for name, p in parameters.items() if id(p) in shared}
    of_linears = _of_linears(pair, pieces)
    weights = {name: _gathered(seat, p.detach(), of_parameters.get(name)) for name, p in parameters.items()}
    drafts = {
        (linear, name): _gathered(seat, tensor, of_linears.get((linear, name)))
        for linear, parts in plain_weights(pair.graphs[Role.DRAFT]).items()
        for name, tensor in parts.items()
    }
    if not seat.decides:
        return None

    def packed(weight_format: WeightFormat, linear: str, shape: object, group_size: int) -> tuple[Tensor, ...]:
        return tuple(drafts[linear, part.name] for part in weight_format.parts)

    with converting():
        config = replace(pair.config, adapted_group_sizes={})
        whole = Pair(_whole_model(pair.model, weights), config, packed)
    whole.tuned = pair.tuned
    return whole


def _of_linears(pair: Pair, pieces: Mapping[str, Piece]) -> dict[tuple[str, str], Piece]:
    """By linear and part of its packed weight what this rank has of that."""
    weight_format, found = pair.draft_weights, {}
    transposed = {own_name(name) for name in transposed_weights(pair.captured.graph_module.graph)}
    for report in pair.linears:
        name = f"{report.name}.weight" if f"{report.name}.weight" in pieces else report.name
        if weight_format is None or name not in pieces:
            continue
        piece, size = pieces[name], report.group_size
        has_rows = (piece.axis == -2) != (name in transposed)
        of_whole = size if has_rows else weight_format.group_size(piece.size, pair.config.weight_group_size)
        if size != of_whole:
            raise SavedModelError(
                f"cannot save the draft of {report.name}: its group size is {size} in the ranks' parts and {of_whole} "
                f"in the whole (None is full precision); convert with a weight_group_size that divides "
                f"{report.in_features}, or on one device"
            )
        for part in weight_format.parts if size is not None else ():
            if has_rows:
                found[report.name, part.name] = Piece(part.row_axis, piece.ranges, piece.size)
            else:
                found[report.name, part.name] = _piece_of_columns(report, piece, part, size)
    return found


def _piece_of_columns(report: LinearReport, piece: Piece, part: Part, size: int) -> Piece:
    ours, whole = (part.shape(report.out_features, width, size) for width in (report.in_features, piece.size))
    axis = next(axis for axis in range(-len(whole), 0) if ours[axis] != whole[axis])
    ranges = scaled(piece.ranges, whole[axis], piece.size)
    assert ranges is not None
    return Piece(axis, ranges, whole[axis])


def _gathered(seat: Seat, tensor: Tensor, piece: Piece | None) -> Tensor:
    """The whole tensor on rank 0, in host memory; anything elsewhere."""
    own = tensor.detach().cpu().contiguous()
    every: list[Piece | None] = [None] * seat.place.world
    dist.all_gather_object(every, piece)
    # A bias that is summed is rank 0's, and zeros elsewhere.
    if every[0] is None:
        return own
    # As bytes, which every backend knows.
    sent = own.view(torch.uint8)
    parts = [torch.empty_like(sent) for _ in every] if seat.decides else None
    dist.gather(sent, parts)
    if parts is None:
        return own
    shape = list(own.shape)
    shape[every[0].axis] = every[0].size
    whole = own.new_empty(shape)
    for one, part in zip(every, parts, strict=True):
        assert one is not None
        first = 0
        for start, stop in one.ranges:
            values = part.view(own.dtype).narrow(one.axis, first, stop - start)
            whole.narrow(one.axis, start, stop - start).copy_(values)
            first += stop - start
    return whole


def _whole_model(part: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model like ``part`` with these parameters, by their first names, and its buffers, on the CPU."""
    with torch.device("meta"):
        model = type(part)(copy.deepcopy(part.config))
    names = {id(p): name for name, p in part.named_parameters()}
    made = {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in weights.items()}
    for name, p in part.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = made[names[id(p)]]
    for name, buffer in part.named_buffers(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.cpu()
    model.generation_config = part.generation_config
    return model.eval()
