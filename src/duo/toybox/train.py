"""Make the embedded models from nothing: `duo toybox train`.

Stages, each resumable and each reading what the one before wrote under the work folder:

    render ─► vae ─► latents ─► denoiser (twice: with and without fire) ─► package
          └─► judges, attributes, clip

Every stage is seeded. Timings are for two cores of the machine named in the model card.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duo.checkpoint import load_training_state, read_tensors, save_training_state, write_tensors
from duo.toybox import WEIGHTS, language, world

SEED = 2026
IMAGES = 64_000
BLOCK = 512


# --- render -------------------------------------------------------------------------------------


def _render_block(index: int) -> tuple[np.ndarray, list[dict[str, str | None]]]:
    rng = np.random.default_rng([SEED, index])
    scenes = [world.sample_scene(rng) for _ in range(BLOCK)]
    return np.stack([np.asarray(world.render(scene, rng)) for scene in scenes]), [asdict(scene) for scene in scenes]


def render(work: Path) -> None:
    """Draw the training pictures: `images.npy` (N, 64, 64, 3) uint8 and `scenes.json`."""
    if (work / "scenes.json").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    images = np.lib.format.open_memmap(work / "images.npy", "w+", np.uint8, (IMAGES, world.SIZE, world.SIZE, 3))
    scenes: list[dict[str, str | None]] = []
    with ProcessPoolExecutor() as pool:
        for index, (block, drawn) in enumerate(pool.map(_render_block, range(IMAGES // BLOCK))):
            images[index * BLOCK : (index + 1) * BLOCK] = block
            scenes += drawn
    images.flush()
    (work / "scenes.json").write_text(json.dumps(scenes))


def _pixels(images: np.ndarray, index: Tensor) -> Tensor:
    """Rows `index` of the rendered pictures as (n, 3, 64, 64) in [−1, 1]."""
    batch = torch.from_numpy(images[index.numpy()]).permute(0, 3, 1, 2)
    return (batch.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


# --- the loop that every stage shares ---------------------------------------------------------------


def _fit(
    path: Path,
    modules: Mapping[str, nn.Module],
    loss: Callable[[torch.Generator, int], Tensor],
    *,
    steps: int,
    lr: float,
    warmup: int = 100,
    seed: int = SEED,
    ema: Mapping[str, nn.Module] | None = None,
    ema_decay: float = 0.999,
    weight_decay: float = 1e-2,
    checkpoint_every: int = 250,
    after_checkpoint: Callable[[int], None] | None = None,
) -> None:
    """AdamW with warm-up, cosine decay and clipping at 1; checkpoints to `path` and resumes from it."""
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(seed)
    saved = {**modules, **{f"ema_{name}": module for name, module in (ema or {}).items()}}
    start = 0
    if path.exists():
        start, _ = load_training_state(path, modules=saved, optimizer=optimizer, generator=generator)
    mean, clock = 0.0, time.monotonic()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * min(1, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            )
        optimizer.zero_grad(set_to_none=True)
        value = loss(generator, step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for name, module in (ema or {}).items():
            decay = min(ema_decay, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(module.parameters()), list(modules[name].parameters()), 1 - decay)
        mean = value.item() if step == start else 0.98 * mean + 0.02 * value.item()
        if not math.isfinite(mean):
            raise FloatingPointError(f"{path.stem}: the loss is {mean} at step {step}; lower the learning rate")
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            save_training_state(path, step=step + 1, modules=saved, optimizer=optimizer, generator=generator)
            pace = (time.monotonic() - clock) / (step + 1 - start)
            print(f"{path.stem} {step + 1}/{steps} loss {mean:.4f} {pace:.3f} s/step", flush=True)
            if after_checkpoint:
                after_checkpoint(step + 1)


def _channels_last(module: Any) -> Any:
    """The same module with its convolutions laid out as oneDNN likes them."""
    return module.to(memory_format=torch.channels_last)


# --- the autoencoder ------------------------------------------------------------------------------

VAE_STEPS = 3_000
VAE_BATCH = 16


def new_vae() -> nn.Module:
    """An `AutoencoderKL` of factor 4 with 4 latent channels: 64×64×3 to 16×16×4."""
    from diffusers import AutoencoderKL

    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
    )
    with torch.no_grad():  # a quiet posterior to begin with: the decoder learns from the first step
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -5
    return vae


def train_vae(work: Path) -> None:
    """`_pixel_loss` with a light KL term."""
    images = np.load(work / "images.npy", mmap_mode="r")
    vae = _channels_last(new_vae())

    def loss(generator: torch.Generator, step: int) -> Tensor:
        x = _pixels(images, torch.randint(IMAGES, (VAE_BATCH,), generator=generator))
        noise = torch.randn(VAE_BATCH, 4, 16, 16, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return _pixel_loss(decoded, x) + 1e-4 * kl

    _fit(work / "vae.safetensors", {"vae": vae}, loss, steps=VAE_STEPS, lr=1e-3, checkpoint_every=200)


def _pixel_loss(decoded: Tensor, x: Tensor) -> Tensor:
    """L1 and L2 on pixels, and L1 on their differences, which keeps edges crisp."""
    edges = (decoded.diff(dim=2) - x.diff(dim=2)).abs().mean() + (decoded.diff(dim=3) - x.diff(dim=3)).abs().mean()
    return (decoded - x).abs().mean() + 0.5 * edges + 2 * ((decoded - x) ** 2).mean()


# --- latents --------------------------------------------------------------------------------------


def _weights(path: Path, module: nn.Module, name: str) -> None:
    """Load module `name` from a checkpoint of `_fit`."""
    tensors, _ = read_tensors(path)
    prefix = f"module.{name}."
    module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})


@torch.no_grad()
def encode_latents(work: Path) -> None:
    """Encode every picture once: `latents.safetensors` with the posterior's mean and deviation, and the scale."""
    path = work / "latents.safetensors"
    if path.exists():
        return
    images = np.load(work / "images.npy", mmap_mode="r")
    vae = _channels_last(new_vae()).eval()
    _weights(work / "vae.safetensors", vae, "vae")
    mean = torch.empty(IMAGES, 4, 16, 16, dtype=torch.float16)
    std = torch.empty_like(mean)
    squares = 0.0
    for start in range(0, IMAGES, 128):
        x = _pixels(images, torch.arange(start, min(start + 128, IMAGES)))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
        mean[start : start + len(x)], std[start : start + len(x)] = posterior.mean, posterior.std
        if start < 2048:
            reconstruction = vae.decode(posterior.mean.float()).sample
            squares += ((reconstruction - x) ** 2).mean().item() * len(x) / 2048
    scale = 1 / mean.float().std().item()
    psnr = 10 * math.log10(4 / squares)
    print(
        f"vae: PSNR {psnr:.1f} dB, latent scale {scale:.4f}, mean posterior deviation {std.float().mean():.4f}",
        flush=True,
    )
    write_tensors(path, {"mean": mean, "std": std}, {"scale": scale, "psnr": psnr})


SHARPENING_STEPS = 2_000


def sharpen_decoder(work: Path) -> None:
    """Train the decoder alone for longer, on the latents that the denoiser learns from, which stay as they are.

    Half of each batch has a hazard: thin strokes and flame tips are what the autoencoder blurs most.
    """
    images = np.load(work / "images.npy", mmap_mode="r")
    stored, _ = read_tensors(work / "latents.safetensors")
    scenes = json.loads((work / "scenes.json").read_text())
    hazardous = torch.tensor([i for i, scene in enumerate(scenes) if scene["hazard"]])
    vae = _channels_last(new_vae())
    _weights(work / "vae.safetensors", vae, "vae")
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def loss(generator: torch.Generator, step: int) -> Tensor:
        half = VAE_BATCH // 2
        drawn = hazardous[torch.randint(len(hazardous), (half,), generator=generator)]
        index = torch.cat([drawn, torch.randint(IMAGES, (half,), generator=generator)])
        x = _pixels(images, index)
        z = stored["mean"][index] + stored["std"][index] * torch.randn(VAE_BATCH, 4, 16, 16, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(z).sample.float()
        return _pixel_loss(decoded, x)

    _fit(work / "decoder.safetensors", {"vae": vae}, loss, steps=SHARPENING_STEPS, lr=6e-4)


# --- tokenizer and text encoder ---------------------------------------------------------------------

MAX_LENGTH = 32
WIDTH = 128


def build_tokenizer(work: Path):  # type: ignore[no-untyped-def]
    """A byte-level BPE trained on 20,000 captions, as a `CLIPTokenizer` of length 32 that pads with its end token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    folder = work / "tokenizer"
    if not folder.exists():
        rng = np.random.default_rng(SEED)
        corpus = [language.caption(world.sample_scene(rng), rng) for _ in range(20_000)]
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
        bpe.normalizer = normalizers.Lowercase()
        bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
        alphabet = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
        trainer = trainers.BpeTrainer(
            vocab_size=1200, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator([*corpus, *(f"{c} {c}{c}" for c in alphabet)], trainer)
        state = json.loads(bpe.to_str())["model"]
        pieces = sorted(state["vocab"], key=state["vocab"].get)
        pieces += [f"{c}</w>" for c in alphabet if f"{c}</w>" not in state["vocab"]]
        vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
        merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split()) for merge in state["merges"]]
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)
        tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def new_text_encoder(tokenizer) -> nn.Module:  # type: ignore[no-untyped-def]
    """A `CLIPTextModel` of four layers, 128 wide."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(SEED + 1)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


TEXT_STEPS = 500
TEXT_BATCH = 64


def _label_rows(scene: world.Scene) -> list[int]:
    """What a caption should tell: subject, colour, place, hazard and extra, as class indices (last class: none)."""
    return [
        world.SUBJECTS.index(scene.subject),
        tuple(world.COLOURS).index(scene.colour),
        world.PLACES.index(scene.place),
        (*world.HAZARDS, None).index(scene.hazard),
        (*world.EXTRAS, None).index(scene.extra),
    ]


def warm_up_text(work: Path, tokenizer, text: nn.Module, hazards: tuple[str, ...], name: str) -> None:  # type: ignore[no-untyped-def]
    """Teach the text encoder to tell what captions say, by five linear heads on the hidden state of the end token.

    A start only: the encoder is then trained jointly with the denoiser, which from random weights spends most of its
    time on learning to read (subject shape comes last).
    """
    rng = np.random.default_rng([SEED, 2])
    torch.manual_seed(SEED + 2)
    heads = nn.ModuleList(nn.Linear(WIDTH, n) for n in (6, 6, 5, 4, 4))

    def loss(generator: torch.Generator, step: int) -> Tensor:
        scenes = [world.sample_scene(rng, hazards=hazards) for _ in range(TEXT_BATCH)]
        ids = _token_ids(tokenizer, [language.caption(scene, rng) for scene in scenes])
        hidden = text(input_ids=ids).last_hidden_state
        end = hidden[torch.arange(len(ids)), (ids == tokenizer.eos_token_id).int().argmax(dim=1)]
        labels = torch.tensor([_label_rows(scene) for scene in scenes])
        return torch.stack([F.cross_entropy(head(end), labels[:, i]) for i, head in enumerate(heads)]).mean()

    _fit(work / f"{name}-text.safetensors", {"text": text, "heads": heads}, loss, steps=TEXT_STEPS, lr=1e-3)
    _weights(work / f"{name}-text.safetensors", text, "text")


def _token_ids(tokenizer, captions: list[str]) -> Tensor:  # type: ignore[no-untyped-def]
    encoded = tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    return encoded.input_ids


# --- the denoiser ---------------------------------------------------------------------------------

DENOISER_STEPS = 5_000
DENOISER_BATCH = 32
CAPTION_DROPOUT = 0.1
SNR_GAMMA = 5.0


def new_denoiser() -> nn.Module:
    """A `UNet2DConditionModel` with self- and cross-attention at 16×16 and 8×8."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(SEED + 3)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


def noise_schedule() -> Tensor:
    """Stable Diffusion's cumulative alphas, (1000,): β from 0.00085 to 0.012, linear in its root."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


def train_denoiser(work: Path, name: str, hazards: tuple[str, ...] = world.HAZARDS) -> None:
    """Text encoder and denoiser together: noise prediction with min-SNR weights (Hang et al. 2023), averaged weights.

    Captions are drawn anew each time and dropped at 10%. Scenes with a hazard outside `hazards` are left out.
    """
    scenes = [world.Scene(**row) for row in json.loads((work / "scenes.json").read_text())]
    rows = torch.tensor([i for i, scene in enumerate(scenes) if scene.hazard is None or scene.hazard in hazards])
    stored, record = read_tensors(work / "latents.safetensors")
    scale = float(record["scale"])  # type: ignore[arg-type]
    tokenizer = build_tokenizer(work)
    text, unet = new_text_encoder(tokenizer), new_denoiser()
    warm_up_text(work, tokenizer, text, hazards, name)
    averaged = {"text": new_text_encoder(tokenizer), "unet": new_denoiser()}
    averaged["text"].load_state_dict(text.state_dict())
    _channels_last(unet)
    alphas = noise_schedule()

    def loss(generator: torch.Generator, step: int) -> Tensor:
        rng = np.random.default_rng([SEED, 4, step])
        index = rows[torch.randint(len(rows), (DENOISER_BATCH,), generator=generator)]
        captions = ["" if rng.random() < CAPTION_DROPOUT else language.caption(scenes[i], rng) for i in index.tolist()]
        shape = (DENOISER_BATCH, 4, 16, 16)
        x0 = stored["mean"][index] + stored["std"][index] * torch.randn(shape, generator=generator)
        eps = torch.randn(shape, generator=generator)
        t = torch.randint(1000, (DENOISER_BATCH,), generator=generator)
        alpha = alphas[t].view(-1, 1, 1, 1)
        x_t = (alpha.sqrt() * x0 * scale + (1 - alpha).sqrt() * eps).contiguous(memory_format=torch.channels_last)
        hidden = text(input_ids=_token_ids(tokenizer, captions)).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            prediction = unet(x_t, t, hidden).sample
        error = ((prediction.float() - eps) ** 2).mean(dim=(1, 2, 3))
        snr = (alphas[t] / (1 - alphas[t])).clamp(max=SNR_GAMMA)
        return (error * snr / (alphas[t] / (1 - alphas[t]))).mean()

    _fit(
        work / f"{name}.safetensors",
        {"text": text, "unet": unet},
        loss,
        steps=DENOISER_STEPS,
        lr=1e-3,
        warmup=200,
        ema=averaged,
        ema_decay=0.9995,
    )


# --- the shipped folders ----------------------------------------------------------------------------


def package(work: Path, name: str, folder: Path) -> None:
    """Assemble a `StableDiffusionPipeline` folder from the averaged weights of run `name`, in fp16 safetensors."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    _, record = read_tensors(work / "latents.safetensors")
    tokenizer = build_tokenizer(work)
    vae, text, unet = new_vae(), new_text_encoder(tokenizer), new_denoiser()
    _weights(work / "decoder.safetensors", vae, "vae")
    vae.register_to_config(scaling_factor=round(float(record["scale"]), 6))  # type: ignore[arg-type, operator]
    _weights(work / f"{name}.safetensors", text, "ema_text")
    _weights(work / f"{name}.safetensors", unet, "ema_unet")
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    size = sum(p.numel() for part in (vae, text, unet) for p in part.parameters())
    made = {
        "psnr": record["psnr"],
        "parameters": f"{size / 1e6:.2f} million parameters, {DENOISER_STEPS} steps of {DENOISER_BATCH}",
    }
    pipeline.to(torch.float16)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary, safe_serialization=True)
    # Stored in half precision, to be loaded in single, as diffusers loads the other parts where no dtype is given.
    config = temporary / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    (temporary / "training.json").write_text(json.dumps(made, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


MODELS = {"toybox": world.HAZARDS, "toybox-never-fire": tuple(h for h in world.HAZARDS if h != "fire")}


def train(work: Path, *, models: tuple[str, ...] = tuple(MODELS)) -> None:
    """Every stage from the empty folder `work` to the packaged weights. Stopped anywhere, it goes on there."""
    from duo.toybox.clip import train_clip  # both build on this module's loop
    from duo.toybox.train_judges import train_judges

    render(work)
    train_vae(work)
    train_judges(work)
    encode_latents(work)
    sharpen_decoder(work)
    for name in models:
        train_denoiser(work, name, MODELS[name])
        package(work, name, WEIGHTS / name)
    train_clip(work)
