"""Major-TOM Core as a stream: pairs, offsets, grids, and the same rows again from any state."""

import hashlib
import json
import re
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import torch
from torch.utils.data import DataLoader

from msgfm_hf.data.batch import PreTrainingBatches, collate
from msgfm_hf.data.majortom import MajorTomSource, offset_from_product_id
from msgfm_hf.data.mixture import MixtureDataset, MixtureSampler
from msgfm_hf.data.shards import CorruptShardError
from msgfm_hf.model.configuration_msgfm import MsGFMConfig
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.modeling_msgfm import MsGFMForPreTraining
from msgfm_hf.model.sensors import SENSORS

SIDE = 108  # pixels of 10 m; Core has 1068
TILE = 54
GRIDS = {10: SIDE, 20: SIDE // 2, 60: SIDE // 6}
L2A = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]
L1C = [*L2A[:10], "B10", *L2A[10:]]
METRES = {band.name: int(band.gsd) for band in SENSORS["s2"].bands}
OLD = "S2A_MSIL2A_20180405T103021_N0207_R108_T31SFD_20180405T141122"
NEW = "S2B_MSIL2A_20230415T181919_N0509_R127_T12TVK_20230415T211527"
RADAR = "S1A_IW_GRDH_1SDV_20220706T012321_20220706T012346_043971_053FAD_rtc"
CRS = "EPSG:32612"


def tiff(pixels, origin, metres, crs=CRS, nodata=None, compress="lzw"):
    pixels = np.asarray(pixels)
    pixels = pixels if pixels.ndim == 3 else pixels[None]
    options = {"driver": "GTiff", "dtype": pixels.dtype, "nodata": nodata, "compress": compress}
    shape = dict(zip(("count", "height", "width"), pixels.shape, strict=True))
    transform = rasterio.Affine(metres, 0, origin[0], 0, -metres, origin[1])
    with rasterio.MemoryFile() as memory:
        with memory.open(**options, **shape, crs=crs, transform=transform) as file:
            file.write(pixels)
        return memory.read()


def origin(number):
    # Core's cells do not begin at whole metres.
    return 439_801.0219440222 + 10_000 * number, 4_494_780.962866273


def cell(number):
    return f"451U_{900 - number}L"


def ramp(pixels):
    """Row and column of each pixel in one number."""
    return np.arange(pixels * pixels).reshape(pixels, pixels)


def optical(number, product_id=None, bands=L2A, **changes):
    """A row of Core-S2L2A: B03 tells the cell, all others the place of the pixel."""
    product_id = product_id or (NEW if number % 2 else OLD)
    row = {"product_id": product_id, "grid_cell": cell(number), "product_datetime": "2023", "thumbnail": PREVIEW}
    for band in bands:
        pixels = 1100 + ramp(GRIDS[METRES[band]]) % 9000
        if band == "B03":
            pixels = np.full_like(pixels, 2000 + number)
        row[band] = tiff(pixels.astype(np.uint16), origin(number), METRES[band])
    return row | {"cloud_mask": b"none"} | changes


def radar(number, crs=CRS, **changes):
    """A row of Core-S1RTC: VV tells the cell."""
    vv = np.full((SIDE, SIDE), (number + 1) / 100, np.float32)
    vv[0, 0] = -32768
    row = {"product_id": RADAR, "grid_cell": cell(number), "product_datetime": "2022", "thumbnail": PREVIEW}
    for column, pixels in (("vv", vv), ("vh", vv / 4)):
        row[column] = tiff(pixels, origin(number), 10, crs, -32768)
    return row | changes


def plane(metres, pixels):
    """Heights of a slope: 1 m in 100 m to the east, 2 m to the south."""
    middle = (np.arange(pixels) + 0.5) * metres
    return (300 + middle[None] / 100 + middle[:, None] / 50).astype(np.float32)


def elevation(number, **changes):
    """A row of Core-DEM, which has neither product nor date."""
    heights = plane(30, SIDE // 3) + number
    heights[:4, :4] = -32767
    dem = tiff(heights, origin(number), 30)
    return {"grid_cell": cell(number), "thumbnail": PREVIEW, "compressed": PREVIEW, "DEM": dem} | changes


PREVIEW = {"bytes": b"png", "path": None}
_MADE: dict = {}


def made(maker, number):
    if (maker, number) not in _MADE:
        _MADE[maker, number] = maker(number)
    return _MADE[maker, number]


def write(folder, rows, per_file=5):
    """Parquet as in Core: `images/part_00001.parquet` and so on, each row a row group."""
    (folder / "images").mkdir(parents=True)
    for number in range(0, len(rows), per_file):
        table = pa.Table.from_pylist(rows[number : number + per_file])
        path = folder / "images" / f"part_{number // per_file + 1:05d}.parquet"
        pq.write_table(table, path, row_group_size=1)
    return str(folder)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Core-S2L2A has cells 0 to 17, Core-S1RTC lacks some and is in another order, Core-DEM lacks others."""
    folder = tmp_path_factory.mktemp("core")
    radars = [1, 0, 2, 5, 3, 6, 7, 8, 11, 10, 12, 14, 13, 15, 17, 20]
    heights = [0, 1, 2, 4, 3, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    return {
        "s2": write(folder / "Core-S2L2A", [made(optical, number) for number in range(18)]),
        "s1": write(folder / "Core-S1RTC", [made(radar, number) for number in radars], 4),
        "dsm": write(folder / "Core-DEM", [made(elevation, number) for number in heights], 7),
    }


PAIRED = [0, 1, 2, 3, 5, 6, 7, 8, 10, 12, 13, 14, 15, 17]
PER_CELL = (SIDE // TILE) ** 2
ROWS = len(PAIRED) * PER_CELL


def stream(paths, **options):
    return MajorTomSource(
        paths, **({"num_rows": ROWS, "tile_size": TILE, "block_cells": 3, "window": 4, "val_share": 0} | options)
    )


def small(tmp_path, rows, **options):
    """A stream of few rows, given by sensor."""
    paths = {sensor: write(tmp_path / sensor, found) for sensor, found in rows.items()}
    return stream(paths, **({"num_rows": 4, "block_cells": 1} | options))


def contents(row):
    pixels = {sensor: hashlib.sha256(image.pixels.tobytes()).hexdigest() for sensor, image in row["images"].items()}
    return row["key"], pixels, [image.offset for image in row["images"].values()]


def keys(source, positions):
    return [source.read(position)["key"] for position in positions]


# Pairs


def test_cells_that_all_data_sets_have_come_once_per_epoch_each_with_its_own_images(archive):
    source = stream(archive)
    assert source.sensors == ["dsm", "s1", "s2"] and len(source) == len(source.order()) == ROWS
    rows = [source.read(position) for position in range(2 * ROWS)]
    for epoch in (rows[:ROWS], rows[ROWS:]):
        expected = [f"{cell(number)}_{row}_{column}" for number in PAIRED for row in range(2) for column in range(2)]
        assert sorted(row["key"] for row in epoch) == sorted(expected)
        # Blocks keep the stored order.
        blocks = [{row["group_id"] for row in epoch[first : first + 12]} for first in range(0, ROWS, 12)]
        assert blocks == [set(map(cell, PAIRED[first : first + 3])) for first in range(0, len(PAIRED), 3)]
    for row in rows:
        s2, s1, dsm = (row["images"][sensor] for sensor in ("s2", "s1", "dsm"))
        number = int(s2.select(["B03"]).pixels[0, 0, 0]) - 2000
        assert (row["group_id"], row["pair_id"], row["labels"], row["target"]) == (cell(number), row["key"], None, None)
        np.testing.assert_allclose(s1.pixels[:, -1, -1], [(number + 1) / 100, (number + 1) / 400])
        x, y = s2.transform[0] + 475 - origin(number)[0], origin(number)[1] - s2.transform[3] + 475
        assert dsm.pixels[0, 47, 47] == pytest.approx(300 + number + x / 100 + y / 50, abs=1e-3)
    assert source.skipped == {"unpaired": 8, "projection": 0, "offset": 0, "unnamed": 0}


def test_tiles_of_a_block_are_mixed_by_seed_and_name(archive):
    paths = {sensor: archive[sensor] for sensor in ("s1", "dsm")}
    variants = [{}, {"seed": 1}, {"name": "other"}]
    first, *others = ([keys(source, range(12))] for source in (stream(paths, **options) for options in variants))
    assert first == [keys(stream(paths), range(12))]
    assert all(other != first and sorted(other[0]) == sorted(first[0]) for other in others)
    assert len({key.rsplit("_", 2)[0] for key in first[0][:6]}) == 3  # a batch is not one place
    source = stream(paths)
    assert keys(source, range(12)) != keys(source, range(ROWS, ROWS + 12))


def test_memory_is_bounded_and_gaps_carry_no_data_set_away(tmp_path):
    optical_rows = [made(optical, number) for number in range(18)]
    radar_rows = [made(radar, number) for number in range(18)]
    few = [made(radar, number) for number in (0, 15, 16, 17)]
    for name, rows in (
        ("gap in the second", {"s2": optical_rows, "s1": few}),
        ("gap in the first", {"s1": few, "s2": optical_rows}),
        ("a cell less", {"s2": optical_rows, "s1": radar_rows[:1] + radar_rows[2:]}),
        ("rows in between", {"s2": [optical_rows[0], optical_rows[17]], "s1": radar_rows}),
    ):
        source = small(tmp_path / name, rows, window=2, tile_size=SIDE)
        found = [source.read(position)["group_id"] for position in range(4)]
        expected = {"rows in between": (0, 17, 0, 17), "a cell less": (0, 2, 3, 4)}.get(name, (0, 15, 16, 17))
        assert found == [cell(number) for number in expected]
        assert source.held_rows <= 2 * 2 + 2 * 2
    source = stream(
        {"s2": archive_rows(tmp_path, optical_rows), "s1": archive_rows(tmp_path, radar_rows[::-1])}, window=6
    )
    most = 0
    for position in range(24):
        source.read(position)
        most = max(most, source.held_rows)
    assert 6 <= most <= 2 * 6 + 2 * 2 * 3


def archive_rows(tmp_path, rows):
    return write(tmp_path / f"rows{len(list(tmp_path.iterdir()))}", rows)


def test_a_wider_window_finds_partners_in_another_order(tmp_path):
    def left_out(window):
        order = [3, 2, 1, 0, 7, 6, 5, 4]
        rows = {"s2": [made(optical, n) for n in range(8)], "s1": [made(radar, n) for n in order]}
        source = small(tmp_path / str(window), rows, window=window, tile_size=SIDE)
        first = source.read(0)
        assert first["group_id"] == cell(0) if window > 3 else cell(3)
        for position in range(1, 4):
            source.read(position)
        return source.skipped["unpaired"]

    assert left_out(4) == 0 < left_out(2)


def test_cells_that_come_twice_and_rows_without_a_cell(tmp_path):
    rows = {
        "s2": [optical(0, grid_cell=None), *(made(optical, n) for n in (0, 1, 1, 2)), optical(0, grid_cell="nowhere")],
        "s1": [made(radar, n) for n in (0, 0, 1, 2, 2)],
    }
    source = small(tmp_path, rows, tile_size=SIDE)
    assert [source.read(position)["group_id"] for position in range(4)] == [cell(n) for n in (0, 1, 2, 0)]
    assert source.skipped == {"unpaired": 1, "projection": 0, "offset": 0, "unnamed": 3}


def test_a_lone_data_set_has_no_pairs(archive):
    source = stream({"dsm": archive["dsm"]}, block_cells=1, tile_size=36)
    row = source.read(0)
    assert row["pair_id"] is None and row["images"]["dsm"].gsd == 30
    assert row["images"]["dsm"].pixels.shape == (1, 36, 36)


def test_without_a_pair_reading_fails_and_says_what_was_left_out(tmp_path):
    rows = {"s2": [made(optical, n) for n in range(4)], "s1": [made(radar, n) for n in range(6, 9)]}
    paths = {sensor: write(tmp_path / sensor, found) for sensor, found in rows.items()}
    with pytest.raises(
        ValueError, match="`paths` must have cells in common, got none among all cells of .*'unpaired': 4"
    ):
        stream(paths).read(0)
    with pytest.raises(ValueError, match="got none among the first 2 cells of .* Name files of the same region"):
        stream(paths, max_unpaired=2).read(0)


def test_cells_are_held_out_by_their_names(archive):
    paths = {sensor: archive[sensor] for sensor in ("s1", "dsm")}
    parts = {split: stream(paths, split=split, val_share=0.3, block_cells=1) for split in ("train", "val")}
    groups = {}
    for split, source in parts.items():
        rows = [source.read(position) for position in range(2 * ROWS)]
        groups[split] = {row["group_id"] for row in rows}
    assert groups["train"] | groups["val"] == set(map(cell, PAIRED)) and not groups["train"] & groups["val"]
    assert 0 < len(groups["val"]) < len(groups["train"])


# Grids and numbers


def test_bands_come_on_the_grid_of_the_finest_and_the_others_on_that_of_the_first(archive):
    source = stream(archive, tile_size=SIDE, block_cells=1)
    row = source.read(1)
    number = 1
    s2, s1, dsm = (row["images"][sensor] for sensor in ("s2", "s1", "dsm"))
    assert s2.bands == L2A == source.bands["s2"]
    for band, pixels in zip(s2.bands, s2.pixels, strict=True):
        factor = METRES[band] // 10
        stored = np.kron(1100 + ramp(GRIDS[METRES[band]]) % 9000, np.ones((factor, factor)))
        np.testing.assert_array_equal(pixels, 2000 + number if band == "B03" else stored)
    assert (s1.bands, dsm.bands) == (["VV", "VH"], ["height"])
    np.testing.assert_array_equal(s1.pixels[0, 1:], np.float32((number + 1) / 100))
    # A plane stays one under bilinear resampling, except where the outermost pixels are the nearest.
    inside = np.s_[15:-1, 15:-1]
    np.testing.assert_allclose(dsm.pixels[0][inside], (plane(10, SIDE) + number)[inside], atol=1e-3)
    assert not valid(dsm)[:11, :11].any() and valid(dsm)[13:, 13:].all() and valid(s1).sum() == SIDE**2 - 1
    for image in (s2, s1, dsm):
        assert image.pixels.shape[1:] == (SIDE, SIDE) and image.crs == CRS and image.gsd == 10
        np.testing.assert_allclose(image.transform, [origin(1)[0], 10, 0, origin(1)[1], 0, -10], atol=1e-6)
    west, south, east, north = row["bounds"]
    (x,), (y,) = rasterio.warp.transform(CRS, "EPSG:4326", [origin(1)[0] + 540], [origin(1)[1] - 540])
    assert west < x < east and south < y < north and (east - west) < 0.02
    assert (s2.datetime, s1.datetime, dsm.datetime) == ("2023-04-15T18:19:19Z", "2022-07-06T01:23:21Z", None)


def valid(image):
    return image.valid_mask()


def test_units_levels_and_stored_types(archive):
    source = stream(archive)
    assert source.units == {"s2": "dn", "s1": "power", "dsm": "metres"}
    assert source.dtypes == {"s2": "uint16", "s1": "float32", "dsm": "float32"}
    assert source.levels == {"s2": "l2a", "s1": None, "dsm": None}
    row = source.read(0)
    for sensor, image in row["images"].items():
        assert (image.units, image.pixels.dtype.name) == (source.units[sensor], source.dtypes[sensor])
    assert [image.scale for image in row["images"].values()] == [1e-4, 1.0, 1.0]


def test_tiles_lie_in_a_centred_grid(archive):
    source = stream({"s2": archive["s2"]}, tile_size=32, block_cells=1)
    found = set()
    for row in map(source.read, range(9)):
        place, down, across = row["key"].rsplit("_", 2)
        top, left = 6 + 32 * int(down), 6 + 32 * int(across)
        expected = (1100 + ramp(SIDE) % 9000)[top : top + 32, left : left + 32]
        np.testing.assert_array_equal(row["images"]["s2"].select(["B04"]).pixels[0], expected)
        found.add((place, top, left))
    assert found == {(cell(0), top, left) for top in (6, 38, 70) for left in (6, 38, 70)}


@pytest.mark.parametrize(
    ("product_id", "offset"),
    [
        (OLD, 0.0),
        ("S2B_MSIL1C_20211231T103021_N0301_R108_T31SFD_20211231T141122", 0.0),
        ("S2B_MSIL2A_20220827T070619_N0400_R106_T40SCE_20220827T093948", -1000.0),
        (NEW, -1000.0),
        # The reprocessed Collection 1 has the offset whatever the date.
        ("S2B_MSIL2A_20200718T070619_N0500_R106_T40SBE_20230426T083308", -1000.0),
        ("S2B_MSIL2A_20230718T070619_N9999_R106_T40SBE_20230826T083308", -1000.0),
        ("S2A_MSIL2A_20200918T065631_N9999_R063_T40SDE_20230310T193948", None),
        (RADAR, None),
        (None, None),
    ],
)
def test_the_offset_is_that_of_the_processing_baseline(product_id, offset):
    assert offset_from_product_id(product_id) == offset


def test_each_row_has_the_offset_of_its_product_and_unknown_ones_are_left_out(tmp_path):
    unknown = "S2A_MSIL2A_20200918T065631_N9999_R063_T40SDE_20230310T193948"
    rows = {"s2": [made(optical, 0), made(optical, 1), optical(2, unknown)]}
    source = small(tmp_path, rows, tile_size=SIDE)
    offsets = {row["group_id"]: row["images"]["s2"].offset for row in map(source.read, range(3))}
    assert offsets == {cell(0): 0.0, cell(1): pytest.approx(-0.1)}
    assert source.skipped["offset"] == 1
    source = stream({"s2": str(tmp_path / "s2")}, tile_size=SIDE, block_cells=1, unknown_offset_dn=-1000)
    assert [source.read(position)["images"]["s2"].offset_dn for position in range(3)] == pytest.approx(
        [0, -1000, -1000]
    )


def test_level_1c_is_known_by_its_cirrus_band(tmp_path):
    row = optical(0, "S2A_MSIL1C_20220926T065631_N0400_R063_T40SDE_20220926T093948", L1C)
    source = small(tmp_path, {"s2": [row]})
    assert source.levels == {"s2": "l1c"} and source.bands == {"s2": L1C}
    assert source.read(0)["images"]["s2"].offset_dn == pytest.approx(-1000)


def test_images_in_another_projection_are_left_out(tmp_path):
    rows = {
        "s2": [made(optical, n) for n in range(3)],
        "s1": [made(radar, 0), radar(1, "EPSG:32613"), made(radar, 2)],
    }
    source = small(tmp_path, rows, tile_size=SIDE)
    assert [source.read(position)["group_id"] for position in range(2)] == [cell(0), cell(2)]
    assert source.skipped["projection"] == 1


def test_a_grid_shifted_by_less_than_a_pixel_is_resampled(tmp_path):
    number, (x, y) = 0, origin(0)
    slope = np.broadcast_to(0.01 + np.arange(SIDE, dtype=np.float32) / 1000, (SIDE, SIDE)).copy()
    shifted = {column: tiff(slope, (x + 4, y), 10, nodata=-32768) for column in ("vv", "vh")}
    rows = {"s2": [made(optical, number)], "s1": [radar(number, **shifted)]}
    image = small(tmp_path, rows, tile_size=SIDE).read(0)["images"]["s1"]
    np.testing.assert_allclose(image.pixels[0, 5, 5:50], slope[5, 5:50] - 0.0004, atol=1e-6)


# Damage


def truncated(payload):
    return payload[:200] + payload[-50:]


LATER = {
    "not a TIFF": (optical(1, B04=b"II*\0 and then nothing"), "`B04` must be a GeoTIFF, got .* in cell 451U_899L of"),
    "a cut TIFF": (optical(1, B02=truncated(optical(1)["B02"])), "`B02` must be a GeoTIFF, got"),
    "no bytes": (optical(1, B09=None), "`B09` must hold a GeoTIFF, got None in cell 451U_899L"),
    "another type": (
        optical(1, B08=tiff(np.ones((SIDE, SIDE), np.int32), origin(1), 10)),
        "`B08` must be one band of uint16 with a projection, got 1 of int32",
    ),
    "two bands": (
        optical(1, B08=tiff(np.ones((2, SIDE, SIDE), np.uint16), origin(1), 10)),
        "`B08` must be one band of uint16 with a projection, got 2 of uint16",
    ),
    "no place": (
        optical(1, B08=tiff(np.ones((SIDE, SIDE), np.uint16), origin(1), 10, None)),
        "`B08` must be one band of uint16 with a projection, got 1 of uint16 and None",
    ),
    "a band of another size": (
        optical(1, B05=tiff(np.ones((50, 50), np.uint16), origin(1), 20)),
        "`B05` must cover the pixels of the finest band, .* got .50, 50. at",
    ),
    "a band elsewhere": (
        optical(1, B05=tiff(np.ones((54, 54), np.uint16), origin(2), 20)),
        "`B05` must cover the pixels of the finest band",
    ),
    "another level": (optical(1, NEW.replace("L2A", "L1C")), "`product_id` must be of level l2a, got S2B_MSIL1C_"),
    "implausible": (
        optical(1, OLD, B03=tiff(np.full((SIDE, SIDE), 40_000, np.uint16), origin(1), 10)),
        "`pixels` for sensor 's2' must have .* in band B03.* This is cell 451U_899L of source 'majortom'",
    ),
}


@pytest.mark.parametrize(("row", "said"), LATER.values(), ids=LATER)
def test_damaged_cells_are_named_and_the_next_row_stands_in(tmp_path, row, said):
    source = small(tmp_path, {"s2": [made(optical, 0), row, made(optical, 2)]})
    with pytest.raises(CorruptShardError, match=said):
        source.read(PER_CELL, verify=True)
    paths = {"s2": str(tmp_path / "s2")}
    source = stream(paths, block_cells=1)
    dataset = MixtureDataset([source], [source.order()], TILE, 0)
    samples = dataset.__getitems__([(0, position) for position in range(3 * PER_CELL)])
    assert [len(sample["bad"]) for sample in samples] == [0] * 4 + [4, 3, 2, 1] + [0] * 4
    assert {sample["group_id"] for sample in samples[PER_CELL : 2 * PER_CELL]} == {cell(2)}
    where, reason = samples[PER_CELL]["bad"][0]
    assert where == f"majortom[{PER_CELL}]" and re.search(said, reason)


def test_partners_elsewhere_and_cells_of_another_size_are_damage(tmp_path):
    vv = {"vv": tiff(np.ones((SIDE, SIDE), np.float32), origin(1), 10)} | {
        "vh": tiff(np.ones((SIDE, SIDE), np.float32), origin(1), 10)
    }
    rows = {"s2": [made(optical, 0)], "s1": [radar(0, **vv)]}
    with pytest.raises(CorruptShardError, match="`s1` must lie where the first data set does, .* got .*449801"):
        small(tmp_path / "elsewhere", rows, tile_size=SIDE).read(0)
    larger = tiff(np.ones((SIDE + 12, SIDE + 12), np.float32), origin(1), 10)
    source = small(tmp_path / "size", {"s1": [made(radar, 0), radar(1, vv=larger, vh=larger)]})
    with pytest.raises(
        CorruptShardError, match=r"`s1` must have \(108, 108\) pixels as the first cell, got \(120, 120\)"
    ):
        source.read(PER_CELL)
    source = small(tmp_path / "all", {"s1": [radar(0, vv=b"nothing")]})
    with pytest.raises(ValueError, match="`paths` must hold images, got none readable in 1 .*Name other .*: `vv` must"):
        source.read(0)


def test_columns_that_are_missing(tmp_path):
    def without(row, *columns):
        return {name: value for name, value in row.items() if name not in columns}

    for columns, said in (
        (("B05",), "got no B05 in"),
        (("grid_cell", "product_id"), "got no grid_cell, product_id in"),
    ):
        path = write(tmp_path / columns[0], [without(made(optical, 0), *columns)])
        with pytest.raises(ValueError, match=f"`paths` of 's2' must be of Major-TOM Core, with columns .* {said}"):
            stream({"s2": path})
    folder = Path(write(tmp_path / "later", [made(radar, 0)]))
    other = Path(write(tmp_path / "other", [without(made(radar, 1), "vh")]))
    (other / "images" / "part_00001.parquet").rename(folder / "images" / "part_00002.parquet")
    source = stream({"s1": str(folder)}, block_cells=1, tile_size=SIDE)
    assert source.read(0)["group_id"] == cell(0)
    with pytest.raises(OSError, match="`paths` of 's1' must be readable to the end, got .*Name.vh."):
        source.read(1)


def test_a_broken_stream_is_said_to_be_and_read_again_from_where_it_broke(tmp_path):
    numbers = range(12)
    paths = {"dsm": write(tmp_path / "dsm", [made(elevation, n) for n in numbers], 3)}
    paths["s1"] = write(tmp_path / "s1", [made(radar, n) for n in numbers], 4)
    expected = keys(stream(paths, tile_size=18), range(48))
    file = Path(paths["s1"]) / "images" / "part_00002.parquet"
    whole = file.read_bytes()
    source = stream(paths, tile_size=18)
    assert keys(source, range(4)) == expected[:4]
    file.write_bytes(whole[:2000])
    with pytest.raises(OSError, match="`paths` of 's1' must be readable to the end, got .* start again with"):
        keys(source, range(4, 48))
    state = json.loads(json.dumps(source.state_dict()))
    file.write_bytes(whole)
    assert keys(source, range(12, 48)) == expected[12:]
    source = stream(paths, tile_size=18)
    source.load_state_dict(state)
    assert keys(source, range(12, 48)) == expected[12:]


# Going on


@pytest.mark.parametrize(("sensors", "step"), [(("s1", "dsm"), 1), (("s2", "s1", "dsm"), 25)])
def test_every_state_goes_on_with_the_same_rows(archive, sensors, step):
    paths = {sensor: archive[sensor] for sensor in sensors}
    options = {"block_cells": 2, "window": 3}
    whole = stream(paths, **options)
    states, expected = [whole.state_dict()], []
    length = ROWS + 3 * PER_CELL  # into the second epoch
    skipped = []
    for position in range(length):
        expected.append(contents(whole.read(position)))
        states.append(json.dumps(whole.state_dict()))
        skipped.append(dict(whole.skipped))
    assert max(len(state) for state in states[1:]) < 5000
    source = stream(paths, **options)
    for cut in range(0, length, step):
        source.load_state_dict(json.loads(states[cut]) if cut else states[cut])
        ends = {cut, min(cut + 2 * PER_CELL, length - 1)} if cut % 5 == 0 else {cut}
        assert [contents(source.read(position)) for position in sorted(ends)] == [expected[end] for end in sorted(ends)]
        assert source.skipped == skipped[max(ends)]


def test_without_a_state_a_stream_gets_there_as_well(archive, capsys):
    paths = {sensor: archive[sensor] for sensor in ("s1", "dsm")}
    expected = keys(stream(paths), range(ROWS + 8))
    assert keys(stream(paths), [5, 40, ROWS + 7]) == [expected[5], expected[40], expected[ROWS + 7]]
    assert "majortom: to row" in capsys.readouterr().err


def test_a_state_of_another_stream_is_refused(archive):
    state = stream(archive).state_dict()
    with pytest.raises(ValueError, match="`state` must be of the same stream, got seed 0 where 1 is asked for"):
        stream(archive, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="`state` must be of the same stream, got data sets"):
        stream({"s2": archive["s2"]}).load_state_dict(state)


def test_a_state_of_other_files_is_refused(tmp_path):
    numbers = [0, 1, 2, 3, 4, 5, 6, 7]
    paths = {"s1": write(tmp_path / "s1", [made(radar, n) for n in numbers[::2]])}
    paths["dsm"] = write(tmp_path / "dsm", [made(elevation, n) for n in numbers], 8)
    source = stream(paths, block_cells=1)
    keys(source, range(4 * PER_CELL))
    shorter = paths | {"dsm": write(tmp_path / "shorter", [made(elevation, 0)], 8)}
    source, state = stream(shorter, block_cells=1), source.state_dict()
    source.load_state_dict(state)
    with pytest.raises(ValueError, match="`state` must be of the same files, got an end of .*shorter before the row"):
        source.read(4 * PER_CELL)


def test_a_stream_goes_back_no_further_than_its_last_two_blocks(archive):
    paths = {sensor: archive[sensor] for sensor in ("s1", "dsm")}
    source = stream(paths, block_cells=1)
    expected = keys(source, range(3 * PER_CELL))
    # A state is good for all that can still be read: where rows are damaged, a reader looks ahead.
    state = source.state_dict()
    other = stream(paths, block_cells=1)
    other.load_state_dict(state)
    assert keys(other, range(PER_CELL, 3 * PER_CELL)) == expected[PER_CELL:]
    assert keys(source, [PER_CELL + 1, 2 * PER_CELL]) == [expected[PER_CELL + 1], expected[2 * PER_CELL]]
    with pytest.raises(ValueError, match=f"`index` must not go back behind {PER_CELL}, got 3"):
        source.read(3)


def test_ranks_read_different_rows_and_together_all(archive):
    turns, size, world = ROWS // 4, 4, 2
    paths, drawn = {sensor: archive[sensor] for sensor in ("s1", "dsm")}, []
    for rank in range(world):
        source = stream(paths)
        dataset = MixtureDataset([source], [source.order()], TILE, 0)
        for step in MixtureSampler([size], turns, 0, rank, world):
            drawn += [(sample["position"], sample["key"]) for sample in dataset.__getitems__(step)]
    assert sorted(position for position, _ in drawn) == list(range(ROWS))
    assert [key for _, key in sorted(drawn)] == keys(stream(paths), range(ROWS))
    assert len({key for _, key in drawn}) == ROWS
    assert {key.rsplit("_", 2)[0] for _, key in drawn} == set(map(cell, PAIRED))


def test_workers_are_refused(archive):
    source = stream(archive)
    dataset = MixtureDataset([source], [source.order()], TILE, 0)
    loader = DataLoader(dataset, batch_sampler=MixtureSampler([2], 1), num_workers=1, collate_fn=collate)
    with pytest.raises(ValueError, match="`dataloader_num_workers` must be 0 for a stream"):
        next(iter(loader))


# Where it comes from


def test_a_path_is_a_folder_files_or_a_repository(archive, monkeypatch):
    folder = archive["dsm"]
    expected = keys(stream({"dsm": folder}, tile_size=36, block_cells=1), range(3))
    for path in (f"{folder}/images", f"{folder}/images/*.parquet"):
        assert keys(stream({"dsm": path}, tile_size=36, block_cells=1), range(3)) == expected
    # What a repository of the Hub turns into is opened by the same call.
    load, asked = datasets.load_dataset, []

    def hub(builder, data_files, split, streaming, columns):
        asked.append(data_files)
        files = data_files.replace("hf://datasets/Major-TOM/Core-DEM", folder)
        return load(builder, data_files=files, split=split, streaming=streaming, columns=columns)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert keys(stream({"dsm": "Major-TOM/Core-DEM"}, tile_size=36, block_cells=1), range(3)) == expected
    stream({"dsm": "Major-TOM/Core-DEM/images/part_00002.parquet"})
    with pytest.raises(OSError, match="must be a repository of the Hub"):
        stream({"dsm": "Major-TOM/Core-DEM@v1/images/part_00002.parquet"})
    assert set(asked) == {
        "hf://datasets/Major-TOM/Core-DEM/images/*.parquet",
        "hf://datasets/Major-TOM/Core-DEM/images/part_00002.parquet",
        "hf://datasets/Major-TOM/Core-DEM@v1/images/part_00002.parquet",
    }


def test_paths_that_cannot_be_opened(tmp_path):
    with pytest.raises(
        OSError, match="`paths` of 's2' must be a repository of the Hub or a folder .* see to the connection"
    ):
        stream({"s2": "Major-TOM/Core-S2L2A"})
    with pytest.raises(ValueError, match="`paths` must hold Parquet files, got .* without"):
        stream({"s2": str(tmp_path)})
    (tmp_path / "part_00001.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(OSError, match="`paths` of 's2' must be a repository of the Hub or a folder of Parquet files"):
        stream({"s2": str(tmp_path)})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"paths": {"rgb": "x"}}, "`paths` must name data sets for some of s2, s1, dsm, got rgb"),
        ({"paths": {}}, "`paths` must name data sets for some of s2, s1, dsm, got none"),
        ({"split": "test"}, "`split` must be one of train, val, got 'test'"),
        ({"num_rows": 0}, "`num_rows` must be at least 1, got 0"),
        ({"window": 0}, "`window` must be at least 1, got 0"),
        ({"val_share": 1}, "`val_share` must be at least 0 and below 1, got 1"),
    ],
)
def test_arguments_out_of_range(archive, options, said):
    with pytest.raises(ValueError, match=said):
        stream(**({"paths": archive} | options))


def test_a_tile_fits_into_a_cell(archive):
    with pytest.raises(ValueError, match="`tile_size` must be at most the side of a cell, 108 pixels, got 109"):
        stream(archive, tile_size=SIDE + 1).read(0)


@pytest.mark.parametrize(("library", "extra"), [("datasets", "train"), ("rasterio", "geo")])
def test_a_library_that_is_not_there(archive, monkeypatch, library, extra):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"`{library}` is needed .*msgfm_hf\[{extra}\]"):
        stream({"s1": archive["s1"]})


# To the loss


def test_a_step_of_pretraining(archive):
    source = stream(archive)
    config = MsGFMConfig(
        sensors={sensor: SENSORS[sensor].to_dict() for sensor in source.sensors},
        inputs={"s2": L2A},
        embed_dim=12,
        depths=[1, 1, 2],
        num_heads=[1, 1, 2],
        window_size=3,
        image_size=48,
        mask_patch_size=16,
    )
    processor = MsGFMImageProcessor.from_config(config)
    batches = PreTrainingBatches([source], processor, config, 0, 0.6, 0.5, "masked", [1.0])
    loader = DataLoader(
        MixtureDataset([source], [source.order()], 48, 0), batch_sampler=MixtureSampler([4], 2), collate_fn=collate
    )
    model = MsGFMForPreTraining(config)
    for step, batch in enumerate(loader):
        assert batch["bad"] == [] and batch["sources"][0]["images"]["s2"]["pixels"].dtype == torch.uint16
        inputs = batches(batch, step, torch.device("cpu"))
        loss = model(**inputs).loss
        loss.backward()
        assert torch.isfinite(loss) and loss > 0
    assert step == 1
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "decoders" in name)


def test_real_pixels_reach_the_model_as_they_do_from_files(sample_data, tmp_path):
    """TerraMesh is cut out of Core: its scenes as Core stores them, and normalised from the file."""
    products = {"282D_485L_3_3": "20210723T132231_N0500", "637U_59R_1_3": "20171030T103151_N0206"}
    rows, files, side = {"s2": [], "s1": []}, {}, 216
    for place, sensed in products.items():
        folder = sample_data / "s1s2_terramesh" / place
        name = place.rsplit("_", 2)[0]
        row = {"product_id": f"S2A_MSIL1C_{sensed}_R108_T32VNJ_20230101T000000", "grid_cell": name}
        files[name] = folder
        with rasterio.open(folder / "S2L1C.tif") as file:
            corner = file.transform.c, file.transform.f
            for band, pixels in zip(L1C, file.read()[:, :side, :side], strict=True):
                step = METRES[band] // 10
                row[band] = tiff(pixels[::step, ::step], corner, METRES[band], file.crs)
        rows["s2"].append(row)
        with rasterio.open(folder / "S1RTC.tif") as file:
            power = 10 ** (file.read()[:, :side, :side] / 10)
            bands = {column: tiff(p, corner, 10, file.crs) for column, p in zip(("vv", "vh"), power, strict=True)}
        rows["s1"].append({"product_id": RADAR, "grid_cell": name} | bands)
    source = small(tmp_path, rows, tile_size=side)
    processor = MsGFMImageProcessor(sensors={sensor: SENSORS[sensor] for sensor in ("s1", "s2")})
    fine = [band for band in L1C if METRES[band] == 10]
    for position, offset in ((0, -1000), (1, 0)):
        row = source.read(position, verify=True)
        s2, s1 = row["images"]["s2"].select(fine), row["images"]["s1"]
        folder = files[row["group_id"]]
        options = {"offset": {"s2": offset}, "bands": {"s2": fine}, "unit": {"s1": "db"}}
        whole = processor({"s2": str(folder / "S2L1C.tif"), "s1": str(folder / "S1RTC.tif")}, **options)["pixel_values"]
        for sensor, image, atol in (("s2", s2, 1e-5), ("s1", s1, 1e-3)):
            mask = torch.from_numpy(image.valid_mask())[None]
            pixels = torch.from_numpy(image.pixels)[None]
            found = processor.radiometry(
                pixels, mask, sensor, image.bands, image.units, image.scale, image.offset_dn, source.levels[sensor]
            )
            expected = whole[sensor][:, :, :side, :side]
            torch.testing.assert_close(
                found.values[mask[:, None].expand_as(expected)],
                expected[mask[:, None].expand_as(expected)],
                atol=atol,
                rtol=1e-4,
            )
            assert mask.float().mean() > 0.99
