"""Whether the installed libraries are those that quantspec was tested with, said where something fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def untested_versions() -> list[str]:
    """A sentence for each library that is installed in another version than quantspec's requirements allow."""
    sentences = []
    for requirement in map(Requirement, requires("quantspec") or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        # A library that is missing altogether says so itself.
        with contextlib.suppress(PackageNotFoundError):
            installed = version(requirement.name)
            if not requirement.specifier.contains(installed, prereleases=True):
                sentences.append(
                    f"{requirement.name} {installed} is installed, but this quantspec was tested with "
                    f"{requirement.name}{requirement.specifier}: install such a version if your input is in order"
                )
    return sentences


@contextlib.contextmanager
def noting_untested_versions() -> Iterator[None]:
    """Add :func:`untested_versions` as notes to an error raised within."""
    try:
        yield
    except Exception as error:
        for sentence in untested_versions():
            if sentence not in getattr(error, "__notes__", ()):
                error.add_note(sentence)
        raise
