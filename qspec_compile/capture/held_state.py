"""What transformers' own cache would hold of a model, read off without computing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PreTrainedModel

from quantspec.cache.geometry import HeldState

from .state import keeps_state

_LOGGER = logging.getLogger(__name__)


def held_states(model: PreTrainedModel, windows: Sequence[int]) -> Sequence[HeldState | None]:
    """What the cache that transformers makes for ``model`` holds, read off two lengths of text without computing.

    One for each attention call; layers of that cache that hold nothing are left out, and calls beyond the rest hold
    nothing. None for all where the model does not run so. ``windows``: tokens that each call sees, or 0 for all.
    """
    num_calls, lengths = len(windows), (2, _long_text(model, windows))
    try:
        short, long = (_held_elements(model, num_tokens) for num_tokens in lengths)
    except Exception as error:
        _LOGGER.debug("what transformers' cache would hold is not known: %s", error)
        return [None] * num_calls
    states = [
        HeldState(few // lengths[0], 0 if many == few // lengths[0] * lengths[1] else many * lengths[0] // few)
        for few, many in zip(short, long, strict=True)
        if few
    ]
    return [*states, *[HeldState(0, 0)] * (num_calls - len(states))]


def _long_text(model: PreTrainedModel, windows: Sequence[int]) -> int:
    """Tokens of a text beyond every window."""
    config = model.config.get_text_config()

    def told(*names: str) -> list[int]:
        return [value for value in (getattr(config, name, None) for name in names) if value]

    limit = next(iter(told("max_position_embeddings", "max_seq_len")), 2**20)
    # States are computed token by token or chunk by chunk, which takes long for a long text even without data.
    beyond = 2 * max([16, *told("sliding_window", "attention_chunk_size"), *windows]) if keeps_state(model) else limit
    return min(limit, beyond)


def _held_elements(model: PreTrainedModel, num_tokens: int) -> list[int]:
    """Elements of the tensors in each layer of transformers' cache after a text of ``num_tokens``."""
    try:
        cache = _meta_cache(model, num_tokens)
    except Exception:
        # Some models read how many tokens each expert gets, or hold tensors that are no buffers.
        cache = _fake_cache(model, num_tokens)
    cache = getattr(cache, "self_attention_cache", cache)
    # Scalars are lengths and the like.
    tensors = [[x for x in vars(layer).values() if isinstance(x, Tensor) and x.dim() > 1] for layer in cache.layers]
    return [sum(x.numel() for x in held) for held in tensors]


def _meta_cache(model: PreTrainedModel, num_tokens: int) -> Any:
    """transformers' cache of a text, on the meta device; many times faster than with fake tensors."""
    # By places, each once: torch does not give a module that stands twice its own tensors back.
    tensors = {
        f"{path}.{name}".removeprefix("."): tensor.to("meta")
        for path, module in model.named_modules()
        for name, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    }
    ids = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": True}
    return _cache(torch.func.functional_call(model, tensors, kwargs=options, tie_weights=False))


def _fake_cache(model: PreTrainedModel, num_tokens: int) -> Any:
    """The same with fake tensors, whose values may be asked for."""
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(allow_scalar_outputs=True)):
        ids = torch.zeros(1, num_tokens, dtype=torch.long, device=model.device)
        return _cache(model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True))


def _cache(output: Any) -> Any:
    # transformers warns of the name that earlier versions had alone.
    return output.cache if hasattr(output, "cache") else output.past_key_values
