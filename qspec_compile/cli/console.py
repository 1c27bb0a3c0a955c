"""What the user sees besides data: progress and notes on stderr, and silence of libraries."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from quantspec.logging import without_bars_of_libraries

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

# Columns of a table that no terminal limits.
_PIPED_WIDTH = 160


def stderr() -> Console:
    """For everything that is not data."""
    return Console(stderr=True, highlight=False)


def stdout() -> Console:
    """For tables; wide enough for them where it is a file or a pipe."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPED_WIDTH)


def print_rows(lines: str) -> None:
    """On stderr, lines of a name, two spaces or more, and a text; what is long goes on below its beginning."""
    table = Table.grid(padding=(0, 2))
    for line in lines.splitlines():
        name, _, text = line.partition("  ")
        table.add_row(Text(name), Text(text.strip()))
    stderr().print(table)


def quiet_libraries() -> None:
    """Keep warnings of torch, torchao and transformers off the screen, and bars out of files; call it before import."""
    warnings.filterwarnings("ignore")
    # Loggers without a handler of their own, as torchao's, end here.
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_LOGS", "-all")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not stderr().is_terminal:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextmanager
def working(description: str) -> Iterator[None]:
    """A progress bar on stderr, if that is a terminal, that follows what quantspec logs.

    A record's message becomes the text; with ``extra={"done": n, "total": m}`` it moves the bar too.
    """
    console = stderr()
    if not console.is_terminal:
        yield
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    # One display: what libraries draw would tear it.
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    counted = (*columns, BarColumn(), MofNCompleteColumn())
    with without_bars_of_libraries(), Progress(*columns, console=console, transient=True) as progress:
        handler = _ProgressHandler(progress, progress.add_task(description, total=None), columns, counted)
        logger = logging.getLogger("quantspec")
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)


class _ProgressHandler(logging.Handler):
    """Shows log records as the state of one line, which has a bar and numbers (``counted``) where something counts."""

    def __init__(
        self, progress: Progress, task: TaskID, columns: Sequence[ProgressColumn], counted: Sequence[ProgressColumn]
    ) -> None:
        super().__init__(logging.INFO)
        self.progress = progress
        self.task = task
        self.columns = tuple(columns)
        self.counted = tuple(counted)

    def emit(self, record: logging.LogRecord) -> None:
        """Show ``record``."""
        done, total = getattr(record, "done", 0), getattr(record, "total", None)
        self.progress.columns = self.counted if total else self.columns
        if total is None:
            # update() would keep the total of what was shown before.
            self.progress.remove_task(self.task)
            self.task = self.progress.add_task(record.getMessage(), total=None)
        else:
            self.progress.update(self.task, description=record.getMessage(), completed=done, total=total)
