"""Logits processors with state of their own: the same calls, and so the same text, at every number of drafts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import GROUP
from repeats import repeat
from step_by_step import pad_batch, random_prompt
from test_sampling import ALPHA, VOCAB, Table, seeded, small_qs, transition_pvalue
from torch import Tensor
from transformers import LogitsProcessor, SynthIDTextWatermarkingConfig, WatermarkingConfig
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor as Guidance
from transformers.generation import logits_process as hf

__all__ = ["small_qs"]

# Nothing is quantized before 2G tokens: there the target computes what Hugging Face does.
NEW_TOKENS = 14


class EveryThird(LogitsProcessor):
    """Counts its calls, and forces a token at every third."""

    calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls % 3 == 0:
            scores[:, 77] = 1e4
        return scores


class Alternate(LogitsProcessor):
    """A small automaton: states follow each row's newest token, which must be one of its state's; fails elsewhere."""

    def __init__(self) -> None:
        self.states: list[int] | None = None

    def __call__(self, input_ids, scores):
        if self.states is None:
            self.states = [0] * len(scores)
        else:
            for row, token in enumerate(input_ids[:, -1].tolist()):
                assert token == 0 or token % 3 == self.states[row], "a token that the state does not allow"
                self.states[row] = (self.states[row] + 1 + token // 48) % 3
        allowed = torch.arange(scores.shape[1])[None] % 3 == torch.tensor(self.states)[:, None]
        return scores.masked_fill(~allowed, float("-inf"))


class Budget(hf.RepetitionPenaltyLogitsProcessor):
    """A subclass of a processor without state that has some: the penalty grows with every call."""

    def __init__(self) -> None:
        super().__init__(1.0)

    def __call__(self, input_ids, scores):
        self.penalty += 0.2
        return super().__call__(input_ids, scores)


class Recorder(LogitsProcessor):
    """Keeps the texts that it is called with."""

    def __init__(self) -> None:
        self.texts: list[list[list[int]]] = []

    def __call__(self, input_ids, scores):
        self.texts.append(input_ids.tolist())
        return scores


def rotating() -> Callable[[int, Tensor], list[int]]:
    """A ``prefix_allowed_tokens_fn`` that allows other tokens at every call."""
    calls = 0

    def allowed(batch_id: int, ids: Tensor) -> list[int]:
        nonlocal calls
        calls += 1
        return list(range(3 + calls % 5, 96, 5))

    return allowed


def synth_id() -> LogitsProcessor:
    config = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[654, 400, 836], context_history_size=16)
    return config.construct_processor(96, "cpu")


PROCESSORS: dict[str, Callable[[object, Tensor], dict]] = {
    "counter": lambda qs, ids: {"logits_processor": [EveryThird()]},
    "automaton": lambda qs, ids: {"logits_processor": [Alternate()]},
    "growing": lambda qs, ids: {"logits_processor": [Budget()]},
    "guidance": lambda qs, ids: {"logits_processor": [Guidance(1.5, qs.model, unconditional_ids=ids[:, -1:])]},
    "synth_id": lambda qs, ids: {"logits_processor": [synth_id()]},
    "watermark": lambda qs, ids: {"watermarking_config": WatermarkingConfig(bias=3.0)},
    "guidance_scale": lambda qs, ids: {"guidance_scale": 1.5},
    "prefix_fn": lambda qs, ids: {"prefix_allowed_tokens_fn": rotating()},
    "among_others": lambda qs, ids: {"logits_processor": [EveryThird()], "repetition_penalty": 1.3, "min_length": 9},
}


def ragged(batch: int) -> dict[str, Tensor]:
    """``batch`` prompts of different lengths, padded left."""
    lengths = [8, 5, 7][:batch]
    prompts = [random_prompt(length, 30 + length) for length in lengths]
    ids, mask = pad_batch(prompts, [8 - length for length in lengths], 8)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", PROCESSORS)
def test_text_is_hugging_faces_at_every_number_of_drafts(qs, name, batch):
    inputs = ragged(batch)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, **inputs}

    def of_its_own() -> dict:
        return PROCESSORS[name](qs, inputs["input_ids"])

    expected = qs.model.generate(**options, **of_its_own())
    assert not torch.equal(expected, qs.model.generate(**options)), "the processor did nothing here"
    for gamma in (0, 1, 4):
        assert torch.equal(qs.generate(num_speculative_tokens=gamma, **options, **of_its_own()), expected), gamma
        assert (qs.last_stats.drafted > 0) == (gamma > 0)


@pytest.mark.parametrize("name", ["counter", "automaton", "growing"])
def test_text_over_flushes_is_that_without_drafts(qs, name):
    inputs = {"input_ids": torch.tensor([random_prompt(2 * GROUP + 8, seed) for seed in (1, 3)])}
    options = {"max_new_tokens": 10, "eos_token_id": None, **inputs}
    expected = qs.generate(num_speculative_tokens=0, **options, **PROCESSORS[name](qs, inputs["input_ids"]))
    ours = qs.generate(num_speculative_tokens=4, **options, **PROCESSORS[name](qs, inputs["input_ids"]))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("gamma", [0, 3, 7])
def test_calls_are_hugging_faces_also_behind_the_end_of_a_row(qs, gamma):
    """One call a token for all rows, with padding behind a row's end, and none after all are done."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **ragged(3)}
    free = qs.model.generate(eos_token_id=None, **options)[:, 8:].tolist()
    # Each row ends somewhere else, and none at the most tokens.
    eos = [row[index] for row, index in zip(free, (3, 6, 9), strict=True)]
    theirs, ours = Recorder(), Recorder()
    expected = qs.model.generate(eos_token_id=eos, logits_processor=[theirs], **options)
    found = qs.generate(eos_token_id=eos, logits_processor=[ours], num_speculative_tokens=gamma, **options)
    assert torch.equal(found, expected)
    assert ours.texts == theirs.texts
    assert len(ours.texts) < NEW_TOKENS


def test_drafts_are_accepted_in_lockstep(qs, monkeypatch):
    """With the target itself as the draft all are accepted, and every row emits as many tokens as the others."""
    forward = type(qs.pair).forward

    def perfect(self, role, *inputs, cache):
        draft = role is type(role).DRAFT
        return forward(self, type(role).TARGET if draft else role, *inputs, cache=cache)

    monkeypatch.setattr(type(qs.pair), "forward", perfect)
    recorder = Recorder()
    qs.generate(
        max_new_tokens=11, eos_token_id=None, logits_processor=[recorder], num_speculative_tokens=4, **ragged(2)
    )
    # One token of the prefill and two cycles of five.
    assert qs.last_stats.drafted == qs.last_stats.accepted == 2 * 2 * 4
    assert len(recorder.texts) == 11


def test_scores_are_those_that_were_processed(qs):
    options = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_scores": True,
        **ragged(2),
    }
    theirs = qs.model.generate(logits_processor=[EveryThird()], **options)
    ours = qs.generate(logits_processor=[EveryThird()], **options)
    assert len(ours.scores) == len(theirs.scores) == NEW_TOKENS
    for step, expected in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(step, expected, atol=1e-3, rtol=1e-3)


def test_a_criterion_ends_the_calls(qs):
    """Criteria are asked between the calls, as in Hugging Face: a grammar that has ended is not called again."""

    class AtCall(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            assert self.calls <= 5
            return scores

    processor = AtCall()

    def done(input_ids: Tensor, scores: object, **options: object) -> Tensor:
        return torch.full((len(input_ids),), processor.calls == 5)

    text = qs.generate(
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        logits_processor=[processor],
        stopping_criteria=[done],
        **ragged(2),
    )
    assert text.shape == (2, 8 + 5)


# --- Sampling --------------------------------------------------------------------------------------------------------


class Shift(LogitsProcessor):
    """Another distribution at odd calls than at even ones."""

    def __init__(self) -> None:
        self.calls = 0
        self.bias = torch.stack([torch.zeros(VOCAB), 1.5 * torch.randn(VOCAB, generator=seeded(4))])

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores + self.bias[self.calls % 2]


@pytest.mark.parametrize("gamma", [0, repeat(1), 4])
def test_sampled_tokens_follow_the_processed_target(small_qs, monkeypatch, gamma):
    """All transitions of many short texts, those of odd and of even calls apart."""
    table = Table()
    monkeypatch.setitem(vars(small_qs.pair), "forward", table.forward)
    transitions: list[list[Tensor]] = [[], []]
    drafted = accepted = 0
    for seed in range(60):
        ids = torch.randint(3, VOCAB, (4, 4), generator=seeded(seed))
        text = small_qs.generate(
            ids,
            do_sample=True,
            top_k=0,
            temperature=1.2,
            seed=4 * seed,
            max_new_tokens=40,
            eos_token_id=None,
            num_speculative_tokens=gamma,
            logits_processor=[Shift()],
        )[:, 3:]
        drafted += small_qs.last_stats.drafted
        accepted += small_qs.last_stats.accepted
        for step in range(40):
            transitions[(step + 1) % 2].append(text[:, step : step + 2])
    assert gamma == 0 or 0 < accepted < 0.9 * drafted
    for odd, pairs in enumerate(transitions):
        probs = ((table.target + Shift().bias[odd]) / 1.2).softmax(-1)
        assert transition_pvalue(torch.cat(pairs), probs) > ALPHA


def failing(batch_id: int, ids: Tensor) -> list[int]:
    raise RuntimeError("no such state")


@pytest.mark.parametrize("new_tokens", [1, 5])
def test_an_error_inside_a_processor_says_how_it_is_called(qs, new_tokens):
    with pytest.raises(RuntimeError, match="no such state") as caught:
        qs.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=new_tokens, prefix_allowed_tokens_fn=failing)
    assert any("once per token, with the text accepted so far" in note for note in caught.value.__notes__)
