"""Drafts from a row's own text: the search against a Python reference, and texts that do not depend on the source."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import GROUP
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from step_by_step import pad_batch, random_prompt
from test_score_programs import without_graphs
from test_structured import stand_in_tokenizer
from tiny_models import tiny_model
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import quantspec
from quantspec.config import Draft
from quantspec.engine.lookup import LONGEST_MATCH, Lookup, continuations
from quantspec.engine.request import Request

__all__ = ["without_graphs"]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run it on a GPU machine")
# A text that the target loops on is one that a lookup continues.
LOOP = {"do_sample": False, "max_new_tokens": 3 * GROUP, "eos_token_id": None}


def reference(text: list[int], count: int) -> tuple[list[int], int]:
    """What :func:`continuations` proposes behind ``text``, and the length of its match, one place after the other."""
    best = (0, len(text) - 1)
    for place in range(1, len(text)):
        matched = 0
        while matched < min(place, LONGEST_MATCH) and text[place - 1 - matched] == text[-1 - matched]:
            matched += 1
        best = max(best, (matched, place))
    matched, place = best
    period = text[place:]
    return [period[step % len(period)] for step in range(count)], matched


@given(
    texts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=60), min_size=1, max_size=4),
    count=st.integers(0, 15),
    spare=st.integers(0, 9),
)
def test_search_equals_a_reference(texts, count, spare):
    """Ragged batches of few tokens, so that much matches; what lies behind a text is not read."""
    ids = torch.full((len(texts), max(map(len, texts)) + spare), 2)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    drafts, matched = continuations(ids, torch.tensor([len(text) for text in texts]), count)
    assert drafts.shape == (len(texts), count)
    for row, text in enumerate(texts):
        assert (drafts[row].tolist(), int(matched[row])) == reference(text, count)


def test_search_takes_the_longest_match_and_of_those_the_latest():
    text = [5, 6, 7, 10, 9, 6, 7, 11, 9, 6, 7, 12, 5, 6, 7]
    drafts, matched = continuations(torch.tensor([text]), torch.tensor([len(text)]), 3)
    assert (drafts.tolist(), matched.tolist()) == ([[10, 9, 6]], [3])
    drafts, matched = continuations(torch.tensor([[*text[1:-3], 6, 7]]), torch.tensor([len(text) - 2]), 3)
    assert (drafts.tolist(), matched.tolist()) == ([[12, 6, 7]], [2])


def test_search_continues_a_loop_as_a_loop():
    drafts, matched = continuations(torch.tensor([[1, 2, 3, 2, 3]]), torch.tensor([5]), 5)
    assert (drafts.tolist(), matched.tolist()) == ([[2, 3, 2, 3, 2]], [2])


@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=3),
    cycles=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.booleans()), max_size=8),
)
def test_texts_move_on_with_what_is_accepted(prompts, cycles):
    """Rejected drafts are forgotten, and rows that are done stay as they are."""
    lookup = Lookup(len(prompts), 64, 5, torch.device("cpu"), compiles=False)
    lookup.begin([Request(torch.tensor(prompt), 99, tokens=[1]) for prompt in prompts])
    texts = [[*prompt, 1] for prompt in prompts]
    for accepted, token, runs in cycles:
        drafts = lookup.drafts[:, :4].clone()
        lookup.text.write(0, drafts)
        running = torch.tensor([True] * (len(prompts) - 1) + [runs])
        counts, tokens = torch.full((len(prompts),), accepted), torch.full((len(prompts),), token)
        lookup.keep(counts, tokens, running)
        for row, text in enumerate(texts):
            text += [*drafts[row, :accepted].tolist(), token] if running[row] else []
            assert (lookup.drafts[row].tolist(), int(lookup.matched[row])) == reference(text, 5)


class Stateful(LogitsProcessor):
    """Forbids every third of the tokens that it chooses from, counting its calls: it runs on the host."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores = scores.clone()
        scores[:, self.calls % 3 :: 3] = float("-inf")
        return scores


CHOICES = (("self", 0), ("self", 3), ("lookup", 3), ("lookup", 15), ("both", 4), ("both", "auto"))
OPTIONS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.7, "seed": 3},
    "in the program": {"do_sample": True, "seed": 3, "repetition_penalty": 1.2, "no_repeat_ngram_size": 4, "top_k": 30},
    "on the host": {"do_sample": True, "seed": 3, "logits_processor": Stateful},
    "rows": {"row_options": [{}, {"do_sample": True, "top_k": 5}, {"max_new_tokens": 9}], "seed": [1, 2, 3]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_texts_are_the_same_whatever_is_drafted(qs, name):
    """Ragged rows, one of which ends by EOS; without drafts, and with each source of them."""
    # Shorter than 2G with their output, so that no group is flushed sooner or later.
    prompts = [random_prompt(4, 1) * 2, random_prompt(3, 2), random_prompt(2, 3) * 4]
    ids, mask = pad_batch(prompts, [0, 2, 0], 8)
    options = {"eos_token_id": [5, 9, 11], "max_new_tokens": 2 * GROUP - 9, **OPTIONS[name]}
    texts, looked_up = [], 0
    for draft, gamma in CHOICES:
        if "logits_processor" in options:
            options["logits_processor"] = LogitsProcessorList([Stateful()])
        texts.append(qs.generate(ids, mask, num_speculative_tokens=gamma, draft=draft, **options))
        looked_up += qs.last_stats.drafted_by_source["lookup"]
        assert draft != "self" or not qs.last_stats.drafted_by_source["lookup"]
        assert draft != "lookup" or not qs.last_stats.drafted_by_source["self"]
    assert looked_up
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_grammars_too(qs):
    """What a grammar leaves is looked up and judged with it."""
    letters = stand_in_tokenizer()
    ids = {name: getattr(letters, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    pair = quantspec.convert(tiny_model("llama", vocab_size=len(letters), **ids), self_check=False)
    inputs = letters(["abc abc ab", "fed fed fed"], return_tensors="pt", padding=True)
    options = {"regex": "([a-f]{3} ){9}", "tokenizer": letters, "max_new_tokens": 40, "seed": 3, "do_sample": True}
    texts = []
    for draft, gamma in CHOICES:
        texts.append(pair.generate(**inputs, num_speculative_tokens=gamma, draft=draft, **options))
        assert draft != "lookup" or pair.last_stats.drafted_by_source["lookup"]
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_a_loop_is_read_from_the_text(qs):
    """Where the target repeats itself whole chains are accepted, over flushes of the cache too."""
    prompt = [*random_prompt(2 * GROUP + 8, 5), 7]
    bias = {(7, 8): 100.0, (8, 9): 100.0, (9, 7): 100.0}
    for draft in ("lookup", "both"):
        ours = qs.generate(torch.tensor([prompt]), num_speculative_tokens=15, draft=draft, sequence_bias=bias, **LOOP)
        stats = qs.last_stats
        assert ours[0, len(prompt) :].tolist() == [8, 9, 7] * GROUP
        assert stats.accepted_by_source["lookup"] > GROUP
        assert stats.mean_acceptance_length > 5
    assert f"{stats.accepted_by_source['lookup']} of {stats.drafted_by_source['lookup']}" in str(stats)


LOOPING = {"sequence_bias": {(7, 8): 100.0, (8, 9): 100.0, (9, 7): 100.0}, "eos_token_id": [5]}


def check_replays(pair: quantspec.QuantSpecModel, name: str, made: list | None) -> None:
    """Plans take turns on one text, and what is captured serves the next one."""
    prompts = [random_prompt(4, 1) * 3 + [7], random_prompt(3, 2), random_prompt(2, 3) * 4]
    texts = {}
    for shift in (0, 3):
        ids, mask = (t.to(pair.device) for t in pad_batch([[i - shift for i in p] for p in prompts], [0, 2, 0], 13))
        options = {"max_new_tokens": 2 * GROUP - 14, **LOOPING, **OPTIONS[name]}
        for draft, gamma in (("self", 0), ("both", 4), ("lookup", 15), ("both", "auto")):
            if "logits_processor" in options:
                options["logits_processor"] = LogitsProcessorList([Stateful()])
            text = pair.generate(ids.clamp(min=3), mask, num_speculative_tokens=gamma, draft=draft, **options)
            assert torch.equal(texts.setdefault(shift, text), text)
            if draft == "lookup":
                # Rows that advance together may find that it does not pay.
                assert pair.last_stats.drafted_by_source["lookup"] or "logits_processor" in options
                kept = len(pair.session.replays.kept())
                pair.generate(ids.clamp(min=3), mask, num_speculative_tokens=gamma, draft=draft, **options)
                assert len(pair.session.replays.kept()) == kept
    assert made is None or made


@pytest.mark.parametrize("name", OPTIONS)
def test_replays_of_lookups_say_the_same(qs, without_graphs, name):
    qs.reset()
    check_replays(qs, name, without_graphs)
    qs.reset()


@needs_cuda
@pytest.mark.parametrize("name", OPTIONS)
def test_captured_lookups_say_the_same(name):
    model = tiny_model("llama", torch.float32, hidden_size=256, num_attention_heads=4, head_dim=64).cuda()
    check_replays(quantspec.convert(model, kv_group_size=GROUP, weight_group_size=32, self_check=False), name, None)


def test_streamers_see_every_token_once(qs):
    class Kept(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    streamer = Kept()
    prompt = torch.tensor([random_prompt(6, 1) * 2])
    output = qs.generate(prompt, streamer=streamer, num_speculative_tokens=15, draft="lookup", **LOOP)
    assert streamer.tokens == output[0].tolist()


@pytest.mark.parametrize("draft", ["lookup", "both"])
def test_sampling_follows_the_targets_distribution(qs, draft):
    """Chi-square of the second and third token against no drafts, over seeds; also with a lookup that is wrong."""
    prompt, rows = random_prompt(3, 1) * 3, 500
    options = {"max_new_tokens": 3, "eos_token_id": None, "do_sample": True, "temperature": 0.5, "top_k": 4}
    batch = torch.tensor([prompt] * rows)
    plain = qs.generate(batch, num_speculative_tokens=0, seed=10_000, **options)[:, -2:]
    ours = qs.generate(batch, num_speculative_tokens=3, draft=draft, seed=20_000, **options)[:, -2:]
    qs.reset()
    for place in range(2):
        counts = [torch.bincount(text[:, place], minlength=96).double() for text in (plain, ours)]
        common = (counts[0] + counts[1]) >= 20
        expected = counts[0][common] / counts[0][common].sum() * counts[1][common].sum()
        assert chisquare(counts[1][common], expected).pvalue > 1e-4


def test_the_pairs_choice_is_saved_and_a_call_overrides_it(qs, tmp_path):
    pair = quantspec.convert(qs.model, kv_group_size=GROUP, self_check=False, draft="lookup")
    pair.save_pretrained(tmp_path / "pair")
    loaded = quantspec.from_pretrained(tmp_path / "pair")
    assert loaded.config.draft is Draft.LOOKUP
    assert json.loads((tmp_path / "pair" / "quantspec_config.json").read_text())["options"]["draft"] == "lookup"
    ids = torch.tensor([random_prompt(6, 1) * 2])
    loaded.generate(ids, **LOOP)
    drafted = loaded.last_stats.drafted_by_source
    assert (drafted["lookup"] > 0, drafted["self"]) == (True, 0)
    loaded.generate(ids, draft="self", **LOOP)
    drafted = loaded.last_stats.drafted_by_source
    assert (drafted["lookup"], drafted["self"] > 0) == (0, True)


def test_an_unknown_source_is_refused(qs):
    message = "draft must be one of 'self', 'lookup', 'both', not 'ngram'"
    with pytest.raises(ValueError, match=message):
        quantspec.convert(qs.model, draft="ngram")
    with pytest.raises(ValueError, match=message):
        qs.generate(torch.tensor([[5, 6]]), draft="ngram")
    with pytest.raises(ValueError, match=message):
        qs.model.generate(torch.tensor([[5, 6]]), custom_generate=qs.decode, draft="ngram")
