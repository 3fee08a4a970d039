"""Shards: one folder of Parquet files per source, with one schema for every sensor, paired or not.

A row is one footprint. It holds the pixels of each sensor as bytes in the stored dtype, and beside them everything
needed to turn them into physical values and to put them on a map. `physical = stored * scale + offset`.
"""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fsspec.implementations.local import LocalFileSystem

from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.sensors import SENSORS, UNITS

SHARD_VERSION = 1
ROW_GROUP_SIZE = 16
ROWS_PER_FILE = 256
# The id of an unlabelled pixel in a map of classes, as Transformers' segmentation heads ignore it.
UNLABELLED = 255
# Files of all sources have the columns of these sensors, so that they can be read together.
COMMON_SENSORS = ("dsm", "rgb", "s1", "s2")
# Row groups are permuted over the epoch and rows within blocks of this many groups. A reader keeps as many decoded,
# so that a row group is read about once per epoch.
BLOCK_ROW_GROUPS = 4
_OPEN_FILES = 32
# No decibels and no heights lie below: what does is a mark of missing pixels that nobody declared.
_LEAST = {"db": -900.0, "metres": -900.0}
_ROW_COLUMNS = ("key", "group_id", "pair_id", "bounds", "labels")


class CorruptShardError(ValueError):
    """The bytes of a shard are not what was written. The message names the file and the row or rows."""


@dataclass
class ShardImage:
    """The image of one sensor as stored.

    Args:
        pixels (`np.ndarray`): `(C, H, W)`, the stored dtype; read-only when it comes from a `ShardSource`.
        bands (`list[str]`): canonical names, one per band.
        units (`str`): unit of `stored * scale + offset`: `reflectance`, `power`, `amplitude`, `db`, `metres`; or `dn`
            for stored digital numbers, whose scaled value is in the unit of the sensor's statistics.
        scale, offset (`float`): `physical = stored * scale + offset`.
        gsd (`float`, *optional*): ground sampling distance in metres.
        crs (`str`, *optional*): authority code or WKT.
        transform (`list[float]`, *optional*): six numbers in GDAL's order (x origin, pixel width, row rotation,
            y origin, column rotation, pixel height).
        nodata (`float`, *optional*): stored value that marks an invalid pixel, beside NaN.
        datetime (`str`, *optional*): ISO 8601.
    """

    pixels: np.ndarray
    bands: list[str]
    units: str
    scale: float = 1.0
    offset: float = 0.0
    gsd: float | None = None
    crs: str | None = None
    transform: list[float] | None = None
    nodata: float | None = None
    datetime: str | None = None

    @property
    def offset_dn(self) -> float:
        """The same offset in digital numbers: `physical = (stored + offset_dn) * scale`, the image processor's form."""
        return self.offset / self.scale

    def valid_mask(self) -> np.ndarray:
        """Bool `(H, W)`: False where any band is nodata or not finite."""
        return valid_pixels(self.pixels, self.nodata)

    def select(self, bands: list[str]) -> "ShardImage":
        """The named bands, in that order."""
        picked = [self.bands.index(band) for band in bands]
        return dataclasses.replace(self, pixels=self.pixels[picked], bands=list(bands))

    def window(self, top: int, left: int, height: int, width: int) -> "ShardImage":
        """A part of the image, in pixels, with its place on the map."""
        transform = self.transform
        if transform is not None:
            x, dx, row_rotation, y, column_rotation, dy = transform
            x, y = x + dx * left + row_rotation * top, y + column_rotation * left + dy * top
            transform = [x, dx, row_rotation, y, column_rotation, dy]
        pixels = self.pixels[:, top : top + height, left : left + width]
        return dataclasses.replace(self, pixels=pixels, transform=transform)


@dataclass
class ShardRow:
    """One footprint with the images of all sensors of its source.

    Args:
        key (`str`): unique in the source.
        source, split (`str`): the source, and `train`, `val`, `test` or another word.
        group_id (`str`): the place; all rows of a place belong to one split.
        images (`dict[str, ShardImage]`): one image per sensor of the source.
        pair_id (`str`, *optional*): the footprint where sensors are paired; `None` means unpaired.
        bounds (`list[float]`, *optional*): west, south, east, north in degrees, WGS84.
        labels (`list[str]`, *optional*): classes of the whole image.
        target (`ShardImage`, *optional*): a map to predict.
    """

    key: str
    source: str
    split: str
    group_id: str
    images: dict[str, ShardImage]
    pair_id: str | None = None
    bounds: list[float] | None = None
    labels: list[str] | None = None
    target: ShardImage | None = None


def valid_pixels(pixels: np.ndarray, nodata: float | None) -> np.ndarray:
    """Bool `(H, W)` of an image `(C, H, W)`: False where any band is nodata or not finite."""
    valid = np.ones(pixels.shape[1:], dtype=bool)
    if pixels.dtype.kind == "f":
        valid &= np.isfinite(pixels).all(axis=0)
    if nodata is not None:
        valid &= (pixels != nodata).all(axis=0)
    return valid


def shard_schema(sensors, levels: dict[str, str | None] | None = None, classes: list[str] | None = None) -> pa.Schema:
    """The Arrow schema of every file of a source.

    Args:
        sensors (`Iterable[str]`): sensor ids of the source. The columns of `rgb, s2, s1, dsm` are always there.
        levels (`dict[str, str]`, *optional*): processing level per sensor.
        classes (`list[str]`, *optional*): names of the ids of a map in `target`: id = index, 255 = unlabelled.

    Raises:
        ValueError: if a sensor id collides with another column, or for more than 255 classes.
    """
    meta = pa.struct(
        [
            ("encoding", pa.string()),
            ("dtype", pa.string()),
            ("shape", pa.list_(pa.int32())),
            ("bands", pa.list_(pa.string())),
            ("gsd", pa.float64()),
            ("crs", pa.string()),
            ("transform", pa.list_(pa.float64())),
            ("nodata", pa.float64()),
            ("scale", pa.float64()),
            ("offset", pa.float64()),
            ("units", pa.string()),
            ("datetime", pa.string()),
        ]
    )
    fields = [(name, pa.string()) for name in ("key", "source", "split", "group_id", "pair_id")]
    fields.append(("sensors", pa.list_(pa.string())))
    for sensor in sorted({*COMMON_SENSORS, *sensors}):
        fields += [(sensor, pa.large_binary()), (f"{sensor}_meta", meta)]
    fields += [("bounds", pa.list_(pa.float64())), ("labels", pa.list_(pa.string()))]
    fields += [("target", pa.large_binary()), ("target_meta", meta)]
    names = [name for name, _ in fields]
    if len(set(names)) != len(names):
        raise ValueError(
            f"`sensors` must not be named like another column, got {sorted(sensors)}. "
            "Choose ids other than key, source, split, bounds, labels, target and <sensor>_meta."
        )
    if classes is not None and len(classes) > UNLABELLED:
        raise ValueError(
            f"`classes` must be at most {UNLABELLED} names, got {len(classes)}. Maps hold ids as uint8, and "
            f"{UNLABELLED} is unlabelled: merge classes."
        )
    known = {sensor: level for sensor, level in sorted((levels or {}).items()) if level is not None}
    metadata = {"msgfm_shard_version": str(SHARD_VERSION), "msgfm_levels": json.dumps(known)}
    if classes is not None:
        metadata["msgfm_classes"] = json.dumps(list(classes))
    return pa.schema(fields, metadata=metadata)


class ShardRules:
    """What all rows of a source keep to, and the schema that follows: its name, sensors, levels, and sound images.

    Args:
        source (`str`): the name of the source.
        sensors (`Iterable[str]`): sensor ids; every row has an image of each.
        levels (`dict[str, str]`, *optional*): processing level of each sensor that has levels.
        classes (`list[str]`, *optional*): names of the ids of a map in `target`: id = index, 255 = unlabelled.
        check (`bool`): refuse images whose medians are implausible for their unit (`MsGFMImageProcessor.check`).

    Raises:
        ValueError: for a name, sensor or level that does not fit the schema.
    """

    def __init__(
        self,
        source: str,
        sensors,
        levels: dict[str, str] | None = None,
        classes: list[str] | None = None,
        check: bool = True,
    ):
        self.source, self.sensors = source, sorted(sensors)
        if not re.fullmatch(r"\w[\w.-]*", source):
            raise ValueError(f"`source` must be a plain folder name, got {source!r}. Use letters, digits, '_' and '-'.")
        if not self.sensors:
            raise ValueError(f"`sensors` must name at least one sensor, got {sensors!r}. Rows hold pixels.")
        levels = dict(levels or {})
        for sensor in self.sensors:
            known = SENSORS[sensor].levels if sensor in SENSORS else ()
            if known and levels.get(sensor) not in known:
                raise ValueError(
                    f"`levels` must say which of {', '.join(known)} sensor {sensor!r} has, got {levels.get(sensor)!r}. "
                    "Statistics differ between levels."
                )
        known = {sensor: SENSORS[sensor] for sensor in self.sensors if sensor in SENSORS}
        self._processor = MsGFMImageProcessor(sensors=known) if check and known else None
        self.schema = shard_schema(self.sensors, levels, classes)
        self._kinds: dict[str, tuple] = {}

    def check(self, row: ShardRow):
        """Refuse a row that is not one of this source.

        Raises:
            ValueError: for another source, sensors, bands, units or dtype than those of the rows before, images without
                sound shapes, names or numbers, and implausible values.
        """
        if row.source != self.source:
            raise ValueError(f"`source` of a row must be {self.source!r}, got {row.source!r}. One writer, one source.")
        if not re.fullmatch(r"\w+", row.split):
            raise ValueError(f"`split` must be one word, got {row.split!r}. Usual are train, val and test.")
        if sorted(row.images) != self.sensors:
            raise ValueError(
                f"`images` must hold the sensors {', '.join(self.sensors)}, got {', '.join(sorted(row.images))} "
                f"(row {row.key!r}). A source is paired throughout or not at all: write two sources."
            )
        for sensor, image in row.images.items():
            _check_image(sensor, image)
            kind = (list(image.bands), image.units, image.pixels.dtype.name)
            expected = self._kinds.setdefault(sensor, kind)
            if kind != expected:
                raise ValueError(_unequal_rows(sensor, expected, kind, f"row {row.key!r}"))
            if self._processor is not None and sensor in SENSORS:
                self._check_values(row.key, sensor, image)
        if row.target is not None:
            _check_image("target", row.target)
        if row.bounds is not None and len(row.bounds) != 4:
            raise ValueError(f"`bounds` must be west, south, east, north, got {row.bounds}. Four numbers in degrees.")

    def _check_values(self, key: str, sensor: str, image: ShardImage):
        # The medians of every n-th pixel tell as much as those of all, in a fraction of the time.
        step = max(1, min(image.pixels.shape[1:]) // 64)
        thinned = dataclasses.replace(image, pixels=image.pixels[:, ::step, ::step])
        pixels = torch.from_numpy(np.array(thinned.pixels, image.pixels.dtype.newbyteorder("=")))[None]
        valid = torch.from_numpy(thinned.valid_mask())[None]
        try:
            self._processor.check(pixels, valid, sensor, image.bands, image.units, image.scale, image.offset_dn)
        except ValueError as error:
            raise ValueError(f"{error} This is row {key!r} of source {self.source!r}.") from error
        if image.units in _LEAST:
            lowest = np.where(image.valid_mask(), image.pixels, np.inf).min() * image.scale + image.offset
            if lowest < _LEAST[image.units]:
                stored = (lowest - image.offset) / image.scale
                raise ValueError(
                    f"`nodata` of sensor {sensor!r} must be said where pixels are no measurements, got a value of "
                    f"{stored:g} that counts as valid (row {key!r} of source {self.source!r}). Add `nodata={stored:g}` "
                    "to its input, or to the file."
                )


class ShardFile:
    """Writes one Parquet file of a source; a context manager. Where it ends with an error the file is removed.

    The file is complete and on disk when the context is left; until then it is no Parquet file, so readers must not
    meet it: give it a hidden folder or name, and rename it afterwards.

    Args:
        path (`str` or `Path`): the file.
        rules (`ShardRules`): those of its source.

    Attributes:
        rows (`int`): rows written so far.
    """

    def __init__(self, path, rules: ShardRules):
        self.path, self.rules, self.rows = Path(path), rules, 0
        self._records: list[dict] = []

    def __enter__(self):
        self._stream = open(self.path, "wb")
        self._writer = pq.ParquetWriter(
            self._stream, self.rules.schema, compression="none", use_dictionary=False, write_page_checksum=True
        )
        return self

    def __exit__(self, kind, error, trace):
        whole = False
        try:
            with self._stream:
                if kind is None:
                    self._flush()
                self._writer.close()
                self._stream.flush()
                os.fsync(self._stream.fileno())
            whole = kind is None
        finally:
            if not whole:
                self.path.unlink(missing_ok=True)

    def write(self, row: ShardRow):
        """Add a row that `ShardRules.check` has passed."""
        record = {
            "key": row.key,
            "source": row.source,
            "split": row.split,
            "group_id": row.group_id,
            "pair_id": row.pair_id,
            "sensors": self.rules.sensors,
            "bounds": None if row.bounds is None else [float(degrees) for degrees in row.bounds],
            "labels": row.labels,
        }
        for column, image in (*row.images.items(), ("target", row.target)):
            if image is not None:
                record[column], record[f"{column}_meta"] = _encode(image)
        self._records.append(record)
        self.rows += 1
        if len(self._records) == ROW_GROUP_SIZE:
            self._flush()

    def _flush(self):
        records, self._records = self._records, []
        if records:
            schema = self.rules.schema
            columns = [pa.array([record.get(f.name) for record in records], type=f.type) for f in schema]
            self._writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=ROW_GROUP_SIZE)


class ShardWriter:
    """Writes the folder of one source; a context manager.

    Rows go to `out_dir/<source>/<split>-00000.parquet` and so on. Everything is written to a hidden folder beside it,
    which takes its name only when the last row is on disk: a folder with the source's name is always whole.

    Args:
        out_dir (`str` or `Path`): the folder of all sources.
        source, sensors, levels, classes, check: as of `ShardRules`.
        rows_per_file (`int`): a multiple of 16 keeps all row groups full.
        overwrite (`bool`): replace the source if it exists.

    Raises:
        ValueError: for a name, sensor, level or row that does not fit the schema, or if the source exists.
    """

    def __init__(
        self,
        out_dir,
        source: str,
        sensors,
        levels: dict[str, str] | None = None,
        classes: list[str] | None = None,
        rows_per_file: int = ROWS_PER_FILE,
        overwrite: bool = False,
        check: bool = True,
    ):
        self.out_dir = Path(out_dir)
        self.overwrite = overwrite
        self.rows_per_file = rows_per_file
        self.counts: dict[str, int] = {}
        if rows_per_file < 1:
            raise ValueError(f"`rows_per_file` must be at least 1, got {rows_per_file}. The default is 256.")
        self.rules = ShardRules(source, sensors, levels, classes, check)
        self.folder = self.out_dir / source
        self._check_free()
        self._partial = self.out_dir / f".{source}-{os.getpid()}.partial"
        self._keys: set[str] = set()
        self._files: dict[str, ShardFile] = {}

    def __enter__(self):
        if self._partial.exists():
            shutil.rmtree(self._partial)
        self._partial.mkdir(parents=True)
        try:
            self._clear_leftovers()
            self._check_free()
        except BaseException:
            shutil.rmtree(self._partial)
            raise
        return self

    def __exit__(self, kind, error, trace):
        try:
            for split in list(self._files):
                self._files.pop(split).__exit__(kind, error, trace)
            if kind is None:
                self._check_free()
                if self.folder.exists():
                    former = self._partial.with_suffix(".former")
                    os.replace(self.folder, former)
                    try:
                        os.replace(self._partial, self.folder)
                    except BaseException:
                        os.replace(former, self.folder)
                        raise
                    shutil.rmtree(former)
                else:
                    os.replace(self._partial, self.folder)
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)
            shutil.rmtree(self._partial.with_suffix(".scratch"), ignore_errors=True)

    def write_table(self, name: str, lines: Iterable[Sequence[str]]):
        """Add a CSV beside the rows, of that name."""
        with open(self._partial / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)

    def make_scratch(self) -> Path:
        """A folder beside the source for what is needed while it is written; it goes with the writer, however that
        ends: the next writer of the source removes what a killed one left."""
        folder = self._partial.with_suffix(".scratch")
        folder.mkdir()
        return folder

    def write(self, row: ShardRow):
        """Add a row. Bands, units and dtype of a sensor are the same in all rows of a source."""
        if row.key in self._keys:
            raise ValueError(f"`key` must be unique in its source, got {row.key!r} twice. Add the date or the tile.")
        self.rules.check(row)
        if row.split not in self._files:
            number = self.counts.get(row.split, 0) // self.rows_per_file
            file = ShardFile(self._partial / f"{row.split}-{number:05d}.parquet", self.rules)
            self._files[row.split] = file.__enter__()
        self._files[row.split].write(row)
        self._keys.add(row.key)
        self.counts[row.split] = self.counts.get(row.split, 0) + 1
        if self.counts[row.split] % self.rows_per_file == 0:
            self._files.pop(row.split).__exit__(None, None, None)

    def _clear_leftovers(self):
        """Remove what killed writers of this source left, and put back a source that one was about to replace."""
        name = re.compile(rf"\.{re.escape(self.rules.source)}-(\d+)\.(partial|former|scratch)")
        for path in sorted(self.out_dir.iterdir()):
            match = name.fullmatch(path.name)
            if match is None or _is_running(int(match[1])):
                continue
            if match[2] == "former" and not self.folder.exists():
                os.replace(path, self.folder)
            else:
                shutil.rmtree(path)

    def _check_free(self):
        if self.folder.exists() and not self.overwrite:
            raise ValueError(
                f"`out_dir` must not hold the source already, got {self.folder}. "
                "Write to another folder, or pass `overwrite=True`."
            )


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # It is another user's.
        return True
    return True


def find_sources(path) -> list[str]:
    """Folders of sources: the folder itself if it holds shards, else those of its children that do, sorted.

    Raises:
        ValueError: if there is none.
    """
    fs, root = fsspec.core.url_to_fs(str(path))
    if _holds_shards(fs, root):
        return [str(path)]
    # Hidden folders are those that a writer is still filling.
    folders = [entry["name"].rstrip("/") for entry in _entries(fs, root) if entry["type"] == "directory"]
    names = sorted(folder.rsplit("/", 1)[-1] for folder in folders if _holds_shards(fs, folder))
    children = [name for name in names if not name.startswith(".")]
    if not children:
        raise ValueError(
            "`data` must be a folder of shards such as train-00000.parquet, or a folder of such folders, "
            f"got {str(path)!r}. `msgfm shards` makes one."
        )
    return [f"{str(path).rstrip('/')}/{child}" for child in children]


def _entries(fs: fsspec.AbstractFileSystem, folder: str) -> list[dict]:
    # Listed, not globbed: brackets in a path are no pattern.
    try:
        return fs.ls(folder, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _holds_shards(fs: fsspec.AbstractFileSystem, folder: str) -> bool:
    names = (entry["name"].rsplit("/", 1)[-1] for entry in _entries(fs, folder))
    return any("-" in name and name.endswith(".parquet") for name in names)


class ShardSource:
    """Reads one split of the folder of one source, local or behind any fsspec URL (`hf://...`).

    Files are opened when first read, so a source may be pickled into the workers of a `DataLoader`.

    Args:
        path (`str` or `Path`): the folder.
        split (`str`): the split.
        sensors (`list[str]`, *optional*): the sensors to read; all of them by default.

    Attributes:
        name (`str`): the source's name.
        sensors (`list[str]`): those read, sorted.
        bands, units, dtypes, levels (`dict`): by sensor: band names, unit, numpy dtype name, level or `None`.
        classes (`list[str]` or `None`): names of the ids of the map in `target`.
        row_groups (`list[tuple]`): `(file, row group, first row, rows)` of every row group.

    Raises:
        ValueError: if the folder holds no shards of this version, not this split, or not these sensors, or if the
            files of the source disagree in sensors, bands, units or dtype.
        CorruptShardError: if a file cannot be opened.
    """

    def __init__(self, path, split: str = "train", sensors: list[str] | None = None):
        self.path, self.split = str(path), split
        self._fs, files = _shard_files(self.path)
        self._local = isinstance(self._fs, LocalFileSystem)
        self._forget()
        if split not in files:
            raise ValueError(
                f"`split` must be one of {', '.join(sorted(files))}, got {split!r} for {self.path}. "
                "Choose one of these, or make shards with this split."
            )
        self.row_groups: list[tuple[str, int, int, int]] = []
        kinds = None
        for file in files[split]:
            handle = self._open(file, verify=False)
            metadata = handle.metadata.metadata or {}
            version = metadata.get(b"msgfm_shard_version", b"none").decode()
            if version != str(SHARD_VERSION):
                raise ValueError(
                    f"`path` must hold shards of version {SHARD_VERSION}, got version {version} in {file}. "
                    "Make the shards with this version of the package."
                )
            if handle.metadata.num_rows == 0:
                continue
            first = self._first_row(handle, file)
            if kinds is None:
                kinds = first
                self.name = first["source"]
                levels = json.loads(metadata.get(b"msgfm_levels", b"{}"))
                self.classes: list[str] | None = json.loads(metadata.get(b"msgfm_classes", b"null"))
            elif first["sensors"] != kinds["sensors"]:
                raise ValueError(
                    f"`sensors` must be the same in all rows of a source, got {kinds['sensors']} and "
                    f"{first['sensors']} ({file}). Write two sources."
                )
            for sensor, kind in first["kinds"].items():
                if kind != kinds["kinds"][sensor]:
                    raise ValueError(_unequal_rows(sensor, kinds["kinds"][sensor], kind, file))
            for group in range(handle.metadata.num_row_groups):
                start = sum(self.row_groups[-1][2:]) if self.row_groups else 0
                self.row_groups.append((file, group, start, handle.metadata.row_group(group).num_rows))
        if kinds is None:
            raise ValueError(f"`path` must hold rows of split {split!r}, got none in {self.path}. Make it again.")
        missing = sorted(set(sensors or ()) - set(kinds["sensors"]))
        if missing:
            raise ValueError(
                f"`sensors` must be among {', '.join(kinds['sensors'])}, got {', '.join(missing)} for {self.path}. "
                "Leave them out, or name another source."
            )
        self.sensors = sorted(sensors or kinds["sensors"])
        self.bands = {sensor: kinds["kinds"][sensor][0] for sensor in self.sensors}
        self.units = {sensor: kinds["kinds"][sensor][1] for sensor in self.sensors}
        self.dtypes = {sensor: kinds["kinds"][sensor][2] for sensor in self.sensors}
        self.levels = {sensor: levels.get(sensor) for sensor in self.sensors}
        self._starts = np.array([first for _, _, first, _ in self.row_groups])

    def __len__(self) -> int:
        _, _, first, rows = self.row_groups[-1]
        return first + rows

    def __getstate__(self):
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_handles", "_decoded", "_verified", "_process")
        }

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._forget()

    def read(self, index: int, verify: bool = False) -> dict:
        """One row.

        Args:
            index (`int`): row number in the split, over all files.
            verify (`bool`): check the page checksums of its row group, the first time that this process reads it.

        Returns:
            `dict`: `key`, `group_id`, `pair_id`, `bounds`, `labels`, `images` (`{sensor: ShardImage}`) and `target`
            (`ShardImage` or `None`), as in `ShardRow`. The pixels are read-only views.

        Raises:
            CorruptShardError: naming the file and the row.
            IndexError: beyond the last row.
            ValueError: if bands, units or dtype differ from those of the source.
        """
        file, stored, pixels = self._row_group(index, verify)
        row = {name: stored[name] for name in _ROW_COLUMNS}
        where = f"{file}, row {index} (key {row['key']!r})"
        row["images"] = {}
        for sensor in self.sensors:
            meta = stored[f"{sensor}_meta"]
            if meta is None:
                raise CorruptShardError(f"`{sensor}` must be present, got null in {where}. {_REMEDY}")
            kind = (meta["bands"], meta["units"], meta["dtype"])
            expected = (self.bands[sensor], self.units[sensor], self.dtypes[sensor])
            if kind != expected:
                raise ValueError(_unequal_rows(sensor, expected, kind, where))
            row["images"][sensor] = _decode(pixels[sensor], meta, sensor, where)
        target = stored["target_meta"]
        row["target"] = None if target is None else _decode(pixels["target"], target, "target", where)
        return row

    def read_metadata(self, indices: Sequence[int] | None = None) -> list[dict]:
        """Rows without their pixels: `key`, `group_id`, `pair_id`, `bounds`, `labels` and `images`, which maps each
        sensor to its `encoding, dtype, shape, bands, gsd, crs, transform, nodata, scale, offset, units, datetime`.

        Args:
            indices (`Sequence[int]`, *optional*): ascending row numbers; only their row groups are read. Default all.

        Raises:
            CorruptShardError: naming the file and the rows.
        """
        wanted = range(len(self)) if indices is None else indices
        groups = sorted({int(number) for number in np.searchsorted(self._starts, wanted, side="right") - 1})
        rows = {}
        for file, group, first, count in (self.row_groups[number] for number in groups):
            names = [*_ROW_COLUMNS, *(f"{sensor}_meta" for sensor in self.sensors)]
            found = self._read(file, group, names, f"rows {first} to {first + count - 1}")[0]
            for number, stored in enumerate(found, first):
                row = {name: stored[name] for name in _ROW_COLUMNS}
                rows[number] = row | {"images": {sensor: stored[f"{sensor}_meta"] for sensor in self.sensors}}
        return [rows[number] for number in wanted]

    def _forget(self):
        self._handles: dict = {}
        self._decoded: dict = {}
        self._verified: set[int] = set()
        self._process = os.getpid()

    def _row_group(self, index, verify):
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be in [0, {len(self)}), got {index}. Count the rows with `len`.")
        if self._process != os.getpid():
            # After a fork, positions of inherited files are shared with the parent.
            self._forget()
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        verify = verify and number not in self._verified
        rows, pixels = self._decoded.pop(number, (None, None))
        file, group, first, count = self.row_groups[number]
        if rows is None or verify:
            names = [*_ROW_COLUMNS, *(f"{column}_meta" for column in (*self.sensors, "target"))]
            where = f"row {index} (among rows {first} to {first + count - 1})"
            rows, pixels = self._read(file, group, names, where, (*self.sensors, "target"), verify)
            if verify:
                self._verified.add(number)
        self._decoded[number] = (rows, pixels)
        while len(self._decoded) > BLOCK_ROW_GROUPS:
            self._decoded.pop(next(iter(self._decoded)))
        return file, rows[index - first], {name: payloads[index - first] for name, payloads in pixels.items()}

    def _read(self, file, group, columns, where, pixels=(), verify=False):
        """Rows of a row group as dictionaries of `columns`, and the payloads of the columns `pixels`."""
        try:
            handle = self._open(file, verify)
            table = handle.read_row_group(group, columns=[*columns, *pixels], use_threads=False)
            payloads = {name: _payloads(table.column(name)) for name in pixels}
            return table.drop_columns(list(pixels)).to_pylist(), payloads
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if not _is_damage(error):
                raise
            raise CorruptShardError(f"`{file}` must be readable, got damage at {where}: {error}. {_REMEDY}") from error

    def _open(self, file, verify):
        handle = self._handles.pop((file, verify), None)
        if handle is None:
            try:
                handle = pq.ParquetFile(
                    file if self._local else self._fs.open(file, "rb"),
                    memory_map=self._local,
                    pre_buffer=not self._local,
                    page_checksum_verification=verify,
                )
            except (pa.ArrowException, OSError) as error:
                if not _is_damage(error):
                    raise
                raise CorruptShardError(
                    f"`{file}` must be a whole Parquet file, got none of its rows readable: {error}. {_REMEDY}"
                ) from error
        self._handles[(file, verify)] = handle
        while len(self._handles) > _OPEN_FILES:
            self._handles.pop(next(iter(self._handles)))
        return handle

    def _first_row(self, handle, file):
        sensors = [name for name in handle.schema_arrow.names if f"{name}_meta" in handle.schema_arrow.names]
        columns = ["source", "sensors", *(f"{sensor}_meta" for sensor in sensors)]
        row = self._read(file, 0, columns, "row 0 of the file")[0][0]
        metas = {sensor: row[f"{sensor}_meta"] for sensor in row["sensors"]}
        return {
            "source": row["source"],
            "sensors": row["sensors"],
            "kinds": {sensor: (meta["bands"], meta["units"], meta["dtype"]) for sensor, meta in metas.items()},
        }


_REMEDY = "Fetch or make the file again; `msgfm inspect --verify` finds all damaged rows."


def _is_damage(error: Exception) -> bool:
    """Whether the bytes are at fault. A missing file or a lost connection has an exception type of its own."""
    return isinstance(error, pa.ArrowException | UnicodeDecodeError) or type(error) is OSError


def shard_splits(path) -> list[str]:
    """The splits in the folder of a source.

    Raises:
        ValueError: if the folder holds no shards.
    """
    return sorted(_shard_files(str(path))[1])


def _shard_files(path: str) -> tuple[fsspec.AbstractFileSystem, dict[str, list[str]]]:
    fs, root = fsspec.core.url_to_fs(path)
    names = sorted(entry["name"] for entry in _entries(fs, root))
    files: dict[str, list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(\w+)-\d+\.parquet", name.rsplit("/", 1)[-1])
        if match:
            files.setdefault(match[1], []).append(name)
    if not files:
        raise ValueError(
            f"`path` must be a folder of shards such as train-00000.parquet, got {path}. "
            "Name the folder of one source; `msgfm shards` makes one."
        )
    return fs, files


def _unequal_rows(sensor, expected, got, where) -> str:
    return (
        f"`bands`, `units` and dtype of sensor {sensor!r} must be the same in all rows of a source, "
        f"got {expected} and {got} ({where}). Convert them, or write two sources."
    )


def _check_image(sensor: str, image: ShardImage):
    if image.pixels.ndim != 3 or image.pixels.dtype.kind not in "uif" or 0 in image.pixels.shape:
        raise ValueError(
            f"`pixels` of {sensor!r} must be a non-empty numeric array (C, H, W), "
            f"got shape {image.pixels.shape}, {image.pixels.dtype}. Add the band axis or convert the dtype."
        )
    if len(image.bands) != len(image.pixels):
        raise ValueError(
            f"`bands` of {sensor!r} must name each of the {len(image.pixels)} bands, got {image.bands}. "
            "Select the bands by name when reading the file."
        )
    if sensor in SENSORS and list(image.bands) != [SENSORS[sensor].resolve(band) for band in image.bands]:
        canonical = [SENSORS[sensor].resolve(band) for band in image.bands]
        raise ValueError(f"`bands` of {sensor!r} must have canonical names, got {image.bands}. Use {canonical}.")
    if sensor != "target" and image.units not in UNITS:
        raise ValueError(f"`units` of {sensor!r} must be one of {', '.join(UNITS)}, got {image.units!r}. Convert it.")
    if not (np.isfinite(image.scale) and np.isfinite(image.offset) and image.scale != 0):
        raise ValueError(
            f"`scale` and `offset` of {sensor!r} must be finite and `scale` not 0, "
            f"got {image.scale} and {image.offset}. physical = stored * scale + offset."
        )
    if image.transform is not None and len(image.transform) != 6:
        raise ValueError(f"`transform` of {sensor!r} must have 6 numbers, got {image.transform}. Use GDAL's order.")


def _encode(image: ShardImage) -> tuple[bytes, dict]:
    pixels = np.ascontiguousarray(image.pixels, dtype=image.pixels.dtype.newbyteorder("<"))
    meta = {field.name: getattr(image, field.name) for field in dataclasses.fields(image) if field.name != "pixels"}
    meta |= {"encoding": "raw", "dtype": pixels.dtype.name, "shape": list(pixels.shape), "bands": list(image.bands)}
    return pixels.tobytes(), meta


def _payloads(column: pa.ChunkedArray) -> list[pa.Buffer | None]:
    """The bytes of each row as views; taking Arrow scalars instead would copy them."""
    views: list[pa.Buffer | None] = []
    for chunk in column.cast(pa.large_binary()).chunks:
        _, offsets, values = chunk.buffers()
        ends = np.frombuffer(offsets, dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        present = chunk.is_valid().to_pylist()
        views += [
            values.slice(start, end - start) if here and values is not None else None
            for start, end, here in zip(ends[:-1], ends[1:], present, strict=True)
        ]
    return views


def _decode(buffer: pa.Buffer | None, meta: dict, column: str, where: str) -> ShardImage:
    if buffer is None:
        raise CorruptShardError(f"`{column}` must hold pixels, got null in {where}. {_REMEDY}")
    encoding = meta["encoding"]
    try:
        shape, dtype = tuple(meta["shape"]), np.dtype(meta["dtype"]).newbyteorder("<")
        _, _, _ = shape
    except (TypeError, ValueError) as error:
        raise CorruptShardError(
            f"`{column}_meta` must give a dtype and the shape (C, H, W), "
            f"got {meta['dtype']} and {meta['shape']} in {where}. {_REMEDY}"
        ) from error
    if encoding == "raw":
        expected = int(np.prod(shape)) * dtype.itemsize
        if buffer.size != expected:
            raise CorruptShardError(
                f"`{column}` must hold {expected} bytes for {shape} {dtype.name}, "
                f"got {buffer.size} in {where}. {_REMEDY}"
            )
        pixels = np.frombuffer(buffer, dtype=dtype).reshape(shape)
    elif encoding in ("tiff", "jpeg", "png"):
        try:
            pixels = _decode_tiff(buffer) if encoding == "tiff" else _decode_picture(buffer)
        except Exception as error:  # decoders raise whatever the damaged bytes lead them to
            raise CorruptShardError(f"`{column}` must be {encoding}, got {error} in {where}. {_REMEDY}") from error
        if pixels.shape != shape or pixels.dtype != dtype:
            raise CorruptShardError(
                f"`{column}` must decode to {shape} {dtype.name}, "
                f"got {pixels.shape} {pixels.dtype} in {where}. {_REMEDY}"
            )
    else:
        raise CorruptShardError(
            f"`encoding` of {column!r} must be raw, tiff, jpeg or png, got {encoding!r} in {where}. {_REMEDY}"
        )
    known = {name: meta[name] for name in meta if name not in ("encoding", "dtype", "shape")}
    return ShardImage(pixels=pixels, **known)


def _decode_tiff(buffer) -> np.ndarray:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(buffer)) as file:
        page = file.series[0]
        pixels = page.asarray()
        if pixels.ndim == 2:
            return pixels[None]
        return np.moveaxis(pixels, -1, 0) if page.axes.endswith("S") else pixels


def _decode_picture(buffer) -> np.ndarray:
    import PIL.Image

    with PIL.Image.open(io.BytesIO(buffer)) as file:
        pixels = np.asarray(file)
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
