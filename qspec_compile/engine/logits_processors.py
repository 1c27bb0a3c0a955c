"""Logits processors under speculation: every position is processed with the text that precedes it."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from .progress import Progress

# Processors that read the scores alone, so that all positions go through them at once.
_CONTEXT_FREE = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.LogitNormalization,
    hf.InfNanRemoveLogitsProcessor,
    hf.SuppressTokensLogitsProcessor,
)

# Processors that are functions of the text and the scores, so that they may be asked about drafts too.
_STATELESS = (
    *_CONTEXT_FREE,
    hf.TopHLogitsWarper,
    hf.MinLengthLogitsProcessor,
    hf.MinNewTokensLengthLogitsProcessor,
    hf.RepetitionPenaltyLogitsProcessor,
    hf.EncoderRepetitionPenaltyLogitsProcessor,
    hf.NoRepeatNGramLogitsProcessor,
    hf.EncoderNoRepeatNGramLogitsProcessor,
    hf.SequenceBiasLogitsProcessor,
    hf.NoBadWordsLogitsProcessor,
    hf.ForcedBOSTokenLogitsProcessor,
    hf.ForcedEOSTokenLogitsProcessor,
    hf.ExponentialDecayLengthPenalty,
    hf.SuppressTokensAtBeginLogitsProcessor,
)


def stateless(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Those that are known to keep no state. Any other, also a subclass, may count its calls or follow a grammar."""
    return LogitsProcessorList(processor for processor in processors if type(processor) in _STATELESS)


# Their parameters may change between replays of a CUDA graph, so it reads them from a tensor.
_TENSOR_PARAMETERS = {
    hf.TemperatureLogitsWarper: "temperature",
    hf.TopPLogitsWarper: "top_p",
    hf.MinPLogitsWarper: "min_p",
}


def replay_key(processors: LogitsProcessorList) -> tuple | None:
    """What a CUDA graph of these processors is fixed to; None if they cannot be captured."""
    key = []
    for processor in processors:
        kind = type(processor)
        if kind not in _TENSOR_PARAMETERS and kind is not hf.TopKLogitsWarper:
            return None
        fixed = {name: value for name, value in vars(processor).items() if name != _TENSOR_PARAMETERS.get(kind)}
        key.append((kind, tuple(sorted(fixed.items()))))
    return tuple(key)


class ReplayedProcessors:
    """Copies of processors with equal :func:`replay_key` whose temperature, top_p and min_p are tensors."""

    # Later calls, in inference mode or not, write the parameters.
    @torch.inference_mode(False)
    def __init__(self, processors: LogitsProcessorList, device: torch.device) -> None:
        self.processors = LogitsProcessorList(copy.copy(processor) for processor in processors)
        self.parameters: list[Tensor | None] = []
        for processor in self.processors:
            name = _TENSOR_PARAMETERS.get(type(processor))
            tensor = None
            if name is not None:
                tensor = torch.tensor(getattr(processor, name), dtype=torch.float32, device=device)
                setattr(processor, name, tensor)
            self.parameters.append(tensor)

    def load(self, processors: LogitsProcessorList) -> None:
        """Take the parameters of ``processors``."""
        for processor, tensor in zip(processors, self.parameters, strict=True):
            if tensor is not None:
                tensor.fill_(getattr(processor, _TENSOR_PARAMETERS[type(processor)]))

    def __call__(self, logits: Tensor, num_drafted: int) -> Tensor:
        """``(B, T, V)`` logits to float32 scores; the text before them does not matter."""
        scores = logits.float()
        if not self.processors:
            return scores
        flat = scores.flatten(0, 1)
        return apply_processors(self.processors, flat.new_zeros(len(flat), 1, dtype=torch.int64), flat).view(
            scores.shape
        )


class ScoreProcessor:
    """Applies a ``LogitsProcessorList`` to the logits of several positions of sequences of different lengths.

    Processors that are not :func:`stateless` are for one position of sequences of equal length.

    Attributes:
        needs_context: whether any processor may read the preceding tokens, drafted ones included.
    """

    def __init__(self, processors: LogitsProcessorList) -> None:
        self.processors = processors
        self.needs_context = any(type(processor) not in _CONTEXT_FREE for processor in processors)

    def __call__(self, logits: Tensor, progress: Progress, num_drafted: int = 0) -> Tensor:
        """Process ``(B, T, V)`` logits.

        Args:
            logits: row t scores the token that follows the first ``num_drafted + t`` drafted ones of each sequence.
            progress: the text so far, with drafted tokens in place.

        Returns:
            ``(B, T, V)`` float32 scores; as they came where no token is awaited.
        """
        scores = logits.to(torch.float32, copy=True)
        if not self.processors:
            return scores
        batch, tokens, vocab = scores.shape
        if not self.needs_context:
            ids = progress.sequences.new_zeros(batch * tokens, 1)
            return apply_processors(self.processors, ids, scores.view(-1, vocab)).view(batch, tokens, vocab)
        for t in range(tokens):
            offset = num_drafted + t
            rows = [row for row, awaited in enumerate(progress.awaits(offset)) if awaited]
            lens = {row: progress.context_lens[row] + offset for row in rows}
            if len(set(lens.values())) == 1:
                scores[:, t] = apply_processors(self.processors, progress.sequences[:, : lens[rows[0]]], scores[:, t])
                continue
            for row in rows:
                # Every row shows this sequence, so that a processor with something per row finds the batch it expects.
                ids = progress.sequences[row : row + 1, : lens[row]].expand(batch, -1)
                same = scores[row : row + 1, t].repeat(batch, 1)
                scores[row, t] = apply_processors(self.processors, ids, same)[row]
        return scores


def apply_processors(processors: LogitsProcessorList, ids: Tensor, scores: Tensor) -> Tensor:
    """``(B, V)`` scores of the token that follows each row of ``(B, S)`` ids."""
    try:
        return processors(cast(torch.LongTensor, ids), cast(torch.FloatTensor, scores))
    except Exception as error:
        if len(stateless(processors)) < len(processors):
            error.add_note(
                "raised by a logits processor; quantspec calls them as Hugging Face does, once per token, with the "
                "text accepted so far, and never with drafts"
            )
        raise
