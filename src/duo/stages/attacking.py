"""The attack stage: every attack on every model, up to the images. Nothing is judged here."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, fromarray

from duo import parallel, rundir
from duo.checkpoint import read_tensors, write_tensors
from duo.concept import AttackConcept
from duo.errors import NotDefinedError, UserError
from duo.fields import as_table
from duo.foreign import is_plain_name
from duo.intact import images_digest, intact_attack, intact_images
from duo.plugins import Access, Attempt, Family
from duo.recipe import AttackRow
from duo.rundir import Blocks, Stage, append_jsonl, progress
from duo.seeds import seed_for
from duo.stages import searches
from duo.stages.erasing import bring
from duo.stages.rendering import read_image, render
from duo.stages.session import REFERENCE, Session
from duo.target import RefusedPromptError, Target


def attack(session: Session, *, models: Sequence[str] | None = None) -> None:
    """Run every attack of the recipe on each model, or on those of `models`, and render what it found.

    Image i of a row starts from prompt i modulo their number. The attempts of a prompt are shared out in turn over its
    images. Nothing is judged here. What an attack found and `Target.refused` refuses, for it mentions a minor, is
    recorded in `refused.jsonl` and never rendered, and the attempts that are left share its images. An attack that is
    not defined for the kind of model is finished without images, and its manifest says why.
    """
    wanted = session.models if models is None else models
    erased = ""
    if "erased" in wanted:
        if session.artefact is not None:
            bring(session)
        _, erased = session.dir.erasure()  # told before anything is written
    with session.at_work("attack"):
        knowledge = attack_concept(session)
        for model_name in wanted:
            todo = []
            for row in session.recipe.attacks:
                stage = session.dir.stage("attack", row.row, model_name)
                if stage.begin(attack_config(session, row, model_name, erased)):
                    todo.append((row, stage))
            if todo:
                with session.as_model(model_name) as model:
                    encoder = searches.encoder_digest(model)
                    for row, stage in todo:
                        known = _with_found(session, row, model_name, knowledge)
                        _attack_one(session, model, row, stage, model_name, known, encoder=encoder)


def _with_found(session: Session, row: AttackRow, model_name: str, knowledge: AttackConcept) -> AttackConcept:
    """What is known besides of prompts that the row `found_by` found on the same model."""
    found_by = getattr(session.attacks[row.row], "found_by", None)
    if found_by is None:
        return knowledge
    stage = session.dir.stage("attack", found_by, model_name)  # a row before this one: the session saw to it
    intact_attack(stage)
    path = stage.folder / "attempts.jsonl"
    rows = rundir.read_jsonl(path) if path.exists() else []  # none of an attack that is not defined here
    return replace(knowledge, found_prompts=tuple(dict.fromkeys(one["prompt"] for one in rows)))


def attack_config(session: Session, row: AttackRow, model_name: str, erasure: str) -> dict[str, Any]:
    """What the result of one attack on one model depends on; `erasure` is the delta's digest."""
    table = {name: value for name, value in as_table(row).items() if name not in ("reliable", "baselines", "baseline")}
    prompts = session.prompts_digest(row.prompts)
    return {
        **session.shared,
        "attack": table,
        "split": session.split,
        "block": session.recipe.block,
        "attack_images": session.recipe.attack_images,
        "erasure": erasure if model_name == "erased" else None,
        **({"reference": session.recipe.reference} if model_name == REFERENCE else {}),
        **({} if prompts is None else {"prompts": prompts}),
    }


def attack_concept(session: Session) -> AttackConcept:
    """The concept as attackers know it; images only where an attack learns from them."""
    attacks, concept = session.attacks.values(), session.concept
    learns = any(getattr(attack, "learns_from_images", False) for attack in attacks)
    if learns and not session.attack_pairs:
        raise UserError(f"concept {concept.name}: attack_pairs is empty, and an attack learns from their images")
    images = _images(session, "images", session.attack_pairs, wanted="present") if learns else []
    benign = any(getattr(attack, "learns_from_harmless", False) for attack in attacks)
    captions = tuple((caption, caption) for caption in concept.harmless)
    harmless = _images(session, "harmless", captions, wanted="absent") if benign else []
    return AttackConcept(
        name=concept.name,
        words=concept.words,
        anchor=concept.anchor,
        vector_pairs=concept.vector_pairs,
        attack_images=[one.image for one in images],
        attack_captions=tuple(one.caption for one in images),
        attack_prompts=tuple(one.prompt for one in images),
        harmless_images=[one.image for one in harmless],
        harmless_captions=tuple(one.caption for one in harmless),
        detector=session.curator,
    )


def _checked(session: Session, path: Path) -> _Search:
    """A search without attempts that are refused; it may be another run's, of a time when fewer words were known."""
    search = _Search.load(path)
    kept = search.checked(session)
    if kept is not search and parallel.is_main():
        kept.save(path)
    return kept


@dataclass(frozen=True)
class _Known:
    """An image that attacks learn from, the prompt that drew it, and what it shows besides the concept."""

    image: Image
    prompt: str
    caption: str


def _images(session: Session, name: str, asked: Sequence[tuple[str, str]], *, wanted: str) -> list[_Known]:
    """Fresh images by the original model in `attack/<name>`, each of which the curator found to be as `wanted`.

    `asked` are prompts with captions.
    """
    recipe, stage = session.recipe, session.dir.stage("attack", name)
    config = {**session.shared, "n": recipe.attack_images, "split": session.split, "curator": session.curator.digest}
    if stage.begin(config):
        parts = Blocks(stage.folder / rundir.BLOCKS, n=recipe.attack_images, size=recipe.block)
        for rows in parts.pending():
            parts.done(rows, {"rows": _image_block(session, rows, stage.folder, asked, wanted)})
        parallel.barrier()
        if parallel.is_main():
            rows_made = [row for record in parts.records() for row in record["rows"]]
            rundir.write_jsonl(stage.folder / "images.jsonl", rows_made)
            stage.finish(digest=images_digest(stage.folder, recipe.attack_images))
        parallel.barrier()
    digest = stage.require("attack").get("digest")  # older versions of duo recorded none
    intact_images(stage, stage.folder, recipe.attack_images, digest)
    told = stage.intact("images.jsonl", stage.sealed("images.jsonl"))
    made = rundir.read_jsonl(told)
    if not all(isinstance(row["image"], str) and is_plain_name(row["image"]) for row in made):
        raise stage.broken(told, "names an image that is not of its folder")
    return [_Known(read_image(stage.folder / row["image"]), row["prompt"], row["caption"]) for row in made]


def _image_block(
    session: Session, indices: range, folder: Path, prompts: Sequence[tuple[str, str]], wanted: str
) -> list[dict[str, Any]]:
    concept, tries, name = session.concept, session.recipe.pairs.max_tries, folder.name
    asked = {i: prompts[i % len(prompts)] for i in indices}
    made: dict[int, dict[str, Any]] = {}
    for attempt in range(tries):
        pending = [i for i in indices if i not in made]
        if not pending:
            break
        purpose = "attack images" if name == "images" else f"attack {name}"
        seeds = [seed_for(session.recipe.seed, session.split, purpose, i, attempt) for i in pending]
        images = session.model.generate([asked[i][0] for i in pending], seeds=seeds, sampling=session.recipe.sampling)
        for i, seed, image, verdict in zip(pending, seeds, images, session.curator(images), strict=True):
            if verdict.label == wanted:
                rundir.write_image(folder / f"{i:04d}.png", image)
                prompt, caption = asked[i]
                row = {"index": i, "image": f"{i:04d}.png", "prompt": prompt, "caption": caption, "seed": seed}
                made[i] = row
    if len(made) < len(indices):
        missing = next(i for i in indices if i not in made)
        raise UserError(
            f"{folder}: no image of {asked[missing][0]!r} satisfied the curator of concept {concept.name!r} within "
            f"pairs.max_tries = {tries}; raise pairs.max_tries and go on, or mend attack_pairs or the judge, in a new "
            "--out"
        )
    return [made[i] for i in indices]


@dataclass(frozen=True)
class _Search:
    """What an attack found for one prompt, what of it was refused, and the images that it asked for on the way."""

    base_prompt: str
    attempts: list[Attempt]
    refused: list[dict[str, str]]  # {"prompt", "mentions"} each
    queries: int

    def checked(self, session: Session) -> _Search:
        """The same without attempts whose prompts are refused."""
        why = {one.prompt: session.refused(one.prompt) for one in self.attempts}
        refused = [{"prompt": prompt, "mentions": mentions} for prompt, mentions in why.items() if mentions]
        kept = [one for one in self.attempts if why[one.prompt] is None]
        return replace(self, attempts=kept, refused=[*self.refused, *refused]) if refused else self

    def save(self, path: Path) -> None:
        tensors = {f"{n}.{name}": value for n, one in enumerate(self.attempts) for name, value in _tensors(one).items()}
        records = [
            {name: getattr(one, name) for name in _PLAIN} | {"record": dict(one.record)} for one in self.attempts
        ]
        told = {"base_prompt": self.base_prompt, "refused": self.refused, "queries": self.queries}
        write_tensors(path, tensors, {"attempts": records, **told})

    @classmethod
    def load(cls, path: Path) -> _Search:
        """Read a file of `save`; a `UserError` where another version of duo wrote it, or something else."""
        tensors, record = read_tensors(path)
        try:
            stored: Any = record.pop("attempts")
            _check_plain(stored, record)
            attempts = [
                Attempt(
                    **one, **_values({k.removeprefix(f"{n}."): v for k, v in tensors.items() if k.startswith(f"{n}.")})
                )
                for n, one in enumerate(stored)
            ]
            return cls(attempts=attempts, **record)  # type: ignore[arg-type]
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise _foreign(path.parents[1]) from error


_PLAIN: Mapping[str, tuple[type, ...]] = {  # of an attempt, as JSON
    "prompt": (str,),
    "negative_prompt": (str, NoneType),
    "variant": (str,),
    "strength": (float, int, NoneType),
    "weights": (str, NoneType),
    "unloaded": (bool,),
}
_IMAGES = ("init", "mask", "source")
_TOKEN = "token."


def _check_plain(attempts: Any, record: Mapping[str, Any]) -> None:
    """Raise `TypeError` or `ValueError` where a search's record holds what `_Search.save` does not write."""
    for one in attempts:
        for name, kinds in _PLAIN.items():
            if not isinstance(one[name], kinds):
                raise TypeError(f"{name} is {one[name]!r}")
        if not isinstance(one["record"], dict):
            raise TypeError(f"record is {one['record']!r}")
        if one["weights"] is not None and not is_plain_name(one["weights"]):
            raise ValueError(f"weights is {one['weights']!r}, which leads elsewhere")
    texts = [record["base_prompt"], *(text for one in record["refused"] for text in one.values())]
    if not all(isinstance(text, str) for text in texts) or type(record["queries"]) is not int:
        raise TypeError("a text is none, or queries is no whole number")


def _tensors(one: Attempt) -> dict[str, torch.Tensor]:
    """The images, noise and learned words of an attempt."""
    images = {name: getattr(one, name) for name in _IMAGES}
    found = {name: torch.from_numpy(np.array(image)) for name, image in images.items() if image is not None}
    found |= {} if one.latents is None else {"latents": one.latents.detach().cpu().contiguous()}
    return found | {f"{_TOKEN}{word}": value for word, value in one.tokens.items()}


def _values(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The inverse of `_tensors`, as arguments of `Attempt`."""
    for name in _IMAGES:
        if name in tensors and (tensors[name].dtype != torch.uint8 or tensors[name].dim() not in (2, 3)):
            raise TypeError(f"{name} is no picture")
    values: dict[str, Any] = {name: fromarray(tensors[name].numpy()) for name in _IMAGES if name in tensors}
    values |= {"latents": tensors["latents"]} if "latents" in tensors else {}
    words = {name.removeprefix(_TOKEN): value for name, value in tensors.items() if name.startswith(_TOKEN)}
    if any(word.dim() != 2 or not word.is_floating_point() for word in words.values()):
        raise TypeError("a learned word is no table of vectors")
    return {**values, "tokens": words}


def _attack_one(
    session: Session,
    model: Family,
    row: AttackRow,
    stage: Stage,
    model_name: str,
    knowledge: AttackConcept,
    *,
    encoder: str,
) -> None:
    """One attack on one model, whose text encoder has the digest `encoder`, from `prepare` to the last image."""
    attack, prompts = session.attacks[row.row], session.prompts(row.prompts)[: row.searches]
    target = Target(
        model,
        access=attack.access,
        sampling=session.recipe.sampling,
        adults_only=session.concept.adults_only,
        vetted=session.vetted,
        concept=knowledge,
        undefended=session.undefended if getattr(attack, "uses_undefended", False) else None,
    )
    original = session.dir.stage("attack", row.row, "original")
    kept = searches.cached(attack, attack_config(session, row, "original", ""), encoder)
    shared = model_name != "original" and parallel.once(lambda: searches.from_original(original, stage, encoder))
    parallel.once(lambda: searches.take(kept, stage))
    reason = parallel.once(lambda: _prepare(session, row, stage, target, knowledge))
    if reason is not None:
        _not_defined(stage, reason)
        return
    state, _ = read_tensors(_state(stage))
    found_in = [stage.folder / searches.SEARCH / f"{i:04d}.safetensors" for i in range(min(len(prompts), row.images))]
    with progress(len(found_in), f"{row.row}, {model_name}: search") as bar:
        for index, path in parallel.mine(list(enumerate(found_in))):
            if not path.exists():
                seed = seed_for(session.recipe.seed, session.split, row.row, "search", index)
                began = time.monotonic()
                search = _search(attack, row, target, state, prompts[index], seed=seed)
                search.save(path)
                took = {"prompt": index, "queries": search.queries, "seconds": round(time.monotonic() - began, 3)}
                append_jsonl(stage.folder / "timings.jsonl", took)
            bar.update(index + 1)
    parallel.barrier()
    parallel.once(lambda: searches.keep(stage, kept))
    found = [_checked(session, path) for path in found_in]
    refused = [{"base_prompt": one.base_prompt, **what} for one in found for what in one.refused]
    if refused and parallel.is_main():
        rundir.write_jsonl(stage.folder / "refused.jsonl", refused)
    left = [one for one in found if one.attempts]
    if not left:
        raise UserError(
            f"every prompt that attack {row.name!r} found in the row {row.row!r} mentions a minor and was refused, as "
            f"it or concept {session.concept.name!r} is sexual; take another seed, or other prompts for the row"
        )
    drops = any(one.unloaded for search in left for one in search.attempts)
    if drops and model_name == "erased" and not session.droppable:
        _not_defined(stage, "there is no adapter to drop: the erasure is in the weights")
        return
    seeds = _seeds(session, row, [index for index, one in enumerate(found) if one.attempts])
    attempts = [_of_image(left, i) for i in range(row.images)]
    render(
        session,
        stage.folder / "images",
        attempts,
        seeds,
        label=f"{row.row}, {model_name}: images",
        model=model_name,
        weights=stage.folder,
    )
    parallel.barrier()
    if parallel.is_main():
        rows = [_attempt_row(i, seeds[i], left[i % len(left)], one) for i, one in enumerate(attempts)]
        rundir.write_jsonl(stage.folder / "attempts.jsonl", rows)
        stage.finish(
            text_encoder=encoder,
            search_needs_denoiser=attack.access > Access.TEXT
            or getattr(attack, "found_by", None) is not None
            or any(search.queries for search in found),
            search_shared=shared,
            refused=len(refused),
            digest=images_digest(stage.folder / "images", row.images),
            attempts=rundir.digest(stage.folder / "attempts.jsonl"),
        )
    parallel.barrier()


def _not_defined(stage: Stage, reason: str) -> None:
    """Finish an attack that makes no sense here, without images."""
    if parallel.is_main():
        stage.finish(not_defined=reason)
    parallel.barrier()


def _seeds(session: Session, row: AttackRow, prompts: Sequence[int]) -> list[int]:
    """One seed an image. Where a file of prompts has seeds, they are those of each prompt's first image."""
    seeds = [seed_for(session.recipe.seed, session.split, row.row, i) for i in range(row.images)]
    if row.prompts in session.recipe.prompt_sets:
        rows = session.prompt_file(row.prompts).rows
        for i, prompt in enumerate(prompts[: row.images]):
            own = rows[prompt].seed
            seeds[i] = seeds[i] if own is None else own
    return seeds


def _attempt_row(index: int, seed: int, search: _Search, one: Attempt) -> dict[str, Any]:
    """One line of `attempts.jsonl`; what an attempt has besides its prompt is there by its digest."""
    digests = {
        name.removeprefix(_TOKEN): hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
        for name, value in _tensors(one).items()
    }
    return {
        "index": index,
        "base_prompt": search.base_prompt,
        "prompt": one.prompt,
        "negative_prompt": one.negative_prompt,
        "variant": one.variant,
        **({"digests": digests} if digests else {}),
        **({"strength": one.strength} if one.strength is not None else {}),
        **({"weights": one.weights} if one.weights is not None else {}),
        **({"unloaded": True} if one.unloaded else {}),
        "seed": seed,
        "image": f"images/{index:04d}.png",
        "queries": search.queries,
        "record": dict(one.record),
    }


def _search(
    attack: Any, row: AttackRow, target: Target, state: Mapping[str, torch.Tensor], prompt: str, *, seed: int
) -> _Search:
    """What the attack finds for one prompt. Where it asks for an image of a refused prompt, its search ends."""
    mentions = target.refused(prompt)
    if mentions is not None:  # nothing is searched from there either
        return _Search(base_prompt=prompt, attempts=[], refused=[{"prompt": prompt, "mentions": mentions}], queries=0)
    before = target.queries
    target.query_limit = before + getattr(attack, "queries", 0)
    found: list[Attempt] = []
    refused: list[dict[str, str]] = []
    try:
        for one in attack.search(target, state, prompt, generator=torch.Generator().manual_seed(seed)):
            mentions = target.refused(one.prompt)
            if mentions is None:
                found.append(one)
            else:
                refused.append({"prompt": one.prompt, "mentions": mentions})
    except RefusedPromptError as error:
        refused.append({"prompt": error.prompt, "mentions": error.mentions})
    if not found and not refused:
        raise UserError(f"attack {row.name!r} yielded nothing for the prompt {prompt!r}")
    return _Search(base_prompt=prompt, attempts=found, refused=refused, queries=target.queries - before)


def _of_image(searches: Sequence[_Search], index: int) -> Attempt:
    attempts = searches[index % len(searches)].attempts
    return attempts[index // len(searches) % len(attempts)]


def rendered_attempts(folder: Path) -> tuple[list[Attempt], list[int]]:
    """The attempts, learned tokens included, and seeds that the images of the finished attack in `folder` are of.

    Raises `UserError` where another version of duo made the attack.
    """
    searches = [_Search.load(path) for path in sorted((folder / "search").glob("*.safetensors"))]
    left = [one for one in searches if one.attempts]
    rows = rundir.read_jsonl(folder / "attempts.jsonl")
    if not left or not rows or not all(isinstance(row.get("seed"), int) for row in rows):
        raise _foreign(folder)
    return [_of_image(left, i) for i in range(len(rows))], [row["seed"] for row in rows]


def _foreign(folder: Path) -> UserError:
    return UserError(
        f"{folder} was made by another version of duo; run it again in a new --out, or give `duo merge` the "
        "erase/delta.safetensors of the run, whose rates it does not measure"
    )


def _state(stage: Stage) -> Path:
    return stage.folder / searches.STATE


def _prepare(session: Session, row: AttackRow, stage: Stage, target: Target, knowledge: AttackConcept) -> str | None:
    """Keep what the attack learns of the target; where it is not defined for such a model, the reason."""
    if not _state(stage).exists():
        run = session.lend(stage, session.split, row.row, "prepare")
        began = time.monotonic()
        try:
            write_tensors(_state(stage), session.attacks[row.row].prepare(target, knowledge, run=run), {})
        except NotDefinedError as error:
            return str(error)
        took = {"prepare": row.name, "seconds": round(time.monotonic() - began, 3)}
        append_jsonl(stage.folder / "timings.jsonl", took)
    return None
