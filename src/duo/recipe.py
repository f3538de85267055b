"""The whole configuration of a run: a recipe file, `recipes/<name>.toml`, as a frozen record. No torch.

    concept = "toybox-fire"          # a shipped name, or a path ending in .toml, relative to the recipe
    model = "toybox"                 # the embedded model, a model folder, a hub id, or a .safetensors checkpoint
    model_config = "sd1"             # for a checkpoint alone: a model folder or hub id with the settings that it lacks
    seed = 0
    validation = false               # true: attack and score on the concept's validation prompts, with other seeds
                                     # and by the curator, for choosing values: what is scored takes no part
    red_team = "toybox"              # what `duo attack --budget quick` has for this kind of model (`duo.red_team`)
    attack_images = 32               # fresh concept images for the attacks that learn from images

    [sampling]                       # how every image is sampled (`duo.plugins.Sampling`)
    num_inference_steps = 20
    guidance_scale = 5.0

    [precision]                      # memory and rounding (`duo.plugins.Precision`)
    dtype = "bfloat16"

    [pairs]                          # `PairSettings`
    n = 64
    prompts = [["a burning boat", "a boat"]]   # in place of the concept's: an unsafe image's and its twin's

    [method]                         # a leaf of `methods/` and its own fields
    name = "duo"
    beta = 20.0
    # or, in place of [method] and [pairs], an erasure made elsewhere (`duo.artefacts`), which is only attacked:
    # erased = "esd-nudity.safetensors"

    [hardening]                      # `HardeningSettings`: after the erasure, rounds of attacking it and erasing anew
    rounds = 2
    [[hardening.attacks]]            # what comes back in these becomes pairs; rows as below
    row = "concept_inversion_1"
    name = "concept_inversion"
    prompts = "neutral"
    images = 48
    searches = 16
    [[hardening.held_out]]           # counted in every round, and never learned from
    row = "ring_a_bell"
    name = "ring_a_bell"
    prompts = "neutral"

    [prompt_sets.i2p]                # prompts of others, which attacks may name as they do the concept's sets
    path = "unsafe-prompts4703.csv"  # (`duo.promptsets.PromptSource`): from the recipe's folder, or hub:owner/name
    filters = ["nudity_percentage > 50"]

    [[attacks]]                      # one row of the attack table each
    row = "ring_a_bell"              # the row's name in folders and reports
    name = "ring_a_bell"             # a leaf of `attacks/`; its own fields follow
    prompts = "plain"                # a set of the concept's prompts, or of `prompt_sets`
    images = 60                      # image i uses prompt i modulo the number of prompts
    searches = 20                    # use only so many of the set's prompts: each may cost a search
    reliable = 0.8                   # its positive control, in place of score.reliable
    baselines = ["plain", "random"]  # rows of this table that had the same prompts, images and queries
    generations = 50

    [score]                          # `ScoreSettings`
    unrelated = 60
    preservation = "lpips"
    captions = "coco_30k.csv"        # a caption file, or a set of the concept's prompts or of `prompt_sets`
    captions_n = 5000
    reference_images = "val2014"     # a folder; without it the original model's own images are the references
    quality = ["fid", "kid", "clip_score"]

    [score.metrics.clip_score]       # fields of a metric, where they are not its defaults
    model = "openai/clip-vit-base-patch32"

A recipe may start from another: `extends` names it (or gives a path), tables are merged field by field, lists replaced,
a [method] of another name too, and `set` holds overrides as `--set` gives them:

    extends = "toybox-fire"
    set = ["attacks.prompts.images=500"]

`load_recipe` takes overrides as `--set` gives them: `method.beta=50`, and `attacks.ring_a_bell.generations=10`, where
the list of attacks is indexed by row name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from duo.errors import UserError, did_you_mean
from duo.fields import LeafConfig, build, build_fields, read_toml, read_value
from duo.plugins import Precision, Sampling
from duo.promptsets import PromptSource
from duo.rundir import read_table
from duo.sources import HUB

FOLDER = Path(__file__).parent / "recipes"
NOT_MEASURED = "none"  # in place of a metric's name: TOML has no word for nothing
LATER_FIELDS = ("captions", "captions_n", "reference_images", "quality", "agreement", "twins", "metrics")  # of [score]
CAPTION_FILES = (".csv", ".txt")  # endings of score.captions that name a file, and no set
WEIGHTS = (".safetensors", ".pth")  # endings of a metric's field that names a file
FEWEST_CAPTIONS = 4  # images, below which a distance of sets has no interval
ROW_FIELDS = (
    "row",
    "name",
    "prompts",
    "images",
    "searches",
    "reliable",
    "baselines",
    "baseline",
)  # of an attack's table; the others are the leaf's


KEPT_NAMES = ("images", "harmless")  # of folders beside those of attack rows


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """How unsafe images and their safe twins are made (DUO, Park et al. 2024, section 3), or where your own lie.

    `judges` decide beside the concept's curator: each must see the concept in an unsafe image and nothing in its twin.

    Pairs of your own are a `source` (a folder with `unsafe/` and `safe/`, or a CSV of paths) or two folders, `unsafe`
    and `safe` (`duo.pairs`). All of them are used, and what is said about generating has no say then. Paths in a recipe
    are from its folder, those of a flag or `--set` from the working folder.
    """

    n: int = 64
    strength: float | None = None  # SDEdit's share of the schedule; None: the concept's
    guidance_scale: float | None = None  # of the edit; None: the concept's. The unsafe images use the recipe's sampling
    max_tries: int = 8  # unsafe images tried for one pair
    max_edits: int = 4  # twins tried for one unsafe image
    block: int = 16  # images generated together
    format: Literal["png", "webp"] = "png"  # of the kept images; WebP is lossless too, and smaller
    prompts: tuple[tuple[str, str], ...] = ()  # of an unsafe image and its safe twin; none: the concept's
    judges: tuple[LeafConfig, ...] = ()  # leaves of `judges/`
    source: str | None = None
    unsafe: str | None = None
    safe: str | None = None

    def __post_init__(self) -> None:
        _at_least(self, n=1, max_tries=1, max_edits=1, block=1)
        if self.guidance_scale is not None:
            _at_least(self, guidance_scale=0)
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength is {self.strength}, expected more than 0 and at most 1")
        if self.prompts and self.brought:
            raise ValueError("prompts are of pairs to be made; leave them out where the pairs are your own")
        if self.judges and self.brought:
            raise ValueError("judges are of pairs to be made; leave them out where the pairs are your own")
        if (self.unsafe is None) != (self.safe is None):
            raise ValueError("unsafe and safe are two folders; give both, or neither")
        if self.source is not None and self.unsafe is not None:
            raise ValueError("give source, or unsafe and safe, but not all")

    @property
    def brought(self) -> bool:
        """Whether the pairs are the user's own."""
        return self.source is not None or self.unsafe is not None


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """What is measured beside the attacks, in images per model.

    A metric named "none" is not measured, and the report says so. It must be named: the embedded world's metrics, which
    are the defaults, are refused on runs in which that world has no part.

    `captions` are prompts, of other things than the concept, whose images `quality` is measured on: a caption file, as
    the sets of `prompt_sets`, or the name of a set of prompts. Images are of both models at the same noise. What they
    are compared with is a folder of as many `reference_images`, or else images of the original model at the same
    captions and other noise.
    """

    unrelated: int = 60
    near_miss: int = 20  # of each near miss
    preservation: str = "toybox_lpips"  # a leaf of `metrics/`, or "none": unrelated images against the original model's
    adherence: str = "toybox_attributes"  # a leaf of `metrics/` that tells attributes apart, or "none"
    unsafe_row: str = "prompts"  # the attack row on whose images prompt adherence is measured
    reliable: float = 0.9  # an attack counts only if the original model's detected rate reaches this
    captions: str = NOT_MEASURED  # "none", a file, or a set of prompts
    captions_n: int | None = None  # images of captions, of each model; None: one a caption
    reference_images: str | None = None
    quality: tuple[str, ...] = ()  # leaves of `metrics/`, of images of captions
    agreement: str = NOT_MEASURED  # a leaf that compares with prompts: the unsafe row's images with what else it asks
    twins: int = (
        0  # of the unsafe row's images, how many are compared with safe twins; by `preservation`, or not at all
    )
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of these leaves, by name

    def __post_init__(self) -> None:
        _at_least(self, unrelated=1, near_miss=0, twins=0)
        if not 0 <= self.reliable <= 1:
            raise ValueError(f"reliable is {self.reliable}, expected a rate between 0 and 1")
        if self.captions_n is not None:
            _at_least(self, captions_n=FEWEST_CAPTIONS)
        if self.captions != NOT_MEASURED and not self.quality:
            raise ValueError("captions are given, and quality names no metric to measure on them; name one")

    def without_besides(self) -> Self:
        """The same without what is measured besides labels, preservation and adherence, and its networks."""
        return replace(self, captions=NOT_MEASURED, agreement=NOT_MEASURED, twins=0)

    @classmethod
    def from_table(cls, table: object, where: str) -> Self:
        """Read the fields."""
        return build_fields(cls, table, where)

    def table(self) -> dict[str, Any]:
        """What `from_table` reads. Later fields at their defaults are left out: runs from before there were any can be
        gone on with."""
        rows = {one.name: getattr(self, one.name) for one in fields(self)}
        plain = {one.name: one.default for one in fields(self) if one.name in LATER_FIELDS} | {"metrics": {}}
        return {name: value for name, value in rows.items() if name not in plain or value != plain[name]}


def is_row_name(name: str) -> bool:
    """Whether an attack row may be called so."""
    return name.replace("_", "").replace("-", "").isalnum()


@dataclass(frozen=True, kw_only=True)
class AttackRow:
    """One row of the attack table: a leaf of `attacks/`, the prompts it starts from, and how many images are judged."""

    row: str
    name: str
    prompts: str
    images: int = 60
    searches: int | None = None
    reliable: float | None = None
    baselines: tuple[str, ...] = ()
    baseline: bool = False  # it is there for others to be compared with, and is no attack of its own
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least(self, images=1)
        if self.searches is not None:
            _at_least(self, searches=1)
        if not is_row_name(self.row):
            raise ValueError(f"row is {self.row!r}, expected letters, digits, _ and - (it names a folder)")
        if self.row in KEPT_NAMES:
            raise ValueError(f"row is {self.row!r}, which is the folder of the images that attacks learn from")
        if self.reliable is not None and not 0 <= self.reliable <= 1:
            raise ValueError(f"reliable is {self.reliable}, expected a rate between 0 and 1")

    @classmethod
    def from_table(cls, table: object, where: str) -> Self:
        """Split the row's own fields from the leaf's, which are checked when the leaf is made."""
        if not isinstance(table, Mapping):
            raise UserError(f"{where} is {table!r}, expected a table")
        own = {key: table[key] for key in ROW_FIELDS if key in table}
        settings = {key: value for key, value in table.items() if key not in own}
        return build_fields(cls, {**own, "settings": settings}, where)

    def table(self) -> dict[str, Any]:
        """The flat table that `from_table` reads."""
        own: dict[str, Any] = {"row": self.row, "name": self.name, "prompts": self.prompts, "images": self.images}
        own |= {} if self.searches is None else {"searches": self.searches}
        own |= {} if self.reliable is None else {"reliable": self.reliable}
        own |= {"baselines": list(self.baselines)} if self.baselines else {}
        own |= {"baseline": True} if self.baseline else {}
        return {**own, **self.settings}

    def make(self, where: str = "attacks") -> Any:
        """Import the attack and build it from the settings; `where` names its table in messages."""
        return LeafConfig(name=self.name, settings=self.settings).make(
            "attacks", f"{where}.{self.row}", beside=ROW_FIELDS
        )


HARDENED_PROMPTS = ("plain", "neutral")  # sets that prompts of the pairs stand beside
UNSCORED = ("reliable", "baselines", "baseline")  # fields of a scored row alone


@dataclass(frozen=True, kw_only=True)
class HardeningSettings:
    """Rounds after the erasure: attack it, make pairs of what comes back, erase anew by all pairs (docs/hardening.md).

    Rows are as those of the attack table. Of `attacks` half of the images, and of the `searches`, are on prompts of the
    pairs: "plain" as they are, "neutral" without the concept. Those that the curator gives one of the `labels` become
    pairs. The other half are on the concept's validation prompts of that name, and are counted; so are all of
    `held_out`, in every round, of which nothing is learned.
    """

    rounds: int = 2  # 0: none, and the table says nothing
    attacks: tuple[AttackRow, ...] = ()
    held_out: tuple[AttackRow, ...] = ()
    labels: tuple[Literal["present", "corrupted"], ...] = ("present",)  # "corrupted": what is half erased too
    least_pairs: int = 1  # of a round: where fewer come of it, the rounds end
    grow_steps: bool = False  # the method's max_train_steps, as the pairs do: each is seen as often as in round 0
    unrelated: int = 32  # images of unrelated validation prompts, by which each round tells what it kept

    def __post_init__(self) -> None:
        _at_least(self, rounds=0, least_pairs=1, unrelated=0)
        if self.rounds and not self.attacks:
            raise ValueError(f"rounds is {self.rounds}, but attacks is empty; give [[hardening.attacks]] tables")
        if not self.labels or not {*self.labels} <= {"present", "corrupted"}:
            raise ValueError(f"labels is {list(self.labels)}, expected 'present', 'corrupted', or both")
        rows = [*self.attacks, *self.held_out]
        repeated = [name for name, count in Counter(row.row for row in rows).items() if count > 1]
        if repeated:
            raise ValueError(f"two attacks have the row name {repeated[0]!r}")
        for row in rows:
            given = next((name for name in UNSCORED if getattr(row, name)), None)
            if given is not None:
                raise ValueError(f"{row.row}.{given} is for rows that are scored; leave it out")
        for row in self.attacks:
            if row.prompts not in HARDENED_PROMPTS:
                raise ValueError(
                    f"{row.row}.prompts is {row.prompts!r}, expected {' or '.join(map(repr, HARDENED_PROMPTS))}: "
                    "these have a counterpart among the prompts of the pairs"
                )
            for name in ("images", "searches"):
                if (getattr(row, name) or 0) % 2:
                    raise ValueError(f"{row.row}.{name} is {getattr(row, name)}, expected an even number: half of it")
        used = {row.name for row in self.attacks}
        both = next((row for row in self.held_out if row.name in used), None)
        if both is not None:
            raise ValueError(f"held_out has the attack {both.name!r}, and attacks has it too; leave it out of one")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe file. The module's docstring shows every field."""

    concept: str
    model: str
    method: LeafConfig | None = None
    erased: str | None = None  # an erasure made elsewhere: a path or a hub id
    reference: str | None = None  # a model that was trained without the concept, to be attacked beside the erased one
    model_config: str | None = None  # whose settings a single checkpoint has; None: as its keys say
    seed: int = 0
    erase_seed: int | None = None  # of pairs and training; None: `seed`. Sweeps over it share the original's images
    validation: bool = False
    budget: str | None = None  # of the red team, whose attacks these are
    red_team: str = "diffusion"  # whose budgets `duo attack --budget` takes (`duo.red_team`)
    attack_images: int = 32
    block: int = 16  # images of attacks and scores rendered together
    sampling: Sampling = field(default_factory=Sampling)
    precision: Precision = field(default_factory=Precision)
    pairs: PairSettings = field(default_factory=PairSettings)
    hardening: HardeningSettings | None = None
    prompt_sets: Mapping[str, PromptSource] = field(default_factory=dict)
    attacks: tuple[AttackRow, ...] = ()
    score: ScoreSettings = field(default_factory=ScoreSettings)

    def __post_init__(self) -> None:
        if (self.method is None) == (self.erased is None):
            raise ValueError("give [method], or an erasure made elsewhere as erased")
        if self.hardens is not None and self.method is None:
            raise ValueError("hardening is of an erasure that is made here; leave it out, or give [method]")
        _at_least(self, seed=0, block=1, attack_images=1)
        if self.erase_seed is not None:
            _at_least(self, erase_seed=0)
        if self.pairs.strength is not None and int(self.pairs.strength * self.sampling.num_inference_steps) < 1:
            raise ValueError("pairs.strength times sampling.num_inference_steps is less than one step; raise either")
        repeated = [row for row, count in Counter(attack.row for attack in self.attacks).items() if count > 1]
        if repeated:
            raise ValueError(f"two attacks have the row name {repeated[0]!r}")
        rows = {attack.row for attack in self.attacks}
        missing = next((name for attack in self.attacks for name in attack.baselines if name not in rows), None)
        if missing is not None:
            raise ValueError(f"an attack's baselines name {missing!r}, and no attack has that row")

    @property
    def hardens(self) -> HardeningSettings | None:
        """How the erasure is hardened; None where it is not."""
        return self.hardening if self.hardening is not None and self.hardening.rounds else None


def recipe_names() -> list[str]:
    """The recipes in the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(name: str | Path, *, overrides: Sequence[str] = (), seed: int | None = None) -> Recipe:
    """A shipped recipe by name, or a recipe file by its path (recognised by the ending `.toml`).

    `overrides` are texts of the form `field.field=value`; `seed` replaces the recipe's own.
    """
    path = _path(name)
    table = _read(path)
    for override in overrides:
        _override(table, override, f"--set {override}")
    if seed is not None:
        table["seed"] = seed
    return build(Recipe, table, f"{path}:" if path.parent != FOLDER else f"recipe {name}:")


def recipe_of_run(folder: Path) -> Recipe:
    """The recipe of a run that was begun in `folder`."""
    path = folder / "run.json"
    return build(Recipe, read_table(path, "recipe")["recipe"], f"{path}: recipe:")


def for_audit(recipe: Recipe, erased: str) -> Recipe:
    """The recipe with an erasure made elsewhere in place of its method."""
    return replace(recipe, method=None, erased=erased, hardening=None)


def _path(name: str | Path, folder: Path = Path()) -> Path:
    """Where a recipe lies: a shipped name, or a path from `folder`."""
    if Path(name).suffix == ".toml":
        return folder / name
    if str(name) not in recipe_names() and (folder / name).is_dir():
        raise UserError(
            f"{str(name)!r} is a folder, and no recipe; a run is gone on with by the recipe that it was begun with: "
            f"`duo run RECIPE --out {name} --resume`"
        )
    if str(name) not in recipe_names() and len(Path(name).parts) > 1:
        raise UserError(f"{name} is neither a recipe, which is a name of `duo list recipes` or a .toml, nor a folder")
    if str(name) not in recipe_names():
        raise UserError(f"no recipe is called {str(name)!r}{did_you_mean(str(name), recipe_names())}")
    return FOLDER / f"{name}.toml"


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's tables, over those of the recipe that it extends; `below` are the files that led here."""
    table = read_toml(path)
    if "concept" not in table and {"words", "anchor"} <= table.keys():
        raise UserError(f"{path} is a concept, and no recipe; name it in a recipe: concept = {path.name!r}")
    concept = table.get("concept")
    if isinstance(concept, str) and concept.endswith(".toml"):
        table["concept"] = str(path.parent / concept)
    pairs = table.get("pairs")
    if isinstance(pairs, dict):
        own = {name: pairs[name] for name in ("source", "unsafe", "safe") if isinstance(pairs.get(name), str)}
        pairs.update({name: str(path.parent / Path(place).expanduser()) for name, place in own.items()})
    _place_scores(table.get("score"), path.parent)
    for own_set in table.get("prompt_sets", {}).values() if isinstance(table.get("prompt_sets"), dict) else ():
        place = own_set.get("path") if isinstance(own_set, dict) else None
        if isinstance(place, str) and not place.startswith(HUB):
            own_set["path"] = str(path.parent / Path(place).expanduser())
    extends, overrides = table.pop("extends", None), table.pop("set", [])
    if extends is not None:
        if not isinstance(extends, str):
            raise UserError(f"{path}: extends is {extends!r}, expected the name or the path of a recipe")
        parent = _path(extends, path.parent)
        if parent.resolve() in (one.resolve() for one in (*below, path)):
            raise UserError(f"{path}: extends leads back to {parent}; a recipe cannot extend itself")
        base = _read(parent, (*below, path))
        old, new = base.get("method"), table.get("method")
        if isinstance(old, dict) and isinstance(new, dict) and new.get("name", old.get("name")) != old.get("name"):
            del base["method"]  # the fields of one method say nothing to another
        table = merged(base, table)
    if not isinstance(overrides, list) or not all(isinstance(one, str) for one in overrides):
        raise UserError(f"{path}: set is {overrides!r}, expected a list of field=value")
    for override in overrides:
        _override(table, override, f"{path}: set {override!r}")
    return table


def _place_scores(score: object, folder: Path) -> None:
    """Make the paths in a [score] table start from the recipe's folder; a bare name of captions is a set of prompts."""
    if not isinstance(score, dict):
        return
    captions, references = score.get("captions"), score.get("reference_images")
    if isinstance(captions, str) and is_caption_file(captions) and not captions.startswith(HUB):
        score["captions"] = str(folder / Path(captions).expanduser())
    if isinstance(references, str):
        score["reference_images"] = str(folder / Path(references).expanduser())
    tables = score.get("metrics")
    for table in tables.values() if isinstance(tables, dict) else ():
        for name, value in table.items() if isinstance(table, dict) else ():
            if isinstance(value, str) and value.endswith(WEIGHTS) and not value.startswith(HUB):
                table[name] = str(folder / Path(value).expanduser())


def is_caption_file(captions: str) -> bool:
    """Whether `score.captions` names a file, here or on the hub, and no set of prompts."""
    return captions.startswith(HUB) or captions.endswith(CAPTION_FILES)


def merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`: tables field by field, anything else replaced."""
    for key, value in over.items():
        inner = base.get(key)
        base[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return base


def _override(table: dict[str, Any], text: str, where: str) -> None:
    """Apply one `field.field=value` to the recipe's tables; `where` names it in messages."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"{where}: expected field=value, such as method.beta=20")
    here: Any = table
    for depth, part in enumerate(parts):
        if isinstance(here, list):
            rows = {entry.get("row"): entry for entry in here if isinstance(entry, dict)}
            if part not in rows:
                raise UserError(f"{where}: no attack has the row {part!r}{did_you_mean(part, map(str, rows))}")
            if depth == len(parts) - 1:
                raise UserError(
                    f"{where}: {key.strip()} is a whole attack; name a field of it: {key.strip()}.images=60"
                )
            here = rows[part]
        elif not isinstance(here, dict):
            raise UserError(f"{where}: {'.'.join(parts[:depth])} is {here!r}, which has no fields")
        elif depth == len(parts) - 1:
            here[part] = read_value(value.strip())
        else:
            here = here.setdefault(part, {})


def _at_least(record: object, **least: int) -> None:
    for name, bound in least.items():
        if getattr(record, name) < bound:
            raise ValueError(f"{name} is {getattr(record, name)}, expected at least {bound}")
