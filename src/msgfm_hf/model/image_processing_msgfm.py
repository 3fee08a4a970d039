# Copyright 2026 The msgfm_hf contributors. Licensed under the Apache License, Version 2.0.
"""Radiometry of msGFM: the only place where stored pixels become what the model reads, and back.

`preprocess` = decode (arrays, tensors, PIL images, GeoTIFF files) -> `check` (plausible?) -> `radiometry` (arithmetic).
Loaders that know their data call `radiometry` directly, on any device.
"""

import json
import math
import numbers
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import is_pil_image

from .sensors import CONVERTIBLE_UNITS, SENSORS, BandSpec, SensorSpec, get_sensor

try:
    import tifffile
except ImportError:
    tifffile = None

_DEFAULT_SENSORS = ("rgb", "s2", "s1", "dsm")
_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "float16", "float32", "float64")
# Names of the bands of a PIL image, by mode; a mode of one unnamed band is taken as the band that was asked for.
_PIL_BANDS = {
    "RGB": ["red", "green", "blue"],
    "RGBA": ["red", "green", "blue", "alpha"],
    "L": None,
    "I": None,
    "I;16": None,
    "F": None,
}
_GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
_GDAL_METADATA_TAG, _GDAL_NODATA_TAG = 42112, 42113
# Where somebody hands over a picture, as the stock pipelines do, which open files as pictures too.
_OWN_PIPELINES = (
    "Arrays, GeoTIFFs and {sensor: image} go through pipeline('multisensor-image-classification'), '-segmentation', "
    "'-feature-extraction' or 'multisensor-image-to-image'."
)
_MASK_PAGE = 4  # bit of NewSubfileType

# What the median of an image's valid pixels may be, per unit of a sensor's statistics; and why it would not be.
_PLAUSIBLE = {
    "reflectance": (
        -0.05,
        2.0,
        "Digital numbers are `unit='dn'` with `scale=` and `offset=`; fill values are named with `nodata=`",
    ),
    "db": (-math.inf, 0.0, "Linear backscatter is `unit='power'` or `unit='amplitude'`, with `scale=` if calibrated"),
    "metres": (-500.0, 9000.0, "Name fill values with `nodata=`, and bring other units to metres with `scale=`"),
}


class Radiometry(NamedTuple):
    """What `MsGFMImageProcessor.radiometry` returns.

    Attributes:
        values (`torch.Tensor` of shape `(B, C, H, W)`, float32): normalised pixels, 0 where invalid.
        valid_mask (`torch.Tensor` of shape `(B, H, W)`, bool): True where every band is valid.
        reference (`torch.Tensor` of shape `(B,)`, float32, or `None`):
            the height in metres that was subtracted; `None` for a sensor without a reference.
    """

    values: Tensor
    valid_mask: Tensor
    reference: Tensor | None


class MsGFMImageProcessorKwargs(TypedDict, total=False):
    """Settings of `MsGFMImageProcessor`: stored in `preprocessor_config.json`, overridden by arguments of a call.

    Each of `bands` to `reference` is a value, for one sensor, or `{sensor: value}`; see
    `MsGFMImageProcessor.preprocess`.
    """

    sensors: dict[str, dict]
    inputs: dict[str, list[str]]
    sensor: str | None
    bands: list[str] | dict[str, list[str]] | None
    unit: str | dict[str, str] | None
    scale: float | dict[str, float] | None
    offset: float | dict[str, float] | None
    level: str | dict[str, str] | None
    nodata: float | dict[str, float] | None
    reference: str | float | dict[str, str | float] | None
    input_data_format: str | None
    return_tensors: str | None


class MsGFMBatchFeature(BatchFeature):
    """A `BatchFeature` whose `to` also moves and casts the tensors inside `{sensor: tensor}`, and casts no heights."""

    def to(self, *args, **kwargs) -> "MsGFMBatchFeature":
        reference = self.data.get("reference")
        super().to(*args, **kwargs)
        for key, value in self.data.items():
            if isinstance(value, dict):
                self.data[key] = type(value)(BatchFeature(value).to(*args, **kwargs).data)
        # Half precision would round a height of 1000 m to whole metres; only the device follows.
        if isinstance(reference, dict):
            moved = self.data["reference"]
            self.data["reference"] = {name: height.to(moved[name].device) for name, height in reference.items()}
        elif reference is not None:
            self.data["reference"] = reference.to(self.data["reference"].device)
        return self


class Explanation(list):
    """One dictionary per band, printed as a table; see `MsGFMImageProcessor.explain`."""

    def __str__(self):
        def text(value):
            if isinstance(value, tuple):
                return " ".join(text(entry) for entry in value)
            return f"{value:.5g}" if isinstance(value, float) else "-" if value is None else str(value)

        table = [list(self[0]), *([text(value) for value in row.values()] for row in self)]
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        )

    __repr__ = __str__


@dataclass
class GeoTiff:
    """A GeoTIFF as it is stored.

    Attributes:
        pixels (`np.ndarray` of shape `(C, H, W)`): in the stored dtype and native byte order.
        bands (`list[str]`, *optional*): names of the bands as the file has them, `""` where one has none.
        nodata (`float`, *optional*): the stored value that means "no data".
        scales, offsets (`list[float]`, *optional*):
            per band, physical = stored * scale + offset (GDAL's convention), where the file says so.
        mask (`np.ndarray` of shape `(H, W)`, bool, *optional*): True where valid, if the file has a mask page.
        tags (`dict[int, tuple[int, int, Any]]`):
            the georeferencing as raw TIFF tags `{code: (type, count, value)}`, ready to be written to another file.
    """

    pixels: np.ndarray
    bands: list[str] | None = None
    nodata: float | None = None
    scales: list[float] | None = None
    offsets: list[float] | None = None
    mask: np.ndarray | None = None
    tags: dict[int, tuple[int, int, Any]] = field(default_factory=dict)

    @property
    def scale(self) -> float | None:
        """The scale that all bands share.

        Raises:
            ValueError: if bands have different ones.
        """
        return self._shared("scales")

    @property
    def offset(self) -> float | None:
        """The offset that all bands share, in physical units.

        Raises:
            ValueError: if bands have different ones.
        """
        return self._shared("offsets")

    def _shared(self, name):
        values = getattr(self, name)
        if values is not None and len(set(values)) > 1:
            raise ValueError(f"`{name}` of a file must agree to be read as one, got {values}. Use `{name}`, per band.")
        return None if values is None else values[0]


def read_geotiff(path: str | os.PathLike) -> GeoTiff:
    """Read a TIFF or GeoTIFF whole, without GDAL: strips or tiles, either planar configuration, bands in one page or
    in several; overviews are left out. Needs tifffile, and imagecodecs for compressed files.

    Args:
        path (`str` or `os.PathLike`): a local file.

    Returns:
        `GeoTiff`: pixels in the stored dtype with what the file says about its bands.

    Raises:
        ImportError: if tifffile is not installed.
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no TIFF, is truncated or damaged, or holds no single image.
    """
    if tifffile is None:
        raise ImportError("`read_geotiff` needs tifffile, got no such package. `pip install tifffile imagecodecs`.")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"`path` must be an existing file, got {str(path)!r}. Check the name.")
    try:
        with tifffile.TiffFile(path) as tif:
            return _read_pages(tif, path)
    except _UnusableTiffError:
        raise
    except Exception as error:  # tifffile and every codec behind it raise types of their own
        raise _UnusableTiffError(
            f"`path` must be a readable TIFF, got {str(path)!r} ({type(error).__name__}: {error}). "
            "Open pictures of other formats with PIL; a broken TIFF must be fetched or written again."
        ) from error


class _UnusableTiffError(ValueError):
    """A TIFF that was refused with a reason, told apart from what a codec raises."""


def _read_pages(tif, path) -> GeoTiff:
    pages = [page.aspage() for page in tif.pages]
    masks = [page for page in pages if page.subfiletype == _MASK_PAGE]
    pages = [page for page in pages if not page.is_reduced and not page.subfiletype & _MASK_PAGE]
    if not pages:
        raise _UnusableTiffError(f"`path` must hold an image, got {str(path)!r} without one. Write the file again.")
    size = tif.filehandle.size
    for page in [*pages, *masks]:
        # A codec may return zeros for what is missing, so the end of the data is compared with the end of the file.
        ends = [start + count for start, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if max(ends, default=0) > size:
            raise _UnusableTiffError(
                f"`path` must be a whole TIFF, got {str(path)!r} with {size} of {max(ends)} bytes. "
                "It is truncated: fetch or write it again."
            )
    grids = {(page.imagelength, page.imagewidth, str(page.dtype)) for page in pages}
    if len(grids) > 1 or pages[0].axes not in ("YX", "YXS", "SYX"):
        raise _UnusableTiffError(
            f"`path` must hold one image with bands of one size and type, got {str(path)!r} with "
            f"{sorted(grids)}, axes {pages[0].axes}. Write one GeoTIFF per image."
        )
    bands = [
        np.moveaxis(page.asarray(), -1, 0)
        if page.axes.endswith("S")
        else page.asarray().reshape(-1, page.imagelength, page.imagewidth)
        for page in pages
    ]
    pixels = np.ascontiguousarray(np.concatenate(bands))
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    mask = masks[0].asarray().astype(bool) if masks else None

    tags = pages[0].tags
    nodata = None
    if _GDAL_NODATA_TAG in tags:
        nodata = float(str(tags[_GDAL_NODATA_TAG].value).strip(" \x00"))
    names, scales, offsets = [""] * len(pixels), [1.0] * len(pixels), [0.0] * len(pixels)
    scaled = False
    metadata = tags[_GDAL_METADATA_TAG].value if _GDAL_METADATA_TAG in tags else "<GDALMetadata/>"
    for item in ElementTree.fromstring(str(metadata).strip(" \x00")).iter("Item"):
        if item.get("sample") is None:
            continue
        band, role, name = int(item.get("sample")), item.get("role"), item.get("name", "").lower()
        if role == "description":
            names[band] = item.text or ""
        elif name in ("eo:common_name", "common_name"):
            names[band] = names[band] or item.text or ""
        elif role in ("scale", "offset"):
            (scales if role == "scale" else offsets)[band] = float(item.text)
            scaled = True
    return GeoTiff(
        pixels=pixels,
        bands=names if any(names) else None,
        nodata=nodata,
        scales=scales if scaled else None,
        offsets=offsets if scaled else None,
        mask=mask,
        tags={code: (int(tags[code].dtype), tags[code].count, tags[code].value) for code in _GEO_TAGS if code in tags},
    )


class _Picture(NamedTuple):
    """One decoded image: pixels (C, H, W), and per band what its file says."""

    pixels: Tensor
    names: list[str] | None = None
    nodata: float | None = None
    scales: list[float] | None = None
    offsets: list[float] | None = None
    mask: Tensor | None = None


class _Stored(NamedTuple):
    """A decoded batch of one sensor: the arguments of `radiometry` in its order, and where each band came from."""

    pixels: Tensor  # (B, C, H, W)
    valid_mask: Tensor  # (B, H, W)
    sensor: str
    bands: list[str]
    unit: str
    scale: Tensor  # (B, C)
    offset: Tensor  # (B, C)
    level: str | None
    reference: float | Tensor | None
    sources: list[str]


class MsGFMImageProcessor(BaseImageProcessor):
    r"""
    Turns images of any sensor the model knows into its input, by band name, unit and level, and its output into
    physical values. Images keep their size: the model takes any. No torchvision is needed.

    Args:
        sensors (`dict[str, dict]`, *optional*, defaults to the catalogue's rgb, s2, s1 and dsm):
            `{id: SensorSpec(...).to_dict()}`, as in the model's configuration.
        inputs (`dict[str, list[str]]`, *optional*, defaults to `{"rgb": ["red", "green", "blue"]}`):
            Which bands are meant where a call names none; a bare image is the single sensor in it.
        sensor, bands, unit, scale, offset, level, nodata, reference, input_data_format, return_tensors (*optional*):
            What a call uses for the arguments it leaves out; see `preprocess`.

    Raises:
        ValueError: for an unknown setting, sensor or band.

    Example:

    ```python
    inputs = processor({"s2": "s2.tif", "s1": s1}, bands={"s1": ["VV", "VH"]}, unit={"s1": "db"}, offset={"s2": -1000})
    outputs = model(**inputs)
    ```
    """

    valid_kwargs = MsGFMImageProcessorKwargs
    model_input_names = ["pixel_values", "valid_mask"]

    def __init__(self, sensors: dict[str, dict] | None = None, inputs: dict[str, list[str]] | None = None, **kwargs):
        written_by_transformers = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map")
        unknown = sorted(set(kwargs) - set(self.valid_kwargs.__annotations__) - set(written_by_transformers))
        if unknown:
            raise ValueError(
                f"`MsGFMImageProcessor` has the settings {', '.join(self.valid_kwargs.__annotations__)}, got "
                f"{', '.join(unknown)}. Correct or remove them."
            )
        # The type follows from the class, and is written anew on saving.
        super().__init__(**{name: value for name, value in kwargs.items() if name != "image_processor_type"})
        if sensors is None:
            sensors = {sensor: SENSORS[sensor] for sensor in _DEFAULT_SENSORS}
        specs = {sensor: get_sensor(sensor, sensors) for sensor in sorted(sensors)}
        for sensor, spec in specs.items():
            if spec.id != sensor:
                raise ValueError(
                    f"`sensors` must be keyed by the id of each sensor, got {sensor!r} for {spec.id!r}. "
                    "Use `{spec.id: spec.to_dict()}`."
                )
        sensors = {sensor: spec.to_dict() for sensor, spec in specs.items()}
        if inputs is None:
            # As in the configuration: RGB where there is RGB.
            default = next((sensor for sensor in (*_DEFAULT_SENSORS, *specs) if sensor in specs), None)
            inputs = {default: specs[default].band_names} if default else {}
        inputs = {
            sensor: [band.name for band in get_sensor(sensor, sensors).select(bands)]
            for sensor, bands in inputs.items()
        }
        self._set_attributes(sensors=sensors, inputs=inputs, **kwargs)

    @property
    def backend(self) -> str:
        """What computes: `torch`, with or without torchvision."""
        return "torch"

    def _standardize_kwargs(self, **kwargs):
        return kwargs  # the base class adds sizes, means and standard deviations, which live in the sensors here

    @classmethod
    def from_config(cls, config) -> "MsGFMImageProcessor":
        """The processor of a model: same sensors, same inputs.

        Args:
            config (`MsGFMConfig`): the model's configuration.
        """
        return cls(sensors=config.sensors, inputs=config.inputs)

    def check_config(self, config) -> None:
        """Refuse a configuration whose sensors or expected bands are not this processor's: with other bands or
        statistics the pair would give wrong numbers without an error. Saving beside a `config.json`, and loading from
        a local folder with one, call this.

        Args:
            config (`MsGFMConfig`): the model's configuration.

        Raises:
            ValueError: if a sensor is missing on one side, or differs; or if both expect bands of a sensor, but others.
        """
        theirs = {sensor: get_sensor(sensor, config.sensors).to_dict() for sensor in config.sensors}
        different = [
            sensor
            for sensor in sorted({*self.sensors, *theirs})
            if sensor not in theirs or sensor not in self.sensors or self.sensors[sensor] != theirs[sensor]
        ]
        if different:
            raise ValueError(
                f"`sensors` of the processor and of the model must be equal, got different {', '.join(different)}. "
                "Make the processor with `MsGFMImageProcessor.from_config(model.config)`, and save the model first."
            )
        for sensor in sorted({*self.inputs} & {*config.inputs}):
            wanted = [band.name for band in get_sensor(sensor, self.sensors).select(config.inputs[sensor])]
            if self.inputs[sensor] != wanted:
                raise ValueError(
                    f"`inputs` of the processor and of the model must name the same bands of {sensor!r}, got "
                    f"{self.inputs[sensor]} and {wanted}. Make the processor with "
                    "`MsGFMImageProcessor.from_config(model.config)`, and save the model first."
                )

    def _check_folder(self, folder):
        path = Path(folder) / "config.json"
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            if "sensors" in config:
                self.check_config(_Config(config["sensors"], config.get("inputs") or {}))

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Save to `preprocessor_config.json`; see `ImageProcessingMixin.save_pretrained`.

        Raises:
            ValueError: if the folder holds a model with other sensors.
        """
        self._check_folder(save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs):
        """Load from a folder or a repository; see `ImageProcessingMixin.from_pretrained`.

        Raises:
            ValueError: if a local folder holds a model with other sensors.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        processor._check_folder(Path(pretrained_model_name_or_path) / kwargs.get("subfolder", ""))
        return loaded

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write the settings as JSON: whole, or not at all."""
        partial = Path(f"{json_file_path}.part")
        partial.write_text(self.to_json_string(), encoding="utf-8")
        os.replace(partial, json_file_path)

    def add_sensor(self, spec: SensorSpec | dict) -> None:
        """Make a new sensor known, as `model.add_sensor` does for the model.

        Args:
            spec (`SensorSpec` or `dict`): the sensor.

        Raises:
            ValueError: if there is a sensor of that id already.
        """
        spec = spec if isinstance(spec, SensorSpec) else SensorSpec.from_dict(spec)
        if spec.id in self.sensors:
            raise ValueError(
                f"`spec` must have an id of its own, got {spec.id!r}, which exists. Choose another id: changing a "
                "sensor under trained weights would change what they mean."
            )
        self.sensors = dict(sorted({**self.sensors, spec.id: spec.to_dict()}.items()))

    def radiometry(
        self,
        pixels: Tensor,
        valid_mask: Tensor,
        sensor: str,
        bands: list[str] | None = None,
        unit: str | None = None,
        scale: float | Tensor | None = None,
        offset: float | Tensor | None = None,
        level: str | None = None,
        reference: float | Tensor | None = None,
    ) -> Radiometry:
        """Stored pixels -> the model's input. The only arithmetic; no look at the values, any device.

        physical = (stored + offset) * scale; power -> 10 log10, amplitude -> 20 log10; clipped to each band's range;
        minus `reference` for a sensor that has one; minus mean, over standard deviation.

        Args:
            pixels (`torch.Tensor` of shape `(B, C, H, W)`): stored pixels of any dtype.
            valid_mask (`torch.Tensor` of shape `(B, H, W)`, bool): False where there is no data.
            sensor (`str`): id of the sensor.
            bands (`list[str]`, *optional*): what the C bands are; by default those of `inputs`, then all of the sensor.
            unit (`str`, *optional*): unit of `(stored + offset) * scale`, or `dn`; the sensor's default otherwise.
            scale, offset (`float` or `torch.Tensor` of shape `(B,)` or `(B, C)`, *optional*):
                for `dn` the sensor's by default, otherwise 1 and 0. `offset` is in stored numbers.
            level (`str`, *optional*): processing level whose statistics are used; the sensor's first by default.
            reference (`float` or `torch.Tensor` of shape `(B,)`, *optional*):
                height in metres to subtract; by default the median of each image's valid pixels.

        Returns:
            `Radiometry`: values of about zero mean and unit spread, 0 where a pixel is invalid: masked, not finite, or
            not positive in `power` and `amplitude`, in any band.

        Raises:
            ValueError: for an unknown sensor, band, unit or level; a wrong number of bands; an offset that is not
                known; a reference for a sensor without one.
        """
        spec = get_sensor(sensor, self.sensors)
        chosen = self._select(spec, bands)
        _check_width(spec, chosen, pixels)
        if reference is not None and spec.reference is None:
            raise ValueError(
                f"`reference` of sensor {sensor!r} must be None, got {reference!r}. Only elevations have a reference."
            )
        unit = _check_unit(spec, unit)
        physical = _physical(_linear(pixels, *_factors(spec, unit, scale, offset)), unit)
        valid_mask = valid_mask & physical.isfinite().all(dim=1)
        low = [-math.inf if band.clip is None else band.clip[0] for band in chosen]
        high = [math.inf if band.clip is None else band.clip[1] for band in chosen]
        physical = torch.clamp(physical, min=_per_band(low, physical), max=_per_band(high, physical))
        if spec.reference is not None:
            if reference is None:
                reference = _medians(physical.masked_fill(~valid_mask[:, None], math.nan).flatten(1)).nan_to_num()
            reference = torch.as_tensor(reference, dtype=torch.float32, device=physical.device)
            reference = reference.expand(physical.shape[0])
            physical = physical - reference[:, None, None, None]
        mean, std = spec.statistics([band.name for band in chosen], level)
        values = (physical - _per_band(mean, physical)) / _per_band(std, physical)
        return Radiometry(torch.where(valid_mask[:, None], values, 0.0), valid_mask, reference)

    def inverse_radiometry(
        self,
        values: Tensor,
        valid_mask: Tensor,
        sensor: str,
        bands: list[str] | None = None,
        unit: str | None = None,
        scale: float | Tensor | None = None,
        offset: float | Tensor | None = None,
        level: str | None = None,
        reference: float | Tensor | None = None,
    ) -> Tensor:
        """The model's output -> stored pixels: the inverse of `radiometry` with the same arguments, but for clipping.

        Args:
            values (`torch.Tensor` of shape `(B, C, H, W)`): normalised pixels.
            valid_mask (`torch.Tensor` of shape `(B, H, W)`, bool): False where the result shall be NaN.
            sensor, bands, unit, scale, offset, level (*optional*): as in `radiometry`.
            reference (`float` or `torch.Tensor` of shape `(B,)`, *optional*):
                height in metres to add; a sensor with a reference needs it.

        Returns:
            `torch.Tensor` of shape `(B, C, H, W)`, float32: in `unit`, not rounded; NaN where invalid.

        Raises:
            ValueError: as `radiometry`, and where the reference is missing.
        """
        spec = get_sensor(sensor, self.sensors)
        chosen = self._select(spec, bands)
        _check_width(spec, chosen, values)
        if (reference is None) != (spec.reference is None):
            raise ValueError(
                f"`reference` of sensor {sensor!r} must be given if and only if the sensor has one "
                f"({spec.reference}), got {reference!r}. Pass the `reference` that the processor returned, or 0.0 "
                "for heights relative to it."
            )
        unit = _check_unit(spec, unit)
        scale, offset = _factors(spec, unit, scale, offset)
        mean, std = spec.statistics([band.name for band in chosen], level)
        physical = values.to(torch.float32)
        physical = physical * _per_band(std, physical) + _per_band(mean, physical)
        if reference is not None:
            physical = physical + _per_image(reference, physical)
        if unit == "power":
            physical = 10 ** (physical / 10)
        elif unit == "amplitude":
            physical = 10 ** (physical / 20)
        stored = physical / _per_image(scale, physical) - _per_image(offset, physical)
        valid_mask = valid_mask & stored.isfinite().all(dim=1)
        return torch.where(valid_mask[:, None], stored, math.nan)

    def check(
        self,
        pixels: Tensor,
        valid_mask: Tensor,
        sensor: str,
        bands: list[str] | None = None,
        unit: str | None = None,
        scale: float | Tensor | None = None,
        offset: float | Tensor | None = None,
    ) -> None:
        """Refuse pixels that cannot be what the arguments say, judged by the median of each image's valid pixels.

        Backscatter above 0 dB or negative in linear units, reflectance outside -0.05..2, fractions where digital
        numbers are announced, and elevations outside -500..9000 m. An image without a valid pixel passes.

        Args:
            pixels, valid_mask, sensor, bands, unit, scale, offset: as in `radiometry`.

        Raises:
            ValueError: with the sensor, the band, its median and what to correct.
        """
        spec = get_sensor(sensor, self.sensors)
        chosen = self._select(spec, bands)
        _check_width(spec, chosen, pixels)
        unit = _check_unit(spec, unit)
        scale, offset = _factors(spec, unit, scale, offset)

        def refuse(medians, wrong, rule, remedy):
            if wrong.any():
                image, band = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"`pixels` for sensor {sensor!r} must have {rule} in unit {unit!r}, got "
                    f"{medians[image, band].item():.4g} in band {chosen[band].name}. {remedy}. "
                    "In Python, `check=False` accepts the values as they are."
                )

        invalid = ~valid_mask[:, None]
        if unit == "dn" and spec.unit == "reflectance" and pixels.is_floating_point():
            stored = _medians(pixels.to(torch.float32).masked_fill(invalid, math.nan).flatten(2))
            # Where one step of a digital number is below 1 % of reflectance, a median between 0 and 1 is no number.
            fine = (_per_image(scale, pixels) < 0.01).expand(*stored.shape, 1, 1)[..., 0, 0]
            refuse(
                stored,
                (stored > 0) & (stored < 1) & fine,
                "digital numbers with a median of 0, or of 1 or more,",
                "Reflectance from 0 to 1 is `unit='reflectance'`",
            )
        linear = _linear(pixels, scale, offset)
        if unit in ("power", "amplitude"):
            medians = _medians(linear.masked_fill(invalid, math.nan).flatten(2))
            refuse(medians, medians < 0, "a median of 0 or more", "Decibels are `unit='db'`")
        medians = _medians(_physical(linear, unit).masked_fill(invalid, math.nan).flatten(2))
        low, high, remedy = _PLAUSIBLE[spec.unit]
        rule = f"a median of {low:g} to {high:g}" if math.isfinite(low) else f"a median of at most {high:g}"
        refuse(medians, (medians < low) | (medians > high), f"{rule} ({spec.unit})", remedy)

    def preprocess(
        self,
        images,
        sensor: str | None = None,
        bands: list[str] | dict[str, list[str]] | None = None,
        unit: str | dict[str, str] | None = None,
        scale: float | dict[str, float] | None = None,
        offset: float | dict[str, float] | None = None,
        level: str | dict[str, str] | None = None,
        nodata: float | dict[str, float] | None = None,
        reference: str | float | dict[str, str | float] | None = None,
        check: bool = True,
        input_data_format: str | None = None,
        return_tensors: str | None = None,
    ) -> MsGFMBatchFeature:
        """Decode images, check that they are plausible, and normalise them.

        Args:
            images: an image, a list of images of one size (a batch), or `{sensor: image or list}`. An image is a numpy
                array or torch tensor, `(C, H, W)` or `(H, W, C)`, `(H, W)` for a sensor of one band, with a batch axis
                in front for a batch; a PIL image; or the path of a GeoTIFF. dtypes: 8- to 64-bit integers (not
                uint64) and floats. A pixel with NaN, infinity or `nodata` in any band is invalid.
            sensor (`str`, *optional*): what a bare image is; by default the single sensor of `inputs`.
            bands (`list[str]`, *optional*):
                For an array, the names of its bands in their order. For a file or a PIL image, which of its bands to
                take; without `bands` it must have exactly the expected ones, in any order. Any alias will do.
                Expected are those of `inputs`, then all of the sensor: named in another order (a BGR array), they come
                out in the expected one. Any other choice keeps its order and must be named to the model as well:
                `model(**inputs, bands={sensor: [...]})`.
            unit (`str`, *optional*):
                `dn`, `reflectance`, `power`, `amplitude`, `db` or `metres`; by default the sensor's.
            scale, offset (`float`, *optional*):
                physical = (stored + offset) * scale; by default the file's, then for `dn` the sensor's. Sentinel-2 in
                `dn` needs an offset: 0, or -1000 since processing baseline 04.00.
            level (`str`, *optional*): processing level (`l1c`, `l2a`); by default the sensor's first.
            nodata (`float`, *optional*): stored value that means "no data"; by default the file's.
            reference (`str` or `float`, *optional*):
                for elevations, `window` (the default: the median of each image's valid pixels) or metres.
            check (`bool`, *optional*, defaults to `True`): whether `check` may refuse the values.
            input_data_format (`str`, *optional*):
                `channels_first` or `channels_last`, for arrays whose shape leaves it open.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `pt` or `np`.

            Each of `bands` to `reference` is a value if there is one sensor, and `{sensor: value}` otherwise.

        Returns:
            `MsGFMBatchFeature`: what the model takes. For a bare image tensors, for a dictionary `{sensor: tensor}`:

            - `pixel_values` -- float32 `(B, C, H, W)`, normalised, 0 where invalid.
            - `valid_mask` -- bool `(B, H, W)`, True where valid.
            - `reference` -- float32 `(B,)`, metres; only where a sensor has a reference.

        Raises:
            ValueError: for input that is not as described; the message says what to change.
        """
        return_tensors = self.return_tensors if return_tensors is None else return_tensors
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"`return_tensors` must be 'pt' or 'np', got {return_tensors!r}. Choose one.")
        batches = self._decode(
            images,
            sensor,
            input_data_format,
            bands=bands,
            unit=unit,
            scale=scale,
            offset=offset,
            level=level,
            nodata=nodata,
            reference=reference,
        )
        outputs = {"pixel_values": {}, "valid_mask": {}}
        for name, batch in batches.items():
            if check:
                self.check(*batch[:7])
            result = self.radiometry(*batch[:9])
            outputs["pixel_values"][name] = result.values
            outputs["valid_mask"][name] = result.valid_mask
            if result.reference is not None:
                outputs.setdefault("reference", {})[name] = result.reference
        if return_tensors == "np":
            outputs = {
                key: {name: tensor.cpu().numpy() for name, tensor in value.items()} for key, value in outputs.items()
            }
        if not isinstance(images, dict):
            outputs = {key: next(iter(value.values())) for key, value in outputs.items()}
        return MsGFMBatchFeature(outputs)

    def explain(
        self,
        images,
        sensor: str | None = None,
        bands: list[str] | dict[str, list[str]] | None = None,
        unit: str | dict[str, str] | None = None,
        scale: float | dict[str, float] | None = None,
        offset: float | dict[str, float] | None = None,
        level: str | dict[str, str] | None = None,
        nodata: float | dict[str, float] | None = None,
        reference: str | float | dict[str, str | float] | None = None,
        input_data_format: str | None = None,
    ) -> Explanation:
        """What `preprocess` does with these images, band by band, over the valid pixels of the whole batch. Values are
        not checked, so that input which is refused can be looked at.

        Args:
            images, sensor, bands, unit, scale, offset, level, nodata, reference, input_data_format:
                as in `preprocess`.

        Returns:
            `Explanation`: a list of dictionaries that prints as a table: `sensor`, `band`, `source` (the band's name
            in the file, or its position), `unit`, `scale` and `offset` (of the first image), `clip`, `reference` (of
            the first image), `mean`, `std`, `before` and `after` (minimum, median, maximum: stored, and as the model
            reads it), `clipped` and `invalid` (shares from 0 to 1 of the valid and of all pixels).

        Raises:
            ValueError: as `preprocess`, but for implausible values.
        """
        batches = self._decode(
            images,
            sensor,
            input_data_format,
            bands=bands,
            unit=unit,
            scale=scale,
            offset=offset,
            level=level,
            nodata=nodata,
            reference=reference,
        )
        rows = Explanation()
        for name, batch in batches.items():
            spec = get_sensor(name, self.sensors)
            result = self.radiometry(*batch[:9])
            physical = _physical(_linear(batch.pixels, batch.scale, batch.offset), batch.unit)
            for index, band in enumerate(spec.select(batch.bands)):
                mean, std = spec.statistics([band.name], batch.level)
                seen = physical[:, index][result.valid_mask]
                low, high = band.clip or (-math.inf, math.inf)
                clipped = ((seen < low) | (seen > high)).float().mean().item() if len(seen) else 0.0
                rows.append(
                    {
                        "sensor": name if batch.level is None else f"{name} {batch.level}",
                        "band": band.name,
                        "source": batch.sources[index],
                        "unit": batch.unit,
                        "scale": batch.scale[0, index].item(),
                        "offset": batch.offset[0, index].item(),
                        "clip": band.clip,
                        "reference": None if result.reference is None else result.reference[0].item(),
                        "mean": mean[0],
                        "std": std[0],
                        "before": _spread(batch.pixels[:, index].to(torch.float32)[result.valid_mask]),
                        "after": _spread(result.values[:, index][result.valid_mask]),
                        "clipped": clipped,
                        "invalid": 1.0 - result.valid_mask.float().mean().item(),
                    }
                )
        return rows

    def post_process_image_to_image(
        self,
        outputs,
        unit: str | dict[str, str] | None = None,
        sensor: str | None = None,
        bands: list[str] | dict[str, list[str]] | None = None,
        scale: float | dict[str, float] | None = None,
        offset: float | dict[str, float] | None = None,
        level: str | dict[str, str] | None = None,
        valid_mask: Tensor | dict[str, Tensor] | None = None,
        reference: float | Tensor | dict[str, Tensor] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Physical values of a reconstruction or of any other image that the model made.

        Args:
            outputs: an output with `reconstruction`, or the reconstruction itself: a tensor of shape `(B, C, H, W)`,
                or `{sensor: tensor}`.
            unit (`str`, *optional*):
                for every sensor, or `{sensor: unit}`; by default that of the statistics (reflectance, dB, metres).
            sensor (`str`, *optional*): what a tensor shows; by default the single sensor of `inputs`.
            bands, scale, offset, level (*optional*): as in `preprocess`.
            valid_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): as the processor returned it.
            reference (`float` or `torch.Tensor` of shape `(B,)`, *optional*):
                as the processor returned it, or a height in metres; a sensor with a reference needs it.

        Returns:
            `torch.Tensor` of shape `(B, C, H, W)`, float32, or `{sensor: tensor}`: in `unit`; NaN where invalid.

        Raises:
            ValueError: as `inverse_radiometry`.
        """
        reconstruction = getattr(outputs, "reconstruction", outputs)
        single = self._name_sensor(reconstruction, sensor)
        predictions = reconstruction if single is None else {single: reconstruction}
        if isinstance(unit, str):
            unit = dict.fromkeys(predictions, unit)
        options = self._options(
            list(predictions), bands=bands, unit=unit or {}, scale=scale, offset=offset, level=level
        )
        results = {}
        for name, values in predictions.items():
            spec = get_sensor(name, self.sensors)
            given = {option: value[name] for option, value in options.items()}
            given["unit"] = given["unit"] or spec.unit
            mask = valid_mask.get(name) if isinstance(valid_mask, dict) else valid_mask
            if mask is None:
                mask = torch.ones_like(values[:, 0], dtype=torch.bool)
            if spec.reference is not None:
                given["reference"] = reference.get(name) if isinstance(reference, dict) else reference
            results[name] = self.inverse_radiometry(values, mask, name, **given)
        return results if single is None else results[single]

    def post_process_semantic_segmentation(
        self, outputs, target_sizes: list[tuple[int, int]] | None = None
    ) -> list[Tensor]:
        """Class maps from the logits of `MsGFMForSemanticSegmentation`.

        Args:
            outputs: an output with `logits` of shape `(B, classes, H, W)`.
            target_sizes (`list[tuple[int, int]]`, *optional*):
                height and width for each image, to which the logits are resized; their own size by default.

        Returns:
            `list[torch.Tensor]`: one int64 map of shape `(H, W)` per image.

        Raises:
            ValueError: if there is not one size per image.
        """
        logits = outputs.logits
        if target_sizes is None:
            return list(logits.argmax(dim=1))
        if len(target_sizes) != len(logits):
            raise ValueError(
                f"`target_sizes` must have one size per image ({len(logits)}), got {len(target_sizes)}. "
                "Give a list of (height, width)."
            )
        return [
            F.interpolate(image[None].float(), size=tuple(size), mode="bilinear", align_corners=False)[0].argmax(dim=0)
            for image, size in zip(logits, target_sizes, strict=True)
        ]

    def output_bands(
        self, images, sensor: str | None = None, bands: list[str] | dict[str, list[str]] | None = None
    ) -> dict[str, list[str]]:
        """The bands that `preprocess` puts out for the same arguments, in their order: what the model's `bands` takes.

        Args:
            images, sensor, bands: as in `preprocess`; of `images` only the names of the sensors are read.

        Returns:
            `dict[str, list[str]]`: `{sensor: names of its bands}`.

        Raises:
            ValueError: for an unknown sensor or band, or one that is not among the images.
        """
        name = self._name_sensor(images, sensor)
        names = list(images) if name is None else [name]
        chosen = self._options(names, bands=bands)["bands"]
        return {name: self._order(get_sensor(name, self.sensors), chosen[name]) for name in names}

    def _select(self, spec, bands) -> list[BandSpec]:
        return spec.select(self.inputs.get(spec.id) if bands is None else bands)

    def _order(self, spec, bands) -> list[str]:
        """The expected bands, named in another order (a BGR array), come out in the expected one."""
        chosen, expected = ([band.name for band in self._select(spec, names)] for names in (bands, None))
        return expected if set(expected) == set(chosen) else chosen

    def _name_sensor(self, images, sensor) -> str | None:
        """The sensor of a bare image; `None` for a dictionary, which names its own."""
        if isinstance(images, dict):
            if sensor is not None:
                raise ValueError(
                    f"`sensor` must not be given with {{sensor: image}}, got {sensor!r}. The keys name the sensors."
                )
            if not images:
                raise ValueError("`images` must name at least one sensor, got {}. Leave no input empty.")
            return None
        sensor = self.sensor if sensor is None else sensor
        if sensor is None:
            if len(self.inputs) != 1:
                raise ValueError(
                    f"`sensor` must be given for a bare image, as `inputs` has {', '.join(self.inputs) or 'none'}, got "
                    f"None. Pass `sensor=`, or {{sensor: image}}. {_OWN_PIPELINES}"
                )
            sensor = next(iter(self.inputs))
        return sensor

    def _options(self, names, **options) -> dict[str, dict[str, Any]]:
        """Every option as {sensor: value}, with this processor's own settings where the call has none."""
        resolved = {}
        for option, value in options.items():
            given = value is not None
            value = value if given else getattr(self, option)
            if not isinstance(value, dict):
                if value is not None and len(names) > 1:
                    raise ValueError(
                        f"`{option}` must be {{sensor: value}} for several sensors ({', '.join(names)}), got "
                        f"{value!r}. Say which sensor it is for."
                    )
                value = dict.fromkeys(names, value)
            stray = sorted(set(value) - set(names))
            if given and stray:
                raise ValueError(
                    f"`{option}` must be for the sensors given ({', '.join(names)}), got {', '.join(stray)}. "
                    "Correct or remove the key."
                )
            resolved[option] = {name: value.get(name) for name in names}
        return resolved

    def _decode(self, images, sensor, input_data_format, **options) -> dict[str, _Stored]:
        """Images of any kind, and the options of `preprocess` that are per sensor -> {sensor: stored batch}."""
        layout = self.input_data_format if input_data_format is None else input_data_format
        if layout not in (None, "channels_first", "channels_last"):
            raise ValueError(
                f"`input_data_format` must be 'channels_first' or 'channels_last', got {layout!r}. Choose one."
            )
        name = self._name_sensor(images, sensor)
        images = images if name is None else {name: images}
        options = self._options(list(images), **options)
        batches = {
            name: self._decode_sensor(batch, name, layout, **{option: value[name] for option, value in options.items()})
            for name, batch in images.items()
        }
        for part, axes, remedy in (
            ("number of images", slice(0, 1), "Give as many images of each"),
            (
                "pixel grid",
                slice(2, 4),
                "Warp them onto one grid first (`gdalwarp -t_srs -te -ts`, or `rasterio.warp.reproject`)",
            ),
        ):
            sizes = {name: tuple(batch.pixels.shape[axes]) for name, batch in batches.items()}
            if len(set(sizes.values())) > 1:
                raise ValueError(f"`images` of several sensors must share one {part}, got {sizes}. {remedy}.")
        return batches

    def _decode_sensor(self, images, sensor, layout, bands, unit, scale, offset, level, nodata, reference) -> _Stored:
        spec = get_sensor(sensor, self.sensors)
        unit = _check_unit(spec, unit)
        level = spec.check_level(level)
        if isinstance(reference, str):
            if reference != "window":
                raise ValueError(
                    f"`reference` of sensor {sensor!r} must be 'window' or a height in metres, got {reference!r}. "
                    "Give the ground's height, or leave it out."
                )
            reference = None if spec.reference == reference else reference
        for option, value in (("scale", scale), ("offset", offset), ("nodata", nodata)):
            if value is not None and not isinstance(value, numbers.Real):
                raise ValueError(
                    f"`{option}` of sensor {sensor!r} must be a number, got {value!r}. Leave it out for the file's."
                )
        if scale is not None and not (math.isfinite(scale) and scale != 0):
            raise ValueError(
                f"`scale` of sensor {sensor!r} must be finite and not 0, got {scale!r}. "
                "physical = (stored + offset) * scale."
            )
        chosen = [band.name for band in self._select(spec, bands)]
        output = self._order(spec, bands)
        order = [chosen.index(band) for band in output]
        if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
            images = list(images)
        images = images if isinstance(images, (list, tuple)) else [images]
        if not images:
            raise ValueError(f"`images` for sensor {sensor!r} must hold at least one image, got none. Leave it out.")
        pixels, masks, scales, offsets = [], [], [], []
        for image in images:
            picture = _open(image, spec, chosen, layout)
            index, sources = _find_bands(picture.names, len(picture.pixels), spec, chosen, by_name=bands is not None)
            index, sources = [index[place] for place in order], [sources[place] for place in order]
            taken = picture.pixels[index]
            if taken.numel() == 0:
                raise ValueError(
                    f"`images` for sensor {sensor!r} must have at least one pixel, got shape {tuple(taken.shape)}. "
                    "Leave empty images out."
                )
            pixels.append(taken)
            masks.append(_valid(taken, picture.nodata if nodata is None else nodata, picture.mask))
            file_scale = file_offset = None
            if picture.scales is not None:
                file_scale = torch.tensor([picture.scales[band] for band in index])
                # GDAL: stored * scale + offset; here: (stored + offset) * scale.
                file_offset = torch.tensor([picture.offsets[band] / picture.scales[band] for band in index])
            factors = _factors(
                spec, unit, file_scale if scale is None else scale, file_offset if offset is None else offset
            )
            scales.append(torch.as_tensor(factors[0], dtype=torch.float32).expand(len(index)))
            offsets.append(torch.as_tensor(factors[1], dtype=torch.float32).expand(len(index)))
        for what, found in (
            ("size", {tuple(image.shape[1:]) for image in pixels}),
            ("dtype", {str(image.dtype) for image in pixels}),
        ):
            if len(found) > 1:
                raise ValueError(
                    f"`images` for sensor {sensor!r} must have one {what} to form a batch, got {sorted(found)}. "
                    "Crop or convert them, or call the processor once per image."
                )
        device = pixels[0].device
        return _Stored(
            pixels=torch.stack(pixels),
            valid_mask=torch.stack(masks),
            sensor=sensor,
            bands=output,
            unit=unit,
            scale=torch.stack(scales).to(device),
            offset=torch.stack(offsets).to(device),
            level=level,
            reference=reference,
            sources=sources,
        )


class _BySensor(dict):
    """`{sensor: tensor}` that can tell its size, which `Trainer` multiplies into its count of operations."""

    def numel(self) -> int:
        return sum(tensor.numel() for tensor in self.values())


def data_collator(samples: list[Mapping]) -> MsGFMBatchFeature:
    """Samples -> a batch for any head, of one sensor or of several. It serves `torch.utils.data.DataLoader`
    (`collate_fn=`) and Transformers' `Trainer` (`data_collator=`, with `remove_unused_columns=False`).

    ```python
    samples = [{**processor({"s1": s1, "s2": s2}), "labels": 3} for s1, s2 in places]
    loss = model(**data_collator(samples)).loss
    ```

    Args:
        samples (`list[Mapping]`):
            Each is what the image processor returns for one image: tensors, or `{sensor: tensor}`, whose first axis is
            1 (`pixel_values` (1, C, H, W), `valid_mask` (1, H, W), `reference` (1,)), and possibly `labels`, without
            such an axis: a class id, a number, or a tensor (labels,) or (H, W).

    Returns:
        `MsGFMBatchFeature`: the same keys; `pixel_values` (B, C, H, W) or `{sensor: (B, C, H, W)}`, and so on; `labels`
        (B,), (B, labels) or (B, H, W).

    Raises:
        ValueError: if samples differ in their keys, sensors or sizes, or hold something else, such as text.
    """
    if not samples or not all(isinstance(sample, Mapping) for sample in samples):
        raise ValueError(
            "`samples` must be dictionaries, at least one, got "
            f"{', '.join(sorted({type(sample).__name__ for sample in samples})) or 'none'}. Pass what the image "
            "processor returns, with `labels`."
        )
    batch = {}
    for key in _same_keys(samples, "samples", "entries"):
        values = [sample[key] for sample in samples]
        if key == "labels":
            values = [_label(value) for value in values]
            batch[key] = torch.stack(_same_shape(values, key))
        elif all(isinstance(value, Mapping) for value in values):
            sensors = _same_keys(values, key, "sensors")
            batch[key] = _BySensor(
                {sensor: _join([value[sensor] for value in values], f"{key}[{sensor}]") for sensor in sensors}
            )
        else:
            batch[key] = _join(values, key)
    return MsGFMBatchFeature(batch)


def _same_keys(mappings: list[Mapping], argument: str, what: str) -> list[str]:
    for mapping in mappings:
        if set(mapping) != set(mappings[0]):
            raise ValueError(
                f"`{argument}` must have the same {what} in every sample of a batch, got {', '.join(mappings[0])} and "
                f"{', '.join(mapping)}. Batch samples of the same {what}."
            )
    return list(mappings[0])


def _same_shape(values: list[Tensor], key: str) -> list[Tensor]:
    shapes = sorted({tuple(value.shape) for value in values})
    if len(shapes) > 1:
        raise ValueError(
            f"`{key}` must have one shape in all samples of a batch, got {', '.join(map(str, shapes))}. Crop the "
            "images to one size, or batch those of one size."
        )
    return values


def _join(values: list, key: str) -> Tensor:
    for value in values:
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"`{key}` must be a tensor whose first axis is 1, as the image processor returns it for one image, got "
                f"{got}. Leave out what the model does not read, and name the target `labels`."
            )
    return torch.cat(_same_shape(values, key))


def _label(label) -> Tensor:
    if not isinstance(label, (numbers.Real, np.ndarray, Tensor)):
        raise ValueError(
            f"`labels` must be numbers, arrays or tensors, got {type(label).__name__} {label!r:.40}. Names become ids "
            "with `model.config.label2id`, lists tensors with `torch.tensor`."
        )
    # Torch shares memory with arrays, but not with flipped or read-only ones, as of pictures.
    return torch.from_numpy(np.array(label)) if isinstance(label, np.ndarray) else torch.as_tensor(label)


class _Config(NamedTuple):
    """What `check_config` reads of a configuration, as found in a `config.json`."""

    sensors: dict[str, dict]
    inputs: dict[str, list[str]]


def _check_unit(spec: SensorSpec, unit: str | None) -> str:
    known = CONVERTIBLE_UNITS[spec.unit]
    if unit is not None and unit not in known:
        raise ValueError(
            f"`unit` of sensor {spec.id!r} must be one of {', '.join(known)}, got {unit!r}. "
            f"Only these can be converted to {spec.unit!r}."
        )
    return spec.default_unit if unit is None else unit


def _factors(spec: SensorSpec, unit: str, scale, offset):
    """Scale and offset of physical = (stored + offset) * scale, from the arguments, then the sensor for `dn`."""
    if unit != "dn":
        return 1.0 if scale is None else scale, 0.0 if offset is None else offset
    offset = spec.offset if offset is None else offset
    if offset is None:
        raise ValueError(
            f"`offset` of sensor {spec.id!r} must be known for unit 'dn', got None. It differs between products: for "
            "Sentinel-2 pass offset=0, or offset=-1000 since processing baseline 04.00 (25 January 2022; see "
            "RADIO_ADD_OFFSET or BOA_ADD_OFFSET in the product, or `earthsearch:boa_offset_applied` in STAC)."
        )
    scale = spec.scale if scale is None else scale
    if scale is None:
        raise ValueError(
            f"`scale` of sensor {spec.id!r} must be known for unit 'dn', got None. Pass `scale=`, with "
            "physical = (dn + offset) * scale."
        )
    return scale, offset


def _check_width(spec: SensorSpec, chosen: list[BandSpec], pixels: Tensor) -> None:
    if pixels.ndim != 4 or pixels.shape[1] != len(chosen):
        raise ValueError(_bands_message("pixel_values", spec, [band.name for band in chosen], tuple(pixels.shape)))


def _bands_message(argument, spec, names, shape):
    return (
        f"`{argument}` for sensor {spec.id!r} must have {len(names)} bands ({', '.join(names)}), got shape {shape}. "
        "Select bands by name with `bands=`."
    )


def _per_image(factor, like: Tensor) -> Tensor:
    """A float, (B,) or (B, C) as a float32 tensor that broadcasts with (B, C, H, W)."""
    factor = torch.as_tensor(factor, dtype=torch.float32, device=like.device)
    return factor if factor.ndim == 0 else factor.reshape(factor.shape[0], -1, 1, 1)


def _per_band(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None, None]


def _linear(pixels: Tensor, scale, offset) -> Tensor:
    pixels = pixels.to(torch.float32)
    return (pixels + _per_image(offset, pixels)) * _per_image(scale, pixels)


def _physical(linear: Tensor, unit: str) -> Tensor:
    """To the unit of the statistics: decibels, or what it is already. What is not positive has no logarithm."""
    if unit == "power":
        return 10 * torch.log10(linear)
    if unit == "amplitude":
        return 20 * torch.log10(linear)
    return linear


def _medians(values: Tensor) -> Tensor:
    """Medians over the last axis without NaN; the mean of the middle two, as numpy has it. NaN where all are NaN."""
    ordered = values.sort(dim=-1).values  # NaN comes last
    count = (~values.isnan()).sum(dim=-1, keepdim=True)
    middle = torch.cat([(count - 1).clamp(min=0) // 2, (count // 2).clamp(max=values.shape[-1] - 1)], dim=-1)
    return ordered.gather(-1, middle).mean(dim=-1)


def _spread(values: Tensor) -> tuple[float, float, float] | None:
    if len(values) == 0:
        return None
    return values.min().item(), _medians(values).item(), values.max().item()


def _valid(pixels: Tensor, nodata: float | None, mask: Tensor | None) -> Tensor:
    """(C, H, W) -> (H, W): True where every band is finite and none is `nodata`, compared in the stored dtype."""
    valid = torch.ones(pixels.shape[1:], dtype=torch.bool, device=pixels.device) if mask is None else mask
    if pixels.is_floating_point():
        valid = valid & pixels.isfinite().all(dim=0)
    if nodata is None or math.isnan(nodata):
        return valid
    if not pixels.is_floating_point():
        info = torch.iinfo(pixels.dtype)
        if not (float(nodata).is_integer() and info.min <= nodata <= info.max):
            return valid  # this dtype cannot hold it, so no pixel has it
    stored = torch.tensor(float(nodata), dtype=torch.float64).to(pixels.device, pixels.dtype)
    return valid & (pixels != stored).all(dim=0)


def takes_pictures(spec: SensorSpec, bands: list[str]) -> bool:
    """Whether an ordinary picture, 8 bits of red, green and blue, is an image of these bands of a sensor."""
    colours = {"red", "green", "blue"}
    return (
        spec.default_unit == "dn"
        and math.isclose(spec.scale or 0, 1 / 255)
        and not spec.offset
        and set(bands) <= colours
    )


def _open(image, spec: SensorSpec, chosen: list[str], layout: str | None) -> _Picture:
    """One image of any kind -> pixels (C, H, W) and what is known about them."""
    if isinstance(image, (str, os.PathLike)):
        file = read_geotiff(image)
        mask = None if file.mask is None else torch.from_numpy(file.mask)
        return _Picture(_tensor(file.pixels, spec), file.bands, file.nodata, file.scales, file.offsets, mask)
    if is_pil_image(image):
        image = image.convert("RGB") if image.mode == "P" else image
        if image.mode not in _PIL_BANDS:
            raise ValueError(
                f"`images` for sensor {spec.id!r} must be PIL images of mode {', '.join(_PIL_BANDS)}, got "
                f"{image.mode!r}. Convert it, for example with `image.convert('RGB')`."
            )
        colours = _PIL_BANDS[image.mode]
        if colours and not takes_pictures(spec, chosen):
            raise ValueError(
                f"`images` for sensor {spec.id!r} must hold its bands ({', '.join(chosen)}) in its own numbers, got a "
                f"picture of {', '.join(colours)}. {_OWN_PIPELINES}"
            )
        array = np.asarray(image)
        pixels = _tensor(array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0), spec)
        return _Picture(pixels, _PIL_BANDS[image.mode])
    if not isinstance(image, (np.ndarray, Tensor)):
        raise ValueError(
            f"`images` for sensor {spec.id!r} must be arrays, tensors, PIL images or paths of GeoTIFFs, a list of "
            f"these or {{sensor: these}}, got {type(image).__name__}. Convert it, for example with `np.asarray`."
        )
    shape, count = tuple(image.shape), len(chosen)
    if len(shape) == 2 and count == 1:
        image = image[None]
    elif len(shape) == 3:
        first = shape[0] == count and layout != "channels_last"
        last = shape[-1] == count and layout != "channels_first"
        if first and last and shape != (1, 1, 1):
            raise ValueError(
                f"`images` for sensor {spec.id!r} must show where the {count} bands are, got shape {shape}, which fits "
                "both. Pass input_data_format='channels_first' or 'channels_last'."
            )
        if not first and not last:
            raise ValueError(_bands_message("images", spec, chosen, shape))
        if not first:
            image = np.moveaxis(image, -1, 0) if isinstance(image, np.ndarray) else image.movedim(-1, 0)
    else:
        raise ValueError(_bands_message("images", spec, chosen, shape))
    return _Picture(_tensor(image, spec))


def _tensor(pixels: np.ndarray | Tensor, spec: SensorSpec) -> Tensor:
    dtype = str(pixels.dtype).removeprefix("torch.") if isinstance(pixels, Tensor) else pixels.dtype.name
    if dtype not in (*_DTYPES, "bfloat16"):
        raise ValueError(
            f"`images` for sensor {spec.id!r} must be integers up to 64 bits or floats, got {dtype}. Convert them; "
            "of complex radar data take the amplitude."
        )
    if isinstance(pixels, Tensor):
        return pixels
    # A copy: torch takes neither negative strides, nor a foreign byte order, nor read-only memory.
    return torch.from_numpy(np.array(pixels, dtype=pixels.dtype.newbyteorder("="), order="C"))


def _find_bands(names, count, spec, chosen, by_name) -> tuple[list[int], list[str]]:
    """Positions of the chosen bands in an image, and what they are called there."""
    positions = {}
    for position, name in enumerate(names or ()):
        try:
            positions.setdefault(spec.resolve(name), []).append(position)
        except ValueError:  # a band that this sensor does not know, such as a scene classification
            continue
    if not positions:
        if count != len(chosen):
            described = f"{count} bands ({', '.join(names)})" if names else f"{count} unnamed bands"
            raise ValueError(
                f"`images` for sensor {spec.id!r} must have {len(chosen)} bands ({', '.join(chosen)}), got a file with "
                f"{described}. Describe the bands in the file, or read it and pass an array with `bands=`."
            )
        return list(range(count)), list(names) if names else [f"[{position}]" for position in range(count)]
    if not by_name and (set(positions) != set(chosen) or count != len(chosen)):
        raise ValueError(
            f"`images` for sensor {spec.id!r} must have the bands {', '.join(chosen)}, got a file with "
            f"{', '.join(name or '(unnamed)' for name in names)}. Select bands by name with `bands=`."
        )
    for band in chosen:
        if len(positions.get(band, ())) != 1:
            raise ValueError(
                f"`bands` of sensor {spec.id!r} must occur once in the file, got {band!r} "
                f"{len(positions.get(band, ()))} times in {', '.join(name or '(unnamed)' for name in names)}. "
                "Choose bands that the file has, or describe them in the file."
            )
    index = [positions[band][0] for band in chosen]
    return index, [names[position] for position in index]


__all__ = [
    "GeoTiff",
    "MsGFMImageProcessor",
    "MsGFMImageProcessorKwargs",
    "Radiometry",
    "data_collator",
    "read_geotiff",
]
