"""FX passes: each file holds one rewrite of a captured decoder. ``README.md`` lists what every pass must keep."""

from quantspec.config import GROUP_SIZES, WeightQuantizer
from quantspec.kernels.cpu_features import cpu_lacks_half_matmul

from .absorb_latents import AbsorbLatents
from .attention_lowering import (
    ACCESSES,
    DECODED_ACCESS,
    SCORED_ACCESS,
    SCORED_DECODED_ACCESS,
    SPARSE_ACCESS,
    CacheAccess,
    LowerAttention,
    Role,
    cache_parts,
)
from .fuse_gates import FuseGates
from .fuse_linears import FuseSharedInputLinears
from .fuse_rank_norms import FuseRankNorms
from .fuse_rotation import FuseRotation
from .group_linears import GroupLinears
from .int4_epilogues import FuseInt4Epilogues
from .int4_norms import FuseInt4Norms
from .int4_weights import INT4
from .logit_rows import SelectLogitRows
from .place_constants import PlaceConstants
from .plain_weights import plain_weights, store_plain_weights
from .position_tables import MaterializePositionTables
from .prepack_int4 import PrepackInt4ForCpu
from .quantize_weights import LinearReport, QuantizeWeights, WeightSource
from .remove_no_ops import RemoveNoOps
from .row_linears import RowLinears
from .shard_linears import CannotShardError, Place, ShardLinears
from .token_mixing import CheckTokenMixing, TokenMixingError
from .weight_formats import Part, WeightFormat, WeightLayout, adapted_group_size, register
from .widen_linears import WidenLinears

__all__ = [
    "ACCESSES",
    "DECODED_ACCESS",
    "GROUP_SIZES",
    "INT4",
    "SCORED_ACCESS",
    "SCORED_DECODED_ACCESS",
    "SPARSE_ACCESS",
    "AbsorbLatents",
    "CacheAccess",
    "CannotShardError",
    "CheckTokenMixing",
    "FuseGates",
    "FuseInt4Epilogues",
    "FuseInt4Norms",
    "FuseRankNorms",
    "FuseRotation",
    "FuseSharedInputLinears",
    "GroupLinears",
    "LinearReport",
    "LowerAttention",
    "MaterializePositionTables",
    "Part",
    "Place",
    "PlaceConstants",
    "PrepackInt4ForCpu",
    "QuantizeWeights",
    "RemoveNoOps",
    "Role",
    "RowLinears",
    "SelectLogitRows",
    "ShardLinears",
    "TokenMixingError",
    "WeightFormat",
    "WeightLayout",
    "WeightQuantizer",
    "WeightSource",
    "WidenLinears",
    "adapted_group_size",
    "cache_parts",
    "cpu_lacks_half_matmul",
    "plain_weights",
    "register",
    "store_plain_weights",
]
