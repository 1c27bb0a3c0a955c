"""The built documentation: where pages stand, and messages that one can search for and link to."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import yaml
from error_messages import page_rows, row_messages

ROOT = Path(__file__).parent.parent
CONTRIBUTORS = {"writing-a-pass.md", "adding-an-op.md", "adding-a-draft.md"}


class Loader(yaml.SafeLoader):
    """YAML as MkDocs has it, with tags of its own."""


Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)


def pages(nav: Any) -> list[str]:
    """The files of a part of the navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages(part)]


def hook(name: str) -> ModuleType:
    """A script beside the pages."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built(page: str, text: str) -> str:
    """Markdown as the hook hands it on."""
    return hook("message_headings").on_page_markdown(text, page=SimpleNamespace(file=SimpleNamespace(src_uri=page)))


def test_every_page_stands_in_one_place_and_those_of_contributors_apart():
    docs = ROOT / "docs"
    shown = pages(SITE["nav"])
    assert sorted(shown) == sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))
    assert {page for entry in SITE["nav"] for page in pages(entry.get("Contribute", []))} == CONTRIBUTORS


def test_pages_follow_the_system_between_light_and_dark():
    schemes = {palette["media"]: palette.get("scheme") for palette in SITE["theme"]["palette"]}
    assert schemes == {
        "(prefers-color-scheme)": None,
        "(prefers-color-scheme: light)": "default",
        "(prefers-color-scheme: dark)": "slate",
    }
    assert all("toggle" in palette for palette in SITE["theme"]["palette"])


def test_every_message_has_a_heading_of_its_own():
    """The search finds headings. Their text is the row's, and nothing else of the page changes."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    headings = re.findall(r"^#### (.+)$", built("troubleshooting.md", text), re.MULTILINE)
    rows = page_rows(text)
    assert len(headings) == len(rows) > 200
    assert [row_messages(heading) for heading in headings] == [row_messages(f"{row} | ") for row in rows]
    assert "| message |" not in built("troubleshooting.md", text)
    assert built("limits.md", text) == text


def test_a_message_keeps_its_reason():
    page = "a\n\n| message | why |\n| --- | --- |\n| `no … here` | Take [another](b.md). |\n\n| other | table |\n"
    assert built("troubleshooting.md", page) == (
        "a\n\n#### `no … here`\n\nTake [another](b.md).\n\n\n| other | table |"
    )


def test_short_code_is_not_broken_and_blocks_are_left_alone():
    mark = hook("whole_code").on_page_content
    assert mark("<p><code>--max-new-tokens</code></p>") == '<p><code class="whole">--max-new-tokens</code></p>'
    # As long as it looks, not as it is written.
    assert "whole" in mark("<code>&lt;&lt;&lt;&lt;&lt;&lt;&lt;&lt;</code>")
    for others in (f"<code>{'a-' * 13}</code>", "<pre><code>a\n</code></pre>", "<code><span>a</span></code>"):
        assert mark(others) == others
    assert "docs/whole_code.py" in SITE["hooks"]


def test_a_message_that_begins_with_an_option_is_found():
    """The search leaves out what follows a hyphen; the script takes hyphens away."""
    (script,) = SITE["extra_javascript"]
    pattern = re.search(r"replace\(/(.+)/g, \"\$1\"\)", (ROOT / "docs" / script).read_text())[1]
    assert re.sub(pattern, r"\1", "--tensor-parallel 4 needs -h") == "tensor-parallel 4 needs h"
