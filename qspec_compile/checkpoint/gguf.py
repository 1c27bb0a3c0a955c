"""How GGUF files are read."""

from __future__ import annotations

from typing import Any

import transformers


def dense_weights(gguf_file: str | None) -> dict[str, Any]:
    """Arguments with which ``from_pretrained`` dequantizes a GGUF file's weights, whatever else is installed.

    transformers from 5.23 on leaves them packed where it finds a kernel that multiplies them; the versions without
    ``GgufConfig`` always dequantize. Nothing is to be said without a file.
    """
    if gguf_file is None or not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}
