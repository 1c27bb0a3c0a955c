"""Cached attention that rotates new queries and keys by itself, against rotating them first."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from test_kernels_triton import ATTENTION_CASES, DEVICE, TOLERANCE, Case, cache_arguments, relative_error
from torch import Tensor

from quantspec.kernels.cached_attention import cached_attention, cached_attention_reference, rotate
from quantspec.kernels.cached_attention_triton import DeviceLimits, cached_attention_triton, launch_config

# Rotated channels, angles of the tables, whether neighbours are a pair; None stands for the head dim.
ROTATIONS: dict[str, tuple[int | None, int, bool]] = {
    "halves": (None, 1, False),
    "an angle a pair": (None, 2, False),
    "neighbours": (None, 1, True),
    "first channels": (32, 1, False),
    "first channels, neighbours, an angle a pair": (32, 2, True),
}
CASES = ["draft", "ragged", "grouped query", "two uneven parts", "head dim 80", "bfloat16 verify", "float16"]


def rotation_arguments(case: Case, name: str, batch: int) -> dict[str, Tensor | int | bool]:
    """Tables in the case's dtype, of all sequences or of one for all."""
    dim, share, interleaved = ROTATIONS[name]
    dim = dim or case.head_dim
    angles = 6 * torch.rand(batch, case.tokens, dim // share, device=DEVICE)
    tables = {"cos": angles.cos().to(case.dtype), "sin": angles.sin().to(case.dtype)}
    return {**tables, "rotary_dim": dim, "interleaved": interleaved}


def widened(arguments: dict) -> dict:
    return {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_rotates_as_float64_does(name: str, rotation: str) -> None:
    torch.manual_seed(0)
    case = ATTENTION_CASES[name]
    batch = 1 if rotation == "neighbours" else len(case.lengths)
    arguments = cache_arguments(case) | rotation_arguments(case, rotation, batch)
    options = {"scale": case.head_dim**-0.5, "window": case.window, "softcap": case.softcap}
    exact = widened(arguments)
    expected = cached_attention_reference(**exact, **options)
    actual = cached_attention_triton(**arguments, **options)
    assert actual.dtype == case.dtype
    assert relative_error(actual, expected) < TOLERANCE[case.dtype]
    # What is cached is the rotated key, rounded once, and the value as it came.
    assert torch.equal(arguments["v_recent"].nan_to_num(), exact["v_recent"].to(case.dtype).nan_to_num())
    new_keys = rotate(*(arguments[key] for key in ("key", "cos", "sin", "rotary_dim", "interleaved")))
    for b, (_, recent) in enumerate(case.lengths):
        stored = arguments["k_recent"][b, :, recent : recent + case.tokens]
        torch.testing.assert_close(stored, new_keys[b], rtol=torch.finfo(case.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_the_plain_op_rotates_first(rotation: str) -> None:
    torch.manual_seed(0)
    case = ATTENTION_CASES["ragged"]
    arguments = widened(cache_arguments(case) | rotation_arguments(case, rotation, len(case.lengths)))
    arguments = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    options = {"scale": 0.2, "window": 0, "softcap": 0.0}
    tables = [arguments[name] for name in ("cos", "sin", "rotary_dim", "interleaved")]
    apart = {name: x for name, x in arguments.items() if name not in ("cos", "sin", "rotary_dim", "interleaved")}
    apart |= {name: rotate(arguments[name], *tables) for name in ("query", "key")}
    apart |= {name: arguments[name].clone() for name in ("k_recent", "v_recent")}
    ours, expected = cached_attention(**arguments, **options), cached_attention(**apart, **options)
    assert torch.equal(ours, expected)
    assert torch.equal(arguments["k_recent"].nan_to_num(), apart["k_recent"].nan_to_num())


def test_tables_of_different_strides() -> None:
    case = ATTENTION_CASES["draft"]
    arguments = cache_arguments(case) | rotation_arguments(case, "halves", 1)
    twice = torch.cat((arguments["cos"], arguments["sin"]), -1)
    options = {"scale": 0.1, "window": 0, "softcap": 0.0}
    expected = cached_attention_triton(**arguments, **options)
    dim = case.head_dim
    for cos, sin in ((twice[..., :dim], twice[..., dim:]), (twice[..., :dim], arguments["sin"])):
        assert torch.equal(cached_attention_triton(**(arguments | {"cos": cos, "sin": sin}), **options), expected)


@pytest.mark.parametrize("rows", [8, 32, 64])
@pytest.mark.parametrize("has_lower", [False, True])
def test_programs_fit_the_shared_memory_of_the_device(rows: int, has_lower: bool, monkeypatch) -> None:
    module = import_module("quantspec.kernels.cached_attention_triton")
    splits = {}
    for limits in (DeviceLimits(132, 228 * 1024), DeviceLimits(132, 100 * 1024), DeviceLimits(66, 228 * 1024)):
        monkeypatch.setattr(module, "device_limits", lambda device, limits=limits: limits)
        splits[limits] = launch_config(DEVICE, 8, rows, 128, 2**20, 264, has_lower, 2).splits
    large, little_memory, half = splits.values()
    # As many programs in a wave as there are multiprocessors, and no more than fit into them.
    assert little_memory <= large
    assert half < large
    if rows == 32 and has_lower:
        assert little_memory < large
