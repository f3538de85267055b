"""Unified Concept Editing (Gandikota et al. 2024, WACV; eq. 7): rewrite, in closed form, what the text enters by.

Each matrix W that reads the text becomes, for concepts c with new values v, and texts p to preserve,

    W' = (λW + s_e Σ v cᵀ + s_p Σ W p pᵀ)(λI + s_e Σ c cᵀ + s_p Σ p pᵀ)⁻¹,

which minimises s_e Σ‖W'c − v‖² + s_p Σ‖W'p − Wp‖² + λ‖W' − W‖². Solved is the equal
W' − W = s_e Σ (v − W c) cᵀ(…)⁻¹, in float64, which is exactly 0 where nothing is erased. λ is the public code's; the
paper's equation has it among what is preserved. The defaults are those of the paper's checkpoints, made by the code's
older version (`train_erase.py`).

Departures from the authors' code:

- A text without words has its end token for its last word. There the index of an empty anchor (" " and "" alike) comes
  out as the start token's, and for FLUX as the last padding; `of_empty` = "start" repeats the former.
- v is W·c*, without the layer's bias. Their code for FLUX takes the layer's output, bias and all, for v, and then
  fits the weight alone to it, so that the bias counts twice and what is preserved moves by it.
- On SD3 the CLIPs' part of the sequence and T5's are each edited at their own last word (their code has no SD3).
- Everything is solved by `torch.linalg.solve` in float64; theirs inverts in float32.
- `tokens`, `preserve_tokens`, `preserve_scale` = 1 and `preserve_empty` = false can repeat the newer version (HEAD,
  `uce_sd_erase.py`), which uses the last word's token alone, everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from duo.delta import DIFFERENCE, Delta, made_by
from duo.errors import DivergedError, UserError
from duo.fields import check_above_0, check_choices
from duo.pairs import Pairs
from duo.plugins import Family, Precision, Run, Span

Tokens = Literal["last", "from_last", "all"]
Technique = Literal["replace", "tensor"]
CHOICES: dict[str, tuple[str, ...]] = {
    "prompts": ("words", "prompts"),
    "technique": get_args(Technique),
    "tokens": get_args(Tokens),
    "preserve_tokens": get_args(Tokens),
    "of_empty": ("end", "start"),
}
SCOPE = "text_inputs"
POOLED = "text_embedder."  # in the name of a layer that reads the pooled text, not the sequence
AT_ONCE = 16  # texts encoded and summed together


@dataclass(frozen=True, kw_only=True)
class Uce:
    """UCE as for the paper's Stable Diffusion 1.4.

    Erased are the texts of `concepts`, or of the concept: its words, or with `prompts` = "prompts" the prompts of its
    pairs. Each is given the values of its `anchor`: one text for all, "" as published, or where None what the concept
    has for it. `technique` "replace" takes these values as they are, "tensor" without their part along the erased ones.

    `tokens` are those whose embeddings are erased: of the "last" word, "from_last" on through the padding (as long as
    the anchor's row is, too), or "all", position by position. Of preserved texts it is `preserve_tokens`.

    Preserved are the empty prompt (`preserve_empty`), `preserve`, and with `preserve_harmless` the concept's captions
    of harmless scenes (ours). `regularization` is λ, `erase_scale` s_e and `preserve_scale` s_p: where None the larger
    of 0.1 and 1 / number of preserved texts, as published.
    """

    takes_pairs: ClassVar[bool] = False
    strength: ClassVar[str] = "erase_scale"

    concepts: tuple[str, ...] = ()
    prompts: Literal["words", "prompts"] = "words"
    anchor: str | None = None
    technique: Technique = "replace"
    tokens: Tokens = "from_last"
    of_empty: Literal["end", "start"] = "end"
    preserve: tuple[str, ...] = ()
    preserve_empty: bool = True
    preserve_harmless: bool = False
    preserve_tokens: Tokens = "all"
    regularization: float = 0.5
    erase_scale: float = 1.0
    preserve_scale: float | None = None

    def __post_init__(self) -> None:
        check_choices(self, CHOICES)
        check_above_0(self, "regularization", "erase_scale")
        if self.preserve_scale is not None and not self.preserve_scale >= 0:
            raise ValueError(f"preserve_scale is {self.preserve_scale}, expected 0 or more")
        for name in ("regularization", "erase_scale", "preserve_scale"):
            if math.inf == getattr(self, name):
                raise ValueError(f"{name} is inf, expected a finite number")
        if not all(text.strip() for text in self.concepts):
            raise ValueError("concepts has an empty text, which has no word to erase; anchor may be empty")

    def passes(self, pairs: int) -> dict[str, int]:
        """The texts that are named here; the concept's own come on top. The denoiser is not run."""
        return {"text": len(self.concepts) + len(self.preserve) + self.preserve_empty}

    def check(self, model: Family, *, pairs: int | None, precision: Precision) -> None:
        """Raise `UserError` where a text that is named here has no place in this model to be erased or preserved at."""
        named = [] if self.anchor is None else [self.anchor]
        if self.preserve_tokens != "all":
            named += [*([""] if self.preserve_empty else []), *self.preserve]
        for text in named:
            for span in model.spans(text):
                self._last(span)

    def erase(self, model: Family, concept: Any, *, pairs: Pairs | None, run: Run) -> Delta:
        """Sum up all the texts, then solve once for the layers that read the sequence and once for the pooled text."""
        self.check(model, pairs=None, precision=run.precision)
        erased, preserved = self._texts(concept)
        weights: dict[str, Any] = {name: layer.weight for name, layer in model.layers(SCOPE).items()}
        systems = {
            pooled: Equations({name: one for name, one in weights.items() if (POOLED in name) is pooled})
            for pooled in {POOLED in name for name in weights}
        }
        with run.progress(len(erased) + len(preserved), "uce") as bar:
            for begin in range(0, len(erased), AT_ONCE):
                batch = erased[begin : begin + AT_ONCE]
                for pooled, system in systems.items():
                    rows = [self._rows(model, *pair, pooled=pooled) for pair in batch]
                    system.erase([c for c, _ in rows], [anchor for _, anchor in rows], technique=self.technique)
                bar.update(begin + len(batch))
            for begin in range(0, len(preserved), AT_ONCE):
                kept = preserved[begin : begin + AT_ONCE]
                for pooled, system in systems.items():
                    system.preserve(torch.cat([self._preserved(model, one, pooled=pooled) for one in kept]))
                bar.update(len(erased) + begin + len(kept))
        preserve_scale = self.preserve_scale
        if preserve_scale is None:
            preserve_scale = max(0.1, 1 / max(1, len(preserved)))
        changes: dict[str, Tensor] = {}
        for system in systems.values():
            changes |= system.changes(
                regularization=self.regularization, erase_scale=self.erase_scale, preserve_scale=preserve_scale
            )
        broken = next((name for name, change in changes.items() if not change.isfinite().all()), None)
        if broken is not None:
            raise DivergedError(
                f"the change of {broken} is not finite; lower erase_scale (now {self.erase_scale:g}) or preserve_scale "
                f"(now {preserve_scale:g}), or raise regularization (now {self.regularization:g})"
            )
        relative = [float(change.norm() / weights[name].double().cpu().norm()) for name, change in changes.items()]
        run.log(
            erased=len(erased),
            preserved=len(preserved),
            layers=len(changes),
            change_mean=sum(relative) / len(relative),
            change_most=max(relative),
        )
        return Delta(
            kind="weights",
            component=model.component,
            tensors={f"{name}.weight{DIFFERENCE}": change.float() for name, change in sorted(changes.items())},
            record=made_by("uce", self, model=model, run=run),
        )

    def _texts(self, concept: Any) -> tuple[list[tuple[str, str]], list[str]]:
        """What is erased, with its anchor, and what is preserved; each once."""
        named = [(one, concept.anchor) for one in self.concepts] or concept.targets(self.prompts)
        erased = [(one, anchor if self.anchor is None else self.anchor) for one, anchor in named]
        kept = [*([""] if self.preserve_empty else []), *self.preserve]
        kept += concept.harmless if self.preserve_harmless else ()
        both = {one for one, _ in erased} & set(kept)
        if both:
            raise UserError(f"method.preserve: {min(both)!r} is to be erased, and cannot be preserved; name it once")
        return list(dict.fromkeys(erased)), list(dict.fromkeys(kept))

    def _rows(self, model: Family, text: str, anchor: str, *, pooled: bool) -> tuple[Tensor, Tensor]:
        """The embeddings (rows, width) of a text that are erased, and those of its anchor that stand in for them."""
        both = model.text([text, anchor])
        if pooled:
            assert both.pooled is not None
            return both.pooled[:1], both.pooled[1:]
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for own, other in zip(model.spans(text), model.spans(anchor), strict=True):
            places = (self._last(own), self._last(other))
            for row, place, into in zip(both.embeds, places, chosen, strict=True):
                if self.tokens == "last":
                    into.append(row[place : place + 1])
                elif self.tokens == "from_last":
                    into.append(row[place : place + own.stop - max(places)])
                else:
                    into.append(row[_begin(own) : own.stop])
        return torch.cat(chosen[0]), torch.cat(chosen[1])

    def _preserved(self, model: Family, text: str, *, pooled: bool) -> Tensor:
        """The embeddings (rows, width) of a text that are preserved."""
        found = model.text([text])
        if pooled:
            assert found.pooled is not None
            return found.pooled
        (row,) = found.embeds
        kept = []
        for span in model.spans(text):
            begin = _begin(span) if self.preserve_tokens == "all" else self._last(span)
            kept.append(row[begin : begin + 1 if self.preserve_tokens == "last" else span.stop])
        return torch.cat(kept)

    def _last(self, span: Span) -> int:
        """Where the last word's last token stands, or what counts as that of a text without words."""
        if span.end > span.first:
            return span.end - 1
        if self.of_empty == "end":
            return span.first
        if span.start is None:
            raise UserError('method.of_empty is "start", but this model\'s T5 has no start token; set it to "end"')
        return span.start


class Equations:
    """The sums of the normal equations of layers that read the same embeddings, in float64 on the CPU.

    `weights` are the layers' own, (out, width) each. However many texts are added, what is held are the sums.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = {name: weight.detach().cpu().double() for name, weight in weights.items()}
        width = next(iter(self._weights.values())).shape[1]
        self._erased, self._preserved = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
        self._moved = torch.zeros_like(self._erased)  # Σ (c* − c) cᵀ: to be multiplied by each W
        self._removed: dict[str, Tensor] = {}  # of "tensor": Σ (the part of W c* along W c) cᵀ, for each layer

    def erase(self, texts: Sequence[Tensor], anchors: Sequence[Tensor], *, technique: Technique = "replace") -> None:
        """Add concepts c and their anchors c*, (rows, width) each, row for row.

        The new values v are W c*; "tensor" leaves out their projection on W c, both flattened over the rows.
        """
        c, moved = (torch.cat(list(rows)).detach().cpu().double() for rows in (texts, anchors))
        self._erased += c.T @ c
        self._moved += (moved - c).T @ c
        if technique == "replace":
            return
        lengths = [len(rows) for rows in texts]
        for name, weight in self._weights.items():
            along = []
            olds, news = (torch.split(rows @ weight.T, lengths) for rows in (c, moved))
            for old, new in zip(olds, news, strict=True):
                unit = old / old.norm().clamp(min=torch.finfo(old.dtype).tiny)
                along.append((unit * new).sum() * unit)
            self._removed[name] = self._removed.get(name, torch.zeros_like(weight)) + torch.cat(along).T @ c

    def preserve(self, texts: Tensor) -> None:
        """Add embeddings (rows, width) whose values are to stay."""
        p = texts.detach().cpu().double()
        self._preserved += p.T @ p

    def changes(self, *, regularization: float, erase_scale: float, preserve_scale: float) -> dict[str, Tensor]:
        """W' − W of each layer, (out, width), float64."""
        gram = erase_scale * self._erased + preserve_scale * self._preserved
        gram += regularization * torch.eye(len(gram), dtype=gram.dtype)
        right = {name: weight @ self._moved for name, weight in self._weights.items()}
        for name, removed in self._removed.items():
            right[name] -= removed
        # The matrix is symmetric, and one factorisation serves all layers.
        solved = torch.linalg.solve(gram, erase_scale * torch.cat(list(right.values())).T).T
        return dict(zip(right, torch.split(solved, [len(one) for one in right.values()]), strict=True))


def _begin(span: Span) -> int:
    """Where an encoder's share of the sequence begins."""
    return span.first if span.start is None else span.start
