"""``quantspec parity`` hands its arguments on, prints the report and ends with its status."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import GROUP

from quantspec.cli import main
from quantspec.evals import parity


@pytest.mark.parametrize("status", [0, 1, 2])
def test_arguments_and_status_are_handed_on(monkeypatch, status):
    seen = []
    monkeypatch.setattr(parity, "main", lambda arguments: seen.append(arguments) or status)
    assert main(["parity", "MODEL", "--tasks", "reference_choice", "--limit", "3"]) == status
    assert seen == [["MODEL", "--tasks", "reference_choice", "--limit", "3"]]


def test_the_status_of_parity_is_the_verdict(run, saved_model, tiny_tasks, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")
    arguments = [
        *("parity", saved_model, "--device", "cpu", "--kv-group-size", GROUP, "--text", "", "--limit", 2),
        *("--tasks", "tiny_rolling", "--include-path", tiny_tasks),
    ]
    status, out, _ = run(*arguments, "--output", tmp_path / "report")
    assert status == 0
    assert out.startswith("# Parity of")
    assert json.loads((tmp_path / "report" / "parity.json").read_text())["passed"]
    status, out, _ = run(*arguments, "--max-perplexity-change", 0)
    assert status == 1
    assert "**FAILED**" in out


def test_parity_takes_its_own_options(run, saved_model):
    status, out, _ = run("parity", "--help")
    assert status == 0
    assert "--min-argmax-agreement" in out
    status, out, err = run("parity", saved_model, "--gama", "4")
    assert (status, out) == (2, "")
    assert "unrecognized arguments: --gama 4" in err
    status, out, err = run("parity", saved_model, "--text", "no-such-file.txt")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "no-such-file.txt" in err


@pytest.mark.parametrize("installed", [True, False])
def test_parity_needs_lm_eval_for_tasks_before_it_loads_a_model(run, monkeypatch, installed):
    if installed:
        pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")
    else:
        monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, out, err = run("parity", "./no-such-model", "--tasks", "reference_choice")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert ("pip install 'quantspec[eval]'" in err) != installed
    assert ("no-such-model" in err) == installed
