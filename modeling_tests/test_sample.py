"""Shards of the real samples against rasterio, the splits beside the imagery and the MANIFEST's facts."""

import csv
import datetime
import math
import shutil
import sys

import numpy as np
import pytest
import rasterio

from msgfm_hf.data.geotiff import read_image, wgs84_bounds
from msgfm_hf.data.inspect import inspect_shards
from msgfm_hf.data.sample import make_sample_shards
from msgfm_hf.data.shards import ShardImage, ShardSource, find_sources, shard_splits

ROWS = {
    "naip": {"train": 272, "val": 58},
    "naip_nd": {"train": 30},
    "autzen": {"train": 32, "val": 5},
    "terramesh": {"train": 3, "val": 1},
    "worldcereal": {"train": 10},
    "slovenia": {"test": 5},
    "openeo": {"test": 12},
}
S2_BANDS = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"]


@pytest.fixture(scope="session")
def made(sample_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    return out, make_sample_shards(sample_data, out)


@pytest.fixture
def few(sample_data, tmp_path):
    """The samples with two chips of the large sets: what is not copied is linked."""
    root = tmp_path / "few"
    root.mkdir()
    for entry in sample_data.iterdir():
        if entry.name not in ("naip_urban_trees", "rgb_dsm_autzen", "naip_timeseries_nd"):
            (root / entry.name).symlink_to(entry)
    for name in ("naip_urban_trees", "rgb_dsm_autzen"):
        (root / name).mkdir()
        for entry in (sample_data / name).iterdir():
            if entry.name != "chips.csv":
                (root / name / entry.name).symlink_to(entry)
        lines = (sample_data / name / "chips.csv").read_text().splitlines()
        (root / name / "chips.csv").write_text("\n".join([lines[0], lines[1], lines[-1]]) + "\n")
    (root / "naip_timeseries_nd").mkdir()
    scene = sorted((sample_data / "naip_timeseries_nd").glob("*.tif"))[0]
    shutil.copyfile(scene, root / "naip_timeseries_nd" / scene.name)
    (root / "naip_timeseries_nd" / scene.name).chmod(0o644)
    return root


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def raster(path):
    with rasterio.open(path) as file:
        return file.read(), list(file.descriptions)


def rows(out, name):
    for split in shard_splits(out / name):
        source = ShardSource(out / name, split)
        for number in range(len(source)):
            yield split, source.read(number)


def physical(image):
    return image.pixels * image.scale + image.offset


def test_counts_and_splits(made, sample_data):
    out, summary = made
    assert {name: entry["rows"] for name, entry in summary.items()} == ROWS
    assert not any(entry["kept"] for entry in summary.values())
    assert [reason[:13] for reason in summary["worldcereal"]["dropped"]] == ["S1_202012.tif", "S1_202101.tif"]
    assert sum(len(entry["dropped"]) for entry in summary.values()) == 2
    assert find_sources(out) == [str(out / name) for name in sorted(ROWS)]
    cities = {chip["chip"]: chip["city"] for chip in table(sample_data / "naip_urban_trees" / "chips.csv")}
    found = {row["key"]: (split, row["group_id"]) for split, row in rows(out, "naip")}
    assert found == {chip: ("val" if city == "chico" else "train", city) for chip, city in cities.items()}
    chips = {chip["chip"]: chip["split"] for chip in table(sample_data / "rgb_dsm_autzen" / "chips.csv")}
    assert {row["key"]: split for split, row in rows(out, "autzen")} == chips
    assert [row["key"] for split, row in rows(out, "terramesh") if split == "val"] == ["637U_59R_1_3"]


def test_no_place_is_in_two_splits(made):
    out, _ = made
    places, boxes = {}, []
    for name in ROWS:
        for split in shard_splits(out / name):
            for row in ShardSource(out / name, split).read_metadata():
                places.setdefault((name, row["group_id"]), set()).add(split)
                boxes.append((split, row["bounds"]))
    assert len(places) == 5 + 1 + 7 + 4 + 1 + 1 + 1
    assert all(len(splits) == 1 for splits in places.values())
    # Nor on the ground: no centre of an image lies in an image of another split.
    splits = np.array([split for split, _ in boxes])
    west, south, east, north = np.array([bounds for _, bounds in boxes]).T
    x, y = (west + east) / 2, (south + north) / 2
    inside = (west[:, None] < x) & (x < east[:, None]) & (south[:, None] < y) & (y < north[:, None])
    assert inside.diagonal().all()
    assert not (inside & (splits[:, None] != splits)).any()


def test_what_every_source_holds(made):
    out, _ = made
    described = {}
    for name, splits in ROWS.items():
        source = ShardSource(out / name, next(iter(splits)))
        images = source.read_metadata()[0]["images"]
        described[name] = {
            sensor: (source.bands[sensor], meta["dtype"], meta["units"], source.levels[sensor], meta["shape"][1:])
            for sensor, meta in images.items()
        }
    rgb = {"rgb": (["red", "green", "blue"], "uint8", "dn", None, [256, 256])}
    s1 = ["VV", "VH"]
    assert described == {
        "naip": rgb,
        "naip_nd": rgb,
        "autzen": rgb | {"dsm": (["height"], "float32", "metres", None, [256, 256])},
        "terramesh": {
            "s1": (s1, "float32", "db", None, [224, 224]),
            "s2": (S2_BANDS, "uint16", "dn", "l1c", [224, 224]),
        },
        "worldcereal": {
            "s1": (s1, "uint16", "amplitude", None, [100, 100]),
            "s2": (["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B11", "B12"], "uint16", "dn", "l2a", [100, 100]),
        },
        "slovenia": {"s2": (S2_BANDS, "float32", "reflectance", "l1c", [101, 100])},
        "openeo": {
            "s1": (s1, "uint16", "amplitude", None, [66, 64]),
            "s2": (["B01", "B04", "B08", "B11"], "uint16", "dn", "l2a", [66, 64]),
        },
    }
    for name in ROWS:
        for _, row in rows(out, name):
            assert (row["pair_id"] is None) == (len(row["images"]) == 1)


def test_pixels_are_those_of_the_files(made, sample_data):
    out, _ = made

    def find(name, key):
        return next(row["images"] for _, row in rows(out, name) if row["key"] == key)

    stored, names = raster(sample_data / "naip_urban_trees" / "images" / "chico_2018_12.tif")
    assert names == ["R", "G", "B", "NIR"]
    image = find("naip", "chico_2018_12")["rgb"]
    np.testing.assert_array_equal(image.pixels, stored[:3])
    assert (image.datetime, image.crs, image.nodata) == ("2018", "EPSG:26910", None)
    assert physical(image).max() <= 1

    scene, _ = raster(sample_data / "naip_timeseries_nd" / "m_4709963_se_14_1_20120731.tif")
    tile = find("naip_nd", "m_4709963_se_14_1_20120731_r0256_c0512")["rgb"]
    np.testing.assert_array_equal(tile.pixels, scene[:3, 256:512, 512:768])
    assert (tile.gsd, tile.datetime) == (5.0, "2012-07-31")

    folder = sample_data / "s2_eolearn_slovenia"
    image = find("slovenia", "s2_eolearn_slovenia_2015-07-11")["s2"]
    np.testing.assert_array_equal(image.pixels, raster(folder / "S2L1C_ref4.tif")[0])

    folder = sample_data / "s1s2_openeo_belgium_cloudy"
    images = find("openeo", "s1s2_openeo_belgium_cloudy_2023-04-07")
    np.testing.assert_array_equal(images["s2"].pixels, raster(folder / "S2L2A_20230407.tif")[0][:4])
    np.testing.assert_array_equal(images["s1"].pixels, raster(folder / "S1_20230408.tif")[0])


def test_elevation_is_unknown_where_nothing_was_measured(made, sample_data):
    out, _ = made
    for split, row in rows(out, "autzen"):
        folder = sample_data / "rgb_dsm_autzen" / split
        measured = raster(folder / f"{row['key']}_valid.tif")[0][0] == 1
        dsm, rgb = row["images"]["dsm"], row["images"]["rgb"]
        np.testing.assert_array_equal(np.isnan(dsm.pixels[0]), ~measured)
        np.testing.assert_array_equal(dsm.pixels[:, measured], raster(folder / f"{row['key']}_dsm.tif")[0][:, measured])
        np.testing.assert_array_equal(rgb.pixels, raster(folder / f"{row['key']}_rgb.tif")[0])
        np.testing.assert_array_equal(dsm.valid_mask(), measured)
        assert rgb.valid_mask().all()
        assert dsm.gsd == pytest.approx(0.6096)  # 2 international feet


def test_sentinel_2_offsets_leave_plausible_reflectance(made, sample_data):
    out, _ = made
    offsets = {}
    for _, row in rows(out, "terramesh"):
        image = row["images"]["s2"]
        offsets[row["key"]] = round(image.offset_dn)
        bands = dict(zip(S2_BANDS, physical(image), strict=True))
        # Cirrus is nearly dark over clear land, and in the short-wave infrared the atmosphere hardly adds anything:
        # against the surface reflectance, which carries no offset, the intercept is small.
        assert bands["B10"].min() >= 0 and bands["B10"].max() < 0.01
        surface, names = raster(sample_data / "s1s2_terramesh" / row["key"] / "S2L2A.tif")
        surface = surface[names.index("B12")] * 1e-4
        slope, intercept = np.polyfit(surface.ravel(), bands["B12"].ravel(), 1)
        assert 0.8 < slope < 1 and abs(intercept) < 0.01
    assert offsets == {"282D_485L_3_3": -1000, "38D_378R_2_3": 0, "609U_541L_3_0": -1000, "637U_59R_1_3": 0}


def test_radar_is_in_the_decibels_of_the_manifest(made):
    out, _ = made
    medians = [np.median(20 * np.log10(physical(row["images"]["s1"])[0])) for _, row in rows(out, "worldcereal")]
    assert min(medians) > -11.65 and max(medians) < -8.35
    for name in ("worldcereal", "openeo"):
        for _, row in rows(out, name):
            stored = float(row["images"]["s1"].pixels[0, 0, 0])
            assert 20 * np.log10(physical(row["images"]["s1"])[0, 0, 0]) == pytest.approx(20 * np.log10(stored) - 83)


def test_pairs_are_of_the_same_place_and_time(made):
    out, _ = made
    for name in ("terramesh", "worldcereal", "openeo"):
        for _, row in rows(out, name):
            s1, s2 = row["images"]["s1"], row["images"]["s2"]
            assert s1.transform == s2.transform and s1.crs == s2.crs
            if name == "worldcereal":
                assert s1.datetime == s2.datetime
            else:
                days = [datetime.date.fromisoformat(image.datetime) for image in (s1, s2)]
                assert abs(days[0] - days[1]).days <= 2


def test_bounds_are_where_the_manifest_says(made):
    out, _ = made
    places = {row["key"]: row["bounds"] for _, row in rows(out, "terramesh")}
    for place, (longitude, latitude) in {"282D_485L_3_3": (-48.11, -25.32), "637U_59R_1_3": (9.85, 57.23)}.items():
        west, south, east, north = places[place]
        assert west < east and south < north
        assert abs((west + east) / 2 - longitude) < 0.02 and abs((south + north) / 2 - latitude) < 0.02
        assert north - south == pytest.approx(224 * 10 / 111_000, rel=0.1)


def test_the_report_on_the_samples(made):
    out, _ = made
    report = inspect_shards(out, rows=4)
    assert report.count("places in more than one split: none") == 7
    assert "worldcereal: 10 rows, paired s1 + s2" in report
    assert "physical = stored * 0.0001 - 0.1 or stored * 0.0001 + 0" in report


def test_finished_sources_are_left_alone_unless_told_otherwise(few, tmp_path, caplog):
    out = tmp_path / "out"
    first = make_sample_shards(few, out)
    assert first["naip"]["rows"] == {"train": 1, "val": 1}
    marker = out / "terramesh" / "marker"
    marker.touch()
    again = make_sample_shards(few, out)
    assert all(entry["kept"] for entry in again.values())
    assert {name: entry["rows"] for name, entry in again.items()} == {n: entry["rows"] for n, entry in first.items()}
    assert marker.exists() and "is left alone" in caplog.text
    anew = make_sample_shards(few, out, overwrite=True)
    assert anew == first and not marker.exists()
    assert sorted(path.name for path in out.iterdir()) == sorted(ROWS)


def test_tiles_without_data_are_dropped_and_counted(few, tmp_path):
    scene = next((few / "naip_timeseries_nd").glob("*.tif"))
    with rasterio.open(scene, "r+") as file:
        pixels = file.read()
        pixels[:, 300, 300] = 0
        pixels[0, 10, 10] = 0  # one band alone is a dark pixel
        file.write(pixels)
    summary = make_sample_shards(few, tmp_path / "out")["naip_nd"]
    assert summary["rows"] == {"train": 5}
    assert summary["dropped"] == [f"{scene.stem}_r0256_c0256: has pixels without data"]


def test_incomplete_imagery_is_refused(few, tmp_path):
    with pytest.raises(ValueError, match="`root` must hold the whole sample imagery, got no splits.csv"):
        make_sample_shards(tmp_path / "nowhere", tmp_path / "out")
    splits = few / "splits.csv"
    text = splits.read_text()
    splits.unlink()
    splits.write_text(text.replace("naip_timeseries_nd,", "elsewhere,"))
    with pytest.raises(ValueError, match="`root` must name naip_timeseries_nd in its splits.csv"):
        make_sample_shards(few, tmp_path / "out")
    splits.write_text(text)
    (few / "s1s2_worldcereal_belgium").unlink()
    with pytest.raises(ValueError, match=r"`root` must hold the whole sample imagery, got no S1_\*.tif"):
        make_sample_shards(few, tmp_path / "out")
    # What was finished before stays, and nothing half done.
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["autzen", "naip", "naip_nd", "terramesh"]


# Reading georeferenced files


def write_tif(path, pixels, names=None, mask=None, **profile):
    count, height, width = pixels.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": pixels.dtype} | profile
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **profile) as file:
        file.write(pixels)
        for number, name in enumerate(names or [], 1):
            file.set_band_description(number, name)
        if mask is not None:
            file.write_mask(mask)
    return path


PLACE = {"crs": "EPSG:4326", "transform": rasterio.Affine(0.0001, 0, 5.0, 0, -0.0001, 50.0)}


def test_bands_are_picked_by_name_and_extra_ones_only_when_asked(tmp_path):
    pixels = np.arange(4 * 6, dtype=np.uint16).reshape(4, 2, 3)
    path = write_tif(tmp_path / "a.tif", pixels, ["B8", "SCL", "blue", "B4"], nodata=7, **PLACE)
    image = read_image(path, "s2", bands=["red", "B02"], offset_dn=-1000)
    assert image.bands == ["B04", "B02"] and (image.scale, image.offset, image.offset_dn) == (1e-4, -0.1, -1000)
    np.testing.assert_array_equal(image.pixels, pixels[[3, 2]])
    assert (image.units, image.nodata, image.crs) == ("dn", 7, "EPSG:4326")
    assert image.transform == [5.0, 0.0001, 0.0, 50.0, 0.0, -0.0001]
    # A ten-thousandth of a degree at 50 degrees north: 11.12 m of latitude by 7.17 m of longitude (WGS 84).
    assert image.gsd == pytest.approx(math.sqrt(11.12 * 7.17), abs=0.05)
    assert wgs84_bounds(image) == pytest.approx([5.0, 49.9998, 5.0003, 50.0])
    named = read_image(path, "s2", names=["B05", "B06", "B07", "B8A"], unit="reflectance")
    assert named.bands == ["B05", "B06", "B07", "B8A"] and (named.scale, named.offset) == (1.0, 0.0)
    with pytest.raises(ValueError, match="`bands` of sensor 's2' must be among B01, .* got 'SCL'"):
        read_image(path, "s2", offset_dn=0)
    with pytest.raises(ValueError, match=r"`bands` must be in .*a.tif, which has B8, SCL, blue, B4, got B03"):
        read_image(path, "s2", bands=["red", "green"], offset_dn=0)
    with pytest.raises(
        ValueError, match=r"`scale` and `offset_dn` of sensor 's2' must be known .* got 0.0001 and None"
    ):
        read_image(path, "s2", bands=["red"])


def test_a_file_without_names_or_place(tmp_path):
    path = tmp_path / "a.tif"
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        write_tif(path, np.ones((1, 2, 3), np.float32))
    with pytest.raises(ValueError, match=r"`names` must name the 1 bands of .*a.tif, got None"):
        read_image(path, "dsm")
    image = read_image(path, "dsm", names=["z"])
    assert (image.bands, image.crs, image.transform, image.gsd) == (["height"], None, None, None)
    assert wgs84_bounds(image) is None


def test_scale_and_offset_of_the_file_are_used(tmp_path):
    path = write_tif(tmp_path / "a.tif", np.full((1, 2, 3), 40, np.uint8), ["height"], **PLACE)
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (0.5,), (100.0,)
    image = read_image(path, "dsm")
    assert (image.scale, image.offset) == (0.5, 100.0)  # 40 * 0.5 + 100 = 120 m


def test_the_mask_of_a_file_is_kept(tmp_path):
    mask = np.array([[255, 0, 255], [255, 255, 255]], np.uint8)
    path = write_tif(tmp_path / "a.tif", np.full((1, 2, 3), 4, np.float32), ["height"], mask, **PLACE)
    assert np.argwhere(~read_image(path, "dsm").valid_mask()).tolist() == [[0, 1]]
    path = write_tif(tmp_path / "b.tif", np.full((3, 2, 3), 4, np.uint8), ["R", "G", "B"], mask, **PLACE)
    assert np.argwhere(~read_image(path, "rgb").valid_mask()).tolist() == [[0, 1]]
    assert np.argwhere(~read_image(path, "rgb", nodata=0).valid_mask()).tolist() == [[0, 1]]


def test_without_rasterio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio.warp", None)
    image = ShardImage(np.ones((1, 2, 2)), ["height"], "metres", crs="EPSG:4326", transform=[0.0, 1, 0, 0, 0, -1])
    with pytest.raises(ImportError, match=r'`rasterio` is needed .* pip install "msgfm_hf\[geo\]"'):
        wgs84_bounds(image)
