"""A pair that is split over ranks: this process has one part, and the others do as it does."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, PreTrainedModel

from .capture import check_model
from .checkpoint.split_loading import part_of_checkpoint, part_of_saved_pair, reads_in_slices
from .config import QuantSpecConfig
from .engine.session import Session
from .hugging_face.generate import generate
from .pair import Pair
from .pair.split import hollow, split_pair
from .ranks import Ranks, Seat
from .self_check import self_check

_KEYS = itertools.count()
# What a model consists of on the Hub.
_FILES = ["*.json", "*.safetensors"]


class Split:
    """A pair's other parts.

    Attributes:
        pair: the part of this process, rank 0.
        ranks: the processes.
    """

    def __init__(self, pair: Pair, ranks: Ranks, key: int, owns_ranks: bool) -> None:
        """``key`` is by which the others know theirs; who owns the ranks ends them."""
        self.pair = pair
        self.ranks = ranks
        self._key = key
        self._owns_ranks = owns_ranks

    def generate(self, session: Session, *args: Any, streamer: Any, generator: Any, **options: Any) -> Any:
        """:func:`quantspec.hugging_face.generate.generate` on every rank, with a ``session`` of its own on each.

        The streamer is asked here alone, and the generator draws here; all else is sent.

        Raises:
            RanksError: a rank failed or was ended.
            TypeError: an argument that cannot be sent.
        """
        try:
            pickle.dumps((args, options))
        except Exception as error:
            raise TypeError(
                f"an argument of generate() cannot be sent to the other ranks ({error}); define its class in a module"
            ) from error
        here = {**options, "streamer": streamer, "generator": generator}
        return self.ranks.run(_generate, session, args, here, others=(self._key, args, options))

    def reset(self, session: Session) -> None:
        """Release the cache of every rank."""
        self.ranks.run(_reset, session, others=(self._key,))

    def close(self) -> None:
        """End the ranks if they were started for this pair alone; else let them forget it."""
        if self._owns_ranks:
            self.ranks.close()
        else:
            self.ranks.run(_forget, self._key)


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
    with _started(ranks, device_type or model.device.type) as (pool, is_own), tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "model"))
        try:
            torch.save(model, path)
        except Exception as error:
            raise TypeError(
                f"{type(model).__name__} cannot be sent to the other ranks ({error}); undo what was patched in it"
            ) from error
        key = next(_KEYS)
        pair = pool.run(_convert, key, path, config, model, others=(key, path, config, None))
        return Split(pair, pool, key, is_own)


def convert_folder_split(
    folder: str | os.PathLike[str], config: QuantSpecConfig, ranks: int | Ranks, device_type: str
) -> Split:
    """:func:`convert_split` of a transformers model's folder or Hub id; a rank reads its pieces alone.

    Where the files hold weights in another form than the model does, this process loads the model whole before.

    Raises:
        Exception: as :func:`convert_split`, or what transformers raises for a folder that holds no model.
    """
    path = Path(folder)
    if not path.is_dir():
        path = Path(snapshot_download(str(folder), allow_patterns=_FILES))
    if not reads_in_slices(path):
        model = AutoModelForCausalLM.from_pretrained(path)
        return convert_split(model, config, ranks, device_type)
    with _started(ranks, device_type) as (pool, is_own):
        key = next(_KEYS)
        return Split(pool.run(_convert_folder, key, path, config), pool, key, is_own)


def load_split(
    folder: str | os.PathLike[str],
    ranks: int | Ranks,
    device_type: str,
    dtype: str | torch.dtype | None,
    verify: bool,
    trust_remote_code: bool,
    options: dict[str, Any],
) -> Split:
    """:func:`quantspec.from_pretrained` over ``ranks``; each reads its pieces of target and draft alone.

    Raises:
        Exception: as ``from_pretrained`` and :func:`convert_split`.
    """
    with _started(ranks, device_type) as (pool, is_own):
        key = next(_KEYS)
        arguments = (key, folder, dtype, verify, trust_remote_code, options)
        return Split(pool.run(_load, *arguments), pool, key, is_own)


@contextlib.contextmanager
def _started(ranks: int | Ranks, device_type: str) -> Iterator[tuple[Ranks, bool]]:
    """The ranks, and whether they were started for this; what was started ends with an error."""
    if isinstance(ranks, Ranks):
        yield ranks, False
        return
    if type(ranks) is not int or ranks < 2:
        raise ValueError(
            f"tensor_parallel must be a number of ranks, 2 or more, or the Ranks themselves, not {ranks!r}"
        )
    pool = Ranks(ranks, device_type)
    try:
        yield pool, True
    except BaseException:
        pool.close()
        raise


# What runs on every rank.


def _convert(seat: Seat, key: int, path: str, config: QuantSpecConfig, original: PreTrainedModel | None) -> Pair:
    model = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    pair = split_pair(seat, model, hollow(model, seat.device), config)
    if config.self_check:
        self_check(pair, functools.partial(_logits, pair, original))
    seat.kept[key] = Session(pair)
    return pair


def _convert_folder(seat: Seat, key: int, folder: Path, config: QuantSpecConfig) -> Pair:
    pair = part_of_checkpoint(seat, folder, config)
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
    logits = pair.captured.graph_module(ids, positions).contiguous()
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


def _forget(seat: Seat, key: int) -> None:
    seat.kept.pop(key, None)
