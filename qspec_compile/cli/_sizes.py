"""What ``quantspec inspect`` tells of a model, whoever found it out; imports nothing that takes long."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from quantspec.config import QuantSpecConfig


@dataclass(frozen=True)
class Layer:
    """An attention call, with what it has of :class:`quantspec.capture.CapturedLayer`."""

    module: str
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    has_sinks: bool = False
    values_in_keys: bool = False


@dataclass(frozen=True)
class Linear:
    """One of the draft's weights: what becomes of it, and its bytes in the model and (if packed) in the draft.

    The others are those of :class:`quantspec.passes.LinearReport`.
    """

    name: str
    in_features: int
    out_features: int
    group_size: int | None
    note: str
    model_bytes: int
    draft_bytes: int


@dataclass(frozen=True)
class Sizes:
    """A model's attention layers, linears and bytes as ``convert`` would have them.

    Attributes:
        model: transformers' class name.
        dtype: name of the weights' dtype.
        itemsize: bytes of a weight.
        options: of the conversion.
        layers: attention calls in forward order.
        linears: the draft's weights in forward order.
        weight_bytes: ``target`` (the model) and ``draft_int4`` (what the draft adds).
        max_len: the model's ``max_position_embeddings``, or None.
        cache_parts: from tokens of a text and texts to bytes of quantspec's cache by part, the decoded copy of a CPU
            among them.
        pool_parts: the same of an engine's cache, whose layers have every page, also those with a window.
        full_precision: from the same to bytes of transformers' own cache.
        whole: of a rank, bytes of what every rank has whole and computes, by name.
    """

    model: str
    dtype: str
    itemsize: int
    options: QuantSpecConfig
    layers: tuple[Layer, ...]
    linears: tuple[Linear, ...]
    weight_bytes: dict[str, int]
    max_len: int | None
    cache_parts: Callable[[int, int], dict[str, int]]
    pool_parts: Callable[[int, int], dict[str, int]]
    full_precision: Callable[[int, int], int]
    whole: Mapping[str, int] = field(default_factory=dict)

    @property
    def limit(self) -> int | None:
        """Most tokens of a text."""
        return self.options.max_cache_len or self.max_len
