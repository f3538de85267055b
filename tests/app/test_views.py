"""What the page sends: escaped texts, and of hidden images no more than their blocks."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from duo import rundir
from duo.app.comparison import Asked
from duo.app.curation import Filters
from duo.app.pictures import THUMBNAIL, Picture
from duo.app.places import Place
from duo.app.reporting import Summary, framed
from duo.app.views import Views
from duo.errors import UserError
from duo.report.images import BLOCKS

HOSTILE = "<img src=x onerror=\"alert('1')\">"


def sources(html: str) -> list[str]:
    return re.findall(r'<img src="([^"]+)"', html)


def pixels(uri: str) -> Any:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))) as image:
        return np.asarray(image.convert("RGB"))


def blocks(shown: Any) -> int:
    """How many colours are needed at most for an image that is nothing but blocks."""
    return len(np.unique(shown.reshape(-1, 3), axis=0))


@pytest.fixture
def busy(own_folder: Path) -> Path:
    """Pairs of which every pixel is another."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64, 3), dtype=np.uint8)
    for side, images in zip(("unsafe", "safe"), noise, strict=True):
        for index, image in enumerate(images):
            Image.fromarray(image).save(own_folder / side / f"{index:04d}.png")
    return own_folder


def test_the_unsafe_side_is_no_more_than_blocks_until_the_originals_are_asked_for(busy: Path) -> None:
    views = Views([Place.at(busy)])
    hidden, clear = (views.grid(0, Filters(), originals=asked) for asked in (False, True))
    assert len(sources(hidden.html)) == len(sources(clear.html)) == 6
    for i, (before, after) in enumerate(zip(sources(hidden.html), sources(clear.html), strict=True)):
        unsafe = i % 2 == 0
        assert (blocks(pixels(before)) <= BLOCKS**2) == unsafe
        original = np.asarray(Image.open(busy / ("unsafe" if unsafe else "safe") / f"{i // 2:04d}.png"))
        assert np.array_equal(pixels(after), original)
    assert hidden.html.count("shown pixelated") == 3


def test_a_safe_side_that_the_curator_does_not_call_safe_is_hidden_too(place: Place, monkeypatch: Any) -> None:
    import staged

    seen = staged.ByPrompt.__call__
    monkeypatch.setattr(staged.ByPrompt, "__call__", lambda judge, images: seen(staged.ByPrompt(present=1.0), images))
    assert Views([place]).grid(0, Filters()).html.count("shown pixelated") == 6


def test_large_images_are_sent_small(tmp_path: Path) -> None:
    Image.effect_noise((600, 400), 50).convert("RGB").save(tmp_path / "large.png")
    assert pixels(Picture.thumbnail(tmp_path / "large.png", hidden=False).uri).shape == (171, THUMBNAIL, 3)
    Image.new("RGB", (600, 400)).save(tmp_path / "large.png")
    assert not pixels(Picture.thumbnail(tmp_path / "large.png", hidden=False).uri).any()  # not the one from before


def test_texts_of_others_are_escaped(own_folder: Path, erased: Any) -> None:
    rows = [{"unsafe": f"unsafe/{i:04d}.png", "unsafe_prompt": HOSTILE, "safe_prompt": HOSTILE} for i in range(3)]
    rundir.write_jsonl(own_folder / "pairs.jsonl", rows)
    views = Views([Place.at(own_folder), Place.at(erased.dir.path)])
    views._opened[1] = views._at(1)
    views._opened[1].session = erased
    for html in (
        views.grid(0, Filters()).html,
        views.comparison(1, Asked(prompt=HOSTILE, seed=0)),
        views.note(HOSTILE),
    ):
        assert "onerror" in html
        assert "<img src=x" not in html
        assert 'onerror="' not in html


def test_the_curators_scores_stand_beside_the_pairs_and_the_filters_use_them(place: Place) -> None:
    views, told = Views([place]), []
    grid = views.grid(0, Filters(), tell=told.append)
    assert told == [1.0]
    assert grid.scores == [("unsafe", "rank"), ("safe", "rank")]
    assert grid.html.count("fire present") == grid.html.count("fire absent") == 3
    low, high = views.score_range(0, "safe", "rank")
    assert 0.5 <= low <= high <= 1  # what `ByPrompt` calls absent
    assert views.grid(0, Filters(score="rank", side="safe", least=low, most=high)).html.count("<figure>") == 6
    assert "No pair matches." in views.grid(0, Filters(score="rank", side="safe", most=0.49)).html
    assert views.grid(0, Filters(score="of another run", least=9)).html.count("<figure>") == 6
    assert told == [1.0]


def test_a_curator_without_weights_leaves_the_pairs_to_be_seen(place: Place, monkeypatch: Any) -> None:
    import staged

    def blind(*_: Any) -> Any:
        raise UserError("curator.onnx is missing; put it there")

    monkeypatch.setattr(staged.ByPrompt, "__call__", blind)
    html = Views([place]).grid(0, Filters()).html
    assert "Without scores: curator.onnx is missing; put it there" in html
    assert html.count("<figure>") == 6


def test_decisions_come_back_as_counts_or_as_what_is_wrong(place: Place) -> None:
    views = Views([place])
    assert views.decide(0, "0002", "keep") == {"counts": {"undecided": 2, "keep": 1, "reject": 0}}
    assert "has no pair called" in views.decide(0, "../../x", "keep")["problem"]
    assert "no run number 1" in views.decide(1, "0002", "keep")["problem"]
    assert "pair keep" in views.grid(0, Filters()).html


def test_keys_are_offered_only_where_something_can_be_decided(erased: Any) -> None:
    html = Views([Place.at(erased.dir.path)]).grid(0, Filters()).html
    assert "was trained on these pairs" in html
    assert "<kbd>k</kbd>" not in html
    assert html.count("disabled") == 6


def test_pairs_alone_have_nothing_to_compare(own_folder: Path) -> None:
    views = Views([Place.at(own_folder)])
    scalable, told = views.comparable(0)
    assert not scalable and "holds pairs alone" in told
    assert views.offered(0) == []
    assert "holds pairs alone" in views.comparison(0, Asked(prompt="a", seed=0))


def test_one_models_weights_are_in_memory_at_a_time(erased: Any, open_session: Any) -> None:
    from duo.stages import erase, make_pairs

    second = open_session("second")
    make_pairs(second)
    erase(second)
    views = Views([Place.at(one.dir.path) for one in (erased, second)])
    views._at(0).session, views._at(1).session = erased, second
    views.comparable(0)
    views.comparable(1)
    assert views._at(0).comparison is None and views._at(0).session is None
    assert views._at(1).comparison is not None


def test_prompts_of_the_concept_are_offered(place: Place) -> None:
    assert Views([place]).offered(0) == [
        "a burning boat",
        "a burning car",
        "a boat on fire",
        "a boat",
        "a car",
        "a red boat",
        "a blue house",
    ]


def test_the_page_is_up_without_torch(own_folder: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom duo.app.curation import Filters\nfrom duo.app.places import Place\n"
        "from duo.app.views import Views\nfrom duo.app import serving\n"
        f"views = Views([Place.at(Path({str(own_folder)!r}))])\n"
        "assert 'pair' in views.grid(0, Filters()).html\nassert not {'torch', 'diffusers', 'gradio'} & {*sys.modules}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- reports ------------------------------------------------------------------------------------------


def test_a_run_without_a_report_says_how_to_write_it(place: Place, own_folder: Path) -> None:
    views = Views([place, Place.at(own_folder)])
    assert f"write it by `duo report {place.name}`" in str(Summary.of(place).missing)
    for html in (views.summaries(), views.report(0)):
        assert "no report yet; write it by" in html
    assert "pairs alone, no run" in views.report(1)


def test_a_broken_report_is_told(place: Place) -> None:
    assert place.run is not None
    (place.run.path / "report.html").write_text("")
    (place.run.path / "report.json").write_text("{")
    assert "report.json is not valid JSON" in str(Summary.of(place).missing)
    (place.run.path / "report.json").write_text(json.dumps({}))
    assert "report.json" in str(Summary.of(place).missing)


def test_a_page_that_is_no_text_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.run is not None
    monkeypatch.setattr("duo.app.reporting.verdict", lambda _: ["gone"])
    (place.run.path / "report.json").write_text("{}")
    (place.run.path / "report.html").write_bytes(b"\xff")
    html = Views([place]).report(0)
    assert "report.html cannot be read" in html and 'role="alert"' in html


def test_a_report_is_framed_without_any_rights(place: Place) -> None:
    assert place.run is not None
    text = '</iframe><script>top.hacked = 1</script><p title="a">'
    (place.run.path / "report.html").write_text(text)
    html = str(framed(place))
    assert 'sandbox=""' in html
    assert "<script" not in html and html.count("</iframe>") == 1 and html.endswith("</iframe>")
    from html.parser import HTMLParser

    found: list[dict[str, str | None]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.append(dict(attrs))  # type: ignore[method-assign]
    parser.feed(html)
    assert [one["srcdoc"] for one in found] == [text]


def test_of_a_run_without_pairs_the_comparison_opens_first(tmp_path: Path, own_folder: Path) -> None:
    """In a process of its own, for gradio leaves sockets behind."""
    pytest.importorskip("gradio")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    code = (
        "import sys; from pathlib import Path; from duo.app.page import build; from duo.app.places import Place\n"
        "from duo.app.views import Views\n"
        "for path in sys.argv[1:]:\n"
        "    parts = build(Views([Place.at(Path(path))])).get_config_file()['components']\n"
        "    print([part['props']['selected'] for part in parts if part['type'] == 'tabs'][0])\n"
        "    print(*[part['props'].get('id') for part in parts if part['type'] == 'tabitem'])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run"), str(own_folder)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told[::2] == ["compare", "pairs"]
    assert all(tabs.split()[:2] == ["pairs", "compare"] for tabs in told[1::2])
