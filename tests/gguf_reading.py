"""GGUF files in the time that their bytes need."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import gguf
import numpy


@contextlib.contextmanager
def read_at_once() -> Iterator[None]:
    """Read a file once instead of mapping it for its config, its tokenizer and its weights each.

    Slicing the words of a vocabulary out of a map takes twice as long, and transformers makes the table of an
    architecture's names again for every module of a model.
    """

    def read(path: str | Path, **_: object) -> numpy.ndarray:
        return numpy.fromfile(path, numpy.uint8)

    with (
        mock.patch("numpy.memmap", read),
        mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        yield
