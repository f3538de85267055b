"""Which attacks a model is put to, and on what budget: `red_teams/<team>-<budget>.toml`, laid over a recipe.

    attack_images = 16               # any field of a recipe may stand here, and replaces the recipe's
    [score]
    unrelated = 20
    [references]                     # concept → a model that was trained without it, attacked beside the erased one
    toybox-fire = "toybox-never-fire"
    [random]                         # settings of `random_prompts`, the baseline of every attack
    length = 6
    [[attacks]]                      # rows as in a recipe
    row = "prompts"
    …

A recipe names its `red_team`; a budget is `quick`, `standard` or `published`, or a file of your own that ends in
`.toml`. Beside every attack stand two baselines with the same prompts and as many images and queries: the prompts as
they are, and random ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from duo.errors import UserError, did_you_mean
from duo.fields import as_table, build, read_toml
from duo.recipe import AttackRow, Recipe, is_row_name, merged

FOLDER = Path(__file__).parent / "red_teams"
ALL = "all"
HEADLINE = "prompts"  # the row that is run whatever attacks are chosen
BASELINES = ("prompts", "random_prompts")
OWN = ("references", "random")  # what is no field of a recipe


def budgets(team: str) -> list[str]:
    """The budgets of a team in the package."""
    return sorted(path.stem.removeprefix(f"{team}-") for path in FOLDER.glob(f"{team}-*.toml"))


def budget_names() -> list[str]:
    """The budgets in the package, as <team>-<budget>."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def budget_rows() -> set[str]:
    """The names of the attack rows of every budget in the package."""
    return {row["row"] for path in FOLDER.glob("*.toml") for row in read_toml(path)["attacks"]}


def red_team(recipe: Recipe, *, budget: str, attacks: Sequence[str] = (ALL,)) -> Recipe:
    """The recipe with the attacks of a budget in place of its own: all, or those whose names or rows are given."""
    path = _path(recipe.red_team, budget)
    table = read_toml(path)
    references, random = (_table(table.pop(name, {}), name, path) for name in OWN)
    rows = table.get("attacks", [])
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: attacks is missing, or no list; a red team needs at least one [[attacks]] table")
    base = merged(as_table(recipe), table)
    base |= {"attacks": rows, "budget": path.stem}
    base["reference"] = references.get(recipe.concept, recipe.reference)
    whole = build(Recipe, base, f"{path}:")
    wanted = chosen(whole.attacks, attacks)
    wanted += [row for row in whole.attacks if row.row in {one.settings.get("found_by") for one in wanted}]
    kept = [row for row in whole.attacks if row.row == HEADLINE or row in wanted]
    return build(Recipe, base | {"attacks": as_table(with_baselines(kept, random))}, f"{path}:")


def chosen(rows: Sequence[AttackRow], attacks: Sequence[str], *, hint: str = "") -> list[AttackRow]:
    """The rows of the attacks that are named, by the attack's name or the row's; `hint` ends what a mistake is told."""
    known = {ALL, *(row.name for row in rows), *(row.row for row in rows)}
    for name in attacks:
        if name == BASELINES[1] and name not in known:
            raise UserError(f"--attack: {name} runs beside every attack of a budget by itself; leave it out")
        if name not in known:
            raise UserError(f"--attack: no attack here is called {name!r}{did_you_mean(name, known)}{hint}")
    return [row for row in rows if ALL in attacks or row.name in attacks or row.row in attacks]


def with_baselines(rows: Sequence[AttackRow], random: dict[str, Any]) -> list[AttackRow]:
    """The rows, each attack naming its baselines, which are added where they are not among them yet."""
    found = list(rows)
    named: dict[str, tuple[str, ...]] = {}
    for row in rows:
        if row.name not in BASELINES:
            queries = getattr(row.make(), "queries", 0)
            wanted = [
                ("prompts", {}, f"plain_{row.prompts}"),
                ("random_prompts", {**random, "queries": queries}, f"random_{row.prompts}_{queries}"),
            ]
            named[row.row] = tuple(_beside(found, row, *one) for one in wanted)
    return [replace(row, baselines=named[row.row]) if row.row in named else row for row in found]


def _beside(found: list[AttackRow], row: AttackRow, name: str, settings: dict[str, Any], called: str) -> str:
    """The row of a baseline with the same prompts and as many images, added to `found` where it is not there."""
    if not is_row_name(called):
        raise UserError(f"attack {row.row}: prompts is {row.prompts!r}, expected letters, digits, _ and -")
    like = AttackRow(
        row=called,
        name=name,
        prompts=row.prompts,
        images=row.images,
        searches=row.searches,
        baseline=True,
        settings=settings,
    )
    for other in found:
        if replace(like, row=other.row, reliable=other.reliable, baseline=other.baseline) == other:
            return other.row
    taken = {other.row for other in found}
    unique = next(one for one in (called, *(f"{called}_{i}" for i in range(2, 1000))) if one not in taken)
    found.append(replace(like, row=unique))
    return unique


def _path(team: str, budget: str) -> Path:
    if budget.endswith(".toml"):
        return Path(budget)
    budget = budget.removeprefix(f"{team}-")
    if budget not in budgets(team):
        raise UserError(
            f"--budget: the red team {team!r} has no budget {budget!r}{did_you_mean(budget, budgets(team))}"
        )
    return FOLDER / f"{team}-{budget}.toml"


def _table(value: object, name: str, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {name} is {value!r}, expected a table")
    return value
