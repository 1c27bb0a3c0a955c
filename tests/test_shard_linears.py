"""What ShardLinears asks of a graph, in one process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantspec.passes import shard_linears
from quantspec.passes.pieces import even
from quantspec.passes.shard_linears import Place, ShardLinears

STEPS = 40


class ReadTwice(nn.Module):
    """A value goes on along two ways at every step, as it does within layers that keep state."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        for _ in range(STEPS):
            y = y * 0.5 + y.relu()
        return self.head(self.down(y))


def test_what_is_read_along_many_ways_is_asked_once(monkeypatch):
    asked = []
    links = shard_linears.links

    def counted(node):
        asked.append(node)
        assert len(asked) < 100 * STEPS
        return links(node)

    monkeypatch.setattr(shard_linears, "links", counted)
    gm = torch.export.export(ReadTwice(), (torch.randn(2, 3, 8),)).module(check_guards=False)
    shard = ShardLinears(Place(1, 2, "none"))
    shard(gm)
    assert (shard.pieces["up.weight"].axis, shard.pieces["up.weight"].ranges) == (-2, even(16, 1, 2))
    assert (shard.pieces["down.weight"].axis, shard.pieces["down.weight"].ranges) == (-1, even(16, 1, 2))
    assert shard.whole == []
