"""Draw pictures of samples with their labels and details, as a PNG and as an HTML page."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

from psclip_optax.training.data.splits import to_unit_scale
from psclip_optax.training.plot.figures import VERMILION

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, 9em); gap: 1.2em 1em; }
figure { margin: 0; }
img { width: 9em; image-rendering: pixelated; }
figcaption { font-size: 13px; }
.wrong { color: #D55E00; }
table { border-collapse: collapse; }
th, td { padding: 0.15em 0.8em; text-align: right; }
th:first-child, td:first-child { text-align: left; }
tr:nth-child(even) { background: #8882; }
"""


class Picture(NamedTuple):
    """A sample to look at.

    Attributes:
      image: `[H, W, C]`, uint8, or float32 where 1 is white.
      title: its label.
      was: its label before it was replaced; empty if it was not.
      details: further lines of text.
    """

    image: np.ndarray
    title: str
    was: str
    details: tuple[str, ...]


def draw_pictures(pictures: Sequence[Picture], title: str) -> Figure:
    """Draws pictures in a grid.

    Args:
      pictures: one or more, in the order of rows.
      title: the title of the figure.

    Returns:
      A figure outside Matplotlib's global state.

    Examples:
      >>> picture = Picture(np.zeros([8, 8, 1], np.uint8), "4", "9", ("scale 0.1",))
      >>> len(draw_pictures([picture], "Digits").axes)
      1
    """
    columns = max(4, math.ceil(math.sqrt(len(pictures))))
    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(1.35 * columns, 1.75 * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    for place, picture in enumerate(pictures):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(_pixels(picture.image), cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        name = f"{picture.title} (was {picture.was})" if picture.was else picture.title
        axes.set_title(name, fontsize=7, color=VERMILION if picture.was else "black")
        axes.set_xlabel("\n".join(picture.details), fontsize=6)
    figure.suptitle(title, x=0.008, ha="left", fontsize=11, weight="bold")
    return figure


def page_of_pictures(
    pictures: Sequence[Picture],
    title: str,
    paragraphs: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> str:
    """Writes a page that needs no other file.

    Args:
      pictures: one or more.
      title: the title of the page.
      paragraphs: plain text above the pictures.
      rows: a table below the pictures; its first row is the header.

    Returns:
      HTML.

    Examples:
      >>> picture = Picture(np.zeros([8, 8, 1], np.uint8), "a<b", "", ())
      >>> page = page_of_pictures([picture], "Pictures", ["Of samples."], [["class"], ["a<b"]])
      >>> page.count("a&lt;b"), "src='data:image/png;base64," in page
      (3, True)
    """
    head, *body = rows
    cells = [_row(head, "th"), *(_row(row, "td") for row in body)]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            "<html lang='en'><head><meta charset='utf-8'>",
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            *(f"<p>{html.escape(text)}</p>" for text in paragraphs),
            "<div class='pictures'>",
            *map(_figure, pictures),
            "</div>",
            "<h2>Classes</h2>",
            f"<table>{''.join(cells)}</table>",
            "</body></html>\n",
        ]
    )


def _figure(picture: Picture) -> str:
    buffer = io.BytesIO()
    imsave(buffer, _pixels(picture.image), format="png", cmap="gray", vmin=0, vmax=1)
    source = base64.b64encode(buffer.getvalue()).decode()
    title = html.escape(picture.title, quote=True)
    was = f" <span class='wrong'>(was {html.escape(picture.was)})</span>" if picture.was else ""
    details = "".join(f"<br>{html.escape(line)}" for line in picture.details)
    return (
        f"<figure><img alt='{title}' src='data:image/png;base64,{source}'>"
        f"<figcaption><b>{title}</b>{was}{details}</figcaption></figure>"
    )


def _row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _pixels(image: np.ndarray) -> np.ndarray:
    """Returns a picture `[H, W]` or `[H, W, 3]`, clipped to [0, 1] and without NaN."""
    pixels = np.clip(np.nan_to_num(to_unit_scale(image)), 0, 1)
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels
