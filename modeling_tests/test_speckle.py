"""Statistics of radar backscatter before and after: values from the theory of speckle, not from this code."""

import math

import numpy as np
import pytest
import torch

from msgfm_hf.data.geotiff import read_image
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.sensors import SENSORS, BandSpec, SensorSpec
from msgfm_hf.tasks.speckle import (
    backscatter_statistics,
    compare_backscatter,
    format_backscatter,
    is_backscatter,
    speckle_suppression_index,
)


def speckle(looks, size=200_000, mean=0.1):
    """Intensity of fully developed speckle: gamma distributed with `looks` as its shape."""
    return np.random.default_rng(5).gamma(looks, mean / looks, size)


# The index


def test_half_way_to_the_mean_is_an_index_of_one_half():
    original = np.random.default_rng(0).gamma(4, 0.02, (64, 64)).ravel()
    assert speckle_suppression_index(original, original / 2 + original.mean() / 2) == pytest.approx(0.5, rel=1e-12)


def test_the_index_by_pencil():
    # Means 3 and 4; standard deviations 1 and 2.
    assert speckle_suppression_index(np.array([2.0, 4.0]), np.array([2.0, 6.0])) == pytest.approx((2 / 4) * (3 / 1))


@pytest.mark.parametrize("gain", [1e-3, 1.0, 40.0])
def test_a_change_of_calibration_does_not_move_the_index(gain):
    original = speckle(1, 1000)
    assert speckle_suppression_index(original, gain * original) == pytest.approx(1.0)


def test_averaging_n_looks_divides_the_index_by_the_root_of_n():
    original = speckle(1).reshape(-1, 4)
    filtered = np.repeat(original.mean(1, keepdims=True), 4, 1)
    assert speckle_suppression_index(original.ravel(), filtered.ravel()) == pytest.approx(0.5, abs=0.01)


def test_what_has_no_index():
    assert math.isnan(speckle_suppression_index(np.array([0.1]), np.array([0.2])))
    assert math.isnan(speckle_suppression_index(np.full(5, 0.1), np.arange(5.0)))
    assert math.isnan(speckle_suppression_index(np.arange(1.0, 6.0), np.zeros(5)))
    assert speckle_suppression_index(np.arange(1.0, 6.0), np.full(5, 0.1)) == 0


@pytest.mark.parametrize("wrong", ["original", "filtered"])
@pytest.mark.parametrize("value", [-12.0, math.nan, math.inf])
def test_decibels_and_invalid_pixels_are_refused(wrong, value):
    values = {"original": np.array([0.1, 0.2]), "filtered": np.array([0.1, 0.2])}
    values[wrong] = np.array([0.1, value])
    with pytest.raises(ValueError, match=rf"`{wrong}` must be linear power, .*got .*10 \*\* \(dB / 10\)"):
        speckle_suppression_index(**values)


def test_both_must_be_of_the_same_pixels():
    with pytest.raises(
        ValueError, match=r"`filtered` must hold the pixels of `original`, got shapes \(2,\) and \(3,\)"
    ):
        speckle_suppression_index(np.ones(3), np.ones(2))


# The statistics


@pytest.mark.parametrize("looks", [1, 4.4, 20])
def test_speckle_has_the_moments_of_its_looks(looks):
    power = speckle(looks)
    found = backscatter_statistics(power, 10 * np.log10(power))
    assert found["mean"] == pytest.approx(0.1, rel=0.01)
    assert found["coefficient_of_variation"] == pytest.approx(1 / math.sqrt(looks), rel=0.01)
    assert found["equivalent_looks"] == pytest.approx(looks, rel=0.02)


def test_one_look_in_decibels():
    """Known of the logarithm of single-look intensity: 5.57 dB of spread, and 2.51 dB below the mean."""
    power = speckle(1)
    found = backscatter_statistics(power, 10 * np.log10(power))
    assert found["std_db"] == pytest.approx(5.57, abs=0.03)
    assert found["mean_db"] == pytest.approx(-10 - 2.51, abs=0.03)
    # Quantiles of the exponential distribution: -ln(1 - p) times the mean.
    for share, value in found["percentiles_db"].items():
        assert value == pytest.approx(-10 + 10 * math.log10(-math.log(1 - int(share) / 100)), abs=0.1)


def test_a_flat_band_has_no_number_of_looks():
    found = backscatter_statistics(np.full(9, 0.25), np.full(9, -6.0))
    assert (found["std"], found["coefficient_of_variation"], found["equivalent_looks"]) == (0, 0, None)
    assert found["percentiles_db"] == dict.fromkeys(("5", "25", "50", "75", "95"), -6.0)


# Before and after


def test_the_unit_decides_what_is_backscatter():
    assert {sensor for sensor, spec in SENSORS.items() if is_backscatter(spec)} == {"s1"}
    own = SensorSpec("palsar", (BandSpec("HH", -8, 4), BandSpec("HV", -14, 4)), "db", "dn", 1.0)
    assert is_backscatter(own)


def test_normalised_pixels_are_compared_in_power():
    processor = MsGFMImageProcessor()
    rng = np.random.default_rng(1)
    # Inside the range to which Sentinel-1 is clipped.
    power = torch.from_numpy(rng.gamma(20, 0.1 / 20, (1, 2, 40, 40))).float()
    valid = torch.ones(1, 40, 40, dtype=torch.bool)
    mean = power.mean((2, 3), keepdim=True)
    before, after = (
        processor.radiometry(values, valid, "s1", unit="power").values[0] for values in (power, (power + mean) / 2)
    )
    found = compare_backscatter(processor, "s1", ["VV", "VH"], None, before, after, valid[0])
    assert list(found) == ["VV", "VH"]
    for number, band in enumerate(found):
        assert found[band]["ssi"] == pytest.approx(0.5, abs=1e-4)
        assert found[band]["before"]["mean"] == pytest.approx(power[0, number].mean().item(), rel=1e-4)
        assert found[band]["after"]["mean"] == pytest.approx(power[0, number].mean().item(), rel=1e-4)
        decibels = 10 * np.log10(power[0, number].numpy())
        assert found[band]["before"]["mean_db"] == pytest.approx(decibels.mean(), abs=1e-3)
        assert found[band]["before"]["percentiles_db"]["50"] == pytest.approx(np.median(decibels), abs=1e-3)


def test_both_are_clipped_to_the_range_of_the_sensor():
    """A prediction that exceeds what the original could not show is no rougher for it."""
    processor, valid = MsGFMImageProcessor(), torch.ones(1, 20, 20, dtype=torch.bool)
    power = torch.from_numpy(np.random.default_rng(1).gamma(4, 0.1 / 4, (1, 2, 20, 20))).float()
    power[..., 0, :5] = 40.0  # 16 dB, beyond Sentinel-1's range
    before = processor.radiometry(power, valid, "s1", unit="power").values[0]
    mean, std = SENSORS["s1"].statistics(["VV", "VH"])
    decibels = 10 * torch.log10(power[0])
    after = (decibels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert after.max() > before.max() + 1
    found = compare_backscatter(processor, "s1", ["VV", "VH"], None, before, after, valid[0])
    for band in found.values():
        assert band["ssi"] == pytest.approx(1, rel=1e-5)
        assert band["after"]["mean"] == pytest.approx(band["before"]["mean"], rel=1e-5)
        assert band["after"]["percentiles_db"] == pytest.approx(band["before"]["percentiles_db"], abs=1e-4)


def test_only_the_pixels_that_count_are_looked_at():
    processor, generator = MsGFMImageProcessor(), torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 2, 12, 12, generator=generator)
    counted = torch.rand(12, 12, generator=generator) < 0.5
    found = compare_backscatter(processor, "s1", ["VV", "VH"], None, before, after, counted)
    spoilt = torch.where(counted, after, 9.0)
    assert compare_backscatter(processor, "s1", ["VV", "VH"], None, before, spoilt, counted) == found
    assert compare_backscatter(processor, "s1", ["VV", "VH"], None, before, after, ~counted) != found
    assert compare_backscatter(processor, "s1", ["VV", "VH"], None, before, after, counted & ~counted) == {}


def test_one_band_alone_keeps_its_name():
    before = torch.randn(1, 8, 8)
    found = compare_backscatter(
        MsGFMImageProcessor(), "s1", ["VH"], None, before, before, torch.ones(8, 8, dtype=torch.bool)
    )
    assert list(found) == ["VH"] and found["VH"]["ssi"] == pytest.approx(1) and found["VH"]["before"]["mean_db"] < -15


def test_the_table_has_two_lines_per_band_and_the_index_once():
    power = speckle(4, 100)
    values = backscatter_statistics(power, 10 * np.log10(power))
    table = format_backscatter({("s1 → s1", "masked"): {"VV": {"before": values, "after": values, "ssi": 0.25}}})
    head, before, after = table.splitlines()
    assert head.split()[:4] == ["direction", "pixels", "band", "mean"] and head.split()[-1] == "SSI"
    assert before.startswith("s1 → s1    masked  VV    before") and "0.250" not in before
    assert after.split()[0] == "after" and after.endswith("0.250")
    flat = backscatter_statistics(np.ones(3), np.zeros(3))
    assert " - " in format_backscatter({("a", "all"): {"VV": {"before": flat, "after": flat, "ssi": None}}})


def test_a_real_scene_has_the_looks_of_a_mixed_scene(sample_data):
    """Sentinel-1 GRD has 4.4 looks where the ground is even; fields and towns lower that, smoothing raises it."""
    image = read_image(sample_data / "s1s2_terramesh/637U_59R_1_3/S1RTC.tif", "s1", names=["VV", "VH"])
    processor = MsGFMImageProcessor()
    pixels, valid = torch.from_numpy(image.pixels)[None], torch.from_numpy(image.valid_mask())[None]
    values = processor.radiometry(pixels, valid, "s1", unit="db").values
    smooth = torch.nn.functional.avg_pool2d(values, 5, 1, 2, count_include_pad=False)
    found = compare_backscatter(processor, "s1", ["VV", "VH"], None, values[0], smooth[0], valid[0])
    for band in ("VV", "VH"):
        assert 0.2 < found[band]["before"]["equivalent_looks"] < 4.4
        assert 0.3 < found[band]["ssi"] < 1
    before = {band: found[band]["before"]["mean_db"] for band in found}
    assert before["VV"] > before["VH"] + 3
