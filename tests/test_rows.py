"""Rows of a batch with seeds and options of their own: each gets the text that it gets alone."""

from __future__ import annotations

import pytest
import torch
from conftest import GROUP
from generation_options import Nothing
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest
from step_by_step import pad_batch, random_prompt
from test_cycle import gpu_qs, needs_cuda
from test_score_programs import BATCH, MAKERS, WIDTH, logits_of, texts, without_graphs
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from quantspec.engine.logits_processors import ScoreProgram, apply_processors, compilable, merge_processors, program_key
from quantspec.engine.noise import gumbel, random_bits
from quantspec.engine.row_processors import PerRow
from quantspec.engine.text import Text

__all__ = ["gpu_qs", "without_graphs"]

# Texts this short lie in full precision whatever the cycles, so that γ does not show in the logits either.
PROMPT_LEN, NEW_TOKENS = 8, 2 * GROUP - 8 - 6
SEEDS = [11, 12, 2**64 - 1]


# --- The noise -------------------------------------------------------------------------------------------------------


def test_random_bits_are_splitmix64s():
    """The first outputs of its authors' program for the seed 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    steps = 1234567 * pow(0x9E3779B97F4A7C15, -1, 2**64) % 2**64
    found = random_bits(torch.full((4,), steps - 2**64), torch.arange(1, 5))
    assert [number % 2**64 for number in found.tolist()] == expected


def test_noise_is_gumbels():
    noise = gumbel(torch.tensor([0, 1]), torch.arange(4).expand(2, -1), 20_000)
    assert noise.isfinite().all()
    assert kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 0.001


def test_noise_of_other_seeds_positions_and_tokens_is_unrelated():
    """Seeds and positions that follow each other, in turn and both at once."""
    base = gumbel(torch.tensor([5]), torch.tensor([[7]]), 20_000)[0, 0]
    others = [(6, 7), (4, 7), (5, 8), (5, 6), (6, 6), (4, 8), (6, 8)]
    rows = [gumbel(torch.tensor([seed]), torch.tensor([[position]]), 20_000)[0, 0] for seed, position in others]
    correlations = torch.corrcoef(torch.stack([base, base.roll(1), base.roll(-1), *rows]))[0, 1:]
    assert correlations.abs().max() < 0.03


def test_the_likeliest_tail_is_drawn_as_often_as_it_should_be():
    """Of 2,000 tokens that share a hundredth, one is drawn a hundredth of the time: 200 times, within 4 deviations."""
    count = 2000
    scores = torch.full((count + 1,), 0.01 / count).log()
    scores[0] = torch.tensor(0.99).log()
    drawn = [
        (scores + gumbel(torch.tensor([seed]), torch.arange(100)[None], count + 1)[0]).argmax(-1) for seed in range(200)
    ]
    assert 144 < int((torch.cat(drawn) > 0).sum()) < 256


# --- Seeds -----------------------------------------------------------------------------------------------------------


def prompts(batch: int = 3) -> list[list[int]]:
    return [random_prompt(PROMPT_LEN, seed) for seed in range(batch)]


def sampled(qs, rows: list[list[int]], **options) -> list[list[int]]:
    """The new tokens of each row."""
    ids = torch.tensor(rows, device=qs.model.device)
    common = {"do_sample": True, "top_k": 0, "temperature": 1.5, "max_new_tokens": NEW_TOKENS, "eos_token_id": None}
    options = {"attention_mask": torch.ones_like(ids), **common, **options}
    return qs.generate(ids, **options)[:, ids.shape[1] :].tolist()


def alone(qs, **options) -> list[list[int]]:
    return [sampled(qs, [row], seed=seed, **options)[0] for row, seed in zip(prompts(), SEEDS, strict=True)]


@pytest.mark.parametrize("gamma", [0, 1, 4, "auto"])
def test_a_seed_gives_one_text(qs, gamma):
    """Alone without drafts, and in batches in any place beside any row with any number of drafts."""
    expected = alone(qs, num_speculative_tokens=0)
    assert len({tuple(text) for text in expected}) == 3
    assert alone(qs, num_speculative_tokens=gamma) == expected
    assert sampled(qs, prompts(), seed=SEEDS, num_speculative_tokens=gamma) == expected
    assert sampled(qs, prompts()[::-1], seed=SEEDS[::-1], num_speculative_tokens=gamma) == expected[::-1]
    if gamma in (1, 4):
        assert 0 < qs.last_stats.draft_acceptance_rate < 1


def test_a_text_has_nothing_of_its_prefill(qs, monkeypatch):
    """Padding, chunks, and a cache that holds the beginning."""
    expected = alone(qs)
    ids, mask = pad_batch(prompts(), [3, 0, 5], PROMPT_LEN + 5)
    assert sampled(qs, ids.tolist(), attention_mask=mask, seed=SEEDS) == expected
    sampled(qs, [row[:5] for row in prompts()], seed=1)
    assert sampled(qs, prompts(), seed=SEEDS, continue_cache=True) == expected
    assert qs.last_stats.continued_tokens > 0
    monkeypatch.setattr(type(qs.pair), "fill_chunk", lambda self, batch, tokens: 3)
    assert sampled(qs, prompts(), seed=SEEDS) == expected


@pytest.mark.parametrize("gamma", [0, 4])
def test_processors_on_the_host_draw_by_the_same_noise(qs, gamma):
    options = {"logits_processor": LogitsProcessorList([Nothing()]), "num_speculative_tokens": gamma}
    assert sampled(qs, prompts(), seed=SEEDS, **options) == alone(qs)


def test_one_seed_stands_for_those_that_follow_it(qs):
    assert sampled(qs, prompts(), seed=7) == sampled(qs, prompts(), seed=[7, 8, 9])
    assert sampled(qs, prompts(), seed=2**64 - 2) == sampled(qs, prompts(), seed=torch.tensor([-2, -1, 0]))
    sequences = sampled(qs, prompts(1), seed=7, num_return_sequences=3)
    assert sequences == [sampled(qs, prompts(1), seed=seed)[0] for seed in (7, 8, 9)]


def test_without_a_seed_the_generator_gives_the_rows_theirs(qs):
    """Torch's global one or the caller's, which goes on; greedy search takes nothing from it."""
    torch.manual_seed(3)
    first, second = (sampled(qs, prompts()) for _ in range(2))
    torch.manual_seed(3)
    sampled(qs, prompts(), do_sample=False)
    assert [sampled(qs, prompts()) for _ in range(2)] == [first, second]
    assert first != second
    generator = torch.Generator(qs.model.device).manual_seed(3)
    assert [sampled(qs, prompts(), generator=generator) for _ in range(2)] == [first, second]


def test_the_other_side_takes_seeds(qs):
    """``model.generate(custom_generate=qs.decode)``."""
    ids = torch.tensor(prompts())
    options = {"do_sample": True, "max_new_tokens": 4, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    theirs = qs.model.generate(ids, custom_generate=qs.decode, seed=SEEDS, **options)
    assert torch.equal(theirs, qs.generate(ids, seed=SEEDS, **options))


# --- Options ---------------------------------------------------------------------------------------------------------

GREEDY = {"do_sample": False}
TABLE = {
    "greedy beside sampled": [GREEDY, {}, {"temperature": 0.4}],
    "cut-offs": [{"top_p": 0.5}, {"top_k": 4}, {"min_p": 0.2, "typical_p": 0.6}],
    "more cut-offs": [{"epsilon_cutoff": 0.01}, {"eta_cutoff": 0.02}, {"top_h": 0.5, "top_k": 80}],
    "penalties": [{"repetition_penalty": 2.0}, {"encoder_repetition_penalty": 3.0}, GREEDY],
    "n-grams": [{"no_repeat_ngram_size": 1}, {"encoder_no_repeat_ngram_size": 1}, GREEDY | {"no_repeat_ngram_size": 2}],
    "tokens": [
        {"suppress_tokens": list(range(3, 50))},
        {"bad_words_ids": [[5], [6, 7]]},
        GREEDY | {"sequence_bias": [[[30], 9.0], [[30, 31], 99.0]]},
    ],
    "ends": [
        {"eos_token_id": list(range(3, 40)), "min_new_tokens": 5},
        {"max_new_tokens": 3},
        {"max_new_tokens": 7, "forced_eos_token_id": 2, "eos_token_id": 2},
    ],
    "lengths": [
        {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 3},
        {"min_length": PROMPT_LEN + 6, "eos_token_id": list(range(3, 60))},
        {"begin_suppress_tokens": list(range(3, 80)), "max_length": PROMPT_LEN + 5, "max_new_tokens": None},
    ],
    "rest": [
        {"renormalize_logits": True},
        {"remove_invalid_values": True, "sequence_bias": [[[40], float("inf")]]},
        {"top_k": 300},
    ],
}


def cut(tokens: list[int], own: dict) -> list[int]:
    """Without the padding behind an end."""
    eos = own.get("eos_token_id")
    ends = [eos] if isinstance(eos, int) else eos or []
    first = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    limit = own.get("max_new_tokens") or (own["max_length"] - PROMPT_LEN if "max_length" in own else NEW_TOKENS)
    return tokens[: min(first + 1, limit)]


def check_rows(qs, rows: list[dict], **options) -> None:
    """The batch against each row alone."""
    together = sampled(qs, prompts(), seed=SEEDS, row_options=rows, **options)
    for row, own in enumerate(rows):
        (by_itself,) = sampled(qs, [prompts()[row]], **{"seed": SEEDS[row], **options, **own})
        assert cut(together[row], own) == cut(by_itself, own), f"row {row}"
        assert set(together[row][len(cut(together[row], own)) :]) <= {0}


@pytest.mark.parametrize("name", TABLE)
def test_rows_with_options_are_as_alone(qs, name):
    check_rows(qs, TABLE[name])


@pytest.mark.parametrize("gamma", [0, 1])
def test_rows_with_options_are_as_alone_at_other_gammas(qs, gamma):
    check_rows(qs, [GREEDY, {"top_p": 0.5, "repetition_penalty": 1.5}, {}], num_speculative_tokens=gamma)


class Counting(hf.LogitsProcessor):
    """Counts its calls; each is for all rows."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, input_ids, scores):
        self.batches.append(len(scores))
        return scores


def test_processors_on_the_host_run_beside_the_rows_own(qs):
    """A caller's processor is called once per token for the batch, and rows keep to their own allowed tokens."""
    rows = [GREEDY, {"top_k": 3}, {"repetition_penalty": 2.0}]
    counting = Counting()
    allowed = [list(range(3 + row, 96, 3)) for row in range(3)]
    options = {"prefix_allowed_tokens_fn": lambda row, ids: allowed[row]}
    together = sampled(
        qs, prompts(), seed=SEEDS, row_options=rows, logits_processor=LogitsProcessorList([counting]), **options
    )
    assert counting.batches == [3] * NEW_TOKENS
    for row, own in enumerate(rows):
        only = {"prefix_allowed_tokens_fn": lambda _, ids, row=row: allowed[row]}
        assert sampled(qs, [prompts()[row]], seed=SEEDS[row], **only, **own) == [together[row]]
        assert set(together[row]) <= set(allowed[row])


def test_rows_of_one_prompt_are_told_its_number(qs):
    texts = sampled(
        qs,
        prompts(2),
        num_return_sequences=2,
        prefix_allowed_tokens_fn=lambda prompt, ids: [30 + prompt],
        row_options=[{}, GREEDY, {"top_k": 3}, {}],
        max_new_tokens=2,
    )
    assert texts == [[30, 30], [30, 30], [31, 31], [31, 31]]


def test_a_row_that_nothing_can_be_sampled_for_is_an_error_but_a_greedy_one_is_none(qs):
    nothing = {"suppress_tokens": list(range(96))}
    with pytest.raises(FloatingPointError, match="no token can be sampled"):
        sampled(qs, prompts(), row_options=[{}, nothing, GREEDY])
    sampled(qs, prompts(), row_options=[{}, GREEDY | nothing, GREEDY])


def test_other_rows_need_no_other_replay(qs, without_graphs):
    """Values, seeds, and which row has which option, change in place."""
    qs.reset()
    rows = [GREEDY, {"temperature": 0.5, "top_p": 0.5}, {"repetition_penalty": 1.5, "top_k": 9}]
    others = [{"top_k": 30, "top_p": 0.9}, {"repetition_penalty": 1.1}, GREEDY | {"repetition_penalty": 3.0}]
    expected = [sampled(qs, prompts(), seed=SEEDS, row_options=options) for options in (rows, others)]
    assert len(without_graphs) == 1
    qs.reset()
    for options, text in zip((rows, others), expected, strict=True):
        for row, own in enumerate(options):
            assert sampled(qs, [prompts()[row]], seed=SEEDS[row], **own) == [text[row]]
    qs.reset()


@given(data=st.data())
def test_programs_of_rows_equal_the_rows_processors(data):
    """Any kinds in any rows, and then other values in the same program."""
    lens = data.draw(st.lists(st.integers(1, 20), min_size=BATCH, max_size=BATCH))
    names = data.draw(st.lists(st.sampled_from(sorted(MAKERS)), min_size=1, max_size=4, unique=True))
    count = data.draw(st.integers(1, 3))
    text = Text(BATCH, WIDTH, torch.device("cpu"))
    program, key = None, None
    for _ in range(2):
        rows = [
            LogitsProcessorList(
                data.draw(MAKERS[name])
                for name in names
                if name not in ("encoder_repetition", "encoder_ngrams") and data.draw(st.booleans())
            )
            for _ in range(BATCH)
        ]
        merged = merge_processors(rows)
        assert len(compilable(merged)) == len(merged)
        ids = texts(data.draw, lens)
        text.begin(ids, lens)
        if program is None or program_key(merged) != key:
            program, key = ScoreProgram(merged, text), program_key(merged)
        else:
            program.load(merged)
        logits = logits_of(data.draw(st.integers(0, 999)), count, 2.0)
        expected = logits.clone()
        try:
            for row, length in enumerate(lens):
                for place in range(count):
                    seen, own = ids[row : row + 1, : length + place], logits[row : row + 1, place].clone()
                    expected[row, place] = apply_processors(rows[row], seen, own)
        except ValueError:
            # Where nothing is left transformers' distributions refuse.
            return
        if "decay" in names:
            expected = expected.masked_fill(expected.isnan(), float("-inf"))
        torch.testing.assert_close(program(logits, 0), expected, rtol=0, atol=0, equal_nan=True)
    seen, scores = ids[:, : lens[0]], logits[:, 0]
    called = apply_processors(merged, seen, scores.clone())
    by_row = [apply_processors(own, seen[row : row + 1], scores[row : row + 1].clone()) for row, own in enumerate(rows)]
    assert torch.equal(called.nan_to_num(-1.0), torch.cat(by_row).nan_to_num(-1.0))


def test_rows_of_one_list_are_merged_into_it():
    processors = LogitsProcessorList([hf.TemperatureLogitsWarper(0.5)])
    assert merge_processors([processors] * 3) is processors
    shared = hf.TopKLogitsWarper(3)
    rows = [LogitsProcessorList([hf.TemperatureLogitsWarper(t), shared]) for t in (0.5, 0.7)]
    first, second = merge_processors(rows)
    assert isinstance(first, PerRow)
    assert second is shared


def test_a_merged_list_keeps_every_rows_order_and_does_not_depend_on_theirs():
    a, b, c = hf.TemperatureLogitsWarper(0.5), hf.TopKLogitsWarper(3), hf.MinPLogitsWarper(0.1)
    rows = [[c], [a, b], [b, c], []]
    keys = {program_key(merge_processors([LogitsProcessorList(row) for row in order])) for order in (rows, rows[::-1])}
    assert len(keys) == 1
    kinds = [type(place.rows[1] or place.rows[2]) for place in merge_processors(list(map(LogitsProcessorList, rows)))]
    assert kinds == [type(a), type(b), type(c)]


def test_rows_whose_processors_come_in_contrary_orders_keep_their_own(qs):
    """A caller's processor stands where Hugging Face would put the option's, and elsewhere in a row without it."""
    rows = [{"no_repeat_ngram_size": 2, "repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, GREEDY]
    given = {"logits_processor": LogitsProcessorList([hf.RepetitionPenaltyLogitsProcessor(2.0), Nothing()])}
    check_rows(qs, rows, **given)
    a, b, shared = hf.TemperatureLogitsWarper(0.5), hf.TopKLogitsWarper(3), Nothing()
    orders = [[a, b, shared], [b, shared, a], [a, a]]
    merged = merge_processors(list(map(LogitsProcessorList, orders)))
    for row, order in enumerate(orders):
        own = [place.rows[row] for place in merged if isinstance(place, PerRow)]
        assert [processor for processor in own if processor is not None] == order
    assert sum(shared in place.rows for place in merged if isinstance(place, PerRow)) == 1


# --- Refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": [1, 2]}, ValueError, "seed has 2 numbers and the batch 3 rows"),
        ({"seed": [1, 2, 3], "num_return_sequences": 2}, ValueError, "seed has 3 numbers and the batch 6 rows"),
        ({"seed": [1, 2, 3.5]}, TypeError, "seed must be an int, or a list with an int for each row"),
        ({"seed": [1, 2, 2**64]}, ValueError, r"seed must be between -2\*\*63"),
        ({"seed": "7"}, TypeError, "seed must be an int"),
        ({"seed": True}, TypeError, "seed must be an int"),
        ({"seed": [1, 2, False]}, TypeError, "seed must be an int"),
        ({"seed": torch.tensor([7])}, ValueError, "seed has 1 numbers and the batch 3 rows"),
        ({"seed": torch.tensor([[1], [2], [3]])}, TypeError, "seed must be an int"),
        ({"seed": SEEDS, "generator": torch.Generator()}, ValueError, "either generator or seed"),
        ({"row_options": [{}]}, ValueError, "row_options has 1 entries and the batch 3 rows"),
        ({"row_options": {}}, TypeError, "row_options must be a list with a dict"),
        ({"row_options": [{}, {}, 0.7]}, TypeError, "row_options must be a list with a dict"),
        ({"row_options": [{}, {"num_beams": 2}, {}]}, ValueError, r"row_options\[1\] cannot set num_beams"),
        ({"row_options": [{}, {}, {"seed": 2}]}, ValueError, r"row_options\[2\] cannot set seed"),
        ({"row_options": [{}, {"temprature": 2.0}, {}]}, ValueError, r"row_options\[1\] cannot set temprature"),
        ({"row_options": [{}, {"temperature": -1.0}, {}]}, ValueError, "temperature"),
    ],
)
def test_bad_rows_are_refused_before_any_work(qs, monkeypatch, options, error, message):
    monkeypatch.setattr(type(qs.pair), "forward", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(error, match=message):
        sampled(qs, prompts(), **options)


# --- On a GPU --------------------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("gamma", [0, 4])
def test_replays_of_rows_equal_eager_cycles(gpu_qs, monkeypatch, gamma):
    rows = [GREEDY, {"temperature": 0.5, "top_p": 0.5}, {"repetition_penalty": 1.5}]
    options = {"seed": SEEDS, "row_options": rows, "num_speculative_tokens": gamma}
    captured = sampled(gpu_qs, prompts(), **options)
    kept = gpu_qs.session.replays.kept()
    assert kept
    sampled(gpu_qs, prompts(), **options | {"seed": [1, 2, 3], "row_options": rows[::-1]})
    assert gpu_qs.session.replays.kept() == kept
    monkeypatch.setattr(type(gpu_qs.session.replays), "suit", lambda self: False)
    assert sampled(gpu_qs, prompts(), **options) == captured
