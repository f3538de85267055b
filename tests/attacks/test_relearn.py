from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from duo import parallel
from duo.attacks.relearn import Relearn
from duo.bases import base_digest
from duo.concept import AttackConcept
from duo.delta import Delta
from duo.errors import UserError
from duo.methods.spm import Spm
from duo.plugins import Access, Attack, Precision, Sampling
from duo.target import AccessError, Target
from recording import RecordingRun
from small_fire import FAMILIES, SmallFire
from small_fire import family as tiny

QUICK = Relearn(at=(1, 3), learning_rate=1e-3, batch_size=2, checkpointing_steps=2)
PICTURES = [Image.new("RGB", (64, 64), (60 * i, 255 - 60 * i, 90)) for i in range(4)]


@pytest.fixture
def knowledge() -> AttackConcept:
    return AttackConcept(
        name="fire",
        words=("burning",),
        anchor="intact",
        vector_pairs=(),
        attack_images=PICTURES[:3],
        attack_prompts=("a burning red house", "a burning blue car", "a burning boat"),
        attack_captions=("a red house", "a blue car", "a boat"),
        harmless_images=PICTURES[3:],
        harmless_captions=("a green tree",),
    )


def of(model: Any, access: Access = Relearn.access) -> Target:
    return Target(model, access=access, sampling=Sampling(), query_limit=Relearn.queries)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.safetensors"))}


class Scaled(torch.nn.Module):
    """ε_θ(x_t) = w·x_t, of which one AdamW step is worked by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(self.layer.weight, 0.5)
        self.layer.requires_grad_(False)


def scaled(family: Any) -> Any:
    family.denoiser = Scaled()
    family.component = "unet"
    family.told = []

    def predict(x_t: torch.Tensor, t: torch.Tensor, text: Any) -> torch.Tensor:
        family.told += text.embeds[:, 0, 0].tolist()
        return family.denoiser.layer(x_t.unsqueeze(-1)).squeeze(-1)

    def text(prompts: Any, *, tokens: Any = None) -> Any:
        rows = torch.tensor([float(len(one)) for one in prompts])
        return replace(family.unconditional(), embeds=rows.view(-1, 1, 1).expand(-1, 1, 16))

    family.predict, family.text = predict, text
    return family


def test_one_step_by_hand(family: Any, knowledge: AttackConcept, tmp_path: Path) -> None:
    """x0 = 1, so x_t = 1 + ε and the loss is mean (w·(1 + ε) − ε)²; a first step of Adam is the rate, by its sign."""
    model = scaled(family)
    white = replace(knowledge, attack_images=[Image.new("RGB", (8, 8), "white")], attack_prompts=("burning",))
    attack = Relearn(at=(1,), batch_size=3, learning_rate=0.01, weight_decay=0.1, max_grad_norm=1e9)
    run = RecordingRun(tmp_path)
    assert attack.prepare(of(model), white, run=run) == {}
    generator = torch.Generator().manual_seed(run.seed)
    torch.randint(1, (3,), generator=generator)  # which images
    torch.rand(3, generator=generator)  # whose captions are dropped
    torch.rand(3, generator=generator)  # the times
    eps = torch.randn(3, 2, 2, 2, generator=generator)
    x_t = 1 + eps
    assert run.rows[0]["loss"] == pytest.approx(float((0.5 * x_t - eps).square().mean()), rel=1e-6)
    slope = float((2 * x_t * (0.5 * x_t - eps)).mean())
    delta = Delta.load(tmp_path / "relearned-00001.safetensors")
    assert delta.kind == "weights"
    expected = -0.01 * 0.1 * 0.5 - 0.01 * (1 if slope > 0 else -1)
    assert delta.tensors["layer.weight.diff"].item() == pytest.approx(expected, rel=1e-4)
    assert model.told == [7.0, 7.0, 7.0]


def test_fits_the_images_better_than_the_model_as_it_is(family: Any, knowledge: AttackConcept, tmp_path: Path) -> None:
    """All images are 0.4: with unit noise the best w is E[x_t·ε] / E[x_t²] = 1 / (1 + 0.4²)."""
    model = scaled(family)
    grey = replace(knowledge, attack_images=[Image.new("RGB", (8, 8), (102, 0, 0))] * 3)
    attack = Relearn(at=(20, 400), batch_size=32, learning_rate=0.01, weight_decay=0.0)
    attack.prepare(of(model), grey, run=RecordingRun(tmp_path))
    found = []
    for name in ("relearned-00020", "relearned-00400"):
        with Delta.load(tmp_path / f"{name}.safetensors").attached(model):
            found.append(model.denoiser.layer.weight.item())
    assert 0.5 < found[0] < found[1]
    assert found[1] == pytest.approx(1 / 1.16, abs=0.02)
    assert model.denoiser.layer.weight.item() == 0.5


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        ({}, {len("a burning red house"), len("a burning blue car"), len("a burning boat")}),
        ({"captions": "neutral"}, {len("a red house"), len("a blue car"), len("a boat")}),
        ({"on": "harmless"}, {len("a green tree")}),
        ({"k": 1}, {len("a burning red house")}),
        ({"k": 1, "dropout": 0.5}, {len("a burning red house"), 0}),
    ],
)
def test_learns_from_the_first_k_images_with_their_captions(
    family: Any, knowledge: AttackConcept, tmp_path: Path, settings: dict[str, Any], lengths: set[int]
) -> None:
    model = scaled(family)
    attack = replace(QUICK, at=(20,), batch_size=4, **settings)
    attack.prepare(of(model), knowledge, run=RecordingRun(tmp_path))
    assert {*model.told} == lengths
    assert model.told.count(0) == pytest.approx(80 * attack.dropout, abs=25 * attack.dropout)
    means = {round(mean, 2) for mean, _ in model.process.seen}
    pictures = PICTURES[3:] if attack.on == "harmless" else PICTURES[: attack.k or 3]
    assert means == {round(one.getpixel((0, 0))[0] / 255, 2) for one in pictures}


def test_yields_a_curve(tiny_sd: Any) -> None:
    attempts = list(QUICK.search(of(tiny_sd), {}, "a burning boat", generator=torch.Generator()))
    assert [(one.variant, one.weights, one.record["steps"]) for one in attempts] == [
        ("0 steps", None, 0),
        ("1 steps", "relearned-00001", 1),
        ("3 steps", "relearned-00003", 3),
    ]
    assert {one.prompt for one in attempts} == {"a burning boat"}
    assert isinstance(QUICK, Attack)
    assert QUICK.passes(7) == {"denoiser": 6, "trained": 6}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *((name, "full") for name in FAMILIES),
        ("tiny_sd", "cross_attention"),
        ("flux", "cross_attention"),
        ("tiny_sd", "lora"),
        ("sd3", "lora"),
    ],
)
def test_runs_on_every_family_and_leaves_the_weights(
    name: str, parameters: Any, knowledge: AttackConcept, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = tiny(name, request)
    before = {key: tensor.clone() for key, tensor in model.denoiser.state_dict().items()}
    replace(QUICK, parameters=parameters, dropout=0.5).prepare(of(model), knowledge, run=RecordingRun(tmp_path))
    after = model.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(one.requires_grad or one.grad is not None for one in model.denoiser.parameters())
    deltas = [Delta.load(tmp_path / f"relearned-{steps:05d}.safetensors") for steps in QUICK.at]
    assert {one.kind for one in deltas} == {"lora" if parameters == "lora" else "weights"}
    assert [one.record["steps"] for one in deltas] == [1, 3]
    joint = "cross_attention" if model.component == "unet" else "joint_attention"
    layers = {
        "lora": lambda: model.layers("attention").keys(),
        "cross_attention": lambda: model.layers(joint).keys(),
        "full": lambda: {key for key, module in model.denoiser.named_modules() if [*module.parameters(recurse=False)]},
    }[parameters]()
    assert {*deltas[1].layers()} == {*layers}
    for delta in deltas:
        with delta.attached(model):
            assert any(not torch.equal(before[key], one) for key, one in model.denoiser.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "relearned-00001.safetensors",
        "relearned-00003.safetensors",
    ]


@pytest.mark.parametrize("parameters", ["text_inputs", "lora"])
def test_starts_from_an_attached_erasure_and_is_attached_over_it(
    tiny_sd: Any, knowledge: AttackConcept, tmp_path: Path, parameters: Any
) -> None:
    """A merged model is no different: with the erasure attached or in the weights, the same steps."""
    layer = sorted(tiny_sd.layers("text_inputs"))[0]
    weight = tiny_sd.denoiser.get_submodule(layer).weight
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    record = {"model": "tiny", "base": base_digest(tiny_sd, [layer])}  # as `duo erase` writes it
    erasure = Delta(kind="weights", component="unet", tensors={f"{layer}.weight.diff": change}, record=record)
    attack, original = replace(QUICK, parameters=parameters, at=(2,)), weight.data.clone()
    file = "relearned-00002.safetensors"
    with erasure.attached(tiny_sd):
        erased = weight.data.clone()
        attack.prepare(of(tiny_sd), knowledge, run=RecordingRun(tmp_path / "attached"))
        assert torch.equal(weight.data, erased)
        with Delta.load(tmp_path / "attached" / file).attached(tiny_sd):
            assert not torch.equal(weight.data, erased)
            relearned = weight.data.clone()
        assert torch.equal(weight.data, erased)
    assert torch.equal(weight.data, original)
    assert (relearned - erased).abs().max() < 0.05 < (relearned - original).abs().max()
    erasure.merge(tiny_sd)
    attack.prepare(of(tiny_sd), knowledge, run=RecordingRun(tmp_path / "merged"))
    assert digests(tmp_path / "merged") == digests(tmp_path / "attached")


@pytest.mark.parametrize("parameters", ["text_inputs", "lora"])
def test_a_gated_erasure_stays_beside_the_weights(
    tiny_sdxl: Any, knowledge: AttackConcept, tmp_path: Path, parameters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gates open for the captions that are learned. Those that are dropped are of no prompt on SDXL, but zeros."""
    spm = Spm(max_train_steps=2, grid_steps=3, anchors=1, learning_rate=0.5, lr_warmup_steps=0, checkpointing_steps=9)
    gated = spm.erase(tiny_sdxl, SmallFire(tmp_path), pairs=None, run=RecordingRun(tmp_path / "spm"))
    assert gated.kind == "gated"
    asked: list[Any] = []
    predict = type(tiny_sdxl).predict
    monkeypatch.setattr(
        type(tiny_sdxl),
        "predict",
        lambda self, x_t, t, text: (asked.append(text.prompts), predict(self, x_t, t, text))[1],
    )
    attack, losses = replace(QUICK, parameters=parameters, dropout=0.5, batch_size=4), []
    for name, erasure in (("plain", nullcontext()), ("gated", gated.attached(tiny_sdxl))):
        run = RecordingRun(tmp_path / name)
        with erasure:
            attack.prepare(of(tiny_sdxl), knowledge, run=run)
            with Delta.load(tmp_path / name / "relearned-00003.safetensors").attached(tiny_sdxl):
                assert tiny_sdxl.generate(["a boat"], seeds=[0], sampling=Sampling(num_inference_steps=1))
        losses.append(run.rows[0]["loss"])
    assert losses[0] != losses[1]
    gated_calls = [prompts for prompts in asked if prompts is not None]
    assert len(gated_calls) == 3
    assert {prompt for prompts in gated_calls for prompt in prompts} <= {"", *knowledge.attack_prompts}
    assert any("" in prompts for prompts in gated_calls)
    again = RecordingRun(tmp_path / "again", precision=Precision(gradient_checkpointing=True))
    with gated.attached(tiny_sdxl), pytest.raises(UserError, match=r"gradient_checkpointing .* set it to false"):
        attack.prepare(of(tiny_sdxl), knowledge, run=again)


@pytest.mark.parametrize(("parameters", "stopped"), [("text_inputs", 1), ("text_inputs", 2), ("lora", 3)])
def test_a_stopped_run_ends_with_the_same_bytes(
    tiny_sd: Any, knowledge: AttackConcept, tmp_path: Path, parameters: Any, stopped: int
) -> None:
    attack = replace(QUICK, parameters=parameters, at=(2, 4), checkpointing_steps=1)
    attack.prepare(of(tiny_sd), knowledge, run=RecordingRun(tmp_path / "whole"))
    half = RecordingRun(tmp_path / "half", stop_after=stopped)
    with pytest.raises(KeyboardInterrupt):
        attack.prepare(of(tiny_sd), knowledge, run=half)
    assert (tmp_path / "half" / "checkpoints").exists()
    again = RecordingRun(tmp_path / "half")
    attack.prepare(of(tiny_sd), knowledge, run=again)
    assert [row["step"] for row in again.rows] == [*range(stopped + 1, 5)]
    assert digests(tmp_path / "half") == digests(tmp_path / "whole")
    rerun = RecordingRun(tmp_path / "half")  # all is there: nothing is done again
    attack.prepare(of(tiny_sd), knowledge, run=rerun)
    assert rerun.rows == []
    with pytest.raises(UserError, match=r"relearned-00002.safetensors was made with another learning_rate"):
        replace(attack, learning_rate=1e-4).prepare(of(tiny_sd), knowledge, run=rerun)


def test_a_point_of_the_curve_depends_on_seed_and_steps_alone(
    tiny_sd: Any, knowledge: AttackConcept, tmp_path: Path
) -> None:
    for name, at, seed in (("all", (1, 2, 3), 5), ("last", (3,), 5), ("other", (3,), 6)):
        attack = replace(QUICK, parameters="text_inputs", at=at)
        attack.prepare(of(tiny_sd), knowledge, run=RecordingRun(tmp_path / name, seed=seed))
    found = {name: digests(tmp_path / name)["relearned-00003.safetensors"] for name in ("all", "last", "other")}
    assert found["all"] == found["last"] != found["other"]


def test_of_several_processes_one_relearns_and_asks_nobody(
    tiny_sd: Any, knowledge: AttackConcept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = replace(QUICK, parameters="text_inputs")
    attack.prepare(of(tiny_sd), knowledge, run=RecordingRun(tmp_path / "one"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    attack.prepare(of(tiny_sd), knowledge, run=RecordingRun(tmp_path / "two"))
    assert parallel.size() == 2
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


def test_needs_the_weights(tiny_sd: Any, knowledge: AttackConcept, tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="denoiser"):
        QUICK.prepare(of(tiny_sd, Access.GRADIENT), knowledge, run=RecordingRun(tmp_path))


def test_weights_in_half_precision_are_refused(tiny_sd: Any, knowledge: AttackConcept, tmp_path: Path) -> None:
    run = RecordingRun(tmp_path, precision=Precision(weights="bfloat16"))
    with pytest.raises(UserError, match=r"precision.weights is 'bfloat16'.*set it to float32"):
        QUICK.prepare(of(tiny_sd), knowledge, run=run)


@pytest.mark.parametrize(
    ("settings", "changed", "message"),
    [
        ({}, {"attack_images": ()}, "concept fire: no attack_images"),
        ({"on": "harmless"}, {"harmless_images": ()}, "concept fire: no harmless_images"),
        ({}, {"attack_prompts": ("one",)}, "3 attack_images but 1 attack_prompts"),
        ({"captions": "neutral"}, {"attack_captions": ()}, "3 attack_images but 0 attack_captions"),
        ({"k": 4}, {}, "k is 4, but there are 3 attack_images"),
    ],
)
def test_images_that_do_not_fit_are_refused(
    tiny_sd: Any,
    knowledge: AttackConcept,
    tmp_path: Path,
    settings: dict[str, Any],
    changed: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        replace(QUICK, **settings).prepare(of(tiny_sd), replace(knowledge, **changed), run=RecordingRun(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("on", "all"),
        ("captions", "words"),
        ("parameters", "unet"),
        ("k", 0),
        ("rank", 0),
        ("learning_rate", 0.0),
        ("weight_decay", -1.0),
        ("max_grad_norm", 0.0),
        ("batch_size", 0),
        ("dropout", 1.0),
        ("at", ()),
        ("at", (0, 1)),
        ("at", (5, 5)),
        ("at", (5, 1)),
        ("checkpointing_steps", 0),
    ],
)
def test_impossible_settings_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        replace(QUICK, **{field: value})
