"""SPM: the objective by hand, anchors, where gradients flow, and the gates of what comes out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from duo.conditioning import Conditioning
from duo.delta import Delta, compose
from duo.errors import UserError
from duo.methods import spm
from duo.methods.spm import Spm, erase_loss, random_anchors
from duo.plugins import Precision
from duo.recipe import load_recipe
from duo.sampling import grid
from duo.training import attach_lora
from erasing import check_resumed, erase
from recording import RecordingRun
from small_fire import FAMILIES, SmallFire, changed, family

QUICK = Spm(
    learning_rate=1e-2,
    lr_warmup_steps=2,
    grid_steps=2,
    anchors=2,
    targets=("cross_attention",),
    max_train_steps=3,
    train_batch_size=1,
    checkpointing_steps=2,
)


def predicted(model: Any, text: Conditioning) -> Tensor:
    x_t = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.predict(x_t.expand(len(text), -1, -1, -1), grid(model, 3)[1].expand(len(text)), text)


def test_the_loss_by_hand() -> None:
    student, concept, neutral = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])
    # neutral − 2·(concept − neutral) = (−3, 4); the student is (4, −2) off it
    assert erase_loss(student, concept=concept, neutral=neutral, eta=2.0) == (16 + 4) / 2
    assert erase_loss(student, concept=concept, neutral=neutral, eta=0.0) == 0


def test_random_anchors_have_the_published_lengths() -> None:
    text = Conditioning(embeds=torch.randn(1, 24, 32) * 3, pooled=torch.randn(1, 20))
    found = random_anchors(text, 400, generator=torch.Generator().manual_seed(0))
    assert found.embeds.shape == (400, 24, 32)
    assert found.pooled is not None and found.pooled.shape == (400, 20)
    for rows, like in ((found.embeds, text.embeds), (found.pooled, text.pooled)):
        assert like is not None
        lengths = rows.flatten(1).norm(dim=1) / like.norm()
        assert 0.8 <= lengths.min() < 0.81 and 1.19 < lengths.max() <= 1.2
    assert torch.nn.functional.cosine_similarity(found.embeds.flatten(1), text.embeds.flatten(1)).abs().max() < 0.2
    # In two dimensions directions near the text's are rarer: the density is min(1, 1 − cos), the mean cosine
    # −π/2/(2π − 2).
    text = Conditioning(embeds=torch.tensor([[[2.0, 0.0]]]))
    found = random_anchors(text, 4000, generator=torch.Generator().manual_seed(0))
    assert torch.nn.functional.normalize(found.embeds[:, 0], dim=-1)[:, 0].mean() == pytest.approx(-0.367, abs=0.04)


def test_membranes_start_as_published(tiny_sd) -> None:
    layers = sorted(tiny_sd.layers("transformers"))
    with attach_lora(tiny_sd.denoiser, layers, rank=1, alpha=1.0, seed=0, init="kaiming") as lora:
        tensors = lora.tensors()
    assert len(tensors) == 2 * len(layers)
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            assert not tensor.any()
        else:
            bound = tensor[0].numel() ** -0.5
            assert 0.5 * bound < tensor.abs().max() <= bound
            assert tensor.shape[0] == 1


def watched(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Conditioning, Tensor]]:
    """What the family is asked to predict, and its answers."""
    asked: list[tuple[Tensor, Tensor, Conditioning, Tensor]] = []
    predict = type(model).predict

    def kept(self: Any, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        output = predict(self, x_t, t, text)
        if output.requires_grad:
            output.retain_grad()
        asked.append((x_t, t, text, output))
        return output

    monkeypatch.setattr(type(model), "predict", kept)
    return asked


def test_a_step_by_hand(tiny_sd, concept: SmallFire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watched(tiny_sd, monkeypatch)
    quick = replace(QUICK, concepts=("burning",), eta=2.0, anchor_weight=50.0, lr_warmup_steps=0)
    method = replace(quick, grid_steps=3, train_batch_size=2)
    run = RecordingRun(tmp_path, expected=frozenset({"loss", "erase", "anchoring"}))
    erase(method, tiny_sd, concept, run)
    (x_frozen, t_frozen, text_frozen, frozen), (x_t, t, text, student) = asked[-2:]
    z = x_t[:2]
    # One z for all terms; the frozen model is asked for ∅, c and the anchors, the student for c and the anchors.
    assert torch.equal(x_frozen, torch.cat([z, z, z.repeat_interleave(2, dim=0)]))
    assert torch.equal(x_t, torch.cat([z, z.repeat_interleave(2, dim=0)]))
    assert t.unique() == t_frozen.unique() and t[0] in grid(tiny_sd, 3)[1:]
    burning, empty = tiny_sd.text(["burning"] * 2).embeds, tiny_sd.text([""] * 2).embeds
    assert torch.equal(text_frozen.embeds, torch.cat([empty, burning, text.embeds[2:]]))
    assert torch.equal(text.embeds[:2], burning)
    target = 3 * frozen[:2] - 2 * frozen[2:4]
    erased, anchoring = (student[:2] - target).square().mean(), (student[2:] - frozen[4:]).square().mean()
    assert anchoring > 0
    row = run.rows[-1]
    assert row["erase"] == pytest.approx(erased.item(), rel=1e-4)
    assert row["anchoring"] == pytest.approx(anchoring.item(), rel=1e-4)
    assert row["loss"] == pytest.approx((erased + 50 * anchoring).item(), rel=1e-4)
    # Gradients reach the student's rows alone, and every anchor's.
    assert not frozen.requires_grad
    assert student.grad is not None
    assert (student.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in tiny_sd.denoiser.parameters())


def test_the_student_itself_samples_z(tiny_sd, concept: SmallFire, tmp_path: Path, monkeypatch: Any) -> None:
    """At the second step the trajectory of the membranes differs from the frozen model's."""
    sampled: list[tuple[Any, Tensor]] = []
    inner = spm.partly_sampled

    def kept(model: Any, *given: Any, **named: Any) -> Tensor:
        z = inner(model, *given, **named)
        assert named["guidance_scale"] == 3 and 1 <= named["stop"] < named["steps"] == 3
        sampled.append(((given, named), z))
        return z

    monkeypatch.setattr(spm, "partly_sampled", kept)
    erase(replace(QUICK, grid_steps=3, lr_warmup_steps=0), tiny_sd, concept, RecordingRun(tmp_path))
    differs = [(inner(tiny_sd, *given, **named) - z).abs().max().item() for (given, named), z in sampled]
    assert differs[0] < 1e-6 < 1e-4 < differs[2]


def test_neutral_and_anchors_may_be_the_concepts_own(tiny_sd, concept: SmallFire, tmp_path: Path, monkeypatch) -> None:
    asked = watched(tiny_sd, monkeypatch)
    method = replace(QUICK, prompts="prompts", neutral="anchor", anchoring="harmless", max_train_steps=1)
    method = replace(method, train_batch_size=2)
    erase(method, tiny_sd, concept, RecordingRun(tmp_path))
    texts = asked[-2][2].embeds
    unsafe = ["a burning red house", "a red house on fire", "a burning blue car"]
    safe, harmless = ["a red house", "a red house", "a blue car"], ["a boat", "a car"]

    def number(row: Tensor, among: list[str]) -> list[int]:
        return [i for i, one in enumerate(tiny_sd.text(among).embeds) if torch.equal(one, row)]

    for i in range(2):
        (which,) = number(texts[2 + i], unsafe)
        assert which in number(texts[i], safe)
    assert all(number(row, harmless) for row in texts[4:])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_and_opens_by_prompt(
    name: str, concept: SmallFire, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = family(name, request)
    before = {key: tensor.clone() for key, tensor in model.denoiser.state_dict().items()}
    method = replace(QUICK, targets=("transformers",), max_train_steps=2, lr_warmup_steps=0)
    delta = erase(method, model, concept, RecordingRun(tmp_path))
    assert all(torch.equal(before[key], tensor) for key, tensor in model.denoiser.state_dict().items())
    assert delta.kind == "gated"
    assert delta.layers() == sorted(model.layers("transformers"))
    assert delta.record["gates"][0]["concepts"] == ["burning", "on fire"]
    text = model.text(["burning"])
    with delta.attached(model):
        opened = predicted(model, model.text(["burning"]))
    assert torch.isfinite(opened).all()
    assert (opened - predicted(model, text)).abs().max() > 1e-5


def test_a_closed_gate_is_the_identity_and_several_have_no_cross_terms(
    tiny_sd, concept: SmallFire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from duo import gating

    one = erase(replace(QUICK, concepts=("burning",)), tiny_sd, concept, RecordingRun(tmp_path / "1"))
    two = erase(replace(QUICK, concepts=("on fire",)), tiny_sd, concept, RecordingRun(tmp_path / "2", seed=6))
    both = compose([one, two])
    plain, text = predicted(tiny_sd, tiny_sd.text(["a boat"])), ["a boat"]
    gates = {"burning": 0.0, "on fire": 0.0}
    monkeypatch.setattr(
        gating, "strength", lambda embeds, words, *, concept_embeds, concept_words: torch.full(
            (len(embeds),), gates["burning" if torch.equal(concept_embeds, one.tensors["0.gate.embeds"]) else "on fire"]
        )
    )  # fmt: skip
    with both.attached(tiny_sd):
        assert torch.equal(predicted(tiny_sd, tiny_sd.text(text)), plain)
    # With the gates at γ1 and γ2, each layer adds γ1·B1·A1 + γ2·B2·A2: what the weights W + Σ γ·B·A do.
    gates |= {"burning": 0.5, "on fire": 0.25}
    parts = [
        Delta(
            kind="lora",
            component="unet",
            tensors={k[2:]: v for k, v in delta.tensors.items() if ".lora_" in k},
            record={"model": "tiny"},
        )
        for delta in (one, two)
    ]
    with compose(parts, [0.5, 0.25]).attached(tiny_sd):
        wanted = predicted(tiny_sd, tiny_sd.text(text))
    assert (wanted - plain).abs().max() > 1e-4
    with both.attached(tiny_sd):
        torch.testing.assert_close(predicted(tiny_sd, tiny_sd.text(text)), wanted, rtol=1e-4, atol=1e-5)


def test_one_adapter_a_concept(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    method = replace(QUICK, adapters="per_concept")
    run = RecordingRun(tmp_path / "apart")
    delta = erase(method, tiny_sd, concept, run)
    assert [gate["concepts"] for gate in delta.record["gates"]] == [["burning"], ["on fire"]]
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4, 5, 6]
    assert delta.record["config"]["adapters"] == "per_concept" and "composed" not in delta.record
    alone = erase(replace(method, concepts=("burning",)), tiny_sd, concept, RecordingRun(tmp_path / "alone"))
    own = {key: tensor for key, tensor in delta.tensors.items() if key.startswith("0.")}
    assert own.keys() == alone.tensors.keys()
    assert all(torch.equal(own[key], alone.tensors[key]) for key in own)
    open_ = erase(replace(method, gate="open"), tiny_sd, concept, RecordingRun(tmp_path / "apart"))
    assert open_.kind == "lora"
    assert {one.shape[0] for key, one in open_.tensors.items() if ".lora_A." in key} == {2}


def test_an_open_one_is_a_lora_that_can_be_merged(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    gated = erase(QUICK, tiny_sd, concept, RecordingRun(tmp_path))
    run = RecordingRun(tmp_path)
    opened = erase(replace(QUICK, gate="open"), tiny_sd, concept, run)  # from the checkpoint of the same training
    assert not run.rows
    assert opened.kind == "lora" and "gates" not in opened.record
    assert all(torch.equal(gated.tensors[f"0.{key}"], tensor) for key, tensor in opened.tensors.items())
    assert changed(tiny_sd, opened) == {f"{layer}.weight" for layer in tiny_sd.layers("cross_attention")}
    with gated.attached(tiny_sd):
        wanted = predicted(tiny_sd, tiny_sd.text(["burning"]))  # the concept itself opens the gate wholly
    opened.merge(tiny_sd)
    torch.testing.assert_close(predicted(tiny_sd, tiny_sd.text(["burning"])), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("adapters", "stop"), [("joint", 3), ("per_concept", 8)])
def test_a_resumed_erasure_ends_with_the_same_file(
    tiny_sd, concept: SmallFire, tmp_path: Path, adapters: Any, stop: int
) -> None:
    method = replace(QUICK, adapters=adapters, max_train_steps=5)
    # The checkpoint is of the step before.
    check_resumed(lambda run: erase(method, tiny_sd, concept, run), tmp_path, stop_after=stop, goes_on_at=stop)


def test_training_erases_and_the_anchors_hold(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    drift = []
    for weight in (0.0, 1e4):
        run = RecordingRun(tmp_path / str(weight))
        method = replace(QUICK, concepts=("burning",), anchor_weight=weight, max_train_steps=12)
        erase(method, tiny_sd, concept, run)
        drift.append(sum(row["anchoring"] for row in run.rows[-5:]))
        if not weight:
            assert sum(row["erase"] for row in run.rows[-5:]) < 0.7 * sum(row["erase"] for row in run.rows[:5])
    assert drift[1] < 0.3 * drift[0]


def test_passes_are_those_of_the_denoiser(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    rows: list[int] = []
    hook = tiny_sd.denoiser.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    method = replace(QUICK, train_batch_size=2)  # one of two steps is sampled
    erase(method, tiny_sd, concept, RecordingRun(tmp_path))
    hook.remove()
    assert method.passes(0) == {"denoiser": sum(rows), "trained": 18, "steps": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neutral": "none"}, "neutral is 'none', expected one of empty, anchor"),
        ({"gate": "half"}, "gate is 'half'"),
        ({"adapters": "two"}, "adapters is 'two'"),
        ({"anchoring": "none"}, "anchoring is 'none'"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler is 'cosin'"),
        ({"prompts": "pairs"}, "prompts is 'pairs'"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"anchors": 0}, "anchors is 0"),
        ({"eta": -1.0}, "eta is -1"),
        ({"anchor_weight": float("nan")}, "anchor_weight is nan"),
        ({"grid_steps": 1}, "grid_steps is 1, expected at least 2"),
        ({"targets": ()}, "targets is empty"),
        ({"concepts": ("",)}, "concepts has an empty text"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spm(**changes)


def test_the_recipe_has_the_published_values() -> None:
    method = load_recipe("sd14-nudity-spm").method.make("methods", "method")
    assert (method.rank, method.lora_alpha, method.targets, method.eta) == (1, 1.0, ("transformers",), 1.0)
    assert (method.anchor_weight, method.anchors, method.anchoring) == (1000.0, 4, "random")
    assert (method.grid_steps, method.guidance_scale, method.neutral) == (30, 3.0, "empty")
    assert (method.learning_rate, method.lr_scheduler, method.lr_warmup_steps) == (1e-4, "cosine_with_restarts", 500)
    assert (method.lr_num_cycles, method.max_train_steps, method.train_batch_size) == (3, 3000, 1)
    assert (method.gate, method.weight_decay, method.max_grad_norm) == ("prompt", 1e-2, 0.0)
    assert load_recipe("toybox-fire-spm").method.name == "spm"


def test_what_cannot_be_trained_is_refused_early(tiny_sd, monkeypatch: pytest.MonkeyPatch) -> None:
    QUICK.check(tiny_sd, pairs=None, precision=Precision(weights="bfloat16"))  # the membranes are float32 beside it
    with pytest.raises(UserError, match="no layer scope is called 'cross_atention'"):
        replace(QUICK, targets=("cross_atention",)).check(tiny_sd, pairs=None, precision=Precision())
    with monkeypatch.context() as patched:
        patched.setattr(tiny_sd, "layers", lambda scope: {})
        with pytest.raises(UserError, match="has no layers of scope 'cross_attention'"):
            QUICK.check(tiny_sd, pairs=None, precision=Precision())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        QUICK.check(tiny_sd, pairs=None, precision=Precision(optimizer_8bit=True))
