"""The engine that turns a public archive into shards: in parallel, in bounded memory, and again from where it stopped.

A reader (`Archive`) lists the items of its archive and turns one item into a row. The items of a split, in an order
that scatters neighbours, are cut into slices; each slice becomes one Parquet file, whatever happens to the others. So
a file is the unit of work: it appears whole or not at all, is never written again, and any number of processes make
the same bytes.
"""

import errno
import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from msgfm_hf import __version__
from msgfm_hf.data.geotiff import GRID_TOLERANCE, corner_distance
from msgfm_hf.data.shards import ROWS_PER_FILE, ShardFile, ShardImage, ShardRow, ShardRules

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# An image with less than this part of valid pixels teaches little, and is most often a fault of the archive.
MIN_VALID = 0.5
# Errors of the machine, not of a file: another attempt may pass.
_PASSING = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ENOTCONN, errno.EHOSTDOWN),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
}
# A bad item whose reason is a page of text is cut: the list is read on a screen.
_REASON_LENGTH = 400


class Item(NamedTuple):
    """One row to be, without its pixels.

    Attributes:
        key, split, group_id (`str`): as of `ShardRow`.
        paths (`tuple[str, ...]`): files or folders relative to the archive's root, in an order that its reader knows.
        window (`tuple[int, int]`, *optional*): top and left pixel, where a file holds many items.
    """

    key: str
    split: str
    group_id: str
    paths: tuple[str, ...]
    window: tuple[int, int] | None = None


@dataclass
class Listing:
    """What is in an archive.

    Args:
        items (`list[Item]`): what is to be converted, in any order.
        left_out (`dict[str, int]`): how many items were left out on purpose, by reason.
        notes (`list[str]`): what the user should know before training on it.
    """

    items: list[Item]
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Reading(NamedTuple):
    """What an item turned into.

    Attributes:
        row (`ShardRow`, *optional*): `None` if the item is left out on purpose, once its pixels are known.
        remarks (`tuple[str, ...]`): what was done to it or why it was left out; counted in the manifest.
    """

    row: ShardRow | None
    remarks: tuple[str, ...] = ()


class Archive(ABC):
    """A reader of one archive. Instances are sent to other processes, so they hold settings only.

    Attributes:
        source (`str`): name of the source, its folder and its command.
        sensors (`tuple[str, ...]`): sensor ids; every row has all of them.
        levels (`dict[str, str]`): processing level of each sensor that has levels.
        version (`int`): raised whenever the same files would make other rows.
        published (`dict[str, dict]`): `{sensor: {"source": str, "bands": {band: (mean, std)}}}` of stored values, where
            someone published statistics.
        root (`Path`): folder of the archive.
    """

    source: ClassVar[str]
    sensors: ClassVar[tuple[str, ...]]
    levels: ClassVar[dict[str, str]] = {}
    version: ClassVar[int] = 1
    published: ClassVar[dict[str, dict]] = {}
    root: Path

    @abstractmethod
    def options(self) -> dict:
        """The settings that decide what is converted; JSON-able."""

    @abstractmethod
    def list_items(self) -> Listing:
        """What is in the archive, without reading pixels.

        Raises:
            ValueError: if the root does not hold the archive.
        """

    @abstractmethod
    def read(self, item: Item) -> Reading:
        """One item, pixels as stored.

        Raises:
            Exception: of any kind, as decoders raise them, if its files are missing, damaged or not what the archive
                promises.
        """


class Conversion(NamedTuple):
    """What a conversion made.

    Attributes:
        folder (`Path`): the source.
        manifest (`dict`): the content of its `manifest.json`; see `convert_archive`.
        kept (`bool`): whether everything was there already and nothing was written.
    """

    folder: Path
    manifest: dict
    kept: bool


def convert_archive(
    archive: Archive,
    out,
    workers: int | None = None,
    limit: int | None = None,
    max_bad: int = 100,
    rows_per_file: int = ROWS_PER_FILE,
    command: str | None = None,
) -> Conversion:
    """Write the source of an archive: `out/<source>/<split>-00000.parquet` and so on, and `manifest.json`.

    Until all files are there the folder is called `.<source>.converting`, which readers of shards pass over. A
    conversion that was stopped, by whatever means, goes on there: files that exist are kept as they are. Neither the
    number of workers nor the stops change a byte of the files.

    Items whose files are missing, damaged or not as promised are left out and listed with the reason; a row is whole
    or absent. An item is bad for good: to convert it after a repair, remove the folder. A disk or network that fails,
    or want of memory, stops the conversion instead.

    The manifest has the rows per split, bad items, items left out on purpose, remarks, every file with its rows, bytes
    and SHA-256, and per sensor and band the number, mean, standard deviation, minimum and maximum of valid stored
    values, beside published ones where there are any.

    Args:
        archive (`Archive`): the reader.
        out (`str` or `Path`): the folder of all sources.
        workers (`int`, *optional*): processes; default one per core. With 1 the work is done in this process.
        limit (`int`, *optional*): convert about so many items only, of every split its share and at least one:
            a trial run.
        max_bad (`int`): stop when more items than this are bad.
        rows_per_file (`int`): items per file.
        command (`str`, *optional*): recorded in the manifest.

    Returns:
        `Conversion`

    Raises:
        ValueError: if the archive is empty or its keys are not unique; if the folder was made from other files, with
            other options or by another version of the reader, or is at work in another process; for more bad items than
            `max_bad`, with their list.
    """
    for name, number in (("workers", workers), ("limit", limit), ("rows_per_file", rows_per_file)):
        if number is not None and number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}. Leave it out for the default.")
    if max_bad < 0:
        raise ValueError(f"`max_bad` must be at least 0, got {max_bad}. 0 stops at the first bad item.")
    folder = Path(out) / archive.source
    work = folder.with_name(f".{archive.source}.converting")
    listing = archive.list_items()
    _check_listing(archive, listing)
    for note in listing.notes:
        logger.warning("%s: %s", archive.source, note)
    files = _plan(listing.items, limit, rows_per_file)
    plan = {
        "archive": archive.source,
        "reader_version": archive.version,
        "options": archive.options(),
        "limit": limit,
        "rows_per_file": rows_per_file,
        "items": len(listing.items),
        "listing_sha256": _digest(listing.items),
    }
    if folder.exists():
        manifest = _read_json(folder / MANIFEST)
        _check_plan(folder, manifest, plan)
        return Conversion(folder, manifest, kept=True)
    with _claimed(work):
        manifest = _read_json(work / MANIFEST)
        _check_plan(work, manifest or _read_json(work / "plan.json") or {"plan": plan}, plan)
        if manifest is None:
            _write_json(work / "plan.json", {"plan": plan})
            for scrap in work.glob("*.partial"):
                scrap.unlink()
            records = _convert(archive, work, files, workers, max_bad)
            _write_json(work / MANIFEST, _manifest(archive, listing, plan, records, command))
            manifest = _read_json(work / MANIFEST)
        # The manifest says all that these do; a stop between the lines is made up for by the next run.
        shutil.rmtree(work / "records")
        (work / "plan.json").unlink(missing_ok=True)
        os.replace(work, folder)
    return Conversion(folder, manifest, kept=False)


def format_conversion(conversion: Conversion) -> str:
    """A report to print: rows, what was left out and why, bad items, and statistics beside published ones."""
    made, folder = conversion.manifest, conversion.folder
    rows = ", ".join(f"{split} {count}" for split, count in made["rows"].items())
    lines = [f"{made['source']:<12} {rows}" + ("   (complete already, nothing was written)" if conversion.kept else "")]
    if made["plan"]["limit"] is not None:
        lines.append(f"  a trial run of {made['plan']['limit']} of {made['plan']['items']} items, not the archive")
    if not made["rows"].get("train"):
        lines.append("  ! no rows of train: there is nothing to learn from")
    lines += [f"  left out {count}: {reason}" for reason, count in made["left_out"].items()]
    lines += [f"  {count}: {remark}" for remark, count in made["remarks"].items()]
    lines += [f"  note: {note}" for note in made["notes"]]
    lines += [f"  bad: {bad['key']}: {bad['reason']}" for bad in made["bad"]]
    measured = "stored, train" if made["rows"].get("train") else "stored, all"
    lines.append(f"  {measured:<16}{'mean':>12}{'std':>12}{'min':>12}{'max':>12}   published mean, std")
    for sensor, bands in made["statistics"].items():
        known = made["published"].get(sensor, {"bands": {}})["bands"]
        for band, found in bands.items():
            values = [found[name] for name in ("mean", "std", "min", "max")]
            text = "".join(f"{'-' if value is None else f'{value:.5g}':>12}" for value in values)
            theirs = f"   {known[band][0]:.5g}, {known[band][1]:.5g}" if band in known else ""
            lines.append(f"  {f'{sensor} {band}':<16}{text}{theirs}")
    lines += [f"  published: {source}" for source in sorted({known["source"] for known in made["published"].values()})]
    lines.append(f"Checksums, bad items and all numbers: {folder / MANIFEST}")
    return "\n".join(lines)


def find_files(root: Path, folders: Iterable[str], suffixes: tuple[str, ...]) -> Iterator[str]:
    """Paths below some folders of `root`, relative to it and with `/`, sorted, of files with one of the suffixes
    (lower case, matched without case). Hidden files and folders are passed over."""
    with tqdm(desc="listing", unit=" files", leave=False) as progress:
        for folder in sorted(folders):
            for here, below, names in os.walk(root / folder):
                below[:] = sorted(name for name in below if not name.startswith("."))
                inside = Path(here).relative_to(root).as_posix()
                found = [name for name in sorted(names) if not name.startswith(".")]
                yield from (f"{inside}/{name}" for name in found if name.lower().endswith(suffixes))
                progress.update(len(found))


def existing_folder(folder: Path, holds: str) -> Path:
    """The folder, if it is there.

    Raises:
        ValueError: naming what it should hold.
    """
    if not folder.is_dir():
        raise ValueError(f"`root` must hold {holds}, got no folder {folder}. Unpack the archive, or correct the path.")
    return folder


def check_image(image: ShardImage, sensor: str, path, dtype: str, size: tuple[int, int]):
    """Refuse an image that is not what its archive promises, or hardly has a valid pixel.

    Args:
        image (`ShardImage`): as read.
        sensor (`str`), path: named in the error.
        dtype (`str`): numpy name of the promised dtype.
        size (`tuple[int, int]`): promised height and width.

    Raises:
        ValueError: for another dtype or size, or less than half of the pixels valid.
    """
    pixels = image.pixels
    if pixels.dtype.name != dtype or pixels.shape[1:] != size:
        raise ValueError(
            f"`{sensor}` must be {dtype} of {size[0]} x {size[1]} pixels, got {pixels.dtype.name} {pixels.shape} in "
            f"{path}. The archive has no such image: fetch it again."
        )
    valid = image.valid_mask().mean()
    if valid < MIN_VALID:
        raise ValueError(
            f"`{sensor}` must have at least {MIN_VALID:.0%} valid pixels, got {valid:.1%} in {path}. Leave it out."
        )


def check_pair(images: dict[str, ShardImage], key: str):
    """Refuse images that do not lie on one pixel grid.

    Raises:
        ValueError: for another shape, coordinate system or transform, or none at all.
    """
    (first, one), *others = images.items()
    for sensor, image in others:
        sound = one.crs is not None and image.crs == one.crs and image.pixels.shape[1:] == one.pixels.shape[1:]
        if sound:
            shape = one.pixels.shape[1:]
            sound = corner_distance(one.transform, shape, image.transform, shape) <= GRID_TOLERANCE
        if not sound:
            grids = [(i.pixels.shape[1:], i.crs and i.crs[:40], i.transform) for i in (one, image)]
            raise ValueError(
                f"`{first}` and `{sensor}` must lie on one grid, got {grids[0]} and {grids[1]} ({key}). "
                "Such a pair is not converted."
            )


# Modes that PIL turns into 8-bit RGB without loss of what can be seen; 16-bit and float pictures would be clipped.
_PICTURE_MODES = ("RGB", "L", "P", "CMYK", "YCbCr", "RGBA", "LA", "1")
# The largest published image of the archives has 31,672 squared pixels.
_MAX_PIXELS = 40_000**2
_MAX_SIDE = 1024


def read_picture(path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read a JPEG, PNG or TIFF picture as RGB.

    A picture of more than 1024 pixels on a side is reduced by a whole factor until it is not: training takes crops of
    192. JPEG files are reduced while they are decoded, so that a thousand million pixels need little memory.

    Args:
        path (`Path`): the file.

    Returns:
        Pixels `(3, H, W)`, uint8, and remarks on what was done to them.

    Raises:
        ValueError: if the file is missing, damaged, has more than 8 bits, or too many pixels.
    """
    import PIL.Image

    remarks = []
    try:
        with _any_size(PIL.Image), PIL.Image.open(path) as image:
            width, height = image.size
            # The mode of 16-bit colours is RGB; only how they are stored tells.
            stored = [text for *_, how in image.tile for text in ([how] if isinstance(how, str) else how or ())]
            deep = [text for text in stored if isinstance(text, str) and ";16" in text]
            if width * height > _MAX_PIXELS or image.mode not in _PICTURE_MODES or deep:
                raise ValueError(f"{width} x {height} pixels of mode {(deep or [image.mode])[0]}")
            if max(width, height) > _MAX_SIDE:
                factor = -(-max(width, height) // _MAX_SIDE)
                image.draft(None, (max(1, width // factor), max(1, height // factor)))
                remarks.append(f"reduced by a whole factor to at most {_MAX_SIDE} pixels on a side")
            if image.mode != "RGB":
                remarks.append(f"converted from {image.mode} to RGB")
            rgb = image.convert("RGB")
            pixels = np.asarray(rgb.reduce(-(-max(rgb.size) // _MAX_SIDE)))
    except Exception as error:  # PIL raises whatever damaged bytes lead its decoders to
        raise ValueError(
            f"`path` must be a whole picture of 8 bits and at most {_MAX_PIXELS} pixels, got {path} "
            f"({type(error).__name__}: {error}). Fetch it again."
        ) from error
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0)), tuple(remarks)


@contextmanager
def _any_size(module) -> Iterator[None]:
    # PIL warns of large pictures from untrusted places; here they are expected, and the limit above is the one.
    former, module.MAX_IMAGE_PIXELS = module.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        module.MAX_IMAGE_PIXELS = former


class _File(NamedTuple):
    name: str
    items: list[Item]


def _check_listing(archive: Archive, listing: Listing):
    if not listing.items:
        raise ValueError(
            f"`root` must hold images of {archive.source}, got none in {archive.root} "
            f"({listing.left_out or 'nothing was left out'}). The layout is in the help of `msgfm shards`."
        )
    twice = [key for key, count in Counter(item.key for item in listing.items).items() if count > 1]
    if twice:
        raise ValueError(f"`root` must hold every image once, got {twice[:5]} twice. Remove one of each.")


def _plan(items: list[Item], limit: int | None, rows_per_file: int) -> list[_File]:
    by_split: dict[str, list[Item]] = {}
    for item in sorted(items):
        by_split.setdefault(item.split, []).append(item)
    files = []
    for split, listed in sorted(by_split.items()):
        # Neighbours of a row group are read together: in the archive's order a batch would come from one place.
        order = np.random.default_rng(0).permutation(len(listed))
        if limit is not None:
            order = order[: max(1, round(limit * len(listed) / len(items)))]
        for number, start in enumerate(range(0, len(order), rows_per_file)):
            chosen = [listed[index] for index in order[start : start + rows_per_file]]
            files.append(_File(f"{split}-{number:05d}", chosen))
    return files


def _digest(items: list[Item]) -> str:
    digest = hashlib.sha256()
    for item in sorted(items):
        digest.update(json.dumps(item).encode())
    return digest.hexdigest()


def _check_plan(folder: Path, manifest: dict | None, plan: dict):
    if manifest is None or "plan" not in manifest:
        raise ValueError(
            f"`out` must not hold another source of this name, got {folder} without a {MANIFEST}. "
            "Give another `--out`, or remove the folder."
        )
    former = manifest["plan"]
    different = [f"{name} {former.get(name)} (now {plan[name]})" for name in plan if former.get(name) != plan[name]]
    if different:
        raise ValueError(
            f"`out` must hold nothing or a conversion of the same files with the same options, got {folder} made with "
            f"{'; '.join(different)}. Give another `--out`, or remove the folder."
        )


@contextmanager
def _claimed(work: Path) -> Iterator[None]:
    """Make the folder of a conversion and hold it: the lock goes with the process, however that ends."""
    (work / "records").mkdir(parents=True, exist_ok=True)
    handle = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"`out` must not be at work in another process, got {work}. Wait for it, or give another `--out`."
            ) from None
        yield
    finally:
        os.close(handle)


def _convert(archive: Archive, work: Path, files: list[_File], workers: int | None, max_bad: int) -> list[dict]:
    """Make the files that are missing; returns the records of all, in order."""
    records = {}
    for file in files:
        record = _read_json(work / "records" / f"{file.name}.json")
        if record and (record["rows"] == 0 or (work / f"{file.name}.parquet").exists()):
            records[file.name] = record
    _check_bad(records, max_bad, work)
    missing = [file for file in files if file.name not in records]
    done = sum(len(file.items) for file in files if file.name in records)
    total = sum(len(file.items) for file in files)
    workers = min(workers or _cores(), max(1, len(missing)))
    with (
        tqdm(total=total, initial=done, desc=archive.source, unit=" images", smoothing=0.05) as progress,
        closing(_work(archive, work, missing, workers)) as made,
    ):
        for file, record in made:
            records[file.name] = record
            progress.set_postfix(bad=sum(len(record["bad"]) for record in records.values()), refresh=False)
            progress.update(len(file.items))
            _check_bad(records, max_bad, work)
    return [records[file.name] for file in files]


def _cores() -> int:
    # Those this process may use, where the system tells (macOS does not).
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_bad(records: dict[str, dict], max_bad: int, work: Path):
    bad = [f"{bad['key']}: {bad['reason']}" for record in records.values() for bad in record["bad"]]
    if len(bad) > max_bad:
        listed = "\n  ".join(bad[: max(max_bad, 20)])
        raise ValueError(
            f"`max_bad` must be at least the number of bad items, got {max_bad} and {len(bad)} so far. They are:\n"
            f"  {listed}\nGive a larger `--max-bad` to go on without them; or repair them, remove {work} and begin "
            "again."
        )


def _work(archive: Archive, work: Path, files: list[_File], workers: int) -> Iterator[tuple[_File, dict]]:
    if workers == 1:
        for file in files:
            yield file, _make_file(archive, work, file)
        return
    # Not forked from here: GDAL, Arrow and torch have threads by now. The server imports all once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    stop = context.Event()
    with ProcessPoolExecutor(workers, context, _begin_worker, (stop,)) as pool:
        try:
            futures = {pool.submit(_make_file, archive, work, file): file for file in files}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


# Whether the work is to stop; `bool()` says no. A worker gets the answer of its parent.
_stop: Callable[[], bool] = bool


def _begin_worker(stop):
    global _stop
    _stop = stop.is_set
    # Ctrl-C reaches all processes; the parent tells the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    # A parent that is killed cannot tell its workers, which would wait for it for ever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _make_file(archive: Archive, work: Path, file: _File) -> dict:
    """Write one file and then its record; the file gets its name last, so a file with a name has a record."""
    rules = ShardRules(archive.source, archive.sensors, archive.levels)
    partial = work / f".{file.name}-{os.getpid()}.partial"
    bad, remarks = [], Counter()
    statistics: dict[str, dict[str, _Moments]] = {}
    with ShardFile(partial, rules) as shard:
        for item in file.items:
            if _stop():
                raise KeyboardInterrupt  # as if Ctrl-C had reached this process
            try:
                row, said = _read(archive, item)
                if row is not None:
                    rules.check(row)
            except ValueError as error:
                bad.append({"key": item.key, "reason": " ".join(str(error).split())[:_REASON_LENGTH]})
                continue
            remarks.update(said)
            if row is None:
                continue
            for sensor, image in row.images.items():
                _measure(statistics.setdefault(sensor, {}), image)
            shard.write(row)
    record = {
        "name": f"{file.name}.parquet",
        "split": file.items[0].split,
        "rows": shard.rows,
        "bytes": partial.stat().st_size,
        "sha256": _file_digest(partial),
        "bad": bad,
        "remarks": dict(sorted(remarks.items())),
        "statistics": {
            sensor: {band: list(found) for band, found in bands.items()} for sensor, bands in statistics.items()
        },
    }
    _write_json(work / "records" / f"{file.name}.json", record)
    if shard.rows:
        os.replace(partial, work / f"{file.name}.parquet")
    else:
        partial.unlink()
    return record


def _read(archive: Archive, item: Item) -> Reading:
    """One item; whatever its files lead decoders to raise is a ValueError, unless it may pass."""
    try:
        return archive.read(item)
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        cause = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in _PASSING:
                raise OSError(cause.errno, f"{cause.strerror} while reading {item.key}") from error
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"{type(error).__name__}: {error}") from error


class _Moments(NamedTuple):
    """Number, mean, sum of squared differences from it, minimum and maximum of some values."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = np.inf
    high: float = -np.inf

    def merged(self, other: "_Moments") -> "_Moments":
        """Those of both sets together; exact up to rounding (Chan, Golub, LeVeque 1983)."""
        count = self.count + other.count
        if count == 0:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * other.count / count
        squares = self.squares + other.squares + apart**2 * self.count * other.count / count
        return _Moments(count, mean, squares, min(self.low, other.low), max(self.high, other.high))


def _measure(found: dict[str, _Moments], image: ShardImage):
    valid = image.valid_mask()
    for band, stored in zip(image.bands, image.pixels, strict=True):
        values = stored[valid].astype(np.float64)
        if values.size:
            mean = float(values.mean())
            squares = float(np.square(values - mean).sum())
            moments = _Moments(values.size, mean, squares, float(values.min()), float(values.max()))
            found[band] = found.get(band, _Moments()).merged(moments)


def _manifest(archive: Archive, listing: Listing, plan: dict, records: list[dict], command: str | None) -> dict:
    rows, remarks = Counter(), Counter()
    statistics: dict[str, dict[str, _Moments]] = {}
    for record in records:
        rows[record["split"]] += record["rows"]
        remarks.update(record["remarks"])
    # As the published ones: of what trains.
    measured = [record for record in records if record["split"] == "train" or not rows["train"]]
    for record in measured:
        for sensor, bands in record["statistics"].items():
            merged = statistics.setdefault(sensor, {})
            for band, found in bands.items():
                merged[band] = merged.get(band, _Moments()).merged(_Moments(*found))
    if not sum(rows.values()):
        raise ValueError(
            f"`root` must hold at least one sound image, got none of {plan['items']}: "
            f"{[bad['reason'] for record in records for bad in record['bad']][:3]}. Fetch the archive again."
        )
    return {
        "source": archive.source,
        "rows": dict(sorted(rows.items())),
        "left_out": listing.left_out,
        "remarks": dict(sorted(remarks.items())),
        "notes": listing.notes,
        "bad": [bad for record in records for bad in record["bad"]],
        "statistics": {
            sensor: {
                band: {
                    "count": moments.count,
                    "mean": moments.mean,
                    "std": (moments.squares / moments.count) ** 0.5,
                    "min": moments.low,
                    "max": moments.high,
                }
                for band, moments in bands.items()
            }
            for sensor, bands in sorted(statistics.items())
        },
        "published": archive.published,
        "files": [
            {name: record[name] for name in ("name", "rows", "bytes", "sha256")} for record in records if record["rows"]
        ],
        "plan": plan,
        "made_with": f"msgfm_hf {__version__}",
        "command": command,
    }


def _file_digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_json(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write_json(path: Path, content: dict):
    partial = path.with_name(f".{path.name}-{os.getpid()}.partial")
    with open(partial, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
