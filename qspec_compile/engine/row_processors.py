"""The logits processors of rows that each have their own, as one list for the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from graphlib import TopologicalSorter
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
        rows: of each row, in an order that does not contradict another row's.
        kind: processors of one kind take one place.
    """
    if all(processors is rows[0] for processors in rows):
        return rows[0]
    places: dict[Hashable, list[LogitsProcessor | None]] = {}
    order: TopologicalSorter[Hashable] = TopologicalSorter()
    for row, processors in enumerate(rows):
        seen: Counter[Hashable] = Counter()
        before: tuple[Hashable, ...] = ()
        for processor in processors:
            kind_of_it = kind(processor)
            place: Hashable = (kind_of_it, seen[kind_of_it])
            seen[kind_of_it] += 1
            order.add(place, *before)
            places.setdefault(place, [None] * len(rows))[row] = processor
            before = (place,)
    merged = LogitsProcessorList()
    for place in _sorted(order):
        first, *others = places[place]
        # One that the caller gave for the whole batch.
        is_shared = first is not None and all(other is first for other in others)
        merged.append(first if is_shared else PerRow(places[place]))
    return merged


def _sorted(order: TopologicalSorter[Hashable]) -> Iterator[Hashable]:
    """In an order that does not depend on the rows'."""
    order.prepare()
    while order.is_active():
        for place in sorted(order.get_ready(), key=str):
            yield place
            order.done(place)
