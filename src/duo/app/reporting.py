"""The reports of runs: what each came to, and its page in a frame that runs no scripts. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from duo.app.places import Place, within
from duo.errors import UserError, first_line
from duo.foreign import read_text
from duo.report import verdict
from duo.rundir import read_json


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run's report says, line by line; `missing` is why there is none."""

    place: Place
    lines: tuple[str, ...] = ()
    missing: str | None = None

    @classmethod
    def of(cls, place: Place) -> Summary:
        if place.run is None:
            return cls(place=place, missing="pairs alone, no run")
        folder = place.run.path
        if not (folder / "report.json").is_file() or not (folder / "report.html").is_file():
            return cls(place=place, missing=f"no report yet; write it by `duo report {folder}`")
        try:
            within(folder, folder / "report.json", folder / "report.html")
            return cls(place=place, lines=tuple(verdict(read_json(folder / "report.json"))))
        except UserError as error:
            return cls(place=place, missing=str(error))


def framed(place: Place) -> Markup:
    """The report's page for a browser that lets it run nothing, ask for nothing and lead nowhere.

    The page is part of the attribute `srcdoc`, so no route serves files; `sandbox` without exceptions gives it an
    origin of its own and no scripts, whatever somebody wrote into it.
    """
    assert place.run is not None
    path = place.run.path / "report.html"
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); write it again by `duo report`") from error
    return Markup('<iframe class="report" title="Report of {}" sandbox="" srcdoc="{}"></iframe>').format(
        place.name, text
    )
