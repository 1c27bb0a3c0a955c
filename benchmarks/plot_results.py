"""Draw the pictures of the published results: ``python -m benchmarks.plot_results`` writes SVG beside their JSON."""

from __future__ import annotations

import json
from pathlib import Path

from quantspec.evals.parity_rendering import render_plot

from . import plot_decode, plot_kernels
from .common import RESULTS


def draw(folder: Path = RESULTS) -> list[Path]:
    """Draw every picture into ``folder``; returns the files."""
    paths = [folder / name for name in ("decode.svg", "kernels.svg", "parity/parity.svg")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    decode, kernels, parity = paths
    plot_decode.plot(decode)
    plot_kernels.plot(json.loads((RESULTS / "kernels.json").read_text()), kernels)
    render_plot(json.loads((RESULTS / "parity" / "parity.json").read_text()), parity)
    return paths


if __name__ == "__main__":
    for drawn in draw():
        print(drawn)
