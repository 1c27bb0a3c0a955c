"""``QuantSpecModel.save_pretrained``: the folder of :mod:`quantspec.saved_format`, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from quantspec.passes import plain_int4_weights

from .errors import SavedModelError
from .saved_format import (
    DESCRIPTION_FILE,
    DRAFT_PREFIX,
    FORMAT_VERSION,
    MODEL_PREFIX,
    TENSOR_FILES,
    Description,
    fingerprints,
)

if TYPE_CHECKING:
    from .model import QuantSpecModel

_STAGING_PREFIX = ".quantspec-saving-"


def save_pretrained(qs: QuantSpecModel, directory: str | os.PathLike[str], max_shard_size: int | str) -> None:
    """See :meth:`QuantSpecModel.save_pretrained`."""
    folder = Path(directory)
    earlier = _files_to_replace(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = tempfile.TemporaryDirectory(prefix=_STAGING_PREFIX, dir=folder)
    except OSError as error:
        raise SavedModelError(
            f"cannot save to '{folder}': {error.strerror}; choose a folder that can be written to"
        ) from error
    with staging as name:
        written = Path(name)
        _check_space(qs, folder)
        with _as_dense(qs.model):
            qs.model.save_pretrained(written, max_shard_size=max_shard_size)
        save_torch_state_dict(_tensors(qs), written, filename_pattern=TENSOR_FILES, max_shard_size=max_shard_size)
        Description(
            format_version=FORMAT_VERSION,
            versions={package: version(package) for package in ("quantspec", "torch", "transformers")},
            model_class=type(qs.model).__name__,
            dtype=str(qs.model.dtype).removeprefix("torch."),
            options=qs.config,
            linears=qs.linears,
            files=fingerprints(written, sorted(path.name for path in written.iterdir())),
        ).write(written)
        for path in written.iterdir():
            # safetensors makes its files readable by their owner only.
            shutil.copymode(written / DESCRIPTION_FILE, path)
        _publish(written, folder, earlier)


def _files_to_replace(folder: Path) -> list[str]:
    """Names of an earlier save's files in ``folder``, its description first."""
    if folder.exists() and not folder.is_dir():
        raise SavedModelError(f"cannot save to '{folder}': it is a file; choose a folder")
    names = sorted(path.name for path in folder.glob("*") if not path.name.startswith(_STAGING_PREFIX))
    if not names:
        return []
    if DESCRIPTION_FILE not in names:
        found = f"{names[0]!r} and {len(names) - 1} more files" if names[1:] else repr(names[0])
        raise SavedModelError(
            f"cannot save to '{folder}': it holds {found}, and no model saved by quantspec; choose an empty folder "
            "(a tokenizer is saved to it afterwards)"
        )
    try:
        return [DESCRIPTION_FILE, *Description.read(folder).files]
    except SavedModelError as error:
        raise SavedModelError(
            f"cannot save to '{folder}': which files its earlier save consists of cannot be read; choose an empty "
            "folder"
        ) from error


def _check_space(qs: QuantSpecModel, folder: Path) -> None:
    needed, free = sum(qs.weight_bytes().values()), shutil.disk_usage(folder).free
    if needed > free:
        raise SavedModelError(
            f"cannot save to '{folder}': about {needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free"
        )


@contextlib.contextmanager
def _as_dense(model: PreTrainedModel) -> Iterator[None]:
    """Let transformers save what it has dequantized on loading (a GGUF file): it refuses, but the weights are dense."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        yield
        return
    description = model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    del model.config.quantization_config
    try:
        yield
    finally:
        model.hf_quantizer = quantizer
        model.config.quantization_config = description


def _tensors(qs: QuantSpecModel) -> dict[str, Tensor]:
    """Contents of the ``quantspec*.safetensors`` files, in host memory."""
    tensors = {}
    for name, (qdata, scale_and_zero) in plain_int4_weights(qs.draft).items():
        tensors[f"{DRAFT_PREFIX}{name}.qdata"] = qdata
        tensors[f"{DRAFT_PREFIX}{name}.scale_and_zero"] = scale_and_zero
    for name, tensor in _not_restored_by_transformers(qs.model).items():
        tensors[f"{MODEL_PREFIX}{name}"] = tensor
    # Fused weights are views of one tensor, which safetensors refuses.
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _not_restored_by_transformers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Buffers that are computed anew on loading, and what loading would cast to the model's dtype."""
    saved = model.state_dict().keys()
    return {
        name: tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if name not in saved or (tensor.is_floating_point() and tensor.dtype != model.dtype)
    }


def _publish(written: Path, folder: Path, earlier: list[str]) -> None:
    """Move the files to their place; until the description has come last, the folder cannot be loaded."""
    for name in earlier:
        (folder / name).unlink(missing_ok=True)
    names = sorted(path.name for path in written.iterdir() if path.name != DESCRIPTION_FILE)
    for name in (*names, DESCRIPTION_FILE):
        (written / name).replace(folder / name)
    for leftover in folder.glob(f"{_STAGING_PREFIX}*"):
        if leftover != written:
            shutil.rmtree(leftover)
