"""A save's files come to their place whole or not at all, also where several processes save to one folder.

    .quantspec-saving-HOST-PID-*/            the new files, until they are moved to their place, the description last
    .quantspec-saving-HOST-PID-*/.names      names of the new files, one a line, also of those that were moved
    .quantspec-saving-HOST-PID-*/earlier/    the files that they replace, from the first move to the last
    .quantspec-saving.lock                   held while files are moved

Who moves files holds the lock. So what another save finds half moved was given up by a process that was killed, and is
put back first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .folder import DESCRIPTION_FILE

_PREFIX = ".quantspec-saving"
_LOCK_FILE = f"{_PREFIX}.lock"
_EARLIER = "earlier"
_NAMES_FILE = ".names"
_DAY = 24 * 3600


def is_staged(path: Path) -> bool:
    """Whether ``path`` belongs to a save that is under way, or was given up."""
    return path.name.startswith(_PREFIX)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder inside ``folder`` for the files of a save; gone afterwards."""
    staging = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}-{platform.node()}-{os.getpid()}-", dir=folder))
    try:
        yield staging
    finally:
        # What could not be put back stays for the next save to try again.
        if not _is_half_moved(staging):
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until nobody else moves files in ``folder``, keep others waiting, and put back what was given up."""
    path = folder / _LOCK_FILE
    while True:
        with path.open("w") as file:
            # Not every network file system has locks.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            # Who held the lock before has removed the file; others wait for a new one.
            if os.fstat(file.fileno()).st_nlink == 0:
                continue
            try:
                _clean_up(folder)
                yield
            finally:
                path.unlink(missing_ok=True)
                # A child forked meanwhile has the file open too, and would go on holding the lock.
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_UN)
            return


def publish(staging: Path, folder: Path, files_to_replace: Callable[[Path], list[str]]) -> None:
    """Move the files of ``staging`` to ``folder``, the description last: before, the folder cannot be loaded.

    Args:
        files_to_replace: names of the files in a folder that go, the description first. After an error all are back.
    """
    names = [*sorted(path.name for path in staging.iterdir() if path.name != DESCRIPTION_FILE), DESCRIPTION_FILE]
    with locked(folder):
        replaced = [*files_to_replace(folder), *names]
        (staging / _NAMES_FILE).write_text("\n".join(names), encoding="utf-8")
        (staging / _EARLIER).mkdir()
        try:
            for name in dict.fromkeys(replaced):
                if (folder / name).exists():
                    (folder / name).replace(staging / _EARLIER / name)
            for name in names:
                (staging / name).replace(folder / name)
        except BaseException:
            if _is_half_moved(staging):
                _put_back(staging, folder)
            raise


def _is_half_moved(staging: Path) -> bool:
    return (staging / _EARLIER).is_dir() and (staging / DESCRIPTION_FILE).is_file()


def _put_back(staging: Path, folder: Path) -> None:
    """Undo the moves of :func:`publish`, wherever they ended; can itself be given up and done again."""
    for name in (staging / _NAMES_FILE).read_text(encoding="utf-8").splitlines():
        if not (staging / name).exists() and (folder / name).exists():
            (folder / name).replace(staging / name)
    earlier = staging / _EARLIER
    for path in sorted(earlier.iterdir(), key=lambda path: path.name == DESCRIPTION_FILE):
        path.replace(folder / path.name)
    earlier.rmdir()


def _clean_up(folder: Path) -> None:
    """Put back what was given up half moved, and remove what dead processes left."""
    for staging in folder.glob(f"{_PREFIX}-*"):
        half_moved = _is_half_moved(staging)
        if half_moved:
            _put_back(staging, folder)
        if half_moved or _is_abandoned(staging):
            shutil.rmtree(staging, ignore_errors=True)


def _is_abandoned(staging: Path) -> bool:
    """Whether the process that made it is dead; of another host's or an unknown one, whether it is older than a day."""
    host, _, process = staging.name.removeprefix(f"{_PREFIX}-").rpartition("-")[0].rpartition("-")
    if host == platform.node() and process.isdigit() and not _is_alive(int(process)):
        return True
    try:
        return time.time() - staging.stat().st_mtime > _DAY
    except FileNotFoundError:
        return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
