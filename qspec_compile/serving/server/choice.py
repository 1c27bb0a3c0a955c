"""One choice of an answer: from the engine's tokens to text that may be sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from quantspec.serving.requests import FinishReason, Output, TokenLogprobs

from .chat_template import AnswerParser, Said
from .errors import ApiError
from .stop_strings import StopStrings

# Tokens of the prompt that the decoder of the new ones sees: whether a space belongs before a word, say.
_CONTEXT = 8
# What bytes read as that are no letter, or not yet.
_NO_LETTER = "\N{REPLACEMENT CHARACTER}"


class ScoredToken(NamedTuple):
    """A token with its log-probabilities, and where its text begins and ends among the new text."""

    token: int
    logprobs: TokenLogprobs
    start: int
    end: int


class Piece(NamedTuple):
    """What may be sent of a choice by now, and why it has ended."""

    said: Said
    tokens: tuple[ScoredToken, ...] = ()
    finish_reason: str | None = None


class Choice:
    """The state of a choice.

    Attributes:
        prompt: its token ids, the same list for choices that share them.
        prompt_tokens, cached_tokens, completion_tokens, drafted, accepted: so far, as an answer's usage has them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt: Sequence[int],
        stop: Sequence[str],
        parser: AnswerParser | None = None,
    ) -> None:
        """``parser`` takes the text apart; None if it is content as it stands."""
        self.prompt = prompt
        self._tokenizer = tokenizer.backend_tokenizer
        self._parser = parser
        # Response templates name special tokens.
        self._decode, self._of_prompt = self._stream(prompt[-_CONTEXT:], skip_special_tokens=parser is None)
        self._stop = StopStrings(stop)
        self._waiting: deque[ScoredToken] = deque()
        self._decoded = self._released = 0
        self._calls_tools = False
        self._end = ""
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = self.drafted = self.accepted = 0

    def _stream(self, context: Sequence[int], skip_special_tokens: bool) -> tuple[DecodeStream, str]:
        """A decoder of what follows ``context``, and how the bytes at its end read that may be part of a letter yet."""
        texts = [self._tokenizer.decode(context[:count], skip_special_tokens) for count in range(len(context) + 1)]
        # The decoder would take a beginning that ends so for new text.
        whole = max(count for count, text in enumerate(texts) if not text.endswith(_NO_LETTER))
        stream = DecodeStream(list(context[:whole]), skip_special_tokens=skip_special_tokens)
        for token in context[whole:]:
            stream.step(self._tokenizer, token)
        return stream, texts[-1].removeprefix(texts[whole])

    def take(self, output: Output) -> Piece:
        """What a step of the engine adds.

        Raises:
            ApiError: the request has failed.
        """
        self.prompt_tokens, self.cached_tokens = output.prompt_tokens, output.cached_tokens
        self.drafted, self.accepted = output.drafted, output.accepted
        if output.finish_reason is FinishReason.ERROR:
            raise ApiError(500, f"the request failed: {output.error}") from output.error
        if output.finish_reason is FinishReason.CANCELLED:
            raise ApiError(503, "the server is shutting down", "shutting_down")
        text = "".join(self._text(output, index) for index in range(len(output.token_ids)) if not self._stop.found)
        ends = self._stop.found or output.finish_reason is not None
        if ends and not self._stop.found:
            text += self._stop.flush()
        self._released += len(text)
        said = self._said(text, ends)
        self._calls_tools |= bool(said.tool_calls)
        return Piece(said, self._scored(ends), self._reason(output) if ends else None)

    def _text(self, output: Output, index: int) -> str:
        """What a token lets through."""
        self.completion_tokens += 1
        token = output.token_ids[index]
        is_end = output.finish_reason is FinishReason.STOP and index == len(output.token_ids) - 1
        if is_end and self._parser is None:
            return ""
        if is_end:
            self._end = self._decode.step(self._tokenizer, token) or ""
            return ""
        text = self._decode.step(self._tokenizer, token) or ""
        if text and self._of_prompt:
            same = takewhile(lambda pair: pair[0] == pair[1], zip(text, self._of_prompt, strict=False))
            text, self._of_prompt = text[len(list(same)) :], ""
        start, self._decoded = self._decoded, self._decoded + len(text)
        if output.logprobs is not None:
            self._waiting.append(ScoredToken(token, output.logprobs[index], start, self._decoded))
        return self._stop.feed(text)

    def _said(self, text: str, ends: bool) -> Said:
        if self._parser is None:
            return Said(text)
        said = self._parser.feed(text)
        if not ends:
            return said
        last = self._parser.finish(self._end)
        return Said(*(first + second for first, second in zip(said, last, strict=True)))  # type: ignore[operator]

    def _scored(self, ends: bool) -> tuple[ScoredToken, ...]:
        """Tokens whose text has been let through."""
        taken = []
        while self._waiting and (
            self._waiting[0].end <= self._released or (ends and self._waiting[0].start < self._released)
        ):
            taken.append(self._waiting.popleft())
        return tuple(taken)

    def _reason(self, output: Output) -> str:
        if self._calls_tools:
            return "tool_calls"
        return "length" if output.finish_reason is FinishReason.LENGTH and not self._stop.found else "stop"
