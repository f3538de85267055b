"""The model card, `README.md`, with the hub's metadata in front. Written without asking the network anything."""

from __future__ import annotations

from duo.licence import Licence
from duo.models import EMBEDDED, title
from duo.report.front_matter import front_matter, results
from duo.report.markdown import fill
from duo.report.records import RunRecords
from duo.report.toml_text import toml_text
from duo.report.wording import concept_word, findings


def render(records: RunRecords) -> str:
    """The text of the card of a run's erased model."""
    scores = records.scores
    concept = concept_word(scores.concept)
    metadata = front_matter(
        model=scores.model,
        relation="adapter",
        name=f"{title(scores.model)} without {concept}",
        tags=[scores.method],
        results=results(scores),
    )
    return fill(
        "card.md",
        metadata=metadata,
        scores=scores,
        title=title(scores.model),
        concept=concept,
        findings=findings(scores),
        pairs=len(records.pairs),
        kind=records.kind,
        account=records.account,
        config=toml_text(records.recipe),
        command=records.command,
        licence=Licence.of(scores.model).metadata.get("license"),
        embedded=scores.model in EMBEDDED,
    )
