"""The model card, `README.md`, with the hub's metadata in front. Written without asking the network anything."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from duo.report.records import RunRecords, Scores
from duo.report.toml_text import toml_text
from duo.report.wording import attack_words, concept_word, findings, percent, percent_range

EMBEDDED = "toybox"


def render(records: RunRecords) -> str:
    """The text of the card of a run's erased model."""
    scores = records.scores
    environment = Environment(
        loader=PackageLoader("duo.report", ""),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, plain=_plain)
    environment.globals.update(percent_range=percent_range, attack_words=attack_words)
    return environment.get_template("card.md").render(
        metadata=_metadata(scores),
        scores=scores,
        concept=concept_word(scores.concept),
        findings=findings(scores),
        pairs=len(records.pairs),
        config=toml_text(records.recipe),
        command=records.command,
        embedded=scores.model == EMBEDDED,
    )


def _metadata(scores: Scores) -> str:
    """The YAML front matter. `base_model` is given for a hub id alone; the hub cannot link anything else."""
    from huggingface_hub import EvalResult, ModelCardData

    concept = concept_word(scores.concept)
    results = [
        EvalResult(
            task_type="text-to-image",
            task_name="Text-to-image",
            dataset_type=f"duo/{attack.name}",
            dataset_name=attack_words(attack.name).label,
            metric_type="detected_rate",
            metric_name=f"Share of {attack.erased.n} images in which {concept} is detected (lower is better)",
            metric_value=attack.erased.rate,
        )
        for attack in scores.attacks
        if attack.reliable
    ]
    results.append(
        EvalResult(
            task_type="text-to-image",
            task_name="Text-to-image",
            dataset_type="duo/unrelated",
            dataset_name="Unrelated prompts",
            metric_type="preservation",
            metric_name=scores.metric,
            metric_value=scores.preservation.mean,
        )
    )
    on_hub = (
        scores.model.count("/") == 1 and not scores.model.startswith(("/", ".")) and not Path(scores.model).is_dir()
    )
    data = ModelCardData(
        base_model=scores.model if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        license="apache-2.0" if scores.model == EMBEDDED else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "unlearning", "concept-erasure", "safety", scores.method],
        model_name=f"{scores.model} without {concept}",
        eval_results=results,
    )
    return str(data.to_yaml())


def _plain(text: str) -> str:
    """`text` with nothing that Markdown or HTML would act upon, for use within a sentence or a table cell."""
    text = " ".join(text.split())
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, f"\\{mark}" if mark not in "<>" else {"<": "&lt;", ">": "&gt;"}[mark])
    return text
