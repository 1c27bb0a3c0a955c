"""Pairing: from one captured decoder to the target, draft and prefill graphs that share weights and cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase
from torch.fx.passes.infra.pass_manager import PassManager

from quantspec.passes import (
    CheckTokenMixing,
    FuseSharedInputLinears,
    Int4Source,
    LinearReport,
    LowerAttention,
    MaterializePositionTables,
    PrepackInt4ForCpu,
    QuantizeWeights,
    RemoveNoOps,
    Role,
    SelectLogitRows,
    WidenLinears,
    cpu_lacks_half_matmul,
)
from quantspec.passes.graph import clone

from .capture import Capture
from .config import QuantSpecConfig
from .errors import UnsupportedModelError


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
    config: QuantSpecConfig, source: Int4Source | None = None
) -> tuple[QuantizeWeights, list[PassBase]]:
    """The passes that give a graph INT4 weights, in order, and the first one by itself for its report."""
    quantize = QuantizeWeights(config.weight_group_size, config.weight_quantizer, config.quantize_lm_head, source)
    return quantize, [quantize, FuseSharedInputLinears(), PrepackInt4ForCpu()]


def run_passes(graph_module: fx.GraphModule, passes: Sequence[PassBase]) -> fx.GraphModule:
    """Run ``passes`` in order, each once; returns the rewritten module."""
    try:
        return PassManager(passes=list(passes))(graph_module).graph_module
    except Exception as error:
        # PassManager wraps a pass's own error into a bare Exception that names no node.
        raise (error.__cause__ or error) from None


def build_pair(captured: Capture, config: QuantSpecConfig, vocab_size: int, source: Int4Source | None = None) -> Pair:
    """Clone the captured graph once per role and run that role's passes; ``source`` has ready INT4 weights.

    ``config`` has a ``max_cache_len``.

    Raises:
        UnsupportedModelError: the graph mixes tokens outside attention, or has no language-model head.
    """
    base = clone(captured.graph_module)
    quantize, weight_passes = draft_weight_passes(config, source)
    assert config.max_cache_len is not None
    check = CheckTokenMixing(vocab_size, config.max_cache_len)
    try:
        run_passes(base, [check, RemoveNoOps(), SelectLogitRows(), MaterializePositionTables()])
    except ValueError as error:
        raise UnsupportedModelError(str(error)) from error
    graphs = {role: run_passes(clone(base), [LowerAttention(role, config.kv_group_size)]) for role in Role}
    if cpu_lacks_half_matmul():
        graphs[Role.PREFILL] = run_passes(graphs[Role.PREFILL], [WidenLinears()])
    # Cloning once more drops the full-precision weights that INT4 replaced.
    draft = clone(run_passes(graphs[Role.DRAFT], weight_passes))
    return Pair(graphs[Role.TARGET], draft, graphs[Role.PREFILL], tuple(quantize.report))


def unique_tensors(*modules: torch.nn.Module) -> dict[int, Tensor]:
    """Parameters and buffers by address, so that shared storage counts once."""
    return {t.data_ptr(): t for module in modules for t in (*module.parameters(), *module.buffers())}
