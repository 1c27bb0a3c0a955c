"""Parity of SmolLM2-135M with its quantized pair on a long text, greedy continuations and tasks of lm-eval.

    python -m benchmarks.parity --device cuda

Needs lm-eval, wonderwords and nltk (``pip install '.[eval]'``) and no network. Writes ``parity.json``, ``parity.md``
and ``parity.png`` into a folder, anew after every task; the README's tables are made from the JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers

import quantspec
from quantspec.evals import load_smollm2
from quantspec.evals.parity import ParityOptions, parity

from .common import RESULTS

TASKS = ("reference_choice", "reference_cloze", "reference_cloze@6000", "reference_perplexity")


def main() -> int:
    """Run, write and print the report; status 1 where a threshold is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=int, default=20, help="documents per task")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="by default the offline ones without needles")
    parser.add_argument("--no-text", dest="text", action="store_false", help="no long text, no continuations")
    parser.add_argument("--context-tokens", type=int, default=4096, help="of the long text, before those scored")
    parser.add_argument("--scored-tokens", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=16, help="continued greedily")
    parser.add_argument("--prompt-tokens", type=int, default=4096, help="of each of them")
    parser.add_argument("--compile", action="store_true", help="through torch.compile, which takes minutes by itself")
    parser.add_argument("--out", type=Path, default=RESULTS / "parity")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    model, tokenizer = load_smollm2(getattr(torch, arguments.dtype), arguments.device)
    # The draft's figures are those of a GPU, wherever they are measured.
    options = {"weight_group_size": 64, "draft_recipe": "int4-cache", "compile": arguments.compile}
    qs = quantspec.convert(model, self_check=False, **options)
    names = ("limit", "batch_size", "context_tokens", "scored_tokens", "prompts", "prompt_tokens")
    amounts = ParityOptions(**{name: getattr(arguments, name) for name in names})
    report = parity(
        qs,
        tokenizer=tokenizer,
        tasks=arguments.tasks,
        text=None if arguments.text else "",
        options=amounts,
        output=arguments.out,
        name="SmolLM2-135M-Instruct",
    )
    print(report)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
