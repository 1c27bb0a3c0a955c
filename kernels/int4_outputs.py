"""What the kernels of INT4 linears share around their sums: the factor of a norm, and the results with what follows."""

from __future__ import annotations

from .optional_triton import tl, triton

# Outputs whose squares are summed up together.
SQUARES = 8
_SQUARES = tl.constexpr(SQUARES)


@triton.jit
def norm_factor(squares, row, num_rows, K: tl.constexpr, eps, PARTS: tl.constexpr, PADDED_PARTS: tl.constexpr):
    """What normalizes each row, or 1, of the shape of ``row``."""
    if PARTS == 0:
        return tl.full(row.shape, 1, tl.float32)
    else:
        # Of many rows not all parts at once: they would take the registers that weights wait in.
        BLOCK: tl.constexpr = min(PADDED_PARTS, 4096 // row.shape[1])
        total = tl.zeros((row.shape[1],), tl.float32)
        for first in tl.range(0, PARTS, BLOCK):
            part = tl.arange(0, BLOCK)[:, None] + first
            total += tl.sum(tl.load(squares + part * num_rows + row, (part < PARTS) & (row < num_rows), other=0), 0)
        return tl.rsqrt(total / K + eps)[None, :]


@triton.jit
def store_outputs(
    y,
    n,
    row,
    first,
    num_rows,
    N,
    residual,
    norm_weight,
    out,
    scaled,
    new_squares,
    HAS_RESIDUAL: tl.constexpr,
    TO_NORM: tl.constexpr,
    dtype: tl.constexpr,
):
    """Outputs ``n``, from ``first`` on, of rows ``row``, with what follows; a multiple of :data:`SQUARES` to a norm."""
    inside = (row < num_rows) & (n < N)
    if HAS_RESIDUAL:
        y += tl.load(residual + row * N + n, inside, other=0).to(tl.float32)
    tl.store(out + row * N + n, y, inside)
    if TO_NORM:
        # Of the sum as others read it.
        y = tl.where(inside, y.to(dtype).to(tl.float32), 0)
        tl.store(scaled + row * N + n, y * tl.load(norm_weight + n, n < N, other=0).to(tl.float32), inside)
        PARTS: tl.constexpr = y.shape[0] // _SQUARES
        part = first // _SQUARES + tl.arange(0, PARTS)[:, None]
        at = new_squares + part * num_rows + row
        sums = tl.sum(tl.reshape(y * y, (PARTS, _SQUARES, y.shape[1])), 1)
        tl.store(at, sums, (part * _SQUARES < N) & (row < num_rows))
