"""Write ``supported-models.md`` next to this file: every architecture of ``tests/tiny_models.py`` tried, with figures.

Run it as ``python docs/supported_models.py``.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import transformers

import quantspec
from quantspec import QuantSpecModel, UnsupportedModelError
from quantspec.self_check import incremental_logits

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from tiny_models import ARCHITECTURES, HYBRIDS, tiny_model  # noqa: E402
from unsupported_models import UNSUPPORTED, Refused  # noqa: E402

# Shorter than 2G together, so that nothing is quantized, and longer than the sliding windows of the tiny models.
GROUP, PROMPT, STEPS = 32, 40, (1, 1, 1, 4, 2)

COLUMNS = ("model type", "prefill", "decoding", "attention layers", "head dims (K/V)", "window", "soft cap", "sinks")
COLUMNS += ("experts", "full precision in the draft")
HEADER = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"

INTRODUCTION = f"""# Supported models

Made on a CPU by `python docs/supported_models.py` with torch {torch.__version__.split("+")[0]} and transformers \
{transformers.__version__}. There is no code per model: any decoder whose attention goes through transformers'
attention interface is captured, with what states transformers' cache holds besides keys and values, and what cannot
be decoded from them is refused by name. Each row is a
tiny random model (two layers, float32) of that type. *Prefill* and *decoding* are the largest differences of the
target's logits from the model's own (whose largest logit is about 4) after a prompt of {PROMPT} tokens and in \
{sum(STEPS)} tokens
decoded one by one and in blocks, while nothing is quantized.

## Converted

{HEADER}
"""

REFUSED = """
## Refused

`convert` raises `UnsupportedModelError` with this message:

| model | message |
| --- | --- |
"""


def differences(qs: QuantSpecModel) -> tuple[float, float]:
    """Largest logit differences from the model's own forward: of the prompt's last token, and while decoding."""
    ids = torch.randint(3, 96, (1, PROMPT + sum(STEPS)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = qs.model(input_ids=ids, use_cache=False).logits[:, PROMPT - 1 :]
        difference = (incremental_logits(qs, ids, PROMPT, STEPS) - expected).abs()
    return difference[:, 0].max().item(), difference[:, 1:].max().item()


def each(values: list) -> str:
    """One value if all layers share it, otherwise all of them; '-' for nothing."""
    texts = [str(value) if value else "-" for value in values]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


def converted_row(architecture: str) -> str:
    """The table row of an architecture that converts."""
    qs = quantspec.convert(tiny_model(architecture), kv_group_size=GROUP, weight_group_size=32)
    prefill, decoding = differences(qs)
    layers = qs.layers
    names = {report.name for report in qs.linears}
    experts = {p.shape[0] for name, p in qs.model.named_parameters() if p.dim() == 3 and name in names}
    notes = {report.note for report in qs.linears if report.group_size is None}
    cells = [
        f"`{architecture}`",
        f"{prefill:.0e}",
        f"{decoding:.0e}",
        str(len(layers)),
        each([f"{layer.key_dim}/{layer.value_dim}" for layer in layers]),
        each([layer.window or (f"chunks of {layer.chunk}" if layer.chunk else 0) for layer in layers]),
        each([layer.softcap for layer in layers]),
        "yes" if any(layer.has_sinks for layer in layers) else "-",
        f"{experts.pop()}, INT4" if experts else "-",
        ", ".join(sorted(notes)) or "-",
    ]
    return f"| {' | '.join(cells)} |"


def refused_row(name: str, refused: Refused) -> str:
    """The table row of a model that is refused."""
    try:
        quantspec.convert(refused.build())
    except UnsupportedModelError as error:
        label = f"`{name}`" if refused.architecture else name
        return f"| {label} | {str(error).replace('|', ' ')} |"
    raise RuntimeError(f"{name} was converted")


def main() -> None:
    """Try everything and write the page."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    for architecture in (*ARCHITECTURES, *HYBRIDS):
        rows.append(converted_row(architecture))
        print(rows[-1], flush=True)
    refused = [refused_row(name, model) for name, model in UNSUPPORTED.items()]
    page = INTRODUCTION + "\n".join(rows) + "\n" + REFUSED + "\n".join(refused) + "\n"
    (HERE / "supported-models.md").write_text(page)


if __name__ == "__main__":
    main()
