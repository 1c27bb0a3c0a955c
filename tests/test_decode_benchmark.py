"""The benchmark of decoding, on a tiny model whose times mean nothing."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from step_by_step import random_prompt
from test_score_programs import without_graphs
from tiny_models import tiny_model

import quantspec
from quantspec.benchmarks import decode, strong_baseline
from quantspec.benchmarks.decode import Settings, measure_context
from quantspec.benchmarks.random_models import check_fits, random_model
from quantspec.benchmarks.strong_baseline import Baseline, dense_attention
from quantspec.engine.odds import cycle_tokens
from quantspec.pair import pair
from quantspec.pair.recipes import recipes_for

__all__ = ["without_graphs"]


class Event:
    """A time on a GPU that there is not."""

    def __init__(self, **_: bool) -> None:
        self.recorded = False

    def record(self) -> None:
        self.recorded = True

    def elapsed_time(self, other: Event) -> float:
        assert self.recorded
        assert other.recorded
        return 1.0


@pytest.fixture
def without_gpu(monkeypatch, without_graphs):
    """Steps run once and take 2 ms; gives the shapes of the logits that they made."""
    shapes = []

    def milliseconds(call) -> float:
        with torch.no_grad():
            shapes.append(tuple(call().shape))
        return 2.0

    monkeypatch.setattr(decode, "milliseconds", milliseconds)
    monkeypatch.setattr(decode, "kernel_times", lambda call: {})
    monkeypatch.setattr(strong_baseline, "compile_graph", lambda graph: graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    return shapes


class StandIn:
    """Of the strong baseline, whose graph reads a GPU's cache."""

    def token(self, context: int, batch: int):
        return lambda: torch.zeros(batch, 1, context)


@pytest.mark.parametrize("batch", [1, 3])
def test_sequences_decode_together(qs, without_gpu, monkeypatch, batch):
    """Cycles move all of them on, and speed-up is a sequence's, as tokens per second are all sequences'."""
    monkeypatch.setattr(decode, "CYCLE_TOKENS", 256)
    settings = Settings("llama-3.1-8b", (80,), gammas=(2, 3), generate_at=(), rates=(0.0, 1.0))
    row = measure_context(qs, StandIn(), torch.tensor([random_prompt(80)]), settings, batch)
    vocabulary = qs.pair.vocab_size
    assert without_gpu == [(batch, 1, 80), *((batch, tokens, vocabulary) for tokens in (1, 3, 4))]
    assert (row["context"], row["batch"], row["verify_ms"]) == (80, batch, {3: 2.0, 4: 2.0})
    drawn = [(one["num_speculative_tokens"], one["synthetic_acceptance_rate"]) for one in row["synthetic"]]
    assert drawn == [(2, 0.0), (2, 1.0), (3, 0.0), (3, 1.0)]
    for one, (gamma, rate) in zip(row["synthetic"], drawn, strict=True):
        assert one["mean_acceptance_length"] == one["expected_acceptance_length"] == cycle_tokens(rate, gamma)
        assert one["tokens_per_second"] == pytest.approx(1000 * batch * (1 + rate * gamma) / one["cycle_ms"])
        assert one["speedup"] == pytest.approx((1 + rate * gamma) * 2.0 / one["cycle_ms"])


def test_the_baseline_is_the_same_beside_sparse_drafts(monkeypatch):
    """Whose target leaves scores of pages; with the recipes of a GPU."""
    monkeypatch.setattr(pair, "recipes_for", lambda config, device: recipes_for(config, "cuda"))
    monkeypatch.setattr(strong_baseline, "compile_graph", lambda graph: graph)
    monkeypatch.setattr(strong_baseline, "sdpa_kernel", lambda kernel: contextlib.nullcontext())
    tokens = []
    for reads in ("full", "sparse"):
        options = {"weight_group_size": 32, "self_check": False, "compile": False}
        baseline = Baseline(quantspec.convert(tiny_model("llama"), draft_attention=reads, **options))
        torch.manual_seed(0)
        tokens.append(baseline.token(20, 2)())
    assert torch.equal(*tokens)


def test_dense_attention_stores_a_token_of_each_sequence():
    """And reads each from its own cache."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 1, 16) for heads in (4, 2, 2))
    caches = [torch.randn(2, 2, 8, 16) for _ in range(2)]
    together = [cache.clone() for cache in caches]
    out = dense_attention(query, key, value, *together, torch.tensor([5, 5]), 0.25)
    for row in range(2):
        alone = [cache[row : row + 1].clone() for cache in caches]
        inputs = (tensor[row : row + 1] for tensor in (query, key, value))
        torch.testing.assert_close(dense_attention(*inputs, *alone, torch.tensor([5]), 0.25), out[row : row + 1])
        assert torch.equal(alone[0][0, :, 5], key[row, :, 0])
        assert torch.equal(alone[0][0], together[0][row])
        assert torch.equal(alone[1][0], together[1][row])


def test_what_exceeds_the_gpus_is_refused_with_how_many_hold_it(monkeypatch):
    properties = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with pytest.raises(ValueError, match=r"'llama-3\.1-70b' has 166 GiB of weights.*--tensor-parallel 4"):
        random_model("llama-3.1-70b", None)
    with pytest.raises(ValueError, match="--tensor-parallel 4"):
        check_fits("llama-3.1-70b", None, 2)
    check_fits("llama-3.1-70b", None, 4)
    check_fits("llama-3.1-8b", None, 1)


SCRIPT = """
import runpy, sys
from quantspec.benchmarks import decode
decode.measure = lambda settings: print(type(settings).__module__) or []
sys.argv = ["decode", "--model", "llama-3.1-8b", "--tensor-parallel", "2"]
runpy.run_module("quantspec.benchmarks.decode", run_name="__main__")
"""


def test_what_the_script_sends_to_ranks_has_the_name_of_the_module():
    """They import it by that; a process of its own, since the script is run as one."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "quantspec.benchmarks.decode"
