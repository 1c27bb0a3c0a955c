"""``quantspec chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .console import stderr
from .errors import CommandError, print_error
from .generate import apply_chat_template, warm_up
from .loading import find_pair
from .options import ModelOptions, RunOptions, SamplingOptions

if TYPE_CHECKING:
    from ._conversation import Conversation

_COMMANDS = "/reset forgets the conversation, /stats tells of the last answer, /exit ends"
_HELLO = {"role": "user", "content": "Hello"}


SETTINGS = {"epilog": 'quantspec chat MODEL\nquantspec chat MODEL --system "Answer in one sentence." --temperature 0.7'}


def command(
    model: ModelOptions,
    run: RunOptions,
    sampling: SamplingOptions,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
) -> None:
    """Talk with a model; Ctrl-C interrupts an answer, /exit or Ctrl-D ends."""
    if sys.stdin is None or sys.stdin.closed:
        raise CommandError("there is no stdin to read messages from", "use `quantspec generate`")
    arguments = sampling.generate_arguments()
    found = find_pair(model, run, generation=arguments)
    tokenizer = found.tokenizer
    # A template that refuses these messages is told of before the first one.
    first = [*([{"role": "system", "content": system}] if system is not None else []), _HELLO]
    inputs = apply_chat_template(tokenizer, first)
    found.check_fit(inputs.input_ids.shape[1] + arguments["max_new_tokens"])
    qs = found.load()
    if model.num_speculative_tokens is not None:
        arguments["num_speculative_tokens"] = model.num_speculative_tokens
    if model.draft is not None:
        arguments["draft"] = model.draft
    arguments["tokenizer"] = tokenizer
    warm_up(qs, {**inputs.to(qs.device), **arguments})
    from ._conversation import Conversation

    talk(Conversation(qs, tokenizer, system, arguments))


def talk(conversation: Conversation) -> None:
    """Read lines from stdin until its end or ``/exit``: messages and commands."""
    from quantspec import CacheFullError

    if sys.stdin.isatty():
        stderr().print(f"[dim]{_COMMANDS}[/]")
    while True:
        try:
            line = _read_line()
            if line is None or line == "/exit":
                return
            if line:
                _obey(conversation, line)
        except KeyboardInterrupt:
            stderr().print("\n[dim]interrupted; /exit ends[/]")
        except CacheFullError as error:
            hint = "a shorter message, fewer --max-new-tokens or a larger --max-cache-len fit"
            if conversation.has_turns:
                hint = "/reset forgets the conversation and makes room"
            print_error(CommandError(str(error), hint))
        except Exception as error:
            print_error(error)


def _obey(conversation: Conversation, line: str) -> None:
    if line == "/reset":
        conversation.reset()
    elif line == "/stats":
        stats = conversation.qs.last_stats
        stderr().print("nothing said yet" if stats is None else str(stats), markup=False)
    elif line.startswith("/"):
        stderr().print(f"[dim]no such command; {_COMMANDS}[/]")
    else:
        conversation.answer(line)


def _read_line() -> str | None:
    """The next line without surrounding space; None at the end of stdin. A terminal gets a prompt, on stderr."""
    if sys.stdin.isatty():
        try:
            return stderr().input("[bold]> [/]").strip()
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None
