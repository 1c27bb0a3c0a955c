"""What inspect tells of a deep model from one layer of each kind is what a capture of all its layers tells."""

from __future__ import annotations

import pytest
import torch
from repeats import only, repeat
from tiny_models import STATEFUL, tiny_model
from transformers import AutoModelForCausalLM

from quantspec import QuantSpecConfig
from quantspec.pair import preview
from quantspec.pair.layer_kinds import shorten

LAYERS = 3
# Ways in which layers differ: not at all, in windows, in experts; those with states are compared rank by rank.
KINDS = ["llama", "gemma2", "deepseek_v3"]
# The same with sinks, chunks or inputs of their own beside windows, and with experts or states in some or all layers.
MORE_KINDS = ["lfm2", "gpt_oss", "llama4_text", "gemma4", "qwen3_moe", "falcon_h1"]


def deep_config(architecture: str, **changes):
    """The tiny model's config with more layers, those of two kinds taking turns.

    Capturing states takes long, so of such models the last layer alone has states, or (falcon_h1) both have.
    """
    config = tiny_model(architecture, **changes).config
    text = config.get_text_config()
    kinds = text.num_hidden_layers
    order = [1, 0] if architecture == "falcon_h1" else [1, 1, 0] if architecture in STATEFUL else [1, 0, 1]
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == kinds and "layer" in name:
            setattr(text, name, [value[kind] for kind in order])
    text.num_hidden_layers = len(order)
    return config


@pytest.mark.parametrize("architecture", only(KINDS, [*KINDS, *MORE_KINDS]))
def test_one_layer_of_each_kind_tells_of_all(architecture, monkeypatch):
    config = deep_config(architecture)
    options = QuantSpecConfig(kv_group_size=16)
    short = preview.structure_of(config, options, torch.float32)
    monkeypatch.setattr(preview, "shorten", lambda model: None)
    assert short == preview.structure_of(config, options, torch.float32)


@pytest.mark.parametrize("architecture", ["llama", "lfm2", repeat("gemma2")])
def test_one_layer_of_each_kind_tells_what_a_rank_has(architecture, monkeypatch):
    """Its bytes are those of the pieces that a capture of all layers is split into."""
    config = deep_config(architecture)
    options = QuantSpecConfig(kv_group_size=16)
    whole = preview.structure_of(config, options, torch.float32)
    short = preview.structure_of(config, options, torch.float32, num_ranks=2)
    split = []
    split_capture = preview.split_capture
    monkeypatch.setattr(preview, "split_capture", lambda *given: split.append(split_capture(*given)) or split[-1])
    monkeypatch.setattr(preview, "shorten", lambda model: None)
    assert short == preview.structure_of(config, options, torch.float32, num_ranks=2)
    assert [(one.query_heads * 2, one.kv_heads * 2) for one in short.layers] == [
        (one.query_heads, one.kv_heads) for one in whole.layers
    ]
    assert short.states == whole.states
    assert bool(short.whole) == (architecture == "lfm2")
    # A rank has a half of everything but of what is whole, norms and, in both, what is no matrix.
    kept = sum(short.whole.values())
    small = 4 * sum(p.numel() for p in split[0].graph_module.parameters() if p.dim() == 1)
    assert (whole.weight_bytes["target"] - kept) / 2 <= short.weight_bytes["target"] - kept
    assert short.weight_bytes["target"] - kept <= (whole.weight_bytes["target"] - kept) / 2 + small + 4096
    assert short.weight_bytes["draft_int4"] < whole.weight_bytes["draft_int4"]


def test_captured_layers_do_not_grow_with_the_model(monkeypatch):
    """A model of many layers takes as long as one of few: one layer of each kind is captured."""
    seen = []
    captured = preview._captured
    monkeypatch.setattr(preview, "_captured", lambda model, *rest: seen.append(model) or captured(model, *rest))
    config = deep_config("gemma2")
    structure = preview.structure_of(config, QuantSpecConfig(kv_group_size=16))
    assert [model.config.num_hidden_layers for model in seen] == [2]
    assert len(structure.layers) == LAYERS
    assert config.num_hidden_layers == LAYERS


def test_lists_as_long_as_there_are_layers_by_chance_stay():
    config = tiny_model("falcon_h1").config
    assert len(config.time_step_limit) == config.num_hidden_layers
    model = tiny_model("falcon_h1")
    assert shorten(model) is not None
    assert model.config.time_step_limit == config.time_step_limit
    assert model.config.num_hidden_layers == 1


@pytest.mark.parametrize("architecture", STATEFUL)
def test_layers_with_states_are_as_few_as_their_kinds(architecture):
    """Whichever of its modules count the layers: those with states are of one kind, those with attention of another."""
    config = deep_config(architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kinds = shorten(model)
    assert kinds is not None
    assert max(kinds.kinds) + 1 == model.config.get_text_config().num_hidden_layers <= 2
