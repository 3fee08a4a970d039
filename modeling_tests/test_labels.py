"""Labels from tables, masks and shapes, on the grids of the images."""

import json

import geopandas
import numpy as np
import pandas
import pyogrio
import pytest
import shapely

from geotiff_files import ORIGIN, UTM, write_geotiff
from msgfm_hf.data.geotiff import read_header
from msgfm_hf.data.inputs import parse_input, read_input
from msgfm_hf.data.inspect import inspect_shards
from msgfm_hf.data.labels import (
    MaskLabels,
    TableLabels,
    VectorLabels,
    check_grid,
    class_map,
    hide_invalid,
    read_key_table,
)
from msgfm_hf.data.shards import ShardImage, ShardRow, ShardSource, ShardWriter, shard_schema

X, Y = ORIGIN


def write_table(path, text):
    path.write_text(text)
    return path


@pytest.fixture
def grid(tmp_path):
    """6 x 8 pixels of 10 m."""
    return read_header(write_geotiff(tmp_path / "chip.tif", np.zeros((1, 6, 8), np.float32), ["height"]))


# Tables


def test_the_column_of_keys_is_found(tmp_path):
    path = write_table(tmp_path / "a.csv", "\ufeffchip,key,cover\nx1,a,crop\nx2,b, town \n")
    assert read_key_table(path, ["a", "b"]).column == "key"
    table = read_key_table(path, ["x2", "x9"])
    assert table.column == "chip"
    assert table.values("cover", ["x1", "x2", "x9"]) == {"x2": "town"}
    with pytest.raises(ValueError, match=r"`column` must be one of those of .*a.csv, chip, key, cover, got 'class'"):
        table.values("class", ["x1"])


def test_other_marks_between_columns_and_names_of_files(tmp_path):
    for mark in (";", "\t"):
        path = write_table(tmp_path / "a.csv", f"key{mark}cover\na{mark}0,5\n")
        with pytest.raises(ValueError, match="`labels` must have commas between columns, got '.*' in .*a.csv"):
            read_key_table(path, ["a"])
    path = write_table(tmp_path / "b.csv", "file,cover\ns1/a.tif,crop\n")
    with pytest.raises(ValueError, match="Add a column `key`: 'file' has names of files, such as 's1/a.tif'"):
        read_key_table(path, ["a"])


def test_the_column_in_which_most_keys_occur_wins(tmp_path):
    """The folds 1 to 5 are also tiles; `fold` comes first."""
    lines = [f"{number % 5 + 1},{number},crop" for number in range(1, 21)]
    path = write_table(tmp_path / "a.csv", "\n".join(["fold,tile,cover", *lines]))
    table = read_key_table(path, [str(number) for number in range(1, 31)])
    assert table.column == "tile" and table.said == f"{path}: 20 of 30 keys found in column 'tile'"
    assert TableLabels(table, "cover", ["7"]).said[0] == table.said
    path = write_table(tmp_path / "b.csv", "other,name\na,b\nb,a\n")
    assert read_key_table(path, ["a", "b"]).column == "other"


def test_tables_as_other_programs_write_them(tmp_path):
    """pandas writes an index without a name; spreadsheets leave empty rows and spaces."""
    path = write_table(tmp_path / "a.csv", ",key , cover\n0,a,crop\n1,b, town\n,,\n,,\n3,c,x,beyond\n")
    table = read_key_table(path, ["a", "b"])
    assert table.columns == ["key", "cover"]
    assert table.values("cover", ["a", "b", ""]) == {"a": "crop", "b": "town"}


def test_a_key_that_nobody_asked_for_may_come_twice(tmp_path):
    path = write_table(tmp_path / "a.csv", "key,cover\na,crop\nz,crop\nz,town\n")
    assert read_key_table(path, ["a", "b"]).values("cover", "ab") == {"a": "crop"}


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "key,cover\nc,crop\n",
            "`labels` must have a column with the keys .* such as 'a', got .* with key='c', cover=",
        ),
        ("key,cover\n", "`labels` must have a column with the keys .* with no rows"),
        ("", "`labels` must have a column with the keys .* with no rows"),
        ("key,cover\na,crop\na,town\n", "`labels` must name each key once, got 'a' twice in 'key' of .*a.csv"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        read_key_table(write_table(tmp_path / "a.csv", text), ["a", "b"])


def test_a_table_that_is_none(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00key")
    for path in (tmp_path / "a.csv", tmp_path / "missing.csv"):
        with pytest.raises(ValueError, match="`labels` must be a readable CSV, got .*. Save it as UTF-8"):
            read_key_table(path, ["a"])


TABLE = "key,cover,tags,trees,mixed\na,crop,wet;flat,3,1\nb,town,flat| dry,4.5,x\nc,,,,\n"


@pytest.fixture
def table(tmp_path):
    return read_key_table(write_table(tmp_path / "a.csv", TABLE), "abc")


def test_a_class_a_list_and_a_number_are_told_apart(table, grid):
    classes = TableLabels(table, "cover", "abc")
    assert classes.kind == "class" and "read as class" in classes.said[-1]
    assert [classes.read(key, grid) for key in "abc"] == [(["crop"], None), (["town"], None), (None, None)]
    assert [classes.has(key) for key in "abc"] == [True, True, False]
    lists = TableLabels(table, "tags", "abc")
    assert lists.kind == "list" and lists.read("b", grid) == (["flat", "dry"], None)
    numbers = TableLabels(table, "trees", "abc")
    labels, target = numbers.read("b", grid)
    assert numbers.kind == "number" and labels is None and target.bands == ["trees"]
    assert target.pixels.dtype == np.float32 and target.pixels.tolist() == [[[4.5]]]
    assert TableLabels(table, "mixed", "abc").kind == "class"


def test_the_type_can_be_told(table, grid):
    assert TableLabels(table, "trees", "abc", "class").read("a", grid) == (["3"], None)
    assert TableLabels(table, "tags", "abc", "class").read("a", grid) == (["wet;flat"], None)
    with pytest.raises(ValueError, match="`label` must be a number, got 'x' for key 'b'. Correct .*a.csv"):
        TableLabels(table, "mixed", "abc", "number")


def test_a_column_without_values(table):
    with pytest.raises(
        ValueError, match="`label` must be a column with values for the keys .*, got 'cover' of .*a.csv"
    ):
        TableLabels(table, "cover", "c")


# Masks


def test_masks_keep_their_ids_and_nodata_is_255(tmp_path, grid):
    ids = np.arange(48, dtype=np.int16).reshape(1, 6, 8)
    labels = MaskLabels({"a": str(write_geotiff(tmp_path / "a.tif", ids, nodata=7))})
    _, target = labels.read("a", grid)
    assert target.pixels.dtype == np.uint8 and target.nodata == 255
    assert np.array_equal(target.pixels, np.where(ids == 7, 255, ids))
    assert target.transform == list(grid.transform.to_gdal()) and target.crs == UTM and target.gsd == 10
    assert labels.read("b", grid) == (None, None) and not labels.has("b")


def test_masks_of_floats_and_with_a_mask_of_their_own(tmp_path, grid):
    ids = np.full((1, 6, 8), 254.0, np.float32)
    ids[0, 0, 0] = np.nan
    mask = np.full((6, 8), 255, np.uint8)
    mask[1, 1] = 0
    labels = MaskLabels({"a": str(write_geotiff(tmp_path / "a.tif", ids, mask=mask))})
    pixels = labels.read("a", grid)[1].pixels
    assert np.argwhere(pixels[0] == 255).tolist() == [[0, 0], [1, 1]] and (pixels == 254).sum() == 46


@pytest.mark.parametrize("value", [-1, 256, 1.5])
def test_masks_of_other_values(tmp_path, grid, value):
    path = write_geotiff(tmp_path / "a.tif", np.full((1, 6, 8), value, np.float32))
    with pytest.raises(ValueError, match=r"`labels` must be class ids from 0 to 254, .* got values from .* in .*a.tif"):
        MaskLabels({"a": str(path)}).read("a", grid)


def test_masks_that_cannot_be_used(tmp_path, grid):
    path = write_geotiff(tmp_path / "a.tif", np.zeros((2, 6, 8), np.uint8))
    with pytest.raises(ValueError, match=r"`labels` must be maps of one band, got 2 in .*a.tif"):
        MaskLabels({"a": str(path)}).read("a", grid)
    path = write_geotiff(tmp_path / "b.tif", np.zeros((1, 6, 8), np.uint8), origin=(X + 10, Y))
    with pytest.raises(ValueError, match=r"one pixel grid, got .*b.tif with 6 x 8 .*origin \(600010, 5700000\)"):
        MaskLabels({"a": str(path)}).read("a", grid)
    noise = np.random.default_rng(0).integers(0, 200, (1, 6, 8), dtype=np.uint8)
    path = write_geotiff(tmp_path / "c.tif", noise, compress="deflate")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20] + bytes(20))
    with pytest.raises(ValueError, match=r"`labels` must be readable, got .*c.tif"):
        MaskLabels({"a": str(path)}).read("a", grid)


def test_grids_that_differ_name_the_way_out(tmp_path, grid):
    other = read_header(write_geotiff(tmp_path / "b.tif", np.zeros((1, 3, 4), np.uint8), crs=None))
    with pytest.raises(
        ValueError, match=r"b.tif with 3 x 4 pixels, no place on the map, and .*msgfm shards scenes.*gdal"
    ):
        check_grid(other, grid)


def test_the_mask_is_named_where_it_is_at_fault(tmp_path, grid):
    path = str(write_geotiff(tmp_path / "b.tif", np.zeros((1, 3, 4), np.uint8)))
    with pytest.raises(ValueError, match="`labels` must be images on one pixel grid, got .*b.tif with 3 x 4 pixels"):
        MaskLabels({"a": path}).check("a", grid)


def test_there_is_no_label_where_no_image_has_data(grid):
    target = class_map(np.full((6, 8), 3, np.uint8), grid)
    one, other = (np.ones((1, 6, 8), np.float32) for _ in range(2))
    one[0, :2] = np.nan
    other[0, 1:] = np.nan
    images = [ShardImage(pixels, ["height"], "metres") for pixels in (one, other)]
    hidden = hide_invalid(target, images[:1])
    assert (hidden.pixels[0, :2] == 255).all() and (hidden.pixels[0, 2:] == 3).all() and hidden.pixels.dtype == np.uint8
    # Row 0 is seen by the other image.
    assert np.flatnonzero((hide_invalid(target, images).pixels[0] == 255).all(axis=1)).tolist() == [1]


# Shapes


def shapes(path, geometries, crs=UTM, **columns):
    geopandas.GeoDataFrame(columns, geometry=geometries, crs=crs).to_file(path)
    return path


def test_polygons_are_drawn_where_pixel_centres_lie_in_them(tmp_path, grid):
    # Columns 0 to 2 of rows 0 and 1 to the centre; then the square over columns 2 to 4 that is drawn over it.
    drawn = [shapely.box(X, Y - 20, X + 30, Y), shapely.box(X + 24, Y - 60, X + 50, Y - 14)]
    path = shapes(tmp_path / "a.gpkg", drawn, crop=["wheat", "maize"])
    labels = VectorLabels(path, "crop")
    assert labels.classes == ["maize", "wheat"] and "classes: 0 maize, 1 wheat" in labels.said
    expected = np.full((6, 8), 255)
    expected[:2, :3] = 1
    expected[1:, 2:5] = 0
    assert np.array_equal(labels.read("a", grid)[1].pixels[0], expected)


def test_points_are_one_pixel_and_numbers_are_ordered_by_value(tmp_path, grid):
    points = [shapely.Point(X + 5, Y - 5), shapely.Point(X + 79, Y - 59), shapely.Point(X + 500, Y)]
    labels = VectorLabels(shapes(tmp_path / "a.gpkg", points, code=[10, 9, 100]), "code")
    assert labels.classes == ["9", "10", "100"]
    pixels = labels.read("a", grid)[1].pixels[0]
    assert np.argwhere(pixels != 255).tolist() == [[0, 0], [5, 7]] and pixels[0, 0] == 1 and pixels[5, 7] == 0


def test_geojson_is_wgs84_and_meets_the_grid_of_the_chip(tmp_path, grid):
    """A polygon over the right half of the chip, written in degrees by pyproj."""
    box = geopandas.GeoSeries([shapely.box(X + 40, Y - 100, X + 100, Y + 40)], crs=UTM).to_crs("EPSG:4326").iloc[0]
    feature = {"type": "Feature", "properties": {"kind": "water"}, "geometry": shapely.geometry.mapping(box)}
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    pixels = VectorLabels(path, "kind").read("a", grid)[1].pixels[0]
    assert (pixels[:, 4:] == 0).all() and (pixels[:, :4] == 255).all()


def test_shapes_without_a_class_are_left_out_and_said(tmp_path):
    points = [shapely.Point(X, Y), shapely.Point(X, Y), None]
    labels = VectorLabels(shapes(tmp_path / "a.gpkg", points, crop=["rye", None, "oats"]), "crop")
    assert labels.classes == ["rye"] and "1 shapes of 1 classes" in labels.said[0] and "2 without" in labels.said[0]


def test_a_table_beside_the_layer_of_shapes_is_no_layer(tmp_path):
    """QGIS keeps its styles in one."""
    path = shapes(tmp_path / "a.gpkg", [shapely.Point(X, Y)], crop=["rye"])
    pyogrio.write_dataframe(pandas.DataFrame({"style": ["red"]}), path, layer="layer_styles")
    assert VectorLabels(path, "crop").classes == ["rye"]


def test_shapes_that_cannot_be_used(tmp_path, grid):
    point = [shapely.Point(X, Y)]
    with pytest.raises(ValueError, match="`labels` must be a CSV, a mask glob .* got .*missing.gpkg"):
        VectorLabels(tmp_path / "missing.gpkg", "crop")
    with pytest.warns(UserWarning, match="'crs' was not provided"):
        nowhere = shapes(tmp_path / "a.shp", point, crs=None, crop=["rye"])
    with pytest.raises(ValueError, match="`labels` must have a coordinate system, got none in .*a.shp. .*is WGS84"):
        VectorLabels(nowhere, "crop")
    path = shapes(tmp_path / "b.gpkg", point, crop=["rye"])
    with pytest.raises(ValueError, match="`label` must be an attribute of .*b.gpkg, crop, got 'cover'"):
        VectorLabels(path, "cover")
    lines = shapes(tmp_path / "c.gpkg", [shapely.LineString([(X, Y), (X + 9, Y)])], crop=["rye"])
    with pytest.raises(ValueError, match="`labels` must be points or polygons, got LineString in .*c.gpkg"):
        VectorLabels(lines, "crop")
    with pytest.raises(ValueError, match="`label` must name from 1 to 255 classes, got 256 in 'crop'"):
        VectorLabels(shapes(tmp_path / "d.gpkg", point * 256, crop=[f"crop{n}" for n in range(256)]), "crop")
    two = shapes(tmp_path / "two.gpkg", point, crop=["rye"])
    geopandas.GeoDataFrame({"crop": ["oats"]}, geometry=point, crs=UTM).to_file(two, layer="last_year")
    with pytest.raises(ValueError, match="`labels` must have one layer of shapes, got two, last_year in .*two.gpkg"):
        VectorLabels(two, "crop")
    (tmp_path / "empty.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    with pytest.raises(ValueError, match="`labels` must have points or polygons, got none in .*empty.geojson"):
        VectorLabels(tmp_path / "empty.geojson", "crop")
    placeless = read_header(write_geotiff(tmp_path / "e.tif", np.zeros((1, 6, 8), np.uint8), crs=None))
    with pytest.raises(ValueError, match=r"`labels` from shapes must meet images with a place .* got none in .*e.tif"):
        VectorLabels(path, "crop").read("a", placeless)


# Names of classes in shards


def test_shards_carry_the_names_of_classes(tmp_path, grid):
    path = shapes(tmp_path / "a.gpkg", [shapely.box(X, Y - 60, X + 40, Y)], crop=["rye"])
    labels = VectorLabels(path, "crop")
    image = read_input(parse_input(f"dsm={grid.path}"))
    with ShardWriter(tmp_path / "out", "fields", ["dsm"], classes=labels.classes) as writer:
        for key, split in (("a", "train"), ("b", "val")):
            row = ShardRow(
                key, "fields", split, key, {"dsm": image}, labels=["rural"], target=labels.read(key, grid)[1]
            )
            writer.write(row)
    assert ShardSource(tmp_path / "out/fields").classes == ["rye"]
    report = inspect_shards(tmp_path / "out")
    assert "classes: 0 rye" in report and "map val: rye 50 %, unlabelled 50 %" in report
    assert "labels train: rural 1; 0 rows without" in report


def test_masks_without_names_are_reported_by_id(tmp_path, grid):
    image = read_input(parse_input(f"dsm={grid.path}"))
    pixels = np.full((6, 8), 7, np.uint8)
    pixels[:, :2], pixels[0, 7] = 4, 255
    with ShardWriter(tmp_path / "out", "fields", ["dsm"]) as writer:
        writer.write(ShardRow("a", "fields", "train", "a", {"dsm": image}, target=class_map(pixels, grid)))
        writer.write(ShardRow("b", "fields", "val", "b", {"dsm": image}))
    report = inspect_shards(tmp_path / "out")
    assert "map train: id 4 25 %, id 7 72.9 %, unlabelled 2.08 %" in report


def test_more_classes_than_ids():
    with pytest.raises(ValueError, match="`classes` must be at most 255 names, got 256"):
        shard_schema(["dsm"], classes=[str(number) for number in range(256)])


@pytest.mark.parametrize("something", ["NA", "none", "null"])
def test_words_for_nothing_may_be_classes_and_countries(tmp_path, something):
    table = read_key_table(write_table(tmp_path / "t.csv", f"key,cover\na,crop\nb,{something}\n"), ["a", "b"])
    assert table.values("cover", ["a", "b"]) == {"a": "crop", "b": something}


@pytest.mark.parametrize("kind", [None, "number"])
def test_among_numbers_words_for_nothing_are_nothing(tmp_path, kind):
    table = read_key_table(write_table(tmp_path / "t.csv", "key,mass\na,1.5\nb,NA\nc,null\n"), ["a", "b", "c"])
    labels = TableLabels(table, "mass", ["a", "b", "c"], kind)
    assert labels.kind == "number" and [labels.has(key) for key in "abc"] == [True, False, False]
    words = read_key_table(write_table(tmp_path / "w.csv", "key,mass\na,NA\n"), ["a"])
    assert TableLabels(words, "mass", ["a"]).kind == "class"


@pytest.mark.parametrize("nothing", ["nan", "NaN", ""])
def test_what_numpy_and_spreadsheets_write_for_nothing_is_no_class(tmp_path, nothing):
    path = write_table(tmp_path / "t.csv", f"key,cover\na,crop\nb,{nothing}\n")
    labels = TableLabels(read_key_table(path, ["a", "b"]), "cover", ["a", "b"])
    assert labels.kind == "class" and labels.has("a") and not labels.has("b")


def test_keys_without_images_are_told(tmp_path):
    path = write_table(tmp_path / "t.csv", "key,cover\na,crop\nghost,crop\n")
    assert read_key_table(path, ["a"]).said.endswith("1 of its keys have no images (ghost)")


@pytest.mark.parametrize("ids", [("1", "2"), ("1.0", "7.0")])
def test_whole_numbers_may_be_classes_or_amounts(tmp_path, ids):
    path = write_table(tmp_path / "t.csv", f"key,cover\na,{ids[0]}\nb,{ids[1]}\n")
    table = read_key_table(path, ["a", "b"])
    with pytest.raises(ValueError, match="`label_type` must say whether whole numbers are classes or amounts, got"):
        TableLabels(table, "cover", ["a", "b"])
    assert TableLabels(table, "cover", ["a", "b"], "class").read("a", None) == ([ids[0]], None)
    assert TableLabels(table, "cover", ["a", "b"], "number").numbers == {"a": float(ids[0]), "b": float(ids[1])}
