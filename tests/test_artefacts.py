"""Erasures of other software against diffusers' own pipelines that are given the same, on tiny models."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from duo.artefacts import Artefact, differences, find_artefact
from duo.checkpoint import write_tensors
from duo.delta import Delta
from duo.errors import UserError
from duo.models import load_family
from duo.plugins import Sampling
from tiny_flow import flux_pipeline, generators, pixels, sd3_pipeline
from tiny_single_file import single_file
from tiny_unet import sdxl_pipeline

PROMPTS = ["a red house on fire", "a blue boat"]
SHORT = Sampling(num_inference_steps=2, guidance_scale=3.0)
DENOISERS = {"sd": "unet", "sdxl": "unet", "sd3": "transformer", "flux": "transformer"}
ENCODED = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]  # all, or diffusers knows no kohya file by them
PROJECTIONS = {"unet": ["to_k", "to_v"], "transformer": ["to_q", "to_k"]}


@dataclass(kw_only=True)
class Original:
    """A tiny original: its diffusers folder, its family and what that draws (all to be read only), and its maker."""

    kind: str
    folder: Path
    make: Callable[[], Any]

    @cached_property
    def family(self) -> Any:
        return load_family(str(self.folder))

    @cached_property
    def before(self) -> np.ndarray:
        return draws(self.family)

    @property
    def part(self) -> str:
        return DENOISERS[self.kind]


@pytest.fixture(scope="module")
def originals(make_tiny_pipeline: Any, vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("originals")
    made: dict[str, Callable[[], Any]] = {
        "sd": make_tiny_pipeline,
        "sdxl": lambda: sdxl_pipeline(vocabulary),
        "sd3": lambda: sd3_pipeline(vocabulary),
        "flux": lambda: flux_pipeline(vocabulary),
    }
    for kind, make in made.items():
        make().save_pretrained(root / kind)
    return {kind: Original(kind=kind, folder=root / kind, make=make) for kind, make in made.items()}


@pytest.fixture
def sd(originals: dict[str, Original]) -> Original:
    return originals["sd"]


def noised(network: Any, scale: float) -> None:
    """Change every weight of a network."""
    network.load_state_dict({key: one + noise(one, 1, scale) for key, one in network.state_dict().items()})


def drawn(pipeline: Any) -> np.ndarray:
    size = {"height": 32, "width": 32} if type(pipeline).__name__ == "FluxPipeline" else {}
    images = pipeline(PROMPTS, generator=generators(1, 2), num_inference_steps=2, guidance_scale=3.0, **size).images
    return pixels(images)


def draws(model: Any) -> np.ndarray:
    return pixels(model.generate(PROMPTS, seeds=[1, 2], sampling=SHORT))


def check(path: Path, kind: str, original: Original, theirs: Any) -> tuple[Any, dict[str, int]]:
    """The erased model that `path` makes of the original draws what the pipeline `theirs` draws, and not what the
    original does; with the number of tensors that were changed in each network."""
    found = find_artefact(str(path))
    assert found.kind == kind
    erased = found.load(str(original.folder))
    assert erased.name == str(path)
    ours = draws(erased)
    assert np.abs(ours - drawn(theirs)).max() <= 1
    assert np.abs(ours - original.before).max() > 1
    assert not [module for module in erased.denoiser.modules() if hasattr(module, "lora_A")]
    assert not any(parameter.requires_grad for parameter in erased.denoiser.parameters())
    changed, told = differences(original.family, erased, name=found.path)
    assert not told
    return erased, {part: count for part, count in changed.items() if count}


def refused(match: str, path: Path | str, original: Path | None = None) -> None:
    """`path` is not recognised, or where an original is given not loaded over it."""
    with pytest.raises(UserError, match=match) as caught:
        find_artefact(str(path)) if original is None else find_artefact(str(path)).load(str(original))
    assert "\n" not in str(caught.value)


def noise(tensor: torch.Tensor, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))


# --- LoRA -----------------------------------------------------------------------------------------


def lora_file(original: Original, out: Path, *, encoders: bool) -> Path:
    """A LoRA that diffusers itself saves, with both halves random; alpha is twice the rank."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline, given = original.make(), {}
    parts = {original.part: PROJECTIONS[original.part]}
    if encoders:
        able = type(pipeline)._lora_loadable_modules
        parts |= {part: ENCODED for part in ("text_encoder", "text_encoder_2") if part in able}
    for part, targets in parts.items():
        network = getattr(pipeline, part)
        network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets))
        state = get_peft_model_state_dict(network)
        given[f"{part}_lora_layers"] = {key: noise(one, i, 0.4) for i, (key, one) in enumerate(sorted(state.items()))}
        given[f"{part}_lora_adapter_metadata"] = {"r": 2, "lora_alpha": 4, "target_modules": targets}
    pipeline.save_lora_weights(out, **given)
    return out / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("kind", DENOISERS)
def test_a_lora_of_diffusers(originals: dict[str, Original], tmp_path: Path, kind: str) -> None:
    original = originals[kind]
    path = lora_file(original, tmp_path / "lora", encoders=True)
    theirs = original.make()
    theirs.load_lora_weights(tmp_path / "lora", weight_name=path.name)
    erased, changed = check(path, "lora", original, theirs)
    # Its alpha is twice its rank: in the weights there is 2·B·A, and nowhere else is anything.
    state = load_file(path)
    layers = {key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")}
    assert changed == Counter(layer.partition(".")[0] for layer in layers)
    assert changed.keys() == {*type(theirs)._lora_loadable_modules}
    for layer in layers:
        part, _, rest = layer.partition(".")
        if part == original.part:
            weights = [one.denoiser.get_submodule(rest).weight for one in (erased, original.family)]
            product = state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
            torch.testing.assert_close(weights[0] - weights[1], 2 * product, rtol=1e-4, atol=1e-5)
    found = find_artefact(str(tmp_path / "lora"))  # the folder holds one file of weights
    assert found.droppable and found.digest == find_artefact(str(path)).digest


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_a_lora_of_the_denoiser_alone(originals: dict[str, Original], tmp_path: Path, kind: str) -> None:
    original = originals[kind]
    path = lora_file(original, tmp_path, encoders=False)
    theirs = original.make()
    theirs.load_lora_weights(tmp_path, weight_name=path.name)
    _, changed = check(path, "lora", original, theirs)
    assert changed.keys() == {original.part}


def kohya(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA of SD or SDXL under kohya's names."""
    names = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
    if any(key.startswith("text_encoder_2.") for key in state):
        names["text_encoder"] = "lora_te1"
    out = {}
    for key, tensor in state.items():
        part, _, rest = key.partition(".")
        layer, _, half = rest.rpartition(".lora_")
        if part != "unet" and not layer.startswith("text_model."):  # newer transformers leave that out
            layer = f"text_model.{layer}"
        name = f"{names[part]}_{layer.replace('.', '_')}"
        out[f"{name}.{'lora_down' if half.startswith('A') else 'lora_up'}.weight"] = tensor
        out[f"{name}.alpha"] = torch.tensor(1.0)
    return out


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_lora_of_kohya(originals: dict[str, Original], tmp_path: Path, kind: str) -> None:
    original = originals[kind]
    path = tmp_path / "kohya.safetensors"
    save_file(kohya(load_file(lora_file(original, tmp_path / "lora", encoders=True))), path)
    theirs = original.make()
    theirs.load_lora_weights(tmp_path, weight_name=path.name)
    _, changed = check(path, "lora", original, theirs)
    assert changed.keys() == {*type(theirs)._lora_loadable_modules}


def test_a_kohya_file_that_duo_exported(originals: dict[str, Original], tmp_path: Path) -> None:
    """FLUX's stacked layers are cut apart again. (Its single blocks are cut as a width of 3072 asks.)"""
    from duo.exporting import export

    model, folder = load_family(str(originals["flux"].folder)), originals["flux"].folder
    tensors = {}
    for i, (name, module) in enumerate(sorted(model.layers("attention").items())):
        if not name.startswith("single_"):
            out, into = module.weight.shape
            tensors[f"{name}.lora_A.weight"] = noise(torch.empty(2, into), i, 0.4)
            tensors[f"{name}.lora_B.weight"] = noise(torch.empty(out, 2), 100 + i, 0.4)
    record = {"model": str(folder), "method": "duo"}
    delta = Delta(kind="lora", component="transformer", tensors=tensors, record=record)
    delta.save(tmp_path / "delta.safetensors")
    export(tmp_path / "delta.safetensors", tmp_path / "kohya.safetensors", to="kohya")
    erased = find_artefact(str(tmp_path / "kohya.safetensors")).load(str(folder))
    with delta.attached(model):
        assert np.abs(draws(erased) - draws(model)).max() <= 1


def test_a_lora_that_is_not_read_as_a_whole_is_refused(originals: dict[str, Original], tmp_path: Path) -> None:
    good = load_file(lora_file(originals["sd"], tmp_path / "lora", encoders=True))
    path = tmp_path / "bad.safetensors"
    key = next(key for key in sorted(good) if key.startswith("unet") and key.endswith("lora_A.weight"))
    halves = {half: good[key.replace("lora_A", f"lora_{half}")] for half in "AB"}
    stray = "unet.down_blocks.7.attentions.0.to_k"
    cases: list[tuple[dict[str, torch.Tensor | None], str]] = [
        (
            {"transformer.x.lora_A.weight": halves["A"]},
            r"holds transformer\.x\.lora_A\.weight, and model .* takes no LoRA",
        ),
        (
            {f"{stray}.lora_{half}.weight": one for half, one in halves.items()},
            r"down_blocks\.7\.attentions\.0\.to_k\.lora_[AB]\.weight, and model .* has no such layer; give the model",
        ),
        ({key: None}, r"without its other half"),
        ({key: torch.ones(2, 7)}, r"the LoRA of unet\..* is \(\d+, 2\) by \(2, 7\), and the layer"),
        ({key: torch.full_like(halves["A"], float("nan"))}, rf"{key} holds NaN or infinity"),
        ({key.replace("lora_A.weight", "dora_scale"): torch.ones(3)}, r"dora_scale, a LoHa, LoKr or DoRA"),
        ({"unet.conv_in.weight": torch.ones(3)}, r"holds unet\.conv_in\.weight, which is no part of a LoRA"),
    ]
    for changes, match in cases:
        state = {name: one.clone() for name, one in {**good, **changes}.items() if one is not None}
        save_file(state, path)
        refused(rf"^{path}.*{match}", path, originals["sd"].folder)
    save_file(good, path)
    for kind in ("sdxl", "sd3", "flux"):
        refused(rf"^{path}.*; give the model that was erased as --original$", path, originals[kind].folder)
    path.write_bytes(b"no tensors")
    refused(r"bad\.safetensors cannot be read as safetensors", path, originals["sd"].folder)


# --- weights --------------------------------------------------------------------------------------


def esd_names(network: Any) -> list[str]:
    """What ESD-x of a U-Net changes; and as much of a transformer."""
    marks = ("attn2.to_k", "attn2.to_v", "attn.to_k", "attn.to_v")
    return [key for key in network.state_dict() if key.endswith(".weight") and any(mark in key for mark in marks)]


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [("sd", ""), ("sdxl", ""), ("sd3", ""), ("flux", ""), ("sd", "unet."), ("flux", "transformer."),
     ("sd", "model.diffusion_model.")],
)  # fmt: skip
def test_a_part_of_a_denoiser(originals: dict[str, Original], tmp_path: Path, kind: str, prefix: str) -> None:
    """As ESD and UCE release it: diffusers' names and nothing else."""
    original = originals[kind]
    theirs = original.make()
    network = getattr(theirs, original.part)
    names = esd_names(network)
    changes = {key: noise(network.state_dict()[key], i, 0.5) for i, key in enumerate(names)}
    path = tmp_path / "esd-fire-from-fire-esdx.safetensors"
    save_file({f"{prefix}{key}": tensor for key, tensor in changes.items()}, path)
    network.load_state_dict(changes, strict=False)
    erased, changed = check(path, "denoiser", original, theirs)
    assert changed == {original.part: len(names)}
    assert not find_artefact(str(path)).droppable
    for key, tensor in changes.items():
        assert torch.equal(erased.denoiser.state_dict()[key], tensor)


@pytest.mark.parametrize(("kind", "layout"), [("sd", "folder"), ("sdxl", "file"), ("sd3", "file"), ("flux", "folder")])
def test_a_whole_denoiser(originals: dict[str, Original], tmp_path: Path, kind: str, layout: str) -> None:
    original = originals[kind]
    theirs = original.make()
    network = getattr(theirs, original.part)
    noised(network, 0.3)
    path = tmp_path / "all"
    if layout == "folder":
        network.save_pretrained(path)
    else:
        path = tmp_path / "all.safetensors"
        save_file(network.state_dict(), path)
    _, changed = check(path, "denoiser", original, theirs)
    assert changed == {original.part: len(network.state_dict())}


def test_another_number_of_heads_has_the_same_weights(sd: Original, tmp_path: Path) -> None:
    """A folder brings settings that no weight tells of."""
    from diffusers import UNet2DConditionModel

    theirs = sd.make()
    other = UNet2DConditionModel.from_config({**theirs.unet.config, "attention_head_dim": 4})
    other.load_state_dict(theirs.unet.state_dict())
    other.save_pretrained(tmp_path / "unet")
    theirs.unet = other
    ours = draws(find_artefact(str(tmp_path / "unet")).load(str(sd.folder)))
    assert np.abs(ours - drawn(theirs)).max() <= 1 < np.abs(ours - sd.before).max()


@pytest.mark.parametrize(("kind", "prefix"), [("sd", "model.diffusion_model."), ("sdxl", "")])
def test_a_denoiser_in_the_layout_of_its_authors(
    originals: dict[str, Original], tmp_path: Path, kind: str, prefix: str
) -> None:
    original, mark = originals[kind], "model.diffusion_model."
    theirs = original.make()
    noised(theirs.unet, 0.3)
    state = {key: one for key, one in single_file(theirs).items() if key.startswith(mark)}
    state = {f"{prefix}{key.removeprefix(mark)}": one for key, one in state.items()}
    path = tmp_path / "ldm.safetensors"
    save_file(state, path)
    check(path, "denoiser", original, theirs)
    save_file(dict(sorted(state.items())[: len(state) // 2]), path)
    refused(rf"^{path} is in the layout of its authors' code and holds a part", path, original.folder)
    save_file({**state, f"{prefix}input_blocks.9.0.stray": torch.ones(2)}, path)
    refused(r"is in the layout of its authors' code", path, original.folder)


def test_weights_that_do_not_fit_are_refused_with_their_names(originals: dict[str, Original], tmp_path: Path) -> None:
    sd, path = originals["sd"], tmp_path / "esd.safetensors"
    key = esd_names(sd.family.denoiser)[0]
    weight = sd.family.denoiser.state_dict()[key]
    for state, match in (
        (
            {key: weight, "down_blocks.9.stray": weight},
            r"holds down_blocks\.9\.stray, and the unet of model .* has no su",
        ),
        ({key: weight[:, :3].contiguous()}, rf"{key} is \(16, 3\), and in the unet of model .* it is \(16, 32\)"),
        ({key: torch.full_like(weight, float("inf"))}, rf"{key} holds NaN or infinity"),
        ({f"transformer.{key}": weight}, r"holds transformer\..*, and model .* has no transformer"),
        ({"quant_conv.weight": weight}, r"holds quant_conv\.weight, a name that is known of no erasure"),
        ({"<fire>": torch.ones(1, 32)}, r"holds <fire>, a name that is known of no erasure"),
        ({}, r"holds no tensor"),
    ):
        save_file({name: one.clone() for name, one in state.items()}, path)
        refused(rf"^{path}.*{match}", path, sd.folder)
    save_file({key: weight}, path)
    refused(rf"^{path} holds {key}, and the transformer of model", path, originals["sd3"].folder)


def test_what_erases_nothing_is_told(sd: Original, tmp_path: Path) -> None:
    state, path = sd.family.denoiser.state_dict(), tmp_path / "same.safetensors"
    key = esd_names(sd.family.denoiser)[0]

    def told(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, int], tuple[str, ...]]:
        save_file(tensors, path)
        return differences(sd.family, find_artefact(str(path)).load(str(sd.folder)), name=str(path))

    none = {"unet": 0, "vae": 0, "text_encoder": 0}
    assert told(state) == (none, (f"{path} changes nothing: all its weights are those of {str(sd.folder)!r}",))
    halves = {name: one.half() for name, one in state.items()}
    rounding = f"{path} differs from {str(sd.folder)!r} by rounding alone: it erases nothing"
    assert told(halves) == (none, (rounding,))
    assert told(halves | {key: (state[key] + 1).bfloat16()}) == (none | {"unet": 1}, ())


# --- text encoders --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "part", "layout"),
    [("sd", "text_encoder", "folder"), ("sd", "text_encoder", "file"), ("sdxl", "text_encoder", "file"),
     ("sdxl", "text_encoder_2", "folder"), ("sd3", "text_encoder", "file"), ("sd3", "text_encoder_3", "folder"),
     ("flux", "text_encoder", "folder"), ("flux", "text_encoder_2", "file")],
)  # fmt: skip
def test_a_text_encoder(originals: dict[str, Original], tmp_path: Path, kind: str, part: str, layout: str) -> None:
    original = originals[kind]
    theirs = original.make()
    encoder = getattr(theirs, part)
    noised(encoder, 0.5)
    path = tmp_path / "folder"
    encoder.save_pretrained(path)
    if layout == "file":
        state = load_file(path / "model.safetensors")
        if "shared.weight" not in state:  # CLIP's names in most releases, with its other half
            state = {f"text_model.{key.removeprefix('text_model.')}" if "projection" not in key else key: one
                     for key, one in state.items()}  # fmt: skip
            state["vision_model.x"] = torch.ones(1)
        path = tmp_path / "encoder.safetensors"
        save_file(state, path)
    erased, changed = check(path, "text_encoder", original, theirs)
    assert changed.keys() == {part}
    ours, before = erased.text(PROMPTS), original.family.text(PROMPTS)
    same = torch.equal(ours.embeds, before.embeds) and (ours.pooled is None or torch.equal(ours.pooled, before.pooled))
    assert not same


def test_one_file_of_several_networks(originals: dict[str, Original], tmp_path: Path) -> None:
    original = originals["sdxl"]
    theirs = original.make()
    key = esd_names(theirs.unet)[0]
    state = {f"unet.{key}": theirs.unet.state_dict()[key] + 1}
    theirs.unet.load_state_dict({key: state[f"unet.{key}"]}, strict=False)
    noised(theirs.text_encoder_2, 0.5)
    state |= {f"text_encoder_2.{name}": one for name, one in theirs.text_encoder_2.state_dict().items()}
    path = tmp_path / "both.safetensors"
    save_file(state, path)
    _, changed = check(path, "denoiser", original, theirs)
    assert changed == {"unet": 1, "text_encoder_2": len(theirs.text_encoder_2.state_dict())}
    refused(rf"^{path} holds text_encoder_2\..*, and model .* has no text_encoder_2", path, originals["sd"].folder)


def test_a_setting_of_a_text_encoder_that_is_of_another_type_is_one_line(sd: Original, tmp_path: Path) -> None:
    sd.make().text_encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": None}))
    refused(rf"^{tmp_path} cannot be loaded for model .*'hidden_act'.* expected str, got NoneType", tmp_path, sd.folder)


def test_the_settings_of_a_text_encoder_come_with_its_folder(sd: Original, tmp_path: Path) -> None:
    theirs = sd.make()
    theirs.text_encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    theirs.text_encoder = type(theirs.text_encoder).from_pretrained(tmp_path)
    erased = find_artefact(str(tmp_path)).load(str(sd.folder))
    assert np.abs(draws(erased) - drawn(theirs)).max() <= 1
    assert not torch.equal(erased.text(PROMPTS).embeds, sd.family.text(PROMPTS).embeds)


def test_a_text_encoder_that_does_not_fit_is_refused(originals: dict[str, Original], tmp_path: Path) -> None:
    sd, folder = originals["sd"], tmp_path / "folder"
    sd.make().text_encoder.save_pretrained(folder)
    weights = folder / "model.safetensors"
    state = load_file(weights)
    key = next(key for key in state if "token_embedding" in key)
    nowhere = r"holds weights of no text encoder of the original \(not of text_encoder: "
    refused(rf"^{weights} {nowhere}embeddings\..*; not of text_encoder_2: ", weights, originals["flux"].folder)
    refused(rf"^{folder} {nowhere}", folder, originals["sdxl"].folder)
    save_file({one: tensor for one, tensor in state.items() if one != key}, weights)
    refused(rf"^{folder} lacks .*token_embedding", folder, sd.folder)
    save_file({**state, "encoder.layers.0.stray": torch.ones(2)}, weights)
    refused(rf"{nowhere}encoder\.layers\.0\.stray", folder, sd.folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    refused(r"config\.json is that of a bert, neither of a denoiser nor of a text encoder", folder)
    (folder / "config.json").write_text("{")
    refused(r"config\.json cannot be read as JSON", folder)


# --- whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DENOISERS)
def test_a_whole_folder(originals: dict[str, Original], tmp_path: Path, kind: str) -> None:
    original = originals[kind]
    theirs = original.make()
    noised(getattr(theirs, original.part), 0.3)
    theirs.save_pretrained(tmp_path / kind)
    _, changed = check(tmp_path / kind, "model", original, theirs)
    assert changed.keys() == {original.part}
    other = originals["sdxl" if kind != "sdxl" else "sd"].folder
    refused(rf"^{tmp_path / kind} is a \w+Pipeline, but the original .* is a \w+", tmp_path / kind, other)


def test_a_whole_checkpoint_and_one_of_which_it_was_made(sd: Original, tmp_path: Path) -> None:
    theirs = sd.make()
    before, after = tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    save_file(single_file(theirs), before)
    noised(theirs.unet, 0.3)
    save_file(single_file(theirs), after)
    found, wanted = find_artefact(str(after)), drawn(theirs)
    assert found.kind == "model"
    settings = {"config": str(sd.folder)}
    assert np.abs(draws(found.load(str(sd.folder))) - wanted).max() <= 1
    assert np.abs(draws(found.load(str(before), **settings)) - wanted).max() <= 1
    # A part of the weights goes with a checkpoint as the original too.
    save_file({f"unet.{key}": one for key, one in theirs.unet.state_dict().items()}, tmp_path / "unet.safetensors")
    erased = find_artefact(str(tmp_path / "unet.safetensors")).load(str(before), **settings)
    assert np.abs(draws(erased) - wanted).max() <= 1


def test_what_else_differs_in_a_folder_is_told(originals: dict[str, Original], tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    sd = originals["sd"]
    theirs = sd.make()
    noised(theirs.vae, 0.1)
    own = theirs.scheduler
    theirs.scheduler = DDIMScheduler.from_config(own.config)
    theirs.save_pretrained(tmp_path / "one")
    _, told = differences(sd.family, find_artefact(str(tmp_path / "one")).load(str(sd.folder)), name="it")
    assert told == (
        f"it has another VAE than {str(sd.folder)!r}: images differ by that too",
        "it: it samples with DDIMScheduler, the original with PNDMScheduler: images differ by that too",
    )
    theirs.scheduler = type(own).from_config({**own.config, "beta_end": 0.02})
    theirs.save_pretrained(tmp_path / "two")
    _, told = differences(sd.family, load_family(str(tmp_path / "two")), name="it")
    assert "it: its scheduler has beta_end = 0.02, the original's 0.012: images differ by that too" in told
    with pytest.raises(
        UserError, match=r"it: only one of it and .* has a text_encoder_2; give the model that was erased"
    ):
        differences(originals["sdxl"].family, sd.family, name="it")


def test_the_embedded_reference_is_an_artefact_too() -> None:
    found = find_artefact("toybox-never-fire")
    assert (found.kind, found.source, found.droppable) == ("model", "toybox-never-fire", False)
    assert len(found.digest) == 64 and found.digest != find_artefact("toybox").digest
    changed, _ = differences(load_family("toybox"), found.load("toybox"), name="it")
    assert changed["unet"]


# --- ours -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "droppable"), [("lora", True), ("weights", False)])
def test_a_delta_of_ours_is_attached(sd: Original, tmp_path: Path, form: str, droppable: bool) -> None:
    layer = esd_names(sd.family.denoiser)[0].removesuffix(".weight")
    into = sd.family.denoiser.get_submodule(layer).weight.detach()
    tensors = (
        {f"{layer}.lora_A.weight": torch.ones(1, into.shape[1]), f"{layer}.lora_B.weight": torch.ones(len(into), 1)}
        if form == "lora"
        else {f"{layer}.weight.diff": torch.ones_like(into)}
    )
    Delta(kind=form, component="unet", tensors=tensors, record={"model": "x"}).save(tmp_path / "delta.safetensors")
    for path in (tmp_path, tmp_path / "delta.safetensors"):
        found = find_artefact(str(path))
        assert (found.kind, found.form, found.droppable) == ("delta", form, droppable)
        assert found.path == str(path) and found.delta().kind == form
    with pytest.raises(ValueError, match="attach it to the original"):
        found.load(str(sd.folder))
    with pytest.raises(ValueError, match="is no delta but a lora"):
        Artefact(kind="lora", path="x", source="x", digest="x").delta()


def test_a_run_folder_gives_its_finished_erasure(tmp_path: Path) -> None:
    from duo.rundir import digest

    (tmp_path / "run.json").write_text("{}")
    refused(r"erase is not finished; run `duo erase` first", tmp_path)
    file = tmp_path / "erase" / "delta.safetensors"
    write_tensors(file, {"unet.x.lora_A.weight": torch.ones(1, 1)}, {"schema": 1, "kind": "gated"})
    (tmp_path / "erase" / "manifest.json").write_text(json.dumps({"config": {}, "digest": digest(file)}))
    found = find_artefact(str(tmp_path))
    assert (found.kind, found.form, found.digest, found.droppable) == ("delta", "gated", digest(file), True)
    file.write_bytes(file.read_bytes() + b" ")
    refused(r"is not what its stage wrote", tmp_path)


# --- what is none ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth"])
def test_pickles_are_never_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"esd{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(rf"^{path} is a pickle, which can run code and is not read; convert it .*save_file", path)
    (tmp_path / "config.json").write_text('{"model_type": "clip_text_model"}')
    refused(rf"^{path} is a pickle", tmp_path)


def test_what_is_none_of_them_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(r"empty holds no \.safetensors file and no model_index\.json; give a delta", tmp_path / "empty")
    (tmp_path / "x.png").write_bytes(b"x")
    refused(r"x\.png is no \.safetensors file; give", tmp_path / "x.png")
    refused(r"^'no such thing' is neither a file nor a folder here, nor a hub id", "no such thing")
    refused(r"^'' is neither", "")
    for name in ("a", "b"):
        save_file({"down_blocks.x": torch.ones(1)}, tmp_path / "empty" / f"{name}.safetensors")
    refused(r"holds several files of weights \(a\.safetensors, b\.safetensors\); give one", tmp_path / "empty")


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The snapshot of a model repository in an offline hub cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder, commit = tmp_path / "models--some--erased", "0123456789" * 4
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


def test_parts_of_the_hub(sd: Original, cached: Path) -> None:
    key = esd_names(sd.family.denoiser)[0]
    save_file({key: sd.family.denoiser.state_dict()[key] + 1}, cached / "esd.safetensors")
    sd.make().text_encoder.save_pretrained(cached / "fire_unlearned")
    (cached / "pickled").mkdir()
    (cached / "pickled" / "config.json").write_text('{"model_type": "clip_text_model"}')
    (cached / "pickled" / "pytorch_model.bin").write_bytes(b"")
    for path, kind in (
        ("some/erased", "denoiser"),
        ("hub:some/erased/esd.safetensors", "denoiser"),
        ("hub:some/erased/fire_unlearned", "text_encoder"),
        ("hub:some/erased/fire_unlearned/model.safetensors", "text_encoder"),
    ):
        found = find_artefact(path)
        assert (found.kind, found.path) == (kind, path)
        assert found.load(str(sd.folder)).name == path
    refused(r"^hub:some/erased/pickled/pytorch_model\.bin is a pickle", "hub:some/erased/pickled")
    refused(r"^hub:some/erased/pickled/pytorch_model\.bin is a pickle", "hub:some/erased/pickled/pytorch_model.bin")
    refused(r"some/erased has no such file or folder; it has .*esd\.safetensors", "hub:some/erased/none")
    refused(r"^'some/other' is neither a folder nor an erasure that the hub client can get", "some/other")
    refused(r"is no place on the hub", "hub:some")
    (cached / "esd.safetensors").unlink()
    refused(r"^some/erased holds no \.safetensors .*; give a part of it, hub:some/erased/PATH", "some/erased")


def test_a_whole_model_of_the_hub(sd: Original, cached: Path) -> None:
    shutil.copytree(sd.folder, cached, dirs_exist_ok=True)
    found = find_artefact("some/erased")
    assert (found.kind, found.source, found.digest) == ("model", "some/erased", cached.name)
    _, told = differences(sd.family, found.load(str(sd.folder)), name="some/erased")
    assert told == (f"some/erased changes nothing: all its weights are those of {str(sd.folder)!r}",)
    (cached / "within").mkdir()
    (cached / "within" / "model_index.json").write_text("{}")
    refused(r"diffusers folder within a repository", "hub:some/erased/within")
