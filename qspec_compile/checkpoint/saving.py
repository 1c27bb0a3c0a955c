"""``QuantSpecModel.save_pretrained``: the folder of :mod:`quantspec.checkpoint.folder`."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from quantspec.capture import check_can_convert
from quantspec.engine.stats import GenerationStats
from quantspec.errors import SavedModelError
from quantspec.logging import without_bars_of_libraries
from quantspec.pair import Pair
from quantspec.passes import Role, plain_weights

from .folder import (
    DESCRIPTION_FILE,
    DRAFT_PREFIX,
    FORMAT_VERSION,
    LOGITS_KEY,
    MODEL_PREFIX,
    TENSOR_FILES,
    TOKENS_KEY,
    Description,
    fingerprints,
)
from .graph_file import write_capture
from .identity import check_can_be_loaded, fixed_tokens, target_logits
from .model_card import CARD_FILE, is_of_somebody, model_card
from .new_folder import removed_on_failure
from .staging import is_staged, locked, publish, staged


def save_pretrained(
    pair: Pair,
    directory: str | os.PathLike[str],
    max_shard_size: int | str,
    *,
    tokenizer: Any = None,
    stats: GenerationStats | None = None,
    parity: Any = None,
) -> None:
    """See :meth:`QuantSpecModel.save_pretrained`."""
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(f"tokenizer must have save_pretrained(), as transformers' have, not {type(tokenizer).__name__}")
    check_can_convert()
    folder = Path(directory)
    check_folder(folder)
    check_generation_config(pair.model.generation_config)
    tokens = fixed_tokens(pair)
    logits = target_logits(pair, tokens)
    check_can_be_loaded(pair, logits)
    check = {TOKENS_KEY: tokens, LOGITS_KEY: logits}
    try:
        with removed_on_failure(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder):
                _files_to_replace(folder)
            with staged(folder) as written:
                _check_space(pair, folder)
                description = _write(pair, written, max_shard_size, check)
                if tokenizer is not None:
                    tokenizer.save_pretrained(written)
                if not is_of_somebody(folder / CARD_FILE):
                    card = model_card(pair, description, folder.resolve().name, tokenizer is not None, stats, parity)
                    (written / CARD_FILE).write_text(card, encoding="utf-8")
                for path in written.iterdir():
                    # safetensors makes its files readable by their owner only.
                    shutil.copymode(written / DESCRIPTION_FILE, path)
                publish(written, folder, _files_to_replace)
    except (OSError, SafetensorError) as error:
        raise SavedModelError(
            f"cannot save to '{folder}': {getattr(error, 'strerror', None) or error}; choose a folder that can be "
            "written to"
        ) from error


def check_folder(folder: Path) -> None:
    """Raise ``SavedModelError`` for what cannot become or be replaced by a save."""
    if folder.exists() and not folder.is_dir():
        raise SavedModelError(f"cannot save to '{folder}': it is a file; choose a folder")
    # What keeps it from being read is told as it is written, and what a killed save has left is put back before that.
    with contextlib.suppress(OSError):
        if folder.exists() and not any(map(is_staged, folder.iterdir())):
            _files_to_replace(folder)


def check_generation_config(config: GenerationConfig | None) -> None:
    """Raise ``SavedModelError`` for a generation config that transformers refuses to save."""
    try:
        if config is not None:
            config.validate(strict=True)
    except ValueError as error:
        # The lines between transformers' introduction and its advice.
        reasons = [line.removeprefix("- ") for line in str(error).splitlines() if line.startswith("- ")]
        raise SavedModelError(
            f"the model's generation config cannot be saved ({' '.join(reasons) or error}): correct "
            "model.generation_config, or its file generation_config.json"
        ) from error


def _write(pair: Pair, written: Path, max_shard_size: int | str, check: dict[str, Tensor]) -> Description:
    """The files of a save, without a tokenizer's and the card, which are for people to edit."""
    with _as_dense(pair.model), without_bars_of_libraries():
        pair.model.save_pretrained(written, max_shard_size=max_shard_size)
        constants = write_capture(pair, written)
    tensors = _in_host_memory(_tensors(pair) | constants | check)
    save_torch_state_dict(tensors, written, filename_pattern=TENSOR_FILES, max_shard_size=max_shard_size)
    description = Description(
        format_version=FORMAT_VERSION,
        versions={package: version(package) for package in ("quantspec", "torch", "transformers")},
        model_class=type(pair.model).__name__,
        dtype=str(pair.model.dtype).removeprefix("torch."),
        options=pair.config,
        linears=pair.linears,
        files=fingerprints(written, sorted(path.name for path in written.iterdir())),
        tuned=pair.tuned,
    )
    description.write(written)
    return description


def _files_to_replace(folder: Path) -> list[str]:
    """Names of an earlier save's files in ``folder``, its description first."""
    names = sorted(path.name for path in folder.iterdir() if not is_staged(path))
    if not names:
        return []
    if DESCRIPTION_FILE not in names:
        found = f"{names[0]!r} and {len(names) - 1} more files" if names[1:] else repr(names[0])
        raise SavedModelError(
            f"cannot save to '{folder}': it holds {found}, and no model saved by quantspec; choose an empty folder "
            "(a tokenizer is saved with tokenizer=..., or to it afterwards)"
        )
    try:
        return [DESCRIPTION_FILE, *Description.read(folder).files]
    except SavedModelError as error:
        raise SavedModelError(
            f"cannot save to '{folder}': which files its earlier save consists of cannot be read; choose an empty "
            "folder"
        ) from error


def _check_space(pair: Pair, folder: Path) -> None:
    needed, free = sum(pair.weight_bytes.values()), shutil.disk_usage(folder).free
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


def _tensors(pair: Pair) -> dict[str, Tensor]:
    """The draft's weights and what transformers would not restore, as named in the saved files."""
    tensors = {
        f"{DRAFT_PREFIX}{linear}.{part}": tensor
        for linear, parts in plain_weights(pair.graphs[Role.DRAFT]).items()
        for part, tensor in parts.items()
    }
    for name, tensor in _not_restored_by_transformers(pair.model).items():
        tensors[f"{MODEL_PREFIX}{name}"] = tensor
    return tensors


def _in_host_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
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
