"""``generate``: greedy output is the target's own whatever the draft, and options mean what they do in Hugging Face."""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import torch
from conftest import GROUP
from hypothesis import given
from hypothesis import strategies as st
from step_by_step import (
    StepByStep,
    assert_is_targets_choice,
    assert_same_text,
    decode_step_by_step,
    pad_batch,
    random_prompt,
)
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor
from transformers.generation.streamers import BaseStreamer

from quantspec import GenerateOutput
from quantspec.engine.sampling import accept
from quantspec.engine.session import Session
from quantspec.pair import Pair
from quantspec.pair.pair import by_address
from quantspec.passes import Role

LONG = 2 * GROUP + 8
# Nothing is quantized before 2G tokens: there the target computes what Hugging Face does.
SHORT, SHORT_NEW = 8, 14


def new_tokens(output: torch.Tensor, prompt_len: int) -> list[int]:
    """The generated part of a batch of one."""
    return output[0, prompt_len:].tolist()


def generate(qs, prompt: list[int], max_new_tokens: int, **options) -> list[int]:
    """Tokens after ``prompt``, without stopping at EOS unless asked to."""
    options.setdefault("eos_token_id", None)
    output = qs.generate(torch.tensor([prompt]), max_new_tokens=max_new_tokens, **options)
    return new_tokens(output, len(prompt))


# --- Greedy: equal to the target alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1, 4, 7, 15])
def test_greedy_equals_target_only(qs, gamma):
    """Prompts over 2G and outputs over flush boundaries, against gamma = 0 and against the driver of this folder."""
    prompt = random_prompt(LONG, seed=gamma)
    tokens = generate(qs, prompt, 2 * GROUP + 5, num_speculative_tokens=gamma)
    assert qs.last_stats.flushes >= 1
    assert qs.last_stats.accepted > 0
    assert tokens == decode_step_by_step(qs, prompt, 2 * GROUP + 5)
    assert tokens == generate(qs, prompt, 2 * GROUP + 5, num_speculative_tokens=0)


def test_zero_speculative_tokens_is_step_by_step_decoding(qs):
    prompt = random_prompt(LONG, seed=1)
    tokens = generate(qs, prompt, GROUP + 9, num_speculative_tokens=0)
    assert tokens == decode_step_by_step(qs, prompt, GROUP + 9)
    assert qs.last_stats.drafted == 0
    assert qs.last_stats.cycles == GROUP + 8


@pytest.mark.parametrize("length", [1, GROUP - 1, GROUP, 2 * GROUP - 1, 2 * GROUP, 2 * GROUP + 1, 4 * GROUP - 1])
def test_prompt_lengths_around_group_boundaries(qs, length):
    prompt = random_prompt(length, seed=length)
    assert generate(qs, prompt, GROUP + 4) == decode_step_by_step(qs, prompt, GROUP + 4)


def test_every_token_is_the_targets_argmax(qs):
    prompt = random_prompt(LONG, seed=3)
    assert_is_targets_choice(qs, prompt, generate(qs, prompt, 2 * GROUP))


def test_a_text_that_parts_at_a_tie_is_held_to_the_target_behind_it(qs):
    """The comparison that other tests use: after the tie, too, every token must be the target's own choice."""
    prompt = random_prompt(SHORT)
    expected = decode_step_by_step(qs, prompt, SHORT_NEW)
    steps = StepByStep(qs, prompt)
    margins, runners_up = [], []
    for token in expected[:-1]:
        first, second = steps.logits.topk(2).values.tolist()
        margins.append(first - second)
        runners_up.append(int(steps.logits.topk(2).indices[1]))
        steps.feed(token)
    place = margins.index(min(margins))
    tie = margins[place] + 1e-3
    other = [*expected[:place], runners_up[place]]
    other += decode_step_by_step(qs, prompt + other, SHORT_NEW - len(other))
    assert_same_text(qs, prompt, other, expected, tie)
    other[-1] = 3 if other[-1] != 3 else 4
    with pytest.raises(AssertionError, match="below the target's argmax"):
        assert_same_text(qs, prompt, other, expected, tie)


def test_short_text_equals_hugging_face(qs):
    """Nothing is quantized below 2G tokens, so the output is Hugging Face's, token for token."""
    ids = torch.tensor([random_prompt(SHORT)])
    ours = qs.generate(ids, max_new_tokens=SHORT_NEW, eos_token_id=None)
    assert torch.equal(ours, qs.model.generate(ids, max_new_tokens=SHORT_NEW, eos_token_id=None, do_sample=False))


@pytest.fixture
def random_draft_weights(qs):
    """The draft's own (INT4) tensors filled with random bits and scales, for the length of a test."""
    shared = by_address(qs.target, qs.prefill, qs.model)
    own = [tensor for address, tensor in by_address(qs.draft).items() if address not in shared]
    assert own
    saved = [tensor.clone() for tensor in own]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in own:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            else:
                tensor.view(torch.uint8).random_(0, 256, generator=generator)
    yield
    with torch.no_grad():
        for tensor, before in zip(own, saved, strict=True):
            tensor.copy_(before)


def test_draft_with_random_weights_changes_nothing_but_speed(qs, random_draft_weights):
    prompt = random_prompt(LONG, seed=1)
    tokens = generate(qs, prompt, GROUP + 9)
    assert qs.last_stats.draft_acceptance_rate < 0.2
    assert_same_text(qs, prompt, tokens, decode_step_by_step(qs, prompt, GROUP + 9))


@pytest.mark.parametrize("kind", ["random", "constant", "worst"])
def test_draft_that_returns_garbage_changes_nothing_but_speed(qs, monkeypatch, kind):
    forward = type(qs.pair).forward

    def garbage(self, role, *inputs, cache):
        logits = forward(self, role, *inputs, cache=cache)
        if role is not Role.DRAFT:
            return logits
        return {"random": torch.rand_like(logits), "constant": torch.zeros_like(logits), "worst": -logits}[kind]

    prompt = random_prompt(LONG, seed=2)
    expected = decode_step_by_step(qs, prompt, GROUP + 9)
    monkeypatch.setattr(type(qs.pair), "forward", garbage)
    tokens = generate(qs, prompt, GROUP + 9)
    assert qs.last_stats.draft_acceptance_rate < 0.2
    assert_same_text(qs, prompt, tokens, expected)


@st.composite
def batches(draw):
    """Up to four prompts of very different lengths, padded left, right or on both sides."""
    lengths = draw(st.lists(st.integers(1, 4 * GROUP), min_size=1, max_size=4))
    width = max(lengths) + draw(st.sampled_from([0, 0, 5]))
    side = draw(st.sampled_from(["left", "right", "both"]))
    left = []
    for length in lengths:
        room = width - length
        left.append({"left": room, "right": 0, "both": draw(st.integers(0, room))}[side])
    seed = draw(st.integers(0, 2**16))
    return [random_prompt(length, seed + row) for row, length in enumerate(lengths)], left, width


@given(batch=batches(), gamma=st.integers(0, 6), max_new_tokens=st.integers(1, GROUP + 4))
def test_rows_of_a_batch_are_independent(qs, batch, gamma, max_new_tokens):
    """Each row equals the row generated alone, however the batch is padded."""
    prompts, left, width = batch
    ids, mask = pad_batch(prompts, left, width)
    options = {"max_new_tokens": max_new_tokens, "eos_token_id": None}
    output = qs.generate(ids, mask, num_speculative_tokens=gamma, **options)
    assert output.shape == (len(prompts), width + max_new_tokens)
    assert torch.equal(output[:, :width], ids)
    for row, prompt in enumerate(prompts):
        tie = 1e-3 if len(prompt) + max_new_tokens < 2 * GROUP else 0.08
        expected = decode_step_by_step(qs, prompt, max_new_tokens)
        assert_same_text(qs, prompt, output[row, width:].tolist(), expected, tie)


@pytest.fixture
def uneven(qs, monkeypatch):
    """The first row accepts whole blocks (its draft is the target itself), the others nothing."""
    forward = Pair.forward

    def perfect(self, role, *inputs, cache):
        return forward(self, Role.TARGET if role is Role.DRAFT else role, *inputs, cache=cache)

    def first_row_only(drafts, scores):
        accepted, _ = accept(drafts, scores)
        accepted[1:] = 0
        return accepted, scores.argmax(-1).gather(1, accepted[:, None]).squeeze(1)

    monkeypatch.setattr(Pair, "forward", perfect)
    monkeypatch.setattr(qs, "session", Session(qs.pair, first_row_only))


def test_rows_that_advance_at_different_speeds(qs, uneven):
    prompts = [random_prompt(LONG, 1), random_prompt(LONG, 2), random_prompt(5, 3)]
    ids, mask = pad_batch(prompts, [0, 0, LONG - 5], LONG)
    output = qs.generate(ids, mask, max_new_tokens=GROUP + 4, eos_token_id=None, num_speculative_tokens=5)
    assert qs.last_stats.accepted > GROUP / 2
    for row, prompt in enumerate(prompts):
        expected = decode_step_by_step(qs, prompt, GROUP + 4)
        assert_same_text(qs, prompt, output[row, LONG:].tolist(), expected)


def test_row_that_is_done_stays_within_the_table_of_positions(table_positions_qs, uneven):
    """A finished row keeps running beside the others; its positions must not run past a learned table's end."""
    qs = table_positions_qs
    prompts = [random_prompt(40, 1), random_prompt(4, 2)]
    ids, mask = pad_batch(prompts, [0, 36], 40)
    eight = qs.generate(ids, mask, max_new_tokens=8, eos_token_id=None, num_speculative_tokens=7)
    for row, prompt in enumerate(prompts):
        alone = generate(qs, prompt, 8, num_speculative_tokens=0)
        assert_same_text(qs, prompt, eight[row, 40:].tolist(), alone)


def test_half_precision_models(half_qs):
    """Output of a half-precision pair is its own target's choice, within that precision."""
    prompt = random_prompt(LONG, seed=5)
    tokens = generate(half_qs, prompt, GROUP + 6)
    assert half_qs.last_stats.accepted > 0
    assert_is_targets_choice(half_qs, prompt, tokens, tie=0.15)


# --- Inputs ----------------------------------------------------------------------------------------------------------


def test_mask_and_id_dtypes(qs):
    """int32 ids and bool, float or int32 masks mean the same as int64."""
    prompts = [random_prompt(LONG, 1), random_prompt(9, 2)]
    ids, mask = pad_batch(prompts, [0, LONG - 9], LONG)
    options = {"max_new_tokens": 6, "eos_token_id": None}
    expected = qs.generate(ids, mask, **options)
    for dtype in (torch.bool, torch.float32, torch.int32, torch.uint8):
        assert torch.equal(qs.generate(ids, mask.to(dtype), **options), expected)
    output = qs.generate(ids.int(), mask, repetition_penalty=1.3, **options)
    assert torch.equal(output, qs.generate(ids, mask, repetition_penalty=1.3, **options))


def test_mask_with_a_hole_hides_the_token(qs):
    prompt = random_prompt(SHORT)
    ids, mask = torch.tensor([prompt]), torch.ones(1, SHORT, dtype=torch.long)
    mask[0, 3] = 0
    output = qs.generate(ids, mask, max_new_tokens=6, eos_token_id=None)
    assert new_tokens(output, SHORT) == generate(qs, prompt[:3] + prompt[4:], 6)


def test_padding_is_found_without_a_mask(qs):
    """As in Hugging Face, pad tokens in ids tell the mask when none is given."""
    prompt = random_prompt(9, 2)
    ids, _ = pad_batch([random_prompt(20, 1), prompt], [0, 11], 20)
    output = qs.generate(ids, max_new_tokens=6, eos_token_id=None)
    assert output[1, 20:].tolist() == generate(qs, prompt, 6)


def test_without_a_prompt_generation_starts_at_bos(qs):
    output = qs.generate(max_new_tokens=5, eos_token_id=None)
    assert output.tolist() == [[1, *generate(qs, [1], 5)]]


def test_accepts_a_tokenizers_output(qs, tokenizer):
    batch = tokenizer(["hello world", "a"], return_tensors="pt", padding=True, return_token_type_ids=False)
    output = qs.generate(**batch, max_new_tokens=5)
    assert output.shape[0] == 2


# --- Lengths and padding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3])
def test_fewer_tokens_than_gamma(qs, max_new_tokens):
    prompt = random_prompt(LONG)
    tokens = generate(qs, prompt, max_new_tokens, num_speculative_tokens=7)
    assert tokens == decode_step_by_step(qs, prompt, max_new_tokens)
    # The last token of a cycle is the target's own, so no more than the others is worth drafting.
    assert qs.last_stats.drafted <= max(0, max_new_tokens - 2) * max_new_tokens


def test_max_length_counts_the_prompt(qs):
    prompt = random_prompt(LONG)
    output = qs.generate(torch.tensor([prompt]), max_length=LONG + 5, eos_token_id=None)
    assert new_tokens(output, LONG) == generate(qs, prompt, 5)


def test_max_new_tokens_wins_over_max_length(qs):
    output = qs.generate(torch.tensor([random_prompt(LONG)]), max_length=LONG + 9, max_new_tokens=3, eos_token_id=None)
    assert output.shape[1] == LONG + 3


@pytest.mark.parametrize("max_new_tokens", [3.0, 3.5])
def test_a_length_may_be_a_float(qs, max_new_tokens):
    """As the quotient of two numbers is."""
    ids = torch.tensor([random_prompt(SHORT)])
    options = {"max_new_tokens": max_new_tokens, "eos_token_id": None}
    ours = qs.generate(ids, num_speculative_tokens=4, **options)
    assert torch.equal(ours, qs.model.generate(ids, do_sample=False, **options))


def test_lengths_up_to_the_limit(table_positions_qs):
    """Prompt and output may fill max_cache_len to the last token."""
    prompt = random_prompt(30)
    assert len(generate(table_positions_qs, prompt, 18)) == 18


def test_defaults_come_from_the_models_generation_config(qs, monkeypatch):
    defaults = copy.deepcopy(qs.model.generation_config)
    defaults.max_new_tokens, defaults.eos_token_id = 7, None
    monkeypatch.setattr(qs.model, "generation_config", defaults)
    ids = torch.tensor([random_prompt(SHORT)])
    assert qs.generate(ids).shape[1] == SHORT + 7
    assert qs.generate(ids, max_new_tokens=3).shape[1] == SHORT + 3
    assert qs.generate(ids, generation_config=GenerationConfig(max_new_tokens=4)).shape[1] == SHORT + 4


def test_users_objects_are_not_changed(qs):
    config = GenerationConfig(max_new_tokens=4, do_sample=True, temperature=0.7)
    processors, criteria = LogitsProcessorList(), StoppingCriteriaList()
    ids = torch.tensor([random_prompt(SHORT)])
    mask = torch.ones_like(ids)
    before = [copy.deepcopy(x) for x in (config.to_dict(), qs.model.generation_config.to_dict(), ids, mask)]
    qs.generate(ids, mask, config, logits_processor=processors, stopping_criteria=criteria, seed=0)
    after = [config.to_dict(), qs.model.generation_config.to_dict(), ids, mask]
    assert before[:2] == after[:2]
    assert all(torch.equal(a, b) for a, b in zip(before[2:], after[2:], strict=True))
    assert len(processors) == len(criteria) == 0


# --- EOS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0, 3, 7])
def test_eos_at_every_place_of_a_block(qs, gamma):
    """Whichever token of the free output is called EOS, the output ends at its first occurrence."""
    prompt = random_prompt(LONG, seed=4)
    free = generate(qs, prompt, 12, num_speculative_tokens=0)
    for eos in sorted(set(free)):
        end = free.index(eos) + 1
        assert generate(qs, prompt, 12, eos_token_id=eos, num_speculative_tokens=gamma) == free[:end]


def test_several_eos_tokens(qs):
    prompt = random_prompt(LONG, seed=4)
    free = generate(qs, prompt, 12, num_speculative_tokens=0)
    ends = [free[8], free[5]]
    assert generate(qs, prompt, 12, eos_token_id=ends) == free[: min(free.index(e) for e in ends) + 1]


def test_finished_rows_are_padded(qs):
    """A row that ends early is filled with pad_token_id; others go on."""
    prompts = [random_prompt(LONG, 4), random_prompt(9, 5)]
    ids, mask = pad_batch(prompts, [0, LONG - 9], LONG)
    free = [generate(qs, prompt, 12, num_speculative_tokens=0) for prompt in prompts]
    eos = next(token for token in free[0][2:] if token not in free[1])
    end = free[0].index(eos) + 1
    output = qs.generate(ids, mask, max_new_tokens=12, eos_token_id=eos, pad_token_id=77)
    assert output[0, LONG:].tolist() == free[0][:end] + [77] * (12 - end)
    assert output[1, LONG:].tolist() == free[1]


def test_pad_token_defaults_to_eos(qs, monkeypatch):
    monkeypatch.setattr(qs.model.generation_config, "pad_token_id", None)
    prompts = [random_prompt(LONG, 4), random_prompt(LONG, 5)]
    free = [generate(qs, prompt, 8, num_speculative_tokens=0) for prompt in prompts]
    eos = next(token for token in free[0] if token not in free[1])
    output = qs.generate(torch.tensor(prompts), max_new_tokens=8, eos_token_id=eos)
    assert set(output[0, LONG + free[0].index(eos) :].tolist()) == {eos}


def test_row_that_is_done_at_its_first_token(qs):
    prompts = [random_prompt(LONG, 4), random_prompt(9, 5)]
    ids, mask = pad_batch(prompts, [0, LONG - 9], LONG)
    free = [generate(qs, prompt, 8, num_speculative_tokens=0) for prompt in prompts]
    assert free[0][0] not in free[1]
    output = qs.generate(ids, mask, max_new_tokens=8, eos_token_id=free[0][0])
    assert output[0, LONG:].tolist() == [free[0][0]] + [0] * 7
    assert output[1, LONG:].tolist() == free[1]


def test_all_done_at_the_first_token(qs):
    prompt = random_prompt(LONG)
    first = generate(qs, prompt, 1)
    assert generate(qs, prompt, 20, eos_token_id=first[0]) == first
    assert qs.last_stats.cycles == 0


# --- Stopping criteria -----------------------------------------------------------------------------------------------


class Recorder(StoppingCriteria):
    """Keeps what it is shown and stops each row after as many new tokens as ``stops`` says."""

    def __init__(self, prompt_len: int, stops: list[int]) -> None:
        self.prompt_len = prompt_len
        self.stops = torch.tensor(stops)
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return self.stops <= input_ids.shape[1] - self.prompt_len


class MultiTokenStop(StoppingCriteria):
    """As lm-eval's MultiTokenEOSCriteria: looks at the last few tokens only and remembers which rows are done."""

    def __init__(self, sequence: str, tokenizer, prompt_len: int, batch_size: int) -> None:
        self.sequence = sequence
        self.tokenizer = tokenizer
        self.prompt_len = prompt_len
        self.lookback = len(tokenizer.encode(sequence, add_special_tokens=False))
        self.done = [False] * batch_size

    def __call__(self, input_ids, scores, **kwargs):
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_len :][:, -self.lookback :])
        for row, text in enumerate(texts):
            self.done[row] = self.done[row] or self.sequence in text
        return all(self.done)


@pytest.mark.parametrize("stops", [[5], [9], [3, 7, 12]])
def test_criteria_are_called_once_per_token_in_order(qs, stops):
    """Each call shows one more token, never a drafted one that was not accepted; rows end where the criterion says."""
    prompts = [random_prompt(LONG, 10 + row) for row in range(len(stops))]
    free = [generate(qs, prompt, 12, num_speculative_tokens=0) for prompt in prompts]
    recorder = Recorder(LONG, stops)
    # A processor that reads the context makes the loop write drafts into the text; they must not show either.
    output = qs.generate(
        torch.tensor(prompts),
        max_new_tokens=12,
        eos_token_id=None,
        stopping_criteria=StoppingCriteriaList([recorder]),
        no_repeat_ngram_size=30,
    )
    assert [ids.shape[1] for ids in recorder.seen] == list(range(LONG + 1, LONG + max(stops) + 1))
    for row, stop in enumerate(stops):
        expected = free[row][:stop] + [0] * (max(stops) - stop)
        assert output[row, LONG:].tolist() == expected
        for ids in recorder.seen:
            assert ids[row].tolist() == output[row, : ids.shape[1]].tolist()


def test_lm_eval_like_criterion_stops_in_the_middle_of_a_block(qs, tokenizer):
    prompt = random_prompt(LONG, seed=4)
    free = generate(qs, prompt, 14, num_speculative_tokens=0)
    for start in range(1, 12):
        text = tokenizer.decode(free)
        stop = text[start : start + 2]
        criterion = MultiTokenStop(stop, tokenizer, LONG, 1)
        tokens = generate(qs, prompt, 14, stopping_criteria=StoppingCriteriaList([criterion]), num_speculative_tokens=5)
        assert tokenizer.decode(tokens) == text[: text.index(stop) + 2]


def test_lm_eval_like_criterion_with_a_batch(qs, tokenizer):
    """The criterion says done once all rows are: the output is cut there, exactly."""
    prompts = [random_prompt(LONG, 4), random_prompt(LONG, 5)]
    free = [generate(qs, prompt, 14, num_speculative_tokens=0) for prompt in prompts]
    shared = set(free[0][1:]) & set(free[1])
    stop = next(iter(sorted(shared)), None)
    texts = [tokenizer.decode(tokens) for tokens in free]
    # Rows need one stop string in common; where their outputs share no token, the second row repeats the first.
    if stop is None:
        prompts[1], texts[1], stop = prompts[0], texts[0], free[0][6]
    stop = tokenizer.decode([stop])
    criterion = MultiTokenStop(stop, tokenizer, LONG, 2)
    output = qs.generate(
        torch.tensor(prompts), max_new_tokens=14, eos_token_id=None, stopping_criteria=StoppingCriteriaList([criterion])
    )
    assert output.shape[1] - LONG == max(text.index(stop) for text in texts) + 1


def test_criterion_with_a_different_use_of_eos_token_id(qs):
    """Only Hugging Face's own criterion ends a row at its eos_token_id; another's attribute means what it likes."""

    class SecondTime(StoppingCriteria):
        def __init__(self, token: int) -> None:
            self.eos_token_id = token

        def __call__(self, input_ids, scores, **kwargs):
            return (input_ids[:, LONG:] == self.eos_token_id).sum(1) >= 2

    prompt = random_prompt(LONG, seed=4)
    free = generate(qs, prompt, 12)
    criteria = StoppingCriteriaList([SecondTime(free[3])])
    second = [i for i, token in enumerate(free) if token == free[3]][1:2]
    assert generate(qs, prompt, 12, stopping_criteria=criteria) == (free[: second[0] + 1] if second else free)


class EosAfterSomeTokens(EosTokenCriteria):
    """An EOS does not count among the first tokens."""

    def __call__(self, input_ids, scores, **kwargs):
        return super().__call__(input_ids, scores) & (input_ids.shape[1] >= SHORT + 6)


def test_a_length_criterion_beside_the_options(qs):
    ids = torch.tensor([random_prompt(SHORT, 11)])
    for length in (SHORT + 3, SHORT + SHORT_NEW):
        options = {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(length)]), "eos_token_id": None}
        ours = qs.generate(ids, max_new_tokens=SHORT_NEW, num_speculative_tokens=4, **options)
        assert torch.equal(ours, qs.model.generate(ids, max_new_tokens=SHORT_NEW, do_sample=False, **options))
        assert ours.shape[1] == length


def test_an_eos_criterion_with_a_rule_of_its_own(qs):
    prompt = random_prompt(SHORT, 11)
    eos = [generate(qs, prompt, SHORT_NEW)[place] for place in (1, 7)]
    options = {"stopping_criteria": StoppingCriteriaList([EosAfterSomeTokens(eos)]), "max_new_tokens": SHORT_NEW}
    options["eos_token_id"] = None
    ids = torch.tensor([prompt])
    ours = qs.generate(ids, num_speculative_tokens=4, **options)
    assert ours.shape[1] > SHORT + 2
    assert torch.equal(ours, qs.model.generate(ids, do_sample=False, **options))


def test_scores_reach_criteria(qs):
    """One tensor per token so far, when scores are collected."""
    counts = []

    class Watch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            counts.append(len(scores))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    options = {"return_dict_in_generate": True, "output_scores": True}
    generate_dict(qs, random_prompt(LONG), 6, stopping_criteria=StoppingCriteriaList([Watch()]), **options)
    assert counts == [1, 2, 3, 4, 5, 6]


def generate_dict(qs, prompt, max_new_tokens, **options) -> GenerateOutput:
    """A call with return_dict_in_generate among ``options``."""
    output = qs.generate(torch.tensor([prompt]), max_new_tokens=max_new_tokens, eos_token_id=None, **options)
    assert isinstance(output, GenerateOutput)
    return output


@pytest.mark.parametrize("gamma", [0, 5])
def test_stop_strings_end_at_the_exact_token(qs, tokenizer, gamma):
    """Stop strings of one to three tokens at every place of a block, as text and as a list."""
    prompt = random_prompt(LONG, seed=4)
    text = tokenizer.decode(generate(qs, prompt, 12, num_speculative_tokens=0))
    for start in range(9):
        stop = text[start : start + 1 + start % 3]
        tokens = generate(qs, prompt, 12, stop_strings=[stop, "~~"], tokenizer=tokenizer, num_speculative_tokens=gamma)
        # A stop string may also begin in the prompt.
        assert tokenizer.decode(tokens) == text[: text.index(stop) + len(stop)]
    assert tokenizer.decode(generate(qs, prompt, 12, stop_strings=text[4:6], tokenizer=tokenizer)) == text[:6]


def test_stop_strings_from_generation_configs(qs, tokenizer, monkeypatch):
    prompt = random_prompt(LONG, seed=4)
    text = tokenizer.decode(generate(qs, prompt, 12, num_speculative_tokens=0))
    config = GenerationConfig(stop_strings=[text[4:6]], eos_token_id=None, max_new_tokens=12)
    output = qs.generate(torch.tensor([prompt]), generation_config=config, tokenizer=tokenizer)
    assert tokenizer.decode(output[0, LONG:]) == text[:6]
    monkeypatch.setattr(qs.model.generation_config, "stop_strings", [text[2:4]])
    assert tokenizer.decode(generate(qs, prompt, 12, tokenizer=tokenizer)) == text[:4]


# --- Streaming -------------------------------------------------------------------------------------------------------


class Log(BaseStreamer):
    """Keeps what it is given; raises ``error`` at its ``raise_at``-th call, if set."""

    def __init__(self, raise_at: int = 0, error: BaseException | None = None) -> None:
        self.items: list[list] = []
        self.ended = False
        self.raise_at = raise_at
        self.error = error

    def put(self, value):
        self.items.append(value.tolist())
        if self.error is not None and len(self.items) == self.raise_at:
            raise self.error

    def end(self):
        assert not self.ended
        self.ended = True


def test_streamer_gets_prompt_then_tokens_then_end(qs):
    prompt = random_prompt(LONG)
    log = Log()
    tokens = generate(qs, prompt, 12, streamer=log)
    assert log.items == [[prompt], *([token] for token in tokens)]
    assert log.ended


def test_streamer_with_a_batch(qs):
    """One (batch,) block per step, padded where a row is done; the same as Hugging Face gives on short texts."""
    ids = torch.tensor([random_prompt(SHORT, 1), random_prompt(SHORT, 2)])
    free = qs.model.generate(ids, max_new_tokens=SHORT_NEW, eos_token_id=None, do_sample=False)
    eos = int(free[0, SHORT + 4])
    ours, theirs = Log(), Log()
    qs.generate(ids, max_new_tokens=SHORT_NEW, eos_token_id=eos, streamer=ours)
    qs.model.generate(ids, max_new_tokens=SHORT_NEW, eos_token_id=eos, do_sample=False, streamer=theirs)
    assert ours.items == theirs.items
    assert ours.ended


def test_text_streamer_prints_the_output(qs, tokenizer, capsys):
    prompt = random_prompt(LONG)
    tokens = generate(qs, prompt, 12, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == tokenizer.decode(tokens).strip()


def test_text_iterator_streamer_in_a_thread(qs, tokenizer):
    prompt = random_prompt(LONG)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=300)
    result = []
    thread = threading.Thread(target=lambda: result.append(generate(qs, prompt, 12, streamer=streamer)))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(result[0])


def test_text_streamer_refuses_batches(qs, tokenizer):
    """As in Hugging Face; the object still works afterwards."""
    prompts = [random_prompt(LONG, 1), random_prompt(LONG, 2)]
    with pytest.raises(ValueError, match="batch size 1"):
        qs.generate(torch.tensor(prompts), max_new_tokens=4, streamer=TextStreamer(tokenizer))
    assert generate(qs, prompts[0], 4) == decode_step_by_step(qs, prompts[0], 4)


@pytest.mark.parametrize("error", [RuntimeError("full disk"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_interrupted_call_leaves_nothing_behind(qs, error):
    """After an exception in the middle of the output, the next call gives the right answer."""
    prompt = random_prompt(LONG, seed=6)
    expected = decode_step_by_step(qs, prompt, GROUP)
    with pytest.raises(type(error)):
        generate(qs, random_prompt(3 * GROUP, seed=7), GROUP + 8, streamer=Log(GROUP, error))
    assert 0 < qs.last_stats.generated_tokens < GROUP + 8
    assert_same_text(qs, prompt, generate(qs, prompt, GROUP), expected)


def test_interrupted_forward_leaves_nothing_behind(qs, monkeypatch):
    prompt = random_prompt(LONG, seed=6)
    expected = decode_step_by_step(qs, prompt, GROUP)
    forward = type(qs.pair).forward
    calls = []

    def interrupted(self, role, *inputs, cache):
        calls.append(role)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return forward(self, role, *inputs, cache=cache)

    with monkeypatch.context() as patch:
        patch.setattr(type(qs.pair), "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(qs, random_prompt(3 * GROUP, seed=7), GROUP)
    assert_same_text(qs, prompt, generate(qs, prompt, GROUP), expected)


def test_calls_inside_and_outside_inference_mode(qs):
    """A cache made in inference mode serves calls outside of it, and the other way round."""
    qs.reset()
    prompt = random_prompt(LONG)
    expected = decode_step_by_step(qs, prompt, 6)
    with torch.inference_mode():
        assert generate(qs, prompt, 6) == expected
    assert generate(qs, prompt, 6) == expected
    longer = random_prompt(6 * GROUP)
    with torch.inference_mode():
        inside = generate(qs, longer, 6)
    with torch.enable_grad():
        assert generate(qs, longer, 6) == inside


def test_repeated_calls_of_all_sizes(qs):
    """One object serves calls of different batch, gamma and length in any order; each is what it is alone."""
    prompts = [random_prompt(length, seed=length) for length in (LONG, 5, 3 * GROUP)]
    expected = [decode_step_by_step(qs, prompt, 8) for prompt in prompts]
    for gamma in (4, 2, 4):
        for prompt, tokens in zip(prompts, expected, strict=True):
            assert_same_text(qs, prompt, generate(qs, prompt, 8, num_speculative_tokens=gamma), tokens)
        ids, mask = pad_batch(prompts, [3 * GROUP - len(p) for p in prompts], 3 * GROUP)
        output = qs.generate(ids, mask, max_new_tokens=8, eos_token_id=None, num_speculative_tokens=gamma)
        for row, prompt in enumerate(prompts):
            assert_same_text(qs, prompt, output[row, 3 * GROUP :].tolist(), expected[row])


# --- Dictionaries, scores and the Hugging Face side ------------------------------------------------------------------


def test_scores_equal_hugging_face(qs):
    """One (B, V) tensor per token, processed, zero-filled nowhere while rows run."""
    ids = torch.tensor([random_prompt(SHORT, 1), random_prompt(SHORT, 2)])
    options = {
        "max_new_tokens": SHORT_NEW,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_scores": True,
        "repetition_penalty": 1.2,
    }
    ours = qs.generate(ids, **options)
    theirs = qs.model.generate(ids, do_sample=False, **options)
    assert isinstance(ours, GenerateDecoderOnlyOutput)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.scores) == SHORT_NEW
    for our, their in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(our, their, atol=1e-4, rtol=0)
    assert ours.statistics.generated_tokens == 2 * SHORT_NEW
    assert ours.statistics is not qs.last_stats


def test_scores_when_rows_end_apart(qs):
    """As many scores as tokens of the longest row; each row's own until its end."""
    ids = torch.tensor([random_prompt(SHORT, 1), random_prompt(SHORT, 2)])
    options = {"max_new_tokens": SHORT_NEW, "return_dict_in_generate": True, "output_scores": True}
    free = qs.generate(ids, eos_token_id=None, **options)
    eos = int(free.sequences[0, SHORT + 2])
    cut = qs.generate(ids, eos_token_id=eos, **options)
    ends = [[*row[SHORT:].tolist(), eos].index(eos) + 1 for row in free.sequences]
    assert len(cut.scores) == cut.sequences.shape[1] - SHORT == min(max(ends), SHORT_NEW)
    for row, end in enumerate(ends):
        for step in range(min(end, SHORT_NEW)):
            torch.testing.assert_close(cut.scores[step][row], free.scores[step][row], atol=1e-4, rtol=0)


def test_dictionary_without_scores(qs):
    output = generate_dict(qs, random_prompt(LONG), 5, return_dict_in_generate=True)
    assert output.scores is None
    assert output.sequences.shape == (1, LONG + 5)
    assert output.statistics.num_sequences == 1


def test_generate_from_hugging_faces_side(qs):
    prompt = random_prompt(LONG)
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 9, "eos_token_id": None}
    ours = qs.generate(ids, **options)
    assert torch.equal(qs.model.generate(ids, custom_generate=qs.decode, **options), ours)
    output = qs.model.generate(ids, custom_generate=qs.decode, num_speculative_tokens=2, **options)
    assert torch.equal(output, ours)
    assert qs.last_stats.num_speculative_tokens == 2
    log = Log()
    qs.model.generate(ids, custom_generate=functools.partial(qs.decode, streamer=log), **options)
    assert log.items == [[prompt], *([token] for token in new_tokens(ours, LONG))]


def test_hugging_faces_side_checks_inputs_too(qs):
    ids = torch.tensor([random_prompt(LONG)])
    with pytest.raises(ValueError, match="num_speculative_tokens"):
        qs.model.generate(ids, custom_generate=qs.decode, num_speculative_tokens=99)
    with pytest.raises(ValueError, match="hides every token"):
        qs.model.generate(ids, attention_mask=torch.zeros_like(ids), custom_generate=qs.decode)


def test_hugging_face_generate_still_works(qs):
    """Converting leaves the model usable by itself."""
    ids = torch.tensor([random_prompt(SHORT)])
    assert qs.model.generate(ids, max_new_tokens=3, eos_token_id=None).shape == (1, SHORT + 3)


def test_alias_num_assistant_tokens(qs):
    prompt = random_prompt(LONG)
    assert generate(qs, prompt, 8, num_assistant_tokens=2) == decode_step_by_step(qs, prompt, 8)
    assert qs.last_stats.num_speculative_tokens == 2


# --- Logits processors -----------------------------------------------------------------------------------------------


class PushUp(LogitsProcessor):
    """Adds to the token after the newest one of the context, so that a wrong context shows."""

    def __call__(self, input_ids, scores):
        boosted = (input_ids[:, -1:] * 7 + input_ids.shape[1]) % scores.shape[1]
        return scores.scatter_add(1, boosted, torch.full_like(boosted, 2.0, dtype=scores.dtype))


class PerRow(LogitsProcessor):
    """Holds a bias for each row of the batch."""

    def __init__(self, batch: int) -> None:
        self.bias = torch.randn(batch, 96, generator=torch.Generator().manual_seed(0))

    def __call__(self, input_ids, scores):
        return scores + self.bias


def allowed_by_parity(batch_id: int, ids: torch.Tensor) -> list[int]:
    """Even tokens for even rows, odd ones for odd rows."""
    return list(range(4 + batch_id % 2, 96, 2))


class PreferPrefix(PrefixConstrainedLogitsProcessor):
    """Prefers the allowed tokens instead of forbidding the others."""

    def __call__(self, input_ids, scores):
        return scores + 0.5 * (super().__call__(input_ids, scores) > -torch.inf)


PROCESSED = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": list(range(3, 60))},
    "bad_words": {"bad_words_ids": [[5], [6, 7]]},
    "suppress_tokens": {"suppress_tokens": list(range(0, 90, 2))},
    "forced_eos": {"forced_eos_token_id": 2},
    "exponential_decay": {"exponential_decay_length_penalty": (4, 1.5), "eos_token_id": 2},
    "custom": {"logits_processor": LogitsProcessorList([PushUp()])},
    "per_row": {"logits_processor": LogitsProcessorList([PerRow(2)])},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": allowed_by_parity},
    "prefix_subclass": {"logits_processor": LogitsProcessorList([PreferPrefix(allowed_by_parity, num_beams=1)])},
}


@pytest.mark.parametrize("name", PROCESSED)
def test_logits_processors_as_in_hugging_face(qs, uneven, name):
    """Batch of two whose rows accept different numbers of tokens, so that their contexts differ in length."""
    ids = torch.tensor([random_prompt(SHORT, 11), random_prompt(SHORT, 12)])
    options = {"max_new_tokens": SHORT_NEW, "eos_token_id": None, **PROCESSED[name]}
    ours = qs.generate(ids, **options)
    assert torch.equal(ours, qs.model.generate(ids, do_sample=False, **options))
    plain = {"max_new_tokens": SHORT_NEW, "eos_token_id": options["eos_token_id"]}
    without = qs.model.generate(ids, do_sample=False, **plain)
    assert without.shape != ours.shape or not torch.equal(without, ours), "the option did nothing here"


@pytest.mark.parametrize("gamma", [1, 6])
def test_processors_over_flushes(qs, gamma):
    """On long prompts the processed output is that of gamma = 0."""
    ids = torch.tensor([random_prompt(LONG, 1), random_prompt(LONG, 3)])
    options = {"max_new_tokens": 10, "eos_token_id": None, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    ours = qs.generate(ids, num_speculative_tokens=gamma, **options)
    assert torch.equal(ours, qs.generate(ids, num_speculative_tokens=0, **options))


def test_processors_never_see_text_after_an_eos_or_of_another_row(qs, uneven):
    """A drafted EOS ends the text that constraints are asked about, and each row's fn sees that row's text."""
    prompts = [random_prompt(SHORT, 11), random_prompt(SHORT, 12)]
    free = generate(qs, prompts[0], SHORT_NEW)
    # An EOS at every place of the first row's blocks, where rows are equally long and where they are not.
    for eos in free[1:9]:

        def allowed(batch_id: int, ids: torch.Tensor, eos: int = eos) -> list[int]:
            text = ids.tolist()
            assert text[:SHORT] == prompts[batch_id]
            # After its end a row of a batch is padded, as in Hugging Face.
            assert eos not in text[SHORT:] or not any(text[SHORT + text[SHORT:].index(eos) + 1 :])
            return list(range(3, 96))

        options = {"max_new_tokens": SHORT_NEW, "eos_token_id": eos, "prefix_allowed_tokens_fn": allowed}
        ours = qs.generate(torch.tensor(prompts), num_speculative_tokens=4, **options)
        assert torch.equal(ours, qs.model.generate(torch.tensor(prompts), do_sample=False, **options))


def test_constraint_with_nothing_allowed_after_eos(qs, uneven):
    """One sequence's constraint is never asked for the token after EOS, where Hugging Face would not ask either."""
    prompt = random_prompt(SHORT, 11)
    free = generate(qs, prompt, SHORT_NEW)
    for eos in free[1:6]:

        def allowed(batch_id: int, ids: torch.Tensor, eos: int = eos) -> list[int]:
            return [] if eos in ids[SHORT:].tolist() else list(range(3, 96))

        tokens = generate(qs, prompt, SHORT_NEW, eos_token_id=eos, prefix_allowed_tokens_fn=allowed)
        assert tokens == free[: free.index(eos) + 1]


# --- Sampling options (the distribution itself: test_sampling.py) ----------------------------------------------------


def test_seed_and_generator_reproduce(qs):
    prompt = random_prompt(LONG)
    options = {"do_sample": True, "temperature": 1.5}
    first = generate(qs, prompt, 12, seed=5, **options)
    assert generate(qs, prompt, 12, seed=5, **options) == first
    assert generate(qs, prompt, 12, seed=6, **options) != first
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    one, other = (generate(qs, prompt, 12, generator=generator, **options) for generator in generators)
    assert one == other
    assert generate(qs, prompt, 12, generator=generators[0], **options) != one


def test_seed_leaves_global_randomness_alone(qs):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    generate(qs, random_prompt(LONG), 6, do_sample=True, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_global_seed_reproduces(qs):
    prompt = random_prompt(LONG)
    outputs = []
    for _ in range(2):
        torch.manual_seed(11)
        outputs.append(generate(qs, prompt, 8, do_sample=True, temperature=1.5))
    assert outputs[0] == outputs[1]


def test_num_return_sequences(qs):
    """Several samples per prompt, prompt by prompt, as in Hugging Face; they differ."""
    ids, mask = pad_batch([random_prompt(LONG), random_prompt(5)], [0, LONG - 5], LONG)
    output = qs.generate(
        ids, mask, do_sample=True, temperature=2.0, num_return_sequences=3, max_new_tokens=8, eos_token_id=None, seed=0
    )
    assert output.shape == (6, LONG + 8)
    assert torch.equal(output[:, :LONG], ids.repeat_interleave(3, 0))
    assert len({tuple(row) for row in output[:, LONG:].tolist()}) == 6


def test_top_k_of_one_is_greedy(qs):
    prompt = random_prompt(LONG)
    assert generate(qs, prompt, 8, do_sample=True, top_k=1) == generate(qs, prompt, 8)
