"""Tuning: sample text, choose the draft's codes on it, then move its scales towards the target's distribution."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from quantspec.capture import converting
from quantspec.config import TuneConfig
from quantspec.interrupts import interrupts_later
from quantspec.logging import counting
from quantspec.pair import Pair
from quantspec.pair.tuned import DraftQuality, TuneReport
from quantspec.passes import INT4, Role, store_plain_weights

from .graphs import Student, Teacher, dense_weights, tuning_graphs
from .texts import beginnings, sampled, text_length, token_ids

# The share of all steps in which the rate of learning rises; behind it falls as a cosine.
_WARM_UP = 0.075
_LOGGER = logging.getLogger(__name__)

_BETAS = (0.9, 0.95)
# Held-out text is looked at so often while tuning, to keep the best.
_LOOKS = 4
# Rows of logits that are compared at a time: their float32 copies are what takes memory.
_ROWS = 1024
# Texts that codes are chosen on.
_GPTQ_TEXTS = 8


@dataclass(frozen=True)
class TuneProgress:
    """Where tuning stands, after a step.

    Attributes:
        step: steps done.
        steps: steps in all.
        kl, acceptance: of this step's texts before it, see :class:`DraftQuality`.
    """

    step: int
    steps: int
    kl: float
    acceptance: float


def _check_tunable(pair: Pair, config: TuneConfig) -> None:
    """Raise ``ValueError`` where a draft has nothing to learn."""
    weight_format = pair.draft_weights
    if weight_format is None or weight_format.learned is None or all(r.group_size is None for r in pair.linears):
        raise ValueError("this draft has no scales to tune: none of its linears is INT4; see print(qs)")
    if config.steps == 0 and weight_format is not INT4:
        raise ValueError(f"steps=0 is GPTQ alone, which chooses no codes of {weight_format.name}; give some steps")
    if pair.captured.states:
        raise ValueError(
            f"layers of {type(pair.model).__name__} keep state besides keys and values, through which tuning has no "
            "gradients; use the draft as it is"
        )


def tune(
    pair: Pair,
    config: TuneConfig,
    texts: Sequence[Any] | None = None,
    tokenizer: Any = None,
    callback: Callable[[TuneProgress], Any] | None = None,
) -> TuneReport:
    """Tune the draft of ``pair`` in place; see :meth:`quantspec.QuantSpecModel.tune`."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, not {type(callback).__name__}")
    _check_tunable(pair, config)
    pair.check_unmoved()
    started = time.perf_counter()
    windows = config.train_windows if config.steps else min(config.train_windows, _GPTQ_TEXTS)
    prompts = beginnings(windows + config.held_out_windows, token_ids(texts, tokenizer, pair), pair, config)
    on_gpu = pair.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(pair.device)
    written = sampled(prompts, pair, text_length(pair, config), config.seed)
    with converting(), torch.inference_mode(False), torch.enable_grad():
        # What was written in inference mode takes part in no gradient.
        training, held_out = written.clone().split((windows, config.held_out_windows))
        anew = config.gptq and pair.draft_weights is INT4
        teacher, student = tuning_graphs(pair, own_codes=anew)
        run = _Tuning(teacher, student, config, held_out)
        interrupted = anew and not run.choose_codes(training[:_GPTQ_TEXTS], dense_weights(pair))
        if config.steps and not interrupted:
            run.steps(training, callback)
    report = TuneReport(
        steps=run.done,
        stopped=interrupted or run.done < config.steps,
        before=run.before,
        after=run.best,
        tokens=run.done * config.windows_per_step * written.shape[1],
        seconds=round(time.perf_counter() - started, 1),
        peak_memory=torch.cuda.max_memory_allocated(pair.device) if on_gpu else None,
        seed=config.seed,
    )
    with interrupts_later():
        _write(pair, student)
        pair.tuned = report
    return report


class _Tuning:
    """The optimization.

    Attributes:
        before, best: on held-out text, of the draft as it was and of the best so far, which the student has at the end.
        done: steps done.
    """

    def __init__(self, teacher: Teacher, student: Student, config: TuneConfig, held_out: Tensor) -> None:
        self._teacher = teacher
        self._student = student
        self._config = config
        self._held_out = held_out.split(config.windows_per_step)
        self._captures = held_out.device.type == "cuda" and teacher.captures and student.captures
        self._gradients: Callable[[Tensor], Tensor] | None = None
        self._optimizer = torch.optim.Adam(student.parameters, lr=config.learning_rate, betas=_BETAS)
        self.done = 0
        self.before = self.best = self._quality()
        self._kept = [parameter.detach().clone() for parameter in student.parameters]

    def choose_codes(self, texts: Tensor, weights: Mapping[str, Tensor]) -> bool:
        """Begin with GPTQ's codes, if the draft is closer with them; see :meth:`Student.choose_codes`.

        Returns:
            False after Ctrl-C, which leaves codes as they were.
        """
        parts = [part for parts in self._student.parts.values() for part in parts.values() if part.dim() == 2]
        old, interrupted = [part.clone() for part in parts], False
        try:
            self._student.choose_codes(self._teacher, texts, weights)
            quality = self._quality()
            _LOGGER.info("GPTQ: %s -> %s", self.before, quality)
            if quality.kl < self.before.kl:
                self.best = quality
                return True
        except KeyboardInterrupt:
            _LOGGER.warning("tuning stops: the draft is left as it was")
            interrupted = True
        for part, codes in zip(parts, old, strict=True):
            part.copy_(codes)
        return not interrupted

    def steps(self, texts: Tensor, callback: Callable[[TuneProgress], Any] | None) -> None:
        """Learn from ``texts (n, T)`` until the last step, or Ctrl-C, or a callback that returns True."""
        config = self._config
        every = max(1, config.steps // _LOOKS)
        batches = _batches(texts, config)
        with counting(_LOGGER, "tuning", config.steps) as advance:
            try:
                while self.done < config.steps:
                    progress = self._step(next(batches))
                    advance(1, f": KL {progress.kl:.4f}, acceptance {progress.acceptance:.3f}")
                    if callback is not None and callback(progress):
                        break
                    if self.done % every == 0 and self.done < config.steps:
                        self._keep_best()
            except KeyboardInterrupt:
                _LOGGER.warning("tuning stops: the best so far is kept")
        self._keep_best()
        with torch.no_grad():
            for parameter, kept in zip(self._student.parameters, self._kept, strict=True):
                parameter.copy_(kept)

    def _step(self, ids: Tensor) -> TuneProgress:
        config = self._config
        for group in self._optimizer.param_groups:
            warm = min(1.0, (self.done + 1) / (_WARM_UP * config.steps))
            group["lr"] = config.learning_rate * warm * (1 + math.cos(math.pi * self.done / config.steps)) / 2
        if self._gradients is None:
            self._gradients = self._prepared(ids)
        kl, acceptance, _ = self._gradients(ids).unbind()
        self._optimizer.step()
        self.done += 1
        return TuneProgress(self.done, config.steps, kl.item(), acceptance.item())

    def _prepared(self, ids: Tensor) -> Callable[[Tensor], Tensor]:
        """:meth:`_with_gradients` for texts of the shape of ``ids``, captured where that can be."""
        if self._captures:
            try:
                return CapturedGradients(self._with_gradients, ids)
            except RuntimeError as error:
                # A graph may wait for the host where nothing tells it; kernel by kernel it is slower.
                _LOGGER.warning("tuning runs kernel by kernel, since it cannot be captured: %s", error)
        return self._with_gradients

    def _with_gradients(self, ids: Tensor) -> Tensor:
        """:meth:`_compare`, with new gradients of the KL in what is learned."""
        self._optimizer.zero_grad(set_to_none=True)
        result = self._compare(ids)
        # Modules of the model that run as they are have parameters of its own, which stay without gradients.
        result[0].backward(inputs=self._student.parameters)
        return result.detach()

    def _compare(self, ids: Tensor, first: int = 0) -> Tensor:
        """Mean KL, acceptance and agreement, ``(3,)``, of the tokens of ``ids (B, T)`` from ``first`` on."""
        targets, cache = self._teacher.read(ids)
        drafts = self._student.read(ids, cache)
        rows = zip(*(x[:, first:].flatten(0, 1).split(_ROWS) for x in (targets, drafts)), strict=True)
        sums = [checkpoint(compare, *pair, use_reentrant=False, preserve_rng_state=False) for pair in rows]
        return torch.stack(sums).sum(0) / (len(ids) * (ids.shape[1] - first))

    @torch.no_grad()
    def _quality(self) -> DraftQuality:
        """On the second half of the held-out texts: what follows a prompt."""
        parts = [len(ids) * self._compare(ids, ids.shape[1] // 2) for ids in self._held_out]
        return DraftQuality(*(torch.stack(parts).sum(0) / sum(map(len, self._held_out))).tolist())

    def _keep_best(self) -> None:
        quality = self._quality()
        if quality.kl < self.best.kl:
            # Both at once, whenever Ctrl-C comes.
            self._kept, self.best = [parameter.detach().clone() for parameter in self._student.parameters], quality


class CapturedGradients:
    """A function of texts ``(B, T)`` that leaves gradients, as one CUDA graph.

    A step is thousands of small kernels, which take longer to launch one by one than to run. Gradients stay where the
    first call left them.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], ids: Tensor) -> None:
        """Run ``function`` once, which allocates workspaces, and capture it."""
        self._ids = ids.clone()
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(ids.device)
        stream.wait_stream(torch.cuda.current_stream(ids.device))
        with torch.cuda.stream(stream):
            function(self._ids)
            torch.cuda.synchronize(ids.device)
            with torch.cuda.graph(self._graph, stream=stream):
                self._result = function(self._ids)
        torch.cuda.current_stream(ids.device).wait_stream(stream)

    def __call__(self, ids: Tensor) -> Tensor:
        """The function's result, overwritten by the next call."""
        self._ids.copy_(ids)
        self._graph.replay()
        return self._result


def _batches(texts: Tensor, config: TuneConfig) -> Iterator[Tensor]:
    """Texts of a step, all in turn and in a new order each time."""
    generator = torch.Generator().manual_seed(config.seed)
    order: list[int] = []
    while True:
        while len(order) < config.windows_per_step:
            order += torch.randperm(len(texts), generator=generator).tolist()
        yield texts[order[: config.windows_per_step]]
        del order[: config.windows_per_step]


def compare(targets: Tensor, drafts: Tensor) -> Tensor:
    """Sums over rows of logits ``(R, V)``: KL(target‖draft), sum of min(p, q), and equal arg-max; ``(3,)`` float32."""
    p, q = (logits.float().log_softmax(-1) for logits in (targets, drafts))
    # Tokens that the model rules out have -inf in both.
    kl = p.exp() * (p - q).masked_fill(p.isneginf(), 0)
    overlap = torch.minimum(p, q.detach()).exp()
    same = targets.argmax(-1) == drafts.argmax(-1)
    return torch.stack((kl.sum(), overlap.sum(), same.sum().float()))


def _write(pair: Pair, student: Student) -> None:
    """Put what was learned where the draft reads it, so that captured graphs stay as they are."""
    assert pair.draft_weights is not None
    with torch.inference_mode():
        weights = {
            name: {**student.parts[name], pair.draft_weights.learned: learned()}
            for name, learned in student.learned.items()
        }
        store_plain_weights(pair.graphs[Role.DRAFT], weights)
