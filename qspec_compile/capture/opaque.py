"""Modules that an export cannot follow, since what they run depends on the tokens' values: kept whole, as calls.

A loop over the experts that the tokens choose is one. That such a module lets no token see another is not taken for
granted: the captured graph is tried, with tokens together and apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from quantspec.kernels import called_module
from quantspec.passes.called_modules import ModuleCall

_CONSTANTS = (type(None), bool, int, float, str)


class DataDependentError(Exception):
    """What a forward runs depends on the tokens' values."""

    def __init__(self) -> None:
        super().__init__(
            "what its forward runs depends on the tokens' values, as a loop over the experts that they choose or a cut "
            "of the text where they are surprising does"
        )


@contextlib.contextmanager
def telling_data_dependence() -> Iterator[None]:
    """Raise :class:`DataDependentError` in place of torch's errors of that kind, with which it prints whole graphs."""
    try:
        yield
    except RuntimeError as error:
        if "data-dependent" in str(error):
            raise DataDependentError().with_traceback(error.__traceback__) from error
        raise


class OpaqueModules:
    """The modules of ``model`` whose calls leave a marker in an export, and those calls; ``never`` are none of them."""

    def __init__(self, model: nn.Module, never: Collection[nn.Module] = ()) -> None:
        self._model = model
        self._never = {model, *never}
        self._kinds: set[type[nn.Module]] = set()
        self.calls: list[ModuleCall] = []

    def take(self, module: nn.Module | None, error: Exception) -> bool:
        """Let ``module``, in which an export ended with ``error``, and all of its class run whole, if that may help."""
        if module is None or module in self._never or type(module) in self._kinds:
            return False
        if isinstance(error, DataDependentError):
            self._kinds.add(type(module))
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
            raise DataDependentError
        self.calls.append(ModuleCall(path, module, constants, places, spec, like))
        return called_module(tensors, like, len(self.calls) - 1)
