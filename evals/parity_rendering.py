"""A parity report as tables of Markdown or HTML and as a plot, from its JSON-ready form."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quantspec.html import html_table
from quantspec.picture_sheet import DRAFT, TARGET
from quantspec.picture_style import Label, caption, label_lines, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from quantspec.versions import install_command

# Tokens over which a curve of divergences is averaged before it is drawn.
_SMOOTHING = 32
NOT_FINITE = "not finite"


class Section(NamedTuple):
    """A table under its heading; ``level`` is the heading's, 2 or 3."""

    level: int
    title: str
    header: list[str]
    rows: list[list[str]]


def render_markdown(report: dict[str, Any]) -> str:
    """Tables of verdicts, tasks, acceptance, text and continuations."""
    parts = [f"# Parity of {report['model']}: {_title(report)}", _config(report) + "\n\n" + _environment(report)]
    for section in _sections(report):
        parts += [f"{'#' * section.level} {section.title}", markdown_table(section.header, section.rows)]
    return "\n\n".join(parts) + "\n"


def render_html(report: dict[str, Any]) -> str:
    """For notebooks: the verdicts, and everything else folded away below them."""
    verdicts, *others = _sections(report)
    title = f"Parity of {report['model']}: {_title(report)}"
    folded = "".join(html_table(section.title, section.rows, section.header) for section in others)
    facts = f"<p>{escape(_config(report))}</p><p>{escape(_environment(report))}</p>"
    details = f"<details><summary>all of it</summary>{facts}{folded}</details>"
    # Without Markdown's emphasis.
    rows = [[cell.strip("*") for cell in row] for row in verdicts.rows]
    return html_table(title, rows, verdicts.header) + details


def _config(report: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for part in ("config", "options") for name, value in report[part].items())


def _environment(report: dict[str, Any]) -> str:
    known = {name: value for name, value in report["environment"].items() if value is not None}
    return ", ".join(f"{name} {value}" for name, value in known.items())


def _sections(report: dict[str, Any]) -> list[Section]:
    verdicts = [[v["name"], v["role"], v["value"], v["threshold"], _verdict(v["passed"])] for v in report["verdicts"]]
    sections = [Section(2, "Verdicts", ["what", "role", "figure", "threshold", "verdict"], verdicts)]
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
        sections.append(Section(2, "Tasks", header, [_task_row(row) for row in report["tasks"]]))
    if report["acceptance"]:
        rows = [
            [task, f"{rates['draft_acceptance_rate']:.3f}", f"{rates['mean_acceptance_length']:.2f}"]
            for task, rates in report["acceptance"].items()
        ]
        header = ["task", "draft acceptance rate", "mean acceptance length"]
        sections.append(Section(2, "Acceptance", header, rows))
    if report["text"]:
        sections.append(_text_section(report["text"]))
        sections += [_distance_section(row) for row in report["text"]]
    if report["generation"]:
        sections.append(_generation_section(report["generation"]))
    return sections


def figure(value: float | None, form: str) -> str:
    """``value`` formatted by ``form``; NaN, infinities, and the None that JSON has for them, in words."""
    return NOT_FINITE if value is None or not math.isfinite(value) else format(value, form)


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per role."""
    section = _text_section(rows)
    return markdown_table(section.header, section.rows)


def _text_section(rows: Sequence[dict[str, Any]]) -> Section:
    header = ["role", "context + scored tokens", "argmax agreement", "perplexity (change)", "mean KL"]
    lines = [
        [
            row["role"],
            f"{row['context_tokens']} + {row['scored_tokens']}",
            figure(row["argmax_agreement"], ".4f"),
            f"{figure(row['perplexity'], '.4f')} ({figure(row['perplexity_change'], '+.2%')})",
            figure(row["mean_kl"], ".5f"),
        ]
        for row in rows
    ]
    return Section(2, "Text", header, lines)


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
    _draw(report, path)


@styled
def _draw(report: dict[str, Any], path: Path) -> None:
    picture = new_figure((11, 4), f"{report['model']}: divergence from the original model")
    by_position, by_distance = picture.subplots(1, 2, sharey=True)
    labels: dict[Axes, list[Label]] = {by_position: [], by_distance: []}
    for row, color in zip(report["text"], (TARGET, DRAFT), strict=False):
        curve = _smoothed(row["kl_per_position"])
        first = row["context_tokens"]
        classes = [entry for entry in row["kl_by_distance"] if entry["distance"] is not None]
        means = [math.nan if entry["mean_kl"] is None else entry["mean_kl"] for entry in classes]
        for axes, places, values, mark in (
            (by_position, range(first, first + len(curve) * _SMOOTHING, _SMOOTHING), curve, ""),
            (by_distance, [entry["distance"] for entry in classes], means, "o"),
        ):
            axes.plot(places, values, marker=mark, color=color)
            drawn = [(x, y) for x, y in zip(places, values, strict=True) if math.isfinite(y)]
            if drawn:
                labels[axes].append(
                    Label(f"{row['role']}, mean {figure(row['mean_kl'], '.2g')} nats", *drawn[-1], color)
                )
    by_position.set(title="By position", xlabel="position in the text, tokens", ylabel="KL divergence, nats")
    by_distance.set(title="By distance from the planes", xlabel="tokens in the recent buffer before it")
    by_position.xaxis.set_major_formatter("{x:,.0f}")
    by_position.set_yscale("log")
    label_lines(labels)
    environment = report["environment"]
    averaged = f"each point a mean of {_SMOOTHING} tokens on the left"
    facts = (environment.get("dtype"), environment["device"], environment.get("date"))
    caption(picture, f"{report['model']} against itself, {averaged}", *facts)
    picture.savefig(path)


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


def _distance_section(row: dict[str, Any]) -> Section:
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
    return Section(3, f"By distance from the planes, {row['role']}", header, lines)


def _generation_section(rows: Sequence[dict[str, Any]]) -> Section:
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
    return Section(2, "Greedy continuations", header, lines)
