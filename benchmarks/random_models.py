"""Models of known shapes with random weights, whole on one GPU or in parts over several."""

from __future__ import annotations

import itertools
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from quantspec import QuantSpecModel
from quantspec.checkpoint.split_loading import hollow_checkpoint
from quantspec.config import QuantSpecConfig
from quantspec.engine.session import Session
from quantspec.pair import Pair
from quantspec.pair.split import StoredCapture, plan, split_pair
from quantspec.passes.pieces import Piece
from quantspec.ranks import Ranks, Seat, check_can_start
from quantspec.tensor_parallel import Split

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-3.1-70b": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
# Of random weights, as transformers makes them.
_STANDARD_DEVIATION = 0.02
# By which ranks keep the only pair of theirs.
_PAIR = 0


def shape_config(name: str, layers: int | None) -> LlamaConfig:
    """The config of a Llama of the named shape, with ``layers`` layers if they are given."""
    shape = dict(SHAPES[name])
    if layers is not None:
        shape["num_hidden_layers"] = layers
    rope = {"rope_type": "default", "rope_theta": 5e5}
    return LlamaConfig(**shape, max_position_embeddings=2**18, tie_word_embeddings=False, rope_parameters=rope)


def check_fits(name: str, layers: int | None, num_gpus: int) -> None:
    """Refuse a shape whose weights alone, target's and draft's, exceed the memory of so many GPUs.

    Raises:
        ValueError: naming how many would hold them.
    """
    config = shape_config(name, layers)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    drafted = count - config.vocab_size * config.hidden_size
    # Two bytes each, and in the draft half a byte with a scale and a zero per group of 128.
    size = 2 * count + drafted * (0.5 + 4 / 128)
    room = torch.cuda.get_device_properties(0).total_memory
    if size > num_gpus * room:
        enough = next(number for number in itertools.count(1) if size <= 2**number * room)
        raise ValueError(
            f"'{name}' has {size / 2**30:.0f} GiB of weights with its draft, and a GPU has {room / 2**30:.0f} GiB; "
            f"split it with python -m benchmarks.decode --model {name} --tensor-parallel {2**enough}"
        )


def random_model(name: str, layers: int | None) -> PreTrainedModel:
    """A Llama of the named shape with random bfloat16 weights on the GPU.

    Raises:
        ValueError: the GPU is too small for it.
    """
    check_fits(name, layers, 1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(shape_config(name, layers)).eval()
    torch.set_default_dtype(torch.float32)
    return model


def split_random_pair(model_config: LlamaConfig, num_ranks: int, device_type: str, **options: Any) -> QuantSpecModel:
    """A pair with random bfloat16 weights over ranks, each of which makes those of its own part on its own device.

    It is what the folder of a model with such weights would become, without the folder; ``options`` are ``convert``'s.

    Raises:
        ValueError: there are fewer GPUs than ranks.
        UnsupportedModelError: the model cannot be split over so many.
        RanksError: a rank failed or was ended.
    """
    check_can_start(num_ranks, device_type)
    config = QuantSpecConfig.from_options(None, options)
    with tempfile.TemporaryDirectory() as folder:
        model_config.save_pretrained(folder)
        stored = plan(_hollow_model(folder, device_type), config, num_ranks)
        ranks = Ranks(num_ranks, device_type)
        try:
            pair = ranks.run(random_part, _PAIR, folder, config, stored)
        except BaseException:
            ranks.close()
            raise
    return QuantSpecModel(pair, Split(pair, ranks, _PAIR, owns_ranks=True))


def random_part(seat: Seat, key: int, folder: str, config: QuantSpecConfig, stored: StoredCapture | None) -> Pair:
    """This rank's part of the pair of the config in ``folder``; what several ranks hold is the same on all.

    The rank keeps a session of it by ``key``.
    """
    model = _hollow_model(folder, seat.device)
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def read(name: str, piece: Piece | None) -> Tensor:
        whole = torch.empty(shapes[name], dtype=torch.bfloat16, device="meta")
        held = whole if piece is None else piece.of(whole)
        weight = torch.empty(held.shape, dtype=held.dtype, device=seat.device)
        if weight.dim() == 1:
            return weight.fill_(1)
        generator = torch.Generator(seat.device).manual_seed(zlib.crc32(repr((name, piece)).encode()))
        return weight.normal_(0, _STANDARD_DEVIATION, generator=generator)

    pair = split_pair(seat, model, read, config, stored)
    seat.kept[key] = Session(pair)
    return pair


def _hollow_model(folder: str, device: torch.device | str) -> PreTrainedModel:
    return hollow_checkpoint(Path(folder), torch.device(device), torch.bfloat16, trust_remote_code=False)
