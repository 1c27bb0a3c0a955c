"""The README.md of a saved pair: what it is, how it was made, what was measured, with which versions."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

from quantspec.config import QuantSpecConfig
from quantspec.engine.stats import GenerationStats
from quantspec.pair import Pair

from .folder import Description

CARD_FILE = "README.md"
# Tells a card of ours, which the next save replaces, from one that somebody wrote.
_MARK = "<!-- written by quantspec: replaced by the next save, unless this line is removed -->"

_NO_ACCEPTANCE = (
    "Acceptance was not measured: nothing was drafted before saving. `quantspec generate FOLDER PROMPT --stats` tells "
    "that of a text."
)


def is_of_somebody(card: Path) -> bool:
    """Whether there is a card that somebody wrote or took over."""
    return card.is_file() and _MARK not in card.read_text(encoding="utf-8", errors="replace")


def model_card(
    pair: Pair, description: Description, name: str, has_tokenizer: bool, stats: GenerationStats | None, parity: Any
) -> str:
    """The card, in Markdown.

    Args:
        pair: that was saved.
        description: of the folder.
        name: of the folder.
        has_tokenizer: whether a tokenizer is saved with it.
        stats: of the latest call; None if nothing was generated.
        parity: a report of ``quantspec.evals``, whose text is Markdown; None if none was made.
    """
    original = getattr(pair.model.config, "_name_or_path", "") or ""
    of_hub = original.count("/") == 1 and not Path(original).exists()
    head = ["library_name: quantspec", "pipeline_tag: text-generation", "tags: [quantspec, speculative-decoding]"]
    if of_hub:
        head.append(f"base_model: {original}")
    kind = f"{description.model_class} in {description.dtype}"
    tokenizer = "\ntokenizer = AutoTokenizer.from_pretrained(FOLDER)" if has_tokenizer else ""
    versions = ", ".join(f"{package} {version}" for package, version in description.versions.items())
    loading = "import quantspec\n" + ("from transformers import AutoTokenizer\n" if has_tokenizer else "")
    return f"""\
---
{chr(10).join(head)}
---
{_MARK}

# {name}

{f"[{original}](https://huggingface.co/{original})" if of_hub else "A decoder"} ({kind}) with a draft of itself, for
quantized self-speculative decoding with quantspec. The text is the model's own: the draft proposes tokens, the model
checks them.

```python
{loading}
qs = quantspec.from_pretrained(FOLDER, device="cuda"){tokenizer}
```

`AutoModelForCausalLM.from_pretrained(FOLDER)` loads the original model.

## How it was made

{_options(description)}

{_linears(description)}

## Measured

{_acceptance(pair, stats)}

{_parity(parity)}

## Versions

{versions}; format {description.format_version}
"""


def _options(description: Description) -> str:
    rows = [
        f"| `{option.name}` | {getattr(description.options, option.name)} |"
        for option in fields(QuantSpecConfig)
        if option.name != "adapted_group_sizes"
    ]
    return "\n".join(["| option | value |", "| --- | --- |", *rows])


def _linears(description: Description) -> str:
    kinds = Counter(
        "full precision" + (f" ({report.note})" if report.note else "")
        if report.group_size is None
        else f"INT4 in groups of {report.group_size}"
        for report in description.linears
    )
    return "The draft's weights: " + "; ".join(f"{count} in {kind}" for kind, count in kinds.items()) + "."


def _acceptance(pair: Pair, stats: GenerationStats | None) -> str:
    lines = []
    if pair.tuned is not None:
        lines.append(f"The draft was tuned; on held-out text of the model's own, before and after: {pair.tuned}.")
    if stats is not None and stats.drafted:
        lines.append(
            f"Acceptance: of {stats.drafted} drafts {stats.draft_acceptance_rate:.1%} were accepted in the last call "
            f"before saving, which wrote {stats.generated_tokens} tokens after {stats.prompt_tokens}."
        )
    return "\n\n".join(lines) or _NO_ACCEPTANCE


def _parity(parity: Any) -> str:
    if parity is None:
        return "Parity was not measured: `quantspec parity FOLDER` compares the pair with the original model."
    # Its headings become those of a part.
    return "\n".join(f"##{line}" if line.startswith("#") else line for line in str(parity).strip().splitlines())
