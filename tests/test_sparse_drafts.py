"""Pairs whose draft reads chosen pages: the cache's choice through any history, the text, options, saving."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from conftest import GROUP
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from step_by_step import assert_is_targets_choice, assert_same_text, pad_batch, random_prompt
from test_cache import LAYERS, G, Source
from test_rings import SHARING
from test_sparse_attention import reference_choice
from tiny_models import tiny_model
from torch import Tensor

import quantspec
from quantspec import QuantSpecConfig
from quantspec.cache import HierarchicalCache, PageBudget, page_choice
from quantspec.checkpoint.folder import Description
from quantspec.kernels import (
    decoded_attention,
    prefill_attention,
    scored_attention,
    scored_decoded_attention,
    sparse_attention,
)
from quantspec.kernels.attention import softmax_with_sinks
from quantspec.kernels.cache_layout import DECODED_PARTS, part_names
from quantspec.kernels.choose_pages import SHARE_UNIT
from quantspec.kernels.hierarchical import dense_key_value
from quantspec.kernels.pages import PAGE_TOKENS, page_of_token, score_pages
from quantspec.pair import Recipe, register
from quantspec.passes import INT4, CacheAccess, Role

MAX_LEN = 26 * G
BUDGET = PageBudget(SHARE_UNIT // 3, 1)
SPARSE_PARTS = (*part_names("recent", "upper", "scales"), "chosen_pages", "num_chosen")


class PagesMachine(RuleBasedStateMachine):
    """Prefills, drafts, verifications, rewinds and growth in any order, beside a plain record of what was chosen.

    The record has for each layer, row and KV head the chosen pages and the number of pages that were judged; nothing
    for everything.
    """

    @initialize(batch=st.integers(1, 2), gamma=st.integers(1, 4), seed=st.integers(0, 2**16))
    def start(self, batch, gamma, seed):
        self.gamma, self.source = gamma, Source(seed)
        device = torch.device("cpu")
        self.cache = HierarchicalCache(LAYERS, batch, G, gamma, MAX_LEN, torch.float32, device, BUDGET)
        self.forget()

    def forget(self) -> None:
        none: tuple[list[int], list[int]] = ([], [0, 0])
        self.chosen = [[[none] * layer.kv_heads for _ in range(self.cache.batch_size)] for layer in LAYERS]

    def room(self) -> int:
        return MAX_LEN - int(self.cache.length.max())

    def state(self) -> tuple[Tensor, Tensor]:
        return self.cache.quantized_len, self.cache.length

    def reserve_for(self, tokens: int) -> None:
        before = self.cache.layers[0].page_scores.shape
        self.cache.reserve(tokens)
        if self.cache.layers[0].page_scores.shape != before:
            self.forget()

    @precondition(lambda self: self.room() > 0)
    @rule(data=st.data())
    def prefill(self, data):
        counts = [data.draw(st.integers(1, min(self.room(), 12 * G))) for _ in range(self.cache.batch_size)]
        note(f"prefill {counts}")
        new = torch.tensor(counts)
        self.reserve_for(int((self.cache.length + new).max()))
        for index, layer in enumerate(LAYERS):
            tokens = self.source.tokens(layer, self.cache.batch_size, max(counts))
            options = (layer.key_dim**-0.5, 0, 0.0, None)
            prefill_attention(*tokens, *self.cache.layers[index].parts(), *self.state(), new, *options)
        self.cache.advance_prefill(new)

    @precondition(lambda self: int(self.cache.length.min()) > 0 and self.room() > self.gamma)
    @rule(data=st.data())
    def cycle(self, data):
        self.draft()
        batch, tokens = self.cache.batch_size, self.gamma + 1
        for index, layer in enumerate(LAYERS):
            new = self.source.tokens(layer, batch, tokens)
            held, options = self.cache.layers[index], (layer.key_dim**-0.5, 0, 0.0, None)
            scored_attention(*new, *held.parts(), held.page_scores, *self.state(), *options)
            for row, (quantized, length) in enumerate(zip(*(x.tolist() for x in self.state()), strict=True)):
                keys, _ = self.dense(index, row, tokens, True)
                expected = score_pages(new[0][row], keys, held.v_scale[row], quantized, length, *options)
                whole = quantized // PAGE_TOKENS
                torch.testing.assert_close(held.page_scores[row, :, :whole], expected[:, :whole])
                for head in range(layer.kv_heads):
                    self.chosen[index][row][head] = reference_choice(held.page_scores[row, head], whole, *BUDGET)
        self.cache.choose_pages()
        self.check_choice()
        accepted = [data.draw(st.integers(0, tokens)) for _ in range(batch)]
        note(f"accept {accepted} at {self.cache.length.tolist()}")
        self.cache.accept(torch.tensor(accepted))
        self.draft()

    @precondition(lambda self: int(self.cache.length.min()) > 0)
    @rule(data=st.data())
    def rewind(self, data):
        kept = [data.draw(st.integers(1, length)) for length in self.cache.length.tolist()]
        note(f"rewind to {kept}")
        self.cache.rewind(torch.tensor(kept))
        self.forget()

    @rule()
    def reset(self):
        self.cache.reset()
        self.forget()

    @rule(tokens=st.integers(1, MAX_LEN))
    def reserve(self, tokens):
        self.reserve_for(tokens)

    def check_choice(self) -> None:
        for index, layer in enumerate(self.cache.layers):
            for row, heads in enumerate(self.chosen[index]):
                for head, (pages, counts) in enumerate(heads):
                    assert layer.num_chosen[row, head].tolist() == counts
                    assert layer.chosen_pages[row, head, : counts[0]].tolist() == pages

    def dense(self, index: int, row: int, tokens: int, lower: bool) -> tuple[Tensor, Tensor]:
        layer, kinds = self.cache.layers[index], () if lower else part_names("lower")
        names = [name for name in part_names() if name not in part_names("recent")]
        planes = [None if name in kinds else getattr(layer, name)[row] for name in names]
        recent = (layer.k_recent[row], layer.v_recent[row])
        lengths = int(self.cache.quantized_len[row]), int(self.cache.length[row]) + tokens
        return dense_key_value(*lengths, torch.float32, *planes, *recent)

    def draft(self) -> None:
        """One step sees the recorded pages, the first one among them, all pages since then, and the recent buffer."""
        for index, layer in enumerate(LAYERS):
            query, key, value = self.source.tokens(layer, self.cache.batch_size, 1)
            held = self.cache.layers[index]
            parts = [getattr(held, name) for name in SPARSE_PARTS]
            out = sparse_attention(query, key, value, *parts, *self.state(), 0.5, 0, 0.0, None)
            for row, quantized in enumerate(self.cache.quantized_len.tolist()):
                keys, values = self.dense(index, row, 1, False)
                page, repeat = page_of_token(quantized, G, query.device), layer.query_heads // layer.kv_heads
                for head, (pages, (_, judged)) in enumerate(self.chosen[index][row]):
                    assert not judged or pages[0] == 0
                    seen = torch.isin(page, torch.tensor(pages)) | (page >= judged)
                    seen = torch.cat((seen, seen.new_ones(keys.shape[1] - quantized)))
                    heads = slice(head * repeat, (head + 1) * repeat)
                    scores = 0.5 * query[row, heads] @ keys[head, seen].T
                    expected = softmax_with_sinks(scores, None) @ values[head, seen]
                    torch.testing.assert_close(out[row, 0, heads], expected[:, 0], rtol=1e-4, atol=1e-4)


test_pages_through_any_history = PagesMachine.TestCase


@pytest.fixture
def short_pages(monkeypatch):
    """A page in any case, so that the tiny models' contexts are long enough to choose from."""
    least = dict.fromkeys(page_choice._LEAST_TOKENS, PAGE_TOKENS)
    monkeypatch.setattr(page_choice, "_LEAST_TOKENS", least)


def sparse_pair(architecture: str, draft_attention: str = "sparse", **overrides: Any) -> quantspec.QuantSpecModel:
    options = {"kv_group_size": GROUP, "self_check": False, "draft_attention_share": 0.25}
    return quantspec.convert(tiny_model(architecture, **overrides), draft_attention=draft_attention, **options)


# Grouped queries; windows and soft caps; sinks.
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_the_text_is_the_target_s(architecture: str, short_pages) -> None:
    """Ragged rows, one of them too short to choose from, and a conversation that goes on with the cache."""
    qs = sparse_pair(architecture)
    prompts = [random_prompt(6 * PAGE_TOKENS, 1), random_prompt(30, 2)]
    ids, mask = pad_batch(prompts, [0, 0], 6 * PAGE_TOKENS)
    options = {"max_new_tokens": GROUP + 8, "eos_token_id": None, "do_sample": False}
    alone = qs.generate(ids, mask, num_speculative_tokens=0, **options)
    text = qs.generate(ids, mask, **options)
    for prompt, drafted, plain in zip(prompts, text, alone, strict=True):
        assert_same_text(qs, prompt, *(row[ids.shape[1] :].tolist() for row in (drafted, plain)), tie=0.08)
    for captured, layer in zip(qs.layers, qs.session.cache.layers, strict=True):
        counts, pages = layer.num_chosen[0].unbind(1)
        assert (pages >= 5).all()
        # A window hides pages from its layer, which are not chosen.
        assert (counts < 2).all() if captured.window else (counts == 2).all()
        assert not layer.num_chosen[1].any()
    longer = [*text[0].tolist(), *random_prompt(9, 3)]
    again = qs.generate(torch.tensor([longer]), continue_cache=True, **options)
    assert_is_targets_choice(qs, longer, again[0, len(longer) :].tolist(), tie=0.08)


def test_pages_of_a_cache_that_layers_share_are_scored_by_all_of_them(short_pages, monkeypatch) -> None:
    """The scores that a choice reads are the highest that one of the readers gave, in every verification."""
    # The package has the op under the name of its file.
    of_op = sys.modules["quantspec.kernels.scored_attention"]
    store = of_op._store_scores
    told: dict[int, list[tuple[bool, Tensor, Tensor]]] = {}

    def storing(scores: Tensor, *of_layer: Any) -> None:
        alone = torch.full_like(scores, float("-inf"))
        store(alone, *of_layer[:-1], False)
        store(scores, *of_layer)
        told.setdefault(scores.data_ptr(), []).append((of_layer[-1], alone, scores.clone()))

    monkeypatch.setattr(of_op, "_store_scores", storing)
    qs = sparse_pair("gemma3n_text", **SHARING)
    assert [layer.reads for layer in qs.layers] == [None, None, 0, 1]
    ids = torch.tensor([random_prompt(4 * PAGE_TOKENS, 6)])
    qs.generate(ids, max_new_tokens=20, eos_token_id=None, do_sample=False)
    assert len(told) == 2
    for calls in told.values():
        assert [joins for joins, *_ in calls] == [False, True] * (len(calls) // 2)
        for (_, first, _), (_, second, kept) in zip(calls[::2], calls[1::2], strict=True):
            pages = 3
            assert torch.equal(kept[:, :pages], first.maximum(second)[:, :pages])
    # Of the layer without a window each reader has the highest score of some page.
    of_full = list(told.values())[1]
    assert any((a > b).any() for (_, a, _), (_, b, _) in zip(of_full[::2], of_full[1::2], strict=True))
    assert any((a < b).any() for (_, a, _), (_, b, _) in zip(of_full[::2], of_full[1::2], strict=True))


@pytest.mark.parametrize("draft_attention", ["sparse", "auto"])
def test_short_contexts_are_read_as_ever(draft_attention: str) -> None:
    """Where no text of the cache's size is long enough, the same drafts are proposed and nothing is kept of pages.

    A sparse draft reads planes on a CPU too, so it is compared with one that does.
    """
    options = {"kv_group_size": GROUP, "self_check": False}
    full = quantspec.convert(tiny_model("llama"), draft_recipe="int4-cache", **options)
    pair = sparse_pair("llama", draft_attention)
    ids = torch.tensor([random_prompt(100, 4)])
    options = {"max_new_tokens": 24, "eos_token_id": None, "do_sample": False}
    assert torch.equal(pair.generate(ids, **options), full.generate(ids, **options))
    assert pair.last_stats.accepted_per_cycle == full.last_stats.accepted_per_cycle
    assert pair.session.cache.layers[0].page_scores.numel() == 0
    assert pair.session.cache.layers[0].chosen_pages.numel() == 0


def test_auto_reads_4096_tokens_in_any_case() -> None:
    sparse, auto = (PageBudget.of(QuantSpecConfig(draft_attention=name)) for name in ("sparse", "auto"))
    assert auto.sizes(4096 // 128, 128) == (0, 0)
    assert auto.sizes(8192 // 128, 128) == (128, 64)
    assert auto.sizes(131072 // 128, 128) == sparse.sizes(131072 // 128, 128) == (2048, 144)
    assert sparse.sizes(4096 // 128, 128) == (64, 8)
    assert PageBudget.of(QuantSpecConfig()) is None


def test_a_cpu_s_verification_is_unchanged_and_scores_as_the_planes_do() -> None:
    """The decoded copy has the same tokens, so both ways score alike."""
    cache = HierarchicalCache(LAYERS, 2, G, 3, MAX_LEN, torch.float32, torch.device("cpu"), BUDGET)
    cache.reserve(MAX_LEN)
    source, counts = Source(7), torch.tensor([20 * G, 9])
    for index, layer in enumerate(LAYERS):
        tokens, parts = source.tokens(layer, 2, 20 * G), cache.layers[index].parts()
        prefill_attention(*tokens, *parts, *(cache.quantized_len, cache.length), counts, 0.5, 0, 0.0, None)
    cache.advance_prefill(counts)
    state, options = (cache.quantized_len, cache.length), (0.4, 0, 3.0, None)
    for index, layer in enumerate(LAYERS):
        new, held = source.tokens(layer, 2, 4), cache.layers[index]
        copies = [getattr(held, name) for name in (*part_names("recent"), *(part.name for part in DECODED_PARTS))]
        plain = decoded_attention(*new, *copies, *state, *options)
        arguments = (*new, *copies, held.v_scale, held.page_scores, *state, *options)
        assert torch.equal(scored_decoded_attention(*arguments), plain)
        scores = held.page_scores.clone()
        scored_attention(*new, *held.parts(), held.page_scores, *state, *options)
        torch.testing.assert_close(scores[0], held.page_scores[0])
        torch.library.opcheck(scored_decoded_attention.overload, arguments)


def test_the_cache_tells_the_bytes_of_pages(short_pages) -> None:
    qs = sparse_pair("llama")
    qs.generate(torch.tensor([random_prompt(300, 5)]), max_new_tokens=4, eos_token_id=None)
    tensors = [
        getattr(layer, name) for layer in qs.session.cache.layers for name in ("page_scores", *SPARSE_PARTS[-2:])
    ]
    assert qs.last_stats.cache_bytes["pages"] == sum(tensor.nbytes for tensor in tensors) > 0


def test_the_options_are_saved(tmp_path) -> None:
    sparse_pair("llama", "auto").save_pretrained(tmp_path)
    loaded = quantspec.from_pretrained(tmp_path, self_check=False)
    assert (loaded.config.draft_attention, loaded.config.draft_attention_share) == ("auto", 0.25)
    assert (
        quantspec.from_pretrained(tmp_path, self_check=False, draft_attention="full").config.draft_attention == "full"
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"draft_attention": "some"},
            ValueError,
            "draft_attention must be one of 'full', 'sparse', 'auto', not 'some'",
        ),
        ({"draft_attention": None}, ValueError, "draft_attention must be one of"),
        ({"draft_attention_share": "much"}, TypeError, "draft_attention_share must be a number, not 'much'"),
        ({"draft_attention_share": 0}, ValueError, "draft_attention_share must be above 0 and at most 1, not 0"),
        ({"draft_attention_share": 1.5}, ValueError, "draft_attention_share must be above 0 and at most 1, not 1.5"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QuantSpecConfig(**options)


def test_a_draft_with_an_op_of_its_own_is_not_sparse() -> None:
    register(Recipe("by an op", Role.DRAFT, CacheAccess(torch.ops.quantspec.flush.default, part_names("recent")), INT4))
    with pytest.raises(ValueError, match="draft_recipe 'by an op' reads it in a way of its own"):
        quantspec.convert(tiny_model("llama"), draft_recipe="by an op", draft_attention="sparse")


def test_statistics_tell_the_pages_that_drafts_read(short_pages) -> None:
    """Of a long row a share, of a short one all; nothing where drafts read everything."""
    long, short = random_prompt(6 * PAGE_TOKENS, 1), random_prompt(3 * GROUP, 2)
    options = {"max_new_tokens": 4, "eos_token_id": None, "do_sample": False}
    pair = sparse_pair("llama")
    counts = []
    for prompt in (long, short):
        pair.generate(torch.tensor([prompt]), **options)
        counts.append(pair.last_stats.pages_read)
    (read, pages), of_short = counts
    heads = sum(layer.kv_heads for layer in pair.layers)
    # The buffer holds G tokens and more, and the planes the rest.
    assert 5 * heads <= pages <= 6 * heads
    assert 0 < read < pages
    assert of_short[0] == of_short[1] > 0
    ids, mask = pad_batch([long, short], [0, 0], 6 * PAGE_TOKENS)
    pair.generate(ids, mask, **options)
    assert pair.last_stats.pages_read == (read + of_short[0], pages + of_short[1])
    assert f"{read + of_short[0]} of {pages + of_short[1]}" in str(pair.last_stats)
    full = sparse_pair("llama", "full")
    full.generate(torch.tensor([long]), **options)
    assert full.last_stats.pages_read is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run it on a GPU machine")
def test_replays_choose_as_launches_one_by_one_do(short_pages, monkeypatch) -> None:
    # In bfloat16 a replay's drafts may part from those of single launches where two are nearly tied.
    model = tiny_model("llama", torch.float32, hidden_size=256, num_attention_heads=4, head_dim=64).cuda()
    options = {"kv_group_size": GROUP, "weight_group_size": 32, "self_check": False, "draft_attention_share": 0.25}
    qs = quantspec.convert(model, draft_attention="sparse", **options)
    prompts = [random_prompt(6 * PAGE_TOKENS, 1), random_prompt(30, 2)]
    ids, mask = (x.cuda() for x in pad_batch(prompts, [0, 0], 6 * PAGE_TOKENS))
    options = {"max_new_tokens": 3 * GROUP, "eos_token_id": None, "do_sample": False}
    ours, accepted = qs.generate(ids, mask, **options), qs.last_stats.accepted_per_cycle
    monkeypatch.setattr(type(qs.session.replays), "suit", lambda self: False)
    assert torch.equal(qs.generate(ids, mask, **options), ours)
    assert qs.last_stats.accepted_per_cycle == accepted
    assert qs.session.cache.layers[0].num_chosen[0, 0, 0] == 2


def test_the_command_line_takes_both_options(run, saved_model, tmp_path) -> None:
    options = ("--draft-attention", "auto", "--draft-attention-share", "0.2", "--no-self-check")
    status, _, err = run("convert", saved_model, tmp_path / "pair", *options)
    assert status == 0, err
    saved = Description.read(tmp_path / "pair").options
    assert (saved.draft_attention, saved.draft_attention_share) == ("auto", 0.2)
    status, _, err = run("convert", saved_model, tmp_path / "other", "--draft-attention", "some")
    assert status == 2
    assert "'full', 'sparse', 'auto'" in err
