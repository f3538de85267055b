"""Models of the real ones' sizes with random weights, on which training steps are timed where there is a CUDA device.

Denoisers are those of `scale.py`, with VAE and text encoders of the published shapes around them, so that our families
and the peers' loops run on them as on the real ones. Tokenizers are the embedded model's and the tests' (what a prompt
says takes no time). `small` is the same on shapes for a CPU, by which the tests go this way without a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scale import flux, sd3, sd14, sdxl

import duo.toybox
from duo.families.flux import Flux
from duo.families.sd import Sd
from duo.families.sd3 import Sd3
from duo.families.sdxl import Sdxl
from duo.pairs import Pairs
from duo.plugins import Family, Precision

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
PAIRS = 4
TOKENIZER = Path(duo.toybox.__file__).parent / "weights" / "toybox" / "tokenizer"
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
PLAIN = {"use_quant_conv": False, "use_post_quant_conv": False}
SD3_VAE = {"shift_factor": 0.0609, "scaling_factor": 1.5305, **PLAIN}
FLUX_VAE = {"shift_factor": 0.1159, "scaling_factor": 0.3611, **PLAIN}
DDPM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True, kw_only=True)
class Size:
    """A family's pipeline of random weights, pixels a side, and pairs a step that fit 80 GiB.

    The larger ones compute their activations again in the backward pass, ours and the peer's alike.
    """

    family: Callable[..., Family]
    pipeline: Callable[[bool], Any]
    pixels: int
    batch: int
    again: bool


def clip(shape: Mapping[str, int], *, projected: int | None, small: bool) -> tuple[Any, Any]:
    """A tokenizer and a CLIP text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)
    shape = {**shape, "num_hidden_layers": 2, "intermediate_size": 64} if small else shape
    config = CLIPTextConfig(
        **shape,
        vocab_size=len(tokenizer) if small else 49408,
        projection_dim=projected or shape["hidden_size"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, CLIPTextModel(config) if projected is None else CLIPTextModelWithProjection(config)


def t5(*, small: bool) -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel

    from tiny_flow import t5 as tiny

    tokenizer, _ = tiny(16)
    shape = {**T5_XXL, "num_layers": 1, "d_ff": 32, "num_heads": 2, "d_kv": 8} if small else T5_XXL
    config = T5Config(
        **shape,
        vocab_size=len(tokenizer) if small else 32128,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return tokenizer, T5EncoderModel(config)


def vae(channels: int, *, small: bool, **settings: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16) if small else (128, 256, 512, 512),
        layers_per_block=1 if small else 2,
        latent_channels=channels,
        norm_num_groups=4 if small else 32,
        **settings,
    )


def denoiser(make: Callable[[], tuple[Any, Any]], *, small: bool, **shrunk: Any) -> Any:
    """That of `scale.py`, or another of its class and config but for what is `shrunk`."""
    if not small:
        return make()[0]
    with torch.device("meta"):
        large, _ = make()
    config = {name: value for name, value in large.config.items() if not name.startswith("_")}
    return type(large).from_config({**config, **shrunk})


def sized(unet: Any, side: int, *, small: bool) -> Any:
    """A U-Net told how many latents a side its images have."""
    unet.register_to_config(sample_size=8 if small else side)
    return unet


def scheduler(kind: Any, **settings: Any) -> Any:
    """On the CPU and in float32, whatever networks are made in: some of diffusers' go through numpy."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.device("cpu"):
            return kind(**settings)
    finally:
        torch.set_default_dtype(before)


UNET = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "attention_head_dim": 2}


def sd14_pipeline(small: bool) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer, encoder = clip(CLIP_L, projected=None, small=small)
    return StableDiffusionPipeline(
        unet=sized(denoiser(sd14, small=small, **UNET), 64, small=small),
        vae=vae(4, small=small),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=scheduler(DDIMScheduler, **DDPM, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline(small: bool) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer, encoder = clip(CLIP_L, projected=None, small=small)
    tokenizer_2, encoder_2 = clip(CLIP_G, projected=1280, small=small)
    shrunk = {**UNET, "block_out_channels": (32, 32, 32), "transformer_layers_per_block": 1}
    return StableDiffusionXLPipeline(
        unet=sized(denoiser(sdxl, small=small, **shrunk), 128, small=small),
        vae=vae(4, small=small, scaling_factor=0.13025),
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=scheduler(EulerDiscreteScheduler, **DDPM, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def sd3_pipeline(small: bool) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    tokenizer, encoder = clip(CLIP_L, projected=768, small=small)
    tokenizer_2, encoder_2 = clip(CLIP_G, projected=1280, small=small)
    tokenizer_3, encoder_3 = t5(small=small)
    shrunk = {"num_layers": 1, "num_attention_heads": 1, "caption_projection_dim": 64, "sample_size": 8}
    return StableDiffusion3Pipeline(
        transformer=denoiser(sd3, small=small, **shrunk),
        scheduler=scheduler(FlowMatchEulerDiscreteScheduler, shift=3.0),
        vae=vae(16, small=small, **SD3_VAE),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
    )


def flux_pipeline(small: bool) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    tokenizer, encoder = clip(CLIP_L, projected=None, small=small)
    tokenizer_2, encoder_2 = t5(small=small)
    shrunk = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
    return FluxPipeline(
        transformer=denoiser(flux, small=small, **shrunk),
        scheduler=scheduler(FlowMatchEulerDiscreteScheduler, shift=3.0, use_dynamic_shifting=True, max_shift=1.15),
        vae=vae(16, small=small, sample_size=64 if small else 1024, **FLUX_VAE),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
    )


SIZES: Mapping[str, Size] = {
    "training SD 1.4, 512²": Size(family=Sd, pipeline=sd14_pipeline, pixels=512, batch=4, again=False),
    "training SDXL, 1024²": Size(family=Sdxl, pipeline=sdxl_pipeline, pixels=1024, batch=1, again=True),
    "training SD3 medium, 1024²": Size(family=Sd3, pipeline=sd3_pipeline, pixels=1024, batch=1, again=True),
    "training FLUX.1 dev, 1024²": Size(family=Flux, pipeline=flux_pipeline, pixels=1024, batch=1, again=True),
}


def real_size(name: str, *, device: str, small: bool = False) -> tuple[Family, Pairs, int, Precision]:
    """A model on `device`, pairs of coloured noise, the batch and how it is trained; weights in bfloat16, the VAE's
    in float32 as the authors have it."""
    size = SIZES[name]
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            pipeline = size.pipeline(small)
    finally:
        torch.set_default_dtype(before)
    if not small:
        pipeline.vae.to(torch.float32)
    model = size.family(pipeline.to(device), name=name)
    if size.again:
        model.denoiser.enable_gradient_checkpointing()
        model.denoiser.train()  # or diffusers leaves it out; no network here has dropout
    side = 64 if small else size.pixels
    picture = partial(np.random.default_rng(0).integers, 0, 255, (side, side, 3), dtype=np.uint8)
    sides = [[Image.fromarray(picture()) for _ in range(PAIRS)] for _ in range(2)]
    pairs = Pairs(names=[str(i) for i in range(PAIRS)], unsafe=sides[0], safe=sides[1])
    return model, pairs, size.batch, Precision(gradient_checkpointing=size.again)
