"""Build the wheel, check what is in it, install it in a fresh environment, and run the README and a command there.

The fresh environment borrows every other package from the one that runs this script, so nothing is downloaded; a tiny
random model stands in for the README's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

from setuptools.config.pyprojecttoml import read_configuration

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "wheel"
# Belongs to the repository alone.
FIGURES = "benchmarks/results/"
sys.path.insert(0, str(ROOT / "tests"))

from doc_blocks import STAND_INS, blocks, fill_hub_cache  # noqa: E402


def build_wheel() -> Path:
    """Build it and return its path."""
    shutil.rmtree(BUILD, ignore_errors=True)
    # setuptools would add files that an earlier build left here.
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    options = ["-q", "--no-deps", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "-w", str(BUILD), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = BUILD.glob("*.whl")
    return wheel


def check_contents(wheel: Path, settings: dict) -> None:
    """Nothing but ``quantspec`` and its metadata at the top level, every file of its packages and no figures."""
    names = set(zipfile.ZipFile(wheel).namelist())
    version = settings["project"]["version"]
    tops = {name.split("/")[0] for name in names}
    assert tops == {"quantspec", f"quantspec-{version}.dist-info"}, f"top level of the wheel: {tops}"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    packages = settings["tool"]["setuptools"]["package-dir"]
    expected = {
        package.replace(".", "/") + path.removeprefix(folder)
        for package, folder in packages.items()
        for path in tracked
        if path.startswith(f"{folder}/") and not path.endswith(".md") and not path.startswith(FIGURES)
    }
    missing = expected - names
    assert not missing, f"missing from the wheel: {sorted(missing)}"
    figures = [name for name in names if name.startswith(f"quantspec/{FIGURES}")]
    assert not figures, f"measured figures in the wheel: {figures}"


def fresh_environment(wheel: Path) -> Path:
    """An environment with the wheel, and beyond it what this one has; returns its Python."""
    folder = BUILD / "environment"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", query], capture_output=True, text=True, check=True).stdout.strip()
    # Only paths, so the editable install among them has no effect.
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (Path(site) / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return python


def run_readme(python: Path, settings: dict) -> None:
    """Run the first Python block of the README and the command line, outside the checkout."""
    elsewhere = BUILD / "elsewhere"
    elsewhere.mkdir()
    fill_hub_cache(elsewhere / "hub")
    environment = {**os.environ, "HF_HUB_CACHE": str(elsewhere / "hub"), "HF_HUB_OFFLINE": "1"}
    example = next(block.text for block in blocks(ROOT / "README.md") if block.language == "python")
    check = (
        f"\nassert quantspec.__version__ == {settings['project']['version']!r}\n"
        f"assert quantspec.__file__.startswith({str(BUILD)!r}), quantspec.__file__\n"
    )
    subprocess.run([python, "-W", "ignore", "-c", example + check], cwd=elsewhere, env=environment, check=True)
    inspect = [python.parent / "quantspec", "inspect", STAND_INS[0]]
    subprocess.run(inspect, cwd=elsewhere, env=environment, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Do all of it."""
    settings = read_configuration(ROOT / "pyproject.toml")
    wheel = build_wheel()
    check_contents(wheel, settings)
    run_readme(fresh_environment(wheel), settings)
    print(f"{wheel.name}: contents checked, installed; the README's example and the command line run")


if __name__ == "__main__":
    main()
