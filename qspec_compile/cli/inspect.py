"""``quantspec inspect``: whether a model fits a card, and what would be converted, from the model's config alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from quantspec.names import named_once, without_number

from .console import stdout, working
from .errors import CommandError
from .loading import Kind, Source, dtype_to_load, fetched, find_model, load_config
from .options import Dtype, ModelOptions, real, tokens, whole

if TYPE_CHECKING:
    from ._sizes import Layer, Linear, Sizes

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
    tensor_parallel: Annotated[
        int, typer.Option(parser=whole(1), metavar="N", help="GPUs to split it over; what is told is then of each.")
    ] = 1,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show attention layers, linears and the cache's parts.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, every layer by itself.")] = False,
) -> None:
    from quantspec.config import QuantSpecConfig

    from ._fit import Card, fit
    from ._plain import plain_sizes

    card = Card.here() if gpu is None else Card.named(gpu)
    source = find_model(model)
    dtype = None if model.dtype is Dtype.AUTO else model.dtype.value
    sizes = None
    if tensor_parallel == 1:
        sizes = plain_sizes(source, QuantSpecConfig.from_options(None, model.conversion()), dtype)
    if sizes is None:
        sizes = _captured_sizes(source, model, tensor_parallel)
    num_tokens = context or min(sizes.limit or _DEFAULT_CONTEXT, _DEFAULT_CONTEXT)
    if sizes.limit is not None and num_tokens > sizes.limit:
        raise CommandError(
            f"a text of {num_tokens} tokens is longer than the {sizes.limit} that a pair would take",
            "shorten --context, or give a larger --max-cache-len",
        )
    facts = _as_dict(sizes, num_tokens, batch_size, tensor_parallel)
    if card is not None:
        facts["fit"] = fit(sizes, card, gpu_memory_utilization, num_tokens, batch_size)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _print_tables(sizes, facts, layers)


def _captured_sizes(source: Source, model: ModelOptions, num_ranks: int) -> Sizes:
    """The sizes of any model, or of its part of one of several ranks, from a capture of it without data."""
    with working("importing"):
        from quantspec.checkpoint.folder import Description
        from quantspec.checkpoint.loading import changed_options, resolve_dtype
        from quantspec.config import QuantSpecConfig
        from quantspec.pair.preview import structure_of

        from ._captured import captured_sizes

    source = fetched(source, whole=False)
    dtype = dtype_to_load(source, model.dtype, None)
    if source.kind is Kind.PAIR:
        saved = Description.read(Path(source.name))
        options, dtype = changed_options(saved.options, model.conversion()), resolve_dtype(saved, dtype)
    else:
        options = QuantSpecConfig.from_options(None, model.conversion())
    config = load_config(source)
    with working("building the model without weights"):
        return captured_sizes(structure_of(config, options, dtype, model.trust_remote_code, num_ranks), options)


def _as_dict(sizes: Sizes, num_tokens: int, batch_size: int, num_ranks: int) -> dict[str, Any]:
    """All facts, JSON-ready; bytes everywhere."""
    from ._fit import ways

    cache = sizes.cache_parts(num_tokens, batch_size)
    decoded = cache.pop("decoded")
    weights = sizes.weight_bytes
    dense = sizes.full_precision(num_tokens, batch_size)
    return {
        "model": sizes.model,
        "dtype": sizes.dtype,
        "kv_group_size": sizes.options.kv_group_size,
        "tensor_parallel": num_ranks,
        "computed_by_every_rank": dict(sizes.whole),
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
            for layer in sizes.layers
        ],
        "linears": [
            {
                "name": linear.name,
                "in_features": linear.in_features,
                "out_features": linear.out_features,
                "group_size": linear.group_size,
                "model_bytes": linear.model_bytes,
                "draft_bytes": linear.draft_bytes,
                "note": linear.note,
            }
            for linear in sizes.linears
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
                for way in ways(sizes)
            ],
        },
    }


def _print_tables(sizes: Sizes, facts: dict[str, Any], layers: bool) -> None:
    console = stdout()
    memory, fit = facts["memory"], facts.get("fit")
    size = _tokens(memory["context"])
    if memory["batch_size"] > 1:
        size = f"{memory['batch_size']} x {size}"
    count = facts["tensor_parallel"]
    split = f", on each of {count} GPUs" if count > 1 else ""
    console.print(f"{facts['model']}, {facts['dtype']}, {size} tokens{split}", markup=False)
    if fit is None:
        console.print("There is no GPU here; --gpu h100-80 says what fits one.")
    else:
        console.print(_verdict(fit), markup=False)
    console.print(_ways_table(memory, fit))
    if fit is not None and fit["server"]:
        console.print(_server_table(fit))
    if layers:
        console.print(_attention_table(sizes))
        console.print(_linears_table(sizes))
        for note in _notes(sizes):
            console.print(note, markup=False)
        console.print(_memory_table(memory))
    if sizes.whole:
        names = ", ".join(named_once(sizes.whole))
        console.print(
            f"Every GPU has {_bytes(sum(sizes.whole.values()))} of the model whole and computes it: {names}.",
            markup=False,
        )
    if count > 1 and memory["cache"].get("state"):
        console.print("Every GPU has all states.")
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
    """Numbers to the right of what they are of; nothing is cut where there is little room, and no line takes any."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, title in enumerate(titles):
        table.add_column(title, overflow="fold", justify="right" if number else "left")
    return table


def _dims(layer: Layer) -> str:
    """Channels of a key, and of a value where it has others."""
    if layer.values_in_keys:
        return f"{layer.key_dim}, latent"
    return str(layer.key_dim) if layer.key_dim == layer.value_dim else f"{layer.key_dim}/{layer.value_dim}"


def _attention_table(sizes: Sizes) -> Table:
    """Consecutive layers that are alike share a row."""
    table = _table("layers", "attention", "query heads", "KV heads", "head dim K/V", "soft cap", "sinks")
    numbered = enumerate(sizes.layers)
    described = [
        (
            number,
            (
                _reach(layer),
                str(layer.query_heads),
                str(layer.kv_heads),
                _dims(layer),
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


def _reach(layer: Layer) -> str:
    if layer.window:
        return f"window of {layer.window}"
    return f"chunks of {layer.chunk}" if layer.chunk else "full"


def _linears_table(sizes: Sizes) -> Table:
    """Linears that differ in the layer's number alone share a row, those of layers below a row of their own."""
    table = _table(f"linears, INT4 groups of {sizes.options.weight_group_size}", "in", "out", "model", "draft")
    above = None
    for name, alike in _alike(sizes.linears):
        of_layers, star, own = name.partition("*.")
        heading = f"{of_layers}* ({len(alike)})" if star else None
        if heading is not None and heading != above:
            table.add_row(heading, style="dim")
        above = heading
        first = alike[0]
        table.add_row(
            f"  {own}" if star else name,
            str(first.in_features),
            str(first.out_features),
            _bytes(sum(linear.model_bytes for linear in alike)),
            _bytes(sum(linear.draft_bytes for linear in alike)),
        )
    return table


def _notes(sizes: Sizes) -> Iterator[str]:
    """Why linears have no INT4 groups, or others than were asked for."""
    for name, alike in _alike(sizes.linears):
        if alike[0].note:
            size = alike[0].group_size
            yield f"{name}: {'full precision' if size is None else f'INT4 groups of {size}'}, {alike[0].note}"


def _alike(linears: tuple[Linear, ...]) -> Iterator[tuple[str, list[Linear]]]:
    groups: dict[tuple, list[Linear]] = {}
    for linear in linears:
        name = without_number(linear.name)
        key = (name, linear.in_features, linear.out_features, linear.group_size, linear.note)
        groups.setdefault(key, []).append(linear)
    for (name, *_), alike in groups.items():
        yield name, alike


def _memory_table(memory: dict[str, Any]) -> Table:
    size = f"{memory['batch_size']} x {_tokens(memory['context'])} tokens"
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
