"""Line charts as SVG; the page's style sheet colours them, so that they follow its light or dark mode."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from matplotlib.ticker import MaxNLocator

COLOURS = (  # readable on white and on near black
    "#2f7fd1", "#e07b00", "#1a9e6f", "#c2559d", "#8a6fd1", "#a08a00", "#d4493f", "#10949c", "#96654b", "#6b8f1e", "#b3396b", "#5a6fa8",
)  # fmt: skip
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 256, 54, 14, 36, 40  # of a chart and its margins, SVG units
DOTS = 60  # of a curve, each with its numbers for a pointer; of longer curves they are not drawn
MIDDLE = (LEFT + WIDTH - RIGHT) / 2

Point = tuple[float, float]


class Curve(NamedTuple):
    """A line of a chart.

    ``points`` are (x, y) and ``intervals`` (x, lowest y, highest y), in the units of the axes; ``dash`` is SVG's
    stroke-dasharray.
    """

    points: list[Point]
    colour: str
    label: str
    width: float = 1.8
    opacity: float = 0.9
    dash: str = ""
    intervals: Sequence[tuple[float, float, float]] = ()


def chart(title: str, curves: Sequence[Curve], zero: bool, empty: str, across: str = "epoch") -> str:
    """An SVG picture of curves.

    Args:
        title: with the unit of the vertical axis.
        curves: what is drawn.
        zero: whether the vertical axis includes 0.
        empty: the text to show where there are no curves.
        across: label of the horizontal axis, which begins at 0.
    """
    parts = [f'<text class="title" x="8" y="18">{title}</text>']
    if curves:
        parts += plot(curves, zero, across)
    else:
        parts.append(f'<text x="{MIDDLE}" y="{HEIGHT / 2}" text-anchor="middle">{empty}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'


def plot(curves: Sequence[Curve], zero: bool, across: str) -> list[str]:
    """The axes and the lines of a chart."""
    ys = [y for curve in curves for _, y in curve.points] + ([0.0] if zero else [])
    ys += [y for curve in curves for _, *ends in curve.intervals for y in ends]
    last = max(x for curve in curves for x, _ in curve.points)
    scale = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
    room = 0.05 * abs(ys[0]) if min(ys) == max(ys) else 0.0  # a constant would leave the axis without a length
    marks = scale.tick_values(min(ys) - room, max(ys) + room or 1.0)  # they enclose the lowest and the highest value
    low, high = marks[0], marks[-1]

    def place(x: float, y: float) -> Point:
        right, up = x / last, (y - low) / (high - low)
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for mark in marks:
        y = place(0.0, mark)[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{mark:.6g}</text>')
    for mark in (mark for mark in scale.tick_values(0, last) if mark <= last):
        x = place(mark, 0.0)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 22}" text-anchor="middle">{mark:.6g}</text>')
    parts.append(f'<text x="{MIDDLE}" y="{HEIGHT - 5}" text-anchor="middle">{across}</text>')
    for curve in curves:
        places = [place(*point) for point in thin(curve.points)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        step, style = (1, 'r="3"') if len(places) <= DOTS else (-(-len(places) // DOTS), 'class="hidden" r="5"')
        dots = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" {style}><title>{escape(curve.label)}: {value[1]:.5g} at {across} {value[0]:.4g}</title></circle>'
            for (x, y), value in zip(places[::step], thin(curve.points)[::step], strict=True)
        )
        ends = [(*place(x, low), *place(x, high)) for x, low, high in curve.intervals]
        bars = "".join('<polyline points="{:.1f},{:.1f} {:.1f},{:.1f}"/>'.format(*end) for end in ends)
        parts.append(
            f'<g color="{curve.colour}" opacity="{curve.opacity:.2f}"><title>{escape(curve.label)}</title>'
            f'<polyline points="{line}" stroke-width="{curve.width}" stroke-dasharray="{curve.dash}"/>{dots}{bars}</g>'
        )
    return parts


def thin(points: list[Point], bins: int = 300) -> list[Point]:
    """At most 2 ``bins`` + 2 points: the first, the last, and the lowest and highest of each bin, so that spikes stay."""
    size = math.ceil(len(points) / bins)
    if size <= 2:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return sorted(
        {points[0], points[-1], *(find(group, key=lambda p: p[1]) for group in groups for find in (min, max))}
    )
