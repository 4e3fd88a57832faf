"""What the verbs share: the parser, and arguments that several of them have."""

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sctd.errors import UserError


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Prints the default of an option behind its explanation; N for a number, FOLDER for a path."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{"max_help_position": 30, **kwargs})

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.fill(text, width, break_on_hyphens=False)  # names of recipes stay whole

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        names: dict[Any, str] = {int: "N", positive: "N", Path: "FOLDER"}
        return names.get(action.type) or super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def add_verb(verbs: Any, name: str, text: str, call: Callable[[argparse.Namespace], int | None]) -> Any:
    """A new verb. `text`: one line for `sctd --help` and `sctd VERB --help`; `call`: runs it, to its exit code."""
    verb = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    verb.set_defaults(call=call)
    return verb


def add_recipe(verb: argparse.ArgumentParser, default: str | None = None, is_optional: bool = False) -> None:
    """The recipe, which may be left out if it has a default or is optional, and overrides of its keys."""
    text = "name of a shipped recipe (`sctd pretrain --help` lists them), or a YAML file"
    verb.add_argument("recipe", nargs="?" if default or is_optional else None, default=default, help=text)
    text = "change a key of the recipe; `sctd config` lists all keys"
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help=text)


def positive(text: str) -> int:
    """A whole number of at least 1, as the type of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
