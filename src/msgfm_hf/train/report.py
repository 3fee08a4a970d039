"""`msgfm report RUN`: one HTML page of a run, made of the files in its folder alone.

The page stands by itself: style, script and pictures are inside, and nothing is fetched. Its charts are SVG, so they
show without the script too, which adds the values under the pointer and the slider of the reconstructions.
"""

import base64
import html
import io
import json
import math
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from statistics import median
from string import Template

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from msgfm_hf.train.charts import Charts, Curve, Html, Mark, Style, note, number, prose, table, tag
from msgfm_hf.train.checkpoint import find_checkpoints, planned_steps, write_text

# What is said of the newest lines is said of this many.
_RECENT = 10
# A logged loss is a spike if it is this many times the mean of the values logged before it.
_SPIKE, _BEFORE = 3.0, 20
# Of longer metrics only every second, third, ... line's routing goes into curves.
_ROUTING_BYTES = 20_000_000
_IDLE_SHARE = 0.01
_MUCH_DROPPED = 0.25
_MUCH_WAITING = 0.2
# Of the pictures: how many, and their bytes before base64 adds a third.
_PICTURES = 8
_PICTURE_BYTES = 2_400_000
_PICTURE_WIDTH = 1600
_COLOURS = 8
# Of crossings, by the input.
_DASHES = ("7 3", "2 3", "9 3 2 3", "4 2")


def _no_curves() -> dict[str, Curve]:
    return defaultdict(Curve)


@dataclass
class RunHistory:
    """What a run's folder says of it.

    Args:
        run: the folder.
        record: `run.json`.
        routing_every: of how many training lines one goes into `entropy` and `dropped`: their sums take time.
        losses: {"source input->target": masked L1 in training, standard deviations}.
        ratios: {"source input->target": masked L1 in validation over that of the band mean}.
        rates: {name of a field of the training lines: its curve}: loss, aux_loss, learning_rate, grad_norm,
            images_per_second and input_wait (0..1), those that were logged.
        entropy: {sensor: bits; the entropy of the shares of the experts, mean over blocks}.
        dropped: {sensor: 0..1; share of the choices without room, mean over blocks}.
        routing: the routing statistics of the newest training lines, each {sensor: {name: values}}.
        routing_steps: of these lines.
        routing_lines: how many lines had routing statistics.
        scores: of the validations, lower is better; below 0 where nothing could be compared.
        events: lines with an `event`, as they were written.
        bad: damaged rows met so far.
        not_finite: steps of lines in which a number is not finite.
        step: of the last line.
        torn: whether the last line is not whole.
    """

    run: Path
    record: dict
    routing_every: int = 1
    losses: dict[str, Curve] = field(default_factory=_no_curves)
    ratios: dict[str, Curve] = field(default_factory=_no_curves)
    rates: dict[str, Curve] = field(default_factory=_no_curves)
    entropy: dict[str, Curve] = field(default_factory=_no_curves)
    dropped: dict[str, Curve] = field(default_factory=_no_curves)
    routing: deque = field(default_factory=lambda: deque(maxlen=_RECENT))
    routing_steps: deque = field(default_factory=lambda: deque(maxlen=_RECENT))
    routing_lines: int = 0
    scores: Curve = field(default_factory=Curve)
    events: list[dict] = field(default_factory=list)
    bad: int = 0
    not_finite: list[int] = field(default_factory=list)
    step: int = 0
    torn: bool = False

    def add(self, line: dict):
        """Take in one line of metrics.jsonl."""
        step = self.step = int(line["step"])
        if "event" in line:
            self.events.append(line)
        elif "validation" in line:
            for name, found in line["validation"].items():
                self._put(self.ratios, name, found["ratio_to_band_mean"])
            score = line.get("score")
            if score is not None and math.isfinite(score):
                self.scores.add(step, score)
        else:
            for name, value in line.get("losses", {}).items():
                self._put(self.losses, name, value)
            for name in ("loss", "aux_loss", "learning_rate", "grad_norm", "images_per_second", "input_wait"):
                self._put(self.rates, name, line.get(name))
            self._route(line.get("routing") or {})
            self.bad = int(line.get("bad", self.bad))

    def _put(self, curves: dict[str, Curve], name: str, value: float | None):
        if value is None:
            return
        if math.isfinite(value):
            curves[name].add(self.step, value)
        elif self.step not in self.not_finite[-1:]:
            self.not_finite.append(self.step)

    def _route(self, routing: dict):
        if not routing:
            return
        self.routing.append(routing)
        self.routing_steps.append(self.step)
        self.routing_lines += 1
        if (self.routing_lines - 1) % self.routing_every:
            return
        for sensor, found in routing.items():
            entropies, dropped = [_entropy(shares) for shares in found["histogram"]], found["dropped"]
            self._put(self.entropy, sensor, sum(entropies) / len(entropies))
            self._put(self.dropped, sensor, sum(dropped) / len(dropped))

    @property
    def sensors(self) -> list[str]:
        """Of everything logged, in one order: they are the colours of the page."""
        names = [part for name in {**self.losses, **self.ratios} for part in _way(name)[1:]]
        return sorted({*names, *self.entropy})

    @property
    def sources(self) -> list[str]:
        return sorted({_way(name)[0] for name in {**self.losses, **self.ratios}})

    @property
    def resumed(self) -> list[dict]:
        return self.record.get("resumed", [])

    @property
    def max_steps(self) -> int:
        return planned_steps(self.record)

    @property
    def finished(self) -> bool:
        # The final evaluation tells where the length is not known.
        return 0 < self.max_steps <= self.step or (self.run / "validation.json").is_file()

    def mean_routing(self, name: str) -> dict[str, np.ndarray]:
        """{sensor: (blocks, ...)}: a routing statistic's mean over the newest lines."""
        found: dict[str, list] = {}
        for line in self.routing:
            for sensor, statistics in line.items():
                found.setdefault(sensor, []).append(statistics[name])
        return {sensor: np.mean(values, axis=0) for sensor, values in sorted(found.items())}


def _way(name: str) -> tuple[str, str, str]:
    """Source, input and target of "source input->target"."""
    source, _, way = name.rpartition(" ")
    given, _, target = way.partition("->")
    return source, given, target


def _entropy(shares: Sequence[float]) -> float:
    """In bits; shares of less than the whole are taken as the whole."""
    total = sum(shares)
    if not total:
        return 0.0
    return math.log2(total) - sum([share * math.log2(share) for share in shares if share > 0]) / total


def read_run(run: str | Path) -> RunHistory:
    """Read a run's record and its metrics, line by line, so that a long run takes little memory.

    A torn last line is passed over: a killed run leaves one, and a running one may be writing it.

    Args:
        run: the folder of a run.

    Raises:
        ValueError: if the folder is not that of a run, or its record or metrics cannot be read.
    """
    run = Path(run)
    if not (run / "run.json").is_file():
        raise ValueError(
            f"`run` must be the folder of a run, got {str(run)!r} without run.json. `msgfm pretrain` writes it."
        )
    record = {"identity": {}, "recipe": {}, **_read_json(run / "run.json", dict)}
    path = run / "metrics.jsonl"
    size = path.stat().st_size if path.is_file() else 0
    history = RunHistory(run, record, routing_every=1 + size // _ROUTING_BYTES)
    if size:
        with (
            path.open("rb") as file,
            tqdm(total=size, desc="reading", unit="B", unit_scale=True, delay=1, leave=False) as progress,
        ):
            for number, line in enumerate(file, 1):
                _read_line(history, path, number, line)
                progress.update(len(line))
    if not history.step:
        raise ValueError(
            f"`run` must have whole lines in metrics.jsonl, got none in {str(run)!r}. The first is written after "
            "`logging_steps` steps."
        )
    return history


def _read_json(path: Path, kind: type):
    try:
        found, why = json.loads(path.read_text(encoding="utf-8")), "another kind of value"
    except ValueError as error:
        found, why = None, str(error)
    if not isinstance(found, kind):
        raise ValueError(
            f"`run` must have a {path.name} that is a JSON {kind.__name__}, got {str(path)!r}: {why}. Bring the file "
            "back."
        )
    return found


def _read_line(history: RunHistory, path: Path, number: int, line: bytes):
    try:
        found = json.loads(line)
    except ValueError as error:
        # Only what was being written lacks its end.
        if not line.endswith(b"\n"):
            history.torn = True
            return
        raise _no_line(path, number, error) from error
    try:
        history.add(found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _no_line(path, number, error) from error


def _no_line(path: Path, number: int, error: Exception) -> ValueError:
    why = f"{type(error).__name__}: {error}"
    return ValueError(
        f"`run` must have metrics.jsonl of JSON lines as pretraining writes them, got line {number} of {str(path)!r} "
        f"({why}). Bring the file back, or take this line out."
    )


# ---------------------------------------------------------------------------------------------------------------------
# What there is to say
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """How fast a run goes, by the times of its files: `run.json` is written when it starts or resumes.

    Args:
        written: time of the last line, seconds since 1970.
        seconds_per_step: since the start or the last resumption, validations and checkpoints included; `None` where
            the times do not tell (files copied without them).
        quiet: seconds since the last line.
        stopped: whether a line is long overdue.
    """

    written: float
    seconds_per_step: float | None
    quiet: float
    stopped: bool


def find_pace(history: RunHistory) -> Pace:
    """The pace of a run, as of now."""
    written = (history.run / "metrics.jsonl").stat().st_mtime
    started = (history.run / "run.json").stat().st_mtime
    steps = history.step - (history.resumed[-1]["step"] if history.resumed else 0)
    seconds = (written - started) / steps if steps > 0 and written > started else None
    quiet = max(0.0, time.time() - written)
    due = (seconds or 0) * history.record["recipe"].get("logging_steps", 1)
    return Pace(written, seconds, quiet, not history.finished and quiet > max(600, 20 * due))


def describe_state(history: RunHistory, pace: Pace) -> str:
    """How far a run has come, in a sentence."""
    if history.finished:
        return f"Finished: {history.step:,} steps."
    where = f"step {history.step:,}" + (f" of {history.max_steps:,}" if history.max_steps else "")
    saved = find_checkpoints(history.run)
    go_on = f"`--resume` goes on from step {saved[0].step:,}." if saved else "There is no checkpoint to resume from."
    if history.events and history.events[-1]["event"] == "stopped" and history.events[-1]["step"] == history.step:
        return f"Stopped at {where}: {history.events[-1].get('reason', 'no reason given')}. {go_on}"
    if pace.stopped:
        return f"At {where}, and no line for {_duration(pace.quiet)}: it has probably stopped. {go_on}"
    return f"At {where}."


def describe_best(history: RunHistory) -> str:
    """The best validation so far, in a sentence."""
    if not history.scores.steps:
        return "No validation yet."
    best = int(np.argmin(history.scores.values))
    score, step = history.scores.values[best], history.scores.steps[best]
    if score < 0:
        return f"Nothing to compare with in validation: the newest model counts as the best (step {step:,})."
    return f"Best score {score:.4f} at step {step:,}: the mean ratio to the band mean, lower is better."


def find_warnings(history: RunHistory) -> list[str]:
    """What somebody should look at, one sentence each, the gravest first."""
    found = []
    by_event: dict[str, list[dict]] = {}
    for line in history.events:
        by_event.setdefault(str(line["event"]), []).append(line)
    for event, lines in by_event.items():
        told = "; ".join(_tell_event(line) for line in lines[-3:])
        found.append(f"{_count(len(lines), 'step')} {event}. The newest: {told}")
    if history.not_finite:
        steps = ", ".join(f"{step:,}" for step in history.not_finite[:5])
        found.append(
            f"Numbers that are not finite in {_count(len(history.not_finite), 'line')}, first at step {steps}."
        )
    found += _find_spikes(history)
    if history.bad:
        limit = history.record["recipe"].get("max_bad")
        found.append(
            f"{_count(history.bad, 'damaged row')} left out"
            + (f", of {limit} allowed." if limit is not None else ".")
            + " `msgfm inspect --verify` finds them."
        )
    found += _find_idle_experts(history)
    for sensor, values in history.mean_routing("dropped").items():
        if values.mean() > _MUCH_DROPPED:
            found.append(
                f"{values.mean():.0%} of the choices of {sensor}'s tokens found no room in their expert (newest "
                f"{_count(len(history.routing), 'line')}; above {_MUCH_DROPPED:.0%} is much). A higher "
                "`capacity_factor` gives room."
            )
    if "input_wait" in history.rates:
        wait = median(history.rates["input_wait"].values[-_RECENT:])
        if wait > _MUCH_WAITING:
            found.append(
                f"{wait:.0%} of the time goes by waiting for data (median of the newest lines; above "
                f"{_MUCH_WAITING:.0%} is much). More `dataloader_num_workers` or faster disks help."
            )
    if history.torn:
        found.append("The last line of metrics.jsonl is torn: the run was killed while writing, or is writing now.")
    return found


def _tell_event(line: dict) -> str:
    keys = [str(key) for key in line.get("keys") or []]
    rows = f" (rows {', '.join(keys[:6])}{', ...' if len(keys) > 6 else ''})" if keys else ""
    return f"step {line['step']:,}: {line.get('reason', 'no reason given')}{rows}"


def _find_spikes(history: RunHistory) -> list[str]:
    found = []
    for name, curve in history.losses.items():
        values = np.array(curve.values)
        if len(values) <= _BEFORE:
            continue
        before = np.convolve(values, np.full(_BEFORE, 1 / _BEFORE), "valid")[:-1]
        times = values[_BEFORE:] / np.maximum(before, 1e-12)
        if (times > _SPIKE).any():
            worst = int(times.argmax())
            found.append((float(times[worst]), name, int((times > _SPIKE).sum()), curve.steps[worst + _BEFORE]))
    found.sort(reverse=True)
    told = [
        f"{_count(number, 'spike')} of the loss of {_arrow(name)}; the worst, at step {step:,}, is {times:.1f} times "
        f"the mean of the {_BEFORE} values logged before it (above {_SPIKE:g} counts)."
        for times, name, number, step in found[:5]
    ]
    if len(found) > len(told):
        told.append(f"Spikes of the loss in {_count(len(found) - len(told), 'more direction')}.")
    return told


def _find_idle_experts(history: RunHistory) -> list[str]:
    shares = list(history.mean_routing("histogram").values())
    if not shares:
        return []
    found = []
    for name, row in zip(_block_names(history), np.max(shares, axis=0), strict=True):
        idle = [str(expert) for expert in np.flatnonzero(row < _IDLE_SHARE)]
        if idle:
            experts = f"Expert {idle[0]}" if len(idle) == 1 else f"Experts {', '.join(idle)}"
            found.append(
                f"{experts} of {name}: under {_IDLE_SHARE:.0%} of the choices of every sensor (newest "
                f"{_count(len(history.routing), 'line')})."
            )
    return found


def _block_names(history: RunHistory) -> list[str]:
    """Of the blocks with experts: by stage where the model's configuration lies in the folder, else by number."""
    count = len(next(iter(history.routing[-1].values()))["histogram"])
    path = history.run / "config.json"
    if path.is_file():
        per_stage = _read_json(path, dict).get("moe_blocks") or []
        names = [
            f"stage {stage + 1}, block {block}" for stage, found in enumerate(per_stage) for block in sorted(found)
        ]
        if len(names) == count:
            return names
    return [f"block {number + 1} of {count} with experts" for number in range(count)]


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _arrow(name: str) -> str:
    source, given, target = _way(name)
    return f"{source} {given} → {target}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    first = next((place for place, (number, _) in enumerate(parts) if number), 3)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2] if number) or "0 s"


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def render_run(history: RunHistory) -> str:
    """The page of a run.

    Args:
        history: of `read_run`.

    Returns:
        an HTML document of ASCII characters, so that no mail program or server can read it in a wrong encoding.
    """
    charts, pace = _charts(history), find_pace(history)
    name = str(history.record["recipe"].get("name") or history.run.name)
    sections = [
        ("losses", "Losses", _losses(history, charts)),
        ("validation", "Validation", _validation(history, charts)),
        ("course", "Course", _course(history, charts)),
        ("experts", "Experts", _experts(history, charts)),
        ("reconstructions", "Reconstructions", _reconstructions(history)),
        ("made", "What made it", _made(history)),
        ("load", "How to load it", _load(history)),
    ]
    links = [tag("a", title, href=f"#{anchor}") for anchor, title, _ in sections]
    body = [
        tag("header", tag("h1", name), tag("p", prose(describe_state(history, pace)), class_="state")),
        _facts(history, pace),
        tag("p", describe_best(history)),
        _warnings(find_warnings(history)),
        tag("nav", *links, aria_label="Sections"),
        *(tag("section", tag("h2", title), *parts, id=anchor) for anchor, title, parts in sections),
    ]
    frame = resources.files("msgfm_hf.train").joinpath("report.html").read_text(encoding="utf-8")
    page = Template(frame).substitute(title=html.escape(f"{name} - msgfm report"), body="\n".join(body))
    return page.encode("ascii", "xmlcharrefreplace").decode()


def _charts(history: RunHistory) -> Charts:
    curves = sum(map(len, (history.losses, history.ratios, history.rates, history.entropy, history.dropped)))
    marks = [Mark("resumed", again["step"], f"resumed at step {again['step']:,}") for again in history.resumed]
    marks += [Mark("event", line["step"], f"{line['event']} at step {line['step']:,}") for line in history.events]
    return Charts(history.step, curves, marks)


def _sensor_style(history: RunHistory, sensor: str) -> Style:
    return Style(history.sensors.index(sensor) % _COLOURS)


def _way_style(history: RunHistory, name: str) -> Style:
    """The colour is that of the target; dashes tell from which other sensor it is predicted."""
    _, given, target = _way(name)
    if given == target:
        return _sensor_style(history, target)
    others = [sensor for sensor in history.sensors if sensor != target]
    return Style(_sensor_style(history, target).colour, _DASHES[others.index(given) % len(_DASHES)])


def _facts(history: RunHistory, pace: Pace) -> Html:
    def stamp(moment: float) -> str:
        return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")

    facts = {"Step": f"{history.step:,}" + (f" of {history.max_steps:,}" if history.max_steps else "")}
    if "images_per_second" in history.rates:
        facts["Images per second"] = number(median(history.rates["images_per_second"].values[-_RECENT:]))
    if "input_wait" in history.rates:
        facts["Waiting for data"] = f"{median(history.rates['input_wait'].values[-_RECENT:]):.0%}"
    if pace.seconds_per_step is not None:
        facts["Time per step"] = f"{pace.seconds_per_step:.3g} s"
        if not history.finished and not pace.stopped and history.max_steps:
            facts["Time left, about"] = _duration((history.max_steps - history.step) * pace.seconds_per_step)
    facts["Last line written"] = stamp(pace.written)
    facts["This page made"] = stamp(time.time())
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items()), class_="facts")


def _warnings(warnings: list[str]) -> Html:
    if not warnings:
        return tag("p", "Nothing to warn of.", class_="fine")
    return tag("ul", *(tag("li", prose(warning)) for warning in warnings), class_="warnings", aria_label="Warnings")


def _by_source(history: RunHistory, curves: dict[str, Curve]) -> Iterable[tuple[str, list[str]]]:
    for source in history.sources:
        names = sorted(name for name in curves if _way(name)[0] == source)
        if names:
            # A sensor's own prediction first, then what it is predicted from.
            yield source, sorted(names, key=lambda name: (_way(name)[2], _way(name)[1] != _way(name)[2]))


def _ways(history: RunHistory, curves: dict[str, Curve], names: Sequence[str]) -> tuple[dict, dict]:
    """Curves and styles of directions, by what they are called beside their source's name."""
    called = {name: " → ".join(_way(name)[1:]) for name in names}
    return (
        {called[name]: curves[name] for name in names},
        {called[name]: _way_style(history, name) for name in names},
    )


def _losses(history: RunHistory, charts: Charts) -> list[Html]:
    if not history.losses:
        return [note("No training line has losses yet.")]
    figures = []
    for source, names in _by_source(history, history.losses):
        curves, styles = _ways(history, history.losses, names)
        definition = "Masked L1 in standard deviations of the sensor's statistics (15 m for elevation), as logged."
        figures.append(charts.draw(source, definition, curves, styles, smooth=True, log=True, from_zero=False))
    return [
        note(
            "Training: input → target, lower is better. The colour is that of the target; dashed is a crossing, drawn "
            "in some steps. Faint: values as logged; strong: their running median (4 % of them). Dotted upright: "
            "resumed; red at the top: a step left out. Move over a chart, or step with the arrow keys, to read values."
        ),
        tag("div", *figures, class_="charts"),
    ]


def _validation(history: RunHistory, charts: Charts) -> list[Html]:
    parts = []
    if history.ratios:
        best = []
        if history.scores.steps and min(history.scores.values) >= 0:
            step = history.scores.steps[int(np.argmin(history.scores.values))]
            best = [Mark("best", step, f"best score, step {step:,}")]
        figures = []
        for source, names in _by_source(history, history.ratios):
            curves, styles = _ways(history, history.ratios, names)
            definition = "Masked L1 over that of the training places' band mean, on the same crops and masks each time."
            figures.append(
                charts.draw(
                    source,
                    definition,
                    curves,
                    styles,
                    log=True,
                    from_zero=False,
                    level=(1.0, "band mean"),
                    marks=best,
                )
            )
        explained = "Below 1 the model is better than the band mean. Green: the best score, whose model is kept."
        parts += [note(explained), tag("div", *figures, class_="charts")]
    path = history.run / "validation.json"
    if path.is_file():
        parts += _final(_read_json(path, list))
    return parts or [note("No validation yet, or no source with a validation split.")]


def _final(rows: list[dict]) -> list[Html]:
    """The kept model beside the baselines: every number of a row that is not one of its counts."""
    counts = ("crops", "places")
    baselines = list(
        dict.fromkeys(
            name
            for row in rows
            for name, value in row.items()
            if isinstance(value, int | float) and name not in (*counts, "l1")
        )
    )
    cells = []
    for row in rows:
        line = [f"{row['source']} {row['input']} → {row['target']}", *(str(row[name]) for name in counts)]
        line.append(f"{row['l1']:.4f}")
        for name in baselines:
            value = row.get(name)
            ratio = f" ({row['l1'] / value:.2f})" if value else ""
            line.append("" if value is None else f"{value:.4f}{ratio}")
        cells.append(line)
    head = ["direction", "n", "places", "model", *(name.replace("_", " ") for name in baselines)]
    return [
        table(head, cells, "The kept model on all validation crops"),
        note(
            "Masked L1 in standard deviations, lower is better; in brackets the model's error over the baseline's, "
            "below 1 the model is better. n counts crops."
        ),
    ]


# Field of the training lines: title, definition, factor, whether the axis may be logarithmic, whether to smooth.
_COURSE = {
    "loss": ("Loss of a step", "Weighted sum over the sources, with the auxiliary loss.", 1, True, True),
    "aux_loss": ("Auxiliary loss", "Of the router, before its coefficient; lower is more even.", 1, True, True),
    "learning_rate": ("Learning rate", "Of the largest sub-batch; smaller ones have a share of it.", 1, False, False),
    "grad_norm": ("Gradient norm", "Before it is clipped to `max_grad_norm`.", 1, True, True),
    "images_per_second": ("Images per second", "Every sensor's image counts, between two lines.", 1, False, True),
    "input_wait": ("Waiting for data, %", "Share of the time between two lines.", 100, False, True),
}  # fmt: skip


def _course(history: RunHistory, charts: Charts) -> list[Html]:
    figures = []
    for name, (title, definition, factor, log, smooth) in _COURSE.items():
        if name in history.rates:
            curves = {"": _scaled(history.rates[name], factor)}
            figures.append(charts.draw(title, definition, curves, {"": Style()}, smooth=smooth, log=log))
    return [tag("div", *figures, class_="charts")] if figures else [note("No training line yet.")]


def _scaled(curve: Curve, factor: float) -> Curve:
    return Curve(curve.steps, [value * factor for value in curve.values])


def _experts(history: RunHistory, charts: Charts) -> list[Html]:
    if not history.routing:
        return [note("No experts: the model is dense, or nothing of them was logged.")]
    shares, dropped = history.mean_routing("histogram"), history.mean_routing("dropped")
    blocks = _block_names(history)
    experts = len(next(iter(shares.values()))[0])
    maps = []
    for sensor, rows_by_block in shares.items():
        rows = [
            [block, *(_share(value, experts) for value in row), f"{lost:.0%}", f"{_entropy(row):.2f}"]
            for block, row, lost in zip(blocks, rows_by_block, dropped[sensor], strict=True)
        ]
        head = ["", *map(str, range(experts)), "dropped", "bits"]
        maps.append(tag("figure", tag("h3", f"{sensor}: share of the choices per expert"), table(head, rows)))
    steps = history.routing_steps
    styles = {sensor: _sensor_style(history, sensor) for sensor in history.entropy}
    lost = {sensor: _scaled(curve, 100) for sensor, curve in history.dropped.items()}
    most = math.log2(experts)
    figures = [
        charts.draw(
            "Entropy of the experts' shares, bits",
            f"Mean over blocks. {most:.2f}: a sensor's tokens are spread evenly; 0: all go to one expert.",
            history.entropy,
            styles,
            smooth=True,
            level=(most, "even"),
        ),
        charts.draw(
            "Dropped choices, %",
            "Share of the choices whose expert had no room in training, mean over blocks.",
            lost,
            styles,
            smooth=True,
        ),
    ]
    return [
        note(
            f"Mean of the newest {_count(len(steps), 'line')} (step {steps[0]:,} to {steps[-1]:,}): of the choices of "
            "a sensor's tokens, which share went to each expert, and which found no room. Full colour at three times "
            f"the even share or more; dashed: under {_IDLE_SHARE:.0%}. Bits: entropy of the shares, at most {most:.2f}."
        ),
        tag("div", *maps, class_="charts maps"),
        tag("div", *figures, class_="charts"),
    ]


def _share(value: float, experts: int) -> Html:
    idle = " idle" if value < _IDLE_SHARE else ""
    strength = min(1.0, value * experts / 3)
    return tag("td", f"{value:.0%}", class_=f"share{idle}", style=f"--a: {strength:.2f}")


def _reconstructions(history: RunHistory) -> list[Html]:
    found = sorted((history.run / "reconstructions").glob("step-" + 8 * "[0-9]" + ".png"))
    spread = np.linspace(0, len(found) - 1, min(len(found), _PICTURES)).round().astype(int)
    steps = {found[index]: f"step {int(found[index].stem[5:]):,}" for index in spread}
    last = history.run / "reconstruction.png"
    captions = steps | ({last: "The kept model"} if last.is_file() else {})
    pictures, unreadable = _shrink(list(captions))
    parts = []
    if unreadable:
        parts.append(note(f"Cannot be read: {', '.join(path.name for path in unreadable)}."))
    over_time = [_picture(steps[path], content) for path, content in pictures.items() if path != last]
    if over_time:
        some = f"{len(steps)} of {len(found)} pictures, evenly spread: t" if len(steps) < len(found) else "T"
        parts.append(note(f"{some}he same validation crops and masks. Grey is hidden, invalid or not trained."))
        if len(over_time) > 1:
            end = len(over_time) - 1
            slider = tag("input", type="range", min=0, max=end, value=end, step=1)
            over_time.insert(0, tag("label", "Earlier or later:", slider, hidden=""))
        parts.append(tag("div", *over_time, class_="film"))
    if last in pictures:
        parts.append(note("Left the median and right the worst validation crop of each direction:"))
        parts.append(_picture(captions[last], pictures[last], "wide"))
    return parts or [note("No pictures yet.")]


def _picture(caption: str, content: bytes, kind: str | None = None) -> Html:
    with Image.open(io.BytesIO(content)) as picture:
        width, height = picture.size
    image = tag(
        "img",
        src=f"data:image/webp;base64,{base64.b64encode(content).decode()}",
        alt=f"Input, target, prediction and error of validation crops. {caption}.",
        width=width,
        height=height,
        class_=kind,
    )
    return tag("figure", tag("figcaption", caption), tag("div", image, class_="scroll", tabindex="0"))


def _shrink(paths: list[Path]) -> tuple[dict[Path, bytes], list[Path]]:
    """Pictures as WebP, as wide as the page's budget of bytes allows, and the paths of those that cannot be read."""
    opened, unreadable = {}, []
    for path in paths:
        try:
            with Image.open(path) as picture:
                opened[path] = picture.convert("RGB")
        except OSError:
            unreadable.append(path)
    encoded, width = _encode(opened, _PICTURE_WIDTH), _PICTURE_WIDTH
    while (size := sum(map(len, encoded.values()))) > _PICTURE_BYTES:
        # Bytes go with the area.
        width = int(width * min(0.9, math.sqrt(_PICTURE_BYTES / size)))
        encoded = _encode(opened, width)
    return encoded, unreadable


def _encode(pictures: dict[Path, Image.Image], width: int) -> dict[Path, bytes]:
    encoded = {}
    for path, picture in pictures.items():
        # Where there are very many directions, the height decides.
        small, buffer = picture.copy(), io.BytesIO()
        small.thumbnail((width, 4 * width), Image.Resampling.LANCZOS)
        small.save(buffer, "WEBP", quality=80, method=2)
        encoded[path] = buffer.getvalue()
    return encoded


def _made(history: RunHistory) -> list[Html]:
    record, identity = history.record, history.record["identity"]
    made = {"command": record.get("command"), "commit (+: changed since)": record.get("commit")}
    made |= {f"{name} version": version for name, version in record.get("versions", {}).items()}
    made |= {"processes": record.get("world_size"), "threads per process": record.get("threads")}
    made |= {"seed": record["recipe"].get("seed"), "precision": identity.get("mixed_precision")}
    parts = [_fields("Made by", {name: value for name, value in made.items() if value is not None})]
    if record.get("resumed"):
        names = list(dict.fromkeys(name for again in record["resumed"] for name in again if name != "step"))
        rows = [
            [f"{again['step']:,}", *(tag("td", _plain(again.get(name, "")), class_="text") for name in names)]
            for again in record["resumed"]
        ]
        parts.append(table(["resumed at step", *names], rows, "Resumed"))
    rows = [
        [source, f"{found['rows']:,}", tag("td", _bands(found["bands"]), class_="text")]
        for source, found in identity.get("sources", {}).items()
    ]
    if rows:
        parts.append(table(["source", "training rows", "bands"], rows, "Data"))
    parts.append(_fields("Recipe", record["recipe"]))
    return parts


def _bands(bands: dict[str, list[str]]) -> str:
    return "; ".join(f"{sensor}: {' '.join(names)}" for sensor, names in bands.items())


def _plain(value) -> str:
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _fields(caption: str, values: dict) -> Html:
    rows = [[name, tag("td", tag("code", _plain(value)), class_="text")] for name, value in values.items()]
    return table(["", ""], rows, caption)


def _load(history: RunHistory) -> list[Html]:
    parts = []
    if (history.run / "config.json").is_file():
        code = (
            "import msgfm_hf\nfrom transformers import AutoImageProcessor, AutoModel\n\n"
            f"model = AutoModel.from_pretrained({str(history.run)!r})\n"
            f"processor = AutoImageProcessor.from_pretrained({str(history.run)!r})"
        )
        parts += [note("The best model so far, from where this page was made:"), tag("pre", tag("code", code))]
    else:
        parts.append(note("No model yet: the first is kept at the first validation or at the end."))
    saved = find_checkpoints(history.run)
    if saved:
        steps = ", ".join(f"{checkpoint.step:,}" for checkpoint in saved)
        parts.append(note(f"Checkpoints of step {steps} load the same way, from {saved[0].path}."))
    return parts


def report_run(run: str | Path, out: str | Path | None = None) -> dict:
    """Write the page of a run.

    Args:
        run: the folder of a run, finished or not.
        out: the file to write, default report.html in `run`.

    Returns:
        {"page": its path, "state", "best": sentences, "warnings": a list of sentences}.

    Raises:
        ValueError: if the folder is not that of a run, its record or metrics cannot be read, or `out` is a folder.
        CheckpointError: if the page cannot be written.
    """
    page = Path(run) / "report.html" if out is None else Path(out)
    if page.is_dir():
        raise ValueError(f"`out` must be a file, got the folder {str(page)!r}. Name a file in it.")
    history = read_run(run)
    text = render_run(history)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, text)
    return {
        "page": page,
        "state": describe_state(history, find_pace(history)),
        "best": describe_best(history),
        "warnings": find_warnings(history),
    }
