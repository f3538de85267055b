"""A model given as one checkpoint file: tiny models under the names that their authors' code gives the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from duo.errors import UserError
from duo.models import load_family
from duo.plugins import Sampling
from tiny_flow import flux_pipeline, sd3_pipeline
from tiny_single_file import EVERYTHING, single_file
from tiny_unet import sd2_v_pipeline, sdxl_pipeline

SHORT = Sampling(num_inference_steps=2, guidance_scale=3.0)


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def checkpoint(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    make_tiny_pipeline: Any,
    vocabulary: Path,
    tiny_folder: Path,
    tiny_sd2_v_folder: Path,
    tiny_sdxl_folder: Path,
) -> tuple[Path, Path]:
    """A checkpoint and the diffusers folder of the same model."""
    pipeline, folder = {
        "sd1": (make_tiny_pipeline, tiny_folder),
        "sd2": (lambda: sd2_v_pipeline(vocabulary), tiny_sd2_v_folder),
        "sdxl": (lambda: sdxl_pipeline(vocabulary), tiny_sdxl_folder),
    }[request.param]
    return write(tmp_path / "one.safetensors", single_file(pipeline())), folder


@pytest.fixture
def sd1(tmp_path: Path, make_tiny_pipeline: Any) -> Path:
    return write(tmp_path / "one.safetensors", single_file(make_tiny_pipeline()))


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path)
    return path


def settings_of(folder: Path, out: Path) -> Path:
    """The folder without its weights."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    return out


def narrow_torch() -> SimpleNamespace:
    """torch for diffusers' converter of FLUX, which splits the single blocks' first layer as a width of 3072 asks."""

    def split(tensor: torch.Tensor, sizes: tuple[int, ...], dim: int) -> tuple[torch.Tensor, ...]:
        return torch.split(tensor, [len(tensor) * size // sum(sizes) for size in sizes], dim=dim)

    return SimpleNamespace(**{**vars(torch), "split": split})


def refused(match: str, *arguments: Any, **named: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_family(*arguments, **named)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_draws_what_its_folder_draws(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    path, folder = checkpoint
    single = load_family(str(path), config=str(settings_of(folder, tmp_path / "settings")))
    whole = load_family(str(folder))
    assert type(single) is type(whole) and single.name == str(path)
    ours, wanted = (
        np.asarray(model.generate(["a red house"], seeds=[1], sampling=SHORT)[0], dtype=np.int16)
        for model in (single, whole)
    )
    assert np.abs(ours - wanted).max() <= 1
    single.save(tmp_path / "saved")
    assert type(load_family(str(tmp_path / "saved"))) is type(whole)


# What the published files of SD3 (all, or without text encoders) and FLUX hold.
@pytest.mark.parametrize(
    ("make", "parts"),
    [(sd3_pipeline, EVERYTHING), (sd3_pipeline, ("transformer", "vae")), (flux_pipeline, ("transformer",))],
    ids=["sd3", "sd3 without encoders", "flux"],
)
def test_what_a_checkpoint_of_a_transformer_lacks_comes_from_the_settings(
    vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, parts: tuple[str, ...]
) -> None:
    monkeypatch.setattr(single_file_utils, "torch", narrow_torch())
    pipeline = make(vocabulary)
    pipeline.save_pretrained(tmp_path / "settings")
    whole = load_family(str(tmp_path / "settings"))
    path = write(tmp_path / "one.safetensors", single_file(pipeline, parts=parts))
    for part in parts:
        (weights,) = (tmp_path / "settings" / part).glob("*.safetensors")
        weights.unlink()
    single = load_family(str(path), config=str(tmp_path / "settings"))
    assert type(single) is type(whole)
    for (name, tensor), (other, wanted) in zip(
        single.denoiser.state_dict().items(), whole.denoiser.state_dict().items(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=0)
    ours, wanted = (
        np.asarray(model.generate(["a red house"], seeds=[1], sampling=SHORT)[0], dtype=np.int16)
        for model in (single, whole)
    )
    assert np.abs(ours - wanted).max() <= 1


def test_settings_that_are_not_at_hand_are_one_line(sd1: Path) -> None:
    refused(r"settings of 'stable-diffusion-v1-5/.*cannot be read.*give model_config = ", str(sd1))
    refused("'nobody/nothing' is neither a folder", str(sd1), config="nobody/nothing")


def test_settings_of_another_kind_are_refused(sd1: Path, tiny_sdxl_folder: Path) -> None:
    refused(
        "is a StableDiffusionXLPipeline, but .* is a StableDiffusionPipeline", str(sd1), config=str(tiny_sdxl_folder)
    )


def test_settings_are_for_checkpoints_alone(tiny_folder: Path) -> None:
    refused("model_config = .* is for a single checkpoint", str(tiny_folder), config=str(tiny_folder))


def test_an_sd2_checkpoint_does_not_tell_what_it_predicts(tmp_path: Path, vocabulary: Path) -> None:
    path = write(tmp_path / "two.safetensors", single_file(sd2_v_pipeline(vocabulary)))
    refused("do not tell whether it predicts ε or v; give model_config", str(path))


def test_a_checkpoint_marked_as_v_prediction_needs_such_settings(
    tmp_path: Path, make_tiny_pipeline: Any, tiny_folder: Path
) -> None:
    path = write(tmp_path / "v.safetensors", {**single_file(make_tiny_pipeline()), "v_pred": torch.zeros(0)})
    refused("predicts v .* say 'epsilon'; give model_config", str(path), config=str(tiny_folder))
    other = tmp_path / "settings"
    shutil.copytree(tiny_folder, other)
    scheduler = other / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "v_prediction"}))
    loaded: Any = load_family(str(path), config=str(other))
    assert loaded.process.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("part", "lacking"),
    [
        ("unet", "model.diffusion_model.out.2.weight"),
        ("vae", "first_stage_model.decoder.conv_out.weight"),
        ("text_encoder", "cond_stage_model.transformer.text_model.final_layer_norm.weight"),
    ],
)
def test_the_part_that_lacks_a_weight_is_named(sd1: Path, tiny_folder: Path, part: str, lacking: str) -> None:
    tensors = load_file(sd1)
    del tensors[lacking]
    save_file(tensors, sd1)
    refused(rf"the weights of {part} (lack .*|are not all in the file); restore", str(sd1), config=str(tiny_folder))


def test_a_denoiser_that_is_not_all_there_is_named(
    tmp_path: Path, sd1: Path, tiny_folder: Path, vocabulary: Path
) -> None:
    tensors = {name: one for name, one in load_file(sd1).items() if not name.startswith("model.diffusion_model.")}
    path = write(tmp_path / "no-unet.safetensors", tensors)
    refused("the weights of unet are not all in the file; restore it", str(path), config=str(tiny_folder))
    pipeline = sd3_pipeline(vocabulary)
    pipeline.save_pretrained(tmp_path / "sd3")
    tensors = single_file(pipeline, parts=("transformer", "vae"))
    del tensors["model.diffusion_model.x_embedder.proj.weight"]
    path = write(tmp_path / "gap.safetensors", tensors)
    refused("the weights of transformer are not all in the file", str(path), config=str(tmp_path / "sd3"))


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth"])
def test_pickles_are_refused_and_not_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"not even a pickle")
    refused(r"is a pickle, which can run code and is not read; convert it .*from_single_file", str(path))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, sd1: Path) -> None:
    refused("holds the keys of no checkpoint", str(write(tmp_path / "a.safetensors", {"x.lora_A": torch.zeros(1)})))
    (tmp_path / "b.safetensors").write_bytes(b"no weights")
    refused(r"b\.safetensors cannot be read as a \.safetensors checkpoint", str(tmp_path / "b.safetensors"))
    inpainting = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}
    refused("its U-Net takes 9 channels, expected 4", str(write(tmp_path / "c.safetensors", inpainting)))
