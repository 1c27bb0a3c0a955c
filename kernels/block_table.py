"""Block tables: planes and scales of many sequences in one pool, shared where their beginnings are.

Without a table, group n of sequence b is at ``part[b, :, n]``. With one, ``(B, N)`` int32, it is in the pool's block
``table[b, n]``: at ``part[0, :, table[b, n]]`` of every plane and scale of every layer. A table without elements stands
for none.
"""

from __future__ import annotations

from typing import NamedTuple

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


def groups_of(block_table: Tensor | None, sequence: int, first: int, last: int) -> Groups:
    """Where the groups ``first`` to ``last`` of a sequence are."""
    if block_table is None or not is_paged(block_table):
        return Groups(sequence, slice(first, last))
    return Groups(0, block_table[sequence, first:last].long())


def strides(part: Tensor, block_table: Tensor | None) -> tuple[int, ...]:
    """Of a plane or scale ``(B, K, N, ...)``, as a kernel steps through it: all sequences have a pool in common."""
    return (0, *part.stride()[1:]) if is_paged(block_table) else part.stride()


def launched(block_table: Tensor | None, unused: Tensor) -> tuple[Tensor, int, bool]:
    """What a kernel takes of a table: it or any tensor, the stride of its sequences, and whether there is one."""
    if block_table is None or not is_paged(block_table):
        return unused, 0, False
    return block_table, block_table.stride(0), True
