"""GeoPile: collections of pictures, RESISC45 among them, on a small tree with its names and real pixels."""

import json

import numpy as np
import PIL.Image
import pytest
import tifffile

from msgfm_hf.cli import main
from msgfm_hf.data.archive import convert_archive
from msgfm_hf.data.geopile import GeoPile
from msgfm_hf.data.splits import hashed_fraction
from shard_rows import rows


@pytest.fixture
def root(tmp_path):
    """Three collections; of the five modes that pictures come in, one each."""
    folder = tmp_path / "GeoPileV0"
    noise = np.random.default_rng(0)
    pictures = {
        "NAIP/images/m_3008501.png": PIL.Image.fromarray(noise.integers(0, 256, (40, 50, 3), dtype=np.uint8)),
        "PatternNet/beach/beach001.png": PIL.Image.fromarray(noise.integers(0, 256, (32, 32), dtype=np.uint8)),
        "PatternNet/beach/beach002.PNG": PIL.Image.fromarray(noise.integers(0, 256, (32, 32, 4), dtype=np.uint8)),
        "RESISC45/airport/airport_001.jpg": PIL.Image.new("RGB", (256, 256), (10, 200, 90)),
        "RESISC45/airport/airport_002.jpg": PIL.Image.new("CMYK", (256, 256), (0, 0, 0, 0)),
    }
    for path, picture in pictures.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / path, quality=95)
    (folder / "PatternNet" / "beach" / ".beach003.jpg").write_bytes(b"a hidden file")
    (folder / "PatternNet" / "labels.txt").write_text("beach\n")
    return folder


def test_pictures_become_rgb_rows(root, tmp_path):
    made = convert_archive(GeoPile(root.parent), tmp_path / "out", workers=1)
    found = {key: row for key, (_, row) in rows(made.folder).items()}
    assert sorted(found) == [
        "NAIP/images/m_3008501.png",
        "PatternNet/beach/beach001.png",
        "PatternNet/beach/beach002.PNG",
        "RESISC45/airport/airport_001.jpg",
        "RESISC45/airport/airport_002.jpg",
    ]
    for key, row in found.items():
        image = row["images"]["rgb"]
        assert (image.bands, image.units, image.scale, image.offset) == (["red", "green", "blue"], "dn", 1 / 255, 0)
        assert image.pixels.dtype == np.uint8 and (image.crs, image.transform, row["pair_id"]) == (None, None, None)
        assert row["group_id"] == key and row["labels"] is None
    colour = np.asarray(PIL.Image.open(root / "NAIP/images/m_3008501.png"))
    np.testing.assert_array_equal(found["NAIP/images/m_3008501.png"]["images"]["rgb"].pixels, colour.transpose(2, 0, 1))
    grey = np.asarray(PIL.Image.open(root / "PatternNet/beach/beach001.png"))
    np.testing.assert_array_equal(found["PatternNet/beach/beach001.png"]["images"]["rgb"].pixels, np.stack([grey] * 3))
    alpha = np.asarray(PIL.Image.open(root / "PatternNet/beach/beach002.PNG"))[..., :3].transpose(2, 0, 1)
    np.testing.assert_array_equal(found["PatternNet/beach/beach002.PNG"]["images"]["rgb"].pixels, alpha)
    white = found["RESISC45/airport/airport_002.jpg"]["images"]["rgb"].pixels
    assert white.min() >= 250  # no ink at all
    assert made.manifest["remarks"] == {
        "converted from CMYK to RGB": 1,
        "converted from L to RGB": 1,
        "converted from RGBA to RGB": 1,
    }


def test_real_pictures_keep_their_pixels(sample_data, tmp_path):
    chips = sorted((sample_data / "naip_urban_trees" / "images").glob("*.tif"))[:3]
    folder = tmp_path / "GeoPileV0" / "NAIP" / "0"
    folder.mkdir(parents=True)
    pixels = {f"{chip.stem}.png": tifffile.imread(chip)[..., :3] for chip in chips}
    for name, colours in pixels.items():
        PIL.Image.fromarray(colours).save(folder / name)
    made = convert_archive(GeoPile(tmp_path / "GeoPileV0"), tmp_path / "out", workers=1)
    found = rows(made.folder)
    assert len(found) == 3
    for name, colours in pixels.items():
        np.testing.assert_array_equal(found[f"NAIP/0/{name}"][1]["images"]["rgb"].pixels, colours.transpose(2, 0, 1))
    for number, band in enumerate(("red", "green", "blue")):
        values = np.stack([colours[..., number] for colours in pixels.values()]).astype(np.float64)
        measured = made.manifest["statistics"]["rgb"][band]
        assert (measured["mean"], measured["std"]) == pytest.approx((values.mean(), values.std()), rel=1e-12)


def test_resisc45_is_pointed_out_and_can_be_left_out(root, tmp_path, capsys):
    main(["shards", "geopile", "--root", str(root), "--out", str(tmp_path / "all"), "--workers", "1"])
    said = capsys.readouterr().out
    assert "no clean downstream set" in said and "NAIP 1, PatternNet 2, RESISC45 2" in said
    options = ["--out", str(tmp_path / "clean"), "--workers", "1", "--without", "resisc45"]
    main(["shards", "geopile", "--root", str(root), *options])
    said = capsys.readouterr().out
    assert "left out 2: pictures of RESISC45, as asked for" in said and "no clean downstream set" not in said
    assert not any("RESISC45" in key for key in rows(tmp_path / "clean" / "geopile"))
    assert len(rows(tmp_path / "clean" / "geopile")) == 3
    # The published statistics are those of RESISC45 itself (torchgeo), on 0-255.
    manifest = json.loads((tmp_path / "clean" / "geopile" / "manifest.json").read_text())
    assert manifest["published"]["rgb"]["bands"]["red"] == [93.894, 51.849]


def test_validation_is_a_lasting_hundredth(tmp_path):
    folder = tmp_path / "MLRSNet" / "airport"
    folder.mkdir(parents=True)
    names = [f"MLRSNet/airport/airport_{number:05d}.png" for number in range(150)]
    for name in names:
        PIL.Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / name)
    listed = {item.key: item.split for item in GeoPile(tmp_path).list_items().items}
    held_out = {name for name in names if hashed_fraction(name) < 0.01}
    assert listed == {name: "val" if name in held_out else "train" for name in names}
    assert 0 < len(held_out) < 10


def test_unsound_pictures_are_counted(root, tmp_path):
    whole = (root / "RESISC45/airport/airport_001.jpg").read_bytes()
    (root / "RESISC45/airport/airport_003.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "RESISC45/airport/airport_004.jpg").write_bytes(b"not a picture")
    PIL.Image.fromarray(np.full((8, 8), 4000, dtype=np.uint16)).save(root / "NAIP/images/deep.png")
    made = convert_archive(GeoPile(root), tmp_path / "out", workers=1)
    reasons = {bad["key"]: bad["reason"] for bad in made.manifest["bad"]}
    assert sorted(reasons) == [
        "NAIP/images/deep.png",
        "RESISC45/airport/airport_003.jpg",
        "RESISC45/airport/airport_004.jpg",
    ]
    assert all(reason.startswith("`path` must be a whole picture of 8 bits") for reason in reasons.values())
    assert "truncated" in reasons["RESISC45/airport/airport_003.jpg"] and "I;16" in reasons["NAIP/images/deep.png"]
    assert len(rows(made.folder)) == 5
    with pytest.raises(ValueError, match="`max_bad` must be at least .*got 2 and 3 so far"):
        convert_archive(GeoPile(root), tmp_path / "strict", workers=1, max_bad=2)


def test_wrong_folders_and_names_are_refused(root, tmp_path):
    with pytest.raises(ValueError, match=r"`root` must hold GeoPileV0/<collection>/<class>/<picture>, got no folder"):
        GeoPile(tmp_path / "nowhere").list_items()
    with pytest.raises(
        ValueError, match="`without` must name a collection in .*got 'ucmerced' and NAIP, PatternNet, RESISC45"
    ):
        GeoPile(root, without=("ucmerced",)).list_items()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`root` must hold images of geopile, got none"):
        convert_archive(GeoPile(tmp_path / "empty"), tmp_path / "out")
