"""A caller's own position_ids through ``model.generate(custom_generate=...)``, where Hugging Face makes them too."""

from __future__ import annotations

import pytest
import torch

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
OPTIONS = {"attention_mask": MASK, "max_new_tokens": 4, "eos_token_id": None, "do_sample": False}
COUNTED = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])


def from_hugging_face(qs, positions):
    return qs.model.generate(IDS, custom_generate=qs.decode, position_ids=positions, **OPTIONS)


@pytest.mark.parametrize(
    "positions",
    [COUNTED + 1, COUNTED * 2, COUNTED.flip(1), torch.arange(4).expand(2, 4), torch.arange(4)[None], COUNTED[None]],
    ids=["offset", "stretched", "reversed", "padding counted", "one row", "another shape"],
)
def test_other_positions_are_refused(qs, positions):
    with pytest.raises(ValueError, match=r"generate\(\) does not take position_ids: positions follow from attention_m"):
        from_hugging_face(qs, positions)


@pytest.mark.parametrize(
    "positions",
    [COUNTED, COUNTED.int(), torch.tensor([[1, 1, 0, 1], [0, 1, 2, 3]])],
    ids=["counted", "int32", "ones for padding"],
)
def test_those_that_hugging_face_makes_are_taken(qs, positions):
    assert torch.equal(from_hugging_face(qs, positions), qs.generate(IDS, **OPTIONS))
