"""What the program's commands are, and what each does; a command is built when it is first asked for.

The command NAME is ``command`` in the module NAME of this package, with ``SETTINGS`` if the module has some.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import typer
from typer.core import TyperGroup

from .help import Command, print_panel, print_usage

HELP_NAMES = ["-h", "--help"]
HELP_OPTIONS = {"help_option_names": HELP_NAMES}

SUMMARIES = {
    "generate": "Continue a prompt, streaming the new text to stdout.",
    "chat": "Talk with a model; /help lists what else may be typed, /exit or Ctrl-D ends.",
    "serve": "Serve a model over HTTP, for OpenAI's clients.",
    "inspect": "Tell whether a model fits a card, how long a context, and what would be converted; loads no weights.",
    "convert": "Convert a model (no saved pair) and save the pair, so that loading it quantizes nothing.",
    "tune": "Convert a model, let its draft learn the model's own distribution, and save the pair.",
    "bench": "Measure the speed on this machine; a quick look unless --full.",
    "eval": "Evaluate with lm-eval on its tasks or your own; options go to it as they are.",
    "parity": "Compare a pair with its model and print a report in Markdown; ends with 1 if a threshold is missed.",
}


class Commands(Mapping[str, Any]):
    """Commands by name; help of the program needs none of them, and a call one."""

    def __init__(self) -> None:
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            self._built[name] = _build(name, SUMMARIES[name])
        return self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(SUMMARIES)

    def __len__(self) -> int:
        return len(SUMMARIES)


def _build(name: str, summary: str) -> Any:
    # Not for the program's help, which is to appear at once.
    from .defaults import read_environment
    from .options import expand_options

    module = importlib.import_module(f"{__package__}.{name}")
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    settings = {"cls": Command, "context_settings": HELP_OPTIONS, **getattr(module, "SETTINGS", {})}
    alone.command(name, help=summary, **settings)(expand_options(module.command))
    command = typer.main.get_command(alone)
    read_environment(command)
    return command


class Group(TyperGroup):
    """The program, with help like its commands'."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = Commands()  # type: ignore[assignment]

    def list_commands(self, ctx: Any) -> list[str]:
        """Names, in the order of the help."""
        return list(self.commands)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print usage, description, options and commands."""
        print_usage(self.get_usage(ctx), self.help or "")
        records = (parameter.get_help_record(ctx) for parameter in self.get_params(ctx))
        print_panel("Options", [record for record in records if record is not None])
        print_panel("Commands", SUMMARIES.items())
