"""Help screens: every option by its whole name at any width, short metavars, examples and completion."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys

import pytest
import typer

from quantspec import cli
from quantspec.cli import app
from quantspec.cli.commands import SUMMARIES
from quantspec.cli.generate import read_prompt

COMMANDS = ("bench", "chat", "convert", "generate", "inspect", "parity", "serve", "tune")
# What the program's help needs of quantspec.
OF_HELP = {"quantspec", *(f"quantspec.{name}" for name in ("versions", "cli", "cli.app", "cli.commands", "cli.help"))}


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


def test_help_of_the_program_builds_no_command():
    """It is to appear at once: the 0.3 s that it may take are Python's, typer's and rich's."""
    code = "import sys; from quantspec.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name for name in done.stderr.split() if name.partition(".")[0] == "quantspec"} == OF_HELP
    assert all(re.search(rf"^│ {name} ", done.stdout, re.MULTILINE) for name in (*COMMANDS, "eval"))


def test_every_command_is_listed():
    found = (info.name for info in pkgutil.iter_modules(cli.__path__))
    modules = {name: importlib.import_module(f"quantspec.cli.{name}") for name in found}
    assert {name for name, module in modules.items() if hasattr(module, "command")} == set(SUMMARIES)


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
