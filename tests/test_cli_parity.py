"""``quantspec parity``: its options, its report, its errors and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from unittest import mock

import pytest
from cli_errors import assert_error
from conftest import GROUP, characters
from step_by_step import random_prompt
from transformers import AutoModelForCausalLM

import quantspec
from quantspec.cli.loading import Kind, Source, find_source
from quantspec.cli.parity import ComparisonOptions
from quantspec.evals.parity import ParityOptions
from quantspec.versions import install_command

TEXT = characters(random_prompt(400))
OPTIONS = [
    *("--dtype", "--gamma", "--num-speculative-tokens", "--draft", "--kv-group-size", "--weight-group-size"),
    *(
        "--weight-quantizer",
        "--quantize-lm-head",
        "--max-cache-len",
        "--device",
        "--self-check",
        "--compile",
        "--gguf-file",
        "--tasks",
    ),
    *("--include-path", "--text", "--output", "--limit", "--batch-size", "--apply-chat-template", "--context-tokens"),
    *("--scored-tokens", "--prompts", "--prompt-tokens", "--new-tokens", "--max-standard-errors"),
    *("--max-paired-standard-errors", "--max-perplexity-change", "--min-argmax-agreement", "--min-speculative-match"),
]


@pytest.fixture
def text_file(tmp_path):
    """A text of 400 tokens."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_the_help_lists_every_option_without_importing_torch():
    code = "import sys; from quantspec.cli import main; main(['parity', '--help']); sys.exit('torch' in sys.modules)"
    wide = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=wide)
    assert done.returncode == 0
    assert [option for option in OPTIONS if option not in done.stdout] == []


def test_defaults_are_those_of_the_report():
    assert asdict(ComparisonOptions()) == asdict(ParityOptions())


@pytest.mark.parametrize(
    ("line", "tasks"),
    [
        ("MODEL --tasks a b@4096 c", ["a", "b@4096", "c"]),
        ("MODEL --tasks a,b@4096 c --limit 3", ["a", "b@4096", "c"]),
        ("MODEL --tasks a --limit 3 --tasks b", ["a", "b"]),
        ("--tasks a b --limit 3 MODEL", ["a", "b"]),
        ("--tasks a b -- MODEL", ["a", "b"]),
        ("MODEL --tasks=a", ["a"]),
        ("MODEL", []),
    ],
)
def test_any_number_of_tasks_after_one_flag(run, lm_eval, saved_model, line, tasks):
    words = [saved_model if word == "MODEL" else word for word in line.split()]
    with mock.patch("quantspec.evals.parity.prepare", side_effect=ValueError("that will do")) as prepare:
        assert_error(run("parity", *words), "that will do")
    assert prepare.call_args.kwargs["tasks"] == tasks


def test_the_status_of_parity_is_the_verdict(run, lm_eval, saved_model, tiny_tasks, text_file, tmp_path):
    arguments = [
        *("parity", saved_model, "--device", "cpu", "--kv-group-size", GROUP, "--gamma", "auto", "--no-self-check"),
        *("--text", text_file, "--context-tokens", 100, "--scored-tokens", 60, "--min-argmax-agreement", 0.95),
    ]
    more = [
        *("--tasks", "tiny_write", "tiny_rolling", "--include-path", tiny_tasks, "--limit", 2, "--batch-size", "auto"),
        *("--prompts", 1, "--prompt-tokens", 50, "--new-tokens", 4),
    ]
    status, out, _ = run(*arguments, *more, "--output", tmp_path / "new" / "report")
    assert status == 0
    assert out.startswith("# Parity of")
    written = json.loads((tmp_path / "new" / "report" / "parity.json").read_text())
    assert written["passed"]
    assert {row["task"] for row in written["tasks"]} == {"tiny_write", "tiny_rolling"}
    assert (written["options"]["limit"], written["options"]["batch_size"]) == (2, "auto")
    assert written["config"]["num_speculative_tokens"] == "auto"
    status, out, _ = run(*arguments, "--prompts", 0, "--max-perplexity-change", 0)
    assert status == 1
    assert "**FAILED**" in out


def test_a_report_without_a_verdict_is_an_error(run, lm_eval, saved_model, tiny_tasks, tmp_path):
    (tmp_path / "parity.png").touch()
    arguments = ["--tasks", "tiny_choice", "--include-path", tiny_tasks, "--limit", 1, "--text", "", "--no-self-check"]
    status, out, err = run("parity", saved_model, "--device", "cpu", *arguments, "--output", tmp_path)
    assert status == 2
    assert out.splitlines()[0].endswith(": not judged")
    assert "error: no threshold applied" in err
    assert "--text" in err.splitlines()[-1]
    assert {file.name for file in tmp_path.iterdir()} == {"parity.json", "parity.md"}


def test_piped_output_is_the_data_alone(saved_model, tokenizer, text_file):
    """A process of its own, stdin to stdout: no warnings, bars or colours on either stream, of a text and a report."""
    generate = ["generate", str(saved_model), "--max-new-tokens", "6", "--greedy", "--no-self-check"]
    parity = [
        *("parity", str(saved_model), "--device", "cpu", "--no-self-check", "--prompts", "0", "--text", str(text_file)),
        *("--context-tokens", "20", "--scored-tokens", "4", "--min-argmax-agreement", "0"),
    ]
    code = f"import sys; from quantspec.cli import main; sys.exit(main({generate}) or main({parity}))"
    done = subprocess.run([sys.executable, "-c", code], input="Hello", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    ids = tokenizer("Hello", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(saved_model)
    text = tokenizer.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0, 5:], skip_special_tokens=True)
    assert done.stdout.startswith(f"{text}\n# Parity of")
    assert "\x1b" not in done.stdout


def test_a_saved_pair_is_measured_as_it_was_saved(run, saved_model, tokenizer, text_file, tmp_path):
    """Its options hold, those that may change are taken, and nothing is converted again."""
    options = {"kv_group_size": GROUP, "weight_group_size": 64, "quantize_lm_head": True, "self_check": False}
    quantspec.convert(AutoModelForCausalLM.from_pretrained(saved_model), **options).save_pretrained(tmp_path / "pair")
    tokenizer.save_pretrained(tmp_path / "pair")
    arguments = [
        *("parity", tmp_path / "pair", "--device", "cpu", "--output", tmp_path / "report", "--prompts", "0"),
        *("--text", text_file, "--context-tokens", 50, "--scored-tokens", 10, "--min-argmax-agreement", 0),
    ]
    with mock.patch("quantspec.convert", side_effect=AssertionError("converted again")):
        assert run(*arguments, "--num-speculative-tokens", 2)[0] in (0, 1)
        assert_error(run(*arguments, "--weight-group-size", 32), "weight_group_size cannot change on loading")
    config = json.loads((tmp_path / "report" / "parity.json").read_text())["config"]
    kept = ("num_speculative_tokens", "kv_group_size", "weight_group_size", "quantize_lm_head")
    assert [config[name] for name in kept] == ["2", str(GROUP), "64", "True"]


def test_a_gguf_file_is_named_in_its_folder_or_repository(run, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    assert find_source(str(tmp_path), "model.gguf") == find_source(str(tmp_path / "model.gguf"))
    assert find_source("owner/name", "model.gguf") == Source(Kind.HUB, "owner/name", "model.gguf")
    assert_error(run("parity", tmp_path, "--gguf-file", "model.gguf"), "model.gguf", "is it complete?")
    assert_error(run("parity", tmp_path, "--gguf-file", "none.gguf"), "there is no GGUF file", "none.gguf")
    assert_error(run("parity", tmp_path / "model.gguf", "--gguf-file", "model.gguf"), "two GGUF files")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--gama", "4"], ["--gama"]),
        (["--gamma", "16"], ["num_speculative_tokens must be between 0 and 15, not 16"]),
        (["--kv-group-size", "17"], ["kv_group_size must be a power of two"]),
        (["--device", "toaster"], ["'toaster' is not a device"]),
        (["--dtype", "int8"], ["--dtype"]),
        (["--text", "no-such-file.txt"], ["cannot read the text from 'no-such-file.txt': No such file"]),
        (["--text", ""], ["name tasks, or give a text"]),
        (["--context-tokens", "0"], ["context_tokens must be at least 1"]),
        (["--context-tokens", "500000", "--max-cache-len", "600000"], ["give a longer one"]),
        (
            ["--context-tokens", "500", "--scored-tokens", "13"],
            ["context_tokens=500 and scored_tokens=13 are 513 tokens, more than the 512"],
        ),
        (
            ["--context-tokens", "50", "--scored-tokens", "50", "--prompt-tokens", "50", "--max-cache-len", "100"],
            ["prompt_tokens=50 and new_tokens=64 are 114 tokens, more than the 100"],
        ),
        (["--batch-size", "many"], ["--batch-size", "'many' is neither a number nor 'auto'"]),
        (["--batch-size", "0"], ["batch_size must be at least 1, not 0"]),
        (["--include-path", "no-such-folder"], ["--include-path", "no-such-folder"]),
        (
            ["--output", __file__, "--context-tokens", "50", "--scored-tokens", "9", "--prompts", "0"],
            ["cannot write to"],
        ),
        (["--tasks"], ["--tasks names no task"]),
        (["--tasks", "--limit", "3"], ["--tasks names no task"]),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_loading(run, saved_model, monkeypatch, arguments, parts):
    monkeypatch.setattr("quantspec.cli.loading.load_model", lambda *_: pytest.fail("weights were loaded"))
    assert_error(run("parity", saved_model, "--device", "cpu", *arguments), *parts)


def test_a_file_without_text_is_refused(run, saved_model, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    assert_error(run("parity", saved_model, "--text", tmp_path / "empty.txt"), "empty.txt' is empty", "'' for none")


def test_an_unknown_task_is_refused_before_loading(run, lm_eval, saved_model, monkeypatch):
    monkeypatch.setattr("quantspec.cli.loading.load_model", lambda *_: pytest.fail("weights were loaded"))
    assert_error(run("parity", saved_model, "--tasks", "no_such_task", "--text", ""), "unknown task no_such_task")


def test_a_model_that_is_not_there(run):
    assert_error(run("parity", "./nope"), "there is no folder or file './nope'")
    status, out, err = run("parity", "./nope", "--debug")
    assert (status, out) == (2, "")
    assert "Traceback" in err
    assert err.rstrip().splitlines()[-1].startswith("error: there is no folder or file './nope'")


@pytest.mark.parametrize("installed", [True, False])
def test_parity_needs_lm_eval_for_tasks_before_it_loads_a_model(run, monkeypatch, installed):
    if installed:
        pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")
    else:
        monkeypatch.setitem(sys.modules, "lm_eval", None)
    expected = "./no-such-model" if installed else install_command("eval")
    assert_error(run("parity", "./no-such-model", "--tasks", "reference_choice"), expected)
