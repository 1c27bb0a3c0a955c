"""The folder that ``save_pretrained`` writes, and the file that describes it.

    config.json, generation_config.json, model*.safetensors   the Hugging Face model as transformers saves it
    quantspec*.safetensors                                    the draft's weights, in the layout that their format packs
    quantspec_graph.json                                      what capture made, where it can be kept; see below
    quantspec_config.json                                     this file's :class:`Description`, written last

In ``quantspec*.safetensors`` linear NAME has a tensor ``draft.NAME.PART`` for each part of its weight format, see
``quantspec.passes.int4_weights``. Tensors of the model that transformers would not bring back bit for bit (buffers it
computes anew, parameters of another dtype than the model's) are there as ``model.NAME``.
``check.logits (1, T, V)`` are what the target made of ``check.input_ids (1, T)``; folders saved before had none.

``quantspec_graph.json`` has a ``key``, of :func:`quantspec.capture.stored.key_of`, and a ``graph``, of its ``to_json``,
whose tensors are ``graph.NAME`` in ``quantspec*.safetensors``. Where the key is another one the model is captured anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from quantspec.capture import DTYPES
from quantspec.config import QuantSpecConfig
from quantspec.errors import SavedModelError
from quantspec.logging import counting
from quantspec.pair.tuned import TuneReport
from quantspec.passes import LinearReport

_LOGGER = logging.getLogger(__name__)

FORMAT_VERSION = 1
DESCRIPTION_FILE = "quantspec_config.json"
# {suffix} is what Hugging Face's sharding puts there, or nothing.
TENSOR_FILES = "quantspec{suffix}.safetensors"
DRAFT_PREFIX = "draft."
MODEL_PREFIX = "model."
GRAPH_FILE = "quantspec_graph.json"
GRAPH_PREFIX = "graph."
TOKENS_KEY = "check.input_ids"
LOGITS_KEY = "check.logits"
# Holds no weights and is for people to edit; the tokenizer's files are not part of a save at all.
EDITABLE_FILE = "generation_config.json"
_HASH_CHUNK = 1 << 22
_HASH_THREADS = 4
_SAVE_AGAIN = "copy the folder again, or save the model again"


@dataclass(frozen=True)
class Fingerprint:
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Description:
    """Contents of ``quantspec_config.json``.

    Attributes:
        format_version: of the folder's layout; a library refuses folders whose version is above its
            :data:`FORMAT_VERSION`.
        versions: of quantspec, torch and transformers that saved, to tell in errors.
        model_class: transformers' class of the model.
        dtype: of the model, as in ``torch.float32`` without ``torch.``.
        options: the conversion's, by name in :class:`QuantSpecConfig`.
        linears: what became of each linear in the draft.
        files: fingerprints of all other files of the folder.
        tuned: what tuning did to the draft; None if nothing.
    """

    format_version: int
    versions: Mapping[str, str]
    model_class: str
    dtype: str
    options: QuantSpecConfig
    linears: tuple[LinearReport, ...]
    files: Mapping[str, Fingerprint]
    tuned: TuneReport | None = None

    def write(self, folder: Path) -> None:
        """Write :data:`DESCRIPTION_FILE`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        options = {f.name: getattr(self.options, f.name) for f in fields(QuantSpecConfig)}
        # Follows from the linears.
        del options["adapted_group_sizes"]
        # Folders with the usual draft stay readable for versions that know no other, nor these options.
        newer = ("draft_attention", "draft_attention_share", "draft", "rope_context", "rejection_sampling")
        for name in ("draft_recipe", *newer):
            if options[name] == getattr(QuantSpecConfig, name):
                del options[name]
        values["options"] = options
        values["linears"] = [asdict(report) for report in self.linears]
        values["files"] = {name: asdict(fingerprint) for name, fingerprint in self.files.items()}
        # So do folders with a draft that was not tuned.
        del values["tuned"]
        if self.tuned is not None:
            values["tuned"] = asdict(self.tuned)
        (folder / DESCRIPTION_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Description:
        """Read and check :data:`DESCRIPTION_FILE`.

        Raises:
            SavedModelError: it is missing, damaged, or of a later format.
        """
        path = folder / DESCRIPTION_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SavedModelError(
                f"'{folder}' has no {DESCRIPTION_FILE}: it was not written by save_pretrained() of a converted model, "
                "or not to its end. A Hugging Face model is loaded with AutoModelForCausalLM.from_pretrained() and "
                "converted with quantspec.convert()"
            ) from None
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error
        version = values.get("format_version") if isinstance(values, dict) else None
        if type(version) is not int or version < 1:
            raise _damaged(path, "it has no format_version")
        if version > FORMAT_VERSION:
            versions = values.get("versions")
            saver = versions.get("quantspec") if isinstance(versions, dict) else None
            saved_with = f" (it was saved with quantspec {saver})" if saver else ""
            raise SavedModelError(
                f"'{path}' has format_version {version}, and this quantspec reads up to {FORMAT_VERSION}: "
                f"install a quantspec that reads format {version}{saved_with}"
            )
        try:
            return cls._parse(values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(path, error) from error

    @classmethod
    def _parse(cls, values: dict[str, Any]) -> Description:
        known = {f.name for f in fields(cls)}
        if set(values) | {"tuned"} != known:
            raise ValueError(f"its entries must be {', '.join(sorted(known))}")
        if not isinstance(values["model_class"], str):
            raise ValueError(f"{values['model_class']!r} is no name of a class")
        if values["dtype"] not in [str(dtype).removeprefix("torch.") for dtype in DTYPES]:
            raise ValueError(f"{values['dtype']!r} is no dtype of a model")
        values["versions"] = {str(package): str(version) for package, version in values["versions"].items()}
        files = {}
        for name, entry in values["files"].items():
            # A name must not lead out of the folder.
            if Path(name).name != name:
                raise ValueError(f"{name!r} is no file name")
            files[name] = Fingerprint(int(entry["bytes"]), str(entry["sha256"]))
        values["files"] = files
        values["options"] = QuantSpecConfig.from_options(None, values["options"])
        values["linears"] = tuple(LinearReport(**entry) for entry in values["linears"])
        if "tuned" in values:
            values["tuned"] = TuneReport.from_dict(values["tuned"])
        return cls(**values)


def _damaged(path: Path, reason: object) -> SavedModelError:
    return SavedModelError(f"'{path}' is damaged ({reason}): {_SAVE_AGAIN}")


def fingerprints(folder: Path, names: Iterable[str]) -> dict[str, Fingerprint]:
    """Read these files to their end."""
    paths = [folder / name for name in names]
    sizes = [path.stat().st_size for path in paths]
    prints = {}
    with (
        ThreadPoolExecutor(_HASH_THREADS) as pool,
        counting(_LOGGER, "hashing (MiB)", sum(sizes) >> 20) as advance,
    ):
        for path, size, digest in zip(paths, sizes, pool.map(_sha256, paths), strict=True):
            prints[path.name] = Fingerprint(size, digest)
            advance(size >> 20)
    return prints


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_files(folder: Path, description: Description, hashes: bool) -> None:
    """Compare a folder's files with its description: all there, of the right size, nothing in their place.

    :data:`EDITABLE_FILE` may differ.

    Args:
        hashes: whether contents are compared too, which reads every file once.

    Raises:
        SavedModelError: naming the first file that differs.
    """
    for name, expected in description.files.items():
        path = folder / name
        if not path.is_file():
            raise SavedModelError(f"'{path}' is missing: {_SAVE_AGAIN}")
        if name == EDITABLE_FILE:
            continue
        size = path.stat().st_size
        if size != expected.bytes:
            raise SavedModelError(f"'{path}' has {size} bytes instead of {expected.bytes}: {_SAVE_AGAIN}")
    # transformers would read a stray model.safetensors in place of a sharded one.
    for path in sorted(folder.glob("*.safetensors*")):
        if path.name not in description.files:
            raise SavedModelError(f"'{path}' does not belong to this model: move it elsewhere")
    if hashes:
        for name, found in fingerprints(folder, description.files.keys() - {EDITABLE_FILE}).items():
            if found != description.files[name]:
                raise SavedModelError(f"'{folder / name}' was changed since it was saved: {_SAVE_AGAIN}")
