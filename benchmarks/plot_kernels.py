"""The picture of the attention kernels' speed-up, from the rows of ``kernels.json``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantspec.picture_sheet import INK, SERIES
from quantspec.picture_style import Label, caption, context_axis, label_lines, new_figure, styled, times_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS = {"draft_attention": "Draft, INT4 cache, 1 token", "verify_attention": "Verification, INT8 cache, 7 tokens"}


def speedups(rows: list[dict[str, Any]], op: str, batch: int) -> dict[tuple[int, int], dict[int, float]]:
    """Of one op, FlashAttention's median time over ours by heads (query, key/value) and context."""
    times: dict[tuple[int, int], dict[int, dict[str, float]]] = {}
    for row in rows:
        if row["op"] == op and row.get("batch") == batch:
            by_context = times.setdefault((row["heads"], row["kv_heads"]), {})
            by_context.setdefault(row["context"], {})[row["implementation"]] = row["median_us"]
    return {
        heads: {
            context: measured["flash_attention"] / measured["quantspec"]
            for context, measured in sorted(by_context.items())
            if measured.keys() >= {"flash_attention", "quantspec"}
        }
        for heads, by_context in times.items()
    }


@styled
def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over FlashAttention against context, a panel for each of both ops and a line for each head layout."""
    batches = sorted({row["batch"] for row in rows if row["op"] in _PANELS})
    title = "Attention over the hierarchical cache, times the speed of FlashAttention"
    figure = new_figure((11, 3.5 * len(batches) + 0.3), title)
    panels = figure.subplots(len(batches), len(_PANELS), sharey="row", squeeze=False)
    labels: dict[Axes, list[Label]] = {}
    for batch, row_axes in zip(batches, panels, strict=True):
        row_axes[0].set(ylabel="times FlashAttention's speed")
        for (op, name), axes in zip(_PANELS.items(), row_axes, strict=True):
            axes.set_title(f"{name}, batch {batch}")
            axes.axhline(1, color=INK, linewidth=1)
            times_axis(axes)
            ends = labels.setdefault(axes, [])
            measured = {heads: points for heads, points in speedups(rows, op, batch).items() if points}
            for ((heads, kv_heads), points), colour in zip(measured.items(), SERIES, strict=False):
                contexts, times = list(points), list(points.values())
                axes.plot(contexts, times, marker="o", markersize=4, color=colour)
                ends.append(Label(f"{heads}/{kv_heads} heads, {times[-1]:.1f}x", contexts[-1], times[-1], colour))
            context_axis(axes, sorted({context for points in measured.values() for context in points}))
        row_axes[0].set_ylim(0)
    label_lines(labels)
    source = rows[0]
    caption(
        figure,
        "one layer, heads of 128, query/KV heads; FlashAttention on a dense float16 cache",
        source.get("device"),
        source.get("date"),
    )
    figure.savefig(path)
