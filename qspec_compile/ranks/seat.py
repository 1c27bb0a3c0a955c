"""A process's seat among the ranks: its number, its device, and how it learns what rank 0 decides."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from quantspec.kernels.ranks import forget_memory, share_memory
from quantspec.passes.shard_linears import Place

# Of a rank that waits for another one that neither answers nor ends; whose process ends is noticed at once.
_LONGEST_WAIT = timedelta(minutes=10)


# Numbers that rank 0 tells with one message.
_TOLD_AT_ONCE = 63


class Abandoned(Exception):
    """Rank 0 has given up what the ranks do together, by an error of its own."""


class RanksError(RuntimeError):
    """A rank failed or was ended, and with it all of them; the message names it and the cause."""


def ended(cause: str) -> RanksError:
    """The error of work that is asked of ranks that have ended."""
    return RanksError(f"the ranks have ended: {cause}. Convert or load the model again")


@dataclass
class Seat:
    """What a function that runs on every rank is given.

    Attributes:
        place: number, count and process group.
        device: of this rank's weights and cache.
        kept: what functions leave here for those that run after them.
        at_work: whether the ranks run something together now.
        shares_memory: whether short sums go through memory that the ranks share.
        cause: why the ranks have ended; None while they have not.
    """

    place: Place
    device: torch.device
    kept: dict[Any, Any] = field(default_factory=dict)
    at_work: bool = True
    shares_memory: bool = False
    cause: str | None = None

    @property
    def decides(self) -> bool:
        """Whether this is rank 0, whose choices the others follow."""
        return self.place.rank == 0

    def check_at_work(self) -> None:
        """Refuse what this rank would do alone: it would wait for the others.

        Raises:
            RuntimeError: the ranks run nothing together now.
        """
        if not self.at_work:
            raise RuntimeError(
                "this pair is split over ranks, which run generate(), reset() and an engine's requests together; for "
                "anything else convert the model without tensor_parallel"
            )

    def wait_for_device(self) -> None:
        """Return when the device has done what was asked of it, which another rank's end may keep it from.

        Raises:
            RanksError: another rank has ended.
        """
        event = torch.cuda.Event()
        event.record()
        while not event.query():
            if self.cause is not None:
                raise ended(self.cause)

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """Rank 0's ``numbers``, of which every rank brings as many.

        Raises:
            Abandoned: rank 0 has given up what they do together.
        """
        self.check_at_work()
        first, rest = list(numbers[:_TOLD_AT_ONCE]), list(numbers[_TOLD_AT_ONCE:])
        told = self._tell([0, *first, *[0] * (_TOLD_AT_ONCE - len(first))])
        if told[0]:
            raise Abandoned
        return told[1 : 1 + len(first)] + (self._tell(rest) if rest else [])

    def abandon(self) -> None:
        """Tell the other ranks, whose next word to this one is :meth:`agree`, that rank 0 gives up."""
        self.check_at_work()
        self._tell([1, *[0] * _TOLD_AT_ONCE])

    def _tell(self, numbers: Sequence[int]) -> list[int]:
        told = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        dist.broadcast(told, 0)
        return told.tolist()


def take_seat(rank: int, world: int, device_type: str, meeting: str) -> Seat:
    """Join the process group of ``world`` ranks that meet at the file ``meeting``; all call this."""
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    # Not every machine lends multicast.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(meeting, world),
        rank=rank,
        world_size=world,
        timeout=_LONGEST_WAIT,
    )
    assert dist.group.WORLD is not None
    seat = Seat(Place(rank, world, dist.group.WORLD.group_name), device)
    if device.type == "cuda":
        seat.shares_memory = share_memory(dist.group.WORLD, device)
    return seat


def leave_seat(seat: Seat) -> None:
    """Give up what :func:`take_seat` took."""
    seat.kept.clear()
    forget_memory(seat.place.group)
    dist.destroy_process_group()
