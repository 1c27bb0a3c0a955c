"""One display of progress: none in Python unless it is asked for, and nothing of libraries beside it."""

from __future__ import annotations

import contextlib
import io
import logging

import pytest
from rich.console import Console
from tiny_models import tiny_model
from transformers.utils import logging as transformers_logging

import quantspec
from quantspec.cli import console
from quantspec.logging import counting


class Terminal(io.StringIO):
    """Text that a terminal would get."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen():
    """What stderr shows; entered by each test, since pytest puts its own stderr in place for it."""
    transformers_logging.enable_progress_bar()
    yield contextlib.redirect_stderr(Terminal())
    quantspec.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pair."""
    path = tmp_path_factory.mktemp("saved") / "pair"
    quantspec.convert(tiny_model("llama"), self_check=False).save_pretrained(path)
    return path


def test_python_shows_a_bar_if_it_is_asked_to_and_none_otherwise(screen, folder):
    with screen as shown:
        quantspec.from_pretrained(folder, self_check=False)
        assert shown.getvalue() == ""
        quantspec.logging.enable_progress_bar()
        quantspec.from_pretrained(folder, self_check=False)
        text = shown.getvalue()
        assert "hashing" in text
        # Nothing is quantized again.
        assert "reading INT4 weights" in text
        assert "quantizing" not in text
        quantspec.logging.disable_progress_bar()
        with counting(logging.getLogger("quantspec.test"), "work", 3) as advance:
            advance(3)
        assert shown.getvalue() == text


def test_saving_shows_no_bar_of_a_library(screen, folder, tmp_path):
    pair = quantspec.from_pretrained(folder, self_check=False)
    with screen as shown:
        pair.save_pretrained(tmp_path / "copy")
    assert shown.getvalue() == ""


def test_converting_says_quantizing(screen):
    with screen as shown:
        quantspec.logging.enable_progress_bar()
        quantspec.convert(tiny_model("llama"), self_check=False)
        assert "quantizing to INT4" in shown.getvalue()


def test_a_bar_ends_with_its_work_and_another_begins(screen):
    """Also where the work fails, and where the next is as long."""
    with screen as shown:
        quantspec.logging.enable_progress_bar()
        logger = logging.getLogger("quantspec.test")
        with contextlib.suppress(KeyError), counting(logger, "first", 5) as advance:
            advance(2)
            raise KeyError
        with counting(logger, "second", 5) as advance:
            advance(5, ", all done")
        assert "first" in shown.getvalue()
        assert "second" in shown.getvalue()
        assert shown.getvalue().endswith("\r")


def test_libraries_draw_nothing_into_a_live_bar(screen, monkeypatch):
    with screen as shown:
        terminal = Console(file=Terminal(), force_terminal=True, color_system=None, width=100)
        monkeypatch.setattr(console, "stderr", lambda: terminal)
        assert transformers_logging.is_progress_bar_enabled()
        with console.working("loading"):
            assert not transformers_logging.is_progress_bar_enabled()
            for _ in transformers_logging.tqdm(range(3), desc="Loading weights"):
                pass
        assert shown.getvalue() == ""
        assert transformers_logging.is_progress_bar_enabled()
