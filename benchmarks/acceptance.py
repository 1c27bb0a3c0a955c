"""Acceptance and parity of SmolLM2-135M on Python's language reference.

    python -m benchmarks.acceptance

Acceptance: greedy and sampled generation after prompts of several lengths, for each weight quantizer. Parity: the
target (full-precision weights, INT8 cache) and the draft (INT4 weights, INT4 cache) against the original model on the
last tokens of a text, every token decoded through the cache.
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

PROMPT_LENGTHS = (2000, 4000, 6000)
# Where each prompt starts in the text: three different places per length.
PROMPT_STARTS = (5000, 40000, 80000)
# The drafts compared: how the weights are quantized, and whether the language-model head is.
DRAFTS: dict[str, dict[str, Any]] = {
    "tinygemm": {"weight_quantizer": "tinygemm"},
    "hqq": {"weight_quantizer": "hqq"},
    "tinygemm-int4-head": {"weight_quantizer": "tinygemm", "quantize_lm_head": True},
    "hqq-int4-head": {"weight_quantizer": "hqq", "quantize_lm_head": True},
}


def acceptance_rows(qs: QuantSpecModel, ids: Tensor, new_tokens: int) -> list[dict[str, Any]]:
    """One row per prompt length and decoding mode, over a batch of prompts from several places of the text."""
    rows = []
    for do_sample in (False, True):
        for length in PROMPT_LENGTHS:
            options = {"do_sample": True, "temperature": 1.0, "top_k": 0} if do_sample else {"do_sample": False}
            prompts = torch.cat([ids[:, start : start + length] for start in PROMPT_STARTS])
            qs.generate(prompts, max_new_tokens=new_tokens, eos_token_id=None, seed=0, **options)
            stats = qs.last_stats
            assert stats is not None
            row = {
                "prompt_tokens": length,
                "mode": "sampling, temperature 1" if do_sample else "greedy",
                **_weights(qs),
                "kv_group_size": qs.config.kv_group_size,
                "num_speculative_tokens": qs.config.num_speculative_tokens,
                "prompts": len(prompts),
                "draft_acceptance_rate": stats.draft_acceptance_rate,
                "acceptance_rate_per_position": stats.acceptance_rate_per_position,
                "mean_acceptance_length": stats.mean_acceptance_length,
                "generated_tokens": stats.generated_tokens,
            }
            print(row, flush=True)
            rows.append(row)
    return rows


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
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--drafts", nargs="+", default=list(DRAFTS), choices=DRAFTS, help="INT4 weights to try")
    parser.add_argument("--out", type=Path, default=RESULTS / "acceptance.json")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    model, tokenizer = load_smollm2(getattr(torch, arguments.dtype), arguments.device)
    ids = tokenizer(python_reference(), return_tensors="pt").input_ids.to(arguments.device)
    rows: list[dict[str, Any]] = []
    for name in arguments.drafts:
        # Only counts are taken here, so nothing is gained from compiling.
        qs = quantspec.convert(model, weight_group_size=64, self_check=False, compile=False, **DRAFTS[name])
        if name == arguments.drafts[0]:
            rows.append(parity_row(qs, ids, 4096, 1024, EvalRole.TARGET))
        rows.append(parity_row(qs, ids, 4096, 1024, EvalRole.DRAFT))
        rows += acceptance_rows(qs, ids, arguments.new_tokens)
    for row in rows:
        row["dtype"] = arguments.dtype
    write_results(arguments.out, arguments.device, rows)


if __name__ == "__main__":
    main()
