"""Georeferenced images: the pixels of a GeoTIFF, with its place on the map, as a `ShardImage`."""

import functools
import math
from pathlib import Path

import numpy as np

from msgfm_hf.data.shards import ShardImage
from msgfm_hf.model.image_processing_msgfm import GeoTiff, read_geotiff
from msgfm_hf.model.sensors import get_sensor

# Mean length of a degree of latitude, for images in geographic coordinates.
_METRES_PER_DEGREE = 111_195.0


def read_image(
    path,
    sensor: str,
    bands: list[str] | None = None,
    names: list[str] | None = None,
    unit: str | None = None,
    scale: float | None = None,
    offset_dn: float | None = None,
    nodata: float | None = None,
    datetime: str | None = None,
) -> ShardImage:
    """Read a GeoTIFF as an image of a sensor, pixels as stored.

    Args:
        path (`str` or `Path`): the file.
        sensor (`str`): id of the sensor.
        bands (`list[str]`, *optional*): the bands to keep, in this order; names or aliases of the sensor. By default
            all bands of the file, and then each must be one of the sensor's.
        names (`list[str]`, *optional*): names of the file's bands in file order, where the file has none, or others.
        unit (`str`, *optional*): unit of the stored values; the sensor's default unit if not given.
        scale, offset_dn (`float`, *optional*): physical = (stored + offset_dn) * scale. By default those of the file,
            else those of the sensor where the unit is `dn`, else 1 and 0.
        nodata (`float`, *optional*): by default that of the file.
        datetime (`str`, *optional*): ISO 8601.

    Returns:
        `ShardImage`: with the place on the map where the file has one.

    Raises:
        ValueError: if the bands have no names, or not those asked for, or if scale or offset are not known, or if the
            file's mask cannot be kept.
        ImportError: without rasterio.
    """
    spec = get_sensor(sensor)
    file = read_geotiff(path)
    stored = names or file.bands
    if not stored or len(stored) != len(file.pixels):
        raise ValueError(
            f"`names` must name the {len(file.pixels)} bands of {path}, got {stored}. "
            f"Give them in file order; sensor {sensor!r} knows {', '.join(spec.band_names)}."
        )
    if bands is None:
        resolved = [band.name for band in spec.select(stored)]
        picked = list(range(len(stored)))
    else:
        positions = {}
        for position, name in enumerate(stored):
            if _knows(spec, name):
                positions.setdefault(spec.resolve(name), position)
        resolved = [band.name for band in spec.select(bands)]
        missing = [band for band in resolved if band not in positions]
        if missing:
            raise ValueError(
                f"`bands` must be in {path}, which has {', '.join(map(str, stored))}, got {', '.join(missing)}. "
                "Leave them out, or give the names of the file's bands with `names=`."
            )
        picked = [positions[band] for band in resolved]
    unit = unit or spec.default_unit
    known = (spec.scale, spec.offset) if unit == "dn" else (1.0, 0.0)
    if scale is None:
        scale = known[0] if file.scale is None else file.scale
    if offset_dn is None and scale is not None:
        offset_dn = known[1] if file.offset is None else file.offset / scale
    if scale is None or offset_dn is None:
        raise ValueError(
            f"`scale` and `offset_dn` of sensor {sensor!r} must be known for unit 'dn', got {scale} and {offset_dn} "
            f"for {path}. For Sentinel-2 the offset is 0, or -1000 since processing baseline 04.00: see the metadata."
        )
    nodata = file.nodata if nodata is None else nodata
    crs, transform, gsd = _georeference(path)
    return ShardImage(
        pixels=_masked(file, nodata, path)[picked],
        bands=resolved,
        units=unit,
        scale=scale,
        offset=offset_dn * scale,
        gsd=gsd,
        crs=crs,
        transform=transform,
        nodata=nodata,
        datetime=datetime,
    )


def wgs84_bounds(image: ShardImage) -> list[float] | None:
    """West, south, east, north of an image in degrees, or `None` where it has no place on the map."""
    if image.crs is None or image.transform is None:
        return None
    warp = _rasterio("rasterio.warp")
    height, width = image.pixels.shape[1:]
    x, dx, row_rotation, y, column_rotation, dy = image.transform
    xs = [x + dx * c + row_rotation * r for c in (0, width) for r in (0, height)]
    ys = [y + column_rotation * c + dy * r for c in (0, width) for r in (0, height)]
    return list(warp.transform_bounds(image.crs, "EPSG:4326", min(xs), min(ys), max(xs), max(ys)))


def _georeference(path) -> tuple[str | None, list[float] | None, float | None]:
    rasterio = _rasterio("rasterio")
    with rasterio.open(Path(path)) as file:
        crs, transform = file.crs, file.transform
    if crs is None or transform.is_identity:
        return None, None, None
    metres = _METRES_PER_DEGREE if crs.is_geographic else crs.linear_units_factor[1]
    return _crs_name(crs.wkt), list(transform.to_gdal()), math.sqrt(abs(transform.determinant)) * metres


@functools.lru_cache(maxsize=64)
def _crs_name(wkt: str) -> str:
    # The search for the authority's code takes longer than reading the pixels.
    return _rasterio("rasterio.crs").CRS.from_wkt(wkt).to_string()


def _masked(file: GeoTiff, nodata: float | None, path) -> np.ndarray:
    """The pixels, with the mask of the file, if it has one, written into them: a shard has no mask of its own."""
    if file.mask is None or file.mask.all():
        return file.pixels
    if nodata is None and file.pixels.dtype.kind != "f":
        raise ValueError(
            f"`nodata` must be given to keep the mask of {path}, got None. "
            f"Choose a value of {file.pixels.dtype.name} that no valid pixel has."
        )
    return np.where(file.mask, file.pixels, file.pixels.dtype.type(np.nan if nodata is None else nodata))


def _knows(spec, name) -> bool:
    try:
        spec.resolve(name)
    except ValueError:
        return False
    return True


def _rasterio(module: str):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'`rasterio` is needed to place an image on the map, got "{error}". Run pip install "msgfm_hf[geo]".'
        ) from error
