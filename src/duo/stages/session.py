"""A recipe at work in a run folder."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import is_dataclass, replace
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from duo import parallel, plugins, rundir
from duo.artefacts import find_artefact
from duo.concept import Concept, NearMiss, load_concept
from duo.delta import Delta
from duo.errors import Problems, UserError, did_you_mean
from duo.fields import LeafConfig, as_table, at_default, build_fields
from duo.models import EMBEDDED, load_family, usable_device, written_out
from duo.pairs import ENDINGS
from duo.plugins import Access, Family, Judge, Metric, Precision
from duo.precision import prepare_denoiser
from duo.promptsets import PromptFile, PromptRow, PromptSource, read_prompts
from duo.recipe import FEWEST_CAPTIONS, NOT_MEASURED, AttackRow, Recipe, is_caption_file, load_recipe
from duo.refusal import refuse_where_sexual, refused, texts_of, words_of
from duo.rundir import RunDir, Stage, StageRun
from duo.seeds import seed_for
from duo.stages.starts import starts_of

MODELS = ("original", "erased")
REFERENCE = "never"  # what the model is called that was trained without the concept
UNRELATED = "unrelated"
CAPTIONS, TWINS = "captions", "twins"  # folders beside those of near misses
# The fields of a recipe that a stage fixes for the rest of the run. Attack rows are compared one by one.
FIXED = {
    "pairs": ("concept", "model", "model_config", "seed", "sampling", "pairs"),
    "erase": ("concept", "model", "model_config", "seed", "method", "erased", "hardening"),
    "score": ("validation", "attack_images", "block", "attacks", "reference", "score"),
}
STEPS = "max_train_steps"  # what a method that trains calls its length
HARDENED = "hardened"  # in a delta's record: {"rounds", "attacks"} that the erasure was hardened by
RECORDED_VERSIONS = ("duo-unlearning", "torch", "diffusers", "transformers", "peft", "numpy", "pillow")


class Session:
    """A recipe at work in a run folder: its concept, its model and its leaves, each made when first asked for.

    Everything that a mistake could be in, the weights apart, is read and checked at once. `recipe` may be the name of a
    shipped recipe, or the path of a file, as `load_recipe` takes them. `model` may be given where it is loaded already;
    `command` is what a report says makes the run again.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path,
        out: str | Path,
        *,
        device: torch.device | str = "cpu",
        model: Family | None = None,
        command: str = 'duo.run(duo.Session(recipe, Path("runs/again")))',
    ) -> None:
        if out == "":  # Path("") is where one stands
            raise UserError("out is empty; name the folder of the run")
        recipe, out = recipe if isinstance(recipe, Recipe) else load_recipe(recipe), Path(out)
        self.command = command
        self.device = usable_device(parallel.start(str(device)))
        self._model = model
        self._erased: Family | None = None
        self._prompt_files: dict[str, PromptFile] = {}
        self._reference: Family | None = None
        self._keeping: ExitStack | None = None
        self._undefended: Callable[[], AbstractContextManager[Family]] = self._original
        self.concept: Concept = load_concept(recipe.concept)
        self.method = None if recipe.method is None else recipe.method.make("methods", "method")
        self.artefact = None if recipe.erased is None else find_artefact(recipe.erased)
        self.attacks = {row.row: row.make() for row in recipe.attacks}
        self.hardening = {row.row: row.make("hardening") for row in _hardening_rows(recipe)}
        self.recipe = _resolved(recipe, self.concept, self.method, self.attacks, self.hardening)
        self.dir = RunDir(out, self._defaults(recipe))
        which = "curator" if recipe.validation else "judge"  # who decides in scores must not decide what is scored
        self.judge_config: LeafConfig = getattr(self.concept, which)
        missing = Problems()  # networks that judges and metrics lack, told together
        self.judge: Judge = missing.take(lambda: self._judge(which, self.judge_config))
        self.curator: Judge = missing.take(lambda: self._judge("curator", self.concept.curator))
        self.pair_judges: dict[str, Judge] = {
            f"pairs.judges[{i}] ({judge.name})": missing.take(partial(judge.make, "judges", f"pairs.judges[{i}]"))
            for i, judge in enumerate(recipe.pairs.judges)
        }
        self.near_miss_judges: dict[str, Judge] = {
            name: missing.take(partial(self._judge, f"near_miss.{name}.judge", near.judge))
            for name, near in self.near_misses.items()
            if near.judge is not None
        }
        self.preservation: Callable[[], Metric] | None = missing.take(lambda: self._metric("preservation"))
        self.adherence: Any = missing.take(lambda: self._metric("adherence"))
        self.agreement: Callable[[], Metric] | None = missing.take(lambda: self._metric("agreement"))
        captioned = () if recipe.score.captions == NOT_MEASURED else recipe.score.quality
        self.quality: dict[str, Callable[[], Any]] = {
            name: missing.take(partial(self._made, name, "quality")) for name in captioned
        }
        missing.tell()
        for name in recipe.score.metrics:
            plugins.load("metrics", name)  # a name that is none is told
        self._check_adherence()
        _check_found_by(self.attacks, "attacks")
        self._check_hardening()
        for name in recipe.prompt_sets:
            if name == UNRELATED or name in self.concept.sets(validation=recipe.validation).prompts:
                raise UserError(f"prompt_sets.{name} has the name of a set of the concept; give it another")
        for name in (UNRELATED, *(row.prompts for row in recipe.attacks)):
            self.prompts(name)
        self.captions = self._captions()
        self.references = self._references()
        self._check_names()
        self._refuse_scored()
        self._refuse_minors()

    @cached_property
    def model(self) -> Family:
        """The model before the erasure."""
        precision = self.recipe.precision
        model = self._model or load_family(
            self.recipe.model,
            device=self.device,
            dtype=getattr(torch, precision.weights),
            config=self.recipe.model_config,
        )
        prepare_denoiser(model, precision)
        return model

    def _defaults(self, recipe: Recipe) -> dict[str, dict[str, Any]]:
        """Of the method and the attacks, by name, the settings that are at their defaults."""
        made = [] if recipe.method is None else [(recipe.method.name, self.method)]
        made += [(row.name, self.attacks[row.row]) for row in recipe.attacks]
        made += [(row.name, self.hardening[row.row]) for row in _hardening_rows(recipe)]
        found: dict[str, dict[str, Any]] = {}
        for name, leaf in made:
            found[name] = found.get(name, {}) | at_default(leaf)
        return found

    @property
    def models(self) -> tuple[str, ...]:
        """The models that attacks are run on: the reference that never saw the concept only where the recipe has it."""
        return MODELS if self.recipe.reference is None else (*MODELS, REFERENCE)

    @property
    def split(self) -> str:
        """Part of every scored seed: choosing hyper-parameters must not see the scored noise."""
        return "validation" if self.recipe.validation else "test"

    @property
    def erase_seed(self) -> int:
        """The seed of pairs and training, which may vary while what is scored stays the same."""
        return self.recipe.seed if self.recipe.erase_seed is None else self.recipe.erase_seed

    @property
    def curated_by(self) -> str:
        """The digest of who decides on pairs: the curator and `pairs.judges`."""
        others = [judge.digest for judge in self.pair_judges.values()]
        return rundir.digest([self.curator.digest, *others]) if others else self.curator.digest

    @property
    def pair_prompts(self) -> Sequence[tuple[str, str]]:
        """Prompts of an unsafe image and its safe twin: the recipe's own, or the concept's."""
        theirs = self.concept.pairs
        return self.recipe.pairs.prompts or tuple(zip(theirs.unsafe, theirs.safe, strict=True))

    @property
    def attack_pairs(self) -> Sequence[tuple[str, str]]:
        """Prompts and captions of the fresh images that attacks learn from."""
        return self.concept.attack_pairs

    def prompts(self, name: str) -> tuple[str, ...]:
        """One set of the concept's prompts, of the recipe's split, or a set of others that the recipe names."""
        if name in self.recipe.prompt_sets:
            return tuple(row.prompt for row in self.prompt_file(name).rows)
        return self.concept.prompt_set(name, validation=self.recipe.validation)

    def prompt_file(self, name: str) -> PromptFile:
        """The prompts of others that the recipe calls `name`, read once."""
        if name not in self._prompt_files:
            self._prompt_files[name] = read_prompts(self.recipe.prompt_sets[name])
        return self._prompt_files[name]

    def prompts_digest(self, name: str) -> str | None:
        """Of a set of prompts that the recipe brings; None of the concept's own, which that one's digest covers."""
        return self.prompt_file(name).digest if name in self.recipe.prompt_sets else None

    @property
    def near_misses(self) -> Mapping[str, NearMiss]:
        """The near misses of the recipe's split, unless the recipe leaves them out."""
        return self.concept.sets(validation=self.recipe.validation).near_miss if self.recipe.score.near_miss else {}

    @cached_property
    def shared(self) -> dict[str, Any]:
        """The configuration that every stage's result depends on."""
        recipe = self.recipe
        return {
            "model": recipe.model,
            "concept": {"name": self.concept.name, "digest": rundir.digest(as_table(self.concept))},
            "seed": recipe.seed,
            "sampling": as_table(recipe.sampling),
            # Only where it says something, so that runs from before there was such a table can be gone on with.
            **({} if recipe.precision == Precision() else {"precision": as_table(recipe.precision)}),
        }

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the run folder from the first stage within on, so that no other process comes between the stages."""
        try:
            with ExitStack() as self._keeping:
                yield
        finally:
            self._keeping = None

    @contextmanager
    def at_work(self, stage: str) -> Iterator[None]:
        """Hold the run folder, describe the run, and time the stage: the main process, for all of them.

        All begin and end the stage together, and where one fails the others stop too.
        """
        try:
            with ExitStack() as held:
                if parallel.is_main():
                    (self._keeping or held).enter_context(self.dir.locked())
                    self._describe()
                    held.enter_context(self.dir.timed(stage))
                parallel.barrier()
                yield
                parallel.barrier()
        except BaseException:
            parallel.stop()
            raise

    def _describe(self) -> None:
        self.dir.describe(
            {
                "command": self.command,
                "recipe": as_table(self.recipe),
                "seed": self.recipe.seed,
                "versions": versions(),
                "world_digest": world_digest(self.recipe, self.concept),
            },
            fixed=FIXED,
            may_rise=self.may_rise,
        )

    @property
    def may_rise(self) -> tuple[str, ...]:
        """What may be raised of a run that was begun: it would have made the same pairs with that from the start.

        More tries change nothing for a pair that was found. More edits change those whose unsafe image was given up, so
        they are only for pairs in the making, which makes these anew.
        """
        finished = self.dir.stage("pairs").finished
        return ("pairs.max_tries",) if finished else ("pairs.max_tries", "pairs.max_edits")

    def check_model(self, *, pairs: int | None, size: tuple[int, int] | None = None) -> None:
        """Load the model and raise `UserError` for what does not go with it, before anything is written.

        That is how images are sampled, the `size` (width, height) of images that were brought, and what the method says
        of its settings and the number of `pairs` (None: not known) where it has a `check`.
        """
        self.model.check(self.recipe.sampling, size=size)
        if self.method is None or self.recipe.method is None:
            return
        if self.recipe.precision.shard and not getattr(self.method, "shards", False):
            raise UserError(
                f"precision.shard is true, but the method {self.recipe.method.name!r} changes weights that would be "
                "cut into shares; set it to false"
            )
        if hasattr(self.method, "check"):
            self.method.check(self.model, pairs=pairs, precision=self.recipe.precision)

    @contextmanager
    def as_model(self, name: str) -> Iterator[Family]:
        """The "original", the "erased" or the "never" model, for as long as the context lasts.

        Within it `undefended` lends the original.
        """
        if name == "erased" and self._attaches:
            with Delta.load(self.dir.erasure()[0]).attached(self.model) as detached:
                self._undefended = detached
                try:
                    yield self.model
                finally:
                    self._undefended = self._original
        else:
            yield self._loaded(name)

    def undefended(self) -> AbstractContextManager[Family]:
        """The model from before the erasure, within `as_model`; what that lent is not to be used for so long."""
        return self._undefended()

    @contextmanager
    def unloaded(self, name: str) -> Iterator[Family]:
        """The model once its adapter was dropped, within `as_model(name)`: the original one where the erasure is an
        adapter beside the weights, and the model as it is where the erasure is in them."""
        with self.undefended() if name == "erased" and self.droppable else self.at_hand(name) as model:
            yield model

    @contextmanager
    def at_hand(self, name: str) -> Iterator[Family]:
        """What `as_model(name)` lent, within it."""
        yield self._loaded(name)

    @cached_property
    def vetted(self) -> frozenset[str]:
        """Words of texts that were checked already."""
        return frozenset(words_of(text for _, text in texts_of(as_table(self.concept))))

    def refused(self, prompt: str) -> str | None:
        """The word, phrase or age for which a prompt is not rendered (`duo.refusal.refused`), or None."""
        return refused(prompt, adults_only=self.concept.adults_only, vetted=self.vetted)

    @property
    def method_name(self) -> str:
        """What made the erasure: the recipe's method, what a delta says of itself, or "imported"."""
        if self.recipe.method is not None:
            return self.recipe.method.name
        assert self.artefact is not None
        delta = self.artefact.delta() if self.artefact.kind == "delta" else None
        return str(delta.record.get("method", "imported")) if delta else "imported"

    @property
    def _attaches(self) -> bool:
        """Whether the erased model is the original one with a delta."""
        return self.artefact is None or self.artefact.kind == "delta"

    def _loaded(self, name: str) -> Family:
        if name == REFERENCE:
            return self._never()
        return self.model if name == "original" or self._attaches else self.imported()

    @cached_property
    def droppable(self) -> bool:
        """Whether the erasure is an adapter, as it was published: a LoRA, or one that prompts open."""
        if self.artefact is not None:
            return bool(self.artefact.droppable)
        return Delta.load(self.dir.erasure()[0]).kind != "weights"

    @cached_property
    def hardened_by(self) -> tuple[str, ...]:
        """The attacks that the erasure was hardened against, as its delta says; of what is no delta none is known."""
        if not self._attaches:
            return ()
        delta = Delta.load(self.dir.erasure()[0]) if self.artefact is None else self.artefact.delta()
        told = delta.record.get(HARDENED, {"attacks": []})
        names = told.get("attacks") if isinstance(told, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"the delta's record has a {HARDENED!r} that lists no attacks; erase anew")
        return tuple(names)

    @contextmanager
    def _original(self) -> Iterator[Family]:
        yield self.model

    def imported(self) -> Family:
        """The erased model that was made elsewhere, loaded once."""
        assert self.artefact is not None
        if self._erased is None:
            stage = self.dir.stage("erase")
            if stage.finished and self.artefact.digest != self.dir.erasure()[1]:
                raise UserError(f"{self.artefact.path} is not what was attacked before; put it back, or {rundir.ANEW}")
            self._erased = self.artefact.load(
                self.recipe.model,
                device=self.device,
                dtype=getattr(torch, self.recipe.precision.weights),
                config=self.recipe.model_config,
            )
            prepare_denoiser(self._erased, self.recipe.precision)
        return self._erased

    def _never(self) -> Family:
        """The model that was trained without the concept, loaded once."""
        assert self.recipe.reference is not None
        if self._reference is None:
            dtype = getattr(torch, self.recipe.precision.weights)
            self._reference = load_family(self.recipe.reference, device=self.device, dtype=dtype)
            prepare_denoiser(self._reference, self.recipe.precision)
        return self._reference

    def lend(self, stage: Stage, *purpose: str, seed: int | None = None) -> StageRun:
        """What a leaf gets of a stage; its seed is derived from `seed`, or the recipe's where None."""
        base = self.recipe.seed if seed is None else seed
        return StageRun(
            folder=stage.folder,
            seed=seed_for(base, *purpose),
            device=self.model.device,
            precision=self.recipe.precision,
            sampling=self.recipe.sampling,
        )

    def _judge(self, field: str, judge: LeafConfig) -> Judge:
        made: Judge = judge.make("judges", f"concept {self.concept.name}: {field}")
        return made

    def _metric(self, field: str) -> Any:
        """What makes the metric that a field of `score` names, or None where it says that there is none."""
        name = getattr(self.recipe.score, field)
        return None if name == NOT_MEASURED else self._made(name, field)

    def _made(self, name: str, field: str) -> Callable[[], Any]:
        """What makes a metric with the recipe's settings; networks of its that are missing are told.

        Raises `UserError` before that where it is no metric for the field of `score`.
        """
        if fault := _unfit(field, plugins.load("metrics", name)):
            known = [one for one in plugins.names("metrics") if self._known(one)]
            fitting = [one for one in known if _unfit(field, plugins.load("metrics", one)) is None]
            fitting += [] if field == "quality" else [NOT_MEASURED]
            raise UserError(f"score.{field}: the metric {name!r} {fault}; it can be {', '.join(fitting)}")
        if not self._known(name):
            raise UserError(
                f"score.{field} is {name!r}, which knows the embedded world alone; name a metric for "
                f"{self.recipe.model!r}, or {NOT_MEASURED!r} to go without"
            )
        leaf, where = plugins.load("metrics", name), f"score.metrics.{name}"
        settings = self.recipe.score.metrics.get(name)
        if settings and not is_dataclass(leaf):
            raise UserError(f"{where}: the metric {name!r} has no fields; leave the table out")
        make = partial(build_fields, leaf, settings, where) if settings else leaf
        metric = make()
        if hasattr(metric, "check"):
            try:
                metric.check()
            except UserError as error:
                raise UserError(f"score.{field} is {name!r}: {error}") from error
        return make

    def _known(self, metric: str) -> bool:
        """Whether a metric can say something of the run's images: those of the embedded world know drawings alone."""
        return not metric.startswith(EMBEDDED[0]) or _in_the_world(self.recipe, self.concept)

    def _captions(self) -> tuple[PromptRow, ...]:
        """The captions that quality is measured on, those apart that may not be rendered; none where it is not."""
        score = self.recipe.score
        if score.captions == NOT_MEASURED:
            return ()
        if is_caption_file(score.captions):
            rows = read_prompts(PromptSource(path=score.captions)).rows
        elif score.captions in self.recipe.prompt_sets:
            rows = self.prompt_file(score.captions).rows
        else:
            rows = tuple(PromptRow(prompt=one, line=i) for i, one in enumerate(self.prompts(score.captions), start=1))
        kept = tuple(row for row in rows if self.refused(row.prompt) is None)
        if max(len(kept), score.captions_n or 0) < FEWEST_CAPTIONS or not kept:
            raise UserError(
                f"score.captions: {score.captions} has {len(kept)} captions that may be rendered; give at least "
                f"{FEWEST_CAPTIONS}, or set captions_n"
            )
        return kept

    @property
    def twins(self) -> int:
        """Of how many images of the unsafe row safe twins are drawn: of none where no metric compares them."""
        return 0 if self.preservation is None else self.recipe.score.twins

    @property
    def draws_references(self) -> bool:
        """Whether the original model draws the references of distances of sets, as no folder gives them."""
        return not self.references and any(hasattr(make(), "features") for make in self.quality.values())

    @property
    def captions_n(self) -> int:
        """Images of captions, of each model: caption i of image i, and from the first again."""
        return self.recipe.score.captions_n or len(self.captions)

    def _references(self) -> tuple[Path, ...]:
        """The reference images, of which there must be as many as images; none where the original model draws them."""
        folder = self.recipe.score.reference_images
        if (
            folder is None
            or not self.captions
            or not any(hasattr(make(), "features") for make in self.quality.values())
        ):
            return ()
        path = Path(folder)
        if not path.is_dir():
            raise UserError(f"score.reference_images is {folder}, which is no folder; give one of images")
        found = tuple(sorted(one for one in path.iterdir() if one.suffix.lower() in ENDINGS))
        if len(found) != self.captions_n:
            raise UserError(
                f"score.reference_images: {folder} holds {len(found)} images, and {self.captions_n} of captions are "
                "measured; distances of sets compare only at equal numbers: set captions_n, or give as many"
            )
        return found

    def _check_adherence(self) -> None:
        """Near misses that are told by an attribute need the metric; those that a judge tells do not."""
        name = self.recipe.score.adherence
        told = next((miss for miss, near in self.near_misses.items() if near.attribute is not None), None)
        if self.adherence is None and told is not None:
            raise UserError(
                f"concept {self.concept.name}: near_miss.{told} is told by an attribute, but score.adherence is "
                f"{name!r}; name a metric there, give the near miss a judge, or set score.near_miss to 0"
            )

    def _check_hardening(self) -> None:
        """What rounds of hardening need: a method that learns from pairs, attacks that images teach, and prompts."""
        settings = self.recipe.hardens
        if settings is None:
            return
        assert self.recipe.method is not None and self.method is not None  # the recipe saw to it
        if not self.method.takes_pairs:
            raise UserError(
                f"hardening: what comes back is learned from as pairs, and the method {self.recipe.method.name!r} "
                "takes none; set hardening.rounds to 0, or take a method that learns from pairs"
            )
        if settings.grow_steps and not hasattr(self.method, STEPS):
            raise UserError(
                f"hardening.grow_steps: the method {self.recipe.method.name!r} has no {STEPS}, so there is nothing to "
                "grow; set it to false"
            )
        for row in settings.attacks:
            if self.hardening[row.row].access == Access.WEIGHTS:
                raise UserError(
                    f"hardening.attacks.{row.row}: the attack {row.name!r} changes the weights, against which no pair "
                    "helps; leave it out, or watch it as one of held_out"
                )
        for name in (UNRELATED, *(row.prompts for row in _hardening_rows(self.recipe))):
            self.concept.prompt_set(name, validation=True)
        _check_found_by(self.hardening, "hardening")
        starts_of(self)  # where there are none, that is told

    def _refuse_scored(self) -> None:
        """What a method trains on may not be scored."""
        held = getattr(self.method, "held_prompts", ())
        try:
            self.concept.refuse_scored(held, "method.held_prompts")
        except ValueError as error:
            raise UserError(str(error)) from None
        for name, prompts in self.recipe.prompt_sets.items():
            if held and (both := set(held) & set(self.prompts(name))):
                raise UserError(f"method.held_prompts has {min(both)!r}, which is in {prompts} and scored; take it out")

    def _refuse_minors(self) -> None:
        """The settings of attacks and method may hold texts too: of a sexual concept they may not mention minors."""
        named = [(f"attacks.{row.row}", as_table(row)) for row in self.recipe.attacks]
        named += [(f"hardening.{row.row}", as_table(row)) for row in _hardening_rows(self.recipe)]
        named += [] if self.recipe.method is None else [("method", as_table(self.recipe.method))]
        named += [("pairs.prompts", as_table(self.recipe.pairs.prompts))]
        texts = [text for where, table in named for text in texts_of(table, where)]
        refuse_where_sexual(texts, adults_only=self.concept.adults_only)

    def _check_names(self) -> None:
        """Attack rows, near misses and `unrelated` share the names of folders and of sets in `verdicts.jsonl`."""
        names = [*self.attacks, *self.near_misses, UNRELATED]
        if kept := {CAPTIONS, TWINS} & self.near_misses.keys():
            raise UserError(f"near_miss.{min(kept)} has the name of a folder of the score stage; give it another")
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise UserError(f"{repeated[0]!r} names two of the attack rows and near misses; rename the row")
        if self.attacks and self.recipe.score.unsafe_row not in self.attacks:
            row = self.recipe.score.unsafe_row
            raise UserError(
                f"score.unsafe_row: no attack has the row {row!r}{did_you_mean(row, self.attacks)}; name one of "
                "them there"
            )


def _hardening_rows(recipe: Recipe) -> tuple[AttackRow, ...]:
    """The attack rows of hardening, those that are only watched last."""
    return () if recipe.hardening is None else (*recipe.hardening.attacks, *recipe.hardening.held_out)


def _check_found_by(attacks: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` where an attack takes the prompts of a row that does not stand before it."""
    before: set[str] = set()
    for row, attack in attacks.items():
        found_by = getattr(attack, "found_by", None)
        if found_by is not None and found_by not in before:
            raise UserError(f"{where}.{row}.found_by is {found_by!r}; name an attack row that stands before it")
        before.add(row)


def _resolved(
    recipe: Recipe, concept: Concept, method: Any, attacks: Mapping[str, Any], hardening: Mapping[str, Any]
) -> Recipe:
    """The recipe with its paths and every field of its leaves written out, for a record must not depend on the folder
    that the command was given in, nor on defaults."""
    recipe = replace(
        recipe,
        concept=written_out(recipe.concept) if recipe.concept.endswith(".toml") else recipe.concept,
        model=written_out(recipe.model),
        model_config=None if recipe.model_config is None else written_out(recipe.model_config),
        erased=None if recipe.erased is None else written_out(recipe.erased),
        reference=None if recipe.reference is None else written_out(recipe.reference),
    )
    score = recipe.score
    recipe = replace(
        recipe,
        score=replace(
            score,
            captions=written_out(score.captions) if is_caption_file(score.captions) else score.captions,
            reference_images=None if score.reference_images is None else written_out(score.reference_images),
        ),
    )
    rows = _written_out(recipe.attacks, attacks)
    if recipe.hardening is not None:
        old = recipe.hardening
        used, held_out = (_written_out(own, hardening) for own in (old.attacks, old.held_out))
        recipe = replace(recipe, hardening=replace(old, attacks=used, held_out=held_out))
    pairs = replace(
        recipe.pairs,
        strength=concept.pairs.strength if recipe.pairs.strength is None else recipe.pairs.strength,
        guidance_scale=(
            concept.pairs.guidance_scale if recipe.pairs.guidance_scale is None else recipe.pairs.guidance_scale
        ),
    )
    try:
        made = None if recipe.method is None else replace(recipe.method, settings=as_table(method))
        return replace(recipe, method=made, attacks=rows, pairs=pairs)
    except ValueError as error:  # the concept's strength leaves no step to a recipe of few
        raise UserError(f"concept {concept.name} in this recipe: {error}") from error


def _unfit(field: str, metric: type) -> str | None:
    """Why a metric cannot be what a field of `score` asks for, by its class alone; None where it can."""
    of_sets, alone = hasattr(metric, "features"), not getattr(metric, "needs_references", True)
    if field == "quality":
        fits = of_sets or alone
        return None if fits else "is neither of sets of images nor of images and their prompts"
    if of_sets:
        return "is of sets of images, and gives none of one (see quality)"
    if field == "adherence":
        return None if hasattr(metric, "by_attribute") else "does not tell attributes apart"
    if field == "agreement":
        return None if alone else "does not compare images with prompts alone"
    compares = not alone and not hasattr(metric, "by_attribute")
    return None if compares else "does not compare each image with another"


def _written_out(rows: Sequence[AttackRow], attacks: Mapping[str, Any]) -> tuple[AttackRow, ...]:
    """Rows with every setting of their attacks."""
    return tuple(replace(row, settings=as_table(attacks[row.row])) for row in rows)


def versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in RECORDED_VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def world_digest(recipe: Recipe, concept: Concept) -> str | None:
    """The digest of the embedded world (renderer, language, splits, judges); None where it has no part in a run."""
    if not _in_the_world(recipe, concept):
        return None
    from duo import toybox

    return toybox.world_digest()


def _in_the_world(recipe: Recipe, concept: Concept) -> bool:
    """Whether a run is of the embedded world: by its model, or, where that was saved elsewhere, by its judge."""
    return recipe.model in EMBEDDED or concept.judge.name == EMBEDDED[0]
