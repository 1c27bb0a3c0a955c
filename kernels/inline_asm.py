"""Device functions that Triton writes best with a line of PTX: nibbles to halves, and approximate exp2 and log2.

A half with exponent bits 0x64 counts in ones from 1024, one with 0x54 in ones from 64 above its low four mantissa bits,
so masking a nibble into place and subtracting a constant yields the centred code exactly, with no conversion
instruction. The interpreter cannot run inline assembly: without ``USE_ASM`` the same values come from plain Triton.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .optional_triton import tl, triton

# Neighbouring k of a product that one thread holds: the compiler doubles them behind a join, up to Triton 3.7.
K_WIDTH = 4 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 2

# Four bytes (b3 b2 b1 b0) become the halves {b1, b0} and {b3, b2}: 0x6400 | low nibble and 0x5400 | high nibble << 4.
_NIBBLES_ASM = tl.constexpr(
    """
    {
    .reg .b32 a, b, low, high, from_low, from_high;
    mov.b32 from_low, 0x64086408;
    mov.b32 from_high, 0x54805480;
    prmt.b32 a, $4, 0, 0x4140;
    prmt.b32 b, $4, 0, 0x4342;
    lop3.b32 low, a, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 high, a, 0x00f000f0, 0x54005400, 0xea;
    sub.f16x2 $0, low, from_low;
    sub.f16x2 $2, high, from_high;
    lop3.b32 low, b, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 high, b, 0x00f000f0, 0x54005400, 0xea;
    sub.f16x2 $1, low, from_low;
    sub.f16x2 $3, high, from_high;
    }
    """
)
# The four nibbles of two halfwords, from the lowest, in ones from 64; in bfloat16, whose 0x4300 counts so, from 128.
_QUARTERS_FLOAT16_ASM = tl.constexpr(
    """
    {
    .reg .b32 a, c, d;
    shl.b32 a, $4, 4;
    shr.b32 c, $4, 4;
    shr.b32 d, $4, 8;
    lop3.b32 $0, a, 0x00f000f0, 0x54005400, 0xea;
    lop3.b32 $1, $4, 0x00f000f0, 0x54005400, 0xea;
    lop3.b32 $2, c, 0x00f000f0, 0x54005400, 0xea;
    lop3.b32 $3, d, 0x00f000f0, 0x54005400, 0xea;
    }
    """
)
_QUARTERS_BFLOAT16_ASM = tl.constexpr(
    """
    {
    .reg .b32 b, c, d;
    shr.b32 b, $4, 4;
    shr.b32 c, $4, 8;
    shr.b32 d, $4, 12;
    lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 $1, b, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 $2, c, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 $3, d, 0x000f000f, 0x43004300, 0xea;
    }
    """
)
# Bytes 16u + (l + 8) of four low and four high tokens, then 0x6400 | byte, less 1024 + 136.
_BYTES_ASM = tl.constexpr(
    """
    {
    .reg .b32 low, high, magic, offset;
    mov.b32 magic, 0x64646464;
    mov.b32 offset, 0x64886488;
    shl.b32 low, $4, 4;
    shr.b32 high, $5, 4;
    lop3.b32 low, low, $5, 0xf0f0f0f0, 0xe4;
    lop3.b32 high, $4, high, 0xf0f0f0f0, 0xe4;
    prmt.b32 $0, low, magic, 0x4140;
    prmt.b32 $1, low, magic, 0x4342;
    prmt.b32 $2, high, magic, 0x4140;
    prmt.b32 $3, high, magic, 0x4342;
    sub.f16x2 $0, $0, offset;
    sub.f16x2 $1, $1, offset;
    sub.f16x2 $2, $2, offset;
    sub.f16x2 $3, $3, offset;
    }
    """
)


# The first $2 threads fetch $4 bytes each, $3 bytes apart, from $1 on; no more than 0 bytes are none.
_FETCH_ASM = tl.constexpr(
    """
    {
    .reg .pred p;
    .reg .b32 t;
    .reg .b64 at;
    mov.u32 t, %tid.x;
    mad.wide.u32 at, t, $3, $1;
    setp.lt.u32 p, t, $2;
    setp.gt.and.s32 p, $4, 0, p;
    @p cp.async.bulk.prefetch.L2.global [at], $4;
    mov.b32 $0, 0;
    }
    """
)


@triton.jit
def fetch_rows(at, rows, stride, bytes):
    """Ask for ``rows`` pieces of ``bytes`` bytes that begin ``stride`` bytes apart to be brought into the L2 cache.

    At most a piece per thread; ``at`` is a pointer, and it, ``stride`` and ``bytes`` are multiples of 16. For sm_90 on.
    """
    tl.inline_asm_elementwise(
        _FETCH_ASM, "=r,l,r,r,r", [at.to(tl.int64), rows, stride, bytes], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def activated(x, NAME: tl.constexpr):
    """SiLU or a GELU of float32, by name."""
    if NAME == "silu":
        return x * tl.sigmoid(x)
    elif NAME == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:  # 1 + tanh(u) = 2 sigmoid(2u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def centred_nibbles(packed, dtype: tl.constexpr, USE_ASM: tl.constexpr):
    """Low and high nibbles of uint8 ``packed``, each less 8, as two tensors of ``dtype``."""
    if USE_ASM and dtype == tl.float16:
        low, high = tl.inline_asm_elementwise(
            _NIBBLES_ASM, "=&r,=&r,=&r,=&r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        low = ((packed & 15).to(tl.float32) - 8).to(dtype)
        high = ((packed >> 4).to(tl.float32) - 8).to(dtype)
    return low, high


@triton.jit
def biased_quarters(packed, dtype: tl.constexpr, USE_ASM: tl.constexpr):
    """Four nibbles of each uint16, from the lowest, as four tensors of ``dtype``, plus :func:`nibble_bias`."""
    if USE_ASM and dtype == tl.float16:
        q0, q1, q2, q3 = tl.inline_asm_elementwise(
            _QUARTERS_FLOAT16_ASM,
            "=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif USE_ASM:
        q0, q1, q2, q3 = tl.inline_asm_elementwise(
            _QUARTERS_BFLOAT16_ASM,
            "=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        q0 = ((packed & 15).to(tl.float32) + nibble_bias(dtype)).to(dtype)
        q1 = (((packed >> 4) & 15).to(tl.float32) + nibble_bias(dtype)).to(dtype)
        q2 = (((packed >> 8) & 15).to(tl.float32) + nibble_bias(dtype)).to(dtype)
        q3 = ((packed >> 12).to(tl.float32) + nibble_bias(dtype)).to(dtype)
    return q0, q1, q2, q3


@triton.jit
def nibble_bias(dtype: tl.constexpr):
    """What :func:`biased_quarters` adds to each nibble; their sums are exact in ``dtype``."""
    if dtype == tl.float16:
        return 64.0
    else:
        return 128.0


@triton.jit
def ones_like(x, USE_ASM: tl.constexpr):
    """Ones in the shape, and in registers the layout, of a 16-bit float operand, so that no constant is stored."""
    if USE_ASM and x.dtype == tl.float16:
        ones = tl.inline_asm_elementwise("mov.b32 $0, 0x3c003c00;", "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)
    elif USE_ASM and x.dtype == tl.bfloat16:
        ones = tl.inline_asm_elementwise(
            "mov.b32 $0, 0x3f803f80;", "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        # Converted, since not every interpreter has bfloat16 constants (Triton 3.8's has none).
        ones = tl.full(x.shape, 1, tl.float32).to(x.dtype)
    return ones


@triton.jit
def centred_bytes(upper, lower, dtype: tl.constexpr, USE_ASM: tl.constexpr):
    """Codes 16 (u - 8) + l of the low and of the high nibbles of both planes, as two tensors of ``dtype``."""
    if USE_ASM and dtype == tl.float16:
        low, high = tl.inline_asm_elementwise(
            _BYTES_ASM, "=&r,=&r,=&r,=&r,r,r", [upper, lower], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        low = ((((upper & 15) << 4) | (lower & 15)).to(tl.float32) - 136).to(dtype)
        high = (((upper & 240) | (lower >> 4)).to(tl.float32) - 136).to(dtype)
    return low, high


@triton.jit
def split_pair(packed, dtype: tl.constexpr):
    """The two 16-bit floats in each int32, the one at the lower address first."""
    return packed.to(tl.int16).to(dtype, bitcast=True), (packed >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def fast_exp2(x, USE_ASM: tl.constexpr):
    """2^x of float32; subnormal results flush to zero, which spares the range checks of ``tl.exp2``."""
    if USE_ASM:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def fast_log2(x, USE_ASM: tl.constexpr):
    """log2 of positive normal float32."""
    if USE_ASM:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def exact_dot(a, b, USE_ASM: tl.constexpr):
    """``a @ b`` in float32 with products of the operands' own precision; the interpreter cannot multiply bfloat16."""
    if a.dtype == tl.bfloat16 and not USE_ASM:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_inside(at, inside, EVEN: tl.constexpr):
    """What lies at ``at``, 0 where not ``inside``. With ``EVEN`` all is, and no predicate per load costs time."""
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, inside, other=0)


def use_inline_asm(device: torch.device) -> bool:
    """Whether kernels launched on this device are compiled, rather than interpreted on the CPU."""
    return device.type == "cuda"


@lru_cache
def launches_overlap(device: torch.device) -> bool:
    """Whether a kernel may be launched before those it follows have ended, which it then awaits itself."""
    return use_inline_asm(device) and torch.cuda.get_device_capability(device)[0] >= 9
