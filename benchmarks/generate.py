"""Time of ``generate`` against plain Hugging Face generation: SmolLM2-135M, same prompt, same dtype, one run each.

    python -m benchmarks.generate --device cpu --out benchmarks/results/generate-cpu.json

Prefill is the time to the first token; decoding is what follows it, in tokens per second.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import quantspec
from quantspec.evals import load_smollm2, python_reference

from .common import LOG, RESULTS, print_progress, write_results

PROMPT_START = 5000
# Of the published table.
DTYPES = ("bfloat16", "float32")
CONTEXTS = (2000,)
NEW_TOKENS = 48


class TokenTimes:
    """A streamer that only notes when tokens arrive."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the arrival of the prompt (first) or of a token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""


def timed(
    generate: Any, prompt: torch.Tensor, new_tokens: int, **options: Any
) -> tuple[torch.Tensor, dict[str, float]]:
    """Run one greedy generation; returns its ids and ``prefill_seconds``, ``tokens_per_second``."""
    clock = TokenTimes()
    start = time.perf_counter()
    ids = generate(prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, streamer=clock, **options)
    arrivals = clock.times[1:]
    rate = (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])
    return ids, {"prefill_seconds": arrivals[0] - start, "tokens_per_second": rate}


def measure(
    dtype: str, device: str, contexts: Sequence[int], new_tokens: int, compile: bool = False
) -> Iterator[dict[str, Any]]:
    """Two rows per context, with drafts and without, each beside Hugging Face's figures."""
    LOG.info("loading the model")
    model, tokenizer = load_smollm2(getattr(torch, dtype), device)
    ids = tokenizer(python_reference(), return_tensors="pt").input_ids.to(device)
    LOG.info("converting")
    start = time.perf_counter()
    qs = quantspec.convert(model, weight_group_size=64, self_check=False, compile=compile)
    convert_seconds = time.perf_counter() - start
    for context in contexts:
        prompt = ids[:, PROMPT_START : PROMPT_START + context]
        LOG.info("%d tokens: warm-up", context)
        # Kernels, thread pools and (with --compile) graphs warm up on both sides.
        for generate in (qs.generate, model.generate):
            generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
        LOG.info("%d tokens: Hugging Face", context)
        plain_ids, plain = timed(model.generate, prompt, new_tokens)
        for name, options in (("speculative", {}), ("target only", {"num_speculative_tokens": 0})):
            LOG.info("%d tokens: %s", context, name)
            ours_ids, ours = timed(qs.generate, prompt, new_tokens, **options)
            assert qs.last_stats is not None
            agree = (plain_ids == ours_ids)[0, context:].long().cumprod(0).sum().item()
            row = {
                "prompt_tokens": context,
                "new_tokens": new_tokens,
                "dtype": dtype,
                "compiled": compile,
                "mode": name,
                **ours,
                **{f"hugging_face_{key}": value for key, value in plain.items()},
                "decode_speedup": ours["tokens_per_second"] / plain["tokens_per_second"],
                "draft_acceptance_rate": qs.last_stats.draft_acceptance_rate if name == "speculative" else None,
                "tokens_equal_to_hugging_face": agree,
                "convert_seconds": convert_seconds,
            }
            LOG.debug(row)
            yield row


def main() -> None:
    """Run and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--compile", action="store_true", help="run the pair through torch.compile")
    parser.add_argument("--out", type=Path, default=RESULTS / "generate.json")
    arguments = vars(parser.parse_args())
    out, dtypes = arguments.pop("out"), arguments.pop("dtypes")
    transformers.logging.set_verbosity_error()
    print_progress()
    rows = [row for dtype in dtypes for row in measure(dtype, **arguments)]
    write_results(out, arguments["device"], rows)


if __name__ == "__main__":
    main()
