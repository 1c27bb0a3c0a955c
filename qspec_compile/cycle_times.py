"""Where a cycle's time goes, measured."""

from __future__ import annotations

import platform
import statistics
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from .engine.acceptance import Acceptance
from .engine.cycle import Cycle
from .engine.session import Session

_REPEATS = 5


class HasSession(Protocol):
    """A converted model, such as :class:`quantspec.QuantSpecModel`."""

    session: Session


@dataclass(frozen=True)
class CycleTimes:
    """Seconds of one cycle by part.

    Attributes:
        num_drafts: draft steps.
        context: tokens in the cache, of the longest sequence.
        draft: all draft steps together.
        verify: the target's pass over the drafted tokens and the one before them.
        rest: choosing tokens, accepting, moving lengths.
    """

    num_drafts: int
    context: int
    draft: float
    verify: float
    rest: float

    @property
    def total(self) -> float:
        """Seconds of the whole cycle."""
        return self.draft + self.verify + self.rest


def device_name(device: torch.device) -> str:
    """The name of a GPU or of this machine's processor, which times are told with."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def cycle_times(qs: HasSession, num_drafts: int | None = None) -> CycleTimes:
    """Time the parts of a greedy cycle on the cache that the latest ``generate`` call left behind.

    The draft steps, the verification and the whole cycle are timed one after the other, each as it runs in
    ``generate`` (as CUDA graphs where cycles are), and the median of several runs is taken; ``rest`` is what the whole
    takes beyond the two. Flushes, one in G tokens, logits processors and the host's part are not in it. The cached text
    stays as it is; other threads' calls wait.

    Args:
        qs: a pair that has generated.
        num_drafts: draft steps of the cycle; the latest call's ``num_speculative_tokens`` if None.

    Raises:
        ValueError: nothing has been generated, or the cache has no room for that many drafts.
        RuntimeError: called while this thread generates, as by a streamer.
    """
    return time_cycle(qs.session, num_drafts)


@torch.no_grad()
def time_cycle(session: Session, num_drafts: int | None = None) -> CycleTimes:
    """:func:`cycle_times` of the pair that ``session`` belongs to."""
    with session.exclusive():
        return _time_cycle(session, num_drafts)


def _time_cycle(session: Session, num_drafts: int | None) -> CycleTimes:
    cache = session.cache
    if cache is None or session.last_stats is None or not bool(cache.length.any()):
        raise ValueError("no cache to measure on: call generate() first")
    count = session.last_stats.num_speculative_tokens if num_drafts is None else num_drafts
    if not 0 <= count <= cache.num_speculative_tokens:
        raise ValueError(f"num_drafts must be between 0 and {cache.num_speculative_tokens}, as generated; not {count}")
    acceptance = Acceptance(lambda logits, _: logits.float(), session.pair.captures_cycles)
    cycle = Cycle(session.pair, cache, acceptance)
    # Cycles of sequences that are all done move no length, and write past the verified tokens only.
    cycle.running.zero_()
    drafts = cycle.pending.new_zeros(cache.batch_size, count)
    draft = _seconds(session, lambda: cycle.draft(count)) if count else 0.0
    verify = _seconds(session, lambda: cycle.verify(drafts))
    whole = _seconds(session, lambda: cycle(count))
    return CycleTimes(count, int(cache.length.max()), draft, verify, max(0.0, whole - draft - verify))


def _seconds(session: Session, call: Callable[[], object]) -> float:
    """Median duration of ``call``."""
    device = session.pair.device
    if session.replays.suit():
        from triton.testing import do_bench_cudagraph

        # It measures on a stream of its own.
        torch.cuda.synchronize(device)
        return do_bench_cudagraph(call, return_mode="median") / 1000

    def finished() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    finished()
    return statistics.median(timeit.repeat(finished, number=1, repeat=_REPEATS))
