"""What the command line shows while it works."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from quantspec.cli import console


@pytest.mark.parametrize(
    ("record", "shown"),
    [({"done": 3, "total": 10}, " 3/10"), ({}, "")],
    ids=["counted", "not counted"],
)
def test_a_bar_shows_the_last_record_alone(monkeypatch, record, shown):
    """A step that counts nothing is drawn without a bar, not with the count of the step before."""
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, color_system=None, width=100)
    monkeypatch.setattr(console, "stderr", lambda: terminal)
    with console.working("loading"):
        logging.getLogger("quantspec.test").info("quantizing", extra={"done": 34, "total": 211})
        logging.getLogger("quantspec.test").info("writing", extra=record)
    last = screen.getvalue()[screen.getvalue().rindex("writing") :]
    assert shown in last
    assert ("━" in last, "/" in last) == (bool(shown), bool(shown))
    assert "211" not in last
    assert "/?" not in screen.getvalue()


def test_no_bar_in_a_file(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "stderr", lambda: Console(file=screen))
    with console.working("loading"):
        logging.getLogger("quantspec.test").warning("a warning")
    assert screen.getvalue() == ""
