"""transformers' registries of attention, masks and experts, pointed at functions that emit markers.

For the length of a capture, and on a copy of the model's config, attention becomes one ``quantspec::attention`` node,
a mask becomes a :class:`MaskSpec` that says what it would have been, and expert layers become two
``quantspec::expert_linear`` nodes around the model's own activation.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantspec.cache.geometry import HeldState
from quantspec.errors import UnsupportedModelError
from quantspec.kernels import attention, expert_linear

from .token_flow import follows

IMPLEMENTATION = "quantspec_capture"
_CONVOLUTIONS = frozenset({torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d})
_RECURRENT = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})

# Keyword arguments that models pass to the attention interface and that do not change what it computes here.
_NEUTRAL_ATTENTION_KWARGS = frozenset(
    {
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "use_cache",
        "position_ids",
        "position_embeddings",
        "cache_position",
        "past_key_values",
        "layer_idx",
        "deterministic",
        "return_dict",
        "training",
    }
)


NOT_CAUSAL = "its attention is not causal"
_READS_MASK = "it reads its attention mask itself; only transformers' attention interface may"


class MaskReadError(Exception):
    """A model used its attention mask as a tensor."""

    def __init__(self) -> None:
        super().__init__(_READS_MASK)


class StateError(Exception):
    """A model keeps state that cannot be decoded from."""


@dataclass(frozen=True)
class MaskSpec:
    """What a mask tensor would have said: ``mask_function``, causal if None. Using it as a tensor fails.

    ``window`` is the size of its window or of its chunks, 0 without.
    """

    window: int = 0
    mask_function: Callable | None = None

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise MaskReadError

    def __getitem__(self, index: object) -> object:
        # All of a mask is itself (Gemma 4 takes what its last layers need of it); a part is numbers.
        if all(map(_takes_all, index if isinstance(index, tuple) else (index,))):
            return self
        raise MaskReadError

    @classmethod
    def __torch_function__(cls, *args: object) -> object:
        raise MaskReadError


def _takes_all(index: object) -> bool:
    return isinstance(index, slice) and not index.start and index.stop is None and index.step in (None, 1)


@dataclass(frozen=True)
class CapturedLayer:
    """One attention call of the graph, in forward order.

    Attributes:
        module: dotted name of the attention module in the model.
        query_heads, kv_heads: query heads (H) and key/value heads (K).
        key_dim, value_dim: channels of a query or key head, and of a value head.
        window: sliding window in tokens including the current one; 0 for none.
        softcap: bound of the soft-capped scores; 0 for none.
        has_sinks: whether a learned logit per query head joins the softmax.
        held: what transformers' own cache holds for it; None where that is not known.
        chunk: tokens of a chunk, where those of one see no other's; 0 for none.
        values_in_keys: whether values are the first channels of keys, which alone are cached then.
        reads: the number of the earlier call whose keys and values it attends to; None for its own.
    """

    module: str
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int
    softcap: float
    has_sinks: bool
    held: HeldState | None = None
    chunk: int = 0
    values_in_keys: bool = False
    reads: int | None = None


class Recorder:
    """Collects the attention calls of one capture; the registered functions find it through :func:`attending`."""

    def __init__(self, model: nn.Module) -> None:
        self.module_names = {module: name for name, module in model.named_modules()}
        self.layers: list[CapturedLayer] = []
        # Of each of them, and the module that attends.
        self.masks: list[tuple[MaskSpec, nn.Module]] = []
        # Whether masks are tensors, for a model that attends by itself, and the largest of their windows and chunks.
        self.writes_masks = False
        self.written_masks: list[Tensor] = []
        self.max_window = 0
        # The first that says to see later tokens too, and has a mask that may forbid it.
        self.not_causal: nn.Module | None = None

    def forget(self) -> None:
        """Begin anew."""
        self.layers.clear()
        self.masks.clear()
        self.written_masks.clear()

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        """The newest layer's attention, as of ``quantspec::attention``: its marker."""
        return attention(query, key, value, len(self.layers) - 1, scale, window, softcap, sinks)

    def unsupported(self, module: nn.Module, reason: str) -> UnsupportedModelError:
        """The error that names ``module``."""
        name = self.module_names.get(module)
        where = f"module '{name}' ({type(module).__name__})" if name else type(module).__name__
        return UnsupportedModelError(f"cannot convert {where}: {reason}")

    def module_of(self, error: BaseException) -> nn.Module | None:
        """The innermost module of the model whose forward raised ``error``, or None."""
        found = None
        for frame, _ in traceback.walk_tb(error.__traceback__):
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and owner in self.module_names:
                found = owner
        return found


_ACTIVE: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar("recorder", default=None)


@contextlib.contextmanager
def attending(recorder: Recorder) -> Iterator[Recorder]:
    """Let ``recorder`` answer this thread's calls of the attention interface."""
    # Here, since a process that was given a capture makes none.
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _marker_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _mask_spec)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _marker_experts)
    token = _ACTIVE.set(recorder)
    try:
        yield recorder
    finally:
        _ACTIVE.reset(token)


def _unsupported(module: nn.Module, reason: str) -> UnsupportedModelError:
    recorder = _ACTIVE.get()
    assert recorder is not None
    return recorder.unsupported(module, reason)


def _marker_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskSpec | Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention function of a capture: emits one marker and records its layer."""
    recorder = _ACTIVE.get()
    if recorder is None:
        raise RuntimeError(f"'{IMPLEMENTATION}' is an attention implementation for quantspec's capture only")
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        # What the model's own implementation makes of a mask beside this is for a trial to tell.
        if attention_mask is None:
            raise _unsupported(module, NOT_CAUSAL)
        recorder.not_causal = recorder.not_causal or module
    if key.shape[2] != query.shape[2]:
        raise _unsupported(module, _reason_of_keys(query, key))
    for name, argument in kwargs.items():
        if name not in _NEUTRAL_ATTENTION_KWARGS and isinstance(argument, Tensor):
            raise _unsupported(module, _reason_of_argument(name, argument, query, key))
    if isinstance(attention_mask, Tensor):
        raise _unsupported(module, _reason_of_mask(attention_mask, recorder))
    # The mask is what eager attention obeys; the keyword is only a hint to flash attention.
    window = attention_mask.window if attention_mask is not None else sliding_window or 0
    recorder.masks.append((attention_mask or MaskSpec(window), module))
    recorder.layers.append(
        CapturedLayer(
            module=recorder.module_names.get(module, ""),
            query_heads=query.shape[1],
            kv_heads=key.shape[1],
            key_dim=query.shape[3],
            value_dim=value.shape[3],
            window=window,
            softcap=float(softcap or 0.0),
            has_sinks=s_aux is not None,
        )
    )
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    return recorder.attend(query, key, value, scale, window, float(softcap or 0.0), s_aux), None


def _reason_of_mask(mask: Tensor, recorder: Recorder) -> str:
    if any(mask is written for written in recorder.written_masks):
        return _READS_MASK
    if follows(mask):
        return "the mask of its attention follows from what the tokens say"
    return "it makes the mask of its attention, or a bias in its place, by itself, of positions and sizes alone"


def _reason_of_keys(query: Tensor, key: Tensor) -> str:
    sizes: list[Any] = [query.shape[2], key.shape[2]]
    symbols: list[set[Any]] = [
        size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set() for size in sizes
    ]
    if symbols[0] & symbols[1]:
        queries, keys = (size.node.hint for size in sizes)
        return f"its attention sees {keys} keys in a text of {queries} tokens, other keys than one for each token"
    return "its keys are not those of the text that its queries are of (cross-attention)"


def _reason_of_argument(name: str, argument: Tensor, query: Tensor, key: Tensor) -> str:
    chosen = follows(argument)
    if not argument.is_floating_point() and chosen:
        return f"which tokens its attention sees follows from what the tokens say ('{name}')"
    if argument.dim() > 1 and tuple(argument.shape[-2:]) == (query.shape[2], key.shape[2]):
        source = "what the tokens say" if chosen else "positions and sizes alone"
        return f"its scores get a bias for every query and key ('{name}'), which follows from {source}"
    return f"the attention argument '{name}' is not supported"


def _mask_spec(*args, mask_function: Callable | None = None, local_size: int | None = None, **kwargs) -> Any:
    """The mask function of a capture: keeps the mask's rule instead of building the tensor."""
    recorder = _ACTIVE.get()
    if recorder is not None and recorder.writes_masks:
        recorder.max_window = max(recorder.max_window, local_size or 0)
        mask = ALL_MASK_ATTENTION_FUNCTIONS["eager"](
            *args, mask_function=mask_function, local_size=local_size, **kwargs
        )
        recorder.written_masks.append(mask)
        return mask
    return MaskSpec(window=local_size or 0, mask_function=mask_function)


def _marker_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function of a capture: transformers' own batched form with the two linears as marker ops."""
    top_k = top_k_index.shape[-1]
    ids = top_k_index.reshape(-1)
    rows = hidden_states.repeat_interleave(top_k, dim=0)
    name = "gate_up_proj" if self.has_gate else "up_proj"
    up_bias = getattr(self, f"{name}_bias") if self.has_bias else None
    down_bias = self.down_proj_bias if self.has_bias else None
    hidden = expert_linear(rows, ids, getattr(self, name), up_bias, self.is_transposed)
    hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
    out = expert_linear(hidden, ids, self.down_proj, down_bias, self.is_transposed)
    out = out * top_k_weights.reshape(-1, 1)
    return out.view(-1, top_k, out.shape[-1]).sum(dim=1).to(hidden_states.dtype)


class RefuseConvolutions(TorchFunctionMode):
    """Refuses convolutions over neighbouring tokens and recurrent layers as the text's forward reaches them.

    What is not called (the vision tower of a multimodal model) may convolve.
    """

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if function in _RECURRENT:
            raise _state_of(function)
        if function in _CONVOLUTIONS:
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            if any(size > 1 for size in weight.shape[2:]):
                raise _state_of(function)
        return function(*args, **kwargs)


def _state_of(function: Callable) -> StateError:
    return StateError(f"{function.__name__} mixes tokens, and its state is not in the key/value cache")


@contextlib.contextmanager
def capture_interfaces(model: PreTrainedModel) -> Iterator[Recorder]:
    """Point the model at this file's functions, in eval mode, and put everything back on exit."""
    # Configs are easily shared between models, so each module gets a copy for the length of the capture. One memo for
    # all keeps what modules share, such as the text's config that is also part of the whole model's.
    memo: dict[int, Any] = {}
    originals = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            originals.append((module, config))
            module.config = copy.deepcopy(config, memo)  # type: ignore[assignment]
    for duplicate in [value for value in memo.values() if isinstance(value, PreTrainedConfig)]:
        duplicate._attn_implementation_internal = IMPLEMENTATION
        duplicate._experts_implementation_internal = IMPLEMENTATION
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with attending(Recorder(model)) as recorder:
            yield recorder
    finally:
        for module, config in originals:
            module.config = config  # type: ignore[assignment]
        for module in training:
            module.training = True
