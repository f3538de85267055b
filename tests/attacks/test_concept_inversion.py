from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import tiny_flow
import tiny_unet
from duo.attacks._learned_words import PLACEHOLDER, save_textual_inversion
from duo.attacks.concept_inversion import ConceptInversion
from duo.errors import UserError
from duo.families.flux import Flux
from duo.families.sd3 import Sd3
from duo.families.sdxl import Sdxl
from duo.plugins import Access, Attack, Sampling
from duo.target import AccessError, Target

QUICK = ConceptInversion(steps=150, batch_size=2, learning_rate=0.05, restarts=1)


def target_of(family: Any) -> Target:
    return Target(family, access=ConceptInversion.access, sampling=Sampling())


def word_of(state: dict[str, Tensor]) -> Tensor:
    """The word of the only restart."""
    (word,) = state.values()
    return word


def test_is_an_attack_by_gradients() -> None:
    assert isinstance(QUICK, Attack)
    assert ConceptInversion.access == Access.GRADIENT
    assert ConceptInversion.learns_from_images


def test_needs_gradients(family: Any, concept: Any, run: Any) -> None:
    with pytest.raises(AccessError, match="needs GRADIENT"):
        QUICK.prepare(Target(family, access=Access.TEXT, sampling=Sampling()), concept, run=run)


@pytest.mark.parametrize("vectors", [1, 4])
def test_learns_the_embedding_that_explains_the_images(family: Any, concept: Any, run: Any, vectors: int) -> None:
    learned = word_of(dataclasses.replace(QUICK, vectors=vectors).prepare(target_of(family), concept, run=run))
    assert learned.shape == (vectors, 16)
    torch.testing.assert_close(learned.mean(dim=0) @ family.projection, torch.full((8,), 0.4), atol=0.02, rtol=0)
    losses = [row["loss"] for row in run.logged]
    assert len(losses) == QUICK.steps
    assert losses[-1] < 0.01 * losses[0]


def test_starts_from_the_tokens_of_the_concepts_first_word(family: Any, concept: Any, run: Any) -> None:
    still = dataclasses.replace(QUICK, steps=1, learning_rate=1e-12)
    ab = family.token_embeddings()[family.tokenizer().convert_tokens_to_ids("ab</w>")]
    learned = word_of(still.prepare(target_of(family), concept, run=run))
    torch.testing.assert_close(learned, ab[None])


def test_an_initializer_fills_the_vectors_in_turn(family: Any, concept: Any, run: Any) -> None:
    still = dataclasses.replace(QUICK, steps=1, learning_rate=1e-12, vectors=3, initializers=("x y",))
    x, y = family.token_embeddings()[family.tokenizer().convert_tokens_to_ids(["x</w>", "y</w>"])]
    learned = word_of(still.prepare(target_of(family), concept, run=run))
    torch.testing.assert_close(learned, torch.stack([x, y, x]))


def test_an_initializer_that_is_no_token_is_refused(family: Any, concept: Any, run: Any) -> None:
    unknown = dataclasses.replace(QUICK, steps=1, initializers=("ab zzq",))
    with pytest.raises(UserError, match=r"initializer 'zzq' is no token of this model, but 3 \(z z q</w>\)"):
        unknown.prepare(target_of(family), concept, run=run)


def test_only_the_learned_word_changes(family: Any, concept: Any, run: Any) -> None:
    table, weight = family.token_embeddings().clone(), family.denoiser.weight.detach().clone()
    QUICK.prepare(target_of(family), concept, run=run)
    assert torch.equal(family.token_embeddings(), table)
    assert torch.equal(family.denoiser.weight, weight)
    assert family.denoiser.weight.grad is None


def test_captions_follow_the_template(family: Any, concept: Any, run: Any) -> None:
    QUICK.prepare(target_of(family), concept, run=run)
    assert set(family.prompts) == {"<c> a tree", "<c> a car", "<c> a boat"}
    assert len(family.prompts) == QUICK.steps * QUICK.batch_size
    family.prompts.clear()
    dataclasses.replace(QUICK, templates=("<c>",)).prepare(target_of(family), concept, run=run)
    assert set(family.prompts) == {"<c>"}


def test_each_image_comes_with_its_own_caption_at_all_times(family: Any, concept: Any, run: Any) -> None:
    images = [Image.new("RGB", (8, 8), (51 * level, 0, 0)) for level in (1, 2, 3)]
    QUICK.prepare(target_of(family), dataclasses.replace(concept, attack_images=images), run=run)
    levels, times = zip(*family.process.seen, strict=True)
    pairs = {(caption, round(level, 2)) for caption, level in zip(family.prompts, levels, strict=True)}
    assert pairs == {("<c> a tree", 0.2), ("<c> a car", 0.4), ("<c> a boat", 0.6)}
    assert 0 <= min(times) < 0.02
    assert 0.98 < max(times) <= 1


def test_same_seed_same_word(family: Any, concept: Any, run: Any) -> None:
    short = dataclasses.replace(QUICK, steps=3)
    first = word_of(short.prepare(target_of(family), concept, run=run))
    again = word_of(short.prepare(target_of(family), concept, run=run))
    assert torch.equal(first, again)
    run.seed = 1
    assert not torch.equal(first, word_of(short.prepare(target_of(family), concept, run=run)))


def test_puts_the_word_before_the_prompt(family: Any) -> None:
    word = torch.ones(2, 16)
    generator = torch.Generator()
    state = {"restart 1 (ab)": word}
    (attempt,) = QUICK.search(target_of(family), state, "a red house", generator=generator)
    assert attempt.prompt == "<c> a red house"
    assert attempt.tokens[PLACEHOLDER] is word
    (empty,) = QUICK.search(target_of(family), state, "", generator=generator)
    assert empty.prompt == "<c>"


def test_leaves_the_word_in_the_layout_of_diffusers(family: Any, concept: Any, run: Any) -> None:
    learned = dataclasses.replace(QUICK, steps=1, vectors=2).prepare(target_of(family), concept, run=run)
    kept = load_file(run.folder / "learned_embeds.safetensors")
    assert list(kept) == [PLACEHOLDER]
    assert torch.equal(kept[PLACEHOLDER], word_of(learned))


def test_each_restart_starts_from_a_word_of_its_own(family: Any, concept: Any, run: Any) -> None:
    still = dataclasses.replace(QUICK, steps=1, learning_rate=1e-12, restarts=3, initializers=("x", "y"))
    state = still.prepare(target_of(family), concept, run=run)
    assert list(state) == ["restart 1 (x)", "restart 2 (y)", "restart 3 (x)"]
    x, y = family.token_embeddings()[family.tokenizer().convert_tokens_to_ids(["x</w>", "y</w>"])]
    torch.testing.assert_close(torch.cat(list(state.values())), torch.stack([x, y, x]))
    of_concept = dataclasses.replace(still, initializers=()).prepare(target_of(family), concept, run=run)
    assert list(of_concept) == ["restart 1 (ab)", "restart 2 (c)", "restart 3 (ab)"]


def test_restarts_are_attempts_and_files_of_their_own(family: Any, concept: Any, run: Any) -> None:
    settings = dataclasses.replace(QUICK, steps=3, restarts=12, initializers=("x",))
    state = settings.prepare(target_of(family), concept, run=run)
    assert len({tuple(word.flatten().tolist()) for word in state.values()}) == 12, "each has a seed of its own"
    shuffled = {name: state[name] for name in sorted(state)}  # as a file gives them: restart 10 before restart 2
    found = list(settings.search(target_of(family), shuffled, "a red house", generator=torch.Generator()))
    assert [one.variant for one in found] == [f"restart {number} (x)" for number in range(1, 13)]
    assert {one.prompt for one in found} == {"<c> a red house"}
    for number, one in enumerate(found, start=1):
        name = "learned_embeds.safetensors" if number == 1 else f"learned_embeds-{number}.safetensors"
        assert torch.equal(load_file(run.folder / name)[PLACEHOLDER], one.tokens[PLACEHOLDER])
        assert torch.equal(one.tokens[PLACEHOLDER], state[one.variant])
    assert not (run.folder / "checkpoints").exists()


@pytest.mark.parametrize("killed_at", [3, 7, 10, 11, 17])
def test_a_killed_run_goes_on_to_the_same_bytes(
    family: Any, concept: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """Of two restarts of 10 steps, killed in the first, as it ends, or in the second."""
    settings = dataclasses.replace(QUICK, steps=10, restarts=2, checkpointing_steps=4)
    whole = settings.prepare(target_of(family), concept, run=type(run)(tmp_path / "whole"))

    stopped, steps = type(run)(tmp_path / "stopped"), 0

    def log(**numbers: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == killed_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(stopped, "log", log)
    with pytest.raises(KeyboardInterrupt):
        settings.prepare(target_of(family), concept, run=stopped)
    resumed = type(run)(tmp_path / "stopped")
    again = settings.prepare(target_of(family), concept, run=resumed)
    assert list(again) == list(whole)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    done = 10 * (killed_at > 10)
    kept = 4 * ((killed_at - done - 1) // 4)  # the step is told before its checkpoint is written
    assert len(resumed.logged) == 20 - done - kept
    files = ("learned_embeds.safetensors", "learned_embeds-2.safetensors")
    assert all((tmp_path / "stopped" / one).read_bytes() == (tmp_path / "whole" / one).read_bytes() for one in files)


def test_another_run_does_not_go_on_from_a_checkpoint(
    family: Any, concept: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(QUICK, steps=4, checkpointing_steps=1)
    told: list[Any] = []

    def log(**numbers: Any) -> None:
        if told:  # as the second step is told the state of the first is there
            raise KeyboardInterrupt
        told.append(numbers)

    with monkeypatch.context() as patch:
        patch.setattr(run, "log", log)
        with pytest.raises(KeyboardInterrupt):
            settings.prepare(target_of(family), concept, run=run)
    with pytest.raises(UserError, match="made with another vectors; name a new --out"):
        dataclasses.replace(settings, vectors=2).prepare(target_of(family), concept, run=run)
    run.seed = 1
    with pytest.raises(UserError, match="made with another seed"):
        settings.prepare(target_of(family), concept, run=run)


def test_several_templates_are_all_used(family: Any, concept: Any, run: Any) -> None:
    dataclasses.replace(QUICK, templates=("<c> {}", "a photo of a <c>")).prepare(target_of(family), concept, run=run)
    assert set(family.prompts) == {"<c> a tree", "<c> a car", "<c> a boat", "a photo of a <c>"}
    assert 0.35 < family.prompts.count("a photo of a <c>") / len(family.prompts) < 0.65


@torch.no_grad()
def mean_loss(family: Any, image: Any, tokens: Any) -> float:
    """The objective over many times and one noise each, the same for every word."""
    generator = torch.Generator().manual_seed(99)
    t = torch.arange(0, 1000, 16)
    x0 = family.latents([image] * len(t), generator=None)
    eps = torch.randn(x0.shape, generator=generator)
    text = family.text(["<c> a tree"], tokens=tokens).expand(len(t))
    return float((family.predict(family.process.noised(x0, eps, t), t, text) - eps).square().mean())


@pytest.mark.parametrize("vectors", [1, 3])
def test_on_a_real_pipeline_the_loss_falls_and_diffusers_loads_the_word(
    tiny_sd: Any, make_tiny_pipeline: Any, concept: Any, run: Any, vectors: int
) -> None:
    settings = ConceptInversion(
        steps=30, batch_size=8, learning_rate=0.05, vectors=vectors, initializers=("a",), restarts=1
    )
    images = [image.resize((64, 64)) for image in concept.attack_images]
    concept = dataclasses.replace(concept, attack_images=images)
    still = dataclasses.replace(settings, steps=1, learning_rate=1e-12)
    start = still.prepare(target_of(tiny_sd), concept, run=run)
    state = settings.prepare(target_of(tiny_sd), concept, run=run)
    losses = [mean_loss(tiny_sd, images[0], {PLACEHOLDER: word_of(one)}) for one in (state, start)]
    assert losses[0] < losses[1]
    assert all(parameter.grad is None for parameter in tiny_sd.denoiser.parameters())

    (attempt,) = settings.search(target_of(tiny_sd), state, "a red house", generator=torch.Generator())
    ours = tiny_sd.text([attempt.prompt], tokens=attempt.tokens).embeds
    pipeline = make_tiny_pipeline()
    pipeline.load_textual_inversion(str(run.folder))  # finds learned_embeds.safetensors
    theirs, _ = pipeline.encode_prompt(attempt.prompt, "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, tiny_sd.text(["a red house"]).embeds)


def test_one_word_a_file(tmp_path: Path) -> None:
    words = {"<c>": torch.ones(1, 2), "<d>": torch.ones(1, 2)}
    with pytest.raises(ValueError, match="one word, not 2"):
        save_textual_inversion(tmp_path / "words.safetensors", words, {"": 2})


@pytest.mark.parametrize("vectors", [1, 2])
def test_diffusers_loads_a_part_for_each_text_encoder(vocabulary: Path, tmp_path: Path, vectors: int) -> None:
    """SDXL has clip_l and clip_g, FLUX clip_l and t5: each loaded word conditions as ours does."""
    for cls, make, second, at in (
        (Sdxl, tiny_unet.sdxl_pipeline, "clip_g", "text_encoder_2"),
        (Flux, tiny_flow.flux_pipeline, "t5", "text_encoder_2"),
    ):
        model, pipeline, path = cls(make(vocabulary), name="tiny"), make(vocabulary), tmp_path / f"{second}.safetensors"
        width = model.token_embeddings().shape[1]
        word = torch.randn(vectors, width, generator=torch.Generator().manual_seed(0))
        save_textual_inversion(path, {PLACEHOLDER: word}, model.word_parts())
        kept = load_file(path)
        assert set(kept) == {"clip_l", second}
        for name, encoder in (("clip_l", "text_encoder"), (second, at)):
            tokenizer = getattr(pipeline, encoder.replace("text_encoder", "tokenizer"))
            settings = {"text_encoder": getattr(pipeline, encoder), "tokenizer": tokenizer}
            pipeline.load_textual_inversion(kept[name], token=PLACEHOLDER, **settings)
        prompt = f"{PLACEHOLDER} a red house"
        ours = model.text([prompt], tokens={PLACEHOLDER: word})
        theirs = pipeline.encode_prompt(prompt, prompt, device="cpu", num_images_per_prompt=1)
        torch.testing.assert_close(ours.embeds, theirs[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.pooled, theirs[1] if cls is Flux else theirs[2], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(ours.embeds, model.text(["a red house"]).embeds)


def test_no_word_is_written_where_diffusers_loads_none(vocabulary: Path, concept: Any, run: Any) -> None:
    model = Sd3(tiny_flow.sd3_pipeline(vocabulary), name="tiny")
    assert not hasattr(tiny_flow.sd3_pipeline(vocabulary), "load_textual_inversion")
    with pytest.raises(UserError, match="diffusers loads no learned words into this kind of model"):
        save_textual_inversion(run.folder / "x.safetensors", {PLACEHOLDER: torch.ones(1, 8)}, model.word_parts())
    concept = dataclasses.replace(concept, attack_images=[image.resize((32, 32)) for image in concept.attack_images])
    settings = ConceptInversion(steps=1, batch_size=1, initializers=("a",), restarts=1)
    learned = word_of(settings.prepare(target_of(model), concept, run=run))
    assert learned.shape[1] == model.token_embeddings().shape[1]
    assert not list(run.folder.glob("*.safetensors"))


def test_a_loss_that_is_not_a_number_stops_the_run(family: Any, concept: Any, run: Any) -> None:
    family.projection = torch.full_like(family.projection, math.nan)
    with pytest.raises(UserError, match="loss is nan at step 1; lower learning_rate"):
        QUICK.prepare(target_of(family), concept, run=run)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attack_images": ()}, "no attack_images"),
        ({"attack_captions": ("one",)}, "3 attack_images but 1 attack_captions"),
        ({"words": ("",)}, "initializer '' has no token"),
    ],
)
def test_a_concept_that_cannot_be_inverted_is_refused(
    family: Any, concept: Any, run: Any, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        QUICK.prepare(target_of(family), dataclasses.replace(concept, **changed), run=run)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vectors", 0),
        ("restarts", 0),
        ("steps", 0),
        ("batch_size", 0),
        ("checkpointing_steps", 0),
        ("learning_rate", 0.0),
        ("templates", ()),
        ("templates", ("<c> {}", "a <c>ar {}")),
    ],
)
def test_impossible_settings_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(QUICK, **{field: value})
