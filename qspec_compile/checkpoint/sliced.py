"""A model without its weights, and what reads pieces of them out of its files: no process ever holds the whole."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from quantspec.passes.pieces import Piece


class SlicedFiles:
    """Tensors of safetensors files, of which each piece is read when it is asked for."""

    def __init__(self, folder: Path, single: str, index: str) -> None:
        """``single`` names the file, ``index`` the list of files where there are several."""
        path = folder / index
        names = sorted(set(json.loads(path.read_text())["weight_map"].values())) if path.exists() else [single]
        self._paths: dict[str, Path] = {}
        for path in (folder / name for name in names):
            if path.exists():
                with safetensors.safe_open(path, framework="pt") as file:
                    self._paths |= dict.fromkeys(file.keys(), path)

    def __contains__(self, key: str) -> bool:
        return key in self._paths

    def get(self, key: str, piece: Piece | None = None) -> Tensor:
        """A tensor or a piece of it, in host memory of its own."""
        # Opened for each: pages that were read count as the process's memory until the file is let go.
        with safetensors.safe_open(self._paths[key], framework="pt") as file:
            stored = file.get_slice(key)
            if piece is None:
                return stored[:].clone()
            if piece.is_zero:
                return torch.zeros_like(stored[:])
            before = (slice(None),) * (len(stored.get_shape()) + piece.axis)
            return torch.cat([stored[(*before, slice(first, last))] for first, last in piece.ranges], piece.axis)


def weight_files(folder: Path) -> SlicedFiles:
    """The model's own weights in a folder of transformers'."""
    return SlicedFiles(folder, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)


def model_without_weights(
    folder: Path, dtype: str | torch.dtype | None, trust_remote_code: bool, class_name: str | None = None
) -> PreTrainedModel:
    """The model that transformers would load from ``folder``, in eval mode: parameters without data, buffers real.

    Args:
        folder: with its config.
        dtype: of its parameters; the config's if None.
        trust_remote_code: as in transformers.
        class_name: of transformers, where the auto class finds another one.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    named: Any = getattr(transformers, class_name or "", None)
    dtype = dtype or config.dtype or torch.float32
    with _parameters_on_meta():
        if isinstance(named, type) and issubclass(named, PreTrainedModel):
            model = named._from_config(config, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def missing_names(model: PreTrainedModel, files: SlicedFiles) -> list[str]:
    """Parameters that the files do not have by their own names, tied ones by none of theirs."""
    found = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in files}
    return [name for name, p in model.named_parameters() if id(p) not in found]


def reader_of(model: PreTrainedModel, files: SlicedFiles) -> dict[str, str]:
    """By the first name of each parameter the one that the files have."""
    stored = {id(p): name for name, p in model.named_parameters(remove_duplicate=False) if name in files}
    return {name: stored[id(p)] for name, p in model.named_parameters()}


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules be made with parameters that hold nothing, while buffers, which some compute, are real."""
    register = nn.Module.register_parameter

    def register_without_data(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_without_data  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
