"""The model card, `README.md`, with the hub's metadata in front. Written without asking the network anything."""

from __future__ import annotations

from pathlib import Path

from duo.licence import Licence
from duo.models import EMBEDDED
from duo.models import title as called
from duo.report.front_matter import front_matter, results
from duo.report.markdown import fill
from duo.report.own_concept import OwnConcept, portable
from duo.report.records import RunRecords, read_run
from duo.report.toml_text import toml_text
from duo.report.warnings import cautions
from duo.report.wording import concept_word, fell, findings, model_title, no_fall
from duo.rundir import RunDir, write_bytes


def write_card(run: Path) -> Path:
    """Write the card alone into the run folder `run`, and return its path."""
    RunDir(run).require()
    with RunDir(run).locked():
        write_bytes(run / "README.md", render(read_run(run)).encode())
    return run / "README.md"


def render(records: RunRecords) -> str:
    """The text of the card of a run's erased model."""
    scores = records.scores
    concept = concept_word(scores.concept)
    gone = fell(scores)
    title = model_title(called(scores.model), gone=[concept] if gone else [], tried=[] if gone else [concept])
    metadata = front_matter(
        model=scores.model,
        relation="adapter",
        name=title,
        tags=[scores.method],
        results=results(scores),
    )
    return fill(
        "card.md",
        metadata=metadata,
        title=title,
        doubt=no_fall(scores),
        spoils=records.spoils,
        scores=scores,
        called=called(scores.model),
        concept=concept,
        findings=findings(scores),
        cautions=cautions(scores, erasure=records.kind),
        pairs=len(records.pairs),
        kind=records.kind,
        made_by=records.made_by,
        audited=None if records.audited is None else called(records.audited),
        account=records.account,
        config=toml_text(portable(records.recipe)),
        own_concept=OwnConcept.of(records.folder, records.recipe),
        command=records.command,
        licence=Licence.of(scores.model).metadata.get("license"),
        embedded=scores.model in EMBEDDED,
    )
