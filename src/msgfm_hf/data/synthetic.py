"""Synthetic scenes: one hidden landscape, seen by four sensors.

Terrain and land cover are drawn first; surface model, RGB, Sentinel-2 and Sentinel-1 are then rendered from them, so
what one sensor shows can be learned from another. The data feeds the quickstart and is ground truth for tests. It is
far simpler than the earth: **a number measured on it is never a result.**

Fields, woods and streets have their size in pixels (blocks of 30 to 40, woods and fields of 30 to 100), so that every
GSD shows them; heights are in metres (houses 8 to 11, towers 26 to 29, trees 15 to 28). Relief grows with the
GSD, and shadows shrink with it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msgfm_hf.data.shards import ShardImage, ShardRow, ShardSource, ShardWriter, shard_splits
from msgfm_hf.model.sensors import SENSORS

CLASSES = ("water", "forest", "crops", "grass", "bare", "built", "road")


class _Material(NamedTuple):
    label: str
    vv: float  # backscatter, dB
    vh: float
    vegetation: float  # 0..1: how much the vigour of plants shows
    texture: float  # standard deviation of log brightness between pixels
    height: float  # of field plants, metres
    reflectance: tuple[float, ...]  # of the surface, B01 .. B08, B8A, B09, B10, B11, B12


# Orders of magnitude from spectral libraries and C-band SAR textbooks; rounded, and not fitted to any data set.
_MATERIALS = {
    "water": _Material(
        *("water", -21.5, -28.5, 0.0, 0.02, 0.0),
        (0.060, 0.066, 0.062, 0.030, 0.020, 0.015, 0.014, 0.012, 0.011, 0.010, 0.010, 0.006, 0.004),
    ),
    "broadleaf": _Material(
        *("forest", -8.0, -13.0, 0.7, 0.07, 0.0),
        (0.020, 0.024, 0.046, 0.027, 0.075, 0.230, 0.290, 0.310, 0.325, 0.330, 0.300, 0.160, 0.075),
    ),
    "conifer": _Material(
        *("forest", -8.8, -14.0, 0.5, 0.07, 0.0),
        (0.016, 0.019, 0.033, 0.021, 0.050, 0.150, 0.190, 0.205, 0.215, 0.215, 0.200, 0.095, 0.042),
    ),
    "green crop": _Material(
        *("crops", -10.8, -16.5, 1.0, 0.03, 2.4),
        (0.050, 0.065, 0.135, 0.105, 0.165, 0.380, 0.460, 0.490, 0.510, 0.520, 0.480, 0.230, 0.120),
    ),
    "ripe crop": _Material(
        *("crops", -13.0, -20.0, 0.3, 0.03, 1.0),
        (0.075, 0.090, 0.145, 0.165, 0.200, 0.250, 0.280, 0.310, 0.325, 0.330, 0.325, 0.360, 0.260),
    ),
    "ploughed": _Material(
        *("crops", -14.5, -22.5, 0.0, 0.03, 0.0),
        (0.075, 0.090, 0.125, 0.155, 0.175, 0.190, 0.205, 0.225, 0.240, 0.245, 0.240, 0.320, 0.270),
    ),
    "meadow": _Material(
        *("grass", -12.3, -18.5, 1.0, 0.04, 0.3),
        (0.060, 0.075, 0.140, 0.135, 0.180, 0.280, 0.325, 0.350, 0.365, 0.370, 0.350, 0.270, 0.160),
    ),
    "rock": _Material(
        *("bare", -16.0, -24.0, 0.0, 0.06, 0.0),
        (0.140, 0.170, 0.215, 0.255, 0.275, 0.315, 0.325, 0.340, 0.350, 0.355, 0.350, 0.430, 0.390),
    ),
    "tiles": _Material(
        *("built", -4.0, -11.0, 0.0, 0.04, 0.0),
        (0.090, 0.105, 0.135, 0.225, 0.240, 0.250, 0.260, 0.275, 0.285, 0.290, 0.285, 0.330, 0.290),
    ),
    "concrete": _Material(
        *("built", -2.5, -9.5, 0.0, 0.04, 0.0),
        (0.190, 0.205, 0.225, 0.240, 0.245, 0.250, 0.255, 0.260, 0.265, 0.265, 0.265, 0.280, 0.260),
    ),
    "asphalt": _Material(
        *("road", -15.5, -23.5, 0.0, 0.03, 0.0),
        (0.070, 0.078, 0.088, 0.095, 0.098, 0.102, 0.105, 0.108, 0.112, 0.112, 0.110, 0.140, 0.130),
    ),
}
_CODE = {name: code for code, name in enumerate(_MATERIALS)}
_LABELS = np.array([CLASSES.index(material.label) for material in _MATERIALS.values()], np.uint8)
_REFLECTANCE, _VV, _VH, _VEGETATION, _TEXTURE, _PLANT_HEIGHT = (
    np.array([getattr(material, entry) for material in _MATERIALS.values()], np.float32)
    for entry in ("reflectance", "vv", "vh", "vegetation", "texture", "height")
)


class _Air(NamedTuple):
    path: float  # reflectance that the air adds
    through: float  # share of the surface's reflectance that it lets pass
    vigour: float  # how log reflectance answers to vigour: chlorophyll and leaf water absorb, leaves scatter


_AIR = {
    "B01": _Air(0.105, 0.84, -0.20),
    "B02": _Air(0.080, 0.87, -0.15),
    "B03": _Air(0.045, 0.90, -0.10),
    "B04": _Air(0.028, 0.92, -0.20),
    "B05": _Air(0.024, 0.93, -0.10),
    "B06": _Air(0.020, 0.94, 0.08),
    "B07": _Air(0.016, 0.95, 0.12),
    "B08": _Air(0.012, 0.95, 0.12),
    "B8A": _Air(0.010, 0.96, 0.12),
    "B09": _Air(0.005, 0.35, 0.12),
    "B10": _Air(0.0015, 0.002, 0.00),
    "B11": _Air(0.002, 0.97, -0.12),
    "B12": _Air(0.002, 0.95, -0.20),
}

_LOOKS = 8  # equivalent number of looks of the SAR image
_NOISE_FLOOR = 10**-3.2  # of the SAR image, linear power
_CLOUD_HEIGHT = 1200.0  # metres
_CLOUD_REFLECTANCE = 0.65  # low clouds: the cirrus band does not see them through the moist air above


@dataclass(frozen=True)
class Scene:
    """One place on one pixel grid.

    Attributes:
        images (`dict[str, ShardImage]`): by sensor, pixels (C, H, W):
            `rgb` uint8 red, green, blue, 0..255; `dsm` float32 height of the surface above the sea in metres;
            `s1` float32 VV, VH in dB, about -40..10; `s2` uint16 B01 .. B12 level-1C digital numbers,
            reflectance = stored * 1e-4 - 0.1, as in products since baseline 04.00.
        labels (`ShardImage`): uint8 (1, H, W) of units `class`, positions in `CLASSES`.
        terrain (`np.ndarray`): float32 (H, W), height of the bare ground above the sea in metres.
        cloud_mask (`np.ndarray`): bool (H, W), True where a cloud or its shadow changes `s2`.
        bounds (`list[float]`): west, south, east, north in degrees (WGS84).
    """

    images: dict[str, ShardImage]
    labels: ShardImage
    terrain: np.ndarray
    cloud_mask: np.ndarray
    bounds: list[float]

    def window(self, row: int, column: int, size: int) -> "Scene":
        """The square of `size` pixels whose upper left pixel is (`row`, `column`), with its own georeferencing.

        Raises:
            ValueError: if the window is not inside the scene.
        """
        height, width = self.terrain.shape
        if not (size > 0 and 0 <= row <= height - size and 0 <= column <= width - size):
            raise ValueError(
                f"`window` must lie inside the scene of {height} x {width} pixels, got row {row}, column {column}, "
                f"size {size}. Choose a smaller or another window."
            )
        inside = (slice(row, row + size), slice(column, column + size))

        def cut(image: ShardImage) -> ShardImage:
            left, gsd, _, top, _, _ = image.transform
            transform = [left + column * gsd, gsd, 0.0, top - row * gsd, 0.0, -gsd]
            return replace(image, pixels=np.ascontiguousarray(image.pixels[:, *inside]), transform=transform)

        labels = cut(self.labels)
        return Scene(
            images={sensor: cut(image) for sensor, image in self.images.items()},
            labels=labels,
            terrain=self.terrain[inside],
            cloud_mask=self.cloud_mask[inside],
            bounds=_wgs84_bounds(labels.crs, labels.transform, size),
        )


def make_scene(
    seed: int,
    size: int = 256,
    gsd: float = 10.0,
    sensors: Sequence[str] = ("rgb", "s2", "s1", "dsm"),
    clouds: float = 0.0,
) -> Scene:
    """Draw a landscape and render it for every sensor asked for, all on one grid.

    The landscape and each sensor's noise have generators of their own: leaving sensors out changes nothing in the
    others, and the same seed with and without `clouds` is one place on a cloudy and on a clear day. The RGB image is
    taken from below the clouds.

    Args:
        seed (`int`): not negative; chooses the place, the landscape and the noise.
        size (`int`): height and width in pixels, at least 32.
        gsd (`float`): ground sampling distance in metres, above 0.
        sensors (`Sequence[str]`): among `rgb`, `s2`, `s1`, `dsm`.
        clouds (`float`): share of the pixels under cloud in `s2`, in [0, 1).

    Raises:
        ValueError: for an argument out of its range.
    """
    if seed < 0:
        raise ValueError(f"`seed` must not be negative, got {seed}. Use 0 or more.")
    if size < 32:
        raise ValueError(f"`size` must be at least 32 pixels, got {size}. Fields and streets need room.")
    if not gsd > 0:
        raise ValueError(f"`gsd` must be above 0 metres, got {gsd}. Sentinel grids have 10, aerial images about 1.")
    if not 0 <= clouds < 1:
        raise ValueError(f"`clouds` must be in [0, 1), got {clouds}. It is the cloudy share of the scene.")
    if unknown := sorted(set(sensors) - set(_RENDERERS)):
        raise ValueError(
            f"`sensors` must be among {', '.join(_RENDERERS)}, got {', '.join(unknown)}. Only these can be rendered."
        )
    crs, transform = _place(_generator(seed, "place"), gsd)
    day = f"2023-07-{1 + seed % 28:02d}T10:30:00Z"
    land = _landscape(_generator(seed, "land"), size, gsd)
    sky = _sky(_generator(seed, "sky"), land, clouds)

    def georeferenced(pixels: np.ndarray, bands: list[str], units: str, **storage) -> ShardImage:
        return ShardImage(
            pixels=pixels, bands=bands, units=units, gsd=gsd, crs=crs, transform=transform, datetime=day, **storage
        )

    return Scene(
        images={
            sensor: georeferenced(
                _RENDERERS[sensor].render(_generator(seed, sensor), land, sky),
                SENSORS[sensor].band_names,
                _RENDERERS[sensor].units,
                **_RENDERERS[sensor].storage,
            )
            for sensor in sensors
        },
        labels=georeferenced(_LABELS[land.material][None], ["land_cover"], "class"),
        terrain=land.terrain,
        cloud_mask=(sky.cloud > 0.05) | (sky.cloud_shadow > 0.05),
        bounds=_wgs84_bounds(crs, transform, size),
    )


class _Source(NamedTuple):
    sensors: tuple[str, ...]
    gsd: float
    levels: dict[str, str] | None


SOURCES = {
    "synthetic_rgb": _Source(("rgb",), 1.0, None),
    "synthetic_s1s2": _Source(("s1", "s2"), 10.0, {"s2": "l1c"}),
    "synthetic_rgbdsm": _Source(("rgb", "dsm"), 1.0, None),
}
SPLITS = {"train": 0.8, "val": 0.2}


def make_synthetic_shards(
    out_dir: str | Path,
    seed: int = 0,
    scenes: int = 60,
    image_size: int = 128,
    splits: Mapping[str, float] = SPLITS,
    overwrite: bool = False,
) -> dict[str, dict[str, int]]:
    """Write the sources `synthetic_rgb` (unpaired), `synthetic_s1s2` and `synthetic_rgbdsm` (paired) as shards.

    Every scene is a place of its own, belongs to one source and one split, and gives four rows, its quarters; their
    `group_id` is the scene. `target` is the land cover of the row, `labels` the classes that occur in it. Each source
    appears when it is whole; finished ones are left as they are.

    Args:
        out_dir (`str` or `Path`): each source gets the folder `out_dir/<source>`.
        seed (`int`): 0 or more; the same seed writes the same pixels.
        scenes (`int`): scenes per source.
        image_size (`int`): height and width of a row's images in pixels, at least 16.
        splits (`Mapping[str, float]`): share of the scenes per split, above 0; each split gets at least one scene.
        overwrite (`bool`): make finished sources anew.

    Returns:
        `{source: {split: number of rows}}`.

    Raises:
        ValueError: for an argument out of its range.
    """
    if image_size < 16:
        raise ValueError(f"`image_size` must be at least 16 pixels, got {image_size}. Fields and streets need room.")
    if not splits or min(splits.values()) <= 0:
        raise ValueError(f"`splits` must map names to shares above 0, got {dict(splits)}. Example: {SPLITS}.")
    if scenes < len(splits):
        raise ValueError(
            f"`scenes` must be at least one for each of the {len(splits)} splits, got {scenes}. Raise `scenes`."
        )
    summary = {}
    for position, (name, source) in enumerate(SOURCES.items()):
        folder = Path(out_dir) / name
        if folder.exists() and not overwrite:
            summary[name] = {split: len(ShardSource(folder, split)) for split in shard_splits(folder)}
            continue
        summary[name] = dict.fromkeys(splits, 0)
        with ShardWriter(out_dir, name, list(source.sensors), levels=source.levels, overwrite=overwrite) as writer:
            for number, split in enumerate(_assign(scenes, splits)):
                # No two scenes of any seed and source have the same seed, and so the same place.
                scene_seed = (seed * len(SOURCES) + position) * 2**32 + number
                scene = make_scene(scene_seed, 2 * image_size, source.gsd, source.sensors)
                group = f"{name}-{seed}-{number:05d}"
                for row in (0, image_size):
                    for column in (0, image_size):
                        tile = scene.window(row, column, image_size)
                        key = f"{group}-{row}-{column}"
                        writer.write(
                            ShardRow(
                                key=key,
                                source=name,
                                split=split,
                                group_id=group,
                                images=tile.images,
                                pair_id=key if len(source.sensors) > 1 else None,
                                bounds=tile.bounds,
                                labels=[CLASSES[code] for code in np.unique(tile.labels.pixels)],
                                target=tile.labels,
                            )
                        )
                        summary[name][split] += 1
    return summary


def _assign(scenes: int, splits: Mapping[str, float]) -> list[str]:
    """The split of every scene: one each first, then whichever is furthest behind its share."""
    counts = dict.fromkeys(splits, 1)
    total = sum(splits.values())
    for _ in range(scenes - len(splits)):
        behind = max(splits, key=lambda split: splits[split] / total * scenes - counts[split])
        counts[behind] += 1
    return [split for split, count in counts.items() for _ in range(count)]


def _generator(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, *purpose.encode()])


@dataclass
class _Land:
    gsd: float
    material: np.ndarray  # uint8 (H, W), codes of _MATERIALS
    terrain: np.ndarray  # float32 (H, W), metres
    surface: np.ndarray  # float32 (H, W), metres: terrain, plants and buildings
    vigour: np.ndarray  # float32 (H, W), about -2..2, of plants
    brightness: np.ndarray  # float32 (H, W), logarithm of a factor on reflectance


@dataclass
class _Sky:
    light: np.ndarray  # float32 (H, W), factor on reflectance from slopes and cast shadows
    cloud: np.ndarray  # float32 (H, W), opacity 0..1
    cloud_shadow: np.ndarray  # float32 (H, W), 0..1


def _landscape(rng: np.random.Generator, size: int, gsd: float) -> _Land:
    # The scales are several cells of a mask wide: what is hidden must be guessable from what is left.
    form = _noise(rng, size, scale=50.0, smoothness=1.5)
    terrain = form * gsd * rng.uniform(0.6, 1.6)

    # Fields from wet low ground to dry high ground, which lets relief tell something about colour.
    parcel = _parcels(rng, size, spacing=rng.uniform(56, 76))
    count = parcel.max() + 1
    altitude = np.bincount(parcel.ravel(), form.ravel(), count) / np.maximum(np.bincount(parcel.ravel()), 1)
    dryness = altitude + 0.3 * rng.standard_normal(count) + 0.4 * rng.standard_normal()
    fields = np.array([_CODE[name] for name in ("meadow", "green crop", "ripe crop", "ploughed")], np.uint8)
    material = fields[np.digitize(dryness, (-0.5, 0.1, 1.0))][parcel]
    height = _PLANT_HEIGHT[material]

    crowns = _noise(rng, size, scale=1.5, smoothness=2.0)
    rock = form > np.quantile(form, 1 - rng.uniform(0.04, 0.14))
    material[rock], height[rock] = _CODE["rock"], (4 + crowns)[rock]

    wood = _noise(rng, size, scale=15.0, smoothness=2.5)
    woods = wood > np.quantile(wood, 1 - rng.uniform(0.2, 0.32))
    stand = _noise(rng, size, scale=30.0, smoothness=2.0)
    conifers = woods & (stand > rng.normal(0, 0.7))
    material[woods], material[conifers] = _CODE["broadleaf"], _CODE["conifer"]
    height[woods] = (21 + 1.5 * stand + crowns)[woods]

    town = _noise(rng, size, scale=28.0, smoothness=2.5)
    towns = town > np.quantile(town, 1 - rng.uniform(0.06, 0.16))
    block, street = _blocks(rng, size, spacing=rng.uniform(32, 44), width=2.0)
    # Towns are of houses with tiled roofs; those of one scene in ten are mostly towers.
    tall = rng.random(block.max() + 1) < rng.choice([0.0, 0.8], p=[0.9, 0.1])
    storeys = np.where(tall, 26.0, 8.0) + rng.uniform(0, 3, tall.size)
    material[towns] = np.where(tall, _CODE["concrete"], _CODE["tiles"])[block][towns]
    height[towns] = storeys[block][towns]

    # A road follows a contour of a smooth field; dividing by its slope keeps the width even.
    course = _noise(rng, size, scale=60.0, smoothness=2.5)
    road = (towns & street) | (np.abs(course) < 1.3 * np.hypot(*np.gradient(course)))
    material[road], height[road] = _CODE["asphalt"], 0.0

    # Water lies flat, below its banks.
    level = np.quantile(form, rng.uniform(0.02, 0.22))
    water = form < level
    material[water], height[water], terrain[water] = _CODE["water"], 0.0, terrain[~water].min() - 4
    terrain += rng.uniform(30, 600)

    # Whole fields differ in vigour, and so do places within them.
    vigour = 0.4 * rng.standard_normal(count)[parcel] + 0.6 * _noise(rng, size, scale=40.0, smoothness=2.0)
    texture = _TEXTURE[material] * rng.standard_normal((size, size), dtype=np.float32)
    brightness = texture + 0.04 * _noise(rng, size, scale=10.0, smoothness=1.5) + 0.08 * crowns * woods
    return _Land(
        gsd=gsd,
        material=material,
        terrain=terrain.astype(np.float32),
        surface=(terrain + height).astype(np.float32),
        vigour=vigour.astype(np.float32),
        brightness=brightness.astype(np.float32),
    )


def _noise(rng: np.random.Generator, size: int, scale: float, smoothness: float) -> np.ndarray:
    """Periodic random field (H, W), float32, mean 0, deviation 1: amplitude per frequency (1 + k^2)^-smoothness.

    k is the angular frequency times `scale` in pixels; the higher `smoothness`, the smoother the field.
    """
    rows, columns = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)
    k2 = ((2 * np.pi * scale) ** 2 * (rows**2 + columns**2)).astype(np.float32)
    # Uniform draws take a quarter of the time of normal ones, and a sum of many waves is normal anyway.
    white = (rng.random((size, 2 * len(columns)), dtype=np.float32) - np.float32(0.5)).view(np.complex64)
    spectrum = white * (1 + k2) ** np.float32(-smoothness)
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, s=(size, size)).astype(np.float32, copy=False)
    return field / field.std()


def _rotated(rng: np.random.Generator, size: int, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (H, W) along two perpendicular axes of random direction, in units of `spacing`, from 1 up."""
    angle = rng.uniform(0, np.pi)
    row, column = np.mgrid[:size, :size].astype(np.float32) / np.float32(spacing)
    u = column * math.cos(angle) + row * math.sin(angle)
    v = row * math.cos(angle) - column * math.sin(angle)
    return u - u.min() + 1, v - v.min() + 1


def _parcels(rng: np.random.Generator, size: int, spacing: float) -> np.ndarray:
    """Number of the field that each pixel (H, W) belongs to: Voronoi cells of jittered points, longer than wide."""
    u, v = _rotated(rng, size, spacing)
    v = v * 1.4
    i, j = v.astype(np.intp), u.astype(np.intp)
    columns = j.max() + 2
    points = rng.uniform(0.1, 0.9, (2, (i.max() + 2) * columns)).astype(np.float32)
    home, u, v = i * columns + j, u - j, v - i
    # Jitter stays within a cell, so the nearest point is that of the pixel's cell or of one of its eight neighbours.
    nearest = np.full(home.shape, np.inf, np.float32)
    parcel = home
    for down, right in product((-1, 0, 1), repeat=2):
        candidate = home + (down * columns + right)
        distance = (u - right - points[0].take(candidate)) ** 2 + (v - down - points[1].take(candidate)) ** 2
        parcel = np.where(distance < nearest, candidate, parcel)
        nearest = np.minimum(nearest, distance)
    return parcel


def _blocks(rng: np.random.Generator, size: int, spacing: float, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Number of the block of each pixel (H, W) in a rectangular grid of streets, and where the streets are."""
    u, v = _rotated(rng, size, spacing)
    street = np.minimum(u % 1, v % 1) < width / spacing
    return v.astype(int) * (int(u.max()) + 1) + u.astype(int), street


def _sky(rng: np.random.Generator, land: _Land, clouds: float) -> _Sky:
    """Sunlight of a late summer morning, north of the tropic, on slopes and behind obstacles; clouds."""
    azimuth, elevation = rng.uniform(np.radians([125, 48]), np.radians([155, 60]))
    size, gsd = len(land.surface), land.gsd
    # The sun stands `ahead` rows up and `aside` columns to the right of a pixel.
    ahead, aside, climb = math.cos(azimuth), math.sin(azimuth), math.tan(elevation)
    slope_down, slope_right = np.gradient(land.surface, gsd)
    facing = 1 + (slope_down * ahead - slope_right * aside) / climb
    facing /= np.sqrt(1 + slope_down**2 + slope_right**2)

    reach = min(math.ceil(40 / (gsd * climb)), size)
    padded = np.pad(land.surface, reach, mode="edge")
    shadow = np.zeros((size, size), bool)
    for step in range(1, reach + 1):
        row, column = reach - round(step * ahead), reach + round(step * aside)
        shadow |= padded[row : row + size, column : column + size] > land.surface + step * gsd * climb
    light = 0.4 + 0.6 * np.where(shadow, 0, np.clip(facing, 0.3, 1.6))

    cloud = cloud_shadow = np.zeros((size, size), np.float32)
    if clouds:
        density = _noise(rng, size, scale=size / 12, smoothness=1.2)
        cloud = np.clip((density - np.quantile(density, 1 - clouds)) / 0.3, 0, 1).astype(np.float32)
        # The noise is periodic, so clouds beyond the border may cast their shadow from the other side.
        away = _CLOUD_HEIGHT / (gsd * climb)
        cloud_shadow = np.roll(cloud, (round(away * ahead), -round(away * aside)), axis=(0, 1))
    return _Sky(light=light.astype(np.float32), cloud=cloud, cloud_shadow=cloud_shadow)


def _reflectance(land: _Land, band: str) -> np.ndarray:
    """Of the surface in a Sentinel-2 band before light and air, float32 (H, W)."""
    material, (position,) = land.material, SENSORS["s2"].index([band])
    change = land.brightness + _AIR[band].vigour * (land.vigour * _VEGETATION[material])
    return _REFLECTANCE[:, position][material] * np.exp(change)


def _render_rgb(rng: np.random.Generator, land: _Land, sky: _Sky) -> np.ndarray:
    pixels = []
    for band in SENSORS["rgb"].band_names:
        # Sentinel-2 knows these bands by their colours.
        display = 255 * (_reflectance(land, SENSORS["s2"].resolve(band)) * sky.light / 0.4) ** 0.6
        display += 2 * rng.standard_normal(display.shape, dtype=np.float32)
        pixels.append(np.clip(np.rint(display), 0, 255).astype(np.uint8))
    return np.stack(pixels)


def _render_dsm(rng: np.random.Generator, land: _Land, sky: _Sky) -> np.ndarray:
    return (land.surface + 0.1 * rng.standard_normal(land.surface.shape, dtype=np.float32))[None]


def _render_s2(rng: np.random.Generator, land: _Land, sky: _Sky) -> np.ndarray:
    storage = _RENDERERS["s2"].storage
    haze = rng.uniform(0.85, 1.15)
    light = sky.light * (1 - 0.6 * sky.cloud_shadow)
    pixels = []
    for band in SENSORS["s2"].band_names:
        surface = _reflectance(land, band) * light
        surface += sky.cloud * (_CLOUD_REFLECTANCE - surface)
        seen = _AIR[band].path * haze + _AIR[band].through * surface
        seen += (2e-4 + 5e-3 * seen) * rng.standard_normal(seen.shape, dtype=np.float32)
        # Stored 0 means "no data" in Sentinel-2 products.
        stored = np.clip(np.rint((seen - storage["offset"]) / storage["scale"]), 1, 65535)
        pixels.append(stored.astype(np.uint16))
    return np.stack(pixels)


def _render_s1(rng: np.random.Generator, land: _Land, sky: _Sky) -> np.ndarray:
    """Seen from the west under 39 degrees: slopes that rise to the east face the radar and return more."""
    incidence = math.radians(39)
    facing = incidence - np.arctan(np.gradient(land.terrain, land.gsd, axis=1))
    slope = 10 * np.log10(math.sin(incidence) / np.sin(np.clip(facing, 0.1, np.pi / 2)))
    vigour = land.vigour * _VEGETATION[land.material]
    decibel = np.stack([_VV[land.material] + 0.5 * vigour, _VH[land.material] + 0.8 * vigour]) + slope
    power = 10 ** (decibel / 10) + _NOISE_FLOOR
    power *= rng.standard_gamma(_LOOKS, power.shape, dtype=np.float32) / _LOOKS
    return (10 * np.log10(power)).astype(np.float32)


class _Renderer(NamedTuple):
    render: Callable[[np.random.Generator, _Land, _Sky], np.ndarray]
    units: str
    storage: dict[str, float]


_RENDERERS = {
    "rgb": _Renderer(_render_rgb, "dn", {"scale": 1 / 255}),
    "s2": _Renderer(_render_s2, "dn", {"scale": 1e-4, "offset": -0.1, "nodata": 0.0}),
    "s1": _Renderer(_render_s1, "db", {}),
    "dsm": _Renderer(_render_dsm, "metres", {}),
}


def _place(rng: np.random.Generator, gsd: float) -> tuple[str, list[float]]:
    """Somewhere between 9 and 63 degrees north: UTM zone and GDAL transform, on whole tens of metres."""
    zone = rng.integers(1, 61)
    west, north = 10.0 * rng.integers([30_000, 100_000], [70_000, 700_000])
    return f"EPSG:{32600 + zone}", [float(west), float(gsd), 0.0, float(north), 0.0, -float(gsd)]


def _wgs84_bounds(crs: str, transform: list[float], size: int) -> list[float]:
    """West, south, east, north in degrees of a square on a northern UTM grid (Krueger's series to the third order)."""
    left, gsd, _, top, _, _ = transform
    flattening = 1 / 298.257223563
    n = flattening / (2 - flattening)
    radius = 6378137.0 / (1 + n) * (1 + n**2 / 4 + n**4 / 64)
    order = 2 * np.arange(1, 4)[:, None]
    to_sphere = np.array([n / 2 - 2 * n**2 / 3 + 37 * n**3 / 96, n**2 / 48 + n**3 / 15, 17 * n**3 / 480])[:, None]
    to_ellipsoid = np.array([2 * n - 2 * n**2 / 3 - 2 * n**3, 7 * n**2 / 3 - 8 * n**3 / 5, 56 * n**3 / 15])[:, None]

    easting = np.array([left, left + size * gsd, left, left + size * gsd])
    northing = np.array([top, top, top - size * gsd, top - size * gsd])
    xi, eta = northing / (0.9996 * radius), (easting - 500_000) / (0.9996 * radius)
    xi, eta = (
        xi - (to_sphere * np.sin(order * xi) * np.cosh(order * eta)).sum(0),
        eta - (to_sphere * np.cos(order * xi) * np.sinh(order * eta)).sum(0),
    )
    conformal = np.arcsin(np.sin(xi) / np.cosh(eta))
    latitude = np.degrees(conformal + (to_ellipsoid * np.sin(order * conformal)).sum(0))
    zone = int(crs.removeprefix("EPSG:")) - 32600
    longitude = 6 * zone - 183 + np.degrees(np.arctan2(np.sinh(eta), np.cos(xi)))
    return [float(value) for value in (longitude.min(), latitude.min(), longitude.max(), latitude.max())]
