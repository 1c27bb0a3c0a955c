"""Capture: one ``torch.export`` of a Hugging Face decoder into an FX graph with an attention marker per layer.

transformers dispatches attention, masks and expert layers through registries. For the length of the capture, and on
a copy of the model's config, they point to the functions of this file: attention becomes one ``quantspec::attention``
node, a mask becomes a :class:`MaskSpec` that says what it would have been, and expert layers become two
``quantspec::expert_linear`` nodes around the model's own activation.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from quantspec.kernels import attention, expert_linear
from torch import Tensor, fx, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import UnsupportedModelError

IMPLEMENTATION = "quantspec_capture"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

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


@dataclass(frozen=True)
class MaskSpec:
    """What a mask tensor would have said: causal, within ``window`` tokens (0: all)."""

    window: int = 0
    mask_function: Callable | None = None


@dataclass(frozen=True)
class CapturedLayer:
    """One attention call of the graph, in forward order."""

    module: str
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int
    softcap: float
    has_sinks: bool


@dataclass(frozen=True)
class Capture:
    """The captured decoder.

    ``graph_module(input_ids, position_ids) -> logits`` with ``(B, T)`` int64 inputs and ``(B, T, V)`` logits, both B
    and T dynamic; its parameters are the model's own tensors.
    """

    graph_module: fx.GraphModule
    layers: tuple[CapturedLayer, ...]


class _Recorder:
    """Collects the attention calls of one capture; the registered functions find it through ``active``."""

    active: _Recorder | None = None

    def __init__(self, model: nn.Module) -> None:
        self.module_names = {module: name for name, module in model.named_modules()}
        self.layers: list[CapturedLayer] = []
        self.masks: list[MaskSpec] = []


def _unsupported(module: nn.Module, reason: str) -> UnsupportedModelError:
    recorder = _Recorder.active
    name = recorder.module_names.get(module, "") if recorder else ""
    return UnsupportedModelError(f"cannot convert module '{name}' ({type(module).__name__}): {reason}")


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
    recorder = _Recorder.active
    if recorder is None:
        raise RuntimeError(f"'{IMPLEMENTATION}' is an attention implementation for quantspec's capture only")
    if isinstance(attention_mask, Tensor):
        raise _unsupported(module, "it builds its own attention mask or position bias instead of using the interface")
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        raise _unsupported(module, "its attention is not causal")
    if key.shape[2] != query.shape[2]:
        raise _unsupported(module, "its keys are not those of the same tokens as its queries (cross-attention)")
    for name, argument in kwargs.items():
        if name not in _NEUTRAL_ATTENTION_KWARGS and isinstance(argument, Tensor):
            raise _unsupported(module, f"the attention argument '{name}' is not supported")
    # The mask is what eager attention obeys; the keyword is only a hint to flash attention.
    window = attention_mask.window if attention_mask is not None else sliding_window or 0
    layer = len(recorder.layers)
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
    return attention(query, key, value, layer, scale, window, float(softcap or 0.0), s_aux), None


def _mask_spec(*args, mask_function: Callable | None = None, local_size: int | None = None, **kwargs) -> MaskSpec:
    """The mask function of a capture: records the mask's rule instead of building the tensor."""
    spec = MaskSpec(window=local_size or 0, mask_function=mask_function)
    if _Recorder.active is not None:
        _Recorder.active.masks.append(spec)
    return spec


def _marker_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
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


@contextlib.contextmanager
def _capture_interfaces(model: PreTrainedModel) -> Iterator[_Recorder]:
    """Point the model at this file's functions, in eval mode, and put everything back on exit."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _marker_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _mask_spec)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _marker_experts)
    # Configs are easily shared between models, so each module gets a copy for the length of the capture.
    copies: dict[int, object] = {}
    originals = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None or not hasattr(config, "_attn_implementation"):
            continue
        if id(config) not in copies:
            duplicate = copy.deepcopy(config)
            duplicate._attn_implementation_internal = IMPLEMENTATION
            if hasattr(duplicate, "_experts_implementation_internal"):
                duplicate._experts_implementation_internal = IMPLEMENTATION
            copies[id(config)] = duplicate
        originals.append((module, config))
        module.config = copies[id(config)]  # type: ignore[assignment]
    training = [module for module in model.modules() if module.training]
    model.eval()
    _Recorder.active = recorder = _Recorder(model)
    try:
        yield recorder
    finally:
        _Recorder.active = None
        for module, config in originals:
            module.config = config
        for module in training:
            module.training = True


class _Logits(nn.Module):
    """The decoder as a function of token ids and positions alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        # An explicit mask keeps transformers from reading packed sequences out of the positions.
        mask = torch.ones_like(input_ids)
        return self.model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits


def _check_model(model: object) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"convert() takes a loaded transformers model (PreTrainedModel), not {type(model).__name__}; "
            "load it with AutoModelForCausalLM.from_pretrained(...)"
        )
    name = type(model).__name__
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; quantspec converts decoder-only models")
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{name} has no language-model head; load it with AutoModelForCausalLM")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for tensor_name, tensor in tensors:
        if tensor.device.type == "meta":
            raise UnsupportedModelError(f"weight '{tensor_name}' of {name} is on the meta device; load its data first")
    devices = sorted({str(tensor.device) for _, tensor in tensors})
    if len(devices) > 1:
        raise UnsupportedModelError(f"{name} is spread over {', '.join(devices)}; move it to one device")
    for tensor_name, tensor in tensors:
        # A buffer may count or index; packed weights are integers too, but of 8 or 32 bits.
        packed = tensor.dtype in (torch.int8, torch.uint8, torch.int32) and tensor.dim() > 1
        if packed or (isinstance(tensor, nn.Parameter) and tensor.dtype not in DTYPES):
            raise UnsupportedModelError(
                f"weight '{tensor_name}' of {name} is {tensor.dtype}; load the model in float32, float16 or bfloat16, "
                "not quantized: the draft's INT4 weights are made from them"
            )
    for key, parameters in _rope_parameters(config):
        rope_type = parameters.get("rope_type", "default")
        if rope_type in ("dynamic", "longrope"):
            raise UnsupportedModelError(
                f"{key} of {name} has rope_type '{rope_type}', which changes the keys already cached as the text grows"
            )


def _rope_parameters(config: object) -> Iterator[tuple[str, dict]]:
    """Every RoPE description in a config: one for the model, or one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, dict):
        return
    yield "rope_parameters", parameters
    for key, nested in parameters.items():
        if isinstance(nested, dict):
            yield f"rope_parameters[{key}]", nested


def _check_mask(spec: MaskSpec) -> None:
    """Compare a recorded mask rule with causal (windowed) attention on a grid of positions."""
    if spec.mask_function is None:
        return
    span = 2 * spec.window + 3 if spec.window else 8
    # The rule is elementwise in its indices, so a window's edges and a few far points describe it.
    points = sorted({0, 1, 2, span // 2, span - 1} | {max(0, span - 1 - spec.window + d) for d in (-1, 0, 1)})
    q = torch.tensor(points)[:, None]
    kv = torch.tensor(points)[None, :]
    expected = kv <= q
    if spec.window:
        expected = expected & (kv > q - spec.window)
    zero = torch.zeros((), dtype=torch.long)
    try:
        matches = torch.equal(spec.mask_function(zero, zero, q, kv).expand_as(expected), expected)
    except Exception as error:
        raise UnsupportedModelError(f"the model's attention mask depends on more than positions ({error})") from error
    if not matches:
        raise UnsupportedModelError(
            "the model's attention mask is not causal with an optional sliding window "
            "(chunked, prefix or bidirectional attention); such a mask cannot be cached token by token"
        )


def capture(model: PreTrainedModel) -> Capture:
    """Export ``model`` once, with dynamic batch and token axes.

    Args:
        model: a loaded decoder with a language-model head, on one device, in float32, float16 or bfloat16. It is
            left as it was.

    Raises:
        TypeError: not a transformers model.
        UnsupportedModelError: it cannot be captured, or attends outside transformers' attention interface.
    """
    _check_model(model)
    ids = torch.zeros(2, 7, dtype=torch.long, device=model.device)
    positions = torch.arange(7, device=model.device).expand(2, 7).clone()
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with _capture_interfaces(model) as recorder, torch.no_grad():
        try:
            program = torch.export.export(_Logits(model), (ids, positions), dynamic_shapes=(axes, axes), strict=False)
        except UnsupportedModelError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UnsupportedModelError(f"torch.export cannot capture {type(model).__name__}: {reason}") from error
    if not recorder.layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} computes attention by itself instead of through transformers' attention "
            "interface, so its key/value cache cannot be replaced"
        )
    for spec in recorder.masks:
        _check_mask(spec)
    return Capture(program.module(check_guards=False), tuple(recorder.layers))
