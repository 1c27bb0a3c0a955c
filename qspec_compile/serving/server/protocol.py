"""Bodies of requests: those of OpenAI's parameters that are honoured, and a few of vLLM's; any other is refused.

Where the ``openai`` package has a type for a part, it is that. Answers are the package's own types altogether.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from openai.types.chat import (
    ChatCompletionFunctionToolParam,
    ChatCompletionMessageFunctionToolCallParam,
    ChatCompletionStreamOptionsParam,
)
from openai.types.chat.completion_create_params import ResponseFormat
from pydantic import BaseModel, ConfigDict, Field, model_validator

# As many choices as a request may ask for, over all of its prompts.
MOST_CHOICES = 128
# JSON schemas, whose nulls are values, and what is long.
_LEFT_ALONE = frozenset({"schema", "parameters", "prompt"})
# Levels of a body down to a tool call's function, and one more.
_DEEPEST = 7

# Beyond these tensors of float32 and int64 would overflow, which is an error of the server's.
_Token = Annotated[int, Field(ge=0, lt=2**31)]
_StopString = Annotated[str, Field(min_length=1)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class _Body(BaseModel):
    # The TypedDicts of `openai` take these over.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """A message of a conversation, as a chat template reads it."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ChatCompletionMessageFunctionToolCallParam] | None = None
    tool_call_id: str | None = None

    @property
    def characters(self) -> int:
        """Of its text and of the arguments of its tool calls."""
        texts = [part.text for part in self.content] if isinstance(self.content, list) else [self.content or ""]
        texts += [call["function"]["arguments"] for call in self.tool_calls or ()]
        return sum(map(len, texts))


def _without_nulls(given: Any, depth: int = 0) -> Any:
    """``given`` without what is null."""
    if depth < _DEEPEST and isinstance(given, dict):
        return {
            name: value if name in _LEFT_ALONE else _without_nulls(value, depth + 1)
            for name, value in given.items()
            if value is not None
        }
    if depth < _DEEPEST and isinstance(given, list):
        return [_without_nulls(value, depth + 1) for value in given]
    return given


class SamplingBody(_Body):
    """What both kinds of completions have.

    ``top_k``, ``min_p``, ``repetition_penalty`` and ``cache_salt`` are vLLM's: only requests with the same API key and
    the same ``cache_salt`` share cached prompts. What is not said is as the model's generation config has it.
    """

    model: str
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: ChatCompletionStreamOptionsParam | None = None
    stop: _StopString | Annotated[list[_StopString], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        None
    )
    cache_salt: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, given: Any) -> Any:
        """A null says as much as nothing, also of what is not honoured: clients send whole objects back."""
        return _without_nulls(given)


class ChatBody(SamplingBody):
    """Of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[ChatCompletionFunctionToolParam] | None = None
    tool_choice: Literal["auto", "none"] | None = None


class CompletionBody(SamplingBody):
    """Of ``/v1/completions``."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[_Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[_Token], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompts(self) -> list[Any]:
        """Each prompt, a text or a list of tokens."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)
