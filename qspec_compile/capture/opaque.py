"""Modules that an export cannot follow, since what they run depends on the tokens' values: kept whole, as calls.

A loop over the experts that the tokens choose is one. That such a module lets no token see another is not taken for
granted: the captured graph is tried, with tokens together and apart.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from quantspec.kernels import called_module
from quantspec.passes.called_modules import ModuleCall

_NOT_OF_A_MODEL = {Path(torch.__file__).parent, Path(__file__).parent}
_CONSTANTS = (type(None), bool, int, float, str)


class DataDependentError(Exception):
    """What a forward runs depends on the tokens' values; ``where`` is the line of the model that asks for them."""

    def __init__(self, where: str) -> None:
        super().__init__(f"what its forward runs depends on the tokens' values: {where}")
        self.where = where


@contextlib.contextmanager
def telling_data_dependence() -> Iterator[None]:
    """Raise :class:`DataDependentError` in place of torch's errors of that kind, with which it prints whole graphs."""
    try:
        yield
    except RuntimeError as error:
        if "data-dependent" in str(error):
            raise DataDependentError(_line_of(error)).with_traceback(error.__traceback__) from error
        raise


def _line_of(error: BaseException) -> str:
    """The innermost line of a model, or of what it calls outside of torch, that led to ``error``."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = [frame for frame in frames if _NOT_OF_A_MODEL.isdisjoint(Path(frame.filename).parents)][-1]
    return f"'{frame.line}' ({Path(frame.filename).name}:{frame.lineno})"


class OpaqueModules:
    """The modules of ``model`` whose calls leave a marker in an export, and those calls; ``never`` are none of them."""

    def __init__(self, model: nn.Module, never: Collection[nn.Module] = ()) -> None:
        self._model = model
        self._never = {model, *never}
        # And which line of theirs ended an export.
        self._kinds: dict[type[nn.Module], str] = {}
        self.calls: list[ModuleCall] = []

    def take(self, module: nn.Module | None, error: Exception) -> bool:
        """Let ``module``, in which an export ended with ``error``, and all of its class run whole, if that may help."""
        if module is None or module in self._never or type(module) in self._kinds:
            return False
        if isinstance(error, DataDependentError):
            self._kinds[type(module)] = error.where
        return isinstance(error, DataDependentError)

    @contextlib.contextmanager
    def marked(self) -> Iterator[None]:
        """Let them leave markers, whose calls begin anew."""
        self.calls = []
        # A forward of its own, as accelerate gives, does more than the class says.
        named = [
            (path, module)
            for path, module in self._model.named_modules()
            if type(module) in self._kinds and "forward" not in vars(module)
        ]
        for path, module in named:
            module.forward = partial(self._mark, path, module)
        try:
            yield
        finally:
            for _, module in named:
                del module.forward

    def _mark(self, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        leaves, spec = tree_flatten((args, kwargs))
        places = tuple(place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        tensors = [leaves[place] for place in places]
        like = next((number for number, tensor in enumerate(tensors) if tensor.is_floating_point()), None)
        constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if like is None or not all(isinstance(leaf, _CONSTANTS) for leaf in constants):
            raise DataDependentError(self._kinds[type(module)])
        self.calls.append(ModuleCall(path, module, constants, places, spec, like))
        return called_module(tensors, like, len(self.calls) - 1)
