"""Rows in lockstep draft again what verification chose beyond the common text, and less where little is common."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from step_by_step import random_prompt
from test_sampling import VOCAB, Table, small_qs
from test_stateful_processors import EveryThird, Recorder, ragged
from torch import Tensor
from transformers import LogitsProcessor

from quantspec.cache import HierarchicalCache
from quantspec.config import Draft
from quantspec.engine.acceptance import Acceptance
from quantspec.engine.cycle import Cycle, LockstepCycle
from quantspec.engine.draft_count import FixedDraftCount
from quantspec.engine.durations import ON_CPU
from quantspec.engine.plan import PLAIN, Plan, Source
from quantspec.passes import Role

__all__ = ["small_qs"]


class Costless(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


# --- What rows know --------------------------------------------------------------------------------------------------


@pytest.fixture
def cycle(qs) -> LockstepCycle:
    """Of three rows and four drafts, with nothing cached."""
    cache: HierarchicalCache = qs.pair.new_cache(3, 4)
    cache.reserve(32)
    return LockstepCycle(qs.pair, cache, Acceptance(lambda logits, _: logits.float(), compiles=False))


def shown(cycle: LockstepCycle, drafts: list[list[int]], choices: list[list[int]]) -> None:
    """Have the cycle show these drafts, and a target with these choices."""
    logits = torch.nn.functional.one_hot(torch.tensor(choices), 96).float()
    cycle.draft = lambda num_drafts: torch.tensor(drafts)
    cycle.verify = lambda drafts: logits
    cycle.show(len(drafts[0]))


@pytest.mark.parametrize(
    ("accepted", "next_tokens", "known"),
    [
        # Row 0 agrees throughout, row 1 up to its second draft, row 2 nowhere.
        (0, [1, 5, 11], [[2, 3, 4, 9], [6, -1, -1, -1], [-1] * 4]),
        # A processor chose otherwise in row 0, and in row 2 what was drafted, behind which all agrees.
        (0, [8, 5, 10], [[-1] * 4, [6, -1, -1, -1], [12, 13, 14, 15]]),
        (1, [2, 6, 12], [[3, 4, 9, -1], [-1] * 4, [13, 14, 15, -1]]),
        (3, [4, 8, 14], [[9, -1, -1, -1], [8, -1, -1, -1], [15, -1, -1, -1]]),
        (4, [9, 9, 15], [[-1] * 4] * 3),
    ],
)
def test_rows_know_what_verification_chose_beyond_the_common_text(cycle, accepted, next_tokens, known):
    drafts = [[1, 2, 3, 4], [5, 7, 8, 8], [10, 12, 13, 14]]
    shown(cycle, drafts, [[1, 2, 3, 4, 9], [5, 6, 8, 8, 8], [11, 12, 13, 14, 15]])
    cycle.keep(torch.full((3,), accepted), torch.tensor(next_tokens))
    assert cycle.known.tolist() == known


def test_what_is_known_is_drafted(cycle):
    cycle.begin(torch.tensor([3, 4, 5]))
    own = cycle.draft(4)
    cycle.known.copy_(torch.tensor([[2, 3, -1, -1], [-1] * 4, [6, 7, 8, 9]]))
    drafts = cycle.draft(4)
    assert drafts[0, :2].tolist() == [2, 3]
    assert torch.equal(drafts[1], own[1])
    assert drafts[2].tolist() == [6, 7, 8, 9]


def test_a_call_begins_with_nothing_known_and_the_next_plan_goes_on(cycle, qs):
    cycle.known.fill_(7)
    other = LockstepCycle(qs.pair, cycle.cache, cycle.acceptance)
    other.resume(cycle)
    assert other.known.eq(7).all()
    other.begin(torch.zeros(3, dtype=torch.int64))
    assert other.known.eq(-1).all()


# --- How much of it counts -------------------------------------------------------------------------------------------


def often_right(monkeypatch, qs, mistakes: int) -> None:
    """A draft that is the target but for one in ``mistakes`` of its tokens, in another row each time."""
    forward, steps = type(qs.pair).forward, itertools.count()

    def forward_with_mistakes(self, role, *inputs, cache):
        logits = forward(self, Role.TARGET if role is Role.DRAFT else role, *inputs, cache=cache)
        step = next(steps) if role is Role.DRAFT else 1
        if step % mistakes == 0:
            logits = logits.clone()
            logits[step // mistakes % len(logits), :, 50] = 1e4
        return logits

    monkeypatch.setattr(type(qs.pair), "forward", forward_with_mistakes)


def test_rows_draft_again_what_was_verified(qs, monkeypatch):
    """With mistakes in one row at a time, the others have no second chance to make one where they were right."""
    options = {"max_new_tokens": 33, "do_sample": False, "eos_token_id": None, "num_speculative_tokens": 4, **ragged(3)}
    expected = qs.generate(logits_processor=[Costless()], **options)
    monkeypatch.setattr(FixedDraftCount, "choose", lambda *_: Plan(4))
    often_right(monkeypatch, qs, 3)
    lengths = []
    for knows in (True, False):
        with monkeypatch.context() as patch:
            if not knows:
                patch.setattr(LockstepCycle, "_drafted", Cycle._drafted)
            assert torch.equal(qs.generate(logits_processor=[Costless()], **options), expected)
        lengths.append(qs.last_stats.mean_acceptance_length)
    assert lengths[0] > 1.2 * lengths[1]


@pytest.mark.parametrize("draft", list(Draft))
@pytest.mark.parametrize("sampled", [False, True])
def test_text_and_calls_are_those_without_drafts(qs, draft, sampled):
    """Also where a processor makes the rows part from what they knew."""
    prompts = torch.tensor([3 * random_prompt(6, seed) for seed in (1, 2, 3)])
    options = {"max_new_tokens": 25, "eos_token_id": None, "do_sample": sampled, "seed": 5, "draft": draft}
    results = []
    for gamma in (0, 1, 3, 7, "auto"):
        recorder = Recorder()
        text = qs.generate(prompts, num_speculative_tokens=gamma, logits_processor=[EveryThird(), recorder], **options)
        results.append((text.tolist(), recorder.texts))
    assert all(result == results[0] for result in results)


def test_rows_that_end_at_different_places(qs):
    options = {"max_new_tokens": 14, "do_sample": False, **ragged(3)}
    free = qs.generate(eos_token_id=None, num_speculative_tokens=0, **options)[:, 8:].tolist()
    eos = [row[index] for row, index in zip(free, (3, 6, 9), strict=True)]
    texts = [
        qs.generate(eos_token_id=eos, num_speculative_tokens=gamma, logits_processor=[Costless()], **options).tolist()
        for gamma in (0, 2, 4)
    ]
    assert texts[0] == texts[1] == texts[2]


def test_acceptance_of_a_sampled_batch_is_near_that_of_its_rows(small_qs, monkeypatch):
    """A costless processor, eight rows: far more than the shortest of eight acceptances would be."""
    table = Table()
    monkeypatch.setitem(vars(small_qs.pair), "forward", table.forward)
    monkeypatch.setattr(FixedDraftCount, "choose", lambda *_: Plan(4))
    ids = torch.randint(3, VOCAB, (8, 4), generator=torch.Generator().manual_seed(1))
    options = {"do_sample": True, "top_k": 0, "seed": 3, "max_new_tokens": 200, "eos_token_id": None}
    alone = small_qs.generate(ids, num_speculative_tokens=4, **options)
    rate = small_qs.last_stats.acceptance_rate_per_position[0]
    together = small_qs.generate(ids, num_speculative_tokens=4, logits_processor=[Costless()], **options)
    # The host judges by common noise, whatever the pair's own rule.
    assert torch.equal(alone, together) != small_qs.pair.config.rejection_sampling
    shortest = sum(rate ** (8 * count) for count in range(5))
    assert small_qs.last_stats.mean_acceptance_length > 1.3 * shortest


class Greedy(LogitsProcessor):
    """Takes more than transformers gives."""

    def __call__(self, input_ids, scores, temperature):
        return scores


@pytest.mark.parametrize("new_tokens", [1, 9])
def test_a_processor_of_another_signature_is_refused_as_in_hugging_face(qs, new_tokens):
    options = {"max_new_tokens": new_tokens, "logits_processor": [Greedy()], **ragged(2)}
    with pytest.raises(ValueError, match="required parameters") as theirs:
        qs.model.generate(**options)
    with pytest.raises(ValueError, match="required parameters") as ours:
        qs.generate(**options)
    assert str(ours.value) == str(theirs.value)


# --- How much is drafted ---------------------------------------------------------------------------------------------


def plans(count: FixedDraftCount, agree: Iterator[bool], cycles: int, matched: int = 0) -> list[Plan]:
    """What is chosen, where all rows accept a draft as ``agree`` says."""
    chosen = []
    for _ in range(cycles):
        plan = count.choose([matched], cycles, None)
        accepted = sum(1 for _ in itertools.takewhile(bool, itertools.islice(agree, plan.num_drafts)))
        count.record(plan, [matched], [accepted], None)
        chosen.append(plan)
    return chosen


def test_drafts_in_lockstep_are_as_many_as_pay():
    right, wrong = itertools.repeat(True), itertools.repeat(False)
    assert set(plans(FixedDraftCount(4, in_lockstep=True), right, 50)) == {Plan(4)}
    half = plans(FixedDraftCount(4, in_lockstep=True), itertools.cycle([True, False]), 200)
    assert set(half[50:]) == {Plan(1)}
    never = plans(FixedDraftCount(4, in_lockstep=True), wrong, 400)
    assert never[0] == Plan(4)
    assert never[20:].count(PLAIN) / 380 > 0.96
    assert set(never[20:]) == {PLAIN, Plan(1)}


def test_drafts_come_back_when_they_pay_again():
    count = FixedDraftCount(4, in_lockstep=True)
    plans(count, itertools.repeat(False), 300)
    assert plans(count, itertools.repeat(True), 400)[-1] == Plan(4)


def test_a_row_by_itself_drafts_what_was_asked_for():
    assert set(plans(FixedDraftCount(4), itertools.repeat(False), 100)) == {Plan(4)}
    lookup = FixedDraftCount(4, Draft.LOOKUP, ON_CPU)
    assert set(plans(lookup, itertools.repeat(False), 100, matched=3)) == {Plan(4, Source.LOOKUP)}


@pytest.mark.parametrize("draft", [Draft.LOOKUP, Draft.BOTH])
def test_lookups_in_lockstep_give_way_where_they_never_pay(draft):
    """They cost little, so little is enough."""
    chosen = plans(FixedDraftCount(4, draft, in_lockstep=True), itertools.repeat(False), 200, matched=3)
    assert PLAIN not in chosen[:9]
    assert PLAIN in chosen[100:]


@pytest.mark.parametrize("draft", list(Draft))
def test_nothing_is_drafted_with_a_number_of_zero(draft):
    assert set(plans(FixedDraftCount(0, draft, in_lockstep=True), itertools.repeat(True), 100, matched=3)) == {PLAIN}


def test_batches_in_lockstep_choose_and_others_do_not(qs, monkeypatch):
    made = []
    init = FixedDraftCount.__init__

    def spied(self, number, draft, costs, in_lockstep=False):
        made.append(in_lockstep)
        init(self, number, draft, costs, in_lockstep)

    monkeypatch.setattr(FixedDraftCount, "__init__", spied)
    options = {"max_new_tokens": 3, "eos_token_id": None}
    qs.generate(**ragged(2), **options)
    qs.generate(**ragged(1), logits_processor=[Costless()], **options)
    qs.generate(**ragged(2), logits_processor=[Costless()], **options)
    assert made == [False, False, True]


def test_what_a_walk_takes_is_not_a_cycles_duration(qs, monkeypatch):
    """Nor does it grow with the tokens that were accepted: that would say that drafts are slow."""
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)

    class Slow(LogitsProcessor):
        def __call__(self, input_ids, scores: Tensor):
            nonlocal now
            now += 1.0
            return scores

    told = []
    monkeypatch.setattr(FixedDraftCount, "record", lambda self, *args: told.append(args[-1]))
    qs.generate(**ragged(2), logits_processor=[Slow()], max_new_tokens=9, eos_token_id=None)
    assert told
    assert set(told) == {0.0}
    assert qs.last_stats.decode_seconds == 8.0
