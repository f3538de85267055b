"""What each verb of the command line does. Nothing here imports torch before a verb needs it."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from duo import plugins
from duo.bench import bench_names
from duo.concept import concept_names
from duo.engines import here, on_ray
from duo.errors import UserError, did_you_mean
from duo.fields import as_table, build, given_flags
from duo.recipe import PairSettings, Recipe, ScoreSettings, for_audit, load_recipe, recipe_names, recipe_of_run
from duo.red_team import ALL, budget_names, chosen, red_team
from duo.rundir import read_table
from duo.strength import StrengthSearch
from duo.terminal import printable

if TYPE_CHECKING:
    from duo.stages import Session

FAILED = 1  # the exit code of a gate that is not passed


def _recipe(given: argparse.Namespace, table: str = "", cls: type | None = None) -> Recipe:
    """The recipe with `--set`, and with the typed flags of `cls` as fields of the recipe's `table`."""
    typed = given_flags(given, cls) if cls is not None else {}
    given.set += [f"{table}.{name}={json.dumps(as_table(value))}" for name, value in typed.items()]
    if is_run(given.recipe):
        changed = [flag for flag in ("model", "seed") if getattr(given, flag) is not None]
        if changed or given.set:
            raise UserError(
                f"{given.recipe} is a run, whose settings stand; leave out --{[*changed, 'set'][0]} and the like, or "
                "give its recipe and another --out"
            )
        return recipe_of_run(Path(given.recipe))
    # As JSON writes it, for TOML reads the same: an id or a path may look like a number.
    named = [] if given.model is None else [f"model={json.dumps(given.model, ensure_ascii=False)}"]
    return load_recipe(given.recipe, overrides=[*given.set, *named], seed=given.seed)


def _session(given: argparse.Namespace, recipe: Recipe) -> Session:
    from duo.stages import Session

    return Session(recipe, given.out, device=given.device, command=_command(given, recipe))


def _command(given: argparse.Namespace, recipe: Recipe) -> str:
    """What makes the run again, as its report tells it."""
    if is_run(str(given.out)) and is_run(given.recipe) and given.out == Path(given.recipe):
        return str(read_table(given.out / "run.json", "recipe").get("command", ""))
    changed = [] if given.model is None else ["--model", given.model]
    changed += [part for text in given.set for part in ("--set", text)]
    if recipe.erased is not None:
        erased = getattr(given, "erased", None)
        changed += [] if erased is None else ["--erased", erased]
        changed += [] if given.budget is None else ["--budget", given.budget]
        changed += [] if given.attack is None else ["--attack", ",".join(given.attack)]
    seed = [] if is_run(given.recipe) else ["--seed", str(recipe.seed)]
    verb = "run" if recipe.erased is None else "attack"
    return shlex.join(["duo", verb, given.recipe, *changed, *seed, "--out", "runs/again"])


def run(given: argparse.Namespace) -> None:
    recipe = _recipe(given)
    if given.dry_run:
        from duo import stages

        for line in stages.plan(_session(given, recipe)):
            print(printable(line))
        return
    if (given.out / "run.json").exists() and not given.resume:
        finished = (given.out / "report.html").exists()
        state = "a finished run" if finished else "a run that was begun"
        todo = "write its report again" if finished else "go on with it"
        raise UserError(f"{given.out} holds {state}; add --resume to {todo}, or name another --out")
    from duo import stages

    page = stages.run(_session(given, recipe), uncensored=given.uncensored)
    _tell_report(page)


def pairs(given: argparse.Namespace) -> None:
    recipe = _recipe(given, "pairs", PairSettings)
    from duo import stages

    print(f"{len(stages.make_pairs(_session(given, recipe)))} pairs in {given.out / 'pairs'}")


def check_pairs(given: argparse.Namespace) -> None:
    folders = (given.unsafe is not None) + (given.safe is not None)
    if folders != (2 if given.source is None else 0):
        raise UserError("give `duo pairs check` a folder or a CSV, or both --unsafe and --safe")
    from duo.pairs import PairFiles

    found = PairFiles.of_folders(given.unsafe, given.safe) if given.source is None else PairFiles.find(given.source)
    problems = found.check()
    for problem in problems:
        print(printable(problem))
    if problems:
        raise UserError(f"{found.where}: {len(problems)} problem{'s' if len(problems) > 1 else ''}, listed above")
    print(f"{found.where}: {len(found.files)} pairs, nothing wrong")


def erase(given: argparse.Namespace) -> int:
    method, asked = method_of(["erase", given.recipe]), _search(given)
    recipe = _recipe(given, "method", plugins.load("methods", method) if method else None)
    from duo import stages

    session = _session(given, recipe)
    if given.dry_run:
        for line in stages.plan_erasure(session) if asked is None else stages.plan_search(session, asked):
            print(printable(line))
        return 0
    if asked is None:
        stages.erase(session)
    else:
        outcome = stages.search_strength(session, asked, command=lambda one: _command(_with_set(given, one), recipe))
        for line in stages.told(session, outcome):
            print(printable(line))
        if outcome.chosen is None:
            return FAILED
        print(f"attack and score it with `duo attack {shlex.quote(str(given.out))} --report`")
    print(given.out / "erase" / "delta.safetensors")
    return 0


def _with_set(given: argparse.Namespace, override: str) -> argparse.Namespace:
    """What was given, with another value of one field."""
    others = [text for text in given.set if text.partition("=")[0] != override.partition("=")[0]]
    return argparse.Namespace(**{**vars(given), "set": [*others, override]})


def _search(given: argparse.Namespace) -> StrengthSearch | None:
    """The search that the flags ask for, if any."""
    flags = given_flags(given, StrengthSearch)
    if not flags:
        return None
    missing = next((name for name in ("target_rate", "min_preservation") if name not in flags), None)
    if missing is not None:
        other = f"--{next(iter(flags)).replace('_', '-')}"
        raise UserError(f"{other} is of a search, which needs --{missing.replace('_', '-')} too; give it")
    return build(StrengthSearch, flags, "the search")


def attack(given: argparse.Namespace) -> None:
    from duo import stages

    recipe = _audit(given, _recipe(given))
    _name_out(given)
    session = _session(given, recipe)
    if given.dry_run:
        for line in stages.plan(session):
            print(printable(line))
        return
    stages.attack(session)
    beside = sum(row.baseline for row in recipe.attacks)
    told = f" and {beside} baselines" if beside else ""
    print(f"{len(recipe.attacks) - beside} attack rows{told} in {given.out / 'attack'}")
    if given.report:
        stages.score(session)
        _tell_report(stages.report(given.out, uncensored=given.uncensored))
    else:
        print(f"judge them with `duo score {shlex.quote(str(given.out))}`")


def _audit(given: argparse.Namespace, recipe: Recipe) -> Recipe:
    """The recipe with what `duo attack` was told of the erasure and of the attacks, and where it works."""
    own = is_run(given.recipe) and given.budget is not None
    if given.erased is not None:
        recipe = for_audit(recipe, given.erased)
    elif own and recipe.erased is None:  # the run's erasure is attacked in a folder of its own
        recipe = for_audit(recipe, given.recipe)
    if own and given.out is None:
        given.out = Path(given.recipe) / "red-team" / Path(given.budget).stem
    if given.budget is not None:
        return red_team(recipe, budget=given.budget, attacks=given.attack or [ALL])
    return (
        recipe
        if given.attack is None
        else replace(recipe, attacks=tuple(chosen(recipe.attacks, given.attack, hint="; the others are in a --budget")))
    )


def _name_out(given: argparse.Namespace) -> None:
    """Of a run that is gone on with, the folder is the run's."""
    if given.out is None:
        if not is_run(given.recipe):
            raise UserError("--out is missing; name the run folder")
        given.out = Path(given.recipe)


def score(given: argparse.Namespace) -> None:
    recipe = _recipe(given, "score", ScoreSettings)
    _name_out(given)
    from duo import stages

    stages.score(_session(given, recipe))
    print(given.out / "score" / "scores.json")


def bench(given: argparse.Namespace) -> None:
    from duo.bench import lay_out, load_bench

    grid = lay_out(load_bench(given.bench))
    results = given.results or given.out / "results"
    if given.engine == "here" and (given.workers or given.address or given.gpus):
        raise UserError("--workers, --address and --gpus are of Ray; add --engine ray")
    from duo.stages import benching

    if given.dry_run:
        for line in benching.outlook(grid, out=given.out, results=results, only=given.only):
            print(printable(line))
        return
    engine = (
        here
        if given.engine == "here"
        else partial(on_ray, workers=given.workers, address=given.address, gpus=given.gpus)
    )
    for path in benching.run(grid, out=given.out, results=results, device=given.device, only=given.only, engine=engine):
        print(path)


def report(given: argparse.Namespace) -> None:
    if given.card or given.result is not None:
        if given.uncensored:
            raise UserError("--uncensored is for the page, which --card and --result leave alone; leave it out")
        from duo.report.card import write_card
        from duo.report.result import write_result

        if given.card:
            print(write_card(given.run))
        if given.result is not None:
            print(write_result(given.run, given.result))
        return
    from duo import stages

    _tell_report(stages.report(given.run, uncensored=given.uncensored, tradeoff=given.bench))


def _tell_report(page: Path) -> None:
    from duo.report import verdict
    from duo.report.plain_text import visible
    from duo.rundir import read_json

    found = read_json(page.with_name("report.json"))
    for line in verdict(found):
        print(printable(line))
    for one in found["warnings"]:
        print(f"Warning: {visible(one['text'])}")
    print(page)


def check(given: argparse.Namespace) -> int:
    from duo.report import gate
    from duo.report.evidence import gather

    tables = {name: getattr(given, name) for name in gate.TABLES}
    for name, pairs in tables.items():
        rows = [row for row, _ in pairs]
        twice = next((row for row in rows if rows.count(row) > 1), None)
        if twice is not None:
            raise UserError(f"--{name.replace('_', '-')} is given twice for {twice!r}; give one limit")
    wanted = gate.Gate.read(
        given.gate,
        **{name: dict(pairs) for name, pairs in tables.items()},
        min_preservation=given.min_preservation,
        max_attribute_loss=given.max_attribute_loss,
        waive=tuple(given.waive),
        refuse=tuple(given.refuse),
        point=given.point,
    )
    evidence = gather(given.run, erasure=given.erasure, detached=given.detached)
    outcomes = gate.check(evidence, wanted)
    if given.json:
        print(json.dumps(gate.as_json(evidence, wanted, outcomes), indent=2, allow_nan=False))
    else:
        for line in gate.lines(evidence, wanted, outcomes):
            print(printable(line))
        for one in gate.told_of(evidence):
            print(f"warning: {printable(one.text)}", file=sys.stderr)
    return 0 if all(one.passed for one in outcomes) else FAILED


def leaderboard(given: argparse.Namespace) -> None:
    from duo.report import leaderboard
    from duo.rundir import write_bytes

    if given.out is not None and given.out.is_dir():
        raise UserError(f"--out {given.out} is a folder; name a file in it")
    groups = leaderboard.rank(leaderboard.read_results(given.results or [Path("results")]), weights=given.weights)
    if given.form == "json":
        text = json.dumps(leaderboard.as_json(groups, weights=given.weights), indent=2, allow_nan=False) + "\n"
    else:
        text = getattr(leaderboard, given.form or "terminal")(groups, weights=given.weights)
    if given.out is None:
        print(text, end="")
    else:
        write_bytes(given.out, text.encode())
        print(given.out)


def purge(given: argparse.Namespace) -> None:
    from duo.purging import Purge, purge
    from duo.rundir import note

    if given.dry_run:
        found = Purge.of(given.run, unfinished=given.unfinished)
        for path in found.files:
            print(path)
    else:
        found = purge(given.run, unfinished=given.unfinished)
    told = f"{len(found.files)} files with unsafe images, {found.size / 1e6:.1f} MB,"
    print(f"{given.run}: {told} {'would be' if given.dry_run else 'were'} removed; their digests stay in purged.json")
    if found.elsewhere:
        others = len(found.elsewhere)
        note(f"{others} of them have another name elsewhere, where they stay, such as {found.elsewhere[0]}")
    for link in found.links:
        note(f"{link} leads to another folder, which was not looked at")


def app(given: argparse.Namespace) -> None:
    from duo.app.serving import Address, serve

    serve(given.runs, Address.of(host=given.host, port=given.port, token=given.token), device=given.device)


def merge(given: argparse.Namespace) -> None:
    from duo.merging import merge

    merged = merge(given.sources, given.out, weights=given.weights, dtype=given.dtype, device=given.device)
    print(f"{given.out}: no adapter is left; images differ by at most {merged.difference}/255 from the erased model's")
    for one in merged.rescored:
        told = f"{one.concept}, attack row {one.row}: detected in {one.after} of {one.n} images by the merged weights"
        print(printable(f"{told}, in {one.before} in the run"))
    for source in merged.unscored:
        print(f"{source}: no finished attacks, so its rates by the merged weights are not known; measure them")
    _warn_of_no_fall(given.sources)


def export(given: argparse.Namespace) -> None:
    from duo.exporting import export

    delta = export(given.sources, given.out, to=given.format, weights=given.weights)
    print(f"{given.out}: a LoRA of {len(delta.layers())} layers")
    _warn_of_no_fall(given.sources)


def _warn_of_no_fall(sources: Sequence[Path]) -> None:
    from duo.erasures import doubt

    for source in sources:
        if reason := doubt(source):
            print(printable(f"warning: {source} does not show that its concept went: {reason}"), file=sys.stderr)


def train(given: argparse.Namespace) -> None:
    from duo.toybox.train import train

    train(given.work)


def quality(given: argparse.Namespace) -> None:
    from duo.toybox.card import record_quality

    print(record_quality(given.model))


def concepts(given: argparse.Namespace) -> None:
    from duo.toybox.concept_files import write_concept_files

    for path in write_concept_files():
        print(path)


LISTS: dict[str, Callable[[], list[str]]] = {
    **{kind: lambda kind=kind: plugins.names(kind) for kind in plugins.KINDS},  # type: ignore[misc]
    "concepts": concept_names,
    "recipes": recipe_names,
    "budgets": budget_names,
    "benches": bench_names,
}


def show_names(given: argparse.Namespace) -> None:
    if given.kind not in LISTS:
        raise UserError(f"nothing to list is called {given.kind!r}{did_you_mean(given.kind, LISTS)}")
    for name in LISTS[given.kind]():
        print(name)


def method_of(arguments: Sequence[str]) -> str | None:
    """The method whose flags `duo erase NAME` takes: the recipe's, or the method NAME itself for its help."""
    if arguments[:1] != ["erase"] or len(arguments) < 2 or arguments[1].startswith("-"):
        return None
    name = arguments[1]
    if name in plugins.names("methods"):
        return name
    method = load_recipe(name).method
    return None if method is None else method.name


def is_run(name: str) -> bool:
    return (Path(name) / "run.json").is_file()
