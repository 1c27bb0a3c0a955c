"""Help screens: every option by its whole name at any width, short metavars, examples and completion."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import typer

from quantspec.cli import app
from quantspec.cli.generate import read_prompt

COMMANDS = ("bench", "chat", "convert", "generate", "inspect", "parity", "serve", "tune")


def options(name: str) -> list[str]:
    """Every name of every option of the command."""
    command = typer.main.get_command(app.build_app()).commands[name]
    return [part for parameter in command.params for part in (*parameter.opts, *parameter.secondary_opts)]


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_is_cut(run, monkeypatch, name, width):
    monkeypatch.setenv("COLUMNS", str(width))
    status, out, err = run(name, "--help")
    assert (status, err) == (0, "")
    assert "…" not in out
    shown = re.findall(r"--[\w-]+", out)
    assert {option for option in options(name) if option.startswith("--")} <= set(shown)
    assert all(len(line) <= width for line in out.splitlines() if "Usage" not in line)
    # No types and braces: what may be left out stands in brackets.
    assert not re.search(r"<\w|\{", out)
    assert out.count(f"quantspec {name}", out.index("Examples")) == 2


def test_h_is_help(run):
    assert run("-h") == run("--help")
    assert run("generate", "-h") == run("generate", "--help")
    assert "--install-completion" in run("-h")[1]


def test_completion():
    """As the shell calls it."""
    environment = {
        **os.environ,
        "_QUANTSPEC_COMPLETE": "complete_bash",
        "COMP_WORDS": "quantspec con",
        "COMP_CWORD": "1",
    }
    code = "import sys; from quantspec.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["convert"]


def test_a_document_goes_before_what_to_do_with_it(tmp_path):
    (tmp_path / "report.txt").write_text("A report.\n")
    assert read_prompt("Summarize this.", tmp_path / "report.txt") == "A report.\n\nSummarize this."
    assert read_prompt(None, tmp_path / "report.txt") == "A report.\n"
