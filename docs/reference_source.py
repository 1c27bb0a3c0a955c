"""What the API reference is made from: a copy of the packages under their import names, docstrings without roles.

MkDocs runs :func:`on_startup`; mkdocstrings loads the extension.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import griffe
from setuptools.config.pyprojecttoml import read_configuration

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "reference"


def on_startup(command: str, dirty: bool) -> None:
    """Lay the folders out as they are installed, so that they are read and not imported."""
    shutil.rmtree(COPY, ignore_errors=True)
    settings = read_configuration(ROOT / "pyproject.toml")
    for name, folder in settings["tool"]["setuptools"]["package-dir"].items():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, COPY / name.replace(".", "/"), ignore=ignored, dirs_exist_ok=True)


# An entry of several names: its indentation, the names, and what they share, with the lines that go on with it.
_SHARED = re.compile(r"^( +)(\w+(?:, \w+)+)(: .*(?:\n\1 +\S.*)*)", re.MULTILINE)


def _one_entry_each(shared: re.Match[str]) -> str:
    return "\n".join(shared[1] + name + shared[3] for name in shared[2].split(", "))


_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")


def _link(obj: griffe.Object, name: str) -> str:
    """``name`` as code, linked to its entry if the reference has one."""
    first, *rest = name.split(".")
    try:
        path = ".".join([obj.resolve(first), *rest])
    except griffe.NameResolutionError:
        path = name
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'


class PlainDocstrings(griffe.Extension):
    """Turns what Markdown and the parser of docstrings do not know into what they do."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Roles become links; names that share a description get it each, since the parser looks their types up."""
        if obj.docstring is None:
            return
        text = _SHARED.sub(_one_entry_each, obj.docstring.value)
        obj.docstring.value = _ROLE.sub(lambda role: _link(obj, role[1]), text)
