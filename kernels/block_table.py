"""Where groups of tokens are: in planes of each sequence's own, or in one pool, shared where texts begin alike.

Without a table, group n of sequence b is at ``part[b, :, n % N]`` of planes and scales that have N places. A layer with
a window has places for the groups that it sees, and a new one takes that of the oldest: the places are a ring. With a
table, ``(B, N)`` int32, group n is in the pool's block ``table[b, n]``: at ``part[0, :, table[b, n]]`` of every plane
and scale of every layer. A table without elements stands for none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Where groups of one sequence are: at ``part[row][:, places]``, in order, to read and to write."""

    row: int
    places: slice | Tensor

    def of(self, part: Tensor) -> Tensor:
        """``(K, n, ...)`` of a part ``(B, K, N, ...)``; a copy where they lie in a pool."""
        return part[self.row][:, self.places]


def is_paged(block_table: Tensor | None) -> bool:
    """Whether there is a table."""
    return block_table is not None and block_table.shape[1] > 0


def num_places(part: Tensor, block_table: Tensor | None) -> int:
    """Groups of one sequence that there are places for at once; ``part`` is any plane or scale ``(B, K, N, ...)``."""
    return block_table.shape[1] if block_table is not None and is_paged(block_table) else part.shape[2]


def groups_of(part: Tensor, block_table: Tensor | None, sequence: int, first: int, last: int) -> Groups:
    """Where the groups ``first`` to ``last`` of a sequence are; ``part`` is any plane or scale ``(B, K, N, ...)``."""
    if block_table is not None and is_paged(block_table):
        return Groups(0, block_table[sequence, first:last].long())
    places = part.shape[2]
    begin = first % max(1, places)
    if begin + last - first <= places:
        return Groups(sequence, slice(begin, begin + last - first))
    return Groups(sequence, torch.arange(first, last, device=part.device) % places)


def strides(part: Tensor, block_table: Tensor | None) -> tuple[int, ...]:
    """Of a plane or scale ``(B, K, N, ...)``, as a kernel steps through it: all sequences have a pool in common."""
    return (0, *part.stride()[1:]) if is_paged(block_table) else part.stride()


def launched(block_table: Tensor | None, unused: Tensor) -> tuple[Tensor, int, bool]:
    """What a kernel takes of a table: it or any tensor, the stride of its sequences, and whether there is one."""
    if block_table is None or not is_paged(block_table):
        return unused, 0, False
    return block_table, block_table.stride(0), True
