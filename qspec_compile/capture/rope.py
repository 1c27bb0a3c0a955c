"""RoPE that follows the length of the text (``dynamic``, ``longrope``), held still at one length.

Its frequencies change as a text grows, and keys are cached after RoPE: those that are cached already would be wrong. So
one length decides for all texts of a pair, as in other engines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from quantspec.config import QuantSpecConfig

_FOLLOWING = ("dynamic", "longrope")


def rope_types(described: object) -> dict[str | None, str]:
    """Types of a RoPE by kind of layer, under None where all layers share one; empty for what is no description."""
    if isinstance(described, str):
        return {None: described}
    return dict(described) if isinstance(described, dict) else {}


def follows_length(module: nn.Module) -> bool:
    """Whether a module is a RoPE whose frequencies follow the length of the text."""
    types = rope_types(getattr(module, "rope_type", None))
    return any(kind in str(rope_type) for rope_type in types.values() for kind in _FOLLOWING)


def rope_context_of(model: PreTrainedModel, config: QuantSpecConfig) -> int | None:
    """The length that decides the frequencies of ``model`` under these options; None where nothing follows one.

    Raises:
        ValueError: the option is given, and nothing follows it.
    """
    if not any(map(follows_length, model.modules())):
        if config.rope_context is not None:
            raise ValueError(
                f"rope_context={config.rope_context} is for RoPE that depends on the length of a text (dynamic, "
                f"longrope), which {type(model).__name__} does not have; leave it None"
            )
        return None
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return config.rope_context or config.max_cache_len or limit


@contextlib.contextmanager
def rope_at(model: PreTrainedModel, num_tokens: int | None) -> Iterator[None]:
    """Let ``model`` compute every text with the frequencies of one of ``num_tokens``; None leaves it as it is.

    On exit every module is as it was.
    """
    if num_tokens is None:
        yield
        return
    modules = [module for module in model.modules() if follows_length(module)]
    attributes = [dict(vars(module)) for module in modules]
    try:
        for module in modules:
            # Frequencies are replaced or overwritten in place, by version of transformers.
            vars(module)["_buffers"] = {name: buffer.clone() for name, buffer in module._buffers.items()}  # type: ignore[union-attr]
            _hold(module, model, num_tokens)
        yield
    finally:
        for module, before in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(before)


@torch.no_grad()
def _hold(module: nn.Module, model: PreTrainedModel, num_tokens: int) -> None:
    types = rope_types(module.rope_type)
    if model.device.type != "meta":
        x = torch.empty(1, 1, 1, dtype=model.dtype, device=model.device)
        # The first token alone takes back what a longer text has left behind.
        for position in (0, num_tokens - 1):
            for layer_type in types:
                named = {} if layer_type is None else {"layer_type": layer_type}
                module(x, torch.tensor([[position]], device=model.device), **named)
    module.rope_type = "default" if None in types else dict.fromkeys(types, "default")  # type: ignore[assignment]
