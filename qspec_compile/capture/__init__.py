"""Capture of a decoder: transformers' interfaces (``interfaces``), the export, and what is refused (``checks``)."""

from .checks import DTYPES, check_head_dims, check_model, check_rope
from .export import Capture, capture, converting
from .interfaces import IMPLEMENTATION, CapturedLayer, MaskSpec

__all__ = [
    "DTYPES",
    "IMPLEMENTATION",
    "Capture",
    "CapturedLayer",
    "MaskSpec",
    "capture",
    "check_head_dims",
    "check_model",
    "check_rope",
    "converting",
]
