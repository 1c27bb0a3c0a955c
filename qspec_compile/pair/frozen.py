"""What a capture froze of a model (modules, tensors, hooks, forwards, options), and whether it is still so."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from quantspec.capture import follows_length

# What a module holds in dicts of its own.
_HELD = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
# They change what training does.
_OF_TRAINING = frozenset({"training", "gradient_checkpointing"})
# They say what a forward returns or what goes with the model; names of every config, such as architectures, do too.
_OF_NO_FORWARD = frozenset({"model_type", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "auto_map"})


class FrozenModel:
    """A model as it was captured.

    In-place changes of weights are no part of it: graphs that share the tensors see them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parts = dict(_parts(model))
        self._options = copy.deepcopy(dict(options_of(getattr(model, "config", None))))
        self._remember()

    def __getstate__(self) -> dict[str, Any]:
        # A copy's objects have other addresses.
        return {**vars(self), "_modules": [], "_dicts": [], "_seen": None}

    def forget_what_running_changed(self) -> None:
        """Leave out what has changed since because the model ran, a counter for example."""
        now = dict(_parts(self._model))
        self._parts = {name: part for name, part in self._parts.items() if _same(part, now.get(name))}
        options = dict(options_of(getattr(self._model, "config", None)))
        self._options = {name: value for name, value in self._options.items() if value == options.get(name)}
        self._remember()

    def check(self) -> None:
        """Compare, in about a millisecond for 32 layers where nothing has changed.

        Raises:
            ValueError: naming the first part that was replaced, added or removed.
        """
        if self._seen is None or self._addresses() != self._seen:
            self._check_parts()
        options = dict(options_of(getattr(self._model, "config", None)))
        for name, option in self._options.items():
            if name not in options or options[name] != option:
                raise _changed(f"option '{name}' in the config")

    def _check_parts(self) -> None:
        now = dict(_parts(self._model))
        for name, part in self._parts.items():
            if name not in now or not _same(part, now[name]):
                raise _changed(name)
        for name in now:
            # What running changes is not in the parts, and a module may be given attributes that it does not read.
            if name not in self._parts and name.startswith(("weight", "buffer", "module")):
                raise _changed(name)
        self._remember()

    def _remember(self) -> None:
        self._modules = list(self._model.modules())
        self._dicts = [vars(module) for module in self._modules]
        self._dicts += [vars(module)[held] for module in self._modules for held in _HELD]
        self._seen = self._addresses()

    def _addresses(self) -> list[int]:
        classes: list[type[nn.Module]] = list(map(type, self._modules))
        forwards = (kind.forward for kind in set(classes))
        return [*map(id, chain(classes, *map(dict.values, self._dicts))), *sorted(map(id, forwards))]


def _parts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Everything that a capture reads of a model and that can be replaced, by what an error calls it."""
    modules = list(model.named_modules())
    for path, module in modules:
        for name, parameter in module._parameters.items():
            yield f"weight '{path}{'.' if path else ''}{name}'", parameter
    for path, module in modules:
        prefix = f"{path}." if path else ""
        where = f"module '{path}'" if path else type(model).__name__
        yield where, type(module)
        # Its numbers and buffers change with the length of the text that the model computed last.
        moves = follows_length(module)
        for name, buffer in module._buffers.items() if not moves else ():
            yield f"buffer '{prefix}{name}'", buffer
        yield f"a forward hook of {where}", tuple(filter(_changes_values, module._forward_hooks.values()))
        yield f"a forward pre-hook of {where}", tuple(module._forward_pre_hooks.values())
        yield f"the forward of {where}", _forward(module)
        for name, value in vars(module).items():
            number = isinstance(value, int | float) and not moves
            function = path and callable(value) and not isinstance(value, nn.Module) and name != "forward"
            if not name.startswith("_") and name not in _OF_TRAINING and (number or function):
                yield f"attribute '{prefix}{name}'", value


def options_of(config: Any) -> Iterator[tuple[str, Any]]:
    """What a forward may read of a config and of those within it, by name; transformers' private entries left out."""
    known = vars(PreTrainedConfig()).keys() | _OF_NO_FORWARD
    for name, value in vars(config).items() if isinstance(config, PreTrainedConfig) else ():
        if isinstance(value, PreTrainedConfig):
            yield from ((f"{name}.{inner}", option) for inner, option in options_of(value))
        elif not name.startswith("_") and name not in known:
            yield name, value


# transformers' own, which prepare inputs for gradients (checkpointing), and record what a call asks for.
_HARMLESS_HOOKS = (PreTrainedModel.__module__, "transformers.utils.output_capturing")


def _changes_values(hook: Any) -> bool:
    return getattr(hook, "__module__", None) not in _HARMLESS_HOOKS


def _forward(module: nn.Module) -> Any:
    """What runs as a module's forward; torch.compile around it changes nothing."""
    forward: Any = module.forward
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    return forward.__func__ if getattr(forward, "__self__", None) is module else forward


def _same(part: Any, now: Any) -> bool:
    if isinstance(part, tuple):
        return isinstance(now, tuple) and len(part) == len(now) and all(map(_same, part, now))
    if isinstance(part, int | float):
        return type(part) is type(now) and part == now
    return part is now


def _changed(part: str) -> ValueError:
    return ValueError(f"{part} of the model was replaced after conversion; convert it again")
