"""Pictures as SVG elements that stand in the page: its font, its colours, light and dark. No torch.

Matplotlib draws them in colours that nothing else has, which then become the page's CSS variables. No text of a legend
is drawn: legends are the page's, where they can wrap.
"""

import io
import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from rlhf_pipeline.report.gather import Numbers, Series
from rlhf_pipeline.report.text import clean, short

WIDTH = 340  # pixels: three stand side by side on a desk, one on a phone
SERIES = 6  # colours and dashes there are; later ones begin again
DRAWN = 400  # points of a line; of longer ones the extremes are kept
DASHES: list[Any] = ["solid", (0, (6, 2)), (0, (1.5, 1.8)), (0, (7, 2, 1.5, 2)), (0, (3, 1.5)), (0, (10, 3))]
CSS_DASHES = ["", "6 2", "1.5 1.8", "7 2 1.5 2", "3 1.5", "10 3"]
MARKERS = "os^Dvp"
MARKER_PATHS = [
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0", "M-3-3H3V3H-3z", "M0-3.5L3.5 3H-3.5z", "M0-4L4 0L0 4L-4 0z",
    "M0 3.5L3.5-3H-3.5z", "M0-3.8L3.6-1.2L2.2 3H-2.2L-3.6-1.2z",
]  # fmt: skip
VARIABLES = {"ink": "#010203", "muted": "#010204", "grid": "#010205", "alarm": "#010206", "paper": "#010207"} | {
    f"s{i}": f"#01030{i}" for i in range(SERIES)
}
INK, MUTED, GRID, ALARM, PAPER = (VARIABLES[name] for name in ("ink", "muted", "grid", "alarm", "paper"))
FIRST_STEP, LAST_STEP = (0x1F, 0x77, 0xC9), (0xE0, 0x7B, 0x00)  # blue to orange: seen on light and dark, by all eyes
PREFIX = "\ue000"  # of every id, until a page gives the picture a number
SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "rlhf-pipeline", "text.parse_math": False, "font.size": 11.0}


@dataclass
class Line:
    """A line of a chart; a second dash is for a second series in the same colour, width for what others lie on."""

    label: str
    series: Series
    color: int = 0
    dash: int = 0
    width: float = 1.8


@dataclass
class Panel:
    """One of several axes over the same steps; `levels` are horizontal lines with a word to each."""

    lines: list[Line]
    levels: Sequence[tuple[float, str]] = ()
    title: str = ""
    floor: float | None = None


def curves(title: str, *panels: Panel, x_label: str = "step") -> Markup:
    """Lines over steps, in one panel or several that share them."""
    height = 205 if len(panels) == 1 else 115 * len(panels) + 20
    figure, all_axes = _figure(height, rows=len(panels))
    told = []
    for axes, panel in zip(all_axes, panels, strict=True):
        for line in panel.lines:
            _draw_line(axes, line, panel.floor)
            told.append(_told(line))
        for value, word in panel.levels:
            axes.axhline(
                value, color=ALARM if "budget" in word else MUTED, linewidth=1, linestyle=(0, (2, 2)), zorder=1
            )
            if word:
                axes.text(
                    1.0, value, clean(word), transform=axes.get_yaxis_transform(), ha="right", va="bottom",
                    fontsize=10, color=ALARM if "budget" in word else MUTED,
                )  # fmt: skip
        if panel.title:
            axes.set_title(clean(panel.title), loc="left", fontsize=11, color=INK, pad=5)
    for axes in all_axes[:-1]:
        axes.tick_params(labelbottom=False)
    all_axes[-1].set_xlabel(x_label, fontsize=10, color=MUTED, labelpad=2)
    return _svg(figure, title, ". ".join(told))


def frontier(title: str, lines: Sequence[tuple[str, Numbers, Numbers, Numbers, int]], budget: float | None) -> Markup:
    """Score over KL, each point a step.

    Args:
        title: of the picture.
        lines: label, steps, KL and score (each `[n]`), and colour; one line alone is coloured by its steps instead.
        budget: a KL that should not be passed.
    """
    figure, (axes,) = _figure(225)
    told = []
    for label, steps, kl, score, color in lines:
        keep = _spread(len(steps), 120)
        steps, kl, score = steps[keep], kl[keep], score[keep]
        axes.plot(kl, score, color=GRID if len(lines) == 1 else _s(color), linewidth=1, zorder=1, clip_on=False)
        share = (steps - steps[0]) / max(float(steps[-1] - steps[0]), 1.0)
        colors: Any = [_between(one) for one in share] if len(lines) == 1 else _s(color)
        marker = MARKERS[color % len(MARKERS)]
        axes.scatter(kl, score, c=colors, s=24, zorder=2, linewidths=0, clip_on=False, marker=marker)
        for at in (0, -1):
            axes.annotate(
                short(float(steps[at])), (float(kl[at]), float(score[at])), textcoords="offset points", xytext=(5, 5),
                fontsize=10, color=INK, zorder=3,
            )  # fmt: skip
        told.append(
            f"{label}: from KL {short(kl[0])} and score {short(score[0])} at step {short(steps[0])} "
            f"to KL {short(kl[-1])} and score {short(score[-1])} at step {short(steps[-1])}"
        )
    if budget is not None:
        axes.axvline(budget, color=ALARM, linewidth=1, linestyle=(0, (2, 2)))
    axes.set_xlabel("KL from the reference, nats a reply", fontsize=10, color=MUTED, labelpad=2)
    return _svg(figure, title, ". ".join(told))


def scatter(title: str, points: Sequence[tuple[str, float, float, int]], x_label: str) -> Markup:
    """Labelled points, each with its colour."""
    figure, (axes,) = _figure(225)
    for _, x, y, color in points:
        axes.plot([x], [y], MARKERS[color % len(MARKERS)], color=_s(color), markersize=7, clip_on=False)
    axes.margins(x=0.28, y=0.2)
    axes.autoscale_view()  # from here on it is known where a point lies
    labels = [_clipped(label, 14) for label, *_ in points]
    places = axes.transData.transform([(x, y) for _, x, y, _ in points])
    for label, (_, x, y, _), corner in zip(labels, points, _apart(labels, places), strict=True):
        near = corner - axes.transData.transform((x, y))
        axes.annotate(label, (x, y), textcoords="offset points", xytext=tuple(near), fontsize=11, color=INK)
    axes.set_xlabel(x_label, fontsize=10, color=MUTED, labelpad=2)
    return _svg(figure, title, ". ".join(f"{label}: {short(x)}, {short(y)}" for label, x, y, _ in points))


def _apart(labels: Sequence[str], points: Numbers) -> list[Numbers]:
    """Where the lower left corners of labels lie, in pixels, so that none covers another if there is room.

    Args:
        labels: one for each point, of which each sign is taken to be 7 pixels wide.
        points: where they are, in pixels; `[n, 2]`.
    """
    taken: list[tuple[float, float, float, float]] = []  # left, bottom, right, top
    corners = []
    for label, (x, y) in zip(labels, points, strict=True):
        wide = 7.0 * len(label)
        choices = [
            (left, y + up, left + wide, y + up + 12.0)
            for up in (5.0, -13.0, 18.0, -26.0, 31.0, 44.0, 57.0, 70.0)
            for left in (x + 7, x - 7 - wide)
            if left > 46 and left + wide < WIDTH and y + up > 30  # elsewhere are the numbers of the axes
        ]

        def covered(box: tuple[float, float, float, float]) -> float:
            return sum(
                max(min(box[2], other[2]) - max(box[0], other[0]), 0.0)
                * max(min(box[3], other[3]) - max(box[1], other[1]), 0.0)
                for other in taken
            )

        box = min(choices, key=covered, default=(x + 7, y + 5, x + 7 + wide, y + 17))
        taken.append(box)
        corners.append(np.array(box[:2]))
    return corners


def distributions(title: str, groups: Sequence[tuple[str, Numbers, int]], x_label: str) -> Markup:
    """How values are spread, one row for each group: a density, the middle half as a bar, the mean as a tick.

    Fewer than eight values, or equal ones, are dots.
    """
    figure, (axes,) = _figure(50 * len(groups) + 52, left=8)
    told = []
    everything = np.concatenate([values for _, values, _ in groups])
    low, high = float(everything.min()), float(everything.max())
    room = (high - low or 1.0) * 0.08
    grid = np.linspace(low - room, high + room, 90)
    for i, (label, values, color) in enumerate(groups):
        base = float(len(groups) - 1 - i)
        spread = float(values.std())
        if len(values) >= 8 and spread > 0:
            width = 0.9 * spread * len(values) ** -0.2
            sample = np.sort(values)[_spread(len(values), 2000)]
            density = np.exp(-0.5 * ((grid[:, None] - sample[None, :]) / width) ** 2).sum(1)
            top = base + 0.5 * density / (density.max() or 1.0)
            axes.fill_between(grid, base, top, color=_s(color), alpha=0.28, linewidth=0, clip_on=False)
            axes.plot(grid, top, color=_s(color), linewidth=1.4, clip_on=False)
            quarter, three_quarters = np.quantile(values, [0.25, 0.75])
            axes.plot([quarter, three_quarters], [base, base], color=_s(color), linewidth=4, solid_capstyle="butt")
        else:
            few = values[_spread(len(values), 60)]
            axes.plot(few, np.full(len(few), base), "o", color=_s(color), markersize=4, alpha=0.6, clip_on=False)
        mean = float(values.mean())
        axes.plot([mean, mean], [base - 0.06, base + 0.3], color=INK, linewidth=1.6)
        axes.text(
            0.0, base + 0.86, _clipped(label, 24), transform=axes.get_yaxis_transform(), fontsize=11, color=INK,
            va="top",
        )  # fmt: skip
        axes.text(
            1.0, base + 0.86, f"mean {short(mean)}", transform=axes.get_yaxis_transform(), fontsize=10, color=MUTED,
            ha="right", va="top",
        )  # fmt: skip
        told.append(
            f"{label}: {len(values)} values, mean {short(mean)}, from {short(values.min())} to {short(values.max())}"
        )
    axes.set_yticks([])
    axes.set_ylim(-0.12, len(groups) - 0.1)
    axes.set_xlim(grid[0], grid[-1])
    axes.set_xlabel(x_label, fontsize=10, color=MUTED, labelpad=2)
    return _svg(figure, title, ". ".join(told))


@dataclass
class Share:
    """A share with its 95 % interval, at a place on the x axis, out of `count`."""

    x: float
    share: float
    low: float
    high: float
    count: int


def shares(
    title: str,
    groups: Sequence[tuple[str, Sequence[Share], int]],
    x_label: str,
    expected: tuple[Numbers, Numbers] | None = None,
    level: float | None = 0.5,
    zero: bool = False,
) -> Markup:
    """Shares with intervals and counts; `expected` is a line that they should lie on."""
    figure, (axes,) = _figure(225)
    told = []
    if expected is not None:
        axes.plot(*expected, color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
    if level is not None:
        axes.axhline(level, color=GRID, linewidth=1.2, zorder=0)
    if zero:
        axes.axvline(0, color=GRID, linewidth=1.2, zorder=0)
    for label, bins, color in groups:
        for one in bins:
            axes.plot([one.x, one.x], [one.low, one.high], color=_s(color), linewidth=1.4, clip_on=False)
        xs, ys = [one.x for one in bins], [one.share for one in bins]
        axes.plot(
            xs, ys, MARKERS[color % len(MARKERS)], color=_s(color), markersize=5.5, clip_on=False, linestyle="none",
            zorder=3,
        )  # fmt: skip
        if len(groups) == 1:
            for one in bins:
                axes.annotate(
                    short(one.count), (one.x, one.low), textcoords="offset points", xytext=(0, -3), fontsize=9,
                    color=MUTED, ha="center", va="top",
                )  # fmt: skip
        told += [f"{label} at {short(one.x)}: {one.share:.0%} of {one.count}" for one in bins]
    low = min((one.low for _, bins, _ in groups for one in bins), default=0.0)
    axes.set_ylim(min(0.45, low - 0.1), 1.02)
    axes.margins(x=0.06)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}" if 0 <= value <= 1 else ""))
    axes.set_xlabel(x_label, fontsize=10, color=MUTED, labelpad=2)
    return _svg(figure, title, ". ".join(told))


def intervals(title: str, rows: Sequence[tuple[str, float, float, float, int]], x_label: str) -> Markup:
    """Shares with intervals, one row each: label, share, low, high, colour; the middle line is one half."""
    figure, (axes,) = _figure(40 * len(rows) + 48, left=8)
    axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    for i, (label, share, low, high, color) in enumerate(rows):
        base = float(len(rows) - 1 - i)
        axes.plot([low, high], [base, base], color=_s(color), linewidth=2, clip_on=False)
        axes.plot([share], [base], MARKERS[color % len(MARKERS)], color=_s(color), markersize=7, clip_on=False)
        axes.text(
            0.0, base + 0.16, _clipped(label, 34), transform=axes.get_yaxis_transform(), fontsize=11, color=INK,
            va="bottom",
        )  # fmt: skip
        axes.text(
            1.0, base + 0.16, f"{share:.0%}  ({low:.0%} to {high:.0%})", transform=axes.get_yaxis_transform(),
            fontsize=10, color=MUTED, ha="right", va="bottom",
        )  # fmt: skip
    axes.set_yticks([])
    axes.set_ylim(-0.5, len(rows) - 0.1)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xlabel(x_label, fontsize=10, color=MUTED, labelpad=2)
    told = [f"{label}: {share:.0%}, between {low:.0%} and {high:.0%}" for label, share, low, high, _ in rows]
    return _svg(figure, title, ". ".join(told))


def spark(title: str, lines: Sequence[tuple[Series, int]]) -> Markup:
    """A small line without axes, for numbers that stand beside it."""
    low = min(float(series.values.min()) for series, _ in lines)
    high = max(float(series.values.max()) for series, _ in lines)
    first = min(float(series.steps[0]) for series, _ in lines)
    last = max(float(series.steps[-1]) for series, _ in lines)
    paths = []
    for series, color in lines:
        kept = thinned(series, 120)
        x = 2 + 136 * (kept.steps - first) / (last - first or 1.0)
        y = 34 - 32 * (kept.values - low) / (high - low) if high > low else np.full(len(kept), 18.0)
        points = [f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True)]
        style = f"fill:none;stroke:var(--s{color % SERIES});stroke-width:1.4"
        if len(points) == 1:
            points.append(f"{x[0] + 0.1:.1f} {y[0]:.1f}")
            style += ";stroke-width:4;stroke-linecap:round"
        paths.append(f'<path d="M{"L".join(points)}" style="{style}"/>')
    return Markup('<svg class="spark" viewBox="0 0 140 36" role="img"><title>{}</title>{}</svg>').format(
        clean(title), Markup("".join(paths))
    )


def lineage(title: str, nodes: Sequence[tuple[str, str, str]], edges: Sequence[tuple[str, str, str]]) -> Markup:
    """What was made from what.

    Args:
        title: of the picture.
        nodes: name, a word below it, and its state, in an order in which parents come first.
        edges: from, to, and `weights` or `reward`.
    """
    depth: dict[str, int] = {}
    for name, _, _ in nodes:
        depth[name] = 1 + max((depth.get(parent, -1) for parent, child, _ in edges if child == name), default=-1)
    wide, high, across, down = 92, 44, 34, 16
    place: dict[str, tuple[float, float]] = {}
    columns = [[name for name, _, _ in nodes if depth[name] == level] for level in range(max(depth.values()) + 1)]
    total = max(len(column) for column in columns) * (high + down) - down
    for level, column in enumerate(columns):
        start = (total - (len(column) * (high + down) - down)) / 2
        for i, name in enumerate(column):
            place[name] = (4 + level * (wide + across), 4 + start + i * (high + down))
    parts = []
    for parent, child, what in edges:
        if parent in place and child in place:
            (x0, y0), (x1, y1) = place[parent], place[child]
            x0, y0, y1 = x0 + wide, y0 + high / 2, y1 + high / 2
            parts.append(
                f'<path class="edge {what}" d="M{x0:.0f} {y0:.0f}C{x0 + 18:.0f} {y0:.0f} {x1 - 22:.0f} {y1:.0f} '
                f'{x1 - 5:.0f} {y1:.0f}"/><path class="tip" d="M{x1 - 6:.0f} {y1 - 4:.0f}l6 4l-6 4z"/>'
            )
    for name, word, state in nodes:
        x, y = place[name]
        parts.append(
            Markup(
                '<g class="node {}"><title>{}</title><rect x="{:.0f}" y="{:.0f}" width="{}" height="{}" rx="7"/>'
                '<text x="{:.0f}" y="{:.0f}">{}</text><text class="word" x="{:.0f}" y="{:.0f}">{}</text></g>'
            ).format(
                "done" if state == "done" else "not-done",
                clean(f"{name}: {word}, {state}"),
                x,
                y,
                wide,
                high,
                x + wide / 2,
                y + 18,
                _clipped(name, 12),
                x + wide / 2,
                y + 34,
                _clipped(word, 14),
            )
        )
    width = 8 + len(columns) * (wide + across) - across
    told = "; ".join(f"{child} from {parent} ({what})" for parent, child, what in edges)
    return Markup(
        '<svg class="lineage" style="max-width:{}px;min-width:{}px" viewBox="0 0 {} {}" role="img"><title>{}</title>'
        "<desc>{}</desc>{}</svg>"
    ).format(width * 1.15, min(width, 320), width, total + 8, title, clean(told), Markup("".join(map(str, parts))))


def swatch(color: int, dash: int = 0, marker: bool = False) -> Markup:
    """The key to a line in a legend, or to single points."""
    if marker:
        path, style = MARKER_PATHS[(color + dash) % SERIES], f"fill:var(--s{color % SERIES})"
        return Markup(
            f'<svg class="swatch" viewBox="-13 -4 26 8" aria-hidden="true"><path d="{path}" style="{style}"/></svg>'
        )
    style = f"stroke:var(--s{color % SERIES});stroke-width:2.5;stroke-dasharray:{CSS_DASHES[dash % SERIES] or 'none'}"
    return Markup(
        f'<svg class="swatch" viewBox="0 0 26 8" aria-hidden="true"><path d="M1 4H25" style="{style}"/></svg>'
    )


def step_scale() -> Markup:
    """The key to the colours of steps."""
    boxes = "".join(f'<rect x="{i * 10}" width="10.5" height="8" fill="{_between(i / 9)}"/>' for i in range(10))
    return Markup(f'<svg class="scale" viewBox="0 0 100 8" aria-hidden="true">{boxes}</svg>')


def numbered(svg: Markup, number: int) -> Markup:
    """A picture whose ids no other picture on the page has."""
    return Markup(svg.replace(PREFIX, f"p{number}-"))


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


def _draw_line(axes: Axes, line: Line, floor: float | None) -> None:
    color, dash = _s(line.color), DASHES[line.dash % SERIES]
    mean = smoothed(line.series)
    raw = thinned(line.series)
    values = raw.values if floor is None else np.maximum(raw.values, floor)
    few = len(raw) <= 25
    axes.plot(
        raw.steps, values, color=color,
        linewidth=line.width if mean is None else 0.8, alpha=1 if mean is None else 0.35,
        linestyle=dash if mean is None else "solid", marker=MARKERS[(line.color + line.dash) % 6] if few else None,
        markersize=4 if len(raw) > 1 else 7, clip_on=False, zorder=2,
    )  # fmt: skip
    if mean is not None:
        values = mean.values if floor is None else np.maximum(mean.values, floor)
        axes.plot(mean.steps, values, color=color, linewidth=line.width + 0.2, linestyle=dash, clip_on=False, zorder=3)


def _told(line: Line) -> str:
    values, steps = line.series.values, line.series.steps
    return (
        f"{line.label}: {short(values[0])} at step {short(steps[0])}, {short(values[-1])} at step {short(steps[-1])}, "
        f"between {short(values.min())} and {short(values.max())}"
    )


def _figure(height: int, rows: int = 1, left: int = 46) -> tuple[Figure, list[Axes]]:
    """Axes of the page's look, in units of pixels."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        top, bottom, between = 22 if rows > 1 else 12, 38, 30
        each = (height - top - bottom - between * (rows - 1)) / rows
        all_axes = []
        for row in range(rows):
            y = height - top - each * (row + 1) - between * row
            axes = figure.add_axes((left / WIDTH, y / height, (WIDTH - left - 14) / WIDTH, each / height))
            axes.patch.set_visible(False)
            for side, spine in axes.spines.items():
                spine.set_visible(side == "bottom")
                spine.set_color(GRID)
            axes.tick_params(length=0, labelsize=10, labelcolor=MUTED, left=False, bottom=False)
            axes.grid(axis="y", color=GRID, linewidth=0.7, clip_on=False)
            axes.set_axisbelow(True)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=left > 8 and height in (205, 115 * rows + 20)))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            all_axes.append(axes)
        figure.patch.set_visible(False)
    return figure, all_axes


def _svg(figure: Figure, title: str, told: str) -> Markup:
    """The figure as an element of the page."""
    file = io.StringIO()
    logger = logging.getLogger("matplotlib")
    before = logger.level
    logger.setLevel(logging.ERROR)  # that it looks for fonts
    with warnings.catch_warnings(), matplotlib.rc_context(SETTINGS):
        warnings.simplefilter("ignore")  # a font without some letters: the page's font draws them
        FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    logger.setLevel(before)
    body = file.getvalue().partition("<svg")[2].partition(">")[2]
    body = re.sub(r"\s*<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    needed = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: f' id="{PREFIX}{found[1]}"' if found[1] in needed else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{PREFIX}", body)
    body = re.sub(r" font-family: [^;\"]*;?", "", body)
    body = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", body)
    body = re.sub(r' (?:d|x|y)="[^"]*"', lambda found: re.sub(r"(\d\.\d)\d+", r"\1", found[0]), body)
    body = re.sub(r">\s+<", "><", re.sub(r"[ \n]+", " ", body))
    body = re.sub(r'style="[^"]*"', lambda found: _themed(found[0]), body)
    width, height = (round(size * 72) for size in figure.get_size_inches())
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img"><title>{}</title><desc>{}</desc>{}').format(
        width, height, clean(title), clean(told), Markup(body)
    )


def _themed(style: str) -> str:
    for name, color in VARIABLES.items():
        style = style.replace(color, f"var(--{name})")
    return style


def _s(color: int) -> str:
    return VARIABLES[f"s{color % SERIES}"]


def _between(share: float) -> str:
    """The colour of a step that lies so far between the first and the last."""
    mixed = (round(a + (b - a) * float(share)) for a, b in zip(FIRST_STEP, LAST_STEP, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _spread(n: int, most: int) -> NDArray[np.int_]:
    """At most `most` of `n` indices, evenly, with the first and the last."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


def _clipped(text: str, most: int) -> str:
    text = clean(text)
    return text if len(text) <= most else text[: most - 1] + "…"
