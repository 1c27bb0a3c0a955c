"""From the MODEL argument to a converted pair and its tokenizer."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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

# DESCRIPTION_FILE of quantspec.checkpoint.folder, whose import takes seconds; a wrong path is told at once.
PAIR_CONFIG = "quantspec_config.json"
# Of PEFT.
_ADAPTER_CONFIG = "adapter_config.json"
# Of the model itself, as transformers names them.
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


class Kind(Enum):
    """What the MODEL argument names."""

    HUB = "hub"
    FOLDER = "folder"
    PAIR = "pair"
    GGUF = "gguf"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: ``name`` as ``from_pretrained`` takes it, with ``gguf_file`` besides for GGUF.

    Attributes:
        access: how it may be reached and run, ``revision``, ``token`` and ``trust_remote_code`` of transformers.
    """

    kind: Kind
    name: str
    gguf_file: str | None = None
    access: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for ``from_pretrained``."""
        return {**({"gguf_file": self.gguf_file} if self.gguf_file else {}), **self.access}

    @property
    def place(self) -> dict[str, Any]:
        """Of these, those that say where files are found."""
        return {name: self.access[name] for name in ("revision", "token") if name in self.access}


def find_source(model: str, gguf_file: str | None = None) -> Source:
    """What ``model`` names, or the file ``gguf_file`` in the folder or Hub repository that it names.

    Raises:
        CommandError: a path to nothing, or to a folder or file that holds no model.
    """
    if not model.strip():
        raise CommandError("MODEL is empty", "give a model's folder, a GGUF file or a Hub id")
    path = Path(model).expanduser()
    if gguf_file is not None and path.suffix.lower() == ".gguf":
        raise CommandError(f"two GGUF files: '{model}' and '{gguf_file}'", "leave --gguf-file out")
    if gguf_file is not None and path.is_dir():
        return find_source(str(path / gguf_file))
    if path.is_dir():
        if (path / PAIR_CONFIG).is_file():
            return Source(Kind.PAIR, str(path))
        if (path / _ADAPTER_CONFIG).is_file() and not any(file for name in _WEIGHTS for file in path.glob(name)):
            raise _adapter(model)
        if (path / "config.json").is_file():
            return Source(Kind.FOLDER, str(path))
        files = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"give one of its GGUF files: {', '.join(files)}" if files else "save a model with save_pretrained()"
        raise CommandError(f"folder '{model}' has no config.json", hint)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return Source(Kind.GGUF, str(path.parent), path.name)
        hint = "give a model's folder, a GGUF file or a Hub id"
        if (path.parent / "config.json").is_file():
            hint = f"give its folder, '{path.parent}'"
        raise CommandError(f"'{model}' is not a GGUF file", hint)
    if path.suffix.lower() == ".gguf":
        raise CommandError(f"there is no GGUF file '{model}'", "check the path")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CommandError(f"there is no folder or file '{model}'", "check the path, or give a Hub id as OWNER/NAME")
    return Source(Kind.HUB, model, gguf_file)


def _adapter(model: str) -> CommandError:
    merged = f"AutoPeftModelForCausalLM.from_pretrained('{model}').merge_and_unload()"
    return CommandError(
        f"'{model}' holds an adapter (PEFT), not a whole model: merge it into its base model first",
        f"in Python: {merged}.save_pretrained(FOLDER), and the base model's tokenizer into FOLDER too",
    )


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


def find_model(model: ModelOptions, gguf_file: str | None = None) -> Source:
    """The source that ``model`` names, with what it says about access to it.

    Raises:
        CommandError: as :func:`find_source`, or a revision of something local.
    """
    source = find_source(model.model, gguf_file)
    access = model.access()
    if source.kind is not Kind.HUB:
        if "revision" in access:
            raise CommandError(f"--revision is of a model on the Hub, and '{model.model}' is local", "leave it out")
        access.pop("token", None)
    return replace(source, access=access)


def fetched(source: Source, *, whole: bool) -> Source:
    """``source``, or the folder that a saved pair on the Hub is fetched into: ``whole``, or what describes it."""
    if source.kind is not Kind.HUB or source.gguf_file is not None:
        return source
    from transformers.utils import cached_file

    from quantspec.checkpoint.hub import local_folder

    # None where the repository holds no such file; what else is wrong is told where its config is read.
    found = None
    with contextlib.suppress(OSError, ValueError):
        found = cached_file(source.name, PAIR_CONFIG, _raise_exceptions_for_missing_entries=False, **source.place)
    if found is None:
        return source
    place = {"revision": None, "token": None, **source.place}
    folder = local_folder(source.name, files=None if whole else "*.json", **place)
    access = {name: value for name, value in source.access.items() if name not in place}
    return Source(Kind.PAIR, str(folder), access=access)


@contextlib.contextmanager
def _reading(source: Source) -> Iterator[None]:
    """Turns what libraries make of missing and damaged files into an error that names the file or folder."""
    from safetensors import SafetensorError

    # The reader of GGUF files trusts the numbers in them.
    damage = (ValueError, IndexError, KeyError, struct.error) if source.gguf_file else ()
    absence = () if source.kind is Kind.HUB else (OSError,)
    try:
        yield
    except (SafetensorError, *damage, *absence) as error:
        name = str(Path(source.name, source.gguf_file or ""))
        hint = "is it complete? fetch or save it again"
        raise CommandError(f"cannot read '{name}': {_first_line(error)}", hint) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(" .:")


def load_config(source: Source) -> PreTrainedConfig:
    """The model's configuration alone.

    Raises:
        CommandError: it is missing or damaged, or describes an adapter.
        UnsupportedModelError: it describes what cannot be converted.
    """
    from transformers import AutoConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    from quantspec.checkpoint.config_check import check_config

    try:
        with _reading(source):
            config = AutoConfig.from_pretrained(source.name, **source.arguments)
    except ValueError as error:
        hint = "a newer transformers may know this model"
        if "trust_remote_code" in str(error):
            hint = "--trust-remote-code runs code that comes with the checkpoint: read it first"
        raise CommandError(f"cannot load the config of '{source.name}': {_first_line(error)}", hint) from error
    except OSError as error:
        if find_adapter_config_file(source.name, **source.place) is not None:
            raise _adapter(source.name) from error
        reason = _first_line(error)
        hint = "check the name and the network, or give a local folder"
        raise CommandError(f"cannot load '{source.name}' from the Hub: {reason}", hint) from error
    check_config(config)
    return config


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        CommandError: none is saved with the model.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.name, **source.arguments)
    except (OSError, ValueError) as error:
        hint = "save it into the same folder with tokenizer.save_pretrained()"
        if source.kind is Kind.HUB or any(Path(source.name).glob("tokenizer*")):
            message = f"cannot load the tokenizer of '{source.name}': {_first_line(error)}"
            raise CommandError(message, "is it complete? fetch or save it again") from error
        raise CommandError(f"no tokenizer found with '{source.name}'", hint) from error


def dtype_to_load(source: Source, dtype: Dtype, device: torch.device | None) -> torch.dtype | None:
    """Precision of the weights where ``--dtype`` says ``dtype``; None is the checkpoint's own.

    Args:
        device: where the model shall run; None for one that is only saved.
    """
    import torch

    from quantspec.checkpoint.folder import Description
    from quantspec.passes import cpu_lacks_half_matmul

    if dtype is not Dtype.AUTO:
        return getattr(torch, dtype.value)
    # A pair saved in float16 loads in nothing else.
    is_fixed = source.kind is Kind.PAIR and Description.read(Path(source.name)).dtype == "float16"
    if device is not None and device.type == "cpu" and cpu_lacks_half_matmul() and not is_fixed:
        return torch.float32
    return torch.bfloat16 if source.gguf_file else None


def load_model(source: Source, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """The original model on ``device``, in eval mode."""
    from transformers import AutoModelForCausalLM

    from quantspec.checkpoint.gguf import dense_weights, read_once

    options = {"dtype": dtype or "auto", **source.arguments, **dense_weights(source.gguf_file)}
    with _reading(source), read_once(source.gguf_file):
        model = AutoModelForCausalLM.from_pretrained(source.name, **options)
    return model.to(device).eval()  # type: ignore[arg-type]


@dataclass(frozen=True)
class FoundPair:
    """A model whose arguments are in order, or a saved pair; its weights are not read yet.

    Attributes:
        dtype: of the weights; None is the checkpoint's own.
        options: of ``convert``, those that were given.
        limit: the ``max_cache_len`` of the pair, as far as it is known; None if it is not.
        num_ranks: processes that it is split over, on devices of the device's kind; 1 for none but this.
    """

    source: Source
    device: torch.device
    dtype: torch.dtype | None
    options: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    limit: int | None
    num_ranks: int = 1

    def check_fit(self, num_tokens: int) -> None:
        """Refuse a text of more tokens than the pair will hold.

        Raises:
            CacheFullError: it is too long.
        """
        from quantspec.cache import check_cache_len

        if self.limit is not None:
            check_cache_len(num_tokens, self.limit)

    def load(self) -> QuantSpecModel:
        """Load and convert the model, or load the saved pair."""
        import quantspec

        if self.source.kind is Kind.PAIR:
            with working("loading"):
                return quantspec.from_pretrained(
                    self.source.name,
                    device=self.device,
                    dtype=self.dtype,
                    tensor_parallel=self.num_ranks if self.num_ranks > 1 else None,
                    **self.source.access,
                    **self.options,
                )
        if self.num_ranks > 1:
            return self._load_split()
        # Of a download transformers draws the bars itself.
        with contextlib.nullcontext() if self.source.kind is Kind.HUB else working("reading the model's weights"):
            loaded = load_model(self.source, self.dtype, self.device)
        with working("converting"):
            return quantspec.convert(loaded, **self.options)

    def _load_split(self) -> QuantSpecModel:
        """Convert the model over the ranks, each of which reads its pieces where the files allow it."""
        import torch

        from quantspec import QuantSpecConfig, QuantSpecModel
        from quantspec.tensor_parallel import convert_folder_split, convert_split

        config = QuantSpecConfig.from_options(None, self.options)
        kind = self.device.type
        with working("reading and splitting the model's weights"):
            if self.source.gguf_file is not None:
                loaded = load_model(self.source, self.dtype, torch.device("cpu"))
                split = convert_split(loaded, config, self.num_ranks, kind)
            else:
                split = convert_folder_split(
                    self.source.name, config, self.num_ranks, kind, dtype=self.dtype, **self.source.access
                )
        return QuantSpecModel(split.pair, split)


def find_pair(
    model: ModelOptions,
    run: RunOptions,
    *,
    gguf_file: str | None = None,
    generation: dict[str, Any] | None = None,
    to_save: bool = False,
    num_ranks: int = 1,
) -> FoundPair:
    """Check the arguments and load the tokenizer.

    Args:
        gguf_file: the weights in MODEL, a folder or a repository of the Hub.
        generation: arguments of ``generate``; what it would refuse with the checkpoint's own options is refused here.
        to_save: the pair is saved, not run: its dtype does not depend on this machine, and what saving would refuse is
            refused here.
        num_ranks: processes to split the pair over.

    Raises:
        CommandError, ValueError, TypeError: something is wrong with the arguments.
    """
    source = find_model(model, gguf_file)
    device = find_device(run.device)
    if num_ranks > 1:
        check_devices(device, num_ranks)
    options = {**model.conversion(), **run.conversion()}
    with working("importing"):
        import quantspec
        from quantspec.checkpoint.config_check import known_limit
        from quantspec.checkpoint.folder import Description
        from quantspec.checkpoint.loading import changed_options, resolve_dtype
        from quantspec.pair.recipes import recipes_for

    source = fetched(source, whole=True)
    dtype = dtype_to_load(source, model.dtype, None if to_save else device)
    if source.kind is Kind.PAIR:
        saved = Description.read(Path(source.name))
        config = changed_options(saved.options, options)
        limit = config.max_cache_len
        resolve_dtype(saved, dtype)
    else:
        config = quantspec.QuantSpecConfig.from_options(None, options)
        # The cheapest thing that can be missing, first.
        limit = known_limit(load_config(source), config)
        if to_save:
            _check_can_be_saved(source)
    recipes_for(config, device)
    if generation is not None:
        _check_can_generate(source, generation)
    return FoundPair(source, device, dtype, options, load_tokenizer(source), limit, num_ranks)


def check_devices(device: torch.device, num_ranks: int) -> None:
    """Refuse to split a pair over devices that are not there.

    Raises:
        CommandError: ``device`` is one GPU, or there are fewer than ``num_ranks``.
    """
    import torch

    if device.type == "cuda" and device.index is not None:
        raise CommandError(
            f"--device {device} is one GPU, and --tensor-parallel {num_ranks} splits the model over several",
            "use --device cuda, and CUDA_VISIBLE_DEVICES to choose them",
        )
    if device.type == "cuda" and (count := torch.cuda.device_count()) < num_ranks:
        raise CommandError(
            f"--tensor-parallel {num_ranks} needs as many GPUs: {count} found",
            "use fewer, or --device cpu to try it out",
        )


def _check_can_generate(source: Source, arguments: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    from quantspec.hugging_face.arguments import refuse_options

    with contextlib.suppress(OSError):
        config = GenerationConfig.from_pretrained(source.name, **source.place)
        config.update(**arguments)
        try:
            refuse_options(config)
        except ValueError as error:
            raise CommandError(str(error), f"generation_config.json of '{source.name}' asks for it") from error


def _check_can_be_saved(source: Source) -> None:
    from transformers import GenerationConfig

    from quantspec.checkpoint.saving import check_generation_config

    # Most models have the file; without it transformers makes a config by itself.
    with contextlib.suppress(OSError):
        check_generation_config(GenerationConfig.from_pretrained(source.name, **source.place))
