"""What every measurement records, so that a figure can be traced to what produced it."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quantspec.cycle_times import device_name


def environment(device: str) -> dict[str, Any]:
    """Name of the device, date, threads, versions and commit of this run, JSON-ready."""
    return {
        "device": device_name(torch.device(device)),
        "date": f"{date.today():%Y-%m-%d}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "torchao")},
        "commit": current_commit(),
    }


def current_commit() -> str | None:
    """Commit of the checkout this file is in; None where the package is installed, or git is not."""
    folder = Path(__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    command = ["git", "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None
