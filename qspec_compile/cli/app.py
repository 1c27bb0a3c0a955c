"""The program: its own options, defaults from the environment and a file, and one line for every error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from .commands import HELP_NAMES, HELP_OPTIONS, Group

_DEBUG = "--debug"


def _print_version(value: bool) -> None:
    if value:
        import quantspec

        print(f"quantspec {quantspec.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(_DEBUG, help="Show the traceback of an error, and the warnings of libraries.")
    ] = False,
) -> None:
    """Quantized self-speculative decoding for Hugging Face decoders.

    Options may also be set in quantspec.toml, by their names, or in the environment, as QUANTSPEC_MAX_NEW_TOKENS.
    """
    if not debug:
        from .console import quiet_libraries

        quiet_libraries()


def build_app() -> typer.Typer:
    """The application, whose group has the commands."""
    return typer.Typer(
        name="quantspec", cls=Group, callback=_root, rich_markup_mode=None, context_settings=HELP_OPTIONS
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``quantspec`` with these arguments (``sys.argv``'s if None).

    Returns:
        The exit status: 0, 2 after an error (one line on stderr), 130 after Ctrl-C.
    """
    remaining = list(sys.argv[1:] if arguments is None else arguments)
    # Allowed anywhere on the line, where it is thought of after an error.
    options = remaining[: remaining.index("--")] if "--" in remaining else remaining
    debug = _DEBUG in options
    if debug:
        remaining.remove(_DEBUG)
    # Help is given whatever the file says.
    helps = not remaining or not set(HELP_NAMES).isdisjoint(options)
    if debug and remaining:
        remaining.insert(0, _DEBUG)
    try:
        program: Any = typer.main.get_command(build_app())
        status = program.main(
            remaining or ["--help"],
            prog_name="quantspec",
            standalone_mode=False,
            default_map={} if helps else _defaults(program),
        )
        return int(status or 0)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        from .defaults import origin
        from .errors import print_error

        if debug:
            import traceback

            traceback.print_exc()
        print_error(error, origin(error))
        return 2


def _defaults(program: Any) -> dict[str, dict[str, Any]]:
    from .defaults import read_file

    return read_file(program.commands)
