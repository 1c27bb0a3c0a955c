"""``quantspec convert``: write a converted checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from quantspec.checkpoint.new_folder import removed_on_failure
from quantspec.config import TuneConfig

from .console import stderr, working
from .errors import CommandError, check_folder
from .loading import Kind, find_pair, find_source
from .options import ModelOptions, RunOptions

SETTINGS = {"epilog": "quantspec convert MODEL OUT\nquantspec convert MODEL OUT --weight-group-size 64"}


def command(
    model: ModelOptions,
    run: RunOptions,
    out: Annotated[Path, typer.Argument(metavar="OUT", show_default=False, help="Folder to write; new or empty.")],
    tune: Annotated[
        bool, typer.Option("--tune", help="Let the draft learn the model's distribution; options: `quantspec tune`.")
    ] = False,
) -> None:
    if find_source(model.model).kind is Kind.PAIR:
        raise CommandError(f"'{model.model}' is a saved pair, converted already", "copy it, or convert its original")
    save_pair(model, run, out, TuneConfig() if tune else None)


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
        report: Any = None
        if tune is not None:
            with working("tuning"):
                report = qs.tune(tune, texts=texts, tokenizer=found.tokenizer)
        with working("saving"):
            qs.save_pretrained(out, tokenizer=found.tokenizer)
    if report is not None:
        stderr().print(str(report), markup=False, soft_wrap=True)
    dtype = str(qs.model.dtype).removeprefix("torch.")
    stderr().print(f"saved to {out} in {dtype}", markup=False, soft_wrap=True)
