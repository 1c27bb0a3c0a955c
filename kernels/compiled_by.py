"""Compiled code on disk, by which kernels it was compiled."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

from torch._inductor.custom_graph_pass import get_hash_for_files
from torch.compiler import config


@cache
def digest_of_kernels() -> str:
    """Of the sources of this package."""
    return get_hash_for_files(tuple(map(str, sorted(Path(__file__).parent.glob("*.py"))))).hex()


def compiled_by_these_kernels() -> AbstractContextManager[None]:
    """Within, Inductor's cache on disk knows what these kernels compiled, and nothing of others.

    Its key has the names of a graph's ops, and not the shapes that their fake kernels answer.
    """
    tag = f"{config.cache_key_tag} quantspec {digest_of_kernels()}"
    return config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]
