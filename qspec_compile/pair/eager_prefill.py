"""Prefill of decoders that keep state: the model's own forward, in its chunked form, on the pair's cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from quantspec.capture import IMPLEMENTATION, Capture, Recorder, WithState, attending
from quantspec.kernels import prefill_attention
from quantspec.passes.absorb_latents import Latent
from quantspec.passes.graph import own_name


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
        # Inputs of the linears that make heads of latents, as they are called.
        self._latents: dict[str, Tensor] = {}
        for name in {latent.value_up.name for latent in captured.latents.values()}:
            linear = model.get_submodule(own_name(name).removesuffix(".weight"))
            linear.register_forward_pre_hook(lambda _, inputs, name=name: self._latents.update({name: inputs[0]}))

    def forward(self, input_ids: Tensor, position_ids: Tensor, *inputs: Tensor) -> Tensor:
        """Logits ``(B, 1, V)`` of each sequence's last new token; ``inputs`` are those of the graph it stands for.

        States are moved on in place; so are the parts of the cache.
        """
        num_states = len(self.captured.states)
        states, (_, quantized_len, length, num_new, host_lengths, *parts) = inputs[:num_states], inputs[num_states:]
        counts = host_lengths[2].tolist()
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
                host_lengths[:, row],
                self._latents,
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
        self,
        model: nn.Module,
        captured: Capture,
        parts: list[Tensor],
        lengths: tuple[Tensor, Tensor, Tensor],
        host_lengths: Tensor,
        latents: Mapping[str, Tensor],
    ) -> None:
        super().__init__(model)
        self._captured = captured
        self._parts = parts
        self._lengths = lengths
        self._host_lengths = host_lengths
        self._latents = latents
        self._weights = dict(model.named_parameters())

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        number = len(self.layers) - 1
        per_layer = len(self._parts) // len(self._captured.layers)
        parts = self._parts[number * per_layer : (number + 1) * per_layer]
        # A mask says how far it reaches, and the capture whether that is a chunk.
        window = -self._captured.layers[number].chunk or window
        *cache, table = parts

        def read(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            options = (scale, window, softcap, sinks)
            named = {"block_table": table, "host_lengths": self._host_lengths}
            return prefill_attention(query, key, value, *cache, *self._lengths, *options, **named)

        latent = self._captured.latents.get(number)
        return read(query, key, value) if latent is None else self._absorbed(latent, query, key, read)

    def _absorbed(self, latent: Latent, query: Tensor, key: Tensor, read: Callable[..., Tensor]) -> Tensor:
        """What :class:`AbsorbLatents` makes of a marker, for heads that the model has made already."""
        first, last = latent.first, latent.first + latent.key_up.size
        up, down = (
            part.of(self._weights[own_name(part.name)], lambda op, *args: op(*args))
            for part in (latent.key_up, latent.value_up)
        )
        heads = query.unflatten(1, (len(up), -1))
        absorbed = (heads[..., first:last] @ up.unsqueeze(1)).flatten(1, 2)
        vector = self._latents[latent.value_up.name]
        own = vector.reshape(len(key), 1, key.shape[2], -1)
        query = torch.cat((absorbed, query[..., :first], query[..., last:]), -1)
        key = torch.cat((own, key[:, :1, :, :first], key[:, :1, :, last:]), -1)
        out = read(query, key, key[..., : own.shape[-1]]).unflatten(2, (len(up), -1))
        return (out @ down.transpose(1, 2)).flatten(2, 3)
