"""FX passes: each file holds one rewrite of a captured decoder. ``README.md`` lists what every pass must keep."""

from quantspec.config import GROUP_SIZES, WeightQuantizer

from .attention_lowering import CACHE_PARTS, LowerAttention, Role, cache_parts
from .fuse_linears import FuseSharedInputLinears
from .int4_weights import Int4Source, LinearReport, QuantizeWeights, adapted_group_size
from .logit_rows import SelectLogitRows
from .plain_int4 import plain_int4_weights
from .position_tables import MaterializePositionTables
from .prepack_int4 import PrepackInt4ForCpu
from .remove_no_ops import RemoveNoOps
from .support import CheckTokenMixing, TokenMixingError
from .widen_linears import WidenLinears, cpu_lacks_half_matmul

__all__ = [
    "CACHE_PARTS",
    "GROUP_SIZES",
    "CheckTokenMixing",
    "FuseSharedInputLinears",
    "Int4Source",
    "LinearReport",
    "LowerAttention",
    "MaterializePositionTables",
    "PrepackInt4ForCpu",
    "QuantizeWeights",
    "RemoveNoOps",
    "Role",
    "SelectLogitRows",
    "TokenMixingError",
    "WeightQuantizer",
    "WidenLinears",
    "adapted_group_size",
    "cache_parts",
    "cpu_lacks_half_matmul",
    "plain_int4_weights",
]
