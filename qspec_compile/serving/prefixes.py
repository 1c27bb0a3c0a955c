"""Beginnings of prompts that lie in the places of a cache, also after those who had them prefilled have left.

Planes are written once: a prompt is prefilled in chunks that begin where its own text says, and at the end of each but
the last everything before is in the planes. So what a chunk leaves depends on the tokens up to its end alone, and
another prompt with the same ones can have it copied, from whatever place it lies in.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from hashlib import blake2b
from typing import NamedTuple


def chunk_keys(tokens: Sequence[int], chunk: int, group: int, salt: str = "") -> list[bytes]:
    """A key for each chunk of a prompt that may be shared: of its tokens, all before them, and the ``salt``.

    At least ``group`` tokens are left, which stay in full precision.
    """
    key, keys = blake2b(salt.encode(), digest_size=16).digest(), []
    for first in range(0, (len(tokens) - group) // chunk * chunk, chunk):
        key = blake2b(key + array("q", tokens[first : first + chunk]).tobytes(), digest_size=16).digest()
        keys.append(key)
    return keys


class Move(NamedTuple):
    """A copy of the first ``chunks`` from one place to another; or an exchange of them."""

    source: int
    target: int
    chunks: int
    exchanges: bool = False


class Prefixes:
    """Knows what each place holds.

    Attributes:
        held: of each place, the keys of its chunks from the first on.
    """

    def __init__(self, places: int) -> None:
        self.held: list[list[bytes]] = [[] for _ in range(places)]
        self._used = [0] * places
        self._clock = 0

    def begin(self, place: int, keys: Sequence[bytes], free: Collection[int]) -> tuple[list[Move], int]:
        """Let a prompt begin in a place with as many of its chunks as lie anywhere.

        What the place holds is kept: in exchange for what the prompt goes on with, or in the free place that was used
        least recently, if that is longer ago.

        Args:
            place: of the prompt.
            keys: of its chunks.
            free: places that nobody runs in.

        Returns:
            What to copy, in this order, and how many chunks the place holds then.
        """
        source = max(range(len(self.held)), key=lambda other: (self._common(other, keys), other == place))
        count, kept, used = self._common(source, keys), self.held[place], self._used[place]
        self._clock += 1
        moves = []
        if source == place and count == len(kept):
            kept = []
        elif source in free and count == len(self.held[source]):
            moves.append(Move(source, place, max(count, len(kept)), exchanges=True))
            self.held[source], self._used[source] = kept, used
        else:
            others = [other for other in free if other not in (place, source)]
            other = min(others, key=lambda other: (bool(self.held[other]), self._used[other]), default=place)
            if kept and (not self.held[other] or self._used[other] < used) and not self._is_elsewhere(place):
                moves.append(Move(place, other, len(kept)))
                self.held[other], self._used[other] = kept, used
            if source != place:
                moves.append(Move(source, place, count))
        self.held[place], self._used[place] = list(keys[:count]), self._clock
        return [move for move in moves if move.chunks], count

    def publish(self, place: int, key: bytes) -> None:
        """The next chunk of a place is complete."""
        self.held[place].append(key)

    def _common(self, place: int, keys: Sequence[bytes]) -> int:
        """Chunks that a place and a prompt begin with."""
        pairs = zip(self.held[place], keys, strict=False)
        return next(
            (index for index, (ours, theirs) in enumerate(pairs) if ours != theirs),
            min(len(self.held[place]), len(keys)),
        )

    def _is_elsewhere(self, place: int) -> bool:
        """Whether another place begins with all that this one holds."""
        kept = self.held[place]
        return any(other is not kept and other[: len(kept)] == kept for other in self.held)
