"""Draw the pictures of the documentation into ``figures/`` next to this file: ``python docs/figures.py``.

They are drawings, and curves of formulas and of sizes that the library itself allocates; nothing here is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from quantspec.capture import CapturedLayer
from quantspec.engine.odds import cycle_tokens
from quantspec.memory import expected_memory, full_precision_bytes
from quantspec.picture_figure import Picture
from quantspec.picture_sheet import DRAFT, INK, OTHER, PALE, RECENT, TARGET
from quantspec.picture_style import Label, caption, label_lines, new_figure, styled, times_axis, tokens

HERE = Path(__file__).resolve().parent


def canvas(width: float, height: float, x: float, y: float) -> tuple[Picture, Axes]:
    """An empty drawing of ``x`` by ``y`` units."""
    figure = new_figure((width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, x), ylim=(0, y))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "", **font) -> None:
    """A filled rectangle with its text in the middle."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=(colour, PALE), edgecolor=colour, linewidth=1.2))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", linespacing=1.5, **font)


def card(axes: Axes, x: float, y: float, width: float, height: float, colour: str, title: str, text: str = "") -> None:
    """A rounded box with a bold title and smaller lines below it."""
    shape = "round,pad=0,rounding_size=1.2"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=(colour, PALE), edgecolor=colour, linewidth=1.2)
    )
    middle = x + width / 2
    if text:
        axes.text(middle, y + height - 1.4, title, ha="center", va="top", weight="bold")
        axes.text(middle, y + height - 4.6, text, ha="center", va="top", fontsize=9.5, linespacing=1.55)
    else:
        axes.text(middle, y + height / 2, title, ha="center", va="center", weight="bold", linespacing=1.4)


def note(axes: Axes, x: float, y: float, text: str, colour: str = INK, **font) -> None:
    """Small text, centred on ``x`` unless ``font`` says otherwise."""
    axes.text(x, y, text, color=colour, **{"ha": "center", "fontsize": 10, **font})


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    """A straight arrow, the way that data goes."""
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def span(axes: Axes, start: float, end: float, y: float, text: str, colour: str = INK, below: bool = True) -> None:
    """A measuring line from ``start`` to ``end`` with its text."""
    axes.plot([start, end], [y, y], color=colour, linewidth=1.3)
    for x in (start, end):
        axes.plot([x, x], [y - 0.7, y + 0.7], color=colour, linewidth=1.3)
    note(axes, (start + end) / 2, y - 1.1 if below else y + 1.1, text, colour, va="top" if below else "bottom")


def flow() -> Picture:
    """From a Hugging Face model to three graphs over one set of weights and one cache."""
    figure, axes = canvas(10, 5.4, 100, 54)
    card(axes, 3, 40, 18, 10, INK, "Hugging Face\nmodel")
    card(axes, 33, 40, 34, 10, INK, "one fx graph", "ATen ops, one attention\nmarker per layer")
    arrow(axes, (21, 45), (32.8, 45))
    note(axes, 27, 46.2, "capture")
    columns = {
        "prefill": (3, RECENT, "reads a prompt in chunks,\nfills the cache"),
        "target": (36, TARGET, "the model's own weights,\ncache read at 8 bits"),
        "draft": (69, DRAFT, "INT4 weights,\ncache read at 4 bits"),
    }
    for name, (x, colour, text) in columns.items():
        card(axes, x, 23, 28, 10.5, colour, name, text)
        arrow(axes, (50, 40), (x + 14, 33.7))
    note(axes, 79, 38, "passes, role by role")
    card(axes, 3, 5, 94, 8.5, INK, "one hierarchical KV cache")
    arrow(axes, (17, 22.8), (17, 13.7), RECENT)
    note(axes, 18.2, 18.2, "the prompt's\nkeys and values", RECENT, ha="left", va="center", linespacing=1.4)
    for x, colour, planes in ((45, TARGET, "both planes"), (78, DRAFT, "upper plane")):
        arrow(axes, (x, 13.7), (x, 22.8), colour)
        note(axes, x - 1.2, 18.2, planes, colour, ha="right", va="center")
        arrow(axes, (x + 6, 22.8), (x + 6, 13.7), colour)
        note(axes, x + 7.2, 18.2, "new tokens", colour, ha="left", va="center")
    note(axes, 50, 2.2, "generate(): one prefill, then cycles of draft and target")
    return figure


def cache() -> Picture:
    """One sequence's part of one layer: planes, recent buffer, lengths and who reads what."""
    figure, axes = canvas(10, 5.2, 100, 52)
    left, group, top, height = 13.0, 14.0, 32.0, 6.0
    end = left + 3 * group
    recent, drafts = 22.0, 10.0
    for index in range(3):
        x = left + index * group
        box(axes, x, top, group, height, DRAFT, "G tokens")
        box(axes, x, top - height, group, height, TARGET, "G tokens")
    box(axes, end, top - height, recent, 2 * height, RECENT, "recent buffer\nfull precision\nG .. 2G−1 tokens")
    box(axes, end + recent, top - height, drafts, 2 * height, INK, "γ + 1\ntokens of\nthis cycle", fontsize=9.5)
    for y, text, colour in ((top, "upper\n4 bits", DRAFT), (top - height, "lower\n4 bits", TARGET)):
        note(axes, left - 1.2, y + height / 2, text, colour, ha="right", va="center", weight="bold")
    total = end + recent + drafts
    reads = "the target reads both planes and the recent buffer"
    span(axes, left, total, top + height + 9.4, reads, INK, below=False)
    reads = "the draft reads the upper plane and the recent buffer"
    span(axes, left, total, top + height + 2.2, reads, DRAFT, below=False)
    span(axes, left, end, top - height - 2.2, "quantized_len, a multiple of G")
    span(axes, left, end + recent, top - height - 7.6, "length: verified tokens")
    note(axes, total + 1.5, top, "slots of\nrejected drafts\nare written\nover", ha="left", va="center", fontsize=9.5)
    # One byte of a plane, enlarged.
    y = 5.0
    box(axes, 18, y, 15, 5, DRAFT, "token r + G/2", fontsize=9.5)
    box(axes, 33, y, 15, 5, DRAFT, "token r", fontsize=9.5)
    note(axes, 16.8, y + 2.5, "byte r of a group", ha="right", va="center")
    note(axes, 25.5, y - 0.9, "high nibble", va="top", fontsize=9)
    note(axes, 40.5, y - 0.9, "low nibble", va="top", fontsize=9)
    unpacked = "0 ≤ r < G/2. Unpacking a plane gives two runs of G/2 tokens."
    note(axes, 51, y + 2.5, unpacked, ha="left", va="center", fontsize=9.5)
    return figure


def code() -> Picture:
    """One number's two codes on a line between the smallest and the largest of its group."""
    figure, axes = canvas(10, 3.0, 100, 30)
    left, right, base = 8.0, 92.0, 20.5
    step = (right - left) / 15
    axes.plot([left, right], [base, base], color=INK, linewidth=1.3)
    for u in range(16):
        x = left + u * step
        axes.plot([x, x], [base - 1.2, base + 1.2], color=DRAFT, linewidth=2)
        note(axes, x, base + 2, str(u), DRAFT, fontsize=9.5)
    note(axes, left, base + 5.6, "u, the upper code (4 bits)", DRAFT, ha="left", weight="bold")
    note(axes, left, base - 2, "z = min", va="top")
    note(axes, right, base - 2, "max", va="top")
    span(axes, left + step, left + 2 * step, base - 3.2, "s = (max − min) / 15")
    # The neighbourhood of one upper code, enlarged.
    u, low, high, y = 6, 26.0, 74.0, 5.5
    x4 = left + u * step
    fine = (high - low) / 16
    for edge, end in ((x4 - step / 2, low), (x4 + step / 2, high)):
        axes.plot([edge, end], [base - 1, y + 1.6], color=INK, linewidth=1)
    axes.plot([low, high], [y, y], color=INK, linewidth=1.3)
    for tick in range(17):
        x = low + tick * fine
        axes.plot([x, x], [y - 0.8, y + 0.8], color=TARGET, linewidth=1.6)
        if tick < 16:
            note(axes, x, y - 1.4, str(tick - 8), TARGET, va="top", fontsize=9)
    note(axes, low - 2, y - 2.2, "l, the lower code (4 bits)", TARGET, ha="right", va="center", weight="bold")
    centre, read, value = (low + high) / 2, low + 11 * fine, low + 11.3 * fine
    axes.plot([centre], [y], marker="o", markersize=7, color=DRAFT)
    note(axes, centre, y + 1.7, "draft reads\nz + s·u", DRAFT, fontsize=9.5, linespacing=1.3)
    axes.plot([read], [y], marker="o", markersize=7, color=TARGET, markeredgecolor=INK, markeredgewidth=0.8)
    axes.plot([value], [y], marker="|", markersize=20, color=INK, markeredgewidth=1.6)
    note(axes, value + 0.8, y + 2.5, "x", INK, ha="left", fontsize=11, style="italic")
    note(
        axes, high + 2, y, "target reads\nz + s·(u + l/16)", INK, ha="left", va="center", fontsize=9.5, linespacing=1.5
    )
    return figure


def cycle() -> Picture:
    """Four draft steps, one verification, and what becomes of the tokens."""
    figure, axes = canvas(10, 5.0, 100, 50)
    top, height, draft = 34.0, 8.5, 11.5
    note(axes, 2, 47, "time", ha="left", va="center")
    arrow(axes, (7, 47), (98, 47))
    for step in range(4):
        card(axes, 2 + step * (draft + 1), top, draft, height, DRAFT, f"draft {step + 1}", "1 token")
    card(axes, 53, top, 20, height, TARGET, "verify", "5 tokens at once")
    card(axes, 75, top, 10.5, height, INK, "accept")
    card(axes, 87, top, 11, height, INK, "flush", "when due")
    note(axes, 26.5, top - 1.5, "INT4 weights, upper plane", DRAFT, va="top")
    note(axes, 63, top - 1.5, "own weights, both planes", TARGET, va="top")
    cell, first = 10.0, 24.0
    rows = {
        "the target reads": (20.0, ["newest", "d1", "d2", "d3", "d4"], [INK] + [DRAFT] * 4),
        "each draft against\nthe target": (
            12.3,
            ["", "accept", "accept", "accept", "reject"],
            [INK] + [TARGET] * 3 + [OTHER],
        ),
        "emitted": (4.6, ["", "d1", "d2", "d3", "t"], [INK] + [DRAFT] * 3 + [TARGET]),
    }
    for name, (y, texts, colours) in rows.items():
        note(axes, first - 2, y + 2.7, name, ha="right", va="center")
        for index, (text, colour) in enumerate(zip(texts, colours, strict=True)):
            if text:
                box(axes, first + index * cell, y, cell, 5.4, colour, text, fontsize=10)
    own = "t: the target's own choice,\nnewest token of the next cycle"
    note(axes, first + 5 * cell + 2, 7.3, own, ha="left", va="center", fontsize=9.5)
    return figure


def memory() -> Picture:
    """Bytes of the cache against context."""
    # Llama-3.1-8B: 32 layers of 8 key/value heads of 128 channels.
    layers = (CapturedLayer("", 32, 8, 128, 128, 0, 0.0, False),) * 32
    contexts = [2**n for n in range(10, 18)]
    gib = {"bfloat16": [], "INT8 and INT4, one copy each": [], "hierarchical": [], "what a draft step reads": []}
    for context in contexts:
        parts = expected_memory(layers, context)
        total = sum(parts.values())
        draft = total - parts["lower"]
        dense = full_precision_bytes(layers, context)
        for name, size in zip(gib, (dense, total + draft - parts["recent"], total, draft), strict=True):
            gib[name].append(size / 2**30)
    figure = new_figure((9, 4.6))
    axes = figure.subplots()
    looks = ((INK, "-"), (OTHER, "-"), (TARGET, "-"), (DRAFT, "--"))
    labels = []
    for (name, sizes), (colour, dash) in zip(gib.items(), looks, strict=True):
        axes.plot(contexts, sizes, dash, color=colour)
        labels.append(Label(f"{name}, {sizes[-1]:.1f} GiB", contexts[-1], sizes[-1], colour))
    axes.set(xlim=(0, contexts[-1]), xlabel="tokens in the cache", ylabel="GiB")
    axes.set_ylim(0)
    axes.set_xticks(ticks := range(0, contexts[-1] + 1, 2**15), [tokens(tick) for tick in ticks])
    axes.set_title("KV cache of one sequence, shape of Llama-3.1-8B")
    caption(figure, "computed from the shape, nothing is measured")
    label_lines({axes: labels})
    return figure


def draft_tokens() -> Picture:
    """What a cycle yields and how fast decoding is against the target alone, by formula."""
    figure = new_figure((11, 4.2))
    yields, speeds = figure.subplots(1, 2)
    counts = list(range(16))
    labels: dict[Axes, list[Label]] = {yields: [], speeds: []}
    for rate, colour in {0.6: OTHER, 0.8: TARGET, 0.9: DRAFT, 0.95: RECENT}.items():
        lengths = [cycle_tokens(rate, count) for count in counts]
        yields.plot(counts, lengths, color=colour, marker="o", markersize=3.5)
        labels[yields].append(Label(f"a = {rate}, {lengths[-1]:.1f} tokens", counts[-1], lengths[-1], colour))
        for cost, dash in ((0.35, "-"), (0.7, ":")):
            speed = [length / (1 + count * cost) for count, length in zip(counts, lengths, strict=True)]
            speeds.plot(counts, speed, dash, color=colour)
            labels[speeds].append(Label(f"a = {rate}, step {cost}", counts[-1], speed[-1], colour))
    speeds.axhline(1, color=INK, linewidth=1)
    speeds.set_ylim(0, 2.2)
    times_axis(speeds)
    yields.set(ylim=0, ylabel="tokens")
    for axes, title in ((yields, "Tokens per cycle"), (speeds, "Speed against the target alone")):
        axes.set(title=title, xlabel="γ, tokens drafted per cycle", xticks=range(0, 16, 3))
    caption(figure, "by formula; a: acceptance rate; step: a draft step's time, of the target's 1")
    label_lines(labels)
    return figure


FIGURES: dict[str, Callable[[], Picture]] = {
    "flow": flow,
    "cache": cache,
    "code": code,
    "cycle": cycle,
    "memory": memory,
    "draft-tokens": draft_tokens,
}


@styled
def draw(folder: Path, suffix: str = ".svg") -> list[Path]:
    """Draw everything into ``folder``; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in FIGURES.items():
        picture = figure()
        picture.title = figure.__doc__.splitlines()[0].rstrip(".")
        picture.savefig(path := folder / f"{name}{suffix}")
        paths.append(path)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=HERE / "figures")
    parser.add_argument("--suffix", default=".svg", help=".svg or .png")
    arguments = parser.parse_args()
    for drawn in draw(arguments.folder, arguments.suffix):
        print(drawn)
