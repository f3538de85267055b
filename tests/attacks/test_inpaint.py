from __future__ import annotations

from typing import Any

import from_images
import numpy as np
import pytest
import torch
from from_images import concept_of, spotted, tiny_model

from duo.attacks.inpaint import Inpaint
from duo.errors import UserError
from duo.plugins import Access, Attack, Attempt, Sampling
from duo.target import Target

SHORT = Sampling(num_inference_steps=3, guidance_scale=3.0)
# Of a share of 0.75 the box of 32×32 is from 4 to 28: the first two spots lie under it, the others at the border.
WHERE = [(4, 4), (20, 14), (0, 14), (28, 28)]
IMAGES = [spotted(row, where) for row, where in enumerate(WHERE)]


def target_of(model: Any = None) -> Target:
    return Target(model, access=Inpaint.access, sampling=SHORT, query_limit=0)


def attempts(attack: Inpaint, run: Any, *, seed: int = 1, prompt: str = "a house") -> list[Attempt]:
    state = attack.prepare(target_of(), concept_of(IMAGES), run=run)
    generator = torch.Generator().manual_seed(seed)
    return list(attack.search(target_of(), state, prompt, generator=generator))


def test_is_an_attack_that_asks_nothing_of_the_model() -> None:
    assert isinstance(Inpaint(), Attack)
    assert Inpaint.access == Access.QUERY and Inpaint.learns_from_images


def test_the_box_in_the_middle_is_drawn_anew(run: Any) -> None:
    found = attempts(Inpaint(share=0.75, strengths=(0.8, 1.0)), run)
    assert [one.variant for one in found] == ["strength 0.8", "strength 1"]
    wanted = np.zeros((32, 32))
    wanted[4:28, 4:28] = 255
    for one in found:
        assert one.mask.mode == "L"
        assert np.array_equal(np.asarray(one.mask), wanted)


def test_only_images_whose_border_does_not_show_the_concept_are_used(run: Any) -> None:
    state = Inpaint().prepare(target_of(), concept_of(IMAGES), run=run)
    assert torch.equal(state["images"], torch.stack([torch.from_numpy(np.array(image)) for image in IMAGES[:2]]))
    assert run.logged == [{"images": 4, "hidden": 2}]
    for seed in range(8):
        one = attempts(Inpaint(), run, seed=seed)[0]
        assert one.prompt == f"a white spot {one.record['image']}"
        assert np.array_equal(np.asarray(one.init), np.asarray(IMAGES[one.record["image"]]))


def test_a_box_that_hides_nothing_is_refused(run: Any) -> None:
    with pytest.raises(UserError, match=r"in none of the 4 images does a box of share 0\.1 hide .*; raise share"):
        Inpaint(share=0.1).prepare(target_of(), concept_of(IMAGES), run=run)


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
def test_bad_settings_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="set it between 0 and 1"):
        Inpaint(share=share)
    with pytest.raises(ValueError, match="at most 1"):
        Inpaint(strengths=(2.0,))


@pytest.mark.parametrize("kind", from_images.KINDS)
def test_every_kind_of_model_draws_under_the_box_alone(
    kind: str, vocabulary: Any, make_tiny_pipeline: Any, run: Any
) -> None:
    model = tiny_model(kind, vocabulary, make_tiny_pipeline)
    (one,) = attempts(Inpaint(strengths=(1.0,)), run)
    (drawn,) = model.edit([one.init], [one.prompt], strength=1.0, seeds=[0], sampling=SHORT, masks=[one.mask])
    same = (np.asarray(drawn) == np.asarray(one.init)).all(axis=2)
    assert same[np.asarray(one.mask) == 0].all()
    assert same[np.asarray(one.mask) > 0].mean() < 0.1
