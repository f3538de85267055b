"""One prompt and one seed on both models: the images are those that the run itself would draw."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import staged
from duo.app.comparison import Asked, Comparison
from duo.delta import Delta
from duo.errors import UserError

PROMPT = "a burning boat"


def drawn_by(session: Any, model: str, seed: int) -> bytes:
    with session.as_model(model) as family:
        (image,) = family.generate([PROMPT], seeds=[seed], sampling=session.recipe.sampling)
    return bytes(image.tobytes())


def test_the_images_are_those_of_the_run(erased: Any) -> None:
    comparison = Comparison(erased)
    original, after = comparison.draw(Asked(prompt=PROMPT, seed=7))
    assert original.image.tobytes() == drawn_by(erased, "original", 7)
    assert after.image.tobytes() == drawn_by(erased, "erased", 7)
    assert original.image.tobytes() != after.image.tobytes()
    assert (original.model, after.model) == ("original", "erased")
    assert [one.verdict for one in (original, after)] == erased.judge([original.image, after.image])
    other, _ = comparison.draw(Asked(prompt=PROMPT, seed=8))
    assert other.image.tobytes() == drawn_by(erased, "original", 8) != original.image.tobytes()


def test_the_strength_scales_the_change(erased: Any) -> None:
    comparison = Comparison(erased)
    original, none = comparison.draw(Asked(prompt=PROMPT, seed=1, strength=0.0))
    assert none.image.tobytes() == original.image.tobytes()
    _, half = comparison.draw(Asked(prompt=PROMPT, seed=1, strength=0.5))
    delta = Delta.load(erased.dir.erasure()[0])
    halved = {name: one / 2 if ".lora_B." in name else one for name, one in delta.tensors.items()}
    with Delta(kind=delta.kind, component=delta.component, tensors=halved, record=delta.record).attached(erased.model):
        (expected,) = erased.model.generate([PROMPT], seeds=[1], sampling=erased.recipe.sampling)
    assert half.image.tobytes() == expected.tobytes()
    _, whole = comparison.draw(Asked(prompt=PROMPT, seed=1))
    assert whole.image.tobytes() != half.image.tobytes()


def test_drawing_leaves_the_model_as_it_was_and_draws_nothing_twice(
    erased: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: one.clone() for name, one in erased.model.denoiser.state_dict().items()}
    calls, generate = [], erased.model.generate

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(named["seeds"])
        return generate(*given, **named)

    monkeypatch.setattr(erased.model, "generate", counted)
    comparison = Comparison(erased)
    comparison.draw(Asked(prompt=PROMPT, seed=1))
    assert all(before[name].equal(one) for name, one in erased.model.denoiser.state_dict().items())
    comparison.draw(Asked(prompt=PROMPT, seed=1))
    assert calls == [[1], [1]]
    comparison.draw(Asked(prompt=PROMPT, seed=1, strength=0.5))
    assert calls == [[1], [1], [1]]  # the original's image has no strength


@pytest.mark.parametrize(("label", "hidden"), [("present", True), ("corrupted", True), ("absent", False)])
def test_what_the_judge_does_not_call_free_of_it_is_hidden(erased: Any, label: str, hidden: bool) -> None:
    from duo.plugins import Verdict

    class Judge:
        digest = "same"

        def __call__(self, images: Any) -> list[Verdict]:
            return [Verdict(label=label)] * len(images)

    erased.judge = Judge()
    assert [one.hidden for one in Comparison(erased).draw(Asked(prompt=PROMPT, seed=0))] == [hidden, hidden]


@pytest.mark.parametrize("sexual", [True, False])
def test_a_refused_prompt_is_not_rendered(open_session: Any, sexual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session("adult", concept=("sexual = true\n" if sexual else "") + staged.CONCEPT)
    staged.make_pairs(session)
    staged.erase(session)
    monkeypatch.setattr(session.model, "generate", lambda *_, **__: pytest.fail("it was rendered"))
    prompt = "a burning school girl" if sexual else "a naked girl"
    with pytest.raises(UserError, match=r"mentions a minor \(.*girl\), so it is refused: nothing was drawn"):
        Comparison(session).draw(Asked(prompt=prompt, seed=0))


def test_a_judge_that_cannot_look_is_told_before_anything_is_drawn(erased: Any, monkeypatch: Any) -> None:
    class Blind:
        @property
        def digest(self) -> str:
            raise UserError("judge.onnx is missing; put it there")

    erased.judge = Blind()
    monkeypatch.setattr(erased.model, "generate", lambda *_, **__: pytest.fail("it was drawn"))
    with pytest.raises(UserError, match=r"judge\.onnx is missing"):
        Comparison(erased).draw(Asked(prompt=PROMPT, seed=0))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"seed": -1}, "the seed is -1"),
        ({"seed": 2**53}, "the seed is 9007199254740992"),
        ({"seed": 0, "strength": -0.1}, r"the strength is -0.1, expected from 0 to 1.5"),
        ({"seed": 0, "strength": 1.6}, r"the strength is 1.6"),
        ({"seed": 0, "strength": float("nan")}, "the strength is nan"),
    ],
)
def test_what_cannot_be_drawn_is_told(given: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Asked(prompt=PROMPT, **given)


def test_without_an_erasure_there_is_nothing_to_compare(with_pairs: Any) -> None:
    with pytest.raises(UserError, match="erase is not finished; run `duo erase` first"):
        Comparison(with_pairs)


def test_a_model_that_was_erased_elsewhere_has_no_strength(erased: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere:
        def generate(self, prompts: Any, *, seeds: Any, sampling: Any) -> Any:
            return [erased.model.generate(["a boat"], seeds=[99], sampling=sampling)[0]]

    erased.artefact = SimpleNamespace(kind="model")
    monkeypatch.setattr(erased, "imported", Elsewhere)
    comparison = Comparison(erased)
    assert not comparison.has_strength
    _, after = comparison.draw(Asked(prompt=PROMPT, seed=3))
    (expected,) = erased.model.generate(["a boat"], seeds=[99], sampling=erased.recipe.sampling)
    assert after.image.tobytes() == expected.tobytes()
    with pytest.raises(UserError, match="it has no strength to change"):
        comparison.draw(Asked(prompt=PROMPT, seed=3, strength=0.5))
