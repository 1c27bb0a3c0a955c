"""A measurement whose texts are all too short to be quantized says so."""

from __future__ import annotations

import logging

import pytest
from conftest import GROUP, characters
from step_by_step import random_prompt

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")

from lm_eval.api.instance import Instance

from quantspec.evals.adapter import QuantSpecLM
from quantspec.evals.parity import Material, ParityOptions, measure

TEXT = characters(random_prompt(4 * GROUP))
WARNING = "never reached the quantized cache"


def told(caplog) -> list[str]:
    """The warnings about short texts so far, which are forgotten then."""
    messages = [record.getMessage() for record in caplog.records if WARNING in record.getMessage()]
    caplog.clear()
    return messages


def answer(lm: QuantSpecLM, kind: str, length: int, new_tokens: int) -> None:
    """Give a context of ``length`` tokens, and one that is shorter; each is continued by ``new_tokens``."""
    ends = ("abcdef"[:new_tokens],) if kind == "loglikelihood" else ({"max_gen_toks": new_tokens, "until": []},)
    contexts = (TEXT[:length], TEXT[: length - 1])
    getattr(lm, kind)(
        [Instance(kind, {}, (context, *ends), n) for n, context in enumerate(contexts)], disable_tqdm=True
    )


@pytest.mark.parametrize("role", ["target", "speculative", "draft"])
@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_an_evaluation_of_short_texts_warns(qs, tokenizer, caplog, kind, role):
    """Once for all of its texts, with the length that would do; not if one is long enough."""
    lm = QuantSpecLM(qs, role=role, tokenizer=tokenizer)
    answer(lm, kind, GROUP, 4)
    (message,) = told(caplog)
    assert f"of the {role} {WARNING}" in message
    assert f"below 2G = {2 * GROUP} all are" in message
    answer(lm, kind, 2 * GROUP, 4)
    assert not told(caplog)


def test_the_original_model_has_no_cache_to_reach(qs, tokenizer, caplog):
    answer(QuantSpecLM(qs, role="reference", tokenizer=tokenizer), "loglikelihood", GROUP, 4)
    assert not told(caplog)


@pytest.mark.parametrize(("context_tokens", "warns"), [(GROUP, True), (2 * GROUP, False)])
def test_a_report_on_a_short_text_warns(qs, tokenizer, caplog, context_tokens, warns):
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    options = ParityOptions(context_tokens=context_tokens, scored_tokens=2, prompts=0)
    with caplog.at_level(logging.WARNING):
        measure(qs, Material(tokenizer, {}, ids, options))
    assert bool(told(caplog)) == warns
