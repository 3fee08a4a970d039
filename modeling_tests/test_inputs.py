"""One grammar of inputs, and files that say more or less about their bands, masks and factors."""

import dataclasses
import math

import numpy as np
import pyproj
import pytest
import rasterio

from geotiff_files import ORIGIN, write_geotiff
from msgfm_hf.data.geotiff import (
    corner_distance,
    has_true_metres,
    held_nodata,
    physical_factors,
    read_header,
    read_image,
    same_grid,
    write_mask,
)
from msgfm_hf.data.inputs import Input, input_header, input_levels, parse_input, parse_inputs, read_input


def ramp(bands, dtype="uint8", size=(6, 8)):
    return (np.arange(bands * size[0] * size[1]) % 200).reshape(bands, *size).astype(dtype)


# The grammar


def test_every_option_is_read():
    given = parse_input("s2=chips/{key}.tif,bands=red+B08,unit=dn,scale=1e-4,offset=-1000,level=l2a,nodata=0")
    assert given == Input("s2", "chips/{key}.tif", ("B04", "B08"), "dn", 1e-4, -1000.0, "l2a", 0.0)
    assert parse_input("rgb=a=b.tif") == Input("rgb", "a=b.tif")


@pytest.mark.parametrize(
    "text, said",
    [
        ("s1", "`input` must be SENSOR=PATH.*, got 's1'"),
        ("=a.tif", "`input` must be SENSOR=PATH"),
        ("s1=", "`input` must be SENSOR=PATH"),
        ("s1=a.tif,unti=db", "`input` takes the options .* got 'unti=db' .* Did you mean 'unit'?"),
        ("s1=a.tif,db", "`input` takes the options bands, unit, .* got 'db'"),
        ("s1=a.tif,bands=HH", "`bands` of sensor 's1' must be among VV, VH, got 'HH'"),
        ("s1=a.tif,unit=decibel", "`unit` of sensor 's1' must be one of dn, .* got 'decibel'"),
        ("s1=a.tif,level=l2a", "`level` of sensor 's1' must be one of none, got 'l2a'"),
        ("s2=a.tif,offset=abc", "`offset` must be a number, got 'abc'"),
        ("s9=a.tif", "`sensor` must be one of .*, got 's9'"),
    ],
)
def test_text_that_is_not_of_the_grammar(text, said):
    with pytest.raises(ValueError, match=said):
        parse_input(text)


def test_inputs_keep_their_order_and_come_once():
    assert list(parse_inputs(["s2=b.tif", "dsm=c.tif", "s1=a.tif"])) == ["s2", "dsm", "s1"]
    with pytest.raises(ValueError, match="`input` must name each sensor once, got 's1' twice"):
        parse_inputs(["s1=a.tif", "s1=b.tif"])
    with pytest.raises(ValueError, match="`input` must be given at least once, got none"):
        parse_inputs([])


def test_an_offset_that_no_product_has():
    for offset in ("0", "-1000"):
        assert parse_input(f"s2=a.tif,offset={offset}").offset == float(offset)
    assert parse_input("s2=a.tif,offset=-100,scale=1e-5").offset == -100
    assert parse_input("landsat8=a.tif,offset=7").offset == 7
    with pytest.raises(ValueError, match=r"`offset` of sensor 's2' must be 0, or -1000 .*, got 1000 in 's2"):
        parse_input("s2=a.tif,offset=1000")


def test_levels_must_be_said_where_statistics_differ():
    assert input_levels(parse_inputs(["s1=a.tif", "s2=b.tif,level=l1c"])) == {"s2": "l1c"}
    with pytest.raises(ValueError, match="`level` of sensor 's2' must be one of l1c, l2a, got none. Add level=l1c or"):
        input_levels(parse_inputs(["s2=b.tif"]))


# Names of bands


def test_descriptions_name_the_bands(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", ramp(2, "float32") - 300, ["VH_dB", "VV"])
    image = read_input(parse_input(f"s1={path}"))
    assert image.bands == ["VH", "VV"] and np.array_equal(image.pixels, ramp(2, "float32") - 300)
    image = read_input(parse_input(f"s1={path},bands=VV"))
    assert image.bands == ["VV"] and np.array_equal(image.pixels, ramp(2, "float32")[1:] - 300)


def test_colours_name_the_bands_of_a_picture_and_alpha_is_its_mask(tmp_path):
    pixels = ramp(4)
    pixels[3] = 255
    pixels[3, 0, :3] = 0
    path = write_geotiff(tmp_path / "a.tif", pixels, photometric="RGB", alpha="yes")
    image = read_input(parse_input(f"rgb={path}"))
    assert image.bands == ["red", "green", "blue"]
    assert np.argwhere(~image.valid_mask()).tolist() == [[0, 0], [0, 1], [0, 2]]
    # Pixels with data are as stored, and the value of the others is one that none of these has.
    assert np.array_equal(image.pixels[:, 1:], pixels[:3, 1:])
    assert image.nodata not in pixels[:3, pixels[3] > 0]
    image = read_input(parse_input(f"rgb={path},bands=blue"))
    assert image.bands == ["blue"] and image.valid_mask().sum() == 45


def test_a_named_band_that_is_marked_as_alpha_is_a_band(sample_data):
    path = next((sample_data / "naip_urban_trees/images").glob("*.tif"))
    with rasterio.open(path) as file:
        assert file.colorinterp[3].name == "alpha" and file.descriptions[3] == "NIR"
        stored = file.read()
    image = read_input(parse_input(f"naip={path}"))
    assert image.bands == ["red", "green", "blue", "nir"] and image.nodata is None
    assert np.array_equal(image.pixels, stored)


def test_a_band_the_caller_names_is_a_band_too(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", ramp(4), photometric="RGB", alpha="yes")
    assert read_header(path).alpha == 3
    unnamed = write_geotiff(tmp_path / "b.tif", ramp(3), colours=["gray", "undefined", "alpha"])
    image = read_input(parse_input(f"rgb={unnamed},bands=blue+green+red"))
    assert image.bands == ["blue", "green", "red"] and image.nodata is None
    assert np.array_equal(image.pixels, ramp(3))


def test_names_of_the_caller_overrule_colours_that_nobody_gave(tmp_path):
    """GDAL calls the bands of any three or four bytes per pixel red, green, blue and alpha."""
    three = write_geotiff(tmp_path / "a.tif", ramp(3))
    assert read_header(three).bands == ["red", "green", "blue"] and read_header(three).coloured
    image = read_input(parse_input(f"s2={three},level=l2a,offset=0,bands=B02+B03+B04"))
    assert image.bands == ["B02", "B03", "B04"] and np.array_equal(image.pixels, ramp(3))
    image = read_input(parse_input(f"naip={three},bands=nir+red+green"))
    assert image.bands == ["nir", "red", "green"] and np.array_equal(image.pixels, ramp(3))
    described = read_header(write_geotiff(tmp_path / "b.tif", ramp(3), ["B04", "B03", "B02"]))
    assert not described.coloured and not described.named(["B02", "B03", "B04"]).coloured


def test_near_infrared_in_the_fourth_byte_is_asked_for(tmp_path):
    four = write_geotiff(tmp_path / "a.tif", ramp(4))
    assert read_header(four).alpha == 3
    with pytest.raises(
        ValueError,
        match=r"`bands` must name the 4 bands of .*a.tif in file order, got the colours red, green, blue, alpha. "
        r"Add ,bands=red\+green\+blue\+nir to --input naip=",
    ):
        read_input(parse_input(f"naip={four}"))
    image = read_input(parse_input(f"naip={four},bands=red+green+blue+nir"))
    assert image.bands == ["red", "green", "blue", "nir"] and image.nodata is None
    assert np.array_equal(image.pixels, ramp(4))
    # Three names of four bands: the fourth is alpha, as GDAL says.
    assert read_input(parse_input(f"naip={four},bands=nir+red+green")).pixels.shape[0] == 3
    picture = read_input(parse_input(f"rgb={four}"))
    assert picture.bands == ["red", "green", "blue"]
    assert np.array_equal(picture.valid_mask(), ramp(4)[3] != 0)
    with pytest.raises(ValueError, match="`names` must name the 4 bands of .*a.tif, got the colours red, green, blue"):
        read_image(four, "naip")


def test_colours_do_not_tell_what_a_sensor_of_other_bands_holds(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", ramp(3))
    with pytest.raises(ValueError, match=r"must name the 3 bands of .*got the colours red.* Add ,bands=NAME\+NAME"):
        read_input(parse_input(f"naip={path}"))
    assert read_input(parse_input(f"rgb={path}")).bands == ["red", "green", "blue"]


def test_a_file_without_names_says_what_to_type(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", ramp(2, "float32") - 300)
    with pytest.raises(
        ValueError, match=r"`bands` must name the 2 bands of .*a.tif .* Add ,bands=VV\+VH to --input s1="
    ):
        read_input(parse_input(f"s1={path}"))
    assert read_input(parse_input(f"s1={path},bands=VH+VV")).bands == ["VH", "VV"]
    twelve = write_geotiff(tmp_path / "b.tif", ramp(12, "uint16"))
    with pytest.raises(ValueError, match=r"bands=B01\+B02.*B09\+B11\+B12 to --input s2="):
        read_input(parse_input(f"s2={twelve},level=l2a,offset=0"))
    three = write_geotiff(tmp_path / "c.tif", ramp(3, "uint16"))
    with pytest.raises(ValueError, match=r"Add ,bands=NAME\+NAME\+NAME to --input s2="):
        read_input(parse_input(f"s2={three},level=l2a,offset=0"))


def test_a_sensor_of_one_band_needs_no_name(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", ramp(1, "float32"), ["surface_m"])
    assert read_input(parse_input(f"dsm={path}")).bands == ["height"]


def test_bands_the_sensor_does_not_know_are_left_out_by_name_only(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", ramp(3, "uint16"), ["B04", "SCL", "B08"])
    with pytest.raises(
        ValueError, match=r"`bands` must choose among .* got also SCL. Add ,bands=B04\+B08 to --input s2="
    ):
        read_input(parse_input(f"s2={path},level=l2a,offset=0"))
    image = read_input(parse_input(f"s2={path},level=l2a,offset=0,bands=B08+B04"))
    assert image.bands == ["B08", "B04"] and np.array_equal(image.pixels, ramp(3, "uint16")[[2, 0]])


def test_names_must_be_as_many_as_bands(tmp_path):
    header = read_header(write_geotiff(tmp_path / "a.tif", ramp(2)))
    with pytest.raises(ValueError, match="`names` must name the 2 bands of .*a.tif, got VV. Give them"):
        header.named(["VV"])


# Factors, masks and places


def test_options_override_the_file(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", ramp(1, "uint16"), ["B04"], nodata=9)
    image = read_input(parse_input(f"s2={path},level=l2a,offset=-1000,scale=0.001,nodata=0"))
    assert (image.units, image.scale, image.offset, image.nodata) == ("dn", 0.001, -1.0, 0.0)
    image = read_input(parse_input(f"s2={path},level=l2a,unit=reflectance"))
    assert (image.units, image.scale, image.offset, image.nodata) == ("reflectance", 1.0, 0.0, 9.0)
    with pytest.raises(ValueError, match="`scale` and `offset_dn` of sensor 's2' must be known .* add offset=0 or"):
        read_input(parse_input(f"s2={path},level=l2a"))


def test_bands_of_several_scales_are_refused(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", ramp(2), ["VV", "VH"])
    with rasterio.open(path, "r+") as file:
        file.scales = (0.1, 0.2)
    with pytest.raises(ValueError, match=r"`scale` must be one number for all bands of .*a.tif, got \[0.1, 0.2\]"):
        read_image(path, "s1")


def test_the_scale_of_a_band_that_is_not_used_does_not_matter(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", ramp(3, "uint16"), ["SCL", "B04", "B08"])
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (1.0, 1e-4, 1e-4), (0.0, -0.1, -0.1)
    image = read_input(parse_input(f"s2={path},level=l2a,bands=B08+B04"))
    assert (image.scale, image.offset) == pytest.approx((1e-4, -0.1))
    assert physical_factors(read_header(path), "s2", picked=[0])[1] == 1.0
    with pytest.raises(ValueError, match="`scale` must be one number for all bands"):
        physical_factors(read_header(path), "s2")


def test_alpha_counts_beside_a_nodata_value(tmp_path):
    pixels = ramp(4) + 1
    pixels[3] = 255
    pixels[3, :3] = 0
    path = write_geotiff(tmp_path / "a.tif", pixels, photometric="RGB", alpha="yes", nodata=0)
    header = read_header(path)
    assert header.masked and header.nodata == 0
    valid = read_input(parse_input(f"rgb={path}")).valid_mask()
    assert valid[3:].all() and not valid[:3].any()


def test_a_nodata_value_that_no_pixel_can_have_is_none(tmp_path):
    mask = np.full((6, 8), 255, np.uint8)
    mask[0, 0] = 0
    path = write_geotiff(tmp_path / "a.tif", ramp(3) + 1, mask=mask)
    image = read_input(parse_input(f"rgb={path},nodata=-9999"))
    assert np.argwhere(~image.valid_mask()).tolist() == [[0, 0]] and image.nodata == 0
    for value, dtype in ((-9999, "uint8"), (256, "uint8"), (0.5, "int16"), (np.nan, "int16"), (-np.inf, "int32")):
        assert held_nodata(value, dtype) is None
    for value, dtype in ((255.0, "uint8"), (-9999, "int16"), (-9999, "float32"), (None, "uint8"), (None, "float32")):
        assert held_nodata(value, dtype) == value


def test_a_mask_takes_a_value_that_is_free():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    valid = np.ones((16, 16), bool)
    assert write_mask(pixels, valid, None, "a.tif") == (pixels, None)
    for hidden in (0, 255, 77):  # the value of the only hidden pixel is the only free one
        holed = valid.copy()
        holed[divmod(hidden, 16)] = False
        written, nodata = write_mask(pixels, holed, None, "a.tif")
        assert nodata == hidden and np.array_equal(written, pixels)
    twice = np.concatenate([pixels, np.zeros_like(pixels)], axis=1)
    with pytest.raises(ValueError, match="`nodata` must be given to keep the mask of a.tif, got None, and .* of uint8"):
        write_mask(twice, np.arange(32)[:, None] * np.ones(16) < 16, None, "a.tif")
    signed, nodata = write_mask(np.array([[[0, 32767, -32768, 5]]], np.int16), np.array([[1, 1, 1, 0]], bool), None, "")
    assert nodata == 1 and signed[0, 0, 3] == 1


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "a.tif").write_text("not an image")
    with pytest.raises(ValueError, match="`path` must be a readable GeoTIFF, got .*a.tif"):
        input_header(parse_input(f"dsm={tmp_path / 'a.tif'}"))


def test_grids_are_compared_by_shape_place_and_pixel(tmp_path):
    one = read_header(write_geotiff(tmp_path / "a.tif", ramp(1)))
    assert one.gsd == 10 and one.bounds == (ORIGIN[0], ORIGIN[1] - 60, ORIGIN[0] + 80, ORIGIN[1])
    same = write_geotiff(tmp_path / "b.tif", ramp(2), origin=(ORIGIN[0] + 0.05, ORIGIN[1]))
    shifted = write_geotiff(tmp_path / "c.tif", ramp(1), origin=(ORIGIN[0] + 5, ORIGIN[1]))
    coarse = write_geotiff(tmp_path / "d.tif", ramp(1), gsd=10.1)
    elsewhere = write_geotiff(tmp_path / "e.tif", ramp(1), crs="EPSG:32632")
    larger = write_geotiff(tmp_path / "f.tif", ramp(1, size=(6, 9)))
    placeless = write_geotiff(tmp_path / "g.tif", ramp(1), crs=None)
    found = [same_grid(one, read_header(path)) for path in (same, shifted, coarse, elsewhere, larger, placeless)]
    assert found == [True, False, False, False, False, True]


@pytest.mark.parametrize("angle", [0.0, 1e-9, 0.1, 45, 90])
def test_a_little_rotation_does_not_make_pixels_small(angle):
    turned = rasterio.Affine.translation(*ORIGIN) @ rasterio.Affine.rotation(angle) @ rasterio.Affine.scale(2, -3)
    moved = rasterio.Affine.translation(0.1, 0) @ turned
    assert corner_distance(turned.to_gdal(), (64, 48), moved.to_gdal(), (64, 48)) == pytest.approx(0.05)


def test_feet_and_degrees_become_metres(tmp_path):
    feet = read_header(write_geotiff(tmp_path / "a.tif", ramp(1), crs="EPSG:2994", gsd=2.0))
    assert feet.gsd == pytest.approx(0.6096)
    degrees = read_header(write_geotiff(tmp_path / "b.tif", ramp(1), crs="EPSG:4326", origin=(3, 51), gsd=0.001))
    assert degrees.gsd == pytest.approx(true_side(3.004, 50.997, 0.001, 0.001), rel=3e-3)
    assert dataclasses.replace(degrees, crs=None).gsd is None


def true_side(lon, lat, width, height):
    """Side in metres of a square as large as a box of degrees, on the ellipsoid (Karney's geodesics, by pyproj)."""
    west, east, south, north = lon - width / 2, lon + width / 2, lat - height / 2, lat + height / 2
    area, _ = pyproj.Geod(ellps="WGS84").polygon_area_perimeter([west, east, east, west], [south, south, north, north])
    return math.sqrt(abs(area))


@pytest.mark.parametrize(
    "crs", ["EPSG:4326", "EPSG:4979", "EPSG:4807", "EPSG:3857", "EPSG:900913", "EPSG:3395", "EPSG:3994", "EPSG:32662"]
)
def test_pixels_far_from_the_equator_are_measured_on_the_ground(tmp_path, crs):
    projection = pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True)
    (left, right), (bottom, top) = projection.transform([5.0, 5.001], [60.0, 60.001])
    header = read_header(
        write_geotiff(tmp_path / "a.tif", ramp(1), crs=crs, origin=(left, top), gsd=(right - left) / 8)
    )
    # The pixel is square in the units of the file.
    height = 0.001 * (right - left) / (top - bottom)
    assert header.gsd == pytest.approx(true_side(5.0005, 60.0005, 0.001, height) / 8, rel=5e-3)
    assert not has_true_metres(header.crs)


def test_metres_and_feet_are_true_where_the_projection_keeps_them():
    for crs in ("EPSG:32631", "EPSG:2994", "EPSG:27700", "EPSG:3035", "EPSG:25832+7837"):
        assert has_true_metres(rasterio.crs.CRS.from_user_input(crs))


def test_heights_make_no_other_grid(tmp_path):
    flat = read_header(write_geotiff(tmp_path / "a.tif", ramp(1), crs="EPSG:25832"))
    high = read_header(write_geotiff(tmp_path / "b.tif", ramp(1), crs="EPSG:25832+7837"))
    assert flat.crs != high.crs and same_grid(flat, high) and same_grid(high, flat)
    other = read_header(write_geotiff(tmp_path / "c.tif", ramp(1), crs="EPSG:25833+7837"))
    assert not same_grid(flat, other)


def test_a_local_system_is_no_place_on_the_map(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", ramp(3), crs='LOCAL_CS["site",UNIT["metre",1]]')
    header = read_header(path)
    assert header.crs is None and header.gsd is None and header.transform is None
    image = read_input(parse_input(f"rgb={path}"))
    assert image.crs is None and np.array_equal(image.pixels, ramp(3))


def test_heights_may_be_in_feet_where_coordinates_are(tmp_path):
    pixels = np.full((1, 4, 4), 300, np.float32)
    path = write_geotiff(tmp_path / "a.tif", pixels, ["height"], crs="EPSG:2263", gsd=3)
    with pytest.raises(ValueError, match=r"`unit` of sensor 'dsm' must be given .*a.tif in US survey foot of 0.3048"):
        read_input(parse_input(f"dsm={path}"))
    assert read_input(parse_input(f"dsm={path},unit=metres")).scale == 1
    feet = read_input(parse_input(f"dsm={path},scale=0.3048006096"))
    assert feet.units == "metres" and feet.scale == 0.3048006096
    scaled = write_geotiff(tmp_path / "b.tif", pixels, ["height"], crs="EPSG:2263", gsd=3)
    with rasterio.open(scaled, "r+") as file:
        file.scales = [0.3048]
    assert read_input(parse_input(f"dsm={scaled}")).scale == 0.3048


def test_floats_of_sentinel_2_are_told_to_be_reflectance(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", np.full((1, 4, 4), 0.2, np.float32), ["B02"])
    with pytest.raises(ValueError, match="`scale` and `offset_dn` of sensor 's2' must .* add unit=reflectance"):
        read_input(parse_input(f"s2={path}"))
    assert read_input(parse_input(f"s2={path},unit=reflectance")).units == "reflectance"
    assert read_input(parse_input(f"s2={path},offset=0")).units == "dn"
