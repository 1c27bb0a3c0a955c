"""Give the draft INT4 weights, quantized by torchao."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from quantspec.config import GROUP_SIZES, WeightQuantizer
from quantspec.kernels.int4_linear import pack_int4

from .graph import add_buffer, add_call, aten, find_calls, finish, get_tensor
from .logit_rows import LINEAR_TARGETS, logits_linear

_LOGGER = logging.getLogger(__name__)

# Node metadata: names and rows of the linears whose INT4 weights a call holds, in the order of their rows.
INT4_LINEARS = "int4_linears"
Int4Source = Callable[[str, tuple[int, ...], int], tuple[Tensor, Tensor]]
"""Looks up ready INT4 weights: name of a linear, shape ``(..., N, K)`` of its weight and group size g to plain-layout
``qdata (..., N, K/2)`` uint8 and ``scale_and_zero (..., K/g, N, 2)`` float16 or bfloat16, on any device.
"""
_ADDMM_TARGETS = (aten.addmm.default, torch.addmm)
# Readers of a matrix that is a lookup table or holds the experts' biases.
_NOT_AS_WEIGHT = {
    aten.embedding.default,
    torch.ops.quantspec.expert_linear.default,
    torch.ops.quantspec.int4_expert_linear.default,
}
# How far from its linear a router's top-k may stand.
_ROUTER_DEPTH = 8


@dataclass(frozen=True)
class LinearReport:
    """What became of one linear (or one stack of experts) in the draft.

    Attributes:
        name: of the linear's module in the model.
        in_features, out_features: of the linear; of one expert for a stack of them.
        group_size: input channels that share an INT4 scale; None where the weight stays in full precision.
        note: why it does, or that the group size was adapted to the input width; else empty.
    """

    name: str
    in_features: int
    out_features: int
    group_size: int | None
    note: str = ""


def adapted_group_size(in_features: int, group_size: int) -> int | None:
    """The largest supported group size up to ``group_size`` that divides ``in_features``, or None."""
    return max((g for g in GROUP_SIZES if g <= group_size and in_features % g == 0), default=None)


def quantize_int4(weight: Tensor, group_size: int, quantizer: WeightQuantizer) -> tuple[Tensor, Tensor]:
    """Quantize ``(N, K)`` with torchao; returns plain-layout ``qdata (N, K/2)`` and ``scale_and_zero (K/g, N, 2)``.

    Scales are float16 for float16 weights, bfloat16 otherwise (the precision the INT4 kernels multiply in).
    """
    # torchao announces its optional extensions on import, so it is loaded only where a weight is quantized.
    from torchao.quantization import quant_primitives as primitives

    block = (1, group_size)
    w = weight.detach().float()
    dtype = torch.float16 if weight.dtype == torch.float16 else torch.bfloat16
    if quantizer is WeightQuantizer.HQQ:
        codes, scale, zero, _ = primitives._choose_qparams_and_quantize_affine_hqq(
            w, nbits=4, group_size=group_size, compute_dtype=dtype, device=w.device
        )
    else:
        scale, zero = primitives._choose_qparams_affine_tinygemm(
            w,
            primitives.MappingType.ASYMMETRIC,
            block,
            torch.int32,
            0,
            15,
            eps=1e-6,
            scale_dtype=dtype,
            zero_point_dtype=dtype,
        )
        codes = primitives._quantize_affine_tinygemm(w, block, scale.float(), zero.float(), torch.int32, 0, 15)
    rows = weight.shape[0]
    scale_and_zero = torch.stack((scale.reshape(rows, -1), zero.reshape(rows, -1)), -1)
    return pack_int4(codes), scale_and_zero.transpose(0, 1).contiguous()


class QuantizeWeights(PassBase):
    """Matches linears with constant weights, writes ``quantspec::int4_linear`` (experts: ``int4_expert_linear``).

    Patterns: ``aten.linear(x, W, b)``, ``aten.addmm(b, x, W)`` (GPT-2's ``Conv1D``, weight transposed) and
    ``quantspec::expert_linear``. Left in full precision, with the reason in :attr:`report`: routers of experts, input
    widths that no supported group size divides, and the language-model head if ``quantize_lm_head`` is off.

    With a ``source`` of ready weights nothing is quantized.

    Requires weights as ``get_attr`` nodes. Ensures that every such linear, and every other matrix that is no embedding,
    is in :attr:`report`.

    Attributes:
        report: one :class:`LinearReport` per linear, in graph order; filled by the call.
    """

    def __init__(
        self,
        group_size: int,
        quantizer: WeightQuantizer,
        quantize_lm_head: bool,
        source: Int4Source | None = None,
    ) -> None:
        """What to quantize and how.

        Args:
            group_size: input channels that share an INT4 scale, one of :data:`GROUP_SIZES`; the most, where it does not
                divide an input width.
            quantizer: how torchao chooses scales and zeros.
            quantize_lm_head: whether the language-model head is quantized too.
            source: ready weights.
        """
        super().__init__()
        self.group_size = group_size
        self.quantizer = quantizer
        self.quantize_lm_head = quantize_lm_head
        self.source = source
        self.report: list[LinearReport] = []

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        head = logits_linear(graph)
        plans = []
        for node in find_calls(graph, *LINEAR_TARGETS, *_ADDMM_TARGETS, torch.ops.quantspec.expert_linear.default):
            if node.target in _ADDMM_TARGETS and not _is_linear(node):
                continue
            _, weight, _, transposed = _operands(node)
            if weight.op == "get_attr" and get_tensor(graph_module, weight).is_floating_point():
                plans.append((node, weight, transposed))
        modified = False
        for index, (node, weight, transposed) in enumerate(plans):
            _LOGGER.info("quantizing to INT4", extra={"done": index, "total": len(plans)})
            tensor = get_tensor(graph_module, weight)
            tensor = tensor.transpose(-1, -2) if transposed else tensor
            name = str(weight.target).removeprefix("model.").removesuffix(".weight")
            out_features, in_features = tensor.shape[-2:]
            size, note = self._group_size(node, in_features, is_head=node is head)
            self.report.append(LinearReport(name, in_features, out_features, size, note))
            if size is not None:
                self._rewrite(graph_module, node, name, tensor, size)
                modified = True
        if modified:
            finish(graph_module)
        self._report_others(graph_module, {str(weight.target) for _, weight, _ in plans})
        return PassResult(graph_module, modified)

    def _group_size(self, node: fx.Node, in_features: int, is_head: bool) -> tuple[int | None, str]:
        """Group size of one linear, None where it stays in full precision, and what the report notes about it."""
        if is_head and not self.quantize_lm_head:
            return None, "language-model head, quantize_lm_head=False"
        size = adapted_group_size(in_features, self.group_size)
        if size is None:
            return None, f"no group size of {GROUP_SIZES} up to {self.group_size} divides {in_features} inputs"
        if _is_router(node):
            return None, "router of experts"
        return size, "" if size == self.group_size else f"group size adapted from {self.group_size}"

    def _report_others(self, gm: fx.GraphModule, seen: set[str]) -> None:
        """Report matrices that reach the output other than through a linear of their own (experts picked by index)."""
        for node in gm.graph.nodes:
            users = {user.target for user in node.users} - _NOT_AS_WEIGHT
            if node.op != "get_attr" or not users or str(node.target) in seen:
                continue
            seen.add(str(node.target))
            tensor = node.meta.get("val")
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and str(node.target) in dict(gm.named_parameters()):
                name = str(node.target).removeprefix("model.").removesuffix(".weight")
                note = f"not the weight of a linear: read by {', '.join(sorted(map(str, users)))}"
                self.report.append(LinearReport(name, tensor.shape[-1], tensor.shape[-2], None, note))

    def _rewrite(self, gm: fx.GraphModule, node: fx.Node, name: str, tensor: Tensor, size: int) -> None:
        # Read now: the input may be a linear that has just been rewritten.
        x, _, bias, _ = _operands(node)
        qdata, params = self._int4(name, tensor, size)
        with gm.graph.inserting_before(node):
            # A tied weight may serve several linears; each keeps its own codes under its own node's name.
            prefix = f"{name}_{node.name}"
            weights = (
                add_buffer(gm, f"{prefix}_qdata", qdata),
                add_buffer(gm, f"{prefix}_scale_and_zero", params),
            )
            if tensor.dim() == 3:
                target = torch.ops.quantspec.int4_expert_linear.default
                new = add_call(gm.graph, target, (x, node.args[1], *weights, bias), node, value=node.meta.get("val"))
            else:
                target = torch.ops.quantspec.int4_linear.default
                new = add_call(gm.graph, target, (x, *weights, bias), node, value=node.meta.get("val"))
        new.meta[INT4_LINEARS] = ((name, tensor.shape[-2]),)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)

    def _int4(self, name: str, tensor: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """``qdata`` and ``scale_and_zero`` of one weight ``(N, K)``, or of a stack of experts' ``(E, N, K)``."""
        if self.source is not None:
            qdata, params = self.source(name, tuple(tensor.shape), size)
            return qdata.to(tensor.device), params.to(tensor.device)
        if tensor.dim() == 2:
            return quantize_int4(tensor, size, self.quantizer)
        experts = [quantize_int4(matrix, size, self.quantizer) for matrix in tensor]
        qdata, params = (torch.stack(parts) for parts in zip(*experts, strict=True))
        return qdata, params


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
    return node.target in (aten.matmul.default, aten.bmm.default, *_ADDMM_TARGETS) or str(node.target).startswith(
        "quantspec"
    )
