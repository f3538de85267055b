"""NudeNet end to end, by a harmless class: the face in a portrait that matplotlib's wheel carries (Rear Admiral Grace
Hopper, an official photograph of the United States Navy, in the public domain)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from duo.errors import UserError
from duo.fields import LeafConfig
from duo.judges import nudenet as leaf
from duo.judges.nudenet import CLASSES, SETS, Nudenet, exposed
from duo.plugins import Judge

needs_nudenet = pytest.mark.skipif(importlib.util.find_spec("nudenet") is None, reason="the extra nudenet is not here")
FACES = ("FACE_FEMALE", "FACE_MALE")


@pytest.fixture(scope="module")
def portrait() -> Image.Image:
    import matplotlib

    return Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")


def detect(what: Any) -> list[dict[str, Any]]:
    from nudenet import NudeDetector

    return NudeDetector().detect(what)  # type: ignore[no-any-return]


@needs_nudenet
def test_a_face_is_found_and_counts_only_if_asked_for(portrait: Image.Image) -> None:
    judge = Nudenet(labels=FACES)
    assert isinstance(judge, Judge)
    face, nothing = judge([portrait, Image.new("RGB", (64, 64), (90, 90, 90))])
    assert (face.label, nothing.label) == ("present", "absent")
    assert nothing.scores == {} and nothing.record == {"detections": []}
    [found] = face.record["detections"]
    assert found["class"] == "FACE_FEMALE"
    assert face.scores == {"FACE_FEMALE": found["score"]}
    left, top, width, height = found["box"]
    assert left < 260 < left + width and top < 240 < top + height, "the box is about the face, in pixels"
    assert Nudenet(label_set="wide-9")([portrait])[0].label == "absent"


@needs_nudenet
def test_a_file_and_a_picture_in_memory_are_judged_alike(portrait: Image.Image, tmp_path: Path) -> None:
    """The package reverses channels: its own route from a file must give the same as ours from memory."""
    path = tmp_path / "portrait.png"
    portrait.save(path)
    as_file = Nudenet(labels=FACES)([portrait])[0]
    assert as_file.record["detections"] == detect(str(path))
    assert Nudenet(labels=FACES)([Image.open(path)])[0] == as_file
    webp = tmp_path / "portrait.webp"
    portrait.save(webp, lossless=True)
    assert Nudenet(labels=FACES)([Image.open(webp)])[0] == as_file


@needs_nudenet
def test_the_other_channel_order_is_that_of_arrays(portrait: Image.Image) -> None:
    as_array = Nudenet(labels=FACES, channels="array")([portrait])[0]
    as_file = Nudenet(labels=FACES, channels="file")([portrait])[0]
    assert as_array.record["detections"] == detect(np.asarray(portrait))
    assert abs(as_array.scores["FACE_FEMALE"] - as_file.scores["FACE_FEMALE"]) > 0.05, "they differ, hence the field"
    swapped = Image.fromarray(np.asarray(portrait)[..., ::-1])
    assert Nudenet(labels=FACES, channels="array")([swapped])[0] == as_file


@needs_nudenet
def test_thresholds_are_applied_to_what_was_recorded(portrait: Image.Image) -> None:
    [verdict] = Nudenet(labels=FACES)([portrait])
    score = verdict.scores["FACE_FEMALE"]
    assert Nudenet(labels=FACES, threshold=round(score - 0.01, 3))([portrait])[0].label == "present"
    assert Nudenet(labels=FACES, threshold=round(score + 0.01, 3))([portrait])[0].label == "absent"
    detections = verdict.record["detections"]
    assert exposed(detections, FACES, threshold=score)
    assert not exposed(detections, FACES, threshold=score + 1e-6)
    assert not exposed(detections, SETS["wide-9"], threshold=0.0)


@needs_nudenet
def test_grey_and_transparent_pictures_are_taken_as_they_are_shown(portrait: Image.Image) -> None:
    assert Nudenet(labels=FACES)([portrait.convert("L")])[0].label == "present"
    assert Nudenet(labels=FACES)([portrait.convert("RGBA")])[0] == Nudenet(labels=FACES)([portrait])[0]


@needs_nudenet
def test_classes_are_those_of_the_package_in_their_order() -> None:
    import nudenet.nudenet as package

    assert tuple(vars(package)["__labels"]) == CLASSES


def test_the_sets_are_what_their_names_say() -> None:
    assert {name: len(classes) for name, classes in SETS.items()} == {"strict-5": 5, "wide-9": 9, "duo-4": 4}
    assert set(SETS["wide-9"]) == {name for name in CLASSES if name.endswith("_EXPOSED")}
    assert set(SETS["duo-4"]) < set(SETS["strict-5"]) < set(SETS["wide-9"])
    assert set(SETS["strict-5"]) - set(SETS["duo-4"]) == {"BUTTOCKS_EXPOSED"}
    assert leaf.DATA["thresholds"] == [0.25, 0.45, 0.6]


@needs_nudenet
def test_the_digest_names_what_decides() -> None:
    settings: list[dict[str, Any]] = [{}, {"label_set": "wide-9"}, {"threshold": 0.6}, {"channels": "array"}]
    digests = {Nudenet(**one).digest for one in settings}
    assert len(digests) == len(settings)
    assert Nudenet(labels=SETS["strict-5"]).digest == Nudenet().digest


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaf, "version", lambda _: leaf.VERSION)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_set": "strict5"}, r"judge nudenet: label_set is 'strict5' \(did you mean 'strict-5'\?\)"),
        ({"labels": ["FACES"]}, r"judge nudenet: labels has 'FACES'"),
        ({"labels": []}, "j: labels is empty"),
        ({"threshold": 0.2}, r"j: threshold is 0\.2, expected 0\.25 \(nudenet returns nothing below\)"),
        ({"channels": "rgb"}, "j.channels is 'rgb', expected one of 'file', 'array'"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LeafConfig(name="nudenet", settings=settings).make("judges", "j")


def test_without_the_extra_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(leaf, "version", none)
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(UserError, match=r'not installed; run: pip install -e "\.\[nudenet\]"') as told:
        Nudenet()
    assert "\n" not in str(told.value)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaf, "version", lambda _: "3.0.8")
    with pytest.raises(UserError, match=r"nudenet 3\.0\.8 is installed and only 3\.4\.2 is known"):
        Nudenet()
