"""What a reconstruction does to radar backscatter: statistics before and after, and the speckle suppression index.

Figure 5 of the paper compares mean, standard deviation and this index of both radar bands, and reads an index close to
one as "the mean and standard deviation remain consistent". It is not a score to be raised or lowered: below one the
reconstruction is smoother than the original, which a predictor of masked pixels must be (speckle cannot be predicted);
above one it is rougher. An index of one says nothing of whether the pixels are right: the error does.
"""

import numpy as np
import torch

from msgfm_hf.data.inspect import align
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.sensors import SensorSpec, get_sensor

PERCENTILES = (5, 25, 50, 75, 95)


def is_backscatter(spec: SensorSpec) -> bool:
    """Whether a sensor measures radar backscatter: its statistics are in decibels."""
    return spec.unit == "db"


def speckle_suppression_index(original: np.ndarray, filtered: np.ndarray) -> float:
    """SSI = (std_filtered / mean_filtered) * (mean_original / std_original) of one band, in linear power.

    Source: Sheng and Xia, "A comprehensive evaluation of filters for radar speckle suppression", IGARSS 1996. In
    decibels the mean lies around or below zero and the ratio means nothing, so decibels are refused.

    Args:
        original, filtered: (n,), linear power (not dB) of the same valid pixels, before and after.

    Returns:
        1 where the coefficient of variation is kept, below 1 where it fell; NaN for fewer than two pixels, an original
        without variation, or a filtered band that is all 0.

    Raises:
        ValueError: if the two differ in shape, or hold values that no linear power has.
    """
    original, filtered = np.asarray(original, dtype=np.float64), np.asarray(filtered, dtype=np.float64)
    if original.shape != filtered.shape:
        raise ValueError(
            f"`filtered` must hold the pixels of `original`, got shapes {filtered.shape} and {original.shape}. Select "
            "both with one mask."
        )
    for name, values in (("original", original), ("filtered", filtered)):
        if not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(
                f"`{name}` must be linear power, finite and not negative, got {values.min():.4g} to {values.max():.4g}."
                " Leave invalid pixels out; decibels become power by 10 ** (dB / 10)."
            )
    if original.size < 2 or not original.std() > 0 or not filtered.mean() > 0:
        return float("nan")
    return float(filtered.std() / filtered.mean() * original.mean() / original.std())


def backscatter_statistics(power: np.ndarray, decibels: np.ndarray) -> dict:
    """Statistics of one band over the pixels given.

    Args:
        power, decibels: (n,), at least one, the same pixels in linear power and in dB.

    Returns:
        `mean`, `std` (population), `coefficient_of_variation` (std / mean) and `equivalent_looks` ((mean / std)^2, null
        without variation) of the linear power; `mean_db`, `std_db` and `percentiles_db` {"5": ..., "95": ...} of the
        decibels. The looks of a mixed scene are below those of the sensor, since the scene varies as well.
    """
    mean, std = float(np.mean(power, dtype=np.float64)), float(np.std(power, dtype=np.float64))
    return {
        "mean": mean,
        "std": std,
        "coefficient_of_variation": std / mean,
        "equivalent_looks": (mean / std) ** 2 if std > 0 else None,
        "mean_db": float(np.mean(decibels, dtype=np.float64)),
        "std_db": float(np.std(decibels, dtype=np.float64)),
        "percentiles_db": {
            str(share): float(value)
            for share, value in zip(PERCENTILES, np.percentile(decibels, PERCENTILES), strict=True)
        },
    }


def compare_backscatter(
    processor: MsGFMImageProcessor,
    sensor: str,
    bands: list[str],
    level: str | None,
    before: torch.Tensor,
    after: torch.Tensor,
    counted: torch.Tensor,
) -> dict[str, dict]:
    """Backscatter before and after a reconstruction, band by band.

    Both are decoded by the image processor and clipped to the sensor's range (Sentinel-1: at most 0 dB): `before` is
    what the model was asked for, which is clipped, and `after` must not differ by that alone. A few bright targets,
    real or invented, do not rule the index.

    Args:
        processor: its inverse radiometry gives decibels and power.
        sensor, bands, level: of the image.
        before, after: (C, H, W), normalised pixels of the image and of its reconstruction.
        counted: bool (H, W), the pixels to look at.

    Returns:
        {band: {`before`, `after`: as `backscatter_statistics`; `ssi`: `speckle_suppression_index`, null where it is not
        defined}}; {} where no pixel counts.
    """
    if not counted.any():
        return {}
    pair, counts = torch.stack([before, after]).float().cpu(), counted.cpu()
    decoded = processor.inverse_radiometry(
        pair, counts.expand(2, -1, -1), sensor, bands=bands, unit="db", level=level
    ).numpy()[:, :, counts.numpy()]
    limits = [band.clip or (-np.inf, np.inf) for band in get_sensor(sensor, processor.sensors).select(bands)]
    low, high = np.array(limits, dtype=np.float32).T[..., None]
    decibels = decoded.clip(low, high)
    power = 10 ** (decibels / 10)
    compared = {}
    for number, band in enumerate(bands):
        index = speckle_suppression_index(power[0, number], power[1, number])
        compared[band] = {
            **{
                name: backscatter_statistics(power[place, number], decibels[place, number])
                for place, name in enumerate(("before", "after"))
            },
            "ssi": None if np.isnan(index) else index,
        }
    return compared


def format_backscatter(compared: dict[tuple[str, str], dict[str, dict]]) -> str:
    """A table of {(direction, region): what `compare_backscatter` returns}, a line before and one after per band.

    Returns:
        text: mean, standard deviation, coefficient of variation and looks in linear power, then decibels.
    """
    shares = [f"p{share}" for share in PERCENTILES]
    head = ["direction", "pixels", "band", "", "mean", "std", "CV", "looks", "mean dB", "std dB", *shares, "SSI"]
    lines = [head]
    for (direction, region), by_band in compared.items():
        for band, found in by_band.items():
            for name in ("before", "after"):
                values = found[name]
                looks, index = values["equivalent_looks"], found["ssi"] if name == "after" else None
                lines.append(
                    [
                        *((direction, region, band) if name == "before" else ("", "", "")),
                        name,
                        f"{values['mean']:.4g}",
                        f"{values['std']:.4g}",
                        f"{values['coefficient_of_variation']:.3f}",
                        "-" if looks is None else f"{looks:.2f}",
                        f"{values['mean_db']:.2f}",
                        f"{values['std_db']:.2f}",
                        *(f"{value:.1f}" for value in values["percentiles_db"].values()),
                        "" if index is None else f"{index:.3f}",
                    ]
                )
    return align(lines, left=4)
