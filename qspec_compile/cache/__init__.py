"""The hierarchical KV cache: its sizes (``geometry``), lengths (``lengths``) and tensors (``hierarchical_cache``)."""

from quantspec.errors import CacheFullError

from .hierarchical_cache import HierarchicalCache, LayerCache, check_cache_len
from .lengths import Lengths
from .page_choice import PageBudget

__all__ = ["CacheFullError", "HierarchicalCache", "LayerCache", "Lengths", "PageBudget", "check_cache_len"]
