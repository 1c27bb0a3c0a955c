"""Real models and texts to measure on, and parity with the original model.

Importing registers lm-eval's model ``quantspec`` where lm-eval is installed.
"""

import importlib.util

from .qwen_coder import load_qwen_coder
from .smollm2 import load_smollm2
from .texts import python_reference

if importlib.util.find_spec("lm_eval") is not None:
    # get_model() fills an empty registry only, so lm-eval's own models must be in it before ours.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    model_registry.register("quantspec", target="quantspec.evals.adapter:QuantSpecLM")

__all__ = ["load_qwen_coder", "load_smollm2", "python_reference"]
