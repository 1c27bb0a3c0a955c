"""The number of drafts that "auto" settles on, in simulated time."""

import random

import pytest
import torch
from conftest import GROUP
from step_by_step import assert_same_text, random_prompt

from quantspec.speculation import AUTO_CHOICES, AutoDraftCount


def settle(acceptance: float, draft: float, verify: float, cycles: int = 600) -> AutoDraftCount:
    """Feed a chooser cycles of a machine with these times."""
    chance, auto = random.Random(0), AutoDraftCount()
    for _ in range(cycles):
        chosen = auto.choose()
        accepted = next((n for n in range(chosen) if chance.random() > acceptance), chosen)
        auto.record(chosen, [accepted], verify + chosen * draft)
    return auto


@pytest.mark.parametrize(
    ("acceptance", "draft", "verify"), [(0.95, 0.3, 1.0), (0.8, 0.3, 1.0), (0.5, 0.2, 1.0), (0.9, 0.9, 1.0)]
)
def test_auto_finds_the_fastest_number(acceptance, draft, verify):
    def rate(n: int) -> float:
        return sum(acceptance**i for i in range(n + 1)) / (verify + n * draft)

    auto = settle(acceptance, draft, verify)
    assert rate(auto.choose()) > 0.95 * max(map(rate, AUTO_CHOICES))


def test_auto_falls_back_to_plain_decoding_and_returns():
    """Where drafts are worthless nothing is drafted; when they get better it is noticed."""
    auto = settle(0.05, 0.5, 1.0)
    assert auto.choose() == 0
    for _ in range(8000):
        chosen = auto.choose()
        auto.record(chosen, [chosen], 1.0 + 0.1 * chosen)
    assert auto.choose() > 0


def test_auto_generates_the_same_text(qs):
    prompt = random_prompt(2 * GROUP + 8, 7)
    options = {"max_new_tokens": 3 * GROUP, "eos_token_id": None, "do_sample": False}
    expected = qs.generate(torch.tensor([prompt]), num_speculative_tokens=0, **options)[0, len(prompt) :].tolist()
    ours = qs.generate(torch.tensor([prompt]), num_speculative_tokens="auto", **options)[0, len(prompt) :].tolist()
    assert_same_text(qs, prompt, ours, expected)
    assert qs.last_stats.drafted > 0
