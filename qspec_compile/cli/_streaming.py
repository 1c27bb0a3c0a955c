"""Printing an answer as it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

from transformers import PreTrainedTokenizerBase, TextStreamer

from .console import working


class AnswerStreamer(TextStreamer):
    """Prints what follows the prompt, and ends the line only where one was begun: a failed call prints nothing."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before_answer: Callable[[], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._before_answer = before_answer

    @classmethod
    @contextmanager
    def showing_progress(cls, tokenizer: PreTrainedTokenizerBase) -> Iterator[Self]:
        """A streamer, and a progress bar that ends where its first token comes."""
        with ExitStack() as display:
            display.enter_context(working("reading the prompt"))
            yield cls(tokenizer, display.close)

    def put(self, value: Any) -> None:
        """Print the text that ``value``'s tokens complete."""
        # It turns false once the prompt has been put.
        if not self.next_tokens_are_prompt:
            self._before_answer()
        super().put(value)

    def end(self) -> None:
        """Print what is left."""
        if not self.next_tokens_are_prompt:
            super().end()
