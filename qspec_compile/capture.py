"""Capture: one ``torch.export`` of a Hugging Face decoder into an FX graph with an attention marker per layer.

transformers dispatches attention, masks and expert layers through registries. For the length of the capture, and on
a copy of the model's config, they point to the functions of this file: attention becomes one ``quantspec::attention``
node, a mask becomes a :class:`MaskSpec` that says what it would have been, and expert layers become two
``quantspec::expert_linear`` nodes around the model's own activation.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantspec.kernels import attention, expert_linear
from quantspec.kernels.cached_attention import MAX_HEAD_DIM

from .cache.geometry import HeldState
from .errors import UnsupportedModelError
from .locks import LockOfProcess

_LOGGER = logging.getLogger(__name__)

IMPLEMENTATION = "quantspec_capture"
_CONVERSION = LockOfProcess()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

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


class _MaskReadError(Exception):
    """A model used its attention mask as a tensor."""

    def __init__(self) -> None:
        super().__init__("it reads its attention mask itself; only transformers' attention interface may")


class _StateError(Exception):
    """A model keeps state that is not keys and values."""

    def __init__(self, function: str) -> None:
        super().__init__(f"{function} mixes tokens, and its state is not in the key/value cache")


@dataclass(frozen=True)
class MaskSpec:
    """What a mask tensor would have said: causal, within ``window`` tokens (0: all). Using it as a tensor fails."""

    window: int = 0
    mask_function: Callable | None = None

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _MaskReadError

    def __getitem__(self, index: object) -> object:
        raise _MaskReadError

    @classmethod
    def __torch_function__(cls, *args: object) -> object:
        raise _MaskReadError


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


@dataclass(frozen=True)
class Capture:
    """The captured decoder.

    Attributes:
        graph_module: ``graph_module(input_ids, position_ids) -> logits`` with ``(B, T)`` int64 inputs and ``(B, T, V)``
            logits in the model's dtype, both B and T dynamic; its parameters are the model's own tensors.
        layers: its attention calls, in forward order.
    """

    graph_module: fx.GraphModule
    layers: tuple[CapturedLayer, ...]


class _Recorder:
    """Collects the attention calls of one capture; the registered functions find it through ``active``."""

    active: _Recorder | None = None

    def __init__(self, model: nn.Module) -> None:
        self.module_names = {module: name for name, module in model.named_modules()}
        self.layers: list[CapturedLayer] = []
        self.masks: dict[MaskSpec, nn.Module] = {}

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


def _unsupported(module: nn.Module, reason: str) -> UnsupportedModelError:
    assert _Recorder.active is not None
    return _Recorder.active.unsupported(module, reason)


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
    if attention_mask is not None:
        recorder.masks.setdefault(attention_mask, module)
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
    """The mask function of a capture: keeps the mask's rule instead of building the tensor."""
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


class _RefuseConvolutions(TorchFunctionMode):
    """Refuses convolutions over neighbouring tokens and recurrent layers as the text's forward reaches them.

    What is not called (the vision tower of a multimodal model) may convolve.
    """

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if function in _RECURRENT:
            raise _StateError(function.__name__)
        if function in _CONVOLUTIONS:
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            if any(size > 1 for size in weight.shape[2:]):
                raise _StateError(function.__name__)
        return function(*args, **kwargs)


@contextlib.contextmanager
def _capture_interfaces(model: PreTrainedModel) -> Iterator[_Recorder]:
    """Point the model at this file's functions, in eval mode, and put everything back on exit."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _marker_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _mask_spec)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _marker_experts)
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


def check_model(model: object, structure_only: bool = False) -> None:
    """Refuse what needs no capture to be refused; raises as :func:`capture` does."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"convert() takes a loaded transformers model (PreTrainedModel), not {type(model).__name__}; "
            f"{_way_in(model)}"
        )
    name = type(model).__name__
    for path, module in model.named_modules():
        if _is_of_peft(module):
            raise UnsupportedModelError(
                f"module '{path}' of {name} holds an adapter, which can be switched at any time; merge it into the "
                "weights first, with merge_and_unload() of its PeftModel (PeftModel.from_pretrained(model, adapter))"
            )
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; quantspec converts decoder-only models")
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{name} has no language-model head; load it with AutoModelForCausalLM")
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(places) > 1 or places & {"disk", "meta"}:
        raise UnsupportedModelError(
            f"{name} was loaded with a device_map over {', '.join(sorted(places))}; load it on one device, for example "
            "device_map='cuda:0'"
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for tensor_name, tensor in tensors:
        if tensor.device.type == "meta" and not structure_only:
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
    check_rope(name, config)


def check_rope(name: str, config: object) -> None:
    """Raise ``UnsupportedModelError`` for a RoPE in the config of ``name`` that moves what is cached."""
    for key, parameters in _rope_parameters(config):
        rope_type = parameters.get("rope_type", "default")
        if rope_type in ("dynamic", "longrope"):
            raise UnsupportedModelError(
                f"{key} of {name} has rope_type '{rope_type}', which changes the keys already cached as the text grows"
            )


def _way_in(model: object) -> str:
    """How to get at the model that was meant."""
    if _is_of_peft(model):
        return "merge the adapter into its weights first, with merge_and_unload()"
    children = model.named_children() if isinstance(model, nn.Module) else ()
    inner = next((name for name, child in children if isinstance(child, PreTrainedModel)), None)
    if inner is not None:
        return f"pass the model that it wraps, its attribute '{inner}'"
    return "load it with AutoModelForCausalLM.from_pretrained(...)"


def _is_of_peft(module: object) -> bool:
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def _check_precision(model: PreTrainedModel, program: torch.export.ExportedProgram, recorder: _Recorder) -> None:
    """Raise ``UnsupportedModelError`` where a forward casts to another dtype as it runs."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)]
    for node in chain.from_iterable(graph.nodes for graph in graphs):
        if node.target is torch.ops.higher_order.wrap_with_autocast and node.args[2]:
            paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
            # The capture's wrapper holds the model as 'model'.
            path = paths[-1].removeprefix("model").removeprefix(".") if paths else ""
            raise recorder.unsupported(
                model.get_submodule(path),
                f"its forward runs under autocast to {node.args[1]}, as accelerate and Trainer wrap it for mixed "
                "precision; take the wrapper off with accelerator.unwrap_model(model, keep_fp32_wrapper=False), and "
                "load the model in the dtype that it shall run in",
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


def _mask_problem(spec: MaskSpec) -> str | None:
    """What keeps a mask rule from being causal (windowed) attention, judged on a grid of positions; None if nothing."""
    if spec.mask_function is None:
        return None
    span = 2 * spec.window + 3 if spec.window else 8
    # The rule is elementwise in its indices, so a window's edges and a few far points describe it.
    points = sorted({0, 1, 2, span // 2, span - 1} | {max(0, span - 1 - spec.window + d) for d in (-1, 0, 1)})
    q = torch.tensor(points, device="cpu")[:, None]
    kv = q.T
    expected = kv <= q
    if spec.window:
        expected = expected & (kv > q - spec.window)
    zero = torch.zeros((), dtype=torch.long, device="cpu")
    try:
        matches = torch.equal(spec.mask_function(zero, zero, q, kv).expand_as(expected), expected)
    except Exception:
        # Such a rule holds tensors of the export.
        return "its attention mask depends on more than the tokens' positions (chunked attention, packed sequences)"
    if not matches:
        return (
            "its attention mask is not causal with an optional sliding window (chunked, prefix or bidirectional "
            "attention); such a mask cannot be cached token by token"
        )
    return None


def _check_own_positions(model: PreTrainedModel, recorder: _Recorder, positions: Tensor) -> None:
    """Refuse a model that, left to itself, counts positions otherwise than ``positions (B, T)``, 0, 1, 2, ..."""
    ids = torch.randint(0, 2**31, positions.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    ids = (ids % model.get_input_embeddings().weight.shape[0]).to(positions.device)  # type: ignore[operator, union-attr]

    def outputs(**position_ids: Tensor) -> list[tuple[nn.Module, Tensor]]:
        made: list[tuple[nn.Module, Tensor]] = []

        def keep(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                made.append((module, output))

        with contextlib.ExitStack() as hooks:
            for module in recorder.module_names:
                hooks.enter_context(module.register_forward_hook(keep))
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **position_ids)
        return [*made, (model, output.logits)]

    given, own = outputs(position_ids=positions), outputs()
    logits = given[-1][1].float()
    if not (own[-1][1].float() - logits).norm() > 1e-2 * logits.norm():
        return
    for (module, expected), (_, output) in zip(given, own, strict=False):
        if expected.shape != output.shape or not torch.equal(expected, output):
            raise recorder.unsupported(
                module,
                "given no position_ids, the model does not count positions from 0 (an offset, or token ids that are "
                "not counted); the positions of a text are the cache's to give",
            )


def _held_states(model: PreTrainedModel, num_calls: int) -> Sequence[HeldState | None]:
    """What the cache that transformers makes for ``model`` holds, read off two lengths of text without computing.

    One for each attention call; layers of that cache that hold nothing are left out, and calls beyond the rest hold
    nothing. None for all where the model does not run so.
    """
    lengths = (2, getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**20)
    try:
        short, long = (_held_elements(model, num_tokens) for num_tokens in lengths)
    except Exception as error:
        _LOGGER.debug("what transformers' cache would hold is not known: %s", error)
        return [None] * num_calls
    states = [
        HeldState(few // lengths[0], 0 if many == few // lengths[0] * lengths[1] else many * lengths[0] // few)
        for few, many in zip(short, long, strict=True)
        if few
    ]
    return [*states, *[HeldState(0, 0)] * (num_calls - len(states))]


def _held_elements(model: PreTrainedModel, num_tokens: int) -> list[int]:
    """Elements of the tensors in each layer of transformers' cache after a text of ``num_tokens``."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.zeros(1, num_tokens, dtype=torch.long, device=model.device)
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    cache = getattr(output.past_key_values, "self_attention_cache", output.past_key_values)
    # Scalars are lengths and the like.
    tensors = [[x for x in vars(layer).values() if isinstance(x, Tensor) and x.dim() > 1] for layer in cache.layers]
    return [sum(x.numel() for x in held) for held in tensors]


def check_head_dims(layers: Sequence[CapturedLayer], device: torch.device) -> None:
    """Raise ``UnsupportedModelError`` for heads that the kernels of ``device`` do not decode."""
    for layer in layers:
        dim = max(layer.key_dim, layer.value_dim)
        if device.type == "cuda" and dim > MAX_HEAD_DIM:
            reason = f"it has heads of {dim} dims; a GPU decodes at most {MAX_HEAD_DIM}, a CPU any number"
            raise UnsupportedModelError(f"cannot convert module '{layer.module}': {reason}")


@contextlib.contextmanager
def converting() -> Iterator[None]:
    """Let one thread at a time convert, since registries and tracing are the process's, and none under autocast."""
    with _CONVERSION(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def capture(model: PreTrainedModel, structure_only: bool = False) -> Capture:
    """Export ``model`` once, with dynamic batch and token axes.

    Args:
        model: a loaded decoder with a language-model head, on one device, in float32, float16 or bfloat16. It is
            left as it was.
        structure_only: the weights may be on the meta device, for a graph that is looked at and not run.

    Returns:
        The graph, with one ``quantspec::attention`` marker per attention call.

    Raises:
        TypeError: not a transformers model.
        UnsupportedModelError: it cannot be captured, or attends outside transformers' attention interface.
    """
    check_model(model, structure_only)
    _LOGGER.info("capturing the graph")
    ids = torch.zeros(2, 7, dtype=torch.long, device=model.device)
    positions = torch.arange(7, device=model.device).expand(2, 7).clone()
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with _capture_interfaces(model) as recorder, _RefuseConvolutions(), torch.no_grad():
        try:
            program = torch.export.export(_Logits(model), (ids, positions), dynamic_shapes=(axes, axes), strict=False)
        except UnsupportedModelError:
            raise
        except Exception as error:
            module = recorder.module_of(error)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if not isinstance(error, _MaskReadError | _StateError):
                reason = f"torch.export cannot capture it: {reason}"
            if "Constraints violated" in reason:
                reason += " Its forward fixes the number of tokens, as a loop over tokens (recurrent state) does."
            raise recorder.unsupported(model if module is None else module, reason) from error
        layers = tuple(recorder.layers)
        if not structure_only:
            _check_own_positions(model, recorder, positions)
        held = _held_states(model, len(layers))
    layers = tuple(replace(layer, held=state) for layer, state in zip(layers, held, strict=True))
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} computes attention by itself instead of through transformers' attention "
            "interface, so its key/value cache cannot be replaced"
        )
    _check_precision(model, program, recorder)
    check_head_dims(layers, model.device)
    for spec, module in recorder.masks.items():
        problem = _mask_problem(spec)
        if problem is not None:
            raise recorder.unsupported(module, problem)
    return Capture(program.module(check_guards=False), layers)
