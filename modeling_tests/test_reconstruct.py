"""`msgfm reconstruct`: masked images predicted from themselves and from their partners, as pictures, GeoTIFFs and
numbers that agree with one another."""

import json
import shutil
import sys
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

from msgfm_hf import SENSORS, MsGFMForImageClassification, MsGFMForPreTraining, MsGFMImageProcessor, __version__
from msgfm_hf.cli import main
from msgfm_hf.data.shards import CorruptShardError, ShardImage, ShardRow, ShardWriter
from msgfm_hf.tasks.speckle import speckle_suppression_index
from msgfm_hf.train.pictures import Reconstructed, draw_directions
from msgfm_hf.train.pretrain import Mixture
from msgfm_hf.train.recipe import build_recipe
from msgfm_hf.train.reconstruct import format_reconstruction, reconstruct
from tiny_models import TINY, tiny

HEIGHT, WIDTH = 44, 60
CELL = TINY["mask_patch_size"]
TRANSFORM = rasterio.Affine(10, 0, 500000, 0, -10, 6100000)


def write(path, pixels, names, transform=TRANSFORM, crs="EPSG:32632", nodata=None):
    shape = dict(zip(("count", "height", "width"), pixels.shape, strict=True))
    where = {} if transform is None else {"transform": transform, "crs": crs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver="GTiff", dtype=pixels.dtype, nodata=nodata, **shape, **where) as file:
            file.write(pixels)
            file.descriptions = names
    return path


def smooth(rng, bands, low, high):
    """Fields of different values, so that there is something to see."""
    fields = rng.uniform(low, high, (bands, -(-HEIGHT // 11), -(-WIDTH // 12)))
    return fields.repeat(11, 1).repeat(12, 2)[:, :HEIGHT, :WIDTH]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Files of four sensors on one grid, with holes, and the same pixels in arrays."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(2)
    radar = smooth(rng, 2, 0.02, 0.2) * rng.gamma(4, 1 / 4, (2, HEIGHT, WIDTH))
    pixels = {
        "s1": np.clip(10 * np.log10(radar), -24, -0.5).astype(np.float32),
        "s2": (smooth(rng, 13, 300, 4000) + rng.normal(0, 20, (13, HEIGHT, WIDTH))).round().astype(np.uint16),
        "dsm": (700 + smooth(rng, 1, 0, 12)).astype(np.float32),
        "rgb": smooth(rng, 3, 0, 255).astype(np.uint8),
    }
    pixels["dsm"][:, 3:9, 40:50] = -9999
    pixels["s1"][:, 20:24, 8:30] = np.nan
    for sensor, values in pixels.items():
        nodata = -9999 if sensor == "dsm" else None
        write(folder / f"{sensor}.tif", values, SENSORS[sensor].band_names, nodata=nodata)
    return folder, pixels


def save(folder, sensors, **fields):
    torch.manual_seed(3)
    specs = {sensor: SENSORS[sensor].to_dict() for sensor in sensors}
    model = tiny(
        MsGFMForPreTraining, 0.02, sensors=specs, inputs={sensors[0]: SENSORS[sensors[0]].band_names}, **fields
    )
    model.save_pretrained(folder)
    MsGFMImageProcessor.from_config(model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def radar_model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "radar", ["s1", "s2"])


@pytest.fixture(scope="module")
def four_model(tmp_path_factory):
    """The checkpoint of a run that had S1 with S2 L2A, and RGB with elevation, and translated whole images."""
    run = tmp_path_factory.mktemp("models") / "run"
    checkpoint = save(run / "checkpoints" / "step-7", ["rgb", "s1", "s2", "dsm"])
    shards, rng = run / "shards", np.random.default_rng(0)
    for name, sensors in (("pairs", ("s1", "s2")), ("city", ("dsm", "rgb"))):
        with ShardWriter(shards, name, sensors, {"s2": "l2a"} if "s2" in sensors else None) as writer:
            images = {
                "s1": ShardImage(rng.uniform(-20, -5, (2, 32, 32)).astype(np.float32), ["VV", "VH"], "db"),
                "s2": ShardImage(rng.integers(1, 4000, (3, 32, 32), np.uint16), ["B04", "B03", "B02"], "dn", 1e-4),
                "dsm": ShardImage(rng.uniform(1, 9, (1, 32, 32)).astype(np.float32), ["height"], "metres"),
                "rgb": ShardImage(rng.integers(0, 256, (3, 32, 32), np.uint8), ["red", "green", "blue"], "dn", 1 / 255),
            }
            chosen = {sensor: images[sensor] for sensor in sensors}
            writer.write(ShardRow("a", name, "train", "place", chosen, pair_id="a"))
    recipe = build_recipe({"data": [str(shards)], "cross_loss_region": "all"})
    record = {"recipe": asdict(recipe), "identity": {"sources": Mixture(recipe).fingerprint()}}
    (run / "run.json").write_text(json.dumps(record))
    (checkpoint / "state.json").write_text("{}")
    return checkpoint


@pytest.fixture(autouse=True)
def pictured(monkeypatch):
    """Pictures take most of the time: they are drawn in `made` and `city`; elsewhere what they would show is kept."""
    rows = []

    def keep(found, title, path):
        assert found and title
        rows.extend(found)
        path.touch()

    for name in ("draw_directions", "draw_backscatter"):
        monkeypatch.setattr(f"msgfm_hf.train.reconstruct.{name}", keep)
    return rows


def inputs(world, *sensors):
    options = {"s2": ",offset=0"}
    return [f"{sensor}={world[0] / sensor}.tif{options.get(sensor, '')}" for sensor in sensors]


@pytest.fixture(scope="module")
def made(world, radar_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "new" / "radar"
    report = reconstruct(radar_model, out, inputs(world, "s1", "s2"), command="msgfm reconstruct ...")
    return out, report


@pytest.fixture(scope="module")
def city(world, four_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "city"
    return out, reconstruct(four_model, out, inputs(world, "rgb", "dsm"))


def read(path):
    with rasterio.open(path) as file:
        return file.read(), file.profile | {"names": file.descriptions, "units": file.units}


def way(report, sensor, target, place=0):
    (found,) = [
        entry
        for entry in report["places"][place]["directions"]
        if (entry["input"], entry["target"]) == (sensor, target)
    ]
    return found


def ways(report, place=0):
    return [(entry["input"], entry["target"]) for entry in report["places"][place]["directions"]]


# What is written


def test_every_direction_is_there_with_its_file_and_the_pictures(made):
    out, report = made
    assert ways(report) == [("s1", "s1"), ("s2", "s2"), ("s1", "s2"), ("s2", "s1")]
    files = {entry["file"] for entry in report["places"][0]["directions"]}
    assert files == {"s1_to_s1.tif", "s2_to_s2.tif", "s1_to_s2.tif", "s2_to_s1.tif"}
    pictures = {"reconstruction.png", "sar_statistics.png"}
    assert {path.name for path in out.iterdir()} == files | pictures | {"reconstruction.json"}
    assert [path.name for path in out.parent.iterdir()] == ["radar"]
    for name in pictures:
        with Image.open(out / name) as picture:
            picture.load()
            assert picture.format == "PNG" and min(picture.size) > 400
    assert json.loads((out / "reconstruction.json").read_text()) == report
    assert report["command"] == "msgfm reconstruct ..." and (report["mask_ratio"], report["seed"]) == (0.6, 0)


def test_geotiffs_lie_where_the_input_lies(made):
    for name, bands, unit in (("s2_to_s1", ("VV", "VH"), "dB"), ("s1_to_s2", SENSORS["s2"].band_names, "reflectance")):
        values, profile = read(made[0] / f"{name}.tif")
        assert values.shape == (len(bands), HEIGHT, WIDTH) and profile["dtype"] == "float32"
        assert (profile["transform"], profile["crs"]) == (TRANSFORM, rasterio.CRS.from_epsg(32632))
        assert np.isnan(profile["nodata"])
        assert profile["names"] == tuple(bands) and set(profile["units"]) == {unit}


def test_a_sensors_own_image_keeps_what_was_visible(made, world):
    values, _ = read(made[0] / "s1_to_s1.tif")
    truth = world[1]["s1"]
    assert np.array_equal(np.isnan(values), np.isnan(truth))
    kept = np.isclose(values, truth, atol=1e-3).all(0)
    cells = kept[: HEIGHT // CELL * CELL, : WIDTH // CELL * CELL]
    cells = cells.reshape(HEIGHT // CELL, CELL, WIDTH // CELL, CELL).mean((1, 3))
    # Cells are visible whole, but for invalid pixels, or predicted.
    assert ((cells == 0) | (cells > 0.4)).all()
    assert 0.45 < (cells == 0).mean() < 0.75
    reflectance, _ = read(made[0] / "s2_to_s2.tif")
    visible = np.isclose(reflectance, world[1]["s2"] / 1e4, atol=1e-5).all(0)
    assert 0.3 < visible.mean() < 0.55


def test_a_crossing_is_there_under_the_mask_of_its_input_alone(made):
    own, _ = read(made[0] / "s2_to_s2.tif")
    crossed, _ = read(made[0] / "s2_to_s1.tif")
    hidden = np.isnan(crossed).all(0)
    assert np.array_equal(hidden, np.isnan(crossed).any(0))
    assert 0.5 < (~hidden).mean() < 0.7
    # The same mask in both directions of one input, another one for the other input.
    other, _ = read(made[0] / "s1_to_s2.tif")
    assert np.isfinite(own).all() and not np.array_equal(np.isnan(other).all(0), hidden)


def test_what_is_written_is_what_the_model_says(made, world, radar_model):
    """By the public names alone: the NaN of a crossing tell its mask."""
    model = MsGFMForPreTraining.from_pretrained(radar_model).eval()
    processor = MsGFMImageProcessor.from_pretrained(radar_model)
    options = {"bands": {sensor: SENSORS[sensor].band_names for sensor in ("s1", "s2")}}
    batch = processor({sensor: world[1][sensor] for sensor in ("s1", "s2")}, offset={"s2": 0}, **options)
    values, _ = read(made[0] / "s2_to_s1.tif")
    there = np.isfinite(values)
    masks = {"s2": torch.from_numpy(there[0, ::4, ::4].reshape(1, -1).copy())}
    # What of the other input is masked must not matter.
    masks["s1"] = torch.zeros_like(masks["s2"])
    with torch.no_grad():
        out = model(**batch, bool_masked_pos=masks, targets={"s1": "s2", "s2": "s1"}, **options).reconstruction
    wanted = processor.post_process_image_to_image({"s1": out["s2"]}, bands={"s1": ["VV", "VH"]})["s1"][0].numpy()
    assert there.mean() > 0.4
    assert np.allclose(values[there], wanted[there], atol=1e-3)


# The numbers


def test_errors_are_those_of_the_files(made, world):
    out, report = made
    truth = {"s1": world[1]["s1"], "s2": world[1]["s2"] / 1e4}
    for sensor, target in (("s1", "s2"), ("s2", "s1")):
        values, _ = read(out / f"{sensor}_to_{target}.tif")
        apart = np.abs(values - truth[target])
        found = way(report, sensor, target)["errors"]
        assert list(found) == ["masked"]
        found = found["masked"]
        assert found["n"] == np.isfinite(apart).all(0).sum()
        assert found["error"] == pytest.approx(np.nanmean(apart), rel=1e-3)
        for number, (band, spec) in enumerate(zip(SENSORS[target].band_names, SENSORS[target].bands, strict=True)):
            assert found["by_band"][band]["error"] == pytest.approx(np.nanmean(apart[number]), rel=1e-3)
            assert found["by_band"][band]["error_std"] == pytest.approx(np.nanmean(apart[number]) / spec.std, rel=1e-3)
        each = [band["error_std"] for band in found["by_band"].values()]
        assert found["error_std"] == pytest.approx(np.mean(each))


def test_an_own_error_counts_masked_pixels_alone(made, world):
    values, _ = read(made[0] / "s1_to_s1.tif")
    hidden = np.isfinite(read(made[0] / "s1_to_s2.tif")[0]).all(0)
    apart = np.abs(values - world[1]["s1"])[:, hidden]
    found = way(made[1], "s1", "s1")["errors"]["masked"]
    assert found["n"] == hidden.sum() and found["error"] == pytest.approx(apart.mean(), rel=1e-3)


def test_backscatter_is_that_of_the_files(made, world):
    out, report = made
    values, _ = read(out / "s2_to_s1.tif")
    both = np.isfinite(values).all(0) & np.isfinite(world[1]["s1"]).all(0)
    for number, band in enumerate(("VV", "VH")):
        found = way(report, "s2", "s1")["backscatter"]["masked"][band]
        before, after = (10 ** (image[number, both].astype(float) / 10) for image in (world[1]["s1"], values))
        assert found["ssi"] == pytest.approx(speckle_suppression_index(before, after), rel=1e-3)
        assert found["before"]["mean"] == pytest.approx(before.mean(), rel=1e-3)
        assert found["after"]["std"] == pytest.approx(after.std(), rel=2e-3)
    assert "backscatter" not in way(report, "s1", "s2")
    assert set(way(report, "s1", "s1")["backscatter"]) == {"masked"}


def test_heights_come_back_above_the_sea(city, world):
    out, report = city
    truth = np.where(world[1]["dsm"] == -9999, np.nan, world[1]["dsm"])
    own, profile = read(out / "dsm_to_dsm.tif")
    assert np.array_equal(np.isnan(own), np.isnan(truth)) and profile["units"] == ("m",)
    assert np.isclose(own, truth, atol=1e-2)[np.isfinite(truth)].mean() > 0.3
    crossed, _ = read(out / "rgb_to_dsm.tif")
    assert abs(np.nanmean(crossed) - np.nanmedian(truth)) < 30
    assert way(report, "rgb", "dsm")["reference"] == pytest.approx(np.nanmedian(truth))
    apart = np.abs(crossed - truth)
    assert way(report, "rgb", "dsm")["errors"]["all"]["error"] == pytest.approx(np.nanmean(apart), rel=1e-3)
    found = way(report, "dsm", "dsm")["errors"]["masked"]
    # A deviation of elevation is 15 m.
    assert found["error_std"] == pytest.approx(found["error"] / 15, rel=1e-3)


def test_a_run_that_translated_whole_images_shows_them_whole(city):
    out, report = city
    assert report["region_of_crossings"] == "all"
    assert np.isfinite(read(out / "rgb_to_dsm.tif")[0]).all()
    assert list(way(report, "rgb", "dsm")["errors"]) == ["all", "masked"]
    assert list(way(report, "rgb", "rgb")["errors"]) == ["masked"]
    assert not (out / "sar_statistics.png").exists()


def test_the_region_can_be_chosen(world, radar_model, tmp_path):
    report = reconstruct(radar_model, tmp_path / "out", inputs(world, "s1", "s2"), region="all")
    values, _ = read(tmp_path / "out" / "s2_to_s1.tif")
    assert np.isfinite(values).all() and set(way(report, "s2", "s1")["backscatter"]) == {"all", "masked"}
    assert way(report, "s2", "s1")["errors"]["all"]["n"] == np.isfinite(world[1]["s1"]).all(0).sum()


def test_the_picture_shows_the_files_and_their_errors(world, radar_model, four_model, tmp_path, pictured):
    report = reconstruct(radar_model, tmp_path / "out", inputs(world, "s1", "s2"))
    rows = {(row.sensor, row.target): row for row in pictured if hasattr(row, "sensor")}
    assert list(rows) == ways(report)
    for (sensor, target), row in rows.items():
        assert np.array_equal(row.shown, read(tmp_path / "out" / f"{sensor}_to_{target}.tif")[0], equal_nan=True)
        found = way(report, sensor, target)["errors"]["masked"]
        assert np.isfinite(row.error).sum() == found["n"] and row.gsd == 10
        assert np.nanmean(row.error) == pytest.approx(found["error"], rel=1e-3)
        assert f"{found['error']:.3g}" in row.error_text and "masked pixels" in row.error_text
        assert row.trained and 0.5 < row.masked.mean() < 0.7
    pairs = [(entry.direction, entry.band) for row in pictured if isinstance(row, list) for entry in row]
    assert pairs == [(f"{s} → s1 (masked pixels)", band) for s in ("s1", "s2") for band in ("VV", "VH")]

    pictured.clear()
    reconstruct(four_model, tmp_path / "four", inputs(world, "rgb", "s1"))
    rows = {(row.sensor, row.target): row for row in pictured if hasattr(row, "sensor")}
    assert rows["rgb", "dsm"].truth is None and rows["rgb", "dsm"].error is None and rows["rgb", "dsm"].trained
    assert not rows["s1", "rgb"].trained and "all pixels" in rows["s1", "rgb"].error_text


# Which directions


def test_a_target_without_an_image_is_predicted_without_errors(world, radar_model, tmp_path):
    report = reconstruct(radar_model, tmp_path, inputs(world, "s1"))
    assert ways(report) == [("s1", "s1"), ("s1", "s2")]
    entry = way(report, "s1", "s2")
    assert entry["errors"] == {} and entry["trained"] is None and entry["level"] == "l1c"
    values, profile = read(tmp_path / "s1_to_s2.tif")
    assert profile["names"] == tuple(SENSORS["s2"].band_names)
    assert 0.4 < np.isfinite(values).all(0).mean() < 0.7
    both = reconstruct(radar_model, tmp_path / "both", inputs(world, "s1", "s2"))
    there = read(tmp_path / "both" / "s1_to_s2.tif")[0]
    assert ways(both)[2] == ("s1", "s2") and np.allclose(values, there, atol=1e-4, equal_nan=True)


def test_heights_without_an_image_stay_relative(world, four_model, tmp_path):
    report = reconstruct(four_model, tmp_path, inputs(world, "rgb"))
    assert ways(report) == [("rgb", "rgb"), ("rgb", "dsm")]
    assert way(report, "rgb", "dsm")["reference"] == 0
    assert abs(np.nanmean(read(tmp_path / "rgb_to_dsm.tif")[0])) < 100


def test_a_file_says_what_made_it(world, four_model, tmp_path):
    report = reconstruct(four_model, tmp_path, inputs(world, "rgb"), seed=4)
    with rasterio.open(tmp_path / "rgb_to_dsm.tif") as file:
        tags = file.tags()
    assert tags["TIFFTAG_SOFTWARE"] == f"msgfm_hf {__version__}"
    assert tags["TIFFTAG_IMAGEDESCRIPTION"] == "dsm predicted from masked rgb, not measured"
    assert tags["MSGFM_MODEL"] == str(four_model) and tags["MSGFM_SEED"] == "4" and tags["MSGFM_TRAINED"] == "True"
    assert tags["MSGFM_REMARKS"] == "heights are relative to a level that is not known"
    assert tags["MSGFM_REFERENCE"] == "0.0" and "MSGFM_LEVEL" not in tags
    assert "  ! rgb → dsm: heights are relative to a level that is not known" in format_reconstruction(report)


def test_bands_and_levels_that_the_run_had_not_are_remarked(world, four_model, tmp_path):
    text = f"s2={world[0] / 's2.tif'},bands=B01+B02+B03,offset=0,level=l1c"
    report = reconstruct(four_model, tmp_path, [text, *inputs(world, "s1")])
    said = ["the model's run had no B01 of s2", "s2 is l1c, the model's run had l2a"]
    assert way(report, "s1", "s2")["remarks"] == way(report, "s2", "s2")["remarks"] == said
    assert way(report, "s2", "s1")["remarks"] == said and way(report, "s1", "s1")["remarks"] == []
    with rasterio.open(tmp_path / "s1_to_s2.tif") as file:
        assert file.tags()["MSGFM_REMARKS"] == "; ".join(said) and file.tags()["MSGFM_LEVEL"] == "l1c"
    report = reconstruct(four_model, tmp_path / "as-trained", inputs(world, "s1"))
    assert way(report, "s1", "s2")["remarks"] == []


def test_what_the_run_never_crossed_is_left_out_unless_it_is_given(city, world, four_model, tmp_path):
    assert ways(city[1]) == [("dsm", "dsm"), ("rgb", "rgb"), ("dsm", "rgb"), ("rgb", "dsm")]
    report = reconstruct(four_model, tmp_path, inputs(world, "rgb", "s1"))
    assert ways(report) == [
        *[(s, t) for s in ("rgb", "s1") for t in (s,)],
        ("rgb", "s1"),
        ("s1", "rgb"),
        ("rgb", "dsm"),
        ("s1", "s2"),
    ]
    trained = {(entry["input"], entry["target"]): entry["trained"] for entry in report["places"][0]["directions"]}
    assert {pair for pair, known in trained.items() if not known} == {("rgb", "s1"), ("s1", "rgb")}
    assert "s1 → rgb   no" in format_reconstruction(report)


def test_a_target_without_an_image_is_decoded_as_it_was_trained(world, four_model, tmp_path):
    report = reconstruct(four_model, tmp_path, inputs(world, "s1"))
    assert ways(report) == [("s1", "s1"), ("s1", "s2")]
    assert (way(report, "s1", "s2")["level"], way(report, "s1", "s2")["bands"]) == ("l2a", ["B04", "B03", "B02"])
    assert read(tmp_path / "s1_to_s2.tif")[1]["names"] == ("B04", "B03", "B02")


def test_a_run_without_crossings_trained_none(world, four_model, tmp_path):
    shutil.copytree(four_model.parents[1], tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["recipe"]["cross_sensor_ratio"] = 0
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    report = reconstruct(tmp_path / "run" / "checkpoints" / "step-7", tmp_path / "out", inputs(world, "rgb"))
    assert ways(report) == [("rgb", "rgb")] and way(report, "rgb", "rgb")["trained"] is True


def test_nothing_masked_leaves_the_crossings(world, four_model, tmp_path):
    report = reconstruct(four_model, tmp_path, inputs(world, "s1", "s2"), mask_ratio=0)
    assert ways(report) == [("s1", "s2"), ("s2", "s1")]
    assert all(list(entry["errors"]) == ["all"] for entry in report["places"][0]["directions"])


def test_nothing_masked_and_no_partner_is_nothing(world, tmp_path):
    alone = save(tmp_path / "alone", ["rgb"])
    with pytest.raises(ValueError, match="`mask_ratio` must be above 0 where there is nothing to cross to, got 0 for"):
        reconstruct(alone, tmp_path / "out", inputs(world, "rgb"), mask_ratio=0, region="all")
    assert not (tmp_path / "out").exists()


def test_some_bands_and_another_level(world, radar_model, tmp_path):
    text = f"s2={world[0] / 's2.tif'},bands=B04+B03+B02,offset=-100,scale=1e-4,level=l2a"
    report = reconstruct(radar_model, tmp_path, [text])
    values, profile = read(tmp_path / "s2_to_s2.tif")
    assert "; s2 as l2a" in format_reconstruction(report)
    assert profile["names"] == ("B04", "B03", "B02") and way(report, "s2", "s2")["level"] == "l2a"
    stored = world[1]["s2"][[SENSORS["s2"].band_names.index(band) for band in ("B04", "B03", "B02")]]
    visible = np.isclose(values, (stored.astype(float) - 100) / 1e4, atol=1e-5).all(0)
    assert 0.3 < visible.mean() < 0.5


# Which pixels


def test_masks_depend_on_the_seed_alone(made, world, radar_model, tmp_path):
    for seed in (0, 1):
        reconstruct(radar_model, tmp_path / str(seed), inputs(world, "s1", "s2"), seed=seed)
    first, again, other = (read(folder / "s1_to_s2.tif")[0] for folder in (made[0], tmp_path / "0", tmp_path / "1"))
    assert np.array_equal(first, again, equal_nan=True) and not np.array_equal(first, other, equal_nan=True)


def test_a_large_image_is_looked_at_in_its_middle(world, radar_model, tmp_path):
    report = reconstruct(radar_model, tmp_path, inputs(world, "s1", "s2"), size=37)
    assert report["places"][0]["window"] == {"top": 6, "left": 14, "height": 32, "width": 32}
    values, profile = read(tmp_path / "s1_to_s1.tif")
    assert values.shape == (2, 32, 32)
    assert profile["transform"] == TRANSFORM @ rasterio.Affine.translation(14, 6)
    truth = world[1]["s1"][:, 6:38, 14:46]
    assert np.array_equal(np.isnan(values), np.isnan(truth)) and 0.3 < np.isclose(values, truth, atol=1e-3).mean() < 0.5
    assert "60 x 44 pixels: only the centred 32 x 32 was looked at" in format_reconstruction(report)


def test_images_without_a_place_on_the_map_stay_so(world, radar_model, tmp_path):
    write(tmp_path / "s1.tif", np.nan_to_num(world[1]["s1"], nan=-12), ["VV", "VH"], transform=None)
    reconstruct(radar_model, tmp_path / "out", [f"s1={tmp_path / 's1.tif'}"])
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        assert read(tmp_path / "out" / "s1_to_s1.tif")[1]["crs"] is None
    # Beside one that has a place, it takes that.
    reconstruct(radar_model, tmp_path / "two", [f"s1={tmp_path / 's1.tif'}", *inputs(world, "s2")])
    assert read(tmp_path / "two" / "s1_to_s1.tif")[1]["transform"] == TRANSFORM


# Shards


@pytest.fixture(scope="module")
def shards(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, "pairs", ["s1", "s2"], {"s2": "l1c"}) as writer:
        for number in range(5):
            images = {
                "s1": ShardImage(
                    np.roll(np.nan_to_num(world[1]["s1"], nan=-12), number, 1), ["VV", "VH"], "db", gsd=10
                ),
                "s2": ShardImage(np.roll(world[1]["s2"], number, 1), SENSORS["s2"].band_names, "dn", 1e-4),
            }
            writer.write(ShardRow(f"a/key {number}", "pairs", "val", "place", images, pair_id=str(number)))
    return folder


def test_rows_of_shards_have_a_folder_each(shards, radar_model, tmp_path):
    report = reconstruct(radar_model, tmp_path, shards=shards, rows=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs-0", "pairs-4", "reconstruction.json"]
    assert [(place["row"], place["key"]) for place in report["places"]] == [(0, "a/key 0"), (4, "a/key 4")]
    for number, place in enumerate(report["places"]):
        assert ways(report, number) == [("s1", "s1"), ("s2", "s2"), ("s1", "s2"), ("s2", "s1")]
        assert all((tmp_path / entry["file"]).is_file() for entry in place["directions"])
        assert (tmp_path / f"pairs-{place['row']}" / "sar_statistics.png").is_file()
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        first, last = (np.isnan(read(tmp_path / f"pairs-{row}" / "s1_to_s2.tif")[0]).all(0) for row in (0, 4))
    assert not np.array_equal(first, last)
    assert "pairs, row 4 of val (a/key 4), 60 x 44 pixels" in format_reconstruction(report)


def test_damage_on_the_way_leaves_nothing(shards, radar_model, tmp_path):
    shutil.copytree(shards, tmp_path / "shards")
    (file,) = (tmp_path / "shards").rglob("*.parquet")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptShardError):
        reconstruct(radar_model, tmp_path / "out", shards=tmp_path / "shards", rows=5)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


# What is refused


def test_inputs_or_shards(radar_model, world, shards, tmp_path):
    with pytest.raises(ValueError, match="`input` or `shards` must be given, but not both, got neither"):
        reconstruct(radar_model, tmp_path / "out")
    with pytest.raises(ValueError, match="`input` or `shards` must be given, but not both, got both"):
        reconstruct(radar_model, tmp_path / "out", inputs(world, "s1"), shards)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rows": 0}, "`rows` must be at least 1, got 0"),
        ({"size": 7}, "`size` must be at least one masked cell of 8 pixels, got 7"),
        ({"region": "some"}, "`region` must be one of masked, all, got 'some'"),
        ({"mask_ratio": 0}, "`mask_ratio` must be above 0 and at most 1, got 0. Nothing masked leaves"),
        ({"mask_ratio": 1.5}, "`mask_ratio` must be above 0 and at most 1, got 1.5"),
    ],
)
def test_arguments_out_of_range_are_refused(radar_model, world, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        reconstruct(radar_model, tmp_path / "out", inputs(world, "s1"), **options)
    assert not list(tmp_path.iterdir())


def test_a_former_reconstruction_is_replaced_whole(shards, radar_model, world, tmp_path):
    reconstruct(radar_model, tmp_path / "out", shards=shards, rows=1)
    assert [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    kept = tmp_path / "out" / "notes.txt"
    kept.write_text("mine")
    report = reconstruct(radar_model, tmp_path / "out", inputs(world, "s2"))
    expected = {entry["file"] for entry in report["places"][0]["directions"]}
    expected |= {"reconstruction.json", "reconstruction.png", "notes.txt"}
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert found - {"sar_statistics.png"} == expected


@pytest.mark.parametrize("numbers", [None, "[]", '{"places": [{}]}', "{"])
def test_a_folder_of_something_else_is_left_alone(radar_model, world, tmp_path, numbers):
    (tmp_path / "thesis.tif").touch()
    if numbers is not None:
        (tmp_path / "reconstruction.json").write_text(numbers)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="`out` must be new, empty, or the folder of a former reconstruction, got"):
        reconstruct(radar_model, tmp_path, inputs(world, "s2"))
    assert sorted(tmp_path.iterdir()) == before


def test_files_outside_the_folder_are_not_removed(radar_model, world, tmp_path):
    (tmp_path / "thesis.tif").touch()
    (tmp_path / "out").mkdir()
    record = {"places": [{"directions": [{"file": "../thesis.tif"}]}]}
    (tmp_path / "out" / "reconstruction.json").write_text(json.dumps(record))
    reconstruct(radar_model, tmp_path / "out", inputs(world, "s2"))
    assert (tmp_path / "thesis.tif").exists()


def test_out_must_be_a_folder(radar_model, world, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="`out` must be a folder, got the file"):
        reconstruct(radar_model, tmp_path / "out", inputs(world, "s1"))
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_that_is_no_model(radar_model, world, tmp_path):
    with pytest.raises(ValueError, match="`model` must be the folder .* without config.json. Pretraining"):
        reconstruct(tmp_path, tmp_path / "out", inputs(world, "s1"))
    shutil.copytree(radar_model, tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="`model` must be the folder .* without preprocessor_config.json"):
        reconstruct(tmp_path / "bare", tmp_path / "out", inputs(world, "s1"))


def test_a_head_has_no_decoders(radar_model, world, tmp_path):
    bands = {"s1": ["VV", "VH"]}
    head = MsGFMForImageClassification.from_pretrained(radar_model, num_labels=2, inputs=bands)
    head.save_pretrained(tmp_path / "head")
    MsGFMImageProcessor.from_config(head.config).save_pretrained(tmp_path / "head")
    message = "`model` must be of MsGFMForPreTraining, .* of MsGFMForImageClassification without decoders.s1"
    with pytest.raises(ValueError, match=message):
        reconstruct(tmp_path / "head", tmp_path / "out", inputs(world, "s1"))


def test_a_sensor_the_model_lacks(radar_model, world, tmp_path):
    with pytest.raises(ValueError, match=r"`model` must have the sensors of the images, got dsm beside .* \(s1, s2\)"):
        reconstruct(radar_model, tmp_path / "out", inputs(world, "s1", "dsm"))
    with ShardWriter(tmp_path / "shards", "city", ["rgb"]) as writer:
        image = ShardImage(world[1]["rgb"], ["red", "green", "blue"], "dn", 1 / 255)
        writer.write(ShardRow("a", "city", "val", "place", {"rgb": image}))
    with pytest.raises(ValueError, match="`model` must have the sensors of the images, got rgb beside"):
        reconstruct(radar_model, tmp_path / "out", shards=tmp_path / "shards")
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


@pytest.mark.parametrize(
    "shape, transform, crs",
    [
        ((HEIGHT, WIDTH - 1), TRANSFORM, "EPSG:32632"),
        ((HEIGHT, WIDTH), TRANSFORM @ rasterio.Affine.translation(0.5, 0), "EPSG:32632"),
        ((HEIGHT, WIDTH), TRANSFORM @ rasterio.Affine.scale(1.01), "EPSG:32632"),
        ((HEIGHT, WIDTH), TRANSFORM, "EPSG:32633"),
    ],
)
def test_images_on_other_grids_are_refused(radar_model, world, tmp_path, shape, transform, crs):
    write(tmp_path / "s1.tif", np.full((2, *shape), -10, np.float32), ["VV", "VH"], transform, crs)
    message = (
        "`input` must be images on one pixel grid, got .*s2.tif with .*EPSG.*, and .*s1.tif with .*scenes.*gdalwarp"
    )
    with pytest.raises(ValueError, match=message):
        reconstruct(radar_model, tmp_path / "out", [f"s1={tmp_path / 's1.tif'}", *inputs(world, "s2")])
    assert [path.name for path in tmp_path.iterdir()] == ["s1.tif"]


def test_a_grid_of_another_rounding_is_the_same(radar_model, world, tmp_path):
    near = rasterio.Affine(10.0000001, 0, 500000.0001, 0, -10, 6100000)
    write(tmp_path / "s1.tif", np.nan_to_num(world[1]["s1"], nan=-9), ["VV", "VH"], near)
    report = reconstruct(radar_model, tmp_path / "out", [f"s1={tmp_path / 's1.tif'}", *inputs(world, "s2")])
    assert len(ways(report)) == 4


def test_an_image_without_a_valid_pixel_is_refused(radar_model, tmp_path):
    write(tmp_path / "s1.tif", np.full((2, 32, 32), np.nan, np.float32), ["VV", "VH"])
    with pytest.raises(ValueError, match="`input` must have valid pixels, got none for sensor 's1'"):
        reconstruct(radar_model, tmp_path / "out", [f"s1={tmp_path / 's1.tif'}"])
    assert [path.name for path in tmp_path.iterdir()] == ["s1.tif"]


def test_values_that_cannot_be_are_refused(radar_model, tmp_path):
    write(tmp_path / "s1.tif", np.full((2, 32, 32), 0.1, np.float32), ["VV", "VH"])
    with pytest.raises(ValueError, match="`pixels` for sensor 's1' must have a median of at most 0"):
        reconstruct(radar_model, tmp_path / "out", [f"s1={tmp_path / 's1.tif'}"])
    reconstruct(radar_model, tmp_path / "out", [f"s1={tmp_path / 's1.tif'},unit=power"])
    values, _ = read(tmp_path / "out" / "s1_to_s1.tif")
    assert np.isclose(values, -10, atol=1e-3).mean() > 0.3


# The command


def test_the_command_prints_both_tables(radar_model, world, tmp_path, capsys, monkeypatch):
    words = ["msgfm", "reconstruct", "--model", radar_model, "--out", tmp_path / "out", "--mask_ratio", 0.5]
    monkeypatch.setattr(
        sys, "argv", [*map(str, words), *(w for text in inputs(world, "s1", "s2") for w in ("--input", text))]
    )
    main()
    said = capsys.readouterr().out
    assert "s2 → s1    ?        s2_to_s1.tif  masked" in said and " dB " in said and "reflectance" in said
    assert "SSI" in said and "reconstruction.json" in said
    report = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    assert report["command"].startswith("msgfm reconstruct --model") and report["mask_ratio"] == 0.5


def test_the_command_fails_in_one_line(radar_model, world, tmp_path, capsys, monkeypatch):
    words = [
        "msgfm",
        "reconstruct",
        "--model",
        radar_model,
        "--out",
        tmp_path / "out",
        *("--input", inputs(world, "rgb")[0]),
    ]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and "msgfm reconstruct: `model` must have the sensors of the images" in said
    assert "Traceback" not in said and not list(tmp_path.iterdir())


def test_the_help_teaches(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["msgfm", "reconstruct", "--help"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().out
    for word in ("--input", "bands=", "--shards", "--mask_ratio", "--size", "gdalwarp", "speckle", "linear power"):
        assert word in said


# The drawing alone


def test_a_picture_without_a_predicted_pixel_is_drawn(world, tmp_path):
    """A single visible cell may leave nothing to see: grey, and no warning."""
    shape = (1, 24, 16)
    rows = [
        Reconstructed(
            "rgb",
            "dsm",
            False,
            {sensor: SENSORS[sensor] for sensor in ("rgb", "dsm")},
            {sensor: SENSORS[sensor].band_names for sensor in ("rgb", "dsm")},
            np.zeros((3, *shape[1:])),
            np.zeros(shape[1:], bool),
            np.full(shape, np.nan),
            None,
            None,
            "no image of dsm given",
            None,
        )
    ]
    path = draw_directions(rows, "nothing", tmp_path / "picture.png")
    with Image.open(path) as picture:
        assert picture.width > picture.height > 300


# Real imagery


def test_real_radar_and_optical_images(sample_data, radar_model, tmp_path):
    place = sample_data / "s1s2_terramesh" / "637U_59R_1_3"
    given = [f"s1={place / 'S1RTC.tif'}", f"s2={place / 'S2L1C.tif'},offset=0"]
    report = reconstruct(radar_model, tmp_path, given, size=96, region="all")
    assert ways(report) == [("s1", "s1"), ("s2", "s2"), ("s1", "s2"), ("s2", "s1")]
    with rasterio.open(place / "S1RTC.tif") as file:
        window = rasterio.windows.Window(64, 64, 96, 96)
        truth, transform, crs = file.read(window=window), file.window_transform(window), file.crs
    values, profile = read(tmp_path / "s2_to_s1.tif")
    assert (profile["transform"], profile["crs"]) == (transform, crs)
    found = way(report, "s2", "s1")["errors"]["all"]
    clipped = np.clip(truth, [[[-25]], [[-32.5]]], 0)
    assert found["error"] == pytest.approx(np.abs(values - clipped).mean(), rel=1e-3)
    before = way(report, "s2", "s1")["backscatter"]["all"]["VV"]["before"]
    assert before["mean_db"] == pytest.approx(clipped[0].mean(), abs=1e-2)
