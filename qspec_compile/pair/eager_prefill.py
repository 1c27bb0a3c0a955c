"""Prefill of decoders that keep state: the model's own forward, in its chunked form, on the pair's cache."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from quantspec.capture import IMPLEMENTATION, Capture, Recorder, WithState, attending
from quantspec.kernels import prefill_attention


class EagerPrefill(nn.Module):
    """Takes the inputs of a prefill's graph, and one for each state behind the positions.

    A copy of the model's modules around the same tensors, with its attention pointed at the cache. What its layers do
    over a prompt depends on the prompt's length, so padding would change their states: rows of other lengths run one by
    one.
    """

    def __init__(self, model: PreTrainedModel, captured: Capture) -> None:
        super().__init__()
        shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
        model = copy.deepcopy(model, shared).eval()
        configs = (getattr(module, "config", None) for module in model.modules())
        for config in configs:
            if isinstance(config, PreTrainedConfig):
                for part in (config, config.get_text_config()):
                    part._attn_implementation_internal = IMPLEMENTATION
                    part._experts_implementation_internal = IMPLEMENTATION
        self.forward_with_state = WithState(model, captured.states)
        self.captured = captured

    def forward(self, input_ids: Tensor, position_ids: Tensor, *inputs: Tensor) -> Tensor:
        """Logits ``(B, 1, V)`` of each sequence's last new token; ``inputs`` are those of the graph it stands for.

        States are moved on in place; so are the parts of the cache.
        """
        num_states = len(self.captured.states)
        states, (_, quantized_len, length, num_new, *parts) = inputs[:num_states], inputs[num_states:]
        counts = num_new.tolist()
        alike = len(set(counts)) == 1
        rows = [slice(None)] if alike else [slice(row, row + 1) for row in range(len(counts))]
        logits: list[Tensor | None] = []
        for row, count in zip(rows, counts, strict=False):
            if count == 0:
                logits.append(None)
                continue
            recorder = _PrefillRecorder(
                self.forward_with_state.model,
                self.captured,
                [part[row] for part in parts],
                (quantized_len[row], length[row], num_new[row]),
            )
            with attending(recorder):
                made, *after = self.forward_with_state(
                    input_ids[row, :count], position_ids[row, :count], *(state[row, 0] for state in states)
                )
            for state, new in zip(states, after, strict=True):
                state[row, 0] = new
            logits.append(made[:, -1:])
        some = next(made for made in logits if made is not None)
        return torch.cat([torch.zeros_like(some) if made is None else made for made in logits])


class _PrefillRecorder(Recorder):
    """Attends on the cache instead of leaving markers."""

    def __init__(
        self, model: nn.Module, captured: Capture, parts: list[Tensor], lengths: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        super().__init__(model)
        self._captured = captured
        self._parts = parts
        self._lengths = lengths

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        number = len(self.layers) - 1
        per_layer = len(self._parts) // len(self._captured.layers)
        parts = self._parts[number * per_layer : (number + 1) * per_layer]
        # A mask says how far it reaches, and the capture whether that is a chunk.
        window = -self._captured.layers[number].chunk or window
        *cache, table = parts
        return prefill_attention(
            query, key, value, *cache, *self._lengths, scale, window, softcap, sinks, block_table=table
        )
