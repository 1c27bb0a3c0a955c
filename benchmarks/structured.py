"""JSON that a grammar constrains, with and without drafts, by the library that follows it: SmolLM2-135M, greedy.

    python -m benchmarks.structured

``json_schema=`` is llguidance; xgrammar and outlines come as logits processors of a caller's. All are asked on the
host, position by position. The second call counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import quantspec
from quantspec import QuantSpecModel
from quantspec.evals import load_smollm2

from .common import LOG, RESULTS, print_progress, write_results

GAMMAS = (0, 4)
NEW_TOKENS = 160
QUESTION = "Describe the programming language Python: its name, its year, who made it, and ten things it is used for."
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "year": {"type": "integer", "minimum": 1900, "maximum": 2100},
        "author": {"type": "string", "maxLength": 40},
        "uses": {"type": "array", "items": {"type": "string", "maxLength": 30}, "minItems": 5, "maxItems": 10},
    },
    "required": ["name", "year", "author", "uses"],
    "additionalProperties": False,
}
Options = dict[str, Any]
"""Of one ``generate`` call."""


def llguidance(pair: QuantSpecModel, tokenizer: Any, schema: dict[str, Any]) -> Callable[[], Options]:
    """What gives the options of a call whose text follows ``schema``, without white space that it may do without."""
    compact = {**schema, "x-guidance": {"whitespace_flexible": False}}
    return lambda: {"json_schema": compact, "tokenizer": tokenizer}


def xgrammar(pair: QuantSpecModel, tokenizer: Any, schema: dict[str, Any]) -> Callable[[], Options]:
    """As :func:`llguidance`."""
    import xgrammar as library
    from xgrammar.contrib.hf import LogitsProcessor

    vocabulary = library.TokenizerInfo.from_huggingface(tokenizer, vocab_size=pair.vocab_size)
    grammar = library.GrammarCompiler(vocabulary).compile_json_schema(json.dumps(schema), any_whitespace=False)
    return lambda: {"logits_processor": [LogitsProcessor(grammar)]}


def outlines(pair: QuantSpecModel, tokenizer: Any, schema: dict[str, Any]) -> Callable[[], Options]:
    """As :func:`llguidance`."""
    import outlines as library
    from outlines.backends import get_json_schema_logits_processor

    model = library.from_transformers(pair.model, tokenizer)
    processor = get_json_schema_logits_processor("outlines_core", model, json.dumps(schema), whitespace_pattern="")

    def options() -> Options:
        processor.reset()
        return {"logits_processor": [processor]}

    return options


LIBRARIES = {library.__name__: library for library in (llguidance, xgrammar, outlines)}


def measure(
    pair: QuantSpecModel, tokenizer: Any, new_tokens: int, libraries: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A row per library and number of drafts; ``valid`` is :func:`follows_schema` of the text."""
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = inputs.to(pair.device)
    for name in libraries:
        options = LIBRARIES[name](pair, tokenizer, SCHEMA)
        texts = []
        for gamma in GAMMAS:
            LOG.info("%s, %d drafts", name, gamma)
            for _ in range(2):
                ids = pair.generate(
                    **inputs, **options(), max_new_tokens=new_tokens, do_sample=False, num_speculative_tokens=gamma
                )
            stats = pair.last_stats
            assert stats is not None
            texts.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
            row = {
                "library": name,
                "num_speculative_tokens": gamma,
                "tokens_per_second": stats.tokens_per_second,
                "mean_acceptance_length": stats.mean_acceptance_length,
                "generated_tokens": stats.generated_tokens,
                "valid": follows_schema(texts[-1]),
                "same_as_without_drafts": texts[-1] == texts[0],
                "text": texts[-1],
            }
            LOG.debug(row)
            yield row


def follows_schema(text: str) -> bool:
    """Whether ``text`` is JSON with the keys of :data:`SCHEMA`, in their order, and values of their types."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return False
    kinds = {"name": str, "year": int, "author": str, "uses": list}
    return list(value) == list(kinds) and all(isinstance(value[name], kind) for name, kind in kinds.items())


def main() -> None:
    """Run and write JSON."""
    installed = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument(
        "--libraries", nargs="+", default=installed, choices=installed, help="what is installed of them"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "structured.json")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print_progress()
    model, tokenizer = load_smollm2(getattr(torch, arguments.dtype), arguments.device)
    pair = quantspec.convert(model, weight_group_size=64, quantize_lm_head=True, self_check=False)
    rows = [
        {"dtype": arguments.dtype, **row} for row in measure(pair, tokenizer, arguments.new_tokens, arguments.libraries)
    ]
    write_results(arguments.out, arguments.device, rows)


if __name__ == "__main__":
    main()
