"""Serving: requests that join and leave a running batch."""

from .engine import Engine
from .requests import EngineStatistics, FinishReason, Output, Request, TokenLogprobs

__all__ = ["Engine", "EngineStatistics", "FinishReason", "Output", "Request", "TokenLogprobs"]
