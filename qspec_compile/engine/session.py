"""What the calls of one pair share: the cache and the text it holds, captured cycles, draft counts, statistics."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quantspec.cache import HierarchicalCache
from quantspec.config import Draft
from quantspec.locks import LockOfProcess
from quantspec.pair import Pair

from .acceptance import Rule
from .cycle_graph import CycleReplays
from .draft_count import AutoDraftCount, DraftCount, FixedDraftCount
from .durations import ON_CPU, ON_GPU
from .known_times import KnownTimes
from .sampling import accept
from .stats import GenerationStats


class _Turns:
    """Lets one call at a time use what the calls of a pair share; a copy of the pair takes turns of its own."""

    def __init__(self) -> None:
        self._lock = LockOfProcess(threading.RLock)
        self._taken_in: int | None = None

    def __reduce__(self) -> tuple[type[_Turns], tuple[()]]:
        return _Turns, ()

    @contextlib.contextmanager
    def take(self) -> Iterator[bool]:
        """Wait for the others; gives whether this process was forked while its parent was using what is shared."""
        with self._lock():
            process = os.getpid()
            # Other threads wait above, so this one asks a second time.
            if self._taken_in == process:
                raise RuntimeError(
                    "the pair is generating: a streamer, logits processor or stopping criterion cannot use its cache; "
                    "call it after generate(), or convert a second pair"
                )
            forked, self._taken_in = self._taken_in is not None, process
            try:
                yield forked
            finally:
                self._taken_in = None


class Session:
    """One cache at a time, used by one call at a time.

    Attributes:
        pair: whose cache it is.
        rule: which drafts stand.
        cache: of the call before, whatever it holds; None before the first and after a release.
        replays: captured cycles on that cache.
        last_stats: of the call that ended last, also if it was interrupted; None before the first.
    """

    def __init__(self, pair: Pair, rule: Rule = accept) -> None:
        self.pair = pair
        self.rule = rule
        self.cache: HierarchicalCache | None = None
        self.replays = CycleReplays(pair, rule)
        self.last_stats: GenerationStats | None = None
        self._texts: list[Tensor] | None = None
        self._auto_counts: dict[tuple[Draft, int, bool, int], AutoDraftCount] = {}
        self._turns = _Turns()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the cache, its replays and ``last_stats`` against other threads, which wait.

        Raises:
            RuntimeError: this thread holds them already.
        """
        with self._turns.take() as forked:
            if forked:
                # The copy of the cache is half written.
                self.release()
            yield

    def acquire_cache(
        self, prompts: Sequence[Tensor], num_speculative_tokens: int, continue_cache: bool = False
    ) -> HierarchicalCache:
        """The cache of the previous call if it fits, else a new one in its place; for :meth:`exclusive` use.

        It is empty, or with ``continue_cache`` holds what the previous text and the prompts begin with, except for the
        last token of a prompt, whose logits are needed.
        """
        cache, self._texts, texts = self.cache, None, self._texts
        if cache is None or cache.batch_size != len(prompts) or cache.num_speculative_tokens < num_speculative_tokens:
            # The old storage is released before the new one is taken.
            self.cache = cache = texts = None
            self.replays.clear()
            self.cache = cache = self.pair.new_cache(len(prompts), num_speculative_tokens)
        if continue_cache and texts is not None and self.pair.continues:
            same = [_common_prefix(text, prompt[:-1]) for text, prompt in zip(texts, prompts, strict=True)]
            cache.rewind(torch.minimum(cache.length, torch.stack(same)))
        else:
            cache.reset()
        return cache

    def keep_texts(self, texts: list[Tensor]) -> None:
        """Remember which ``texts`` the cache holds (but for the newest token), for ``continue_cache``."""
        self._texts = texts

    def release(self) -> None:
        """Give the cache and its replays back; for :meth:`exclusive` use."""
        self.cache = self._texts = None
        self.replays.clear()

    def draft_count(
        self, num_speculative_tokens: int | str, draft: Draft, batch_size: int, prompt_len: int, in_lockstep: bool
    ) -> DraftCount:
        """Who decides how much is drafted; "auto" learns per batch size and power of two of the prompt length.

        ``in_lockstep`` tells whether rows advance as one.
        """
        costs = ON_CPU if self.pair.device.type == "cpu" else ON_GPU
        if not isinstance(num_speculative_tokens, str):
            return FixedDraftCount(num_speculative_tokens, draft, costs, in_lockstep and batch_size > 1)
        key = (draft, batch_size, in_lockstep, prompt_len.bit_length())
        if key not in self._auto_counts:
            # Where nothing is captured a plan costs nothing to try.
            kept = self.replays.suit()
            times = KnownTimes(self.pair, batch_size, 1 << prompt_len.bit_length(), in_lockstep) if kept else None
            self._auto_counts[key] = AutoDraftCount(costs, draft, times)
        return self._auto_counts[key]


def _common_prefix(text: Tensor, prompt: Tensor) -> Tensor:
    """Number of tokens that both begin with."""
    shorter = min(len(text), len(prompt))
    return (text[:shorter] == prompt[:shorter]).long().cumprod(0).sum()
