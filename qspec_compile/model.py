"""The face: ``convert``, ``from_pretrained`` and what they return; it composes a pair and a session and delegates."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from .capture import converting
from .checkpoint.hub import push
from .checkpoint.loading import load_pair
from .checkpoint.saving import check_folder, save_pretrained
from .config import QuantSpecConfig, TuneConfig
from .engine.session import Session
from .engine.stats import GenerationStats
from .html import html_table
from .hugging_face.decode import GenerateOutput, decode
from .hugging_face.generate import generate
from .pair import Pair
from .pair.tuned import TuneReport
from .passes import Role
from .pictures import plot
from .ranks import Ranks
from .self_check import self_check
from .tensor_parallel import Split, convert_folder_split, convert_split, load_split
from .tuning import TuneProgress
from .tuning import tune as tune_pair
from .versions import noting_untested_versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase


class QuantSpecModel:
    """A converted decoder. Create it with :func:`convert` or :func:`from_pretrained`.

    Attributes:
        pair: what conversion made; the attributes below are its own.
        session: what calls share: the cache, captured cycles, statistics.
        model: the Hugging Face model, untouched; its tensors are the target's.
        target, draft, prefill: the graph of each role, see :class:`quantspec.pair.Pair`.
        config: the options in force, group sizes as adapted.
        layers: one :class:`quantspec.capture.CapturedLayer` per attention call, in forward order.
        linears: what became of each linear in the draft.
        compiles: whether the target's and the draft's graphs go through torch.compile.
        split: the other parts, where the pair is split over ranks; else None. The attributes above are then of the part
            that this process has.
    """

    def __init__(self, pair: Pair, split: Split | None = None) -> None:
        self.pair = pair
        self.split = split
        self.session = Session(pair)
        self.model: PreTrainedModel = pair.model
        self.target, self.draft, self.prefill = (pair.graphs[role] for role in (Role.TARGET, Role.DRAFT, Role.PREFILL))
        self.config, self.layers, self.linears, self.compiles = pair.config, pair.layers, pair.linears, pair.compiles

    @property
    def device(self) -> torch.device:
        """Where the weights and the cache live."""
        return self.pair.device

    @property
    def vocab_size(self) -> int:
        """Token ids the embedding knows."""
        return self.pair.vocab_size

    @property
    def last_stats(self) -> GenerationStats | None:
        """Of the ``generate`` call that ended last, also if it was interrupted; None before the first."""
        return self.session.last_stats

    @property
    def tuned(self) -> TuneReport | None:
        """What :meth:`tune` did to the draft, also before the pair was saved; None if nothing."""
        return self.pair.tuned

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights: ``target``, the model's own, and ``draft_int4``, what the draft adds to them."""
        return dict(self.pair.weight_bytes)

    @noting_untested_versions()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        *,
        num_speculative_tokens: int | str | None = None,
        draft: str | None = None,
        continue_cache: bool = False,
        generator: torch.Generator | None = None,
        seed: int | Sequence[int] | None = None,
        row_options: Sequence[Mapping[str, Any]] | None = None,
        tokenizer: Any = None,
        json_schema: dict[str, Any] | str | None = None,
        regex: str | None = None,
        grammar: str | None = None,
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
                by measured times.
            draft: overrides the config for this call: "self", "lookup" or "both".
            continue_cache: for conversations: of ``input_ids``, which begin with an earlier call's text, only what is
                new is prefilled. What differs is forgotten; without a kept cache everything is prefilled.
            generator: draws the rows' seeds where none are given, on the model's device; the global one if None.
            seed: of sampling, one for each row; an int s stands for s, s + 1, and so on. A row's random numbers depend
                on its seed and the position in its text alone. So its text does too, alone or in a batch and whatever
                is drafted, but for rounding; with ``rejection_sampling`` it depends on what is drafted.
            row_options: for each row a dict of options over those of the call: greedy or sampled, all that shapes its
                distribution, its lengths and EOS tokens. Each row gets the text that it gets alone.
            tokenizer: needed with ``stop_strings``, ``json_schema``, ``regex`` and ``grammar``.
            json_schema: a dict or JSON text; every new text is JSON that it allows. Give one of this and the next two;
                each needs llguidance (``pip install 'quantspec[structured]'``). EOS is allowed where the text may end
                and nowhere else, so a text is complete unless ``max_new_tokens`` or another criterion cuts it.
            regex: a regular expression, in Rust's syntax, that the whole of every new text matches.
            grammar: the same as a Lark grammar, as llguidance reads it.
            **kwargs: any Hugging Face generation option that greedy search or sampling knows. Logits processors are
                called as in Hugging Face, once per token. Those that may keep state, which are all but transformers'
                usual ones, see no drafts, and the rows of a batch advance together.

        Returns:
            ``(B, S + new)`` int64 token ids, or :class:`GenerateOutput` with ``return_dict_in_generate=True``.

        Raises:
            ValueError, TypeError: an input or option that cannot be honoured, or a model that was cast, moved or given
                other weights since its conversion, before any work is done.
            CacheFullError: prompt and output would exceed ``max_cache_len``.
            RuntimeError: called while this thread generates with the pair, as by a streamer; or a grammar is beyond
                llguidance's limits.
            ImportError: llguidance is missing, and a structure was asked for.
            FloatingPointError: while running, logits are NaN, or processors leave no token to sample.
            torch.OutOfMemoryError: while running, the GPU is full; the cache has been released, the pair stays usable.
            RanksError: of a pair split over ranks: one of them failed or was ended, and so are all.
        """
        run = functools.partial(generate, self.session, self.model)
        if self.split is not None:
            run = functools.partial(self.split.generate, self.session)
        return run(
            input_ids,
            attention_mask,
            generation_config,
            streamer=streamer,
            num_speculative_tokens=num_speculative_tokens,
            draft=draft,
            continue_cache=continue_cache,
            generator=generator,
            seed=seed,
            row_options=row_options,
            tokenizer=tokenizer,
            json_schema=json_schema,
            regex=regex,
            grammar=grammar,
            **kwargs,
        )

    @property
    def decode(self) -> Callable[..., Tensor | GenerateOutput]:
        """The decoding loop as a callable for ``model.generate(..., custom_generate=qs.decode)``."""
        return functools.partial(decode, self.session)

    @noting_untested_versions()
    def tune(
        self,
        config: TuneConfig | None = None,
        *,
        texts: Sequence[Any] | None = None,
        tokenizer: Any = None,
        callback: Callable[[TuneProgress], Any] | None = None,
        **options: Any,
    ) -> TuneReport:
        """Let the draft learn the model's own distribution, in place, so that more of what it proposes is accepted.

        The model writes text. On it GPTQ chooses the codes of the INT4 weights anew, and their scales and zeros move
        towards the target's probabilities; a draft step reads as many bytes as before. The target is not touched, and
        what is generated has its distribution before and after. Minutes on a GPU; it needs memory for the gradients of
        one layer at a time. Captured cycles stay valid, and :meth:`save_pretrained` saves the tuned draft.

        Ctrl-C ends it early with the best draft so far; so does a ``callback`` that returns True.

        Args:
            config: options as a :class:`TuneConfig`.
            texts: what the pair will be used for, strings (with ``tokenizer``) or token ids, at least a page; the model
                writes on from places of them. Without any it writes from random first tokens.
            tokenizer: of ``texts``.
            callback: called after every step.
            **options: fields of :class:`TuneConfig`, on top of ``config``.

        Returns:
            What it did, with the draft's quality on held-out text before and after; also :attr:`tuned`.

        Raises:
            TypeError, ValueError: a bad option or text, a draft without INT4 weights, a pair that is split over ranks,
                or a model that was changed since its conversion, before any work is done.
            RuntimeError: called while this thread generates with the pair, as by a streamer.
            torch.OutOfMemoryError: the GPU is full; the draft is as it was. Fewer ``windows_per_step`` need less.
        """
        if self.split is not None:
            raise _cannot_tune()
        resolved = TuneConfig.from_options(config, options)
        with self.session.exclusive():
            return tune_pair(self.pair, resolved, texts, tokenizer, callback)

    def reset(self) -> None:
        """Release the cache and its CUDA graphs; the next call allocates anew.

        Raises:
            RuntimeError: called while this thread generates, as by a streamer.
        """
        if self.split is not None:
            self.split.reset(self.session)
            return
        with self.session.exclusive():
            self.session.release()

    def close(self) -> None:
        """End the processes that were started for the pair, which is of no use afterwards; without any do nothing.

        They end with this process, too, however that ends.
        """
        if self.split is not None:
            self.split.close()

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        parity: Any = None,
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Save the pair to a folder that :func:`quantspec.from_pretrained` loads without quantizing again.

        The model's own weights and configuration are saved as transformers does, so that
        ``AutoModelForCausalLM.from_pretrained(directory)`` loads the original model; the draft's INT4 weights are
        beside them, packed and the same for every device. All weights are safetensors. A model card, ``README.md``,
        says what the pair is, how it was made and what was measured: the acceptance of the latest call and of tuning,
        and parity. A card that somebody wrote stays.

        Files are written beside their place and moved when all are complete. Host memory holds the INT4 weights once
        more meanwhile; of a pair that is split over ranks it holds the whole pair.

        Args:
            directory: a new or empty folder, or one with an earlier save, which is replaced.
            tokenizer: saved with the pair; without one, a tokenizer that is in the folder stays.
            parity: the report of ``quantspec.evals.parity``, for the card.
            max_shard_size: most bytes of a file, or as text such as ``"5GB"``.

        Raises:
            SavedModelError: the folder holds anything else, cannot be written to, or has too little room; or the model
                was changed since its conversion, or would be loaded as another one.
        """
        check_folder(Path(directory))
        pair = self.pair if self.split is None else self.split.gather(self.session)
        save_pretrained(pair, directory, max_shard_size, tokenizer=tokenizer, stats=self.last_stats, parity=parity)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        parity: Any = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a quantspec pair",
        max_shard_size: int | str = "5GB",
    ) -> str:
        """Save the pair, as :meth:`save_pretrained` does, and upload it to the Hugging Face Hub.

        Args:
            repo_id: of the repository, as OWNER/NAME; made if it is not there. Files of an earlier pair are replaced.
            tokenizer: uploaded with the pair.
            parity: as of :meth:`save_pretrained`.
            private: whether a repository that is made shall be.
            token: of the Hub; what ``hf auth login`` has stored if None.
            revision: the branch.
            commit_message: of the one commit.
            max_shard_size: as of :meth:`save_pretrained`.

        Returns:
            The repository's address.

        Raises:
            SavedModelError: as of :meth:`save_pretrained`.
            ConnectionError: the Hub cannot be reached; nothing was saved.
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
        """

        def save(folder: os.PathLike[str]) -> None:
            self.save_pretrained(folder, tokenizer=tokenizer, parity=parity, max_shard_size=max_shard_size)

        return push(save, repo_id, private=private, token=token, revision=revision, commit_message=commit_message)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the latest ``generate`` call: acceptance, where a cycle's time goes, and the cache's memory.

        A cycle is timed for it, see :func:`quantspec.cycle_times.cycle_times`; single pictures, also without a model,
        are in :mod:`quantspec.pictures`. Needs matplotlib (``pip install 'quantspec[plot]'``).

        Args:
            path: file to write, ``.png``, ``.svg`` or ``.pdf``, if not None.

        Returns:
            The matplotlib figure, which notebooks show.

        Raises:
            ValueError: nothing has been generated, or ``path`` cannot be written.
            RuntimeError: called while this thread generates, as by a streamer.
            ImportError: matplotlib is missing.
        """
        return plot(self.session, path)

    def as_pretrained_model(self) -> PreTrainedModel:
        """The Hugging Face model for code that takes one, such as pipelines: its ``generate`` is this pair's.

        A second object around the same modules and tensors; the original keeps its own ``generate``. It stays on its
        device.
        """
        model = copy.copy(self.model)

        @functools.wraps(self.generate)
        def generate_with_pair(*args: Any, **options: Any) -> Tensor | GenerateOutput:
            return generate(self.session, model, *args, **options)

        model.generate = generate_with_pair  # type: ignore[assignment]
        # A pipeline moves a model to a device of its choice, and the draft would stay, unless accelerate has placed it.
        model.hf_device_map = {"": self.device}  # type: ignore[assignment]
        return model

    def __copy__(self) -> QuantSpecModel:
        # It takes turns of its own, on a cache of its own.
        return QuantSpecModel(self.pair)

    def __repr__(self) -> str:
        lines = (f"\n  {name}: {value}" for name, value in self.pair.facts())
        return f"QuantSpecModel({self.pair.title()}){''.join(lines)}"

    def _repr_html_(self) -> str:
        return html_table(f"QuantSpecModel: {self.pair.title()}", self.pair.facts())


def tune(converted: QuantSpecModel, config: TuneConfig | None = None, **options: Any) -> TuneReport:
    """:meth:`QuantSpecModel.tune` of ``converted``, with its arguments."""
    return converted.tune(config, **options)


@noting_untested_versions()
def convert(
    model: PreTrainedModel | str | os.PathLike[str],
    config: QuantSpecConfig | None = None,
    *,
    tune: bool | TuneConfig = False,
    tensor_parallel: int | Ranks | None = None,
    **options: Any,
) -> QuantSpecModel:
    """Pair a Hugging Face decoder with an INT4 draft of itself.

    Args:
        model: any loaded transformers causal decoder, float32, float16 or bfloat16, on one device. It stays usable.
            With ``tensor_parallel`` also the folder of one, of which every rank then reads its pieces alone; ranks are
            on GPUs where there are as many.
        config: options as a :class:`QuantSpecConfig`.
        tune: whether to :meth:`~QuantSpecModel.tune` the draft, or the options of that.
        tensor_parallel: ranks to split target, draft and cache over, each on a GPU of its own (or all on the CPU): a
            number of them, which are started and end with the pair, or :class:`quantspec.Ranks` for several pairs.
        **options: fields of :class:`QuantSpecConfig`, on top of ``config``.

    Returns:
        The pair, with ``generate``.

    Raises:
        TypeError, ValueError: a bad option, or no transformers model.
        UnsupportedModelError: the model cannot be converted without decoding wrongly; names the node or module.
        SelfCheckError: the pair does not reproduce the model's logits.
        RanksError: a rank failed or was ended.
    """
    resolved = QuantSpecConfig.from_options(config, options)
    if not isinstance(tune, bool | TuneConfig):
        raise TypeError(f"tune must be True, False or a TuneConfig, not {tune!r}")
    if tensor_parallel is not None:
        if tune is not False:
            raise _cannot_tune()
        if isinstance(model, str | os.PathLike):
            split = convert_folder_split(model, resolved, tensor_parallel, _device_type(tensor_parallel))
        else:
            split = convert_split(model, resolved, tensor_parallel)
        return QuantSpecModel(split.pair, split)
    with converting():
        pair = Pair(model, resolved)  # type: ignore[arg-type]
        if resolved.self_check:
            self_check(pair)
    converted = QuantSpecModel(pair)
    if tune is not False:
        converted.tune(None if tune is True else tune)
    return converted


@noting_untested_versions()
def from_pretrained(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    tensor_parallel: int | Ranks | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> QuantSpecModel:
    """Load what :meth:`QuantSpecModel.save_pretrained` wrote; nothing is quantized.

    Weights are read one by one into the one model, so host memory holds them once. Without ``dtype`` the pair is bit
    for bit the one that was saved.

    Args:
        directory: a local folder, or the Hub id of a pair that :meth:`QuantSpecModel.push_to_hub` uploaded.
        device: where the weights and the cache shall live; the CPU if None.
        dtype: of the target's weights, the saved one if None. Models saved in float32 or bfloat16 load in either.
        verify: compare every file with its SHA-256 in ``quantspec_config.json``; False compares sizes only. This finds
            damage, not fraud: who changes a file can change its hash. No file is ever unpickled.
        trust_remote_code: as in transformers, for models whose code lies in the folder.
        tensor_parallel: as in :func:`convert`; every rank reads its pieces of the files alone. ``device`` is then a
            type, "cuda" or "cpu".
        revision: of a pair on the Hub: branch, tag or commit.
        token: for a private one; what ``hf auth login`` has stored if None.
        **options: fields of :class:`QuantSpecConfig` that shall differ from the saved ones; those that the INT4 weights
            were made with cannot.

    Returns:
        The pair.

    Raises:
        SavedModelError: the folder is missing, incomplete, damaged, or of a later format (names the file), or the
            model is not the one that was saved.
        TypeError, ValueError: a bad option.
        SelfCheckError: the pair does not reproduce the model's logits (a later torch or transformers, for example).
    """
    if tensor_parallel is not None:
        kind = torch.device(device or "cpu").type
        split = load_split(directory, tensor_parallel, kind, dtype, verify, trust_remote_code, revision, token, options)
        return QuantSpecModel(split.pair, split)
    pair = load_pair(
        directory,
        device=device,
        dtype=dtype,
        verify=verify,
        trust_remote_code=trust_remote_code,
        revision=revision,
        token=token,
        options=options,
    )
    return QuantSpecModel(pair)


def _cannot_tune() -> ValueError:
    return ValueError(
        "a pair that is split over ranks is not tuned; tune it on one device and save it: from_pretrained(folder, "
        "tensor_parallel=N) loads what it learned"
    )


def _device_type(ranks: int | Ranks) -> str:
    """Where ranks that are started for a folder shall be."""
    if isinstance(ranks, Ranks):
        return ranks.seat.device.type
    return "cuda" if isinstance(ranks, int) and torch.cuda.device_count() >= ranks else "cpu"
