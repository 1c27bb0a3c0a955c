"""What quantspec tells while it works: records of the logger ``quantspec``, and a progress bar of them.

Nothing is shown unless it is asked for: :func:`enable_progress_bar` shows one bar, in a notebook as a widget, and
Python's own ``logging`` has every record, such as with ``logging.basicConfig(level=logging.INFO)``.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

_LOGGER = logging.getLogger("quantspec")


class _Bar(logging.Handler):
    """Draws records that count as one bar."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._bar: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        """Show ``record``, if it counts."""
        if getattr(record, "total", None) is None:
            return
        done, total, ended = (getattr(record, name) for name in ("done", "total", "ended"))
        message = record.getMessage()
        if self._bar is None or self._bar.total != total or done < self._bar.n:
            self.close_bar()
            # Whether this is a notebook is known when it is first asked for.
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, desc=message, leave=False)
        self._bar.set_description(message, refresh=False)
        self._bar.update(done - self._bar.n)
        if ended:
            self.close_bar()

    def close_bar(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None


_BAR = _Bar()


def enable_progress_bar() -> None:
    """Show a bar while weights are quantized or read, a long prompt is prefilled, a draft is tuned."""
    _LOGGER.addHandler(_BAR)
    if not _LOGGER.isEnabledFor(logging.INFO):
        _LOGGER.setLevel(logging.INFO)


def disable_progress_bar() -> None:
    """Show none any more, as at the start."""
    _LOGGER.removeHandler(_BAR)
    _LOGGER.setLevel(logging.NOTSET)
    _BAR.close_bar()


@contextlib.contextmanager
def counting(logger: logging.Logger, description: str, total: int) -> Iterator[Callable[..., None]]:
    """Log ``description`` with ``done`` of ``total`` each time that the yielded function is told of some more.

    A text after the number is a note on what has been done.
    """
    done = 0

    def advance(count: int, note: str = "") -> None:
        nonlocal done
        done += count
        logger.info("%s%s", description, note, extra={"done": done, "total": total, "ended": False})

    advance(0)
    try:
        yield advance
    finally:
        logger.info(description, extra={"done": done, "total": total, "ended": True})


@contextlib.contextmanager
def without_bars_of_libraries() -> Iterator[None]:
    """Keep transformers' and huggingface_hub's bars off the screen, as far as they are loaded."""
    with contextlib.ExitStack() as stack:
        if "transformers" in sys.modules:
            from transformers.utils import logging as of_transformers

            if of_transformers.is_progress_bar_enabled():
                of_transformers.disable_progress_bar()
                stack.callback(of_transformers.enable_progress_bar)
        if "huggingface_hub" in sys.modules:
            from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

            if not are_progress_bars_disabled():
                disable_progress_bars()
                stack.callback(enable_progress_bars)
        yield
