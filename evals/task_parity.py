"""lm-eval tasks answered in several roles, sample by sample, so that their metrics can be compared in pairs."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch

from quantspec import GenerationStats

from .lm_eval_command import TASKS, require_lm_eval
from .roles import EvalRole

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from .adapter import QuantSpecLM

# Separates a task's name from the length in tokens that its documents are made for: niah_single_1@4096.
LENGTH_MARK = "@"
_SEED = 0
# Numbers of documents below which a rule says nothing: documents at all, and documents that differ.
_FEWEST_DOCUMENTS = 2
_FEWEST_CHANGES = 2
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Metric:
    """One metric of one run.

    Attributes:
        value: as lm-eval aggregates it.
        samples: one number per document, or None where a document's contribution is not a number of its own
            (perplexities weighted by length, F1).
    """

    value: float
    samples: list[float] | None


@dataclass(frozen=True)
class TaskRun:
    """What one role made of one task.

    Attributes:
        metrics: by name.
        texts: greedily generated, one per document; None for other tasks.
        acceptance: drafted and accepted tokens of the role ``speculative``; None for other roles and tasks.
    """

    metrics: dict[str, Metric]
    texts: list[str] | None
    acceptance: dict[str, float] | None


@dataclass(frozen=True)
class MetricComparison:
    """A metric of one role beside the reference's.

    Attributes:
        task: its name, with ``@LENGTH`` if it was made at a length.
        role: whose metric it is.
        metric: lm-eval's name of it, with the filter in parentheses if there is one.
        documents: how many were answered; None without a number per document (samples).
        value, reference: the metric of the role and of the original model, as lm-eval aggregates it.
        difference: value minus the reference's; of perplexities without samples, relative to the reference's.
        standard_error: the larger of the two runs' own, in the unit of the samples; None without samples, or where one
            differs from the reference's by NaN or infinity.
        paired_difference, paired_standard_error: of the mean over documents; None as ``standard_error``.
        equal: False where a sample differs from the reference's by NaN or infinity; else with samples, within
            ``max_standard_errors`` of the standard error and, where two documents or more differ, within
            ``max_paired_standard_errors`` of the paired one (or, of a perplexity, within ``max_perplexity_change``);
            a perplexity or bits per byte without samples, within ``max_perplexity_change``. None, not judged, of one
            document and of other metrics.
        paired_applies: whether ``equal`` was held against the paired standard error too.
    """

    task: str
    role: str
    metric: str
    documents: int | None
    value: float
    reference: float
    difference: float
    standard_error: float | None
    paired_difference: float | None
    paired_standard_error: float | None
    equal: bool | None
    paired_applies: bool


def load_tasks(specs: Sequence[str], tokenizer_path: Path, include_path: Path | None = None) -> dict[str, Task]:
    """The tasks called ``specs``: names of tasks, groups or tags, or ``NAME@LENGTH`` for one made at a length.

    Args:
        specs: the offline tasks of this package, those under ``include_path``, and lm-eval's own.
        tokenizer_path: folder with the tokenizer that measures lengths.
        include_path: folder with further tasks.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        ValueError: an unknown name, a length that is no number from 1 on, or one for a task that takes none.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    for spec in specs:
        _, mark, length = spec.partition(LENGTH_MARK)
        if mark and not (length.isdecimal() and int(length) >= 1):
            raise ValueError(f"the length in {spec!r} must be a number of tokens, at least 1")
    folders: list[str | Path] = [TASKS, *filter(None, [include_path])]
    names = {spec.partition(LENGTH_MARK)[0] for spec in specs}
    # lm-eval's own tasks are thousands of files, read only if one of them is asked for.
    ours = set(TaskManager(include_path=folders, include_defaults=False).all_tasks)
    metadata: dict[str, Any] = {"tokenizer": str(tokenizer_path)}
    manager = TaskManager(include_path=folders, include_defaults=not names <= ours, metadata=metadata)
    unknown = sorted(names - set(manager.all_tasks))
    if unknown:
        raise ValueError(f"unknown task {', '.join(unknown)}; `quantspec eval ls tasks` lists the known ones")
    tasks: dict[str, Task] = {}
    for spec in specs:
        name, mark, length = spec.partition(LENGTH_MARK)
        chosen = manager
        if mark:
            folder = manager.task_index[name].yaml_path.parent
            chosen = TaskManager(
                include_path=folder, include_defaults=False, metadata={**metadata, "max_seq_lengths": [int(length)]}
            )
        with _seeded():
            loaded = chosen.load(name)["tasks"]
        for task_name, task in loaded.items():
            if mark and not _takes_length(task):
                raise ValueError(f"{task_name!r} cannot be made of a length: leave out {mark + length!r}")
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
            tasks[task_name + mark + length] = task
    return tasks


def _takes_length(task: Task) -> bool:
    """Whether it is one of RULER's, or the function that makes its documents has a parameter ``max_seq_lengths``."""
    import lm_eval.tasks

    make = task.get_config("custom_dataset")
    if not inspect.isfunction(make):
        return False
    # RULER's functions take the lengths out of their keyword arguments.
    ruler = Path(lm_eval.tasks.__file__).resolve().parent / "ruler"
    return (
        Path(inspect.getfile(make)).resolve().parent == ruler or "max_seq_lengths" in inspect.signature(make).parameters
    )


def run_task(lm: QuantSpecLM, task: Task, limit: int | None = None, apply_chat_template: bool = False) -> TaskRun:
    """Answer the first ``limit`` documents of ``task``, sampled answers with a seed of their own."""
    from lm_eval import evaluate

    lm.statistics.clear()
    name = task.task_name
    # The standard errors come from the samples here; lm-eval would bootstrap some in worker processes.
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        results = evaluate(
            lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0, apply_chat_template=apply_chat_template
        )
    assert results is not None
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    metrics = {}
    for key, value in results["results"][name].items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        values = [sample[metric] for sample in samples if sample["filter"] == chosen]
        # RULER marks the lengths that a document was not made for with -1.
        if all(sample == -1 for sample in values):
            continue
        numbers = all(isinstance(sample, Real) for sample in values)
        label = metric if chosen == "none" else f"{metric} ({chosen})"
        metrics[label] = Metric(float(value), [float(sample) for sample in values] if numbers else None)
    texts = None
    if task.OUTPUT_TYPE == "generate_until" and not task.get_config("generation_kwargs").get("do_sample"):
        texts = [sample["resps"][0][0] for sample in samples]
    return TaskRun(metrics, texts, _acceptance(lm.statistics) if lm.role is EvalRole.SPECULATIVE else None)


def compare(
    task: str,
    role: EvalRole,
    run: TaskRun,
    reference: TaskRun,
    max_standard_errors: float,
    max_paired_standard_errors: float,
    max_perplexity_change: float,
) -> list[MetricComparison]:
    """Every metric of ``run`` beside the reference's."""
    comparisons = []
    for name, ours in run.metrics.items():
        theirs = reference.metrics[name]
        named = (task, role.value, name)
        difference, equal = _difference(ours.value, theirs.value), None
        # No perplexity is 0, but bits per byte may be.
        change = difference / theirs.value if theirs.value else difference
        small_change = _is_perplexity(name) and abs(change) <= max_perplexity_change
        if ours.samples is None or theirs.samples is None:
            if _is_perplexity(name):
                difference, equal = change, small_change
            comparisons.append(
                MetricComparison(*named, None, ours.value, theirs.value, difference, None, None, None, equal, False)
            )
            continue
        pairs = [_difference(a, b) for a, b in zip(ours.samples, theirs.samples, strict=True)]
        if not all(map(math.isfinite, pairs)):
            comparisons.append(
                MetricComparison(
                    *named, len(pairs), ours.value, theirs.value, difference, None, None, None, False, False
                )
            )
            continue
        error = max(standard_error(ours.samples), standard_error(theirs.samples))
        # Means of the samples, since an aggregate (a perplexity) may have another unit than its samples.
        paired_difference, paired_error = fmean(pairs), standard_error(pairs)
        # A tiny shift of every document's log-probability is certain, but small.
        paired_applies = not small_change and sum(abs(pair) > _ROUNDING for pair in pairs) >= _FEWEST_CHANGES
        if len(pairs) >= _FEWEST_DOCUMENTS:
            equal = abs(paired_difference) <= max_standard_errors * error + _ROUNDING
            if paired_applies:
                equal = equal and abs(paired_difference) <= max_paired_standard_errors * paired_error + _ROUNDING
        comparisons.append(
            MetricComparison(
                *named,
                len(pairs),
                ours.value,
                theirs.value,
                difference,
                error,
                paired_difference,
                paired_error,
                equal,
                paired_applies,
            )
        )
    return comparisons


def _is_perplexity(name: str) -> bool:
    """Whether a metric's label is that of a perplexity or of bits per byte, whatever lm-eval's filter behind it."""
    metric = name.partition(" ")[0]
    return metric == "bits_per_byte" or metric.endswith("perplexity")


def _difference(ours: float, theirs: float) -> float:
    """Of two samples or values; 0 for two equal infinities."""
    return 0.0 if ours == theirs else ours - theirs


def standard_error(samples: Sequence[float]) -> float:
    """Of the mean of the finite samples; 0 for a single one."""
    finite = [sample for sample in samples if math.isfinite(sample)]
    return stdev(finite) / math.sqrt(len(finite)) if len(finite) > 1 else 0.0


def _acceptance(statistics: Sequence[GenerationStats]) -> dict[str, float] | None:
    """The rates over all batches of a task; None if nothing was drafted."""
    drafted, accepted, cycles = (
        sum(getattr(entry, name) for entry in statistics) for name in ("drafted", "accepted", "cycles")
    )
    if not drafted:
        return None
    return {
        "generated_tokens": sum(entry.generated_tokens for entry in statistics),
        "draft_acceptance_rate": accepted / drafted,
        "mean_acceptance_length": 1 + accepted / cycles,
    }


@contextmanager
def _seeded() -> Iterator[None]:
    """Some tasks draw their documents with Python's global generator."""
    state = random.getstate()
    random.seed(_SEED)
    try:
        yield
    finally:
        random.setstate(state)
