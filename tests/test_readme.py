"""The tables of the README and of the benchmarks page are those of the committed results."""

from __future__ import annotations

import pytest

from benchmarks.readme_tables import PAGES, TABLES, rendered


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
