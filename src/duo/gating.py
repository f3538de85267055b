"""Adapters that each prompt switches on by itself: SPM's facilitated transport (Lyu et al. 2024, section 3.3).

Adapter i adds γ_i·B_i·A_i·x to the output of each of its layers. Its gate γ_i in [0, 1] is, for each prompt, the
largest over the concepts of the adapter of

    max( cos(embedding of the prompt, embedding of the concept), |words ∩ concept's words| / |concept's words| )

with embeddings flattened over positions, and words as token ids without the special ones. Both halves of
classifier-free guidance have the gate of the prompt. The public code scales both A and B by γ, and so applies γ²; here
it is γ.

In a delta's tensors, `i.gate.embeds` is (concepts, length, width), what the text encoders make of the concepts; in its
record, `gates[i]` is `{"concepts": […], "token_ids": [[…], …]}`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duo.conditioning import Conditioning
from duo.errors import UserError
from duo.plugins import Family

if TYPE_CHECKING:
    from PIL.Image import Image

VERBS = ("text", "predict", "generate", "edit")  # of a family: what learns the prompts, and what acts on them
BY_ROW = ("seeds", "negative_prompts", "latents", "masks")  # what `generate` and `edit` are given for each prompt


def gate_of(concepts: Sequence[str], model: Family) -> tuple[Tensor, dict[str, Any]]:
    """What a gate compares prompts with: the concepts' embeddings and its part of a record."""
    if not concepts:
        raise UserError("a gate needs at least one concept to compare prompts with")
    with torch.no_grad():
        embeds = model.text(concepts).embeds.detach().cpu().float()
    ids = [_words(model.tokenizer(), concept) for concept in concepts]
    return embeds, {"concepts": list(concepts), "token_ids": [sorted(one) for one in ids]}


def adapters(tensors: Mapping[str, Tensor]) -> int:
    """How many adapters a gated delta holds."""
    return 1 + max(int(name.partition(".")[0]) for name in tensors)


def joined_record(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The gates of several deltas in a row."""
    return {"gates": [gate for record in records for gate in record["gates"]]}


def strength(
    embeds: Tensor, words: Sequence[frozenset[int]] | None, *, concept_embeds: Tensor, concept_words: Sequence[Any]
) -> Tensor:
    """γ of each prompt, (n,): its embedding is a row of `embeds` (n, length, width), `words` its token ids if known."""
    flat, wanted = embeds.detach().float().flatten(1), concept_embeds.to(embeds.device).float().flatten(1)
    gates = F.cosine_similarity(flat[:, None], wanted[None], dim=-1).amax(1).clamp(0, 1)
    if words is not None:
        shared = [max(len(own & set(ids)) / max(len(ids), 1) for ids in concept_words) for own in words]
        gates = torch.maximum(gates, torch.tensor(shared, device=gates.device))
    return gates


@contextmanager
def attached(
    tensors: Mapping[str, Tensor], record: Mapping[str, Any], model: Family, weight: float
) -> Iterator[Callable[[], AbstractContextManager[Family]]]:
    """Within the context the model's layers have the adapters, each open as far as the prompt at work says.

    `Family.generate` and `edit` gate by their prompts, `predict` by the prompts that its conditioning was made of (by
    the embedding alone where it was not made by `Family.text`). The family's verbs are wrapped for that long. What it
    yields makes a context within which every gate is shut.
    """
    gates = _Gates(tensors, record, model, weight)
    with ExitStack() as undo:
        for verb in VERBS:
            before = model.__dict__.get(verb)
            setattr(model, verb, getattr(gates, verb)(getattr(model, verb)))
            undo.callback(_put_back, model, verb, before)
        modules = dict(model.denoiser.named_modules())
        for layer, parts in gates.layers.items():
            undo.callback(modules[layer].register_forward_hook(gates.hook(parts)).remove)
        yield gates.shut


def _put_back(model: Any, verb: str, before: Any) -> None:
    if before is None:
        delattr(model, verb)
    else:
        setattr(model, verb, before)


class _Gates:
    """The adapters on a model and how far each is open, (adapters, prompts), while a verb of the family is at work."""

    def __init__(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any], model: Family, weight: float) -> None:
        self._model, self._record = model, record
        count = adapters(tensors)
        if len(record.get("gates", ())) != count:
            raise UserError(f"the gated delta holds {count} adapters but {len(record.get('gates', ()))} gates")
        self._embeds = [tensors[f"{i}.gate.embeds"] for i in range(count)]
        self._open: Tensor | None = None
        self._shut = False
        self.layers: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
        for name, tensor in tensors.items():
            if name.endswith(".lora_A.weight"):
                number, _, layer = name.removesuffix(".lora_A.weight").partition(".")
                up = tensors[f"{number}.{layer}.lora_B.weight"] * weight
                self.layers.setdefault(layer, []).append((int(number), tensor.to(model.device), up.to(model.device)))

    # --- the family's verbs -------------------------------------------------------------------------

    def text(self, inner: Callable[..., Conditioning]) -> Callable[..., Conditioning]:
        def text(prompts: Sequence[str], **given: Any) -> Conditioning:
            return replace(inner(prompts, **given), prompts=tuple(prompts))

        return text

    def predict(self, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def predict(x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
            with self._opened(text):
                return inner(x_t, t, text)

        return predict

    def generate(self, inner: Callable[..., list[Image]]) -> Callable[..., list[Image]]:
        def generate(prompts: Sequence[str], **given: Any) -> list[Image]:
            return self._drawn(lambda rows, own: inner([prompts[i] for i in rows], **own), prompts, given)

        return generate

    def edit(self, inner: Callable[..., list[Image]]) -> Callable[..., list[Image]]:
        def edit(images: Sequence[Image], prompts: Sequence[str], **given: Any) -> list[Image]:
            def draw(rows: Sequence[int], own: Mapping[str, Any]) -> list[Image]:
                return inner([images[i] for i in rows], [prompts[i] for i in rows], **own)

            return self._drawn(draw, prompts, given)

        return edit

    def _drawn(
        self,
        draw: Callable[[Sequence[int], Mapping[str, Any]], list[Image]],
        prompts: Sequence[str],
        given: Mapping[str, Any],
    ) -> list[Image]:
        """Images of all prompts. Those with and those without a negative one are drawn apart: some families make two
        batches of them, and the hooks must know which rows a batch has."""
        negatives = given.get("negative_prompts") or [""] * len(prompts)
        drawn: dict[int, Image] = {}
        for against in (False, True):
            rows = [i for i in range(len(prompts)) if bool(negatives[i]) is against]
            if not rows:
                continue
            own = {k: _of(v, rows) if k in BY_ROW and v is not None else v for k, v in given.items()}
            text = self._model.text([prompts[i] for i in rows], tokens=given.get("tokens"))
            with torch.no_grad(), self._opened(text):
                drawn |= zip(rows, draw(rows, own), strict=True)
        return [drawn[i] for i in range(len(prompts))]

    @contextmanager
    def shut(self) -> Iterator[Family]:
        """Within the context the adapters add nothing, whatever the prompt."""
        before, self._shut = self._shut, True
        try:
            yield self._model
        finally:
            self._shut = before

    # --- the gates ----------------------------------------------------------------------------------

    @contextmanager
    def _opened(self, text: Conditioning) -> Iterator[None]:
        words = None if text.prompts is None else [_words(self._model.tokenizer(), one) for one in text.prompts]
        before, self._open = (
            self._open,
            torch.stack(
                [
                    strength(text.embeds, words, concept_embeds=embeds, concept_words=gate["token_ids"])
                    for embeds, gate in zip(self._embeds, self._record["gates"], strict=True)
                ]
            ),
        )
        try:
            yield
        finally:
            self._open = before

    def hook(self, parts: Sequence[tuple[int, Tensor, Tensor]]) -> Callable[..., Tensor]:
        """Adds the adapters of one layer, (adapter, A, B), to its output."""

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._shut:
                return output
            if self._open is None:
                raise RuntimeError("a gated denoiser was called apart from its family, so no prompt opens the gates")
            (x,) = inputs
            for number, down, up in parts:
                # Classifier-free guidance stacks the batch twice.
                gate = self._open[number].repeat(len(x) // self._open.shape[1])
                output = output + gate.view(-1, *[1] * (output.dim() - 1)).to(output) * _through(module, x, down, up)
            return output

        return add


def _of(values: Any, rows: Sequence[int]) -> Any:
    """The rows of a tensor or a sequence."""
    return values[list(rows)] if isinstance(values, Tensor) else [values[i] for i in rows]


def _through(module: nn.Module, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """B·A·x, as the layer itself would take it."""
    down, up = down.to(x), up.to(x)
    if isinstance(module, nn.Conv2d):
        inner = F.conv2d(x, down, None, module.stride, module.padding, module.dilation)
        return F.conv2d(inner, up)
    return F.linear(F.linear(x, down), up)


def _words(tokenizer: Any, prompt: str) -> frozenset[int]:
    return frozenset(tokenizer(prompt, add_special_tokens=False).input_ids)
