"""``quantspec parity``: does the quantized pair say what the model says? Options are those of the parity report."""

from __future__ import annotations

import importlib

import typer

SETTINGS = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
}


def command(context: typer.Context) -> int:
    """Compare a pair with its model; ends with 1 if a threshold is missed (`quantspec parity --help`)."""
    module = importlib.import_module("quantspec.evals.parity")
    try:
        return module.main(list(context.args))
    except SystemExit as stop:
        # argparse ends the program after --help and after a wrong option, which it has explained.
        return int(stop.code or 0)
