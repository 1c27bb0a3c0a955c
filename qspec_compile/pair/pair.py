"""The pair: what a conversion makes of a model, and the one place that knows how a role's graph is called."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from quantspec.cache import HierarchicalCache, Lengths, PageBudget
from quantspec.cache.lengths import copied_to
from quantspec.capture import Capture, capture, check_model, naming_basic_cause, rope_at, rope_context_of, with_latents
from quantspec.capture.kept import kept_or_captured
from quantspec.capture.learned_positions import learned_positions
from quantspec.config import AUTO, DEFAULT_SPECULATIVE_TOKENS, QuantSpecConfig
from quantspec.names import named_once
from quantspec.passes import Role, WeightFormat, WeightSource
from quantspec.passes.called_modules import called_modules
from quantspec.passes.quantize_weights import LinearReport
from quantspec.passes.state_steps import FillStates
from quantspec.ranks import Seat

from .compile_by_layer import compile_graph
from .eager_prefill import EagerPrefill
from .frozen import FrozenModel
from .recipes import build_graphs, common_graph, recipes_for, run_passes
from .tuned import TuneReport

_LOGGER = logging.getLogger(__name__)

_PREFILL_STEP = 1024
# Of a state's norm; the roundings of bfloat16 make less.
_SAME_STATE = 0.02


class Pair:
    """A target and a draft of one model, which share its weights and the layout of their cache.

    A role's graph takes ``input_ids (B, T)``, ``position_ids (B, T)``, ``logit_rows (B, R)``, ``quantized_len (B,)``,
    ``length (B,)``, the state inputs of its recipe, that of prefill ``host_lengths (3, B)``, all int64, and the cache's
    tensors; it returns logits ``(B, R, V)`` in the model's dtype. :meth:`read` and :meth:`fill` call them so. Where
    layers keep state, that follows the positions, and prefill is an
    :class:`quantspec.pair.eager_prefill.EagerPrefill`; on ranks it is a graph, too.

    Attributes:
        model: the Hugging Face model, untouched; its tensors are the target's.
        config: the options in force, group sizes as adapted.
        captured: what the graphs were made of.
        layers: one :class:`quantspec.capture.CapturedLayer` per attention call, in forward order, as it is cached.
        common: what the graphs of all roles were made of, with attention markers still.
        graphs: the FX graph of each role.
        linears: what became of each of the draft's weights.
        max_len: most tokens that a sequence may hold.
        frozen: what the graphs hold of the model, see :meth:`check_unmoved`.
        compiles: whether the graphs of recipes that say so go through torch.compile; those with state never do.
        captures_cycles: whether cycles are captured as CUDA graphs, compiled or launch by launch.
        tuned: what tuning did to the draft; None before.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: QuantSpecConfig,
        source: WeightSource | None = None,
        captured: Capture | None = None,
        seat: Seat | None = None,
    ) -> None:
        """Make the roles of ``model``; ``source`` has ready weights of the draft, else they are quantized.

        It is captured, unless ``captured`` is what that would give, or an earlier capture of it was kept. With a
        ``seat`` it is one of several ranks' part.

        Raises:
            UnsupportedModelError: the model cannot be converted without decoding wrongly; names the node or module.
            ValueError: an option that does not suit the model.
        """
        check_model(model)
        recipes = recipes_for(config, model.device)
        self.frozen = FrozenModel(model)
        rope_context = rope_context_of(model, config)
        if captured is None:
            captured = kept_or_captured(model, rope_context, capture)
        self.model: PreTrainedModel = model
        self.captured = captured
        cached = with_latents(captured, config, model.device)
        self.layers = cached.layers
        if captured.states and config.compile:
            raise ValueError(
                f"compile=True: layers of {type(model).__name__} keep state, whose steps are not compiled; leave it "
                "None"
            )
        called = [module.path for module in called_modules(captured.graph_module)]
        if called and config.compile:
            raise ValueError(
                f"compile=True: {', '.join(called)} of {type(model).__name__} run as they are, since torch.export "
                "cannot follow them; leave it None"
            )
        self.max_len: int = _max_len(model, config, captured)
        config = replace(config, max_cache_len=self.max_len, rope_context=rope_context)
        with naming_basic_cause(model):
            self.common: fx.GraphModule = common_graph(cached, config, self.vocab_size)
        shared = {number: layer.reads for number, layer in enumerate(self.layers) if layer.reads is not None}
        graphs, self.linears = build_graphs(self.common, config, recipes, source, shared)
        adapted = {r.name: r.group_size for r in self.linears if r.group_size != config.weight_group_size}
        self.config: QuantSpecConfig = replace(config, adapted_group_sizes=adapted)
        if recipes[Role.DRAFT].weight_format is not None and seat is None:
            _warn_of_no_int4(self.linears)
        compiles = self.device.type == "cuda" if config.compile is None else config.compile
        self.compiles: bool = compiles and not captured.states and not called
        # Launches one by one are captured, too, but not modules that wait for the device.
        self.captures_cycles: bool = compiles and not called and self.device.type == "cuda"
        self.graphs: Mapping[Role, torch.nn.Module] = graphs
        if captured.states and seat is None:
            with rope_at(model, rope_context):
                self.graphs = {**graphs, Role.PREFILL: EagerPrefill(model, cached)}
        elif captured.states:
            # The model's own forward knows nothing of parts.
            self.graphs = {**graphs, Role.PREFILL: run_passes(graphs[Role.PREFILL], [FillStates()])}
        self._recipes = recipes
        self._forwards = {
            role: compile_graph(graphs[role]) if self.compiles and recipes[role].compiles else graph
            for role, graph in self.graphs.items()
        }
        self._seat = seat
        self._converted_as = (model.device, model.dtype)
        self.tuned: TuneReport | None = None

    @property
    def num_speculative_tokens(self) -> int | str:
        """What a cycle drafts unless a call says: as converted, or what seldom loses on the device."""
        if self.config.num_speculative_tokens is not None:
            return self.config.num_speculative_tokens
        # Where sampled drafts stand by their odds, a seed's text would depend on measured times.
        by_times = self.device.type == "cpu" and not self.config.rejection_sampling
        return AUTO if by_times else DEFAULT_SPECULATIVE_TOKENS

    @property
    def draft_weights(self) -> WeightFormat | None:
        """The format of the draft's linears; None where they are the model's own."""
        return self._recipes[Role.DRAFT].weight_format

    @property
    def reads_pools(self) -> bool:
        """Whether every role reads a cache whose planes are in a pool, see :meth:`HierarchicalCache.reserve_pool`."""
        return all(recipe.access.reads_pools for recipe in self._recipes.values())

    @property
    def device(self) -> torch.device:
        """Where the weights and the cache live."""
        return self.model.device

    @property
    def vocab_size(self) -> int:
        """Token ids the embedding knows."""
        embedding = self.model.get_input_embeddings()
        assert isinstance(embedding.weight, Tensor)
        # A rank may hold some of its rows.
        return embedding.num_embeddings if self.captured.pieces else embedding.weight.shape[0]  # type: ignore[return-value]

    @cached_property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights: ``target``, the model's own, and ``draft_int4``, what the draft adds to them."""
        shared = by_address(self.graphs[Role.TARGET], self.graphs[Role.PREFILL], self.model)
        added = {address: t for address, t in by_address(self.graphs[Role.DRAFT]).items() if address not in shared}
        return {
            "target": sum(t.nbytes for t in shared.values()),
            "draft_int4": sum(t.nbytes for t in added.values()),
        }

    def new_cache(self, batch_size: int, num_speculative_tokens: int) -> HierarchicalCache:
        """An empty cache for this model; :meth:`HierarchicalCache.reserve` gives it room."""
        return HierarchicalCache(
            self.layers,
            batch_size,
            self.config.kv_group_size,
            num_speculative_tokens,
            self.max_len,
            self.model.dtype,
            self.device,
            PageBudget.of(self.config),
            self.captured.states,
        )

    def read(self, role: Role, ids: Tensor, cache: HierarchicalCache, num_ahead: int = 0) -> Tensor:
        """Logits ``(B, T, V)`` of ``ids (B, T)`` int64, the tokens that follow what ``cache`` holds.

        Their keys and values are written behind the verified tokens, and the cache's lengths stay; it needs T to be at
        most one more than its ``num_speculative_tokens``.

        Args:
            role: whose graph reads, target or draft.
            ids: tokens that follow.
            cache: of this pair.
            num_ahead: tokens that were read before ``ids`` and are not verified either.
        """
        length = cache.length + num_ahead if num_ahead else cache.length
        rows = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        # Drafts may run past the last position, where nothing of them is kept.
        positions = (length[:, None] + rows).clamp(max=self.max_len - 1)
        states = [state[:, num_ahead:] for state in cache.states]
        return self.forward(role, ids, positions, *states, rows, cache.quantized_len, length, cache=cache)

    def fill(
        self,
        ids: Tensor,
        num_new: Sequence[int],
        cache: HierarchicalCache,
        lengths: Lengths | None = None,
        compiled: bool = False,
    ) -> Tensor:
        """Cache the first ``num_new[b]`` of right-padded ``ids (B, T)`` int64 as verified tokens.

        Args:
            ids: tokens that follow what ``cache`` holds.
            num_new: how many of each sequence there are.
            cache: of this pair.
            lengths: those of ``cache`` on the host, which move on with it; without them the host waits for the device
                to tell them.
            compiled: go through torch.compile, where the pair does: for short chunks, whose launches one by one take
                the host longer than the device.

        Returns:
            Logits ``(B, 1, V)`` of each sequence's last new token; meaningless without one.
        """
        lengths = cache.host_lengths() if lengths is None else lengths
        counts = torch.tensor(num_new, dtype=torch.int64, device="cpu")
        on_device = copied_to(ids.device, counts)
        columns = torch.arange(ids.shape[1], device=ids.device)
        positions = (cache.length[:, None] + columns).clamp(max=self.max_len - 1)
        last = (on_device - 1).clamp(min=0)[:, None]
        state = (cache.quantized_len, cache.length, on_device, torch.stack((*lengths, counts)))
        inputs = (ids, positions, *cache.states, last, *state)
        # torch.compile takes a size of 1 for a constant: a single token would be compiled by itself.
        if compiled and self.compiles and ids.shape[1] > 1:
            logits = self._run(self._compiled_prefill, Role.PREFILL, inputs, cache)
        else:
            logits = self.forward(Role.PREFILL, *inputs, cache=cache)
        cache.advance_prefill(on_device)
        lengths.fill(counts, cache.group_size)
        return logits

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """What rank 0 has for ``numbers``; themselves where one process has the whole model."""
        return list(numbers) if self._seat is None else self._seat.agree(numbers)

    @property
    def abandon(self) -> Callable[[], None] | None:
        """What tells the other ranks, which await rank 0's numbers, that it gives up; None without any."""
        return None if self._seat is None else self._seat.abandon

    def wait_with_ranks(self) -> None:
        """Wait for the device where it waits for other ranks, which may end; else return at once.

        Raises:
            RanksError: one has ended.
        """
        if self._seat is not None and self.device.type == "cuda":
            self._seat.wait_for_device()

    @cached_property
    def continues(self) -> bool:
        """Whether :meth:`fill` may take a prompt in parts.

        The own forward of some models with state (Jamba) ignores the states before several tokens at once, though not
        before a single one: found by reading six tokens at once, and three by three.
        """
        if not self.captured.states or self._seat is not None:
            return True
        ids = torch.arange(6, device=self.device)[None] % self.vocab_size
        found = []
        with torch.no_grad():
            for parts in ((ids,), ids.chunk(2, 1)):
                cache = self.new_cache(1, 0)
                cache.reserve(ids.shape[1])
                for part in parts:
                    self.fill(part, [part.shape[1]], cache)
                found.append([state[:, 0].float() for state in cache.states])
        return all((a - b).norm() <= _SAME_STATE * a.norm() for a, b in zip(*found, strict=True))

    def fill_chunk(self, batch_size: int, num_tokens: int) -> int:
        """Prompt tokens per :meth:`fill`: all on a CPU; on a GPU what half the free memory holds, in 1,024s.

        All, too, where :attr:`continues` is false.
        """
        if self.device.type != "cuda" or not self.continues:
            return max(1, num_tokens)
        free = torch.cuda.mem_get_info(self.device)[0]
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        per_token = batch_size * self.activation_bytes
        (chunk,) = self.agree([max(_PREFILL_STEP, free // 2 // per_token // _PREFILL_STEP * _PREFILL_STEP)])
        return chunk

    @cached_property
    def activation_bytes(self) -> int:
        """Bytes that :meth:`fill` holds for a token while it runs: six of the widest linear's or attention's inputs and
        outputs in the model's dtype.
        """
        # Logits are made of one token per prompt, so the language-model head does not count.
        width = max(r.in_features + r.out_features for r in self.linears if r.out_features != self.vocab_size)
        # Every head of a latent is as wide as it.
        width = max(width, *(layer.query_heads * (layer.key_dim + layer.value_dim) for layer in self.layers))
        return 6 * width * self.model.dtype.itemsize

    @property
    def rope_held(self) -> contextlib.AbstractContextManager[None]:
        """Lets the model compute as the pair does, if its RoPE follows the length of a text."""
        return rope_at(self.model, self.config.rope_context)

    def check_unmoved(self) -> None:
        """Refuse work if the model is no longer what was converted: the pair would go on with the old one.

        That is a model cast, moved, or with a weight, buffer, module, hook or forward replaced. Weights that change in
        place are not seen: the target follows them, the draft keeps its INT4 copy.

        Raises:
            ValueError: naming what changed.
        """
        device, dtype = self._converted_as
        if self.model.dtype != dtype:
            raise ValueError(
                f"the model was cast from {dtype} to {self.model.dtype} after conversion; convert it again"
            )
        if self.model.device != device:
            raise ValueError(
                f"the model was moved from {device} to {self.model.device} after conversion; convert it again"
            )
        self.frozen.check()

    def facts(self) -> list[tuple[str, str]]:
        """Names and values for people: layers, weights, what the draft keeps in full precision, its rule."""
        left = [r for r in self.linears if r.group_size is None]
        sizes = ", ".join(map(str, sorted({r.group_size for r in self.linears if r.group_size is not None})))
        target, added = (self.weight_bytes[part] / 2**20 for part in ("target", "draft_int4"))
        linears = len(self.linears) - len(left)
        rule = (
            [("sampled drafts", "stand by their odds (rejection_sampling)")] if self.config.rejection_sampling else []
        )
        return [
            ("attention layers", f"{len(self.layers)}, KV groups of {self.config.kv_group_size} tokens"),
            *([("states in full precision", str(len(self.captured.states)))] if self.captured.states else []),
            ("weights", f"target {target:.1f} MiB, draft adds {added:.1f} MiB"),
            *([] if self._seat is None else self._facts_of_ranks(self._seat)),
            ("INT4 linears", f"{linears}, group size {sizes} (asked for {self.config.weight_group_size})"),
            *(("full precision in the draft", f"{r.name} ({r.note})") for r in left),
            *rule,
        ]

    def _facts_of_ranks(self, seat: Seat) -> list[tuple[str, str]]:
        """What is split, and by name what every rank has and computes whole."""
        facts = [("ranks", f"{seat.place.world}; weights, INT4 linears and cache are of each")]
        if self.captured.whole:
            named = ", ".join(named_once(self.captured.whole))
            mebibytes = sum(whole_bytes(self.model, self.captured.whole).values()) / 2**20
            facts.append(("computed by every rank", f"{mebibytes:.1f} MiB of the target: {named}"))
        if self.captured.states:
            facts.append(("kept by every rank", "all states, which prompts move on token by token"))
        return facts

    def title(self) -> str:
        """The model, its dtype and its device."""
        return f"{type(self.model).__name__}, {str(self.model.dtype).removeprefix('torch.')}, {self.device}"

    def forward(self, role: Role, *inputs: Tensor, cache: HierarchicalCache) -> Tensor:
        """Run a role's graph on its ``inputs`` and the cache's tensors; :meth:`read` and :meth:`fill` make them."""
        return self._run(self._forwards[role], role, inputs, cache)

    @torch.no_grad()
    def _run(
        self, graph: Callable[..., Tensor], role: Role, inputs: Sequence[Tensor], cache: HierarchicalCache
    ) -> Tensor:
        if self._seat is not None:
            self._seat.check_at_work()
        # A pair computes in the model's dtype, and a cycle captured under a caller's autocast would keep to it.
        with torch.autocast(self.device.type, enabled=False):
            return graph(*inputs, *cache.inputs(self._recipes[role].access.inputs))

    @cached_property
    def _compiled_prefill(self) -> Callable[..., Tensor]:
        graph = self.graphs[Role.PREFILL]
        assert isinstance(graph, fx.GraphModule)
        return compile_graph(graph)


def _warn_of_no_int4(report: Sequence[LinearReport]) -> None:
    if all(entry.group_size is None for entry in report):
        names = {entry.note: entry.name for entry in reversed(report)}
        _LOGGER.warning(
            "no linear of the draft has INT4 weights, so a draft step reads as many weights as one of the model: %s",
            "; ".join(f"{note} ('{name}' first)" for note, name in names.items()) or "it has none",
        )


def _max_len(model: PreTrainedModel, config: QuantSpecConfig, captured: Capture) -> int:
    """The option, or the model's limit; no more than the positions that the model has learned."""
    learned = learned_positions(captured.graph_module)
    if config.max_cache_len is None:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        limit = limit or torch.iinfo(torch.int32).max
        return limit if learned is None else min(limit, learned[1])
    if learned is not None and config.max_cache_len > learned[1]:
        raise ValueError(
            f"max_cache_len={config.max_cache_len} is more than the {learned[1]} positions that the model has learned "
            f"('{learned[0]}'); set max_cache_len to at most {learned[1]}, or leave it None"
        )
    return config.max_cache_len


def whole_bytes(model: PreTrainedModel, whole: Collection[str]) -> dict[str, int]:
    """Bytes of what :attr:`Capture.whole` names, by those names, which are of modules and of parameters."""
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        owner = name if name in whole else name.rpartition(".")[0]
        if owner in whole:
            found[owner] += parameter.nbytes
    return {name: found[name] for name in whole if name in found}


def by_address(*modules: torch.nn.Module) -> dict[int, Tensor]:
    """Parameters and buffers by address, so that shared storage counts once."""
    return {t.data_ptr(): t for module in modules for t in (*module.parameters(), *module.buffers())}
