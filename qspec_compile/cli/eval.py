"""``quantspec eval``: lm-evaluation-harness on a converted model; every option is lm-eval's."""

from __future__ import annotations

import importlib
import importlib.util

import typer

from .errors import CommandError

SETTINGS = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
}


def command(context: typer.Context) -> int:
    """Evaluate with lm-eval; options go to it as they are (`quantspec eval --help` lists them)."""
    check_lm_eval()
    module = importlib.import_module("quantspec.evals.lm_eval_command")
    return module.run_lm_eval(list(context.args))


def check_lm_eval() -> None:
    """Raise ``CommandError`` if lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise CommandError("lm-eval is not installed", "pip install 'quantspec[eval]'")
