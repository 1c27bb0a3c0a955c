"""``quantspec inspect``: whether a model fits a card, and what would be converted, from the model's config alone."""

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
from .loading import Kind, dtype_to_load, fetched, find_model, load_config
from .options import ModelOptions, real, tokens, whole

if TYPE_CHECKING:
    from quantspec.capture import CapturedLayer
    from quantspec.config import QuantSpecConfig
    from quantspec.pair.preview import LinearSize, Structure

_LAYER_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_DEFAULT_CONTEXT = 32768


SETTINGS = {"epilog": "quantspec inspect MODEL --gpu h100-80 --context 128k\nquantspec inspect MODEL --layers"}


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
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Card to fit, such as h100-80, or its GiB. [default: the one that is here, if any]"
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float,
        typer.Option(
            parser=real(0, 1), metavar="X", help="Share of the card's memory for weights and cache, as of `serve`."
        ),
    ] = 0.9,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show attention layers, linears and the cache's parts.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, every layer by itself.")] = False,
) -> None:
    """Tell whether a model fits a card and how long a context, without loading weights; what would be converted."""
    source = find_model(model)
    with working("importing"):
        from quantspec.cache import check_cache_len
        from quantspec.checkpoint.folder import Description
        from quantspec.checkpoint.loading import changed_options, resolve_dtype
        from quantspec.config import QuantSpecConfig
        from quantspec.pair.preview import structure_of

        from ._fit import Card, fit

    card = Card.here() if gpu is None else Card.named(gpu)
    source = fetched(source, whole=False)
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
    if card is not None:
        facts["fit"] = fit(structure, options, card, gpu_memory_utilization, num_tokens, batch_size)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _print_tables(structure, facts, layers)


def _as_dict(structure: Structure, options: QuantSpecConfig, num_tokens: int, batch_size: int) -> dict[str, Any]:
    """All facts, JSON-ready; bytes everywhere."""
    from quantspec.memory import full_precision_bytes

    from ._fit import cache_parts, ways

    cache = cache_parts(structure, options, num_tokens, batch_size)
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
                "values_in_keys": layer.values_in_keys,
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
            "ways": [
                {
                    "name": way.name,
                    "weights": way.weights,
                    "cache": way.cache(num_tokens, batch_size),
                    "total": way.total(num_tokens, batch_size),
                }
                for way in ways(structure, options)
            ],
        },
    }


def _print_tables(structure: Structure, facts: dict[str, Any], layers: bool) -> None:
    console = stdout()
    memory, fit = facts["memory"], facts.get("fit")
    size = _tokens(memory["context"])
    if memory["batch_size"] > 1:
        size = f"{memory['batch_size']} x {size}"
    console.print(f"{facts['model']}, {facts['dtype']}, {size} tokens", markup=False)
    if fit is None:
        console.print("There is no GPU here; --gpu h100-80 says what fits one.")
    else:
        console.print(_verdict(fit), markup=False)
    console.print(_ways_table(memory, fit))
    if fit is not None and fit["server"]:
        console.print(_server_table(fit))
    if layers:
        console.print(_attention_table(structure))
        console.print(_linears_table(structure))
        console.print(_memory_table(memory))
    own, theirs = sum(memory["cache"].values()), memory["unconverted"]["cache"]
    if own > theirs:
        console.print(
            f"The cache takes {own / theirs:.1f} times what transformers' own does: it holds the keys and values of "
            "every attention call and a recent buffer in full precision."
        )


def _verdict(fit: dict[str, Any]) -> str:
    own = fit["ways"][0]
    share = f"{fit['gpu_memory_utilization']:.0%} of {fit['gpu']}, {_bytes(fit['room'])}"
    if own["fits"]:
        return f"It fits: {_bytes(own['total'])} of weights and cache in {share}."
    longest = own["largest_context"]
    instead = f"{_tokens(longest)} tokens would" if longest else "no length of text would"
    return f"It does not fit: {_bytes(own['total'])} of weights and cache in {share}; {instead}."


def _ways_table(memory: dict[str, Any], fit: dict[str, Any] | None) -> Table:
    """A column for quantspec and for each alternative: what it takes and, on a card, how much of it fits."""
    ways = memory["ways"] if fit is None else fit["ways"]
    table = _table("", *(way["name"] for way in ways))
    for part in ("weights", "cache", "total"):
        table.add_row(part, *(_bytes(way[part]) for way in ways))
    if fit is not None:
        table.add_row("fits", *("yes" if way["fits"] else "no" for way in ways), style="bold")
        table.add_row("longest context", *(_tokens(way["largest_context"]) for way in ways))
        table.add_row("largest batch", *(str(way["largest_batch_size"]) for way in ways))
    return table


def _server_table(fit: dict[str, Any]) -> Table:
    """How long requests may be, by how many run at once."""
    table = _table("quantspec serve: requests at once", "tokens of each")
    for row in fit["server"]:
        table.add_row(str(row["max_sequences"]), _tokens(row["max_length"]))
    return table


def _table(*titles: str) -> Table:
    """Numbers to the right of what they are of; nothing is cut where there is little room."""
    table = Table()
    for number, title in enumerate(titles):
        table.add_column(title, overflow="fold", justify="right" if number else "left")
    return table


def _attention_table(structure: Structure) -> Table:
    """Consecutive layers that are alike share a row."""
    table = _table("layers", "attention", "query heads", "KV heads", "head dim K/V", "soft cap", "sinks")
    numbered = enumerate(structure.layers)
    described = [
        (
            number,
            (
                _reach(layer),
                str(layer.query_heads),
                str(layer.kv_heads),
                f"{layer.key_dim}/{layer.value_dim}{', latent' if layer.values_in_keys else ''}",
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
    table = _table("linears", "count", "in", "out", "INT4 groups of", "model", "draft adds", "note")
    for name, alike in _alike(structure.linears):
        report = alike[0].report
        table.add_row(
            name,
            str(len(alike)),
            str(report.in_features),
            str(report.out_features),
            "full precision" if report.group_size is None else str(report.group_size),
            _bytes(sum(linear.model_bytes for linear in alike)),
            _bytes(sum(linear.draft_bytes for linear in alike)),
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
    table = _table("memory", f"quantspec, {size}", "unconverted")
    unconverted = memory["unconverted"]
    table.add_row("weights", _bytes(memory["weights"]["target"]), _bytes(unconverted["weights"]))
    table.add_row("draft's INT4 weights", _bytes(memory["weights"]["draft_int4"]), "-")
    for part, count in memory["cache"].items():
        table.add_row(f"cache: {part}", _bytes(count), "-")
    table.add_row("cache", _bytes(sum(memory["cache"].values())), _bytes(unconverted["cache"]))
    table.add_row("total", _bytes(memory["total"]), _bytes(unconverted["total"]), style="bold")
    table.add_row("on a CPU also: decoded copy of the cache", _bytes(memory["decoded_copy_on_cpu"]), "-")
    return table


def _bytes(count: int) -> str:
    if not count:
        return "-"
    return f"{count / 2**30:,.1f} GiB" if count >= 2**28 else f"{count / 2**20:,.1f} MiB"


def _tokens(count: int) -> str:
    """As they may be written: 128k for 131,072."""
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else f"{count:,}"
