"""The README's tables are those of the committed results."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tables_are_made_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.readme_tables import rendered

    readme = (ROOT / "README.md").read_text()
    assert rendered(readme) == readme
    assert rendered(readme.replace("| target |", "| goal |")) == readme
