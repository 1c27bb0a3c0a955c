"""Puts the pictures under ``benchmarks/results`` into the built pages; in the repository the pages link to them there.

MkDocs runs :func:`on_files` and :func:`on_page_markdown`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures under ``results/``."""
    for path in RESULTS.rglob("*.svg"):
        name = path.relative_to(RESULTS).as_posix()
        files.append(File.generated(config, f"results/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to where :func:`on_files` puts the pictures."""
    return markdown.replace("](../benchmarks/results/", "](results/")
