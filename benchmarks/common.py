"""What every benchmark records, so that a figure can be traced to what produced it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from quantspec.evals.environment import environment as measured_environment

RESULTS = Path(__file__).parent / "results"


def environment(device: str) -> dict[str, Any]:
    """Device, core count, versions and commit of this run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {**measured_environment(device), "commit": commit.stdout.strip() or None}


def write_results(path: Path, device: str, rows: list[dict[str, Any]]) -> None:
    """Write ``{"environment": ..., "rows": ...}`` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(device), "rows": rows}, indent=1) + "\n")
