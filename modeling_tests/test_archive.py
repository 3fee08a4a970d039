"""The engine of archive conversions: whole files, exact continuing, honest counts, whatever stops it."""

import errno
import fcntl
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import PIL.Image
import pytest

from msgfm_hf.cli import main
from msgfm_hf.data.archive import Archive, Item, Listing, Reading, convert_archive, format_conversion
from msgfm_hf.data.geopile import GeoPile
from msgfm_hf.data.inspect import inspect_shards
from msgfm_hf.data.shards import ShardImage, ShardRow, ShardSource, find_sources, shard_splits
from msgfm_hf.data.splits import hashed_fraction

SIZES = {"train": 14, "val": 5, "test": 3}


def plate(number):
    """Elevation with a hole, different in every item."""
    heights = np.random.default_rng(number).normal(400 + number, 20, (1, 6, 7)).astype(np.float32)
    heights[0, number % 6] = np.nan
    return heights


@dataclass(frozen=True)
class Plates(Archive):
    """An archive of 22 images without files; what is in `root` says how it behaves."""

    root: Path
    flavour: str = "plain"

    source = "plates"
    sensors = ("dsm",)
    published: ClassVar[dict] = {"dsm": {"source": "nobody", "bands": {"height": (405.5, 21.25)}}}

    def options(self):
        return {"flavour": self.flavour}

    def list_items(self):
        items = [
            Item(f"{split}{number:02d}", split, f"{split}{number // 2}", (f"{number}.tif",))
            for split, count in SIZES.items()
            for number in range(count + (self.root / "more").exists())
        ]
        return Listing(items, {"plates that nobody wants": 4}, ["plates break"])

    def read(self, item):
        number = int(item.key[-2:])
        if (self.root / "burning").exists() and item.key == "train09":
            raise OSError(errno.EIO, "the disk must not burn")
        if (self.root / f"broken-{item.key}").exists():
            raise ValueError(f"`plate` must be whole, got pieces of {item.key}. Glue it.")
        if item.key == "test01":
            return Reading(None, ("empty plates",))
        image = ShardImage(plate(number), ["height"], "metres", nodata=float("nan"))
        row = ShardRow(item.key, self.source, item.split, item.group_id, {"dsm": image})
        return Reading(row, ("counted",) if number % 2 else ())


def convert(root, out, **options):
    reader = Plates(root, options.pop("flavour", "plain"))
    return convert_archive(reader, out, **({"workers": 1, "rows_per_file": 4} | options))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("*.parquet"))}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """2,100 pictures in the layout of GeoPile: nine files of training and one of validation."""
    folder = tmp_path_factory.mktemp("pictures") / "GeoPileV0" / "PatternNet" / "beach"
    folder.mkdir(parents=True)
    for number in range(2100):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"beach{number:04d}.png")
    return folder.parents[1]


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    return convert_archive(GeoPile(pictures), tmp_path_factory.mktemp("undisturbed"), workers=1)


def test_a_conversion_is_whole_and_its_manifest_true(root, tmp_path):
    made = convert(root, tmp_path / "out", command="msgfm shards plates")
    assert not made.kept and made.folder == tmp_path / "out" / "plates"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["plates"]
    assert json.loads((made.folder / "manifest.json").read_text()) == made.manifest
    assert made.manifest["rows"] == {"test": 2, "train": 14, "val": 5}
    assert made.manifest["left_out"] == {"plates that nobody wants": 4} and made.manifest["bad"] == []
    assert made.manifest["remarks"] == {"counted": 9, "empty plates": 1}  # 7 of train, 2 of val
    assert made.manifest["command"] == "msgfm shards plates"
    names = [file["name"] for file in made.manifest["files"]]
    assert names == sorted(contents(made.folder)) and len(names) == 4 + 2 + 1
    for file in made.manifest["files"]:
        data = (made.folder / file["name"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    for split, count in {"train": 14, "val": 5, "test": 2}.items():
        source = ShardSource(made.folder, split)
        keys = [row["key"] for row in source.read_metadata()]
        assert len(set(keys)) == count == sum(f["rows"] for f in made.manifest["files"] if f["name"].startswith(split))
        if split == "train":
            assert keys != sorted(keys)  # neighbours are scattered over files
        for index, key in enumerate(keys):
            found = source.read(index, verify=True)
            np.testing.assert_array_equal(found["images"]["dsm"].pixels, plate(int(key[-2:])))
    assert inspect_shards(made.folder, verify=True).damaged == []


def test_statistics_are_those_of_numpy_on_the_same_pixels(root, tmp_path):
    found = convert(root, tmp_path / "out").manifest["statistics"]["dsm"]["height"]
    # Of the training split alone, as the published ones.
    values = np.concatenate([plate(number).ravel() for number in range(SIZES["train"])]).astype(np.float64)
    values = values[np.isfinite(values)]
    assert found["count"] == values.size == 14 * 35
    expected = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_the_report_says_what_was_made_and_what_not(root, tmp_path):
    (root / "broken-val02").touch()
    text = format_conversion(convert(root, tmp_path / "out"))
    assert "test 2, train 14, val 4" in text
    assert "left out 4: plates that nobody wants" in text and "1: empty plates" in text and "plates break" in text
    assert "bad: val02: `plate` must be whole, got pieces of val02. Glue it." in text
    (line,) = (line for line in text.splitlines() if line.strip().startswith("dsm height"))
    assert line.endswith("405.5, 21.25") and "published: nobody" in text
    assert "no rows of train" not in text
    again = format_conversion(convert(root, tmp_path / "out"))
    assert "complete already, nothing was written" in again and "bad: val02" in again


def test_an_archive_without_images_to_train_on_says_so(root, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "train", 0)
    assert "! no rows of train: there is nothing to learn from" in format_conversion(convert(root, tmp_path / "out"))


def test_a_second_run_writes_nothing(root, tmp_path):
    made = convert(root, tmp_path / "out")
    before, manifest = times(made.folder), (made.folder / "manifest.json").stat().st_mtime_ns
    again = convert(root, tmp_path / "out")
    assert again.kept and again.manifest == made.manifest
    assert times(made.folder) == before and (made.folder / "manifest.json").stat().st_mtime_ns == manifest


def test_what_breaks_off_goes_on_and_keeps_its_files(root, tmp_path):
    whole = convert(root, tmp_path / "whole")
    (root / "burning").touch()
    with pytest.raises(OSError, match="must not burn while reading train09"):
        convert(root, tmp_path / "out")
    half = tmp_path / "out" / ".plates.converting"
    before = times(half)
    assert before and len(before) < len(contents(whole.folder)) and not list(half.glob("*.partial"))
    assert not (tmp_path / "out" / "plates").exists()
    with pytest.raises(ValueError, match="must be a folder of shards"):
        find_sources(tmp_path / "out")
    (half / ".train-00001-1.partial").write_bytes(b"left by a killed process")
    (root / "burning").unlink()
    made = convert(root, tmp_path / "out")
    assert contents(made.folder) == contents(whole.folder)
    assert times(made.folder).items() >= before.items()
    assert sorted(path.name for path in made.folder.iterdir()) == [*["manifest.json"], *sorted(contents(whole.folder))]
    assert made.manifest == whole.manifest


def test_a_full_disk_stops_it_and_is_not_the_fault_of_an_image(root, tmp_path):
    whole = convert(root, tmp_path / "whole")
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, allowed[1]))  # room for the records, not for the shards
        with pytest.raises(OSError, match="File too large"):
            convert(root, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
        signal.signal(signal.SIGXFSZ, former)
    half = tmp_path / "out" / ".plates.converting"
    assert not times(half) and not list(half.glob("*.partial"))
    made = convert(root, tmp_path / "out")
    assert contents(made.folder) == contents(whole.folder) and made.manifest["bad"] == []


class FoldedError(Exception):
    """An error of some decoder."""


@pytest.mark.parametrize(
    "error", [TypeError("null"), KeyError("bands"), FoldedError("null"), PermissionError(13, "null")]
)
def test_whatever_a_file_leads_a_decoder_to_raise_makes_it_bad(root, tmp_path, monkeypatch, error):
    sound = Plates.read

    def read(self, item):
        if item.key == "val02":
            raise error
        return sound(self, item)

    monkeypatch.setattr(Plates, "read", read)
    (bad,) = convert(root, tmp_path / "out").manifest["bad"]
    assert bad == {"key": "val02", "reason": f"{type(error).__name__}: {error}"}


@pytest.mark.parametrize("kind", ["direct", "wrapped", "memory", "library"])
def test_what_may_pass_stops_the_conversion(root, tmp_path, monkeypatch, kind):
    sound = Plates.read

    def read(self, item):
        if item.key != "val02":
            return sound(self, item)
        if kind == "memory":
            raise MemoryError("no more")
        if kind == "library":
            raise ImportError("no more")
        try:
            raise OSError(errno.ESTALE, "no more")
        except OSError as error:
            if kind == "direct":
                raise
            raise ValueError("`path` must be whole, got half. Fetch it again.") from error

    expected = {"memory": MemoryError, "library": ImportError}.get(kind, OSError)
    with monkeypatch.context() as patched, pytest.raises(expected, match="no more"):
        patched.setattr(Plates, "read", read)
        convert(root, tmp_path / "out")
    assert not (tmp_path / "out" / "plates").exists()
    assert convert(root, tmp_path / "out").manifest["bad"] == []


def test_cores_are_counted_where_the_system_knows_no_affinity(root, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert convert(root, tmp_path / "out", workers=None).manifest["rows"]["train"] == 14


def test_a_stop_after_the_last_file_is_made_up_for(root, tmp_path):
    made = convert(root, tmp_path / "out")
    before = times(made.folder)
    made.folder.rename(tmp_path / "out" / ".plates.converting")
    again = convert(root, tmp_path / "out")
    assert times(again.folder) == before and again.manifest == made.manifest


def test_bad_items_are_counted_listed_and_limited(root, tmp_path):
    for key in ("train03", "val01", "test00"):
        (root / f"broken-{key}").touch()
    with pytest.raises(
        ValueError, match=r"`max_bad` must be at least .*, got 2 and 3 so far. They are:\n(.|\n)*val01: `plate`"
    ):
        convert(root, tmp_path / "out", max_bad=2)
    before = times(tmp_path / "out" / ".plates.converting")
    made = convert(root, tmp_path / "out", max_bad=3)
    assert before and times(made.folder).items() >= before.items()
    assert sorted(bad["key"] for bad in made.manifest["bad"]) == ["test00", "train03", "val01"]
    assert made.manifest["rows"] == {"test": 1, "train": 13, "val": 4}
    assert all("Glue it." in bad["reason"] for bad in made.manifest["bad"])


def test_a_file_without_a_sound_item_is_not_written(root, tmp_path):
    for number in range(3):
        (root / f"broken-test{number:02d}").touch()
    made = convert(root, tmp_path / "out")
    assert shard_splits(made.folder) == ["train", "val"] and made.manifest["rows"]["test"] == 0
    assert convert(root, tmp_path / "out").kept


def test_an_archive_without_a_sound_item_is_refused(root, tmp_path):
    for split, count in SIZES.items():
        for number in range(count):
            (root / f"broken-{split}{number:02d}").touch()
    with pytest.raises(ValueError, match="`root` must hold at least one sound image, got none of 22"):
        convert(root, tmp_path / "out")
    assert not (tmp_path / "out" / "plates").exists()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"flavour": "salted"}, r"options \{'flavour': 'plain'\} \(now \{'flavour': 'salted'\}\)"),
        ({"limit": 5}, r"limit None \(now 5\)"),
        ({"rows_per_file": 8}, r"rows_per_file 4 \(now 8\)"),
        ({"more": True}, r"items 22 \(now 25\); listing_sha256"),
    ],
)
def test_another_conversion_does_not_mix_in(root, tmp_path, half, change, said):
    if half:
        (root / "burning").touch()
        with pytest.raises(OSError, match="must not burn"):
            convert(root, tmp_path / "out")
        (root / "burning").unlink()
    else:
        convert(root, tmp_path / "out")
    options = dict(change)
    if options.pop("more", False):
        (root / "more").touch()
    with pytest.raises(ValueError, match="`out` must hold nothing or a conversion of the same files.*" + said):
        convert(root, tmp_path / "out", **options)


def test_a_newer_reader_does_not_mix_in(root, tmp_path, monkeypatch):
    convert(root, tmp_path / "out")
    monkeypatch.setattr(Plates, "version", 2)
    with pytest.raises(ValueError, match=r"reader_version 1 \(now 2\)"):
        convert(root, tmp_path / "out")


def test_a_source_of_another_maker_is_left_alone(root, tmp_path):
    (tmp_path / "out" / "plates").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"`out` must not hold another source of this name, got .* without a manifest"):
        convert(root, tmp_path / "out")


def test_two_conversions_into_one_folder_are_refused(root, tmp_path):
    work = tmp_path / "out" / ".plates.converting"
    work.mkdir(parents=True)
    handle = os.open(work, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="`out` must not be at work in another process"):
        convert(root, tmp_path / "out")
    os.close(handle)
    assert convert(root, tmp_path / "out").manifest["rows"]["train"] == 14


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": 0}, "`workers` must be at least 1, got 0"),
        ({"limit": 0}, "`limit` must be at least 1, got 0"),
        ({"rows_per_file": 0}, "`rows_per_file` must be at least 1, got 0"),
        ({"max_bad": -1}, "`max_bad` must be at least 0, got -1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(root, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        convert(root, tmp_path / "out", **options)


def test_listings_that_cannot_be_are_refused(root, tmp_path, monkeypatch):
    item = Item("a", "train", "a", ("a.tif",))
    monkeypatch.setattr(Plates, "list_items", lambda self: Listing([item, item._replace(paths=("b.tif",))]))
    with pytest.raises(ValueError, match=r"`root` must hold every image once, got \['a'\] twice"):
        convert(root, tmp_path / "out")
    monkeypatch.setattr(Plates, "list_items", lambda self: Listing([], {"plates of others": 3}))
    with pytest.raises(ValueError, match=r"`root` must hold images of plates, got none .*plates of others"):
        convert(root, tmp_path / "out")


def test_a_trial_run_takes_its_share_of_every_split_and_says_so(root, tmp_path):
    made = convert(root, tmp_path / "out", limit=11)
    rows = made.manifest["rows"]
    assert (rows["train"], rows["val"]) == (7, 2)
    assert rows["test"] + made.manifest["remarks"].get("empty plates", 0) == 2
    assert "a trial run of 11 of 22 items, not the archive" in format_conversion(made)
    whole = {row["key"] for row in ShardSource(convert(root, tmp_path / "whole").folder).read_metadata()}
    assert {row["key"] for row in ShardSource(made.folder).read_metadata()} < whole


def test_fractions_of_names_are_lasting_and_even():
    # SHA-256 of "abc" begins with ba7816bf8f01 (FIPS 180-2, appendix B.1).
    assert hashed_fraction("abc") == 0xBA7816BF8F01 / 2**48
    fractions = [hashed_fraction(f"picture{number}") for number in range(4000)]
    assert min(fractions) >= 0 and max(fractions) < 1
    assert sum(fraction < 0.25 for fraction in fractions) == pytest.approx(1000, abs=100)


@pytest.mark.parametrize(("how", "afterwards"), [(signal.SIGKILL, 2), (signal.SIGINT, 1)])
def test_a_stopped_command_goes_on_to_the_bytes_of_one_worker(how, afterwards, pictures, undisturbed, tmp_path, capsys):
    # A fast or busy machine may be through before the signal comes: then it is tried again.
    tries = (tmp_path / str(number) for number in range(5))
    out = next(out for out in tries if stopped_halfway(pictures, out, how))
    half = out / ".geopile.converting"
    before = times(half)
    main(["shards", "geopile", "--root", str(pictures), "--out", str(out), "--workers", str(afterwards)])
    assert "PatternNet" in capsys.readouterr().out
    assert len(contents(out / "geopile")) == 10
    assert contents(out / "geopile") == contents(undisturbed.folder)
    assert times(out / "geopile").items() >= before.items()
    made = json.loads((out / "geopile" / "manifest.json").read_text())
    assert made | {"command": None} == undisturbed.manifest


def stopped_halfway(pictures, out, how):
    """Start the command with two workers and stop it at its first file; whether it was stopped before its last."""
    command = ["shards", "geopile", "--root", str(pictures), "--out", str(out), "--workers", "2"]
    # Where these tests are a shell's job in the background, Ctrl-C is ignored, and by what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "msgfm_hf.cli", *command],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    half = out / ".geopile.converting"
    while not times(half) and process.poll() is None:
        time.sleep(0.002)
    if process.poll() is None:
        # All wait until the signal is there: on a busy machine the workers would be through before.
        os.killpg(process.pid, signal.SIGSTOP)
        # Ctrl-C reaches the whole group; a process is killed alone, and its workers must notice.
        (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
        os.killpg(process.pid, signal.SIGCONT)
    _, said = process.communicate(timeout=200)
    deadline = time.monotonic() + 100
    while group_of(process.pid):
        assert time.monotonic() < deadline, "workers outlive the command"
        time.sleep(0.05)
    if process.returncode == 0:
        assert (out / "geopile").exists()
        return False
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), said
    assert ("the same command goes on from here" in said) == (how == signal.SIGINT)
    return 0 < len(times(half)) < 10 and not (out / "geopile").exists()


def group_of(leader):
    """Processes of a group that are still alive."""
    alive = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(group) == leader and state != "Z":
                alive.append(int(entry.name))
    return alive
