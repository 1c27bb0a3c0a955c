"""Write ``docs/supported-hardware.md`` from the results of ``.ci/compile_kernels.py``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compiled_kernels.json"
PAGE = ROOT / "docs" / "supported-hardware.md"
# Compute capability: GPUs that have it, and the shared memory in KB that a block may take.
GENERATIONS = {
    80: ("A100, A30", 163),
    86: ("A10, A40, RTX 30", 99),
    89: ("L4, L40S, RTX 40", 99),
    90: ("H100, H200", 227),
    100: ("B200, GB200", 227),
    120: ("RTX 50, RTX PRO 6000 Blackwell", 99),
}
MEASURED = 90
_LINEARS = ("_linear_kernel", "_row_kernel")
_HEAD = """# Supported hardware

One NVIDIA GPU of compute capability 8.0 or newer, on Linux, in bfloat16 or float16; or a CPU, for trying.

**Measured** are the H100 (80 GB HBM3) and the H200 (Triton 3.6): the figures of the [benchmarks](benchmarks.md) and the
README, which name the card, and the tests with native kernels. Launches were tuned on the H100, those of INT4
linears of groups of 128 again on the H200. On other GPUs the number of multiprocessors and the shared memory of each
decide how many programs of attention run at once; tiles, warps and the INT4 linears' launches are theirs. The INT4
linear of one row needs `dp2a`, an instruction of every generation below; it ran on the H200 only. A
verification of more than eight query rows of a KV head, with heads of 64 or 128, 16-bit floats and groups of 128 tokens
or more, attends in wide tiles, whose products have 64 rows, on compute capability 9.0 alone; tuned on the H200.

**Only compiled** are the kernels of all other generations: `.ci/compile_kernels.py` compiles what the launchers would
launch on each, without a GPU, and fails where a kernel takes more shared memory than a block may have, uses an
instruction that the generation lacks, or is launched as it cannot. Nothing was run on them.

"""
_OVERLAP = """
Programmatic dependent launch, by which a kernel is set up while the one before it ends, exists from compute capability
9.0 on. *Spilled* is the most local memory that a thread takes.

## Versions of Triton

The INT4 linear lays its operands out by Triton's version, and only Triton 3.6 ran on a GPU. Compiled for compute
capability 8.0 and 9.0 by both ends of the supported range:

"""


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _name(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The page, from the rows of every version of Triton."""
    versions = sorted({row["triton"] for row in rows})
    newest = [row for row in rows if row["triton"] == versions[-1]]
    generations = []
    for capability, (names, limit) in GENERATIONS.items():
        ours = [row for row in newest if row["capability"] == capability]
        shared = max(row["shared_bytes"] for row in ours) / 1024
        spilled = max(row["spilled_bytes"] for row in ours)
        overlaps = "yes" if any(row["overlaps"] for row in ours) else "no"
        how = "measured" if capability == MEASURED else "compiled"
        generations.append(
            [_name(capability), names, how, len(ours), f"{shared:.0f} KB of {limit}", f"{spilled} bytes", overlaps]
        )
    columns = ("registers", "spilled_bytes", "instructions")
    linears = {
        (row["case"], row["capability"]): {
            version: next(
                other
                for other in rows
                if other["kernel"] in _LINEARS
                and (other["case"], other["capability"], other["triton"]) == (row["case"], row["capability"], version)
            )
            for version in versions
        }
        for row in rows
        if row["kernel"] in _LINEARS and row["triton"] == versions[0]
    }
    compared = [
        [case, _name(capability), *(" / ".join(str(by[version][column]) for version in versions) for column in columns)]
        for (case, capability), by in linears.items()
    ]
    head = ["capability", "such as", "state", "kernels", "most shared memory", "spilled", "launches overlap"]
    both = " / ".join(versions)
    return (
        _HEAD
        + _table(head, generations)
        + _OVERLAP
        + _table(["case", "capability", f"registers, {both}", "spilled bytes", "instructions"], compared)
    )


if __name__ == "__main__":
    PAGE.write_text(render(json.loads(RESULTS.read_text())))
