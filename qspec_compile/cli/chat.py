"""``quantspec chat``: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .console import print_rows, stderr
from .errors import CommandError, print_error
from .generate import apply_chat_template, warm_up
from .loading import find_pair
from .messages import MessageReader
from .options import ModelOptions, SamplingOptions, SplitRunOptions

if TYPE_CHECKING:
    from ._conversation import Conversation

COMMANDS = """\
/help       this list
/reset      forget the conversation
/save FILE  write it to FILE: as messages where that ends with .json, else as Markdown
/stats      statistics of the last answer
/exit       end, as Ctrl-D does
Ctrl-C      end the answer
\\           a backslash at the end of a line: the message goes on
\"\"\"         lines between this and another are one message"""
_HELLO = {"role": "user", "content": "Hello"}


SETTINGS = {"epilog": 'quantspec chat MODEL\nquantspec chat MODEL --system "Answer in one sentence." --temperature 0.7'}


def command(
    model: ModelOptions,
    run: SplitRunOptions,
    sampling: SamplingOptions,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
) -> None:
    if sys.stdin is None or sys.stdin.closed:
        raise CommandError("there is no stdin to read messages from", "use `quantspec generate`")
    arguments = sampling.generate_arguments()
    found = find_pair(model, run, generation=arguments, num_ranks=run.tensor_parallel)
    tokenizer = found.tokenizer
    # A template that refuses these messages is told of before the first one.
    first = [*([{"role": "system", "content": system}] if system is not None else []), _HELLO]
    inputs = apply_chat_template(tokenizer, first)
    found.check_fit(inputs.input_ids.shape[1] + arguments["max_new_tokens"])
    with contextlib.closing(found.load()) as qs:
        if model.num_speculative_tokens is not None:
            arguments["num_speculative_tokens"] = model.num_speculative_tokens
        if model.draft is not None:
            arguments["draft"] = model.draft
        arguments["tokenizer"] = tokenizer
        warm_up(qs, {**inputs.to(qs.device), **arguments})
        from ._conversation import Conversation

        talk(Conversation(qs, tokenizer, system, arguments))


def talk(conversation: Conversation) -> None:
    """Read messages and commands from stdin until its end or ``/exit``."""
    with MessageReader.for_stdin() as reader:
        if sys.stdin.isatty():
            stderr().print("[dim]/help lists commands, /exit ends[/]")
        while True:
            try:
                message = reader.read()
                if message is None or message == "/exit":
                    return
                if message:
                    _obey(conversation, message)
            except KeyboardInterrupt:
                stderr().print("\n[dim]interrupted; /exit ends[/]")
            except Exception as error:
                print_error(error)


def _obey(conversation: Conversation, message: str) -> None:
    command, _, rest = message.partition(" ")
    if command == "/help":
        print_rows(COMMANDS)
    elif command == "/reset":
        conversation.reset()
    elif command == "/save":
        conversation.save(rest.strip())
    elif command == "/stats":
        if (stats := conversation.qs.last_stats) is None:
            stderr().print("nothing said yet")
        else:
            print_rows(str(stats))
    # A path may begin a message, and no command has a slash within.
    elif command.startswith("/") and "/" not in command[1:]:
        raise CommandError(f"there is no command '{command}'", "/help lists them")
    else:
        conversation.answer(message)
