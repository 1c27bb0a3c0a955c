"""The sizes of plain decoders, told from the numbers in ``config.json``: importing torch would take two seconds.

A plain decoder is one of :data:`_DECODERS` whose every layer attends to the whole text. Whatever a config says besides
makes it none; such a model is built without data and captured instead.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantspec.config import DEFAULT_SPECULATIVE_TOKENS, GROUP_SIZES, QuantSpecConfig

from ._sizes import Layer, Linear, Sizes
from .loading import PAIR_CONFIG, Kind, Source


@dataclass(frozen=True)
class _Decoder:
    """What the decoders of one type have of weights, besides projections, two norms per layer and a last one.

    Attributes:
        architecture: transformers' class.
        qkv_bias, o_bias, mlp_bias: of the projections; a str names the key of the config that says it.
        head_norms: whether queries and keys are normalized by heads of their own.
        experts: keys that may tell their number; none without experts.
        expert_width: key of their width.
        required: further keys that must be there, since the type's default is no plain one.
        fixed: keys that must have these values if they are there.
    """

    architecture: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    head_norms: bool = False
    experts: tuple[str, ...] = ()
    expert_width: str = "intermediate_size"
    required: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)


_NO_WINDOW = {"use_sliding_window": False}
_DECODERS = {
    "llama": _Decoder("LlamaForCausalLM", "attention_bias", "attention_bias", "mlp_bias"),
    "mistral": _Decoder("MistralForCausalLM", required=("sliding_window",), fixed={"sliding_window": None}),
    "qwen2": _Decoder("Qwen2ForCausalLM", qkv_bias=True, fixed=_NO_WINDOW),
    "qwen3": _Decoder(
        "Qwen3ForCausalLM",
        "attention_bias",
        "attention_bias",
        head_norms=True,
        required=("head_dim",),
        fixed=_NO_WINDOW,
    ),
    "mixtral": _Decoder("MixtralForCausalLM", experts=("num_local_experts",), fixed={"sliding_window": None}),
    "qwen3_moe": _Decoder(
        "Qwen3MoeForCausalLM",
        "attention_bias",
        "attention_bias",
        head_norms=True,
        experts=("num_experts", "num_local_experts"),
        expert_width="moe_intermediate_size",
        required=("head_dim",),
        fixed={**_NO_WINDOW, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
}
_NUMBERS = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
# What changes no size, or is looked at where it does.
_KNOWN = {
    *_NUMBERS,
    *("_name_or_path", "architectures", "attention_bias", "attention_dropout", "bos_token_id", "dtype"),
    *("eos_token_id", "head_dim", "hidden_act", "initializer_range", "layer_types", "max_window_layers", "mlp_bias"),
    *("model_type", "norm_topk_prob", "num_experts_per_tok", "output_router_logits", "pad_token_id", "pretraining_tp"),
    *("rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "router_aux_loss_coef", "router_jitter_noise"),
    *("sliding_window", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache"),
    # Of other software, which transformers' classes do not read.
    *("is_llama_config", "rope_interleaved", "transformers.js_config", "use_mrope"),
}
# Of frequencies that are the same at every length of text.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Wider heads have several scales for a value.
_MOST_CHANNELS = 128


def plain_sizes(source: Source, options: QuantSpecConfig, dtype: str | None) -> Sizes | None:
    """The sizes of a plain decoder in ``dtype``, the checkpoint's own if None; None of anything else."""
    config = _read_config(source)
    if config is None or isinstance(options.num_speculative_tokens, str):
        return None
    decoder = _DECODERS.get(str(config.get("model_type")))
    if decoder is None or not _is_plain(config, decoder):
        return None
    dtype = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    shape = _Shape.of(config, decoder)
    if not isinstance(dtype, str) or dtype not in _ITEMSIZES or shape is None:
        return None
    itemsize = _ITEMSIZES[dtype]
    linears = tuple(_linears(config, decoder, shape, options, itemsize))
    target = shape.num_weights(config, decoder) * itemsize + shape.frequency_bytes

    def cache_parts(context: int, texts: int) -> dict[str, int]:
        return shape.cache_parts(config, options, itemsize, context, texts)

    return Sizes(
        decoder.architecture,
        dtype,
        itemsize,
        options,
        tuple(shape.layer(number) for number in range(shape.num_layers)),
        linears,
        {"target": target, "draft_int4": sum(linear.draft_bytes for linear in linears)},
        config["max_position_embeddings"],
        cache_parts,
        cache_parts,
        lambda context, texts: 2 * shape.channels * texts * context * itemsize,
    )


def _read_config(source: Source) -> dict[str, Any] | None:
    """What ``config.json`` of a model says; None where it is not at hand, is damaged, or is a saved pair's."""
    file: str | Path = Path(source.name, "config.json")
    if source.gguf_file is not None or source.kind not in (Kind.FOLDER, Kind.HUB):
        return None
    if source.kind is Kind.HUB:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(source.name, PAIR_CONFIG, **source.place)
                return None
            file = hf_hub_download(source.name, "config.json", **source.place)
        except Exception:
            # It is told where the config is read by transformers.
            return None
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _is_plain(config: dict[str, Any], decoder: _Decoder) -> bool:
    """Whether nothing in ``config`` is unknown or makes layers other than plain ones."""
    known = _KNOWN.union(decoder.fixed, decoder.experts, [decoder.expert_width])
    types = config.get("layer_types")
    padding = config.get("pad_token_id")
    return (
        known.issuperset(config)
        and all(key in config for key in (*_NUMBERS, *decoder.required))
        and all(_is_count(config[key]) for key in _NUMBERS)
        and all(config.get(key, value) == value for key, value in decoder.fixed.items())
        and config.get("architectures") == [decoder.architecture]
        and config.get("hidden_act", "silu") == "silu"
        and (types is None or types == ["full_attention"] * config["num_hidden_layers"])
        and (padding is None or (isinstance(padding, int) and 0 <= padding < config["vocab_size"]))
        and not ("dtype" in config and "torch_dtype" in config)
        and all(_is_fixed_rope(config.get(key)) for key in ("rope_parameters", "rope_scaling"))
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_fixed_rope(rope: object) -> bool:
    if rope is None:
        return True
    if not isinstance(rope, dict) or "partial_rotary_factor" in rope:
        return False
    kind = rope.get("rope_type", rope.get("type", "default"))
    return kind in _ROPE_TYPES and (kind == "default" or isinstance(rope.get("factor"), int | float))


@dataclass(frozen=True)
class _Shape:
    """The numbers of a plain decoder.

    Attributes:
        num_experts: 0 where there are none.
        width: of the MLP, or of an expert.
    """

    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    num_experts: int

    @classmethod
    def of(cls, config: dict[str, Any], decoder: _Decoder) -> _Shape | None:
        """The shape that ``config`` gives; None where its numbers do not go together."""
        hidden, heads, kv_heads = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
        head_dim = config.get("head_dim")
        if head_dim is None:
            if "head_dim" in decoder.required or hidden % heads:
                return None
            head_dim = hidden // heads
        told = [config[key] for key in decoder.experts if key in config]
        width = config.get(decoder.expert_width)
        if not isinstance(width, int) or not all(map(_is_count, (head_dim, width, *told))):
            return None
        if len(told) != bool(decoder.experts):
            return None
        if heads % kv_heads or head_dim % 2 or head_dim > _MOST_CHANNELS:
            return None
        return cls(config["num_hidden_layers"], hidden, heads, kv_heads, head_dim, width, told[0] if told else 0)

    @property
    def channels(self) -> int:
        """Of the keys of one token, in all layers; values have as many."""
        return self.num_layers * self.kv_heads * self.head_dim

    @property
    def frequency_bytes(self) -> int:
        """Of RoPE's two tables of frequencies, in float32."""
        return 2 * self.head_dim // 2 * 4

    def layer(self, number: int) -> Layer:
        """The attention call of a layer."""
        module = f"model.layers.{number}.self_attn"
        return Layer(module, self.heads, self.kv_heads, self.head_dim, self.head_dim)

    def projections(self) -> Iterator[tuple[str, int, int, int]]:
        """Name, inputs, outputs and number of the matrices of a layer, in forward order."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "self_attn.q_proj", self.hidden, queries, 1
        yield "self_attn.k_proj", self.hidden, keys, 1
        yield "self_attn.v_proj", self.hidden, keys, 1
        yield "self_attn.o_proj", queries, self.hidden, 1
        if self.num_experts:
            yield "mlp.gate", self.hidden, self.num_experts, 1
            yield "mlp.experts.gate_up_proj", self.hidden, 2 * self.width, self.num_experts
            yield "mlp.experts.down_proj", self.width, self.hidden, self.num_experts
        else:
            yield "mlp.gate_proj", self.hidden, self.width, 1
            yield "mlp.up_proj", self.hidden, self.width, 1
            yield "mlp.down_proj", self.width, self.hidden, 1

    def num_weights(self, config: dict[str, Any], decoder: _Decoder) -> int:
        """All weights of the model."""

        def has(bias: bool | str) -> bool:
            return bool(config.get(bias)) if isinstance(bias, str) else bias

        of_layer = sum(inputs * outputs * count for _, inputs, outputs, count in self.projections())
        of_layer += 2 * self.hidden + (2 * self.head_dim if decoder.head_norms else 0)
        of_layer += (self.heads + 2 * self.kv_heads) * self.head_dim if has(decoder.qkv_bias) else 0
        of_layer += self.hidden if has(decoder.o_bias) else 0
        of_layer += 2 * self.width + self.hidden if has(decoder.mlp_bias) else 0
        embeddings = 1 if config.get("tie_word_embeddings") else 2
        return self.num_layers * of_layer + (embeddings * config["vocab_size"] + 1) * self.hidden

    def cache_parts(
        self, config: dict[str, Any], options: QuantSpecConfig, itemsize: int, context: int, texts: int
    ) -> dict[str, int]:
        """As :func:`quantspec.memory.expected_memory`, of layers that are all alike and see the whole text."""
        size, gamma = options.kv_group_size, options.num_speculative_tokens
        gamma = DEFAULT_SPECULATIVE_TOKENS if gamma is None else gamma
        assert isinstance(gamma, int)
        groups = _planned_groups(context, size, options.max_cache_len or config["max_position_embeddings"])
        recent = 2 * size + gamma + 1
        channels = 2 * texts * self.channels
        # A scale and a zero in float16, for every channel of a key and for every value.
        scales = 4 * texts * groups * self.num_layers * self.kv_heads * (self.head_dim + size)
        plane = channels * groups * size // 2
        return {
            "recent": channels * recent * itemsize,
            "upper": plane,
            "lower": plane,
            "scales": scales,
            "decoded": channels * (groups * size + recent) * itemsize,
        }


def _planned_groups(num_tokens: int, group_size: int, max_cache_len: int) -> int:
    """As in :mod:`quantspec.cache.geometry`."""
    groups = max(0, -(-num_tokens // group_size) - 1)
    if groups == 0:
        return 0
    step = 1 << max(0, groups.bit_length() - 5)
    return min(max(2, -(-groups // step) * step), -(-max_cache_len // group_size) - 1)


def _linears(
    config: dict[str, Any], decoder: _Decoder, shape: _Shape, options: QuantSpecConfig, itemsize: int
) -> Iterator[Linear]:
    """The draft's weights in forward order."""
    asked = options.weight_group_size

    def linear(name: str, inputs: int, outputs: int, count: int, kept: str) -> Linear:
        bytes_in_model = inputs * outputs * count * itemsize
        group = max((size for size in GROUP_SIZES if size <= asked and inputs % size == 0), default=None)
        if group is None:
            kept = kept or f"no group size of {GROUP_SIZES} up to {asked} divides {inputs} inputs"
        elif name.endswith("mlp.gate"):
            kept = "router of experts"
        if group is None or kept:
            return Linear(name, inputs, outputs, None, kept, bytes_in_model, 0)
        # Two codes a byte; a scale and a zero of two bytes each.
        packed = count * outputs * (inputs // 2 + inputs // group * 4)
        note = "" if group == asked else f"group size adapted from {asked}"
        return Linear(name, inputs, outputs, group, note, bytes_in_model, packed)

    for number in range(shape.num_layers):
        for name, inputs, outputs, count in shape.projections():
            yield linear(f"model.layers.{number}.{name}", inputs, outputs, count, "")
    kept = "" if options.quantize_lm_head else "language-model head, quantize_lm_head=False"
    yield linear("lm_head", shape.hidden, config["vocab_size"], 1, kept)
