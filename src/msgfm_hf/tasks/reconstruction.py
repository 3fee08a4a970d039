"""How well masked pixels are predicted: of a sensor from itself, and of one sensor from another, beside what is had
without a model.

The measure is the masked L1 of the objective: the mean absolute difference over masked, valid pixels and over bands, in
normalised units (standard deviations of the sensor's statistics; 15 m for elevation). Lower is better.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from msgfm_hf.data.batch import collate, normalise, rotations, sample_masks
from msgfm_hf.data.mixture import EvaluationCrops, spread
from msgfm_hf.data.shards import ROW_GROUP_SIZE, CorruptShardError, ShardSource
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.masking import loss_pixels
from msgfm_hf.model.modeling_msgfm import MsGFMForPreTraining

# Rows of training pixels from which means, medians and regressions are fitted: enough to be stable to 0.1 %.
_FIT_PIXELS = 400_000


@dataclass
class TrainingStatistics:
    """What the baselines know of the training places of one source.

    Args:
        mean, median: {sensor: (C,)} of valid normalised pixels.
        regression: {(input, target): (C_input + 1, C_target)} least squares, pixel by pixel, with an intercept last.
    """

    mean: dict[str, torch.Tensor] = field(default_factory=dict)
    median: dict[str, torch.Tensor] = field(default_factory=dict)
    regression: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)


def training_statistics(
    source: ShardSource, processor: MsGFMImageProcessor, image_size: int, seed: int = 0, max_crops: int = 512
) -> TrainingStatistics:
    """Means, medians and pixelwise regressions between the sensors of a source, from crops of its training places.

    Raises:
        ValueError: if no pixel is valid in all sensors of the source.
    """
    pixels: dict[str, list[torch.Tensor]] = defaultdict(list)
    # A row group is read as a whole: all its rows are taken.
    groups = spread(source.row_groups, -(-max_crops // ROW_GROUP_SIZE))
    rows = [row for _, _, first, count in groups for row in range(first, first + count)]
    crops = EvaluationCrops(source, image_size, max_crops, rows)
    share = _FIT_PIXELS / (len(crops) * image_size**2)
    for index in range(len(crops)):
        try:
            part = collate([crops[index]])["sources"][0]
        except CorruptShardError:
            # Training meets this row too, and counts it there.
            continue
        pixel_values, valid_mask = normalise(part["images"], source, processor, torch.device("cpu"))
        everywhere = torch.stack(list(valid_mask.values())).all(0)
        generator = np.random.default_rng([seed, index])
        chosen = torch.from_numpy(generator.random(tuple(everywhere.shape)) < share) & everywhere
        for sensor, values in pixel_values.items():
            pixels[sensor].append(values.permute(0, 2, 3, 1)[chosen])
    joined = {sensor: torch.cat(values).double() for sensor, values in pixels.items()}
    if not joined or not all(map(len, joined.values())):
        raise ValueError(
            f"`source` must have pixels that are valid in all its sensors ({', '.join(source.sensors)}), got none in "
            f"{source.path}. Look with `msgfm inspect`."
        )
    statistics = TrainingStatistics()
    for sensor, values in joined.items():
        statistics.mean[sensor] = values.mean(0).float()
        statistics.median[sensor] = values.median(0).values.float()
        design = torch.cat([values, torch.ones(len(values), 1, dtype=values.dtype)], 1)
        for target, wanted in joined.items():
            if target != sensor:
                statistics.regression[sensor, target] = torch.linalg.lstsq(design, wanted).solution.float()
    return statistics


def bilinear_inpaint(pixels: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Fill hidden pixels from the nearest visible ones to the left, right, top and bottom, weighted by 1 / distance.

    Args:
        pixels: (B, C, H, W).
        visible: bool (B, H, W).

    Returns:
        (B, C, H, W); visible pixels unchanged. A pixel that sees no visible one along its row and column takes the mean
        of the visible pixels; an image without any is 0.
    """
    shown = visible.unsqueeze(1)
    count = shown.sum((2, 3), keepdim=True).clamp(min=1)
    mean = torch.where(shown, pixels, 0).sum((2, 3), keepdim=True) / count
    total, weight = torch.zeros_like(pixels), torch.zeros_like(pixels[:, :1])
    for axis in (2, 3):
        for flip in (False, True):
            length = pixels.shape[axis]
            values = pixels.flip(axis) if flip else pixels
            seen = shown.flip(axis) if flip else shown
            place = torch.arange(length, device=pixels.device).view(-1, *(1,) * (3 - axis))
            last = torch.where(seen, place, -1).cummax(axis).values
            found = values.gather(axis, last.clamp(min=0).expand_as(values))
            share = torch.where(last >= 0, 1 / (place - last).clamp(min=1).to(pixels.dtype), 0)
            total += (found * share).flip(axis) if flip else found * share
            weight += share.flip(axis) if flip else share
    filled = torch.where(weight > 0, total / weight.clamp(min=1e-12), mean)
    return torch.where(shown, pixels, filled)


@dataclass
class MaskedCrops:
    """One batch of an evaluation: whose crops, their pixels and their masks by sensor.

    Args:
        group_ids, keys: place and row of every crop.
        pixel_values: {sensor: (B, C, H, W)}, normalised.
        valid_mask: {sensor: bool (B, H, W)}.
        masks: {sensor: bool (B, L)}, True = masked.
        patch_size: side of the patches that `masks` counts, in pixels.
    """

    group_ids: list[str]
    keys: list[str]
    pixel_values: dict[str, torch.Tensor]
    valid_mask: dict[str, torch.Tensor]
    masks: dict[str, torch.Tensor]
    patch_size: int


def masked_crops(
    source: ShardSource,
    processor: MsGFMImageProcessor,
    model: MsGFMForPreTraining,
    mask_ratio: float,
    seed: int,
    max_crops: int | None,
    batch_size: int,
    rows: Sequence[int] | None = None,
) -> Iterator[MaskedCrops]:
    """The crops of a source, or of some of its rows, with masks that depend on the seed and the crop alone.

    Raises:
        CorruptShardError: at a damaged row.
    """
    config, device = model.config, model.device
    crops = EvaluationCrops(source, config.image_size, max_crops, rows)
    for first in range(0, len(crops), batch_size):
        part = collate([crops[n] for n in range(first, min(first + batch_size, len(crops)))])["sources"][0]
        pixel_values, valid_mask = normalise(part["images"], source, processor, device)
        masks = {
            sensor: sample_masks(
                part["positions"], source.name, sensor, config, mask_ratio, seed, config.image_size
            ).to(device)
            for sensor in pixel_values
        }
        yield MaskedCrops(part["group_ids"], part["keys"], pixel_values, valid_mask, masks, config.patch_size)


def find_damaged(source: ShardSource, image_size: int, max_crops: int | None = None) -> dict[int, str]:
    """{row: what is wrong}, of the rows of the crops that an evaluation takes.

    Where one is left out another takes its place, which is looked at too.

    Raises:
        CorruptShardError: if the rows cannot even be listed.
    """
    damaged: dict[int, str] = {}
    while True:
        rows = [row for row in range(len(source)) if row not in damaged] if damaged else None
        before = len(damaged)
        for row in dict.fromkeys(row for row, _, _ in EvaluationCrops(source, image_size, max_crops, rows).ids):
            try:
                source.read(row, verify=True)
            except CorruptShardError as error:
                damaged[row] = str(error)
        if len(damaged) == before:
            return damaged


def directions(sensors: Iterable[str]) -> list[tuple[str, str]]:
    """(input, target) for every sensor and every pair, each itself first."""
    sensors = sorted(sensors)
    return [(s, s) for s in sensors] + [(s, t) for s in sensors for t in sensors if s != t]


@torch.no_grad()
def predict_directions(
    model: MsGFMForPreTraining, crops: MaskedCrops, source: ShardSource
) -> dict[tuple[str, str], torch.Tensor]:
    """What the model predicts from every masked sensor of itself and of every partner.

    Returns:
        {(input, target): (B, C_target, H, W) float32}, one entry per `directions`.
    """
    predictions = {}
    for targets in rotations(source.sensors):
        reconstruction = model(
            crops.pixel_values,
            crops.masks,
            bands={sensor: source.bands[sensor] for sensor in crops.pixel_values},
            valid_mask=crops.valid_mask,
            targets=targets,
        ).reconstruction
        predictions |= {(sensor, targets[sensor]): found.float() for sensor, found in reconstruction.items()}
    return predictions


def baselines(crops: MaskedCrops, statistics: TrainingStatistics, sensor: str, target: str) -> dict[str, torch.Tensor]:
    """What is had without a model, each (B, C_target, H, W), from the same visible pixels.

    `band_mean`, `band_median`: of the training places. From the image itself, where it is its own target:
    `visible_mean`, the mean of its visible pixels, and `inpainting`, bilinear from the visible pixels. From a partner:
    `regression`, pixel by pixel on the inpainted partner, fitted on the training places.
    """
    wanted = crops.pixel_values[target]

    def constant(values):
        return values.to(wanted)[None, :, None, None].expand_as(wanted)

    found = {"band_mean": constant(statistics.mean[target]), "band_median": constant(statistics.median[target])}
    pixels = crops.pixel_values[sensor]
    visible = _visible(crops, sensor)
    filled = bilinear_inpaint(pixels, visible)
    if sensor == target:
        count = visible.sum((1, 2)).clamp(min=1)[:, None]
        mean = torch.where(visible.unsqueeze(1), pixels, 0).sum((2, 3)) / count
        found["visible_mean"] = mean[:, :, None, None].expand_as(wanted)
        found["inpainting"] = filled
    else:
        coefficients = statistics.regression[sensor, target].to(pixels)
        linear = torch.einsum("bchw,cd->bdhw", filled, coefficients[:-1])
        found["regression"] = linear + coefficients[-1][None, :, None, None]
    return found


def _visible(crops: MaskedCrops, sensor: str) -> torch.Tensor:
    return ~counted_pixels(crops, sensor, None) & crops.valid_mask[sensor]


def counted_pixels(crops: MaskedCrops, sensor: str, target: str | None) -> torch.Tensor:
    """Bool (B, H, W): masked in the input and, where a target is named, valid in it."""
    height, width = crops.pixel_values[sensor].shape[2:]
    valid = None if target is None else crops.valid_mask[target]
    return loss_pixels(crops.masks[sensor], valid, height, width, crops.patch_size)


def evaluate_reconstruction(
    model: MsGFMForPreTraining,
    processor: MsGFMImageProcessor,
    sources: Sequence[ShardSource],
    statistics: dict[str, TrainingStatistics],
    mask_ratio: float = 0.6,
    seed: int = 0,
    max_crops: int | None = None,
    batch_size: int = 16,
    with_baselines: bool = True,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    rows: dict[str, Sequence[int]] | None = None,
) -> list[dict]:
    """Masked L1 of every sensor and crossing of every source, beside the baselines on the same masks.

    Args:
        model: in evaluation mode for the time of the call.
        processor: its radiometry is the only arithmetic on pixels.
        sources: validation splits.
        statistics: {source name: of its training split}.
        mask_ratio, seed: of the masks.
        max_crops: at most this many crops of each source, spread evenly; `None` for all.
        with_baselines: whether to compute all baselines, or the band mean alone.
        autocast: makes the context in which the model runs.
        rows: {source name: ascending numbers of the rows to take}; default all.

    Returns:
        one dictionary per source and direction: `source, input, target, crops` (n), `places` (their number), `l1`,
        one entry per baseline, and `by_place`: {place: the same values and crops}. Pixels, not images, weigh equally. A
        source without a whole crop has none.

    Raises:
        CorruptShardError: at a damaged row: numbers to be compared must not depend on what could be read.
    """
    was_training = model.training
    model.eval()
    results = []
    for source in sources:
        known, chosen = statistics[source.name], (rows or {}).get(source.name)
        sums = {way: defaultdict(lambda: defaultdict(float)) for way in directions(source.sensors)}
        for crops in masked_crops(source, processor, model, mask_ratio, seed, max_crops, batch_size, chosen):
            with autocast():
                predictions = predict_directions(model, crops, source)
            for (sensor, target), places in sums.items():
                candidates = {"l1": predictions[sensor, target]}
                if with_baselines:
                    candidates |= baselines(crops, known, sensor, target)
                else:
                    mean = known.mean[target].to(candidates["l1"])
                    candidates["band_mean"] = mean[None, :, None, None].expand_as(candidates["l1"])
                counted = counted_pixels(crops, sensor, target)
                for name, prediction in candidates.items():
                    error = (prediction - crops.pixel_values[target]).abs().mean(1)
                    error = torch.where(counted, error, 0).sum((1, 2)).cpu().double().tolist()
                    for place, value in zip(crops.group_ids, error, strict=True):
                        places[place][name] += value
                for place, pixels in zip(crops.group_ids, counted.sum((1, 2)).tolist(), strict=True):
                    places[place]["pixels"] += pixels
                    places[place]["crops"] += 1
        for (sensor, target), places in sums.items():
            if not places:
                continue
            names = [name for name in next(iter(places.values())) if name not in ("pixels", "crops")]
            total = {name: sum(place[name] for place in places.values()) for name in (*names, "pixels", "crops")}
            results.append(
                {
                    "source": source.name,
                    "input": sensor,
                    "target": target,
                    "crops": int(total["crops"]),
                    "places": len(places),
                    **{name: total[name] / max(total["pixels"], 1) for name in names},
                    "by_place": {
                        place: {
                            "crops": int(found["crops"]),
                            **{name: found[name] / max(found["pixels"], 1) for name in names},
                        }
                        for place, found in sorted(places.items())
                    },
                }
            )
    model.train(was_training)
    return results
