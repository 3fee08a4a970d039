"""ben-ge: three sensors of BigEarthNet v1 on one grid, on a small tree with its names, dtypes, JSON and sizes."""

import json

import numpy as np
import pytest
import rasterio
import tifffile
from rasterio.transform import from_origin

from msgfm_hf.cli import main
from msgfm_hf.data.archive import convert_archive
from msgfm_hf.data.ben_ge import CLASSES, BenGe
from msgfm_hf.data.shards import ShardSource, shard_splits
from msgfm_hf.data.splits import hashed_fraction
from shard_rows import rows

# Native metres of the bands in the order of the product, which has no B10 (BigEarthNet v1).
GSD = {
    "B01": 60,
    "B02": 10,
    "B03": 10,
    "B04": 10,
    "B05": 20,
    "B06": 20,
    "B07": 20,
    "B08": 10,
    "B8A": 20,
    "B09": 60,
    "B11": 20,
    "B12": 20,
}
# Pairs of names as published; the second misses a zero in its hour, as some do.
PATCHES = {
    "S2A_MSIL2A_20170613T101031_26_57": "S1B_IW_GRDH_1SDV_20170612T165809_33UUP_26_57",
    "S2B_MSIL2A_20170924T93020_41_73": "S1A_IW_GRDH_1SDV_20170924T043055_35VPK_41_73",
}
FIRST, SECOND = PATCHES
LABELS = ["Discontinuous urban fabric", "Transitional woodland/shrub", "Continuous urban fabric", "Airports"]
EIGHT_K = {"s2": "sentinel-2", "s1": "sentinel-1", "dem": "dem"}


def write(path, pixels, gsd=10, origin=(420000.0, 5800000.0), crs="EPSG:32633"):
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"crs": crs, "transform": from_origin(*origin, gsd, gsd), "dtype": pixels.dtype}
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=pixels.shape[0], width=pixels.shape[1], **options
    ) as file:
        file.write(pixels, 1)


def band_pixels(band, seed):
    side = 1200 // GSD[band]
    return np.random.default_rng([seed, *band.encode()]).integers(100, 4000, (side, side), dtype=np.uint16)


def radar_pixels(band, seed):
    mean = {"VV": -12, "VH": -19}[band]
    return np.random.default_rng([seed, *band.encode()]).normal(mean, 3, (120, 120)).astype(np.float32)


def height_pixels(seed):
    return np.random.default_rng([seed, 9]).integers(30, 90, (120, 120)).astype(np.int16)


def add(root, patch, s1, seed=0, labels=LABELS, folders=None, crs="EPSG:32633", origin=(420000.0, 5800000.0)):
    folders = folders or {"s2": "BigEarthNet-v1.0", "s1": "BigEarthNet-S1-v1.0", "dem": "dem"}
    place = {"crs": crs, "origin": origin}
    for band, gsd in GSD.items():
        write(root / folders["s2"] / patch / f"{patch}_{band}.tif", band_pixels(band, seed), gsd, **place)
    for band in ("VV", "VH"):
        write(root / folders["s1"] / s1 / f"{s1}_{band}.tif", radar_pixels(band, seed), **place)
    write(root / folders["dem"] / f"{patch}_dem.tif", height_pixels(seed), **place)
    corners = {"ulx": 420000, "uly": 5800000, "lrx": 421200}
    optical = {
        "labels": labels,
        "coordinates": corners | {"lry": 5798800},
        "projection": "EPSG:32633",
        "tile_source": "S2A_MSIL1C_20170613T101031_N0205_R022_T33UUP_20170613T101608.SAFE",
        "acquisition_date": "2017-06-13 10:10:31",
    }
    radar = {
        "labels": labels,
        "coordinates": corners | {"lly": 5798800},
        "projection": "EPSG:32633",
        "scene_source": "S1B_IW_GRDH_1SDV_20170612T165809_20170612T165834_006020_00A922_F94C",
        "acquisition_time": "2017-06-12 16:58:09",
        "corresponding_s2_patch": patch,
    }
    (root / folders["s2"] / patch / f"{patch}_labels_metadata.json").write_text(json.dumps(optical))
    (root / folders["s1"] / s1 / f"{s1}_labels_metadata.json").write_text(json.dumps(radar))


@pytest.fixture
def root(tmp_path):
    for seed, (patch, s1) in enumerate(PATCHES.items()):
        add(tmp_path / "ben-ge", patch, s1, seed)
    return tmp_path / "ben-ge"


def convert(root, out, max_bad=100, **options):
    return convert_archive(BenGe(root, **options), out, workers=1, max_bad=max_bad)


@pytest.mark.parametrize("folders", [None, EIGHT_K])
def test_three_sensors_on_one_grid(tmp_path, folders):
    for seed, (patch, s1) in enumerate(PATCHES.items()):
        add(tmp_path / "root", patch, s1, seed, folders=folders)
    made = convert(tmp_path / "root", tmp_path / "out")
    found = rows(made.folder)
    assert sorted(found) == sorted(PATCHES) and made.manifest["bad"] == []
    for seed, patch in enumerate(PATCHES):
        _, row = found[patch]
        s1, s2, dsm = (row["images"][sensor] for sensor in ("s1", "s2", "dsm"))
        assert s2.bands == list(GSD) and (s2.units, s2.scale, s2.offset) == ("dn", 1e-4, 0)
        for number, (band, gsd) in enumerate(GSD.items()):
            native = band_pixels(band, seed)
            for y, x in ((0, 0), (119, 119), (61, 17), (30, 118)):
                assert s2.pixels[number, y, x] == native[y * 10 // gsd, x * 10 // gsd]
            if gsd == 10:
                np.testing.assert_array_equal(s2.pixels[number], native)
        assert s1.bands == ["VV", "VH"] and s1.units == "db"
        np.testing.assert_array_equal(s1.pixels, [radar_pixels("VV", seed), radar_pixels("VH", seed)])
        np.testing.assert_array_equal(dsm.pixels[0], height_pixels(seed))
        assert (dsm.units, dsm.pixels.dtype, dsm.bands) == ("metres", np.int16, ["height"])
        for image in (s1, s2, dsm):
            assert image.transform == [420000.0, 10.0, 0.0, 5800000.0, 0.0, -10.0]
            assert image.crs == "EPSG:32633" and image.gsd == 10
        assert (s2.datetime, s1.datetime) == ("2017-06-13T10:10:31", "2017-06-12T16:58:09")
        assert row["labels"] == ["Urban fabric", "Transitional woodland, shrub"] and row["pair_id"] == patch
    assert found[FIRST][1]["group_id"] == "33UUP" and found[SECOND][1]["group_id"] == "35VPK"
    source = ShardSource(made.folder, shard_splits(made.folder)[0])
    assert source.levels == {"dsm": None, "s1": None, "s2": "l2a"}
    # bigearthnet_common's statistics of BigEarthNet v1.
    assert made.manifest["published"]["s2"]["bands"]["B8A"] == [2266.460, 1356.138]


def test_real_pixels_of_three_sensors(sample_data, tmp_path):
    place = sample_data / "s1s2_terramesh" / "637U_59R_1_3"
    layers = {name: tifffile.imread(place / f"{name}.tif") for name in ("S1RTC", "S2L2A", "DEM")}
    layers = {name: np.moveaxis(p, -1, 0) if p.ndim == 3 and p.shape[-1] < 20 else p for name, p in layers.items()}
    add(tmp_path / "root", FIRST, PATCHES[FIRST])
    folder = tmp_path / "root" / "BigEarthNet-v1.0" / FIRST
    for number, (band, gsd) in enumerate(GSD.items()):
        coarse = layers["S2L2A"][number, :120, :120][:: gsd // 10, :: gsd // 10]
        write(folder / f"{FIRST}_{band}.tif", coarse, gsd)
    for number, band in enumerate(("VV", "VH")):
        name = f"{PATCHES[FIRST]}_{band}.tif"
        write(tmp_path / "root" / "BigEarthNet-S1-v1.0" / PATCHES[FIRST] / name, layers["S1RTC"][number, :120, :120])
    write(tmp_path / "root" / "dem" / f"{FIRST}_dem.tif", np.squeeze(layers["DEM"])[:120, :120].astype(np.int16))
    made = convert(tmp_path / "root", tmp_path / "out")
    ((_, (_, row)),) = rows(made.folder).items()
    fine = [number for number, gsd in enumerate(GSD.values()) if gsd == 10]
    np.testing.assert_array_equal(row["images"]["s2"].pixels[fine], layers["S2L2A"][fine, :120, :120])
    np.testing.assert_array_equal(row["images"]["s1"].pixels, layers["S1RTC"][:, :120, :120])
    measured = made.manifest["statistics"]["s2"]["B04"]
    values = layers["S2L2A"][3, :120, :120].astype(np.float64)
    assert (measured["mean"], measured["std"]) == pytest.approx((values.mean(), values.std()), rel=1e-12)


def test_the_nineteen_classes_are_those_of_bigearthnet_mm():
    members = [corine for names in CLASSES.values() for corine in names]
    # 43 CORINE classes of level 3, 11 of which have no class among the 19.
    assert len(CLASSES) == 19 and len(members) == len(set(members)) == 43 - 11
    assert CLASSES["Permanent crops"][-1] == "Annual crops associated with permanent crops"
    assert CLASSES["Inland wetlands"] == ("Inland marshes", "Peatbogs")


def test_tiles_are_dealt_whole_by_their_names(tmp_path):
    letters = "ABCDEFGHJK"
    for number in range(100):
        tile = f"33U{letters[number // 10]}{letters[number % 10]}"
        for patch in range(2):
            s2 = f"S2A_MSIL2A_20170613T101{number:03d}_{patch}_1"
            s1 = f"S1B_IW_GRDH_1SDV_20170612T165809_{tile}_{patch}_1"
            (tmp_path / "BigEarthNet-v1.0" / s2).mkdir(parents=True)
            folder = tmp_path / "BigEarthNet-S1-v1.0" / s1
            folder.mkdir(parents=True)
            facts = {"labels": [], "acquisition_time": "", "corresponding_s2_patch": s2}
            (folder / f"{s1}_labels_metadata.json").write_text(json.dumps(facts))
    (tmp_path / "dem").mkdir()
    items = BenGe(tmp_path).list_items().items
    splits = {}
    for item in items:
        splits.setdefault(item.group_id, set()).add(item.split)
    assert len(items) == 200 and len(splits) == 100 and all(len(found) == 1 for found in splits.values())
    for tile, found in splits.items():
        fraction = hashed_fraction(tile)
        assert found == {"test" if fraction < 0.1 else "val" if fraction < 0.2 else "train"}
    assert {split for found in splits.values() for split in found} == {"train", "val", "test"}


def test_lists_decide_the_split_and_what_is_left_out(root, tmp_path, capsys):
    # ben-ge lists one patch per line; BigEarthNet-MM has Sentinel-2 and -1 in two columns; both without a header.
    (tmp_path / "train.csv").write_text(f"{FIRST}\nS2A_MSIL2A_20170613T101031_0_0\n")
    (tmp_path / "val.csv").write_text(f"{SECOND},{PATCHES[SECOND]}\n")
    (tmp_path / "snow.csv").write_text(f"patch_id\n{SECOND}\n")
    common = ["shards", "ben-ge", "--root", str(root), "--workers", "1"]
    lists = ["--train-list", str(tmp_path / "train.csv"), "--val-list", str(tmp_path / "val.csv")]
    main([*common, "--out", str(tmp_path / "listed"), *lists])
    assert {key: split for key, (split, _) in rows(tmp_path / "listed" / "ben_ge").items()} == {
        FIRST: "train",
        SECOND: "val",
    }
    main([*common, "--out", str(tmp_path / "some"), *lists[:2]])
    assert "left out 1: patches in none of the lists train" in capsys.readouterr().out
    main([*common, "--out", str(tmp_path / "clear"), *lists, "--without", str(tmp_path / "snow.csv")])
    assert "left out 1: patches of the list snow.csv" in capsys.readouterr().out
    assert list(rows(tmp_path / "clear" / "ben_ge")) == [FIRST]


def test_a_list_of_a_spreadsheet_loses_no_patch(root, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(f"{FIRST}\n {SECOND}\n", encoding="utf-8-sig")
    assert sorted(item.key for item in BenGe(root, splits={"train": path}).list_items().items) == sorted(PATCHES)


def damaged(root, kind):
    """The second patch, damaged."""
    optical, radar = root / "BigEarthNet-v1.0" / SECOND, root / "BigEarthNet-S1-v1.0" / PATCHES[SECOND]
    facts = radar / f"{PATCHES[SECOND]}_labels_metadata.json"
    dem = root / "dem" / f"{SECOND}_dem.tif"
    if kind == "truncated":
        path = optical / f"{SECOND}_B02.tif"
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "no band":
        (optical / f"{SECOND}_B8A.tif").unlink()
    elif kind == "no dem":
        dem.unlink()
    elif kind == "no radar":
        for path in radar.iterdir():
            path.unlink()
        radar.rmdir()
    elif kind == "no optical":
        for path in optical.iterdir():
            path.unlink()
        optical.rmdir()
    elif kind == "broken json":
        facts.write_text(facts.read_text()[:30])
    elif kind == "no json":
        facts.write_text("null")
    elif kind == "no facts":
        (optical / f"{SECOND}_labels_metadata.json").write_text("null")
    elif kind == "dem crs":
        write(dem, height_pixels(1), crs="EPSG:32632")
    elif kind == "dem dtype":
        write(dem, height_pixels(1).astype(np.float32))
    elif kind == "shifted band":
        write(optical / f"{SECOND}_B05.tif", band_pixels("B05", 1), 20, origin=(420010.0, 5800000.0))
    elif kind == "size":
        write(optical / f"{SECOND}_B01.tif", np.ones((30, 30), np.uint16), 40)
    elif kind == "radar":
        write(radar / f"{PATCHES[SECOND]}_VH.tif", np.full((120, 120), np.nan, np.float32))
    elif kind == "label":
        path = optical / f"{SECOND}_labels_metadata.json"
        path.write_text(path.read_text().replace("Airports", "Spaceports"))
    elif kind == "keys":
        path = optical / f"{SECOND}_labels_metadata.json"
        path.write_text('{"labels": []}')


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated", "must be a whole TIFF"),
        ("no band", "_B8A.tif"),
        ("no dem", "_dem.tif"),
        ("no radar", f"`root` must hold a Sentinel-1 patch for {SECOND}, got none"),
        ("no optical", "_labels_metadata.json"),
        ("broken json", f"`root` must hold a Sentinel-1 patch for {SECOND}, got none"),
        ("no json", f"`root` must hold a Sentinel-1 patch for {SECOND}, got none"),
        ("no facts", "must hold labels, acquisition_date, got None"),
        ("dem crs", "`s2` and `dsm` must lie on one grid"),
        ("dem dtype", "`dsm` must be int16 of 120 x 120 pixels, got float32"),
        ("shifted band", "`B01` and `B05` must lie on one grid"),
        ("size", r"`s2 B01` must be uint16 of 20 x 20 pixels, got uint16 \(1, 30, 30\)"),
        ("radar", "`s1 VH` must have at least 50% valid pixels, got 0.0%"),
        ("label", f"`labels` of {SECOND} must be CORINE classes, got Spaceports"),
        ("keys", "must hold labels, acquisition_date, got no acquisition_date"),
    ],
)
def test_damage_is_named_and_the_patch_left_out(root, tmp_path, kind, reason):
    damaged(root, kind)
    made = convert(root, tmp_path / "out")
    assert list(rows(made.folder)) == [FIRST]
    (bad,) = made.manifest["bad"]
    assert bad["key"] == SECOND
    with pytest.raises(ValueError, match=reason):
        raise ValueError(bad["reason"])


def test_a_radar_patch_of_another_place_is_bad(root):
    reader = BenGe(root)
    first, second = sorted(reader.list_items().items)
    swapped = first._replace(paths=(first.paths[0], second.paths[1], first.paths[2]))
    with pytest.raises(ValueError, match=f"`corresponding_s2_patch` of {PATCHES[SECOND]} must be '{FIRST}', got"):
        reader.read(swapped)


def test_wrong_folders_and_lists_are_refused(root, tmp_path):
    with pytest.raises(ValueError, match=r"`root` must hold BigEarthNet-v1.0, BigEarthNet-S1-v1.0 .*the folder --dem"):
        BenGe(root, dem="heights").list_items()
    with pytest.raises(ValueError, match="`path` must be a list of patches, got no file"):
        BenGe(root, splits={"train": tmp_path / "none.csv"}).list_items()
    (tmp_path / "empty.csv").write_text("patch\n")
    with pytest.raises(ValueError, match="`path` must be a list of Sentinel-2 patches, got none in"):
        BenGe(root, without=(tmp_path / "empty.csv",)).list_items()
    (tmp_path / "a.csv").write_text(f"{FIRST}\n")
    with pytest.raises(ValueError, match=f"`splits` must name every patch once, got {FIRST} in train and val"):
        BenGe(root, splits={"train": tmp_path / "a.csv", "val": tmp_path / "a.csv"}).list_items()
