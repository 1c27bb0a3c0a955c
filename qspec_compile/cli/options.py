"""Options that several commands share, as dataclasses that a command takes like any other argument."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, ClassVar, get_type_hints

import typer

from quantspec.config import (
    AUTO,
    DEFAULT_SPECULATIVE_TOKENS,
    MAX_SPECULATIVE_TOKENS,
    Draft,
    DraftAttention,
    QuantSpecConfig,
    WeightQuantizer,
)

from .errors import CommandError

_DEFAULTS = QuantSpecConfig()


class Dtype(StrEnum):
    """Precision of the weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


_UNITS = {"": 1, "k": 2**10, "m": 2**20}


def tokens(least: int = 1) -> Callable[[str | int], int]:
    """Parser of a number of tokens as people write it: 4096, 128k (of 1,024) or 1M."""

    def parse(value: str | int) -> int:
        written = re.fullmatch(r"(\d+)([km]?)", str(value).strip().lower())
        if written is None:
            raise typer.BadParameter(f"{value!r} is no number of tokens, such as 4096 or 128k.")
        number = int(written[1]) * _UNITS[written[2]]
        _check_range(number, least)
        return number

    return parse


def whole(least: int, most: float = math.inf) -> Callable[[str | int], int]:
    """Parser of a whole number from ``least`` to ``most``."""

    def parse(value: str | int) -> int:
        try:
            number = int(value)
        except ValueError:
            raise typer.BadParameter(f"{value!r} is no whole number.") from None
        _check_range(number, least, most)
        return number

    return parse


def real(least: float, most: float = math.inf) -> Callable[[str | float], float]:
    """Parser of a finite number from ``least`` to ``most``."""

    def parse(value: str | float) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise typer.BadParameter(f"{value!r} is no finite number.")
        _check_range(number, least, most)
        return number

    return parse


def _positive(value: str | float) -> float:
    number = real(0)(value)
    if number == 0:
        raise typer.BadParameter("it must be more than 0.")
    return number


def _check_range(number: float, least: float, most: float = math.inf) -> None:
    if not least <= number <= most:
        limits = f"at least {least}" if math.isinf(most) else f"between {least} and {most}"
        raise typer.BadParameter(f"it must be {limits}, not {number}.")


def _int_or_auto(value: str | int) -> int | str:
    if value == AUTO:
        return AUTO
    try:
        return int(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither a number nor 'auto'.") from None


def _help(text: str, option: str) -> str:
    """``text`` and the default that an option of ``convert`` has."""
    return f"{text} [default: {getattr(_DEFAULTS, option)}]"


@dataclass(frozen=True)
class ModelOptions:
    """Which model, in which precision, and how it is converted; None leaves an option at quantspec's default."""

    PANEL: ClassVar[str] = "Model"

    model: Annotated[
        str, typer.Argument(metavar="MODEL", show_default=False, help="Hub id, local folder, saved pair or GGUF file.")
    ]
    dtype: Annotated[
        Dtype,
        typer.Option(
            metavar="DTYPE",
            help="float32, float16, bfloat16, or auto: the checkpoint's own; to run on a CPU without half-precision "
            "matmuls, float32.",
        ),
    ] = Dtype.AUTO
    num_speculative_tokens: Annotated[
        int | None,
        typer.Option(
            "--gamma",
            "--num-speculative-tokens",
            parser=_int_or_auto,
            metavar=f"N|{AUTO}",
            help=f"Tokens drafted per cycle, 0 to {MAX_SPECULATIVE_TOKENS}. "
            f"[default: {DEFAULT_SPECULATIVE_TOKENS} on a GPU, {AUTO} on a CPU and in a server]",
        ),
    ] = None
    draft: Annotated[
        Draft | None,
        typer.Option(
            metavar="NAME", help=_help("Where drafts come from: self, lookup (in the text itself) or both.", "draft")
        ),
    ] = None
    kv_group_size: Annotated[
        int | None,
        typer.Option(metavar="N", help=_help("Tokens quantized together in the KV cache.", "kv_group_size")),
    ] = None
    weight_group_size: Annotated[
        int | None,
        typer.Option(metavar="N", help=_help("Input channels that share an INT4 scale.", "weight_group_size")),
    ] = None
    weight_quantizer: Annotated[
        WeightQuantizer | None,
        typer.Option(metavar="NAME", help=_help("How INT4 scales are chosen: tinygemm or hqq.", "weight_quantizer")),
    ] = None
    quantize_lm_head: Annotated[
        bool | None,
        typer.Option("--quantize-lm-head", help="INT4 for the draft's language-model head too.", show_default=False),
    ] = None
    draft_recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=_help("Which draft: int4, or int4-cache, which reads 4 bits on a CPU too.", "draft_recipe"),
        ),
    ] = None
    draft_attention: Annotated[
        DraftAttention | None,
        typer.Option(
            metavar="NAME",
            help=_help(
                "What drafts read of a long text: full, sparse (the pages that matter) or auto.", "draft_attention"
            ),
        ),
    ] = None
    draft_attention_share: Annotated[
        float | None,
        typer.Option(
            parser=real(0, 1),
            metavar="X",
            help=_help("Share of the cache that sparse drafts read.", "draft_attention_share"),
        ),
    ] = None
    rejection_sampling: Annotated[
        bool | None,
        typer.Option(
            "--rejection-sampling/--no-rejection-sampling",
            help="Accept drafts of sampled texts by their odds: more are, but a seed's text depends on them.",
            show_default=False,
        ),
    ] = None
    max_cache_len: Annotated[
        int | None,
        typer.Option(parser=tokens(), metavar="N", help="Most tokens of a text. [default: the model's context]"),
    ] = None
    rope_context: Annotated[
        int | None,
        typer.Option(
            parser=tokens(),
            metavar="N",
            help="Length of text whose frequencies a RoPE that depends on it has. [default: --max-cache-len]",
        ),
    ] = None

    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a model on the Hub.")
    ] = None
    token: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="For private models on the Hub. [default: of `hf auth login`]"),
    ] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
    ] = False

    def access(self) -> dict[str, Any]:
        """What transformers needs to reach the model, and whether it may run its code: it would ask on stdout."""
        place = {"revision": self.revision, "token": self.token}
        given = {name: value for name, value in place.items() if value is not None}
        return {**given, "trust_remote_code": self.trust_remote_code}

    def conversion(self) -> dict[str, Any]:
        """The options of ``convert`` that were given."""
        names: tuple[str, ...] = ("num_speculative_tokens", "draft", "kv_group_size", "weight_group_size")
        names += ("weight_quantizer", "quantize_lm_head", "draft_recipe", "draft_attention")
        names += ("draft_attention_share", "rejection_sampling", "max_cache_len", "rope_context")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class RunOptions:
    """Where and how the pair runs."""

    PANEL: ClassVar[str] = "Running"

    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N. [default: cuda where there is one]")
    ] = None
    self_check: Annotated[
        bool | None,
        typer.Option(
            "--self-check/--no-self-check",
            show_default=False,
            help="Compare the pair with the model first. [default: self-check]",
        ),
    ] = None
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            show_default=False,
            help="Run through torch.compile. [default: on GPUs]",
        ),
    ] = None

    def conversion(self) -> dict[str, Any]:
        """The options of ``convert`` that were given."""
        return {name: getattr(self, name) for name in ("self_check", "compile") if getattr(self, name) is not None}


TensorParallel = Annotated[
    int,
    typer.Option(
        parser=whole(1),
        metavar="N",
        help="GPUs of this machine to split target, draft and cache over; their processes are started and ended. "
        "On a CPU as many processes, to try it out.",
    ),
]


@dataclass(frozen=True)
class SplitRunOptions(RunOptions):
    """The same of a pair that may be split over several GPUs."""

    tensor_parallel: TensorParallel = 1


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen and when the text ends; None leaves it to the model's generation config."""

    PANEL: ClassVar[str] = "Text"

    max_new_tokens: Annotated[int, typer.Option(parser=tokens(), metavar="N", help="Most tokens to generate.")] = 256
    sample: Annotated[
        bool | None,
        typer.Option(
            "--sample/--greedy",
            show_default=False,
            help="Draw tokens, or take the most likely. [default: as the model's generation config says]",
        ),
    ] = None
    temperature: Annotated[
        float | None, typer.Option(parser=real(0), metavar="X", help="Implies --sample; 0 is --greedy.")
    ] = None
    top_k: Annotated[
        int | None, typer.Option(parser=whole(0), metavar="N", help="Implies --sample; 0 is all tokens.")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(parser=real(0, 1), metavar="X", help="From 0 to 1; implies --sample.")
    ] = None
    min_p: Annotated[
        float | None, typer.Option(parser=real(0, 1), metavar="X", help="From 0 to 1; implies --sample.")
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(parser=_positive, metavar="X", help="Above 0; 1 is none.")
    ] = None
    seed: Annotated[
        int | None, typer.Option(parser=whole(0, 2**63 - 1), metavar="N", help="Makes sampling reproducible.")
    ] = None
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text that ends the output; may be repeated.")
    ] = None

    def generate_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``QuantSpecModel.generate``; stop strings need ``tokenizer`` besides.

        Raises:
            CommandError: options that contradict each other.
        """
        arguments: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        for name in ("repetition_penalty", "seed"):
            if getattr(self, name) is not None:
                arguments[name] = getattr(self, name)
        if self.stop:
            if "" in self.stop:
                raise CommandError("--stop is empty", "give the text that shall end the output, or leave it out")
            arguments["stop_strings"] = self.stop
        warpers = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        warpers = {name: value for name, value in warpers.items() if value is not None}
        greedy = self.sample is False or warpers.get("temperature") == 0
        if greedy and (self.sample or set(warpers) - {"temperature"} or warpers.get("temperature", 0) != 0):
            raise CommandError(
                "greedy search does not sample", "drop --sample, --temperature, --top-k, --top-p, --min-p"
            )
        if greedy:
            return {**arguments, "do_sample": False}
        if self.sample or warpers:
            return {**arguments, "do_sample": True, **warpers}
        return arguments


@functools.cache
def _hints(group: type) -> dict[str, Any]:
    """Types of a group's fields; several commands have the same group, and a help screen shall not wait for it."""
    return get_type_hints(group, include_extras=True)


def expand_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``command`` as typer wants it: each parameter whose type is a dataclass is replaced by that class's fields."""
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            groups[name] = group = hints[name]
            field_hints = _hints(group)
            for part in dataclasses.fields(group):
                parameters.append(_parameter(part.name, field_hints[part.name], part.default))
                for info in field_hints[part.name].__metadata__:
                    if isinstance(info, typer.models.OptionInfo):
                        info.rich_help_panel = group.PANEL
        else:
            parameters.append(_parameter(name, hints[name], parameter.default))

    def expanded(**values: Any) -> Any:
        built = {
            name: group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        return command(**built, **values)

    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return expanded


def _parameter(name: str, hint: Any, default: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if default is dataclasses.MISSING else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
