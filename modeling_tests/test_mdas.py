"""MDAS: RGB and heights put on one grid, areas held out of the city, on a small tree with its names and grids."""

import math

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from msgfm_hf.cli import main
from msgfm_hf.data.archive import convert_archive
from msgfm_hf.data.mdas import TILE, Mdas
from shard_rows import rows

CRS = "EPSG:32632"
WEST, NORTH = 636000.0, 5361000.0


def write(path, pixels, gsd, origin=(WEST, NORTH), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    options = {"crs": CRS, "transform": from_origin(*origin, gsd, gsd)} | options
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=pixels.dtype, **options
    ) as file:
        file.write(pixels)


def slope(height, width, gsd, origin=(WEST, NORTH)):
    """Heights that grow by 1 cm per metre eastwards and fall by 2 cm per metre southwards, at the centres of pixels."""
    east = (np.arange(width) + 0.5) * gsd + origin[0] - WEST
    south = (np.arange(height) + 0.5) * gsd + NORTH - origin[1]
    return (480 + 0.01 * east[None] - 0.02 * south[:, None]).astype(np.float32)[None]


def colours(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(1, 255, (4, height, width), dtype=np.uint8)
    pixels[3] = 255
    return pixels


def area(root, name, tiles, origin=(WEST, NORTH), suffix="", dsm="3K_dsm", rgb=None, heights=None):
    """An area of so many tiles (down, right) and a rest that fills none; RGB of 0.2 m, heights of 0.3 m."""
    down, right = (number * TILE + 12 for number in tiles)
    write(root / name / f"3K_RGB{suffix}.tif", colours(down, right) if rgb is None else rgb, 0.2, origin)
    if heights is None:
        heights = slope(down * 2 // 3, right * 2 // 3, 0.3, origin)
    write(root / name / f"{dsm}{suffix}.tif", heights, 0.3, origin)


@pytest.fixture
def root(tmp_path):
    """A city of 3 x 4 tiles; sub-area 1 in its second row, sub-area 2 across two tiles of the third, 3 in the first."""
    folder = tmp_path / "Augsburg_data_4_publication"
    area(folder, "entire_city", (3, 4), dsm="3K-DSM")
    step = TILE * 0.2
    area(folder, "sub_area_1", (1, 1), (WEST + 10, NORTH - step - 10), "_sub_area1")
    area(folder, "sub_area_2", (1, 1), (WEST + 2.5 * step, NORTH - 2 * step - 10), "_sub_area2", dsm="3K_DSM")
    area(folder, "sub_area_3", (1, 1), (WEST + 3 * step, NORTH), "_sub_area3")
    write(folder / "sub_area_1" / "HySpex_sub_area1.tif", np.zeros((3, 4, 4), np.int16), 2.2)
    return folder


def test_the_city_trains_without_the_areas_that_are_held_out(root, tmp_path, capsys):
    main(["shards", "mdas", "--root", str(root.parent), "--out", str(tmp_path / "out"), "--workers", "1"])
    said = capsys.readouterr().out
    found = rows(tmp_path / "out" / "mdas")
    splits = {key: split for key, (split, _) in found.items()}
    # Sub-area 1 lies across four tiles, sub-area 2 across two of the last row.
    touched = {(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3)}
    city = {f"entire_city_r{r * TILE:05d}_c{c * TILE:05d}" for r in range(3) for c in range(4) if (r, c) not in touched}
    assert {key for key, split in splits.items() if split == "train"} == city
    assert [key for key, split in splits.items() if split == "test"] == ["sub_area_1_r00000_c00000"]
    assert [key for key, split in splits.items() if split == "val"] == ["sub_area_2_r00000_c00000"]
    assert f"left out {len(touched)}: tiles of the city that touch sub_area_1 or sub_area_2" in said
    assert "left out 1: tiles of sub_area_3, which are in the city" in said
    # Of 3 x 4 tiles and a rest: a fourth row and a fifth column that no tile fills.
    assert "left out 8: places at the right and lower edge of entire_city, which fill no tile" in said
    assert "left out 3: places at the right and lower edge of sub_area_2, which fill no tile" in said
    assert "edge of sub_area_3" not in said
    held_out = [row["bounds"] for split, row in found.values() if split != "train"]
    for split, row in found.values():
        west, south, east, north = row["bounds"]
        for w, s, e, n in held_out if split == "train" else []:
            assert west >= e or east <= w or south >= n or north <= s


def test_both_sensors_lie_on_the_grid_of_the_rgb(root, tmp_path):
    made = convert_archive(Mdas(root), tmp_path / "out", workers=1)
    _, row = rows(made.folder)["entire_city_r00384_c00768"]
    rgb, dsm = row["images"]["rgb"], row["images"]["dsm"]
    top, left = NORTH - TILE * 0.2, WEST + 2 * TILE * 0.2
    for image in (rgb, dsm):
        assert image.transform == pytest.approx([left, 0.2, 0, top, 0, -0.2], abs=1e-9)
        assert image.crs == CRS and image.gsd == pytest.approx(0.2) and image.pixels.shape[1:] == (TILE, TILE)
        assert image.datetime == "2018-05-07"
    np.testing.assert_array_equal(
        rgb.pixels, colours(3 * TILE + 12, 4 * TILE + 12)[:3, TILE : 2 * TILE, 2 * TILE : 3 * TILE]
    )
    assert (rgb.units, rgb.scale, rgb.nodata) == ("dn", 1 / 255, None)
    assert (dsm.units, dsm.bands, dsm.pixels.dtype) == ("metres", ["height"], np.float32)
    # Bilinear interpolation keeps a plane; a nearest neighbour would be off by up to 0.2 px of 0.3 m.
    np.testing.assert_allclose(dsm.pixels, slope(TILE, TILE, 0.2, (left, top)), atol=2e-4)
    assert row["group_id"] == "entire_city" and row["pair_id"] == "entire_city_r00384_c00768"


def test_missing_heights_do_not_bleed(tmp_path):
    heights = slope(264, 264, 0.3)
    heights[0, 100:110, 50:60] = -32767.0
    heights[0, 200, 100] = np.nan
    folder = tmp_path / "city"
    area(folder, "sub_area_1", (1, 1), heights=heights)
    made = convert_archive(Mdas(folder), tmp_path / "out", workers=1)
    ((_, (_, row)),) = rows(made.folder).items()
    pixels = row["images"]["dsm"].pixels[0]
    missing = np.isnan(pixels)
    assert missing[150:165, 75:90][2:-2, 2:-2].all()  # 100 x 0.3 m = 150 x 0.2 m
    assert 15 * 15 - 60 < missing.sum() < 16 * 16 + 9
    expected = slope(TILE, TILE, 0.2)[0]
    # Beside a hole the nearest valid heights stand in, which on this slope is worth less than 1 cm.
    np.testing.assert_allclose(pixels[~missing], expected[~missing], atol=0.01)
    np.testing.assert_array_equal(row["images"]["dsm"].valid_mask(), ~missing)


def test_the_fourth_band_is_a_mask(tmp_path):
    rgb = colours(TILE + 12, TILE + 12, seed=4)
    rgb[:3, 300] = 0  # black, but seen
    rgb[3, :50] = 0
    area(tmp_path, "sub_area_2", (1, 1), rgb=rgb)
    made = convert_archive(Mdas(tmp_path), tmp_path / "out", workers=1)
    ((_, (split, row)),) = rows(made.folder).items()
    image = row["images"]["rgb"]
    assert split == "val" and image.nodata == 0
    mask = rgb[3, :TILE, :TILE] != 0
    np.testing.assert_array_equal(image.valid_mask(), mask)
    np.testing.assert_array_equal(image.pixels[:, 300], 1)
    np.testing.assert_array_equal(image.pixels[:, 50:300], rgb[:3, 50:300, :TILE])
    assert made.manifest["remarks"] == {"tiles with pixels that RGB does not cover, stored as 0": 1}


def test_tiles_at_the_edge_of_the_flight_are_left_out_not_bad(tmp_path):
    rgb = colours(TILE, 2 * TILE)
    rgb[3, :, : TILE // 2 + 1] = 0
    heights = slope(256, 512, 0.3)
    area(tmp_path, "sub_area_1", (1, 2), rgb=rgb, heights=heights)
    made = convert_archive(Mdas(tmp_path), tmp_path / "out", workers=1)
    assert list(rows(made.folder)) == ["sub_area_1_r00000_c00384"]
    assert made.manifest["remarks"] == {"left out tiles with less than half of rgb valid": 1}
    assert made.manifest["bad"] == []
    # Heights that end before the RGB does.
    area(tmp_path / "short", "sub_area_1", (1, 2), rgb=colours(TILE, 2 * TILE), heights=heights[:, :, :200])
    made = convert_archive(Mdas(tmp_path / "short"), tmp_path / "out2", workers=1)
    assert list(rows(made.folder)) == ["sub_area_1_r00000_c00000"]
    assert made.manifest["remarks"] == {"left out tiles with less than half of dsm valid": 1}


def test_real_rgb_and_heights_of_one_place(sample_data, tmp_path):
    """Two real chips side by side, as an area whose heights lie on the grid of the RGB."""
    chips = sorted((sample_data / "rgb_dsm_autzen" / "train").glob("*_rgb.tif"))[:4]
    stored = {}
    for kind in ("rgb", "dsm"):
        found = []
        for chip in chips:
            with rasterio.open(str(chip).replace("_rgb", f"_{kind}")) as file:
                found.append(file.read())
        stored[kind] = np.concatenate([np.concatenate(found[:2], 2), np.concatenate(found[2:], 2)], 1)
    alpha = np.full((1, *stored["rgb"].shape[1:]), 255, np.uint8)
    write(tmp_path / "sub_area_1" / "3K_RGB_sub_area1.tif", np.concatenate([stored["rgb"], alpha]), 0.2)
    write(tmp_path / "sub_area_1" / "3K_dsm_sub_area1.tif", stored["dsm"], 0.2)
    made = convert_archive(Mdas(tmp_path), tmp_path / "out", workers=1)
    ((_, (_, row)),) = rows(made.folder).items()
    np.testing.assert_array_equal(row["images"]["rgb"].pixels, stored["rgb"][:, :TILE, :TILE])
    np.testing.assert_allclose(row["images"]["dsm"].pixels, stored["dsm"][:, :TILE, :TILE], atol=1e-3)
    measured = made.manifest["statistics"]["dsm"]["height"]
    values = row["images"]["dsm"].pixels.astype(np.float64)
    assert (measured["mean"], measured["std"]) == pytest.approx((values.mean(), values.std()), rel=1e-12)


def test_unsound_images_make_bad_tiles(tmp_path):
    area(tmp_path, "sub_area_1", (1, 1))
    area(tmp_path, "sub_area_2", (1, 1), suffix="_sub_area2")
    path = tmp_path / "sub_area_2" / "3K_dsm_sub_area2.tif"
    path.write_bytes(path.read_bytes()[:9000])
    made = convert_archive(Mdas(tmp_path), tmp_path / "out", workers=1)
    assert [bad["key"] for bad in made.manifest["bad"]] == ["sub_area_2_r00000_c00000"]
    write(path, slope(264, 264, 0.3).astype(np.float64), 0.3)
    with pytest.raises(ValueError, match=r"`3K_dsm_sub_area2.tif` must have one band of float32 .* got 1 of float64"):
        Mdas(tmp_path).read(Mdas(tmp_path).list_items().items[1])
    write(tmp_path / "sub_area_2" / "3K_RGB_sub_area2.tif", colours(TILE, TILE)[:2], 0.2)
    with pytest.raises(ValueError, match=r"`sub_area_2/3K_RGB_sub_area2.tif` must have 3 or 4 bands of uint8"):
        Mdas(tmp_path).read(Mdas(tmp_path).list_items().items[1])


def test_three_bands_are_all_valid(tmp_path):
    area(tmp_path, "sub_area_3", (1, 1), rgb=colours(TILE, TILE)[:3])
    made = convert_archive(Mdas(tmp_path), tmp_path / "out", workers=1)
    ((_, (split, row)),) = rows(made.folder).items()
    assert split == "train" and row["images"]["rgb"].valid_mask().all() and math.isnan(row["images"]["dsm"].nodata)


def test_incomplete_archives_are_refused(root, tmp_path):
    with pytest.raises(ValueError, match="`root` must hold Augsburg_data_4_publication with entire_city"):
        Mdas(tmp_path / "nowhere").list_items()
    (root / "sub_area_3" / "3K_dsm_sub_area3.tif").unlink()
    with pytest.raises(ValueError, match="`root` must hold one 3K_RGB and one 3K_DSM image in .*sub_area_3"):
        Mdas(root).list_items()
    area(root, "sub_area_3", (1, 1), suffix="_sub_area3")
    (root / "sub_area_2").rename(root / "later")
    with pytest.raises(
        ValueError, match="`root` must hold sub_area_1 and sub_area_2 beside entire_city, got no sub_area_2"
    ):
        Mdas(root).list_items()
    write(root / "sub_area_2" / "3K_RGB.tif", colours(TILE, TILE), 0.2, crs="EPSG:32633")
    write(root / "sub_area_2" / "3K_DSM.tif", slope(256, 256, 0.3), 0.3, crs="EPSG:32633")
    with pytest.raises(
        ValueError, match="`root` must hold areas in one coordinate system, got EPSG:32632 and EPSG:32633"
    ):
        Mdas(root).list_items()
