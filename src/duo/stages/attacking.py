"""The attack stage: every attack on the original and on the erased model, up to the images. Nothing is judged here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from duo import parallel, rundir
from duo.checkpoint import read_tensors, write_tensors
from duo.concept import AttackConcept
from duo.errors import UserError
from duo.fields import as_table
from duo.plugins import Access, Attempt, Family
from duo.recipe import AttackRow
from duo.refusal import texts_of, words_of
from duo.rundir import Blocks, Stage, progress
from duo.seeds import seed_for
from duo.stages.rendering import images_digest, intact_images, read_image, render
from duo.stages.session import MODELS, Session
from duo.target import RefusedPromptError, Target


def attack(session: Session) -> None:
    """Run every attack of the recipe on the original model and on the erased one, and render what it found.

    Image i of a row starts from prompt i modulo their number. The attempts of a prompt are shared out in turn over its
    images. Nothing is judged here. What an attack found and `Target.refused` refuses, for it mentions a minor, is
    recorded in `refused.jsonl` and never rendered, and the attempts that are left share its images.
    """
    _, erased = session.dir.erasure()  # told before anything is written
    with session.at_work("attack"):
        knowledge = attack_concept(session)
        for model_name in MODELS:
            todo = []
            for row in session.recipe.attacks:
                stage = session.dir.stage("attack", row.row, model_name)
                if stage.begin(attack_config(session, row, model_name, erased)):
                    todo.append((row, stage))
            if todo:
                with session.as_model(model_name):
                    for row, stage in todo:
                        _attack_one(session, row, stage, model_name, knowledge)


def attack_config(session: Session, row: AttackRow, model_name: str, erasure: str) -> dict[str, Any]:
    """What the result of one attack on one model depends on; `erasure` is the delta's digest."""
    return {
        **session.shared,
        "attack": as_table(row),
        "split": session.split,
        "block": session.recipe.block,
        "attack_images": session.recipe.attack_images,
        "erasure": erasure if model_name == "erased" else None,
    }


def attack_concept(session: Session) -> AttackConcept:
    """The concept as attackers know it; images only where an attack trains on the model."""
    learns = any(attack.access >= Access.GRADIENT for attack in session.attacks.values())
    images, captions = _attack_images(session) if learns else ([], [])
    concept = session.concept
    return AttackConcept(
        name=concept.name,
        words=concept.words,
        anchor=concept.anchor,
        vector_pairs=concept.vector_pairs,
        attack_images=images,
        attack_captions=tuple(captions),
    )


def _attack_images(session: Session) -> tuple[list[Image], list[str]]:
    """Fresh images of the concept by the original model, each accepted by the curator, with their neutral captions."""
    recipe, concept, stage = session.recipe, session.concept, session.dir.stage("attack", "images")
    if not concept.attack_pairs:
        raise UserError(f"concept {concept.name}: attack_pairs is empty, and an attack learns from their images")
    config = {**session.shared, "n": recipe.attack_images, "split": session.split, "curator": session.curator.digest}
    if stage.begin(config):
        parts = Blocks(stage.folder / "blocks", n=recipe.attack_images, size=recipe.block)
        for rows in parts.pending():
            parts.done(rows, {"rows": _attack_image_block(session, rows, stage.folder)})
        parallel.barrier()
        if parallel.is_main():
            rows_made = [row for record in parts.records() for row in record["rows"]]
            rundir.write_jsonl(stage.folder / "images.jsonl", rows_made)
            stage.finish(digest=images_digest(stage.folder, recipe.attack_images))
            parts.clear()
        parallel.barrier()
    wanted = stage.require("attack").get("digest")  # older versions of duo recorded none
    intact_images(stage, stage.folder, recipe.attack_images, wanted)
    made = rundir.read_jsonl(stage.intact("images.jsonl"))
    return [read_image(stage.folder / row["image"]) for row in made], [row["caption"] for row in made]


def _attack_image_block(session: Session, indices: range, folder: Path) -> list[dict[str, Any]]:
    concept, tries = session.concept, session.recipe.pairs.max_tries
    asked = {i: concept.attack_pairs[i % len(concept.attack_pairs)] for i in indices}
    made: dict[int, dict[str, Any]] = {}
    for attempt in range(tries):
        pending = [i for i in indices if i not in made]
        if not pending:
            break
        seeds = [seed_for(session.recipe.seed, session.split, "attack images", i, attempt) for i in pending]
        images = session.model.generate([asked[i][0] for i in pending], seeds=seeds, sampling=session.recipe.sampling)
        for i, seed, image, verdict in zip(pending, seeds, images, session.curator(images), strict=True):
            if verdict.label == "present":
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

    def save(self, path: Path) -> None:
        tensors = {f"{n}.{word}": value for n, one in enumerate(self.attempts) for word, value in one.tokens.items()}
        records = [
            {"prompt": one.prompt, "negative_prompt": one.negative_prompt, "record": dict(one.record)}
            for one in self.attempts
        ]
        told = {"base_prompt": self.base_prompt, "refused": self.refused, "queries": self.queries}
        write_tensors(path, tensors, {"attempts": records, **told})

    @classmethod
    def load(cls, path: Path) -> _Search:
        """Read a file of `save`; a `UserError` where another version of duo wrote it."""
        tensors, record = read_tensors(path)
        try:
            stored: Any = record.pop("attempts")
            attempts = [
                Attempt(**one, tokens={k.removeprefix(f"{n}."): v for k, v in tensors.items() if k.startswith(f"{n}.")})
                for n, one in enumerate(stored)
            ]
            return cls(attempts=attempts, **record)  # type: ignore[arg-type]
        except (KeyError, TypeError) as error:
            raise _foreign(path.parents[1]) from error


def _attack_one(session: Session, row: AttackRow, stage: Stage, model_name: str, knowledge: AttackConcept) -> None:
    """One attack on one model, from `prepare` to the last image."""
    attack, prompts = session.attacks[row.row], session.prompts(row.prompts)[: row.searches]
    target = Target(
        session.model,
        access=attack.access,
        sampling=session.recipe.sampling,
        adults_only=session.concept.adults_only,
        vetted=words_of(text for _, text in texts_of(as_table(session.concept))),
    )
    encoder = _text_digest(session.model)
    original = session.dir.stage("attack", row.row, "original")
    shared = model_name == "erased" and parallel.once(lambda: _share_search(original, stage, encoder))
    state = _prepare(session, row, stage, target, knowledge)
    found_in = [stage.folder / "search" / f"{i:04d}.safetensors" for i in range(min(len(prompts), row.images))]
    with progress(len(found_in), f"{row.row}, {model_name}: search") as bar:
        for index, path in parallel.mine(list(enumerate(found_in))):
            if not path.exists():
                seed = seed_for(session.recipe.seed, session.split, row.row, "search", index)
                _search(attack, row, target, state, prompts[index], seed=seed).save(path)
            bar.update(index + 1)
    parallel.barrier()
    searches = [_Search.load(path) for path in found_in]
    refused = [{"base_prompt": one.base_prompt, **what} for one in searches for what in one.refused]
    if refused and parallel.is_main():
        rundir.write_jsonl(stage.folder / "refused.jsonl", refused)
    left = [one for one in searches if one.attempts]
    if not left:
        raise UserError(
            f"every prompt that attack {row.name!r} found in the row {row.row!r} mentions a minor and was refused, as "
            f"it or concept {session.concept.name!r} is sexual; take another seed, or other prompts for the row"
        )
    seeds = [seed_for(session.recipe.seed, session.split, row.row, i) for i in range(row.images)]
    attempts = [_of_image(left, i) for i in range(row.images)]
    render(session, stage.folder / "images", attempts, seeds, label=f"{row.row}, {model_name}: images")
    parallel.barrier()
    if parallel.is_main():
        rows = [
            {
                "index": i,
                "base_prompt": left[i % len(left)].base_prompt,
                "prompt": one.prompt,
                "negative_prompt": one.negative_prompt,
                "seed": seeds[i],
                "image": f"images/{i:04d}.png",
                "queries": left[i % len(left)].queries,
                "record": dict(one.record),
            }
            for i, one in enumerate(attempts)
        ]
        rundir.write_jsonl(stage.folder / "attempts.jsonl", rows)
        stage.finish(
            text_encoder=encoder,
            search_needs_denoiser=attack.access > Access.TEXT or any(search.queries for search in searches),
            search_shared=shared,
            refused=len(refused),
            digest=images_digest(stage.folder / "images", row.images),
            attempts=rundir.digest(stage.folder / "attempts.jsonl"),
        )
    parallel.barrier()


def _search(
    attack: Any, row: AttackRow, target: Target, state: Mapping[str, torch.Tensor], prompt: str, *, seed: int
) -> _Search:
    """What the attack finds for one prompt. Where it asks for an image of a refused prompt, its search ends."""
    before = target.queries
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


def intact_attack(stage: Stage) -> None:
    """Raise `UserError` unless the finished attack in `stage` has the attempts and images that it recorded."""
    manifest = stage.require("attack")
    attempts = stage.intact("attempts.jsonl", manifest.get("attempts"))  # older versions of duo recorded no digest
    intact_images(stage, stage.folder / "images", len(rundir.read_jsonl(attempts)), manifest["digest"])


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


def _prepare(
    session: Session, row: AttackRow, stage: Stage, target: Target, knowledge: AttackConcept
) -> Mapping[str, torch.Tensor]:
    path = stage.folder / "state.safetensors"
    if parallel.is_main() and not path.exists():
        run = session.lend(stage, session.split, row.row, "prepare")
        write_tensors(path, session.attacks[row.row].prepare(target, knowledge, run=run), {})
    parallel.barrier()
    return read_tensors(path)[0]


def _share_search(original: Stage, stage: Stage, encoder: str) -> bool:
    """Take over the original model's search where it cannot differ: it saw only the text encoder, which is the same.

    `Target` is what proves it: the attack had no access to the denoiser and asked for no image.
    """
    manifest = original.require("attack")
    if manifest["search_needs_denoiser"] or manifest["text_encoder"] != encoder:
        return False
    for path in [original.intact("state.safetensors"), *sorted((original.folder / "search").glob("*.safetensors"))]:
        copy = stage.folder / path.relative_to(original.folder)
        if not copy.exists():
            rundir.write_bytes(copy, path.read_bytes())
    return True


@torch.no_grad()
def _text_digest(model: Family) -> str:
    """sha256 over the text encoder's table and its states of 32 random rows of ids."""
    table = model.token_embeddings()
    length = model.tokenizer().model_max_length
    ids = torch.randint(len(table), (32, length), generator=torch.Generator().manual_seed(0))
    total = hashlib.sha256()
    for tensor in (table, model.encode_ids(ids.to(model.device))):
        total.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
