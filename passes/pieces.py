"""Which part of a tensor one of several ranks holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]
"""Indices from each first to before each last, in order."""


@dataclass(frozen=True)
class Piece:
    """A part of a tensor along one axis.

    Attributes:
        axis: counted from the end, so below 0.
        ranges: what is held of it, side by side.
        size: of the whole axis.
        is_zero: the whole is held, as zeros: another rank adds it to the sum.
    """

    axis: int
    ranges: Ranges
    size: int
    is_zero: bool = False

    def of(self, whole: Tensor) -> Tensor:
        """The piece of a ``whole`` tensor: a view where it is one range, zeros, or a copy."""
        if self.is_zero:
            return torch.zeros_like(whole)
        parts = [whole.narrow(self.axis, first, last - first) for first, last in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.axis)

    def nbytes_of(self, whole: Tensor) -> int:
        """Bytes of the piece."""
        return whole.nbytes if self.is_zero else whole.nbytes // self.size * length(self.ranges)


def length(ranges: Ranges) -> int:
    """Indices in ``ranges``."""
    return sum(last - first for first, last in ranges)


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """What is in any of ``ranges``, in order; neighbours are joined."""
    joined: list[list[int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], last)
        else:
            joined.append([first, last])
    return tuple((first, last) for first, last in joined)


def even(size: int, rank: int, world: int) -> Ranges:
    """The share of ``rank``; ``size`` is a multiple of ``world``."""
    share = size // world
    return ((rank * share, (rank + 1) * share),)


def overlapping(size: int, rank: int, world: int) -> Ranges:
    """As many of ``size`` for each rank, which together are all; the last one shares some with the one before."""
    share = -(-size // world)
    first = min(rank * share, size - share)
    return ((first, first + share),)


def scaled(ranges: Ranges, factor: int, divisor: int) -> Ranges | None:
    """Every bound times ``factor / divisor``; None where that is no integer."""
    if any(bound * factor % divisor for pair in ranges for bound in pair):
        return None
    return tuple((first * factor // divisor, last * factor // divisor) for first, last in ranges)


def within(ranges: Ranges, start: int, stop: int) -> Ranges:
    """What lies in ``start..stop``, counted from ``start``."""
    cut = ((max(first, start) - start, min(last, stop) - start) for first, last in ranges)
    return tuple((first, last) for first, last in cut if first < last)


def place_of(ranges: Ranges, index: int) -> int:
    """How many of ``ranges`` lie before ``index``: its place in what is held."""
    return sum(max(0, min(last, index) - first) for first, last in ranges)
