"""Images that lie beside a published checkpoint, to try it with: synthetic, small, and georeferenced."""

from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import tifffile
from PIL import Image

from msgfm_hf.data.shards import ShardImage
from msgfm_hf.data.synthetic import make_scene
from msgfm_hf.model.configuration_msgfm import MsGFMConfig
from msgfm_hf.model.sensors import SENSORS, SensorSpec

SIZE = 128
_GSD = 10.0
_SEED = 7
_RENDERED = ("rgb", "s2", "s1", "dsm")


def write_examples(config: MsGFMConfig, folder: Path) -> dict[str, Path]:
    """A GeoTIFF per sensor of a checkpoint, all of one synthetic place, and for RGB a picture too.

    Sensors of the catalogue that `msgfm_hf.data.synthetic` can render are rendered; others are smooth noise around the
    means of their bands. They show that everything runs, and nothing else.

    Args:
        config: of the checkpoint.
        folder: where to.

    Returns:
        {sensor: GeoTIFF}, and {"picture": PNG} where one of its sensors is RGB.
    """
    known = {sensor: SensorSpec.from_dict(spec) for sensor, spec in config.sensors.items()}
    rendered = [s for s in _RENDERED if s in known and known[s].band_names == SENSORS[s].band_names]
    scene = make_scene(_SEED, SIZE, _GSD, rendered or ["dsm"])
    files = {}
    for sensor, spec in known.items():
        image = scene.images[sensor] if sensor in rendered else _smooth_noise(spec, scene.labels)
        names = config.inputs.get(sensor, spec.band_names)
        index = [image.bands.index(name) for name in names]
        files[sensor] = folder / f"{sensor}.tif"
        _write_geotiff(files[sensor], image, names, image.pixels[index])
        if spec.band_names == SENSORS["rgb"].band_names and image.pixels.dtype == np.uint8:
            files["picture"] = folder / "picture.png"
            Image.fromarray(np.moveaxis(image.pixels, 0, -1)).save(files["picture"])
    return files


def _smooth_noise(spec: SensorSpec, like: ShardImage) -> ShardImage:
    """An image of any sensor, in the numbers that its files have by default."""
    rng = np.random.default_rng(_SEED)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in spec.statistics())
    coarse = rng.normal(size=(len(spec.bands), 8, 8)).astype(np.float32)
    physical = mean + 0.5 * std * np.kron(coarse, np.ones((SIZE // 8, SIZE // 8), np.float32))
    low = np.array([-np.inf if band.clip is None else band.clip[0] for band in spec.bands])[:, None, None]
    high = np.array([np.inf if band.clip is None else band.clip[1] for band in spec.bands])[:, None, None]
    pixels, scale, offset = np.clip(physical, low, high).astype(np.float32), 1.0, 0.0
    if spec.default_unit == "dn":
        scale, offset = spec.scale, spec.scale * (spec.offset or 0.0)
        numbers = np.rint((pixels - offset) / scale).clip(0)
        pixels = numbers.astype(np.uint8 if scale >= 1 / 256 else np.uint16)
    return ShardImage(
        pixels=pixels,
        bands=spec.band_names,
        units=spec.default_unit,
        scale=scale,
        offset=offset,
        crs=like.crs,
        transform=like.transform,
        gsd=like.gsd,
    )


def _write_geotiff(path: Path, image: ShardImage, names: list[str], pixels: np.ndarray):
    """With names, scale and offset of the bands as GDAL writes them; GeoTIFF 1.1 keys of a projected system."""
    left, gsd, _, top, _, _ = image.transform
    epsg = int(image.crs.removeprefix("EPSG:"))
    items = []
    for band, name in enumerate(names):
        items.append(f'<Item name="DESCRIPTION" sample="{band}" role="description">{escape(name)}</Item>')
        if image.units == "dn":
            items.append(f'<Item name="SCALE" sample="{band}" role="scale">{image.scale!r}</Item>')
            items.append(f'<Item name="OFFSET" sample="{band}" role="offset">{image.offset!r}</Item>')
    keys = (1, 1, 1, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, epsg)
    tifffile.imwrite(
        path,
        pixels,
        photometric="minisblack",
        planarconfig="separate" if len(pixels) > 1 else None,
        compression="zlib",
        metadata=None,
        extratags=[
            (33550, "d", 3, (gsd, gsd, 0.0), False),
            (33922, "d", 6, (0.0, 0.0, 0.0, left, top, 0.0), False),
            (34735, "H", len(keys), keys, False),
            (42112, "s", 0, f"<GDALMetadata>{''.join(items)}</GDALMetadata>", False),
        ],
    )
