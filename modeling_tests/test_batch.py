"""Batches: what leaves the workers becomes a step of the objective, and chance depends on the sample and step alone."""

from collections import Counter

import numpy as np
import pytest
import torch

from msgfm_hf.data.batch import (
    PreTrainingBatches,
    collate,
    count_loss_pixels,
    draw_targets,
    normalise,
    rotations,
    sample_masks,
)
from msgfm_hf.data.mixture import EvaluationCrops, MixtureDataset, SourceOrder
from msgfm_hf.data.shards import ShardImage, ShardRow, ShardSource, ShardWriter
from msgfm_hf.model.configuration_msgfm import MsGFMConfig
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.masking import mask_to_pixels

SIZE = 24
BANDS = ["B04", "B08", "B11"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Unpaired aerial RGB, and pairs of Sentinel-1 and three bands of Sentinel-2 whose offset differs between rows."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(5)
    with ShardWriter(folder, "aerial", ["rgb"]) as writer:
        for number in range(6):
            pixels = rng.integers(0, 256, (3, 30, 28), dtype=np.uint8)
            image = ShardImage(pixels, ["red", "green", "blue"], "dn", 1 / 255)
            writer.write(ShardRow(f"a{number}", "aerial", "train", f"town{number}", {"rgb": image}))
    with ShardWriter(folder, "pairs", ["s1", "s2"], {"s2": "l2a"}) as writer:
        for number in range(6):
            s1 = rng.normal(-14, 3, (2, 26, 32)).astype(np.float32)
            s1[:, :5, :7] = np.nan
            s2 = rng.integers(1100, 5000, (3, 26, 32), dtype=np.uint16)
            s2[:, 10:16, 10:22] = 60000  # a cloud brighter than int16 can hold
            s2[:, -6:, -9:] = 0
            offset = -0.1 if number % 2 else 0.0
            images = {
                "s1": ShardImage(s1, ["VV", "VH"], "db", nodata=float("nan")),
                "s2": ShardImage(s2, BANDS, "dn", 1e-4, offset, nodata=0.0),
            }
            writer.write(ShardRow(f"p{number}", "pairs", "train", "coast", images, pair_id=f"p{number}"))
    return [ShardSource(folder / name) for name in ("aerial", "pairs")]


@pytest.fixture(scope="module")
def config():
    return MsGFMConfig(
        embed_dim=12, depths=[1, 1, 2], num_heads=[1, 1, 2], window_size=3, image_size=SIZE, mask_patch_size=8
    )


@pytest.fixture(scope="module")
def processor(config):
    return MsGFMImageProcessor.from_config(config)


def samples(sources, items):
    orders = [SourceOrder(source.row_groups, source.name, 0) for source in sources]
    return MixtureDataset(sources, orders, SIZE, 0).__getitems__(items)


def batches(sources, processor, config, **changes):
    options = {
        "seed": 0,
        "mask_ratio": 0.6,
        "cross_sensor_ratio": 0.5,
        "cross_loss_region": "masked",
        "weights": [1.0, 0.25],
    }
    return PreTrainingBatches(sources, processor, config, **(options | changes))


# Stacking


def test_samples_are_stacked_source_by_source_in_their_stored_dtype(sources):
    drawn = samples(sources, [(1, 0), (0, 3), (1, 1), (0, 4), (1, 2)])
    batch = collate(drawn)
    aerial, pairs = batch["sources"]
    assert (aerial["index"], pairs["index"]) == (0, 1)
    assert (aerial["positions"], pairs["positions"]) == ([3, 4], [0, 1, 2])
    assert aerial["keys"] == [drawn[1]["key"], drawn[3]["key"]]
    assert aerial["group_ids"] == [key.replace("a", "town") for key in aerial["keys"]]
    assert aerial["images"]["rgb"]["pixels"].dtype == torch.uint8
    assert pairs["images"]["s1"]["pixels"].dtype == torch.float32
    assert pairs["images"]["s2"]["pixels"].dtype == torch.uint16
    assert pairs["images"]["s2"]["pixels"].shape == (3, 3, SIZE, SIZE)
    for place, sample in enumerate(drawn[::2]):
        for sensor, image in pairs["images"].items():
            np.testing.assert_array_equal(image["pixels"][place].numpy(), sample["images"][sensor]["pixels"])
            np.testing.assert_array_equal(image["valid"][place].numpy(), sample["images"][sensor]["valid"])
            assert image["valid"].dtype == torch.bool
            assert image["scale"][place].item() == sample["images"][sensor]["scale"]
            assert image["offset_dn"][place].item() == sample["images"][sensor]["offset_dn"]
    assert {-1000.0, 0.0} == set(pairs["images"]["s2"]["offset_dn"].tolist())
    assert batch["bad"] == []


def test_numbers_that_only_uint16_can_hold_survive(sources):
    pixels = collate([EvaluationCrops(sources[1], SIZE)[0]])["sources"][0]["images"]["s2"]["pixels"]
    assert (pixels.to(torch.int64) == 60000).sum() == 3 * 6 * 12


def test_damaged_rows_are_listed_once_each(sources):
    drawn = samples(sources, [(0, 0), (0, 1), (1, 0)])
    drawn[0]["bad"] = [("aerial[3]", "damage")]
    drawn[2]["bad"] = [("pairs[1]", "damage"), ("pairs[2]", "more")]
    assert collate(drawn)["bad"] == [("aerial[3]", "damage"), ("pairs[1]", "damage"), ("pairs[2]", "more")]


# Crossings


def draws(sensors, ratio, count=400):
    return [draw_targets(sensors, ratio, np.random.default_rng([9, number])) for number in range(count)]


def test_rotations_hold_every_direction_once():
    assert rotations(["b", "a"]) == [{"a": "a", "b": "b"}, {"a": "b", "b": "a"}]
    assert rotations(["rgb"]) == [{"rgb": "rgb"}]
    ways = [way for targets in rotations(["c", "a", "d", "b"]) for way in targets.items()]
    assert len(ways) == 16 == len(set(ways))


def test_without_crossing_every_sensor_predicts_itself():
    assert all(targets == {"s1": "s1", "s2": "s2"} for targets in draws(["s1", "s2"], 0.0))


def test_with_ratio_one_a_pair_is_always_exchanged():
    assert all(targets == {"s1": "s2", "s2": "s1"} for targets in draws(["s2", "s1"], 1.0))


def test_both_directions_cross_together_as_often_as_asked():
    found = Counter(tuple(sorted(targets.items())) for targets in draws(["s1", "s2"], 0.3, 2000))
    own, crossed = (("s1", "s1"), ("s2", "s2")), (("s1", "s2"), ("s2", "s1"))
    assert set(found) == {own, crossed}
    # Four standard deviations of a binomial count: sqrt(2000 * 0.3 * 0.7) = 20.5.
    assert abs(found[crossed] - 600) < 82


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_three_sensors_rotate_and_every_decoder_is_used(ratio):
    found = draws(["a", "b", "c"], ratio)
    for targets in found:
        assert sorted(targets) == sorted(targets.values()) == ["a", "b", "c"]
    turns = Counter(targets["a"] for targets in found)
    if ratio == 0:
        assert set(turns) == {"a"}
    else:
        # Both rotations occur about equally often, and never half of one: a sensor alone keeps to itself.
        assert abs(turns["b"] - turns["c"]) < 80
        assert all(sum(s == t for s, t in targets.items()) in (0, 3) for targets in found)
        assert ("a" in turns) == (ratio < 1)


def test_a_sensor_without_a_partner_predicts_itself():
    assert draws(["rgb"], 1.0, 3) == [{"rgb": "rgb"}] * 3


def test_the_crossing_is_drawn_from_seed_source_and_step_alone(sources, processor, config):
    def drawn(seed, source="pairs", steps=range(60)):
        made = batches(sources, processor, config, seed=seed)
        return [made.targets(step, source, ["s1", "s2"]) for step in steps]

    # Another process with the same seed, whatever it did before, agrees: ranks need not talk.
    assert drawn(3) == drawn(3)
    assert drawn(3)[40:] == drawn(3, steps=range(40, 60))
    assert drawn(3) != drawn(4)
    assert drawn(3) != drawn(3, source="coast")


# Masks


def masks_of(positions, config, source="pairs", sensor="s1", seed=0, ratio=0.6):
    return sample_masks(positions, source, sensor, config, ratio, seed, SIZE)


def test_a_mask_belongs_to_its_sample_whatever_the_batch(config):
    together = masks_of([4, 5, 6, 7, 8], config)
    assert together.shape == (5, (SIZE // 4) ** 2)
    assert together.dtype == torch.bool
    torch.testing.assert_close(masks_of([8, 4, 6], config), together[[4, 0, 2]])
    torch.testing.assert_close(masks_of([5], config), together[1:2])


def test_loss_pixels_are_counted_by_sensor_name_whatever_the_order(config):
    patches = (SIZE // config.patch_size) ** 2
    seen = {"s2": torch.zeros(1, SIZE, SIZE, dtype=torch.bool), "s1": torch.ones(1, SIZE, SIZE, dtype=torch.bool)}
    seen["s2"][:, 0, :3] = True
    inputs = {
        "pixel_values": [{sensor: torch.zeros(1, 2, SIZE, SIZE) for sensor in seen}],
        "bool_loss_pos": [{sensor: torch.ones(1, patches, dtype=torch.bool) for sensor in seen}],
        "valid_mask": [seen],
        "targets": [{"s1": "s1", "s2": "s2"}],
    }
    assert count_loss_pixels(inputs, config.patch_size).tolist() == [SIZE * SIZE, 3]


def test_masks_differ_between_samples_sensors_sources_and_seeds(config):
    first = masks_of(range(20), config)
    assert len({tuple(mask.tolist()) for mask in first}) > 15
    for other in (
        masks_of(range(20), config, sensor="s2"),
        masks_of(range(20), config, source="aerial"),
        masks_of(range(20), config, seed=1),
    ):
        # Two masks of 6 among 9 cells agree once in 84.
        assert (first != other).any(1).sum() > 15


@pytest.mark.parametrize("ratio, cells", [(0.0, 0), (0.6, 6), (1.0, 9)])
def test_masks_hide_whole_cells_of_the_asked_share(config, ratio, cells):
    pixels = mask_to_pixels(masks_of(range(4), config, ratio=ratio), SIZE, SIZE, config.patch_size)
    by_cell = pixels.view(4, 3, 8, 3, 8).transpose(2, 3).flatten(3).float().mean(-1)
    assert by_cell.unique().tolist() == sorted({0.0, 1.0} if 0 < cells < 9 else {float(cells > 0)})
    assert (by_cell.flatten(1).sum(1) == cells).all()


# One step


def test_pixels_are_those_of_the_image_processor(sources, processor):
    aerial, pairs = (collate([EvaluationCrops(source, SIZE)[n] for n in range(4)])["sources"][0] for source in sources)
    values, valid = normalise(pairs["images"], sources[1], processor, CPU)
    for row, stored in enumerate(pairs["images"]["s2"]["pixels"]):
        expected = processor(
            {"s1": pairs["images"]["s1"]["pixels"][row].numpy(), "s2": stored.numpy()},
            bands={"s2": BANDS},
            unit={"s1": "db", "s2": "dn"},
            scale={"s2": 1e-4},
            offset={"s2": pairs["images"]["s2"]["offset_dn"][row].item()},
            level={"s2": "l2a"},
            nodata={"s2": 0},
            check=False,
            return_tensors="pt",
        )
        for sensor in ("s1", "s2"):
            torch.testing.assert_close(values[sensor][row], expected["pixel_values"][sensor][0], atol=1e-5, rtol=1e-5)
            assert torch.equal(valid[sensor][row], expected["valid_mask"][sensor][0])
            assert 0.6 < valid[sensor][row].float().mean() < 1
    values, _ = normalise(aerial["images"], sources[0], processor, CPU)
    # ImageNet's red: (stored / 255 - 0.485) / 0.229.
    red = (aerial["images"]["rgb"]["pixels"][:, 0].double() / 255 - 0.485) / 0.229
    torch.testing.assert_close(values["rgb"][:, 0], red.float(), atol=1e-5, rtol=1e-5)


def test_the_level_of_the_source_chooses_the_statistics(sources, processor):
    part = collate([EvaluationCrops(sources[1], SIZE)[1]])["sources"][0]
    values, valid = normalise({"s2": part["images"]["s2"]}, sources[1], processor, CPU)
    stored = part["images"]["s2"]["pixels"][0, 0].double()
    # B04 of Sentinel-2 L2A in SSL4EO-S12: mean 1297.473, deviation 1368.114 digital numbers; this row has offset -1000.
    expected = ((stored - 1000).clamp(0, 10000) - 1297.473) / 1368.114
    torch.testing.assert_close(values["s2"][0, 0][valid["s2"][0]], expected[valid["s2"][0]].float())


def test_a_step_has_what_the_model_takes(sources, processor, config):
    batch = collate(samples(sources, [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]))
    made = batches(sources, processor, config, cross_sensor_ratio=1.0)
    inputs = made(batch, 7, CPU)
    assert [{s: tuple(v.shape) for s, v in source.items()} for source in inputs["pixel_values"]] == [
        {"rgb": (2, 3, SIZE, SIZE)},
        {"s1": (3, 2, SIZE, SIZE), "s2": (3, 3, SIZE, SIZE)},
    ]
    assert inputs["targets"] == [{"rgb": "rgb"}, {"s1": "s2", "s2": "s1"}]
    assert inputs["weights"] == [1.0, 0.25]
    assert inputs["bands"] == [{"rgb": ["red", "green", "blue"]}, {"s1": ["VV", "VH"], "s2": BANDS}]
    pairs = inputs["bool_masked_pos"][1]
    torch.testing.assert_close(pairs["s1"], masks_of([0, 1, 2], config))
    torch.testing.assert_close(pairs["s2"], masks_of([0, 1, 2], config, sensor="s2"))
    assert not inputs["valid_mask"][1]["s1"].all()


def test_weights_follow_the_source_where_a_step_lacks_one(sources, processor, config):
    inputs = batches(sources, processor, config)(collate(samples(sources, [(1, 0)])), 0, CPU)
    assert inputs["weights"] == [0.25]


@pytest.mark.parametrize("ratio, region, everywhere", [(1.0, "all", True), (1.0, "masked", False), (0.0, "all", False)])
def test_the_loss_of_a_crossing_counts_its_region(sources, processor, config, ratio, region, everywhere):
    made = batches(sources, processor, config, cross_sensor_ratio=ratio, cross_loss_region=region)
    inputs = made(collate(samples(sources, [(0, 0), (1, 0), (1, 1)])), 0, CPU)
    for source, masks in zip(inputs["bool_loss_pos"], inputs["bool_masked_pos"], strict=True):
        for sensor, counted in source.items():
            if everywhere and sensor != "rgb":
                assert counted.all() and counted.shape == masks[sensor].shape
            else:
                torch.testing.assert_close(counted, masks[sensor])


def test_a_region_that_does_not_exist_is_refused(sources, processor, config):
    with pytest.raises(ValueError, match="`cross_loss_region` must be one of masked, all, got 'visible'"):
        batches(sources, processor, config, cross_loss_region="visible")


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan")])
def test_a_crossing_ratio_outside_its_range_is_refused(sources, processor, config, ratio):
    with pytest.raises(ValueError, match=f"`cross_sensor_ratio` must be within 0..1, got {ratio}"):
        batches(sources, processor, config, cross_sensor_ratio=ratio)
