"""SVG files as parts of the page. Only shapes and text go through, so that a figure can neither act nor ask a network.

What is known is written anew, attribute by attribute: the page's policy forbids `style` attributes and every style
sheet but its own, so each property of a `style` becomes an attribute (they mean the same in SVG).
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from duo.errors import UserError
from duo.report.plain_text import visible

LARGEST = 8_000_000  # characters of an SVG
DEEPEST = 50  # elements within each other

_SPACE = "{http://www.w3.org/2000/svg}"
_SHAPES = ("path", "rect", "circle", "ellipse", "line", "polyline", "polygon", "use", "clipPath")
_KNOWN = {"svg", "g", "defs", "text", "tspan", "title", "desc", *_SHAPES}
_LEFT_OUT = {"metadata", "style"}  # who made it, and what the page's own style sheet says
_GEOMETRY = "x y x1 y1 x2 y2 cx cy r rx ry dx dy width height viewBox transform points d id clip-path clipPathUnits"
_PAINT = (
    "fill fill-opacity fill-rule clip-rule stroke stroke-width stroke-opacity stroke-linecap stroke-linejoin "
    "stroke-dasharray stroke-dashoffset stroke-miterlimit opacity font-size font-style font-weight text-anchor "
    "dominant-baseline"
)
_ATTRIBUTES = {*_GEOMETRY.split(), *_PAINT.split(), "role", "aria-label"}
_FONT = re.compile(r"(?:(?P<style>italic|oblique)\s+)?(?:(?P<weight>bold|[1-9]00)\s+)?(?P<size>[\d.]+(?:px|pt)?)\b")
_ELSEWHERE = re.compile(r"url\(\s*(?!['\"]?#)|[a-z][a-z0-9+.-]*:|@|//|\\", re.IGNORECASE)
_OWN = re.compile(r"url\(\s*['\"]?#([^'\")]+)['\"]?\s*\)")


def inlined(svg: str, *, name: str, where: str) -> str:
    """`svg` as an `<svg>` element for the page; its ids begin with `name`, as several figures share one page.

    Raises:
        UserError: it is no SVG, or holds a script, an event handler, an image or a reference to anything outside it.
            The message begins with `where`.
    """
    if len(svg) > LARGEST:
        raise UserError(f"{where}: {len(svg):,} characters are too many for a figure, at most {LARGEST:,}")
    if "<!ENTITY" in svg:
        raise UserError(f"{where}: an SVG with entities is not embedded; save it without")
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise UserError(f"{where}: no SVG ({error}); draw it again") from None
    if root.tag != f"{_SPACE}svg":
        raise UserError(f"{where}: its root is {root.tag!r}, not an SVG's; draw it again")
    _refuse_bombs(root, where=where)
    root.attrib.pop("width", None)  # the page has the size; the shape is the view box's
    root.attrib.pop("height", None)
    return "".join(_written(root, name=name, where=where))


def _refuse_bombs(root: ElementTree.Element, *, where: str) -> None:
    """Raise `UserError` where a copied shape copies others: ten levels of ten are ten thousand million shapes."""
    use = f"{_SPACE}use"
    copied = {value.removeprefix("#") for one in root.iter(use) for key, value in one.items() if key.endswith("href")}
    if any(one.get("id") in copied and next(one.iter(use), None) is not None for one in root.iter()):
        raise UserError(f"{where}: an SVG in which <use> copies other <use> is not embedded; save it without")


def read_svg(path: Path, *, name: str) -> str:
    """The SVG file at `path` as `inlined`."""
    try:
        return inlined(path.read_text(encoding="utf-8"), name=name, where=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as an SVG ({error}); draw it again") from None


def _written(element: ElementTree.Element, *, name: str, where: str, depth: int = 0) -> Iterator[str]:
    if depth > DEEPEST:
        raise UserError(f"{where}: an SVG nested more than {DEEPEST} deep is not embedded; save it without groups")
    tag = str(element.tag).removeprefix(_SPACE)
    if tag in _LEFT_OUT:
        return
    if tag not in _KNOWN:
        raise UserError(
            f"{where}: an SVG with <{visible(tag)[:40]}> is not embedded, only shapes and text; save it without"
        )
    told = "".join(f' {key}="{html.escape(value)}"' for key, value in _attributes(element, name=name, where=where))
    yield f"<{tag}{told}>"
    yield html.escape(visible(element.text or ""), quote=False)
    for child in element:
        yield from _written(child, name=name, where=where, depth=depth + 1)
        yield html.escape(visible(child.tail or ""), quote=False)
    yield f"</{tag}>"


def _attributes(element: ElementTree.Element, *, name: str, where: str) -> Iterator[tuple[str, str]]:
    for full, value in element.attrib.items():
        key = full.rpartition("}")[2]
        if key.lower().startswith("on"):
            raise UserError(
                f"{where}: an SVG with the event handler {visible(key)[:40]!r} is not embedded; save it without"
            )
        if key == "href":
            if not value.startswith("#"):
                raise UserError(
                    f"{where}: an SVG that refers to {visible(value)[:40]!r} is not embedded; save it without"
                )
            yield "href", f"#{name}-{value[1:]}"
        elif key == "style":
            for part in value.split(";"):
                told, _, setting = part.partition(":")
                yield from _property(told.strip(), setting.strip(), name=name, where=where)
        else:
            yield from _property(key, value, name=name, where=where)


def _property(key: str, value: str, *, name: str, where: str) -> Iterator[tuple[str, str]]:
    """An attribute or a property of a style, where it is known."""
    if key == "font":
        font = _FONT.match(value)
        for part, told in font.groupdict().items() if font else ():
            if told:
                yield f"font-{part}", told
    elif key == "id":
        yield key, f"{name}-{value}"
    elif key in _ATTRIBUTES:
        if key not in ("aria-label", "role") and _ELSEWHERE.search(value):
            raise UserError(
                f"{where}: an SVG whose {key!r} is {visible(value)[:40]!r} is not embedded; save it without"
            )
        yield key, _OWN.sub(rf"url(#{name}-\1)", visible(value))
