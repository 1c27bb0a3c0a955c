"""The tables of the README and of the benchmarks page, and the figures in their text, are those of the results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import RESULTS
from benchmarks.readme_tables import PAGES, TABLES, memory, rendered


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_made_from_the_results(page):
    text = page.read_text()
    assert rendered(text) == text
    assert rendered(text.replace("| target |", "| goal |")) == text


def test_every_table_is_shown():
    shown = "".join(page.read_text() for page in PAGES)
    assert all(f"<!-- table: {name} -->" in shown for name in TABLES)


@pytest.mark.parametrize("page", ["<!-- table: speed -->\n\n<!-- end -->", "<!-- table: parity -->\n\ntext"])
def test_a_mark_that_stands_for_no_table_is_an_error(page):
    with pytest.raises(ValueError, match="table"):
        rendered(page)


# --- figures in the text ---------------------------------------------------------------------------------------------

README, BENCHMARKS, _ = PAGES
CHOOSING = BENCHMARKS.with_name("choosing-options.md")
LANDING = BENCHMARKS.with_name("index.md")
# Not measured: what the parity report asks for.
THRESHOLDS = {"0.5%", "99%"}
# Measured, but in no result: SmolLM2-135M at temperature 1 with the best number of drafts, by common noise and by
# rejection sampling, on documentation and on source code (one H200, commit 2e6f6c4).
SAMPLED_SPEEDS = ("1,139", "1,178", "1,115", "1,189")


def result(name: str) -> Any:
    """A committed result."""
    return json.loads((RESULTS / name).read_text())


def figures() -> list[tuple[str, tuple[Path, ...]]]:
    """Every measured figure that the text may give, rounded as it stands there, and the pages that must have it."""
    smollm2 = result("decode-smollm2.json")["rows"][0]
    ours, plain = (smollm2[name]["tokens_per_second"] for name in ("generate", "hugging_face"))
    baseline = 1000 / smollm2["baseline_token_ms"]
    on_cpu = {(row["dtype"], row["mode"]): row["decode_speedup"] for row in result("generate-cpu.json")["rows"]}
    llama_2 = result("decode-llama-2-7b-128k.json")["rows"][0]
    llama_3 = next(row for row in result("decode-llama-3.1-8b.json")["rows"] if row["context"] == 32768)
    texts = {
        name: next(row for row in result(f"{name}/parity.json")["text"] if row["role"] == "target")
        for name in ("parity", "parity-bfloat16", "parity-last-1024")
    }
    # A row is context, weights, draft's weights, cache, together, dense cache, weights with that.
    gib = {row[0]: row for row in table_cells(memory("decode-llama-3.1-8b.json"))}
    speedups = [
        float(cell.removesuffix("x")) for row in table_cells(TABLES["decode"]()) for cell in row if cell.endswith("x")
    ]
    # The speed and how many times the baseline's that is, of the best row of each model in its newest table.
    best_new_text = {
        row[0]: row
        for name in ("new-text", "new-text-gptq")
        for row in sorted(table_cells(TABLES[name]()), key=lambda row: row[6])
    }
    new_text = [(f"{row[4]} tokens/s", row[6].split()[0]) for row in best_new_text.values()]
    # A row is context, what drafts read, baseline, draft step, verification, speed-ups at 0.93 and at 0.97.
    h200 = {(row[0], row[1]): row for row in table_cells(TABLES["sparse-decode"]())}
    of_h200 = result("decode-llama-3.1-8b-h200.json")["rows"]
    long = {row["draft_attention"]: row for row in of_h200 if row["context"] == 131072}
    again = {row[0]: row for row in table_cells(TABLES["sparse-decode-again"]())}
    # A row is shape, context, baseline, draft step, verification, speed-ups at 0.93 and at 0.97, memory.
    split = [row[5].split()[0] for row in table_cells(TABLES["split-decode"]()) if row[0] == "70B"]
    batches = [row[-1] for row in table_cells(TABLES["batches"]())]
    return [
        *((rate, (README,)) for rate, _ in new_text),
        *((speedup, ()) for _, speedup in new_text),
        (f"{h200['4k', 'full'][3]} ms", (BENCHMARKS,)),
        *((f"{long[reads]['verify_ms']['8']:.2f} ms", (BENCHMARKS, CHOOSING)) for reads in ("full", "sparse")),
        *((h200[key][5].split()[0], ()) for key in h200 if key != ("32k", "sparse")),
        (again["128k"][5].split()[0], ()),
        *((speedup, ()) for speedup in batches),
        *((speedup, ()) for speedup in split),
        *((f"{speed} tokens/s", ()) for speed in SAMPLED_SPEEDS),
        (f"{ours:.0f} tokens/s", (BENCHMARKS,)),
        (f"{baseline:.0f} tokens/s", (BENCHMARKS,)),
        (f"{plain:.0f} tokens/s", (BENCHMARKS,)),
        (f"{smollm2['baseline_token_ms']:.2f} ms", ()),
        (f"{smollm2['statistics']['draft_acceptance_rate']:.2f}", (BENCHMARKS,)),
        (f"{100 * smollm2['statistics']['draft_acceptance_rate']:.0f}%", ()),
        (f"{ours / baseline:.2f}x", ()),
        (f"{min(speedups):.1f} times", (LANDING,)),
        (f"{max(speedups):.1f} times", (LANDING,)),
        (f"{on_cpu['float32', 'target only']:.2f}x", ()),
        (f"{gib['128k'][4]} GiB", (README, LANDING)),
        (f"{gib['128k'][6]} GiB", (README, LANDING)),
        (f"{gib['4k'][4]} GiB", (README,)),
        (f"{gib['4k'][6]} GiB", (README,)),
        (f"{llama_2['generate_peak_bytes'] / 2**30:.1f} GiB", ()),
        (f"{llama_3['generate_peak_bytes'] / 2**30:.1f} GiB", ()),
        (f"{100 * abs(texts['parity']['perplexity_change']):.2f}%", (README,)),
        (f"{100 * texts['parity']['argmax_agreement']:.1f}%", (README, LANDING)),
        (f"{100 * texts['parity-bfloat16']['argmax_agreement']:.1f}%", ()),
        (f"{100 * abs(texts['parity-last-1024']['perplexity_change']):.2f}%", ()),
        (f"{100 * texts['parity-last-1024']['argmax_agreement']:.1f}%", ()),
    ]


def table_cells(table: str) -> list[list[str]]:
    """The cells of a Markdown table's rows, without its header."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return rows[2:]


def prose(page: str) -> str:
    """A page without the tables that are made from the results, and without code blocks."""
    page = re.sub(r"<!-- table: .*?<!-- end -->", "", page, flags=re.DOTALL)
    return re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)


def given_figures(text: str) -> list[str]:
    """Every number of a text with a unit of measurement, its sign left out; both of "1 to 2 times"."""
    text = re.sub(r"([\d.]+) to (?=[\d.]+ times)", r"\1 times, ", " ".join(text.split()))
    return re.findall(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?:x\b|%| GiB\b| tokens/s| ms\b| times\b)", text)


def test_figures_of_a_text_are_found():
    text = "1.4 to 2.2 times, -0.13%, 99.5% of\n26.9\nGiB, 4 bits, 911 tokens/s; 1.37x, q4x 128k\n```\n12%\n```\n"
    table = "<!-- table: speed -->\n| 3.0x |\n<!-- end -->\n"
    expected = ["1.4 times", "2.2 times", "0.13%", "99.5%", "26.9 GiB", "911 tokens/s", "1.37x"]
    assert given_figures(prose(text + table)) == expected


@pytest.mark.parametrize("page", [README, BENCHMARKS, CHOOSING, LANDING], ids=lambda page: page.name)
def test_every_figure_with_a_unit_was_measured(page):
    known = THRESHOLDS | {figure for figure, _ in figures()}
    unknown = [figure for figure in given_figures(prose(page.read_text())) if figure not in known]
    assert not unknown, f"no result has {', '.join(unknown)}"


@pytest.mark.parametrize("page", [README, BENCHMARKS, LANDING], ids=lambda page: page.name)
def test_the_pages_give_the_newest_figures(page):
    """Without the unit where another figure has it: 911 tokens/s against 666."""
    text = prose(page.read_text())
    wanted = [re.match(r"[\d.,]+", figure)[0] for figure, pages in figures() if page in pages]
    missing = [number for number in wanted if not re.search(rf"(?<![\w.,]){re.escape(number)}(?!\w|[.,]\d)", text)]
    assert not missing, f"measured, and not in the text: {', '.join(missing)}"


def test_the_landing_page_has_one_figure_and_three_numbers():
    text = LANDING.read_text().split("## Install")[0]
    assert len(re.findall(r"!\[", text)) == 1
    (numbers,) = re.findall(r'<div class="numbers" markdown>\n\n(.*?)\n\n</div>', text, re.DOTALL)
    assert [len(given_figures(number.split("**")[1])) for number in numbers.split("\n\n")] == [2, 1, 1]
