"""Write the tables of the README and of ``docs/benchmarks.md`` from the JSON under ``benchmarks/results``.

Run it as ``python -m benchmarks.readme_tables``. A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

from .common import RESULTS
from .plot_decode import NAMES, best_rows

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")


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


def attention_kernels(name: str) -> str:
    """Attention over a long cache at batch 1, against FlashAttention over a dense one."""
    data = _load(name)
    times = {
        (row["op"], row["heads"], row["kv_heads"], row["context"], row["implementation"]): row
        for row in data
        if row.get("batch") == 1 and row["op"] in ("draft_attention", "verify_attention")
    }
    rows = []
    for (op, heads, kv_heads, context, implementation), ours in sorted(times.items()):
        if implementation != "quantspec" or context not in (32768, 131072):
            continue
        dense = times[op, heads, kv_heads, context, "flash_attention"]
        rows.append(
            [
                op.removesuffix("_attention"),
                f"{heads}/{kv_heads}",
                f"{context // 1024}k",
                f"{ours['median_us']:.0f}",
                f"{ours['floor_us']:.0f}",
                f"{dense['median_us']:.0f}",
                f"{dense['median_us'] / ours['median_us']:.2f}x",
            ]
        )
    header = ["attention", "heads, query/KV", "context", "quantspec, µs", "floor, µs", "FlashAttention, µs", "ratio"]
    return _table(header, rows) + _kernel_source(next(iter(times.values())), name)


def linear_kernels(name: str) -> str:
    """INT4 linears by shape, rows and group size, against tinygemm and bfloat16 cuBLAS."""
    data = [row for row in _load(name) if row["op"] == "int4_linear"]
    cases: dict[tuple[int, ...], dict[str, dict[str, Any]]] = {}
    for row in data:
        if row["rows"] in (1, 8):
            key = (row["in_features"], row["out_features"], row["rows"], row["group"])
            cases.setdefault(key, {})[row["implementation"]] = row
    rows = []
    for (in_features, out_features, num_rows, group), measured in sorted(cases.items()):
        names = ("quantspec", "tinygemm", "cublas_bfloat16")
        cells = [f"{measured[n]['median_us']:.1f}" if n in measured else "-" for n in names]
        floor = f"{measured['quantspec']['floor_us']:.1f}"
        rows.append([f"{in_features}→{out_features}", str(num_rows), str(group), cells[0], floor, *cells[1:]])
    header = ["linear", "rows", "group", "quantspec, µs", "floor, µs", "tinygemm, µs", "bfloat16 cuBLAS, µs"]
    return _table(header, rows) + _kernel_source(data[0], name)


def _kernel_source(row: dict[str, Any], name: str) -> str:
    versions = f"torch {row['torch']}, triton {row['triton']}, commit {row['commit'][:7]}"
    return f"\n\n{row['device']}, {versions}, `benchmarks/results/{name}`"


def decoding(*names: str) -> str:
    """Cycle parts and speed-up of shapes with random weights, by context; drafts per cycle as 0.93 likes best."""
    rows = []
    for name in names:
        for context in _load(name)["rows"]:
            best = best_rows(context)
            drafts = best[0.93]["num_speculative_tokens"]
            rows.append(
                [
                    NAMES[context["model"]].removesuffix(" shape"),
                    f"{context['context'] // 1024}k",
                    f"{context['baseline_token_ms']:.2f}",
                    f"{context['draft_step_ms']:.2f}",
                    f"{context['verify_ms'][str(drafts + 1)]:.2f} ({drafts + 1})",
                    *(f"{best[rate]['speedup']:.2f}x" for rate in sorted(best)),
                    f"{best[0.93]['tokens_per_second']:.0f}",
                    f"{context['decode_peak_bytes'] / 2**30:.1f}",
                ]
            )
    header = ["shape", "context", "baseline token, ms", "draft step, ms", "verification, ms (tokens)"]
    header += [f"at {rate:.2f}" for rate in (0.85, 0.90, 0.93, 0.95)] + ["tokens/s at 0.93", "peak, GiB"]
    sources = [_source(_load(name), name).rsplit(", ", 1) for name in names]
    return _table(header, rows) + sources[0][0] + ", " + " and ".join(source[1] for source in sources)


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
    return _table(header, rows) + _documents(data) + _source(data, name).lstrip()


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
    return _table(["task", "tokens", *roles], rows) + _documents(data) + _source(data, name).lstrip()


def _documents(report: dict[str, Any]) -> str:
    """How much the tasks of a parity report hold."""
    limit = report["options"]["limit"]
    return f"\n\n{'All' if limit is None else limit} documents per task, "


TABLES = {
    "acceptance": lambda: acceptance("acceptance.json"),
    "parity": lambda: parity("acceptance.json"),
    "task-parity": lambda: task_parity("parity/parity.json"),
    "needle": lambda: needle("parity/parity.json"),
    "speed-cpu": lambda: speed("generate-cpu.json"),
    "decode": lambda: decoding("decode-llama-3.1-8b.json", "decode-llama-2-7b.json"),
    "attention-kernels": lambda: attention_kernels("kernels.json"),
    "linear-kernels": lambda: linear_kernels("kernels.json"),
}
_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def rendered(page: str) -> str:
    """``page`` with every marked table made anew.

    Raises:
        ValueError: a mark names no table, or is not closed.
    """

    def table(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"no table is called {match[2]!r}; there are {', '.join(TABLES)}")
        return match[1] + TABLES[match[2]]() + match[3]

    if page.count("<!-- table: ") != len(_MARKED.findall(page)):
        raise ValueError("every '<!-- table: NAME -->' needs its '<!-- end -->'")
    return _MARKED.sub(table, page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rendered(path.read_text()))
