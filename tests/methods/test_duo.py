from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from duo.delta import Delta
from duo.errors import UserError
from duo.losses import squared_error
from duo.methods.duo import Duo, published
from duo.pairs import Pairs
from duo.plugins import Precision
from erasing import check_resumed
from recording import RecordingRun


@pytest.fixture
def pairs() -> Pairs:
    safe = [Image.new("RGB", (64, 64), (40 * index, 90, 200 - 40 * index)) for index in range(4)]
    unsafe = [image.copy() for image in safe]
    for image in unsafe:
        ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=(255, 120, 0))
    return Pairs(names=[f"{index:04d}.png" for index in range(4)], unsafe=unsafe, safe=safe)


QUICK = Duo(
    beta=100.0,
    learning_rate=3e-3,
    prior_weight=1.0,
    rank=4,
    max_train_steps=12,
    train_batch_size=2,
    checkpointing_steps=5,
    pair_timesteps="shared",
)


def erase(method: Duo, model: Any, pairs: Pairs, run: RecordingRun) -> Delta:
    return method.erase(model, None, pairs=pairs, run=run)


def same(one: Delta, other: Delta) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors
    )


def test_training_prefers_the_safe_twin(tiny_sd, pairs: Pairs, tmp_path: Path) -> None:
    run = RecordingRun(tmp_path, expected=frozenset({"loss", "accuracy", "margin", "prior"}))
    method = replace(QUICK, beta=1000.0, targets=("attention", "convolutions"), max_train_steps=30)
    delta = erase(method, tiny_sd, pairs, run)
    assert run.rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # the policy starts as the reference
    assert run.rows[0]["prior"] == run.rows[0]["margin"] == 0
    late = run.rows[-8:]
    assert sum(row["loss"] for row in late) / 8 < 0.6
    assert sum(row["accuracy"] for row in late) / 8 > 0.8
    assert run.shown == list(range(1, 31))
    assert run.rows[0]["learning_rate"] == 3e-3

    # On a fresh draw the error on unsafe images rises more than that on safe ones.
    eps = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    t, text = torch.full((4,), 300), tiny_sd.text([""]).expand(4)
    rises = []
    for images in (pairs.unsafe, pairs.safe):
        x_t = tiny_sd.process.noised(tiny_sd.latents(images, generator=None), eps, t)
        with torch.no_grad():
            before = squared_error(tiny_sd.predict(x_t, t, text), eps)
            with delta.attached(tiny_sd):
                rises.append((squared_error(tiny_sd.predict(x_t, t, text), eps) - before).mean().item())
    assert rises[0] > rises[1]


def test_the_prior_term_holds_the_starting_noise(tiny_sd, pairs: Pairs, tmp_path: Path) -> None:
    drift = []
    for weight in (0.0, 1e6):
        run = RecordingRun(tmp_path / str(weight))
        erase(replace(QUICK, prior_weight=weight, max_train_steps=20), tiny_sd, pairs, run)
        drift.append(run.rows[-1]["prior"])
    assert drift[1] < 0.2 * drift[0]


def test_only_the_targeted_layers_change(tiny_sd, pairs: Pairs, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_sd.denoiser.state_dict().items()}
    delta = erase(replace(QUICK, targets=("self_attention", "convolutions")), tiny_sd, pairs, RecordingRun(tmp_path))
    after = tiny_sd.denoiser.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    expected = {f"{name}.weight" for scope in ("self_attention", "convolutions") for name in tiny_sd.layers(scope)}
    with delta.attached(tiny_sd):
        changed = {name for name, now in tiny_sd.denoiser.state_dict().items() if not torch.equal(before[name], now)}
    assert changed == expected
    assert delta.record["lora"]["target_modules"] == sorted(name.removesuffix(".weight") for name in expected)
    assert delta.record["model"] == "tiny"
    assert delta.record["config"]["beta"] == 100.0


@pytest.mark.parametrize("pair_timesteps", ["shared", "independent"])
def test_the_same_seed_gives_the_same_delta(tiny_sd, pairs: Pairs, tmp_path: Path, pair_timesteps: Any) -> None:
    method = replace(QUICK, pair_timesteps=pair_timesteps, max_train_steps=3)
    one = erase(method, tiny_sd, pairs, RecordingRun(tmp_path / "one"))
    torch.manual_seed(1)
    two = erase(method, tiny_sd, pairs, RecordingRun(tmp_path / "two"))
    other = erase(method, tiny_sd, pairs, RecordingRun(tmp_path / "other", seed=6))
    assert same(one, two)
    assert not same(one, other)


def test_a_resumed_erasure_ends_with_the_same_file(tiny_sd, pairs: Pairs, tmp_path: Path) -> None:
    modules = dict(tiny_sd.denoiser.named_modules())

    def erased(run: RecordingRun) -> Delta:
        try:
            return erase(QUICK, tiny_sd, pairs, run)
        finally:  # after a stop, too
            assert dict(tiny_sd.denoiser.named_modules()) == modules

    check_resumed(erased, tmp_path, stop_after=7, goes_on_at=6)


def test_a_decaying_rate_may_not_go_on_to_another_length(tiny_sd, pairs: Pairs, tmp_path: Path) -> None:
    erase(replace(QUICK, lr_scheduler="cosine"), tiny_sd, pairs, RecordingRun(tmp_path))
    longer = replace(QUICK, lr_scheduler="cosine", max_train_steps=QUICK.max_train_steps + 1)
    with pytest.raises(UserError, match="another max_train_steps"):
        erase(longer, tiny_sd, pairs, RecordingRun(tmp_path))


def test_pair_timesteps_decide_the_noise_levels(tiny_sd, pairs: Pairs, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[torch.Tensor] = []
    predict = type(tiny_sd).predict
    monkeypatch.setattr(
        type(tiny_sd), "predict", lambda self, x_t, t, text: (seen.append(t), predict(self, x_t, t, text))[1]
    )
    for rule in ("shared", "independent"):
        seen.clear()
        erase(replace(QUICK, pair_timesteps=rule, max_train_steps=3), tiny_sd, pairs, RecordingRun(tmp_path / rule))
        assert all(t[4:].tolist() == [999, 999] for t in seen)
        assert all(t[:4].max() < 750 for t in seen)
        assert all(torch.equal(t[:2], t[2:4]) for t in seen) == (rule == "shared")


def test_published_shorthands() -> None:
    assert published(500) == pytest.approx({"beta": 500, "learning_rate": 6e-5, "prior_weight": 5e6})
    assert published(1000) == pytest.approx({"beta": 1000, "learning_rate": 3e-5, "prior_weight": 1e7})
    defaults = Duo()
    assert published(defaults.beta) == pytest.approx(
        {"beta": 500, "learning_rate": defaults.learning_rate, "prior_weight": defaults.prior_weight}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0"),
        ({"lora_alpha": 0.0}, "lora_alpha is 0"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler is 'cosin'"),
        ({"rank": 10**9}, "rank is 1000000000, expected at most"),
        ({"prior_weight": -1.0}, "prior_weight"),
        ({"pair_timesteps": "both"}, "pair_timesteps"),
        ({"timestep_range": (0.75, 0.0)}, "timestep_range"),
        ({"prior_at": 1.5}, "prior_at is 1.5, expected a fraction"),
        ({"targets": ()}, "targets"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Duo(**changes)


def test_what_does_not_fit_the_pairs_or_the_model(tiny_sd, pairs: Pairs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only 4 pairs"):
        erase(replace(QUICK, train_batch_size=5), tiny_sd, pairs, RecordingRun(tmp_path))
    with pytest.raises(UserError, match="did you mean 'self_attention'"):
        erase(replace(QUICK, targets=("self-attention",)), tiny_sd, pairs, RecordingRun(tmp_path))


@pytest.mark.parametrize(
    ("changes", "pairs", "precision", "message"),
    [
        ({"train_batch_size": 5}, 4, {}, "train_batch_size = 5 but there are only 4 pairs"),
        ({"targets": ("cross-attention",)}, 4, {}, "did you mean 'cross_attention'"),
        ({"targets": ("feed_forward",)}, 4, {}, "no layers of scope 'feed_forward'"),
        ({"timestep_range": (0.1, 0.1001)}, 4, {}, "none of the 1000 steps lies between"),
        ({"prior_weight": 5e6}, 4, {"weights": "float16"}, "precision.weights is 'float16'"),
        ({}, 4, {"optimizer_8bit": True}, "needs bitsandbytes"),
    ],
)
def test_what_does_not_fit_is_known_before_there_are_pairs(
    tiny_sd, monkeypatch: Any, changes: dict[str, Any], pairs: int, precision: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    layers = type(tiny_sd).layers
    monkeypatch.setattr(
        type(tiny_sd), "layers", lambda self, scope: {} if scope == "feed_forward" else layers(self, scope)
    )
    QUICK.check(tiny_sd, pairs=pairs, precision=Precision())
    QUICK.check(tiny_sd, pairs=None, precision=Precision())
    with pytest.raises(UserError, match=message):
        replace(QUICK, **changes).check(tiny_sd, pairs=pairs, precision=Precision(**precision))


@pytest.mark.parametrize("force_zeros", [True, False])
def test_training_is_at_what_guidance_starts_from(
    vocabulary: Path, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force_zeros: bool
) -> None:
    from duo.families.sdxl import Sdxl
    from tiny_unet import sdxl_pipeline

    model = Sdxl(sdxl_pipeline(vocabulary, force_zeros=force_zeros), name="tiny")
    asked: list[Any] = []
    predict = Sdxl.predict
    monkeypatch.setattr(
        Sdxl, "predict", lambda self, x_t, t, text: (asked.append(text), predict(self, x_t, t, text))[1]
    )
    erase(replace(QUICK, max_train_steps=1), model, pairs, RecordingRun(tmp_path))
    assert len(asked) == 2  # reference and policy
    empty = model.text([""]).expand(6)
    for text in asked:
        for part, encoded in ((text.embeds, empty.embeds), (text.pooled, empty.pooled)):
            torch.testing.assert_close(part, torch.zeros_like(encoded) if force_zeros else encoded)
    assert min(empty.embeds.abs().max(), empty.pooled.abs().max()) > 0


def test_preconditioned_errors_are_those_of_the_clean_image(
    vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Margin and prior, worked out from what the model was asked and answered, as the authors' code for SD3 has it."""
    from duo.families._flow import FlowProcess
    from duo.families.sd3 import Sd3
    from tiny_flow import picture, sd3_pipeline

    drawn: list[torch.Tensor] = []
    asked: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    noised, predict = FlowProcess.noised, Sd3.predict

    def noised_and_kept(self: Any, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        drawn.append(x0)
        return noised(self, x0, eps, t)

    def predicted_and_kept(self: Any, x_t: torch.Tensor, t: torch.Tensor, text: Any) -> torch.Tensor:
        velocity = predict(self, x_t, t, text)
        asked.append((x_t, t, velocity.detach()))
        return velocity

    monkeypatch.setattr(FlowProcess, "noised", noised_and_kept)
    monkeypatch.setattr(Sd3, "predict", predicted_and_kept)
    run = RecordingRun(tmp_path)
    pairs = Pairs(names=["0.png", "1.png"], unsafe=[picture(0), picture(1)], safe=[picture(2), picture(3)])
    method = replace(
        QUICK,
        learning_rate=0.1,
        max_train_steps=2,
        timestep_range=(0.25, 1.0),
        prior_at=0.001,
        precondition_outputs=True,
    )
    erase(method, Sd3(sd3_pipeline(vocabulary), name="tiny"), pairs, run)

    clean = [x_t - t.view(-1, 1, 1, 1) * velocity for x_t, t, velocity in asked[-2:]]  # reference and policy, step 2
    reference, policy = ((one[:4] - drawn[-1]).square().mean((1, 2, 3)) for one in clean)
    unsafe_rise, safe_rise = (policy - reference).chunk(2)
    assert run.rows[1]["margin"] == pytest.approx((unsafe_rise - safe_rise).mean().item(), rel=1e-3)
    assert run.rows[1]["margin"] != 0
    assert run.rows[1]["prior"] == pytest.approx((clean[1][4:] - clean[0][4:]).square().mean().item(), rel=1e-3)
    assert asked[-1][1][4:].tolist() == pytest.approx([0.003 / 1.002] * 2)
    assert asked[-1][1][:4].min() >= 0.5 - 1e-6


@pytest.mark.parametrize("settings", [{"prior_at": 1.0}, {"prior_at": 0.5, "timestep_range": (0.0, 1.0)}])
def test_errors_on_a_clean_image_that_nothing_implies_are_refused_before_training(
    settings: dict[str, Any], tiny_sd, pairs: Pairs, tmp_path: Path
) -> None:
    process = tiny_sd.process
    tiny_sd.process = replace(process, alphas_cumprod=process.alphas_cumprod.clone())
    tiny_sd.process.alphas_cumprod[-1] = 0.0  # a zero terminal SNR
    run = RecordingRun(tmp_path)
    with pytest.raises(UserError, match=r"precondition_outputs = true, .* 'tiny' holds no signal at fraction 1 of"):
        erase(replace(QUICK, precondition_outputs=True, **settings), tiny_sd, pairs, run)
    assert not run.rows
    below = replace(QUICK, precondition_outputs=True, prior_at=0.5, max_train_steps=1)
    erase(below, tiny_sd, pairs, run)
    erase(replace(QUICK, max_train_steps=1, **settings), tiny_sd, pairs, RecordingRun(tmp_path / "plain"))
    tiny_sd.process = replace(tiny_sd.process, prediction_type="v_prediction")
    once = replace(QUICK, precondition_outputs=True, max_train_steps=1, **settings)
    erase(once, tiny_sd, pairs, RecordingRun(tmp_path / "v"))
