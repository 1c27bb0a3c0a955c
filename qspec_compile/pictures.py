"""Pictures of acceptance, of a cycle's time and of the cache's memory, drawn with matplotlib.

Every ``plot_*`` function draws into the ``axes`` it is given, or into those of a new figure, and returns them. Without
matplotlib it raises ``ImportError``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .config import DEFAULT_SPECULATIVE_TOKENS, QuantSpecConfig
from .cycle_times import CycleTimes, device_name, time_cycle
from .engine.stats import GenerationStats
from .memory import AttentionShape, expected_memory, full_precision_bytes
from .picture_sheet import DRAFT, INK, LAST, RECENT, TARGET
from .picture_style import Label, caption, label_lines, new_figure, styled, tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .engine.session import Session

# The parts of the cache from the bottom up, with their names.
_PARTS = {
    "upper": (DRAFT, "upper plane"),
    "lower": (TARGET, "lower plane"),
    "scales": (INK, "scales, zeros"),
    "recent": (RECENT, "recent buffer"),
}
# Curves and averages have about this many points, however long the text.
_POINTS = 200
_MOST_CONTEXT = 131_072
_MINIMUM_WINDOW = 8


@styled
def plot(session: Session, path: str | os.PathLike[str] | None) -> Figure:
    """See :meth:`QuantSpecModel.plot`."""
    stats, cache, pair = session.last_stats, session.cache, session.pair
    if stats is None or cache is None:
        raise ValueError("nothing to draw yet: call generate() first")
    figure = new_figure((13, 7.6))
    if path is not None:
        _check_path(figure, Path(path))
    axes = figure.subplots(2, 2)
    plot_acceptance_by_position(stats, axes[0, 0])
    plot_acceptance_over_time(stats, axes[0, 1])
    plot_cycle(time_cycle(session), axes[1, 0])
    context = int(cache.length.max())
    plot_memory(
        pair.layers,
        axes[1, 1],
        max_context=max(context, min(pair.max_len, _MOST_CONTEXT)),
        batch_size=cache.batch_size,
        kv_group_size=pair.config.kv_group_size,
        num_speculative_tokens=cache.num_speculative_tokens,
        dtype=pair.model.dtype,
        context=context,
    )
    name = Path(pair.model.config.name_or_path).name or type(pair.model).__name__
    dtype = str(pair.model.dtype).removeprefix("torch.")
    figure.title = f"{name}: the latest text that was generated"
    caption(figure, name, dtype, device_name(pair.device), f"{date.today():%Y-%m-%d}")
    if path is not None:
        figure.savefig(path)
    return figure


@styled
def plot_acceptance_by_position(stats: GenerationStats, axes: Axes | None = None) -> Axes:
    """Acceptance rate at each place of the drafted block, as bars.

    Args:
        stats: of a ``generate`` call.
        axes: matplotlib axes to draw into; those of a new figure if None.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing.
    """
    axes = _prepared(axes, "Acceptance by position")
    rates = stats.acceptance_rate_per_position
    if not stats.drafted:
        return _nothing_drafted(axes)
    bars = axes.bar(range(1, len(rates) + 1), rates, width=0.7, color=DRAFT)
    axes.bar_label(bars, ["" if rate != rate else f"{rate:.0%}" for rate in rates], padding=2, color=INK)
    axes.set(xlabel="draft token", xticks=range(1, len(rates) + 1))
    _rate_axis(axes)
    _note(axes, f"{stats.mean_acceptance_length:.2f} tokens a cycle")
    return axes


@styled
def plot_acceptance_over_time(stats: GenerationStats, axes: Axes | None = None) -> Axes:
    """Acceptance rate from cycle to cycle: a running mean, with single cycles as dots while there are few of them.

    Args:
        stats: of a ``generate`` call.
        axes: matplotlib axes to draw into; those of a new figure if None.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing.
    """
    axes = _prepared(axes, "Acceptance over time")
    history = [
        (cycle, accepted, drafted)
        for cycle, (accepted, drafted) in enumerate(
            zip(stats.accepted_per_cycle, stats.drafted_per_cycle, strict=True), start=1
        )
        if drafted
    ]
    if not history:
        return _nothing_drafted(axes)
    cycles = [cycle for cycle, _, _ in history]
    if len(history) <= 2 * _POINTS:
        rates = [accepted / drafted for _, accepted, drafted in history]
        axes.plot(cycles, rates, ".", color=RECENT, alpha=0.7, markersize=7, clip_on=False)
    window = max(_MINIMUM_WINDOW, len(history) // 10)
    means = running_rate([(accepted, drafted) for _, accepted, drafted in history], window)
    step = max(1, len(history) // _POINTS)
    axes.plot(cycles[::step], means[::step], color=DRAFT)
    axes.set(xlabel="cycle", xlim=(0, cycles[-1] + 1))
    _rate_axis(axes)
    axes.text(0.01, 0.98, f"line: mean of {window} cycles", transform=axes.transAxes, va="top", color=DRAFT)
    if len(axes.lines) > 1:
        axes.text(0.99, 0.98, "dot: one cycle", transform=axes.transAxes, va="top", ha="right", color=RECENT)
    _note(axes, f"{stats.draft_acceptance_rate:.0%} of {stats.drafted:,} drafted tokens")
    return axes


def running_rate(counts: Sequence[tuple[int, int]], window: int) -> list[float]:
    """Accepted over drafted tokens of up to ``window`` cycles around each ``(accepted, drafted)`` pair."""
    rates = []
    for index in range(len(counts)):
        around = counts[max(0, index - window // 2) : index + (window + 1) // 2]
        rates.append(sum(accepted for accepted, _ in around) / sum(drafted for _, drafted in around))
    return rates


@styled
def plot_cycle(times: CycleTimes, axes: Axes | None = None) -> Axes:
    """Where one cycle's time goes, as one bar in milliseconds: each draft step, the verification, the rest.

    Args:
        times: of :func:`quantspec.cycle_times.cycle_times`.
        axes: matplotlib axes to draw into; those of a new figure if None.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing.
    """
    axes = _prepared(axes, "One cycle")
    axes.spines["left"].set_visible(False)
    axes.set(xlabel="milliseconds", ylim=(-0.8, 0.8), yticks=[])
    start = 0.0
    for step in range(times.num_drafts):
        length = times.draft / times.num_drafts * 1000
        # Every other step is paler, which tells them apart on any page.
        axes.barh(0, length, left=start, height=0.6, color=DRAFT, alpha=1 if step % 2 == 0 else 0.7)
        start += length
    if times.num_drafts:
        _label(axes, 0, start, f"{times.num_drafts} draft steps\n{start:.3g} ms")
    for seconds, color, name in ((times.verify, TARGET, "verify"), (times.rest, INK, "rest")):
        length = seconds * 1000
        axes.barh(0, length, left=start, height=0.6, color=color)
        _label(axes, start, start + length, f"{name}\n{length:.3g} ms", below=name == "rest")
        start += length
    axes.set_xlim(0, start)
    _note(axes, f"{start:.3g} ms after {times.context:,} tokens")
    return axes


@styled
def plot_memory(
    layers: Sequence[AttentionShape],
    axes: Axes | None = None,
    *,
    max_context: int = _MOST_CONTEXT,
    batch_size: int = 1,
    kv_group_size: int = QuantSpecConfig.kv_group_size,
    num_speculative_tokens: int = DEFAULT_SPECULATIVE_TOKENS,
    dtype: torch.dtype = torch.bfloat16,
    context: int | None = None,
) -> Axes:
    """Bytes of the cache against context: ours by part, beside one in ``dtype`` and a plain INT8 one without a draft.

    Args:
        layers: attention layers, such as ``qs.layers``; no weights are needed.
        axes: matplotlib axes to draw into; those of a new figure if None.
        max_context: tokens per sequence at the right end; 131,072 by default.
        batch_size: sequences.
        kv_group_size: tokens quantized together (G).
        num_speculative_tokens: most tokens drafted per cycle.
        dtype: the model's, of the recent buffer and of the cache it is compared with.
        context: tokens per sequence to mark; none if None.

    Returns:
        The axes.

    Raises:
        ValueError: ``max_context`` is below 1.
        ImportError: matplotlib is missing.
    """
    axes = _prepared(axes, "Cache memory")
    if max_context < 1:
        raise ValueError(f"max_context must be at least 1, not {max_context}")
    step = max(1, max_context // _POINTS)
    contexts = [*range(step, max_context, step), max_context]
    plans = [
        expected_memory(
            layers,
            tokens,
            batch_size,
            kv_group_size=kv_group_size,
            num_speculative_tokens=num_speculative_tokens,
            dtype=dtype,
            max_cache_len=max_context,
        )
        for tokens in contexts
    ]
    full = [full_precision_bytes(layers, tokens, batch_size, dtype) for tokens in contexts]
    int8 = [plan["upper"] + plan["lower"] + plan["scales"] for plan in plans]
    unit, divisor = ("GiB", 2**30) if full[-1] >= 2**30 else ("MiB", 2**20)
    sizes = {part: [plan[part] / divisor for plan in plans] for part in _PARTS}
    axes.stackplot(contexts, *sizes.values(), colors=[color for color, _ in _PARTS.values()], linewidth=0)
    name = str(dtype).removeprefix("torch.")
    axes.plot(contexts, [size / divisor for size in full], color=INK)
    axes.plot(contexts, [size / divisor for size in int8], color=LAST, linestyle=(0, (4, 3)))
    axes.set(xlabel="tokens per sequence", ylabel=unit, xlim=(0, max_context), ylim=(0, None))
    # Eight parts at most, each a power of two of tokens.
    spacing = 1 << max(0, (max_context - 1).bit_length() - 3)
    axes.set_xticks(range(0, max_context + 1, spacing))
    axes.xaxis.set_major_formatter(lambda count, _: tokens(count))
    if context is not None:
        height = full_precision_bytes(layers, context, batch_size, dtype) / divisor
        axes.plot([context, context], [0, height], color=INK, linewidth=1, linestyle=":")
        axes.annotate("now", (context, height), xytext=(-2, 4), textcoords="offset points", ha="right", color=INK)
    total = sum(plans[-1].values()) / divisor
    size = f"{total:.3g} {unit} instead of {full[-1] / divisor:.3g} {unit}"
    _note(axes, f"{size} at {tokens(max_context)} tokens")
    labels, below = [], 0.0
    for part, (color, label) in _PARTS.items():
        labels.append(Label(label, max_context, below + sizes[part][-1] / 2, color))
        below += sizes[part][-1]
    labels += [
        Label("INT8, no draft", max_context, int8[-1] / divisor, LAST),
        Label(f"{name} cache", max_context, full[-1] / divisor, INK),
    ]
    label_lines({axes: labels})
    return axes


def _check_path(figure: Figure, path: Path) -> None:
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ValueError(f"cannot draw '{path}': its name must end in one of {', '.join(sorted(formats))}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"cannot draw '{path}': there is no folder '{path.parent}'")


def _prepared(axes: Axes | None, title: str) -> Axes:
    """``axes`` or new ones, with a title and without a frame."""
    if axes is None:
        axes = new_figure((7, 4)).subplots()
    axes.set_title(title, loc="left")
    return axes


def _note(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="right", fontweight="normal")


def _rate_axis(axes: Axes) -> None:
    """The y axis as a share of what was drafted, with room above for labels."""
    axes.set(ylabel="accepted", ylim=(0, 1.18))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])


def _nothing_drafted(axes: Axes) -> Axes:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, "nothing was drafted", transform=axes.transAxes, ha="center", color=INK)
    return axes


def _label(axes: Axes, start: float, end: float, text: str, below: bool = False) -> None:
    """``text`` over the middle of a part of the bar, or below its end."""
    axes.annotate(
        text,
        (end, -0.32) if below else ((start + end) / 2, 0.32),
        xytext=(0, -6 if below else 6),
        textcoords="offset points",
        ha="right" if below else "center",
        va="top" if below else "bottom",
        color=INK,
    )
