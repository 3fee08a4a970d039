"""The evaluation of reconstructions: the measure, the baselines beside it, and that evaluating changes nothing."""

import contextlib
import dataclasses
import math
import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from msgfm_hf.data.mixture import EvaluationCrops
from msgfm_hf.data.shards import ShardImage, ShardRow, ShardSource, ShardWriter
from msgfm_hf.model.configuration_msgfm import MsGFMConfig
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.masking import mask_to_pixels
from msgfm_hf.model.modeling_msgfm import MsGFMForPreTraining, MsGFMForPreTrainingOutput
from msgfm_hf.tasks.reconstruction import (
    MaskedCrops,
    TrainingStatistics,
    baselines,
    bilinear_inpaint,
    counted_pixels,
    directions,
    evaluate_reconstruction,
    masked_crops,
    predict_directions,
    training_statistics,
)

SIZE = 24
TINY = {
    "embed_dim": 12,
    "depths": [1, 1, 2],
    "num_heads": [1, 1, 2],
    "window_size": 3,
    "image_size": SIZE,
    "mask_patch_size": 8,
    "num_experts": 2,
}


def pair(rng, size=32):
    """RGB, and a height that follows from red exactly; a strip of the height was not measured."""
    rgb = rng.integers(0, 256, (3, size, size), dtype=np.uint8)
    dsm = (100 + 0.2 * rgb[:1]).astype(np.float32)
    dsm[:, :, -7:-4] = np.nan
    return {
        "rgb": ShardImage(rgb, ["red", "green", "blue"], "dn", 1 / 255),
        "dsm": ShardImage(dsm, ["height"], "metres", nodata=float("nan")),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = np.random.default_rng(2)
    root = tmp_path_factory.mktemp("shards")
    with ShardWriter(root, "pairs", ["rgb", "dsm"]) as writer:
        for split, rows in (("train", 12), ("val", 5)):
            for number in range(rows):
                # Three of the five validation rows are of one place.
                place = "north" if number < 3 else "south"
                writer.write(ShardRow(f"{split}{number}", "pairs", split, f"{split} {place}", pair(rng), pair_id="p"))
    return root / "pairs"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    sensors = {sensor: spec for sensor, spec in MsGFMConfig().sensors.items() if sensor in ("rgb", "dsm")}
    model = MsGFMForPreTraining(MsGFMConfig(**TINY, sensors=sensors)).eval()
    with torch.no_grad():
        for decoder in model.decoders.values():
            decoder.weight *= 20  # so that predictions differ from each other
    return model


@pytest.fixture(scope="module")
def processor(model):
    return MsGFMImageProcessor.from_config(model.config)


@pytest.fixture(scope="module")
def validation(folder):
    return ShardSource(folder, "val")


@pytest.fixture(scope="module")
def statistics(folder, processor):
    return training_statistics(ShardSource(folder, "train"), processor, SIZE)


# Inpainting


def test_a_hidden_pixel_is_the_mean_of_its_neighbours_by_distance():
    pixels = torch.tensor([[[[9.0, 0.0, 0.0, 3.0], [1.0, 1.0, 8.0, 1.0], [1.0, 4.0, 1.0, 1.0]]]])
    visible = torch.tensor([[[True, False, False, True], [True, False, True, True], [True, True, False, True]]])
    filled = bilinear_inpaint(pixels, visible)
    # (0, 1): 9 at one pixel to the left, 3 at two to the right, 4 at two below: (9 + 3 / 2 + 4 / 2) / (1 + 1/2 + 1/2).
    assert filled[0, 0, 0, 1].item() == pytest.approx(12.5 / 2)
    # (0, 2): 9 at two to the left, 3 at one to the right, 8 at one below.
    assert filled[0, 0, 0, 2].item() == pytest.approx((4.5 + 3 + 8) / 2.5)
    # (1, 1): 1 to the left, 8 to the right, 4 below, nothing above.
    assert filled[0, 0, 1, 1].item() == pytest.approx(13 / 3)
    # (2, 2): 4 to the left, 1 to the right, 8 above.
    assert filled[0, 0, 2, 2].item() == pytest.approx(13 / 3)
    assert torch.equal(filled[visible.unsqueeze(1)], pixels[visible.unsqueeze(1)])


def inpaint_in_a_loop(image, visible):
    height, width = visible.shape
    filled = image.copy()
    for row in range(height):
        for column in range(width):
            if visible[row, column]:
                continue
            total, weight = np.zeros(len(image)), 0.0
            for down, right in ((0, 1), (0, -1), (1, 0), (-1, 0)):
                distance = 1
                while 0 <= row + distance * down < height and 0 <= column + distance * right < width:
                    if visible[row + distance * down, column + distance * right]:
                        total += image[:, row + distance * down, column + distance * right] / distance
                        weight += 1 / distance
                        break
                    distance += 1
            seen = image[:, visible]
            filled[:, row, column] = total / weight if weight else seen.mean(1) if seen.size else 0
    return filled


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.8])
def test_inpainting_equals_a_plain_loop(share):
    rng = np.random.default_rng(int(share * 100))
    pixels, visible = rng.normal(size=(3, 2, 7, 11)), rng.random((3, 7, 11)) < share
    filled = bilinear_inpaint(torch.from_numpy(pixels), torch.from_numpy(visible)).numpy()
    for image, seen, result in zip(pixels, visible, filled, strict=True):
        np.testing.assert_allclose(result, inpaint_in_a_loop(image, seen), atol=1e-9)


def test_what_is_hidden_does_not_show_in_the_inpainting():
    visible = torch.zeros(1, 6, 6, dtype=torch.bool)
    visible[0, 1:3, 1:4] = True
    pixels = torch.randn(1, 2, 6, 6)
    other = torch.where(visible.unsqueeze(1), pixels, 1e6)
    torch.testing.assert_close(
        bilinear_inpaint(pixels, visible), bilinear_inpaint(other, visible).where(~visible.unsqueeze(1), pixels)
    )


# Training statistics


def test_means_medians_and_regressions_are_those_of_the_training_places(folder, processor, statistics):
    pixels = {"rgb": [], "dsm": []}
    for number in range(12):
        row = ShardSource(folder, "train").read(number)["images"]
        out = processor(
            {"rgb": row["rgb"].pixels[:, 4:28, 4:28].copy(), "dsm": row["dsm"].pixels[:, 4:28, 4:28].copy()}
        )
        both = out["valid_mask"]["rgb"][0] & out["valid_mask"]["dsm"][0]
        for sensor, values in pixels.items():
            values.append(out["pixel_values"][sensor][0][:, both].double().numpy())
    joined = {sensor: np.concatenate(values, 1) for sensor, values in pixels.items()}
    for sensor, values in joined.items():
        np.testing.assert_allclose(statistics.mean[sensor], values.mean(1), atol=1e-5)
        # torch's median is the lower of the two in the middle.
        np.testing.assert_allclose(statistics.median[sensor], np.median(values, 1), atol=0.02)
    assert set(statistics.regression) == {("rgb", "dsm"), ("dsm", "rgb")}
    # The height is a line in red within a crop; medians differ from crop to crop, so not quite over all of them.
    coefficients = statistics.regression["rgb", "dsm"].numpy()
    assert coefficients.shape == (4, 1)
    # 0.2 m per digital number: one standard deviation of red is 0.229 * 255 of them, of height 15 m.
    assert coefficients[0, 0] == pytest.approx(0.2 * 0.229 * 255 / 15, rel=0.02)
    np.testing.assert_allclose(coefficients[1:3, 0], 0, atol=0.02)


def test_the_regression_of_a_known_line_is_that_line(tmp_path, processor):
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path, "exact", ["rgb", "dsm"]) as writer:
        for number in range(4):
            images = pair(rng, SIZE)
            # Half the pixels at 100, so that this is the median of every crop.
            images["rgb"].pixels[0].flat[::2] = 100
            images["dsm"] = dataclasses.replace(images["dsm"], pixels=0.3 * images["rgb"].pixels[:1].astype("float32"))
            writer.write(ShardRow(f"{number}", "exact", "train", "here", images, pair_id="p"))
    found = training_statistics(ShardSource(tmp_path / "exact", "train"), processor, SIZE)
    # dsm = 0.3 (stored - 100) / 15 with stored = 255 (0.229 red + 0.485).
    slope, intercept = 0.3 * 255 * 0.229 / 15, 0.3 * (255 * 0.485 - 100) / 15
    np.testing.assert_allclose(found.regression["rgb", "dsm"][:, 0], [slope, 0, 0, intercept], atol=1e-4)


def test_the_list_of_crops_is_made_once(folder, processor, monkeypatch):
    # It reads the metadata of every row: of a large source that takes longer than the pixels that are used.
    read, calls = ShardSource.read_metadata, []

    def counting(source, indices):
        calls.append(source)
        return read(source, indices)

    monkeypatch.setattr(ShardSource, "read_metadata", counting)
    training_statistics(ShardSource(folder, "train"), processor, SIZE)
    assert len(calls) == 1


def test_a_source_without_a_pixel_that_all_sensors_have_is_refused(tmp_path, processor):
    with ShardWriter(tmp_path, "apart", ["rgb", "dsm"], check=False) as writer:
        images = pair(np.random.default_rng(0), SIZE)
        images["dsm"].pixels[:] = np.nan
        writer.write(ShardRow("a", "apart", "train", "here", images, pair_id="a"))
    with pytest.raises(ValueError, match="`source` must have pixels .*, got .*apart"):
        training_statistics(ShardSource(tmp_path / "apart", "train"), processor, SIZE)


# Baselines


@pytest.fixture
def crops():
    """One crop of 4 x 8 pixels with patches of 4: the left patch is masked in `rgb`, the right one in `dsm`."""
    rgb = torch.arange(32.0).view(1, 1, 4, 8)
    dsm = -rgb
    valid = torch.ones(1, 4, 8, dtype=torch.bool)
    hole = valid.clone()
    hole[0, :, 4] = False  # one column of the visible patch is invalid
    return MaskedCrops(
        ["place"],
        ["key"],
        {"rgb": torch.where(hole.unsqueeze(1), rgb, 0), "dsm": dsm},
        {"rgb": hole, "dsm": valid},
        {"rgb": torch.tensor([[True, False]]), "dsm": torch.tensor([[False, True]])},
        patch_size=4,
    )


@pytest.fixture
def known():
    return TrainingStatistics(
        mean={"rgb": torch.tensor([2.0]), "dsm": torch.tensor([3.0])},
        median={"rgb": torch.tensor([4.0]), "dsm": torch.tensor([5.0])},
        regression={("rgb", "dsm"): torch.tensor([[-2.0], [7.0]]), ("dsm", "rgb"): torch.tensor([[1.0], [0.0]])},
    )


def test_baselines_of_a_sensor_from_itself(crops, known):
    found = baselines(crops, known, "rgb", "rgb")
    assert set(found) == {"band_mean", "band_median", "visible_mean", "inpainting"}
    assert (found["band_mean"] == 2).all() and (found["band_median"] == 4).all()
    # Visible and valid are columns 5 to 7: 5, 6, 7 + 8 row, whose mean is 6 + 12.
    assert (found["visible_mean"] == 18).all()
    # Each masked pixel sees column 5 of its own row alone.
    torch.testing.assert_close(found["inpainting"][0, 0, :, 0], torch.tensor([5.0, 13.0, 21.0, 29.0]))
    assert found["inpainting"].shape == found["visible_mean"].shape == (1, 1, 4, 8)


def test_baselines_of_a_sensor_from_its_partner(crops, known):
    found = baselines(crops, known, "rgb", "dsm")
    assert set(found) == {"band_mean", "band_median", "regression"}
    assert (found["band_mean"] == 3).all() and (found["band_median"] == 5).all()
    # -2 * inpainted + 7: under the mask column 5 of the row, elsewhere the partner's own pixel.
    torch.testing.assert_close(found["regression"][0, 0, :, 0], 7 - 2 * torch.tensor([5.0, 13.0, 21.0, 29.0]))
    torch.testing.assert_close(found["regression"][0, 0, 1, 5:], 7 - 2 * torch.tensor([13.0, 14.0, 15.0]))


def test_pixels_count_where_the_input_is_masked_and_the_target_valid(crops):
    left = torch.zeros(1, 4, 8, dtype=torch.bool)
    left[..., :4] = True
    assert torch.equal(counted_pixels(crops, "rgb", None), left)
    assert torch.equal(counted_pixels(crops, "rgb", "dsm"), left)
    right = ~left
    right[..., 4] = False
    assert torch.equal(counted_pixels(crops, "dsm", "rgb"), right)
    assert torch.equal(counted_pixels(crops, "dsm", "dsm"), ~left)


def test_masks_are_spread_over_the_models_own_patches(tmp_path):
    # 42 pixels have 6 patches of 8 to a side, the last one cut; six of 7 pixels would fit too.
    with ShardWriter(tmp_path, "photos", ["rgb"]) as writer:
        image = ShardImage(np.full((3, 42, 42), 90, np.uint8), ["red", "green", "blue"], "dn", 1 / 255)
        writer.write(ShardRow("a", "photos", "val", "here", {"rgb": image}))
    options = TINY | {"image_size": 42, "patch_size": 8, "mask_patch_size": 8}
    rgb = MsGFMForPreTraining(MsGFMConfig(**options, sensors={"rgb": MsGFMConfig().sensors["rgb"]}))
    processor = MsGFMImageProcessor.from_config(rgb.config)
    (batch,) = masked_crops(ShardSource(tmp_path / "photos", "val"), processor, rgb, 0.5, 0, None, 4)
    counted = counted_pixels(batch, "rgb", None)[0]
    expected = batch.masks["rgb"][0].view(6, 6).repeat_interleave(8, 0).repeat_interleave(8, 1)[:42, :42]
    assert torch.equal(counted, expected)


def test_directions_are_every_sensor_then_every_pair():
    assert directions(["s2", "s1"]) == [("s1", "s1"), ("s2", "s2"), ("s1", "s2"), ("s2", "s1")]
    assert directions(["rgb"]) == [("rgb", "rgb")]


# Evaluation


def test_masks_belong_to_the_crop_and_the_seed(validation, processor, model):
    def masks(seed, batch_size, max_crops=None):
        batches = masked_crops(validation, processor, model, 0.6, seed, max_crops, batch_size)
        found = {}
        for batch in batches:
            found |= dict(zip(batch.keys, batch.masks["rgb"], strict=True))
        return found

    one, two, other = masks(0, 1), masks(0, 3), masks(1, 3)
    assert list(one) == [f"val{number}" for number in range(5)]
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    # Three of five, spread over the whole source, with the masks that they have anyway.
    few = masks(0, 2, max_crops=3)
    assert list(few) == ["val0", "val2", "val4"]
    assert all(torch.equal(one[key], few[key]) for key in few)


@torch.no_grad()
def evaluate_in_a_loop(model, processor, source, known, mask_ratio, seed):
    """The definition, crop by crop and pixel by pixel: sums over counted pixels of the error's mean over bands."""
    sums = {}
    for batch in masked_crops(source, processor, model, mask_ratio, seed, None, 1):
        predictions = predict_directions(model, batch, source)
        for sensor, target in directions(source.sensors):
            guesses = {"l1": predictions[sensor, target]} | baselines(batch, known, sensor, target)
            wanted, valid = batch.pixel_values[target][0].numpy(), batch.valid_mask[target][0].numpy()
            masked = batch.masks[sensor][0].numpy().reshape(SIZE // 4, SIZE // 4)
            entry = sums.setdefault((sensor, target, batch.group_ids[0]), dict.fromkeys(guesses, 0.0) | {"pixels": 0})
            for row in range(SIZE):
                for column in range(SIZE):
                    if masked[row // 4, column // 4] and valid[row, column]:
                        entry["pixels"] += 1
                        for name, guess in guesses.items():
                            difference = guess[0, :, row, column].numpy().astype(float) - wanted[:, row, column]
                            entry[name] += np.abs(difference).mean()
    return sums


def test_evaluation_equals_a_plain_loop(validation, processor, model, statistics):
    rows = evaluate_reconstruction(model, processor, [validation], {"pairs": statistics}, 0.6, 4, batch_size=2)
    sums = evaluate_in_a_loop(model, processor, validation, statistics, 0.6, 4)
    assert [(row["source"], row["input"], row["target"]) for row in rows] == [
        ("pairs", *way) for way in directions(["rgb", "dsm"])
    ]
    for row in rows:
        own = row["input"] == row["target"]
        methods = {"l1", "band_mean", "band_median"} | ({"visible_mean", "inpainting"} if own else {"regression"})
        assert set(row) == {"source", "input", "target", "crops", "places", "by_place"} | methods
        assert (row["crops"], row["places"]) == (5, 2)
        assert {place: values["crops"] for place, values in row["by_place"].items()} == {"val north": 3, "val south": 2}
        expected = {place: sums[row["input"], row["target"], place] for place in row["by_place"]}
        total = {name: sum(values[name] for values in expected.values()) for name in (*methods, "pixels")}
        for name in methods:
            assert row[name] == pytest.approx(total[name] / total["pixels"], rel=1e-5)
            for place, values in row["by_place"].items():
                assert values[name] == pytest.approx(expected[place][name] / expected[place]["pixels"], rel=1e-5)


def test_the_band_mean_alone_where_baselines_are_not_asked_for(validation, processor, model, statistics):
    arguments = model, processor, [validation], {"pairs": statistics}
    full, short = evaluate_reconstruction(*arguments), evaluate_reconstruction(*arguments, with_baselines=False)
    for row, other in zip(full, short, strict=True):
        assert set(other) == {"source", "input", "target", "crops", "places", "by_place", "l1", "band_mean"}
        assert other["l1"] == row["l1"]
        assert other["band_mean"] == pytest.approx(row["band_mean"])


class Oracle(MsGFMForPreTraining):
    """A stand-in that answers with the target's own pixels, half a unit off where its input is visible."""

    def forward(self, pixel_values, bool_masked_pos, bands, valid_mask, targets):
        reconstruction = {}
        for sensor, target in targets.items():
            masked = mask_to_pixels(bool_masked_pos[sensor], SIZE, SIZE, self.config.patch_size).unsqueeze(1)
            reconstruction[sensor] = torch.where(masked, pixel_values[target], pixel_values[target] + 0.5)
        return MsGFMForPreTrainingOutput(reconstruction=reconstruction)


def test_a_perfect_model_has_no_error(validation, processor, model, statistics):
    oracle = Oracle(model.config)
    rows = evaluate_reconstruction(oracle, processor, [validation], {"pairs": statistics})
    assert len(rows) == 4
    assert all(row["l1"] == 0 and row["band_mean"] > 0.1 for row in rows)


def test_predictions_do_not_see_masked_pixels(validation, processor, model):
    (batch,) = masked_crops(validation, processor, model, 0.6, 0, None, 8)
    before = predict_directions(model, batch, validation)
    assert set(before) == set(directions(["rgb", "dsm"]))
    hidden = counted_pixels(batch, "rgb", None).unsqueeze(1)
    altered = dataclasses.replace(
        batch, pixel_values=batch.pixel_values | {"rgb": torch.where(hidden, 9.0, batch.pixel_values["rgb"])}
    )
    for way, prediction in predict_directions(model, altered, validation).items():
        torch.testing.assert_close(prediction, before[way])
    # Nor the partner they are compared with.
    blank = dataclasses.replace(batch, pixel_values=batch.pixel_values | {"dsm": batch.pixel_values["dsm"] * 0 + 3})
    after = predict_directions(model, blank, validation)
    for target in ("rgb", "dsm"):
        torch.testing.assert_close(after["rgb", target], before["rgb", target])
    assert not torch.equal(after["dsm", "rgb"], before["dsm", "rgb"])


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_mode(validation, processor, model, statistics, training):
    model.train(training)
    try:
        evaluate_reconstruction(model, processor, [validation], {"pairs": statistics}, max_crops=1)
        assert all(module.training == training for module in model.modules())
    finally:
        model.eval()


def test_evaluating_draws_nothing_from_the_callers_chance(folder, validation, processor, model, statistics):
    """A run that evaluates at other steps, or is resumed, must go on with the same random numbers."""
    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    training_statistics(ShardSource(folder, "train"), processor, SIZE)
    evaluate_reconstruction(model, processor, [validation], {"pairs": statistics})
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_the_same_call_gives_the_same_numbers_in_any_batches(validation, processor, model, statistics):
    arguments = model, processor, [validation], {"pairs": statistics}
    one, again, whole = (evaluate_reconstruction(*arguments, batch_size=size) for size in (1, 1, 16))
    assert one == again
    for row, other in zip(one, whole, strict=True):
        assert row["l1"] == pytest.approx(other["l1"], rel=1e-5)


def test_the_model_runs_in_the_context_it_is_given(validation, processor, model, statistics):
    entered = []

    @contextlib.contextmanager
    def bf16():
        entered.append(1)
        with torch.autocast("cpu", torch.bfloat16):
            yield

    arguments = model, processor, [validation], {"pairs": statistics}
    exact, rounded = evaluate_reconstruction(*arguments), evaluate_reconstruction(*arguments, autocast=bf16)
    assert entered
    for row, other in zip(exact, rounded, strict=True):
        assert other["l1"] == pytest.approx(row["l1"], rel=0.05)
        assert other["l1"] != row["l1"]
        assert other["band_mean"] == row["band_mean"]


def test_nothing_masked_counts_nothing(validation, processor, model, statistics):
    rows = evaluate_reconstruction(model, processor, [validation], {"pairs": statistics}, mask_ratio=0.0)
    assert all(row["l1"] == row["band_mean"] == 0 and math.isfinite(row["l1"]) for row in rows)


def test_damaged_validation_rows_are_an_error(folder, tmp_path, processor, model, statistics):
    copy = shutil.copytree(folder, tmp_path / "pairs")
    table = pq.read_table(copy / "val-00000.parquet")
    rows = table.to_pylist()
    rows[1]["rgb"] = rows[1]["rgb"][:-5]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), copy / "val-00000.parquet")
    with pytest.raises(ValueError, match="`rgb` must hold 3072 bytes"):
        evaluate_reconstruction(model, processor, [ShardSource(copy, "val")], {"pairs": statistics})


def test_crops_are_those_of_the_grid(validation, processor, model):
    (batch,) = masked_crops(validation, processor, model, 0.6, 0, None, 8)
    stored = EvaluationCrops(validation, SIZE)[2]["images"]["rgb"]["pixels"]
    red = (torch.tensor(stored[0]).double() / 255 - 0.485) / 0.229
    torch.testing.assert_close(batch.pixel_values["rgb"][2, 0], red.float(), atol=1e-5, rtol=1e-5)
