"""The number of drafts that "auto" settles on, in simulated time."""

import random
import time

import pytest
import torch
from conftest import GROUP
from step_by_step import assert_same_text, random_prompt

from quantspec.cache import HierarchicalCache
from quantspec.engine.acceptance import Acceptance
from quantspec.engine.cycle import Cycle
from quantspec.engine.draft_count import AUTO_CHOICES, PLAIN_START, AutoDraftCount, FixedDraftCount


def run(
    auto: AutoDraftCount, acceptance: float, draft: float, verify: float, cycles: int = 600, tried: set | None = None
) -> AutoDraftCount:
    """Feed a chooser cycles of a machine with these times; ``tried`` gets the numbers it chose."""
    chance = random.Random(0)
    for _ in range(cycles):
        chosen = auto.choose()
        if tried is not None:
            tried.add(chosen)
        accepted = next((n for n in range(chosen) if chance.random() > acceptance), chosen)
        auto.record(chosen, [accepted], verify + chosen * draft)
    return auto


def rate(n: int, acceptance: float, draft: float, verify: float) -> float:
    """Tokens per second of that machine with n drafts."""
    return sum(acceptance**i for i in range(n + 1)) / (verify + n * draft)


# Seconds.
STALL = 30.0
MACHINES = [(0.95, 0.3, 1.0), (0.8, 0.3, 1.0), (0.5, 0.2, 1.0), (0.9, 0.9, 1.0), (0.97, 0.02, 1.0)]


@pytest.mark.parametrize("machine", MACHINES)
def test_auto_finds_the_fastest_number(machine):
    fastest = run(AutoDraftCount(), *machine).fastest()
    assert rate(fastest, *machine) > 0.95 * max(rate(n, *machine) for n in AUTO_CHOICES)


@pytest.mark.parametrize("machine", MACHINES[::2])
@pytest.mark.parametrize("stalled", AUTO_CHOICES)
def test_auto_recovers_from_slow_cycles(machine, stalled):
    """Whichever cycle of a number takes long, from the first on, and be it two in a row."""
    # Acceptance is an average of the last tokens, so the number that is chosen varies a little.
    enough = 0.9 * max(rate(n, *machine) for n in AUTO_CHOICES)
    for earlier in (0, 1, 3):
        for stalls in (1, 2):
            auto = AutoDraftCount()
            for _ in range(earlier):
                auto.record(stalled, [stalled], machine[2] + stalled * machine[1])
            for _ in range(stalls):
                auto.record(stalled, [stalled], STALL)
            assert rate(run(auto, *machine, cycles=1500).fastest(), *machine) > enough
    auto = run(AutoDraftCount(), *machine)
    auto.record(stalled, [stalled], STALL)
    assert rate(auto.fastest(), *machine) > enough


def test_a_first_cycle_and_one_without_a_time_are_not_timed():
    auto = AutoDraftCount()
    for number in (4, 0):
        for seconds in (100.0, None, 1.0 + 0.1 * number, None, 1.0 + 0.1 * number, 1.0 + 0.1 * number):
            assert auto.choose() == number
            auto.record(number, [number], seconds)
    assert auto.tokens_per_second(0) == 1.0
    assert auto.fastest() == 8


@pytest.mark.parametrize("machine", MACHINES)
def test_auto_from_plain_decoding_finds_the_fastest_number(machine):
    # Acceptance is an average of the last tokens, so the number that is chosen varies a little.
    fastest = run(AutoDraftCount(PLAIN_START), *machine, cycles=4000).fastest()
    assert rate(fastest, *machine) > 0.9 * max(rate(n, *machine) for n in AUTO_CHOICES)


def test_auto_from_plain_decoding_drafts_one_cycle_in_a_hundred_where_that_is_slow():
    auto = AutoDraftCount(PLAIN_START)
    drafted = []
    for _ in range(1000):
        number = auto.choose()
        drafted.append(number)
        auto.record(number, [number], 1.0 + 2.0 * number)
    assert not any(drafted[:100])
    assert set(drafted) == {0, 1}
    assert drafted.count(1) <= 10


def test_auto_tries_the_neighbours_of_the_fastest_number_and_plain_decoding():
    machine = (0.7, 0.25, 1.0)
    auto = run(AutoDraftCount(), *machine, cycles=1000)
    tried: set[int] = set()
    run(auto, *machine, cycles=600, tried=tried)
    place = AUTO_CHOICES.index(auto.fastest())
    assert tried >= {0, *AUTO_CHOICES[place - 1 : place + 2]}
    assert rate(auto.fastest(), *machine) > 0.95 * max(rate(n, *machine) for n in AUTO_CHOICES)


def test_auto_falls_back_to_plain_decoding_and_returns():
    """Where drafts are worthless nothing is drafted; when they get better it is noticed."""
    auto = run(AutoDraftCount(), 0.05, 0.5, 1.0)
    assert auto.fastest() == 0
    for _ in range(8000):
        chosen = auto.choose()
        auto.record(chosen, [chosen], 1.0 + 0.1 * chosen)
    assert auto.fastest() > 0


def test_a_cycle_whose_graph_was_captured_is_not_timed(qs, monkeypatch):
    """Neither is the capture, nor the change to another graph; a call's own time has all of it."""
    clock = 0.0

    def passes(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: clock)

    class Replayed:
        """A graph that is none."""

        def __init__(self, num_drafts: int, cache: HierarchicalCache) -> None:
            passes(16.0)
            self.num_drafts, self.of_cache = num_drafts, cache
            self.cycle = Cycle(qs.pair, cache, Acceptance(lambda logits, _: logits.float(), compiles=False))

        def begin(self, *_) -> None:
            passes(4.0)

        def flush(self) -> None:
            self.of_cache.flush()

        def __call__(self) -> torch.Tensor:
            passes(1.0 + self.num_drafts / 4)
            return self.cycle(self.num_drafts)[0]

    class Alternating(FixedDraftCount):
        """2 drafts and 1 in turn; keeps what it is told."""

        def __init__(self) -> None:
            super().__init__(2)
            self.seconds: list[tuple[int, float | None]] = []

        def choose(self) -> int:
            return 1 + len(self.seconds) % 2

        def record(self, num_drafts, accepted, seconds) -> None:
            self.seconds.append((num_drafts, seconds))

    graphs: dict[int, Replayed] = {}

    def replay(_, cache, num_drafts, *__) -> tuple[Replayed, bool]:
        is_new = num_drafts not in graphs
        graphs[num_drafts] = graphs.get(num_drafts) or Replayed(num_drafts, cache)
        return graphs[num_drafts], is_new

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


def test_auto_generates_the_same_text(qs):
    prompt = random_prompt(2 * GROUP + 8, 7)
    # On a CPU the first drafts come after some cycles without any.
    options = {"max_new_tokens": 8 * GROUP, "eos_token_id": None, "do_sample": False}
    expected = qs.generate(torch.tensor([prompt]), num_speculative_tokens=0, **options)[0, len(prompt) :].tolist()
    ours = qs.generate(torch.tensor([prompt]), num_speculative_tokens="auto", **options)[0, len(prompt) :].tolist()
    assert_same_text(qs, prompt, ours, expected)
    assert qs.last_stats.drafted > 0
