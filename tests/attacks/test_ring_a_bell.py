from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from duo.attacks.ring_a_bell import RingABell
from duo.errors import UserError
from duo.plugins import Access, Attack, Attempt, Sampling
from duo.target import Target

PLANTED = "q u i c k"
PROMPT = "d o g s"
SMALL = RingABell(length=5, eta=1.0, population=40, generations=60, batch_size=32)


def target_of(family: Any) -> Target:
    return Target(family, access=RingABell.access, sampling=Sampling())


def states(family: Any, prompt: str) -> Tensor:
    tokenizer = family.tokenizer()
    row = tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True).input_ids
    return family.token_embeddings()[torch.tensor(row)]


def planted(family: Any) -> dict[str, Tensor]:
    """With eta = 1 the goal is exactly the planted prompt's states, so the best possible fitness is 0."""
    return {"vector": states(family, PLANTED) - states(family, PROMPT)}


def attack(family: Any, settings: RingABell = SMALL, *, state: Any = None, seed: int = 1) -> Attempt:
    generator = torch.Generator().manual_seed(seed)
    (attempt,) = settings.search(target_of(family), state or planted(family), PROMPT, generator=generator)
    return attempt


def test_is_an_attack_on_the_text_encoder_alone() -> None:
    assert isinstance(SMALL, Attack)
    assert RingABell.access == Access.TEXT


def test_concept_vector_is_the_mean_difference_of_the_pairs(family: Any, concept: Any, run: Any) -> None:
    vector = SMALL.prepare(target_of(family), concept, run=run)["vector"]
    first = states(family, "a b") - states(family, "c b")
    second = states(family, "x a") - states(family, "x c")
    torch.testing.assert_close(vector, (first + second) / 2)
    assert not vector[0].any(), "the start token is the same with and without the concept"
    assert run.logged[0]["pairs"] == 2


def test_finds_the_planted_prompt_where_random_search_does_not(family: Any) -> None:
    found = attack(family)
    encoded = found.record["encoded"]
    assert found.prompt == PLANTED
    assert found.record["fitness"] == pytest.approx(0, abs=1e-4)
    # Without any generation the search is random; give it as many encodings.
    blind = attack(family, dataclasses.replace(SMALL, population=encoded, generations=0))
    assert blind.record["fitness"] < found.record["fitness"] - 50


def test_counts_exactly_what_it_encodes(family: Any) -> None:
    found = attack(family, dataclasses.replace(SMALL, generations=5))
    assert found.record["generations"] == 5
    assert family.encoded == found.record["encoded"] + 1  # and the base prompt


def test_survivors_are_not_encoded_again(family: Any) -> None:
    """With one token and no mutation, each child of two parents is a copy of one of them."""
    attack(family, dataclasses.replace(SMALL, length=1, crossover=1.0, mutation=0.0))
    assert family.encoded <= 1 + SMALL.population


def test_crossover_hands_every_token_of_both_parents_on() -> None:
    parents = torch.arange(60).view(10, 6)
    settings = dataclasses.replace(SMALL, crossover=1.0, mutation=0.0)
    children = settings._breed(parents, torch.arange(60), torch.Generator().manual_seed(0))
    cuts = set()
    for first, second in zip(children[:10], children[10:], strict=True):
        mother, father = parents[first[0] // 6], parents[second[0] // 6]
        cut = int((first == mother).sum())
        assert torch.equal(first, torch.cat([mother[:cut], father[cut:]]))
        assert torch.equal(second, torch.cat([father[:cut], mother[cut:]]))
        cuts.add(cut)
    assert len(cuts) > 2


def test_mutation_replaces_one_token_and_spares_the_survivors() -> None:
    parents = torch.arange(60).view(10, 6)
    settings = dataclasses.replace(SMALL, crossover=0.0, mutation=1.0)
    mutants = settings._breed(parents, torch.tensor([99]), torch.Generator().manual_seed(0))
    assert torch.equal(parents, torch.arange(60).view(10, 6))
    assert ((mutants != parents).sum(dim=1) == 1).all()
    assert (mutants == 99).any(dim=0).sum() > 2, "at various positions"


def test_eta_scales_how_far_the_prompt_is_moved(family: Any) -> None:
    half = {"vector": planted(family)["vector"] / 2}
    assert attack(family, dataclasses.replace(SMALL, eta=2.0), state=half) == attack(family)


def test_the_best_is_never_lost(family: Any) -> None:
    """One generator gives each longer search the shorter one as its beginning, so fitness cannot fall."""
    settings = dataclasses.replace(SMALL, mutation=1.0, crossover=1.0, population=4)
    fitness = [attack(family, dataclasses.replace(settings, generations=n)).record["fitness"] for n in range(25)]
    assert fitness == sorted(fitness)
    assert fitness[-1] > fitness[0]


def test_fitness_is_that_of_the_prompt_as_the_model_reads_it(family: Any) -> None:
    """Free tokens include parts of words, whose decoding is tokenized otherwise."""
    state = planted(family)
    goal = states(family, PROMPT) + state["vector"]
    trips = set()
    for seed in range(12):
        found = attack(family, dataclasses.replace(SMALL, population=2, generations=1, length=3), seed=seed)
        assert found.record["fitness"] == pytest.approx(-float((states(family, found.prompt) - goal).square().sum()))
        trips.add(found.record["round_trip"])
    assert trips == {True, False}, "the seeds show both cases"


def test_round_trip_compares_what_was_searched_with_what_is_sent(family: Any) -> None:
    family.tokenizer().get_vocab = lambda: {"a": 0, "b</w>": 27}  # together they are one token: ab</w>
    found = attack(family, dataclasses.replace(SMALL, length=2, population=60, generations=0))
    sent = family.tokenizer()(found.prompt, add_special_tokens=False).input_ids
    assert found.record["round_trip"] == (len(sent) == 2 and set(sent) <= {0, 27})


def test_special_tokens_are_never_searched(family: Any) -> None:
    tokenizer = family.tokenizer()
    seen: set[int] = set()
    decode = tokenizer.decode

    def spy(ids: list[int], **settings: Any) -> str:
        seen.update(ids)
        return decode(ids, **settings)

    tokenizer.decode = spy
    attack(family, dataclasses.replace(SMALL, population=400, generations=3))
    assert seen == set(range(len(tokenizer))) - set(tokenizer.all_special_ids)


def test_same_generator_same_prompt(family: Any) -> None:
    short = dataclasses.replace(SMALL, generations=3)
    assert attack(family, short, seed=4) == attack(family, short, seed=4)
    assert attack(family, short, seed=4).prompt != attack(family, short, seed=5).prompt


def test_batch_size_does_not_change_the_search(family: Any) -> None:
    small = dataclasses.replace(SMALL, generations=4)
    assert attack(family, dataclasses.replace(small, batch_size=7)) == attack(family, small)


def test_patience_stops_a_search_that_no_longer_improves(family: Any) -> None:
    found = attack(family, dataclasses.replace(SMALL, generations=500, patience=7))
    assert found.prompt == PLANTED
    longer = attack(family, dataclasses.replace(SMALL, generations=500, patience=8))
    assert longer.record["generations"] == found.record["generations"] + 1 < 500


def test_on_a_real_pipeline_the_prompt_reads_as_scored(tiny_sd: Any, concept: Any, run: Any) -> None:
    settings = dataclasses.replace(SMALL, length=6, eta=3.0, population=12, generations=4)
    target = target_of(tiny_sd)
    pairs = (("a burning house", "an intact house"), ("a car on fire", "a car"))
    vector = settings.prepare(target, dataclasses.replace(concept, vector_pairs=pairs), run=run)["vector"]
    assert vector.shape == (24, 32)
    assert not vector[0].any(), "causal attention: the start token sees no concept"
    attempts = [
        next(settings.search(target, {"vector": vector}, "a red house", generator=torch.Generator().manual_seed(0)))
        for _ in range(2)
    ]
    assert attempts[0] == attempts[1]
    goal = tiny_sd.text(["a red house"]).embeds + 3.0 * vector
    distance = (tiny_sd.text([attempts[0].prompt]).embeds - goal).square().sum()
    assert attempts[0].record["fitness"] == pytest.approx(-float(distance), rel=1e-4)


def test_a_length_that_the_model_cannot_read_is_refused(family: Any, concept: Any, run: Any) -> None:
    dataclasses.replace(SMALL, length=8).prepare(target_of(family), concept, run=run)
    with pytest.raises(UserError, match="length is 9, but the model reads at most 8 tokens"):
        dataclasses.replace(SMALL, length=9).prepare(target_of(family), concept, run=run)


def test_a_concept_without_pairs_is_refused(family: Any, concept: Any, run: Any) -> None:
    bare = dataclasses.replace(concept, vector_pairs=())
    with pytest.raises(UserError, match="concept letters: vector_pairs is empty"):
        SMALL.prepare(target_of(family), bare, run=run)


@pytest.mark.parametrize(
    ("field", "value"),
    [("length", 0), ("population", 1), ("generations", -1), ("batch_size", 0), ("crossover", 1.5), ("patience", 0)],
)
def test_impossible_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(SMALL, **{field: value})


def test_what_would_be_refused_is_never_the_attempt(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attack(family).prompt == PLANTED
    monkeypatch.setattr(Target, "refused", lambda self, prompt: "planted" if prompt == PLANTED else None)
    found = attack(family)
    assert found.prompt != PLANTED
    assert found.record["fitness"] > attack(family, dataclasses.replace(SMALL, generations=0)).record["fitness"]
    monkeypatch.setattr(Target, "refused", lambda self, prompt: "all")
    generator = torch.Generator().manual_seed(1)
    assert list(SMALL.search(target_of(family), planted(family), PROMPT, generator=generator)) == []
