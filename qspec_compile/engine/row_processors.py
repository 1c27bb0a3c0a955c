"""The logits processors of rows that each have their own, as one list for the batch."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList


class PerRow(LogitsProcessor):
    """A processor of each row; None leaves its row as it is."""

    def __init__(self, rows: Sequence[LogitsProcessor | None]) -> None:
        self.rows = tuple(rows)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """``(B, V)`` scores of the token that follows each row of ``(B, S)`` ids."""
        parts = zip(self.rows, input_ids.split(1), scores.split(1), strict=True)
        processed: list[Tensor] = [part if own is None else own(ids, part) for own, ids, part in parts]
        return cast(torch.FloatTensor, torch.cat(processed))


def merge_rows(rows: Sequence[LogitsProcessorList], kind: Callable[[LogitsProcessor], Hashable]) -> LogitsProcessorList:
    """One list that does to each row what its own does; rows whose processors are alike need none but these.

    Args:
        rows: of each row, in its order.
        kind: processors of one kind share a place where the rows' orders allow it.
    """
    if all(processors is rows[0] for processors in rows):
        return rows[0]
    waiting = [deque(_numbered(processors, kind)) for processors in rows]
    merged = LogitsProcessorList()
    while any(waiting):
        next_ones = {queue[0][0] for queue in waiting if queue}
        later = {place for queue in waiting for place, _ in itertools.islice(queue, 1, None)}
        # The choice does not depend on the order of rows. Where their orders contradict, one takes a second place.
        place = min(next_ones - later or next_ones, key=str)
        taken = [queue.popleft()[1] if queue and queue[0][0] == place else None for queue in waiting]
        first, *others = taken
        # One that the caller gave for the whole batch.
        is_shared = first is not None and all(other is first for other in others)
        merged.append(first if is_shared else PerRow(taken))
    return merged


def _numbered(
    processors: LogitsProcessorList, kind: Callable[[LogitsProcessor], Hashable]
) -> Iterator[tuple[Hashable, LogitsProcessor]]:
    """Each with its kind, and how many of that kind are before it."""
    seen: Counter[Hashable] = Counter()
    for processor in processors:
        kind_of_it = kind(processor)
        yield (kind_of_it, seen[kind_of_it]), processor
        seen[kind_of_it] += 1
