"""One grammar of inputs, and files that say more or less about their bands, masks and factors."""

import dataclasses

import numpy as np
import pytest
import rasterio

from geotiff_files import ORIGIN, write_geotiff
from msgfm_hf.data.geotiff import read_header, read_image, same_grid, write_mask
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


def test_feet_and_degrees_become_metres(tmp_path):
    feet = read_header(write_geotiff(tmp_path / "a.tif", ramp(1), crs="EPSG:2994", gsd=2.0))
    assert feet.gsd == pytest.approx(0.6096)
    degrees = read_header(write_geotiff(tmp_path / "b.tif", ramp(1), crs="EPSG:4326", origin=(3, 51), gsd=0.001))
    assert degrees.gsd == pytest.approx(111.195)
    assert dataclasses.replace(degrees, crs=None).gsd is None
