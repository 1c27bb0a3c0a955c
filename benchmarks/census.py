"""Every causal model type that transformers registers, converted and compared with the model itself, on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.census

Each type is a tiny random model (:mod:`benchmarks.census_models`) in a process of its own. What is found goes into
``results/census.json`` type by type: a run that was cut off goes on where it was. ``docs/supported_models.py`` makes
the page of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import quantspec
from quantspec import QuantSpecModel, UnsupportedModelError
from quantspec.errors import SavedModelError
from quantspec.evals.environment import current_commit
from quantspec.self_check import incremental_logits

from .census_models import VOCABULARY, tiny_model
from .common import RESULTS

OUT = RESULTS / "census.json"
GROUP = 16
# Less than 2G together, so that nothing is quantized, and more than the windows of the tiny models.
PROMPT, STEPS = 21, (1, 1, 1, 4, 2)
_NEW_TOKENS, _LONG = 9, 48
# Of logits whose largest is about 4.
_TOLERANCE = 1e-3
# Of logits' standard deviation.
_NEAR_TIE = 1e-2
_LOG = logging.getLogger("quantspec.benchmarks.census")
# filelock refuses a fork while another thread's is under way.
_FORK = threading.Lock()


def random_ids(count: int, seed: int) -> Tensor:
    """``(1, count)`` tokens, none of them special."""
    return torch.randint(3, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: Tensor, count: int) -> Tensor:
    """The text ``(1, S + count)`` that the model's own full forward chooses, without any cache."""
    for _ in range(count):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    return ids


def differences(qs: QuantSpecModel) -> dict[str, float]:
    """Largest logit differences from the model's own forward: of the prompt's last token, and while decoding."""
    ids = random_ids(PROMPT + sum(STEPS), 0)
    with torch.no_grad():
        expected = qs.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        off = (incremental_logits(qs, ids, PROMPT, STEPS) - expected[:, PROMPT - 1 :]).abs()
    return {"prefill": off[:, 0].max().item(), "decoding": off[:, 1:].max().item()}


def _text(qs: QuantSpecModel, ids: Tensor, count: int, mask: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    return qs.generate(ids, mask, max_new_tokens=count, do_sample=False, **options)


def _same(qs: QuantSpecModel, text: Tensor, expected: Tensor) -> bool:
    """Whether two texts of one prompt are the same, up to a choice between tokens that are nearly as likely."""
    differ = (text != expected)[0].nonzero().flatten().tolist()
    if not differ:
        return True
    with torch.no_grad():
        before = text[:, : differ[0]]
        logits = qs.model(input_ids=before, attention_mask=torch.ones_like(before), use_cache=False).logits[0, -1]
    one, other = (logits[tokens[0, differ[0]]] for tokens in (text, expected))
    return bool((one - other).abs() <= _NEAR_TIE * logits.std())


def _short(qs: QuantSpecModel) -> str:
    ids = random_ids(PROMPT, 1)
    same = _same(qs, _text(qs, ids, _NEW_TOKENS), greedy(qs.model, ids, _NEW_TOKENS))
    return "" if same else "greedy text differs from the model's own"


def _padded(qs: QuantSpecModel) -> str:
    rows = [random_ids(PROMPT, 2), random_ids(PROMPT - 8, 3)]
    ids = torch.cat((rows[0], torch.nn.functional.pad(rows[1], (8, 0))))
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    together = _text(qs, ids, _NEW_TOKENS, mask)
    texts = [text[None, PROMPT - row.shape[1] :] for text, row in zip(together, rows, strict=True)]
    same = [_same(qs, text, greedy(qs.model, row, _NEW_TOKENS)) for text, row in zip(texts, rows, strict=True)]
    return "" if all(same) else "a padded batch's text differs from the rows' alone"


def _speculation(qs: QuantSpecModel) -> str:
    """A fault shows in every text; rounding that flips a cached code, and with it the choice of an expert, in few."""
    for seed in (4, 14, 24):
        ids = random_ids(2 * GROUP + 3, seed)
        if _same(qs, *(_text(qs, ids, _LONG, num_speculative_tokens=count) for count in (0, 4))):
            return ""
    return "text that is quantized differs with and without drafts"


def _conversation(qs: QuantSpecModel) -> str:
    first = _text(qs, random_ids(7, 5), 6)
    longer = torch.cat((first, random_ids(4, 6)), 1)
    text = _text(qs, longer, _NEW_TOKENS, continue_cache=True)
    same = _same(qs, text, greedy(qs.model, longer, _NEW_TOKENS))
    return "" if same else "a conversation's text differs from the model's own"


def _saving(qs: QuantSpecModel) -> str:
    ids = random_ids(PROMPT, 7)
    expected = _text(qs, ids, _NEW_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        qs.save_pretrained(folder)
        try:
            loaded = quantspec.from_pretrained(folder)
        except SavedModelError:
            own = AutoModelForCausalLM.from_pretrained(folder).eval()
            with torch.no_grad():
                logits = [model(input_ids=ids, use_cache=False).logits for model in (own, qs.model)]
            if torch.allclose(logits[0], logits[1], atol=_TOLERANCE):
                raise
            # transformers itself loads another model than it saved, and loading the pair says so.
            return ""
        return "" if torch.equal(_text(loaded, ids, _NEW_TOKENS), expected) else "a saved pair's text is another"


CHECKS: dict[str, Callable[[QuantSpecModel], str]] = {
    "short prompt": _short,
    "padded batch": _padded,
    "drafts": _speculation,
    "conversation": _conversation,
    "saved": _saving,
}


def _described(qs: QuantSpecModel) -> dict[str, Any]:
    """What the page says of a converted model."""
    names = {report.name for report in qs.linears if report.group_size is not None}
    experts = {p.shape[0] for name, p in qs.model.named_parameters() if p.dim() == 3 and name in names}
    return {
        "layers": [
            {
                "heads": [layer.query_heads, layer.kv_heads],
                "dims": [layer.key_dim, layer.value_dim],
                "window": layer.window,
                "chunk": layer.chunk,
                "softcap": layer.softcap,
                "sinks": layer.has_sinks,
            }
            for layer in qs.layers
        ],
        "states": len(qs.pair.captured.states),
        "experts": max(experts, default=0),
        "full_precision": sorted({report.note for report in qs.linears if report.group_size is None}),
    }


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def examine(model_type: str) -> dict[str, Any]:
    """What becomes of one type.

    Returns:
        ``verdict``: "right", "refused" (``reason``), "wrong" (``reason``) or "not built" (``reason``: transformers
        itself does not make or run the tiny model).
    """
    try:
        model = tiny_model(model_type)
        # Texts do not end early.
        model.generation_config = GenerationConfig(pad_token_id=0)
        greedy(model, random_ids(PROMPT, 0), 1)
    except Exception as error:
        return {"verdict": "not built", "reason": f"{type(error).__name__}: {_first_line(error)}"}
    found: dict[str, Any] = {"class": type(model).__name__}
    try:
        qs = quantspec.convert(model, kv_group_size=GROUP, weight_group_size=32, num_speculative_tokens=4)
    except UnsupportedModelError as error:
        return {"verdict": "refused", **found, "reason": _first_line(error)}
    except Exception as error:
        return {"verdict": "wrong", **found, "reason": f"convert: {_crash(error)}"}
    faults = []
    try:
        found |= _described(qs) | differences(qs)
        if not max(found["prefill"], found["decoding"]) <= _TOLERANCE:
            faults.append("logits differ from the model's own")
    except Exception as error:
        faults.append(f"logits: {_crash(error)}")
    for name, check in CHECKS.items():
        try:
            fault = check(qs)
        except Exception as error:
            fault = f"{name}: {_crash(error)}"
        if fault:
            faults.append(fault)
    return {"verdict": "wrong" if faults else "right", **found, **({"reason": "; ".join(faults)} if faults else {})}


def _crash(error: Exception) -> str:
    _LOG.debug("%s", "".join(traceback.format_exception(error)))
    return f"{type(error).__name__}: {_first_line(error)}"


def registered() -> list[str]:
    """Every causal type, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _work(model_type: str, connection: Connection) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    connection.send(examine(model_type))


def _apart(model_type: str, time_limit: float) -> dict[str, Any]:
    """:func:`examine` in a process of its own."""
    begun = time.monotonic()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(model_type, theirs))
    with _FORK:
        process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(time_limit) else {"verdict": "wrong", "reason": f"not done in {time_limit} s"}
    except EOFError:
        found = {"verdict": "wrong", "reason": "its process ended early"}
    process.kill()
    process.join()
    return found | {"seconds": round(time.monotonic() - begun, 1)}


def run(model_types: Sequence[str], jobs: int, time_limit: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each type with what was found, as it is done."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from zip(model_types, pool.map(lambda name: _apart(name, time_limit), model_types), strict=True)


def main() -> None:
    """Examine what the file does not tell yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="examined anew; without, all that the file does not tell of yet")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--time-limit", type=float, default=600, help="seconds for a type")
    parser.add_argument("--verbose", action="store_true", help="print the tracebacks of crashes")
    given = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    _LOG.setLevel(logging.DEBUG if given.verbose else logging.INFO)
    torch.set_num_threads(1)
    census = json.loads(given.out.read_text()) if given.out.exists() else {}
    types = census.setdefault(transformers.__version__, {})
    commit = current_commit()
    for name, found in run(
        given.types or [name for name in registered() if name not in types], given.jobs, given.time_limit
    ):
        types[name] = found | {"commit": commit}
        census[transformers.__version__] = dict(sorted(types.items()))
        given.out.write_text(json.dumps(census, indent=1) + "\n")
        _LOG.info("%s: %s %s (%s s)", name, found["verdict"], found.get("reason", ""), found["seconds"])


if __name__ == "__main__":
    main()
