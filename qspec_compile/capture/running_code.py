"""What a forward runs, as a digest: equal ones give equal graphs.

A graph follows from the code that is loaded, not from the files that it came from, since functions, classes and objects
can be patched at any time. So this reads what the modules of a model hold, the bytecode of their classes, and that of
everything in transformers and in the capture that can be reached from there. Code of other packages gets no digest.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from itertools import chain, count
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import GeneralInterface, ModelOutput

# Functions of these are followed to what they call; those of torch and Python are as their versions say.
_FOLLOWED = ("transformers", "quantspec")
_LIBRARIES = frozenset({"torch", "typing_extensions", *_FOLLOWED, *sys.stdlib_module_names})
_PRIMITIVES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Classes of models, as they print.
_OF_MODELS = ("<class 'transformers.models.", "<class 'transformers_modules.")
# Described by themselves, or of no forward: how a model was loaded, and what it generates with.
_NOT_READ = {*vars(nn.Module()), "generation_config", "hf_quantizer", "name_or_path", "_is_hf_initialized"}
_NOT_READ_OF_CONFIGS = ("_name_or_path", "name_or_path", "quantization_config", "transformers_version")


class CannotTell(Exception):
    """Code or an object that may compute anything; it is caught, and the capture is not kept."""


def running_code(model: PreTrainedModel, *functions: Callable) -> str:
    """A digest of what runs when ``functions`` trace the forward of ``model``: code, config, tensors but for values.

    Raises:
        CannotTell: code of other packages, hooks, modes of torch, or objects that do not tell what they compute.
    """
    reader = _Reader(model)
    reader.read_process()
    reader.read_model(model)
    for function in functions:
        reader.read(function, strict=True)
    reader.follow()
    return reader.digest()


class _Reader:
    """Reads objects into a digest, each once. ``strict`` refuses what other packages or unknown objects compute."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._hash = hashlib.sha256()
        self._names = {module: name for name, module in model.named_modules()}
        self._homes = {_home(str(type(module))) for module in self._names}
        # They are kept, so that their ids stay theirs.
        self._seen: dict[int, tuple[int, Any]] = {}
        self._numbers = count()
        self._to_follow: list[FunctionType] = []

    def digest(self) -> str:
        return self._hash.hexdigest()

    def read_process(self) -> None:
        """What of the process's state an export follows."""
        modes: list[Any] = _get_current_function_mode_stack()
        # A default device is such a mode too.
        modes = [mode for mode in modes if type(mode) is not DeviceContext]
        modes += _get_current_dispatch_mode_stack()
        modes += [*module_hooks._global_forward_hooks.values(), *module_hooks._global_forward_pre_hooks.values()]
        if modes:
            raise CannotTell(modes)
        self._say(sys.version, torch.get_default_dtype(), torch.get_default_device())
        # They are called by their names, so any may have been replaced.
        for namespace in (vars(torch), vars(torch.nn.functional), vars(Tensor)):
            for name, value in namespace.items():
                if isinstance(value, FunctionType):
                    self._say(name)
                    self.read(value, strict=True)

    def read_model(self, model: PreTrainedModel) -> None:
        """Its tensors but for their values, what its modules hold, and their classes."""
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        ties: dict[int, int] = {}
        for name, tensor in tensors:
            if type(tensor) not in (Tensor, nn.Parameter):
                raise CannotTell(type(tensor))
            tie = ties.setdefault(id(tensor), len(ties))
            self._say(name, tie, type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device.type)
        for module, name in self._names.items():
            self._say(name)
            if any(vars(module)[hooks] for hooks in _HOOKS):
                raise CannotTell(name)
            for attribute, value in vars(module).items():
                if attribute not in _NOT_READ:
                    self._say(attribute)
                    self.read(value, strict=True)
            self.read(type(module), strict=True)

    def follow(self) -> None:
        """Read what the functions so far call, and what those call."""
        while self._to_follow:
            function = self._to_follow.pop()
            strict = function.__module__.startswith("transformers.models.")
            names = dict.fromkeys(_names_in(function.__code__))
            for name in names:
                value = function.__globals__.get(name)
                # Elsewhere numbers and names may be of this process alone.
                if isinstance(value, _PRIMITIVES) and not strict:
                    continue
                self._say(name)
                if not isinstance(value, ModuleType):
                    self.read(value, strict and isinstance(value, FunctionType))
                elif _package(value.__name__) in _FOLLOWED:
                    for attribute in names:
                        self.read(vars(value).get(attribute))

    def read(self, value: Any, strict: bool = False) -> None:
        """Read an object, as far as it can say what it computes."""
        parts = _parts(value, self._is_of_another_model)
        if isinstance(value, _PRIMITIVES):
            self._say(value)
        elif id(value) in self._seen:
            self._say(self._seen[id(value)][0])
        elif parts is not None:
            self._say(type(value), len(parts))
            self._seen[id(value)] = (next(self._numbers), value)
            for part in parts:
                self.read(part, strict)
            # Equal constants may be one object or several.
            del self._seen[id(value)]
        else:
            self._seen[id(value)] = (next(self._numbers), value)
            self._read_new(value, strict)

    def _is_of_another_model(self, entry: Any) -> bool:
        """Registries have classes, or their names, of every kind of model that the process has imported or built."""
        if isinstance(entry, type) and issubclass(entry, ModelOutput):
            return True
        name = str(entry) if isinstance(entry, str | type) else ""
        return name.startswith(_OF_MODELS) and _home(name) not in self._homes

    def _read_new(self, value: Any, strict: bool) -> None:
        if isinstance(value, FunctionType):
            self._function(value, strict)
        elif isinstance(value, type):
            self._class(value, strict)
        elif isinstance(value, nn.Module) and value in self._names:
            self._say(self._names[value])
        elif isinstance(value, PreTrainedConfig):
            self._config(value)
        else:
            self._object(value, strict)

    def _function(self, function: FunctionType, strict: bool) -> None:
        home = function.__globals__.get("__name__", "")
        if strict and _package(home) not in _LIBRARIES:
            raise CannotTell(f"{home}.{function.__qualname__}")
        self._say(home, function.__qualname__)
        self._code(function.__code__)
        # No forward generates; what does has caches.
        if _package(home) in _FOLLOWED and not home.startswith("transformers.generation."):
            self._to_follow.append(function)
        self.read(function.__defaults__)
        self.read(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            content = _content(cell)
            self.read(content, strict and isinstance(content, FunctionType | MethodType))

    def _class(self, kind: type, strict: bool) -> None:
        self._say(kind)
        if strict and _package(kind.__module__) not in _LIBRARIES:
            raise CannotTell(kind)
        # The capture puts functions of its own in place of those that are registered.
        if issubclass(kind, GeneralInterface):
            return
        if _package(kind.__module__) not in _FOLLOWED and not issubclass(kind, nn.Module):
            return
        # What every model has is mostly for loading, saving and generating.
        of_all_models = kind in PreTrainedModel.__mro__
        for name, value in vars(kind).items():
            if name in ("__init__", "__setstate__") and issubclass(kind, nn.Module):
                # The modules are made; torch.compile wraps what makes them.
                continue
            if isinstance(value, FunctionType) and of_all_models:
                self._say(name)
                self._code(value.__code__)
            elif isinstance(value, FunctionType) or (not name.startswith("__") and not of_all_models):
                self._say(name)
                self.read(value, strict and isinstance(value, FunctionType))
        for base in kind.__bases__:
            self.read(base, strict)

    def _object(self, value: Any, strict: bool) -> None:
        kind = type(value)
        if strict and (isinstance(value, Tensor) or _package(kind.__module__) not in _LIBRARIES):
            raise CannotTell(kind)
        self._say(kind)
        if _package(kind.__module__) in _FOLLOWED and not issubclass(kind, GeneralInterface):
            self.read(kind, strict)
            self.read(getattr(value, "__dict__", None), strict)

    def _code(self, code: CodeType) -> None:
        self._say(code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_flags)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self._code(constant)
            else:
                self._say(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)

    def _config(self, config: PreTrainedConfig) -> None:
        options = {name: value for name, value in config.to_dict().items() if name not in _NOT_READ_OF_CONFIGS}
        try:
            self._say(type(config), json.dumps(options, sort_keys=True))
        except TypeError as error:
            raise CannotTell(error) from error

    def _say(self, *words: Any) -> None:
        self._hash.update(repr(words).encode())


def _package(module: str) -> str:
    return module.partition(".")[0]


def _home(name: str) -> str:
    """The package of a class that prints as ``<class 'PACKAGE.MODULE.CLASS'>``."""
    return name.rsplit(".", 2)[0]


def _parts(value: Any, leaves_out: Callable[[Any], bool]) -> list[Any] | None:
    """What an object consists of, in an order that is the same in every process; None if it is no container.

    Entries of a dictionary or a set that ``leaves_out`` are no parts.
    """
    if isinstance(value, dict):
        # Some of transformers' make what they are asked for.
        items: list[tuple[Any, Any]] = [item for item in dict.items(value) if not leaves_out(item[0])]
        if _are_named(value):
            items.sort(key=lambda item: str(item[0]))
        return list(chain.from_iterable(items))
    if isinstance(value, set | frozenset):
        return sorted(
            (item for item in value if not leaves_out(item)), key=lambda item: getattr(item, "__name__", str(item))
        )
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, property):
        return [value.fget]
    wrapped = getattr(value, "__wrapped__", None) if not isinstance(value, FunctionType | type) else None
    return [wrapped] if isinstance(wrapped, FunctionType) else None


def _are_named(values: dict[Any, Any]) -> bool:
    return all(isinstance(name, str) for name in values)


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None
