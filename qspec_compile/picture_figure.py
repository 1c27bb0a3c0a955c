"""The figure that pictures are drawn on; needs matplotlib to be imported."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from matplotlib import rc_context
from matplotlib.figure import Figure

from .picture_sheet import ON_PAGES, STYLE


class Picture(Figure):
    """A matplotlib figure in :data:`STYLE`, which notebooks show and whose SVG files can be read aloud.

    Attributes:
        title, description: for those who cannot see it; told from the axes if empty.
    """

    def __init__(self, title: str = "", description: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.title, self.description = title, description

    def draw(self, renderer: Any) -> None:
        """Draw it; ticks are made only now, in the style that is set."""
        with rc_context(STYLE):
            super().draw(renderer)

    def savefig(self, fname: Any, *, format: str | None = None, **options: Any) -> None:
        """Write it as matplotlib does, SVG with a title, a description and the colours of light and dark pages."""
        named = isinstance(fname, str | os.PathLike)
        if (format or (Path(fname).suffix.removeprefix(".") if named else "png")).lower() != "svg":
            with rc_context(STYLE):
                super().savefig(fname, format=format, **options)
            return
        written = io.StringIO()
        title = self.title or " and ".join(filter(None, (axes.get_title("left") for axes in self.axes)))
        metadata = {"Title": title, "Date": None, **options.pop("metadata", {})}
        with rc_context(STYLE):
            super().savefig(written, format="svg", metadata=metadata, **options)
        spoken = f"<desc>{escape(self.description or self._told())}</desc>\n {_page_colours()}"
        text = written.getvalue().replace("</title>", f"</title>\n {spoken}", 1)
        if named:
            Path(fname).write_text(text, encoding="utf-8")
        elif isinstance(fname, io.TextIOBase):
            fname.write(text)
        else:
            fname.write(text.encode())

    def _told(self) -> str:
        """What stands in the axes' titles and beside lines and bars."""
        parts = []
        for axes in self.axes:
            texts = [axes.get_title("right"), *(text.get_text().replace("\n", " ") for text in axes.texts)]
            parts.append(f"{axes.get_title('left')}: {', '.join(filter(None, texts))}.")
        return " ".join(parts)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """For notebooks, at half of its pixels' size, which screens of high density show sharp."""
        written = io.BytesIO()
        self.savefig(written, format="png")
        width, height = self.get_size_inches() * self.dpi / 2
        return written.getvalue(), {"width": round(width), "height": round(height)}


def _page_colours() -> str:
    """Rules that turn each drawn colour into that of a light page, and of a dark one where the page is."""

    def rules(page: int) -> str:
        return "".join(
            f'[style*="{part}: {drawn}"]{{{part}:{colours[page]}!important}}'
            for drawn, colours in ON_PAGES.items()
            for part in ("fill", "stroke")
        )

    return f"<style>{rules(0)}@media (prefers-color-scheme: dark){{{rules(1)}}}</style>"
