"""The kernel of INT4 linears for one row, which is what a draft of one sequence has: integer products, no tensor cores.

Tensor cores multiply eight rows or none. For one row the weights' bytes alone should take time, so what is done to each
code must be little. Of every 32 inputs the kernel makes 16-bit integers, ``x[k] = unit * q[k]`` with the largest at
32,767, and sums ``code * q`` exactly by ``dp2a``: half an instruction a code, and a quarter to take codes out of their
bytes. An input keeps 15 bits less those by which the largest of its 32 exceeds it; bfloat16 has 8, float16 11.

A thread holds 32 neighbouring inputs and reads their codes, 16 bytes, of one output after another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .inline_asm import activated, load_inside, split_pair
from .int4_outputs import SQUARES, norm_factor, store_outputs
from .optional_triton import gdc_launch_dependents, gdc_wait, tl, triton

# Inputs that share a unit, whose codes fill a load of 16 bytes.
LANE = 32
_LANE = tl.constexpr(LANE)
# Steps over K that are written out: more run in a loop, so that the kernel fits into the instructions' cache.
UNROLLED_STEPS = 8

# 16 times the sum of the codes of four words with their integers: low nibbles of bytes are codes 0, 2, 4, 6 of a word,
# high ones, which count 16, are codes 1, 3, 5, 7.
_DOT_ASM = tl.constexpr(
    """
    {
    .reg .b32 low, high, even, odd;
    mov.b32 even, 0;
    mov.b32 odd, 0;
"""
    + "".join(
        f"""
    and.b32 low, ${1 + word}, 0x0f0f0f0f;
    and.b32 high, ${1 + word}, 0xf0f0f0f0;
    dp2a.lo.s32.u32 even, ${5 + 4 * word}, low, even;
    dp2a.hi.s32.u32 even, ${6 + 4 * word}, low, even;
    dp2a.lo.s32.u32 odd, ${7 + 4 * word}, high, odd;
    dp2a.hi.s32.u32 odd, ${8 + 4 * word}, high, odd;
"""
        for word in range(4)
    )
    + """
    mad.lo.s32 $0, even, 16, odd;
    }
    """
)
_DOT_CONSTRAINTS = tl.constexpr("=r" + ",r" * 20)


@triton.jit
def _halves(pair):
    """The two 16-bit integers in each int32, the lower one first."""
    return (pair << 16) >> 16, pair >> 16


@triton.jit
def _plain_dot(word, q):
    """What the assembly computes of one word and its four pairs."""
    first, second = _halves(q[0])
    third, fourth = _halves(q[1])
    even = (word & 15) * first + (word >> 8 & 15) * second + (word >> 16 & 15) * third + (word >> 24 & 15) * fourth
    first, second = _halves(q[2])
    third, fourth = _halves(q[3])
    odd = (word >> 4 & 15) * first + (word >> 12 & 15) * second + (word >> 20 & 15) * third + (word >> 28 & 15) * fourth
    return 16 * (even + odd)


@triton.jit
def _pairs(x, factor):
    """16-bit integers of eight inputs a lane, ``(LANES, 8)`` float32: 0 and 2, 4 and 6, 1 and 3, 5 and 7 as pairs."""
    # Adding 1.5 * 2^23 leaves the rounded integer in the lowest bits.
    q = (x * factor[:, None] + 12582912.0).to(tl.int32, bitcast=True)
    even, odd = tl.split(tl.reshape(q, (q.shape[0], 2, 2, 2)))
    first, second = tl.split(even)
    even = (first & 0xFFFF) | (second << 16)
    first, second = tl.split(odd)
    odd = (first & 0xFFFF) | (second << 16)
    even, even_high = tl.split(even)
    odd, odd_high = tl.split(odd)
    return even[None, :], even_high[None, :], odd[None, :], odd_high[None, :]


@triton.jit
def _inputs(x, first_k, K: tl.constexpr, LANES: tl.constexpr, EVEN_K: tl.constexpr):
    """Inputs from ``first_k`` on: 16 pairs, a 16th of the unit, and the sum of each lane, all ``(1, LANES)``."""
    lane_k = tl.arange(0, LANES)[:, None] * _LANE + first_k
    k = lane_k + tl.arange(0, 8)[None, :]
    inside = lane_k < K
    x0 = load_inside(x + k, inside, EVEN_K).to(tl.float32)
    x1 = load_inside(x + k + 8, inside, EVEN_K).to(tl.float32)
    x2 = load_inside(x + k + 16, inside, EVEN_K).to(tl.float32)
    x3 = load_inside(x + k + 24, inside, EVEN_K).to(tl.float32)
    largest = tl.max(tl.maximum(tl.maximum(tl.abs(x0), tl.abs(x1)), tl.maximum(tl.abs(x2), tl.abs(x3))), 1)
    largest = tl.maximum(largest, 1e-30)  # so that zeros have a finite factor
    factor = 32767 / largest
    unit = (largest * (1 / (16 * 32767)))[None, :]
    # By this alone an input that is no number reaches the outputs: a maximum may drop it.
    total = tl.sum(x0 + x1 + x2 + x3, 1)[None, :]
    a0, a1, a2, a3 = _pairs(x0, factor)
    b0, b1, b2, b3 = _pairs(x1, factor)
    c0, c1, c2, c3 = _pairs(x2, factor)
    d0, d1, d2, d3 = _pairs(x3, factor)
    return a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3, unit, total


@triton.jit
def _row_of(i, first, N, ROWS: tl.constexpr, GATED: tl.constexpr, GATE_FIRST: tl.constexpr):
    """Row of the weight at place ``i`` of a tile whose outputs begin at ``first``: of gates, then of their factors."""
    if GATED:
        in_second = (i < ROWS // 2) != GATE_FIRST
        return first + i % (ROWS // 2) + tl.where(in_second, N // 2, 0)
    else:
        return first + i


@triton.jit
def _weights(
    qdata,
    scale_and_zero,
    first,
    first_k,
    N,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    GATED: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Words ``(ROWS, LANES, 4)`` and pairs of scale and zero ``(ROWS, LANES)`` of a tile, from ``first_k`` on."""
    n = _row_of(tl.arange(0, ROWS), first, N, ROWS, GATED, GATE_FIRST)
    # Scales of neighbouring rows are neighbours: a thread loads those of several at once.
    SIDE: tl.constexpr = 4
    sz_n = tl.arange(0, ROWS // SIDE)[:, None, None] * SIDE + tl.arange(0, SIDE)[None, None, :]
    sz_n = _row_of(sz_n, first, N, ROWS, GATED, GATE_FIRST)
    if not EVEN_N:
        n = tl.minimum(n, N - 1)  # their results are not stored
        sz_n = tl.minimum(sz_n, N - 1)
    k = tl.arange(0, LANES) * _LANE + first_k
    at = qdata + n.to(tl.int64)[:, None, None] * (K // 8) + (k // 8)[None, :, None] + tl.arange(0, 4)[None, None, :]
    sz_at = scale_and_zero + (k // GROUP)[None, :, None] * N + sz_n
    inside = (k < K)[None, :, None]
    # Vectors follow the last axis; hints on the others only break ties, so that neighbouring threads are lanes. Where
    # rows end early, N is no multiple of 16, and loads of scales are scalar whatever the hint says.
    w = load_inside(tl.max_contiguous(at, [1, 2, 4]), inside, EVEN_K)
    sz = load_inside(tl.max_contiguous(sz_at, [1, 2, SIDE]), inside, EVEN_K)
    return w, tl.reshape(tl.permute(sz, (0, 2, 1)), (ROWS, LANES))


@triton.jit
def _add_tile(acc, w, sz, inputs, dtype: tl.constexpr, USE_ASM: tl.constexpr):
    """``acc (ROWS, LANES)`` and the products of a tile with the inputs that each lane has."""
    even, odd = tl.split(tl.reshape(w, (w.shape[0], w.shape[1], 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    q = inputs[:16]
    if USE_ASM:
        words = (w0, w1, w2, w3)
        words += q
        dot = tl.inline_asm_elementwise(_DOT_ASM, _DOT_CONSTRAINTS, words, dtype=tl.int32, is_pure=True, pack=1)
    else:
        dot = _plain_dot(w0, q[:4]) + _plain_dot(w1, q[4:8]) + _plain_dot(w2, q[8:12]) + _plain_dot(w3, q[12:])
    scale, zero = split_pair(sz, dtype)
    scale = scale.to(tl.float32)
    unit, total = inputs[16], inputs[17]
    return acc + scale * (dot.to(tl.float32) * unit - 8 * total) + zero.to(tl.float32) * total


@triton.jit
def _row_kernel(
    x,
    qdata,
    scale_and_zero,
    bias,
    residual,
    norm_weight,
    squares,
    out,
    scaled,
    new_squares,
    eps,
    N,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_PARTS: tl.constexpr,
    TO_NORM: tl.constexpr,
    dtype: tl.constexpr,
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """``TILES`` tiles of ``ROWS`` rows of the weight; a step takes ``LANES`` lanes of K.

    ``x`` is (K,), ``qdata`` (N, K/8) int32, ``scale_and_zero`` (K/GROUP, N) int32 pairs. The weights of one tile are on
    their way while those before it are multiplied, and the first ones before the kernels in front have ended.
    """
    STEP: tl.constexpr = LANES * _LANE
    STEPS: tl.constexpr = (K + STEP - 1) // STEP
    EVEN_K: tl.constexpr = STEPS * STEP == K
    GATED: tl.constexpr = ACTIVATION != ""
    OUTPUTS: tl.constexpr = ROWS // 2 if GATED else ROWS
    first = tl.program_id(0) * (TILES * OUTPUTS)
    if PDL:
        # No kernel writes weights: the next one may load its own while this one ends.
        gdc_launch_dependents()
    w, sz = _weights(qdata, scale_and_zero, first, 0, N, K, GROUP, ROWS, LANES, GATED, GATE_FIRST, EVEN_N, EVEN_K)
    if PDL:
        # Kernels before this one may still be writing x or reading what out reuses: touch neither earlier.
        gdc_wait()
    row = tl.full((1, 1), 0, tl.int32)
    norm = norm_factor(squares, row, 1, K, eps, PARTS, PADDED_PARTS)
    sums = ()
    for _ in tl.static_range(TILES):
        sums += (tl.zeros((ROWS, LANES), tl.float32),)  # type: ignore[assignment]
    if UNROLL:
        for step in tl.static_range(STEPS):
            inputs = _inputs(x, step * STEP, K, LANES, EVEN_K)
            added = ()
            for tile in tl.static_range(TILES):
                next_w, next_sz = w, sz
                if step * TILES + tile + 1 < STEPS * TILES:
                    next_w, next_sz = _weights(
                        qdata,
                        scale_and_zero,
                        first + (tile + 1) % TILES * OUTPUTS,
                        (step + (tile + 1) // TILES) * STEP,
                        N,
                        K,
                        GROUP,
                        ROWS,
                        LANES,
                        GATED,
                        GATE_FIRST,
                        EVEN_N,
                        EVEN_K,
                    )
                added += (_add_tile(sums[tile], w, sz, inputs, dtype, USE_ASM),)  # type: ignore
                w, sz = next_w, next_sz
            sums = added
    else:
        acc = sums[0]  # type: ignore[misc]
        for step in tl.range(0, STEPS):
            next_w, next_sz = _weights(
                qdata,
                scale_and_zero,
                first,
                tl.minimum(step + 1, STEPS - 1) * STEP,
                N,
                K,
                GROUP,
                ROWS,
                LANES,
                GATED,
                GATE_FIRST,
                EVEN_N,
                EVEN_K,
            )
            inputs = _inputs(x, step * STEP, K, LANES, EVEN_K)
            acc = _add_tile(acc, w, sz, inputs, dtype, USE_ASM)
            w, sz = next_w, next_sz
        sums = (acc,)  # type: ignore[assignment]
    width = N // 2 if GATED else N
    for tile in tl.static_range(TILES):
        y = tl.sum(sums[tile], 1)[:, None] * norm
        if HAS_BIAS:
            n = _row_of(tl.arange(0, ROWS)[:, None], first + tile * OUTPUTS, N, ROWS, GATED, GATE_FIRST)
            y += tl.load(bias + n, n < N, other=0).to(tl.float32)
        if GATED:
            gate, factor = tl.split(tl.permute(tl.reshape(y, (2, OUTPUTS, 1)), (1, 2, 0)))
            y = activated(gate, ACTIVATION) * factor
        n = first + tile * OUTPUTS + tl.arange(0, OUTPUTS)[:, None]
        store_outputs(
            y,
            n,
            row,
            first + tile * OUTPUTS,
            1,
            width,
            residual,
            norm_weight,
            out,
            scaled,
            new_squares,
            HAS_RESIDUAL,
            TO_NORM,
            dtype,
        )


class RowConfig(NamedTuple):
    """Launch of one shape: tiles of a program, and warps, which share out the inputs."""

    tiles: int
    warps: int


def row_config(out_features: int, in_features: int) -> RowConfig:
    """Configuration by shape, chosen on an H200 among eleven for the linears of eight shapes of models.

    Many outputs take one warp each, which needs no sum over warps; few fill the GPU by more of them, as far as there
    are inputs for all at once. Two tiles share the inputs' integers, where there are programs enough or short ones.
    """
    if out_features >= 14336:
        return RowConfig(2 if in_features <= 2048 else 1, 1)
    filled = triton.next_power_of_2(triton.cdiv(in_features, 32 * LANE))
    if out_features > 8192 and in_features <= 8192:
        return RowConfig(2, min(2, filled))
    if out_features > 4096 and in_features <= 4096:
        return RowConfig(2 if filled == 4 else 1, filled)
    if 4096 < out_features <= 6144 and in_features <= 8192:
        return RowConfig(2, 4)
    return RowConfig(1, min(8 if out_features <= 2048 else 4, filled))


def launch_row(
    x: Tensor,
    qdata: Tensor,
    scale_and_zero: Tensor,
    around: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
    eps: float,
    options: dict[str, Any],
) -> None:
    """Launch the kernel for one row; the tensors as :func:`_row_kernel` takes them, ``around`` from ``bias`` on."""
    out_features, in_features = qdata.shape[0], x.shape[-1]
    config = row_config(out_features, in_features)
    steps = triton.cdiv(in_features, 32 * LANE * config.warps)
    unroll = steps <= UNROLLED_STEPS
    tiles = config.tiles if unroll else 1
    gated = bool(options["ACTIVATION"])
    width = out_features // 2 if gated else out_features
    outputs = tiles * SQUARES // (2 if gated else 1)
    _row_kernel[(triton.cdiv(width, outputs),)](
        x,
        qdata,
        scale_and_zero,
        *around,
        *results,
        eps,
        out_features,
        ROWS=SQUARES,
        TILES=tiles,
        LANES=32 * config.warps,
        UNROLL=unroll,
        EVEN_N=width % outputs == 0,
        num_warps=config.warps,
        num_stages=1,
        **options,
    )
