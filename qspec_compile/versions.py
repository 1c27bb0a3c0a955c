"""What is installed: whether it was tested with quantspec, and how to install what is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


def untested_versions() -> list[str]:
    """A sentence for each library that is installed in another version than quantspec's requirements allow."""
    # Here and below: a help screen needs none of this, and it takes a third of its time.
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

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


def install_command(extra: str) -> str:
    """The shell command that installs an extra of quantspec from where quantspec itself was installed."""
    import json
    from importlib.metadata import distribution
    from urllib.parse import unquote, urlsplit

    origin = json.loads(distribution("quantspec").read_text("direct_url.json") or "{}")
    url = origin.get("url", "")
    if "dir_info" in origin:
        place = unquote(urlsplit(url).path)
        return f"pip install {'-e ' if origin['dir_info'].get('editable') else ''}'{place}[{extra}]'"
    return f"pip install 'quantspec[{extra}]{f' @ {url}' if url else ''}'"


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
