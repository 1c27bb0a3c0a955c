"""``quantspec.from_pretrained``: a saved pair, without quantizing anything again."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from quantspec.capture import DTYPES, converting, linears_of_latents
from quantspec.config import QuantSpecConfig
from quantspec.errors import SavedModelError
from quantspec.logging import without_bars_of_libraries
from quantspec.pair import Pair
from quantspec.pair.recipes import recipes_for
from quantspec.passes import Role, WeightFormat
from quantspec.self_check import EXACT_TOLERANCE, self_check

from .folder import (
    DRAFT_PREFIX,
    EDITABLE_FILE,
    GRAPH_FILE,
    GRAPH_PREFIX,
    LOGITS_KEY,
    MODEL_PREFIX,
    TENSOR_FILES,
    TOKENS_KEY,
    Description,
    check_files,
)
from .graph_file import read_capture
from .hub import local_folder
from .identity import distance, target_logits

_LOGGER = logging.getLogger(__name__)

# The saved weights and logits were made with these.
FIXED_OPTIONS = ("weight_group_size", "weight_quantizer", "quantize_lm_head", "rope_context")
_CONVERT_AGAIN = (
    "convert the model again: quantspec.convert(AutoModelForCausalLM.from_pretrained(directory), ...), or in a shell "
    "`quantspec convert` of the original"
)


def load_pair(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    verify: bool,
    trust_remote_code: bool,
    revision: str | None,
    token: str | bool | None,
    options: dict[str, Any],
) -> Pair:
    """The pair of :func:`quantspec.from_pretrained`, which says what is what."""
    folder = local_folder(directory, revision, token)
    description = Description.read(folder)
    config = changed_options(description.options, options)
    target_dtype = resolve_dtype(description, dtype)
    placement = _check_device(device)
    check_files(folder, description, hashes=verify)
    _check_generation_config(folder, description)
    model = _load_model(folder, description, target_dtype, trust_remote_code)
    model.to(placement)  # type: ignore[arg-type]
    tensors = _SavedTensors(folder)
    if str(target_dtype) == f"torch.{description.dtype}":
        _restore(model, tensors, target_dtype)
    with converting():
        captured = None
        # A file that was not listed was not checked.
        if GRAPH_FILE in description.files:
            captured = read_capture(folder, model, config, tensors.get, tensors.names(GRAPH_PREFIX))
        dense = {report.name for report in description.linears if report.group_size is None}

        def packed(
            weight_format: WeightFormat, linear: str, shape: tuple[int, ...], group_size: int
        ) -> tuple[Tensor, ...] | None:
            return None if linear in dense else tensors.packed(weight_format, linear, shape, group_size)

        pair = Pair(model, config, source=packed, captured=captured)
        # A note's wording may change between versions.
        made, expected = (
            {replace(report, note="") for report in reports} for reports in (pair.linears, description.linears)
        )
        differ = {report.name for report in made ^ expected}
        # Other options, and other devices, absorb latents or leave the heads that are made of them.
        if differ and (differ := differ - linears_of_latents(pair.captured)):
            raise SavedModelError(
                f"'{folder}' was saved with {_versions(description)}, whose draft differs from what is made now "
                f"({', '.join(sorted(differ))}): {_CONVERT_AGAIN}"
            )
        pair.tuned = description.tuned
        _check_logits(pair, tensors, description, of_model=captured is not None)
        if config.self_check:
            self_check(pair)
    return pair


def changed_options(saved: QuantSpecConfig, options: dict[str, Any]) -> QuantSpecConfig:
    """The saved options with ``options`` on top; those that the saved weights were made with cannot change."""
    config = QuantSpecConfig.from_options(saved, options)
    for name in FIXED_OPTIONS:
        value = getattr(saved, name)
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} cannot change on loading, the saved pair was made with "
                f"{getattr(value, 'value', value)!r}; {_CONVERT_AGAIN}"
            )
    return config


def resolve_dtype(description: Description, dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype to load in, the saved one if None; refused where the draft of a model in it has other tensors."""
    saved = getattr(torch, description.dtype)
    resolved: Any = dtype or saved
    if isinstance(dtype, str):
        # "auto" is transformers' word for the saved one.
        resolved = saved if dtype == "auto" else getattr(torch, dtype.removeprefix("torch."), None)
    weight_format = recipes_for(description.options)[Role.DRAFT].weight_format
    parts = () if weight_format is None else weight_format.parts
    allowed = [dtype for dtype in DTYPES if all(part.dtype(dtype) == part.dtype(saved) for part in parts)]
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
    _LOGGER.info("reading the model's weights")
    with without_bars_of_libraries():
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
    if type(model).__name__ != description.model_class:
        raise SavedModelError(
            f"'{folder}' was saved as {description.model_class} and is loaded as {type(model).__name__}: register that "
            "class first with AutoModelForCausalLM.register(), or pass trust_remote_code=True if its code lies in the "
            "folder"
        )
    return model


def _check_generation_config(folder: Path, description: Description) -> None:
    """Raise ``SavedModelError`` where transformers would take its defaults in place of what it cannot read."""
    if EDITABLE_FILE not in description.files:
        return
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise SavedModelError(
            f"'{folder / EDITABLE_FILE}' cannot be read: {error}; correct it, or save the model again"
        ) from error


def _check_logits(pair: Pair, tensors: _SavedTensors, description: Description, of_model: bool) -> None:
    """Compare the target with the saved one, on the tokens that were saved with its logits.

    So is the model itself, ``of_model``, where the target was not made of its code but of a graph that was saved.
    """
    if LOGITS_KEY not in tensors.names(LOGITS_KEY):
        return
    ids = tensors.get(TOKENS_KEY)[:, : pair.max_len].to(pair.device)
    expected = tensors.get(LOGITS_KEY)[:, : ids.shape[1]]
    error = distance(target_logits(pair, ids), expected)
    if of_model:
        with torch.no_grad(), pair.rope_held:
            logits = pair.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        error = max(error, distance(logits.cpu(), expected))
    allowed = max(EXACT_TOLERANCE[dtype] for dtype in (pair.model.dtype, expected.dtype))
    if not error <= allowed:
        raise SavedModelError(
            f"the model in '{tensors.folder}' computes other logits than the saved {description.model_class} did (by "
            f"{error:.3g}, allowed {allowed:.3g}): its class, or what was patched in it, is not that of "
            f"{_versions(description)}; install those versions and patch it as it was, or {_CONVERT_AGAIN}"
        )


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

    def packed(
        self, weight_format: WeightFormat, linear: str, shape: tuple[int, ...], group_size: int
    ) -> tuple[Tensor, ...]:
        """A linear's saved weights, checked against its shape; a :data:`quantspec.passes.WeightSource`."""
        found = []
        for part, expected in zip(weight_format.parts, weight_format.shapes(shape, group_size), strict=True):
            name = f"{DRAFT_PREFIX}{linear}.{part.name}"
            tensor = self.get(name)
            if tensor.shape != expected or tensor.dtype not in map(part.dtype, DTYPES):
                raise SavedModelError(
                    f"'{name}' of '{self.folder}' is {tensor.dtype} {tuple(tensor.shape)} instead of {expected}; "
                    f"{_CONVERT_AGAIN}"
                )
            found.append(tensor)
        return tuple(found)
