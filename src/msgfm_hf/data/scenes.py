"""Shards from large images: every input is warped to one grid and cut into tiles, a tile at a time."""

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
    header_bounds,
    open_geotiff,
    physical_factors,
    write_mask,
)
from msgfm_hf.data.inputs import Input, input_bands, input_header, input_levels
from msgfm_hf.data.labels import VectorLabels
from msgfm_hf.data.shards import ShardImage, ShardRow, ShardWriter
from msgfm_hf.data.splits import DEFAULT_SHARES, SplitCounts, deal_groups, parse_shares, parse_split_by

_WEB_MERCATOR = 3857
# Megabytes of GDAL's cache of blocks, which would else take a share of the whole memory.
_CACHE = 64
# Where corners are written with rounding errors, a pixel that is whole but for this part of it is whole.
_WHOLE = 1e-6


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
        input_bands(inputs[sensor], header)
        physical_factors(header, sensor, inputs[sensor].unit, inputs[sensor].scale, inputs[sensor].offset)
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
    said += [f"{sensor}: {_resampling(header, gsd)} from {header.gsd:.4g} m" for sensor, header in headers.items()]
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

    Inputs are read once, from north to south; kept tiles wait in a temporary file in `out`, as large as the shards
    will be, until it is known how many each block has. Memory is bounded by a tile.

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
    ):
        for top, left, images in tqdm(_warped(plan), f"warping {name}", len(plan.corners), unit=" tiles"):
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
            row = ShardRow(
                key,
                name,
                dealt[group],
                group,
                _stored_images(plan, waiting, int(number), tile, grid),
                pair_id=key if len(plan.inputs) > 1 else None,
                bounds=header_bounds(grid),
                target=labels.read(key, grid)[1] if labels else None,
            )
            writer.write(row)
            counts.setdefault(row.split, SplitCounts()).add(row)
        if labels and not any(held.labels for held in counts.values()):
            raise ValueError(
                f"`labels` must lie on the tiles, got none of {', '.join(labels.classes)} on any. "
                "Check the coordinates."
            )
    return counts, said


def _grid_system(header: Header, gsd: float, said: list[str]):
    """Coordinate system, origin and side of a pixel in its units."""
    crs = header.crs
    if crs.is_geographic or crs.to_epsg() == _WEB_MERCATOR:
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


def _warped(plan: ScenePlan) -> Iterator[tuple[int, int, dict[str, tuple[np.ndarray, np.ndarray]]]]:
    """Top, left and by sensor pixels (C, H, W) and validity (H, W) of all tiles."""
    rasterio, windows = geo_module("rasterio"), geo_module("rasterio.windows")
    with contextlib.ExitStack() as stack:
        stack.enter_context(rasterio.Env(GDAL_CACHEMAX=_CACHE))
        warped = {sensor: _open_warped(plan, sensor, stack) for sensor in plan.inputs}
        for top, left in plan.corners:
            window = windows.Window(left, top, plan.size, plan.size)
            images = {}
            for sensor, (file, numbers, nodata) in warped.items():
                try:
                    *bands, alpha = file.read([*numbers, file.count], window=window)
                except rasterio.errors.RasterioError as error:
                    raise ValueError(
                        f"`input` must be readable, got {plan.inputs[sensor].path} ({error}). Fetch it again."
                    ) from error
                pixels = np.stack(bands)
                valid = (alpha > 0) & np.isfinite(pixels).all(axis=0)
                if nodata is not None:
                    valid &= (pixels != nodata).all(axis=0)
                images[sensor] = (pixels, valid)
            yield top, left, images


def _open_warped(plan: ScenePlan, sensor: str, stack: contextlib.ExitStack):
    """The whole input on the grid, computed where it is read; its bands, counted from 1; its nodata value. The last
    band is alpha: 0 outside the input and where its alpha band or mask says so."""
    vrt, resampling = geo_module("rasterio.vrt"), geo_module("rasterio.enums").Resampling
    given, header = plan.inputs[sensor], plan.headers[sensor]
    _, picked = input_bands(given, header)
    nodata = _nodata(given, header)
    file = stack.enter_context(open_geotiff(header.path))
    if header.alpha is None and "alpha" in (colour.name for colour in file.colorinterp):
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
        add_alpha=header.alpha is None,
    )
    return stack.enter_context(warped), [header.positions[position] + 1 for position in picked], nodata


def _without_alpha(path: str, stack: contextlib.ExitStack):
    """The file with a band that is only marked as alpha as a band like the others."""
    memory = stack.enter_context(geo_module("rasterio.io").MemoryFile(ext=".vrt"))
    geo_module("rasterio.shutil").copy(path, memory.name, driver="VRT")
    text = memory.read().replace(b"<ColorInterp>Alpha</ColorInterp>", b"")
    return stack.enter_context(open_geotiff(text.decode()))


def _nodata(given: Input, header: Header) -> float | None:
    """The value that marks invalid pixels, if the dtype can hold it; of floats at least NaN."""
    nodata = header.nodata if given.nodata is None else given.nodata
    dtype = np.dtype(header.dtype)
    if dtype.kind == "f":
        return math.nan if nodata is None else nodata
    limits = np.iinfo(dtype)
    holds = nodata is not None and float(nodata).is_integer() and limits.min <= nodata <= limits.max
    return nodata if holds else None


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
        given = plan.inputs[sensor]
        unit, scale, offset = physical_factors(plan.headers[sensor], sensor, given.unit, given.scale, given.offset)
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
