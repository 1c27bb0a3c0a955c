"""transformers' stateless logits processors as tensor programs that a CUDA graph can hold.

Each is a function of scores, text and parameters. Text and parameters lie in tensors, so that other values and other
texts need no other program; nothing waits for the host, and no shape follows from data. Comparisons come out as in the
processors themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as hf

from quantspec.kernels import cut_off

from .row_processors import PerRow, merge_rows
from .text import Positions, Text

_NEVER = 2**62
# Values up to these share a program; beyond them it is that of the next power of two, or of the whole vocabulary.
_TOP_K, _NGRAM = 256, 8


class Kind(NamedTuple):
    """How a type of processor becomes part of a program.

    Attributes:
        apply: ``apply(scores (B, T, V), at, fixed, *values)`` gives the processed scores.
        values: ``values(processor, batch, vocab)``: numbers, or tensors that broadcast to rows, positions, tokens.
        fixed: what of a processor the program is fixed to.
        reads_text: whether ``at`` matters.
    """

    apply: Callable[..., Tensor]
    values: Callable[[Any, int, int], tuple[Any, ...]] = lambda processor, batch, vocab: ()
    fixed: Callable[[Any], Hashable] = lambda processor: None
    reads_text: bool = False


class ScoreProgram:
    """Processors that are all :func:`compilable`, applied to several positions of sequences of different lengths.

    Attributes:
        text: what precedes the positions; None if no processor reads it.
    """

    def __init__(self, processors: LogitsProcessorList, text: Text | None = None) -> None:
        """``text`` may be left out where none of the processors :func:`reads_text`."""
        self.text = text if reads_text(processors) else None
        self._processors = processors
        self._kinds = [(kind := _kind(processor), kind.fixed(processor)) for processor in processors]
        self._values: list[tuple[Tensor, ...]] | None = None
        self._shape = (0, 0)

    def load(self, processors: LogitsProcessorList) -> None:
        """Take the parameters of ``processors``, whose :func:`program_key` is that of the first ones."""
        # A list is one call's own, which may come back from another number of drafts.
        if processors is self._processors:
            return
        self._processors = processors
        if self._values is not None:
            for kept, new in zip(self._values, self._read(), strict=True):
                for tensor, value in zip(kept, new, strict=True):
                    tensor.copy_(value)

    def __call__(self, logits: Tensor, num_ahead: int) -> Tensor:
        """``(B, T, V)`` logits to float32 scores; row t follows the text and ``num_ahead + t`` drafted tokens."""
        scores = logits.float()
        if self._values is None:
            self._allocate(scores)
        assert self._values is not None
        at = None if self.text is None else self.text.positions(num_ahead, scores.shape[1])
        for (kind, fixed), values in zip(self._kinds, self._values, strict=True):
            scores = kind.apply(scores, at, fixed, *values)
        return scores

    # Later calls, in inference mode or not, write the parameters.
    @torch.inference_mode(False)
    def _allocate(self, scores: Tensor) -> None:
        self._shape = scores.shape[0], scores.shape[-1]
        self._values = [tuple(value.to(scores.device, copy=True) for value in values) for values in self._read()]

    def _read(self) -> list[tuple[Tensor, ...]]:
        batch, vocab = self._shape
        return [
            tuple(_as_tensor(value, batch) for value in kind.values(processor, batch, vocab))
            for processor, (kind, _) in zip(self._processors, self._kinds, strict=True)
        ]


class FollowingProcessor(LogitsProcessor):
    """A processor that reads the text on the host, and as soon as it is known: on a GPU while a replay is under way."""

    def follow(self, texts: Sequence[Sequence[int]], running: Sequence[bool]) -> None:
        """Take the new tokens of each row so far, padding left out, before the next call; others need no token."""
        raise NotImplementedError


def compilable(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Those that a program can hold. Any other, also a subclass, may count its calls or follow a grammar."""
    return LogitsProcessorList(processor for processor in processors if _is_compilable(processor))


def _is_compilable(processor: LogitsProcessor) -> bool:
    if isinstance(processor, PerRow):
        return all(own is None or type(own) in _KINDS for own in processor.rows)
    return type(processor) in _KINDS


def program_key(processors: LogitsProcessorList) -> tuple[Hashable, ...]:
    """What the program of :func:`compilable` processors is fixed to."""
    return tuple(_key(processor) for processor in processors)


def _key(processor: LogitsProcessor) -> Hashable:
    if isinstance(processor, PerRow):
        return PerRow, _key(_some(processor))
    return type(processor), _KINDS[type(processor)].fixed(processor)


def _kind_or_class(processor: LogitsProcessor) -> Hashable:
    return (_key(processor),) if _is_compilable(processor) else (type(processor),)


def merge_processors(rows: Sequence[LogitsProcessorList]) -> LogitsProcessorList:
    """One list for the batch that does to each row what its own does; programs hold all that they hold of the rows'."""
    return merge_rows(rows, _kind_or_class)


def reads_text(processors: LogitsProcessorList) -> bool:
    """Whether any of :func:`compilable` processors depends on the preceding tokens or their number."""
    return any(_kind(processor).reads_text for processor in processors)


def apply_processors(processors: LogitsProcessorList, ids: Tensor, scores: Tensor) -> Tensor:
    """``(B, V)`` scores of the token that follows each row of ``(B, S)`` ids."""
    try:
        return processors(cast(torch.LongTensor, ids), cast(torch.FloatTensor, scores))
    except Exception as error:
        error.add_note(
            "raised by a logits processor; quantspec calls them as Hugging Face does, once per token, with the text "
            "accepted so far, and never with drafts"
        )
        raise


def _kind(processor: LogitsProcessor) -> Kind:
    """How one of :func:`compilable` processors becomes part of a program."""
    if not isinstance(processor, PerRow):
        return _KINDS[type(processor)]
    kind = _KINDS[type(_some(processor))]

    def apply(scores: Tensor, at: Positions | None, fixed: Hashable, has: Tensor, *values: Tensor) -> Tensor:
        return torch.where(has, kind.apply(scores, at, fixed, *values), scores)

    def values(processor: PerRow, batch: int, vocab: int) -> tuple[Tensor, ...]:
        # The values of a row that has none are not looked at.
        owners = [_some(processor) if own is None else own for own in processor.rows]
        rows = ([_as_tensor(value, 1) for value in kind.values(own, 1, vocab)] for own in owners)
        has = torch.tensor([own is not None for own in processor.rows], device="cpu")
        return has[:, None, None], *(torch.cat(column) for column in zip(*rows, strict=True))

    return Kind(apply, values, lambda processor: kind.fixed(_some(processor)), kind.reads_text)


def _some(processor: PerRow) -> LogitsProcessor:
    return next(own for own in processor.rows if own is not None)


def _as_tensor(value: Any, batch: int) -> Tensor:
    """A tensor as it is; a number as one of each row, ``(B, 1, 1)``."""
    if isinstance(value, Tensor):
        return value
    dtype = torch.int64 if isinstance(value, int) else torch.float32
    return torch.full((batch, 1, 1), value, dtype=dtype, device="cpu")


# --- Processors that read the scores alone ---------------------------------------------------------------------------


def _temperature(scores: Tensor, at: None, fixed: None, temperature: Tensor) -> Tensor:
    return scores / temperature


def _top_k(scores: Tensor, at: None, fixed: tuple[int, float], k: Tensor) -> Tensor:
    bound, filter_value = fixed
    most = min(bound, scores.shape[-1])
    index = (k.clamp(max=most) - 1).expand(*scores.shape[:2], 1)
    return scores.masked_fill(scores < scores.topk(most).values.gather(-1, index), filter_value)


def _top_p(scores: Tensor, at: None, fixed: tuple[float, int], cut: Tensor) -> Tensor:
    filter_value, least = fixed
    return cut_off(scores, cut.expand(*scores.shape[:2], 1), False, least, filter_value)


def _min_p(scores: Tensor, at: None, fixed: tuple[float, int], min_p: Tensor) -> Tensor:
    filter_value, least = fixed
    probs = scores.softmax(-1)
    removed = probs < min_p * probs.amax(-1, keepdim=True)
    # The likeliest is above any share of itself.
    if least > 1:
        removed = removed.scatter(-1, probs.topk(min(least, scores.shape[-1])).indices, False)
    return scores.masked_fill(removed, filter_value)


def _typical(scores: Tensor, at: None, fixed: tuple[float, int], mass: Tensor) -> Tensor:
    filter_value, least = fixed
    return cut_off(scores, mass.expand(*scores.shape[:2], 1), True, least, filter_value)


def _epsilon(scores: Tensor, at: None, fixed: tuple[float, int], epsilon: Tensor) -> Tensor:
    filter_value, least = fixed
    most = min(least, scores.shape[-1])
    kept = scores.amax(-1, keepdim=True) if most == 1 else scores.topk(most).values[..., -1:]
    return scores.masked_fill((scores.softmax(-1) < epsilon) & (scores < kept), filter_value)


def _eta(scores: Tensor, at: None, fixed: tuple[float, int], epsilon: Tensor) -> Tensor:
    entropy = Categorical(logits=scores, validate_args=False).entropy()[..., None]
    return _epsilon(scores, at, fixed, torch.min(epsilon, epsilon.sqrt() * (-entropy).exp()))


def _top_h(scores: Tensor, at: None, fixed: tuple[float, int], top_h: Tensor) -> Tensor:
    filter_value, most = fixed
    top, indices = scores.topk(min(most, scores.shape[-1]))
    distribution = Categorical(logits=top, validate_args=False)
    probs = distribution.probs
    kept = (-probs * probs.log()).cumsum(-1) <= distribution.entropy()[..., None] * top_h
    kept[..., 0] = True
    return scores.masked_fill(~torch.zeros_like(scores, dtype=torch.bool).scatter(-1, indices, kept), filter_value)


def _normalize(scores: Tensor, at: None, fixed: None) -> Tensor:
    return scores.log_softmax(-1)


def _remove_invalid(scores: Tensor, at: None, fixed: None) -> Tensor:
    return scores.nan_to_num(0.0)


def _encoder_repetition(scores: Tensor, at: None, fixed: None, present: Tensor, penalty: Tensor) -> Tensor:
    return torch.where(present, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


# --- Processors that read the text -----------------------------------------------------------------------------------


def _forbid(scores: Tensor, at: Positions, fixed: None, tokens: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """Forbid ``tokens (1, 1, V)`` bool behind texts of ``first`` up to, not including, ``end`` tokens."""
    lens = at.lens[..., None]
    return scores.masked_fill(tokens & (lens >= first) & (lens < end), float("-inf"))


def _force(scores: Tensor, at: Positions, fixed: None, tokens: Tensor, length: Tensor) -> Tensor:
    """Nothing but ``tokens (1, 1, V)`` bool behind texts of ``length`` tokens."""
    forced = torch.zeros_like(scores).masked_fill(~tokens, float("-inf"))
    return torch.where(at.lens[..., None] == length, forced, scores)


def _decay(scores: Tensor, at: Positions, fixed: None, tokens: Tensor, start: Tensor, factor: Tensor) -> Tensor:
    over = at.lens[..., None] - start
    penalty = scores.abs() * (factor.pow(over.clamp(min=0)) - 1).float()
    return scores + penalty.where(tokens & (over > 0) & scores.isfinite(), 0.0)


def _repetition(scores: Tensor, at: Positions, fixed: None, penalty: Tensor, ignored: Tensor) -> Tensor:
    places = torch.arange(at.ids.shape[1], device=scores.device)
    present = _tokens_at(at, (places >= ignored) & (places < at.lens[..., None]), scores.shape[-1])
    return _encoder_repetition(scores, None, None, present, penalty)


def _no_repeat_ngrams(scores: Tensor, at: Positions, bound: int, size: Tensor) -> Tensor:
    """Forbid what followed the newest ``size - 1`` tokens anywhere in the text; ``size`` is at most ``bound``."""
    before = bound - 1
    width = at.ids.shape[1]
    # The tokens before each place; what fills up the first ones equals no token and nothing that fills up the newest.
    windows = F.pad(at.ids, (before, 0), value=-2).unfold(1, before, 1)[:, :width]
    columns = torch.arange(before, device=scores.device)
    same = (windows[:, None] == at.newest(before)[:, :, None]) | (columns < bound - size)[:, :, None]
    places = torch.arange(width, device=scores.device)
    followed = same.all(-1) & (places < at.lens[..., None])
    return scores.masked_fill(_tokens_at(at, followed, scores.shape[-1]), float("-inf"))


def _bias(
    scores: Tensor, at: Positions, fixed: tuple[int, int], single: Tensor, prefixes: Tensor, lens: Tensor, *last: Tensor
) -> Tensor:
    """Add ``single (1, 1, V)``, and to a sequence's last token where its prefix is the newest text.

    Of R rows, 1 or B, and M sequences: ``prefixes (R, M, L)``, flush right; their ``lens (R, M)``; the last tokens and
    the biases ``(R, M)``.
    """
    total = single.expand_as(scores)
    longest, number = fixed
    if number:
        tokens, biases = (tensor[:, None] for tensor in last)
        skipped = torch.arange(longest, device=scores.device) < longest - lens[..., None]
        matches = ((at.newest(longest)[:, :, None] == prefixes[:, None]) | skipped[:, None]).all(-1)
        total = total.scatter_add(-1, tokens.expand_as(matches), biases.where(matches, 0.0))
    return scores + total


def _tokens_at(at: Positions, places: Tensor, vocab: int) -> Tensor:
    """``(B, T, V)`` bool: the tokens at ``places (B, T, W)`` of the text."""
    # A spare column takes the others, also ids that the head does not know.
    index = at.ids.clamp(max=vocab)[:, None].where(places, vocab)
    marked = torch.zeros(*places.shape[:2], vocab + 1, dtype=torch.bool, device=places.device)
    return marked.scatter(-1, index, True)[..., :vocab]


# --- What the processors hold ----------------------------------------------------------------------------------------


def _mask(tokens: Iterable[int], vocab: int) -> Tensor:
    """``(1, 1, V)`` bool of the tokens that there are."""
    mask = torch.zeros(1, 1, vocab, dtype=torch.bool, device="cpu")
    mask[..., [token for token in tokens if 0 <= token < vocab]] = True
    return mask


def _cutoff(processor: Any) -> Hashable:
    return processor.filter_value, processor.min_tokens_to_keep


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _ignored(processor: hf.RepetitionPenaltyLogitsProcessor, batch: int) -> int | Tensor:
    ignored = processor.prompt_ignore_length
    return ignored.cpu().view(-1, 1, 1).expand(batch, 1, 1) if isinstance(ignored, Tensor) else ignored or 0


def _encoder_tokens(processor: hf.EncoderRepetitionPenaltyLogitsProcessor, batch: int, vocab: int) -> Tensor:
    ids = processor.encoder_input_ids.cpu()
    present = torch.zeros(len(ids), vocab, dtype=torch.bool, device="cpu").scatter_(1, ids, True)
    return present.repeat_interleave(batch // len(ids), 0)[:, None]


_Sequences = Mapping[tuple[int, ...], float]


def _longer(rows: list[_Sequences]) -> tuple[int, int]:
    """Room for the longest prefix and for the most sequences of more than one token, in powers of two."""
    longer = [[tokens for tokens in row if len(tokens) > 1] for row in rows]
    number = max(map(len, longer))
    longest = max((len(tokens) - 1 for row in longer for tokens in row), default=0)
    return (_power_of_two(longest), _power_of_two(number)) if number else (0, 0)


def _biases(rows: list[_Sequences], vocab: int) -> tuple[Tensor, ...]:
    """The values of :func:`_bias` for one row, or one for each of the batch."""
    longest, number = _longer(rows)
    single = torch.zeros(len(rows), 1, vocab, device="cpu", dtype=torch.float32)
    # What no text ends with.
    prefixes = torch.full((len(rows), number, longest), -3, device="cpu")
    lens = torch.full((len(rows), number), longest, device="cpu")
    tokens = torch.zeros(len(rows), number, dtype=torch.int64, device="cpu")
    biases = torch.zeros(len(rows), number, dtype=torch.float32, device="cpu")
    for row, sequences in enumerate(rows):
        alone = {sequence[0]: bias for sequence, bias in sequences.items() if len(sequence) == 1}
        single[row, 0, list(alone)] = torch.tensor(list(alone.values()), dtype=torch.float32, device="cpu")
        longer = [(sequence, bias) for sequence, bias in sequences.items() if len(sequence) > 1]
        for index, (sequence, bias) in enumerate(longer):
            length = len(sequence) - 1
            prefixes[row, index, longest - length :] = torch.tensor(sequence[:-1], device="cpu")
            lens[row, index], tokens[row, index], biases[row, index] = length, sequence[-1], bias
    return single, prefixes, lens, tokens, biases


def _prompt_ngrams(processor: hf.EncoderNoRepeatNGramLogitsProcessor) -> list[_Sequences]:
    """The n-grams of each prompt as sequences that nothing may complete."""
    return [
        {(*prefix, token): float("-inf") for prefix, tokens in ngrams.items() for token in tokens}
        for ngrams in processor.generated_ngrams
    ]


def _per_row(rows: list[_Sequences], batch: int) -> list[_Sequences]:
    return [row for row in rows for _ in range(batch // len(rows))]


_SEQUENCE_BIAS = Kind(
    _bias,
    lambda p, batch, vocab: _biases([p.sequence_bias], vocab),
    lambda p: _longer([p.sequence_bias]),
    reads_text=True,
)

_KINDS: dict[type, Kind] = {
    hf.TemperatureLogitsWarper: Kind(_temperature, lambda p, *_: (p.temperature,)),
    hf.TopKLogitsWarper: Kind(
        _top_k, lambda p, *_: (p.top_k,), lambda p: (_TOP_K if p.top_k <= _TOP_K else _NEVER, p.filter_value)
    ),
    # The difference is rounded once, as there.
    hf.TopPLogitsWarper: Kind(_top_p, lambda p, *_: (1 - p.top_p,), _cutoff),
    hf.MinPLogitsWarper: Kind(_min_p, lambda p, *_: (float(p.min_p),), _cutoff),
    hf.TypicalLogitsWarper: Kind(_typical, lambda p, *_: (p.mass,), _cutoff),
    hf.EpsilonLogitsWarper: Kind(_epsilon, lambda p, *_: (p.epsilon,), _cutoff),
    hf.EtaLogitsWarper: Kind(_eta, lambda p, *_: (float(p.epsilon),), _cutoff),
    hf.TopHLogitsWarper: Kind(_top_h, lambda p, *_: (float(p.top_h),), lambda p: (p.filter_value, p.top_n)),
    hf.LogitNormalization: Kind(_normalize),
    hf.InfNanRemoveLogitsProcessor: Kind(_remove_invalid),
    hf.EncoderRepetitionPenaltyLogitsProcessor: Kind(
        _encoder_repetition, lambda p, batch, vocab: (_encoder_tokens(p, batch, vocab), p.penalty)
    ),
    hf.SuppressTokensLogitsProcessor: Kind(
        _forbid, lambda p, batch, vocab: (_mask(p.suppress_tokens.tolist(), vocab), 0, _NEVER), reads_text=True
    ),
    hf.SuppressTokensAtBeginLogitsProcessor: Kind(
        _forbid,
        lambda p, batch, vocab: (_mask(p.begin_suppress_tokens.tolist(), vocab), p.begin_index, p.begin_index + 1),
        reads_text=True,
    ),
    hf.MinLengthLogitsProcessor: Kind(
        _forbid, lambda p, batch, vocab: (_mask(p.eos_token_id.tolist(), vocab), 0, p.min_length), reads_text=True
    ),
    hf.MinNewTokensLengthLogitsProcessor: Kind(
        _forbid,
        lambda p, batch, vocab: (
            _mask(p.eos_token_id.tolist(), vocab),
            0,
            p.prompt_length_to_skip + p.min_new_tokens,
        ),
        reads_text=True,
    ),
    hf.ForcedBOSTokenLogitsProcessor: Kind(
        _force, lambda p, batch, vocab: (_mask([p.bos_token_id], vocab), 1), reads_text=True
    ),
    hf.ForcedEOSTokenLogitsProcessor: Kind(
        _force, lambda p, batch, vocab: (_mask(p.eos_token_id.tolist(), vocab), p.max_length - 1), reads_text=True
    ),
    hf.ExponentialDecayLengthPenalty: Kind(
        _decay,
        lambda p, batch, vocab: (
            _mask(p.eos_token_id.tolist(), vocab),
            p.regulation_start,
            torch.full((batch, 1, 1), p.regulation_factor, dtype=torch.float64, device="cpu"),
        ),
        reads_text=True,
    ),
    hf.RepetitionPenaltyLogitsProcessor: Kind(
        _repetition, lambda p, batch, vocab: (p.penalty, _ignored(p, batch)), reads_text=True
    ),
    hf.NoRepeatNGramLogitsProcessor: Kind(
        _no_repeat_ngrams,
        lambda p, *_: (p.ngram_size,),
        lambda p: max(_NGRAM, _power_of_two(p.ngram_size)),
        reads_text=True,
    ),
    hf.EncoderNoRepeatNGramLogitsProcessor: Kind(
        _bias,
        lambda p, batch, vocab: _biases(_per_row(_prompt_ngrams(p), batch), vocab),
        lambda p: _longer(_prompt_ngrams(p)),
        reads_text=True,
    ),
    hf.SequenceBiasLogitsProcessor: _SEQUENCE_BIAS,
    hf.NoBadWordsLogitsProcessor: _SEQUENCE_BIAS,
}
