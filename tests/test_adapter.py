"""lm-eval's model ``quantspec``: four roles on the same requests, and lm-eval's options on the way to them."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from cache_changes import change_cache_after_prefill
from conftest import GROUP, characters
from step_by_step import random_prompt

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.config.evaluate_config import EvaluatorConfig

import quantspec.evals
from quantspec.evals.adapter import QuantSpecLM
from quantspec.evals.lm_eval_command import TASKS, run_lm_eval
from quantspec.evals.roles import EvalRole

pytestmark = pytest.mark.usefixtures("lm_eval")
ROLES = [role.value for role in EvalRole]
# Longer than 2G, so that most of it is quantized.
CONTEXT = characters(random_prompt(5 * GROUP + 3))
CHOICES = ("abc", "xyz", "q", CONTEXT[: 2 * GROUP])


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    """lm-eval's requests with these arguments."""
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


SCORED = requests("loglikelihood", *((CONTEXT, choice) for choice in CHOICES), ("ab", "cd"), (CONTEXT[7:60], "e"))
WRITTEN = [(CONTEXT, {"until": [], "max_gen_toks": 24}), (CONTEXT[9:50], {"until": [], "max_gen_toks": 24})]


@pytest.fixture(scope="module")
def evaluated(qs, tokenizer):
    """Makes a model of a role from the shared pair."""
    return lambda role, **options: QuantSpecLM(qs, role=role, tokenizer=tokenizer, **options)


def test_importing_registers_the_model_beside_lm_evals_own():
    assert get_model("quantspec") is QuantSpecLM
    assert issubclass(QuantSpecLM, get_model("hf"))


def test_without_lm_eval_models_and_texts_are_still_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    evals = importlib.reload(quantspec.evals)
    assert "Python" in evals.python_reference("objects")
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*\[eval\]'"):
        run_lm_eval(["--tasks", "reference_choice"])


def test_log_likelihoods_of_the_roles(evaluated):
    scores = {role: evaluated(role).loglikelihood(SCORED, disable_tqdm=True) for role in ROLES}
    assert scores["speculative"] == scores["target"]
    for (ours, greedy), (theirs, theirs_greedy) in zip(scores["target"], scores["reference"], strict=True):
        assert ours == pytest.approx(theirs, abs=0.2)
        assert greedy == theirs_greedy
    # Every score is read from the cache, the first token's after a quantized context as well.
    assert all(ours[0] != theirs[0] for ours, theirs in zip(scores["target"][:4], scores["reference"], strict=False))
    drafted = [abs(ours[0] - theirs[0]) for ours, theirs in zip(scores["draft"], scores["reference"], strict=True)]
    assert min(drafted) > 1e-3


@pytest.mark.parametrize("batch_size", [3, "auto"])
def test_the_batch_size_does_not_change_scores(evaluated, batch_size):
    expected = evaluated("target").loglikelihood(SCORED, disable_tqdm=True)
    batched = evaluated("target", batch_size=batch_size).loglikelihood(SCORED, disable_tqdm=True)
    assert [score for score, _ in batched] == pytest.approx([score for score, _ in expected], abs=1e-3)


def test_rolling_log_likelihoods_cover_texts_longer_than_the_model(evaluated):
    text = characters(random_prompt(700))
    rolling = requests("loglikelihood_rolling", (text,), (CONTEXT,))
    ours = evaluated("target", batch_size=2).loglikelihood_rolling(rolling, disable_tqdm=True)
    theirs = evaluated("reference").loglikelihood_rolling(rolling, disable_tqdm=True)
    assert ours == pytest.approx(theirs, rel=5e-3)
    assert ours[0] < 5 * ours[1]


@pytest.mark.parametrize("role", ["target", "draft", "speculative"])
def test_contexts_that_are_too_long_are_cut_from_the_left_with_a_warning(evaluated, caplog, role):
    text = characters(random_prompt(600))
    lm = evaluated(role)
    cut, other = lm.loglikelihood(requests("loglikelihood", (text, "abc"), (text[:510], "abc")), disable_tqdm=True)
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "quantspec.evals.adapter"]
    assert warning.startswith("1 of 2 requests are longer than the model's 512 tokens")
    assert warning.endswith("by up to 90 tokens")
    caplog.clear()
    whole, same = lm.loglikelihood(
        requests("loglikelihood", (text[-510:], "abc"), (text[:510], "abc")), disable_tqdm=True
    )
    assert not [record for record in caplog.records if record.name == "quantspec.evals.adapter"]
    assert cut == whole
    assert other == same


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ("ab", "", "nothing to score after 'ab': a continuation needs at least one token"),
        ("  ", "abc", "no token to start from in '  ': white space"),
        ("ab", characters(random_prompt(600)), "a continuation of 600 tokens does not fit the model's 512"),
    ],
)
def test_a_request_that_cannot_be_scored_is_refused_for_what_is_wrong(evaluated, context, continuation, message):
    with pytest.raises(ValueError, match=message):
        evaluated("target").loglikelihood(requests("loglikelihood", (context, continuation)), disable_tqdm=True)


def test_generated_texts_of_the_roles(evaluated):
    lms = {role: evaluated(role, batch_size=2) for role in ROLES}
    written = requests("generate_until", *WRITTEN)
    texts = {role: lm.generate_until(written, disable_tqdm=True) for role, lm in lms.items()}
    assert texts["speculative"] == texts["target"]
    assert texts["draft"] != texts["target"]
    assert all(len(text) > 12 for role in ROLES for text in texts[role])
    assert [entry.drafted > 0 for entry in lms["speculative"].statistics] == [True]
    assert [entry.drafted for entry in lms["target"].statistics] == [0]


def test_the_draft_by_itself_writes_its_own_argmax(qs, evaluated):
    context = CONTEXT[1:51]
    (text,) = evaluated("draft").generate_until(
        requests("generate_until", (context, {"until": [], "max_gen_toks": 40})), disable_tqdm=True
    )
    scored = evaluated("draft").loglikelihood(requests("loglikelihood", (context, text)), disable_tqdm=True)
    assert len(text) == 40
    assert scored[0][1]


@pytest.mark.parametrize("role", ["target", "draft", "speculative"])
@pytest.mark.parametrize(
    ("context", "options", "message"),
    [
        ("ab", {"penalty_alpha": 0.6, "top_k": 4}, "generation option penalty_alpha is not supported"),
        ("ab", {"cache_implementation": "static"}, "generation option cache_implementation is not supported"),
        ("ab", {"num_beams": 3}, "set num_beams=1"),
        ("", {}, "input_ids is empty"),
    ],
    ids=str,
)
def test_every_role_of_the_pair_refuses_the_same_generation(evaluated, role, context, options, message):
    asked = requests("generate_until", (context, {"until": [], "max_gen_toks": 4, **options}))
    with pytest.raises(ValueError, match=message):
        evaluated(role).generate_until(asked, disable_tqdm=True)


@pytest.mark.parametrize("role", ["target", "draft", "speculative"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 1.0}], ids=str)
def test_no_role_of_the_pair_chooses_tokens_by_nan(evaluated, monkeypatch, role, options):
    change_cache_after_prefill(monkeypatch, "k_scale", lambda scale: torch.full_like(scale, torch.nan))
    # The other prompt is read in full precision.
    written = [(context, {"until": [], "max_gen_toks": 4, **options}) for context in (CONTEXT, CONTEXT[:5])]
    with pytest.raises(FloatingPointError, match="logits are NaN"):
        evaluated(role, batch_size=2).generate_until(requests("generate_until", *written), disable_tqdm=True)


def test_the_draft_by_itself_needs_a_distribution_to_sample_from(evaluated):
    sampling = {"until": [], "max_gen_toks": 4, "do_sample": True, "temperature": 1e-45}
    with pytest.raises(FloatingPointError, match="no token can be sampled"):
        evaluated("draft").generate_until(requests("generate_until", (CONTEXT, sampling)), disable_tqdm=True)


@pytest.mark.parametrize("role", ROLES)
def test_generation_options_reach_every_role(evaluated, role):
    def write(seed: int = 0, **options) -> str:
        torch.manual_seed(seed)
        asked = requests("generate_until", (CONTEXT[7:], {"max_gen_toks": 30, **options}))
        return evaluated(role).generate_until(asked, disable_tqdm=True)[0]

    greedy = write(until=[])
    assert len(greedy) == 30
    assert write(until=[greedy[4:7]]) == greedy[: greedy.index(greedy[4:7])]
    assert write(until=[], max_gen_toks=5) == greedy[:5]
    sampling = {"until": [], "do_sample": True, "temperature": 3.0}
    assert write(**sampling) == write(**sampling)
    assert len({greedy, write(**sampling), write(seed=1, **sampling)}) == 3


def test_lm_evals_command_line(saved_model, tiny_tasks, tmp_path, capsys):
    status = run_lm_eval(
        [
            *("--model_args", f"pretrained={saved_model},role=speculative,num_speculative_tokens=3,kv_group_size=16"),
            *("--tasks", "tiny_choice,tiny_write", "--include_path", str(tiny_tasks)),
            *("--limit", "2", "--batch_size", "auto", "--device", "cpu", "--gen_kwargs", "max_gen_toks=7"),
            *("--apply_chat_template", "--log_samples", "--output_path", str(tmp_path)),
        ]
    )
    assert status == 0
    assert "tiny_choice" in capsys.readouterr().out
    (results,) = tmp_path.rglob("results_*.json")
    config = json.loads(results.read_text())["config"]
    assert config["role"] == "speculative"
    assert config["quantspec"]["kv_group_size"] == "16"
    (samples,) = tmp_path.rglob("samples_tiny_write_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["arguments"]["gen_args_0"]["arg_0"] == f"<{row['doc']['context']}>"
        assert 0 < len(row["resps"][0][0]) <= 7


@pytest.fixture(scope="module")
def saved_pair(qs, tokenizer, tmp_path_factory):
    """Folder of the shared pair, whose groups are not the default's, with the test tokenizer."""
    folder = tmp_path_factory.mktemp("pair")
    qs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("role", ROLES)
def test_a_saved_pair_is_evaluated_as_it_was_saved(saved_pair, evaluated, role, monkeypatch):
    monkeypatch.setattr(quantspec, "convert", lambda *_, **__: pytest.fail("converted anew"))
    lm = QuantSpecLM(str(saved_pair), role=role, device="cpu", self_check=False)
    expected = evaluated(role)
    ours, theirs = (model.loglikelihood(SCORED, disable_tqdm=True) for model in (lm, expected))
    # Attention is another implementation than the shared model's.
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-4)
    written = requests("generate_until", WRITTEN[0])
    assert lm.generate_until(written, disable_tqdm=True) == expected.generate_until(written, disable_tqdm=True)
    options = lm.get_model_info().get("quantspec")
    assert options == (None if role == "reference" else {**options, "kv_group_size": str(GROUP)})


def test_a_saved_pairs_dtype_is_chosen_as_from_pretrained_does(saved_pair):
    lm = QuantSpecLM(str(saved_pair), role="target", device="cpu", dtype="bfloat16", self_check=False)
    assert lm.model.dtype == lm.qs.model.dtype == torch.bfloat16


def test_a_saved_pair_takes_what_its_weights_were_not_made_with(saved_pair):
    lm = QuantSpecLM(str(saved_pair), role="target", device="cpu", kv_group_size=2 * GROUP, max_cache_len=64)
    assert lm.qs.config.kv_group_size == 2 * GROUP
    assert lm.max_length == 64


@pytest.mark.parametrize("role", ["speculative", "reference"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize_lm_head": True}, "converted already; quantize_lm_head cannot"),
        ({"compile": False, "weight_quantizer": "hqq", "max_cache_len": 64}, "already; weight_quantizer cannot"),
        ({"dtype": "float16"}, "loads in float32 or bfloat16, not in float16"),
        ({"peft": "adapter"}, "saved; leave out peft"),
        ({"attn_implementation": "sdpa"}, "saved; leave out attn_implementation"),
    ],
    ids=str,
)
def test_a_saved_pair_cannot_be_another_one(saved_pair, monkeypatch, role, options, message):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        QuantSpecLM(str(saved_pair), role=role, device="cpu", **options)


def test_lm_evals_command_line_evaluates_a_saved_pair(saved_pair, tiny_tasks, tmp_path):
    """The results tell the options that were saved."""
    status = run_lm_eval(
        [
            *("--model_args", f"pretrained={saved_pair}", "--tasks", "tiny_choice", "--include_path", str(tiny_tasks)),
            *("--limit", "1", "--device", "cpu", "--output_path", str(tmp_path)),
        ]
    )
    assert status == 0
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["quantspec"]["kv_group_size"] == str(GROUP)


@pytest.fixture
def configured(monkeypatch, tmp_path):
    """``configured(file, *arguments)``: what lm-eval would run with this YAML file in ``--config``."""
    configurations = []
    monkeypatch.setattr(
        "lm_eval._cli.harness.HarnessCLI.execute",
        lambda _, options: configurations.append(EvaluatorConfig.from_cli(options)),
    )

    def configure(file: dict, *arguments: str) -> EvaluatorConfig:
        # JSON is YAML.
        given = {"tasks": ["tiny_choice"], "model_args": {"pretrained": "a-model"}, **file}
        (tmp_path / "config.yaml").write_text(json.dumps(given))
        assert run_lm_eval(["--config", str(tmp_path / "config.yaml"), *arguments]) == 0
        return configurations[-1]

    return configure


@pytest.mark.parametrize(
    ("file", "arguments", "model"),
    [
        ({}, (), "quantspec"),
        ({"model": None}, (), "quantspec"),
        ({"model": "hf"}, (), "hf"),
        ({"model": "hf"}, ("--model", "quantspec"), "quantspec"),
        ({}, ("--model", "hf"), "hf"),
    ],
    ids=str,
)
def test_the_model_is_quantspec_unless_a_config_file_or_option_names_another(configured, file, arguments, model):
    assert configured(file, *arguments).model == model


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ({"model_args": None}, ()),
        ({"model_args": {"role": "target"}}, ("--model", "quantspec")),
        # lm-eval takes the option in place of the file's entry.
        ({}, ("--model_args", "role=target")),
    ],
    ids=str,
)
def test_without_pretrained_in_file_or_option_there_is_no_model(configured, file, arguments):
    with pytest.raises(ValueError, match="eval has no model: give --model_args pretrained=MODEL"):
        configured(file, *arguments)


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ({"model_args": "pretrained=a-model,role=target"}, ()),
        ({"model_args": None}, ("--model_args", "pretrained=a-model")),
        ({"model": "hf", "model_args": None}, ()),
        ({"model_args": None}, ("--model", "hf")),
    ],
    ids=str,
)
def test_a_model_of_the_file_or_of_an_option_is_enough(configured, file, arguments):
    configured(file, *arguments)


@pytest.mark.parametrize(
    ("file", "arguments", "folders"),
    [
        ({}, (), []),
        ({"include_path": "mine"}, (), ["mine"]),
        ({"include_path": ["mine", "yours"]}, (), ["mine", "yours"]),
        ({"include_path": "mine"}, ("--include_path", "theirs"), ["theirs"]),
    ],
    ids=str,
)
def test_tasks_are_looked_for_where_a_config_file_says_too(configured, file, arguments, folders):
    assert configured(file, *arguments).include_path == [str(TASKS), *folders]


def test_lm_evals_command_line_refuses_as_lm_eval_does(capsys):
    assert run_lm_eval(["run", "--no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"role": "teacher"}, "reference, target, speculative, draft"),
        ({"num_speculative_tokens": 99}, "num_speculative_tokens must be between"),
        ({"kv_group_size": 17}, "power of two"),
        ({"mixed_precision_dtype": "bfloat16"}, "set dtype instead"),
        ({"parallelize": True}, "one device"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        QuantSpecLM("no-such-model", **options)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "a/b/c"])
def test_a_path_to_nothing_is_refused_as_such(name):
    with pytest.raises(ValueError, match=f"there is no folder '{name}': check the path"):
        QuantSpecLM(name)


@pytest.mark.parametrize("role", ["target", "draft", "speculative"])
def test_more_tokens_than_the_cache_holds_are_refused(qs, tokenizer, role):
    with pytest.raises(
        ValueError, match=r"max_length=513 is more than max_cache_len=512: convert with max_cache_len=513"
    ):
        QuantSpecLM(qs, role=role, tokenizer=tokenizer, max_length=513)
    with pytest.raises(ValueError, match="max_length=65 is more than max_cache_len=64"):
        QuantSpecLM("no-such-model", role=role, max_cache_len=64, max_length=65)


def test_max_length_is_held_against_the_limit_of_a_model_that_was_loaded(saved_model):
    options = {"role": "target", "device": "cpu", "self_check": False}
    with pytest.raises(ValueError, match="max_length=513 is more than max_cache_len=512"):
        QuantSpecLM(str(saved_model), max_length=513, **options)
    lm = QuantSpecLM(str(saved_model), max_length=600, max_cache_len=600, **options)
    assert lm.max_length == 600
    text = characters(random_prompt(590))
    (ours,), (cut,) = (
        model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
        for model in (lm, QuantSpecLM(lm.qs, role="target", tokenizer=lm.tokenizer, max_length=100))
    )
    assert ours != pytest.approx(cut, rel=1e-3)


@pytest.mark.parametrize("batch_size", [0, "-1", "autobahn", 2.5])
def test_a_batch_size_that_is_none_is_refused_before_loading(batch_size):
    with pytest.raises(ValueError, match="batch_size must be a number from 1 on, 'auto' or 'auto:N'"):
        QuantSpecLM("no-such-model", batch_size=batch_size)


def test_a_path_and_no_device(saved_model):
    lm = QuantSpecLM(saved_model, role="target", device=None, max_cache_len=64, self_check=False)
    assert lm.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert lm.max_length == 64


def test_a_converted_model_cannot_be_converted_differently(qs, tokenizer):
    with pytest.raises(ValueError, match="converted already; kv_group_size"):
        QuantSpecLM(qs, tokenizer=tokenizer, kv_group_size=32)
