"""The picture of decoding speed against context, from the ``decode-MODEL.json`` of random-weight shapes."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from quantspec.engine.odds import cycle_tokens
from quantspec.picture_sheet import INK, SERIES
from quantspec.picture_style import Label, caption, context_axis, label_lines, new_figure, styled, times_axis

from .common import RESULTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {"llama-3.1-8b": "Llama-3.1-8B shape", "llama-2-7b": "Llama-2-7B shape"}
# Of the README's table and of the picture: one as of small models, which was not drawn, and three that were.
RATES = (0.80, 0.90, 0.93, 0.95)


def best_rows(context: dict[str, Any]) -> dict[float, dict[str, Any]]:
    """Of one context's synthetic rows, the fastest number of drafts at each acceptance rate."""
    best: dict[float, dict[str, Any]] = {}
    for row in context["synthetic"]:
        rate = row["synthetic_acceptance_rate"]
        if rate not in best or row["speedup"] > best[rate]["speedup"]:
            best[rate] = row
    return best


def speedup(context: dict[str, Any], rate: float) -> float:
    """Speed-up with the fastest number of drafts: as measured, or for a rate that was not drawn, as computed."""
    best = best_rows(context)
    return best[rate]["speedup"] if rate in best else computed_speedup(context, rate)


def computed_speedup(context: dict[str, Any], rate: float) -> float:
    """Speed-up at a rate that was not drawn: expected tokens over the mean time of measured cycles, best of drafts."""
    cycle_ms: dict[int, list[float]] = {}
    for row in context["synthetic"]:
        cycle_ms.setdefault(row["num_speculative_tokens"], []).append(row["cycle_ms"])
    return max(
        cycle_tokens(rate, drafts) * context["baseline_token_ms"] / mean(times) for drafts, times in cycle_ms.items()
    )


@styled
def plot(path: Path) -> None:
    """Speed-up over the strong baseline against context, one panel per model and one line per rate."""
    results = {name: json.loads((RESULTS / f"decode-{name}.json").read_text()) for name in NAMES}
    figure = new_figure((11, 4), "Decoding, times the speed of a compiled bfloat16 baseline, by context and acceptance")
    labels: dict[Axes, list[Label]] = {}
    told = []
    for axes, (name, result) in zip(figure.subplots(1, len(NAMES), sharey=True), results.items(), strict=True):
        contexts = [row["context"] for row in result["rows"]]
        ends = labels.setdefault(axes, [])
        for rate, colour in zip(RATES, SERIES, strict=False):
            times = [speedup(row, rate) for row in result["rows"]]
            axes.plot(contexts, times, marker="o", markersize=5, color=colour)
            ends.append(Label(f"a = {rate:.2f}, {times[-1]:.2f}x", contexts[-1], times[-1], colour))
        axes.axhline(1, color=INK, linewidth=1)
        axes.set(title=f"{NAMES[name]}, random weights", ylim=(0.9, 2.3))
        context_axis(axes, contexts)
        times_axis(axes)
        told.append(f"{NAMES[name]} at {contexts[-1]:,} tokens: {', '.join(label.text for label in ends)}.")
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("times the baseline's speed")
    label_lines(labels)
    figure.description = " ".join(told)
    environment = results["llama-3.1-8b"]["environment"]
    rates = "a: synthetic acceptance of a draft, 0.80 computed; batch 1, bfloat16"
    caption(figure, rates, environment["device"], environment["date"])
    figure.savefig(path)
