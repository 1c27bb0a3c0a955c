"""Code blocks of Markdown pages, and a Hub cache of tiny random models under the names that the pages use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tiny_models import tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Hub ids that pages load; each becomes a tiny random llama.
STAND_INS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-3.1-8B-Instruct")
_REVISION = "0" * 40

# Stands alone on the line above a block that only a CUDA device can run.
NEEDS_GPU = "<!-- needs a GPU -->"
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Block:
    """One fenced block; ``line`` is that of its first line of code in the page, counted from 1."""

    language: str
    line: int
    text: str
    needs_gpu: bool


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order, indentation of the fence taken away."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()].rstrip("\n").splitlines()
        indent = len(match[1])
        code = "".join(line[indent:] if line.strip() else line for line in match[3].splitlines(keepends=True))
        line = text.count("\n", 0, match.start(3)) + 1
        found.append(Block(match[2], line, code, bool(before) and before[-1].strip() == NEEDS_GPU))
    return found


def stand_in_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the special tokens and chat template of the SmolLM2 family."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*special, *letters])}
    inner = Tokenizer(models.BPE(vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def fill_hub_cache(folder: Path) -> None:
    """Write a stand-in for every id of :data:`STAND_INS` as Hugging Face's download cache lays them out."""
    tokenizer = stand_in_tokenizer()
    model = tiny_model(
        "llama",
        vocab_size=len(tokenizer),
        max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for name in STAND_INS:
        repository = folder / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / _REVISION
        tokenizer.save_pretrained(snapshot)
        model.save_pretrained(snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(_REVISION)
