"""Synthetic scenes: the same every time, in the units they claim, and each sensor a view of the same landscape."""

import dataclasses

import numpy as np
import pytest
from rasterio.warp import transform_bounds

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
    [("rgb", "uint8", "dn", 0, 1), ("s2", "uint16", "dn", 0, 1), ("s1", "float32", "db", -40, 8)]
    + [("dsm", "float32", "metres", 0, 900)],
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
    for name in ("water", "road", "grass", "bare"):
        assert np.abs(inside[name]).max() < 1.5, name
    assert inside["crops"].max() < 4
    assert 12 < np.median(inside["forest"]) < 25 and inside["forest"].min() > 5
    assert 7 < inside["built"].min() and inside["built"].max() < 31
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
    behind, before = (np.roll(surface, shift, (0, 1)) - surface > 8 for shift in ((-4, -4), (4, 4)))
    green = scene.images["rgb"].pixels[1].astype(float)
    inner = np.zeros_like(road)
    inner[5:-5, 5:-5] = True
    shaded, lit = green[road & behind & ~before & inner], green[road & before & ~behind & inner]
    assert min(shaded.size, lit.size) > 50
    assert shaded.mean() < 0.8 * lit.mean()


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
