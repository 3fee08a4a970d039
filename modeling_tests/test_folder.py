"""Folders of chips: pairing by key, labels, splits by place, and nothing half-written."""

import re

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
import tifffile

from geotiff_files import ORIGIN, UTM, write_geotiff
from msgfm_hf.cli import main
from msgfm_hf.data.folder import match_keys, plan_folder, write_folder
from msgfm_hf.data.inputs import parse_inputs
from msgfm_hf.data.shards import ShardSource, shard_splits

SIZE, GSD = 16, 10.0
PLACES = {"north": 0, "east": 1, "south": 2, "west": 3}


def chip(path, number, sensor="s1", seed=0, **options):
    """The `number`th chip of a row of chips that touch one another."""
    rng = np.random.default_rng((number, seed))
    pixels = rng.normal(-12, 3, (2, SIZE, SIZE)).astype(np.float32)
    bands = ["VV", "VH"]
    if sensor == "s2":
        pixels, bands = rng.integers(1100, 4000, (2, SIZE, SIZE), dtype=np.uint16), ["B04", "B08"]
    origin = (ORIGIN[0] + number * SIZE * GSD, ORIGIN[1])
    return write_geotiff(path, pixels, bands, **({"origin": origin, "gsd": GSD} | options))


@pytest.fixture
def chips(tmp_path, monkeypatch):
    """Ten keys of Sentinel-1, nine of Sentinel-2, one of another name, and a table without the last key."""
    monkeypatch.chdir(tmp_path)
    lines = ["key,cover,region,part,biomass"]
    for number in range(10):
        key = f"k{number}"
        chip(tmp_path / f"chips/s1/{key}.tif", number)
        chip(tmp_path / f"chips/s2/{'other' if number == 9 else key}.tif", number, "s2")
        region, part = list(PLACES)[number % 4], ("train", "train", "Validation", "test")[number % 4]
        if number != 8:
            lines.append(f"{key},{'crop' if number % 2 else 'forest'},{region},{part},{number / 2}")
    (tmp_path / "chips.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


S1, S2 = "s1=chips/s1/{key}.tif", "s2=chips/s2/{key}.tif,level=l2a,offset=-1000"


def plan(split_by, *texts, **options):
    return plan_folder(parse_inputs(list(texts or (S1, S2))), split_by, **options)


def read(path):
    """{key: (split, row)} of a source."""
    found = {}
    for split in shard_splits(path):
        source = ShardSource(path, split)
        found |= {row["key"]: (split, row) for row in (source.read(number) for number in range(len(source)))}
    return found


# Keys


def test_keys_are_the_text_in_place_of_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/x_1_S1.tif", "a/y[2]_S1.tif", "a/x_1_S2.tif", "b/c/x_1_S1.tif", "b/x.dir/p.tif", "a/note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert match_keys("a/{key}_S1.tif") == {"x_1": "a/x_1_S1.tif", "y[2]": "a/y[2]_S1.tif"}
    assert match_keys("**/{key}_S1.tif") == {
        "a/x_1": "a/x_1_S1.tif",
        "a/y[2]": "a/y[2]_S1.tif",
        "b/c/x_1": "b/c/x_1_S1.tif",
    }
    assert match_keys("b/**/{key}_S1.tif") == {"c/x_1": "b/c/x_1_S1.tif"}
    assert match_keys("*/{key}/p.tif") == {"x.dir": "b/x.dir/p.tif"}
    assert match_keys("a/{key}_?_S1.tif") == {"x": "a/x_1_S1.tif"}
    assert match_keys("a/y[2]_{key}.tif") == {"S1": "a/y[2]_S1.tif"}
    assert match_keys(str(tmp_path / "a/{key}.txt")) == {"note": str(tmp_path / "a/note.txt")}
    with pytest.raises(ValueError, match="one file per key, got a/x_1_S1.tif and a/x_1_S2.tif for key 'x_1'. Narrow"):
        match_keys("a/{key}_S*.tif")
    with pytest.raises(ValueError, match="`input` must be a pattern with {key}, got 'a/x.tif'"):
        match_keys("a/x.tif")


def test_a_repeated_key_is_the_same(tmp_path):
    for name in ("a/a.tif", "a/b.tif", "b/b.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(match_keys(str(tmp_path / "{key}/{key}.tif"))) == ["a", "b"]


def test_what_matches_and_what_does_not_is_said(chips):
    said = "\n".join(plan("part", splits="chips.csv").said)
    assert "s1: 10 files match chips/s1/{key}.tif\ns1: 1 (k9) have no partner and are left out" in said
    assert "s2: 10 files match chips/s2/{key}.tif\ns2: 1 (other) have no partner and are left out" in said
    assert "9 keys have every sensor" in said
    assert "chips.csv: 8 of 9 keys found in column 'key'" in said
    assert "split: 1 (k8) have no 'part' in chips.csv and are left out" in said


def test_no_key_of_all_sensors(chips):
    with pytest.raises(ValueError, match=r"got none. Keys by sensor: s1: .* finds 10 \(k0, .*; s2: .* finds 0 \(\)"):
        plan("part", S1, "s2=chips/s3/{key}.tif,level=l2a,offset=0")


# Rows


def test_rows_are_the_pixels_and_places_of_the_files(chips):
    planned = plan("part", labels="chips.csv", label="cover")
    counts = write_folder(planned, chips / "out", "fields")
    assert {split: held.rows for split, held in counts.items()} == {"train": 4, "val": 2, "test": 2}
    rows = read(chips / "out/fields")
    assert sorted(rows) == [f"k{n}" for n in range(8)]
    for key, (split, row) in rows.items():
        number = int(key[1:])
        assert split == ("train", "train", "val", "test")[number % 4] and row["pair_id"] == key
        assert row["labels"] == ["crop" if number % 2 else "forest"] and row["target"] is None
        with rasterio.open(chips / f"chips/s2/{key}.tif") as file:
            expected = file.read()
        s2 = row["images"]["s2"]
        assert np.array_equal(s2.pixels, expected) and s2.bands == ["B04", "B08"]
        assert (s2.scale, s2.offset, s2.crs, s2.gsd) == (1e-4, -0.1, UTM, GSD)
        assert s2.transform == [ORIGIN[0] + number * 160, 10, 0, ORIGIN[1], 0, -10]
        west, south, east, north = row["bounds"]
        assert 4.4 < west < east < 4.5 and 51.4 < south < north < 51.5
    assert ShardSource(chips / "out/fields").levels == {"s1": None, "s2": "l2a"}


def test_rows_are_not_in_the_order_of_keys_and_a_seed_repeats_them(chips):
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_folder(plan("block:160m", S1), chips / "out", name, seed=seed)
        source = ShardSource(chips / "out" / name)
        orders.append([source.read(number)["key"] for number in range(len(source))])
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2]) != orders[0]


def test_grids_must_agree_within_a_row(chips):
    chip(chips / "chips/s2/k3.tif", 4, "s2")
    with pytest.raises(
        ValueError, match=r"`input` must be images on one pixel grid, .*chips/s2/k3.tif with .*gdalwarp"
    ):
        plan("block:1km")


def test_a_level_or_an_offset_that_is_missing_is_told_before_any_pixel(chips):
    with pytest.raises(ValueError, match="`level` of sensor 's2' must be one of l1c, l2a, got none"):
        plan("part", S1, "s2=chips/s2/{key}.tif,offset=0", splits="chips.csv")
    with pytest.raises(ValueError, match=r"`scale` and `offset_dn` of sensor 's2' must be known .*chips/s2/k0.tif"):
        plan("part", S1, "s2=chips/s2/{key}.tif,level=l2a", splits="chips.csv")


def test_a_file_that_cannot_be_read_stops_with_its_name_and_leaves_nothing(chips):
    path = chip(chips / "chips/s1/k5.tif", 5, compress="deflate")
    with tifffile.TiffFile(path) as file:
        start, size = file.pages[0].dataoffsets[0], file.pages[0].databytecounts[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:start] + bytes(size) + whole[start + size :])
    planned = plan("part", S1, splits="chips.csv")
    with pytest.raises(ValueError, match=r"`path` must be a readable TIFF, got 'chips/s1/k5.tif'"):
        write_folder(planned, chips / "out", "fields")
    assert list((chips / "out").iterdir()) == []


def test_rows_must_be_of_one_kind_before_any_pixel_is_read(chips):
    chip(chips / "chips/s2/k7.tif", 7, "s2", dtype="int32")
    with pytest.raises(
        ValueError,
        match=r"same bands, unit and dtype in all files, got B04, B08 in dn, int32 in chips/s2/k7.tif, and .*uint16 in",
    ):
        plan("part", splits="chips.csv")


def test_masks_on_another_grid_are_found_before_any_pixel_is_read(chips):
    ids = np.zeros((1, SIZE, SIZE), np.uint8)
    write_geotiff(chips / "masks/k2.tif", ids, origin=(ORIGIN[0] + 320, ORIGIN[1]))
    write_geotiff(chips / "masks/k3.tif", ids, origin=(ORIGIN[0] + 320, ORIGIN[1]))
    with pytest.raises(ValueError, match="`labels` must be images on one pixel grid, got masks/k3.tif"):
        plan("part", S1, splits="chips.csv", labels="masks/{key}.tif")


def test_labels_are_hidden_where_the_image_has_no_data(chips):
    pixels = np.full((2, SIZE, SIZE), -12, np.float32)
    pixels[:, :4] = np.nan
    write_geotiff(chips / "chips/s1/k0.tif", pixels, ["VV", "VH"])
    write_geotiff(chips / "masks/k0.tif", np.full((1, SIZE, SIZE), 5, np.uint8))
    counts = write_folder(plan("part", S1, splits="chips.csv", labels="masks/{key}.tif"), chips / "out", "masks")
    found = read(chips / "out/masks")["k0"][1]["target"].pixels[0]
    assert (found[:4] == 255).all() and (found[4:] == 5).all()
    assert counts["train"].labels == {5: 12 * SIZE}


def test_chips_without_a_place(chips):
    for number in range(10):
        chip(chips / f"chips/s1/k{number}.tif", number, crs=None)
    planned = plan("part", splits="chips.csv")
    assert "s1: 9 files have no place on the map" in "\n".join(planned.said)
    write_folder(planned, chips / "out", "fields")
    row = read(chips / "out/fields")["k0"][1]
    assert row["images"]["s1"].crs is None and row["images"]["s2"].crs == UTM and row["bounds"] is not None
    with pytest.raises(ValueError, match="`split_by` blocks need images with a place on the map, got none in .*k0"):
        plan("block:1km", S1)
    planned = plan("part", S1, splits="chips.csv")
    write_folder(planned, chips / "out", "alone")
    row = read(chips / "out/alone")["k0"][1]
    assert row["bounds"] is None and row["pair_id"] is None


def test_masks_without_a_nodata_value_are_said_and_kept(chips):
    for number in range(4):
        pixels = np.random.default_rng(number).integers(1, 255, (4, SIZE, SIZE), dtype=np.uint8)
        pixels[3] = 255
        pixels[3, :2] = 0
        origin = (ORIGIN[0] + number * 160, ORIGIN[1])
        write_geotiff(chips / f"rgb/k{number}.tif", pixels, origin=origin, photometric="RGB", alpha="yes")
    planned = plan("part", "rgb=rgb/{key}.tif", splits="chips.csv")
    said = "\n".join(planned.said)
    assert "rgb: 4 files have an alpha band" in said and "rgb: 4 files have a mask but no nodata value" in said
    write_folder(planned, chips / "out", "rgb")
    image = read(chips / "out/rgb")["k2"][1]["images"]["rgb"]
    assert image.nodata == 0 and (~image.valid_mask()).sum() == 2 * SIZE


# Labels


def test_labels_of_keys_that_have_none(chips):
    planned = plan("block:160m", labels="chips.csv", label="biomass")
    said = "\n".join(planned.said)
    assert "read as number" in said and "labels: none for 1 (k8)" in said
    write_folder(planned, chips / "out", "fields")
    rows = read(chips / "out/fields")
    assert rows["k8"][1]["target"] is None
    assert rows["k3"][1]["target"].pixels.tolist() == [[[1.5]]] and rows["k3"][1]["target"].bands == ["biomass"]


def test_blocks_smaller_than_an_image_would_be_chance(chips):
    with pytest.raises(ValueError, match="`split_by` blocks must be at least as large as an image, got 150 m .* 160 m"):
        plan("block:150m", S1)


def test_masks_and_shapes_are_targets(chips):
    ids = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(1, SIZE, SIZE)
    write_geotiff(chips / "masks/k2_ids.tif", ids, origin=(ORIGIN[0] + 320, ORIGIN[1]), nodata=9)
    planned = plan("part", S1, splits="chips.csv", labels="masks/{key}_ids.tif")
    assert "labels: none for 9 (k0, k1, k3, k4, k5, ...)" in planned.said
    write_folder(planned, chips / "out", "masks")
    rows = read(chips / "out/masks")
    assert rows["k0"][1]["target"] is None
    assert np.array_equal(rows["k2"][1]["target"].pixels, np.where(ids == 9, 255, ids))

    # One field over the right half of k0 and the left half of k1.
    field = shapely.box(ORIGIN[0] + 80, ORIGIN[1] - 160, ORIGIN[0] + 240, ORIGIN[1])
    table = geopandas.GeoDataFrame({"crop": ["rye"]}, geometry=[field], crs=UTM)
    table.to_crs("EPSG:4326").to_file(chips / "fields.geojson")
    planned = plan("part", S1, splits="chips.csv", labels="fields.geojson", label="crop")
    counts = write_folder(planned, chips / "out", "shapes")
    rows = read(chips / "out/shapes")
    assert (rows["k0"][1]["target"].pixels[0] == 0).sum(axis=0).tolist() == [0] * 8 + [16] * 8
    assert (rows["k1"][1]["target"].pixels[0] == 0).sum(axis=0).tolist() == [16] * 8 + [0] * 8
    assert (rows["k4"][1]["target"].pixels == 255).all()
    assert counts["train"].labels == {0: 256} and counts["train"].unlabelled == 3
    assert ShardSource(chips / "out/shapes").classes == ["rye"]


def test_shapes_that_lie_on_no_chip(chips):
    table = geopandas.GeoDataFrame({"crop": ["rye"]}, geometry=[shapely.Point(0, 0)], crs="EPSG:4326")
    table.to_file(chips / "fields.gpkg")
    planned = plan("part", S1, splits="chips.csv", labels="fields.gpkg", label="crop")
    with pytest.raises(ValueError, match="`labels` must lie on the images, got none of rye on any"):
        write_folder(planned, chips / "out", "fields")
    assert list((chips / "out").iterdir()) == []


def test_labels_that_cannot_be_used(chips):
    with pytest.raises(ValueError, match="`label_type` is for labels in a CSV: got 'class' for masks/{key}.tif"):
        plan("part", splits="chips.csv", labels="masks/{key}.tif", label_type="class")
    for options in ({"labels": "chips.csv"}, {"label": "cover"}, {"labels": "masks/{key}.tif", "label": "cover"}):
        with pytest.raises(ValueError, match="`label` must name the column of a CSV or the attribute .* got"):
            plan("part", splits="chips.csv", **options)
    with pytest.raises(ValueError, match=r"`labels` must find a mask for some key, got keys 0 .* are 9 \(k0"):
        plan("part", splits="chips.csv", labels="masks/{key}.tif")


# Splits


def test_groups_of_a_column_are_dealt_whole(chips):
    planned = plan("region", labels="chips.csv", label="cover")
    where = {}
    for row in planned.rows:
        assert row.group_id == list(PLACES)[int(row.key[1:]) % 4]
        where.setdefault(row.group_id, set()).add(row.split)
    assert all(len(splits) == 1 for splits in where.values()) and set.union(*where.values()) == {"train", "val", "test"}
    assert any("4 groups of column 'region', dealt 0.7,0.15,0.15 by rows (seed 0)" in line for line in planned.said)


def test_blocks_are_dealt_whole_and_seeded(chips):
    planned = plan("block:300m")
    blocks = {}
    for row in planned.rows:
        blocks.setdefault(row.group_id, set()).add(row.split)
    assert len(blocks) > 3 and all(len(splits) == 1 for splits in blocks.values())
    again = plan("block:300m", seed=1)
    assert [row.group_id for row in again.rows] == [row.group_id for row in planned.rows]
    assert [row.split for row in again.rows] != [row.split for row in planned.rows]


def test_an_unknown_word_in_an_official_split_is_no_group(chips):
    text = (chips / "chips.csv").read_text().replace("test", "holdout")
    (chips / "chips.csv").write_text(text)
    with pytest.raises(ValueError, match="`split_by` must be a column of splits or of groups, .* and also holdout"):
        plan("part", splits="chips.csv")


def test_columns_that_cannot_split(chips):
    with pytest.raises(ValueError, match="`split_by` must be a column of a CSV, or block:5km, got 'region' without"):
        plan("region")
    with pytest.raises(ValueError, match="`column` must be one of those of chips.csv, .* got 'continent'"):
        plan("continent", splits="chips.csv")
    (chips / "empty.csv").write_text("key,region\nk0,\nk1,\n")
    with pytest.raises(ValueError, match="`split_by` must be a column with values .* got 'region' of empty.csv"):
        plan("region", splits="empty.csv")


def test_footprints_that_overlap_across_splits(chips):
    chip(chips / "chips/s1/k1.tif", 2, seed=1)
    with pytest.raises(
        ValueError, match=re.escape("got 1 pairs that do not: k1 (train) and k2 (val). Split by place where")
    ):
        plan("part", S1, splits="chips.csv")
    planned = plan("part", S1, splits="chips.csv", allow_overlap=True)
    assert "overlap: 1 pairs of footprints overlap across splits: k1 (train) and k2 (val)" in planned.said
    chip(chips / "chips/s1/k1.tif", 1)
    planned = plan("part", S1, splits="chips.csv")
    assert "overlap: no footprint overlaps one of another split (9 compared)" in planned.said


@pytest.fixture
def strip(tmp_path, monkeypatch):
    """Chips of 160 m at every 80 m: each overlaps its neighbours, b is seen twice."""
    monkeypatch.chdir(tmp_path)
    splits = {"a": "train", "b": "train", "c": "val", "d": "val", "e": "test"}
    for number, key in enumerate(splits):
        chip(tmp_path / f"s1/{key}.tif", number, origin=(ORIGIN[0] + number * 80, ORIGIN[1]))
    chip(tmp_path / "s1/b_again.tif", 1, seed=1, origin=(ORIGIN[0] + 80, ORIGIN[1]))
    lines = [f"{key},{split}" for key, split in (splits | {"b_again": "train"}).items()]
    (tmp_path / "splits.csv").write_text("\n".join(["key,part", *lines]))
    return tmp_path


def test_chips_cut_with_an_overlap_leave_their_borders_out(strip):
    with pytest.raises(ValueError, match="`split_by` must keep footprints that overlap in one .* --drop-overlap"):
        plan("part", "s1=s1/{key}.tif", splits="splits.csv")
    planned = plan("part", "s1=s1/{key}.tif", splits="splits.csv", drop_overlap=True)
    # d overlaps e; then b, twice, overlaps c, which stays.
    assert {row.key: row.split for row in planned.rows} == {"a": "train", "c": "val", "e": "test"}
    said = "\n".join(planned.said)
    assert "overlap: 1 (d) of val overlap another split and are left out" in said
    assert "overlap: 2 (b, b_again) of train overlap another split and are left out" in said
    assert "overlap: no footprint overlaps one of another split (3 compared)" in said
    words = ["shards", "folder", "--input", "s1=s1/{key}.tif", "--splits", "splits.csv", "--split-by", "part"]
    main([*words, "--drop-overlap", "--out", "shards"])
    assert sorted(read(strip / "shards/s1")) == ["a", "c", "e"]
    assert (strip / "shards/s1/left_out.csv").read_text().split("\n")[1:4] == [
        'b,"of train, overlaps another split"',
        'b_again,"of train, overlaps another split"',
        'd,"of val, overlaps another split"',
    ]


def test_borders_that_are_all_there_is(strip):
    text = (strip / "splits.csv").read_text()
    (strip / "splits.csv").write_text(text.replace("a,train\n", ""))
    with pytest.raises(ValueError, match="`drop_overlap` must leave rows in every split, got none in train. Split by"):
        plan("part", "s1=s1/{key}.tif", splits="splits.csv", drop_overlap=True)


def test_blocks_that_keep_no_neighbours_together_are_remarked(strip):
    shares = {"shares": "1,0,0"}
    small, large = (plan(f"block:{size}", "s1=s1/{key}.tif", **shares).said for size in ("160m", "50km"))
    assert any("! split: 5 places in 3 blocks: where chips touch, neighbours fall" in line for line in small), small
    assert not any("! split" in line for line in large)


def test_a_chip_that_lies_nowhere_is_named(strip):
    chip(strip / "s1/e.tif", 9, origin=(5e8, 5.7e8))
    with pytest.raises(ValueError, match=r"`centres` must lie on the map .* This is s1/e.tif."):
        plan("part", "s1=s1/{key}.tif", splits="splits.csv")


# The command


def test_the_command_says_what_it_made_and_what_comes_next(chips, capsys):
    words = ["shards", "folder", "--input", S1, "--input", S2, "--labels", "chips.csv", "--label", "cover"]
    main([*words, "--split-by", "part", "--out", "shards", "--name", "fields"])
    said = capsys.readouterr().out
    assert "places: 1 blocks of 5000 m" in said
    assert "train  4 rows, 1 places\n         crop 2, forest 2; 0 rows unlabelled" in said
    assert "left out: 3 keys, all of them in shards/fields/left_out.csv" in said
    assert (chips / "shards/fields/left_out.csv").read_text().split("\n")[:4] == [
        "key,why",
        "k8,no 'part'",
        "k9,s1 without s2",
        "other,s2 without s1",
    ]
    assert "Next: msgfm inspect shards/fields\n      msgfm pretrain --data shards/fields --name fields" in said
    with pytest.raises(SystemExit):
        main([*words, "--split-by", "part", "--out", "shards", "--name", "fields"])
    assert "`out_dir` must not hold the source already" in capsys.readouterr().err
    main([*words, "--split-by", "part", "--out", "shards", "--name", "fields", "--overwrite"])
    main([*words, "--split-by", "part", "--out", "shards"])
    assert (chips / "shards/s1_s2/train-00000.parquet").exists()
