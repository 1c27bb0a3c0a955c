"""``quantspec tune``: convert a model, or take a saved pair, tune its draft and save the pair."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from quantspec.checkpoint.new_folder import removed_on_failure
from quantspec.config import TuneConfig

from .console import stderr, working
from .errors import CommandError, check_folder
from .loading import find_pair
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
        int | None, typer.Option(parser=whole(1), metavar="N", help=f"Steps. [default: {_DEFAULTS.steps}]")
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
        typer.Option(parser=real(0, 1), metavar="X", help=f"At its highest. [default: {_DEFAULTS.learning_rate}]"),
    ] = None
    seed: Annotated[
        int | None, typer.Option(parser=whole(0, 2**63 - 1), metavar="N", help=f"[default: {_DEFAULTS.seed}]")
    ] = None

    def config(self) -> TuneConfig:
        """The options, those that were given on top of the defaults."""
        names = ("steps", "window", "windows_per_step", "learning_rate", "seed")
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
    """Convert a model, let its draft learn the model's own distribution, and save the pair."""
    save_pair(model, run, out, tuning.config(), tuning.read_texts())


def save_pair(
    model: ModelOptions, run: RunOptions, out: Path, tune: TuneConfig | None, texts: list[str] | None = None
) -> None:
    """Load or convert ``model``, tune its draft unless ``tune`` is None, and save the pair to ``out``.

    Raises:
        CommandError: ``out`` cannot be a new folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CommandError(f"'{out}' exists and is not an empty folder", "name another one")
    check_folder(out)
    with removed_on_failure(out), tempfile.TemporaryDirectory() as tokenizer:
        found = find_pair(model, run, to_save=True)
        # A tokenizer that cannot be saved says so before the weights are read.
        found.tokenizer.save_pretrained(tokenizer)
        qs = found.load()
        report: Any = None if tune is None else qs.tune(tune, texts=texts, tokenizer=found.tokenizer)
        with working("saving"):
            qs.save_pretrained(out)
            shutil.copytree(tokenizer, out, dirs_exist_ok=True)
    if report is not None:
        stderr().print(str(report), markup=False, soft_wrap=True)
    dtype = str(qs.model.dtype).removeprefix("torch.")
    stderr().print(f"saved to {out} in {dtype}", markup=False, soft_wrap=True)
