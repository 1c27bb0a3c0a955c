"""The parity report: what is equal passes, what is not fails."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cache_changes import change_cache_after_prefill
from conftest import GROUP, characters
from step_by_step import random_prompt
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import quantspec

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")

import lm_eval.tasks
from datasets import Dataset

from quantspec.engine.session import Session
from quantspec.evals import environment
from quantspec.evals.adapter import QuantSpecLM
from quantspec.evals.generation_parity import compare_generation, generate_greedily
from quantspec.evals.parity import Material, ParityOptions, ParityReport, Verdict, _judge_task, measure, parity
from quantspec.evals.parity_rendering import render_markdown
from quantspec.evals.roles import EvalRole
from quantspec.evals.task_parity import Metric, TaskRun, compare, load_tasks, run_task, standard_error
from quantspec.evals.tasks import build
from quantspec.evals.text_parity import compare_text

pytestmark = pytest.mark.usefixtures("lm_eval")
ROOT = Path(__file__).parent.parent
TASKS = ["tiny_choice", "tiny_rolling", "tiny_write"]
TEXT = characters(random_prompt(400))
# Random weights have many near-ties, which quantization may turn.
OPTIONS = ParityOptions(
    context_tokens=6 * GROUP,
    scored_tokens=100,
    prompts=3,
    prompt_tokens=3 * GROUP,
    new_tokens=20,
    min_argmax_agreement=0.95,
)


def spoil_a_scale(monkeypatch) -> None:
    """The scale of one group of one layer's keys becomes eight times what it was."""

    def spoil(scale: Tensor) -> Tensor:
        spoilt = scale.clone()
        spoilt[:, :, 0] *= 8
        return spoilt

    change_cache_after_prefill(monkeypatch, "k_scale", spoil)


def failures(report) -> set[str]:
    """Names of the verdicts that failed."""
    return {verdict.name for verdict in report.verdicts if not verdict.passed}


def test_a_pair_has_parity_with_its_model_and_the_report_says_how_much(qs, tokenizer, tiny_tasks, tmp_path):
    asked = {"tasks": TASKS, "text": TEXT, "options": OPTIONS, "include_path": tiny_tasks}
    report = parity(qs, tokenizer=tokenizer, **asked, output=str(tmp_path))
    assert report.passed, report
    written = json.loads((tmp_path / "parity.json").read_text())
    assert written["passed"]
    assert {(row["task"], row["role"]) for row in written["tasks"]} == {
        (task, role) for task in TASKS for role in ("target", "speculative", "draft")
    }
    assert set(written["acceptance"]) == {"tiny_write"}
    assert 0 < written["acceptance"]["tiny_write"]["draft_acceptance_rate"] < 1
    target, draft = written["text"]
    assert len(target["kl_per_position"]) == OPTIONS.scored_tokens
    assert sum(entry["tokens"] for entry in target["kl_by_distance"]) == OPTIONS.scored_tokens
    assert target["mean_kl"] < draft["mean_kl"] / 10
    markdown = (tmp_path / "parity.md").read_text()
    assert markdown.startswith("# Parity of")
    assert "tiny_rolling byte_perplexity" in markdown
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("compiled", [False, True])
def test_a_report_says_what_produced_it(tokenizer, compiled):
    """Nothing is compiled before the first forward pass."""
    qs = quantspec.convert(tiny_model("llama"), compile=compiled, self_check=False)
    report = measure(qs, Material(tokenizer, {}, None, ParityOptions())).as_dict()
    assert report["environment"]["compiled"] is compiled
    assert report["environment"]["commit"] == environment.current_commit()
    assert f"compiled {compiled}" in render_markdown(report)


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert environment.environment("cpu")["commit"] == (head or None)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "evals" / "environment.py"))
    assert environment.environment("cpu")["commit"] is None
    (tmp_path / ".git").mkdir()
    (tmp_path / "evals").mkdir()
    monkeypatch.setenv("PATH", "")
    assert environment.environment("cpu")["commit"] is None


def test_a_report_without_a_commit_is_rendered():
    """Older ones have no entry, those of an installed package have none to name."""
    report = json.loads((ROOT / "benchmarks" / "results" / "parity" / "parity.json").read_text())
    facts = {name: value for name, value in report["environment"].items() if name not in ("commit", "compiled")}
    older = render_markdown({**report, "environment": facts})
    assert render_markdown({**report, "environment": {**facts, "commit": None}}) == older
    assert "commit" not in older
    assert "commit 1234" in render_markdown({**report, "environment": {**facts, "commit": "1234"}})


def test_a_spoilt_scale_turns_the_verdict(qs, tokenizer, tiny_tasks, monkeypatch):
    asked = {"tasks": ["tiny_rolling"], "text": TEXT, "options": OPTIONS, "include_path": tiny_tasks}
    assert parity(qs, tokenizer=tokenizer, **asked).passed
    spoil_a_scale(monkeypatch)
    spoilt = parity(qs, tokenizer=tokenizer, **asked)
    assert not spoilt.passed
    assert failures(spoilt) >= {"text perplexity", "text argmax agreement"}


@pytest.fixture
def nan_scales(monkeypatch) -> None:
    """The keys that a prefill has quantized have no finite scale."""
    change_cache_after_prefill(monkeypatch, "k_scale", lambda scale: torch.full_like(scale, torch.nan))


def test_nan_logits_fail_in_a_report_that_is_json(qs, tokenizer, nan_scales, tmp_path):
    report = parity(qs, tokenizer=tokenizer, text=TEXT, options=OPTIONS, output=tmp_path)
    assert not report.passed
    assert {(v.name, v.role) for v in report.verdicts if v.name == "continuations"} >= {
        ("continuations", "target"),
        ("continuations", "speculative"),
    }
    assert failures(report) == {"text perplexity", "text argmax agreement", "continuations"}

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    written = json.loads((tmp_path / "parity.json").read_text(), parse_constant=refuse)
    assert written["text"][0]["perplexity"] is None
    assert None in written["text"][0]["kl_per_position"]
    markdown = (tmp_path / "parity.md").read_text()
    assert "| text perplexity | target | not finite |" in markdown
    assert "nan" not in markdown
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_nan_logits_of_a_task_fail_for_the_roles_that_have_them(qs, tokenizer, tiny_tasks, nan_scales, monkeypatch):
    def run(lm, *arguments):
        if lm.role is EvalRole.DRAFT:
            raise FloatingPointError("logits are NaN")
        return run_task(lm, *arguments)

    monkeypatch.setattr("quantspec.evals.parity.run_task", run)
    tasks = ["tiny_write", "tiny_rolling"]
    options = ParityOptions(limit=2)
    report = parity(qs, tokenizer=tokenizer, tasks=tasks, text="", include_path=tiny_tasks, options=options)
    failed = {(verdict.name, verdict.role) for verdict in report.verdicts if not verdict.passed}
    assert failed >= {
        *(("tiny_write", role) for role in ("target", "speculative", "draft")),
        ("tiny_rolling", "draft"),
    }
    assert "draft" not in {row.role for row in report.tasks}


def test_bad_input_is_refused_before_the_model_is_converted(saved_model, tokenizer, monkeypatch):
    monkeypatch.setattr("quantspec.convert", lambda *_, **__: pytest.fail("the model was converted"))
    model = AutoModelForCausalLM.from_pretrained(saved_model)
    with pytest.raises(ValueError, match="must be a number of tokens"):
        parity(model, tokenizer=tokenizer, tasks=["reference_choice@long"], text="")
    with pytest.raises(ValueError, match="give a longer one"):
        parity(model, tokenizer=tokenizer, text=TEXT, max_cache_len=5000)
    with pytest.raises(ValueError, match=r"context_tokens=3072 and scored_tokens=1024 .* more than the 512"):
        parity(model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        ParityOptions(batch_size=0)


def test_an_output_that_cannot_be_a_folder_is_refused_before_any_work(qs, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("quantspec.evals.parity.compare_text", lambda *_: pytest.fail("something was measured"))
    (tmp_path / "file").touch()
    asked = {"tokenizer": tokenizer, "text": TEXT, "options": OPTIONS}
    with pytest.raises(FileExistsError):
        parity(qs, **asked, output=str(tmp_path / "file"))
    with pytest.raises(TypeError):
        parity(qs, **asked, output=7)


def test_amounts_may_fill_the_pair_and_no_more(table_positions_qs, tokenizer):
    """Learned positions: one more is an index error."""
    full = {"context_tokens": 40, "scored_tokens": 8, "prompts": 2, "prompt_tokens": 40, "new_tokens": 8}
    assert parity(table_positions_qs, tokenizer=tokenizer, text=TEXT, options=ParityOptions(**full)).generation
    for name in ("scored_tokens", "new_tokens"):
        material = Material(tokenizer, {}, torch.tensor(random_prompt(60)), ParityOptions(**{**full, name: 9}))
        with pytest.raises(ValueError, match=f"{name}=9 are 49 tokens, more than the 48"):
            measure(table_positions_qs, material)


def test_roles_read_windows_of_the_same_length(tokenizer, tiny_tasks):
    qs = quantspec.convert(tiny_model("llama"), max_cache_len=32, kv_group_size=GROUP, self_check=False)
    options = ParityOptions(limit=3)
    report = parity(qs, tokenizer=tokenizer, tasks=["tiny_rolling"], text="", options=options, include_path=tiny_tasks)
    assert report.passed, report


def test_a_report_is_not_passed_before_everything_is_measured(qs, tokenizer, tiny_tasks, tmp_path, monkeypatch):
    asked = {"tokenizer": tokenizer, "text": TEXT, "include_path": tiny_tasks, "options": replace(OPTIONS, limit=3)}
    (tmp_path / "notes.txt").touch()
    assert parity(qs, **asked, output=tmp_path).passed
    with pytest.raises(ValueError, match="unknown task"):
        parity(qs, **asked, tasks=["no_such_task"], output=tmp_path)
    assert json.loads((tmp_path / "parity.json").read_text())["passed"], "nothing was measured yet"

    def interrupt(lm, task, *arguments):
        if task.task_name == "tiny_write":
            raise KeyboardInterrupt
        return run_task(lm, task, *arguments)

    monkeypatch.setattr("quantspec.evals.parity.run_task", interrupt)
    with pytest.raises(KeyboardInterrupt):
        parity(qs, **asked, tasks=["tiny_rolling", "tiny_write"], output=tmp_path)
    written = json.loads((tmp_path / "parity.json").read_text())
    assert (written["complete"], written["passed"]) == (False, None)
    assert {row["task"] for row in written["tasks"]} == {"tiny_rolling"}
    assert (tmp_path / "parity.md").read_text().splitlines()[0].endswith(": incomplete")
    with pytest.raises(KeyboardInterrupt):
        parity(qs, **asked, tasks=["tiny_write"], output=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


THRESHOLDS = {"max_standard_errors": 1.0, "max_paired_standard_errors": 2.0, "max_perplexity_change": 0.005}


def runs(ours: list[float], theirs: list[float]) -> list:
    """The comparison of one metric's samples."""
    made = [TaskRun({"acc": Metric(sum(x) / len(x), x)}, None, None) for x in (ours, theirs)]
    return compare("task", EvalRole.TARGET, *made, **THRESHOLDS)


def aggregates(name: str, ours: float, theirs: float):
    """The comparison of one metric that has no number per document."""
    made = [TaskRun({name: Metric(number, None)}, None, None) for number in (ours, theirs)]
    return compare("task", EvalRole.TARGET, *made, **THRESHOLDS)[0]


def test_a_metric_is_equal_within_its_standard_error():
    theirs = [1.0] * 6 + [0.0] * 4
    assert standard_error(theirs) == pytest.approx(0.1633, abs=1e-4)
    (one_less,) = runs([0.0, *theirs[1:]], theirs)
    assert one_less.difference == pytest.approx(-0.1)
    assert one_less.paired_difference == pytest.approx(-0.1)
    assert one_less.paired_standard_error == pytest.approx(0.1)
    assert one_less.equal
    (two_less,) = runs([0.0, 0.0, *theirs[2:]], theirs)
    assert not two_less.equal


@pytest.mark.parametrize(
    ("lost", "gained", "equal"), [(0, 0, True), (1, 0, True), (2, 0, True), (7, 0, False), (8, 5, True)]
)
def test_documents_that_are_lost_one_and_all_are_a_difference(lost, gained, equal):
    """Of 200 documents, half right: within the standard error of the accuracy, but no accident."""
    theirs = [1.0] * 100 + [0.0] * 100
    ours = [0.0] * lost + [1.0] * (100 - lost + gained) + [0.0] * (100 - gained)
    (row,) = runs(ours, theirs)
    assert abs(row.paired_difference) <= row.standard_error
    assert row.equal is equal


@pytest.mark.parametrize(
    ("ours", "threshold"),
    [
        ([1.0, 1.0, 1.0, 0.0], "within 1 standard error (0.2500)"),
        ([0.0, 1.0, 1.0, 0.0], "within 1 standard error (0.2887)"),
        ([0.0, 1.0, 0.0, 1.0], "within 1 standard error (0.2887) and 2 paired (0.4787)"),
        ([0.0, 0.0, 0.0, 0.0], "within 1 standard error (0.2500) and 2 paired (0.2500)"),
    ],
    ids=["equal", "one differs", "three differ", "all lost"],
)
def test_a_verdict_names_the_thresholds_that_applied(ours, threshold):
    """The paired one from two documents that differ on."""
    assert verdict("acc", ours, [1.0, 1.0, 1.0, 0.0]).threshold == threshold


def test_a_verdict_on_a_small_change_of_a_perplexity_names_no_paired_threshold():
    theirs = [-1.0, -2.0, -3.0]
    small, large = (verdict("perplexity", [sample + shift for sample in theirs], theirs) for shift in (0.001, 0.1))
    assert (small.passed, small.threshold) == (True, "within 1 standard error (0.5774)")
    assert (large.passed, large.threshold) == (False, "within 1 standard error (0.5774) and 2 paired (0.0000)")


def verdict(metric: str, ours: list[float], theirs: list[float]) -> Verdict:
    """The report's verdict on one metric of the target."""
    answers = [TaskRun({metric: Metric(sum(x) / len(x), x)}, None, None) for x in (ours, theirs)]
    report = ParityReport("model", {}, ParityOptions(), {})
    report.tasks.extend(compare("task", EvalRole.TARGET, *answers, **THRESHOLDS))
    _judge_task(report, "task", dict.fromkeys(EvalRole, answers[0]))
    (judged,) = report.verdicts
    return judged


def test_a_shift_of_every_document_is_a_difference():
    (row,) = runs([-1.1, -2.1, -3.1], [-1.0, -2.0, -3.0])
    assert row.paired_standard_error == pytest.approx(0)
    assert row.equal is False


@pytest.mark.parametrize(("shift", "equal"), [(0.001, True), (0.01, False)])
def test_a_shift_of_every_log_probability_may_be_within_the_change_of_a_perplexity(shift, equal):
    samples = [-1.0, -2.0, -3.0]
    made = [
        TaskRun({"perplexity": Metric(math.exp(2 + moved), [sample - moved for sample in samples])}, None, None)
        for moved in (shift, 0.0)
    ]
    (row,) = compare("task", EvalRole.TARGET, *made, **THRESHOLDS)
    assert row.equal is equal


@pytest.mark.parametrize("theirs", [[-1.0, -2.0, -3.0], [-1.0, -2.0, float("inf")]])
@pytest.mark.parametrize("lost", [float("nan"), float("-inf")])
def test_a_sample_that_is_no_number_is_a_difference(lost, theirs):
    (row,) = runs([-1.0, -2.0, lost], theirs)
    assert (row.equal, row.documents) == (False, 3)
    assert (row.standard_error, row.paired_difference, row.paired_standard_error) == (None, None, None)
    assert runs([lost], [-1.0])[0].equal is False


def test_a_text_that_is_impossible_to_both_is_none():
    impossible = float("-inf")
    (same,) = runs([impossible, -1.0, -2.0], [impossible, -1.0, -2.0])
    assert (same.difference, same.paired_difference, same.equal) == (0, 0, True)
    (shifted,) = runs([impossible, -1.1, -2.1, -3.1], [impossible, -1.0, -2.0, -3.0])
    assert shifted.standard_error == pytest.approx(standard_error([-1.0, -2.0, -3.0]))
    assert shifted.equal is False
    assert standard_error([impossible, -1.0]) == 0
    assert aggregates("word_perplexity", float("inf"), float("inf")).equal is True


def test_scores_that_are_nan_fail_a_report(qs, tokenizer, tiny_tasks, monkeypatch):
    """An accuracy would not tell: the argmax of NaN is some choice."""
    change_cache_after_prefill(monkeypatch, "k_scale", lambda scale: torch.full_like(scale, torch.nan))
    report = parity(qs, tokenizer=tokenizer, tasks=["tiny_choice"], text="", include_path=tiny_tasks)
    assert report.passed is False
    assert "target" in {verdict.role for verdict in report.verdicts if not verdict.passed}


def test_one_document_is_not_judged(qs, tokenizer, tiny_tasks):
    assert runs([0.0], [1.0])[0].equal is None
    options = ParityOptions(limit=1)
    report = parity(qs, tokenizer=tokenizer, tasks=["tiny_choice"], text="", options=options, include_path=tiny_tasks)
    assert report.tasks
    assert not report.verdicts
    assert report.passed is None
    assert report.as_dict()["passed"] is None
    assert str(report).splitlines()[0].endswith(": not judged")


@pytest.mark.parametrize(("ours", "theirs"), [(0.0, 0.0), (0.5, 0.0), (0.5, 0.51), (float("nan"), 0.5)])
def test_an_aggregate_that_is_no_perplexity_is_reported_and_not_judged(ours, theirs):
    row = aggregates("f1", ours, theirs)
    assert row.equal is None
    assert row.difference == pytest.approx(ours - theirs, nan_ok=True)


def test_an_f1_task_is_compared_without_a_verdict(qs, tokenizer, tiny_tasks, tmp_path):
    """lm-eval's f1 keeps a pair per document, and may be 0 for the reference."""
    task = json.loads((tiny_tasks / "tiny_choice.yaml").read_text())
    task |= {"task": "tiny_f1", "metric_list": [{"metric": "f1"}]}
    (tmp_path / "tiny_f1.yaml").write_text(json.dumps(task))
    report = parity(qs, tokenizer=tokenizer, tasks=["tiny_f1"], text="", include_path=tmp_path)
    assert {(row.metric, row.standard_error, row.equal) for row in report.tasks} == {("f1", None, None)}
    assert not report.verdicts


@pytest.mark.parametrize("name", ["word_perplexity", "perplexity (strict)", "bits_per_byte"])
def test_perplexities_and_bits_per_byte_are_judged_by_their_relative_change(name):
    assert aggregates(name, 2.004, 2.0).equal is True
    assert aggregates(name, 2.02, 2.0).equal is False
    assert aggregates(name, 0.0, 0.0).equal is True
    assert aggregates(name, float("inf"), float("nan")).equal is False


@pytest.mark.parametrize(("value", "equal"), [(10.04, True), (9.96, True), (10.06, False), (9.94, False)])
def test_a_perplexity_is_equal_within_half_a_percent(value, equal):
    assert aggregates("word_perplexity", value, 10.0).equal is equal


def test_divergence_and_agreement_are_those_of_the_full_forward(qs):
    ids = torch.tensor(random_prompt(200))
    target, draft = compare_text(qs, ids, 120, [EvalRole.TARGET, EvalRole.DRAFT])
    with torch.no_grad():
        logits = qs.model(ids[None]).logits[0, 120:]
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[121:]).exp()
    assert target.reference_perplexity == draft.reference_perplexity == pytest.approx(expected.item(), rel=1e-4)
    assert target.argmax_agreement > draft.argmax_agreement
    assert all(GROUP <= distance < 3 * GROUP for distance in target.distances)


def test_a_short_context_has_no_distance_from_the_planes(qs):
    (target,) = compare_text(qs, torch.tensor(random_prompt(20)), 10, [EvalRole.TARGET])
    assert target.distances == [None] * 10
    assert target.mean_kl < 1e-6


def test_the_first_divergence_is_found_with_its_margin(qs):
    prompts = torch.tensor([random_prompt(20, seed) for seed in (1, 2)])
    reference = generate_greedily(qs, prompts, 8, EvalRole.REFERENCE)
    changed = reference.clone()
    changed[1, 3:] = (changed[1, 3:] + 1) % 90
    tokens = {EvalRole.REFERENCE: reference, EvalRole.TARGET: changed}
    comparison = compare_generation(qs, prompts, tokens, EvalRole.TARGET, EvalRole.REFERENCE)
    assert comparison.exact_match_rate == 0.5
    (divergence,) = comparison.divergences
    assert (divergence.prompt, divergence.index) == (1, 3)
    with torch.no_grad():
        logits = qs.model(torch.cat((prompts[1], reference[1, :3]))[None]).logits[0, -1]
    assert divergence.margin == pytest.approx((logits[reference[1, 3]] - logits[changed[1, 3]]).item(), abs=1e-4)
    assert divergence.margin > 0


def test_texts_that_drafting_changes_fail(qs, tokenizer, tiny_tasks, monkeypatch):
    # A target that accepts every draft emits what the draft says.
    def accept_all(drafts: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(drafts.sum(1), drafts.shape[1]), scores[:, -1].argmax(-1)

    monkeypatch.setattr(qs, "session", Session(qs.pair, accept_all))
    report = parity(qs, tokenizer=tokenizer, tasks=["tiny_write"], text="", include_path=tiny_tasks)
    assert "tiny_write texts" in failures(report)


def test_a_sampled_task_is_answered_the_same_every_time(qs, tokenizer, tiny_tasks, tmp_path, monkeypatch):
    task = json.loads((tiny_tasks / "tiny_write.yaml").read_text())
    sampling = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 12, "until": []}
    task |= {"task": "tiny_sampled", "generation_kwargs": sampling, "metric_list": [{"metric": "exact_match"}]}
    (tmp_path / "tiny_sampled.yaml").write_text(json.dumps(task))
    loaded = load_tasks(["tiny_sampled"], tmp_path, tmp_path)["tiny_sampled"]
    lm = QuantSpecLM(qs, role="target", tokenizer=tokenizer)

    given: list[list[str]] = []
    generate = lm.generate_until

    def generate_and_keep(asked, **options):
        given.append(generate(asked, **options))
        return given[-1]

    monkeypatch.setattr(lm, "generate_until", generate_and_keep)
    for _ in range(2):
        run_task(lm, loaded, limit=2)
    first, second = given
    assert first == second
    assert all(first)


def test_the_offline_documents_have_one_right_answer():
    sentences = build.prose()
    choices = build.multiple_choice()["test"]
    assert len(choices) == 200
    for document in choices:
        assert len(set(document["choices"])) == 4
        right = document["choices"][document["answer"]]
        place = sentences.index(right)
        assert document["context"].endswith(sentences[place - 1])
        assert all(wrong not in document["context"] for wrong in document["choices"])
    for document in build.cloze(max_seq_lengths=[125])["test"]:
        assert f" {document['word']} " in document["context"]
        assert 500 <= len(document["context"]) < 1500
    passages = build.rolling()["test"]
    assert len(passages) > 20
    assert all(3000 <= len(document["text"]) < 4500 for document in passages)


def test_offline_tasks_are_found_by_name(tmp_path):
    tasks = load_tasks(["reference_choice", "reference_cloze", "reference_perplexity"], tmp_path)
    assert [task.OUTPUT_TYPE for task in tasks.values()] == [
        "multiple_choice",
        "loglikelihood",
        "loglikelihood_rolling",
    ]
    assert (
        load_tasks(["reference_choice"], tmp_path)["reference_choice"].eval_docs[0]
        == tasks["reference_choice"].eval_docs[0]
    )


@pytest.mark.parametrize("length", ["long", "", "0", "-5", "²", "1.5"])
def test_a_length_must_be_a_number(tmp_path, length):
    with pytest.raises(ValueError, match=f"the length in 'reference_cloze@{length}' must be a number of tokens"):
        load_tasks([f"reference_cloze@{length}"], tmp_path)


@pytest.mark.parametrize("name", ["reference_choice", "reference_perplexity", "tiny_choice"])
def test_a_task_that_has_no_length_takes_none(tmp_path, tiny_tasks, name):
    with pytest.raises(ValueError, match=f"'{name}' cannot be made of a length: leave out '@300'"):
        load_tasks([f"{name}@300"], tmp_path, tiny_tasks)


def test_documents_are_made_of_the_length_that_is_asked_for(tmp_path):
    tasks = load_tasks(["reference_cloze@125", "reference_cloze@500"], tmp_path)
    short, long = (len(task.eval_docs[0]["context"]) for task in tasks.values())
    assert list(tasks) == ["reference_cloze@125", "reference_cloze@500"]
    assert 500 <= short < 1500
    assert 2000 <= long < 3000


def test_rulers_tasks_take_a_length(tmp_path, monkeypatch):
    """Theirs, without the text that they fetch."""
    folder = Path(lm_eval.tasks.__file__).parent / "ruler"
    made = []

    def download(task, *_, **__):
        made.append(task.config.metadata["max_seq_lengths"])
        task.dataset = {"test": Dataset.from_list([{"input": "a", "outputs": ["b"], "gen_prefix": "c"}])}

    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.download", download)
    names = [f"{name}@4096" for name in ("niah_single_1", "ruler_qa_squad")]
    assert list(load_tasks(names, tmp_path, folder)) == names
    assert made == [[4096], [4096]]
