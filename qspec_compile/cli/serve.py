"""``quantspec serve``: an HTTP server that speaks OpenAI's protocol."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import typer

from quantspec.config import AUTO
from quantspec.versions import install_command

from .console import stderr, working
from .errors import CommandError
from .loading import find_pair
from .options import ModelOptions, SplitRunOptions, real, tokens, whole

SETTINGS = {"epilog": "quantspec serve MODEL\nquantspec serve MODEL --port 9000 --api-key KEY --max-sequences 16"}


_KEY_VARIABLE = "QUANTSPEC_API_KEY"


@dataclass(frozen=True)
class ServerOptions:
    """Where the server listens, to whom, and how much it takes on."""

    PANEL: ClassVar[str] = "Server"

    host: Annotated[
        str, typer.Option(metavar="NAME", help="Address to listen at; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(parser=whole(1, 65535), metavar="N", help="Port to listen at.")] = 8000
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar=_KEY_VARIABLE,
            show_envvar=False,
            metavar="TEXT",
            help="Key that lets a request in; may be repeated. Also from QUANTSPEC_API_KEY, which `ps` does not show. "
            "[default: anybody is let in]",
        ),
    ] = None
    name: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Name that requests give the model. [default: MODEL]")
    ] = None
    max_sequences: Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Requests that run at once.")] = 8
    max_length: Annotated[
        int | None,
        typer.Option(parser=tokens(), metavar="N", help="Most tokens of a request. [default: what memory allows]"),
    ] = None
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            parser=tokens(),
            metavar="N",
            help="Tokens of prompts that are prefilled between two cycles. [default: 4096 on a GPU, 1024 on a CPU]",
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float, typer.Option(parser=real(0, 1), metavar="X", help="Share of a GPU's memory for weights and cache.")
    ] = 0.9
    max_waiting: Annotated[
        int,
        typer.Option(
            parser=whole(1), metavar="N", help="Requests that may wait for a place; more are told to come back."
        ),
    ] = 1024
    drain_seconds: Annotated[
        float,
        typer.Option(parser=real(0), metavar="X", help="Time that requests get to end after SIGTERM or Ctrl-C."),
    ] = 30


def command(
    model: ModelOptions,
    server: ServerOptions,
    run: SplitRunOptions,
    tune: Annotated[
        bool, typer.Option("--tune", help="Let the draft learn the model's distribution before serving.")
    ] = False,
) -> None:
    if server.api_key is None and not os.environ.get(_KEY_VARIABLE, "unset").strip():
        raise CommandError(f"{_KEY_VARIABLE} is empty", "set it to the key, or unset it to let anybody in")
    if not all(map(_can_be_sent, server.api_key or ())):
        raise CommandError(
            "an API key is empty, or has characters that no header carries",
            "choose letters, digits and signs of ASCII, without spaces around them",
        )
    with working("importing"):
        try:
            from quantspec.serving.server.run import Server, bind
        except ImportError as error:
            message = f"serving needs packages that are not installed: {error}"
            raise CommandError(message, install_command("serve")) from error
        from quantspec.serving.engine import Engine
        from quantspec.serving.server.service import Service
    if tune and run.tensor_parallel > 1:
        raise CommandError("a pair that is split over ranks is not tuned", "tune it on one GPU: `quantspec tune`")
    try:
        listener = bind(server.host, server.port)
    except OSError as error:
        message = f"cannot listen at {server.host}:{server.port}: {error.strerror}"
        raise CommandError(message, "choose another --port, or an address of this machine as --host") from error
    # The pair keeps its own number, which is the most that the engine then drafts.
    is_auto = model.num_speculative_tokens == AUTO
    converted = replace(model, num_speculative_tokens=None) if is_auto else model
    found = find_pair(converted, run, generation={}, num_ranks=run.tensor_parallel)
    if server.max_length is not None:
        found.check_fit(server.max_length)
    with contextlib.closing(found.load()) as qs:
        if tune:
            with working("tuning"):
                report = qs.tune(tokenizer=found.tokenizer)
            stderr().print(str(report), markup=False, soft_wrap=True)
        engine = Engine(
            qs,
            tokenizer=found.tokenizer,
            max_sequences=server.max_sequences,
            max_length=server.max_length,
            max_waiting=server.max_waiting,
            max_num_batched_tokens=server.max_num_batched_tokens,
            gpu_memory_utilization=server.gpu_memory_utilization,
            num_speculative_tokens=AUTO if is_auto else None,
        )
        name = server.name or model.model
        service = Service(engine, found.tokenizer, name)
        with working("warming up"):
            engine.warm_up()
        stderr().print(
            f"serving '{name}' at http://{server.host}:{server.port}: {engine.max_sequences} requests at once, of "
            f"{engine.max_length} tokens at most, and {engine.num_tokens} tokens in all",
            markup=False,
            soft_wrap=True,
        )
        Server(service, server.api_key or (), server.drain_seconds).run([listener])


def _can_be_sent(key: str) -> bool:
    """Whether a header has room for a key as it stands."""
    return bool(key) and key.isascii() and key.isprintable() and key == key.strip()
