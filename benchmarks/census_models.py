"""Tiny random models of any causal type that transformers registers: its default config, shrunk by fields' names."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 128
_VOCABULARIES = "vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size n_words unpadded_vocab_size"
# Value -> the fields that get it, where their default is a number.
_SIZES: dict[int, str] = {
    VOCABULARY: f"{_VOCABULARIES} mamba_d_ssm",
    512: """max_position_embeddings n_positions n_ctx max_seq_len max_target_positions model_max_length context_length
        original_max_position_embeddings""",
    96: """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner n_inner dff dim_ff ffn_hidden_size
        feed_forward_size intermediate_size_mlp dense_intermediate_size""",
    64: """hidden_size hidden_size_global d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim
        lru_width attention_hidden_size input_embedding_size output_embedding_size expert_ffn_hidden_size
        moe_intermediate_size moe_shared_expert_intermediate_size shared_expert_intermediate_size
        shared_experts_intermediate_size shared_intermediate_size""",
    32: "kv_lora_rank q_lora_rank o_lora_rank router_hidden_size rel_extent",
    24: "local_attention",
    16: """head_dim swa_head_dim kv_channels dim_head attention_head_dim d_head d_kv attention_head_size
        qk_nope_head_dim v_head_dim index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim
        mamba_d_head mamba_head_dim mamba_chunk_size hidden_size_per_layer_input laurel_rank log_scaling_n_floor
        floor_scale adapter_rank hc_lowrank loop_gate_rank""",
    12: "sliding_window sliding_window_size window_size attention_window_size attention_chunk_size",
    8: """qk_rope_head_dim index_topk mamba_d_state mamba_n_heads mamba_num_heads ssm_state_size state_size rotary_dim
        d_rel gated_norm_rank""",
    4: """num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_experts num_local_experts
        n_routed_experts moe_num_experts index_block_size linear_num_value_heads linear_num_heads mamba_dt_rank
        time_step_rank""",
    2: """num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk
        moe_k top_k_experts n_group num_expert_group zero_expert_num index_n_heads index_topk_blocks
        linear_num_key_heads eos_token_id""",
    1: "topk_group n_shared_experts moe_num_shared_experts bos_token_id",
    0: "pad_token_id",
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
)
_RANDOM = ("dropout", "pdrop", "layerdrop", "jitter")
_TEXTS = (
    "text_config",
    "decoder",
    "decoder_config",
    "encoder_config",
    "global_config",
    "patcher_config",
    "depth_decoder_config",
)

# The field that stays as it is by default.
_KEEP = "keep"
_WINDOW_AND_FULL = ["sliding_attention", "full_attention"]
_LATENT = {"num_key_value_heads": 4, _KEEP: "head_dim"}
_DECODER = {"is_decoder": True}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"] * 2}


def _each_of(names: str, special: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(names.split(), special)


# What the names do not tell.
_SPECIAL: dict[str, dict[str, Any]] = {
    **_each_of(
        """bert bert-generation camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm
        roc_bert roformer xlm-roberta xlm-roberta-xl""",
        _DECODER,
    ),
    **_each_of("axk1 axk2 bailing_hybrid kimi_linear minicpm3 youtu dots3_note_text hy_v4", _LATENT),
    **_each_of("deepseek_v3 sarvam_mla deepseek_v32 glm_moe_dsa", {**_LATENT, "first_k_dense_replace": 1}),
    "deepseek_v2": {
        **_LATENT,
        "topk_method": "group_limited_greedy",
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    },
    "glm4_moe_lite": {**_LATENT, "qk_rope_head_dim": 8},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 8},
    "big_bird": {"attention_type": "original_full", **_DECODER},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "xmod": {"default_language": "en_XX", **_DECODER},
    "xlm": {"causal": True},
    "afmoe": {"num_dense_layers": 1},
    "blt": {"encoder_hash_byte_group_vocab": 1009},
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 2},
    "cohere_compass_text": {
        "layer_types": _WINDOW_AND_FULL,
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
    },
    "dots3_note": {
        "vision_config": {"adapter_out_dim": 64, "num_hidden_layers": 1, "mlp_layer_types": ["dense"]},
        "audio_config": {"adapter_out_dim": 64, "num_hidden_layers": 1},
    },
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "layer_types": _WINDOW_AND_FULL,
    },
    "gemma3n_text": {
        "layer_types": _WINDOW_AND_FULL * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "inkling_text": {"log_scaling_n_floor": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "laguna": {"layer_types": _WINDOW_AND_FULL, "num_attention_heads_per_layer": [4, 4]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {
        "no_rope_layers": [1, 0],
        "moe_layers": [1],
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "mellum": {"layer_types": _WINDOW_AND_FULL},
    "ministral": {"head_dim": 16, "layer_types": _WINDOW_AND_FULL},
    "mistral": {"sliding_window": 12},
    "moshi": {"audio_vocab_size": VOCABULARY},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2": {"layer_types": _WINDOW_AND_FULL, "use_sliding_window": True, "sliding_window": 12},
    "qwen3": {"layer_types": _WINDOW_AND_FULL, "use_sliding_window": True, "sliding_window": 12},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 101,
        "ple_embed_dim": 16,
        "hc_count": 2,
        "split_ngram_parts": 4,
        "heads_per_ngram": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": (16, 32),
        "axial_pos_embds_dim": (32, 32),
        "attn_layers": ["local", "lsh"],
        "num_buckets": 2,
        **_DECODER,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": 12},
    "xlstm": {"qk_dim_factor": 1.0},
    "zamba": {
        **_ZAMBA,
        "n_mamba_heads": 2,
        "num_key_value_heads": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "zamba2": {
        **_ZAMBA,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "num_key_value_heads": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "hybrid_layer_ids": [1, 3],
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default config of a type with few small layers, among them each kind that it has by default."""
    kind = CONFIG_MAPPING[model_type]
    special = copy.deepcopy(_SPECIAL.get(model_type, {}))
    try:
        default = kind()
    except Exception:
        default = kind(**{name: value for name, value in special.items() if name != _KEEP})
    fields = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    small = _shrunk(fields)
    small.pop(special.pop(_KEEP, None), None)
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig) and name in _TEXTS:
            has_own = value.model_type in CONFIG_MAPPING and value.model_type != model_type
            small[name] = tiny_config(value.model_type).to_dict() if has_own else value.to_dict() | _shrunk(vars(value))
    kinds = {
        name: list(dict.fromkeys(value))
        for name, value in fields.items()
        if _lists_layers(name) and isinstance(value, list | tuple) and value
    }
    given = [len(value) for name, value in special.items() if _lists_layers(name)]
    count = given[0] if given else max(2, *map(len, kinds.values()), 0)
    layers = {name: count for name in _LAYERS if isinstance(fields.get(name), int)}
    of_layers = {name: (value * count)[:count] for name, value in kinds.items()}
    try:
        return kind(**(small | layers | of_layers | special))
    except Exception:
        # Some have more to say of each layer than its kind.
        return kind(**(small | dict.fromkeys(layers, 4) | special))


def _lists_layers(name: str) -> bool:
    return name == "layers_block_type" or (name.endswith("layer_types") and not name.startswith("mtp"))


def _shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    """Small values for the numbers among the fields that have one."""
    numbers = {name for name, value in fields.items() if isinstance(value, int) and not isinstance(value, bool)}
    small = {name: _SMALL[name] for name in fields if name in _SMALL and (name in numbers or name in _TOKENS)}
    small |= {name: 1 for name in _LAYERS if name in numbers}
    still = {name: 0.0 for name, v in fields.items() if isinstance(v, float) and any(part in name for part in _RANDOM)}
    return small | still


def tiny_model(model_type: str) -> PreTrainedModel:
    """A random model of :func:`tiny_config` in float32 and eval mode, whose greedy text seldom hangs on near-ties."""
    config = tiny_config(model_type)
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except ValueError:
        # Not every type lets this be chosen.
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            elif name.endswith("bias") or "sink" in name:
                parameter.normal_(std=0.1)
    return model.float().eval()
