"""Tokens per second with each generation option beside the plain call: SmolLM2-135M, a long prompt, several batches.

    python -m benchmarks.options --out benchmarks/results/options.json
    python -m benchmarks.options --model llama-3.1-8b --out benchmarks/results/options-8b.json

The second call with the option counts; compilation and capture happen in the first. An option changes the text, and so
how much of it is accepted: ``cycle_ms`` does not depend on that. A large shape has random weights: random prompts, and
nothing to be learned from its tokens per second but their ratio.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import quantspec
from quantspec import QuantSpecModel
from quantspec.evals import load_smollm2, python_reference

from .common import LOG, RESULTS, print_progress, write_results
from .generate import PROMPT_START, timed
from .random_models import SHAPES, random_model

BATCHES = (1, 4, 8)
PROMPT_TOKENS = 2000
NEW_TOKENS = 256
# Between the prompts of a batch.
_STRIDE = 500


class Costless(LogitsProcessor):
    """A processor of a caller's own that does nothing."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores


# Each beside the plain call of its kind: greedy, or sampling.
GREEDY: dict[str, dict[str, Any]] = {
    "greedy": {},
    "repetition_penalty=1.1": {"repetition_penalty": 1.1},
    "no_repeat_ngram_size=4": {"no_repeat_ngram_size": 4},
    "output_scores": {"return_dict_in_generate": True, "output_scores": True},
    "output_logits": {"return_dict_in_generate": True, "output_logits": True},
    "min_new_tokens": {"min_new_tokens": 128, "eos_token_id": 2},
    "suppress_tokens": {"suppress_tokens": [100, 200, 300]},
    "bad_words_ids": {"bad_words_ids": [[100], [200], [300]]},
    "a costless processor of the caller's": {"logits_processor": LogitsProcessorList([Costless()])},
}
SAMPLED: dict[str, dict[str, Any]] = {
    "sampling": {},
    "temperature, top_p": {"temperature": 0.8, "top_p": 0.9},
    "min_p=0.05": {"min_p": 0.05},
    "typical_p=0.9": {"typical_p": 0.9},
    "top_h=0.5": {"top_h": 0.5},
    "eta_cutoff=0.001": {"eta_cutoff": 0.001},
    "sampling, a costless processor of the caller's": {"logits_processor": LogitsProcessorList([Costless()])},
}


def load(name: str, device: str) -> tuple[QuantSpecModel, Tensor]:
    """A converted model, and token ids ``(n,)`` to take prompts from."""
    if name != "smollm2":
        model = random_model(name, None)
        ids = torch.randint(model.config.vocab_size, (PROMPT_START + 50_000,), device=device)
        return quantspec.convert(model, quantize_lm_head=True, self_check=False), ids
    model, tokenizer = load_smollm2(torch.bfloat16, device)
    ids = tokenizer(python_reference(), return_tensors="pt").input_ids[0].to(device)
    return quantspec.convert(model, weight_group_size=64, self_check=False), ids


def measure(
    model: str, device: str, batches: Sequence[int], prompt_tokens: int, new_tokens: int
) -> Iterator[dict[str, Any]]:
    """One row per batch size and option, the plain call first, and one of Hugging Face's own ``generate``."""
    LOG.info("loading and converting the model")
    qs, ids = load(model, device)
    prompt = ids[None, PROMPT_START : PROMPT_START + prompt_tokens]
    LOG.info("Hugging Face")
    for _ in range(2):
        _, theirs = timed(qs.model.generate, prompt, new_tokens)
    yield {
        "model": model,
        "batch": 1,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "option": "Hugging Face, greedy",
        "tokens_per_second": theirs["tokens_per_second"],
    }
    for batch in batches:
        starts = [PROMPT_START + _STRIDE * row for row in range(batch)]
        prompt = torch.stack([ids[start : start + prompt_tokens] for start in starts])
        common = {"model": model, "batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        for plain, table in ((GREEDY["greedy"], GREEDY), (SAMPLED["sampling"], SAMPLED)):
            plain_rate, plain_ms = float("nan"), float("nan")
            sampling = {"do_sample": True, "top_k": 50, "seed": 0} if table is SAMPLED else {"do_sample": False}
            for name, options in table.items():
                LOG.info("batch %d: %s", batch, name)
                call = {"max_new_tokens": new_tokens, "eos_token_id": None, **sampling, **options}
                for _ in range(2):
                    qs.generate(prompt, **call)
                stats = qs.last_stats
                assert stats is not None
                cycle_ms = 1000 * stats.decode_seconds / len(stats.seconds_per_cycle)
                if options is plain:
                    plain_rate, plain_ms = stats.tokens_per_second, cycle_ms
                row = {
                    **common,
                    "option": name,
                    "tokens_per_second": stats.tokens_per_second,
                    "of_plain": stats.tokens_per_second / plain_rate,
                    "cycle_ms": cycle_ms,
                    "cycle_of_plain": plain_ms / cycle_ms,
                    "mean_acceptance_length": stats.mean_acceptance_length,
                    "generated_tokens": stats.generated_tokens,
                }
                LOG.debug(row)
                yield row


def main() -> None:
    """Run and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", choices=("smollm2", *SHAPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--out", type=Path, default=RESULTS / "options.json")
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    transformers.logging.set_verbosity_error()
    print_progress()
    rows = []
    for row in measure(**arguments):
        rows.append(row)
        # What is measured stays, whatever comes later.
        write_results(out, arguments["device"], rows)


if __name__ == "__main__":
    main()
