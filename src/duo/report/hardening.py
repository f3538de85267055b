"""What rounds of hardening found and cost: `erase/rounds.json` and the `timings.jsonl` beside it. No torch.

Of an erasure that was made in another run no more is known than what its delta says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duo.errors import UserError
from duo.report.json_fields import Fields, read_object, read_rows
from duo.rundir import RunDir

ROUNDS, TIMINGS = "rounds.json", "timings.jsonl"
SCHEMA = 1  # of rounds.json, that is known here


@dataclass(frozen=True, kw_only=True)
class Counted:
    """How often an attack brought the concept back in `n` images on validation prompts, at its best setting.

    `corrupted` of them show it spoiled, and are not among the `detected`.
    """

    n: int
    detected: int
    corrupted: int
    rate: float
    low: float
    high: float
    setting: str | None


@dataclass(frozen=True, kw_only=True)
class RoundAttack:
    """One attack in one round. Of one that is learned from, `brought_back` of `tried` images may have become pairs.

    `counted` is None where the attack is not defined here.
    """

    row: str
    learned: bool
    tried: int
    brought_back: int
    counted: Counted | None

    @classmethod
    def read(cls, row: Fields) -> RoundAttack:
        learned = row.flag("learned")
        return cls(
            row=row.text("row"),
            learned=learned,
            tried=row.whole("tried") if learned else 0,
            brought_back=row.whole("brought_back") if learned else 0,
            counted=None
            if "not_defined" in row
            else Counted(
                n=row.whole("n", least=1),
                detected=row.whole("detected"),
                corrupted=row.whole("corrupted"),
                rate=row.share("rate"),
                low=row.share("low"),
                high=row.share("high"),
                setting=row.text_or_none("setting"),
            ),
        )


@dataclass(frozen=True, kw_only=True)
class HardeningRound:
    """One round: the pairs that its erasure learned from, what its attacks found, and what it took.

    `kept` are mean, low and high of the metric of unrelated pictures, None where there is no metric. `seconds` and
    `denoiser`, in rows of its passes, are of the whole round, with what was lost where it was stopped.
    """

    number: int
    pairs: int
    added: int
    attacks: tuple[RoundAttack, ...]
    kept: tuple[float, float, float] | None
    seconds: float
    denoiser: int

    def attack(self, row: str) -> RoundAttack | None:
        """One attack of the round."""
        return next((attack for attack in self.attacks if attack.row == row), None)


@dataclass(frozen=True, kw_only=True)
class Hardening:
    """How an erasure was hardened. `rounds` are empty of one that was made in another run.

    `trained` counts the rounds in which pairs were added, `asked` those that the recipe has; `stopped` is why there
    are fewer. `sections` are the rounds as they stand in `report.json`.
    """

    attacks: tuple[str, ...]
    trained: int
    asked: int | None = None
    stopped: str | None = None
    metric: str | None = None
    rounds: tuple[HardeningRound, ...] = ()
    sections: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rows(self) -> tuple[RoundAttack, ...]:
        """The attacks, as they are in the first round."""
        return self.rounds[0].attacks if self.rounds else ()

    def table(self) -> dict[str, Any]:
        """What `report.json` says of it."""
        told = {"attacks": list(self.attacks), "trained": self.trained, "asked": self.asked, "stopped": self.stopped}
        return {**told, "rounds": self.sections}

    @classmethod
    def of(cls, folder: Path, manifest: Fields) -> Hardening | None:
        """That of the run in `folder`, by the manifest of its erasure; None where it was not hardened.

        Raises `UserError` where the rounds are not what the stage wrote.
        """
        stage = RunDir(folder).stage("erase")
        if (stage.folder / ROUNDS).exists():
            path = stage.intact(ROUNDS, manifest.text("rounds") if "rounds" in manifest else None)
            return cls._read(read_object(path), _cost(stage.folder / TIMINGS))
        brought = manifest.table("artefact") if "artefact" in manifest else None
        if brought is None or "hardened" not in brought:
            return None
        told = brought.table("hardened")
        return cls(attacks=tuple(told.texts("attacks")), trained=told.whole("rounds"))

    @classmethod
    def _read(cls, data: Fields, cost: Mapping[int, tuple[float, int]]) -> Hardening:
        if data.whole("schema") != SCHEMA:
            told = f"schema {data.data['schema']} is not known here, only {SCHEMA}"
            raise UserError(f"{data.where}: {told}; use the duo that wrote it")
        rounds, sections, metrics = [], [], []
        for row in data.tables("rounds"):
            number = row.whole("round")
            pairs, kept = row.table("pairs"), row.table_or_none("preservation")
            added = pairs.table("added")
            seconds, denoiser = cost.get(number, (0.0, 0))
            metrics += [] if kept is None else [kept.text("metric")]
            rounds.append(
                HardeningRound(
                    number=number,
                    pairs=pairs.whole("learned_from"),
                    added=sum(added.whole(name) for name in added.data),
                    attacks=tuple(map(RoundAttack.read, row.tables("attacks"))),
                    kept=None if kept is None else (kept.number("mean"), kept.number("low"), kept.number("high")),
                    seconds=seconds,
                    denoiser=denoiser,
                )
            )
            sections.append({**row.data, "seconds": round(seconds, 3), "denoiser": denoiser})
        return cls(
            attacks=tuple(data.texts("attacks")),
            trained=len(rounds) - 1,
            asked=data.whole("asked"),
            stopped=data.text_or_none("stopped"),
            metric=metrics[0] if metrics else None,
            rounds=tuple(rounds),
            sections=sections,
        )


def _cost(path: Path) -> dict[int, tuple[float, int]]:
    """Round → seconds and rows of the denoiser; a resumed part has several rows."""
    cost: dict[int, tuple[float, int]] = {}
    for row in read_rows(path, appended=True) if path.exists() else ():
        seconds, denoiser = cost.get(row.whole("round"), (0.0, 0))
        cost[row.whole("round")] = (seconds + row.number("seconds"), denoiser + row.whole("denoiser"))
    return cost
