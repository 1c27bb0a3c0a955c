"""The check that ``convert`` runs before it returns: the pair against the original model on a short random text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .capture.checks import random_text
from .engine.forced_text import read_incrementally
from .errors import SelfCheckError
from .pair import Pair
from .passes import Role

_LOGGER = logging.getLogger(__name__)

# Tokens decoded after the prompt, block by block. Two or more, as in cycles: a block of one is compiled by itself.
_STEPS = (2, 3)
EXACT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
# The INT8 read of the cache may move logits by this much more.
_QUANTIZED_TOLERANCE = 5e-2


class HasPair(Protocol):
    """A converted model, such as :class:`quantspec.QuantSpecModel`."""

    pair: Pair


def incremental_logits(
    qs: HasPair, ids: Tensor, prompt_len: int, steps: Sequence[int], role: Role = Role.TARGET
) -> Tensor:
    """A role's logits of the last prompt token and of every later one, decoded in blocks of ``steps`` tokens.

    Args:
        qs: the converted model; a cache of its own is made for this.
        ids: ``(1, prompt_len + sum(steps))`` int64; the prompt is always prefilled by the target.
        prompt_len: tokens of the prompt, at least 1.
        steps: tokens of each block, one block at least.
        role: target or draft, whose graph decodes the blocks.

    Returns:
        ``(1, 1 + sum(steps), V)`` in the model's dtype.

    Raises:
        CacheFullError: ``ids`` are more than ``max_cache_len``.
    """
    return read_incrementally(qs.pair, ids, prompt_len, steps, role)


def _logits_of(pair: Pair) -> Callable[[Tensor], Tensor]:
    return lambda ids: pair.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def self_check(pair: Pair, logits_of: Callable[[Tensor], Tensor] | None = None) -> None:
    """Compare prefill and incremental decoding with the original model's full forward.

    Once with a text shorter than 2G, where nothing is quantized, and once with a longer one, read at INT8.

    Args:
        pair: what is checked.
        logits_of: logits ``(1, T, V)`` of ids ``(1, T)`` by the original model; the pair's own model if None.

    Raises:
        SelfCheckError: naming which comparison failed and by how much.
    """
    _LOGGER.info("checking the pair against the model")
    group = pair.config.kv_group_size
    tolerance = EXACT_TOLERANCE[pair.model.dtype]
    limit = pair.max_len
    state = "The model keeps state that the cache does not; please report it."
    quantized = "Its keys or values do not survive quantization; a smaller kv_group_size may help."
    cases = [
        ("nothing quantized", 7, tolerance, state),
        ("quantized cache", 2 * group + 3, tolerance + _QUANTIZED_TOLERANCE, quantized),
    ]
    # The CPU's numbers, whatever the default device.
    generator = torch.Generator("cpu").manual_seed(0)
    training = [module for module in pair.model.modules() if module.training]
    pair.model.eval()
    try:
        for name, prompt_len, allowed, reason in cases:
            total = prompt_len + sum(_STEPS)
            if total > limit:
                continue
            ids = random_text(pair.model, pair.vocab_size, (1, total), generator).to(pair.device)
            with torch.no_grad(), pair.rope_held:
                ours = read_incrementally(pair, ids, prompt_len, _STEPS).float()
                expected = (logits_of or _logits_of(pair))(ids)[:, prompt_len - 1 :].float().to(ours.device)
            error = ((ours - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()
            if not error <= allowed:
                raise SelfCheckError(
                    f"self-check failed ({name}): logits decoded through the cache differ from the model's own by "
                    f"{error:.3g} (allowed {allowed:.3g}). {reason} self_check=False converts anyway"
                )
        pair.frozen.forget_what_running_changed()
    finally:
        for module in training:
            module.training = True
