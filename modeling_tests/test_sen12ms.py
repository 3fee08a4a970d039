"""SEN12MS: pairs by name, scenes by number, damage of every kind, on a small tree with its names, dtypes and grids."""

import numpy as np
import pytest
import rasterio
import tifffile
from rasterio.transform import from_origin

from msgfm_hf.cli import main
from msgfm_hf.data.archive import convert_archive
from msgfm_hf.data.inspect import inspect_shards
from msgfm_hf.data.sen12ms import Sen12MS
from msgfm_hf.data.shards import ShardSource, shard_splits
from shard_rows import rows

S2_BANDS = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"]
COUNTS = {"s1": 2, "s2": 13, "lc": 4}


def pixels_of(sensor, seed):
    noise = np.random.default_rng(seed)
    if sensor == "s1":
        return noise.normal([[[-11.0]], [[-18.0]]], 3, (2, 256, 256)).astype(np.float32)
    return noise.integers(200, 4000, (COUNTS[sensor], 256, 256)).astype(np.uint16)


def write(path, pixels, crs="EPSG:32650", origin=(300000.0, 4000000.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=count,
        height=height,
        width=width,
        dtype=pixels.dtype,
        crs=crs,
        transform=from_origin(*origin, 10, 10),
        interleave="pixel",
    ) as file:
        file.write(pixels)


def path_of(root, region, sensor, scene, patch):
    return root / region / f"{sensor}_{scene}" / f"{region}_{sensor}_{scene}_p{patch}.tif"


def add(root, region, scene, patch, seed=0, **grid):
    for sensor in ("s1", "s2"):
        write(path_of(root, region, sensor, scene, patch), pixels_of(sensor, seed), **grid)


def convert(root, out, **options):
    return convert_archive(Sen12MS(root, options.pop("keep_cr_test", False)), out, workers=1, **options)


def test_pairs_become_rows_with_their_place(tmp_path):
    region = "ROIs1158_spring"
    # Its lower left corner is where the central meridian of zone 50 crosses the equator.
    add(tmp_path, region, 1, 30, seed=1, origin=(500000.0, 2560.0))
    write(path_of(tmp_path, region, "lc", 1, 30), pixels_of("lc", 1))
    (tmp_path / region / "s1_1" / "notes.tif").write_bytes(b"")
    made = convert(tmp_path, tmp_path / "out")
    ((key, (_, row)),) = rows(made.folder).items()
    assert (key, row["group_id"], row["pair_id"]) == (f"{region}_1_p30", f"{region}_1", f"{region}_1_p30")
    for sensor, bands in (("s1", ["VV", "VH"]), ("s2", S2_BANDS)):
        image = row["images"][sensor]
        np.testing.assert_array_equal(image.pixels, pixels_of(sensor, 1))
        assert image.bands == bands and image.crs == "EPSG:32650" and image.gsd == 10
        assert image.transform == [500000.0, 10.0, 0.0, 2560.0, 0.0, -10.0]
    s1, s2 = row["images"]["s1"], row["images"]["s2"]
    assert (s1.units, s1.scale, s1.offset, s1.pixels.dtype) == ("db", 1.0, 0.0, np.float32)
    assert (s2.units, s2.scale, s2.offset, s2.pixels.dtype) == ("dn", 1e-4, 0.0, np.uint16)
    # A degree at the equator is 111,319.5 m eastwards and 110,574.3 m northwards (WGS84); the grid shrinks by 0.9996.
    east, north = 2560 / 0.9996 / 111_319.5, 2560 / 0.9996 / 110_574.3
    assert row["bounds"] == pytest.approx([117, 0, 117 + east, north], abs=1e-6)
    levels = ShardSource(made.folder, shard_splits(made.folder)[0]).levels
    assert levels == {"s1": None, "s2": "l1c"}
    assert made.manifest["left_out"] == {"files not named like an image of SEN12MS": 1}
    assert "B8A" in inspect_shards(made.folder)


def test_real_pixels_come_out_as_they_are(sample_data, tmp_path):
    stored = {}
    for number, place in enumerate(sorted((sample_data / "s1s2_terramesh").glob("*_*_*_*"))[:2]):
        stored[number] = {}
        for sensor, name in (("s1", "S1RTC"), ("s2", "S2L1C")):
            image = tifffile.imread(place / f"{name}.tif")
            image = image if image.shape[0] == COUNTS[sensor] else np.moveaxis(image, -1, 0)
            stored[number][sensor] = np.pad(image, ((0, 0), (0, 32), (0, 32)), mode="reflect")
            write(path_of(tmp_path, "ROIs2017_winter", sensor, 3, number), stored[number][sensor])
    made = convert(tmp_path, tmp_path / "out")
    found = rows(made.folder)
    assert len(found) == 2
    for number, images in stored.items():
        _, row = found[f"ROIs2017_winter_3_p{number}"]
        for sensor, pixels in images.items():
            np.testing.assert_array_equal(row["images"][sensor].pixels, pixels)
    for sensor, band, number in (("s1", "VH", 1), ("s2", "B08", 7), ("s2", "B12", 12)):
        values = np.stack([images[sensor][number] for images in stored.values()]).astype(np.float64)
        measured = made.manifest["statistics"][sensor][band]
        assert [measured[name] for name in ("count", "mean", "std", "min", "max")] == pytest.approx(
            [values.size, values.mean(), values.std(), values.min(), values.max()], rel=1e-12
        )
    # The toolbox's classification/main_train.py.
    assert made.manifest["published"]["s2"]["bands"]["B08"] == [2154.9846, 1057.7628]
    assert made.manifest["published"]["s1"]["bands"]["VV"] == [-11.76858, 4.525339]


def touch(root, region, scene, patch):
    """Names are enough where only the listing is looked at."""
    for sensor in ("s1", "s2"):
        path = path_of(root, region, sensor, scene, patch)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_scenes_are_told_apart_by_number_not_by_text(tmp_path):
    # 106 and 31 are test scenes of SEN12MS-CR in spring; 1, 10, 6, 3 and 310 are none.
    for scene in (1, 10, 106, 6, 31, 3, 310):
        touch(tmp_path, "ROIs1158_spring", scene, 7)
    # The same numbers of another season are other places.
    touch(tmp_path, "ROIs1868_summer", 106, 7)
    listing = Sen12MS(tmp_path).list_items()
    kept = {item.group_id for item in listing.items}
    assert kept == {f"ROIs1158_spring_{scene}" for scene in (1, 10, 6, 3, 310)} | {"ROIs1868_summer_106"}
    assert listing.left_out == {"patches of the ten test scenes of SEN12MS-CR (--keep-cr-test keeps them)": 2}
    everything = Sen12MS(tmp_path, keep_cr_test=True).list_items()
    assert len(everything.items) == 8 and everything.left_out == {}


def test_the_known_bad_patch_is_left_out(tmp_path):
    touch(tmp_path, "ROIs1868_summer", 146, 202)
    touch(tmp_path, "ROIs1868_summer", 146, 203)
    listing = Sen12MS(tmp_path).list_items()
    assert [item.key for item in listing.items] == ["ROIs1868_summer_146_p203"]
    assert listing.left_out == {"known bad patch (damaged radar image)": 1}


def test_splits_are_whole_scenes_and_test_is_the_hold_out_of_the_authors(tmp_path):
    regions = {"spring": "ROIs1158", "summer": "ROIs1868", "fall": "ROIs1970", "winter": "ROIs2017"}
    for season, seed in regions.items():
        for scene in range(150):
            for patch in (1, 2):
                touch(tmp_path, f"{seed}_{season}", scene, patch)
    items = Sen12MS(tmp_path).list_items().items
    splits = {}
    for item in items:
        splits.setdefault(item.group_id, set()).add(item.split)
    assert all(len(found) == 1 for found in splits.values())
    # splits/SEN12MS_holdOutScenes.txt of the authors' repository.
    hold_out = {
        "ROIs1158_spring": [63, 146, 97, 124, 15, 17],
        "ROIs1868_summer": [43, 131, 19, 104, 72, 15, 79],
        "ROIs1970_fall": [120, 39, 144, 35, 61, 47, 30, 141],
        "ROIs2017_winter": [64, 146, 32, 107, 135],
    }
    expected = {f"{region}_{scene}" for region, scenes in hold_out.items() for scene in scenes}
    assert {group for group, found in splits.items() if found == {"test"}} == expected and len(expected) == 26
    held = sum(found == {"val"} for found in splits.values())
    assert 0.03 < held / len(splits) < 0.07


def damaged(root, kind):
    """Patch 2 of scene 1, damaged."""
    region = "ROIs1158_spring"
    s1, s2 = (path_of(root, region, sensor, 1, 2) for sensor in ("s1", "s2"))
    radar, optical = pixels_of("s1", 2), pixels_of("s2", 2)
    if kind == "truncated":
        s2.write_bytes(s2.read_bytes()[:200_000])
    elif kind == "no s2":
        s2.unlink()
    elif kind == "no s1":
        s1.unlink()
    elif kind == "other crs":
        write(s1, radar, crs="EPSG:32651")
    elif kind == "shifted":
        write(s1, radar, origin=(300010.0, 4000000.0))
    elif kind == "dtype":
        write(s2, optical.astype(np.float32))
    elif kind == "smaller":
        write(s2, optical[:, :128])
    elif kind == "bands":
        write(s2, optical[:12])
    elif kind == "no radar":
        write(s1, np.full_like(radar, np.nan))
    elif kind == "linear":
        write(s1, 10 ** (radar / 10))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated", "must be a whole TIFF"),
        ("no s2", "_s2_1_p2.tif"),
        ("no s1", "_s1_1_p2.tif"),
        ("other crs", "`s1` and `s2` must lie on one grid, got .*EPSG:32651.* and .*EPSG:32650"),
        ("shifted", "`s1` and `s2` must lie on one grid, got .*300010"),
        ("dtype", r"`s2` must be uint16 of 256 x 256 pixels, got float32"),
        ("smaller", r"`s2` must be uint16 of 256 x 256 pixels, got uint16 \(13, 128, 256\)"),
        ("bands", "must name the 12 bands"),
        ("no radar", "`s1` must have at least 50% valid pixels, got 0.0%"),
        ("linear", "`pixels` for sensor 's1' must have a median of at most 0"),
    ],
)
def test_damage_is_named_and_the_pair_left_out(tmp_path, kind, reason):
    for patch in (1, 2):
        add(tmp_path, "ROIs1158_spring", 1, patch, seed=patch)
    damaged(tmp_path, kind)
    made = convert(tmp_path, tmp_path / "out")
    assert list(rows(made.folder)) == ["ROIs1158_spring_1_p1"]
    (bad,) = made.manifest["bad"]
    assert bad["key"] == "ROIs1158_spring_1_p2"
    with pytest.raises(ValueError, match=reason):
        raise ValueError(bad["reason"])
    with pytest.raises(ValueError, match=f"got 0 and 1 so far. They are:\n(.|\n)*{reason}"):
        convert(tmp_path, tmp_path / "strict", max_bad=0)


def test_missing_pixels_stay_invalid_and_out_of_the_statistics(tmp_path):
    add(tmp_path, "ROIs1158_spring", 1, 1, seed=1)
    radar = pixels_of("s1", 1)
    radar[0, :100] = np.nan
    radar[1, 200, 3] = np.inf
    write(path_of(tmp_path, "ROIs1158_spring", "s1", 1, 1), radar)
    made = convert(tmp_path, tmp_path / "out")
    ((_, (_, row)),) = rows(made.folder).items()
    valid = np.isfinite(radar).all(axis=0)
    np.testing.assert_array_equal(row["images"]["s1"].valid_mask(), valid)
    np.testing.assert_array_equal(row["images"]["s1"].pixels, radar)
    measured = made.manifest["statistics"]["s1"]["VV"]
    values = radar[0][valid].astype(np.float64)
    assert (measured["count"], measured["mean"]) == (valid.sum(), pytest.approx(values.mean(), rel=1e-12))


def test_the_command_reports_what_it_left_out(tmp_path, capsys):
    add(tmp_path / "root", "ROIs1970_fall", 5, 1, seed=1)
    add(tmp_path / "root", "ROIs1970_fall", 139, 1, seed=2)
    options = ["--out", str(tmp_path / "out"), "--workers", "1"]
    main(["shards", "sen12ms", "--root", str(tmp_path / "root"), *options])
    said = capsys.readouterr().out
    assert "left out 1: patches of the ten test scenes of SEN12MS-CR" in said
    assert "2155, 1057.8" in said and "published: SEN12MS toolbox" in said
    with pytest.raises(SystemExit):
        main(["shards", "sen12ms", "--root", str(tmp_path / "root"), "--keep-cr-test", *options])
    assert "options {'keep_cr_test': False} (now {'keep_cr_test': True})" in capsys.readouterr().err


def test_a_folder_without_the_archive_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`root` must hold ROIs1158_spring/s1_1/.*, got no folder"):
        Sen12MS(tmp_path / "nowhere").list_items()
    (tmp_path / "ROIs1158_spring_s1" / "s1_1").mkdir(parents=True)
    (tmp_path / "ROIs1158_spring_s1" / "s1_1" / "ROIs1158_spring_s1_1_p407.tif").touch()
    with pytest.raises(ValueError, match="`root` must hold images of sen12ms, got none .*not named like an image"):
        convert(tmp_path, tmp_path / "out")
