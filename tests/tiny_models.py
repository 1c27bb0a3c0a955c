"""Tiny random decoders of many architectures, for tests."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {
    "vocab_size": 96,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_WINDOWS = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 1,
}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

# Model type -> what it needs beyond _COMMON.
ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 12},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 16, **_WINDOWS},
    "gemma3_text": {"head_dim": 16, **_WINDOWS},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "gpt_neox": {},
    "gpt2": _GPT2,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "starcoder2": {"sliding_window": 12},
    "granite": {
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 3.0,
    },
    "olmo": {},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5, **_WINDOWS},
    "stablelm": {},
    "nemotron": {},
    "gpt_bigcode": _GPT2,
    "mixtral": _MOE,
    "qwen3_moe": {"head_dim": 16, **_MOE},
    "gpt_oss": {"head_dim": 16, **_WINDOWS, **_MOE},
    "deepseek_v3": {
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        **_MOE,
    },
    "llama4_text": {
        "attention_chunk_size": 12,
        "no_rope_layers": [1, 0],
        "attn_temperature_tuning": False,
        "intermediate_size_mlp": 96,
        **_MOE,
    },
    # Beyond the common families: two attention calls a layer, layers without RoPE, other gates and norms.
    "diffllama": {},
    "exaone4": {"sliding_window": 12, "sliding_window_pattern": 2},
    "glm4": {"head_dim": 16},
    "qwen2_moe": {"shared_expert_intermediate_size": 64, **_MOE},
    # Layers that keep state besides keys and values: a short convolution, state-space models, the gated delta rule; as
    # layers of their own, and beside attention within one.
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 64,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": "rope",
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 16,
        "shared_expert_intermediate_size": 64,
        **_LINEAR,
        **_MOE,
    },
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA},
    # Whole multimodal classes, given text.
    "gemma3": {"text_config": {**_COMMON, "head_dim": 16, **_WINDOWS}, "vision_config": _VISION},
    "gemma4": {
        "text_config": {
            **_COMMON,
            "head_dim": 16,
            "global_head_dim": 16,
            "num_global_key_value_heads": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 96,
            "num_kv_shared_layers": 0,
            **_WINDOWS,
        },
        "vision_config": _VISION,
    },
}

# Of those, which keep state besides keys and values.
STATEFUL = ("lfm2", "granitemoehybrid", "qwen3_next", "falcon_h1")
_LINEAR_TYPES = {"layer_types": ["linear_attention", "full_attention"]}
# More types with state; what they share with those above is tested there.
HYBRIDS: dict[str, dict] = {
    "qwen3_5_text": {"head_dim": 16, **_LINEAR_TYPES, **_LINEAR},
    "qwen3_5_moe_text": {"head_dim": 16, "shared_expert_intermediate_size": 64, **_LINEAR_TYPES, **_LINEAR, **_MOE},
    "olmo_hybrid": {**_LINEAR_TYPES, **_LINEAR},
    "kimi_linear": {
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        **_LINEAR_TYPES,
        **_MOE,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, **_MOE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2, **_MAMBA},
    "bamba": {"attn_layer_indices": [1], **_MAMBA},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 8,
        "head_dim": 16,
    },
    "zamba2": {
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "mamba_headdim": 16,
        "layers_block_type": ["mamba", "hybrid"],
        "num_mem_blocks": 1,
        "adapter_rank": 4,
    },
}


def tiny_model(architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides) -> PreTrainedModel:
    """A two-layer random model of a type in :data:`ARCHITECTURES` (or any causal ``model_type``), in eval mode.

    Weights are wide enough that greedy decoding does not hang on near-ties.
    """
    options = (ARCHITECTURES | HYBRIDS).get(architecture, {})
    if options is not _GPT2:
        options = {**_COMMON, **options}
    config = AutoConfig.for_model(architecture, **{**options, **overrides})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            elif name.endswith("bias") or "sinks" in name:
                parameter.normal_(std=0.1)
    return model.to(dtype).eval()
