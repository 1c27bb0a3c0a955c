"""Cut-offs by running mass: the kernel keeps what sorting keeps, and programs keep what transformers keeps."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cycle import needs_cuda
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from quantspec.engine.logits_processors import ScoreProgram
from quantspec.kernels import cut_off as op
from quantspec.kernels.cut_off import cut_off_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The package has the op under its name.
MODULE = import_module("quantspec.kernels.cut_off")
INF = float("inf")
PROCESSORS = {"top_p": hf.TopPLogitsWarper, "typical": hf.TypicalLogitsWarper}
IDS = torch.zeros(1, 1, dtype=torch.long)


def tied_scores(rows: int, vocab: int, seed: int) -> Tensor:
    """``(rows, vocab)`` of few values, zeros of both signs and -inf among them."""
    generator = torch.Generator().manual_seed(seed)
    scores = (4 * torch.randn(rows, vocab, generator=generator)).round() / 2
    scores[torch.rand(scores.shape, generator=generator) < 0.2] = -INF
    scores[:, 0] = 1.0
    return scores


def processed(processor: hf.LogitsProcessor, scores: Tensor) -> Tensor:
    """``(rows, V)`` scores through the program of one processor."""
    return ScoreProgram(LogitsProcessorList([processor]))(scores[:, None], 0)[:, 0]


@pytest.mark.parametrize("typical", [False, True])
@pytest.mark.parametrize(("vocab", "limit"), [(11, 0.3), (11, 0.0), (11, 1.0), (300, 0.8), (300, 0.1)])
def test_the_kernel_keeps_what_sorting_keeps(monkeypatch, vocab, limit, typical):
    """Several blocks a row. Which of equal tokens go first is the sort's choice; how many is not."""
    monkeypatch.setattr(MODULE, "BLOCK", 128)
    scores = torch.cat(
        (tied_scores(2, vocab, vocab), 3 * torch.randn(2, vocab, generator=torch.Generator().manual_seed(vocab)))
    )
    limits = torch.full((4, 1), limit)
    ours = cut_off_triton(scores.to(DEVICE), limits.to(DEVICE), typical, 1, -INF).cpu()
    assert torch.equal(ours.sort().values, op(scores, limits, typical, 1, -INF).sort().values)
    assert torch.equal(ours, scores.where(ours > -INF, -INF))


def test_of_equal_tokens_the_last_are_kept(monkeypatch):
    """As a stable sort has it, zeros of both signs alike, across blocks."""
    monkeypatch.setattr(MODULE, "BLOCK", 16)
    scores = torch.zeros(1, 40, device=DEVICE)
    scores[:, ::3] = -0.0
    ours = cut_off_triton(scores, torch.full((1, 1), 0.51, device=DEVICE), False, 1, -INF)
    assert (ours[0] > -INF).tolist() == [token >= 20 for token in range(40)]


@pytest.mark.parametrize("typical", [False, True])
def test_rows_of_nan_stay_nan(typical):
    scores = torch.full((2, 11), float("nan"), device=DEVICE)
    assert cut_off_triton(scores, torch.full((2, 1), 0.5, device=DEVICE), typical, 1, -INF).isnan().all()


@pytest.mark.parametrize("name", PROCESSORS)
@given(seed=st.integers(0, 999), mass=st.floats(0.01, 0.99), least=st.integers(1, 17))
def test_programs_keep_what_transformers_keeps_among_equal_scores(name, seed, mass, least):
    processor, scores = PROCESSORS[name](mass, min_tokens_to_keep=least), tied_scores(3, 17, seed)
    assert torch.equal(processed(processor, scores), processor(IDS, scores))


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("kind", [hf.MinPLogitsWarper, hf.EpsilonLogitsWarper, hf.EtaLogitsWarper])
@given(seed=st.integers(0, 999), value=st.floats(0.01, 0.99))
def test_the_likeliest_tokens_stay(kind, least, seed, value):
    processor, scores = kind(value, min_tokens_to_keep=least), tied_scores(3, 17, seed)
    assert torch.equal(processed(processor, scores), processor(IDS, scores))


@needs_cuda
@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("spread", [0.3, 3.0, 9.0])
@pytest.mark.parametrize("vocab", [49_152, 128_256])
def test_programs_keep_what_transformers_keeps_of_whole_vocabularies(name, spread, vocab):
    """Of bfloat16 logits, which tie. Rounding may move a token over the limit, or past one that it nearly equals."""
    generator = torch.Generator("cuda").manual_seed(vocab)
    scores = (spread * torch.randn(16, vocab, generator=generator, device="cuda")).bfloat16().float()
    information = -scores.double().log_softmax(-1)
    probs = information.neg().exp()
    entropy = (probs * information).sum(-1, keepdim=True)
    # What comes first, in each kind's order.
    order = (information - entropy).abs() if name == "typical" else information
    for mass in (0.2, 0.9, 0.99):
        processor = PROCESSORS[name](mass)
        for out in (processed(processor, scores), processor(IDS.cuda(), scores)):
            kept = out > -INF
            last = order.where(kept, 0.0).amax(-1, keepdim=True)
            assert (last <= order.where(~kept, INF).amin(-1, keepdim=True) + 3e-4).all()
            assert (probs.where(kept, 0.0).sum(-1) > mass - 1e-4).all()
            assert (probs.where(order < last - 3e-4, 0.0).sum(-1) < mass + 1e-4).all()
