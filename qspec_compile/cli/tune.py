"""``quantspec tune``: convert a model, or take a saved pair, tune its draft and save the pair."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from quantspec.config import TuneConfig

from .convert import save_pair
from .errors import CommandError
from .options import ModelOptions, RunOptions, real, tokens, whole

SETTINGS = {"epilog": "quantspec tune MODEL OUT\nquantspec tune MODEL OUT --texts manual.txt --steps 400"}

_DEFAULTS = TuneConfig()


@dataclass(frozen=True)
class TuningOptions:
    """How a draft is tuned; None leaves an option at quantspec's default."""

    PANEL: ClassVar[str] = "Tuning"

    texts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Text like that the pair will be used for: the model writes on from it. May be repeated.",
        ),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(
            parser=whole(0), metavar="N", help=f"Optimizer steps; 0 for GPTQ alone. [default: {_DEFAULTS.steps}]"
        ),
    ] = None
    window: Annotated[
        int | None,
        typer.Option(parser=tokens(4), metavar="N", help=f"Tokens of each text. [default: {_DEFAULTS.window}]"),
    ] = None
    windows_per_step: Annotated[
        int | None,
        typer.Option(parser=whole(1), metavar="N", help=f"Texts of a step. [default: {_DEFAULTS.windows_per_step}]"),
    ] = None
    learning_rate: Annotated[
        float | None,
        typer.Option(
            parser=real(0, 1),
            metavar="X",
            help=f"Most that a scale changes in a step, as a share of it. [default: {_DEFAULTS.learning_rate}]",
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            parser=whole(0, 2**63 - 1), metavar="N", help=f"Of the texts and their order. [default: {_DEFAULTS.seed}]"
        ),
    ] = None

    gptq: Annotated[
        bool | None,
        typer.Option(
            "--gptq/--no-gptq",
            show_default=False,
            help="Choose INT4 codes anew by GPTQ before scales are learned. [default: gptq]",
        ),
    ] = None

    def config(self) -> TuneConfig:
        """The options, those that were given on top of the defaults."""
        names = ("steps", "window", "windows_per_step", "learning_rate", "seed", "gptq")
        given = {name: getattr(self, name) for name in names}
        return TuneConfig.from_options(None, {name: value for name, value in given.items() if value is not None})

    def read_texts(self) -> list[str] | None:
        """What the files hold.

        Raises:
            CommandError: one cannot be read, or is no text.
        """
        if not self.texts:
            return None
        found = []
        for path in self.texts:
            try:
                found.append(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise CommandError(f"cannot read '{path}' as text: {error}", "give files of UTF-8 text") from error
        return found


def command(
    model: ModelOptions,
    tuning: TuningOptions,
    run: RunOptions,
    out: Annotated[Path, typer.Argument(metavar="OUT", show_default=False, help="Folder to write; new or empty.")],
) -> None:
    save_pair(model, run, out, tuning.config(), tuning.read_texts())
