"""Layers that keep state besides keys and values: convolutions and recurrences, beside attention and without."""

from __future__ import annotations

import pytest
import torch
from repeats import repeat
from step_by_step import pad_batch, random_prompt
from test_architectures import converted, in_groups
from tiny_models import STATEFUL, tiny_model
from torch import fx

import quantspec
from quantspec import UnsupportedModelError
from quantspec.capture import capture
from quantspec.capture.state import state_shapes
from quantspec.config import QuantSpecConfig
from quantspec.memory import expected_memory, full_precision_bytes
from quantspec.pair.split import split_capture
from quantspec.passes import Role
from quantspec.passes.shard_linears import Place
from quantspec.passes.state_steps import StateFill, StateSteps, StateStepsError, StepStates

GREEDY = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}


@pytest.mark.parametrize("architecture", ["zamba2", repeat("qwen3_5_text"), repeat("lfm2_moe")])
def test_a_captured_block_is_the_models_own_forward(architecture):
    """States step token by token inside of the graph, everything else takes the block at once."""
    model = tiny_model(architecture)
    captured = capture(model)
    ids = torch.tensor([random_prompt(9, seed) for seed in range(2)])
    states = [torch.zeros(2, 10, *state.shape, dtype=state.dtype) for state in captured.states]
    with torch.no_grad():
        logits = captured.graph_module(ids, torch.arange(9).expand(2, 9), *states)
        expected = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(logits, expected, atol=1e-4)
    assert len(states) > 0


# Falcon-H1's layers are all alike.
@pytest.mark.parametrize(("architecture", "layers"), [("lfm2", 2), repeat("falcon_h1", 1)])
def test_weights_that_need_no_gradients_are_captured_alike(architecture, layers):
    """The oldest torch decomposes their linears in another way."""
    model = tiny_model(architecture, num_hidden_layers=layers)
    learning, frozen = (capture(model.requires_grad_(learns)) for learns in (True, False))
    graphs = [[str(node.target) for node in it.graph_module.graph.nodes] for it in (learning, frozen)]
    assert graphs[0] == graphs[1]
    assert learning.states == frozen.states


@pytest.mark.parametrize("architecture", in_groups(STATEFUL))
def test_a_padded_batch_is_generated_as_alone(architecture):
    """Padding does not enter states, and rejected drafts leave none."""
    qs = converted(architecture)
    prompts = [random_prompt(count, count) for count in (30, 17, 1)]
    ids, mask = pad_batch(prompts, (3, 16, 2), 33)
    together = qs.generate(ids, mask, num_speculative_tokens=4, **GREEDY)
    for row, prompt in enumerate(prompts):
        alone = qs.model.generate(torch.tensor([prompt]), **GREEDY)
        assert together[row, 33:].tolist() == alone[0, len(prompt) :].tolist()
    # Both accepted and rejected drafts were among them.
    assert 0 < qs.last_stats.draft_acceptance_rate < 1


@pytest.mark.parametrize("architecture", ["lfm2", "granitemoehybrid", "falcon_h1"])
def test_states_are_found_without_weights(architecture):
    model = tiny_model(architecture)
    found = state_shapes(model)
    assert len(found) > 0
    assert state_shapes(model.to("meta")) == found


@pytest.mark.parametrize("architecture", in_groups(["lfm2", "qwen3_next"]))
def test_prefill_carries_states_from_chunk_to_chunk(architecture, monkeypatch):
    qs = converted(architecture)
    monkeypatch.setattr(type(qs.pair), "fill_chunk", lambda *sizes: 8)
    prompts = [random_prompt(count, count) for count in (30, 17)]
    ids, mask = pad_batch(prompts, (0, 13), 30)
    together = qs.generate(ids, mask, **GREEDY)
    for row, prompt in enumerate(prompts):
        alone = qs.model.generate(torch.tensor([prompt]), **GREEDY)
        assert together[row, 30:].tolist() == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize("architecture", in_groups(["lfm2", "granitemoehybrid"]))
def test_a_conversation_goes_on_from_its_states_or_begins_anew(architecture):
    qs = converted(architecture)
    first = qs.generate(torch.tensor([random_prompt(20)]), num_speculative_tokens=4, **GREEDY)
    longer = torch.cat((first, torch.tensor([random_prompt(9, 1)])), 1)
    # Else an id that is also that of padding would be taken for it.
    mask = torch.ones_like(longer)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    text = qs.generate(longer, mask, continue_cache=True, **options)
    assert qs.last_stats.continued_tokens == first.shape[1] - 1
    assert torch.equal(text, qs.model.generate(longer, attention_mask=mask, **options))
    # States do not go back to a place inside of the text.
    other = torch.cat((first[:, :40], torch.tensor([random_prompt(9, 2)])), 1)
    mask = torch.ones_like(other)
    text = qs.generate(other, mask, continue_cache=True, **options)
    assert qs.last_stats.continued_tokens == 0
    assert torch.equal(text, qs.model.generate(other, attention_mask=mask, **options))


@pytest.mark.parametrize("architecture", in_groups([*STATEFUL, "jamba"]))
def test_models_that_do_not_go_on_from_states_are_known(architecture):
    """Jamba's own scan over several tokens begins with zeros."""
    qs = converted(architecture)
    assert qs.pair.continues == (architecture != "jamba")


@pytest.mark.xdist_group("jamba")
def test_a_conversation_with_jamba_begins_anew():
    qs = converted("jamba")
    first = qs.generate(torch.tensor([random_prompt(20)]), num_speculative_tokens=4, **GREEDY)
    longer = torch.cat((first, torch.tensor([random_prompt(9, 1)])), 1)
    options = {"attention_mask": torch.ones_like(longer), "max_new_tokens": 12, "min_new_tokens": 12}
    text = qs.generate(longer, continue_cache=True, do_sample=False, **options)
    assert torch.equal(text, qs.model.generate(longer, do_sample=False, **options))
    assert qs.last_stats.continued_tokens == 0


@pytest.mark.xdist_group("granitemoehybrid")
def test_a_saved_pair_is_the_same(tmp_path):
    qs = converted("granitemoehybrid")
    qs.save_pretrained(tmp_path)
    loaded = quantspec.from_pretrained(tmp_path)
    ids = torch.tensor([random_prompt(20)])
    assert torch.equal(loaded.generate(ids, **GREEDY), qs.generate(ids, **GREEDY))


@pytest.mark.xdist_group("lfm2")
def test_states_count_as_memory_in_full_precision():
    qs = converted("lfm2")
    qs.generate(torch.tensor([random_prompt(20)]), num_speculative_tokens=4, max_new_tokens=3)
    (state,) = qs.session.cache.states
    assert state.dtype == torch.float32
    assert qs.last_stats.cache_bytes["state"] == state.nbytes
    options = {"num_speculative_tokens": 4, "dtype": torch.float32, "states": qs.pair.captured.states}
    assert expected_memory(qs.layers, 64, **options)["state"] == state.nbytes
    dense, bare = (full_precision_bytes(qs.layers, 64, 1, torch.float32, states) for states in (options["states"], ()))
    assert dense - bare == state[:, 0].nbytes
    assert "states in full precision: 1" in repr(qs)


@pytest.mark.xdist_group("granitemoehybrid")
def test_prefill_shares_the_models_tensors():
    qs = converted("granitemoehybrid")
    own = {tensor.data_ptr() for tensor in qs.model.parameters()}
    assert {tensor.data_ptr() for tensor in qs.pair.graphs[Role.PREFILL].parameters()} == own


@pytest.mark.xdist_group("granitemoehybrid")
def test_linears_around_states_are_int4():
    """What leads from a state to its successor stays as it is; projections before and behind are the draft's own."""
    int4 = {report.name for report in converted("granitemoehybrid").linears if report.group_size is not None}
    assert {"model.layers.0.mamba.in_proj", "model.layers.0.mamba.out_proj"} <= int4


@pytest.mark.xdist_group("lfm2")
def test_what_states_do_not_go_with_is_refused():
    with pytest.raises(ValueError, match="compile=True: layers of Lfm2ForCausalLM keep state"):
        quantspec.convert(tiny_model("lfm2"), compile=True)
    with pytest.raises(ValueError, match=r"layers of Lfm2ForCausalLM keep state.*tuning"):
        converted("lfm2").tune()


@pytest.mark.parametrize("architecture", in_groups(STATEFUL))
def test_of_a_hybrid_a_rank_has_whole_what_its_states_need(architecture):
    """And what chooses experts; attention, gated products, experts and the head are split."""
    qs = converted(architecture)
    for rank in range(2):
        part = split_capture(qs.pair.captured, qs.model, Place(rank, 2, ""))
        assert [2 * layer.query_heads for layer in part.layers] == [layer.query_heads for layer in qs.layers]
        of_states = {"lfm2": ".conv.", "qwen3_next": ".linear_attn."}.get(architecture, ".mamba.")
        others = [name for name in part.whole if of_states not in name]
        assert any(of_states in name for name in part.whole)
        assert all(name.endswith(".gate") or name.endswith("expert_gate") for name in others)
        split = {name.removeprefix("model.") for name in part.pieces}
        assert {"model.embed_tokens.weight", "lm_head.weight"} & split
        assert not [name for name in split if of_states in name]


def test_a_prompt_fills_states_up_to_its_padding():
    """As every step keeps the state, but the last one of each row alone."""
    token = Token()
    gm = exported(token)
    StepStates(1)(gm)
    steps = gm.state_steps_0
    fill = StateFill(steps.step, steps.is_token)
    rows = torch.randn(3 * 5, 4)
    every, filled = torch.randn(3, 6, 4), torch.zeros(3, 2, 4)
    filled[:, 0] = every[:, 0]
    num_new = torch.tensor([5, 2, 0])
    with torch.no_grad():
        expected, made = steps(every, rows), fill(filled, num_new, rows)
    assert torch.equal(filled[:, 0], every[torch.arange(3), num_new])
    is_new = (torch.arange(5) < num_new[:, None]).flatten()
    for ours, theirs in zip(made, expected, strict=True):
        assert torch.equal(ours[is_new], theirs[is_new])


def test_a_model_without_attention_is_refused_with_the_reason():
    with pytest.raises(UnsupportedModelError, match="no attention layer, so no key/value cache"):
        quantspec.convert(tiny_model("lfm2", layer_types=["conv", "conv"]), QuantSpecConfig())


class OfItsBatch(torch.nn.Module):
    """Every row sees the mean of all rows' hidden states: tokens of one text, once they are verified side by side."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        """``(B, T, C)``."""
        return self.inner(hidden + hidden.mean(0, keepdim=True))


def test_a_hybrid_that_mixes_rows_is_refused():
    model = tiny_model("lfm2")
    model.model.layers[1].feed_forward = OfItsBatch(model.model.layers[1].feed_forward)
    with pytest.raises(UnsupportedModelError, match="mixes tokens outside attention"):
        quantspec.convert(model, self_check=False)


def test_a_forward_that_fails_with_a_cache_gives_its_own_error():
    model = tiny_model("lfm2")
    forward = model.forward

    def without_cache(*args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            raise RuntimeError("no cache fits here")
        return forward(*args, **kwargs)

    model.forward = without_cache
    with pytest.raises(UnsupportedModelError, match="no cache fits here"):
        quantspec.convert(model, self_check=False)


# --- the pass --------------------------------------------------------------------------------------------------------


class Token(torch.nn.Module):
    """One token of a model whose state is a decaying sum of its embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Parameter(torch.randn(10, 4, generator=torch.Generator().manual_seed(0)))
        self.head = torch.nn.Parameter(torch.randn(10, 4, generator=torch.Generator().manual_seed(1)))

    def forward(self, input_ids, position_ids, state):
        """``(logits, the next state)``."""
        x = torch.nn.functional.embedding(input_ids, self.embedding)
        new = state * 0.5 + x.squeeze(1)
        hidden = (new - state)[:, None] * (position_ids[..., None] + 1)
        return torch.nn.functional.linear(hidden, self.head), new


class Still(Token):
    """The same with a state that stays."""

    def forward(self, input_ids, position_ids, state):
        """``(logits, the same state)``."""
        logits, _ = super().forward(input_ids, position_ids, state)
        return logits, torch.zeros_like(input_ids, dtype=torch.float32).expand(-1, 4) + 0


def exported(token: Token) -> fx.GraphModule:
    ids = torch.zeros(2, 1, dtype=torch.long)
    rows = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(token, (ids, ids.clone(), torch.zeros(2, 4)), dynamic_shapes=(rows,) * 3)
    return program.run_decompositions({}).module(check_guards=False)


@torch.no_grad()
def test_the_pass_steps_a_state_and_batches_the_rest():
    token = Token()
    gm = exported(token)
    assert StepStates(1)(gm).modified
    calls = gm.graph.find_nodes(op="call_module", target="state_steps_0")
    assert len(calls) == 1
    assert isinstance(gm.state_steps_0, StateSteps)
    assert all("val" in node.meta for node in gm.graph.nodes if node.op != "output")
    ids, positions = torch.randint(0, 10, (3, 5)), torch.arange(5).expand(3, 5)
    states = torch.zeros(3, 6, 4)
    states[:, 0] = 1
    logits = gm(ids, positions, states)
    state = torch.ones(3, 4)
    for step in range(5):
        expected, state = token(ids[:, step : step + 1], positions[:, step : step + 1], state)
        assert torch.allclose(logits[:, step : step + 1], expected, atol=1e-5)
        assert torch.allclose(states[:, step + 1], state)


def test_a_state_that_does_not_follow_from_the_one_before_is_refused():
    with pytest.raises(StateStepsError, match="does not follow from the one before"):
        StepStates(1)(exported(Still()))
