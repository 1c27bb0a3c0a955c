"""What is drafted where nobody gives a number: 4 tokens on a GPU, what pays on a CPU and in an engine."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from quantspec.config import AUTO, QuantSpecConfig
from quantspec.pair import Pair
from quantspec.serving import Engine, Request
from quantspec.serving.sizes import Sizes

IDS = torch.tensor([[5, 6, 7, 8]])
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@pytest.fixture(autouse=True)
def without_the_tests_own(monkeypatch):
    """Elsewhere tests draft on a CPU as on a GPU."""
    monkeypatch.setattr("quantspec.pair.pair.AUTO", AUTO)
    monkeypatch.setattr("quantspec.serving.sizes.AUTO", AUTO)


@pytest.mark.parametrize(
    ("given", "rejection_sampling", "device", "expected"),
    [
        (None, False, "cpu", AUTO),
        (None, False, "cuda", 4),
        (None, True, "cpu", 4),
        (0, False, "cpu", 0),
        (3, False, "cuda", 3),
        (AUTO, True, "cpu", AUTO),
    ],
)
def test_of_a_pair(given, rejection_sampling, device, expected):
    config = QuantSpecConfig(num_speculative_tokens=given, rejection_sampling=rejection_sampling)
    pair = SimpleNamespace(config=config, device=torch.device(device))
    assert Pair.num_speculative_tokens.fget(pair) == expected


def test_a_call_on_a_cpu_decides_by_times(qs, monkeypatch):
    asked = []
    original = type(qs.session).draft_count
    monkeypatch.setattr(
        type(qs.session),
        "draft_count",
        lambda session, count, *rest: (asked.append(count), original(session, count, *rest))[1],
    )
    expected = qs.model.generate(IDS, **OPTIONS)
    assert torch.equal(qs.generate(IDS, **OPTIONS), expected)
    assert torch.equal(qs.generate(IDS, num_speculative_tokens=2, **OPTIONS), expected)
    assert asked == [AUTO, 2]


@pytest.mark.parametrize(
    ("of_pair", "rejection_sampling", "asked", "expected"),
    [
        (None, False, None, (0, 2, 4)),
        (None, True, None, (4,)),
        (6, False, None, (6,)),
        (6, False, AUTO, (0, 3, 6)),
        (AUTO, True, None, (0, 2, 4)),
        (None, False, 3, (3,)),
    ],
)
def test_of_an_engine(qs, monkeypatch, of_pair, rejection_sampling, asked, expected):
    config = replace(qs.config, num_speculative_tokens=of_pair, rejection_sampling=rejection_sampling)
    monkeypatch.setattr(qs, "config", config)
    sizes = Sizes.of(qs, 2, 64, None, 0.9, asked, None)
    assert sizes.draft_counts == expected


def test_an_engines_texts_are_those_of_the_pair(qs):
    engine = Engine(qs, max_sequences=2, max_length=64)
    try:
        (outputs,) = engine.generate([Request(IDS[0].tolist(), 8, (), {"do_sample": False})])
    finally:
        engine.close()
    tokens = [token for output in outputs for token in output.token_ids]
    assert tokens == qs.model.generate(IDS, **OPTIONS)[0, 4:].tolist()
