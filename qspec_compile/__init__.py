"""quantspec: quantized self-speculative decoding for Hugging Face decoders (QuantSpec, arXiv 2502.10424)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .versions import noting_untested_versions

if TYPE_CHECKING:
    __version__: str

    from . import logging
    from .config import QuantSpecConfig, TuneConfig
    from .engine.stats import GenerationStats
    from .errors import CacheFullError, SavedModelError, SelfCheckError, UnsupportedModelError
    from .hugging_face.decode import GenerateOutput
    from .model import QuantSpecModel, convert, from_pretrained, tune
    from .pair.tuned import TuneReport
    from .ranks import Ranks, RanksError
    from .serving import Engine

__all__ = [
    "CacheFullError",
    "Engine",
    "GenerateOutput",
    "GenerationStats",
    "QuantSpecConfig",
    "QuantSpecModel",
    "Ranks",
    "RanksError",
    "SavedModelError",
    "SelfCheckError",
    "TuneConfig",
    "TuneReport",
    "UnsupportedModelError",
    "__version__",
    "convert",
    "from_pretrained",
    "logging",
    "tune",
]

# Loaded on first use: importing torch and transformers takes seconds, and `quantspec --help` needs neither.
_MODULES = {
    "CacheFullError": "errors",
    "Engine": "serving",
    "GenerateOutput": "hugging_face.decode",
    "GenerationStats": "engine.stats",
    "QuantSpecConfig": "config",
    "QuantSpecModel": "model",
    "Ranks": "ranks",
    "RanksError": "ranks",
    "SavedModelError": "errors",
    "SelfCheckError": "errors",
    "TuneConfig": "config",
    "TuneReport": "pair.tuned",
    "UnsupportedModelError": "errors",
    "convert": "model",
    "from_pretrained": "model",
    "tune": "model",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("quantspec")
    if name == "logging":
        return importlib.import_module(".logging", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module 'quantspec' has no attribute {name!r}")
    with noting_untested_versions():
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
