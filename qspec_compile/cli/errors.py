"""Errors as one line: what is wrong, and in brackets what to do about it."""

from __future__ import annotations

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
    message = lines[0] if lines else type(error).__name__
    names = [kind.__name__ for kind in type(error).__mro__]
    if lines and not isinstance(error, (*_PLAIN, CommandError)) and not set(names) & set(_HINTS):
        message = f"{type(error).__name__}: {message}"
    if isinstance(error, CommandError):
        return escape(message), escape(error.hint)
    hint = next((_HINTS[name] for name in names if name in _HINTS), "--debug shows where")
    return escape(message), escape("; ".join([hint, *getattr(error, "__notes__", ())]))


def read_text(file: Path, what: str) -> str:
    """The text in ``file``, which an error calls ``what``.

    Raises:
        CommandError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise CommandError(f"cannot read the {what} from '{file}': {reason}", "check the path") from error


def make_folder(folder: Path) -> None:
    """Create ``folder`` and those above it where they are missing.

    Raises:
        CommandError: it cannot be written to, or is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot write to '{folder}': {error.strerror}"
        raise CommandError(message, "choose a folder that can be written to") from error


def print_error(error: Exception) -> None:
    """One line on stderr."""
    message, hint = describe(error)
    stderr().print(f"[bold red]error:[/] {message}{f' [dim]({hint})[/]' if hint else ''}", soft_wrap=True)
