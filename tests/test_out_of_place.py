"""Graphs that write into tensors of their own become graphs that write into none, or are refused."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, fx, nn

from quantspec.capture import capture, converting, export
from quantspec.passes.out_of_place import OutOfPlaceError, WriteOutOfPlace


class Whole(nn.Module):
    """Reads what it writes before and after."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        state = x.clone()
        before = state.sum(-1)
        returned = state.copy_(x.roll(1, -1))
        state.div_(state.amax(-1, keepdim=True))
        return before, returned + 0.0, state


class Casts(nn.Module):
    """The copy of another dtype is written, and its origin is not read again."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.clone().to(torch.float64)
        wide.mul_(2).add_(wide)
        return wide


class Sliced(nn.Module):
    """Writes into a part of a part."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros_like(x)
        zeros[:, 1:3].select(1, 1).copy_(x[:, 0])
        zeros[:, 3:].copy_(x[:, 3:])
        return zeros, zeros.sum(1)


class Results(nn.Module):
    """Of two results of one op one is written."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, places = x.topk(2)
        values /= values.sum(-1, keepdim=True)
        return values, places


class Product(nn.Module):
    """Of parameters, and what is added has the same sizes, written another way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        nn.init.eye_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        out.add_(torch.cat((x, x)).reshape(2, -1, 5).sum(0))
        return out


class SeenOtherwise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        state = x.clone()
        other = state.transpose(0, 1)
        state.copy_(x * 2)
        return other


class SeenThroughAComposition(nn.Module):
    """Dropout returns its argument without saying so."""

    def forward(self, x: Tensor) -> Tensor:
        state = x.clone()
        other = nn.functional.dropout(state, 0.5, False)
        state.copy_(x * 2)
        return other


class Input(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.view(-1).mul_(2)
        return x + 1


class Promotes(nn.Module):
    """What is written is cast to the argument's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.clone().half()
        half.eq_(1)
        return half


class WrittenTwice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        state = x.clone()
        row = state[0]
        row.mul_(2)
        row.add_(1)
        return state


class SliceWrittenTwice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        state = x.clone()
        part = state[:, 1:3]
        part *= 2
        part += 1
        return state


class ReadAfterItsWhole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        state = x.clone()
        row = state[0]
        row.mul_(2)
        state.add_(1)
        return row + 0


class PartOfAPart(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        state = x.clone()
        part = state[:, 1:]
        part[0].copy_(x[1, 1:])
        part.add_(1)
        return state


def exported(module: nn.Module) -> fx.GraphModule:
    rows = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(module, (torch.zeros(3, 5),), dynamic_shapes=(rows,), strict=False)
    return program.module(check_guards=False)


@pytest.mark.parametrize(
    "module", [Whole(), Casts(), Sliced(), Results(), Product()], ids=lambda module: type(module).__name__
)
def test_results_are_those_of_the_writes(module):
    graph_module = exported(module)
    x = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    expected = module(x)
    assert WriteOutOfPlace()(graph_module).modified
    results = graph_module(x)
    for result, of_module in zip(*(y if isinstance(y, tuple) else (y,) for y in (results, expected)), strict=True):
        assert torch.equal(result, of_module)
    ops = [node.target for node in graph_module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert not [op for op in ops if op._schema.is_mutable]
    assert all("val" in node.meta for node in graph_module.graph.nodes if node.op != "output")
    assert not WriteOutOfPlace()(graph_module).modified


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (SeenOtherwise(), "transpose"),
        (Input(), "mul_"),
        (Promotes(), "eq_"),
        (WrittenTwice(), ""),
        (SliceWrittenTwice(), ""),
        (ReadAfterItsWhole(), ""),
        (PartOfAPart(), ""),
    ],
    ids=lambda it: type(it).__name__ if isinstance(it, nn.Module) else "",
)
def test_what_others_may_see_otherwise_is_refused(module, named):
    with pytest.raises(OutOfPlaceError, match=f"'{named}"):
        WriteOutOfPlace()(exported(module))


def test_a_composition_that_returns_its_argument_is_refused_unless_the_export_knows_it():
    graph_module, x = exported(SeenThroughAComposition()), torch.rand(4, 5)
    if any(node.target is torch.ops.aten.dropout.default for node in graph_module.graph.output_node().all_input_nodes):
        with pytest.raises(OutOfPlaceError, match="'dropout"):
            WriteOutOfPlace()(graph_module)
    else:
        # torch 2.15 returns what is written.
        assert WriteOutOfPlace()(graph_module).modified
        assert torch.equal(graph_module(x), x * 2)


def test_a_hybrid_is_traced_again_only_where_its_writes_are_not_known(monkeypatch):
    model, traced = tiny_model("lfm2"), []
    decompose = torch.export.ExportedProgram.run_decompositions
    monkeypatch.setattr(
        torch.export.ExportedProgram, "run_decompositions", lambda *given: traced.append(1) or decompose(*given)
    )

    def logits() -> Tensor:
        with converting():
            captured = capture(model)
        states = [torch.zeros(2, 10, *state.shape, dtype=state.dtype) for state in captured.states]
        ids = torch.arange(3, 21).view(2, 9)
        with torch.no_grad():
            return captured.graph_module(ids, torch.arange(9).expand(2, 9), *states)

    once = logits()
    assert not traced

    def refuse(_: object, graph_module: fx.GraphModule) -> None:
        raise OutOfPlaceError(graph_module.graph.output_node())

    monkeypatch.setattr(export.WriteOutOfPlace, "call", refuse)
    assert torch.equal(logits(), once)
    assert traced
