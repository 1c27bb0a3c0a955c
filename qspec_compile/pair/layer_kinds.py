"""A model of many layers told from one layer of each kind: what is alike need not be captured again and again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from quantspec.capture.repeated import COUNTS

_T = TypeVar("_T")
# Values that tell layers apart; tensors do by their shape and dtype, modules by their class.
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class LayerKinds:
    """Which layers of a model are alike.

    Attributes:
        path: dotted name of the list of layers.
        kinds: for each layer of the whole model, the place of its like in the shortened one.
    """

    path: str
    kinds: tuple[int, ...]

    def expand(
        self, entries: Iterable[_T], name_of: Callable[[_T], str], renamed: Callable[[_T, str], _T]
    ) -> Iterator[_T]:
        """What the whole model has, from ``entries`` of the shortened one in forward order, by dotted names.

        Entries outside of layers stay as they are; a run of entries of layers becomes that of every layer.
        """
        number = re.compile(rf"{re.escape(self.path)}\.(\d+)\.")
        matched = [(entry, number.match(name_of(entry))) for entry in entries]
        for in_layers, run in groupby(matched, key=lambda pair: pair[1] is not None):
            if not in_layers:
                yield from (entry for entry, _ in run)
                continue
            of_kind: dict[int, list[_T]] = {}
            for entry, match in run:
                of_kind.setdefault(int(match[1]), []).append(entry)  # type: ignore[index]
            for layer, kind in enumerate(self.kinds):
                for entry in of_kind.get(kind, ()):
                    rest = name_of(entry)[len(f"{self.path}.{kind}.") :]
                    yield renamed(entry, f"{self.path}.{layer}.{rest}")


def shorten(model: PreTrainedModel) -> LayerKinds | None:
    """Leave one layer of each kind in ``model``, whose configuration is its own; None where that cannot be done.

    Layers are alike where their modules have the same classes, shapes and attributes, but for what counts them.
    """
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    lists = [(name, layers) for name, layers in lists if len(layers) == count]
    is_read = any(getattr(module, "config", None) is config for module in model.modules())
    # Layers that read what others have cached mean them by their number.
    depend = getattr(config, "num_kv_shared_layers", None)
    if not is_read or depend or len(lists) != 1 or _share_modules(lists[0][1]):
        return None
    path, layers = lists[0]
    described = [dict(_describe(layer)) for layer in layers]
    # Layers with attention and layers with states count in modules of their own.
    numbers = {
        key
        for key in {key for one in described for key in one if COUNTS.search(key[1])}
        if all(one[key] == index for index, one in enumerate(described) if key in one)
    }
    kept: list[int] = []
    kinds: list[int] = []
    for one in described:
        own = {key: value for key, value in one.items() if key not in numbers}
        signatures = [{key: value for key, value in described[index].items() if key not in numbers} for index in kept]
        if own not in signatures:
            kept.append(len(kinds))
            signatures.append(own)
        kinds.append(signatures.index(own))
    for name, value in vars(config).items():
        # Others may be as long by chance.
        if "layer" in name and isinstance(value, list | tuple) and len(value) == count:
            setattr(config, name, type(value)(value[index] for index in kept))
    for place, index in enumerate(kept):
        for name, attribute in numbers & described[index].keys():
            setattr(layers[index].get_submodule(name), attribute, place)
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.ModuleList(layers[index] for index in kept))
    config.num_hidden_layers = len(kept)
    return LayerKinds(path, tuple(kinds))


def _share_modules(layers: nn.ModuleList) -> bool:
    modules = [part for layer in layers for part in layer.modules()]
    return len(modules) != len(set(modules))


def _describe(layer: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    """Everything that may tell a layer from another, by module and attribute."""
    for name, module in layer.named_modules():
        yield (name, ""), type(module)
        for key, value in vars(module).items():
            if isinstance(value, _PLAIN) or (
                isinstance(value, list | tuple) and all(isinstance(part, _PLAIN) for part in value)
            ):
                yield (name, key), value
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield (name, key), (tuple(tensor.shape), tensor.dtype)
