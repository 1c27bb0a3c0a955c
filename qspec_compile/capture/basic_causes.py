"""Why no cache of keys and values serves a model, told by running it; asked once a capture has failed.

A capture ends where it first cannot go on, which need not be where the reason lies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from quantspec.errors import UnsupportedModelError

from .checks import random_text

NO_ATTENTION = (
    "it has state that does not grow with the text and no attention layer, so no key/value cache to read at fewer "
    "bits; only INT4 weights would make it faster, which are torchao's to give"
)
# Of the beginning that two texts share, and of all: longer than the chunks in which a text is hashed, or shorter than
# those that some models cannot pass.
_LENGTHS = ((65, 130), (5, 9))
# Of logits' norm.
_FAR = 1e-3


def basic_cause(model: PreTrainedModel) -> str | None:
    """The reason, in words that follow the model's name; None where running it shows none."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    devices = [] if model.device.type == "cpu" else [model.device]
    try:
        with _attributes_kept(model), torch.no_grad(), torch.random.fork_rng(devices, device_type=model.device.type):
            for lengths in _LENGTHS:
                # It may not run in these ways, and then what the capture said stands.
                with contextlib.suppress(Exception):
                    return _cause(model, lengths)
        return None
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def naming_basic_cause(model: PreTrainedModel) -> Iterator[None]:
    """Raise :func:`basic_cause`, if there is one, in place of an ``UnsupportedModelError``."""
    try:
        yield
    except UnsupportedModelError as error:
        cause = basic_cause(model)
        if cause is None:
            raise
        raise UnsupportedModelError(f"cannot convert {type(model).__name__}: {cause}") from error


@torch.no_grad()
def sees_later_tokens(model: PreTrainedModel, lengths: tuple[int, int] = _LENGTHS[-1]) -> bool:
    """Whether what ``model`` makes of a token depends on those after it."""
    return _are_far(*(_logits(model, text)[:, : lengths[0]] for text in _two_texts(model, lengths)))


def _cause(model: PreTrainedModel, lengths: tuple[int, int]) -> str | None:
    ids, _ = _two_texts(model, lengths)
    runs = []
    for seed in range(2):
        torch.manual_seed(seed)
        runs.append(_logits(model, ids))
    if _are_far(*runs):
        return "its forward draws random numbers, as hashing by random rotations does, so no text is the model's own"
    if sees_later_tokens(model, lengths):
        return "what it makes of a token depends on the tokens after it, so it cannot be decoded token by token"
    outputs = [model(input_ids=ids[:, :length], use_cache=True) for length in lengths]
    kept = _state_in_modules(model, ids[:, : lengths[0]], ids[:, -lengths[0] :])
    if kept:
        return (
            f"its modules keep state of their own ({', '.join(kept)}) beside the layers of transformers' cache, whose "
            "updates are what a capture sees"
        )
    short, long = map(_held, outputs)
    return NO_ATTENTION if short and short == long else _own_state(outputs[0])


def _two_texts(model: PreTrainedModel, lengths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Token ids ``(1, T)`` of two texts that begin alike."""
    shared, length = lengths
    embedding: Any = model.get_input_embeddings()
    texts = random_text(model, embedding.weight.shape[0], (2, length), torch.Generator("cpu").manual_seed(0))
    texts[1, :shared] = texts[0, :shared]
    one, other = texts.to(model.device).split(1)
    return one, other


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()


def _are_far(logits: Tensor, others: Tensor) -> bool:
    return bool((others - logits).norm() > _FAR * logits.norm())


def _held(output: Any) -> list[torch.Size]:
    """Shapes of what a forward gives for the next one."""
    return [tensor.shape for name, value in output.items() if name != "logits" for tensor in _tensors(value)]


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put plain attributes of modules back."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def _state_in_modules(model: PreTrainedModel, *texts: Tensor) -> list[str]:
    """Plain attributes that two texts of one length leave with other values; what follows the length is no state."""
    left = []
    for text in texts:
        model(input_ids=text, use_cache=True)
        tensors = [(module, *of) for module in model.modules() for of in vars(module).items()]
        left.append({(module, name): value for module, name, value in tensors if isinstance(value, Tensor)})
    one, other = left
    return list(
        dict.fromkeys(
            f"'{type(module).__name__}.{name}'"
            for (module, name), value in other.items()
            if (module, name) in one and value is not one[module, name] and not torch.equal(value, one[module, name])
        )
    )


def _own_state(output: Any) -> str | None:
    """What a cache of the model's own class keeps elsewhere than in the layers of transformers' cache."""
    for cache in output.values():
        for name, held in vars(cache).items() if isinstance(cache, Cache) else ():
            if name != "layers" and next(_tensors(held), None) is not None:
                return (
                    f"its {type(cache).__name__} keeps state of its own ('{name}') beside the layers of transformers' "
                    "cache, whose updates are what a capture sees"
                )
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))
