"""The engine: requests join and leave a running batch, and each gets what it gets alone."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import queue
import random
import re
import threading
import time
from collections.abc import Sequence

import pytest
import torch
from conftest import GROUP
from doc_blocks import stand_in_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from repeats import repeat
from step_by_step import random_prompt
from test_score_programs import without_graphs
from tiny_models import tiny_model
from transformers import LogitsProcessor

import quantspec
from quantspec import CacheFullError
from quantspec.engine.cycle_graph import CycleReplay
from quantspec.errors import QueueFullError
from quantspec.passes import Role
from quantspec.serving import Engine, FinishReason, Output, Request
from quantspec.serving.sizes import fitting_pages

__all__ = ["without_graphs"]

# What each request may ask for by itself: greedy search, sampling, and processors that read the text or need the host.
OPTIONS = (
    {},
    {"repetition_penalty": 1.3},
    {"do_sample": True, "seed": 3},
    {"do_sample": True, "seed": 4, "temperature": 1.7, "top_k": 20},
    {"do_sample": True, "seed": 5, "top_p": 0.9, "no_repeat_ngram_size": 2},
)


class Host(LogitsProcessor):
    """Moves scores by the number of its calls, as no program on the device can."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.roll(self.calls % 3, -1)


class Fails(LogitsProcessor):
    """Raises at its fifth call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 5:
            raise ZeroDivisionError("the fifth call")
        return scores


@pytest.fixture
def engine(qs):
    engine = Engine(qs, max_sequences=4)
    yield engine
    engine.close()


def text(outputs: Sequence[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def logprobs(outputs: Sequence[Output]) -> list[list[float]]:
    """Of each token and the likeliest in its place."""
    found = [position for output in outputs for position in output.logprobs or ()]
    return [[position.logprob, *(value for _, value in position.top)] for position in found]


def run(engine: Engine, ids: Sequence[int], limit: int = 2000) -> dict[int, list[Output]]:
    """Steps until the requests have ended; the outputs of each."""
    outputs: dict[int, list[Output]] = {id: [] for id in ids}
    while not all(own and own[-1].finish_reason for own in outputs.values()):
        for output in engine.step():
            outputs[output.id].append(output)
        limit -= 1
        assert limit, "requests do not end"
    return outputs


def alone(qs, request: Request) -> list[int]:
    """What ``generate`` gives, whose prefill is that of an engine whose chunks hold the prompt."""
    options = dict(request.options)
    if options.get("logits_processor"):
        options["logits_processor"] = [type(own)() for own in options["logits_processor"]]
    ids = torch.tensor([request.prompt], device=qs.device)
    tokens = {"max_new_tokens": request.max_new_tokens, "eos_token_id": list(request.stop_token_ids or ()) or None}
    return qs.generate(ids, attention_mask=torch.ones_like(ids), **tokens, **options)[0, ids.shape[1] :].tolist()


def requests(seed: int, count: int) -> list[Request]:
    """Requests of random lengths and options."""
    rng = random.Random(seed)
    found = []
    for index in range(count):
        options = dict(rng.choice(OPTIONS))
        if rng.random() < 0.15:
            options["logits_processor"] = [Host()]
        stop = rng.choice([(), (2,), tuple(range(3, 30))])
        prompt = random_prompt(rng.choice([1, 5, GROUP, 3 * GROUP, rng.randint(2, 9 * GROUP)]), 100 * seed + index)
        found.append(Request(prompt, rng.randint(1, 4 * GROUP), stop, options))
    return found


@pytest.mark.parametrize("seed", [repeat(0), repeat(1), 2])
def test_texts_do_not_depend_on_the_traffic(qs, engine, seed):
    """Random arrivals, lengths, options and cancellations: what is not cancelled is the text of the request alone."""
    rng = random.Random(seed)
    left, ids, outputs, dropped = requests(seed, 14), {}, {}, set()
    while left or any(own[-1].finish_reason is None if own else True for own in outputs.values()):
        for _ in range(rng.choice([0, 0, 1, 3])):
            if left:
                request = left.pop()
                id = engine.add(request)
                ids[id], outputs[id] = request, []
        if outputs and rng.random() < 0.1:
            dropped.add(id := rng.choice(list(outputs)))
            engine.cancel(id)
        for output in engine.step():
            assert not outputs[output.id] or outputs[output.id][-1].finish_reason is None
            outputs[output.id].append(output)
    for id, request in ids.items():
        expected, reason = alone(qs, request), outputs[id][-1].finish_reason
        if reason is FinishReason.CANCELLED:
            assert id in dropped
            assert text(outputs[id]) == expected[: len(text(outputs[id]))]
            continue
        assert text(outputs[id]) == expected
        stopped = expected[-1] in request.stop_token_ids
        assert reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
    statistics = engine.statistics()
    assert statistics.running == statistics.waiting == statistics.pages_used == 0
    assert statistics.generated_tokens == sum(len(text(own)) for own in outputs.values())
    assert sum(statistics.finished.values()) == len(ids)
    assert 0 < statistics.accepted_tokens < statistics.draft_tokens


@given(
    chunk=st.integers(GROUP, 4 * GROUP),
    lengths=st.lists(st.integers(1, 9 * GROUP), min_size=2, max_size=5),
    shared=st.integers(0, 9 * GROUP),
)
def test_texts_do_not_depend_on_what_is_cached(qs, chunk, lengths, shared):
    """A request whose beginning others have prefilled and one alone in a new engine: the same chunks, the same text."""
    options = {"max_sequences": 3, "max_num_batched_tokens": chunk}
    beginning, chunk = random_prompt(9 * GROUP, 1)[:shared], chunk // GROUP * GROUP
    prompts = [[*beginning[:length], *random_prompt(length, length)][:length] for length in lengths]
    asked = [Request(prompt, 6, (), {"logprobs": 3}) for prompt in prompts]
    filled, fill = [], qs.pair.fill
    qs.pair.fill = lambda ids, *rest, **more: filled.append(ids.shape[1]) or fill(ids, *rest, **more)
    try:
        with contextlib.closing(Engine(qs, **options)) as engine:
            together = [*engine.generate(asked), *engine.generate(asked)]
        assert sum(filled) == sum(outputs[-1].prompt_tokens - outputs[-1].cached_tokens for outputs in together)
        for request, *found in zip(asked, together[: len(asked)], together[len(asked) :], strict=True):
            filled.clear()
            with contextlib.closing(Engine(qs, **options)) as engine:
                (expected,) = engine.generate([request])
            assert [text(outputs) for outputs in found] == [text(expected)] * 2
            # The first token comes from the same products of the same numbers, the others from larger batches.
            first, *others = logprobs(expected)
            for own, *rest in map(logprobs, found):
                assert own == first
                assert rest == [pytest.approx(other, abs=1e-4) for other in others]
            whole = max(0, len(request.prompt) - GROUP) // chunk
            assert filled == [chunk] * whole + [len(request.prompt) - whole * chunk]
            assert expected[-1].cached_tokens == 0
    finally:
        del qs.pair.fill


def test_a_common_beginning_is_prefilled_once(qs):
    """For requests that come together, whoever runs, and for those of the same salt alone."""
    engine = Engine(qs, max_sequences=4, max_num_batched_tokens=GROUP)
    common = random_prompt(8 * GROUP, 1)
    asked = [Request([*common, *random_prompt(GROUP + 5, seed)], 20, ()) for seed in range(2, 8)]
    outputs = engine.generate(asked)
    assert [own[-1].cached_tokens for own in outputs] == [0] + [8 * GROUP] * 5
    assert engine.statistics().cached_prompt_tokens == 5 * 8 * GROUP
    (other,) = engine.generate([dataclasses.replace(asked[0], salt="another")])
    assert other[-1].cached_tokens == 0
    assert text(other) == text(outputs[0])
    (again,) = engine.generate([dataclasses.replace(asked[0], salt="another")])
    assert again[-1].cached_tokens == 8 * GROUP
    engine.close()


def test_conversations_in_turn_keep_what_they_have(qs):
    """One place is used at a time, and the other chats' texts give way to places that are free."""
    engine = Engine(qs, max_sequences=4, max_num_batched_tokens=GROUP)
    chats = [random_prompt(3 * GROUP, seed) for seed in range(4)]
    cached = []
    for turn in range(4):
        for chat in chats:
            (outputs,) = engine.generate([Request(chat, 10, ())])
            cached.append((len(chat), outputs[-1].cached_tokens))
            chat += [*text(outputs), *random_prompt(2 * GROUP, turn)]
    # Of the turn before all but the answer and the last one or two groups.
    assert all(length - count <= 3 * GROUP + 10 + 2 * GROUP for length, count in cached[4:])
    assert all(count > 0 for _, count in cached[4:])
    engine.close()


def test_one_chunk_of_one_prompt_between_cycles(qs):
    """A long prompt does not hold up who is running."""
    engine = Engine(qs, max_sequences=2, max_num_batched_tokens=GROUP, num_speculative_tokens=0)
    short, long = (engine.add(Request(random_prompt(n, n), 30, ())) for n in (3, 8 * GROUP))
    steps = []
    while not steps or long not in steps[-1]:
        steps.append({output.id: len(output.token_ids) for output in engine.step()})
    assert len(steps) == 9
    assert [step[short] for step in steps] == [2] + [1] * 8
    engine.close()


def test_idle_places_hold_nothing(qs, engine):
    """Attention reads up to a place's length, and a small cycle is run for a small batch."""
    ids = [engine.add(Request(random_prompt(5 * GROUP, seed), 4 + 8 * seed, ())) for seed in range(4)]
    sizes = set()
    while engine.statistics().running or engine.statistics().waiting:
        engine.step()
        if engine._scheduler._batch is not None:
            sizes.add(len(engine._scheduler._batch.requests))
        held = [row is not None for row in engine._scheduler._rows]
        assert [length > 0 for length in engine._scheduler._cache.length.tolist()] <= held
    assert sizes == {1, 2, 4}
    assert engine._scheduler._cache.length.tolist() == engine._scheduler._cache.quantized_len.tolist() == [0] * len(ids)


def test_more_requests_than_places_wait_in_order(qs, engine):
    asked = [Request(random_prompt(4, seed), 5, ()) for seed in range(9)]
    outputs = run(engine, [engine.add(request) for request in asked])
    assert [text(own) for own in outputs.values()] == [alone(qs, request) for request in asked]
    small = Engine(qs, max_sequences=1, max_waiting=2)
    # One has a place, and waits for a step alone.
    ids = [small.add(request) for request in asked[:3]]
    with pytest.raises(QueueFullError, match="max_waiting=2"):
        small.add(asked[3])
    run(small, ids)
    small.close()


def test_requests_are_added_all_or_none(qs):
    asked = [Request(random_prompt(4, seed), 5, ()) for seed in range(5)]
    new: queue.SimpleQueue[Output] = queue.SimpleQueue()
    with contextlib.closing(Engine(qs, max_sequences=2, max_waiting=2)) as engine:
        with pytest.raises(ValueError, match="5 requests at once are more than max_sequences=2 and max_waiting=2"):
            engine.subscribe(asked, new.put)
        with pytest.raises(ValueError, match="prompt must be in 0"):
            engine.subscribe([asked[0], Request([10_000], 5)], new.put)
        assert engine.statistics().waiting == 0
        ids = engine.subscribe(asked[:4], new.put)
        found: dict[int, list[Output]] = {id: [] for id in ids}
        while not all(own and own[-1].finish_reason for own in found.values()):
            output = new.get(timeout=60)
            found[output.id].append(output)
        assert [text(own) for own in found.values()] == [alone(qs, request) for request in asked[:4]]


def test_a_listener_ends_its_own_request_alone(qs):
    """By an error, and by calling what would wait for it."""
    told: list[BaseException] = []
    with contextlib.closing(Engine(qs, max_sequences=4)) as engine:

        def fails(output: Output) -> None:
            raise ValueError("listener")

        def calls(output: Output) -> None:
            for call in (engine.close, engine.step, lambda: engine.add(Request([5], 3, ()))):
                try:
                    call()
                except RuntimeError as error:
                    told.append(error)

        asked = Request(random_prompt(4, 1), 30, ())
        for listener in (fails, calls):
            engine.subscribe([Request(random_prompt(4, 2), 300, ())], listener)
        assert text(engine.generate([asked])[0]) == alone(qs, asked)
        assert len(told) >= 3
        assert all("a listener cannot" in str(error) for error in told)
        assert engine.loss is None


def test_places_that_are_not_free_after_a_step_count_for_nobody(qs):
    """Pages are short: what a step has left waiting waits."""
    prompts = [random_prompt(100, seed) for seed in range(6)]
    with contextlib.closing(Engine(qs, max_sequences=4, max_length=8 * GROUP, num_pages=8, max_waiting=2)) as engine:
        ids = [engine.add(Request(prompt, 20, ())) for prompt in prompts[:4]]
        engine.step()
        assert engine.statistics().waiting >= 2
        with pytest.raises(QueueFullError, match="requests wait already"):
            engine.add(Request(prompts[4], 20, ()))
        run(engine, ids)


def test_steps_are_taken_by_the_engine_or_by_its_caller(qs):
    with contextlib.closing(Engine(qs, max_sequences=2)) as engine:
        engine.cancel(0)  # nobody has added it
        kept = engine.add(Request(random_prompt(3, 1), 40, ()))
        engine.step()
        assert engine.generate([Request(random_prompt(3, 2), 5, ())])[0][-1].finish_reason is FinishReason.LENGTH
        with pytest.raises(RuntimeError, match="takes its steps itself"):
            engine.step()

        async def read() -> list[Output]:
            return [output async for output in engine.stream(kept)]

        assert asyncio.run(read())[-1].finish_reason is FinishReason.LENGTH


def test_captured_cycles(qs, without_graphs):
    """Rows that come and go, with any processors, on replays that are made once for each size and kind."""
    qs.reset()
    asked = requests(7, 12)
    expected = [alone(qs, request) for request in asked]
    without_graphs.clear()
    with contextlib.closing(Engine(qs, max_sequences=4)) as engine:
        assert [text(outputs) for outputs in engine.generate(asked)] == expected
        made = len(without_graphs)
        assert {replay.cycle.cache.batch_size for replay in without_graphs} == {1, 2, 4}
        plain = [Request(random_prompt(9 + seed, seed), 5 + seed, ()) for seed in range(12)]
        assert [text(outputs) for outputs in engine.generate(plain)] == [alone(qs, request) for request in plain]
        assert len(without_graphs) <= made + 4
    qs.reset()


def test_a_warm_engine_captures_nothing_for_plain_requests(qs, without_graphs):
    """Whatever number of them there is; and the warm-up leaves nothing behind that changes a text."""
    qs.reset()
    asked = [Request(random_prompt(5 * GROUP, seed), 20, ()) for seed in range(6)]
    expected = [alone(qs, request) for request in asked]
    without_graphs.clear()
    with contextlib.closing(Engine(qs, max_sequences=5)) as engine:
        engine.warm_up()
        assert sorted(replay.cycle.cache.batch_size for replay in without_graphs) == [1, 2, 4, 5]
        assert engine.statistics().pages_used == engine.statistics().running == 0
        assert [text(outputs) for outputs in run(engine, map(engine.add, asked)).values()] == expected
        assert len(without_graphs) == 4
        # A thread takes the steps from here on.
        assert [text(outputs) for outputs in engine.generate(asked)] == expected
        engine.warm_up()
        assert len(without_graphs) == 4
        engine.add(asked[0])
        with pytest.raises(RuntimeError, match="warm it up before the first one"):
            engine.warm_up()
    with pytest.raises(RuntimeError, match="closed"):
        engine.warm_up()
    qs.reset()


def test_a_warm_up_that_fails_tells_why(qs, engine, monkeypatch):
    monkeypatch.setattr(type(qs.pair), "fill", lambda *_, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.warm_up()
    monkeypatch.undo()
    engine.warm_up()


# --- Failures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned():
    """A pair to which token 90 is NaN."""
    model = tiny_model("llama", torch.float32, tie_word_embeddings=False)
    model.get_input_embeddings().weight.data[90] = float("nan")
    return quantspec.convert(model, kv_group_size=GROUP, self_check=False)


@pytest.mark.parametrize("where", ["prompt", "cycle"])
def test_nan_logits_of_one_row_end_it_alone(poisoned, where):
    engine = Engine(poisoned, max_sequences=3)
    first, second, prompt = ([token % 90 for token in random_prompt(20 + seed, seed)] for seed in range(3))
    healthy = [Request(own, 24, (), {"suppress_tokens": [90]}) for own in (first, second)]
    # Its first token is 90 where nothing else is allowed.
    bad = (
        Request([*prompt, 90], 20, ())
        if where == "prompt"
        else Request(prompt, 20, (), {"suppress_tokens": [token for token in range(96) if token != 90]})
    )
    ids = [engine.add(request) for request in (healthy[0], bad, healthy[1])]
    outputs = run(engine, ids)
    first, failed, second = (outputs[id] for id in ids)
    assert failed[-1].finish_reason is FinishReason.ERROR
    assert isinstance(failed[-1].error, FloatingPointError)
    assert "logits are NaN" in str(failed[-1].error)
    assert [text(first), text(second)] == [alone(poisoned, request) for request in healthy]
    # The place it had is clean.
    assert text(run(engine, [id := engine.add(healthy[1])])[id]) == text(second)
    engine.close()


@pytest.mark.parametrize("where", ["prefill", "cycle"])
def test_a_processor_that_raises_ends_its_own_row_alone(qs, engine, where):
    failing = Fails()
    failing.calls = 4 if where == "prefill" else 0
    asked = [
        Request(random_prompt(9, 1), 20, ()),
        Request(random_prompt(9, 2), 20, (), {"logits_processor": [failing]}),
        Request(random_prompt(9, 3), 20, (), {"do_sample": True, "seed": 1}),
        Request(random_prompt(9, 4), 20, (), {"logits_processor": [Host()]}),
    ]
    outputs = list(run(engine, [engine.add(request) for request in asked]).values())
    assert isinstance(outputs[1][-1].error, ZeroDivisionError)
    assert len(text(outputs[1])) == (0 if where == "prefill" else 4)
    for index in (0, 2, 3):
        assert text(outputs[index]) == alone(qs, asked[index])


def test_a_full_memory_in_prefill_ends_one_request(qs, engine, monkeypatch):
    fill = qs.pair.fill

    def fails_once(*arguments, **options):
        monkeypatch.setitem(vars(qs.pair), "fill", fill)
        raise torch.OutOfMemoryError("no more")

    asked = [Request(random_prompt(9, seed), 8, ()) for seed in range(2)]
    monkeypatch.setitem(vars(qs.pair), "fill", fails_once)
    first, second = run(engine, [engine.add(request) for request in asked]).values()
    assert first[-1].finish_reason is FinishReason.ERROR
    assert text(second) == alone(qs, asked[1])


def test_a_full_memory_in_capture_gives_captured_cycles_back(qs, without_graphs, monkeypatch):
    qs.reset()
    asked = requests(8, 6)
    expected = [alone(qs, request) for request in asked]
    capture, calls = CycleReplay._capture, []

    def full_at_times(self, plan):
        calls.append(plan)
        if len(calls) in (2, 4):
            raise torch.OutOfMemoryError("no more")
        capture(self, plan)

    with contextlib.closing(Engine(qs, max_sequences=4)) as engine, monkeypatch.context() as patch:
        patch.setattr(CycleReplay, "_capture", full_at_times)
        assert [text(outputs) for outputs in engine.generate(asked)] == expected
    assert len(calls) > 4
    qs.reset()


def test_a_failed_cycle_ends_those_in_it_and_the_engine_goes_on(qs, engine, monkeypatch):
    asked = [Request(random_prompt(9, seed), 8, ()) for seed in range(2)]
    ids = [engine.add(request) for request in asked]
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(type(engine._scheduler._batch), "run", lambda *_: 1 / 0)
        outputs = run(engine, ids)
    assert all(isinstance(own[-1].error, ZeroDivisionError) for own in outputs.values())
    assert text(engine.generate(asked[:1])[0]) == alone(qs, asked[0])


def test_a_loop_that_ends_tells_everybody(qs, monkeypatch):
    """A device that fails for good fails while the rows are cleared, too: nobody waits for steps that never come."""
    engine = Engine(qs, max_sequences=1)
    asked = [Request(random_prompt(9, seed), 400, ()) for seed in range(3)]
    read = engine.add(asked[2])

    def fail(*_):
        raise ZeroDivisionError("the device is gone")

    async def streams() -> tuple[list[Output], list[Output]]:
        async def collect(request: Request | int) -> list[Output]:
            return [output async for output in engine.stream(request)]

        first = asyncio.create_task(collect(asked[0]))
        while not engine.statistics().generated_tokens:
            await asyncio.sleep(0.01)
        monkeypatch.setattr(engine._scheduler, "step", fail)
        monkeypatch.setattr(engine._scheduler, "end_all", fail)
        return await first, await collect(read)

    # Nobody waits so long unless it is for good.
    for outputs in asyncio.run(asyncio.wait_for(streams(), 120)):
        assert outputs[-1].finish_reason is FinishReason.ERROR
        assert "the device is gone" in str(outputs[-1].error)
    assert "the device is gone" in engine.loss
    with pytest.raises(RuntimeError, match="the engine has ended by ZeroDivisionError"):
        engine.add(asked[0])
    with pytest.raises(RuntimeError, match="the engine has ended by ZeroDivisionError"):
        engine.generate(asked)
    engine.close()


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (Request([], 5), ValueError, "empty"),
        (Request([1, 96], 5), ValueError, "found 96"),
        (Request([1, -1], 5), ValueError, "found -1"),
        (Request("text", 5), TypeError, "list of token ids"),
        (Request([1.5], 5), TypeError, "list of token ids"),
        (Request([[1, 2]], 5), TypeError, "list of token ids"),
        (Request([1], 5, (96,)), ValueError, "stop_token_ids must be in"),
        (Request([1], 5, 2), TypeError, "stop_token_ids must be a list"),
        (Request([1], 0), ValueError, "max_new_tokens must be at least 1"),
        (Request([1], "5"), TypeError, "max_new_tokens must be an int"),
        (Request([1] * 500, 13), CacheFullError, "513 tokens"),
        (Request([1], 5, (), {"num_beams": 2}), ValueError, "no option num_beams"),
        (Request([1], 5, (), {"max_length": 3}), ValueError, "no option max_length"),
        (Request([1], 5, (), {"do_sample": True, "temperature": -1.0}), ValueError, "temperature"),
        (Request([1], 5, (), {"sequence_bias": [[[96], 1.0]]}), ValueError, "sequence_bias must be in 0..95, found 96"),
        (Request([1], 5, (), {"do_sample": True, "seed": "a"}), TypeError, "seed"),
        (Request([1], 5, (), {"do_sample": True, "seed": [1, 2]}), TypeError, "seed"),
        (Request([1], 5, (), {"logprobs": 21}), ValueError, "between 0 and 20"),
        (Request([1], 5, (), {"logprobs": True}), TypeError, "logprobs must be an int"),
        (Request([1], 5, (), {"json_schema": {}}), ValueError, "tokenizer"),
        (Request([1], 5, (), "greedy"), TypeError, "options must be a dict"),
        (Request([1], 5, salt=None), TypeError, "salt must be a str"),
        ("text", TypeError, "quantspec.serving.Request"),
    ],
)
def test_bad_requests_are_refused_and_the_others_go_on(qs, engine, request_, error, message):
    good = Request(random_prompt(9, 1), 12, ())
    id = engine.add(good)
    engine.step()
    with pytest.raises(error, match=message):
        engine.add(request_)
    assert engine.statistics().waiting == 0
    outputs = run(engine, [id])[id]
    assert len(text(outputs)) + 3 > good.max_new_tokens - 6


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_sequences": 0}, ValueError, "max_sequences must be at least 1"),
        ({"max_sequences": 2.0}, TypeError, "max_sequences must be an int"),
        ({"max_length": 513}, ValueError, "max_cache_len=512"),
        ({"num_pages": 0}, ValueError, "num_pages must be at least 1"),
        ({"num_pages": 3, "max_length": 80}, ValueError, "the 64 tokens that 3 pages hold"),
        ({"max_num_batched_tokens": 0}, ValueError, "max_num_batched_tokens must be at least 1"),
        ({"max_num_batched_tokens": 15}, ValueError, "kv_group_size=16"),
        ({"gpu_memory_utilization": 1.5}, ValueError, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": "all"}, TypeError, "gpu_memory_utilization"),
        ({"num_speculative_tokens": "fast"}, TypeError, "an int or 'auto'"),
        ({"num_speculative_tokens": 16}, ValueError, "between 0 and 15"),
    ],
)
def test_bad_options_of_an_engine(qs, options, error, message):
    with pytest.raises(error, match=message):
        Engine(qs, **options)
    with pytest.raises(TypeError, match=r"convert\(\) returned"):
        Engine(qs.model)


@pytest.mark.parametrize("pages", [2, 7, 60])
def test_as_many_pages_as_memory_allows(qs, pages):
    cache = qs.pair.new_cache(3, 4)
    cache.reserve_pool(100, pages)
    sizes = cache.bytes_by_part()
    # A GPU has no decoded copy.
    room = sum(size for kind, size in sizes.items() if kind != "decoded")
    # Queries, keys and values of 64 numbers each are narrower than an MLP's 64 and 96.
    read_at_once = 4096 * 6 * (64 + 96) * 4
    assert fitting_pages(qs.pair, 3, 4, 4096, room + read_at_once) == pages
    assert fitting_pages(qs.pair, 3, 4, 4096, room + read_at_once - 1) == pages - 1
    assert fitting_pages(qs.pair, 3, 4, 0, 0) < 0


# --- What is reported ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processor", [False, True])
def test_log_probabilities_are_the_models_own(qs, engine, processor):
    options = {"logprobs": 3, "temperature": 0.3, "do_sample": True, "seed": 1}
    if processor:
        options["logits_processor"] = [Host()]
    request = Request(random_prompt(9, 1), 12, (), options)
    (outputs,) = engine.generate([request])
    found = [position for output in outputs for position in output.logprobs]
    assert len(found) == len(text(outputs)) == 12
    ids = torch.tensor([[*request.prompt, *text(outputs)]])
    expected = qs.model(ids).logits[0, len(request.prompt) - 1 : -1].log_softmax(-1)
    for position, token, row in zip(found, text(outputs), expected, strict=True):
        assert position.logprob == pytest.approx(float(row[token]), abs=1e-4)
        values, tokens = row.topk(3)
        assert [token for token, _ in position.top] == tokens.tolist()
        assert [value for _, value in position.top] == pytest.approx(values.tolist(), abs=1e-4)
    (outputs,) = engine.generate([Request(random_prompt(9, 1), 3, ())])
    assert all(output.logprobs is None for output in outputs)


def test_outputs_count_what_was_drafted(qs, engine):
    request = Request(random_prompt(20, 1), 30, ())
    (outputs,) = engine.generate([request])
    assert outputs[-1].prompt_tokens == 20
    statistics = engine.statistics()
    assert (outputs[-1].drafted, outputs[-1].accepted) == (statistics.draft_tokens, statistics.accepted_tokens)
    # The first token is prefill's, and each cycle yields one that is not drafted.
    assert 1 + statistics.cycles + statistics.accepted_tokens in (30, 31)


def test_structures():
    """Each row follows a grammar of its own, or none; one that allows nothing ends its row alone."""
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install -e '.[structured]'")
    tokenizer = stand_in_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    pair = quantspec.convert(tiny_model("llama", vocab_size=len(tokenizer), **ids), self_check=False)
    engine = Engine(pair, tokenizer=tokenizer, max_sequences=3, max_length=200)
    choices = [{"answer": "yes"}, {"answer": "no"}]
    prompt = tokenizer("A person:").input_ids
    (x,) = tokenizer("x").input_ids
    asked = [
        Request(prompt, 60, None, {"json_schema": {"enum": choices}}),
        Request(prompt, 40, (), {}),
        Request(prompt, 40, None, {"regex": "[ab]{3,6}", "do_sample": True, "seed": 1}),
        Request(prompt, 40, None, {"regex": "ax+", "suppress_tokens": [x]}),
    ]
    structured, free, regex, stuck = engine.generate(asked)
    assert json.loads(tokenizer.decode(text(structured), skip_special_tokens=True)) in choices
    assert structured[-1].finish_reason is regex[-1].finish_reason is FinishReason.STOP
    assert re.fullmatch("[ab]{3,6}", tokenizer.decode(text(regex), skip_special_tokens=True))
    assert text(free) == alone(pair, asked[1])
    assert tokenizer.decode(text(stuck)) == "a"
    assert "no token is left that the grammar allows" in str(stuck[-1].error)
    with pytest.raises(ValueError, match="cannot be used"):
        engine.add(Request(prompt, 5, None, {"regex": "("}))
    engine.close()


# --- Threads and streams ---------------------------------------------------------------------------------------------


def test_streams_share_an_engine(qs, engine):
    asked = [Request(random_prompt(9 + seed, seed), 20, ()) for seed in range(6)]

    async def collect(request: Request | int) -> list[Output]:
        return [output async for output in engine.stream(request)]

    async def all_of_them() -> list[list[Output]]:
        added = [engine.add(request) for request in asked[:2]]
        return await asyncio.gather(*map(collect, (*added, *asked[2:])))

    outputs = asyncio.run(all_of_them())
    assert [text(own) for own in outputs] == [alone(qs, request) for request in asked]
    assert all(len(own) > 2 for own in outputs)


def test_who_leaves_a_stream_frees_its_place(qs, engine):
    async def leave() -> None:
        stream = engine.stream(Request(random_prompt(9, 1), 400, ()))
        async for output in stream:
            assert output.token_ids
            break
        await stream.aclose()
        task = asyncio.create_task(anext(engine.stream(Request(random_prompt(9, 2), 400, ()))))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(ValueError, match="empty"):
            await anext(engine.stream(Request([], 5)))
        with pytest.raises(ValueError, match="no request 77"):
            await anext(engine.stream(77))

    asyncio.run(leave())
    request = Request(random_prompt(9, 3), 10, ())
    assert text(engine.generate([request])[0]) == alone(qs, request)
    statistics = engine.statistics()
    assert statistics.finished[FinishReason.CANCELLED] == 2
    assert statistics.running == statistics.waiting == 0


def test_callers_in_threads_and_generate_of_the_pair(qs, engine):
    """They take turns, also with ``generate``."""
    asked = [Request(random_prompt(9 + seed, seed), 20, ()) for seed in range(4)]
    expected = [alone(qs, request) for request in asked]
    found: dict[int, list[int]] = {}

    def call(index: int) -> None:
        if index % 2:
            found[index] = alone(qs, asked[index])
        else:
            found[index] = text(engine.generate([asked[index]])[0])

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(4)] == expected


def test_a_processor_cannot_call_its_engine(qs, engine):
    class Nested(LogitsProcessor):
        def __call__(self, input_ids, scores):
            engine.add(Request([1], 1))
            return scores

    (outputs,) = engine.generate([Request([5, 6], 5, (), {"logits_processor": [Nested()]})])
    assert "the engine is in a step" in str(outputs[-1].error)


def test_many_requests_of_many_callers(qs):
    """Tasks that come, leave early and ask for what cannot be done; nothing stays behind."""
    engine = Engine(qs, max_sequences=4, max_num_batched_tokens=2 * GROUP, max_waiting=300)
    rng, count = random.Random(0), 60
    common = random_prompt(5 * GROUP, 0)
    asked = [
        Request([*common[: rng.choice([0, 4 * GROUP])], 5, index + 3], rng.randint(1, 12), ()) for index in range(count)
    ]

    async def call(index: int) -> list[int] | None:
        if index % 10 == 3:
            with pytest.raises(ValueError, match="must be in"):
                await anext(engine.stream(dataclasses.replace(asked[index], prompt=[96])))
            return None
        tokens: list[int] = []
        stream = engine.stream(asked[index])
        async for output in stream:
            tokens += output.token_ids
            if index % 10 == 7 and tokens:
                await stream.aclose()
                return None
        return tokens

    async def callers() -> list[list[int] | None]:
        turns = asyncio.Semaphore(8)

        async def in_turn(index: int) -> list[int] | None:
            async with turns:
                return await call(index)

        return await asyncio.gather(*map(in_turn, range(count)))

    found = asyncio.run(callers())
    with contextlib.closing(Engine(qs, max_num_batched_tokens=2 * GROUP)) as other:
        for request, tokens in zip(asked, found, strict=True):
            if tokens is not None:
                assert tokens == text(other.generate([request])[0])
    while engine.statistics().running:
        time.sleep(0.01)
    statistics = engine.statistics()
    assert statistics.waiting == statistics.pages_used == 0
    assert sum(statistics.finished.values()) == count - count // 10
    assert statistics.cached_prompt_tokens > 0
    assert not engine._delivery._listeners
    assert not engine._delivery._kept
    engine.close()


def test_the_heart_beats_while_there_is_nothing_to_do(engine):
    """And from the time of the first request on it tells how long a step takes."""
    time.sleep(0.05)
    before = time.monotonic()
    assert engine.heartbeat >= before
    engine.add(Request(random_prompt(9, 1), 30, ()))
    added = engine.heartbeat
    assert before <= added <= time.monotonic()
    time.sleep(0.01)
    assert engine.heartbeat == added
    engine.step()
    assert engine.heartbeat > added


def test_closing_ends_everything(qs):
    engine = Engine(qs, max_sequences=1)
    ids = [engine.add(Request(random_prompt(9, seed), 400, ())) for seed in range(3)]
    engine.step()
    engine.close()
    engine.close()
    assert engine.statistics().finished == {FinishReason.CANCELLED: len(ids)}
    assert engine.step() == []
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.add(Request([1], 1))


@pytest.mark.parametrize("architecture", ["gemma3_text", "lfm2", "gpt_oss", repeat("qwen3_next")])
def test_other_decoders(architecture):
    """Windows, states and experts."""
    pair = quantspec.convert(tiny_model(architecture, torch.float32), kv_group_size=GROUP, self_check=False)
    engine = Engine(pair, max_sequences=3)
    asked = [Request(random_prompt(3 + 25 * seed, seed), 40 - 9 * seed, ()) for seed in range(4)]
    assert [text(own) for own in engine.generate(asked)] == [alone(pair, request) for request in asked]
    engine.close()


def test_sparse_drafts():
    pair = quantspec.convert(
        tiny_model("llama", torch.float32, max_position_embeddings=2048),
        kv_group_size=GROUP,
        self_check=False,
        draft_attention="sparse",
        draft_attention_share=0.2,
    )
    engine = Engine(pair, max_sequences=2)
    asked = [Request(random_prompt(1200 - 500 * seed, seed), 20, ()) for seed in range(3)]
    assert [text(own) for own in engine.generate(asked)] == [alone(pair, request) for request in asked]
    engine.close()


def test_prompts_go_through_what_is_compiled_but_a_single_token(qs, monkeypatch):
    inner, lengths = qs.pair, []
    prompts = [random_prompt(length, length) for length in (1, GROUP, GROUP + 1, 6 * GROUP)]
    asked = [Request(prompt, 20, (), {"do_sample": False}) for prompt in prompts]

    def texts() -> list[list[int]]:
        options = {"max_sequences": 2, "max_length": 160, "max_num_batched_tokens": 2 * GROUP}
        with contextlib.closing(Engine(qs, **options)) as engine:
            return [text(outputs) for outputs in engine.generate(asked)]

    def compiled(ids, *inputs):
        lengths.append(ids.shape[1])
        return inner.graphs[Role.PREFILL](ids, *inputs)

    expected = texts()
    monkeypatch.setattr(type(inner), "_compiled_prefill", property(lambda self: compiled))
    monkeypatch.setattr(inner, "compiles", True)
    assert texts() == expected
    assert sorted(lengths) == [GROUP, GROUP + 1, 2 * GROUP, 2 * GROUP, 2 * GROUP]
    # Its own prompts are read in few chunks.
    qs.generate(torch.tensor([prompts[-1]]), max_new_tokens=2)
    assert len(lengths) == 5


@pytest.mark.parametrize("longest", [GROUP, 4 * GROUP])
def test_no_more_than_asked_is_read_between_two_cycles(qs, monkeypatch, longest):
    """But for the group that a last chunk may have more, and short texts, which count as a first chunk."""
    monkeypatch.setattr("quantspec.serving.sizes._CHUNK", GROUP)
    lengths = [1, 5, 6 * GROUP, 13 * GROUP + 7, 2, 4 * GROUP, 9 * GROUP + 1]
    steps, read = [], []
    fill = type(qs.pair).fill

    def counted(pair, ids, *rest, **more):
        read.append(ids.shape[1])
        return fill(pair, ids, *rest, **more)

    monkeypatch.setattr(type(qs.pair), "fill", counted)
    options = {"max_sequences": 4, "max_length": 20 * GROUP, "max_num_batched_tokens": longest}
    with contextlib.closing(Engine(qs, **options)) as engine:
        left = {engine.add(Request(random_prompt(length, length), 3, (), {"do_sample": False})) for length in lengths}
        while left:
            read.clear()
            left -= {output.id for output in engine.step() if output.finish_reason is not None}
            steps.append([max(GROUP, count) for count in read])
    assert all(sum(step) <= longest + GROUP for step in steps)
    assert sum(len(step) for step in steps) > len(lengths)
    assert (max(len(step) for step in steps) > 1) == (longest > GROUP)


def test_nothing_more_is_read_after_a_failure(qs, monkeypatch):
    """The one whose prompt it was ends, and the next waits for the next step."""
    monkeypatch.setattr("quantspec.serving.sizes._CHUNK", GROUP)
    fill, calls = type(qs.pair).fill, []

    def failing(*given, **more):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("the first")
        return fill(*given, **more)

    monkeypatch.setattr(type(qs.pair), "fill", failing)
    with contextlib.closing(Engine(qs, max_sequences=4, max_num_batched_tokens=4 * GROUP)) as engine:
        first, second = (engine.add(Request(random_prompt(5, seed), 3, ())) for seed in (1, 2))
        (output,) = engine.step()
        assert (output.id, output.finish_reason) == (first, FinishReason.ERROR)
        assert len(calls) == 1
        assert text(run(engine, [second])[second])
