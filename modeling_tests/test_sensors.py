"""What a sensor is: names, statistics, refusals, and the way to JSON and back."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msgfm_hf.model.sensors import CONVERTIBLE_UNITS, SENSORS, BandSpec, SensorSpec, get_sensor

BAND = BandSpec("a", mean=0.5, std=0.2)


def spec(**changes):
    return SensorSpec(**{"id": "mine", "bands": (BAND,), "unit": "reflectance", "default_unit": "dn", **changes})


def test_catalogue_holds_the_four_sensors_of_the_paper_with_their_widths():
    widths = {sensor: len(SENSORS[sensor].bands) for sensor in ("rgb", "s2", "s1", "dsm")}
    assert widths == {"rgb": 3, "s2": 13, "s1": 2, "dsm": 1}
    assert " ".join(SENSORS["s2"].band_names) == "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B10 B11 B12"


def test_statistics_are_the_published_ones():
    # SSL4EO-S12 v1, digital numbers without offset; L2A has no B10.
    mean, std = SENSORS["s2"].statistics(["B02", "B10", "B12"], "l1c")
    assert mean == pytest.approx([0.1390782, 0.0022104, 0.1524065])
    assert std == pytest.approx([0.0850348, 0.0051154, 0.1136538])
    mean, std = SENSORS["s2"].statistics(["B02", "B8A"], "l2a")
    assert mean == pytest.approx([0.0884297, 0.2581647])
    assert std == pytest.approx([0.1155152, 0.1439309])
    assert SENSORS["s2"].statistics() == SENSORS["s2"].statistics(level="l1c")
    assert SENSORS["s1"].statistics() == ([-11.76858, -18.294598], [4.525339, 4.3586307])
    assert SENSORS["rgb"].statistics() == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    ("sensor", "alias", "band"),
    [
        ("s2", "B2", "B02"),
        ("s2", "blue", "B02"),
        ("s2", "b8a", "B8A"),
        ("s2", "nir08", "B8A"),
        ("s2", "B5", "B05"),
        ("landsat8", "B5", "B5"),
        ("landsat8", "nir08", "B5"),
        ("s1", "VV_dB", "VV"),
        ("s1", "vh", "VH"),
        ("naip", "NIR", "nir"),
        ("rgb", " R ", "red"),
        ("dsm", "DEM", "height"),
    ],
)
def test_an_alias_means_the_band_of_its_own_sensor(sensor, alias, band):
    assert SENSORS[sensor].resolve(alias) == band


def test_the_same_alias_means_red_edge_for_one_sensor_and_near_infrared_for_another():
    wavelengths = {sensor: SENSORS[sensor].select(["B5"])[0].wavelength for sensor in ("s2", "landsat8")}
    assert wavelengths == {"s2": 705, "landsat8": 865}


@pytest.mark.parametrize("sensor", SENSORS)
def test_no_alias_of_a_sensor_means_two_bands(sensor):
    names = [name.lower() for band in SENSORS[sensor].bands for name in (band.name, *band.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("sensor", SENSORS)
def test_a_sensor_survives_json(sensor):
    assert SensorSpec.from_dict(json.loads(json.dumps(SENSORS[sensor].to_dict()))) == SENSORS[sensor]


@given(st.permutations(SENSORS["s2"].band_names), st.integers(1, 13))
def test_index_gives_positions_in_canonical_order_for_any_choice(names, count):
    chosen = names[:count]
    index = SENSORS["s2"].index(chosen)
    assert [SENSORS["s2"].band_names[position] for position in index] == chosen
    assert [band.name for band in SENSORS["s2"].select(chosen)] == chosen


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=4),
    st.floats(1e-3, 1e3),
    st.sampled_from(sorted(CONVERTIBLE_UNITS)),
)
def test_any_sensor_of_ones_own_survives_json(means, std, unit):
    bands = tuple(
        BandSpec(f"b{i}", mean, std, (-1.0, 2.0), 500 + i, 10, ("x", f"y{i}")) for i, mean in enumerate(means)
    )
    own = SensorSpec("own_1", bands, unit, CONVERTIBLE_UNITS[unit][-1], offset=None, source="measured")
    assert SensorSpec.from_dict(json.loads(json.dumps(own.to_dict()))) == own


def test_get_sensor_takes_plain_dictionaries_or_the_catalogue():
    own = spec()
    assert get_sensor("mine", {"mine": own.to_dict()}) == own
    assert get_sensor("mine", {"mine": own}) is own
    assert get_sensor("s1") is SENSORS["s1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "My-Sensor"}, r"`id` of a sensor must match .* got 'My-Sensor'"),
        ({"unit": "dn"}, "`unit` of sensor 'mine' must be one of reflectance, db, metres, got 'dn'"),
        ({"default_unit": "db"}, "`default_unit` of sensor 'mine' must be one of dn, reflectance, got 'db'"),
        ({"bands": ()}, "`bands` of sensor 'mine' must not be empty"),
        ({"bands": (BAND, BAND)}, r"`bands` of sensor 'mine' must have different names, got \['a', 'a'\]"),
        ({"bands": (BandSpec("a", 0.0, 0.0),)}, "`std` of band 'a' of sensor 'mine' must be above 0, got 0.0"),
        ({"bands": (BandSpec("a", 0.0, float("nan")),)}, "`std` of band 'a' .* got nan"),
        ({"reference": "scene"}, "`reference` of sensor 'mine' must be None or 'window', got 'scene'"),
    ],
)
def test_a_sensor_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        spec(**changes)


def test_an_unknown_band_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"`bands` of sensor 's2' must be among B01, .* got 'B13'\. Did you mean"):
        SENSORS["s2"].resolve("B13")
    with pytest.raises(ValueError, match="`bands` of sensor 's1' must be among VV, VH, got 'red'"):
        SENSORS["s1"].select(["VV", "red"])


def test_a_band_named_twice_is_refused_even_by_its_alias():
    with pytest.raises(ValueError, match="`bands` of sensor 's2' must name each band once"):
        SENSORS["s2"].select(["B02", "blue"])


def test_a_band_that_a_level_lacks_is_refused():
    with pytest.raises(ValueError, match="`bands` of sensor 's2' must exist in level 'l2a', got 'B10'"):
        SENSORS["s2"].statistics(level="l2a")


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="`level` of sensor 's2' must be one of l1c, l2a, got 'L2A'"):
        SENSORS["s2"].check_level("L2A")
    with pytest.raises(ValueError, match=r"`level` of sensor 's1' must be one of none .* got 'grd'"):
        SENSORS["s1"].statistics(level="grd")


def test_dictionaries_with_unknown_or_missing_entries_are_refused():
    with pytest.raises(ValueError, match=r"`SensorSpec` has the entries id, .* got colour"):
        SensorSpec.from_dict({**spec().to_dict(), "colour": "red"})
    with pytest.raises(ValueError, match=r"`BandSpec` has the entries name, .* got nm"):
        SensorSpec.from_dict({**spec().to_dict(), "bands": [{**dataclasses.asdict(BAND), "nm": 1}]})
    with pytest.raises(ValueError, match="`SensorSpec` needs the entries default_unit, unit"):
        SensorSpec.from_dict({"id": "mine", "bands": [dataclasses.asdict(BAND)]})


def test_an_unknown_sensor_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match=r"`sensor` must be one of dsm, .* got 'landsat_8'\. Did you mean 'landsat8'\?"
    ):
        get_sensor("landsat_8")
    with pytest.raises(ValueError, match="`sensor` must be one of mine, got 's2'"):
        get_sensor("s2", {"mine": spec()})
