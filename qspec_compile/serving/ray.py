"""Replicas on Ray Serve: the same endpoints in front of engines on many GPUs; needs the extra ``ray``.

An ingress reads a request's body, so that its router can send texts that begin alike to one replica, which has cached
their beginning. A replica answers with the application of :mod:`quantspec.serving.server.app`, whose messages are
passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import inspect
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence, Set
from itertools import takewhile
from pathlib import Path
from typing import Any, Self, cast

import ray
from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantspec.checkpoint.folder import DESCRIPTION_FILE
from quantspec.config import QuantSpecConfig
from quantspec.model import QuantSpecModel, convert, from_pretrained

from .engine import Engine
from .server.app import build_app
from .server.errors import ApiError
from .server.gate import Gate
from .server.service import Service
from .sizes import check_draft_of_engine, check_options

# Characters of a prompt that say where it goes; fewer than the tokens that are cached together.
_PREFIX_CHARACTERS = 1024
# Requests that a replica may have beyond the one with fewest before a text goes elsewhere, its beginning cached or not.
_MOST_AHEAD = 4
# Seconds in which a replica has to say how many requests it has.
_COUNT_DEADLINE = 0.5
# Replicas that a request may end with before its client is told: it may be the request's own fault.
_MOST_REPLICAS = 2
# Of an ASGI scope, what the endpoints read.
_SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")


class ReplicaOptions(BaseModel):
    """What :func:`build` takes.

    Attributes:
        model: a saved pair, or what ``AutoModelForCausalLM.from_pretrained`` takes; every node must find it there.
        name: that clients ask for; ``model`` if None.
        gpus: of each replica, 0 for the CPU; a share of one puts several replicas on it.
        cpus: of each replica.
        min_replicas, max_replicas: between which their number follows the load; ``max_replicas`` is ``min_replicas`` if
            not given.
        requests_per_replica: that autoscaling aims at.
        api_keys: any of them lets a request in; anybody is let in if there is none.
        drain_seconds: that a replica which is no longer needed has for the requests it answers; what is left then is
            cut off. One that answers nothing leaves at once.
        conversion: options of ``convert`` or of a saved pair.
        engine: options of :class:`quantspec.serving.Engine`.
        autoscaling: further fields of Ray's ``AutoscalingConfig``.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    name: str | None = None
    gpus: float = Field(1, ge=0)
    cpus: float = Field(1, ge=0)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    requests_per_replica: float = Field(8, gt=0)
    api_keys: list[str] = []
    drain_seconds: float = Field(600, ge=0)
    conversion: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    autoscaling: dict[str, Any] = {}

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, given: dict[str, Any]) -> dict[str, Any]:
        _check_names("an engine", given, set(inspect.signature(Engine).parameters) - {"pair", "tokenizer"})
        with _type_errors_as_value_errors():
            check_options(given)
        return given

    @field_validator("conversion")
    @classmethod
    def _check_conversion(cls, given: dict[str, Any]) -> dict[str, Any]:
        # What the call alone knows is told by a replica.
        of_calls = {*inspect.signature(convert).parameters, *inspect.signature(from_pretrained).parameters}
        of_calls -= {"model", "directory", "device", "options"}
        with _type_errors_as_value_errors():
            fields = {name: value for name, value in given.items() if name not in of_calls}
            config = QuantSpecConfig.from_options(given.get("config"), fields)
        check_draft_of_engine(config)
        return given

    @field_validator("autoscaling")
    @classmethod
    def _check_autoscaling(cls, given: dict[str, Any]) -> dict[str, Any]:
        own = {"min_replicas", "max_replicas", "target_ongoing_requests"}
        _check_names("Ray's AutoscalingConfig beside this", given, set(AutoscalingConfig.model_fields) - own)
        return given

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is less than min_replicas={self.min_replicas}")
        return self


def _check_names(owner: str, given: Mapping[str, Any], known: Set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"{owner} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")


@contextlib.contextmanager
def _type_errors_as_value_errors() -> Iterator[None]:
    """Raise a ``TypeError`` as a ``ValueError``, which pydantic turns into its own."""
    try:
        yield
    except TypeError as error:
        raise ValueError(str(error)) from error


def build(options: ReplicaOptions | Mapping[str, Any]) -> Application:
    """The application for ``serve.run``; Ray's own tools give the options of a configuration file.

    Raises:
        pydantic.ValidationError: an option is unknown or out of range.
    """
    options = ReplicaOptions.model_validate(options)
    max_sequences = options.engine.get("max_sequences", 8)
    replica = cast(Any, Replica).options(
        ray_actor_options={"num_gpus": options.gpus, "num_cpus": options.cpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas or options.min_replicas,
            target_ongoing_requests=options.requests_per_replica,
            **options.autoscaling,
        ),
        # Some wait beside those that run, so that a place is taken as soon as it is free.
        max_ongoing_requests=2 * max_sequences,
        max_queued_requests=options.engine.get("max_waiting", 1024),
        graceful_shutdown_timeout_s=options.drain_seconds,
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
    )
    # What it passes on has to end before it does.
    ingress = cast(Any, Ingress).options(graceful_shutdown_timeout_s=options.drain_seconds)
    return ingress.bind(options.api_keys, replica.bind(options))


class PrefixRouter(RequestRouter):
    """Sends texts that begin alike to one replica, as long as that has not many more requests than another.

    Which one follows from the beginning and the replicas alone (rendezvous hashing): every ingress chooses the same,
    and a replica that comes or goes moves no texts between the others.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks, the best first."""
        prefix = ""
        if pending_request is not None:
            prefix = pending_request.kwargs.get("prefix", "")
            # While all replicas are full, it waits longer each time instead of asking them as fast as it can.
            pending_request.routing_context.should_backoff = True
        loads = await asyncio.gather(*map(self._load, candidate_replicas))
        names = [replica.replica_id.unique_id for replica in candidate_replicas]
        return [[candidate_replicas[index]] for index in ranking(prefix, names, loads)]

    async def _load(self, replica: RunningReplica) -> int:
        """Requests that a replica has: as is known, which is forgotten after some seconds, or as it says."""
        known = self.replica_queue_len_cache.get(replica.replica_id)
        if known is not None:
            return known
        try:
            count = await asyncio.wait_for(replica.get_queue_len(deadline_s=_COUNT_DEADLINE), _COUNT_DEADLINE)
        # Ray asks again before it sends a request there.
        except (RayError, TimeoutError):
            return 0
        self.on_new_queue_len_info(replica.replica_id, count)
        return count


def ranking(prefix: str, names: Sequence[str], loads: Sequence[int]) -> list[int]:
    """Indices of replicas with these names and numbers of requests, the best for a text with this prefix first."""
    least = min(loads, default=0)

    def order(index: int) -> tuple[int, str]:
        weight = hashlib.sha256(f"{prefix}\0{names[index]}".encode()).hexdigest()
        is_free = prefix and loads[index] <= least + _MOST_AHEAD
        return (least if is_free else loads[index], weight)

    return sorted(range(len(names)), key=order)


def prefix_of(body: bytes, headers: Sequence[tuple[bytes, bytes]]) -> str:
    """A name for the beginning of the text in a request's ``body``, one for each API key; "" where there is none."""
    try:
        parsed = json.loads(body)
        text = parsed.get("prompt") or _opening(parsed.get("messages") or [])
        beginning = json.dumps(text)[:_PREFIX_CHARACTERS].encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        # It is for the endpoints to refuse.
        return ""
    if not text:
        return ""
    # Cached prompts are shared by requests of one key only.
    key = next((value for name, value in headers if name == b"authorization"), b"")
    return hashlib.sha256(key + b"\0" + beginning).hexdigest()


def _opening(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What every turn of a conversation has: its messages up to the first of the user's."""
    others = list(takewhile(lambda message: message.get("role") != "user", messages))
    return [*messages[: len(others) + 1]]


@serve.deployment(health_check_period_s=10, health_check_timeout_s=60)
class Replica:
    """A pair, its engine and its endpoints, on a node of the cluster."""

    def __init__(self, options: ReplicaOptions) -> None:
        qs, tokenizer = _load(options)
        engine = Engine(qs, tokenizer=tokenizer, **options.engine)
        engine.warm_up()
        self._service = Service(engine, tokenizer, options.name or options.model)
        self._app = build_app(self._service)

    async def answer(self, scope: dict[str, Any], body: bytes, prefix: str) -> AsyncIterator[Message]:
        """The messages with which the endpoints answer; whoever leaves early cancels the request.

        Where nothing can be answered any more, the replica ends, and whoever waits for a first message asks another.
        """
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        given = [{"type": "http.request", "body": body, "more_body": False}]
        left = asyncio.Event()

        async def receive() -> Message:
            if given:
                return given.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        running = asyncio.create_task(run())
        has_begun = False
        try:
            while (message := await messages.get()) is not None:
                if not has_begun and self._service.is_lost:
                    _end_this_replica()
                    await left.wait()
                has_begun = True
                yield message
            await running
        finally:
            left.set()
            running.cancel()

    def check_health(self) -> None:
        """Have Ray replace a replica whose engine takes no steps: nothing that it was asked can be answered.

        Raises:
            RuntimeError: it does not.
        """
        try:
            self._service.check_health()
        except ApiError as error:
            # By its error alone Ray would let it drain first.
            _end_this_replica()
            raise RuntimeError(str(error)) from error

    def __del__(self) -> None:
        """End the engine, once the requests are answered or given up."""
        if hasattr(self, "_service"):
            self._service.close()


def _end_this_replica() -> None:
    ray.kill(ray.get_runtime_context().current_actor)


# All that replicas and their queue hold; what is more is refused there.
@serve.deployment(max_ongoing_requests=100_000)
class Ingress:
    """Keys and limits, and the way to a replica."""

    def __init__(self, api_keys: Sequence[str], replicas: DeploymentHandle) -> None:
        self._gate = Gate(_Forwarding(replicas), api_keys)

    async def __call__(self, request: HttpRequest) -> Response:
        """The answer, which asks a replica as it is sent."""
        return _Answer(self._gate)


class _Answer(Response):
    """An ASGI application as a response, which is what Ray Serve takes from a deployment."""

    def __init__(self, app: Gate) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as ASGI has it; paths begin behind the application's route prefix."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        await self._app({**scope, "path": path, "raw_path": path.encode(), "root_path": ""}, receive, send)


class _Forwarding:
    """An ASGI application that has a replica answer."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas.options(stream=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as ASGI has it."""
        try:
            await self._forward(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/metrics":
            raise ApiError(404, "metrics of replicas are Ray's: ask the metrics endpoint of its nodes")
        # Nothing else has a body, nor a limit to it.
        body = await _body(receive) if scope["path"].startswith("/v1/") else b""
        if body is None:
            return
        described = {name: scope[name] for name in _SCOPE if name in scope} | {"state": _state(scope)}
        prefix = prefix_of(body, scope["headers"])
        working = asyncio.ensure_future(self._relay(described, body, prefix, send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            working.cancel()
            leaving.cancel()

    async def _relay(self, scope: dict[str, Any], body: bytes, prefix: str, send: Send) -> None:
        for left in reversed(range(_MOST_REPLICAS)):
            answer = self._replicas.answer.remote(scope, body, prefix=prefix)
            has_begun = False
            try:
                async for message in answer:
                    has_begun = True
                    await send(message)
                return
            except asyncio.CancelledError:
                answer.cancel()
                raise
            except BackPressureError as error:
                raise ApiError(429, "too many requests wait already; try again later", "rate_limit_exceeded") from error
            except (RayError, RayServeException) as error:
                # The connection breaks where a status has been sent.
                if has_begun:
                    raise
                # Of a replica that has ended, nobody has seen a word.
                if not left or not isinstance(error, RayActorError):
                    raise ApiError(503, "the replica did not answer: try again", "no_replica") from error


def _state(scope: Scope) -> Mapping[str, Any]:
    return {name: scope["state"][name] for name in ("is_draining", "tenant") if name in scope["state"]}


async def _body(receive: Receive) -> bytes | None:
    """What the client sent; None if it has gone."""
    parts = []
    while True:
        try:
            message = await receive()
        except HTTPException as error:
            raise ApiError(error.status_code, str(error.detail)) from error
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _load(options: ReplicaOptions) -> tuple[QuantSpecModel, Any]:
    """The pair and its tokenizer, on the GPU that Ray gave to this replica."""
    device = "cuda" if options.gpus else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if (Path(options.model) / DESCRIPTION_FILE).is_file():
        return from_pretrained(options.model, device=device, **options.conversion), tokenizer
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    model.to(device).eval()
    return convert(model, **options.conversion), tokenizer
