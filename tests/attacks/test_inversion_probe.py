from __future__ import annotations

from pathlib import Path
from typing import Any

import from_images
import numpy as np
import pytest
import torch
from from_images import concept_of, spotted, tiny_model
from PIL import Image

from duo.attacks.inversion_probe import InversionProbe
from duo.errors import UserError
from duo.models import load_family
from duo.plugins import Access, Attack, Attempt, Sampling
from duo.target import AccessError, Target
from tiny_flow import pixels

SHORT = Sampling(num_inference_steps=4, guidance_scale=3.5)
QUICK = InversionProbe(k=3, rounds=1, batch_size=2)
EXACT = InversionProbe(k=1, rounds=12)
IMAGES = [spotted(row, (2 * row, 3)) for row in range(5)]


@pytest.fixture
def lent(run: Any) -> Any:
    run.sampling = SHORT
    return run


def target_of(model: Any, access: Access = InversionProbe.access) -> Target:
    return Target(model, access=access, sampling=SHORT, query_limit=0)


def own_size(model: Any, images: list[Image.Image]) -> list[Image.Image]:
    side = model.generate(["a"], seeds=[0], sampling=Sampling(num_inference_steps=1))[0].size
    return [image.resize(side) for image in images]


def attempts(attack: InversionProbe, model: Any, state: Any, *, seed: int = 1) -> list[Attempt]:
    return list(attack.search(target_of(model), state, "a house", generator=torch.Generator().manual_seed(seed)))


def test_is_an_attack_with_gradients_and_no_less(tiny_sd: Any, lent: Any) -> None:
    assert isinstance(QUICK, Attack)
    assert InversionProbe.access == Access.GRADIENT and InversionProbe.learns_from_images
    with pytest.raises(AccessError):
        QUICK.prepare(target_of(tiny_sd, Access.TEXT), concept_of(IMAGES), run=lent)


def near(model: Any, one: Attempt, sampling: Sampling) -> tuple[float, float]:
    """How far the image of an attempt is from its source, and how far another of the model's images is."""
    settings: dict[str, Any] = {"seeds": [0], "sampling": sampling, "negative_prompts": [""]}
    again, other = model.generate([""], latents=one.latents[None], **settings), model.generate([""], **settings)
    return tuple(float(np.abs(pixels(drawn) - pixels([one.source])).mean()) for drawn in (again, other))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", from_images.KINDS)
def test_it_runs_on_every_kind_of_model_and_changes_none(
    kind: str, vocabulary: Path, make_tiny_pipeline: Any, lent: Any
) -> None:
    model = tiny_model(kind, vocabulary, make_tiny_pipeline)
    before = {name: tensor.clone() for name, tensor in model.denoiser.state_dict().items()}
    state = EXACT.prepare(target_of(model), concept_of(own_size(model, IMAGES)), run=lent)
    found = attempts(EXACT, model, state)
    assert [(one.variant, one.prompt, one.negative_prompt) for one in found] == [
        ("concept", "", ""),
        ("control", "", ""),
    ]
    for one in found:
        away, wrong = near(model, one, SHORT)
        # A random flow gives every image back, so a control is needed. A random U-Net's ε is no noise: it has no path.
        assert kind not in ("sd3", "flux") or away < 0.25 * wrong
    assert all(torch.equal(before[name], tensor) for name, tensor in model.denoiser.state_dict().items())
    assert all(parameter.grad is None for parameter in model.denoiser.parameters())


def test_the_embedded_model_gives_its_image_back_and_no_prompt_is_needed(run: Any) -> None:
    run.sampling = Sampling(num_inference_steps=6, guidance_scale=3.5)
    model = load_family("toybox")
    images = model.generate(["a burning red house on the beach"], seeds=[0], sampling=run.sampling)
    state = QUICK.prepare(target_of(model), concept_of(images), run=run)
    away, wrong = near(model, attempts(QUICK, model, state)[0], run.sampling)
    assert away < 8 < 40 < wrong


def test_the_source_is_what_the_vae_makes_of_the_image(tiny_sd: Any, lent: Any) -> None:
    images = own_size(tiny_sd, IMAGES)
    state = QUICK.prepare(target_of(tiny_sd), concept_of(images), run=lent)
    assert state["concept.latents"].shape == state["control.latents"].shape == (3, *tiny_sd.latent_shape)
    wanted = tiny_sd.images(tiny_sd.latents(images[:3], generator=None))
    assert np.abs(state["concept.sources"].numpy().astype(int) - pixels(wanted)).max() <= 1
    for seed in range(6):
        one = attempts(QUICK, tiny_sd, state, seed=seed)[0]
        assert torch.equal(one.latents, state["concept.latents"][one.record["image"]])
        assert np.array_equal(np.asarray(one.source), state["concept.sources"][one.record["image"]])
        assert one.record["noise"] == pytest.approx(one.latents.std().item())


def test_a_killed_run_goes_on_and_ends_the_same(
    tiny_sd: Any, lent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    concept = concept_of(own_size(tiny_sd, IMAGES))
    whole = QUICK.prepare(target_of(tiny_sd), concept, run=lent)
    lent.folder = tmp_path / "again"
    calls: list[int] = []
    predict = type(tiny_sd).predict

    def dying(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:  # the second batch of the concept: 4 steps a batch
            raise KeyboardInterrupt
        return predict(tiny_sd, *given)

    monkeypatch.setattr(tiny_sd, "predict", dying)
    with pytest.raises(KeyboardInterrupt):
        QUICK.prepare(target_of(tiny_sd), concept, run=lent)
    resumed = QUICK.prepare(target_of(tiny_sd), concept, run=lent)
    assert len(calls) == 6 + 3 * 4, "of four batches the first was not inverted again"
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_patterns_are_checks_in_colours_that_never_change(tiny_sd: Any) -> None:
    first, second = QUICK._controls(2, (64, 48))
    assert first.size == (64, 48)
    cells = np.asarray(first).reshape(8, 6, 8, 8, 3)
    assert (cells == cells[:, :1, :, :1]).all()
    assert len(np.unique(cells[:, 0, :, 0].reshape(-1, 3), axis=0)) == 64
    assert not np.array_equal(np.asarray(first), np.asarray(second))
    assert np.array_equal(np.asarray(QUICK._controls(4, (64, 48))[0])[0, 0], np.asarray(first)[0, 0])


def test_a_folder_of_images_may_be_the_control(tiny_sd: Any, lent: Any, tmp_path: Path) -> None:
    for name, colour in (("b.png", (0, 0, 255)), ("a.JPG", (255, 0, 0))):
        Image.new("RGB", (90, 70), colour).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    attack = InversionProbe(k=3, rounds=1, steps=1, control=str(tmp_path))
    red, blue = attack._controls(3, (64, 64))
    assert red.size == (64, 64) and red.getpixel((5, 5))[0] > 240 and blue.getpixel((5, 5)) == (0, 0, 255)
    state = attack.prepare(target_of(tiny_sd), concept_of(own_size(tiny_sd, IMAGES)), run=lent)
    assert (len(state["concept.latents"]), len(state["control.latents"])) == (3, 2)
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"c\.png cannot be read as an image"):
        attack._controls(3, (64, 64))
    with pytest.raises(UserError, match='neither "pattern" nor a folder with images'):
        InversionProbe(control=str(tmp_path / "none"))._controls(3, (64, 64))


def test_bad_settings_and_concepts_are_refused(tiny_sd: Any, lent: Any) -> None:
    for name in ("k", "rounds", "batch_size", "steps"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            InversionProbe(**{name: 0})
    with pytest.raises(UserError, match="no attack_images"):
        QUICK.prepare(target_of(tiny_sd), concept_of([]), run=lent)
    assert InversionProbe(k=4, rounds=2, steps=10).passes(7) == {"denoiser": 160}
