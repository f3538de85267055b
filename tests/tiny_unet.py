"""Tiny seeded pipelines of the real SD 2 and SDXL classes (64×64 images, 16×16×4 latents)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_flow import clip_encoder, clip_tokenizer, seeded

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WIDTHS = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1}


def unet(**settings: Any) -> Any:
    """Two blocks with cross-attention each way, unless `settings` says otherwise."""
    from diffusers import UNet2DConditionModel

    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(sample_size=16, use_linear_projection=True, **{**blocks, **WIDTHS, **settings})


def vae(**settings: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        **settings,
    )


@seeded
def sd2_v_pipeline(vocabulary: Path) -> Any:
    """A `StableDiffusionPipeline` as SD 2.1 at 768 pixels is: linear projections, "!" as padding, v-prediction."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer = clip_tokenizer(vocabulary, pad_token="!")
    return StableDiffusionPipeline(
        unet=unet(attention_head_dim=(2, 4), cross_attention_dim=32),
        vae=vae(),
        text_encoder=clip_encoder(tokenizer, width=32, projected=None),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            **SCHEDULE,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@seeded
def sdxl_pipeline(vocabulary: Path, *, force_zeros: bool = True) -> Any:
    """A `StableDiffusionXLPipeline`: two text encoders, of widths 16 and 24, a first block without attention."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer, other = clip_tokenizer(vocabulary), clip_tokenizer(vocabulary, pad_token="!")
    return StableDiffusionXLPipeline(
        unet=unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=40,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        ),
        vae=vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip_encoder(tokenizer, width=16, projected=None),
        text_encoder_2=clip_encoder(other, width=24, projected=24),
        tokenizer=tokenizer,
        tokenizer_2=other,
        scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )
