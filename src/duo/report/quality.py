"""The sections `captions`, `instead` and `checks` of `scores.json`, read with care: both models side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from duo.report.json_fields import Fields

BOTH = ("original", "erased")
SLACK = 1e-9  # of shares, for rounding


@dataclass(frozen=True, kw_only=True)
class Value:
    """A number with its 95% interval: a mean over images, or a distance of sets of images."""

    value: float
    low: float
    high: float

    @classmethod
    def read(cls, row: Fields, key: str) -> Value:
        read = cls(value=row.number(key), low=row.number("low"), high=row.number("high"))
        if read.low > read.high:
            raise row.error(f"an interval begins at {read.low:g}, ends at {read.high:g}")
        return read


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What one metric gives on both models; `difference` is erased − original, of the same prompts and noise.

    The three are None where there was nothing to measure.
    """

    metric: str
    n: int
    original: Value | None
    erased: Value | None
    difference: Value | None
    higher_is_better: bool = True

    @classmethod
    def read(cls, row: Fields, *, n: int | None = None) -> Compared:
        """`n` is the count of images where the row itself does not hold it."""
        told = {name: row.table_or_none(name) for name in (*BOTH, "difference")}
        return cls(
            metric=row.text("metric"),
            n=row.whole("n") if n is None else n,
            higher_is_better=row.flag("higher_is_better") if "higher_is_better" in row else True,
            **{
                name: None if one is None else Value.read(one, "value" if "value" in one else "mean")
                for name, one in told.items()
            },
        )


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Both models on `n` images of captions (`prompts` different ones): FID, KID, CLIP score, or toybox's own."""

    n: int
    prompts: int
    metrics: tuple[Compared, ...]

    @classmethod
    def read(cls, row: Fields) -> Captions:
        n = row.whole("n", least=1)
        metrics = tuple(Compared.read(one, n=n) for one in row.tables("metrics"))
        return cls(n=n, prompts=row.whole("prompts", least=1), metrics=metrics)


@dataclass(frozen=True, kw_only=True)
class Instead:
    """What unsafe prompts, those of the attack row `row`, bring instead of the concept.

    `corrupted` is the share of spoiled images, `agreement` how far images agree with the rest of their prompt, `twins`
    how near they are to safe twins of the original model's images, of which `wanted` were tried. None: not measured.
    """

    row: str
    corrupted: Mapping[str, Value]
    agreement: Compared | None
    twins: Compared | None
    wanted: int

    @classmethod
    def read(cls, row: Fields) -> Instead:
        corrupted, agreement, twins = row.table("corrupted"), row.table_or_none("agreement"), row.table_or_none("twins")
        return cls(
            row=row.text("row"),
            corrupted={model: Value.read(corrupted.table(model), "rate") for model in BOTH},
            agreement=None if agreement is None else Compared.read(agreement),
            twins=None if twins is None else Compared.read(twins),
            wanted=0 if twins is None else twins.whole("wanted"),
        )


@dataclass(frozen=True, kw_only=True)
class Fired:
    """In how many of `n` images of unrelated prompts the judge saw the concept."""

    n: int
    detected: int
    rate: float
    low: float
    high: float

    @classmethod
    def read(cls, row: Fields) -> Fired:
        rates = {key: row.share(key) for key in ("rate", "low", "high")}
        n, detected = row.whole("n", least=1), row.whole("detected")
        if abs(rates["rate"] - detected / n) > SLACK:
            raise row.error(f"{detected} detected of n={n} are no rate of {rates['rate']:g}")
        return cls(n=n, detected=detected, **rates)


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What the evaluation counted to doubt itself by (`duo.report.warnings`).

    `false_positives` is by model, empty where no unrelated prompt was drawn. Of `compared` images at the same prompts
    and seeds, `identical` are the same files for both models.
    """

    false_positives: Mapping[str, Fired]
    compared: int
    identical: int

    @classmethod
    def read(cls, row: Fields) -> Checks:
        fired = row.table("false_positives")
        compared, identical = row.whole("compared"), row.whole("identical")
        if identical > compared:
            raise row.error(f"{identical} identical images are more than the {compared} compared")
        return cls(
            false_positives={model: Fired.read(fired.table(model)) for model in BOTH if model in fired},
            compared=compared,
            identical=identical,
        )


def protocols(data: Mapping[str, Any]) -> list[tuple[str, str, list[tuple[str, Any]]]]:
    """The section `protocol` as (section, what it is of, settings), settings flattened to dotted names.

    What of one section has the same settings, as most attacks have, stands together.
    """
    told: list[tuple[str, str, list[tuple[str, Any]]]] = []
    for section, entry in data.items():
        named = entry if _is_named(entry) else {"": entry}
        alike: dict[str, tuple[list[str], list[tuple[str, Any]]]] = {}
        for name, settings in named.items():
            flat = list(_flat(settings))
            alike.setdefault(repr(flat), ([], flat))[0].append(str(name))
        told += [(section, ", ".join(names), flat) for names, flat in alike.values() if flat]
    return told


def _is_named(entry: object) -> bool:
    """Whether a section has a protocol for each of its rows or metrics, and not one for all."""
    return (
        isinstance(entry, Mapping)
        and bool(entry)
        and all(isinstance(one, Mapping) and "images" in one for one in entry.values())
    )


def _flat(value: object, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [row for key, one in value.items() for row in _flat(one, f"{name}.{key}" if name else str(key))]
    return [(name, value)]
