"""``quantspec.from_pretrained``: a saved pair, without quantizing anything again."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from .capture import converting
from .config import QuantSpecConfig
from .errors import SavedModelError
from .model import QuantSpecModel
from .saved_format import DRAFT_PREFIX, MODEL_PREFIX, TENSOR_FILES, Description, check_files
from .self_check import self_check
from .versions import noting_untested_versions

# The saved INT4 weights were made with these.
_FIXED_OPTIONS = ("weight_group_size", "weight_quantizer", "quantize_lm_head")
_CONVERT_AGAIN = (
    "convert the model again: quantspec.convert(AutoModelForCausalLM.from_pretrained(directory), ...), or in a shell "
    "`quantspec convert` of the original"
)


@noting_untested_versions()
def from_pretrained(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    **options: Any,
) -> QuantSpecModel:
    """Load what :meth:`QuantSpecModel.save_pretrained` wrote; nothing is quantized.

    Weights are read one by one into the one model, so host memory holds them once. Without ``dtype`` the pair is bit
    for bit the one that was saved.

    Args:
        directory: a local folder.
        device: where the weights and the cache shall live; the CPU if None.
        dtype: of the target's weights, the saved one if None. Models saved in float32 or bfloat16 load in either.
        verify: compare every file with its SHA-256 in ``quantspec_config.json``; False compares sizes only. This finds
            damage, not fraud: who changes a file can change its hash. No file is ever unpickled.
        trust_remote_code: as in transformers, for models whose code lies in the folder.
        **options: fields of :class:`QuantSpecConfig` that shall differ from the saved ones; those that the INT4 weights
            were made with cannot.

    Returns:
        The pair.

    Raises:
        SavedModelError: the folder is missing, incomplete, damaged, or of a later format; names the file.
        TypeError, ValueError: a bad option.
        SelfCheckError: the pair does not reproduce the model's logits (a later torch or transformers, for example).
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise SavedModelError(
            f"'{folder}' is no folder; pass a local one that save_pretrained() wrote (from a hub, download it first "
            "with huggingface_hub.snapshot_download)"
        )
    description = Description.read(folder)
    config = changed_options(description.options, options)
    target_dtype = resolve_dtype(description, dtype)
    placement = _check_device(device)
    check_files(folder, description, hashes=verify)
    model = _load_model(folder, description, target_dtype, trust_remote_code)
    model.to(placement)  # type: ignore[arg-type]
    tensors = _SavedTensors(folder)
    if str(target_dtype) == f"torch.{description.dtype}":
        _restore(model, tensors, target_dtype)
    with converting():
        qs = QuantSpecModel(model, config, source=tensors.int4)
        # A note's wording may change between versions.
        made, expected = (
            {replace(report, note="") for report in reports} for reports in (qs.linears, description.linears)
        )
        if made != expected:
            raise SavedModelError(
                f"'{folder}' was saved with {_versions(description)}, whose draft differs from what is made now "
                f"({', '.join(sorted({report.name for report in made ^ expected}))}): {_CONVERT_AGAIN}"
            )
        if config.self_check:
            self_check(qs)
    return qs


def changed_options(saved: QuantSpecConfig, options: dict[str, Any]) -> QuantSpecConfig:
    """The saved options with ``options`` on top; those that the INT4 weights were made with cannot change."""
    config = QuantSpecConfig.from_options(saved, options)
    for name in _FIXED_OPTIONS:
        value = getattr(saved, name)
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} cannot change on loading, the saved INT4 weights were made with "
                f"{getattr(value, 'value', value)!r}; {_CONVERT_AGAIN}"
            )
    return config


def resolve_dtype(description: Description, dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype to load in, the saved one if None; refused where the saved scales do not fit it."""
    saved = getattr(torch, description.dtype)
    resolved: Any = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or saved
    # Scales are float16 where the model is, else bfloat16.
    allowed = (saved,) if saved == torch.float16 else (torch.float32, torch.bfloat16)
    if resolved not in allowed:
        choices = " or ".join(str(choice).removeprefix("torch.") for choice in allowed)
        raise ValueError(f"a model saved in {description.dtype} loads in {choices}, not in {dtype}; {_CONVERT_AGAIN}")
    return resolved


def _check_device(device: str | torch.device | None) -> torch.device:
    try:
        return torch.empty(0, device=device or "cpu").device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {error}") from error


def _load_model(folder: Path, description: Description, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    # What is no causal language model by name (multimodal ones) has a class of its own.
    named: Any = getattr(transformers, description.model_class, None)
    loader: Any = named if isinstance(named, type) and issubclass(named, PreTrainedModel) else AutoModelForCausalLM
    model, problems = loader.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if problems[kind]:
            raise SavedModelError(
                f"the weights in '{folder}', saved with {_versions(description)}, do not fit the installed "
                f"{description.model_class} ({kind}: {', '.join(sorted(map(str, problems[kind])))}); "
                "install those versions"
            )
    return model


def _versions(description: Description) -> str:
    return ", ".join(f"{package} {version}" for package, version in description.versions.items())


def _restore(model: PreTrainedModel, tensors: _SavedTensors, dtype: torch.dtype) -> None:
    """Undo what transformers did on loading: buffers computed anew, parameters cast from or to float32."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for key in tensors.names(MODEL_PREFIX):
        tensor = own.pop(key.removeprefix(MODEL_PREFIX), None)
        saved = tensors.get(key)
        if tensor is None or tensor.shape != saved.shape:
            raise SavedModelError(
                f"'{key}' of '{tensors.folder}' has no place in {type(model).__name__}; {_CONVERT_AGAIN}"
            )
        tensor.data = saved.to(tensor.device, copy=True)
    for tensor in own.values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


class _SavedTensors:
    """Tensors of the ``quantspec*.safetensors`` files, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        single = TENSOR_FILES.format(suffix="")
        index = folder / f"{single}.index.json"
        files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {single}
        readers = [safetensors.safe_open(folder / name, framework="pt") for name in files]
        self._readers = {key: reader for reader in readers for key in sorted(reader.keys())}

    def names(self, prefix: str) -> list[str]:
        """Names of all tensors with this prefix."""
        return [key for key in self._readers if key.startswith(prefix)]

    def get(self, key: str) -> Tensor:
        """One tensor, in host memory."""
        if key not in self._readers:
            raise SavedModelError(f"'{self.folder}' holds no '{key}'; {_CONVERT_AGAIN}")
        return self._readers[key].get_tensor(key)

    def int4(self, name: str, shape: tuple[int, ...], group_size: int) -> tuple[Tensor, Tensor]:
        """A linear's saved INT4 weights, checked against its shape; a :data:`quantspec.passes.Int4Source`."""
        *experts, rows, width = shape
        expected = {
            "qdata": (torch.uint8, (*experts, rows, width // 2)),
            "scale_and_zero": (None, (*experts, width // group_size, rows, 2)),
        }
        found = []
        for part, (dtype, part_shape) in expected.items():
            tensor = self.get(f"{DRAFT_PREFIX}{name}.{part}")
            if tensor.shape != part_shape or (dtype is not None and tensor.dtype != dtype):
                raise SavedModelError(
                    f"'{DRAFT_PREFIX}{name}.{part}' of '{self.folder}' is {tensor.dtype} {tuple(tensor.shape)} instead "
                    f"of {part_shape}; {_CONVERT_AGAIN}"
                )
            found.append(tensor)
        return found[0], found[1]
