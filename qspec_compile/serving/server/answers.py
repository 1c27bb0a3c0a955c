"""Answers in OpenAI's types: whole ones, and the chunks of streams."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails
from pydantic import BaseModel

from .chat_template import Said, ToolCall
from .choice import Choice, Piece, ScoredToken
from .service import Service

# JSON has no -inf; OpenAI writes this of a token that is very unlikely.
_LEAST_LOGPROB = -9999.0


class Answers:
    """Makes the answers to one request."""

    def __init__(self, service: Service, choices: Sequence[Choice], has_logprobs: bool) -> None:
        self._service = service
        self._choices = choices
        self._has_logprobs = has_logprobs
        self.id = uuid.uuid4().hex
        self._created = int(time.time())

    def usage(self) -> CompletionUsage:
        """Tokens so far; what choices share of a prompt is counted for the first alone, as OpenAI does."""
        firsts = {id(choice.prompt): choice for choice in reversed(self._choices)}.values()
        prompt, completion = (
            sum(choice.prompt_tokens for choice in firsts),
            sum(choice.completion_tokens for choice in self._choices),
        )
        accepted = sum(choice.accepted for choice in self._choices)
        return CompletionUsage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(choice.cached_tokens for choice in firsts)),
            completion_tokens_details=CompletionTokensDetails(
                accepted_prediction_tokens=accepted,
                rejected_prediction_tokens=sum(choice.drafted for choice in self._choices) - accepted,
            ),
        )

    def _common(self) -> dict[str, Any]:
        return {"created": self._created, "model": self._service.name}

    def _text(self, token: int) -> str:
        return str(self._service.tokenizer.decode([token]))


class ChatAnswers(Answers):
    """Of ``/v1/chat/completions``."""

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> ChatCompletion:
        """The answer, from all pieces of each choice."""
        return ChatCompletion(
            id=f"chatcmpl-{self.id}",
            object="chat.completion",
            choices=[self._choice(index, parts) for index, parts in enumerate(pieces)],  # type: ignore[misc]
            usage=self.usage(),
            **self._common(),
        )

    def first(self, index: int) -> ChatCompletionChunk:
        """What begins the stream of a choice."""
        return self._chunk(
            [{"index": index, "delta": ChoiceDelta(role="assistant", content=""), "finish_reason": None}]
        )

    def chunk(self, index: int, piece: Piece, num_calls: int) -> ChatCompletionChunk | None:
        """A chunk of a choice that has made ``num_calls`` before; None if there is nothing to tell."""
        said = piece.said
        if not any(said) and not piece.tokens and piece.finish_reason is None:
            return None
        delta: dict[str, Any] = {}
        if said.content:
            delta["content"] = said.content
        if said.reasoning:
            delta["reasoning_content"] = said.reasoning
        if said.tool_calls:
            numbered = enumerate(said.tool_calls, num_calls)
            delta["tool_calls"] = [{"index": number, **_tool_call(call)} for number, call in numbered]
        choice = {"index": index, "delta": delta, "finish_reason": piece.finish_reason}
        if self._has_logprobs:
            choice["logprobs"] = self._logprobs(piece.tokens)
        return self._chunk([choice])

    def last(self) -> ChatCompletionChunk:
        """The chunk that tells the usage."""
        return self._chunk([], usage=self.usage())

    def _chunk(self, choices: list[Any], **more: Any) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=f"chatcmpl-{self.id}", object="chat.completion.chunk", choices=choices, **more, **self._common()
        )

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        calls = [call for piece in pieces for call in piece.said.tool_calls]
        content = "".join(piece.said.content for piece in pieces)
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
        if reasoning := "".join(piece.said.reasoning for piece in pieces):
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [_tool_call(call) for call in calls]
        choice = {"index": index, "message": message, "finish_reason": pieces[-1].finish_reason}
        if self._has_logprobs:
            choice["logprobs"] = self._logprobs([token for piece in pieces for token in piece.tokens])
        return choice

    def _logprobs(self, tokens: Iterable[ScoredToken]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **self._scored(scored.token, scored.logprobs.logprob),
                    "top_logprobs": [self._scored(*best) for best in scored.logprobs.top],
                }
                for scored in tokens
            ]
        }

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        # Of a part of a character nobody can tell the bytes from its text.
        octets = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
        return {"token": text, "bytes": octets, "logprob": max(logprob, _LEAST_LOGPROB)}


class CompletionAnswers(Answers):
    """Of ``/v1/completions``."""

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> Completion:
        """The answer, from all pieces of each choice."""
        joined = [
            Piece(
                Said("".join(piece.said.content for piece in parts)),
                tuple(token for piece in parts for token in piece.tokens),
                parts[-1].finish_reason,
            )
            for parts in pieces
        ]
        return self._completion([self._choice(*numbered) for numbered in enumerate(joined)], usage=self.usage())

    def chunk(self, index: int, piece: Piece, num_calls: int) -> Completion | None:
        """A chunk of a choice; None if there is nothing to tell."""
        if not piece.said.content and not piece.tokens and piece.finish_reason is None:
            return None
        return self._completion([self._choice(index, piece)])

    def last(self) -> Completion:
        """The chunk that tells the usage."""
        return self._completion([], usage=self.usage())

    def _completion(self, choices: list[Any], **more: Any) -> Completion:
        # Unlike a whole answer's, a chunk's finish_reason may be null.
        return Completion.model_construct(
            id=f"cmpl-{self.id}", object="text_completion", choices=choices, **more, **self._common()
        )

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "text": piece.said.content, "finish_reason": piece.finish_reason}
        choice["logprobs"] = self._logprobs(piece.tokens) if self._has_logprobs else None
        return choice

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> Logprobs:
        return Logprobs(
            text_offset=[scored.start for scored in tokens],
            token_logprobs=[max(scored.logprobs.logprob, _LEAST_LOGPROB) for scored in tokens],
            tokens=[self._text(scored.token) for scored in tokens],
            top_logprobs=[
                {self._text(token): max(logprob, _LEAST_LOGPROB) for token, logprob in scored.logprobs.top}
                for scored in tokens
            ],
        )


def _tool_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def event(body: BaseModel) -> str:
    """A server-sent event."""
    return f"data: {body.model_dump_json(exclude_unset=True)}\n\n"


LAST_EVENT = "data: [DONE]\n\n"
