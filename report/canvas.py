"""What all plots share: figures without pyplot, texts that matplotlib cannot misread, files without halves.

matplotlib is imported here and only when something is drawn: loading it takes a second, and it may be missing.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .files import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 150
_LABEL_WIDTHS = (22, 28)
"""The first in which a text is whole, so that the ends that tell variants apart are seen."""
_LABEL_LINES = 3
GREY = "#555555"
GRID = "#DDDDDD"


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure on the Agg canvas. Raises: UserError if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            f"The plots need matplotlib, which cannot be imported ({error}). Install it with: pip install matplotlib"
        ) from error
    # The object interface: pyplot keeps global state and may look for a display.
    figure = Figure(figsize=(width_in, height_in), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write `figure` as PNG; the same data give the same bytes."""
    content = BytesIO()
    with quiet_about_glyphs():
        figure.savefig(content, format="png", metadata={"Software": None})
    atomic_write_bytes(path, content.getvalue())
    return path


@contextmanager
def quiet_about_glyphs() -> Iterator[None]:
    """A name in a script that the font lacks shows as boxes; there is nothing that its reader should do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def title(figure: Figure, text: str, subtitle: str) -> None:
    """Above everything; several panels have titles of their own where the subtitle of one would stand."""
    panels = figure.axes
    head = text if len(panels) == 1 else f"{text}\n({subtitle})"
    figure.suptitle(plain(head), x=0.01, ha="left", fontsize=13 if len(panels) == 1 else 11, fontweight="bold")
    if len(panels) == 1:
        panels[0].set_title(plain(subtitle), loc="left", fontsize=9, color=GREY)


def clean(axes: Axes, grid_axis: str) -> None:
    """Frame only where values are read, a faint grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid_axis, color=GRID, linewidth=0.8)  # pyright: ignore[reportArgumentType]
    axes.set_axisbelow(True)


def say(axes: Axes, text: str, *, among_data: bool) -> None:
    """Why there are no data: in the middle, or in a corner where others have some."""
    place = {"x": 0.99, "y": 0.99, "ha": "right", "va": "top"} if among_data else {"x": 0.5, "y": 0.5, "ha": "center"}
    axes.text(s=plain(text), transform=axes.transAxes, color=GREY, fontsize=9, **place)


def plain(text: str) -> str:
    """`text` such that matplotlib draws it as it is: no formulas between dollar signs, no hidden legend entries."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def folded(text: str) -> str:
    """`text` on a few short lines, for tick labels and legends."""
    width = next((w for w in _LABEL_WIDTHS if len(textwrap.wrap(text, w)) <= _LABEL_LINES), _LABEL_WIDTHS[0])
    lines = textwrap.wrap(text, width, max_lines=_LABEL_LINES, placeholder=" …") or ["(no name)"]
    return plain("\n".join(lines))
