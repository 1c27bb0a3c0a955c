"""Pages of a serving engine: who holds which, what they hold, and what becomes of texts when there are too few."""

from __future__ import annotations

import contextlib
import dataclasses
import random

import pytest
import torch
from conftest import GROUP
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from repeats import repeat
from step_by_step import random_prompt
from test_score_programs import without_graphs
from test_serving_engine import OPTIONS, Host, alone, run, text
from tiny_models import tiny_model

import quantspec
from quantspec.engine.request import Request as InnerRequest
from quantspec.kernels.cache_layout import part_names
from quantspec.passes import CacheAccess
from quantspec.serving import Engine, FinishReason, Request
from quantspec.serving.chunks import Chunks
from quantspec.serving.pool import Pool, page_keys
from quantspec.serving.row import Row

__all__ = ["without_graphs"]

CHUNK, PAGE, PAGES = 4, 2, 5
# Few texts, so that many begin alike.
TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=12)
SALTS = st.sampled_from(["", "another"])


class Text:
    """A text of the model: its pages in the order of its tokens."""

    def __init__(self, tokens: list[int], salt: str) -> None:
        self.tokens, self.salt = tokens, salt
        self.keys = page_keys(tokens, Chunks(CHUNK, CHUNK), PAGE, salt)
        self.pages: list[int] = []
        self.written = 0

    def content(self, page: int) -> tuple:
        return (self.salt, *self.tokens[: (page + 1) * PAGE])


class Pages(RuleBasedStateMachine):
    """Texts that begin, are cached page by page, grow, and leave; ``holds`` is what a kernel would find in a page."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(PAGES)
        self.texts: list[Text] = []
        self.holds: dict[int, tuple] = {}
        self.published: dict[bytes, int] = {}

    @rule(tokens=TEXTS, salt=SALTS)
    def begin(self, tokens, salt):
        new = Text(tokens, salt)
        shared = self.pool.find(new.keys)
        expected = 0
        while expected < len(new.keys) and new.keys[expected] in self.published:
            expected += 1
        assert len(shared) == expected, "a page that was there was not found"
        for index, page in enumerate(shared):
            assert self.holds[page] == new.content(index), "a page with another text was found"
        more = max(0, len(tokens) // PAGE - 1) - len(shared)
        held = {page for each in self.texts for page in each.pages}
        free = PAGES - len(held | set(shared))
        assert self.pool.has_room(shared, more) == (free >= more)
        if free < more:
            return
        self.pool.share(shared)
        new.pages, new.written = list(shared), len(shared)
        self._take(new, more)
        self.texts.append(new)

    def _take(self, own: Text, count: int) -> None:
        held = {page for other in self.texts for page in other.pages} | set(own.pages)
        pages = self.pool.take(count)
        assert not held.intersection(pages), "a page that somebody holds was taken"
        own.pages += pages
        for page in pages:
            self.holds.pop(page, None)
        self.published = {key: page for key, page in self.published.items() if page not in pages}

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def cache_a_page(self, data):
        own = data.draw(st.sampled_from(self.texts))
        if own.written == len(own.pages):
            return
        index = own.written
        page = own.pages[index]
        self.holds[page] = own.content(index)
        own.written += 1
        if index < len(own.keys):
            self.pool.publish(page, own.keys[index])
            self.published.setdefault(own.keys[index], page)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data, token):
        own = data.draw(st.sampled_from(self.texts))
        own.tokens.append(token)
        if len(own.tokens) >= (len(own.pages) + 2) * PAGE and self.pool.num_free:
            self._take(own, 1)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def leave(self, data):
        own = self.texts.pop(data.draw(st.integers(0, len(self.texts) - 1)))
        self.pool.release(own.pages)

    @invariant()
    def everything_is_where_the_tables_say(self):
        for own in self.texts:
            for index, page in enumerate(own.pages[: own.written]):
                assert self.holds[page] == own.content(index), "a page that somebody holds was written"
        held = {page for each in self.texts for page in each.pages}
        assert self.pool.num_free == PAGES - len(held), "a page is lost"

    def teardown(self):
        for own in self.texts:
            self.pool.release(own.pages)
        assert self.pool.num_free == PAGES, "a page is lost"


def run_machine(examples: int = 40) -> None:
    phases = [Phase.generate]
    run_state_machine_as_test(
        Pages, settings=settings(max_examples=examples, stateful_step_count=30, database=None, phases=phases)
    )


def test_the_pool_against_a_model():
    run_machine()


@pytest.mark.parametrize(
    "fault", ["key of half a page", "key without salt", "key kept by a page that is taken", "shared page left free"]
)
def test_the_model_finds_planted_faults(monkeypatch, fault):
    keys_of, take, share = page_keys, Pool.take, Pool.share
    if fault == "key kept by a page that is taken":

        def forgetful(self, count):
            keys, found = list(self._keys), dict(self._found)
            pages = take(self, count)
            self._keys, self._found = keys, found
            return pages

        monkeypatch.setattr(Pool, "take", forgetful)
    elif fault == "shared page left free":

        def careless(self, pages):
            free = dict(self._free)
            share(self, pages)
            self._free.update(free)

        monkeypatch.setattr(Pool, "share", careless)
    else:

        def faulty(tokens, chunk, group, salt=""):
            if fault == "key without salt":
                return keys_of(tokens, chunk, group)
            return keys_of([token if index % group else 0 for index, token in enumerate(tokens)], chunk, group, salt)

        monkeypatch.setattr("test_serving_pages.page_keys", faulty)
    with pytest.raises((AssertionError, KeyError)):
        # The rarest fault needs about a hundred examples, at times several hundreds.
        run_machine(5000)


def test_keys_leave_a_group_and_depend_on_everything_before():
    tokens, fours = list(range(10)), Chunks(4, 4)
    assert [len(page_keys(tokens[:count], fours, 2)) for count in (1, 5, 6, 9, 10)] == [0, 0, 2, 2, 4]
    first, second, third, _ = page_keys(tokens, fours, 2)
    assert page_keys([*tokens[:5], 9, *tokens[6:]], fours, 2)[:3] == [
        first,
        second,
        page_keys([*tokens[:5], 9, *tokens], fours, 2)[2],
    ]
    assert page_keys([9, *tokens[1:]], fours, 2)[2] != third
    assert not set(page_keys(tokens, fours, 2, "another")) & {first, second, third}


def test_chunks_double_up_to_the_longest():
    chunks, ends = Chunks(4, 12), [0]
    while ends[-1] < 50:
        ends.append(chunks.end(ends[-1]))
    assert ends == [0, 4, 8, 16, 28, 40, 52]
    assert [chunks.last_end(count) for count in (0, 3, 4, 15, 16, 27, 28, 51)] == [0, 0, 4, 8, 16, 16, 28, 40]
    assert len(page_keys(list(range(30)), chunks, 2)) == 14


def test_chunks_that_grow_are_shared_as_wholes(qs, monkeypatch):
    """Prompts that begin alike, of which later ones find whole chunks, say what each says in an empty engine."""
    monkeypatch.setattr("quantspec.serving.sizes._CHUNK", GROUP)
    beginning = random_prompt(7 * GROUP, 3)
    prompts = [[*beginning, *random_prompt(count, count)] for count in (2 * GROUP, 5 * GROUP, 7)]
    options = {"max_sequences": 2, "max_length": 16 * GROUP, "max_num_batched_tokens": 4 * GROUP}

    def run(engine, prompt):
        (outputs,) = engine.generate([Request(prompt, 30, (), {"do_sample": False})])
        return [token for output in outputs for token in output.token_ids], outputs[-1].cached_tokens

    with contextlib.closing(Engine(qs, **options)) as engine:
        found = [run(engine, prompt) for prompt in prompts]
    alone = []
    for prompt in prompts:
        with contextlib.closing(Engine(qs, **options)) as engine:
            alone.append(run(engine, prompt))
    assert [text for text, _ in found] == [text for text, _ in alone]
    # Chunks end at 1, 2, 4 and 8 groups.
    assert [cached for _, cached in found] == [0, 4 * GROUP, 4 * GROUP]


def test_the_end_of_the_text_that_left_first_is_taken_first():
    pool = Pool(5)
    first, second = pool.take(2), pool.take(2)
    for page, key in zip((*first, *second), (b"a", b"b", b"c", b"d"), strict=True):
        pool.publish(page, key)
    pool.release(first)
    pool.release(second)
    # One was never used.
    order = [pool.take(1)[0] for _ in range(5)]
    assert order[1:] == [*reversed(first), *reversed(second)]
    assert pool.find([b"a"]) == []


# --- Too few pages ---------------------------------------------------------------------------------------------------


def steps(engine: Engine, left: list[Request], rng: random.Random, cancels: float = 0.0):
    """Requests that come at random; the outputs of each, by the request's number."""
    ids, outputs = {}, {}
    while left or any(not own or own[-1].finish_reason is None for own in outputs.values()):
        for _ in range(rng.choice([0, 0, 1, 3])):
            if left:
                request = left.pop()
                ids[id := engine.add(request)] = request
                outputs[id] = []
        if outputs and rng.random() < cancels:
            engine.cancel(rng.choice(list(outputs)))
        for output in engine.step():
            outputs[output.id].append(output)
        scheduler = engine._scheduler
        held = [page for row in scheduler.running for page in row.pages]
        assert len(set(held)) == engine.statistics().pages_used
        for row in scheduler.running:
            length, quantized = (int(x[row.place]) for x in (scheduler._cache.length, scheduler._cache.quantized_len))
            assert scheduler._cache.block_table[row.place, : len(row.pages)].tolist() == row.pages
            assert quantized <= len(row.pages) * GROUP
            if row.decodes:
                assert (length, quantized) == (row.filled, row.num_pages(GROUP) * GROUP)
    return ids, outputs


def long_requests(seed: int, count: int) -> list[Request]:
    """Of up to nine pages each, which two of them fill more than once."""
    rng = random.Random(seed)
    return [
        Request(
            random_prompt(rng.randint(1, 4 * GROUP), 100 * seed + index),
            rng.randint(3 * GROUP, 6 * GROUP),
            (),
            {"logits_processor": [Host()]} if index % 5 == 4 else dict(rng.choice(OPTIONS)),
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("seed", [0, repeat(1)])
def test_texts_do_not_depend_on_how_many_pages_there_are(qs, seed):
    """Random arrivals, lengths, options, cancellations and preemptions: what is not cancelled is the text alone."""
    engine = Engine(qs, max_sequences=4, max_length=10 * GROUP, num_pages=11)
    asked = long_requests(seed, 9)
    ids, outputs = steps(engine, list(asked), random.Random(seed), 0.03)
    for id, request in ids.items():
        expected, found = alone(qs, request), text(outputs[id])
        if outputs[id][-1].finish_reason is FinishReason.CANCELLED:
            expected = expected[: len(found)]
        assert found == expected
    statistics = engine.statistics()
    assert statistics.preemptions > 0
    assert statistics.pages_total == 11
    assert statistics.running == statistics.waiting == statistics.pages_used == 0
    assert statistics.generated_tokens == sum(len(text(own)) for own in outputs.values())
    assert sum(statistics.finished.values()) == len(ids)
    engine.close()


def test_shared_beginnings_and_preemptions(qs):
    """Of several tenants, with chunks of two pages."""
    sizes = {"max_sequences": 4, "max_length": 16 * GROUP, "max_num_batched_tokens": 2 * GROUP}
    common, rng = random_prompt(6 * GROUP, 1), random.Random(1)
    asked = [
        Request(
            [*common[: rng.choice([2, 4, 6]) * GROUP], *random_prompt(rng.randint(1, 2 * GROUP), seed)],
            rng.randint(GROUP, 6 * GROUP),
            (),
            dict(OPTIONS[seed % len(OPTIONS)]),
            salt=rng.choice(["", "another"]),
        )
        for seed in range(2, 14)
    ]
    with contextlib.closing(Engine(qs, **sizes, num_pages=16)) as scarce:
        ids, outputs = steps(scarce, list(asked), rng)
        statistics = scarce.statistics()
    assert statistics.preemptions > 0
    assert statistics.cached_prompt_tokens > 0
    for id, request in ids.items():
        # Alone in a new engine, so that its chunks are the same.
        with contextlib.closing(Engine(qs, **sizes)) as engine:
            (expected,) = engine.generate([request])
        assert text(outputs[id]) == text(expected)
        assert outputs[id][-1].cached_tokens % (2 * GROUP) == 0


def test_captured_cycles_read_the_table(qs, without_graphs):
    """Rows that give way and come back to other places and pages, on replays that are made once."""
    qs.reset()
    asked = long_requests(5, 6)
    expected = [alone(qs, request) for request in asked]
    without_graphs.clear()
    with contextlib.closing(Engine(qs, max_sequences=4, max_length=10 * GROUP, num_pages=11)) as engine:
        assert [text(outputs) for outputs in engine.generate(asked)] == expected
        assert engine.statistics().preemptions > 0
    tables = {replay.cycle.cache.block_table.data_ptr() for replay in without_graphs}
    assert len(tables) == 1
    qs.reset()


def test_who_has_the_fewest_tokens_gives_way_and_is_next(qs):
    engine = Engine(qs, max_sequences=2, max_length=8 * GROUP, num_pages=7, num_speculative_tokens=0)
    long, short = (Request(random_prompt(2 * GROUP, seed), 5 * GROUP, ()) for seed in (1, 2))
    first = engine.add(long)
    for _ in range(GROUP):
        engine.step()
    second, third = engine.add(short), engine.add(short)
    outputs = {first: [], second: [], third: []}
    while not engine.statistics().preemptions:
        for output in engine.step():
            outputs[output.id].append(output)
    assert [row.id for row in engine._scheduler.running] == [first]
    assert [row.id for row in engine._scheduler.waiting] == [second, third]
    assert 0 < len(text(outputs[second])) < short.max_new_tokens
    for id, own in run(engine, list(outputs)).items():
        outputs[id] += own
    assert text(outputs[second]) == text(outputs[third]) == alone(qs, short)
    engine.close()


def test_a_request_comes_when_there_are_pages_for_its_prompt_and_one_more(qs):
    engine = Engine(qs, max_sequences=3, max_length=8 * GROUP, num_pages=7, num_speculative_tokens=0)
    asked = [Request(random_prompt(4 * GROUP, seed), 4, ()) for seed in range(3)]
    for request in asked:
        engine.add(request)
    held = []
    while engine.statistics().running or engine.statistics().waiting:
        engine.step()
        held.append((engine.statistics().running, engine.statistics().pages_used))
    # Three of each prompt's groups are in pages; of seven pages two prompts and one page more leave none for the third.
    assert max(held) == (2, 6)
    assert engine.statistics().preemptions == 0
    engine.close()


def test_a_preempted_request_is_cancelled_like_any(qs):
    engine = Engine(qs, max_sequences=2, max_length=8 * GROUP, num_pages=7)
    ids = [engine.add(Request(random_prompt(2 * GROUP, seed), 6 * GROUP, ())) for seed in range(2)]
    while not engine.statistics().preemptions:
        engine.step()
    (waiting,) = engine._scheduler.waiting
    engine.cancel(waiting.id)
    outputs = run(engine, ids)
    assert outputs[waiting.id][-1].finish_reason is FinishReason.CANCELLED
    assert engine.statistics().pages_used == 0
    engine.close()


# Jamba's prompts are read in one piece, however small the chunks; it has states, as LFM2.
@pytest.mark.parametrize(
    ("architecture", "chunk"),
    [
        ("gemma3_text", 1024),
        repeat("lfm2", 1024),
        ("jamba", GROUP),
        repeat("gpt_oss", 1024),
    ],
)
def test_other_decoders_give_way(architecture, chunk):
    """Windows, states and experts; requests come at random, and some are cancelled."""
    pair = quantspec.convert(tiny_model(architecture, torch.float32), kv_group_size=GROUP, self_check=False)
    asked = [Request(random_prompt(3 + 20 * (seed % 4), seed), 4 * GROUP, ()) for seed in range(4)]
    options = {"max_num_batched_tokens": chunk, "max_length": 9 * GROUP, "num_pages": 8}
    with contextlib.closing(Engine(pair, max_sequences=3, **options)) as engine:
        ids, outputs = steps(engine, list(asked), random.Random(0), 0.01)
        assert engine.statistics().preemptions > 0
    for id, request in ids.items():
        expected, found = alone(pair, request), text(outputs[id])
        is_whole = outputs[id][-1].finish_reason is not FinishReason.CANCELLED
        assert found == (expected if is_whole else expected[: len(found)])


def test_sparse_drafts_of_pages():
    pair = quantspec.convert(
        tiny_model("llama", torch.float32, max_position_embeddings=2048),
        kv_group_size=GROUP,
        self_check=False,
        draft_attention="sparse",
        draft_attention_share=0.2,
    )
    engine = Engine(pair, max_sequences=2, max_length=1300, num_pages=82, max_num_batched_tokens=2048)
    asked = [Request(random_prompt(900 - 300 * seed, seed), 20, ()) for seed in range(3)]
    assert [text(own) for own in engine.generate(asked)] == [alone(pair, request) for request in asked]
    engine.close()


# --- What pages are for ----------------------------------------------------------------------------------------------


def test_texts_take_the_pages_that_they_use(qs):
    """Sixteen rows of up to seven groups, where each might have 32: a page more than they use, at most."""
    engine = Engine(qs, max_sequences=16, max_length=512, num_pages=16 * 6)
    asked = [Request(random_prompt(GROUP + 2 * seed, seed), 4 * GROUP, ()) for seed in range(16)]
    for request in asked:
        engine.add(request)
    rows = 0
    while engine.statistics().running or engine.statistics().waiting:
        engine.step()
        rows = max(rows, engine.statistics().running)
        used = sum(row.num_pages(GROUP) for row in engine._scheduler.running)
        held = engine.statistics().pages_used
        # One page is at hand where a group may be full after the next cycle.
        assert held <= used + len(engine._scheduler.running)
    assert rows == 16
    assert engine.statistics().preemptions == 0
    engine.close()


def test_long_rows_take_as_many_pages_as_their_tokens():
    """Sixteen of mean 8k tokens, whatever their limit: a tenth more at most."""
    group, lengths = 128, [1024 * (1 + seed) - 100 for seed in range(16)]
    rows = [Row(0, InnerRequest(torch.zeros(length), 1), None, []) for length in lengths]
    held = sum(row.num_pages(group) + 1 for row in rows)
    assert sum(lengths) / 16 > 8000
    assert held * group <= 1.1 * sum(lengths)


def test_a_long_beginning_is_prefilled_once_for_sixteen(qs):
    """They wait for it, and hold its pages together."""
    common = random_prompt(16 * GROUP, 1)
    asked = [Request([*common, *random_prompt(GROUP + 3, seed)], 8, ()) for seed in range(2, 18)]
    filled, fill = [], qs.pair.fill
    qs.pair.fill = lambda ids, *rest, **more: filled.append(ids.shape[1]) or fill(ids, *rest, **more)
    try:
        with contextlib.closing(
            Engine(qs, max_sequences=16, num_pages=16 + 3 * 16, max_num_batched_tokens=4 * GROUP)
        ) as engine:
            outputs = engine.generate(asked)
            assert engine.statistics().preemptions == 0
            assert engine.statistics().pages_used == 0
    finally:
        del qs.pair.fill
    assert sum(filled) == 16 * GROUP + 16 * (GROUP + 3)
    assert [own[-1].cached_tokens for own in outputs] == [0] + [16 * GROUP] * 15


def test_no_tenant_finds_anothers_pages(qs):
    engine = Engine(qs, max_sequences=2, max_num_batched_tokens=GROUP)
    request = Request(random_prompt(6 * GROUP, 1), 4, (), salt="one")
    (first,) = engine.generate([request])
    (other,) = engine.generate([dataclasses.replace(request, salt="two")])
    (again,) = engine.generate([request])
    assert [own[-1].cached_tokens for own in (first, other, again)] == [0, 0, 5 * GROUP]
    assert text(first) == text(other) == text(again)
    engine.close()


def test_pages_are_found_until_they_are_taken(qs):
    """Of texts that left, those that nobody wanted for longest give way."""
    engine = Engine(qs, max_sequences=1, max_length=8 * GROUP, num_pages=7, max_num_batched_tokens=GROUP)
    one, two = (Request(random_prompt(4 * GROUP, seed), 2, ()) for seed in (1, 2))
    cached = []
    for request in (one, two, one, two, Request(random_prompt(8 * GROUP - 2, 3), 2, ()), two):
        (outputs,) = engine.generate([request])
        cached.append(outputs[-1].cached_tokens)
    assert cached == [0, 0, 3 * GROUP, 3 * GROUP, 0, 0]
    engine.close()


def test_a_draft_that_knows_no_tables_is_refused(qs, monkeypatch):
    op, planes = torch.ops.quantspec.cached_attention.default, part_names("recent", "upper", "scales")
    assert not CacheAccess(op, planes).reads_pools
    assert CacheAccess(op, planes, by_name=("block_table",)).reads_pools
    assert CacheAccess(op, part_names("recent")).reads_pools
    monkeypatch.setattr(type(qs.pair), "reads_pools", False)
    with pytest.raises(ValueError, match="without a block_table"):
        Engine(qs)
