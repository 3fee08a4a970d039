"""Pictures of a run: reconstructions, losses, and where the experts' tokens come from."""

import json
import os
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from msgfm_hf.data.shards import ShardSource
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.modeling_msgfm import MsGFMForPreTraining, routing_statistics
from msgfm_hf.model.sensors import SensorSpec, get_sensor
from msgfm_hf.tasks.reconstruction import MaskedCrops, counted_pixels, directions, predict_directions

_UNIT_NAMES = {"reflectance": "reflectance", "db": "dB", "metres": "m"}
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
        self.unit = _UNIT_NAMES[spec.unit]
        self.label = "" if len(self.index) == 3 else f"{bands[self.index[0]]}, {self.unit}"
        shown = target[self.index]
        self.low = np.nanpercentile(shown, 2, axis=(1, 2))
        self.high = np.maximum(np.nanpercentile(shown, 98, axis=(1, 2)), self.low + 1e-6)

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


def _scale_bar(axes, width: int, gsd: float | None):
    """A bar of a round number of metres, about a quarter of the panel."""
    if not gsd:
        return
    goal = width * gsd / 4
    metres = max((m for e in range(-1, 6) for m in (10**e, 2 * 10**e, 5 * 10**e) if m <= goal), default=goal)
    pixels, left, top = metres / gsd, width * 0.06, width * 0.93
    axes.plot([left, left + pixels], [top, top], color="white", linewidth=3.5, solid_capstyle="butt")
    axes.plot([left, left + pixels], [top, top], color="black", linewidth=1.5, solid_capstyle="butt")
    axes.text(
        left,
        top - width * 0.03,
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
            gsd = source.read(0)["images"][target].gsd
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


def _locate(batches: list[MaskedCrops], pick: int) -> tuple[int, int]:
    starts = np.cumsum([0, *(len(batch.keys) for batch in batches)])
    number = int(np.searchsorted(starts, pick, side="right")) - 1
    return number, int(pick - starts[number])


def _draw_one(axes, processor, source, batch, place, prediction, sensor, target, region, gsd, title):
    def physical(values, name):
        return processor.inverse_radiometry(
            values[None].cpu(),
            batch.valid_mask[name][place][None].cpu(),
            name,
            bands=source.bands[name],
            unit=get_sensor(name, processor.sensors).unit,
            level=source.levels[name],
            reference=torch.zeros(1) if get_sensor(name, processor.sensors).reference else None,
        )[0].numpy()

    masked = counted_pixels(batch, sensor, None)[place].cpu().numpy()
    truth = batch.pixel_values[target][place]
    counted = counted_pixels(batch, sensor, target)[place].cpu().numpy()
    stretch = _Stretch(get_sensor(target, processor.sensors), source.bands[target], physical(truth, target))
    given = physical(batch.pixel_values[sensor][place], sensor)
    input_stretch = stretch
    if sensor != target:
        input_stretch = _Stretch(get_sensor(sensor, processor.sensors), source.bands[sensor], given)
    guess = physical(prediction.to(truth.device), target)
    hidden = None
    if sensor == target:
        guess = np.where(masked, guess, given)
    elif region == "masked":
        hidden = ~masked

    pictures = [input_stretch.draw(axes[0], given, masked), stretch.draw(axes[1], physical(truth, target))]
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
    """Share of each sensor's tokens that each expert takes, per block with experts; `None` for a dense model."""
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
    statistics = routing_statistics(out, config.num_experts, config.router_noise)
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
        figure.colorbar(picture, ax=axes[0], label="share of the sensor's tokens", fraction=0.03)
        figure.suptitle("Where the tokens of each sensor go (validation crops, nothing dropped)", fontsize=9)
        return _save(figure, path)
