"""The figures of ``quantspec bench`` as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table


def decode_table(figures: dict[str, Any]) -> Table:
    """Decoding on a GPU: a row per context, number of drafts and acceptance rate."""
    first = figures["rows"][0]
    weights = f"{first['weights']} weights"
    if first["weights"] == "random":
        weights += "; acceptance is synthetic: drawn with the given probability"
    table = _table(
        f"{first['model']}, {weights}",
        figures["environment"],
        *("context", "draft step, ms", "drafts", "verification, ms", "baseline token, ms", "acceptance"),
        *("tokens/s", "against baseline", "against Hugging Face"),
    )
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
            f"{rate / row['hugging_face']['tokens_per_second']:.2f}x",
        )


def generate_table(figures: dict[str, Any]) -> Table:
    """``generate`` beside Hugging Face's: a row per dtype and context, with drafts and without."""
    first = figures["rows"][0]
    title = f"SmolLM2-135M, real weights, {first['new_tokens']} new tokens"
    columns = ("prompt tokens", "dtype", "quantspec", "ms per token", "Hugging Face, ms", "speed-up", "acceptance")
    table = _table(title, figures["environment"], *columns, "prefill, s", "Hugging Face, s")
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
    title = f"kernels, {rows[0]['copy_gb_per_s']:.0f} GB/s copied"
    table = _table(title, rows[0], "op", "shape", "implementation", "µs", "floor, µs")
    for row in rows:
        floor = f"{row['floor_us']:.1f}" if "floor_us" in row else "-"
        table.add_row(row["op"], _shape(row), row["implementation"], f"{row['median_us']:.1f}", floor)
    return table


def _shape(row: dict[str, Any]) -> str:
    if "in_features" in row:
        return f"{row['in_features']} to {row['out_features']}, {row['rows']} rows, groups of {row['group']}"
    return f"{row['heads']}/{row['kv_heads']} heads, {row['context']:,} tokens, batch {row['batch']}"


def _table(title: str, environment: dict[str, Any], *columns: str) -> Table:
    table = Table(title=f"{title}\n{environment['device']}, torch {environment['torch']}", title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
