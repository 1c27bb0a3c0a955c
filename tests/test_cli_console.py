"""What the command line shows while it works."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from quantspec import GenerationStats
from quantspec.cli import console
from quantspec.cli.chat import COMMANDS
from quantspec.engine.plan import Plan


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


@pytest.mark.parametrize("width", [60, 80, 200])
def test_rows_go_on_below_their_beginning(capsys, monkeypatch, width):
    stats = GenerationStats(4)
    stats.record_cycle(Plan(4), [3], 0.5)
    monkeypatch.setenv("COLUMNS", str(width))
    for text in (str(stats), COMMANDS):
        console.print_rows(text)
        shown = capsys.readouterr().err
        assert " ".join(shown.split()) == " ".join(text.split())
        names = [line.partition("  ")[0] for line in text.splitlines()]
        column = max(map(len, names)) + 2
        begun = [line for line in shown.splitlines() if line[0] != " "]
        assert [line[:column].rstrip() for line in begun] == names
        assert all(len(line.rstrip()) <= width for line in shown.splitlines())
