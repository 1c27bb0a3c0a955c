"""The check that ``convert`` runs before it returns: the pair against the original model on a short random text."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantspec.passes import Role

from .errors import SelfCheckError

if TYPE_CHECKING:
    from .model import QuantSpecModel

_LOGGER = logging.getLogger(__name__)

# Tokens decoded after the prompt: one by one, then as a block.
_STEPS = (1, 1, 3)
EXACT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
# The INT8 read of the cache may move logits by this much more.
_QUANTIZED_TOLERANCE = 5e-2


def incremental_logits(
    qs: QuantSpecModel, ids: Tensor, prompt_len: int, steps: tuple[int, ...], role: Role = Role.TARGET
) -> Tensor:
    """A role's logits of the last prompt token and of every later one, decoded in blocks of ``steps`` tokens.

    Args:
        qs: the pair; a cache of its own is made for this.
        ids: ``(1, prompt_len + sum(steps))`` int64; the prompt is always prefilled by the target.
        prompt_len: tokens of the prompt, at least 1.
        steps: tokens of each block, one block at least.
        role: target or draft, whose graph decodes the blocks.

    Returns:
        ``(1, 1 + sum(steps), V)`` in the model's dtype.

    Raises:
        CacheFullError: ``ids`` are more than ``max_cache_len``.
    """
    cache = qs.new_cache(1, max(steps))
    cache.reserve(ids.shape[1])

    def positions(start: int, count: int) -> Tensor:
        return torch.arange(start, start + count, device=ids.device)[None]

    prompt = torch.tensor([prompt_len], device=ids.device)
    state = (cache.quantized_len, cache.length, prompt)
    inputs = (ids[:, :prompt_len], positions(0, prompt_len), prompt[:, None] - 1)
    logits = [qs.forward(Role.PREFILL, *inputs, *state, cache=cache)]
    cache.advance_prefill(prompt)
    start = prompt_len
    for count in steps:
        inputs = (ids[:, start : start + count], positions(start, count), positions(0, count))
        logits.append(qs.forward(role, *inputs, cache.quantized_len, cache.length, cache=cache))
        cache.accept(torch.tensor([count], device=ids.device))
        start += count
    return torch.cat(logits, 1)


def self_check(qs: QuantSpecModel) -> None:
    """Compare prefill and incremental decoding with the original model's full forward.

    Once with a text shorter than 2G, where nothing is quantized, and once with a longer one, read at INT8.

    Raises:
        SelfCheckError: naming which comparison failed and by how much.
    """
    _LOGGER.info("checking the pair against the model")
    group = qs.config.kv_group_size
    tolerance = EXACT_TOLERANCE[qs.model.dtype]
    limit = qs.config.max_cache_len or 0
    cases = [("nothing quantized", 7, tolerance), ("quantized cache", 2 * group + 3, tolerance + _QUANTIZED_TOLERANCE)]
    # The CPU's numbers, whatever the default device.
    generator = torch.Generator("cpu").manual_seed(0)
    training = [module for module in qs.model.modules() if module.training]
    qs.model.eval()
    try:
        for name, prompt_len, allowed in cases:
            total = prompt_len + sum(_STEPS)
            if total > limit:
                continue
            ids = torch.randint(0, qs.vocab_size, (1, total), generator=generator, device="cpu").to(qs.device)
            with torch.no_grad():
                ours = incremental_logits(qs, ids, prompt_len, _STEPS).float()
                mask = torch.ones_like(ids)
                expected = (
                    qs.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, prompt_len - 1 :].float()
                )
            error = ((ours - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()
            if not error <= allowed:
                raise SelfCheckError(
                    f"self-check failed ({name}): logits decoded through the cache differ from the model's own by "
                    f"{error:.3g} (allowed {allowed:.3g}). The model keeps state that the cache does not, or its keys "
                    "do not survive quantization; please report it. self_check=False converts anyway"
                )
        qs.frozen.forget_what_running_changed()
    finally:
        for module in training:
            module.training = True
