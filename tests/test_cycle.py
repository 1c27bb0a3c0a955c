"""Cycles as device work: CUDA graphs, chunked prefill, and what happens when logits are NaN."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import GROUP
from step_by_step import assert_same_text, pad_batch, random_prompt
from tiny_models import tiny_model
from torch._dynamo.utils import counters

import quantspec
from quantspec.engine.plan import Plan

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run it on a GPU machine")
LONG = 2 * GROUP + 8


@pytest.mark.parametrize("chunk", [1, GROUP - 1, GROUP, 3 * GROUP + 5])
def test_chunked_prefill_says_the_same(qs, monkeypatch, chunk):
    """Ragged prompts prefilled in chunks; earlier chunks are read at 8 bits, so near-ties may part."""
    prompts = [random_prompt(5 * GROUP, 1), random_prompt(GROUP + 3, 2), random_prompt(4, 3)]
    ids, mask = pad_batch(prompts, [0, 7, 0], 5 * GROUP)
    options = {"max_new_tokens": GROUP + 4, "eos_token_id": None, "do_sample": False}
    whole = qs.generate(ids, mask, **options)
    monkeypatch.setattr(type(qs.pair), "fill_chunk", lambda self, batch, tokens: chunk)
    chunked = qs.generate(ids, mask, **options)
    width = ids.shape[1]
    for row, prompt in enumerate(prompts):
        assert_same_text(qs, prompt, chunked[row, width:].tolist(), whole[row, width:].tolist(), tie=0.08)


def test_nan_logits_are_an_error_and_the_object_survives(qs, monkeypatch):
    ids = torch.tensor([random_prompt(LONG, 4)])
    expected = qs.generate(ids, max_new_tokens=12, eos_token_id=None)
    forward = type(qs.pair).forward
    calls = []

    def broken(self, role, *inputs, cache):
        calls.append(role)
        logits = forward(self, role, *inputs, cache=cache)
        return logits if len(calls) < 9 else logits * float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(type(qs.pair), "forward", broken)
        with pytest.raises(FloatingPointError, match="logits are NaN"):
            qs.generate(ids, max_new_tokens=12, eos_token_id=None)
        with pytest.raises(FloatingPointError, match="logits are NaN"):
            qs.generate(ids, max_new_tokens=1, eos_token_id=None)
    assert torch.equal(qs.generate(ids, max_new_tokens=12, eos_token_id=None), expected)


@pytest.fixture(scope="module")
def gpu_qs(request):
    """A compiled pair on a GPU, of an architecture that a test may name."""
    model = tiny_model(
        getattr(request, "param", "llama"), torch.bfloat16, hidden_size=256, num_attention_heads=4, head_dim=64
    ).cuda()
    return quantspec.convert(model, kv_group_size=GROUP, weight_group_size=32, self_check=False)


@needs_cuda
@pytest.mark.parametrize("rows", [2, 16])
def test_graph_replay_equals_eager_in_batches(gpu_qs, monkeypatch, rows):
    """Ragged prompts, and acceptance of their own for each row."""
    lengths = [1 + 7 * row for row in range(rows)]
    prompts = [random_prompt(length, length) for length in lengths]
    ids, mask = (x.cuda() for x in pad_batch(prompts, [0] * rows, lengths[-1]))
    options = {"max_new_tokens": 3 * GROUP, "eos_token_id": None, "do_sample": False}
    ours = gpu_qs.generate(ids, mask, **options)
    monkeypatch.setattr(type(gpu_qs.session.replays), "suit", lambda self: False)
    assert torch.equal(gpu_qs.generate(ids, mask, **options), ours)


@needs_cuda
def test_graph_replay_equals_eager_at_32k(monkeypatch):
    """Over three flushes of groups of 128, some of the drafts accepted."""
    shape = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "max_position_embeddings": 2**16}
    qs = quantspec.convert(tiny_model("llama", torch.bfloat16, **shape).cuda(), weight_group_size=64, self_check=False)
    ids = torch.tensor([random_prompt(2**15, 1)], device="cuda")
    options = {"max_new_tokens": 400, "eos_token_id": None, "do_sample": False}
    ours = qs.generate(ids, **options)
    assert qs.last_stats.accepted
    monkeypatch.setattr(type(qs.session.replays), "suit", lambda self: False)
    assert torch.equal(qs.generate(ids, **options), ours)


@needs_cuda
@pytest.mark.parametrize("gpu_qs", ["llama", "gemma2", "gpt_oss", "mixtral"], indirect=True)
@pytest.mark.parametrize("gamma", [0, 4])
@pytest.mark.parametrize("do_sample", [False, True])
def test_graph_replay_equals_eager(gpu_qs, monkeypatch, gamma, do_sample):
    """Token for token, over many flushes, with ragged prompts when greedy."""
    prompts = [random_prompt(5 * GROUP, 1), *([] if do_sample else [random_prompt(GROUP + 3, 2), random_prompt(4, 3)])]
    ids, mask = (x.cuda() for x in pad_batch(prompts, [0, 7, 0][: len(prompts)], 5 * GROUP))
    options = {"max_new_tokens": 5 * GROUP + 1, "eos_token_id": None, "num_speculative_tokens": gamma, "seed": 1}
    options |= {"do_sample": do_sample, "temperature": 2.0, "top_k": 0} if do_sample else {"do_sample": False}
    # At the end eager cycles draft fewer tokens, which draws other random numbers.
    compared = slice(None, -gamma - 1 if do_sample else None)
    ours = gpu_qs.generate(ids, mask, **options)[:, compared]
    assert gpu_qs.session.replays.kept()
    monkeypatch.setattr(type(gpu_qs.session.replays), "suit", lambda self: False)
    assert torch.equal(gpu_qs.generate(ids, mask, **options)[:, compared], ours)


@needs_cuda
def test_graphs_sample_reproducibly_and_are_kept(gpu_qs):
    """New temperatures and lengths reuse the graph and compile nothing; a seed gives the same text."""
    ids = torch.tensor([random_prompt(LONG, 5)], device="cuda")
    options = {"max_new_tokens": 2 * GROUP, "eos_token_id": None, "do_sample": True, "top_k": 20}
    first = gpu_qs.generate(ids, temperature=0.9, seed=3, **options)
    replays, compiled = gpu_qs.session.replays.kept(), counters["stats"]["unique_graphs"]
    again = gpu_qs.generate(ids, temperature=0.9, seed=3, **options)
    gpu_qs.generate(ids[:, : LONG - 5], temperature=0.3, seed=3, **options)
    assert torch.equal(again, first)
    assert gpu_qs.session.replays.kept() == replays
    assert counters["stats"]["unique_graphs"] == compiled
    unseeded = [gpu_qs.generate(ids, temperature=5.0, **options) for _ in range(2)]
    assert not torch.equal(*unseeded)


@needs_cuda
def test_graphs_of_inference_mode_serve_calls_outside_of_it(gpu_qs):
    ids = torch.tensor([random_prompt(LONG, 5)], device="cuda")
    options = {"max_new_tokens": 3 * GROUP, "eos_token_id": None, "do_sample": True, "top_k": 30, "seed": 3}
    gpu_qs.reset()
    with torch.inference_mode():
        inside = gpu_qs.generate(ids, temperature=0.9, **options)
    assert torch.equal(gpu_qs.generate(ids, temperature=0.9, **options), inside)


@needs_cuda
def test_graphs_take_turns(gpu_qs, monkeypatch):
    """Numbers of drafts that change within a text, each with a graph of its own, say what eager cycles say."""
    ids = torch.tensor([random_prompt(LONG, 5)], device="cuda")
    options = {"max_new_tokens": 3 * GROUP, "eos_token_id": None, "do_sample": True, "temperature": 2.0, "seed": 3}
    counts = itertools.cycle([4, 1, 4, 0, 2])
    monkeypatch.setattr("quantspec.engine.session.FixedDraftCount.choose", lambda *_: Plan(next(counts)))
    # Eager cycles draft less at the end, which draws other random numbers.
    graphed = gpu_qs.generate(ids, **options)[:, :-5]
    counts = itertools.cycle([4, 1, 4, 0, 2])
    monkeypatch.setattr(type(gpu_qs.session.replays), "suit", lambda self: False)
    assert torch.equal(gpu_qs.generate(ids, **options)[:, :-5], graphed)


@needs_cuda
def test_graphs_that_are_not_used_are_released(gpu_qs):
    ids = torch.tensor([random_prompt(LONG, 5)], device="cuda")
    # The most first: later ones then need no longer recent buffer, with which all graphs would go.
    for count, do_sample in itertools.product(range(10, 0, -1), (False, True)):
        options = {"do_sample": do_sample, "num_speculative_tokens": count}
        gpu_qs.generate(ids, max_new_tokens=count + 1, eos_token_id=None, **options)
    assert len(gpu_qs.session.replays.kept()) == 16


@pytest.mark.parametrize("turn", [3, GROUP, 4 * GROUP])
def test_conversations_prefill_only_what_is_new(qs, turn):
    """A second turn after the first one's text says what a fresh call says, near-ties of INT8 reads aside."""
    prompt = random_prompt(3 * GROUP, 6)
    options = {"max_new_tokens": GROUP + 5, "eos_token_id": None, "do_sample": False}
    first = qs.generate(torch.tensor([prompt]), **options)[0].tolist()
    second = first + random_prompt(turn, 8)
    ours = qs.generate(torch.tensor([second]), continue_cache=True, **options)[0].tolist()
    # The newest token of the first turn was emitted, but not cached.
    assert len(first) - 1 - GROUP <= qs.last_stats.continued_tokens <= len(first) - 1
    expected = qs.generate(torch.tensor([second]), **options)[0].tolist()
    assert qs.last_stats.continued_tokens == 0
    assert_same_text(qs, second, ours[len(second) :], expected[len(second) :], tie=0.08)


def test_conversations_forget_what_differs(qs):
    """An edited history is kept up to the edit, another text not at all, and an interrupted call leaves nothing."""
    prompt = random_prompt(5 * GROUP, 6)
    options = {"max_new_tokens": 4, "eos_token_id": None, "do_sample": False, "continue_cache": True}
    qs.reset()
    qs.generate(torch.tensor([[*prompt, 5]]), **options)
    assert qs.last_stats.continued_tokens == 0
    storage = qs.session.cache.layers[0].k_upper.data_ptr()
    edited = [*prompt[: 2 * GROUP + 3], prompt[2 * GROUP + 3] ^ 1, *prompt[2 * GROUP + 4 :]]
    ours = qs.generate(torch.tensor([edited]), **options)
    assert qs.last_stats.continued_tokens == 2 * GROUP
    assert qs.session.cache.layers[0].k_upper.data_ptr() == storage
    expected = qs.generate(torch.tensor([edited]), **(options | {"continue_cache": False}))
    assert_same_text(qs, edited, ours[0, len(edited) :].tolist(), expected[0, len(edited) :].tolist(), tie=0.08)
    qs.generate(torch.tensor([random_prompt(9, 1)]), **options)
    assert qs.last_stats.continued_tokens == 0
    ours = qs.generate(torch.tensor([prompt]), **options)
    with pytest.raises(ValueError, match="max_cache_len"):
        qs.generate(torch.tensor([prompt]), **(options | {"max_new_tokens": 10_000}))
    qs.generate(ours, **options)
    assert qs.last_stats.continued_tokens == ours.shape[1] - 1


def test_out_of_memory_releases_the_cache(qs, monkeypatch):
    """The error says how much was asked for, and the next call works."""
    ids = torch.tensor([random_prompt(LONG, 4)])
    expected = qs.generate(ids, max_new_tokens=4)

    def exhausted(self, *inputs, cache):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(qs.pair), "forward", exhausted)
        with pytest.raises(torch.OutOfMemoryError, match=r"1 sequence.* of up to 44 tokens.*released"):
            qs.generate(ids, max_new_tokens=4)
    assert qs.session.cache is None
    assert torch.equal(qs.generate(ids, max_new_tokens=4), expected)
