"""The layout of the page in gradio: which control shows which view."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import gradio as gr

from duo.app.comparison import LARGEST_SEED, STRONGEST, Asked
from duo.app.curation import STATES, Filters
from duo.app.views import PER_PAGE, WORDS, Views
from duo.errors import UserError
from duo.pairs import SIDES

SYSTEM_FONTS = ("ui-sans-serif", "system-ui", "Segoe UI", "Noto Sans", "sans-serif")
SYSTEM_MONO = ("ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
CSS = files("duo.app").joinpath("page.css").read_text(encoding="utf-8")
KEYS = files("duo.app").joinpath("pairs.js").read_text(encoding="utf-8")
IN_TURN = {"concurrency_id": "views", "concurrency_limit": 1}
PRIVATE = {"api_visibility": "private"}  # nothing here is an API for others
PLAIN = {"js_on_load": None, "apply_default_css": False}  # HTML that listens to nothing, in our own style
HEADING = '<h1 class="duo-heading">duo<span>curate pairs · compare before and after · read reports</span></h1>'


def theme() -> gr.themes.Base:
    """Gradio's plain theme in the fonts of the system: its own default asks another host for them, or ships them."""
    return gr.themes.Base(primary_hue="orange", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=SYSTEM_MONO)


def build(views: Views) -> gr.Blocks:
    """The page over `views`. Nothing is judged, loaded or drawn before somebody looks."""
    with gr.Blocks(title="duo", analytics_enabled=False) as page:
        gr.HTML(HEADING, **PLAIN)
        with gr.Row(equal_height=True):
            place = gr.Dropdown(
                [(one.name, number) for number, one in enumerate(views.places)],
                value=0,
                label="Run",
                scale=3,
                min_width=260,
                elem_id="run",
            )
            originals = gr.Checkbox(
                False,
                label="Show the originals",
                info="Unsafe images are pixelated until this is ticked; it is off at every start.",
                scale=2,
                min_width=260,
                elem_id="originals",
            )
        with gr.Tabs(selected="pairs" if views.places[0].pairs is not None else "compare"):
            with gr.Tab("Pairs", id="pairs"):
                _pairs(views, page, place, originals)
            with gr.Tab("Compare", id="compare"):
                _compare(views, page, place, originals)
            with gr.Tab("Reports") as reports:
                _reports(views, reports, place)
    return page


def _pairs(views: Views, page: gr.Blocks, place: gr.Dropdown, originals: gr.Checkbox) -> None:
    with gr.Accordion("Filters", open=False), gr.Row():
        states = [(WORDS.get(state, state), state) for state in STATES]
        state = gr.Radio(states, value="all", label="Decision", elem_id="state", min_width=300)
        contains = gr.Textbox("", label="Prompt contains", elem_id="contains", max_lines=1, min_width=200)
        score = gr.Dropdown([("any", "")], value="", label="Score of the curator", elem_id="score", min_width=200)
        least = gr.Number(label="from", elem_id="least", min_width=100, step=0.05, visible=False)
        most = gr.Number(label="to", elem_id="most", min_width=100, step=0.05, visible=False)
    part = gr.Dropdown([("all", 0)], value=0, label="Pairs", visible=False, elem_id="part")

    def decide(told: dict[str, Any]) -> dict[str, Any]:
        return views.decide(int(told["place"]), str(told["name"]), told["decision"])

    grid = gr.HTML(
        views.note("Looking at the pairs …"),
        js_on_load=KEYS,
        server_functions=[decide],
        elem_id="pairs",
        apply_default_css=False,
    )

    def show(
        number: int,
        clear: bool,
        state: str,
        contains: str,
        score: str,
        least: float | None,
        most: float | None,
        at: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  gradio finds it by its default
    ) -> tuple[str, Any, Any]:
        side, name = _score(score)
        filters = Filters(state=state, contains=contains, side=side, score=name, least=least, most=most)
        found = views.grid(
            number, filters, originals=clear, page=at, tell=lambda share: progress(share, desc="The curator is looking")
        )
        names = [f"{side}: {name}" for side, name in found.scores]
        parts = [(f"{i * PER_PAGE + 1}–{(i + 1) * PER_PAGE}", i) for i in range(found.pages)]
        return (
            found.html,
            gr.Dropdown([("any", ""), *names], value=score if score in names else ""),
            gr.Dropdown(parts, value=min(at, found.pages - 1), visible=found.pages > 1),
        )

    def open_range(number: int, score: str) -> tuple[Any, Any]:
        side, name = _score(score)
        ends = views.score_range(number, side, name) if name else (0.0, 0.0)
        return tuple(gr.Number(end, visible=name is not None) for end in ends)

    controls = [place, originals, state, contains, score, least, most, part]
    # One after the other, so that an answer which took longer cannot replace a later one.
    wired: dict[str, Any] = {"fn": show, "inputs": controls, "outputs": [grid, score, part], **IN_TURN, **PRIVATE}
    # Text that is pasted is a change, and no input.
    triggers = [page.load, contains.change, *(one.input for one in controls if one not in (contains, score))]
    gr.on(triggers, **wired, trigger_mode="always_last")
    score.input(open_range, [place, score], [least, most], **IN_TURN, **PRIVATE).then(**wired)


def _score(chosen: str) -> tuple[str, str | None]:
    """The side and the name of a score as the list shows it, "safe: corrupted"; no name where none is chosen."""
    side, _, name = chosen.partition(": ")
    return side or SIDES[0], name or None


def _compare(views: Views, page: gr.Blocks, place: gr.Dropdown, originals: gr.Checkbox) -> None:
    with gr.Row(equal_height=True):
        prompt = gr.Textbox("", label="Prompt", scale=4, elem_id="prompt", max_lines=3, min_width=280)
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, elem_id="seed", min_width=120)
    with gr.Row(equal_height=True):
        offered = gr.Dropdown(
            [], value=None, label="Or a prompt of the concept", scale=3, min_width=260, elem_id="offered"
        )
        strength = gr.Slider(
            0,
            STRONGEST,
            value=1.0,
            step=0.05,
            label="Strength of the erasure",
            info="0 is the original model, 1 the erased one.",
            scale=3,
            min_width=260,
            elem_id="strength",
        )
        draw = gr.Button("Draw both", variant="primary", elem_id="draw", min_width=120)
    gr.HTML(
        '<p class="duo-hint">Both images start from the same noise. The judge decides what is pixelated, and it misses '
        "what it misses.</p>",
        **PLAIN,
    )
    images = gr.HTML("", elem_id="comparison", **PLAIN)
    asked = gr.State(None)

    def open_place(number: int) -> tuple[Any, Any, str, None]:
        scalable, told = views.comparable(number)
        slider = gr.Slider(value=1.0, interactive=scalable)
        return gr.Dropdown(views.offered(number), value=None), slider, told, None

    def show(number: int, clear: bool, prompt: str, seed: float | None, strength: float) -> tuple[str, Asked | None]:
        try:
            wanted = Asked(prompt=prompt.strip(), seed=int(seed or 0), strength=strength)
        except UserError as error:
            return views.note(str(error), role="alert"), None
        return views.comparison(number, wanted, originals=clear), wanted

    def show_again(number: int, clear: bool, asked: Asked | None) -> str:
        return "" if asked is None else views.comparison(number, asked, originals=clear)

    shown = [images, asked]
    given = [place, originals, prompt, seed, strength]
    opened = [offered, strength, images, asked]
    gr.on([page.load, place.input], open_place, place, opened, **IN_TURN, **PRIVATE)
    gr.on([draw.click, prompt.submit, strength.release], show, given, shown, **IN_TURN, **PRIVATE)
    chosen = offered.input(lambda text: text, offered, prompt, **PRIVATE)
    chosen.then(show, given, shown, **IN_TURN, **PRIVATE)
    originals.input(show_again, [place, originals, asked], images, **IN_TURN, **PRIVATE)


def _reports(views: Views, tab: gr.Tab, place: gr.Dropdown) -> None:
    table, report = gr.HTML("", **PLAIN), gr.HTML("", elem_id="report", **PLAIN)

    def show(number: int) -> tuple[str, str]:
        return views.summaries(), views.report(number)

    gr.on([tab.select, place.input], show, place, [table, report], **PRIVATE)
