from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from duo.checkpoint import read_tensors
from duo.conditioning import Conditioning
from duo.drawn import encode
from duo.errors import UserError
from duo.methods import sa
from duo.methods.sa import Sa, amnesia_loss, ewc, fisher_times, positions, summed_gradient, trained_modules
from duo.plugins import Precision
from duo.recipe import load_recipe
from erasing import erase
from recording import RecordingRun
from small_fire import FAMILIES, SmallFire, changed, family

QUICK = Sa(
    surrogate_images=3,
    replay_images=3,
    fisher_samples=3,
    fisher_timesteps=4,
    fisher_batch_size=2,
    fisher_checkpointing=1,
    ewc_weight=1e-3,
    learning_rate=1e-3,
    max_train_steps=4,
    train_batch_size=2,
    checkpointing_steps=2,
)
# What "noxattn" leaves as it is, in parts of the weights' names; " " is where they begin.
LEFT_OUT = {
    "unet": (".attn2.to_k.", ".attn2.to_out.", " time_embedding.", " conv_out.", " conv_norm_out."),
    "transformer": (".attn.add_q_proj.", " context_embedder.", " time_text_embed.", " norm_out.", " proj_out."),
}


# --- the objective -----------------------------------------------------------------------------------


def test_the_objective_by_hand() -> None:
    now, before, fisher = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 5.0]), torch.tensor([0.5, 2.0])
    other = torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([[0.25]])
    penalty = ewc([(now, before, fisher), other])
    assert penalty.item() == 0.5 * 1 + 2 * 9 + 0.25 * 4  # no half
    errors = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 1.5])
    assert amnesia_loss(*errors, penalty, replay_weight=2.0, ewc_weight=10.0).item() == 2 + 2 * 1 + 10 * 19.5


class Line:
    """A family whose denoiser is ε̂ = w·x_t + b, on a process of T = 4 steps: x_t = x0 + s_t·ε with target ε."""

    scales = torch.tensor([0.5, 1.0, 2.0, 3.0])

    def __init__(self) -> None:
        self.w, self.b = (nn.Parameter(torch.tensor(one)) for one in (0.7, -0.2))
        self.unused = nn.Parameter(torch.tensor(1.0))
        self.process = SimpleNamespace(
            noised=lambda x0, eps, t: x0 + self.scales[t].view(-1, 1) * eps, target=lambda x0, eps, t: eps
        )
        self.most_rows = 0

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, text: Conditioning) -> torch.Tensor:
        assert len(x_t) == len(t) == len(text)
        self.most_rows = max(self.most_rows, len(t))
        return self.w * x_t + self.b


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_the_summed_gradient_by_hand(rows: int) -> None:
    """∂/∂w of mean (w·x_t + b − ε)² is mean 2·(w·x_t + b − ε)·x_t; of b it is without the x_t; summed over times."""
    model, x0 = Line(), torch.tensor([[1.0, -2.0]])
    t, eps = torch.arange(4), torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    text = Conditioning(embeds=torch.zeros(1, 1, 1))
    weights = [model.w, model.b, model.unused]
    of_w, of_b, of_none = summed_gradient(model, weights, x0, text, t, eps, rows=rows)  # type: ignore[arg-type]
    assert model.most_rows == rows
    assert of_none == 0
    expected = [0.0, 0.0]
    for step, noise in zip(t.tolist(), eps, strict=True):
        for clean, drawn in zip(x0[0].tolist(), noise.tolist(), strict=True):
            x_t = clean + Line.scales[step].item() * drawn
            error = 0.7 * x_t - 0.2 - drawn
            expected[0] += error * x_t
            expected[1] += error
    assert [of_w.item(), of_b.item()] == pytest.approx(expected, rel=1e-5)


def test_fewer_times_make_the_square_too_large_by_the_variance_of_the_sum() -> None:
    """What the page of the method says of `fisher_timesteps`, over every choice of 2 of 4 times a step of 2 apart."""
    gradients = [1.0, -0.5, 2.0, 0.25]
    sums = [4 / 2 * (gradients[start] + gradients[start + 2]) for start in (0, 1)]
    mean = sum(sums) / 2
    assert mean == sum(gradients)  # the sum has no bias
    variance = sum((one - mean) ** 2 for one in sums) / 2
    assert sum(one**2 for one in sums) / 2 == mean**2 + variance
    # Where gradients are uncorrelated: 1000/k − 1 times the sum of their squares, here over all signs of them.
    signed = list(itertools.product((-1, 1), repeat=4))
    thin = [(2 * (a * gradients[0] + c * gradients[2])) ** 2 for a, b, c, d in signed]
    thin += [(2 * (b * gradients[1] + d * gradients[3])) ** 2 for a, b, c, d in signed]
    full = [sum(s * g for s, g in zip(signs, gradients, strict=True)) ** 2 for signs in signed]
    squares = sum(one**2 for one in gradients)
    assert sum(thin) / len(thin) - sum(full) / len(full) == pytest.approx((4 / 2 - 1) * squares)


def test_the_times_of_the_fisher_information(tiny_sd, vocabulary: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    assert fisher_times(tiny_sd, 1000, generator=generator).tolist() == list(range(1000))
    firsts = set()
    for _ in range(40):
        t = fisher_times(tiny_sd, 250, generator=generator)
        assert set(t.diff().tolist()) == {4}
        firsts.add(int(t[0]))
    assert firsts == {0, 1, 2, 3}
    assert fisher_times(tiny_sd, 7, generator=generator).max() < 1000


@pytest.mark.parametrize("k", [1, 7, 16, 250, 300, 700, 1000])
def test_every_time_has_the_same_chance(k: int) -> None:
    """Over all starts each of the 1000 is in exactly k draws, so 1000/k times a drawn sum has no bias."""
    drawn = [positions(start, k) for start in range(1000)]
    assert torch.bincount(torch.cat(drawn), minlength=1000).tolist() == [k] * 1000
    for one in drawn:
        round_them = torch.cat([one, one[:1] + 1000]).diff()  # the last gap leads back to the first
        assert round_them.min() >= 1000 // k, "none twice"
        assert round_them.max() <= -(-1000 // k)
    assert positions(995, 7).tolist() == [137, 280, 423, 566, 709, 852, 995]  # 995 + 142, 285, 428, 571, 714, 857


def test_the_start_is_any_of_the_times(tiny_sd) -> None:
    """At 1 of 1000 the start is all there is; at 700 none is left out for good."""
    generator = torch.Generator().manual_seed(0)
    single = [int(fisher_times(tiny_sd, 1, generator=generator)) for _ in range(200)]
    assert min(single) < 50
    assert max(single) > 950
    seen = torch.cat([fisher_times(tiny_sd, 700, generator=generator) for _ in range(60)])
    assert set(seen.tolist()) == set(range(1000))


def test_all_times_of_a_flow_end_in_pure_noise(request: pytest.FixtureRequest) -> None:
    t = fisher_times(family("sd3", request), 1000, generator=torch.Generator())
    assert t[-1] == 1
    assert t[0] > 0
    assert (t.diff() > 0).all()


def test_the_fisher_information_is_that_of_loops(
    tiny_sd, concept: SmallFire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times one by one with `backward`: per image summed and times 1000/k, then squared, then the mean over images."""
    asked: list[Any] = []
    own = sa.summed_gradient

    def look(model: Any, weights: Any, x0: Any, text: Any, t: Any, eps: Any, *, rows: int) -> Any:
        asked.append((x0, text, t, eps))
        return own(model, weights, x0, text, t, eps, rows=rows)

    monkeypatch.setattr(sa, "summed_gradient", look)
    erase(QUICK, tiny_sd, concept, RecordingRun(tmp_path))
    kept, record = read_tensors(tmp_path / "fisher.safetensors")
    assert record["images"] == len(asked) == 3
    assert not any(torch.equal(asked[0][3], eps) for *_, eps in asked[1:])
    captions = tiny_sd.text(concept.harmless)
    assert len(captions) == 2
    assert all(asked[i][1].embeds.equal(captions.embeds[i % 2 : i % 2 + 1]) for i in range(3))

    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    weight = tiny_sd.denoiser.get_parameter(name).requires_grad_()
    total = torch.zeros_like(weight)
    for x0, text, times, eps in asked:
        weight.grad = None
        for i in range(4):
            x_t = tiny_sd.process.noised(x0, eps[i : i + 1], times[i : i + 1])
            error = tiny_sd.predict(x_t, times[i : i + 1], text) - eps[i : i + 1]
            (error.square().mean() * 250).backward()
        total += weight.grad.square()
    assert torch.allclose(kept[name], total, rtol=1e-3, atol=1e-6 * total.max().item())


# --- erasing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("parameters", ["noxattn", "full"])
def test_it_erases_on_every_family(
    name: str, parameters: Any, concept: SmallFire, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run, model = RecordingRun(tmp_path), family(name, request)
    delta = erase(replace(QUICK, parameters=parameters), model, concept, run)
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4]
    assert run.rows[0]["ewc"] == 0 < run.rows[-1]["ewc"]
    first = run.rows[0]
    assert first["loss"] == pytest.approx(first["surrogate"] + first["replay"], rel=1e-5)
    assert all(torch.isfinite(one).all() for one in delta.tensors.values())
    moved = changed(model, delta)
    assert moved
    assert not any(one.requires_grad or one.grad is not None for one in model.denoiser.parameters())
    parts = LEFT_OUT["transformer" if name in ("sd3", "flux") else "unet"]
    assert all(any(part in f" {one}" for one in moved) for part in parts) == (parameters == "full")
    assert any(any(part in f" {one}" for one in moved) for part in parts) == (parameters == "full")
    if parameters == "full":
        assert {one.removesuffix(".diff") for one in delta.tensors} == {
            one for one, _ in model.denoiser.named_parameters()
        }


def test_the_second_attention_of_sd35_is_no_cross_attention(request: pytest.FixtureRequest) -> None:
    """Its blocks have an `attn2` too, which attends from image to image."""
    model = family("sd3", request)
    trained = trained_modules(model.denoiser, "noxattn", component=model.component)
    assert "transformer_blocks.0.attn2.to_q" in trained


def test_a_large_weight_keeps_the_weights(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    sizes = []
    for weight in (0.0, 1e12):
        method = replace(QUICK, ewc_weight=weight, max_train_steps=20, train_batch_size=1, weight_decay=0.0)
        delta = erase(method, tiny_sd, concept, RecordingRun(tmp_path / str(weight)))
        fisher, _ = read_tensors(tmp_path / str(weight) / "fisher.safetensors")
        # Where F is almost zero (biases before a softmax) nothing is held, whatever λ.
        held = [delta.tensors[f"{name}.diff"][one > 1e-3 * one.max()] for name, one in fisher.items()]
        sizes.append(torch.cat(held).abs().mean())
    assert sizes[1] < 0.1 * sizes[0]


def test_the_penalty_is_summed_over_trained_weights_alone(
    tiny_sd, concept: SmallFire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    own = sa.ewc

    def look(weights: Any) -> torch.Tensor:
        seen.append([(now.detach().clone(), before.clone(), fisher) for now, before, fisher in weights])
        return own(weights)

    monkeypatch.setattr(sa, "ewc", look)
    originals = {name: one.clone() for name, one in tiny_sd.denoiser.named_parameters()}
    run = RecordingRun(tmp_path)
    delta = erase(QUICK, tiny_sd, concept, run)
    names = [name.removesuffix(".diff") for name in delta.tensors]
    assert len(seen[0]) == len(names) < len(originals)
    fisher, _ = read_tensors(tmp_path / "fisher.safetensors")
    assert sorted(fisher) == sorted(names)
    # θ* stays what it was while θ moves, and the sum is λ times that of the logged step.
    for step, (weights, row) in enumerate(zip(seen, run.rows, strict=True)):
        by_hand = sum((f.double() * (now - before).double().square()).sum().item() for now, before, f in weights)
        assert row["ewc"] == pytest.approx(1e-3 * by_hand, rel=1e-4), step
    assert sorted(one.sum().item() for _, one, _ in seen[-1]) == pytest.approx(
        sorted(originals[name].sum().item() for name in names)
    )
    means = sorted(one.sum().item() / 3 for one in fisher.values())
    assert sorted(one.sum().item() for *_, one in seen[0]) == pytest.approx(means)


@pytest.mark.parametrize("text", ["words", "prompts"])
def test_what_surrogates_and_replays_are_called(
    text: Any, tiny_sd, concept: SmallFire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []
    predict, noised = type(tiny_sd).predict, type(tiny_sd.process).noised

    def look(self: Any, x_t: torch.Tensor, t: torch.Tensor, given: Conditioning) -> torch.Tensor:
        asked.append((x_t, given.embeds))
        return predict(self, x_t, t, given)

    monkeypatch.setattr(type(tiny_sd), "predict", look)
    clean: list[torch.Tensor] = []
    monkeypatch.setattr(
        type(tiny_sd.process), "noised", lambda self, x0, eps, t: (clean.append(x0), noised(self, x0, eps, t))[1]
    )
    method = replace(QUICK, concept_text=text, max_train_steps=8, train_batch_size=4)
    erase(method, tiny_sd, concept, RecordingRun(tmp_path))
    twins = concept.targets("prompts")
    drawn = {
        name: encode(tiny_sd, [Image.open(tmp_path / name / f"{i:04d}.png") for i in range(3)])
        for name in ("surrogate", "replay")
    }
    called: set[tuple[int, int]] = set()
    known = tiny_sd.text(concept.words if text == "words" else [unsafe for unsafe, _ in twins]).embeds
    captions = tiny_sd.text(concept.harmless).embeds
    for x0, (_, embeds) in list(zip(clean, asked, strict=True))[-8:]:
        for row in range(4):
            (image,) = (i for i in range(3) if torch.allclose(x0[row], drawn["surrogate"][i], atol=1e-5))
            (name,) = (i for i in range(len(known)) if torch.equal(embeds[row], known[i]))
            called.add((image, name))
            (other,) = (i for i in range(3) if torch.allclose(x0[4 + row], drawn["replay"][i], atol=1e-5))
            assert torch.equal(embeds[4 + row], captions[other % 2])
    if text == "words":
        assert called == {(image, name) for image in range(3) for name in range(2)}
    else:
        assert called == {(image, image) for image in range(3)}


class StoppedAtImage(RecordingRun):
    """A run that ends while it tells that so many images of the Fisher information are done."""

    def update(self, step: int, **numbers: float) -> None:
        if (self.folder / "fisher.safetensors").exists() and step == 2:
            raise KeyboardInterrupt


def test_a_resumed_erasure_ends_with_the_same_files(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    erase(QUICK, tiny_sd, concept, RecordingRun(tmp_path / "whole")).save(tmp_path / "whole.safetensors")
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        erase(QUICK, tiny_sd, concept, StoppedAtImage(stopped))
    assert read_tensors(stopped / "fisher.safetensors")[1]["images"] == 2
    assert not (stopped / "checkpoints").exists()
    with pytest.raises(KeyboardInterrupt):
        erase(QUICK, tiny_sd, concept, RecordingRun(stopped, stop_after=3))
    run = RecordingRun(stopped)
    erase(QUICK, tiny_sd, concept, run).save(tmp_path / "stopped.safetensors")
    assert run.rows[0]["step"] == 3
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "stopped.safetensors").read_bytes()
    assert (tmp_path / "whole/fisher.safetensors").read_bytes() == (stopped / "fisher.safetensors").read_bytes()


def test_another_fisher_information_is_not_taken_up(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    erase(QUICK, tiny_sd, concept, RecordingRun(tmp_path))
    with pytest.raises(UserError, match=r"fisher.safetensors was made with another fisher_timesteps; name a new --out"):
        erase(replace(QUICK, fisher_timesteps=5), tiny_sd, concept, RecordingRun(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"ewc_weight": -1.0}, "ewc_weight is -1"),
        ({"fisher_timesteps": 1001}, "fisher_timesteps is 1001, expected at most 1000"),
        ({"fisher_samples": 5000}, "fisher_samples is 5000, expected at most replay_images, 4999"),
        ({"concept_text": "word"}, "concept_text is 'word'"),
        ({"parameters": "xattn"}, "parameters is 'xattn'"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sa(**changes)


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ({"weights": "float16"}, "precision.weights is 'float16', in which small steps are lost; set it to float32"),
        ({"weights": "bfloat16"}, "precision.weights is 'bfloat16'"),
        ({"optimizer_8bit": True}, "needs bitsandbytes"),
    ],
)
def test_what_cannot_be_trained_is_known_before_images_are_drawn(
    tiny_sd,
    concept: SmallFire,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    QUICK.check(tiny_sd, pairs=None, precision=Precision(dtype="float16"))
    refused = Precision(**precision)
    with pytest.raises(UserError, match=message):
        QUICK.check(tiny_sd, pairs=None, precision=refused)
    with pytest.raises(UserError, match=message):
        erase(QUICK, tiny_sd, concept, RecordingRun(tmp_path, precision=refused))
    assert not list(tmp_path.rglob("*.png"))


def test_published_values() -> None:
    """Of configs/stable-diffusion/forget_nudity.yaml in the authors' repository, on their four GPUs."""
    used = load_recipe("sd14-nudity-sa").method.make("methods", "method")
    assert (used.parameters, used.ewc_weight, used.replay_weight, used.concept_text) == ("noxattn", 50, 1, "words")
    assert used.learning_rate == pytest.approx(1e-5 * 4 * 4)
    assert used.train_batch_size == 4 * 4
    assert used.max_train_steps == 500 * 63  # epochs of 1000 pairs: 250 a GPU, 4 at a time
    assert (used.surrogate_images, used.replay_images, used.fisher_samples) == (1000, 4999, 4999)
    assert (used.fisher_timesteps, used.max_grad_norm, used.weight_decay) == (1000, None, 1e-2)
    assert used == Sa()


def test_the_demo_recipe_is_ready() -> None:
    recipe = load_recipe("toybox-fire-sa")
    assert isinstance(recipe.method.make("methods", "method"), Sa)
    assert (recipe.model, recipe.concept) == ("toybox", "toybox-fire")


def test_passes() -> None:
    assert QUICK.passes(64) == {"images": 6, "denoiser": 16 + 12, "trained": 16 + 12, "vae": 12, "text": 6}
    assert Sa().passes(64)["trained"] > 4_999_000
