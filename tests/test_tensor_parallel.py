"""A model split over ranks against the same model in one process: on CPUs, 2 and 4 processes that start once."""

from __future__ import annotations

import functools
import itertools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked_ranks import forked_ranks
from live_bytes import LiveBytes
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, STATEFUL, tiny_model
from torch import Tensor
from transformers import LlamaForCausalLM, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import quantspec
from quantspec import Engine, Ranks, SavedModelError, UnsupportedModelError
from quantspec.benchmarks.random_models import random_part, shape_config
from quantspec.capture.kept import kept_or_captured
from quantspec.capture.stored import from_json, to_json
from quantspec.checkpoint.split_loading import (
    hollow_checkpoint,
    hollow_saved_pair,
    part_of_checkpoint,
    part_of_saved_pair,
)
from quantspec.config import QuantSpecConfig, WeightQuantizer
from quantspec.engine.draft_count import AutoDraftCount
from quantspec.engine.plan import Plan
from quantspec.hugging_face.generate import generate
from quantspec.kernels import ranks as ranks_module
from quantspec.kernels.rank_sums_triton import fits_inbox
from quantspec.kernels.ranks import MOST_BYTES_AT_ONCE, reduce_ranks, sums_at_once
from quantspec.pair.split import StoredCapture, plan, split_capture
from quantspec.passes import plain_weights, weight_formats
from quantspec.passes.graph import find_calls
from quantspec.passes.int4_weights import INT4
from quantspec.passes.pieces import Piece, even
from quantspec.ranks import pickled
from quantspec.serving import Request
from quantspec.tensor_parallel import Split

OPTIONS = {"kv_group_size": 16, "weight_group_size": 32, "self_check": False}
CALL = {"max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
# Of which every rank has a part of each layer: none keeps state, nor mixes heads.
SPLIT = [name for name in ARCHITECTURES if name not in (*STATEFUL, "diffllama")]
# Of four ranks what differs from two: fewer KV heads than ranks, in a linear of their own or beside the queries', and a
# last part of the vocabulary that begins in the one before.
MORE_RANKS = [("llama", {"vocab_size": 97}), ("gpt_bigcode", {})]
# One process has the ranks.
pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request):
    with forked_ranks(), Ranks(request.param) as started:
        yield started


@functools.lru_cache
def whole_pair(architecture: str) -> quantspec.QuantSpecModel:
    """In this process alone."""
    return quantspec.convert(tiny_model(architecture), **OPTIONS)


@pytest.fixture(scope="module")
def llama_of_two(ranks):
    return quantspec.convert(tiny_model("llama"), tensor_parallel=ranks, **OPTIONS)


def random_ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def assert_drafts_alike(one: quantspec.QuantSpecModel, other: quantspec.QuantSpecModel) -> None:
    """As many drafts of their last calls were accepted, but for those that are nearly as likely as another token.

    Sums over ranks round in another way, which decides between such.
    """
    accepted = [qs.last_stats.accepted for qs in (one, other)]
    assert min(accepted) > 4
    assert abs(accepted[0] - accepted[1]) <= 2


# What runs on every rank, found there by its name.


def split_logits(
    seat, architecture: str, options: dict, stored: StoredCapture, ids: Tensor
) -> tuple[Tensor, list[Tensor], float, tuple]:
    """Logits by the parts, those of every rank, the part of the parameters that this rank has, and its layers."""
    model = tiny_model(architecture, **options)
    whole = from_json(*stored, model)
    part = split_capture(whole, model, seat.place)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        logits = part.graph_module(ids, positions)
    every = [torch.empty_like(logits) for _ in range(seat.place.world)]
    dist.all_gather(every, logits.contiguous())
    sizes = [sum(p.nbytes for p in one.graph_module.parameters()) for one in (part, whole)]
    return logits, every, sizes[0] / sizes[1], (whole.layers, part.layers)


def texts_of_all(seat, ids: Tensor, options: dict) -> list[list[list[int]]]:
    """What ``generate`` of the newest pair returns on every rank."""
    session = seat.kept[max(seat.kept)]
    texts: list = [None] * seat.place.world
    dist.all_gather_object(texts, generate(session, session.pair.model, ids, **options).tolist())
    return texts


def logits_of_all(seat, ids: Tensor) -> list[Tensor]:
    """Logits of every rank by the newest pair's capture, from states of nothing."""
    captured = seat.kept[max(seat.kept)].pair.captured
    batch, tokens = ids.shape
    states = [torch.zeros(batch, tokens + 1, *state.shape, dtype=state.dtype) for state in captured.states]
    with torch.no_grad():
        logits = captured.graph_module(ids, torch.arange(tokens).expand_as(ids), *states).contiguous()
    every = [torch.empty_like(logits) for _ in range(seat.place.world)]
    dist.all_gather(every, logits)
    return every


def names_kept(seat) -> list:
    """What the last rank keeps."""
    names: list = [None] * seat.place.world
    dist.all_gather_object(names, list(seat.kept))
    return names[-1]


def share_and_peak(seat, is_saved: bool, folder: Path, config: QuantSpecConfig, stored: StoredCapture) -> list:
    """Of every rank the bytes of weights that it keeps, and the most that tensors had while it loaded them."""
    # Blocks are to these weights what they are to those of large models.
    with pytest.MonkeyPatch.context() as patch, LiveBytes() as live:
        patch.setattr(weight_formats, "_ELEMENTS_AT_ONCE", 2**13)
        if is_saved:
            pair = part_of_saved_pair(seat, folder, None, False, config, stored)
        else:
            pair = part_of_checkpoint(seat, folder, config, stored, None, False)
    every: list = [None] * seat.place.world
    dist.all_gather_object(every, (sum(pair.weight_bytes.values()), live.peak))
    return every


def fail_on(seat, number: int) -> None:
    if seat.place.rank == number:
        raise ZeroDivisionError("on purpose")
    dist.barrier()


# First, since a process has ranks once, and those of the others stay until the last of them.
@pytest.mark.parametrize(
    ("architecture", "options", "messages"),
    [
        ("diffllama", {}, ["its heads do not follow from a linear's rows"]),
        (
            "llama",
            {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3},
            ["its 3 query heads are no multiple", "of module 'model.layers.0.self_attn'"],
        ),
        (
            "gpt2",
            {"n_inner": 97},
            ["its 97 input channels are no multiple", "of module 'transformer.h.0.mlp.c_proj'"],
        ),
    ],
)
@pytest.mark.parametrize("from_folder", [False, True])
def test_what_cannot_be_split_is_refused_before_a_rank_is_started(
    architecture, options, messages, from_folder, tmp_path, monkeypatch
):
    model = tiny_model(architecture, **options)
    if from_folder:
        model.save_pretrained(tmp_path)
    monkeypatch.setattr(Ranks, "__init__", lambda *_: pytest.fail("ranks were started"))
    with pytest.raises(UnsupportedModelError) as caught:
        quantspec.convert(tmp_path if from_folder else model, tensor_parallel=2)
    assert all(message in str(caught.value) for message in messages)


# A parameter of its own: with others' ranks would start for each of them.
@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize(
    ("architecture", "options"),
    [(name, {}) for name in SPLIT] + [("llama", {"vocab_size": 97, "tie_word_embeddings": True})],
)
def test_logits_of_the_parts_are_the_wholes(ranks, architecture, options):
    check_logits(ranks, architecture, options)


def check_logits(ranks, architecture: str, options: dict) -> None:
    ids = random_ids(2, 33)
    model = tiny_model(architecture, **options)
    stored = to_json(kept_or_captured(model, None), model)
    logits, every, share, (whole_layers, part_layers) = ranks.run(split_logits, architecture, options, stored, ids)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert all(torch.equal(logits, other) for other in every)
    # Positions that were learned, norms and single KV heads are everybody's.
    assert share < (0.7 if ranks.world == 2 else 0.55)
    for whole, part in zip(whole_layers, part_layers, strict=True):
        assert part.query_heads * ranks.world == whole.query_heads
        assert part.kv_heads == max(1, whole.kv_heads // ranks.world)


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_texts_are_those_of_one_process_on_all_ranks(ranks):
    check_texts(ranks, "qwen3_moe")


def check_texts(ranks, architecture: str) -> None:
    whole = whole_pair(architecture)
    part = quantspec.convert(tiny_model(architecture), tensor_parallel=ranks, **OPTIONS)
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


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_layers_with_states_are_whole_on_every_rank_which_says_so(ranks):
    """Attention, gated products and the head are split all the same."""
    whole = whole_pair("lfm2")
    part = quantspec.convert(tiny_model("lfm2"), tensor_parallel=ranks, **{**OPTIONS, "self_check": True})
    ids, mask = random_ids(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[1, :13] = 0
    for options in ({"do_sample": False}, {"do_sample": True, "seed": 3}):
        assert torch.equal(part.generate(ids, mask, **CALL, **options), whole.generate(ids, mask, **CALL, **options))
    assert_drafts_alike(part, whole)
    every = ranks.run(logits_of_all, ids)
    with torch.no_grad():
        expected = whole.model(ids, use_cache=False).logits
    torch.testing.assert_close(every[0], expected, rtol=0, atol=1e-5)
    assert torch.equal(*every)
    assert [layer.query_heads * 2 for layer in part.layers] == [layer.query_heads for layer in whole.layers]
    named = part.pair.captured.whole
    assert named == [f"model.layers.0.conv.{name}" for name in ("in_proj", "out_proj", "conv.weight")]
    # Said with their bytes; what a rank has besides is its own part.
    report = str(part)
    own = dict(part.model.named_parameters())
    num_bytes = sum(p.nbytes for name, p in own.items() if name in named or name.removesuffix(".weight") in named)
    assert f"computed by every rank: {num_bytes / 2**20:.1f} MiB of the target" in report
    assert "model.layers.*.conv.in_proj (1), model.layers.*.conv.out_proj (1)" in report
    assert "kept by every rank: all states" in report
    shared = sum(p.nbytes for name, p in own.items() if p.shape == whole.model.get_parameter(name).shape)
    total = sum(p.nbytes for p in whole.model.parameters())
    assert sum(p.nbytes for p in own.values()) <= shared + (total - shared) * 0.51
    part.close()


# Beside the short convolution above: Mamba 2 and attention within one layer.
@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("architecture", ["falcon_h1"])
def test_hybrids_over_ranks_write_what_one_process_writes(ranks, architecture):
    model = tiny_model(architecture)
    pairs = [quantspec.convert(model, **OPTIONS), quantspec.convert(model, tensor_parallel=ranks, **OPTIONS)]
    ids = random_ids(1, 24)
    for options in ({"do_sample": False}, {"do_sample": True, "seed": 3}):
        whole, part = (qs.generate(ids, max_new_tokens=12, eos_token_id=None, **options) for qs in pairs)
        assert torch.equal(part, whole)
    assert_drafts_alike(*pairs)
    assert pairs[1].layers[-1].query_heads * 2 == pairs[0].layers[-1].query_heads
    pairs[1].close()


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_a_tuned_pair_is_saved_and_then_split(ranks, llama_of_two, tmp_path):
    with pytest.raises(ValueError, match="split over ranks is not tuned; tune it on one device and save it"):
        llama_of_two.tune()
    # A rank's part of every linear has whole groups.
    whole = quantspec.convert(tiny_model("llama", intermediate_size=128), **OPTIONS)
    ids = random_ids(2, 50)
    untuned = whole.generate(ids, **CALL, do_sample=False)
    scales = {name: parts["scale_and_zero"].clone() for name, parts in plain_weights(whole.draft).items()}
    windows = {"window": 48, "train_windows": 8, "held_out_windows": 2, "windows_per_step": 4}
    whole.tune(steps=4, learning_rate=3e-3, prompt_tokens=16, **windows)
    assert any(
        not torch.equal(parts["scale_and_zero"], scales[name]) for name, parts in plain_weights(whole.draft).items()
    )
    text = whole.generate(ids, **CALL, do_sample=False)
    whole.save_pretrained(tmp_path)
    part = quantspec.from_pretrained(tmp_path, tensor_parallel=ranks)
    assert part.tuned == whole.tuned
    assert torch.equal(text, untuned)
    assert torch.equal(part.generate(ids, **CALL, do_sample=False), text)
    assert_drafts_alike(part, whole)
    part.close()


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_custom_criteria_and_streamers_are_rank_0s(llama_of_two):
    part = llama_of_two
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


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("at", [1, 2, 5, 11])
def test_a_streamer_that_fails_leaves_the_ranks_at_work(llama_of_two, error, at):
    """At the prompt, the first token, in a cycle, at the last token; and beside criteria."""
    part, ids = llama_of_two, random_ids(1, 20)

    class Streamer(BaseStreamer):
        count = 0

        def put(self, value: Tensor) -> None:
            self.count += 1
            if self.count == at:
                raise error("gone")

        def end(self) -> None:
            pass

    for criteria in (None, StoppingCriteriaList([OnlyHere(os.getpid(), 30)])):
        options = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None, "stopping_criteria": criteria}
        with pytest.raises(error, match="gone"):
            part.generate(ids, **options, streamer=Streamer())
        assert part.session.cache is not None  # as on the others
        assert part.generate(ids, **options).shape == (1, 30)


class OnlyHere(StoppingCriteria):
    """Stops at a length, in one process."""

    def __init__(self, process: int, length: int) -> None:
        self.process, self.length = process, length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        stops = os.getpid() == self.process and input_ids.shape[1] >= self.length
        return torch.full((len(input_ids),), stops)


def test_what_stands_in_the_script_itself_is_not_sent(monkeypatch):
    """The others would look for it in a script of their own, and all would end."""
    standing = type("Standing", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Standing", standing, raising=False)
    for thing in (standing, [standing()]):
        with pytest.raises(pickle.PicklingError, match="Standing is of the script that runs"):
            pickled(thing)
    assert pickle.loads(pickled({"stops": OnlyHere(1, 2)}))["stops"].length == 2


@pytest.mark.parametrize("axis", [-1, -2])
def test_int4_codes_of_a_shard_are_the_shard_of_the_codes(axis):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    whole = INT4.packed(weight, 32, WeightQuantizer.TINYGEMM)
    for rank in range(2):
        part = Piece(axis, even(weight.shape[axis], rank, 2), weight.shape[axis]).of(weight).contiguous()
        for ours, theirs in zip(INT4.packed(part, 32, WeightQuantizer.TINYGEMM), whole, strict=True):
            (split,) = [number for number in range(ours.dim()) if ours.shape[number] != theirs.shape[number]]
            assert torch.equal(ours, theirs.chunk(2, split)[rank])


# What ends all of them: in a process of its own, which goes on with other ranks after each. They are forks of it, since
# importing is not what is looked at.

FAULTS = """
import os, signal, subprocess, sys, tempfile, threading, time
sys.path[:0] = {path!r}
import torch
import quantspec
import quantspec.pair.gather as gather
import quantspec.ranks.pool as pool
import test_tensor_parallel as module
from quantspec.ranks.worker import main
from tiny_models import tiny_model

class Fork:
    def __init__(self, command, pass_fds, stdin):
        self.pid = os.fork()
        if not self.pid:
            # A started process has none of these.
            os.closerange(3, pass_fds[0])
            os.closerange(pass_fds[0] + 1, 1024)
            main(pass_fds[0])
            os._exit(0)
        self.code = None
    def wait(self, timeout=None):
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code
    def kill(self):
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)

pool.subprocess.Popen = Fork
model = tiny_model("llama", num_hidden_layers=1, intermediate_size=128)
ids = module.random_ids(1, 40)
options = dict(module.CALL, max_new_tokens=400, do_sample=False)

def kill():
    global killed
    killed = time.monotonic()
    os.kill(other, signal.SIGKILL)

def num_ports():
    open_here = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            open_here.add(os.readlink("/proc/self/fd/" + number))
        except OSError:
            continue
    lines = [line.split() for kind in ("tcp", "tcp6") for line in open("/proc/net/" + kind)]
    # In state 0A sockets listen.
    return sum(line[3] == "0A" and "socket:[" + line[9] + "]" in open_here for line in lines)

def kill_at_work():
    while not ranks.seat.at_work:
        time.sleep(0.01)
    time.sleep(0.1)
    kill()

class Killer:
    def __init__(self, number):
        self.number = number
    def put(self, value):
        self.number -= 1
        if self.number == 0:
            kill()
    def end(self):
        pass

def run(phase):
    global killed
    if phase == "error":
        killed = time.monotonic()
        ranks.run(module.fail_on, 1)
    if phase == "load":
        threading.Thread(target=kill_at_work).start()
    part = quantspec.convert(model, tensor_parallel=ranks, **module.OPTIONS)
    if phase == "idle":
        kill()
    if phase == "save":
        gathered = gather._gathered
        def kill_and_gather(*arguments):
            gather._gathered = gathered
            kill()
            return gathered(*arguments)
        gather._gathered = kill_and_gather
        with tempfile.TemporaryDirectory() as folder:
            try:
                part.save_pretrained(folder)
            finally:
                print(phase, "wrote", *os.listdir(folder))
    part.generate(ids, **options, streamer=Killer(dict(prefill=1, cycle=9).get(phase, 0)))

for phase in {phases!r}:
    ranks = quantspec.Ranks(2)
    (other,) = ranks.process_ids
    try:
        run(phase)
    except quantspec.RanksError as error:
        print(phase, f"{{time.monotonic() - killed:.1f}}", *str(error).split())
    try:
        ranks.run(module.fail_on, 5)
    except quantspec.RanksError as error:
        print(phase, "refused", *str(error).split())
    try:
        os.kill(other, 0)
        print(phase, "still there")
    except ProcessLookupError:
        print(phase, "gone")
    # The store's own thread closes its port.
    limit = time.monotonic() + 60
    while num_ports() and time.monotonic() < limit:
        time.sleep(0.05)
    print(phase, "listens at", num_ports())
ranks = quantspec.Ranks(2)
print(*ranks.process_ids, flush=True)
time.sleep(600)
"""
PHASES = ("load", "prefill", "cycle", "idle", "save", "error")


@pytest.fixture(scope="module")
def faults():
    """What was printed of each phase, and the id of rank 1 when rank 0 was killed at last."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    source = FAULTS.format(path=paths, phases=PHASES)
    lines: list[str] = []
    command = [sys.executable, "-c", source]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        limit = threading.Timer(1800, process.kill)
        limit.start()
        for line in process.stdout:
            if line.strip().isdecimal():
                process.send_signal(signal.SIGKILL)
            lines.append(line.strip())
        limit.cancel()
        errors.seek(0)
        assert (lines or [""])[-1].isdecimal(), errors.read()
    return lines


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_that_ends_ends_all_with_its_cause(faults, phase):
    cause = "ZeroDivisionError: on purpose" if phase == "error" else "rank 1 was ended by SIGKILL"
    lines = [line.removeprefix(phase).strip() for line in faults if line.startswith(f"{phase} ")]
    if phase == "save":
        assert lines.pop(0) == "wrote"
    ended, refused, there, ports = lines
    seconds, _, message = ended.partition(" ")
    # Seconds, on whatever machine this is.
    assert float(seconds) < 300
    assert cause in message + refused
    assert refused.startswith("refused the ranks have ended")
    assert there == "gone"
    assert ports == "listens at 0"


def test_the_others_end_with_rank_0(faults):
    other = int(faults[-1])
    limit = time.monotonic() + 300
    while is_alive(other):
        assert time.monotonic() < limit
        time.sleep(0.1)


def is_alive(process: int) -> bool:
    """Whether it runs; one that has ended may wait for somebody to ask."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_a_folder_that_has_no_pieces_is_read_whole(ranks, tmp_path):
    check_folder(ranks, tmp_path, "mixtral")


def check_folder(ranks, tmp_path, architecture: str) -> None:
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    part = quantspec.convert(tmp_path, tensor_parallel=ranks, **OPTIONS)
    ids = random_ids(1, 50)
    expected = whole_pair(architecture).generate(ids, **CALL, do_sample=False)
    assert torch.equal(part.generate(ids, **CALL, do_sample=False), expected)


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_a_saved_pair_is_read_in_pieces(ranks, tmp_path):
    check_saved_pair(ranks, tmp_path, "gpt2")


def check_saved_pair(ranks, tmp_path, architecture: str) -> None:
    # Of four ranks each has 16 or 24 inputs of some linears, in no group that is known; of two it has 32 or 48.
    sizes = {"hidden_size": 128, "intermediate_size": 256} if architecture == "llama" else {"n_embd": 128}
    whole = quantspec.convert(tiny_model(architecture, **sizes), **OPTIONS)
    whole.save_pretrained(tmp_path)
    part = quantspec.from_pretrained(tmp_path, tensor_parallel=ranks)
    ids = random_ids(1, 50)
    texts = [qs.generate(ids, **CALL, do_sample=False) for qs in (whole, part)]
    assert torch.equal(*texts)
    # The same codes draft the same tokens.
    assert_drafts_alike(part, whole)


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_a_saved_pairs_groups_may_be_larger_than_those_of_a_rank(ranks, tmp_path):
    """Groups of 64 inputs, of which a rank has as many, of 32: the one in the middle is of both."""
    options = {**OPTIONS, "weight_group_size": 64}
    whole = quantspec.convert(tiny_model("llama", intermediate_size=192), **options)
    whole.save_pretrained(tmp_path)
    part = quantspec.from_pretrained(tmp_path, tensor_parallel=ranks)
    sizes = [{r.name: r.group_size for r in qs.linears}["model.layers.0.mlp.down_proj"] for qs in (whole, part)]
    assert sizes == [64, 32]
    ids = random_ids(1, 50)
    assert torch.equal(*(qs.generate(ids, **CALL, do_sample=False) for qs in (whole, part)))
    # The same codes and scales draft the same tokens.
    assert_drafts_alike(part, whole)
    part.close()


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("is_saved", [False, True], ids=["checkpoint", "saved pair"])
def test_loading_a_part_holds_little_more_than_the_part(ranks, tmp_path, is_saved):
    # A head that is a good part of all weights, as an 8B model's is.
    sizes = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    model = tiny_model("llama", torch.bfloat16, **sizes)
    config = QuantSpecConfig.from_options(None, OPTIONS)
    if is_saved:
        quantspec.convert(model, config).save_pretrained(tmp_path)
        hollow, config = hollow_saved_pair(tmp_path, torch.device("cpu"), None, True, False, {})
    else:
        model.save_pretrained(tmp_path)
        hollow = hollow_checkpoint(tmp_path, torch.device("cpu"), None, False)
    for share, peak in ranks.run(share_and_peak, is_saved, tmp_path, config, plan(hollow, config, ranks.world)):
        assert share <= peak <= 1.15 * share


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_a_saved_pair_whose_latents_are_larger_than_the_heads_of_a_rank(ranks, tmp_path):
    """Ranks make their heads with a linear that the saved draft has in full precision."""
    whole = quantspec.convert(tiny_model("deepseek_v3", first_k_dense_replace=2), **OPTIONS)
    whole.save_pretrained(tmp_path)
    part = quantspec.from_pretrained(tmp_path, tensor_parallel=ranks)
    assert {layer.values_in_keys for layer in whole.layers} == {True}
    assert {layer.values_in_keys for layer in part.layers} == {False}
    ids = random_ids(1, 50)
    assert torch.equal(*(qs.generate(ids, **CALL, do_sample=False) for qs in (whole, part)))


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("architecture", ["gpt2", "qwen3_moe"])
def test_what_ranks_save_is_what_one_process_saves(ranks, tmp_path, architecture):
    part = quantspec.convert(tiny_model(architecture), tensor_parallel=ranks, **OPTIONS)
    folders = [tmp_path / "one", tmp_path / "two"]
    for qs, folder in zip((whole_pair(architecture), part), folders, strict=True):
        qs.save_pretrained(folder)
    files = sorted(path.name for path in folders[0].glob("*.safetensors"))
    assert files == sorted(path.name for path in folders[1].glob("*.safetensors"))
    for name in files:
        expected, saved = (load_file(folder / name) for folder in folders)
        assert expected.keys() == saved.keys()
        assert all(torch.equal(tensor, saved[key]) for key, tensor in expected.items())
    ids = random_ids(1, 50)
    texts = [qs.generate(ids, **CALL, do_sample=False) for qs in (quantspec.from_pretrained(folders[1]), part)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_parts_in_smaller_groups_are_not_saved(ranks, tmp_path):
    # The linear behind attention has 64 inputs, a rank's part of it 32.
    part = quantspec.convert(tiny_model("llama"), tensor_parallel=ranks, **{**OPTIONS, "weight_group_size": 64})
    with pytest.raises(SavedModelError, match="o_proj: its group size is 32 in the ranks' parts and 64 in the whole"):
        part.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_an_engine_answers_as_it_does_in_one_process(ranks, llama_of_two):
    prompts = [random_ids(1, count, seed=count)[0].tolist() for count in (40, 20, 70)]
    sampled = {"do_sample": True, "seed": 3, "logprobs": 2}
    requests = [
        Request(prompt, 12, stop_token_ids=(), options=options)
        for prompt, options in zip(prompts, ({"do_sample": False}, sampled, {"do_sample": False}), strict=True)
    ]
    answers = []
    for qs in (whole_pair("llama"), llama_of_two):
        # Two places for three requests, and a prompt of several chunks.
        engine = Engine(qs, max_sequences=2, max_length=128, max_num_batched_tokens=32)
        engine.warm_up()
        outputs = engine.generate(requests)
        answers.append([[token for output in one for token in output.token_ids] for one in outputs])
        assert outputs[1][-1].logprobs is not None
        engine.add(requests[0])
        # Nobody gives a seed: rank 0 draws it.
        engine.generate([Request(prompts[1], 8, options={"do_sample": True})])
        with pytest.raises(ValueError, match="a request has no option"):
            engine.add(Request(prompts[0], options={"num_beams": 2}))
        engine.close()
    assert answers[0] == answers[1]
    assert all(len(answer) == 12 for answer in answers[0])
    kept = ranks.run(names_kept)
    assert not [name for name in kept if str(name).startswith("engine")]
    assert engine.loss is None


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize(("architecture", "sums"), [("llama", 1), ("gemma2", 0)])
def test_sums_normalize_in_their_own_call(ranks, architecture, sums):
    """All sums but that of embeddings which are scaled; the norm behind attention is of the sum without a residual."""
    qs = quantspec.convert(tiny_model(architecture), tensor_parallel=ranks, **OPTIONS)
    layers = len(qs.layers)
    for graph in qs.pair.graphs.values():
        fused = list(find_calls(graph.graph, torch.ops.quantspec.reduce_ranks_to_norm.default))
        assert len(fused) == 2 * layers + sums
        assert len(list(find_calls(graph.graph, torch.ops.quantspec.reduce_ranks.default))) == 1 - sums
        assert not list(find_calls(graph.graph, torch.ops.aten.rsqrt.default)) or not sums
    qs.close()


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_rank_0_decides_what_an_engine_drafts(llama_of_two, monkeypatch):
    """By times that the others do not have; here it alone takes every number in turn."""
    counts = itertools.cycle([4, 0, 2])
    monkeypatch.setattr(AutoDraftCount, "choose", lambda *_: Plan(next(counts)))
    prompts = [random_ids(1, count, seed=count)[0].tolist() for count in (40, 20, 70)]
    options = ({"do_sample": False}, {"do_sample": True, "seed": 3}, {"do_sample": False})
    requests = [Request(prompt, 12, (), own) for prompt, own in zip(prompts, options, strict=True)]
    answers = []
    for qs in (whole_pair("llama"), llama_of_two):
        engine = Engine(qs, max_sequences=2, max_length=128, num_speculative_tokens="auto")
        engine.warm_up()
        answer: dict[int, list[int]] = {engine.add(request): [] for request in requests}
        while engine.statistics().running or engine.statistics().waiting:
            for output in engine.step():
                answer[output.id] += output.token_ids
        answers.append(list(answer.values()))
        statistics = engine.statistics()
        assert 0 < statistics.drafts < statistics.cycles
        engine.close()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_a_request_that_cannot_be_sent_is_refused(llama_of_two):
    engine = Engine(llama_of_two, max_sequences=1, max_length=64)
    processors = [lambda ids, scores: scores]
    with pytest.raises(TypeError, match="a request cannot be sent to the other ranks"):
        engine.subscribe([Request([5], 8), Request([5], 8, options={"logits_processor": processors})], print)
    assert engine.statistics().waiting == 0
    engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shared_memory_sums_what_torchs_kernel_takes(dtype):
    """It refuses float16, and what ends within 16 bytes."""
    x = torch.zeros(MOST_BYTES_AT_ONCE // dtype.itemsize + 16, dtype=dtype)
    per_load = 16 // dtype.itemsize
    assert sums_at_once(x[: 2 * per_load]) == (dtype != torch.float16)
    assert not sums_at_once(x[: 2 * per_load - 1])
    assert not sums_at_once(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_how_ranks_sum_follows_from_the_shape(dtype):
    """Ranks may hold parts of one tensor that begin elsewhere; what begins within 16 bytes is copied."""
    x = torch.arange(65).to(dtype)
    for part in (x[:64], x[1:]):
        assert fits_inbox(part)
        assert sums_at_once(part) == sums_at_once(x[:64])
        aligned = ranks_module._aligned(part)
        assert aligned.storage_offset() * aligned.itemsize % 16 == 0
        assert torch.equal(aligned, part)


# Last, so that each number of ranks is started once.


@pytest.mark.parametrize("ranks", [4], indirect=True)
@pytest.mark.parametrize(("architecture", "options"), MORE_RANKS)
def test_logits_of_four_parts_are_the_wholes(ranks, architecture, options):
    check_logits(ranks, architecture, options)


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_texts_of_four_ranks_are_those_of_one_process(ranks):
    check_texts(ranks, "llama")


def sums_in_company(seat) -> tuple[Tensor, Tensor]:
    """Of bfloat16 rows together and one by one."""
    generator = torch.Generator().manual_seed(seat.place.rank)
    x = torch.randn(13, 192, generator=generator).bfloat16()
    rows = [reduce_ranks(row, seat.place.group) for row in x.split(1)]
    return reduce_ranks(x, seat.place.group), torch.cat(rows)


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_a_tokens_sums_do_not_depend_on_those_beside_it(ranks):
    """A deep model in bfloat16 was taken for one that mixes tokens."""
    together, alone = ranks.run(sums_in_company)
    assert torch.equal(together, alone)
    terms = [torch.randn(13, 192, generator=torch.Generator().manual_seed(rank)).bfloat16() for rank in range(4)]
    torch.testing.assert_close(together, sum(term.float() for term in terms).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_a_folder_is_read_by_four(ranks, tmp_path):
    check_folder(ranks, tmp_path, "llama")


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_a_saved_pair_is_read_by_four(ranks, tmp_path):
    check_saved_pair(ranks, tmp_path, "llama")


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_random_parts_of_the_benchmark_are_of_one_model(ranks, tmp_path):
    """Two KV heads, each of which two ranks hold."""
    tiny_model("llama", hidden_size=128, intermediate_size=256).config.save_pretrained(tmp_path)
    config = QuantSpecConfig.from_options(None, OPTIONS)
    stored = plan(hollow_checkpoint(tmp_path, torch.device("cpu"), torch.bfloat16, False), config, ranks.world)
    part = ranks.run(random_part, -1, str(tmp_path), config, stored)
    split = Split(part, ranks, -1, owns_ranks=False)
    converted = quantspec.QuantSpecModel(part, split)
    whole = quantspec.QuantSpecModel(split.gather(converted.session))
    ids = random_ids(1, 50)
    text = converted.generate(ids, **CALL, do_sample=False)
    assert len(set(text[0, 50:].tolist())) > 1
    assert torch.equal(whole.generate(ids, **CALL, do_sample=False), text)
    assert float(whole.model.lm_head.weight.float().std()) == pytest.approx(0.02, rel=0.1)
    converted.close()


def test_the_shape_of_70b_has_as_many_parameters():
    with torch.device("meta"):
        model = LlamaForCausalLM(shape_config("llama-3.1-70b", None))
    assert sum(p.numel() for p in model.parameters()) == 70_553_706_496
