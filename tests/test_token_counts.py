"""What follows the number of tokens is refused, however long a text must be to show it; what only looks so converts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from repeats import only
from step_by_step import random_prompt
from tiny_models import tiny_model
from torch import Tensor, nn

from quantspec import QuantSpecModel, UnsupportedModelError, convert
from quantspec.self_check import incremental_logits

BEGIN_BY_THEMSELVES = only(["roberta"], ["roberta", "camembert", "data2vec-text", "xlm-roberta"])
# Beyond every length that a short run would see, within the tiny models' limit of 512 tokens.
FAR = 400


def with_change(change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A llama of one layer, whose MLP's input is changed."""
    model = tiny_model("llama", num_hidden_layers=1)
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(change(hidden))
    return model


def converted(model: nn.Module, **options) -> QuantSpecModel:
    return convert(model, kv_group_size=16, weight_group_size=32, **options)


def indices(hidden: Tensor) -> Tensor:
    return torch.arange(hidden.shape[1], device=hidden.device)[:, None]


TABLE = torch.cat((torch.ones(FAR), torch.linspace(1, 2, 512 - FAR)))[:, None]

FOLLOWED = {
    "scale": lambda hidden: hidden * (1 + (indices(hidden) + 1).div(FAR, rounding_mode="floor").log1p()),
    "bucket": lambda hidden: hidden + (indices(hidden) > FAR),
}
FROM_SIZES = {
    "counted ones": lambda hidden: hidden * (torch.ones_like(hidden[..., :1]).cumsum(1) < FAR),
    "length": lambda hidden: hidden * (1 + hidden.shape[1] // FAR),
    "clamp": lambda hidden: hidden.clamp(max=10 + hidden.shape[1] // FAR),
    "table": lambda hidden: hidden * TABLE[: hidden.shape[1]],
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_counts_that_meet_the_tokens_follow_position_ids(name):
    model = with_change(FOLLOWED[name])
    ids = torch.tensor([random_prompt(FAR + 20, 1)])
    # Groups so long that nothing is quantized.
    qs = convert(model, kv_group_size=256, weight_group_size=32)
    decoded = incremental_logits(qs, ids, FAR - 4, (1, 3, 20))
    with torch.no_grad():
        assert torch.allclose(decoded, model(ids, use_cache=False).logits[:, FAR - 5 :], atol=1e-4)


@pytest.mark.parametrize("name", FROM_SIZES)
def test_values_from_sizes_are_refused_by_node_and_module(name):
    with pytest.raises(UnsupportedModelError) as error:
        converted(with_change(FROM_SIZES[name]))
    message = str(error.value)
    assert "is made from the number of tokens instead of position_ids" in message
    assert "of module 'model.layers.0" in message


SAME = {
    "constant": lambda hidden: hidden + torch.full_like(hidden, 0.5),
    "equal rows": lambda hidden: hidden * torch.full((512, 1), 0.5)[: hidden.shape[1]],
    "shape alone": lambda hidden: hidden + torch.zeros_like(indices(hidden)),
    "tokens named": lambda hidden: hidden[:, torch.arange(hidden.shape[1])],
    "views": lambda hidden: hidden.reshape(hidden.shape[0] * hidden.shape[1], -1).view(hidden.shape),
    "one token alone": lambda hidden: hidden if hidden.shape[1] == 1 else hidden.clone(),
}


@pytest.mark.parametrize("name", SAME)
def test_what_no_token_count_changes_converts(name):
    assert len(converted(with_change(SAME[name])).layers) == 1


BRANCHES = {
    "tokens <= 400": lambda hidden: hidden * 2 if hidden.shape[1] > FAR else hidden,
    "Ne(Mod(tokens, 128), 0)": lambda hidden: hidden * 2 if hidden.shape[1] % 128 == 0 else hidden,
    "batch*tokens <= 400": lambda hidden: hidden * 2 if hidden.shape[0] * hidden.shape[1] > FAR else hidden,
}


@pytest.mark.parametrize("condition", BRANCHES)
def test_a_branch_on_the_number_of_tokens_is_refused_with_its_condition_and_line(condition):
    with pytest.raises(UnsupportedModelError, match="branches on the number of tokens") as error:
        converted(with_change(BRANCHES[condition]))
    assert condition in str(error.value)
    assert "test_token_counts.py:" in str(error.value)


def test_a_branch_beyond_the_longest_text_is_no_obstacle():
    assert converted(with_change(BRANCHES["tokens <= 400"]), max_cache_len=400).config.max_cache_len == 400


def test_a_state_that_only_keys_see_is_refused():
    model = tiny_model("llama")
    projection = model.model.layers[1].self_attn.k_proj
    forward = projection.forward
    projection.forward = lambda hidden: forward(nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1])
    with pytest.raises(UnsupportedModelError, match=r"mixes tokens .*in the key/value cache"):
        converted(model, self_check=False)


def test_what_follows_the_furthest_position_of_a_call_is_refused():
    """As RoPE that is rescaled for the whole text once one of its tokens is far enough."""
    model = tiny_model("llama")
    rope = model.model.rotary_emb
    forward = rope.forward

    def rescaled(hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return forward(hidden, torch.where(position_ids.max() > FAR, position_ids * 0.5, position_ids * 1.0))

    rope.forward = rescaled
    with pytest.raises(UnsupportedModelError, match="mixes tokens"):
        converted(model, self_check=False)


@pytest.mark.parametrize("self_check", [False, True])
@pytest.mark.parametrize("architecture", BEGIN_BY_THEMSELVES)
def test_a_model_that_begins_positions_by_itself_keeps_its_own(architecture, self_check):
    """Also the self-check, although token ids of padding, which such a model does not count, are many of so few."""
    model = tiny_model(architecture, is_decoder=True)
    qs = converted(model, self_check=self_check)
    assert not any(module._forward_hooks for module in model.modules())
    prompt = [token for token in random_prompt(20, 1) if token != model.config.pad_token_id]
    ids = torch.tensor([prompt])
    decoded = incremental_logits(qs, ids, len(prompt) - 4, (1, 3))
    with torch.no_grad():
        assert torch.allclose(decoded, model(ids, use_cache=False).logits[:, len(prompt) - 5 :], atol=1e-4)


@pytest.mark.parametrize("self_check", [False, True])
@pytest.mark.parametrize("architecture", BEGIN_BY_THEMSELVES)
def test_a_model_that_counts_positions_in_its_own_way_is_refused_by_module(architecture, self_check):
    model = tiny_model(architecture, is_decoder=True)
    embeddings = model.base_model.embeddings
    counted = embeddings.create_position_ids_from_input_ids
    embeddings.create_position_ids_from_input_ids = lambda *arguments: counted(*arguments) * 2
    with pytest.raises(UnsupportedModelError, match=r"module '.*' \(.*\): given no position_ids, .* one by one"):
        converted(model, self_check=self_check)
    assert not any(module._forward_hooks for module in model.modules())


def test_positions_that_the_model_scales_by_position_ids_convert():
    """Llama 4's temperature counted from position_ids instead of from arange(T)."""
    model = tiny_model("llama")
    rope = model.model.rotary_emb
    forward = rope.forward
    rope.forward = lambda hidden, position_ids: forward(hidden, position_ids.clamp(max=FAR))
    assert len(converted(model).layers) == 2
