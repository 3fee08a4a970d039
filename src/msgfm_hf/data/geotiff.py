"""Georeferenced images: the pixels of a GeoTIFF, with its place on the map, as a `ShardImage`."""

import dataclasses
import functools
import importlib
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from msgfm_hf.data.shards import ShardImage
from msgfm_hf.model.image_processing_msgfm import read_geotiff
from msgfm_hf.model.sensors import get_sensor

# Mean radius of the Earth in metres (IUGG), for images in geographic coordinates.
EARTH_RADIUS = 6_371_008.8
# Projections whose scale is that of their standard parallel alone, and how the side of a square as large as a pixel
# shrinks away from it: by this power of the cosine of the latitude. Degrees and plate carree shrink in one direction
# only, Mercator in both.
_SHRINKING = {"longlat": 0.5, "eqc": 0.5, "merc": 1.0, "webmerc": 1.0}
_COLOURS = ("red", "green", "blue")
# Corners of one grid may differ by this part of a pixel: what is lost where a transform is written as text.
GRID_TOLERANCE = 0.01


@dataclass(frozen=True)
class Header:
    """What a georeferenced file says about itself; reading it costs no pixel.

    Attributes:
        path (`str`): the file.
        shape (`tuple[int, int]`): height and width in pixels.
        dtype (`str`): numpy name of the stored dtype.
        bands (`list[str]`): names of the bands without the alpha band, `""` where one has none: the description, else
            the common name in the metadata, else red, green or blue where the file is coloured so.
        coloured (`bool`): whether the names are those of colours only. GDAL gives them to any file of three or four
            bytes per pixel, whatever its bands are.
        alpha (`int`, *optional*): position of the alpha band among all bands of the file. A band that is marked as
            alpha but has another name is none: near infrared is often stored so.
        masked (`bool`): whether an alpha band or a mask says which pixels are valid.
        nodata (`float`, *optional*): stored value that marks an invalid pixel, if the dtype can hold it.
        scales, offsets (`list[float]`, *optional*): per band of the file, alpha too, where the file says: physical =
            stored * scale + offset.
        crs (`rasterio.crs.CRS`, *optional*): coordinate system; `None` where the file has no place on the map. The
            local system of a building site is no place on the map.
        transform (`affine.Affine`, *optional*): from pixels to coordinates; `None` with `crs`.
    """

    path: str
    shape: tuple[int, int]
    dtype: str
    bands: list[str]
    alpha: int | None
    masked: bool
    nodata: float | None
    scales: list[float] | None
    offsets: list[float] | None
    crs: Any
    transform: Any
    coloured: bool = False

    @property
    def positions(self) -> list[int]:
        """Where `bands` are among all bands of the file."""
        return [position for position in range(len(self.bands) + (self.alpha is not None)) if position != self.alpha]

    def named(self, names: list[str] | tuple[str, ...]) -> "Header":
        """The same with names of the caller: of `bands`, or of all bands of the file, and then none is alpha.

        Raises:
            ValueError: for another number of names.
        """
        if len(names) == len(self.bands):
            return dataclasses.replace(self, bands=list(names), coloured=False)
        if self.alpha is not None and len(names) == len(self.bands) + 1:
            return dataclasses.replace(self, bands=list(names), alpha=None, masked=False, coloured=False)
        raise ValueError(
            f"`names` must name the {len(self.bands)} bands of {self.path}, got {', '.join(names)}. "
            "Give them in file order."
        )

    @property
    def gsd(self) -> float | None:
        """Ground sampling distance in metres: the side of a square as large as the pixel in the middle, on a sphere
        where coordinates are degrees or Mercator's."""
        if self.crs is None:
            return None
        side = math.sqrt(abs(self.transform.determinant))
        side *= EARTH_RADIUS * self.crs.units_factor[1] if self.crs.is_geographic else self.crs.linear_units_factor[1]
        if has_true_metres(self.crs):
            return side
        height, width = self.shape
        x, y = self.transform @ (width / 2, height / 2)
        _, (latitude,) = geo_module("rasterio.warp").transform(self.crs, "EPSG:4326", [x], [y])
        proj = self.crs.to_dict()
        shrunk = math.cos(math.radians(latitude)) / math.cos(math.radians(proj.get("lat_ts", 0)))
        return side * shrunk ** _SHRINKING.get(proj.get("proj"), 0.5)

    @property
    def bounds(self) -> tuple[float, float, float, float] | None:
        """Left, bottom, right, top in the file's own coordinates."""
        return None if self.crs is None else _bounds(self.transform.to_gdal(), self.shape)


def read_header(path) -> Header:
    """What a file says about itself, without its pixels.

    Args:
        path (`str` or `Path`): the file.

    Raises:
        ValueError: if GDAL cannot open the file.
        ImportError: without rasterio.
    """
    enums = geo_module("rasterio.enums")
    with open_geotiff(path) as file:
        colours, flags = [colour.name for colour in file.colorinterp], file.mask_flag_enums[0]
        names = []
        for number in file.indexes:
            tags = {name.lower(): text for name, text in file.tags(number).items()}
            names.append(file.descriptions[number - 1] or tags.get("eo:common_name") or tags.get("common_name") or "")
        alphas = [n for n, colour in enumerate(colours) if colour == "alpha" and names[n].lower() in ("", "alpha")]
        alpha = alphas[0] if alphas else None
        kept = [number for number in range(file.count) if number != alpha]
        names = [names[number] for number in kept]
        coloured = not any(names)
        if coloured:
            names = [colours[number] if colours[number] in _COLOURS else "" for number in kept]
        scaled = any(file.scales[n] != 1 or file.offsets[n] != 0 for n in kept)
        placed = file.crs is not None and (file.crs.is_geographic or file.crs.is_projected)
        placed = placed and not file.transform.is_identity
        return Header(
            path=str(path),
            shape=(file.height, file.width),
            dtype=file.dtypes[0],
            bands=names,
            alpha=alpha,
            # Beside a nodata value GDAL does not tell of alpha.
            masked=alpha is not None or (enums.MaskFlags.per_dataset in flags and enums.MaskFlags.alpha not in flags),
            nodata=held_nodata(file.nodata, file.dtypes[0]),
            scales=list(file.scales) if scaled else None,
            offsets=list(file.offsets) if scaled else None,
            crs=file.crs if placed else None,
            transform=file.transform if placed else None,
            coloured=coloured and any(names),
        )


def open_geotiff(path):
    """The file as a `rasterio` dataset. That it has no place on the map is told by its header, not by a warning.

    Raises:
        ValueError: if GDAL cannot open the file.
        ImportError: without rasterio.
    """
    rasterio, errors = geo_module("rasterio"), geo_module("rasterio.errors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.NotGeoreferencedWarning)
        try:
            return rasterio.open(path)
        except errors.RasterioIOError as error:
            raise ValueError(
                f"`path` must be a readable GeoTIFF, got {str(path)!r} ({error}). Fetch or write the file again."
            ) from error


def same_grid(one: Header, other: Header) -> bool:
    """Whether the pixels of two files lie on one another: shape, coordinate system without heights and corners within a
    hundredth of a pixel. Of a file without a place on the map only the shape can be compared."""
    if one.shape != other.shape:
        return False
    if one.crs is None or other.crs is None:
        return True
    apart = corner_distance(one.transform.to_gdal(), one.shape, other.transform.to_gdal(), other.shape)
    return apart <= GRID_TOLERANCE and (one.crs == other.crs or _horizontal(one.crs) == _horizontal(other.crs))


def check_grid(header: Header, grid: Header, argument: str = "input"):
    """Refuse a file whose pixels do not lie on those of another.

    Args:
        header, grid (`Header`): of the file, and of the one that gives the grid.
        argument (`str`): the argument that is at fault.

    Raises:
        ValueError: naming both.
    """
    if not same_grid(grid, header):
        raise ValueError(
            f"`{argument}` must be images on one pixel grid, got {_grid_text(header)}, and {_grid_text(grid)}. "
            "`msgfm shards scenes` warps large images to one grid; gdalwarp -t_srs -te -ts does it for chips."
        )


def corner_distance(transform, shape, other_transform, other_shape) -> float:
    """How far the corners of two images lie apart.

    Args:
        transform, other_transform (`Sequence[float]`): from pixels to coordinates, in GDAL's order, of one system.
        shape, other_shape (`tuple[int, int]`): height and width in pixels.

    Returns:
        The largest distance of a corner from its counterpart, along one axis, in pixels of the first image.
    """
    _, dx, row_rotation, _, column_rotation, dy = transform
    pixel = min(math.hypot(dx, column_rotation), math.hypot(row_rotation, dy))
    corners, others = _corners(transform, shape), _corners(other_transform, other_shape)
    return float(np.abs(np.subtract(corners, others)).max()) / pixel


def has_true_metres(crs) -> bool:
    """Whether a unit of a `rasterio.crs.CRS` is about the same length on the ground everywhere: of degrees, Mercator
    and plate carree it is not. Feet are, as their length in metres is known."""
    return not crs.is_geographic and crs.to_dict().get("proj") not in _SHRINKING


def held_nodata(nodata: float | None, dtype) -> float | None:
    """A nodata value if the dtype can hold it, else `None`: no pixel has another.

    Args:
        nodata (`float`, *optional*): as a file or a caller names it.
        dtype: numpy dtype of the pixels, or its name.
    """
    dtype = np.dtype(dtype)
    if nodata is None or dtype.kind not in "iu":
        return nodata
    limits = np.iinfo(dtype)
    return nodata if float(nodata).is_integer() and limits.min <= nodata <= limits.max else None


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
    # Damage is found first, by the reader that every other input goes through.
    file = read_geotiff(path)
    header = read_header(path)
    if names:
        header = header.named(names)
    resolved, picked = resolve_bands(header, sensor, bands)
    unit, scale, offset_dn = physical_factors(header, sensor, unit, scale, offset_dn, picked)
    pixels = file.pixels[header.positions][picked]
    nodata = header.nodata if nodata is None else held_nodata(nodata, header.dtype)
    if header.masked:
        pixels, nodata = write_mask(pixels, _read_mask(header), nodata, path)
    return ShardImage(
        pixels=pixels,
        bands=resolved,
        units=unit,
        scale=scale,
        offset=offset_dn * scale,
        gsd=header.gsd,
        crs=None if header.crs is None else crs_name(header.crs),
        transform=None if header.transform is None else list(header.transform.to_gdal()),
        nodata=nodata,
        datetime=datetime,
    )


def resolve_bands(
    header: Header, sensor: str, bands: list[str] | tuple[str, ...] | None = None
) -> tuple[list[str], list[int]]:
    """Which bands of a file are meant.

    Args:
        header (`Header`): of the file.
        sensor, bands: as of `read_image`.

    Returns:
        Canonical names, and their positions among `header.bands`.

    Raises:
        ValueError: if the bands have no names, or colours only where the sensor has other bands, or not those asked
            for.
    """
    spec = get_sensor(sensor)
    stored = header.bands
    if not any(stored) or not trusts_names(header, sensor):
        count = unnamed_bands(header, sensor)
        found = ", ".join(filter(None, stored))
        raise ValueError(
            f"`names` must name the {count} bands of {header.path}, got {f'the colours {found}' if found else None}. "
            f"Give them in file order; sensor {sensor!r} knows {', '.join(spec.band_names)}."
        )
    if bands is None:
        return [band.name for band in spec.select(stored)], list(range(len(stored)))
    positions: dict[str, int] = {}
    for position, name in enumerate(stored):
        if knows_band(sensor, name):
            positions.setdefault(spec.resolve(name), position)
    resolved = [band.name for band in spec.select(list(bands))]
    missing = [band for band in resolved if band not in positions]
    if missing:
        raise ValueError(
            f"`bands` must be in {header.path}, which has {', '.join(map(str, stored))}, got {', '.join(missing)}. "
            "Leave them out, or give the names of the file's bands with `names=`."
        )
    return resolved, [positions[band] for band in resolved]


def physical_factors(
    header: Header,
    sensor: str,
    unit: str | None = None,
    scale: float | None = None,
    offset_dn: float | None = None,
    picked: list[int] | None = None,
) -> tuple[str, float, float]:
    """Unit, scale and offset of a file: those given, else those of the file, else those of the sensor.

    Args:
        header (`Header`): of the file.
        sensor, unit, scale, offset_dn: as of `read_image`.
        picked (`list[int]`, *optional*): positions among `header.bands` of the bands in use; default all.

    Returns:
        `unit`, `scale`, `offset_dn`: physical = (stored + offset_dn) * scale.

    Raises:
        ValueError: if scale or offset are not known, or differ between bands; if heights may be in feet, as the
            coordinates are.
    """
    spec = get_sensor(sensor)
    if unit is None and scale is None and spec.unit == "metres" and header.crs is not None and header.scales is None:
        length, factor = header.crs.units_factor
        if header.crs.is_projected and factor != 1:
            raise ValueError(
                f"`unit` of sensor {sensor!r} must be given where coordinates are no metres, got none for "
                f"{header.path} in {length} of {factor:.6g} m. Add unit=metres to the input if its heights are, or "
                f"scale={factor:.10g} if they are in the same unit."
            )
    unit = unit or spec.default_unit
    known = (spec.scale, spec.offset) if unit == "dn" else (1.0, 0.0)
    used = header.positions if picked is None else [header.positions[position] for position in picked]
    if scale is None:
        scale = known[0] if header.scales is None else _shared("scale", header.scales, used, header)
    if offset_dn is None and scale is not None:
        offset_dn = known[1] if header.offsets is None else _shared("offset", header.offsets, used, header) / scale
    if scale is None or offset_dn is None:
        remedy = (
            "Floats from 0 to 1 are reflectance: on the command line add unit=reflectance to the input. Digital "
            "numbers as floats need offset=0 or offset=-1000, like others."
            if header.dtype.startswith("float")
            else "For Sentinel-2 the offset is 0, or -1000 since processing baseline 04.00: see the metadata; on the "
            "command line add offset=0 or offset=-1000 to the input."
        )
        raise ValueError(
            f"`scale` and `offset_dn` of sensor {sensor!r} must be known for unit 'dn', got {scale} and {offset_dn} "
            f"for {header.path}. {remedy}"
        )
    return unit, scale, offset_dn


def write_mask(pixels: np.ndarray, valid: np.ndarray, nodata: float | None, path) -> tuple[np.ndarray, float | None]:
    """Write a validity mask into the pixels: a shard has no mask of its own.

    Args:
        pixels (`np.ndarray`): `(C, H, W)`, stored values.
        valid (`np.ndarray`): bool `(H, W)`.
        nodata (`float`, *optional*): the value to write. By default NaN; for integers, which have none, a value that no
            valid pixel has: 0, the largest, the smallest, or the first that is free.
        path: the file, for the error.

    Returns:
        Pixels with `nodata` where they are invalid, and `nodata`.

    Raises:
        ValueError: if valid pixels have all values of their dtype.
    """
    if valid.all():
        return pixels, nodata
    if nodata is None:
        nodata = math.nan if pixels.dtype.kind == "f" else free_value(pixels[:, valid])
    if nodata is None:
        raise ValueError(
            f"`nodata` must be given to keep the mask of {path}, got None, and its valid pixels have all values of "
            f"{pixels.dtype.name}. Name the value that may be lost."
        )
    return np.where(valid, pixels, pixels.dtype.type(nodata)), nodata


def free_value(values: np.ndarray) -> int | None:
    """An integer of the values' dtype that is not among them: 0, the largest, the smallest, or the first that is free;
    `None` if there is none from 0 up."""
    limits, used = np.iinfo(values.dtype), set(np.unique(values).tolist())
    candidates = (0, limits.max, limits.min, *range(1, min(len(used) + 1, limits.max)))
    return next((number for number in candidates if number not in used), None)


def wgs84_bounds(image: ShardImage) -> list[float] | None:
    """West, south, east, north of an image in degrees, or `None` where it has no place on the map."""
    if image.crs is None or image.transform is None:
        return None
    bounds = _bounds(image.transform, image.pixels.shape[1:])
    return list(geo_module("rasterio.warp").transform_bounds(image.crs, "EPSG:4326", *bounds))


def header_bounds(header: Header) -> list[float] | None:
    """West, south, east, north of a file in degrees, or `None` where it has no place on the map."""
    if header.crs is None:
        return None
    return list(geo_module("rasterio.warp").transform_bounds(header.crs, "EPSG:4326", *header.bounds))


def crs_name(crs) -> str:
    """Authority code of a `rasterio.crs.CRS`, or its WKT where it has none."""
    return _crs_name(crs.wkt)


def trusts_names(header: Header, sensor: str) -> bool:
    """Whether the names of a file can be those of the sensor's bands. Colours alone tell nothing where the sensor has
    other bands than red, green and blue: near infrared may be stored as red, or as alpha."""
    return not header.coloured or len(get_sensor(sensor).bands) <= len(_COLOURS)


def unnamed_bands(header: Header, sensor: str) -> int:
    """How many bands of a file without names wait for one: the alpha band too, where the sensor has as many."""
    count = len(header.bands) + (header.alpha is not None)
    return count if len(get_sensor(sensor).bands) == count else len(header.bands)


def knows_band(sensor: str, name: str) -> bool:
    """Whether a name is that of a band of the sensor, or an alias of one."""
    try:
        get_sensor(sensor).resolve(name)
    except ValueError:
        return False
    return True


@functools.lru_cache(maxsize=64)
def _crs_name(wkt: str) -> str:
    # The search for the authority's code takes longer than reading the pixels.
    return geo_module("rasterio.crs").CRS.from_wkt(wkt).to_string()


def _corners(transform, shape) -> list[tuple[float, float]]:
    x, dx, row_rotation, y, column_rotation, dy = transform
    height, width = shape
    ends = [(column, row) for column in (0, width) for row in (0, height)]
    return [(x + dx * c + row_rotation * r, y + column_rotation * c + dy * r) for c, r in ends]


def _bounds(transform, shape) -> tuple[float, float, float, float]:
    xs, ys = zip(*_corners(transform, shape), strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _grid_text(header: Header) -> str:
    place = "no place on the map"
    if header.crs is not None:
        crs = crs_name(header.crs)
        place = f"{crs if len(crs) < 40 else crs[:37] + '...'}, "
        place += f"origin ({header.transform.c:.10g}, {header.transform.f:.10g}), "
        place += f"pixels of {header.transform.a:.6g} x {-header.transform.e:.6g}"
    return f"{header.path} with {header.shape[0]} x {header.shape[1]} pixels, {place}"


@functools.lru_cache(maxsize=64)
def _horizontal(crs):
    """The coordinate system without its heights."""
    return type(crs).from_wkt(geo_module("pyproj").CRS.from_wkt(crs.to_wkt()).to_2d().to_wkt())


def _read_mask(header: Header) -> np.ndarray:
    with open_geotiff(header.path) as file:
        return (file.read_masks(1) if header.alpha is None else file.read(header.alpha + 1)) != 0


def _shared(name: str, of_file: list[float], used: list[int], header: Header) -> float:
    values = [of_file[position] for position in used]
    if len(set(values)) > 1:
        raise ValueError(
            f"`{name}` must be one number for all bands of {header.path}, got {values}. "
            "Write the bands in one scale, or make a source of each."
        )
    return values[0]


def geo_module(module: str):
    """A module of the extra `geo`.

    Raises:
        ImportError: naming the extra, where it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'`{module.partition(".")[0]}` is needed to place an image on the map, got "{error}". '
            'Run pip install "msgfm_hf[geo]".'
        ) from error
