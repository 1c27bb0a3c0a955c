"""How a call that warms up ends; a module of its own, since the ranks of a pair that is split are sent it."""

from __future__ import annotations

from transformers import MaxLengthCriteria


class FirstFew(MaxLengthCriteria):
    """Ends the text early; of another type than the call's limit, it leaves the room that is made as it is."""
