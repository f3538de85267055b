"""Stable Diffusion 1.x and any other model of diffusers' `StableDiffusionPipeline` (Rombach et al. 2022)."""

from __future__ import annotations

import inspect
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from duo.conditioning import Conditioning
from duo.errors import UserError, did_you_mean
from duo.plugins import Sampling

# Where the modules of a scope lie in a UNet2DConditionModel. Time embeddings, the 1×1 projections around the
# transformer blocks and the first and last convolution belong to no scope but "all".
SCOPES = {
    "self_attention": re.compile(r"\.attn1\."),
    "cross_attention": re.compile(r"\.attn2\."),
    "attention": re.compile(r"\.attn[12]\."),
    "feed_forward": re.compile(r"\.ff\.net\."),
    "convolutions": re.compile(r"\.(resnets|downsamplers|upsamplers)\.\d+\.conv"),
    "all": re.compile(""),
}
CACHED_PROMPTS = 2048


@dataclass(frozen=True, kw_only=True)
class DdpmProcess:
    """The variance-preserving process of DDPM (Ho et al. 2020, eq. 4) in T discrete steps.

    `alphas_cumprod` is ᾱ, (T,), in float32 on the denoiser's device; times are int64, (n,), 0 the cleanest.
    """

    alphas_cumprod: Tensor
    prediction_type: str

    def sample_t(self, n: int, *, low: float, high: float, generator: torch.Generator) -> Tensor:
        """Draw `n` of the steps low·T … high·T − 1 uniformly."""
        steps = len(self.alphas_cumprod)
        first, end = round(low * steps), round(high * steps)
        if first >= end:
            raise UserError(f"timestep_range: none of the {steps} steps lies between {low} and {high}; widen it")
        t = torch.randint(first, end, (n,), generator=generator, device=generator.device)
        return t.to(self.alphas_cumprod.device)

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """√ᾱ·x0 + √(1 − ᾱ)·eps."""
        signal, noise = self._scales(t, x0)
        return signal * x0 + noise * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the denoiser was trained to predict: ε, or v = √ᾱ·ε − √(1 − ᾱ)·x0 (Salimans & Ho 2022)."""
        if self.prediction_type == "epsilon":
            return eps
        signal, noise = self._scales(t, x0)
        return signal * eps - noise * x0

    def terminal(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Pure noise at step T − 1, not scaled by √(1 − ᾱ): what a sampler is handed first."""
        last = len(self.alphas_cumprod) - 1
        return eps, torch.full((len(eps),), last, device=self.alphas_cumprod.device)

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas_cumprod[t].to(like.dtype).view(-1, *[1] * (like.dim() - 1))
        return alphas.sqrt(), (1 - alphas).sqrt()


class Sd:
    """A `StableDiffusionPipeline` with frozen weights, as `duo.plugins.Family`.

    Images come from diffusers' own pipelines, given encoded prompts; the encoding of learned tokens is written here.
    """

    pipelines: ClassVar[frozenset[str]] = frozenset({"StableDiffusionPipeline"})

    def __init__(self, pipeline: StableDiffusionPipeline, *, name: str) -> None:
        self.name = name
        self.denoiser: nn.Module = pipeline.unet
        self.device = torch.device(pipeline.device)
        self._vae: Any = pipeline.vae
        self._text_encoder: Any = pipeline.text_encoder
        self._tokenizer: Any = pipeline.tokenizer
        self._scheduler: Any = pipeline.scheduler
        self._encoded: OrderedDict[str, Tensor] = OrderedDict()
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False).eval()
        self._images = self._pipeline(StableDiffusionPipeline, None).image_processor
        self.process = self._process()

    @classmethod
    def load(
        cls, path_or_id: str | Path, *, name: str, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> Sd:
        """Read a diffusers folder or hub model, safetensors only; the safety checker is left out."""
        for part in ("unet", "vae", "text_encoder"):
            folder = Path(path_or_id) / part
            if folder.parent.is_dir() and not any(folder.glob("*.safetensors")):
                raise UserError(f"{folder} holds no .safetensors weights; other formats are not read")
        tokenizer = Path(path_or_id) / "tokenizer"
        if tokenizer.parent.is_dir() and not any(tokenizer.glob("*.json")):  # transformers would make an empty one
            raise UserError(f"{tokenizer} holds no tokenizer; restore it")
        try:
            with _quiet():
                # Loaded on its own, for only so does transformers tell which weights it had to make up.
                text_encoder, told = CLIPTextModel.from_pretrained(
                    str(path_or_id),
                    subfolder="text_encoder",
                    dtype=dtype,
                    use_safetensors=True,
                    output_loading_info=True,
                )
                pipeline = StableDiffusionPipeline.from_pretrained(
                    str(path_or_id),
                    text_encoder=text_encoder,
                    dtype=dtype,
                    use_safetensors=True,
                    safety_checker=None,
                    feature_extractor=None,
                    image_encoder=None,
                    requires_safety_checker=False,
                )
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"model {name!r} cannot be loaded as safetensors: {reason}") from error
        missing = {"text_encoder": sorted(told["missing_keys"])}
        for part in ("unet", "vae"):  # diffusers leaves them without data
            missing[part] = [key for key, value in getattr(pipeline, part).named_parameters() if value.is_meta]
        for part, keys in missing.items():
            if keys:
                raise UserError(f"model {name!r}: the weights of {part} lack {keys[0]}; restore the file")
        return cls(pipeline.to(device), name=name)

    def text(self, prompts: Sequence[str], *, tokens: Mapping[str, Tensor] | None = None) -> Conditioning:
        """Encode prompts, (n, length, width); differentiable in `tokens`.

        A placeholder stands for its k vectors wherever it occurs as a whole word. A prompt too long loses its end.
        """
        if not prompts:
            raise ValueError("no prompts to encode")
        if not tokens:
            return Conditioning(embeds=torch.cat([self._encode_plain(prompt) for prompt in prompts]))
        rows = [self._place(prompt, tokens) for prompt in prompts]
        learned = [(i, position, vector) for i, (_, placed) in enumerate(rows) for position, vector in placed]
        ids = torch.tensor([row for row, _ in rows], device=self.device)
        return Conditioning(embeds=self._encode_with(ids, learned))

    @torch.no_grad()
    def latents(self, images: Sequence[Image], *, generator: torch.Generator | None) -> Tensor:
        """VAE-encode to (n, channels, height, width), times the VAE's scaling factor."""
        pixels = self._images.preprocess([image.convert("RGB") for image in images])
        posterior = self._vae.encode(pixels.to(self.device, self._vae.dtype)).latent_dist
        x0: Tensor = posterior.mode() if generator is None else posterior.sample(generator)
        return x0 * self._vae.config.scaling_factor

    def predict(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The U-Net's output, in the dtype of `x_t`."""
        dtype = self._text_encoder.dtype
        output: Tensor = self.denoiser(
            x_t.to(dtype), t, encoder_hidden_states=text.embeds.to(dtype), return_dict=False
        )[0]
        return output.to(x_t.dtype)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        sampling: Sampling,
        negative_prompts: Sequence[str] | None = None,
        tokens: Mapping[str, Tensor] | None = None,
    ) -> list[Image]:
        """Sample with diffusers' `StableDiffusionPipeline`, all prompts in one batch."""
        text = self._sampler_arguments(prompts, negative_prompts, seeds, sampling, tokens)
        images: list[Image] = self._pipeline(StableDiffusionPipeline, sampling.scheduler)(**text).images
        return images

    @torch.no_grad()
    def edit(
        self,
        images: Sequence[Image],
        prompts: Sequence[str],
        *,
        strength: float,
        seeds: Sequence[int],
        sampling: Sampling,
        negative_prompts: Sequence[str] | None = None,
    ) -> list[Image]:
        """SDEdit with diffusers' `StableDiffusionImg2ImgPipeline`, all images in one batch."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        text = self._sampler_arguments(prompts, negative_prompts, seeds, sampling, None)
        pipeline = self._pipeline(StableDiffusionImg2ImgPipeline, sampling.scheduler)
        edited: list[Image] = pipeline(
            image=[image.convert("RGB") for image in images], strength=strength, **text
        ).images
        return edited

    def layers(self, scope: str) -> dict[str, nn.Module]:
        """Linear and Conv2d modules of the U-Net, by name: attn1, attn2, the feed-forward nets, the convolutions of
        residual blocks and of down- and upsamplers, or all."""
        if scope not in SCOPES:
            raise UserError(f"no layer scope is called {scope!r}{did_you_mean(scope, SCOPES)}")
        return {
            name: module
            for name, module in self.denoiser.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and SCOPES[scope].search(name)
        }

    def token_embeddings(self) -> Tensor:
        """The text encoder's table, (vocabulary, width), detached."""
        weight: Tensor = self._text_encoder.get_input_embeddings().weight
        return weight.detach()

    @torch.no_grad()
    def encode_ids(self, ids: Tensor) -> Tensor:
        """Last hidden states (n, length, width) of full id rows (n, length), special tokens included."""
        states: Tensor = self._text_encoder(ids.to(self.device))[0]
        return states

    def tokenizer(self) -> Any:
        """The `CLIPTokenizer`."""
        return self._tokenizer

    def save(self, folder: Path) -> None:
        """Write the pipeline under `folder`, which must not exist yet, by renaming a temporary neighbour."""
        if folder.exists():
            raise UserError(f"{folder} exists already; name a new folder")
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        try:
            with _quiet():
                self._pipeline(StableDiffusionPipeline, None).save_pretrained(temporary, safe_serialization=True)
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    # --- text ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _encode_plain(self, prompt: str) -> Tensor:
        """(1, length, width). Prompts are encoded one by one, so a cached row does not depend on its neighbours."""
        if prompt not in self._encoded:
            ids = self._tokenizer(
                prompt,
                padding="max_length",
                max_length=self._tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            self._encoded[prompt] = self.encode_ids(ids)
            if len(self._encoded) > CACHED_PROMPTS:
                self._encoded.popitem(last=False)
        return self._encoded[prompt]

    def _place(self, prompt: str, tokens: Mapping[str, Tensor]) -> tuple[list[int], list[tuple[int, Tensor]]]:
        """Token ids of a prompt, padded, and (position, vector) of each learned vector in it."""
        tokenizer, length = self._tokenizer, self._tokenizer.model_max_length
        longest_first = sorted(tokens, key=len, reverse=True)
        placeholder = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, longest_first)) + r")(?!\w)")
        ids: list[int] = [tokenizer.bos_token_id]
        placed: list[tuple[int, Tensor]] = []
        for piece in placeholder.split(prompt):
            if piece in tokens:
                placed += [(len(ids) + k, vector) for k, vector in enumerate(tokens[piece])]
                ids += [tokenizer.bos_token_id] * len(tokens[piece])  # a stand-in: its embedding is replaced
            elif piece.strip():
                ids += tokenizer(piece, add_special_tokens=False).input_ids
        ids = [*ids[: length - 1], tokenizer.eos_token_id]
        placed = [(position, vector) for position, vector in placed if position < length - 1]
        return ids + [tokenizer.pad_token_id] * (length - len(ids)), placed

    def _encode_with(self, ids: Tensor, learned: Sequence[tuple[int, int, Tensor]]) -> Tensor:
        """Encode ids (n, length) with the input embeddings at (row, position) replaced by vectors (width,)."""

        def replace(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            if not learned:
                return output
            rows, positions, vectors = zip(*learned, strict=True)
            where = torch.tensor(rows, device=output.device), torch.tensor(positions, device=output.device)
            return output.index_put(where, torch.stack(vectors).to(output))

        hook = self._text_encoder.get_input_embeddings().register_forward_hook(replace)
        try:
            states: Tensor = self._text_encoder(ids)[0]
        finally:
            hook.remove()
        return states

    # --- sampling -----------------------------------------------------------------------------------

    def _sampler_arguments(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        seeds: Sequence[int],
        sampling: Sampling,
        tokens: Mapping[str, Tensor] | None,
    ) -> dict[str, Any]:
        negative_prompts = [""] * len(prompts) if negative_prompts is None else negative_prompts
        if not len(prompts) == len(seeds) == len(negative_prompts):
            counts = f"{len(prompts)} prompts, {len(seeds)} seeds and {len(negative_prompts)} negative prompts"
            raise ValueError(f"{counts} do not match")
        trained = self._scheduler.config.num_train_timesteps
        if sampling.num_inference_steps > trained:
            raise UserError(
                f"sampling.num_inference_steps is {sampling.num_inference_steps}, expected at most {trained}"
            )
        return {
            "prompt_embeds": self.text(prompts, tokens=tokens).embeds,
            "negative_prompt_embeds": self.text(negative_prompts).embeds,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "num_inference_steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
        }

    def _pipeline(self, kind: type, scheduler: str | None) -> Any:
        """A pipeline around the shared networks; the scheduler is its own, for it keeps state while it samples."""
        pipeline = kind(
            unet=self.denoiser,
            vae=self._vae,
            text_encoder=self._text_encoder,
            tokenizer=self._tokenizer,
            scheduler=self._new_scheduler(scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _new_scheduler(self, name: str | None) -> Any:
        """A scheduler of diffusers' class `name` (the model's own where None) with the model's noise schedule."""
        own = type(self._scheduler)
        known = {cls.__name__: cls for cls in [*self._scheduler.compatibles, own]}
        chosen = known.get(name or own.__name__)
        if chosen is None:
            raise UserError(f"scheduler = {name!r} does not fit model {self.name!r}{did_you_mean(str(name), known)}")
        config = dict(self._scheduler.config)
        if "clip_sample" in inspect.signature(chosen).parameters:
            config.setdefault("clip_sample", False)  # the class's default clips to [−1, 1], which is for pixels
        return chosen.from_config(config)

    def _process(self) -> DdpmProcess:
        alphas = getattr(self._scheduler, "alphas_cumprod", None)
        prediction_type = self._scheduler.config.get("prediction_type", "epsilon")
        if alphas is None or prediction_type not in ("epsilon", "v_prediction"):
            scheduler = type(self._scheduler).__name__
            raise UserError(
                f"model {self.name!r}: a {scheduler} with prediction_type {prediction_type!r} is not supported; "
                "it must have alphas_cumprod and predict epsilon or v_prediction"
            )
        return DdpmProcess(alphas_cumprod=alphas.to(self.device, torch.float32), prediction_type=prediction_type)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the loading bars of diffusers and transformers, and put back what was set."""
    were_on = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in were_on:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in were_on:
            log.enable_progress_bar()
