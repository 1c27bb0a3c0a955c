"""Help screens: grouped panels whose option names are never cut, whatever the width of the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

# Longer names of one option go below each other.
_WIDEST_NAMES = 32


class Command(TyperCommand):
    """A command with this module's help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print usage, description, arguments and options by panel, and examples."""
        parameters = self.get_params(ctx)
        arguments = [parameter for parameter in parameters if parameter.param_type_name == "argument"]
        names = (_name(argument) if argument.required else f"[{_name(argument)}]" for argument in arguments)
        print_usage(" ".join(("Usage:", ctx.command_path, "[OPTIONS]", *names)), self.help or "")
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in parameters:
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            usual = "Options"
            if parameter in arguments:
                usual, record = "Arguments", (_name(parameter), record[1])
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(record)
        for title, rows in panels.items():
            print_panel(title, rows)
        if self.epilog:
            print_examples(self.epilog)


def _name(argument: Any) -> str:
    """Without its type, which every argument's text tells."""
    return argument.metavar or argument.name.upper()


def print_usage(usage: str, description: str) -> None:
    """How a command is called, and what it does."""
    console = Console(highlight=False)
    console.print(Text(usage, style="bold"), soft_wrap=True)
    console.print(Text(f"\n{description}\n"))


def print_panel(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Names in a column as wide as the longest; the text beside them takes the rest."""
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(ratio=1)
    for name, text in rows:
        names = name if len(name) <= _WIDEST_NAMES else name.replace(", ", "\n").replace(" / ", "\n")
        table.add_row(Text(names), Text(" ".join(text.split())))
    _print_in_panel(title, table)


def print_examples(lines: str) -> None:
    """Command lines; what goes on below its beginning is indented."""
    table = Table.grid(padding=(0, 1))
    for line in lines.splitlines():
        table.add_row(Text("$", style="dim"), Text(line))
    _print_in_panel("Examples", table)


def _print_in_panel(title: str, content: Table) -> None:
    Console(highlight=False).print(Panel(content, title=Text(title), title_align="left", border_style="dim"))
