"""The table of the cache's parts: every op takes them in its order, and the rest of the library is made from it."""

from __future__ import annotations

import pytest
import torch

from quantspec.cache import LayerCache
from quantspec.cache.geometry import part_shape
from quantspec.capture import CapturedLayer
from quantspec.kernels.cache_layout import CACHE_PARTS, KINDS, PAGE_PARTS, part_names, parts_on
from quantspec.kernels.hierarchical import encode_keys, encode_values
from quantspec.memory import cache_bytes_per_token

ops = torch.ops.quantspec
# 192 value channels share two scales.
LAYER = CapturedLayer("attention", 4, 2, 24, 192, 0, 0.0, False)
WRITTEN = {ops.cached_attention: part_names("recent"), ops.prefill_attention: part_names(), ops.flush: part_names()}
WRITTEN |= {ops.scored_attention: (*part_names("recent"), "page_scores")}


@pytest.mark.parametrize("op", WRITTEN, ids=str)
def test_ops_take_the_parts_in_order_and_write_those_they_say(op) -> None:
    arguments = op.default._schema.arguments
    names = [argument.name for argument in arguments]
    first = names.index(CACHE_PARTS[0].name)
    assert tuple(names[first : first + len(CACHE_PARTS)]) == part_names()
    written = tuple(argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write)
    assert written == WRITTEN[op]


@pytest.mark.parametrize(("holds", "encode", "dim"), [("keys", encode_keys, 24), ("values", encode_values, 192)])
def test_quantized_parts_are_those_that_encoding_makes(holds: str, encode, dim: int) -> None:
    """Same order, shapes and dtypes, for three groups of sixteen tokens."""
    coded = encode(torch.randn(5, 2, 3, 16, dim))
    parts = [part for part in CACHE_PARTS if part.holds == holds and part.group_axis is not None]
    shapes = [part_shape(part, LAYER, 5, 3, 16, 0) for part in parts]
    assert [(tensor.shape, tensor.dtype) for tensor in coded] == [
        (shape, part.dtype) for shape, part in zip(shapes, parts, strict=True)
    ]


def test_kinds_are_all_counted_and_recent_buffers_alone_do_not_grow() -> None:
    assert {part.kind for part in parts_on("cpu")} == set(KINDS) - {"pages"}
    assert {part.kind for part in parts_on("cuda")} == set(KINDS) - {"pages", "decoded"}
    assert {part.kind for part in PAGE_PARTS} == {"pages"}
    assert {part.kind for part in CACHE_PARTS if part.group_axis is None} == {"recent"}
    assert set(cache_bytes_per_token([LAYER])) == set(KINDS) - {"recent", "decoded", "pages"}


def test_a_grown_layer_is_as_one_allocated_at_once() -> None:
    sizes = (16, 40, torch.bfloat16, "cpu")
    grown, new = LayerCache.allocate(LAYER, 2, 1, *sizes).grown(3), LayerCache.allocate(LAYER, 2, 3, *sizes)
    assert grown.groups == new.groups == 3
    for part in parts_on("cpu"):
        tensor, expected = getattr(grown, part.name), getattr(new, part.name)
        assert tensor.shape == expected.shape == part_shape(part, LAYER, 2, 3, 16, 40)
        assert tensor.dtype == expected.dtype == (part.dtype or torch.bfloat16)
