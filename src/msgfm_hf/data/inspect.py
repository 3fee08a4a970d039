"""What is in a folder of shards: a report in words and numbers, and a contact sheet; and what a sensor is."""

import dataclasses
import functools
import itertools
import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from msgfm_hf.data.shards import UNLABELLED, CorruptShardError, ShardImage, ShardSource, find_sources, shard_splits
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.sensors import CONVERTIBLE_UNITS, SENSORS, get_sensor

_FOOTNOTE = "Each band is stretched from its 2nd to its 98th percentile in the panel. Magenta: no data."
# Classes named beside a map.
_LEGEND = 8
_UNIT_SYMBOLS = {"db": "dB", "metres": "m"}
# What Sentinel-2 products carry more since processing baseline 04.00, in digital numbers.
_BASELINE_DN = 1000
# Reflectance is a little below zero where the atmosphere was overestimated, over dark ground.
_NEGATIVE = 0.25


class ShardReport(str):
    """A report to print; `damaged` says what is wrong with which rows, as far as that was looked for."""

    damaged: list[str]


def inspect_shards(path, verify: bool = False, rows: int = 32) -> ShardReport:
    """A report on one source, or on every source in a folder.

    Rows and places per split, places that occur in more than one; per sensor bands, units, dtype, sizes, ground
    sampling distance, dates, and per band minimum, median and maximum of valid pixels, stored and in the physical unit
    of the sensor (not clipped).

    Args:
        path (`str` or `Path`): folder of a source, or of several.
        verify (`bool`): read everything, with page checksums, and list the damaged rows.
        rows (`int`): how many rows of a source the values are measured on, spread evenly.

    Returns:
        `ShardReport`: a `str` with the list `damaged`.

    Raises:
        ValueError: if there are no shards.
        CorruptShardError: without `verify`, at the first damaged file or row that is met.
    """
    parts = [_report(folder, verify, rows) for folder in find_sources(path)]
    report = ShardReport("\n\n".join(text for text, _ in parts))
    report.damaged = [reason for _, damaged in parts for reason in damaged]
    return report


def describe_sensors(sensors: Iterable[str] = ()) -> str:
    """What the sensors of the catalogue are: units, factors, levels, and every band with its other names.

    Args:
        sensors (`Iterable[str]`): their ids; by default all.

    Returns:
        `str`: a table per sensor, with statistics of the first level.

    Raises:
        ValueError: for an unknown sensor.
    """
    parts = []
    for spec in map(get_sensor, list(sensors) or SENSORS):
        offset = "an offset that must be said" if spec.offset is None else f"offset {spec.offset:g}"
        factors = f"; dn with scale {spec.scale:.6g} and {offset}" if spec.scale is not None else ""
        units = ", ".join(CONVERTIBLE_UNITS[spec.unit])
        lines = [
            f"{spec.id}: {spec.default_unit} unless unit= says otherwise (one of {units}){factors}",
            f"  levels: {', '.join(spec.levels) or 'none'}; statistics in {spec.unit}: {spec.source}",
        ]
        header = ("band", "also called", "nm", "gsd", "clip", "mean", "std")
        table = [header]
        for band in spec.bands:
            clip = "-" if band.clip is None else "{:g} to {:g}".format(*band.clip)
            known = (
                "-" if band.wavelength is None else f"{band.wavelength:g}",
                "-" if band.gsd is None else f"{band.gsd:g} m",
                clip,
                f"{band.mean:.4g}",
                f"{band.std:.4g}",
            )
            table.append((band.name, ", ".join(band.aliases), *known))
        parts.append("\n".join([*lines, textwrap.indent(align(table, left=2), "    ")]))
    return "\n\n".join(parts)


def contact_sheet(path, out_png, split: str | None = None, rows: int | None = None, seed: int = 0) -> Path:
    """Draw samples as a picture: a line per row, a panel per sensor (radar: per band), and one for a map of labels.

    Headings have split, key, dates and labels. Three-band panels show red, green and blue; others one band with a
    colour bar in its physical unit. Each band is stretched from the 2nd to the 98th percentile of its valid pixels;
    invalid pixels are magenta; a bar gives the scale.

    Args:
        path (`str` or `Path`): folder of a source, or of several.
        out_png (`str` or `Path`): the picture.
        split (`str`, *optional*): the split; by default all in turn, train first.
        rows (`int`, *optional*): rows per source; 4 by default, 1 for a folder of several.
        seed (`int`): which rows.

    Returns:
        `Path`: `out_png`.

    Raises:
        ValueError: if there are no shards, or not this split.
    """
    from matplotlib.figure import Figure

    folders = find_sources(path)
    count = rows or (4 if len(folders) == 1 else 1)
    lines = []
    for folder in folders:
        splits = [split] if split else sorted(shard_splits(folder), key=lambda name: name != "train")
        sources = [ShardSource(folder, name) for name in splits]
        orders = [np.random.default_rng(seed).permutation(len(source)).tolist() for source in sources]
        turns = itertools.zip_longest(*orders)
        drawn = [(source, n) for turn in turns for source, n in zip(sources, turn, strict=True) if n is not None]
        lines += [(source, source.read(number)) for source, number in drawn[:count]]
    panels = [_panels(source, row) for source, row in lines]
    # Inches. A line has a strip for its heading above the panels; a column has one for a colour bar if it needs it.
    panel, bar, heading, caption, margin = 2.6, 0.75, 0.34, 0.26, 0.15
    lefts, right = [], margin
    for column in range(max(map(len, panels))):
        lefts.append(right)
        barred = any(len(line) > column and line[column].barred for line in panels)
        right += panel + margin + bar * barred
    line_height = heading + caption + panel + margin
    width, height = max(right, 5.0), len(lines) * line_height + heading
    figure = Figure(figsize=(width, height), dpi=110)
    mapped = any(shown.classes is not None for line in panels for shown in line)
    footnote = _FOOTNOTE + " White: unlabelled." * mapped
    figure.text(margin / width, 0.12 / height, footnote, fontsize=7)
    for number, ((source, row), line) in enumerate(zip(lines, panels, strict=True)):
        top = height - number * line_height
        figure.text(margin / width, (top - heading) / height, _heading(source, row), fontsize=9, weight="bold")
        for left, shown in zip(lefts, line, strict=False):
            bottom = top - heading - caption - panel
            axes = figure.add_axes((left / width, bottom / height, panel / width, panel / height))
            axes.set_anchor("NW")
            drawn = _draw(axes, shown)
            if shown.barred:
                strip = figure.add_axes(((left + panel + 0.08) / width, bottom / height, 0.11 / width, panel / height))
                strip.tick_params(labelsize=7)
                figure.colorbar(drawn, cax=strip).set_label(shown.unit, fontsize=8, labelpad=2)
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    partial = out_png.with_name(f".{out_png.name}.partial")
    figure.savefig(partial, format="png")
    os.replace(partial, out_png)
    return out_png


class _Panel(NamedTuple):
    title: str
    values: np.ndarray  # (H, W) in `unit`, or (H, W, 3); NaN where invalid
    unit: str
    gsd: float | None
    classes: dict[float, str] | None = None  # of a map of labels: names by the ids that are in it

    @property
    def barred(self) -> bool:
        return self.values.ndim == 2 and self.classes is None


def _report(folder: str, verify: bool, rows: int) -> tuple[str, list[str]]:
    sources, metadata, damaged = {}, {}, []
    for split in shard_splits(folder):
        try:
            source = ShardSource(folder, split)
            metadata[split] = source.read_metadata()
            sources[split] = source
        except CorruptShardError as error:
            if not verify:
                raise
            damaged.append(str(error))
    if not sources:
        return "\n".join([f"{folder}: no readable split", *damaged]), damaged
    places = {split: Counter(row["group_id"] for row in table) for split, table in metadata.items()}
    source = next(iter(sources.values()))
    total = sum(map(len, metadata.values()))
    kind = "paired " + " + ".join(source.sensors) if len(source.sensors) > 1 else f"unpaired {source.sensors[0]}"
    lines = [f"{source.name}: {_plural(total, 'row')}, {kind}, {folder}"]
    for split, counts in places.items():
        named = [f"{place} ({n})" for place, n in sorted(counts.items())]
        more = f" and {len(named) - 8} more" if len(named) > 8 else ""
        shown = ", ".join(named[:8]) + more
        lines.append(f"  {split:<6}{_plural(len(metadata[split]), 'row')}, {_plural(len(counts), 'place')}: {shown}")
    holders = Counter(place for counts in places.values() for place in counts)
    shared = sorted(place for place, n in holders.items() if n > 1)
    lines.append(f"  places in more than one split: {', '.join(shared) or 'none'}")
    everything = [row for table in metadata.values() for row in table]
    numbers = np.unique(np.linspace(0, total - 1, min(rows, total)).round().astype(int))
    lines += _label_report(sources, metadata, numbers, damaged, verify)
    for sensor in source.sensors:
        lines += _sensor_report(source, sensor, [row["images"][sensor] for row in everything])
        lines += _value_report(source, sensor, list(_images(sources, sensor, numbers, damaged, verify)))
    lines.append(f"  values measured on {len(numbers)} of {_plural(total, 'row')}")
    if verify:
        for split in sources.values():
            damaged += _damaged_rows(split)
        damaged = list(dict.fromkeys(damaged))
        verdict = f"{len(damaged)} damaged" if damaged else "all rows are sound"
        lines.append(f"  verified with page checksums: {verdict}")
        lines += [f"    {reason}" for reason in damaged]
    return "\n".join(lines), damaged


def _images(sources, sensor, numbers, damaged, verify):
    return (row["images"][sensor] for _, row in _rows(sources, numbers, damaged, verify))


def _rows(sources, numbers, damaged, verify):
    """The split and the row of each number; rows are counted over all splits."""
    offset = 0
    for split, source in sources.items():
        for number in numbers[(numbers >= offset) & (numbers < offset + len(source))]:
            try:
                yield split, source.read(int(number) - offset, verify=verify)
            except CorruptShardError as error:
                if not verify:
                    raise
                damaged.append(str(error))
        offset += len(source)


def _label_report(sources, metadata, numbers, damaged, verify) -> list[str]:
    """Images per label and split; of maps the share of each class on the rows that values are measured on."""
    lines, classes = [], next(iter(sources.values())).classes
    for split, table in metadata.items():
        counts = Counter(label for row in table for label in row["labels"] or ())
        if counts:
            named = ", ".join(f"{label} {count}" for label, count in sorted(counts.items()))
            lines.append(f"  labels {split}: {named}; {sum(not row['labels'] for row in table)} rows without")
    pixels = {split: np.zeros(UNLABELLED + 1, np.int64) for split in sources}
    amounts: dict[str, list[float]] = {}
    for split, row in _rows(sources, numbers, damaged, verify):
        # Of maps the dtype is that of ids; numbers are floats.
        if row["target"] is not None and row["target"].pixels.dtype == np.uint8:
            pixels[split] += np.bincount(row["target"].pixels.ravel(), minlength=UNLABELLED + 1)
        elif row["target"] is not None:
            amounts.setdefault(f"{', '.join(row['target'].bands)} {split}", []).append(row["target"].pixels.mean())
    for name, found in amounts.items():
        low, middle, high = np.nanmin(found), np.nanmedian(found), np.nanmax(found)
        lines.append(f"  number {name}: {low:.5g} to {high:.5g}, median {middle:.5g}, of {_plural(len(found), 'row')}")
    if classes is not None:
        lines.append("  classes: " + ", ".join(f"{number} {name}" for number, name in enumerate(classes)))
    elif not any(counts.any() for counts in pixels.values()):
        return lines
    ids = np.flatnonzero(np.sum(list(pixels.values()), axis=0)[:UNLABELLED])
    # Masks have ids without names.
    named = list(enumerate(classes)) if classes is not None else [(number, f"id {number}") for number in ids]
    for split, counts in pixels.items():
        total = max(counts.sum(), 1)
        shares = [f"{name} {100 * counts[number] / total:.3g} %" for number, name in named]
        shares.append(f"unlabelled {100 * counts[UNLABELLED] / total:.3g} %")
        lines.append(f"  map {split}: {', '.join(shares)}")
    return lines


def _damaged_rows(source: ShardSource) -> list[str]:
    reasons = []
    for number in range(len(source)):
        try:
            source.read(number, verify=True)
        except CorruptShardError as error:
            reasons.append(str(error))
    return reasons


def _sensor_report(source, sensor, metas) -> list[str]:
    sizes = Counter("{1} x {2}".format(*meta["shape"]) for meta in metas)
    facts = [f"{source.dtypes[sensor]}, unit {source.units[sensor]}"]
    if source.levels[sensor]:
        facts.append(f"level {source.levels[sensor]}")
    facts.append(", ".join(f"{size} px" for size in sizes) if len(sizes) < 4 else f"{len(sizes)} sizes")
    facts.append(f"gsd {_range([meta['gsd'] for meta in metas], ' m')}")
    facts.append(f"dates {_range([meta['datetime'] for meta in metas])}")
    factors = sorted({(meta["scale"], meta["offset"]) for meta in metas})
    factors = [f"stored * {scale:.6g} {'-' if offset < 0 else '+'} {abs(offset):.6g}" for scale, offset in factors]
    physical = " or ".join(factors) if len(factors) < 4 else f"stored * scale + offset, {len(factors)} pairs of them"
    nodata = sorted({str(meta["nodata"]) for meta in metas if meta["nodata"] is not None})
    grids = sorted({str(meta["crs"]) for meta in metas})
    return [
        f"  {sensor}: {', '.join(facts)}",
        f"    physical = {physical}; nodata {', '.join(nodata) or 'none'}; "
        f"{', '.join(grids) if len(grids) < 6 else f'{len(grids)} coordinate systems'}",
    ]


def _value_report(source, sensor, images) -> list[str]:
    unit = _physical_unit(sensor, source.units[sensor])
    header = ("band", "nm", "stored min", "median", "max", f"{unit} min", "median", "max")
    stored = [np.where(image.valid_mask(), image.pixels.astype(np.float64), np.nan) for image in images]
    physical = [_physical(sensor, image, source.levels[sensor]) for image in images]
    table = [header]
    for position, band in enumerate(source.bands[sensor]):
        line = [band, _wavelength(sensor, band)]
        for values in (stored, physical):
            seen = np.concatenate([image[position].ravel() for image in values]) if values else np.array([])
            seen = seen[np.isfinite(seen)]
            line += [f"{f(seen):.5g}" if len(seen) else "-" for f in (np.min, np.median, np.max)]
        table.append(tuple(line))
    lines = textwrap.indent(align(table, left=1), "    ").splitlines()
    invalid = np.mean(np.concatenate([~image.valid_mask().ravel() for image in images])) if images else 0.0
    return [*lines, f"    invalid pixels: {100 * invalid:.3g} %", *_offset_remark(sensor, images)]


def _offset_remark(sensor: str, images: list[ShardImage]) -> list[str]:
    """A warning where the offset of Sentinel-2 can hardly be the one that was said: ground without a dark pixel in any
    band, or much of it darker than nothing."""
    spec = SENSORS.get(sensor)
    if spec is None or spec.offset is not None:
        return []
    values, zero = [], []
    for image in images:
        # Zero in all bands is no ground, whether the file declares it or not.
        seen = image.valid_mask() & image.pixels.any(0)
        if image.units == "dn" and seen.any():
            values.append(image.pixels[:, seen].astype(np.float64) + image.offset_dn)
            zero += [values[-1]] if image.offset == 0 else []
    if zero and min(map(np.min, zero)) >= _BASELINE_DN:
        return [
            f"    ! no value below {_BASELINE_DN} with offset 0: products since processing baseline 04.00 carry "
            f"{_BASELINE_DN} more. If these do, make the shards anew with offset=-{_BASELINE_DN}."
        ]
    negative = max((np.mean(found < 0, axis=1).max() for found in values), default=0.0)
    if negative > _NEGATIVE:
        return [
            f"    ! {100 * negative:.0f} % of a band of an image is below zero with its offset: products before "
            "processing baseline 04.00, and those that are harmonised with them, have none. If these are, make the "
            "shards anew with offset=0."
        ]
    return []


def align(lines: Sequence[Sequence[str]], left: int) -> str:
    """Lines of cells as text in columns, the first `left` columns to the left and the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


@functools.lru_cache(maxsize=16)
def _processor(sensor: str) -> MsGFMImageProcessor:
    """Radiometry without clipping: a report shows what is there, outliers too."""
    spec = SENSORS[sensor]
    bands = tuple(dataclasses.replace(band, clip=None) for band in spec.bands)
    return MsGFMImageProcessor(sensors={sensor: dataclasses.replace(spec, bands=bands)})


def _physical(sensor: str, image: ShardImage, level: str | None) -> np.ndarray:
    """Float `(C, H, W)` in the unit of the sensor's statistics, NaN where invalid; for a sensor that the catalogue does
    not know, in the image's own."""
    if sensor not in SENSORS:
        values = image.pixels.astype(np.float64) * image.scale + image.offset
        return np.where(image.valid_mask(), values, np.nan)
    processor, spec = _processor(sensor), SENSORS[sensor]
    reference = None if spec.reference is None else 0.0
    normalised = processor.radiometry(
        torch.from_numpy(np.array(image.pixels))[None],
        torch.from_numpy(image.valid_mask())[None],
        sensor,
        bands=image.bands,
        unit=image.units,
        scale=image.scale,
        offset=image.offset_dn,
        level=level,
        reference=reference,
    )
    physical = processor.inverse_radiometry(
        normalised.values,
        normalised.valid_mask,
        sensor,
        bands=image.bands,
        unit=spec.unit,
        scale=1.0,
        offset=0.0,
        level=level,
        reference=reference,
    )
    return physical[0].numpy()


def _physical_unit(sensor: str, units: str) -> str:
    unit = SENSORS[sensor].unit if sensor in SENSORS else units
    return _UNIT_SYMBOLS.get(unit, unit)


def _wavelength(sensor: str, band: str) -> str:
    found = SENSORS[sensor].select([band])[0].wavelength if sensor in SENSORS else None
    return "-" if found is None else f"{found:g}"


def _panels(source: ShardSource, row: dict) -> list[_Panel]:
    panels = []
    for sensor, image in row["images"].items():
        values = _physical(sensor, image, source.levels[sensor])
        unit = _physical_unit(sensor, source.units[sensor])
        colours = _positions(sensor, image.bands, ("red", "green", "blue"))
        if len(colours) == 3:
            shown = [(f"{sensor}: {', '.join(image.bands[c] for c in colours)}", np.moveaxis(values[colours], 0, -1))]
        else:
            # Without true colour: both of two bands, else the one that shows land best.
            chosen = list(range(len(image.bands)))
            if len(chosen) > 2:
                chosen = _positions(sensor, image.bands, ("nir", "red")) or chosen[:1]
            shown = [(f"{sensor}: {image.bands[c]}", values[c]) for c in chosen]
        panels += [_Panel(title, picture, unit, image.gsd) for title, picture in shown]
    target = row["target"]
    if target is not None and target.pixels.dtype == np.uint8:
        ids = target.pixels[0]
        names = {
            n: source.classes[n] if source.classes else f"id {n}" for n in np.unique(ids).tolist() if n < UNLABELLED
        }
        panels.append(_Panel("labels", np.where(ids == UNLABELLED, np.nan, ids), "", target.gsd, names))
    return panels


def _positions(sensor: str, bands: list[str], colours) -> list[int]:
    positions = []
    for colour in colours if sensor in SENSORS else ():
        try:
            band = SENSORS[sensor].resolve(colour)
        except ValueError:
            continue
        if band in bands:
            positions.append(bands.index(band))
    return positions


def _heading(source: ShardSource, row: dict) -> str:
    dates = list(dict.fromkeys(image.datetime for image in row["images"].values() if image.datetime))
    labels = list(row["labels"] or ())
    if row["target"] is not None and row["target"].pixels.size == 1:
        labels = [f"{row['target'].bands[0]} {row['target'].pixels.item():g}"]
    parts = [f"{source.name} {source.split}", row["key"], " / ".join(dates), ", ".join(labels)]
    return "  |  ".join(filter(None, parts))


def _draw(axes, panel: _Panel):
    low, high = (0, UNLABELLED) if panel.classes is not None else _stretch(panel.values)
    height, width = panel.values.shape[:2]
    axes.set_title(panel.title, fontsize=8, loc="left", pad=3)
    axes.set_xticks([])
    axes.set_yticks([])
    if panel.values.ndim == 3:
        picture = np.clip((panel.values - low) / (high - low), 0, 1)
        picture[np.isnan(panel.values).any(axis=-1)] = (1.0, 0.0, 1.0)
        drawn = axes.imshow(picture, interpolation="nearest")
    elif panel.classes is not None:
        drawn = _draw_classes(axes, panel)
    else:
        from matplotlib import colormaps

        colours = colormaps["viridis" if panel.unit == "m" else "gray"].with_extremes(bad="magenta")
        drawn = axes.imshow(panel.values, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    if panel.gsd:
        length = _round_length(width * panel.gsd / 3)
        left, top = width * 0.04, height * 0.93
        for colour, thickness in (("black", 4.5), ("white", 2.5)):
            ends = [left, left + length / panel.gsd]
            axes.plot(ends, [top, top], color=colour, linewidth=thickness, solid_capstyle="butt")
        axes.text(
            left,
            top - height * 0.025,
            f"{length:g} m" if length < 1000 else f"{length / 1000:g} km",
            color="white",
            fontsize=7,
            va="bottom",
            bbox={"facecolor": "black", "alpha": 0.55, "pad": 1.2, "linewidth": 0},
        )
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_ylim(height - 0.5, -0.5)
    return drawn


def _draw_classes(axes, panel: _Panel):
    """A map of labels: the colour of a class is the same in all panels; white is unlabelled."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    # The dark colours first: each has a light one beside it.
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    colours = ListedColormap([colormaps["tab20"](order[number % 20]) for number in range(UNLABELLED)])
    drawn = axes.imshow(panel.values, cmap=colours, vmin=-0.5, vmax=UNLABELLED - 0.5, interpolation="nearest")
    handles = [Patch(color=colours(number), label=name) for number, name in panel.classes.items()]
    shown = handles[:_LEGEND] + [Patch(color="none", label=f"and {len(handles) - _LEGEND} more")] * (
        len(handles) > _LEGEND
    )
    if shown:
        axes.legend(handles=shown, fontsize=6, loc="upper right", framealpha=0.8, handlelength=1, borderpad=0.3)
    return drawn


def _stretch(values: np.ndarray):
    """2nd and 98th percentile of the valid pixels: floats for one band, one per band for `(H, W, 3)`."""
    axis = (0, 1)
    if np.isnan(values).all(axis=axis).any():
        return 0.0, 1.0
    low, high = np.nanpercentile(values, (2, 98), axis=axis)
    return low, np.maximum(high, low + 1e-6)


def _round_length(metres: float) -> float:
    """The largest of 1, 2, 5, 10, 20, 50, ... metres (or a tenth of it, ...) that is not longer."""
    power = 10.0 ** np.floor(np.log10(metres))
    return float(max(step * power for step in (1, 2, 5) if step * power <= metres))


def _range(values, unit: str = "") -> str:
    known = sorted({round(value, 4) if isinstance(value, float) else value for value in values if value is not None})
    if not known:
        return "unknown"
    text = f"{known[0]}{unit}" if len(known) == 1 else f"{known[0]} to {known[-1]}{unit}"
    return text if all(value is not None for value in values) else f"{text}, some unknown"


def _plural(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
