"""Options and seeds of single rows of a batch."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)

from quantspec.engine.request import Request

from .arguments import check_eos

# Options that a row may have of its own: they choose its next token, or end it.
ROW_OPTIONS = frozenset(
    """
    bad_words_ids begin_suppress_tokens do_sample encoder_no_repeat_ngram_size encoder_repetition_penalty eos_token_id
    epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id max_length
    max_new_tokens min_length min_new_tokens min_p no_repeat_ngram_size remove_invalid_values renormalize_logits
    repetition_penalty sequence_bias suppress_tokens temperature top_h top_k top_p typical_p
    """.split()  # noqa: SIM905 (a word a line would fill a page)
)


class Prepared(NamedTuple):
    """What Hugging Face made of the options of a row, or of all rows."""

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig

    @property
    def max_length(self) -> int:
        """Most tokens of prompt, padding and output."""
        # A caller's criterion takes the place of the config's.
        lengths = [criterion.max_length for criterion in self.criteria if type(criterion) is MaxLengthCriteria]
        # A length of 8.5 is reached with 9, as in Hugging Face.
        return math.ceil(min(lengths, default=self.config.max_length))

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a row."""
        criteria = (criterion for criterion in self.criteria if type(criterion) is EosTokenCriteria)
        return frozenset(int(token) for criterion in criteria for token in criterion.eos_token_id.flatten().tolist())

    def request(self, prompt: Tensor, width: int, seed: int) -> Request:
        """The request of a row of ``width`` tokens, of which ``prompt`` are no padding."""
        return Request(
            prompt,
            max(1, self.max_length - width),
            self.eos_token_ids,
            self.processors,
            bool(self.config.do_sample),
            seed,
        )


def check_row_options(row_options: Any, structure: Mapping[str, Any]) -> None:
    """Refuse what is no list of dicts, and options that are the whole batch's, as EOS is that of a ``structure``."""
    if row_options is None:
        return
    if not isinstance(row_options, Sequence) or not all(isinstance(options, Mapping) for options in row_options):
        raise TypeError(f"row_options must be a list with a dict of options for each row, not {row_options!r}")
    for row, options in enumerate(row_options):
        if others := sorted(map(str, options.keys() - ROW_OPTIONS)):
            raise ValueError(
                f"row_options[{row}] cannot set {', '.join(others)}: pass it to generate() for the whole batch "
                "(seed= takes a list)"
            )
        if structure and "eos_token_id" in options:
            raise ValueError(
                f"row_options[{row}] cannot set eos_token_id beside {', '.join(structure)}, which ends all rows alike: "
                "pass it to generate() for the whole batch"
            )


def prepare_rows(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    generation_config: GenerationConfig | None,
    options: Mapping[str, Any],
    row_options: Sequence[Mapping[str, Any]],
    rows_per_prompt: int,
) -> list[Prepared]:
    """What Hugging Face makes of each row alone: of ``options``, which are all rows', and its own over them."""
    if len(row_options) != len(input_ids):
        raise ValueError(f"row_options has {len(row_options)} entries and the batch {len(input_ids)} rows; {_PER_ROW}")
    prepared: list[Prepared] = []
    for row, own in enumerate(row_options):
        part = slice(row, row + 1)
        arguments = {**options, "num_return_sequences": 1}
        for name in ("negative_prompt_ids", "negative_prompt_attention_mask"):
            if isinstance(arguments.get(name), Tensor):
                arguments[name] = arguments[name][part]
        if (allowed := arguments.get("prefix_allowed_tokens_fn")) is not None:
            arguments["prefix_allowed_tokens_fn"] = functools.partial(_of_prompt, allowed, row // rows_per_prompt)
        arguments["attention_mask"] = None if attention_mask is None else attention_mask[part]
        try:
            check_eos({**arguments, **own}, (generation_config, model.generation_config))
            prepared.append(prepare_row(model, input_ids[part], generation_config, {**arguments, **own}))
        except Exception as error:
            error.add_note(f"raised for row_options[{row}]")
            raise
    return prepared


def prepare_row(
    model: PreTrainedModel, input_ids: Tensor, generation_config: GenerationConfig | None, options: Mapping[str, Any]
) -> Prepared:
    """What Hugging Face makes of ``options`` for ``input_ids (1, S)``."""
    prepared = None

    def note(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **arguments: Any,
    ) -> Tensor:
        nonlocal prepared
        prepared = Prepared(logits_processor, stopping_criteria, generation_config)
        return input_ids

    type(model).generate(  # type: ignore[attr-defined]
        model, input_ids, generation_config=generation_config, custom_generate=note, **options
    )
    assert prepared is not None
    return prepared


def _of_prompt(allowed: Callable[[int, Tensor], list[int]], prompt: int, _: int, ids: Tensor) -> list[int]:
    """``prefix_allowed_tokens_fn``, which is told the prompt's number, for a row that is a batch of its own."""
    return allowed(prompt, ids)


_PER_ROW = "pass one for each (num_return_sequences makes rows too)"


def check_seed(seed: Any) -> int | list[int]:
    """``seed`` as an int or a list of them, each of 64 bits."""
    # A tensor of one element in a dimension is an index too.
    numbers = seed.tolist() if isinstance(seed, Tensor) else seed
    try:
        return _check_number(numbers)
    except TypeError:
        pass
    try:
        return [_check_number(number) for number in numbers]
    except TypeError:
        raise TypeError(f"seed must be an int, or a list with an int for each row, not {seed!r}") from None


def _check_number(number: Any) -> int:
    if isinstance(number, bool):
        raise TypeError(number)
    number = operator.index(number)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must be between -2**63 and 2**64 - 1, not {number}")
    return number


def row_seeds(seed: int | list[int] | None, generator: torch.Generator | None, batch: int, device: Any) -> list[int]:
    """An int64 for each row: the seeds given, those that follow one, or drawn from ``generator`` (the global if None).

    Raises:
        ValueError: the list has another length.
    """
    if seed is None:
        drawn = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator, device=device)
        return drawn.tolist()
    seeds = [seed + row for row in range(batch)] if isinstance(seed, int) else seed
    if len(seeds) != batch:
        raise ValueError(f"seed has {len(seeds)} numbers and the batch {batch} rows; {_PER_ROW}")
    return [(number + 2**63) % 2**64 - 2**63 for number in seeds]
