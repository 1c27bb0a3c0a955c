"""The two graphs of tuning: the target over whole texts, and the draft over what the target has cached of them.

Both come from the pair's capture by the passes that make the roles. The draft's graph shares codes with the pair's
draft and takes scales and zeros that are being learned; it runs, and for the gradient runs again, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from quantspec.cache.geometry import part_shape
from quantspec.capture import CapturedLayer
from quantspec.kernels.cache_layout import CACHE_PARTS, part_names
from quantspec.kernels.hierarchical import encode_keys, encode_values
from quantspec.pair import Pair
from quantspec.pair.compile_by_layer import Region, layer_regions, region_graph
from quantspec.pair.recipes import run_passes
from quantspec.passes import CacheAccess, LowerAttention, QuantizeWeights, Role, plain_weights
from quantspec.passes.called_modules import called_modules
from quantspec.passes.graph import clone, find_calls, get_tensor
from quantspec.passes.weight_formats import PACKED_LINEARS, format_of, part_nodes

_TEACHER = CacheAccess(torch.ops.quantspec.teaching_attention.default, part_names("recent"))
# Their rows go from expert to expert by the host's hand.
_HOST_SORTS = (torch.ops.quantspec.expert_linear.default, torch.ops.quantspec.int4_expert_linear.default)
_STUDENT = CacheAccess(torch.ops.quantspec.tuning_attention.default, part_names("recent", "upper", "scales"))


class Learned:
    """Scales and zeros of one linear while they are learned.

    Attributes:
        change: float32, like the packed ``(..., 2)`` ones: the logarithm by which a scale grows, and what a zero gains
            in scales, so that one rate of learning suits all.
    """

    def __init__(self, packed: Tensor) -> None:
        self._initial = packed.detach().float()
        self._dtype = packed.dtype
        self.change = torch.zeros_like(self._initial, requires_grad=True)

    def __call__(self) -> Tensor:
        """Scales and zeros as they would be stored, in float32; the gradient passes over the rounding."""
        scale, zero = self._initial.unbind(-1)
        growth, gain = self.change.unbind(-1)
        exact = torch.stack((scale * growth.exp(), zero + scale * gain), -1)
        return exact + (exact.to(self._dtype) - exact).detach()


def _captures(graph_module: fx.GraphModule) -> bool:
    """Whether a graph runs without the host, so that CUDA graphs can hold it."""
    graph = graph_module.graph
    tensors = (get_tensor(graph_module, node) for node in graph.nodes if node.op == "get_attr")
    on_host = any(find_calls(graph, *_HOST_SORTS)) or called_modules(graph_module)
    return len({tensor.device for tensor in tensors}) == 1 and not on_host


class Teacher:
    """The target over whole texts.

    Attributes:
        captures: whether CUDA graphs can hold it.
    """

    def __init__(self, graph_module: fx.GraphModule, layers: Sequence[CapturedLayer], group_size: int) -> None:
        self._graph_module = graph_module
        self._layers = layers
        self._group_size = group_size
        self.captures = _captures(graph_module)

    @torch.no_grad()
    def read(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits ``(B, T, V)`` of texts ``ids (B, T)``, and the cache that the draft's graph takes."""
        size, dtype = self._group_size, next(self._graph_module.parameters()).dtype
        batch, tokens = ids.shape
        recent = [
            ids.new_empty(part_shape(part, layer, batch, 0, size, tokens), dtype=dtype)
            for layer in self._layers
            for part in CACHE_PARTS
            if part.kind == "recent"
        ]
        logits = self._graph_module.forward(*_inputs(ids), *recent)
        cache = []
        for keys, values in zip(recent[::2], recent[1::2], strict=True):
            parts = {"k_recent": keys, "v_recent": values}
            for letter, tensor, encode in (("k", keys, encode_keys), ("v", values, encode_values)):
                groups = tensor[:, :, : tokens // size * size].unflatten(2, (tokens // size, size))
                parts[f"{letter}_upper"], _, parts[f"{letter}_scale"], parts[f"{letter}_zero"] = encode(groups)
            cache += [parts[name] for name in _STUDENT.parts]
        return logits, cache


class Student:
    """The draft over whole texts, with gradients for what it learns.

    Attributes:
        learned: by name of the linear.
        captures: whether CUDA graphs can hold it.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.learned: dict[str, Learned] = {}
        self.captures = _captures(graph_module)
        learned_nodes: dict[fx.Node, Learned] = {}
        for node in graph_module.graph.nodes:
            if PACKED_LINEARS in node.meta:
                # A weight that serves several linears learns from all of them.
                ((name, _),) = node.meta[PACKED_LINEARS].rows
                part = part_nodes(node)[format_of(node).learned]
                if name not in self.learned:
                    self.learned[name] = Learned(get_tensor(graph_module, part))
                learned_nodes[part] = self.learned[name]
        self._placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        regions = layer_regions(graph_module.graph)
        self._regions = [(region, _Runs(graph_module, region, learned_nodes)) for region in regions]

    @property
    def parameters(self) -> list[Tensor]:
        """All that is learned."""
        return [learned.change for learned in self.learned.values()]

    def read(self, ids: Tensor, cache: Sequence[Tensor]) -> Tensor:
        """Logits ``(B, T, V)`` of texts ``ids (B, T)``, each token read with the cache of those before it."""
        values = dict(zip(self._placeholders, (*_inputs(ids), *cache), strict=True))
        outputs: tuple[Tensor, ...] = ()
        for region, runs in self._regions:
            inputs = (values[node] for node in region.inputs)
            outputs = checkpoint(runs, *inputs, use_reentrant=False, preserve_rng_state=False)
            values.update(zip(region.outputs, outputs, strict=True))
        return outputs[0]


class _Runs:
    """A region as a function of its inputs."""

    def __init__(self, graph_module: fx.GraphModule, region: Region, learned: dict[fx.Node, Learned]) -> None:
        self._module = fx.GraphModule(graph_module, region_graph(region))
        self._tensors = [learned.get(node) or _constant(get_tensor(graph_module, node)) for node in region.tensors]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        tensors = (tensor() if isinstance(tensor, Learned) else tensor for tensor in self._tensors)
        return self._module.forward(*inputs, *tensors)


def _constant(tensor: Tensor) -> Tensor:
    """A tensor of the model's or the draft's as gradients pass by it; one of inference mode is copied for that."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _inputs(ids: Tensor) -> tuple[Tensor, ...]:
    """Ids, positions, logit rows and lengths of whole texts."""
    rows = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    none = ids.new_zeros(len(ids))
    return ids, rows, rows, none, none


def tuning_graphs(pair: Pair) -> tuple[Teacher, Student]:
    """The two of a pair whose draft's weight format has something to learn."""
    size = pair.config.kv_group_size
    teacher = clone(run_passes(clone(pair.common), [LowerAttention(_TEACHER, size)]))
    weight_format = pair.draft_weights
    assert weight_format is not None
    ready = plain_weights(pair.graphs[Role.DRAFT])
    quantize = QuantizeWeights(
        weight_format,
        pair.config.weight_group_size,
        pair.config.weight_quantizer,
        pair.config.quantize_lm_head,
        source=lambda _, name, *__: tuple(ready[name].values()),
    )
    student = clone(run_passes(clone(pair.common), [LowerAttention(_STUDENT, size), quantize]))
    return Teacher(teacher, pair.layers, size), Student(student)
