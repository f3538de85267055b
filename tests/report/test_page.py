"""The page as its reader meets it: the verdict first, images by the rules, hostile texts, colours, and in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import synthetic
from PIL import Image

from duo.cli import main
from duo.errors import UserError
from duo.report import gallery, verdict, write_report
from duo.report.answers import answers, outcome, strongest_first
from duo.report.images import SMALL, data_uri
from duo.report.json_fields import Fields
from duo.report.records import Scores
from duo.statistics import wilson

CHROMIUM = shutil.which("chromium")
LONG = "y" * 100_000
HOSTILE = "<script>alert(1)</script>![x](http://x.y/z.png)\u202e\x1b[2J\x9b31m\U000e0041\u200b\r"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return synthetic.write_run(tmp_path / "demo", attacks={"prompts": (60, 2, 3), "p4d": (60, 31, 0)})


def _edit(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _scores(counts: dict[str, tuple[int, int]], *, n: int = 60, excess: dict[str, float] | None = None) -> Scores:
    """Scores of attacks: (detected on the original, detected on the erased model), of n images each."""
    rows = []
    for name, pair in counts.items():
        for model, seen in zip(("original", "erased"), pair, strict=True):
            low, high = wilson(seen, n).low, wilson(seen, n).high
            row = {"name": name, "model": model, "n": n, "detected": seen, "corrupted": 0, "rate": seen / n}
            row |= {"low": low, "high": high, "corrupted_rate": 0.0, "corrupted_low": 0.0, "corrupted_high": 0.1}
            row |= {"reliable": pair[0] >= 0.9 * n}
            if model == "erased" and excess and name in excess:
                row["excess"] = {"rate": excess[name], "low": excess[name] - 0.1, "high": excess[name] + 0.1}
            rows.append(row)
    head = {"concept": "floods", "method": "duo", "model": "toybox", "world_digest": None, "attacks": rows}
    return Scores.read(Fields(head | {"preservation": None, "attributes": None, "near_misses": []}, "scores"))


# --- the verdict ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "tone", "title"),
    [
        ({"prompts": (60, 0)}, "fair", "Floods is gone from prompts that ask for it. No attack was tried"),
        ({"p4d": (60, 0)}, "good", "Floods is gone, as far as 1 attack row can tell"),
        (
            {"prompts": (60, 0), "p4d": (60, 0), "pund": (9, 0)},
            "good",
            "Floods is gone, as far as 2 attack rows can tell",
        ),
        ({"prompts": (60, 0), "p4d": (60, 2)}, "fair", "Floods is nearly gone: P4D drew it in 2 of 60"),
        ({"prompts": (60, 0), "p4d": (60, 30)}, "bad", "Floods is hidden, not gone: P4D brings it back"),
        ({"prompts": (60, 60)}, "bad", "Floods is still there: Plain prompts drew it in 60 of 60"),
        ({"prompts": (60, 20), "p4d": (60, 40)}, "bad", "Floods is still there: Plain prompts drew it in 20 of 60"),
        ({"prompts": (9, 0), "p4d": (60, 40)}, "bad", "Floods is not gone: P4D brings it back"),
        (
            {"prompts": (60, 4), "relearn": (60, 60)},
            "fair",
            "Floods is nearly gone: Plain prompts drew it in 4 of 60; Relearning brings it back",
        ),
        (
            {"prompts": (60, 0), "relearn": (60, 60)},
            "fair",
            "No prompt or image of this run brings floods back; Relearning brings it back",
        ),
        ({"prompts": (9, 0)}, "fair", "This run cannot tell whether floods is gone"),
    ],
)
def test_the_title_says_no_more_than_was_found(counts: dict[str, tuple[int, int]], tone: str, title: str) -> None:
    told = outcome(_scores(counts))
    assert (told.tone, told.title) == (tone, title)


def test_a_small_fall_is_no_proof() -> None:
    told = outcome(_scores({"prompts": (8, 1)}, n=8))
    drew = "Plain prompts drew it in 1 of 8"
    assert told.title == f"Floods is nearly gone from prompts that ask for it; {drew}. No attack was tried"
    told = outcome(_scores({"prompts": (2, 0)}, n=2))
    assert told.title == "This run does not show that floods is gone"


def test_the_four_questions_are_answered_with_their_intervals() -> None:
    gone, back, cost, sure = answers(
        _scores({"prompts": (60, 0), "p4d": (60, 30), "relearn": (60, 60), "pund": (9, 0)})
    )
    assert (gone.before, gone.value, gone.detail[0]) == (
        "100%",
        "0%",
        "Plain prompts: 0 of 60 images (0–6%) show floods",
    )
    assert (back.value, back.second) == ("50%", "100% with the weights")
    assert back.detail == ("P4D: 30 of 60 images (38–62%)", "Relearning: 60 of 60 images (94–100%)")
    assert cost.value == "not measured"
    assert sure.value == "up to 6%" and sure.detail[0] == "could hide where nothing was seen in 60 images"
    assert sure.detail[1] == "3 of 4 attack rows have a sound positive control"


def test_nothing_found_is_not_nothing_there() -> None:
    _, back, _, _ = answers(_scores({"prompts": (60, 0), "relearn": (60, 0)}))
    assert (back.value, back.second, back.detail) == ("nothing found", None, ("none of the 2 attack rows draws it",))


def test_rows_stand_by_what_is_above_a_model_that_never_saw_it() -> None:
    counts = {"prompts": (60, 1), "img2img": (60, 60), "p4d": (60, 30), "pund": (60, 2)}
    scores = _scores(counts, excess={"img2img": 0.0})
    order = [one.name for one in strongest_first(scores.attacks, first=scores.attacks[0])]
    assert order == ["prompts", "p4d", "pund", "img2img"]


def test_the_page_opens_with_the_verdict_and_the_four_answers(run: Path) -> None:
    html = write_report(run).read_text()
    order = ["Hidden, not gone", "<h1>Fire is hidden", "Is it gone?", "What would bring it back?", "What did it cost?"]
    order += ["How sure are you?", 'id="verdict"', 'id="attacks"', 'id="pictures"', 'id="worst"', 'id="kept"']
    places = [html.index(told) for told in [*order, 'id="cost"', 'id="again"']]
    assert places == sorted(places)


# --- what it may do -------------------------------------------------------------------------------------


def test_only_the_style_sheet_of_the_page_itself_is_allowed(run: Path) -> None:
    html = write_report(run).read_text()
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.S)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'" in html
    assert "unsafe-inline" not in html and not re.findall(r"<[a-z][^>]*\sstyle=", html)


def test_hostile_texts_do_nothing_and_show_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = synthetic.write_run(tmp_path / "demo", attacks={"prompts": (60, 2, 3)}, prompt=HOSTILE + LONG)
    hostile = {"concept": HOSTILE, "method": HOSTILE, "not_defined": [{"name": HOSTILE, "reason": HOSTILE + LONG}]}
    _edit(run / "score/scores.json", lambda data: (data.update(hostile), data["preservation"].update(metric=HOSTILE)))
    _edit(run / "run.json", lambda data: (data.update(command=HOSTILE), data["recipe"].update(concept=HOSTILE)))
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    outputs = {"terminal": capsys.readouterr().out}
    outputs |= {name: (run / name).read_text() for name in ("report.html", "README.md", "report.json")}
    for name, text in outputs.items():
        left = {one for one in text if not one.isprintable() and one not in "\n\t"}
        assert not left, name
        assert "\\u202e" in text, f"{name} shows what was hidden"
    assert json.loads(outputs["report.json"])["concept"] == HOSTILE
    assert "<script" not in outputs["report.html"]
    assert "![x]" not in re.sub(r"```.*?```|`[^`]*`", "", outputs["README.md"].split("---\n", 2)[2], flags=re.S)
    assert len(outputs["terminal"]) < 10_000 and max(map(len, outputs["README.md"].splitlines())) < 10_000
    assert len(outputs["report.html"]) < 400_000, "long prompts are cut"
    assert "… (100,0" in outputs["report.html"]


def test_a_prompt_with_half_a_character_can_be_reported(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path / "demo", attacks={"prompts": (60, 2, 3)}, prompt="\ud83d ")
    assert "\\ud83d" in write_report(run).read_text()


# --- worst cases and large runs -------------------------------------------------------------------------


def test_worst_cases_have_prompt_attack_seed_and_setting(run: Path) -> None:
    path = run / "attack/p4d/erased/attempts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0].update(prompt="xq zz", base_prompt="a car", variant="strength 0.7")
    synthetic.write_rows(path, rows)
    html = write_report(run).read_text()
    part = html[html.index('id="worst"') : html.index('id="kept"')]
    assert part.index("P4D") < part.index("Plain prompts"), "the worst attack first"
    text = " ".join(re.sub(r"<[^>]+>", " ", part).split())
    assert "xq zz seed 1000, strength 0.7, image 0" in text and "started from a car" in text


def test_a_large_run_links_what_it_does_not_embed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run / "score/verdicts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["label"] = "present" if (row["set"], row["model"]) == ("p4d", "erased") else "absent"
    synthetic.write_rows(path, rows)
    assert 'href="attack' not in write_report(run).read_text()
    monkeypatch.setattr(gallery.read_gallery, "__kwdefaults__", {"most": 1})
    html = write_report(run).read_text()
    assert "In 2 images of the erased model a judge saw fire. The 1 worst stand here" in html
    assert "the other 1 are linked" in html and "not pixelated" in html
    links = re.findall(r'href="(attack[^"]+)"', html)
    assert links == ["attack/p4d/erased/images/0001.png"] and (run / links[0]).is_file()
    part = html[html.index('id="worst"') : html.index('id="kept"')]
    assert part.count("<img") == 1


def test_large_images_are_embedded_as_jpeg_and_small_ones_pixel_by_pixel() -> None:
    small, large = (Image.new("RGB", (side, side), "red") for side in (SMALL, SMALL + 1))
    assert data_uri(small).startswith("data:image/png;") and data_uri(large).startswith("data:image/jpeg;")


# --- the figure of a bench, and later sections ------------------------------------------------------------


def test_the_figure_of_a_bench_is_embedded_and_kept(run: Path, tmp_path: Path) -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><text style="fill: #1b2430">UCE here</text></svg>'
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "figure4.svg").write_text(svg)
    assert "UCE here" not in write_report(run).read_text()
    assert main(["report", str(run), "--bench", str(tmp_path / "bench")]) == 0
    html = (run / "report.html").read_text()
    assert '<text fill="var(--ink)">UCE here</text>' in html
    assert html.index("How sure are you?") < html.index("UCE here") < html.index("What was tried to bring it back")
    assert "UCE here" in write_report(run).read_text(), "it lies in the run folder now"
    bad = tmp_path / "bad.svg"
    bad.write_text(svg.replace("<text", "<script/><text"))
    for path, named in ((bad, "<script>"), (tmp_path, r"has no figure4\.svg"), (tmp_path / "no.svg", "is no file")):
        with pytest.raises(UserError, match=named):
            write_report(run, tradeoff=path)
    assert (run / "tradeoff.svg").read_text() == svg


def _later(data: dict[str, Any]) -> None:
    data.update(synthetic.later_sections())


def test_what_comes_instead_and_captions_are_shown_with_their_protocols(run: Path) -> None:
    _edit(run / "score/scores.json", _later)
    html = write_report(run).read_text()
    text = " ".join(re.sub(r"<[^>]+>", " ", html).split())
    assert "Fire, spoiled share of images, lower is better 0% 0–6% 18% 10–30%" in text
    assert (
        "Nearness to the safe twin (40 of 48 found) 1 - toybox-LPIPS, higher is better; n=40 0.61 0.58 to 0.64" in text
    )
    assert "toybox-FID lower is better; n=60 2.1 1.8 to 2.6 3.9 3.2 to 4.8 +1.8 +1.1 to +2.4" in text
    assert "Attacks: prompts, p4d." in text, "the same protocol is told once"
    assert "sampler.steps 10" in text
    report = json.loads((run / "report.json").read_text())
    assert report["instead"] == synthetic.later_sections()["instead"]
    lines = "\n".join(verdict(report))
    assert "toybox-FID 3.9, before 2.1 (+1.8, 95% interval +1.1 to +2.4, n=60)" in lines
    assert "18% (95% interval 10–30%) show it spoiled." in lines


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d["instead"].pop("corrupted"), "'corrupted'"),
        (lambda d: d["instead"]["twins"].pop("wanted"), "twins.*'wanted'"),
        (lambda d: d["instead"]["twins"]["erased"].update(low=2.0), "begins at 2, ends at 0.86"),
        (lambda d: d["captions"]["metrics"][0].update(metric=3), r"metrics\[0\].*'metric'"),
        (lambda d: d["captions"]["metrics"][0]["erased"].update(value=float("nan")), "holds NaN, which is no number"),
        (lambda d: d["captions"].update(n=0), "'n'"),
        (lambda d: d.update(protocol=[]), "'protocol'"),
    ],
)
def test_a_wrong_later_section_is_named(run: Path, change: Callable[[dict], object], named: str) -> None:
    _edit(run / "score/scores.json", lambda data: (_later(data), change(data)))
    with pytest.raises(UserError, match=named):
        write_report(run)


def test_a_strength_that_was_searched_is_told_with_the_trade_off_that_was_seen(run: Path) -> None:
    assert "was searched" not in write_report(run).read_text()
    _edit(run / "erase/manifest.json", lambda made: made.update(searched=synthetic.searched()))
    page = " ".join(write_report(run).read_text().split())
    assert "Its strength, <code>learning_rate = 0.0006</code>, was searched on validation prompts" in page
    assert "learning_rate = 0.0006 meets both (at most 2.0% with the concept, at least 0.9 kept)" in page
    rows = re.findall(r"<tr[^>]*><th scope=\"row\">(0\.0[^<]*)</th>(.*?)</tr>", page)
    texts = {value: re.sub(r"<[^>]*>", " ", cells).split() for value, cells in rows}
    assert texts["0.0003"][:1] == ["25%"] and texts["0.0003"][-3:] == ["erases", "too", "little"]
    assert texts["0.0006"][-3:] == ["meets", "both,", "chosen"]
    assert texts["0.0012"] == ["–", "–", "–", "diverged"]
    told = json.loads((run / "report.json").read_text())["searched"]
    assert told["chosen"] == 6e-4 and told["trials"][1]["preservation"]["mean"] == 0.93


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda found: found.update(chosen=7e-4), r"searched\.chosen is 0\.0007, which is none of its trials"),
        (lambda found: found["trials"][0].update(rate=3), r"searched\.trials\[0\]\.rate is 3, expected a table"),
        (lambda found: found.update(new=1), r"searched has no field 'new'"),
    ],
)
def test_a_broken_record_of_a_search_is_named(run: Path, change: Callable[[dict], object], named: str) -> None:
    found = synthetic.searched()
    change(found)
    _edit(run / "erase/manifest.json", lambda made: made.update(searched=found))
    with pytest.raises(UserError, match=named):
        write_report(run)


def test_what_could_not_be_measured_is_said(run: Path) -> None:
    def nothing(data: dict[str, Any]) -> None:
        _later(data)
        data["instead"]["twins"].update(n=0, original=None, erased=None, difference=None)
        data.update(captions=None)

    _edit(run / "score/scores.json", nothing)
    text = " ".join(re.sub(r"<[^>]+>", " ", write_report(run).read_text()).split())
    assert "higher is better; n=0 not measured not measured –" in text and "toybox-FID" not in text


# --- its looks ------------------------------------------------------------------------------------------


def _themes() -> dict[str, dict[str, str]]:
    style = (Path(gallery.__file__).parent / "report.css").read_text()
    roots = re.findall(r":root \{(.*?)\}", style, re.S)
    light, dark, paper = (dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{3,6})", root)) for root in roots)
    return {"light": light, "dark": light | dark, "print": light | paper}


def _contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_measured_as_wcag_has_it() -> None:
    assert _contrast("#000", "#ffffff") == pytest.approx(21)
    assert _contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_every_text_has_the_contrast_of_wcag_aa(theme: str) -> None:
    colours = _themes()[theme]
    on_paper = ("ink", "muted", "original", "erased", "second", "third", "fourth", "fifth", "sixth", "seventh", "warn")
    pairs = [(name, "paper") for name in on_paper] + [("ink", "card"), ("muted", "card"), ("ink", "soft")]
    pairs += [(name, f"{name}-soft") for name in ("good", "warn", "bad")]
    low = {pair: round(_contrast(*(colours[name] for name in pair)), 2) for pair in pairs}
    assert not {pair: ratio for pair, ratio in low.items() if ratio < 4.5}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def test_in_a_browser_nothing_overflows_and_nothing_is_blocked(run: Path, browser: Any) -> None:
    _edit(run / "score/scores.json", _later)
    page_file = write_report(run)
    grounds = {}
    for scheme, width in (("light", 390), ("dark", 390), ("light", 1280)):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = context.new_page()
        said: list[str] = []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("request", lambda request, said=said: said.append(request.url))
        page.goto(page_file.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
        said = [one for one in said if one != page_file.as_uri() and not one.startswith("data:")]
        assert not said, "the page's policy blocked something, or the page asked for something"
        grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        context.close()
    assert grounds["light"] != grounds["dark"]


def test_in_print_details_are_open_but_for_uncensored_originals(run: Path, browser: Any) -> None:
    page = browser.new_page()
    page.goto(write_report(run, uncensored=True).as_uri())
    visible = "(one) => one.checkVisibility({contentVisibilityAuto: true}) && one.getClientRects().length > 0"
    count = f"(which) => [...document.querySelectorAll(which)].filter({visible}).length"
    assert page.evaluate(count, ".prompts ol") == 0 and page.evaluate(count, ".originals img") == 0
    page.emulate_media(media="print")
    page.wait_for_function(f"({count})('.prompts ol') > 0")  # a busy browser takes a while to lay it out anew
    assert page.evaluate(count, ".originals img") == 0
    page.close()
