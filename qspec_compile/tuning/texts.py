"""What a draft is tuned on: text that the target samples itself, on from the user's texts or from nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from quantspec.config import TuneConfig
from quantspec.engine.session import Session
from quantspec.hugging_face.decode import decode_checked
from quantspec.hugging_face.rows import Prepared
from quantspec.memory import expected_memory
from quantspec.pair import Pair

_LOGGER = logging.getLogger(__name__)

# Most sequences that are sampled together: the weights are read once for all of them, so drafts would not pay.
_BATCH = 256


def token_ids(texts: Sequence[Any] | None, tokenizer: Any, pair: Pair) -> list[Tensor]:
    """Each text as ``(n,)`` int64 ids on the CPU; texts are strings, or ids in any form.

    Raises:
        TypeError, ValueError: no list of texts, strings without a tokenizer, or ids that the model does not know.
    """
    if texts is None:
        return []
    if isinstance(texts, str | bytes) or not isinstance(texts, Sequence):
        raise TypeError(f"texts must be a list of strings or of token ids, not {type(texts).__name__}")
    if tokenizer is None and any(isinstance(text, str) for text in texts):
        raise ValueError("texts are strings: pass tokenizer= too, or token ids")
    if tokenizer is not None and not callable(tokenizer):
        raise TypeError(f"tokenizer must be a tokenizer of transformers, not {type(tokenizer).__name__}")
    given = (tokenizer(text).input_ids if isinstance(text, str) else text for text in texts)
    ids = [_ids(number, text) for number, text in enumerate(given)]
    ids = [text for text in ids if len(text)]
    if not ids:
        raise ValueError("texts are empty: give some to begin from, or leave texts out")
    for text in ids:
        if text.is_floating_point() or not 0 <= int(text.min()) <= int(text.max()) < pair.vocab_size:
            raise ValueError(f"texts hold token ids that are not in 0..{pair.vocab_size - 1}")
    return [text.long() for text in ids]


def _ids(number: int, text: Any) -> Tensor:
    try:
        return torch.as_tensor(text, device="cpu").flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"texts[{number}] is neither a string nor token ids, but {type(text).__name__}") from error


def beginnings(count: int, texts: Sequence[Tensor], pair: Pair, config: TuneConfig) -> Tensor:
    """Prompts ``(count, P)``: random places of the texts, or one random token behind the model's first."""
    generator = torch.Generator().manual_seed(config.seed)
    if not texts:
        first = pair.model.config.get_text_config().bos_token_id
        prompts = torch.randint(pair.vocab_size, (count, 1), generator=generator)
        return prompts if first is None else torch.cat((torch.full_like(prompts, first), prompts), 1)
    # So long that half of the texts or more have it: one long text does not silence many short ones.
    usual = sorted(map(len, texts))[len(texts) // 2]
    length = min(config.prompt_tokens, text_length(pair, config) // 2, usual)
    used = [text for text in texts if len(text) >= length]
    if unused := len(texts) - len(used):
        _LOGGER.info("%d of %d texts have fewer than %d tokens and are left out", unused, len(texts), length)
    places = torch.tensor([len(text) - length + 1 for text in used])
    ends = places.cumsum(0)
    drawn = torch.randint(int(ends[-1]), (count,), generator=generator)
    chosen = torch.searchsorted(ends, drawn, right=True)
    firsts = drawn - (ends - places)[chosen]
    return torch.stack([used[text][first : first + length] for text, first in zip(chosen, firsts, strict=True)])


def text_length(pair: Pair, config: TuneConfig) -> int:
    """Tokens of each text."""
    return min(config.window, pair.max_len)


def _batch(pair: Pair, length: int) -> int:
    """Sequences to sample together: their cache takes at most a quarter of a GPU's free memory."""
    if pair.device.type != "cuda":
        return _BATCH
    options = {"kv_group_size": pair.config.kv_group_size, "dtype": pair.model.dtype, "device": pair.device}
    row = sum(expected_memory(pair.layers, length, **options).values())
    return max(1, min(_BATCH, torch.cuda.mem_get_info(pair.device)[0] // 4 // row))


def sampled(prompts: Tensor, pair: Pair, length: int, seed: int) -> Tensor:
    """Continue each prompt ``(n, P)`` by the target's distribution to ``(n, length)`` tokens on the pair's device."""
    session = Session(pair)
    options = GenerationConfig(do_sample=True, max_length=length)
    # What transformers prepares of a config; nothing is padded and nothing ends a text early.
    options._pad_token_tensor = None
    prepared = Prepared(LogitsProcessorList(), StoppingCriteriaList(), options)
    # A text follows from its own seed, whatever is sampled beside it.
    seeds = torch.tensor([(number + seed * len(prompts)) % 2**63 for number in range(len(prompts))])
    batch = _batch(pair, length)
    written = [
        decode_checked(
            session,
            part.to(pair.device),
            None,
            prepared,
            None,
            None,
            num_speculative_tokens=0,
            draft=None,
            continue_cache=False,
            seed=part_seeds.tolist(),
        )
        for part, part_seeds in zip(prompts.split(batch), seeds.split(batch), strict=True)
    ]
    return torch.cat(written)
