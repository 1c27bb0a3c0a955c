"""quantspec: quantized self-speculative decoding for Hugging Face decoders (QuantSpec, arXiv 2502.10424)."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .versions import noting_untested_versions

if TYPE_CHECKING:
    from .config import QuantSpecConfig
    from .engine.stats import GenerationStats
    from .errors import CacheFullError, SavedModelError, SelfCheckError, UnsupportedModelError
    from .hugging_face.decode import GenerateOutput
    from .model import QuantSpecModel, convert, from_pretrained

__version__ = version("quantspec")

__all__ = [
    "CacheFullError",
    "GenerateOutput",
    "GenerationStats",
    "QuantSpecConfig",
    "QuantSpecModel",
    "SavedModelError",
    "SelfCheckError",
    "UnsupportedModelError",
    "__version__",
    "convert",
    "from_pretrained",
]

# Loaded on first use: importing torch and transformers takes seconds, and `quantspec --help` needs neither.
_MODULES = {
    "CacheFullError": "errors",
    "GenerateOutput": "hugging_face.decode",
    "GenerationStats": "engine.stats",
    "QuantSpecConfig": "config",
    "QuantSpecModel": "model",
    "SavedModelError": "errors",
    "SelfCheckError": "errors",
    "UnsupportedModelError": "errors",
    "convert": "model",
    "from_pretrained": "model",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'quantspec' has no attribute {name!r}")
    with noting_untested_versions():
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
