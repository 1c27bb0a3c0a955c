"""Compile every Triton kernel for every supported generation of GPUs, without one.

    python .ci/compile_kernels.py [--generations 80 90] [--few 100] [--out FILE]

The launchers run as they do on a GPU of the generation, on tensors without storage, and Triton compiles what they would
launch. Fails where a kernel does not compile, takes more shared memory than a block may have, or where it or its launch
uses what the generation lacks. With ``--out`` it also disassembles every kernel, which takes a third of the time, and
writes its registers, shared memory, spilled bytes and instructions.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from quantspec.kernels.cached_attention_triton import cached_attention_triton
from quantspec.kernels.choose_pages import choose_pages_triton
from quantspec.kernels.cut_off import cut_off_triton
from quantspec.kernels.dense_tokens import dense_tokens_triton
from quantspec.kernels.encode import encode_oldest_groups
from quantspec.kernels.expert_linear import expert_linear_triton, int4_expert_linear_triton
from quantspec.kernels.hierarchical import num_value_groups
from quantspec.kernels.inline_asm import launches_overlap
from quantspec.kernels.int4_linear import int4_fused_linear_triton, int4_linear_to_norm_triton, int4_linear_triton
from quantspec.kernels.int4_outputs import SQUARES
from quantspec.kernels.linears import gated_linears_triton, linears_triton
from quantspec.kernels.pages import PAGE_TOKENS
from quantspec.kernels.rank_sums_triton import Inbox, sum_rows
from quantspec.kernels.stretches_triton import DeviceLimits

# Shared memory that a block may have, in KB: CUDA's programming guide, technical specifications.
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
GROUP = 128
_LAUNCHERS = (
    "cached_attention_triton",
    "latent_attention_triton",
    "int4_linear",
    "linears",
    "encode",
    "expert_linear",
    "rank_sums_triton",
)
# How many products a warp's instruction sums, and how many neighbours of them a thread holds. Triton 3.6 makes it eight
# where codes of a byte are joined, also where fewer than 32 are summed.
_PRODUCT = re.compile(r"tt\.dot .*: tensor<\d+x(\d+)x\w+, #ttg\.dot_op<{opIdx = 0, [^}]*kWidth = (\d+)")
_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


class Generation:
    """The active driver of Triton, for compiling only."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device.
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(
    heads: int, kv_heads: int, dim: int, tokens: int, lower: bool, dtype: torch.dtype, **options: Any
) -> Callable:
    """A call of cached attention over 32k tokens, of one sequence."""
    groups, parts = 32768 // GROUP, num_value_groups(dim)
    plane = (1, kv_heads, groups, GROUP // 2, dim)
    recent = (1, kv_heads, 2 * GROUP + 8, dim)
    upper = {name: empty(*plane, dtype=torch.uint8) for name in ("k_upper", "v_upper")}
    arguments: dict[str, Any] = {
        "query": empty(1, heads, tokens, dim, dtype=dtype),
        "key": empty(1, kv_heads, tokens, dim, dtype=dtype),
        "value": empty(1, kv_heads, tokens, dim, dtype=dtype),
        "k_recent": empty(*recent, dtype=dtype),
        "v_recent": empty(*recent, dtype=dtype),
        "k_upper": upper["k_upper"],
        "k_lower": upper["k_upper"] if lower else None,
        "k_scale": empty(1, kv_heads, groups, dim, dtype=torch.float16),
        "k_zero": empty(1, kv_heads, groups, dim, dtype=torch.float16),
        "v_upper": upper["v_upper"].transpose(-1, -2).contiguous().transpose(-1, -2),
        "v_lower": upper["v_upper"].transpose(-1, -2).contiguous().transpose(-1, -2) if lower else None,
        "v_scale": empty(1, kv_heads, groups, GROUP, parts, dtype=torch.float16),
        "v_zero": empty(1, kv_heads, groups, GROUP, parts, dtype=torch.float16),
        "quantized_len": empty(1, dtype=torch.int64),
        "length": empty(1, dtype=torch.int64),
        "scale": dim**-0.5,
        "window": 0,
        "softcap": 0.0,
        "sinks": None,
    }
    rotary = options.pop("rotary", 0)
    if rotary:
        table = empty(1, tokens, rotary, dtype=dtype)
        arguments |= {"cos": table, "sin": table, "rotary_dim": rotary}
    if options.pop("scored", False):
        options["page_scores"] = empty(1, kv_heads, 32768 // PAGE_TOKENS, dtype=torch.float32)
    if options.pop("sparse", False):
        options["chosen_pages"] = empty(1, kv_heads, 52, dtype=torch.int32)
        options["num_chosen"] = empty(1, kv_heads, 2, dtype=torch.int32)
    latent = options.pop("latent", 0)
    if latent:
        # Values are the first channels of keys.
        stored = ("v_recent", "v_upper", "v_lower", "v_scale", "v_zero")
        arguments |= {name: x[..., :0] for name in stored if (x := arguments[name]) is not None}
        arguments["value"] = arguments["key"][..., :latent]
    if options.pop("pool", False):
        options["block_table"] = empty(1, groups, dtype=torch.int32)
    return lambda: cached_attention_triton(**(arguments | options))


def linear(rows: int, out_features: int, in_features: int, group: int, dtype: torch.dtype) -> Callable:
    data = empty(out_features, in_features // 2, dtype=torch.uint8)
    return lambda: int4_linear_triton(
        empty(rows, in_features, dtype=dtype), data, empty(in_features // group, out_features, 2, dtype=dtype), None
    )


def layer(rows: int, hidden: int = 4096, inner: int = 14336, qkv: int = 6144) -> Callable:
    """The linears of a draft's layer whose norms have no launches."""

    def weights(out_features: int, in_features: int) -> tuple[Tensor, Tensor, None]:
        codes = empty(out_features, in_features // 2, dtype=torch.uint8)
        return codes, empty(in_features // GROUP, out_features, 2), None

    def call() -> None:
        x, wide, squares = empty(rows, hidden), empty(rows, inner), empty(hidden // SQUARES, rows, dtype=torch.float32)
        int4_linear_to_norm_triton(x, *weights(hidden, hidden), x, empty(hidden))
        int4_fused_linear_triton(x, *weights(2 * inner, hidden), None, "silu", True, squares, 1e-5)
        int4_linear_to_norm_triton(wide, *weights(hidden, inner), x, empty(hidden))
        int4_fused_linear_triton(x, *weights(qkv, hidden), None, "", True, squares, 1e-5)

    return call


def shared_input(rows: int, *sizes: int) -> Callable:
    """Linears of one input, and one that is read alone."""

    def call() -> None:
        linears_triton(empty(rows, 4096), [empty(size, 4096) for size in sizes], [])
        linears_triton(empty(rows, 4096), [empty(sizes[0], 4096)], [])

    return call


def gates() -> Callable:
    """Of few rows, and of more than the kernel multiplies."""

    def call() -> None:
        for rows in (1, 6, 9):
            gated_linears_triton(empty(rows, 4096), [empty(14336, 4096)] * 2, [], "silu")

    return call


def encode(dim: int, latent: bool = False) -> Callable:
    """A flush, and a prefill, of two heads; of a latent, values are not stored."""
    heads, groups, parts = 2, 8, num_value_groups(dim)
    plane = empty(1, heads, groups, GROUP // 2, dim, dtype=torch.uint8)
    scales = empty(1, heads, groups, dim, dtype=torch.float16)
    token_scales = empty(1, heads, groups, GROUP, parts, dtype=torch.float16)
    recent, lengths = empty(1, heads, 2 * GROUP + 8, dim), empty(1, dtype=torch.int64)
    values = (plane, plane, token_scales, token_scales)
    if latent:
        values = tuple(x[..., :0] for x in values)
    cache = (recent, recent[..., :0] if latent else recent, plane, plane, scales, scales, *values)
    new = empty(1, heads, 500, dim)

    def call() -> None:
        encode_oldest_groups(None, *cache, lengths, lengths)
        encode_oldest_groups((new, new, lengths), *cache, lengths, lengths)
        encode_oldest_groups(None, *cache, lengths, lengths, empty(1, groups, dtype=torch.int32))

    return call


def later_chunk(dim: int, dtype: torch.dtype, latent: bool = False) -> Callable:
    """What a prompt's later chunk reads, of two heads: all of it, the end of it, and all of it out of a pool."""
    heads, groups, parts = 2, 8, num_value_groups(dim)
    plane = empty(2, heads, groups, GROUP // 2, dim, dtype=torch.uint8)
    scales = empty(2, heads, groups, dim, dtype=torch.float16)
    token_scales = empty(2, heads, groups, GROUP, parts, dtype=torch.float16)
    tokens_adjacent = plane.transpose(-1, -2).contiguous().transpose(-1, -2)
    values = (tokens_adjacent, tokens_adjacent, token_scales, token_scales)
    recent = empty(2, heads, 2 * GROUP + 8, dim, dtype=dtype)
    recents = (recent, recent[..., :0] if latent else recent)
    if latent:
        values = tuple(x[..., :0] for x in values)
    new = empty(2, 500, heads, dim, dtype=dtype).transpose(1, 2)[1]
    cached = (dtype, (plane, plane, scales, scales, *values), recents)

    def call() -> None:
        for first in (0, 777):
            dense_tokens_triton(new, new, first, groups * GROUP + 130, 1, groups * GROUP, *cached, None)
        table = empty(2, groups, dtype=torch.int32)
        dense_tokens_triton(new, new, 0, groups * GROUP + 130, 1, groups * GROUP, *cached, table)

    return call


def experts(dtype: torch.dtype) -> Callable:
    x, ids = empty(6, 256, dtype=dtype), empty(6, dtype=torch.int64)
    weight = empty(4, 512, 256, dtype=dtype)
    data, numbers = empty(4, 512, 128, dtype=torch.uint8), empty(4, 2, 512, 2, dtype=dtype)

    def call() -> None:
        expert_linear_triton(x, ids, weight, None, False)
        expert_linear_triton(x, ids, weight.transpose(1, 2).contiguous(), None, True)
        int4_expert_linear_triton(x, ids, data, numbers, None)

    return call


def choice() -> Callable:
    """Of pages for 32 layers of 8 heads."""
    scores, chosen = empty(256, 2048, dtype=torch.float32), empty(256, 205, dtype=torch.int32)
    rows, lengths = empty(256, dtype=torch.int64), empty(1, dtype=torch.int64)
    return lambda: choose_pages_triton(scores, chosen, empty(256, 2, dtype=torch.int32), rows, lengths, 6554, 8)


def cut_offs(rows: int, vocab: int) -> Callable:
    scores, limit = empty(rows, vocab, dtype=torch.float32), empty(rows, 1, dtype=torch.float32)

    def call() -> None:
        for typical in (False, True):
            cut_off_triton(scores, limit, typical, 1, float("-inf"))

    return call


def rank_sums(rows: int, width: int, world: int, dtype: torch.dtype) -> Callable:
    """What ranks send each other, with the norm behind it; and the norm alone."""
    x, weight = empty(rows, width, dtype=dtype), empty(width, dtype=dtype)
    addresses, counts = empty(world, dtype=torch.int64), empty(64, dtype=torch.int32)
    inbox = Inbox(empty(8, dtype=torch.int64), addresses, counts, empty(1, dtype=torch.int32), 1)

    def call() -> None:
        sum_rows(x, x, weight, 1e-5, inbox)
        sum_rows(x, None, None, 0.0, inbox)
        sum_rows(x, None, weight, 1e-5, None)

    return call


HALF, BFLOAT = torch.float16, torch.bfloat16
CASES: dict[str, Callable[[], Callable]] = {
    "draft 32/8 of 128": lambda: attention(32, 8, 128, 1, False, BFLOAT, rotary=128),
    "verification 32/8 of 128": lambda: attention(32, 8, 128, 6, True, BFLOAT, rotary=128),
    "verification 9/3 of 64, window, soft cap": lambda: attention(
        9, 3, 64, 6, True, HALF, rotary=32, interleaved=True, window=500, softcap=30.0, sinks=empty(9)
    ),
    "sparse draft 32/8 of 128": lambda: attention(32, 8, 128, 1, False, BFLOAT, rotary=128, sparse=True),
    "sparse draft 48/1 of 64, window": lambda: attention(48, 1, 64, 1, False, HALF, sparse=True, window=500),
    "scored verification 32/8 of 128": lambda: attention(32, 8, 128, 6, True, BFLOAT, rotary=128, scored=True),
    "scored verification 9/3 of 64, window, sinks": lambda: attention(
        9, 3, 64, 16, True, HALF, window=500, sinks=empty(9), scored=True
    ),
    "choice of pages": choice,
    "draft 32/8 of 128 out of a pool": lambda: attention(32, 8, 128, 1, False, BFLOAT, rotary=128, pool=True),
    "scored verification 32/8 of 128 out of a pool": lambda: attention(
        32, 8, 128, 6, True, BFLOAT, rotary=128, scored=True, pool=True
    ),
    "sparse draft 32/8 of 128 out of a pool": lambda: attention(
        32, 8, 128, 1, False, BFLOAT, rotary=128, sparse=True, pool=True
    ),
    "verification 8/4 of 256": lambda: attention(8, 4, 256, 6, True, BFLOAT, rotary=256),
    "draft 16/1 of 512": lambda: attention(16, 1, 512, 1, False, BFLOAT, rotary=128),
    "scored verification 16/1 of 512": lambda: attention(16, 1, 512, 6, True, BFLOAT, rotary=128, scored=True),
    "verification 8/2 of 128, float32": lambda: attention(8, 2, 128, 6, True, torch.float32),
    "draft 8/4 of 80, float32": lambda: attention(8, 4, 80, 1, False, torch.float32),
    "draft 128/1 of a latent of 512 and 64": lambda: attention(128, 1, 576, 1, False, BFLOAT, latent=512),
    "verification 128/1 of a latent of 512 and 64": lambda: attention(128, 1, 576, 6, True, BFLOAT, latent=512),
    "verification 16/1 of a latent of 224 and 64, float32": lambda: attention(
        16, 1, 288, 6, True, torch.float32, latent=224, pool=True
    ),
    "verification 16/1 of a latent of 512 and 64, window": lambda: attention(
        16, 1, 576, 6, True, BFLOAT, latent=512, window=4096, softcap=30.0, sinks=empty(16)
    ),
    "draft 8/1 of a latent of 64 and 16": lambda: attention(8, 1, 80, 1, False, BFLOAT, latent=64),
    "verification 4/1 of a latent of 16 and 8": lambda: attention(4, 1, 24, 3, True, HALF, latent=16),
    "draft 4/2 of 16": lambda: attention(4, 2, 16, 1, False, BFLOAT),
    "scored verification 4/2 of 16, window": lambda: attention(4, 2, 16, 3, True, HALF, window=500, scored=True),
    "encoding of latents": lambda: encode(576, latent=True),
    "linear 1 row, 4096 to 14336": lambda: linear(1, 14336, 4096, 128, BFLOAT),
    "linear 16 rows, 4096 to 4096": lambda: linear(16, 4096, 4096, 128, BFLOAT),
    "linear 8 rows, 4096 to 1024, group 32": lambda: linear(8, 1024, 4096, 32, HALF),
    "layer of 1 row": lambda: layer(1),
    "layer of 32 rows": lambda: layer(32),
    "layer of 16 rows, 8192 wide": lambda: layer(16, 8192, 28672, 10240),
    "queries, keys and values of 6 rows": lambda: shared_input(6, 4096, 1024, 1024),
    "gates and factors": gates,
    "encoding of 128": lambda: encode(128),
    "later chunk of 128": lambda: later_chunk(128, BFLOAT),
    "later chunk of 80, float32": lambda: later_chunk(80, torch.float32),
    "later chunk of a latent of 512 and 64": lambda: later_chunk(576, HALF, latent=True),
    "experts": lambda: experts(BFLOAT),
    "cut-offs": lambda: cut_offs(5, 49152),
    "sums of 2 ranks, 4096 wide": lambda: rank_sums(6, 4096, 2, BFLOAT),
    "sums of 4 ranks, 8192 wide": lambda: rank_sums(1, 8192, 4, HALF),
    "sums of 2 ranks, 576 wide, float32": lambda: rank_sums(6, 576, 2, torch.float32),
}
# Few cases that launch every kernel.
_FEW = (
    "draft 32/8 of 128",
    # On 9.0 in wide tiles.
    "scored verification 32/8 of 128 out of a pool",
    "draft 8/1 of a latent of 64 and 16",
    "linear 1 row, 4096 to 14336",
    "linear 8 rows, 4096 to 1024, group 32",
    "encoding of 128",
    "later chunk of 128",
    "experts",
    "cut-offs",
    "queries, keys and values of 6 rows",
    "gates and factors",
    "choice of pages",
    "sums of 2 ranks, 4096 wide",
)


@contextmanager
def compiled_for(capability: int) -> Iterator[list[Any]]:
    """Within, launches are compiled for a generation and collected."""
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))
        return kernels[-1]

    def overlap(device: torch.device) -> bool:
        return launches_overlap.__wrapped__(torch.device("cuda"))

    # A multiprocessor has as much as a block may have, and 1 KB for the system.
    limits = DeviceLimits(132, (SHARED_KB[capability] + 1) * 1024, capability == 90)
    answers = {
        "use_inline_asm": lambda device: True,
        "launches_overlap": overlap,
        "device_limits": lambda device: limits,
    }
    device_says = mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(capability, 10))
    # As from Triton 3.10 on, so that a launch which does not ask for fused instructions is found.
    unasked = mock.patch.dict(os.environ, {"TRITON_DEFAULT_FP_FUSION": "0"})
    with mock.patch.object(JITFunction, "run", compile_only), device_says, unasked:
        modules = [importlib.import_module(f"quantspec.kernels.{name}") for name in _LAUNCHERS]
        patches = [
            mock.patch.object(module, name, answer)
            for module in modules
            for name, answer in answers.items()
            if hasattr(module, name)
        ]
        driver.set_active(Generation(capability))  # type: ignore[arg-type]
        for patch in patches:
            patch.start()
        try:
            yield kernels
        finally:
            for patch in patches:
                patch.stop()


def needs(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel asks of the device."""
    return {
        "kernel": kernel.metadata.name,
        "warps": kernel.metadata.num_warps,
        "shared_bytes": kernel.metadata.shared,
        "overlaps": bool(getattr(kernel.metadata, "launch_pdl", False)),
        "fuses": kernel.metadata.enable_fp_fusion,
    }


@functools.cache
def disassembled(kernel: Any) -> dict[str, int]:
    """What a compiled kernel takes besides."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run([_BIN / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True)
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", code.stdout, re.M)
    return {
        "registers": numbers["REG"],
        "spilled_bytes": numbers["STACK"] + numbers["LOCAL"],
        "spill_instructions": sum(name.startswith(("STL", "LDL")) for name in instructions),
        "instructions": len(instructions),
    }


def faults(row: dict[str, Any], asm: dict[str, str], capability: int) -> Iterator[str]:
    """What a generation cannot do of it, or Triton compiles wrongly."""
    if row["shared_bytes"] > SHARED_KB[capability] * 1024:
        yield f"takes {row['shared_bytes']} bytes of shared memory of {SHARED_KB[capability]} KB"
    if capability < 90 and (row["overlaps"] or "griddepcontrol" in asm["ptx"]):
        yield "overlaps launches, which needs compute capability 9.0"
    if not row["fuses"]:
        yield "multiplies and adds by two instructions"
    for depth, width in _PRODUCT.findall(asm["ttgir"]):
        if int(depth) < 4 * int(width):
            yield f"sums {depth} products where each of four threads holds {width}: some twice, others never"


def compile_case(capability: int, name: str, disassemble: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of every kernel of a case, and what is wrong."""
    try:
        with compiled_for(capability) as kernels:
            CASES[name]()()
    except Exception as error:
        return [], [f"sm_{capability}, {name}: {type(error).__name__}: {error}"]
    rows, wrong = [], []
    for kernel in kernels:
        row = {"capability": capability, "triton": triton.__version__, "case": name} | needs(kernel)
        rows.append(row | disassembled(kernel) if disassemble else row)
        texts = faults(row, kernel.asm, capability)
        wrong += [f"sm_{capability}, {name}, {row['kernel']}: {text}" for text in texts]
    return rows, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several: dict[str, Any] = {"type": int, "nargs": "+", "choices": list(SHARED_KB), "default": []}
    parser.add_argument("--generations", **several, help="all, where neither these nor few are named")
    parser.add_argument("--few", **several, help="generations of which few cases are compiled, with every kernel")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")
    # Case by case, so that no processor waits for the slowest generation.
    all_cases = options.generations if options.generations or options.few else list(SHARED_KB)
    jobs = [*itertools.product(all_cases, options.cases), *itertools.product(options.few, _FEW)]
    with ProcessPoolExecutor() as pool:
        results = list(pool.map(compile_case, *zip(*jobs, strict=True), itertools.repeat(options.out is not None)))
    rows = [row for rows, _ in results for row in rows]
    wrong = [text for _, texts in results for text in texts]
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{len(rows)} kernels for {len({*all_cases, *options.few})} generations, {len(wrong)} faults")
    for text in wrong:
        print(text, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
