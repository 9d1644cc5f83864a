"""``report.html``: the report as one page that needs no other file, in a browser, in the dark and on paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from .document import Document, Section, glued
from .files import atomic_write_text
from .methods import Style
from .svg import page_color
from .tables import Table

FILENAME = "report.html"
_CSS = Path(__file__).with_name("page.css")
_SECTIONS_OF_TABLES = ("Throughput", "Communication")


def write_html(folder: Path, document: Document, pictures: Mapping[str, str] | None) -> Path:
    """Write the page into `folder` and return its path. Raises: OSError.

    `pictures` are ``<svg>`` elements by the names that the sections have for plots; None says that there are none.
    """
    path = folder / FILENAME
    atomic_write_text(path, as_html(document, pictures))
    return path


def as_html(document: Document, pictures: Mapping[str, str] | None) -> str:
    """Every text in it is escaped, and nothing in it makes a browser load anything."""
    title = escape(document.title)
    body = [
        f"<header><h1>{title}</h1><p>{escape(document.read)}</p></header>",
        _section(document.summary, None, ()),
        _contents(document),
        *(_section(section, pictures, _tables_of(document, section)) for section in document.sections),
    ]
    if pictures is None:
        body.insert(1, "<p>Without pictures: matplotlib was not there when this page was made.</p>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # An icon that is empty: browsers would ask the server of the page for one.
        '<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>\n{_CSS.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def _contents(document: Document) -> str:
    links = (f'<a href="#{_anchor(section)}">{escape(section.title)}</a>' for section in document.sections)
    return f"<nav>{' '.join(links)}</nav>"


def _tables_of(document: Document, section: Section) -> Sequence[Table]:
    """Each table stands at the head of the section that explains it."""
    return [table for table, title in zip(document.tables, _SECTIONS_OF_TABLES, strict=True) if title == section.title]


def _section(section: Section, pictures: Mapping[str, str] | None, tables: Sequence[Table]) -> str:
    anchor = _anchor(section)
    parts = [
        f'<section id="{anchor}" aria-labelledby="{anchor}-title">',
        f'<h2 id="{anchor}-title">{escape(section.title)}</h2>',
        *map(_table, tables),
        "<ul>",
        *(f"<li>{escape(glued(line))}</li>" for line in section.lines),
        "</ul>",
        *(f"<pre><code>{escape(command)}</code></pre>" for command in section.commands),
        *(f"<figure>{pictures[name]}</figure>" for name in section.plots if pictures),
        "</section>",
    ]
    return "\n".join(parts)


def _anchor(section: Section) -> str:
    return section.title.lower().replace(" ", "-")


def _table(table: Table) -> str:
    heads = "".join(f'<th scope="col">{_lines(column)}</th>' for column in table.columns)
    notes = "".join(f"<p>{escape(note)}</p>" for note in table.notes)
    return (
        f'<div class="table"><table><caption>{escape(table.title)}</caption>\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{''.join(_rows(table))}</tbody></table></div>\n"
        f'<div class="notes">{notes}</div>'
    )


def _rows(table: Table) -> Iterator[str]:
    for index, (name, *figures) in enumerate(table.rows):
        mark = _swatch(table.styles[index]) if table.styles else ""
        cells = "".join(f"<td>{_lines(figure)}</td>" for figure in figures)
        yield f'<tr><th scope="row">{mark}{escape(name)}</th>{cells}</tr>\n'


def _lines(text: str) -> str:
    """The first line large, the others (a range, a unit) small below it."""
    first, *others = text.split("\n")
    return escape(first) + "".join(f"<small>{escape(other)}</small>" for other in others)


# Markers as the plots have them, as paths in a square of 10 by 10.
_SHAPES = {
    "o": "M.5 5a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "s": "M1 1h8v8H1z",
    "^": "M5 .5 9.5 9.5H.5z",
    "v": "M5 9.5 9.5.5H.5z",
    "D": "M5 0 10 5 5 10 0 5z",
    "P": "M3.5 0h3v3.5H10v3H6.5V10h-3V6.5H0v-3h3.5z",
    "X": "M2 0 5 3 8 0l2 2-3 3 3 3-2 2-3-3-3 3-2-2 3-3-3-3z",
    "*": "M5 0l1.2 3.6H10L7 6l1.2 4L5 7.5 1.8 10 3 6 0 3.6h3.8z",
    "h": "M5 0 9.4 2.5v5L5 10 .6 7.5v-5z",
}


def _swatch(style: Style) -> str:
    """What stands for the row in the plots."""
    color = page_color(style.color.lower())
    shape = _SHAPES.get(style.marker, _SHAPES["o"])
    return f'<svg class="swatch" viewBox="0 0 10 10" aria-hidden="true"><path d="{shape}" fill="{color}"/></svg>'
