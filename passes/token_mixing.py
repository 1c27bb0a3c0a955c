"""Refuse graphs that would decode wrongly: every op that mixes tokens must be an attention marker."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph import describe
from .state_steps import StateSteps
from .token_counts import frozen_condition, value_from_sizes

# A prime that is no likely size of anything else, so that the token axis can be told by its length.
_NUM_TOKENS = 13
_FEWER = 3


class TokenMixingError(ValueError):
    """A node outside the attention markers lets tokens see each other, or follows anything but ``position_ids``."""


class _WithoutAttention(fx.Interpreter):
    """Runs a captured graph with every marker passing its own token's value through, keeping values if asked.

    States are zeros before every token. ``results`` are what attention and the head get: every marker's query, key and
    value, and the logits.
    """

    def __init__(self, gm: fx.GraphModule, keep: bool) -> None:
        super().__init__(gm, garbage_collect_values=not keep)
        self.values: dict[fx.Node, Any] = {}
        self.results: list[Tensor] = []
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
            self.results += args[:3]
            return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous()
        return super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Any:
        called = self.fetch_attr(target)
        if not isinstance(called, StateSteps):
            return super().call_module(target, args, kwargs)
        state, *inputs = args
        tokens = next(x for x, of_token in zip(inputs, called.is_token, strict=True) if of_token).shape[0]
        return tuple(called.step(state.expand(tokens, *state.shape[1:]).contiguous(), *inputs)[1:])

    def output(self, target: Any, args: tuple, kwargs: dict) -> Any:
        self.results += args if isinstance(args[0], Tensor) else args[0]
        return super().output(target, args, kwargs)


class CheckTokenMixing(PassBase):
    """Changes nothing; raises :class:`TokenMixingError` where decoding token by token could not equal the full forward.

    With attention markers replaced by the identity, a decoder acts on each token alone. So tokens run together
    (1, T), one by one as a batch (T, 1) and in a smaller batch, at the same positions from the first to the last
    possible, must give the same queries, keys, values and logits. Convolutions, recurrent states, token shifts,
    attention outside the interface and positions counted from the start of the input all fail.

    What no short run shows is read from the graph: conditions on the number of tokens that the export took for
    granted, and values made from sizes alone, such as ``arange(T)``, that are computed with.

    Where layers keep state, every token steps from the same one; the steps alone pass it on.

    Requires a captured graph with real weights. Ensures nothing else; never modifies the graph.
    """

    def __init__(self, vocab_size: int, max_len: int) -> None:
        """``vocab_size``: token ids that the embedding knows, of which some are drawn.

        ``max_len``: tokens of the longest text.
        """
        super().__init__()
        self.vocab_size = vocab_size
        self.max_len = max_len

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        self._run(graph_module)
        condition = frozen_condition(graph_module.graph, self.max_len)
        if condition is not None:
            raise TokenMixingError(
                f"the model branches on the number of tokens: only texts with {condition} are computed as the graph "
                "was captured; a max_cache_len that keeps to it can be converted"
            )
        found = value_from_sizes(graph_module)
        if found is not None:
            raise TokenMixingError(
                f"{describe(found[0])} is made from the number of tokens instead of position_ids, and "
                f"{describe(found[1])} computes with it; tokens that are decoded later would get other values"
            )
        return PassResult(graph_module, False)

    def _run(self, graph_module: fx.GraphModule) -> None:
        """Raise where tokens that run in different company differ."""
        device = next(graph_module.parameters()).device
        # The CPU's numbers, whatever the default device.
        generator = torch.Generator("cpu").manual_seed(0)
        ids = torch.randint(0, self.vocab_size, (1, _NUM_TOKENS), generator=generator, device="cpu").to(device)
        # Positions that do not start at 0, so that a model counting them by itself is seen.
        last = math.log2(max(3, self.max_len - 1))
        spread = torch.logspace(math.log2(3), last, _NUM_TOKENS, 2, dtype=torch.float64, device=device)
        positions = spread.round().long().clamp(max=self.max_len - 1)[None]
        self._compare(graph_module, ids, positions)
        # What is divided by its position differs most at the first ones.
        self._compare(graph_module, ids, torch.arange(_NUM_TOKENS, device=device)[None].clamp(max=self.max_len - 1))

    def _compare(self, graph_module: fx.GraphModule, ids: Tensor, positions: Tensor) -> None:
        """As :meth:`_run`, at these positions."""
        device = ids.device
        together = (ids, positions)
        alone = (ids.T.contiguous(), positions.T.contiguous())
        inputs = (together, alone, tuple(x[:_FEWER] for x in alone))
        kept = [node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder")[2:]]
        states = [torch.zeros(1, *state.shape[2:], dtype=state.dtype, device=device) for state in kept]
        with torch.no_grad():
            runs = [_WithoutAttention(graph_module, keep=False) for _ in inputs]
            for run, pair in zip(runs, inputs, strict=True):
                run.run(*pair, *states)
            if not any(_differ(*values) for values in zip(*(run.results for run in runs), strict=True)):
                return
            runs = [_WithoutAttention(graph_module, keep=True) for _ in inputs]
            for run, pair in zip(runs, inputs, strict=True):
                run.run(*pair, *states)
        for node in graph_module.graph.nodes:
            if node.op in ("call_function", "call_module") and _differ(*(run.values.get(node) for run in runs)):
                raise TokenMixingError(
                    f"{describe(node)} mixes tokens outside attention or does not follow position_ids (convolution, "
                    "recurrent state or attention computed by the model itself); its state is not in the key/value "
                    "cache"
                )
        raise TokenMixingError("the model mixes tokens outside attention; its state is not in the key/value cache")


def _differ(together: Any, alone: Any, fewer: Any) -> bool:
    """Whether a value of the (1, T) run is not that of the (T, 1) run, or that not the smaller batch's."""
    if not all(isinstance(value, Tensor) and value.is_floating_point() for value in (together, alone, fewer)):
        return False
    return _differ_by_token(together, alone) or _differ_by_row(alone, fewer)


def _differ_by_row(alone: Tensor, fewer: Tensor) -> bool:
    """Whether the first rows of a batch are not those of the smaller batch, for most rows."""
    if alone.dim() == 0 or (len(alone), len(fewer)) != (_NUM_TOKENS, _FEWER) or alone.shape[1:] != fewer.shape[1:]:
        return False
    return _is_far(alone[:_FEWER], fewer)


def _differ_by_token(together: Tensor, alone: Tensor) -> bool:
    """Whether a value of the (1, T) run is not that of the (T, 1) run, for most tokens."""
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
    if by_token[0].flatten(1).shape != by_token[1].flatten(1).shape:
        # Its width is the number of tokens (scores): what is made of it will differ.
        return False
    return _is_far(*by_token)


def _is_far(a: Tensor, b: Tensor) -> bool:
    """Whether most rows differ by more than rounding."""
    tolerance = 1e-3 if a.dtype == torch.float32 else 6e-2
    a, b = (x.flatten(1).float() for x in (a, b))
    error = (a - b).norm(dim=1) / a.norm(dim=1).clamp(min=1e-6)
    # The median forgives a token whose rounding flips an expert's choice; mixing touches all but the first.
    return not error.median().item() <= tolerance
