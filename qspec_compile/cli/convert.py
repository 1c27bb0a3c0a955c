"""``quantspec convert``: write a converted checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantspec.config import TuneConfig

from .errors import CommandError
from .loading import Kind, find_source
from .options import ModelOptions, RunOptions
from .tune import save_pair

SETTINGS = {"epilog": "quantspec convert MODEL OUT\nquantspec convert MODEL OUT --weight-group-size 64"}


def command(
    model: ModelOptions,
    run: RunOptions,
    out: Annotated[Path, typer.Argument(metavar="OUT", show_default=False, help="Folder to write; new or empty.")],
    tune: Annotated[
        bool, typer.Option("--tune", help="Let the draft learn the model's distribution; options: `quantspec tune`.")
    ] = False,
) -> None:
    """Convert a model (no saved pair) and save the pair, so that loading it quantizes nothing."""
    if find_source(model.model).kind is Kind.PAIR:
        raise CommandError(f"'{model.model}' is a saved pair, converted already", "copy it, or convert its original")
    save_pair(model, run, out, TuneConfig() if tune else None)
