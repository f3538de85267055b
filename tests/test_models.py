from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from duo.errors import UserError
from duo.models import load_family, title, written_out


def test_a_folder_is_loaded_by_its_pipeline_class(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_family(str(tiny_folder), device="cpu")
    assert type(model).__name__ == "Sd"
    assert model.name == str(tiny_folder)
    assert next(model.denoiser.parameters()).dtype == torch.float32
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "it/s" not in shown.err


def test_pickled_weights_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder, folder)
    unet = folder / "unet"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, unet / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"unet holds no \.safetensors weights"):
        load_family(str(folder), device="cpu")


def test_damaged_weights_are_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_family(str(folder), device="cpu")
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(tiny_folder, folder)
    name = "diffusion_pytorch_model.safetensors"
    shutil.copy(folder / "vae" / name, folder / "unet" / name)
    with pytest.raises(UserError, match="the weights of unet lack"):
        load_family(str(folder), device="cpu")


def test_a_text_encoder_is_not_filled_up_with_random_weights(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gaps"
    shutil.copytree(tiny_folder, folder)
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if name.endswith("token_embedding.weight"))]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"the weights of text_encoder lack .*token_embedding\.weight"):
        load_family(str(folder), device="cpu")


@pytest.mark.parametrize("shards", ["10GB", "40KB"])
def test_a_folder_of_the_fp16_variant_alone_is_read(
    make_tiny_pipeline: Callable[[], Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], shards: str
) -> None:
    pipeline = make_tiny_pipeline()
    wanted = {name: tensor.half().float() for name, tensor in pipeline.unet.state_dict().items()}
    words = pipeline.text_encoder.get_input_embeddings().weight.half().float()
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16", max_shard_size=shards)
    weights = [path.name for path in tmp_path.rglob("*.safetensors")]
    assert all(".fp16" in name for name in weights) and (len(weights) > 3) == (shards == "40KB")
    model = load_family(str(tmp_path / "half"))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.denoiser.state_dict().items())
    assert torch.equal(model.token_embeddings(), words)
    assert "variant" not in capfd.readouterr().err


def test_of_two_variants_the_plain_one_is_read(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(tiny_folder, folder)
    for path in list(folder.rglob("*.safetensors")):
        path.with_suffix(".fp16.safetensors").write_bytes(b"no weights")
    model, plain = load_family(str(folder)), load_family(str(tiny_folder))
    assert torch.equal(model.token_embeddings(), plain.token_embeddings())


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_networks_of_several_variants_are_refused(tiny_folder: Path, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(tiny_folder, folder)
    (path,) = (folder / part).glob("*.safetensors")
    path.rename(path.with_suffix(".fp16.safetensors"))
    with pytest.raises(UserError, match=rf"{part} holds weights of the variant fp16 alone, but .* others") as caught:
        load_family(str(folder))
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dumb"
    shutil.copytree(tiny_folder, folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match="tokenizer holds no tokenizer"):
        load_family(str(folder), device="cpu")


def test_a_class_that_no_family_serves(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(UserError, match=r"is a KandinskyPipeline; supported are .*StableDiffusionPipeline"):
        load_family(str(tmp_path), device="cpu")


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_broken_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(UserError, match="model_index"):
        load_family(str(tmp_path), device="cpu")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a diffusers model: it has no model_index\.json"):
        load_family(str(tmp_path), device="cpu")


@pytest.mark.parametrize("device", ["", "gpu", "cuda:99", "meta", "cpu:3", "mps"])
def test_a_device_that_is_not_there(tiny_folder: Path, device: str) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    with pytest.raises(UserError, match=f"--device {device}: .*give one that this machine has") as caught:
        load_family(str(tiny_folder), device=device)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_names_that_lead_nowhere() -> None:
    with pytest.raises(UserError, match="did you mean 'toybox'"):
        load_family("toybocks", device="cpu")
    with pytest.raises(UserError, match="neither a folder nor a model") as caught:
        load_family("nobody/nothing-here", device="cpu")
    assert "\n" not in str(caught.value)


def changed_index(folder: Path, out: Path, **entries: object) -> str:
    """A copy of a model folder with other entries in its index."""
    shutil.copytree(folder, out)
    index = out / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **entries}))
    return str(out)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer_2", "scheduler"])
def test_a_missing_component_is_named(tiny_sdxl_folder: Path, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "incomplete"
    shutil.copytree(tiny_sdxl_folder, folder)
    shutil.rmtree(folder / part)
    with pytest.raises(UserError, match=f"{part} holds no .*restore") as caught:
        load_family(str(folder))
    assert "\n" not in str(caught.value)


def test_a_component_that_the_index_leaves_out_is_named(tiny_sdxl_folder: Path, tmp_path: Path) -> None:
    folder = changed_index(tiny_sdxl_folder, tmp_path / "null", text_encoder_2=[None, None])
    with pytest.raises(UserError, match=r"model_index\.json names no text_encoder_2; restore the entry"):
        load_family(folder)


@pytest.mark.parametrize("entry", [["diffusers", "FancyScheduler"], ["my_code", "FancyScheduler"]])
def test_an_unknown_class_is_named(tiny_folder: Path, tmp_path: Path, entry: list[str]) -> None:
    folder = changed_index(tiny_folder, tmp_path / "fancy", scheduler=entry)
    with pytest.raises(UserError, match=f"gives scheduler the class {entry[0]}.FancyScheduler, which is unknown here"):
        load_family(folder)


def test_a_class_that_needs_another_package_says_which(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers
    from diffusers.utils.import_utils import DummyObject

    lacking = DummyObject("LackingScheduler", (), {"_backends": ["torch", "not_there"]})
    monkeypatch.setattr(diffusers, "LackingScheduler", lacking, raising=False)
    folder = changed_index(tiny_folder, tmp_path / "lacking", scheduler=["diffusers", "LackingScheduler"])
    with pytest.raises(UserError, match="gives scheduler the class LackingScheduler, which needs not_there"):
        load_family(folder)


@pytest.mark.parametrize(
    ("part", "field", "told"),
    [
        ("scheduler", "num_train_timesteps", "a configuration file of it cannot be used .TypeError"),
        ("unet", "block_out_channels", "cannot be loaded"),
        ("text_encoder", "hidden_size", "cannot be used .Strict.*'hidden_size'.* expected int, got str"),
    ],
)
def test_a_setting_of_another_type_is_one_line(
    tiny_folder: Path, tmp_path: Path, part: str, field: str, told: str
) -> None:
    folder = tmp_path / "typed"
    shutil.copytree(tiny_folder, folder)
    config = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), field: "abc"}))
    with pytest.raises(UserError, match=told) as caught:
        load_family(str(folder))
    assert "\n" not in str(caught.value)


def test_a_package_that_a_loader_lacks_is_one_line(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import PNDMScheduler

    def refuse(*_: object, **__: object) -> None:
        raise ImportError("\nneeds something\nfrom somewhere")

    monkeypatch.setattr(PNDMScheduler, "from_pretrained", refuse)
    with pytest.raises(UserError, match=r"cannot be loaded here: needs something$"):
        load_family(str(tiny_folder))


def test_a_scheduler_of_another_process_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = changed_index(tiny_folder, tmp_path / "flow", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    with pytest.raises(UserError, match=r"a FlowMatchEulerDiscreteScheduler with .* is not supported"):
        load_family(folder)


def test_a_pickled_component_says_how_to_convert(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.bin is a pickle.*use_safetensors=False\)\.save_pretrained") as caught:
        load_family(str(folder))
    assert "\n" not in str(caught.value)


def test_a_path_is_written_out_and_other_names_are_kept(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "m" / "sd1")
    (tmp_path / "blob").touch()
    (tmp_path / "linked.safetensors").symlink_to("blob")
    (tmp_path / "toybox").mkdir()
    for given in ("m/sd1", "m/sd1/", "./m/../m/sd1", str(tmp_path / "m" / "sd1")):
        assert written_out(given) == str(tmp_path / "m" / "sd1")
    assert written_out("linked.safetensors") == str(tmp_path / "linked.safetensors")
    for name in ("toybox", "someone/some-model", ""):
        assert written_out(name) == name
    assert load_family("m/sd1/").name == str(tmp_path / "m" / "sd1")
    assert [title(name) for name in (str(tmp_path / "m" / "sd1"), "toybox", "a/b")] == ["sd1", "toybox", "a/b"]
