"""Shards of the real sample imagery: small pieces of eight public data sets, described by the MANIFEST beside them.

The split of every place is that of `splits.csv`; a place never belongs to two splits.
"""

import csv
import dataclasses
import datetime
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from msgfm_hf.data.geotiff import read_image, wgs84_bounds
from msgfm_hf.data.shards import ShardImage, ShardRow, ShardWriter
from msgfm_hf.model.sensors import SENSORS

logger = logging.getLogger(__name__)

TILE = 256


class _Place(NamedTuple):
    s1: str
    s2: str
    offset_dn: int


# Dates from the MANIFEST; offsets measured, since the dates do not tell. In two places every L1C band lies above 1000,
# cirrus (B10, a few tens at most over clear land) at 1004-1020 and 1036-1089, and B12 regressed on the offset-free L2A
# has the intercepts 1009 and 1044: reprocessed products that carry +1000. In the others B10 is 54-67 (of 2023: already
# taken off) and 8-29, and the intercepts are 73 and 24.
_TERRAMESH = {
    "282D_485L_3_3": _Place("2021-07-21", "2021-07-23", -1000),
    "38D_378R_2_3": _Place("2023-06-10", "2023-06-10", 0),
    "609U_541L_3_0": _Place("2020-01-11", "2020-01-11", -1000),
    "637U_59R_1_3": _Place("2017-10-30", "2017-10-30", 0),
}
_SLOVENIA = {
    "ref0": "2015-08-20",
    "ref1": "2015-07-31",
    "ref2": "2015-09-09",
    "ref3": "2015-08-30",
    "ref4": "2015-07-11",
}
# dB = 20 log10(DN) - 83, so amplitude = DN * 10^(-83 / 20).
_AMPLITUDE = {"unit": "amplitude", "scale": 10 ** (-83 / 20)}
# Radar and optical acquisitions further apart than this are no pair.
_PAIR_DAYS = 2


def make_sample_shards(root, out, overwrite: bool = False) -> dict[str, dict]:
    """Write the sources `naip`, `naip_nd`, `autzen`, `terramesh`, `worldcereal`, `slovenia` and `openeo`.

    Each folder appears when it is whole. Finished ones are left as they are, which is logged.

    Args:
        root (`str` or `Path`): the folder of the sample imagery, with `splits.csv`.
        out (`str` or `Path`): the folder to hold one folder per source.
        overwrite (`bool`): make finished sources anew.

    Returns:
        `{source: {"rows": {split: number}, "dropped": [reason, ...], "kept": bool}}`, `kept` where it was there before.

    Raises:
        ValueError: if the imagery is incomplete or `splits.csv` does not name a place.
    """
    root, out = Path(root), Path(out)
    splits = _read_splits(root)
    summary = {}
    for name, source in _SOURCES.items():
        if (out / name).exists() and not overwrite:
            logger.warning("%s is there already and is left alone; `overwrite=True` makes it anew.", out / name)
            summary[name] = {"rows": _count_rows(out / name), "dropped": [], "kept": True}
            continue
        dropped: list[str] = []
        rows = list(tqdm(source.rows(root, splits, dropped), desc=f"reading {name}", unit=" rows", leave=False))
        # Neighbours in a row group are read together: without this a batch would come from one city.
        order = np.random.default_rng(0).permutation(len(rows))
        with ShardWriter(out, name, source.sensors, source.levels, overwrite=overwrite) as writer:
            for number in order:
                writer.write(rows[number])
        summary[name] = {"rows": dict(sorted(writer.counts.items())), "dropped": dropped, "kept": False}
    return summary


def _naip(root, splits, dropped) -> Iterator[ShardRow]:
    folder = root / "naip_urban_trees"
    for chip in _table(folder / "chips.csv"):
        image = _read(folder / "images" / f"{chip['chip']}.tif", "rgb", bands=_names("rgb"), datetime=chip["year"])
        split = _split(splits, f"{folder.name}/{chip['city']}")
        yield _row("naip", chip["chip"], split, chip["city"], {"rgb": image})


def _naip_nd(root, splits, dropped) -> Iterator[ShardRow]:
    folder = root / "naip_timeseries_nd"
    for path in _files(folder, "m_*.tif"):
        place, date = path.stem.rsplit("_", 1)
        scene = _read(path, "naip", bands=_names("naip"), datetime=f"{date[:4]}-{date[4:6]}-{date[6:]}")
        height, width = scene.pixels.shape[1:]
        for top, left in itertools.product(range(0, height - TILE + 1, TILE), range(0, width - TILE + 1, TILE)):
            key = f"{path.stem}_r{top:04d}_c{left:04d}"
            tile = scene.window(top, left, TILE, TILE)
            # In this file 0 means nodata only where all four bands are 0; in one band alone it is a dark pixel.
            if (tile.pixels == scene.nodata).all(axis=0).any():
                dropped.append(f"{key}: has pixels without data")
                continue
            tile = dataclasses.replace(tile.select(_names("rgb")), nodata=None)
            yield _row("naip_nd", key, _split(splits, folder.name), place, {"rgb": tile})


def _autzen(root, splits, dropped) -> Iterator[ShardRow]:
    folder = root / "rgb_dsm_autzen"
    for chip in _table(folder / "chips.csv"):
        name, part = chip["chip"], chip["split"]
        rgb = _read(folder / part / f"{name}_rgb.tif", "rgb")
        # Coordinates are in feet, heights are not.
        heights = {"sensor": "dsm", "names": _names("dsm"), "unit": "metres"}
        dsm = _read(folder / part / f"{name}_dsm.tif", **heights, nodata=float("nan"))
        measured = _read(folder / part / f"{name}_valid.tif", **heights).pixels != 0
        # Cells without a lidar return were filled from the nearest one: not a measurement.
        dsm = dataclasses.replace(dsm, pixels=np.where(measured, dsm.pixels, np.float32(np.nan)))
        split = _split(splits, f"{folder.name}/{part}")
        yield _row("autzen", name, split, f"autzen_{name.split('_')[0]}", {"rgb": rgb, "dsm": dsm})


def _terramesh(root, splits, dropped) -> Iterator[ShardRow]:
    folder = root / "s1s2_terramesh"
    for place, facts in _TERRAMESH.items():
        images = {
            "s1": _read(folder / place / "S1RTC.tif", "s1", datetime=facts.s1),
            "s2": _read(folder / place / "S2L1C.tif", "s2", offset_dn=facts.offset_dn, datetime=facts.s2),
        }
        yield _row("terramesh", place, _split(splits, f"{folder.name}/{place}"), place, images)


def _worldcereal(root, splits, dropped) -> Iterator[ShardRow]:
    folder = root / "s1s2_worldcereal_belgium"
    for path in _files(folder, "S1_*.tif"):
        month = path.stem.split("_")[1]
        optical = folder / f"S2L2A_{month}.tif"
        if not optical.exists():
            dropped.append(f"{path.name}: no Sentinel-2 composite of this month")
            continue
        date = f"{month[:4]}-{month[4:]}"
        images = {
            "s1": _read(path, "s1", datetime=date, **_AMPLITUDE),
            # Months before baseline 04.00; minima of a few hundred or below in every band show no offset.
            "s2": _read(optical, "s2", offset_dn=0, datetime=date),
        }
        yield _row("worldcereal", f"{folder.name}_{month}", _split(splits, folder.name), folder.name, images)


def _slovenia(root, splits, dropped) -> Iterator[ShardRow]:
    folder = root / "s2_eolearn_slovenia"
    for reference, date in _SLOVENIA.items():
        image = _read(folder / f"S2L1C_{reference}.tif", "s2", unit="reflectance", datetime=date)
        yield _row("slovenia", f"{folder.name}_{date}", _split(splits, folder.name), folder.name, {"s2": image})


def _openeo(root, splits, dropped) -> Iterator[ShardRow]:
    folder = root / "s1s2_openeo_belgium_cloudy"
    radar = {_date(path): path for path in _files(folder, "S1_*.tif")}
    for path in _files(folder, "S2L2A_*.tif"):
        date = _date(path)
        nearest = min(radar, key=lambda day: abs(day - date))
        if abs(nearest - date).days > _PAIR_DAYS:
            dropped.append(f"{path.name}: no Sentinel-1 image within {_PAIR_DAYS} days")
            continue
        images = {
            "s1": _read(radar[nearest], "s1", datetime=nearest.isoformat(), **_AMPLITUDE),
            # The fifth band is the scene classification. Red of 186 on a clear day shows that no offset is left.
            "s2": _read(path, "s2", bands=["B01", "B04", "B08", "B11"], offset_dn=0, datetime=date.isoformat()),
        }
        yield _row("openeo", f"{folder.name}_{date}", _split(splits, folder.name), folder.name, images)


class _Source(NamedTuple):
    rows: Callable[[Path, dict[str, str], list[str]], Iterator[ShardRow]]
    sensors: tuple[str, ...]
    levels: dict[str, str] | None = None


_SOURCES = {
    "naip": _Source(_naip, ("rgb",)),
    "naip_nd": _Source(_naip_nd, ("rgb",)),
    "autzen": _Source(_autzen, ("rgb", "dsm")),
    "terramesh": _Source(_terramesh, ("s1", "s2"), {"s2": "l1c"}),
    "worldcereal": _Source(_worldcereal, ("s1", "s2"), {"s2": "l2a"}),
    "slovenia": _Source(_slovenia, ("s2",), {"s2": "l1c"}),
    "openeo": _Source(_openeo, ("s1", "s2"), {"s2": "l2a"}),
}


def _row(source: str, key: str, split: str, group_id: str, images: dict[str, ShardImage]) -> ShardRow:
    bounds = wgs84_bounds(next(iter(images.values())))
    return ShardRow(key, source, split, group_id, images, pair_id=key if len(images) > 1 else None, bounds=bounds)


def _names(sensor: str) -> list[str]:
    return SENSORS[sensor].band_names


def _date(path: Path) -> datetime.date:
    return datetime.datetime.strptime(path.stem.split("_")[1], "%Y%m%d").date()


def _read(path: Path, sensor: str, **options) -> ShardImage:
    return read_image(_existing(path), sensor, **options)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ValueError(
            f"`root` must hold the whole sample imagery, got no {path.name} in {path.parent}. "
            "Set MSGFM_SAMPLE_DATA to the folder with MANIFEST.md and splits.csv, or fetch it again."
        )
    return path


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern)) or [_existing(folder / pattern)]


def _table(path: Path) -> list[dict[str, str]]:
    with open(_existing(path), newline="") as file:
        return list(csv.DictReader(file))


def _read_splits(root: Path) -> dict[str, str]:
    """`{item: split}`; an item `folder/{a,b}` stands for two places, and its comma is not the table's."""
    text = _existing(root / "splits.csv").read_text()
    splits = {}
    for item, split in re.findall(r"^((?:[^,{]|\{[^}]*\})+),(\w+),", text, flags=re.MULTILINE):
        stem, _, listed = item.partition("{")
        for name in listed.rstrip("}").split(","):
            splits[stem + name] = split
    return splits


def _split(splits: dict[str, str], item: str) -> str:
    if item not in splits:
        raise ValueError(f"`root` must name {item} in its splits.csv, got {', '.join(splits)}. Add a line for it.")
    return splits[item]


def _count_rows(folder: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.parquet")):
        split = path.stem.rsplit("-", 1)[0]
        counts[split] = counts.get(split, 0) + pq.read_metadata(path).num_rows
    return counts
