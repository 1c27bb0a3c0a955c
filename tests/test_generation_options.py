"""docs/generation-options.md is true and complete: each option does what its row says."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
from doc_blocks import stand_in_tokenizer
from generation_options import ARGUMENTS, GRAPH, HONOURED, HOST, IRRELEVANT, OPTIONS, OWN, REFUSED
from test_cycle import gpu_qs, needs_cuda
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList

from quantspec import QuantSpecModel
from quantspec.engine import loop
from quantspec.engine.cycles import JudgedCycles, LockstepCycles, ReplayRunner
from quantspec.engine.logits_processors import FollowingProcessor, compilable
from quantspec.hugging_face.structured import grammar_processor

__all__ = ["gpu_qs"]

PROMPT = [[5, 6, 7, 8, 9, 10, 11, 12]]
NEW_TOKENS = 6
DOCS = Path(__file__).parents[1] / "docs"


def names(status: str) -> list[str]:
    """Fields of this status."""
    return [name for name, option in OPTIONS.items() if option.status == status]


def run(generate, tokenizer, options: dict) -> tuple:
    """What a call yields, for comparison: ids if greedy, their shape, the type, and the scores of the first token."""
    options = dict(options)
    prompt = options.pop("prompt", PROMPT)
    options.setdefault("eos_token_id", None)
    options.setdefault("max_new_tokens", NEW_TOKENS)
    options = {name: value for name, value in options.items() if (name, value) != ("max_new_tokens", None)}
    ids = None if prompt is None else torch.tensor(prompt)
    if ids is not None:
        options["attention_mask"] = torch.ones_like(ids)
    if "stop_strings" in options:
        options["tokenizer"] = tokenizer
    torch.manual_seed(0)
    output = generate(ids, **options)
    is_tensor = isinstance(output, torch.Tensor)
    sequences = output if is_tensor else output.sequences
    scores = None if is_tensor else output.scores or output.logits
    return (
        is_tensor,
        tuple(sequences.shape),
        None if options.get("do_sample") else sequences.tolist(),
        None if scores is None else scores[0].float(),
    )


def same(left: tuple, right: tuple) -> bool:
    """Whether two results are equal, scores up to rounding."""
    scores = (left[3], right[3])
    if any(score is None for score in scores):
        return left[:3] == right[:3] and scores[0] is scores[1]
    return left[:3] == right[:3] and torch.allclose(*scores, atol=1e-3, rtol=1e-3)


def concrete(value, qs):
    """``"first"`` stands for the first token that greedy search emits."""
    if value != "first":
        return value
    return int(qs.generate(torch.tensor(PROMPT), max_new_tokens=1)[0, -1])


def test_every_field_is_classified():
    fields = set(vars(GenerationConfig()))
    assert fields <= set(OPTIONS)
    # Private fields come and go between transformers' versions.
    assert {name for name in OPTIONS if not name.startswith("_")} <= fields


def test_every_argument_is_classified():
    parameters = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    assert parameters == set(ARGUMENTS)


def test_every_argument_of_our_own_is_classified():
    theirs, ours = (
        set(inspect.signature(method).parameters) for method in (GenerationMixin.generate, QuantSpecModel.generate)
    )
    assert ours - theirs - {"input_ids", "attention_mask"} == set(OWN)


def test_the_page_is_made_from_the_table():
    spec = importlib.util.spec_from_file_location("docs_generation_options", DOCS / "generation_options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "generation-options.md").read_text() == module.page()


@pytest.mark.parametrize("name", [name for name in names(HONOURED) if name != "num_assistant_tokens"])
def test_honoured(qs, tokenizer, name):
    """With the option the output is Hugging Face's, and not what it is without."""
    option = OPTIONS[name]
    value, companions = concrete(option.example, qs), {k: concrete(v, qs) for k, v in option.companions.items()}
    if name in ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"):
        value = [[value]] if name == "bad_words_ids" else [value]
    if name == "stop_strings":
        value = tokenizer.decode([value])
    if name not in ("return_dict_in_generate", "output_scores", "output_logits"):
        companions = {"return_dict_in_generate": True, "output_scores": True, **companions}
    ours = run(qs.generate, tokenizer, {**companions, name: value})
    theirs = run(qs.model.generate, tokenizer, {**companions, name: value})
    assert same(ours, theirs)
    if name == "do_sample":
        assert (
            len({tuple(qs.generate(torch.tensor(PROMPT), do_sample=True, seed=s)[0, 8:11].tolist()) for s in range(5)})
            > 1
        )
        return
    without = {key: value for key, value in companions.items() if name != "max_length" or key != "max_new_tokens"}
    assert not same(ours, run(qs.generate, tokenizer, without))


TIERED = {**OPTIONS, **{name: ARGUMENTS[name] for name in ("logits_processor", "prefix_allowed_tokens_fn")}}


def ways(qs, monkeypatch, name: str) -> list:
    """How a call with the option ran its cycles."""
    taken = []
    cycles_of = loop.cycles_of

    def noting(*arguments):
        taken.append(cycles_of(*arguments))
        return taken[-1]

    monkeypatch.setattr(loop, "cycles_of", noting)
    option = TIERED[name]
    options = {"eos_token_id": None, "max_new_tokens": NEW_TOKENS, **option.companions, name: option.example}
    options = {key: value for key, value in options.items() if value is not None or key == "eos_token_id"}
    prompt = options.pop("prompt", PROMPT)
    ids = None if prompt is None else torch.tensor(prompt, device=qs.model.device)
    # An ending that no text meets, so that there are cycles, but for the options that are about endings.
    options = {key: 95 if value == "first" else value for key, value in options.items()}
    for listed in ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"):
        if listed in options:
            options[listed] = [[95]] if listed == "bad_words_ids" else [95]
    qs.generate(ids, attention_mask=None if ids is None else torch.ones_like(ids), **options)
    return taken


@pytest.mark.parametrize("name", ["json_schema", "regex", "grammar"])
def test_structures_keep_to_their_tier(name):
    """Their processor is of no kind that a program holds, and is shown the text on the host."""
    tokenizer = stand_in_tokenizer()
    processor = grammar_processor({name: OWN[name].example}, tokenizer, [tokenizer.eos_token_id], len(tokenizer))
    assert OWN[name].tier == HOST
    assert not compilable(LogitsProcessorList([processor]))
    assert isinstance(processor, FollowingProcessor)


UNTIERED = {"max_time", "stop_strings", "num_assistant_tokens"}


@pytest.mark.parametrize("name", [name for name, o in TIERED.items() if o.status == HONOURED and name not in UNTIERED])
def test_options_keep_to_their_tier(qs, monkeypatch, name):
    (way,) = ways(qs, monkeypatch, name)
    assert type(way) is {GRAPH: JudgedCycles, HOST: LockstepCycles}[TIERED[name].tier]


@needs_cuda
@pytest.mark.parametrize("name", [name for name, o in TIERED.items() if o.status == HONOURED and name not in UNTIERED])
def test_options_keep_to_their_tier_on_a_gpu(gpu_qs, monkeypatch, name):
    """Replays alone run the cycles."""
    (way,) = ways(gpu_qs, monkeypatch, name)
    assert type(way) is {GRAPH: JudgedCycles, HOST: LockstepCycles}[TIERED[name].tier]
    assert type(way._runner) is ReplayRunner


def test_num_assistant_tokens(qs):
    ids = torch.tensor(PROMPT)
    qs.generate(ids, max_new_tokens=4, num_assistant_tokens=3)
    assert qs.last_stats.num_speculative_tokens == 3
    qs.generate(ids, generation_config=GenerationConfig(max_new_tokens=4, num_assistant_tokens=20))
    assert qs.last_stats.num_speculative_tokens == qs.pair.num_speculative_tokens


@pytest.mark.parametrize("given", ["keyword", "config"])
@pytest.mark.parametrize("name", names(REFUSED))
def test_refused(qs, monkeypatch, name, given):
    """The error names the option, and no graph has run."""
    option = OPTIONS[name]
    monkeypatch.setattr(type(qs.pair), "forward", lambda *args, **kwargs: pytest.fail("work was done"))
    options = {name: option.example, **option.companions, "max_new_tokens": 3}
    if given == "config":
        options = {"generation_config": GenerationConfig(**options)}
    with pytest.raises(ValueError, match=name):
        qs.generate(torch.tensor(PROMPT), **options)


@pytest.mark.parametrize("name", [name for name, option in ARGUMENTS.items() if option.status == REFUSED])
def test_refused_argument(qs, name):
    with pytest.raises((ValueError, TypeError), match=name if name != "inputs" else "input_ids"):
        qs.generate(torch.tensor(PROMPT), max_new_tokens=3, **{name: ARGUMENTS[name].example})


def test_irrelevant_fields_change_nothing(qs, tokenizer):
    """All at once, with values unlike their defaults."""
    values = {
        "use_cache": False,
        "max_cache_len": 5,
        "length_penalty": 3.0,
        "early_stopping": True,
        "diversity_penalty": 0.5,
        "decoder_start_token_id": 7,
        "num_assistant_tokens_schedule": "heuristic",
        "assistant_confidence_threshold": 0.9,
        "max_matching_ngram_size": 3,
        "assistant_lookbehind": 4,
        "target_lookbehind": 4,
        "cache_config": {"nbits": 4},
        "disable_compile": True,
        "low_memory": True,
        "prefill_chunk_size": 4,
    }
    untried = {
        "compile_config",
        "continuous_batching_config",
        "_commit_hash",
        "_from_model_config",
        "transformers_version",
    }
    assert set(values) == set(names(IRRELEVANT)) - untried
    assert same(run(qs.generate, tokenizer, values), run(qs.generate, tokenizer, {}))


def test_generation_config_from_a_folder(qs, tmp_path):
    GenerationConfig(max_new_tokens=5, eos_token_id=2, suppress_tokens=[43]).save_pretrained(tmp_path)
    config = GenerationConfig.from_pretrained(tmp_path)
    ids = torch.tensor(PROMPT)
    ours = qs.generate(ids, generation_config=config)
    assert torch.equal(ours, qs.model.generate(ids, generation_config=config))
    assert not torch.equal(ours, qs.generate(ids, max_new_tokens=5))
