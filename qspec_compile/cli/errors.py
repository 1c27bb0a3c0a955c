"""Errors as one line: what is wrong, and in brackets what to do about it."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

from rich.markup import escape

from .console import stderr

# Expected errors, whose message speaks for itself; any other shows its type too.
_PLAIN = (ValueError, TypeError, OSError, ImportError)

# Name of an error's class -> what to do. Names, since importing the classes would import torch.
_HINTS = {
    "UnsupportedModelError": "docs/supported-models.md lists what converts",
    "CacheFullError": "--max-new-tokens and --max-cache-len set these limits",
    "OutOfMemoryError": "`quantspec inspect MODEL --context N` says what a context length needs",
    "GatedRepoError": "accept its licence on the Hub, then run `hf auth login`",
    "LocalEntryNotFoundError": "check the network, or give a local folder",
    "ConnectionError": "check the network, or give a local folder",
    "SavedModelError": "`quantspec convert` writes a new one",
    "UsageError": "`--help` after a command lists its options",
    "ModuleNotFoundError": "install what is missing with pip",
    "ValueError": "`--help` after a command lists its options",
    "TypeError": "`--help` after a command lists its options",
}


_NOT_UTF8 = "convert it, for example with iconv -t UTF-8"


class CommandError(Exception):
    """Input that a command cannot work with; ``hint`` says what would."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def describe(error: Exception) -> tuple[str, str]:
    """Message and hint of ``error``, one line each, safe to print as rich markup; the hint may be ''."""
    # typer's usage errors name the option only in this method.
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    # A wrong choice comes as "Value error, ..." from what checks it for typer.
    lines = text.replace("Value error, ", "").strip().splitlines()
    message = lines[0].removesuffix(".") if lines else type(error).__name__
    names = [kind.__name__ for kind in type(error).__mro__]
    if lines and not isinstance(error, (*_PLAIN, CommandError)) and not set(names) & set(_HINTS):
        message = f"{type(error).__name__}: {message}"
    if isinstance(error, CommandError):
        return escape(message), escape(error.hint)
    hint = next((_HINTS[name] for name in names if name in _HINTS), "--debug shows where")
    # Usage errors of typer know whose help there is.
    if (context := getattr(error, "ctx", None)) is not None:
        hint = f"see `{context.command_path} --help`"
    return escape(message), escape("; ".join([hint, *getattr(error, "__notes__", ())]))


def read_text(file: Path, what: str) -> str:
    """The text in ``file``, which an error calls ``what``.

    Raises:
        CommandError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot read the {what} from '{file}': {error.strerror}", "check the path") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"cannot read the {what} from '{file}': it is not UTF-8 text", _NOT_UTF8) from error


def read_stdin() -> str:
    """All of stdin.

    Raises:
        CommandError: it is not UTF-8.
    """
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise CommandError("cannot read the prompt from stdin: it is not UTF-8 text", _NOT_UTF8) from error


def make_folder(folder: Path) -> None:
    """Create ``folder`` and those above it where they are missing.

    Raises:
        CommandError: it cannot be written to, or is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def check_folder(folder: Path) -> None:
    """Check that ``folder`` can be made and written to, and leave everything as it was.

    So nothing is left over where the work whose results are written there fails, or is killed.

    Raises:
        CommandError: it cannot be written to, or is a file.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        for place in missing:
            # Not there, or another program has put something in it.
            with contextlib.suppress(OSError):
                place.rmdir()


def _unwritable(folder: Path, error: OSError) -> CommandError:
    return CommandError(f"cannot write to '{folder}': {error.strerror}", "choose a folder that can be written to")


def write_whole(file: Path, text: str) -> None:
    """Write ``text`` to ``file``, which is there to its end or as it was before.

    Raises:
        CommandError: it cannot be written.
    """
    make_folder(file.parent)
    part = file.with_name(f"{file.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except OSError as error:
        raise _unwritable(file.parent, error) from error
    finally:
        part.unlink(missing_ok=True)


def print_error(error: Exception, origin: str = "") -> None:
    """One line on stderr, whose hint is ``origin`` where that is known."""
    message, hint = describe(error)
    hint = escape(origin) or hint
    stderr().print(f"[bold red]error:[/] {message}{f' [dim]({hint})[/]' if hint else ''}", soft_wrap=True)
