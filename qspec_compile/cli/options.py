"""Options that several commands share, as dataclasses that a command takes like any other argument."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, get_type_hints

import typer
from rich.markup import escape

from quantspec.config import AUTO, MAX_SPECULATIVE_TOKENS, QuantSpecConfig, WeightQuantizer

from .errors import CommandError

_DEFAULTS = QuantSpecConfig()


class Dtype(StrEnum):
    """Precision of the weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def _int_or_auto(value: str | int) -> int | str:
    if value == AUTO:
        return AUTO
    try:
        return int(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither a number nor 'auto'.") from None


def _help(text: str, option: str) -> str:
    """``text`` and the default that an option of ``convert`` has."""
    return escape(f"{text} [default: {getattr(_DEFAULTS, option)}]")


@dataclass(frozen=True)
class ModelOptions:
    """Which model, in which precision, and how it is converted; None leaves an option at quantspec's default."""

    model: Annotated[
        str, typer.Argument(metavar="MODEL", show_default=False, help="Hub id, local folder, saved pair or GGUF file.")
    ]
    dtype: Annotated[
        Dtype,
        typer.Option(help="auto: the checkpoint's own; to run on a CPU without half-precision matmuls, float32."),
    ] = Dtype.AUTO
    num_speculative_tokens: Annotated[
        int | None,
        typer.Option(
            "--gamma",
            "--num-speculative-tokens",
            parser=_int_or_auto,
            metavar=f"INTEGER|{AUTO}",
            help=_help(f"Tokens drafted per cycle, 0 to {MAX_SPECULATIVE_TOKENS}.", "num_speculative_tokens"),
        ),
    ] = None
    kv_group_size: Annotated[
        int | None, typer.Option(help=_help("Tokens quantized together in the KV cache.", "kv_group_size"))
    ] = None
    weight_group_size: Annotated[
        int | None, typer.Option(help=_help("Input channels that share an INT4 scale.", "weight_group_size"))
    ] = None
    weight_quantizer: Annotated[
        WeightQuantizer | None, typer.Option(help=_help("How INT4 scales are chosen.", "weight_quantizer"))
    ] = None
    quantize_lm_head: Annotated[
        bool | None,
        typer.Option("--quantize-lm-head", help="INT4 for the draft's language-model head too.", show_default=False),
    ] = None
    max_cache_len: Annotated[
        int | None, typer.Option(help=escape("Most tokens of a text. [default: the model's context]"))
    ] = None

    def conversion(self) -> dict[str, Any]:
        """The options of ``convert`` that were given."""
        names: tuple[str, ...] = ("num_speculative_tokens", "kv_group_size", "weight_group_size", "weight_quantizer")
        names += ("quantize_lm_head", "max_cache_len")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class RunOptions:
    """Where and how the pair runs."""

    device: Annotated[
        str | None, typer.Option(help=escape("cpu, cuda or cuda:N. [default: cuda where there is one]"))
    ] = None
    self_check: Annotated[
        bool | None,
        typer.Option(
            "--self-check/--no-self-check",
            show_default=False,
            help=escape("Compare the pair with the model first. [default: self-check]"),
        ),
    ] = None
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            show_default=False,
            help=escape("Run through torch.compile. [default: on GPUs]"),
        ),
    ] = None

    def conversion(self) -> dict[str, Any]:
        """The options of ``convert`` that were given."""
        return {name: getattr(self, name) for name in ("self_check", "compile") if getattr(self, name) is not None}


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen and when the text ends; None leaves it to the model's generation config."""

    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256
    sample: Annotated[
        bool | None,
        typer.Option(
            "--sample/--greedy",
            show_default=False,
            help=escape("Draw tokens, or take the most likely. [default: as the model's generation config says]"),
        ),
    ] = None
    temperature: Annotated[float | None, typer.Option(help="Implies --sample; 0 is --greedy.")] = None
    top_k: Annotated[int | None, typer.Option(help="Implies --sample.")] = None
    top_p: Annotated[float | None, typer.Option(help="Implies --sample.")] = None
    min_p: Annotated[float | None, typer.Option(help="Implies --sample.")] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is none.")] = None
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Makes sampling reproducible.")] = None
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output; may be repeated.")] = None

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


def expand_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``command`` as typer wants it: each parameter whose type is a dataclass is replaced by that class's fields."""
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            groups[name] = group = hints[name]
            field_hints = get_type_hints(group, include_extras=True)
            parameters += [_parameter(f.name, field_hints[f.name], f.default) for f in dataclasses.fields(group)]
        else:
            parameters.append(_parameter(name, hints[name], parameter.default))

    def expanded(**values: Any) -> Any:
        built = {
            name: group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        return command(**built, **values)

    expanded.__doc__ = command.__doc__
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return expanded


def _parameter(name: str, hint: Any, default: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if default is dataclasses.MISSING else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
