"""Statistics add up, print as a table and go into JSON, rates under vLLM's names."""

from __future__ import annotations

import json
import time

import pytest
import torch
from conftest import GROUP
from step_by_step import random_prompt
from transformers import MaxTimeCriteria, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from quantspec import GenerationStats
from quantspec.cache import HierarchicalCache
from quantspec.engine.draft_count import AutoDraftCount
from quantspec.engine.plan import Plan, Source
from quantspec.pair.pair import by_address
from quantspec.passes import Role

LONG = 2 * GROUP + 8
RATES = ("draft_acceptance_rate", "mean_acceptance_length", "acceptance_histogram", "acceptance_rate_per_position")


def run(qs, prompts: list[list[int]], max_new_tokens: int, **options) -> GenerationStats:
    """Statistics of one call."""
    options.setdefault("eos_token_id", None)
    qs.generate(torch.tensor(prompts), max_new_tokens=max_new_tokens, **options)
    return qs.last_stats


@pytest.mark.parametrize("gamma", [0, 1, 4, 7])
def test_counts_add_up(qs, gamma):
    """For one sequence that ends by length, every count follows from the others."""
    stats = run(qs, [random_prompt(LONG)], 2 * GROUP + 3, num_speculative_tokens=gamma)
    assert stats.num_speculative_tokens == gamma
    assert (stats.prompt_tokens, stats.generated_tokens) == (LONG, 2 * GROUP + 3)
    # The prompt gives the first token; each cycle gives its accepted tokens and one of the target's.
    assert stats.generated_tokens == 1 + stats.cycles + stats.accepted
    assert_consistent(stats)
    assert stats.flushes == 2


def assert_consistent(stats: GenerationStats) -> None:
    """What holds of any call."""
    gamma = stats.num_speculative_tokens
    assert len(stats.drafted_per_position) == len(stats.accepted_per_position) == gamma
    assert len(stats.acceptance_histogram) == gamma + 1
    assert sum(stats.drafted_per_position) == sum(stats.drafted_by_source.values()) == stats.drafted
    assert sum(stats.accepted_by_source.values()) == stats.accepted
    assert sum(stats.accepted_per_position) == stats.accepted
    assert sum(stats.acceptance_histogram) == stats.cycles
    assert sum(count * cycles for count, cycles in enumerate(stats.acceptance_histogram)) == stats.accepted
    assert stats.drafted <= gamma * stats.cycles
    # Cycles of the batch, of which each running sequence counts one.
    assert len(stats.drafted_per_cycle) == len(stats.accepted_per_cycle) == len(stats.seconds_per_cycle)
    assert stats.cycles / stats.num_sequences <= len(stats.accepted_per_cycle) <= stats.cycles
    assert sum(stats.drafted_per_cycle) == stats.drafted
    assert sum(stats.accepted_per_cycle) == stats.accepted
    assert sum(stats.seconds_per_cycle) == pytest.approx(stats.decode_seconds)
    # Accepting the n-th token takes the ones before it.
    assert stats.accepted_per_position == sorted(stats.accepted_per_position, reverse=True)
    for position, count in enumerate(stats.accepted_per_position):
        assert count == sum(stats.acceptance_histogram[position + 1 :])
    if stats.drafted:
        assert stats.draft_acceptance_rate == stats.accepted / stats.drafted
        assert stats.acceptance_rate_per_position[0] == stats.accepted_per_position[0] / stats.drafted_per_position[0]
    if stats.cycles:
        assert stats.mean_acceptance_length == 1 + stats.accepted / stats.cycles


def test_counts_of_a_batch(qs):
    """Sequences that are done are counted no further; padding is no token."""
    prompts = [random_prompt(LONG, seed) for seed in (1, 2, 3)]
    output = qs.generate(torch.tensor(prompts), max_new_tokens=20, eos_token_id=list(range(3, 12)), pad_token_id=0)
    stats = qs.last_stats
    assert_consistent(stats)
    assert stats.num_sequences == 3
    assert stats.prompt_tokens == 3 * LONG
    assert stats.generated_tokens == int((output[:, LONG:] != 0).sum())
    assert stats.generated_tokens < 60


def test_prompt_tokens_exclude_padding(qs):
    mask = torch.ones(1, LONG, dtype=torch.long)
    mask[0, :5] = 0
    qs.generate(torch.tensor([random_prompt(LONG)]), mask, max_new_tokens=2)
    assert qs.last_stats.prompt_tokens == LONG - 5


def test_perfect_draft_is_all_accepted(qs, monkeypatch):
    """A draft that is the target itself: acceptance 1, mean acceptance length gamma + 1."""
    forward = type(qs.pair).forward
    monkeypatch.setattr(
        type(qs.pair),
        "forward",
        lambda self, role, *inputs, cache: forward(
            self, Role.TARGET if role is Role.DRAFT else role, *inputs, cache=cache
        ),
    )
    stats = run(qs, [random_prompt(LONG)], 1 + 5 * 4, num_speculative_tokens=4)
    assert stats.draft_acceptance_rate == 1
    assert stats.mean_acceptance_length == 5
    assert stats.acceptance_histogram == [0, 0, 0, 0, 4]


def test_nothing_drafted(qs):
    """One token, or gamma = 0: rates of nothing are NaN, None in JSON, and absent from the table."""
    stats = run(qs, [random_prompt(LONG)], 1)
    assert stats.cycles == stats.drafted == stats.flushes == 0
    assert stats.draft_acceptance_rate != stats.draft_acceptance_rate
    assert stats.as_dict()["draft_acceptance_rate"] is None
    assert stats.as_dict()["acceptance_rate_per_position"] == [None] * 4
    assert "draft_acceptance_rate" not in str(stats)


class Clock:
    """Stands for ``time.perf_counter``; stands still unless it is moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def delay(self, monkeypatch, owner: type, name: str, seconds: float) -> list[tuple]:
        """Make each call of a method take ``seconds``; returns the list that each call's arguments are put into."""
        method, calls = getattr(owner, name), []

        def delayed(*args, **kwargs):
            calls.append(args)
            self.seconds += seconds
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, delayed)
        return calls


class OwnCriterion(StoppingCriteria):
    """A stopping criterion of the caller's own, which stops nothing."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


class OwnStreamer(BaseStreamer):
    """A streamer that streams nowhere."""

    def put(self, value):
        pass

    def end(self):
        pass


def test_the_librarys_time_counts_and_the_callers_does_not(qs, monkeypatch):
    """Model, flush and transformers' criteria are counted, each with the phase it is of."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    forwards = clock.delay(monkeypatch, type(qs.pair), "forward", 1.0)
    flushes = clock.delay(monkeypatch, HierarchicalCache, "flush", 0.5)
    criteria = clock.delay(monkeypatch, MaxTimeCriteria, "__call__", 0.25)
    copies = clock.delay(monkeypatch, torch.Tensor, "cpu", 0.125)
    own = [
        clock.delay(monkeypatch, OwnCriterion, "__call__", 1024.0),
        clock.delay(monkeypatch, OwnStreamer, "put", 2048.0),
        clock.delay(monkeypatch, OwnStreamer, "end", 4096.0),
    ]
    options = {"stopping_criteria": [OwnCriterion()], "streamer": OwnStreamer(), "max_time": 1e9}
    stats = run(qs, [random_prompt(LONG)], 21, **options)
    # The prompt, before anything is timed, and every token are streamed; every token is judged.
    assert [len(calls) for calls in own] == [21, 22, 1]
    assert len(criteria) == 21
    assert len(flushes) == 1
    # The prompt alone: new tokens are on the host.
    assert len(copies) == 1
    prefills = sum(args[1] is Role.PREFILL for args in forwards)
    assert stats.prefill_seconds == prefills + 0.25
    assert stats.decode_seconds == (len(forwards) - prefills) + 0.5 + 20 * 0.25
    assert stats.tokens_per_second == 20 / stats.decode_seconds


def test_bytes(qs):
    """Cache bytes are those of its tensors, weight bytes those of the model and of what the draft adds."""
    stats = run(qs, [random_prompt(LONG)], 9)
    tensors = [part for layer in qs.session.cache.layers for part in vars(layer).values()]
    assert sum(stats.cache_bytes.values()) == sum(tensor.nbytes for tensor in tensors)
    kinds = {"upper", "lower", "scales", "recent"} | ({"decoded"} if qs.pair.device.type == "cpu" else set())
    assert set(stats.cache_bytes) == kinds
    assert all(stats.cache_bytes.values())
    model = by_address(qs.model)
    assert stats.weight_bytes["target"] >= sum(tensor.nbytes for tensor in model.values())
    draft = {address: t for address, t in by_address(qs.draft).items() if address not in model}
    assert stats.weight_bytes["draft_int4"] == sum(tensor.nbytes for tensor in draft.values()) > 0


def test_dictionary_has_the_rates(qs):
    stats = run(qs, [random_prompt(LONG)], 9)
    assert set(RATES) <= set(stats.as_dict())


def test_auto_counts_up_to_its_largest_number(qs):
    stats = run(qs, [random_prompt(LONG)], 9, num_speculative_tokens="auto")
    assert stats.num_speculative_tokens == AutoDraftCount().most == 12
    assert_consistent(stats)


def test_as_dict_is_json(qs):
    """Strict JSON, with values equal to the attributes, and a copy of the counts."""
    stats = run(qs, [random_prompt(LONG)], 9)
    read = json.loads(json.dumps(stats.as_dict(), allow_nan=False))
    for name, value in read.items():
        if name != "acceptance_rate_per_position":
            assert value == getattr(stats, name)
    stats.as_dict()["acceptance_histogram"].append(7)
    assert len(stats.acceptance_histogram) == 5
    # The dictionary does not grow with the text.
    assert not any(name.endswith("_per_cycle") for name in read)
    for empty in (GenerationStats(4), GenerationStats(0)):
        json.dumps(empty.as_dict(), allow_nan=False)


def test_prints_as_a_table(qs, capsys):
    """One aligned row per figure."""
    stats = run(qs, [random_prompt(LONG)], 9)
    print(stats)
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert {"tokens", "prefill", "decode", "draft_acceptance_rate", "mean_acceptance_length", "cache"} <= set(names)
    column = len("mean_acceptance_length") + 2
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)
    assert f"{stats.accepted} of {stats.drafted}" in "\n".join(lines)
    assert str(GenerationStats(4))


def test_stats_of_a_model_that_has_not_generated(qs):
    assert GenerationStats(3).acceptance_histogram == [0, 0, 0, 0]


def test_record_cycle():
    stats = GenerationStats(3, num_sequences=2)
    stats.record_cycle(Plan(3), [3, 1], 0.5)
    stats.record_cycle(Plan(2, Source.LOOKUP), [0], 0.25)
    assert (stats.cycles, stats.drafted, stats.accepted) == (3, 8, 4)
    assert stats.drafted_by_source == {"self": 6, "lookup": 2}
    assert stats.accepted_by_source == {"self": 4, "lookup": 0}
    assert stats.drafted_per_position == [3, 3, 2]
    assert stats.accepted_per_position == [2, 1, 1]
    assert stats.acceptance_histogram == [1, 1, 0, 1]
    assert (stats.drafted_per_cycle, stats.accepted_per_cycle) == ([6, 2], [4, 0])
    assert (stats.seconds_per_cycle, stats.decode_seconds) == ([0.5, 0.25], 0.75)
    assert_consistent(stats)
