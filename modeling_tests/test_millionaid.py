"""Million-AID: pictures of all sizes, with and without labels, on a small tree with its names."""

import warnings

import numpy as np
import PIL.Image
import pytest

from geotiff_files import write_geotiff
from msgfm_hf.cli import main
from msgfm_hf.data.archive import convert_archive, read_picture
from msgfm_hf.data.millionaid import MillionAid
from msgfm_hf.data.shards import ShardSource, shard_splits
from msgfm_hf.data.splits import hashed_fraction

TREE = {
    "train/agriculture_land/arable_land/dry_field/P0000001.jpg": (110, 110),
    "train/transportation_land/highway_land/bridge/P0000002.jpg": (256, 200),
    "train/unutilized_land/bare_land/P0000003.jpg": (64, 64),
    "test/P0010000.jpg": (90, 70),
    "test/P0010001.JPG": (1500, 300),
}


@pytest.fixture
def root(tmp_path):
    for path, size in TREE.items():
        (tmp_path / "Million-AID" / path).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 50).convert("RGB").save(
            tmp_path / "Million-AID" / path, "JPEG", quality=90
        )
    return tmp_path / "Million-AID"


def rows(folder):
    return [
        ShardSource(folder, split).read(index)
        for split in shard_splits(folder)
        for index in range(len(ShardSource(folder, split)))
    ]


def test_both_parts_train_and_labels_are_folders(root, tmp_path, capsys):
    main(["shards", "millionaid", "--root", str(root), "--out", str(tmp_path), "--workers", "1"])
    said = capsys.readouterr().out
    assert "all for training without labels: test 2, train 3" in said
    assert "1: reduced by a whole factor to at most 1024 pixels on a side" in said
    found = {row["key"]: row for row in rows(tmp_path / "millionaid")}
    assert sorted(found) == sorted(TREE)
    for key, (width, height) in TREE.items():
        factor = 1 if width <= 1024 else 2
        image = found[key]["images"]["rgb"]
        assert image.pixels.shape == (3, height // factor, width // factor) and image.scale == 1 / 255
        assert found[key]["group_id"] == key and found[key]["pair_id"] is None
    labels = {key: row["labels"] for key, row in found.items()}
    assert labels["train/agriculture_land/arable_land/dry_field/P0000001.jpg"] == [
        "agriculture_land",
        "arable_land",
        "dry_field",
    ]
    assert labels["train/unutilized_land/bare_land/P0000003.jpg"] == ["unutilized_land", "bare_land"]
    assert labels["test/P0010000.jpg"] is None
    for path in ("train/unutilized_land/bare_land/P0000003.jpg", "test/P0010000.jpg"):
        decoded = np.asarray(PIL.Image.open(root / path)).transpose(2, 0, 1)
        np.testing.assert_array_equal(found[path]["images"]["rgb"].pixels, decoded)


def test_a_hundredth_validates(tmp_path):
    (tmp_path / "test").mkdir()
    names = [f"test/P{number:07d}.jpg" for number in range(300)]
    for name in names:
        (tmp_path / name).touch()
    listed = {item.key: item.split for item in MillionAid(tmp_path).list_items().items}
    held_out = {name for name in names if hashed_fraction(name) < 0.01}
    assert {key for key, split in listed.items() if split == "val"} == held_out and 0 < len(held_out) < 12
    assert set(listed.values()) == {"train", "val"}


@pytest.mark.parametrize("options", [{"driver": "PNG"}, {}, {"compress": "deflate"}])
@pytest.mark.parametrize("bands", [3, 4])
def test_pictures_of_sixteen_bits_are_refused(tmp_path, options, bands):
    pixels = np.random.default_rng(0).integers(0, 65_536, (bands, 20, 30), dtype=np.uint16)
    colours = {"photometric": "RGB"} if "driver" not in options else {}
    path = write_geotiff(tmp_path / "deep.tif", pixels, crs=None, **options, **colours)
    with pytest.raises(ValueError, match=r"`path` must be a whole picture of 8 bits .* of mode RGB.?;16"):
        read_picture(path)


def test_large_pictures_are_averaged_down_by_a_whole_factor(tmp_path):
    flat = np.kron(np.array([[[250, 10, 30], [20, 200, 60]]], dtype=np.uint8), np.ones((900, 1100, 1), np.uint8))
    PIL.Image.fromarray(flat).save(tmp_path / "plain.png")  # 2200 x 900: a third
    pixels, remarks = read_picture(tmp_path / "plain.png")
    assert pixels.shape == (3, 300, 734) and len(remarks) == 1
    np.testing.assert_array_equal(pixels[:, 5, 5], [250, 10, 30])
    np.testing.assert_array_equal(pixels[:, 5, -5], [20, 200, 60])
    PIL.Image.fromarray(flat).save(tmp_path / "photo.jpg", quality=95)
    pixels, _ = read_picture(tmp_path / "photo.jpg")
    factor = 2200 / pixels.shape[2]
    assert max(pixels.shape) <= 1024 and abs(factor - round(factor)) < 0.01
    assert np.abs(pixels[:, 5, 5].astype(int) - [250, 10, 30]).max() <= 4


def test_an_image_of_thirty_thousand_pixels_a_side_is_read_in_little_memory(tmp_path):
    import resource

    # 31,672 squared is the largest that is published: three gigabytes if decoded whole.
    PIL.Image.new("L", (31_672, 4_000), 77).save(tmp_path / "huge.jpg", quality=50)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels, remarks = read_picture(tmp_path / "huge.jpg")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert pixels.shape == (3, 125, 990) and np.abs(pixels.astype(int) - 77).max() <= 1
    assert "converted from L to RGB" in remarks and grown < 150
    assert PIL.Image.MAX_IMAGE_PIXELS is not None  # the guard of everyone else is as it was


def test_a_picture_that_claims_too_many_pixels_is_bad(tmp_path):
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    data = struct.pack(">I", 2) + b"IDATxx" + struct.pack(">I", zlib.crc32(b"IDATxx"))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + data + end)
    with pytest.raises(ValueError, match=r"`path` must be a whole picture .* 60000 x 60000 pixels of mode RGB"):
        read_picture(tmp_path / "bomb.png")


def test_truncated_and_missing_pictures_are_bad(root, tmp_path):
    path = root / "train/agriculture_land/arable_land/dry_field/P0000001.jpg"
    path.write_bytes(path.read_bytes()[:900])
    (root / "test" / "P0010002.jpg").symlink_to(root / "gone.jpg")
    made = convert_archive(MillionAid(root), tmp_path / "out", workers=1)
    bad = {entry["key"]: entry["reason"] for entry in made.manifest["bad"]}
    assert sorted(bad) == ["test/P0010002.jpg", "train/agriculture_land/arable_land/dry_field/P0000001.jpg"]
    assert "FileNotFoundError" in bad["test/P0010002.jpg"]
    assert sum(made.manifest["rows"].values()) == 4


def test_a_folder_without_parts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`root` must hold images of millionaid, got none"):
        convert_archive(MillionAid(tmp_path), tmp_path / "out")
    with pytest.raises(ValueError, match=r"`root` must hold train/<l1>/<l2>/<picture>.jpg and test/<picture>.jpg"):
        MillionAid(tmp_path / "nowhere").list_items()
