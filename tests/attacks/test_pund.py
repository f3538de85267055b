from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny_flow
from duo.attacks.pund import Pund
from duo.conditioning import Conditioning
from duo.errors import UserError
from duo.families.flux import Flux
from duo.families.sd3 import Sd3
from duo.plugins import Access, Attack, Sampling
from duo.target import AccessError, Target

LEVEL, NEUTRAL = 0.4, 0.1  # of the concept's images, and of every column of a text without the learned word
ONE_STEP = Pund(epochs=1, bins=1, steps_per_bin=1, restarts=1, keep_every=1, probes=4, template="<c>")
QUICK = Pund(
    epochs=40, bins=2, steps_per_bin=2, restarts=1, keep_every=1, probes=4, learning_rate=0.05, erase_every=None
)


class Forbidden:
    """The model under attack, of which nothing may be asked."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the attack asked the model under attack for {name}")


def target_of(original: Any, *, access: Access = Pund.access) -> Target:
    @contextmanager
    def undefended() -> Iterator[Any]:
        yield original

    return Target(Forbidden(), access=access, sampling=Sampling(), undefended=undefended)  # type: ignore[arg-type]


@pytest.fixture
def crossed(family: Any) -> Any:
    """The small family with a cross-attention: one frozen matrix, from the text to what is taken off x_t.

    As x_t = x0 + eps, the error at any noise is x0 less the text's image.
    """

    class Crossed(type(family)):  # type: ignore[misc]
        component = "unet"

        def __init__(self) -> None:
            super().__init__()
            layer = nn.Linear(self.projection.shape[0], 8, bias=False)
            layer.weight = nn.Parameter(self.projection.T.clone(), requires_grad=False)
            self.denoiser = nn.Sequential(layer)
            self.weights: list[Tensor] = []  # at each prediction
            self.words: list[Tensor] = []  # that texts were read with
            self.rows = 0  # predicted

        def layers(self, scope: str) -> dict[str, nn.Module]:
            assert scope == "cross_attention"
            return {"0": self.denoiser[0]}

        def text(self, prompts: Sequence[str], *, tokens: Mapping[str, Tensor] | None = None) -> Conditioning:
            assert all(("<c>" in prompt.split()) == bool(tokens) for prompt in prompts)
            if tokens:
                self.words.append(tokens["<c>"].detach().clone())
                return super().text(prompts, tokens=tokens)
            self.prompts += prompts
            return Conditioning(embeds=torch.full((len(prompts), 1, self.projection.shape[0]), NEUTRAL))

        def predict(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
            self.rows += len(x_t)
            self.weights.append(self.denoiser[0].weight.detach().clone())
            return x_t - self.denoiser(text.embeds.mean(dim=1)).view_as(x_t)

    return Crossed()


def error(weight: Tensor, word: Tensor) -> Tensor:
    return (LEVEL - weight @ word.mean(dim=0)).square().mean()


def word_of(state: Mapping[str, Tensor]) -> Tensor:
    """The word of the only restart."""
    (word,) = state.values()
    return word


def test_asks_for_embeddings_alone_and_owns_the_undefended_model(crossed: Any, concept: Any, run: Any) -> None:
    assert isinstance(QUICK, Attack)
    assert (Pund.access, Pund.uses_undefended, Pund.learns_from_images) == (Access.TEXT, True, True)
    ONE_STEP.prepare(target_of(crossed), concept, run=run)  # of a model under attack that answers nothing
    without = Target(crossed, access=Access.WEIGHTS, sampling=Sampling())
    with pytest.raises(AccessError, match="uses_undefended"):
        ONE_STEP.prepare(without, concept, run=run)


def test_the_first_step_of_the_first_player_by_hand(crossed: Any, concept: Any, run: Any) -> None:
    """AdamW's first step is the gradient's sign times the rate, after the decay; dividing the loss changes no sign."""
    start = crossed.token_embeddings()[crossed.tokenizer().convert_tokens_to_ids("ab</w>")]
    weight = crossed.denoiser[0].weight
    gradient = -2 / 8 * weight.T @ (LEVEL - weight @ start)
    expected = (1 - 0.1 * 0.1) * start - 0.1 * gradient.sign()
    learned = word_of(ONE_STEP.prepare(target_of(crossed), concept, run=run))
    torch.testing.assert_close(learned, expected[None], atol=1e-5, rtol=0)
    assert run.logged[0]["loss"] == pytest.approx(float(error(weight, start[None])), rel=1e-4)


def test_the_first_step_of_the_second_player_by_hand(crossed: Any, concept: Any, run: Any) -> None:
    settings = dataclasses.replace(ONE_STEP, epochs=2, erase_every=1, erase_learning_rate=1e-2)
    before = crossed.denoiser[0].weight
    settings.prepare(target_of(crossed), concept, run=run)
    word = crossed.words[1].mean(dim=0)  # after the first player's step; the second's only text with the word
    difference = before @ word - before @ torch.full_like(word, NEUTRAL)
    assert run.logged[0]["erased"] == pytest.approx(float(difference.square().mean()), rel=1e-4)
    expected = before - 1e-2 * torch.outer(difference, word).sign()
    search, neutral, erase, again = crossed.weights[:4]
    assert all(torch.equal(one, before) for one in (search, neutral, erase))
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)
    assert "erased" not in run.logged[1], "the last word is not erased"


def test_the_weights_are_put_back(crossed: Any, concept: Any, run: Any) -> None:
    parameter, data = crossed.denoiser[0].weight, crossed.denoiser[0].weight.data
    kept = data.clone()
    settings = dataclasses.replace(QUICK, erase_every=5, erase_learning_rate=1e-2)
    settings.prepare(target_of(crossed), concept, run=run)
    assert not torch.equal(crossed.weights[-len(crossed.weights) // 2], kept)
    assert crossed.denoiser[0].weight is parameter
    assert parameter.data is not None
    assert parameter.data.data_ptr() == data.data_ptr()
    assert torch.equal(parameter.data, kept)
    assert not parameter.requires_grad
    assert parameter.grad is None


def test_without_erasing_it_is_textual_inversion(crossed: Any, concept: Any, run: Any) -> None:
    learned = word_of(QUICK.prepare(target_of(crossed), concept, run=run))
    weight = crossed.denoiser[0].weight
    start = crossed.token_embeddings()[crossed.tokenizer().convert_tokens_to_ids("ab</w>")]
    assert error(weight, learned) < 0.05 * error(weight, start[None])
    assert all(torch.equal(one, weight) for one in crossed.weights)
    assert not any("erased" in row for row in run.logged)


def test_kept_is_the_candidate_that_does_best_on_both_states_of_the_surrogate(
    crossed: Any, concept: Any, run: Any
) -> None:
    settings = dataclasses.replace(QUICK, epochs=9, learning_rate=1.5, erase_every=2, erase_learning_rate=2e-2)
    learned = word_of(settings.prepare(target_of(crossed), concept, run=run))
    undefended = crossed.denoiser[0].weight
    candidates = crossed.words[-9:]
    surrogate = crossed.weights[-11]  # the last prediction before the nine and the neutral one of the undefended
    assert not torch.equal(surrogate, undefended)
    neutral = torch.full_like(candidates[0], NEUTRAL)
    scores = [
        sum(float(error(weight, one) / error(weight, neutral)) for weight in (surrogate, undefended)) / 2
        for one in candidates
    ]
    best = scores.index(min(scores))
    assert best < 8, "a test of the choice needs one that is not the last"
    assert torch.equal(learned, candidates[best])
    assert run.logged[-1] == {
        "restart": "restart 1 (ab)",
        "chosen_epoch": best + 1,
        "score": pytest.approx(scores[best], rel=1e-4),
    }


@pytest.mark.parametrize(
    "changed", [{}, {"epochs": 7, "keep_every": 3, "erase_every": 2}, {"restarts": 2, "batch_size": 3, "probes": 11}]
)
def test_passes_are_those_that_are_made(crossed: Any, concept: Any, run: Any, changed: dict[str, Any]) -> None:
    settings = dataclasses.replace(QUICK, **{"epochs": 3, **changed})
    settings.prepare(target_of(crossed), concept, run=run)
    assert crossed.rows == settings.passes(6)["denoiser"]
    trained = sum(settings.batch_size * 2 * 2 * ("loss" in row) + 2 * ("erased" in row) for row in run.logged)
    assert trained == settings.passes(6)["trained"]


def test_restarts_have_words_seeds_attempts_and_files_of_their_own(crossed: Any, concept: Any, run: Any) -> None:
    settings = dataclasses.replace(QUICK, epochs=2, restarts=3, vectors=2)
    concept = dataclasses.replace(concept, words=("a ab", "c"))
    state = settings.prepare(target_of(crossed), concept, run=run)
    assert list(state) == ["restart 1 (ab)", "restart 2 (c)", "restart 3 (ab)"], "the last word of each"
    assert not torch.equal(state["restart 1 (ab)"], state["restart 3 (ab)"])
    found = list(settings.search(target_of(crossed), state, "a red house", generator=torch.Generator()))
    assert [one.variant for one in found] == list(state)
    assert {one.prompt for one in found} == {"a red house <c>"}
    for name, one in zip(("", "-2", "-3"), found, strict=True):
        assert torch.equal(one.tokens["<c>"], state[one.variant])
        assert torch.equal(load_file(run.folder / f"learned_embeds{name}.safetensors")["<c>"], one.tokens["<c>"])
    given = dataclasses.replace(settings, initializers=("x y",)).prepare(target_of(crossed), concept, run=run)
    assert list(given) == [f"restart {number} (x y)" for number in (1, 2, 3)]
    with pytest.raises(UserError, match="pund: initializer 'zzq' is no token of this model"):
        dataclasses.replace(settings, initializers=("zzq",)).prepare(target_of(crossed), concept, run=run)


def test_both_players_go_by_the_same_texts(crossed: Any, concept: Any, run: Any) -> None:
    settings = dataclasses.replace(QUICK, template="{} <c> now", erase_every=3, epochs=30)
    settings.prepare(target_of(crossed), concept, run=run)
    things = ("a tree", "a car", "a boat")
    assert set(crossed.prompts) == {f"{one} <c> now" for one in things} | {f"{one} now" for one in things}


@pytest.mark.parametrize("killed_at", [2, 5, 6, 9])
def test_a_killed_run_goes_on_to_the_same_bytes(
    crossed: Any, concept: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """Of two restarts of 5 epochs, killed before a checkpoint, after it, and in the second."""
    settings = dataclasses.replace(
        QUICK, epochs=5, restarts=2, erase_every=2, erase_learning_rate=1e-2, checkpointing_epochs=3
    )
    whole = settings.prepare(target_of(crossed), concept, run=type(run)(tmp_path / "whole"))
    stopped, told = type(run)(tmp_path / "stopped"), 0

    def log(**numbers: Any) -> None:
        nonlocal told
        told += "loss" in numbers
        if told == killed_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(stopped, "log", log)
    before = crossed.denoiser[0].weight.clone()
    with pytest.raises(KeyboardInterrupt):
        settings.prepare(target_of(crossed), concept, run=stopped)
    assert torch.equal(crossed.denoiser[0].weight, before)
    resumed = type(run)(tmp_path / "stopped")
    again = settings.prepare(target_of(crossed), concept, run=resumed)
    assert list(again) == list(whole)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    done = 5 * (killed_at > 5)
    kept = 3 * ((killed_at - done - 1) // 3)  # an epoch is told before its state is kept
    assert sum("loss" in row for row in resumed.logged) == 10 - done - kept


def test_same_seed_same_word(crossed: Any, concept: Any, run: Any) -> None:
    settings = dataclasses.replace(QUICK, epochs=4, erase_every=2)
    first, again = (word_of(settings.prepare(target_of(crossed), concept, run=run)) for _ in range(2))
    assert torch.equal(first, again)
    run.seed = 1
    assert not torch.equal(first, word_of(settings.prepare(target_of(crossed), concept, run=run)))


def flow(family: type, make: Callable[[Path], Any]) -> Callable[[pytest.FixtureRequest], Any]:
    return lambda request: family(make(request.getfixturevalue("vocabulary")), name="tiny")


KINDS: dict[str, tuple[Callable[[pytest.FixtureRequest], Any], int]] = {
    "sd1": (lambda request: request.getfixturevalue("tiny_sd"), 64),
    "sdxl": (lambda request: request.getfixturevalue("tiny_sdxl"), 64),
    "sd3": (flow(Sd3, tiny_flow.sd3_pipeline), 32),
    "flux": (flow(Flux, tiny_flow.flux_pipeline), 32),
}


@pytest.mark.parametrize("kind", KINDS)
def test_on_each_pipeline_class(kind: str, request: pytest.FixtureRequest, concept: Any, run: Any) -> None:
    make, size = KINDS[kind]
    model = make(request)
    images = [image.resize((size, size)) for image in concept.attack_images]
    settings = Pund(
        epochs=2, bins=2, steps_per_bin=1, restarts=1, erase_every=1, erase_learning_rate=1e-2, probes=2, keep_every=1
    )
    settings = dataclasses.replace(settings, initializers=("a",))
    before = {name: one.clone() for name, one in model.denoiser.state_dict().items()}
    learned = settings.prepare(target_of(model), dataclasses.replace(concept, attack_images=images), run=run)
    assert word_of(learned).shape == (1, model.token_embeddings().shape[1])
    assert run.logged[0]["erased"] > 0
    assert all(torch.equal(one, before[name]) for name, one in model.denoiser.state_dict().items())
    assert not any(one.requires_grad or one.grad is not None for one in model.denoiser.parameters())
    (attempt,) = settings.search(target_of(model), learned, "a red house", generator=torch.Generator())
    drawn = model.generate(
        [attempt.prompt], seeds=[0], sampling=Sampling(num_inference_steps=1), tokens=dict(attempt.tokens)
    )
    assert drawn[0].size == (size, size)
    assert (run.folder / "learned_embeds.safetensors").exists() == (kind != "sd3")


def test_a_loss_that_is_not_a_number_stops_the_run(crossed: Any, concept: Any, run: Any) -> None:
    crossed.denoiser[0].weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="pund: a loss is nan at epoch 1; lower learning_rate"):
        QUICK.prepare(target_of(crossed), concept, run=run)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vectors", 0),
        ("restarts", 0),
        ("epochs", 0),
        ("bins", 0),
        ("erase_every", 0),
        ("erase_learning_rate", 0.0),
        ("keep_every", 0),
        ("weight_decay", -1.0),
        ("template", "a photo of"),
    ],
)
def test_impossible_settings_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(QUICK, **{field: value})
