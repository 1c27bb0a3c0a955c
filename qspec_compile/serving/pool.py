"""Pages: which of a pool holds what, whose it is, and what can still be found of it.

A page is a block of the cache's pool, with a group of tokens of one text, in all layers. It is written once, so texts
that begin alike have pages in common, and a count of each is all that takes. What a page of a prompt holds depends on
the tokens up to its end alone: a prompt is prefilled in chunks that begin where its own text says, and at the end of
each but the last everything before is in pages. So the pages of such chunks have keys, by which they are found.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from .chunks import Chunks


def page_keys(tokens: Sequence[int], chunks: Chunks, group: int, salt: str = "") -> list[bytes]:
    """A key for each page of a prompt's chunks but the last: of its tokens, the key before it, and the ``salt``.

    At least ``group`` tokens are left, which stay in full precision.
    """
    key, keys = blake2b(salt.encode(), digest_size=16).digest(), []
    for first in range(0, chunks.last_end(len(tokens) - group), group):
        key = blake2b(key + array("q", tokens[first : first + group]).tobytes(), digest_size=16).digest()
        keys.append(key)
    return keys


class Pool:
    """The pages of a cache. Those that nobody holds are free, and can be found until they are taken."""

    def __init__(self, pages: int) -> None:
        self._counts = [0] * pages
        self._keys: list[bytes | None] = [None] * pages
        self._found: dict[bytes, int] = {}
        # In the order in which they are taken: without a key, and then those that nobody held for longest.
        self._free = OrderedDict.fromkeys(range(pages))

    def __len__(self) -> int:
        """How many pages there are."""
        return len(self._counts)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of these keys, up to the first that is nowhere."""
        pages: list[int] = []
        for key in keys:
            if (page := self._found.get(key)) is None:
                break
            pages.append(page)
        return pages

    def has_room(self, shared: Sequence[int], new: int) -> bool:
        """Whether somebody can hold the pages ``shared`` and take ``new`` ones."""
        return len(self._free) - sum(page in self._free for page in shared) >= new

    def share(self, pages: Iterable[int]) -> None:
        """Hold pages that were found."""
        for page in pages:
            self._free.pop(page, None)
            self._counts[page] += 1

    def take(self, count: int) -> list[int]:
        """Hold pages to write to, which are forgotten; so many must be free."""
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            key, self._keys[page] = self._keys[page], None
            if key is not None:
                del self._found[key]
            self._counts[page] = 1
        return pages

    def publish(self, page: int, key: bytes) -> None:
        """Let a page be found, now that it is written; of two alike the first is."""
        if key not in self._found:
            self._found[key] = page
            self._keys[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Hold them no longer, in the order of a text: its end is forgotten before its beginning."""
        for page in reversed(pages):
            self._counts[page] -= 1
            if not self._counts[page]:
                self._free[page] = None
                if self._keys[page] is None:
                    self._free.move_to_end(page, last=False)
