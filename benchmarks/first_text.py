"""Seconds from ``convert`` to the first token, each row a process of its own: SmolLM2's shape, random weights.

    python -m benchmarks.first_text --device cuda --out benchmarks/results/first-text.json

A first process finds empty folders of compiled code and captures, a later one those of the first; a last one loads the
saved pair.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import first_text_process
from .common import LOG, RESULTS, print_progress, write_results
from .random_models import SHAPES

_ROPE = {"rope_type": "default", "rope_theta": 1e5}
_SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rope_parameters": _ROPE,
}
_LARGE = {"max_position_embeddings": 131072, "tie_word_embeddings": False, "rope_parameters": _ROPE}
MODELS = {"smollm2": _SMOLLM2, **{name: shape | _LARGE for name, shape in SHAPES.items()}}


def measure(model: str, device: str, dtype: str, compile: bool, saves: bool) -> Iterator[dict[str, Any]]:
    """A row for each process, with the seconds of its stages."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "QUANTSPEC_CACHE": "quantspec"}
        caches = {variable: f"{scratch}/{name}" for variable, name in folders.items()}
        settings = {
            "shape": MODELS[model],
            "device": device,
            "dtype": dtype,
            "compile": compile,
            "folder": f"{scratch}/pair",
        }
        processes = [("first", False), ("later", False), *([("saved", True)] if saves else [])]
        for name, loads in processes:
            LOG.info("%s: %s process", model, name)
            given = json.dumps({**settings, "loads": loads, "saves": saves and name == "first"})
            # Its folder has a module that is named like a package that transformers looks for.
            command = [sys.executable, "-P", first_text_process.__file__, given]
            done = subprocess.run(command, env=os.environ | caches, stdout=subprocess.PIPE, text=True, check=True)
            row = {
                "model": model,
                "dtype": dtype,
                "compiled": compile,
                "process": name,
                **json.loads(done.stdout.splitlines()[-1]),
            }
            LOG.debug(row)
            yield row


def main() -> None:
    """Run and write JSON."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2"], choices=MODELS)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--without-saving", action="store_true", help="leave out the saved pair")
    parser.add_argument("--out", type=Path, default=RESULTS / "first-text.json")
    arguments = parser.parse_args()
    print_progress()
    options = (arguments.device, arguments.dtype, not arguments.eager, not arguments.without_saving)
    rows = []
    for model in arguments.models:
        for row in measure(model, *options):
            rows.append(row)
            write_results(arguments.out, arguments.device, rows)


if __name__ == "__main__":
    main()
