"""Shards from folders of GeoTIFF chips: one file per sensor and key, paired by the key in their paths.

In two passes: `plan_folder` reads headers and labels' tables and decides everything; `write_folder` reads the pixels,
a row at a time.
"""

import glob
import math
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from msgfm_hf.data.geotiff import Header, check_grid, crs_name, header_bounds, physical_factors
from msgfm_hf.data.inputs import Input, input_bands, input_header, input_levels, read_input
from msgfm_hf.data.labels import (
    KeyTable,
    Labels,
    MaskLabels,
    TableLabels,
    VectorLabels,
    hide_invalid,
    read_key_table,
)
from msgfm_hf.data.shards import ShardRow, ShardWriter
from msgfm_hf.data.splits import (
    DEFAULT_SHARES,
    SPLITS,
    Footprint,
    SplitCounts,
    block_groups,
    deal_groups,
    overlapping_footprints,
    parse_shares,
    parse_split_by,
    split_column,
)

LEFT_OUT = "left_out.csv"
_SHOWN = 5
# Where blocks hold fewer chips than this on average, they keep no neighbours together.
_FEW_CHIPS = 2
# What counts as one place where a table gives the split alone.
_PLACE_METRES = 5000.0


@dataclass
class PlannedRow:
    """One key and what is known about it before its pixels are read.

    Args:
        key (`str`): of the row.
        files (`dict[str, str]`): by sensor.
        grid (`Header`): of the file that gives the row its place: the first that has one.
        split, group_id (`str`): of the row.
    """

    key: str
    files: dict[str, str]
    grid: Header
    split: str = ""
    group_id: str = ""


@dataclass
class FolderPlan:
    """What `write_folder` will do.

    Args:
        inputs (`dict[str, Input]`): by sensor.
        rows (`list[PlannedRow]`): ordered by key.
        labels (`Labels`, *optional*): labels of the rows.
        said (`list[str]`): what was found, matched and left out, to print.
        left_out (`dict[str, str]`): {key: why it has no row}.
    """

    inputs: dict[str, Input]
    rows: list[PlannedRow]
    labels: Labels | None
    said: list[str]
    left_out: dict[str, str]


def match_keys(pattern: str) -> dict[str, str]:
    """The files that a pattern with `{key}` stands for.

    `{key}` is a part of a file or folder name; `**/{key}` takes the folders below into the key; `*` and `?` stand for
    any text without a separator, `**/` for any folders. A second `{key}` repeats the first.

    Returns:
        `{key: path}`, sorted by key.

    Raises:
        ValueError: without `{key}`, or if two files have one key.
    """
    if "{key}" not in pattern:
        raise ValueError(f"`input` must be a pattern with {{key}}, got {pattern!r}. Example: chips/s1/{{key}}.tif")
    parts = re.split(r"(\*\*/\{key\}|\{key\}|\*\*/|\*|\?)", pattern)
    wild = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    expression, looked_for, named = "", "", False
    for part in parts:
        if part.endswith("{key}"):
            expression += "(?P=key)" if named else "(?P<key>.+)" if part.startswith("**/") else "(?P<key>[^/]+)"
            looked_for, named = looked_for + part.replace("{key}", "*"), True
        else:
            expression += wild.get(part) or re.escape(part)
            looked_for += part if part in wild else glob.escape(part)
    found: dict[str, str] = {}
    for path in sorted(glob.glob(looked_for, recursive=True)):
        match = re.fullmatch(expression, path)
        if match is None or not Path(path).is_file():
            continue
        if match["key"] in found:
            raise ValueError(
                f"`input` must find one file per key, got {found[match['key']]} and {path} for key {match['key']!r}. "
                "Narrow the pattern, or take more of the path into the key with **/{key}."
            )
        found[match["key"]] = path
    return dict(sorted(found.items()))


def plan_folder(
    inputs: dict[str, Input],
    split_by: str,
    labels: str | None = None,
    label: str | None = None,
    label_type: str | None = None,
    splits: str | None = None,
    shares: str = DEFAULT_SHARES,
    seed: int = 0,
    allow_overlap: bool = False,
    drop_overlap: bool = False,
) -> FolderPlan:
    """Pair the chips of several sensors, find their labels and give them to splits by place; no pixels are read.

    Args:
        inputs (`dict[str, Input]`): by sensor; `path` is a pattern as in `match_keys`.
        split_by (`str`): a column, or `block:5km`. A column whose values are train, val and test is the split; a
            column without such values, and blocks, are groups that are dealt as a whole. A mix is refused.
        labels (`str`, *optional*): a CSV, a pattern of masks with `{key}`, or a file of points and polygons.
        label (`str`, *optional*): column or attribute of the labels.
        label_type (`str`, *optional*): `class`, `list` or `number`, of a CSV.
        splits (`str`, *optional*): CSV with the column of `split_by`; default `labels`. With a split column images on
            the map are counted by places of 5 km, others each by itself.
        shares (`str`): parts of train, val and test, where groups are dealt.
        seed (`int`): of the deal.
        allow_overlap (`bool`): accept footprints that overlap across splits.
        drop_overlap (`bool`): leave out rows of val that overlap test, then rows of train that overlap val or test:
            chips cut with a regular overlap meet at the border of any block.

    Returns:
        `FolderPlan`: all rows are paired, on one grid each, and have a split.

    Raises:
        ValueError: if no key has a file of every sensor, the grids of a row differ, a file cannot be read, its bands
            are not known or its bands, unit or dtype are not those of the others, labels or splits cannot be read, or
            footprints overlap across splits.
    """
    by, parts = parse_split_by(split_by), parse_shares(shares)
    input_levels(inputs)
    files = {sensor: match_keys(given.path) for sensor, given in inputs.items()}
    keys = sorted(set.intersection(*map(set, files.values())))
    said, left_out = [], {}
    for sensor, found in files.items():
        alone = set(found) - set(keys)
        for key in alone:
            there = [name for name in files if key in files[name]]
            left_out[key] = f"{' and '.join(there)} without {' and '.join(name for name in files if name not in there)}"
        said.append(f"{sensor}: {len(found)} files match {inputs[sensor].path}")
        said += [f"{sensor}: {_listed(alone)} have no partner and are left out"] if alone else []
    if not keys:
        seen = [f"{sensor}: {inputs[sensor].path} finds {_listed(found)}" for sensor, found in files.items()]
        raise ValueError(
            f"`input` must find a file of every sensor for some key, got none. Keys by sensor: {'; '.join(seen)}. "
            "The text in place of {key} must be the same for all sensors."
        )
    said.append(f"{len(keys)} keys have every sensor")
    facts: Counter = Counter()
    kinds: dict[str, tuple[str, str]] = {}
    rows = [
        _plan_row(key, {sensor: files[sensor][key] for sensor in files}, inputs, facts, kinds)
        for key in tqdm(keys, "reading headers", unit=" rows")
    ]
    said += [f"{sensor}: {count} files {fact}" for (sensor, fact), count in sorted(facts.items())]
    table = None if splits is None else read_key_table(splits, keys, "splits")
    said += [table.said] if table else []
    found, label_table = _open_labels(labels, label, label_type, keys)
    said += found.said if found else []
    unlabelled = [key for key in keys if found and not found.has(key)]
    said += [f"labels: none for {_listed(unlabelled)}"] if unlabelled else []
    if by.block is not None:
        _group_by_block(rows, by.block)
        dealt = deal_groups(Counter(row.group_id for row in rows), parts, seed)
        for row in rows:
            row.split = dealt[row.group_id]
        said.append(f"split: {len(dealt)} blocks of {by.block:g} m, dealt {shares} by rows (seed {seed})")
        chips = len({_place(row) for row in rows})
        if chips < _FEW_CHIPS * len(dealt):
            said.append(
                f"! split: {chips} places in {len(dealt)} blocks: where chips touch, neighbours fall into other "
                "splits. Larger blocks keep them together"
            )
    else:
        rows = _split_by_column(rows, by.column, table or label_table, parts, shares, seed, said)
        left_out |= dict.fromkeys(set(keys) - {row.key for row in rows}, f"no {by.column!r}")
    if drop_overlap:
        before = {row.key: row.split for row in rows}
        rows = _without_overlap(rows, said)
        gone = set(before) - {row.key for row in rows}
        left_out |= {key: f"of {before[key]}, overlaps another split" for key in gone}
    _check_overlap(rows, allow_overlap, said)
    if found and found.kind == "map":
        for row in tqdm(rows, "checking labels", unit=" rows"):
            if found.has(row.key):
                found.check(row.key, row.grid)
    return FolderPlan(inputs, rows, found, said, left_out)


def write_folder(plan: FolderPlan, out, name: str, seed: int = 0, overwrite: bool = False) -> dict[str, SplitCounts]:
    """Read the pixels of a plan, row by row, and write them as one source, in a seeded order; `left_out.csv` beside
    them names every key that has no row.

    Args:
        plan (`FolderPlan`): of `plan_folder`.
        out (`str` or `Path`): folder of all sources.
        name (`str`): the source.
        seed (`int`): of the order.
        overwrite (`bool`): replace the source if it exists.

    Returns:
        `{split: SplitCounts}`.

    Raises:
        ValueError: if a file cannot be read or its values are implausible; then nothing is written.
    """
    levels, classes = input_levels(plan.inputs), plan.labels.classes if plan.labels else None
    counts: dict[str, SplitCounts] = {}
    # Neighbours in a row group are read together: in the order of keys a batch would come from one place.
    order = np.random.default_rng(seed).permutation(len(plan.rows))
    with ShardWriter(out, name, list(plan.inputs), levels, classes=classes, overwrite=overwrite) as writer:
        for number in tqdm(order, f"writing {name}", unit=" rows"):
            planned = plan.rows[number]
            images = {sensor: read_input(plan.inputs[sensor], path) for sensor, path in planned.files.items()}
            found, target = plan.labels.read(planned.key, planned.grid) if plan.labels else (None, None)
            if target is not None and plan.labels.kind == "map":
                target = hide_invalid(target, images.values())
            row = ShardRow(
                planned.key,
                name,
                planned.split,
                planned.group_id,
                images,
                pair_id=planned.key if len(images) > 1 else None,
                bounds=header_bounds(planned.grid),
                labels=found,
                target=target,
            )
            writer.write(row)
            counts.setdefault(row.split, SplitCounts()).add(row)
        if classes is not None and not any(split.labels for split in counts.values()):
            raise ValueError(
                f"`labels` must lie on the images, got none of {', '.join(classes)} on any. Check the coordinates."
            )
        if plan.left_out:
            writer.write_table(LEFT_OUT, [("key", "why"), *sorted(plan.left_out.items())])
    return counts


def _plan_row(
    key: str, files: dict[str, str], inputs: dict[str, Input], facts: Counter, kinds: dict[str, tuple[str, str]]
) -> PlannedRow:
    headers = {sensor: input_header(inputs[sensor], path) for sensor, path in files.items()}
    grid = next((header for header in headers.values() if header.crs is not None), next(iter(headers.values())))
    for sensor, header in headers.items():
        given = inputs[sensor]
        # What the pixels would be read with is settled before any is read.
        bands, picked = input_bands(given, header)
        unit, _, _ = physical_factors(header, sensor, given.unit, given.scale, given.offset, picked)
        check_grid(header, grid)
        kind = f"{', '.join(bands)} in {unit}, {header.dtype}"
        expected, first = kinds.setdefault(sensor, (kind, header.path))
        if kind != expected:
            raise ValueError(
                f"`input` of sensor {sensor!r} must have the same bands, unit and dtype in all files, got {kind} in "
                f"{header.path}, and {expected} in {first}. Convert them, or make a source of each."
            )
        if header.crs is None:
            facts[sensor, "have no place on the map: neither their grids nor overlaps could be compared"] += 1
        if header.alpha is not None:
            facts[sensor, "have an alpha band: where it is 0, pixels are invalid"] += 1
        if header.masked and header.nodata is None and given.nodata is None and np.dtype(header.dtype).kind != "f":
            facts[sensor, "have a mask but no nodata value: each gets a value that none of its valid pixels has"] += 1
    return PlannedRow(key, files, grid)


def _open_labels(
    labels: str | None, label: str | None, label_type: str | None, keys: list[str]
) -> tuple[Labels | None, KeyTable | None]:
    masks = labels is not None and "{key}" in labels
    is_table = labels is not None and not masks and Path(labels).suffix.lower() == ".csv"
    if label_type is not None and not is_table:
        raise ValueError(f"`label_type` is for labels in a CSV: got {label_type!r} for {labels}. Leave it out.")
    if (label is None) != (labels is None or masks):
        raise ValueError(
            "`label` must name the column of a CSV or the attribute of shapes in `labels`, and nothing else, "
            f"got {label!r} for {labels}. Masks with {{key}} need none."
        )
    if masks:
        files = match_keys(labels)
        found = MaskLabels({key: files[key] for key in keys if key in files})
        if not found.files:
            raise ValueError(
                f"`labels` must find a mask for some key, got keys {_listed(files)} for {labels}. "
                f"Keys of the images are {_listed(keys)}."
            )
        return found, None
    if is_table:
        table = read_key_table(labels, keys)
        return TableLabels(table, label, keys, label_type), table
    return (VectorLabels(labels, label) if labels else None), None


def _group_by_block(rows: list[PlannedRow], size: float):
    for row in rows:
        if row.grid.crs is None:
            raise ValueError(
                f"`split_by` blocks need images with a place on the map, got none in {row.grid.path}. "
                "Georeference it, or split by a column."
            )
        side = max(row.grid.shape) * row.grid.gsd
        if size < side:
            raise ValueError(
                f"`split_by` blocks must be at least as large as an image, got {size:g} m for {row.grid.path} of "
                f"{side:.4g} m: neighbours would fall into splits by chance. Take blocks several times as large."
            )
    _name_blocks(rows, size)


def _name_blocks(rows: list[PlannedRow], size: float):
    centres = []
    for row in rows:
        height, width = row.grid.shape
        centres.append((crs_name(row.grid.crs), *(row.grid.transform @ (width / 2, height / 2))))
    try:
        groups = block_groups(centres, size)
    except ValueError:
        for row, centre in zip(rows, centres, strict=True):
            try:
                block_groups([centre], size)
            except ValueError as error:
                raise ValueError(f"{error} This is {row.grid.path}.") from error
        raise
    for row, group in zip(rows, groups, strict=True):
        row.group_id = group


def _split_by_column(rows, column, table, parts, shares, seed, said) -> list[PlannedRow]:
    if table is None:
        raise ValueError(
            f"`split_by` must be a column of a CSV, or block:5km, got {column!r} without a CSV. "
            "Give it with `splits`, if not with `labels`."
        )
    values = table.values(column, [row.key for row in rows])
    if not values:
        raise ValueError(
            f"`split_by` must be a column with values for the keys of the images, got {column!r} of {table.path} with "
            "none. Name another."
        )
    left_out = [row.key for row in rows if row.key not in values]
    if left_out:
        said.append(f"split: {_listed(left_out)} have no {column!r} in {table.path} and are left out")
    rows = [row for row in rows if row.key in values]
    split = split_column(set(values.values()))
    for row in rows:
        row.group_id = row.key if split else values[row.key]
    if split:
        said.append(f"split: that of column {column!r} of {table.path}")
        # Who made the split does not say which chips are of one place, and results are counted by place.
        placed = [row for row in rows if row.grid.crs is not None]
        _name_blocks(placed, _PLACE_METRES)
        count = len({row.group_id for row in placed})
        said += [f"places: {count} blocks of {_PLACE_METRES:g} m"] if placed else []
    dealt = None if split else deal_groups(Counter(values.values()), parts, seed)
    for row in rows:
        row.split = split[values[row.key]] if split else dealt[row.group_id]
    if dealt:
        said.append(f"split: {len(dealt)} groups of column {column!r}, dealt {shares} by rows (seed {seed})")
    return rows


def _overlaps(rows: list[PlannedRow]) -> list[tuple[Footprint, Footprint]]:
    footprints = [
        Footprint(
            row.key,
            row.split,
            crs_name(row.grid.crs),
            row.grid.bounds,
            math.sqrt(abs(row.grid.transform.determinant)),
        )
        for row in rows
        if row.grid.crs is not None
    ]
    return overlapping_footprints(footprints) if footprints else []


def _place(row: PlannedRow):
    return None if row.grid.crs is None else (crs_name(row.grid.crs), row.grid.bounds)


def _without_overlap(rows: list[PlannedRow], said: list[str]) -> list[PlannedRow]:
    splits = {row.split for row in rows}
    # What is left out of val no longer takes rows from train.
    for split in ("val", "train"):
        pairs = [min(pair, key=lambda place: SPLITS.index(place.split)) for pair in _overlaps(rows)]
        # Revisits of a place come as one.
        places = {(place.crs, place.bounds) for place in pairs if place.split == split}
        gone = {row.key for row in rows if row.split == split and _place(row) in places}
        rows = [row for row in rows if row.key not in gone]
        said += [f"overlap: {_listed(gone)} of {split} overlap another split and are left out"] if gone else []
    empty = sorted(splits - {row.split for row in rows})
    if empty:
        raise ValueError(
            f"`drop_overlap` must leave rows in every split, got none in {', '.join(empty)}. "
            "Split by larger blocks: fewer chips lie at their borders."
        )
    return rows


def _check_overlap(rows: list[PlannedRow], allow_overlap: bool, said: list[str]):
    placed, pairs = sum(row.grid.crs is not None for row in rows), _overlaps(rows)
    first = "; ".join(f"{one.key} ({one.split}) and {other.key} ({other.split})" for one, other in pairs[:_SHOWN])
    if pairs and not allow_overlap:
        raise ValueError(
            f"`split_by` must keep footprints that overlap in one split, got {len(pairs)} pairs that do not: {first}. "
            "Split by place where places lie apart. Chips cut with a regular overlap meet at the border of any block, "
            "however large: leave those out with --drop-overlap, or accept it with --allow-overlap."
        )
    said.append(
        f"overlap: {len(pairs)} pairs of footprints overlap across splits: {first}"
        if pairs
        else f"overlap: no footprint overlaps one of another split ({placed} compared)"
    )


def _listed(keys: Collection[str]) -> str:
    shown = sorted(keys)[:_SHOWN]
    return f"{len(keys)} ({', '.join(shown)}{', ...' if len(keys) > len(shown) else ''})"
