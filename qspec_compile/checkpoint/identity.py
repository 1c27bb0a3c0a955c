"""That a folder gives back the model it was saved from.

A save holds a class's name, its config and its tensors. What else makes a model (hooks, a patched forward, replaced
modules) is found on saving, where a model made of these three is compared with the pair, and on loading, where the
target's logits of a few fixed tokens are compared with the saved ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from quantspec.capture import converting, rope_at
from quantspec.errors import SavedModelError
from quantspec.pair import Pair
from quantspec.passes import Role
from quantspec.self_check import EXACT_TOLERANCE

_NUM_TOKENS = 8
# One logit may be off by this much more, in root mean squares of all, than all are on average.
_SINGLE_LOGIT = 10


def fixed_tokens(pair: Pair) -> Tensor:
    """``(1, T)`` int64 on the pair's device, the same for every model of that vocabulary."""
    count = min(_NUM_TOKENS, pair.max_len)
    return (torch.arange(count, device=pair.device) * 7919 + 13)[None] % pair.vocab_size


def target_logits(pair: Pair, input_ids: Tensor) -> Tensor:
    """The target's logits ``(1, T, V)`` of every token of ``input_ids (1, T)``, in host memory."""
    count = input_ids.shape[1]
    cache = pair.new_cache(1, count)
    cache.reserve(count)
    return pair.read(Role.TARGET, input_ids, cache).cpu()


def distance(ours: Tensor, expected: Tensor) -> float:
    """How far logits ``(1, T, V)`` are from others, relative to those: of all, and of the one that differs most."""
    ours, expected = ours.float(), expected.float()
    finite = expected.isfinite()
    if not torch.equal(finite, ours.isfinite()):
        return float("inf")
    expected = expected.where(finite, 0)
    difference = ours.where(finite, 0) - expected
    norm = expected.norm(dim=-1).clamp_min(1e-30)
    single = difference.abs().amax(-1) * expected.shape[-1] ** 0.5 / _SINGLE_LOGIT
    # Experts may be chosen differently for a token where two are nearly equal.
    return (torch.maximum(difference.norm(dim=-1), single) / norm).median().item()


def check_can_be_loaded(pair: Pair, logits: Tensor) -> None:
    """Compare the pair with what loading will make of the model's class, config and tensors.

    Args:
        pair: the pair.
        logits: the target's of :func:`fixed_tokens`.

    Raises:
        SavedModelError: the model was changed since its conversion, or would be loaded as another one.
    """
    model, name = pair.model, type(pair.model).__name__
    try:
        pair.check_unmoved()
    except ValueError as error:
        raise SavedModelError(f"the pair is no longer the model's: {error}") from error
    if not _is_found_by_name(model):
        raise SavedModelError(
            f"the model's class {name} is not one that transformers loads by that name: register it with "
            f"AutoModelForCausalLM.register(config_class, {name}), also where the pair is loaded, or let its code be "
            f"saved too with {name}.register_for_auto_class('AutoModelForCausalLM')"
        )
    try:
        with converting(), torch.no_grad():
            ids = fixed_tokens(pair)
            anew = _made_anew(model)
            with rope_at(anew, pair.config.rope_context):
                theirs = anew(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    except SavedModelError:
        raise
    except Exception as error:
        raise SavedModelError(f"{name} made anew from its config and weights does not run: {error}") from error
    off, allowed = distance(theirs.cpu(), logits), EXACT_TOLERANCE[model.dtype]
    if not off <= allowed:
        raise SavedModelError(
            f"{name} made anew from its config and weights computes other logits (by {off:.3g}, allowed "
            f"{allowed:.3g}): hooks, a patched forward and replaced modules are not saved. Make them a class of their "
            "own and register it with AutoModelForCausalLM, or remove them, and convert the model again"
        )


def _is_found_by_name(model: PreTrainedModel) -> bool:
    """Whether loading finds the model's class: in transformers, among registered ones, or as code in the folder."""
    kind = type(model)
    registered = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), ())
    registered = registered if isinstance(registered, tuple) else (registered,)
    return kind in (getattr(transformers, kind.__name__, None), *registered) or kind._auto_class is not None


def _made_anew(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class, config and tensors, which are shared, and of nothing else."""
    with torch.device("meta"):
        anew = type(model)(copy.deepcopy(model.config))
    ours, theirs = ({(name, tuple(tensor.shape)) for name, tensor in _tensors(one)} for one in (model, anew))
    wrong = sorted({name for name, _ in ours ^ theirs})
    if wrong:
        raise SavedModelError(
            f"the model does not have the weights that {type(model).__name__} has by its config, so they would not be "
            f"found on loading ({', '.join(wrong)}): change model.config too, or undo the change"
        )
    for name, tensor in _tensors(model):
        owner, _, leaf = name.rpartition(".")
        module = anew.get_submodule(owner)
        (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor  # type: ignore[assignment]
    return anew.eval()


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under all of their names."""
    return chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
