"""Time of ``generate`` against plain Hugging Face generation: SmolLM2-135M, same prompt, same dtype, in turns.

    python -m benchmarks.generate --device cpu --out benchmarks/results/generate-cpu.json

Prefill is the time to the first token; decoding is what follows it, in tokens per second. ``speedup`` is that of the
whole call, prompt and answer. Of several repetitions, each a run of everything in turn, the medians count.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import quantspec
from quantspec.config import DEFAULT_SPECULATIVE_TOKENS
from quantspec.evals import load_smollm2, python_reference

from .common import LOG, RESULTS, print_progress, write_results

PROMPT_START = 5000
# Of the published table.
DTYPES = ("float32", "bfloat16")
CONTEXTS = (3000,)
NEW_TOKENS = 128
REPETITIONS = 2
_PLAIN = "Hugging Face"
# What is timed beside plain generation, and how it is called.
MODES: dict[str, dict[str, Any]] = {
    "auto": {"num_speculative_tokens": "auto"},
    "speculative": {"num_speculative_tokens": DEFAULT_SPECULATIVE_TOKENS},
    "target only": {"num_speculative_tokens": 0},
}


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
    """Run one greedy generation; returns its ids and ``seconds``, ``prefill_seconds`` and ``tokens_per_second``."""
    clock = TokenTimes()
    start = time.perf_counter()
    ids = generate(prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, streamer=clock, **options)
    seconds = time.perf_counter() - start
    arrivals = clock.times[1:]
    rate = (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])
    return ids, {"seconds": seconds, "prefill_seconds": arrivals[0] - start, "tokens_per_second": rate}


def measure(
    dtype: str,
    device: str,
    contexts: Sequence[int],
    new_tokens: int,
    compile: bool = False,
    modes: Sequence[str] = tuple(MODES),
    repetitions: int = REPETITIONS,
    tensor_parallel: int = 1,
) -> Iterator[dict[str, Any]]:
    """A row per context and mode, each beside Hugging Face's figures, which are always of one process."""
    LOG.info("loading the model")
    model, tokenizer = load_smollm2(getattr(torch, dtype), device)
    ids = tokenizer(python_reference(), return_tensors="pt").input_ids.to(device)
    LOG.info("converting")
    start = time.perf_counter()
    ranks = tensor_parallel if tensor_parallel > 1 else None
    options: dict[str, Any] = {"weight_group_size": 64, "self_check": False, "compile": compile}
    with contextlib.closing(quantspec.convert(model, tensor_parallel=ranks, **options)) as qs:
        seconds = time.perf_counter() - start
        for row in _rows(qs, model, ids, contexts, new_tokens, modes, repetitions):
            row |= {"dtype": dtype, "compiled": compile, "tensor_parallel": tensor_parallel, "convert_seconds": seconds}
            LOG.debug(row)
            yield row


def _rows(
    qs: quantspec.QuantSpecModel,
    model: Any,
    ids: torch.Tensor,
    contexts: Sequence[int],
    new_tokens: int,
    modes: Sequence[str],
    repetitions: int,
) -> Iterator[dict[str, Any]]:
    """Those figures of :func:`measure` that are measured on prompts out of ``ids (1, S)``."""
    for context in contexts:
        prompt = ids[:, PROMPT_START : PROMPT_START + context]
        LOG.info("%d tokens: warm-up", context)
        # Kernels, thread pools and (with --compile) graphs warm up on both sides.
        for generate in (qs.generate, model.generate):
            generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
        times: dict[str, list[dict[str, float]]] = {}
        texts, stats = {}, {}
        for _ in range(repetitions):
            for name in (_PLAIN, *modes):
                LOG.info("%d tokens: %s", context, name)
                if name == _PLAIN:
                    texts[name], figures = timed(model.generate, prompt, new_tokens)
                else:
                    texts[name], figures = timed(qs.generate, prompt, new_tokens, **MODES[name])
                    stats[name] = qs.last_stats
                LOG.debug(figures)
                times.setdefault(name, []).append(figures)
        plain = _medians(times[_PLAIN])
        for name in modes:
            ours, done = _medians(times[name]), stats[name]
            assert done is not None
            agree = (texts[_PLAIN] == texts[name])[0, context:].long().cumprod(0).sum().item()
            yield {
                "prompt_tokens": context,
                "new_tokens": new_tokens,
                "mode": name,
                "repetitions": repetitions,
                **ours,
                **{f"hugging_face_{key}": value for key, value in plain.items()},
                "decode_speedup": ours["tokens_per_second"] / plain["tokens_per_second"],
                "speedup": plain["seconds"] / ours["seconds"],
                "draft_acceptance_rate": done.draft_acceptance_rate if done.drafted else None,
                "drafted_per_cycle": done.drafted_per_cycle,
                "tokens_equal_to_hugging_face": agree,
            }


def _medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    """Run and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--modes", nargs="+", default=tuple(MODES), choices=tuple(MODES))
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
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
