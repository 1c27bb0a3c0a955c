"""Messages that are typed or piped in: edited with readline in a terminal, with a history, over several lines."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from .console import stderr

_PROMPT, _MORE = "> ", ". "
_QUOTES = '"""'
_HISTORY_LENGTH = 1000


class MessageReader:
    """Reads messages, each a line, or several: after a backslash at its end, or between triple quotes."""

    def __init__(self, read_line: Callable[[str], str | None]) -> None:
        """``read_line`` takes a prompt and gives a line without its end, None where there is none."""
        self._read_line = read_line

    @classmethod
    @contextlib.contextmanager
    def for_stdin(cls) -> Iterator[Self]:
        """A reader of stdin; in a terminal its lines can be edited and are remembered."""
        if sys.stdin.isatty() and sys.stdout.isatty():
            with _remembered(history_file()):
                yield cls(_typed_line)
        else:
            yield cls(_piped_line)

    def read(self) -> str | None:
        """The next message without surrounding space; None at the end."""
        line = self._read_line(_PROMPT)
        if line is None:
            return None
        if line.lstrip().startswith(_QUOTES):
            return self._quoted(line.lstrip().removeprefix(_QUOTES))
        lines = []
        while line is not None and line.endswith("\\"):
            lines.append(line.removesuffix("\\"))
            line = self._read_line(_MORE)
        return "\n".join([*lines, line or ""]).strip()

    def _quoted(self, line: str | None) -> str:
        lines = []
        while line is not None and not line.rstrip().endswith(_QUOTES):
            lines.append(line)
            line = self._read_line(_MORE)
        return "\n".join([*lines, (line or "").rstrip().removesuffix(_QUOTES)]).strip()


def history_file() -> Path:
    """Where what was typed is remembered."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "quantspec" / "chat_history"


@contextlib.contextmanager
def _remembered(file: Path) -> Iterator[None]:
    """Edit lines, with those of earlier conversations to go back to, where Python was built with readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    # A history that cannot be read or kept is no reason not to talk.
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(_HISTORY_LENGTH)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
            # What was said to a model is nobody else's.
            file.chmod(0o600)


def _typed_line(prompt: str) -> str | None:
    try:
        return input(prompt)
    except EOFError:
        return None


def _piped_line(prompt: str) -> str | None:
    if sys.stdin.isatty():
        stderr().print(prompt, end="")
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None
