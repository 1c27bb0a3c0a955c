"""A model split over ranks against the same model in one process: on CPUs, 2 and 4 processes that start once."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_models import ARCHITECTURES, STATEFUL, tiny_model
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import quantspec
from quantspec import Ranks, UnsupportedModelError
from quantspec.capture import capture
from quantspec.config import WeightQuantizer
from quantspec.hugging_face.generate import generate
from quantspec.pair.split import split_capture
from quantspec.passes.int4_weights import INT4
from quantspec.passes.pieces import Piece, even

OPTIONS = {"kv_group_size": 16, "weight_group_size": 32, "self_check": False}
CALL = {"max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
# Of which every rank has a part: no layer keeps state, nor mixes heads.
SPLIT = [name for name in ARCHITECTURES if name not in (*STATEFUL, "diffllama")]
# Of four ranks too: a kind each. KV heads are fewer than ranks in all of them.
MORE_RANKS = ("llama", "gemma", "phi3", "gpt2", "gpt_bigcode", "olmo2", "gpt_oss", "deepseek_v3")
# One process has the ranks.
pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request):
    with Ranks(request.param) as started:
        yield started


def random_ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (batch, tokens), generator=torch.Generator().manual_seed(seed))


# What runs on every rank, found there by its name.


def split_logits(seat, architecture: str, ids: Tensor, **options: int) -> tuple[Tensor, list[Tensor], float, tuple]:
    """Logits by the parts, those of every rank, the part of the parameters that this rank has, and its layers."""
    model = tiny_model(architecture, **options)
    whole = capture(model)
    part = split_capture(whole, model, seat.place)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        logits = part.graph_module(ids, positions)
    every = [torch.empty_like(logits) for _ in range(seat.place.world)]
    dist.all_gather(every, logits.contiguous())
    sizes = [sum(p.nbytes for p in one.graph_module.parameters()) for one in (part, whole)]
    return logits, every, sizes[0] / sizes[1], (whole.layers, part.layers)


def refused(seat, architecture: str, options: dict) -> str:
    """The error of splitting a model, or nothing."""
    model = tiny_model(architecture, **options)
    try:
        split_capture(capture(model), model, seat.place)
    except UnsupportedModelError as error:
        return str(error)
    return ""


def texts_of_all(seat, ids: Tensor, options: dict) -> list[list[list[int]]]:
    """What ``generate`` of the newest pair returns on every rank."""
    session = seat.kept[max(seat.kept)]
    texts: list = [None] * seat.place.world
    dist.all_gather_object(texts, generate(session, session.pair.model, ids, **options).tolist())
    return texts


def fail_on(seat, number: int) -> None:
    if seat.place.rank == number:
        raise ZeroDivisionError("on purpose")
    dist.barrier()


@pytest.mark.parametrize(
    ("ranks", "architecture"),
    [(2, name) for name in SPLIT] + [(4, name) for name in MORE_RANKS],
    indirect=["ranks"],
)
def test_logits_of_the_parts_are_the_wholes(ranks, architecture):
    ids = random_ids(2, 33)
    logits, every, share, (whole_layers, part_layers) = ranks.run(split_logits, architecture, ids)
    with torch.no_grad():
        expected = tiny_model(architecture)(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert all(torch.equal(logits, other) for other in every)
    # Positions that were learned, norms and single KV heads are everybody's.
    assert share < (0.7 if ranks.world == 2 else 0.55)
    for whole, part in zip(whole_layers, part_layers, strict=True):
        assert part.query_heads * ranks.world == whole.query_heads
        assert part.kv_heads == max(1, whole.kv_heads // ranks.world)


@pytest.mark.parametrize(("ranks", "architecture"), [(2, "lfm2")], indirect=["ranks"])
def test_layers_that_keep_state_are_refused(ranks, architecture):
    assert "keep state besides keys and values" in ranks.run(refused, architecture, {})


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_what_cannot_be_split_is_refused_by_name(ranks):
    options = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
    message = ranks.run(refused, "llama", options)
    assert "its 3 query heads are no multiple" in message
    assert "of module 'model.layers.0.self_attn'" in message
    message = ranks.run(refused, "gpt2", {"n_inner": 97})
    assert "its 97 input channels are no multiple" in message
    assert "of module 'transformer.h.0.mlp.c_proj'" in message


@pytest.mark.parametrize("options", [{"vocab_size": 97}, {"vocab_size": 98, "tie_word_embeddings": True}])
def test_a_vocabulary_may_be_any_number(ranks, options):
    ids = random_ids(2, 33) + 1
    logits, every, *_ = ranks.run(functools.partial(split_logits, **options), "llama", ids)
    with torch.no_grad():
        expected = tiny_model("llama", **options)(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert all(torch.equal(logits, other) for other in every)


@pytest.mark.parametrize(("ranks", "architecture"), [(2, "llama"), (2, "qwen3_moe"), (4, "llama")], indirect=["ranks"])
def test_texts_are_those_of_one_process_on_all_ranks(ranks, architecture):
    model = tiny_model(architecture)
    whole = quantspec.convert(model, **OPTIONS)
    part = quantspec.convert(model, tensor_parallel=ranks, **OPTIONS)
    ids = random_ids(2, 50)
    for options in ({"do_sample": False}, {"do_sample": True, "seed": 3}):
        expected = whole.generate(ids, **CALL, **options)
        assert torch.equal(part.generate(ids, **CALL, **options), expected)
    assert part.last_stats.drafted > 0
    cache = [sum(qs.last_stats.cache_bytes.values()) for qs in (part, whole)]
    assert cache[0] * whole.layers[0].kv_heads == cache[1] * part.layers[0].kv_heads
    weights = [sum(qs.weight_bytes().values()) for qs in (part, whole)]
    assert weights[0] < weights[1] * (0.6 if ranks.world == 2 else 0.4)
    # Nobody gives a seed, times differ, and two drafts of a lookup are as good as none.
    for options in ({"do_sample": True}, {"do_sample": True, "num_speculative_tokens": "auto", "draft": "both"}):
        texts = ranks.run(texts_of_all, ids, {**CALL, **options})
        assert all(text == texts[0] for text in texts)
    kept = len(ranks.seat.kept)
    part.close()
    assert len(ranks.seat.kept) == kept - 1


def test_custom_criteria_and_streamers_are_rank_0s(ranks):
    part = quantspec.convert(tiny_model("llama"), tensor_parallel=ranks, **OPTIONS)
    ids, seen = random_ids(1, 20), []

    class Streamer(BaseStreamer):
        def put(self, value: Tensor) -> None:
            seen.append(value)

        def end(self) -> None:
            seen.append(None)

    # Here it is this process's; the others' copies never stop.
    criteria = StoppingCriteriaList([OnlyHere(os.getpid(), 30)])
    text = part.generate(ids, **CALL, do_sample=False, streamer=Streamer(), stopping_criteria=criteria)
    assert text.shape == (1, 30)
    assert len(seen) == 1 + 10 + 1
    with pytest.raises(TypeError, match="cannot be sent to the other ranks"):
        part.generate(ids, **CALL, logits_processor=LogitsProcessorList([lambda ids, scores: scores]))
    # Errors that all ranks come to leave them at work.
    with pytest.raises(ValueError, match="input_ids must be in"):
        part.generate(ids + 1000, **CALL)
    assert part.generate(ids, **CALL, do_sample=False).shape == (1, 44)
    part.reset()
    with pytest.raises(RuntimeError, match="split over ranks"):
        part.model.generate(ids, custom_generate=part.decode, max_new_tokens=2)


class OnlyHere(StoppingCriteria):
    """Stops at a length, in one process."""

    def __init__(self, process: int, length: int) -> None:
        self.process, self.length = process, length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        stops = os.getpid() == self.process and input_ids.shape[1] >= self.length
        return torch.full((len(input_ids),), stops)


@pytest.mark.parametrize("axis", [-1, -2])
def test_int4_codes_of_a_shard_are_the_shard_of_the_codes(axis):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    whole = INT4.packed(weight, 32, WeightQuantizer.TINYGEMM)
    for rank in range(2):
        part = Piece(axis, even(weight.shape[axis], rank, 2), weight.shape[axis]).of(weight).contiguous()
        for ours, theirs in zip(INT4.packed(part, 32, WeightQuantizer.TINYGEMM), whole, strict=True):
            (split,) = [number for number in range(ours.dim()) if ours.shape[number] != theirs.shape[number]]
            assert torch.equal(ours, theirs.chunk(2, split)[rank])


# What ends all of them: each in a process of its own, which must end too.

FAULTS = """
import os, signal, sys, threading, time
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
import quantspec
from tiny_models import tiny_model
import test_tensor_parallel as module

phase = {phase!r}
ranks = quantspec.Ranks(2)
(other,) = ranks.process_ids

def kill():
    global killed
    killed = time.monotonic()
    os.kill(other, signal.SIGKILL)

class Killer:
    def __init__(self, number):
        self.number = number
    def put(self, value):
        self.number -= 1
        if self.number == 0:
            kill()
    def end(self):
        pass

try:
    if phase == "load":
        threading.Timer(0.5, kill).start()
        for _ in range(100):
            quantspec.convert(tiny_model("llama"), tensor_parallel=ranks, **module.OPTIONS)
    elif phase == "error":
        killed = time.monotonic()
        ranks.run(module.fail_on, 1)
    else:
        part = quantspec.convert(tiny_model("llama"), tensor_parallel=ranks, **module.OPTIONS)
        ids = module.random_ids(1, 40)
        options = dict(module.CALL, max_new_tokens=400, do_sample=False)
        if phase == "idle":
            kill()
            part.generate(ids, **options)
        part.generate(ids, **options, streamer=Killer(1 if phase == "prefill" else 9))
except quantspec.RanksError as error:
    print(f"{{time.monotonic() - killed:.1f}}", *str(error).split())
try:
    ranks.run(module.fail_on, 5)
except quantspec.RanksError as error:
    print("refused", *str(error).split())
try:
    os.kill(other, 0)
    print("still there")
except ProcessLookupError:
    print("gone")
"""


@pytest.mark.parametrize(
    ("phase", "cause"),
    [(phase, "rank 1 was ended by SIGKILL") for phase in ("load", "prefill", "cycle", "idle")]
    + [("error", "ZeroDivisionError: on purpose")],
)
def test_a_rank_that_ends_ends_all_with_its_cause(phase, cause):
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    source = FAULTS.format(path=paths, phase=phase)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    ended, refused, there = (line for line in done.stdout.splitlines() if line)
    seconds, _, message = ended.partition(" ")
    # Seconds, on whatever machine this is.
    assert float(seconds) < 60
    assert cause in message + refused
    assert refused.startswith("refused the ranks have ended")
    assert there == "gone"


def test_the_others_end_with_rank_0():
    source = (
        "import quantspec, time\nranks = quantspec.Ranks(2)\nprint(*ranks.process_ids, flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        other = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        limit = time.monotonic() + 60
        while is_alive(other):
            assert time.monotonic() < limit
            time.sleep(0.1)


def is_alive(process: int) -> bool:
    """Whether it runs; one that has ended may wait for somebody to ask."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(("ranks", "architecture"), [(2, "llama"), (2, "mixtral"), (4, "llama")], indirect=["ranks"])
def test_a_folder_is_read_in_pieces(ranks, tmp_path, architecture):
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    part = quantspec.convert(tmp_path, tensor_parallel=ranks, **OPTIONS)
    ids = random_ids(1, 50)
    expected = quantspec.convert(model, **OPTIONS).generate(ids, **CALL, do_sample=False)
    assert torch.equal(part.generate(ids, **CALL, do_sample=False), expected)


@pytest.mark.parametrize(("ranks", "architecture"), [(2, "llama"), (2, "gpt2"), (4, "llama")], indirect=["ranks"])
def test_a_saved_pair_is_read_in_pieces(ranks, tmp_path, architecture):
    # Of four ranks each has 16 or 24 inputs of some linears, in no group that is known; of two it has 32 or 48.
    sizes = {"hidden_size": 128, "intermediate_size": 256} if architecture == "llama" else {"n_embd": 128}
    whole = quantspec.convert(tiny_model(architecture, **sizes), **OPTIONS)
    whole.save_pretrained(tmp_path)
    part = quantspec.from_pretrained(tmp_path, tensor_parallel=ranks)
    ids = random_ids(1, 50)
    texts = [qs.generate(ids, **CALL, do_sample=False) for qs in (whole, part)]
    assert torch.equal(*texts)
    # The same codes draft the same tokens.
    assert part.last_stats.accepted == whole.last_stats.accepted
