"""What notebooks show instead of text: tables in their own style, which suits light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(title: str, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> str:
    """A table of texts under its title; without ``header`` each row's first cell names the row."""

    def line(cells: Sequence[str], names: int) -> str:
        tags = ["th" if place < names else "td" for place in range(len(cells))]
        inner = (
            f'<{tag} style="text-align: left">{escape(cell)}</{tag}>' for tag, cell in zip(tags, cells, strict=True)
        )
        return f"<tr>{''.join(inner)}</tr>"

    head = f"<thead>{line(header, len(header))}</thead>" if header else ""
    body = "".join(line(row, 0 if header else 1) for row in rows)
    return f"<p><b>{escape(title)}</b></p><table>{head}<tbody>{body}</tbody></table>"
