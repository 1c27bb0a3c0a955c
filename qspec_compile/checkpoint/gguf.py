"""How GGUF files are read."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Iterator
from typing import Any

import transformers

_READING = threading.RLock()


def dense_weights(gguf_file: str | None) -> dict[str, Any]:
    """Arguments with which ``from_pretrained`` dequantizes a GGUF file's weights, whatever else is installed.

    transformers from 5.23 on leaves them packed where it finds a kernel that multiplies them; the versions without
    ``GgufConfig`` always dequantize. Nothing is to be said without a file.
    """
    if gguf_file is None or not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


@contextlib.contextmanager
def read_once(gguf_file: str | None) -> Iterator[None]:
    """Within, the header of a GGUF file is read once and the table of its tensors' names is made once.

    transformers reads the header, with every word of the vocabulary, for the config, the tokenizer and the weights
    each, and makes the table for every module of the model, which takes most of the time of a small model. Threads take
    turns.
    """
    if gguf_file is None or importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf

    with _READING:
        own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
        try:
            for name, function in own.items():
                setattr(gguf, name, functools.cache(function))
            yield
        finally:
            for name, function in own.items():
                setattr(gguf, name, function)
