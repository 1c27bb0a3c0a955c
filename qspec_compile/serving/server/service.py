"""The engine as the endpoints use it: from checked bodies to the pieces of an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from quantspec.errors import QueueFullError
from quantspec.serving.delivery import into
from quantspec.serving.engine import Engine
from quantspec.serving.requests import Output, Request

from .chat_template import AnswerParser, ChatTemplate
from .choice import Choice, Piece
from .errors import ApiError
from .metrics import Metrics
from .penalties import CountPenalty
from .protocol import MOST_CHOICES, ChatBody, CompletionBody, SamplingBody

# Seconds without a step after which an engine that has work counts as stuck; compiling may take minutes.
_STUCK = 300
# Tokens of a completion if nobody says, as OpenAI has it; a chat may fill the context.
_COMPLETION_TOKENS = 16
# A lower temperature is greedy, as vLLM has it: scores divided by it may be infinite.
_LEAST_TEMPERATURE = 1e-5


class Job(NamedTuple):
    """A choice that is to be made."""

    request: Request
    choice: Choice


class Service:
    """An engine, its tokenizer and templates under a name.

    Attributes:
        name: of the model.
        tokenizer: its own.
        created: when the service was made, in seconds since 1970.
        metrics: what it did.
    """

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
        """A service of ``engine``, which becomes its own.

        Raises:
            TypeError: the tokenizer is no fast one.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise TypeError(f"serving needs a fast tokenizer of transformers, not {type(tokenizer).__name__}")
        self._engine = engine
        self.tokenizer = tokenizer
        self._chat_template = ChatTemplate(tokenizer, engine.pair.model)
        self.name = name
        self.created = int(time.time())
        self.metrics = Metrics(engine.statistics, name)
        # Texts that fit have fewer, but for what a tokenizer leaves out; to read millions takes it many seconds.
        self._most_characters = engine.max_length * max(map(len, tokenizer.get_vocab()))
        # One thread: the tokenizer is not made for several, and requests keep their order.
        self._preparing = ThreadPoolExecutor(1, "quantspec requests")
        self._closed = False

    @property
    def is_lost(self) -> bool:
        """Whether the engine can take no more steps."""
        return self._engine.loss is not None

    def check_health(self) -> None:
        """Whether requests are answered.

        Raises:
            ApiError: the engine has had work for long without a step, or can take no more.
        """
        self._check_engine()
        if time.monotonic() - self._engine.heartbeat > _STUCK:
            raise ApiError(503, "the engine takes no steps", "stuck")

    def _check_engine(self) -> None:
        if (loss := self._engine.loss) is not None:
            raise ApiError(503, f"the engine has ended: {loss}", "engine_ended")

    def close(self) -> None:
        """End the engine, and the requests that are left."""
        if not self._closed:
            self._closed = True
            self._preparing.shutdown(cancel_futures=True)
            self._engine.close()

    async def chat(self, body: ChatBody, tenant: str) -> Answering:
        """Begin the choices of a chat.

        Raises:
            ApiError: it cannot be honoured, or not now.
        """
        return await self._begin(lambda: self._chat_jobs(body, tenant))

    async def completion(self, body: CompletionBody, tenant: str) -> Answering:
        """Begin the choices of completions; as :meth:`chat`."""
        return await self._begin(lambda: self._completion_jobs(body, tenant))

    async def _begin(self, make_jobs: Callable[[], list[Job]]) -> Answering:
        self._check_engine()
        arrival = time.monotonic()
        news = asyncio.Queue[Output]()
        listen = into(news, self._engine.cancel)
        beginning = asyncio.get_running_loop().run_in_executor(self._preparing, lambda: self._add(make_jobs(), listen))
        try:
            choices = await asyncio.shield(beginning)
        except asyncio.CancelledError:
            beginning.add_done_callback(lambda begun: None if begun.exception() else self._cancel(begun.result()))
            raise
        return Answering(self._engine, self.metrics, choices, news, arrival)

    def _add(self, jobs: list[Job], listen: Callable[[Output], None]) -> dict[int, Choice]:
        try:
            ids = self._engine.subscribe([job.request for job in jobs], listen)
        except Exception as error:
            raise _as_api_error(error) from error
        return dict(zip(ids, (job.choice for job in jobs), strict=True))

    def _cancel(self, ids: Iterable[int]) -> None:
        for id in ids:
            self._engine.cancel(id)

    def _chat_jobs(self, body: ChatBody, tenant: str) -> list[Job]:
        self._check_model(body.model)
        tools = None if body.tool_choice == "none" else body.tools
        if tools and _schema(body) is not None:
            raise ApiError(
                400,
                "response_format would leave no room for a tool call: pass tool_choice='none', or one of tools and "
                "response_format",
                param="response_format",
            )
        self._check_characters(sum(message.characters for message in body.messages), "messages")
        prompt = self._chat_template.prompt(body.messages, tools)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise ApiError(
                400, "max_tokens is the old name of max_completion_tokens: pass one of them", param="max_tokens"
            )
        asked = body.max_completion_tokens or body.max_tokens
        options: dict[str, Any] = {"json_schema": _schema(body)}
        if body.logprobs:
            options["logprobs"] = body.top_logprobs or 0
        count = asked or max(1, self._engine.max_length - len(prompt))
        parsers = (self._chat_template.parser(prompt, tools) for _ in range(body.n or 1))
        return [self._job(body, prompt, count, tenant, index, options, parser) for index, parser in enumerate(parsers)]

    def _completion_jobs(self, body: CompletionBody, tenant: str) -> list[Job]:
        self._check_model(body.model)
        copies = body.n or 1
        prompts = body.prompts()
        if len(prompts) * copies > MOST_CHOICES:
            raise ApiError(400, f"{len(prompts)} prompts times n are more than {MOST_CHOICES} choices", param="prompt")
        encoded = [self._encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        count = body.max_tokens or _COMPLETION_TOKENS
        return [
            self._job(body, prompt, count, tenant, copy, {"logprobs": body.logprobs}, None)
            for prompt in encoded
            for copy in range(copies)
        ]

    def _check_model(self, model: str) -> None:
        if model != self.name:
            raise ApiError(
                404, f"the model '{model}' does not exist: this server has '{self.name}'", "model_not_found", "model"
            )

    def _check_characters(self, count: int, param: str) -> None:
        """Refuse what would hold up others' requests while it is read."""
        if count > self._most_characters:
            raise ApiError(
                400,
                f"the context length is {self._engine.max_length} tokens, and texts of more than "
                f"{self._most_characters} characters are not read: this has {count}",
                "context_length_exceeded",
                param,
            )

    def _encode(self, text: str) -> list[int]:
        self._check_characters(len(text), "prompt")
        try:
            return self.tokenizer(text)["input_ids"]
        # Lone surrogates, for one, are no text.
        except (ValueError, TypeError) as error:
            raise ApiError(400, f"the prompt cannot be encoded: {error}", param="prompt") from error

    def _job(
        self,
        body: SamplingBody,
        prompt: list[int],
        max_new_tokens: int,
        tenant: str,
        copy: int,
        options: dict[str, Any],
        parser: AnswerParser | None,
    ) -> Job:
        limit = self._engine.max_length
        if len(prompt) + max_new_tokens > limit:
            raise ApiError(
                400,
                f"the context length is {limit} tokens: the prompt has {len(prompt)} and {max_new_tokens} are "
                "asked for",
                "context_length_exceeded",
                "messages" if isinstance(body, ChatBody) else "prompt",
            )
        given = {**options, **self._sampling(body, len(prompt), copy)}
        request = Request(
            prompt,
            max_new_tokens,
            options={name: value for name, value in given.items() if value is not None},
            salt=f"{tenant} {body.cache_salt or ''}",
        )
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        return Job(request, Choice(self.tokenizer, prompt, stop, parser))

    def _sampling(self, body: SamplingBody, prompt_len: int, copy: int) -> dict[str, Any]:
        """Options of the engine; None where the model's generation config decides."""
        options: dict[str, Any] = {
            "seed": None if body.seed is None else body.seed + copy,
            "repetition_penalty": body.repetition_penalty,
        }
        names = ("temperature", "top_p", "top_k", "min_p")
        warpers = {name: value for name in names if (value := getattr(body, name)) is not None}
        if warpers.get("temperature", 1) < _LEAST_TEMPERATURE:
            options["do_sample"] = False
        elif warpers:
            options |= {"do_sample": True, **warpers}
        if body.logit_bias:
            size = self._engine.pair.vocab_size
            if unknown := [token for token in body.logit_bias if int(token) >= size]:
                raise ApiError(400, f"logit_bias has no token {unknown[0]}: there are {size}", param="logit_bias")
            options["sequence_bias"] = [[[int(token)], float(bias)] for token, bias in body.logit_bias.items()]
        if body.presence_penalty or body.frequency_penalty:
            penalty = CountPenalty(prompt_len, body.presence_penalty or 0.0, body.frequency_penalty or 0.0)
            options["logits_processor"] = [penalty]
        return options


class Answering:
    """Choices that are being made.

    Attributes:
        choices: each with its counts so far.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        choices: Mapping[int, Choice],
        news: asyncio.Queue[Output],
        arrival: float,
    ) -> None:
        """``choices`` by the ids of their requests, whose outputs come through ``news``."""
        self.choices = list(choices.values())
        self._engine = engine
        self._metrics = metrics
        self._ids = list(choices)
        self._news = news
        self._arrival = arrival

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all choices as they come, each with the number of its choice.

        Whoever closes the iterator early ends the choices within a cycle.

        Raises:
            ApiError: a choice has failed; the others are ended.
        """
        running = {id: (index, self._metrics.watch(self._arrival)) for index, id in enumerate(self._ids)}
        try:
            while running:
                output = await self._news.get()
                if output.id not in running:
                    continue  # its end by a stop string is not yet the engine's
                index, watch = running[output.id]
                try:
                    piece = self.choices[index].take(output)
                except Exception:
                    watch.ended("error")
                    del running[output.id]
                    raise
                watch.tokens(len(output.token_ids))
                if piece.finish_reason is not None:
                    watch.ended(piece.finish_reason)
                    del running[output.id]
                    self._engine.cancel(output.id)
                yield index, piece
        finally:
            for id, (_, watch) in running.items():
                watch.ended("abort")
                self._engine.cancel(id)

    def cancel(self) -> None:
        """Nobody wants more of it; nothing happens to choices that have ended."""
        for id in self._ids:
            self._engine.cancel(id)


def _schema(body: ChatBody) -> dict[str, Any] | None:
    """What JSON is asked for."""
    form = body.response_format
    if form is None or form["type"] == "text":
        return None
    if form["type"] == "json_object":
        return {"type": "object"}
    return dict(form["json_schema"].get("schema", {}))


def _as_api_error(error: Exception) -> Exception:
    """What the engine refuses, in OpenAI's words."""
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), "rate_limit_exceeded")
    if isinstance(error, ValueError | TypeError | ImportError):
        return ApiError(400, str(error))
    return error
