"""Structured output: text that follows a JSON schema, a regular expression or a grammar, by llguidance."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quantspec.engine.logits_processors import FollowingProcessor
from quantspec.versions import install_command

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# A space, or a line and its indentation: with white space of any length a model may write nothing else.
_WHITE_SPACE = r" |\n {0,40}"


class GrammarProcessor(FollowingProcessor):
    """Forbids every token with which a text could not follow the grammar; EOS is allowed where the text may end.

    For one call of ``generate``, each row of which follows the grammar by itself.
    """

    def __init__(self, start: LLMatcher, vocab_size: int) -> None:
        """``start`` has read nothing yet; ``vocab_size``: tokens that it knows."""
        self._start = start
        self._vocab_size = vocab_size
        self._matchers: list[LLMatcher] = []

    def follow(self, texts: Sequence[Sequence[int]], running: Sequence[bool]) -> None:
        """Find the tokens that are allowed next in the rows that are running.

        Raises:
            RuntimeError: llguidance cannot follow the grammar any further.
        """
        from llguidance import LLExecutor
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

        if not self._matchers:
            self._matchers = [self._start.deep_copy() for _ in texts]
            self._lengths = [0] * len(texts)
            self._bits = allocate_token_bitmask(len(texts), self._vocab_size)
            self._executor = LLExecutor(min(len(texts), os.cpu_count() or 1))
        self._running = running
        rows = [(matcher, row) for row, matcher in enumerate(self._matchers) if running[row]]
        for matcher, row in rows:
            # One by one: of several, llguidance refuses EOS.
            for token in texts[row][self._lengths[row] :]:
                matcher.consume_token(token)
            self._lengths[row] = len(texts[row])
        fill_next_token_bitmask_par(self._executor, rows, self._bits)
        for matcher, _ in rows:
            if matcher.is_error():
                raise RuntimeError(f"llguidance cannot follow the grammar any further: {_reason(matcher)}")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``(B, V)`` scores, -inf where a token is not allowed.

        Raises:
            FloatingPointError: no token that is allowed has a score, in a row that is running.
        """
        if not self._matchers:
            self.follow([[]] * len(scores), [True] * len(scores))
        octets = torch.from_numpy(self._bits).view(torch.uint8).to(scores.device)
        places = torch.arange(8, dtype=torch.uint8, device=scores.device)
        allowed = (octets[..., None] >> places & 1).bool().flatten(1)[:, : scores.shape[1]]
        scores = scores.masked_fill(~allowed, float("-inf"))
        # What follows the end of a row is of no account.
        stuck = scores.isneginf().all(1).tolist()
        if any(runs and is_stuck for runs, is_stuck in zip(self._running, stuck, strict=True)):
            raise FloatingPointError(
                "no token is left that the grammar allows: another option or logits processor forbids them all "
                "(min_new_tokens, suppress_tokens, bad_words_ids)"
            )
        return scores


def grammar_processor(
    structure: Mapping[str, Any], tokenizer: Any, eos_token_ids: Sequence[int], vocab_size: int
) -> GrammarProcessor:
    """The processor of a ``structure``, which names what the text shall follow.

    Args:
        structure: one of ``json_schema`` (a dict or JSON text), ``regex`` and ``grammar`` (texts).
        tokenizer: a fast one of transformers.
        eos_token_ids: any of them ends a text.
        vocab_size: tokens that the model scores.

    Raises:
        ValueError, TypeError: anything of this cannot be used.
        ImportError: llguidance is missing.
    """
    if len(structure) > 1:
        raise ValueError(f"{' and '.join(structure)} are different structures for one text; pass one of them")
    ((name, source),) = structure.items()
    if name == "json_schema":
        source = _json_text(source)
    elif not isinstance(source, str):
        raise TypeError(f"{name} must be a str, not {type(source).__name__}")
    if tokenizer is None:
        raise ValueError(f"{name} needs the tokenizer: pass tokenizer=... to generate()")
    try:
        from llguidance import LLMatcher, LLParserLimits
    except ImportError as error:
        raise ImportError(f"{name} is followed by llguidance: {install_command('structured')}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TypeError(
            f"{name} needs a fast tokenizer, such as AutoTokenizer.from_pretrained(...) returns for most models, not "
            f"{type(tokenizer).__name__}"
        )
    # Some configs list tokens that there are not, as -1; they end no text.
    ends = tuple(token for token in eos_token_ids if 0 <= token < vocab_size and _has(tokenizer, token))
    if not ends:
        raise ValueError(
            f"{name} ends the text with EOS, and neither the generation config nor the tokenizer has one; pass "
            "eos_token_id=..."
        )
    num_tokens = max(vocab_size, len(tokenizer))
    vocabulary = _vocabulary(tokenizer, len(tokenizer), num_tokens, ends)
    make: dict[str, Callable[[str], str]] = {
        "json_schema": lambda schema: LLMatcher.grammar_from_json_schema(
            schema, defaults={"whitespace_pattern": _WHITE_SPACE}
        ),
        "regex": LLMatcher.grammar_from_regex,
        "grammar": LLMatcher.grammar_from_lark,
    }
    limits = LLParserLimits(verbose_errors=False)
    try:
        matcher = LLMatcher(vocabulary, make[name](source), log_level=0, limits=limits)
    except ValueError as error:
        raise ValueError(f"{name} cannot be used: {error}") from error
    # Some grammars are refused at the first step only.
    matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(f"{name} cannot be used: {_reason(matcher)}")
    return GrammarProcessor(matcher, num_tokens)


def _has(tokenizer: PreTrainedTokenizerFast, token: int) -> bool:
    return tokenizer.convert_ids_to_tokens(token) is not None


def _reason(matcher: LLMatcher) -> str:
    """Why a matcher is of no use, in one line."""
    return " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())


def _json_text(schema: Any) -> str:
    if not isinstance(schema, dict | str):
        raise TypeError(
            f"json_schema must be a dict or JSON text, not {type(schema).__name__}; a pydantic model has "
            "model_json_schema()"
        )
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"json_schema is no JSON: {error}") from error
    return text


# Reading a vocabulary takes about a second; its length tells whether tokens were added since.
@functools.lru_cache(maxsize=4)
def _vocabulary(
    tokenizer: PreTrainedTokenizerBase, length: int, num_tokens: int, eos_token_ids: tuple[int, ...]
) -> LLTokenizer:
    """llguidance's view of a tokenizer of this ``length``, filled up to ``num_tokens`` tokens.

    Raises:
        ValueError: llguidance cannot read it.
    """
    from llguidance.hf import from_tokenizer

    try:
        return from_tokenizer(cast(PreTrainedTokenizerFast, tokenizer), num_tokens, list(eos_token_ids))
    except Exception as error:
        raise ValueError(f"llguidance cannot read the tokenizer: {error}") from error
