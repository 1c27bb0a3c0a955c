"""Processes that compute one model together: how they start, what they tell each other, and how they end."""

from .messages import pickled
from .pool import Ranks, check_can_start
from .seat import RanksError, Seat

__all__ = ["Ranks", "RanksError", "Seat", "check_can_start", "pickled"]
