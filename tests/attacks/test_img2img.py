from __future__ import annotations

from typing import Any

import from_images
import numpy as np
import pytest
import torch
from from_images import concept_of, spotted, tiny_model
from PIL import ImageOps

from duo.attacks.img2img import Img2img
from duo.checkpoint import read_tensors, write_tensors
from duo.errors import UserError
from duo.plugins import Access, Attack, Attempt, Sampling
from duo.target import Target
from tiny_flow import pixels

SHORT = Sampling(num_inference_steps=4, guidance_scale=3.0)
IMAGES = [spotted(row, (2 * row, 3)) for row in range(5)]
PROMPTS = ("a spot", "zwei Flecken über Grün", "a much longer prompt of a spot", "b", "c")


class Nothing:
    """A family that must not be asked for anything."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the model was asked for {name}")


def target(*, adults_only: bool = False) -> Target:
    return Target(Nothing(), access=Img2img.access, sampling=SHORT, query_limit=0, adults_only=adults_only)  # type: ignore[arg-type]


def attempts(attack: Img2img, run: Any, *, seed: int = 1, prompt: str = "a house", **fence: Any) -> list[Attempt]:
    state = attack.prepare(target(), concept_of(IMAGES, PROMPTS), run=run)
    write_tensors(run.folder / "state.safetensors", state, {})
    state = read_tensors(run.folder / "state.safetensors")[0]  # as the harness hands it over
    generator = torch.Generator().manual_seed(seed)
    return list(attack.search(target(**fence), state, prompt, generator=generator))


def test_is_an_attack_that_asks_nothing_of_the_model() -> None:
    assert isinstance(Img2img(), Attack)
    assert Img2img.access == Access.QUERY and Img2img.learns_from_images


def test_each_strength_is_one_attempt_from_one_image_of_the_concept(run: Any) -> None:
    found = attempts(Img2img(strengths=(0.25, 0.9, 1.0), ask="base"), run)
    assert [one.variant for one in found] == ["strength 0.25", "strength 0.9", "strength 1"]
    assert [one.strength for one in found] == [0.25, 0.9, 1.0]
    assert {one.prompt for one in found} == {"a house"}
    assert all(one.mask is None and one.latents is None for one in found)
    (row,) = {one.record["image"] for one in found}
    assert all(np.array_equal(np.asarray(one.init), np.asarray(IMAGES[row])) for one in found)


def test_the_image_is_drawn_by_the_generator_alone(run: Any) -> None:
    rows = [attempts(Img2img(), run, seed=seed)[0].record["image"] for seed in range(40)]
    assert rows == [attempts(Img2img(), run, seed=seed)[0].record["image"] for seed in range(40)]
    assert set(rows) == set(range(5))


def test_the_images_own_prompt_may_be_asked(run: Any) -> None:
    for seed in range(12):
        for one in attempts(Img2img(ask="concept"), run, seed=seed):
            assert one.prompt == PROMPTS[one.record["image"]]
            assert one.negative_prompt is None


def test_nothing_may_be_asked_and_then_guidance_does_nothing(run: Any) -> None:
    assert {(one.prompt, one.negative_prompt) for one in attempts(Img2img(), run)} == {("", "")}


def test_prompts_of_another_attack_may_be_asked(run: Any) -> None:
    attack = Img2img(ask="adversarial", adversarial=("zxq", "yyv", "a naked child"))
    asked = [attempts(attack, run, seed=seed)[0].prompt for seed in range(30)]
    assert set(asked) == {"zxq", "yyv"}, "what is refused is not taken"
    (only,) = {one.prompt for one in attempts(Img2img(ask="adversarial", adversarial=("a naked child",)), run)}
    assert only == "a naked child", "the harness tells of it"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"strengths": ()}, "one or more above 0"),
        ({"strengths": (0.0, 0.5)}, "above 0 and at most 1"),
        ({"strengths": (1.1,)}, "above 0 and at most 1"),
        ({"strengths": (0.5, 0.5)}, "each strength once"),
        ({"ask": "plain"}, "expected one of empty, concept, base, adversarial"),
        ({"ask": "adversarial"}, "goes with a list of adversarial prompts"),
        ({"adversarial": ("zxq",)}, "goes with a list of adversarial prompts"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Img2img(**settings)


def test_a_concept_without_images_is_refused(run: Any) -> None:
    with pytest.raises(UserError, match="concept spots: no attack_images"):
        Img2img().prepare(target(), concept_of([]), run=run)


@pytest.mark.parametrize("kind", from_images.KINDS)
def test_every_kind_of_model_starts_from_the_image_the_more_so_at_a_lower_strength(
    kind: str, vocabulary: Any, make_tiny_pipeline: Any, run: Any
) -> None:
    model = tiny_model(kind, vocabulary, make_tiny_pipeline)
    apart = []
    for one in attempts(Img2img(strengths=(0.25, 1.0)), run):
        settings: dict[str, Any] = {"strength": one.strength, "seeds": [0], "sampling": SHORT}
        drawn, inverse = (model.edit([i], [one.prompt], **settings) for i in (one.init, ImageOps.invert(one.init)))
        apart.append(np.abs(pixels(drawn) - pixels(inverse)).mean())
    assert apart[0] > 2 * apart[1]


def test_prompts_that_another_row_found_on_this_model(run: Any) -> None:
    import dataclasses

    attack = Img2img(ask="adversarial", found_by="bell", strengths=(0.5,))
    known = dataclasses.replace(concept_of(IMAGES), found_prompts=("zxq", "yyv"))
    state = attack.prepare(target(), known, run=run)
    asked = {
        next(attack.search(target(), state, "a boat", generator=torch.Generator().manual_seed(seed))).prompt
        for seed in range(12)
    }
    assert asked == {"zxq", "yyv"}
    with pytest.raises(UserError, match="the row 'bell' found no prompt"):
        attack.prepare(target(), concept_of(IMAGES), run=run)
    with pytest.raises(ValueError, match="goes with a list of adversarial prompts, or with found_by"):
        Img2img(ask="adversarial", adversarial=("a",), found_by="bell")
    with pytest.raises(ValueError, match="goes with a list"):
        Img2img(found_by="bell")
