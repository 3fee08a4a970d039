"""HTML elements, escaped where they are made, and charts over the steps of a run: SVG, with their values in a table."""

import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

# Of a chart's drawing, in its own units: its size, and left, top, right and bottom of its axes.
_SIZE, _BOX = (420, 230), (50, 10, 412, 206)
# Points over all curves of a page.
_POINTS = 24_000


class Html(str):
    """Text that is HTML already; any other text is escaped when it comes into a tag."""


def tag(name: str, *content: str, **attributes) -> Html:
    """An element. `class_` loses its underscore, other underscores become hyphens; what is None is left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(part if isinstance(part, Html) else html.escape(str(part)) for part in content)
    return Html(f"<{name}{given}>" if name in ("img", "input") else f"<{name}{given}>{inside}</{name}>")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None) -> Html:
    """A table that scrolls by itself on a narrow screen; the first cell of a row is its heading."""
    parts = [tag("caption", caption)] if caption else []
    parts.append(tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head))))
    body = []
    for first, *others in rows:
        cells = [cell if cell.startswith("<td") and isinstance(cell, Html) else tag("td", cell) for cell in others]
        body.append(tag("tr", tag("th", first, scope="row"), *cells))
    return tag("div", tag("table", *parts, tag("tbody", *body)), class_="scroll")


def prose(text: str) -> Html:
    """Escaped text in which what stands between backticks is code."""
    parts = text.split("`")
    return Html("".join(tag("code", part) if odd % 2 else html.escape(part) for odd, part in enumerate(parts)))


def note(text: str) -> Html:
    """A line in small type."""
    return tag("p", prose(text), class_="note")


def number(value: float) -> str:
    """Four digits, as the script of the page writes them."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


@dataclass
class Curve:
    """Values logged along a run.

    Args:
        steps: of the optimiser, ascending.
        values: finite, one per step.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float):
        self.steps.append(step)
        self.values.append(value)


def thin(values: np.ndarray, buckets: int) -> np.ndarray:
    """Which values of a long curve to draw so that every spike stays visible.

    Args:
        values: (n,) finite.
        buckets: runs of equal length, of each of which the lowest and the highest value stay.

    Returns:
        int (m,), ascending: all n where these are at most 2 * buckets, else the first, the last and two per bucket.
    """
    if len(values) <= 2 * buckets:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), buckets + 1).astype(int)
    kept = {0, len(values) - 1}
    for start, end in pairwise(edges):
        kept |= {start + int(values[start:end].argmin()), start + int(values[start:end].argmax())}
    return np.array(sorted(kept))


def _running_median(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Centred, over 4 % of the values and at least 7 of them, fewer at the ends. A spike does not move it."""
    half = max(3, len(values) // 50)
    return np.array([np.median(values[max(index - half, 0) : index + half + 1]) for index in where])


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors, every in (((1, 2, 5), 1), ((1,), 1), ((1,), -(-len(powers) // 6))):
        ticks = [factor * 10.0**power for power in powers[::every] for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 7:
            break
    return ticks


@dataclass(frozen=True)
class Style:
    """How a curve is told from the others: a colour per sensor, and dashes for a crossing."""

    colour: int = 0
    dash: str | None = None


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: an upright line.

    Args:
        kind: the class that says how it looks: resumed, event or best.
        step: of the optimiser.
        text: what it was.
    """

    kind: str
    step: int
    text: str


class Charts:
    """Draws charts of one run, which share the range of steps, the marks and the budget of points."""

    def __init__(self, last_step: int, curves: int, marks: Sequence[Mark]):
        """
        Args:
            last_step: where the axis ends; it begins at 0.
            curves: how many there will be, which share the budget of points.
            marks: on every chart.
        """
        self.steps = (0, last_step)
        self.buckets = max(20, min(300, _POINTS // (2 * max(curves, 1))))
        # Of one place one is enough, so that many events stay few elements.
        self.marks = list({(mark.kind, round(self._across(mark.step))): mark for mark in marks}.values())

    def draw(
        self,
        title: str,
        definition: str,
        curves: dict[str, Curve],
        styles: dict[str, Style],
        smooth: bool = False,
        log: bool = False,
        from_zero: bool = True,
        level: tuple[float, str] | None = None,
        marks: Sequence[Mark] = (),
    ) -> Html:
        """One chart with its values in a table, as a figure.

        Args:
            title, definition: what is drawn; its units and what it means.
            curves: by the name they get in the table.
            styles: one per curve.
            smooth: whether the running median is drawn over the values.
            log: whether the axis may be logarithmic: it is where the values span more than a factor of 8.
            from_zero: whether a linear axis begins at 0.
            level: a line across the chart, and its name.
            marks: besides those of every chart.
        """
        arrays = {name: np.array(curve.values) for name, curve in curves.items()}
        low = min(float(values.min()) for values in arrays.values())
        high = max(float(values.max()) for values in arrays.values())
        if level is not None:
            low, high = min(low, level[0]), max(high, level[0])
        log = log and low > 0 and high > 8 * low
        if log:
            low, high = low / 1.1, high * 1.1
        else:
            room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
            low, high = (0.0 if from_zero and low >= 0 else low - room), high + room
        drawn, told, rows = [], [], []
        for name, curve in curves.items():
            values, style = arrays[name], styles[name]
            kept = thin(values, self.buckets)
            steps = [curve.steps[index] for index in kept]
            points = {"steps": steps, "values": _short(values[kept]), "colour": style.colour}
            medians = _running_median(values, kept) if smooth else None
            path, dash = self._path(steps, values[kept], (low, high), log), {"stroke_dasharray": style.dash}
            drawn.append(tag("path", d=path, class_=f"{'raw' if smooth else 'curve'} k{style.colour}", **dash))
            if len(steps) < 40:
                places = (point.split(" ") for point in path[1:].split("L"))
                drawn += [tag("circle", cx=x, cy=y, r=1.8, class_=f"point k{style.colour}") for x, y in places]
            if smooth:
                points["medians"] = _short(medians)
                path = self._path(steps, medians, (low, high), log)
                drawn.append(tag("path", d=path, class_=f"curve k{style.colour}", **dash))
            told.append(points)
            cells = [f"{steps[-1]:,}", number(values[-1])]
            cells += [number(medians[-1])] if smooth else []
            rows.append([_swatch(style, name), *cells, number(values.min()), number(values.max())])
        ticks = _log_ticks(low, high) if log else _linear_ticks(low, high)
        told_in_words = "; ".join(
            f"{name} from {number(curve.values[0])} at step {curve.steps[0]:,} to {number(curve.values[-1])} at step "
            f"{curve.steps[-1]:,}"
            for name, curve in list(curves.items())[:8]
        )
        plot = tag(
            "svg",
            *self._axes(ticks, (low, high), log),
            *self._marks(marks),
            *self._level(level, (low, high), log),
            *drawn,
            viewBox=f"0 0 {_SIZE[0]} {_SIZE[1]}",
            class_="plot",
            role="img",
            tabindex="0",
            aria_label=f"{title}. {told_in_words}.",
        )
        data = {"box": _BOX, "x": self.steps, "y": [low, high], "log": log, "curves": told}
        return tag(
            "figure",
            tag("h3", title),
            plot,
            table(["", "step", "value", *(["median"] if smooth else []), "lowest", "highest"], rows),
            note(definition + (" Logarithmic axis." if log else "")),
            data_chart=json.dumps(data, separators=(",", ":")),
        )

    def _across(self, step: float) -> float:
        return _BOX[0] + (_BOX[2] - _BOX[0]) * (step - self.steps[0]) / (self.steps[1] - self.steps[0])

    def _up(self, values, limits: tuple[float, float], log: bool):
        scale = np.log if log else np.asarray
        low, high = scale(limits[0]), scale(limits[1])
        return _BOX[3] - (_BOX[3] - _BOX[1]) * (scale(values) - low) / (high - low)

    def _path(self, steps: Sequence[int], values: np.ndarray, limits: tuple[float, float], log: bool) -> str:
        heights = self._up(values, limits, log)
        return "M" + "L".join(f"{self._across(x):.1f} {y:.1f}" for x, y in zip(steps, heights, strict=True))

    def _axes(self, ticks: list[float], limits: tuple[float, float], log: bool) -> list[Html]:
        left, _, right, bottom = _BOX
        parts = []
        for tick in ticks:
            y = f"{self._up(tick, limits, log):.1f}"
            parts.append(tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
            parts.append(tag("text", f"{tick:.6g}", x=left - 5, y=float(y) + 4, text_anchor="end"))
        for tick in _linear_ticks(*self.steps):
            if tick == round(tick):
                x = self._across(tick)
                anchor = "middle" if x < right - 15 else "end"
                parts.append(tag("text", f"{tick:,.0f}", x=f"{x:.1f}", y=bottom + 16, text_anchor=anchor))
        return parts

    def _marks(self, more: Sequence[Mark]) -> list[Html]:
        _, top, _, bottom = _BOX
        lines = []
        for mark in (*self.marks, *more):
            x = f"{self._across(mark.step):.1f}"
            lines.append(tag("line", tag("title", mark.text), x1=x, x2=x, y1=top, y2=bottom, class_=mark.kind))
        return lines

    def _level(self, level: tuple[float, str] | None, limits: tuple[float, float], log: bool) -> list[Html]:
        if level is None:
            return []
        y = float(self._up(level[0], limits, log))
        line = tag("line", x1=_BOX[0], x2=_BOX[2], y1=f"{y:.1f}", y2=f"{y:.1f}", class_="level")
        return [line, tag("text", level[1], x=_BOX[2], y=f"{y - 4:.1f}", text_anchor="end")]


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _swatch(style: Style, name: str) -> Html:
    line = tag("path", d="M0 4H26", class_=f"curve k{style.colour}", stroke_dasharray=style.dash)
    return Html(tag("svg", line, viewBox="0 0 26 8", class_="swatch", aria_hidden="true") + html.escape(name))
