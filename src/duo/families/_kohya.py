"""Where kohya's LoRA files keep the layers of a denoiser: names of the network that kohya-ss's sd-scripts train.

For SD 1.x and 2.x that is diffusers' own U-Net, for SDXL Stability's, for FLUX Black Forest Labs'; read off the
converters of diffusers (`diffusers.loaders.lora_conversion_utils`), which know no such scheme for SD3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from duo.plugins import KohyaLayer

_SGM_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_SGM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_SGM_MIDDLE = {("resnets", 0): 0, ("attentions", 0): 1, ("resnets", 1): 2}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")

_QKV, _LINEAR1 = (1, 1, 1), (1, 1, 1, 4)  # FLUX has the feed-forward four times as wide
_FLUX_DOUBLE = {
    "attn.to_q": ("img_attn_qkv", 0, _QKV),
    "attn.to_k": ("img_attn_qkv", 1, _QKV),
    "attn.to_v": ("img_attn_qkv", 2, _QKV),
    "attn.to_out.0": ("img_attn_proj", 0, (1,)),
    "attn.add_q_proj": ("txt_attn_qkv", 0, _QKV),
    "attn.add_k_proj": ("txt_attn_qkv", 1, _QKV),
    "attn.add_v_proj": ("txt_attn_qkv", 2, _QKV),
    "attn.to_add_out": ("txt_attn_proj", 0, (1,)),
    "ff.net.0.proj": ("img_mlp_0", 0, (1,)),
    "ff.net.2": ("img_mlp_2", 0, (1,)),
    "ff_context.net.0.proj": ("txt_mlp_0", 0, (1,)),
    "ff_context.net.2": ("txt_mlp_2", 0, (1,)),
    "norm1.linear": ("img_mod_lin", 0, (1,)),
    "norm1_context.linear": ("txt_mod_lin", 0, (1,)),
}
_FLUX_SINGLE = {
    "attn.to_q": ("linear1", 0, _LINEAR1),
    "attn.to_k": ("linear1", 1, _LINEAR1),
    "attn.to_v": ("linear1", 2, _LINEAR1),
    "proj_mlp": ("linear1", 3, _LINEAR1),
    "proj_out": ("linear2", 0, (1,)),
    "norm.linear": ("modulation_lin", 0, (1,)),
}
_FLUX = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")


def unet_layer(layer: str) -> KohyaLayer:
    """Of a U-Net that sd-scripts train as diffusers has it (SD 1.x and 2.x)."""
    return KohyaLayer(module=_underscored(layer))


def sgm_layer(layer: str, config: Mapping[str, Any]) -> KohyaLayer | None:
    """Of SDXL's U-Net, whose blocks Stability's code counts on from one resolution to the next."""
    per_block = config.get("layers_per_block", 2)
    if not isinstance(per_block, int):
        return None
    name = _SGM_OUTER.get(layer)
    if found := _BLOCK.fullmatch(layer):
        way, kind, inner = found[1], found[3], found[5]
        block, j = int(found[2]), int(found[4])
        # A level's residual layers, then on the way down its sampler; on the way up one layer more, and no own place
        # for the sampler, which follows the last layer's attention.
        row = block * (per_block + 1) + (per_block if kind.endswith("samplers") else j)
        side = f"input_blocks.{row + 1}" if way == "down" else f"output_blocks.{row}"
        place = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}[kind]
        own = _sgm_inner(kind, inner)
        name = None if own is None else f"{side}.{place}.{own}"
    elif found := _MIDDLE.fullmatch(layer):
        own, number = _sgm_inner(found[1], found[3]), _SGM_MIDDLE.get((found[1], int(found[2])))
        name = None if own is None or number is None else f"middle_block.{number}.{own}"
    return None if name is None else KohyaLayer(module=_underscored(name))


def flux_layer(layer: str) -> KohyaLayer | None:
    """Of FLUX's transformer blocks. Layers outside them have no name that diffusers would read back rightly."""
    found = _FLUX.fullmatch(layer)
    if found is None:
        return None
    known, kind = (_FLUX_SINGLE, "single") if found[1] else (_FLUX_DOUBLE, "double")
    if found[3] not in known:
        return None
    module, part, widths = known[found[3]]
    return KohyaLayer(module=f"{kind}_blocks_{found[2]}_{module}", part=part, widths=widths)


def _sgm_inner(kind: str, inner: str) -> str | None:
    if kind == "resnets":
        return _SGM_RESNET.get(inner)
    return {"downsamplers": {"conv": "op"}, "upsamplers": {"conv": "conv"}}.get(kind, {inner: inner}).get(inner)


def _underscored(name: str) -> str:
    return name.replace(".", "_")
