"""Write ``supported-models.md`` next to this file from the results of ``benchmarks/census.py``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "census.json"
PAGE = ROOT / "docs" / "supported-models.md"

_COLUMNS = ("model type", "prefill", "decoding", "attention layers", "head dims (K/V)", "besides")
_ALWAYS = "language-model head, quantize_lm_head=False"


def newest(census: dict[str, Any]) -> str:
    """The newest version of transformers that was examined."""
    return max(census, key=lambda version: tuple(map(int, version.split("."))))


def render(census: dict[str, Any]) -> str:
    """The page, from what was found by version of transformers and type."""
    version = newest(census)
    types = census[version]
    counts = {name: Counter(found["verdict"] for found in of.values()) for name, of in census.items()}
    verdicts = ("right", "refused", "wrong", "not built")
    rows = [[name, count.total(), *(count[verdict] for verdict in verdicts)] for name, count in sorted(counts.items())]
    right = [_right(name, found) for name, found in types.items() if found["verdict"] == "right"]
    head = f"""# Supported models

There is no code per model: any decoder whose attention goes through transformers' attention interface, or is written
out as `softmax(scale * q k + slope * distance) v`, is captured, with what states transformers' cache holds besides keys
and values, and what cannot be decoded from them is refused by name.

Of **every** causal type that transformers registers, `python -m benchmarks.census` makes a tiny random model (float32,
on a CPU) with each kind of layer of the type's default config, converts it and compares: greedy text of a prompt and of
a padded batch with the model's own forward without a cache, logits prefilled and decoded, long text with and without
drafts, a conversation on a kept cache, a saved pair. *Right* is what passes all of it, up to choices between nearly
equal logits; *not built* is what transformers does not make or run by itself from such a config.

{_table(["transformers", "types", *verdicts], rows)}
With transformers {version}, rows by the commit that was run: {_commits(types)}.

## Converted

With transformers {version}. *Prefill* and *decoding* are the largest differences of the target's logits from the
model's own (whose largest logit is about 4) after a prompt and while decoding one by one and in blocks, nothing being
quantized. *Besides* are windows and soft caps of the layers, attention sinks, states, experts, and what the draft keeps
in full precision beside the head.

{_table(_COLUMNS, right)}"""
    parts = [head]
    titles = {
        "refused": "`convert` raises `UnsupportedModelError` with this message:",
        "wrong": "These convert and fail a comparison, or fail with another error:",
        "not built": "These were not tried:",
    }
    for verdict, text in titles.items():
        found = [[f"`{name}`", _cell(of["reason"])] for name, of in types.items() if of["verdict"] == verdict]
        if found:
            parts.append(f"\n## {verdict.capitalize()}\n\n{text}\n\n{_table(['model type', 'message'], found)}")
    return "".join(parts)


def _commits(types: dict[str, Any]) -> str:
    """How many rows each commit made; the earliest runs did not record theirs."""
    counts = Counter(found.get("commit", "")[:7] for found in types.values())
    return ", ".join(f"{count} {commit or 'of earlier ones'}" for commit, count in sorted(counts.items(), reverse=True))


def _table(head: Any, rows: list[Any]) -> str:
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in (head, ["---"] * len(head), *rows))


def _cell(text: str) -> str:
    return text.replace("|", " ").replace("<", "&lt;")


def _each(values: list[Any]) -> str:
    """One value if all layers share it, otherwise those that there are, in order; "none" for nothing."""
    return ", ".join(dict.fromkeys(str(value) if value else "none" for value in values))


def _right(name: str, found: dict[str, Any]) -> list[str]:
    layers = found["layers"]
    return [
        f"`{name}`",
        f"{found['prefill']:.0e}",
        f"{found['decoding']:.0e}",
        str(len(layers)),
        _each(["/".join(map(str, layer["dims"])) for layer in layers]),
        _cell("; ".join(_besides(found))),
    ]


def _besides(found: dict[str, Any]) -> Iterator[str]:
    """What the layers have beyond attention to all of the text, and what the draft keeps in full precision."""
    layers = found["layers"]
    reach = [layer["window"] or (f"chunks of {layer['chunk']}" if layer["chunk"] else 0) for layer in layers]
    if any(reach):
        yield f"window: {_each(reach)}"
    if any(layer["softcap"] for layer in layers):
        yield f"soft cap: {_each([layer['softcap'] for layer in layers])}"
    if any(layer["sinks"] for layer in layers):
        yield "sinks"
    if found["states"]:
        yield f"states: {found['states']}"
    if found["experts"]:
        yield f"experts: {found['experts']}, INT4"
    if notes := [note for note in found["full_precision"] if note != _ALWAYS]:
        yield f"full precision in the draft: {'; '.join(notes)}"


if __name__ == "__main__":
    PAGE.write_text(render(json.loads(RESULTS.read_text())))
