"""Give the draft weights of another format."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from quantspec.config import GROUP_SIZES, WeightQuantizer
from quantspec.freed_memory import FreedMemory
from quantspec.logging import counting

from .called_modules import called_modules
from .graph import add_buffer, add_call, aten, find_calls, finish, get_tensor, own_name
from .logit_rows import LINEAR_TARGETS, logits_linear
from .weight_formats import PACKED_LINEARS, PackedLinears, WeightFormat, check_packed

_LOGGER = logging.getLogger(__name__)

WeightSource = Callable[[WeightFormat, str, tuple[int, ...], int], tuple[Tensor, ...] | None]
"""Looks up ready weights: the format, name of a linear, shape ``(..., N, K)`` of its weight and group size to the
format's parts, on any device.
"""
_ADDMM_TARGETS = (aten.addmm.default, torch.addmm)
# Readers of a matrix that is a lookup table or holds the experts' biases; packed experts have biases too.
_NOT_AS_WEIGHT = {aten.embedding.default, torch.ops.quantspec.expert_linear.default}
# How far from its linear a router's top-k may stand.
_ROUTER_DEPTH = 8


@dataclass(frozen=True)
class LinearReport:
    """What became of one linear (or one stack of experts) in the draft.

    Attributes:
        name: of the linear's module in the model.
        in_features, out_features: of the linear; of one expert for a stack of them.
        group_size: input channels that share a scale; None where the weight stays in full precision.
        note: why it does, or that the group size was adapted to the input width; else empty.
    """

    name: str
    in_features: int
    out_features: int
    group_size: int | None
    note: str = ""


class QuantizeWeights(PassBase):
    """Matches linears with constant weights, writes the linear of a :class:`WeightFormat` (for experts, its own).

    Patterns: ``aten.linear(x, W, b)``, ``aten.addmm(b, x, W)`` (GPT-2's ``Conv1D``, weight transposed) and
    ``quantspec::expert_linear``. Left in full precision, with the reason in :attr:`report`: routers of experts, input
    widths that no group size of the format divides, experts where the format has no op for them, and the language-model
    head if ``quantize_lm_head`` is off.

    With a ``source`` of ready weights nothing is quantized.

    Requires nothing: a product whose second factor is no ``get_attr`` node is no linear. Ensures that every linear in
    full precision, and every other matrix that is no embedding, is in :attr:`report`.

    Attributes:
        report: one :class:`LinearReport` per linear, in graph order; filled by the call.
    """

    def __init__(
        self,
        weight_format: WeightFormat,
        group_size: int,
        quantizer: WeightQuantizer,
        quantize_lm_head: bool,
        source: WeightSource | None = None,
    ) -> None:
        """What to quantize and how.

        Args:
            weight_format: of the new weights.
            group_size: input channels that share a scale, one of :data:`GROUP_SIZES`; the most, where it does not
                divide an input width.
            quantizer: how torchao chooses scales and zeros.
            quantize_lm_head: whether the language-model head is quantized too.
            source: ready weights; a linear for which it gives None is quantized.
        """
        super().__init__()
        self.weight_format = weight_format
        self.group_size = group_size
        self.quantizer = quantizer
        self.quantize_lm_head = quantize_lm_head
        self.source = source
        self.report: list[LinearReport] = []

    def plan(self, graph_module: fx.GraphModule) -> list[tuple[fx.Node, str, Tensor, int]]:
        """Fill :attr:`report` and leave the graph as it is; returns what is quantized.

        One ``(node, name, weight (..., N, K), group size)`` for each linear.
        """
        head = logits_linear(graph_module.graph)
        linears = _linears(graph_module)
        plans = []
        for node, weight, tensor in linears:
            name = _linear_name(weight)
            out_features, in_features = tensor.shape[-2:]
            size, note = self._group_size(node, tensor, is_head=node is head)
            self.report.append(LinearReport(name, in_features, out_features, size, note))
            if size is not None:
                plans.append((node, name, tensor, size))
        self._report_others(graph_module, {str(weight.target) for _, weight, _ in linears})
        return plans

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        plans = self.plan(graph_module)
        weights = self.weight_format.name.upper()
        doing = f"quantizing to {weights}" if self.source is None else f"reading {weights} weights"
        with counting(_LOGGER, doing, len(plans)) as advance:
            freed = FreedMemory()
            for node, name, tensor, size in plans:
                self._rewrite(graph_module, node, name, tensor, size)
                freed.after(tensor)
                advance(1)
        if plans:
            finish(graph_module)
        return PassResult(graph_module, bool(plans))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        check_packed(graph_module)
        reported = {report.name for report in self.report}
        matrices = [weight for _, weight, _ in _linears(graph_module)] + _other_matrices(graph_module)
        assert reported.issuperset(_linear_name(weight) for weight in matrices)

    def _group_size(self, node: fx.Node, tensor: Tensor, is_head: bool) -> tuple[int | None, str]:
        """Group size of one linear, None where it stays in full precision, and what the report notes about it."""
        if is_head and not self.quantize_lm_head:
            return None, "language-model head, quantize_lm_head=False"
        if tensor.dim() == 3 and self.weight_format.expert_linear is None:
            return None, f"{self.weight_format.name} has no op for experts"
        in_features = tensor.shape[-1]
        size = self.weight_format.group_size(in_features, self.group_size)
        if size is None:
            return None, f"no group size of {GROUP_SIZES} up to {self.group_size} divides {in_features} inputs"
        if _is_router(node):
            return None, "router of experts"
        return size, "" if size == self.group_size else f"group size adapted from {self.group_size}"

    def _report_others(self, gm: fx.GraphModule, seen: set[str]) -> None:
        """Report matrices that reach the output other than through a linear of their own (experts picked by index),
        and those of modules that run as they are."""
        for node in _other_matrices(gm):
            if str(node.target) not in seen:
                seen.add(str(node.target))
                rows, width = node.meta["val"].shape[-2:]
                note = f"not the weight of a linear: read by {', '.join(sorted(map(str, _users_as_weight(node))))}"
                self.report.append(LinearReport(_linear_name(node), width, rows, None, note))
        for called in called_modules(gm):
            note = f"{type(called.module).__name__} runs as it is, since torch.export cannot follow it"
            for name, tensor in called.module.named_parameters():
                if tensor.dim() > 1:
                    path = f"{called.path}.{name}".removesuffix(".weight")
                    self.report.append(LinearReport(path, tensor.shape[-1], tensor.shape[-2], None, note))

    def _rewrite(self, gm: fx.GraphModule, node: fx.Node, name: str, tensor: Tensor, size: int) -> None:
        # Read now: the input may be a linear that has just been rewritten.
        x, _, bias, _ = _operands(node)
        weight_format = self.weight_format
        with gm.graph.inserting_before(node):
            # A tied weight may serve several linears; each keeps its own codes under its own node's name.
            weights = [
                add_buffer(gm, f"{name}_{node.name}_{part.name}", packed)
                for part, packed in zip(weight_format.parts, self._packed(name, tensor, size), strict=True)
            ]
            if tensor.dim() == 3:
                target, ids = weight_format.expert_linear, [node.args[1]]
            else:
                target, ids = weight_format.linear, []
            new = add_call(gm.graph, target, (x, *ids, *weights, bias), node, value=node.meta.get("val"))
        new.meta[PACKED_LINEARS] = PackedLinears(weight_format.name, ((name, tensor.shape[-2]),))
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)

    def _packed(self, name: str, tensor: Tensor, size: int) -> list[Tensor]:
        """The parts of one weight ``(N, K)``, or of a stack of experts' ``(E, N, K)``, on its device."""
        parts = None if self.source is None else self.source(self.weight_format, name, tuple(tensor.shape), size)
        if parts is None:
            return list(self.weight_format.packed(tensor, size, self.quantizer))
        return [part.to(tensor.device) for part in parts]


def _linears(gm: fx.GraphModule) -> list[tuple[fx.Node, fx.Node, Tensor]]:
    """Calls, weight nodes and weights ``(..., N, K)`` of linears in full precision, in graph order."""
    found = []
    for node in find_calls(gm.graph, *LINEAR_TARGETS, *_ADDMM_TARGETS, torch.ops.quantspec.expert_linear.default):
        if node.target in _ADDMM_TARGETS and not _is_linear(node):
            continue
        _, weight, _, transposed = _operands(node)
        if weight.op == "get_attr" and (tensor := get_tensor(gm, weight)).is_floating_point():
            found.append((node, weight, tensor.transpose(-1, -2) if transposed else tensor))
    return found


def _other_matrices(gm: fx.GraphModule) -> list[fx.Node]:
    """Nodes of parameters that are matrices, unless embeddings, packed experts' biases or unused."""
    parameters = dict(gm.named_parameters())
    return [
        node
        for node in gm.graph.nodes
        if node.op == "get_attr"
        and str(node.target) in parameters
        and _users_as_weight(node)
        and isinstance(node.meta.get("val"), Tensor)
        and node.meta["val"].dim() > 1
    ]


def _users_as_weight(node: fx.Node) -> set[Any]:
    return {user.target for user in node.users if PACKED_LINEARS not in user.meta} - _NOT_AS_WEIGHT


def _linear_name(weight: fx.Node) -> str:
    return own_name(str(weight.target)).removesuffix(".weight")


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, bool]:
    """Input, weight, bias and whether the weight is stored (K, N) instead of (N, K)."""
    if node.target in _ADDMM_TARGETS:
        bias, x, weight = (_argument(node, *operand) for operand in enumerate(("input", "mat1", "mat2")))
        return x, weight, bias, True
    if node.target is torch.ops.quantspec.expert_linear.default:
        args = node.args
        return args[0], args[2], args[3], bool(args[4])  # type: ignore[return-value]
    x, weight, bias = (_argument(node, *operand) for operand in enumerate(("input", "weight", "bias")))
    return x, weight, bias, False


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument that a traced program may have passed either way."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _is_linear(addmm: fx.Node) -> bool:
    """Whether an ``addmm`` adds the whole product to a bias vector."""
    factors = [_argument(addmm, position, name, 1) for position, name in ((3, "beta"), (4, "alpha"))]
    bias = _argument(addmm, 0, "input")
    value = bias.meta.get("val", bias.meta.get("example_value"))
    return factors == [1, 1] and (value is None or value.dim() == 1)


def _is_router(node: fx.Node, depth: int = _ROUTER_DEPTH) -> bool:
    """Whether a linear's output chooses experts: a top-k a few pointwise ops further on."""
    if depth == 0:
        return False
    for user in node.users:
        if user.target in (aten.topk.default, torch.topk):
            return True
        value = user.meta.get("val")
        if value is not None and not isinstance(value, tuple | list) and user.target not in LINEAR_TARGETS:
            same_width = isinstance(value, Tensor) and value.shape[-1:] == node.meta["val"].shape[-1:]
            if same_width and not _multiplies(user) and _is_router(user, depth - 1):
                return True
    return False


def _multiplies(node: fx.Node) -> bool:
    if node.target in (aten.matmul.default, aten.bmm.default, *_ADDMM_TARGETS):
        return True
    return PACKED_LINEARS in node.meta or str(node.target).startswith("quantspec")
