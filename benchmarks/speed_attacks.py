"""Steps of the gradient attacks side by side with loops like those of their public code, on one model and in turn.

Written anew, and reduced to what takes time: what a peer's step does that ours does once, all together, or not at all.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from speed_training import SEED, Stamped
from torch import Tensor

from duo import load_concept, load_recipe
from duo.attacks._goal import Goal
from duo.attacks._tokens import Draft, Vocabulary, free_ids
from duo.attacks.concept_inversion import ConceptInversion
from duo.attacks.p4d import P4d, _Search
from duo.attacks.sneaky_prompt import SneakyPrompt
from duo.attacks.unlearn_diff_atk import UnlearnDiffAtk, to_simplex
from duo.concept import AttackConcept
from duo.losses import squared_error
from duo.plugins import Access, Family
from duo.target import Target

IMAGES, WORD = 8, "fire"
Timed = Callable[[], float]


def attacker(model: Family) -> tuple[Target, AttackConcept]:
    """The original model as a gradient attack may see it, and what its attacker knows of fire."""
    concept, recipe = load_concept("toybox-fire"), load_recipe("toybox-fire")
    prompts = list(concept.pairs.unsafe[:IMAGES])
    images = model.generate(prompts, seeds=range(IMAGES), sampling=recipe.sampling)
    known = AttackConcept(
        name=concept.name,
        words=tuple(concept.words),
        anchor=concept.anchor,
        vector_pairs=(),
        attack_images=images,
        attack_prompts=tuple(prompts),
        attack_captions=tuple(prompts),
        detector=concept.curator.make("judges", "curator"),
    )
    target = Target(
        model,
        access=Access.WEIGHTS,
        sampling=recipe.sampling,
        undefended=lambda: nullcontext(model),
        concept=known,
    )
    return target, known


def concept_inversion(model: Family, *, steps: int = 8) -> tuple[Timed, Timed]:
    """Ours, and textual inversion as the public code has it: each step encodes its images, trains the whole embedding
    table by AdamW and puts the other rows back."""
    target, concept = attacker(model)
    method = ConceptInversion(restarts=1, steps=steps + 1, initializers=(WORD,), checkpointing_steps=10**6)

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            run = Stamped(Path(folder))
            method.prepare(target, concept, run=run)
        return (run.times[steps] - run.times[0]) / steps

    def peer() -> float:
        encoder: Any = model._text_encoder
        table, tokenizer, process = encoder.get_input_embeddings().weight, model.tokenizer(), model.process
        before, place = table.detach().clone(), len(table) - 1  # stands for the new word
        generator = torch.Generator().manual_seed(SEED)
        table.requires_grad_(True)
        optimiser = torch.optim.AdamW([table], lr=5e-3, weight_decay=1e-2)
        start = time.perf_counter()
        try:
            for step in range(steps + 1):
                if step == 1:
                    start = time.perf_counter()
                rows = torch.randint(IMAGES, (method.batch_size,), generator=generator).tolist()
                with torch.no_grad():
                    x0 = model.latents([concept.attack_images[row] for row in rows], generator=None)
                ids = tokenizer(
                    [concept.attack_captions[row] for row in rows],
                    padding="max_length",
                    max_length=tokenizer.model_max_length,
                    truncation=True,
                    return_tensors="pt",
                ).input_ids
                ids[:, 1] = place
                t = process.sample_t(len(rows), low=0.0, high=1.0, generator=generator)
                eps = torch.randn(x0.shape, generator=generator)
                text = replace(model.unconditional(), embeds=encoder(ids)[0])
                prediction = model.predict(process.noised(x0, eps, t), t, text)
                loss = squared_error(prediction, process.target(x0, eps, t)).mean()
                loss.backward()
                optimiser.step()
                optimiser.zero_grad()
                with torch.no_grad():
                    table[:place] = before[:place]
                loss.item()
            return (time.perf_counter() - start) / steps
        finally:
            table.requires_grad_(False)
            table.data.copy_(before)
            table.grad = None

    return ours, peer


def p4d(model: Family, *, steps: int = 24) -> tuple[Timed, Timed]:
    """Ours asks the undefended model for many steps' predictions at once; the public code asks it every step."""
    target, concept = attacker(model)
    attack = P4d(length=8, keep_by="detector")
    vocabulary = Vocabulary.of(target, free_ids(target))
    goal = Goal(image=concept.attack_images[0], prompt=concept.attack_prompts[0], own=True)
    with torch.no_grad():
        x0 = target.latents([goal.image], generator=None)
    search = _Search(attack=attack, target=target, vocabulary=vocabulary, goal=goal, x0=x0)
    draft = Draft(words=(None,) * attack.length)

    def run(together: int) -> float:
        generator = torch.Generator().manual_seed(SEED)
        embeddings = vocabulary.rows[: attack.length].clone().requires_grad_()
        optimiser = torch.optim.AdamW([embeddings], lr=0.1, weight_decay=0.1)
        start = time.perf_counter()
        for _ in range(0, steps, together):
            for x_t, t, wanted in search._wanted(together, generator):
                embeddings.grad, _ = search._gradient(draft, embeddings, x_t, t, wanted)
                optimiser.step()
        return (time.perf_counter() - start) / steps

    return (lambda: run(steps)), (lambda: run(1))


def bisected(rows: Tensor, *, tolerance: float = 1e-5) -> Tensor:
    """The nearest points on the simplex of each row, by bisection of what is subtracted."""
    low, high = rows.min(dim=1, keepdim=True).values - 1, rows.max(dim=1, keepdim=True).values
    while float((high - low).max()) > tolerance:
        middle = (low + high) / 2
        over = (rows - middle).clamp(min=0).sum(dim=1, keepdim=True) > 1
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return (rows - low).clamp(min=0)


def unlearn_diff_atk(model: Family, *, steps: int = 24) -> tuple[Timed, Timed]:
    """Ours takes the gradient at the words that are sent and projects by sorting; the public code multiplies one-hot
    rows by the whole table, straight through, and bisects."""
    target, concept = attacker(model)
    attack, process = UnlearnDiffAtk(length=5), target.process
    vocabulary = Vocabulary.of(target, free_ids(target))
    with torch.no_grad():
        x0 = target.latents(concept.attack_images[:1], generator=None)
    draft = attack._draft(target, "a house on a hill")
    t = process.times(torch.tensor([0.5]))

    def start_of() -> tuple[Tensor, Any]:
        u = torch.full((attack.length, len(vocabulary.words)), 1 / len(vocabulary.words)).requires_grad_()
        return u, torch.optim.Adam([u], lr=0.01, weight_decay=0.1)

    def ours() -> float:
        generator = torch.Generator().manual_seed(SEED)
        (u, optimiser), start = start_of(), time.perf_counter()
        for _ in range(steps):
            u.grad, _ = attack._gradient(target, draft, vocabulary, u.detach(), x0, t[0], generator)
            optimiser.step()
            u.data = to_simplex(u.data)
        return (time.perf_counter() - start) / steps

    def peer() -> float:
        generator = torch.Generator().manual_seed(SEED)
        (u, optimiser), start = start_of(), time.perf_counter()
        for _ in range(steps):
            places = torch.multinomial(u.detach(), 1, generator=generator)
            hard = torch.zeros_like(u).scatter_(1, places, 1.0)
            rows = (hard + u - u.detach()) @ vocabulary.rows
            text = draft.conditioning(target, rows, sent=draft.text(vocabulary.texts(places[:, 0])))
            eps = torch.randn(x0.shape, generator=generator)
            prediction = target.predict(process.noised(x0, eps, t), t, text)
            loss = squared_error(prediction, process.target(x0, eps, t)).mean()
            (u.grad,) = torch.autograd.grad(loss, [u])
            u.grad.clamp_(-1, 1)
            optimiser.step()
            u.data = bisected(u.data)
            loss.item()
        return (time.perf_counter() - start) / steps

    return ours, peer


def sneaky_prompt(model: Family, *, queries: int = 8) -> Timed:
    """Image queries by the policy. The public loop does the same work for each, so there is no peer to be ahead of."""
    target, concept = attacker(model)
    attack = SneakyPrompt(queries=queries, clip="toybox", early_stop=False)
    with tempfile.TemporaryDirectory() as folder:
        state = attack.prepare(target, concept, run=Stamped(Path(folder)))

    def ours() -> float:
        start, before = time.perf_counter(), target.queries
        list(attack.search(target, state, concept.attack_prompts[0], generator=torch.Generator().manual_seed(SEED)))
        return (time.perf_counter() - start) / (target.queries - before)

    return ours
