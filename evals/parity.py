"""The parity report: does the quantized pair say what the original model says?

Tasks, a long text and greedy continuations are given to the original model and to the roles of the pair, compared, and
judged by stated thresholds. ``quantspec parity`` is the command.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import quantspec
from quantspec import QuantSpecConfig, QuantSpecModel
from quantspec.checkpoint.config_check import known_limit

from .environment import environment
from .generation_parity import GenerationComparison, compare_generation, generate_greedily
from .lm_eval_command import require_lm_eval
from .parity_rendering import NOT_FINITE, figure, render_html, render_markdown, render_plot
from .roles import EvalRole
from .scoring import warn_of_short_texts
from .task_parity import MetricComparison, TaskRun, compare, load_tasks, run_task
from .text_parity import TextComparison, compare_text
from .texts import python_reference

if TYPE_CHECKING:
    from lm_eval.api.task import Task

# The thresholds of a verdict; each is an option of :class:`ParityOptions` too.
MAX_STANDARD_ERRORS = 1.0
MAX_PAIRED_STANDARD_ERRORS = 2.0
MAX_PERPLEXITY_CHANGE = 0.005
MIN_ARGMAX_AGREEMENT = 0.99
MIN_SPECULATIVE_MATCH = 1.0
# Distances from the planes are reported in classes of a quarter of a group.
_DISTANCE_CLASSES_PER_GROUP = 4


@dataclass(frozen=True)
class ParityOptions:
    """What is measured and what counts as equal.

    Attributes:
        limit: documents per task, the first ones; None for all.
        batch_size: sequences at a time, or "auto".
        apply_chat_template: for the tasks.
        context_tokens, scored_tokens: of the long text: what is prefilled, and what is then read token by token.
        prompts, prompt_tokens, new_tokens: of the greedy continuations, from places all over the text; 0 prompts skip.
        max_standard_errors: a task's metric is equal if it differs from the reference's by at most so many.
        max_paired_standard_errors: and, where two documents or more differ, by at most so many of the mean difference
            (a perplexity may be within ``max_perplexity_change`` instead).
        max_perplexity_change: relative, of the text and of tasks that report perplexities.
        min_argmax_agreement: of the target on the text.
        min_speculative_match: fraction of greedy texts that must be the same with and without drafting.

    Raises:
        ValueError: a number out of range.
    """

    limit: int | None = None
    batch_size: int | str = 1
    apply_chat_template: bool = False
    context_tokens: int = 3072
    scored_tokens: int = 1024
    prompts: int = 8
    prompt_tokens: int = 1024
    new_tokens: int = 64
    max_standard_errors: float = MAX_STANDARD_ERRORS
    max_paired_standard_errors: float = MAX_PAIRED_STANDARD_ERRORS
    max_perplexity_change: float = MAX_PERPLEXITY_CHANGE
    min_argmax_agreement: float = MIN_ARGMAX_AGREEMENT
    min_speculative_match: float = MIN_SPECULATIVE_MATCH

    def __post_init__(self) -> None:
        smallest = {"context_tokens": 1, "scored_tokens": 2, "prompts": 0, "prompt_tokens": 1, "new_tokens": 1}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("max_standard_errors", "max_paired_standard_errors", "max_perplexity_change"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("min_argmax_agreement", "min_speculative_match"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a fraction from 0 to 1, not {getattr(self, name)}")
        for name in ("limit", "batch_size"):
            number = getattr(self, name)
            if isinstance(number, int) and number < 1:
                raise ValueError(f"{name} must be at least 1, not {number}")

    def check_fit(self, limit: int) -> None:
        """Refuse amounts that a pair cannot hold whose ``max_cache_len`` is ``limit``.

        Raises:
            ValueError: the amounts of the long text or of the continuations are together more than ``limit``.
        """
        sums = [("context_tokens", "scored_tokens")]
        if self.prompts:
            sums.append(("prompt_tokens", "new_tokens"))
        for first, second in sums:
            needed = getattr(self, first) + getattr(self, second)
            if needed > limit:
                raise ValueError(
                    f"{first}={getattr(self, first)} and {second}={getattr(self, second)} are {needed} tokens, more "
                    f"than the {limit} that the pair takes; choose fewer"
                )

    def text_tokens(self) -> int:
        """Tokens of text that the measurements need."""
        return max(self.context_tokens + self.scored_tokens, self.prompts and self.prompt_tokens + self.prompts)


@dataclass(frozen=True)
class Verdict:
    """A figure and the threshold that it was held against.

    Attributes:
        name: what was measured.
        role: whose figure it is.
        value, threshold: as text.
        passed: whether the threshold was met.
    """

    name: str
    role: str
    value: str
    threshold: str
    passed: bool


@dataclass(frozen=True)
class ParityReport:
    """Everything measured; ``str`` gives Markdown.

    Attributes:
        model: its name.
        config: the conversion's options, as text.
        options: what was measured and the thresholds.
        environment: device, threads, versions and commit (None outside a checkout), the model's dtype, and whether the
            pair ran through torch.compile.
        tasks: every metric of every role but the reference.
        acceptance: by task, ``draft_acceptance_rate``, ``mean_acceptance_length`` and ``generated_tokens`` of the role
            ``speculative``.
        text: one comparison per role on the long text.
        generation: comparisons of greedy continuations.
        verdicts: one per threshold that applied.
        complete: whether everything was measured; a report written before the end is not.
    """

    model: str
    config: dict[str, str]
    options: ParityOptions
    environment: dict[str, Any]
    tasks: list[MetricComparison] = field(default_factory=list)
    acceptance: dict[str, dict[str, float]] = field(default_factory=dict)
    text: list[TextComparison] = field(default_factory=list)
    generation: list[GenerationComparison] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    complete: bool = False

    @property
    def passed(self) -> bool | None:
        """Whether every threshold was met; None if none applied, or not everything was measured."""
        if not self.complete or not self.verdicts:
            return None
        return all(verdict.passed for verdict in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: a number that is not finite is None."""
        width = int(self.config["kv_group_size"]) // _DISTANCE_CLASSES_PER_GROUP
        report = {
            "model": self.model,
            "config": self.config,
            "options": asdict(self.options),
            "environment": self.environment,
            "complete": self.complete,
            "passed": self.passed,
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "tasks": [asdict(comparison) for comparison in self.tasks],
            "acceptance": self.acceptance,
            "text": [comparison.as_dict(width) for comparison in self.text],
            "generation": [comparison.as_dict() for comparison in self.generation],
        }
        return _only_finite(report)

    def write(self, folder: Path) -> None:
        """Write ``parity.json``, ``parity.md`` and ``parity.png`` (the plot where matplotlib is installed)."""
        folder.mkdir(parents=True, exist_ok=True)
        report = self.as_dict()
        with _replacing(folder / "parity.json") as file:
            file.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        with _replacing(folder / "parity.md") as file:
            file.write_text(render_markdown(report))
        with _replacing(folder / "parity.png") as file:
            render_plot(report, file)

    def __str__(self) -> str:
        return render_markdown(self.as_dict())

    def _repr_html_(self) -> str:
        return render_html(self.as_dict())


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write, which takes its place if it is written to the end."""
    part = path.with_stem(f"{path.stem}.part")
    try:
        yield part
        if part.exists():
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove_report(folder: Path) -> None:
    """Remove the files of an earlier report, so that none of them is taken for what is measured now."""
    for name in ("parity.json", "parity.md", "parity.png"):
        (folder / name).unlink(missing_ok=True)


def parity(
    model: PreTrainedModel | QuantSpecModel,
    *,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = (),
    text: str | None = None,
    options: ParityOptions | None = None,
    include_path: Path | None = None,
    output: Path | str | None = None,
    name: str | None = None,
    **conversion: Any,
) -> ParityReport:
    """Compare a model with its quantized pair.

    Args:
        model: a Hugging Face decoder, or a pair made of one already.
        tokenizer: the model's.
        tasks: lm-eval tasks, the offline ones among them; ``NAME@LENGTH`` makes those of RULER and
            ``reference_cloze`` of that many tokens.
        text: the long text; Python's language reference if None, no text and no continuations if empty.
        options: amounts and thresholds.
        include_path: folder with further lm-eval tasks.
        output: folder for the report's files, made if it is not there. Those of an earlier report are removed once the
            arguments are checked. They are written after every task; until the end ``complete`` is False.
        name: the model's in the report; where it was loaded from if None.
        **conversion: options of :func:`quantspec.convert`, for a model that is not converted.

    Returns:
        What was measured, with a verdict for every threshold that applied.

    Raises:
        ModuleNotFoundError: tasks are asked for and lm-eval is not installed.
        ValueError, TypeError: a bad option, an unknown task, a text that is too short, or amounts that are more than
            the model's context or ``max_cache_len``.
        OSError: ``output`` cannot be made a folder.
    """
    if isinstance(model, QuantSpecModel) and conversion:
        raise ValueError(f"the model is converted already; {', '.join(conversion)} cannot be chosen any more")
    if not isinstance(model, QuantSpecModel):
        conversion_config = QuantSpecConfig.from_options(None, conversion)
        limit = known_limit(model.config, conversion_config)
    else:
        limit = model.config.max_cache_len
    if output is not None:
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
    material = prepare(
        tokenizer, tasks=tasks, text=text, options=options, include_path=include_path, max_cache_len=limit
    )
    if output is not None:
        remove_report(output)
    qs = model if isinstance(model, QuantSpecModel) else quantspec.convert(model, **conversion)
    return measure(qs, material, output=output, name=name)


@dataclass(frozen=True)
class Material:
    """What a pair is measured on, checked before there is a pair.

    Attributes:
        tasks: by name.
        ids: of the long text, int64 ``(tokens,)``; None for no text.
    """

    tokenizer: PreTrainedTokenizerBase
    tasks: dict[str, Task]
    ids: Tensor | None
    options: ParityOptions


def prepare(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] = (),
    text: str | None = None,
    options: ParityOptions | None = None,
    include_path: Path | None = None,
    max_cache_len: int | None = None,
) -> Material:
    """Tokenize the text and load the tasks.

    Arguments and errors are those of :func:`parity`; ``max_cache_len`` is the pair's, None if it is not known yet.
    """
    options = options or ParityOptions()
    if not tasks and text == "":
        raise ValueError("nothing to compare: name tasks, or give a text")
    if tasks:
        require_lm_eval()
    if text != "" and max_cache_len is not None:
        options.check_fit(max_cache_len)
    ids = _text_ids(tokenizer, python_reference() if text is None else text, options) if text != "" else None
    loaded: dict[str, Task] = {}
    if tasks:
        with _lm_eval_warnings_hidden(), tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            loaded = load_tasks(tasks, Path(folder), include_path)
    return Material(tokenizer, loaded, ids, options)


def measure(
    qs: QuantSpecModel, material: Material, *, output: Path | None = None, name: str | None = None
) -> ParityReport:
    """Compare the roles of ``qs`` with its original model; ``output`` and ``name`` are those of :func:`parity`."""
    if material.ids is not None:
        assert qs.config.max_cache_len is not None
        material.options.check_fit(qs.config.max_cache_len)
    report = ParityReport(
        model=name or Path(qs.model.config.name_or_path).name or type(qs.model).__name__,
        config={name: _plain(getattr(qs.config, name)) for name in _REPORTED_OPTIONS},
        options=material.options,
        environment={
            **environment(str(qs.device)),
            "dtype": str(qs.model.dtype).removeprefix("torch."),
            "compiled": qs.compiles,
        },
    )
    with _lm_eval_warnings_hidden():
        if material.ids is not None:
            _measure_text(report, qs, material.ids.to(qs.device))
        if material.tasks:
            _measure_tasks(report, qs, material, output)
    report = replace(report, complete=True)
    if output is not None:
        report.write(output)
    return report


@contextlib.contextmanager
def _lm_eval_warnings_hidden() -> Iterator[None]:
    """lm-eval warns that the model was loaded before, once per role, and that tasks take metadata, once per task."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


_REPORTED_OPTIONS = (
    "num_speculative_tokens",
    "draft",
    "draft_recipe",
    "kv_group_size",
    "weight_group_size",
    "weight_quantizer",
    "quantize_lm_head",
    "max_cache_len",
)


def _plain(option: Any) -> str:
    return str(option.value if isinstance(option, Enum) else option)


def _only_finite(value: Any) -> Any:
    """``value`` with None for floats that JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _only_finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_only_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str, options: ParityOptions) -> Tensor:
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    if len(ids) < options.text_tokens():
        raise ValueError(
            f"the text has {len(ids)} tokens, but {options.text_tokens()} are needed; give a longer one, or fewer "
            "context_tokens, scored_tokens or prompt_tokens"
        )
    return ids


def _measure_tasks(report: ParityReport, qs: QuantSpecModel, material: Material, output: Path | None) -> None:
    from .adapter import QuantSpecLM

    options = report.options
    # Scores of a half-precision model are summed in float32, as those of the pair are.
    common: dict[str, Any] = {
        "tokenizer": material.tokenizer,
        "batch_size": options.batch_size,
        "softmax_dtype": "float32",
    }
    # The original model's own limit, or max_cache_len where that is less: every role reads the same windows.
    common["max_length"] = QuantSpecLM(qs, role=EvalRole.TARGET.value, **common).max_length
    models = {role: QuantSpecLM(qs, role=role.value, **common) for role in EvalRole}
    for name, task in material.tasks.items():
        runs: dict[EvalRole, TaskRun] = {}
        for role, lm in models.items():
            # What is emitted has the target's distribution, so only generation can tell the two apart.
            if role is EvalRole.SPECULATIVE and task.OUTPUT_TYPE != "generate_until":
                if EvalRole.TARGET in runs:
                    runs[role] = runs[EvalRole.TARGET]
            else:
                try:
                    runs[role] = run_task(lm, task, options.limit, options.apply_chat_template)
                except FloatingPointError:
                    _judge_not_finite(report, name, role)
            if role is not EvalRole.REFERENCE and {role, EvalRole.REFERENCE} <= runs.keys():
                report.tasks.extend(
                    compare(
                        name,
                        role,
                        runs[role],
                        runs[EvalRole.REFERENCE],
                        options.max_standard_errors,
                        options.max_paired_standard_errors,
                        options.max_perplexity_change,
                    )
                )
        speculative = runs.get(EvalRole.SPECULATIVE)
        if speculative is not None and speculative.acceptance is not None:
            report.acceptance[name] = speculative.acceptance
        _judge_task(report, name, runs)
        if output is not None:
            report.write(output)


def _judge_task(report: ParityReport, name: str, runs: dict[EvalRole, TaskRun]) -> None:
    options = report.options
    for row in report.tasks:
        if row.task == name and row.role != EvalRole.DRAFT.value and row.equal is not None:
            if row.standard_error is None:
                value = figure(row.difference, "+.3%")
                threshold = f"perplexity within {options.max_perplexity_change:.1%}"
            else:
                value = figure(row.paired_difference, "+.4f")
                error, paired_error = figure(row.standard_error, ".4f"), figure(row.paired_standard_error, ".4f")
                threshold = f"within {options.max_standard_errors:g} standard error ({error})"
                if row.paired_applies:
                    threshold += f" and {options.max_paired_standard_errors:g} paired ({paired_error})"
            report.verdicts.append(Verdict(f"{name} {row.metric}", row.role, value, threshold, row.equal))
    texts, target = (runs[role].texts if role in runs else None for role in (EvalRole.SPECULATIVE, EvalRole.TARGET))
    if texts is not None and target is not None:
        same = sum(a == b for a, b in zip(texts, target, strict=True)) / len(texts)
        _judge_speculation(report, f"{name} texts", same)


def _judge_not_finite(report: ParityReport, name: str, role: EvalRole) -> None:
    """NaN logits are a failure of whichever role has them, the draft's too: it can propose nothing."""
    report.verdicts.append(Verdict(name, role.value, NOT_FINITE, "logits are not NaN", False))


def _judge_speculation(report: ParityReport, name: str, same: float) -> None:
    least = report.options.min_speculative_match
    threshold = f"at least {least:.1%} as the target's"
    report.verdicts.append(Verdict(name, EvalRole.SPECULATIVE.value, f"{same:.1%}", threshold, same >= least))


def _measure_text(report: ParityReport, qs: QuantSpecModel, ids: Tensor) -> None:
    options = report.options
    length = options.context_tokens + options.scored_tokens
    warn_of_short_texts(
        qs, max(length, options.prompts and options.prompt_tokens + options.new_tokens), "the long text"
    )
    report.text.extend(compare_text(qs, ids[:length], options.context_tokens, [EvalRole.TARGET, EvalRole.DRAFT]))
    target = report.text[0]
    change, agreement = target.perplexity_change, target.argmax_agreement
    largest, least = options.max_perplexity_change, options.min_argmax_agreement
    near, agrees = abs(change) <= largest, agreement >= least
    report.verdicts.append(
        Verdict("text perplexity", target.role, figure(change, "+.3%"), f"within {largest:.1%}", near)
    )
    report.verdicts.append(
        Verdict("text argmax agreement", target.role, f"{agreement:.4f}", f"at least {least:g}", agrees)
    )
    if options.prompts:
        starts = torch.linspace(0, len(ids) - options.prompt_tokens, options.prompts).long().tolist()
        prompts = torch.stack([ids[start : start + options.prompt_tokens] for start in starts])
        _measure_generation(report, qs, prompts)


def _measure_generation(report: ParityReport, qs: QuantSpecModel, prompts: Tensor) -> None:
    tokens: dict[EvalRole, Tensor] = {}
    for role in EvalRole:
        try:
            tokens[role] = generate_greedily(qs, prompts, report.options.new_tokens, role)
        except FloatingPointError:
            _judge_not_finite(report, "continuations", role)
    pairs = [
        *((role, EvalRole.REFERENCE) for role in EvalRole if role is not EvalRole.REFERENCE),
        (EvalRole.SPECULATIVE, EvalRole.TARGET),
    ]
    report.generation.extend(
        compare_generation(qs, prompts, tokens, *pair) for pair in pairs if tokens.keys() >= set(pair)
    )
    if tokens.keys() >= set(pairs[-1]):
        _judge_speculation(report, "continuations", report.generation[-1].exact_match_rate)
