"""Pictures as SVG elements of the page: its font, its colours, light and dark. No torch.

They are drawn here and not by a plotting library: the page allows no scripts, its colours are CSS variables, and four
of the ten kinds of pictures are in no library. For the other six Matplotlib, with its import, takes over a second, and
this file 0.05 s. No text of a legend is drawn: legends are the page's, where they can wrap.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from rlhf_pipeline.report.gather import Numbers, Series
from rlhf_pipeline.rundir.words import printable, short

WIDTH = 340  # pixels: three fit side by side on a desktop, one on a phone
SERIES = 6  # colours, dashes and marks there are; later ones begin again
DRAWN = 400  # points of a line; of longer ones the extremes are kept
FEW = 60  # points of a line that is one of many
DASHES = ["none", "6 2", "1.5 1.8", "7 2 1.5 2", "3 1.5", "10 3"]
# Paths around a point, of half the width `r` and the whole width `d`.
MARKS = [
    "m-{r} 0a{r} {r} 0 1 0 {d} 0a{r} {r} 0 1 0-{d} 0z", "m-{r}-{r}h{d}v{d}h-{d}z", "m0-{r}l{r} {d}h-{d}z",
    "m0-{d}l{r} {d}l-{r} {d}l-{r}-{d}z", "m0 {r}l{r}-{d}h-{d}z", "m-{r}-{r}h{d}l-{d} {d}h{d}z",
]  # fmt: skip
Values = Numbers | Sequence[float]
BEST = 1  # the colour of the best of several runs
FIRST_STEP, LAST_STEP = (0x1F, 0x77, 0xC9), (0xE0, 0x7B, 0x00)  # blue to orange: seen on light and dark, by all eyes


@dataclass
class Line:
    """A line of a chart; a second dash is for a second series in the same colour, width for what others lie on.

    One of many is thin and plain, in the colour of its `shade`, a place on the scale from 0 to 1, where it has one.
    """

    label: str
    series: Series
    color: int = 0
    dash: int = 0
    width: float = 1.8
    shade: float | None = None
    many: bool = False


class Point(NamedTuple):
    """One of many points; without a label none is drawn, and `shade` is as of a `Line`."""

    label: str
    x: float
    y: float
    shade: float | None


@dataclass
class Panel:
    """One of several axes over the same steps; `levels` are horizontal lines with a word to each."""

    lines: list[Line]
    levels: Sequence[tuple[float, str]] = ()
    title: str = ""
    floor: float = -math.inf


@dataclass
class Share:
    """A share with its 95 % interval, at a place on the x axis, out of `count`."""

    x: float
    share: float
    low: float
    high: float
    count: int


@dataclass
class Axes:
    """A rectangle in a picture, in pixels from its upper left corner, and what its sides mean.

    Attributes:
        top: of the rectangle.
        bottom: of the rectangle.
        x: the numbers at its left and right side.
        y: the numbers at its lower and upper side.
        left: of the rectangle.
        right: of the rectangle.
        parts: what has been drawn so far, as SVG.
    """

    top: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]
    left: float = 46.0
    right: float = WIDTH - 14.0
    parts: list[str] = field(default_factory=list)

    def across(self, x: Any) -> Any:
        """Where numbers of the x axis are, in pixels."""
        return self.left + (np.asarray(x) - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - self.left)

    def down(self, y: Any) -> Any:
        """Where numbers of the y axis are, in pixels."""
        return self.bottom - (np.asarray(y) - self.y[0]) / (self.y[1] - self.y[0]) * (self.bottom - self.top)

    def rule(self, look: str, *, x: float | None = None, y: float | None = None) -> None:
        """A straight line from side to side: upright at `x`, or level at `y`."""
        level = f"M{self.left:.1f} {self.down(y):.1f}H{self.right:.1f}" if y is not None else ""
        upright = f"M{self.across(x):.1f} {self.top:.1f}V{self.bottom:.1f}" if x is not None else ""
        self.parts.append(f'<path class="{look}" d="{level}{upright}"/>')

    def line(self, x: Values, y: Values, style: str) -> None:
        """A line through points; it has a colour where the style gives one."""
        self.parts.append(f'<path d="{_path(self.across(x), self.down(y))}" style="{style}"/>')

    def marks(self, x: Values, y: Values, mark: int, width: float, fill: str) -> None:
        """A mark at each of some points."""
        shape = _mark(mark, width)
        places = zip(self.across(x), self.down(y), strict=True)
        path = "".join(f"M{across:.1f} {down:.1f}{shape}" for across, down in places)
        self.parts.append(f'<path d="{path}" style="fill:{fill}"/>')

    def text(self, across: float, down: float, words: str, look: str = "") -> None:
        """Words at a place in pixels."""
        self.parts.append(_text(across, down, words, look))

    def labels(self, points: Sequence[tuple[str, float, float]]) -> None:
        """A word to each of some points, beside it, so that none covers another if there is room."""
        words = [_clipped(label, 14) for label, *_ in points]
        places = np.array([(self.across(x), self.down(y)) for _, x, y in points]).reshape(-1, 2)
        for word, (left, top) in zip(words, _apart(words, places, self.bottom), strict=True):
            self.text(left, top + 10, word, "ink")

    def scale_x(self, label: str, shown: Callable[[float], str] = short, whole: bool = False) -> None:
        """The line below, its numbers, and what they are."""
        self.rule("grid", y=self.y[0])
        for value in ticks(*self.x, 5, whole):
            self.text(self.across(value), self.bottom + 14, shown(value), "middle")
        self.text((self.left + self.right) / 2, self.bottom + 27, label, "middle")

    def scale_y(self, shown: Callable[[float], str] = short, most: int = 5) -> None:
        """Level lines and their numbers."""
        for value in ticks(*self.y, most):
            self.rule("grid", y=value)
            self.text(self.left - 5, self.down(value) + 3.5, shown(value), "end")


def curves(title: str, *panels: Panel, x_label: str = "step") -> Markup:
    """Lines over steps, in one panel or several that share them."""
    one = len(panels) == 1
    height, top, apart = 205 if one else 115 * len(panels) + 20, 12 if one else 22, 30
    high = (height - top - 38 + apart) / len(panels) - apart
    lines = [line for panel in panels for line in panel.lines]
    steps = _range([line.series.steps for line in lines])
    parts: list[str] = []
    for i, panel in enumerate(panels):
        values = [np.maximum(line.series.values, panel.floor) for line in panel.lines]
        heights = _range([*values, np.array([value for value, _ in panel.levels])])
        axes = Axes(top + i * (high + apart), top + i * (high + apart) + high, steps, heights, parts=parts)
        axes.scale_y(most=5 if one else 3)
        for value, word in panel.levels:
            look = "alarm " if "budget" in word else ""
            axes.rule(look + "level", y=value)
            axes.text(axes.right, axes.down(value) - 3, word, look + "end")
        for line, floored in zip(panel.lines, values, strict=True):
            _draw_line(axes, line, Series(line.series.steps, floored))
        axes.text(axes.left, axes.top - 7, panel.title, "ink")
        if i < len(panels) - 1:
            axes.rule("grid", y=heights[0])
        else:
            axes.scale_x(x_label, whole=True)
    are_many = bool(lines) and lines[0].many
    alt_text = [_alt_text_of_many(lines)] if are_many else [_alt_text(line, x_label) for line in lines]
    return _chart(height, title, ". ".join(alt_text), parts)


def _draw_line(axes: Axes, line: Line, series: Series) -> None:
    if line.many:
        few = thinned(smoothed(series) or series, FEW)
        axes.line(few.steps, few.values, f"stroke:{_shaded(line.shade)};stroke-width:1.1;opacity:.8")
        if len(few) == 1:
            axes.marks(few.steps, few.values, 0, 5, _shaded(line.shade))
        return
    color, dash = _color(line.color), DASHES[line.dash % SERIES]
    mean, raw = smoothed(series), thinned(series)
    style = f"stroke:{color};stroke-width:{line.width:.3g};stroke-dasharray:{dash}"
    if mean is None:
        axes.line(raw.steps, raw.values, style)
    else:
        axes.line(raw.steps, raw.values, f"stroke:{color};stroke-width:.8;opacity:.35")
        axes.line(mean.steps, mean.values, style)
    if len(raw) <= 25:
        axes.marks(raw.steps, raw.values, line.color + line.dash, 5 if len(raw) > 1 else 8, color)


def _alt_text(line: Line, x_label: str) -> str:
    values, steps = line.series.values, line.series.steps
    return (
        f"{line.label}: {short(values[0])} at {x_label} {short(steps[0])}, "
        f"{short(values[-1])} at {x_label} {short(steps[-1])}, "
        f"between {short(values.min())} and {short(values.max())}"
    )


def _alt_text_of_many(lines: Sequence[Line]) -> str:
    first, last = ([line.series.values[at] for line in lines] for at in (0, -1))
    return (
        f"{len(lines)} lines, which begin between {short(min(first))} and {short(max(first))}, "
        f"and end between {short(min(last))} and {short(max(last))}"
    )


def points(title: str, found: Sequence[Point], x_label: str, of_powers: bool = False) -> Markup:
    """Many points, in the colours of their shades; `of_powers` has the x axis go by powers of ten."""
    x, y = np.array([one.x for one in found]), np.array([one.y for one in found])
    x = np.log10(x) if of_powers else x
    axes = Axes(12, 187, _range([x]), _range([y], 0.1))
    axes.scale_y()
    axes.scale_x(x_label, lambda value: short(10**value) if of_powers else short(value))
    for one, across in zip(found, x, strict=True):
        axes.marks([across], [one.y], 0, 6, _shaded(one.shade))
    named = [(one, across) for one, across in zip(found, x, strict=True) if one.shade is None and one.label]
    for one, across in named:
        axes.text(axes.across(across) + 6, axes.down(one.y) - 5, _clipped(one.label, 14), "ink")
    return _chart(225, title, ". ".join(f"{one.label}: {short(one.x)}, {short(one.y)}" for one in found), axes.parts)


def frontier(title: str, lines: Sequence[tuple[str, Numbers, Numbers, Numbers, int]], budget: float | None) -> Markup:
    """Score over KL, each point a step.

    Args:
        title: of the picture.
        lines: label, steps, KL and score (each `[n]`), and colour; one line alone is coloured by its steps instead.
        budget: a KL that should not be passed.
    """
    limits = np.array([] if budget is None else [budget])
    axes = Axes(12, 187, _range([limits, *(kl for _, _, kl, _, _ in lines)]), _range([line[3] for line in lines]))
    axes.scale_y()
    axes.scale_x("KL from the reference, nats a reply")
    alt_text = []
    for label, steps, kl, score, color in lines:
        keep = _spread(len(steps), 120)
        steps, kl, score = steps[keep], kl[keep], score[keep]
        axes.line(kl, score, f"stroke:{'var(--grid)' if len(lines) == 1 else _color(color)}")
        if len(lines) > 1:
            axes.marks(kl, score, color, 6, _color(color))
        else:
            for i, share in enumerate((steps - steps[0]) / max(float(steps[-1] - steps[0]), 1.0)):
                axes.marks([kl[i]], [score[i]], color, 6, _between(share))
        for at in (0, -1):
            axes.text(axes.across(kl[at]) + 5, axes.down(score[at]) - 5, short(steps[at]), "ink")
        alt_text.append(
            f"{label}: from KL {short(kl[0])} and score {short(score[0])} at step {short(steps[0])} "
            f"to KL {short(kl[-1])} and score {short(score[-1])} at step {short(steps[-1])}"
        )
    if budget is not None:
        axes.rule("alarm level", x=budget)
    return _chart(225, title, ". ".join(alt_text), axes.parts)


def scatter(title: str, points: Sequence[tuple[str, float, float, int]], x_label: str) -> Markup:
    """Labelled points, each with its colour."""
    x, y = (np.array([point[i] for point in points]) for i in (1, 2))
    axes = Axes(12, 187, _range([x], 0.28), _range([y], 0.2))
    axes.scale_y()
    axes.scale_x(x_label)
    for _, point_x, point_y, color in points:
        axes.marks([point_x], [point_y], color, 8, _color(color))
    axes.labels([point[:3] for point in points])
    alt_text = ". ".join(f"{label}: {short(x)}, {short(y)}" for label, x, y, _ in points)
    return _chart(225, title, alt_text, axes.parts)


@dataclass(frozen=True)
class Outcome:
    """What a run came to: a point.

    Attributes:
        error: the standard error of `y`; 0 where nobody knows it.
        is_best: it has a colour of its own.
        on_frontier: no other is better in both.
        labelled: its label is drawn.
    """

    label: str
    x: float
    y: float
    error: float
    is_best: bool
    on_frontier: bool
    labelled: bool


def outcomes(title: str, points: Sequence[Outcome], x_label: str, start: float | None) -> Markup:
    """Runs as points with their standard errors, a line through those on the frontier, and the level of their start."""
    x, y, error = (np.array([getattr(one, key) for one in points]) for key in ("x", "y", "error"))
    level = np.array([] if start is None else [start])
    axes = Axes(12, 187, _range([x], 0.14), _range([y - error, y + error, level], 0.14))
    if start is not None:
        axes.rule("level", y=start)
        axes.text(axes.right, axes.down(start) - 3, "start", "end")
    axes.scale_y()
    axes.scale_x(x_label)
    line = sorted((one.x, one.y) for one in points if one.on_frontier)
    axes.line([at for at, _ in line], [high for _, high in line], "stroke:var(--muted);stroke-width:1.2;opacity:.6")
    for one in points:
        ink = _color(BEST if one.is_best else 0)
        if one.error:
            axes.line([one.x, one.x], [one.y - one.error, one.y + one.error], f"stroke:{ink};opacity:.5")
        axes.marks([one.x], [one.y], BEST if one.is_best else 0, 9 if one.is_best else 6, ink)
    axes.labels([(one.label, one.x, one.y) for one in points if one.labelled])
    alt_text = ". ".join(
        f"{one.label}: {short(one.x)}, {short(one.y)}{', the best' if one.is_best else ''}" for one in points
    )
    return _chart(225, title, alt_text + (f". Start: {short(start)}" if start is not None else ""), axes.parts)


@dataclass
class Measurements:
    """A panel of measurements, each array `[n]` in the order in which they were made.

    Attributes:
        title: above it.
        x, y, error: where each is, and its standard error.
        color: of the points.
        alarms: bool, which of them raise an alarm.
        band: the least and the greatest healthy value, None on a side that has none.
        curve: one that was fitted: places and heights.
        peak: where the curve is highest, with the ends of its interval; None of what is not known.
    """

    title: str
    x: Numbers
    y: Numbers
    error: Numbers
    color: int
    alarms: NDArray[np.bool_]
    band: tuple[float | None, float | None] = (None, None)
    curve: tuple[Numbers, Numbers] | None = None
    peak: tuple[float, float | None, float | None] | None = None


def measurements(title: str, panels: Sequence[Measurements], x_label: str) -> Markup:
    """Points with their standard errors in the order in which they were measured, and what they are held against.

    Those with an alarm are larger and red; a healthy band lies between dashed lines; a fitted curve is drawn through,
    and its peak is an upright line, with its interval at the bottom.
    """
    one = len(panels) == 1
    height, top, apart = 225 if one else 125 * len(panels) + 20, 22, 30
    high = (height - top - 38 + apart) / len(panels) - apart
    across = _range([panel.x for panel in panels])
    parts: list[str] = []
    alt_text = []
    for i, panel in enumerate(panels):
        limits = np.array([limit for limit in panel.band if limit is not None])
        heights = _range([panel.y - panel.error, panel.y + panel.error, limits])
        axes = Axes(top + i * (high + apart), top + i * (high + apart) + high, across, heights, parts=parts)
        axes.scale_y(most=5 if one else 3)
        for limit, word in zip(panel.band, ("healthy above", "healthy below"), strict=True):
            if limit is not None:
                axes.rule("level", y=limit)
                axes.text((axes.left + axes.right) / 2, axes.down(limit) - 3, word, "middle")
        if panel.curve is not None:
            places, values = panel.curve
            inside = (values >= heights[0]) & (values <= heights[1])
            axes.line(places[inside], values[inside], "stroke:var(--muted);stroke-dasharray:6 2;stroke-width:1.4")
        if panel.peak is not None and across[0] <= panel.peak[0] <= across[1]:
            at, low, most = panel.peak
            axes.rule("level", x=at)
            ends = [max(low or 0.0, across[0]), min(across[1] if most is None else most, across[1])]
            axes.line(ends, [heights[0], heights[0]], "stroke:var(--muted);stroke-width:4;opacity:.5")
        axes.line(panel.x, panel.y, f"stroke:{_color(panel.color)};stroke-width:1;opacity:.5")
        for x, y, error, alarm in zip(panel.x, panel.y, panel.error, panel.alarms, strict=True):
            ink = "var(--alarm)" if alarm else _color(panel.color)
            if error:
                axes.line([x, x], [y - error, y + error], f"stroke:{ink};opacity:.5")
            axes.marks([x], [y], panel.color, 8 if alarm else 5, ink)
        axes.text(axes.left, axes.top - 7, panel.title, "ink")
        if i < len(panels) - 1:
            axes.rule("grid", y=heights[0])
        else:
            axes.scale_x(x_label)
        alt_text.append(
            f"{panel.title}: {short(panel.y[0])} at first, {short(panel.y[-1])} at last, between "
            f"{short(panel.y.min())} and {short(panel.y.max())}, {int(panel.alarms.sum())} with an alarm"
        )
    return _chart(height, title, ". ".join(alt_text), parts)


def _apart(labels: Sequence[str], points: Numbers, bottom: float) -> list[tuple[float, float]]:
    """Where the upper left corners of labels lie, in pixels, so that none covers another if there is room.

    Args:
        labels: one for each point, of which each sign is taken to be 7 pixels wide, and all to be 12 high.
        points: where they are, in pixels; `[n, 2]`.
        bottom: how far down a label may reach.
    """
    taken: list[tuple[float, float, float, float]] = []  # left, top, right, bottom
    for label, (x, y) in zip(labels, points, strict=True):
        wide = 7.0 * len(label)
        choices = [
            (left, y - up, left + wide, y - up + 12.0)
            for up in (17.0, -1.0, 30.0, -14.0, 43.0, 56.0, 69.0, 82.0)
            for left in (x + 7, x - 7 - wide)
            if left > 46 and left + wide < WIDTH and y - up + 12 < bottom
        ]

        def covered(box: tuple[float, float, float, float]) -> float:
            return sum(
                max(min(box[2], other[2]) - max(box[0], other[0]), 0.0)
                * max(min(box[3], other[3]) - max(box[1], other[1]), 0.0)
                for other in taken
            )

        taken.append(min(choices, key=covered, default=(x + 7, y - 17, x + 7 + wide, y - 5)))
    return [box[:2] for box in taken]


def distributions(title: str, groups: Sequence[tuple[str, Numbers, int]], x_label: str) -> Markup:
    """How values are spread, one row for each group: a density, the middle half as a bar, the mean as a tick.

    Fewer than eight values, or equal ones, are dots.
    """
    row = 46.0  # pixels
    axes = Axes(4, 4 + row * len(groups), _range([values for _, values, _ in groups], 0.08), (0.0, 1.0), left=8.0)
    grid = np.linspace(*axes.x, 90)
    alt_text = []
    for i, (label, values, color) in enumerate(groups):
        base, ink = 1 - (i + 0.88) / len(groups), _color(color)
        high = 0.48 / len(groups)
        spread, mean = float(values.std()), float(values.mean())
        if len(values) >= 8 and spread > 0:
            width = 0.9 * spread * len(values) ** -0.2
            sample = np.sort(values)[_spread(len(values), 2000)]
            density = np.exp(-0.5 * ((grid[:, None] - sample[None, :]) / width) ** 2).sum(1)
            top = base + high * density / (density.max() or 1.0)
            axes.line([axes.x[0], *grid, axes.x[1]], [base, *top, base], f"fill:{ink};opacity:.28")
            axes.line(grid, top, f"stroke:{ink};stroke-width:1.4")
            axes.line(np.quantile(values, [0.25, 0.75]), [base, base], f"stroke:{ink};stroke-width:4")
        else:
            few = values[_spread(len(values), 60)]
            axes.marks(few, [base] * len(few), 0, 5, f"{ink};opacity:.6")
        axes.line([mean, mean], [base - 0.1 * high, base + 0.6 * high], "stroke:var(--ink);stroke-width:1.6")
        axes.text(axes.left, axes.top + i * row + 9, _clipped(label, 24), "ink")
        axes.text(axes.right, axes.top + i * row + 9, f"mean {short(mean)}", "end")
        alt_text.append(
            f"{label}: {len(values)} values, mean {short(mean)}, from {short(values.min())} to {short(values.max())}"
        )
    axes.scale_x(x_label)
    return _chart(round(axes.bottom) + 38, title, ". ".join(alt_text), axes.parts)


def shares(
    title: str,
    groups: Sequence[tuple[str, Sequence[Share], int]],
    x_label: str,
    expected: tuple[Numbers, Numbers] | None = None,
    level: float | None = 0.5,
    zero: bool = False,
) -> Markup:
    """Shares with intervals and counts; `expected` is a line that they should lie on."""
    bins = [one for _, ones, _ in groups for one in ones]
    low = min((one.low for one in bins), default=0.0)
    x = [np.array([one.x for one in bins]), np.zeros(int(zero)), expected[0] if expected else np.empty(0)]
    axes = Axes(12, 187, _range(x, 0.06), (min(0.45, low - 0.1), 1.02))
    axes.scale_y(lambda value: f"{value:.0%}" if value > -0.001 else "")
    axes.scale_x(x_label)
    if expected is not None:
        axes.line(*expected, "stroke:var(--muted);stroke-width:1.2;stroke-dasharray:4 2")
    if level is not None:
        axes.rule("zero", y=level)
    if zero:
        axes.rule("zero", x=0)
    for _, ones, color in groups:
        for one in ones:
            axes.line([one.x, one.x], [one.low, one.high], f"stroke:{_color(color)};stroke-width:1.4")
            if len(groups) == 1:
                axes.text(axes.across(one.x), axes.down(one.low) + 10, short(one.count), "small middle")
        axes.marks([one.x for one in ones], [one.share for one in ones], color, 6.5, _color(color))
    alt_text = [
        f"{label} at {short(one.x)}: {one.share:.0%} of {one.count}" for label, ones, _ in groups for one in ones
    ]
    return _chart(225, title, ". ".join(alt_text), axes.parts)


def intervals(title: str, rows: Sequence[tuple[str, float, float, float, int]], x_label: str) -> Markup:
    """Shares with intervals, one row each: label, share, low, high, colour; the middle line is one half."""
    row = 38.0  # pixels
    axes = Axes(8, 8 + row * len(rows), (0.0, 1.0), (0.0, float(len(rows))), left=8.0)
    axes.rule("level", x=0.5)
    for i, (label, share, low, high, color) in enumerate(rows):
        y = len(rows) - i - 0.75
        axes.line([low, high], [y, y], f"stroke:{_color(color)};stroke-width:2")
        axes.marks([share], [y], color, 8, _color(color))
        axes.text(axes.left, axes.top + i * row + 20, _clipped(label, 34), "ink")
        axes.text(axes.right, axes.top + i * row + 20, f"{share:.0%}  ({low:.0%} to {high:.0%})", "end")
    axes.scale_x(x_label, "{:.0%}".format)
    alt_text = [f"{label}: {share:.0%}, between {low:.0%} and {high:.0%}" for label, share, low, high, _ in rows]
    return _chart(round(axes.bottom) + 38, title, ". ".join(alt_text), axes.parts)


def spark(title: str, lines: Sequence[tuple[Series, int]]) -> Markup:
    """A small line without axes, for the numbers beside it."""
    axes = Axes(
        2, 34, _range([series.steps for series, _ in lines], 0), _range([series.values for series, _ in lines], 0),
        2, 138,
    )  # fmt: skip
    for series, color in lines:
        kept = thinned(series, 120)
        axes.line(kept.steps, kept.values, f"stroke:{_color(color)};stroke-width:1.4")
        if len(kept) == 1:
            axes.marks(kept.steps, kept.values, 0, 4, _color(color))
    return _svg("spark", 140, 36, title, "", axes.parts)


def lineage(title: str, nodes: Sequence[tuple[str, str, str]], edges: Sequence[tuple[str, str, str]]) -> Markup:
    """What was made from what.

    Args:
        title: of the picture.
        nodes: name, a word below it, and its state, in an order in which parents come first.
        edges: from, to, and for what: `weights`, `rows`, or another role, as `reward`.
    """
    depth: dict[str, int] = {}
    for name, _, _ in nodes:
        depth[name] = 1 + max((depth.get(parent, -1) for parent, child, _ in edges if child == name), default=-1)
    wide, high, across, down = 104, 44, 34, 16
    place: dict[str, tuple[float, float]] = {}
    columns = [[name for name, _, _ in nodes if depth[name] == level] for level in range(max(depth.values()) + 1)]
    total = max(len(column) for column in columns) * (high + down) - down
    above = 14.0 * max(0, *(min(depth[b] - depth[a], 5) for a, b, _ in edges if a in depth and b in depth), 1) - 14.0
    for level, column in enumerate(columns):
        start = (total - (len(column) * (high + down) - down)) / 2
        for i, name in enumerate(column):
            place[name] = (4 + level * (wide + across), 4 + above + start + i * (high + down))
    parts = []
    for parent, child, what in edges:
        if parent in place and child in place:
            (x0, y0), (x1, y1) = place[parent], place[child]
            x0, y0, y1 = x0 + wide, y0 + high / 2, y1 + high / 2
            levels = range(depth[parent] + 1, depth[child])
            if any(_crosses(place[name], (x0, y0), (x1, y1), wide, high) for i in levels for name in columns[i]):
                parts.append(_over(x0, y0, x1, y1, what, high / 2 + 14 * (min(len(levels), 4))))
                continue
            parts.append(
                f'<path class="edge {what}" d="M{x0:.0f} {y0:.0f}C{x0 + 18:.0f} {y0:.0f} {x1 - 22:.0f} {y1:.0f} '
                f'{x1 - 5:.0f} {y1:.0f}"/><path class="tip" d="M{x1 - 6:.0f} {y1 - 4:.0f}l6 4l-6 4z"/>'
            )
    for name, word, state in nodes:
        x, y = place[name]
        parts.append(
            f'<g class="node {"done" if state.startswith("done") else "not-done"}">'
            f"<title>{escape(printable(f'{name}: {word}, {state}'))}</title>"
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{wide}" height="{high}" rx="7"/>'
            f"{_text(x + wide / 2, y + 18, _clipped(name, 12))}"
            f"{_text(x + wide / 2, y + 34, _clipped(word, 14), 'word')}</g>"
        )
    width = 8 + len(columns) * (wide + across) - across
    alt_text = "; ".join(f"{child} from {parent} ({what})" for parent, child, what in edges)
    style = f"max-width:{width * 1.15}px;min-width:{min(width, 320)}px"
    return _svg("lineage", width, total + above + 8, title, alt_text, parts, style)


def _crosses(
    node: tuple[float, float], start: tuple[float, float], end: tuple[float, float], wide: float, high: float
) -> bool:
    """Whether a straight line would go through a node, which it does not lead to."""
    (x0, y0), (x1, y1), middle = start, end, node[0] + wide / 2
    at = y0 + (y1 - y0) * (middle - x0) / (x1 - x0)
    return node[1] - 2 < at < node[1] + high + 2


def _over(x0: float, y0: float, x1: float, y1: float, what: str, lift: float) -> str:
    """An edge that goes over the nodes between."""
    top = min(y0, y1) - lift
    return (
        f'<path class="edge {what}" d="M{x0:.0f} {y0 - 8:.0f}C{x0 + 20:.0f} {top:.0f} {x0 + 20:.0f} {top:.0f} '
        f"{x0 + 40:.0f} {top:.0f}H{x1 - 45:.0f}C{x1 - 22:.0f} {top:.0f} {x1 - 22:.0f} {y1 - 8:.0f} "
        f'{x1 - 5:.0f} {y1 - 8:.0f}"/><path class="tip" d="M{x1 - 6:.0f} {y1 - 12:.0f}l6 4l-6 4z"/>'
    )


def swatch(color: int, dash: int = 0, marker: bool = False) -> Markup:
    """The key to a line in a legend, or to single points."""
    if marker:
        path, style = f"M13 4{_mark(color + dash, 6)}", f"fill:{_color(color)}"
    else:
        path, style = "M1 4H25", f"stroke:{_color(color)};stroke-width:2.5;stroke-dasharray:{DASHES[dash % SERIES]}"
    return Markup(f'<svg class="swatch" viewBox="0 0 26 8" aria-hidden="true"><path d="{path}" style="{style}"/></svg>')


def shade_swatch(shade: float | None) -> Markup:
    """The key to one of many runs."""
    return Markup(
        f'<svg class="swatch" viewBox="0 0 26 8" aria-hidden="true"><path d="M1 4H25" '
        f'style="stroke:{_shaded(shade)};stroke-width:4"/></svg>'
    )


def step_scale() -> Markup:
    """The key to the colours of steps."""
    boxes = "".join(f'<rect x="{i * 10}" width="10.5" height="8" fill="{_between(i / 9)}"/>' for i in range(10))
    return Markup(f'<svg class="scale" viewBox="0 0 100 8" aria-hidden="true">{boxes}</svg>')


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Round numbers from low to high, at most `most` + 1 of them, all of them whole if wanted."""
    least = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least))
    step = next(size for factor in (1, 2, 2.5, 5, 10, 20) if (size := factor * power) >= 0.999 * least)
    if whole:
        step = math.ceil(step)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def thinned(series: Series, most: int = DRAWN) -> Series:
    """At most about `most` points: the least and the greatest of each stretch, the first and the last."""
    n = len(series)
    if n <= most:
        return series
    bounds = np.linspace(0, n, most // 2, dtype=int)
    keep = {0, n - 1}
    for start, end in pairwise(bounds):
        stretch = series.values[start:end]
        keep |= {int(start + stretch.argmin()), int(start + stretch.argmax())}
    chosen = np.array(sorted(keep))
    return Series(series.steps[chosen], series.values[chosen])


def smoothed(series: Series) -> Series | None:
    """The mean over a window of a twentieth of the values around each; None of few, which need none."""
    n = len(series)
    if n < 40:
        return None
    half = max(1, n // 40)
    sums = np.concatenate([[0.0], np.cumsum(series.values)])
    at = np.arange(n)
    start, end = np.maximum(at - half, 0), np.minimum(at + half + 1, n)
    means = (sums[end] - sums[start]) / (end - start)
    keep = _spread(n, 200)
    return Series(series.steps[keep], means[keep])


def _range(several: Sequence[Numbers], room: float = 0.05) -> tuple[float, float]:
    """From the least to the greatest number, with so much of that room on both sides, and some where all are equal."""
    numbers = np.concatenate([*several])
    low, high = (float(numbers.min()), float(numbers.max())) if len(numbers) else (0.0, 1.0)
    size = max(abs(low), abs(high))
    more = (high - low) * room if high - low > 1e-9 * size else size * 0.05 or 0.5
    return low - more, high + more


def _chart(height: float, title: str, alt_text: str, parts: Sequence[str]) -> Markup:
    return _svg("chart", WIDTH, height, title, alt_text, parts)


def _svg(
    look: str, width: float, height: float, title: str, alt_text: str, parts: Sequence[str], style: str = ""
) -> Markup:
    return Markup(
        '<svg class="{}"{} viewBox="0 0 {:g} {:g}" role="img"><title>{}</title>{}{}</svg>'
    ).format(
        look, Markup(f' style="{style}"') if style else "", width, height, printable(title),
        Markup("<desc>{}</desc>").format(printable(alt_text)) if alt_text else "", Markup("".join(parts)),
    )  # fmt: skip


def _text(x: float, y: float, words: str, look: str = "") -> str:
    looks = f' class="{look}"' if look else ""
    return f'<text{looks} x="{x:.1f}" y="{y:.1f}">{escape(printable(words))}</text>' if words else ""


def _path(across: Numbers, down: Numbers) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(across.tolist(), down.tolist(), strict=True))


def _mark(number: int, width: float) -> str:
    return MARKS[number % SERIES].format(r=width / 2, d=width)


def _color(number: int) -> str:
    return f"var(--s{number % SERIES})"


def _shaded(shade: float | None) -> str:
    return "var(--muted)" if shade is None else _between(shade)


def _between(share: float) -> str:
    """The colour of a step that lies so far between the first and the last."""
    mixed = (round(a + (b - a) * float(share)) for a, b in zip(FIRST_STEP, LAST_STEP, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _spread(n: int, most: int) -> NDArray[np.int_]:
    """At most `most` of `n` indices, evenly, with the first and the last."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


def _clipped(text: str, most: int) -> str:
    text = printable(text)
    return text if len(text) <= most else text[: most - 1] + "…"
