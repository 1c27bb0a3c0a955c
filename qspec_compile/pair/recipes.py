"""Recipes: what makes a role's graph out of one captured decoder.

A new kind of draft is a :class:`Recipe` of the role ``draft`` under a name of its own, registered with
:func:`register`, beside the op that reads the cache for it; ``convert(..., draft_recipe=NAME)`` takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase
from torch.fx.passes.infra.pass_manager import PassManager

from quantspec.capture import Capture
from quantspec.config import DraftAttention, QuantSpecConfig
from quantspec.errors import UnsupportedModelError
from quantspec.passes import (
    ACCESSES,
    DECODED_ACCESS,
    INT4,
    SCORED_ACCESS,
    SCORED_DECODED_ACCESS,
    SPARSE_ACCESS,
    CacheAccess,
    CheckTokenMixing,
    FuseGates,
    FuseRankNorms,
    FuseRotation,
    FuseSharedInputLinears,
    GroupLinears,
    LinearReport,
    LowerAttention,
    MaterializePositionTables,
    PlaceConstants,
    QuantizeWeights,
    RemoveNoOps,
    Role,
    RowLinears,
    SelectLogitRows,
    WeightFormat,
    WeightLayout,
    WeightSource,
    WidenLinears,
    cpu_lacks_half_matmul,
)
from quantspec.passes.graph import clone

ORDER = (
    CheckTokenMixing,
    PlaceConstants,
    RemoveNoOps,
    SelectLogitRows,
    MaterializePositionTables,
    LowerAttention,
    FuseRotation,
    QuantizeWeights,
    FuseSharedInputLinears,
    WeightLayout,
    FuseGates,
    GroupLinears,
    WidenLinears,
    RowLinears,
    FuseRankNorms,
)
"""The passes in the order in which a graph goes through those that its role has."""


@dataclass(frozen=True)
class Recipe:
    """What makes a role.

    Attributes:
        name: by which options choose among the recipes of one role.
        role: that it plays.
        access: the op that reads the cache, the parts it reads, and further inputs of the graph.
        weight_format: of its linears; None keeps the model's own weights.
        compiles: whether its graph goes through torch.compile where the pair does.
        more_passes: makes the passes that run last.
        access_on_cpu: of a draft that reads all of a context, on a CPU; None for ``access`` there, too.
    """

    name: str
    role: Role
    access: CacheAccess
    weight_format: WeightFormat | None = None
    compiles: bool = True
    more_passes: Callable[[], Sequence[PassBase]] = tuple
    access_on_cpu: CacheAccess | None = None


def _widen_where_emulated() -> Sequence[PassBase]:
    return [WidenLinears()] if cpu_lacks_half_matmul() else []


def _rows_where_native() -> Sequence[PassBase]:
    return [] if cpu_lacks_half_matmul() else [RowLinears()]


_RECIPES: dict[tuple[Role, str], Recipe] = {}


def register(recipe: Recipe) -> Recipe:
    """Make a recipe known under its role and name; one registered before under both is replaced.

    Raises:
        TypeError: its access, format or passes are of another type.
        ValueError: there is no such role.
    """
    if recipe.role not in list(Role):
        raise ValueError(f"role of recipe '{recipe.name}' must be one of {', '.join(Role)}, not {recipe.role!r}")
    if not isinstance(recipe.access, CacheAccess):
        raise TypeError(f"access of recipe '{recipe.name}' must be a CacheAccess, not {recipe.access!r}")
    if not isinstance(recipe.weight_format, WeightFormat | None):
        raise TypeError(f"weight_format of recipe '{recipe.name}' must be a WeightFormat, not {recipe.weight_format!r}")
    if not callable(recipe.more_passes):
        raise TypeError(f"more_passes of recipe '{recipe.name}' must make the passes: a function, not a list of them")
    _RECIPES[recipe.role, recipe.name] = recipe
    return recipe


register(Recipe("target", Role.TARGET, ACCESSES[Role.TARGET], more_passes=lambda: [FuseGates(), GroupLinears()]))
register(Recipe("target on a CPU", Role.TARGET, DECODED_ACCESS, more_passes=_rows_where_native))
# Long prompts take their time in large matmuls: not worth the wait for a compilation, see Pair.fill.
register(Recipe("prefill", Role.PREFILL, ACCESSES[Role.PREFILL], compiles=False, more_passes=_widen_where_emulated))
# A CPU takes longer to decode planes at 4 bits than to read the copy at 8 bits that its target reads.
register(
    Recipe(
        QuantSpecConfig.draft_recipe,
        Role.DRAFT,
        ACCESSES[Role.DRAFT],
        INT4,
        access_on_cpu=DECODED_ACCESS,
        more_passes=_rows_where_native,
    )
)
# What a GPU's draft reads, on a CPU too: to measure there what will be accepted on a GPU.
register(Recipe("int4-cache", Role.DRAFT, ACCESSES[Role.DRAFT], INT4))


def recipes_for(config: QuantSpecConfig, device: torch.device | str = "cuda") -> Mapping[Role, Recipe]:
    """The recipe of each role under these options on ``device``.

    Raises:
        ValueError: no draft of that name is registered, listing those that are; or it cannot be sparse.
    """
    on_cpu = torch.device(device).type == "cpu"
    target = "target on a CPU" if on_cpu else "target"
    names = {Role.TARGET: target, Role.PREFILL: "prefill", Role.DRAFT: config.draft_recipe}
    if (Role.DRAFT, config.draft_recipe) not in _RECIPES:
        known = ", ".join(repr(name) for role, name in _RECIPES if role is Role.DRAFT)
        raise ValueError(f"draft_recipe must be one of {known}, not {config.draft_recipe!r}; register() adds others")
    recipes = {role: _RECIPES[role, name] for role, name in names.items()}
    draft = recipes[Role.DRAFT]
    if config.draft_attention is DraftAttention.FULL:
        if on_cpu and draft.access_on_cpu is not None:
            recipes[Role.DRAFT] = replace(draft, access=draft.access_on_cpu)
        return recipes
    if draft.access != ACCESSES[Role.DRAFT]:
        raise ValueError(
            f"draft_attention={config.draft_attention.value!r} is for drafts that read the cache as 'int4' does; "
            f"draft_recipe {config.draft_recipe!r} reads it in a way of its own, so leave draft_attention 'full'"
        )
    scored = SCORED_DECODED_ACCESS if on_cpu else SCORED_ACCESS
    recipes[Role.TARGET] = replace(recipes[Role.TARGET], access=scored)
    return {**recipes, Role.DRAFT: replace(draft, access=SPARSE_ACCESS)}


def weight_passes(
    weight_format: WeightFormat, config: QuantSpecConfig, source: WeightSource | None = None
) -> tuple[QuantizeWeights, list[PassBase]]:
    """The passes that give a graph weights of a format, in order, and the first one by itself for its report."""
    quantize = QuantizeWeights(
        weight_format, config.weight_group_size, config.weight_quantizer, config.quantize_lm_head, source
    )
    return quantize, [quantize, FuseSharedInputLinears(), *(layout() for layout in weight_format.layouts)]


def run_passes(graph_module: fx.GraphModule, passes: Sequence[PassBase]) -> fx.GraphModule:
    """Run ``passes``, each once, in their order, which :data:`ORDER` must have too; returns the rewritten module."""
    manager = PassManager(passes=list(passes), constraints=[_in_order])  # type: ignore[list-item]
    manager.validate_constraints()
    try:
        return manager(graph_module).graph_module
    except Exception as error:
        # PassManager wraps a pass's own error into a bare Exception that names no node.
        raise (error.__cause__ or error) from None


def _in_order(first: PassBase, second: PassBase) -> bool:
    """Whether ``first`` may run before ``second``; of passes that are not in :data:`ORDER` any may."""
    places = [[place for place, kind in enumerate(ORDER) if isinstance(one, kind)] for one in (first, second)]
    return places[0] <= places[1] if all(places) else True


def common_graph(captured: Capture, config: QuantSpecConfig, vocab_size: int) -> fx.GraphModule:
    """What the graphs of all roles begin as, with attention markers still.

    Args:
        captured: the decoder; it is left as it is.
        config: the options, with a ``max_cache_len``.
        vocab_size: token ids that the embedding knows.

    Raises:
        UnsupportedModelError: the graph mixes tokens outside attention, or has no language-model head.
    """
    base = clone(captured.graph_module)
    assert config.max_cache_len is not None
    check = CheckTokenMixing(vocab_size, config.max_cache_len)
    rest = [PlaceConstants(), RemoveNoOps(), SelectLogitRows(), MaterializePositionTables()]
    try:
        return run_passes(base, [check, *rest])
    except ValueError as error:
        raise UnsupportedModelError(str(error)) from error


def build_graphs(
    base: fx.GraphModule,
    config: QuantSpecConfig,
    recipes: Mapping[Role, Recipe],
    source: WeightSource | None = None,
    shared: Mapping[int, int] | None = None,
) -> tuple[Mapping[Role, fx.GraphModule], tuple[LinearReport, ...]]:
    """The lowered graph of each role, and what became of the weights of the draft.

    Args:
        base: their :func:`common_graph`; it is left as it is.
        config: the options.
        recipes: of each role.
        source: has ready weights of the draft; without it they are quantized.
        shared: layers that read the keys and values of an earlier one, with the number of that.
    """
    graphs, linears = {}, []
    for role, recipe in recipes.items():
        passes: list[PassBase] = [LowerAttention(recipe.access, config.kv_group_size, shared), FuseRotation()]
        if recipe.weight_format is not None:
            quantize, of_weights = weight_passes(recipe.weight_format, config, source)
            passes += of_weights
            linears = quantize.report
        # Cloning once more drops the full-precision weights that were replaced.
        graphs[role] = clone(run_passes(clone(base), [*passes, *recipe.more_passes(), FuseRankNorms()]))
    return graphs, tuple(linears)
