"""A refusal names the cause that running the model shows, not the place where its capture ended."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import DynamicCache

import quantspec
from quantspec import UnsupportedModelError
from quantspec.capture import capture
from quantspec.capture.basic_causes import NO_ATTENTION, basic_cause


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
        return self.inner(hidden_states=hidden_states, **kwargs, **{self.name: self.made(hidden_states)})


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda hidden: hidden @ hidden.transpose(1, 2), r"a bias for every query and key \('further'\)"),
        (lambda hidden: hidden.topk(2, -1).indices, "follows from what the tokens say"),
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
        (lambda key: torch.cat((key, key[:, :, ::2]), 2), "such as one for several tokens"),
        (lambda key: key.new_zeros(*key.shape[:2], 5, key.shape[3]), "cross-attention"),
    ],
)
def test_keys_that_are_not_one_for_each_token_are_told_apart(made, reason, monkeypatch):
    rope = "transformers.models.llama.modeling_llama.apply_rotary_pos_emb"
    monkeypatch.setattr(rope, lambda query, key, *args: (query, made(key)))
    with pytest.raises(UnsupportedModelError, match=reason):
        capture(tiny_model("llama"))
