"""Every code block of the pages: Python runs, shell lines run or are held against what they name.

The blocks of a page share one namespace and one empty working folder and run in order. Hub ids lead to tiny random
models (``doc_blocks.py``), so that a page reads as its reader would write it and nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock
from xml.etree import ElementTree

import huggingface_hub
import pytest
import torch
from doc_blocks import PAGES, ROOT, Block, blocks, fill_hub_cache
from error_messages import SourceMessages, has_in_order, is_said, page_rows, pieces, row_messages
from serving_process import serving

from quantspec.cli import main

# Shown, not run: what a block above prints, and drawings.
SHOWN = {"", "text", "json"}


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Path:
    """A Hub cache that holds the stand-ins."""
    folder = tmp_path_factory.mktemp("hub")
    fill_hub_cache(folder)
    return folder


@pytest.fixture
def workplace(tmp_path, hub, lm_eval, monkeypatch) -> Path:
    """An empty working folder, with the Hub's ids leading to the stand-ins and nowhere else."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_page(page: Path, code: list[Block], folder: Path) -> None:
    """Run ``code`` in order; the lines of a traceback are those of the page."""
    module = ModuleType(f"page_{re.sub(r'[^a-z]', '_', page.stem.lower())}")
    source = folder / f"{module.__name__}.py"
    lines: list[str] = []
    for block in code:
        if block.language == "python":
            lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    # Triton reads the source of a kernel from its file.
    source.write_text("\n".join(lines) + "\n")
    sys.modules[module.__name__] = module
    # A server runs until the end of the page.
    with contextlib.ExitStack() as servers:
        servers.callback(sys.modules.pop, module.__name__)
        for block in code:
            if block.language == "python":
                exec(compile("\n" * (block.line - 1) + block.text, source, "exec"), module.__dict__)
                continue
            for line in commands(block.text):
                if line.startswith("quantspec serve "):
                    cache = huggingface_hub.constants.HF_HUB_CACHE
                    model, *options = shlex.split(line)[2:]
                    servers.enter_context(serving(model, *options, port=8000, HF_HUB_CACHE=cache))
                else:
                    run_command(line)


def commands(text: str) -> list[str]:
    """The command lines of a shell block, continued lines joined, comments left out."""
    joined = text.replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def run_command(line: str) -> None:
    """Run or check one shell line, in which ``echo`` and ``cat`` may feed the command and ``>`` takes its output.

    A command that nobody here knows is an error.
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|>")
    lexer.whitespace_split = True
    words = list(lexer)
    printed, fed = io.StringIO(), ""
    if "|" in words:
        pipe = words.index("|")
        fed, words = _fed_text(words[:pipe]), words[pipe + 1 :]
    target = None
    if words[-2:-1] == [">"]:
        *words, _, target = words
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    run = COMMANDS.get(words[0])
    assert run is not None, f"no test knows the command {words[0]!r} of: {line}"
    with mock.patch.object(sys, "stdin", io.StringIO(fed)), contextlib.redirect_stdout(printed):
        run(words[1:])
    print(printed.getvalue())
    if target is not None:
        Path(target).write_text(printed.getvalue())


def _fed_text(words: list[str]) -> str:
    """What ``echo TEXT`` or ``cat FILE`` prints."""
    assert words[0] in ("echo", "cat"), words
    return " ".join(words[1:]) + "\n" if words[0] == "echo" else Path(words[1]).read_text()


def _quantspec(words: list[str]) -> None:
    """The command line itself, in this process."""
    with warnings.catch_warnings():
        assert main(words) == 0, f"quantspec {' '.join(words)}"


def _make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= set(targets), f"the Makefile has {targets}"


def _pip(words: list[str]) -> None:
    extras = re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    asked = [extra for word in words for group in re.findall(r"\[(.*)\]", word) for extra in group.split(",")]
    assert words[0] == "install"
    assert set(asked) <= set(extras), f"pyproject.toml has the extras {extras}"


def _python(words: list[str]) -> None:
    """A script or module of the repository that knows every option given, or pytest on files that exist."""
    if words[:2] == ["-m", "pytest"]:
        for word in words[2:]:
            if word.startswith("tests/"):
                assert (ROOT / word.split("::")[0]).exists(), word
        return
    name = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
    text = (ROOT / name).read_text()
    for word in words[1:]:
        if word.startswith("--"):
            assert f'"{word}"' in text, f"{name} has no option {word}"


def _curl(words: list[str]) -> None:
    """curl itself, which shall get an answer without an error."""
    answer = subprocess.run(["curl", "--silent", "--show-error", "--fail", *words], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout
    assert '"error"' not in answer.stdout


def _exists(name: str) -> Callable[[list[str]], None]:
    def check(words: list[str]) -> None:
        assert (ROOT / name).exists(), name

    return check


def _sanitizer(words: list[str]) -> None:
    """``compute-sanitizer --tool TOOL python ...``."""
    assert words[0] == "--tool"
    assert words[2] == "python"
    _python(words[3:])


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "quantspec": _quantspec,
    "make": _make,
    "pip": _pip,
    "python": _python,
    "curl": _curl,
    "compute-sanitizer": _sanitizer,
    ".ci/run": _exists(".ci/run"),
    "pre-commit": _exists(".pre-commit-config.yaml"),
    "git": _exists(".gitignore"),
}

WITH_CODE = [page for page in PAGES if any(block.language not in SHOWN for block in blocks(page))]
WITH_GPU_CODE = [page for page in WITH_CODE if any(block.needs_gpu for block in blocks(page))]


def page_id(page: Path) -> str:
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_is_of_a_known_language(page):
    for block in blocks(page):
        assert block.language in SHOWN | {"python", "bash"}, f"line {block.line}: {block.language}"


@pytest.mark.parametrize("page", WITH_CODE, ids=page_id)
def test_code_runs(page, workplace):
    run_page(page, [block for block in blocks(page) if block.language not in SHOWN and not block.needs_gpu], workplace)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="blocks marked as needing a GPU run where there is one")
@pytest.mark.parametrize("page", WITH_GPU_CODE, ids=page_id)
def test_code_for_gpus_runs(page, workplace):
    run_page(page, [block for block in blocks(page) if block.language not in SHOWN], workplace)


# --- what the pages must name ----------------------------------------------------------------------------------------

PACKAGES = ("qspec_compile", "passes", "kernels", "evals")


@pytest.fixture(scope="module")
def sources() -> dict[str, SourceMessages]:
    """Every file of the library, by its path in the repository."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): SourceMessages(path.read_text()) for path in paths}


@pytest.fixture(scope="module")
def message_rows() -> list[str]:
    """The rows of the troubleshooting page that show messages."""
    return page_rows((ROOT / "docs" / "troubleshooting.md").read_text())


def test_raised_messages_are_found():
    """Through variables, constants, alternatives and functions; a shared constant is a message of its own."""
    source = """
AGAIN = "convert the model again"
def problem(x):
    if x: return "its attention is not causal"
    return f"its mask depends on {x}"
def refuse(module, reason): return TypeError(f"cannot convert {module}: {reason}")
def a(path):
    raise ValueError(f"{path!r} is too small; take {path}")
def b(n):
    reason = f"it has heads of {n} dims" if n else "it has no heads"
    raise TypeError(f"cannot convert: {reason}")
def c():
    found = problem(3)
    raise refuse(3, found)
def d():
    raise SavedError(f"cannot read: {AGAIN}", "a hint")
def e():
    raise AttributeError("a protocol of Python")
def f():
    raise
"""
    assert sorted(text for _, text in SourceMessages(source).raised()) == [
        "cannot convert …: …",
        "cannot convert: it has heads of … dims",
        "cannot convert: it has no heads",
        "cannot read: …",
        "convert the model again",
        "its attention is not causal",
        "its mask depends on …",
        "… is too small; take …",
    ]


def test_messages_of_a_page_are_found():
    page = (
        "| option | `no message here` |\n\n| message | why |\n| --- | --- |\n"
        "| `… is too small; take …` (also `name`), `` run `make` now `` | `not this one` |\n\n| `nor this one` | |\n"
    )
    rows = page_rows(page)
    assert len(rows) == 1
    assert row_messages(rows[0]) == ["… is too small; take …", "run `make` now"]


@pytest.mark.parametrize(
    ("message", "text", "same"),
    [
        ("gamma must be an int, not …", "… must be an int, not …", True),
        ("cannot convert module '…': its mask …", "cannot convert module '…': its mask is … tokens wide", True),
        ("value head dim … has 3 groups, 2 are supported on CUDA", "head dims of …: … are supported on CUDA", False),
        ("take … tokens, of the prompt first and then of the rest", "…, of the prompt", False),
        ("at most 2 are supported, on CUDA", "on CUDA, at most … are supported", False),
    ],
)
def test_a_message_is_said_by_its_text_and_by_no_other(message, text, same):
    assert is_said(message, text) == same


def test_troubleshooting_has_every_message(sources, message_rows):
    """Everything constant in a message stands in one row, in order."""
    missing = [
        f"{path}:{line}: {text}"
        for path, source in sources.items()
        for line, text in source.raised()
        if not any(has_in_order(row, pieces(text)) for row in message_rows)
    ]
    assert not missing, "not in docs/troubleshooting.md:\n" + "\n".join(missing)


def test_troubleshooting_has_no_message_that_nothing_says(sources, message_rows):
    texts = {text for source in sources.values() for text in source.all_texts()}
    stale = [
        message
        for row in message_rows
        for message in row_messages(row)
        if not any(is_said(message, text) for text in texts)
    ]
    assert not stale, "in no source file:\n" + "\n".join(stale)


@pytest.mark.parametrize("name", ["quantspec", "quantspec.passes", "quantspec.kernels", "quantspec.evals"])
def test_reference_has_every_public_name(name):
    page = (ROOT / "docs" / "reference" / f"{name.split('.')[-1]}.md").read_text()
    shown = {entry.split(".")[-1] for entry in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
    public = set(importlib.import_module(name).__all__) - {"__version__"}
    assert public <= shown, public - shown


# --- the runner itself -----------------------------------------------------------------------------------------------


def write_page(folder: Path, text: str) -> Path:
    """A page of its own."""
    page = folder / "page.md"
    page.write_text(text)
    return page


def test_blocks_are_found_with_their_lines_and_marks(tmp_path):
    page = write_page(
        tmp_path,
        "# Title\n\n```python\na = 1\n```\n\n<!-- needs a GPU -->\n```python\nb = 2\n```\n\n"
        "1. item\n\n   ```bash\n   make test\n   ```\n",
    )
    assert blocks(page) == [
        Block("python", 4, "a = 1\n", False),
        Block("python", 9, "b = 2\n", True),
        Block("bash", 15, "make test\n", False),
    ]


def test_a_failing_block_fails_at_its_line_of_the_page(tmp_path):
    page = write_page(tmp_path, "text\n\n```python\na = 1\n```\n\n```python\nb = 2\nassert a == b\n```\n")
    with pytest.raises(AssertionError) as failure:
        run_page(page, blocks(page), tmp_path)
    assert failure.traceback[-1].lineno + 1 == 9


@pytest.mark.parametrize(
    "line",
    [
        "make no-such-target",
        "pip install '.[nothing]'",
        "python -m benchmarks.nothing",
        "python -m benchmarks.acceptance --nothing",
        "python -m pytest tests/test_nothing.py",
        "unknown",
    ],
)
def test_a_line_that_could_not_work_is_an_error(line):
    with pytest.raises((AssertionError, FileNotFoundError)):
        run_command(line)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=page_id)
def test_links_lead_to_files_that_exist(page):
    """Links among the pages of ``docs/`` are checked where the documentation is built."""
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text()):
        assert (ROOT / target).exists(), target


def drawn(figure: Path) -> tuple[list[str], list[tuple[str, str]], list[float]]:
    """What an SVG file shows: its texts, each shape's kind and colours, and all coordinates of shapes.

    Outlines of letters are left out, which differ from one version of matplotlib to another.
    """
    text = figure.read_text()
    shapes, coordinates = [], []

    def visit(element: ElementTree.Element) -> None:
        if element.tag.endswith("}defs") or element.get("id", "").startswith("text_"):
            return
        if element.tag.endswith(("}path", "}use")):
            shapes.append((element.tag, element.get("style", "")))
            places = [element.get(name, "") for name in ("d", "x", "y")]
            coordinates.extend(float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", " ".join(places)))
        for child in element:
            visit(child)

    visit(ElementTree.fromstring(text))
    return re.findall(r"<!-- (.*?) -->", text, re.DOTALL), shapes, coordinates


def test_figures_are_those_the_script_draws(tmp_path):
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    committed = sorted((ROOT / "docs" / "figures").glob("*.svg"))
    assert sorted(path.name for path in figures.draw(tmp_path)) == [path.name for path in committed]
    for path in committed:
        texts, shapes, coordinates = drawn(path)
        assert texts
        assert shapes
        of_script = drawn(tmp_path / path.name)
        assert of_script[:2] == (texts, shapes), path.name
        # Points; layouts that make room for letters move a little with their outlines.
        assert of_script[2] == pytest.approx(coordinates, abs=2), path.name
    shown = "".join(page.read_text() for page in PAGES)
    assert all(f"figures/{path.name}" in shown for path in committed)
