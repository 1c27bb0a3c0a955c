"""Data of the offline tasks, built when a task is loaded, from the prose of Python's language reference.

Every Python installation carries it as ``pydoc_data.topics``. It differs a little between Python versions, so results
are comparable on one version only; each report names its own.
"""

from __future__ import annotations

import importlib
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset

_SEED = 0
# Documents per task; lm-eval's --limit takes the first ones.
_NUM_DOCUMENTS = 200
_NUM_CHOICES = 4
_CHOICE_CONTEXT = 1600
_CLOZE_TOKENS = 1500
# Of this text, in most vocabularies.
_CHARACTERS_PER_TOKEN = 4
_ROLLING_LENGTH = 3000


def multiple_choice(**_: Any) -> dict[str, Dataset]:
    """Which sentence follows 1,600 characters of the reference; the wrong ones stand a little later in the text."""
    sentences = prose()
    draw = random.Random(_SEED)
    documents = []
    for index in _places(draw, sentences):
        later = range(index + 4, min(index + 60, len(sentences)))
        wrong = [sentences[place] for place in later if _is_choice(sentences[place])]
        if not _is_choice(sentences[index]) or len(set(wrong)) < _NUM_CHOICES:
            continue
        choices = draw.sample(sorted(set(wrong) - {sentences[index]}), _NUM_CHOICES - 1)
        answer = draw.randrange(_NUM_CHOICES)
        choices.insert(answer, sentences[index])
        documents.append({"context": _before(sentences, index, _CHOICE_CONTEXT), "choices": choices, "answer": answer})
    return _test_split(documents)


def cloze(max_seq_lengths: Sequence[int] = (_CLOZE_TOKENS,), **_: Any) -> dict[str, Dataset]:
    """The last word of a sentence, which has occurred in the context before it, of about so many tokens."""
    sentences = prose()
    documents = []
    for tokens in max_seq_lengths:
        for index in _places(random.Random(_SEED), sentences):
            match = re.fullmatch(r"(.+) ([a-z]{4,})\.", sentences[index])
            context = _before(sentences, index, tokens * _CHARACTERS_PER_TOKEN)
            if match and f" {match[2]} " in context:
                documents.append({"context": f"{context} {match[1]}", "word": match[2]})
    return _test_split(documents)


def rolling(**_: Any) -> dict[str, Dataset]:
    """Consecutive passages of about 3,000 characters, for perplexity."""
    documents = []
    passage = ""
    for sentence in prose():
        passage = f"{passage} {sentence}".lstrip()
        if len(passage) >= _ROLLING_LENGTH:
            documents.append({"text": passage})
            passage = ""
    return _test_split(documents)


def prose() -> list[str]:
    """The reference's sentences in order: whole paragraphs of text, without code, grammar, tables and headings."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return list(dict.fromkeys(sentence for name in sorted(topics) for sentence in _sentences(topics[name])))


def _sentences(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        if re.match(r"[A-Z]", paragraph) and paragraph.rstrip().endswith("."):
            yield from re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split()))


def _places(draw: random.Random, sentences: list[str]) -> list[int]:
    """Places in the text, shuffled, so that the first documents come from all over it."""
    # The first ones have too little text before them.
    return draw.sample(range(100, len(sentences)), len(sentences) - 100)


def _is_choice(sentence: str) -> bool:
    return 40 <= len(sentence) <= 200


def _before(sentences: list[str], index: int, characters: int) -> str:
    """The text that precedes a sentence: whole sentences, ``characters`` or slightly more."""
    start, length = index, 0
    while start > 0 and length < characters:
        start -= 1
        length += len(sentences[start]) + 1
    return " ".join(sentences[start:index])


def _test_split(documents: list[dict[str, Any]]) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(documents[:_NUM_DOCUMENTS])}
