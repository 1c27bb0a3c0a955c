"""Decoding on a GPU: ours against Hugging Face ``generate`` and against a strong baseline, on the same weights.

    python -m benchmarks.decode --model llama-3.1-8b
    python -m benchmarks.decode --model llama-3.1-70b --tensor-parallel 4

The strong baseline decodes one token at a time with the same captured graph, the model's own weights and a dense KV
cache in the model's dtype, through torch.compile, a CUDA graph and FlashAttention.

Shapes with random weights accept nothing by themselves, so there acceptance is *synthetic*: every draft token is
accepted with a given probability, drawn on the device, and everything else is real. SmolLM2 generates with its real
weights and its real acceptance.

With ``--tensor-parallel`` each of several GPUs makes the random weights of its own part, so that no GPU, host or disk
needs room for the whole.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import LogitsProcessorList

import quantspec
from quantspec import QuantSpecModel
from quantspec.cache import HierarchicalCache
from quantspec.config import DraftAttention
from quantspec.engine.cycle import CycleResult
from quantspec.engine.cycle_graph import CycleReplay
from quantspec.engine.odds import cycle_tokens
from quantspec.engine.plan import Plan
from quantspec.engine.session import Session
from quantspec.evals import load_smollm2, python_reference
from quantspec.passes import Role
from quantspec.ranks import Seat

from .common import LOG, RESULTS, print_progress, write_results
from .generate import PROMPT_START, timed
from .gpu_times import free, kernel_table, kernel_times, milliseconds
from .random_models import SHAPES, check_fits, random_model, shape_config, split_random_pair
from .strong_baseline import Baseline

RATES = (0.85, 0.90, 0.93, 0.95)
# Tokens a cache has room for beyond the context, for the cycles that are timed.
CYCLE_TOKENS = 1024
# By which ranks keep the baseline that is made of their pair.
_BASELINE = "baseline"


@dataclass(frozen=True)
class Settings:
    """What is measured; :func:`published` has that of the tables.

    Attributes:
        model: a name of :data:`SHAPES`, or "smollm2".
        contexts: tokens of the prompts.
        batches: sequences that decode together, of each context; ``generate`` runs with one.
        gammas: drafted tokens per cycle; ``generate`` uses the first.
        generate_at: contexts at which ``generate`` runs.
        rates: synthetic acceptance rates.
        new_tokens: of ``generate``.
        layers: fewer than the shape has; None for all.
        baseline: measure the strong baseline and Hugging Face too.
        target_only: run ``generate`` without drafts too.
        quantize_lm_head, draft_attention: as in ``convert``.
        tensor_parallel: GPUs that the pair and the strong baseline are split over; Hugging Face is not measured then.
    """

    model: str
    contexts: Sequence[int]
    gammas: Sequence[int]
    generate_at: Sequence[int]
    batches: Sequence[int] = (1,)
    rates: Sequence[float] = RATES
    new_tokens: int = 64
    layers: int | None = None
    baseline: bool = True
    target_only: bool = False
    quantize_lm_head: bool = True
    draft_attention: str = "full"
    tensor_parallel: int = 1


def published(model: str) -> Settings:
    """The settings of a shape's published table; no table shows SmolLM2, nor yet four GPUs."""
    settings = {
        "llama-3.1-8b": Settings("llama-3.1-8b", (4096, 32768, 131072), gammas=(3, 4, 5), generate_at=(32768,)),
        "llama-2-7b": Settings("llama-2-7b", (4096, 32768, 65536), gammas=(3, 4, 5, 6), generate_at=(4096,)),
        "llama-3.1-70b": Settings(
            "llama-3.1-70b", (32768, 131072), gammas=(4, 5, 6), generate_at=(), tensor_parallel=4
        ),
        # The head is a large part of a small model, and acceptance is its own.
        "smollm2": Settings("smollm2", (4096,), gammas=(4, 6), generate_at=(4096,), quantize_lm_head=False),
    }
    return settings[model]


def filled_cache(qs: QuantSpecModel, context: int, slack: int, batch: int = 1) -> HierarchicalCache:
    """A cache of sequences with ``context`` tokens of random codes each; times do not depend on what they are."""
    cache = qs.pair.new_cache(batch, 15)
    cache.reserve(context + slack)
    for layer in cache.layers:
        for plane in (layer.k_upper, layer.k_lower, layer.v_upper, layer.v_lower):
            plane.random_(0, 256)
        for scale in (layer.k_scale, layer.v_scale):
            scale.fill_(0.05)
        for zero in (layer.k_zero, layer.v_zero):
            zero.fill_(-0.4)
        for recent in (layer.k_recent, layer.v_recent):
            recent.normal_()
    rewind(cache, context)
    return cache


def rewind(cache: HierarchicalCache, context: int) -> None:
    """Set the cache's lengths to those after prompts of ``context`` tokens."""
    cache.reset()
    cache.advance_prefill(torch.full_like(cache.length, context))


def step(qs: QuantSpecModel, cache: HierarchicalCache, role: Role, tokens: int) -> Callable[[], Any]:
    """One forward pass of ``tokens`` tokens of each sequence."""
    ids = torch.ones(cache.batch_size, tokens, dtype=torch.long, device=qs.device)
    return lambda: qs.pair.read(role, ids, cache)


def synthetic_acceptance(rate: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A rule of acceptance that accepts each token with probability ``rate``, a tensor on the device."""

    @torch._dynamo.disable
    def accept(draft_tokens: Tensor, target_scores: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.rand(draft_tokens.shape, device=draft_tokens.device) < rate
        accepted = kept.long().cumprod(1).sum(1)
        return accepted, target_scores.argmax(-1).gather(1, accepted[:, None]).squeeze(1)

    return accept


def synthetic_rows(
    qs: QuantSpecModel, cache: HierarchicalCache, context: int, gamma: int, rates: Sequence[float], cycles: int = 40
) -> Iterator[dict[str, Any]]:
    """Cycles as ``generate`` runs them, with drawn acceptance; one row per rate."""
    drawn = torch.zeros((), device=qs.device)
    rewind(cache, context)
    rule = synthetic_acceptance(drawn)
    replay = CycleReplay(qs.pair, cache, Plan(gamma), LogitsProcessorList(), do_sample=False, rule=rule)
    replay.cycle.running.fill_(True)
    for rate in rates:
        drawn.fill_(rate)
        rewind(cache, context)
        _read(qs, replay())
        tokens, on_gpu, start = 0, [], time.perf_counter()
        for _ in range(cycles):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            packed = replay()
            last.record()
            result = _read(qs, packed)
            if result.flush_due:
                replay.flush()
            tokens += sum(result.accepted) + cache.batch_size
            on_gpu.append((first, last))
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
        yield {
            "num_speculative_tokens": gamma,
            "synthetic_acceptance_rate": rate,
            "mean_acceptance_length": tokens / cycles / cache.batch_size,
            "expected_acceptance_length": cycle_tokens(rate, gamma),
            "cycle_ms": 1000 * wall / cycles,
            "cycle_gpu_ms": sum(first.elapsed_time(last) for first, last in on_gpu) / cycles,
        }


def _read(qs: QuantSpecModel, packed: Tensor) -> CycleResult:
    # As generate does: what waits for a rank that has ended would never end.
    qs.pair.wait_with_ranks()
    return CycleResult.read(packed)


def measure_context(
    qs: QuantSpecModel, baseline: Baseline | None, prompt: Tensor, settings: Settings, batch: int = 1
) -> dict[str, Any]:
    """Everything of ``batch`` sequences at one context; ``generate`` begins with the ``prompt (1, context)``.

    Tokens per second are those of all sequences.
    """
    context = prompt.shape[1]
    row: dict[str, Any] = {"context": context, "batch": batch}
    kernels = {}
    if baseline is not None:
        LOG.info("%d x %d tokens: baseline", batch, context)
        token = baseline.token(context, batch)
        row["baseline_token_ms"] = milliseconds(token)
        kernels["baseline token"] = kernel_times(token)
        del token
        LOG.debug(row)
    free()
    torch.cuda.reset_peak_memory_stats()
    LOG.info("%d x %d tokens: draft step and verification", batch, context)
    cache = filled_cache(qs, context, CYCLE_TOKENS, batch)
    draft = step(qs, cache, Role.DRAFT, 1)
    verifications = {gamma + 1: step(qs, cache, Role.TARGET, gamma + 1) for gamma in settings.gammas}
    with torch.no_grad():
        # A sparse draft reads what a verification has chosen.
        next(iter(verifications.values()))()
        cache.choose_pages()
    row["draft_step_ms"] = milliseconds(draft)
    row["verify_ms"] = {tokens: milliseconds(verification) for tokens, verification in verifications.items()}
    kernels["draft step"] = kernel_times(draft)
    tokens, verification = max(verifications.items())
    kernels[f"verification of {tokens}"] = kernel_times(verification)
    del draft, verifications, verification
    LOG.debug(row)
    LOG.debug(kernel_table(kernels))
    row["kernels"] = kernels
    row["synthetic"] = []
    for gamma in settings.gammas if settings.rates else ():
        LOG.info("%d x %d tokens: cycles of %d drafts, synthetic acceptance", batch, context, gamma)
        for result in synthetic_rows(qs, cache, context, gamma, settings.rates):
            # Few cycles make the drawn number of tokens noisy; its expectation is known.
            result["tokens_per_second"] = 1000 * batch * result["expected_acceptance_length"] / result["cycle_ms"]
            if baseline is not None:
                result["speedup"] = result["tokens_per_second"] * row["baseline_token_ms"] / 1000 / batch
            LOG.debug(result)
            row["synthetic"].append(result)
    row["decode_peak_bytes"] = torch.cuda.max_memory_allocated()
    row["cache_bytes"] = cache.bytes_by_part()
    del cache
    free()
    if batch == 1 and context in settings.generate_at:
        # Of a part there is no model to compare with.
        compares = baseline is not None and settings.tensor_parallel == 1
        row |= measure_generate(qs, prompt, settings.gammas[0], settings.new_tokens, settings.target_only, compares)
    return row


def measure_generate(
    qs: QuantSpecModel, prompt: Tensor, gamma: int, new_tokens: int, target_only: bool, compares: bool
) -> dict[str, Any]:
    """``generate`` with real acceptance, with the target alone, and Hugging Face's, each after a warm-up."""
    row: dict[str, Any] = {}
    torch.cuda.reset_peak_memory_stats()
    texts = {}
    calls: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "generate": (qs.generate, {"num_speculative_tokens": gamma}),
        "hugging_face": (qs.model.generate, {}),
    }
    if not compares:
        # Where the baseline's cache does not fit, Hugging Face's would not either.
        del calls["hugging_face"]
    if target_only:
        calls = {"generate_target_only": (qs.generate, {"num_speculative_tokens": 0}), **calls}
    for name, (generate, options) in calls.items():
        LOG.info("%d tokens: %s", prompt.shape[1], name)
        if name == "hugging_face":
            qs.reset()
            free()
        timed(generate, prompt, new_tokens, **options)
        texts[name], row[name] = timed(generate, prompt, new_tokens, **options)
        if name == "generate":
            assert qs.last_stats is not None
            row["generate_peak_bytes"] = torch.cuda.max_memory_allocated()
            row["statistics"] = qs.last_stats.as_dict()
    new = {name: ids[0, prompt.shape[1] :] for name, ids in texts.items()}
    for name in new.keys() - {"generate"}:
        row[f"tokens_equal_to_{name}"] = int((new["generate"] == new[name]).long().cumprod(0).sum())
    LOG.debug(row)
    free()
    return row


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """One row per batch and context.

    Raises:
        ValueError: the GPUs are too few or too small.
    """
    LOG.info("loading the model, and converting it")
    real, num_ranks = settings.model == "smollm2", settings.tensor_parallel
    options: dict[str, Any] = {
        "weight_group_size": 64 if real else 128,
        "quantize_lm_head": settings.quantize_lm_head,
        "draft_attention": settings.draft_attention,
        "self_check": False,
    }
    if real:
        model, tokenizer = load_smollm2(torch.bfloat16, "cuda")
        text = tokenizer(python_reference(), return_tensors="pt").input_ids[:, PROMPT_START:].cuda()
        make = functools.partial(quantspec.convert, model, tensor_parallel=num_ranks if num_ranks > 1 else None)
        del model
    else:
        config = shape_config(settings.model, settings.layers)
        text = torch.randint(0, config.vocab_size, (1, max(settings.contexts)), device="cuda")
        check_fits(settings.model, settings.layers, num_ranks)
        if num_ranks > 1:
            make = functools.partial(split_random_pair, config, num_ranks, "cuda")
        else:
            make = functools.partial(quantspec.convert, random_model(settings.model, settings.layers))
    start = time.perf_counter()
    with contextlib.closing(make(**options)) as qs:
        # The parts alone are measured.
        del make
        seconds = time.perf_counter() - start
        LOG.debug("%s\nconverted in %.1f s", qs, seconds)
        options |= {"model": settings.model, "weights": "real" if real else "random", "convert_seconds": seconds}
        options |= {"layers": qs.model.config.num_hidden_layers, "tensor_parallel": num_ranks}
        options |= {"weight_bytes": qs.weight_bytes()}
        baseline = Baseline(qs) if settings.baseline and qs.split is None else None
        free()
        for batch, context in itertools.product(settings.batches, settings.contexts):
            prompt = text[:, :context]
            if qs.split is None:
                row = measure_context(qs, baseline, prompt, settings, batch)
            else:
                told = (prompt.cpu(), settings, batch)
                row = qs.split.run(measure_part, qs.session, *told, others=(qs.split.key, *told))
            yield row | options


def measure_part(seat: Seat, session: int | Session, prompt: Tensor, settings: Settings, batch: int) -> dict[str, Any]:
    """:func:`measure_context` on every rank, whose ``session``, or the key that it keeps it by, has its part."""
    own: Session = seat.kept[session] if isinstance(session, int) else session
    qs = QuantSpecModel(own.pair)
    if settings.baseline and _BASELINE not in seat.kept:
        seat.kept[_BASELINE] = Baseline(qs)
    # All ranks draw the same acceptance.
    torch.manual_seed(0)
    row = measure_context(qs, seat.kept.get(_BASELINE), prompt.to(seat.device), settings, batch)
    peaks: list[int | None] = [None] * seat.place.world
    dist.all_gather_object(peaks, row["decode_peak_bytes"])
    return row | {"decode_peak_bytes_of_ranks": peaks}


def main() -> None:
    """Run and write JSON."""
    # What is not given stays as published.
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS, epilog="Default: as published."
    )
    parser.add_argument("--model", choices=[*SHAPES, "smollm2"], required=True)
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--batches", type=int, nargs="+", help="sequences that decode together")
    parser.add_argument("--gammas", type=int, nargs="+")
    parser.add_argument("--rates", type=float, nargs="*")
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, to try the script")
    parser.add_argument("--no-baseline", dest="baseline", action="store_false", help="where its cache does not fit")
    parser.add_argument("--generate-at", type=int, nargs="*", help="contexts to generate from")
    parser.add_argument("--target-only", action="store_true", help="generate with 0 drafts too")
    parser.add_argument("--draft-attention", choices=[*map(str, DraftAttention)])
    parser.add_argument("--quantize-lm-head", action=argparse.BooleanOptionalAction)
    parser.add_argument("--tensor-parallel", type=int, help="GPUs to split the model and the baseline over")
    parser.add_argument("--out", type=Path)
    arguments = vars(parser.parse_args())
    settings = published(arguments.pop("model"))
    out = arguments.pop("out", RESULTS / f"decode-{settings.model}.json")
    transformers.logging.set_verbosity_error()
    print_progress()
    rows = []
    for row in measure(replace(settings, **arguments)):
        rows.append(row)
        write_results(out, "cuda", rows)


if __name__ == "__main__":
    # What is sent to other processes is found there by the name of this module, which is not that of a script.
    assert __spec__ is not None
    importlib.import_module(__spec__.name).main()
