"""Where the chunks of a prompt end."""

from __future__ import annotations

from typing import NamedTuple


class Chunks(NamedTuple):
    """Chunks as long as all before them together, between a shortest and a longest.

    So a prompt shares about half of what it begins like others with, or more, while a long one is read in few passes.
    Where chunks end depends on nothing but how much lies before them.

    Attributes:
        shortest: tokens of the first chunk, a multiple of G.
        longest: tokens of a chunk at most, too.
    """

    shortest: int
    longest: int

    def end(self, start: int) -> int:
        """Where the chunk ends that begins at ``start``."""
        return start + min(self.longest, max(self.shortest, start))

    def last_end(self, num_tokens: int) -> int:
        """Where the last chunk ends that ``num_tokens`` hold as a whole; 0 without any."""
        end = 0
        while self.end(end) <= num_tokens:
            end = self.end(end)
        return end
