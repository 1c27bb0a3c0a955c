"""One test for each complaint of users of other speculative decoders and quantized caches that applies here.

They are the short form; each names the file that tests the matter thoroughly.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from conftest import GROUP
from step_by_step import assert_is_targets_choice, assert_same_text, decode_step_by_step, random_prompt
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import quantspec
from quantspec.cache import HierarchicalCache
from quantspec.engine.sampling import Randomness, accept
from quantspec.engine.session import Session
from quantspec.passes import Role
from quantspec.self_check import incremental_logits

LONG = 2 * GROUP + 8
# What an INT8 read of the cache moves the logits of these models by; their spread is 1.2.
INT8_ERROR = 0.15


def generate(qs, prompt: list[int], max_new_tokens: int, **options) -> list[int]:
    """Greedy tokens after ``prompt`` unless ``options`` say otherwise."""
    options.setdefault("eos_token_id", None)
    return qs.generate(torch.tensor([prompt]), max_new_tokens=max_new_tokens, **options)[0, len(prompt) :].tolist()


def logits_after(model: PreTrainedModel, ids: Tensor, prompt_len: int) -> Tensor:
    """Hugging Face's full-precision logits from the last prompt token on."""
    with torch.no_grad():
        return model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, prompt_len - 1 :].float()


def decoded_logits(qs, ids: Tensor, prompt_len: int) -> Tensor:
    """The target's, read through the cache: token by token, then in blocks."""
    with torch.no_grad():
        single = (ids.shape[1] - prompt_len) // 2
        block = ids.shape[1] - prompt_len - single
        return incremental_logits(qs, ids, prompt_len, (1,) * single + (3,) * (block // 3) + (1,) * (block % 3)).float()


def test_3_acceptance_does_not_collapse_at_temperature_one(qs, monkeypatch):
    """mlx-lm#1709, sglang#26312: exact matching of two independent samples would accept far less.

    See test_sampling.py.
    """
    ids = torch.tensor([random_prompt(LONG, seed) for seed in range(6)])
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "eos_token_id": None, "seed": 0}
    options |= {"max_new_tokens": 30, "num_speculative_tokens": 2}
    qs.generate(ids, **options)
    first = qs.last_stats.acceptance_rate_per_position[0]
    at = Randomness.at
    # The draft's own noise, as if it drew by itself.
    monkeypatch.setattr(Randomness, "at", lambda self, ahead, count: at(self, ahead + 999 * (count == 1), count))
    qs.generate(ids, **options)
    assert first > 5 * qs.last_stats.acceptance_rate_per_position[0]


def test_4_identical_at_temperature_zero(qs):
    """vllm#7627: equal to target-only decoding on the same kernels, but for ties. See test_generate.py."""
    prompt = random_prompt(LONG, seed=1)
    tokens = generate(qs, prompt, 3 * GROUP)
    assert_is_targets_choice(qs, prompt, tokens)
    assert_same_text(qs, prompt, tokens, decode_step_by_step(qs, prompt, 3 * GROUP))


def test_5_eos_and_criteria_inside_an_accepted_block(qs, monkeypatch):
    """transformers#47912, #48039: with every draft accepted, the end is still at the exact token.

    Stop strings, streaming and stateful criteria: test_generate.py.
    """

    class AtToken(StoppingCriteria):
        def __init__(self, token: int) -> None:
            self.token = token
            self.calls = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.calls += 1
            return input_ids[:, -1] == self.token

    prompt = random_prompt(LONG, seed=4)
    free = decode_step_by_step(qs, prompt, 12)
    forward = type(qs.pair).forward
    as_target = {Role.DRAFT: Role.TARGET}
    monkeypatch.setattr(
        type(qs.pair),
        "forward",
        lambda self, role, *inputs, cache: forward(self, as_target.get(role, role), *inputs, cache=cache),
    )
    for place in range(12):
        end = free.index(free[place]) + 1
        assert generate(qs, prompt, 12, eos_token_id=free[place], num_speculative_tokens=5) == free[:end]
        criterion = AtToken(free[place])
        criteria = StoppingCriteriaList([criterion])
        assert generate(qs, prompt, 12, stopping_criteria=criteria, num_speculative_tokens=5) == free[:end]
        assert criterion.calls == end


def test_6_a_group_is_quantized_once(qs, monkeypatch):
    """transformers#34096: later flushes leave the codes of earlier groups bit-identical. See test_cache.py."""
    states = []
    flush = HierarchicalCache.flush

    def recorded(self):
        flush(self)
        groups = int(self.quantized_len[0]) // GROUP
        planes = [part[:, :, :groups].clone() for layer in self.layers for part in layer.parts()[2:]]
        states.append((groups, planes))

    monkeypatch.setattr(HierarchicalCache, "flush", recorded)
    generate(qs, random_prompt(LONG), 4 * GROUP)
    assert states[-1][0] - states[0][0] >= 3
    for (_, earlier), (_, later) in itertools.pairwise(states):
        for before, after in zip(earlier, later, strict=True):
            assert torch.equal(before, after[:, :, : before.shape[2]])


def test_7_huge_key_biases_survive():
    """transformers#35185, llama.cpp#21385: Qwen2's k_proj biases, planted. Convert's self-check passes as well."""
    model = tiny_model("qwen2")
    with torch.no_grad():
        bias = model.model.layers[0].self_attn.k_proj.bias
        bias[5::8] = 300.0
        bias[15::16] = -300.0
    qs = quantspec.convert(model, kv_group_size=GROUP, self_check=True)
    ids = torch.tensor([random_prompt(130, seed=0)])
    ours, expected = decoded_logits(qs, ids, 80), logits_after(model, ids, 80)
    assert (ours - expected).abs().max() < INT8_ERROR
    assert_agrees_with_argmax(ours, expected)
    prompt = ids[0, :80].tolist()
    tokens = generate(qs, prompt, GROUP)
    assert qs.last_stats.accepted > 0
    assert_is_targets_choice(qs, prompt, tokens)


def assert_agrees_with_argmax(ours: Tensor, expected: Tensor) -> None:
    """The argmax is Hugging Face's wherever its margin is not within the error of an INT8 read."""
    top = expected.topk(2).values
    clear = top[..., 0] - top[..., 1] > INT8_ERROR
    assert clear.float().mean() > 0.5
    assert torch.equal(ours.argmax(-1)[clear], expected.argmax(-1)[clear])


@pytest.mark.parametrize("length", range(2 * GROUP - 4, 2 * GROUP + 2))
def test_8_rollback_over_flush_boundaries(qs, monkeypatch, length):
    """vllm#40831, #53180: whatever is rejected around a flush, the text goes on as if it had never been drafted.

    Every rollback length at every boundary: test_cache.py.
    """
    calls = []

    def rejects_in_turn(drafts, scores):
        # Accept at most 0, 1, 2, ... of the block in turn, so that every rollback length occurs.
        calls.append(None)
        most = len(calls) % (drafts.shape[1] + 1)
        accepted, _ = accept(drafts, scores)
        accepted = accepted.clamp(max=most)
        return accepted, scores.argmax(-1).gather(1, accepted[:, None]).squeeze(1)

    prompt = random_prompt(length, seed=length)
    expected = decode_step_by_step(qs, prompt, 2 * GROUP)
    monkeypatch.setattr(qs, "session", Session(qs.pair, rejects_in_turn))
    tokens = generate(qs, prompt, 2 * GROUP, num_speculative_tokens=5)
    assert qs.last_stats.flushes >= 1
    assert_same_text(qs, prompt, tokens, expected)


def _without_window(model: PreTrainedModel) -> PreTrainedModel:
    return tiny_model("mistral", sliding_window=None)


def _without_sinks(model: PreTrainedModel) -> PreTrainedModel:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.self_attn.sinks.fill_(-1e4)
    return other


# Windows longer than 2G, so that what they show is partly quantized and what they hide wholly.
WINDOW = 2 * GROUP + 8


@pytest.mark.parametrize(
    ("architecture", "without"), [("mistral", _without_window), ("gpt_oss", _without_sinks)], ids=["window", "sinks"]
)
def test_9_sliding_windows_and_sinks(architecture, without):
    """transformers#47447, llama-cpp-turboquant#305: neither is dropped when the cache is quantized."""
    model = tiny_model(architecture, sliding_window=WINDOW)
    if architecture == "gpt_oss":
        with torch.no_grad():
            for layer in model.model.layers:
                # Sinks that take about half of the attention.
                layer.self_attn.sinks.fill_(4.0)
    qs = quantspec.convert(model, kv_group_size=GROUP, self_check=False)
    ids = torch.tensor([random_prompt(110, seed=0)])
    ours, expected = decoded_logits(qs, ids, 80), logits_after(model, ids, 80)
    error = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 0.02
    assert_agrees_with_argmax(ours, expected)
    dropped = logits_after(without(model), ids, 80)
    assert ((dropped - expected).norm(dim=-1) / expected.norm(dim=-1)).median() > 0.1


def test_12_penalties_hold_under_speculation(qs):
    """vllm#18902, #42744: processors see the accepted text, and change it as in Hugging Face. See test_generate.py."""
    prompt = random_prompt(8, seed=3)
    options = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2}
    tokens = generate(qs, prompt, 20, **options)
    ids = torch.tensor([prompt])
    theirs = qs.model.generate(ids, max_new_tokens=20, eos_token_id=None, do_sample=False, **options)
    assert tokens == theirs[0, 8:].tolist()
    assert tokens != generate(qs, prompt, 20)
    pairs = list(itertools.pairwise(prompt + tokens))
    assert len(pairs) == len(set(pairs))
