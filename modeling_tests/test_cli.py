"""`msgfm`: every command does its work from the shell, teaches with `--help`, and fails in one line."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from geotiff_files import write_geotiff
from msgfm_hf import SENSORS
from msgfm_hf.cli import main
from msgfm_hf.data.shards import ShardImage, ShardRow, ShardWriter
from msgfm_hf.model.configuration_msgfm import MsGFMConfig
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.modeling_msgfm import MsGFMForPreTraining

SIZE = 24


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for source in ("harbour", "meadow"):
        with ShardWriter(folder, source, ["rgb"]) as writer:
            for split, rows in (("train", 6), ("val", 3)):
                for number in range(rows):
                    pixels = rng.integers(0, 256, (3, 30, 30), dtype=np.uint8)
                    image = ShardImage(pixels, ["red", "green", "blue"], "dn", 1 / 255, gsd=0.6)
                    writer.write(ShardRow(f"{split}{number}", source, split, f"{split}{number}", {"rgb": image}))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    config = MsGFMConfig(
        embed_dim=12,
        depths=[1, 1, 2],
        num_heads=[1, 1, 2],
        window_size=3,
        image_size=SIZE,
        mask_patch_size=8,
        num_experts=2,
        sensors={"rgb": MsGFMConfig().sensors["rgb"]},
    )
    for seed in (0, 1):
        torch.manual_seed(seed)
        MsGFMForPreTraining(config).save_pretrained(folder / f"seed{seed}")
        MsGFMImageProcessor.from_config(config).save_pretrained(folder / f"seed{seed}")
    return [str(folder / f"seed{seed}") for seed in (0, 1)]


def fails(result, *parts):
    """Exit status 1 and one sentence."""
    code, _, said = result
    assert code == 1
    message = [line for line in said.splitlines() if line.startswith("msgfm ")]
    assert len(message) == 1
    assert "Traceback" not in said
    for part in parts:
        assert part in message[0]


# Help


def test_help_names_every_command_with_examples(msgfm):
    code, said, _ = msgfm("--help")
    assert code == 0
    for command in ("shards", "sensors", "inspect", "evaluate", "report", "pretrain"):
        assert f"\n    {command} " in said
    assert "msgfm shards sample --out shards" in said


@pytest.mark.parametrize(
    "command, words",
    [
        ("shards", ["sample", "synthetic"]),
        ("shards sample", ["--root", "--out", "--overwrite", "MSGFM_SAMPLE_DATA", "splits.csv"]),
        ("shards synthetic", ["--out", "--seed", "never a result"]),
        ("sensors", ["--input", "unit=", "msgfm sensors s2"]),
        ("inspect", ["--verify", "--contact-sheet", "--no-contact-sheet"]),
        (
            "evaluate",
            ["--model", "--data", "--split", "--mask_ratio", "--mask_seeds", "--max_crops", "--picture"],
        ),
        (
            "report",
            ["RUN", "--experts", "--data", "--split", "--max_crops", "--out", "--prune", "crops.png", "mean gate"],
        ),
        ("pretrain", ["--recipe", "--resume", "--data", "--max_steps", "examples:"]),
    ],
)
def test_every_command_explains_itself(msgfm, command, words):
    code, said, _ = msgfm(*command.split(), "--help")
    assert code == 0
    for word in words:
        assert word in said


def test_the_examples_of_the_help_are_commands_that_exist(msgfm):
    _, said, _ = msgfm("--help")
    examples = [line.split() for line in said.splitlines() if line.startswith("  msgfm ")]
    assert len(examples) == 5
    run = next(words for words in examples if words[1] == "evaluate")
    trained = next(words for words in examples if words[1] == "pretrain")
    # What the one writes, the other reads.
    assert "--name" in trained or run[run.index("--model") + 1] == "runs/quickstart"
    told = next(words for words in examples if words[1] == "report")
    assert told[2] == run[run.index("--model") + 1] and "--experts" in told


@pytest.mark.parametrize("door", ["pretrain.py", "src/msgfm_hf/cli.py", "src/msgfm_hf/train/pretrain.py"])
def test_every_door_answers(door, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [door, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(Path(__file__).parents[1] / door), run_name="__main__")
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "usage:" in said and "examples:" in said


@pytest.mark.parametrize("words", [[], ["shard"], ["shards"], ["inspect"], ["evaluate", "--model", "a"], ["report"]])
def test_an_incomplete_command_is_told_its_usage(msgfm, words):
    code, _, said = msgfm(*words)
    assert code == 2
    assert said.startswith("usage: msgfm")


# Shards


def test_synthetic_scenes_are_made(msgfm, tmp_path, monkeypatch):
    made = []

    def make(out, seed, overwrite):
        made.append((out, seed, overwrite))
        return {"synthetic_rgb": {"train": 192, "val": 48}}

    monkeypatch.setattr("msgfm_hf.data.synthetic.make_synthetic_shards", make)
    code, said, _ = msgfm("shards", "synthetic", "--out", tmp_path / "s", "--seed", 5)
    assert code == 0 and made == [(tmp_path / "s", 5, False)]
    assert "synthetic_rgb      train 192, val 48" in said
    assert f"msgfm inspect {tmp_path / 's'}" in said


def test_the_samples_become_shards(msgfm, tmp_path, sample_data):
    code, said, _ = msgfm("shards", "sample", "--out", tmp_path / "s", "--root", sample_data)
    assert code == 0
    assert "terramesh    train 3, val 1" in said
    assert "left out: S1_202012.tif" in said
    code, said, _ = msgfm("shards", "sample", "--out", tmp_path / "s", "--root", sample_data)
    assert code == 0 and said.count("(kept as it was)") == 7
    code, said, _ = msgfm("inspect", tmp_path / "s" / "terramesh", "--contact-sheet", tmp_path / "sheet.png")
    assert code == 0
    assert "VV" in said and "B8A" in said
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300


def test_samples_that_are_not_there_are_one_line(msgfm, tmp_path):
    fails(
        msgfm("shards", "sample", "--out", tmp_path / "s", "--root", ""), "`--root` must be the folder of real samples"
    )
    fails(msgfm("shards", "sample", "--out", tmp_path / "s", "--root", tmp_path / "none"), "`root` must", "none")


def test_sensors_are_listed_as_inputs_need_them(msgfm):
    code, said, _ = msgfm("sensors")
    assert code == 0
    assert [line.split(":")[0] for line in said.splitlines() if line and line[0] != " "] == list(SENSORS)
    _, said, _ = msgfm("sensors", "s2")
    assert said.startswith(
        "s2: dn unless unit= says otherwise (one of dn, reflectance); dn with scale 0.0001 and an offset"
    )
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert " ".join(lines["B8A"].split()) == "B8A B08A, nir08, nir2, re4 865 20 m 0 to 1 0.256 0.1346"
    assert "levels: l1c, l2a" in said
    fails(msgfm("sensors", "s3"), "`sensor` must be one of", "`msgfm sensors` lists them")


def test_an_error_does_not_stick_to_a_progress_bar(msgfm, tmp_path):
    for name, bands in (("a", ["VV", "VH"]), ("b", ["VV"])):
        write_geotiff(tmp_path / f"{name}.tif", np.full((len(bands), 4, 4), -9, np.float32), bands)
    words = ["folder", "--input", f"s1={tmp_path}/{{key}}.tif", "--split-by", "block:1km", "--out", tmp_path / "out"]
    result = msgfm("shards", *words)
    assert "reading headers" in result[2]
    fails(result, "must have the same bands")


def test_inspect_fails_where_something_is_damaged(msgfm, tmp_path):
    with ShardWriter(tmp_path, "meadow", ["rgb"]) as writer:
        image = ShardImage(np.full((3, 8, 8), 80, np.uint8), ["red", "green", "blue"], "dn", 1 / 255)
        writer.write(ShardRow("a", "meadow", "train", "here", {"rgb": image}))
    file = tmp_path / "meadow" / "train-00000.parquet"
    stored = bytearray(file.read_bytes())
    columns = pq.ParquetFile(file).metadata.row_group(0)
    column = next(columns.column(i) for i in range(columns.num_columns) if columns.column(i).path_in_schema == "rgb")
    stored[column.data_page_offset + column.total_compressed_size - 9] ^= 0x10
    file.write_bytes(stored)
    code, said, error = msgfm("inspect", tmp_path / "meadow", "--verify", "--no-contact-sheet")
    assert code == 1 and "1 damaged" in said
    assert "`path` must hold sound shards, got 1 damaged places" in error


# Inspect


def test_inspect_reports_and_draws(msgfm, shards, tmp_path):
    code, said, _ = msgfm("inspect", shards, "--contact-sheet", tmp_path / "sheet.png", "--verify")
    assert code == 0
    assert "harbour" in said and "meadow" in said
    assert f"Contact sheet: {tmp_path / 'sheet.png'}" in said
    with Image.open(tmp_path / "sheet.png") as picture:
        picture.load()
        assert picture.format == "PNG" and len(np.unique(np.asarray(picture))) > 50


def test_inspect_draws_into_the_folder_or_not_at_all(msgfm, tmp_path):
    with ShardWriter(tmp_path, "meadow", ["rgb"]) as writer:
        image = ShardImage(np.full((3, 8, 8), 80, np.uint8), ["red", "green", "blue"], "dn", 1 / 255)
        writer.write(ShardRow("a", "meadow", "train", "here", {"rgb": image}))
    code, said, _ = msgfm("inspect", tmp_path / "meadow", "--no-contact-sheet")
    assert code == 0 and "Contact sheet" not in said
    assert not (tmp_path / "meadow" / "contact_sheet.png").exists()
    code, said, _ = msgfm("inspect", tmp_path / "meadow")
    assert code == 0 and (tmp_path / "meadow" / "contact_sheet.png").is_file()


def test_inspect_of_nothing_is_one_line(msgfm, tmp_path):
    fails(msgfm("inspect", tmp_path / "nowhere"), "msgfm inspect: `data` must be a folder of shards", "nowhere")


# Evaluate


def test_evaluate_prints_a_table_and_writes_what_made_it(msgfm, shards, models, tmp_path):
    words = ["evaluate", "--model", models[0], "--model", models[1], "--data", shards / "harbour"]
    words += ["--mask_seeds", "2", "--out", tmp_path / "new" / "report.json", "--picture", tmp_path / "p.png"]
    code, said, _ = msgfm(*words)
    assert code == 0
    assert f"Picture: {tmp_path / 'p.png'}" in said and (tmp_path / "p.png").is_file()
    assert "| harbour | rgb → rgb | 3 | 3 | **" in said
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["command"].split()[:4] == ["msgfm", "evaluate", "--model", models[0]]
    assert report["mask_seeds"] == 2 and report["commit"]
    (row,) = report["rows"]
    assert (row["crops"], row["places"]) == (3, 3)
    assert len(row["l1_by_model"]) == 2 and row["spread"] == sorted(row["l1_by_model"])
    assert row["l1"] == pytest.approx(sum(row["spread"]) / 2)
    assert set(row["by_place"]) == {"val0", "val1", "val2"}
    assert f"**{row['l1']:.3f}** ({row['spread'][0]:.3f}-{row['spread'][1]:.3f})" in said


def test_the_command_in_a_report_is_the_one_that_was_given(shards, models, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest", "-q"])
    words = ["evaluate", "--model", models[0], "--data", str(shards / "harbour"), "--mask_seeds", "1"]
    main([*words, "--out", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["command"].startswith(f"msgfm evaluate --model {models[0]}")


def test_evaluate_without_data_is_one_line(msgfm, shards, models):
    result = msgfm("evaluate", "--model", models[0], "--data", shards, "--split", "test")
    fails(result, "`data` must hold a source with the splits 'train' and 'test'")


def test_evaluate_without_a_model_is_one_line(msgfm, shards, tmp_path):
    fails(msgfm("evaluate", "--model", tmp_path / "none", "--data", shards), str(tmp_path / "none"))


def test_a_report_that_cannot_be_written_is_one_line(msgfm, shards, models, tmp_path):
    (tmp_path / "file").write_text("")
    words = ["evaluate", "--model", models[0], "--data", shards / "harbour", "--mask_seeds", "1"]
    fails(msgfm(*words, "--out", tmp_path / "file" / "report.json"), "file")


# Report


def test_report_prints_tables_and_writes_what_it_saw(msgfm, shards, models, tmp_path):
    words = ["report", models[0], "--experts", "--data", shards / "harbour", "--out", tmp_path / "out"]
    code, said, _ = msgfm(*words, "--prune", "rgb")
    assert code == 0
    assert "layers.2.blocks.1 (tokens of 16 px): the sensor tells 0.00 of at most 0.00 bits of the expert" in said
    row = next(line.split() for line in said.splitlines() if line.startswith("  rgb"))
    assert row[:4] == ["rgb", "3", "3", "12"]
    assert "| harbour | rgb → rgb | 3 | 3 | " in said
    assert f"Dense model: {tmp_path / 'out' / 'dense'}" in said
    report = json.loads((tmp_path / "out" / "experts.json").read_text())
    assert report["command"].split()[:4] == ["msgfm", "report", models[0], "--experts"]
    assert f"{report['dense']['parameters']:,} parameters, from {report['dense']['parameters_moe']:,}" in said
    for name in ("experts.png", "crops.png"):
        assert str(tmp_path / "out" / name) in said
        with Image.open(tmp_path / "out" / name) as picture:
            picture.load()
            assert picture.format == "PNG"
    assert MsGFMForPreTraining.from_pretrained(tmp_path / "out" / "dense").config.moe_blocks == [[], [], []]


def test_report_of_what_cannot_be_reported_is_one_line(msgfm, shards, models, tmp_path):
    fails(msgfm("report", tmp_path / "none", "--experts"), "`run` must be the folder of a saved model", "none")
    fails(msgfm("report", models[0], "--experts"), "`data` must be given for a model that is not of a run")
    result = msgfm("report", models[0], "--experts", "--data", shards, "--out", tmp_path / "o", "--prune", "rgb", "s9")
    fails(result, "`sensors` to keep must be a list of some of the model (rgb), got 's9'")
    fails(msgfm("report", models[0]), "`run` must be the folder of a run", "run.json")


# Pretrain


def test_pretrain_is_the_same_command_as_the_door(msgfm, shards, tmp_path):
    words = ["pretrain", "--data", shards / "meadow", "--output_dir", tmp_path / "run", "--max_steps", "1"]
    tiny = {"embed_dim": 12, "depths": [1, 1, 2], "num_heads": [1, 1, 2], "window_size": 3, "num_experts": 2}
    words += ["--model", json.dumps(tiny | {"image_size": SIZE, "mask_patch_size": 8}), "--batch_sizes", "{meadow: 2}"]
    code, said, _ = msgfm(*words, "--mixed_precision", "no")
    assert code == 0
    assert "Load the model with" in said and (tmp_path / "run" / "model.safetensors").is_file()
    code, _, said = msgfm(*words, "--mixed_precision", "no")
    assert code == 1 and "`output_dir` must be new" in said and "Traceback" not in said
    # A run knows its data.
    code, said, _ = msgfm("report", tmp_path / "run", "--experts")
    assert code == 0 and "layers.2.blocks.1" in said
    report = json.loads((tmp_path / "run" / "experts" / "experts.json").read_text())
    assert report["data"] == [str(shards / "meadow")]
