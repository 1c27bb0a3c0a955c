"""How many sequences of which length an engine has, and what its cycles draft, from what a caller says."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from quantspec.config import Draft, check_num_speculative_tokens
from quantspec.memory import expected_memory, most_that_fits
from quantspec.model import QuantSpecModel
from quantspec.pair import Pair

# Tokens of a sequence on a CPU, if nobody says.
_LENGTH_ON_CPU = 8192


class Sizes(NamedTuple):
    """Of an engine.

    Attributes:
        sequences: that run at once.
        length: most tokens of each.
        chunk: tokens of a prompt that are prefilled between two cycles, a multiple of G.
        num_drafts: of each cycle.
    """

    sequences: int
    length: int
    chunk: int
    num_drafts: int

    @classmethod
    def of(
        cls,
        pair: QuantSpecModel,
        max_sequences: int,
        max_length: int | None,
        max_num_batched_tokens: int,
        gpu_memory_utilization: float,
        num_speculative_tokens: int | None,
    ) -> Sizes:
        """From the options of :class:`quantspec.Engine`.

        Raises:
            TypeError, ValueError: an option that cannot be honoured.
        """
        check_positive("max_sequences", max_sequences)
        check_positive("max_num_batched_tokens", max_num_batched_tokens)
        if isinstance(gpu_memory_utilization, bool) or not isinstance(gpu_memory_utilization, int | float):
            raise TypeError(f"gpu_memory_utilization must be a number, not {gpu_memory_utilization!r}")
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be above 0 and at most 1, not {gpu_memory_utilization}")
        num_drafts = _num_drafts(pair, num_speculative_tokens)
        inner, group = pair.pair, pair.config.kv_group_size
        if max_num_batched_tokens < group:
            raise ValueError(
                f"max_num_batched_tokens must be at least kv_group_size={group} of the pair, not "
                f"{max_num_batched_tokens}"
            )
        if max_length is None:
            max_length = _default_length(inner, max_sequences, num_drafts, gpu_memory_utilization)
        else:
            check_positive("max_length", max_length)
        if max_length > inner.max_len:
            raise ValueError(f"max_length={max_length} is more than the pair's max_cache_len={inner.max_len}")
        return cls(max_sequences, max_length, max_num_batched_tokens // group * group, num_drafts)


def check_positive(name: str, value: Any) -> None:
    """Refuse what is no number of things, at least one."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")


def _num_drafts(pair: QuantSpecModel, asked: int | None) -> int:
    """Tokens drafted per cycle."""
    if pair.config.draft is not Draft.SELF:
        raise ValueError(
            f"an engine drafts with the pair itself: convert with draft='self', not {pair.config.draft.value!r}"
        )
    count = pair.config.num_speculative_tokens if asked is None else asked
    check_num_speculative_tokens(count)
    if isinstance(count, str):
        raise ValueError(f"an engine drafts a fixed number of tokens, not {count!r}: pass num_speculative_tokens=4")
    return count


def _default_length(pair: Pair, max_sequences: int, num_drafts: int, utilization: float) -> int:
    """Most tokens of a sequence, if nobody says."""
    if pair.device.type != "cuda":
        return min(pair.max_len, _LENGTH_ON_CPU)
    length = fitting_length(pair, max_sequences, num_drafts, _room(pair.device, utilization))
    if length == 0:
        raise ValueError(
            f"gpu_memory_utilization={utilization} leaves no room for {max_sequences} sequences beside the weights; "
            "pass more of it, or fewer max_sequences"
        )
    return length


def _room(device: torch.device, utilization: float) -> float:
    """Bytes of a GPU that a cache may take, beside what is there."""
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached - (1 - utilization) * total


def fitting_length(pair: Pair, max_sequences: int, num_drafts: int, room: float) -> int:
    """Most tokens that each of so many sequences can have in ``room`` bytes; 0 if not even a group fits."""
    group = pair.config.kv_group_size

    def bytes_of(groups: int) -> int:
        needed = expected_memory(
            pair.layers,
            min(groups * group, pair.max_len),
            max_sequences,
            kv_group_size=group,
            num_speculative_tokens=num_drafts,
            dtype=pair.model.dtype,
            max_cache_len=pair.max_len,
            device=pair.device,
            states=pair.captured.states,
        )
        return sum(needed.values())

    return min(most_that_fits(bytes_of, room, -(-pair.max_len // group)) * group, pair.max_len)
