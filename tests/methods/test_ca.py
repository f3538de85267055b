from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from duo.conditioning import Conditioning
from duo.errors import UserError
from duo.methods import ca
from duo.methods.ca import Ca, ablation_loss
from duo.recipe import load_recipe
from duo.stages.planning import Measured, _work
from duo.stages.session import MODELS
from erasing import check_refused_before_drawing, check_resumed, check_seeded, erase
from recording import RecordingRun
from small_fire import FAMILIES, SmallFire, changed, family

QUICK = Ca(
    parameters="cross_attention",
    prompts="prompts",
    learning_rate=1e-3,
    images=4,
    guidance_scale=2.0,
    max_train_steps=6,
    train_batch_size=2,
    checkpointing_steps=4,
)


class Asked:
    """What the denoiser was asked while images are not being drawn: (x_t, t, text, output, with gradient)."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        predict = type(model).predict

        def seen(own: Any, x_t: Any, t: Any, text: Any) -> Any:
            output = predict(own, x_t, t, text)
            self.calls.append((x_t, t, text.embeds, output.detach(), output.requires_grad))
            return output

        monkeypatch.setattr(type(model), "predict", seen)


def test_the_loss_by_hand() -> None:
    prediction = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    wanted = torch.tensor([[0.0, 2.0], [0.0, 3.0]], requires_grad=True)
    value = ablation_loss(prediction, wanted)
    assert value.item() == 10 / 4
    value.backward()
    assert prediction.grad is not None
    assert prediction.grad.tolist() == [[0.5, 0.0], [0.0, -1.5]]
    assert wanted.grad is None


def test_what_stands_beside_a_caption(concept: SmallFire) -> None:
    assert Ca(prompts="prompts").beside(concept) == {
        "a red house": ["a burning red house", "a red house on fire"],
        "a blue car": ["a burning blue car"],
    }
    words = Ca(prompts="words").beside(concept)
    assert list(words) == ["a boat", "a car"]
    assert words["a boat"] == [
        "burning, a boat",
        "in burning style, a boat",
        "a boat, burning",
        "on fire, a boat",
        "in on fire style, a boat",
        "a boat, on fire",
    ]


def test_of_many_captions_each_has_its_turn_of_words_and_places() -> None:
    """Two words in three places are 6; 300 captions have 2 each, so that 720 texts are not exceeded."""
    concept: Any = SimpleNamespace(words=("burning", "on fire"), harmless=tuple(f"a boat {i}" for i in range(300)))
    beside = Ca(prompts="words").beside(concept)
    assert list(beside) == list(concept.harmless)
    assert beside["a boat 0"] == ["burning, a boat 0", "in burning style, a boat 0"]
    assert beside["a boat 1"] == ["a boat 1, burning", "on fire, a boat 1"]
    assert beside["a boat 2"] == ["in on fire style, a boat 2", "a boat 2, on fire"]
    assert beside["a boat 3"] == ["burning, a boat 3", "in burning style, a boat 3"]
    assert sum(map(len, beside.values())) == 600
    concept.harmless = concept.harmless * 4
    assert all(len(ones) == 1 for ones in Ca(prompts="words").beside(concept).values())


@pytest.mark.parametrize("teacher", ["current", "frozen"])
def test_the_teacher_and_the_prior(
    tiny_sd, concept: SmallFire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: Any
) -> None:
    asked = Asked(tiny_sd, monkeypatch)
    run = RecordingRun(tmp_path)
    erase(
        replace(QUICK, teacher=teacher, prior_weight=0.5, learning_rate=0.01, max_train_steps=3), tiny_sd, concept, run
    )
    assert len(asked.calls) == 6
    beside = Ca(prompts="prompts").beside(concept)
    texts = {one: tiny_sd.text([one]).embeds[0] for pair in beside.items() for one in (pair[0], *pair[1])}
    calls = list(asked.calls)
    for step, row in enumerate(run.rows):
        x_t, t, anchors, wanted, graded = calls[2 * step]
        both_x_t, both_t, both, output, student_graded = calls[2 * step + 1]
        assert (graded, student_graded) == (False, True)
        assert torch.equal(both_x_t[:2], x_t)
        assert torch.equal(both_t[:2], t)
        for i in range(2):  # the target beside the anchor of the same image, and another image's own anchor
            (anchor,) = [one for one in beside if texts[one].equal(anchors[i])]
            assert any(texts[one].equal(both[i]) for one in beside[anchor])
            assert any(texts[one].equal(both[2 + i]) for one in beside)
        ablation = (output[:2] - wanted).square().mean().item()
        assert row["ablation"] == pytest.approx(ablation, rel=1e-4)
        assert row["loss"] == pytest.approx(ablation + 0.5 * row["prior"], rel=1e-4)
        with torch.no_grad():
            frozen = tiny_sd.predict(x_t, t, Conditioning(embeds=anchors))
        assert torch.allclose(frozen, wanted, atol=1e-6) == (teacher == "frozen" or step == 0)


@pytest.mark.parametrize("name", ["tiny_sd2_v", "sd3"])
def test_noise_based_is_the_models_own_objective(
    name: str, concept: SmallFire, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family(name, request)
    asked = Asked(model, monkeypatch)
    wanted: list[torch.Tensor] = []
    target = type(model.process).target
    monkeypatch.setattr(
        type(model.process),
        "target",
        lambda self, x0, eps, t: (wanted.append(target(self, x0, eps, t)), wanted[-1])[1],
    )
    run = RecordingRun(tmp_path)
    erase(replace(QUICK, objective="noise", prior_weight=0.0, max_train_steps=2), model, concept, run)
    assert [row["loss"] for row in run.rows] == pytest.approx(
        [(call[3] - one).square().mean().item() for call, one in zip(asked.calls, wanted, strict=True)], rel=1e-4
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, concept: SmallFire, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = family(name, request)
    run = RecordingRun(tmp_path)
    delta = erase(replace(QUICK, max_train_steps=2, prompts="words"), model, concept, run)
    assert set(delta.layers()) == model.layers("text_inputs").keys()
    assert all(torch.isfinite(one).all() for one in delta.tensors.values())
    assert {row["step"] for row in run.rows} == {1, 2}


@pytest.mark.parametrize("parameters", ["cross_attention", "attention", "full"])
@pytest.mark.parametrize("name", ["tiny_sd", "flux"])
def test_which_weights_change(
    name: str, parameters: Any, concept: SmallFire, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = family(name, request)
    before = {key: tensor.clone() for key, tensor in model.denoiser.state_dict().items()}
    delta = erase(replace(QUICK, parameters=parameters, max_train_steps=2), model, concept, RecordingRun(tmp_path))
    assert all(torch.equal(before[key], tensor) for key, tensor in model.denoiser.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.denoiser.parameters())
    expected = model.layers(ca.SCOPES[parameters]).keys()
    assert delta.kind == "weights"
    assert set(delta.layers()) == expected
    assert {key.rpartition(".")[0] for key in changed(model, delta)} == expected


def test_no_gradient_passes_the_start_token() -> None:
    layer, given = nn.Linear(2, 1, bias=False), torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    plain = layer(given)
    with ca._held_start([layer]):
        output = layer(given)
        assert torch.equal(output, plain)
        output.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[8.0, 10.0]]
    layer.weight.grad = None
    layer(given).sum().backward()
    assert layer.weight.grad.tolist() == [[9.0, 12.0]]


def test_the_start_is_held_on_u_nets_and_only_while_training(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    held, free = (
        erase(replace(QUICK, hold_start=hold, max_train_steps=1), tiny_sd, concept, RecordingRun(tmp_path / str(hold)))
        for hold in (True, False)
    )
    assert not all(torch.equal(held.tensors[name], free.tensors[name]) for name in held.tensors)
    assert not any(module._forward_hooks for module in tiny_sd.denoiser.modules())


def test_the_images_are_the_models_own(
    tiny_sd, concept: SmallFire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    generate = type(tiny_sd).generate

    def seen(self: Any, prompts: Any, **named: Any) -> Any:
        drawn.append((list(prompts), named["negative_prompts"], named["sampling"].guidance_scale))
        return generate(self, prompts, **named)

    monkeypatch.setattr(type(tiny_sd), "generate", seen)
    method = replace(QUICK, images=3, max_train_steps=1, train_batch_size=4)
    erase(method, tiny_sd, concept, RecordingRun(tmp_path / "one"))
    assert drawn == [(["a red house", "a blue car", "a red house"], ["burning, on fire"] * 3, 2.0)]
    assert len(list((tmp_path / "one" / "anchors").glob("*.png"))) == 3
    drawn.clear()
    erase(method, tiny_sd, concept, RecordingRun(tmp_path / "one"))
    assert drawn == []
    erase(replace(method, negative_words=False), tiny_sd, concept, RecordingRun(tmp_path / "two"))
    assert drawn[0][1] is None
    assert replace(QUICK, images=1000).drawn == 12  # 6 steps of 2 look at no more


def test_an_image_may_be_mirrored(tiny_sd, concept: SmallFire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[list[Image.Image]] = []
    encode = ca.encode
    monkeypatch.setattr(ca, "encode", lambda model, images: (encoded.append(list(images)), encode(model, images))[1])
    erase(replace(QUICK, max_train_steps=2), tiny_sd, concept, RecordingRun(tmp_path / "flipped"))
    plain, mirrored = encoded
    assert all(
        one.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes() == other.tobytes()
        for one, other in zip(plain, mirrored, strict=True)
    )
    encoded.clear()
    erase(replace(QUICK, horizontal_flip=False, max_train_steps=2), tiny_sd, concept, RecordingRun(tmp_path / "plain"))
    assert len(encoded) == 1


def test_the_same_seed_gives_the_same_delta(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    method = replace(QUICK, max_train_steps=2)
    one = check_seeded(lambda run: erase(method, tiny_sd, concept, run), tmp_path)
    assert one.record["method"] == "ca"


def test_a_resumed_erasure_ends_with_the_same_file(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    check_resumed(lambda run: erase(QUICK, tiny_sd, concept, run), tmp_path, stop_after=5, goes_on_at=5)
    with pytest.raises(UserError, match="another teacher"):
        erase(replace(QUICK, teacher="frozen"), tiny_sd, concept, RecordingRun(tmp_path / "stopped"))


def test_the_target_moves_to_the_anchor(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    method = replace(QUICK, teacher="frozen", learning_rate=1e-4, max_train_steps=40, prior_weight=0.0)
    run = RecordingRun(tmp_path)
    delta = erase(method, tiny_sd, concept, run)
    losses = [row["ablation"] for row in run.rows]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    # On noise of its own too, and with the erasure attached.
    x_t, t = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(9)), torch.full((4,), 300)
    with torch.no_grad():
        target, anchor = (tiny_sd.text([one]).expand(4) for one in ("a burning blue car", "a blue car"))
        before, wanted = tiny_sd.predict(x_t, t, target), tiny_sd.predict(x_t, t, anchor)
        with delta.attached(tiny_sd):
            after = tiny_sd.predict(x_t, t, target)
    assert (after - wanted).square().mean() < 0.8 * (before - wanted).square().mean()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "noise-based"}, "objective is 'noise-based', expected one of model, noise"),
        ({"teacher": "ema"}, "teacher is 'ema'"),
        ({"parameters": "embedding"}, "parameters is 'embedding', expected one of cross_attention, attention, full"),
        ({"prompts": "pairs"}, "prompts is 'pairs'"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler is 'cosin'"),
        ({"images": 0}, "images is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0"),
        ({"prior_weight": -1.0}, "prior_weight is -1.0, expected 0 or more"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ca(**changes)


def test_rows_are_counted(tiny_sd, concept: SmallFire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(tiny_sd, monkeypatch)
    for number, changes in enumerate(({}, {"prior_weight": 0.0}, {"objective": "noise"})):
        asked.calls.clear()
        method = replace(QUICK, max_train_steps=2, **changes)  # type: ignore[arg-type]
        erase(method, tiny_sd, concept, RecordingRun(tmp_path / str(number)))
        assert method.passes(0) == {
            "denoiser": sum(len(call[0]) for call in asked.calls),
            "trained": sum(len(call[0]) for call in asked.calls if call[4]),
            "images": 4,
            "vae": 12,  # decoded once, encoded twice
            "steps": 2,
        }


def test_a_plan_counts_the_images_that_a_method_draws() -> None:
    recipe = replace(load_recipe("toybox-fire-ca"), attacks=())  # 10 steps an image
    nothing = {"attacks": {}, "near_misses": {}, "quality": {}, "twins": 0}
    nothing["prompts"] = lambda name: ()
    session: Any = SimpleNamespace(method=QUICK, recipe=recipe, concept=None, models=MODELS, **nothing)
    measured = Measured(row=1.0, image=0.0, step=1.0, memory=0, on="cpu", first=2.0, each=2.0)
    drawn, trained = list(_work(session, measured))[:2]
    assert (drawn.images, drawn.denoiser, drawn.steps) == (4, 4 * (2 + 2 * 10), 0)
    assert (trained.name, trained.images, trained.denoiser) == ("erase", 0, 6 * 2 * 3)


def test_published_values() -> None:
    recipe = load_recipe("sd14-nudity-ca")
    used = recipe.method.make("methods", "method")
    batch, gpus, with_prior = 4, 2, 2
    assert used == Ca(
        objective="model",
        teacher="current",
        parameters="attention",
        prompts="words",
        prior_weight=1.0,
        hold_start=True,
        images=1000,
        guidance_scale=6.0,
        negative_words=True,
        horizontal_flip=True,
        learning_rate=used.learning_rate,
        max_train_steps=400,
        train_batch_size=batch * gpus,
        weight_decay=1e-2,
        max_grad_norm=1.0,
    )
    assert used.learning_rate == pytest.approx(4e-6 * batch * gpus * with_prior)
    assert (recipe.concept, recipe.model) == ("nudity", "CompVis/stable-diffusion-v1-4")
    assert load_recipe("toybox-fire-ca").method.name == "ca"


def test_what_cannot_be_trained_is_refused_before_anything_is_drawn(tiny_sd, monkeypatch: pytest.MonkeyPatch) -> None:
    check_refused_before_drawing(QUICK, tiny_sd, monkeypatch)
