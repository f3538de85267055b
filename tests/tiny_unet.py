"""Tiny seeded pipelines of the real SD 2 and SDXL classes (64×64 images, 16×16×4 latents), and single files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tiny_flow import clip_encoder, clip_tokenizer

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


def sd2_v_pipeline(vocabulary: Path) -> Any:
    """A `StableDiffusionPipeline` as SD 2.1 at 768 pixels is: linear projections, "!" as padding, v-prediction."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer = clip_tokenizer(vocabulary, pad_token="!")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionPipeline(
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
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sdxl_pipeline(vocabulary: Path, *, force_zeros: bool = True) -> Any:
    """A `StableDiffusionXLPipeline`: two text encoders, of widths 16 and 24, a first block without attention."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer, other = clip_tokenizer(vocabulary), clip_tokenizer(vocabulary, pad_token="!")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionXLPipeline(
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
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- the layout of single files -------------------------------------------------------------------

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_PARTS = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def single_file(pipeline: Any) -> dict[str, Any]:
    """The weights of a tiny SD 1, SD 2 or SDXL pipeline under the names of the models' authors."""
    tensors = {f"model.diffusion_model.{k}": v for k, v in _unet_names(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in _vae_names(pipeline.vae).items()}
    if getattr(pipeline, "text_encoder_2", None) is not None:
        tensors |= _clip_names(pipeline.text_encoder, "conditioner.embedders.0.transformer.text_model.")
        tensors |= _open_clip_names(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    elif pipeline.unet.config.use_linear_projection:
        tensors |= _open_clip_names(pipeline.text_encoder, "cond_stage_model.model.")
    else:
        tensors |= _clip_names(pipeline.text_encoder, "cond_stage_model.transformer.text_model.")
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _unet_names(model: Any) -> dict[str, Any]:
    layers = model.config.layers_per_block
    named = {}
    for name, tensor in model.state_dict().items():
        if found := re.match(
            r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
        ):
            way, block, kind, layer, rest = found.groups()
            if way == "down":
                number = 1 + int(block) * (layers + 1) + (layers if kind == "downsamplers" else int(layer))
                place = {"resnets": 0, "attentions": 1, "downsamplers": 0}[kind]
            else:
                last = layers  # an upsampler stands after the last layer, and after its attention if it has one
                number = int(block) * (layers + 1) + (last if kind == "upsamplers" else int(layer))
                attends = model.config.up_block_types[int(block)].startswith("CrossAttn")
                place = {"resnets": 0, "attentions": 1, "upsamplers": 2 if attends else 1}[kind]
            side = "input_blocks" if way == "down" else "output_blocks"
            if kind == "resnets":
                rest = _renamed(rest, RESNET)
            elif kind == "downsamplers":
                rest = rest.replace("conv", "op")
            named[f"{side}.{number}.{place}.{rest}"] = tensor
        elif found := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
            kind, layer, rest = found.groups()
            number = 1 if kind == "attentions" else 2 * int(layer)
            named[f"middle_block.{number}.{_renamed(rest, RESNET) if kind == 'resnets' else rest}"] = tensor
        else:
            named[_renamed(name, OUTER)] = tensor
    return named


def _vae_names(model: Any) -> dict[str, Any]:
    blocks = len(model.config.block_out_channels)
    named = {}
    for name, tensor in model.state_dict().items():
        new = _renamed(name, VAE_PARTS)
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{blocks - 1 - int(found[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{blocks - 1 - int(found[1])}.upsample", new)
        convolution = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", new)  # 1×1 convolutions there, Linear here
        named[new] = tensor[:, :, None, None] if convolution else tensor
    return named


def _clip_names(encoder: Any, prefix: str) -> dict[str, Any]:
    return {prefix + name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}


def _open_clip_names(encoder: Any, prefix: str) -> dict[str, Any]:
    import torch

    state = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    named = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    if "text_projection.weight" in state:
        named["text_projection"] = state["text_projection.weight"].T
    for name, tensor in state.items():
        if found := re.match(r"encoder\.layers\.(\d+)\.(.+)", name):
            layer, rest = f"transformer.resblocks.{found[1]}", found[2]
            if rest.startswith("self_attn.q_proj"):
                part = rest.rpartition(".")[2]
                three = [state[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
                named[f"{layer}.attn.in_proj_{part}"] = torch.cat(three)
            elif not re.match(r"self_attn\.[kv]_proj", rest):
                named[f"{layer}.{_renamed(rest, OPEN_CLIP)}"] = tensor
    return {prefix + name: tensor for name, tensor in named.items()}


def _renamed(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        name = re.sub(rf"(?<![\w.]){re.escape(ours)}(?=\.|$)|(?<=\.){re.escape(ours)}(?=\.|$)", theirs, name)
    return name
