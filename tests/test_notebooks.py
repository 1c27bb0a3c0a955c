"""What notebooks show: tables of pairs, statistics and reports, pictures, and the example from loading to the plot."""

from __future__ import annotations

import ast
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import fill_hub_cache

from quantspec import GenerationStats
from quantspec.engine.plan import Plan
from quantspec.evals.parity_rendering import render_html, render_markdown
from quantspec.html import html_table

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.ipynb"))


class Cells(HTMLParser):
    """The texts of all cells and summaries; tags must be closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def shown(value: Any) -> str | bytes | None:
    """What a notebook shows of the value of a cell's last line: HTML, a PNG picture, or its text."""
    for name in ("_repr_html_", "_repr_png_"):
        if (found := getattr(value, name, None)) is not None and (result := found()) is not None:
            return result[0] if isinstance(result, tuple) else result
    return None if value is None else repr(value)


def run_cell(source: str, namespace: dict[str, Any]) -> str | bytes | None:
    """Run one cell as a kernel does; returns what it shows of its last line."""
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), namespace)
    return None if last is None else shown(eval(compile(last, "<cell>", "eval"), namespace))


def test_a_table_shows_any_text():
    assert Cells(html_table("A < B", [["x & y", "1"]])).texts == ["A < B", "x & y", "1"]
    assert Cells(html_table("t", [["a", "b"]], ["c", "d"])).texts == ["t", "c", "d", "a", "b"]


def test_a_pair_shows_what_it_prints(qs):
    texts = Cells(qs._repr_html_()).texts
    assert texts[0] == f"QuantSpecModel: {qs.pair.title()}"
    assert len(texts) == 1 + 2 * (len(repr(qs).splitlines()) - 1)
    for name, value in zip(texts[1::2], texts[2::2], strict=True):
        assert f"  {name}: {value}" in repr(qs)


def test_statistics_show_what_they_print():
    stats = GenerationStats(2)
    stats.record_cycle(Plan(2), [1], 0.5)
    texts = Cells(stats._repr_html_()).texts
    assert len(texts) == 1 + 2 * len(str(stats).splitlines())
    assert all(text in str(stats) for text in texts[1:])
    assert "1 of 2 drafted tokens in 1 cycles" in texts


def test_a_report_shows_all_that_it_writes():
    report = json.loads((ROOT / "benchmarks" / "results" / "parity" / "parity.json").read_text())
    texts = Cells(render_html(report)).texts
    assert texts[0] == "Parity of SmolLM2-135M-Instruct: passed"
    for line in render_markdown(report).splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            assert {cell for cell in line.strip("| ").split(" | ") if cell} <= set(texts)


def test_a_missed_threshold_shows_without_markdown():
    report = json.loads((ROOT / "benchmarks" / "results" / "parity" / "parity.json").read_text())
    report["verdicts"][0]["passed"] = report["passed"] = False
    texts = Cells(render_html(report)).texts
    assert "FAILED" in texts
    assert not any("*" in text for text in texts)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_from_loading_to_the_plot(path, tmp_path, monkeypatch):
    """With a tiny model under the name of the notebook's; committed without outputs."""
    fill_hub_cache(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    namespace: dict[str, Any] = {}
    results = {"".join(cell["source"]).splitlines()[-1]: run_cell("".join(cell["source"]), namespace) for cell in code}
    assert results["qs.plot()"].startswith(b"\x89PNG")
    for line in ("qs", "qs.last_stats", "parity(qs, tokenizer=tokenizer, options=short)"):
        assert "<table>" in results[line], line


def test_there_is_an_example():
    assert EXAMPLES
