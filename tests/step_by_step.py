"""Target-only decoding, one token at a time, written apart from ``generate``, which must equal it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantspec import QuantSpecModel
from quantspec.passes import Role

# A group is flushed at the end of a cycle, so other cycles read it at INT8 a few tokens earlier or later. That moves
# these models' logits by up to 0.06; a token may differ from step-by-step decoding only where the target is torn
# between the two by less than this.
TIE = 0.08


class StepByStep:
    """Feeds one sequence to the target, token by token."""

    def __init__(self, qs: QuantSpecModel, prompt: Sequence[int], max_len: int = 512) -> None:
        self.qs = qs
        self.cache = qs.pair.new_cache(1, 0)
        self.cache.reserve(max_len)
        count = torch.tensor([len(prompt)])
        positions = torch.arange(len(prompt))[None]
        state = (self.cache.quantized_len, self.cache.length, count)
        state = (*state, torch.stack(state))
        inputs = (torch.tensor([list(prompt)]), positions, count[:, None] - 1)
        self.logits: Tensor = qs.pair.forward(Role.PREFILL, *inputs, *state, cache=self.cache)[0, -1].float()
        self.cache.advance_prefill(count)

    def feed(self, token: int) -> Tensor:
        """Append ``token``; returns the logits ``(V,)`` of the next one."""
        length = self.cache.length
        inputs = (torch.tensor([[token]]), length[:, None].clone(), torch.zeros(1, 1, dtype=torch.long))
        logits = self.qs.pair.forward(Role.TARGET, *inputs, self.cache.quantized_len, length, cache=self.cache)
        self.cache.accept(torch.tensor([1]))
        self.logits = logits[0, -1].float()
        return self.logits


@torch.no_grad()
def decode_step_by_step(qs: QuantSpecModel, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy tokens after ``prompt``."""
    steps = StepByStep(qs, prompt)
    tokens = [int(steps.logits.argmax())]
    while len(tokens) < max_new_tokens:
        tokens.append(int(steps.feed(tokens[-1]).argmax()))
    return tokens


@torch.no_grad()
def assert_is_targets_choice(
    qs: QuantSpecModel, prompt: Sequence[int], tokens: Sequence[int], tie: float = TIE
) -> None:
    """Replay ``tokens`` through the target alone: each must be its argmax, or within ``tie`` of it."""
    steps = StepByStep(qs, prompt)
    for index, token in enumerate(tokens):
        short_of = float(steps.logits.max() - steps.logits[token])
        assert short_of <= tie, f"token {index} ({token}) is {short_of:.3g} below the target's argmax"
        steps.feed(token)


@torch.no_grad()
def assert_same_text(
    qs: QuantSpecModel, prompt: Sequence[int], tokens: Sequence[int], expected: Sequence[int], tie: float = TIE
) -> None:
    """``tokens`` equal ``expected``, or part from them where the target's logits are within ``tie`` of each other.

    From there on the two are different texts; what follows in ``tokens`` must be the target's choice after them.
    """
    tokens, expected = list(tokens), list(expected)
    if tokens == expected:
        return
    assert len(tokens) == len(expected), (tokens, expected)
    index = next(i for i, pair in enumerate(zip(tokens, expected, strict=True)) if pair[0] != pair[1])
    steps = StepByStep(qs, prompt)
    for token in tokens[:index]:
        steps.feed(token)
    margin = float((steps.logits[tokens[index]] - steps.logits[expected[index]]).abs())
    assert margin <= tie, f"token {index} is {tokens[index]}, not {expected[index]}, by a margin of {margin:.3g}"
    assert_is_targets_choice(qs, prompt, tokens, tie)


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Ids 3..95, so that no pad, bos or eos token is among them."""
    return torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def pad_batch(prompts: Sequence[Sequence[int]], left: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    """Prompts in rows of ``width``, the b-th after ``left[b]`` padding tokens; returns ids and attention mask."""
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, start) in enumerate(zip(prompts, left, strict=True)):
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask[row, start : start + len(prompt)] = 1
    return ids, mask
