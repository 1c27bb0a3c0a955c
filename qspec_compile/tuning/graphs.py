"""The two graphs of tuning: the target over whole texts, and the draft over what the target has cached of them.

Both come from the pair's capture by the passes that make the roles. The draft's graph takes scales and zeros that are
being learned; it runs, and for the gradient runs again, layer by layer.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from quantspec.cache.geometry import part_shape
from quantspec.capture import CapturedLayer
from quantspec.kernels.cache_layout import CACHE_PARTS, part_names
from quantspec.kernels.hierarchical import encode_keys, encode_values
from quantspec.logging import counting
from quantspec.pair import Pair
from quantspec.pair.compile_by_layer import Region, layer_regions, region_graph
from quantspec.pair.recipes import run_passes
from quantspec.passes import CacheAccess, LowerAttention, QuantizeWeights, Role, WeightSource, plain_weights
from quantspec.passes.called_modules import called_modules
from quantspec.passes.graph import clone, find_calls, get_tensor
from quantspec.passes.out_of_place import OutOfPlaceError, WriteOutOfPlace
from quantspec.passes.weight_formats import PACKED_LINEARS, format_of, part_nodes

from .gptq import InputProducts

_LOGGER = logging.getLogger(__name__)

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
        parts: of each packed weight as they are before anything is learned, by name of the linear and of the part.
        captures: whether CUDA graphs can hold it.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.learned: dict[str, Learned] = {}
        self.parts: dict[str, dict[str, Tensor]] = {}
        self.captures = _captures(graph_module)
        learned_nodes: dict[fx.Node, Learned] = {}
        for node in graph_module.graph.nodes:
            if PACKED_LINEARS in node.meta:
                # A weight that serves several linears learns from all of them.
                ((name, _),) = node.meta[PACKED_LINEARS].rows
                nodes = part_nodes(node)
                part = nodes[format_of(node).learned]
                if name not in self.learned:
                    self.learned[name] = Learned(get_tensor(graph_module, part))
                    self.parts[name] = {of: get_tensor(graph_module, at) for of, at in nodes.items()}
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

    @torch.no_grad()
    def choose_codes(self, teacher: Teacher, texts: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Give INT4 linears codes by GPTQ, layer by layer, on what they read of ``texts (n, T)``.

        Args:
            teacher: the target, whose cache the draft reads.
            texts: read one by one; their caches are held all at once.
            weights: dense ones ``(N, K)``, by name of the linear.
        """
        values = [
            dict(zip(self._placeholders, (*_inputs(ids), *teacher.read(ids)[1]), strict=True)) for ids in texts.split(1)
        ]
        with counting(_LOGGER, "choosing codes", len(self._regions)) as advance:
            for region, runs in self._regions:
                inputs = [[of[node] for node in region.inputs] for of in values]
                runs.choose_codes(inputs, weights)
                for of, given in zip(values, inputs, strict=True):
                    of.update(zip(region.outputs, runs(*given), strict=True))
                advance(1)


class _Runs:
    """A region as a function of its inputs."""

    def __init__(self, graph_module: fx.GraphModule, region: Region, learned: dict[fx.Node, Learned]) -> None:
        self._module = fx.GraphModule(graph_module, region_graph(region))
        self._tensors = [learned.get(node) or _constant(get_tensor(graph_module, node)) for node in region.tensors]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._module.forward(*inputs, *self._given())

    def choose_codes(self, inputs: Sequence[Sequence[Tensor]], weights: Mapping[str, Tensor]) -> None:
        """As the draft's; ``inputs`` are those of each text."""
        products, given = InputProducts(self._module, weights), self._given()
        for of_text in inputs:
            products.run(*of_text, *given)
        products.choose_codes()

    def _given(self) -> list[Tensor]:
        return [tensor() if isinstance(tensor, Learned) else tensor for tensor in self._tensors]


def _constant(tensor: Tensor) -> Tensor:
    """A tensor of the model's or the draft's as gradients pass by it; one of inference mode is copied for that."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _inputs(ids: Tensor) -> tuple[Tensor, ...]:
    """Ids, positions, logit rows and lengths of whole texts."""
    rows = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    none = ids.new_zeros(len(ids))
    return ids, rows, rows, none, none


def tuning_graphs(pair: Pair, own_codes: bool = False) -> tuple[Teacher, Student]:
    """The two of a pair whose draft's weight format has something to learn.

    With ``own_codes`` matrices have codes of the draft's graph alone, to be chosen anew; else, as stacks of experts in
    any case, those of the pair's draft.
    """
    size = pair.config.kv_group_size
    teacher = clone(run_passes(clone(pair.common), [LowerAttention(_TEACHER, size)]))
    ready = plain_weights(pair.graphs[Role.DRAFT])
    for parts in ready.values() if own_codes else ():
        parts.update({name: part.clone() for name, part in parts.items() if part.dim() == 2})
    quantize = _quantize(pair, lambda _, name, *__: tuple(ready[name].values()))
    student = clone(run_passes(_written_out_of_place(pair.common), [LowerAttention(_STUDENT, size), quantize]))
    return Teacher(teacher, pair.layers, size), Student(student)


def _written_out_of_place(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A clone that writes into no tensor, since gradients may need what was there; a plain one where that fails."""
    written = clone(graph_module)
    try:
        WriteOutOfPlace()(written)
    except OutOfPlaceError as error:
        _LOGGER.debug("gradients pass a graph that writes into tensors, for %s", error)
        return clone(graph_module)
    return written


def dense_weights(pair: Pair) -> dict[str, Tensor]:
    """The model's weight ``(N, K)`` of every packed linear that is read once and is no stack of experts, by name."""
    found = [(name, weight) for _, name, weight, _ in _quantize(pair).plan(pair.common) if weight.dim() == 2]
    reads = Counter(name for name, _ in found)
    return {name: weight for name, weight in found if reads[name] == 1}


def _quantize(pair: Pair, source: WeightSource | None = None) -> QuantizeWeights:
    config, weight_format = pair.config, pair.draft_weights
    assert weight_format is not None
    return QuantizeWeights(
        weight_format, config.weight_group_size, config.weight_quantizer, config.quantize_lm_head, source
    )
