"""The count of drafts: what "auto" makes of simulated machines and texts, and what it is told of real cycles."""

import time
from types import SimpleNamespace

import pytest
import torch
from conftest import GROUP
from simulated_decoding import Decoding, Machine, Row, Run, row
from step_by_step import assert_same_text, random_prompt

from quantspec.cache import HierarchicalCache
from quantspec.config import Draft
from quantspec.engine.acceptance import Acceptance
from quantspec.engine.cycle import Cycle
from quantspec.engine.draft_count import SELF_COUNTS, AutoDraftCount, DraftCount, FixedDraftCount
from quantspec.engine.durations import ON_CPU, ON_GPU, Durations
from quantspec.engine.odds import Odds
from quantspec.engine.plan import PLAIN, Plan, Source

# An 8B shape at 4k and 128k tokens and SmolLM2-135M on an H100 (docs/benchmarks.md), and a small model on a CPU.
SHORT, LONG, BATCH = Machine(6.35, 0.03, 2.22), Machine(9.8, 0.04, 4.0), Machine(9.0, 0.35, 2.5)
SMALL, CPU = Machine(1.31, 0.02, 0.76), Machine(25.0, 4.0, 27.0)
# Of SmolLM2's 30 layers there, to capture a pass that was compiled before.
CAPTURE = 90.0
# Machine, kind of text, acceptance, rows.
WORKLOADS = {
    "code, long": (LONG, "new", 0.97, 1),
    "prose, short": (SHORT, "new", 0.93, 1),
    "prose, less accepted": (SHORT, "new", 0.8, 1),
    "hot": (SHORT, "new", 0.6, 1),
    "a broken draft": (SHORT, "new", 0.05, 1),
    "a small model": (SMALL, "new", 0.9, 1),
    "copying": (SHORT, "copy", 0.95, 1),
    "copying on a CPU": (CPU, "copy", 0.9, 1),
    "prose on a CPU": (CPU, "new", 0.9, 1),
    "sixteen rows": (BATCH, "new", 0.85, 16),
    "four rows that copy": (SHORT, "copy", 0.9, 4),
    "both in turns": (SHORT, "turns", 0.9, 1),
}
GAMMAS = (0, 1, 2, 4, 6, 7, 8, 12)


def auto(machine: Machine, draft: Draft) -> AutoDraftCount:
    return AutoDraftCount(ON_CPU if machine is CPU else ON_GPU, draft)


@pytest.mark.parametrize("name", WORKLOADS)
def test_auto_is_as_fast_as_the_best_fixed_number(name):
    """Within 3% of it, from its first cycle on, with and without lookups, and of plain decoding where that is best."""
    machine, kind, acceptance, rows = WORKLOADS[name]
    tokens = {1: 4000, 4: 2500, 16: 1000}[rows]
    decoding = Decoding(machine, [row(kind, tokens, acceptance, seed) for seed in range(rows)])
    fixed = {
        (draft, gamma): decoding.run(FixedDraftCount(gamma, draft)).speed()
        for draft, gammas in ((Draft.SELF, GAMMAS), (Draft.LOOKUP, (3, 15)), (Draft.BOTH, (4, 8)))
        for gamma in gammas
    }
    speeds = {draft: decoding.run(auto(machine, draft)).speed() for draft in Draft}
    assert speeds[Draft.SELF] > 0.97 * max(fixed[Draft.SELF, gamma] for gamma in GAMMAS)
    assert speeds[Draft.BOTH] > 0.97 * max(fixed.values())
    assert min(speeds.values()) > 0.97 * fixed[Draft.SELF, 0]


@pytest.mark.parametrize("name", ["prose, short", "a small model", "copying", "a broken draft"])
def test_captures_are_paid_once(name):
    """Texts of 1,500 tokens: what a machine captures shows in the first, and hardly in the third."""
    machine, kind, acceptance, _ = WORKLOADS[name]
    decoding = Decoding(machine._replace(capture=CAPTURE), [row(kind, 1500, acceptance, 5)])

    def speeds(count: DraftCount) -> list[float]:
        captured: set[Plan] = set()
        return [decoding.run(count, captured).speed() for _ in range(3)]

    ours, plain = speeds(auto(machine, Draft.BOTH)), speeds(FixedDraftCount(0))
    best = max(speeds(FixedDraftCount(gamma))[2] for gamma in GAMMAS)
    assert ours[0] > 0.93 * plain[0]
    assert ours[2] > 0.97 * plain[2]
    assert ours[2] > 0.92 * best


def test_what_is_captured_pays_for_it():
    """Another plan is captured once it would have saved what that takes, and no later than twice that."""
    machine = SHORT._replace(capture=CAPTURE)
    decoding = Decoding(machine, [row("new", 4000, 0.3, 0)])
    run = decoding.run(AutoDraftCount(ON_GPU))
    captures = [place for place, (_, plan, taken, _) in enumerate(run.cycles) if taken > machine.seconds(plan)]
    lost = sum(taken - machine.plain * tokens for _, _, taken, tokens in run.cycles[1 : captures[1]])
    assert 0.3 * CAPTURE < lost < 3 * CAPTURE
    assert run.speed() > 0.95 / machine.plain


def test_a_known_machine_is_begun_with_at_its_best():
    """Where a draft's steps cost as much as the target's, nothing is drafted from the first cycle on."""
    machine = Machine(10.0, 0.1, 12.0, 20.0)
    plans = [PLAIN, *map(Plan, SELF_COUNTS)]
    known = SimpleNamespace(seconds={plan: machine.seconds(plan) / 1000 for plan in (PLAIN, Plan(4))})
    decoding = Decoding(machine, [row("new", 1000, 0.9, 0)])
    run = decoding.run(AutoDraftCount(ON_GPU, known_times=known))
    assert {plan for _, plan, *_ in run.cycles[:40]} == {PLAIN}
    assert run.speed() > 0.97 * decoding.run(FixedDraftCount(0)).speed()
    # Nobody knows: a fiftieth of the time may go into learning what plain decoding takes.
    first = decoding.run(AutoDraftCount(ON_GPU))
    assert PLAIN in {plan for _, plan, *_ in first.cycles}
    assert set(plans) >= {plan for _, plan, *_ in first.cycles}


def test_a_cpu_whose_drafts_are_cheap_is_found_out():
    """It is expected to lose by drafts, which two trials refute; a draft that fails costs one trial."""
    machine = Machine(25.0, 2.0, 8.0)
    decoding = Decoding(machine, [row("new", 200, 0.95, 0)])
    run = decoding.run(AutoDraftCount(ON_CPU))
    assert PLAIN not in {plan for _, plan, *_ in run.cycles[16:-2]}
    assert run.speed() > 1.3 * decoding.run(FixedDraftCount(0)).speed()
    broken = Decoding(machine, [row("new", 200, 0.0, 0)])
    assert sum(plan != PLAIN for _, plan, *_ in broken.run(AutoDraftCount(ON_CPU)).cycles) == 1


def test_rows_that_differ_are_not_taken_for_their_average():
    """One row that accepts everything and one that accepts nothing yield less of long drafts than two of the middle."""
    odds = Odds()
    for _ in range(60):
        odds.record(Plan(6), [0, 0], [6, 0])
    outlook = odds.of([0, 0])
    assert outlook.tokens(Plan(6)) == pytest.approx(7 + 1, abs=0.9)
    assert odds.of([0, None]).tokens(Plan(6)) > 6
    odds.begin()
    # Other texts: each is like all of those before.
    rates = odds.of([0, 0]).own
    assert rates[0] == rates[1]


def changing(machine: Machine, first: float, then: float) -> tuple[Decoding, int]:
    """A text in whose middle acceptance changes, and where."""
    parts = [row("new", 1500, acceptance, seed) for seed, acceptance in enumerate((first, then))]
    written = parts[0].text[1500:] + parts[1].text[1500:]
    agrees = parts[0].agrees[:3000] + parts[1].agrees[1500:]
    return Decoding(machine, [Row(parts[0].text[:1500] + written, 1500, agrees)]), 1500


@pytest.mark.parametrize(("first", "then"), [(0.95, 0.05), (0.05, 0.95), (0.95, 0.5), (0.5, 0.95)])
def test_auto_follows_a_change_of_acceptance_within_a_hundred_tokens(first, then):
    decoding, change = changing(SHORT, first, then)
    best = max(decoding.run(FixedDraftCount(gamma)).speed(change + 100) for gamma in GAMMAS)
    run = decoding.run(AutoDraftCount(ON_GPU))
    assert run.speed(change + 100) > 0.95 * best
    assert run.speed(change + 100, change + 400) > 0.9 * best


def test_auto_follows_a_text_that_begins_to_copy_and_ends_to():
    """From the hundredth token of each part on; what a lookup finds in new text right after a copy deceives longer."""
    decoding = Decoding(SHORT, [row("turns", 4000, 0.9, 1)])
    fixed = [decoding.run(count) for count in (FixedDraftCount(4), FixedDraftCount(15, Draft.LOOKUP))]
    run = decoding.run(AutoDraftCount(ON_GPU, Draft.BOTH))
    for part, enough in enumerate((0.97, 0.85, 0.97, 0.85)):
        bounds = part * 1000 + 100, (part + 1) * 1000
        assert run.speed(*bounds) > enough * max(other.speed(*bounds) for other in fixed)


def sources(run: Run) -> set[Source]:
    return {plan.source for _, plan, *_ in run.cycles if plan.num_drafts}


def test_a_broken_draft_is_tried_for_a_hundredth_of_the_time():
    decoding = Decoding(SHORT, [row("new", 4000, 0.0, 1)])
    run = decoding.run(AutoDraftCount(ON_GPU))
    drafting = [plan.num_drafts for _, plan, *_ in run.cycles[100:] if plan != PLAIN]
    assert 0 < len(drafting) < 0.02 * len(run.cycles)
    assert set(drafting) <= {1, 2}
    assert run.speed() > 0.98 / SHORT.plain


def test_each_source_is_used_only_where_it_is_asked_for():
    decoding = Decoding(SHORT, [row("turns", 2000, 0.9, 1)])
    expected = {Draft.SELF: {Source.SELF}, Draft.LOOKUP: {Source.LOOKUP}, Draft.BOTH: set(Source)}
    for draft, used in expected.items():
        assert sources(decoding.run(AutoDraftCount(ON_GPU, draft))) == used
        assert sources(decoding.run(FixedDraftCount(6, draft))) == used
    for draft in Draft:
        assert {plan.num_drafts for _, plan, *_ in decoding.run(FixedDraftCount(6, draft)).cycles} <= {0, 6}
        assert not sources(decoding.run(FixedDraftCount(0, draft)))


def test_few_plans_are_run():
    """The first four hundred tokens of a text capture three at the most."""
    for machine, kind, acceptance, rows in WORKLOADS.values():
        if machine is not CPU and rows == 1:
            decoding = Decoding(machine._replace(capture=CAPTURE), [row(kind, 400, acceptance, 3)])
            run = decoding.run(AutoDraftCount(ON_GPU, Draft.BOTH))
            assert len({plan for _, plan, *_ in run.cycles}) <= 3


@pytest.mark.parametrize("stalls", [1, 2])
@pytest.mark.parametrize("stalled", [PLAIN, Plan(2), Plan(6), Plan(15, Source.LOOKUP)])
def test_auto_forgets_slow_cycles(stalled, stalls):
    """Whichever plan's cycles take long, and be it two in a row."""
    decoding = Decoding(SHORT, [row("turns", 2000, 0.9, 1)])
    expected = decoding.run(AutoDraftCount(ON_GPU, Draft.BOTH)).speed()
    count = AutoDraftCount(ON_GPU, Draft.BOTH)
    for _ in range(stalls):
        count.record(stalled, [4], [stalled.num_drafts], 30_000.0)
    assert decoding.run(count).speed() > 0.9 * expected


def test_a_first_cycle_and_one_without_a_time_are_not_timed():
    count = AutoDraftCount()
    for seconds in (100.0, None, 2.0, None, 2.2, 2.1):
        count.record(Plan(4), [0], [4], seconds)
    assert count.durations.seconds[Plan(4)] == 2.0


def test_durations_of_other_plans_are_expected_by_those_measured():
    plans = [PLAIN, Plan(2), Plan(4), Plan(8)]
    durations = Durations(plans, ON_GPU)
    assert [durations.seconds[plan] for plan in plans] == [ON_GPU.of(plan) for plan in plans]
    # In proportion until two are known, and then on the line through them.
    for seconds in (2.1, 2.0):
        durations.add(Plan(4), seconds)
    assert durations.seconds[Plan(2)] == pytest.approx(2.0 * ON_GPU.of(Plan(2)) / ON_GPU.of(Plan(4)))
    for seconds in (1.2, 1.0):
        durations.add(PLAIN, seconds)
    assert durations.seconds[Plan(8)] == pytest.approx(3.0)
    # A single one may have been delayed.
    durations.add(Plan(8), 50.0)
    assert durations.seconds[Plan(8)] == pytest.approx(3.0)
    durations.add(Plan(8), 40.0)
    assert durations.seconds[Plan(8)] == 40.0


def test_durations_of_an_earlier_process_are_scaled_to_what_is_measured():
    plans = [PLAIN, Plan(2), Plan(4), Plan(8)]
    durations = Durations(plans, ON_GPU, {PLAIN: 1.0, Plan(4): 3.0})
    assert [durations.seconds[plan] for plan in plans] == [1.0, 2.0, 3.0, 5.0]
    durations.add(Plan(4), 6.0)
    assert [durations.seconds[plan] for plan in plans] == [2.0, 4.0, 6.0, 10.0]


def test_odds_are_those_of_the_newest_trials():
    """By source, and for lookups by the length of the match and whether the first token stood."""
    odds = Odds()
    for _ in range(200):
        odds.record(Plan(4), [0], [4])
        odds.record(Plan(3, Source.LOOKUP), [1, 9, 0], [0, 3, 0])
    assert odds.of([0]).tokens(Plan(4)) == pytest.approx(5, abs=0.1)
    assert odds.of([1, 9, 0]).tokens(Plan(3, Source.LOOKUP)) == pytest.approx(1 + 4 + 1, abs=0.1)
    assert odds.of([1, 9]).tokens(PLAIN) == 2
    for _ in range(200):
        odds.record(Plan(4), [0], [0])
    assert odds.of([0]).tokens(Plan(4)) == pytest.approx(1, abs=0.2)


def test_a_cycle_whose_graph_was_captured_is_not_timed(qs, monkeypatch):
    """Neither is the capture, nor the change to another graph; a call's own time has all of it."""
    clock = 0.0

    def passes(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: clock)

    class Replayed:
        """A graph that is none."""

        def __init__(self, plan: Plan, cache: HierarchicalCache) -> None:
            passes(16.0)
            self.plan, self.of_cache = plan, cache
            self.cycle = Cycle(qs.pair, cache, Acceptance(lambda logits, _: logits.float(), compiles=False))

        def begin(self, *_) -> None:
            passes(4.0)

        def flush(self) -> None:
            self.of_cache.flush()

        def __call__(self) -> torch.Tensor:
            passes(1.0 + self.plan.num_drafts / 4)
            return self.cycle(*self.plan)[0]

    class Alternating(FixedDraftCount):
        """2 drafts and 1 in turn; keeps what it is told."""

        def __init__(self) -> None:
            super().__init__(2)
            self.seconds: list[tuple[int, float | None]] = []

        def choose(self, *_) -> Plan:
            return Plan(1 + len(self.seconds) % 2)

        def record(self, plan, matched, accepted, seconds, capturing) -> None:
            self.seconds.append((plan.num_drafts, seconds))

    graphs: dict[Plan, Replayed] = {}

    def replay(_, cache, plan, *__) -> tuple[Replayed, bool]:
        is_new = plan not in graphs
        graphs[plan] = graphs.get(plan) or Replayed(plan, cache)
        return graphs[plan], is_new

    counts = Alternating()
    monkeypatch.setattr(type(qs.session.replays), "suit", lambda *_: True)
    monkeypatch.setattr(type(qs.session.replays), "of", replay)
    monkeypatch.setattr(type(qs.session), "draft_count", lambda *_: counts)
    qs.generate(torch.tensor([random_prompt(2 * GROUP)]), max_new_tokens=12, eos_token_id=None, do_sample=False)
    numbers = [number for number, _ in counts.seconds]
    assert numbers[:4] == [1, 2, 1, 2]
    cycles = [1.0 + number / 4 for number in numbers]
    assert [seconds for _, seconds in counts.seconds] == [None, None, *cycles[2:]]
    # Two captures, and a change of graphs in every cycle.
    assert qs.last_stats.decode_seconds == 2 * 16.0 + 4.0 * len(cycles) + sum(cycles)


@pytest.mark.parametrize("draft", list(Draft))
def test_auto_generates_the_same_text(qs, draft):
    prompt = 3 * random_prompt(GROUP, 7)
    options = {"max_new_tokens": 8 * GROUP, "eos_token_id": None, "do_sample": False}
    expected = qs.generate(torch.tensor([prompt]), num_speculative_tokens=0, **options)[0, len(prompt) :].tolist()
    ours = qs.generate(torch.tensor([prompt]), num_speculative_tokens="auto", draft=draft, **options)
    assert_same_text(qs, prompt, ours[0, len(prompt) :].tolist(), expected)
    # Whether drafts of its own are tried is a matter of measured times.
    assert draft is Draft.SELF or qs.last_stats.drafted > 0
