"""Synthetic scenes: the same every time, in the units they claim, and each sensor a view of the same landscape."""

import dataclasses
import shutil

import numpy as np
import pytest
from rasterio.warp import transform_bounds
from scipy.ndimage import uniform_filter
from scipy.spatial import cKDTree

from msgfm_hf.data.shards import ShardSource
from msgfm_hf.data.synthetic import CLASSES, SOURCES, make_scene, make_synthetic_shards
from msgfm_hf.model.sensors import SENSORS

SENSOR_IDS = ("rgb", "s2", "s1", "dsm")


@pytest.fixture(scope="module")
def scene():
    return make_scene(seed=7, size=192, gsd=10.0)


@pytest.fixture(scope="module")
def places():
    """Fine scenes to learn from and, after them, others to be judged on."""
    return [make_scene(seed, size=128, gsd=1.0) for seed in range(16)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return folder, make_synthetic_shards(folder, seed=3, scenes=4, image_size=32)


def physical(image):
    return image.pixels.astype(np.float64) * image.scale + image.offset


def normalised(image, sensor):
    """As the model sees it: clipped, relative to the window's median where the sensor wants that, z-scored."""
    spec = SENSORS[sensor]
    values = physical(image)
    for band, plane in zip(spec.bands, values, strict=True):
        if band.clip:
            np.clip(plane, *band.clip, out=plane)
    if spec.reference == "window":
        values -= np.median(values)
    mean, std = (np.array(statistic)[:, None, None] for statistic in spec.statistics())
    return (values - mean) / std


def of_class(scene, sensor, *classes):
    """Median physical value per band of the pixels of these classes."""
    codes = [CLASSES.index(name) for name in classes]
    inside = np.isin(scene.labels.pixels[0], codes)
    return dict(zip(SENSORS[sensor].band_names, np.median(physical(scene.images[sensor])[:, inside], 1), strict=True))


@pytest.mark.parametrize("gsd", [1.0, 10.0])
def test_the_same_seed_gives_the_same_scene(gsd):
    first, again, other = (make_scene(seed, size=64, gsd=gsd) for seed in (11, 11, 12))
    for sensor in SENSOR_IDS:
        np.testing.assert_array_equal(first.images[sensor].pixels, again.images[sensor].pixels)
        assert (first.images[sensor].pixels != other.images[sensor].pixels).mean() > 0.5
    np.testing.assert_array_equal(first.labels.pixels, again.labels.pixels)
    assert first.bounds == again.bounds != other.bounds


def test_a_sensor_does_not_depend_on_the_others(scene):
    for sensor in SENSOR_IDS:
        alone = make_scene(seed=7, size=192, gsd=10.0, sensors=(sensor,))
        assert list(alone.images) == [sensor]
        np.testing.assert_array_equal(alone.images[sensor].pixels, scene.images[sensor].pixels)


@pytest.mark.parametrize(
    ("sensor", "dtype", "units", "low", "high"),
    [
        ("rgb", "uint8", "dn", 0, 1),
        ("s2", "uint16", "dn", 0, 1),
        ("s1", "float32", "db", -40, 10),
        ("dsm", "float32", "metres", 0, 900),
    ],
)
@pytest.mark.parametrize("size", [32, 97])
def test_images_have_the_type_and_range_they_claim(sensor, dtype, units, low, high, size):
    scene = make_scene(seed=1, size=size, gsd=3.0, sensors=(sensor,))
    image = scene.images[sensor]
    assert image.pixels.shape == (len(SENSORS[sensor].bands), size, size)
    assert image.pixels.dtype == dtype
    assert (image.units, image.bands, image.gsd) == (units, SENSORS[sensor].band_names, 3.0)
    values = physical(image)
    assert np.isfinite(values).all()
    assert low <= values.min() < values.max() <= high
    assert values.std(axis=(1, 2)).min() > 0
    assert scene.terrain.shape == scene.cloud_mask.shape == (size, size)


def test_sentinel_2_is_level_1c_in_digital_numbers(scene):
    image = scene.images["s2"]
    assert (image.scale, image.offset_dn) == (pytest.approx(1e-4), pytest.approx(-1000))
    assert image.valid_mask().all()
    vegetation, water = of_class(scene, "s2", "forest"), of_class(scene, "s2", "water")
    # Red edge, dark water in the infrared, air that brightens the blue, absorption by water vapour, empty cirrus band.
    assert vegetation["B08"] > 4 * vegetation["B04"]
    assert water["B02"] > water["B04"] > water["B11"]
    assert vegetation["B09"] < 0.6 * vegetation["B8A"]
    assert physical(image)[SENSORS["s2"].index(["cirrus"])].max() < 0.005


def test_radar_backscatter_and_speckle(scene):
    water, forest, built = (of_class(scene, "s1", name) for name in ("water", "forest", "built"))
    assert water["VV"] < forest["VV"] - 9 and forest["VV"] < built["VV"] - 2
    for values in (water, forest, built):
        assert 3 < values["VV"] - values["VH"] < 9
    # Speckle of 8 looks on a uniform surface: variance of power / mean^2 = 1/8.
    power = 10 ** (physical(scene.images["s1"])[0] / 10)[scene.labels.pixels[0] == CLASSES.index("water")]
    assert power.mean() ** 2 / power.var() == pytest.approx(8, rel=0.15)


def test_heights_are_those_of_what_stands_there():
    scene = make_scene(seed=5, size=192, gsd=1.0, sensors=("dsm",))
    height = scene.images["dsm"].pixels[0] - scene.terrain
    labels = scene.labels.pixels[0]
    inside = {name: height[labels == code] for code, name in enumerate(CLASSES)}
    for name in ("water", "road", "grass"):
        assert np.abs(inside[name]).max() < 1.5, name
    assert inside["crops"].max() < 4
    assert 2 < np.median(inside["bare"]) < 6
    assert 15 < np.median(inside["forest"]) < 27 and inside["forest"].min() > 8
    assert inside["built"].min() > 7 and inside["built"].max() < 30
    water = scene.terrain[labels == CLASSES.index("water")]
    assert water.max() == water.min() == scene.terrain.min()


def test_every_class_is_present_in_every_scene_of_usual_size(scene):
    assert scene.labels.pixels.dtype == np.uint8 and scene.labels.pixels.shape == (1, 192, 192)
    shares = np.bincount(scene.labels.pixels.ravel(), minlength=len(CLASSES)) / scene.labels.pixels.size
    assert len(shares) == len(CLASSES) and shares.min() > 0.005


def test_labels_lie_on_the_pixels_they_name(scene):
    """Moving the labels by a few pixels makes them explain the images worse, whatever the sensor."""
    labels = scene.labels.pixels[0]

    def explained(image, labels):
        classes = np.unique(labels)
        spread = sum(image[:, labels == code].std(1) * (labels == code).mean() for code in classes)
        return (spread / image.std((1, 2))).mean()

    for sensor in SENSOR_IDS:
        # Terrain, which has no classes, dominates heights on a coarse grid.
        image = physical(scene.images[sensor]) - (scene.terrain if sensor == "dsm" else 0)
        here = explained(image, labels)
        for shift in ((3, 0), (-3, 0), (0, 3), (0, -3)):
            assert here < 0.95 * explained(image, np.roll(labels, shift, (0, 1))), (sensor, shift)


def test_sun_and_shadow_come_from_the_surface():
    """North-west of a tall building lies its shadow: the sun stands in the south-east."""
    scene = make_scene(seed=5, size=192, gsd=1.0, sensors=("rgb", "dsm"))
    surface, road = scene.images["dsm"].pixels[0], scene.labels.pixels[0] == CLASSES.index("road")
    # Rise of the surface within 3 and within 30 pixels towards the south-east.
    rise = np.stack([np.roll(surface, (-step, -step), (0, 1)) - surface for step in range(1, 31)])
    inner = np.zeros_like(road)
    inner[:-30, :-30] = True
    green = scene.images["rgb"].pixels[1]
    shaded, lit = green[road & inner & (rise[:3].max(0) > 7)], green[road & inner & (rise.max(0) < 2)]
    assert min(shaded.size, lit.size) > 50
    assert np.median(shaded) < 0.7 * np.median(lit)


def test_clouds_change_sentinel_2_and_nothing_else(scene):
    cloudy = make_scene(seed=7, size=192, gsd=10.0, clouds=0.3)
    for sensor in ("rgb", "s1", "dsm"):
        np.testing.assert_array_equal(cloudy.images[sensor].pixels, scene.images[sensor].pixels)
    np.testing.assert_array_equal(cloudy.labels.pixels, scene.labels.pixels)
    change = physical(cloudy.images["s2"]) - physical(scene.images["s2"])
    assert np.abs(change[:, ~cloudy.cloud_mask]).max() < 0.05
    assert not scene.cloud_mask.any()
    blue = change[SENSORS["s2"].index(["blue"])][0]
    assert 0.15 < (blue > 0.1).mean() < 0.3
    assert (change[SENSORS["s2"].index(["nir"])][0] < -0.05).mean() > 0.03
    assert cloudy.cloud_mask.mean() < 0.75


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("gsd", [1.0, 10.0])
def test_georeferencing_agrees_with_proj(seed, gsd):
    scene = make_scene(seed, size=64, gsd=gsd, sensors=("dsm",))
    image = scene.images["dsm"]
    left, width, _, top, _, height = image.transform
    assert (width, height) == (gsd, -gsd)
    assert (image.crs, image.transform) == (scene.labels.crs, scene.labels.transform)
    extent = (left, top - 64 * gsd, left + 64 * gsd, top)
    np.testing.assert_allclose(scene.bounds, transform_bounds(image.crs, "EPSG:4326", *extent), atol=1e-7)
    west, _, east, _ = scene.bounds
    assert int(image.crs[-2:]) == (west + east) / 2 // 6 + 31


def test_window_keeps_pixels_on_their_place(scene):
    part = scene.window(row=20, column=70, size=48)
    for sensor in SENSOR_IDS:
        np.testing.assert_array_equal(part.images[sensor].pixels, scene.images[sensor].pixels[:, 20:68, 70:118])
    np.testing.assert_array_equal(part.labels.pixels, scene.labels.pixels[:, 20:68, 70:118])
    np.testing.assert_array_equal(part.terrain, scene.terrain[20:68, 70:118])
    assert part.cloud_mask.shape == (48, 48)
    image = part.images["s2"]
    left, _, _, top, _, _ = image.transform
    assert (left - scene.labels.transform[0], scene.labels.transform[3] - top) == (700, 200)
    expected = transform_bounds(image.crs, "EPSG:4326", left, top - 480, left + 480, top)
    np.testing.assert_allclose(part.bounds, expected, atol=1e-7)
    whole = dataclasses.replace(scene.images["s2"], pixels=image.pixels, transform=image.transform)
    assert dataclasses.asdict(whole).keys() == dataclasses.asdict(image).keys()
    assert (whole.scale, whole.offset, whole.nodata, whole.datetime) == (
        *(image.scale, image.offset, image.nodata, image.datetime),
    )


def halves(places):
    """Places to learn from, places to be judged on."""
    return places[: len(places) * 3 // 4], places[len(places) * 3 // 4 :]


@pytest.mark.parametrize("sensor", SENSOR_IDS)
def test_land_cover_explains_each_sensor(places, sensor):
    """The mean of the true class, as a guess, against the mean of the band; |error| in normalised units."""
    learning, judging = halves(places)

    def ground(place):
        # Heights are relative to a window's median, so a class has a height above the ground, not above the median.
        return place.terrain if SENSORS[sensor].reference == "window" else 0

    labels = np.stack([place.labels.pixels[0] for place in learning])
    values = np.stack([physical(place.images[sensor]) - ground(place) for place in learning], 1)
    of_class = np.stack([values[:, labels == code].mean(1) for code in range(len(CLASSES))], 1)
    of_band = np.mean([normalised(place.images[sensor], sensor) for place in learning], (0, 2, 3))[:, None, None]
    error, baseline = 0, 0
    for place in judging:
        image = place.images[sensor]
        stored = (of_class[:, place.labels.pixels[0]] - image.offset) / image.scale
        truth = normalised(image, sensor)
        error += np.abs(normalised(dataclasses.replace(image, pixels=stored), sensor) - truth).mean()
        baseline += np.abs(of_band - truth).mean()
    assert error < 0.5 * baseline


def crossing_error(places, seen, sensor):
    """|Error| of `sensor` guessed as the median of the pixels that look most alike in `seen`, over that of the mean."""

    def look(place):
        values = normalised(place.images[seen], seen)
        means = [uniform_filter(values, (0, size, size)) for size in (3, 9, 31)]
        return np.concatenate([*means, np.abs(means[0] - means[1])]).reshape(-1, places[0].terrain.size).T

    def view(place):
        values = normalised(place.images[sensor], sensor)
        return values.reshape(len(values), -1).T

    learning, judging = (
        (np.concatenate([look(p) for p in half]), np.concatenate([view(p) for p in half])) for half in halves(places)
    )
    some = np.random.default_rng(0)
    known, asked = (
        some.choice(len(half[0]), count, replace=False) for half, count in ((learning, 8000), (judging, 1000))
    )
    _, alike = cKDTree(learning[0][known]).query(judging[0][asked], k=15)
    guess = np.median(learning[1][known][alike], 1)
    truth = judging[1][asked]
    return np.abs(guess - truth).mean() / np.abs(learning[1].mean(0) - truth).mean()


@pytest.mark.parametrize(("seen", "sensor"), [("s1", "s2"), ("s2", "s1"), ("rgb", "dsm"), ("dsm", "rgb")])
def test_one_sensor_tells_of_the_other(places, seen, sensor):
    own = crossing_error(places, seen, sensor)
    others = [
        dataclasses.replace(place, images={**place.images, seen: other.images[seen]})
        for place, other in zip(places, places[1:] + places[:1], strict=True)
    ]
    strange = crossing_error(others, seen, sensor)
    assert own < 0.7
    assert strange > 0.9


def test_shards_hold_what_was_promised(shards):
    folder, summary = shards
    assert summary == {name: {"train": 12, "val": 4} for name in SOURCES}
    for name, sensors in {
        "synthetic_rgb": {"rgb"},
        "synthetic_s1s2": {"s1", "s2"},
        "synthetic_rgbdsm": {"rgb", "dsm"},
    }.items():
        source = ShardSource(folder / name, "train")
        assert (source.name, set(source.sensors), len(source)) == (name, sensors, 12)
        assert source.levels == {sensor: "l1c" if sensor == "s2" else None for sensor in sensors}
        row = source.read(5)
        assert row["pair_id"] == (row["key"] if len(sensors) > 1 else None)
        assert row["target"].pixels.shape == (1, 32, 32) and row["target"].bands == ["land_cover"]
        assert row["labels"] == [CLASSES[code] for code in np.unique(row["target"].pixels)]
        for sensor, image in row["images"].items():
            assert image.pixels.shape == (len(SENSORS[sensor].bands), 32, 32)
            assert image.transform == row["target"].transform
            assert image.gsd == (10.0 if sensor in ("s1", "s2") else 1.0)


def test_places_are_not_shared(shards):
    folder, _ = shards
    boxes, groups = {}, {}
    for name in SOURCES:
        for split in ("train", "val"):
            source = ShardSource(folder / name, split)
            for index in range(len(source)):
                row = source.read(index)
                groups.setdefault(row["group_id"], []).append(split)
                boxes.setdefault(row["group_id"], []).append(row["bounds"])
    assert all(len(splits) == 4 and len(set(splits)) == 1 for splits in groups.values())
    extents = [(*np.min(rows, 0)[:2], *np.max(rows, 0)[2:]) for rows in boxes.values()]
    assert len(extents) == 3 * 4
    for number, (west, south, east, north) in enumerate(extents):
        for left, bottom, right, top in extents[:number]:
            assert east < left or right < west or north < bottom or top < south


def test_shards_are_the_same_every_time(shards, tmp_path):
    folder, _ = shards
    make_synthetic_shards(tmp_path / "again", seed=3, scenes=4, image_size=32)
    make_synthetic_shards(tmp_path / "other", seed=4, scenes=4, image_size=32)
    for name in SOURCES:
        first, again, other = (
            ShardSource(path / name, "val").read(2) for path in (folder, *sorted(tmp_path.iterdir()))
        )
        assert first["key"] == again["key"] != other["key"]
        for sensor, image in first["images"].items():
            np.testing.assert_array_equal(image.pixels, again["images"][sensor].pixels)
            assert (image.pixels != other["images"][sensor].pixels).mean() > 0.5


def test_splits_follow_their_shares(tmp_path):
    summary = make_synthetic_shards(tmp_path, scenes=7, image_size=16, splits={"train": 8, "val": 1, "test": 1})
    assert summary["synthetic_rgb"] == {"train": 20, "val": 4, "test": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "`seed` must not be negative, got -1"),
        ({"size": 31}, "`size` must be at least 32 pixels, got 31"),
        ({"gsd": 0.0}, "`gsd` must be above 0 metres, got 0.0"),
        ({"gsd": float("nan")}, "`gsd` must be above 0 metres, got nan"),
        ({"clouds": 1.0}, r"`clouds` must be in \[0, 1\), got 1.0"),
        ({"sensors": ("s1", "naip")}, "`sensors` must be among rgb, s2, s1, dsm, got naip"),
    ],
)
def test_make_scene_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_scene(**{"seed": 0, **arguments})


@pytest.mark.parametrize("window", [(150, 0, 48), (0, 150, 48), (-1, 0, 48), (0, -1, 48), (0, 0, 0)])
def test_window_refuses_to_leave_the_scene(scene, window):
    with pytest.raises(ValueError, match="`window` must lie inside the scene of 192 x 192 pixels"):
        scene.window(*window)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 8}, "`image_size` must be at least 16 pixels, got 8"),
        ({"splits": {}}, "`splits` must map names to shares above 0, got {}"),
        ({"splits": {"train": 1.0, "val": 0.0}}, "`splits` must map names to shares above 0"),
        ({"scenes": 1}, "`scenes` must be at least one for each of the 2 splits, got 1"),
        ({"seed": -1}, "`seed` must not be negative"),
    ],
)
def test_make_synthetic_shards_refuses(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_synthetic_shards(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_making_goes_on_and_leaves_what_is_whole(tmp_path):
    first = make_synthetic_shards(tmp_path, seed=3, scenes=4, image_size=32)
    written = {name: (tmp_path / name / "train-00000.parquet").read_bytes() for name in SOURCES}
    shutil.rmtree(tmp_path / "synthetic_s1s2")
    assert make_synthetic_shards(tmp_path, seed=3, scenes=4, image_size=32) == first
    make_synthetic_shards(tmp_path, seed=4, scenes=4, image_size=32)
    assert {name: (tmp_path / name / "train-00000.parquet").read_bytes() for name in SOURCES} == written
    make_synthetic_shards(tmp_path, seed=4, scenes=4, image_size=32, overwrite=True)
    assert all((tmp_path / name / "train-00000.parquet").read_bytes() != written[name] for name in SOURCES)
