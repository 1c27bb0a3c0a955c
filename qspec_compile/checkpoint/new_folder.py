"""A folder that is made for something goes again if nothing comes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """After an error remove ``folder`` and those above it, as far as they were made meanwhile and are empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
