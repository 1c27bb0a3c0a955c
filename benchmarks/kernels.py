"""Times of the custom ops' CUDA kernels: ``python -m benchmarks.kernels --out DIR`` writes ``kernels.json`` and a plot.

Every op is captured in a CUDA graph that rotates among enough sets of inputs to pass the L2 cache, and the median over
replays is reported. Baselines in the same run: SDPA FlashAttention on float16 K/V (``enable_gqa``), and for the linear
bfloat16 cuBLAS and torch's tinygemm. The floor is the bytes an op must move over the measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantspec.cache import LayerCache
from quantspec.capture import CapturedLayer
from quantspec.evals.environment import current_commit
from quantspec.kernels import cached_attention, flush, int4_linear
from quantspec.kernels.cache_layout import CACHE_PARTS, part_names
from quantspec.kernels.encode import encode_oldest_groups
from quantspec.passes import Role, cache_parts

from .common import LOG, print_progress
from .plot_kernels import plot

HEAD_DIM, GROUP = 128, 128
LAYOUTS = [(32, 32), (32, 8), (28, 4), (64, 8)]
CONTEXTS = [4096, 16384, 32768, 65536, 131072, 262144]
LINEAR_SHAPES = [(4096, 14336), (14336, 4096), (4096, 4096), (4096, 1024)]
L2_BYTES = 50 * 2**20
# Launching a graph takes some microseconds, which a shorter one would add to its kernels.
GRAPH_US = 1000
# Of the device's memory, for all the sets of one case.
MEMORY_BYTES = 60 * 2**30


@dataclass(frozen=True)
class Cases:
    """Shapes to measure; the defaults are those of the published tables.

    Attributes:
        layouts: query and key/value heads.
        contexts: tokens attended to.
        batches: sequences.
        linears: input and output channels.
        rows: of the linears' input.
        groups: input channels that share a scale.
        pools: sequences and tokens of each that are attended to out of a pool, by the first layout.
    """

    layouts: Sequence[tuple[int, int]] = tuple(LAYOUTS)
    contexts: Sequence[int] = tuple(CONTEXTS)
    batches: Sequence[int] = (1, 8)
    linears: Sequence[tuple[int, int]] = tuple(LINEAR_SHAPES)
    rows: Sequence[int] = (1, 8, 16)
    groups: Sequence[int] = (128, 64, 32)
    pools: Sequence[tuple[int, int]] = ((1, 131072), (8, 4096), (8, 32768))


# One layer of Llama-3.1-8B.
QUICK = Cases(
    layouts=((32, 8),),
    contexts=(32768,),
    batches=(1,),
    linears=((4096, 14336),),
    rows=(1, 8),
    groups=(128,),
    pools=((8, 32768),),
)


def capture(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph that makes each call in turn; they have been made before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay, the graph's own launch included."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1000


def measure(calls: Sequence[Callable[[], Any]], replays: int = 20) -> dict[str, float]:
    """Median, 10% and 90% quantiles in microseconds per call, over replays of a graph that makes each call in turn.

    The calls are repeated until the graph takes about :data:`GRAPH_US`.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    once = capture(calls)
    replay_us(once)
    many = [*calls] * max(1, round(GRAPH_US / replay_us(once)))
    graph = capture(many)
    for _ in range(2):
        replay_us(graph)
    times = [replay_us(graph) / len(many) for _ in range(replays)]
    quantiles = torch.tensor(times).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return dict(zip(("p10_us", "median_us", "p90_us"), quantiles, strict=True))


def copy_bandwidth() -> float:
    """GB/s read plus written by the faster of torch's two device copies of 2 GiB."""
    source = torch.randint(0, 2**30, (2**29,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    copies = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    return 2 * source.nbytes / min(measure([copy])["median_us"] for copy in copies) / 1e3


def random_cache(heads: int, kv_heads: int, batch: int, context: int, dtype: torch.dtype) -> LayerCache:
    """One layer's cache of random codes, with room for ``context`` tokens in the planes."""
    layer = CapturedLayer("", heads, kv_heads, HEAD_DIM, HEAD_DIM, 0, 0.0, False)
    cache = LayerCache.allocate(layer, batch, context // GROUP, GROUP, 2 * GROUP + 8, dtype, "cuda")
    for part, tensor in zip(CACHE_PARTS, cache.parts(), strict=True):
        if part.kind == "recent":
            tensor.normal_()
        elif part.kind != "scales":
            tensor.random_(0, 256)
    for scale, zero in ((cache.k_scale, cache.k_zero), (cache.v_scale, cache.v_zero)):
        scale.uniform_(0.2, 0.4)
        zero.copy_(-8 * scale)
    return cache


def attention_inputs(heads: int, kv_heads: int, tokens: int, batch: int, context: int) -> list[Any]:
    """Arguments of ``quantspec::cached_attention`` with ``context`` tokens in the planes and 192 in the recent buffer.

    With more than one token both planes are given: the target's verification.
    """
    cache = random_cache(heads, kv_heads, batch, context, torch.float16)
    read = cache_parts(Role.TARGET if tokens > 1 else Role.DRAFT)
    query = torch.randn(batch, heads, tokens, HEAD_DIM, device="cuda").half()
    key, value = (torch.randn(batch, kv_heads, tokens, HEAD_DIM, device="cuda").half() for _ in range(2))
    quantized = torch.full((batch,), context, device="cuda")
    return [
        *(query, key, value),
        *(getattr(cache, name) if name in read else None for name in part_names()),
        *(quantized, quantized + 192, HEAD_DIM**-0.5, 0, 0.0, None),
    ]


def pooled_inputs(
    heads: int, kv_heads: int, tokens: int, batch: int, context: int
) -> tuple[list[Any], dict[str, Tensor]]:
    """The same over a pool of as many groups, in no order, and the table that names them."""
    own = attention_inputs(heads, kv_heads, tokens, batch, GROUP)
    pool = attention_inputs(heads, kv_heads, tokens, 1, batch * context)
    planes = {3 + index for index, part in enumerate(CACHE_PARTS) if part.kind != "recent"}
    arguments = [
        theirs if place in planes else ours for place, (ours, theirs) in enumerate(zip(own, pool, strict=True))
    ]
    quantized = torch.full((batch,), context, device="cuda")
    arguments[-6:-4] = quantized, quantized + 192
    table = torch.randperm(batch * context // GROUP, dtype=torch.int32, device="cuda").view(batch, -1)
    return arguments, {"block_table": table}


def num_bytes(arguments: list[Any]) -> int:
    """Bytes of all tensors among the arguments."""
    return sum(x.nbytes for x in arguments if isinstance(x, Tensor))


def rotation(size: int) -> int:
    """Sets of ``size`` bytes that together are twice the L2 cache, as far as memory goes."""
    return max(1, min(2 + 2 * L2_BYTES // size, MEMORY_BYTES // size))


def attention_rows(cases: Cases) -> Iterator[dict[str, Any]]:
    """Draft (1 token, INT4) and verify (7 tokens, INT8) attention beside FlashAttention, over layouts and contexts."""
    for batch in cases.batches:
        for heads, kv_heads in cases.layouts:
            for context in cases.contexts:
                for op, tokens in (("draft_attention", 1), ("verify_attention", 7)):
                    shape = {"op": op, "heads": heads, "kv_heads": kv_heads, "tokens": tokens}
                    shape |= {"batch": batch, "context": context, "dtype": "float16"}
                    first = attention_inputs(heads, kv_heads, tokens, batch, context)
                    size = num_bytes(first)
                    sets = [first]
                    for _ in range(rotation(size) - 1):
                        sets.append(attention_inputs(heads, kv_heads, tokens, batch, context))
                    yield (
                        shape
                        | {"implementation": "quantspec", "bytes": size}
                        | measure([functools.partial(cached_attention, *arguments) for arguments in sets])
                    )
                    del first, sets
                    dense = (batch, kv_heads, context, HEAD_DIM)
                    size = 4 * batch * kv_heads * context * HEAD_DIM
                    if size > MEMORY_BYTES:
                        continue
                    query = torch.randn(batch, heads, tokens, HEAD_DIM, device="cuda").half()
                    pairs = [
                        [torch.empty(dense, dtype=torch.float16, device="cuda").normal_() for _ in range(2)]
                        for _ in range(rotation(size))
                    ]
                    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                        yield (
                            shape
                            | {"implementation": "flash_attention", "bytes": size}
                            | measure(
                                [
                                    functools.partial(F.scaled_dot_product_attention, query, k, v, enable_gqa=True)
                                    for k, v in pairs
                                ]
                            )
                        )


def pool_rows(cases: Cases) -> Iterator[dict[str, Any]]:
    """Attention out of planes of each sequence's own beside that out of a pool, through a table."""
    heads, kv_heads = cases.layouts[0]
    for batch, context in cases.pools:
        for op, tokens in (("draft_attention", 1), ("verify_attention", 5)):
            shape = {"op": op, "heads": heads, "kv_heads": kv_heads, "tokens": tokens}
            shape |= {"batch": batch, "context": context, "dtype": "float16"}
            count = rotation(num_bytes(attention_inputs(heads, kv_heads, tokens, batch, context)))
            for implementation in ("own planes", "pool"):
                sets = []
                for _ in range(count):
                    if implementation == "pool":
                        arguments, table = pooled_inputs(heads, kv_heads, tokens, batch, context)
                    else:
                        arguments, table = attention_inputs(heads, kv_heads, tokens, batch, context), {}
                    sets.append(functools.partial(cached_attention, *arguments, **table))
                yield shape | {"implementation": implementation} | measure(sets)
                del sets


def linear_rows(cases: Cases) -> Iterator[dict[str, Any]]:
    """INT4 linear beside bfloat16 cuBLAS and torch's tinygemm kernel."""
    for in_features, out_features in cases.linears:
        for rows in cases.rows:
            for group in cases.groups:
                shape = {"op": "int4_linear", "in_features": in_features, "out_features": out_features, "rows": rows}
                shape |= {"group": group, "dtype": "bfloat16"}
                x = torch.randn(rows, in_features, dtype=torch.bfloat16, device="cuda")
                count = rotation(in_features * out_features // 2)
                data = [
                    torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8, device="cuda")
                    for _ in range(count)
                ]
                parameters = torch.randn(in_features // group, out_features, 2, dtype=torch.bfloat16, device="cuda")
                scales = [parameters.clone() for _ in range(count)]
                size = data[0].nbytes + scales[0].nbytes
                yield (
                    shape
                    | {"implementation": "quantspec", "bytes": size}
                    | measure(
                        [functools.partial(int4_linear, x, q, s, None) for q, s in zip(data, scales, strict=True)]
                    )
                )
                packed = [torch.ops.aten._convert_weight_to_int4pack(q, 8) for q in data]
                tinygemm = torch.ops.aten._weight_int4pack_mm
                yield (
                    shape
                    | {"implementation": "tinygemm", "bytes": size}
                    | measure(
                        [functools.partial(tinygemm, x, q, group, s) for q, s in zip(packed, scales, strict=True)]
                    )
                )
                if group == 128:
                    weights = [
                        torch.randn(out_features, in_features, dtype=torch.bfloat16, device="cuda")
                        for _ in range(max(2, count // 4))
                    ]
                    yield (
                        shape
                        | {"implementation": "cublas_bfloat16", "bytes": weights[0].nbytes}
                        | measure([functools.partial(F.linear, x, weight) for weight in weights])
                    )


def encode_rows() -> Iterator[dict[str, Any]]:
    """Prefill encoding of a whole layer, and the flush of one group where it is due and where it is not."""
    heads, kv_heads, context = 32, 8, 131072
    shape = {"heads": heads, "kv_heads": kv_heads, "batch": 1, "context": context, "dtype": "bfloat16"}
    layer = random_cache(heads, kv_heads, 1, context, torch.bfloat16)
    cache = layer.parts()
    key, value = (
        torch.randn(1, context + 192, kv_heads, HEAD_DIM, device="cuda").bfloat16().transpose(1, 2) for _ in range(2)
    )
    none, new = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.full((1,), context + 192, device="cuda")
    size = (
        key.nbytes + value.nbytes + num_bytes([getattr(layer, name) for name in part_names("upper", "lower", "scales")])
    )
    yield (
        shape
        | {"op": "encode", "implementation": "quantspec", "bytes": size}
        | measure([lambda: encode_oldest_groups((key, value, new), *cache, none, none)])
    )
    quantized = torch.full((1,), context - 2 * GROUP, device="cuda")
    for op, recent in (("flush_due", 2 * GROUP), ("flush_not_due", GROUP)):
        calls = [functools.partial(flush, *cache, quantized, quantized + recent)]
        yield shape | {"op": op, "implementation": "quantspec"} | measure(calls)


def measured_rows(cases: Cases, commit: str | None = None) -> Iterator[dict[str, Any]]:
    """Every op, with its floor and the environment; ``commit`` to record is this checkout's if None."""
    LOG.info("copy bandwidth")
    bandwidth = copy_bandwidth()
    environment = {
        "device": torch.cuda.get_device_name(),
        "date": f"{date.today():%Y-%m-%d}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or current_commit(),
        "copy_gb_per_s": round(bandwidth, 1),
    }
    LOG.debug(environment)
    for rows in (linear_rows(cases), encode_rows(), attention_rows(cases), pool_rows(cases)):
        for row in rows:
            if "bytes" in row:
                row["floor_us"] = round(row["bytes"] / bandwidth / 1e3, 2)
            LOG.info(" ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
            yield row | environment
        torch.cuda.empty_cache()


def main() -> None:
    """Measure everything and write ``kernels.json`` and ``kernels.svg``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for kernels.json and kernels.svg")
    parser.add_argument("--commit", help="commit to record; by default that of this checkout")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    print_progress()
    rows = []
    for row in measured_rows(Cases(), options.commit):
        rows.append(row)
        (options.out / "kernels.json").write_text(json.dumps(rows, indent=1))
    plot(rows, options.out / "kernels.svg")


if __name__ == "__main__":
    main()
