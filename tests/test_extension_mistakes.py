"""Mistakes in recipes, accesses and formats of one's own are named where they are made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantspec.config import WeightQuantizer
from quantspec.kernels.cache_layout import part_names
from quantspec.pair import Recipe, recipes, register
from quantspec.passes import INT4, CacheAccess, Role
from quantspec.passes.attention_lowering import ACCESSES

ACCESS = ACCESSES[Role.DRAFT]


def test_a_part_that_no_cache_has():
    with pytest.raises(ValueError, match="no cache has a part 'k_resent'; it has k_recent, v_recent, "):
        CacheAccess(ACCESS.op, ("k_resent", *part_names("scales")))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"role": "drft"}, ValueError, "role of recipe 'mine' must be one of target, draft, prefill, not 'drft'"),
        ({"access": ACCESS.op}, TypeError, "access of recipe 'mine' must be a CacheAccess"),
        ({"weight_format": "int8"}, TypeError, "weight_format of recipe 'mine' must be a WeightFormat, not 'int8'"),
        ({"more_passes": []}, TypeError, "more_passes of recipe 'mine' must make the passes: a function, not a list"),
    ],
    ids=["role", "access", "format", "passes"],
)
def test_a_recipe_that_makes_no_role(monkeypatch, given, error, message):
    known = dict(recipes._RECIPES)
    with pytest.raises(error, match=message):
        register(replace(Recipe("mine", Role.DRAFT, ACCESS, INT4), **given))
    assert known == recipes._RECIPES


@pytest.mark.parametrize(
    "wrong", [lambda parts: parts[:1], lambda parts: (parts[0].T, *parts[1:])], ids=["few", "shape"]
)
def test_a_format_that_packs_otherwise_than_it_says(wrong):
    broken = replace(INT4, name="broken", pack=lambda *given: wrong(INT4.pack(*given)))
    with pytest.raises(
        ValueError, match=r"pack of weight format 'broken' made tensors of shapes \[.*; its parts are \{'"
    ):
        broken.packed(torch.randn(16, 64), 32, WeightQuantizer.TINYGEMM)
