"""UCE: the closed form against least squares, which embeddings it is given, and what it may not move."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from duo.delta import Delta
from duo.errors import DivergedError, UserError
from duo.methods.uce import Equations, Uce
from duo.plugins import Precision
from duo.recipe import load_recipe
from recording import RecordingRun
from small_fire import FAMILIES, SmallFire, changed, family


def erase(method: Uce, model: Any, concept: Any, folder: Path) -> Delta:
    return method.erase(model, concept, pairs=None, run=RecordingRun(folder))


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def least_squares(
    weight: Tensor, erased: list[tuple[Tensor, Tensor]], kept: Tensor, *, lam: float, s_e: float, s_p: float
) -> Tensor:
    """W' by numpy on the stacked and weighted equations W'c = v, W'p = Wp, W' = W; (c, v) are rows."""
    rows = [np.sqrt(s_e) * c.numpy() for c, _ in erased] + [np.sqrt(s_p) * kept.numpy()]
    values = [np.sqrt(s_e) * v.numpy() for _, v in erased] + [np.sqrt(s_p) * (kept @ weight.T).numpy()]
    rows.append(np.sqrt(lam) * np.eye(weight.shape[1]))
    values.append(np.sqrt(lam) * weight.T.numpy())
    found, *_ = np.linalg.lstsq(np.concatenate(rows), np.concatenate(values), rcond=None)
    return torch.from_numpy(found.T)


@pytest.mark.parametrize("technique", ["replace", "tensor"])
def test_the_closed_form_is_the_least_squares_solution(technique: Any) -> None:
    weights = {"k": drawn(5, 12, seed=0), "v": drawn(7, 12, seed=1)}
    lengths = (3, 1, 2)
    texts = [drawn(n, 12, seed=10 + n) for n in lengths]
    anchors = [drawn(n, 12, seed=20 + n) for n in lengths]
    kept = drawn(4, 12, seed=30)
    system = Equations(weights)
    system.erase(texts[:2], anchors[:2], technique=technique)  # in two batches
    system.erase(texts[2:], anchors[2:], technique=technique)
    system.preserve(kept)
    changes = system.changes(regularization=0.3, erase_scale=2.0, preserve_scale=0.7)
    for name, weight in weights.items():
        pairs = []
        for c, anchor in zip(texts, anchors, strict=True):
            old, new = c @ weight.T, anchor @ weight.T
            if technique == "tensor":
                new = new - (old * new).sum() / (old * old).sum() * old
            pairs.append((c, new))
        wanted = least_squares(weight, pairs, kept, lam=0.3, s_e=2.0, s_p=0.7)
        torch.testing.assert_close(weight + changes[name], wanted, rtol=1e-9, atol=1e-9)


def test_by_hand() -> None:
    """W = 1, c = 1, c* = 3, p = 2: (0.5·1 + 1·3 + 0.25·2·2)/(0.5 + 1 + 0.25·4) = 4.5/2.5 = 1.8."""
    system = Equations({"w": torch.ones(1, 1)})
    system.erase([torch.ones(1, 1)], [torch.full((1, 1), 3.0)])
    system.preserve(torch.full((1, 1), 2.0))
    changes = system.changes(regularization=0.5, erase_scale=1.0, preserve_scale=0.25)
    assert 1 + changes["w"].item() == pytest.approx(1.8)


def test_limits() -> None:
    weight, c, anchor, p = drawn(6, 8, seed=0), drawn(1, 8, seed=1), drawn(1, 8, seed=2), drawn(1, 8, seed=3)

    def edited(**scales: float) -> Tensor:
        system = Equations({"w": weight})
        system.erase([c], [anchor])
        system.preserve(p)
        return (
            weight + system.changes(**{"regularization": 0.5, "erase_scale": 1.0, "preserve_scale": 0.0, **scales})["w"]
        )

    torch.testing.assert_close(edited(regularization=1e-12) @ c.T, weight @ anchor.T, rtol=1e-6, atol=1e-6)
    moved = edited() @ p.T - weight @ p.T
    assert moved.norm() > 0.1
    torch.testing.assert_close(edited(preserve_scale=1e12) @ p.T, weight @ p.T, rtol=1e-6, atol=1e-6)
    assert (edited(preserve_scale=1e12) - weight).norm() > 0.1  # and the concept is erased still
    torch.testing.assert_close(edited(regularization=1e12), weight, rtol=1e-6, atol=1e-6)


def test_nothing_to_erase_changes_nothing() -> None:
    system = Equations({"w": drawn(6, 8, seed=0)})
    system.preserve(drawn(3, 8, seed=1))
    assert torch.equal(
        system.changes(regularization=0.5, erase_scale=1.0, preserve_scale=1.0)["w"], torch.zeros(6, 8).double()
    )


def test_thousands_of_concepts_at_once() -> None:
    weight = drawn(32, 64, seed=0)
    texts, anchors, kept = drawn(2000, 1, 64, seed=1), drawn(2000, 1, 64, seed=2), drawn(500, 64, seed=3)
    began = time.process_time()
    system = Equations({"w": weight})
    for i in range(0, 2000, 16):
        system.erase(list(texts[i : i + 16]), list(anchors[i : i + 16]))
    system.preserve(kept)
    change = system.changes(regularization=0.5, erase_scale=1.0, preserve_scale=0.1)["w"]
    assert time.process_time() - began < 5
    c, v = texts[:, 0], anchors[:, 0] @ weight.T
    eye = torch.eye(64, dtype=torch.float64)
    left = (weight + change) @ (0.5 * eye + c.T @ c + 0.1 * kept.T @ kept)
    right = 0.5 * weight + v.T @ c + 0.1 * weight @ kept.T @ kept
    torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-8)


def cut_last(model: Any, text: str, *, empty: int = 1) -> Tensor:
    """The embedding of a text's last word on SD 1.x, found by the attention mask."""
    tokens = model.tokenizer()(text, padding="max_length", max_length=24, return_tensors="pt")
    last = int(tokens.attention_mask.sum()) - 2 or empty
    return model.text([text]).embeds[:, last]


def test_one_word_takes_its_anchors_values(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    for anchor, of_empty, place in (("a red boat", "end", 1), ("", "end", 1), ("", "start", 0)):
        method = Uce(
            concepts=("burning",),
            anchor=anchor,
            of_empty=of_empty,  # type: ignore[arg-type]
            tokens="last",
            preserve_empty=False,
            regularization=1e-6,
        )
        delta = erase(method, tiny_sd, concept, tmp_path)
        c, to = (cut_last(tiny_sd, text, empty=place) for text in ("burning", anchor))
        for name, layer in tiny_sd.layers("text_inputs").items():
            with torch.no_grad():
                wanted, before = layer(to), layer(c)
                with delta.attached(tiny_sd):
                    torch.testing.assert_close(layer(c), wanted, rtol=1e-3, atol=1e-3)
            assert (wanted - before).abs().max() > 0.01, name


def test_a_change_that_is_no_number_is_told(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"is not finite; lower erase_scale \(now 1e\+308\)"):
        Uce(erase_scale=1e308).erase(tiny_sd, concept, pairs=None, run=RecordingRun(tmp_path))


def test_from_the_last_word_through_the_padding(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    """As one computes it by hand from the published code: rows 2… of the concept beside rows 3… of its anchor."""
    method = Uce(concepts=("on fire",), anchor="a red house", preserve=("a boat",))
    delta = erase(method, tiny_sd, concept, tmp_path)
    c, to, empty, boat = (tiny_sd.text([one]).embeds[0].double() for one in ("on fire", "a red house", "", "a boat"))
    layer = tiny_sd.layers("text_inputs")["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"]
    weight = layer.weight.double()
    wanted = least_squares(weight, [(c[2:23], to[3:] @ weight.T)], torch.cat([empty, boat]), lam=0.5, s_e=1.0, s_p=0.5)
    found = delta.tensors["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight.diff"]
    torch.testing.assert_close(weight + found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_changes_where_the_text_enters_and_nowhere_else(
    name: str, concept: SmallFire, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = family(name, request)
    run = RecordingRun(tmp_path)
    delta = Uce(prompts="prompts", preserve_harmless=True).erase(model, concept, pairs=None, run=run)
    assert changed(model, delta) == {f"{layer}.weight" for layer in model.layers("text_inputs")}
    (row,) = run.rows
    assert (row["erased"], row["preserved"]) == (3, 3)  # "a boat", "a car" and the empty prompt
    assert 0 < row["change_mean"] <= row["change_most"] < 10
    # Each layer's new values of what it reads are nearer to the anchor's, the more so the less λ weighs.
    again = erase(Uce(prompts="prompts", regularization=1e3), model, concept, tmp_path)
    for key in delta.tensors:
        assert again.tensors[key].norm() < delta.tensors[key].norm()


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_transformers_read_t5_at_its_own_words_and_the_pooled_text(
    name: str, concept: SmallFire, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = family(name, request)
    method = Uce(concepts=("burning house",), anchor="blue car", tokens="last", preserve_empty=False)
    delta = erase(replace(method, regularization=1e-7), model, concept, tmp_path)
    both = model.text(["burning house", "blue car"])
    offset = 24 if name == "sd3" else 0  # tokens of CLIP come first
    rows = [offset + 1, 2] if name == "sd3" else [1]  # the second word: T5 has no start token, CLIP has
    with torch.no_grad():
        layers = model.layers("text_inputs")
        context = next(layer for key, layer in layers.items() if key == "context_embedder")
        pooled = next(layer for key, layer in layers.items() if "text_embedder" in key)
        wanted = context(both.embeds[1, rows]), pooled(both.pooled[1:])
        with delta.attached(model):
            torch.testing.assert_close(context(both.embeds[0, rows]), wanted[0], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(pooled(both.pooled[:1]), wanted[1], rtol=1e-3, atol=1e-3)
    # "all" and "from_last" of an empty anchor reach over both encoders' padding.
    for tokens in ("all", "from_last"):
        erase(Uce(tokens=tokens, anchor=""), model, concept, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no start token"):
        erase(Uce(anchor="", of_empty="start"), model, concept, tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_spans_are_where_the_words_stand(name: str, request: pytest.FixtureRequest) -> None:
    """A prompt and a longer one with the same beginning differ, and agree, where the spans say."""
    model = family(name, request)
    short, long = model.spans("a red"), model.spans("a red house")
    both = model.text(["a red house", "a red boat"]).embeds
    differs = (both[0] != both[1]).any(-1).nonzero().flatten()
    assert short[-1].stop == long[-1].stop == both.shape[1]
    assert (long[0].first, long[0].end - short[0].end) == (0 if name == "flux" else 1, 1)
    if name != "flux":  # CLIP is causal: the last word is the first place that differs
        assert differs[0] == long[0].end - 1
    assert [one.end - one.first for one in model.spans("")] == [0] * len(short)
    very_long = model.spans("house " * 600)
    assert all(one.end == one.stop - 1 for one in very_long)


def test_prompts_name_what_they_are_told(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    words = erase(Uce(), tiny_sd, concept, tmp_path)
    same = erase(Uce(concepts=("burning", "on fire"), anchor="intact"), tiny_sd, concept, tmp_path)
    other = erase(Uce(anchor=""), tiny_sd, concept, tmp_path)
    assert all(torch.equal(words.tensors[key], same.tensors[key]) for key in words.tensors)
    assert not any(torch.equal(words.tensors[key], other.tensors[key]) for key in words.tensors)
    assert words.record["config"]["tokens"] == "from_last"
    assert (words.kind, words.record["method"]) == ("weights", "uce")
    with pytest.raises(UserError, match="'burning' is to be erased, and cannot be preserved"):
        erase(Uce(preserve=("burning",)), tiny_sd, concept, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "pairs"}, "prompts is 'pairs', expected one of words, prompts"),
        ({"technique": "swap"}, "technique is 'swap'"),
        ({"tokens": "first"}, "tokens is 'first'"),
        ({"preserve_tokens": "first"}, "preserve_tokens is 'first'"),
        ({"of_empty": "bos"}, "of_empty is 'bos', expected one of end, start"),
        ({"regularization": 0.0}, "regularization is 0"),
        ({"erase_scale": float("nan")}, "erase_scale is nan"),
        ({"regularization": float("inf")}, "regularization is inf, expected a finite number"),
        ({"erase_scale": float("inf")}, "erase_scale is inf"),
        ({"preserve_scale": float("inf")}, "preserve_scale is inf"),
        ({"preserve_scale": -1.0}, "preserve_scale is -1"),
        ({"concepts": ("fire", " ")}, "concepts has an empty text"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Uce(**changes)


def test_the_recipe_has_the_published_values() -> None:
    method = load_recipe("sd14-nudity-uce").method.make("methods", "method")
    assert (method.concepts, method.anchor, method.technique) == (("nudity",), "", "replace")
    assert (method.tokens, method.preserve_tokens, method.preserve_empty) == ("from_last", "all", True)
    assert (method.regularization, method.erase_scale, method.preserve_scale) == (0.5, 1.0, 1.0)
    assert load_recipe("toybox-fire-uce").method.name == "uce"


@pytest.mark.parametrize("changes", [{"anchor": ""}, {"preserve_tokens": "last"}])
def test_a_start_token_that_is_not_there_is_told_early(
    changes: dict[str, Any], tiny_sd, request: pytest.FixtureRequest
) -> None:
    model, method = family("sd3", request), Uce(of_empty="start", **changes)
    with pytest.raises(UserError, match="no start token"):
        method.check(model, pairs=None, precision=Precision())
    method.check(tiny_sd, pairs=None, precision=Precision())
    replace(method, of_empty="end").check(model, pairs=None, precision=Precision())
    # No text without words is asked for its last one.
    Uce(of_empty="start", anchor="intact").check(model, pairs=None, precision=Precision())
