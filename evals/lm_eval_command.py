"""lm-eval's own command line with the model ``quantspec`` and the offline tasks known to it."""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from quantspec.versions import install_command

TASKS = Path(__file__).parent / "tasks"


def require_lm_eval() -> None:
    """Raise ``ModuleNotFoundError`` with the command that installs lm-eval if it is missing."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"lm-eval is not installed: run `{install_command('eval')}`") from error


def run_lm_eval(arguments: list[str]) -> int:
    """Run ``lm_eval`` with ``arguments``, any of its options and subcommands; returns the exit status.

    The model is ``quantspec`` unless ``--model`` or the file of ``--config`` says otherwise. The offline tasks are
    known beside those of ``--include_path``, or of the file's ``include_path`` without one.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        ValueError: no model is named.
    """
    require_lm_eval()
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    import quantspec.evals  # noqa: F401

    setup_logging()
    with _command_line(arguments):
        cli = HarnessCLI()
        try:
            options = cli.parse_args()
            config = _config_file(options)
            if "include_path" in options:
                folders = options.include_path or config.get("include_path") or []
                options.include_path = [str(TASKS), *([folders] if isinstance(folders, str) else folders)]
            if options.command == "run":
                options.model = options.model or config.get("model") or "quantspec"
                _check_model(options, config)
            cli.execute(options)
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def _check_model(options: Namespace, config: dict[str, Any]) -> None:
    """Refuse to begin without a model, which lm-eval would tell of much later."""
    if options.model == "quantspec" and "pretrained" not in str(options.model_args or config.get("model_args") or ""):
        raise ValueError("eval has no model: give --model_args pretrained=MODEL, with ,role=ROLE for one of its roles")


def _config_file(options: Namespace) -> dict[str, Any]:
    """What stands in the file of ``--config``, which lm-eval reads again when it merges it with the options."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    path = getattr(options, "config", None)
    return EvaluatorConfig.load_yaml_config(path) if path else {}


@contextlib.contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    # lm-eval's parser takes its arguments from there and nowhere else.
    with mock.patch.object(sys, "argv", ["lm_eval", *arguments]):
        yield
