"""What a cycle proposes: how many tokens, and from where."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Source(StrEnum):
    """Where drafts come from."""

    SELF = "self"
    """The draft's own steps."""
    LOOKUP = "lookup"
    """What followed the newest tokens earlier in the row's own text."""

    # Plans are keys of what the host looks up in every cycle; an enum's own hash takes Python code.
    __hash__ = str.__hash__


class Plan(NamedTuple):
    """A cycle of ``num_drafts`` tokens from ``source``; of none it is plain decoding with the target."""

    num_drafts: int
    source: Source = Source.SELF

    def numbers(self) -> tuple[int, int]:
        """What one rank tells the others."""
        return self.num_drafts, list(Source).index(self.source)

    @classmethod
    def of(cls, num_drafts: int, source: int) -> Plan:
        """The plan of such :meth:`numbers`."""
        return cls(num_drafts, list(Source)[source])


PLAIN = Plan(0)
