"""The report on pretrained models: medians and spreads over seeds, places, and what made the numbers."""

import json
import re
import shutil
import statistics

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from msgfm_hf.data.shards import CorruptShardError, ShardImage, ShardRow, ShardSource, ShardWriter
from msgfm_hf.model.configuration_msgfm import MsGFMConfig
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.modeling_msgfm import MsGFMForPreTraining
from msgfm_hf.tasks.reconstruction import evaluate_reconstruction, training_statistics
from msgfm_hf.train.checkpoint import CheckpointError
from msgfm_hf.train.evaluate import draw_model, evaluate_models, format_report, write_report

SIZE = 24
WAYS = [("dsm", "dsm"), ("rgb", "rgb"), ("dsm", "rgb"), ("rgb", "dsm")]


def images(rng):
    return {
        "rgb": ShardImage(
            rng.integers(0, 256, (3, SIZE, SIZE), dtype=np.uint8), ["red", "green", "blue"], "dn", 1 / 255
        ),
        "dsm": ShardImage(rng.normal(200, 5, (1, SIZE, SIZE)).astype(np.float32), ["height"], "metres"),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(3)
    for source, splits in (("pairs", ("train", "val")), ("probe", ("test",)), ("untrained", ("val",))):
        with ShardWriter(folder, source, ["rgb", "dsm"]) as writer:
            for split in splits:
                for number in range(5):
                    place = f"{split} {'one' if number < 2 else 'two'}"
                    writer.write(ShardRow(f"{split}{number}", source, split, place, images(rng), pair_id="p"))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three seeds of one model; the first has the record of a run."""
    folder = tmp_path_factory.mktemp("models")
    sensors = {sensor: spec for sensor, spec in MsGFMConfig().sensors.items() if sensor in ("rgb", "dsm")}
    config = MsGFMConfig(
        embed_dim=12,
        depths=[1, 1, 2],
        num_heads=[1, 1, 2],
        window_size=3,
        image_size=SIZE,
        mask_patch_size=8,
        num_experts=2,
        sensors=sensors,
    )
    for seed in range(3):
        torch.manual_seed(seed)
        model = MsGFMForPreTraining(config)
        with torch.no_grad():
            for decoder in model.decoders.values():
                decoder.weight *= 10 * (seed + 1)
        model.save_pretrained(folder / f"seed{seed}")
        MsGFMImageProcessor.from_config(config).save_pretrained(folder / f"seed{seed}")
    record = {
        "identity": {"seed": 7, "max_steps": 40, "mask_ratio": 0.6},
        "commit": "0123456789ab",
        "command": "pretrain.py --seed 7",
        "versions": {"torch": "2"},
        "threads": 1,
        "recipe": {"cross_loss_region": "all"},
    }
    (folder / "seed0" / "run.json").write_text(json.dumps(record))
    return [folder / f"seed{seed}" for seed in range(3)]


@pytest.fixture(scope="module")
def report(data, models):
    return evaluate_models(models, [data], mask_seeds=2, command="msgfm evaluate --model 'a folder'")


@pytest.fixture(scope="module")
def by_hand(data, models):
    """{model: {(input, target): [row of mask seed 0, of 1]}}"""
    found = []
    for folder in models:
        model, processor = MsGFMForPreTraining.from_pretrained(folder), MsGFMImageProcessor.from_pretrained(folder)
        known = {"pairs": training_statistics(ShardSource(data / "pairs"), processor, SIZE)}
        seeds = [
            evaluate_reconstruction(model, processor, [ShardSource(data / "pairs", "val")], known, 0.6, s)
            for s in (0, 1)
        ]
        found.append({(a["input"], a["target"]): [a, b] for a, b in zip(*seeds, strict=True)})
    return found


def test_a_report_has_a_row_per_direction_of_what_can_be_evaluated(report):
    assert [(row["source"], row["input"], row["target"]) for row in report["rows"]] == [("pairs", *way) for way in WAYS]
    assert all((row["crops"], row["places"]) == (5, 2) for row in report["rows"])


def test_errors_are_means_over_masks_and_medians_over_models(report, by_hand):
    for row in report["rows"]:
        each = [statistics.fmean(seed["l1"] for seed in model[row["input"], row["target"]]) for model in by_hand]
        assert row["l1_by_model"] == pytest.approx(each, rel=1e-5)
        assert len(set(each)) == 3
        assert row["l1"] == sorted(row["l1_by_model"])[1]
        assert row["spread"] == [min(row["l1_by_model"]), max(row["l1_by_model"])]
        seeds = by_hand[0][row["input"], row["target"]]
        own = row["input"] == row["target"]
        names = {"band_mean", "band_median"} | ({"visible_mean", "inpainting"} if own else {"regression"})
        assert set(row["baselines"]) == names
        for name, value in row["baselines"].items():
            assert value == pytest.approx(statistics.fmean(seed[name] for seed in seeds), rel=1e-5)


def test_every_place_has_the_same_numbers(report, by_hand):
    for row in report["rows"]:
        assert {place: values["crops"] for place, values in row["by_place"].items()} == {"val one": 2, "val two": 3}
        for place, values in row["by_place"].items():
            seeds = [
                [seed["by_place"][place]["l1"] for seed in model[row["input"], row["target"]]] for model in by_hand
            ]
            each = [statistics.fmean(model) for model in seeds]
            assert values["l1_by_model"] == pytest.approx(each, rel=1e-5)
            assert values["l1"] == sorted(values["l1_by_model"])[1]
            assert set(values["baselines"]) == set(row["baselines"])


def test_two_models_are_summed_up_by_their_mean(report, data, models):
    two = evaluate_models(models[:2], [data / "pairs"], mask_seeds=2, max_crops=None)
    for row, all_three in zip(two["rows"], report["rows"], strict=True):
        assert row["l1_by_model"] == all_three["l1_by_model"][:2]
        assert row["l1"] == pytest.approx(sum(row["l1_by_model"]) / 2)


def test_a_report_says_what_made_it(report, models):
    assert report["command"] == "msgfm evaluate --model 'a folder'"
    assert re.fullmatch(r"[0-9a-f]{12}\+?", report["commit"])
    assert report["torch"] == torch.__version__ and report["device"] == "cpu"
    assert report["models"] == [str(path) for path in models]
    assert (report["split"], report["mask_ratio"], report["mask_seeds"]) == ("val", 0.6, 2)
    assert report["trained"][0]["seed"] == 7
    assert report["trained"][0]["command"] == "pretrain.py --seed 7"
    assert report["trained"][1:] == [None, None]
    assert "normalised units" in report["measure"]


def test_fewer_crops_are_said(data, models):
    few = evaluate_models(models[:1], [data / "pairs"], mask_seeds=1, max_crops=3)
    assert all(row["crops"] == 3 and row["spread"] == [row["l1"]] * 2 for row in few["rows"])


def test_a_written_report_reads_back(report, tmp_path):
    write_report(report, tmp_path / "new" / "report.json")
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == report
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.json"]


def test_a_report_that_cannot_be_written_leaves_the_one_before(report, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("before")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="must be writable, got .*: the disk is full"):
        write_report(report, path)
    assert path.read_text() == "before"


def test_the_table_puts_the_model_beside_the_baselines():
    report = {
        "rows": [
            {
                "source": "pairs",
                "input": "s1",
                "target": "s1",
                "crops": 12,
                "places": 3,
                "l1": 0.45,
                "spread": [0.4, 0.5],
                "baselines": {"band_mean": 0.9, "inpainting": 0.3},
            },
            {
                "source": "pairs",
                "input": "s1",
                "target": "s2",
                "crops": 12,
                "places": 3,
                "l1": 0.6,
                "spread": [0.6, 0.6],
                "baselines": {"band_mean": 1.2, "regression": 0.8},
            },
        ]
    }
    assert format_report(report).splitlines() == [
        "| source | direction | n | places | model (spread) | band mean | inpainting | regression |",
        "|---|---|---|---|---|---|---|---|",
        "| pairs | s1 → s1 | 12 | 3 | **0.450** (0.400-0.500) | 0.900 (0.50) | 0.300 (1.50) |  |",
        "| pairs | s1 → s2 | 12 | 3 | **0.600** (0.600-0.600) | 1.200 (0.50) |  | 0.800 (0.75) |",
    ]
    report["rows"][0]["places"] = 2
    assert format_report(report).startswith(
        "Demonstration, not evidence: fewer than three places per source.\n\n| source"
    )


def test_a_baseline_without_an_error_has_no_ratio():
    # A flat place: the band mean is right, and nothing can be a share of it.
    row = {"source": "lake", "input": "dsm", "target": "dsm", "crops": 1, "places": 3, "l1": 0.1, "spread": [0.1, 0.1]}
    assert "0.000" in format_report({"rows": [row | {"baselines": {"band_mean": 0.0}}]})


@pytest.mark.parametrize("split, source", [("test", "probe"), ("val", "untrained"), ("nothing", "pairs")])
def test_without_a_source_that_has_both_splits_there_is_nothing_to_say(data, models, split, source):
    message = f"`data` must hold a source with the splits 'train' and '{split}', got .*{source}.*Baselines are fitted"
    with pytest.raises(ValueError, match=message):
        evaluate_models(models, [data / source], split)


def test_a_model_without_the_sensors_of_the_data_is_refused(data, tmp_path):
    config = MsGFMConfig(
        embed_dim=12,
        depths=[1, 1, 2],
        num_heads=[1, 1, 2],
        image_size=SIZE,
        mask_patch_size=8,
        sensors={"s1": MsGFMConfig().sensors["s1"]},
    )
    MsGFMForPreTraining(config).save_pretrained(tmp_path)
    MsGFMImageProcessor.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`data` must .*s1"):
        format_report(evaluate_models([tmp_path], [data / "pairs"], mask_seeds=1))


@pytest.mark.parametrize("name, value", [("mask_seeds", 0), ("max_crops", 0)])
def test_counts_below_one_are_refused(data, models, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        evaluate_models(models[:1], [data / "pairs"], **{"mask_seeds": 1, name: value})


def test_the_picture_of_a_model_has_a_row_per_direction(data, models, tmp_path):
    path = draw_model(models[0], [data], tmp_path / "new" / "picture.png")
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG" and picture.height > 100 * len(WAYS)
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]
    with pytest.raises(ValueError, match="`data` must hold a source with the splits 'train' and 'night'"):
        draw_model(models[0], [data], tmp_path / "none.png", split="night")


def test_two_sources_of_one_name_are_refused(data, models):
    with pytest.raises(ValueError, match="`data` must hold each source once, got .*pairs, pairs"):
        evaluate_models(models[:1], [data, data / "pairs"])


def test_models_that_see_other_pixels_are_not_put_together(data, models, tmp_path):
    model = MsGFMForPreTraining.from_pretrained(models[0])
    model.config.image_size = 2 * SIZE
    model.save_pretrained(tmp_path / "wide")
    MsGFMImageProcessor.from_config(model.config).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="`model` must be models that see the same crops, masks and units, got .*wide"):
        evaluate_models([models[0], tmp_path / "wide"], [data], mask_seeds=1, max_crops=2)


def test_damage_in_what_is_evaluated_is_an_error(data, models, tmp_path):
    """A flipped bit changes a number a little: only the checksum can see it."""
    shutil.copytree(data / "pairs", tmp_path / "pairs")
    file = tmp_path / "pairs" / "val-00000.parquet"
    columns = pq.ParquetFile(file).metadata.row_group(0)
    column = next(columns.column(i) for i in range(columns.num_columns) if columns.column(i).path_in_schema == "rgb")
    content = bytearray(file.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptShardError, match="got damage at row"):
        evaluate_models(models[:1], [tmp_path], mask_seeds=1)


def test_a_report_says_which_model_was_kept(report, data, models, tmp_path):
    assert report["trained"][0]["step"] is None
    shutil.copytree(models[0], tmp_path / "run")
    lines = [
        {"step": 10, "score": 0.9},
        {"step": 15, "loss": 1.0},
        {"step": 20, "score": 0.7},
        {"step": 30, "score": 1},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = shutil.copytree(models[0], tmp_path / "run" / "checkpoints" / "step-00000030")
    (checkpoint / "run.json").unlink()
    (checkpoint / "state.json").write_text('{"step": 30}')
    trained = evaluate_models([tmp_path / "run", checkpoint], [data], mask_seeds=1, max_crops=1)["trained"]
    assert [(made["step"], made["chosen_by_validation"]) for made in trained] == [(20, True), (30, False)]
    assert [made["seed"] for made in trained] == [7, 7]
