"""Build the sdist and from it the wheel, check what is in it, install it, and run the README and a command there.

The fresh environment borrows every other package from the one that runs this script, so nothing is downloaded; a tiny
random model stands in for the README's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

from setuptools.config.pyprojecttoml import read_configuration

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "wheel"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from doc_blocks import STAND_INS, blocks, fill_hub_cache  # noqa: E402

from setup import BENCHMARKS  # noqa: E402


def build_wheel() -> Path:
    """Build the wheel from the unpacked sdist, as an index's users may, and return its path."""
    shutil.rmtree(BUILD, ignore_errors=True)
    # setuptools would add files that an earlier build left here.
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    make = f"from setuptools.build_meta import build_sdist; build_sdist({str(BUILD)!r})"
    subprocess.run([sys.executable, "-c", make], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (sdist,) = BUILD.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(BUILD / "source", filter="data")
    (source,) = (BUILD / "source").iterdir()
    options = ["-q", "--no-deps", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "-w", str(BUILD), str(source)]
    subprocess.run(command, check=True)
    (wheel,) = BUILD.glob("*.whl")
    return wheel


def check_contents(wheel: Path, settings: dict) -> None:
    """``quantspec`` and its metadata at the top level, every file of its packages but scripts and figures; links."""
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
        if path.startswith(f"{folder}/") and not path.endswith(".md") and not path.startswith("benchmarks/")
    }
    expected |= {f"quantspec/benchmarks/{name}.py" for name in BENCHMARKS}
    missing = expected - names
    assert not missing, f"missing from the wheel: {sorted(missing)}"
    others = {name for name in names if name.startswith("quantspec/benchmarks/")} - expected
    assert not others, f"of the repository alone, and in the wheel: {sorted(others)}"
    description = zipfile.ZipFile(wheel).read(f"quantspec-{version}.dist-info/METADATA").decode()
    relative = re.findall(r"\]\((?!https?://)[^)]+\)", description)
    assert not relative, f"links that lead nowhere on an index: {relative}"


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
