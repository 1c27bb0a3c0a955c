"""Every option of :func:`quantspec.convert`, its default and its limits; imports nothing else of quantspec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

AUTO = "auto"
"""The number of draft tokens that stands for what measured times make fastest."""
GROUP_SIZES = (32, 64, 128, 256)
"""Numbers of input channels that may share an INT4 scale."""
MAX_SPECULATIVE_TOKENS = 15
DEFAULT_SPECULATIVE_TOKENS = 4
"""Tokens drafted per cycle on a GPU, where none are asked for."""
# Hugging Face's names for options of ours, accepted wherever ours are.
ALIASES = {"num_assistant_tokens": "num_speculative_tokens"}


class WeightQuantizer(StrEnum):
    """How torchao chooses scales and zeros."""

    TINYGEMM = "tinygemm"
    """By minimum and maximum of the group."""
    HQQ = "hqq"
    """By HQQ's half-quadratic fit."""


class DraftAttention(StrEnum):
    """What draft steps read of the cache's planes."""

    FULL = "full"
    """Everything."""
    SPARSE = "sparse"
    """The pages that the last verification paid most attention to, where there are more than a few."""
    AUTO = "auto"
    """The same where a context is long enough for it to pay, else everything."""


class Draft(StrEnum):
    """Where drafted tokens come from."""

    SELF = "self"
    """The INT4 draft's own steps."""
    LOOKUP = "lookup"
    """What followed the newest tokens earlier in the row's own text, prompt included; else nothing is drafted."""
    BOTH = "both"
    """What is expected to yield most: a lookup where it finds something that is accepted, the INT4 draft elsewhere."""


def check_draft(value: Any) -> Draft:
    """The source of drafts that ``value`` names."""
    try:
        return Draft(value)
    except ValueError:
        choices = ", ".join(repr(choice.value) for choice in Draft)
        raise ValueError(f"draft must be one of {choices}, not {value!r}") from None


def check_num_speculative_tokens(value: Any, name: str = "num_speculative_tokens") -> None:
    """Validate a number of draft tokens per cycle, or "auto"; 0 means decoding with the target alone."""
    if value == AUTO:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int or {AUTO!r}, not {value!r}")
    if not 0 <= value <= MAX_SPECULATIVE_TOKENS:
        raise ValueError(f"{name} must be between 0 and {MAX_SPECULATIVE_TOKENS}, not {value}")


@dataclass(frozen=True)
class QuantSpecConfig:
    """Options of a conversion; frozen, validated on creation.

    Attributes:
        num_speculative_tokens: tokens drafted per cycle, 0..15, or ``"auto"``: what measured times and acceptance make
            fastest, plain decoding included. None is 4 on a GPU, and ``"auto"`` on a CPU and in an
            :class:`~quantspec.Engine`; 4 on all of them with ``rejection_sampling``. Can be overridden per ``generate``
            call.
        draft: ``"self"``: the INT4 draft proposes; ``"lookup"``: the text itself does, with what followed its newest
            tokens before; ``"both"``: whichever yields more. Can be overridden per ``generate`` call.
        kv_group_size: tokens quantized together in the KV cache (G), a power of two from 16 to 512.
        weight_group_size: input channels that share an INT4 scale: 32, 64, 128 or 256. Where it does not divide a
            linear's input width, the largest smaller size that does is used; see ``adapted_group_sizes``.
        weight_quantizer: ``"tinygemm"`` (min/max) or ``"hqq"``, torchao's two choices of scales.
        quantize_lm_head: whether the draft's language-model head is INT4 too: fewer bytes per draft step, but fewer
            accepted tokens (docs/benchmarks.md).
        draft_recipe: name of the registered recipe that makes the draft (docs/adding-a-draft.md). ``"int4"`` reads the
            cache at 4 bits, on a CPU at 8, which is faster there; ``"int4-cache"`` at 4 bits on both.
        draft_attention: ``"full"``, ``"sparse"`` or ``"auto"``: whether draft steps read all of the cache's planes or
            the pages that the last verification paid most attention to (docs/choosing-options.md). The text is the
            same.
        draft_attention_share: share of the planes that a sparse draft step reads, above 0, at most 1.
        rejection_sampling: whether drafts of sampled texts stand by their odds, min(1, p/q) (Leviathan et al. 2023),
            instead of where common noise makes the target choose the same: the distribution is the same and more drafts
            are accepted, but a seed's text then depends on what was drafted (docs/choosing-options.md).
        max_cache_len: most tokens a sequence may hold, prompt and output; None for the model's
            ``max_position_embeddings``. At most the rows of a learned table of positions.
        rope_context: for RoPE that depends on the length of a text (``dynamic``, ``longrope``): the length whose
            frequencies all texts are computed with; None for the most tokens that a sequence may hold.
        self_check: compare the pair with the original model on a short random text before ``convert`` returns.
        compile: run the pair through torch.compile; None compiles on GPUs only.
        adapted_group_sizes: filled by ``convert``: linears whose INT4 group size differs from ``weight_group_size``,
            None for those left in full precision; a dict of the config's own.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range.
    """

    num_speculative_tokens: int | str | None = None
    draft: Draft = Draft.SELF
    kv_group_size: int = 128
    weight_group_size: int = 128
    weight_quantizer: WeightQuantizer = WeightQuantizer.TINYGEMM
    quantize_lm_head: bool = False
    draft_recipe: str = "int4"
    draft_attention: DraftAttention = DraftAttention.FULL
    draft_attention_share: float = 0.07
    rejection_sampling: bool = False
    max_cache_len: int | None = None
    rope_context: int | None = None
    self_check: bool = True
    compile: bool | None = None
    adapted_group_sizes: Mapping[str, int | None] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapted_group_sizes", dict(self.adapted_group_sizes))
        if self.num_speculative_tokens is not None:
            check_num_speculative_tokens(self.num_speculative_tokens)
        object.__setattr__(self, "draft", check_draft(self.draft))
        for name in ("kv_group_size", "weight_group_size"):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be an int, not {getattr(self, name)!r}")
        size = self.kv_group_size
        if not 16 <= size <= 512 or size & (size - 1):
            raise ValueError(f"kv_group_size must be a power of two from 16 to 512, not {size}")
        if self.weight_group_size not in GROUP_SIZES:
            raise ValueError(f"weight_group_size must be one of {GROUP_SIZES}, not {self.weight_group_size}")
        try:
            object.__setattr__(self, "weight_quantizer", WeightQuantizer(self.weight_quantizer))
        except ValueError:
            choices = ", ".join(repr(choice.value) for choice in WeightQuantizer)
            raise ValueError(f"weight_quantizer must be one of {choices}, not {self.weight_quantizer!r}") from None
        try:
            object.__setattr__(self, "draft_attention", DraftAttention(self.draft_attention))
        except ValueError:
            choices = ", ".join(repr(choice.value) for choice in DraftAttention)
            raise ValueError(f"draft_attention must be one of {choices}, not {self.draft_attention!r}") from None
        share = self.draft_attention_share
        if not isinstance(share, int | float) or isinstance(share, bool):
            raise TypeError(f"draft_attention_share must be a number, not {share!r}")
        if not 0 < share <= 1:
            raise ValueError(f"draft_attention_share must be above 0 and at most 1, not {share}")
        if not isinstance(self.draft_recipe, str):
            raise TypeError(f"draft_recipe must be a str, not {self.draft_recipe!r}")
        for name in ("quantize_lm_head", "rejection_sampling", "self_check"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.compile not in (None, True, False):
            raise TypeError(f"compile must be True, False or None, not {self.compile!r}")
        for name in ("max_cache_len", "rope_context"):
            tokens = getattr(self, name)
            if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool)):
                raise TypeError(f"{name} must be an int or None, not {tokens!r}")
            if tokens is not None and tokens < 1:
                raise ValueError(f"{name} must be at least 1, not {tokens}")

    @classmethod
    def from_options(cls, config: QuantSpecConfig | None, options: Mapping[str, Any]) -> QuantSpecConfig:
        """``config`` (or the defaults) with keyword ``options`` on top, under their names here or Hugging Face's.

        Raises:
            TypeError, ValueError: an unknown name, which lists the known ones, or a bad value.
        """
        if config is not None and not isinstance(config, cls):
            raise TypeError(f"config must be a QuantSpecConfig, not {type(config).__name__}")
        renamed = {ALIASES.get(name, name): value for name, value in options.items()}
        known = [f.name for f in fields(cls) if f.name != "adapted_group_sizes"]
        unknown = sorted(set(renamed) - set(known))
        if unknown:
            raise TypeError(f"unknown option {', '.join(map(repr, unknown))}; the options are {', '.join(known)}")
        if len(renamed) != len(options):
            raise TypeError(f"option given under two names: {', '.join(sorted(options))}")
        return replace(config or cls(), **renamed)


@dataclass(frozen=True)
class TuneConfig:
    """Options of :func:`quantspec.tune`; frozen, validated on creation.

    Attributes:
        steps: of the optimizer; with 0 GPTQ alone chooses codes, which takes a few of ``train_windows``.
        window: tokens of each text that is learned from, at least 4; at most what the model's context holds.
        windows_per_step: texts of a step.
        train_windows: texts that the model writes to be learned from.
        held_out_windows: texts that it writes besides, for the figures before and after.
        learning_rate: highest change of a scale per step, as a share of it, and of a zero as a share of its scale.
        prompt_tokens: with texts of the user's, how many tokens of one begin each text; at most half of it.
        seed: of the texts and of their order.
        gptq: whether the codes of INT4 linears are chosen anew by GPTQ before scales and zeros are learned.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range.
    """

    steps: int = 600
    window: int = 1024
    windows_per_step: int = 4
    train_windows: int = 640
    held_out_windows: int = 8
    learning_rate: float = 2e-3
    prompt_tokens: int = 48
    seed: int = 0
    gptq: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.gptq, bool):
            raise TypeError(f"gptq must be True or False, not {self.gptq!r}")
        leasts = {"seed": 0, "window": 4, "steps": 0 if self.gptq else 1}
        for name in (f.name for f in fields(self) if f.name not in ("learning_rate", "gptq")):
            value, least = getattr(self, name), leasts.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, not {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, not {self.seed}")
        if not isinstance(self.learning_rate, int | float) or isinstance(self.learning_rate, bool):
            raise TypeError(f"learning_rate must be a number, not {self.learning_rate!r}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must be between 0 and 1, not {self.learning_rate}")

    @classmethod
    def from_options(cls, config: TuneConfig | None, options: Mapping[str, Any]) -> TuneConfig:
        """``config`` (or the defaults) with keyword ``options`` on top.

        Raises:
            TypeError, ValueError: an unknown name, which lists the known ones, or a bad value.
        """
        if config is not None and not isinstance(config, cls):
            raise TypeError(f"config must be a TuneConfig, not {type(config).__name__}")
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(f"unknown option {', '.join(map(repr, unknown))}; the options are {', '.join(known)}")
        return replace(config or cls(), **options)
