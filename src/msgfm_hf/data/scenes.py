"""Shards from large images: every input is warped to one grid and cut into tiles, a row of tiles at a time."""

import contextlib
import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from msgfm_hf.data.geotiff import (
    Header,
    crs_name,
    free_value,
    geo_module,
    has_true_metres,
    header_bounds,
    held_nodata,
    open_geotiff,
    physical_factors,
    write_mask,
)
from msgfm_hf.data.inputs import Input, input_bands, input_header, input_levels
from msgfm_hf.data.labels import VectorLabels, hide_invalid
from msgfm_hf.data.shards import ShardImage, ShardRow, ShardWriter, valid_pixels
from msgfm_hf.data.splits import DEFAULT_SHARES, SplitCounts, deal_groups, parse_shares, parse_split_by
from msgfm_hf.model.sensors import get_sensor

# Bytes of GDAL's cache of blocks, which would else take a share of the whole memory. It is larger where a row of tiles
# needs more: of a file in strips each is as wide as the image, and else were decoded again for every tile.
_CACHE = 64 * 2**20
# Where corners are written with rounding errors, a pixel that is whole but for this part of it is whole.
_WHOLE = 1e-6
# Rows of an input that are turned into power at once.
_ROWS = 256


@dataclass(frozen=True)
class ScenePlan:
    """The grid that `write_scenes` warps to and cuts.

    Args:
        inputs (`dict[str, Input]`): by sensor.
        headers (`dict[str, Header]`): of their files.
        crs: coordinate system of the grid, projected.
        transform: from pixels of the grid to coordinates; north is up.
        shape (`tuple[int, int]`): height and width in pixels: what all inputs cover.
        gsd (`float`): metres per pixel.
        size, stride, block (`int`): sides of a tile, from tile to tile, and of a block, in pixels.
        shares (`dict[str, float]`), seed (`int`): how blocks are dealt to splits.
        said (`list[str]`): what was found and chosen, to print.
    """

    inputs: dict[str, Input]
    headers: dict[str, Header]
    crs: Any
    transform: Any
    shape: tuple[int, int]
    gsd: float
    size: int
    stride: int
    block: int
    shares: dict[str, float]
    seed: int
    said: list[str]

    @property
    def corners(self) -> list[tuple[int, int]]:
        """Top and left of all tiles, in pixels, from north to south. None crosses the edge of a block."""
        tops, lefts = (
            [
                corner
                for start in range(0, length, self.block)
                for corner in range(start, min(start + self.block, length) - self.size + 1, self.stride)
            ]
            for length in self.shape
        )
        return list(itertools.product(tops, lefts))

    def in_power(self, sensor: str) -> bool:
        """Whether an input is warped as linear power: where it holds decibels and its pixels do not stay in place."""
        return _decades(self.inputs[sensor], self.headers[sensor]) is not None and not self._stays(sensor)

    def _stays(self, sensor: str) -> bool:
        """Whether the pixels of an input are pixels of the grid."""
        header = self.headers[sensor]
        if header.crs != self.crs:
            return False
        moved = ~self.transform @ header.transform
        return moved.almost_equals(moved.translation(round(moved.c), round(moved.f)), precision=_WHOLE)

    def group(self, top: int, left: int) -> str:
        """The block that a tile lies in."""
        return f"block_r{top // self.block:03d}_c{left // self.block:03d}"

    def tile(self, top: int, left: int) -> Header:
        """The grid of a tile."""
        return Header(
            path=f"tile at row {top}, column {left}",
            shape=(self.size, self.size),
            dtype="uint8",
            bands=[],
            alpha=None,
            masked=False,
            nodata=None,
            scales=None,
            offsets=None,
            crs=self.crs,
            transform=self.transform @ self.transform.translation(left, top),
        )


class _Kept(NamedTuple):
    """A tile whose pixels wait in the temporary file."""

    top: int
    left: int
    nodata: dict[str, float | None]


def plan_scenes(
    inputs: dict[str, Input],
    gsd: float,
    split_by: str,
    size: int = 256,
    stride: int | None = None,
    shares: str = DEFAULT_SHARES,
    seed: int = 0,
) -> ScenePlan:
    """Choose the grid: coordinate system and origin of the first input, and the area that all inputs cover.

    Args:
        inputs (`dict[str, Input]`): one file per sensor.
        gsd (`float`): metres per pixel of the grid.
        split_by (`str`): `block:100m`: blocks of tiles are dealt to train, val and test. They are rounded up to whole
            tiles.
        size (`int`): side of the tiles in pixels.
        stride (`int`, *optional*): pixels from tile to tile; default `size`.
        shares (`str`), seed (`int`): parts of train, val and test, and of the deal.

    Raises:
        ValueError: for a number out of range, an input without a place on the map or whose bands are not known, inputs
            that share no area as large as a tile, or fewer blocks than splits.
    """
    by, parts, stride = parse_split_by(split_by), parse_shares(shares), size if stride is None else stride
    for name, value in (("gsd", gsd), ("size", size), ("stride", stride)):
        if not value > 0:
            raise ValueError(f"`{name}` must be above 0, got {value}. Metres for gsd, pixels for size and stride.")
    if by.block is None:
        raise ValueError(f"`split_by` of scenes must be blocks, got {split_by!r}. Example: block:500m")
    input_levels(inputs)
    headers = {sensor: input_header(given) for sensor, given in inputs.items()}
    for sensor, header in headers.items():
        _factors(inputs[sensor], header)
        if header.crs is None:
            raise ValueError(
                f"`input` of a scene must have a place on the map, got none in {header.path}. Georeference it; chips "
                "without a place are for `msgfm shards folder`."
            )
    said: list[str] = []
    crs, (x, y), pixel = _grid_system(next(iter(headers.values())), gsd, said)
    boxes = {sensor: _transform_bounds(header.crs, crs, header.bounds) for sensor, header in headers.items()}
    left, bottom = (max(box[axis] for box in boxes.values()) for axis in (0, 1))
    right, top = (min(box[axis] for box in boxes.values()) for axis in (2, 3))
    # Whole pixels of the grid through the first input's origin.
    first, last = math.ceil((left - x) / pixel - _WHOLE), math.floor((right - x) / pixel + _WHOLE)
    upper, lower = math.ceil((y - top) / pixel - _WHOLE), math.floor((y - bottom) / pixel + _WHOLE)
    shape = (lower - upper, last - first)
    if min(shape) < size:
        covered = "; ".join(f"{sensor} {', '.join(f'{edge:.10g}' for edge in box)}" for sensor, box in boxes.items())
        raise ValueError(
            f"`input` must share an area of at least one tile of {size} x {size} pixels of {gsd:g} m, got "
            f"{max(shape[0], 0)} x {max(shape[1], 0)} (left, bottom, right, top of {covered}). "
            "Check that the images are of one place, or take a smaller --size or --gsd."
        )
    tiles = math.ceil(by.block / (size * gsd) - _WHOLE)
    transform = geo_module("rasterio.transform").from_origin(x + first * pixel, y - upper * pixel, pixel, pixel)
    plan = ScenePlan(inputs, headers, crs, transform, shape, gsd, size, stride, tiles * size, parts, seed, said)
    said.append(f"grid: {shape[0]} x {shape[1]} pixels of {gsd:g} m, {crs_name(crs)[:60]}, what all inputs cover")
    said += [
        f"{sensor}: {_resampling(header, gsd)}{' of linear power' if plan.in_power(sensor) else ''} from "
        f"{header.gsd:.4g} m"
        for sensor, header in headers.items()
    ]
    rounded = "" if tiles * size * gsd <= by.block * (1 + _WHOLE) else f", rounded up from {by.block:g} m"
    said.append(f"blocks: {tiles} x {tiles} tiles, {tiles * size * gsd:g} m{rounded}; no tile crosses one")
    # Too few blocks are told before hours of warping.
    deal_groups(Counter(plan.group(*corner) for corner in plan.corners), parts, seed)
    return plan


def write_scenes(
    plan: ScenePlan,
    out,
    name: str,
    min_valid: float = 0.8,
    labels: VectorLabels | None = None,
    overwrite: bool = False,
) -> tuple[dict[str, SplitCounts], list[str]]:
    """Warp tile by tile, and write those with enough valid pixels as one source, in a seeded order.

    Inputs are read from north to south; kept tiles wait in a temporary file in `out`, as large as the shards will be,
    until it is known how many each block has. Memory is bounded by a row of tiles, as wide as the image.

    Decibels are warped as linear power, whose mean is that of the ground; their own mean is lower by 2.5 dB in a field
    of single-look speckle. Where pixels move, such an input is first written as power to a temporary file in `out`, of
    four bytes a value, and tiles are turned back.

    Args:
        plan (`ScenePlan`): of `plan_scenes`.
        out (`str` or `Path`): folder of all sources.
        name (`str`): the source.
        min_valid (`float`): a tile is kept where at least this part of its pixels is valid in all sensors, 0..1.
        labels (`VectorLabels`, *optional*): drawn on every tile as its `target`.
        overwrite (`bool`): replace the source if it exists.

    Returns:
        `{split: SplitCounts}`, and sentences on tiles kept and dropped.

    Raises:
        ValueError: if no tile is kept, kept blocks are fewer than splits, a file cannot be read, or values are
            implausible; then nothing is written.
    """
    if not 0 <= min_valid <= 1:
        raise ValueError(f"`min_valid` must be from 0 to 1, got {min_valid}. It is a share of the pixels of a tile.")
    out = Path(out)
    levels, counts, dropped = input_levels(plan.inputs), {}, Counter()
    kept: list[_Kept] = []
    with (
        ShardWriter(
            out,
            name,
            list(plan.inputs),
            levels,
            classes=labels.classes if labels else None,
            overwrite=overwrite,
        ) as writer,
        tempfile.TemporaryFile(dir=out) as waiting,
        contextlib.closing(_warped(plan, writer.make_scratch())) as warped,
    ):
        for top, left, images in tqdm(warped, f"warping {name}", len(plan.corners), unit=" tiles"):
            reason = _too_empty(images, min_valid)
            if reason:
                dropped[reason] += 1
                continue
            nodata = {}
            for sensor, (pixels, valid) in images.items():
                pixels, nodata[sensor] = _without_mask(pixels, valid, plan.inputs[sensor], plan.headers[sensor])
                waiting.write(pixels.tobytes())
            kept.append(_Kept(top, left, nodata))
        said = [f"tiles: {len(kept)} of {len(plan.corners)} kept"]
        said += [f"tiles: {count} dropped, {reason}" for reason, count in sorted(dropped.items())]
        if not kept:
            raise ValueError(
                f"`min_valid` must leave some tile, got none of {len(plan.corners)} with {min_valid:g} "
                f"({'; '.join(said[1:])}). Lower it."
            )
        dealt = deal_groups(Counter(plan.group(tile.top, tile.left) for tile in kept), plan.shares, plan.seed)
        said.append(f"split: {len(dealt)} blocks with tiles, dealt by rows (seed {plan.seed})")
        # Neighbours in a row group are read together: in order a batch would come from one place.
        for number in tqdm(np.random.default_rng(plan.seed).permutation(len(kept)), f"writing {name}", unit=" rows"):
            tile = kept[number]
            group, grid = plan.group(tile.top, tile.left), plan.tile(tile.top, tile.left)
            key = f"{name}_y{tile.top:06d}_x{tile.left:06d}"
            images = _stored_images(plan, waiting, int(number), tile, grid)
            row = ShardRow(
                key,
                name,
                dealt[group],
                group,
                images,
                pair_id=key if len(plan.inputs) > 1 else None,
                bounds=header_bounds(grid),
                target=_labels_on(labels, key, grid, images) if labels else None,
            )
            writer.write(row)
            counts.setdefault(row.split, SplitCounts()).add(row)
        if labels and not any(held.labels for held in counts.values()):
            raise ValueError(
                f"`labels` must lie on the tiles, got none of {', '.join(labels.classes)} on any. "
                "Check the coordinates."
            )
    return counts, said


def _labels_on(labels: VectorLabels, key: str, grid: Header, images: dict[str, ShardImage]) -> ShardImage | None:
    target = labels.read(key, grid)[1]
    return None if target is None else hide_invalid(target, list(images.values()))


def _grid_system(header: Header, gsd: float, said: list[str]):
    """Coordinate system, origin and side of a pixel in its units."""
    crs = header.crs
    if not has_true_metres(crs):
        west, south, east, north = header_bounds(header)
        zone = min(int(((west + east) / 2 + 180) // 6) + 1, 60)
        crs = geo_module("rasterio.crs").CRS.from_epsg((32600 if south + north >= 0 else 32700) + zone)
        said.append(
            f"{header.path} is in {crs_name(header.crs)[:60]}, whose units are no metres: warped to {crs_name(crs)}"
        )
    left, _, _, top = _transform_bounds(header.crs, crs, header.bounds)
    return crs, (left, top), gsd / crs.linear_units_factor[1]


def _transform_bounds(there, here, bounds):
    return bounds if there == here else geo_module("rasterio.warp").transform_bounds(there, here, *bounds)


def _resampling(header: Header, gsd: float) -> str:
    """Where several pixels fall into one, all of them count."""
    return "average" if header.gsd is not None and gsd > header.gsd * (1 + 1e-3) else "bilinear"


class _Warped(NamedTuple):
    """The whole of an input on the grid, computed where it is read.

    Attributes:
        file: its last band is alpha: 0 outside the input and where its alpha band or mask says so.
        numbers (`list[int]`): its bands, counted from 1.
        decades (`float`, *optional*): of an input that is warped as power, decades of power per stored unit.
    """

    file: Any
    numbers: list[int]
    decades: float | None


def _warped(plan: ScenePlan, power: Path) -> Iterator[tuple[int, int, dict[str, tuple[np.ndarray, np.ndarray]]]]:
    """Top, left and by sensor pixels (C, H, W) and validity (H, W) of all tiles. Inputs that are warped as power are
    written to the folder `power`."""
    rasterio, windows = geo_module("rasterio"), geo_module("rasterio.windows")
    with contextlib.ExitStack() as stack:
        stack.enter_context(rasterio.Env(GDAL_CACHEMAX=max(_CACHE, _row_bytes(plan))))
        warped = {sensor: _open_warped(plan, sensor, power, stack) for sensor in plan.inputs}
        for top, left in plan.corners:
            window = windows.Window(left, top, plan.size, plan.size)
            images = {}
            for sensor, (file, numbers, decades) in warped.items():
                given, header = plan.inputs[sensor], plan.headers[sensor]
                with _readable(given):
                    *bands, alpha = file.read([*numbers, file.count], window=window)
                pixels = np.stack(bands)
                valid = (alpha > 0) & np.isfinite(pixels).all(axis=0)
                if decades is not None:
                    pixels = _stored_decibels(np.where(valid, pixels, 1), decades, np.dtype(header.dtype))
                images[sensor] = (pixels, valid & valid_pixels(pixels, _nodata(given, header)))
            yield top, left, images


@contextlib.contextmanager
def _readable(given: Input) -> Iterator[None]:
    try:
        yield
    except geo_module("rasterio.errors").RasterioError as error:
        raise ValueError(f"`input` must be readable, got {given.path} ({error}). Fetch it again.") from error


def _row_bytes(plan: ScenePlan) -> int:
    """What a row of tiles is read from, twice: as stored and as warped."""
    rows = {
        sensor: min(plan.size * max(1.0, plan.gsd / header.gsd), header.shape[0])
        for sensor, header in plan.headers.items()
    }
    return 2 * sum(
        math.ceil(rows[sensor]) * header.shape[1] * (len(header.bands) + 1) * max(np.dtype(header.dtype).itemsize, 4)
        for sensor, header in plan.headers.items()
    )


def _open_warped(plan: ScenePlan, sensor: str, power: Path, stack: contextlib.ExitStack) -> _Warped:
    vrt, resampling = geo_module("rasterio.vrt"), geo_module("rasterio.enums").Resampling
    given, header = plan.inputs[sensor], plan.headers[sensor]
    _, picked = input_bands(given, header)
    nodata, alpha, decades = _nodata(given, header), header.alpha, None
    numbers = [header.positions[position] + 1 for position in picked]
    if plan.in_power(sensor):
        decades = _decades(given, header)
        file = stack.enter_context(open_geotiff(_write_power(given, header, numbers, power / f"{sensor}.tif")))
        nodata, alpha, numbers = math.nan, None, list(file.indexes)
    else:
        file = stack.enter_context(open_geotiff(header.path))
        if alpha is None and "alpha" in (colour.name for colour in file.colorinterp):
            file = _without_alpha(header.path, stack)
    warped = vrt.WarpedVRT(
        file,
        src_crs=header.crs,
        crs=plan.crs,
        transform=plan.transform,
        height=plan.shape[0],
        width=plan.shape[1],
        resampling=resampling[_resampling(header, plan.gsd)],
        src_nodata=nodata,
        nodata=nodata,
        add_alpha=alpha is None,
    )
    return _Warped(stack.enter_context(warped), numbers, decades)


def _decades(given: Input, header: Header) -> float | None:
    """Decades of linear power per stored unit of an input in decibels; `None` of another."""
    unit, scale, _ = _factors(given, header)
    decibels = unit == "db" or (unit == "dn" and get_sensor(given.sensor).unit == "db")
    return scale / 10 if decibels else None


def _write_power(given: Input, header: Header, numbers: list[int], path: Path) -> Path:
    """Write an input in decibels as linear power, up to a factor that is one for all; NaN where invalid, or where
    float32 has no such power."""
    rasterio, windows = geo_module("rasterio"), geo_module("rasterio.windows")
    decades, nodata = _decades(given, header), _nodata(given, header)
    height, width = header.shape
    profile = {"driver": "GTiff", "dtype": "float32", "nodata": math.nan, "bigtiff": "if_safer"}
    profile |= {"count": len(numbers), "height": height, "width": width}
    with (
        open_geotiff(header.path) as file,
        rasterio.open(path, "w", crs=header.crs, transform=header.transform, **profile) as power,
    ):
        for top in tqdm(range(0, height, _ROWS), f"{given.sensor} to power", unit=f" x {_ROWS} rows"):
            window = windows.Window(0, top, width, min(_ROWS, height - top))
            with _readable(given):
                stored = file.read(numbers, window=window)
                valid = valid_pixels(stored, nodata)
                if header.alpha is not None:
                    valid &= file.read(header.alpha + 1, window=window) > 0
                elif header.masked:
                    valid &= file.read_masks(1, window=window) > 0
            with np.errstate(over="ignore", under="ignore"):
                values = (10 ** (stored.astype(np.float64) * decades)).astype(np.float32)
            valid &= (np.isfinite(values) & (values > 0)).all(axis=0)
            power.write(np.where(valid, values, np.float32(math.nan)), window=window)
    return path


def _stored_decibels(power: np.ndarray, decades: float, dtype: np.dtype) -> np.ndarray:
    """Stored values of linear power; integers are rounded."""
    stored = np.log10(power, dtype=np.float64) / decades
    if dtype.kind == "f":
        return stored.astype(dtype)
    limits = np.iinfo(dtype)
    return np.rint(stored).clip(limits.min, limits.max).astype(dtype)


def _without_alpha(path: str, stack: contextlib.ExitStack):
    """The file with a band that is only marked as alpha as a band like the others."""
    memory = stack.enter_context(geo_module("rasterio.io").MemoryFile(ext=".vrt"))
    geo_module("rasterio.shutil").copy(path, memory.name, driver="VRT")
    text = memory.read().replace(b"<ColorInterp>Alpha</ColorInterp>", b"")
    return stack.enter_context(open_geotiff(text.decode()))


def _nodata(given: Input, header: Header) -> float | None:
    """The value that marks invalid pixels, if the dtype can hold it; of floats at least NaN."""
    nodata = held_nodata(header.nodata if given.nodata is None else given.nodata, header.dtype)
    return math.nan if nodata is None and np.dtype(header.dtype).kind == "f" else nodata


def _factors(given: Input, header: Header) -> tuple[str, float, float]:
    """Unit, scale and offset of the bands of an input."""
    _, picked = input_bands(given, header)
    return physical_factors(header, given.sensor, given.unit, given.scale, given.offset, picked)


def _too_empty(images: dict[str, tuple[np.ndarray, np.ndarray]], min_valid: float) -> str | None:
    """Why a tile is dropped, or `None`."""
    shares = {sensor: valid.mean() for sensor, (_, valid) in images.items()}
    together = np.logical_and.reduce([valid for _, valid in images.values()]).mean()
    if together >= min_valid:
        return None
    worst = min(shares, key=lambda sensor: shares[sensor])
    where = worst if shares[worst] < min_valid else "all sensors together"
    return f"less than {100 * min_valid:g} % of the pixels valid in {where}"


def _without_mask(pixels: np.ndarray, valid: np.ndarray, given: Input, header: Header):
    """Pixels whose invalid ones have a nodata value, and this value."""
    nodata = _nodata(given, header)
    if nodata is None and not valid.all() and free_value(pixels[:, valid]) is None:
        # Resampled values are no measurements: where all are in use, the largest makes room, as GDAL does it.
        largest = np.iinfo(pixels.dtype).max
        pixels = np.minimum(pixels, pixels.dtype.type(largest - 1))
    return write_mask(pixels, valid, nodata, header.path)


def _stored_images(plan: ScenePlan, waiting, number: int, tile: _Kept, grid: Header) -> dict[str, ShardImage]:
    """The images of the tile that was kept as the `number`th."""
    shapes = {}
    for sensor, header in plan.headers.items():
        bands, _ = input_bands(plan.inputs[sensor], header)
        shapes[sensor] = (bands, (len(bands), plan.size, plan.size), np.dtype(header.dtype))
    waiting.seek(number * sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in shapes.values()))
    images = {}
    for sensor, (bands, shape, dtype) in shapes.items():
        unit, scale, offset = _factors(plan.inputs[sensor], plan.headers[sensor])
        images[sensor] = ShardImage(
            pixels=np.frombuffer(waiting.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape),
            bands=bands,
            units=unit,
            scale=scale,
            offset=offset * scale,
            gsd=plan.gsd,
            crs=crs_name(plan.crs),
            transform=list(grid.transform.to_gdal()),
            nodata=tile.nodata[sensor],
        )
    return images
