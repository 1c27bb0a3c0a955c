"""What ``pyproject.toml`` cannot say: a wheel without maintainers' scripts, and a README with absolute links."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent
# Of the benchmarks, what ``quantspec bench`` runs; the others make the published results and pages, in a checkout.
BENCHMARKS = {
    "__init__",
    "common",
    "decode",
    "generate",
    "kernels",
    "plot_kernels",
    "gpu_times",
    "random_models",
    "strong_baseline",
}


def absolute_links(text: str, project: dict) -> str:
    """Markdown whose links to files of the repository lead to this version's at its address; pictures are shown.

    So do links to the text's own headings, which have no anchors on an index.
    """
    base = f"{project['urls']['Repository']}/{{}}/v{project['version']}/"

    def lead(link: re.Match[str]) -> str:
        own = project["readme"] if link[2].startswith("#") else ""
        return f"{link[1]}]({base.format('raw' if link[1].startswith('!') else 'blob')}{own}{link[2]})"

    return re.sub(r"(!?\[[^\]]*)\]\((?!https?://)([^)\s]+)\)", lead, text)


class WithoutScripts(build_py):
    """Modules of every package, of the benchmarks only :data:`BENCHMARKS`."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Package, name and file of each module."""
        modules = super().find_package_modules(package, package_dir)
        return [m for m in modules if package != "quantspec.benchmarks" or m[1] in BENCHMARKS]


class WithLinks(egg_info):
    """Metadata whose description is read where the repository is not."""

    def finalize_options(self) -> None:
        """Replace the description that pyproject.toml has set."""
        super().finalize_options()
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        self.distribution.metadata.long_description = absolute_links((ROOT / project["readme"]).read_text(), project)


if __name__ == "__main__":
    setup(cmdclass={"build_py": WithoutScripts, "egg_info": WithLinks})
