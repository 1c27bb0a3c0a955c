"""``--tensor-parallel``: commands start their ranks and end them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import httpx2
import pytest
from forked_ranks import forked_ranks
from serving_process import PATIENCE, serving
from tiny_models import tiny_model

from quantspec import Ranks
from quantspec.benchmarks import generate

# One process has the ranks.
pytestmark = pytest.mark.xdist_group("ranks")
OPTIONS = ("--device", "cpu", "--dtype", "float32", "--no-self-check")
TWO = ("--tensor-parallel", "2")


def test_generate_writes_what_one_process_writes(run, saved_model):
    call = ("generate", saved_model, "abc abc", "--max-new-tokens", 8, "--greedy", *OPTIONS)
    with forked_ranks():
        status, text, error = run(*call, *TWO)
    assert status == 0, error
    assert text == run(*call)[1]


def test_a_number_that_cannot_be_is_refused_before_a_rank_is_started(
    run, saved_model, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(Ranks, "__init__", lambda *_: pytest.fail("ranks were started"))
    # Its four heads.
    status, _, error = run("generate", saved_model, "abc", *OPTIONS, "--tensor-parallel", 3)
    assert status != 0
    assert "query heads are no multiple of 3 ranks" in error
    for wrong in ("0", "two"):
        status, _, error = run("generate", saved_model, "abc", "--tensor-parallel", wrong)
        assert status != 0
        assert "--tensor-parallel" in error
    tiny_model("diffllama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    status, _, error = run("generate", tmp_path, "abc", *OPTIONS, *TWO)
    assert status != 0
    assert "its heads do not follow from a linear's rows" in error
    status, _, error = run("serve", saved_model, *OPTIONS, *TWO, "--tune")
    assert status != 0
    assert "quantspec tune" in error


def test_more_ranks_than_gpus_are_refused(run, saved_model, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    status, _, error = run("generate", saved_model, "abc", *TWO)
    assert status != 0
    assert "--tensor-parallel 2 needs as many GPUs: 1 found" in error
    status, _, error = run("generate", saved_model, "abc", "--device", "cuda:0", *TWO)
    assert status != 0
    assert "--device cuda:0 is one GPU" in error


def test_bench_measures_a_split_model(run, tokenizer, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(generate, "load_smollm2", lambda dtype, device: (tiny_model("llama"), tokenizer))
    with forked_ranks():
        status, out, error = run("bench", "--contexts", "40", *TWO)
    assert status == 0, error
    rows = json.loads(out)["rows"]
    assert [row["mode"] for row in rows] == ["auto", "speculative", "target only"]
    for row in rows:
        assert row["tensor_parallel"] == 2
        assert row["new_tokens"] == row["tokens_equal_to_hugging_face"] == 16
    # The ranks have ended.
    with forked_ranks():
        Ranks(2).close()


def test_serve_answers_and_says_so_when_it_cannot(saved_model):
    with serving(saved_model, *OPTIONS, *TWO, "--max-length", "64") as server:
        process = server.process.pid
        (rank,) = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        request = {"model": str(saved_model), "prompt": "abc", "max_tokens": 8, "temperature": 0}
        answers = [httpx2.post(f"{server.url}/v1/completions", json=request, timeout=PATIENCE).json() for _ in range(2)]
        assert answers[0]["usage"]["completion_tokens"] > 0
        assert answers[0]["choices"] == answers[1]["choices"]
        os.kill(int(rank), signal.SIGKILL)
        failed = httpx2.post(f"{server.url}/v1/completions", json=request, timeout=PATIENCE)
        # 500 if the request came before anybody knew.
        assert failed.status_code in (500, 503)
        assert "rank 1 was ended by SIGKILL" in failed.text
        assert server.get("/health").status_code == 503
    assert not Path(f"/proc/{rank}").exists()
