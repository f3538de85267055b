"""Which of a run's images the page shows, and which it links. No torch.

The records are streamed, for a large run has 10⁵ rows of them: what is kept grows with what is shown; of the other
images in which the concept was seen only the number and the path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path, PurePath

from duo.errors import UserError
from duo.report.json_fields import Fields, read_rows
from duo.report.records import LABELS, MODELS, REFERENCE, Attack, Scores
from duo.rundir import ANEW

SHOWN_PER_SET = 6
WORST = 500  # images in which the concept came back that are embedded; the rest are linked

Key = tuple[str, str, int]  # set, model, index


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One scored image. `labels` are the judges' words; `survived` is of near misses alone, None elsewhere.

    `prompt` is what the model was given and `base_prompt` what an attack started from; `variant` is the attack's
    setting, and `score` the judge's for the concept, where it gave one.
    """

    path: Path
    set: str
    model: str
    index: int
    labels: tuple[str, ...]
    prompt: str
    seed: int
    survived: bool | None = None
    base_prompt: str | None = None
    variant: str = ""
    score: float | None = None

    @property
    def judged_absent(self) -> bool:
        """Whether it was judged at all and no judge saw the concept, whole or spoiled."""
        return bool(self.labels) and set(self.labels) == {"absent"}


@dataclass(frozen=True, kw_only=True)
class Returns:
    """The images of one attack in which the concept was seen on the erased model.

    The `worst` are those of which the judge is surest, the surest first; `rest` are the files of the others, relative
    to the run folder.
    """

    attack: Attack
    worst: tuple[Picture, ...]
    rest: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """`grids` maps a set of prompts to its first images of the original and the erased model at the same seeds."""

    grids: Mapping[str, tuple[tuple[Picture, Picture], ...]]
    returns: tuple[Returns, ...]

    @property
    def embedded(self) -> int:
        return sum(len(one.worst) for one in self.returns)

    @property
    def linked(self) -> int:
        return sum(len(one.rest) for one in self.returns)


def read_gallery(folder: Path, scores: Scores, *, returned: Sequence[Attack], most: int = WORST) -> Gallery:
    """Choose from the records of a scored run; `returned` are the attacks that brought the concept back, worst first.

    At most `most` of the images in which it came back are chosen, from each attack in turn.

    Raises:
        UserError: a record is missing or broken; names the file and the field.
    """
    heads = {attack.name: _heads(folder, attack) for attack in scores.attacks}
    verdicts = _Verdicts(
        labels={
            (name, model, row.whole("index")): []
            for name, pairs in heads.items()
            for pair in pairs
            for model, row in zip(MODELS, pair, strict=True)
        },
        present={attack.name: {} for attack in returned},
        attacks=frozenset(scores.baselines),
    )
    for row in read_rows(folder / "score" / "verdicts.jsonl"):
        verdicts.add(row)
    grids = {
        name: tuple(
            (_attempted(folder, name, "original", one, verdicts), _attempted(folder, name, "erased", other, verdicts))
            for one, other in pairs
        )
        for name, pairs in heads.items()
    }
    grids |= {
        name: _probed(folder, name, verdicts) for name in dict.fromkeys(name for name, _ in sorted(verdicts.probed))
    }
    return Gallery(
        grids={name: cells for name, cells in grids.items() if cells},
        returns=_returns(folder, returned, verdicts, most=most),
    )


@dataclass(kw_only=True)
class _Verdicts:
    """What is kept of `verdicts.jsonl` as it is read, row by row.

    Attributes:
        labels: of the attacks' images that are chosen already.
        present: attack → the erased model's images in which a judge saw the concept, each with the highest score.
        probed: (set, model) of prompts that are no attack's → its first rows, with all their labels.
    """

    labels: dict[Key, list[str]]
    present: dict[str, dict[int, float]]
    attacks: frozenset[str]
    probed: dict[tuple[str, str], dict[int, tuple[Fields, list[str]]]] = field(default_factory=dict)

    def add(self, row: Fields) -> None:
        name, model, index = row.text("set"), row.one_of("model", (*MODELS, REFERENCE)), row.whole("index")
        label = row.one_of("label", LABELS)
        if (name, model, index) in self.labels:
            self.labels[name, model, index].append(label)
        if model == "erased" and label == "present" and name in self.present:
            score = row.table("scores").data.get("present")
            sure = float(score) if isinstance(score, int | float) else 0.0
            self.present[name][index] = max(sure, self.present[name].get(index, 0.0))
        if name not in self.attacks and model in MODELS:
            row.folder_name("set")
            first = self.probed.setdefault((name, model), {})
            first.setdefault(index, (row, []))[1].append(label)
            if len(first) > SHOWN_PER_SET:  # the last one in order: it is never among the first again
                del first[max(first)]


def _heads(folder: Path, attack: Attack) -> list[tuple[Fields, Fields]]:
    """An attack's first attempts at its best setting, on the original and the erased model with the same seed."""
    both = (read_rows(folder / "attack" / attack.name / model / "attempts.jsonl") for model in MODELS)
    best = attack.erased.top.name  # "" of an attack without several settings
    return list(
        islice(
            (
                pair
                for pair in zip(*both, strict=False)
                if _key(pair[0]) == _key(pair[1]) and best in ("", pair[1].data.get("variant"))
            ),
            SHOWN_PER_SET,
        )
    )


def _key(row: Fields) -> tuple[int, int]:
    return row.whole("index"), row.whole("seed")


def _attempted(folder: Path, name: str, model: str, row: Fields, verdicts: _Verdicts) -> Picture:
    return _picture(folder, name, model, row, labels=tuple(verdicts.labels[name, model, row.whole("index")]))


def _picture(
    folder: Path, name: str, model: str, row: Fields, *, labels: tuple[str, ...], score: float | None = None
) -> Picture:
    """The picture of one row of an attack's `attempts.jsonl`."""
    return Picture(
        path=row.inside(folder / "attack" / name / model, "image"),
        set=name,
        model=model,
        index=row.whole("index"),
        labels=labels,
        prompt=row.text("prompt"),
        seed=row.whole("seed"),
        base_prompt=row.text("base_prompt") if "base_prompt" in row else None,
        variant=row.text("variant") if "variant" in row else "",
        score=score,
    )


def _probed(folder: Path, name: str, verdicts: _Verdicts) -> tuple[tuple[Picture, Picture], ...]:
    """The first images of a set of prompts that is no attack's, of both models at the same seeds."""
    original, erased = (
        {
            index: Picture(
                path=folder / "score" / "images" / name / model / f"{index:04d}.png",
                set=name,
                model=model,
                index=index,
                labels=tuple(labels),
                prompt=row.text("prompt"),
                seed=row.whole("seed"),
                survived=row.flag("survived") if "survived" in row else None,
            )
            for index, (row, labels) in sorted(verdicts.probed.get((name, model), {}).items())
        }
        for model in MODELS
    )
    return tuple(
        (one, erased[index]) for index, one in original.items() if index in erased and erased[index].seed == one.seed
    )


def _returns(folder: Path, returned: Sequence[Attack], verdicts: _Verdicts, *, most: int) -> tuple[Returns, ...]:
    order = {
        name: sorted(found, key=lambda index, found=found: (-found[index], index))  # type: ignore[misc]
        for name, found in verdicts.present.items()
    }
    turns = ((name, indices[turn]) for turn in count() for name, indices in order.items() if turn < len(indices))
    total = sum(map(len, order.values()))
    chosen: dict[str, list[int]] = {name: [] for name in order}
    for name, index in islice(turns, min(most, total)):
        chosen[name].append(index)
    return tuple(
        _returned(folder, attack, verdicts.present[attack.name], chosen[attack.name])
        for attack in returned
        if verdicts.present[attack.name]
    )


def _returned(folder: Path, attack: Attack, found: Mapping[int, float], chosen: Sequence[int]) -> Returns:
    """Read an attack's attempts again, for the prompts and files of the images in which the concept was seen."""
    place = folder / "attack" / attack.name / "erased"
    worst: dict[int, Picture] = {}
    rest: list[str] = []
    wanted = set(chosen)
    for row in read_rows(place / "attempts.jsonl"):
        index = row.whole("index")
        if index in wanted:
            worst[index] = _picture(folder, attack.name, "erased", row, labels=("present",), score=found[index])
        elif index in found:
            rest.append(row.below(PurePath("attack", attack.name, "erased"), "image").as_posix())
    if len(worst) + len(rest) != len(found):
        raise UserError(
            f"{folder / 'score' / 'verdicts.jsonl'}: {len(found)} images of {attack.name!r} with the concept, but "
            f"{len(worst) + len(rest)} of them in {place / 'attempts.jsonl'}; restore the files, or {ANEW}"
        )
    return Returns(attack=attack, worst=tuple(worst[index] for index in chosen), rest=tuple(rest))
