"""What every benchmark records, so that a figure can be traced to what produced it."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from quantspec.evals.environment import environment

RESULTS = Path(__file__).parent / "results"
# Steps at level INFO and what they measured at DEBUG; the command line shows the former in its progress bar.
LOG = logging.getLogger("quantspec.benchmarks")


def print_progress() -> None:
    """Print steps and figures as they come; for scripts."""
    LOG.addHandler(logging.StreamHandler(sys.stdout))
    LOG.setLevel(logging.DEBUG)


def results(device: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """``{"environment": ..., "rows": ...}``: the rows with device, core count, versions and commit of this run."""
    return {"environment": environment(device), "rows": rows}


def write_results(path: Path, device: str, rows: list[dict[str, Any]]) -> None:
    """Write :func:`results` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results(device, rows), indent=1) + "\n")
