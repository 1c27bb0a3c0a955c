"""How much an engine drafts: what "auto" makes of each bucket's times and of acceptance, and that no text shows it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from conftest import GROUP
from repeats import repeat
from step_by_step import random_prompt
from test_score_programs import without_graphs
from test_serving_engine import Host, alone, requests, run, text

import quantspec
from quantspec.engine.cycle_graph import CycleReplay
from quantspec.engine.draft_count import AutoDraftCount
from quantspec.engine.durations import ON_GPU
from quantspec.engine.plan import Plan
from quantspec.serving import Engine, Request
from quantspec.serving.batch import Batch
from quantspec.serving.sizes import Sizes

__all__ = ["without_graphs"]

MOST = 4


@pytest.fixture
def alternating(monkeypatch) -> list[int]:
    """Every number of drafts in turn, whatever it takes; gives those that were chosen."""
    chosen: list[int] = []
    counts = itertools.cycle([MOST, 0, 2, 0, MOST, 2])

    def choose(*_) -> Plan:
        chosen.append(next(counts))
        return Plan(chosen[-1])

    monkeypatch.setattr(AutoDraftCount, "choose", choose)
    return chosen


def check_texts(qs: quantspec.QuantSpecModel, asked: Sequence[Request], texts: Sequence[Sequence[int]]) -> None:
    """Each is that of the request alone, at some number of drafts.

    Where groups are flushed shows in near ties, so two numbers may give different texts of one seed.
    """

    def drafting(request: Request, count: int) -> list[int]:
        return alone(qs, dataclasses.replace(request, options={**request.options, "num_speculative_tokens": count}))

    for request, own in zip(asked, texts, strict=True):
        assert any(own == drafting(request, count) for count in (MOST, 0, 2))


def texts_of(engine: Engine, asked: Sequence[Request]) -> list[list[int]]:
    """Of requests that come at once."""
    return [text(outputs) for outputs in run(engine, [engine.add(request) for request in asked]).values()]


# --- Texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [repeat(0), repeat(1), 2])
def test_a_text_does_not_show_what_was_drafted(qs, alternating, seed):
    """Random arrivals, lengths, sampling and processors, of the device and of the host."""
    rng, left, ids = random.Random(seed), requests(seed, 12), {}
    with contextlib.closing(Engine(qs, max_sequences=4, num_speculative_tokens="auto")) as engine:
        outputs = {}
        while left or engine.statistics().running or engine.statistics().waiting:
            for _ in range(rng.choice([0, 0, 1, 3])):
                if left:
                    request = left.pop()
                    ids[id := engine.add(request)], outputs[id] = request, []
            for output in engine.step():
                outputs[output.id].append(output)
    check_texts(qs, list(ids.values()), [text(outputs[id]) for id in ids])
    assert set(alternating) == {0, 2, MOST}


def test_a_row_that_gave_way_goes_on_as_it_was(qs, alternating):
    """Groups went into pages where cycles of several numbers of drafts ended; that is where it is read again."""
    options = ({}, {"do_sample": True, "seed": 3}, {"repetition_penalty": 1.3})
    asked = [Request(random_prompt(9, seed), 5 * GROUP, (), options[seed % 3]) for seed in range(6)]
    few = {"max_sequences": 4, "max_length": 10 * GROUP, "num_pages": 9}
    with contextlib.closing(Engine(qs, num_speculative_tokens="auto", **few)) as engine:
        check_texts(qs, asked, texts_of(engine, asked))
        assert engine.statistics().preemptions > 0


def test_captured_cycles_in_turn(qs, alternating, without_graphs):
    """Each goes on where the other stopped: newest tokens, texts, seeds, and which rows are running."""
    qs.reset()
    asked = requests(7, 12)
    with contextlib.closing(Engine(qs, max_sequences=4, num_speculative_tokens="auto")) as engine:
        texts = texts_of(engine, asked)
    check_texts(qs, asked, texts)
    qs.reset()


def test_a_full_memory_while_another_plan_is_captured(qs, alternating, without_graphs, monkeypatch):
    """What was captured is given back, and the cycle is run as it was chosen."""
    qs.reset()
    asked = [Request(random_prompt(9 + seed, seed), 30, ()) for seed in range(3)]
    capture, calls = CycleReplay._capture, []

    def full_at_times(self, plan):
        calls.append(plan)
        if len(calls) in (2, 5):
            raise torch.OutOfMemoryError("no more")
        capture(self, plan)

    with contextlib.closing(Engine(qs, max_sequences=4, num_speculative_tokens="auto")) as engine:
        monkeypatch.setattr(CycleReplay, "_capture", full_at_times)
        texts = texts_of(engine, asked)
    assert calls[1] == calls[2]
    assert calls[4] == calls[5]
    check_texts(qs, asked, texts)
    qs.reset()


# --- Captures --------------------------------------------------------------------------------------------------------


def test_a_warm_engine_captures_no_plan_of_any_size(qs, alternating, without_graphs):
    qs.reset()
    asked = [Request(random_prompt(5 * GROUP, seed), 20, ()) for seed in range(6)]
    without_graphs.clear()
    with contextlib.closing(Engine(qs, max_sequences=4, num_speculative_tokens="auto")) as engine:
        engine.warm_up()
        made = [(replay.cycle.cache.batch_size, replay._packed.shape[1] - 5) for replay in without_graphs]
        assert sorted(made) == [(size, count) for size in (1, 2, 4) for count in (0, 2, MOST)]
        texts = texts_of(engine, asked)
        assert len(without_graphs) == len(made)
    check_texts(qs, asked, texts)
    qs.reset()


@pytest.mark.parametrize(
    ("own", "asked", "expected"),
    [
        (4, None, (4,)),
        (4, 0, (0,)),
        (6, "auto", (0, 3, 6)),
        (1, "auto", (0, 1)),
        (0, "auto", (0, 2, 4)),
        ("auto", None, (0, 2, 4)),
        ("auto", 3, (3,)),
    ],
)
def test_what_there_is_to_choose_from(tiny_pair_of, own, asked, expected):
    sizes = Sizes.of(tiny_pair_of(own), 2, None, 1024, 0.9, asked, None)
    assert sizes.draft_counts == expected
    assert sizes.num_drafts == max(expected)


@pytest.fixture(scope="module")
def tiny_pair_of(qs):
    """A pair whose own number of drafts is that."""

    def make(count: int | str) -> quantspec.QuantSpecModel:
        return quantspec.convert(qs.model, kv_group_size=GROUP, self_check=False, num_speculative_tokens=count)

    return make


# --- Times -----------------------------------------------------------------------------------------------------------


class Simulation:
    """Cycles of an engine on a machine that is none.

    Attributes:
        rate: probability that a draft is accepted.
        seconds: that a cycle takes by its size and number of drafts.
        cycles: what was run, ``(size, drafts, seconds, tokens)``.
        told: seconds that the choice was told of each cycle, None if it was not.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, qs: quantspec.QuantSpecModel) -> None:
        self.rate = 1.0
        self.clock = 0.0
        self.cycles: list[tuple[int, int, float, int]] = []
        self.told: list[float | None] = []
        noise = torch.Generator().manual_seed(0)

        def accept(drafts, scores):
            accepted = (torch.rand(drafts.shape, generator=noise) < self.rate).long().cumprod(1).sum(1)
            return accepted, scores.argmax(-1).gather(1, accepted[:, None]).squeeze(1)

        run, rehearse, fill, record = Batch.run, Batch.rehearse, qs.pair.fill, AutoDraftCount.record

        def timed(batch):
            asked = batch.plan.num_drafts
            run(batch)
            taken = self.seconds(len(batch.requests), asked)
            self.clock += taken
            self.cycles.append((len(batch.requests), asked, taken, len(batch.rows) + sum(batch.accepted)))

        def rehearsed(batch):
            rehearse(batch)
            self.clock += self.seconds(len(batch.requests), batch.plan.num_drafts)

        def filled(*arguments, **options):
            self.clock += 1.0
            return fill(*arguments, **options)

        def recorded(count, plan, matched, accepted, seconds, capturing=0.0):
            self.told.append(seconds)
            record(count, plan, matched, accepted, seconds, capturing)

        monkeypatch.setattr(time, "perf_counter", lambda: self.clock)
        monkeypatch.setattr(Batch, "run", timed)
        monkeypatch.setattr(Batch, "rehearse", rehearsed)
        monkeypatch.setattr(AutoDraftCount, "record", recorded)
        monkeypatch.setitem(vars(qs.pair), "fill", filled)
        monkeypatch.setattr(qs.session, "rule", accept)
        monkeypatch.setattr("quantspec.serving.draft_choice.ON_CPU", ON_GPU)

    @staticmethod
    def seconds(size: int, drafts: int) -> float:
        """Drafts pay for one row where more than a third of them stand, and never for sixteen."""
        return 0.010 + drafts * (0.003 if size == 1 else 0.012)

    def decode(self, engine: Engine, rows: int, cycles: int) -> list[tuple[int, int, float, int]]:
        """As many cycles of so many rows, of requests that follow each other; returns them."""
        first = len(self.cycles)
        ids: set[int] = set()
        while len(self.cycles) < first + cycles:
            while len(ids) < rows:
                ids.add(engine.add(Request(random_prompt(3, len(self.cycles)), 400, (), {"do_sample": False})))
            ids -= {output.id for output in engine.step() if output.finish_reason is not None}
        for id in ids:
            engine.cancel(id)
        engine.step()
        return self.cycles[first:]


@pytest.fixture
def simulation(monkeypatch, qs) -> Simulation:
    return Simulation(monkeypatch, qs)


@pytest.fixture
def of_sixteen(simulation, qs) -> Iterator[Engine]:
    with contextlib.closing(Engine(qs, max_sequences=16, num_speculative_tokens="auto")) as engine:
        yield engine


def share(cycles: list[tuple[int, int, float, int]], drafts: int, size: int) -> float:
    """Of the cycles of this size, those with so many drafts."""
    own = [cycle for cycle in cycles if cycle[0] == size]
    return sum(cycle[1] == drafts for cycle in own) / len(own)


def rate(cycles: list[tuple[int, int, float, int]]) -> float:
    """Tokens per second."""
    return sum(cycle[3] for cycle in cycles) / sum(cycle[2] for cycle in cycles)


def test_each_bucket_settles_on_what_is_fastest_there(simulation, of_sixteen):
    """Within a dozen cycles: drafts for one row, and none for sixteen."""
    simulation.decode(of_sixteen, 1, 12)
    one = simulation.decode(of_sixteen, 1, 80)
    sixteen = simulation.decode(of_sixteen, 16, 80)
    settled = [cycle for cycle in sixteen if cycle[0] == 16][12:]
    assert len(settled) > 30
    assert share(one, MOST, 1) > 0.95
    assert share(settled, 0, 16) > 0.95
    # What one bucket has learned is not forgotten by the other.
    assert share(simulation.decode(of_sixteen, 1, 40), MOST, 1) > 0.95


def test_a_change_of_acceptance_is_followed(simulation, of_sixteen):
    """At once where drafts no longer pay, and by a trial now and then where they do again; trials cost little."""
    simulation.decode(of_sixteen, 1, 20)
    simulation.rate = 0.0
    simulation.decode(of_sixteen, 1, 20)
    poor = simulation.decode(of_sixteen, 1, 300)
    assert share(poor, 0, 1) > 0.95
    assert share(poor, 0, 1) < 1
    assert rate(poor) > 0.97 / simulation.seconds(1, 0)
    simulation.rate = 1.0
    simulation.decode(of_sixteen, 1, 150)
    assert share(simulation.decode(of_sixteen, 1, 40), MOST, 1) > 0.95


def test_half_as_many_where_few_are_accepted(simulation, of_sixteen):
    simulation.rate = 0.5
    simulation.decode(of_sixteen, 1, 60)
    cycles = simulation.decode(of_sixteen, 1, 100)
    assert share(cycles, 2, 1) > 0.8
    by_number = {drafts: sum(0.5**n for n in range(drafts + 1)) / simulation.seconds(1, drafts) for drafts in (0, 2, 4)}
    assert max(by_number, key=by_number.__getitem__) == 2


def test_acceptance_that_one_bucket_learns_holds_for_all(simulation, of_sixteen):
    """A draft that is never accepted is not found out again for each number of requests."""
    simulation.rate = 0.0
    simulation.decode(of_sixteen, 1, 100)
    first = len(simulation.cycles)
    simulation.decode(of_sixteen, 2, 30)
    drafted = [cycle for cycle in simulation.cycles[first:] if cycle[:2] in ((2, 2), (2, MOST))]
    assert len(drafted) <= 1


def test_a_warm_engine_begins_with_what_is_fastest(simulation, qs, without_graphs):
    """Nothing has to be tried where the times of all plans are known."""
    qs.reset()
    with contextlib.closing(Engine(qs, max_sequences=16, num_speculative_tokens="auto")) as engine:
        engine.warm_up()
        sixteen = simulation.decode(engine, 16, 60)
        assert share(sixteen, 0, 16) == 1
        assert share(simulation.decode(engine, 1, 20), MOST, 1) > 0.95
    qs.reset()


def test_only_decoding_is_timed(simulation, qs):
    """Neither a step that also prefilled nor the first of a batch, nor one whose rows need the host."""
    sizes = {"max_sequences": 4, "max_num_batched_tokens": GROUP, "num_speculative_tokens": "auto"}
    with contextlib.closing(Engine(qs, **sizes)) as engine:
        # The second prompt has twelve chunks, the last of which is followed by a cycle of both rows.
        for length, steps in ((3, 6), (12 * GROUP, 16)):
            engine.add(Request(random_prompt(length, length), 200, (), {"do_sample": False}))
            for _ in range(steps):
                engine.step()
        engine.add(Request(random_prompt(3, 1), 60, (), {"logits_processor": [Host()]}))
        for _ in range(4):
            engine.step()
    untimed = {0, *range(6, 18), *range(22, 26)}
    expected = [None if place in untimed else cycle[2] for place, cycle in enumerate(simulation.cycles)]
    assert simulation.told == [None if seconds is None else pytest.approx(seconds) for seconds in expected]


def test_time_to_capture_and_to_change_cycles_is_left_out(simulation, qs, alternating, without_graphs, monkeypatch):
    qs.reset()
    capture, begin = CycleReplay._capture, CycleReplay.begin

    def slow_capture(self, plan):
        simulation.clock += 16.0
        capture(self, plan)

    def slow_begin(self, *arguments):
        simulation.clock += 4.0
        begin(self, *arguments)

    monkeypatch.setattr(CycleReplay, "_capture", slow_capture)
    monkeypatch.setattr(CycleReplay, "begin", slow_begin)
    with contextlib.closing(Engine(qs, max_sequences=1, num_speculative_tokens="auto")) as engine:
        simulation.decode(engine, 1, 10)
    # The first cycle of each of three plans captures it.
    firsts = [alternating.index(count) for count in (0, 2, MOST)]
    taken = [None if place in firsts else cycle[2] for place, cycle in enumerate(simulation.cycles)]
    assert simulation.told == [None if seconds is None else pytest.approx(seconds) for seconds in taken]
    qs.reset()


# --- What is reported ------------------------------------------------------------------------------------------------


def test_cycles_without_drafts_are_no_drafts(qs, alternating):
    with contextlib.closing(Engine(qs, max_sequences=1, num_speculative_tokens="auto")) as engine:
        (outputs,) = engine.generate([Request(random_prompt(20, 1), 60, (), {"do_sample": False})])
        statistics = engine.statistics()
    assert statistics.cycles == len(alternating)
    assert statistics.drafts == sum(count > 0 for count in alternating)
    # On a CPU no more is drafted than the text may still need.
    assert sum(alternating) - MOST <= statistics.draft_tokens <= sum(alternating)
    assert (outputs[-1].drafted, outputs[-1].accepted) == (statistics.draft_tokens, statistics.accepted_tokens)
    with contextlib.closing(Engine(qs, max_sequences=1, num_speculative_tokens=0)) as engine:
        engine.generate([Request(random_prompt(20, 1), 10, ())])
        statistics = engine.statistics()
    assert (statistics.cycles, statistics.drafts, statistics.draft_tokens, statistics.accepted_tokens) == (9, 0, 0, 0)
