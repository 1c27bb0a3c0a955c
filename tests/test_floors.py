"""The direction of imports: a file imports from its own floor or below, and no files import each other in a circle.

Every import counts: those inside functions, and those for type checkers alone.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration

ROOT = Path(__file__).parent.parent
FLOORS = (
    ("errors", "config", "versions", "locks", "interrupts", "logging", "html", "names", "freed_memory"),
    ("kernels",),
    ("passes",),
    ("capture", "cache", "ranks"),
    ("pair", "memory"),
    ("engine", "self_check", "backend"),
    ("hugging_face", "checkpoint", "cycle_times", "tensor_parallel", "tuning"),
    ("pictures", "picture_sheet", "picture_figure", "picture_style", "model", "serving", "__init__"),
    ("evals",),
    ("benchmarks",),
    ("cli", "__main__"),
)


def source_files() -> dict[str, Path]:
    """Every module of the installed packages by its name, ``quantspec.`` left out."""
    packages = read_configuration(ROOT / "pyproject.toml")["tool"]["setuptools"]["package-dir"]
    found = {}
    for package, folder in packages.items():
        prefix = package.removeprefix("quantspec").removeprefix(".")
        for path in (ROOT / folder).rglob("*.py"):
            if "tasks" not in path.parts:
                name = ".".join(filter(None, (prefix, *path.relative_to(ROOT / folder).with_suffix("").parts)))
                found[name.removesuffix(".__init__")] = path
    return found


def imported(name: str, path: Path, known: set[str]) -> set[str]:
    """Modules of ours that the file of module ``name`` imports, wherever in it."""
    package = name if path.name == "__init__.py" and name != "__init__" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names if alias.name.split(".")[0] == "quantspec"]
            found |= {target.removeprefix("quantspec").removeprefix(".") or "__init__" for target in targets}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, (*above, node.module or "")))
            if not node.level:
                if base.split(".")[0] != "quantspec":
                    continue
                base = base.removeprefix("quantspec").removeprefix(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".removeprefix(".")
                found.add(full if full in known else base or "__init__")
    return found - {name}


def arrows() -> dict[str, set[str]]:
    """What every module imports."""
    files = source_files()
    known = set(files)
    found = {name: imported(name, path, known) for name, path in files.items()}
    unknown = {target for targets in found.values() for target in targets} - known
    assert not unknown, f"imports of modules that are not there: {sorted(unknown)}"
    return found


def floor(name: str) -> int:
    """Number of the floor of a module, by its first name."""
    (number,) = (index for index, rooms in enumerate(FLOORS) if name.split(".")[0] in rooms)
    return number


def test_every_module_has_a_floor():
    assert len(source_files()) > 60
    for name in source_files():
        floor(name)


def test_imports_go_down():
    upward = [
        f"{name} -> {target}" for name, targets in arrows().items() for target in targets if floor(target) > floor(name)
    ]
    assert not upward


def test_no_circle_of_files():
    try:
        tuple(TopologicalSorter(arrows()).static_order())
    except CycleError as error:
        pytest.fail(f"files import each other: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize(
    "line",
    [
        "from quantspec.model import convert",
        "def f():\n    from quantspec.model import convert",
        "if TYPE_CHECKING:\n    from quantspec import model",
        "import quantspec.model",
        "from ..model import convert",
    ],
)
def test_every_way_to_import_is_seen(tmp_path, line):
    path = tmp_path / "cycle.py"
    path.write_text(line)
    assert imported("engine.cycle", path, {"model", "engine.cycle"}) == {"model"}
