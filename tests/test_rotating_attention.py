"""Cached attention that rotates new queries and keys by itself, against rotating them first."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import triton
from test_kernels_triton import ATTENTION_CASES, DEVICE, TOLERANCE, Case, cache_arguments, relative_error
from torch import Tensor

from quantspec.kernels.cached_attention import cached_attention, cached_attention_reference, rotate
from quantspec.kernels.cached_attention_triton import cached_attention_triton, launch_config
from quantspec.kernels.stretches_triton import DeviceLimits

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


@pytest.mark.parametrize(
    ("rows", "has_lower", "in_228", "in_100"),
    [(8, False, 7, 5), (8, True, 6, 2), (32, False, 4, 3), (32, True, 4, 2), (64, False, 4, 3), (64, True, 4, 2)],
)
def test_as_many_programs_as_the_device_has_room_for(rows, has_lower, in_228, in_100, monkeypatch) -> None:
    """A multiprocessor of an H100 has 228 KB of shared memory and the tuned number of programs, others have 100 KB."""
    module = import_module("quantspec.kernels.cached_attention_triton")
    for multiprocessors, kilobytes, resident in ((132, 228, in_228), (132, 100, in_100), (84, 100, in_100)):
        limits = DeviceLimits(multiprocessors, kilobytes * 1024, multiplies_64_rows=False)
        monkeypatch.setattr(module, "device_limits", lambda device, limits=limits: limits)
        config = launch_config(DEVICE, 1, rows, 128, 2**20, 0, has_lower, 2)
        assert config.splits * triton.cdiv(rows, config.rows) == multiprocessors * resident


def test_programs_of_many_rows_grow_with_them() -> None:
    """No program takes more rows than registers hold, and another begins only where they are full."""
    computed = []
    for rows in range(1, 17 * 16 + 1):
        config = launch_config(DEVICE, 8, rows, 128, 2**16, 0, True, 2)
        assert config.rows <= 32
        computed.append(triton.cdiv(rows, config.rows) * config.rows)
        assert computed[-1] == 8 if rows <= 8 else 0 <= computed[-1] - rows < min(rows, 32)
    assert computed == sorted(computed)


@pytest.mark.parametrize(
    ("pairs", "rows", "num_bytes", "splits"),
    [
        # One sequence of 128k tokens, and of 1k, which has eight tiles: a wave, or all tiles.
        (8, 20, 2**16, 33),
        (8, 20, 512, 8),
        # Two blocks of rows, in two waves.
        (8, 40, 2**16, 32),
        # Eight sequences of 8k tokens fill a wave; of up to 128k one alone may be long.
        (64, 20, 2**12, 4),
        (64, 20, 2**16, 16),
        (512, 20, 2**16, 2),
        (4096, 20, 2**16, 1),
    ],
)
def test_programs_of_wide_tiles(pairs: int, rows: int, num_bytes: int, splits: int, monkeypatch) -> None:
    module = import_module("quantspec.kernels.cached_attention_triton")
    limits = DeviceLimits(132, 228 * 1024, multiplies_64_rows=True)
    monkeypatch.setattr(module, "device_limits", lambda device: limits)
    config = launch_config(DEVICE, pairs, rows, 128, num_bytes, 264, True, 2, wide=True)
    assert (config.block, config.warps, config.rows, config.splits) == (64, 4, 32, splits)
