"""Durations of cycles that earlier processes measured on this machine: a small JSON file in the user's cache folder.

They say where to begin, so that nothing has to be captured to learn what it takes. A file that cannot be read or
written is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quantspec.pair import Pair

from .plan import Plan, Source

# Kinds of calls that the file keeps, the newest of them.
_MOST_KEPT = 256
# Of a duration, what it must have changed by to be written.
_CHANGE = 0.1


def times_file() -> Path:
    """Where the times are kept: below ``XDG_CACHE_HOME``, or ``~/.cache``."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "quantspec" / "cycle_times.json"


class KnownTimes:
    """Of calls of one kind.

    Attributes:
        seconds: of each plan that was measured.
    """

    def __init__(self, pair: Pair, batch_size: int, context: int, in_lockstep: bool) -> None:
        """Read what is kept of calls with ``batch_size`` rows of up to ``context`` tokens, a power of two."""
        shapes = [(at.query_heads, at.kv_heads, at.key_dim, at.value_dim, at.window, at.chunk) for at in pair.layers]
        model = (pair.weight_bytes, str(pair.model.dtype), pair.vocab_size, shapes)
        config = pair.config
        options = (config.draft_recipe, config.draft_attention, config.draft_attention_share, config.kv_group_size)
        device = torch.cuda.get_device_name(pair.device) if pair.device.type == "cuda" else pair.device.type
        versions = [version(library) for library in ("quantspec", "torch", "transformers")]
        kind = (device, versions, model, *options, pair.compiles, batch_size, context, in_lockstep)
        self._key = hashlib.sha256(repr(kind).encode()).hexdigest()[:16]
        self.seconds = _plans(_read().get(self._key))

    def keep(self, seconds: Mapping[Plan, float]) -> None:
        """Write what was measured if it says something new; of two processes at once one may lose its own."""
        changed = {
            plan: taken for plan, taken in seconds.items() if abs(taken - self.seconds.get(plan, 0.0)) > _CHANGE * taken
        }
        if not changed:
            return
        self.seconds.update(changed)
        kept = _read()
        earlier = _plans(kept.pop(self._key, None))
        # The newest are the last.
        kept[self._key] = {f"{p.source} {p.num_drafts}": round(t, 7) for p, t in {**earlier, **self.seconds}.items()}
        path = times_file()
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
                json.dump(dict(list(kept.items())[-_MOST_KEPT:]), file)
            os.replace(file.name, path)


def _read() -> dict[str, Any]:
    try:
        kept = json.loads(times_file().read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _plans(kept: Any) -> dict[Plan, float]:
    """What the file says of one kind; nothing if it is damaged."""
    try:
        names = {name: name.split() for name in kept or ()}
        plans = {Plan(int(count), Source(source)): float(kept[name]) for name, (source, count) in names.items()}
    except (TypeError, ValueError):
        return {}
    return {plan: seconds for plan, seconds in plans.items() if 0 < seconds < float("inf")}
