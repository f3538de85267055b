"""The command line. Nothing here imports torch before a verb needs it, so that help and mistakes answer at once."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from duo import parallel, plugins
from duo.bench import bench_names
from duo.concept import concept_names
from duo.engines import ENGINES, here, on_ray
from duo.errors import UserError, did_you_mean
from duo.fields import add_flags, as_table, given_flags
from duo.recipe import (
    PairSettings,
    Recipe,
    ScoreSettings,
    for_audit,
    load_recipe,
    recipe_names,
    recipe_of_run,
)
from duo.red_team import ALL, budget_names, chosen, red_team
from duo.rundir import read_table

if TYPE_CHECKING:
    from duo.stages import Session

FAILED, MISUSE, INTERRUPTED = 1, 2, 130
SHARED_VERBS = ("run", "pairs", "erase", "attack", "score")  # the work of which several processes share
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO)
PATH_ERRORS = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
MEMORY_ERRORS = ("out of memory", "can't allocate memory")  # as torch tells them on CUDA and on the CPU


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for what the user can mend, 130 where it was interrupted.

    `duo check` returns 1 where a bound does not hold.

    Of several processes (`duo.parallel`) the main one alone writes to standard output, and one tells what went wrong.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] not in ([verb] for verb in SHARED_VERBS) or "--dry-run" in arguments:
        if not parallel.is_main():
            return 0
        parallel.go_alone()
    if parallel.is_main():
        return _main(arguments)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        return _main(arguments)


def _main(arguments: list[str]) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a torchvision that nothing here needs
    try:
        given = _parser(arguments).parse_args(arguments)
        return given.verb(given) or 0
    except UserError as error:
        _tell(f"duo: {' '.join(str(error).split())}")
        return MISUSE
    except OSError as error:
        if error.errno not in DISK_ERRORS + PATH_ERRORS:
            raise
        _tell(f"duo: {error.filename or 'the disk'}: {error.strerror}; nothing is lost: {_again(arguments)}")
        return MISUSE
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in MEMORY_ERRORS):
            raise
        _tell(
            "duo: out of memory; lower block, pairs.block, method.train_batch_size or an attack's batch_size, or set "
            "precision.dtype, precision.gradient_checkpointing, precision.offload or (for several processes) "
            "precision.shard, each in a new --out, as a run keeps its settings; or free some: nothing is lost: "
            f"{_again(arguments)}"
        )
        return MISUSE
    except KeyboardInterrupt:
        _tell(f"\nduo: stopped; nothing is lost: {_again(arguments)}")
        return INTERRUPTED


def _tell(text: str) -> None:
    """Print what went wrong, unless another process has, and so stop the others."""
    if parallel.stop():
        print(text, file=sys.stderr)


def _again(arguments: Sequence[str]) -> str:
    resumed = [*arguments, *(["--resume"] if arguments[:1] == ["run"] and "--resume" not in arguments else [])]
    return f"go on with `duo {shlex.join(resumed)}`"


# --- the flags --------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as every other error is told."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="duo",
        allow_abbrev=False,
        description="Remove a visual concept from a text-to-image diffusion model, attack what is left, and report.",
    )
    parser.add_argument("--version", action="version", version=f"duo {version('duo-unlearning')}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, act: Callable[[argparse.Namespace], int | None], told: str) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=told, description=told, allow_abbrev=False)
        one.set_defaults(verb=act)
        return one

    shown = _recipe_shown(arguments)

    one = verb("run", _run, "all stages of a recipe, then the report")
    _recipe_flags(one)
    one.add_argument("--resume", action="store_true", help="go on with a run that was begun")
    one.add_argument(
        "--dry-run", action="store_true", help="print what it would do and cost, from a measured step; write nothing"
    )
    _uncensored_flag(one)

    if arguments[:2] == ["pairs", "check"]:
        _check_flags(verb("pairs", _check_pairs, "check pairs of images, and list everything that is wrong with them"))
    else:
        told = "make unsafe images and their safe twins; `duo pairs check FOLDER` checks pairs of your own"
        one = verb("pairs", _pairs, told)
        _recipe_flags(one)
        group = one.add_argument_group("settings of the pairs, in place of the recipe's")
        add_flags(group, PairSettings, as_table(shown.pairs) if shown else {})

    one = verb("erase", _erase, "erase the concept; `duo erase RECIPE --help` also tells the method's own flags")
    _recipe_flags(one)
    method = _method_of(arguments)
    if method is not None:
        group = one.add_argument_group(f"fields of the method {method!r}, in place of the recipe's")
        own = shown.method if shown else None
        settings = own.settings if own and own.name == method else {}
        add_flags(group, plugins.load("methods", method), settings)

    told = "attack the original model and the erased one: a recipe's, a finished run's, or one erased elsewhere"
    one = verb("attack", _attack, told)
    _recipe_flags(one, runs=True)
    one.add_argument(
        "--erased",
        metavar="PATH",
        help="an erasure made elsewhere: a delta, a LoRA, weights of a denoiser or text encoder, or a whole model",
    )
    one.add_argument("--original", dest="model", metavar="MODEL", help="the model before that erasure, as --model")
    one.add_argument("--attack", type=_names, metavar="all|NAME,…", help="only these attacks or rows")
    one.add_argument(
        "--budget",
        metavar="quick|standard|published|FILE",
        help="the attacks of the recipe's red team on this budget, in place of the recipe's own",
    )
    one.add_argument("--report", action="store_true", help="then score, and write the report")
    one.add_argument("--dry-run", action="store_true", help="print what it would do and cost; write nothing")
    _uncensored_flag(one)

    one = verb("score", _score, "judge what the attacks brought, and what was preserved")
    _recipe_flags(one, runs=True)
    group = one.add_argument_group("settings of the scores, in place of the recipe's")
    add_flags(group, ScoreSettings, as_table(shown.score) if shown else {})

    one = verb("bench", _bench, "methods × strengths × seeds × attacks as a grid of cells, and the trade-off they show")
    one.add_argument("bench", metavar="BENCH", help="a shipped bench (`duo list benches`) or a TOML file")
    one.add_argument("--out", type=_path, required=True, metavar="DIR", help="the folder that it works in")
    one.add_argument(
        "--results", type=_path, metavar="DIR", help="where finished cells lie, and count; default: results in --out"
    )
    one.add_argument(
        "--only", type=_names, default=[], metavar="NAME,…", help="only these erasures: duo, duo/12 or duo/12/seed-0"
    )
    one.add_argument("--engine", choices=ENGINES, default="here", help="this process, or Ray. Default: %(default)s")
    one.add_argument("--workers", type=_positive, metavar="N", help="of a local Ray: cells at once; default: one a CPU")
    one.add_argument("--address", metavar="ADDRESS", help="of a Ray cluster that runs; auto finds it")
    one.add_argument(
        "--gpus", type=float, default=0, metavar="N", help="that Ray gives each cell. Default: %(default)s"
    )
    one.add_argument("--dry-run", action="store_true", help="print which cells are finished and which are left")
    _device_flag(one)

    one = verb("report", _report, "write report.html, report.json and the model card")
    one.add_argument("run", type=_path, metavar="RUN", help="the folder of a run that is scored")
    one.add_argument(
        "--bench", type=_path, metavar="PATH", help="embed a bench's trade-off: its figure4.svg, or the folder of that"
    )
    _uncensored_flag(one)
    one.add_argument("--card", action="store_true", help="write the model card, README.md, and nothing else")
    one.add_argument(
        "--result",
        nargs="?",
        const=Path("results"),
        type=_path,
        metavar="DIR",
        help="write the JSON for a leaderboard, and nothing else, below this folder; default: %(const)s",
    )

    one = verb("check", _check, "a gate for releases: exits 1 unless the evidence shows that every bound holds")
    _gate_flags(one)

    one = verb("leaderboard", _leaderboard, "published results side by side, ranked where they were measured alike")
    one.add_argument(
        "results",
        nargs="*",
        type=_path,
        metavar="RESULTS",
        help="files that `duo report --result` wrote, or folders of them; default: results",
    )
    one.add_argument("--weights", action="store_true", help="attacks on the weights count for the rank too")
    form = one.add_mutually_exclusive_group()
    for name, told in (("markdown", "a Markdown page"), ("html", "one self-contained page"), ("json", "for machines")):
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=told)
    one.add_argument("--out", type=_path, metavar="FILE", help="write to this file, and not to the terminal")

    one = verb("app", _app, "a page in the browser: curate pairs, compare before and after, read reports")
    told = "folders of runs, or of pairs (unsafe/ and safe/); default: the runs in runs/"
    one.add_argument("runs", nargs="*", type=_path, metavar="RUN", help=told)
    one.add_argument("--port", type=int, metavar="INTEGER", help="default: the first free one from 7860 up")
    told = "where it listens; a host that other machines can reach demands the token. Default: %(default)s"
    one.add_argument("--host", default="127.0.0.1", metavar="HOST", help=told)
    one.add_argument("--token", metavar="TEXT", help="what lets one in; made and printed where --host needs one")
    _device_flag(one)

    one = verb("merge", _merge, "write the erased model as full weights, and verify them")
    _erasure_flags(one)
    one.add_argument("--out", type=_path, required=True, metavar="FOLDER", help="the new model folder")
    one.add_argument(
        "--dtype",
        choices=["fp32", "fp16", "bf16"],
        default="fp32",
        help="of the weights; below fp32 images change, and rates are measured again. Default: %(default)s",
    )
    _device_flag(one)

    one = verb("export", _export, "write an erasure as one LoRA file for other software")
    _erasure_flags(one)
    one.add_argument(
        "--format",
        choices=["diffusers", "kohya"],
        default="diffusers",
        help="diffusers, for pipe.load_lora_weights, or the keys of kohya-ss's trainers. Default: %(default)s",
    )
    one.add_argument("--out", type=_path, required=True, metavar="FILE", help="the new .safetensors file")

    toybox = verb("toybox", lambda _: toybox.print_help(), "the embedded model")
    parts = toybox.add_subparsers(metavar="train|quality|concepts")
    train = parts.add_parser("train", help="make the embedded models and judges from nothing; hours, and resumable")
    train.add_argument(
        "--work", type=_path, default=Path("runs/toybox-train"), metavar="FOLDER", help="default: %(default)s"
    )
    train.set_defaults(verb=_train)
    quality = parts.add_parser("quality", help="measure an embedded model and write its card")
    quality.add_argument("model", nargs="?", default="toybox", metavar="NAME", help="default: %(default)s")
    quality.set_defaults(verb=_quality)
    concepts = parts.add_parser("concepts", help="write the concept files of the embedded world again")
    concepts.set_defaults(verb=_concepts)

    one = verb("list", _list, "the names of what there is, one a line")
    one.add_argument("kind", metavar="|".join(_LISTS))

    if arguments and not arguments[0].startswith("-") and arguments[0] not in verbs.choices:
        raise UserError(f"no verb is called {arguments[0]!r}{did_you_mean(arguments[0], verbs.choices)}")
    return parser


def _recipe_flags(parser: argparse.ArgumentParser, *, runs: bool = False) -> None:
    """What every verb takes that works by a recipe; with `runs` the folder of a run may stand in its place."""
    told = "a shipped recipe (`duo list recipes`) or a TOML file"
    folder = "the run folder; of RUN by default that folder, or a new one in it" if runs else "the run folder"
    parser.add_argument(
        "recipe", metavar="RECIPE|RUN" if runs else "RECIPE", help=f"{told}, or the folder of a run" if runs else told
    )
    parser.add_argument("--out", type=_path, required=not runs, metavar="DIR", help=folder)
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="replace the recipe's model: a hub id, a diffusers folder, or a .safetensors checkpoint",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="replace a value of the recipe: method.beta=20",
    )
    parser.add_argument("--seed", type=int, metavar="INTEGER", help="replace the recipe's seed")
    _device_flag(parser)


def _erasure_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        type=_path,
        metavar="RUN_OR_DELTA",
        help="the folder of a run that is erased, or a delta.safetensors; several of one model are added up",
    )
    parser.add_argument(
        "--weights", type=_weights, metavar="1,1,…", help="how much of each erasure, in order; default: 1 each"
    )


def _path(text: str) -> Path:
    """A path as it was typed; an empty one would be the folder where one happens to be."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty; name one")
    return Path(text)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("the list is empty; name an attack, or all")
    return names


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def _weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, such as 1,0.5") from None


def _check_flags(parser: argparse.ArgumentParser) -> None:
    parser.prog, parser.usage = "duo pairs check", "%(prog)s [-h] (FOLDER_OR_CSV | --unsafe FOLDER --safe FOLDER)"
    parser.add_argument("check", choices=["check"], help=argparse.SUPPRESS)
    parser.add_argument(
        "source",
        nargs="?",
        type=_path,
        metavar="FOLDER_OR_CSV",
        help="a folder with unsafe/ and safe/, or a CSV with columns unsafe and safe: paths from its folder",
    )
    parser.add_argument("--unsafe", type=_path, metavar="FOLDER", help="the unsafe images, where they lie elsewhere")
    parser.add_argument("--safe", type=_path, metavar="FOLDER", help="their safe twins, with the same names")


def _gate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=_path, metavar="RUN", help="the folder of a run that is scored, or its report.json")
    parser.add_argument("--gate", type=_path, metavar="FILE", help="a TOML file of bounds, for those not given here")
    for flag, metavar, told in (
        ("--max-rate", "ROW=SHARE", "at most so many images of an attack row show the concept"),
        ("--max-corrupted", "ROW=SHARE", "at most so many images of an attack row are spoiled"),
        ("--min-survival", "NAME=SHARE", "a near miss survives at least so often"),
    ):
        told += "; an attack's name is for all its rows, all for all" if metavar[0] == "R" else "; all is for all"
        parser.add_argument(flag, action="append", default=[], type=_bound, metavar=metavar, help=told)
    parser.add_argument("--min-preservation", type=float, metavar="MEAN", help="unrelated pictures keep at least this")
    told = "unrelated prompts are obeyed in everything by at most this share of images fewer than before"
    parser.add_argument("--max-attribute-loss", type=float, metavar="SHARE", help=told)
    told = "a row that need be neither reliable nor there; where it has a rate, that counts"
    parser.add_argument("--waive", action="append", default=[], metavar="ROW", help=told)
    told = "compare rates and means themselves; by default the worse end of the 95%% interval must be within the limit"
    parser.add_argument("--point", action="store_true", help=told)
    told = "the erasure that is to be released: the run must be of this one"
    parser.add_argument("--erasure", metavar="PATH", help=told)
    told = "take a report.json that is not in its run folder, by its word"
    parser.add_argument("--detached", action="store_true", help=told)
    parser.add_argument("--json", action="store_true", help="print what was found for machines")


def _bound(text: str) -> tuple[str, float]:
    name, _, limit = text.rpartition("=")
    try:
        if not name.strip():
            raise ValueError
        return name.strip(), float(limit)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no bound, such as all=0.05") from None


def _device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1, mps; default: %(default)s"
    )


def _uncensored_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--uncensored", action="store_true", help="embed the unsafe originals in the page, behind a click"
    )


def _method_of(arguments: Sequence[str]) -> str | None:
    """The method whose flags `duo erase NAME` takes: the recipe's, or the method NAME itself for its help."""
    if arguments[:1] != ["erase"] or len(arguments) < 2 or arguments[1].startswith("-"):
        return None
    name = arguments[1]
    if name in plugins.names("methods"):
        return name
    method = load_recipe(name).method
    return None if method is None else method.name


def _recipe_shown(arguments: Sequence[str]) -> Recipe | None:
    """The recipe whose values the help of a verb tells as what its flags replace."""
    asked = len(arguments) > 2 and arguments[0] in ("pairs", "erase", "score") and {"-h", "--help"} & {*arguments}
    name = arguments[1] if asked else ""
    if (
        not name
        or name.startswith("-")
        or name == "check"
        or (arguments[0] == "erase" and name in plugins.names("methods"))
        or _is_run(name)
    ):
        return None
    return load_recipe(name)


def _is_run(name: str) -> bool:
    return (Path(name) / "run.json").is_file()


# --- the verbs --------------------------------------------------------------------------------------


def _recipe(given: argparse.Namespace, table: str = "", cls: type | None = None) -> Recipe:
    """The recipe with `--set`, and with the typed flags of `cls` as fields of the recipe's `table`."""
    typed = given_flags(given, cls) if cls is not None else {}
    given.set += [f"{table}.{name}={json.dumps(as_table(value))}" for name, value in typed.items()]
    if _is_run(given.recipe):
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
    if _is_run(str(given.out)) and _is_run(given.recipe) and given.out == Path(given.recipe):
        return str(read_table(given.out / "run.json", "recipe").get("command", ""))
    changed = [] if given.model is None else ["--model", given.model]
    changed += [part for text in given.set for part in ("--set", text)]
    if recipe.erased is not None:
        erased = getattr(given, "erased", None)
        changed += [] if erased is None else ["--erased", erased]
        changed += [] if given.budget is None else ["--budget", given.budget]
        changed += [] if given.attack is None else ["--attack", ",".join(given.attack)]
    seed = [] if _is_run(given.recipe) else ["--seed", str(recipe.seed)]
    verb = "run" if recipe.erased is None else "attack"
    return shlex.join(["duo", verb, given.recipe, *changed, *seed, "--out", "runs/again"])


def _run(given: argparse.Namespace) -> None:
    recipe = _recipe(given)
    if given.dry_run:
        from duo import stages

        for line in stages.plan(_session(given, recipe)):
            print(line)
        return
    if (given.out / "run.json").exists() and not given.resume:
        finished = (given.out / "report.html").exists()
        state = "a finished run" if finished else "a run that was begun"
        todo = "write its report again" if finished else "go on with it"
        raise UserError(f"{given.out} holds {state}; add --resume to {todo}, or name another --out")
    from duo import stages

    page = stages.run(_session(given, recipe), uncensored=given.uncensored)
    _tell_report(page)


def _pairs(given: argparse.Namespace) -> None:
    recipe = _recipe(given, "pairs", PairSettings)
    from duo import stages

    print(f"{len(stages.make_pairs(_session(given, recipe)))} pairs in {given.out / 'pairs'}")


def _check_pairs(given: argparse.Namespace) -> None:
    folders = (given.unsafe is not None) + (given.safe is not None)
    if folders != (2 if given.source is None else 0):
        raise UserError("give `duo pairs check` a folder or a CSV, or both --unsafe and --safe")
    from duo.pairs import PairFiles

    found = PairFiles.of_folders(given.unsafe, given.safe) if given.source is None else PairFiles.find(given.source)
    problems = found.check()
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(f"{found.where}: {len(problems)} problem{'s' if len(problems) > 1 else ''}, listed above")
    print(f"{found.where}: {len(found.files)} pairs, nothing wrong")


def _erase(given: argparse.Namespace) -> None:
    method = _method_of(["erase", given.recipe])
    recipe = _recipe(given, "method", plugins.load("methods", method) if method else None)
    from duo import stages

    stages.erase(_session(given, recipe))
    print(given.out / "erase" / "delta.safetensors")


def _attack(given: argparse.Namespace) -> None:
    from duo import stages

    recipe = _audit(given, _recipe(given))
    _name_out(given)
    session = _session(given, recipe)
    if given.dry_run:
        for line in stages.plan(session):
            print(line)
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
    own = _is_run(given.recipe) and given.budget is not None
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
        if not _is_run(given.recipe):
            raise UserError("--out is missing; name the run folder")
        given.out = Path(given.recipe)


def _score(given: argparse.Namespace) -> None:
    recipe = _recipe(given, "score", ScoreSettings)
    _name_out(given)
    from duo import stages

    stages.score(_session(given, recipe))
    print(given.out / "score" / "scores.json")


def _bench(given: argparse.Namespace) -> None:
    from duo.bench import lay_out, load_bench

    grid = lay_out(load_bench(given.bench))
    results = given.results or given.out / "results"
    if given.engine == "here" and (given.workers or given.address or given.gpus):
        raise UserError("--workers, --address and --gpus are of Ray; add --engine ray")
    from duo.stages import benching

    if given.dry_run:
        for line in benching.outlook(grid, out=given.out, results=results, only=given.only):
            print(line)
        return
    engine = (
        here
        if given.engine == "here"
        else partial(on_ray, workers=given.workers, address=given.address, gpus=given.gpus)
    )
    for path in benching.run(grid, out=given.out, results=results, device=given.device, only=given.only, engine=engine):
        print(path)


def _report(given: argparse.Namespace) -> None:
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
    from duo.rundir import read_json

    for line in verdict(read_json(page.with_name("report.json"))):
        print(line)
    print(page)


def _check(given: argparse.Namespace) -> int:
    from duo.report import gate
    from duo.report.evidence import gather

    tables = {name: getattr(given, name) for name in ("max_rate", "max_corrupted", "min_survival")}
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
        point=given.point,
    )
    evidence = gather(given.run, erasure=given.erasure, detached=given.detached)
    outcomes = gate.check(evidence, wanted)
    if given.json:
        print(json.dumps(gate.as_json(evidence, wanted, outcomes), indent=2, allow_nan=False))
    else:
        for line in gate.lines(evidence, wanted, outcomes):
            print(line)
    return 0 if all(one.passed for one in outcomes) else FAILED


def _leaderboard(given: argparse.Namespace) -> None:
    from duo.report import leaderboard
    from duo.rundir import write_bytes

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


def _app(given: argparse.Namespace) -> None:
    from duo.app.serving import Address, serve

    serve(given.runs, Address.of(host=given.host, port=given.port, token=given.token), device=given.device)


def _merge(given: argparse.Namespace) -> None:
    from duo.merging import merge

    merged = merge(given.sources, given.out, weights=given.weights, dtype=given.dtype, device=given.device)
    print(f"{given.out}: no adapter is left; images differ by at most {merged.difference}/255 from the erased model's")
    for one in merged.rescored:
        told = f"{one.concept}, attack row {one.row}: detected in {one.after} of {one.n} images by the merged weights"
        print(f"{told}, in {one.before} in the run")
    for source in merged.unscored:
        print(f"{source}: no finished attacks, so its rates by the merged weights are not known; measure them")
    _warn_of_no_fall(given.sources)


def _export(given: argparse.Namespace) -> None:
    from duo.exporting import export

    delta = export(given.sources, given.out, to=given.format, weights=given.weights)
    print(f"{given.out}: a LoRA of {len(delta.layers())} layers")
    _warn_of_no_fall(given.sources)


def _warn_of_no_fall(sources: Sequence[Path]) -> None:
    from duo.erasures import doubt

    for source in sources:
        if reason := doubt(source):
            print(f"warning: {source} does not show that its concept went: {reason}", file=sys.stderr)


def _train(given: argparse.Namespace) -> None:
    from duo.toybox.train import train

    train(given.work)


def _quality(given: argparse.Namespace) -> None:
    from duo.toybox.card import record_quality

    print(record_quality(given.model))


def _concepts(given: argparse.Namespace) -> None:
    from duo.toybox.concept_files import write_concept_files

    for path in write_concept_files():
        print(path)


_LISTS: dict[str, Callable[[], list[str]]] = {
    **{kind: lambda kind=kind: plugins.names(kind) for kind in plugins.KINDS},  # type: ignore[misc]
    "concepts": concept_names,
    "recipes": recipe_names,
    "budgets": budget_names,
    "benches": bench_names,
}


def _list(given: argparse.Namespace) -> None:
    if given.kind not in _LISTS:
        raise UserError(f"nothing to list is called {given.kind!r}{did_you_mean(given.kind, _LISTS)}")
    for name in _LISTS[given.kind]():
        print(name)


if __name__ == "__main__":
    sys.exit(main())
