"""Acceptance and parity of SmolLM2-135M on Python's language reference.

    python -m benchmarks.acceptance --dtype float32 --out benchmarks/results/acceptance-cpu.json

Acceptance: greedy and sampled generation after prompts of several lengths, for each weight quantizer. Parity: the
target (full-precision weights, INT8 cache) and the draft (INT4 weights, INT4 cache) against the original model on the
last tokens of a text, every token decoded through the cache.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import quantspec
from quantspec import QuantSpecModel
from quantspec.evals import load_smollm2, python_reference
from quantspec.passes import Role
from quantspec.self_check import incremental_logits

from .common import RESULTS, write_results

PROMPT_LENGTHS = (2000, 4000, 6000)
# Where each prompt starts in the text: three different places per length.
PROMPT_STARTS = (5000, 40000, 80000)
BLOCK = 16


def acceptance_rows(qs: QuantSpecModel, ids: Tensor, new_tokens: int, starts: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row per prompt length and decoding mode, over all starting places."""
    rows = []
    for do_sample in (False, True):
        for length in PROMPT_LENGTHS:
            totals: dict[str, Any] = {"drafted": [], "accepted": [], "generated": 0, "seconds": 0.0, "cycles": 0}
            for start in starts:
                options = {"do_sample": True, "temperature": 1.0, "top_k": 0} if do_sample else {"do_sample": False}
                prompt = ids[:, start : start + length]
                qs.generate(prompt, max_new_tokens=new_tokens, eos_token_id=None, seed=start, **options)
                stats = qs.last_stats
                assert stats is not None
                totals["drafted"].append(stats.drafted_per_position)
                totals["accepted"].append(stats.accepted_per_position)
                totals["generated"] += stats.generated_tokens
                totals["seconds"] += stats.decode_seconds
                totals["cycles"] += stats.cycles
            drafted, accepted = (torch.tensor(totals[key]).sum(0) for key in ("drafted", "accepted"))
            row = {
                "prompt_tokens": length,
                "mode": "sampling, temperature 1" if do_sample else "greedy",
                "weight_quantizer": qs.config.weight_quantizer.value,
                "weight_group_size": qs.config.weight_group_size,
                "kv_group_size": qs.config.kv_group_size,
                "num_speculative_tokens": qs.config.num_speculative_tokens,
                "prompts": len(starts),
                "draft_acceptance_rate": (accepted.sum() / drafted.sum()).item(),
                "acceptance_rate_per_position": (accepted / drafted).tolist(),
                "mean_acceptance_length": 1 + accepted.sum().item() / totals["cycles"],
                "generated_tokens": totals["generated"],
            }
            print(row, flush=True)
            rows.append(row)
    return rows


def parity_row(qs: QuantSpecModel, ids: Tensor, length: int, scored: int, role: Role) -> dict[str, Any]:
    """Next-token agreement and perplexity of ``scored`` tokens, read through the cache, against the original model."""
    text = ids[:, 5000 : 5000 + length]
    with torch.no_grad():
        expected = qs.model(text, use_cache=False).logits[:, -scored:].float()
        steps = (BLOCK,) * (scored // BLOCK)
        ours = incremental_logits(qs, text, length - scored, steps, role)[:, 1:].float()
    labels = text[:, 1 - scored :].flatten()
    losses = [F.cross_entropy(logits[0, :-1], labels).item() for logits in (expected, ours)]
    agree = (expected.argmax(-1) == ours.argmax(-1)).float().mean().item()
    divergence = F.kl_div(ours.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    row = {
        "role": role.value,
        "text_tokens": length,
        "scored_tokens": scored,
        "weight_quantizer": qs.config.weight_quantizer.value,
        "argmax_agreement": agree,
        "perplexity_reference": torch.tensor(losses[0]).exp().item(),
        "perplexity": torch.tensor(losses[1]).exp().item(),
        "mean_kl": divergence.mean().item(),
    }
    print(row, flush=True)
    return row


def main() -> None:
    """Run and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=len(PROMPT_STARTS), help="prompts per length")
    parser.add_argument("--quantizers", nargs="+", default=["tinygemm", "hqq"])
    parser.add_argument("--out", type=Path, default=RESULTS / "acceptance.json")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    model, tokenizer = load_smollm2(getattr(torch, arguments.dtype), arguments.device)
    ids = tokenizer(python_reference(), return_tensors="pt").input_ids.to(arguments.device)
    rows: list[dict[str, Any]] = []
    for quantizer in arguments.quantizers:
        # Only counts are taken here, so nothing is gained from compiling.
        qs = quantspec.convert(model, weight_group_size=64, weight_quantizer=quantizer, self_check=False, compile=False)
        if quantizer == arguments.quantizers[0]:
            rows.append(parity_row(qs, ids, 4096, 1024, Role.TARGET))
        rows.append(parity_row(qs, ids, 4096, 1024, Role.DRAFT))
        rows += acceptance_rows(qs, ids, arguments.new_tokens, PROMPT_STARTS[: arguments.prompts])
    for row in rows:
        row["dtype"] = arguments.dtype
    write_results(arguments.out, arguments.device, rows)


if __name__ == "__main__":
    main()
