"""The kernel of latents reads what a layer with a window keeps, however often its ring has gone round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_block_tables import copied
from test_kernels_triton import DEVICE, TOLERANCE, relative_error
from test_latents import GROUP, Case, arguments_of, widened
from test_rings import in_ring
from torch import Tensor

from quantspec.kernels.attention import first_visible
from quantspec.kernels.cached_attention import cached_attention, cached_attention_reference
from quantspec.kernels.cached_attention_triton import cached_attention_triton

CASES = {
    "draft": Case(window=90, lengths=((320, 40),)),
    "a ring that has gone round four times": Case(window=40, lengths=((416, 33), (352, 40)), dtype=torch.bfloat16),
    "verification of ragged rows": Case(
        heads=10,
        tokens=6,
        window=100,
        lengths=((320, 40), (96, 3), (0, 20), (288, 63)),
        lower=True,
        dtype=torch.float16,
    ),
    "chunks": Case(tokens=3, window=-96, lengths=((320, 40), (256, 20)), lower=True),
    "two heads, sinks": Case(kv_heads=2, tokens=2, window=70, lengths=((256, 33),), softcap=9.0, sinks=True),
    "everything is value": Case(heads=2, dim=32, window=-64, lengths=((256, 50),), lower=True),
    "everything in the recent buffer": Case(tokens=2, window=20, lengths=((320, 50),), lower=True),
}


def places_of(case: Case) -> int:
    """The fewest that hold what the first query of each sequence sees of the planes."""
    starts = [first_visible(quantized + recent, case.window) // GROUP for quantized, recent in case.lengths]
    return max(1, *(quantized // GROUP - first for (quantized, _), first in zip(case.lengths, starts, strict=True)))


def rings_of(case: Case, places: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments with all groups, and with the last ones in so many places; what is nowhere is NaN."""
    whole = arguments_of(case)
    return whole, in_ring(whole, places)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_latents_in_a_ring_match_float64(case: Case) -> None:
    whole, ring = rings_of(case, places_of(case))
    assert ring["k_upper"].shape[2] < whole["k_upper"].shape[2]
    exact = cached_attention_reference(**widened(copied(whole)))
    assert relative_error(cached_attention_triton(**ring), exact) < TOLERANCE[case.dtype]
    # New tokens are where the plain op leaves them.
    plain = copied(whole)
    cached_attention_reference(**plain)
    assert torch.equal(ring["k_recent"].nan_to_num(), plain["k_recent"].nan_to_num())
    if DEVICE.type == "cpu":
        plain = cached_attention(**widened(in_ring(arguments_of(case), places_of(case))))
        assert relative_error(plain, exact) < 1e-12


@pytest.mark.parametrize("name", ["draft", "chunks"])
def test_a_group_that_is_gone_is_missed(name: str) -> None:
    """With one place less than a step reads, outputs are others, so the test above would tell."""
    case = CASES[name]
    whole, ring = rings_of(case, places_of(case) - 1)
    exact = cached_attention_reference(**widened(copied(whole)))
    assert relative_error(cached_attention_triton(**ring), exact) > 1e-2


@pytest.mark.parametrize("places", [3, 4, 5, 7])
def test_a_ring_reads_alike_wherever_it_begins(places: int) -> None:
    """As planes of all groups: each place comes to be the oldest in turn."""
    for last in range(places + 1, 2 * places + 2):
        case = Case(tokens=2, window=(places - 1) * GROUP, lengths=((last * GROUP, 40),), lower=True)
        whole, ring = rings_of(case, places)
        outputs: list[Tensor] = [cached_attention_triton(**arguments) for arguments in (whole, ring)]
        # Shares of stretches depend on the allocated size, so sums are not in one order.
        assert relative_error(outputs[1], outputs[0].double()) < 1e-6
