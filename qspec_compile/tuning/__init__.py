"""Tuning a draft: its scales and zeros learn the target's distribution on text that the target writes itself."""

from .optimize import TuneProgress, tune

__all__ = ["TuneProgress", "tune"]
