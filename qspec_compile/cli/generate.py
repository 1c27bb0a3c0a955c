"""``quantspec generate``: continue a text."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import print_rows, working
from .errors import CommandError, read_stdin, read_text
from .loading import find_pair
from .options import ModelOptions, SamplingOptions, SplitRunOptions

# Cycles of the number of drafts that is timed, and with --gamma auto of those it begins with.
_WARM_UP_TOKENS = 20

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

    from quantspec import QuantSpecModel


SETTINGS = {
    "epilog": 'quantspec generate MODEL "Once upon a time" --max-new-tokens 64\n'
    'quantspec generate MODEL --file report.txt "Summarize this." --chat'
}


def command(
    model: ModelOptions,
    run: SplitRunOptions,
    sampling: SamplingOptions,
    prompt: Annotated[
        str | None, typer.Argument(show_default=False, help="The text; - or nothing: read stdin.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read the prompt, or a document that goes before it, from FILE.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Make the text JSON that the JSON schema in FILE allows.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Make the text match a regular expression, in Rust's syntax.")
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Make the text follow the Lark grammar in FILE.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: text, token counts, statistics.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print the statistics to stderr.")] = False,
) -> None:
    text = read_prompt(prompt, file)
    arguments = sampling.generate_arguments()
    given = {
        "json_schema": None if json_schema is None else read_text(json_schema, "JSON schema"),
        "regex": regex,
        "grammar": None if grammar is None else read_text(grammar, "grammar"),
    }
    structure = {name: source for name, source in given.items() if source is not None}
    found = find_pair(model, run, generation=arguments, num_ranks=run.tensor_parallel)
    tokenizer = found.tokenizer
    if structure:
        check_structure(structure, tokenizer)
    inputs = encode(tokenizer, text, chat)
    num_tokens = inputs.input_ids.shape[1]
    if num_tokens == 0:
        raise CommandError("the prompt has no tokens", "give some text")
    found.check_fit(num_tokens + arguments["max_new_tokens"])
    with contextlib.closing(found.load()) as qs:
        arguments = {
            **inputs.to(qs.device),
            **arguments,
            **structure,
            "num_speculative_tokens": model.num_speculative_tokens,
            "draft": model.draft,
            "tokenizer": tokenizer,
        }
        warm_up(qs, arguments)
        new_tokens = _generate(qs, tokenizer, arguments, stream=not as_json)
        if as_json:
            print(json.dumps(_as_json(qs, tokenizer, new_tokens), ensure_ascii=False))
        if stats and qs.last_stats is not None:
            print_rows(str(qs.last_stats))


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The text from wherever it was given: a document from the file, and after it what to do with it.

    Raises:
        CommandError: none was given, or it is empty.
    """
    document = None if file is None else read_text(file, "prompt")
    if document is not None and not document.strip():
        raise CommandError(f"the text in '{file}' is empty", "give another file")
    if document is not None and prompt is None:
        return document
    if prompt is not None and prompt != "-":
        text = prompt
    elif sys.stdin is None or sys.stdin.closed or (prompt is None and sys.stdin.isatty()):
        raise CommandError("no prompt", "give it as an argument, with --file, or on stdin")
    else:
        text = read_stdin()
        if not text.strip():
            # A shell's empty variable comes as a line.
            text = ""
    if not text:
        raise CommandError("the prompt is empty", "give it as an argument, with --file, or on stdin")
    return text if document is None else f"{document.rstrip()}\n\n{text}"


def check_structure(structure: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what ``generate`` could not follow, before weights are read."""
    from quantspec.hugging_face.structured import grammar_processor

    # Which tokens end a text is the model's to say, and what a grammar is does not depend on it.
    end = tokenizer.eos_token_id
    grammar_processor(structure, tokenizer, [0 if end is None else end], len(tokenizer))


def encode(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> BatchEncoding:
    """``input_ids`` and ``attention_mask`` of the prompt, ``(1, S)``, as it is or as a user's message."""
    if not chat:
        return tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    return apply_chat_template(tokenizer, [{"role": "user", "content": text}])


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> BatchEncoding:
    """``input_ids`` and ``attention_mask`` of a conversation that awaits the model's answer, ``(1, S)``.

    Raises:
        CommandError: the tokenizer has no chat template, or it does not take these messages.
    """
    if tokenizer.chat_template is None:
        raise CommandError("the model's tokenizer has no chat template", "use an instruction-tuned model")
    from jinja2 import TemplateError

    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except TemplateError as error:
        message = f"the model's chat template refuses the messages: {error}"
        raise CommandError(message, "not every template takes a --system message") from error
    return encoded  # type: ignore[return-value]


def warm_up(qs: QuantSpecModel, arguments: dict[str, Any]) -> None:
    """Compile the pair and capture its cycles, where that is done, before anything is timed.

    It begins the very call that ``arguments`` make, since what is compiled depends on the length of the cache, on the
    prompt and on how tokens are sampled, and ends it after a few tokens.
    """
    if not (qs.compiles or qs.pair.captures_cycles):
        return
    from transformers import StoppingCriteriaList

    from ._warm_up import FirstFew

    new_tokens = min(_WARM_UP_TOKENS, arguments["max_new_tokens"])
    few = FirstFew(arguments["input_ids"].shape[1] + new_tokens)
    started = {name: value for name, value in arguments.items() if name != "stop_strings"}
    with working("compiling (once)"):
        qs.generate(**started, eos_token_id=None, stopping_criteria=StoppingCriteriaList([few]))
    qs.session.last_stats = None


def _generate(
    qs: QuantSpecModel, tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any], stream: bool
) -> list[int]:
    """Token ids after the prompt; printed as they come if ``stream``."""
    from ._streaming import AnswerStreamer

    if stream:
        with AnswerStreamer.showing_progress(tokenizer) as streamer:
            output = qs.generate(**arguments, streamer=streamer)
    else:
        with working("generating"):
            output = qs.generate(**arguments)
    return output[0, arguments["input_ids"].shape[1] :].tolist()


def _as_json(qs: QuantSpecModel, tokenizer: PreTrainedTokenizerBase, new_tokens: list[int]) -> dict[str, Any]:
    assert qs.last_stats is not None
    return {
        "text": tokenizer.decode(new_tokens, skip_special_tokens=True),
        "prompt_tokens": qs.last_stats.prompt_tokens,
        "generated_tokens": qs.last_stats.generated_tokens,
        "statistics": qs.last_stats.as_dict(),
    }
