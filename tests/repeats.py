"""Cases of a kind that others show: ``make nightly`` runs them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def repeat(*values: Any) -> Any:
    """A case for ``make nightly`` alone."""
    return pytest.param(*values, marks=pytest.mark.nightly)


def only(shown: Iterable[str], names: Iterable[str]) -> list[Any]:
    """``names`` as cases of a test, those that are not among ``shown`` for ``make nightly`` alone."""
    shown, names = set(shown), list(names)
    assert shown <= set(names), shown - set(names)
    return [name if name in shown else repeat(name) for name in names]
