"""Names of modules as people read them; imports nothing that takes long."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_LAYER_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def without_number(name: str) -> str:
    """A dotted name with a star in the place of the layer's number."""
    return _LAYER_NUMBER.sub(".*", name)


def named_once(names: Iterable[str]) -> list[str]:
    """Names that differ in the layer's number as one, with how many there are."""
    counts = Counter(map(without_number, names))
    return [f"{name} ({count})" if "*" in name else name for name, count in counts.items()]
