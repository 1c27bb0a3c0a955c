"""What is refused at a capture, by the name of the module and the reason."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from quantspec.errors import UnsupportedModelError
from quantspec.kernels.stretches_triton import device_limits, widest_head

from .interfaces import CapturedLayer, MaskSpec, Recorder
from .rope import follows_length

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _MaskProblem(Exception):
    """What keeps a mask from being cached."""


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
        if _is_quantized(module):
            raise UnsupportedModelError(
                f"module '{path}' of {name} is a {type(module).__module__}.{type(module).__name__}; load the model in "
                "float32, float16 or bfloat16, not quantized: the draft's INT4 weights are made from them"
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
    # Some models compute constants as they are made, whatever the device.
    if len(devices) > 1 and not structure_only:
        raise UnsupportedModelError(f"{name} is spread over {', '.join(devices)}; move it to one device")
    for tensor_name, tensor in tensors:
        if isinstance(tensor, DTensor):
            raise UnsupportedModelError(
                f"weight '{tensor_name}' of {name} is split over processes (a DTensor); convert the model that one "
                "process has, with tensor_parallel=... to split it"
            )
        if is_traceable_wrapper_subclass(tensor):
            raise UnsupportedModelError(
                f"weight '{tensor_name}' of {name} is a {type(tensor).__name__}; load the model in float32, float16 or "
                "bfloat16, not quantized: the draft's INT4 weights are made from them"
            )
        # A buffer may count or index; packed weights are integers too, but of 8 or 32 bits.
        packed = tensor.dtype in (torch.int8, torch.uint8, torch.int32) and tensor.dim() > 1
        if packed or (isinstance(tensor, nn.Parameter) and tensor.dtype not in DTYPES):
            raise UnsupportedModelError(
                f"weight '{tensor_name}' of {name} is {tensor.dtype}; load the model in float32, float16 or bfloat16, "
                "not quantized: the draft's INT4 weights are made from them"
            )
    if not any(map(follows_length, model.modules())):
        _check_rope(name, config)


def _check_rope(name: str, config: object) -> None:
    """Refuse a RoPE in the config of ``name`` that moves what is cached, and that no module tells of."""
    for key, parameters in _rope_parameters(config):
        rope_type = parameters.get("rope_type", "default")
        if rope_type in ("dynamic", "longrope"):
            raise UnsupportedModelError(
                f"{key} of {name} has rope_type '{rope_type}', which changes the keys already cached as the text "
                "grows, and no module of the model holds it in the way of transformers"
            )


def _is_quantized(module: nn.Module) -> bool:
    """Whether it is one of torch's own, which give their weights by a method."""
    is_torchs = type(module).__module__.startswith("torch.") and ".quantized." in type(module).__module__
    return is_torchs and callable(getattr(module, "weight", None))


def _way_in(model: object) -> str:
    """How to get at the model that was meant."""
    if hasattr(model, "pair") and isinstance(getattr(model, "model", None), PreTrainedModel):
        return "this one is converted already; its attribute 'model' is what it was made from"
    if _is_of_peft(model):
        return "merge the adapter into its weights first, with merge_and_unload()"
    children = model.named_children() if isinstance(model, nn.Module) else ()
    inner = next((name for name, child in children if isinstance(child, PreTrainedModel)), None)
    if inner is not None:
        return f"pass the model that it wraps, its attribute '{inner}'"
    return "load it with AutoModelForCausalLM.from_pretrained(...)"


def _is_of_peft(module: object) -> bool:
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def check_precision(model: PreTrainedModel, program: torch.export.ExportedProgram, recorder: Recorder) -> None:
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


class _AsOfLongerText(TorchDispatchMode):
    """Lets a rule look up tokens beyond its text where all of that are alike: none is padded, none of an image.

    Tensors without data are taken for zeros, which say so.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A rule is asked for the first text alone, and sizes of an export are symbols.
        args, kwargs = tree_map_only(
            Tensor,
            lambda x: torch.zeros([1] * x.dim(), dtype=x.dtype, device="cpu") if x.device.type == "meta" else x,
            (args, kwargs or {}),
        )
        if func is torch.ops.aten.index.Tensor and bool((args[0] == args[0].flatten()[:1]).all()):
            found = [x if x is None else x.clamp(max=n - 1) for x, n in zip(args[1], args[0].shape, strict=False)]
            args = (args[0], found)
        return func(*args, **kwargs)


def _is_chunked(spec: MaskSpec, device: torch.device) -> bool:
    """Whether a mask rule lets the tokens of a chunk see no other's, judged on a grid of positions.

    Raises:
        _MaskProblem: it is neither that nor causal (windowed) attention.
    """
    if spec.mask_function is None:
        return False
    size = spec.window or 4
    # The rule is elementwise in its indices, so the edges of windows and chunks and a few far points describe it.
    edges = {count * size + offset for count in (1, 2) for offset in (-1, 0, 1)}
    points = sorted({0, 1, 2, size // 2, size + size // 2, 2 * size + 2} | edges)
    place = "cpu" if device.type == "meta" else device
    q = torch.tensor(points, device=place)[:, None]
    kv = q.T
    zero = torch.zeros((), dtype=torch.long, device=place)
    try:
        with _AsOfLongerText():
            allowed = spec.mask_function(zero, zero, q, kv).expand(len(points), len(points))
    except Exception as error:
        if device.type == "meta":
            return False
        raise _MaskProblem(
            "its attention mask depends on more than the tokens' positions (packed sequences, a mask of its own)"
        ) from error
    causal = kv <= q
    if torch.equal(allowed, causal & (kv > q - spec.window) if spec.window else causal):
        return False
    if spec.window and torch.equal(allowed, causal & (kv // size == q // size)):
        return True
    raise _MaskProblem(
        "its attention mask is not causal with an optional sliding window or chunks (prefix or bidirectional "
        "attention); such a mask cannot be cached token by token"
    )


def random_text(model: PreTrainedModel, vocab_size: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Token ids of ``shape``, int64 on the CPU, none of them padding, which some models do not count as a position."""
    padding = {getattr(model.get_input_embeddings(), "padding_idx", None), getattr(model.config, "pad_token_id", None)}
    tokens = torch.tensor([token for token in range(vocab_size) if token not in padding], device="cpu")
    return tokens[torch.randint(0, len(tokens), tuple(shape), generator=generator, device="cpu")]


def first_position(model: PreTrainedModel, recorder: Recorder, positions: Tensor) -> int:
    """What a model, left to itself, gives the first token of a text, where the others follow one by one: 0 for most.

    Raises:
        UnsupportedModelError: it counts ``positions (B, T)``, 0, 1, 2, ..., otherwise.
    """
    embedding: Any = model.get_input_embeddings()
    ids = random_text(model, embedding.weight.shape[0], positions.shape, torch.Generator("cpu").manual_seed(0))
    ids = ids.to(positions.device)

    def calls(**position_ids: Tensor) -> list[tuple[nn.Module, tuple[Any, ...], Tensor]]:
        made: list[tuple[nn.Module, tuple[Any, ...], Tensor]] = []

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
            if isinstance(output, Tensor):
                made.append((module, inputs, output))

        with contextlib.ExitStack() as hooks:
            for module in recorder.module_names:
                hooks.enter_context(module.register_forward_hook(keep))
            with _naming_mixed_dtypes(model, recorder):
                output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **position_ids)
        return [*made, (model, (), output.logits)]

    given, own = calls(position_ids=positions), calls()
    if _are_alike(given, own):
        # Without weights they are alike wherever positions begin.
        return 0 if bool(own[-1][2].any()) else _first_looked_up(given, own)
    for (module, inputs, expected), (_, own_inputs, output) in zip(given, own, strict=False):
        if expected.shape != output.shape or not torch.equal(expected, output):
            if isinstance(module, nn.Embedding) and inputs[0].shape == own_inputs[0].shape:
                first = int((own_inputs[0] - inputs[0]).flatten()[0])
                if first >= 0 and _are_alike(calls(position_ids=positions + first), own):
                    return first
            raise recorder.unsupported(
                module,
                "given no position_ids, the model does not count positions one by one; the positions of a text are the "
                "cache's to give",
            )
    return 0


@contextlib.contextmanager
def _naming_mixed_dtypes(model: PreTrainedModel, recorder: Recorder) -> Iterator[None]:
    """Name the module where a model of several dtypes fails by itself; an export does not notice that."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        module, dtypes = recorder.module_of(error), sorted({str(weight.dtype) for weight in model.parameters()})
        if module is None or len(dtypes) == 1 or "dtype" not in str(error):
            raise
        raise recorder.unsupported(
            module,
            f"the model's own forward fails there ({error}); its weights are {' and '.join(dtypes)}: load it in one "
            "dtype",
        ) from error


def _first_looked_up(given: list[Any], own: list[Any]) -> int:
    """By how much more than ``given`` a model's ``own`` positions are, by what its embeddings are asked for."""
    for (module, inputs, _), (other, own_inputs, _) in zip(given, own, strict=False):
        if isinstance(module, nn.Embedding) and module is other and inputs[0].shape == own_inputs[0].shape:
            first = int((own_inputs[0] - inputs[0]).flatten()[0])
            if first > 0:
                return first
    return 0


def _are_alike(given: list[tuple[nn.Module, tuple[Any, ...], Tensor]], own: list[Any]) -> bool:
    """Whether two runs end in the same logits, but for rounding."""
    logits, others = (calls[-1][2].float() for calls in (given, own))
    return not (others - logits).norm() > 1e-2 * logits.norm()


def chunked_layers(recorder: Recorder, masks: Sequence[tuple[MaskSpec, nn.Module]], device: torch.device) -> set[int]:
    """Which of the attention calls with these masks attend in chunks; their ``window`` is a chunk's size.

    On the meta device tensors that rules hold are taken for zeros, and rules that cannot be asked so for windows.

    Raises:
        UnsupportedModelError: a mask that is not causal with an optional sliding window or chunks.
    """
    found = set()
    for layer, (spec, module) in enumerate(masks):
        try:
            if _is_chunked(spec, device):
                found.add(layer)
        except _MaskProblem as problem:
            raise recorder.unsupported(module, str(problem)) from problem
    return found


def check_head_dims(layers: Sequence[CapturedLayer], device: torch.device, dtype: torch.dtype) -> None:
    """Raise ``UnsupportedModelError`` for heads that the kernels of ``device`` do not decode."""
    for layer in layers:
        dim = max(layer.key_dim, layer.value_dim)
        if device.type == "cuda" and dim > (widest := widest_head(device_limits(device), dtype.itemsize)):
            reason = f"it has heads of {dim} dims; this GPU decodes at most {widest} in {dtype}, a CPU any number"
            raise UnsupportedModelError(f"cannot convert module '{layer.module}': {reason}")
