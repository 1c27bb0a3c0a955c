"""Target and draft of SmolLM2-135M against the original model, on Python's language reference.

    python -m benchmarks.draft_parity

The target (full-precision weights, INT8 cache) and the draft (INT4 weights, INT4 cache) on the last tokens of a text,
every token decoded through the cache, for each weight quantizer; a CPU measures what a GPU's draft reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import quantspec
from quantspec import QuantSpecModel
from quantspec.evals import load_smollm2, python_reference
from quantspec.evals.roles import EvalRole
from quantspec.evals.text_parity import compare_text

from .common import RESULTS, write_results

# The drafts compared: how the weights are quantized, and whether the language-model head is.
DRAFTS: dict[str, dict[str, Any]] = {
    "tinygemm": {"weight_quantizer": "tinygemm"},
    "hqq": {"weight_quantizer": "hqq"},
    "tinygemm-int4-head": {"weight_quantizer": "tinygemm", "quantize_lm_head": True},
    "hqq-int4-head": {"weight_quantizer": "hqq", "quantize_lm_head": True},
}


def _weights(qs: QuantSpecModel) -> dict[str, Any]:
    config = qs.config
    return {
        "weight_quantizer": config.weight_quantizer.value,
        "weight_group_size": config.weight_group_size,
        "lm_head": "INT4" if config.quantize_lm_head else "full precision",
    }


def parity_row(qs: QuantSpecModel, ids: Tensor, length: int, scored: int, role: EvalRole) -> dict[str, Any]:
    """Next-token agreement and perplexity of ``scored`` tokens, read through the cache, against the original model."""
    (comparison,) = compare_text(qs, ids[0, 5000 : 5000 + length], length - scored, [role])
    row = {
        "role": role.value,
        "text_tokens": length,
        "scored_tokens": scored,
        **_weights(qs),
        "argmax_agreement": comparison.argmax_agreement,
        "perplexity_reference": comparison.reference_perplexity,
        "perplexity": comparison.perplexity,
        "mean_kl": comparison.mean_kl,
    }
    print(row, flush=True)
    return row


def main() -> None:
    """Run and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--drafts", nargs="+", default=list(DRAFTS), choices=DRAFTS, help="INT4 weights to try")
    parser.add_argument("--out", type=Path, default=RESULTS / "draft-parity.json")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    model, tokenizer = load_smollm2(getattr(torch, arguments.dtype), arguments.device)
    ids = tokenizer(python_reference(), return_tensors="pt").input_ids.to(arguments.device)
    rows: list[dict[str, Any]] = []
    for name in arguments.drafts:
        options = {"weight_group_size": 64, "draft_recipe": "int4-cache", **DRAFTS[name]}
        qs = quantspec.convert(model, self_check=False, compile=False, **options)
        if name == arguments.drafts[0]:
            rows.append(parity_row(qs, ids, 4096, 1024, EvalRole.TARGET))
        rows.append(parity_row(qs, ids, 4096, 1024, EvalRole.DRAFT))
    for row in rows:
        row["dtype"] = arguments.dtype
    write_results(arguments.out, arguments.device, rows)


if __name__ == "__main__":
    main()
