"""GGUF files in the time that their bytes need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy


@contextlib.contextmanager
def read_at_once() -> Iterator[None]:
    """Read files instead of mapping them, since slicing the words of a vocabulary out of a map takes twice as long."""

    def read(path: str | Path, **_: object) -> numpy.ndarray:
        return numpy.fromfile(path, numpy.uint8)

    with mock.patch("numpy.memmap", read):
        yield
