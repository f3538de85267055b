"""The YAML in front of a model card: the hub's metadata, with what was measured as its `model-index`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from duo.licence import Licence
from duo.models import hub_id
from duo.report.plain_text import visible
from duo.report.records import Scores
from duo.report.wording import attack_words, concept_word, name_shown

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TAGS = ("text-to-image", "unlearning", "concept-erasure", "safety")


def front_matter(*, model: str, relation: str, name: str, tags: Sequence[str], results: Sequence[EvalResult]) -> str:
    """The YAML of a card for what was made of the base `model`; `relation` is the hub's word for how.

    `base_model` is given for a hub id alone, as the hub cannot link anything else. The licence is the base model's,
    where its card lies on this machine and names one.
    """
    from huggingface_hub import ModelCardData

    base = hub_id(model)
    licence: dict[str, Any] = dict(Licence.of(model).metadata)
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else relation,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*TAGS, *map(visible, tags)],
        model_name=name if results else None,  # part of the model-index, and of nothing else
        eval_results=list(results) or None,
        **licence,
    )
    return str(data.to_yaml())


def results(scores: Scores) -> list[EvalResult]:
    """What was measured of the erased model: the rows of attacks that worked on the original, and what was kept."""
    found = [
        detected(attack.name, scores.concept, n=attack.erased.top.n, rate=attack.erased.top.rate)
        for attack in scores.attacks
        if attack.reliable
    ]
    kept = scores.preservation
    if kept is not None:
        found.append(
            _result(
                "unrelated", "Unrelated prompts", kind="preservation", name=name_shown(kept.metric), value=kept.mean
            )
        )
    return found


def detected(row: str, concept: str, *, n: int, rate: float) -> EvalResult:
    """The share of an attack's images in which a judge sees the concept."""
    name = f"Share of {n} images in which {concept_word(concept)} is detected (lower is better)"
    return _result(row, attack_words(row).label, kind="detected_rate", name=name, value=rate)


def _result(row: str, label: str, *, kind: str, name: str, value: float) -> EvalResult:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-to-image",
        task_name="Text-to-image",
        dataset_type=f"duo/{visible(row)}",
        dataset_name=label,
        metric_type=kind,
        metric_name=name,
        metric_value=value,
    )
