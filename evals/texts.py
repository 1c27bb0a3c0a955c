"""Long English text that every Python installation carries."""

from __future__ import annotations

import importlib


def python_reference(*topics: str) -> str:
    """Chapters of Python's language reference, with a blank line between them.

    Args:
        *topics: names of ``help()`` topics, such as ``"with"``; all of them, in name order, if none are named.

    Raises:
        KeyError: no topic of that name.
    """
    texts: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(texts[topic] for topic in (topics or sorted(texts)))
