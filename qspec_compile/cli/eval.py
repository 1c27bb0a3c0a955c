"""``quantspec eval``: lm-evaluation-harness on a converted model; every option is lm-eval's."""

from __future__ import annotations

import importlib
import importlib.util

import typer

from quantspec.versions import install_command

from .errors import CommandError
from .help import print_examples, print_panel, print_usage

_ROLES = (
    ("speculative", "Drafting and verifying, as `generate` does. [default]"),
    ("target", "The model over its 8-bit cache, without drafts."),
    ("draft", "The INT4 draft alone."),
    ("reference", "The original model, by transformers."),
)
_TASKS = (
    ("reference_choice", "Multiple choice about Python's language reference."),
    ("reference_cloze", "Its next word; reference_cloze@6000 after 6,000 tokens."),
    ("reference_perplexity", "Its perplexity."),
)
_OPTIONS = (
    (
        "--model_args",
        "pretrained=MODEL, and with commas between: role=ROLE, dtype, device, options of `convert` such as "
        "kv_group_size=64, max_length.",
    ),
    ("--tasks", "Names with commas between; `quantspec eval ls tasks` lists them."),
    ("--include_path", "Folder with further tasks, as YAML files; those above stay known."),
    ("--limit", "Documents of each task, the first ones."),
)
_EXAMPLES = """\
quantspec eval --model_args pretrained=MODEL --tasks reference_choice
quantspec eval --model_args pretrained=MODEL,role=target --tasks my_task --include_path my_tasks"""

SETTINGS = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
}


def command(context: typer.Context) -> int:
    arguments = list(context.args)
    if arguments[:1] in (["-h"], ["--help"]):
        _print_help(context)
        if importlib.util.find_spec("lm_eval") is None:
            return 0
        arguments = ["run", "--help"]
    check_lm_eval()
    # lm-eval would print its own help.
    if arguments in ([], ["run"]):
        hint = "give --model_args pretrained=MODEL --tasks NAME; `quantspec eval --help` lists roles and tasks"
        raise CommandError("eval has no model", hint)
    module = importlib.import_module("quantspec.evals.lm_eval_command")
    return module.run_lm_eval(arguments)


def check_lm_eval() -> None:
    """Raise ``CommandError`` if lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise CommandError("lm-eval is not installed", install_command("eval"))


def _print_help(context: typer.Context) -> None:
    """What is quantspec's own; lm-eval's help comes after it."""
    print_usage("Usage: quantspec eval [run|ls|validate] [OPTIONS]", context.command.help or "")
    print_panel("Roles: --model_args pretrained=MODEL,role=ROLE", _ROLES)
    print_panel("Tasks that need no network", _TASKS)
    print_panel("Most used options of lm-eval; the others follow", _OPTIONS)
    print_examples(_EXAMPLES)
