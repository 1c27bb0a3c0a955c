"""What keeps a checkpoint from being converted, told from its config alone, before its weights are read."""

from __future__ import annotations

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationMixin, PreTrainedConfig

from quantspec.config import QuantSpecConfig
from quantspec.errors import UnsupportedModelError

# transformers dequantizes these on loading where it cannot run them packed, so they can be asked for dequantized.
DEQUANTIZED_ON_LOADING = ("mxfp4",)


def check_config(config: PreTrainedConfig) -> None:
    """Refuse a checkpoint whose config tells that ``convert`` cannot take its model.

    Raises:
        UnsupportedModelError: an encoder-decoder, an encoder, a model without a language-model head, quantized weights,
            or a RoPE that changes old keys.
    """
    name = ", ".join(config.architectures or [type(config).__name__])
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; quantspec converts decoder-only models")
    # Code of the checkpoint's own brings a class that is not known before.
    own_code = getattr(config, "auto_map", None)
    if not own_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{name} is no causal language model to transformers; quantspec converts what AutoModelForCausalLM loads"
        )
    saved = [getattr(transformers, architecture, None) for architecture in config.architectures or ()]
    if saved and all(isinstance(known, type) and not issubclass(known, GenerationMixin) for known in saved):
        raise UnsupportedModelError(
            f"the checkpoint was saved as {name}, which has no head that generates text; quantspec converts models "
            "saved as AutoModelForCausalLM"
        )
    method = quantization_method(config)
    if method is not None and method not in DEQUANTIZED_ON_LOADING:
        raise UnsupportedModelError(
            f"the checkpoint of {name} is quantized already (quantization_config: {method}); give the model that it "
            "was made from, in float32, float16 or bfloat16: the draft's INT4 weights are made from those"
        )


def known_limit(model_config: PreTrainedConfig, config: QuantSpecConfig) -> int | None:
    """The ``max_cache_len`` that a pair will have, as far as it is known before the model is converted."""
    return config.max_cache_len or getattr(model_config.get_text_config(), "max_position_embeddings", None)


def quantization_method(config: PreTrainedConfig) -> str | None:
    """The method that a checkpoint's ``quantization_config`` names; None where the weights are not quantized."""
    for part in (config, config.get_text_config()):
        description = getattr(part, "quantization_config", None)
        if description:
            return str(description.get("quant_method", "no quant_method named"))
    return None
