"""Write the tables of the README and of ``docs/benchmarks.md`` from the JSON under ``benchmarks/results``.

Run it as ``python -m benchmarks.readme_tables``. A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from transformers import LlamaConfig

from quantspec.engine.odds import cycle_tokens
from quantspec.evals.parity_rendering import markdown_table
from quantspec.memory import expected_memory, full_precision_bytes

from .common import RESULTS
from .plot_decode import NAMES, RATES, best_rows, computed_speedup, speedup
from .random_models import SHAPES

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "tensor-parallel.md")
# Acceptance nearer to that of small models than the drawn rates; their speed-up follows from the measured cycles.
COMPUTED_RATES = (0.75, 0.80)
# Those that all published results drew.
DRAWN_RATES = (0.85, 0.90, 0.93, 0.95)


class LayerShape(NamedTuple):
    """One attention layer, as :mod:`quantspec.memory` takes them; ``window`` and ``chunk`` 0 are none."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int = 0
    chunk: int = 0
    reads: int | None = None


def _load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def _source(data: dict[str, Any], name: str) -> str:
    env = data["environment"]
    threads = f"{env['threads']} thread{'' if env['threads'] == 1 else 's'}"
    commit = f" (commit {env['commit'][:7]})" if env.get("commit") else ""
    return f"\n\n{env['device']}, {threads}, torch {env['torch']}, `benchmarks/results/{name}`{commit}"


def _draft(row: dict[str, Any]) -> str:
    return row["weight_quantizer"] + (", INT4 lm_head" if row["lm_head"] == "INT4" else "")


def rate_of(tokens: float, num_drafts: int) -> float:
    """The rate at which a cycle yields ``tokens``: :func:`cycle_tokens` inverted, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cycle_tokens(middle, num_drafts) < tokens else (low, middle)
    return low


def _pooled(rows: list[dict[str, Any]], num_drafts: int) -> tuple[float, float]:
    """Tokens per cycle and a of several cells with as many new tokens each."""
    tokens = mean(row[f"tokens per cycle at {num_drafts}"] for row in rows)
    return tokens, rate_of(tokens, num_drafts)


def acceptance(name: str) -> str:
    """a and tokens per cycle by draft and decoding mode, over all texts and contexts."""
    data = _load(name)
    cells: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in data["rows"]:
        cells.setdefault((row["draft"], row["lm_head"]), {}).setdefault(row["mode"], []).append(row)
    modes = list(next(iter(cells.values())))
    rows = []
    for (draft, head), by_mode in cells.items():
        row = [draft, head]
        for mode in modes:
            (four, rate), (eight, _) = _pooled(by_mode[mode], 4), _pooled(by_mode[mode], 8)
            row += [f"{rate:.3f}", f"{four:.2f}, {eight:.2f}"]
        rows.append(row)
    header = ["INT4 weights", "draft's head"]
    for mode in modes:
        header += [f"{mode}: a", "tokens per cycle of 4 and 8 drafts"]
    return markdown_table(header, rows) + _source(data, name)


def acceptance_by_context(name: str) -> str:
    """a with eight drafts and an INT4 head by text, mode and context, before tuning and after."""
    data = _load(name)
    cells: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for row in data["rows"]:
        if row["lm_head"] == "INT4" and "draft_attention_share" not in row and not row["draft"].endswith("GPTQ"):
            by_context = cells.setdefault((row["kind"], row["mode"]), {})
            by_context.setdefault(row["context"], {})["after" if row["tuned"] else "before"] = row["a at 8"]
    contexts = sorted({context for by_context in cells.values() for context in by_context})
    rows = []
    for (kind, mode), by_context in sorted(cells.items()):
        row = [kind, mode]
        for context in contexts:
            rates = by_context.get(context, {})
            row.append(" → ".join(f"{rates[when]:.3f}" for when in ("before", "after") if when in rates))
        rows.append(row)
    return markdown_table(["text", "mode", *(f"{c:,} tokens" for c in contexts)], rows) + _source(data, name)


def sampling_rules(name: str) -> str:
    """a of four drafts, greedy and at temperature 1 by either rule, means over seeds."""
    data = _load(name)
    cells: dict[tuple[Any, ...], dict[bool | None, list[dict[str, Any]]]] = {}
    for row in data["rows"]:
        steps = row["tuned"].split()[1]
        rate = f" at {row['learning_rate']}" if row["learning_rate"] else ""
        on = f" on {' and '.join(row['tuned_on'])}" if row.get("tuned_on") else ""
        tuning = f"{row['prompt_tokens']}, {steps}{rate}{on}"
        key = (row["model"], row["lm_head"], tuning, row["kind"], f"{row['context']:,}")
        cells.setdefault(key, {}).setdefault(row["rejection_sampling"], []).append(row)
    rows = []
    for labels, by_rule in cells.items():
        cell = [*labels]
        for rule in (None, False, True):
            found = by_rule[rule]
            tokens = mean(row["tokens per cycle at 4"] for row in found)
            cell.append(f"{mean(row['a at 4'] for row in found):.3f} ({tokens:.2f})")
        rows.append(cell)
    modes = ["greedy", "temperature 1", "by rejection sampling"]
    header = ["model", "draft's head", "tokens of a prompt, steps at rate", "text", "context", *modes]
    return markdown_table(header, rows) + _source(data, name)


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
    return markdown_table(["role", "argmax agreement", "perplexity (change)", "mean KL"], rows) + _source(data, name)


def speed(name: str) -> str:
    """Tokens per second, prefill and the whole against Hugging Face."""
    data = _load(name)
    rows = [
        [
            str(row["prompt_tokens"]),
            row["dtype"],
            row["mode"],
            f"{row['tokens_per_second']:.1f} / {row['hugging_face_tokens_per_second']:.1f}",
            f"{row['decode_speedup']:.2f}x",
            f"{row['prefill_seconds']:.1f} s / {row['hugging_face_prefill_seconds']:.1f} s",
            f"{row['seconds']:.1f} s / {row['hugging_face_seconds']:.1f} s, {row['speedup']:.2f}x",
        ]
        for row in data["rows"]
    ]
    header = ["prompt tokens", "dtype", "quantspec", "tokens/s, ours / Hugging Face", "decode", "prefill, both"]
    return markdown_table([*header, "in all, both"], rows) + _source(data, name)


def options(name: str) -> str:
    """Tokens per second with an option and, as a share of the plain call's, cycles per second, by batch.

    Rows in lockstep have shorter cycles, of fewer tokens: there the share is of tokens per second.
    """
    data = _load(name)
    batches = sorted({row["batch"] for row in data["rows"]})
    cells: dict[str, dict[int, str]] = {}
    for row in data["rows"]:
        in_lockstep = row["batch"] > 1 and "processor" in row["option"]
        share = row.get("of_plain" if in_lockstep else "cycle_of_plain")
        cell = f"{row['tokens_per_second']:,.0f}" + ("" if share is None else f" ({share:.2f})")
        cells.setdefault(row["option"], {})[row["batch"]] = cell
    rows = [[f"`{name}`" if "=" in name else name, *(of.get(b, "") for b in batches)] for name, of in cells.items()]
    return markdown_table(["option", *(f"batch {batch}" for batch in batches)], rows) + _source(data, name)


def structured(name: str) -> str:
    """Tokens per second of JSON by the library that follows its grammar, without drafts and with them."""
    data = _load(name)
    rows = []
    for plain, drafted in zip(data["rows"][::2], data["rows"][1::2], strict=True):
        speeds = [f"{row['tokens_per_second']:.1f}" for row in (plain, drafted)]
        same = "yes" if drafted["valid"] and drafted["same_as_without_drafts"] else "no"
        rows.append([drafted["library"], *speeds, f"{drafted['mean_acceptance_length']:.2f}", same])
    gamma = data["rows"][1]["num_speculative_tokens"]
    head = ["library", "tokens/s without drafts", f"with {gamma}", "tokens a cycle", "valid, and the same text"]
    return markdown_table(head, rows) + _source(data, name)


def first_text(name: str) -> str:
    """Seconds of each stage until a text, by process."""
    data = _load(name)
    titles = {
        "first": "the first process, `convert`",
        "later": "a later one, `convert`",
        "saved": "loads the saved pair",
    }
    rows = []
    for row in data["rows"]:
        made = row["load_seconds"] if row["process"] == "saved" else row["convert_seconds"]
        first, rest = row["first_token_seconds"], row["first_rest_seconds"]
        rows.append([row["model"], titles[row["process"]], *(f"{seconds:.1f} s" for seconds in (made, first, rest))])
    header = ["model", "process", "converted or loaded", "first token", "compiled and captured"]
    return markdown_table(header, rows) + _source(data, name)


def draft_sources(name: str) -> str:
    """Tokens per second by source and number of drafts: a column for each kind of work, new text over its prompts."""
    data = _load(name)
    work = list(dict.fromkeys(row["work"] for row in data["rows"]))
    cells: dict[tuple[str, int | str], dict[str, list[dict[str, Any]]]] = {}
    for row in data["rows"]:
        way = (row["draft"], row["num_speculative_tokens"])
        cells.setdefault(way, {}).setdefault(row["work"], []).append(row)
    rows = []
    for (draft, number), by_work in sorted(cells.items(), key=lambda item: (item[0][0], str(item[0][1]).zfill(4))):
        row = [f'`"{draft}"`', f"`{number!r}`".replace("'", '"')]
        for name_of_work in work:
            measured = by_work.get(name_of_work, [])
            cell = f"{mean(m['tokens_per_second'] for m in measured):,.0f}" if measured else ""
            if measured:
                cell += f" ({mean(m['tokens_per_cycle'] for m in measured):.1f}"
                cell += f"; {mean(m['speedup'] for m in measured):.2f}x)" if "speedup" in measured[0] else ")"
            row.append(cell)
        rows.append(row)
    return markdown_table(["draft", "number", *work], rows) + _source(data, name)


def new_text(name: str) -> str:
    """Tokens per second of new text by model, context and number of drafts, over its prompts."""
    data = _load(name)
    cells: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in data["rows"]:
        cells.setdefault((row["model"], row["context"], row["num_speculative_tokens"]), []).append(row)
    rows = []
    for (model, context, number), found in cells.items():
        speeds = [row["speedup"] for row in found]
        rows.append(
            [
                model,
                f"{context:,}",
                str(number),
                f"{1000 / found[0]['baseline_ms']:,.0f}",
                f"{mean(row['tokens_per_second'] for row in found):,.0f}",
                f"{mean(row['tokens_per_cycle'] for row in found):.2f}",
                f"{mean(speeds):.2f}x ({min(speeds):.2f} to {max(speeds):.2f})",
            ]
        )
    header = ["model", "context", "drafts", "baseline, tokens/s", "ours", "tokens a cycle", "ours / baseline"]
    return markdown_table(header, rows) + _source(data, name)


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
    return markdown_table(header, rows) + _kernel_source(next(iter(times.values())), name)


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
    return markdown_table(header, rows) + _kernel_source(data[0], name)


def _kernel_source(row: dict[str, Any], name: str) -> str:
    versions = f"torch {row['torch']}, triton {row['triton']}, commit {row['commit'][:7]}"
    return f"\n\n{row['device']}, {versions}, `benchmarks/results/{name}`"


def decoding(*names: str) -> str:
    """Cycle parts and speed-up of shapes with random weights, by context; drafts per cycle as 0.93 likes best."""
    rows, plain = [], []
    for name in names:
        for context in _load(name)["rows"]:
            best = best_rows(context)
            drafts = best[0.93]["num_speculative_tokens"]
            shape, length = NAMES[context["model"]].removesuffix(" shape"), f"{context['context'] // 1024}k"
            if "hugging_face" in context:
                plain.append(f"{context['hugging_face']['tokens_per_second']:.0f} ({shape}, {length})")
            rows.append(
                [
                    shape,
                    length,
                    f"{context['baseline_token_ms']:.2f}",
                    f"{context['draft_step_ms']:.2f}",
                    f"{context['verify_ms'][str(drafts + 1)]:.2f} ({drafts + 1})",
                    *(f"{computed_speedup(context, rate):.2f}x" for rate in COMPUTED_RATES),
                    *(f"{best[rate]['speedup']:.2f}x" for rate in DRAWN_RATES),
                    f"{best[0.93]['tokens_per_second']:.0f}",
                    f"{context['decode_peak_bytes'] / 2**30:.1f}",
                ]
            )
    header = ["shape", "context", "baseline token, ms", "draft step, ms", "verification, ms (tokens)"]
    header += [f"speed-up at a = {rate:.2f}" for rate in (*COMPUTED_RATES, *DRAWN_RATES)]
    header += ["tokens/s at a = 0.93", "peak, GiB"]
    sources = [_source(_load(name), name).rsplit(", ", 1) for name in names]
    slower = f". Hugging Face's `generate` with the same weights, tokens/s: {', '.join(plain)}."
    return markdown_table(header, rows) + sources[0][0] + ", " + " and ".join(source[1] for source in sources) + slower


def sparse_decoding(name: str) -> str:
    """As :func:`decoding`, of drafts that read all of the cache and of sparse ones, for acceptance of 0.93 and 0.97."""
    data = _load(name)
    rows = []
    for row in sorted(data["rows"], key=lambda row: (row["context"], row["draft_attention"])):
        cells = [f"{row['context'] // 1024}k", row["draft_attention"], f"{row['baseline_token_ms']:.2f}"]
        cells.append(f"{row['draft_step_ms']:.2f}")
        for rate in (0.93, 0.97):
            cycles = [cycle for cycle in row["synthetic"] if cycle["synthetic_acceptance_rate"] == rate]
            best = max(cycles, key=lambda cycle: cycle["tokens_per_second"])
            drafts = best["num_speculative_tokens"]
            if rate == 0.93:
                cells.append(f"{row['verify_ms'][str(drafts + 1)]:.2f} ({drafts + 1})")
            cells.append(f"{best['speedup']:.2f}x ({drafts} drafts, {best['cycle_ms']:.1f} ms)")
        rows.append(cells)
    header = ["context", "draft reads", "baseline token, ms", "draft step, ms", "verification, ms (tokens)"]
    header += [f"speed-up at a = {rate} (cycle)" for rate in (0.93, 0.97)]
    return markdown_table(header, rows) + _source(data, name)


def batches(name: str) -> str:
    """Cycle parts and speed-up by the number of sequences, at the one rate and number of drafts that were run."""
    data = _load(name)
    drafts = data["rows"][0]["synthetic"][0]["num_speculative_tokens"]
    rows = []
    for row in data["rows"]:
        (cycle,) = row["synthetic"]
        times = (row["baseline_token_ms"], row["draft_step_ms"], row["verify_ms"][str(drafts + 1)], cycle["cycle_ms"])
        speeds = [f"{cycle['tokens_per_second']:,.0f}", f"{cycle['speedup']:.2f}x"]
        rows.append([str(row["batch"]), *(f"{milliseconds:.2f}" for milliseconds in times), *speeds])
    times_of = [
        "baseline step, ms",
        "draft step, ms",
        f"verification of {drafts + 1}, ms",
        f"cycle of {drafts} drafts, ms",
    ]
    return markdown_table(["sequences", *times_of, "tokens/s of all", "speed-up"], rows) + _source(data, name)


def two_gpus(name: str, alone: str) -> str:
    """Steps of a shape on one GPU, by another file's rows, and over two."""
    data = _load(name)
    one = {row["context"]: row for row in _load(alone)["rows"] if row["draft_attention"] == "full"}
    rows = []
    for row in data["rows"]:
        verified = max(row["verify_ms"].keys() & one[row["context"]]["verify_ms"].keys(), key=int)
        for step, of in (
            ("draft step", lambda row: row["draft_step_ms"]),
            (f"verification of {verified}", lambda row, tokens=verified: row["verify_ms"][tokens]),
            ("baseline token", lambda row: row["baseline_token_ms"]),
        ):
            single, split = of(one[row["context"]]), of(row)
            rows.append([f"{row['context']:,}", step, f"{single:.2f}", f"{split:.2f}", f"{split / single:.2f}"])
    return markdown_table(["context", "step", "one GPU, ms", "two GPUs, ms", "ratio"], rows) + _source(data, name)


def split_decoding(*names: str) -> str:
    """Steps, the highest speed-ups at acceptance of 0.93 and 0.97, and memory of shapes that are split over GPUs."""
    rows = []
    for data in map(_load, names):
        for row in data["rows"]:
            verified, verify_ms = max(row["verify_ms"].items(), key=lambda item: int(item[0]))
            gains = [
                max(
                    (result["speedup"], result["num_speculative_tokens"])
                    for result in row["synthetic"]
                    if result["synthetic_acceptance_rate"] == rate
                )
                for rate in (0.93, 0.97)
            ]
            rows.append(
                [
                    row["model"].removeprefix("llama-3.1-").upper(),
                    f"{row['context']:,}",
                    f"{row['baseline_token_ms']:.2f}",
                    f"{row['draft_step_ms']:.2f}",
                    f"{verify_ms:.2f} ({verified})",
                    *(f"{speedup:.2f}x ({count} drafts)" for speedup, count in gains),
                    f"{max(row['decode_peak_bytes_of_ranks']) / 2**30:.1f}",
                ]
            )
    header = ["shape", "context", "baseline, ms", "draft step, ms", "verification, ms (tokens)", "at 0.93", "at 0.97"]
    table = markdown_table([*header, "GiB of a GPU"], rows)
    return table + "".join(_source(_load(name), name) for name in names)


def rank_sums(name: str) -> str:
    """A sum over ranks with what follows it, by itself, and by torch's kernel."""
    data = _load(name)
    names = ("sum_with_norm_us", "sum_us", "torch_sum_us")
    rows = [[f"{row['width']:,}", str(row["rows"]), *(f"{row[name]:.1f}" for name in names)] for row in data["rows"]]
    header = ["numbers of a row", "rows", "sum, residual and norm, us", "sum alone, us", "torch's sum alone, us"]
    return markdown_table(header, rows) + _source(data, name)


def pools(name: str) -> str:
    """Attention out of a pool beside that out of planes of each sequence's own."""
    data = _load(name)
    times: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in data["rows"]:
        shape = (f"{row['op'].removesuffix('_attention')}, {row['tokens']}", row["batch"], row["context"])
        times.setdefault(shape, {})[row["implementation"]] = row["median_us"]
    rows = []
    for (attention, batch, context), of in times.items():
        own, pool = of["own planes"], of["pool"]
        rows.append([attention, str(batch), f"{context:,}", f"{own:.1f}", f"{pool:.1f}", f"{pool / own - 1:+.1%}"])
    header = ["attention, tokens", "sequences", "context", "own planes, µs", "pool, µs", "difference"]
    return markdown_table(header, rows) + _source(data, name)


def speedups(*names: str) -> str:
    """What :func:`decoding` shows, for those who only want to know how much faster."""
    rows = []
    for name in names:
        for context in _load(name)["rows"]:
            best = best_rows(context)
            rows.append(
                [
                    NAMES[context["model"]].removesuffix(" shape"),
                    f"{context['context'] // 1024}k",
                    f"{context['baseline_token_ms']:.2f}",
                    *(f"{speedup(context, rate):.2f}x" for rate in RATES),
                    f"{best[0.93]['tokens_per_second']:.0f}",
                ]
            )
    header = ["shape", "context", "baseline token, ms", *(f"a = {rate:.2f}" for rate in RATES)]
    sources = " and ".join(_source(_load(name), name).rsplit(", ", 1)[1] for name in names)
    device = _source(_load(names[0]), names[0]).rsplit(", ", 1)[0]
    return markdown_table([*header, "tokens/s at a = 0.93"], rows) + f"{device}, {sources}"


def memory(name: str) -> str:
    """Weights and cache of a shape, as converted and as transformers holds them, at the contexts of its results."""
    contexts = _load(name)["rows"]
    shape = LlamaConfig(**SHAPES[contexts[0]["model"]])
    dim = shape.hidden_size // shape.num_attention_heads
    layers = [LayerShape(shape.num_key_value_heads or shape.num_attention_heads, dim, dim)] * shape.num_hidden_layers
    weights = next(row["statistics"]["weight_bytes"] for row in contexts if "statistics" in row)
    rows = []
    for context in contexts:
        tokens = context["context"]
        cache, dense = sum(expected_memory(layers, tokens).values()), full_precision_bytes(layers, tokens)
        sizes = (weights["target"], weights["draft_int4"], cache, sum(weights.values()) + cache, dense)
        cells = [f"{size / 2**30:.1f}" for size in (*sizes, weights["target"] + dense)]
        rows.append([f"{tokens // 1024}k", *cells])
    header = ["context", "model's weights", "draft's INT4 weights", "cache", "together"]
    return markdown_table([*header, "transformers' cache", "with the model's weights"], rows)


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
    apart = {row["role"]: _continuations(row) for row in data["generation"] if row["against"] == "reference"}
    rows.append(["continuations as the original's", apart["target"], apart["speculative"], "not judged", ""])
    header = ["what", "target", "speculative", "threshold", "passed"]
    return markdown_table(header, rows) + _documents(data) + _source(data, name).lstrip()


def text_parity(*names: str) -> str:
    """The target on a long text, by report: how far its distribution is from the original's."""
    rows = []
    for name in names:
        data = _load(name)
        target = next(row for row in data["text"] if row["role"] == "target")
        rows.append(
            [
                data["environment"]["dtype"],
                f"{target['scored_tokens']:,} after {target['context_tokens']:,}",
                f"{100 * target['perplexity_change']:+.3f}%",
                f"{target['argmax_agreement']:.4f}",
                f"{target['mean_kl']:.5f}",
                f"`{name}`",
            ]
        )
    header = ["dtype", "tokens", "perplexity", "argmax agreement", "mean KL", "file in `benchmarks/results`"]
    return markdown_table(header, rows) + f"\n\n{_load(names[0])['environment']['device']}"


def _continuations(row: dict[str, Any]) -> str:
    """How many greedy texts are equal, and by what logit margin the others first part."""
    margins = ", ".join(f"{divergence['margin']:.3f}" for divergence in row["divergences"])
    equal = f"{row['prompts'] - len(row['divergences'])} of {row['prompts']}"
    return f"{equal}; logit margins {margins}" if margins else equal


def continuations(*names: str) -> str:
    """Greedy texts of two roles side by side, by dtype: how many are equal, and where the others first part."""
    rows = []
    for name in names:
        data = _load(name)
        for row in data["generation"]:
            if row["role"] != "draft":
                equal, _, margins = _continuations(row).partition("; logit margins ")
                tokens = str(row["new_tokens"])
                rows.append([data["environment"]["dtype"], row["role"], row["against"], tokens, equal, margins])
    sources = ", ".join(f"`benchmarks/results/{name}`" for name in names)
    header = ["dtype", "role", "against", "tokens", "equal texts", "logit margins where the others part"]
    return markdown_table(header, rows) + f"\n\n{_load(names[0])['environment']['device']}, {sources}"


def needle(*names: str) -> str:
    """Needles found at each length by the four roles, each case from the first report that has it."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for name in reversed(names):
        data = _load(name)
        cases: dict[tuple[str, int], dict[str, float]] = {}
        for row in data["tasks"]:
            task, mark, length = row["task"].partition("@")
            if task.startswith("niah") and mark:
                case = {"documents": data["options"]["limit"], "reference": row["reference"]}
                cases.setdefault((task, int(length)), case)[row["role"]] = row["value"]
        found |= cases
    roles = ("reference", "target", "speculative", "draft")
    rows = [
        [task, f"{length:,}", str(case["documents"]), *(f"{case[role]:.2f}" for role in roles)]
        for (task, length), case in sorted(found.items())
    ]
    sources = "; ".join(_source(_load(name), name).lstrip() for name in names)
    return markdown_table(["task", "tokens", "documents", *roles], rows) + f"\n\n{sources}"


def serving(name: str) -> str:
    """Tokens per second of all users, how many times those one after another, and the median time to a first token.

    Where one after another was not measured, how many times those without drafts.
    """
    data = _load(name)
    kinds = {
        "one_after_another": "one after another",
        "batch_without_drafts": "together, without drafts",
        "batch": "together",
        "batch_auto": "together, drafts as they pay",
        "shared": "together, all but 128 tokens of the prompts alike",
    }
    rows = []
    known = {
        (row["users"], row["context"], row["new_tokens"]): row["one_after_another"]
        for row in data["rows"]
        if "one_after_another" in row
    }
    for row in sorted(data["rows"], key=lambda row: (row["context"], row["users"], row["new_tokens"])):
        shape = row["users"], row["context"], row["new_tokens"]
        alone = known.get(shape, row.get("batch_without_drafts"))
        for kind, text in kinds.items():
            if kind not in row:
                continue
            found = row[kind]
            rates = [
                f"{found[rate]:,.0f} ({found[rate] / alone[rate]:.2f}x)"
                for rate in ("tokens_per_second", "decode_tokens_per_second")
            ]
            first = f"{found['first_token_seconds_median']:.1f} s"
            rows.append([str(row["users"]), f"{row['context']:,}", f"{row['new_tokens']:,}", text, *rates, first])
    header = ["users", "prompt", "new tokens", "requests", "tokens/s", "after the last first token", "first token"]
    return markdown_table(header, rows) + _source(data, name)


def _documents(report: dict[str, Any]) -> str:
    """How much the tasks of a parity report hold."""
    limit = report["options"]["limit"]
    return f"\n\n{'All' if limit is None else limit} documents per task, "


TABLES = {
    "acceptance": lambda: acceptance("acceptance-smollm2.json"),
    "acceptance-gptq": lambda: acceptance("acceptance-smollm2-gptq.json"),
    "sampling-rules": lambda: sampling_rules("acceptance-rules.json"),
    "acceptance-smollm2": lambda: acceptance_by_context("acceptance-smollm2.json"),
    "acceptance-qwen": lambda: acceptance_by_context("acceptance-qwen-coder.json"),
    "parity": lambda: parity("draft-parity.json"),
    "task-parity": lambda: task_parity("parity/parity.json"),
    "text-parity": lambda: text_parity(
        "parity/parity.json", "parity-last-1024/parity.json", "parity-bfloat16/parity.json"
    ),
    "continuations": lambda: continuations("parity/parity.json", "parity-bfloat16/parity.json"),
    "needle": lambda: needle("parity-needles/parity.json", "parity-needles-8k/parity.json"),
    "drafts": lambda: draft_sources("drafts-smollm2.json"),
    "new-text": lambda: new_text("drafts-new-text.json"),
    "new-text-gptq": lambda: new_text("drafts-new-text-gptq.json"),
    "serving": lambda: serving("serving-llama-3.1-8b.json"),
    "serving-users": lambda: serving("serving-llama-3.1-8b-users.json"),
    "serving-8-users": lambda: serving("serving-llama-3.1-8b-8-users.json"),
    "serving-smollm2": lambda: serving("serving-smollm2.json"),
    "first-text": lambda: first_text("first-text.json"),
    "options-8b": lambda: options("options-8b.json"),
    "pools": lambda: pools("pool.json"),
    "options": lambda: options("options.json"),
    "structured": lambda: structured("structured-cpu.json"),
    "structured-gpu": lambda: structured("structured.json"),
    "speed-cpu": lambda: speed("generate-cpu.json"),
    "speed-cpu-bfloat16": lambda: speed("generate-cpu-bfloat16.json"),
    "decode": lambda: decoding("decode-llama-3.1-8b.json", "decode-llama-2-7b.json"),
    "sparse-decode": lambda: sparse_decoding("decode-llama-3.1-8b-h200.json"),
    "sparse-decode-again": lambda: sparse_decoding("decode-llama-3.1-8b-sparse.json"),
    "batches": lambda: batches("decode-llama-3.1-8b-batches-h200.json"),
    "two-gpus": lambda: two_gpus("decode-llama-3.1-8b-2-gpus.json", "decode-llama-3.1-8b-1-gpu.json"),
    "split-decode": lambda: split_decoding("decode-llama-3.1-8b-2-gpus.json", "decode-llama-3.1-70b-2-gpus.json"),
    "rank-sums": lambda: rank_sums("rank-sums.json"),
    "speedup": lambda: speedups("decode-llama-3.1-8b.json", "decode-llama-2-7b.json"),
    "memory": lambda: memory("decode-llama-3.1-8b.json"),
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
