"""A figure as SVG that stands inside an HTML page: its colours follow the page, its ids collide with no other's."""

from __future__ import annotations

import re
from io import BytesIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from .canvas import GREY, GRID, quiet_about_glyphs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What is paper, ink or rule in a picture is so in the page too, in the light and in the dark; strategies keep theirs.
_PAGE_COLORS = {
    "#ffffff": "var(--paper)",
    "#000000": "var(--ink)",
    GREY.lower(): "var(--muted)",
    GRID.lower(): "var(--rule)",
}
_COLOR = re.compile(r"#[0-9a-f]{6}\b")
_FONT = re.compile(r"font-family: [^;]*;? ?")
_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def inline_svg(figure: Figure, name: str) -> str:
    """`figure` as an ``<svg>`` element; the same data give the same text.

    `name` (letters, digits and underscores) goes before every id. Texts stay texts: they can be searched, copied and
    read out, and whatever is in them is escaped.
    """
    import matplotlib

    content = BytesIO()
    plain = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.hashsalt": "gradsync", "svg.fonttype": "none"}), quiet_about_glyphs():
        figure.savefig(content, format="svg", transparent=True, metadata=plain)
    root = ElementTree.fromstring(content.getvalue())
    _tidy(root, name)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": name.replace("_", " ")}
    return ElementTree.tostring(root, encoding="unicode")


def page_color(color: str) -> str:
    """`color` (such as ``#0072b2``) as a page with page.css has it."""
    return _PAGE_COLORS.get(color, color)


def _tidy(element: ElementTree.Element, prefix: str) -> None:
    """In place, with all children: without name spaces and global styles, shorter numbers, own ids, page colours."""
    element.tag = _local(element.tag)
    element.attrib = {_local(key): _attribute(_local(key), text, prefix) for key, text in element.attrib.items()}
    # Its "*" would style the whole page; page.css says the same for pictures only.
    for child in [child for child in element if _local(child.tag) == "style"]:
        element.remove(child)
    for child in element:
        if child.tail is not None and not child.tail.strip():
            child.tail = "\n"
        _tidy(child, prefix)


def _attribute(key: str, text: str, prefix: str) -> str:
    if key == "id":
        return f"{prefix}-{text}"
    if key == "d":
        return _NUMBER.sub(lambda number: f"{float(number.group()):.2f}", " ".join(text.split()))
    text = text.replace("url(#", f"url(#{prefix}-")
    if key == "href" and text.startswith("#"):
        return f"#{prefix}-{text[1:]}"
    if key in ("style", "fill", "stroke"):
        text = _COLOR.sub(lambda color: page_color(color.group()), _FONT.sub("", text))
    return text


def _local(name: str) -> str:
    return name.rpartition("}")[2]
