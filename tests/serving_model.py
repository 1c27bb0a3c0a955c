"""A tiny model whose random texts are printable."""

from __future__ import annotations

from pathlib import Path

from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def printable_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every printable letter of ASCII but the space and the tilde."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(30 + token): token for token in range(3, 96)}}
    inner = Tokenizer(models.BPE(vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    template = "{% for message in messages %}{{ message.role }}:{{ message.content }}|{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=template
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, so that most letters are several tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{letter: token for token, letter in enumerate(letters, 3)}}
    inner = Tokenizer(models.BPE(vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_model(folder: Path) -> Path:
    """Save a two-layer llama and its tokenizer; returns ``folder``."""
    tiny_model("llama").save_pretrained(folder)
    printable_tokenizer().save_pretrained(folder)
    return folder
