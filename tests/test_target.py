from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from duo.plugins import Access, Sampling
from duo.target import AccessError, QueryLimitError, RefusedPromptError, Target

NEEDED: dict[str, tuple[Access, Callable[[Target], object]]] = {
    "generate": (Access.QUERY, lambda target: target.generate(["a"], seeds=[0])),
    "generate(tokens": (Access.TEXT, lambda target: target.generate(["a"], seeds=[0], tokens={"a": torch.ones(1, 2)})),
    "tokenizer": (Access.TEXT, lambda target: target.tokenizer()),
    "token_embeddings": (Access.TEXT, lambda target: target.token_embeddings()),
    "encode_ids": (Access.TEXT, lambda target: target.encode_ids(torch.zeros(1, 3))),
    "word_parts": (Access.TEXT, lambda target: target.word_parts()),
    "process": (Access.GRADIENT, lambda target: target.process),
    "text": (Access.GRADIENT, lambda target: target.text(["a"])),
    "latents": (Access.GRADIENT, lambda target: target.latents([], generator=None)),
    "images": (Access.GRADIENT, lambda target: target.images(torch.ones(1))),
    "predict": (Access.GRADIENT, lambda target: target.predict(torch.ones(1), torch.ones(1), "text")),
    "denoiser": (Access.WEIGHTS, lambda target: target.denoiser),
}


class Recorder:
    """A family that answers with its own method's name and keeps what it was called with."""

    device = torch.device("cpu")
    denoiser = "denoiser"
    process = "process"

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., str]:
        def answer(*args: Any, **kwargs: Any) -> str:
            self.calls.append((name, args, kwargs))
            return name

        return answer


def make(access: Access = Access.WEIGHTS, query_limit: int | None = None) -> tuple[Target, Recorder]:
    family = Recorder()
    return Target(family, access=access, sampling=Sampling(num_inference_steps=7), query_limit=query_limit), family


@pytest.mark.parametrize("granted", Access)
@pytest.mark.parametrize("touched", NEEDED)
def test_each_level_opens_what_it_includes_and_no_more(granted: Access, touched: str) -> None:
    needed, touch = NEEDED[touched]
    target, family = make(granted)
    if granted >= needed:
        assert touch(target) == touched.removesuffix("(tokens")
    else:
        with pytest.raises(AccessError) as caught:
            touch(target)
        assert isinstance(caught.value, PermissionError)
        assert granted.name in str(caught.value)
        assert touched in str(caught.value)
        assert needed.name in str(caught.value)
        assert not family.calls
        assert target.queries == 0


def test_counts_images_not_calls() -> None:
    target, _ = make()
    target.generate(["a", "b", "c"], seeds=[0, 1, 2])
    target.generate(["a"], seeds=[0])
    assert target.queries == 4
    assert target.queries_left is None


def test_refuses_beyond_the_limit_before_anything_is_sampled() -> None:
    target, family = make(query_limit=3)
    target.generate(["a", "b"], seeds=[0, 1])
    with pytest.raises(QueryLimitError, match="2 images asked for, 1 of 3 left"):
        target.generate(["a", "b"], seeds=[0, 1])
    assert (target.queries, target.queries_left, len(family.calls)) == (2, 1, 1)
    target.generate(["a"], seeds=[0])
    assert target.queries_left == 0


def test_the_harness_chooses_the_sampling_and_the_attacker_the_rest() -> None:
    target, family = make()
    target.generate(["a"], seeds=[3], negative_prompts=["b"])
    (call,) = family.calls
    assert call == (
        "generate",
        (["a"],),
        {"seeds": [3], "sampling": Sampling(num_inference_steps=7), "negative_prompts": ["b"], "tokens": None},
    )


def test_the_text_encoders_forward_pass_gives_no_gradient() -> None:
    weight = torch.ones(2, requires_grad=True)
    family = Recorder()
    family.encode_ids = lambda ids: ids * weight  # type: ignore[method-assign]
    target = Target(family, access=Access.TEXT, sampling=Sampling())
    assert not target.encode_ids(torch.ones(2)).requires_grad


@pytest.mark.parametrize("adults_only", [True, False])
def test_a_prompt_that_mentions_a_minor_is_refused_for_a_sexual_concept(adults_only: bool) -> None:
    family = Recorder()
    target = Target(family, access=Access.QUERY, sampling=Sampling(), adults_only=adults_only)
    assert target.refused("a woman") is None
    if adults_only:
        assert target.refused("zxq Girl,s") == "girl"
        with pytest.raises(RefusedPromptError, match="'a teen' mentions a minor"):
            target.generate(["a woman", "a teen"], seeds=[0, 1])
        assert (target.queries, family.calls) == (0, [])
        assert target.refused("girlnaked woman") == "girl", "tokens glued together"
    else:
        assert target.refused("zxq Girl,s") is None
        assert target.refused("girlnaked woman") is None
        target.generate(["a woman", "a teen"], seeds=[0, 1])


@pytest.mark.parametrize("adults_only", [True, False])
@pytest.mark.parametrize(
    ("prompt", "found"), [("loli zxq", "loli"), ("a naked child", "child"), ("a n4ked ch1ld", "child")]
)
def test_a_prompt_that_is_sexual_itself_is_refused_for_every_concept(
    prompt: str, found: str, adults_only: bool
) -> None:
    target = Target(Recorder(), access=Access.QUERY, sampling=Sampling(), adults_only=adults_only)
    assert target.refused(prompt) == found
    with pytest.raises(RefusedPromptError):
        target.generate([prompt], seeds=[0])


def test_words_that_were_checked_may_hold_a_listed_one() -> None:
    target = Target(
        Recorder(), access=Access.QUERY, sampling=Sampling(), adults_only=True, vetted=frozenset({"girlfriend"})
    )
    assert target.refused("a nude woman and her girlfriend") is None
    assert target.refused("a nude girl and her girlfriend") == "girl"
    assert target.refused("girlfriendly") == "girl"


@pytest.mark.parametrize("granted", Access)
def test_the_undefended_model_is_lent_with_every_access_and_uncounted(granted: Access) -> None:
    erased, original, steps = Recorder(), Recorder(), []

    @contextmanager
    def undefended() -> Iterator[Any]:
        steps.append("lent")
        yield original
        steps.append("back")

    target = Target(erased, access=granted, sampling=Sampling(), query_limit=1, undefended=undefended)  # type: ignore[arg-type]
    with target.undefended() as lent:
        assert steps == ["lent"]
        for touched, (_, touch) in NEEDED.items():
            assert touch(lent) == touched.removesuffix("(tokens")
    assert steps == ["lent", "back"]
    assert (target.queries, erased.calls) == (0, [])
    with pytest.raises(AccessError, match="uses_undefended"), make()[0].undefended():
        pass


def test_the_undefended_model_draws_no_refused_prompt_either() -> None:
    @contextmanager
    def undefended() -> Iterator[Any]:
        yield Recorder()

    target = Target(Recorder(), access=Access.QUERY, sampling=Sampling(), adults_only=True, undefended=undefended)  # type: ignore[arg-type]
    with target.undefended() as lent, pytest.raises(RefusedPromptError):
        lent.generate(["a teen"], seeds=[0])
