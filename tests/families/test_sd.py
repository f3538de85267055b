from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image

from duo.errors import UserError
from duo.families._unet import DdpmProcess
from duo.families.sd import Sd
from duo.plugins import Sampling

PROMPTS = ["a red house on fire", "a blue boat"]
SHORT = Sampling(num_inference_steps=3, guidance_scale=3.0)


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def test_generate_equals_diffusers_given_the_prompts(tiny_sd, make_tiny_pipeline) -> None:
    negative = ["the beach", "a car"]
    ours = tiny_sd.generate(PROMPTS, seeds=[3, 4], sampling=SHORT, negative_prompts=negative)
    theirs = make_tiny_pipeline()(
        PROMPTS, negative_prompt=negative, generator=generators(3, 4), num_inference_steps=3, guidance_scale=3.0
    ).images
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1
    assert np.abs(pixels(ours)[0] - pixels(ours)[1]).max() > 1
    assert ours[0].size == (64, 64)


def test_edit_equals_diffusers_given_the_prompts(tiny_sd, make_tiny_pipeline) -> None:
    images = [picture(0), picture(1)]
    ours = tiny_sd.edit(images, PROMPTS, strength=0.7, seeds=[3, 4], sampling=SHORT)
    pipeline = StableDiffusionImg2ImgPipeline(**make_tiny_pipeline().components, requires_safety_checker=False)
    theirs = pipeline(
        PROMPTS,
        image=images,
        strength=0.7,
        generator=generators(3, 4),
        num_inference_steps=3,
        guidance_scale=3.0,
    ).images
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1


def test_an_image_depends_on_its_own_seed_alone(tiny_sd) -> None:
    together = tiny_sd.generate([*PROMPTS, "a car"], seeds=[3, 4, 5], sampling=SHORT)
    alone = tiny_sd.generate(["a blue boat"], seeds=[4], sampling=SHORT)
    assert np.abs(pixels(together)[1] - pixels(alone)[0]).max() <= 1
    assert np.abs(pixels(tiny_sd.generate(["a blue boat"], seeds=[5], sampling=SHORT)) - pixels(alone)).max() > 1


@pytest.mark.filterwarnings("error::FutureWarning")  # diffusers warns where latents would be clipped like pixels
def test_sampling_names_the_scheduler(tiny_sd, make_tiny_pipeline) -> None:
    ours = tiny_sd.generate(PROMPTS, seeds=[3, 4], sampling=Sampling(num_inference_steps=3, scheduler="DDIMScheduler"))
    pipeline = make_tiny_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    theirs = pipeline(PROMPTS, generator=generators(3, 4), num_inference_steps=3).images
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1
    with pytest.raises(UserError, match="did you mean 'DDIMScheduler'"):
        tiny_sd.generate(PROMPTS, seeds=[3, 4], sampling=Sampling(scheduler="DDIMSheduler"))


def test_sampling_is_checked_without_drawing(tiny_sd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_sd.denoiser, "forward", None)
    tiny_sd.check(Sampling(scheduler="EulerDiscreteScheduler"), size=(4, 4))
    with pytest.raises(UserError, match="4×3 is too small for this model; it needs at least 4 a side"):
        tiny_sd.check(Sampling(), size=(4, 3))
    with pytest.raises(UserError, match="expected at most 1000"):
        tiny_sd.check(Sampling(num_inference_steps=1001))
    with pytest.raises(UserError, match=r"'Foo' does not .*DDIMScheduler, .*the model's own PNDMScheduler") as caught:
        tiny_sd.check(Sampling(scheduler="Foo"))
    assert "EDMEuler" not in str(caught.value), "which has a noise schedule of its own"
    with pytest.raises(UserError, match="'EDMEulerScheduler' does not fit"):
        tiny_sd.check(Sampling(scheduler="EDMEulerScheduler"))


def without_scipy(name: str) -> type:
    """A stand-in as diffusers has it for a class that needs what is not installed."""
    from diffusers.utils.import_utils import DummyObject

    return DummyObject(name, (), {"_backends": ["torch", "not_there"]})


def test_a_scheduler_that_needs_another_package_says_which(tiny_sd, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = without_scipy("LMSDiscreteScheduler")
    monkeypatch.setattr(type(tiny_sd._scheduler), "compatibles", [lacking, DDIMScheduler])
    with pytest.raises(UserError, match="'LMSDiscreteScheduler' needs not_there, which is not installed"):
        tiny_sd.check(Sampling(scheduler="LMSDiscreteScheduler"))
    with pytest.raises(UserError, match=r"\(known: DDIMScheduler, PNDMScheduler\)"):
        tiny_sd.check(Sampling(scheduler="Foo"))


def test_a_scheduler_that_cannot_take_the_settings_is_one_line(tiny_sd, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise ImportError("it needs a package\nand says so at length")

    monkeypatch.setattr(DDIMScheduler, "from_config", refuse)
    with pytest.raises(UserError, match=r"cannot take the settings of model 'tiny': it needs a package$"):
        tiny_sd.check(Sampling(scheduler="DDIMScheduler"))


@pytest.mark.parametrize("vectors", [1, 3])
def test_learned_tokens_equal_a_loaded_textual_inversion(tiny_sd, make_tiny_pipeline, vectors: int) -> None:
    learned = torch.randn(vectors, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["a photo of <thing> on the beach", "<thing>", "a red car"]
    ours = tiny_sd.text(prompts, tokens={"<thing>": learned}).embeds
    pipeline = make_tiny_pipeline()
    pipeline.load_textual_inversion({"<thing>": learned}, token="<thing>")
    theirs, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(tiny_sd.text(["a red car"]).embeds, theirs[2:])


def test_learned_tokens_are_differentiable_and_leave_the_model_as_it_was(tiny_sd) -> None:
    before = len(tiny_sd.tokenizer())
    learned = torch.zeros(2, 32, requires_grad=True)
    tiny_sd.text(["a photo of sks"], tokens={"sks": learned}).embeds.square().sum().backward()
    assert learned.grad is not None
    assert learned.grad.abs().sum(1).min() > 0
    assert len(tiny_sd.tokenizer()) == before
    assert not tiny_sd._text_encoder.get_input_embeddings()._forward_hooks


def test_a_placeholder_is_a_whole_word(tiny_sd) -> None:
    tokens = {"an": torch.ones(1, 32)}
    torch.testing.assert_close(tiny_sd.text(["any band"], tokens=tokens).embeds, tiny_sd.text(["any band"]).embeds)


def test_a_long_prompt_keeps_its_beginning(tiny_sd, make_tiny_pipeline) -> None:
    prompt = "a red house " * 30
    theirs, _ = make_tiny_pipeline().encode_prompt([prompt], "cpu", 1, False)
    torch.testing.assert_close(tiny_sd.text([prompt]).embeds, theirs)
    tokens = {"<x>": torch.ones(2, 32)}
    torch.testing.assert_close(tiny_sd.text([f"{prompt} <x>"], tokens=tokens).embeds, theirs)
    # 22 places lie between the two special tokens: of the learned vectors at the end, the first still fits.
    filled = tiny_sd.text(["a " * 21 + "<x>"], tokens=tokens).embeds
    assert not torch.allclose(filled, tiny_sd.text(["a " * 22]).embeds)
    torch.testing.assert_close(filled, tiny_sd.text(["a " * 21 + "<x>"], tokens={"<x>": torch.ones(1, 32)}).embeds)


def test_tokens_reach_the_images(tiny_sd) -> None:
    tokens = {"<x>": 5 * torch.ones(1, 32)}
    plain = tiny_sd.generate(["a <x>"], seeds=[0], sampling=SHORT)
    learned = tiny_sd.generate(["a <x>"], seeds=[0], sampling=SHORT, tokens=tokens)
    assert np.abs(pixels(plain) - pixels(learned)).max() > 0


def test_ids_are_encoded_as_their_prompt(tiny_sd) -> None:
    tokenizer = tiny_sd.tokenizer()
    ids = tokenizer(PROMPTS, padding="max_length", max_length=24, return_tensors="pt").input_ids
    torch.testing.assert_close(tiny_sd.encode_ids(ids), tiny_sd.text(PROMPTS).embeds)
    assert tiny_sd.token_embeddings().shape == (len(tokenizer), 32)
    assert not tiny_sd.token_embeddings().requires_grad


def test_latents_are_the_scaled_posterior(tiny_sd, make_tiny_pipeline) -> None:
    image = picture(0)
    vae = make_tiny_pipeline().vae
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
    mean = tiny_sd.latents([image], generator=None)
    torch.testing.assert_close(mean, posterior.mean * 0.18215)
    assert mean.shape == (1, 4, 16, 16)
    sampled = tiny_sd.latents([image], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sampled, posterior.sample(torch.Generator().manual_seed(1)) * 0.18215)


def test_noised_and_target_equal_the_scheduler(make_tiny_pipeline) -> None:
    scheduler = DDIMScheduler.from_config(make_tiny_pipeline().scheduler.config, prediction_type="v_prediction")
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 4, 8, 8, generator=generator)
    t = torch.tensor([0, 1, 500, 749, 999])
    process = DdpmProcess(alphas_cumprod=scheduler.alphas_cumprod, prediction_type="v_prediction")
    torch.testing.assert_close(process.noised(x0, eps, t), scheduler.add_noise(x0, eps, t))
    torch.testing.assert_close(process.target(x0, eps, t), scheduler.get_velocity(x0, eps, t))
    epsilon = DdpmProcess(alphas_cumprod=scheduler.alphas_cumprod, prediction_type="epsilon")
    assert epsilon.target(x0, eps, t) is eps
    x_t, last = epsilon.terminal(eps)
    assert x_t is eps
    assert last.tolist() == [999] * 5
    assert epsilon.terminal(eps, at=0.75)[1].tolist() == [749] * 5
    assert epsilon.terminal(eps, at=0.0)[1].tolist() == [0] * 5


@pytest.mark.parametrize(("prediction_type", "scale"), [("epsilon", 0.75), ("v_prediction", 0.6)])
def test_how_wrong_the_clean_image_is_by_a_wrong_prediction(prediction_type: str, scale: float) -> None:
    process = DdpmProcess(alphas_cumprod=torch.tensor([0.64]), prediction_type=prediction_type)  # 0.8² and 1 − 0.6²
    x0, eps = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0])
    x_t, wrong = process.noised(x0, eps, t), process.target(x0, eps, t) + 2
    clean = (x_t - 0.6 * wrong) / 0.8 if prediction_type == "epsilon" else 0.8 * x_t - 0.6 * wrong
    torch.testing.assert_close((clean - x0).square().mean(), torch.tensor((2 * scale) ** 2))
    torch.testing.assert_close(process.x0_scale(t), torch.tensor([scale]))


def test_times_fill_the_range_and_no_more(tiny_sd) -> None:
    t = tiny_sd.process.sample_t(20_000, low=0.0, high=0.75, generator=torch.Generator().manual_seed(0))
    assert (t.min().item(), t.max().item()) == (0, 749)
    narrow = tiny_sd.process.sample_t(1000, low=0.5, high=0.51, generator=torch.Generator().manual_seed(0))
    assert (narrow.min().item(), narrow.max().item()) == (500, 509)
    with pytest.raises(UserError, match=r"timestep_range: none of the 1000 steps lies between 0\.5 and 0\.5001"):
        tiny_sd.process.sample_t(1, low=0.5, high=0.5001, generator=torch.Generator())


def test_more_steps_than_the_schedule_has_are_refused(tiny_sd) -> None:
    with pytest.raises(UserError, match="num_inference_steps is 1001, expected at most 1000"):
        tiny_sd.generate(["a"], seeds=[0], sampling=Sampling(num_inference_steps=1001))


def test_layers_by_scope(tiny_sd) -> None:
    scopes = {scope: set(tiny_sd.layers(scope)) for scope in ("self_attention", "cross_attention", "feed_forward")}
    blocks = sum(name.endswith("attn1") for name, _ in tiny_sd.denoiser.named_modules())
    assert len(scopes["self_attention"]) == len(scopes["cross_attention"]) == 4 * blocks
    assert all(".attn1.to_" in name for name in scopes["self_attention"])
    assert scopes["self_attention"] | scopes["cross_attention"] == set(tiny_sd.layers("attention"))
    assert len(scopes["feed_forward"]) == 2 * blocks
    convolutions = tiny_sd.layers("convolutions")
    assert all(isinstance(module, torch.nn.Conv2d) for module in convolutions.values())
    assert "mid_block.resnets.0.conv1" in convolutions
    assert "down_blocks.0.downsamplers.0.conv" in convolutions
    assert not {"conv_in", "conv_out"} & set(convolutions)
    everything = tiny_sd.layers("all")
    assert {"conv_in", "time_embedding.linear_1", *convolutions}.union(*scopes.values()) <= set(everything)
    assert tiny_sd.denoiser.get_submodule("conv_in") is everything["conv_in"]
    with pytest.raises(UserError, match="did you mean 'cross_attention'"):
        tiny_sd.layers("crossattention")


def test_a_saved_model_loads_and_draws_the_same(tiny_sd, tmp_path: Path) -> None:
    tiny_sd.save(tmp_path / "copy")
    assert not list(tmp_path.rglob("*.bin"))
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    loaded = Sd.load(tmp_path / "copy", name="copy", device="cpu")
    ours, theirs = (model.generate(PROMPTS, seeds=[1, 2], sampling=SHORT) for model in (tiny_sd, loaded))
    assert np.abs(pixels(ours) - pixels(theirs)).max() == 0
    with pytest.raises(UserError, match="exists already"):
        tiny_sd.save(tmp_path / "copy")


def test_all_weights_are_frozen_and_evaluating(tiny_sd) -> None:
    for module in (tiny_sd.denoiser, tiny_sd._vae, tiny_sd._text_encoder):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
