"""The paper's ablations: which runs each is made of, and the file that says so beside them.

ABLATION/
  ablation.json      kind, title, recipe, config and rows, each with label, value, run and overrides
  RUN.yaml, RUN/     recipe and folder of each row's run
  ablation.csv, .md  the table
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sctd.config import nearest
from sctd.errors import UserError

ABLATION = "ablation.json"
_LAMBDAS = (0.0, 0.01, 0.05, 0.25, 0.5)
_INTERVALS = (5, 10, 20, 50)
# Terms of an ALIGN step beside the dropping path's own MLM loss, in Table 4's order: label, and name in folders.
_TERMS = {"mlm_full": ("L_MLM", "mlm"), "kl_local": ("KL_local", "local"), "kl_global": ("KL_global", "global")}


@dataclass(frozen=True)
class Row:
    """One run of an ablation.

    Args:
        value: what sets it apart: lambda, F, terms joined by +, or the arm.
        run: its folder, and its recipe without .yaml. overrides: over the user's recipe and overrides.
    """

    label: str
    value: float | str
    run: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Ablation:
    kind: str
    title: str
    rows: tuple[Row, ...]

    @property
    def keys(self) -> set[str]:
        """The config keys that its rows set."""
        return {override.partition("=")[0] for row in self.rows for override in row.overrides}


def find_ablation(kind: str) -> Ablation:
    """The ablation of this kind.

    Raises:
        UserError: there is none.
    """
    if kind not in ABLATIONS:
        raise UserError(f"ablation '{kind}' not found: {nearest(kind, ABLATIONS)}")
    return ABLATIONS[kind]


def describe(ablation: Ablation, recipe: str, config: dict[str, Any]) -> str:
    """The text of ablation.json. `config`: what all runs have in common, by section.key."""
    rows = [asdict(row) for row in ablation.rows]
    facts = {"kind": ablation.kind, "title": ablation.title, "recipe": recipe, "config": config, "rows": rows}
    return json.dumps(facts, indent=1) + "\n"


def read_ablation(folder: Path) -> dict[str, Any]:
    """What `describe` wrote there.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / ABLATION
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        rows_are_whole = all(isinstance(row["label"] + row["run"], str) for row in found["rows"])
        if rows_are_whole and isinstance(found["kind"], str) and isinstance(found["config"], dict):
            return found
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{path} cannot be read: restore it from a backup, or choose another folder")


def _arm(arm: str, label: str) -> Row:
    return Row(label, arm, arm.replace("_", "-"), (f"arm={arm}",))


def _objective(terms: Sequence[str]) -> Row:
    switches = [f"objective.{term}={'true' if term in terms else 'false'}" for term in _TERMS]
    return Row(
        label=" + ".join(_TERMS[term][0] for term in terms),
        value="+".join(terms),
        run="-".join(_TERMS[term][1] for term in terms),
        overrides=("arm=sctd", "objective.mlm_drop=true", *switches),
    )


def _number(name: str, value: float, run: str, key: str) -> Row:
    return Row(f"{name} = {value:g}", value, run, ("arm=sctd", f"{key}={value:g}"))


_SUBSETS = itertools.chain.from_iterable(itertools.combinations(_TERMS, size) for size in (1, 2, 3))
_BASELINE, _TOKEN_DROP = _arm("baseline", "baseline"), _arm("token_drop", "token drop")
_ALL = (
    Ablation("objectives", "Training objectives (Table 4)", (_BASELINE, _TOKEN_DROP, *map(_objective, _SUBSETS))),
    Ablation(
        "lambda",
        "Weight lambda of the semantic terms (Figure 7)",
        tuple(_number("lambda", weight, f"lambda-{weight:g}", "objective.kl_weight") for weight in _LAMBDAS),
    ),
    Ablation(
        "interval",
        "Interval F between ALIGN steps (Table 5)",
        (_BASELINE, _TOKEN_DROP, *(_number("F", steps, f"f{steps}", "objective.interval") for steps in _INTERVALS)),
    ),
    Ablation(
        "selection",
        "Choice of the kept tokens",
        (_BASELINE, _arm("token_drop", "importance"), _arm("random_drop", "random"), _arm("random_ltd", "random-LTD")),
    ),
)
ABLATIONS = {ablation.kind: ablation for ablation in _ALL}
