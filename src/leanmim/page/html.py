"""Pieces of HTML: escaped values, tables, remarks, pictures."""

import base64
import io
import re
from collections.abc import Iterable
from contextlib import suppress
from html import escape
from typing import Any, NamedTuple

from PIL import Image

from leanmim.data.read import UNREADABLE


class Html(str):
    """Text that is markup already; every other text is escaped."""


def safe(value: Any) -> Html:
    """A value as it is written on the command line, escaped; markup is returned unchanged."""
    if isinstance(value, Html):
        return value
    if isinstance(value, dict):
        text = ", ".join(f"{safe(key)} {safe(item)}" for key, item in value.items())
    elif isinstance(value, list):
        text = " ".join(map(safe, value))
    else:
        text = escape(f"{value:.6g}" if isinstance(value, float) else str(value))
    return Html(text or "-")


class Row(NamedTuple):
    """A row of a table; each cell after the head takes ``span`` columns."""

    head: Any
    cells: list[Any]
    style: str = ""
    span: int = 1


def row(head: Any, cells: Iterable[Any], style: str = "", span: int = 1) -> Row:
    """A `Row` of any cells."""
    return Row(head, list(cells), style, span)


def table(titles: Iterable[Any], rows: Iterable[Row], style: str = "") -> Html:
    """A table that scrolls sideways where it is too wide. Each cell knows its title: on a phone the rows of short cells become
    cards.
    """
    names = list(map(safe, titles))
    header = "".join(f'<th scope="col">{name}</th>' for name in names)
    labels = [escape(re.sub("<[^>]*>", "", name), quote=True) for name in names[1:]]
    lines = []
    for head, cells, of_row, span in rows:
        body = "".join(
            f'<td colspan="{span}" data-label="{label}">{safe(cell)}</td>'
            for cell, label in zip(cells, labels, strict=False)
        )
        lines.append(f'<tr class="{of_row}"><th scope="row">{safe(head)}</th>{body}</tr>')
    body = f"<thead><tr>{header}</tr></thead>\n<tbody>" + "\n".join(lines) + "</tbody>"
    return Html(f'<div class="card {style}"><table>{body}</table></div>')


def soft(text: str) -> Html:
    """A remark, in a softer colour."""
    return Html(f'<span class="soft">{escape(text)}</span>')


def picture(png: bytes, alt: str) -> Html:
    """A PNG picture, embedded in the page; as WebP where that is smaller, as of photos it is by far. One that is damaged stays as it is."""
    kind, data = "png", png
    with suppress(*UNREADABLE), Image.open(io.BytesIO(png)) as own:
        webp = io.BytesIO()
        own.convert("RGB").save(webp, "WEBP", quality=85)
        kind, data = min(("webp", webp.getvalue()), ("png", png), key=lambda pair: len(pair[1]))
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Html(f'<img alt="{escape(alt)}" src="{source}">')


def png(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def bar(share: float, colour: str) -> Html:
    """A share of 1 as a bar."""
    return Html(f'<span class="bar"><span style="width:{100 * share:.1f}%;background:{colour}"></span></span>')


NOT_YET = soft("not yet")
