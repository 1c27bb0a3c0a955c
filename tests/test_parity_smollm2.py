"""Parity of a real model, SmolLM2-135M, on a small set; ``python -m benchmarks.parity`` is the whole."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")

from quantspec.evals.adapter import QuantSpecLM
from quantspec.evals.parity import ParityOptions, parity
from quantspec.evals.smollm2 import gguf_path


def test_smollm2_has_parity_with_its_quantized_pair():
    path = gguf_path()
    lm = QuantSpecLM(str(path.parent), gguf_file=path.name, dtype="float32", device="cpu", weight_group_size=64)
    options = ParityOptions(limit=2, batch_size=2, context_tokens=512, scored_tokens=128, prompts=0)
    tasks = ["reference_choice", "reference_cloze@512", "niah_single_1@1024"]
    report = parity(lm.qs, tokenizer=lm.tokenizer, tasks=tasks, options=options)
    assert report.passed, report
    needle = {row.role: row.value for row in report.tasks if row.task == "niah_single_1@1024"}
    assert needle["target"] == 1.0
    assert report.acceptance["niah_single_1@1024"]["draft_acceptance_rate"] > 0.5
