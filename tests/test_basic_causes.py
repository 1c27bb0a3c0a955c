"""A refusal names the cause that running the model shows, not the place where its capture ended."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import DynamicCache

import quantspec
from benchmarks.census_models import tiny_model as census_model
from quantspec import UnsupportedModelError
from quantspec.capture import capture
from quantspec.capture.basic_causes import NO_ATTENTION, basic_cause
from quantspec.capture.token_flow import flow_from, follows


class FixesSizes(nn.Module):
    """Refused by any capture: a loop over tokens. It adds what ``read`` makes of the hidden states."""

    def __init__(self, read) -> None:
        super().__init__()
        self.read = read

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of ``(B, T, C)``, the same."""
        tokens = [hidden[:, token] for token in range(int(hidden.shape[1]))]
        return torch.stack(tokens, 1) + 0.1 * self.read(hidden)


def with_reader(read) -> nn.Module:
    """A llama whose first MLP is followed by such a loop."""
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.reader = FixesSizes(read)
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(mlp.reader(hidden))
    return model


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (torch.randn_like, "LlamaForCausalLM: its forward draws random numbers"),
        (lambda hidden: hidden.flip(1), "LlamaForCausalLM: what it makes of a token depends on the tokens after it"),
        # Nothing that a run shows: what the capture said stands.
        (torch.zeros_like, "fixes the number of tokens"),
    ],
)
def test_the_cause_is_what_running_the_model_shows(read, reason):
    model = with_reader(read).train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with pytest.raises(UnsupportedModelError, match=reason):
        capture(model)
    assert torch.equal(torch.rand(2), expected)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("architecture", "options", "cause"),
    [
        ("rwkv", {"attention_hidden_size": 64}, NO_ATTENTION),
        ("llama", {}, None),
        ("lfm2", {}, None),
    ],
)
def test_a_model_without_attention_is_told_from_what_it_keeps(architecture, options, cause):
    assert basic_cause(tiny_model(architecture, **options)) == cause


def test_state_that_a_cache_of_the_models_own_keeps():
    class Cache(DynamicCache):
        memory: list[torch.Tensor]

    model = tiny_model("llama")
    forward = model.forward

    def keeping(**inputs):
        output = forward(**inputs)
        for cache in output.values():
            if isinstance(cache, DynamicCache):
                cache.__class__ = Cache
                cache.memory = [torch.ones(2)]
        return output

    model.forward = keeping
    assert basic_cause(model).startswith("its Cache keeps state of its own ('memory') beside the layers")


@pytest.mark.parametrize(
    ("kept", "cause"),
    [
        (lambda hidden: hidden[:, -1], "its modules keep state of their own ('LlamaMLP.memory') beside the layers"),
        # A table that is made as long as it is needed.
        (lambda hidden: torch.arange(hidden.shape[1]), None),
    ],
)
def test_state_that_modules_keep_in_attributes(kept, cause):
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    forward = mlp.forward

    def keeping(hidden):
        mlp.memory = kept(hidden)
        return forward(hidden)

    mlp.forward, mlp.memory = keeping, None
    found = basic_cause(model)
    assert found is None if cause is None else found.startswith(cause)
    assert mlp.memory is None


def test_a_model_that_fails_to_run_has_no_cause():
    model = tiny_model("llama")
    model.model.layers[0].mlp.forward = lambda hidden: hidden / None
    assert basic_cause(model) is None


def test_attention_that_only_says_to_see_later_tokens_converts():
    """Its mask forbids it, in the implementation that the model has."""
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    assert len(quantspec.convert(model, kv_group_size=16, weight_group_size=32).layers) == 2


class _Biased(nn.Module):
    """A layer's attention with a further tensor among its arguments."""

    def __init__(self, inner: nn.Module, name: str, made) -> None:
        super().__init__()
        self.inner, self.name, self.made = inner, name, made

    def forward(self, hidden_states: torch.Tensor, **kwargs):
        """As the inner one."""
        return self.inner(hidden_states=hidden_states, **(kwargs | {self.name: self.made(hidden_states)}))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (
            lambda hidden: hidden @ hidden.transpose(1, 2),
            r"a bias for every query and key \('further'\), which follows from what the tokens say",
        ),
        (
            lambda hidden: hidden.new_ones(hidden.shape[1], hidden.shape[1]),
            r"a bias for every query and key \('further'\), which follows from positions and sizes alone",
        ),
        (
            lambda hidden: hidden.topk(2, -1).indices,
            r"which tokens its attention sees follows from what the tokens say \('further'\)",
        ),
        (lambda hidden: hidden[:, 0], "the attention argument 'further' is not supported"),
        (lambda hidden: torch.arange(hidden.shape[1]), "the attention argument 'further' is not supported"),
    ],
)
def test_a_further_argument_of_attention_is_named_by_its_kind(made, reason):
    model = tiny_model("llama")
    model.model.layers[0].self_attn = _Biased(model.model.layers[0].self_attn, "further", made)
    with pytest.raises(UnsupportedModelError, match=reason):
        capture(model)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda hidden: (hidden @ hidden.transpose(1, 2))[:, None], "the mask of its attention follows from what the"),
        (
            lambda hidden: -1e9 * hidden.new_ones(1, 1, hidden.shape[1], hidden.shape[1]).triu(1),
            "it makes the mask of its attention, or a bias in its place, by itself, of positions and sizes alone",
        ),
    ],
)
def test_a_mask_of_the_models_own_is_named_by_its_source(made, reason):
    model = tiny_model("llama")
    model.model.layers[0].self_attn = _Biased(model.model.layers[0].self_attn, "attention_mask", made)
    with pytest.raises(UnsupportedModelError, match=reason):
        capture(model)


def test_a_mask_that_is_read_and_handed_on():
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    forward = attention.forward

    def reading(attention_mask, **kwargs):
        return forward(attention_mask=attention_mask, **kwargs)[0] + attention_mask.sum() * 0, None

    attention.forward = reading
    with pytest.raises(UnsupportedModelError, match="it reads its attention mask itself"):
        capture(model)


def test_a_choice_of_tokens_beside_states_is_named():
    """What the mask follows from is told as the model runs, before any export."""
    with pytest.raises(UnsupportedModelError, match="the mask of its attention follows from what the tokens say"):
        capture(census_model("qwen4_exp_text"))


def test_what_follows_from_tokens_is_told_through_views_and_writes_in_place():
    table = torch.randn(9, 4)
    ids = torch.tensor([[3, 5, 7]])
    with flow_from(ids):
        rows = torch.nn.functional.embedding(ids, table)
        written, beside = torch.zeros(2, 3), torch.zeros(2, 3)
        written[1, :2] = rows[0, 0, :2]
        assert all(map(follows, (rows, rows.transpose(1, 2), rows > 0, written, written.sum())))
        assert not any(map(follows, (table, beside, torch.zeros_like(rows), table.sum() + beside)))
    assert not follows(rows)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda key: torch.cat((key, key[:, :, ::2]), 2), "its attention sees 11 keys in a text of 7 tokens"),
        (lambda key: key.new_zeros(*key.shape[:2], 5, key.shape[3]), "cross-attention"),
    ],
)
def test_keys_that_are_not_one_for_each_token_are_told_apart(made, reason, monkeypatch):
    rope = "transformers.models.llama.modeling_llama.apply_rotary_pos_emb"
    monkeypatch.setattr(rope, lambda query, key, *args: (query, made(key)))
    with pytest.raises(UnsupportedModelError, match=reason):
        capture(tiny_model("llama"))
