"""`sctd config`: every key of a recipe, with its type, its default and a line of explanation."""

import argparse
import dataclasses
import difflib
import json
import textwrap
from typing import Any

from sctd.cli import arguments
from sctd.config import BOUNDS, Config, keys, type_name
from sctd.errors import UserError

_COLUMNS = "  {:<23}{:<16}{:<14}"  # key, default, type; the explanation takes the rest of the line


def add_verb(verbs: Any) -> None:
    """Add this verb to the command line."""
    verb = arguments.add_verb(verbs, "config", "explain the keys of a recipe: type, default and meaning", _config)
    verb.add_argument("name", nargs="?", help="section (train) or key (train.steps, or just steps); default: all")


def explain(name: str | None = None) -> str:
    """All sections, one section, or one key in full.

    Raises:
        UserError: a name that is neither a section nor a key.
    """
    sections = {part.name: part.type for part in dataclasses.fields(Config)}
    if name is None or name in sections and name not in keys():
        return "\n\n".join(_section(each, sections[each]) for each in ([name] if name else sections))
    found = [key for key in keys() if name in (key, key.rpartition(".")[2])]
    if not found:
        known = [*sections, *keys(), *(key.rpartition(".")[2] for key in keys())]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "`sctd config` lists them"
        raise UserError(f"unknown config section or key {name!r}: {hint}")
    return "\n\n".join(map(_key, found))


def _section(name: str, cls: Any) -> str:
    found = {key: item for key, item in keys().items() if key.split(".")[0] == name}
    lines = [] if name in found else [f"{name}: {cls.__doc__}"]
    for key, item in found.items():
        choices = " | ".join(map(str, item.metadata["choices"]))
        kind = "choice" if choices else type_name(item.type).removeprefix("a ").removesuffix(" or null")
        start = _COLUMNS.format(key.rpartition(".")[2], _shown(item.default), kind)
        for text in filter(None, (choices, item.metadata["text"])):
            lines.append(textwrap.fill(text, 100, initial_indent=start, subsequent_indent=" " * len(start)))
            start = " " * len(start)
    return "\n".join(lines)


def _key(key: str) -> str:
    item = keys()[key]
    bounds = " and ".join(f"{BOUNDS[name][0]} {bound}" for name, bound in item.metadata["bounds"].items())
    values = " | ".join(map(str, item.metadata["choices"])) or bounds
    lines = [key, item.metadata["text"], f"type      {type_name(item.type)}", f"default   {_shown(item.default)}"]
    return "\n  ".join([*lines, *([f"values    {values}"] if values else [])])


def _shown(value: Any) -> str:
    """A value as a recipe writes it."""
    return value if isinstance(value, str) and value else json.dumps(value)


def _config(args: argparse.Namespace) -> None:
    print(explain(args.name))
