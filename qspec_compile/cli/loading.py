"""From the MODEL argument to a converted pair and its tokenizer."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import working
from .errors import CommandError
from .options import Dtype, ModelOptions, RunOptions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from quantspec import QuantSpecModel

# DESCRIPTION_FILE of quantspec.saved_format, whose import takes seconds; a wrong path is told at once.
_PAIR_CONFIG = "quantspec_config.json"


class Kind(Enum):
    """What the MODEL argument names."""

    HUB = "hub"
    FOLDER = "folder"
    PAIR = "pair"
    GGUF = "gguf"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: ``name`` as ``from_pretrained`` takes it, with ``gguf_file`` besides for GGUF."""

    kind: Kind
    name: str
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for ``from_pretrained``."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def find_source(model: str) -> Source:
    """What ``model`` names.

    Raises:
        CommandError: a path to nothing, or to a folder or file that holds no model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / _PAIR_CONFIG).is_file():
            return Source(Kind.PAIR, str(path))
        if (path / "config.json").is_file():
            return Source(Kind.FOLDER, str(path))
        files = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"give one of its GGUF files: {', '.join(files)}" if files else "save a model with save_pretrained()"
        raise CommandError(f"folder '{model}' has no config.json", hint)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return Source(Kind.GGUF, str(path.parent), path.name)
        raise CommandError(f"'{model}' is not a GGUF file", "give a model's folder, a GGUF file or a Hub id")
    if path.suffix.lower() == ".gguf":
        raise CommandError(f"there is no GGUF file '{model}'", "check the path")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip():
        raise CommandError(f"there is no folder or file '{model}'", "check the path, or give a Hub id as OWNER/NAME")
    return Source(Kind.HUB, model)


def find_device(name: str | None) -> torch.device:
    """The device to run on: the named one, else the GPU if there is one.

    Raises:
        CommandError: no such device here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CommandError(f"'{name}' is not a device", "use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"quantspec does not run on '{name}'", "use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"there is no device '{name}': {torch.cuda.device_count()} GPUs found", "use --device cpu")
    return device


@contextlib.contextmanager
def _reading(source: Source) -> Iterator[None]:
    """Turns what libraries make of damaged files into an error that names the file or folder."""
    from safetensors import SafetensorError

    # The reader of GGUF files trusts the numbers in them.
    damage = (ValueError, IndexError, KeyError, struct.error) if source.kind is Kind.GGUF else ()
    try:
        yield
    except (SafetensorError, *damage) as error:
        name = str(Path(source.name, source.gguf_file or ""))
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise CommandError(f"cannot read '{name}': {reason}", "is it complete? fetch or save it again") from error


def load_config(source: Source) -> PreTrainedConfig:
    """The model's configuration alone."""
    from transformers import AutoConfig

    try:
        with _reading(source):
            return AutoConfig.from_pretrained(source.name, **source.arguments)
    except OSError as error:
        if source.kind is not Kind.HUB:
            raise
        reason = str(error).strip().splitlines()[0].rstrip(".")
        hint = "check the name and the network, or give a local folder"
        raise CommandError(f"cannot load '{source.name}' from the Hub: {reason}", hint) from error


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        CommandError: none is saved with the model.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.name, **source.arguments)
    except (OSError, ValueError) as error:
        if source.kind is Kind.HUB:
            raise
        hint = "save it into the same folder with tokenizer.save_pretrained()"
        raise CommandError(f"no tokenizer found with '{source.name}'", hint) from error


def dtype_to_load(source: Source, dtype: Dtype, device: torch.device | None) -> torch.dtype | None:
    """Precision of the weights where ``--dtype`` says ``dtype``; None is the checkpoint's own.

    Args:
        device: where the model shall run; None for one that is only saved.
    """
    import torch

    from quantspec.passes import cpu_lacks_half_matmul
    from quantspec.saved_format import Description

    if dtype is not Dtype.AUTO:
        return getattr(torch, dtype.value)
    # A pair saved in float16 loads in nothing else.
    is_fixed = source.kind is Kind.PAIR and Description.read(Path(source.name)).dtype == "float16"
    if device is not None and device.type == "cpu" and cpu_lacks_half_matmul() and not is_fixed:
        return torch.float32
    return torch.bfloat16 if source.kind is Kind.GGUF else None


def load_model(source: Source, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """The original model on ``device``, in eval mode."""
    from transformers import AutoModelForCausalLM

    with _reading(source):
        model = AutoModelForCausalLM.from_pretrained(source.name, dtype=dtype or "auto", **source.arguments)
    return model.to(device).eval()  # type: ignore[arg-type]


def load_pair(
    model: ModelOptions, run: RunOptions, *, to_save: bool = False
) -> tuple[QuantSpecModel, PreTrainedTokenizerBase]:
    """Load and convert the model, or load a saved pair, and its tokenizer.

    Args:
        to_save: the pair is saved, not run: its dtype does not depend on this machine, and what saving would refuse is
            refused here.

    Raises:
        CommandError, ValueError, TypeError: something is wrong with the arguments; before weights are read.
    """
    source = find_source(model.model)
    device = find_device(run.device)
    options = {**model.conversion(), **run.conversion()}
    with working("importing"):
        import quantspec

    dtype = dtype_to_load(source, model.dtype, None if to_save else device)
    if source.kind is Kind.PAIR:
        tokenizer = load_tokenizer(source)
        with working("loading"):
            return quantspec.from_pretrained(source.name, device=device, dtype=dtype, **options), tokenizer
    config = quantspec.QuantSpecConfig.from_options(None, options)
    # The cheapest thing that can be missing, first; transformers draws the bars of downloading and loading itself.
    load_config(source)
    if to_save:
        _check_can_be_saved(source)
    tokenizer = load_tokenizer(source)
    loaded = load_model(source, dtype, device)
    with working("converting"):
        return quantspec.convert(loaded, config), tokenizer


def _check_can_be_saved(source: Source) -> None:
    from transformers import GenerationConfig

    from quantspec.saving import check_generation_config

    # Most models have the file; without it transformers makes a config by itself.
    with contextlib.suppress(OSError):
        check_generation_config(GenerationConfig.from_pretrained(source.name))
