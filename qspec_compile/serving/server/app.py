"""The endpoints."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPBearer
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from .answers import LAST_EVENT, ChatAnswers, CompletionAnswers, event
from .choice import Piece
from .errors import ApiError, ErrorBody
from .protocol import ChatBody, CompletionBody, SamplingBody
from .service import Answering, Service

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")
# Nobody reads it: the client has gone.
_GONE = 499


class Models(BaseModel):
    """A list of models."""

    object: str
    data: list[Model]


class _EventStream(StreamingResponse):
    """Server-sent events of choices, which end as soon as nobody listens, even before the first event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], answering: Answering) -> None:
        super().__init__(events)
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            async with aclosing(self.body_iterator):  # type: ignore[type-var]
                await super().__call__(scope, receive, send)
        finally:
            self._answering.cancel()


def build_app(service: Service) -> FastAPI:
    """The endpoints of ``service``, which ends with the application; keys and limits are the gate's."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # Pages that load scripts from elsewhere are left out; /openapi.json describes the endpoints.
    app = FastAPI(title="quantspec", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.exception_handler(ApiError)(_answer_error)
    app.exception_handler(RequestValidationError)(_answer_invalid)
    app.exception_handler(HTTPException)(_answer_http)
    app.exception_handler(Exception)(_answer_failure)
    answers: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody} for status in (400, 401, 404, 413, 422, 429, 500, 503)
    }
    key = [Security(HTTPBearer(auto_error=False))]

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: {"model": ErrorBody}})
    async def health(request: Request) -> dict[str, str]:
        """Whether requests are taken and answered."""
        if request.state.is_draining:
            raise ApiError(503, "the server is shutting down", "shutting_down")
        service.check_health()
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    model = Model(id=service.name, created=service.created, object="model", owned_by="quantspec")

    @app.head("/v1/models", dependencies=key, include_in_schema=False)
    @app.get("/v1/models", dependencies=key, responses={401: {"model": ErrorBody}, 503: {"model": ErrorBody}})
    async def models() -> Models:
        """The model that is served."""
        return Models(object="list", data=[model])

    @app.get(
        "/v1/models/{name:path}",
        dependencies=key,
        responses={status: {"model": ErrorBody} for status in (401, 404, 503)},
    )
    async def one_model(name: str) -> Model:
        """The model, if it is this one."""
        if name != service.name:
            raise ApiError(
                404, f"the model '{name}' does not exist: this server has '{service.name}'", "model_not_found"
            )
        return model

    @app.post(
        "/v1/chat/completions",
        dependencies=key,
        responses=answers,
        response_model=ChatCompletion,
        response_model_exclude_unset=True,
    )
    async def chat(request: Request, body: ChatBody) -> Any:
        """Answer a conversation."""
        answering = await service.chat(body, request.state.tenant)
        return await _answer(request, body, answering, ChatAnswers(service, answering.choices, bool(body.logprobs)))

    @app.post(
        "/v1/completions",
        dependencies=key,
        responses=answers,
        response_model=Completion,
        response_model_exclude_unset=True,
    )
    async def completions(request: Request, body: CompletionBody) -> Any:
        """Continue a text."""
        answering = await service.completion(body, request.state.tenant)
        has_logprobs = body.logprobs is not None
        return await _answer(request, body, answering, CompletionAnswers(service, answering.choices, has_logprobs))

    return app


async def _answer(
    request: Request, body: SamplingBody, answering: Answering, answers: ChatAnswers | CompletionAnswers
) -> Any:
    if body.stream:
        usage = bool((body.stream_options or {}).get("include_usage"))
        return _EventStream(_events(answering, answers, usage), answering)
    try:
        pieces = await _unless_gone(request, _all_pieces(answering))
    finally:
        answering.cancel()
    return Response(status_code=_GONE) if pieces is None else answers.whole(pieces)


async def _all_pieces(answering: Answering) -> list[list[Piece]]:
    """The pieces of each choice."""
    pieces: list[list[Piece]] = [[] for _ in answering.choices]
    async with aclosing(answering.pieces()) as news:  # type: ignore[type-var]
        async for index, piece in news:
            pieces[index].append(piece)
    return pieces


async def _events(
    answering: Answering, answers: ChatAnswers | CompletionAnswers, has_usage: bool
) -> AsyncIterator[str]:
    calls = [0] * len(answering.choices)
    async with aclosing(answering.pieces()) as news:  # type: ignore[type-var]
        try:
            if isinstance(answers, ChatAnswers):
                for index in range(len(answering.choices)):
                    yield event(answers.first(index))
            async for index, piece in news:
                chunk = answers.chunk(index, piece, calls[index])
                calls[index] += len(piece.said.tool_calls)
                if chunk is not None:
                    yield event(chunk)
        # The status has been sent; clients of OpenAI's raise an event that has an error.
        except Exception as error:
            yield event(_as_api_error(error).body)
            return
    if has_usage:
        yield event(answers.last())
    yield LAST_EVENT


async def _unless_gone(request: Request, work: Awaitable[_T]) -> _T | None:
    """What ``work`` returns; None if the client goes away before, which ends it."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answer_error(request: Request, error: Any) -> Response:
    return error.response()


async def _answer_invalid(request: Request, error: Any) -> Response:
    """A body that is not as described, in OpenAI's form; what was sent is not repeated."""
    problem = max(error.errors(), key=_how_far)
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {problem['ctx']['error']}", "invalid_value").response()
    if problem["loc"] == ("body",) and "json" not in request.headers.get("content-type", "").lower():
        message = "the body is not read as JSON: send the header Content-Type: application/json"
        return ApiError(400, message, "invalid_value").response()
    place = ".".join(str(part) for part in problem["loc"][1:])
    if problem["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter: {place}", "unknown_parameter", place).response()
    return ApiError(400, f"{place or 'body'}: {problem['msg']}", "invalid_value", place or None).response()


def _how_far(problem: dict[str, Any]) -> tuple[int, bool]:
    """How well it tells what is wrong: of forms that a part may have, one which fits but for a value was meant."""
    return len(problem["loc"]), not problem["type"].endswith(("_type", "literal_error"))


async def _answer_http(request: Request, error: Any) -> Response:
    response = ApiError(error.status_code, str(error.detail)).response()
    response.headers.update(error.headers or {})
    return response


async def _answer_failure(request: Request, error: Any) -> Response:
    return _as_api_error(error).response()


def _as_api_error(error: Exception) -> ApiError:
    """An error that nobody expected is the server's; its log has the details."""
    if isinstance(error, ApiError):
        return error
    _logger.error("a request failed", exc_info=error)
    return ApiError(500, f"the server failed: {type(error).__name__}")
