"""The benchmark of serving, on a tiny model."""

from __future__ import annotations

import pytest
from step_by_step import random_prompt

from quantspec.benchmarks.serving import MODES, measure_users


def test_every_mode_is_timed(qs):
    row = measure_users(qs, [random_prompt(20, seed) for seed in range(3)], 12)
    assert (row["users"], row["context"], row["new_tokens"]) == (3, 20, 12)
    for mode in MODES:
        figures = row[mode]
        assert figures["tokens_per_second"] == pytest.approx(36 / figures["seconds"])
        assert 0 < figures["first_token_seconds_median"] <= figures["first_token_seconds_most"] <= figures["seconds"]
    assert row["batch_without_drafts"]["mean_acceptance_length"] == 1
    assert row["batch"]["mean_acceptance_length"] >= 1
    assert row["batch_auto"]["mean_acceptance_length"] >= 1
