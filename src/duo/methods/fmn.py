"""Forget-Me-Not (Zhang et al. 2023, eq. 1): min ‖A[:, concept]‖, the cross-attention that the concept's tokens get.

Before that, the concept may be learned as a word of its own from images of it (textual inversion, Gal et al. 2022).

Departures from the paper and its public code, and why:

- The public code minimises the norm of all maps together, the paper the sum of their squares: `squared` chooses.
- `use_pooler` adds the end of the text. The public code looks for the end token's id, and so takes all the padding too
  where that is the same token (Stable Diffusion 1.x pads with it, 2.x with "!"). Here it is the first end token alone.
- In a batch the public code lays the masks of the rows as row 1, row 2, …, row 1, row 2, … over maps that lie head by
  head within a row: for more than one row each is masked by another's tokens. Here every row has its own mask.
- Maps are worked out from what `to_q` and `to_k` put out, so that any attention processor may be at work. The public
  code's own processor is replaced, and its loss is empty, where xformers is asked for.
- The images are drawn by the model itself, from the unsafe prompts; the authors bring about ten. Latents are the
  posterior's means, with no crops or flips.
- The vectors of the learned word beyond the first word's tokens start like the text encoder's own embeddings, by size.
  The public code starts them about 25 times as long, and lets them decay. The word's norms are pulled before each step,
  not after it. Only these vectors are decayed by AdamW; the public code holds the whole table and puts the rest back.
- `captions` = "prompts" is ours: each image has the prompt that drew it, with the concept's word in its place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from duo.conditioning import Conditioning
from duo.delta import Delta, made_by
from duo.drawn import draw, encode, noised
from duo.errors import UserError
from duo.fields import check_above_0, check_from_0
from duo.pairs import Pairs
from duo.plugins import Family, Precision, Run
from duo.precision import check_tunable, waiting
from duo.training import fit, follow, steps_of, tune_weights

PLACEHOLDER = "<concept>"
FREE = ("max_train_steps", "checkpointing_steps")  # settings that a run may go on with in another value


@dataclass(frozen=True, kw_only=True)
class Fmn:
    """Forget-Me-Not with the values of its public configuration, for U-Nets: other denoisers have no cross-attention.

    The concept's tokens are a word of `inversion_vectors` embeddings that is learned in `inversion_steps`, or at 0
    steps the concept's own words, one drawn for each row. The norms of learned embeddings are pulled towards
    `inversion_norm`, where given, by the share 100·rate a step. `captions` are the `template` with the word for {}, or
    the prompts that drew the `images`. `parameters` are the weights that are trained: of the whole U-Net, or of its
    cross-attention.
    """

    takes_pairs: ClassVar[bool] = False
    strength: ClassVar[str] = "learning_rate"

    images: int = 10
    captions: Literal["template", "prompts"] = "template"
    template: str = "a photo of {}"
    inversion_steps: int = 500
    inversion_vectors: int = 4
    inversion_learning_rate: float = 1e-3
    inversion_weight_decay: float = 0.1
    inversion_norm: float | None = 0.4
    inversion_batch_size: int = 1
    use_pooler: bool = True
    squared: bool = False
    parameters: Literal["full", "cross_attention"] = "full"
    learning_rate: float = 2e-6
    max_train_steps: int = 35
    train_batch_size: int = 1
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    checkpointing_steps: int = 250

    def __post_init__(self) -> None:
        counts = ("images", "inversion_vectors", "inversion_batch_size", "max_train_steps", "train_batch_size")
        rates = ("inversion_learning_rate", "learning_rate", "max_grad_norm")
        check_above_0(self, *counts, *rates, "checkpointing_steps")
        check_from_0(self, "inversion_steps", "inversion_weight_decay", "weight_decay")
        if self.inversion_norm is not None and not self.inversion_norm > 0:
            raise ValueError(f"inversion_norm is {self.inversion_norm}, expected a number above 0, or none for no pull")
        if self.captions not in ("template", "prompts"):
            raise ValueError(f"captions is {self.captions!r}, expected 'template' or 'prompts'")
        if self.parameters not in ("full", "cross_attention"):
            raise ValueError(f"parameters is {self.parameters!r}, expected 'full' or 'cross_attention'")
        if self.template.count("{}") != 1:
            raise ValueError(f"template is {self.template!r}, expected one {{}} where the concept's word goes")

    def passes(self, pairs: int) -> dict[str, int]:
        """What training sends through the networks, in rows, whatever the number of pairs (for `duo run --dry-run`).

        The sampling steps of the images that it draws are not counted.
        """
        inverted = self.inversion_steps * self.inversion_batch_size
        rows = inverted + self.max_train_steps * self.train_batch_size
        drawn = {"images": self.images, "vae": 2 * self.images}
        return {"denoiser": rows, "trained": rows, "text": inverted + self.images, **drawn}

    def check(self, model: Family, *, pairs: int | None, precision: Precision) -> None:
        """Raise `UserError` for a model without cross-attention, or what does not fit this machine."""
        if model.component != "unet":
            raise UserError(
                "method fmn is not defined for this family: it has no cross-attention, only image and text that attend "
                f"to each other as one; erase from model {model.name!r} with another method"
            )
        check_tunable(precision)

    def erase(self, model: Family, concept: Any, *, pairs: Pairs | None, run: Run) -> Delta:
        """Draw images of the concept, learn a word for it where asked, and turn attention away from it."""
        self.check(model, pairs=None, precision=run.precision)
        prompts = [unsafe for unsafe, _ in concept.targets("prompts")]
        drawn = draw(model, prompts, n=self.images, run=run, name="images")
        latents = encode(model, drawn)
        made = made_by("fmn", self, model=model, run=run)
        told = {"prompts": prompts, "words": list(concept.words), "model": model.name, "seed": run.seed}
        record = {key: value for key, value in {**made["config"], **told}.items() if key not in FREE}
        captions = self._captions(concept.words, prompts)
        word = None
        if self.inversion_steps:
            word = self._learned_word(model, concept.words, captions, latents, record, run)
        vectors = None if word is None else len(word)
        tokens = {} if word is None else {PLACEHOLDER: word}
        # Every image has the same choice of captions, or each has one of its own.
        texts = list(dict.fromkeys(caption for own in captions for caption in own))
        with torch.no_grad():
            text = model.text([prompt for prompt, _ in texts], tokens=tokens)
        masks = torch.stack(
            [
                concept_mask(model.tokenizer(), prompt, name, vectors=vectors, use_pooler=self.use_pooler)
                for prompt, name in texts
            ]
        ).to(model.device)
        choices = [[texts.index(caption) for caption in own] for own in captions]
        denoiser = model.denoiser
        layers = model.layers("cross_attention")
        if self.parameters == "full":
            trained = sorted(name for name, module in denoiser.named_modules() if module._parameters)
        else:
            trained = sorted(layers)
        attentions = sorted(name.removesuffix(".to_q") for name in layers if name.endswith(".to_q"))
        with (
            waiting(model.encoders(), device=model.device, offload=run.precision.offload),
            tune_weights(denoiser, trained) as tuned,
        ):
            steps = steps_of(
                self,
                self._objective(model, attentions, latents=latents, text=text, masks=masks, choices=choices),
                tuned.parameters,
                run=run,
                record=record,
            )
            follow(steps, run=run, total=self.max_train_steps, label="fmn")
            tensors = tuned.differences()
        return Delta(kind="weights", component=model.component, tensors=tensors, record=made)

    def _captions(self, words: Sequence[str], prompts: Sequence[str]) -> list[list[tuple[str, str]]]:
        """The captions that each image may have, with the word in them that stands for the concept."""
        name = PLACEHOLDER if self.inversion_steps else None
        if self.captions == "template":
            return [[(self.template.replace("{}", word), word) for word in ([name] if name else words)]] * self.images
        captions = []
        for i in range(self.images):
            prompt = prompts[i % len(prompts)]
            found = [word for word in sorted(words, key=len, reverse=True) if len(_pieces(prompt, word)) > 1]
            if not found:
                raise UserError(f"captions = 'prompts' but {prompt!r} has none of the concept's words; use 'template'")
            captions.append([((name or found[0]).join(_pieces(prompt, found[0])[::2]), name or found[0])])
        return captions

    def _learned_word(
        self,
        model: Family,
        words: Sequence[str],
        captions: Sequence[Sequence[tuple[str, str]]],
        latents: Tensor,
        record: Mapping[str, Any],
        run: Run,
    ) -> Tensor:
        """The concept as embeddings (vectors, width), by the denoising error of its images with every weight frozen."""
        word = nn.Parameter(self._start(model, words[0], seed=run.seed))
        n, rate = self.inversion_batch_size, self.inversion_learning_rate
        own = {key: record[key] for key in record if key.startswith("inversion_") and key != "inversion_steps"}
        others = ("images", "captions", "template", "prompts", "words", "model", "seed")

        def loss(generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
            if self.inversion_norm is not None:
                pull_norms(word, self.inversion_norm, share=min(1.0, 100 * rate))
            rows = torch.randint(len(latents), (n,), generator=generator)
            x_t, t, wanted = noised(model.process, latents[rows.to(latents.device)], generator=generator)
            text = model.text([captions[i][0][0] for i in rows.tolist()], tokens={PLACEHOLDER: word})
            return mse_loss(model.predict(x_t, t, text).float(), wanted.float()), {}

        steps = fit(
            loss,
            nn.ParameterList([word]),
            steps=self.inversion_steps,
            learning_rate=rate,
            weight_decay=self.inversion_weight_decay,
            max_grad_norm=math.inf,
            seed=run.seed,
            folder=run.folder / "inversion",
            checkpointing_steps=self.checkpointing_steps,
            record={**own, **{key: record[key] for key in others}},
            shared=False,
        )
        # Not logged: the log is of the steps of the erasure, which have the same numbers.
        with run.progress(self.inversion_steps, "learning a word for the concept") as bar:
            for step in steps:
                bar.update(step.step, loss=step.loss)
        return word.detach()

    def _start(self, model: Family, word: str, *, seed: int) -> Tensor:
        """Where the learned word starts: the tokens of `word`, and random vectors as large as those of the table."""
        table = model.token_embeddings().float()
        ids = model.tokenizer()(word, add_special_tokens=False).input_ids[: self.inversion_vectors]
        shape = self.inversion_vectors - len(ids), table.shape[1]
        random = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(table) * table.std()
        return torch.cat([table[ids], random])

    def _objective(
        self,
        model: Family,
        attentions: Sequence[str],
        *,
        latents: Tensor,
        text: Conditioning,
        masks: Tensor,
        choices: Sequence[Sequence[int]],
    ) -> Callable[[torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]:
        """The loss of one random batch, from cached latents (images, channels, height, width).

        `text` and `masks` (captions, length) are of all captions, `choices` the numbers of those of each image.
        """
        n = self.train_batch_size

        def loss(generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
            rows = torch.randint(len(latents), (n,), generator=generator)
            chosen = torch.randint(len(choices[0]), (n,), generator=generator).tolist()
            caption = torch.tensor([choices[i][c] for i, c in zip(rows.tolist(), chosen, strict=True)])
            caption = caption.to(latents.device)
            x_t, t, _ = noised(model.process, latents[rows.to(latents.device)], generator=generator)
            with captured(model.denoiser, attentions) as maps:
                model.predict(x_t, t, text[caption])
            mask = masks[caption]
            with torch.no_grad():
                shares = [(one * mask[:, None, None]).sum(-1).mean() for one in maps]
            return resteering_loss(maps, mask, squared=self.squared), {"attention": torch.stack(shares).mean()}

        return loss


# --- pure functions -----------------------------------------------------------------------------------


def attention(queries: Tensor, keys: Tensor, *, heads: int, scale: float) -> Tensor:
    """softmax(scale·Q·Kᵀ) of each head, in float32: (n, heads, pixels, length).

    `queries` is (n, pixels, heads·width) and `keys` (n, length, heads·width).
    """
    q, k = (one.float().view(*one.shape[:2], heads, -1).transpose(1, 2) for one in (queries, keys))
    scores: Tensor = scale * q @ k.transpose(-1, -2)
    return scores.softmax(-1)


def resteering_loss(maps: Sequence[Tensor], mask: Tensor, *, squared: bool = False) -> Tensor:
    """The norm of what all `maps`, (n, heads, pixels, length) each, give to the tokens in `mask`, (n, length)."""
    total = torch.stack([(one.square() * mask[:, None, None]).sum() for one in maps]).sum()
    return total if squared else total.sqrt()


def concept_mask(tokenizer: Any, prompt: str, word: str, *, vectors: int | None, use_pooler: bool) -> Tensor:
    """True at the tokens of `word` wherever it stands in `prompt`, (length,), in the row that text encoders read.

    With `use_pooler` also at the first end token. A word of learned embeddings has `vectors` tokens.
    """
    length: int = tokenizer.model_max_length
    mask = torch.zeros(length, dtype=torch.bool)
    end = 1  # after the start token
    for i, piece in enumerate(_pieces(prompt, word)):
        is_word = i % 2 == 1
        tokens = vectors if is_word and vectors else len(tokenizer(piece, add_special_tokens=False).input_ids)
        mask[end : end + tokens] = is_word
        end += tokens
    end = min(end, length - 1)  # a prompt too long loses its end
    mask[end:] = False
    if not mask.any():
        raise UserError(f"no token of the concept's word {word!r} is in the caption {prompt!r}; shorten the caption")
    mask[end] = use_pooler
    return mask


@torch.no_grad()
def pull_norms(vectors: Tensor, norm: float, *, share: float) -> None:
    """Bring the norm of each row of `vectors` nearer to `norm`, in place, by `share` of the way."""
    own = vectors.norm(dim=-1, keepdim=True)
    vectors.copy_(normalize(vectors, dim=-1) * (own + share * (norm - own)))


@contextmanager
def captured(denoiser: nn.Module, attentions: Sequence[str]) -> Iterator[list[Tensor]]:
    """Within the context one forward pass is made; after it the list has the attention maps of the modules named."""
    outputs: dict[str, Tensor] = {}
    maps: list[Tensor] = []
    modules: list[Any] = [denoiser.get_submodule(name) for name in attentions]

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, output: outputs.__setitem__(name, output)

    hooks = [
        getattr(module, side).register_forward_hook(keep(f"{name}.{side}"))
        for name, module in zip(attentions, modules, strict=True)
        for side in ("to_q", "to_k")
    ]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()
    for name, module in zip(attentions, modules, strict=True):
        queries, keys = (outputs[f"{name}.{side}"] for side in ("to_q", "to_k"))
        maps.append(attention(queries, keys, heads=module.heads, scale=module.scale))


def _pieces(prompt: str, word: str) -> list[str]:
    """The prompt cut at each whole `word`: pieces of odd number are the word."""
    return re.split(rf"(?<!\w)({re.escape(word)})(?!\w)", prompt, flags=re.IGNORECASE)
