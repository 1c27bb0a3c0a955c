"""Sampling is lossless: emitted tokens follow the target's distribution, whatever the draft proposes."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chi2, chisquare
from tiny_models import tiny_model
from torch import Tensor
from transformers.generation import logits_process as hf

import quantspec
from quantspec.engine.sampling import accept, perturb, reject
from quantspec.engine.session import Session
from quantspec.passes import Role

VOCAB = 8
ALPHA = 0.001


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distributions(*shape: int, seed: int, spread: float = 1.5) -> Tensor:
    """Random distributions over the last axis."""
    return (spread * torch.randn(*shape, generator=seeded(seed))).softmax(-1)


@pytest.fixture(scope="module", params=[False, True], ids=["common noise", "rejection"])
def small_qs(request) -> quantspec.QuantSpecModel:
    """A one-layer llama with a vocabulary of 8, whose drafts stand by either rule."""
    model = tiny_model(
        "llama", vocab_size=VOCAB, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, hidden_size=32
    )
    options = {"kv_group_size": 64, "weight_group_size": 32, "self_check": False}
    return quantspec.convert(model, **options, rejection_sampling=request.param)


# --- Units -----------------------------------------------------------------------------------------------------------


def draw(logits: Tensor, first: int = 0) -> Tensor:
    """The perturbed ``(B, T, V)`` logits of positions from ``first`` on, each row with a seed of its own."""
    batch, count = logits.shape[:2]
    positions = torch.arange(first, first + count).expand(batch, -1)
    return perturb(logits, torch.arange(batch), torch.ones(batch, dtype=torch.bool), positions)


def judge(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Drafts by ``q (B, T, V)`` and how the target ``p (B, T + 1, V)``, both probabilities, judges them."""
    drafts = draw(q.log()).argmax(-1)
    return drafts, *accept(drafts, draw(p.log()))


def judge_by_odds(p: Tensor, q: Tensor, sampled: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`judge`, by the other rule."""
    batch = len(p)
    seeds, which = torch.arange(batch, 2 * batch), torch.full((batch,), sampled)
    positions = torch.arange(p.shape[1]).expand(batch, -1)
    drafts = perturb(q.log(), seeds, which, positions[:, :-1]).argmax(-1)
    return drafts, *reject(drafts, q.log(), p.log(), seeds, which, positions)


def test_acceptance():
    """Tokens are accepted up to the first that is not the target's choice; the target's own follows."""
    scores = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3, 4]] * 5), VOCAB).float()
    drafts = torch.tensor([[1, 2, 3], [1, 2, 0], [1, 0, 3], [0, 2, 3], [0, 0, 0]])
    accepted, following = accept(drafts, scores)
    assert accepted.tolist() == [3, 2, 1, 0, 0]
    assert following.tolist() == [4, 3, 2, 1, 1]


def test_acceptance_of_nothing():
    accepted, following = accept(torch.empty(2, 0, dtype=torch.long), torch.eye(VOCAB)[None, :1].expand(2, 1, -1))
    assert accepted.tolist() == following.tolist() == [0, 0]


@pytest.mark.parametrize("rule", [judge, judge_by_odds])
def test_equal_distributions_accept_everything(rule):
    """q = p: every token is accepted, also those of probability near 1 and near 0."""
    p = distributions(500, 4, VOCAB, seed=0, spread=6.0)
    _, accepted, _ = rule(p, p[:, :3])
    assert accepted.tolist() == [3] * 500


@pytest.mark.parametrize("rule", [judge, judge_by_odds])
def test_forbidden_tokens_are_never_accepted_nor_drawn(rule):
    """p = 0 where the draft proposes: none accepted, and the next token is one that p allows."""
    p = torch.zeros(500, 3, VOCAB)
    p[..., 4:] = 0.25
    q = torch.zeros(500, 2, VOCAB)
    q[..., :4] = 0.25
    _, accepted, following = rule(p, q)
    assert accepted.tolist() == [0] * 500
    assert set(following.tolist()) == {4, 5, 6, 7}


def test_rows_that_are_not_sampled_stay_as_they_are():
    scores = torch.randn(2, 3, VOCAB, generator=seeded(0))
    positions = torch.arange(3).expand(2, -1)
    perturbed = perturb(scores, torch.tensor([1, 1]), torch.tensor([False, True]), positions)
    assert torch.equal(perturbed[0], scores[0])
    assert not torch.isclose(perturbed[1], scores[1]).any()


@pytest.mark.parametrize("sharpness", [0.5, 2.0])
def test_a_block_follows_the_target(sharpness):
    """40,000 blocks of one pair of distributions: the first two tokens, and how many are accepted."""
    blocks = 40_000
    p = distributions(1, 3, VOCAB, seed=5).expand(blocks, -1, -1)
    q = distributions(1, 2, VOCAB, seed=6, spread=sharpness).expand(blocks, -1, -1)
    drafts, accepted, following = judge(p, q)
    first = torch.where(accepted > 0, drafts[:, 0], following)
    second = torch.where(accepted > 1, drafts[:, 1], following)[accepted > 0]
    # The second given the first: the noise of one position says nothing about the next.
    for place, tokens in enumerate((first, second)):
        expected = len(tokens) * p[0, place].double() / p[0, place].double().sum()
        assert chisquare(torch.bincount(tokens, minlength=VOCAB).numpy(), expected.numpy()).pvalue > ALPHA
    ratio = torch.maximum(p[0, 0] / p[0, 0][:, None], q[0, 0] / q[0, 0][:, None])
    rate = float((accepted > 0).double().mean())
    assert rate == pytest.approx(float((1 / ratio.sum(-1)).sum()), abs=0.012)


def test_acceptance_is_not_that_of_independent_draws():
    """Two independent samples agree with probability sum(p q); common noise accepts (1 - d) / (1 + d) at least."""
    p = distributions(20_000, 2, VOCAB, seed=7, spread=0.3)
    q = (p[:, :1].log() + 0.1 * torch.randn(20_000, 1, VOCAB, generator=seeded(8))).softmax(-1)
    drafts, accepted, _ = judge(p, q)
    distance = (p[:, :1] - q).clamp(min=0).sum(-1)
    matching = (drafts[:, 0] == draw(p.log(), first=7)[:, 0].argmax(-1)).double().mean()
    assert accepted.double().mean() > float(((1 - distance) / (1 + distance)).mean()) > 0.9 > 0.3 > matching


# --- The loop, with a table of transitions in place of the graphs ----------------------------------------------------


class Table:
    """A model whose next token depends on the newest one alone, so that its distribution is known exactly.

    The draft is a distorted copy that puts nothing on some tokens and something on forbidden ones.
    """

    def __init__(self, seed: int = 0) -> None:
        self.target = 1.2 * torch.randn(VOCAB, VOCAB, generator=seeded(seed))
        self.draft = self.target + 0.7 * torch.randn(VOCAB, VOCAB, generator=seeded(seed + 1))
        self.draft[:, 1] = float("-inf")
        self.target[:, 2] = float("-inf")

    def forward(self, role: Role, ids: Tensor, positions: Tensor, rows: Tensor, *state: Tensor, cache) -> Tensor:
        """Stands in for ``Pair.forward``."""
        table = self.draft if role is Role.DRAFT else self.target
        return table[ids.gather(1, rows)]


def transition_pvalue(sequences: Tensor, probs: Tensor) -> float:
    """Chi-square of all transitions in ``(B, S)`` sequences against ``(V, V)`` probabilities, context by context."""
    pairs = sequences[:, :-1] * VOCAB + sequences[:, 1:]
    counts = torch.bincount(pairs.flatten(), minlength=VOCAB**2).view(VOCAB, VOCAB).double()
    expected = counts.sum(1, keepdim=True) * probs.double()
    assert not counts[probs == 0].any(), "a token of probability zero was emitted"
    cells = expected > 5
    # What is too rare for a cell of its own joins the others of its row.
    rest, rest_expected = (torch.where(cells, 0, x).sum(1) for x in (counts, expected))
    statistic = ((counts - expected) ** 2 / expected)[cells].sum()
    pooled = rest_expected > 5
    statistic = statistic + ((rest - rest_expected) ** 2 / rest_expected)[pooled].sum()
    freedom = int(cells.sum() + pooled.sum() - (expected.sum(1) > 5).sum())
    return float(chi2.sf(float(statistic), freedom))


OPTIONS = {
    "plain": {"top_k": 0},
    "temperature": {"top_k": 0, "temperature": 0.6},
    "hot": {"top_k": 0, "temperature": 2.5},
    "top_k": {"top_k": 3},
    "top_p": {"top_k": 0, "top_p": 0.8},
    "min_p": {"top_k": 0, "min_p": 0.15},
    "all": {"top_k": 5, "top_p": 0.9, "min_p": 0.05, "temperature": 1.3},
}


def processed(logits: Tensor, options: dict) -> Tensor:
    """Hugging Face's own processing of ``(N, V)`` logits, by hand and in its order."""
    warpers = [
        hf.TemperatureLogitsWarper(options["temperature"]) if "temperature" in options else None,
        hf.TopKLogitsWarper(options["top_k"]) if options["top_k"] else None,
        hf.TopPLogitsWarper(options["top_p"]) if "top_p" in options else None,
        hf.MinPLogitsWarper(options["min_p"]) if "min_p" in options else None,
    ]
    for warper in warpers:
        if warper is not None:
            logits = warper(torch.zeros(len(logits), 1, dtype=torch.long), logits)
    return logits.softmax(-1)


def run_table(qs, monkeypatch, options: dict, gamma: int = 3, seed: int = 0) -> tuple[Tensor, Table]:
    """20,480 tokens of a table model through the whole loop; returns them with the last prompt token in front."""
    table = Table()
    # Not by setattr, which would leave the pair an attribute that hides its class's forward from later patches.
    monkeypatch.setitem(vars(qs.pair), "forward", table.forward)
    ids = torch.randint(3, VOCAB, (512, 4), generator=seeded(9))
    output = qs.generate(
        ids,
        torch.ones_like(ids),
        do_sample=True,
        seed=seed,
        max_new_tokens=40,
        eos_token_id=None,
        num_speculative_tokens=gamma,
        **options,
    )
    return output[:, 3:], table


@pytest.mark.parametrize("name", OPTIONS)
def test_emitted_tokens_follow_the_target(small_qs, monkeypatch, name):
    """Every transition of 20,480 emitted tokens, against the target's distribution as Hugging Face processes it."""
    sequences, table = run_table(small_qs, monkeypatch, OPTIONS[name])
    assert 0.1 < small_qs.last_stats.draft_acceptance_rate < 0.9
    assert transition_pvalue(sequences, processed(table.target, OPTIONS[name])) > ALPHA


@pytest.mark.parametrize("gamma", [0, 1, 7])
def test_emitted_tokens_follow_the_target_for_every_gamma(small_qs, monkeypatch, gamma):
    sequences, table = run_table(small_qs, monkeypatch, OPTIONS["plain"], gamma)
    assert transition_pvalue(sequences, processed(table.target, OPTIONS["plain"])) > ALPHA


def test_the_test_notices_a_lenient_acceptance(small_qs, monkeypatch):
    """Drafts that stand as the target's second choice are text of another distribution; the chi-square rejects it."""

    def lenient(drafts, scores):
        among_two = (scores[:, :-1].topk(2).indices == drafts[..., None]).any(-1)
        accepted = among_two.long().cumprod(1).sum(1)
        return accepted, scores.argmax(-1).gather(1, accepted[:, None])[:, 0]

    monkeypatch.setattr(small_qs, "session", Session(small_qs.pair, lenient))
    sequences, table = run_table(small_qs, monkeypatch, OPTIONS["plain"])
    assert transition_pvalue(sequences, processed(table.target, OPTIONS["plain"])) < ALPHA


# --- End to end ------------------------------------------------------------------------------------------------------


def conditional_pvalue(sequences: Tensor, probs: Tensor) -> float:
    """Chi-square of ``(N,)`` tokens, each drawn from its own row of ``(N, V)`` probabilities."""
    probs = probs.double()
    deviation = torch.bincount(sequences, minlength=VOCAB).double() - probs.sum(0)
    covariance = torch.diag(probs.sum(0)) - probs.T @ probs
    # Deviations sum to zero, so the covariance has rank V - 1.
    statistic = deviation @ torch.linalg.pinv(covariance) @ deviation
    return float(chi2.sf(float(statistic), VOCAB - 1))


def test_real_pair_follows_hugging_faces_distribution(small_qs):
    """20,400 tokens of a real pair, each against Hugging Face's own probabilities after the same text."""
    batch, prompt_len, new = 340, 4, 60
    ids = torch.randint(3, VOCAB, (batch, prompt_len), generator=seeded(3))
    options = {"do_sample": True, "top_k": 0, "temperature": 1.4, "max_new_tokens": new, "eos_token_id": None}
    output = small_qs.generate(ids, torch.ones_like(ids), seed=1, num_speculative_tokens=2, **options)
    assert small_qs.last_stats.draft_acceptance_rate < 0.97
    with torch.no_grad():
        logits = small_qs.model(output, attention_mask=torch.ones_like(output)).logits
    probs = (logits[:, prompt_len - 1 : -1] / 1.4).softmax(-1).flatten(0, 1)
    tokens = output[:, prompt_len:].flatten()
    assert len(tokens) >= 20_000
    # By token, and by token among those that follow a text with this likeliest token.
    assert conditional_pvalue(tokens, probs) > ALPHA
    for likeliest in range(VOCAB):
        rows = probs.argmax(-1) == likeliest
        if rows.sum() > 1000:
            assert conditional_pvalue(tokens[rows], probs[rows]) > ALPHA / VOCAB


# --- Scores that nothing can be drawn from ---------------------------------------------------------------------------


class Fill(hf.LogitsProcessor):
    """Writes ``value`` over the scores of ``tokens`` once the text has ``length`` tokens."""

    def __init__(self, value: float, tokens: slice = slice(None), length: int = 0) -> None:
        self.value, self.tokens, self.length = value, tokens, length

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        if input_ids.shape[1] >= self.length:
            scores[:, self.tokens] = self.value
        return scores


@pytest.mark.parametrize(
    "options",
    [
        {"suppress_tokens": list(range(VOCAB))},
        {"temperature": 1e-40},
        {"logits_processor": [Fill(float("-inf"))]},
        {"logits_processor": [Fill(float("inf"), slice(3, 4))]},
        {"logits_processor": [Fill(float("nan"), slice(3, 4))]},
        {"logits_processor": [Fill(float("-inf"), length=14)]},
        {"logits_processor": [Fill(float("nan"), slice(3, 4), length=14)]},
        {"logits_processor": [Fill(float("inf"), slice(3, 4), length=14)], "num_speculative_tokens": 0},
    ],
    ids=["suppressed", "temperature", "-inf", "inf", "NaN", "-inf later", "NaN later", "inf later, no drafts"],
)
def test_scores_that_leave_no_distribution_are_an_error_as_in_hugging_face(small_qs, options):
    ids = torch.tensor([[3, 4, 5, 6, 7, 3, 4, 5]])
    common = {"do_sample": True, "top_k": 0, "max_new_tokens": 12, "eos_token_id": None}
    plain = {name: value for name, value in options.items() if name != "num_speculative_tokens"}
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        small_qs.model.generate(ids, **common, **plain)
    with pytest.raises(FloatingPointError, match=r"no token can be sampled.*processors"):
        small_qs.generate(ids, **common, **options)
    assert small_qs.generate(ids, seed=1, **common).shape == (1, 20)


def test_scores_past_the_end_of_a_text_may_leave_nothing(small_qs):
    """Only where Hugging Face would draw: not behind a draft token that is rejected or not awaited."""
    ids = torch.tensor([[3, 4, 5, 6, 7, 3, 4, 5]])
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 12, "eos_token_id": None, "seed": 1}
    processors = [Fill(float("-inf"), length=20)]
    assert small_qs.generate(ids, logits_processor=processors, **options).shape == (1, 20)


def test_a_constraint_that_nothing_meets_behind_rejected_drafts_is_no_error(small_qs, monkeypatch):
    """Token 3 is forbidden by the target alone, and after it nothing is allowed: the text never gets there."""
    forward = type(small_qs.pair).forward

    def opposed(self, role, *inputs, cache):
        logits = forward(self, role, *inputs, cache=cache)
        logits[..., 3] = 30.0 if role is Role.DRAFT else float("-inf")
        return logits

    class NothingAfter(hf.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.masked_fill((input_ids[:, -1:] == 3), float("-inf"))

    monkeypatch.setattr(type(small_qs.pair), "forward", opposed)
    ids = torch.tensor([[3, 4, 5, 6, 7, 3, 4, 5]])
    tokens = small_qs.generate(
        ids, do_sample=True, top_k=0, max_new_tokens=12, eos_token_id=None, logits_processor=[NothingAfter()]
    )
    assert 3 not in tokens[0, 8:]
    assert small_qs.last_stats.drafted > 0
    assert small_qs.last_stats.accepted == 0


def test_a_head_narrower_than_the_embedding():
    """As where the embedding is padded; also in a cycle that drafts nothing, which the last token's is."""
    model = tiny_model("llama")
    model.lm_head = torch.nn.Linear(64, VOCAB, bias=False)
    model.generation_config.eos_token_id = None
    narrow = quantspec.convert(model, kv_group_size=16)
    for max_new_tokens in range(1, 7):
        text = narrow.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=max_new_tokens, do_sample=True, seed=1)
        assert text.shape == (1, 3 + max_new_tokens)
        assert text[0, 3:].max() < VOCAB
