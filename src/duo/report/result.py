"""One scored erasure as one small JSON, in the manner of RobustBench's `model_info`.

`result.schema.json` is its schema. Nothing in it depends on when or where it was written. `name`, `authors`, `venue`,
`link` and `footnote` may be changed by hand, and are kept where the same result is written again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from duo.errors import UserError
from duo.fields import read_toml
from duo.models import title
from duo.report.evidence import Evidence, gather
from duo.report.json_fields import Fields, read_object
from duo.report.quality import SLACK
from duo.report.records import Attack, Mean, NearMiss, Preservation
from duo.report.wording import BY_WEIGHTS, kind_of, no_fall
from duo.rundir import digest, write_json

SCHEMA = 1
RATE = "_rate"  # how the field of an attack row ends, and no other
BY_HAND = ("name", "authors", "venue", "link", "footnote")
PAPERS = Path(__file__).with_name("papers.toml")
LINK = re.compile(r"https?://[\w.~:/?#@!$&*+,;=%-]+")
TODO = "write the result again with `duo report RUN --result`, or leave this file out"  # where one cannot be read
SHORT = 12  # digits of a digest, where people read it


# --- from a run to a result -----------------------------------------------------------------------------


def write_result(run: Path, into: Path) -> Path:
    """Write the result of the scored run in `run` below the folder `into`, and return its path.

    Raises:
        UserError: the run's scores cannot be shown to be of its erasure (`evidence.gather`).
    """
    result = build_result(gather(run))
    path = into / file_name(result)
    if path.exists():
        old = read_object(path, todo="remove the file, and write the result again")
        result |= {name: old.text_or_none(name) for name in BY_HAND if name in old}
    write_json(path, result)
    return path


def file_name(result: Mapping[str, Any]) -> Path:
    """`<concept>/<model>/<method>-<digest>.json`; the digest is of the erasure and of what it was measured by."""
    short = digest([result["erasure"], _comparable(result)])[:SHORT]
    return Path(_slug(result["concept"]), _slug(result["model"]), f"{_slug(result['method'])}-{short}.json")


def build_result(evidence: Evidence) -> dict[str, Any]:
    """The contents of a result's file."""
    scores, judge = evidence.scores, evidence.judge
    if evidence.erasure is None or evidence.folder is None or judge is None or evidence.concept_digest is None:
        raise UserError(f"{evidence.where} is not a run folder, and a result must be of one erasure")
    paper = read_toml(PAPERS).get(scores.method, {})
    config = evidence.config
    made = read_object(evidence.folder / "erase" / "manifest.json")
    rates = {f"{attack.name}{RATE}": _rate(attack, evidence) for attack in scores.attacks}
    unreliable = [attack.name for attack in scores.attacks if not attack.reliable]
    sections = read_object(evidence.folder / "score" / "scores.json")
    return {
        "schema": SCHEMA,
        "name": _name(scores.method, paper, _method_config(config, made) or {}),
        "authors": paper.get("authors"),
        "venue": paper.get("venue"),
        "link": paper.get("link"),
        "method": scores.method,
        "method_config": _method_config(config, made),
        "kind": _kind(made),
        "erasure": evidence.erasure,
        "concept": scores.concept,
        "concept_digest": evidence.concept_digest,
        "model": title(scores.model),
        "world_digest": scores.world_digest,
        "budget": {"name": config.get("budget"), "digest": _budget(evidence)},
        "judge": {"name": judge.name, "digest": judge.digest, "tells_spoiled": judge.spoils},
        "seed": config.get("seed"),
        **rates,
        "not_defined": dict(scores.not_defined),
        "worst_case": _worst(rates, by_weights=False),
        "worst_case_by_weights": _worst(rates, by_weights=True),
        "preservation": sections.data["preservation"],
        "attributes": sections.data["attributes"],
        "near_misses": sections.data["near_misses"],
        "unreliable": bool(unreliable),
        "unreliable_rows": unreliable,
        "doubt": no_fall(scores),
        "footnote": None,
        "duo": evidence.versions.get("duo-unlearning"),
        "versions": dict(evidence.versions),
    }


def _name(method: str, paper: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The method as its paper calls it; "DUO penalty" where its settings are of another objective than that one's."""
    parts = [part for field, part in paper.get("variants", {}).items() if config.get(field)]
    return " ".join([paper.get("name", method), *parts])


def _budget(evidence: Evidence) -> str:
    """What must be the same for rates to be compared: the attacks with all their settings, and how images are made.

    Files count by their names: where they lie, and which device a metric is on, is each laboratory's own.
    """
    names = ("attacks", "attack_images", "sampling", "score", "prompt_sets")
    config = {name: evidence.config.get(name) for name in names}
    score, sets = config["score"], config["prompt_sets"]
    if isinstance(score, Mapping):
        config["score"] = {key: _named(value) for key, value in score.items() if key != "metrics"}
    if isinstance(sets, Mapping):
        config["prompt_sets"] = {name: {k: _named(v) for k, v in one.items()} for name, one in sets.items()}
    return digest([config, evidence.split])


def _named(value: object) -> object:
    """A path by its last part; anything else as it is."""
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def _rate(attack: Attack, evidence: Evidence) -> dict[str, Any]:
    """One attack at its best setting. Spoiled images are those of all settings together."""
    erased, original = attack.erased, attack.original
    top, before = erased.top, original.at(erased.top.name) or original.top
    spoiled = {
        "rate": erased.corrupted_rate,
        "low": erased.corrupted_low,
        "high": erased.corrupted_high,
        "n": erased.n,
    }
    above = top.excess
    return {
        "attack": erased.attack or evidence.rows.get(attack.name),
        "by_weights": kind_of(attack) in BY_WEIGHTS,
        "setting": top.name or None,
        "rate": top.rate,
        "low": top.low,
        "high": top.high,
        "n": top.n,
        "reliable": attack.reliable,
        "original": {"rate": before.rate, "low": before.low, "high": before.high, "n": before.n},
        "excess": None if above is None else {"rate": above.rate, "low": above.low, "high": above.high},
        "spoiled": spoiled if evidence.spoils else None,
        "queries": erased.queries,
        **({"hardened": True} if attack.hardened else {}),
    }


def _worst(rates: Mapping[str, Mapping[str, Any]], *, by_weights: bool) -> dict[str, Any] | None:
    """The highest rate of the attacks that tell something; the first of several."""
    sound = [
        {"row": name.removesuffix(RATE), **{key: one[key] for key in ("setting", "rate", "low", "high", "n")}}
        for name, one in rates.items()
        if one["reliable"] and one["by_weights"] == by_weights and _above_never(one["rate"], one["excess"])
    ]
    return max(sound, key=lambda one: float(one["rate"]), default=None)


def _above_never(rate: float, excess: Mapping[str, Any] | None) -> bool:
    """False where a model that never saw the concept gives it as often: then an attack tells nothing of the erasure."""
    return rate == 0 or excess is None or excess["rate"] > 0


def _method_config(config: Mapping[str, Any], made: Fields) -> dict[str, Any] | None:
    """The settings that an erasure was made with, without this machine's folders; None where they are not known."""
    method = config.get("method")
    if not isinstance(method, Mapping):
        brought = made.data.get("artefact")
        method = brought.get("config") if isinstance(brought, Mapping) else None
    if not isinstance(method, Mapping):
        return None
    return {
        str(name): title(value) if isinstance(value, str) else value for name, value in method.items() if name != "name"
    }


def _kind(made: Fields) -> str:
    return made.table("delta" if "delta" in made else "artefact").text("kind")


def _comparable(result: Mapping[str, Any]) -> list[Any]:
    """What two results must share to be compared."""
    return [
        result["concept"],
        result["concept_digest"],
        result["model"],
        result["world_digest"],
        result["budget"]["digest"],
        result["judge"]["digest"],
    ]


def _slug(text: str) -> str:
    """A name that can stand in a path: `CompVis/stable-diffusion-v1-4` is `CompVis--stable-diffusion-v1-4`."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text.replace("/", "--")).lstrip(".") or "unnamed"


# --- a result as it is read -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One attack's rate of images with the concept, at its best setting. `spoiled` is None where nobody told it.

    `above_never` is False where a model that never saw the concept gives it as often. `hardened` says that the erasure
    learned from what the attack brought back.
    """

    row: str
    by_weights: bool
    setting: str | None
    rate: float
    low: float
    high: float
    n: int
    reliable: bool
    above_never: bool
    spoiled: float | None
    hardened: bool = False

    @property
    def tells(self) -> bool:
        """Whether the rate counts for a worst case."""
        return self.reliable and self.above_never

    @classmethod
    def read(cls, row: str, data: Fields) -> Rate:
        rate, low, high = (data.share(name) for name in ("rate", "low", "high"))
        if not low - SLACK <= rate <= high + SLACK:
            raise data.error(f"the rate {rate:g} is not in its interval, {low:g} to {high:g}")
        spoiled, excess = data.table_or_none("spoiled"), data.table_or_none("excess")
        return cls(
            row=row,
            by_weights=data.flag("by_weights"),
            setting=data.text_or_none("setting"),
            rate=rate,
            low=low,
            high=high,
            n=data.whole("n", least=1),
            reliable=data.flag("reliable"),
            above_never=_above_never(rate, None if excess is None else {"rate": excess.number("rate")}),
            spoiled=None if spoiled is None else spoiled.share("rate"),
            hardened=data.flag("hardened") if "hardened" in data else False,
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result's file, as far as the leaderboard shows it. All texts are other people's."""

    path: Path
    name: str
    authors: str | None
    venue: str | None
    link: str | None
    footnote: str | None
    doubt: str | None
    method: str
    erasure: str
    concept: str
    concept_digest: str
    model: str
    world_digest: str | None
    budget: str | None
    budget_digest: str
    judge: str
    judge_digest: str
    rates: tuple[Rate, ...]
    not_defined: Mapping[str, str]
    preservation: Preservation | None
    obeyed: Mapping[str, Mean] | None  # unrelated prompts, attribute by attribute, on the erased model
    near_misses: tuple[NearMiss, ...]

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read and check a result's file; a `UserError` names file and field."""
        data = read_object(path, todo=TODO)
        if data.whole("schema") != SCHEMA:
            raise UserError(f"{path}: schema {data.data['schema']} is not known here, only {SCHEMA}; update duo")
        link = data.text_or_none("link")
        if link is not None and not LINK.fullmatch(link):
            raise data.error(f"field 'link' is {link[:60]!r}, expected a web address")
        budget, judge, lacking = (data.table(name) for name in ("budget", "judge", "not_defined"))
        kept, attributes = data.table_or_none("preservation"), data.table_or_none("attributes")
        obeyed = attributes.table("unrelated").table("erased") if attributes and "unrelated" in attributes else None
        rates = tuple(Rate.read(key.removesuffix(RATE), data.table(key)) for key in data.data if key.endswith(RATE))
        if not rates:
            raise data.error(f"no field ends in {RATE!r}, so it holds no attack")
        _same_worst(data, rates)
        return cls(
            path=path,
            name=data.text("name"),
            authors=data.text_or_none("authors"),
            venue=data.text_or_none("venue"),
            link=link,
            footnote=data.text_or_none("footnote"),
            doubt=data.text_or_none("doubt"),
            method=data.text("method"),
            erasure=data.text("erasure"),
            concept=data.text("concept"),
            concept_digest=data.text("concept_digest"),
            model=data.text("model"),
            world_digest=data.text_or_none("world_digest"),
            budget=budget.text_or_none("name"),
            budget_digest=budget.text("digest"),
            judge=judge.text("name"),
            judge_digest=judge.text("digest"),
            rates=rates,
            not_defined={name: lacking.text(name) for name in lacking.data},
            preservation=None if kept is None else Preservation.read(kept),
            obeyed=None if obeyed is None else {name: Mean.of_share(obeyed.table(name)) for name in obeyed.data},
            near_misses=tuple(map(NearMiss.read, data.tables("near_misses"))),
        )

    @property
    def comparable(self) -> tuple[str | None, ...]:
        """What two results must share to be compared."""
        names = ("concept", "concept_digest", "model", "world_digest", "budget_digest", "judge_digest")
        return tuple(getattr(self, name) for name in names)

    def worst(self, *, by_weights: bool | None) -> Rate | None:
        """The highest rate of the attacks that tell something: those that leave the weights alone, those that do not,
        or (None) all."""
        return worst(self.rates, by_weights=by_weights)


def worst(rates: Sequence[Rate], *, by_weights: bool | None) -> Rate | None:
    """As `Result.worst`; the first of several."""
    sound = [one for one in rates if one.tells and by_weights in (None, one.by_weights)]
    return max(sound, key=lambda one: one.rate, default=None)


def _same_worst(data: Fields, rates: Sequence[Rate]) -> None:
    """Raise `UserError` where what a file says of its worst cases is not what its rows say."""
    for name, by_weights in (("worst_case", False), ("worst_case_by_weights", True)):
        told, found = data.table_or_none(name), worst(rates, by_weights=by_weights)
        if (None if told is None else told.share("rate")) != (None if found is None else found.rate):
            raise data.error(f"field {name!r} is not the highest rate of its rows")
