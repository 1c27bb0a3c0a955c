"""``quantspec inspect``: what would be converted, and the memory it takes, from the model's config alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .console import stdout, working
from .loading import Kind, dtype_to_load, find_model, load_config
from .options import ModelOptions, tokens, whole

if TYPE_CHECKING:
    from quantspec.capture import CapturedLayer
    from quantspec.config import QuantSpecConfig
    from quantspec.pair.preview import LinearSize, Structure

_LAYER_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_DEFAULT_CONTEXT = 32768


SETTINGS = {"epilog": "quantspec inspect MODEL --context 128k\nquantspec inspect MODEL --json > structure.json"}


def command(
    model: ModelOptions,
    context: Annotated[
        int | None,
        typer.Option(
            parser=tokens(),
            metavar="N",
            help=f"Tokens of a text. [default: the model's limit, at most {_DEFAULT_CONTEXT}]",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Texts generated together.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, every layer by itself.")] = False,
) -> None:
    """Show attention layers, linears and the memory of a conversion or a saved pair, without loading weights."""
    source = find_model(model)
    with working("importing"):
        from quantspec.cache import check_cache_len
        from quantspec.checkpoint.folder import Description
        from quantspec.checkpoint.loading import changed_options, resolve_dtype
        from quantspec.config import QuantSpecConfig
        from quantspec.pair.preview import structure_of

    dtype = dtype_to_load(source, model.dtype, None)
    if source.kind is Kind.PAIR:
        saved = Description.read(Path(source.name))
        options, dtype = changed_options(saved.options, model.conversion()), resolve_dtype(saved, dtype)
    else:
        options = QuantSpecConfig.from_options(None, model.conversion())
    config = load_config(source)
    with working("building the model without weights"):
        structure = structure_of(config, options, dtype, model.trust_remote_code)
    limit = options.max_cache_len or structure.max_len
    num_tokens = context or min(limit or _DEFAULT_CONTEXT, _DEFAULT_CONTEXT)
    if limit is not None:
        check_cache_len(num_tokens, limit)
    facts = _as_dict(structure, options, num_tokens, batch_size)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _print_tables(structure, facts)


def _as_dict(structure: Structure, options: QuantSpecConfig, num_tokens: int, batch_size: int) -> dict[str, Any]:
    """All facts, JSON-ready; bytes everywhere."""
    from quantspec.engine.draft_count import AutoDraftCount
    from quantspec.memory import expected_memory, full_precision_bytes

    gamma = options.num_speculative_tokens
    cache = expected_memory(
        structure.layers,
        num_tokens,
        batch_size,
        kv_group_size=options.kv_group_size,
        num_speculative_tokens=gamma if isinstance(gamma, int) else AutoDraftCount().most,
        dtype=structure.dtype,
        max_cache_len=options.max_cache_len or structure.max_len,
        device="cpu",
        states=structure.states,
    )
    decoded = cache.pop("decoded")
    weights = structure.weight_bytes
    dense = full_precision_bytes(structure.layers, num_tokens, batch_size, structure.dtype, structure.states)
    return {
        "model": structure.model_type,
        "dtype": str(structure.dtype).removeprefix("torch."),
        "kv_group_size": options.kv_group_size,
        "attention": [
            {
                "module": layer.module,
                "kind": "sliding window" if layer.window else "chunks" if layer.chunk else "full",
                "window": layer.window or None,
                "chunk": layer.chunk or None,
                "query_heads": layer.query_heads,
                "kv_heads": layer.kv_heads,
                "key_dim": layer.key_dim,
                "value_dim": layer.value_dim,
                "softcap": layer.softcap or None,
                "sinks": layer.has_sinks,
            }
            for layer in structure.layers
        ],
        "linears": [
            {
                "name": linear.report.name,
                "in_features": linear.report.in_features,
                "out_features": linear.report.out_features,
                "group_size": linear.report.group_size,
                "model_bytes": linear.model_bytes,
                "draft_bytes": linear.draft_bytes,
                "note": linear.report.note,
            }
            for linear in structure.linears
        ],
        "memory": {
            "context": num_tokens,
            "batch_size": batch_size,
            "weights": weights,
            "cache": cache,
            "decoded_copy_on_cpu": decoded,
            "total": sum(weights.values()) + sum(cache.values()),
            "unconverted": {"weights": weights["target"], "cache": dense, "total": weights["target"] + dense},
        },
    }


def _print_tables(structure: Structure, facts: dict[str, Any]) -> None:
    console = stdout()
    console.print(f"{facts['model']}, {facts['dtype']}, KV groups of {facts['kv_group_size']} tokens\n")
    console.print(_attention_table(structure))
    console.print(_linears_table(structure))
    console.print(_memory_table(facts["memory"]))
    own, theirs = sum(facts["memory"]["cache"].values()), facts["memory"]["unconverted"]["cache"]
    if own > theirs:
        console.print(
            f"The cache takes {own / theirs:.1f} times what transformers' own does: it holds the keys and values of "
            "every attention call and a recent buffer in full precision."
        )


def _attention_table(structure: Structure) -> Table:
    """Consecutive layers that are alike share a row."""
    table = Table("layers", "attention", "query heads", "KV heads", "head dim K/V", "soft cap", "sinks")
    numbered = enumerate(structure.layers)
    described = [
        (
            number,
            (
                _reach(layer),
                str(layer.query_heads),
                str(layer.kv_heads),
                f"{layer.key_dim}/{layer.value_dim}",
                f"{layer.softcap:g}" if layer.softcap else "-",
                "yes" if layer.has_sinks else "-",
            ),
        )
        for number, layer in numbered
    ]
    for cells, run in groupby(described, key=lambda item: item[1]):
        numbers = [number for number, _ in run]
        table.add_row(f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0]), *cells)
    return table


def _reach(layer: CapturedLayer) -> str:
    if layer.window:
        return f"window of {layer.window}"
    return f"chunks of {layer.chunk}" if layer.chunk else "full"


def _linears_table(structure: Structure) -> Table:
    """Linears that differ in the layer's number alone share a row."""
    table = Table("linears", "count", "in", "out", "INT4 groups of", "model", "draft adds", "note")
    for name, alike in _alike(structure.linears):
        report = alike[0].report
        table.add_row(
            name,
            str(len(alike)),
            str(report.in_features),
            str(report.out_features),
            "full precision" if report.group_size is None else str(report.group_size),
            _mebibytes(sum(linear.model_bytes for linear in alike)),
            _mebibytes(sum(linear.draft_bytes for linear in alike)),
            report.note,
        )
    return table


def _alike(linears: tuple[LinearSize, ...]) -> Iterator[tuple[str, list[LinearSize]]]:
    groups: dict[tuple, list[LinearSize]] = {}
    for linear in linears:
        report = linear.report
        name = _LAYER_NUMBER.sub(".*", report.name)
        key = (name, report.in_features, report.out_features, report.group_size, report.note)
        groups.setdefault(key, []).append(linear)
    for (name, *_), alike in groups.items():
        yield name, alike


def _memory_table(memory: dict[str, Any]) -> Table:
    size = f"{memory['batch_size']} x {memory['context']} tokens"
    table = Table("memory", f"quantspec, {size}", "unconverted")
    unconverted = memory["unconverted"]
    table.add_row("weights", _mebibytes(memory["weights"]["target"]), _mebibytes(unconverted["weights"]))
    table.add_row("draft's INT4 weights", _mebibytes(memory["weights"]["draft_int4"]), "-")
    for part, count in memory["cache"].items():
        table.add_row(f"cache: {part}", _mebibytes(count), "-")
    table.add_row("cache", _mebibytes(sum(memory["cache"].values())), _mebibytes(unconverted["cache"]))
    table.add_row("total", _mebibytes(memory["total"]), _mebibytes(unconverted["total"]), style="bold")
    table.add_row("on a CPU also: decoded copy of the cache", _mebibytes(memory["decoded_copy_on_cpu"]), "-")
    return table


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count else "-"
