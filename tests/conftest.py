"""A tiny model of the real classes, with random weights: everything that the large ones do, in milliseconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach for the network
os.environ["DUO_CACHE"] = ""  # nor for what other runs have left
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is: tiny tensors only wait for each other's threads

import pytest

from tiny_flow import WORDS


def _write_vocabulary(folder: Path) -> None:
    """A byte-level BPE over a few captions, in CLIP's two files."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Every byte may also end a word. Named beforehand, for the trainer numbers what it meets itself in no fixed order,
    # and breaks ties by these numbers: the tiny models would differ from one session to the next.
    endings = [f"{letter}</w>" for letter in letters]
    trainer = trainers.BpeTrainer(
        vocab_size=3 * len(letters) + 30,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>", *endings],
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 8, trainer)
    tokenizer.model.save(str(folder))


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two files of the tiny CLIP tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("vocabulary")
    _write_vocabulary(folder)
    return folder


@pytest.fixture(scope="session")
def make_tiny_pipeline(vocabulary: Path) -> Callable[[], object]:
    """A function that builds the same tiny `StableDiffusionPipeline` anew: 64×64 images, 16×16×4 latents."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    def make() -> StableDiffusionPipeline:
        tokenizer = CLIPTokenizer.from_pretrained(vocabulary, model_max_length=24)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = UNet2DConditionModel(
                sample_size=16,
                in_channels=4,
                out_channels=4,
                down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                block_out_channels=(16, 32),
                layers_per_block=1,
                norm_num_groups=8,
                attention_head_dim=2,
                cross_attention_dim=32,
            )
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(8, 8, 16),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
                sample_size=64,
            )
            text_encoder = CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    max_position_embeddings=24,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            )
            # The initial embeddings are so small that prompts would hardly differ.
            torch.nn.init.normal_(text_encoder.get_input_embeddings().weight)
        pipeline = StableDiffusionPipeline(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=PNDMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture(scope="session")
def tiny_folder(make_tiny_pipeline: Callable[[], object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as a diffusers folder. Read only."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_pipeline().save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


@pytest.fixture
def tiny_sd(make_tiny_pipeline: Callable[[], object]) -> object:
    """A fresh tiny model as family `Sd`, named "tiny"."""
    from duo.families.sd import Sd

    return Sd(make_tiny_pipeline(), name="tiny")  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def tiny_sd2_v_folder(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 2.x that predicts v, as a diffusers folder. Read only."""
    from tiny_unet import sd2_v_pipeline

    folder = tmp_path_factory.mktemp("model") / "tiny-sd2-v"
    sd2_v_pipeline(vocabulary).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl_folder(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL as a diffusers folder. Read only."""
    from tiny_unet import sdxl_pipeline

    folder = tmp_path_factory.mktemp("model") / "tiny-sdxl"
    sdxl_pipeline(vocabulary).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_sd2_v(vocabulary: Path) -> object:
    """A fresh tiny SD 2.x that predicts v, as family `Sd`."""
    from duo.families.sd import Sd
    from tiny_unet import sd2_v_pipeline

    return Sd(sd2_v_pipeline(vocabulary), name="tiny-sd2-v")


@pytest.fixture
def tiny_sdxl(vocabulary: Path) -> object:
    """A fresh tiny SDXL as family `Sdxl`."""
    from duo.families.sdxl import Sdxl
    from tiny_unet import sdxl_pipeline

    return Sdxl(sdxl_pipeline(vocabulary), name="tiny-sdxl")


@pytest.fixture
def quick_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves of `staged` under their names, beside the real ones."""
    import staged
    from duo import plugins

    load = plugins.load
    monkeypatch.setattr(plugins, "load", lambda kind, name: staged.LEAVES.get((kind, name)) or load(kind, name))
    staged.TextSearch.searched.clear()
    staged.LearnedWord.knew.clear()


@pytest.fixture
def open_session(quick_leaves: None, tmp_path: Path, tiny_sd: Any) -> Any:
    """A function that opens a session in tmp_path/<name>, with overrides."""
    import staged
    from duo.recipe import load_recipe
    from duo.stages import Session

    def open_one(name: str = "run", *overrides: str, concept: str = staged.CONCEPT, more: str = "") -> Session:
        (tmp_path / "fire.toml").write_text(concept)
        (tmp_path / "recipe.toml").write_text(staged.RECIPE + more)
        recipe = load_recipe(tmp_path / "recipe.toml", overrides=overrides)
        return Session(recipe, tmp_path / name, model=tiny_sd)

    return open_one
