"""Attention that a decoder computes by itself: recognised by what its scores become, decoded from the cache."""

from __future__ import annotations

import re

import pytest
import torch
from repeats import only
from torch import Tensor, fx, nn

import quantspec
from benchmarks.census import differences
from benchmarks.census_models import tiny_model
from quantspec import UnsupportedModelError
from quantspec.capture import capture
from quantspec.kernels.hierarchical import decode_keys, encode_keys
from quantspec.passes.graph import aten, find_calls
from quantspec.passes.logit_rows import logits_linear
from quantspec.passes.remove_no_ops import RemoveNoOps
from quantspec.passes.written_attention import MarkWrittenAttention, WrittenAttentionError
from quantspec.passes.written_linears import MarkWrittenLinears

HEADS, DIM = 4, 8
TOKENS = 11


class Attending(nn.Module):
    """One layer of attention whose scores become ``rule(scores (B, H, T, T), positions (B, T))``."""

    def __init__(self, rule) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, 3 * HEADS * DIM, generator=torch.Generator().manual_seed(0)))
        self.rule = rule

    def forward(self, input_ids, position_ids):
        """``(B, T, H * D)``."""
        q, k, v = self.table[input_ids].unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        weights = self.rule(q @ k.transpose(-1, -2), position_ids).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)


def exported(rule) -> fx.GraphModule:
    ids = torch.zeros(2, 7, dtype=torch.long)
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    inputs = (ids, torch.arange(7).expand(2, 7).clone())
    gm = torch.export.export(Attending(rule), inputs, dynamic_shapes=(axes, axes), strict=False).module(
        check_guards=False
    )
    RemoveNoOps()(gm)
    return gm


def distances(scores: Tensor) -> Tensor:
    count = torch.arange(scores.shape[-1])
    return count[None] - count[:, None]


def causal(scores: Tensor, value: float = float("-inf")) -> Tensor:
    return scores.masked_fill(distances(scores) > 0, value)


def in_place(scores: Tensor, positions: Tensor) -> Tensor:
    scores /= 3
    return causal(scores)


TABLE = torch.ones(64, 64, dtype=torch.bool).tril() & torch.ones(64, 64, dtype=torch.bool).triu(-4)
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.03])[:, None, None]

MARKED = {
    "causal": (lambda s, p: causal(s * 0.3), 0.3, 0),
    "in place": (in_place, 1 / 3, 0),
    "added mask": (lambda s, p: s + causal(torch.zeros_like(s[0, 0]), -1e4), 1.0, 0),
    "window": (lambda s, p: causal(s).masked_fill(distances(s) < -6, -1e9), 1.0, 7),
    "table of a window": (lambda s, p: torch.where(TABLE[: s.shape[-2], : s.shape[-1]], s, -3e38), 1.0, 5),
    "ALiBi by keys": (lambda s, p: causal(s * 0.5 + SLOPES * p[:, None, None, :]), 0.5, 0),
    "ALiBi by distances": (lambda s, p: causal((s + SLOPES * distances(s)) * 0.5), 0.5, 0),
    "ALiBi in a window": (lambda s, p: causal(s + SLOPES * distances(s)).masked_fill(distances(s) < -6, -1e9), 1.0, 7),
}
REFUSED = {
    "bidirectional": (lambda s, p: s * 0.5, "not causal"),
    "a prefix": (lambda s, p: s.masked_fill((distances(s) > 0) & (torch.arange(s.shape[-1]) > 3), -1e9), "not causal"),
    "soft cap": (lambda s, p: causal(s.tanh()), "not a multiple of queries times keys"),
    "squared distances": (lambda s, p: causal(s - distances(s) ** 2 * 0.1), "a bias that grows with the distance"),
    "of tokens": (
        lambda s, p: causal(s + s.mean(1, keepdim=True)),
        "adds a bias that follows from what the tokens say",
    ),
    "times tokens": (lambda s, p: causal(s * s.mean(1, keepdim=True)), "makes of other than queries times keys"),
}


@pytest.mark.parametrize("name", MARKED)
def test_what_computes_the_same_is_marked(name):
    rule, scale, window = MARKED[name]
    gm = exported(rule)
    ids = torch.randint(0, 64, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(TOKENS).expand(2, TOKENS)
    expected = gm(ids, positions)
    assert MarkWrittenAttention(0)(gm).modified
    (marker,) = find_calls(gm.graph, torch.ops.quantspec.attention.default)
    assert marker.args[4:6] == (pytest.approx(scale), window)
    assert not list(find_calls(gm.graph, aten.softmax.int, aten.matmul.default))
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(gm(ids, positions), expected, atol=1e-4, rtol=1e-4)
    assert not MarkWrittenAttention(0)(gm).modified


@pytest.mark.parametrize("name", REFUSED)
def test_what_computes_something_else_is_refused(name):
    rule, reason = REFUSED[name]
    gm = exported(rule)
    with pytest.raises(WrittenAttentionError, match=rf"node 'softmax'.*{reason}"):
        MarkWrittenAttention(0)(gm)


def test_a_window_longer_than_what_is_tried_is_refused():
    gm = exported(lambda s, p: causal(s))
    with pytest.raises(WrittenAttentionError, match="attends in a window of 4096 tokens"):
        MarkWrittenAttention(4096)(gm)


# Type -> windows of its layers, and dims of a key.
TYPES = {
    "falcon": ([0, 0], 16),
    "bloom": ([0, 0], 32),
    "mpt": ([0, 0], 32),
    "gpt_neo": ([0, 12], 16),
    "openai-gpt": ([0, 0], 16),
    "xglm": ([0, 0], 16),
    "roformer": ([0, 0], 16),
}


@pytest.mark.parametrize("model_type", only(["bloom", "falcon", "gpt_neo", "openai-gpt", "roformer", "xglm"], TYPES))
def test_decoding_is_the_models_own(model_type):
    windows, dim = TYPES[model_type]
    qs = quantspec.convert(tiny_model(model_type), kv_group_size=16, weight_group_size=32)
    assert [layer.window for layer in qs.layers] == windows
    assert {layer.key_dim for layer in qs.layers} == {dim}
    assert max(differences(qs).values()) < 1e-3
    ids = torch.randint(3, 128, (1, 35), generator=torch.Generator().manual_seed(4))
    texts = [qs.generate(ids, max_new_tokens=16, do_sample=False, num_speculative_tokens=count) for count in (0, 3)]
    assert torch.equal(*texts)


def test_the_bits_of_a_position_are_exact_in_both_planes():
    """Whatever else a group holds: each dim of a key has two values."""
    layers = capture(tiny_model("bloom")).graph_module
    (table,) = (x for name, x in layers.named_buffers() if name == "position_bits")
    part = next(x for name, x in layers.named_buffers() if name.startswith("position_part"))
    keys = (table[40:72] * part)[None, None]
    upper, lower, scale, zero = encode_keys(keys.unflatten(2, (2, 16)))
    for plane in (None, lower):
        assert torch.equal(decode_keys(upper, plane, scale, zero, torch.float32).reshape(keys.shape), keys)


def test_relative_positions_are_refused_by_the_node():
    """What a model that sees later tokens besides is told of that instead."""
    with pytest.raises(UnsupportedModelError, match="depends on the tokens after it") as error:
        capture(tiny_model("xlnet"))
    assert re.search("XLNetLMHeadModel: node 'softmax'.*adds a bias that follows from what", str(error.value.__cause__))


@pytest.mark.parametrize("model_type", ["roberta", "data2vec-text"])
def test_positions_may_begin_later(model_type):
    """Their first position is the one after that of padding, and padding is not counted."""
    model = tiny_model(model_type)
    qs = quantspec.convert(model, kv_group_size=16, weight_group_size=32)
    assert max(differences(qs).values()) < 1e-3
    # Of 512 learned positions those up to the padding's are no token's.
    with pytest.raises(ValueError, match="511"):
        quantspec.convert(model, kv_group_size=16, max_cache_len=512)


def test_positions_of_another_step_are_refused():
    model = tiny_model("roberta")
    embeddings = model.roberta.embeddings
    counted = embeddings.create_position_ids_from_input_ids
    embeddings.create_position_ids_from_input_ids = lambda *args: counted(*args) * 2
    with pytest.raises(UnsupportedModelError, match="does not count positions one by one"):
        capture(model)


def test_logits_may_be_scaled_by_token():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 5, bias=False)
            self.by_token = nn.Parameter(torch.ones(5))
            self.by_row = nn.Parameter(torch.ones(3, 1))

        def forward(self, hidden, other):
            scaled = self.head(hidden) * (self.by_token * 2)
            return scaled * self.by_row if other else scaled

    for other in (False, True):
        graph = torch.export.export(Scaled(), (torch.ones(2, 3, 8), other)).module().graph
        assert (logits_linear(graph) is None) == other


def test_linears_may_be_written_as_products():
    """Falcon's: its draft has INT4 weights like any other's."""
    gm = capture(tiny_model("falcon")).graph_module
    assert not list(find_calls(gm.graph, aten.numpy_T.default, aten.matmul.default))
    assert len(list(find_calls(gm.graph, aten.linear.default))) == 2 * 4 + 1


@pytest.mark.parametrize("other", ["another axis", "twice read", "a matrix"])
def test_other_products_are_left(other):
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6, 6))
            self.bias = nn.Parameter(torch.ones(6))
            self.rows = nn.Parameter(torch.ones(3, 6))

        def forward(self, hidden):
            if other == "another axis":
                return hidden @ self.weight + self.bias
            product = hidden @ self.weight.T
            return product + self.rows if other == "a matrix" else (product + self.bias) * product

    gm = torch.export.export(Product(), (torch.ones(2, 3, 6),)).module()
    expected = gm(torch.ones(2, 3, 6))
    assert MarkWrittenLinears()(gm).modified == (other != "another axis")
    assert all(len(node.args) < 3 or node.args[2] is None for node in find_calls(gm.graph, aten.linear.default))
    torch.testing.assert_close(gm(torch.ones(2, 3, 6)), expected)


def test_a_slice_of_the_whole_is_no_op():
    class Sliced(nn.Module):
        def forward(self, x):
            torch._check(x.shape[1] > 1)
            return x[:, -x.shape[1] :] + x[:, 1:].sum()

    axes = ({1: torch.export.Dim.DYNAMIC},)
    gm = torch.export.export(Sliced(), (torch.ones(2, 5),), dynamic_shapes=axes).module(check_guards=False)
    RemoveNoOps()(gm)
    assert len(list(find_calls(gm.graph, aten.slice.Tensor))) == 1
