"""The typer application: one subcommand per module, and one line for every error."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import quiet_libraries
from .defaults import origin, read_environment, read_file
from .errors import print_error
from .help import Command, Group
from .options import expand_options

_DEBUG = "--debug"
_HELP_NAMES = ["-h", "--help"]
_HELP_OPTIONS = {"help_option_names": _HELP_NAMES}


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


def build_app() -> typer.Typer:
    """The application with a subcommand for each module of this package that defines ``command``."""
    app = typer.Typer(
        name="quantspec", cls=Group, callback=_root, rich_markup_mode=None, context_settings=_HELP_OPTIONS
    )
    for module_info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module_info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{__package__}.{module_info.name}")
        if hasattr(module, "command"):
            settings = {"cls": Command, "context_settings": _HELP_OPTIONS, **getattr(module, "SETTINGS", {})}
            app.command(module_info.name, **settings)(expand_options(module.command))
    return app


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
    else:
        quiet_libraries()
    try:
        program: Any = typer.main.get_command(build_app())
        read_environment(program.commands)
        # Help is given whatever the file says.
        helps = not remaining or not set(_HELP_NAMES).isdisjoint(options)
        defaults = {} if helps else read_file(program.commands)
        status = program.main(
            remaining or ["--help"], prog_name="quantspec", standalone_mode=False, default_map=defaults
        )
        return int(status or 0)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        print_error(error, origin(error))
        return 2
