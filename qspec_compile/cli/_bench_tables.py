"""The figures of ``quantspec bench`` as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table


@dataclass
class Sideways:
    """A table with a column for each measurement, which has many figures; as many beside each other as there is room.

    Attributes:
        title: above it.
        names: of the figures.
        columns: texts of each measurement.
    """

    title: str
    names: Sequence[str]
    columns: list[Sequence[str]] = field(default_factory=list)

    def add_row(self, *texts: str) -> None:
        """Add a measurement."""
        self.columns.append(texts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The title, and tables below each other."""
        yield self.title
        gap = 2
        width = max(len(text) for texts in self.columns for text in texts) + gap
        fitting = max(1, (options.max_width - max(map(len, self.names))) // width)
        for start in range(0, len(self.columns), fitting):
            table = Table.grid(padding=(0, 0, 0, gap), pad_edge=False)
            table.add_column()
            shown = self.columns[start : start + fitting]
            for _ in shown:
                table.add_column(justify="right")
            for number, name in enumerate(self.names):
                table.add_row(name, *(texts[number] for texts in shown), style="" if number else "bold")
            yield ""
            yield table


def decode_table(figures: dict[str, Any]) -> Sideways:
    """Decoding on a GPU: a column per context, number of drafts and acceptance rate."""
    first = figures["rows"][0]
    weights = f"{first['weights']} weights"
    if first["weights"] == "random":
        weights += "; acceptance is synthetic: drawn with the given probability"
    weights += _split(first, "GPUs")
    of_steps = ("context, tokens", "draft step, ms", "drafts", "verification, ms", "baseline token, ms", "acceptance")
    names = (*of_steps, "tokens/s", "against baseline", "against Hugging Face")
    table = Sideways(_title(f"{first['model']}, {weights}", figures["environment"]), names)
    for row in figures["rows"]:
        for cells in _decode_cells(row):
            table.add_row(f"{row['context']:,}", f"{row['draft_step_ms']:.2f}", *cells)
    return table


def _decode_cells(row: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Drafts, verification, baseline, acceptance, speed and both ratios; synthetic rates first, then ``generate``."""
    baseline = row["baseline_token_ms"]
    for result in row["synthetic"]:
        gamma = result["num_speculative_tokens"]
        yield (
            str(gamma),
            f"{row['verify_ms'][gamma + 1]:.2f}",
            f"{baseline:.2f}",
            f"{result['synthetic_acceptance_rate']:.2f} synthetic",
            f"{result['tokens_per_second']:.1f}",
            f"{result['speedup']:.2f}x",
            "-",
        )
    if "generate" in row:
        gamma = row["statistics"]["num_speculative_tokens"]
        rate = row["generate"]["tokens_per_second"]
        measured = "measured" if row["weights"] == "real" else "of random weights"
        yield (
            str(gamma),
            f"{row['verify_ms'][gamma + 1]:.2f}",
            f"{baseline:.2f}",
            f"{row['statistics']['draft_acceptance_rate']:.2f} {measured}",
            f"{rate:.1f}",
            f"{rate * baseline / 1000:.2f}x",
            f"{rate / row['hugging_face']['tokens_per_second']:.2f}x" if "hugging_face" in row else "-",
        )


def generate_table(figures: dict[str, Any]) -> Sideways:
    """``generate`` beside Hugging Face's: a column per dtype and context, with drafts and without."""
    first = figures["rows"][0]
    title = f"SmolLM2-135M, real weights, {first['new_tokens']} new tokens{_split(first, 'processes')}"
    names = ("prompt, tokens", "dtype", "quantspec", "ms per token", "Hugging Face, ms", "speed-up", "acceptance")
    table = Sideways(_title(title, figures["environment"]), (*names, "prefill, s", "Hugging Face's prefill, s"))
    for row in figures["rows"]:
        rate = row["draft_acceptance_rate"]
        table.add_row(
            f"{row['prompt_tokens']:,}",
            row["dtype"],
            row["mode"],
            f"{1000 / row['tokens_per_second']:.1f}",
            f"{1000 / row['hugging_face_tokens_per_second']:.1f}",
            f"{row['decode_speedup']:.2f}x",
            "-" if rate is None else f"{rate:.2f}",
            f"{row['prefill_seconds']:.1f}",
            f"{row['hugging_face_prefill_seconds']:.1f}",
        )
    return table


def kernels_table(rows: list[dict[str, Any]]) -> Table:
    """A row per op, shape and implementation, with the time that moving its bytes takes."""
    title = _title(f"kernels, {rows[0]['copy_gb_per_s']:.0f} GB/s copied", rows[0])
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("op", "shape", "implementation", "µs", "floor, µs"):
        # Shapes have words to break between.
        table.add_column(name, no_wrap=name != "shape", justify="right" if "µs" in name else "left")
    for row in rows:
        floor = f"{row['floor_us']:.1f}" if "floor_us" in row else "-"
        table.add_row(row["op"], _shape(row), row["implementation"], f"{row['median_us']:.1f}", floor)
    return table


def _shape(row: dict[str, Any]) -> str:
    if "in_features" in row:
        return f"{row['in_features']} to {row['out_features']}, {row['rows']} rows, groups of {row['group']}"
    return f"{row['heads']}/{row['kv_heads']} heads, {row['context']:,} tokens, batch {row['batch']}"


def _split(row: dict[str, Any], over: str) -> str:
    count = row["tensor_parallel"]
    return f"; split over {count} {over}" if count > 1 else ""


def _title(what: str, environment: dict[str, Any]) -> str:
    return f"{what}\n{environment['device']}, torch {environment['torch']}"
