"""Conversations: into a prompt by the model's chat template, and out of an answer by its response template."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from openai.types.chat import ChatCompletionFunctionToolParam
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.cli.serving.utils import get_response_template

from .errors import ApiError
from .protocol import Message


class ToolCall(NamedTuple):
    """A function that the model calls; ``arguments`` are JSON."""

    name: str
    arguments: str


class Said(NamedTuple):
    """What a piece of an answer adds to the message."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class AnswerParser:
    """Takes an answer apart into content, reasoning and tool calls, piece by piece.

    A tool call that cannot be read, and what follows it, is content as it stands.
    """

    def __init__(self, parser: Any) -> None:
        """``parser``: transformers' own, of the response template and the prompt."""
        self._parser = parser
        self._unsaid = ""
        self._is_broken = False

    def feed(self, text: str) -> Said:
        """What the next piece of the text says."""
        return self._read(text, lambda: self._parser.feed(text))

    def finish(self, end: str) -> Said:
        """What is left where the text ``end`` of the model's end token closes what is open, which it may do."""
        closed = self._read(end, lambda: self._parser.feed(end)) if end else Said()
        last = self._read("", lambda: self._parser.finalize()[1])
        content, reasoning = closed.content + last.content, closed.reasoning + last.reasoning
        calls = closed.tool_calls + last.tool_calls
        return Said(content.removesuffix(end), reasoning.removesuffix(end), calls)

    def _read(self, text: str, events: Callable[[], Sequence[dict[str, Any]]]) -> Said:
        self._unsaid += text
        said = Said(text)
        if not self._is_broken:
            try:
                said = _said(events())
            # Whatever a parser makes of what a model writes.
            except Exception:
                self._is_broken = True
                said = Said(self._unsaid)
        if any(said):
            self._unsaid = ""
        return said


class ChatTemplate:
    """The templates of a model."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> None:
        self._tokenizer = tokenizer
        self._response_template = get_response_template(tokenizer, model)

    def prompt(self, messages: Sequence[Message], tools: Sequence[ChatCompletionFunctionToolParam] | None) -> list[int]:
        """Token ids of a conversation that awaits the model's answer.

        Raises:
            ApiError: there is no template, it does not take these messages, or no tool call could be read.
        """
        if self._tokenizer.chat_template is None:
            raise ApiError(
                400, "the model's tokenizer has no chat template: use /v1/completions, or an instruction-tuned model"
            )
        if tools and self._response_template is None:
            raise ApiError(
                400,
                "tool calls cannot be read from this model's answers: its tokenizer has no response_template",
                param="tools",
            )
        conversation = [_as_template_reads(message) for message in messages]
        # A template is the model's own code, and may stumble over anything.
        try:
            encoded: Any = self._tokenizer.apply_chat_template(
                conversation, tools=_as_dicts(tools), add_generation_prompt=True, return_dict=True
            )
            return list(encoded["input_ids"])
        except Exception as error:
            message = f"the model's chat template refuses the messages: {error}"
            raise ApiError(400, message, param="messages") from error

    def parser(
        self, prompt: Sequence[int], tools: Sequence[ChatCompletionFunctionToolParam] | None
    ) -> AnswerParser | None:
        """A parser of the answer to ``prompt``; None if answers are plain text."""
        if self._response_template is None:
            return None
        parser = self._tokenizer.get_response_parser(
            self._response_template, prefix=list(prompt), tools=_as_dicts(tools)
        )
        return AnswerParser(parser)


def _as_dicts(tools: Sequence[ChatCompletionFunctionToolParam] | None) -> Any:
    """Tools as transformers takes them; None if there are none."""
    return list(tools) if tools else None


def _as_template_reads(message: Message) -> dict[str, Any]:
    """Texts of several parts as one, and arguments of tool calls as objects, which templates print."""
    given = message.model_dump(exclude_none=True)
    content = message.content
    given["content"] = "".join(part.text for part in content) if isinstance(content, list) else content or ""
    for call in given.get("tool_calls", ()):
        arguments = call["function"]["arguments"] or "{}"
        # What a model wrote need be no JSON, and lists within lists may be too deep to read: then it is text.
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
        call["function"]["arguments"] = arguments
    return given


def _said(events: Sequence[dict[str, Any]]) -> Said:
    content, reasoning, calls = "", "", []
    for event in events:
        field = event.get("field")
        if event["type"] == "region_close" and field == "tool_calls":
            values = event["value"] if isinstance(event["value"], list) else [event["value"]]
            calls += [_tool_call(value) for value in values]
        # The raw text of what is parsed at its end is dirty.
        elif event["type"] == "region_chunk" and not event.get("dirty"):
            if field == "content":
                content += event["text"]
            elif field in ("reasoning_content", "thinking"):
                reasoning += event["text"]
    return Said(content, reasoning, tuple(calls))


def _tool_call(value: dict[str, Any]) -> ToolCall:
    function = value["function"]
    arguments = function["arguments"]
    return ToolCall(function["name"], arguments if isinstance(arguments, str) else json.dumps(arguments))
