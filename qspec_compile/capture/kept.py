"""Captures kept in a folder of the user's, so that a later process does not export the same model again.

A file is one capture: the digest of its content, then safetensors. Its name says what the capture follows from. The
environment variable ``QUANTSPEC_CACHE`` names another folder; empty, it keeps nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .export import Capture, capture
from .running_code import running_code
from .stored import FORMAT, from_json, to_json

_LOGGER = logging.getLogger(__name__)

# The files used last stay.
_MOST_FILES, _MOST_BYTES = 256, 256 * 2**20
_SUFFIX = ".capture"
_DIGEST_BYTES = hashlib.sha256().digest_size
_GRAPH, _CONSTANT = "graph", "constant."


def kept_or_captured(
    model: PreTrainedModel, rope_context: int | None, capture: Callable[..., Capture] = capture
) -> Capture:
    """The capture of ``model``: what an earlier process kept, if it is of the same code, config and shapes.

    Raises:
        UnsupportedModelError: as ``capture`` does.
    """
    path = _path(model, rope_context)
    kept = None if path is None else _read(path, model)
    if kept is not None:
        _LOGGER.info("the graph was captured before")
        return kept
    captured = capture(model, rope_context=rope_context)
    if path is not None:
        _write(path, captured, model)
    return captured


def _folder() -> Path | None:
    """Where captures are kept; None where they shall not be."""
    named = os.environ.get("QUANTSPEC_CACHE")
    if named is not None:
        return Path(named).expanduser() / "captures" if named else None
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "quantspec" / "captures"


def _path(model: PreTrainedModel, rope_context: int | None) -> Path | None:
    """The file of this capture; None where it is not kept."""
    try:
        folder = _folder()
        if folder is None:
            return None
        versions = [version(package) for package in ("quantspec", "torch", "transformers")]
        key: tuple[Any, ...] = (FORMAT, versions, rope_context, running_code(model, capture, from_json))
        if rope_context is not None:
            # The graph has frequencies of its own, made from the model's.
            buffers = {name: buffer.cpu().contiguous().clone() for name, buffer in model.named_buffers()}
            key = (*key, hashlib.sha256(safetensors.torch.save(buffers)).hexdigest())
        return folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()}{_SUFFIX}"
    except Exception as error:
        # Whatever keeps a capture from being kept, it can be made.
        _LOGGER.debug("the captured graph is not kept: %s", error)
        return None


def _read(path: Path, model: PreTrainedModel) -> Capture | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    try:
        digest, content = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError(digest)
        tensors = safetensors.torch.load(content)
        graph = json.loads(tensors.pop(_GRAPH).numpy().tobytes())
        constants = {name.removeprefix(_CONSTANT): tensor for name, tensor in tensors.items()}
        captured = from_json(graph, constants, model)
        os.utime(path)
        return captured
    except Exception as error:
        _LOGGER.debug("'%s' cannot be used: %s; capturing anew", path, error)
        return None


def _write(path: Path, captured: Capture, model: PreTrainedModel) -> None:
    try:
        graph, constants = to_json(captured, model)
        text = bytearray(json.dumps(graph).encode())
        tensors: dict[str, Tensor] = {_GRAPH: torch.frombuffer(text, dtype=torch.uint8)}
        for name, tensor in constants.items():
            tensors[_CONSTANT + name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        content = safetensors.torch.save(tensors)
        if len(content) > _MOST_BYTES // 4:
            raise ValueError(len(content))
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(hashlib.sha256(content).digest() + content)
                file.close()
                # Another process that captures the same meanwhile writes the same.
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        _make_room(path.parent)
    except Exception as error:
        _LOGGER.debug("the captured graph is not kept: %s", error)


def _make_room(folder: Path) -> None:
    """Remove the files used longest ago, those that a dead process left half written too."""
    found = []
    for path in folder.iterdir():
        # Another process makes room too.
        with contextlib.suppress(FileNotFoundError):
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    num_bytes = 0
    for number, (_, size, path) in enumerate(sorted(found, reverse=True)):
        num_bytes += size
        if number >= _MOST_FILES or num_bytes > _MOST_BYTES:
            path.unlink(missing_ok=True)
