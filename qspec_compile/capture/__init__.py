"""Capture of a decoder: transformers' interfaces (``interfaces``), the export, and what is refused (``checks``)."""

from .basic_causes import naming_basic_cause
from .checks import DTYPES, check_head_dims, check_model
from .export import Capture, capture, check_can_convert, converting
from .interfaces import IMPLEMENTATION, CapturedLayer, MaskSpec, Recorder, attending
from .latents import linears_of_latents, with_latents
from .rope import follows_length, rope_at, rope_context_of
from .state import WithState

__all__ = [
    "DTYPES",
    "IMPLEMENTATION",
    "Capture",
    "CapturedLayer",
    "MaskSpec",
    "Recorder",
    "WithState",
    "attending",
    "capture",
    "check_can_convert",
    "check_head_dims",
    "check_model",
    "converting",
    "follows_length",
    "linears_of_latents",
    "naming_basic_cause",
    "rope_at",
    "rope_context_of",
    "with_latents",
]
