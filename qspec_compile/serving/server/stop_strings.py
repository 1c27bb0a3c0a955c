"""Stop strings, matched on text as it comes."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one.

    Of several that are found in the same text, the one that begins first counts.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Take ``text``; returns what is no part of a stop string, of all that is held."""
        self._held += text
        places = [place for string in self._strings if (place := self._held.find(string)) >= 0]
        if places:
            self.found = True
            released, self._held = self._held[: min(places)], ""
            return released
        first = max(0, len(self._held) - self._longest + 1)
        begun = (
            place
            for place in range(first, len(self._held))
            if any(string.startswith(self._held[place:]) for string in self._strings)
        )
        place = next(begun, len(self._held))
        released, self._held = self._held[:place], self._held[place:]
        return released

    def flush(self) -> str:
        """What is held, since no more text comes."""
        released, self._held = self._held, ""
        return released
