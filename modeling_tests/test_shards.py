"""Shards on disk: the schema of the design, bytes that survive, damage that is found, and the report on a folder."""

import dataclasses
import io
import json
import os
import pickle
import re
import subprocess
import sys

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from msgfm_hf.data.inspect import contact_sheet, inspect_shards
from msgfm_hf.data.shards import (
    CorruptShardError,
    ShardImage,
    ShardRow,
    ShardSource,
    ShardWriter,
    find_sources,
    shard_schema,
    shard_splits,
)
from msgfm_hf.model.sensors import SENSORS

RGB, S1, S2 = ["red", "green", "blue"], ["VV", "VH"], ["B02", "B03", "B04", "B08"]
META = {
    "encoding": pa.string(),
    "dtype": pa.string(),
    "shape": pa.list_(pa.int32()),
    "bands": pa.list_(pa.string()),
    "gsd": pa.float64(),
    "crs": pa.string(),
    "transform": pa.list_(pa.float64()),
    "nodata": pa.float64(),
    "scale": pa.float64(),
    "offset": pa.float64(),
    "units": pa.string(),
    "datetime": pa.string(),
}


def rgb_image(seed=0, size=12, **changes):
    pixels = np.random.default_rng(seed).integers(0, 256, (3, size, size), dtype=np.uint8)
    pixels[:, -2:] = 0  # the bytes that a fixed-width string type would strip
    return ShardImage(pixels, **({"bands": RGB, "units": "dn", "scale": 1 / 255, "gsd": 0.6} | changes))


def rgb_row(number, split="train", source="photos", **changes):
    row = {"key": f"{split}{number}", "source": source, "split": split, "group_id": f"place{split}{number % 3}"}
    return ShardRow(**(row | {"images": {"rgb": rgb_image(number)}} | changes))


def pair_row(number, split="train", s1=None, s2=None):
    generator = np.random.default_rng(number)
    s1 = s1 or ShardImage(generator.normal(-12, 2, (2, 10, 14)).astype(np.float32), S1, "db", nodata=float("nan"))
    s2 = s2 or ShardImage(
        generator.integers(1100, 4000, (4, 10, 14), dtype=np.uint16),
        S2,
        "dn",
        1e-4,
        -0.1,
        gsd=10.0,
        crs="EPSG:32631",
        transform=[664000.0, 10.0, 0.0, 5612120.0, 0.0, -10.0],
        nodata=65535.0,
        datetime="2023-06-10T10:00:00Z",
    )
    return ShardRow(f"p{number}", "pairs", split, "belgium", {"s1": s1, "s2": s2}, pair_id=f"p{number}")


def write_rgb(out, rows=20, splits=("train",), **options):
    with ShardWriter(out, "photos", ["rgb"], **options) as writer:
        for split in splits:
            for number in range(rows):
                writer.write(rgb_row(number, split))
    return out / "photos"


def write_pairs(out, rows=2):
    with ShardWriter(out, "pairs", ["s2", "s1"], {"s2": "l2a"}) as writer:
        for number in range(rows):
            writer.write(pair_row(number))
    return out / "pairs"


def rewrite(file, change, metadata=None):
    """Change the rows of a file behind the writer's back."""
    table = pq.read_table(file)
    rows = table.to_pylist()
    change(rows)
    schema = table.schema if metadata is None else table.schema.with_metadata(metadata)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, row_group_size=16)


# The format


def test_every_file_has_the_columns_of_the_design_in_order(tmp_path):
    def columns(sensors):
        pixels = [column for sensor in sensors for column in (sensor, f"{sensor}_meta")]
        before = ["key", "source", "split", "group_id", "pair_id", "sensors"]
        return [*before, *pixels, "bounds", "labels", "target", "target_meta"]

    with ShardWriter(tmp_path, "aerial", ["naip"]) as writer:
        pixels = np.full((4, 8, 8), 99, np.uint8)
        image = ShardImage(pixels, [*RGB, "nir"], "dn", 1 / 255)
        writer.write(rgb_row(0, source="aerial", images={"naip": image}))
    photos, pairs = write_rgb(tmp_path, 1), write_pairs(tmp_path)
    for folder, sensors in (
        (photos, ["dsm", "rgb", "s1", "s2"]),
        (pairs, ["dsm", "rgb", "s1", "s2"]),
        (tmp_path / "aerial", ["dsm", "naip", "rgb", "s1", "s2"]),
    ):
        schema = pq.read_schema(folder / "train-00000.parquet")
        assert schema.names == columns(sensors)
        for name in ("key", "source", "split", "group_id", "pair_id"):
            assert schema.field(name).type == pa.string()
        for name in ("sensors", "labels"):
            assert schema.field(name).type == pa.list_(pa.string())
        assert schema.field("bounds").type == pa.list_(pa.float64())
        for name in (*sensors, "target"):
            assert schema.field(name).type == pa.large_binary()
            assert {field.name: field.type for field in schema.field(f"{name}_meta").type} == META
        assert schema.metadata[b"msgfm_shard_version"] == b"1"
    assert json.loads(pq.read_schema(pairs / "train-00000.parquet").metadata[b"msgfm_levels"]) == {"s2": "l2a"}
    row = pq.read_table(pairs / "train-00000.parquet").to_pylist()[0]
    assert row["rgb"] is None and row["rgb_meta"] is None and row["sensors"] == ["s1", "s2"]
    assert row["s2_meta"]["encoding"] == "raw" and row["s2_meta"]["shape"] == [4, 10, 14]


def test_row_groups_of_16_without_compression_or_dictionary(tmp_path):
    folder = write_rgb(tmp_path, 40, rows_per_file=20)
    assert sorted(path.name for path in folder.iterdir()) == ["train-00000.parquet", "train-00001.parquet"]
    metadata = pq.read_metadata(folder / "train-00000.parquet")
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [16, 4]
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            assert chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32", "float64", ">u2", ">f4"])
def test_pixels_come_back_as_they_were(tmp_path, dtype):
    pixels = np.random.default_rng(1).integers(1, 120, (1, 5, 7)).astype(dtype)
    pixels[0, -1] = 0
    if pixels.dtype.kind == "f":
        pixels[0, 0, 0] = np.nan
    with ShardWriter(tmp_path, "heights", ["dsm"]) as writer:
        writer.write(rgb_row(0, source="heights", images={"dsm": ShardImage(pixels, ["height"], "metres")}))
    image = ShardSource(tmp_path / "heights").read(0)["images"]["dsm"]
    assert image.pixels.dtype == np.dtype(dtype).newbyteorder("<")
    np.testing.assert_array_equal(image.pixels, pixels)
    assert image.valid_mask().sum() == 35 - np.isnan(pixels.astype(float)).sum()


def test_everything_about_a_row_comes_back(tmp_path):
    written = pair_row(0)
    written.bounds, written.labels = [5.3, 50.6, 5.4, 50.7], ["crops", "water"]
    written.target = ShardImage(np.arange(140, dtype=np.uint8).reshape(1, 10, 14), ["class"], "class")
    with ShardWriter(tmp_path, "pairs", ["s1", "s2"], {"s2": "l2a"}) as writer:
        writer.write(written)
    source = ShardSource(tmp_path / "pairs")
    assert (source.name, source.sensors, len(source)) == ("pairs", ["s1", "s2"], 1)
    assert source.bands == {"s1": S1, "s2": S2}
    assert source.units == {"s1": "db", "s2": "dn"}
    assert source.levels == {"s1": None, "s2": "l2a"}
    row = source.read(0)
    assert (row["key"], row["group_id"], row["pair_id"]) == ("p0", "belgium", "p0")
    assert (row["bounds"], row["labels"]) == (written.bounds, written.labels)
    for image, expected in ((row["images"]["s2"], written.images["s2"]), (row["target"], written.target)):
        np.testing.assert_array_equal(image.pixels, expected.pixels)
        for name in ("bands", "units", "scale", "offset", "gsd", "crs", "transform", "nodata", "datetime"):
            assert getattr(image, name) == getattr(expected, name), name
    assert row["images"]["s2"].offset_dn == pytest.approx(-1000)
    metadata = source.read_metadata()[0]
    assert metadata["images"]["s2"]["shape"] == [4, 10, 14] and "pixels" not in metadata["images"]["s2"]


def test_datasets_streams_the_same_bytes(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = write_rgb(tmp_path, 3)
    stream = datasets.load_dataset(
        "parquet", data_files=[str(folder / "train-00000.parquet")], split="train", streaming=True
    )
    rows = list(stream)
    assert [row["key"] for row in rows] == ["train0", "train1", "train2"]
    for number, row in enumerate(rows):
        assert row["rgb"] == rgb_image(number).pixels.tobytes() and row["rgb"].endswith(b"\0" * 24)
        assert row["rgb_meta"]["bands"] == RGB and row["s2"] is None


def test_a_window_keeps_its_place_on_the_map():
    image = pair_row(0).images["s2"].window(2, 3, 4, 5)
    assert image.pixels.shape == (4, 4, 5)
    assert image.transform == [664030.0, 10.0, 0.0, 5612100.0, 0.0, -10.0]
    assert image.select(["B08", "B02"]).bands == ["B08", "B02"]


# Reading


def test_rows_are_numbered_over_files(tmp_path):
    source = ShardSource(write_rgb(tmp_path, 40, ("train", "val"), rows_per_file=20))
    assert len(source) == 40 and shard_splits(source.path) == ["train", "val"]
    assert [(group, first, rows) for _, group, first, rows in source.row_groups] == [
        (0, 0, 16),
        (1, 16, 4),
        (0, 20, 16),
        (1, 36, 4),
    ]
    for index in (0, 39, 16, 5, 20):
        row = source.read(index)
        assert row["key"] == f"train{index}"
        np.testing.assert_array_equal(row["images"]["rgb"].pixels, rgb_image(index).pixels)
    with pytest.raises(IndexError, match=r"`index` must be in \[0, 40\), got 40"):
        source.read(40)


def test_a_source_travels_to_workers_after_use(tmp_path):
    source = ShardSource(write_rgb(tmp_path))
    source.read(0)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read(7)["images"]["rgb"].pixels, rgb_image(7).pixels)
    # Pixels that were read must not travel along.
    assert len(pickle.dumps(source)) < 4000


def test_sensors_can_be_chosen(tmp_path):
    folder = write_pairs(tmp_path)
    source = ShardSource(folder, sensors=["s2"])
    assert source.sensors == ["s2"] and list(source.read(1)["images"]) == ["s2"]


def test_any_fsspec_url_is_read(tmp_path):
    folder = write_rgb(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.pipe("/shards/photos/train-00000.parquet", (folder / "train-00000.parquet").read_bytes())
    assert find_sources("memory://shards") == ["memory://shards/photos"]
    source = ShardSource("memory://shards/photos")
    np.testing.assert_array_equal(source.read(19, verify=True)["images"]["rgb"].pixels, rgb_image(19).pixels)
    memory.rm("/shards/photos/train-00000.parquet")
    # A file that is gone is no damage to be skipped.
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickle.dumps(source)).read(0)


@pytest.mark.parametrize("encoding", ["tiff", "planar tiff", "one band tiff", "png", "jpeg"])
def test_encoded_payloads_are_decoded(tmp_path, encoding):
    folder = write_rgb(tmp_path, 1)
    pixels = np.broadcast_to(np.arange(0, 240, 20, dtype=np.uint8), (3, 12, 12)).copy()
    pixels = pixels[:1] if encoding.startswith("one") else pixels
    stream = io.BytesIO()
    if encoding in ("png", "jpeg"):
        Image.fromarray(np.moveaxis(pixels, 0, -1)).save(stream, encoding, quality=95)
    elif encoding == "tiff":
        tifffile.imwrite(stream, np.moveaxis(pixels, 0, -1), photometric="rgb", compression="zlib")
    else:
        tifffile.imwrite(stream, pixels, photometric="minisblack", planarconfig="separate" if len(pixels) > 1 else None)

    def change(rows):
        rows[0]["rgb"] = stream.getvalue()
        rows[0]["rgb_meta"] |= {"encoding": encoding.split()[-1], "shape": list(pixels.shape)}

    rewrite(folder / "train-00000.parquet", change)
    decoded = ShardSource(folder).read(0)["images"]["rgb"].pixels
    assert decoded.shape == pixels.shape and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - pixels).max() <= (3 if encoding == "jpeg" else 0)


# Damage


def test_a_truncated_file_is_found_on_opening(tmp_path):
    file = write_rgb(tmp_path) / "train-00000.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptShardError, match=r"train-00000\.parquet` must be a whole Parquet file"):
        ShardSource(file.parent)


def test_flipped_bits_are_found_by_checksums(tmp_path):
    file = write_rgb(tmp_path) / "train-00000.parquet"
    content = bytearray(file.read_bytes())
    position = content.find(rgb_image(17).pixels.tobytes())
    content[position + 9] ^= 0x10
    file.write_bytes(content)
    source = ShardSource(file.parent)
    source.read(17)  # without the check nothing is known
    source.read(3, verify=True)
    with pytest.raises(CorruptShardError, match=r"train-00000\.parquet` .* row 17 \(among rows 16 to 19\)"):
        source.read(17, verify=True)


def test_flipped_bits_in_a_name_are_found(tmp_path):
    file = write_rgb(tmp_path) / "train-00000.parquet"
    file.write_bytes(file.read_bytes().replace(b"train7", b"train\xff"))
    with pytest.raises(CorruptShardError, match=r"got damage at row 7"):
        ShardSource(file.parent).read(7)


@pytest.mark.parametrize(
    ("payload", "meta", "match"),
    [
        (b"\1" * 431, {}, r"must hold 432 bytes for \(3, 12, 12\) uint8, got 431 in .*row 1 \(key 'train1'\)"),
        (None, {}, "`rgb` must hold pixels, got null"),
        (b"\1" * 432, {"encoding": "png"}, "`rgb` must be png, got cannot identify"),
        (b"\1" * 432, {"encoding": "tiff"}, "`rgb` must be tiff, got not a TIFF"),
        (b"\1" * 432, {"encoding": "gzip"}, "`encoding` of 'rgb' must be raw, tiff, jpeg or png, got 'gzip'"),
        (b"\1" * 432, {"shape": [432]}, r"`rgb_meta` must give a dtype and the shape \(C, H, W\)"),
        (b"\1" * 432, None, "`rgb` must be present, got null"),
    ],
)
def test_payloads_that_do_not_fit_their_description_are_found(tmp_path, payload, meta, match):
    folder = write_rgb(tmp_path, 2)

    def change(rows):
        rows[1] |= {"rgb": payload, "rgb_meta": None if meta is None else rows[1]["rgb_meta"] | meta}

    rewrite(folder / "train-00000.parquet", change)
    source = ShardSource(folder)
    source.read(0)
    with pytest.raises(CorruptShardError, match=match):
        source.read(1)


def test_a_picture_of_another_size_is_found(tmp_path):
    folder = write_rgb(tmp_path, 1)
    stream = io.BytesIO()
    Image.fromarray(np.zeros((12, 11, 3), np.uint8)).save(stream, "png")

    def change(rows):
        rows[0]["rgb"] = stream.getvalue()
        rows[0]["rgb_meta"]["encoding"] = "png"

    rewrite(folder / "train-00000.parquet", change)
    with pytest.raises(CorruptShardError, match=r"must decode to \(3, 12, 12\) uint8, got \(3, 12, 11\) uint8"):
        ShardSource(folder).read(0)


# Refusals of the reader


def test_brackets_in_a_path_are_no_pattern(tmp_path):
    folder = write_rgb(tmp_path / "run [1]*", 2)
    assert find_sources(folder) == [str(folder)] and find_sources(folder.parent) == [str(folder)]
    assert len(ShardSource(folder)) == 2


def test_a_folder_without_shards_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="`path` must be a folder of shards such as train-00000.parquet"):
            ShardSource(path)
        with pytest.raises(ValueError, match="`data` must be a folder of shards such as train-00000.parquet"):
            find_sources(path)


def test_a_missing_split_or_sensor_is_refused(tmp_path):
    folder = write_rgb(tmp_path)
    assert shard_splits(folder) == ["train"]
    with pytest.raises(ValueError, match="`split` must be one of train, got 'test'"):
        ShardSource(folder, "test")
    with pytest.raises(ValueError, match="`sensors` must be among rgb, got s1"):
        ShardSource(folder, sensors=["rgb", "s1"])


def test_another_version_is_refused(tmp_path):
    folder = write_rgb(tmp_path, 1)
    rewrite(folder / "train-00000.parquet", lambda rows: None, {"msgfm_shard_version": "2"})
    with pytest.raises(ValueError, match="`path` must hold shards of version 1, got version 2"):
        ShardSource(folder)
    rewrite(folder / "train-00000.parquet", lambda rows: None, {})
    with pytest.raises(ValueError, match="`path` must hold shards of version 1, got version none"):
        ShardSource(folder)


def test_a_split_without_rows_is_refused(tmp_path):
    folder = write_rgb(tmp_path, 1)
    rewrite(folder / "train-00000.parquet", lambda rows: rows.clear())
    with pytest.raises(ValueError, match="`path` must hold rows of split 'train', got none"):
        ShardSource(folder)


def test_rows_that_differ_in_kind_are_refused(tmp_path):
    folder = write_rgb(tmp_path, 3, rows_per_file=2)

    def change(rows):
        rows[-1]["rgb_meta"]["bands"] = ["blue", "green", "red"]

    match = "`bands`, `units` and dtype of sensor 'rgb' must be the same in all rows of a source"
    rewrite(folder / "train-00000.parquet", change)
    source = ShardSource(folder)
    with pytest.raises(ValueError, match=match):
        source.read(1)
    rewrite(folder / "train-00001.parquet", change)
    with pytest.raises(ValueError, match=match):
        ShardSource(folder)


def test_files_of_different_sensors_are_refused(tmp_path):
    folder = write_rgb(tmp_path, 1)
    pairs = write_pairs(tmp_path) / "train-00000.parquet"
    pairs.rename(folder / "train-00001.parquet")
    with pytest.raises(ValueError, match=r"`sensors` must be the same in all rows of a source, got \['rgb'\] and"):
        ShardSource(folder)


# The writer


def test_nothing_is_left_of_a_writer_that_failed(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"), ShardWriter(tmp_path, "photos", ["rgb"]) as writer:
        for number in range(20):
            writer.write(rgb_row(number))
        raise RuntimeError("power cut")
    assert list(tmp_path.iterdir()) == []


def test_a_source_is_replaced_only_on_demand_and_only_when_whole(tmp_path):
    folder = write_rgb(tmp_path, 2)
    with pytest.raises(ValueError, match="`out_dir` must not hold the source already"):
        write_rgb(tmp_path, 3)
    with (
        pytest.raises(RuntimeError, match="power cut"),
        ShardWriter(tmp_path, "photos", ["rgb"], overwrite=True) as writer,
    ):
        writer.write(rgb_row(0))
        raise RuntimeError("power cut")
    assert len(ShardSource(folder)) == 2
    write_rgb(tmp_path, 3, overwrite=True)
    assert len(ShardSource(folder)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.fixture(scope="module")
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_killed_writers_are_removed(tmp_path, dead):
    alive = os.getppid()
    for name in (f".photos-{dead}", f".photos-2-{dead}", f".photos-{alive}"):
        (tmp_path / f"{name}.partial").mkdir()
        (tmp_path / f"{name}.partial" / "train-00000.parquet").touch()
    (tmp_path / f".photos-{dead}.scratch").mkdir()
    with ShardWriter(tmp_path, "photos", ["rgb"]) as writer:
        (writer.make_scratch() / "large").touch()
        writer.write(rgb_row(0))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([f".photos-2-{dead}.partial", f".photos-{alive}.partial", "photos"])


def test_a_source_whose_replacement_was_killed_comes_back(tmp_path, dead):
    former = write_rgb(tmp_path, 2).rename(tmp_path / f".photos-{dead}.former")
    with pytest.raises(ValueError, match="`out_dir` must not hold the source already"):
        write_rgb(tmp_path, 3)
    assert len(ShardSource(tmp_path / "photos")) == 2 and not former.exists()
    former.mkdir()  # one that was not removed in time
    write_rgb(tmp_path, 3, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"] and len(ShardSource(tmp_path / "photos")) == 3


def test_a_source_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    folder, replace = write_rgb(tmp_path, 2), os.replace

    def break_off(source, goal):
        if str(source).endswith(".partial"):
            raise OSError("the disk is away")
        replace(source, goal)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="the disk is away"):
        patched.setattr(os, "replace", break_off)
        write_rgb(tmp_path, 3, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"] and len(ShardSource(folder)) == 2


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"source": "a/b"}, "`source` must be a plain folder name, got 'a/b'"),
        ({"sensors": []}, "`sensors` must name at least one sensor"),
        ({"sensors": ["target"]}, "`sensors` must not be named like another column, got .'target'"),
        ({"sensors": ["s2"]}, "`levels` must say which of l1c, l2a sensor 's2' has, got None"),
        ({"rows_per_file": 0}, "`rows_per_file` must be at least 1, got 0"),
    ],
)
def test_writers_that_make_no_sense_are_refused(tmp_path, arguments, match):
    with pytest.raises(ValueError, match=match):
        ShardWriter(tmp_path, **({"source": "photos", "sensors": ["rgb"]} | arguments))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"source": "other"}, "`source` of a row must be 'photos', got 'other'"),
        ({"split": "hold-out"}, "`split` must be one word, got 'hold-out'"),
        ({"key": "train0"}, "`key` must be unique in its source, got 'train0' twice"),
        ({"images": {}}, "`images` must hold the sensors rgb, got"),
        ({"bounds": [1.0, 2.0]}, "`bounds` must be west, south, east, north"),
        ({"images": {"rgb": rgb_image(units="class")}}, "`units` of 'rgb' must be one of dn, reflectance"),
        ({"images": {"rgb": rgb_image(bands=["red", "green"])}}, "`bands` of 'rgb' must name each of the 3 bands"),
        ({"images": {"rgb": rgb_image(bands=["R", "G", "B"])}}, "`bands` of 'rgb' must have canonical names"),
        ({"images": {"rgb": rgb_image(scale=0.0)}}, "`scale` and `offset` of 'rgb' must be finite and `scale` not 0"),
        ({"images": {"rgb": rgb_image(transform=[1.0])}}, "`transform` of 'rgb' must have 6 numbers"),
        ({"images": {"rgb": rgb_image(bands=["blue", "green", "red"])}}, "must be the same in all rows of a source"),
        ({"images": {"rgb": ShardImage(np.zeros((3, 4), np.uint8), RGB, "dn")}}, "must be a non-empty numeric array"),
        ({"target": ShardImage(np.zeros((1, 2, 2), bool), ["a"], "class")}, "`pixels` of 'target' must be a non-empty"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, changes, match):
    with ShardWriter(tmp_path, "photos", ["rgb"]) as writer:
        writer.write(rgb_row(0))
        with pytest.raises(ValueError, match=match):
            writer.write(rgb_row(1, **changes))
    assert len(ShardSource(tmp_path / "photos")) == 1


def test_implausible_values_are_refused_unless_told_otherwise(tmp_path):
    linear = ShardImage(np.full((2, 10, 14), 0.05, np.float32), S1, "db")
    wrong = pair_row(0, s1=ShardImage(linear.pixels + 7, S1, "db"))
    with (
        ShardWriter(tmp_path, "pairs", ["s1", "s2"], {"s2": "l2a"}) as writer,
        pytest.raises(ValueError, match="This is row 'p0' of source 'pairs'"),
    ):
        writer.write(wrong)
    with ShardWriter(tmp_path, "pairs", ["s1", "s2"], {"s2": "l2a"}, overwrite=True, check=False) as writer:
        writer.write(wrong)
    assert len(ShardSource(tmp_path / "pairs")) == 1


def test_a_sensor_of_ones_own_needs_no_catalogue(tmp_path):
    thermal = ShardImage(np.full((1, 6, 6), 300, np.uint16), ["T1"], "reflectance")
    with ShardWriter(tmp_path, "heat", ["thermal"]) as writer:
        writer.write(rgb_row(0, source="heat", images={"thermal": thermal}))
    source = ShardSource(tmp_path / "heat")
    assert source.bands == {"thermal": ["T1"]}
    assert pq.read_schema(tmp_path / "heat" / "train-00000.parquet").names == shard_schema(["thermal"]).names
    assert "thermal: uint16, unit reflectance" in inspect_shards(tmp_path / "heat")


# The report


def test_the_report_says_what_is_there(tmp_path):
    s2 = ShardImage(np.full((4, 10, 14), 1000, np.uint16), S2, "dn", 1e-4, -0.1, gsd=10.0, nodata=0, datetime="2023-06")
    s2.pixels[:, :5] = np.array([1500, 2000, 3000, 4000], np.uint16)[:, None, None]
    s2.pixels[0, 9, 13] = 0
    s1 = ShardImage(np.full((2, 10, 14), 1000, np.uint16), S1, "amplitude", 1e-4)
    with ShardWriter(tmp_path, "pairs", ["s1", "s2"], {"s2": "l2a"}) as writer:
        writer.write(pair_row(0, s1=s1, s2=s2))
        writer.write(pair_row(1, "val", s1=s1, s2=s2))
    report = inspect_shards(tmp_path)
    assert "pairs: 2 rows, paired s1 + s2" in report
    assert "train 1 row, 1 place: belgium (1)" in report
    assert "places in more than one split: belgium" in report
    assert "s2: uint16, unit dn, level l2a, 10 x 14 px, gsd 10.0 m, dates 2023-06" in report
    assert "physical = stored * 0.0001 - 0.1; nodata 0.0" in report
    lines = {line.split()[0]: line.split()[1:] for line in report.splitlines() if line.split()}
    # Stored and physical minimum, median, maximum of the valid pixels: 69 of 139 at the lower value.
    assert lines["B08"][:4] == ["842", "1000", "4000", "4000"]
    assert [float(value) for value in lines["B08"][4:]] == pytest.approx([0.0, 0.3, 0.3], abs=1e-6)
    # 20 log10(1000 * 1e-4) = -20 dB.
    assert [float(value) for value in lines["VV"][4:]] == pytest.approx([-20.0] * 3, abs=1e-4)
    assert "invalid pixels: 0.714 %" in report  # 1 of 140


@pytest.mark.parametrize(
    "low, offset, said",
    [
        (1000, 0.0, "! no value below 1000 with offset 0: .* make the shards anew with offset=-1000"),
        (999, 0.0, None),
        (1, -0.1, "! 33 % of a band of an image is below zero with its offset: .* make the shards anew with offset=0"),
        (1000, -0.1, None),
    ],
)
def test_an_offset_that_can_hardly_be_is_remarked(tmp_path, low, offset, said):
    pixels = np.full((4, 10, 14), 2000, np.uint16)
    pixels[1, :3] = low
    # No ground, though nothing declares it.
    pixels[:, 9:] = 0
    image = ShardImage(pixels, S2, "dn", 1e-4, offset)
    with ShardWriter(tmp_path, "pairs", ["s1", "s2"], {"s2": "l2a"}) as writer:
        writer.write(pair_row(0, s2=image))
    report = inspect_shards(tmp_path)
    assert re.search(said, report) if said else "!" not in report


def test_the_report_has_the_range_of_numbers(tmp_path):
    with ShardWriter(tmp_path, "photos", ["rgb"]) as writer:
        for number in range(3):
            target = ShardImage(np.full((1, 1, 1), number + 0.5, np.float32), ["biomass"], "number")
            writer.write(rgb_row(number, target=target))
    assert "number biomass train: 0.5 to 2.5, median 1.5, of 3 rows" in inspect_shards(tmp_path)


def test_the_report_lists_damaged_rows(tmp_path):
    folder = write_rgb(tmp_path, 20, ("train", "val"))
    assert inspect_shards(folder, verify=True).endswith("verified with page checksums: all rows are sound")
    file = folder / "val-00000.parquet"
    content = bytearray(file.read_bytes())
    content[content.find(rgb_image(17).pixels.tobytes())] ^= 1
    file.write_bytes(content)
    report = inspect_shards(folder, verify=True)
    assert "verified with page checksums: 4 damaged" in report and len(report.damaged) == 4
    assert "got damage at row 17 (among rows 16 to 19)" in report
    file.write_bytes(content[:-50])
    assert "must be a whole Parquet file" in inspect_shards(folder, verify=True)
    with pytest.raises(CorruptShardError, match="must be a whole Parquet file"):
        inspect_shards(folder)
    (folder / "train-00000.parquet").unlink()
    assert "no readable split" in inspect_shards(folder, verify=True)


def test_the_report_survives_damage_in_the_metadata(tmp_path):
    folder = write_rgb(tmp_path, 20, ("train", "val"))
    file = folder / "val-00000.parquet"
    content = bytearray(file.read_bytes())
    start = pq.ParquetFile(file).metadata.row_group(0).column(0).data_page_offset
    content[start : start + 6] = b"\xff" * 6
    file.write_bytes(content)
    report = inspect_shards(folder, verify=True)
    assert report.damaged and "damage at rows 0 to 15" in report and "train 20 rows" in " ".join(report.split())


def test_the_contact_sheet_shows_rows_and_sensors(tmp_path):
    write_pairs(tmp_path / "shards")
    write_rgb(tmp_path / "shards", 3, ("val",))
    one = contact_sheet(tmp_path / "shards" / "pairs", tmp_path / "new" / "one.png")
    both = contact_sheet(tmp_path / "shards", tmp_path / "both.png", rows=1)
    assert [path.name for path in one.parent.iterdir()] == ["one.png"]
    with Image.open(one) as picture, Image.open(both) as other:
        # Two rows of s1 VV, VH and s2; one row of each source.
        assert picture.width > 2.5 * picture.height / 2
        assert picture.size == other.size
        assert len(np.unique(np.asarray(picture.convert("L")))) > 100
    with pytest.raises(ValueError, match="`split` must be one of train, got 'test'"):
        contact_sheet(tmp_path / "shards" / "pairs", tmp_path / "two.png", split="test")
    assert not (tmp_path / "two.png").exists()


def test_the_contact_sheet_takes_splits_in_turn_and_shows_labels(tmp_path, monkeypatch):
    write_rgb(tmp_path, 1, ("val", "test"))
    ids = np.full((1, 10, 14), 255, np.uint8)
    ids[0, :4], ids[0, 4:6] = 0, 7
    with ShardWriter(tmp_path, "maps", ["rgb"]) as writer:
        writer.write(rgb_row(0, source="maps", target=ShardImage(ids, ["class"], "class", nodata=255)))
        writer.write(rgb_row(1, "val", "maps", labels=["crop", "town"]))
        number = ShardImage(np.full((1, 1, 1), 2.5, np.float32), ["biomass"], "number")
        writer.write(rgb_row(2, "test", "maps", target=number))
    headings, legends = [], []
    text, legend = Figure.text, Axes.legend
    monkeypatch.setattr(Figure, "text", lambda self, x, y, s, **o: headings.append(s) or text(self, x, y, s, **o))
    monkeypatch.setattr(
        Axes, "legend", lambda self, **o: legends.append([h.get_label() for h in o["handles"]]) or legend(self, **o)
    )
    contact_sheet(tmp_path / "maps", tmp_path / "maps.png")
    assert [heading.split("  |  ") for heading in headings[1:]] == [
        ["maps train", "train0"],
        ["maps test", "test2", "biomass 2.5"],
        ["maps val", "val1", "crop, town"],
    ]
    assert legends == [["id 0", "id 7"]]
    headings.clear()
    contact_sheet(tmp_path / "photos", tmp_path / "photos.png", split="val")
    assert headings[1:] == ["photos val  |  val0"]


@pytest.mark.parametrize("fill", [-9999, -32768])
@pytest.mark.parametrize("sensor, unit, scale", [("s1", "db", 1.0), ("dsm", "metres", 1.0), ("s1", "db", 0.1)])
def test_a_fill_value_that_nobody_declared_is_refused(tmp_path, sensor, unit, scale, fill):
    bands = SENSORS[sensor].band_names
    pixels = np.full((len(bands), 16, 16), (-15 if unit == "db" else 300) / scale, np.float32)
    pixels[:, :, 0] = fill
    image = ShardImage(pixels, bands, unit, scale)
    with (
        pytest.raises(ValueError, match=f"`nodata` of sensor '{sensor}' must be said .* got a value of {fill} that"),
        ShardWriter(tmp_path, "mine", [sensor]) as writer,
    ):
        writer.write(ShardRow("a", "mine", "train", "here", {sensor: image}))
    assert not (tmp_path / "mine").exists()
    with ShardWriter(tmp_path, "mine", [sensor]) as writer:
        declared = dataclasses.replace(image, nodata=float(fill))
        writer.write(ShardRow("a", "mine", "train", "here", {sensor: declared}))
