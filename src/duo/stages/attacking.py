"""The attack stage: every attack on the original and on the erased model, up to the images. Nothing is judged here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from duo import rundir
from duo.checkpoint import read_tensors, write_tensors
from duo.concept import AttackConcept
from duo.errors import UserError
from duo.fields import as_table
from duo.plugins import Access, Attempt, Family
from duo.recipe import AttackRow
from duo.rundir import Blocks, Stage, progress
from duo.stages.rendering import images_digest, read_image, render
from duo.stages.session import MODELS, Session, seed_for
from duo.target import Target


def attack(session: Session) -> None:
    """Run every attack of the recipe on the original model and on the erased one, and render what it found.

    Image i of a row starts from prompt i modulo their number. The attempts of a prompt are shared out in turn over its
    images. Nothing is judged here.
    """
    with session.at_work("attack"):
        erased = session.dir.stage("erase").require("erase")["digest"]
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
        rows_made = [row for record in parts.records() for row in record["rows"]]
        rundir.write_jsonl(stage.folder / "images.jsonl", rows_made)
        stage.finish()
        parts.clear()
    made = rundir.read_jsonl(stage.folder / "images.jsonl")
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
            f"pairs.max_tries = {tries}; mend attack_pairs or the judge, or raise pairs.max_tries, in a new --out"
        )
    return [made[i] for i in indices]


@dataclass(frozen=True)
class _Search:
    """What an attack found for one prompt, and the images that it asked for on the way."""

    attempts: list[Attempt]
    queries: int

    def save(self, path: Path) -> None:
        tensors = {f"{n}.{word}": value for n, one in enumerate(self.attempts) for word, value in one.tokens.items()}
        records = [
            {"prompt": one.prompt, "negative_prompt": one.negative_prompt, "record": dict(one.record)}
            for one in self.attempts
        ]
        write_tensors(path, tensors, {"attempts": records, "queries": self.queries})

    @classmethod
    def load(cls, path: Path) -> _Search:
        tensors, record = read_tensors(path)
        stored: Any = record["attempts"]
        attempts = [
            Attempt(**one, tokens={k.removeprefix(f"{n}."): v for k, v in tensors.items() if k.startswith(f"{n}.")})
            for n, one in enumerate(stored)
        ]
        return cls(attempts, int(record["queries"]))  # type: ignore[call-overload]


def _attack_one(session: Session, row: AttackRow, stage: Stage, model_name: str, knowledge: AttackConcept) -> None:
    """One attack on one model, from `prepare` to the last image."""
    attack, prompts = session.attacks[row.row], session.prompts(row.prompts)[: row.searches]
    target = Target(session.model, access=attack.access, sampling=session.recipe.sampling)
    encoder = _text_digest(session.model)
    shared = model_name == "erased" and _share_search(session.dir.stage("attack", row.row, "original"), stage, encoder)
    state = _prepare(session, row, stage, target, knowledge)
    used = range(min(len(prompts), row.images))
    searches = []
    with progress(len(used), f"{row.row}, {model_name}: search") as bar:
        for index in used:
            path = stage.folder / "search" / f"{index:04d}.safetensors"
            if not path.exists():
                before = target.queries
                generator = torch.Generator().manual_seed(
                    seed_for(session.recipe.seed, session.split, row.row, "search", index)
                )
                found = list(attack.search(target, state, prompts[index], generator=generator))
                if not found:
                    raise UserError(f"attack {row.name!r} yielded nothing for the prompt {prompts[index]!r}")
                _Search(found, target.queries - before).save(path)
            searches.append(_Search.load(path))
            bar.update(index + 1)
    seeds = [seed_for(session.recipe.seed, session.split, row.row, i) for i in range(row.images)]
    attempts = [_of_image(searches, i) for i in range(row.images)]
    render(session, stage.folder / "images", attempts, seeds, label=f"{row.row}, {model_name}: images")
    rundir.write_jsonl(
        stage.folder / "attempts.jsonl",
        [
            {
                "index": i,
                "base_prompt": prompts[i % len(prompts)],
                "prompt": one.prompt,
                "negative_prompt": one.negative_prompt,
                "seed": seeds[i],
                "image": f"images/{i:04d}.png",
                "queries": searches[i % len(searches)].queries,
                "record": dict(one.record),
            }
            for i, one in enumerate(attempts)
        ],
    )
    stage.finish(
        text_encoder=encoder,
        search_needs_denoiser=attack.access > Access.TEXT or any(search.queries for search in searches),
        search_shared=shared,
        digest=images_digest(stage.folder / "images", row.images),
    )


def _of_image(searches: Sequence[_Search], index: int) -> Attempt:
    attempts = searches[index % len(searches)].attempts
    return attempts[index // len(searches) % len(attempts)]


def _prepare(
    session: Session, row: AttackRow, stage: Stage, target: Target, knowledge: AttackConcept
) -> Mapping[str, torch.Tensor]:
    path = stage.folder / "state.safetensors"
    if not path.exists():
        run = session.lend(stage, session.split, row.row, "prepare")
        write_tensors(path, session.attacks[row.row].prepare(target, knowledge, run=run), {})
    return read_tensors(path)[0]


def _share_search(original: Stage, stage: Stage, encoder: str) -> bool:
    """Take over the original model's search where it cannot differ: it saw only the text encoder, which is the same.

    `Target` is what proves it: the attack had no access to the denoiser and asked for no image.
    """
    manifest = original.require("attack")
    if manifest["search_needs_denoiser"] or manifest["text_encoder"] != encoder:
        return False
    for path in [original.folder / "state.safetensors", *sorted((original.folder / "search").glob("*.safetensors"))]:
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
