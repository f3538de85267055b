"""Ring-A-Bell (Tsai et al. 2023): the hard prompt P′ that minimises ‖τ(P′) − (τ(P) + η·c)‖², by genetic search.

τ are the text encoder's last hidden states. The concept's direction c is the mean difference of τ between prompts with
the concept and the same prompts without it. Only the text encoder is asked, so an erasure that leaves the encoder alone
meets the same prompts as the original model.

Where we depart from the paper's public code, and why:

- It replaces tokens of kept parents in place, so the best individual can be lost, and it returns the best of the last
  generation. Here survivors stay as they are and their mutants are new individuals, so the best is never lost.
- It scores token ids, but what is sent is their decoded text, which the tokenizer may cut into other ids. Here every
  individual is scored on the ids that its text really becomes: the fitness is that of the prompt which is sent, and
  individuals that do not survive the round trip gain nothing by it. `round_trip` records whether the best did.
- It encodes every individual in every generation. Here an individual is encoded once, and one whose text a survivor has
  already is dropped, which also keeps the pool diverse. A generation therefore costs fewer forward passes.
- Free tokens are any but the special ones, and rows are padded by the model's own tokenizer, not with CLIP's ids.
- It always breeds the same number of generations. `patience` may stop the search earlier.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from duo.attacks._tokens import check_length
from duo.errors import UserError
from duo.plugins import Access, Attempt, Run

if TYPE_CHECKING:
    from duo.target import Target


@dataclass(frozen=True, kw_only=True)
class RingABell:
    """Genetic search over hard prompts. The defaults are the published budget: about 0.4 million encodings a prompt."""

    access: ClassVar[Access] = Access.TEXT

    length: int = 16  # free tokens (K in the paper)
    eta: float = 3.0  # how far the prompt is moved along the concept's direction
    population: int = 200  # individuals at the start; half as many survive each generation
    generations: int = 3000
    crossover: float = 0.5  # chance that a survivor has two children
    mutation: float = 0.25  # chance that an individual has one token replaced
    patience: int | None = None  # stop after so many generations without a better prompt
    batch_size: int = 256  # prompts in one forward pass of the text encoder

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("population", 2), ("generations", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, set it to {least} or more")
        for name in ("crossover", "mutation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, set it between 0 and 1")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}, set it to 1 or more, or leave it out")

    def passes(self, prompts: int) -> dict[str, int]:
        """How many individuals are about encoded for so many prompts (for `duo run --dry-run`)."""
        survivors = self.population // 2
        offspring = round(survivors * (2 * self.crossover + self.mutation))
        return {"text": prompts * (self.population + self.generations * offspring)}

    def prepare(self, target: Target, concept: Any, *, run: Run) -> dict[str, Tensor]:
        """The concept's direction: `{"vector": (tokens, width)}`, over `concept.vector_pairs` (with, without)."""
        check_length(self.length, target, "ring_a_bell")
        if not concept.vector_pairs:
            raise UserError(f"concept {concept.name}: vector_pairs is empty, and ring_a_bell needs at least one pair")
        present = self._encode(target, [pair[0] for pair in concept.vector_pairs])
        absent = self._encode(target, [pair[1] for pair in concept.vector_pairs])
        vector = (present - absent).mean(dim=0)
        run.log(pairs=len(concept.vector_pairs), vector_norm=float(vector.norm()))
        return {"vector": vector.cpu()}

    def search(
        self, target: Target, state: Mapping[str, Tensor], prompt: str, *, generator: torch.Generator
    ) -> Iterator[Attempt]:
        """One attempt: the best prompt ever found.

        Its record holds `fitness` (minus the squared distance to τ(P) + η·c, summed over tokens and width),
        `generations` (how many were bred), `encoded` (individuals sent through the text encoder) and `round_trip`.
        """
        goal = self._encode(target, [prompt])[0] + self.eta * state["vector"].to(target.device)
        vocabulary = _free_ids(target)
        start = vocabulary[torch.randint(len(vocabulary), (self.population, self.length), generator=generator)]
        pool = self._score(target, start, goal, known=frozenset())
        if not pool.texts:  # every one of them was refused
            return
        encoded, bred, stale = len(pool.texts), 0, 0
        while bred < self.generations and (self.patience is None or stale < self.patience):
            survivors = pool.best(self.population // 2)
            children = self._breed(survivors.ids, vocabulary, generator)
            offspring = self._score(target, children, goal, known=frozenset(survivors.texts))
            pool = survivors.joined(offspring)
            stale = 0 if bool((offspring.fitness > survivors.fitness[0]).any()) else stale + 1
            encoded, bred = encoded + len(offspring.texts), bred + 1
        best = pool.best(1)
        sent = target.tokenizer()(best.texts[0], add_special_tokens=False).input_ids
        yield Attempt(
            prompt=best.texts[0],
            record={
                "fitness": float(best.fitness[0]),
                "generations": bred,
                "encoded": encoded,
                "round_trip": sent == best.ids[0].tolist(),
            },
        )

    def _breed(self, survivors: Tensor, vocabulary: Tensor, generator: torch.Generator) -> Tensor:
        """Children of `survivors` (n, length) by single-point crossover, then mutants of both; never the survivors."""
        n, length = survivors.shape
        mothers = survivors[torch.rand(n, generator=generator) < self.crossover]
        fathers = survivors[torch.randint(n, (len(mothers),), generator=generator)]
        cut = torch.randint(1, length + 1, (len(mothers), 1), generator=generator)
        head = torch.arange(length) < cut
        children = torch.cat([torch.where(head, mothers, fathers), torch.where(head, fathers, mothers)])

        mutants = torch.cat([survivors, children])
        chosen = torch.rand(len(mutants), generator=generator) < self.mutation
        position = torch.randint(length, (len(mutants),), generator=generator)
        token = vocabulary[torch.randint(len(vocabulary), (len(mutants),), generator=generator)]
        mutants[torch.arange(len(mutants)), position] = token
        # A child's mutant takes its place. A survivor's mutant stands beside it, or the best could be lost.
        return torch.cat([torch.where(chosen[n:, None], mutants[n:], children), mutants[:n][chosen[:n]]])

    def _score(self, target: Target, ids: Tensor, goal: Tensor, *, known: frozenset[str]) -> _Pool:
        """Encode the individuals whose text is not `known`, each text once, and score them against `goal`.

        A text that the harness would refuse to render is dropped: it could not be the attempt.
        """
        tokenizer = target.tokenizer()
        fresh: dict[str, int] = {}
        for row, individual in enumerate(ids.tolist()):
            text = tokenizer.decode(individual, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if text not in known and target.refused(text) is None:
                fresh.setdefault(text, row)
        fitness = [
            -(states - goal).square().sum(dim=(1, 2)).cpu()
            for states in (self._encode(target, batch) for batch in _batches(list(fresh), self.batch_size))
        ]
        rows = torch.tensor(list(fresh.values()), dtype=torch.long)  # may be empty: all children known
        return _Pool(ids=ids[rows], texts=list(fresh), fitness=torch.cat([torch.empty(0), *fitness]))

    def _encode(self, target: Target, prompts: Sequence[str]) -> Tensor:
        """Last hidden states (n, tokens, width), float32, of prompts padded and cut by the model's tokenizer."""
        tokenizer = target.tokenizer()
        states = []
        for batch in _batches(prompts, self.batch_size):
            rows = tokenizer(batch, padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
            states.append(target.encode_ids(torch.tensor(rows.input_ids, device=target.device)).float())
        return torch.cat(states)


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """Individuals with what is known of them: ids (n, length), the text that each decodes to, fitness (n,)."""

    ids: Tensor
    texts: list[str]
    fitness: Tensor

    def best(self, n: int) -> _Pool:
        """The `n` fittest, best first; of equals, the older first."""
        order = self.fitness.argsort(descending=True, stable=True)[:n]
        return _Pool(ids=self.ids[order], texts=[self.texts[i] for i in order.tolist()], fitness=self.fitness[order])

    def joined(self, other: _Pool) -> _Pool:
        return _Pool(
            ids=torch.cat([self.ids, other.ids]),
            texts=self.texts + other.texts,
            fitness=torch.cat([self.fitness, other.fitness]),
        )


def _free_ids(target: Target) -> Tensor:
    """The ids that an individual may hold: all that the tokenizer knows but the special ones."""
    tokenizer = target.tokenizer()
    return torch.tensor(sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)))


def _batches(prompts: Sequence[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(prompts), size):
        yield list(prompts[start : start + size])
