"""The hierarchical KV cache: its sizes (``geometry``), and the tensors and lengths (``hierarchical_cache``)."""

from quantspec.errors import CacheFullError

from .hierarchical_cache import HierarchicalCache, LayerCache, check_cache_len
from .page_choice import PageBudget

__all__ = ["CacheFullError", "HierarchicalCache", "LayerCache", "PageBudget", "check_cache_len"]
