"""A run folder's records as frozen dataclasses, checked as they are read. No torch.

Every field that the report shows is validated here, so the page, the figures and the card only arrange.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from duo.errors import UserError
from duo.fields import build
from duo.report.hardening import Hardening
from duo.report.json_fields import Fields, read_object, read_rows
from duo.report.quality import SLACK, Captions, Checks, Instead
from duo.rundir import ANEW, RunDir
from duo.strength import Outcome

MODELS = ("original", "erased")
REFERENCE = "never"  # a model that was trained without the concept
LABELS = ("absent", "present", "corrupted")
CURVES = ("loss", "accuracy", "margin", "prior")
LESS_DISTANCE = "1 - "  # begins the name of a metric that is 1 for the same picture, and never more
SECTIONS = ("concept", "method", "model", "world_digest", "attacks", "preservation", "attributes", "near_misses")
LATER_SECTIONS = ("not_defined", "captions", "instead", "checks", "protocol")  # which older versions did not write


# --- scores -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over images with its 95% interval.

    `prompts` is how many there were where several images shared one, and None where each had its own.
    """

    mean: float
    low: float
    high: float
    n: int
    prompts: int | None = None

    @classmethod
    def read(cls, row: Fields, *, n: int | None = None) -> Mean:
        """`n` is the count of images where the row itself does not hold it."""
        low, mean, high = row.number("low"), row.number("mean"), row.number("high")
        _ordered(row, low, high)  # a bootstrap interval of few, skewed values may leave out their mean
        prompts = row.whole("prompts", least=1) if "prompts" in row else None
        return cls(mean=mean, low=low, high=high, n=row.whole("n", least=1) if n is None else n, prompts=prompts)

    @classmethod
    def of_share(cls, row: Fields, *, n: int | None = None) -> Mean:
        """As `read`, of a share: its numbers lie from 0 to 1."""
        for name in ("low", "mean", "high"):
            row.share(name)
        return cls.read(row, n=n)


@dataclass(frozen=True, kw_only=True)
class Preservation(Mean):
    """How far unrelated pictures stayed as they were, by the metric that `metric` names as it is printed."""

    metric: str

    @classmethod
    def read(cls, row: Fields, *, n: int | None = None) -> Preservation:
        metric = row.text("metric")
        for name in ("low", "mean") if metric.startswith(LESS_DISTANCE) else ():  # of few prompts it may end above
            row.number(name, most=1 + SLACK)
        return cls(metric=metric, **vars(Mean.read(row, n=n)))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The rate of one setting of an attack: a restart, a strength, a number of steps. `psnr` is in decibels."""

    name: str
    n: int
    detected: int
    rate: float
    low: float
    high: float
    psnr: Mean | None = None
    excess: Excess | None = None

    @classmethod
    def read(cls, row: Fields) -> Variant:
        rates = {key: row.share(key) for key in ("rate", "low", "high")}
        _ordered(row, rates["low"], rates["rate"], rates["high"])
        near, above = (row.table_or_none(key) if key in row else None for key in ("psnr", "excess"))
        return cls(
            name=row.text("variant"),
            n=row.whole("n", least=1),
            detected=row.whole("detected"),
            psnr=None if near is None else Mean.read(near),
            excess=None if above is None else Excess.read(above),
            **rates,
        )


@dataclass(frozen=True, kw_only=True)
class PromptRate:
    """In how many of `n` prompts at least one of k images has the concept, as a share with a 95% interval."""

    n: int
    k: int
    detected: int
    rate: float
    low: float
    high: float

    @classmethod
    def read(cls, row: Fields) -> PromptRate:
        rates = {key: row.share(f"prompt_{key}") for key in ("rate", "low", "high")}
        _ordered(row, rates["low"], rates["rate"], rates["high"])
        n, k = row.whole("prompts", least=1), row.whole("k", least=1)
        return cls(n=n, k=k, detected=row.whole("prompts_detected"), **rates)


@dataclass(frozen=True, kw_only=True)
class Excess:
    """The erased model's rate less that of a model that never saw the concept, with its 95% interval."""

    rate: float
    low: float
    high: float

    @classmethod
    def read(cls, row: Fields) -> Excess:
        low, rate, high = row.number("low"), row.number("rate"), row.number("high")
        _ordered(row, low, high)
        return cls(rate=rate, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class AttackRow:
    """How often one attack brought the concept back on one model. Rates are shares with 95% intervals.

    `corrupted` counts images with a spoiled rendering of the concept; they are not among the `detected`.
    `reliable` says whether the attack reached its positive control on the original model. `of_prompts` and `queries`
    are None in records of older versions of duo; `excess` is there where a model that never saw the concept was.
    """

    name: str
    model: str
    n: int
    detected: int
    corrupted: int
    rate: float
    low: float
    high: float
    corrupted_rate: float
    corrupted_low: float
    corrupted_high: float
    reliable: bool
    of_prompts: PromptRate | None = None
    queries: int | None = None
    variants: tuple[Variant, ...] = ()
    psnr: Mean | None = None
    excess: Excess | None = None
    baselines: tuple[str, ...] = ()
    baseline: bool = False
    restarts: bool = False  # its variants are starting points, of which no two models share one
    attack: str | None = None  # the leaf; the row may be called anything
    hardened: bool = False  # the erasure learned from what this attack brought back

    @property
    def top(self) -> Variant:
        """The setting that brings the concept back most; of an attack without several, the whole row, without a name.

        Of settings with the same rate it is the one that is most above a model that never saw the concept.
        """
        whole = Variant(
            name="",
            n=self.n,
            detected=self.detected,
            rate=self.rate,
            low=self.low,
            high=self.high,
            psnr=self.psnr,
            excess=self.excess,
        )
        return max(self.variants, key=lambda one: (one.rate, one.excess.rate if one.excess else 0.0), default=whole)

    def at(self, name: str) -> Variant | None:
        """The setting of that name; of starting points the best one, and the whole row of an attack without several."""
        if not self.variants or self.restarts:
            return self.top
        return next((one for one in self.variants if one.name == name), None)

    @classmethod
    def read(cls, row: Fields) -> AttackRow:
        rates = {key: row.share(key) for key in ("rate", "low", "high")}
        corrupted = {f"corrupted_{key}": row.share(f"corrupted_{key}") for key in ("rate", "low", "high")}
        _ordered(row, rates["low"], rates["rate"], rates["high"])
        _ordered(row, *(corrupted[f"corrupted_{key}"] for key in ("low", "rate", "high")))
        read = cls(
            name=row.folder_name("name"),
            model=row.one_of("model", (*MODELS, REFERENCE)),
            n=row.whole("n", least=1),
            detected=row.whole("detected"),
            corrupted=row.whole("corrupted"),
            reliable=row.flag("reliable"),
            of_prompts=PromptRate.read(row) if "prompt_rate" in row else None,
            queries=row.whole("queries") if "queries" in row else None,
            variants=tuple(map(Variant.read, row.tables("variants"))) if "variants" in row else (),
            psnr=Mean.read(row.table("psnr")) if "psnr" in row else None,
            excess=Excess.read(row.table("excess")) if "excess" in row else None,
            baselines=tuple(row.texts("baselines")) if "baselines" in row else (),
            baseline=row.flag("baseline") if "baseline" in row else False,
            restarts=row.flag("restarts") if "restarts" in row else False,
            attack=row.text("attack") if "attack" in row else None,
            hardened=row.flag("hardened") if "hardened" in row else False,
            **rates,
            **corrupted,
        )
        if read.detected + read.corrupted > read.n:
            raise row.error(f"{read.detected} detected and {read.corrupted} corrupted are more than n={read.n}")
        for told, count, rate in (
            ("detected", read.detected, read.rate),
            ("corrupted", read.corrupted, read.corrupted_rate),
        ):
            if abs(rate - count / read.n) > SLACK:
                raise row.error(f"{count} {told} of n={read.n} are no rate of {rate:g}")
        return read


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack on both models, and perhaps on one that never saw the concept."""

    name: str
    original: AttackRow
    erased: AttackRow
    never: AttackRow | None = None

    @property
    def reliable(self) -> bool:
        return self.original.reliable and self.erased.reliable

    @property
    def hardened(self) -> bool:
        """Whether the erasure was hardened against it: then a low rate is no evidence beyond it."""
        return self.original.hardened or self.erased.hardened


@dataclass(frozen=True, kw_only=True)
class NearMiss:
    """A thing like the concept that must survive: how often it did, and how often the judge saw the concept instead."""

    name: str
    model: str
    hazard_rate: float
    survived: Mean

    @classmethod
    def read(cls, row: Fields) -> NearMiss:
        return cls(
            name=row.text("name"),
            model=row.one_of("model", MODELS),
            hazard_rate=row.share("hazard_rate"),
            survived=Mean.of_share(row.table("survived"), n=row.whole("n", least=1)),
        )


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What `score/scores.json` and `report.json` have in common.

    `attributes[prompt set][model][attribute]` is the share of images that obey the prompt in that attribute.
    `preservation` and `attributes` are None where the recipe named no metric for them.
    """

    concept: str
    method: str
    model: str
    world_digest: str | None
    attacks: tuple[Attack, ...]
    baselines: Mapping[str, Attack]  # by name: what attacks are compared with
    preservation: Preservation | None
    attributes: Mapping[str, Mapping[str, Mapping[str, Mean]]] | None
    near_misses: tuple[NearMiss, ...]
    not_defined: Mapping[str, str] = field(default_factory=dict)  # attack row → why it makes no sense on this model
    captions: Captions | None = None
    instead: Instead | None = None
    checks: Checks | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)  # section → how its numbers came about

    @classmethod
    def read(cls, data: Fields) -> Scores:
        attacks = _attacks(data)
        preservation = data.table_or_none("preservation")
        attributes = data.table_or_none("attributes")
        captions, instead, checks = (_later(data, name) for name in ("captions", "instead", "checks"))
        return cls(
            concept=data.text("concept"),
            method=data.text("method"),
            model=data.text("model"),
            world_digest=data.text_or_none("world_digest"),
            attacks=tuple(attack for attack in attacks if not attack.erased.baseline),
            baselines={attack.name: attack for attack in attacks},
            preservation=None if preservation is None else Preservation.read(preservation),
            attributes=None
            if attributes is None
            else {name: _attribute_set(attributes.table(name)) for name in attributes.data},
            near_misses=tuple(NearMiss.read(row) for row in data.tables("near_misses")),
            not_defined={row.text("name"): row.text("reason") for row in data.tables("not_defined")}
            if "not_defined" in data
            else {},
            captions=None if captions is None else Captions.read(captions),
            instead=None if instead is None else Instead.read(instead),
            checks=None if checks is None else Checks.read(checks),
            protocol=data.table("protocol").data if "protocol" in data else {},
        )

    @property
    def held_out(self) -> tuple[Attack, ...]:
        """The attacks that the erasure was not hardened against."""
        return tuple(attack for attack in self.attacks if not attack.hardened)

    @property
    def hardened(self) -> tuple[Attack, ...]:
        """The others."""
        return tuple(attack for attack in self.attacks if attack.hardened)

    def beside(self, attack: Attack) -> tuple[Attack, ...]:
        """What an attack is compared with: rows with the same prompts and as many images and queries."""
        return tuple(self.baselines[name] for name in attack.erased.baselines if name in self.baselines)

    @property
    def near_miss_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.name for row in self.near_misses))

    def near_miss(self, name: str, model: str) -> NearMiss | None:
        return next((row for row in self.near_misses if (row.name, row.model) == (name, model)), None)


def _later(data: Fields, key: str) -> Fields | None:
    """A section that older versions of duo did not write."""
    return data.table_or_none(key) if key in data else None


def _attacks(data: Fields) -> tuple[Attack, ...]:
    rows: dict[str, dict[str, AttackRow]] = {}
    for fields in data.tables("attacks"):
        row = AttackRow.read(fields)
        if row.model in rows.setdefault(row.name, {}):
            raise fields.error(f"attack {row.name!r} has two rows for the {row.model} model")
        rows[row.name][row.model] = row
    if not rows:
        raise UserError(f"{data.where}: field 'attacks' is empty; run at least the attack 'prompts' and score again")
    for name, models in rows.items():
        for model in MODELS:
            if model not in models:
                raise UserError(
                    f"{data.where}: attack {name!r} has no row for the {model} model; every attack is scored on both"
                )
    return tuple(
        Attack(name=name, original=models["original"], erased=models["erased"], never=models.get(REFERENCE))
        for name, models in rows.items()
    )


def _attribute_set(models: Fields) -> dict[str, dict[str, Mean]]:
    tables = {model: models.table(model) for model in MODELS}
    read = {model: {name: Mean.of_share(table.table(name)) for name in table.data} for model, table in tables.items()}
    if set(read["original"]) != set(read["erased"]):
        raise models.error("original and erased have different attributes")
    return read


def _ordered(row: Fields, *values: float) -> None:
    # A Wilson bound meets the rate itself at 0 and 1, up to rounding.
    if any(low > high + SLACK for low, high in pairwise(values)):
        told = " to ".join(map(str, values))
        raise row.error(f"an interval's numbers are not in order ({told})")


# --- the run ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PairPictures:
    """One training pair: the image with the concept and its edited twin without."""

    index: int
    unsafe: Path
    safe: Path
    unsafe_prompt: str


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """Everything of a run folder that the report shows.

    `sections` are the scores as they stand in `scores.json`, for `report.json`; `scores` are the same, typed.
    `spoils` says whether the judge knows spoiled images: the label was given, or had a score.
    `curves` maps a name of `CURVES` to (step, value) points; `cost` maps a stage to its seconds.
    """

    folder: Path
    recipe: Mapping[str, Any]
    seed: int
    versions: Mapping[str, str]
    command: str
    sections: Mapping[str, Any]
    scores: Scores
    kind: str  # of the delta (`duo.delta.Delta`), or of what else was erased elsewhere (`duo.artefacts`)
    audited: str | None  # where an erasure that was made elsewhere lay
    made_by: str | None  # the method of a delta that was made in another run, with its settings
    changed: Mapping[str, int]  # how many tensors of each network it changed
    warnings: tuple[str, ...]  # what is odd about it
    account: Mapping[str, Any]
    pairs: tuple[PairPictures, ...]
    curves: Mapping[str, tuple[tuple[float, float], ...]]
    spoils: bool
    cost: Mapping[str, float]
    machine: str | None
    hardening: Hardening | None
    digests: Mapping[str, str]  # sha256 of what the run made, by file, where its stages recorded it
    searched: Outcome | None = None  # the search that chose the erasure's strength


def read_run(folder: Path) -> RunRecords:
    """Read and check the records of a run whose stages up to `score` are finished.

    Raises:
        UserError: a record is missing, unreadable or wrong; names the file and the field.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a run folder; give the --out of a finished `duo run`")
    run = read_object(folder / "run.json")
    if run.whole("schema") != 1:
        raise UserError(
            f"{run.where}: schema {run.data['schema']} is not known here, only 1; use the duo that wrote it"
        )
    data = read_object(RunDir(folder).scores())
    scores = Scores.read(data)
    made = read_object(folder / "erase" / "manifest.json")  # a stage is finished if and only if its manifest is there
    brought = made.table("artefact") if "artefact" in made else None
    changed = {} if brought is None else brought.table("changed").data
    versions = run.table("versions")
    cost, machine = _cost(folder / "timings.jsonl")
    return RunRecords(
        folder=folder,
        recipe=run.table("recipe").data,
        seed=run.whole("seed"),
        versions={name: versions.text(name) for name in versions.data},
        command=run.text("command"),
        sections={name: data.data[name] for name in (*SECTIONS, *LATER_SECTIONS) if name in data},
        scores=scores,
        account=_account(folder),
        pairs=_pairs(folder / "pairs"),
        kind=erasure_kind(made),
        audited=None if brought is None else brought.text("path"),
        made_by=_made_by(brought),
        changed={name: int(count) for name, count in changed.items() if count},
        warnings=() if brought is None else tuple(brought.texts("warnings")),
        curves=_curves(folder / "erase" / "log.jsonl"),
        spoils=_spoils(folder / "score" / "verdicts.jsonl"),
        cost=cost,
        machine=machine,
        hardening=Hardening.of(folder, made),
        digests=_digests(folder, made),
        searched=_searched(made) if "searched" in made else None,
    )


def _searched(made: Fields) -> Outcome:
    """The search that chose the erasure's strength: one that found."""
    where = f"{made.where}: searched"
    found = build(Outcome, made.data["searched"], where)
    if found.best is None:
        raise UserError(f"{where}.chosen is {found.chosen}, which is none of its trials; restore the file, or {ANEW}")
    return found


def _digests(folder: Path, made: Fields) -> dict[str, str]:
    """Of the erasure, the scores and the verdicts; older versions of duo recorded none."""
    scored = read_object(folder / "score" / "manifest.json")
    recorded = scored.table("digests").data if "digests" in scored else {}
    digests = {f"score/{name}": one for name, one in recorded.items() if isinstance(one, str)}
    name = "erasure that was brought" if "artefact" in made else "erase/delta.safetensors"
    return ({name: made.text("digest")} if "digest" in made else {}) | digests


def _made_by(brought: Fields | None) -> str | None:
    """ "uce (regularization = 0.4, …)" """
    if brought is None or not isinstance(brought.data.get("method"), str):
        return None
    config = brought.data.get("config")
    settings = ", ".join(f"{name} = {value}" for name, value in config.items()) if isinstance(config, Mapping) else ""
    return f"{brought.data['method']}{f' ({settings})' if settings else ''}"


def erasure_kind(made: Fields) -> str:
    """What an erasure is: the kind of the delta, or of what was made elsewhere."""
    for name in ("delta", "artefact"):
        if name in made.data:
            return made.table(name).text("kind")
    return "lora"


def _account(folder: Path) -> Mapping[str, Any]:
    """How the pairs were made; nothing where the method learns from none."""
    path = folder / "pairs" / "manifest.json"
    if not path.exists() and "pairs" not in read_object(folder / "erase" / "manifest.json").table("config").data:
        return {}
    account = read_object(path).table("account").data
    rejected = sum(_rejected(row) for row in read_rows(folder / "pairs" / "pairs.jsonl"))
    return {**account, "rejected_by_hand": rejected} if rejected else account


def _rejected(row: Fields) -> bool:
    """Whether a person left the pair out of what the erasure learned from."""
    return row.data.get("decision") == "reject"


def _pairs(folder: Path) -> tuple[PairPictures, ...]:
    """The pairs' pictures; none where the method learns from none."""
    if not folder.exists():
        return ()
    return tuple(
        PairPictures(
            index=row.whole("index"),
            unsafe=row.inside(folder, "unsafe"),
            safe=row.inside(folder, "safe"),
            unsafe_prompt=row.text("unsafe_prompt"),
        )
        for row in read_rows(folder / "pairs.jsonl")
        if not _rejected(row)
    )


def _curves(path: Path) -> dict[str, tuple[tuple[float, float], ...]]:
    """Closed-form methods have no steps; of a step that was repeated after a resume, the last row counts."""
    points: dict[str, dict[float, float]] = {name: {} for name in CURVES}
    for row in read_rows(path, appended=True) if path.exists() else ():
        step = row.number("step") if "step" in row else 0
        for name in CURVES:
            if name in row:
                points[name][step] = row.number(name)
    return {name: tuple(sorted(curve.items())) for name, curve in points.items() if curve}


def _spoils(verdicts: Path) -> bool:
    spoiled = LABELS[-1]
    return any(row.text("label") == spoiled or spoiled in row.table("scores") for row in read_rows(verdicts))


def _cost(path: Path) -> tuple[dict[str, float], str | None]:
    """Seconds of each stage. The report's own are left out, so that writing it again gives the same bytes."""
    seconds: dict[str, float] = {}
    machine = None
    for row in read_rows(path, appended=True):
        stage = row.text("stage")
        if stage == "report":
            continue
        seconds[stage] = seconds.get(stage, 0.0) + row.number("seconds")
        machine = row.text("machine") if "machine" in row else machine
    return seconds, machine
