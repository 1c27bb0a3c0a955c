"""What a request asks for, checked before any work and made ready by Hugging Face's own ``generate``."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import EosTokenCriteria, MaxLengthCriteria

from quantspec.cache import CacheFullError
from quantspec.engine import request as engine
from quantspec.hugging_face.arguments import check_tokens_of, prepare_arguments, refuse_options
from quantspec.hugging_face.rows import ROW_OPTIONS, check_seed, prepare_row, row_seeds
from quantspec.pair import Pair

from .requests import Request

_STRUCTURES = frozenset({"json_schema", "regex", "grammar"})
# The lengths and ends of a request have fields of their own.
_HUGGING_FACE = ROW_OPTIONS - {"max_length", "max_new_tokens", "eos_token_id"} | {"logits_processor"}
_OPTIONS = _HUGGING_FACE | _STRUCTURES | {"seed", "logprobs"}
_MOST_LOGPROBS = 20


class Checked(NamedTuple):
    """A request that can be honoured.

    Attributes:
        tokens: of the prompt.
        arguments: for Hugging Face's ``generate``, without the prompt.
        seed: of its randomness; None for any.
        logprobs: likeliest tokens to report at each position; None for no log-probabilities.
    """

    tokens: list[int]
    arguments: dict[str, Any]
    seed: int | None
    logprobs: int | None


def check(pair: Pair, request: Request, tokenizer: Any, max_length: int) -> Checked:
    """Check a request and read its structure, without a use of the device.

    Args:
        pair: that shall run it.
        request: as a caller made it.
        tokenizer: of the model; needed for structures alone.
        max_length: most tokens of prompt and output.

    Raises:
        TypeError, ValueError: anything of it cannot be honoured.
        CacheFullError: it may become longer than ``max_length``.
        ImportError: a structure was asked for, and llguidance is missing.
    """
    if not isinstance(request, Request):
        raise TypeError(f"a request must be a quantspec.serving.Request, not {type(request).__name__}")
    if not isinstance(request.options, Mapping):
        raise TypeError(f"options must be a dict, not {type(request.options).__name__}")
    if not isinstance(request.salt, str):
        raise TypeError(f"salt must be a str, not {type(request.salt).__name__}")
    options = dict(request.options)
    if others := sorted(map(str, options.keys() - _OPTIONS)):
        raise ValueError(
            f"a request has no option {', '.join(others)}; lengths and stop tokens are fields of their own, and the "
            f"options are {', '.join(sorted(_OPTIONS))}"
        )
    tokens = _token_ids("prompt", request.prompt, pair.vocab_size)
    if (count := len(tokens) + _positive(request.max_new_tokens)) > max_length:
        raise CacheFullError(
            f"{count} tokens are more than the engine's max_length={max_length}; shorten the prompt or max_new_tokens, "
            "or make the engine with a larger max_length"
        )
    logprobs = _check_logprobs(options.pop("logprobs", None))
    seed = options.pop("seed", None)
    if seed is not None and not isinstance(seed := check_seed(seed), int):
        raise TypeError(f"the seed of a request must be an int, not {seed!r}")
    if request.stop_token_ids is not None:
        stops = _token_ids("stop_token_ids", request.stop_token_ids, pair.vocab_size, least=0)
        options["eos_token_id"] = stops or None
    structure = {name: source for name in sorted(_STRUCTURES) if (source := options.pop(name, None)) is not None}
    options["max_new_tokens"] = request.max_new_tokens
    defaults = pair.model.generation_config
    assert defaults is not None
    arguments = prepare_arguments(
        pair, defaults, None, None, None, tokenizer, structure, None, None, False, options
    ).hugging_face
    return Checked(tokens, arguments, seed, logprobs)


def prepare(pair: Pair, checked: Checked) -> engine.Request:
    """The request as the loop knows it.

    Raises:
        TypeError, ValueError: Hugging Face refuses an option, a token of one is beyond the vocabulary, or the model's
            generation config asks for what an engine does not do.
    """
    prompt = torch.tensor([checked.tokens], device=pair.device)
    prepared = prepare_row(pair.model, prompt, None, {**checked.arguments, "attention_mask": torch.ones_like(prompt)})
    refuse_options(prepared.config)
    check_tokens_of(prepared.processors, pair.vocab_size)
    for criterion in prepared.criteria:
        if type(criterion) not in (EosTokenCriteria, MaxLengthCriteria):
            raise ValueError(
                f"a request cannot end by {type(criterion).__name__}, which the model's generation config asks for; "
                "unset max_time and stop_strings there"
            )
    (seed,) = row_seeds(checked.seed, None, 1, "cpu") if prepared.config.do_sample else (0,)
    return prepared.request(prompt[0], prompt.shape[1], seed)


def _check_logprobs(count: Any) -> int | None:
    """How many of the likeliest tokens to report at each position; None for no log-probabilities."""
    if count is None:
        return None
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"logprobs must be an int, the number of likeliest tokens to report, not {count!r}")
    if not 0 <= count <= _MOST_LOGPROBS:
        raise ValueError(f"logprobs must be between 0 and {_MOST_LOGPROBS}, not {count}")
    return count


def _token_ids(name: str, ids: Any, vocab_size: int, least: int = 1) -> list[int]:
    try:
        tokens = [operator.index(token) for token in ids]
    except TypeError as error:
        raise TypeError(f"{name} must be a list of token ids: {error}") from None
    if len(tokens) < least:
        raise ValueError(f"{name} is empty; pass at least one token")
    if outside := [token for token in tokens if not 0 <= token < vocab_size]:
        raise ValueError(f"{name} must be in 0..{vocab_size - 1}, found {outside[0]}")
    return tokens


def _positive(count: Any) -> int:
    try:
        number = operator.index(count)
    except TypeError:
        raise TypeError(f"max_new_tokens must be an int, not {count!r}") from None
    if number < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {number}")
    return number
