"""An error says so where a library is installed in a version that was not tested."""

from __future__ import annotations

from importlib import metadata

import pytest

import quantspec
from quantspec import versions
from quantspec.cli.errors import describe

NOTE = r"transformers 9\.1\.0 is installed, but this quantspec was tested with transformers<5\.\d+,>=5\.15"
TESTED = {"transformers": "5.24.0", "torchao": "0.18.0", "torch": "2.13.0+cpu", "triton": "3.7.1"}


def install(monkeypatch, **others: str) -> None:
    """As if these versions were installed, which the environment's need not be."""
    actual = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: {**TESTED, **others}.get(name) or actual(name))


@pytest.fixture
def newer_transformers(monkeypatch):
    install(monkeypatch, transformers="9.1.0")


def notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


@pytest.mark.parametrize(
    "fails",
    [
        lambda qs, folder: quantspec.convert("a name"),
        lambda qs, folder: qs.generate("a text"),
        lambda qs, folder: quantspec.from_pretrained(folder),
    ],
    ids=["convert", "generate", "from_pretrained"],
)
def test_an_error_names_both_versions(newer_transformers, fails, qs, tmp_path):
    """Once, in a note of the traceback and in brackets behind a command's message."""
    with pytest.raises(Exception, match=NOTE) as caught:
        fails(qs, tmp_path)
    assert len(notes(caught.value)) == 1
    assert notes(caught.value)[0] in describe(caught.value)[1]


def test_a_failing_import_names_both_versions(newer_transformers, monkeypatch):
    """A newer library may lack what quantspec imports."""
    # Another test may have left it there.
    monkeypatch.delitem(vars(quantspec), "convert", raising=False)
    monkeypatch.setitem(quantspec._MODULES, "convert", "no_such_module")
    with pytest.raises(ImportError, match=NOTE):
        quantspec.convert  # noqa: B018


@pytest.mark.parametrize("installed", ["5.24.3", "5.15.0"])
def test_tested_versions_are_not_mentioned(monkeypatch, installed):
    """The caps are of minor versions, and a local build of torch counts as its version."""
    install(monkeypatch, transformers=installed)
    assert versions.untested_versions() == []
    with pytest.raises(TypeError) as caught:
        quantspec.convert("a name")
    assert not notes(caught.value)
