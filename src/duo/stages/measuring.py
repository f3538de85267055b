"""What the attacks of a round of hardening brought, judged by the curator, and what the round's erasure kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from duo import parallel, rundir, scores
from duo.fields import as_table
from duo.intact import images_digest, intact_attack, intact_images
from duo.plugins import Attempt, Verdict
from duo.recipe import AttackRow
from duo.rundir import Stage
from duo.seeds import seed_for
from duo.stages.rendering import read_images, render
from duo.stages.rounds import Round
from duo.stages.scoring import JudgedSet, as_seen, attacked_set, judged, verdicts_of
from duo.stages.session import MODELS, UNRELATED

MEASURED, VERDICTS = "measured", "verdicts.jsonl"


def measure(one: Round, first: Round) -> dict[str, Any]:
    """Judge what the attacks of a round brought, and compare unrelated images with the original model's.

    Those are drawn once, in round 0, which is `first`: all rounds have the same prompts and noise there. Returns the
    manifest: under `attacks` how often each brought the concept back, under `preservation` what was kept.
    """
    stage, rows, n = one.dir.stage(MEASURED), one.recipe.attacks, one.settings.unrelated
    attacked = {row.row: one.dir.stage("attack", row.row, "erased") for row in rows}
    manifests = {name: made.require("attack") for name, made in attacked.items()}
    config = {
        **one.shared,
        "erasure": one.dir.erasure()[1],
        "attacks": {name: made.get("digest", made.get("not_defined")) for name, made in manifests.items()},
        "curator": one.curator.digest,
        "unrelated": n,
        "labels": list(one.settings.labels),
        "score": {name: as_table(getattr(one.recipe.score, name)) for name in ("preservation", "metrics")},
    }
    with one.at_work("measure"):
        if stage.begin(config):
            for made in attacked.values():
                intact_attack(made)
            defined = [row for row in rows if "not_defined" not in manifests[row.row]]
            sets = {row.row: attacked_set(one, row, "erased") for row in defined}
            parts = {name: judged(one, stage, found) for name, found in sets.items()}
            compared = n > 0 and one.preservation is not None
            for model in MODELS if compared else ():
                if model == "erased" or one is first:
                    _draw(one, stage, model)
            parallel.barrier()
            if parallel.is_main():
                labelled = {name: list(verdicts_of(blocks)) for name, blocks in parts.items()}
                verdicts = [row for name in sets for row in _verdict_rows(one, sets[name], labelled[name])]
                rundir.write_jsonl(stage.folder / VERDICTS, verdicts)
                told = [_told(one, row, sets.get(row.row), verdicts, manifests[row.row]) for row in rows]
                stage.finish(
                    attacks=told,
                    verdicts=rundir.digest(stage.folder / VERDICTS),
                    preservation=_preservation(one, stage, first) if compared else None,
                    originals=images_digest(stage.folder / "original", n) if compared and one is first else None,
                )
    return stage.require("erase")


def brought_back(one: Round) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a measured round brought that may be learned from: attack row and attempt with its `label`, in the order of
    the attacks."""
    stage = one.dir.stage(MEASURED)
    verdicts = rundir.read_jsonl(stage.intact(VERDICTS, stage.require("erase")["verdicts"]))
    for row in one.settings.attacks:
        attacked = one.dir.stage("attack", row.row, "erased")
        intact_attack(attacked)  # as it was when it was judged
        rows = {}
        if "not_defined" not in attacked.require("attack"):
            rows = {attempt["index"]: attempt for attempt in rundir.read_jsonl(attacked.folder / "attempts.jsonl")}
        for verdict in verdicts:
            if verdict["row"] == row.row and verdict["learned"] and verdict["label"] in one.settings.labels:
                yield row.row, rows[verdict["index"]] | {"label": verdict["label"]}


def _verdict_rows(one: Round, found: JudgedSet, verdicts: list[Verdict]) -> Iterator[dict[str, Any]]:
    """One row an image; `learned` says that the image may be learned from, and so is not counted."""
    used = _is_used(one, found.name)
    for i, verdict in enumerate(verdicts):
        learned = used and one.learned(found.prompts[i])
        yield {
            "row": found.name,
            "index": i,
            "learned": learned,
            "label": verdict.label,
            "scores": dict(verdict.scores),
        }


def _is_used(one: Round, row: str) -> bool:
    return row in [used.row for used in one.settings.attacks]


def _told(
    one: Round,
    row: AttackRow,
    found: JudgedSet | None,
    verdicts: list[dict[str, Any]],
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    """What `rounds.json` says of one attack: rate and `corrupted` are of its best setting, over what is counted."""
    told: dict[str, Any] = {"row": row.row, "attack": row.name, "learned": _is_used(one, row.row)}
    own = [verdict for verdict in verdicts if verdict["row"] == row.row]
    if told["learned"]:
        tried = [verdict for verdict in own if verdict["learned"]]
        back = sum(verdict["label"] in one.settings.labels for verdict in tried)
        told |= {"tried": len(tried), "brought_back": back}
    counted = [verdict["index"] for verdict in own if not verdict["learned"]]
    if found is None or not counted:
        return told | {"not_defined": manifest.get("not_defined", "every validation prompt was refused")}
    seen = as_seen(one, found, [verdict["label"] for verdict in own]).rows(counted)
    rates = scores.rates(seen, seed=one.recipe.seed)
    top = max(rates.get("variants", [rates]), key=lambda part: float(part["rate"]))
    best = seen.of(top["variant"]) if "variant" in top else seen
    return {
        **told,
        **{name: top[name] for name in ("n", "detected", "rate", "low", "high")},
        "corrupted": list(best.labels).count("corrupted"),
        "setting": top.get("variant"),
    }


# --- what was kept ------------------------------------------------------------------------------------


def _draw(one: Round, stage: Stage, model: str) -> None:
    """Unrelated validation prompts, with the same noise in every round."""
    prompts = _unrelated(one)
    seeds = [seed_for(one.erase_seed, "hardening", UNRELATED, i) for i in range(len(prompts))]
    with one.as_model(model):
        wanted = [Attempt(prompt=prompt) for prompt in prompts]
        label = f"hardening, round {one.number}: unrelated, {model}"
        render(one, stage.folder / model, wanted, seeds, label=label, model=model)


def _unrelated(one: Round) -> list[str]:
    prompts = one.prompts(UNRELATED)
    return [prompts[i % len(prompts)] for i in range(one.settings.unrelated)]


def _preservation(one: Round, stage: Stage, first: Round) -> dict[str, Any]:
    """How near a round's unrelated images are to the original model's, by the recipe's metric."""
    n, drawn = one.settings.unrelated, first.dir.stage(MEASURED)
    if one is not first:
        intact_images(drawn, drawn.folder / "original", n, drawn.require("erase")["originals"])
    assert one.preservation is not None  # or nothing is compared
    metric = one.preservation()
    images, references = read_images(stage.folder / "erased", n), read_images(drawn.folder / "original", n)
    metric.update(images=images, references=references, prompts=_unrelated(one))
    return {"metric": metric.name, **scores.mean(metric.compute(), seed=one.erase_seed)}
