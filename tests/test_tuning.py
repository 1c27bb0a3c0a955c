"""Tuning: the draft comes closer to the target on text it has not learned from; nothing else changes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import GROUP, characters
from step_by_step import assert_same_text, random_prompt
from tiny_models import tiny_model
from torch import Tensor

import quantspec
from quantspec import QuantSpecModel, TuneConfig
from quantspec.capture import converting
from quantspec.interrupts import interrupts_later
from quantspec.pair import Recipe, recipes, register
from quantspec.passes import ACCESSES, INT4, Role, plain_weights, store_plain_weights
from quantspec.tuning import gptq
from quantspec.tuning.gptq import gptq_codes
from quantspec.tuning.graphs import tuning_graphs
from quantspec.tuning.optimize import CapturedGradients, _Tuning
from quantspec.tuning.texts import beginnings, sampled, token_ids

SHORT = TuneConfig(
    steps=8, window=3 * GROUP, train_windows=16, held_out_windows=4, learning_rate=3e-3, prompt_tokens=GROUP
)
"""Long enough that old keys and values are read at 4 bits."""


def converted(architecture: str = "llama", dtype: torch.dtype = torch.float32, **options) -> QuantSpecModel:
    options = {"kv_group_size": GROUP, "weight_group_size": 32, "self_check": False, **options}
    return quantspec.convert(tiny_model(architecture, dtype), **options)


def draft_weights(qs: QuantSpecModel) -> dict[str, dict[str, Tensor]]:
    weights = plain_weights(qs.draft)
    return {name: {part: tensor.clone() for part, tensor in parts.items()} for name, parts in weights.items()}


def same_weights(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]], part: str) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name][part], b[name][part]) for name in a)


def target_logits(qs: QuantSpecModel, ids: Tensor) -> Tensor:
    cache = qs.pair.new_cache(1, ids.shape[1])
    return qs.pair.read(Role.TARGET, ids, cache)


class Tuned:
    """A pair before and after tuning."""

    def __init__(self) -> None:
        self.qs = converted(quantize_lm_head=True, draft_recipe="int4-cache")
        self.model_before = {name: tensor.clone() for name, tensor in self.qs.model.state_dict().items()}
        self.logits_before = target_logits(self.qs, torch.tensor([random_prompt(9, 0)]))
        self.weights_before = draft_weights(self.qs)
        self.addresses_before = {name: b.data_ptr() for name, b in self.qs.draft.named_buffers()}
        self.seen: list = []
        self.report = self.qs.tune(SHORT, callback=self.seen.append)


@pytest.fixture(scope="module")
def tuned() -> Tuned:
    return Tuned()


@pytest.fixture(scope="module")
def spare() -> tuple[QuantSpecModel, dict]:
    qs = converted()
    return qs, draft_weights(qs)


@pytest.fixture
def untuned(spare) -> QuantSpecModel:
    """A pair whose draft is as conversion made it."""
    return restored(*spare)


def restored(qs: QuantSpecModel, weights: dict[str, dict[str, Tensor]]) -> QuantSpecModel:
    store_plain_weights(qs.draft, weights)
    qs.pair.tuned = None
    return qs


def test_the_draft_comes_closer_on_text_it_has_not_learned_from(tuned):
    before, after = tuned.report.before, tuned.report.after
    assert after.kl < before.kl
    assert after.acceptance > before.acceptance
    assert tuned.report.steps == SHORT.steps
    assert not tuned.report.stopped
    assert tuned.report.tokens == SHORT.steps * SHORT.windows_per_step * SHORT.window
    assert tuned.qs.tuned == tuned.report


def test_progress_is_told_after_every_step(tuned):
    assert [progress.step for progress in tuned.seen] == list(range(1, SHORT.steps + 1))
    assert all(progress.kl > 0 and 0 < progress.acceptance < 1 for progress in tuned.seen)


def test_the_target_stays_bit_for_bit(tuned):
    for name, tensor in tuned.qs.model.state_dict().items():
        assert torch.equal(tensor, tuned.model_before[name])
        assert tensor.grad is None
    assert torch.equal(target_logits(tuned.qs, torch.tensor([random_prompt(9, 0)])), tuned.logits_before)


def test_scales_and_codes_change_where_they_are(tuned):
    for name, parts in draft_weights(tuned.qs).items():
        for part, tensor in parts.items():
            assert not torch.equal(tensor, tuned.weights_before[name][part])
    assert {name: b.data_ptr() for name, b in tuned.qs.draft.named_buffers()} == tuned.addresses_before


def test_what_was_learned_is_what_generates(tuned):
    ids = torch.tensor([random_prompt(3 * GROUP + 5, seed) for seed in (0, 1)])
    with converting():
        teacher, student = tuning_graphs(tuned.qs.pair)
    _, cache = teacher.read(ids)
    with torch.no_grad():
        drafts = student.read(ids, cache)[:, -1]
    torch.testing.assert_close(drafts, draft_step(tuned.qs, ids), **tolerance(drafts))


def test_without_gptq_codes_stay(untuned):
    before = draft_weights(untuned)
    untuned.tune(SHORT, gptq=False)
    after = draft_weights(untuned)
    assert same_weights(after, before, "qdata")
    assert not same_weights(after, before, "scale_and_zero")


def test_gptqs_codes_alone_bring_it_closer(untuned):
    before = draft_weights(untuned)
    report = untuned.tune(SHORT, steps=0)
    assert report.steps == 0
    assert not report.stopped
    assert report.after.kl < report.before.kl
    assert not same_weights(draft_weights(untuned), before, "qdata")


def test_interrupted_while_codes_are_chosen_it_leaves_the_draft(untuned, monkeypatch):
    before, chosen = draft_weights(untuned), []

    def interrupt_the_second(*problem):
        chosen.append(gptq_codes(*problem))
        if len(chosen) == 2:
            raise KeyboardInterrupt
        return chosen[-1]

    monkeypatch.setattr(gptq, "gptq_codes", interrupt_the_second)
    report = untuned.tune(SHORT)
    assert report.stopped
    assert report.steps == 0
    assert report.after == report.before
    for part in ("qdata", "scale_and_zero"):
        assert same_weights(draft_weights(untuned), before, part)


def test_codes_that_make_it_worse_are_not_kept(untuned, monkeypatch):
    before = draft_weights(untuned)
    monkeypatch.setattr(gptq, "gptq_codes", lambda weight, *_: torch.zeros_like(weight, dtype=torch.uint8))
    report = untuned.tune(SHORT)
    assert same_weights(draft_weights(untuned), before, "qdata")
    assert report.after.kl < report.before.kl


@pytest.mark.parametrize("do_sample", [False, True])
def test_text_is_the_targets_own(tuned, do_sample):
    prompt = random_prompt(3 * GROUP, 1)
    options = {"max_new_tokens": 40, "eos_token_id": None, "do_sample": do_sample, "seed": 0}
    texts = [tuned.qs.generate(torch.tensor([prompt]), num_speculative_tokens=n, **options) for n in (4, 0)]
    ours, plain = (text[0, len(prompt) :].tolist() for text in texts)
    assert len(ours) == 40
    if not do_sample:
        assert_same_text(tuned.qs, prompt, ours, plain)


def test_a_saved_pair_keeps_what_was_learned(tuned, tmp_path):
    tuned.qs.save_pretrained(tmp_path / "pair")
    loaded = quantspec.from_pretrained(tmp_path / "pair")
    for part in ("qdata", "scale_and_zero"):
        assert same_weights(draft_weights(loaded), draft_weights(tuned.qs), part)
    assert loaded.tuned == tuned.report
    assert "tuned" in json.loads((tmp_path / "pair" / "quantspec_config.json").read_text())


def test_a_folder_of_a_draft_that_was_not_tuned_says_nothing_of_it(qs, tmp_path):
    qs.save_pretrained(tmp_path / "pair")
    assert "tuned" not in json.loads((tmp_path / "pair" / "quantspec_config.json").read_text())
    assert quantspec.from_pretrained(tmp_path / "pair").tuned is None


def test_the_same_seed_learns_the_same(spare):
    learned = []
    for seed in (5, 5, 6):
        quantspec.tune(restored(*spare), SHORT, steps=4, seed=seed)
        learned.append(draft_weights(spare[0]))
    assert same_weights(learned[0], learned[1], "scale_and_zero")
    assert not same_weights(learned[0], learned[2], "scale_and_zero")


def stop(progress) -> bool:
    return progress.step == 3


def interrupt(progress) -> None:
    if progress.step == 3:
        raise KeyboardInterrupt


@pytest.mark.parametrize("callback", [stop, interrupt])
def test_stopped_early_it_keeps_the_best_so_far(untuned, callback):
    before = draft_weights(untuned)
    report = untuned.tune(SHORT, callback=callback)
    assert report.stopped
    assert report.steps == 3
    assert report.after.kl < report.before.kl
    assert not same_weights(draft_weights(untuned), before, "scale_and_zero")


def test_what_only_makes_it_worse_is_not_kept(untuned):
    before = draft_weights(untuned)
    report = untuned.tune(SHORT, steps=4, learning_rate=0.99, gptq=False)
    assert report.after == report.before
    assert same_weights(draft_weights(untuned), before, "scale_and_zero")


def test_a_failure_leaves_the_draft_as_it_was(untuned):
    before = draft_weights(untuned)

    def fail(progress):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        untuned.tune(SHORT, callback=fail)
    for part in ("qdata", "scale_and_zero"):
        assert same_weights(draft_weights(untuned), before, part)
    assert untuned.tuned is None


def test_what_would_wait_for_the_tuning_it_is_called_from_is_refused(untuned, tmp_path):
    with pytest.raises(RuntimeError, match="this thread converts or tunes a model"):
        untuned.tune(SHORT, callback=lambda progress: untuned.save_pretrained(tmp_path / "pair"))
    assert not (tmp_path / "pair").exists()
    untuned.save_pretrained(tmp_path / "pair")


@pytest.fixture
def ctrl_c():
    """Python's own handler, whatever runs the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_what_would_be_half_done(ctrl_c):
    done = []

    def press() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        done.append("all of it")

    def press_in_a_block() -> None:
        with interrupts_later():
            press()

    with pytest.raises(KeyboardInterrupt):
        press_in_a_block()
    assert done
    with pytest.raises(KeyboardInterrupt):
        press()
    assert len(done) == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(context):
    with context():
        model = tiny_model("llama")
        qs = quantspec.convert(model, kv_group_size=GROUP, self_check=False, tune=dataclasses.replace(SHORT, steps=6))
    first = qs.tuned
    assert first.after.kl < first.before.kl
    # It goes on from what was written.
    assert qs.tune(SHORT, steps=1).before.kl == pytest.approx(first.after.kl, rel=1e-4)


# Llama 4 adds its experts' output to the shared one's in place.
ARCHITECTURES = ("llama", "gpt2", "gemma2", "gpt_oss", "deepseek_v3", "llama4_text")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_graphs_of_tuning_are_those_of_the_roles(architecture):
    # Tuning teaches what a GPU's draft reads, on any device.
    qs = converted(architecture, quantize_lm_head=True, draft_recipe="int4-cache")
    ids = torch.tensor([random_prompt(3 * GROUP + 5, seed) for seed in (0, 1)])
    with converting():
        teacher, student = tuning_graphs(qs.pair)
    targets, cache = teacher.read(ids)
    with torch.no_grad():
        expected = qs.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    torch.testing.assert_close(targets, expected, rtol=1e-4, atol=1e-4)

    drafts = student.read(ids, cache)
    for t in (1, GROUP, 2 * GROUP - 1, 2 * GROUP, 3 * GROUP + 3):
        torch.testing.assert_close(drafts[:, t], draft_step(qs, ids[:, : t + 1]), **tolerance(drafts))
    drafts.square().sum().backward()
    for name, learned in student.learned.items():
        gradient = learned.change.grad
        # Of experts, those that were chosen.
        assert gradient.abs().amax(-1).gt(0).float().mean() > 0.5, name
    assert all(parameter.grad is None for parameter in qs.model.parameters())


def tolerance(logits: Tensor) -> dict[str, float]:
    # A CPU's INT4 kernel rounds its inputs to bfloat16.
    return {"rtol": 0, "atol": 0.05 * logits.detach().abs().max().item()}


def draft_step(qs: QuantSpecModel, ids: Tensor) -> Tensor:
    """The draft's logits ``(B, V)`` of the last token, on the target's cache of those before it."""
    cache = qs.pair.new_cache(len(ids), 1)
    cache.reserve(ids.shape[1])
    qs.pair.fill(ids[:, :-1], [ids.shape[1] - 1] * len(ids), cache)
    return qs.pair.read(Role.DRAFT, ids[:, -1:], cache)[:, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run it on a GPU machine")
def test_a_captured_step_leaves_the_gradients_of_one_that_is_not():
    model = tiny_model("llama").cuda()
    qs = quantspec.convert(model, kv_group_size=GROUP, weight_group_size=32, self_check=False, compile=False)
    ids = torch.tensor([random_prompt(3 * GROUP, seed) for seed in range(4)], device="cuda")
    with converting():
        teacher, student = tuning_graphs(qs.pair)
    assert teacher.captures
    assert student.captures
    run = _Tuning(teacher, student, SHORT, ids)
    captured = CapturedGradients(run._with_gradients, ids.flip(1))
    replayed = captured(ids).clone(), *(parameter.grad.clone() for parameter in student.parameters)
    eager = run._with_gradients(ids), *(parameter.grad for parameter in student.parameters)
    torch.testing.assert_close(replayed, eager, rtol=1e-3, atol=1e-6)


def test_experts_learn_and_keep_their_codes():
    qs = converted("qwen3_moe")
    before = draft_weights(qs)
    report = qs.tune(SHORT)
    assert report.after.kl < report.before.kl
    for name, parts in draft_weights(qs).items():
        is_stack = parts["qdata"].dim() == 3
        assert is_stack == ("experts" in name)
        assert torch.equal(parts["qdata"], before[name]["qdata"]) == is_stack
        assert not torch.equal(parts["scale_and_zero"], before[name]["scale_and_zero"])


def test_half_precision_learns_what_its_scales_can_hold():
    qs = converted(dtype=torch.bfloat16)
    assert qs.tune(SHORT).after.kl < qs.tuned.before.kl
    (parts, *_) = draft_weights(qs).values()
    assert parts["scale_and_zero"].dtype == torch.bfloat16


# --- texts -----------------------------------------------------------------------------------------------------------


def test_texts_are_written_on_from_places_of_the_users(qs):
    texts = token_ids([random_prompt(50, 0), torch.tensor(random_prompt(7, 1))], None, qs.pair)
    prompts = beginnings(20, texts, qs.pair, SHORT)
    assert prompts.shape == (20, GROUP)
    places = texts[0].unfold(0, GROUP, 1).tolist()
    assert all(prompt in places for prompt in prompts.tolist())
    written = sampled(prompts[:3], qs.pair, 40, seed=0)
    assert written.shape == (3, 40)
    assert torch.equal(written[:, :GROUP], prompts[:3])
    assert torch.equal(written, sampled(prompts[:3], qs.pair, 40, seed=0))


def test_one_long_text_does_not_silence_short_ones(qs):
    texts = [torch.full((GROUP - 1,), 5)] * 9 + [torch.arange(3, 3 + GROUP)]
    prompts = beginnings(500, texts, qs.pair, SHORT)
    assert prompts.shape == (500, GROUP - 1)
    # Of the eleven places two are the long text's.
    assert {tuple(prompt) for prompt in prompts.tolist()} == {
        (5,) * (GROUP - 1),
        tuple(range(3, 2 + GROUP)),
        tuple(range(4, 3 + GROUP)),
    }


def test_without_texts_the_model_writes_from_its_first_token(qs):
    prompts = beginnings(20, [], qs.pair, SHORT)
    assert set(prompts[:, 0].tolist()) == {qs.model.config.bos_token_id}
    assert len(set(prompts[:, 1].tolist())) > 5


def test_strings_go_through_the_tokenizer(qs, tokenizer):
    ids = random_prompt(30, 0)
    (text,) = token_ids([characters(ids)], tokenizer, qs.pair)
    assert text.tolist()[-30:] == ids


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (["some text"], ValueError, "pass tokenizer= too"),
        ("some text", TypeError, "texts must be a list of strings or of token ids, not str"),
        ([[3, 96]], ValueError, r"token ids that are not in 0\.\.95"),
        ([[0.5]], ValueError, r"token ids that are not in 0\.\.95"),
        ([[]], ValueError, "texts are empty"),
        ([[3], None], TypeError, r"texts\[1\] is neither a string nor token ids, but NoneType"),
        ([b"abc"], TypeError, "neither a string nor token ids, but bytes"),
    ],
)
def test_bad_texts_are_refused_before_any_work(qs, texts, error, message):
    with pytest.raises(error, match=message):
        qs.tune(SHORT, texts=texts, callback=lambda progress: pytest.fail("it worked"))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps must be at least 0, not -1"),
        ({"steps": 0, "gptq": False}, ValueError, "steps must be at least 1, not 0"),
        ({"steps": True}, TypeError, "steps must be an int, not True"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": 2**63}, ValueError, r"seed must be below 2\*\*63"),
        ({"callback": 3}, TypeError, "callback must be callable, not int"),
        ({"texts": ["a"], "tokenizer": "abc"}, TypeError, "tokenizer must be a tokenizer of transformers, not str"),
        ({"learning_rate": 1.0}, ValueError, "learning_rate must be between 0 and 1"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number"),
        ({"gptq": 1}, TypeError, "gptq must be True or False, not 1"),
        ({"window": 3}, ValueError, "window must be at least 4, not 3"),
        ({"epochs": 3}, TypeError, "unknown option 'epochs'; the options are steps, window"),
    ],
)
def test_bad_options_are_refused(qs, options, error, message):
    with pytest.raises(error, match=message):
        qs.tune(**options)


def test_convert_refuses_what_is_no_tuning_before_it_converts():
    with pytest.raises(TypeError, match="tune must be True, False or a TuneConfig, not 200"):
        quantspec.convert(None, tune=200)


def test_a_draft_without_scales_is_refused():
    register(Recipe("dense", Role.DRAFT, ACCESSES[Role.DRAFT]))
    try:
        with pytest.raises(ValueError, match="this draft has no scales to tune"):
            converted(draft_recipe="dense").tune()
    finally:
        del recipes._RECIPES[Role.DRAFT, "dense"]


def test_gptq_alone_is_refused_where_it_does_nothing(untuned, monkeypatch):
    monkeypatch.setattr(type(untuned.pair), "draft_weights", dataclasses.replace(INT4, name="theirs"))
    with pytest.raises(ValueError, match="steps=0 is GPTQ alone, which chooses no codes of theirs; give some steps"):
        untuned.tune(SHORT, steps=0)


def test_every_format_that_is_learned_names_a_part_of_its_own():
    assert INT4.learned in [part.name for part in INT4.parts]


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def texts_file(tmp_path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text(characters(random_prompt(200, 0)))
    return path


QUICK = ("--steps", 2, "--window", 24, "--dtype", "float32", "--no-self-check", "--device", "cpu")


def test_tune_saves_a_tuned_pair(run, saved_model, texts_file, tmp_path):
    status, _, stderr = run("tune", saved_model, tmp_path / "pair", "--texts", texts_file, *QUICK)
    assert status == 0, stderr
    assert "tuned 2 steps in " in stderr
    assert quantspec.from_pretrained(tmp_path / "pair").tuned.steps == 2
    # A saved pair can be tuned too, by GPTQ alone or without it.
    status, _, stderr = run("tune", tmp_path / "pair", tmp_path / "again", *QUICK, "--steps", 0)
    assert status == 0, stderr
    assert quantspec.from_pretrained(tmp_path / "again").tuned.steps == 0
    status, _, stderr = run("tune", tmp_path / "pair", tmp_path / "not", *QUICK, "--steps", 0, "--no-gptq")
    assert (status, "steps must be at least 1, not 0" in stderr) == (2, True)


def test_tune_refuses_before_it_loads(run, saved_model, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    status, _, stderr = run("tune", saved_model, tmp_path / "pair", "--texts", tmp_path / "binary", *QUICK)
    assert (status, "as text" in stderr) == (2, True)
    status, _, stderr = run("tune", saved_model, tmp_path, *QUICK)
    assert (status, "is not an empty folder" in stderr) == (2, True)
    assert not (tmp_path / "pair").exists()


def test_convert_tunes(run, saved_model, tmp_path, monkeypatch):
    monkeypatch.setattr("quantspec.cli.convert.TuneConfig", lambda: dataclasses.replace(SHORT, steps=2))
    options = ("--dtype", "float32", "--no-self-check", "--device", "cpu")
    assert run("convert", saved_model, tmp_path / "pair", "--tune", *options)[0] == 0
    assert quantspec.from_pretrained(tmp_path / "pair").tuned.steps == 2
