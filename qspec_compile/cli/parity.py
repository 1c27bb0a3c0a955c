"""``quantspec parity``: does the quantized pair say what the model says?"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from .console import working
from .errors import CommandError, check_folder, read_text
from .eval import check_lm_eval
from .generate import apply_chat_template
from .help import Command
from .loading import find_pair
from .options import ModelOptions, RunOptions, tokens

_TASKS = "--tasks"


class _ParityCommand(Command):
    """The command, with any number of tasks after one ``--tasks``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Hand ``args`` on with ``--tasks`` before each task, as typer takes a list."""
        return super().parse_args(ctx, list(_one_task_each(args)))


def _one_task_each(arguments: list[str]) -> Iterator[str]:
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument == "--":
            yield from (argument, *remaining)
            return
        if argument != _TASKS:
            yield argument
            continue
        if not remaining or remaining[0].startswith("-"):
            raise CommandError(f"{_TASKS} names no task", "name some after it, or leave it out")
        while remaining and not remaining[0].startswith("-"):
            yield from (_TASKS, remaining.pop(0))


SETTINGS = {
    "cls": _ParityCommand,
    "epilog": "quantspec parity MODEL --output report\nquantspec parity MODEL --tasks reference_choice --limit 64",
}


def _batch_size(value: str | int) -> int | str:
    if isinstance(value, str) and re.fullmatch(r"auto(:\d+)?", value):
        return value
    try:
        return int(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither a number nor 'auto'.") from None


@dataclass(frozen=True)
class ComparisonOptions:
    """The fields of :class:`quantspec.evals.parity.ParityOptions` and their defaults, without importing torch."""

    PANEL: ClassVar[str] = "Comparison"

    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Documents per task, the first ones. [default: all]")
    ] = None
    batch_size: Annotated[
        int,
        typer.Option(parser=_batch_size, metavar="N|auto", help="Sequences of a task answered together."),
    ] = 1
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put the tasks into the model's chat template.")
    ] = False
    context_tokens: Annotated[int, typer.Option(parser=tokens(0), metavar="N", help="Of the long text, prefilled.")] = (
        3072
    )
    scored_tokens: Annotated[
        int, typer.Option(parser=tokens(0), metavar="N", help="Of the long text, read token by token after those.")
    ] = 1024
    prompts: Annotated[
        int, typer.Option(metavar="N", help="Places of the text that are continued greedily; 0 for none.")
    ] = 8
    prompt_tokens: Annotated[int, typer.Option(parser=tokens(0), metavar="N", help="Of each prompt.")] = 1024
    new_tokens: Annotated[int, typer.Option(parser=tokens(0), metavar="N", help="Of each continuation.")] = 64
    max_standard_errors: Annotated[
        float, typer.Option(metavar="X", help="By which a task's metric may differ from the model's.")
    ] = 1.0
    max_paired_standard_errors: Annotated[
        float, typer.Option(metavar="X", help="Of the paired difference, by which it may differ besides.")
    ] = 2.0
    max_perplexity_change: Annotated[
        float, typer.Option(metavar="X", help="Relative, of the target on the text and on tasks with a perplexity.")
    ] = 0.005
    min_argmax_agreement: Annotated[
        float, typer.Option(metavar="X", help="Fraction of the text's tokens with the same argmax, of the target.")
    ] = 0.99
    min_speculative_match: Annotated[
        float, typer.Option(metavar="X", help="Fraction of greedy texts that are the same with and without drafting.")
    ] = 1.0


def command(
    model: ModelOptions,
    run: RunOptions,
    *,
    gguf_file: Annotated[
        str | None, typer.Option(metavar="NAME", help="The GGUF file in MODEL, a folder or a Hub id.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            _TASKS,
            metavar="NAME...",
            help="lm-eval tasks, as `a b` or `a,b`, after MODEL; NAME@LENGTH where they can be made of a length.",
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", exists=True, file_okay=False, help="Folder with further tasks.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The long text; '' for none. [default: Python's language reference]"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write parity.json, parity.md and parity.png there.")
    ] = None,
    comparison: ComparisonOptions,
) -> int:
    names = [name for part in tasks or () for name in part.split(",") if name]
    if names:
        check_lm_eval()
    long_text = read_text(Path(text), "text") if text else text
    if text and not (long_text or "").strip():
        raise CommandError(f"the text in '{text}' is empty", "give another file, or '' for none")
    with working("importing"):
        from quantspec.evals.parity import ParityOptions, measure, prepare, remove_report

    options = ParityOptions(**asdict(comparison))
    found = find_pair(model, run, gguf_file=gguf_file)
    if names and options.apply_chat_template:
        apply_chat_template(found.tokenizer, [{"role": "user", "content": "Hello"}])
    # lm-eval prints notes of its own.
    with contextlib.redirect_stdout(sys.stderr):
        material = prepare(
            found.tokenizer,
            tasks=names,
            text=long_text,
            options=options,
            include_path=include_path,
            max_cache_len=found.limit,
        )
        if output is not None:
            check_folder(output)
            remove_report(output)
        report = measure(found.load(), material, output=output)
    print(report)
    if report.passed is None:
        hint = "give more documents with --limit, other tasks, or a text with --text"
        raise CommandError("no threshold applied to what was measured", hint)
    return 0 if report.passed else 1
