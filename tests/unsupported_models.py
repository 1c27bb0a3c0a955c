"""Models that ``convert`` must refuse, with what its message must say; for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tiny_models import _MOE, tiny_model
from torch import nn
from transformers import AutoModel, AutoModelForSeq2SeqLM, LlamaForCausalLM, PreTrainedModel, T5Config

_STATE = "is not in the key/value cache"
_NO_ATTENTION = "no attention layer, so no key/value cache"


@dataclass(frozen=True)
class Refused:
    """One model and the parts of its error message.

    Attributes:
        build: makes the model.
        reason: text that says why.
        names: text that names the module, node or weight; '' where the whole model is at fault.
        architecture: its type; '' for models made up for the tests.
    """

    build: Callable[[], nn.Module]
    reason: str
    names: str = ""
    architecture: str = ""


def _architecture(model_type: str, reason: str, names: str, **options) -> Refused:
    return Refused(lambda: tiny_model(model_type, **options), reason, names, model_type)


def _with_mixer(mixer: nn.Module) -> LlamaForCausalLM:
    """A llama whose second MLP sees what ``mixer`` makes of its input."""
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.mixer = mixer
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(mlp.mixer(hidden))
    return model


class TokenShift(nn.Module):
    """Half of every token's channels come from the token before, as in RWKV."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mix ``(B, T, C)``."""
        half = hidden.shape[-1] // 2
        before = torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
        return torch.cat((before[..., :half], hidden[..., half:]), -1)


class CausalConv(nn.Module):
    """A depthwise causal convolution over tokens, as in Mamba and LFM2."""

    def __init__(self, channels: int, functional: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, padding=2, groups=channels)
        self.functional = functional

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Convolve ``(B, T, C)``; ``functional`` hides the module from whoever looks for modules."""
        x = hidden.transpose(1, 2)
        if self.functional:
            mixed = torch.nn.functional.conv1d(x, self.conv.weight, padding=2, groups=x.shape[1])
        else:
            mixed = self.conv(x)
        return mixed[..., : hidden.shape[1]].transpose(1, 2)


class RunningMean(nn.Module):
    """Every token sees the mean of those before it."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mix ``(B, T, C)``."""
        counts = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        return hidden.cumsum(1) / counts[:, None]


class OwnAttention(nn.Module):
    """Causal attention of the hidden states among themselves, computed without the interface."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mix ``(B, T, C)``."""
        # Small scores, or every token would attend to itself alone.
        scores = 0.01 * hidden @ hidden.transpose(1, 2)
        future = torch.ones_like(scores).triu(1).bool()
        return scores.masked_fill(future, float("-inf")).softmax(-1) @ hidden


_LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}


class OwnRope(nn.Module):
    """A RoPE of a model's own, which tells nobody that it follows the length."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cosines and sines."""
        return self.inner(x, position_ids)


def _own_rope() -> PreTrainedModel:
    model = tiny_model("llama")
    model.model.rotary_emb = OwnRope(model.model.rotary_emb)
    model.config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, **_LONGROPE}
    return model


def _on_meta() -> PreTrainedModel:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.to("meta")
    return model


def _packed() -> PreTrainedModel:
    model = tiny_model("llama")
    linear = model.model.layers[0].self_attn.q_proj
    del linear.weight
    linear.register_buffer("weight", torch.zeros(64, 8, dtype=torch.int32))
    return model


def _t5() -> PreTrainedModel:
    config = T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, decoder_start_token_id=0)
    return AutoModelForSeq2SeqLM.from_config(config)


def _bidirectional() -> PreTrainedModel:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    # Eager attention obeys the mask alone.
    model.set_attn_implementation("sdpa")
    return model


# Name -> model. Names are also the test ids.
UNSUPPORTED: dict[str, Refused] = {
    # Attention that no marker computes.
    "doge": _architecture("doge", "mask of its attention follows from what the tokens say", "model.layers.0.self_attn"),
    # Convolutions and recurrences.
    "mamba": _architecture("mamba", _NO_ATTENTION, "MambaForCausalLM", state_size=8),
    "mamba2": _architecture("mamba2", _NO_ATTENTION, "Mamba2ForCausalLM", num_heads=8, head_dim=16, n_groups=1),
    "recurrent_gemma": _architecture(
        "recurrent_gemma",
        "state of their own ('RecurrentGemmaRecurrentBlock.conv1d_state', 'RecurrentGemmaRglru.recurrent_states')",
        "RecurrentGemmaForCausalLM",
        num_hidden_layers=3,
        lru_width=64,
    ),
    "rwkv": _architecture("rwkv", _NO_ATTENTION, "RwkvForCausalLM", attention_hidden_size=64),
    "minimax": _architecture("minimax", "keeps state of its own ('linear_cache')", "MiniMaxCache", **_MOE),
    # The rest.
    "t5": Refused(_t5, "is an encoder-decoder", "T5ForConditionalGeneration", "t5"),
    "phimoe": _architecture(
        "phimoe",
        "RoPE reads the length of a text by itself",
        "model.rotary_emb",
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 2.0,
            "short_mscale": 1.1,
            "long_mscale": 1.2,
            **_LONGROPE,
        },
        **_MOE,
    ),
    "own RoPE": Refused(_own_rope, "changes the keys already cached", "rope_type 'longrope'"),
    "meta weight": Refused(_on_meta, "is on the meta device", "model.layers.1.mlp.up_proj.weight"),
    "float64": Refused(lambda: tiny_model("llama", torch.float64), "is torch.float64", "model.embed_tokens.weight"),
    "packed weight": Refused(_packed, "is torch.int32", "model.layers.0.self_attn.q_proj.weight"),
    "no head": Refused(
        lambda: AutoModel.from_config(tiny_model("llama").config), "has no language-model head", "LlamaModel"
    ),
    "not causal": Refused(_bidirectional, "depends on the tokens after it", "LlamaForCausalLM"),
    "own attention": Refused(lambda: _with_mixer(OwnAttention()), _STATE, "model.layers.1.mlp.mixer"),
    "token shift": Refused(lambda: _with_mixer(TokenShift()), _STATE, "model.layers.1.mlp.mixer"),
    "running mean": Refused(lambda: _with_mixer(RunningMean()), _STATE, "model.layers.1.mlp.mixer"),
    "causal conv": Refused(lambda: _with_mixer(CausalConv(64, False)), _STATE, "model.layers.1.mlp.mixer.conv"),
    "conv1d call": Refused(lambda: _with_mixer(CausalConv(64, True)), _STATE, "model.layers.1.mlp.mixer"),
}
