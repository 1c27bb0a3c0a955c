"""What can be evaluated of a model: its Hugging Face original, the target, the draft, and the two together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from quantspec import QuantSpecModel
from quantspec.config import DEFAULT_SPECULATIVE_TOKENS
from quantspec.passes import Role


class EvalRole(StrEnum):
    """Who answers."""

    REFERENCE = "reference"
    """The untouched Hugging Face model."""
    TARGET = "target"
    """The model's weights over the 8-bit cache."""
    SPECULATIVE = "speculative"
    """Drafted and verified, so emitted by the target."""
    DRAFT = "draft"
    """INT4 weights over the 4-bit cache; on a CPU over what the target reads, unless ``draft_recipe="int4-cache"``."""

    @classmethod
    def parse(cls, name: str) -> EvalRole:
        """The role called ``name``.

        Raises:
            ValueError: there is none; lists the roles.
        """
        try:
            return cls(name)
        except ValueError:
            raise ValueError(f"role must be one of {', '.join(role.value for role in cls)}, not {name!r}") from None

    @property
    def graph(self) -> Role:
        """The graph whose distribution the role emits.

        Raises:
            ValueError: of the reference, which has none.
        """
        if self is EvalRole.REFERENCE:
            raise ValueError("the reference is the Hugging Face model itself, not one of the pair's graphs")
        return Role.DRAFT if self is EvalRole.DRAFT else Role.TARGET


def decoding_method(
    qs: QuantSpecModel, role: EvalRole, num_speculative_tokens: int | str | None = None
) -> Callable[..., Any] | None:
    """How ``role`` decodes, for ``qs.model.generate(custom_generate=...)``; None is Hugging Face's own way.

    ``num_speculative_tokens`` overrides the config's number for the role ``speculative``, which drafts where neither is
    given, on a CPU too.
    """
    if role is EvalRole.REFERENCE:
        return None
    drafted = num_speculative_tokens if role is EvalRole.SPECULATIVE else 0
    if drafted is None and qs.config.num_speculative_tokens is None:
        drafted = DEFAULT_SPECULATIVE_TOKENS
    return functools.partial(qs.decode, num_speculative_tokens=drafted, verifier=role.graph)
