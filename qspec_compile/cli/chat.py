"""``quantspec chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .console import stderr
from .errors import CommandError, print_error
from .generate import apply_chat_template, warm_up
from .loading import load_pair
from .options import ModelOptions, RunOptions, SamplingOptions

if TYPE_CHECKING:
    from ._conversation import Conversation

_COMMANDS = "/reset forgets the conversation, /stats tells of the last answer, /exit ends"


def command(
    model: ModelOptions,
    run: RunOptions,
    sampling: SamplingOptions,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
) -> None:
    """Talk with a model; Ctrl-C interrupts an answer, /exit or Ctrl-D ends."""
    if sys.stdin is None or sys.stdin.closed:
        raise CommandError("there is no stdin to read messages from", "use `quantspec generate`")
    arguments = sampling.generate_arguments()
    qs, tokenizer = load_pair(model, run)
    # A model without a chat template is refused before the first message.
    inputs = apply_chat_template(tokenizer, [{"role": "user", "content": "Hello"}]).to(qs.device)
    if model.num_speculative_tokens is not None:
        arguments["num_speculative_tokens"] = model.num_speculative_tokens
    arguments["tokenizer"] = tokenizer
    warm_up(qs, {**inputs, **arguments})
    from ._conversation import Conversation

    talk(Conversation(qs, tokenizer, system, arguments))


def talk(conversation: Conversation) -> None:
    """Read lines from stdin until its end or ``/exit``: messages and commands."""
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
