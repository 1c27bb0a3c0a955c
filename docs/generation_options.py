"""Write ``generation-options.md`` next to this file from the table that the tests check.

Run it as ``python docs/generation_options.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from generation_options import ARGUMENTS, GRAPH, HONOURED, HOST, IRRELEVANT, OPTIONS, OWN, REFUSED, Option  # noqa: E402

from quantspec.hugging_face.rows import ROW_OPTIONS  # noqa: E402

INTRODUCTION = f"""# Generation options

Made by `python docs/generation_options.py` from the table that `tests/test_generation_options.py` checks: every field
of transformers' `GenerationConfig`, given as a keyword or in a config, every argument of `model.generate`, and what
`qs.generate` adds.

*Honoured* options mean what they mean there. *Refused* ones raise an error that names them before any work is done.
*Irrelevant* ones change nothing in Hugging Face's greedy search and sampling either, or only how its own cache works.

*Where* is where a call with the option decides which drafts stand, on a GPU. *{GRAPH.capitalize()}*: the processors are
part of the captured cycle, and other values need no other capture. *{HOST.capitalize()}*: drafting and verification are
captured; between them the processors are called as Hugging Face calls them, once per token, up to the first draft that
is rejected. One such option takes the whole call there.
"""


ROWS = """
## Rows of their own

`qs.generate(..., row_options=[{{...}}, ...])` takes a dict for each row, over the options of the call: Hugging Face
prepares each row as if it were alone (its padding is part of its prompt, as in a batch of Hugging Face's:
lengths count it, and processors see it), and the batch decodes them together, in one captured cycle. `seed` takes a
list.
Rows may differ in {options}. Everything else is the whole batch's, and refused by name in a row;
so is `eos_token_id` beside `json_schema`, `regex` or `grammar`.
"""


def _section(status: str, options: dict[str, Option]) -> list[str]:
    chosen = {name: option for name, option in options.items() if option.status == status}
    title = ["", f"### {status.capitalize()}", ""]
    if status == IRRELEVANT:
        rows = [f"| `{name}` | {option.note} |" for name, option in chosen.items()]
        return [*title, "| option | note |", "| --- | --- |", *rows]
    where = {name: option.tier if status == HONOURED else REFUSED for name, option in chosen.items()}
    rows = [f"| `{name}` | {where[name]} | {option.note} |" for name, option in chosen.items()]
    return [*title, "| option | where | note |", "| --- | --- | --- |", *rows]


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    tables = {
        "Fields of `GenerationConfig`": OPTIONS,
        "Arguments of `model.generate`": ARGUMENTS,
        "Arguments that `qs.generate` adds": OWN,
    }
    for title, options in tables.items():
        lines.append(f"\n## {title}")
        for status in (HONOURED, REFUSED, IRRELEVANT):
            if any(option.status == status for option in options.values()):
                lines += _section(status, options)
    options = ", ".join(f"`{name}`" for name in sorted(ROW_OPTIONS))
    return "\n".join(lines) + "\n" + ROWS.format(options=options)


if __name__ == "__main__":
    (HERE / "generation-options.md").write_text(page())
