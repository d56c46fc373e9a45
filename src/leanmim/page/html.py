"""Pieces of HTML: escaped values, tables, remarks, pictures."""

import base64
from collections.abc import Iterable
from html import escape
from typing import Any


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


def table(titles: Iterable[Any], rows: Iterable[Html], style: str = "") -> Html:
    """A table that scrolls sideways where it is too wide."""
    header = "".join(f'<th scope="col">{safe(cell)}</th>' for cell in titles)
    body = f"<thead><tr>{header}</tr></thead>\n<tbody>" + "\n".join(rows) + "</tbody>"
    return Html(f'<div class="card {style}"><table>{body}</table></div>')


def row(head: Any, cells: Iterable[Any], style: str = "", span: int = 1) -> Html:
    """A row of a table; each cell after the head takes ``span`` columns."""
    body = "".join(f'<td colspan="{span}">{safe(cell)}</td>' for cell in cells)
    return Html(f'<tr class="{style}"><th scope="row">{safe(head)}</th>{body}</tr>')


def soft(text: str) -> Html:
    """A remark, in a softer colour."""
    return Html(f'<span class="soft">{escape(text)}</span>')


def picture(png: bytes, alt: str) -> Html:
    """A PNG picture, embedded in the page."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return Html(f'<img alt="{escape(alt)}" src="{source}">')


NOT_YET = soft("not yet")
