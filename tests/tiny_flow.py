"""Tiny seeded pipelines of the real SD3 and FLUX classes: 32×32 images, latents of 8 channels and 8×8."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

LENGTH = 24  # CLIP tokens
WORDS = "a an red blue house car on fire burning the beach photo of with and boat intact"


def seeded(make: Callable[..., Any]) -> Callable[..., Any]:
    """A maker of pipelines whose weights are those of seed 0, and that show no progress bar."""

    @wraps(make)
    def made(*arguments: Any, **named: Any) -> Any:
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipeline = make(*arguments, **named)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return made


def clip_tokenizer(vocabulary: Path, **special: str) -> Any:
    """A CLIP tokenizer of the folder `vocabulary` (the fixture of that name)."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(vocabulary, model_max_length=LENGTH, **special)


def clip_encoder(tokenizer: Any, *, width: int, projected: int | None) -> Any:
    """A CLIP text encoder, with a projection of the pooled token where `projected` is given."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=projected or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModel(config) if projected is None else CLIPTextModelWithProjection(config)
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)  # or prompts would hardly differ
    return encoder


def t5(width: int) -> tuple[Any, Any]:
    """A T5 tokenizer of a few words and all letters, and its encoder."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz<>"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS.split()] + [(letter, -5.0) for letter in letters]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer, T5EncoderModel(config).eval()


def vae(channels: int = 8) -> Any:
    """A VAE with a shift and without quantising convolutions, as SD3 and FLUX have it; 4 pixels a latent."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


@seeded
def sd3_pipeline(vocabulary: Path, *, with_t5: bool = True, channels: int = 8) -> Any:
    """A `StableDiffusion3Pipeline` as SD3.5 is: two attentions in the first block, normalised queries, shift 3.

    diffusers inpaints with 16 latent `channels` only, as the large ones have.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer, other = clip_tokenizer(vocabulary), clip_tokenizer(vocabulary, pad_token="!")
    tokenizer_3, text_encoder_3 = t5(48) if with_t5 else (None, None)
    text_encoder = clip_encoder(tokenizer, width=16, projected=16)
    torch.nn.init.eye_(text_encoder.text_projection.weight)  # diffusers takes it for that in single files
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=16,
            pooled_projection_dim=16 + 12,
            pos_embed_max_size=12,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(channels),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(other, width=24, projected=12),
        tokenizer_2=other,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


@seeded
def flux_pipeline(vocabulary: Path, *, dev: bool = True) -> Any:
    """A `FluxPipeline` as dev is, with a guidance embedding and a dynamic shift, or as schnell, with neither."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer = clip_tokenizer(vocabulary)
    tokenizer_2, text_encoder_2 = t5(48)
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=32,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            pooled_projection_dim=16,
            guidance_embeds=dev,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.15)
        if dev
        else FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae(),
        text_encoder=clip_encoder(tokenizer, width=16, projected=None),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


def first_call(model: Any, draw: Any) -> dict[str, Any]:
    """The arguments of the first call of the model's denoiser while `draw()` runs."""
    calls: list[dict[str, Any]] = []
    hook = model.denoiser.register_forward_pre_hook(lambda _, __, given: calls.append(given), with_kwargs=True)
    try:
        draw()
    finally:
        hook.remove()
    return calls[0]


def pixels(images: Any) -> Any:
    """Images as one array of int16, so that differences have a sign."""
    import numpy as np

    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def picture(seed: int, *, width: int = 32, height: int = 32) -> Any:
    """Coloured noise."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def generators(*seeds: int) -> list[Any]:
    """A CPU generator a seed, as the families make them."""
    import torch

    return [torch.Generator().manual_seed(seed) for seed in seeds]


def train_two_steps(model: Any, folder: Path, *, targets: tuple[str, ...]) -> Any:
    """The delta of two steps of DUO on two pairs of noise, checked to be a change."""
    from contextlib import contextmanager
    from types import SimpleNamespace

    import torch

    from duo.methods.duo import Duo
    from duo.pairs import Pairs
    from duo.plugins import Precision

    @contextmanager
    def progress(total: int, label: str) -> Any:
        yield SimpleNamespace(update=lambda step, **numbers: None)

    rows: list[dict[str, Any]] = []
    run = SimpleNamespace(
        folder=folder,
        seed=1,
        device=model.device,
        precision=Precision(),
        progress=progress,
        log=lambda **numbers: rows.append(numbers),
    )
    pairs = Pairs(names=["0.png", "1.png"], unsafe=[picture(0), picture(1)], safe=[picture(2), picture(3)])
    method = Duo(
        targets=targets, rank=2, learning_rate=0.1, prior_weight=1.0, max_train_steps=2, train_batch_size=2, beta=10.0
    )
    delta = method.erase(model, None, pairs=pairs, run=run)
    assert len(rows) == 2
    assert abs(rows[0]["loss"] - 0.6931) < 1e-3  # the policy starts as the reference
    assert rows[0]["prior"] == 0 < rows[1]["prior"]
    layers = {name for scope in targets for name in model.layers(scope)}
    assert {name.rsplit(".lora_", 1)[0] for name in delta.tensors} == layers
    assert all(torch.isfinite(tensor).all() for tensor in delta.tensors.values())
    return delta
