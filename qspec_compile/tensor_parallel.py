"""A pair that is split over ranks: this process has one part, and the others do as it does."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, PreTrainedModel

from .capture import check_model
from .checkpoint.hub import local_folder
from .checkpoint.split_loading import (
    hollow_checkpoint,
    hollow_saved_pair,
    part_of_checkpoint,
    part_of_saved_pair,
    reads_in_slices,
)
from .config import QuantSpecConfig
from .engine.session import Session
from .hugging_face.generate import generate
from .pair import Pair
from .pair.gather import gather_pair
from .pair.split import StoredCapture, hollow, plan, split_pair
from .ranks import Ranks, Seat, check_can_start, pickled
from .self_check import self_check

_KEYS = itertools.count()
# What a model consists of on the Hub.
_DESCRIPTION, _WEIGHTS = ["*.json", "*.py"], ["*.safetensors"]


class Split:
    """A pair's other parts.

    Attributes:
        pair: the part of this process, rank 0.
        ranks: the processes.
        key: by which the other ranks know their sessions of the pair, in what they keep.
    """

    def __init__(self, pair: Pair, ranks: Ranks, key: int, owns_ranks: bool) -> None:
        """Who owns the ranks ends them."""
        self.pair = pair
        self.ranks = ranks
        self.key = key
        self._owns_ranks = owns_ranks

    def generate(self, session: Session, *args: Any, streamer: Any, generator: Any, **options: Any) -> Any:
        """:func:`quantspec.hugging_face.generate.generate` on every rank, with a ``session`` of its own on each.

        The streamer is asked here alone, and the generator draws here; all else is sent.

        Raises:
            RanksError: a rank failed or was ended.
            TypeError: an argument that cannot be sent.
        """
        try:
            pickled((args, options))
        except Exception as error:
            raise TypeError(
                f"an argument of generate() cannot be sent to the other ranks ({error}); define its class in a module"
            ) from error
        here = {**options, "streamer": streamer, "generator": generator}
        return self.ranks.run(_generate, session, args, here, others=(self.key, args, options))

    def run(self, function: Callable[..., Any], *arguments: Any, others: tuple[Any, ...]) -> Any:
        """:meth:`quantspec.Ranks.run`."""
        return self.ranks.run(function, *arguments, others=others)

    def reset(self, session: Session) -> None:
        """Release the cache of every rank."""
        self.ranks.run(_reset, session, others=(self.key,))

    def gather(self, session: Session) -> Pair:
        """The whole pair on the CPU, in this process.

        Raises:
            SavedModelError: a rank's part of a linear is quantized in smaller groups than the whole would be.
            RanksError: a rank failed or was ended.
        """
        return self.ranks.run(_gather, session, others=(self.key,))

    def close(self) -> None:
        """End the ranks if they were started for this pair alone; else let them forget it."""
        if self._owns_ranks:
            self.ranks.close()
        else:
            self.ranks.run(_forget, self.key)


def convert_split(
    model: PreTrainedModel, config: QuantSpecConfig, ranks: int | Ranks, device_type: str | None = None
) -> Split:
    """:func:`quantspec.convert` of a loaded model over ``ranks``, or that many, which are started for it.

    The model is written to a temporary file once, from which every rank reads what it holds; it stays usable. Ranks are
    on devices like its own where no type is given.

    Raises:
        TypeError, ValueError, UnsupportedModelError: as ``convert``, or it cannot be split or sent.
        RanksError: a rank failed or was ended.
    """
    check_model(model)
    kind = _check_ranks(ranks, device_type or model.device.type)
    stored = plan(model, config, _world(ranks))
    # On another kind of device the forward may be another.
    stored = stored if model.device.type == kind else None
    with _started(ranks, kind) as (pool, is_own), tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "model"))
        try:
            torch.save(model, path)
        except Exception as error:
            raise TypeError(
                f"{type(model).__name__} cannot be sent to the other ranks ({error}); undo what was patched in it"
            ) from error
        key = next(_KEYS)
        told = (key, path, config, stored)
        pair = pool.run(_convert, *told, model, others=(*told, None))
        return Split(pair, pool, key, is_own)


def convert_folder_split(
    folder: str | os.PathLike[str],
    config: QuantSpecConfig,
    ranks: int | Ranks,
    device_type: str,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> Split:
    """:func:`convert_split` of a transformers model's folder or Hub id; a rank reads its pieces alone.

    Where the files hold weights in another form than the model does, this process loads the model whole before.
    ``dtype`` is the checkpoint's own if None; the other arguments are as of transformers' ``from_pretrained``.

    Raises:
        Exception: as :func:`convert_split`, or what transformers raises for a folder that holds no model.
    """
    kind = _check_ranks(ranks, device_type)
    how = (dtype, trust_remote_code)
    fetch = functools.partial(snapshot_download, str(folder), revision=revision, token=token)
    is_here = Path(folder).is_dir()
    # Weights are fetched once it is known that the model can be split.
    path = Path(folder if is_here else fetch(allow_patterns=_DESCRIPTION))
    model = hollow_checkpoint(path, torch.device(kind), *how)
    stored = plan(model, config, _world(ranks))
    if not is_here:
        path = Path(fetch(allow_patterns=[*_DESCRIPTION, *_WEIGHTS]))
    if not reads_in_slices(path, model):
        options: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code}
        return convert_split(AutoModelForCausalLM.from_pretrained(path, **options), config, ranks, device_type)
    with _started(ranks, device_type) as (pool, is_own):
        key = next(_KEYS)
        return Split(pool.run(_convert_folder, key, path, config, stored, *how), pool, key, is_own)


def load_split(
    directory: str | os.PathLike[str],
    ranks: int | Ranks,
    device_type: str,
    dtype: str | torch.dtype | None,
    verify: bool,
    trust_remote_code: bool,
    revision: str | None,
    token: str | bool | None,
    options: dict[str, Any],
) -> Split:
    """:func:`quantspec.from_pretrained` over ``ranks``; each reads its pieces of target and draft alone.

    Raises:
        Exception: as ``from_pretrained`` and :func:`convert_split`.
    """
    kind = _check_ranks(ranks, device_type)
    path = local_folder(directory, revision, token)
    model, config = hollow_saved_pair(path, torch.device(kind), dtype, verify, trust_remote_code, options)
    stored = plan(model, config, _world(ranks))
    with _started(ranks, device_type) as (pool, is_own):
        key = next(_KEYS)
        return Split(pool.run(_load, key, path, dtype, trust_remote_code, config, stored), pool, key, is_own)


def _check_ranks(ranks: int | Ranks, device_type: str) -> str:
    """The kind of device that the ranks are on, or will be; refuses a number that cannot be started."""
    if isinstance(ranks, Ranks):
        return ranks.seat.device.type
    check_can_start(ranks, device_type)
    return device_type


def _world(ranks: int | Ranks) -> int:
    return ranks.world if isinstance(ranks, Ranks) else ranks


@contextlib.contextmanager
def _started(ranks: int | Ranks, device_type: str) -> Iterator[tuple[Ranks, bool]]:
    """The ranks, and whether they were started for this; what was started ends with an error."""
    if isinstance(ranks, Ranks):
        yield ranks, False
        return
    pool = Ranks(ranks, device_type)
    try:
        yield pool, True
    except BaseException:
        pool.close()
        raise


# What runs on every rank.


def _convert(
    seat: Seat,
    key: int,
    path: str,
    config: QuantSpecConfig,
    stored: StoredCapture | None,
    original: PreTrainedModel | None,
) -> Pair:
    model = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    pair = split_pair(seat, model, hollow(model, seat.device), config, stored)
    if config.self_check:
        self_check(pair, functools.partial(_logits, pair, original))
    seat.kept[key] = Session(pair)
    return pair


def _convert_folder(
    seat: Seat, key: int, folder: Path, config: QuantSpecConfig, stored: StoredCapture | None, *how: Any
) -> Pair:
    pair = part_of_checkpoint(seat, folder, config, stored, *how)
    if config.self_check:
        self_check(pair, functools.partial(_logits, pair, None))
    seat.kept[key] = Session(pair)
    return pair


def _load(seat: Seat, key: int, folder: Path, *how: Any) -> Pair:
    pair = part_of_saved_pair(seat, folder, *how)
    if pair.config.self_check:
        self_check(pair, functools.partial(_logits, pair, None))
    seat.kept[key] = Session(pair)
    return pair


@torch.no_grad()
def _logits(pair: Pair, original: PreTrainedModel | None, ids: Tensor) -> Tensor:
    """Logits ``(1, T, V)`` of the original model where rank 0 has it, the same on all ranks; else of the parts."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    states = [
        torch.zeros(1, ids.shape[1] + 1, *state.shape, dtype=state.dtype, device=ids.device)
        for state in pair.captured.states
    ]
    logits = pair.captured.graph_module(ids, positions, *states).contiguous()
    if original is not None:
        given = ids.to(original.device)
        training = [module for module in original.modules() if module.training]
        original.eval()
        logits = original(input_ids=given, attention_mask=torch.ones_like(given), use_cache=False).logits.to(logits)
        for module in training:
            module.training = True
    dist.broadcast(logits, 0)
    return logits


def _generate(seat: Seat, session: int | Session, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    if isinstance(session, int):
        args, options = tree_map_only(Tensor, lambda x: x.to(seat.device), (args, options))
    own: Session = seat.kept[session] if isinstance(session, int) else session
    return generate(own, own.pair.model, *args, **options)


def _reset(seat: Seat, session: int | Session) -> None:
    session = seat.kept[session] if isinstance(session, int) else session
    with session.exclusive():
        session.release()


def _gather(seat: Seat, session: int | Session) -> Pair | None:
    session = seat.kept[session] if isinstance(session, int) else session
    with session.exclusive():
        return gather_pair(seat, session.pair)


def _forget(seat: Seat, key: int) -> None:
    seat.kept.pop(key, None)
