"""transformers' processors as tensor programs: equal to the processors, capturable, and blind to rejected drafts."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from conftest import GROUP
from generation_options import Nothing
from hypothesis import given
from hypothesis import strategies as st
from step_by_step import pad_batch, random_prompt
from test_cycle import gpu_qs, needs_cuda
from test_sampling import ALPHA, Table, conditional_pvalue, run_table, small_qs, transition_pvalue
from tiny_models import tiny_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

import quantspec
from quantspec.cache import HierarchicalCache
from quantspec.engine.acceptance import Acceptance
from quantspec.engine.cycle import Cycle
from quantspec.engine.cycle_graph import CycleReplay, CycleReplays, ProposalReplay
from quantspec.engine.logits_processors import ScoreProgram, apply_processors, compilable, program_key, reads_text
from quantspec.engine.plan import Plan
from quantspec.engine.sampling import Randomness
from quantspec.engine.text import Text

__all__ = ["gpu_qs", "small_qs"]

VOCAB, BATCH, WIDTH = 11, 3, 40
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4)
PROBABILITY = st.floats(0.01, 0.99)


def prompts_of(seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, 6), generator=torch.Generator().manual_seed(seed))


# How each type is made; every value here is one that a caller may change from call to call.
MAKERS: dict[str, st.SearchStrategy] = {
    "temperature": st.builds(hf.TemperatureLogitsWarper, st.floats(0.1, 3.0)),
    "top_k": st.builds(hf.TopKLogitsWarper, st.integers(1, 20)),
    "top_p": st.builds(hf.TopPLogitsWarper, st.floats(0.0, 1.0)),
    "min_p": st.builds(hf.MinPLogitsWarper, st.floats(0.0, 1.0)),
    "typical": st.builds(hf.TypicalLogitsWarper, PROBABILITY),
    "epsilon": st.builds(hf.EpsilonLogitsWarper, PROBABILITY),
    "eta": st.builds(hf.EtaLogitsWarper, PROBABILITY),
    "top_h": st.builds(hf.TopHLogitsWarper, PROBABILITY),
    "normalization": st.builds(hf.LogitNormalization),
    "invalid": st.builds(hf.InfNanRemoveLogitsProcessor),
    "suppress": st.builds(hf.SuppressTokensLogitsProcessor, TOKENS),
    "begin_suppress": st.builds(hf.SuppressTokensAtBeginLogitsProcessor, TOKENS, st.integers(5, 15)),
    "min_length": st.builds(hf.MinLengthLogitsProcessor, st.integers(0, 20), TOKENS),
    "min_new_tokens": st.builds(hf.MinNewTokensLengthLogitsProcessor, st.integers(0, 9), st.integers(0, 9), TOKENS),
    "forced_bos": st.builds(hf.ForcedBOSTokenLogitsProcessor, st.integers(0, VOCAB - 1)),
    "forced_eos": st.builds(hf.ForcedEOSTokenLogitsProcessor, st.integers(5, 15), TOKENS),
    "decay": st.builds(
        hf.ExponentialDecayLengthPenalty, st.tuples(st.integers(0, 8), st.floats(0.5, 2.0)), TOKENS, st.integers(0, 6)
    ),
    "repetition": st.builds(hf.RepetitionPenaltyLogitsProcessor, st.floats(0.5, 2.0), st.none() | st.integers(0, 9)),
    "encoder_repetition": st.builds(
        hf.EncoderRepetitionPenaltyLogitsProcessor, st.floats(0.5, 2.0), st.builds(prompts_of, st.integers(0, 99))
    ),
    "ngrams": st.builds(hf.NoRepeatNGramLogitsProcessor, st.integers(1, 5)),
    "encoder_ngrams": st.builds(
        hf.EncoderNoRepeatNGramLogitsProcessor, st.integers(1, 3), st.builds(prompts_of, st.integers(0, 99))
    ),
    "bias": st.builds(
        hf.SequenceBiasLogitsProcessor,
        st.dictionaries(TOKENS.map(tuple), st.sampled_from([-2.0, 0.5, 3.0, float("-inf")]), min_size=1, max_size=6),
    ),
    "bad_words": st.builds(hf.NoBadWordsLogitsProcessor, st.lists(TOKENS, min_size=1, max_size=4)),
}


def texts(draw: Callable, lens: list[int]) -> Tensor:
    """Texts of few tokens, so that they repeat themselves."""
    rows = [draw(st.lists(st.integers(0, 3), min_size=WIDTH, max_size=WIDTH)) for _ in lens]
    return torch.tensor(rows)


def logits_of(seed: int, count: int, spread: float) -> Tensor:
    """Some are forbidden already, but never all."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(BATCH, count, VOCAB, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < 0.1] = float("-inf")
    logits[..., 0] = 0.125
    return logits


def of_hugging_face(processors: LogitsProcessorList, logits: Tensor, ids: Tensor, lens: list[int]) -> Tensor:
    """The processors themselves, row by row and position by position."""
    expected = logits.clone()
    for row, length in enumerate(lens):
        for place in range(logits.shape[1]):
            text = ids[row : row + 1, : length + place].expand(len(logits), -1)
            scores = logits[row : row + 1, place].repeat(len(logits), 1)
            expected[row, place] = apply_processors(processors, text, scores)[row]
    return expected


@pytest.mark.parametrize("name", MAKERS)
@given(data=st.data())
def test_programs_equal_their_processors(name, data):
    """Ragged rows, drafts in place, and then other values in the same program."""
    lens = data.draw(st.lists(st.integers(1, 20), min_size=BATCH, max_size=BATCH))
    num_ahead, count = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 4))
    text = Text(BATCH, WIDTH, torch.device("cpu"))
    program, key = None, None
    for _ in range(2):
        processors = LogitsProcessorList([data.draw(MAKERS[name])])
        ids = texts(data.draw, lens)
        text.begin(ids, lens)
        if program is None or program_key(processors) != key:
            program, key = ScoreProgram(processors, text), program_key(processors)
        else:
            program.load(processors)
        logits = logits_of(data.draw(st.integers(0, 999)), count, data.draw(st.sampled_from([0.3, 3.0])))
        expected = of_hugging_face(processors, logits, ids, [length + num_ahead for length in lens])
        if name == "decay":
            # Before 5.24 what was forbidden became NaN.
            expected = expected.masked_fill(expected.isnan(), float("-inf"))
        torch.testing.assert_close(program(logits, num_ahead), expected, rtol=0, atol=0, equal_nan=True)


@given(data=st.data())
def test_programs_run_in_the_order_of_the_processors(data):
    names = data.draw(st.lists(st.sampled_from(sorted(MAKERS)), min_size=2, max_size=5, unique=True))
    processors = LogitsProcessorList([data.draw(MAKERS[name]) for name in names])
    lens = data.draw(st.lists(st.integers(1, 20), min_size=BATCH, max_size=BATCH))
    ids = texts(data.draw, lens)
    text = Text(BATCH, WIDTH, torch.device("cpu"))
    text.begin(ids, lens)
    logits = logits_of(data.draw(st.integers(0, 999)), 2, 2.0)
    try:
        expected = of_hugging_face(processors, logits, ids, lens)
    except ValueError:
        # Where nothing is left transformers' distributions refuse, and the engine finds NaN in what it draws from.
        return
    torch.testing.assert_close(ScoreProgram(processors, text)(logits, 0), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("inference_mode", [False, True])
def test_programs_outlive_the_mode_and_the_dtype_they_were_made_in(inference_mode):
    """Parameters are tensors that later calls write, and exact."""
    lens, ids = [6, 4, 9], torch.randint(0, 4, (BATCH, WIDTH), generator=torch.Generator().manual_seed(1))
    logits = logits_of(0, 2, 2.0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(inference_mode):
            text = Text(BATCH, WIDTH, torch.device("cpu"))
            program = ScoreProgram(every_kind(), text)
            program(logits, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    text.begin(ids, lens)
    processors = every_kind()
    program.load(processors)
    torch.testing.assert_close(program(logits, 0), of_hugging_face(processors, logits, ids, lens), rtol=0, atol=0)


def test_another_value_needs_no_other_program():
    """What differs between the first and the second is what callers change; a capture serves both."""
    ids = prompts_of(0)
    pairs = [
        (hf.TemperatureLogitsWarper(0.5), hf.TemperatureLogitsWarper(2.0)),
        (hf.TopKLogitsWarper(1), hf.TopKLogitsWarper(200)),
        (hf.TopPLogitsWarper(0.5), hf.TopPLogitsWarper(0.9)),
        (hf.MinPLogitsWarper(0.1), hf.MinPLogitsWarper(0.2)),
        (hf.TypicalLogitsWarper(0.1), hf.TypicalLogitsWarper(0.2)),
        (hf.EpsilonLogitsWarper(0.1), hf.EpsilonLogitsWarper(0.2)),
        (hf.EtaLogitsWarper(0.1), hf.EtaLogitsWarper(0.2)),
        (hf.TopHLogitsWarper(0.1), hf.TopHLogitsWarper(0.2)),
        (hf.SuppressTokensLogitsProcessor([1]), hf.SuppressTokensLogitsProcessor([2, 3])),
        (hf.SuppressTokensAtBeginLogitsProcessor([1], 3), hf.SuppressTokensAtBeginLogitsProcessor([2, 3], 9)),
        (hf.MinLengthLogitsProcessor(1, 2), hf.MinLengthLogitsProcessor(9, [3, 4])),
        (hf.MinNewTokensLengthLogitsProcessor(1, 2, 3), hf.MinNewTokensLengthLogitsProcessor(4, 5, [6, 7])),
        (hf.ForcedBOSTokenLogitsProcessor(1), hf.ForcedBOSTokenLogitsProcessor(2)),
        (hf.ForcedEOSTokenLogitsProcessor(5, 1), hf.ForcedEOSTokenLogitsProcessor(9, [2, 3])),
        (hf.ExponentialDecayLengthPenalty((1, 1.1), 2, 3), hf.ExponentialDecayLengthPenalty((4, 1.2), [5], 6)),
        (hf.RepetitionPenaltyLogitsProcessor(1.1), hf.RepetitionPenaltyLogitsProcessor(1.2, 4)),
        (
            hf.EncoderRepetitionPenaltyLogitsProcessor(1.1, ids),
            hf.EncoderRepetitionPenaltyLogitsProcessor(2.0, ids[:1]),
        ),
        (hf.NoRepeatNGramLogitsProcessor(2), hf.NoRepeatNGramLogitsProcessor(7)),
        (hf.SequenceBiasLogitsProcessor({(1,): 1.0}), hf.SequenceBiasLogitsProcessor({(1,): 2.0, (4,): 1.0})),
        (hf.NoBadWordsLogitsProcessor([[1]]), hf.NoBadWordsLogitsProcessor([[2], [3]])),
    ]
    first, second = (LogitsProcessorList(processors) for processors in zip(*pairs, strict=True))
    assert program_key(first) == program_key(second)
    assert program_key(first) != program_key(LogitsProcessorList(first[::-1]))


def test_subclasses_are_not_compiled():
    class Counting(hf.TemperatureLogitsWarper):
        """May have state."""

    top_k = hf.TopKLogitsWarper(3)
    assert compilable(LogitsProcessorList([Counting(1.0), top_k])) == [top_k]


def every_kind(vocab: int = VOCAB, batch: int = BATCH) -> LogitsProcessorList:
    """One of each, multi-token sequences included."""
    ids = torch.randint(0, vocab, (batch, 6), generator=torch.Generator().manual_seed(0))
    return LogitsProcessorList(
        [
            hf.SequenceBiasLogitsProcessor({(1,): 2.0, (3, 4): 1.0, (2, 3, 4): -1.0}),
            hf.EncoderRepetitionPenaltyLogitsProcessor(1.2, ids),
            hf.RepetitionPenaltyLogitsProcessor(1.3),
            hf.NoRepeatNGramLogitsProcessor(3),
            hf.EncoderNoRepeatNGramLogitsProcessor(3, ids),
            hf.NoBadWordsLogitsProcessor([[5], [6, 7]]),
            hf.MinLengthLogitsProcessor(9, 2),
            hf.MinNewTokensLengthLogitsProcessor(6, 4, 2),
            hf.ForcedBOSTokenLogitsProcessor(1),
            hf.ForcedEOSTokenLogitsProcessor(500, 2),
            hf.InfNanRemoveLogitsProcessor(),
            hf.ExponentialDecayLengthPenalty((2, 1.1), 2, 6),
            hf.SuppressTokensLogitsProcessor([7]),
            hf.SuppressTokensAtBeginLogitsProcessor([6], 6),
            hf.TemperatureLogitsWarper(1.3),
            hf.TopHLogitsWarper(0.9),
            hf.TopKLogitsWarper(9),
            hf.TopPLogitsWarper(0.95),
            hf.MinPLogitsWarper(0.01),
            hf.TypicalLogitsWarper(0.9),
            hf.EpsilonLogitsWarper(0.001),
            hf.EtaLogitsWarper(0.001),
            hf.LogitNormalization(),
        ]
    )


def test_every_kind_has_an_example():
    made = {type(processor) for processor in every_kind()}
    assert len(made) == len(MAKERS) == len(compilable(every_kind()))


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_cycle_waits_for_nothing(do_sample):
    """Tensors without data: what asks for a value, or makes a shape of one, as no capture may, fails."""
    processors = every_kind()
    text = Text(BATCH, WIDTH, torch.device("cpu"))
    program = ScoreProgram(processors, text)
    program(torch.zeros(BATCH, 1, VOCAB), 0)
    cache = HierarchicalCache([], BATCH, 16, 4, 64, torch.float32, torch.device("cpu"))
    randomness = Randomness(cache.length) if do_sample else None
    acceptance = Acceptance(program, compiles=False, randomness=randomness)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        class Reader:
            """In place of a pair: logits of any text."""

            def read(self, role, ids, cache, num_ahead=0):
                return torch.randn(*ids.shape, VOCAB)

        program._values = [tuple(map(mode.from_tensor, values)) for values in program._values]
        text.ids, text.length = mode.from_tensor(text.ids), mode.from_tensor(text.length)
        cache.length, cache.quantized_len = mode.from_tensor(cache.length), mode.from_tensor(cache.quantized_len)
        if randomness is not None:
            for name in ("_cached", "seeds", "sampled"):
                setattr(randomness, name, mode.from_tensor(getattr(randomness, name)))
        packed, scores, logits = Cycle(Reader(), cache, acceptance, text=program.text)(4)
    assert packed.shape == (BATCH, 9)
    assert scores.shape == logits.shape == (BATCH, 5, VOCAB)


# --- Whole texts -----------------------------------------------------------------------------------------------------

PROMPT_LEN, NEW_TOKENS = 8, 16
ITERATIVE = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "min_length": {"min_length": PROMPT_LEN + 9, "eos_token_id": list(range(3, 60))},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": list(range(3, 60))},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(3, 96, 2)] + [[4, 6], [6, 8, 10]]},
    "sequence_bias": {"sequence_bias": [[[30], 3.0], [[4, 30], -3.0], [[31], 2.5]]},
    "suppress_tokens": {"suppress_tokens": list(range(0, 90, 2))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(0, 90, 2))},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "exponential_decay": {"exponential_decay_length_penalty": (4, 1.5), "eos_token_id": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.4},
    "together": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 6, "suppress_tokens": [5, 9]},
}


def ragged(batch: int) -> dict[str, Tensor]:
    lengths = [PROMPT_LEN, 5, 7][:batch]
    prompts = [random_prompt(length, 60 + length) for length in lengths]
    ids, mask = pad_batch(prompts, [PROMPT_LEN - length for length in lengths], PROMPT_LEN)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ITERATIVE)
def test_greedy_text_with_an_option_is_hugging_faces(qs, name, batch):
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options |= ITERATIVE[name] | ragged(batch)
    theirs = qs.model.generate(**options)
    without = {key: value for key, value in options.items() if key == "eos_token_id" or key not in ITERATIVE[name]}
    plain = qs.model.generate(**without).sequences
    assert name == "renormalize_logits" or not torch.equal(theirs.sequences, plain), "the option did nothing here"
    for gamma in (0, 4):
        ours = qs.generate(num_speculative_tokens=gamma, **options)
        assert torch.equal(ours.sequences, theirs.sequences), gamma
        going = [True] * batch
        for step in range(len(theirs.scores)):
            for row in range(batch):
                if going[row]:
                    torch.testing.assert_close(ours.scores[step][row], theirs.scores[step][row], atol=1e-3, rtol=1e-3)
                    torch.testing.assert_close(ours.logits[step][row], theirs.logits[step][row], atol=1e-3, rtol=1e-3)
                eos = options["eos_token_id"] or options.get("forced_eos_token_id")
                ends = eos if isinstance(eos, list) else [eos]
                going[row] = going[row] and int(theirs.sequences[row, PROMPT_LEN + step]) not in ends


def test_rejected_drafts_leave_no_trace(qs, monkeypatch):
    """A draft that proposes the same token at every place, which the target never emits: penalties do not see it."""
    forward = type(qs.pair).forward

    def stubborn(self, role, *inputs, cache):
        logits = forward(self, role, *inputs, cache=cache)
        logits[..., 50] = 1e4 if role is type(role).DRAFT else float("-inf")
        return logits

    monkeypatch.setattr(type(qs.pair), "forward", stubborn)
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "repetition_penalty": 1.5, **ragged(3)}
    expected = qs.generate(num_speculative_tokens=0, **options)
    assert torch.equal(qs.generate(num_speculative_tokens=4, **options), expected)
    assert qs.last_stats.accepted == 0 < qs.last_stats.drafted


def test_nothing_left_behind_the_end_of_a_text_is_no_error(small_qs):
    """All eight tokens are used up with the last: a draft behind it would find none."""
    ids = torch.tensor([[3, 4]])
    options = {"do_sample": True, "top_k": 0, "no_repeat_ngram_size": 1, "eos_token_id": None, "seed": 1}
    text = small_qs.generate(ids, max_new_tokens=6, num_speculative_tokens=5, **options)
    assert sorted(text[0].tolist()) == list(range(8))


SHAPED = {
    "typical_p": hf.TypicalLogitsWarper(0.6),
    "epsilon_cutoff": hf.EpsilonLogitsWarper(0.1),
    "eta_cutoff": hf.EtaLogitsWarper(0.3),
    "top_h": hf.TopHLogitsWarper(0.6),
    "suppress_tokens": hf.SuppressTokensLogitsProcessor([5]),
}
VALUES = {"typical_p": 0.6, "epsilon_cutoff": 0.1, "eta_cutoff": 0.3, "top_h": 0.6, "suppress_tokens": [5]}


@pytest.mark.parametrize("name", SHAPED)
def test_sampled_tokens_follow_the_shaped_target(small_qs, monkeypatch, name):
    sequences, table = run_table(small_qs, monkeypatch, {"top_k": 0, name: VALUES[name]})
    scores = SHAPED[name](torch.zeros(len(table.target), 1, dtype=torch.long), table.target)
    assert transition_pvalue(sequences, scores.softmax(-1)) > ALPHA


@pytest.mark.parametrize(
    ("option", "value", "processor"),
    [
        ("repetition_penalty", 2.0, hf.RepetitionPenaltyLogitsProcessor(2.0)),
        ("no_repeat_ngram_size", 2, hf.NoRepeatNGramLogitsProcessor(2)),
        ("sequence_bias", [[[3, 4], 2.0]], hf.SequenceBiasLogitsProcessor({(3, 4): 2.0})),
    ],
)
def test_sampled_tokens_follow_a_target_that_depends_on_the_text(small_qs, monkeypatch, option, value, processor):
    """4,000 tokens and more, each against transformers' own processing of the text before it."""
    table = Table()
    table.target[:, 2] = -3.0
    monkeypatch.setitem(vars(small_qs.pair), "forward", table.forward)
    ids = torch.randint(3, 8, (512, 4), generator=torch.Generator().manual_seed(9))
    options = {"do_sample": True, "top_k": 0, "seed": 0, "eos_token_id": None, "max_new_tokens": 8, option: value}
    output = small_qs.generate(ids, num_speculative_tokens=3, **options)
    assert 0.1 < small_qs.last_stats.draft_acceptance_rate < 0.9
    scores = [processor(output[:, :end], table.target[output[:, end - 1]]) for end in range(4, output.shape[1])]
    assert conditional_pvalue(output[:, 4:].T.flatten(), torch.cat(scores).softmax(-1)) > ALPHA


def test_reads_text_tells_what_needs_it():
    assert not reads_text(LogitsProcessorList([hf.TemperatureLogitsWarper(0.5), hf.TopKLogitsWarper(3)]))
    assert reads_text(LogitsProcessorList([hf.TemperatureLogitsWarper(0.5), hf.NoRepeatNGramLogitsProcessor(3)]))


# --- Captured --------------------------------------------------------------------------------------------------------


class Rerun:
    """In place of a CUDA graph: does the work again."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.replay = work


@pytest.fixture
def without_graphs(monkeypatch):
    """Replays on a CPU, which run what they would have captured; gives those that were made."""
    made = []

    def capture(self, plan):
        made.append(self)
        self._graphs = tuple(map(Rerun, self._works(plan)))
        # As warming up does, with all sequences done.
        for graph in self._graphs:
            graph.replay()

    monkeypatch.setattr(CycleReplay, "_capture", capture)
    monkeypatch.setattr(CycleReplays, "suit", lambda self: True)
    return made


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ITERATIVE)
def test_kept_programs_follow_the_call(qs, without_graphs, name, batch):
    """Numbers of drafts in turn, each with a replay of its own, on one text; kept for another call's text."""
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options |= ITERATIVE[name]
    counts = itertools.cycle([4, 1, 0])
    qs.reset()
    for shift in (0, 3):
        inputs = ragged(batch)
        inputs["input_ids"] = (inputs["input_ids"] + shift).clamp(max=95) * inputs["attention_mask"]
        theirs = qs.model.generate(**options, **inputs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("quantspec.engine.session.FixedDraftCount.choose", lambda *_: Plan(next(counts)))
            ours = qs.generate(num_speculative_tokens=4, seed=0, **options, **inputs)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert len(ours.scores) == len(ours.logits) == len(theirs.scores)
    assert len(without_graphs) == 3
    qs.reset()


def test_a_kept_proposal_serves_stateful_processors(qs, without_graphs):
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "repetition_penalty": 1.2, **ragged(3)}
    qs.reset()
    made = []
    for _ in range(2):
        expected = qs.model.generate(logits_processor=LogitsProcessorList([EveryThird()]), **options)
        ours = qs.generate(
            logits_processor=LogitsProcessorList([EveryThird()]), num_speculative_tokens=4, seed=0, **options
        )
        assert torch.equal(ours, expected)
        made.append(len(without_graphs))
    # Rows that advance together draft as many tokens as asked for, fewer, or none.
    assert made[0] == made[1] <= 3
    assert {type(replay) for replay in without_graphs} == {ProposalReplay}
    qs.reset()


def test_proposals_and_the_host_share_the_randomness(small_qs, monkeypatch, without_graphs):
    """Captured drafts are drawn by the noise that the host judges them by: together they give the target."""
    table = Table()
    monkeypatch.setitem(vars(small_qs.pair), "forward", table.forward)
    ids = torch.randint(3, 8, (1, 4), generator=torch.Generator().manual_seed(9))
    options = {"do_sample": True, "top_k": 0, "eos_token_id": None, "max_new_tokens": 60}
    options["logits_processor"] = LogitsProcessorList([Nothing()])
    small_qs.reset()
    texts = [small_qs.generate(ids, num_speculative_tokens=3, seed=seed, **options)[:, 3:] for seed in range(60)]
    assert {type(replay) for replay in without_graphs} == {ProposalReplay}
    assert small_qs.last_stats.draft_acceptance_rate > 0.3
    assert transition_pvalue(torch.cat(texts), table.target.softmax(-1)) > ALPHA
    small_qs.reset()


def on_gpu(batch: int) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in ragged(batch).items()}


@pytest.fixture(scope="module")
def exact_gpu_qs() -> quantspec.QuantSpecModel:
    """In float32: in bfloat16 drafts may part at near ties, and scores are then of batches of other tokens."""
    model = tiny_model("llama", torch.float32, hidden_size=256, num_attention_heads=4, head_dim=64).cuda()
    return quantspec.convert(model, kv_group_size=GROUP, weight_group_size=32, self_check=False)


@needs_cuda
@pytest.mark.parametrize("gamma", [0, 4])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ITERATIVE)
def test_replays_with_an_option_equal_eager_cycles(exact_gpu_qs, monkeypatch, name, batch, gamma):
    options = {"max_new_tokens": 3 * NEW_TOKENS, "eos_token_id": None, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options |= ITERATIVE[name] | {"num_speculative_tokens": gamma} | on_gpu(batch)
    ours = exact_gpu_qs.generate(**options)
    assert exact_gpu_qs.session.replays.kept() or exact_gpu_qs.last_stats.cycles == 0
    monkeypatch.setattr(type(exact_gpu_qs.session.replays), "suit", lambda self: False)
    eager = exact_gpu_qs.generate(**options)
    assert torch.equal(ours.sequences, eager.sequences)
    for replayed, launched in zip(ours.scores + ours.logits, eager.scores + eager.logits, strict=True):
        torch.testing.assert_close(replayed, launched, rtol=1e-4, atol=1e-4)


CHANGES = {
    "repetition_penalty": (1.1, 1.9),
    "no_repeat_ngram_size": (1, 4),
    "min_new_tokens": (3, 20),
    "suppress_tokens": ([5], [6, 7, 8]),
    "bad_words_ids": ([[5]], [[6], [7]]),
    "exponential_decay_length_penalty": ((2, 1.1), (5, 1.4)),
    "temperature": (0.3, 1.4),
    "top_k": (3, 90),
    "top_p": (0.3, 0.9),
    "min_p": (0.3, 0.1),
    "typical_p": (0.3, 0.9),
    "epsilon_cutoff": (0.3, 0.01),
    "eta_cutoff": (0.3, 0.01),
    "top_h": (0.3, 0.9),
}


@needs_cuda
@pytest.mark.parametrize("name", CHANGES)
def test_another_value_captures_nothing(gpu_qs, monkeypatch, name):
    """The second call replays the first one's graph, and gives what eager cycles give with its own value."""
    options = {
        "max_new_tokens": 2 * NEW_TOKENS,
        "eos_token_id": 95,
        "top_k": 50,
        "seed": 3,
        "do_sample": True,
        **on_gpu(2),
    }
    gpu_qs.generate(**{**options, name: CHANGES[name][0]})
    kept = gpu_qs.session.replays.kept()
    ours = gpu_qs.generate(**{**options, name: CHANGES[name][1]})
    assert gpu_qs.session.replays.kept() == kept
    monkeypatch.setattr(type(gpu_qs.session.replays), "suit", lambda self: False)
    eager = gpu_qs.generate(**{**options, name: CHANGES[name][1]})
    assert torch.equal(ours, eager)


class EveryThird(hf.LogitsProcessor):
    """Counts its calls, and forces a token at every third."""

    calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls % 3 == 0:
            scores[:, 77] = 1e4
        return scores


@needs_cuda
@pytest.mark.parametrize("batch", [1, 3])
def test_replayed_proposals_leave_the_text_of_a_stateful_processor(gpu_qs, monkeypatch, batch):
    options = {"max_new_tokens": 3 * NEW_TOKENS, "eos_token_id": None, "repetition_penalty": 1.2, **on_gpu(batch)}
    ours = gpu_qs.generate(logits_processor=[EveryThird()], num_speculative_tokens=4, **options)
    assert type(gpu_qs.session.replays.kept()[-1]) is ProposalReplay
    monkeypatch.setattr(type(gpu_qs.session.replays), "suit", lambda self: False)
    assert torch.equal(gpu_qs.generate(logits_processor=[EveryThird()], num_speculative_tokens=4, **options), ours)


@needs_cuda
def test_replayed_proposals_and_the_host_draw_different_numbers(gpu_qs):
    """A seed gives one text, and another seed another."""
    options = {
        "max_new_tokens": 2 * NEW_TOKENS,
        "eos_token_id": None,
        "do_sample": True,
        "temperature": 3.0,
        **on_gpu(1),
    }
    texts = [
        gpu_qs.generate(logits_processor=LogitsProcessorList([Nothing()]), seed=seed, **options) for seed in (1, 1, 2)
    ]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
