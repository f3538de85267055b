"""The command line's flags, many of which are fields of dataclasses. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import NoReturn

from duo import plugins, verbs
from duo.engines import ENGINES
from duo.errors import UserError, did_you_mean
from duo.fields import add_flags, as_table
from duo.recipe import PairSettings, Recipe, ScoreSettings, load_recipe
from duo.strength import StrengthSearch

DEFAULT = "toybox-fire"  # of `duo run`: the demo, whose model is in the package


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as every other error is told."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def parser_for(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="duo",
        allow_abbrev=False,
        description="Remove a visual concept from a text-to-image diffusion model, attack what is left, and report.",
    )
    parser.add_argument("--version", action="version", version=f"duo {version('duo-unlearning')}")
    found = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, act: Callable[[argparse.Namespace], int | None], told: str) -> argparse.ArgumentParser:
        one = found.add_parser(name, help=told, description=told, allow_abbrev=False)
        one.set_defaults(verb=act)
        return one

    shown = _recipe_shown(arguments)

    one = verb("run", verbs.run, "all stages of a recipe, then the report")
    _recipe_flags(one, default=DEFAULT)
    one.add_argument("--resume", action="store_true", help="go on with a run that was begun")
    one.add_argument(
        "--dry-run", action="store_true", help="print what it would do and cost, from a measured step; write nothing"
    )
    _uncensored_flag(one)

    if arguments[:2] == ["pairs", "check"]:
        _check_flags(verb("pairs", verbs.check_pairs, "check pairs of images, and list all that is wrong with them"))
    else:
        told = "make unsafe images and their safe twins; `duo pairs check FOLDER` checks pairs of your own"
        one = verb("pairs", verbs.pairs, told)
        _recipe_flags(one)
        group = one.add_argument_group("settings of the pairs, in place of the recipe's")
        add_flags(group, PairSettings, as_table(shown.pairs) if shown else {})

    one = verb("erase", verbs.erase, "erase the concept; `duo erase RECIPE --help` also tells the method's own flags")
    _recipe_flags(one)
    one.add_argument("--dry-run", action="store_true", help="print what it would do and cost; write nothing")
    _search_flags(one.add_argument_group("a search for the strength, on validation prompts (docs/strength.md)"))
    method = verbs.method_of(arguments)
    if method is not None:
        leaf = plugins.load("methods", method)
        told = f"what each does: python -m pydoc {leaf.__module__}"
        group = one.add_argument_group(f"fields of the method {method!r}, in place of the recipe's", told)
        own = shown.method if shown else None
        settings = own.settings if own and own.name == method else {}
        add_flags(group, leaf, settings)

    told = "attack the original model and the erased one: a recipe's, a finished run's, or one erased elsewhere"
    one = verb("attack", verbs.attack, told)
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

    one = verb("score", verbs.score, "judge what the attacks brought, and what was preserved")
    _recipe_flags(one, runs=True)
    group = one.add_argument_group("settings of the scores, in place of the recipe's")
    add_flags(group, ScoreSettings, as_table(shown.score) if shown else {})

    one = verb("bench", verbs.bench, "methods × strengths × seeds × attacks as a grid, and the trade-off that it shows")
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
    one.add_argument("--dry-run", action="store_true", help="print what is finished and what is left; write nothing")
    _device_flag(one)

    one = verb("report", verbs.report, "write report.html, report.json and the model card")
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

    one = verb("check", verbs.check, "a gate for releases: exits 1 unless the evidence shows that every bound holds")
    _gate_flags(one)

    one = verb("leaderboard", verbs.leaderboard, "results side by side, ranked where they were measured alike")
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

    one = verb("purge", verbs.purge, "remove a run's unsafe images, and leave the account of them")
    one.add_argument("run", type=_path, metavar="RUN", help="the folder of a finished run")
    one.add_argument("--dry-run", action="store_true", help="list what would be removed, and remove nothing")
    told = "also of a run that is not finished, which then never can be"
    one.add_argument("--unfinished", action="store_true", help=told)

    one = verb("app", verbs.app, "a page in the browser: curate pairs, compare before and after, read reports")
    told = "folders of runs, or of pairs (unsafe/ and safe/); default: the runs in runs/"
    one.add_argument("runs", nargs="*", type=_path, metavar="RUN", help=told)
    one.add_argument("--port", type=int, metavar="INTEGER", help="default: the first free one from 7860 up")
    told = "where it listens; a host that other machines can reach demands the token. Default: %(default)s"
    one.add_argument("--host", default="127.0.0.1", metavar="HOST", help=told)
    told = "what lets one in; auto makes one and prints it, as is done where --host needs one"
    one.add_argument("--token", metavar="TEXT", help=told)
    _device_flag(one)

    one = verb("merge", verbs.merge, "write the erased model as full weights, and verify them")
    _erasure_flags(one)
    one.add_argument("--out", type=_path, required=True, metavar="FOLDER", help="the new model folder")
    one.add_argument(
        "--dtype",
        choices=["fp32", "fp16", "bf16"],
        default="fp32",
        help="of the weights; below fp32 images change, and rates are measured again. Default: %(default)s",
    )
    _device_flag(one)

    one = verb("export", verbs.export, "write an erasure as one LoRA file for other software")
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
    train.set_defaults(verb=verbs.train)
    quality = parts.add_parser("quality", help="measure an embedded model and write its card")
    quality.add_argument("model", nargs="?", default="toybox", metavar="NAME", help="default: %(default)s")
    quality.set_defaults(verb=verbs.quality)
    concepts = parts.add_parser("concepts", help="write the concept files of the embedded world again")
    concepts.set_defaults(verb=verbs.concepts)

    one = verb("list", verbs.show_names, "the names of what there is, one a line")
    one.add_argument("kind", metavar="|".join(verbs.LISTS))

    if arguments and not arguments[0].startswith("-") and arguments[0] not in found.choices:
        raise UserError(f"no verb is called {arguments[0]!r}{did_you_mean(arguments[0], found.choices)}")
    return parser


def _recipe_flags(parser: argparse.ArgumentParser, *, runs: bool = False, default: str | None = None) -> None:
    """What every verb takes that works by a recipe; with `runs` the folder of a run may stand in its place, and with a
    `default` it may be left out."""
    told = "a shipped recipe (`duo list recipes`) or a TOML file"
    folder = "the run folder; of RUN by default that folder, or a new one in it" if runs else "the run folder"
    if runs:
        told += ", or the folder of a run"
    if default is None:
        parser.add_argument("recipe", metavar="RECIPE|RUN" if runs else "RECIPE", help=told)
    else:
        told += "; default: %(default)s, the demo"
        parser.add_argument("recipe", nargs="?", default=default, metavar="RECIPE", help=told)
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


def _search_flags(group: argparse._ArgumentGroup) -> None:
    """The fields of `StrengthSearch`; as with `add_flags`, those not given leave no trace."""
    plain = StrengthSearch(target_rate=0, min_preservation=0)
    for name, type_, metavar, told in (
        ("target_rate", float, "SHARE", "at most this share of the images of each row looked at shows the concept"),
        ("min_preservation", float, "MEAN", "unrelated pictures keep at least this"),
        ("strength", str, "FIELD", "the method's field to vary, larger being stronger; default: the method's own"),
        ("weakest", float, "NUMBER", "no smaller value is tried"),
        ("strongest", float, "NUMBER", "no larger value is tried"),
        ("max_runs", int, "INTEGER", f"erasures to be made at most; default: {plain.max_runs}"),
        ("search_rows", _rows, "ROW,…", "attack rows to look at; default: those that ask by prompts alone"),
        ("search_images", int, "INTEGER", "images of each row, and of unrelated prompts, a run; default: the recipe's"),
    ):
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, dest=name, type=type_, default=argparse.SUPPRESS, metavar=metavar, help=told)
    told = "compare the worse ends of 95%% intervals, as `duo check` does"
    group.add_argument("--strict", action="store_true", default=argparse.SUPPRESS, help=told)


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
    return _listed(text, "name an attack, or all")


def _rows(text: str) -> list[str]:
    return _listed(text, "name an attack row")


def _listed(text: str, todo: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"the list is empty; {todo}")
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
    parser.add_argument("--min-preservation", type=_share, metavar="MEAN", help="unrelated pictures keep at least this")
    told = "unrelated prompts are obeyed in everything by at most this share of images fewer than before"
    parser.add_argument("--max-attribute-loss", type=_share, metavar="SHARE", help=told)
    told = "a row that need be neither reliable nor there; where it has a rate, that counts"
    parser.add_argument("--waive", action="append", default=[], metavar="ROW", help=told)
    told = "a warning that fails, by its kind (broken, masked, …), or all; may be given again"
    parser.add_argument("--refuse", action="append", default=[], metavar="WARNING", help=told)
    told = "compare rates and means themselves; by default the worse end of the 95%% interval must be within the limit"
    parser.add_argument("--point", action="store_true", help=told)
    told = "the erasure that is to be released: the run must be of this one"
    parser.add_argument("--erasure", metavar="PATH", help=told)
    told = "take a report.json that is not in its run folder, by its word"
    parser.add_argument("--detached", action="store_true", help=told)
    parser.add_argument("--json", action="store_true", help="print what was found for machines")


def _bound(text: str) -> tuple[str, float]:
    name, _, limit = text.rpartition("=")
    if not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no bound, such as all=0.05")
    return name.strip(), _share(limit)


def _share(text: str) -> float:
    """A finite number; whether it is from 0 to 1 is the gate's to say. Of one in percent the hint is the share."""
    told = text.strip()
    meant = _number(told.removesuffix("%"))
    if meant is not None and not told.endswith("%"):
        return meant
    example = f"{meant / 100:g}" if meant is not None and 0 <= meant <= 100 else "0.05 for 5%"
    raise argparse.ArgumentTypeError(f"{text!r} is no share, such as {example}")


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if isfinite(number) else None


def _device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1, mps; default: %(default)s"
    )


def _uncensored_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--uncensored", action="store_true", help="embed the unsafe originals in the page, behind a click"
    )


def _recipe_shown(arguments: Sequence[str]) -> Recipe | None:
    """The recipe whose values the help of a verb tells as what its flags replace."""
    asked = len(arguments) > 2 and arguments[0] in ("pairs", "erase", "score") and {"-h", "--help"} & {*arguments}
    name = arguments[1] if asked else ""
    if (
        not name
        or name.startswith("-")
        or name == "check"
        or (arguments[0] == "erase" and name in plugins.names("methods"))
        or verbs.is_run(name)
    ):
        return None
    return load_recipe(name)
