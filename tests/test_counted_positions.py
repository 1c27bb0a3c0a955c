"""Positions that a decoder counts by itself, from the number of tokens, follow those that it is given."""

from __future__ import annotations

import pytest
import torch
from step_by_step import pad_batch, random_prompt
from tiny_models import tiny_model
from torch import fx, nn

import quantspec
from quantspec.passes.counted_positions import FollowPositionIds
from quantspec.passes.graph import aten, find_calls
from quantspec.passes.remove_no_ops import RemoveNoOps
from quantspec.self_check import incremental_logits

_FULL = {"layer_types": ["full_attention"] * 2, "attn_scale": 0.5}
_BART = {
    "d_model": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "scale_embedding": False,
    "max_position_embeddings": 512,
}


class Counting(nn.Module):
    """Token values that meet what ``count`` makes of the number of tokens."""

    def __init__(self, count) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
        self.count = count

    def forward(self, input_ids, position_ids):
        """``(B, T, 8)``."""
        return self.count(self.table[input_ids], self.table)


def exported(count) -> fx.GraphModule:
    ids = torch.zeros(2, 5, dtype=torch.long)
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Counting(count), (ids, ids.clone()), dynamic_shapes=(axes, axes), strict=False)
    gm = program.module(check_guards=False)
    RemoveNoOps()(gm)
    return gm


def scaled(x, table):
    temperature = torch.log1p(torch.floor(torch.arange(x.shape[1]).float() / 3)) + 1
    return x * temperature.view(1, x.shape[1], 1).expand(x.shape[0], x.shape[1], 1)


FOLLOWED = {
    "a temperature": scaled,
    "looked up, without a batch": lambda x, table: x + nn.functional.embedding(torch.arange(x.shape[1]) + 2, table),
    "looked up, one row": lambda x, table: x + nn.functional.embedding(torch.arange(x.shape[1])[None] + 2, table),
    "looked up, a row each": lambda x, t: x + nn.functional.embedding(
        torch.arange(3, 3 + x.shape[1]).expand(x.shape[0], -1), t
    ),
    "in halves": lambda x, t: x + torch.cat(
        nn.functional.embedding(torch.arange(x.shape[1]), t)[None].chunk(2, -1)[::-1], -1
    ),
    "times frequencies": lambda x, table: x + (torch.arange(x.shape[1]).float()[:, None] * table[0]).sin(),
}  # fmt: skip
LEFT = {
    "names tokens": lambda x, table: x.index_select(1, torch.arange(x.shape[1])),
    "along the channels": lambda x, table: x + table[: x.shape[1]].sum(1)[: x.shape[1], None] * 0 + table[0],
    "added up": lambda x, table: x + torch.arange(x.shape[1]).float().sum(),
    "another first axis": lambda x, t: x[:, None] + (torch.arange(x.shape[1])[:, None] * torch.ones(3, 1, 1)).sum(0),
    "every second": lambda x, table: x + torch.arange(0, 2 * x.shape[1], 2)[:, None],
}


@pytest.mark.parametrize("count", FOLLOWED.values(), ids=FOLLOWED.keys())
def test_what_is_counted_follows_the_given_positions(count):
    gm = exported(count)
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    before = gm(ids, torch.zeros_like(ids))
    assert FollowPositionIds()(gm).modified
    assert not list(find_calls(gm.graph, aten.arange.default, aten.arange.start))
    assert all("val" in node.meta for node in gm.graph.nodes if node.op != "output")
    positions = torch.arange(9).expand(2, 9)
    assert torch.equal(gm(ids, positions), before)
    # Rows at positions of their own: each is what it is inside of a longer text that begins at 0.
    longer = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(2))
    longer[0, 4:13], longer[1, 11:20] = ids[0], ids[1]
    whole = gm(longer, torch.arange(20).expand(2, 20))
    moved = gm(ids, positions + torch.tensor([[4], [11]]))
    assert torch.equal(moved, torch.stack((whole[0, 4:13], whole[1, 11:20])))
    assert not FollowPositionIds()(gm).modified


@pytest.mark.parametrize("count", LEFT.values(), ids=LEFT.keys())
def test_other_counts_are_left_alone(count):
    gm = exported(count)
    before = [node.format_node() for node in gm.graph.nodes]
    assert not FollowPositionIds()(gm).modified
    assert [node.format_node() for node in gm.graph.nodes] == before


def test_a_temperature_is_of_each_row_s_own_positions():
    model = tiny_model("llama4_text", attn_temperature_tuning=True, floor_scale=9, attn_scale=0.5)
    qs = quantspec.convert(model, kv_group_size=16, weight_group_size=32, self_check=False)
    prompts = [random_prompt(count, count) for count in (21, 14)]
    ids, mask = pad_batch(prompts, (0, 7), 21)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    together = qs.generate(ids, mask, num_speculative_tokens=4, **options)
    for row, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), **options)
        assert together[row, 21:].tolist() == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("bart", _BART), ("llama4_text", {"attn_temperature_tuning": True, "floor_scale": 50, **_FULL})],
)
def test_logits_behind_what_short_texts_show_are_the_models_own(architecture, options):
    model = tiny_model(architecture, **options)
    qs = quantspec.convert(model, kv_group_size=128, weight_group_size=32, self_check=False)
    ids = torch.tensor([random_prompt(120)])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, 109:]
    torch.testing.assert_close(incremental_logits(qs, ids, 110, (1, 4, 5)), expected, rtol=0, atol=1e-4)
