"""Drafts that stand by their odds: the target's distribution, and as many accepted as two distributions can share."""

from __future__ import annotations

import contextlib

import pytest
import torch
from scipy.stats import chisquare
from test_sampling import ALPHA, VOCAB, Table, distributions, judge_by_odds, processed, transition_pvalue
from test_score_programs import without_graphs
from tiny_models import tiny_model

import quantspec
from quantspec.engine import acceptance
from quantspec.engine.sampling import Randomness, accept, perturb, reject
from quantspec.passes import Role
from quantspec.serving import Output, Request

IDS = torch.tensor([[3, 4, 5, 6], [6, 5, 4, 3], [7, 7, 3, 3]])
SAMPLED = {"do_sample": True, "top_k": 0, "max_new_tokens": 40, "eos_token_id": None}


def convert(**options) -> quantspec.QuantSpecModel:
    """A one-layer llama with a vocabulary of 8."""
    model = tiny_model(
        "llama", vocab_size=VOCAB, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, hidden_size=32
    )
    return quantspec.convert(model, kv_group_size=64, weight_group_size=32, self_check=False, **options)


class Own(torch.nn.Module):
    """Needs the host, and changes nothing."""

    def __call__(self, input_ids, scores):
        return scores


def texts_of(outputs: list[list[Output]]) -> list[list[int]]:
    """The tokens of each request."""
    return [[token for output in of_one for token in output.token_ids] for of_one in outputs]


@pytest.fixture(scope="module")
def rejecting() -> quantspec.QuantSpecModel:
    return convert(rejection_sampling=True)


@pytest.mark.parametrize("sharpness", [0.5, 2.0])
def test_a_block_follows_the_target_and_shares_all_that_can_be_shared(sharpness):
    """40,000 blocks of one pair of distributions: the first three tokens, and how many drafts stand."""
    blocks = 40_000
    p = distributions(1, 3, VOCAB, seed=5).expand(blocks, -1, -1)
    q = distributions(1, 2, VOCAB, seed=6, spread=sharpness).expand(blocks, -1, -1)
    drafts, accepted, following = judge_by_odds(p, q)
    emitted = torch.cat((drafts, following[:, None]), 1).scatter(1, accepted[:, None], following[:, None])
    for place in range(3):
        tokens = emitted[accepted >= place, place]
        expected = len(tokens) * p[0, place].double() / p[0, place].double().sum()
        assert chisquare(torch.bincount(tokens, minlength=VOCAB).numpy(), expected.numpy()).pvalue > ALPHA
    rates = torch.minimum(p[0, :2], q[0]).sum(-1)
    assert float((accepted > 0).double().mean()) == pytest.approx(float(rates[0]), abs=0.01)
    assert float((accepted > 1).double().mean()) == pytest.approx(float(rates.prod()), abs=0.01)


def test_rows_that_are_not_sampled_accept_the_targets_choice():
    p, q = distributions(300, 4, VOCAB, seed=1), distributions(300, 3, VOCAB, seed=2)
    drafts, *verdict = judge_by_odds(p, q, sampled=False)
    assert all(map(torch.equal, verdict, accept(drafts, p)))


def test_a_draft_whose_scores_are_nan_counts_as_certain():
    """It stands as often as the target would write it, and the next token still follows the target."""
    blocks = 40_000
    p = distributions(1, 2, VOCAB, seed=3).expand(blocks, -1, -1)
    drafts = torch.full((blocks, 1), 5)
    rows = torch.arange(blocks), torch.ones(blocks, dtype=torch.bool), torch.arange(2).expand(blocks, -1)
    accepted, following = reject(drafts, torch.full((blocks, 1, VOCAB), float("nan")), p.log(), *rows)
    first = torch.where(accepted > 0, 5, following)
    expected = blocks * p[0, 0].double() / p[0, 0].double().sum()
    assert chisquare(torch.bincount(first, minlength=VOCAB).numpy(), expected.numpy()).pvalue > ALPHA
    assert float(accepted.double().mean()) == pytest.approx(float(p[0, 0, 5]), abs=0.01)


def test_more_drafts_stand_than_by_common_noise(rejecting, monkeypatch):
    """By as much as total variation is below what common noise costs; the draft is the target, distorted."""
    rates = []
    for qs in (convert(), rejecting):
        with monkeypatch.context() as patch:
            forward = type(qs.pair).forward
            noise = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))

            def distorted(self, role, *inputs, cache, forward=forward, noise=noise):
                logits = forward(self, role, *inputs, cache=cache)
                return logits + noise if role is Role.DRAFT else logits

            patch.setattr(type(qs.pair), "forward", distorted)
            qs.generate(IDS.repeat(40, 1), seed=0, num_speculative_tokens=4, **SAMPLED)
        rates.append(qs.last_stats.draft_acceptance_rate)
    assert rates[1] > rates[0] + 0.05


def test_a_seed_and_a_number_of_drafts_give_one_text(rejecting):
    """Whatever is beside it; greedy texts are those of the other rule."""
    together = rejecting.generate(IDS, seed=[5, 6, 7], num_speculative_tokens=4, **SAMPLED)
    alone = [
        rejecting.generate(IDS[row : row + 1], seed=5 + row, num_speculative_tokens=4, **SAMPLED) for row in range(3)
    ]
    assert torch.equal(together, torch.cat(alone))
    greedy = {**SAMPLED, "do_sample": False}
    assert torch.equal(rejecting.generate(IDS, **greedy), convert().generate(IDS, **greedy))


@pytest.mark.parametrize("options", [{"num_speculative_tokens": 0}, {"draft": "lookup"}], ids=["no drafts", "lookup"])
def test_certain_drafts_and_none_leave_a_seed_its_text(rejecting, options):
    assert torch.equal(
        rejecting.generate(IDS, seed=3, **options, **SAMPLED), convert().generate(IDS, seed=3, **options, **SAMPLED)
    )


def test_processors_of_ones_own_keep_common_noise(rejecting):
    """The host judges token by token there, and drafts do not know what it knows."""
    options = {**SAMPLED, "logits_processor": [Own()], "seed": 4}
    assert torch.equal(rejecting.generate(IDS, **options), convert().generate(IDS, **options))


def test_an_engine_draws_by_odds_too(rejecting):
    """Requests of one seed each have their texts alone, whatever is beside them."""
    options = {"do_sample": True, "top_k": 0, "seed": 9}
    requests = [Request(prompt, 20, (), options) for prompt in IDS.tolist()]

    with contextlib.closing(quantspec.Engine(rejecting, max_sequences=3, max_length=64)) as engine:
        together = texts_of(engine.generate(requests))
        assert [texts_of(engine.generate([request]))[0] for request in requests] == together
    with contextlib.closing(quantspec.Engine(convert(), max_sequences=3, max_length=64)) as engine:
        assert texts_of(engine.generate(requests)) != together


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("beside", [{"logits_processor": [Own()]}, {"do_sample": False}], ids=["host", "greedy"])
def test_who_is_beside_a_request_does_not_show_in_its_text(rejecting, beside, captured, request):
    """Nor is it drafted by another rule while the host judges a row beside it, token by token."""
    if captured:
        request.getfixturevalue(without_graphs.__name__)
    options = {"do_sample": True, "top_k": 0, "temperature": 1.3}
    free = [Request(prompt, 24 + row, (), {**options, "seed": row}) for row, prompt in enumerate(IDS.tolist())]
    other = Request([5, 3, 5], 15, (), {**options, "seed": 8, **beside})
    with contextlib.closing(quantspec.Engine(rejecting, max_sequences=4, max_length=64)) as engine:
        together = texts_of(engine.generate([other, *free]))
        assert texts_of(engine.generate(free)) == together[1:]
        assert texts_of(engine.generate([other])) == together[:1]
    rejecting.reset()


def test_a_request_that_gave_way_goes_on_as_it_was():
    qs = convert(rejection_sampling=True)
    options = {"do_sample": True, "top_k": 0}
    asked = [Request([3, 4, 5 + row], 300 + row, (), {**options, "seed": row}) for row in range(3)]
    with contextlib.closing(quantspec.Engine(qs, max_sequences=3, max_length=400, num_pages=7)) as engine:
        together = texts_of(engine.generate(asked))
        assert engine.statistics().preemptions
        assert [texts_of(engine.generate([one]))[0] for one in asked] == together


@pytest.mark.parametrize("draft", ["both", "lookup"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=["plain", "top_p"])
@pytest.mark.parametrize("count", [3, "auto"])
def test_drafts_of_either_source_leave_the_distribution(rejecting, monkeypatch, draft, options, count):
    """A table of transitions in place of the graphs, in ragged rows of which every other one is searched greedily."""
    table = Table()
    monkeypatch.setitem(vars(rejecting.pair), "forward", table.forward)
    ids = torch.randint(3, VOCAB, (512, 4), generator=torch.Generator().manual_seed(9))
    mask = torch.ones_like(ids)
    mask[::3, :2] = 0
    rows = [{"do_sample": row % 2 == 0} for row in range(len(ids))]
    arguments = {**SAMPLED, **options, "row_options": rows, "seed": 0, "num_speculative_tokens": count}
    output = rejecting.generate(ids, mask, draft=draft, **arguments)
    probs = processed(table.target, {"top_k": 0, **options})
    assert transition_pvalue(output[::2, 3:], probs) > ALPHA
    assert torch.equal(output[1::2, 4:], table.target.argmax(-1)[output[1::2, 3:-1]])


def test_a_draft_of_another_cycle_is_not_judged_by():
    """A cycle that reads its drafts from the text judges them as certain, whatever was drafted before."""
    randomness = Randomness(torch.zeros(1, dtype=torch.long))
    randomness.sampled.fill_(True)
    judging = acceptance.RejectionSampling(lambda logits, _: logits, False, randomness)
    logits = distributions(1, 3, VOCAB, seed=2).log()
    certain = [judging.judge(torch.tensor([[token, 4]]), logits) for token in range(VOCAB)]
    judging.draft(logits[:, :1], 0)
    judging.draft(logits[:, 1:2], 1)
    judging.forget()
    again = [judging.judge(torch.tensor([[token, 4]]), logits) for token in range(VOCAB)]
    for before, after in zip(certain, again, strict=True):
        assert all(map(torch.equal, before, after))


def test_the_test_notices_what_is_left_of_the_wrong_distribution(monkeypatch):
    """Drawing from all of p behind a refused draft, instead of what q left, shows."""

    def wrong(drafts, q, p, *rows):
        accepted, _ = reject(drafts, q, p, *rows)
        return accepted, perturb(p, *rows).argmax(-1).gather(1, accepted[:, None])[:, 0]

    monkeypatch.setattr(acceptance, "reject", wrong)
    blocks = 40_000
    p = distributions(1, 2, VOCAB, seed=5).expand(blocks, -1, -1)
    q = distributions(1, 1, VOCAB, seed=6).expand(blocks, -1, -1)
    rows = torch.arange(blocks), torch.ones(blocks, dtype=torch.bool), torch.arange(2).expand(blocks, -1)
    drafts = perturb(q.log(), rows[0], rows[1], rows[2][:, :1]).argmax(-1)
    accepted, following, _ = acceptance._reject(drafts, q.log(), p.log(), p.log(), *rows)
    first = torch.where(accepted > 0, drafts[:, 0], following)
    expected = blocks * p[0, 0].double() / p[0, 0].double().sum()
    assert chisquare(torch.bincount(first, minlength=VOCAB).numpy(), expected.numpy()).pvalue < ALPHA


def test_a_pair_says_by_which_rule_its_drafts_stand(rejecting):
    assert "sampled drafts: stand by their odds (rejection_sampling)" in repr(rejecting)
    common_noise = quantspec.convert(tiny_model("llama"), self_check=False)
    assert "rejection_sampling" not in repr(common_noise)
