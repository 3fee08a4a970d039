"""Splits by place: whole groups are dealt to train, val and test, groups are columns of a table or spatial blocks, and
footprints that overlap across splits are found."""

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from msgfm_hf.data.geotiff import EARTH_RADIUS, geo_module
from msgfm_hf.data.shards import UNLABELLED, ShardRow

SPLITS = ("train", "val", "test")
DEFAULT_SHARES = "0.7,0.15,0.15"
_SPELLINGS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "validation": "val",
    "valid": "val",
    "dev": "val",
    "eval": "val",
    "test": "test",
    "testing": "test",
}
_SHOWN = 5
# Neighbours whose edges are written with rounding errors do not overlap.
_TOLERANCE_PIXELS = 0.5


class SplitBy(NamedTuple):
    """What rows are grouped by: a column of a table, or blocks of so many metres; one of the two is `None`."""

    column: str | None
    block: float | None


class Footprint(NamedTuple):
    """Where a row lies.

    Attributes:
        key, split (`str`): of the row.
        crs (`str`): authority code or WKT.
        bounds (`tuple[float, float, float, float]`): left, bottom, right, top, in `crs`.
        pixel (`float`): side of a pixel, in the units of `crs`.
    """

    key: str
    split: str
    crs: str
    bounds: tuple[float, float, float, float]
    pixel: float


@dataclass
class SplitCounts:
    """What a split holds.

    Args:
        rows (`int`): number of rows.
        places (`set[str]`): their groups.
        labels (`Counter`): images per class; of maps pixels per class id.
        unlabelled (`int`): rows without a label, or with a map of unlabelled pixels only.
    """

    rows: int = 0
    places: set[str] = field(default_factory=set)
    labels: Counter = field(default_factory=Counter)
    unlabelled: int = 0

    def add(self, row: ShardRow):
        """Count a row."""
        self.rows += 1
        self.places.add(row.group_id)
        found = Counter(row.labels or ())
        if row.target is not None and row.target.pixels.dtype == np.uint8:
            counts = np.bincount(row.target.pixels.ravel(), minlength=UNLABELLED + 1)[:UNLABELLED]
            found = Counter({number: int(count) for number, count in enumerate(counts) if count})
        elif row.target is not None:
            found = Counter({"numbers": 1})
        self.labels += found
        self.unlabelled += not found


def parse_split_by(text: str) -> SplitBy:
    """Read `--split-by`: `block:5km`, `block:500m`, or the name of a column.

    Raises:
        ValueError: for a block without a size in metres or kilometres.
    """
    if not text.startswith("block:"):
        return SplitBy(text, None)
    found = re.fullmatch(r"block:(\d+(?:\.\d+)?)(m|km)", text)
    size = float(found[1]) * {"m": 1, "km": 1000}[found[2]] if found else 0.0
    if size <= 0:
        raise ValueError(f"`split_by` must be a column, block:500m or block:5km, got {text!r}. Give the block a size.")
    return SplitBy(None, size)


def parse_shares(text: str) -> dict[str, float]:
    """Read `--shares`, the parts of train, val and test.

    Raises:
        ValueError: unless they are three numbers from 0 to 1 that sum to 1, and train has some.
    """
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != len(SPLITS) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6 or shares[0] == 0:
        raise ValueError(
            f"`shares` must be three numbers for {', '.join(SPLITS)} that sum to 1, got {text!r}. "
            "Example: 0.7,0.15,0.15; a split with 0 is left out, but not train."
        )
    return dict(zip(SPLITS, shares, strict=True))


def split_column(values: Iterable[str]) -> dict[str, str] | None:
    """What the values of a column say about splits.

    Returns:
        `{value: split}` if they are names of splits (training; validation, valid, dev and eval; testing are others of
        train, val and test); `None` if none is: then they are groups.

    Raises:
        ValueError: if some are and some are not: dealing them as groups would undo an official split.
    """
    found = {value: _SPELLINGS.get(value.lower()) for value in values}
    others = sorted(value for value, split in found.items() if split is None)
    if len(others) == len(found):
        return None
    if others:
        known = sorted(value for value, split in found.items() if split is not None)
        raise ValueError(
            f"`split_by` must be a column of splits or of groups, got {', '.join(known)} and also "
            f"{', '.join(others[:_SHOWN])}{', ...' if len(others) > _SHOWN else ''}. "
            f"Rename these to one of {', '.join(_SPELLINGS)}, empty them to leave the rows out, or name another column."
        )
    return found


def deal_groups(rows: dict[str, int], shares: dict[str, float], seed: int = 0) -> dict[str, str]:
    """Give whole groups to splits, so that the splits' shares of rows come close to those asked for.

    Groups come in an order drawn from a hash of their name and the seed; each goes to the split that lacks most rows.
    No split remains without a group.

    Args:
        rows (`dict[str, int]`): number of rows of each group.
        shares (`dict[str, float]`): by split; one with 0 gets nothing.
        seed (`int`): another seed, another deal.

    Returns:
        `{group: split}`.

    Raises:
        ValueError: if there are fewer groups than splits.
    """
    lacking = {split: share * sum(rows.values()) for split, share in shares.items() if share > 0}
    if len(rows) < len(lacking):
        raise ValueError(
            f"`split_by` must make at least {len(lacking)} groups for {', '.join(lacking)}, got {len(rows)}. "
            "Take smaller blocks or another column, or leave splits out with --shares 0.8,0.2,0."
        )
    empty, dealt = list(lacking), {}
    for left, group in zip(range(len(rows), 0, -1), sorted(rows, key=lambda group: _hash(group, seed)), strict=True):
        open_to = empty if left <= len(empty) else list(lacking)
        split = max(open_to, key=lambda split: lacking[split])
        dealt[group] = split
        lacking[split] -= rows[group]
        if split in empty:
            empty.remove(split)
    return dealt


def hashed_fraction(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name: names below 0.01 are a lasting 1 % of any list."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def block_groups(centres: list[tuple[str, float, float]], size: float) -> list[str]:
    """The block that each point lies in: bands of latitude as high as a block, each cut into pieces as wide, in its
    middle, on a sphere.

    Args:
        centres (`list[tuple]`): coordinate system, x and y of each point.
        size (`float`): side of the blocks in metres.

    Returns:
        A name per point.

    Raises:
        ValueError: for coordinates that are no place.
    """
    transform = geo_module("rasterio.warp").transform
    names = [""] * len(centres)
    height = math.degrees(size / EARTH_RADIUS)
    for crs in dict.fromkeys(crs for crs, _, _ in centres):
        numbers = [number for number, centre in enumerate(centres) if centre[0] == crs]
        try:
            found = transform(crs, "EPSG:4326", [centres[n][1] for n in numbers], [centres[n][2] for n in numbers])
        except Exception as error:  # GDAL's errors have no public name
            raise ValueError(
                f"`centres` must lie on the map of their coordinate system, got {error} in {crs[:40]}. Look at the "
                "georeferencing."
            ) from error
        for number, longitude, latitude in zip(numbers, *found, strict=True):
            row = math.floor(latitude / height)
            width = height / math.cos(math.radians(max(-89.0, min(89.0, (row + 0.5) * height))))
            names[number] = f"block_x{math.floor(longitude / width)}_y{row}"
    return names


def overlapping_footprints(footprints: list[Footprint]) -> list[tuple[Footprint, Footprint]]:
    """Pairs of footprints of different splits that overlap by more than half a pixel; edges may touch.

    Footprints in one coordinate system are compared in it; those in several, in degrees.

    Returns:
        Pairs, ordered by keys. Rows with the same footprint and split count as one.
    """
    shapely, warp = geo_module("shapely"), geo_module("rasterio.warp")
    unique = list({(place.crs, place.bounds, place.split): place for place in reversed(footprints)}.values())
    shared = len({place.crs for place in unique}) == 1
    shapes = []
    for place in unique:
        left, bottom, right, top = place.bounds
        inset = place.pixel * _TOLERANCE_PIXELS / 2
        shape = shapely.box(left + inset, bottom + inset, right - inset, top - inset)
        if not shared:
            given = shapely.geometry.mapping(shape)
            # Cut where degrees jump from 180 to -180: else such a shape would reach around the Earth.
            moved = warp.transform_geom(place.crs, "EPSG:4326", given, antimeridian_cutting=True)
            shape = _around_the_earth(shapely.geometry.shape(moved))
        shapes.append(shape)
    of_split = {
        split: [number for number, place in enumerate(unique) if place.split == split]
        for split in sorted({place.split for place in unique})
    }
    pairs = []
    for one, other in itertools.combinations(of_split, 2):
        here, there = of_split[one], of_split[other]
        tree = shapely.STRtree([shapes[number] for number in there])
        found = tree.query([shapes[number] for number in here], predicate="intersects")
        pairs += [(unique[here[a]], unique[there[b]]) for a, b in np.transpose(found)]
    return sorted(pairs, key=lambda pair: (pair[0].key, pair[1].key))


def describe_counts(
    counts: dict[str, SplitCounts], kind: str | None = None, classes: list[str] | None = None
) -> list[str]:
    """Lines on what every split holds.

    Args:
        counts (`dict[str, SplitCounts]`): by split.
        kind (`str`, *optional*): of the labels: `class`, `list`, `number` or `map`; `None` without labels.
        classes (`list[str]`, *optional*): names of the ids of maps.
    """
    lines = []
    for split in sorted(counts, key=SPLITS.index):
        held = counts[split]
        lines.append(f"{split:<6} {held.rows} rows, {len(held.places)} places")
        if kind is None:
            continue
        unit = " px" if kind == "map" else ""
        named = [(classes[name] if classes else str(name), held.labels[name]) for name in sorted(held.labels)]
        found = ", ".join(f"{name} {count:,}{unit}" for name, count in named)
        lines.append(f"       {found or 'no labels'}; {held.unlabelled} rows unlabelled")
    if kind is not None and "train" in counts:
        known = {split: set(held.labels) for split, held in counts.items()}
        known["the file of labels"] = set(range(len(classes or ())))
        for split in sorted(set(known) - {"train"}):
            absent = sorted(known[split] - known["train"])
            names = ", ".join(classes[name] if classes else str(name) for name in absent)
            lines += [f"! train has no {names}, which {split} has"] if absent else []
    return lines


def _around_the_earth(shape):
    """A shape in degrees, of which what lies beyond 180 is where it is called -180, and the reverse."""
    shapely = geo_module("shapely")
    beyond = [shapely.affinity.translate(shape, xoff=turn) for turn in (-360, 360)]
    whole = shapely.box(-180, -90, 180, 90)
    return shapely.union_all([part.intersection(whole) for part in (shape, *beyond)])


def _hash(group: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{group}".encode()).digest()
