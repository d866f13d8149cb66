"""Charts as inline SVG text: lines, histograms and intervals. Pure.

Colours and fonts come from the page's style sheet by class, so one drawing serves light, dark and print. Every series
differs in more than its colour (a fill, a dash, markers), for readers who see no colour and for paper.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from dice_core.report.run_data import Histogram

_WIDTH, _HEIGHT = 380, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 16, 26, 40
_ROW_WIDTH, _ROW_HEIGHT, _MARGIN = 400, 20, 16
_MOST_POINTS, _MOST_TICKS = 110, 6

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One series. `style` is its class in the style sheet."""

    style: str
    points: Sequence[Point]
    has_markers: bool = False


@dataclass(frozen=True)
class Rule:
    """A horizontal line at a value that means something, with its name."""

    y: float
    label: str


@dataclass(frozen=True)
class Axis:
    """What an axis shows, in which unit, the range it must cover at least, and whether it counts whole things.

    Where it has ends, points beyond them are drawn at the edge as triangles: one step out of the ordinary does not
    flatten the others.
    """

    label: str
    covers: Sequence[float] = field(default_factory=tuple)
    is_whole: bool = False
    ends: tuple[float, float] | None = None

    def clip(self, value: float) -> float:
        """Return the value, or the end beyond which it lies."""
        return value if self.ends is None else min(max(value, self.ends[0]), self.ends[1])


@dataclass(frozen=True)
class _Scale:
    """Maps values of one axis to the drawing."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, least_step: float = 0.0) -> tuple[float, ...]:
    """Return round numbers (1, 2 or 5 times a power of ten apart), the outermost at or beyond the range."""
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"an axis needs finite ends, got {low} and {high}")
    # A range that floats can hardly tell from a point gets a width of its own.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) / 10 or 0.5
        low, high = low - pad, high + pad
    power = 10.0 ** math.floor(math.log10((high - low) / _MOST_TICKS))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) <= _MOST_TICKS - 1)
    step = max(step, least_step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(i * step for i in range(first, last + 1))


def tick_label(value: float, step: float) -> str:
    """Return a tick with as many decimals as its step needs, and a real minus sign."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    text = f"{value:,.{decimals}f}" if decimals < 6 else f"{value:.2g}"
    return text.replace("-", "\u2212") if float(text.replace(",", "")) else text.lstrip("-")


def line_chart(
    title: str, x: Axis, y: Axis, lines: Sequence[Line], *, rules: Sequence[Rule] = (), marks: Sequence[Point] = ()
) -> str:
    """Draw lines over common axes.

    Args:
        title: read by screen readers; the page shows its own.
        x: the axis to the right.
        y: the axis upwards.
        lines: those without finite points are left out.
        rules: values to compare with.
        marks: points to single out.
    """
    drawn = [(line, _thin([p for p in line.points if all(map(math.isfinite, p))])) for line in lines]
    drawn = [(line, points) for line, points in drawn if points]
    everything = [point for _, points in drawn for point in points] + list(marks)
    if not everything:
        return ""
    across = _scale([p[0] for p in everything] + list(x.covers), _LEFT, _WIDTH - _RIGHT, tight=True, whole=x.is_whole)
    heights = [y.clip(p[1]) for p in everything] + list(y.covers) + [r.y for r in rules]
    upward = _scale(heights, _HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(across, upward, x.label, y.label)]
    parts += [_line(line, [(px, y.clip(py)) for px, py in points], across, upward) for line, points in drawn]
    parts += [_beyond(line, points, y, across, upward) for line, points in drawn]
    parts += [_rule(rule, upward) for rule in rules]
    parts += [f'<circle class="mark" cx="{across(px):.1f}" cy="{upward(py):.1f}" r="4.5"/>' for px, py in marks]
    return _svg(title, parts)


def interval_chart(title: str, value: float, low: float, high: float, axis: Axis, lines: Mapping[str, float]) -> str:
    """Draw one row of a forest plot: a value with its interval, over lines at values that mean something.

    Args:
        title: read by screen readers.
        value: the point.
        low: the lower end of its interval, or minus infinity.
        high: the upper end, or infinity.
        axis: the range it must cover; rows that share it compare.
        lines: their classes to their values.
    """
    across = _scale(axis.covers, _MARGIN, _ROW_WIDTH - _MARGIN)
    middle, ends = _ROW_HEIGHT / 2, [min(max(end, across.low), across.high) for end in (low, high)]
    parts = [f'<path class="{name}" d="M{across(at):.1f} 0V{_ROW_HEIGHT}"/>' for name, at in lines.items()]
    caps = "".join(f"M{across(end):.1f} {middle - 4}v8" for end in (low, high) if across.low <= end <= across.high)
    parts.append(f'<path class="whisker" d="M{across(ends[0]):.1f} {middle}H{across(ends[1]):.1f}{caps}"/>')
    parts.append(f'<circle class="estimate" cx="{across(value):.1f}" cy="{middle}" r="4"/>')
    return _row_svg(title, _ROW_HEIGHT, parts)


def axis_chart(axis: Axis, lines: Mapping[str, float], scale: float = 1) -> str:
    """Draw the axis below the rows of a forest plot.

    Args:
        axis: as of the rows.
        lines: as of the rows; they end here.
        scale: multiplies the ticks' labels, such as 100 for shares in percent.
    """
    across = _scale(axis.covers, _MARGIN, _ROW_WIDTH - _MARGIN)
    parts = [f'<path class="{name}" d="M{across(at):.1f} 0V6"/>' for name, at in lines.items()]
    parts.append(f'<path class="axis" d="M{_MARGIN} 6H{_ROW_WIDTH - _MARGIN}"/>')
    step = scale * (across.ticks[1] - across.ticks[0])
    for tick in across.ticks:
        x = across(tick)
        parts.append(f'<path class="axis" d="M{x:.1f} 6v4"/>')
        parts.append(f'<text x="{x:.1f}" y="22" text-anchor="middle">{tick_label(scale * tick, step)}</text>')
    middle = _ROW_WIDTH / 2
    parts.append(f'<text class="label" x="{middle}" y="37" text-anchor="middle">{escape(axis.label)}</text>')
    return _row_svg(axis.label, 40, parts)


def _row_svg(title: str, height: int, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_ROW_WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def histogram_chart(title: str, x: Axis, histogram: Histogram, *, filled: str, outlined: Sequence[str]) -> str:
    """Draw the shares of a group as bars, and those of others as outlines over them.

    Args:
        title: read by screen readers.
        x: what the bins are.
        histogram: the counts.
        filled: group drawn as bars.
        outlined: groups drawn as steps; their names are their classes. Empty groups are left out.
    """
    edges, groups = histogram.edges, [filled, *(name for name in outlined if any(histogram.counts.get(name, ())))]
    shares = {name: histogram.shares(name) for name in groups}
    across = _scale(edges, _LEFT, _WIDTH - _RIGHT, tight=True)
    upward = _scale([0.0, *(value for values in shares.values() for value in values)], _HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(across, upward, x.label, "share of its group (%)")]
    for name in groups:
        path = _steps(edges, shares[name], across, upward)
        parts.append(f'<path class="{"area" if name == filled else "line"} {name}" d="{path}"/>')
    return _svg(title, parts)


def _scale(values: Sequence[float], start: float, end: float, *, tight: bool = False, whole: bool = False) -> _Scale:
    """Return a scale from tick to tick, or from the least to the greatest value where it is tight."""
    low, high = min(values), max(values)
    round_numbers = ticks(low, high, least_step=1.0 if whole else 0.0)
    if not tight or high - low <= 1e-9 * max(abs(low), abs(high)):
        return _Scale(round_numbers[0], round_numbers[-1], start, end, round_numbers)
    return _Scale(low, high, start, end, tuple(tick for tick in round_numbers if low <= tick <= high))


def _frame(across: _Scale, upward: _Scale, x_label: str, y_label: str) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    step = upward.ticks[1] - upward.ticks[0]
    for tick in upward.ticks:
        y = upward(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick_label(tick, step)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    step = across.ticks[1] - across.ticks[0] if len(across.ticks) > 1 else abs(across.ticks[0]) or 1
    for tick in across.ticks:
        x = across(tick)
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick_label(tick, step)}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="label" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    # Above the axis and not turned beside it: it reads at once and may be long.
    parts.append(f'<text class="label" x="0" y="11">{escape(y_label)}</text>')
    return "".join(parts)


def _rule(rule: Rule, upward: _Scale) -> str:
    y = upward(rule.y)
    return (
        f'<path class="rule" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text class="rule-label" x="{_WIDTH - _RIGHT}" y="{y - 4:.1f}" text-anchor="end">{escape(rule.label)}</text>'
    )


def _line(line: Line, points: Sequence[Point], across: _Scale, upward: _Scale) -> str:
    drawing = f'<path class="line {line.style}" d="{_path(points, across, upward)}"/>'
    if line.has_markers or len(points) == 1:
        drawing += "".join(
            f'<circle class="dot {line.style}" cx="{across(px):.1f}" cy="{upward(py):.1f}" r="2.6"/>'
            for px, py in points
        )
    return drawing


def _beyond(line: Line, points: Sequence[Point], y: Axis, across: _Scale, upward: _Scale) -> str:
    """Draw triangles at the edge for points that lie beyond it."""
    shapes = []
    for px, py in points:
        if y.clip(py) != py:
            # Upwards above the upper end, downwards below the lower one.
            rise = -7 if py > y.clip(py) else 7
            shapes.append(f"M{across(px) - 4:.1f} {upward(y.clip(py)) - rise / 2:.1f}h8l-4 {rise}z")
    return f'<path class="beyond {line.style}" d="{"".join(shapes)}"/>' if shapes else ""


def _steps(edges: Sequence[float], heights: Sequence[float], across: _Scale, upward: _Scale) -> str:
    """Return the outline of bars: one closed at the base for each stretch of bins that are not empty."""
    stretches: list[list[Point]] = []
    before = 0.0
    for i, height in enumerate(heights):
        if height and not before:
            stretches.append([(edges[i], 0.0)])
        if height:
            stretches[-1] += [(edges[i], height), (edges[i + 1], height)]
        elif before:
            stretches[-1].append((edges[i], 0.0))
        before = height
    if before:
        stretches[-1].append((edges[-1], 0.0))
    return "".join(_path(stretch, across, upward) for stretch in stretches)


def _path(points: Sequence[Point], across: _Scale, upward: _Scale) -> str:
    return "M" + "L".join(f"{across(px):.1f} {upward(py):.1f}" for px, py in points)


def _thin(points: Sequence[Point]) -> Sequence[Point]:
    """Keep every n-th point and the last, so that a long run does not make a heavy page."""
    stride = math.ceil(len(points) / _MOST_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def _svg(title: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
