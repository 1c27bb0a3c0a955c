"""Whether a model fits a card, how long a context, and what other ways to run it would take."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from cli_errors import assert_error
from tiny_models import tiny_model

from quantspec import QuantSpecConfig
from quantspec.cache.geometry import planned_groups
from quantspec.cli._captured import captured_sizes
from quantspec.cli._fit import Card, fit, most_that_fits, ways
from quantspec.cli.errors import CommandError
from quantspec.memory import cache_bytes_per_token, expected_memory, full_precision_bytes
from quantspec.pair.preview import structure_of
from quantspec.passes import QuantizeWeights

OPTIONS = QuantSpecConfig(kv_group_size=16)


@pytest.fixture(scope="module")
def structure():
    return structure_of(tiny_model("llama").config, OPTIONS, torch.bfloat16)


def test_nothing_is_quantized_to_tell_sizes(monkeypatch):
    """Hundreds of experts take long to quantize, even without data."""
    monkeypatch.setattr(QuantizeWeights, "_packed", lambda *_: pytest.fail("weights were quantized"))
    linears = structure_of(tiny_model("mixtral").config, OPTIONS).linears
    assert any("experts" in linear.report.name and linear.draft_bytes for linear in linears)


@pytest.mark.parametrize(("sizes", "room", "found"), [([3, 5, 9], 5, 2), ([3, 5, 9], 2, 0), ([3, 5, 9], 99, 3)])
def test_most_that_fits(sizes, room, found):
    assert most_that_fits(lambda number: sizes[number - 1], room, len(sizes)) == found


def test_alternatives(structure):
    """Their caches are transformers' own, in 16 and in 8 bits; of INT4 weights alone the model's are not kept."""
    own, model, fp8, int4 = ways(captured_sizes(structure, OPTIONS))
    dense = full_precision_bytes(structure.layers, 300, 2, torch.bfloat16)
    parts = expected_memory(structure.layers, 300, 2, kv_group_size=16, max_cache_len=structure.max_len)
    assert own.total(300, 2) == sum(structure.weight_bytes.values()) + sum(parts.values())
    assert (model.weights, model.cache(300, 2)) == (structure.weight_bytes["target"], dense)
    assert (fp8.weights, fp8.cache(300, 2)) == (structure.weight_bytes["target"], dense // 2)
    quantized = sum(linear.model_bytes for linear in structure.linears if linear.draft_bytes)
    assert int4.cache(300, 2) == dense
    assert int4.weights == structure.weight_bytes["target"] - quantized + structure.weight_bytes["draft_int4"]
    assert 0 < int4.weights < model.weights < own.weights


def test_largest_context_and_batch_fit_and_one_more_does_not(structure):
    sizes = captured_sizes(structure, OPTIONS)
    every = list(ways(sizes))
    card = Card("toy", every[0].total(200, 3) * 2)
    found = fit(sizes, card, 0.5, 200, 3)
    assert found["ways"][0]["fits"]
    assert found["ways"][0]["largest_batch_size"] == 3
    for way, row in zip(every, found["ways"], strict=True):
        assert way.total(row["largest_context"], 3) <= found["room"]
        assert row["largest_context"] == 512 or way.total(row["largest_context"] + 1, 3) > found["room"]
        assert (
            way.total(200, row["largest_batch_size"]) <= found["room"] < way.total(200, row["largest_batch_size"] + 1)
        )
    for row in found["server"]:
        assert every[0].total(row["max_length"], row["max_sequences"]) <= found["room"]
    lengths = [row["max_length"] for row in found["server"]]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("architecture", ["gemma2", "deepseek_v3", "llama"])
def test_a_server_of_the_lengths_that_are_told_has_room(architecture):
    """An engine's pool has every page of a layer with a window, whose own cache is a ring."""
    structure = structure_of(tiny_model(architecture).config, OPTIONS, torch.bfloat16)
    weights, group = sum(structure.weight_bytes.values()), OPTIONS.kv_group_size
    most = {"max_cache_len": structure.max_len, "kv_group_size": group}
    room = weights + sum(expected_memory(structure.layers, 300, 4, **most).values())
    for row in fit(captured_sizes(structure, OPTIONS), Card("toy", room), 1, 300, 1)["server"]:
        texts, length = row["max_sequences"], row["max_length"]
        pages = texts * planned_groups(length, group, structure.max_len)
        own = sum(expected_memory(structure.layers, 1, texts, kv_group_size=group).values())
        needed = own + pages * group * sum(cache_bytes_per_token(structure.layers, group).values())
        assert weights + needed <= room


def test_cards():
    assert Card.named("H100-80").bytes == 81559 * 2**20
    assert Card.named("24") == Card.named("24GB") == Card("24 GiB", 24 * 2**30)
    with pytest.raises(CommandError, match="--gpu 'voodoo' is not known"):
        Card.named("voodoo")


def test_the_card_that_is_here_is_told_without_torch():
    here = Card.here()
    assert (here is not None) == torch.cuda.is_available()
    if here is not None:
        properties = torch.cuda.get_device_properties(0)
        assert here == Card(properties.name, properties.total_memory)


def test_the_command_tells_what_each_of_several_gpus_has(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Card, "here", lambda: None)
    tiny_model("lfm2").config.save_pretrained(tmp_path)
    one, two = (json.loads(run("inspect", tmp_path, "--json", "--tensor-parallel", n)[1]) for n in (1, 2))
    assert [facts["tensor_parallel"] for facts in (one, two)] == [1, 2]
    assert not one["computed_by_every_rank"]
    assert set(two["computed_by_every_rank"]) == {
        f"model.layers.0.conv.{x}" for x in ("in_proj", "out_proj", "conv.weight")
    }
    assert two["memory"]["cache"]["upper"] * 2 == one["memory"]["cache"]["upper"]
    assert two["memory"]["cache"]["state"] == one["memory"]["cache"]["state"]
    assert two["memory"]["weights"]["target"] < one["memory"]["weights"]["target"]
    out = " ".join(run("inspect", tmp_path, "--tensor-parallel", 2)[1].split())
    assert "tokens, on each of 2 GPUs" in out
    assert "of the model whole and computes it: model.layers.*.conv.in_proj (1)" in out
    assert "Every GPU has all states." in out


def test_the_command_says_that_a_model_cannot_be_split_over_so_many(run, tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path)
    status, _, err = run("inspect", tmp_path, "--tensor-parallel", 3)
    assert status != 0
    assert "its 4 query heads are no multiple of 3 ranks" in " ".join(err.split())


def test_the_command_says_whether_it_fits(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Card, "here", lambda: None)
    config = tiny_model("llama").config
    config.save_pretrained(tmp_path)
    assert "It fits: " in run("inspect", tmp_path, "--gpu", "h100-80")[1]
    status, out, err = run("inspect", tmp_path, "--gpu", "0.0001")
    assert (status, err) == (0, "")
    assert "It does not fit: " in out
    assert "no length of text would" in out
    status, out, _ = run("inspect", tmp_path)
    assert "There is no GPU here" in out
    assert "float32 weights, FP8 cache" in out
    facts = json.loads(run("inspect", tmp_path, "--gpu", "24", "--json")[1])
    assert [way["fits"] for way in facts["fit"]["ways"]] == [True] * 4
    assert [way["name"] for way in facts["memory"]["ways"]] == [way["name"] for way in facts["fit"]["ways"]]
    assert_error(run("inspect", tmp_path, "--gpu", "voodoo"), "--gpu 'voodoo' is not known", "h100-80")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_nothing_is_cut(run, tmp_path, monkeypatch, width):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    # The width of a terminal without its colours.
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    monkeypatch.setenv("COLUMNS", str(width))
    tiny_model("llama").config.save_pretrained(tmp_path)
    status, out, _ = run("inspect", tmp_path, "--gpu", "24", "--layers")
    assert status == 0
    assert "…" not in out
    assert all(len(line) <= width for line in out.splitlines())
    assert {"self_attn.q_proj", "mlp.down_proj"} <= set(out.split())
