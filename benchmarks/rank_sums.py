"""Microseconds of a sum over the ranks of tensor parallelism, which GPUs of one machine play.

    python -m benchmarks.rank_sums --ranks 2

With the residual and the norm behind it, by itself, and by torch's kernel over shared memory; each in a captured graph
of sums that follow each other.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantspec.kernels import ranks
from quantspec.ranks import Ranks, Seat

from .common import RESULTS, print_progress, write_results
from .gpu_times import milliseconds

# Of the published table.
WIDTHS, ROWS = (4096, 8192), (1, 5, 8)
_SUMS = 64


def sums(x: Tensor, weight: Tensor, group: str) -> dict[str, Callable[[], None]]:
    """What is timed, by its name in the rows: sums of ``x (rows, N)`` over the ranks, one of the other."""

    def with_norm() -> None:
        total = normed = x
        for _ in range(_SUMS):
            total, normed = torch.ops.quantspec.reduce_ranks_to_norm(normed, total, weight, 1e-5, group)

    def repeated(reduce: Callable[[Tensor, str], Tensor]) -> None:
        total = x
        for _ in range(_SUMS):
            total = reduce(total, group)

    alone, by_torch = (partial(repeated, reduce) for reduce in (torch.ops.quantspec.reduce_ranks, ranks._sum))
    return {"sum_with_norm_us": with_norm, "sum_us": alone, "torch_sum_us": by_torch}


def measure(seat: Seat) -> list[dict[str, Any]]:
    """A row per width and number of rows, on every rank."""
    found = []
    for width, rows in itertools.product(WIDTHS, ROWS):
        x = torch.randn(rows, width, device=seat.device, dtype=torch.bfloat16)
        calls = sums(x, torch.ones_like(x[0]), seat.place.group)
        times = {name: 1000 * milliseconds(call) / _SUMS for name, call in calls.items()}
        found.append({"width": width, "rows": rows, "dtype": "bfloat16", "ranks": seat.place.world} | times)
    return found


def main() -> None:
    """Run and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "rank-sums.json")
    arguments = parser.parse_args()
    print_progress()
    with Ranks(arguments.ranks, "cuda") as pool:
        write_results(arguments.out, "cuda", pool.run(measure))


if __name__ == "__main__":
    # What is sent to other processes is found there by the name of this module, which is not that of a script.
    assert __spec__ is not None
    importlib.import_module(__spec__.name).main()
