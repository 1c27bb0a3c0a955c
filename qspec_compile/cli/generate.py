"""``quantspec generate``: continue a text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import stderr, working
from .errors import CommandError, read_text
from .loading import load_pair
from .options import ModelOptions, RunOptions, SamplingOptions

# Cycles of the number of drafts that is timed, and with --gamma auto of those it begins with.
_WARM_UP_TOKENS = 20

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

    from quantspec import QuantSpecModel


def command(
    model: ModelOptions,
    run: RunOptions,
    sampling: SamplingOptions,
    prompt: Annotated[
        str | None, typer.Argument(show_default=False, help="The text; - or nothing: read stdin.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: text, token counts, statistics.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print the statistics to stderr.")] = False,
) -> None:
    """Continue a prompt, streaming the new text to stdout."""
    text = read_prompt(prompt, file)
    arguments = sampling.generate_arguments()
    qs, tokenizer = load_pair(model, run)
    inputs = encode(tokenizer, text, chat).to(qs.device)
    if inputs.input_ids.shape[1] == 0:
        raise CommandError("the prompt has no tokens", "give some text")
    arguments = {**inputs, **arguments, "num_speculative_tokens": model.num_speculative_tokens, "tokenizer": tokenizer}
    warm_up(qs, arguments)
    new_tokens = _generate(qs, tokenizer, arguments, stream=not as_json)
    if as_json:
        print(json.dumps(_as_json(qs, tokenizer, new_tokens), ensure_ascii=False))
    if stats:
        stderr().print(str(qs.last_stats), markup=False)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The text from wherever it was given.

    Raises:
        CommandError: from two places, from none, or empty.
    """
    if prompt is not None and file is not None:
        raise CommandError("two prompts: the argument and --file", "give one of them")
    if file is not None:
        text = read_text(file, "prompt")
    elif prompt is not None and prompt != "-":
        text = prompt
    elif sys.stdin is None or sys.stdin.closed or (prompt is None and sys.stdin.isatty()):
        raise CommandError("no prompt", "give it as an argument, with --file, or on stdin")
    else:
        text = sys.stdin.read()
    if not text.strip():
        raise CommandError("the prompt is empty", "give it as an argument, with --file, or on stdin")
    return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> BatchEncoding:
    """``input_ids`` and ``attention_mask`` of the prompt, ``(1, S)``, as it is or as a user's message."""
    if not chat:
        return tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    return apply_chat_template(tokenizer, [{"role": "user", "content": text}])


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> BatchEncoding:
    """``input_ids`` and ``attention_mask`` of a conversation that awaits the model's answer, ``(1, S)``.

    Raises:
        CommandError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise CommandError("the model's tokenizer has no chat template", "use an instruction-tuned model")
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return encoded  # type: ignore[return-value]


def warm_up(qs: QuantSpecModel, arguments: dict[str, Any]) -> None:
    """Compile the pair, if it is to be compiled, before anything is timed.

    It begins the very call that ``arguments`` make, since what is compiled depends on the length of the cache, on the
    prompt and on how tokens are sampled, and ends it after a few tokens.
    """
    if not qs.compiles:
        return
    from transformers import MaxLengthCriteria, StoppingCriteriaList

    new_tokens = min(_WARM_UP_TOKENS, arguments["max_new_tokens"])
    few = MaxLengthCriteria(arguments["input_ids"].shape[1] + new_tokens)
    started = {name: value for name, value in arguments.items() if name != "stop_strings"}
    with working("compiling (once)"):
        qs.generate(**started, eos_token_id=None, stopping_criteria=StoppingCriteriaList([few]))
    qs.last_stats = None


def _generate(
    qs: QuantSpecModel, tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any], stream: bool
) -> list[int]:
    """Token ids after the prompt; printed as they come if ``stream``."""
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    output = qs.generate(**arguments, streamer=streamer)
    return output[0, arguments["input_ids"].shape[1] :].tolist()


def _as_json(qs: QuantSpecModel, tokenizer: PreTrainedTokenizerBase, new_tokens: list[int]) -> dict[str, Any]:
    assert qs.last_stats is not None
    return {
        "text": tokenizer.decode(new_tokens, skip_special_tokens=True),
        "prompt_tokens": qs.last_stats.prompt_tokens,
        "generated_tokens": qs.last_stats.generated_tokens,
        "statistics": qs.last_stats.as_dict(),
    }
