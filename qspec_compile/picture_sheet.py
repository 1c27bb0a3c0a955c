"""The one style sheet of all pictures: colours, and matplotlib's settings.

Backgrounds are transparent, and the colours drawn are of a middle lightness, which can be read on white and on black.
In an SVG file they follow the page: darker on a light one, lighter on a dark one.
"""

from __future__ import annotations

from typing import Any

# One colour per thing: letters and lines; what the draft reads; what only the target reads; what is not quantized; what
# is rejected, or another's; a last one. The colour-blind tell them apart by lightness on no page, so labels name them.
INK, DRAFT, TARGET, RECENT, OTHER, LAST = "#7a818c", "#16877c", "#a77412", "#4a7fc1", "#d0573c", "#9a6bc4"
SERIES = (DRAFT, RECENT, TARGET, LAST, OTHER)
# The same on a light page and on a dark one.
ON_PAGES = {
    INK: ("#3b4350", "#d5d9e0"),
    DRAFT: ("#1b7268", "#5cc9ba"),
    TARGET: ("#8a5f00", "#e9b44c"),
    RECENT: ("#3f5f91", "#8fb4ea"),
    OTHER: ("#a8412d", "#f08a70"),
    LAST: ("#7a4ba6", "#c6a1ea"),
}
# Of areas and of grids, through which any page shows.
PALE, FAINT = 0.16, 0.22

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "figure.facecolor": "none",
    "figure.dpi": 150,
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": INK,
    "grid.alpha": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.minor.bottom": False,
    "ytick.minor.left": False,
    "lines.linewidth": 2,
    # The same file on every run, legible without the font.
    "svg.hashsalt": "quantspec",
    "svg.fonttype": "path",
}
