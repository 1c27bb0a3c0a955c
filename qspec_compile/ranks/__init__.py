"""Processes that compute one model together: how they start, what they tell each other, and how they end."""

from .pool import Ranks
from .seat import RanksError, Seat

__all__ = ["Ranks", "RanksError", "Seat"]
