"""Compiled code on disk, by which kernels it was compiled."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

import torch
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch.compiler import config


@cache
def digest_of_kernels() -> str:
    """Of the sources of this package."""
    return get_hash_for_files(tuple(map(str, sorted(Path(__file__).parent.glob("*.py"))))).hex()


def compiled_by_these_kernels() -> AbstractContextManager[None]:
    """Within, Inductor's cache on disk knows what these kernels compiled, and nothing of others.

    Its key has the names of a graph's ops, and not the shapes that their fake kernels answer. From here on Inductor
    keeps inputs of the CPU's 4-bit matmul as contiguous as the graph has them: it takes no others.
    """
    from torch._inductor.lowering import add_layout_constraint, constrain_to_fx_strides

    add_layout_constraint(torch.ops.aten._weight_int4pack_mm_for_cpu.default, constrain_to_fx_strides)
    tag = f"{config.cache_key_tag} quantspec {digest_of_kernels()}"
    return config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]
