"""Defaults of options that the environment or a file ``quantspec.toml`` gives, under the options' own names."""

from __future__ import annotations

import functools
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import CommandError

FILE = "quantspec.toml"
# Names another file.
_VARIABLE = "QUANTSPEC_CONFIG"
# A file may come with a folder that somebody else made.
_NOT_OF_A_FILE = "trust-remote-code"
# Of these the environment gives one value, white space and all; others that may be repeated are split at it.
_TEXTS = frozenset({"stop"})


def read_environment(command: Any) -> None:
    """Let ``QUANTSPEC_MAX_NEW_TOKENS`` stand for ``--max-new-tokens``, and so on for every option of ``command``."""
    for parameter in command.params:
        if names := _names(parameter):
            parameter.envvar = [f"QUANTSPEC_{name.replace('-', '_').upper()}" for name in names]
            # They follow from the names, and would fill the help.
            parameter.show_envvar = False
            if not _TEXTS.isdisjoint(names):
                parameter.value_from_envvar = functools.partial(_whole_value, parameter)


def read_file(commands: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options by command, as the program's ``default_map`` takes them.

    What stands in the file before its tables is of every command that has such an option.

    Raises:
        CommandError: the file cannot be read, or names what there is not.
    """
    named = os.environ.get(_VARIABLE)
    path = Path(named or FILE)
    try:
        contents = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if named:
            raise CommandError(f"{_VARIABLE} names '{path}', which is not there", "check the path") from None
        return {}
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read '{path}': {error}", f"write it as TOML; {_VARIABLE} names another") from error
    known = {
        command: {name: parameter for parameter in commands[command].params for name in _names(parameter)}
        for command in commands
    }
    tables = {name: value for name, value in contents.items() if isinstance(value, dict)}
    found: dict[str, dict[str, Any]] = {command: {} for command in commands}
    for key, value in contents.items():
        if key in tables:
            continue
        having = [command for command in commands if _option(key) in known[command]]
        if not having:
            raise CommandError(f"'{path}': no command has an option '{key}'", "`--help` after a command lists them")
        for command in having:
            parameter = known[command][_option(key)]
            found[command][parameter.name] = _as_written(path, key, value, parameter)
    for command, table in tables.items():
        if command not in commands:
            raise CommandError(f"'{path}': there is no command '{command}'", f"there are {', '.join(commands)}")
        for key, value in table.items():
            if _option(key) not in known[command]:
                hint = f"`quantspec {command} --help` lists them"
                raise CommandError(f"'{path}': `{command}` has no option '{key}'", hint)
            parameter = known[command][_option(key)]
            found[command][parameter.name] = _as_written(path, key, value, parameter)
    return found


def _whole_value(parameter: Any, context: Any) -> list[str] | None:
    """What the environment gives an option that may be repeated: one value."""
    value = parameter.resolve_envvar_value(context)
    return None if value is None else [value]


def origin(error: Exception) -> str:
    """Where the value of a wrong option comes from, unless it stands on the command line."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    if context is None or parameter is None:
        return ""
    source = context.get_parameter_source(parameter.name)
    if source is None or source.name not in ("ENVIRONMENT", "DEFAULT_MAP"):
        return ""
    return "it comes from " + ("the environment" if source.name == "ENVIRONMENT" else os.environ.get(_VARIABLE, FILE))


def _names(parameter: Any) -> list[str]:
    """Long names of an option, without dashes; none of an argument, nor of what only prints."""
    if parameter.param_type_name != "option" or not parameter.expose_value:
        return []
    return [name.removeprefix("--") for name in parameter.opts if name.startswith("--")]


def _option(key: str) -> str:
    return key.replace("_", "-")


def _as_written(path: Path, key: str, value: Any, parameter: Any) -> Any:
    """A value as the command line would have it, so that it is checked in the same way."""
    if _option(key) == _NOT_OF_A_FILE:
        raise CommandError(f"'{path}': '{key}' cannot be set in a file", f"give --{_NOT_OF_A_FILE} where it is meant")
    if isinstance(value, list):
        return [str(item) for item in value]
    written = str(value).lower() if isinstance(value, bool) else str(value)
    return [written] if parameter.multiple else written
