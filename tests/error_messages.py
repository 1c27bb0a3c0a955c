"""Error messages as the source builds them and as the troubleshooting page shows them; … stands for what varies."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator, Sequence

HOLE = "…"
# Shorter pieces, such as " of " or ": ", say nothing.
_LONG_ENOUGH = 8
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def pieces(message: str) -> list[str]:
    """What is constant in a message, short pieces left out."""
    return [piece.strip() for piece in message.split(HOLE) if len(piece.strip()) >= _LONG_ENOUGH]


def has_in_order(text: str, wanted: Sequence[str]) -> bool:
    """Whether ``wanted`` are in ``text`` one after the other."""
    place = 0
    for piece in wanted:
        place = text.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


class SourceMessages:
    """The messages of one file; names stand for every text that the file gives them, functions for what they return."""

    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source)
        self.functions = {node.name: node for node in ast.walk(self.tree) if isinstance(node, _FUNCTIONS)}
        self.constants = _assigned(self.tree.body)
        self.scopes: dict[ast.AST, dict[str, list[ast.expr]]] = {}
        # Outer functions come first, so that the innermost wins.
        for function in self.functions.values():
            scope = _assigned(list(ast.walk(function)))
            self.scopes.update(dict.fromkeys(ast.walk(function), scope))

    def raised(self) -> Iterator[tuple[int, str]]:
        """Line and text of every message of an error, and of every constant that such a message ends with."""
        in_raise = {node.exc for node in ast.walk(self.tree) if isinstance(node, ast.Raise)}
        for call in ast.walk(self.tree):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func).split(".")[-1]
            # An AttributeError is Python's protocol, nothing that went wrong.
            if name == "AttributeError" or not (call in in_raise or name.endswith("Error")):
                continue
            # An error's message comes first; what makes one takes other things too.
            for argument in call.args[:1] if name not in self.functions else call.args:
                for text in self.texts(argument):
                    if pieces(text):
                        yield call.lineno, text
                for node in ast.walk(argument):
                    if isinstance(node, ast.FormattedValue) and getattr(node.value, "id", None) in self.constants:
                        yield from ((call.lineno, text) for text in self.texts(node.value) if pieces(text))

    def all_texts(self) -> Iterator[str]:
        """Every text of the file but its docstrings."""
        documentation = {node.value for node in ast.walk(self.tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.JoinedStr | ast.Constant) and node not in documentation:
                yield from self.texts(node)

    def texts(self, node: ast.expr, within: frozenset[ast.AST] = frozenset()) -> list[str]:
        """What an expression may say."""
        within |= {node}
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [node.value]
        if isinstance(node, ast.JoinedStr):
            parts = [self.texts(part, within) for part in node.values]
            return ["".join(choice) for choice in itertools.product(*parts)]
        values: list[ast.expr] = []
        if isinstance(node, ast.FormattedValue) and getattr(node.value, "id", None) not in self.constants:
            values = [node.value]
        elif isinstance(node, ast.IfExp):
            values = [node.body, node.orelse]
        elif isinstance(node, ast.Name):
            values = self.scopes.get(node, {}).get(node.id) or self.constants.get(node.id, [])
        elif isinstance(node, ast.Call) and (name := ast.unparse(node.func).split(".")[-1]) in self.functions:
            returns = (part for part in ast.walk(self.functions[name]) if isinstance(part, ast.Return))
            values = [part.value for part in returns if part.value is not None]
        return [text for value in values if value not in within for text in self.texts(value, within)] or [HOLE]


def _assigned(statements: Sequence[ast.AST]) -> dict[str, list[ast.expr]]:
    """Everything that plain assignments give to names."""
    values: dict[str, list[ast.expr]] = {}
    for statement in statements:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    values.setdefault(target.id, []).append(statement.value)
    return values


def page_rows(page: str) -> list[str]:
    """The rows of the page's tables of messages."""
    rows: list[str] = []
    in_table = False
    for line in page.splitlines():
        in_table = line.startswith("| message |") or (in_table and line.startswith("|"))
        if in_table:
            rows.append(line)
    return [row for row in rows if not row.startswith(("| message |", "| --- |"))]


def row_messages(row: str) -> list[str]:
    """The messages of a row: what its first cell has in backticks, names in the remarks left out."""
    cell = row.split(" | ")[0]
    return [match[2].strip() for match in re.finditer(r"(`+)(.+?)\1(?!`)", cell) if " " in match[2].strip()]


def is_said(message: str, text: str) -> bool:
    """Whether a ``message`` of the page is a ``text`` of the source, written out with examples or shortened."""
    shown, said = pieces(message), pieces(text)
    if not shown or not said:
        return message == text
    # Most of a message is its own; the rest are names and reasons.
    written_out = has_in_order(message, said) and 3 * len("".join(said)) >= len("".join(shown))
    return written_out or has_in_order(text, shown)
