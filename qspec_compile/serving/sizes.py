"""How many sequences of which length an engine has, and what its cycles draft, from what a caller says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from quantspec.cache.geometry import planned_groups
from quantspec.config import AUTO, DEFAULT_SPECULATIVE_TOKENS, Draft, QuantSpecConfig, check_num_speculative_tokens
from quantspec.memory import cache_bytes_per_token, expected_memory
from quantspec.model import QuantSpecModel
from quantspec.pair import Pair

from .chunks import Chunks

# Tokens of a sequence on a CPU, if nobody says.
_LENGTH_ON_CPU = 8192
# Tokens between two cycles, if nobody says: on an H200 a shape of 8B reads so many in 0.1 s.
_BATCHED_ON_CPU, _BATCHED_ON_GPU = 1024, 4096
# Tokens of a prompt's first chunk. An H200 reads 1,024 of an 8B shape in 50 ms, and 4,096 in 123.
_CHUNK = 1024


class Sizes(NamedTuple):
    """Of an engine.

    Attributes:
        sequences: that run at once.
        length: most tokens of each.
        chunks: of prompts; the longest has as many tokens as are prefilled between two cycles.
        draft_counts: tokens that a cycle may draft; several where the engine chooses.
        pages: of G tokens, for all sequences together.
    """

    sequences: int
    length: int
    chunks: Chunks
    draft_counts: tuple[int, ...]
    pages: int

    @property
    def num_drafts(self) -> int:
        """Most tokens that a cycle drafts."""
        return max(self.draft_counts)

    @classmethod
    def of(
        cls,
        pair: QuantSpecModel,
        max_sequences: int,
        max_length: int | None,
        max_num_batched_tokens: int | None,
        gpu_memory_utilization: float,
        num_speculative_tokens: int | str | None,
        num_pages: int | None,
    ) -> Sizes:
        """From the options of :class:`quantspec.Engine`, which :func:`check_options` has let pass.

        Raises:
            TypeError, ValueError: an option that cannot be honoured.
        """
        draft_counts = _draft_counts(pair, num_speculative_tokens)
        if not pair.pair.reads_pools:
            raise ValueError(
                f"draft_recipe {pair.config.draft_recipe!r} reads the cache without a block_table, so its sequences "
                "cannot share pages; an engine needs a recipe whose access names it"
            )
        inner, group = pair.pair, pair.config.kv_group_size
        if max_num_batched_tokens is None:
            max_num_batched_tokens = max(group, _BATCHED_ON_GPU if inner.device.type == "cuda" else _BATCHED_ON_CPU)
        if max_num_batched_tokens < group:
            raise ValueError(
                f"max_num_batched_tokens must be at least kv_group_size={group} of the pair, not "
                f"{max_num_batched_tokens}"
            )
        shortest = max(group, min(_CHUNK, max_num_batched_tokens) // group * group)
        chunks = Chunks(shortest, max_num_batched_tokens // group * group)
        if max_length is not None and max_length > inner.max_len:
            raise ValueError(f"max_length={max_length} is more than the pair's max_cache_len={inner.max_len}")
        longest = max_length or (inner.max_len if inner.device.type == "cuda" else min(inner.max_len, _LENGTH_ON_CPU))
        batched = min(chunks.longest, longest)
        pages = num_pages or _num_pages(
            inner, max_sequences, longest, max(draft_counts), batched, gpu_memory_utilization
        )
        # The newest tokens of a text are in no page.
        length = min(longest, (pages + 1) * group)
        if max_length is not None and length < max_length:
            raise ValueError(
                f"max_length={max_length} is more than the {length} tokens that {pages} pages hold; pass a smaller "
                "one, or a larger num_pages or gpu_memory_utilization"
            )
        return cls(max_sequences, length, chunks, draft_counts, pages)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse values of options of :class:`quantspec.Engine`, by name, that it could honour for no pair at all.

    Raises:
        TypeError, ValueError: naming the option.
    """
    for name in ("max_sequences", "max_waiting"):
        if name in options:
            check_positive(name, options[name])
    for name in ("max_length", "max_num_batched_tokens", "num_pages"):
        if options.get(name) is not None:
            check_positive(name, options[name])
    share = options.get("gpu_memory_utilization", 1)
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"gpu_memory_utilization must be a number, not {share!r}")
    if not 0 < share <= 1:
        raise ValueError(f"gpu_memory_utilization must be above 0 and at most 1, not {share}")
    if options.get("num_speculative_tokens") is not None:
        check_num_speculative_tokens(options["num_speculative_tokens"])


def check_draft_of_engine(config: QuantSpecConfig) -> None:
    """Refuse a pair whose drafts come from elsewhere; raises ``ValueError``."""
    if config.draft is not Draft.SELF:
        raise ValueError(
            f"an engine drafts with the pair itself: convert with draft='self', not {config.draft.value!r}"
        )


def check_positive(name: str, value: Any) -> None:
    """Refuse what is no number of things, at least one."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")


def _draft_counts(pair: QuantSpecModel, asked: int | str | None) -> tuple[int, ...]:
    """Tokens that a cycle may draft: with "auto" none, the pair's own number, or half of it.

    Each is captured for every bucket, so there are few.
    """
    check_draft_of_engine(pair.config)
    own = pair.config.num_speculative_tokens
    count = own if asked is None else asked
    if count is None:
        # Where sampled drafts stand by their odds, a seed's text would depend on what was chosen.
        count = DEFAULT_SPECULATIVE_TOKENS if pair.config.rejection_sampling else AUTO
    if isinstance(count, int):
        return (count,)
    most = own if isinstance(own, int) and own else DEFAULT_SPECULATIVE_TOKENS
    return tuple(sorted({0, most // 2, most}))


def _num_pages(
    pair: Pair, sequences: int, length: int, num_drafts: int, batched_tokens: int, utilization: float
) -> int:
    """Pages that ``sequences`` of ``length`` tokens can use or, on a GPU, as many of them as there is room for."""
    useful = max(1, sequences * planned_groups(length, pair.config.kv_group_size, pair.max_len))
    if pair.device.type != "cuda":
        return useful
    fitting = fitting_pages(pair, sequences, num_drafts, batched_tokens, _room(pair.device, utilization))
    if fitting < 1:
        raise ValueError(
            f"gpu_memory_utilization={utilization} leaves no room for {sequences} sequences, and {batched_tokens} "
            "prompt tokens at once, beside the weights; pass more of it, fewer max_sequences, or a smaller "
            "max_num_batched_tokens"
        )
    return min(useful, fitting)


def _room(device: torch.device, utilization: float) -> float:
    """Bytes of a GPU that a cache may take, beside what is there."""
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached - (1 - utilization) * total


def fitting_pages(pair: Pair, max_sequences: int, num_drafts: int, batched_tokens: int, room: float) -> int:
    """Pages that there is room for in so many bytes, beside what each sequence has of its own and what as many prompt
    tokens as are read at once take meanwhile.
    """
    group = pair.config.kv_group_size
    own = expected_memory(
        pair.layers,
        1,
        max_sequences,
        kv_group_size=group,
        num_speculative_tokens=num_drafts,
        dtype=pair.model.dtype,
        device="cuda",
        states=pair.captured.states,
    )
    per_page = sum(cache_bytes_per_token(pair.layers, group).values()) * group
    return int((room - sum(own.values()) - batched_tokens * pair.activation_bytes) // per_page)
