"""Printing an answer as it is made."""

from __future__ import annotations

from transformers import TextStreamer


class AnswerStreamer(TextStreamer):
    """Ends the line of an answer only where one was begun: a failed call prints nothing."""

    def end(self) -> None:
        """Print what is left."""
        # It turns false once the prompt has been put.
        if not self.next_tokens_are_prompt:
            super().end()
