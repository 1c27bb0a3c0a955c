"""What is handed over: metadata, the README as an index shows it, the wheel's modules, the container's recipe."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_floors import arrows

from quantspec.cli import main

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
LOCK = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def test_metadata_has_what_an_index_shows():
    assert PROJECT["authors"]
    assert PROJECT["maintainers"]
    assert {"Homepage", "Documentation", "Repository", "Issues", "Changelog"} <= PROJECT["urls"].keys()
    versions = {line.split(" :: ")[-1] for line in PROJECT["classifiers"] if "Python :: 3." in line}
    assert versions == {"3.11", "3.12", "3.13"}


def test_links_of_the_readme_are_absolute_on_an_index():
    """Pages open, pictures are shown, headings are found in the repository, addresses stay."""
    base = f"{PROJECT['urls']['Repository']}/{{}}/v{PROJECT['version']}/"
    text = "[a](docs/a.md#b) ![c](d.svg) [e](#f) [g](https://h.i)"
    assert SETUP["absolute_links"](text, PROJECT) == (
        f"[a]({base.format('blob')}docs/a.md#b) ![c]({base.format('raw')}d.svg) [e]({base.format('blob')}README.md#f) "
        "[g](https://h.i)"
    )
    readme = (ROOT / "README.md").read_text()
    shown = SETUP["absolute_links"](readme, PROJECT)
    assert not re.findall(r"\]\((?!https?://)", shown)
    for kind, target in re.findall(rf"\({re.escape(PROJECT['urls']['Repository'])}/(\w+)/v[\d.]+/([^)#]+)", shown):
        assert (ROOT / target).exists(), target
        assert (kind == "raw") == target.endswith(".svg"), target


def test_the_wheel_has_the_benchmarks_that_the_command_runs_and_no_others():
    graph = arrows()
    needed = with_imports({name for name in graph if name.startswith("cli.")}, graph)
    modules = {name.removeprefix("benchmarks.") for name in needed if name.startswith("benchmarks.")}
    assert modules | {"__init__"} == SETUP["BENCHMARKS"]


def with_imports(names: set[str], graph: dict[str, set[str]]) -> set[str]:
    """``names`` and all that they import, directly or not."""
    found: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= graph[name] - found
    return found


def test_the_container_is_built_on_cuda_with_the_locks_torch():
    """The base brings torch, which the lock must not replace by another."""
    (base, *stages) = [argument for name, argument in instructions() if name == "FROM"]
    image = re.fullmatch(r"pytorch/pytorch:([\d.]+)-cuda([\d.]+)-cudnn\d+-devel AS (\w+)", base)
    assert image is not None, base
    torch, cuda, name = image.groups()
    assert torch == LOCK["torch"]
    assert LOCK["cuda-toolkit"].startswith(f"{cuda}.")
    assert stages == [f"{name} AS wheel", name]
    assert "PIP_CONSTRAINT=/opt/quantspec/constraints.txt" in (ROOT / "Dockerfile").read_text()


def test_the_container_asks_for_nothing_beyond_the_package_index():
    for name, argument in instructions():
        assert name != "ADD"
        if name == "RUN":
            programs = {shlex.split(command)[0] for command in argument.split("&&")}
            assert programs <= {"pip", "rm"}, argument


def test_the_container_copies_what_the_wheel_is_built_from():
    """Every source is there, let through by .dockerignore, and every package among them."""
    copied = [
        word
        for name, argument in instructions()
        if name == "COPY" and not argument.startswith("--from")
        for word in argument.split()[:-1]
    ]
    let_through = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["package-dir"].values()) <= set(copied)
    assert {"pyproject.toml", "setup.py", "constraints.txt", PROJECT["readme"]} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source in let_through, source


def test_the_container_serves(capsys, monkeypatch):
    """Its entry point is a script of the package, and the options are those of the command."""
    (entry,) = (json.loads(argument) for name, argument in instructions() if name == "ENTRYPOINT")
    assert entry[0] in PROJECT["scripts"]
    monkeypatch.setenv("COLUMNS", "200")
    assert main([entry[1], "--help"]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in entry if word.startswith("--"))
    (extras,) = re.findall(r"\[([\w,]+)\]\"", " ".join(argument for name, argument in instructions() if name == "RUN"))
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    assert "serve" in extras.split(",")
    (port,) = (argument for name, argument in instructions() if name == "EXPOSE")
    assert port in told


def test_the_oldest_releases_are_those_that_contributors_read_of():
    """The table of versions begins at what the metadata allows."""
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Versions")[1].split("\n\n")[1]
    told = {cells[1].strip().lower(): cells for line in table.splitlines() if len(cells := line.split("|")) > 3}
    for requirement in map(Requirement, PROJECT["dependencies"]):
        if requirement.name in told:
            (oldest,) = (one.version for one in requirement.specifier if one.operator == ">=")
            _, _, supported, run, _ = told[requirement.name]
            assert re.match(r"[\d.]+", supported.strip())[0] == oldest
            assert f"{oldest}." in run
    assert {"torch", "triton", "transformers", "torchao"} <= told.keys()


def test_the_tests_that_run_with_the_oldest_releases_exist():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (listed,) = re.findall(r"^OLDEST_TESTS := \$\(addprefix tests/, (.*)\)$", makefile, re.MULTILINE)
    for name in listed.split():
        file, _, function = name.partition("::")
        text = (ROOT / "tests" / file).read_text()
        assert not function or f"\ndef {function}(" in text, name


@pytest.mark.parametrize("folder", ["tests", "docs", "examples", ".ci"])
def test_the_sdist_has_what_builds_and_tests_it(folder):
    assert f"graft {folder}" in (ROOT / "MANIFEST.in").read_text().splitlines()
