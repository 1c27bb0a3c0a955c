"""The scheduler of a pair that is split over ranks: what comes is told to all, and every rank takes the same steps."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from quantspec.engine.session import Session
from quantspec.ranks import RanksError, Seat, pickled
from quantspec.tensor_parallel import Split

from .admission import check, prepare
from .requests import FinishReason, Output, Request
from .row import Row
from .scheduler import Scheduler
from .sizes import Sizes

_NUMBERS = itertools.count()


class _New(NamedTuple):
    """A request that the other ranks do not know yet: with a seed, whoever drew it."""

    id: int
    request: Request
    keys: Sequence[bytes]


class _Follower(NamedTuple):
    """What a rank above 0 has of an engine."""

    scheduler: Scheduler
    tokenizer: Any


class SplitScheduler(Scheduler):
    """Rank 0's; the others' follow it.

    Which request gets which place, pages and part of its prompt follows from the requests and their order alone, and
    all ranks see the same logits. So what is told is what comes from outside: new requests and cancelled ones.
    """

    def __init__(self, split: Split, session: Session, sizes: Sizes, tokenizer: Any) -> None:
        """Every rank allocates its cache.

        Raises:
            RanksError: a rank failed or was ended.
        """
        self._split = split
        self._number = next(_NUMBERS)
        self._new: list[_New] = []
        self.done: list[Output] = []
        split.run(_open, self, session, sizes, others=(self._number, split.key, sizes, tokenizer))

    def check(self, request: Request) -> None:
        try:
            pickled(request)
        except Exception as error:
            raise TypeError(
                f"a request cannot be sent to the other ranks ({error}); define the classes of its logits processors "
                "in a module"
            ) from error

    def add(self, row: Row, request: Request) -> None:
        request = replace(request, options={**request.options, "seed": row.request.seed})
        super().add(row, request)
        self._new.append(_New(row.id, request, row.keys))

    def step(self, cancelled: Collection[int]) -> list[Output]:
        new, self._new = self._new, []
        self.done = []
        try:
            self._split.run(_step, self, cancelled, others=(self._number, cancelled, new))
        except RanksError as error:
            # A request that ended in this step is no longer among those that run.
            told = [output if output.error is None else replace(output, error=error) for output in self.done]
            return [*told, *super().end_all(FinishReason.ERROR, error)]
        return self.done

    def capture(self, row: Row, request: Request) -> None:
        self._split.run(_capture, self, row, request, others=(self._number, None, request))

    def end_all(self, reason: FinishReason, error: Exception | None = None) -> list[Output]:
        new, self._new = self._new, []
        # Where they have ended, this rank is left.
        with contextlib.suppress(RanksError):
            return self._split.run(_end_all, self, reason, error, others=(self._number, reason, None, new))
        return super().end_all(reason, error)

    def release(self) -> None:
        with contextlib.suppress(RanksError):
            self._split.run(_release, others=(self._number,))
        super().release()


# What runs on every rank; a number stands for the follower of that.


def _open(seat: Seat, scheduler: SplitScheduler | int, session: Session | int, sizes: Sizes, *tokenizer: Any) -> None:
    if isinstance(scheduler, SplitScheduler):
        Scheduler.__init__(scheduler, session, sizes)
    else:
        seat.kept[_key(scheduler)] = _Follower(Scheduler(seat.kept[session], sizes), *tokenizer)


def _step(
    seat: Seat, scheduler: SplitScheduler | int, cancelled: Collection[int], new: Sequence[_New] = ()
) -> list[Output]:
    outputs = Scheduler.step(_with(seat, scheduler, new), cancelled)
    if isinstance(scheduler, SplitScheduler):
        scheduler.done = outputs
    return outputs


def _capture(seat: Seat, scheduler: SplitScheduler | int, row: Row | None, request: Request) -> None:
    if isinstance(scheduler, SplitScheduler):
        assert row is not None
        Scheduler.capture(scheduler, row, request)
    else:
        follower: _Follower = seat.kept[_key(scheduler)]
        row = _row(follower, _New(0, request, ()))
        row.end(FinishReason.LENGTH)
        follower.scheduler.capture(row, request)


def _end_all(
    seat: Seat,
    scheduler: SplitScheduler | int,
    reason: FinishReason,
    error: Exception | None,
    new: Sequence[_New] = (),
) -> list[Output]:
    return Scheduler.end_all(_with(seat, scheduler, new), reason, error)


def _release(seat: Seat, number: int | None = None) -> None:
    if number is not None:
        seat.kept.pop(_key(number)).scheduler.release()


def _with(seat: Seat, scheduler: SplitScheduler | int, new: Sequence[_New]) -> Scheduler:
    """This rank's scheduler, which knows of what is ``new``."""
    if isinstance(scheduler, SplitScheduler):
        return scheduler
    follower: _Follower = seat.kept[_key(scheduler)]
    for one in new:
        follower.scheduler.add(_row(follower, one), one.request)
    return follower.scheduler


def _row(follower: _Follower, new: _New) -> Row:
    pair = follower.scheduler.session.pair
    checked = check(pair, new.request, follower.tokenizer, pair.max_len)
    return Row(new.id, prepare(pair, checked), checked.logprobs, new.keys)


def _key(number: int) -> str:
    return f"engine {number}"
