"""One rank's part of a folder: transformers' checkpoint or a saved pair, of which it reads its pieces alone."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantspec.capture import Capture, converting
from quantspec.config import QuantSpecConfig
from quantspec.errors import SavedModelError
from quantspec.pair import Pair
from quantspec.pair.split import Read, StoredCapture, hollow, split_pair
from quantspec.passes import LinearReport, WeightFormat
from quantspec.passes.graph import own_name
from quantspec.passes.pieces import Piece, Ranges
from quantspec.ranks import Seat

from .folder import DRAFT_PREFIX, MODEL_PREFIX, TENSOR_FILES, Description, check_files
from .loading import changed_options, resolve_dtype
from .sliced import SlicedFiles, missing_names, model_without_weights, reader_of, weight_files


def hollow_checkpoint(
    folder: Path, device: torch.device, dtype: torch.dtype | None, trust_remote_code: bool
) -> PreTrainedModel:
    """The model of transformers' folder, hollow; its weights need not be there."""
    with converting():
        model = model_without_weights(folder, dtype, trust_remote_code)
    hollow(model, device)
    return model


def reads_in_slices(folder: Path, model: PreTrainedModel) -> bool:
    """Whether the files of ``model`` have every parameter as it has it."""
    return not missing_names(model, weight_files(folder))


def part_of_checkpoint(
    seat: Seat,
    folder: Path,
    config: QuantSpecConfig,
    stored: StoredCapture | None,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
) -> Pair:
    """This rank's part of the pair of a transformers model, quantized as it is read."""
    with converting():
        model = model_without_weights(folder, dtype, trust_remote_code)
    read = _reading(model, weight_files(folder))
    hollow(model, seat.device)
    return split_pair(seat, model, read, config, stored)


def hollow_saved_pair(
    folder: Path,
    device: torch.device,
    dtype: str | torch.dtype | None,
    verify: bool,
    trust_remote_code: bool,
    options: dict[str, Any],
) -> tuple[PreTrainedModel, QuantSpecConfig]:
    """The model of a saved pair, hollow, with the pair's options; its files are checked.

    Raises:
        SavedModelError: as of ``from_pretrained``, or the files have parameters in another form than the model.
    """
    description = Description.read(folder)
    config = changed_options(description.options, options)
    check_files(folder, description, hashes=verify)
    model, *_ = _opened(folder, description, dtype, trust_remote_code)
    hollow(model, device)
    return model, config


def part_of_saved_pair(
    seat: Seat,
    directory: str | os.PathLike[str],
    dtype: str | torch.dtype | None,
    trust_remote_code: bool,
    config: QuantSpecConfig,
    stored: StoredCapture | None,
) -> Pair:
    """This rank's part of what ``save_pretrained`` of a pair wrote, in a folder that was checked."""
    folder = Path(directory)
    description = Description.read(folder)
    model, saved, read = _opened(folder, description, dtype, trust_remote_code)
    hollow(model, seat.device)
    reports = {report.name: report for report in description.linears}
    pair = split_pair(
        seat, model, read, config, stored, lambda captured: _PiecesOfDraft(saved, captured, reports).packed
    )
    pair.tuned = description.tuned
    return pair


def _opened(
    folder: Path, description: Description, dtype: str | torch.dtype | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, SlicedFiles, Read]:
    """The model of a saved pair without its weights, the files beside it, and what reads its weights."""
    target_dtype = resolve_dtype(description, dtype)
    with converting():
        model = model_without_weights(folder, target_dtype, trust_remote_code, description.model_class)
    single = TENSOR_FILES.format(suffix="")
    saved = SlicedFiles(folder, single, f"{single}.index.json")
    if str(target_dtype) == f"torch.{description.dtype}":
        for name, buffer in model.named_buffers():
            if f"{MODEL_PREFIX}{name}" in saved:
                buffer.data = saved.get(f"{MODEL_PREFIX}{name}")
    files = weight_files(folder)
    if missing := missing_names(model, files):
        raise SavedModelError(
            f"the weights in '{folder}' cannot be read in pieces ({', '.join(missing[:3])} are kept in another form): "
            "load the pair on one device, or convert the model with tensor_parallel"
        )
    return model, saved, _reading(model, files)


def _reading(model: PreTrainedModel, files: SlicedFiles) -> Read:
    stored = reader_of(model, files)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    return lambda name, piece: files.get(stored[name], piece).to(dtypes[name])


class _PiecesOfDraft:
    """Ready weights of the part of a draft, out of the whole one's."""

    def __init__(self, saved: SlicedFiles, captured: Capture, reports: dict[str, LinearReport]) -> None:
        self._saved = saved
        self._pieces = {own_name(name).removesuffix(".weight"): piece for name, piece in captured.pieces.items()}
        self._reports = reports

    def packed(
        self, weight_format: WeightFormat, linear: str, shape: tuple[int, ...], group_size: int
    ) -> tuple[Tensor, ...] | None:
        """A :data:`quantspec.passes.WeightSource`: the same codes and scales, in parts of the saved groups."""
        report, piece = self._reports[linear], self._pieces.get(linear)
        # The whole model may absorb latents of which a rank makes its few heads.
        if report.group_size is None:
            return None
        whole = (*shape[:-2], report.out_features, report.in_features)
        of_rows = shape[-2] != report.out_features
        parts = []
        for part, saved, ours, in_saved_groups in zip(
            weight_format.parts,
            weight_format.shapes(whole, report.group_size),
            weight_format.shapes(shape, group_size),
            weight_format.shapes(shape, report.group_size),
            strict=True,
        ):
            key = f"{DRAFT_PREFIX}{linear}.{part.name}"
            # A rank may have as many groups as the whole, smaller ones, so their number does not tell the axis.
            differing = (n - len(saved) for n in range(len(saved)) if saved[n] != in_saved_groups[n])
            axis = part.row_axis if of_rows else next(differing, None)
            if piece is None or axis is None:
                parts.append(self._saved.get(key))
                continue
            size, own_size = (report.out_features, shape[-2]) if of_rows else (report.in_features, shape[-1])
            indices = _indices(piece.ranges, size // saved[axis], own_size // ours[axis])
            if indices is None:
                raise SavedModelError(
                    f"'{key}' was quantized in groups of {report.group_size}, which do not end where a rank's part of "
                    f"{linear} does; convert the model with a smaller weight_group_size"
                )
            first, last = indices[0], indices[-1] + 1
            span = self._saved.get(key, Piece(axis, ((first, last),), saved[axis]))
            whole_span = indices == list(range(first, last))
            parts.append(span if whole_span else span.index_select(axis, torch.tensor(indices, device="cpu") - first))
        return tuple(parts)


def _indices(ranges: Ranges, saved_step: int, own_step: int) -> list[int] | None:
    """Which entries of a saved part, of ``saved_step`` channels each, a rank's entries of ``own_step`` channels are.

    None where one of the rank's would be of several saved ones.
    """
    bounds = itertools.chain(*ranges)
    if saved_step % own_step or any(bound % own_step for bound in bounds):
        return None
    return [channel // saved_step for first, last in ranges for channel in range(first, last, own_step)]
