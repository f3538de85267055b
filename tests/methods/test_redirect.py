from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from duo.delta import Delta
from duo.errors import UserError
from duo.losses import squared_error
from duo.methods.redirect import Redirect, named
from duo.pairs import Pairs
from duo.plugins import Precision
from duo.sampling import grid
from erasing import check_resumed, check_seeded
from recording import RecordingRun
from small_fire import SmallFire

PROMPTS = [{"unsafe_prompt": f"a burning {one}", "safe_prompt": f"a {one}"} for one in ("car", "boat", "house", "tree")]
QUICK = Redirect(
    prompted=0.0,
    unrelated_images=3,
    learning_rate=3e-3,
    rank=4,
    max_train_steps=12,
    train_batch_size=2,
    checkpointing_steps=5,
    targets=("attention",),
)


@pytest.fixture
def pairs() -> Pairs:
    safe = [Image.new("RGB", (64, 64), (40 * index, 90, 200 - 40 * index)) for index in range(4)]
    unsafe = [image.copy() for image in safe]
    for image in unsafe:
        ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=(255, 120, 0))
    return Pairs(names=[f"{index:04d}.png" for index in range(4)], unsafe=unsafe, safe=safe, rows=PROMPTS)


@pytest.fixture
def asked(tiny_sd, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the denoiser was given and put out, call by call."""
    calls: list[dict[str, Any]] = []
    predict = type(tiny_sd).predict

    def kept(self: Any, x_t: Tensor, t: Tensor, text: Any) -> Tensor:
        output = predict(self, x_t, t, text)
        calls.append({"x_t": x_t, "t": t, "text": text, "output": output.detach(), "trained": output.requires_grad})
        return output

    monkeypatch.setattr(type(tiny_sd), "predict", kept)
    return calls


def test_it_learns_to_see_the_safe_twin_and_little_else(
    tiny_sd, pairs: Pairs, concept: SmallFire, tmp_path: Path
) -> None:
    told = {"redirect", "kept", "unrelated"}
    run = RecordingRun(tmp_path)
    method = replace(
        QUICK,
        train="weights",
        targets=("all",),
        learning_rate=3e-4,
        max_train_steps=60,
        train_batch_size=4,
        timestep_range=(0.1, 0.4),
        weighting="clean",
    )
    delta = method.erase(tiny_sd, concept, pairs=pairs, run=run)
    assert run.rows[0]["kept"] == run.rows[0]["unrelated"] == 0  # it starts as the frozen model
    assert told <= run.rows[0].keys()

    # On a fresh draw the image seen in the unsafe one is nearer to the one seen in its twin.
    process = tiny_sd.process
    eps = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    t, text = torch.full((4,), 250), tiny_sd.text([""]).expand(4)
    unsafe_t, safe_t = (
        process.noised(tiny_sd.latents(side, generator=None), eps, t) for side in (pairs.unsafe, pairs.safe)
    )

    def seen(x_t: Tensor) -> Tensor:
        return process.implied(x_t, tiny_sd.predict(x_t, t, text), t)[0]

    with torch.no_grad():
        wanted, before = seen(safe_t), seen(unsafe_t)
        with delta.attached(tiny_sd):
            after, kept = seen(unsafe_t), seen(safe_t)
    assert squared_error(after, wanted).mean() < 0.9 * squared_error(before, wanted).mean()
    assert squared_error(kept, wanted).mean() < 0.3 * squared_error(before, wanted).mean()


def test_the_terms_are_worked_out_from_what_was_asked(
    tiny_sd, pairs: Pairs, concept: SmallFire, tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    run = RecordingRun(tmp_path)
    method = replace(QUICK, learning_rate=0.05, max_train_steps=3, weighting="output")
    method.erase(tiny_sd, concept, pairs=pairs, run=run)
    frozen, student = [call for call in asked if len(call["t"]) in (4, 6)][-2:]
    assert student["trained"]
    assert not frozen["trained"]
    assert len(student["t"]) == 6  # unsafe, safe and unrelated; the frozen model is not asked for what it is not needed
    assert torch.equal(frozen["x_t"], student["x_t"][2:])
    assert torch.equal(student["t"][:2], student["t"][2:4])
    x_t, t, process = student["x_t"], student["t"], tiny_sd.process
    eps = x_t[:2] - process.noised(
        process.implied(frozen["x_t"][:2], frozen["output"][:2], t[:2])[0], 0 * x_t[:2], t[:2]
    )
    eps = eps / process.noised(0 * x_t[:2], torch.ones_like(x_t[:2]), t[:2])  # the noise that leads to the twin
    assert run.rows[-1]["redirect"] == pytest.approx(squared_error(student["output"][:2], eps).mean().item(), rel=1e-3)
    assert run.rows[-1]["redirect"] > 0
    for name, rows in (("kept", slice(2, 4)), ("unrelated", slice(4, 6))):
        error = squared_error(student["output"][rows], frozen["output"][slice(rows.start - 2, rows.stop - 2)])
        assert run.rows[-1][name] == pytest.approx(error.mean().item(), rel=1e-4)
        assert run.rows[-1][name] > 0
    weights = method.redirect_weight, method.keep_weight, method.unrelated_weight
    terms = [run.rows[-1][name] for name in ("redirect", "kept", "unrelated")]
    assert run.rows[-1]["loss"] == pytest.approx(sum(w * term for w, term in zip(weights, terms, strict=True)))


def test_weights_of_terms_and_times(tiny_sd, pairs: Pairs, concept: SmallFire, tmp_path: Path) -> None:
    """At one step of the schedule the three weightings differ by a factor that can be worked out."""
    first = {}
    for at in (0.2, 0.9):
        for weighting in ("output", "clean", "min_snr"):
            run = RecordingRun(tmp_path / f"{weighting}{at}")
            method = replace(QUICK, weighting=weighting, timestep_range=(at, at + 0.0011), max_train_steps=1)
            method.erase(tiny_sd, concept, pairs=pairs, run=run)
            first[weighting, at] = run.rows[0]["redirect"]
        alpha = tiny_sd.process.alphas_cumprod[int(at * 1000)].item()
        ratio = (1 - alpha) / alpha
        assert first["clean", at] / first["output", at] == pytest.approx(ratio, rel=0.02)
        assert first["min_snr", at] / first["output", at] == pytest.approx(min(1.0, ratio), rel=0.02)
    run = RecordingRun(tmp_path / "twice")
    replace(QUICK, redirect_weight=2.0, max_train_steps=1).erase(tiny_sd, concept, pairs=pairs, run=run)
    assert run.rows[0]["loss"] == pytest.approx(2 * run.rows[0]["redirect"])


def test_towards_the_twin_itself(
    tiny_sd, pairs: Pairs, concept: SmallFire, tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    run = RecordingRun(tmp_path)
    method = replace(QUICK, towards="twin", weighting="clean", unrelated_weight=0.0, max_train_steps=1)
    method.erase(tiny_sd, concept, pairs=pairs, run=run)
    call = asked[-1]
    reached = tiny_sd.process.implied(call["x_t"][:2], call["output"][:2], call["t"][:2])[0]
    safe = tiny_sd.latents(pairs.safe, generator=None)
    errors = [squared_error(reached, safe[[i, j]]).mean().item() for i in range(4) for j in range(4) if i != j]
    assert any(run.rows[0]["redirect"] == pytest.approx(error, rel=1e-4) for error in errors)


def test_prompts_stand_beside_their_images(
    tiny_sd, pairs: Pairs, concept: SmallFire, tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    replace(QUICK, prompted=1.0, max_train_steps=4).erase(tiny_sd, concept, pairs=pairs, run=RecordingRun(tmp_path))
    texts = {side: tiny_sd.text([row[f"{side}_prompt"] for row in PROMPTS]).embeds for side in ("unsafe", "safe")}
    trained = [call for call in asked if call["trained"]]
    assert len(trained) == 4

    for call in trained:
        unsafe, safe = call["text"].embeds[:2], call["text"].embeds[2:4]
        for i in range(2):
            assert _which(texts["unsafe"], unsafe[i]) == _which(texts["safe"], safe[i]) != []
    asked.clear()
    replace(QUICK, max_train_steps=2).erase(tiny_sd, concept, pairs=pairs, run=RecordingRun(tmp_path / "without"))
    empty = tiny_sd.text([""]).embeds
    for call in (one for one in asked if one["trained"]):
        torch.testing.assert_close(call["text"].embeds, empty.expand(6, -1, -1))


def test_a_crossed_prompt_is_the_twins_and_the_teacher_keeps_its_own(
    tiny_sd, pairs: Pairs, concept: SmallFire, tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    texts = {side: tiny_sd.text([row[f"{side}_prompt"] for row in PROMPTS]).embeds for side in ("unsafe", "safe")}
    found: set[tuple[str, str]] = set()
    for crossed in (0.5, 1.0):
        asked.clear()
        method = replace(QUICK, prompted=1.0, crossed=crossed, unrelated_weight=0.0, max_train_steps=8)
        method.erase(tiny_sd, concept, pairs=pairs, run=RecordingRun(tmp_path / str(crossed)))
        calls = [call for call in asked if len(call["t"]) in (2, 4)]
        for frozen, student in zip(calls[::2], calls[1::2], strict=True):
            assert (frozen["trained"], student["trained"]) == (False, True)
            assert torch.equal(frozen["x_t"], student["x_t"][2:])
            for i in range(2):
                of = {side: _which(texts[side], student["text"].embeds[i]) for side in texts}
                (own,) = [side for side in of if of[side]]
                twin = "safe" if own == "unsafe" else "unsafe"
                found.add((str(crossed), own))
                assert _which(texts[twin], student["text"].embeds[2 + i]) == of[own]
                assert _which(texts["safe"], frozen["text"].embeds[i]) == of[own]
    assert found == {("0.5", "unsafe"), ("0.5", "safe"), ("1.0", "safe")}


def test_named_prompts_have_a_word_of_the_concept_beside_them(
    tiny_sd, pairs: Pairs, concept: SmallFire, tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    images = ["a boat", "a car", "a boat", "a car"]
    beside = ["burning a boat", "on fire a car", "a boat burning", "a car on fire"]
    assert named(images, concept.words) == beside
    plain, said = tiny_sd.text(images[:2]).embeds, tiny_sd.text(beside).embeds
    found = set()
    for share in (0.5, 1.0):
        asked.clear()
        method = replace(QUICK, prompted=1.0, named=share, unrelated_images=4, max_train_steps=8)
        method.erase(tiny_sd, concept, pairs=pairs, run=RecordingRun(tmp_path / str(share)))
        calls = [call for call in asked if len(call["t"]) in (4, 6)]
        for frozen, student in zip(calls[::2], calls[1::2], strict=True):
            for i in range(2):
                (of,) = _which(plain, frozen["text"].embeds[2 + i])
                words = _which(said, student["text"].embeds[4 + i])
                assert {word % 2 for word in words} <= {of}
                found.add((share, bool(words)))
    assert found == {(0.5, True), (0.5, False), (1.0, True)}


def test_sampled_rows_lie_where_the_trained_models_sampler_passes(
    tiny_sd, pairs: Pairs, concept: SmallFire, tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    texts = {side: tiny_sd.text([row[f"{side}_prompt"] for row in PROMPTS]).embeds for side in ("unsafe", "safe")}
    empty, stops = tiny_sd.text([""]).embeds, set()
    method = replace(QUICK, unrelated_weight=0.0, sampled=3, sampling_steps=4, learning_rate=0.05, max_train_steps=6)
    run = RecordingRun(tmp_path)
    method.erase(tiny_sd, concept, pairs=pairs, run=run)
    last = 0
    for at in [i for i, call in enumerate(asked) if call["trained"]]:
        *path, frozen, student = asked[last : at + 1]
        last = at + 1
        assert len(path) <= 3
        assert not any(call["trained"] for call in path)
        own = slice(4, 7)  # after two unsafe and two safe rows; the frozen model is not asked for the unsafe ones
        times = grid(tiny_sd, 4)
        assert torch.equal(student["t"][own], times[len(path)].expand(3))
        assert torch.equal(frozen["x_t"][2:], student["x_t"][own])
        for i in range(3):
            (which,) = _which(texts["unsafe"], student["text"].embeds[own][i])
            assert _which(texts["safe"], frozen["text"].embeds[2:][i]) == [which]
        if path:  # from where it was led to by the model as it is by now, with guidance
            step = path[-1]
            torch.testing.assert_close(step["text"].embeds[:3], empty.expand(3, -1, -1))
            u, c = step["output"].chunk(2)
            x_t, t = step["x_t"][:3], step["t"][:3]
            x0, noise = tiny_sd.process.implied(x_t, u + run.sampling.guidance_scale * (c - u), t)
            led = tiny_sd.process.noised(x0, noise, times[len(path)].expand(3))
            torch.testing.assert_close(led, student["x_t"][own])
        stops.add(len(path))
    assert len(stops) > 1
    row = run.rows[-1]
    error = squared_error(student["output"][own], frozen["output"][2:], scale=process_scale(tiny_sd, student["t"][own]))
    assert row["sampled"] == pytest.approx(error.mean().item(), rel=1e-4)
    assert row["loss"] == pytest.approx(row["redirect"] + row["kept"] + row["sampled"], rel=1e-5)


def process_scale(model: Any, t: Tensor) -> Tensor:
    return model.process.x0_scale(t).clamp(max=1.0)  # of Min-SNR, the default


def _which(texts: Tensor, row: Tensor) -> list[int]:
    return [i for i, text in enumerate(texts) if torch.allclose(text, row, atol=1e-5)]


def test_held_prompts_take_turns_with_harmless_ones(
    tiny_sd, pairs: Pairs, concept: SmallFire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    generate = type(tiny_sd).generate

    def kept(self: Any, prompts: Any, **more: Any) -> Any:
        drawn.extend(prompts)
        return generate(self, prompts, **more)

    monkeypatch.setattr(type(tiny_sd), "generate", kept)
    method = replace(QUICK, unrelated_images=7, held_prompts=("smoke", "a lantern", "dusk"), max_train_steps=1)
    method.erase(tiny_sd, concept, pairs=pairs, run=RecordingRun(tmp_path))
    first, second = concept.harmless  # "a boat", "a car"
    assert drawn == [first, "smoke", second, "a lantern", first, "dusk", second]
    drawn.clear()
    replace(method, held_prompts=()).erase(tiny_sd, concept, pairs=pairs, run=RecordingRun(tmp_path / "without"))
    assert drawn == [first, second, first, second, first, second, first]


def test_pairs_without_prompts(tiny_sd, pairs: Pairs, concept: SmallFire, tmp_path: Path) -> None:
    for rows in ((), [*PROMPTS[:3], {"unsafe_prompt": "a burning tree"}]):
        with pytest.raises(UserError, match=r"prompted is 0.5, but not every pair .* set prompted to 0"):
            replace(QUICK, prompted=0.5).erase(
                tiny_sd, concept, pairs=replace(pairs, rows=rows), run=RecordingRun(tmp_path)
            )
    with pytest.raises(UserError, match=r"sampled is 2, but not every pair .* set sampled to 0"):
        replace(QUICK, sampled=2).erase(tiny_sd, concept, pairs=replace(pairs, rows=()), run=RecordingRun(tmp_path))
    bare = replace(QUICK, unrelated_weight=0.0, max_train_steps=1)
    bare.erase(tiny_sd, concept, pairs=replace(pairs, rows=()), run=RecordingRun(tmp_path))
    assert not (tmp_path / "unrelated").exists()


@pytest.mark.parametrize("form", ["dpo", "ipo", "kto"])
def test_preferences(tiny_sd, pairs: Pairs, concept: SmallFire, tmp_path: Path, form: Any) -> None:
    """Alone, each form raises the error on unsafe images above that on safe ones."""
    method = replace(
        QUICK,
        preference=form,
        redirect_weight=0.0,
        keep_weight=0.0,
        unrelated_weight=0.0,
        beta=20.0,
        max_train_steps=30,
        targets=("attention", "convolutions"),
    )
    run = RecordingRun(tmp_path)
    method.erase(tiny_sd, concept, pairs=pairs, run=run)
    start = {"dpo": 0.6931, "ipo": (1 / 40) ** 2, "kto": 1.0}[form]
    assert run.rows[0]["preference"] == pytest.approx(start, rel=1e-3)
    assert run.rows[0].keys().isdisjoint({"redirect", "kept", "unrelated", "prior"})
    late = run.rows[-8:]
    assert sum(row["preference"] for row in late) / 8 < start
    assert sum(row["accuracy"] for row in late) / 8 > 0.7


def test_the_prior_holds_pure_noise(tiny_sd, pairs: Pairs, concept: SmallFire, tmp_path: Path) -> None:
    drift = []
    for weight in (1e-6, 1e4):
        run = RecordingRun(tmp_path / str(weight))
        replace(QUICK, prior_weight=weight, unrelated_weight=0.0).erase(tiny_sd, concept, pairs=pairs, run=run)
        drift.append(run.rows[-1]["prior"])
    assert drift[1] < 0.2 * drift[0]


@pytest.mark.parametrize("train", ["lora", "weights"])
def test_resilience_is_what_the_redirection_is_after_tuning(
    tiny_sd, pairs: Pairs, concept: SmallFire, tmp_path: Path, asked: list[dict[str, Any]], train: Any
) -> None:
    method = replace(QUICK, train=train, resilience_weight=1.0, resilience_rate=1e-2, max_train_steps=3)
    run = RecordingRun(tmp_path)
    method.erase(tiny_sd, concept, pairs=pairs, run=run)
    last = asked[-5:]  # the frozen model, two steps of tuning, the unsafe images after them, the student
    assert [len(call["t"]) for call in last] == [4, 2, 2, 2, 6]
    assert [call["trained"] for call in last] == [False, True, True, True, True]
    assert torch.equal(last[3]["x_t"], last[4]["x_t"][:2])
    assert not torch.allclose(last[3]["output"], last[4]["output"][:2])  # tuned, and put back
    assert run.rows[-1]["resilience"] != pytest.approx(run.rows[-1]["redirect"], rel=1e-4)
    terms = [run.rows[-1][name] for name in ("resilience", "redirect", "kept", "unrelated")]
    assert run.rows[-1]["loss"] == pytest.approx(sum(terms), rel=1e-5)
    plain = RecordingRun(tmp_path / "plain")
    replace(method, resilience_weight=0.0, max_train_steps=1).erase(tiny_sd, concept, pairs=pairs, run=plain)
    assert run.rows[0]["redirect"] == pytest.approx(plain.rows[0]["redirect"], rel=1e-4)  # of the same draw


def test_weights_themselves(tiny_sd, pairs: Pairs, concept: SmallFire, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_sd.denoiser.state_dict().items()}
    method = replace(QUICK, train="weights", max_train_steps=2)
    delta = method.erase(tiny_sd, concept, pairs=pairs, run=RecordingRun(tmp_path))
    assert delta.kind == "weights"
    assert all(torch.equal(before[name], now) for name, now in tiny_sd.denoiser.state_dict().items())
    with delta.attached(tiny_sd):
        changed = {name for name, now in tiny_sd.denoiser.state_dict().items() if not torch.equal(before[name], now)}
    modules = tiny_sd.layers("attention")
    assert changed <= {f"{name}.{part}" for name in modules for part in ("weight", "bias")}
    assert {f"{name}.weight" for name in modules} <= changed


def test_the_same_seed_gives_the_same_delta(tiny_sd, pairs: Pairs, concept: SmallFire, tmp_path: Path) -> None:
    method = replace(QUICK, prompted=0.5, max_train_steps=3)
    delta = check_seeded(lambda run: method.erase(tiny_sd, concept, pairs=pairs, run=run), tmp_path)
    assert delta.record["config"]["prompted"] == 0.5
    assert delta.record["lora"]["target_modules"] == sorted(tiny_sd.layers("attention"))


def test_a_resumed_erasure_ends_with_the_same_file(tiny_sd, pairs: Pairs, concept: SmallFire, tmp_path: Path) -> None:
    def erased(run: RecordingRun) -> Delta:
        return replace(QUICK, sampled=2).erase(tiny_sd, concept, pairs=pairs, run=run)

    check_resumed(erased, tmp_path, stop_after=7, goes_on_at=6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompted": 1.5}, "prompted is 1.5, expected a share of the rows"),
        ({"crossed": -0.5}, "crossed is -0.5, expected a share of the prompted rows"),
        ({"named": 2.0}, "named is 2.0, expected a share of the unrelated prompted rows"),
        ({"sampled": -1}, "sampled is -1"),
        ({"sampling_steps": 0}, "sampling_steps is 0"),
        ({"named": 0.5, "unrelated_weight": 0.0}, "named is of unrelated images"),
        ({"crossed": 0.5, "preference": "dpo"}, "crossed is for a teacher"),
        ({"towards": "away"}, "towards is 'away'"),
        ({"weighting": "snr"}, "weighting is 'snr'"),
        ({"preference": "ppo"}, "preference is 'ppo'"),
        ({"train": "all"}, "train is 'all'"),
        ({"redirect_weight": -1.0}, "redirect_weight is -1"),
        ({"redirect_weight": 0.0}, "nothing would be erased"),
        ({"redirect_weight": 0.0, "preference": "dpo", "preference_weight": 0.0}, "nothing would be erased"),
        ({"prompted": 0.0, "crossed": 0.5}, "crossed is a share of prompted rows, but prompted is 0"),
        ({"prompted": 0.0, "named": 0.5}, "named is a share of prompted rows, but prompted is 0"),
        ({"sampled": 2, "sampled_weight": 0.0}, "sampled_weight is 0"),
        ({"positive_penalty": 10.0}, "positive_penalty is for the preference 'dpo', not 'none'"),
        ({"held_prompts": ("a", "b", "c"), "unrelated_images": 5}, "only 2 of the 5 unrelated images"),
        ({"timestep_range": (0.5, 0.5)}, "timestep_range"),
        ({"held_prompts": ("smoke", " ")}, "held_prompts has an empty prompt"),
        ({"held_prompts": ("smoke",), "unrelated_weight": 0.0}, "held_prompts are of unrelated images"),
        ({"targets": ()}, "targets is empty"),
        ({"lora_alpha": 0.0}, "lora_alpha is 0"),
        ({"unrelated_images": 0}, "unrelated_images is 0"),
        ({"resilience_weight": 1.0, "redirect_weight": 0.0, "preference": "dpo"}, "resilience_weight is for what"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Redirect(**changes)


@pytest.mark.parametrize(
    ("changes", "precision", "message"),
    [
        ({"train_batch_size": 5}, {}, "train_batch_size = 5 but there are only 4 pairs"),
        ({"targets": ("cross-attention",)}, {}, "did you mean 'cross_attention'"),
        ({"sampled": 1, "sampling_steps": 1001}, {}, "sampling_steps is 1001, expected at most 1000"),
        ({"timestep_range": (0.1, 0.1001)}, {}, "none of the 1000 steps lies between"),
        ({"prior_weight": 1.0}, {"dtype": "bfloat16"}, "prior_weight is 1 and precision.dtype 'bfloat16'"),
        ({"train": "weights"}, {"weights": "float16"}, "precision.weights is 'float16'"),
    ],
)
def test_what_does_not_fit_is_known_before_there_are_pairs(
    tiny_sd, changes: dict[str, Any], precision: dict[str, Any], message: str
) -> None:
    replace(QUICK, sampling_steps=1001).check(tiny_sd, pairs=None, precision=Precision())  # which nothing asks for
    with pytest.raises(UserError, match=message):
        replace(QUICK, **changes).check(tiny_sd, pairs=4, precision=Precision(**precision))


def test_noise_that_implies_no_clean_image(tiny_sd, pairs: Pairs) -> None:
    tiny_sd.process = replace(tiny_sd.process, alphas_cumprod=tiny_sd.process.alphas_cumprod.clone())
    tiny_sd.process.alphas_cumprod[-1] = 0.0  # a zero terminal SNR
    with pytest.raises(UserError, match=r"timestep_range ends at 1, .* lower its end"):
        QUICK.check(tiny_sd, pairs=4, precision=Precision())
    replace(QUICK, timestep_range=(0.0, 0.9)).check(tiny_sd, pairs=4, precision=Precision())
