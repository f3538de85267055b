from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from duo.errors import UserError
from duo.methods import fmn
from duo.methods.fmn import PLACEHOLDER, Fmn, attention, captured, concept_mask, pull_norms, resteering_loss
from duo.plugins import Precision
from duo.recipe import load_recipe
from erasing import check_refused_before_drawing, erase
from recording import RecordingRun
from small_fire import SmallFire, changed, family

QUICK = Fmn(
    images=2,
    inversion_steps=3,
    inversion_vectors=2,
    learning_rate=1e-3,
    max_train_steps=5,
    train_batch_size=2,
    checkpointing_steps=2,
)
U_NETS = ("tiny_sd", "tiny_sd2_v", "tiny_sdxl")


# --- the objective -----------------------------------------------------------------------------------


def test_attention_by_hand() -> None:
    """One pixel, two tokens, two heads of width 1: each head sees its own half of the queries and keys."""
    queries = torch.tensor([[[2.0, 1.0]]])
    keys = torch.tensor([[[math.log(3.0), 0.0], [0.0, math.log(4.0)]]])
    maps = attention(queries, keys, heads=2, scale=0.5)
    assert maps.shape == (1, 2, 1, 2)
    assert maps[0, 0, 0].tolist() == pytest.approx([0.75, 0.25])  # e^(ln 3) : 1
    assert maps[0, 1, 0].tolist() == pytest.approx([1 / 3, 2 / 3])  # 1 : e^(ln 4 / 2)


def test_attention_is_that_of_torch() -> None:
    """Against scaled_dot_product_attention, whose values here are the one-hot tokens, so that it puts the map out."""
    n, heads, width, pixels, length = 3, 2, 4, 5, 7
    queries, keys = torch.randn(n, pixels, heads * width), torch.randn(n, length, heads * width)
    split = [one.unflatten(-1, (heads, width)).transpose(1, 2) for one in (queries, keys)]
    values = torch.eye(length).expand(n, heads, length, length)
    expected = torch.nn.functional.scaled_dot_product_attention(*split, values, scale=0.3)
    assert torch.allclose(attention(queries, keys, heads=heads, scale=0.3), expected, atol=1e-6)


def test_the_loss_by_hand() -> None:
    """Two maps, two rows with other masks: √(0.3² + 0.4² + 0.5²), as the public code has it, or its square."""
    one = torch.tensor([[[[0.3, 0.7]]], [[[0.6, 0.4]]]])
    other = torch.tensor([[[[0.5, 0.5]]], [[[1.0, 0.0]]]])
    mask = torch.tensor([[True, False], [False, True]])
    assert resteering_loss([one, other], mask).item() == pytest.approx(math.sqrt(0.5))
    assert resteering_loss([one, other], mask, squared=True).item() == pytest.approx(0.5)


def test_rows_of_a_batch_have_their_own_masks(tiny_sd) -> None:
    """Squares of a batch are the sum of those of its rows, computed one at a time."""
    names = sorted(name.removesuffix(".to_q") for name in tiny_sd.layers("cross_attention") if name.endswith(".to_q"))
    prompts = ["a photo of burning", "a burning red house on fire"]
    masks = torch.stack(
        [concept_mask(tiny_sd.tokenizer(), one, "burning", vectors=None, use_pooler=False) for one in prompts]
    )
    assert not torch.equal(*masks)
    x_t, t, text = torch.randn(2, *tiny_sd.latent_shape), torch.tensor([200, 700]), tiny_sd.text(prompts)

    def squares(rows: slice) -> torch.Tensor:
        with torch.no_grad(), captured(tiny_sd.denoiser, names) as maps:
            tiny_sd.predict(x_t[rows], t[rows], text[rows])
        assert len(maps) == len(names) > 3
        return resteering_loss(maps, masks[rows], squared=True)

    apart = squares(slice(0, 1)) + squares(slice(1, 2))
    assert squares(slice(0, 2)).item() == pytest.approx(apart.item(), rel=1e-5)
    assert not any(module._forward_hooks for module in tiny_sd.denoiser.modules())


@pytest.mark.parametrize("name", U_NETS)
def test_the_maps_are_those_of_the_denoiser(name: str, request: pytest.FixtureRequest) -> None:
    """Against diffusers' own scores, in a processor that materialises them."""
    from diffusers.models.attention_processor import AttnProcessor

    model = family(name, request)
    names = sorted(one.removesuffix(".to_q") for one in model.layers("cross_attention") if one.endswith(".to_q"))
    x_t, t = torch.randn(2, *model.latent_shape), torch.tensor([300, 600])
    text = model.text(["a burning house", "a boat"])
    with torch.no_grad(), captured(model.denoiser, names) as maps:
        model.predict(x_t, t, text)

    theirs: dict[str, torch.Tensor] = {}
    model.denoiser.set_attn_processor(AttnProcessor())
    for one in names:
        module = model.denoiser.get_submodule(one)

        def scores(*given: Any, _own: Any = module.get_attention_scores, _name: str = one) -> torch.Tensor:
            theirs[_name] = _own(*given)
            return theirs[_name]

        module.get_attention_scores = scores
    with torch.no_grad():
        model.predict(x_t, t, text)
    for one, own in zip(names, maps, strict=True):
        assert torch.allclose(own.flatten(0, 1), theirs[one], atol=1e-5)


# --- masks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sd2_v"])
@pytest.mark.parametrize("word", ["burning", "on fire", "elon-musk"])
@pytest.mark.parametrize("prompt", ["a photo of {}", "a {} red house", "{} and a boat and {}"])
def test_the_mask_is_of_the_words_and_the_first_end_token(
    name: str, word: str, prompt: str, request: pytest.FixtureRequest
) -> None:
    """Against the ids of the whole prompt, whose padding is the end token in one model and "!" in the other."""
    tokenizer = family(name, request).tokenizer()
    assert (tokenizer.pad_token == "!") == (name == "tiny_sd2_v")
    text = prompt.format(word, word)
    ids = tokenizer(text, padding="max_length", max_length=24, truncation=True).input_ids
    own = tokenizer(word, add_special_tokens=False).input_ids
    end = ids.index(tokenizer.eos_token_id)
    starts = [i for i in range(len(ids)) if ids[i : i + len(own)] == own]
    assert len(starts) == prompt.count("{}")
    at = {i + k for i in starts for k in range(len(own))}
    masks = [concept_mask(tokenizer, text, word, vectors=None, use_pooler=use) for use in (True, False)]
    assert masks[0].shape == (24,)
    assert masks[0].nonzero().flatten().tolist() == sorted({*at, end})
    assert masks[1].nonzero().flatten().tolist() == sorted(at)


def test_the_mask_of_a_learned_word_counts_its_vectors(tiny_sd) -> None:
    tokenizer = tiny_sd.tokenizer()
    mask = concept_mask(tokenizer, f"a photo of {PLACEHOLDER} on", PLACEHOLDER, vectors=4, use_pooler=True)
    first = 1 + len(tokenizer("a photo of", add_special_tokens=False).input_ids)
    after = first + 4 + len(tokenizer("on", add_special_tokens=False).input_ids)
    assert mask.nonzero().flatten().tolist() == [*range(first, first + 4), after]


def test_a_caption_cut_off_before_its_word_is_refused(tiny_sd) -> None:
    tokenizer = tiny_sd.tokenizer()
    with pytest.raises(UserError, match="no token of the concept's word 'burning'"):
        concept_mask(tokenizer, "red " * 30 + "burning", "burning", vectors=None, use_pooler=True)
    cut = concept_mask(tokenizer, "red " * 20 + "burning", "burning", vectors=9, use_pooler=True)
    assert cut.nonzero().flatten().tolist() == [21, 22, 23]  # two of the nine, and the end token


def test_norms_are_pulled_by_a_share() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.4]])
    pull_norms(vectors, 1.0, share=0.5)
    assert torch.allclose(vectors, torch.tensor([[1.8, 2.4], [0.0, 0.7]]))


# --- erasing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", U_NETS)
def test_attention_on_the_concept_falls(
    name: str, concept: SmallFire, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = RecordingRun(tmp_path)
    model = family(name, request)
    delta = erase(replace(QUICK, max_train_steps=8), model, concept, run)
    rows = [row["attention"] for row in run.rows]
    assert [row["step"] for row in run.rows] == list(range(1, 9))
    assert sum(rows[-3:]) < 0.8 * sum(rows[:3])
    assert delta.kind == "weights"
    assert delta.record["method"] == "fmn"
    assert not any(one.requires_grad or one.grad is not None for one in model.denoiser.parameters())


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_dits_are_refused(name: str, concept: SmallFire, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with pytest.raises(UserError, match=r"^method fmn is not defined for this family: it has no cross-attention.*\S$"):
        erase(QUICK, family(name, request), concept, RecordingRun(tmp_path))


def test_only_what_is_trained_changes(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    of_cross = {
        f"{name}.{part}"
        for name, module in tiny_sd.layers("cross_attention").items()
        for part, _ in module.named_parameters()
    }
    narrow = erase(replace(QUICK, parameters="cross_attention"), tiny_sd, concept, RecordingRun(tmp_path / "ca"))
    assert {name.removesuffix(".diff") for name in narrow.tensors} == of_cross
    assert changed(tiny_sd, narrow) <= of_cross
    whole = erase(QUICK, tiny_sd, concept, RecordingRun(tmp_path / "full"))
    assert {name.removesuffix(".diff") for name in whole.tensors} == {
        name for name, _ in tiny_sd.denoiser.named_parameters()
    }
    # What comes after the last map has no say in the loss, and so gets no gradient.
    assert {"conv_out.weight", "conv_norm_out.bias"}.isdisjoint(changed(tiny_sd, whole))
    assert {"conv_in.weight", "time_embedding.linear_1.weight"} <= changed(tiny_sd, whole)


def test_the_word_is_learned_and_nothing_else_is(tiny_sd, concept: SmallFire, tmp_path: Path, monkeypatch: Any) -> None:
    kept: list[torch.Tensor] = []
    learned = Fmn._learned_word

    def keep(self: Fmn, model: Any, *given: Any) -> torch.Tensor:
        before = {name: one.clone() for name, one in model.denoiser.state_dict().items()}
        kept.append(learned(self, model, *given))
        assert all(torch.equal(one, before[name]) for name, one in model.denoiser.state_dict().items())
        assert all(one.grad is None for part in model.encoders() for one in part.parameters())
        return kept[-1]

    monkeypatch.setattr(Fmn, "_learned_word", keep)
    erase(replace(QUICK, inversion_vectors=3), tiny_sd, concept, RecordingRun(tmp_path))
    start = QUICK._start(tiny_sd, "burning", seed=5)
    (ids,) = {tuple(tiny_sd.tokenizer()("burning", add_special_tokens=False).input_ids)}
    assert torch.equal(start[: len(ids)], tiny_sd.token_embeddings()[list(ids)][:2])
    (word,) = kept
    assert word.shape == (3, 32)
    assert not torch.allclose(word[0], start[0])
    assert not word.requires_grad
    # Pulled towards 0.4 from about √32 by a tenth of the way at each of three steps.
    expected = 0.4 + (start[0].norm() - 0.4) * 0.9**3
    assert word[0].norm().item() == pytest.approx(expected.item(), abs=0.05)


def test_without_inversion_the_words_are_drawn(tiny_sd, concept: SmallFire, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[list[int]] = []
    own = fmn.resteering_loss

    def look(maps: Any, mask: torch.Tensor, **given: Any) -> torch.Tensor:
        seen.extend(row.nonzero().flatten().tolist() for row in mask)
        return own(maps, mask, **given)

    monkeypatch.setattr(fmn, "resteering_loss", look)
    method = replace(QUICK, inversion_steps=0, max_train_steps=6)
    erase(method, tiny_sd, concept, RecordingRun(tmp_path))
    expected = [
        concept_mask(tiny_sd.tokenizer(), f"a photo of {word}", word, vectors=None, use_pooler=True)
        for word in ("burning", "on fire")
    ]
    assert {tuple(one) for one in seen} == {tuple(one.nonzero().flatten().tolist()) for one in expected}
    assert not (tmp_path / "inversion").exists()


def test_captions_may_be_the_prompts_that_drew_the_images(concept: SmallFire) -> None:
    prompts = [unsafe for unsafe, _ in concept.targets("prompts")]
    words = replace(QUICK, captions="prompts", inversion_steps=0, images=4)
    assert words._captions(concept.words, prompts) == [
        [("a burning red house", "burning")],
        [("a red house on fire", "on fire")],
        [("a burning blue car", "burning")],
        [("a burning red house", "burning")],
    ]
    learned = replace(words, inversion_steps=3, images=2)
    assert learned._captions(concept.words, prompts) == [
        [(f"a {PLACEHOLDER} red house", PLACEHOLDER)],
        [(f"a red house {PLACEHOLDER}", PLACEHOLDER)],
    ]
    with pytest.raises(UserError, match="none of the concept's words"):
        words._captions(concept.words, ["a house aflame"])


def test_a_resumed_erasure_ends_with_the_same_file(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    erase(QUICK, tiny_sd, concept, RecordingRun(tmp_path / "whole")).save(tmp_path / "whole.safetensors")

    class StoppedWhileLearning(RecordingRun):
        def update(self, step: int, **numbers: float) -> None:
            if step == 3 and "loss" in numbers and "attention" not in numbers:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        erase(QUICK, tiny_sd, concept, StoppedWhileLearning(tmp_path / "stopped"))
    assert (tmp_path / "stopped/inversion/checkpoint-0000002.safetensors").exists()
    with pytest.raises(KeyboardInterrupt):
        erase(QUICK, tiny_sd, concept, RecordingRun(tmp_path / "stopped", stop_after=3))
    run = RecordingRun(tmp_path / "stopped")
    erase(QUICK, tiny_sd, concept, run).save(tmp_path / "stopped.safetensors")
    assert run.rows[0]["step"] == 3
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "stopped.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"images": 0}, "images is 0"),
        ({"inversion_steps": -1}, "inversion_steps is -1"),
        ({"inversion_norm": 0.0}, "inversion_norm is 0"),
        ({"captions": "words"}, "captions is 'words'"),
        ({"parameters": "attn"}, "parameters is 'attn'"),
        ({"template": "a photo"}, "template is 'a photo'"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fmn(**changes)


def test_published_values() -> None:
    """Of configs/attn.yaml and configs/ti.yaml in the authors' repository."""
    used = load_recipe("sd14-nudity-fmn").method.make("methods", "method")
    assert (used.learning_rate, used.max_train_steps, used.train_batch_size) == (2e-6, 35, 1)
    assert (used.weight_decay, used.max_grad_norm, used.parameters, used.squared) == (1e-2, 1.0, "full", False)
    assert (used.use_pooler, used.captions, used.template, used.images) == (True, "template", "a photo of {}", 10)
    assert (used.inversion_steps, used.inversion_vectors, used.inversion_learning_rate) == (500, 4, 1e-3)
    assert (used.inversion_weight_decay, used.inversion_norm, used.inversion_batch_size) == (0.1, 0.4, 1)
    assert used == Fmn()


def test_the_demo_recipe_is_ready() -> None:
    recipe = load_recipe("toybox-fire-fmn")
    assert isinstance(recipe.method.make("methods", "method"), Fmn)
    assert (recipe.model, recipe.concept) == ("toybox", "toybox-fire")


def test_passes() -> None:
    counted = replace(QUICK, inversion_batch_size=3).passes(64)
    assert counted == {"denoiser": 9 + 10, "trained": 9 + 10, "text": 9 + 2, "images": 2, "vae": 4}


def test_checkpointed_activations_give_the_same_gradients(tiny_sd, concept: SmallFire, tmp_path: Path) -> None:
    """The hooks are gone when activations are computed again; the maps of the first pass are what counts."""
    method = replace(QUICK, inversion_steps=0, max_train_steps=2)
    plain = erase(method, tiny_sd, concept, RecordingRun(tmp_path / "plain"))
    tiny_sd.denoiser.enable_gradient_checkpointing()
    saving = erase(method, tiny_sd, concept, RecordingRun(tmp_path / "saving"))
    assert all(torch.allclose(one, saving.tensors[name], atol=1e-5) for name, one in plain.tensors.items())


def test_what_cannot_be_trained_is_refused_before_anything_is_drawn(tiny_sd, monkeypatch: pytest.MonkeyPatch) -> None:
    check_refused_before_drawing(QUICK, tiny_sd, monkeypatch)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_check_refuses_dits(name: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(UserError, match="method fmn is not defined for this family"):
        QUICK.check(family(name, request), pairs=None, precision=Precision())


def test_only_the_empty_braces_of_a_template_are_replaced() -> None:
    """As `str.format` reads them, the first would want an x and the second would have no place for the word."""
    for template, caption in (("{} {x}", "burning {x}"), ("a {{}} b", "a {burning} b")):
        method = Fmn(template=template, inversion_steps=0, images=1)
        assert method._captions(["burning"], []) == [[(caption, "burning")]]
