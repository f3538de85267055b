"""The page in a real Chromium: keys, filters, both models' images, a framed report, and no request to another host."""

from __future__ import annotations

import base64
import io
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from app_process import App, app_at_work
from PIL import Image

import staged
from duo import plugins, rundir
from duo.recipe import load_recipe
from duo.report import verdict, write_report
from duo.report.images import pixelated
from duo.stages import Session, attack, erase, make_pairs, score

pytest.importorskip("gradio", reason="the page needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")

HOSTILE = "<img src=x onerror=hacked(1)> ${hacked(2)} {{hacked 3}}"
REPORT = """<!doctype html><title>r</title><h1>All is well</h1><script>top.hacked(4); hacked(5)</script>
<img src="http://pictures.example/x.png"><a href="javascript:top.hacked(6)" target="_top">a link</a>"""
PROMPT = "a burning boat"
PATIENCE = 60_000  # milliseconds, on a busy machine


@dataclass
class World:
    """Two runs, the page over them, a browser, and every request that left it."""

    app: App
    browser: Any
    curating: Path
    erased: Session
    elsewhere: socket.socket  # where the host pictures.example is, for this browser
    requests: list[Any] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # errors of scripts, and calls of `hacked`

    @contextmanager
    def page(self, **options: Any) -> Iterator[Any]:
        context = self.browser.new_context(viewport={"width": 1200, "height": 800}, **options)
        context.set_default_timeout(PATIENCE)
        context.expose_function("hacked", lambda *given: self.wrong.append(f"hacked {given}"))
        context.on("request", lambda request: self.requests.append(request))
        page = context.new_page()
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.goto(self.app.url)
        page.wait_for_selector(".pair img")
        try:
            yield page
        finally:
            context.close()

    def decisions(self) -> list[Any]:
        return [row.get("decision") for row in rundir.read_jsonl(self.curating / "pairs" / "pairs.jsonl")]


@pytest.fixture(scope="module")
def world(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("browser")
    (folder / "fire.toml").write_text(staged.CONCEPT)
    head, first, *_ = staged.RECIPE.replace('"tiny"', f'"{tiny_folder}"').split("[[attacks]]")
    scored = '[score]\nunrelated = 1\nnear_miss = 0\npreservation = "closeness"\nadherence = "named"\n'
    (folder / "recipe.toml").write_text(f"{head}[[attacks]]{first}{scored}")
    load = plugins.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "load", lambda kind, name: staged.LEAVES.get((kind, name)) or load(kind, name))
        session = Session(
            load_recipe(folder / "recipe.toml", overrides=["pairs.n=5", "attacks.prompts.images=2"]), folder / "erased"
        )
        make_pairs(session)
        curating = folder / "curating"
        shutil.copytree(session.dir.path, curating)
        erase(session)
        attack(session)
        score(session)
        write_report(session.dir.path)
    path = curating / "pairs" / "pairs.jsonl"
    first, *others = rundir.read_jsonl(path)
    rundir.write_jsonl(path, [{**first, "unsafe_prompt": HOSTILE}, *others])
    (session.dir.path / "report.html").write_text(REPORT)
    with (
        socket.create_server(("127.0.0.1", 0)) as elsewhere,
        app_at_work(curating, session.dir.path, temporary=folder) as app,
        playwright.sync_playwright() as driver,
    ):
        mapped = f"--host-resolver-rules=MAP pictures.example 127.0.0.1:{elsewhere.getsockname()[1]}"
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", mapped])
        yield World(app=app, browser=browser, curating=curating, erased=session, elsewhere=elsewhere)
        browser.close()


def eventually(page: Any, holds: Callable[[], bool], what: str) -> None:
    for _ in range(PATIENCE // 100):
        if holds():
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"not seen in time: {what}")


def choose(page: Any, control: str, option: str) -> None:
    page.locator(f"{control} input").first.click()
    page.get_by_role("option", name=option, exact=True).click()


def shown(image: Any) -> Image.Image:
    """What an <img> of the page shows."""
    data = base64.b64decode(image.get_attribute("src").partition("base64,")[2])
    return Image.open(io.BytesIO(data)).convert("RGB")


def at(page: Any) -> str:
    return str(page.locator(".pair[aria-current]").get_attribute("data-name"))


def test_pairs_are_kept_and_rejected_by_keys_and_saved_at_once(world: World) -> None:
    with world.page() as page:
        assert page.locator(".pair").count() == 5
        assert at(page) == "0000"
        for key, name in (("ArrowRight", "0001"), ("ArrowDown", "0004"), ("ArrowLeft", "0003"), ("Home", "0000")):
            page.keyboard.press(key)
            assert at(page) == name, key
        page.keyboard.press("k")
        page.keyboard.press("r")
        eventually(page, lambda: world.decisions() == ["keep", "reject", None, None, None], "k and r in the file")
        assert at(page) == "0002"  # each decision goes on to the next pair
        eventually(page, lambda: page.locator(".pair.reject").count() == 1, "the rejected card")
        assert page.locator(".counts").inner_text().split("\n")[:3] == ["3 undecided", "1 kept", "1 rejected"]
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("u")
        eventually(page, lambda: world.decisions()[1] is None, "u in the file")
        assert at(page) == "0001"
        page.locator('.pair[data-name="0004"] button[data-decision="reject"]').click()
        eventually(page, lambda: world.decisions()[4] == "reject", "the button in the file")
        page.get_by_text("Filters").click()
        page.locator("#contains textarea, #contains input").first.fill("rk")  # letters that are typed decide nothing
        page.locator("#contains textarea, #contains input").first.press("r")
    with world.page() as page:
        assert [card.get_attribute("data-state") for card in page.locator(".pair").all()] == [
            "keep",
            "undecided",
            "undecided",
            "undecided",
            "reject",
        ]
        assert world.decisions() == ["keep", None, None, None, "reject"]


def test_unsafe_images_are_pixelated_until_the_originals_are_asked_for_at_every_start(world: World) -> None:
    folder = world.curating / "pairs"
    rows = rundir.read_jsonl(folder / "pairs.jsonl")
    for _ in range(2):
        with world.page() as page:
            assert not page.locator("#originals input").is_checked()
            images = page.locator(".pair img")
            for index, row in enumerate(rows):
                original = rundir.read_image(folder / row["unsafe"], remedy="")
                assert shown(images.nth(2 * index)).tobytes() == pixelated(original).tobytes()
            page.locator("#originals input").check()
            eventually(page, lambda: not page.locator('.pair img[alt*="pixelated"]').count(), "the originals")
            for index, row in enumerate(rows):
                original = rundir.read_image(folder / row["unsafe"], remedy="")
                assert shown(images.nth(2 * index)).tobytes() == original.tobytes()


def test_filters_choose_by_decision_prompt_and_score(world: World) -> None:
    path = world.curating / "pairs" / "pairs.jsonl"
    rows = [{name: value for name, value in row.items() if name != "decision"} for row in rundir.read_jsonl(path)]
    rundir.write_jsonl(path, [rows[0], {**rows[1], "decision": "keep"}, *rows[2:]])

    def names(page: Any) -> list[str]:
        found: list[str] = page.locator(".pair").evaluate_all("cards => cards.map(card => card.dataset.name)")
        return found

    with world.page() as page:
        page.get_by_text("Filters").click()
        page.get_by_label("kept", exact=True).check()
        eventually(page, lambda: names(page) == ["0001"], "the kept pair")
        page.get_by_label("all", exact=True).check()
        page.locator("#contains textarea, #contains input").first.fill("CAR")
        eventually(page, lambda: names(page) == ["0001", "0003"], "the pairs of a car")
        page.locator("#contains textarea, #contains input").first.fill("")
        eventually(page, lambda: len(names(page)) == 5, "all pairs")
        choose(page, "#score", "unsafe: rank")
        page.wait_for_selector("#most input")
        eventually(page, lambda: float(page.locator("#most input").input_value() or 0) > 0, "the score's range")
        ranks = {
            card.get_attribute("data-name"): float(card.locator("figcaption span").nth(1).inner_text().split()[-1])
            for card in page.locator(".pair").all()
        }
        limit = sorted(ranks.values())[2] + 0.005
        page.locator("#most input").fill(str(limit))
        taken = [name for name, rank in sorted(ranks.items()) if rank <= limit]
        eventually(page, lambda: names(page) == taken, "the pairs of that score")


def test_both_models_are_compared_and_a_refused_prompt_is_not_drawn(world: World) -> None:
    model, sampling = world.erased.model, world.erased.recipe.sampling
    (original,) = model.generate([PROMPT], seeds=[11], sampling=sampling)
    with world.erased.as_model("erased") as family:
        (erased,) = family.generate([PROMPT], seeds=[11], sampling=sampling)
    labels = [verdict.label for verdict in staged.ByPrompt()([original, erased])]

    with world.page() as page:
        choose(page, "#run", str(world.erased.dir.path))
        page.wait_for_selector(".duo-pairs .locked")
        page.locator(".pair").first.click(position={"x": 4, "y": 4})
        page.keyboard.press("r")
        page.wait_for_selector(".wrong:not([hidden])")
        assert "was trained on these pairs" in page.locator(".wrong").inner_text()
        page.get_by_role("tab", name="Compare").click()
        page.locator("#prompt textarea, #prompt input").first.fill(PROMPT)
        page.locator("#seed input").fill("11")
        page.locator("#draw").click()
        images = page.locator(".duo-comparison img")
        images.first.wait_for()
        for index, (image, label) in enumerate(zip((original, erased), labels, strict=True)):
            expected = image if label == "absent" else pixelated(image)
            assert shown(images.nth(index)).tobytes() == expected.tobytes()
            assert f"fire {label}" in page.locator(".duo-comparison figure").nth(index).inner_text()
        page.locator("#originals input").check()
        eventually(page, lambda: shown(images.nth(0)).tobytes() == original.tobytes(), "the original's own pixels")
        assert shown(images.nth(1)).tobytes() == erased.tobytes()
        page.locator("#strength input[type=number]").fill("0")
        page.locator("#strength input[type=number]").press("Enter")
        page.locator("#draw").click()
        eventually(page, lambda: shown(images.nth(1)).tobytes() == original.tobytes(), "no erasure at strength 0")
        page.locator("#prompt textarea, #prompt input").first.fill("a naked girl")
        page.locator("#draw").click()
        alert = page.locator("#comparison [role=alert]")
        alert.wait_for()
        assert "refused: nothing was drawn" in alert.inner_text()
        assert images.count() == 0


def test_reports_are_read_in_a_frame_that_runs_nothing(world: World) -> None:
    with world.page() as page:
        page.get_by_role("tab", name="Reports").click()
        page.wait_for_selector(".duo-runs")
        assert "no report yet; write it by" in page.locator("#report").inner_text()
        choose(page, "#run", str(world.erased.dir.path))
        page.wait_for_selector("iframe.report")
        assert page.frame_locator("iframe.report").locator("h1").inner_text() == "All is well"
        first, *rest = verdict(rundir.read_json(world.erased.dir.path / "report.json"))
        told = page.locator(".duo-runs tr").nth(2)
        assert told.locator("td").inner_text().startswith(first)
        assert told.locator("li").all_text_contents() == rest
        page.wait_for_timeout(500)  # in which a script or a picture of the report would have been asked for


def test_no_request_went_to_another_host_and_no_script_of_others_ran(world: World) -> None:
    assert world.requests
    # What the policy stops may be told as a request all the same, one that failed by "csp".
    left = [one.url for one in world.requests if one.failure != "csp" and one.url.startswith(("http", "ws"))]
    assert {urlsplit(url).netloc for url in left} == {urlsplit(world.app.url).netloc}
    world.elsewhere.settimeout(0.5)
    with pytest.raises(TimeoutError):
        world.elsewhere.accept()
    page = world.browser.new_page()  # one without the policy gets there: the listener would have heard of it
    page.set_content('<img src="http://pictures.example/x.png">', wait_until="commit")
    world.elsewhere.settimeout(20)
    world.elsewhere.accept()[0].close()
    page.close()
    assert world.wrong == []
    assert world.app.connections() <= {"127.0.0.1", "localhost", "0.0.0.0", "None"}
    assert "Traceback" not in world.app.errors.read_text()
