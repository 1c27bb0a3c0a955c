"""Real models and texts to measure on."""

from .smollm2 import load_smollm2
from .texts import python_reference

__all__ = ["load_smollm2", "python_reference"]
