"""A conversation with the model on a cache that is kept between turns."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from quantspec import QuantSpecModel

from ._streaming import AnswerStreamer
from .console import stderr
from .errors import CommandError, write_whole
from .generate import apply_chat_template


class Conversation:
    """Messages so far, and the pair that answers.

    Attributes:
        messages: as chat templates take them.
    """

    def __init__(
        self, qs: QuantSpecModel, tokenizer: PreTrainedTokenizerBase, system: str | None, arguments: dict[str, Any]
    ) -> None:
        self.qs = qs
        self.tokenizer = tokenizer
        self.system = system
        self.arguments = arguments
        self.reset()

    @property
    def has_turns(self) -> bool:
        """Whether anything has been answered since the start or the last reset."""
        return any(message["role"] == "assistant" for message in self.messages)

    def reset(self) -> None:
        """Forget every message but the system's."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def answer(self, text: str) -> None:
        """Stream the answer to a user's message to stdout; both join the messages.

        Ctrl-C ends the answer after its current token, and what was said counts. Before the first token it raises
        KeyboardInterrupt, and then, as after any error, the message is forgotten.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        inputs = apply_chat_template(self.tokenizer, messages).to(self.qs.device)
        self._check_room(inputs.input_ids.shape[1])
        interrupt = _Interrupt()
        with interrupt.on_ctrl_c(), AnswerStreamer.showing_progress(self.tokenizer) as streamer:
            output = self.qs.generate(
                **inputs,
                **self.arguments,
                # What the cache holds before the first answer is a warm-up's.
                continue_cache=self.has_turns,
                stopping_criteria=StoppingCriteriaList([interrupt]),
                streamer=streamer,
            )
        new_tokens = output[0, inputs.input_ids.shape[1] :]
        answer = self.tokenizer.decode(new_tokens, skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": str(answer)}]

    def save(self, name: str) -> None:
        """Write the messages to the file ``name``, as a list in JSON or as Markdown.

        Raises:
            CommandError: there is no name, or the file cannot be written.
        """
        if not name:
            raise CommandError("/save names no file", "for example /save talk.md, or talk.json for the messages")
        file = Path(name).expanduser()
        if file.suffix == ".json":
            text = json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n"
        else:
            text = "\n".join(f"**{message['role']}**\n\n{message['content']}\n" for message in self.messages)
        write_whole(file, text)
        stderr().print(f"saved to {file}", markup=False, soft_wrap=True)

    def _check_room(self, num_tokens: int) -> None:
        """Refuse a conversation that has no room for an answer.

        Raises:
            CommandError: it is too long, with what to do about it.
        """
        limit, answer = self.qs.pair.max_len, self.arguments["max_new_tokens"]
        if num_tokens + answer <= limit:
            return
        taken = f"{num_tokens} tokens and an answer of up to {answer} are more than max_cache_len={limit}"
        if self.has_turns:
            message = f"the context is full: the conversation's {taken}"
            raise CommandError(message, "/reset forgets it and makes room, /save FILE keeps a copy before")
        message = f"the message is too long: its {taken}"
        raise CommandError(message, "a shorter one, fewer --max-new-tokens or a larger --max-cache-len fit")


class _Interrupt(StoppingCriteria):
    """Ends an answer at its next token once Ctrl-C was pressed, so that the cache stays in order."""

    def __init__(self) -> None:
        self.has_tokens = False
        self.pressed = False

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        """Whether each row of ``input_ids`` is done, ``(B,)``."""
        self.has_tokens = True
        return torch.full((len(input_ids),), self.pressed, device=input_ids.device)

    @contextmanager
    def on_ctrl_c(self) -> Iterator[None]:
        """Listen for the length of an answer."""
        before = signal.signal(signal.SIGINT, self._press)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _press(self, *_: object) -> None:
        if self.pressed or not self.has_tokens:
            raise KeyboardInterrupt
        self.pressed = True
