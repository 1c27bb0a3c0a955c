"""Serving: requests that come together in an engine, against the same ones one after another and without drafts.

    python -m benchmarks.serving --model llama-3.1-8b --contexts 4096 32768
    python -m benchmarks.serving --model smollm2 --device cpu --users 1 4 --contexts 500

Every user sends one request of a prompt of its own; in mode ``shared`` the prompts are alike but for their last 128
tokens. Rates are tokens of all users per second: ``tokens_per_second``
from the arrival to the last token, ``decode_tokens_per_second`` after the last first token. As in
``benchmarks.decode``, shapes with random weights accept synthetically.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import quantspec
from quantspec import Engine, QuantSpecModel
from quantspec.config import AUTO, DEFAULT_SPECULATIVE_TOKENS
from quantspec.evals import load_smollm2, python_reference
from quantspec.serving import Request

from .common import LOG, RESULTS, print_progress, write_results
from .decode import synthetic_acceptance
from .generate import PROMPT_START
from .gpu_times import free
from .random_models import SHAPES, random_model

# What is timed, and what its engine is; the batch has a place for every user.
_DRAFTS = {"num_speculative_tokens": DEFAULT_SPECULATIVE_TOKENS}
MODES: dict[str, dict[str, Any]] = {
    "one_after_another": {"max_sequences": 1, **_DRAFTS},
    "batch_without_drafts": {"num_speculative_tokens": 0},
    "batch": _DRAFTS,
    "batch_auto": {"num_speculative_tokens": AUTO},
    "shared": _DRAFTS,
}
# Tokens at the end of a prompt that is shared otherwise.
_OWN = 128


def requests(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Request]:
    """Greedy ones that end by their length."""
    return [Request(prompt, new_tokens, (), {"do_sample": False}) for prompt in prompts]


def timed(engine: Engine, asked: Sequence[Request]) -> dict[str, float]:
    """Run requests that come together; their rates, and the time to first tokens."""
    start, running = time.perf_counter(), {engine.add(request) for request in asked}
    first: dict[int, float] = {}
    tokens, late = 0, 0
    while running:
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            if output.error is not None:
                raise output.error
            late += len(output.token_ids) if len(first) == len(asked) else 0
            first.setdefault(output.id, now)
            tokens += len(output.token_ids)
            if output.finish_reason is not None:
                running.discard(output.id)
    done = engine.statistics()
    decoding = now - max(first.values())
    return {
        "seconds": now,
        "tokens_per_second": tokens / now,
        "decode_tokens_per_second": late / decoding if decoding else float("nan"),
        "first_token_seconds_median": statistics.median(first.values()),
        "first_token_seconds_most": max(first.values()),
        "mean_acceptance_length": 1 + done.accepted_tokens / max(1, done.cycles),
        "prompt_tokens": done.prompt_tokens,
        "cached_prompt_tokens": done.cached_prompt_tokens,
    }


def measure_users(
    qs: QuantSpecModel, prompts: Sequence[Sequence[int]], new_tokens: int, modes: Sequence[str] = tuple(MODES)
) -> dict[str, Any]:
    """One row: every mode at as many users as there are prompts."""
    row: dict[str, Any] = {"users": len(prompts), "context": len(prompts[0]), "new_tokens": new_tokens}
    for mode in modes:
        LOG.info("%d users, %d tokens: %s", row["users"], row["context"], mode)
        options = {"max_sequences": len(prompts), "max_length": row["context"] + new_tokens, **MODES[mode]}
        with contextlib.closing(Engine(qs, **options)) as engine:
            engine.warm_up()
            begun = engine.statistics()
            asked = [[*prompts[0][:-_OWN], *own[-_OWN:]] for own in prompts] if mode == "shared" else prompts
            row[mode] = timed(engine, requests(asked, new_tokens))
            for count in ("prompt_tokens", "cached_prompt_tokens"):
                row[mode][count] -= getattr(begun, count)
        free()
    return row


def measure(
    model_name: str,
    device: str,
    contexts: Sequence[int],
    users: Sequence[int],
    new_tokens: Sequence[int],
    rate: float,
    modes: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """One row per context and number of users."""
    most = max(users)
    if model_name == "smollm2":
        model, tokenizer = load_smollm2(torch.bfloat16 if device == "cuda" else torch.float32, device)
        text = tokenizer(python_reference(), return_tensors="pt").input_ids[0, PROMPT_START:].tolist()
    else:
        model = random_model(model_name, None)
        text = torch.randint(0, model.config.vocab_size, (max(contexts) + most * 1000,)).tolist()
    group = 64 if model_name == "smollm2" else 128
    # As in benchmarks.decode, the head of a small model is a large part of it.
    qs = quantspec.convert(model, weight_group_size=group, quantize_lm_head=group == 128, self_check=False)
    if model_name != "smollm2":
        qs.session.rule = synthetic_acceptance(torch.tensor(rate, device=device))
    for context in contexts:
        # Their beginnings differ, so that nothing is shared.
        prompts = [text[1000 * user :][:context] for user in range(most)]
        for count, new in itertools.product(users, new_tokens):
            row = measure_users(qs, prompts[:count], new, modes)
            row |= {"model": model_name, "synthetic_acceptance_rate": None if model_name == "smollm2" else rate}
            LOG.debug(row)
            yield row


def main() -> None:
    """Run and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[*SHAPES, "smollm2"], required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--users", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--modes", choices=MODES, nargs="+", default=[*MODES])
    parser.add_argument("--rate", type=float, default=0.93, help="synthetic acceptance rate, of random weights")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print_progress()
    rows = []
    asked = (given.contexts, given.users, given.new_tokens, given.rate, given.modes)
    for row in measure(given.model, given.device, *asked):
        rows.append(row)
        write_results(given.out or RESULTS / f"serving-{given.model}.json", given.device, rows)


if __name__ == "__main__":
    main()
