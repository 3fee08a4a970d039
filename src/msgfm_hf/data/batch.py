"""Batches: stored pixels in, keyword arguments of `MsGFMForPreTraining` out.

Masks and crossings are drawn here, on the CPU and seeded by what they are for, so that they are the same on every
device, with any number of workers and in any number of processes.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch

from msgfm_hf.data.shards import ShardSource
from msgfm_hf.model.configuration_msgfm import MsGFMConfig
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.masking import draw_mask, loss_pixels

LOSS_REGIONS = ("masked", "all")


def collate(samples: Sequence[dict]) -> dict:
    """Stack samples source by source, in the stored dtype.

    Args:
        samples: of `MixtureDataset` or `EvaluationCrops`.

    Returns:
        `{"sources": [...], "bad": [...]}`; per source `index`, `keys`, `group_ids`, `positions` and `images`:
        `{sensor: {"pixels": (B, C, H, W) stored dtype, "valid": bool (B, H, W), "scale": (B,), "offset_dn": (B,)}}`.
        Where a sample has no images, neither has the batch, and `bad` says why.
    """
    bad = [found for sample in samples for found in sample["bad"]]
    if any(sample["images"] is None for sample in samples):
        return {"sources": [], "bad": bad}
    by_source: dict[int, list[dict]] = {}
    for sample in samples:
        by_source.setdefault(sample["source"], []).append(sample)
    sources = []
    for index, members in sorted(by_source.items()):
        images = {}
        for sensor in members[0]["images"]:
            parts = [member["images"][sensor] for member in members]
            images[sensor] = {
                "pixels": torch.from_numpy(np.stack([part["pixels"] for part in parts])),
                "valid": torch.from_numpy(np.stack([part["valid"] for part in parts])),
                "scale": torch.tensor([part["scale"] for part in parts], dtype=torch.float64),
                "offset_dn": torch.tensor([part["offset_dn"] for part in parts], dtype=torch.float64),
            }
        sources.append(
            {
                "index": index,
                "keys": [member["key"] for member in members],
                "group_ids": [member["group_id"] for member in members],
                "positions": [member["position"] for member in members],
                "images": images,
            }
        )
    return {"sources": sources, "bad": bad}


def rotations(sensors: Sequence[str]) -> list[dict[str, str]]:
    """All ways for every sensor of a source to have one target and every target one sensor, by turning them in a ring.

    Returns:
        as many {input sensor: target sensor} as there are sensors; in the first, each is its own target. Together they
        hold every direction once.
    """
    sensors = sorted(sensors)
    return [
        {sensor: sensors[(place + turn) % len(sensors)] for place, sensor in enumerate(sensors)}
        for turn in range(len(sensors))
    ]


def draw_targets(sensors: Sequence[str], cross_sensor_ratio: float, generator: np.random.Generator) -> dict[str, str]:
    """The "or" of equation 1: with probability `cross_sensor_ratio` every sensor of a source predicts another one.

    One draw decides for all directions together, so every decoder of the source is used either way. For a pair the two
    are exchanged; for more sensors they are turned by a random number of places.

    Returns:
        {input sensor: target sensor}; each sensor itself where there is no partner (equation 2) or no crossing.
    """
    itself, *crossings = rotations(sensors)
    if generator.random() < cross_sensor_ratio and crossings:
        return crossings[int(generator.integers(len(crossings)))]
    return itself


def normalise(
    images: dict[str, dict], source: ShardSource, processor: MsGFMImageProcessor, device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Stored pixels of one source -> normalised pixels (B, C, H, W) float32 and valid masks (B, H, W) on `device`."""
    pixel_values, valid_mask = {}, {}
    for sensor, image in images.items():
        radiometry = processor.radiometry(
            image["pixels"].to(device, non_blocking=True),
            image["valid"].to(device, non_blocking=True),
            sensor,
            bands=source.bands[sensor],
            unit=source.units[sensor],
            scale=image["scale"].to(device, torch.float32),
            offset=image["offset_dn"].to(device, torch.float32),
            level=source.levels[sensor],
        )
        pixel_values[sensor], valid_mask[sensor] = radiometry.values, radiometry.valid_mask
    return pixel_values, valid_mask


def sample_masks(
    positions: Sequence[int],
    source_name: str,
    sensor: str,
    config: MsGFMConfig,
    mask_ratio: float,
    seed: int,
    size: int,
) -> torch.Tensor:
    """One mask per sample, seeded by (seed, source, position, sensor): bool (B, L) for square images of `size`."""
    seeds = [seed, zlib.crc32(source_name.encode()), zlib.crc32(sensor.encode())]
    masks = [
        draw_mask(
            size,
            size,
            config.patch_size,
            config.mask_patch_size,
            mask_ratio,
            np.random.default_rng([*seeds, position]),
        )
        for position in positions
    ]
    return torch.from_numpy(np.stack(masks))


def count_loss_pixels(inputs: dict, patch_size: int) -> torch.Tensor:
    """The pixels that count in the loss of each slice of a batch, by source in order and sensor by name.

    Args:
        inputs: of `PreTrainingBatches`.
        patch_size: of the model.

    Returns:
        (slices,), float64 on the CPU: sums over processes stay exact.
    """
    counts = []
    for pixels, masks, valids, targets in zip(
        *(inputs[name] for name in ("pixel_values", "bool_loss_pos", "valid_mask", "targets")), strict=True
    ):
        for sensor, values in sorted(pixels.items()):
            counted = loss_pixels(masks[sensor], valids[targets[sensor]], *values.shape[2:], patch_size)
            counts.append(counted.sum())
    return torch.stack(counts).cpu().double()


class PreTrainingBatches:
    """Turns collated samples into one step of the objective.

    Args:
        sources: the mixture, in the order of the sampler's batch sizes.
        processor: its radiometry is the only arithmetic on pixels.
        config: of the model.
        seed: of the run.
        mask_ratio: share of masked cells, 0..1.
        cross_sensor_ratio: probability of a crossing per step and source, 0..1.
        cross_loss_region: `masked` (the paper): a crossing's loss counts the input's masked pixels; `all`: every valid
            pixel, better where the model is to translate whole images.
        weights: loss weight of each source.
    """

    def __init__(
        self,
        sources: Sequence[ShardSource],
        processor: MsGFMImageProcessor,
        config: MsGFMConfig,
        seed: int,
        mask_ratio: float,
        cross_sensor_ratio: float,
        cross_loss_region: str,
        weights: Sequence[float],
    ):
        if cross_loss_region not in LOSS_REGIONS:
            raise ValueError(
                f"`cross_loss_region` must be one of {', '.join(LOSS_REGIONS)}, got {cross_loss_region!r}. "
                "The paper has 'masked'."
            )
        if not 0 <= cross_sensor_ratio <= 1:
            raise ValueError(
                f"`cross_sensor_ratio` must be within 0..1, got {cross_sensor_ratio}. The paper's best is 0.5."
            )
        self.sources, self.processor, self.config = list(sources), processor, config
        self.seed, self.mask_ratio, self.cross_sensor_ratio = seed, mask_ratio, cross_sensor_ratio
        self.cross_loss_region, self.weights = cross_loss_region, list(weights)

    def targets(self, step: int, source_name: str, sensors: Sequence[str]) -> dict[str, str]:
        """The crossing of a source at a step: the same on all ranks."""
        generator = np.random.default_rng([self.seed, zlib.crc32(source_name.encode()), step])
        return draw_targets(sensors, self.cross_sensor_ratio, generator)

    def __call__(self, batch: dict, step: int, device: torch.device) -> dict:
        """The keyword arguments of `MsGFMForPreTraining.forward` for one collated batch."""
        inputs: dict[str, list] = {
            name: []
            for name in (
                "pixel_values",
                "valid_mask",
                "bool_masked_pos",
                "bool_loss_pos",
                "bands",
                "targets",
                "weights",
            )
        }
        for part in batch["sources"]:
            source = self.sources[part["index"]]
            pixel_values, valid_mask = normalise(part["images"], source, self.processor, device)
            size = next(iter(pixel_values.values())).shape[-1]
            masks = {
                sensor: sample_masks(
                    part["positions"], source.name, sensor, self.config, self.mask_ratio, self.seed, size
                ).to(device)
                for sensor in pixel_values
            }
            targets = self.targets(step, source.name, list(pixel_values))
            everywhere = self.cross_loss_region == "all"
            inputs["pixel_values"].append(pixel_values)
            inputs["valid_mask"].append(valid_mask)
            inputs["bool_masked_pos"].append(masks)
            inputs["bool_loss_pos"].append(
                {
                    sensor: torch.ones_like(mask) if everywhere and targets[sensor] != sensor else mask
                    for sensor, mask in masks.items()
                }
            )
            inputs["bands"].append({sensor: source.bands[sensor] for sensor in pixel_values})
            inputs["targets"].append(targets)
            inputs["weights"].append(self.weights[part["index"]])
        return inputs
