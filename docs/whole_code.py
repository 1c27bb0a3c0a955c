"""Marks short code in a line of text, so that ``--option`` is not broken at its hyphens.

MkDocs runs :func:`on_page_content`; site.css has what the mark means.
"""

from __future__ import annotations

import html
import re
from typing import Any

# Of the 40 or so that a phone's line has room for.
_SHORT = 24


def on_page_content(content: str, **_: Any) -> str:
    """Give ``<code>`` of up to 24 characters the class ``whole``."""

    def mark(code: re.Match[str]) -> str:
        return f'<code class="whole">{code[1]}</code>' if len(html.unescape(code[1])) <= _SHORT else code[0]

    # Blocks of code have spans, or lines.
    return re.sub(r"<code>([^<\n]+)</code>", mark, content)
