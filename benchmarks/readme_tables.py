"""Write the README's tables from the JSON under ``benchmarks/results``: ``python -m benchmarks.readme_tables``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

from .common import RESULTS

README = Path(__file__).parent.parent / "README.md"


def _load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _source(data: dict[str, Any], name: str) -> str:
    env = data["environment"]
    return f"\n\n{env['device']}, {env['threads']} threads, torch {env['torch']}, `benchmarks/results/{name}`"


def _draft(row: dict[str, Any]) -> str:
    return row["weight_quantizer"] + (", INT4 lm_head" if row["lm_head"] == "INT4" else "")


def acceptance(name: str) -> str:
    """Acceptance rate per prompt length, and the mean over lengths by position and of the tokens a cycle yields."""
    data = _load(name)
    cases: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in data["rows"]:
        if "mode" in row:
            cases.setdefault((row["mode"], _draft(row)), {})[row["prompt_tokens"]] = row
    lengths = sorted(next(iter(cases.values())))
    rows = []
    for (mode, draft), by_length in sorted(cases.items()):
        measured = [by_length[length] for length in lengths]
        positions = zip(*(row["acceptance_rate_per_position"] for row in measured), strict=True)
        rows.append(
            [
                mode,
                draft,
                *(f"{row['draft_acceptance_rate']:.3f}" for row in measured),
                " ".join(f"{mean(rates):.2f}" for rates in positions),
                f"{mean(row['mean_acceptance_length'] for row in measured):.2f}",
            ]
        )
    header = ["mode", "INT4 weights", *(f"{length:,} tokens" for length in lengths), "by position", "tokens per cycle"]
    return _table(header, rows) + _source(data, name)


def parity(name: str) -> str:
    """Agreement of target and draft with the original model."""
    data = _load(name)
    rows = [
        [
            row["role"] + ("" if row["role"] == "target" else f", {_draft(row)}"),
            f"{row['argmax_agreement']:.4f}",
            f"{row['perplexity']:.4f} ({100 * (row['perplexity'] / row['perplexity_reference'] - 1):+.2f}%)",
            f"{row['mean_kl']:.5f}",
        ]
        for row in data["rows"]
        if "role" in row
    ]
    return _table(["role", "argmax agreement", "perplexity (change)", "mean KL"], rows) + _source(data, name)


def speed(name: str) -> str:
    """Tokens per second and prefill against Hugging Face."""
    data = _load(name)
    rows = [
        [
            str(row["prompt_tokens"]),
            row["dtype"],
            row["mode"],
            f"{row['tokens_per_second']:.1f} / {row['hugging_face_tokens_per_second']:.1f}",
            f"{row['decode_speedup']:.2f}x",
            f"{row['prefill_seconds']:.1f} s / {row['hugging_face_prefill_seconds']:.1f} s",
        ]
        for row in data["rows"]
    ]
    header = ["prompt tokens", "dtype", "quantspec", "tokens/s, ours / Hugging Face", "decode", "prefill, both"]
    return _table(header, rows) + _source(data, name)


def task_parity(name: str) -> str:
    """Every figure that was held against a threshold, for the target and for both together."""
    data = _load(name)
    verdicts: dict[str, dict[str, dict[str, Any]]] = {}
    for verdict in data["verdicts"]:
        verdicts.setdefault(verdict["name"], {})[verdict["role"]] = verdict
    rows = []
    for what, by_role in verdicts.items():
        thresholds = {verdict["threshold"] for verdict in by_role.values()}
        cells = [by_role[role]["value"] if role in by_role else "" for role in ("target", "speculative")]
        passed = all(verdict["passed"] for verdict in by_role.values())
        rows.append([what, *cells, ", ".join(sorted(thresholds)), "yes" if passed else "**no**"])
    header = ["what", "target", "speculative", "threshold", "passed"]
    return _table(header, rows) + _source(data, name)


def needle(name: str) -> str:
    """Needles found at each length by the four roles."""
    data = _load(name)
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in data["tasks"]:
        task, mark, length = row["task"].partition("@")
        if task.startswith("niah") and mark:
            cell = found.setdefault((task, int(length)), {"reference": row["reference"]})
            cell[row["role"]] = row["value"]
    roles = ("reference", "target", "speculative", "draft")
    rows = [
        [task, f"{length:,}", *(f"{found[task, length][role]:.2f}" for role in roles)] for task, length in sorted(found)
    ]
    return _table(["task", "tokens", *roles], rows) + _source(data, name)


TABLES = {
    "acceptance": lambda: acceptance("acceptance.json"),
    "parity": lambda: parity("acceptance.json"),
    "task-parity": lambda: task_parity("parity/parity.json"),
    "needle": lambda: needle("parity/parity.json"),
    "speed-cpu": lambda: speed("generate-cpu.json"),
}


def rendered(readme: str) -> str:
    """``readme`` with every marked table made anew."""
    for key, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {key} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        table = make()
        readme, count = pattern.subn(lambda match, table=table: match[1] + table + match[2], readme)
        if count != 1:
            raise ValueError(f"README.md must hold one '<!-- table: {key} -->' ... '<!-- end -->'")
    return readme


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
