"""The kernels compile for GPUs that are not here; ``.ci/compile_kernels.py`` compiles more shapes and generations."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "compile_kernels.py"

# Places of a batch in turn, prompts of other lengths, and tables of other widths.
SCRIPTS = """
import torch
from compile_kernels import compiled_for
from quantspec.kernels.dense_tokens import dense_tokens_triton
from quantspec.kernels.encode import encode_oldest_groups

def encode(place, tokens, groups):
    half, dim, slots, row = 64, 64, 261, slice(place, place + 1)
    plane = torch.zeros(1, 2, 40, half, dim, dtype=torch.uint8)
    scales, token_scales = (torch.zeros(1, 2, 40, *shape, dtype=torch.float16) for shape in ((dim,), (2 * half, 1)))
    recent = torch.zeros(3, 2, slots, dim, dtype=torch.bfloat16)[row]
    lengths = torch.zeros(3, dtype=torch.int64)[row]
    table = torch.zeros(3, groups, dtype=torch.int32)[row]
    new = torch.zeros(1, 2, tokens, dim, dtype=torch.bfloat16)
    cache = recent, recent, plane, plane, scales, scales, plane, plane, token_scales, token_scales
    encode_oldest_groups((new, new, torch.tensor([tokens])), *cache, lengths, lengths, table)

with compiled_for(90) as kernels:
    for place, tokens, groups in ((0, 1, 32), (1, 1, 33), (2, 1024, 34), (1, 1000, 1), (0, 4096, 33)):
        encode(place, tokens, groups)
print(len(set(map(id, kernels))), len(kernels))

# The same, with other lengths in the planes and beside them, and windows.
def later_chunk(place, tokens, groups, recent, first):
    half, dim, slots = 64, 64, 261
    plane = torch.zeros(1, 2, 40, half, dim, dtype=torch.uint8)
    scales, token_scales = (torch.zeros(1, 2, 40, *shape, dtype=torch.float16) for shape in ((dim,), (2 * half, 1)))
    buffer = torch.zeros(3, 2, slots, dim, dtype=torch.bfloat16)
    table = torch.zeros(3, groups + 1, dtype=torch.int32)
    new = torch.zeros(3, tokens, 2, dim, dtype=torch.bfloat16).transpose(1, 2)[place]
    quantized = groups * 2 * half
    planes = (plane, plane, scales, scales, plane, plane, token_scales, token_scales)
    where = (first, quantized + recent, place, quantized, torch.bfloat16, planes, (buffer, buffer), table)
    dense_tokens_triton(new, new, *where)

with compiled_for(90) as kernels:
    for case in ((0, 1, 1, 1, 0), (1, 16, 16, 130, 0), (2, 1024, 31, 255, 1), (1, 1000, 2, 128, 300), (0, 7, 0, 5, 0)):
        later_chunk(*case)
print(len(set(map(id, kernels))), len(kernels))
"""


def launched_kernels() -> set[str]:
    """Names of all kernels that the library launches."""
    sources = [path.read_text() for path in (ROOT / "kernels").glob("*.py")]
    return {name for source in sources for name in re.findall(r"(\w+_kernel)\[", source)}


def loaded(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kernel_compiles_for_the_newest_generation(tmp_path: Path) -> None:
    """Few cases launch every kernel. The other generations take as long again, each: ``.ci/run`` compiles for them."""
    out = tmp_path / "kernels.json"
    command = [sys.executable, SCRIPT, "--few", "120", "--out", out]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())
    assert {row["capability"] for row in rows} == {120}
    assert {row["kernel"] for row in rows} == launched_kernels()
    assert all(row["instructions"] > 10 and row["registers"] > 0 for row in rows)
    # Attention and INT4 linears overlap with what precedes them.
    assert any(row["overlaps"] for row in rows)
    assert all(row["fuses"] for row in rows)


def test_one_compilation_serves_prompts_of_any_length_in_any_place() -> None:
    """Each takes seconds, in which all requests of an engine wait."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPTS],
        env=environment | {"PYTHONPATH": str(SCRIPT.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    encoding, later_chunks = result.stdout.splitlines()
    # What encodes and, for keys and for values, what moves the rest: three launches for each prompt.
    assert encoding == "2 15"
    # One for each chunk.
    assert later_chunks == "1 5"


@pytest.mark.parametrize(
    ("row", "ptx", "capability", "expected"),
    [
        ({"shared_bytes": 99 * 1024, "overlaps": False}, "", 89, []),
        ({"shared_bytes": 99 * 1024 + 1, "overlaps": False}, "", 120, ["takes 101377 bytes of shared memory of 99 KB"]),
        ({"shared_bytes": 0, "overlaps": True}, "griddepcontrol.wait;", 90, []),
        ({"shared_bytes": 0, "overlaps": True}, "", 86, ["overlaps launches, which needs compute capability 9.0"]),
        ({"shared_bytes": 0, "overlaps": False}, "griddepcontrol.wait;", 80, ["overlaps launches, which needs"]),
        ({"shared_bytes": 0, "overlaps": False, "fuses": False}, "", 90, ["multiplies and adds by two instructions"]),
    ],
)
def test_what_a_generation_lacks_is_a_fault(row: dict, ptx: str, capability: int, expected: list[str]) -> None:
    found = list(loaded(SCRIPT).faults({"fuses": True} | row, {"ptx": ptx, "ttgir": ""}, capability))
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


@pytest.mark.parametrize(("depth", "is_fault"), [(16, True), (32, False)])
def test_products_shorter_than_their_threads_hold_are_a_fault(depth: int, is_fault: bool) -> None:
    left, right = (f"#ttg.dot_op<{{opIdx = {at}, parent = #mma, kWidth = 8}}>" for at in (0, 1))
    types = f"tensor<16x{depth}xf16, {left}> * tensor<{depth}x32xf16, {right}> -> tensor<16x32xf32, #mma>"
    line = f"%s = tt.dot %a, %b, %c : {types}"
    row = {"shared_bytes": 0, "overlaps": False, "fuses": True}
    found = list(loaded(SCRIPT).faults(row, {"ptx": "", "ttgir": line}, 90))
    assert [text.startswith("sums 16 products") for text in found] == [True] * is_fault


def test_the_page_tells_what_was_compiled() -> None:
    page = loaded(ROOT / "docs" / "supported_hardware.py")
    rows = json.loads(page.RESULTS.read_text())
    assert page.PAGE.read_text() == page.render(rows)
    limits = {capability: limit for capability, (_, limit) in page.GENERATIONS.items()}
    assert limits == loaded(SCRIPT).SHARED_KB
