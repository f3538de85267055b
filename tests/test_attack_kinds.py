"""What attempts may be besides prompts: started from images or noise, by other weights, without the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import staged
from duo import rundir
from duo.delta import Delta
from duo.errors import NotDefinedError, UserError
from duo.plugins import Access, Attempt
from duo.stages import attack, erase, make_pairs, score
from duo.stages.rendering import read_images

ROW = """
[[attacks]]
row = "{row}"
name = "{name}"
prompts = "neutral"
images = {images}
"""
SIZE = (64, 64)
INIT = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8))
LEFT = Image.fromarray(np.repeat(np.array([[255] * 32 + [0] * 32], dtype=np.uint8), 64, axis=0))  # white: drawn anew


@dataclass(frozen=True, kw_only=True)
class EveryKind:
    """One attempt of each kind."""

    access: ClassVar[Access] = Access.WEIGHTS

    def prepare(self, target: Any, concept: Any, *, run: Any) -> dict[str, torch.Tensor]:
        name, layer = next(iter(target.layers("feed_forward").items()))
        change = {f"{name}.weight.diff": torch.full_like(layer.weight, 0.05)}
        Delta(kind="weights", component=target.component, tensors=change, record={}).save(
            run.folder / "grown.safetensors"
        )
        return {}

    def search(self, target: Any, state: Any, prompt: str, *, generator: torch.Generator) -> Iterator[Attempt]:
        noise = torch.randn(target.latent_shape, generator=generator)
        yield Attempt(prompt=prompt, variant="plain")
        yield Attempt(prompt=prompt, variant="img2img", init=INIT, strength=0.5, source=INIT)
        yield Attempt(prompt=prompt, variant="inpaint", init=INIT, mask=LEFT, strength=1.0)
        yield Attempt(prompt=prompt, variant="noise", latents=noise)
        yield Attempt(prompt=prompt, variant="grown", weights="grown")
        yield Attempt(prompt=prompt, variant="unloaded", unloaded=True)


@dataclass(frozen=True, kw_only=True)
class Nowhere:
    """An attack that makes no sense on any model."""

    access: ClassVar[Access] = Access.QUERY

    def prepare(self, target: Any, concept: Any, *, run: Any) -> dict[str, torch.Tensor]:
        raise NotDefinedError("nowhere: the tiny model has no where")

    def search(self, target: Any, state: Any, prompt: str, *, generator: torch.Generator) -> Iterator[Attempt]:
        yield Attempt(prompt=prompt)


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """Asks for one image more than it says."""

    access: ClassVar[Access] = Access.QUERY
    queries: int = 2
    asks: int = 2

    def prepare(self, target: Any, concept: Any, *, run: Any) -> dict[str, torch.Tensor]:
        return {}

    def search(self, target: Any, state: Any, prompt: str, *, generator: torch.Generator) -> Iterator[Attempt]:
        for seed in range(self.asks):
            target.generate([prompt], seeds=[seed])
        yield Attempt(prompt=prompt)


@dataclass(frozen=True, kw_only=True)
class Compares:
    """Looks at the model from before the erasure."""

    access: ClassVar[Access] = Access.GRADIENT
    uses_undefended: ClassVar[bool] = True
    seen: ClassVar[list[bool]] = []

    def prepare(self, target: Any, concept: Any, *, run: Any) -> dict[str, torch.Tensor]:
        x_t, t = torch.randn(1, *target.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
        with torch.no_grad():
            ours = target.predict(x_t, t, target.text(["a car"]))
            with target.undefended() as original:
                theirs = original.predict(x_t, t, original.text(["a car"]))
            again = target.predict(x_t, t, target.text(["a car"]))
        assert torch.equal(ours, again)
        self.seen.append(torch.equal(ours, theirs))
        return {}

    def search(self, target: Any, state: Any, prompt: str, *, generator: torch.Generator) -> Iterator[Attempt]:
        yield Attempt(prompt=prompt)


@pytest.fixture
def leaves(quick_leaves: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, leaf in {"every": EveryKind, "nowhere": Nowhere, "greedy": Greedy, "compares": Compares}.items():
        monkeypatch.setitem(staged.LEAVES, ("attacks", name), leaf)
    Compares.seen.clear()


def erased_with(open_session: Any, name: str, *, images: int = 12, row: str = "extra") -> Any:
    session = open_session(more=ROW.format(row=row, name=name, images=images))
    make_pairs(session)
    erase(session)
    return session


def test_every_kind_is_rendered_as_it_says(leaves: None, open_session: Any) -> None:
    session = erased_with(open_session, "every")
    attack(session)
    folder = session.dir.path / "attack" / "extra"
    rows = rundir.read_jsonl(folder / "erased" / "attempts.jsonl")
    before, after = (read_images(folder / model / "images", 12) for model in ("original", "erased"))
    of = {row["variant"]: row["index"] for row in rows if row["base_prompt"] == "a car"}
    seed = {row["index"]: row["seed"] for row in rows}

    def pixels(image: Image.Image) -> Any:
        return np.asarray(image).astype(int)

    plain, inpainted, grown = (pixels(after[of[name]]) for name in ("plain", "inpaint", "grown"))
    assert np.abs(pixels(after[of["unloaded"]]) - pixels(before[of["unloaded"]])).max() == 0, "without the LoRA"
    assert np.abs(plain - pixels(before[of["plain"]])).max() > 0
    assert np.abs(inpainted[:, 32:] - pixels(INIT)[:, 32:]).max() == 0, "what is black in the mask stays"
    assert np.abs(inpainted[:, :32] - pixels(INIT)[:, :32]).max() > 0
    with session.as_model("erased") as model:
        change = Delta.load(folder / "erased" / "grown.safetensors")
        with change.attached(model):
            again = model.generate(["a car"], seeds=[seed[of["grown"]]], sampling=session.recipe.sampling)[0]
        edited = model.edit(
            [INIT], ["a car"], strength=0.5, seeds=[seed[of["img2img"]]], sampling=session.recipe.sampling
        )[0]
    assert np.abs(pixels(again) - grown).max() <= 1  # another batch
    assert np.abs(pixels(edited) - pixels(after[of["img2img"]])).max() <= 1
    digests = rows[of["img2img"]]["digests"]
    assert set(digests) == {"init", "source"} and len(digests["init"]) == 64


def test_what_is_scored_of_variants_and_sources(leaves: None, open_session: Any) -> None:
    session = erased_with(open_session, "every")
    attack(session)
    result = score(session)
    row = next(one for one in result["attacks"] if (one["name"], one["model"]) == ("extra", "erased"))
    assert [one["variant"] for one in row["variants"]] == [
        "plain", "img2img", "inpaint", "noise", "grown", "unloaded"
    ]  # fmt: skip
    assert {one["variant"] for one in row["variants"] if "psnr" in one} == {"img2img"}
    assert (row["k"], row["prompts"]) == (6, 2)


def test_an_attack_that_is_not_defined_has_a_reason_in_place_of_a_row(leaves: None, open_session: Any) -> None:
    session = erased_with(open_session, "nowhere")
    attack(session)
    result = score(session)
    assert result["not_defined"] == [{"name": "extra", "reason": "nowhere: the tiny model has no where"}]
    assert "extra" not in {row["name"] for row in result["attacks"]}
    assert not (session.dir.path / "attack" / "extra" / "erased" / "images").exists()
    attack(session)  # it is finished


def test_a_search_may_ask_for_as_many_images_as_it_says(leaves: None, open_session: Any) -> None:
    from duo.target import QueryLimitError

    session = erased_with(open_session, "greedy")
    attack(session)
    rows = rundir.read_jsonl(session.dir.path / "attack" / "extra" / "erased" / "attempts.jsonl")
    assert {row["queries"] for row in rows} == {2}
    other = open_session("other", "attacks.extra.asks=3", more=ROW.format(row="extra", name="greedy", images=2))
    make_pairs(other)
    erase(other)
    with pytest.raises(QueryLimitError, match="1 images asked for, 0 of 2 left"):
        attack(other)


def test_the_undefended_model_is_lent_to_those_who_say_so(leaves: None, open_session: Any) -> None:
    session = erased_with(open_session, "compares")
    attack(session)
    assert Compares.seen == [True, False]


def test_the_reference_that_never_saw_the_concept(leaves: None, open_session: Any, monkeypatch: Any) -> None:
    from duo.stages import session as module

    session = open_session("run", 'reference="never"')
    assert session.models == ("original", "erased", "never")
    monkeypatch.setattr(module, "load_family", lambda *_, **__: session.model)
    make_pairs(session)
    erase(session)
    attack(session)
    result = score(session)
    rows = {(row["name"], row["model"]): row for row in result["attacks"]}
    never, original = rows["prompts", "never"], rows["prompts", "original"]
    assert never["detected"] == original["detected"], "here it is the original model itself"
    excess = rows["prompts", "erased"]["excess"]
    assert excess["rate"] == pytest.approx(rows["prompts", "erased"]["rate"] - never["rate"])


def test_a_killed_attack_with_images_goes_on_to_the_same_bytes(leaves: None, open_session: Any, tmp_path: Any) -> None:
    whole = erased_with(open_session, "every")
    attack(whole)
    folder = whole.dir.path / "attack" / "extra" / "erased"
    before = staged.contents(folder)
    (folder / "manifest.json").rename(folder / "kept.json")
    record = rundir.read_json(folder / "kept.json")
    rundir.write_json(folder / "partial.json", {"config": record["config"]})
    (folder / "kept.json").unlink()
    for name in ("attempts.jsonl", "images/0003.png", "images/0007.png", "search/0001.safetensors"):
        (folder / name).unlink()
    attack(whole)
    assert staged.contents(folder) == before


def test_an_attempt_that_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="init and strength go together"):
        Attempt(prompt="", strength=0.5)
    with pytest.raises(ValueError, match="give init too"):
        Attempt(prompt="", mask=LEFT)
    with pytest.raises(ValueError, match="give them, or init"):
        Attempt(prompt="", latents=torch.zeros(4, 8, 8), init=INIT, strength=0.5)


def test_weights_that_are_missing_are_told(leaves: None, open_session: Any) -> None:
    session = erased_with(open_session, "every")
    attack(session)
    folder = session.dir.path / "attack" / "extra" / "erased"
    record = rundir.read_json(folder / "manifest.json")
    rundir.write_json(folder / "partial.json", {"config": record["config"]})
    (folder / "manifest.json").unlink()
    (folder / "grown.safetensors").unlink()
    for path in (folder / "images").glob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"grown\.safetensors"):
        attack(session)


FOUND = """
[[attacks]]
row = "again"
name = "img2img"
prompts = "neutral"
images = 2
strengths = [0.5]
ask = "adversarial"
found_by = "{by}"
"""


def test_prompts_that_one_row_found_are_asked_by_another(leaves: None, open_session: Any) -> None:
    session = open_session(more=FOUND.format(by="bell"))
    make_pairs(session)
    erase(session)
    attack(session)
    folder = session.dir.path / "attack"
    for model in ("original", "erased"):
        asked = {row["prompt"] for row in rundir.read_jsonl(folder / "again" / model / "attempts.jsonl")}
        found = {row["prompt"] for row in rundir.read_jsonl(folder / "bell" / model / "attempts.jsonl")}
        assert asked <= found
        assert rundir.read_json(folder / "again" / model / "manifest.json")["search_shared"] is False
    with pytest.raises(
        UserError, match=r"attacks\.again\.found_by is 'nobody'; name an attack row that stands before it"
    ):
        open_session("other", more=FOUND.format(by="nobody"))
