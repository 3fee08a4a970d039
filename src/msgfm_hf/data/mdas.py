"""MDAS (Hu et al. 2023): Augsburg on 7 May 2018, aerial RGB of 0.2 m with a surface model of 0.3 m.

Layout: `Augsburg_data_4_publication/{entire_city,sub_area_1,sub_area_2,sub_area_3}`, with `3K_RGB.tif` (uint8) and
`3K_DSM.tif` (float32, metres) in each; in the sub-areas `_sub_area1` follows, and the case and the hyphen vary. The
sub-areas are parts of the city. The other sensors of the data set are not read.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from msgfm_hf.data.archive import MIN_VALID, Archive, Item, Listing, Reading, existing_folder
from msgfm_hf.data.geotiff import crs_name, geo_module, open_geotiff, read_header, wgs84_bounds
from msgfm_hf.data.shards import ShardImage, ShardRow
from msgfm_hf.model.sensors import SENSORS

TILE = 384
_FOLDER = "Augsburg_data_4_publication"
_CITY = "entire_city"
# The authors publish no split; two areas of the city are held out, the third only fills in where the city is missing.
_SPLITS = {_CITY: "train", "sub_area_1": "test", "sub_area_2": "val", "sub_area_3": "train"}
_NAME = re.compile(r"3k[_-](rgb|dsm)([_-].*)?\.tif", re.IGNORECASE)
# The files name no value for missing heights; none of Augsburg is below the sea.
_LOWEST = -100.0
# Pixels around a tile that bilinear interpolation may reach for.
_MARGIN = 2


@dataclass(frozen=True)
class Mdas(Archive):
    """Reader of MDAS.

    RGB is cut into tiles of 384 x 384 pixels on its own grid, and the heights are interpolated onto them, bilinearly
    between valid heights. Heights that are NaN or below -100 m are invalid. The fourth band of the RGB files is not
    documented; it is read as a mask, 0 = invalid. As shards have no mask of their own, invalid pixels are stored as 0
    in a tile that has any, and the zeros among its valid values as 1.

    `sub_area_1` is test and `sub_area_2` val; tiles of the city that touch them are left out, as are tiles with less
    than half of the pixels valid in either sensor, and what is left over at the right and lower edges; all are counted.

    Args:
        root (`Path`): the folder `Augsburg_data_4_publication`, or the one that holds it.

    Raises:
        ValueError: for an area without one of the two images or with two of one, and for the city without the areas
            that are held out of it.
    """

    root: Path

    source = "mdas"
    sensors = ("dsm", "rgb")

    def options(self) -> dict:
        return {}

    def list_items(self) -> Listing:
        root = existing_folder(self._folder(), f"{_FOLDER} with {', '.join(_SPLITS)}")
        areas = {area: _find_pair(root, area) for area in _SPLITS if (root / area).is_dir()}
        headers = {area: read_header(root / rgb) for area, (rgb, _) in areas.items()}
        held_out = [area for area, split in _SPLITS.items() if split != "train"]
        missing = [area for area in held_out if area not in areas]
        if _CITY in areas and missing:
            raise ValueError(
                f"`root` must hold {' and '.join(held_out)} beside {_CITY}, got no {', '.join(missing)} in {root}. "
                "Tiles of the city on them are left out of training, for which their place must be known."
            )
        items, left_out = [], Counter()
        for area, paths in areas.items():
            height, width = headers[area].shape
            split = _SPLITS[area]
            rest = -(-height // TILE) * -(-width // TILE) - (height // TILE) * (width // TILE)
            if rest and not (split == "train" and area != _CITY and _CITY in areas):
                left_out[f"places at the right and lower edge of {area}, which fill no tile"] += rest
            for top in range(0, height - TILE + 1, TILE):
                for left in range(0, width - TILE + 1, TILE):
                    if area == _CITY and any(_touches(headers[area], top, left, headers[other]) for other in held_out):
                        left_out[f"tiles of the city that touch {' or '.join(held_out)}"] += 1
                    elif split == "train" and area != _CITY and _CITY in areas:
                        left_out[f"tiles of {area}, which are in the city"] += 1
                    else:
                        items.append(Item(f"{area}_r{top:05d}_c{left:05d}", split, area, paths, (top, left)))
        return Listing(items, dict(left_out))

    def read(self, item: Item) -> Reading:
        windows = geo_module("rasterio.windows")
        root, (rgb_path, dsm_path), (top, left) = self._folder(), item.paths, item.window
        with open_geotiff(root / rgb_path) as file:
            if file.count not in (3, 4) or file.dtypes[0] != "uint8" or file.crs is None:
                raise ValueError(
                    f"`{rgb_path}` must have 3 or 4 bands of uint8 and a place on the map, got {file.count} of "
                    f"{file.dtypes[0]}, {file.crs}. Fetch the archive again."
                )
            window = windows.Window(left, top, TILE, TILE)
            pixels = file.read(window=window)
            crs, transform = file.crs, windows.transform(window, file.transform)
        colours, mask = pixels[:3], pixels[3:].all(axis=0)
        heights = self._heights(root / dsm_path, crs, transform)
        valid = {"rgb": mask, "dsm": np.isfinite(heights)}
        short = [sensor for sensor, pixels in valid.items() if pixels.mean() < MIN_VALID]
        if short:
            return Reading(None, (f"left out tiles with less than half of {' and '.join(short)} valid",))
        remarks, nodata = (), None
        if not mask.all():
            colours, nodata = np.where(mask, np.maximum(colours, 1), 0).astype(np.uint8), 0.0
            remarks = ("tiles with pixels that RGB does not cover, stored as 0",)
        place = {
            "gsd": math.sqrt(abs(transform.determinant)) * crs.linear_units_factor[1],
            "crs": crs_name(crs),
            "transform": list(transform.to_gdal()),
            "datetime": "2018-05-07",
        }
        spec, height = SENSORS["rgb"], SENSORS["dsm"]
        images = {
            "rgb": ShardImage(colours, spec.band_names, "dn", spec.scale, nodata=nodata, **place),
            "dsm": ShardImage(heights[None], height.band_names, height.unit, nodata=math.nan, **place),
        }
        bounds = wgs84_bounds(images["rgb"])
        row = ShardRow(item.key, self.source, item.split, item.group_id, images, pair_id=item.key, bounds=bounds)
        return Reading(row, remarks)

    def _folder(self) -> Path:
        return self.root / _FOLDER if (self.root / _FOLDER).is_dir() else self.root

    def _heights(self, path: Path, crs, transform) -> np.ndarray:
        """Heights `(384, 384)` in metres on the grid of a tile; NaN where there are none."""
        warp, windows = geo_module("rasterio.warp"), geo_module("rasterio.windows")
        heights = np.full((TILE, TILE), np.nan, dtype=np.float32)
        with open_geotiff(path) as file:
            if file.count != 1 or file.dtypes[0] != "float32" or file.crs is None:
                raise ValueError(
                    f"`{path.name}` must have one band of float32 and a place on the map, got {file.count} of "
                    f"{file.dtypes[0]}, {file.crs}. Fetch the archive again."
                )
            corners = [transform @ corner for corner in ((0, 0), (TILE, TILE))]
            xs, ys = zip(*corners, strict=True)
            bounds = warp.transform_bounds(crs, file.crs, min(xs), min(ys), max(xs), max(ys))
            near = windows.from_bounds(*bounds, transform=file.transform)
            rows = (max(0, math.floor(near.row_off) - _MARGIN), math.ceil(near.row_off + near.height) + _MARGIN)
            columns = (max(0, math.floor(near.col_off) - _MARGIN), math.ceil(near.col_off + near.width) + _MARGIN)
            rows, columns = (rows[0], min(rows[1], file.height)), (columns[0], min(columns[1], file.width))
            if rows[0] >= rows[1] or columns[0] >= columns[1]:
                return heights
            near = windows.Window.from_slices(rows, columns)
            stored = file.read(1, window=near)
            # Missing heights are made NaN before anything is interpolated: GDAL knows only one value for them.
            missing = ~np.isfinite(stored) | (stored < _LOWEST)
            if file.nodata is not None:
                missing |= stored == file.nodata
            warp.reproject(
                np.where(missing, np.float32(np.nan), stored),
                heights,
                src_transform=windows.transform(near, file.transform),
                src_crs=file.crs,
                src_nodata=math.nan,
                dst_transform=transform,
                dst_crs=crs,
                dst_nodata=math.nan,
                resampling=geo_module("rasterio.enums").Resampling.bilinear,
            )
        return heights


def _find_pair(root: Path, area: str) -> tuple[str, str]:
    """Paths of RGB and heights of an area, relative to the root."""
    found: dict[str, list[str]] = {"rgb": [], "dsm": []}
    for path in sorted((root / area).iterdir()):
        name = _NAME.fullmatch(path.name)
        if name:
            found[name[1].lower()].append(f"{area}/{path.name}")
    if any(len(paths) != 1 for paths in found.values()):
        raise ValueError(
            f"`root` must hold one 3K_RGB and one 3K_DSM image in {root / area}, got {found['rgb']} and "
            f"{found['dsm']}. Fetch the missing one, or remove copies."
        )
    return found["rgb"][0], found["dsm"][0]


def _touches(city, top: int, left: int, area) -> bool:
    """Whether a tile of the city overlaps an area, both by their headers."""
    if city.crs is None or city.crs != area.crs:
        raise ValueError(
            f"`root` must hold areas in one coordinate system, got {city.crs} and {area.crs} ({area.path}). "
            "Fetch the archive again."
        )
    corners = [city.transform @ (left + right, top + down) for right, down in ((0, 0), (TILE, TILE))]
    xs, ys = zip(*corners, strict=True)
    west, south, east, north = area.bounds
    return min(xs) < east and max(xs) > west and min(ys) < north and max(ys) > south
