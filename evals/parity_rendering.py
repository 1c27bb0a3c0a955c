"""A parity report as Markdown tables and as a plot, from its JSON-ready form."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantspec.versions import install_command

# Tokens over which a curve of divergences is averaged before it is drawn.
_SMOOTHING = 32
NOT_FINITE = "not finite"


def render_markdown(report: dict[str, Any]) -> str:
    """Tables of verdicts, tasks, text, continuations and acceptance."""
    known = {name: value for name, value in report["environment"].items() if value is not None}
    environment = ", ".join(f"{name} {value}" for name, value in known.items())
    config = ", ".join(f"{name}={value}" for part in ("config", "options") for name, value in report[part].items())
    parts = [
        f"# Parity of {report['model']}: {_title(report)}",
        f"{config}\n\n{environment}",
        "## Verdicts",
        markdown_table(
            ["what", "role", "figure", "threshold", "verdict"],
            [[v["name"], v["role"], v["value"], v["threshold"], _verdict(v["passed"])] for v in report["verdicts"]],
        ),
    ]
    if report["tasks"]:
        header = [
            "task",
            "metric",
            "role",
            "value",
            "reference",
            "difference",
            "standard error",
            "paired difference ± standard error",
            "equal",
        ]
        parts += ["## Tasks", markdown_table(header, [_task_row(row) for row in report["tasks"]])]
    if report["acceptance"]:
        rows = [
            [task, f"{rates['draft_acceptance_rate']:.3f}", f"{rates['mean_acceptance_length']:.2f}"]
            for task, rates in report["acceptance"].items()
        ]
        parts += ["## Acceptance", markdown_table(["task", "draft acceptance rate", "mean acceptance length"], rows)]
    if report["text"]:
        parts += ["## Text", text_table(report["text"]), *(_distance_part(row) for row in report["text"])]
    if report["generation"]:
        parts += ["## Greedy continuations", _generation_table(report["generation"])]
    return "\n\n".join(parts) + "\n"


def figure(value: float | None, form: str) -> str:
    """``value`` formatted by ``form``; NaN, infinities, and the None that JSON has for them, in words."""
    return NOT_FINITE if value is None or not math.isfinite(value) else format(value, form)


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per role."""
    header = ["role", "context + scored tokens", "argmax agreement", "perplexity (change)", "mean KL"]
    return markdown_table(
        header,
        [
            [
                row["role"],
                f"{row['context_tokens']} + {row['scored_tokens']}",
                figure(row["argmax_agreement"], ".4f"),
                f"{figure(row['perplexity'], '.4f')} ({figure(row['perplexity_change'], '+.2%')})",
                figure(row["mean_kl"], ".5f"),
            ]
            for row in rows
        ],
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render_plot(report: dict[str, Any], path: Path) -> None:
    """Divergence per position and by distance from the planes; skipped with a warning where matplotlib is missing."""
    if not report["text"]:
        return
    if importlib.util.find_spec("matplotlib") is None:
        logging.getLogger(__name__).warning("no plot: matplotlib is not installed (%s)", install_command("eval"))
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    by_position, by_distance = figure.subplots(1, 2)
    for row in report["text"]:
        curve = _smoothed(row["kl_per_position"])
        first = row["context_tokens"]
        by_position.plot(range(first, first + len(curve) * _SMOOTHING, _SMOOTHING), curve, label=row["role"])
        classes = [entry for entry in row["kl_by_distance"] if entry["distance"] is not None]
        means = [math.nan if entry["mean_kl"] is None else entry["mean_kl"] for entry in classes]
        by_distance.plot([entry["distance"] for entry in classes], means, "o-", label=row["role"])
    by_position.set(xlabel="position in the text", ylabel=f"KL(reference || role), means of {_SMOOTHING} tokens")
    by_distance.set(xlabel="tokens in the recent buffer before it", ylabel="mean KL(reference || role)")
    for axes in (by_position, by_distance):
        axes.set_yscale("log")
        axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(f"{report['model']}: divergence from the original model")
    figure.savefig(path, dpi=120)


def _smoothed(values: Sequence[float | None]) -> list[float]:
    """Means of consecutive values; NaN, which matplotlib leaves out, of those that are not all finite."""
    numbers = [math.nan if value is None else value for value in values]
    starts = range(0, len(values), _SMOOTHING)
    return [sum(part) / len(part) for part in (numbers[start : start + _SMOOTHING] for start in starts)]


def _title(report: dict[str, Any]) -> str:
    # Reports of earlier versions have no such entry.
    if not report.get("complete", True):
        return "incomplete"
    return {True: "passed", False: "FAILED", None: "not judged"}[report["passed"]]


def _verdict(passed: bool) -> str:
    return "passed" if passed else "**FAILED**"


def _task_row(row: dict[str, Any]) -> list[str]:
    numbers = row["documents"] is not None
    # Of metrics without samples only perplexities are judged, by their relative change.
    relative = not numbers and row["equal"] is not None
    paired = f"{figure(row['paired_difference'], '+.4f')} ± {figure(row['paired_standard_error'], '.4f')}"
    return [
        row["task"],
        row["metric"],
        row["role"],
        figure(row["value"], ".4f"),
        figure(row["reference"], ".4f"),
        figure(row["difference"], "+.3%" if relative else "+.4f"),
        figure(row["standard_error"], ".4f") if numbers else "",
        paired if numbers else "",
        {True: "yes", False: "no", None: "not judged"}[row["equal"]],
    ]


def _distance_part(row: dict[str, Any]) -> str:
    lines = [
        [
            "planes empty" if entry["distance"] is None else str(entry["distance"]),
            str(entry["tokens"]),
            figure(entry["mean_kl"], ".5f"),
            figure(entry["argmax_agreement"], ".4f"),
        ]
        for entry in row["kl_by_distance"]
    ]
    header = ["tokens in the recent buffer before it, from", "scored tokens", "mean KL", "argmax agreement"]
    return f"### By distance from the planes, {row['role']}\n\n" + markdown_table(header, lines)


def _generation_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            row["role"],
            row["against"],
            f"{row['prompts']} x {row['new_tokens']}",
            f"{row['exact_match_rate']:.3f}",
            ", ".join(f"{d['index']} ({figure(d['margin'], '.3f')})" for d in row["divergences"]) or "none",
        ]
        for row in rows
    ]
    header = ["role", "against", "prompts x tokens", "exact match rate", "first divergences: token (logit margin)"]
    return markdown_table(header, lines)
