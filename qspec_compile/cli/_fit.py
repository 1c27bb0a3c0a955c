"""What a model takes on a card, converted and in other ways to run it, and how much more would fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from quantspec.config import QuantSpecConfig
from quantspec.engine.draft_count import AutoDraftCount
from quantspec.memory import expected_memory, full_precision_bytes, most_that_fits
from quantspec.pair.preview import Structure

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
        """The first GPU of this machine."""
        if not torch.cuda.is_available():
            return None
        properties = torch.cuda.get_device_properties(0)
        return cls(properties.name, properties.total_memory)


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


def cache_parts(structure: Structure, options: QuantSpecConfig, context: int, batch_size: int) -> dict[str, int]:
    """Bytes of quantspec's cache by part, and of its decoded copy on a CPU."""
    gamma = options.num_speculative_tokens
    return expected_memory(
        structure.layers,
        context,
        batch_size,
        kv_group_size=options.kv_group_size,
        num_speculative_tokens=gamma if isinstance(gamma, int) else AutoDraftCount().most,
        dtype=structure.dtype,
        max_cache_len=options.max_cache_len or structure.max_len,
        device="cpu",
        states=structure.states,
    )


def ways(structure: Structure, options: QuantSpecConfig) -> Iterator[Way]:
    """quantspec, and the strong alternatives."""
    target, draft = structure.weight_bytes["target"], structure.weight_bytes["draft_int4"]
    packed = sum(linear.model_bytes for linear in structure.linears if linear.draft_bytes)
    dtype = str(structure.dtype).removeprefix("torch.")

    def own(context: int, batch_size: int) -> int:
        parts = cache_parts(structure, options, context, batch_size)
        return sum(parts.values()) - parts["decoded"]

    def dense(itemsize: int, context: int, batch_size: int) -> int:
        full = full_precision_bytes(structure.layers, context, batch_size, structure.dtype, structure.states)
        return full * itemsize // structure.dtype.itemsize

    whole = partial(dense, structure.dtype.itemsize)
    yield Way("quantspec", target + draft, own)
    yield Way(f"{dtype} weights, {dtype} cache", target, whole)
    if structure.dtype.itemsize > 1:
        yield Way(f"{dtype} weights, FP8 cache", target, partial(dense, 1))
    if packed:
        yield Way(f"INT4 weights only, {dtype} cache", target - packed + draft, whole)


def fit(
    structure: Structure, options: QuantSpecConfig, card: Card, utilization: float, context: int, batch_size: int
) -> dict[str, Any]:
    """What fits ``card``, JSON-ready; bytes everywhere."""
    room = utilization * card.bytes
    limit = options.max_cache_len or structure.max_len or _MOST_TOKENS
    every = list(ways(structure, options))
    lengths = [
        (texts, most_that_fits(lambda tokens, texts=texts: every[0].total(tokens, texts), room, limit))
        for texts in _SEQUENCES
    ]
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
                "largest_context": most_that_fits(lambda tokens, way=way: way.total(tokens, batch_size), room, limit),
                "largest_batch_size": most_that_fits(
                    lambda texts, way=way: way.total(context, texts), room, _MOST_SEQUENCES
                ),
            }
            for way in every
        ],
        "server": [{"max_sequences": texts, "max_length": length} for texts, length in lengths if length],
    }
