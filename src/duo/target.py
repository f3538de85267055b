"""A model as an attacker may see it: what lies above its `Access` raises, and every image is counted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from duo.plugins import Access, Family, Process, Sampling
from duo.refusal import refused

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from duo.concept import AttackConcept
    from duo.conditioning import Conditioning


class AccessError(PermissionError):
    """An attack touched what its declared `access` does not include: a mistake in the attack, not of the user."""


class QueryLimitError(RuntimeError):
    """An attack asked for more images than it was granted."""


class RefusedPromptError(ValueError):
    """An attack asked for an image of a sexual concept by `prompt`, which `mentions` a minor. Nothing was rendered."""

    def __init__(self, prompt: str, mentions: str) -> None:
        super().__init__(f"refused: the prompt {prompt!r} mentions a minor ({mentions!r})")
        self.prompt, self.mentions = prompt, mentions


class Target:
    """`model` behind a fence. The harness makes one for each attack and model, with the attack's own `access`.

    `query_limit` is the largest number of images that the attack may ask for; None sets no limit. Images are sampled as
    `sampling` says: an attacker sends prompts and seeds, and does not choose how the service samples.

    `adults_only` is for sexual concepts: no prompt that mentions a minor is rendered, nor one with such a word inside a
    longer one, unless that is `vetted`: a word of texts that were checked already (`duo.refusal.words_of`). Of other
    concepts no prompt is rendered that is sexual itself and mentions a minor. An attack does well to ask `refused`
    before it takes such a prompt further.

    `undefended` lends the model from before the erasure, for attacks that say they use it (`Attack`); while it is lent,
    the model under attack is not to be asked. `concept` is what its attacker knows of what was erased: at hand in
    searches, which are not told it otherwise (a detector that rewards them).
    """

    def __init__(
        self,
        model: Family,
        *,
        access: Access,
        sampling: Sampling,
        query_limit: int | None = None,
        adults_only: bool = False,
        vetted: Collection[str] = (),
        undefended: Callable[[], AbstractContextManager[Family]] | None = None,
        concept: AttackConcept | None = None,
    ) -> None:
        self.access = access
        self.concept = concept
        self._undefended = undefended
        self._adults_only, self._vetted = adults_only, vetted
        self.query_limit = query_limit
        self._model = model
        self._sampling = sampling
        self._queries = 0

    @property
    def device(self) -> torch.device:
        """Where tensors that are handed to the model must lie."""
        return self._model.device

    @property
    def queries(self) -> int:
        """How many images were asked for so far."""
        return self._queries

    @property
    def queries_left(self) -> int | None:
        """How many more images may be asked for; None where there is no limit."""
        return None if self.query_limit is None else self.query_limit - self._queries

    def refused(self, prompt: str) -> str | None:
        """The word, phrase or age for which this prompt is not rendered, or None."""
        return refused(prompt, adults_only=self._adults_only, vetted=self._vetted)

    # --- QUERY ------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        negative_prompts: Sequence[str] | None = None,
        tokens: Mapping[str, Tensor] | None = None,
    ) -> list[Image]:
        """One image a prompt. Learned `tokens` go into the text encoder, so they need TEXT.

        A call that would pass the limit raises `QueryLimitError` before anything is sampled or counted, and one with a
        refused prompt `RefusedPromptError`.
        """
        self._count(prompts, tokens, "generate")
        return self._model.generate(
            prompts, seeds=seeds, sampling=self._sampling, negative_prompts=negative_prompts, tokens=tokens
        )

    def edit(
        self,
        images: Sequence[Image],
        prompts: Sequence[str],
        *,
        strength: float,
        seeds: Sequence[int],
        negative_prompts: Sequence[str] | None = None,
        tokens: Mapping[str, Tensor] | None = None,
        masks: Sequence[Image] | None = None,
    ) -> list[Image]:
        """One edited image a prompt (`Family.edit`), counted and refused as `generate` does."""
        self._count(prompts, tokens, "edit")
        return self._model.edit(
            images,
            prompts,
            strength=strength,
            seeds=seeds,
            sampling=self._sampling,
            negative_prompts=negative_prompts,
            tokens=tokens,
            masks=masks,
        )

    def _count(self, prompts: Sequence[str], tokens: Mapping[str, Tensor] | None, verb: str) -> None:
        self._require(Access.QUERY, verb)
        if tokens:
            self._require(Access.TEXT, f"{verb}(tokens=…)")
        for prompt in prompts:
            if found := self.refused(prompt):
                raise RefusedPromptError(prompt, found)
        if self.queries_left is not None and len(prompts) > self.queries_left:
            raise QueryLimitError(f"{len(prompts)} images asked for, {self.queries_left} of {self.query_limit} left")
        self._queries += len(prompts)

    # --- TEXT -------------------------------------------------------------------------------------

    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        self._require(Access.TEXT, "tokenizer")
        return self._model.tokenizer()

    def token_embeddings(self) -> Tensor:
        """The text encoder's table, (vocabulary, width), detached."""
        self._require(Access.TEXT, "token_embeddings")
        return self._model.token_embeddings()

    def encode_ids(self, ids: Tensor) -> Tensor:
        """Last hidden states (n, length, width) of id rows (n, length), special tokens included. No gradient."""
        self._require(Access.TEXT, "encode_ids")
        with torch.no_grad():
            return self._model.encode_ids(ids)

    def word_parts(self) -> dict[str, int]:
        """The parts of a learned word in a file for this model, with their widths (`duo.plugins.Family`)."""
        self._require(Access.TEXT, "word_parts")
        return self._model.word_parts()

    # --- GRADIENT ---------------------------------------------------------------------------------

    @property
    def process(self) -> Process:
        """The forward process that the denoiser was trained on."""
        self._require(Access.GRADIENT, "process")
        return self._model.process

    def text(self, prompts: Sequence[str], *, tokens: Mapping[str, Tensor] | None = None) -> Conditioning:
        """Encode prompts; differentiable in `tokens`."""
        self._require(Access.GRADIENT, "text")
        return self._model.text(prompts, tokens=tokens)

    def latents(self, images: Sequence[Image], *, generator: torch.Generator | None) -> Tensor:
        """VAE-encode; the posterior's mean where `generator` is None."""
        self._require(Access.GRADIENT, "latents")
        return self._model.latents(images, generator=generator)

    def images(self, latents: Tensor) -> list[Image]:
        """VAE-decode latents."""
        self._require(Access.GRADIENT, "images")
        return self._model.images(latents)

    def predict(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The denoiser's output; differentiable in `x_t` and `text`."""
        self._require(Access.GRADIENT, "predict")
        return self._model.predict(x_t, t, text)

    def unconditional(self) -> Conditioning:
        """The one row that guidance starts from where there is no negative prompt."""
        self._require(Access.GRADIENT, "unconditional")
        return self._model.unconditional()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent at the model's own image size."""
        self._require(Access.GRADIENT, "latent_shape")
        return self._model.latent_shape

    @contextmanager
    def undefended(self) -> Iterator[Target]:
        """The model from before the erasure, with every access, for this copy is the attacker's own; its images are not
        counted. Its weights are to be put back.
        """
        if self._undefended is None:
            raise AccessError("an attack touched the undefended model without saying `uses_undefended = True`")
        with self._undefended() as model:
            yield Target(
                model,
                access=Access.WEIGHTS,
                sampling=self._sampling,
                adults_only=self._adults_only,
                vetted=self._vetted,
                concept=self.concept,
            )

    # --- WEIGHTS ----------------------------------------------------------------------------------

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser itself."""
        self._require(Access.WEIGHTS, "denoiser")
        return self._model.denoiser

    def layers(self, scope: str) -> dict[str, nn.Module]:
        """The denoiser's modules of one scope, by name (`Family.layers`)."""
        self._require(Access.WEIGHTS, "layers")
        return self._model.layers(scope)

    @property
    def component(self) -> str:
        """The denoiser's name in diffusers' pipelines: what a `Delta` is of."""
        self._require(Access.WEIGHTS, "component")
        return self._model.component

    def _require(self, level: Access, touched: str) -> None:
        if self.access < level:
            raise AccessError(f"an attack with {self.access.name} access touched {touched}, which needs {level.name}")
