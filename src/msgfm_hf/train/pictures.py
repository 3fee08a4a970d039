"""Pictures of a run and of a model: reconstructions, losses, radar statistics, and where experts' tokens come from."""

import json
import os
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from msgfm_hf.data.shards import ShardSource
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.modeling_msgfm import MsGFMForPreTraining, routing_statistics
from msgfm_hf.model.sensors import SensorSpec, get_sensor
from msgfm_hf.tasks.reconstruction import MaskedCrops, counted_pixels, directions, predict_directions

UNIT_NAMES = {"reflectance": "reflectance", "db": "dB", "metres": "m"}
_HIDDEN = 0.55  # grey of what is not shown


def _save(figure: Figure, path: Path) -> Path:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
    os.replace(temporary, path)
    return path


@contextmanager
def _style():
    with plt.rc_context({"font.size": 8, "axes.titlesize": 8, "figure.facecolor": "white"}):
        yield


def display_bands(spec: SensorSpec, bands: Sequence[str]) -> list[int]:
    """Which bands of an image to show: red, green, blue where it has them, else its first band alone."""
    try:
        return [list(bands).index(spec.resolve(name)) for name in ("red", "green", "blue")]
    except ValueError:
        return [0]


class _Stretch:
    """Turns physical values of one target into colours; limits come from that target and serve all its panels."""

    def __init__(self, spec: SensorSpec, bands: Sequence[str], target: np.ndarray):
        self.index = display_bands(spec, bands)
        self.unit = UNIT_NAMES[spec.unit]
        self.label = "" if len(self.index) == 3 else f"{bands[self.index[0]]}, {self.unit}"
        shown = target[self.index]
        finite = shown[:, np.isfinite(shown).all(0)]
        ends = np.percentile(finite, (2, 98), axis=1) if finite.size else np.zeros((2, len(self.index)))
        self.low, self.high = ends[0], np.maximum(ends[1], ends[0] + 1e-6)

    def limits(self) -> str:
        """What stands beside a colour bar, or under true colour, which has none."""
        if self.label:
            return self.label
        colours = zip(("red", "green", "blue"), self.low, self.high, strict=True)
        return ", ".join(f"{name} {low:.2f}-{high:.2f}" for name, low, high in colours) + f" {self.unit}"

    def draw(self, axes, values: np.ndarray, hidden: np.ndarray | None = None):
        """Show (C, H, W) with hidden pixels in grey; returns the image for a colour bar, where there is one band."""
        shown = values[self.index]
        gone = ~np.isfinite(shown).all(0) if hidden is None else hidden | ~np.isfinite(shown).all(0)
        if len(self.index) == 3:
            colours = (shown - self.low[:, None, None]) / (self.high - self.low)[:, None, None]
            colours = np.where(gone, _HIDDEN, np.clip(colours, 0, 1)).transpose(1, 2, 0)
            axes.imshow(colours)
            return None
        picture = np.ma.masked_where(gone, shown[0])
        axes.set_facecolor(str(_HIDDEN))
        return axes.imshow(picture, cmap="viridis", vmin=self.low[0], vmax=self.high[0])


def _scale_bar(axes, width: int, gsd: float | None, height: int | None = None):
    """A bar of a round number of metres, about a quarter of the panel; its height in pixels is the width by default."""
    if not gsd:
        return
    goal = width * gsd / 4
    metres = max((m for e in range(-1, 6) for m in (10**e, 2 * 10**e, 5 * 10**e) if m <= goal), default=goal)
    pixels, left, top = metres / gsd, width * 0.06, (height or width) * 0.93
    axes.plot([left, left + pixels], [top, top], color="white", linewidth=3.5, solid_capstyle="butt")
    axes.plot([left, left + pixels], [top, top], color="black", linewidth=1.5, solid_capstyle="butt")
    axes.text(
        left,
        top - (height or width) * 0.03,
        f"{metres:g} m",
        color="white",
        fontsize=7,
        va="bottom",
        bbox={"facecolor": "black", "alpha": 0.5, "pad": 0.8, "linewidth": 0},
    )


def draw_reconstruction(
    model: MsGFMForPreTraining,
    processor: MsGFMImageProcessor,
    sources: Sequence[ShardSource],
    crops: dict[str, list[MaskedCrops]],
    cross_loss_region: str,
    path: Path,
) -> Path:
    """One row per source and direction, its median and its worst crop side by side: input, target, prediction, error.

    A sensor's own prediction is shown where it was masked and its input elsewhere. A crossing's is shown where its loss
    counts: everywhere for the region `all`, under the mask for `masked` (the rest of it is untrained).
    """
    ways = [(source, *way) for source in sources for way in directions(source.sensors)]
    with _style():
        figure, axes = plt.subplots(
            len(ways), 8, figsize=(16, 2.05 * len(ways) + 0.5), squeeze=False, constrained_layout=True
        )
        model.eval()
        predicted = {
            source.name: [predict_directions(model, batch, source) for batch in crops[source.name]]
            for source in sources
        }
        for row, (source, sensor, target) in zip(axes, ways, strict=True):
            gsd = source.read_metadata([0])[0]["images"][target]["gsd"]
            predictions = [found[sensor, target] for found in predicted[source.name]]
            errors = []
            for batch, prediction in zip(crops[source.name], predictions, strict=True):
                counted = counted_pixels(batch, sensor, target)
                error = (prediction - batch.pixel_values[target]).abs().mean(1)
                each = torch.where(counted, error, 0).sum((1, 2)) / counted.sum((1, 2)).clamp(min=1)
                errors += each.tolist()
            ranked = np.argsort(errors)
            picks = {"median": ranked[len(ranked) // 2], "worst": ranked[-1]}
            for half, (name, pick) in zip((row[:4], row[4:]), picks.items(), strict=True):
                batch, place = _locate(crops[source.name], pick)
                _draw_one(
                    half,
                    processor,
                    source,
                    crops[source.name][batch],
                    place,
                    predictions[batch][place],
                    sensor,
                    target,
                    cross_loss_region,
                    gsd,
                    f"{name}, {errors[pick]:.2f} σ",
                )
            row[0].set_ylabel(f"{source.name}\n{sensor} → {target}", fontsize=8)
        figure.suptitle(
            "Masked reconstruction of validation crops. Left: median crop, right: worst crop. "
            "Grey: hidden, invalid or not trained. Stretch limits come from the target.",
            fontsize=9,
        )
        return _save(figure, path)


def draw_progress(
    model: MsGFMForPreTraining,
    processor: MsGFMImageProcessor,
    sources: Sequence[ShardSource],
    crops: dict[str, list[MaskedCrops]],
    cross_loss_region: str,
    title: str,
    path: Path | None,
) -> Path | None:
    """One row per source and direction, the first of the crops: input, target, prediction, error.

    With the same crops at every evaluation the pictures show what a run learns. Processes that share a model all have
    to predict; those without a `path` draw nothing.
    """
    ways = [(source, *way) for source in sources for way in directions(source.sensors)]
    model.eval()
    predicted = {source.name: predict_directions(model, crops[source.name][0], source) for source in sources}
    if path is None:
        return None
    with _style():
        figure, axes = plt.subplots(
            len(ways), 4, figsize=(8, 2.05 * len(ways) + 0.4), squeeze=False, constrained_layout=True
        )
        for row, (source, sensor, target) in zip(axes, ways, strict=True):
            batch, prediction = crops[source.name][0], predicted[source.name][sensor, target][0]
            counted = counted_pixels(batch, sensor, target)[0]
            error = (prediction - batch.pixel_values[target][0]).abs().mean(0)
            mean = torch.where(counted, error, 0).sum() / counted.sum().clamp(min=1)
            gsd = source.read_metadata([0])[0]["images"][target]["gsd"]
            _draw_one(
                row, processor, source, batch, 0, prediction, sensor, target, cross_loss_region, gsd, f"{mean:.2f} σ"
            )
            row[0].set_ylabel(f"{source.name}\n{sensor} → {target}", fontsize=8)
        figure.suptitle(title, fontsize=9)
        return _save(figure, path)


def _locate(batches: list[MaskedCrops], pick: int) -> tuple[int, int]:
    starts = np.cumsum([0, *(len(batch.keys) for batch in batches)])
    number = int(np.searchsorted(starts, pick, side="right")) - 1
    return number, int(pick - starts[number])


def _physical(processor, source, batch, place, sensor, values=None) -> np.ndarray:
    """(C, H, W) in the unit of the sensor's statistics, NaN where invalid: one image of a batch, or what is given for
    it; heights stay relative to their reference."""
    spec = get_sensor(sensor, processor.sensors)
    values = batch.pixel_values[sensor][place] if values is None else values
    return processor.inverse_radiometry(
        values[None].cpu(),
        batch.valid_mask[sensor][place][None].cpu(),
        sensor,
        bands=source.bands[sensor],
        unit=spec.unit,
        level=source.levels[sensor],
        reference=torch.zeros(1) if spec.reference else None,
    )[0].numpy()


def _draw_one(axes, processor, source, batch, place, prediction, sensor, target, region, gsd, title):
    masked = counted_pixels(batch, sensor, None)[place].cpu().numpy()
    truth = batch.pixel_values[target][place]
    counted = counted_pixels(batch, sensor, target)[place].cpu().numpy()
    true = _physical(processor, source, batch, place, target)
    stretch = _Stretch(get_sensor(target, processor.sensors), source.bands[target], true)
    given = _physical(processor, source, batch, place, sensor)
    input_stretch = stretch
    if sensor != target:
        input_stretch = _Stretch(get_sensor(sensor, processor.sensors), source.bands[sensor], given)
    guess = _physical(processor, source, batch, place, target, prediction.to(truth.device))
    hidden = None
    if sensor == target:
        guess = np.where(masked, guess, given)
    elif region == "masked":
        hidden = ~masked

    pictures = [input_stretch.draw(axes[0], given, masked), stretch.draw(axes[1], true)]
    pictures.append(stretch.draw(axes[2], guess, hidden))
    error = (prediction - truth).abs().mean(0).cpu().numpy()
    error = np.ma.masked_where(~counted, error)
    axes[3].set_facecolor(str(_HIDDEN))
    pictures.append(axes[3].imshow(error, cmap="magma", vmin=0, vmax=2))
    labels = [input_stretch.label, stretch.label, stretch.label, "|error|, σ"]
    for panel, picture, label, name in zip(
        axes, pictures, labels, ("input", "target", "prediction", title), strict=True
    ):
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_title(name)
        if picture is not None and name != "target":
            bar = panel.figure.colorbar(picture, ax=panel, fraction=0.046, pad=0.02)
            bar.ax.tick_params(labelsize=6)
            bar.set_label(label, fontsize=6)
    _scale_bar(axes[1], truth.shape[-1], gsd)


@dataclass
class Reconstructed:
    """One direction of one place, in physical units, ready to be drawn.

    Args:
        sensor, target: ids of the input and of what is predicted from it.
        trained: False where the model is known never to have had this direction in training.
        specs: {sensor: SensorSpec} of both.
        bands: {sensor: names of its bands} of both.
        given: (C, H, W), the input image, NaN where invalid.
        masked: bool (H, W), where the input was masked.
        shown: (C_target, H, W), the reconstruction, NaN where there is none.
        truth: (C_target, H, W), the image of the target, NaN where invalid; `None` if there is none.
        error: (H, W), mean over bands of |shown - truth| where it counts, NaN elsewhere; `None` without a truth.
        error_text: what to write above the panel of the error, or, without a truth, in the place of both.
        gsd: metres per pixel, where known.
    """

    sensor: str
    target: str
    trained: bool
    specs: dict[str, SensorSpec]
    bands: dict[str, list[str]]
    given: np.ndarray
    masked: np.ndarray
    shown: np.ndarray
    truth: np.ndarray | None
    error: np.ndarray | None
    error_text: str
    gsd: float | None


def draw_directions(rows: Sequence[Reconstructed], title: str, path: Path) -> Path:
    """Figure 3 of the paper: a row per direction with masked input, reconstruction, target and absolute error.

    The stretch (2 % to 98 % of the target, or of the reconstruction where there is no target) serves all panels of the
    target; the error reaches from 0 to half of that range, over all bands.
    """
    height, width = rows[0].masked.shape
    # Inches: a pixel per pixel, within reason.
    side, shape = min(max(width / 110, 2.75), 5.0), min(max(height / width, 0.4), 2.5)
    with _style():
        figure, axes = plt.subplots(
            len(rows),
            4,
            figsize=(4 * side + 3.5, (side * shape + 0.42) * len(rows) + 0.7),
            squeeze=False,
            layout="constrained",
        )
        for panels, row in zip(axes, rows, strict=True):
            _draw_direction(panels, row)
        figure.suptitle(title, fontsize=9)
        return _save(figure, path)


def _draw_direction(panels, row: Reconstructed):
    truth = row.shown if row.truth is None else row.truth
    stretch = _Stretch(row.specs[row.target], row.bands[row.target], truth)
    own = row.sensor == row.target
    input_stretch = stretch if own else _Stretch(row.specs[row.sensor], row.bands[row.sensor], row.given)
    pictures = [(input_stretch.draw(panels[0], row.given, row.masked), input_stretch.limits())]
    pictures.append((stretch.draw(panels[1], row.shown), stretch.limits()))
    titles = [f"{row.sensor}, masked", f"{row.target} from {row.sensor}", f"{row.target}, target", row.error_text]
    if row.truth is None:
        for panel in panels[2:]:
            panel.set_axis_off()
        style = {"ha": "center", "va": "center", "color": "0.35", "transform": panels[2].transAxes}
        panels[2].text(0.5, 0.5, row.error_text, **style)
        titles[2:] = ["", ""]
    else:
        pictures.append((stretch.draw(panels[2], row.truth), stretch.limits()))
        panels[3].set_facecolor(str(_HIDDEN))
        # Over all bands, as the error is.
        ends = np.nanpercentile(row.truth, (2, 98), axis=(1, 2))
        limit = max(float(np.mean(ends[1] - ends[0])) / 2, 1e-6)
        found = np.ma.masked_invalid(row.error)
        pictures.append((panels[3].imshow(found, cmap="magma", vmin=0, vmax=limit), f"|error|, {stretch.unit}"))
    for panel, name in zip(panels, titles, strict=True):
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_title(name)
    for panel, (picture, label) in zip(panels, pictures, strict=False):
        if picture is not None:
            bar = panel.figure.colorbar(picture, ax=panel, fraction=0.046, pad=0.02)
            bar.ax.tick_params(labelsize=7)
            bar.set_label(label, fontsize=7)
        else:
            panel.set_xlabel(label, fontsize=7)
        height, width = row.masked.shape
        _scale_bar(panel, width, row.gsd, height)
        panel.set_anchor("W")
    panels[0].set_ylabel(f"{row.sensor} → {row.target}" + ("" if row.trained else "\nnot trained"), fontsize=10)


class Backscatter(NamedTuple):
    """One band of one direction of a radar sensor.

    Args:
        direction: as it is to be named, such as "s2 → s1".
        band: name of the band.
        before, after: (n,), decibels of the same pixels in the image and in its reconstruction.
        found: the entry of the band from `speckle.compare_backscatter`.
    """

    direction: str
    band: str
    before: np.ndarray
    after: np.ndarray
    found: dict


def draw_backscatter(rows: Sequence[Sequence[Backscatter]], title: str, path: Path) -> Path:
    """Figure 5 of the paper: a row per direction and a panel per band with histograms before and after, and the SSI."""
    columns = max(map(len, rows))
    with _style():
        figure, axes = plt.subplots(
            len(rows), columns, figsize=(5.2 * columns, 2.9 * len(rows) + 0.6), squeeze=False, layout="constrained"
        )
        for panels, bands in zip(axes, rows, strict=True):
            for panel, band in zip(panels, bands, strict=False):
                _draw_backscatter(panel, band)
            for panel in panels[len(bands) :]:
                panel.set_axis_off()
            panels[0].set_ylabel("share of pixels per dB")
        figure.suptitle(title, fontsize=9)
        return _save(figure, path)


def _draw_backscatter(panel, band: Backscatter):
    ends = np.percentile(np.concatenate([band.before, band.after]), [0.2, 99.8])
    bins = np.linspace(np.floor(ends[0]), np.ceil(ends[1]) + 1e-3, 61)
    for name, values, colour in (("before", band.before, "0.35"), ("after", band.after, "tab:orange")):
        found = band.found[name]
        looks = found["equivalent_looks"]
        label = f"{name}: {found['mean_db']:.1f} ± {found['std_db']:.1f} dB, CV {found['coefficient_of_variation']:.2f}"
        label += "" if looks is None else f", {looks:.1f} looks"
        panel.hist(values, bins, density=True, histtype="stepfilled", color=colour, alpha=0.35)
        panel.hist(values, bins, density=True, histtype="step", color=colour, linewidth=1.3, label=label)
        panel.axvline(found["mean_db"], color=colour, linewidth=1.2, linestyle="--", ymax=0.8)
    # Room for the legend above the histograms.
    panel.set_ylim(0, panel.get_ylim()[1] * 1.3)
    panel.set_xlim(bins[0], bins[-1])
    panel.legend(fontsize=7, loc="upper left", frameon=False)
    panel.set_xlabel("backscatter, dB")
    panel.grid(alpha=0.25)
    index = band.found["ssi"]
    panel.set_title(
        f"{band.direction}, {band.band}: " + ("no SSI" if index is None else f"SSI {index:.2f}"), fontsize=9
    )


def read_metrics(path: Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw_losses(metrics: Path, path: Path) -> Path:
    """Masked L1 in training by source and direction, smoothed, and its ratio to the band mean in validation."""
    lines = read_metrics(metrics)
    training: dict[str, list[tuple[int, float]]] = {}
    validation: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.get("losses", {}).items():
            training.setdefault(name, []).append((line["step"], value))
        for name, value in line.get("validation", {}).items():
            if value["ratio_to_band_mean"] is not None:
                validation.setdefault(name, []).append((line["step"], value["ratio_to_band_mean"]))
    with _style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.4), constrained_layout=True)
        colours = {name: f"C{i % 10}" for i, name in enumerate(sorted({*training, *validation}))}
        for panel, curves in ((left, training), (right, validation)):
            for name, points in sorted(curves.items()):
                steps, values = np.array(points).T
                crossing = name.split(" ")[-1].split("->")
                style = "-" if crossing[0] == crossing[1] else "--"
                if panel is left:
                    values = _smooth(values)
                marker = "." if len(points) < 30 else None
                panel.plot(steps, values, style, color=colours[name], label=name, linewidth=1.2, marker=marker)
            panel.set_xlabel("step")
            panel.grid(alpha=0.3)
            if curves:
                panel.legend(fontsize=6, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13))
        left.set_title("Training: masked L1 (smoothed)")
        left.set_ylabel("L1, standard deviations")
        right.set_title("Validation: masked L1 / that of the band mean")
        right.axhline(1, color="black", linewidth=0.8)
        return _save(figure, path)


def _smooth(values: np.ndarray, weight: float = 0.8) -> np.ndarray:
    smoothed, mean, total = [], 0.0, 0.0
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + 1 - weight
        smoothed.append(mean / total)
    return np.array(smoothed)


@torch.no_grad()
def draw_expert_load(
    model: MsGFMForPreTraining, sources: Sequence[ShardSource], crops: dict[str, list[MaskedCrops]], path: Path
) -> Path | None:
    """Share of the choices of a sensor's tokens that fall on each expert, per block; `None` for a dense model."""
    config = model.config
    if not any(config.moe_blocks):
        return None
    model.eval()
    batches = [(source, crops[source.name][0]) for source in sources]
    out = model(
        [batch.pixel_values for _, batch in batches],
        [batch.masks for _, batch in batches],
        bands=[{sensor: source.bands[sensor] for sensor in batch.pixel_values} for source, batch in batches],
        valid_mask=[batch.valid_mask for _, batch in batches],
        output_router_logits=True,
    )
    statistics = routing_statistics(out, config)
    sensors = list(statistics)
    blocks = [(stage + 1, block) for stage, found in enumerate(config.moe_blocks) for block in sorted(found)]
    with _style():
        figure, axes = plt.subplots(
            1,
            len(blocks),
            figsize=(2.2 * len(blocks) + 1.5, 0.5 * len(sensors) + 1.6),
            squeeze=False,
            constrained_layout=True,
        )
        for number, (panel, (stage, block)) in enumerate(zip(axes[0], blocks, strict=True)):
            table = torch.stack([statistics[sensor]["histogram"][number] for sensor in sensors]).float().cpu().numpy()
            picture = panel.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto")
            for (i, j), value in np.ndenumerate(table):
                panel.text(
                    j,
                    i,
                    f"{value:.0%}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if value < 0.6 else "black",
                )
            panel.set_title(f"stage {stage}, block {block}")
            panel.set_xlabel("expert")
            panel.set_xticks(range(config.num_experts))
            panel.set_yticks(range(len(sensors)), sensors if number == 0 else [])
        figure.colorbar(picture, ax=axes[0], label="share of the choices of the sensor's tokens", fraction=0.03)
        figure.suptitle("Where the tokens of each sensor go (validation crops, nothing dropped)", fontsize=9)
        return _save(figure, path)


def draw_experts(report: dict, path: Path) -> Path:
    """A heatmap sensor x expert per block of a report of `experts.analyse_experts`: who takes whose tokens."""
    blocks, experts = report["blocks"], report["num_experts"]
    columns = min(len(blocks), 3)
    rows = -(-len(blocks) // columns)
    sensors = list(report["n"])
    with _style():
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(columns * (0.52 * experts + 1.9) + 0.8, rows * (0.42 * len(sensors) + 1.1) + 0.6),
            squeeze=False,
            constrained_layout=True,
        )
        for panel, block in zip(axes.flat, blocks, strict=False):
            found = [block["sensors"][sensor] for sensor in sensors]
            table = np.array([row["share"] for row in found])
            picture = panel.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto")
            for (i, j), value in np.ndenumerate(table):
                colour = "white" if value < 0.6 else "black"
                panel.text(j, i, f"{value:.0%}", ha="center", va="center", fontsize=7, color=colour)
            panel.set_title(f"{block['name']}\nsensor tells {block['mutual_information_bits']:.2f} bits of the expert")
            panel.set_xticks(range(experts))
            panel.set_yticks(range(len(sensors)), sensors)
            right = panel.secondary_yaxis("right")
            right.set_yticks(range(len(sensors)), [f"{row['entropy_bits']:.2f}" for row in found])
            right.set_ylabel("entropy, bits")
            panel.set_xlabel("expert")
        for panel in axes.flat[len(blocks) :]:
            panel.set_axis_off()
        figure.colorbar(picture, ax=axes, label="share of the choices of the sensor's tokens", fraction=0.03)
        crops = ", ".join(f"{sensor} {n['crops']} in {n['places']}" for sensor, n in report["n"].items())
        figure.suptitle(
            f"Which expert takes whose tokens (entropy at most {report['max_entropy_bits']:.2f} bits)\n"
            f"crops in places: {crops}",
            fontsize=9,
        )
        return _save(figure, path)


class ExpertCrop(NamedTuple):
    """One crop and the tokens of it that an expert takes.

    Args:
        source, sensor: whose image it is.
        crops: a batch of this crop alone.
        found: its entry in the report.
        taken: bool (h, w), the expert's tokens.
        stride: pixels per side of a token.
    """

    source: ShardSource
    sensor: str
    crops: MaskedCrops
    found: dict
    taken: np.ndarray
    stride: int


def draw_expert_crops(
    processor: MsGFMImageProcessor, block: dict, rows: Sequence[Sequence[ExpertCrop]], path: Path
) -> Path:
    """A row per expert of one block: the crops it takes most of, its tokens outlined and the others' greyed."""
    columns = max(1, *map(len, rows))
    with _style():
        figure, axes = plt.subplots(
            len(rows),
            columns,
            figsize=(1.9 * columns + 0.6, 2.45 * len(rows) + 0.7),
            squeeze=False,
            layout="constrained",
        )
        for expert, (panels, crops) in enumerate(zip(axes, rows, strict=True)):
            for panel in panels:
                panel.set_xticks([])
                panel.set_yticks([])
            panels[0].set_ylabel(f"expert {expert}", fontsize=10)
            for panel in panels[len(crops) :]:
                panel.spines[:].set_visible(False)
            if not crops:
                panels[0].text(0.5, 0.5, "takes nothing", ha="center", va="center", transform=panels[0].transAxes)
            for panel, crop in zip(panels, crops, strict=False):
                _draw_expert_crop(panel, processor, crop)
        figure.suptitle(
            f"{block['name']}: the crops each expert takes most of. Outlined: its tokens, {block['stride']} px each; "
            "grey: those of other experts.",
            fontsize=9,
        )
        figure.get_layout_engine().set(h_pad=0.1)
        return _save(figure, path)


def _draw_expert_crop(panel, processor: MsGFMImageProcessor, crop: ExpertCrop):
    found = crop.found
    values = _physical(processor, crop.source, crop.crops, 0, crop.sensor)
    stretch = _Stretch(get_sensor(crop.sensor, processor.sensors), crop.source.bands[crop.sensor], values)
    stretch.draw(panel, values)
    height, width = values.shape[1:]
    lit = crop.taken.repeat(crop.stride, 0).repeat(crop.stride, 1)[:height, :width]
    wash = np.full((height, width, 4), _HIDDEN)
    wash[..., 3] = np.where(lit, 0, 0.8)
    panel.imshow(wash, interpolation="nearest")
    panel.add_collection(LineCollection(_outline(lit), colors="#ff2d95", linewidths=1.5))
    panel.set_xlim(-0.5, width - 0.5)
    panel.set_ylim(height - 0.5, -0.5)
    _scale_bar(panel, width, crop.source.read(found["row"])["images"][crop.sensor].gsd)
    bands = "true colour"
    if len(stretch.index) == 1:
        bands = f"{stretch.label}: {stretch.low[0]:.3g} to {stretch.high[0]:.3g}"
    name = found["key"] if len(found["key"]) < 25 else f"{found['key'][:11]}…{found['key'][-12:]}"
    panel.set_title(f"{found['share']:.0%} of {found['tokens']} tokens, gate {found['gate']:.2f}", fontsize=7.5)
    panel.set_xlabel(f"{crop.source.name}, {crop.sensor}\n{bands}\n{name}", fontsize=6.5)


def _outline(lit: np.ndarray) -> list[list[tuple[float, float]]]:
    """The edges between lit pixels and all others, in the coordinates of `imshow`."""
    padded = np.pad(lit, 1)
    lines = [[(x - 0.5, y - 0.5), (x + 0.5, y - 0.5)] for y, x in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])]
    return lines + [
        [(x - 0.5, y - 0.5), (x - 0.5, y + 0.5)] for y, x in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    ]
