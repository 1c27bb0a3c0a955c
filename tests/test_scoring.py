"""Cached scoring: log-probabilities of given texts come from the quantized cache, and only from there."""

from __future__ import annotations

import pytest
import torch
from cache_changes import change_cache_after_prefill
from conftest import GROUP
from step_by_step import random_prompt
from tiny_models import tiny_model

import quantspec
from quantspec import CacheFullError, QuantSpecModel
from quantspec.evals.scoring import MAX_BLOCK, forced_text, score_continuations, sequences_that_fit
from quantspec.passes import Role

TEXT = random_prompt(12 * GROUP)
LONG = TEXT[: 6 * GROUP + 5]
NEXT = TEXT[6 * GROUP + 5 : 6 * GROUP + 8]


def score_one(qs: QuantSpecModel, context: list[int], continuation: list[int], role: Role = Role.TARGET):
    """The score of a single continuation."""
    return score_continuations(qs, [context], [[continuation]], role)[0][0]


def dense_log_probability(qs: QuantSpecModel, context: list[int], continuation: list[int]) -> float:
    """By the original model, without a cache."""
    with torch.no_grad():
        logits = qs.model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(continuation)[:, None]).sum().item()


@pytest.mark.parametrize("length", [1, 2, GROUP, 2 * GROUP - 4])
def test_without_quantized_tokens_scores_are_the_models_own(qs, length):
    context, continuation = TEXT[:length], TEXT[length : length + 3]
    expected = dense_log_probability(qs, context, continuation)
    assert score_one(qs, context, continuation).log_probability == pytest.approx(expected, abs=1e-4)


def test_a_quantized_context_costs_little_precision(qs):
    scored = score_one(qs, LONG, NEXT).log_probability
    expected = dense_log_probability(qs, LONG, NEXT)
    assert scored != pytest.approx(expected, abs=1e-6)
    assert scored == pytest.approx(expected, abs=0.1)


def test_greedy_continuations_are_recognized(qs):
    with torch.no_grad():
        best = int(qs.model(torch.tensor([TEXT[:20]])).logits[0, -1].argmax())
    assert score_one(qs, TEXT[:20], [best]).is_greedy
    assert not score_one(qs, TEXT[:20], [best, best % 90 + 3, best]).is_greedy


@pytest.mark.parametrize("role", [Role.TARGET, Role.DRAFT])
def test_ragged_batches_and_shared_contexts_score_as_single_ones(qs, role):
    contexts = [LONG, TEXT[3:40], TEXT[:1]]
    # More than a block, so that tokens are accepted and groups flushed before the next continuation is scored.
    continuations = [[NEXT, TEXT[: 3 * GROUP], NEXT], [TEXT[50:51]], [TEXT[1 : MAX_BLOCK + 1], TEXT[7:10]]]
    together = score_continuations(qs, contexts, continuations, role)
    for context, given, scores in zip(contexts, continuations, together, strict=True):
        for continuation, score in zip(given, scores, strict=True):
            alone = score_one(qs, context, continuation, role)
            assert score.log_probability == pytest.approx(alone.log_probability, abs=1e-3)
            assert score.is_greedy == alone.is_greedy
    # The same continuation before and after one that has moved groups into the planes.
    assert together[0][0].log_probability == pytest.approx(together[0][2].log_probability, abs=1e-5)


@pytest.mark.parametrize("architecture", ["lfm2", "falcon_h1", "qwen3_next"])
def test_what_is_scored_after_another_continuation_keeps_the_contexts_state(architecture):
    """A longer one than states can go back by."""
    qs = quantspec.convert(tiny_model(architecture), self_check=False)
    context, long, short = TEXT[:40], TEXT[40 : 40 + MAX_BLOCK + 14], TEXT[90:95]
    expected = dense_log_probability(qs, context, short)
    ((_, scored),) = score_continuations(qs, [context], [[long, short]], Role.TARGET)
    assert scored.log_probability == pytest.approx(expected, abs=1e-3)


def test_blocks_follow_one_another_without_gaps(qs):
    ids = torch.tensor(TEXT)
    blocks = list(forced_text(qs, ids, 50, Role.TARGET))
    assert [block.first for block in blocks] == list(range(0, len(TEXT) - 50, MAX_BLOCK))
    logits = torch.cat([block.logits[0] for block in blocks])
    with torch.no_grad():
        expected = qs.model(ids[None]).logits[0, 50:]
    assert logits.shape == expected.shape
    assert ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 0.05


@pytest.mark.parametrize("part", ["k_upper", "v_upper", "k_scale", "v_zero"])
@pytest.mark.parametrize("role", [Role.TARGET, Role.DRAFT])
def test_scores_move_with_what_both_roles_read(qs, monkeypatch, part, role):
    before = score_one(qs, LONG, NEXT, role).log_probability
    change_cache_after_prefill(
        monkeypatch, part, lambda tensor: tensor ^ 0x44 if tensor.dtype == torch.uint8 else tensor * 2
    )
    assert abs(score_one(qs, LONG, NEXT, role).log_probability - before) > 1e-3


def test_the_lower_plane_moves_the_targets_scores_alone(monkeypatch):
    options = {"kv_group_size": GROUP, "draft_recipe": "int4-cache", "self_check": False}
    qs = quantspec.convert(tiny_model("llama"), **options)
    before = {role: score_one(qs, LONG, NEXT, role).log_probability for role in (Role.TARGET, Role.DRAFT)}
    change_cache_after_prefill(monkeypatch, "k_lower", lambda tensor: tensor ^ 0xFF)
    assert abs(score_one(qs, LONG, NEXT, Role.TARGET).log_probability - before[Role.TARGET]) > 1e-4
    assert score_one(qs, LONG, NEXT, Role.DRAFT).log_probability == before[Role.DRAFT]


def test_a_continuation_of_one_token_is_read_through_the_cache_too(qs, monkeypatch):
    before = score_one(qs, LONG, NEXT[:1]).log_probability
    change_cache_after_prefill(monkeypatch, "k_upper", lambda tensor: tensor ^ 0x44)
    assert score_one(qs, LONG, NEXT[:1]).log_probability != before


def test_more_text_than_the_cache_holds_is_refused(qs):
    with pytest.raises(CacheFullError, match="max_cache_len=512"):
        score_one(qs, random_prompt(512), [5, 6, 7])


@pytest.mark.parametrize("role", [Role.TARGET, Role.DRAFT])
def test_logits_that_are_nan_are_an_error_and_leave_the_pair_usable(qs, monkeypatch, role):
    before = score_one(qs, LONG, NEXT, role)
    with monkeypatch.context() as changed:
        change_cache_after_prefill(changed, "k_scale", lambda scale: torch.full_like(scale, torch.nan))
        with pytest.raises(FloatingPointError, match="logits are NaN"):
            # The short context is read in full precision.
            score_continuations(qs, [TEXT[:5], LONG], [[NEXT], [NEXT, NEXT[:1]]], role)
    assert score_one(qs, LONG, NEXT, role) == before


def test_as_many_sequences_as_fit_the_memory(qs):
    room = 2**24
    fitting = sequences_that_fit(qs, 500, room)
    cache = qs.pair.new_cache(fitting, MAX_BLOCK - 1)
    cache.reserve(500)
    assert room / 2 < sum(cache.bytes_by_part().values()) < room
    assert sequences_that_fit(qs, 50, room) > fitting
