"""Figures of others as parts of the page: shapes and text go through, everything that acts or asks outside does not."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from duo.errors import UserError
from duo.report import figures
from duo.report.inline_svg import LARGEST, inlined, read_svg

SPACE = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def _svg(inside: str) -> str:
    return f'<svg {SPACE} viewBox="0 0 9 9">{inside}</svg>'


def _inlined(inside: str) -> str:
    return inlined(_svg(inside), name="f", where="x.svg")


def test_styles_become_attributes() -> None:
    told = _inlined('<path d="M 0 0" style="fill: none; stroke: #aabbcc; stroke-width: 0.8"/>')
    assert (
        told == '<svg viewBox="0 0 9 9"><path d="M 0 0" fill="none" stroke="#aabbcc" stroke-width="0.8"></path></svg>'
    )
    told = _inlined("<text style=\"font: 700 9.5px 'DejaVu Sans', sans-serif; text-anchor: middle\">a</text>")
    assert '<text font-weight="700" font-size="9.5px" text-anchor="middle">a</text>' in told


def test_ids_are_the_figures_own_and_references_follow() -> None:
    told = _inlined('<defs><clipPath id="p"/></defs><use xlink:href="#m"/><g id="m" clip-path="url(#p)"/>')
    assert 'clipPath id="f-p"' in told and 'use href="#f-m"' in told and 'id="f-m" clip-path="url(#f-p)"' in told


def test_texts_are_escaped_and_show_what_is_hidden() -> None:
    assert "<text>&lt;b&gt; &amp; \\u202e</text>" in _inlined("<text>&lt;b&gt; &amp; \u202e</text>")


def test_what_only_dresses_is_left_out() -> None:
    told = _inlined('<style>*{stroke-linejoin: round}</style><metadata><a>x</a></metadata><g class="x" data-a="1"/>')
    assert told == '<svg viewBox="0 0 9 9"><g></g></svg>'


@pytest.mark.parametrize(
    ("inside", "named"),
    [
        ("<script>alert(1)</script>", "<script>"),
        ("<foreignObject/>", "<foreignObject>"),
        ('<image href="data:image/png;base64,"/>', "<image>"),
        ('<a href="#x"/>', "<a>"),
        ('<animate attributeName="x"/>', "<animate>"),
        ('<h:img xmlns:h="http://www.w3.org/1999/xhtml" src="x"/>', "xhtml"),
        ('<g onload="alert(1)"/>', "'onload'"),
        ('<use href="other.svg#x"/>', "'other.svg#x'"),
        ('<use xlink:href="http://x.y/z"/>', "'http://x.y/z'"),
        ('<g fill="url(http://x.y/z)"/>', "'fill'"),
        ('<g style="fill: url( //x.y/z )"/>', "'fill'"),
        ("<g clip-path=\"url('x.svg#a')\"/>", "'clip-path'"),
        ('<g fill="u\\72l(x)"/>', "'fill'"),
    ],
)
def test_what_acts_or_asks_outside_is_refused(inside: str, named: str) -> None:
    with pytest.raises(UserError, match=r"^x\.svg: ") as caught:
        _inlined(inside)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("no svg", "no SVG"),
        ("<html/>", "its root is"),
        (f'<!DOCTYPE svg [<!ENTITY a "b">]>{_svg("")}', "entities"),
        (f"<svg {SPACE}>{' ' * LARGEST}</svg>", "too many"),
    ],
)
def test_what_is_no_figure_is_refused(text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        inlined(text, name="f", where="x.svg")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_bytes(b"\xff\xfe")
    for name in ("a.svg", "none.svg"):
        with pytest.raises(UserError, match=name):
            read_svg(tmp_path / name, name="f")


def test_a_figure_of_ours_loses_no_mark_and_no_word() -> None:
    svg = figures.training_curves({"loss": tuple((float(i), 1 / (i + 1)) for i in range(9))})
    before, after = ElementTree.fromstring(svg), ElementTree.fromstring(inlined(svg, name="f", where="x"))
    for tag in ("path", "text", "use", "clipPath"):
        found = [one for one in before.iter() if one.tag.endswith(f"}}{tag}")]
        again = [one for one in after.iter() if one.tag == tag]
        assert len(found) == len(again) and [one.text for one in found if tag == "text"] == [
            one.text for one in again if tag == "text"
        ]
    assert "style=" not in inlined(svg, name="f", where="x")


def test_shapes_that_copy_copies_are_refused() -> None:
    """Ten levels of ten are ten thousand million shapes in two thousand characters."""
    levels = "".join(f'<g id="l{i + 1}">' + f'<use href="#l{i}"/>' * 10 + "</g>" for i in range(9))
    with pytest.raises(UserError, match="<use> copies other <use>"):
        _inlined(f'<defs><path id="l0" d="M0 0"/>{levels}</defs><use href="#l9"/>')
    assert "<use" in _inlined('<path id="m" d="M0 0"/><g id="g"><use xlink:href="#m"/></g>')


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(UserError, match="nested more than 50 deep"):
        _inlined("<g>" * 3000 + "</g>" * 3000)
