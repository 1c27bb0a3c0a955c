"""quantspec: quantized self-speculative decoding for any Hugging Face decoder (QuantSpec, arXiv 2502.10424)."""

from importlib.metadata import version

from .cache import CacheFullError
from .config import QuantSpecConfig
from .errors import SavedModelError, SelfCheckError, UnsupportedModelError
from .generate import GenerateOutput
from .loading import from_pretrained
from .model import QuantSpecModel, convert
from .stats import GenerationStats

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
