"""What a model takes on a card, converted and in other ways to run it, and how much more would fit."""

from __future__ import annotations

import bisect
import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ._sizes import Sizes
from .errors import CommandError

# Of GPUs that quantspec runs on, as nvidia-smi reports it.
_MEBIBYTES = {
    "a10-24": 23028,
    "a100-40": 40960,
    "a100-80": 81920,
    "a6000-48": 49140,
    "b200-180": 183359,
    "h100-80": 81559,
    "h200-141": 143771,
    "l4-24": 23034,
    "l40s-48": 46068,
    "rtx3090-24": 24576,
    "rtx4090-24": 24564,
    "rtx5090-32": 32607,
}
# Requests at once, of which the server's table tells.
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
_MOST_SEQUENCES = 4096
# Of a model that names no limit of its own.
_MOST_TOKENS = 2**20


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as it was given, or as it calls itself.
        bytes: of its memory.
    """

    name: str
    bytes: int

    @classmethod
    def named(cls, name: str) -> Card:
        """A card by its name, or by its GiB.

        Raises:
            CommandError: neither.
        """
        key = name.strip().lower()
        if key in _MEBIBYTES:
            return cls(key, _MEBIBYTES[key] * 2**20)
        size = re.fullmatch(r"(\d+(?:\.\d+)?)(?:gi?b?)?", key)
        if size is None or float(size[1]) == 0:
            raise CommandError(f"--gpu '{name}' is not known", f"{', '.join(_MEBIBYTES)}, or GiB of memory such as 24")
        return cls(f"{size[1]} GiB", int(float(size[1]) * 2**30))

    @classmethod
    def here(cls) -> Card | None:
        """The first GPU of this machine, as its driver tells without torch."""
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return None
        device, size, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
        if (
            driver.cuInit(0)
            or driver.cuDeviceGet(ctypes.byref(device), 0)
            or driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
            or driver.cuDeviceGetName(name, len(name), device)
        ):
            return None
        return cls(name.value.decode(), size.value)


@dataclass(frozen=True)
class Way:
    """One way to run the model.

    Attributes:
        name: what it keeps in which precision.
        weights: bytes of them, the draft's included.
        cache: from tokens per text and texts to bytes.
    """

    name: str
    weights: int
    cache: Callable[[int, int], int]

    def total(self, context: int, batch_size: int) -> int:
        """Bytes of weights and cache."""
        return self.weights + self.cache(context, batch_size)


def ways(sizes: Sizes) -> Iterator[Way]:
    """quantspec, and the strong alternatives."""
    target, draft = sizes.weight_bytes["target"], sizes.weight_bytes["draft_int4"]
    packed = sum(linear.model_bytes for linear in sizes.linears if linear.draft_bytes)

    def own(context: int, batch_size: int) -> int:
        return _on_gpu(sizes.cache_parts(context, batch_size))

    def eight_bits(context: int, batch_size: int) -> int:
        return sizes.full_precision(context, batch_size) // sizes.itemsize

    yield Way("quantspec", target + draft, own)
    yield Way(f"{sizes.dtype} weights, {sizes.dtype} cache", target, sizes.full_precision)
    if sizes.itemsize > 1:
        yield Way(f"{sizes.dtype} weights, FP8 cache", target, eight_bits)
    if packed:
        yield Way(f"INT4 weights only, {sizes.dtype} cache", target - packed + draft, sizes.full_precision)


def _on_gpu(parts: dict[str, int]) -> int:
    """Bytes of a cache without the copy that only a CPU has."""
    return sum(size for part, size in parts.items() if part != "decoded")


def fit(sizes: Sizes, card: Card, utilization: float, context: int, batch_size: int) -> dict[str, Any]:
    """What fits ``card``, JSON-ready; bytes everywhere."""
    room = utilization * card.bytes
    limit = sizes.limit or _MOST_TOKENS
    every = list(ways(sizes))

    def served(texts: int, tokens: int) -> int:
        return every[0].weights + _on_gpu(sizes.pool_parts(tokens, texts))

    lengths = [(texts, most_that_fits(partial(served, texts), room, limit)) for texts in _SEQUENCES]
    return {
        "gpu": card.name,
        "gpu_bytes": card.bytes,
        "gpu_memory_utilization": utilization,
        "room": int(room),
        "ways": [
            {
                "name": way.name,
                "weights": way.weights,
                "cache": way.cache(context, batch_size),
                "total": way.total(context, batch_size),
                "fits": way.total(context, batch_size) <= room,
                "largest_context": most_that_fits(partial(way.total, batch_size=batch_size), room, limit),
                "largest_batch_size": most_that_fits(partial(way.total, context), room, _MOST_SEQUENCES),
            }
            for way in every
        ],
        "server": [{"max_sequences": texts, "max_length": length} for texts, length in lengths if length],
    }


def most_that_fits(bytes_of: Callable[[int], int], room: float, most: int) -> int:
    """The largest number up to ``most`` whose ``bytes_of`` is at most ``room``, where more takes more; 0 if none."""
    return bisect.bisect_left(range(1, most + 1), True, key=lambda number: bytes_of(number) > room)
