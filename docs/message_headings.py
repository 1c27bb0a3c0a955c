"""Gives each message of the troubleshooting page a heading of its own, which the search finds and links lead to.

In the repository the page has tables, whose rows a test compares with the messages that the library raises. MkDocs runs
:func:`on_page_markdown`.
"""

from __future__ import annotations

from typing import Any

_HEADER = "| message |"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the rows of tables of messages into headings, with the reason and the way out below each."""
    if page.file.src_uri != "troubleshooting.md":
        return markdown
    lines = []
    in_table = False
    for line in markdown.splitlines():
        in_table = line.startswith(_HEADER) or (in_table and line.startswith("|"))
        if not in_table:
            lines.append(line)
        elif not line.startswith((_HEADER, "| ---")):
            message, _, reason = line.strip("| ").partition(" | ")
            lines += [f"#### {message}", "", reason, ""]
    return "\n".join(lines)
