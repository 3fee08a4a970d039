"""Large images: one grid, tiles with enough pixels, blocks whole, memory bounded by a tile."""

import subprocess
import sys

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from rasterio.env import get_gdal_config
from rasterio.warp import transform

from geotiff_files import ORIGIN, UTM, write_geotiff
from msgfm_hf.cli import main
from msgfm_hf.data.inputs import parse_inputs
from msgfm_hf.data.labels import VectorLabels
from msgfm_hf.data.scenes import plan_scenes, write_scenes
from msgfm_hf.data.shards import ShardSource, shard_splits

X, Y = ORIGIN
SIDE = 128


def smooth(bands, side=SIDE, low=20, high=230, dtype=np.uint8):
    """Waves that bilinear resampling hardly changes."""
    rows, columns = np.mgrid[:side, :side]
    waves = [np.sin(columns / (9 + band)) * np.cos(rows / (11 + band)) for band in range(bands)]
    return ((np.stack(waves) + 1) / 2 * (high - low) + low).astype(dtype)


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """RGB with an alpha band of 1 m, whose first 40 columns are empty, and heights of 1 m."""
    monkeypatch.chdir(tmp_path)
    alpha = np.full((1, SIDE, SIDE), 255, np.uint8)
    alpha[:, :, :40] = 0
    pixels = np.concatenate([smooth(3), alpha])
    write_geotiff(tmp_path / "rgb.tif", pixels, gsd=1.0, photometric="RGB", alpha="yes")
    write_geotiff(tmp_path / "dsm.tif", smooth(1, dtype=np.float32), gsd=1.0)
    return tmp_path


def make(out, *texts, gsd=1.0, split_by="block:32m", size=16, labels=None, min_valid=0.8, name="scene", **options):
    plan = plan_scenes(parse_inputs(list(texts)), gsd, split_by, size=size, **options)
    return plan, *write_scenes(plan, out, name, min_valid=min_valid, labels=labels)


def read(path):
    """{(top, left): (split, row)} of a source, in pixels of its grid."""
    found = {}
    for split in shard_splits(path):
        source = ShardSource(path, split)
        for number in range(len(source)):
            row = source.read(number)
            top, left = row["key"].rsplit("_", 2)[1:]
            found[int(top[1:]), int(left[1:])] = (split, row)
    return found


# Pixels


def test_on_its_own_grid_a_scene_is_cut_and_not_changed(scene):
    _, counts, said = make("out", "rgb=rgb.tif", "dsm=dsm.tif")
    rows = read("out/scene")
    rgb, dsm = smooth(3), smooth(1, dtype=np.float32)
    # 16 columns from 32 on have 8 of 16 columns: half, less than 0.8.
    assert sorted(rows) == [(top, left) for top in range(0, 128, 16) for left in range(48, 128, 16)]
    assert said[:2] == ["tiles: 40 of 64 kept", "tiles: 24 dropped, less than 80 % of the pixels valid in rgb"]
    assert sum(held.rows for held in counts.values()) == 40
    for (top, left), (_, row) in rows.items():
        place = [X + left, 1, 0, Y - top, 0, -1]
        for sensor, pixels in (("rgb", rgb), ("dsm", dsm)):
            image = row["images"][sensor]
            assert np.array_equal(image.pixels, pixels[:, top : top + 16, left : left + 16])
            assert image.transform == place and image.crs == UTM and image.gsd == 1.0
        assert row["images"]["rgb"].nodata is None and row["pair_id"] == row["key"]
    assert rows[0, 48][1]["images"]["rgb"].bands == ["red", "green", "blue"]


def test_alpha_is_written_as_a_value_no_valid_pixel_has(scene):
    make("out", "rgb=rgb.tif", min_valid=0.5)
    rows = read("out/scene")
    image = rows[0, 32][1]["images"]["rgb"]
    expected = smooth(3)[:, :16, 32:48]
    assert np.array_equal(image.valid_mask(), np.tile(np.arange(16) >= 8, (16, 1)))
    assert np.array_equal(image.pixels[:, :, 8:], expected[:, :, 8:]) and image.nodata == 0
    assert rows[0, 48][1]["pair_id"] is None


def test_where_all_values_are_in_use_the_largest_makes_room(scene):
    pixels = np.arange(SIDE * SIDE, dtype=np.uint32).reshape(1, SIDE, SIDE).astype(np.uint8)
    mask = np.full((SIDE, SIDE), 255, np.uint8)
    mask[0, 0] = 0
    write_geotiff(scene / "a.tif", np.repeat(pixels, 3, axis=0), gsd=1.0, mask=mask, photometric="RGB")
    make("out", "rgb=a.tif", size=64, split_by="block:64m", shares="0.5,0.25,0.25")
    image = read("out/scene")[0, 0][1]["images"]["rgb"]
    valid = np.ones((64, 64), bool)
    valid[0, 0] = False
    assert image.nodata == 255 and np.array_equal(image.valid_mask(), valid)
    assert np.array_equal(image.pixels[0][valid], np.minimum(pixels[0, :64, :64], 254)[valid])


def test_nodata_does_not_bleed_into_its_neighbours(scene):
    heights = np.full((1, SIDE, SIDE), 100, np.float32)
    heights[0, 10:20, 10:20] = -9999
    write_geotiff(scene / "a.tif", heights, gsd=1.0, nodata=-9999)
    heights[heights < 0] = np.nan
    write_geotiff(scene / "b.tif", heights, gsd=1.0)
    # Half a pixel off, so that bilinear weights fall on nodata; and three pixels in one, averaged.
    write_geotiff(scene / "grid.tif", smooth(3), gsd=1.0, origin=(X + 0.5, Y - 0.5), photometric="RGB")
    for file, gsd in (("a.tif", 1.0), ("b.tif", 1.0), ("a.tif", 3.0), ("b.tif", 3.0)):
        grid = {"gsd": gsd, "size": 8, "split_by": "block:24m"}
        make(f"out{gsd}", "rgb=grid.tif", f"dsm={file}", min_valid=0, name=file[0], **grid)
        images = [row["images"]["dsm"] for _, row in read(f"out{gsd}/{file[0]}").values()]
        invalid = sum((~image.valid_mask()).sum() for image in images)
        assert 0 < invalid <= 100 / gsd**2 * 1.3
        for image in images:
            assert np.allclose(image.pixels[0][image.valid_mask()], 100)


def test_a_finer_scene_is_averaged(scene):
    fine = np.random.default_rng(0).normal(50, 20, (1, SIDE, SIDE)).astype(np.float32)
    write_geotiff(scene / "a.tif", fine, gsd=1.0)
    plan, _, _ = make("out", "dsm=a.tif", gsd=4.0, split_by="block:64m", size=8, shares="0.5,0.25,0.25")
    assert "dsm: average from 1 m" in plan.said
    means = fine[0].reshape(32, 4, 32, 4).mean(axis=(1, 3))
    for (top, left), (_, row) in read("out/scene").items():
        assert np.allclose(row["images"]["dsm"].pixels[0], means[top : top + 8, left : left + 8], atol=1e-4)


def power_means(decibels, factor):
    """Decibels of the mean power of squares of pixels."""
    bands, height, width = decibels.shape
    cut = decibels.reshape(bands, height // factor, factor, width // factor, factor)
    return 10 * np.log10((10 ** (cut.astype(np.float64) / 10)).mean(axis=(2, 4)))


@pytest.mark.parametrize("stored", ["decibels", "hundredths", "alpha"])
def test_decibels_are_averaged_as_power(scene, stored):
    noise = 10 * np.log10(np.random.default_rng(0).exponential(0.05, (2, SIDE, SIDE)) + 1e-4)
    decibels, options, holes = noise.astype(np.float32), "", {"nodata": -9999}
    if stored == "hundredths":
        decibels, options = (100 * noise).round().astype(np.int16), ",unit=dn,scale=0.01,offset=0"
    means = power_means(decibels / (100 if options else 1), 4)
    decibels[:, :4, 4:8] = 0 if stored == "alpha" else -9999
    if stored == "alpha":
        alpha = np.ones((1, SIDE, SIDE), np.float32)
        alpha[:, :4, 4:8] = 0
        # GDAL takes the first band beyond grey for alpha.
        decibels, holes = np.concatenate([decibels[:1], alpha, decibels[1:]]), {"alpha": "yes"}
    names = ["VV", "", "VH"] if stored == "alpha" else ["VV", "VH"]
    write_geotiff(scene / "a.tif", decibels, names, gsd=1.0, **holes)
    plan, _, _ = make(
        "out", f"s1=a.tif{options}", gsd=4.0, split_by="block:64m", size=8, min_valid=0.5, shares="0.5,0.25,0.25"
    )
    assert "s1: average of linear power from 1 m" in plan.said
    rows = read("out/scene")
    assert len(rows) == 16 and [path.name for path in (scene / "out").iterdir()] == ["scene"]
    for (top, left), (_, row) in rows.items():
        image = row["images"]["s1"]
        valid = np.ones((8, 8), bool)
        valid[0, 1] = (top, left) != (0, 0)
        assert np.array_equal(image.valid_mask(), valid) and image.pixels.dtype == decibels.dtype
        found = image.pixels * image.scale + image.offset
        expected = means[:, top : top + 8, left : left + 8]
        # A mean of decibels is lower by 2.5 dB.
        assert np.abs(found - expected)[:, valid].max() < (0.006 if options else 1e-4)


def test_decibels_that_stay_in_place_are_not_changed(scene):
    decibels = np.random.default_rng(0).normal(-12, 3, (2, SIDE, SIDE)).astype(np.float32)
    write_geotiff(scene / "a.tif", decibels, ["VV", "VH"], gsd=1.0)
    make("out", "s1=a.tif")
    for (top, left), (_, row) in read("out/scene").items():
        assert np.array_equal(row["images"]["s1"].pixels, decibels[:, top : top + 16, left : left + 16])


def test_damaged_decibels_leave_nothing(scene):
    decibels = np.random.default_rng(0).normal(-12, 3, (2, SIDE, SIDE)).astype(np.float32)
    path = write_geotiff(scene / "a.tif", decibels, ["VV", "VH"], gsd=1.0, compress="deflate")
    whole = path.read_bytes()
    path.write_bytes(whole[:2000] + bytes(20_000) + whole[22_000:])
    with pytest.raises(ValueError, match="`input` must be readable, got a.tif"):
        make("out", "s1=a.tif", gsd=2.0, size=8)
    assert list((scene / "out").iterdir()) == []


def test_inputs_meet_on_the_grid_of_the_first(scene):
    """Heights that are a plane over the first input's coordinates, stored coarser and in the next zone."""
    ([left], [top]) = transform(UTM, "EPSG:32632", [X], [Y])
    origin, coarse = (left - 200, top + 200), 5.0
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    xs, ys = origin[0] + columns * coarse, origin[1] - rows * coarse
    xs, ys = np.array(transform("EPSG:32632", UTM, xs.ravel(), ys.ravel())).reshape(2, SIDE, SIDE)
    heights = 100 + (xs - X) / 10 + (Y - ys) / 20
    write_geotiff(scene / "a.tif", heights[None].astype(np.float32), crs="EPSG:32632", gsd=coarse, origin=origin)
    make("out", "rgb=rgb.tif", "dsm=a.tif")
    rows = read("out/scene")
    assert len(rows) == 40
    for (top, left), (_, row) in rows.items():
        image = row["images"]["dsm"]
        assert image.transform == row["images"]["rgb"].transform and image.crs == UTM
        ys, xs = np.mgrid[top : top + 16, left : left + 16] + 0.5
        # The warp may be off by an eighth of a stored pixel, 6 cm of height.
        assert np.abs(image.pixels[0] - (100 + xs / 10 + ys / 20)).max() < 0.07


def test_near_infrared_that_is_marked_as_alpha_is_a_band(scene):
    pixels = smooth(4)
    pixels[3, :, :64] = 0
    write_geotiff(scene / "a.tif", pixels, ["R", "G", "B", "NIR"], gsd=1.0, photometric="RGB", alpha="yes")
    with rasterio.open(scene / "a.tif") as file:
        assert file.colorinterp[3].name == "alpha"
    make("out", "naip=a.tif", "dsm=dsm.tif")
    rows = read("out/scene")
    assert len(rows) == 64
    for (top, left), (_, row) in rows.items():
        assert np.array_equal(row["images"]["naip"].pixels, pixels[:, top : top + 16, left : left + 16])


def test_bands_and_factors_are_those_asked_for(scene):
    write_geotiff(scene / "a.tif", smooth(3, low=1200, high=3000, dtype=np.uint16), ["B02", "SCL", "B08"], gsd=1.0)
    make("out", "s2=a.tif,bands=B08+B02,level=l2a,offset=-1000")
    source = ShardSource("out/scene")
    image = source.read(0)["images"]["s2"]
    assert (
        image.bands == ["B08", "B02"] and (image.scale, image.offset) == (1e-4, -0.1) and source.levels["s2"] == "l2a"
    )
    assert image.pixels.dtype == np.uint16


def test_a_nodata_value_the_dtype_cannot_hold_marks_nothing(scene):
    path = write_geotiff(scene / "a.tif", smooth(3), gsd=1.0, photometric="RGB")
    make("out", f"rgb={path.name},nodata=-9999")
    assert all(row["images"]["rgb"].nodata is None for _, row in read("out/scene").values())


# The grid


def test_the_grid_is_what_all_inputs_cover(scene):
    write_geotiff(scene / "a.tif", smooth(1, dtype=np.float32), gsd=1.0, origin=(X + 30.25, Y + 10))
    plan = plan_scenes(parse_inputs(["rgb=rgb.tif", "dsm=a.tif"]), 1.0, "block:16m", size=16)
    assert plan.shape == (118, 97) and plan.transform.c == X + 31 and plan.transform.f == Y
    with pytest.raises(
        ValueError, match="`input` must share an area of at least one tile of 128 x 128 .* got 118 x 97"
    ):
        plan_scenes(parse_inputs(["rgb=rgb.tif", "dsm=a.tif"]), 1.0, "block:16m", size=128)
    write_geotiff(scene / "b.tif", smooth(1, dtype=np.float32), gsd=1.0, origin=(X + 5000, Y))
    with pytest.raises(ValueError, match="must share an area .* got 128 x 0 .left, bottom, right, top of rgb 600000, "):
        plan_scenes(parse_inputs(["rgb=rgb.tif", "dsm=b.tif"]), 1.0, "block:16m", size=16)


def test_metres_are_metres_where_the_map_is_in_feet(scene):
    write_geotiff(scene / "a.tif", smooth(1, dtype=np.float32), crs="EPSG:2994", gsd=2.0, origin=(636130, 852002))
    plan = plan_scenes(parse_inputs(["dsm=a.tif,unit=metres"]), 0.6096, "block:10m", size=16)
    assert plan.transform.a == pytest.approx(2.0) and plan.shape == (128, 128)


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857", "EPSG:3395"])
def test_units_that_are_no_metres_become_those_of_the_utm_zone(scene, crs):
    origin, gsd = ((4.44, 51.44), 1e-5) if crs == "EPSG:4326" else ((494_000, 6_700_000), 1.0)
    write_geotiff(scene / "a.tif", smooth(1, dtype=np.float32), crs=crs, gsd=gsd, origin=origin)
    plan = plan_scenes(parse_inputs(["dsm=a.tif"]), 0.5, "block:10m", size=16)
    assert plan.crs.to_epsg() == 32631 and any("warped to EPSG:32631" in line for line in plan.said)
    south = write_geotiff(scene / "b.tif", smooth(1, dtype=np.float32), crs="EPSG:4326", gsd=1e-5, origin=(-60.1, -3.0))
    assert plan_scenes(parse_inputs([f"dsm={south}"]), 0.5, "block:10m", size=16).crs.to_epsg() == 32720


# Blocks and tiles


def test_blocks_are_whole_tiles_and_one_split_each(scene):
    plan, _, said = make("out", "dsm=dsm.tif", split_by="block:20m")
    assert "blocks: 2 x 2 tiles, 32 m, rounded up from 20 m; no tile crosses one" in plan.said
    splits = {}
    for (top, left), (split, row) in read("out/scene").items():
        assert row["group_id"] == f"block_r{top // 32:03d}_c{left // 32:03d}"
        splits.setdefault(row["group_id"], set()).add(split)
    assert len(splits) == 16 and all(len(found) == 1 for found in splits.values())
    assert "split: 16 blocks with tiles, dealt by rows (seed 0)" in said


def test_overlapping_tiles_stay_in_their_block(scene):
    plan, _, _ = make("out", "dsm=dsm.tif", split_by="block:48m", stride=8)
    assert plan.block == 48
    corners = sorted({top for top, _ in read("out/scene")})
    assert corners == [0, 8, 16, 24, 32, 48, 56, 64, 72, 80, 96, 104, 112]


def test_rows_are_not_in_the_order_of_the_map(scene):
    make("out", "dsm=dsm.tif")
    source = ShardSource("out/scene")
    keys = [source.read(number)["key"] for number in range(len(source))]
    assert keys != sorted(keys)
    make("again", "dsm=dsm.tif")
    assert keys == [ShardSource("again/scene").read(number)["key"] for number in range(len(source))]


def test_shapes_are_drawn_on_every_tile(scene):
    fields = [shapely.box(X + 16, Y - 40, X + 40, Y), shapely.box(X + 100, Y - 128, X + 128, Y)]
    geopandas.GeoDataFrame({"crop": ["rye", "oats"]}, geometry=fields, crs=UTM).to_file(scene / "fields.gpkg")
    _, counts, _ = make("out", "dsm=dsm.tif", labels=VectorLabels("fields.gpkg", "crop"))
    rows = read("out/scene")
    drawn = np.full((SIDE, SIDE), 255)
    drawn[:40, 16:40], drawn[:, 100:] = 1, 0
    for (top, left), (_, row) in rows.items():
        assert np.array_equal(row["target"].pixels[0], drawn[top : top + 16, left : left + 16])
    assert ShardSource("out/scene").classes == ["oats", "rye"]
    assert sum(held.labels[1] for held in counts.values()) == 40 * 24
    geopandas.GeoDataFrame({"crop": ["rye"]}, geometry=[shapely.Point(0, 0)], crs=UTM).to_file(scene / "far.gpkg")
    with pytest.raises(ValueError, match="`labels` must lie on the tiles, got none of rye on any"):
        make("out", "dsm=dsm.tif", labels=VectorLabels("far.gpkg", "crop"), name="far")
    assert [path.name for path in (scene / "out").iterdir()] == ["scene"]


# Mistakes


@pytest.mark.parametrize(
    "options, said",
    [
        ({"gsd": 0}, "`gsd` must be above 0, got 0"),
        ({"size": -1}, "`size` must be above 0, got -1"),
        ({"stride": 0}, "`stride` must be above 0, got 0"),
        ({"split_by": "region"}, "`split_by` of scenes must be blocks, got 'region'. Example: block:500m"),
        ({"split_by": "block:1km"}, "`split_by` must make at least 3 groups for train, val, test, got 1"),
        ({"min_valid": 1.5}, "`min_valid` must be from 0 to 1, got 1.5"),
    ],
)
def test_numbers_out_of_range(scene, options, said):
    with pytest.raises(ValueError, match=said):
        make("out", "dsm=dsm.tif", **options)
    assert not (scene / "out").exists()


def test_a_scene_without_a_place(scene):
    write_geotiff(scene / "a.tif", smooth(1, dtype=np.float32), crs=None)
    with pytest.raises(ValueError, match="`input` of a scene must have a place on the map, got none in a.tif"):
        make("out", "dsm=a.tif")


def test_no_tile_is_left(scene):
    write_geotiff(scene / "a.tif", np.full((1, SIDE, SIDE), np.nan, np.float32), gsd=1.0)
    with pytest.raises(
        ValueError, match=r"`min_valid` must leave some tile, got none of 64 with 0.8 \(tiles: 64 dropped"
    ):
        make("out", "dsm=a.tif")
    assert list((scene / "out").iterdir()) == []


def test_a_damaged_scene_leaves_nothing(scene):
    path = write_geotiff(scene / "a.tif", smooth(1, dtype=np.float32), gsd=1.0, compress="deflate")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    with pytest.raises(ValueError, match="`input` must be readable, got a.tif"):
        make("out", "dsm=a.tif")
    assert list((scene / "out").iterdir()) == []


# Memory and the command


@pytest.mark.parametrize("gsd", [1.0, 4.0])
def test_the_strips_of_a_row_of_tiles_stay_in_the_cache(scene, monkeypatch, gsd):
    """Else each strip, as wide as the image, is decoded again for every tile of the row."""
    seen = []

    def watch(tiles, *_, **__):
        for tile in tiles:
            seen.append(get_gdal_config("GDAL_CACHEMAX"))
            yield tile

    monkeypatch.setattr("msgfm_hf.data.scenes.tqdm", watch)
    make("usual", "dsm=dsm.tif", gsd=gsd, size=8)
    assert seen[0] == 64 * 2**20  # bytes
    seen.clear()
    monkeypatch.setattr("msgfm_hf.data.scenes._CACHE", 0)
    make("least", "dsm=dsm.tif", gsd=gsd, size=8)
    rows, values = 8 * gsd, 4
    assert 64 * 2**20 > seen[0] >= rows * SIDE * values


MEASURE = """
import resource, sys
from msgfm_hf.data import scenes
from msgfm_hf.data.inputs import parse_inputs
scenes._CACHE = 8 * 2**20
plan = scenes.plan_scenes(parse_inputs(["rgb=" + sys.argv[1]]), 1.0, "block:1024m", size=256, shares="1,0,0")
counts, _ = scenes.write_scenes(plan, sys.argv[2], "scene", min_valid=0.9)
print(counts["train"].rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_scene(tmp_path):
    """Ten times the pixels, 50 MB more, in not much more memory; GDAL's cache is made smaller than either."""
    peaks = []
    for tall in (1024, 10_240):
        path = tmp_path / f"{tall}.tif"
        profile = {"count": 3, "dtype": "uint8", "crs": UTM, "driver": "GTiff", "photometric": "RGB", "tiled": True}
        place = rasterio.transform.from_origin(X, Y, 1, 1)
        rows = np.random.default_rng(0).integers(0, 256, (3, 256, 1792), dtype=np.uint8)
        with rasterio.open(path, "w", width=1792, height=tall, transform=place, **profile) as file:
            for top in range(0, tall, 256):
                file.write(rows, window=rasterio.windows.Window(0, top, 1792, 256))
        command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / f"out{tall}")]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        rows, peak = map(int, ran.stdout.split())
        assert rows == 7 * tall // 256
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 25, peaks  # megabytes


def test_the_command_says_what_it_kept_and_what_comes_next(scene, capsys):
    words = ["shards", "scenes", "--input", "rgb=rgb.tif", "--input", "dsm=dsm.tif", "--gsd", "1", "--size", "16"]
    main([*words, "--split-by", "block:32m", "--out", "shards", "--name", "village"])
    said = capsys.readouterr().out
    assert "grid: 128 x 128 pixels of 1 m, EPSG:32631, what all inputs cover\nrgb: bilinear from 1 m" in said
    assert "tiles: 40 of 64 kept" in said and "Next: msgfm inspect shards/village" in said
    with pytest.raises(SystemExit):
        main([*words, "--split-by", "block:32m", "--out", "shards", "--labels", "fields.gpkg"])
    assert "`label` must be given with `labels`" in capsys.readouterr().err
