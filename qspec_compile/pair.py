"""Pairing: from one captured decoder to the target, draft and prefill graphs that share weights and cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase
from torch.fx.passes.infra.pass_manager import PassManager

from quantspec.passes import (
    INT4,
    CheckTokenMixing,
    FuseSharedInputLinears,
    LinearReport,
    LowerAttention,
    MaterializePositionTables,
    QuantizeWeights,
    RemoveNoOps,
    Role,
    SelectLogitRows,
    WeightLayout,
    WeightSource,
    WidenLinears,
    cpu_lacks_half_matmul,
)
from quantspec.passes.graph import clone

from .capture import Capture
from .config import QuantSpecConfig
from .errors import UnsupportedModelError

DRAFT_WEIGHTS = INT4
"""The format of the draft's weights."""
ORDER = (
    CheckTokenMixing,
    RemoveNoOps,
    SelectLogitRows,
    MaterializePositionTables,
    LowerAttention,
    QuantizeWeights,
    FuseSharedInputLinears,
    WeightLayout,
    WidenLinears,
)
"""The passes in the order in which a graph goes through those that its role has."""


@dataclass(frozen=True)
class Pair:
    """The lowered graphs of one model.

    Every graph takes ``input_ids (B, T)``, ``position_ids (B, T)``, ``logit_rows (B, R)``, ``quantized_len (B,)``,
    ``length (B,)``, for prefill ``num_new (B,)``, all int64, then ``HierarchicalCache.inputs(role)``; it returns logits
    ``(B, R, V)`` in the model's dtype.

    Attributes:
        target: reads a few tokens, and the cache at 8 bits; the model's own weights.
        draft: reads a few tokens, and the cache at 4 bits; INT4 weights.
        prefill: reads a prompt and fills the cache; the model's own weights.
        linears: what became of each of the draft's weights.
    """

    target: fx.GraphModule
    draft: fx.GraphModule
    prefill: fx.GraphModule
    linears: tuple[LinearReport, ...]


def draft_weight_passes(
    config: QuantSpecConfig, source: WeightSource | None = None
) -> tuple[QuantizeWeights, list[PassBase]]:
    """The passes that give a graph the draft's weights, in order, and the first one by itself for its report."""
    quantize = QuantizeWeights(
        DRAFT_WEIGHTS, config.weight_group_size, config.weight_quantizer, config.quantize_lm_head, source
    )
    return quantize, [quantize, FuseSharedInputLinears(), *(layout() for layout in DRAFT_WEIGHTS.layouts)]


def run_passes(graph_module: fx.GraphModule, passes: Sequence[PassBase]) -> fx.GraphModule:
    """Run ``passes``, each once, in their order, which :data:`ORDER` must have too; returns the rewritten module."""
    manager = PassManager(passes=list(passes), constraints=[_in_order])
    manager.validate_constraints()
    try:
        return manager(graph_module).graph_module
    except Exception as error:
        # PassManager wraps a pass's own error into a bare Exception that names no node.
        raise (error.__cause__ or error) from None


def _in_order(first: Callable[..., Any], second: Callable[..., Any]) -> bool:
    """Whether ``first`` may run before ``second``; of passes that are not in :data:`ORDER` any may."""
    places = [[place for place, kind in enumerate(ORDER) if isinstance(one, kind)] for one in (first, second)]
    return places[0] <= places[1] if all(places) else True


def build_pair(captured: Capture, config: QuantSpecConfig, vocab_size: int, source: WeightSource | None = None) -> Pair:
    """Clone the captured graph once per role and run that role's passes; ``source`` has the draft's weights.

    Raises:
        UnsupportedModelError: the graph mixes tokens outside attention, or has no language-model head.
    """
    base = clone(captured.graph_module)
    quantize, weight_passes = draft_weight_passes(config, source)
    try:
        run_passes(base, [CheckTokenMixing(vocab_size), RemoveNoOps(), SelectLogitRows(), MaterializePositionTables()])
    except ValueError as error:
        raise UnsupportedModelError(str(error)) from error
    graphs = {role: run_passes(clone(base), [LowerAttention(role, config.kv_group_size)]) for role in Role}
    if cpu_lacks_half_matmul():
        graphs[Role.PREFILL] = run_passes(graphs[Role.PREFILL], [WidenLinears()])
    # Cloning once more drops the full-precision weights that were replaced.
    draft = clone(run_passes(graphs[Role.DRAFT], weight_passes))
    return Pair(graphs[Role.TARGET], draft, graphs[Role.PREFILL], tuple(quantize.report))


def unique_tensors(*modules: torch.nn.Module) -> dict[int, Tensor]:
    """Parameters and buffers by address, so that shared storage counts once."""
    return {t.data_ptr(): t for module in modules for t in (*module.parameters(), *module.buffers())}
