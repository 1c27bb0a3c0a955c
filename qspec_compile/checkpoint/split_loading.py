"""One rank's part of a folder: transformers' checkpoint or a saved pair, of which it reads its pieces alone."""

from __future__ import annotations

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
from quantspec.passes.pieces import Piece, scaled
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
        self._pieces = {
            name.removeprefix("model.").removesuffix(".weight"): piece for name, piece in captured.pieces.items()
        }
        self._reports = reports

    def packed(
        self, weight_format: WeightFormat, linear: str, shape: tuple[int, ...], group_size: int
    ) -> tuple[Tensor, ...] | None:
        """A :data:`quantspec.passes.WeightSource`: the same codes, in groups that may be parts of the saved ones."""
        report, piece = self._reports[linear], self._pieces.get(linear)
        # The whole model may absorb latents of which a rank makes its few heads.
        if report.group_size is None:
            return None
        whole = (*shape[:-2], report.out_features, report.in_features)
        parts = []
        for part, saved, ours in zip(
            weight_format.parts,
            weight_format.shapes(whole, report.group_size),
            weight_format.shapes(shape, group_size),
            strict=True,
        ):
            key = f"{DRAFT_PREFIX}{linear}.{part.name}"
            rows = shape[-2] != report.out_features
            axis = part.row_axis
            if not rows:
                axis = next((n - len(saved) for n in range(len(saved)) if saved[n] != ours[n]), part.row_axis)
            if piece is None or (not rows and saved == ours and shape[-1] == report.in_features):
                parts.append(self._saved.get(key))
                continue
            size = report.out_features if rows else report.in_features
            ranges = scaled(piece.ranges, saved[axis], size)
            if ranges is None:
                raise SavedModelError(
                    f"'{key}' was quantized in groups of {report.group_size}, which do not end where a rank's part of "
                    f"{linear} does; convert the model with a smaller weight_group_size"
                )
            parts.append(self._saved.get(key, Piece(axis, ranges, saved[axis])))
        return tuple(parts)
