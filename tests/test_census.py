"""The census of causal types: what it finds, that it sees faults, and the page that is made from its results."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from pathlib import Path

import pytest
import transformers

from benchmarks import census
from benchmarks.census_models import VOCABULARY, tiny_config

ROOT = Path(__file__).parents[1]
PAGE = runpy.run_path(str(ROOT / "docs" / "supported_models.py"))
COMMITTED = json.loads(census.OUT.read_text())
NEWEST = COMMITTED[PAGE["newest"](COMMITTED)]


def test_the_page_is_made_from_the_results():
    assert PAGE["PAGE"].read_text() == PAGE["render"](COMMITTED)


def test_nothing_converts_and_is_wrong():
    assert [name for name, found in NEWEST.items() if found["verdict"] == "wrong"] == []
    counts = Counter(found["verdict"] for found in NEWEST.values())
    assert counts["right"] >= 125
    assert not any("please report" in found.get("reason", "") for found in NEWEST.values())


@pytest.mark.skipif(
    transformers.__version__ not in COMMITTED, reason="this transformers was not examined: run `make census` with it"
)
def test_every_registered_type_is_in_it():
    assert sorted(COMMITTED[transformers.__version__]) == census.registered()


def test_a_type_is_examined_in_a_process_of_its_own():
    ((name, found),) = census.run(["gemma3_text"], jobs=1, time_limit=300)
    assert (name, found["verdict"]) == ("gemma3_text", "right")
    assert [layer["window"] for layer in found["layers"]] == [12, 0]
    ((_, found),) = census.run(["gemma3_text"], jobs=1, time_limit=0.1)
    assert found["verdict"] == "wrong"
    assert "0.1 s" in found["reason"]


def test_what_is_refused_or_not_made_has_a_reason():
    found = census.examine("falcon_mamba")
    assert found["verdict"] == "refused"
    assert "no attention layer" in found["reason"]
    assert census.examine("no such type")["verdict"] == "not built"


def test_a_pair_that_decodes_otherwise_is_wrong(monkeypatch):
    logits, greedy = census.incremental_logits, census.greedy
    monkeypatch.setattr(census, "incremental_logits", lambda *args: logits(*args) + 0.01)

    def another(*args):
        text = greedy(*args)
        text[:, -1] = (text[:, -1] + 1) % VOCABULARY
        return text

    monkeypatch.setattr(census, "greedy", another)
    found = census.examine("mistral")
    assert found["verdict"] == "wrong"
    for fault in ("logits differ", "greedy text differs", "padded batch's text", "conversation's text"):
        assert fault in found["reason"]


def test_every_kind_of_layer_of_the_default_config_is_there():
    kind = type(tiny_config("qwen3_next"))
    assert set(tiny_config("qwen3_next").layer_types) == set(kind().layer_types)
