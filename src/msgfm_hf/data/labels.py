"""Labels of images: a table of keys, maps of class ids, or points and polygons."""

import csv
import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from msgfm_hf.data.geotiff import Header, check_grid, crs_name, geo_module, open_geotiff, read_header
from msgfm_hf.data.shards import UNLABELLED, ShardImage

LABEL_TYPES = ("class", "list", "number")
_LIST_MARKS = (";", "|")
_SHAPES = {"Point", "MultiPoint", "Polygon", "MultiPolygon"}


class Labels(Protocol):
    """What a maker of shards asks of labels.

    Attributes:
        kind (`str`): `class`, `list`, `number` or `map`.
        classes (`list[str]`, *optional*): names of the ids of a map, where they are known.
        said (`list[str]`): sentences on how the labels were read.
    """

    kind: str
    classes: list[str] | None
    said: list[str]

    def has(self, key: str) -> bool:
        """Whether there may be a label for this key."""
        ...

    def read(self, key: str, grid: Header) -> tuple[list[str] | None, ShardImage | None]:
        """`labels` and `target` of the row with this key, whose pixels lie on this grid."""
        ...


@dataclass(frozen=True)
class KeyTable:
    """A CSV with a row per key.

    Args:
        path (`str`): the file.
        column (`str`): the column that holds the keys.
        columns (`list[str]`): all columns.
        rows (`dict[str, dict[str, str]]`): by key, of the keys that were looked for.
        said (`str`): a sentence on how many of the keys were found.
    """

    path: str
    column: str
    columns: list[str]
    rows: dict[str, dict[str, str]]
    said: str

    def values(self, column: str, keys: Iterable[str]) -> dict[str, str]:
        """`{key: value}` of a column, without keys that have none.

        Raises:
            ValueError: if there is no such column.
        """
        if column not in self.columns:
            raise ValueError(
                f"`column` must be one of those of {self.path}, {', '.join(self.columns)}, got {column!r}. Correct it."
            )
        found = {key: self.rows[key][column] for key in keys if key in self.rows}
        return {key: value for key, value in found.items() if value.lower() not in _NO_VALUE}


def read_key_table(path, keys: Iterable[str], argument: str = "labels") -> KeyTable:
    """Read a CSV, and find the column that holds the keys: `key`, else the one in which most of them occur. Columns
    without a name and rows without a key are left out.

    Args:
        path (`str` or `Path`): the file.
        keys (`Iterable[str]`): of the images.
        argument (`str`): what names the file, for errors.

    Raises:
        ValueError: if the file cannot be read as a table, no column matches, or one of the keys occurs twice.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [name.strip() for name in reader.fieldnames or () if name.strip()]
            # Fields beyond the header come as a list, under no name.
            named = [{name.strip(): text for name, text in line.items() if name} for line in reader]
            lines = [{name: (line[name] or "").strip() for name in columns} for line in named]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"`{argument}` must be a readable CSV, got {path} ({error}). Save it as UTF-8 text."
        ) from error
    wanted = set(keys)
    found = {name: len(wanted & {line[name] for line in lines}) for name in columns}
    column = "key" if found.get("key") else max(columns, key=lambda name: found[name], default="")
    other = next((mark for mark in (";", "\t") if len(columns) == 1 and mark in columns[0]), None)
    if other is not None:
        raise ValueError(
            f"`{argument}` must have commas between columns, got {other!r} in {path}. Save it as CSV with commas and "
            "decimal points."
        )
    if not found.get(column):
        first = ", ".join(f"{name}={text!r}" for name, text in (lines[0] if lines else {}).items())
        raise ValueError(
            f"`{argument}` must have a column with the keys of the images, such as {min(wanted, default='')!r}, got "
            f"{path} with {first or 'no rows'}. {_key_hint(wanted, lines)}"
        )
    rows: dict[str, dict[str, str]] = {}
    for line in lines:
        if line[column] not in wanted:
            continue
        if line[column] in rows:
            raise ValueError(
                f"`{argument}` must name each key once, got {line[column]!r} twice in {column!r} of {path}. Drop one."
            )
        rows[line[column]] = line
    said = f"{path}: {len(rows)} of {len(wanted)} keys found in column {column!r}"
    others = sorted({line[column] for line in lines if line[column]} - wanted)
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        said += f"; {len(others)} of its keys have no images ({', '.join(others[:5])}{more})"
    return KeyTable(str(path), column, columns, rows, said)


def _key_hint(keys: set[str], lines: list[dict[str, str]]) -> str:
    names = {Path(text).stem: (column, text) for line in lines for column, text in line.items() if Path(text).suffix}
    found = next((names[key] for key in sorted(keys) if key in names), None)
    if found is None:
        return "Add a column `key`."
    return f"Add a column `key`: {found[0]!r} has names of files, such as {found[1]!r}, where keys have no ending."


# How numpy and spreadsheets write that there is nothing.
_NO_VALUE = ("", "nan")
# Others write so, but NA is Namibia too, and none a class: among numbers alone it is clear.
_NO_NUMBER = ("na", "n/a", "none", "null")


class TableLabels:
    """Labels of whole images, from a column of a table.

    `class` and `list` (joined by ; or |) become `labels`; a `number` becomes a `target` of one pixel, float32.

    Args:
        table (`KeyTable`): the table.
        column (`str`): of the labels.
        keys (`Iterable[str]`): the keys in use; their values decide the type.
        kind (`str`, *optional*): `class`, `list` or `number`; by default what the values look like.

    Raises:
        ValueError: if there is no such column, no key has a value, or a number is none.
    """

    classes = None

    def __init__(self, table: KeyTable, column: str, keys: Iterable[str], kind: str | None = None):
        self.values = table.values(column, keys)
        if not self.values:
            raise ValueError(
                f"`label` must be a column with values for the keys of the images, got {column!r} of {table.path} "
                "with none. Name another column."
            )
        numbers = {key: _number(text) for key, text in self.values.items()}
        named = {key: text for key, text in self.values.items() if text.lower() not in _NO_NUMBER}
        if kind in (None, "number") and named and all(numbers[key] is not None for key in named):
            self.values, numbers = named, {key: numbers[key] for key in named}
        if kind is None:
            listed = any(mark in text for text in self.values.values() for mark in _LIST_MARKS)
            kind = "list" if listed else "class" if None in numbers.values() else "number"
            if kind == "number" and all(value == int(value) for value in numbers.values()):
                few = ", ".join(sorted(set(self.values.values()))[:5])
                raise ValueError(
                    f"`label_type` must say whether whole numbers are classes or amounts, got column {column!r} of "
                    f"{table.path} with {few}. Add --label-type class or --label-type number."
                )
            how = f"they look so; --label-type {'|'.join(LABEL_TYPES)} says otherwise"
        else:
            how = "as told"
        self.kind, self.column, self.numbers = kind, column, numbers
        if kind == "number":
            for key, text in self.values.items():
                if numbers[key] is None:
                    raise ValueError(f"`label` must be a number, got {text!r} for key {key!r}. Correct {table.path}.")
        self.said = [table.said, f"labels: column {column!r} of {table.path}, read as {kind} ({how})"]

    def has(self, key: str) -> bool:
        """Whether the table has a value for this key."""
        return key in self.values

    def read(self, key: str, grid: Header) -> tuple[list[str] | None, ShardImage | None]:
        """`labels`, or a `target` of shape (1, 1, 1); both `None` for a key without a value."""
        text = self.values.get(key)
        if text is None:
            return None, None
        if self.kind == "number":
            return None, ShardImage(np.full((1, 1, 1), self.numbers[key], np.float32), [self.column], "number")
        if self.kind == "class":
            return [text], None
        for mark in _LIST_MARKS:
            text = text.replace(mark, "\n")
        return list(dict.fromkeys(part.strip() for part in text.split("\n") if part.strip())), None


class MaskLabels:
    """Maps of class ids on the grids of the images, a GeoTIFF per key.

    Args:
        files (`dict[str, str]`): by key.
    """

    kind, classes = "map", None

    def __init__(self, files: dict[str, str]):
        self.files = files
        self.said = [f"labels: maps of class ids, {len(files)} files; nodata is {UNLABELLED}, unlabelled"]

    def has(self, key: str) -> bool:
        """Whether there is a file for this key."""
        return key in self.files

    def check(self, key: str, grid: Header):
        """Refuse, by its header alone, a map that cannot lie on a grid.

        Raises:
            ValueError: if the file of this key cannot be opened, lies on another grid, or has several bands.
        """
        header = read_header(self.files[key])
        check_grid(header, grid, "labels")
        count = len(header.bands) + (header.alpha is not None)
        if count != 1:
            raise ValueError(f"`labels` must be maps of one band, got {count} in {header.path}. Keep one.")

    def read(self, key: str, grid: Header) -> tuple[list[str] | None, ShardImage | None]:
        """`target` uint8 (1, H, W), 255 where the file has nodata; `None` for a key without a file.

        Raises:
            ValueError: if the file cannot be read, lies on another grid, has several bands, or other values than ids.
        """
        if key not in self.files:
            return None, None
        self.check(key, grid)
        path = self.files[key]
        with open_geotiff(path) as file:
            try:
                found, valid = file.read(1), file.read_masks(1) != 0
            except geo_module("rasterio.errors").RasterioError as error:
                raise ValueError(f"`labels` must be readable, got {path} ({error}). Fetch it again.") from error
        valid &= np.isfinite(found)
        ids = found[valid]
        if ids.size and (ids.min() < 0 or ids.max() > UNLABELLED or (ids != np.floor(ids)).any()):
            raise ValueError(
                f"`labels` must be class ids from 0 to {UNLABELLED - 1}, {UNLABELLED} is unlabelled, got values from "
                f"{ids.min()} to {ids.max()} in {path}. Map them to ids."
            )
        pixels = np.full(found.shape, UNLABELLED, np.uint8)
        pixels[valid] = ids.astype(np.uint8)
        return None, class_map(pixels, grid)


class VectorLabels:
    """Maps of classes, drawn from points and polygons on the grids of the images.

    A pixel takes the class of the last shape in the file that its centre lies in, or that is a point in it.

    Args:
        path (`str` or `Path`): GeoJSON, GeoPackage, or what else GDAL reads as vectors.
        column (`str`): the attribute that names the class. Names in order (numbers by value) get the ids 0, 1, ...

    Raises:
        ValueError: if the file cannot be read, has no shapes, several layers of them, no coordinate system, no such
            attribute, no class, more than 255, or lines.
    """

    kind = "map"

    def __init__(self, path, column: str):
        geopandas = geo_module("geopandas")
        try:
            layers = [name for name, kind in geo_module("pyogrio").list_layers(path) if kind is not None]
            if len(layers) != 1:
                raise ValueError(
                    f"`labels` must have one layer of shapes, got {', '.join(layers) or 'none'} in {path}. "
                    "Write it to a file of its own: ogr2ogr one.gpkg FILE LAYER"
                )
            shapes = geopandas.read_file(path, layer=layers[0])
        except (OSError, geo_module("pyogrio.errors").DataSourceError) as error:
            raise ValueError(
                f"`labels` must be a CSV, a mask glob with {{key}}, GeoJSON or GeoPackage, got {path} ({error}). "
                "Check the name."
            ) from error
        if shapes.crs is None:
            raise ValueError(
                f"`labels` must have a coordinate system, got none in {path}. Write it with one (GeoJSON is WGS84)."
            )
        if shapes.empty:
            raise ValueError(f"`labels` must have points or polygons, got none in {path}. Check what was exported.")
        columns = [name for name in shapes.columns if name != shapes.geometry.name]
        if column not in columns:
            raise ValueError(
                f"`label` must be an attribute of {path}, {', '.join(columns)}, got {column!r}. Correct it."
            )
        empty = shapes[column].isna() | shapes.geometry.isna() | shapes.geometry.is_empty
        shapes = shapes[~empty]
        others = sorted(set(shapes.geom_type) - _SHAPES)
        if others:
            raise ValueError(
                f"`labels` must be points or polygons, got {', '.join(others)} in {path}. Buffer them to polygons."
            )
        values = sorted(set(shapes[column]))
        if not 0 < len(values) <= UNLABELLED:
            raise ValueError(
                f"`label` must name from 1 to {UNLABELLED} classes, got {len(values)} in {column!r} of {path}. "
                "Choose another attribute, or merge classes."
            )
        ids = {value: number for number, value in enumerate(values)}
        self.classes = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        self._shapes = shapes.geometry
        self._ids = np.array([ids[value] for value in shapes[column]], np.uint8)
        self.said = [
            f"labels: {len(shapes)} shapes of {len(values)} classes in {path}"
            + (f"; {empty.sum()} without class or shape left out" if empty.any() else ""),
            "classes: " + ", ".join(f"{number} {name}" for number, name in enumerate(self.classes)),
        ]

    def has(self, key: str) -> bool:
        """Shapes may lie anywhere."""
        return True

    def check(self, key: str, grid: Header):
        """Refuse a grid that shapes cannot be drawn on.

        Raises:
            ValueError: if it has no place on the map.
        """
        if grid.crs is None:
            raise ValueError(
                f"`labels` from shapes must meet images with a place on the map, got none in {grid.path}. "
                "Georeference it, or give masks."
            )

    def read(self, key: str, grid: Header) -> tuple[list[str] | None, ShardImage | None]:
        """`target` uint8 (1, H, W), 255 where there is no shape.

        Raises:
            ValueError: if the image has no place on the map.
        """
        self.check(key, grid)
        warp, shapely = geo_module("rasterio.warp"), geo_module("shapely")
        there = self._shapes.crs.to_wkt()
        near = self._shapes.sindex.query(shapely.box(*warp.transform_bounds(grid.crs, there, *grid.bounds)))
        pixels = np.full(grid.shape, UNLABELLED, np.uint8)
        if len(near):
            near = np.sort(near)
            shapes = self._shapes.iloc[near].to_crs(grid.crs.to_wkt())
            drawn = zip(shapes, self._ids[near].tolist(), strict=True)
            rasterize = geo_module("rasterio.features").rasterize
            rasterize(drawn, out=pixels, transform=grid.transform)
        return None, class_map(pixels, grid)


def class_map(pixels: np.ndarray, grid: Header) -> ShardImage:
    """A map of class ids, uint8 (H, W), as a `target` on a grid."""
    return ShardImage(
        pixels[None],
        ["class"],
        "class",
        gsd=grid.gsd,
        crs=None if grid.crs is None else crs_name(grid.crs),
        transform=None if grid.crs is None else list(grid.transform.to_gdal()),
        nodata=UNLABELLED,
    )


def hide_invalid(target: ShardImage, images: Iterable[ShardImage]) -> ShardImage:
    """A map whose ids are 255, unlabelled, where no image has a valid pixel: there is nothing to learn from.

    Args:
        target (`ShardImage`): of `class_map`, (1, H, W).
        images (`Iterable[ShardImage]`): of the row, on the grid of the map.
    """
    seen = np.logical_or.reduce([image.valid_mask() for image in images])
    return dataclasses.replace(target, pixels=np.where(seen, target.pixels, np.uint8(UNLABELLED)))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
