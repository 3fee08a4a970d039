"""Major-TOM Core, streamed: cells of several of its data sets, paired as they come, without conversion.

Core (arXiv 2402.12095) lies on the Hub as Parquet files with one place of 10.68 km per row and each band as a GeoTIFF
in a column of its own: Core-S2L2A and Core-S2L1C (digital numbers, bands of 10, 20 and 60 m), Core-S1RTC (linear power,
10 m) and Core-DEM (Copernicus DEM in metres, 30 m). `grid_cell` names the place in all of them, and all are ordered by
it, from south to north and then from west to east. So the data sets are read beside each other, each once.
"""

import contextlib
import dataclasses
import re
import weakref
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import get_worker_info
from tqdm.auto import tqdm

from msgfm_hf.data.geotiff import (
    GRID_TOLERANCE,
    corner_distance,
    crs_name,
    geo_module,
    knows_band,
    open_geotiff,
    wgs84_bounds,
)
from msgfm_hf.data.mixture import grid_crops
from msgfm_hf.data.shards import CorruptShardError, ShardImage, valid_pixels
from msgfm_hf.data.splits import hashed_fraction
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.sensors import SENSORS, SensorSpec

SPLITS = ("train", "val")


@dataclass(frozen=True)
class _Core:
    """What Core stores for a sensor: its dataset card and the headers of its files."""

    unit: str
    dtype: str
    nodata: float


_CORE = {
    "s2": _Core("dn", "uint16", 0.0),
    "s1": _Core("power", "float32", -32768.0),
    "dsm": _Core("metres", "float32", -32767.0),
}
_CELL = re.compile(r"(\d+)([UD])_(\d+)([LR])")
# Sentinel-2 products since processing baseline 04.00 carry 1000 more than the reflectance times 10,000.
_OFFSET_BASELINE, _OFFSET_DN, _OFFSET_SINCE = 400, -1000.0, "20220126"
# Products that Copernicus' data centre made with Sen2Cor have no baseline of ESA's.
_NO_BASELINE = 9999
_REMEDY = "Fetch the file again, or let the rows be left out."
_REASONS = ("unpaired", "projection", "offset", "unnamed")


def offset_from_product_id(product_id: str | None) -> float | None:
    """The offset of a Sentinel-2 product in digital numbers, from its name.

    Args:
        product_id (`str`): as `S2B_MSIL2A_20230415T181919_N0509_R127_T12TVK_20230415T211527`: the number behind `N` is
            the processing baseline.

    Returns:
        -1000 from baseline 04.00 on, else 0; `None` where the name does not tell. N9999 is the mark of Sen2Cor outside
        ESA's baselines, which hands down the offset of its input. Since 26 January 2022 every input has it; before,
        some have and some have not.
    """
    found = re.search(r"_(\d{8})T\d{6}_N(\d{4})_", product_id or "")
    if found is None:
        return None
    sensed, baseline = found[1], int(found[2])
    if baseline == _NO_BASELINE:
        return _OFFSET_DN if sensed >= _OFFSET_SINCE else None
    return _OFFSET_DN if baseline >= _OFFSET_BASELINE else 0.0


class StreamOrder:
    """The order of a source that cannot be permuted: the row at a position is that position.

    Args:
        rows (`int`): rows that count as an epoch.
    """

    def __init__(self, rows: int):
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, position: int) -> int:
        return position


class MajorTomSource:
    """Tiles of paired Major-TOM Core cells, in the place of a `ShardSource`, read forwards only and without end.

    The first data set of `paths` leads: its cells are taken in stored order and its pixels give the grid. Each other
    one is searched for the cell, at most `window` rows ahead. Cells that one of them lacks are left out and counted in
    `skipped`, and so are those whose projections differ (by its card, 2.5 % of Core-DEM lies in another UTM zone than
    Core-S2L2A) or whose offset is not known. Coarser bands are repeated to the finest; other data sets are resampled
    bilinearly.

    `block_cells` cells make a block; their tiles come mixed, in an order drawn by (seed, name, position). Positions go
    on behind the last cell with the first one: an epoch has as many rows as the stream has, whatever `num_rows` says.
    What a row holds is a function of the data, the arguments and its position alone.

    Every process streams everything and decodes what it reads, so W processes fetch W times as much. Memory, at Core's
    size with three sensors: about 10 MB for each row that waits, at most 2 `window` of each data set but the first, and
    40 MB for each cell of two blocks. A stream knows no regions. Name the files of one, such as
    `Major-TOM/Core-S2L2A/images/part_03*.parquet`: where data sets begin in different places, much is fetched before
    the first pair.

    Args:
        paths (`dict[str, str]`): `s2`, `s1`, `dsm` or some of them -> a data set: a repository of the Hub, with a
            pattern of files behind it or not (by default `images/*.parquet`; `Major-TOM/Core-DEM@REVISION/...` holds
            on to a revision); a local folder of Parquet files, or with a folder `images` of them; or a local pattern.
        num_rows (`int`): rows that count as an epoch, for planning; about 16 times the cells for the default size.
        split (`str`): `train` or `val`.
        name (`str`): the source's name.
        seed (`int`): of the order.
        tile_size (`int`): side of a tile in pixels. Tiles lie in a centred grid; the rest of a cell stays unseen.
        block_cells (`int`): cells of a block.
        window (`int`): rows by which the order of a data set may differ from that of the first.
        val_share (`float`): share of the cells that `val` holds and `train` does not, by a hash of the cell's name.
            Neighbouring cells overlap by up to 680 m. Both splits fetch all cells.
        unknown_offset_dn (`float`, *optional*): the offset of Sentinel-2 products whose name does not tell it (see
            `offset_from_product_id`). By default their cells are left out.
        max_unpaired (`int`): after so many cells without a single pair from the beginning, reading fails.

    Attributes:
        sensors (`list[str]`): sorted.
        bands, units, dtypes, levels (`dict`): by sensor: band names, unit, numpy dtype name, level or `None`.
        skipped (`dict[str, int]`): cells of the first data set left out so far: `unpaired`, `projection`, `offset`,
            and `unnamed` for rows without a cell.

    Raises:
        ValueError: for arguments out of range, or data sets that lack columns.
        OSError: if a data set cannot be opened.
        ImportError: without datasets or rasterio.
    """

    def __init__(
        self,
        paths: dict[str, str],
        num_rows: int,
        split: str = "train",
        name: str = "majortom",
        seed: int = 0,
        tile_size: int = 256,
        block_cells: int = 8,
        window: int = 32,
        val_share: float = 0.01,
        unknown_offset_dn: float | None = None,
        max_unpaired: int = 2000,
    ):
        unknown = sorted(set(paths) - set(_CORE))
        if unknown or not paths:
            raise ValueError(
                f"`paths` must name data sets for some of {', '.join(_CORE)}, got {', '.join(unknown) or 'none'}. "
                "Other archives are converted to shards."
            )
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}. A stream has no others.")
        counts = {"num_rows": num_rows, "tile_size": tile_size, "block_cells": block_cells, "window": window}
        for argument, count in (counts | {"max_unpaired": max_unpaired}).items():
            if count < 1:
                raise ValueError(f"`{argument}` must be at least 1, got {count}. Raise it.")
        if not 0 <= val_share < 1:
            raise ValueError(f"`val_share` must be at least 0 and below 1, got {val_share}. The default is 0.01.")
        geo_module("rasterio")  # not to miss it at the first row
        self.name, self.split, self.seed = name, split, seed
        self.path = ", ".join(str(path) for path in paths.values())
        self.num_rows, self.tile_size, self.block_cells, self.window = num_rows, tile_size, block_cells, window
        self.val_share, self.unknown_offset_dn, self.max_unpaired = val_share, unknown_offset_dn, max_unpaired
        self._streams = [_Stream(sensor, str(path)) for sensor, path in paths.items()]
        self.sensors = sorted(paths)
        self.bands = {stream.sensor: list(stream.columns) for stream in self._streams}
        self.levels = {stream.sensor: stream.level for stream in self._streams}
        self.units = {sensor: _CORE[sensor].unit for sensor in paths}
        self.dtypes = {sensor: _CORE[sensor].dtype for sensor in paths}
        self._processor = MsGFMImageProcessor(sensors={sensor: SENSORS[sensor] for sensor in paths})
        self._blocks: list[_Block] = []
        self._size: tuple[int, int] | None = None
        self._corners: list[tuple[int, int]] = []
        self._held: dict[str, dict[str, _Held]] = {}
        self._pulled: dict[str, int] = {}
        self._cells = self._paired = 0  # of this epoch
        beginning = {stream.sensor: {"state": None, "rows": 0, "held": []} for stream in self._streams}
        self._resume: dict | None = {
            "first": 0,
            "cells": 0,
            "paired": 0,
            "size": None,
            "skipped": dict.fromkeys(_REASONS, 0),
            "streams": beginning,
        }
        self.skipped: dict[str, int] = dict(self._resume["skipped"])

    def __len__(self) -> int:
        return self.num_rows

    @property
    def held_rows(self) -> int:
        """Rows of all data sets in memory: those that wait for a partner, and those of the last two blocks."""
        waiting = sum(len(held) for held in self._held.values())
        return waiting + len(self._streams) * sum(len(block.cells) for block in self._blocks)

    def order(self) -> StreamOrder:
        """The order that `MixtureDataset` wants beside its source."""
        return StreamOrder(self.num_rows)

    def fingerprint(self) -> dict:
        """What another source must have in common with this one, so that its rows are the same. JSON-able."""
        return {
            "data sets": {
                stream.sensor: [stream.files, stream.level, list(stream.columns)] for stream in self._streams
            },
            "name": self.name,
            "split": self.split,
            "seed": self.seed,
            "tile_size": self.tile_size,
            "block_cells": self.block_cells,
            "window": self.window,
            "val_share": self.val_share,
            "unknown_offset_dn": self.unknown_offset_dn,
        }

    def state_dict(self) -> dict:
        """Where to go on: JSON-able and small, without pixels.

        A source with the same arguments that loads it reads every position from the oldest block in memory on, as this
        one would have. To get there it fetches the rows of that block and those that waited again; `datasets` in turn
        reads a file from its beginning up to the row.
        """
        place = self._resume or self._blocks[0].place
        return {"made with": self.fingerprint(), "place": place}

    def load_state_dict(self, state: dict):
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: if the state is that of another source.
        """
        here = self.fingerprint()
        differing = sorted(entry for entry in here if state["made with"].get(entry) != here[entry])
        if differing:
            entry = differing[0]
            raise ValueError(
                f"`state` must be of the same stream, got {entry} {state['made with'].get(entry)} where {here[entry]} "
                "is asked for. Give the arguments of then, or begin anew."
            )
        self._go_to(state["place"])

    def read(self, index: int, verify: bool = False) -> dict:
        """One row: the tile at a position.

        Args:
            index (`int`): the position, ascending from call to call; what lies between is passed over. Only within the
                last two blocks it may go back.
            verify (`bool`): refuse a cell whose medians are implausible for its unit.

        Returns:
            `dict`: `key` (`451U_946L_0_3`, row and column of the tile), `group_id` (the cell), `pair_id`, `bounds`
            (west, south, east, north in degrees), `labels` (`None`), `images` (`{sensor: ShardImage}`: `(C, tile_size,
            tile_size)` on one grid, stored numbers; Sentinel-2 with the offset of its product) and `target` (`None`).

        Raises:
            CorruptShardError: naming the data set and the cell, if one of its images cannot be read or does not fit.
            OSError: if a data set breaks off; the next call tries again.
            ValueError: for a position that is gone, a state of other files, in a worker of a `DataLoader`, or where no
                cells pair, no image can be read or a cell is smaller than a tile.
        """
        if get_worker_info() is not None:
            raise ValueError(
                "`dataloader_num_workers` must be 0 for a stream, got a worker. It would read a part of the files only."
            )
        oldest = self._blocks[0].first if self._blocks else self._resume["first"]
        if index < oldest:
            raise ValueError(
                f"`index` must not go back behind {oldest}, got {index}. A stream is read forwards; make another one."
            )
        end = self._blocks[-1].end if self._blocks else oldest
        far = index - end > 2 * self.block_cells * max(len(self._corners), 1)
        with tqdm(total=index - end, desc=f"{self.name}: to row {index}", unit=" rows", disable=not far) as progress:
            while not self._blocks or index >= self._blocks[-1].end:
                self._advance()
                progress.update(min(self._blocks[-1].end, index) - end - progress.n)
        block = next(block for block in self._blocks if index < block.end)
        number, corner = divmod(int(block.order[index - block.first]), len(self._corners))
        cell, (top, left) = block.cells[number], self._corners[corner]
        images = self._images(cell, verify)
        images = {sensor: image.window(top, left, self.tile_size, self.tile_size) for sensor, image in images.items()}
        across = self._size[1] // self.tile_size
        key = f"{cell.name}_{corner // across}_{corner % across}"
        return {
            "key": key,
            "group_id": cell.name,
            "pair_id": key if len(images) > 1 else None,
            "bounds": wgs84_bounds(images[self._streams[0].sensor]),
            "labels": None,
            "images": images,
            "target": None,
        }

    # Blocks

    def _advance(self):
        """The next block, with what it takes to make it again."""
        place = self._resume or self._place(self._blocks[-1].end)
        try:
            if self._resume is not None:
                self._restore(place)
            cells = self._next_cells()
            if self._size is None:
                self._measure(cells)
        except BaseException:
            # Rows that were read are in no block: the next attempt begins where the state of now does.
            self._go_to(self._blocks[0].place if self._blocks else place)
            raise
        self._resume = None
        generator = np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), place["first"]])
        order = generator.permutation(len(cells) * len(self._corners))
        self._blocks = [*self._blocks[-1:], _Block(place["first"], cells, order, place)]

    def _next_cells(self) -> list["_Cell"]:
        cells: list[_Cell] = []
        while len(cells) < self.block_cells:
            cell = self._next_cell()
            if cell is not None:
                cells.append(cell)
            elif cells:
                break
            elif self._paired == 0:
                raise ValueError(self._no_pair("all"))
            else:
                self._cells = self._paired = 0
                for stream in self._streams:
                    stream.seek(None)
                    self._held[stream.sensor] = {}
                    self._pulled[stream.sensor] = 0
        return cells

    def _measure(self, cells: list["_Cell"]):
        for cell in cells:
            try:
                image = self._first_image(cell)
            except CorruptShardError as error:
                fault = error
                continue
            self._set_size(image.pixels.shape[1:])
            return
        raise ValueError(
            f"`paths` must hold images, got none readable in {len(cells)} cells. Name other files. "
            f"What the last one said: {fault}"
        ) from fault

    def _set_size(self, size):
        height, width = size
        if min(height, width) < self.tile_size:
            raise ValueError(
                f"`tile_size` must be at most the side of a cell, {min(height, width)} pixels, got {self.tile_size}. "
                "Lower it."
            )
        self._size, self._corners = (height, width), grid_crops(height, width, self.tile_size)

    # Pairs

    def _next_cell(self) -> "_Cell | None":
        """The next cell that all data sets have; `None` at the end of the first."""
        first, *partners = self._streams
        while True:
            if self._paired == 0 and self._cells >= self.max_unpaired:
                raise ValueError(self._no_pair(f"the first {self._cells}"))
            row = self._pull(first)
            if row is None:
                return None
            self._cells += 1
            rows = {first.sensor: row}
            for stream in partners:
                partner = self._find(stream, row["grid_cell"])
                if partner is None:
                    break
                rows[stream.sensor] = partner
            reason = "unpaired" if len(rows) < len(self._streams) else self._unusable(rows)
            if reason is None:
                self._paired += 1
                return _Cell(row["grid_cell"], rows)
            self.skipped[reason] += 1

    def _pull(self, stream: "_Stream") -> dict | None:
        """The next row of this split; `None` at the end."""
        while True:
            row = stream.read()
            if row is None:
                return None
            if _place_of(row["grid_cell"]) is None:
                self.skipped["unnamed"] += stream is self._streams[0]
            elif (hashed_fraction(row["grid_cell"]) < self.val_share) == (self.split == "val"):
                self._pulled[stream.sensor] += 1
                return row

    def _find(self, stream: "_Stream", cell: str) -> dict | None:
        """The row of a cell in another data set, from those that wait or from the stream.

        A row waits until its cell is asked for. It is given up when the first data set has been beyond it for `window`
        cells, or when more than `window` such rows wait. No more is read ahead than `window` rows beyond the cell, so
        that a region that the other data set lacks does not carry it away.
        """
        held, place = self._held[stream.sensor], _place_of(cell)
        passed = [other for other, waiting in held.items() if waiting.place < place]
        for other in passed:
            held[other].passed += 1
            if held[other].passed > self.window:
                del held[other]
        while cell not in held:
            if sum(waiting.place > place for waiting in held.values()) >= self.window:
                return None
            before, row = stream.state, self._pull(stream)
            if row is None:
                return None
            if row["grid_cell"] in held:
                continue  # some cells come twice; the first row stays
            number = self._pulled[stream.sensor] - 1
            held[row["grid_cell"]] = _Held(row, _place_of(row["grid_cell"]), number, before)
            passed = [other for other, waiting in held.items() if waiting.place < place]
            if len(passed) > self.window:
                del held[min(passed, key=lambda other: held[other].place)]
        return held.pop(cell).row

    def _unusable(self, rows: dict[str, dict]) -> str | None:
        """Why a pair of rows is left out, as far as its names and headers tell."""
        for stream in self._streams:
            if self._offset_dn(stream, rows[stream.sensor]) is None:
                return "offset"
        projections = [_projection(rows[stream.sensor][stream.finest]) for stream in self._streams]
        # An image that cannot be opened is reported when it is read.
        known = [projection for projection in projections if projection is not None]
        return None if all(projection == known[0] for projection in known) else "projection"

    def _offset_dn(self, stream: "_Stream", row: dict) -> float | None:
        if not stream.needs_offset:
            return 0.0
        offset = offset_from_product_id(row["product_id"])
        return self.unknown_offset_dn if offset is None else offset

    def _no_pair(self, which: str) -> str:
        names = ", ".join(stream.path for stream in self._streams)
        return (
            f"`paths` must have cells in common, got none among {which} cells of {names}: {self.skipped} left out. "
            "Name files of the same region, or raise `window` or `max_unpaired`."
        )

    # Places in the streams

    def _place(self, first: int) -> dict:
        """The streams between two blocks: where the oldest row that waits is, and which rows behind it wait too."""
        streams = {}
        for stream in self._streams:
            held, pulled = list(self._held[stream.sensor].values()), self._pulled[stream.sensor]
            oldest = min(held, key=lambda waiting: waiting.number) if held else None
            since = oldest.number if oldest else pulled
            streams[stream.sensor] = {
                "state": oldest.before if oldest else stream.state,
                "rows": pulled - since,
                "held": [[waiting.number - since, waiting.passed] for waiting in held],
            }
        return {
            "first": first,
            "cells": self._cells,
            "paired": self._paired,
            "size": None if self._size is None else list(self._size),
            "skipped": dict(self.skipped),
            "streams": streams,
        }

    def _restore(self, place: dict):
        self.skipped = dict(place["skipped"])
        self._cells, self._paired = place["cells"], place["paired"]
        self._size, self._corners = None, []
        if place["size"] is not None:
            self._set_size(place["size"])
        self._pulled = dict.fromkeys(self.sensors, 0)
        self._held = {sensor: {} for sensor in self.sensors}
        for stream in self._streams:
            stored = place["streams"][stream.sensor]
            waiting = {number: passed for number, passed in stored["held"]}
            stream.seek(stored["state"])
            for number in range(stored["rows"]):
                before, row = stream.state, self._pull(stream)
                if row is None:
                    raise ValueError(
                        f"`state` must be of the same files, got an end of {stream.path} before the row it tells of. "
                        "Give the files of then, or begin anew."
                    )
                if number in waiting:
                    held = _Held(row, _place_of(row["grid_cell"]), number, before, waiting[number])
                    self._held[stream.sensor][row["grid_cell"]] = held

    def _go_to(self, place: dict):
        self._resume, self._blocks, self._held = place, [], {}
        self.skipped = dict(place["skipped"])

    # Pixels

    def _images(self, cell: "_Cell", verify: bool) -> dict[str, ShardImage]:
        """The images of a cell on the grid of the first data set; decoded once, then kept instead of the bytes."""
        if cell.fault is None and cell.images is None:
            try:
                cell.images = self._decode(cell)
            except CorruptShardError as error:
                cell.fault = str(error)
            cell.rows = None
        if cell.fault is None and verify and not cell.verified:
            cell.fault, cell.verified = self._implausible(cell), True
        if cell.fault is not None:
            raise CorruptShardError(cell.fault)
        return cell.images

    def _decode(self, cell: "_Cell") -> dict[str, ShardImage]:
        grid = self._first_image(cell)
        images = {self._streams[0].sensor: grid}
        if grid.pixels.shape[1:] != self._size:
            raise CorruptShardError(
                f"`{self._streams[0].sensor}` must have {self._size} pixels as the first cell, "
                f"got {grid.pixels.shape[1:]} in cell {cell.name} of {self._streams[0].path}. {_REMEDY}"
            )
        for stream in self._streams[1:]:
            where = f"cell {cell.name} of {stream.path}"
            row = cell.rows[stream.sensor]
            image = _read_bands(row, stream, self._offset_dn(stream, row), where)
            images[stream.sensor] = _on_grid(image, grid, stream.sensor, where)
        return images

    def _first_image(self, cell: "_Cell") -> ShardImage:
        stream, row = self._streams[0], cell.rows[self._streams[0].sensor]
        return _read_bands(row, stream, self._offset_dn(stream, row), f"cell {cell.name} of {stream.path}")

    def _implausible(self, cell: "_Cell") -> str | None:
        for sensor, image in cell.images.items():
            # The medians of every n-th pixel tell as much as those of all.
            step = max(1, min(image.pixels.shape[1:]) // 64)
            pixels = np.ascontiguousarray(image.pixels[:, ::step, ::step])
            valid = torch.from_numpy(valid_pixels(pixels, image.nodata))[None]
            try:
                self._processor.check(
                    torch.from_numpy(pixels)[None],
                    valid,
                    sensor,
                    image.bands,
                    image.units,
                    image.scale,
                    image.offset_dn,
                )
            except ValueError as error:
                return f"{error} This is cell {cell.name} of source {self.name!r}."
        return None


@dataclass
class _Held:
    """A row that waits for its cell to be asked for."""

    row: dict
    place: tuple[int, int]
    number: int  # among the rows pulled
    before: dict | None  # the stream's state before it
    passed: int = 0  # cells of the first data set since that went beyond it


@dataclass
class _Cell:
    name: str
    rows: dict[str, dict] | None
    images: dict[str, ShardImage] | None = None
    fault: str | None = None
    verified: bool = False


@dataclass
class _Block:
    first: int
    cells: list[_Cell]
    order: np.ndarray
    place: dict

    @property
    def end(self) -> int:
        return self.first + len(self.order)


class _Stream:
    """The rows of one data set in stored order, with the state from which each is read again.

    Attributes:
        columns (`dict[str, str]`): the column of each band, by the band's name, in the sensor's order.
        files (`int`): how many there are.
        finest (`str`): the column of a band with the smallest pixels.
    """

    def __init__(self, sensor: str, path: str):
        self.sensor, self.path, self._close = sensor, path, None
        spec = SENSORS[sensor]
        found = {}
        stored = self._open().column_names or ()
        for column in stored:
            if knows_band(sensor, column):
                found[spec.resolve(column)] = column
        self.level = _level(spec, set(found))
        wanted = [band.name for band in spec.bands if self.level is None or self.level in band.levels]
        self.columns = {band: found[band] for band in wanted if band in found}
        self.needs_offset = _CORE[sensor].unit == "dn" and spec.offset is None
        columns = ["grid_cell", *self.columns.values()]
        columns += ["product_id"] if self.needs_offset or "product_id" in stored else []
        missing = sorted(set(wanted) - set(found)) + sorted({"grid_cell", "product_id"} & set(columns) - set(stored))
        if missing:
            raise ValueError(
                f"`paths` of {sensor!r} must be of Major-TOM Core, with columns grid_cell and {', '.join(wanted)}, "
                f"got no {', '.join(missing)} in {path}. Name a Core data set."
            )
        self._dataset = self._open(columns)
        self.files = self._dataset.num_shards
        gsd = {band.name: band.gsd or 0 for band in spec.bands}
        self.finest = self.columns[min(self.columns, key=gsd.__getitem__)]
        self.seek(None)

    def _open(self, columns: list[str] | None = None):
        try:
            import datasets  # slow to import, and needed by streams alone
        except ImportError as error:
            raise ImportError(
                f'`datasets` is needed to stream Major-TOM, got "{error}". Run pip install "msgfm_hf[train]".'
            ) from error
        files = _data_files(self.path)
        try:
            # Without `columns` a row would be fetched with its previews and masks.
            return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, columns=columns)
        except (OSError, ValueError) as error:
            raise OSError(
                f"`paths` of {self.sensor!r} must be a repository of the Hub or a folder of Parquet files, "
                f'got {self.path}: "{error}". Correct the name, or see to the connection.'
            ) from error

    def seek(self, state: dict | None):
        """Go to where a state was taken; `None` is the beginning."""
        if self._close is not None:
            self._close()
        self.state = state
        self._dataset.load_state_dict(state)
        self._rows = iter(self._dataset)
        # At the end of the program too: pyarrow cannot be left in the middle of a file when modules are taken down.
        self._close = weakref.finalize(self, self._rows.close)

    def read(self) -> dict | None:
        """The next row, bands as bytes; `None` at the end."""
        try:
            row = next(self._rows, None)
        except (OSError, ValueError) as error:
            raise OSError(
                f'`paths` of {self.sensor!r} must be readable to the end, got "{error}" in {self.path} at '
                f"{self.state}. A lost connection was tried again already: start again with --resume. A damaged file "
                "must be fetched anew."
            ) from error
        self.state = self._dataset.state_dict()
        return row


def _data_files(path: str) -> str | list[str]:
    folder = Path(path)
    if folder.is_dir():
        files = sorted(folder.glob("images/*.parquet")) or sorted(folder.glob("*.parquet"))
        if not files:
            raise ValueError(f"`paths` must hold Parquet files, got {path} without. Name the folder of one data set.")
        return [str(file) for file in files]
    repository = re.fullmatch(r"([\w.-]+/[\w.-]+(?:@[\w.-]+)?)(?:/(.+))?", path)
    if repository is None:
        return path
    return f"hf://datasets/{repository[1]}/{repository[2] or 'images/*.parquet'}"


def _level(spec: SensorSpec, bands: set[str]) -> str | None:
    """The level all of whose bands are there: the one with the most."""
    complete = {level: {band.name for band in spec.bands if level in band.levels} for level in spec.levels}
    whole = [level for level in spec.levels if complete[level] <= bands]
    # Where none is whole, that with the fewest bands is named in the error.
    return max(whole, key=lambda level: len(complete[level])) if whole else (spec.levels[-1] if spec.levels else None)


def _place_of(cell: str | None) -> tuple[int, int] | None:
    """Row (from south to north) and column (from west to east) in the grid; `None` for what is no cell's name."""
    found = _CELL.fullmatch(cell or "")
    if found is None:
        return None
    return int(found[1]) * (1 if found[2] == "U" else -1), int(found[3]) * (1 if found[4] == "R" else -1)


def _sensed(product_id: str | None) -> str | None:
    found = re.search(r"_(\d{4})(\d{2})(\d{2}T)(\d{2})(\d{2})(\d{2})(?:_|$)", product_id or "")
    return found and f"{found[1]}-{found[2]}-{found[3]}{found[4]}:{found[5]}:{found[6]}Z"


@contextlib.contextmanager
def _opened(payload: bytes):
    """A GeoTIFF in memory."""
    with geo_module("rasterio").MemoryFile(payload) as memory, open_geotiff(memory.name) as file:
        yield file


def _projection(payload: bytes | None):
    try:
        with _opened(payload) as file:
            return file.crs
    except Exception:  # as in _read_band, which says what is wrong
        return None


@dataclass
class _Band:
    pixels: np.ndarray  # (H, W)
    crs: str
    transform: list[float]


def _read_band(payload: bytes | None, column: str, core: _Core, where: str) -> _Band:
    if not payload:
        raise CorruptShardError(f"`{column}` must hold a GeoTIFF, got {payload} in {where}. {_REMEDY}")
    try:
        with _opened(payload) as file:
            pixels, nodata, crs, transform = file.read(), file.nodata, file.crs, file.transform.to_gdal()
    except Exception as error:  # decoders raise whatever the damaged bytes lead them to
        raise CorruptShardError(
            f"`{column}` must be a GeoTIFF, got {error.__cause__ or error!r} in {where}. {_REMEDY}"
        ) from error
    if len(pixels) != 1 or pixels.dtype != core.dtype or crs is None:
        raise CorruptShardError(
            f"`{column}` must be one band of {core.dtype} with a projection, "
            f"got {len(pixels)} of {pixels.dtype} and {crs} in {where}. {_REMEDY}"
        )
    # One value for what is missing, whatever the file declares.
    pixels[:, ~valid_pixels(pixels, nodata)] = core.nodata
    return _Band(pixels[0], crs_name(crs), list(transform))


def _read_bands(row: dict, stream: _Stream, offset_dn: float, where: str) -> ShardImage:
    """All bands of a data set on the grid of the finest; coarser ones repeat their pixels."""
    core, spec = _CORE[stream.sensor], SENSORS[stream.sensor]
    if stream.level is not None and f"MSI{stream.level.upper()}_" not in (row["product_id"] or ""):
        raise CorruptShardError(
            f"`product_id` must be of level {stream.level}, got {row['product_id']} in {where}. {_REMEDY}"
        )
    bands = {band: _read_band(row[column], column, core, where) for band, column in stream.columns.items()}
    finest = max(bands.values(), key=lambda band: band.pixels.size)
    layers = []
    for name, band in bands.items():
        factor = max(1, finest.pixels.shape[0] // band.pixels.shape[0])
        layer = band.pixels.repeat(factor, axis=0).repeat(factor, axis=1)
        off = corner_distance(finest.transform, finest.pixels.shape, band.transform, band.pixels.shape)
        if layer.shape != finest.pixels.shape or band.crs != finest.crs or off > GRID_TOLERANCE:
            raise CorruptShardError(
                f"`{stream.columns[name]}` must cover the pixels of the finest band, {finest.pixels.shape} at "
                f"{finest.transform} in {finest.crs}, got {band.pixels.shape} at {band.transform} in {band.crs} "
                f"in {where}. {_REMEDY}"
            )
        layers.append(layer)
    scale = spec.scale if core.unit == "dn" else 1.0
    return ShardImage(
        pixels=np.stack(layers),
        bands=list(bands),
        units=core.unit,
        scale=scale,
        offset=offset_dn * scale,
        gsd=abs(finest.transform[1]),
        crs=finest.crs,
        transform=finest.transform,
        nodata=core.nodata,
        datetime=_sensed(row.get("product_id")),
    )


def _on_grid(image: ShardImage, grid: ShardImage, sensor: str, where: str) -> ShardImage:
    """An image on the grid of another one that has its footprint."""
    shape, expected = image.pixels.shape[1:], grid.pixels.shape[1:]
    off = corner_distance(grid.transform, expected, image.transform, shape)
    # Within a pixel of the coarser one.
    if image.crs != grid.crs or off * abs(grid.transform[1]) > max(abs(grid.transform[1]), abs(image.transform[1])):
        raise CorruptShardError(
            f"`{sensor}` must lie where the first data set does, {expected} pixels at {grid.transform} in {grid.crs}, "
            f"got {shape} at {image.transform} in {image.crs} in {where}. {_REMEDY}"
        )
    if shape == expected and off <= GRID_TOLERANCE:
        return image
    from rasterio import Affine, warp

    pixels = np.full((len(image.pixels), *grid.pixels.shape[1:]), image.nodata, image.pixels.dtype)
    warp.reproject(
        image.pixels,
        pixels,
        src_transform=Affine.from_gdal(*image.transform),
        dst_transform=Affine.from_gdal(*grid.transform),
        src_crs=image.crs,
        dst_crs=grid.crs,
        src_nodata=image.nodata,
        dst_nodata=image.nodata,
        resampling=warp.Resampling.bilinear,
    )
    return dataclasses.replace(image, pixels=pixels, gsd=grid.gsd, transform=grid.transform)
