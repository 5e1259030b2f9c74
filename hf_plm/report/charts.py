"""Charts of a report as inline SVG: they scale, take the page's colours by day and night, and need no script.

Each is 420 units wide with letters of 12, so that it can be read at the width of a phone and two stand side by side on
a desk. What belongs together has one colour, one mark and one kind of line: none tells it alone.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from matplotlib.ticker import LogLocator, MaxNLocator

from hf_plm.report.page import Html, element, escape, join

WIDTH, HEIGHT = 420, 280
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 42
DASHES = ("", "7 4", "2 4", "9 3 2 3")
MARKS = ("circle", "square", "triangle", "diamond", "cross", "down")
QUIET = 7
"""The style of what is there to compare with."""
NUM_COLOURS = 7


@dataclass(frozen=True)
class Series:
    """Points that belong together. `low` and `high` are the ends of their intervals."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: int = 0  # colour, kind of line and mark; QUIET
    kind: Literal["line", "marked", "points", "faint"] = "line"  # faint: no mark, and not in the legend


@dataclass(frozen=True)
class Axis:
    """From numbers to places in a picture."""

    label: str
    low: float
    high: float
    begin: float = 0
    end: float = 1
    is_log: bool = False
    names: Sequence[str] = field(default=())  # of 0, 1, 2 ... where the axis has no numbers

    def at(self, value: float) -> float:
        low, high, value = (math.log10(one) if self.is_log else one for one in (self.low, self.high, value))
        return self.begin + (value - low) / (high - low) * (self.end - self.begin)

    def ticks(self) -> list[tuple[float, str]]:
        if self.names:
            return list(enumerate(self.names))
        if self.is_log:
            decades = math.log10(self.high / self.low)
            values = LogLocator(subs=(1,) if decades > 2.5 else (1, 2, 5)).tick_values(self.low, self.high)
        else:
            values = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        slack = 0 if self.is_log else 1e-9 * (self.high - self.low)
        inside = [float(value) for value in values if self.low - slack <= value <= self.high + slack]
        plain = [f"{0.0 if abs(value) < slack else value:,.6g}" for value in inside]
        if not self.is_log and not any("e" in text for text in plain):
            decimals = max((len(text.partition(".")[2]) for text in plain), default=0)
            plain = ["0" if abs(value) < slack else f"{value:,.{decimals}f}" for value in inside]
        return [(value, text.replace("-", "\u2212")) for value, text in zip(inside, plain, strict=True)]


def span(values: Iterable[float], pad: float = 0.06, zero: bool = False, is_log: bool = False) -> tuple[float, float]:
    """Low and high of an axis that holds the finite values, with a little room."""
    finite = [value for value in values if math.isfinite(value) and (value > 0 or not is_log)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if is_log:
        return (low / 1.3, high * 1.3) if finite else (0.1, 1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if zero and low == high == 0:
        return 0.0, 1.0
    room = (high - low) * pad or abs(high) * pad or 1.0
    return (low if zero and low == 0 else low - room), (high if zero and high == 0 else high + room)


def xy_chart(series: Sequence[Series], x: Axis, y: Axis, alt: str, height: int = HEIGHT, width: int = WIDTH) -> Html:
    """Lines and points over numbers; one of three side by side is less wide, so that its letters stay as large."""
    left = (30 if y.label else 14) + 7 * max((len(text) for _, text in y.ticks()), default=0)
    x, y = _placed(x, left, width - RIGHT), _placed(y, height - BOTTOM, TOP)
    parts = [*_frame(x, y, height, left), *(_drawn(one, x, y) for one in series)]
    return join([legend(series), _svg(parts, height, alt, width)])


def rows_chart(
    names: Sequence[str], series: Sequence[Series], x: Axis, alt: str, zero: bool = False, left: int = LEFT
) -> Html:
    """A row for each name, and in it a point with its interval for each series: its `y` is over the names."""
    num_offset = len([one for one in series if one.style != QUIET])
    spacing = max(18, 13 * num_offset)
    height = TOP + BOTTOM + spacing * len(names)
    x = _placed(x, left, WIDTH - RIGHT)
    rows = _placed(Axis("", -0.5, len(names) - 0.5, names=names), TOP, height - BOTTOM)
    parts = _frame(x, rows, height, left)
    if zero and x.low < 0 < x.high:
        parts.append(f'<line class="zero" x1="{x.at(0):.1f}" x2="{x.at(0):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
    placed = 0
    for one in series:
        shift = 0.0
        if one.style != QUIET:
            shift = (placed - (num_offset - 1) / 2) * 0.6 / max(num_offset, 2)
            placed += 1
        for row, value in enumerate(one.y):
            low, high = (one.low[row], one.high[row]) if one.low else (math.nan, math.nan)
            middle = rows.at(row + shift)
            if math.isfinite(low) and math.isfinite(high):
                begin, end = (x.at(min(max(at, x.low), x.high)) for at in (low, high))
                parts.append(f'<path class="bar s{one.style}" d="M{begin:.1f} {middle:.1f}H{end:.1f}"/>')
            if math.isfinite(value):
                parts.append(mark(x.at(value), middle, one.style))
    return join([legend([_as_points(one) for one in series]), _svg(parts, height, alt)])


def scatter(series: Sequence[Series], alt: str) -> Html:
    """Points in a plane whose directions have no names."""
    x = _placed(Axis("", *span([value for one in series for value in one.x], 0.04)), 6, WIDTH - 6)
    y = _placed(Axis("", *span([value for one in series for value in one.y], 0.04)), WIDTH - 66, 6)
    frame = f'<rect class="frame" x="1" y="1" width="{WIDTH - 2}" height="{WIDTH - 62}"/>'
    dots = [
        mark(x.at(across), y.at(up), one.style, 3.2)
        for one in series
        for across, up in zip(one.x, one.y, strict=True)
        if math.isfinite(across) and math.isfinite(up)
    ]
    return join([legend(series), _svg([frame, *dots], WIDTH - 60, alt)])


def mark(x: float, y: float, style: int, size: float = 4.2) -> str:
    """The mark of a style, around a place."""
    a = size
    colour = f"f{style if style == QUIET else style % NUM_COLOURS}"
    shape = "circle" if style == QUIET else MARKS[(style + style // NUM_COLOURS) % len(MARKS)]
    if shape == "circle":
        return f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{a:.1f}"/>'
    path = {
        "square": f"M{x - a * 0.9:.1f} {y - a * 0.9:.1f}h{a * 1.8:.1f}v{a * 1.8:.1f}h{-a * 1.8:.1f}z",
        "triangle": f"M{x:.1f} {y - a * 1.2:.1f}l{a * 1.2:.1f} {a * 2.1:.1f}h{-a * 2.4:.1f}z",
        "down": f"M{x:.1f} {y + a * 1.2:.1f}l{a * 1.2:.1f} {-a * 2.1:.1f}h{-a * 2.4:.1f}z",
        "diamond": f"M{x:.1f} {y - a * 1.3:.1f}l{a * 1.3:.1f} {a * 1.3:.1f}l{-a * 1.3:.1f} {a * 1.3:.1f}"
        f"l{-a * 1.3:.1f} {-a * 1.3:.1f}z",
        "cross": f"M{x - a:.1f} {y - a * 0.35:.1f}h{a * 0.65:.1f}v{-a * 0.65:.1f}h{a * 0.7:.1f}v{a * 0.65:.1f}"
        f"h{a * 0.65:.1f}v{a * 0.7:.1f}h{-a * 0.65:.1f}v{a * 0.65:.1f}h{-a * 0.7:.1f}v{-a * 0.65:.1f}h{-a * 0.65:.1f}z",
    }[shape]
    return f'<path class="{colour}" d="{path}"/>'


def legend(series: Sequence[Series]) -> Html:
    """What each colour, mark and line is, in a list that wraps."""
    named = [one for one in series if one.label and one.kind != "faint"]
    if not named:
        return Html("")
    return element(
        "ul",
        *(
            element("li", Html(f'<svg viewBox="0 0 30 14" aria-hidden="true">{_swatch(one)}</svg>'), one.label)
            for one in named
        ),
        class_="legend",
    )


def _swatch(one: Series) -> str:
    line = f'<path class="line s{_colour(one)}"{_dash(one)} d="M1 7H29"/>' if one.kind in ("line", "marked") else ""
    return line + (mark(15, 7, one.style) if one.kind in ("marked", "points") else "")


def _as_points(one: Series) -> Series:
    return Series(one.label, (), (), style=one.style, kind="points")


def _colour(one: Series) -> int:
    return one.style if one.style == QUIET else one.style % NUM_COLOURS


def _dash(one: Series) -> str:
    dash = "5 4" if one.style == QUIET else DASHES[one.style % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash and one.kind != "faint" else ""


def _drawn(one: Series, x: Axis, y: Axis) -> str:
    """A series as a path for each stretch without a gap, its intervals and its marks."""
    drawn, is_down, path = [], False, []
    for index, (across, up) in enumerate(zip(one.x, one.y, strict=True)):
        if not (math.isfinite(across) and math.isfinite(up)) or (y.is_log and up <= 0):
            is_down = False
            continue
        # What lies outside is drawn at the edge: the first losses of a run, for one. Faint lines are cut there.
        px, py = x.at(across), y.at(up if one.kind == "faint" else min(max(up, y.low), y.high))
        path.append(f"{'L' if is_down else 'M'}{px:.1f} {py:.1f}")
        is_down = True
        if one.low and math.isfinite(one.low[index]) and math.isfinite(one.high[index]):
            ends = [y.at(min(max(end, y.low), y.high)) for end in (one.low[index], one.high[index])]
            drawn.append(f'<path class="bar s{_colour(one)}" d="M{px:.1f} {ends[0]:.1f}V{ends[1]:.1f}"/>')
        if one.kind in ("marked", "points"):
            drawn.append(mark(px, py, one.style, 3.6))
    if one.kind != "points":
        faint = " faint" if one.kind == "faint" else ""
        line = f'<path class="line s{_colour(one)}{faint}"{_dash(one)} d="{"".join(path)}"/>'
        drawn.insert(0, _clipped(line, x, y) if faint else line)
    return "".join(drawn)


def _clipped(drawn: str, x: Axis, y: Axis) -> str:
    """Inside the axes; a picture within the picture needs no id, as a clip path would."""
    box = f"{x.begin:.1f} {y.end:.1f} {x.end - x.begin:.1f} {y.begin - y.end:.1f}"
    left, top, width, height = box.split()
    return f'<svg class="clip" x="{left}" y="{top}" width="{width}" height="{height}" viewBox="{box}">{drawn}</svg>'


def _placed(axis: Axis, begin: float, end: float) -> Axis:
    return Axis(axis.label, axis.low, axis.high, begin, end, axis.is_log, axis.names)


def _frame(x: Axis, y: Axis, height: float, left: float = LEFT) -> list[str]:
    bottom, right = max(y.begin, y.end), x.end
    parts = []
    for value, text in x.ticks():
        at = x.at(value)
        if not x.names:
            parts.append(f'<path class="tick" d="M{at:.1f} {TOP}V{bottom:.1f}"/>')
        parts.append(
            f'<text class="quiet" x="{at:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{escape(text)}</text>'
        )
    for value, text in y.ticks():
        at = y.at(value)
        parts.append(f'<path class="tick" d="M{left} {at:.1f}H{right:.1f}"/>')
        kind = "" if y.names else ' class="quiet"'
        parts.append(f'<text{kind} x="{left - 7}" y="{at + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    parts.append(f'<path class="frame" d="M{left} {TOP}V{bottom:.1f}H{right:.1f}"/>')
    if x.label:
        middle = (x.begin + x.end) / 2
        parts.append(f'<text x="{middle:.1f}" y="{height - 6:.1f}" text-anchor="middle">{escape(x.label)}</text>')
    if y.label:
        middle = (y.begin + y.end) / 2
        parts.append(
            f'<text transform="translate(12 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(y.label)}</text>'
        )
    return parts


def _svg(parts: Iterable[str], height: float, alt: str, width: float = WIDTH) -> Html:
    return Html(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(alt)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
