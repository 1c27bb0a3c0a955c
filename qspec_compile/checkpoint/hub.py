"""Saved pairs on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from quantspec.errors import SavedModelError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Of an earlier save; what is uploaded again stays.
_REPLACED = ["*.safetensors", "*.safetensors.index.json", "quantspec*.json"]


def local_folder(
    directory: str | os.PathLike[str], revision: str | None, token: str | bool | None, files: str | None = None
) -> Path:
    """The folder ``directory``, or the one that the Hub's files of that id are fetched into.

    Args:
        directory: a local folder or a Hub id.
        revision: branch, tag or commit on the Hub.
        token: for private repositories.
        files: pattern of those that are needed; all if None.

    Raises:
        SavedModelError: neither is there.
        ValueError: a revision of a local folder.
    """
    folder = Path(directory)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision is of a pair on the Hub, and '{folder}' is a local folder: leave it out")
        return folder
    name = os.fspath(directory)
    if folder.exists() or not _HUB_ID.fullmatch(name):
        raise SavedModelError(
            f"'{name}' is no folder; pass a local one that save_pretrained() wrote, or a Hub id as OWNER/NAME"
        )
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise SavedModelError(
            f"'{name}' is no folder here, and cannot be fetched from the Hub: {lines[0]} Check the name, the network "
            "and, if it is private, the token"
        ) from error


def _is_of_network(error: Exception) -> bool:
    """Whether no answer came; the library that the Hub's client asks with is its own choice."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or "TransportError" in names


def push(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Upload the folder that ``save`` writes to a repository, which is made if it is not there; returns its address.

    Raises:
        ConnectionError: the Hub cannot be reached; nothing was written.
    """
    api = HfApi(token=token)
    try:
        # Tells of a network or a token that is missing, and makes nothing.
        api.whoami()
    except Exception as error:
        if not _is_of_network(error):
            raise
        raise ConnectionError(
            f"'{repo_id}' cannot be uploaded, since the Hub cannot be reached: {error}. Check the network, or save the "
            "pair with save_pretrained() and upload the folder later"
        ) from error
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, repo_id.rpartition("/")[2])
        save(folder)
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=_REPLACED,
        )
    return str(repository)
