from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from duo.errors import UserError
from duo.methods import esd
from duo.methods.esd import Esd, erased_target
from duo.plugins import Precision
from duo.recipe import load_recipe
from duo.sampling import grid
from erasing import check_refused_before_drawing, check_resumed, check_seeded, erase
from recording import RecordingRun
from small_fire import FAMILIES, SmallFire, changed, family

QUICK = Esd(
    variant="x", learning_rate=1e-3, sampling_steps=5, max_train_steps=6, train_batch_size=2, checkpointing_steps=4
)


def test_the_target_by_hand() -> None:
    without, having, left = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]), torch.tensor([10.0, 20.0])
    assert erased_target(without, having, without, eta=2.0).tolist() == [-3.0, 4.0]
    assert erased_target(left, having, without, eta=0.5).tolist() == [9.0, 20.5]
    assert erased_target(without, having, without, eta=0.0).tolist() == without.tolist()
    # Today's code has c where the paper has the empty prompt: c − η'(c − ∅) at η' = 2 is the paper's at 1.
    theirs = having - 2 * (having - without)
    assert erased_target(without, having, without, eta=1.0).tolist() == theirs.tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_step_is_told_by_hand(
    name: str, concept: SmallFire, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The student still is the frozen model: it stands c − ∅ from the unconditional, and 1 + η times that off."""
    for eta in (0.0, 1.0, 2.0):
        run = RecordingRun(tmp_path / str(eta), expected=frozenset({"loss", "stop", "concept", "to_base"}))
        delta = erase(replace(QUICK, eta=eta, max_train_steps=2), family(name, request), concept, run)
        first = run.rows[0]
        assert first["concept"] > 0
        assert first["to_base"] == pytest.approx(first["concept"], rel=1e-4)
        assert first["loss"] == pytest.approx((1 + eta) ** 2 * first["concept"], rel=1e-4)
        assert all(torch.isfinite(one).all() for one in delta.tensors.values())


def test_erased_from_a_prompt(tiny_sd, concept: SmallFire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student is asked for c_from, where it still is right but for η times the concept; so is the sampler."""
    asked: list[Any] = []
    sampled = esd.partly_sampled
    monkeypatch.setattr(
        esd, "partly_sampled", lambda *given, **named: (asked.append(given[2]), sampled(*given, **named))[1]
    )
    run = RecordingRun(tmp_path)
    erase(replace(QUICK, erase_from="a red house", eta=3.0, max_train_steps=1), tiny_sd, concept, run)
    assert run.rows[0]["to_base"] == pytest.approx(0, abs=1e-12)
    assert run.rows[0]["loss"] == pytest.approx(9 * run.rows[0]["concept"], rel=1e-4)
    assert torch.equal(asked[0].embeds, tiny_sd.text(["a red house"] * 2).embeds)


def test_an_anchor_takes_the_place_of_the_empty_prompt(
    tiny_sd, concept: SmallFire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    predict = type(tiny_sd).predict
    monkeypatch.setattr(
        type(tiny_sd), "predict", lambda self, x_t, t, text: (asked.append(text.embeds), predict(self, x_t, t, text))[1]
    )
    method = replace(QUICK, base="anchor", prompts="prompts", guidance_scale=1.0, max_train_steps=1)
    erase(method, tiny_sd, concept, RecordingRun(tmp_path))
    pairs = [tuple(tiny_sd.text([one]).embeds[0] for one in target) for target in concept.targets("prompts")]
    without, having, student = asked[-3:]
    for row in range(2):
        assert any(having[row].equal(target) and without[row].equal(anchor) for target, anchor in pairs)
    assert torch.equal(student, having)


def test_with_eta_0_the_student_becomes_the_unconditional(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    run = RecordingRun(tmp_path)
    delta = erase(replace(QUICK, eta=0.0, learning_rate=1e-4, max_train_steps=40), tiny_sd, concept, run)
    left = [row["to_base"] / row["concept"] for row in run.rows]
    assert left[0] == pytest.approx(1, rel=1e-4)
    assert sum(left[-5:]) / 5 < 0.5
    # On noise of its own too, and with the erasure attached.
    x_t, t = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(9)), torch.full((4,), 500)
    with torch.no_grad():
        empty, before = (tiny_sd.predict(x_t, t, tiny_sd.text([one]).expand(4)) for one in ("", "burning"))
        with delta.attached(tiny_sd):
            after = tiny_sd.predict(x_t, t, tiny_sd.text(["burning"]).expand(4))
    assert (after - empty).square().mean() < 0.6 * (before - empty).square().mean()


UNET = {"x": "cross_attention", "x-strict": "text_inputs", "selfattn": "self_attention", "full": "all"}


@pytest.mark.parametrize("variant", ["x", "x-strict", "u", "selfattn", "full"])
@pytest.mark.parametrize("name", ["tiny_sd", "sd3", "flux"])
def test_which_weights_change(
    name: str, variant: Any, concept: SmallFire, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = family(name, request)
    before = {key: tensor.clone() for key, tensor in model.denoiser.state_dict().items()}
    delta = erase(replace(QUICK, variant=variant, max_train_steps=2), model, concept, RecordingRun(tmp_path))
    assert all(torch.equal(before[key], tensor) for key, tensor in model.denoiser.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.denoiser.parameters())
    crossed = "cross_attention" if name == "tiny_sd" else "joint_attention"
    if variant == "u":
        expected = model.layers("all").keys() - model.layers(crossed).keys()
    else:
        expected = model.layers(crossed if variant == "x" else UNET[variant]).keys()
    assert expected
    assert delta.kind == "weights"
    assert set(delta.layers()) == expected
    layers = {key.rpartition(".")[0] for key in changed(model, delta)}
    assert layers <= expected
    # The last joint block of SD3 has no text after it, and the first word's key moves no softmax; most do change.
    assert len(layers) > 0.7 * len(expected)


def test_the_variants_by_name(tiny_sd) -> None:
    names = {variant: Esd(variant=variant).layers(tiny_sd) for variant in esd.CHOICES["variant"]}
    assert all(".attn2." in name for name in names["x"])
    assert {name.rsplit(".", 1)[-1] for name in names["x-strict"]} == {"to_k", "to_v"}
    assert not any(".attn2." in name for name in names["u"])
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} <= set(names["u"])
    assert sorted(names["x"] + names["u"]) == names["full"]


@pytest.mark.parametrize("trajectory", ["student", "frozen"])
def test_who_samples(
    tiny_sd, concept: SmallFire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trajectory: Any
) -> None:
    method = replace(QUICK, trajectory=trajectory, max_train_steps=3)
    name = method.layers(tiny_sd)[0]
    original = tiny_sd.denoiser.get_submodule(name).weight.clone()
    same: list[bool] = []
    sampled = esd.partly_sampled

    def seen(*given: Any, **named: Any) -> Any:
        same.append(torch.equal(tiny_sd.denoiser.get_submodule(name).weight, original))
        return sampled(*given, **named)

    monkeypatch.setattr(esd, "partly_sampled", seen)
    erase(method, tiny_sd, concept, RecordingRun(tmp_path))
    assert same == [True, trajectory == "frozen", trajectory == "frozen"]


@pytest.mark.parametrize("timestep", ["bin", "stop"])
def test_the_time_is_of_the_stop(
    tiny_sd, concept: SmallFire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timestep: Any
) -> None:
    times: list[torch.Tensor] = []
    predict = type(tiny_sd).predict
    monkeypatch.setattr(
        type(tiny_sd), "predict", lambda self, x_t, t, text: (times.append(t), predict(self, x_t, t, text))[1]
    )
    stops: list[int] = []
    sampled = esd.partly_sampled

    def seen(*given: Any, **named: Any) -> Any:
        assert (named["steps"], named["guidance_scale"]) == (5, 3.0)
        x_t = sampled(*given, **named)
        stops.append(named["stop"])
        times.clear()  # those of the sampler
        return x_t

    monkeypatch.setattr(esd, "partly_sampled", seen)
    offsets = set()
    for seed in range(6):
        run = RecordingRun(tmp_path / str(seed), seed=seed)
        erase(replace(QUICK, timestep=timestep, max_train_steps=1), tiny_sd, concept, run)
        assert run.rows[0]["stop"] == stops[-1]
        assert len(times) == 3
        assert all(torch.equal(times[0], one) for one in times)
        offsets.update((grid(tiny_sd, 5)[stops[-1]] - times[0]).tolist())
    assert len(set(stops)) > 2
    assert offsets == {0} if timestep == "stop" else min(offsets) >= 0 and 100 < max(offsets) < 200


def test_the_same_seed_gives_the_same_delta(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    method = replace(QUICK, max_train_steps=2)
    one = check_seeded(lambda run: erase(method, tiny_sd, concept, run), tmp_path)
    assert one.record["method"] == "esd"
    assert one.record["config"]["variant"] == "x"


def test_a_resumed_erasure_ends_with_the_same_file(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    check_resumed(lambda run: erase(QUICK, tiny_sd, concept, run), tmp_path, stop_after=5, goes_on_at=5)
    with pytest.raises(UserError, match="another eta"):
        erase(replace(QUICK, eta=2.0), tiny_sd, concept, RecordingRun(tmp_path / "stopped"))
    longer = RecordingRun(tmp_path / "stopped")
    erase(replace(QUICK, max_train_steps=7), tiny_sd, concept, longer)
    assert [row["step"] for row in longer.rows] == [7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "v"}, "variant is 'v', expected one of x, x-strict, u, selfattn, full"),
        ({"prompts": "pairs"}, "prompts is 'pairs'"),
        ({"base": ""}, "base is ''"),
        ({"trajectory": "both"}, "trajectory is 'both'"),
        ({"timestep": "start"}, "timestep is 'start'"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler is 'cosin'"),
        ({"eta": -1.0}, "eta is -1.0, expected 0 or more"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"sampling_steps": 0}, "sampling_steps is 0"),
        ({"train_batch_size": 0}, "train_batch_size is 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"erase_from": "a house", "base": "anchor"}, "erase_from and base = 'anchor' both say"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Esd(**changes)


def test_rows_are_counted(tiny_sd, concept: SmallFire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """(5 − 1)/2 steps of two rows on average, two frozen rows and the student's."""
    assert replace(QUICK, max_train_steps=10).passes(0) == {"denoiser": 10 * 2 * (4 + 2 + 1), "trained": 20}
    rows: list[int] = []
    predict = type(tiny_sd).predict
    monkeypatch.setattr(
        type(tiny_sd), "predict", lambda self, x_t, t, text: (rows.append(len(x_t)), predict(self, x_t, t, text))[1]
    )
    run = RecordingRun(tmp_path)
    erase(replace(QUICK, erase_from="a boat", max_train_steps=4), tiny_sd, concept, run)
    assert sum(rows) == sum(2 * (2 * row["stop"] + 3 + 1) for row in run.rows)


def test_published_values() -> None:
    recipe = load_recipe("sd14-nudity-esd")
    used = recipe.method.make("methods", "method")
    assert used == Esd(
        variant="u",
        eta=1.0,
        guidance_scale=3.0,
        sampling_steps=50,
        learning_rate=1e-5,
        max_train_steps=1000,
        train_batch_size=1,
        weight_decay=0.0,
        max_grad_norm=None,
        trajectory="student",
        timestep="bin",
        base="unconditional",
        prompts="words",
    )
    assert (recipe.concept, recipe.model) == ("nudity", "CompVis/stable-diffusion-v1-4")
    assert load_recipe("toybox-fire-esd").method.name == "esd"


def test_what_cannot_be_trained_is_refused_before_anything_is_drawn(tiny_sd, monkeypatch: pytest.MonkeyPatch) -> None:
    check_refused_before_drawing(QUICK, tiny_sd, monkeypatch)


def test_more_steps_than_the_model_was_trained_on_are_refused(tiny_sd) -> None:
    trained = len(tiny_sd.process.alphas_cumprod)
    replace(QUICK, sampling_steps=trained).check(tiny_sd, pairs=None, precision=Precision())
    with pytest.raises(UserError, match=f"sampling_steps is {trained + 1}, expected at most {trained}, the steps"):
        replace(QUICK, sampling_steps=trained + 1).check(tiny_sd, pairs=None, precision=Precision())
