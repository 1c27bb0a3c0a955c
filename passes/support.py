"""Refuse graphs that would decode wrongly: every op that mixes tokens must be an attention marker."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import describe

# A prime that is no likely size of anything else, so that the token axis can be told by its length.
_NUM_TOKENS = 13


class TokenMixingError(ValueError):
    """A node outside the attention markers lets tokens see each other, or ignores ``position_ids``."""


class _WithoutAttention(fx.Interpreter):
    """Runs a captured graph with every marker passing its own token's value through, keeping values if asked."""

    def __init__(self, gm: fx.GraphModule, keep: bool) -> None:
        super().__init__(gm, garbage_collect_values=not keep)
        self.values: dict[fx.Node, Any] = {}
        self.keep = keep

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:
            raise TokenMixingError(f"{describe(n)} does not run as it was captured: {error}") from error
        if self.keep:
            self.values[n] = result
        return result

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target is torch.ops.quantspec.attention.default:
            query, _, value = args[:3]
            return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous()
        return super().call_function(target, args, kwargs)


class CheckTokenMixing(PassBase):
    """Changes nothing; raises :class:`TokenMixingError` where decoding token by token could not equal the full forward.

    With attention markers replaced by the identity, a decoder acts on each token alone. So tokens run together
    (1, T) and one by one as a batch (T, 1), at the same positions, must give the same logits. Convolutions, recurrent
    states, token shifts, attention outside the interface and positions counted from the start of the input all fail.

    Requires a captured graph with real weights. Ensures nothing else; never modifies the graph.
    """

    def __init__(self, vocab_size: int) -> None:
        """``vocab_size``: token ids that the embedding knows, of which some are drawn."""
        super().__init__()
        self.vocab_size = vocab_size

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        device = next(graph_module.parameters()).device
        # The CPU's numbers, whatever the default device.
        generator = torch.Generator("cpu").manual_seed(0)
        ids = torch.randint(0, self.vocab_size, (1, _NUM_TOKENS), generator=generator, device="cpu").to(device)
        # Positions that do not start at 0, so that a model counting them by itself is seen.
        positions = 3 + torch.arange(_NUM_TOKENS, device=device)[None]
        inputs = ((ids, positions), (ids.T.contiguous(), positions.T.contiguous()))
        with torch.no_grad():
            together, alone = (_WithoutAttention(graph_module, keep=False).run(*pair) for pair in inputs)
            if not _differ(together, alone):
                return PassResult(graph_module, False)
            runs = [_WithoutAttention(graph_module, keep=True) for _ in inputs]
            for run, pair in zip(runs, inputs, strict=True):
                run.run(*pair)
        for node in graph_module.graph.nodes:
            values = [run.values.get(node) for run in runs]
            if node.op == "call_function" and _differ(*values):
                raise TokenMixingError(
                    f"{describe(node)} mixes tokens outside attention or does not follow position_ids (convolution, "
                    "recurrent state or attention computed by the model itself); its state is not in the key/value "
                    "cache"
                )
        raise TokenMixingError("the model mixes tokens outside attention; its state is not in the key/value cache")


def _differ(together: Any, alone: Any) -> bool:
    """Whether a value of the (1, T) run is not that of the (T, 1) run, for most tokens."""
    if not (isinstance(together, Tensor) and isinstance(alone, Tensor) and together.is_floating_point()):
        return False
    if together.shape == alone.shape:
        # Tokens already flattened into one axis, or no token axis at all.
        if _NUM_TOKENS not in together.shape:
            return False
        by_token = [x.movedim(together.shape.index(_NUM_TOKENS), 0) for x in (together, alone)]
    else:
        axes = [
            axis
            for axis, (a, b) in enumerate(zip(together.shape, alone.shape, strict=False))
            if (a, b) in ((1, _NUM_TOKENS), (_NUM_TOKENS, 1))
        ]
        if together.dim() != alone.dim() or len(axes) != 2:
            return False
        by_token = [together.movedim(axes[1], 0).flatten(1), alone.movedim(axes[0], 0).flatten(1)]
    a, b = (x.flatten(1).float() for x in by_token)
    if a.shape != b.shape:
        # Its width is the number of tokens (scores): what is made of it will differ.
        return False
    tolerance = 1e-3 if together.dtype == torch.float32 else 6e-2
    error = (a - b).norm(dim=1) / a.norm(dim=1).clamp(min=1e-6)
    # The median forgives a token whose rounding flips an expert's choice; mixing touches all but the first.
    return not error.median().item() <= tolerance
