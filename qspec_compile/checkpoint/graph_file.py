"""The capture in a saved folder: an optional file, without which a model is captured again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from quantspec.capture import Capture
from quantspec.capture.stored import from_json, key_of, to_json
from quantspec.config import QuantSpecConfig
from quantspec.pair import Pair
from quantspec.pair.frozen import options_of

from .folder import GRAPH_FILE, GRAPH_PREFIX

_LOGGER = logging.getLogger(__name__)


def write_capture(pair: Pair, folder: Path) -> dict[str, Tensor]:
    """Write what capture made of the pair's model, if it can be kept.

    Returns:
        The graph's own tensors, as named in the saved files.
    """
    key = _key(pair.model, pair.config)
    if key is None:
        return {}
    try:
        graph, constants = to_json(pair.captured, pair.model)
    except Exception as error:
        # A folder without it is complete.
        _LOGGER.debug("the captured graph is not saved: %s", error)
        return {}
    (folder / GRAPH_FILE).write_text(json.dumps({"key": key, "graph": graph}), encoding="utf-8")
    return {f"{GRAPH_PREFIX}{name}": tensor for name, tensor in constants.items()}


def read_capture(
    folder: Path, model: PreTrainedModel, config: QuantSpecConfig, get: Callable[[str], Tensor], names: list[str]
) -> Capture | None:
    """What capture made of ``model`` when it was saved; None where there is nothing that still holds.

    Args:
        folder: with files that were checked.
        model: as loaded, on its device and in its dtype.
        config: the options.
        get: looks a tensor of the saved files up.
        names: of the graph's own tensors there.
    """
    path = folder / GRAPH_FILE
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["key"] != _key(model, config):
            _LOGGER.debug("'%s' is of other versions, another device or dtype: capturing anew", path)
            return None
        constants = {name.removeprefix(GRAPH_PREFIX): get(name) for name in names}
        return from_json(saved["graph"], constants, model)
    except Exception as error:
        # Whatever is wrong with it, the model itself is there.
        _LOGGER.debug("'%s' cannot be used: %s; capturing anew", path, error)
        return None


def _key(model: PreTrainedModel, config: QuantSpecConfig) -> dict[str, str] | None:
    return key_of(model, {**dict(options_of(model.config)), "rope_context": config.rope_context})
