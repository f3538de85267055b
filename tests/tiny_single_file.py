"""The weights of tiny pipelines under the names that their authors' code gives them, as single files hold."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

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

EVERYTHING = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
# Layers of a transformer → their authors' name, and which of the layers stacked under it.
_BLOCK, _THEIRS = r"transformer_blocks\.(\d+)\.", r"joint_blocks.\1"
SD3_PLACES = {
    "pos_embed": ("pos_embed", 0),
    r"pos_embed\.proj": ("x_embedder.proj", 0),
    r"time_text_embed\.timestep_embedder\.linear_1": ("t_embedder.mlp.0", 0),
    r"time_text_embed\.timestep_embedder\.linear_2": ("t_embedder.mlp.2", 0),
    r"time_text_embed\.text_embedder\.linear_1": ("y_embedder.mlp.0", 0),
    r"time_text_embed\.text_embedder\.linear_2": ("y_embedder.mlp.2", 0),
    "context_embedder": ("context_embedder", 0),
    "proj_out": ("final_layer.linear", 0),
    r"norm_out\.linear": ("final_layer.adaLN_modulation.1", 0),
    **{rf"{_BLOCK}(attn2?)\.to_{one}": (rf"{_THEIRS}.x_block.\2.qkv", i) for i, one in enumerate("qkv")},
    **{rf"{_BLOCK}attn\.add_{one}_proj": (f"{_THEIRS}.context_block.attn.qkv", i) for i, one in enumerate("qkv")},
    rf"{_BLOCK}(attn2?)\.norm_([qk])": (rf"{_THEIRS}.x_block.\2.ln_\3", 0),
    rf"{_BLOCK}attn\.norm_added_([qk])": (rf"{_THEIRS}.context_block.attn.ln_\2", 0),
    rf"{_BLOCK}(attn2?)\.to_out\.0": (rf"{_THEIRS}.x_block.\2.proj", 0),
    rf"{_BLOCK}attn\.to_add_out": (f"{_THEIRS}.context_block.attn.proj", 0),
    rf"{_BLOCK}norm1\.linear": (f"{_THEIRS}.x_block.adaLN_modulation.1", 0),
    rf"{_BLOCK}norm1_context\.linear": (f"{_THEIRS}.context_block.adaLN_modulation.1", 0),
    rf"{_BLOCK}ff\.net\.0\.proj": (f"{_THEIRS}.x_block.mlp.fc1", 0),
    rf"{_BLOCK}ff\.net\.2": (f"{_THEIRS}.x_block.mlp.fc2", 0),
    rf"{_BLOCK}ff_context\.net\.0\.proj": (f"{_THEIRS}.context_block.mlp.fc1", 0),
    rf"{_BLOCK}ff_context\.net\.2": (f"{_THEIRS}.context_block.mlp.fc2", 0),
}
_DOUBLE, _SINGLE = r"double_blocks.\1", r"single_blocks.\1"
FLUX_PLACES = {
    r"time_text_embed\.timestep_embedder\.linear_1": ("time_in.in_layer", 0),
    r"time_text_embed\.timestep_embedder\.linear_2": ("time_in.out_layer", 0),
    r"time_text_embed\.text_embedder\.linear_1": ("vector_in.in_layer", 0),
    r"time_text_embed\.text_embedder\.linear_2": ("vector_in.out_layer", 0),
    r"time_text_embed\.guidance_embedder\.linear_1": ("guidance_in.in_layer", 0),
    r"time_text_embed\.guidance_embedder\.linear_2": ("guidance_in.out_layer", 0),
    "context_embedder": ("txt_in", 0),
    "x_embedder": ("img_in", 0),
    "proj_out": ("final_layer.linear", 0),
    r"norm_out\.linear": ("final_layer.adaLN_modulation.1", 0),
    **{rf"{_BLOCK}attn\.to_{one}": (f"{_DOUBLE}.img_attn.qkv", i) for i, one in enumerate("qkv")},
    **{rf"{_BLOCK}attn\.add_{one}_proj": (f"{_DOUBLE}.txt_attn.qkv", i) for i, one in enumerate("qkv")},
    rf"{_BLOCK}attn\.norm_q": (f"{_DOUBLE}.img_attn.norm.query_norm.scale", 0),
    rf"{_BLOCK}attn\.norm_k": (f"{_DOUBLE}.img_attn.norm.key_norm.scale", 0),
    rf"{_BLOCK}attn\.norm_added_q": (f"{_DOUBLE}.txt_attn.norm.query_norm.scale", 0),
    rf"{_BLOCK}attn\.norm_added_k": (f"{_DOUBLE}.txt_attn.norm.key_norm.scale", 0),
    rf"{_BLOCK}attn\.to_out\.0": (f"{_DOUBLE}.img_attn.proj", 0),
    rf"{_BLOCK}attn\.to_add_out": (f"{_DOUBLE}.txt_attn.proj", 0),
    rf"{_BLOCK}norm1\.linear": (f"{_DOUBLE}.img_mod.lin", 0),
    rf"{_BLOCK}norm1_context\.linear": (f"{_DOUBLE}.txt_mod.lin", 0),
    rf"{_BLOCK}ff\.net\.0\.proj": (f"{_DOUBLE}.img_mlp.0", 0),
    rf"{_BLOCK}ff\.net\.2": (f"{_DOUBLE}.img_mlp.2", 0),
    rf"{_BLOCK}ff_context\.net\.0\.proj": (f"{_DOUBLE}.txt_mlp.0", 0),
    rf"{_BLOCK}ff_context\.net\.2": (f"{_DOUBLE}.txt_mlp.2", 0),
    **{
        rf"single_{_BLOCK}(?:attn\.to_)?{one}": (f"{_SINGLE}.linear1", i)
        for i, one in enumerate(("q", "k", "v", "proj_mlp"))
    },
    rf"single_{_BLOCK}attn\.norm_q": (f"{_SINGLE}.norm.query_norm.scale", 0),
    rf"single_{_BLOCK}attn\.norm_k": (f"{_SINGLE}.norm.key_norm.scale", 0),
    rf"single_{_BLOCK}norm\.linear": (f"{_SINGLE}.modulation.lin", 0),
    rf"single_{_BLOCK}proj_out": (f"{_SINGLE}.linear2", 0),
}


def single_file(pipeline: Any, *, parts: Collection[str] = EVERYTHING) -> dict[str, Any]:
    """The weights of a tiny pipeline under the names of the models' authors; of SD3 and FLUX those of some `parts`."""
    tensors = _flow_tensors(pipeline, parts) if hasattr(pipeline, "transformer") else _unet_tensors(pipeline)
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _flow_tensors(pipeline: Any, parts: Collection[str]) -> dict[str, Any]:
    places = FLUX_PLACES if hasattr(pipeline.transformer, "single_transformer_blocks") else SD3_PLACES
    tensors: dict[str, Any] = {}
    for part in parts:
        module = getattr(pipeline, part)
        if part == "transformer":
            tensors |= {f"model.diffusion_model.{k}": v for k, v in _stacked(module.state_dict(), places).items()}
        elif part == "vae":
            tensors |= {f"first_stage_model.{k}": v for k, v in _vae_names(module).items()}
        else:
            tensors |= {f"text_encoders.{ENCODERS[part]}.transformer.{k}": v for k, v in module.state_dict().items()}
    return tensors


def _stacked(state: dict[str, Any], places: dict[str, tuple[str, int]]) -> dict[str, Any]:
    """Tensors by their new names, those of one name stacked in the order of their numbers."""
    import torch

    swapped = {"norm_out.linear"}  # scale and shift here, shift and scale there
    if "joint_blocks" in "".join(new for new, _ in places.values()):
        last = max(int(found[1]) for key in state if (found := re.match(r"transformer_blocks\.(\d+)\.", key)))
        swapped.add(f"transformer_blocks.{last}.norm1_context.linear")
    stacks: dict[str, dict[int, Any]] = {}
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".")
        found, (new, number) = next(
            (found, place) for pattern, place in places.items() if (found := re.fullmatch(pattern, layer))
        )
        name = found.expand(new)
        if not name.endswith((".scale", "pos_embed")):
            name = f"{name}.{kind}"
        stacks.setdefault(name, {})[number] = tensor.roll(len(tensor) // 2, 0) if layer in swapped else tensor
    return {name: torch.cat([stack[i] for i in sorted(stack)]) for name, stack in stacks.items()}


def _unet_tensors(pipeline: Any) -> dict[str, Any]:
    tensors = {f"model.diffusion_model.{k}": v for k, v in _unet_names(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in _vae_names(pipeline.vae).items()}
    if getattr(pipeline, "text_encoder_2", None) is not None:
        tensors |= _clip_names(pipeline.text_encoder, "conditioner.embedders.0.transformer.text_model.")
        tensors |= _open_clip_names(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    elif pipeline.unet.config.use_linear_projection:
        tensors |= _open_clip_names(pipeline.text_encoder, "cond_stage_model.model.")
    else:
        tensors |= _clip_names(pipeline.text_encoder, "cond_stage_model.transformer.text_model.")
    return tensors


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
