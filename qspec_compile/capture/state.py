"""State that is not keys and values: convolutions and recurrences of a decoder, as transformers' own cache holds them.

The layers of that cache hold such states by name. A capture of one token takes them as inputs and gives them back as
outputs; a prefill sets them before a forward and reads them after it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, cache_utils

from quantspec.cache.geometry import StateShape
from quantspec.errors import UnsupportedModelError

from .basic_causes import NO_ATTENTION
from .interfaces import StateError
from .opaque import telling_data_dependence
from .token_flow import flow_from

_KINDS = ("conv_states", "recurrent_states")


def keeps_state(model: PreTrainedModel) -> bool:
    """Whether transformers' cache of ``model`` holds more than keys and values, told from its config."""
    try:
        layers = DynamicCache(config=model.config).layers
    except AttributeError:
        # A config of several decoders, for which transformers makes no such cache.
        return False
    return any(map(_is_stateful, layers))


@torch.no_grad()
def state_shapes(model: PreTrainedModel, num_tokens: int = 2) -> tuple[StateShape, ...]:
    """What transformers' cache of ``model`` holds besides keys and values, in the order of its layers.

    Told by running it on ``num_tokens`` tokens.
    """
    if not keeps_state(model):
        return ()
    if not any(isinstance(layer, cache_utils.CacheLayerMixin) for layer in DynamicCache(config=model.config).layers):
        raise StateError(NO_ATTENTION)
    ids = torch.zeros(1, num_tokens, dtype=torch.long, device=model.device)
    cache = DynamicCache(config=model.config)
    try:
        # Without a mask, whose values tensors on the meta device do not have.
        with flow_from(ids):
            model(input_ids=ids, **{_cache_name(model): cache}, use_cache=True)
    except UnsupportedModelError:
        raise
    except Exception:
        own = model(input_ids=ids, use_cache=True)
        if type(getattr(own, "past_key_values", None)) is DynamicCache:
            raise
        # A cache of the model's own; what mixes its tokens is found at its capture.
        return ()
    return tuple(
        StateShape(layer, kind, index, tuple(state.shape[1:]), state.dtype)
        for layer, kind, index, state in _states(cache)
    )


def _cache_name(model: PreTrainedModel) -> str:
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _logits(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, cache: DynamicCache) -> Tensor:
    # An explicit mask keeps transformers from reading packed sequences out of the positions.
    mask = torch.ones_like(input_ids)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
    with telling_data_dependence():
        return model(**inputs, **{_cache_name(model): cache}, use_cache=True).logits


class WithState(nn.Module):
    """The decoder as a function of token ids, positions and states; also returns the states after the tokens."""

    def __init__(self, model: PreTrainedModel, shapes: Sequence[StateShape]) -> None:
        super().__init__()
        self.model = model
        self.shapes = shapes

    def forward(self, input_ids: Tensor, position_ids: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Logits ``(B, T, V)``, and the states, which are ``(B, ...)`` as those that are given."""
        cache = DynamicCache(config=self.model.config)
        for shape, state in zip(self.shapes, states, strict=True):
            _set(cache.layers[shape.layer], shape, state.clone())
        logits = _logits(self.model, input_ids, position_ids, cache)
        return logits, *(getattr(cache.layers[shape.layer], shape.kind)[shape.index] for shape in self.shapes)


def _is_stateful(layer: object) -> bool:
    return isinstance(layer, cache_utils.LinearAttentionCacheLayerMixin)


def _states(cache: Any) -> Iterator[tuple[int, str, int, Tensor]]:
    for number, layer in enumerate(cache.layers):
        for kind in _KINDS if _is_stateful(layer) else ():
            for index, state in getattr(layer, kind).items():
                if state is not None:
                    yield number, kind, index, state


def _set(layer: Any, shape: StateShape, state: Tensor) -> None:
    """Make a state that of the text so far; zeros stand for none."""
    getattr(layer, shape.kind)[shape.index] = state
    getattr(layer, f"is_{shape.kind}_initialized")[shape.index] = True
    layer.has_previous_state[shape.index] = True
    layer.device, layer.dtype = state.device, state.dtype
    if shape.kind == "conv_states":
        layer.conv_kernel_size[shape.index] = state.shape[-1]
