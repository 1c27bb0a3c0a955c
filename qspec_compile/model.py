"""``convert``: a Hugging Face decoder becomes a target and a draft that share its weights and one cache."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from quantspec.passes import Int4Source, LinearReport, Role

from .cache import HierarchicalCache
from .capture import Capture, capture, check_model, converting
from .config import QuantSpecConfig
from .cycle import GraphedCycle
from .frozen import FrozenModel
from .generate import GenerateOutput, decode, prepare_arguments
from .learned_positions import learned_positions
from .pair import build_pair, unique_tensors
from .pictures import plot
from .regions import compile_graph
from .saving import save_pretrained
from .scores import graph_key
from .self_check import self_check
from .speculation import AutoDraftCount, DraftCount, FixedDraftCount
from .stats import GenerationStats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PREFILL_STEP = 1024
# CUDA graphs that are kept, of numbers of drafts and kinds of sampling; each holds memory of its own.
_MOST_GRAPHS = 16


class _Turns:
    """Lets one call at a time use what the calls of a pair share; a copy of the pair takes turns of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._taken = False

    def __reduce__(self) -> tuple[type[_Turns], tuple[()]]:
        return _Turns, ()

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        with self._lock:
            # Other threads wait above, so this one asks a second time.
            if self._taken:
                raise RuntimeError(
                    "the pair is generating: a streamer, logits processor or stopping criterion cannot use its cache; "
                    "call it after generate(), or convert a second pair"
                )
            self._taken = True
            try:
                yield
            finally:
                self._taken = False


class QuantSpecModel:
    """A converted decoder. Create it with :func:`convert`.

    Attributes:
        model: the Hugging Face model, untouched; its tensors are the target's.
        target, draft, prefill: the graph of each role, see :class:`quantspec.pair.Pair`.
        config: the options in force, group sizes as adapted.
        layers: one :class:`quantspec.capture.CapturedLayer` per attention call, in forward order.
        linears: what became of each linear in the draft.
        frozen: what the graphs hold of the model, see :meth:`check_unmoved`.
        compiles: whether the target's and the draft's graphs go through torch.compile.
        last_stats: :class:`GenerationStats` of the ``generate`` call that ended last, also if it was interrupted; None
            before the first.
    """

    def __init__(self, model: PreTrainedModel, config: QuantSpecConfig, source: Int4Source | None = None) -> None:
        """``source`` has ready INT4 weights of the draft; without it they are quantized here."""
        check_model(model)
        self.frozen = FrozenModel(model)
        captured = capture(model)
        self.model: PreTrainedModel = model
        self._converted_as = (model.device, model.dtype)
        self.config: QuantSpecConfig = replace(config, max_cache_len=_max_cache_len(model, config, captured))
        self.layers = captured.layers
        pair = build_pair(captured, config, self.vocab_size, source)
        self.target: torch.fx.GraphModule = pair.target
        self.draft: torch.fx.GraphModule = pair.draft
        self.prefill: torch.fx.GraphModule = pair.prefill
        self.linears: tuple[LinearReport, ...] = pair.linears
        adapted = {r.name: r.group_size for r in self.linears if r.group_size != config.weight_group_size}
        self.config = replace(self.config, adapted_group_sizes=adapted)
        self.last_stats: GenerationStats | None = None
        self._cache: HierarchicalCache | None = None
        self._kept: list[Tensor] | None = None
        self._auto_counts: dict[tuple[int, int], AutoDraftCount] = {}
        self._graphed: dict[Hashable, GraphedCycle] = {}
        self._graphed_storage: tuple[int, int] | None = None
        self._turns = _Turns()
        self.compiles: bool = self.device.type == "cuda" if config.compile is None else config.compile
        self._graphs = {
            Role.TARGET: compile_graph(self.target) if self.compiles else self.target.forward,
            Role.DRAFT: compile_graph(self.draft) if self.compiles else self.draft.forward,
            # Prompts come in every length, and their time is in large matmuls: nothing to gain from compiling.
            Role.PREFILL: self.prefill.forward,
        }

    @property
    def device(self) -> torch.device:
        """Where the weights and the cache live."""
        return self.model.device

    @property
    def vocab_size(self) -> int:
        """Token ids the embedding knows."""
        embedding = self.model.get_input_embeddings()
        assert isinstance(embedding.weight, Tensor)
        return embedding.weight.shape[0]

    @torch.no_grad()
    def forward(self, role: Role, *inputs: Tensor, cache: HierarchicalCache) -> Tensor:
        """Run a role's graph on ``inputs`` and the cache; returns logits ``(B, R, V)``. See :class:`Pair`."""
        return self._graphs[role](*inputs, *cache.inputs(role))

    def new_cache(self, batch_size: int, num_speculative_tokens: int) -> HierarchicalCache:
        """An empty cache for this model; :meth:`HierarchicalCache.reserve` gives it room."""
        assert self.config.max_cache_len is not None
        return HierarchicalCache(
            self.layers,
            batch_size,
            self.config.kv_group_size,
            num_speculative_tokens,
            self.config.max_cache_len,
            self.model.dtype,
            self.device,
        )

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

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        """Hold the cache, its CUDA graphs and ``last_stats`` against other threads, which wait.

        Raises:
            RuntimeError: this thread holds them already.
        """
        return self._turns.take()

    def acquire_cache(
        self, prompts: Sequence[Tensor], num_speculative_tokens: int, continue_cache: bool = False
    ) -> HierarchicalCache:
        """The cache of the previous call if it fits, else a new one in its place; for :meth:`exclusive` use.

        It is empty, or with ``continue_cache`` holds what the previous text and the prompts begin with, except for the
        last token of a prompt, whose logits are needed.

        Raises:
            ValueError: the model was cast or moved since its conversion.
        """
        self.check_unmoved()
        cache, self._kept, kept = self._cache, None, self._kept
        if cache is None or cache.batch_size != len(prompts) or cache.num_speculative_tokens < num_speculative_tokens:
            # The old storage is released before the new one is taken.
            self._cache = cache = kept = None
            self._graphed.clear()
            self._cache = cache = self.new_cache(len(prompts), num_speculative_tokens)
        if continue_cache and kept is not None:
            same = [_common_prefix(text, prompt[:-1]) for text, prompt in zip(kept, prompts, strict=True)]
            cache.rewind(torch.minimum(cache.length, torch.stack(same)))
        else:
            cache.reset()
        return cache

    def keep_cache(self, cache: HierarchicalCache, texts: list[Tensor]) -> None:
        """Remember which ``texts`` the cache holds (but for the newest token), for ``continue_cache``."""
        if cache is self._cache:
            self._kept = texts

    def reset(self) -> None:
        """Release the cache and its CUDA graphs; the next call allocates anew.

        Raises:
            RuntimeError: called while this thread generates, as by a streamer.
        """
        with self.exclusive():
            self.release_cache()

    def release_cache(self) -> None:
        """:meth:`reset` for those with :meth:`exclusive` use."""
        self._cache = self._kept = None
        self._graphed.clear()

    def draft_count(self, num_speculative_tokens: int | str, batch_size: int, prompt_len: int) -> DraftCount:
        """Who decides how much is drafted; "auto" learns per batch size and power of two of the prompt length."""
        if not isinstance(num_speculative_tokens, str):
            return FixedDraftCount(num_speculative_tokens)
        return self._auto_counts.setdefault((batch_size, prompt_len.bit_length()), AutoDraftCount())

    def graphs_cycles(self, processors: LogitsProcessorList) -> bool:
        """Whether cycles are CUDA graphs: compiled, on a GPU, and no processor reads the text or keeps state."""
        return self.compiles and self.device.type == "cuda" and graph_key(processors) is not None

    def graphed_cycle(
        self, cache: HierarchicalCache, num_drafts: int, processors: LogitsProcessorList, do_sample: bool
    ) -> tuple[GraphedCycle, bool]:
        """The CUDA graph of such a cycle, and whether it is new and was captured for this."""
        storage = (id(cache), cache.capacity)
        if self._graphed_storage != storage:
            self._graphed.clear()
            self._graphed_storage = storage
        key = (num_drafts, do_sample, graph_key(processors))
        is_new = key not in self._graphed
        graphed = self._graphed.pop(key, None) or GraphedCycle(self, cache, num_drafts, processors, do_sample)
        # The latest used is the last.
        self._graphed[key] = graphed
        if len(self._graphed) > _MOST_GRAPHS:
            del self._graphed[next(iter(self._graphed))]
        return graphed, is_new

    def prefill_chunk(self, batch_size: int, num_tokens: int) -> int:
        """Prompt tokens per prefill pass: all of them on a CPU; on a GPU what half the free memory holds, in 1,024s.

        A token's activations are taken to be six of the widest linear's inputs and outputs in the model's dtype.
        """
        if self.device.type != "cuda":
            return max(1, num_tokens)
        free = torch.cuda.mem_get_info(self.device)[0]
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        # Logits are made of one token per prompt, so the language-model head does not count.
        vocab = self.vocab_size
        width = max(r.in_features + r.out_features for r in self.linears if r.out_features != vocab)
        per_token = batch_size * 6 * width * self.model.dtype.itemsize
        return max(_PREFILL_STEP, free // 2 // per_token // _PREFILL_STEP * _PREFILL_STEP)

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights: ``target``, the model's own, and ``draft_int4``, what the draft adds to them."""
        shared = unique_tensors(self.target, self.prefill, self.model)
        added = {address: t for address, t in unique_tensors(self.draft).items() if address not in shared}
        return {
            "target": sum(t.nbytes for t in shared.values()),
            "draft_int4": sum(t.nbytes for t in added.values()),
        }

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        *,
        num_speculative_tokens: int | str | None = None,
        continue_cache: bool = False,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Tensor | GenerateOutput:
        """Generate text as ``model.generate`` would, several tokens per reading of the target.

        Calls from several threads are safe: they share one cache, so each waits for the one before it.

        Args:
            input_ids: ``(B, S)`` int64 prompts, padded left or right where ``attention_mask`` is 0.
            attention_mask: ``(B, S)`` of 0 and 1; all ones if None (and no padding token is found).
            generation_config: replaces ``model.generation_config``; keywords override either.
            streamer: receives the prompt, then tokens as they are accepted.
            num_speculative_tokens: overrides the config for this call; 0 decodes with the target alone, "auto" tunes
                by measured times, so that sampled texts differ from run to run whatever the seed.
            continue_cache: for conversations: of ``input_ids``, which begin with an earlier call's text, only what is
                new is prefilled. What differs is forgotten; without a kept cache everything is prefilled.
            generator: randomness for sampling, on the model's device; the global one if None.
            seed: shorthand for a fresh generator with this seed. The same seed gives the same text on one machine,
                except with ``num_speculative_tokens="auto"``.
            tokenizer: needed with ``stop_strings``.
            **kwargs: any Hugging Face generation option that greedy search or sampling knows. Logits processors are
                asked about drafts too, so they must be functions of ``input_ids`` and ``scores`` alone.

        Returns:
            ``(B, S + new)`` int64 token ids, or :class:`GenerateOutput` with ``return_dict_in_generate=True``.

        Raises:
            ValueError, TypeError: an input or option that cannot be honoured, or a model that was cast, moved or given
                other weights since its conversion, before any work is done.
            CacheFullError: prompt and output would exceed ``max_cache_len``.
            RuntimeError: called while this thread generates with the pair, as by a streamer.
            FloatingPointError: while running, logits are NaN, or processors leave no token to sample.
            torch.OutOfMemoryError: while running, the GPU is full; the cache has been released, the pair stays usable.
        """
        self.check_unmoved()
        if seed is not None:
            if generator is not None:
                raise ValueError("pass either generator or seed, not both")
            generator = torch.Generator(device=self.device).manual_seed(seed)
        arguments = prepare_arguments(
            self,
            input_ids,
            attention_mask,
            generation_config,
            tokenizer,
            num_speculative_tokens,
            continue_cache,
            kwargs,
        )
        method = functools.partial(self.decode, streamer=streamer, generator=generator, **arguments.decoding)
        return self.model.generate(  # type: ignore[operator]
            input_ids, generation_config=generation_config, custom_generate=method, **arguments.hugging_face
        )

    @property
    def decode(self) -> Callable[..., Tensor | GenerateOutput]:
        """The decoding loop as a callable for ``model.generate(..., custom_generate=qs.decode)``."""
        return functools.partial(decode, self)

    def save_pretrained(self, directory: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
        """Save the pair to a folder that :func:`quantspec.from_pretrained` loads without quantizing again.

        The model's own weights and configuration are saved as transformers does, so that
        ``AutoModelForCausalLM.from_pretrained(directory)`` loads the original model; the draft's INT4 weights are
        beside them, packed and the same for every device. All weights are safetensors. A tokenizer is saved to the same
        folder by itself, afterwards: ``tokenizer.save_pretrained(directory)``; saving again leaves it there.

        Files are written beside their place and moved when all are complete. Host memory holds the INT4 weights once
        more meanwhile.

        Args:
            directory: a new or empty folder, or one with an earlier save, which is replaced.
            max_shard_size: most bytes of a file, or as text such as ``"5GB"``.

        Raises:
            SavedModelError: the folder holds anything else, cannot be written to, or has too little room; or the model
                was changed since its conversion, or would be loaded as another one.
        """
        save_pretrained(self, directory, max_shard_size)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the latest ``generate`` call: acceptance, where a cycle's time goes, and the cache's memory.

        A cycle is timed for it, see :func:`quantspec.cycle_times.cycle_times`; single pictures, also without a model,
        are in :mod:`quantspec.pictures`. Needs matplotlib (``pip install 'quantspec[plot]'``).

        Args:
            path: file to write, ``.png``, ``.svg`` or ``.pdf``, if not None.

        Returns:
            The matplotlib figure.

        Raises:
            ValueError: nothing has been generated, or ``path`` cannot be written.
            RuntimeError: called while this thread generates, as by a streamer.
            ImportError: matplotlib is missing.
        """
        return plot(self, path)

    def as_pretrained_model(self) -> PreTrainedModel:
        """The Hugging Face model for code that takes one, such as pipelines: its ``generate`` is this pair's.

        A second object around the same modules and tensors; the original keeps its own ``generate``. It stays on its
        device.
        """
        model = copy.copy(self.model)

        @functools.wraps(self.generate)
        def generate(*args: Any, **options: Any) -> Tensor | GenerateOutput:
            # The two may be given different configs.
            if model.generation_config is not self.model.generation_config and len(args) < 3:
                options.setdefault("generation_config", model.generation_config)
            return self.generate(*args, **options)

        model.generate = generate  # type: ignore[assignment]
        # A pipeline moves a model to a device of its choice, and the draft would stay, unless accelerate has placed it.
        model.hf_device_map = {"": self.device}  # type: ignore[assignment]
        return model

    def __repr__(self) -> str:
        left = [r for r in self.linears if r.group_size is None]
        sizes = sorted({r.group_size for r in self.linears if r.group_size is not None})
        weights = self.weight_bytes()
        target, added = weights["target"] / 2**20, weights["draft_int4"] / 2**20
        dtype = str(self.model.dtype).removeprefix("torch.")
        lines = [
            f"QuantSpecModel({type(self.model).__name__}, {dtype}, {self.device})",
            f"  attention layers: {len(self.layers)}, KV groups of {self.config.kv_group_size} tokens",
            f"  weights: target {target:.1f} MiB, draft adds {added:.1f} MiB",
            f"  INT4 linears: {len(self.linears) - len(left)}, group size {', '.join(map(str, sizes))}"
            f" (asked for {self.config.weight_group_size})",
        ]
        lines += [f"  full precision in the draft: {r.name} ({r.note})" for r in left]
        return "\n".join(lines)


def _max_cache_len(model: PreTrainedModel, config: QuantSpecConfig, captured: Capture) -> int:
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


def _common_prefix(text: Tensor, prompt: Tensor) -> Tensor:
    """Number of tokens that both begin with."""
    shorter = min(len(text), len(prompt))
    return (text[:shorter] == prompt[:shorter]).long().cumprod(0).sum()


def convert(model: PreTrainedModel, config: QuantSpecConfig | None = None, **options: Any) -> QuantSpecModel:
    """Pair a Hugging Face decoder with an INT4 draft of itself.

    Args:
        model: any loaded transformers causal decoder, float32, float16 or bfloat16, on one device. It stays usable.
        config: options as a :class:`QuantSpecConfig`.
        **options: fields of :class:`QuantSpecConfig`, on top of ``config``.

    Returns:
        The pair, with ``generate``.

    Raises:
        TypeError, ValueError: a bad option, or no transformers model.
        UnsupportedModelError: the model cannot be converted without decoding wrongly; names the node or module.
        SelfCheckError: the pair does not reproduce the model's logits.
    """
    resolved = QuantSpecConfig.from_options(config, options)
    with converting():
        converted = QuantSpecModel(model, resolved)
        if resolved.self_check:
            self_check(converted)
    return converted
