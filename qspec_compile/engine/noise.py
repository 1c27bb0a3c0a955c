"""Random numbers of a seed and a position: no state moves on, so a row's own do not depend on what is beside it.

SplitMix64 (Steele, Lea and Flood 2014) in torch's int64 arithmetic, which wraps: its hash of seed, position and token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _int64(word: int) -> int:
    """The signed number with the 64 bits of ``word``."""
    return (word & (2**64 - 1)) - (word >> 63 << 64)


_STEP = _int64(0x9E3779B97F4A7C15)
_FACTORS = (_int64(0xBF58476D1CE4E5B9), _int64(0x94D049BB133111EB))


def random_bits(keys: Tensor, counters: Tensor | int) -> Tensor:
    """64 random bits as int64: the outputs at ``counters`` of generators whose state at 0 is ``keys`` steps."""
    # Counters alone times the step would be int32 on a GPU, where an arange is compiled into an index.
    bits = (keys + counters) * _STEP
    bits = (bits ^ _shifted(bits, 30)) * _FACTORS[0]
    bits = (bits ^ _shifted(bits, 27)) * _FACTORS[1]
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, count: int) -> Tensor:
    """A logical shift to the right."""
    return (bits >> count) & (2 ** (64 - count) - 1)


def gumbel(seeds: Tensor, positions: Tensor, vocab: int, first: int = 0) -> Tensor:
    """Standard Gumbel noise of every token.

    The arg-max of logits plus such noise is a draw from their softmax.

    Args:
        seeds: ``(B,)`` int64.
        positions: ``(B, T)`` int64, of tokens in their row's text.
        vocab: V.
        first: counter of the first token; others give other noise of the same position.

    Returns:
        ``(B, T, V)`` float32, all finite.
    """
    # An arange is compiled into an int32 index, which other counters may not fit.
    bits = random_bits(_keys(seeds, positions)[..., None] + first, torch.arange(vocab, device=seeds.device))
    return -(-torch.log1p(-_uniform(bits))).log()


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """A number between 0 and 1 of each position, ``(B, T)`` float32, beside its noise; shapes as in :func:`gumbel`."""
    return _uniform(random_bits(_keys(seeds, positions), -1))


def _keys(seeds: Tensor, positions: Tensor) -> Tensor:
    # The seed is hashed by itself first, or that of the next row at the position before would look alike.
    return random_bits(random_bits(seeds, 0)[:, None], positions)


def _uniform(bits: Tensor) -> Tensor:
    # Small ones decide, and are exact to the last of float32's bits; neither 0 nor 1 occurs.
    return ((_shifted(bits, 1) | 1).float() * 2.0**-63).clamp(max=1 - 2.0**-24)
