"""Radiometry on real and made-up images: golden values are plain numpy on pixels that rasterio read, with statistics
typed in from the publications; every refusal is triggered once."""

import json
import types

import numpy as np
import pytest
import rasterio
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from transformers.pipelines.base import pad_collate_fn

from msgfm_hf.model import image_processing_msgfm
from msgfm_hf.model.image_processing_msgfm import (
    GeoTiff,
    MsGFMImageProcessor,
    MsGFMImageProcessorKwargs,
    read_geotiff,
)
from msgfm_hf.model.sensors import SENSORS, BandSpec, SensorSpec

S2_BANDS = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"]
# SSL4EO-S12 v1, digital numbers without offset.
L1C_MEAN = [1605.575, 1390.782, 1314.873, 1363.524, 1549.444, 2091.749, 2371.717, 2299.905, 2560.295, 830.066, 22.104]
L1C_MEAN += [2177.072, 1524.065]
L1C_STD = [786.787, 850.348, 875.065, 1138.850, 1122.178, 1161.592, 1274.392, 1248.429, 1345.527, 577.316, 51.154]
L1C_STD += [1336.099, 1136.538]
L2A_MEAN = [752.401, 884.297, 1144.162, 1297.473, 1624.910, 2194.642, 2422.212, 2517.761, 2581.647, 2645.519]
L2A_MEAN += [2368.512, 1805.068]
L2A_STD = [1108.029, 1155.152, 1183.629, 1368.114, 1370.265, 1355.554, 1416.515, 1474.789, 1439.309, 1582.280]
L2A_STD += [1455.521, 1343.484]
L1C = dict(zip(S2_BANDS, zip(L1C_MEAN, L1C_STD, strict=True), strict=True))
L2A_BANDS = [band for band in S2_BANDS if band != "B10"]
L2A = dict(zip(L2A_BANDS, zip(L2A_MEAN, L2A_STD, strict=True), strict=True))
# SEN12MS training list, after clipping.
S1_MEAN, S1_STD, S1_CLIP = [-11.76858, -18.294598], [4.525339, 4.3586307], [-25.0, -32.5]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture
def processor():
    return MsGFMImageProcessor(
        sensors={sensor: SENSORS[sensor] for sensor in ("rgb", "s2", "s1", "dsm", "naip", "landsat8", "landsat8_pan")}
    )


def raster(path):
    with rasterio.open(path) as file:
        return file.read(), list(file.descriptions)


def columns(values):
    return np.array(values, dtype=np.float64)[:, None, None]


def reflectance(values, statistics):
    """Golden: clip reflectance to 0..1, then z-score with statistics in digital numbers."""
    mean, std = (columns([entry[i] for entry in statistics]) / 1e4 for i in (0, 1))
    return (np.clip(values, 0, 1) - mean) / std


def backscatter(decibels):
    return (np.clip(decibels, columns(S1_CLIP), 0) - columns(S1_MEAN)) / columns(S1_STD)


def assert_golden(inputs, golden):
    assert inputs["pixel_values"].dtype == torch.float32
    assert inputs["valid_mask"].dtype == torch.bool
    assert inputs["valid_mask"].all()
    np.testing.assert_allclose(inputs["pixel_values"][0].numpy(), golden, rtol=1e-5, atol=2e-5)


def write(path, pixels, descriptions=None, scales=None, offsets=None, overviews=False, mask=None, **profile):
    pixels = np.asarray(pixels)
    options = {"driver": "GTiff", "crs": "EPSG:32632", "transform": from_origin(500000, 6000000, 10, 10), **profile}
    shape = dict(zip(("count", "height", "width"), pixels.shape, strict=True))
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", dtype=pixels.dtype, **shape, **options) as file,
    ):
        file.write(pixels)
        if descriptions:
            file.descriptions = descriptions
        if scales:
            file.scales = scales
        if offsets:
            file.offsets = offsets
        if mask is not None:
            file.write_mask(mask)
        if overviews:
            file.build_overviews([2, 4], Resampling.average)
    return path


# Golden values on real samples


@pytest.mark.parametrize(("place", "offset"), [("637U_59R_1_3", 0), ("38D_378R_2_3", 0), ("282D_485L_3_3", -1000)])
def test_sentinel_2_l1c_of_terramesh(processor, sample_data, place, offset):
    path = sample_data / "s1s2_terramesh" / place / "S2L1C.tif"
    stored, names = raster(path)
    assert names == S2_BANDS
    golden = reflectance((stored + float(offset)) * 1e-4, L1C.values())
    assert_golden(processor(path, sensor="s2", offset=offset), golden)


def test_sentinel_2_l2a_of_terramesh_has_twelve_bands_and_statistics_of_its_own(processor, sample_data):
    path = sample_data / "s1s2_terramesh" / "637U_59R_1_3" / "S2L2A.tif"
    stored, names = raster(path)
    inputs = processor(path, sensor="s2", offset=0, level="l2a", bands=L2A_BANDS)
    assert names == L2A_BANDS
    assert_golden(inputs, reflectance(stored * 1e-4, L2A.values()))


def test_sentinel_1_of_terramesh_in_decibels(processor, sample_data):
    path = sample_data / "s1s2_terramesh" / "637U_59R_1_3" / "S1RTC.tif"
    stored, names = raster(path)
    assert names == ["VV_dB", "VH_dB"]
    assert_golden(processor(path, sensor="s1"), backscatter(stored.astype(np.float64)))


def test_sentinel_1_of_worldcereal_is_an_amplitude_with_a_calibration(processor, sample_data):
    path = sample_data / "s1s2_worldcereal_belgium" / "S1_202011.tif"
    stored, _ = raster(path)
    inputs = processor(path, sensor="s1", unit="amplitude", scale=10 ** (-83 / 20))
    assert_golden(inputs, backscatter(20 * np.log10(stored.astype(np.float64)) - 83))


def test_nine_bands_of_worldcereal_by_name(processor, sample_data):
    path = sample_data / "s1s2_worldcereal_belgium" / "S2L2A_202103.tif"
    stored, names = raster(path)
    inputs = processor(path, sensor="s2", bands=names, offset=0, level="l2a")
    assert_golden(inputs, reflectance(stored * 1e-4, [L2A[name] for name in names]))


def test_a_scene_classification_is_dropped_when_bands_are_named(processor, sample_data):
    path = sample_data / "s1s2_openeo_belgium_cloudy" / "S2L2A_20230402.tif"
    stored, names = raster(path)
    assert names == ["B01", "B04", "B08", "B11", "SCL"]
    inputs = processor(path, sensor="s2", bands=["swir1", "red"], offset=0, level="l2a")
    assert_golden(inputs, reflectance(stored[[3, 1]] * 1e-4, [L2A["B11"], L2A["B04"]]))


def test_float_reflectance_of_slovenia(processor, sample_data):
    path = sample_data / "s2_eolearn_slovenia" / "S2L1C_ref4.tif"
    stored, _ = raster(path)
    inputs = processor(path, sensor="s2", unit="reflectance")
    assert_golden(inputs, reflectance(stored.astype(np.float64), L1C.values()))


def test_rgb_and_heights_of_autzen(processor, sample_data):
    folder = sample_data / "rgb_dsm_autzen" / "val"
    rgb, dsm = folder / "r0512_c0276_rgb.tif", folder / "r0512_c0276_dsm.tif"
    inputs = processor({"rgb": rgb, "dsm": dsm})
    colours, heights = raster(rgb)[0], raster(dsm)[0].astype(np.float64)
    golden = {
        "rgb": (colours / 255 - columns(IMAGENET_MEAN)) / columns(IMAGENET_STD),
        "dsm": (heights - np.median(heights)) / 15,
    }
    for sensor, values in golden.items():
        np.testing.assert_allclose(inputs["pixel_values"][sensor][0].numpy(), values, rtol=1e-5, atol=2e-5)
        assert inputs["valid_mask"][sensor].shape == (1, 256, 256)
    assert inputs["reference"].keys() == {"dsm"}
    assert inputs["reference"]["dsm"].tolist() == pytest.approx([np.median(heights)])


def test_elevation_of_worldcereal_against_a_height_in_metres(processor, sample_data):
    stored, names = raster(sample_data / "s1s2_worldcereal_belgium" / "DEM.tif")
    assert names == ["elevation_m", "slope"]
    inputs = processor(stored[0], sensor="dsm", reference=150.0, nodata=-1)
    assert_golden(inputs, (stored[:1] - 150.0) / 15)
    assert inputs["reference"].tolist() == [150.0]


def test_four_bands_of_naip(processor, sample_data):
    path = sample_data / "naip_urban_trees" / "images" / "chico_2018_12.tif"
    stored, names = raster(path)
    assert names == ["R", "G", "B", "NIR"]
    mean, std = columns([*IMAGENET_MEAN, 0.485]), columns([*IMAGENET_STD, 0.229])
    assert_golden(processor(path, sensor="naip"), (stored / 255 - mean) / std)
    # RGB out of four bands, by name.
    golden = (stored[:3] / 255 - columns(IMAGENET_MEAN)) / columns(IMAGENET_STD)
    assert_golden(processor(path, bands=["red", "green", "blue"]), golden)


def test_nodata_of_a_file_in_any_band_is_invalid_and_zero(processor, sample_data):
    path = sample_data / "naip_timeseries_nd" / "m_4709963_se_14_1_20140720.tif"
    stored, _ = raster(path)
    inputs = processor(path, sensor="naip")
    valid = (stored != 0).all(axis=0)
    assert 0 < valid.mean() < 1
    np.testing.assert_array_equal(inputs["valid_mask"][0].numpy(), valid)
    assert (inputs["pixel_values"][0][:, ~torch.from_numpy(valid)] == 0).all()


def test_raw_landsat_numbers(processor, sample_data):
    path = sample_data / "landsat8_pan_ms" / "LC80200392015216LGN00_MS.tif"
    stored, names = raster(path)
    assert names == ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B9"]
    # REFLECTANCE_MULT_BAND_x and REFLECTANCE_ADD_BAND_x of the product's MTL file.
    like = [L1C[band] for band in ("B01", "B02", "B03", "B04", "B8A", "B11", "B12", "B10")]
    assert_golden(processor(path, sensor="landsat8"), reflectance(stored * 2e-5 - 0.1, like))


def test_all_four_sensors_of_one_place_share_a_grid(processor, sample_data):
    folder = sample_data / "s1s2_terramesh" / "637U_59R_1_3"
    files = {"s2": "S2L1C.tif", "s1": "S1RTC.tif", "dsm": "DEM.tif", "rgb": "S2RGB.tif"}
    inputs = processor({sensor: folder / name for sensor, name in files.items()}, offset={"s2": 0})
    shapes = {sensor: tuple(tensor.shape) for sensor, tensor in inputs["pixel_values"].items()}
    assert shapes == {
        "s2": (1, 13, 224, 224),
        "s1": (1, 2, 224, 224),
        "dsm": (1, 1, 224, 224),
        "rgb": (1, 3, 224, 224),
    }


# Layouts, containers and dtypes


def test_channels_first_and_last_arrays_tensors_and_pictures_are_one_image(processor):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    expected = processor(image)["pixel_values"]
    assert expected.shape == (1, 3, 5, 7)
    turned = np.ascontiguousarray(np.moveaxis(image, -1, 0))
    for same in (turned, torch.from_numpy(image), torch.from_numpy(turned), Image.fromarray(image), image[None]):
        assert torch.equal(processor(same)["pixel_values"], expected)
    for same in (image[::-1][::-1], image.astype(">u2"), image.astype(np.int64), image.astype(np.float64)):
        assert torch.equal(processor(same)["pixel_values"], expected)


@given(
    dtype=st.sampled_from(["uint8", "int16", "uint16", "uint32", "int32", "int64", "float16", "float32", "float64"]),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_the_stored_dtype_does_not_matter(dtype, size, seed):
    stored = np.random.default_rng(seed).integers(2, 200, (13, *size))
    given_values = MsGFMImageProcessor()(stored.astype(dtype), sensor="s2", offset=0)["pixel_values"]
    np.testing.assert_allclose(given_values[0].numpy(), reflectance(stored * 1e-4, L1C.values()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.int16, torch.float16, torch.bfloat16, torch.float32]
)
def test_tensors_of_any_dtype(processor, dtype):
    stored = torch.arange(2 * 13 * 4).remainder(100).add(2).reshape(2, 13, 2, 2).to(dtype)
    inputs = processor(stored, sensor="s2", offset=0)
    golden = reflectance(stored.to(torch.float64).numpy() * 1e-4, L1C.values())
    np.testing.assert_allclose(inputs["pixel_values"].numpy(), golden, rtol=1e-5, atol=1e-5)


def test_a_list_is_a_batch_and_equals_its_images_one_by_one(processor):
    images = list(np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8))
    together = processor(images)
    assert together["valid_mask"].shape == (3, 6, 5)
    apart = torch.cat([processor(image)["pixel_values"] for image in images])
    assert torch.equal(together["pixel_values"], apart)
    assert torch.equal(processor(np.stack(images))["pixel_values"], apart)
    assert torch.equal(processor([Image.fromarray(image) for image in images])["pixel_values"], apart)


def test_a_sensor_of_one_band_takes_two_axes_and_three(processor):
    height = np.arange(12.0).reshape(3, 4)
    expected = processor(height, sensor="dsm")["pixel_values"]
    assert expected.shape == (1, 1, 3, 4)
    for same in (height[None], height[..., None], Image.fromarray(height.astype(np.float32)), [height]):
        assert torch.equal(processor(same, sensor="dsm")["pixel_values"], expected)
    assert processor([height, height], sensor="dsm")["pixel_values"].shape == (2, 1, 3, 4)


def test_the_layout_can_be_given_where_a_shape_leaves_it_open(processor):
    image = np.random.default_rng(0).integers(0, 256, (3, 8, 3), dtype=np.uint8)
    first = processor(image, input_data_format="channels_first")["pixel_values"]
    last = processor(image, input_data_format="channels_last")["pixel_values"]
    assert first.shape == (1, 3, 8, 3)
    assert last.shape == (1, 3, 3, 8)
    assert torch.equal(
        last, processor(np.moveaxis(image, -1, 0).copy(), input_data_format="channels_first")["pixel_values"]
    )


@pytest.mark.parametrize("sensor", ["rgb", "s1", "s2", "dsm"])
def test_one_pixel_is_an_image(processor, sensor):
    bands = SENSORS[sensor].band_names
    unit = {"s2": "reflectance"}.get(sensor)
    inputs = processor(
        np.full((len(bands), 1, 1), -9.0 if sensor == "s1" else 0.5), sensor=sensor, unit=unit, check=False
    )
    assert inputs["pixel_values"].shape == (1, len(bands), 1, 1)
    assert inputs["valid_mask"].all()


def test_band_names_reorder_what_is_in_a_file(processor, tmp_path):
    stored = np.arange(2 * 12).reshape(2, 3, 4).astype(np.float32) - 40
    path = write(tmp_path / "vh_vv.tif", stored, ["VH", "VV"])
    straight = processor(stored[::-1].copy(), sensor="s1")["pixel_values"]
    assert torch.equal(processor(path, sensor="s1")["pixel_values"], straight)
    only = processor(path, sensor="s1", bands=["VV"])["pixel_values"]
    assert torch.equal(only, straight[:, :1])


def test_a_file_without_known_names_is_taken_in_order(processor, tmp_path):
    stored = np.full((2, 3, 4), -10, dtype=np.float32)
    stored[1] = -17
    expected = processor(stored, sensor="s1")["pixel_values"]
    for names in (None, ["first", "second"]):
        path = write(tmp_path / "plain.tif", stored, names)
        assert torch.equal(processor(str(path), sensor="s1")["pixel_values"], expected)


@pytest.mark.parametrize("key", ["common_name", "eo:common_name"])
def test_common_names_of_stac_are_band_names(processor, tmp_path, key):
    stored = np.full((2, 3, 4), 500, dtype=np.uint16)
    items = "".join(f'<Item name="{key}" sample="{band}">{name}</Item>' for band, name in enumerate(["nir", "red"]))
    metadata = f"<GDALMetadata>{items}</GDALMetadata>"
    path = tmp_path / "stac.tif"
    tifffile.imwrite(path, stored, planarconfig="separate", extratags=[(42112, 2, len(metadata) + 1, metadata, True)])
    assert read_geotiff(path).bands == ["nir", "red"]
    assert processor(path, sensor="s2", bands=["B04"], offset=0)["pixel_values"].shape == (1, 1, 3, 4)


def test_a_palette_picture_and_an_alpha_channel(processor):
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 4, (6, 6, 3), dtype=np.uint8) * 80)
    expected = processor(colours)["pixel_values"]
    with_alpha = colours.copy()
    with_alpha.putalpha(255)
    assert torch.equal(processor(with_alpha, bands=["red", "green", "blue"])["pixel_values"], expected)
    palette = colours.quantize(256)
    assert torch.equal(processor(palette)["pixel_values"], processor(palette.convert("RGB"))["pixel_values"])


# Invalid pixels


def test_nan_infinity_and_nodata_in_any_band_are_invalid(processor):
    image = np.full((2, 2, 3), -12.0, dtype=np.float32)
    image[0, 0, 0], image[1, 0, 1], image[0, 1, 2], image[1, 1, 0] = np.nan, np.inf, -999.0, -np.inf
    inputs = processor(image, sensor="s1", nodata=-999)
    assert inputs["valid_mask"][0].tolist() == [[False, False, True], [False, True, False]]
    values = inputs["pixel_values"]
    assert (values[:, :, ~inputs["valid_mask"][0]] == 0).all()
    assert values[0, 0, 0, 2].item() == pytest.approx((-12 + 11.76858) / 4.525339, rel=1e-5)


def test_nodata_is_compared_in_the_stored_dtype(processor, tmp_path):
    stored = np.full((13, 2, 2), 3000, dtype=np.uint16)
    stored[5, 0, 1] = 65535
    path = write(tmp_path / "s2.tif", stored, S2_BANDS, nodata=65535)
    assert processor(path, sensor="s2", offset=0)["valid_mask"][0].tolist() == [[True, False], [True, True]]
    # The argument wins over the file; a value that the dtype cannot hold marks nothing.
    for nodata, valid in ((3000, False), (-9999, True), (3000.5, True), (float("nan"), True), (float("inf"), True)):
        mask = processor(path, sensor="s2", offset=0, nodata=nodata, check=False)["valid_mask"]
        assert mask[0, 0, 0].item() is valid
    lowest = float(np.finfo(np.float32).min)
    heights = np.array([[lowest, 5.0]], dtype=np.float32)
    assert processor(heights, sensor="dsm", nodata=-3.4028234663852886e38)["valid_mask"].tolist() == [[[False, True]]]


def test_power_and_amplitude_without_a_logarithm_are_invalid(processor):
    power = np.array([[[0.1, 0.0, -0.1]], [[0.01, 0.02, 0.01]]])
    expected = backscatter(10 * np.log10(power[:, :, 0]))[..., 0]
    for unit, stored in (("power", power), ("amplitude", np.sign(power) * np.sqrt(abs(power)))):
        inputs = processor(stored, sensor="s1", unit=unit)
        assert inputs["valid_mask"].tolist() == [[[True, False, False]]]
        np.testing.assert_allclose(inputs["pixel_values"][0, :, 0, 0].numpy(), np.diag(expected), rtol=1e-4)
        assert (inputs["pixel_values"][0, :, 0, 1:] == 0).all()


def test_an_all_invalid_image_is_all_zero_and_passes_the_check(processor):
    inputs = processor({"s1": np.full((2, 3, 3), np.nan), "dsm": np.full((3, 3), np.nan)})
    for sensor in ("s1", "dsm"):
        assert not inputs["valid_mask"][sensor].any()
        assert (inputs["pixel_values"][sensor] == 0).all()
    assert inputs["reference"]["dsm"].tolist() == [0.0]


def test_a_mask_page_of_a_file_is_respected(processor, tmp_path):
    mask = np.array([[255, 0], [255, 255]], dtype=np.uint8)
    path = write(tmp_path / "masked.tif", np.full((2, 2, 2), -10, np.float32), ["VV", "VH"], mask=mask)
    assert read_geotiff(path).mask.tolist() == [[True, False], [True, True]]
    assert processor(path, sensor="s1")["valid_mask"][0].tolist() == [[True, False], [True, True]]


# Units, scale, offset, reference


def test_gdal_scale_and_offset_of_a_file_are_used_and_arguments_win(processor, tmp_path):
    stored = np.full((2, 2, 2), 3000, dtype=np.uint16)
    # reflectance = stored * 1e-4 - 0.1: the offset of -1000 since baseline 04.00, as GDAL writes it.
    path = write(tmp_path / "s2.tif", stored, ["B02", "B08"], scales=[1e-4, 2e-4], offsets=[-0.1, -0.1])
    bands = ["B08", "B02"]
    golden = reflectance(columns([0.5, 0.2]), [L1C[band] for band in bands])
    values = processor(path, sensor="s2", bands=bands)["pixel_values"]
    np.testing.assert_allclose(values[0, :, :1, :1].numpy(), golden, rtol=1e-5)
    golden = reflectance(columns([0.3, 0.3]), [L1C[band] for band in bands])
    values = processor(path, sensor="s2", bands=bands, scale=1e-4, offset=0)["pixel_values"]
    np.testing.assert_allclose(values[0, :, :1, :1].numpy(), golden, rtol=1e-5)


def test_scale_may_differ_between_images_and_bands(processor):
    pixels, valid = torch.full((2, 2, 1, 1), 100.0), torch.ones(2, 1, 1, dtype=torch.bool)
    per_image = processor.radiometry(pixels, valid, "s1", unit="db", scale=torch.tensor([-0.1, -0.2]))
    np.testing.assert_allclose(per_image.values[:, 0, 0, 0].numpy(), (np.array([-10, -20]) + 11.76858) / 4.525339, 1e-5)
    per_band = processor.radiometry(pixels, valid, "s1", unit="db", scale=torch.tensor([[-0.1, -0.2]]).expand(2, 2))
    golden = backscatter(columns([-10, -20]))[:, 0, 0]
    np.testing.assert_allclose(per_band.values[1, :, 0, 0].numpy(), golden, 1e-5)


def test_values_are_clipped_to_the_range_of_each_band(processor):
    image = np.tile(np.float32([-40, 5, -30]), (2, 1, 1))
    values = processor(image, sensor="s1")["pixel_values"][0, :, 0]
    clipped = np.array([[-25, 0, -25], [-32.5, 0, -30]])
    golden = (clipped - np.array(S1_MEAN)[:, None]) / np.array(S1_STD)[:, None]
    np.testing.assert_allclose(values.numpy(), golden, rtol=1e-5)


@given(heights=st.lists(st.floats(-400, 8000, width=32), min_size=1, max_size=30), hole=st.integers(0, 29))
@settings(max_examples=40, deadline=None)
def test_the_reference_of_a_window_is_the_median_of_its_valid_pixels(heights, hole):
    image = np.array([*heights, 0.0], dtype=np.float32)[None]
    image[0, min(hole, len(heights))] = np.nan
    inputs = MsGFMImageProcessor()(image, sensor="dsm")
    np.testing.assert_allclose(inputs["reference"].numpy(), [np.nanmedian(image)], rtol=1e-5, atol=1e-4)


def test_each_image_of_a_batch_has_its_own_reference(processor):
    images = np.stack([np.full((2, 2), 10.0), np.full((2, 2), 300.0)])
    inputs = processor(list(images), sensor="dsm", reference="window")
    assert inputs["reference"].tolist() == [10.0, 300.0]
    assert (inputs["pixel_values"] == 0).all()


# The way back


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_inverse_gives_back_what_was_stored(data):
    processor = MsGFMImageProcessor()
    sensor = data.draw(st.sampled_from(["rgb", "s2", "s1", "dsm"]))
    names = data.draw(st.permutations(SENSORS[sensor].band_names))
    bands = names[: data.draw(st.integers(1, len(names)))]
    unit, low, high, scale, offset = data.draw(
        st.sampled_from(
            {
                "rgb": [("dn", 0, 255, None, None), ("reflectance", 0, 1, None, None)],
                "s2": [("dn", 1000, 9000, None, -1000), ("reflectance", 0, 1, None, None)],
                "s1": [("db", -24, 0, None, None), ("power", 0.004, 1, None, None), ("amplitude", 70, 900, 1e-3, None)],
                "dsm": [("metres", 0, 500, None, None), ("dn", 0, 100, 2.0, 7.0)],
            }[sensor]
        )
    )
    generator = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    stored = torch.from_numpy(generator.uniform(low, high, (2, len(bands), 3, 4)))
    valid = torch.from_numpy(generator.random((2, 3, 4)) > 0.2)
    given_arguments = {"sensor": sensor, "bands": bands, "unit": unit, "scale": scale, "offset": offset}
    forward = processor.radiometry(stored, valid, **given_arguments)
    back = processor.inverse_radiometry(forward.values, valid, reference=forward.reference, **given_arguments)
    assert torch.equal(back.isnan().any(dim=1), ~valid)
    assert torch.equal(back.isnan().all(dim=1), ~valid)
    kept = valid[:, None].expand_as(stored)
    np.testing.assert_allclose(back[kept].numpy(), stored[kept].numpy(), rtol=2e-4, atol=2e-3 * (high - low))


def test_a_reconstruction_becomes_physical_again(processor):
    rgb = np.random.default_rng(0).integers(0, 256, (3, 4, 4), dtype=np.uint8)
    height = np.arange(16.0).reshape(4, 4) + 100
    height[0, 0] = np.nan
    inputs = processor({"rgb": rgb, "dsm": height})
    output = types.SimpleNamespace(reconstruction=inputs["pixel_values"])
    results = processor.post_process_image_to_image(
        output, unit={"rgb": "dn"}, valid_mask=inputs["valid_mask"], reference=inputs["reference"]
    )
    np.testing.assert_allclose(results["rgb"][0].numpy(), rgb, atol=1e-3)
    np.testing.assert_allclose(results["dsm"][0, 0].numpy(), height, atol=1e-4)
    # A tensor is one sensor; reflectance is the unit of its statistics; without a mask every pixel counts.
    single = processor.post_process_image_to_image(inputs["pixel_values"]["rgb"])
    np.testing.assert_allclose(single[0].numpy(), rgb / 255, atol=1e-5)
    relative = processor.post_process_image_to_image(
        inputs["pixel_values"]["dsm"], sensor="dsm", reference=0.0, valid_mask=inputs["valid_mask"]["dsm"]
    )
    np.testing.assert_allclose(relative[0, 0].numpy(), height - np.nanmedian(height), atol=1e-4)


def test_one_unit_serves_every_sensor_of_a_reconstruction(processor):
    values = {"rgb": torch.zeros(1, 3, 2, 2), "naip": torch.zeros(1, 4, 2, 2)}
    results = processor.post_process_image_to_image(values, unit="dn")
    for sensor in values:
        assert results[sensor][0, :3, 0, 0].tolist() == pytest.approx([255 * mean for mean in IMAGENET_MEAN])


def test_class_maps_at_their_own_size_and_at_a_given_one(processor):
    logits = torch.zeros(2, 3, 2, 2)
    logits[0, 1] = logits[1, 2] = 1.0
    output = types.SimpleNamespace(logits=logits)
    assert [image.unique().tolist() for image in processor.post_process_semantic_segmentation(output)] == [[1], [2]]
    resized = processor.post_process_semantic_segmentation(output, target_sizes=[(5, 7), (3, 2)])
    assert [tuple(image.shape) for image in resized] == [(5, 7), (3, 2)]
    assert resized[1].unique().tolist() == [2]
    with pytest.raises(ValueError, match=r"`target_sizes` must have one size per image \(2\), got 1"):
        processor.post_process_semantic_segmentation(output, target_sizes=[(5, 7)])


# Explain


def test_explain_says_what_happens_to_every_band(processor, sample_data):
    folder = sample_data / "s1s2_terramesh" / "637U_59R_1_3"
    table = processor.explain({"s1": folder / "S1RTC.tif", "s2": folder / "S2L1C.tif"}, offset={"s2": 0})
    assert [row["band"] for row in table] == ["VV", "VH", *S2_BANDS]
    stored, _ = raster(folder / "S1RTC.tif")
    first = table[0]
    assert (first["source"], first["unit"], first["clip"]) == ("VV_dB", "db", (-25.0, 0.0))
    assert first["before"] == pytest.approx((stored[0].min(), np.median(stored[0]), stored[0].max()))
    assert first["clipped"] == pytest.approx(((stored[0] > 0) | (stored[0] < -25)).mean())
    assert first["clipped"] > 0
    assert first["after"][2] == pytest.approx(11.76858 / 4.525339)
    assert table[2]["sensor"] == "s2 l1c"
    assert (table[2]["scale"], table[2]["mean"]) == pytest.approx((1e-4, 0.1605575))
    text = str(table)
    assert text.splitlines()[0].split()[:4] == ["sensor", "band", "source", "unit"]
    assert "VV_dB" in text
    assert len(text.splitlines()) == 16


def test_explain_counts_invalid_pixels_and_shows_what_the_check_refuses(processor):
    image = np.full((2, 2, 4), 0.5, dtype=np.float32)
    image[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="at most 0"):
        processor(image, sensor="s1")
    rows = processor.explain(image, sensor="s1")
    assert [row["invalid"] for row in rows] == [0.125, 0.125]
    assert [row["clipped"] for row in rows] == [1.0, 1.0]
    assert rows[0]["source"] == "[0]"
    heights = processor.explain(np.full((2, 2), np.nan), sensor="dsm")
    assert heights[0]["before"] is None
    assert heights[0]["invalid"] == 1.0


# Settings, saving and loading


def test_the_defaults_are_the_four_sensors_and_rgb():
    processor = MsGFMImageProcessor()
    assert list(processor.sensors) == ["dsm", "rgb", "s1", "s2"]
    assert processor.inputs == {"rgb": ["red", "green", "blue"]}
    assert processor.backend == "torch"
    assert processor.model_input_names == ["pixel_values", "valid_mask"]
    alone = MsGFMImageProcessor(sensors={"s1": SENSORS["s1"].to_dict()})
    assert alone.inputs == {"s1": ["VV", "VH"]}


def test_inputs_say_what_a_bare_image_is_by_any_alias():
    processor = MsGFMImageProcessor(inputs={"s2": ["red", "B3", "blue"]}, offset=0)
    assert processor.inputs == {"s2": ["B04", "B03", "B02"]}
    stored = np.array([1000, 2000, 3000], dtype=np.uint16)[:, None, None]
    golden = reflectance(stored * 1e-4, [L1C[band] for band in ("B04", "B03", "B02")])
    assert_golden(processor(stored), golden)


def test_settings_travel_through_preprocessor_config_json(tmp_path):
    processor = MsGFMImageProcessor(inputs={"s1": ["VH"]}, unit="power", nodata=0)
    processor.add_sensor(SensorSpec("own", (BandSpec("a", 0.5, 0.2),), "reflectance", "reflectance"))
    processor.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["image_processor_type"] == "MsGFMImageProcessor"
    loaded = MsGFMImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    image = np.random.default_rng(0).uniform(0, 0.1, (1, 4, 4))
    assert torch.equal(loaded(image)["pixel_values"], processor(image)["pixel_values"])
    assert loaded(np.zeros((1, 2, 2)))["valid_mask"].any().item() is False
    # A setting can be replaced on loading, and by an argument.
    assert MsGFMImageProcessor.from_pretrained(tmp_path, unit="db").unit == "db"
    decibels = processor(10 * np.log10(image), unit="db")["pixel_values"]
    np.testing.assert_allclose(decibels.numpy(), processor(image)["pixel_values"].numpy(), atol=1e-4)


def test_every_setting_is_a_field_of_the_kwargs():
    settings = set(MsGFMImageProcessorKwargs.__annotations__)
    processor = MsGFMImageProcessor()
    assert all(hasattr(processor, name) for name in settings)
    assert MsGFMImageProcessor.valid_kwargs is MsGFMImageProcessorKwargs


def test_a_failed_save_leaves_the_earlier_file_whole(tmp_path, monkeypatch, processor):
    processor.save_pretrained(tmp_path)
    before = (tmp_path / "preprocessor_config.json").read_bytes()

    def full_disk(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MsGFMImageProcessor, "to_json_string", full_disk)
    with pytest.raises(OSError, match="No space left"):
        processor.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").read_bytes() == before


def test_a_processor_belongs_to_the_model_with_its_sensors(tmp_path):
    sensors = {sensor: SENSORS[sensor].to_dict() for sensor in ("s1", "s2")}
    config = types.SimpleNamespace(sensors=sensors, inputs={"s1": ["VV"]})
    processor = MsGFMImageProcessor.from_config(config)
    assert processor.inputs == {"s1": ["VV"]}
    processor.check_config(config)
    # config.json knows lists, not tuples: still the same sensors.
    processor.check_config(types.SimpleNamespace(sensors=json.loads(json.dumps(sensors)), inputs={"s2": ["B04"]}))
    with pytest.raises(ValueError, match=r"`inputs` .* must name the same bands of 's1', got \['VV'\] and \['VH'\]"):
        processor.check_config(types.SimpleNamespace(sensors=sensors, inputs={"s1": ["VH"]}))
    (tmp_path / "config.json").write_text(json.dumps({"sensors": sensors}))
    processor.save_pretrained(tmp_path)
    MsGFMImageProcessor.from_pretrained(tmp_path)
    sensors["s2"]["bands"][0]["mean"] += 0.1
    sensors["dsm"] = SENSORS["dsm"].to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"sensors": sensors}))
    message = "`sensors` of the processor and of the model must be equal, got different dsm, s2"
    with pytest.raises(ValueError, match=message):
        processor.check_config(types.SimpleNamespace(sensors=sensors, inputs={}))
    with pytest.raises(ValueError, match=message):
        processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MsGFMImageProcessor.from_pretrained(tmp_path)


def test_a_new_sensor_is_preprocessed_like_any_other(processor):
    hyper = SensorSpec("hyper", (BandSpec("a", 0.5, 0.25), BandSpec("b", 0.1, 0.1)), "reflectance", "dn", scale=0.01)
    processor.add_sensor(hyper.to_dict())
    values = processor(np.array([50, 10])[:, None, None], sensor="hyper")["pixel_values"]
    assert values.flatten().tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    with pytest.raises(ValueError, match="`spec` must have an id of its own, got 'hyper'"):
        processor.add_sensor(hyper)


def test_expected_bands_in_another_order_come_out_in_the_models(processor):
    rgb = np.random.default_rng(0).integers(0, 256, (3, 8, 9), dtype=np.uint8)
    expected = processor(rgb, sensor="rgb")["pixel_values"]
    reversed_bands = processor(rgb[::-1].copy(), sensor="rgb", bands=["B", "green", "red"])["pixel_values"]
    assert torch.equal(reversed_bands, expected)
    rows = processor.explain(rgb[::-1].copy(), sensor="rgb", bands=["B", "green", "red"])
    assert [row["band"] for row in rows] == ["red", "green", "blue"]
    # A real choice keeps the order it is named in.
    two = processor(rgb[1::-1].copy(), sensor="rgb", bands=["green", "red"])["pixel_values"]
    assert torch.equal(two, expected[:, [1, 0]])


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("scale", 0, "`scale` of sensor 'rgb' must be finite and not 0, got 0"),
        ("scale", float("nan"), "`scale` of sensor 'rgb' must be finite and not 0, got nan"),
        ("scale", "x", "`scale` of sensor 'rgb' must be a number, got 'x'"),
        ("offset", "x", "`offset` of sensor 'rgb' must be a number, got 'x'"),
        ("nodata", "x", "`nodata` of sensor 'rgb' must be a number, got 'x'"),
        ("bands", "red", r"`bands` of sensor 'rgb' must be a list of names, got 'red'. Use \['red'\]"),
    ],
)
def test_options_that_are_no_numbers_or_lists(processor, option, value, message):
    with pytest.raises(ValueError, match=message):
        processor(np.ones((3, 8, 9), np.uint8), sensor="rgb", **{option: value})


def test_what_stock_pipelines_do(processor):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    one = processor(images=picture, return_tensors="pt").to(torch.bfloat16)
    assert one["pixel_values"].dtype == torch.bfloat16
    assert one["valid_mask"].dtype == torch.bool
    many = processor(images=[picture, picture], return_tensors="pt")
    assert many["pixel_values"].shape == (2, 3, 6, 8)
    batch = pad_collate_fn(None, processor)([processor(images=picture) for _ in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 6, 8)
    assert batch["valid_mask"].shape == (3, 6, 8)
    assert batch["valid_mask"].all()


def test_a_dictionary_of_sensors_moves_and_casts_as_a_whole(processor):
    heights = np.full((4, 4), 1234.5)
    inputs = processor({"s1": np.full((2, 4, 4), -10.0), "dsm": heights}).to(torch.bfloat16)
    assert {tensor.dtype for tensor in inputs["pixel_values"].values()} == {torch.bfloat16}
    # bfloat16 has eight bits for a number: a height would be off by metres.
    assert inputs["reference"]["dsm"].tolist() == [1234.5]
    assert processor(heights, sensor="dsm").to(torch.bfloat16)["reference"].tolist() == [1234.5]
    assert {tensor.dtype for tensor in inputs["valid_mask"].values()} == {torch.bool}
    assert {tensor.device.type for tensor in inputs.to("meta")["valid_mask"].values()} == {"meta"}
    assert inputs["reference"]["dsm"].device.type == "meta"


def test_numpy_comes_back_where_it_is_asked_for(processor):
    inputs = processor(np.zeros((3, 2, 2), dtype=np.uint8), return_tensors="np")
    assert isinstance(inputs["pixel_values"], np.ndarray)
    assert inputs["valid_mask"].dtype == np.bool_


# Refusals

RGB = np.full((3, 4, 4), 100, dtype=np.uint8)
S1 = np.full((2, 4, 4), -10.0, dtype=np.float32)


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        (RGB[:2], {}, r"`images` for sensor 'rgb' must have 3 bands \(red, green, blue\), got shape \(2, 4, 4\)"),
        (RGB[0], {}, r"`images` for sensor 'rgb' must have 3 bands .* got shape \(4, 4\)\. Select bands by name"),
        ([RGB[None]], {}, r"`images` for sensor 'rgb' must have 3 bands .* got shape \(1, 3, 4, 4\)"),
        (S1, {"sensor": "s1", "bands": ["VV"]}, r"`images` for sensor 's1' must have 1 bands \(VV\), got shape"),
        (RGB[:, :, :3], {}, r"`images` for sensor 'rgb' must show where the 3 bands are, got shape \(3, 4, 3\)"),
        (RGB, {"input_data_format": "first"}, "`input_data_format` must be 'channels_first' or .* got 'first'"),
        (RGB, {"input_data_format": "channels_last"}, "`images` for sensor 'rgb' must have 3 bands"),
        (RGB, {"return_tensors": "tf"}, "`return_tensors` must be 'pt' or 'np', got 'tf'"),
        (RGB, {"sensor": "rbg"}, r"`sensor` must be one of .* got 'rbg'\. Did you mean 'rgb'"),
        (S1, {"sensor": "s1", "bands": ["VV", "HH"]}, "`bands` of sensor 's1' must be among VV, VH, got 'HH'"),
        (S1, {"sensor": "s1", "unit": "reflectance"}, "`unit` of sensor 's1' must be one of dn, power, .* got 'refl"),
        (S1, {"sensor": "s1", "level": "l1c"}, "`level` of sensor 's1' must be one of none"),
        (S1, {"sensor": "s1", "reference": 5.0}, "`reference` of sensor 's1' must be None, got 5.0"),
        (S1, {"sensor": "s1", "reference": "window"}, "`reference` of sensor 's1' must be None, got 'window'"),
        (RGB[0], {"sensor": "dsm", "reference": "scene"}, "`reference` of sensor 'dsm' must be 'window' or .* 'scene'"),
        ({"s1": S1}, {"sensor": "s1"}, r"`sensor` must not be given with \{sensor: image\}, got 's1'"),
        ({}, {}, r"`images` must name at least one sensor, got \{\}"),
        ({"s1": S1, "rgb": RGB}, {"unit": "db"}, r"`unit` must be \{sensor: value\} for several sensors \(s1, rgb\)"),
        ({"s1": S1}, {"unit": {"s2": "dn"}}, r"`unit` must be for the sensors given \(s1\), got s2"),
        ({"s1": S1, "rgb": RGB[:, :2]}, {}, r"must share one pixel grid, got .*'rgb': \(2, 4\).*gdalwarp"),
        ({"s1": [S1, S1], "rgb": RGB}, {}, r"must share one number of images, got \{'s1': \(2,\), 'rgb': \(1,\)\}"),
        (
            [RGB, RGB[:, :2]],
            {},
            r"`images` for sensor 'rgb' must have one size to form a batch, got \[\(2, 4\), \(4, 4\)\]",
        ),
        ([RGB, RGB.astype(np.int16)], {}, "`images` for sensor 'rgb' must have one dtype to form a batch"),
        ([], {}, "`images` for sensor 'rgb' must hold at least one image, got none"),
        (np.zeros((0, 3, 4, 4)), {}, "`images` for sensor 'rgb' must hold at least one image, got none"),
        (RGB[:, :0], {}, r"`images` for sensor 'rgb' must have at least one pixel, got shape \(3, 0, 4\)"),
        (5, {}, "`images` for sensor 'rgb' must be arrays, tensors, PIL images or paths .* got int"),
        ([{"rgb": RGB}], {}, "`images` for sensor 'rgb' must be arrays, .* got dict"),
        (S1.astype(np.complex64), {"sensor": "s1"}, "must be integers up to 64 bits or floats, got complex64"),
        (RGB > 5, {}, "must be integers up to 64 bits or floats, got bool"),
        (Image.new("CMYK", (4, 4)), {}, "must be PIL images of mode RGB, .* got 'CMYK'"),
        (Image.new("L", (4, 4)), {}, r"must have 3 bands \(red, green, blue\), got a file with 1 unnamed bands"),
        (
            Image.new("RGBA", (4, 4)),
            {},
            "must have the bands red, green, blue, got a file with red, green, blue, alpha",
        ),
    ],
)
def test_input_that_is_not_as_described_is_refused(processor, images, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(images, **arguments)


def test_a_bare_image_needs_a_sensor_where_there_are_several():
    processor = MsGFMImageProcessor(inputs={"s1": ["VV", "VH"], "rgb": ["red", "green", "blue"]})
    with pytest.raises(ValueError, match="`sensor` must be given for a bare image, as `inputs` has s1, rgb"):
        processor(RGB)
    assert processor(RGB, sensor="rgb")["pixel_values"].shape == (1, 3, 4, 4)


def test_sentinel_2_numbers_without_an_offset_are_refused(processor, sample_data):
    message = r"`offset` of sensor 's2' must be known for unit 'dn', got None.*offset=0, or offset=-1000"
    with pytest.raises(ValueError, match=message):
        processor(np.full((13, 2, 2), 3000, dtype=np.uint16), sensor="s2")
    with pytest.raises(ValueError, match=message):
        processor(sample_data / "s1s2_terramesh" / "637U_59R_1_3" / "S2L1C.tif", sensor="s2")
    with pytest.raises(ValueError, match=message):
        processor.post_process_image_to_image(torch.zeros(1, 13, 2, 2), sensor="s2", unit="dn")


def test_numbers_of_a_sensor_without_a_scale_are_refused():
    own = SensorSpec("own", (BandSpec("a", 0.5, 0.2),), "reflectance", "dn")
    processor = MsGFMImageProcessor(sensors={"own": own})
    with pytest.raises(ValueError, match="`scale` of sensor 'own' must be known for unit 'dn', got None"):
        processor(np.ones((1, 2, 2)))


@pytest.mark.parametrize(
    ("sensor", "value", "arguments", "message"),
    [
        ("s1", 0.2, {}, "must have a median of at most 0 .db. in unit 'db', got 0.2 in band VV.*`unit='power'`"),
        (
            "s1",
            3000.0,
            {"unit": "amplitude"},
            "must have a median of at most 0 .* in unit 'amplitude', got 69.54 in band VV",
        ),
        ("s1", -12.0, {"unit": "power"}, "must have a median of 0 or more in unit 'power', got -12 .*`unit='db'`"),
        ("s1", -12.0, {"unit": "amplitude"}, "must have a median of 0 or more in unit 'amplitude', got -12"),
        ("s2", 0.3, {"offset": 0}, "must have digital numbers with a median of 0, .* got 0.3 .*`unit='reflectance'`"),
        ("rgb", 0.4, {}, "must have digital numbers .* in unit 'dn', got 0.4 in band red"),
        (
            "s2",
            3000.0,
            {"unit": "reflectance"},
            "must have a median of -0.05 to 2 .reflectance. .* got 3000 .*`unit='dn'`",
        ),
        ("s2", 300.0, {"offset": -1000}, "must have a median of -0.05 to 2 .* in unit 'dn', got -0.07"),
        ("rgb", 3000.0, {}, "must have a median of -0.05 to 2 .* got 11.76 in band red"),
        ("dsm", -9999.0, {}, "must have a median of -500 to 9000 .metres. in unit 'metres', got -9999 .*`nodata=`"),
        ("dsm", 32767.0, {}, "must have a median of -500 to 9000"),
    ],
)
def test_implausible_values_are_refused_unless_the_check_is_off(processor, sensor, value, arguments, message):
    image = np.full((len(SENSORS[sensor].bands), 5, 4), value, dtype=np.float32)
    with pytest.raises(ValueError, match=rf"`pixels` for sensor '{sensor}' {message}"):
        processor(image, sensor=sensor, **arguments)
    assert processor(image, sensor=sensor, check=False, **arguments)["pixel_values"].shape[-2:] == (5, 4)


def test_the_check_looks_at_the_median_of_the_valid_pixels_of_each_image(processor):
    bright = S1.copy()
    bright[:, 0] = 5.0  # a few bright scatterers are no reason to refuse
    processor(bright, sensor="s1")
    filled = np.full((4, 4), 100.0)
    filled[:3] = -9999
    processor(filled, sensor="dsm", nodata=-9999)
    with pytest.raises(ValueError, match=r"got 0.5 in band VH"):
        processor([S1, np.stack([S1[0], np.full((4, 4), 0.5, np.float32)])], sensor="s1")
    dark = np.zeros((3, 4, 4))
    processor(dark)  # night is plausible


def test_radiometry_and_its_inverse_refuse_a_wrong_number_of_bands(processor):
    valid = torch.ones(4, 8, 8, dtype=torch.bool)
    message = r"`pixel_values` for sensor 's1' must have 2 bands \(VV, VH\), got shape \(4, 3, 8, 8\)\. Select bands"
    for method in (processor.radiometry, processor.inverse_radiometry, processor.check):
        with pytest.raises(ValueError, match=message):
            method(torch.zeros(4, 3, 8, 8), valid, "s1")


def test_the_inverse_needs_the_reference_of_a_sensor_that_has_one(processor):
    heights = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"`reference` of sensor 'dsm' must be given if and only if .* got None"):
        processor.post_process_image_to_image(heights, sensor="dsm")
    with pytest.raises(ValueError, match=r"`reference` of sensor 's1' must be given if and only if .* got 3.0"):
        processor.inverse_radiometry(torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2).bool(), "s1", reference=3.0)


def test_settings_that_nothing_reads_are_refused():
    with pytest.raises(
        ValueError, match=r"`MsGFMImageProcessor` has the settings sensors, .* got do_resize, image_mean"
    ):
        MsGFMImageProcessor(do_resize=True, image_mean=[0.5])
    with pytest.raises(TypeError, match="do_resize"):
        MsGFMImageProcessor()(RGB, do_resize=True)
    with pytest.raises(ValueError, match="`sensors` must be keyed by the id of each sensor, got 'radar' for 's1'"):
        MsGFMImageProcessor(sensors={"radar": SENSORS["s1"]})
    with pytest.raises(ValueError, match="`sensor` must be one of s1, got 's2'"):
        MsGFMImageProcessor(sensors={"s1": SENSORS["s1"]}, inputs={"s2": ["B02"]})


def test_files_whose_bands_do_not_fit_are_refused(processor, sample_data, tmp_path):
    worldcereal = sample_data / "s1s2_worldcereal_belgium"
    with pytest.raises(ValueError, match=r"must have the bands B01, .* got a file with B02, .* Select bands by name"):
        processor(worldcereal / "S2L2A_202103.tif", sensor="s2", offset=0)
    with pytest.raises(
        ValueError, match=r"`bands` of sensor 's2' must occur once in the file, got 'B01' 0 times in B02"
    ):
        processor(worldcereal / "S2L2A_202103.tif", sensor="s2", offset=0, bands=["B02", "B01"])
    with pytest.raises(
        ValueError, match=r"must have 1 bands \(height\), got a file with 2 bands \(elevation_m, slope\)"
    ):
        processor(worldcereal / "DEM.tif", sensor="dsm")
    twice = write(tmp_path / "twice.tif", np.full((2, 2, 2), 3000, np.uint16), ["B02", "blue"])
    with pytest.raises(ValueError, match="must occur once in the file, got 'B02' 2 times in B02, blue"):
        processor(twice, sensor="s2", offset=0, bands=["B02"])


# GeoTIFF files


@pytest.mark.parametrize(
    "profile",
    [
        {},
        {"interleave": "band", "compress": "deflate", "predictor": 2},
        {"interleave": "pixel", "compress": "lzw", "tiled": True, "blockxsize": 16, "blockysize": 16},
        {"interleave": "band", "compress": "zstd", "tiled": True, "blockxsize": 32, "blockysize": 16},
        {"ENDIANNESS": "BIG"},
        {"BIGTIFF": "YES", "interleave": "band"},
        {"interleave": "pixel", "overviews": True, "mask": np.full((40, 33), 255, np.uint8)},
    ],
    ids=["plain", "planar", "tiles", "planar tiles", "big endian", "big tiff", "overviews and mask"],
)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
def test_a_geotiff_is_read_as_gdal_reads_it(tmp_path, profile, dtype):
    stored = (np.random.default_rng(0).random((5, 40, 33)) * 250).astype(dtype)
    path = write(tmp_path / "image.tif", stored, [f"b{i}" for i in range(5)], nodata=7, **profile)
    file = read_geotiff(path)
    np.testing.assert_array_equal(file.pixels, raster(path)[0])
    assert file.pixels.dtype == np.dtype(dtype)
    assert (file.bands, file.nodata, file.scales, file.scale) == ([f"b{i}" for i in range(5)], 7.0, None, None)


@pytest.mark.parametrize("shape", [(1, 1, 1), (13, 1, 1), (3, 1, 5), (1, 4, 1)])
@pytest.mark.parametrize("interleave", ["band", "pixel"])
def test_small_files_keep_their_axes(tmp_path, shape, interleave):
    stored = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    path = write(tmp_path / "small.tif", stored, interleave=interleave)
    np.testing.assert_array_equal(read_geotiff(path).pixels, stored)


def test_bands_may_lie_in_pages(tmp_path):
    stored = np.arange(3 * 4 * 5, dtype=np.uint16).reshape(3, 4, 5)
    path = tmp_path / "pages.tif"
    with tifffile.TiffWriter(path) as file:
        for page in stored:
            file.write(page, photometric="minisblack")
    np.testing.assert_array_equal(read_geotiff(path).pixels, stored)
    assert read_geotiff(path).bands is None


def test_scale_and_offset_are_those_of_gdal(tmp_path):
    path = write(tmp_path / "one.tif", np.ones((2, 2, 2), np.uint16), scales=[0.5, 0.5], offsets=[-0.1, 3.0])
    file = read_geotiff(path)
    assert (file.scale, file.scales, file.offsets) == (0.5, [0.5, 0.5], [-0.1, 3.0])
    with pytest.raises(ValueError, match=r"`offsets` of a file must agree to be read as one, got \[-0.1, 3.0\]"):
        file.offset  # noqa: B018 -- the property raises


def test_the_georeference_can_be_written_to_another_file(tmp_path, sample_data):
    source = sample_data / "rgb_dsm_autzen" / "val" / "r0512_c0276_dsm.tif"
    file = read_geotiff(source)
    assert isinstance(file, GeoTiff)
    copy = tmp_path / "copy.tif"
    extratags = [(code, *entry, True) for code, entry in file.tags.items()]
    tifffile.imwrite(copy, file.pixels[0], extratags=extratags, metadata=None)
    with rasterio.open(source) as first, rasterio.open(copy) as second:
        assert second.transform == first.transform
        assert second.crs == first.crs


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("compress", ["none", "deflate"])
def test_a_truncated_file_is_refused(tmp_path, share, compress):
    stored = np.random.default_rng(0).integers(0, 60000, (3, 64, 64), dtype=np.uint16)
    path = write(tmp_path / "cut.tif", stored, compress=compress)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"`path` must .*cut.tif.* (again|image)\."):
        read_geotiff(path)


def test_a_file_with_flipped_bits_is_refused(tmp_path):
    stored = np.random.default_rng(0).integers(0, 60000, (3, 64, 64), dtype=np.uint16)
    path = write(tmp_path / "flipped.tif", stored, compress="deflate")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"`path` must be a readable TIFF, got .*flipped.tif.*PIL"):
        read_geotiff(path)


def test_what_is_no_single_image_is_refused(tmp_path, monkeypatch):
    text = tmp_path / "text.tif"
    text.write_text("not a picture")
    with pytest.raises(ValueError, match=r"`path` must be a readable TIFF, got .*text.tif"):
        read_geotiff(text)
    with pytest.raises(FileNotFoundError, match=r"`path` must be an existing file, got .*missing.tif"):
        read_geotiff(tmp_path / "missing.tif")
    sizes = tmp_path / "sizes.tif"
    with tifffile.TiffWriter(sizes) as file:
        file.write(np.zeros((4, 4), np.uint8))
        file.write(np.zeros((5, 4), np.uint8))
    with pytest.raises(
        ValueError, match=r"`path` must hold one image with bands of one size and type, got .*sizes.tif"
    ):
        read_geotiff(sizes)
    overview = tmp_path / "overview.tif"
    tifffile.imwrite(overview, np.zeros((4, 4), np.uint8), subfiletype=1)
    with pytest.raises(ValueError, match=r"`path` must hold an image, got .*overview.tif"):
        read_geotiff(overview)
    monkeypatch.setattr(image_processing_msgfm, "tifffile", None)
    with pytest.raises(ImportError, match="`read_geotiff` needs tifffile"):
        read_geotiff(sizes)
