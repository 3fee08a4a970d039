"""Pretraining as a whole: what a run leaves, that a stopped run goes on exactly, and what it refuses.

The data are easy on purpose (nearly even fields) and the model is as small as one can be: both are here to test the
machinery only.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining, SwinConfig, SwinModel

import msgfm_hf
from msgfm_hf.convert.checkpoint import convert_checkpoint
from msgfm_hf.data.mixture import SourceOrder
from msgfm_hf.data.shards import ShardImage, ShardRow, ShardSource, ShardWriter
from msgfm_hf.hub.card import CardFacts
from msgfm_hf.hub.push import prepare_checkpoint, push_to_hub
from msgfm_hf.model.sensors import SENSORS
from msgfm_hf.tasks.reconstruction import evaluate_reconstruction, masked_crops, training_statistics
from msgfm_hf.train import pretrain as pretrain_module
from msgfm_hf.train.checkpoint import CheckpointError, find_checkpoints
from msgfm_hf.train.evaluate import evaluate_models
from msgfm_hf.train.pictures import display_bands, draw_losses, draw_reconstruction, read_metrics
from msgfm_hf.train.pretrain import Mixture, main, make_missing_data, pretrain
from msgfm_hf.train.recipe import build_recipe
from swin_reference import make_source
from test_majortom import optical, radar
from test_majortom import write as write_core

SIZE = 24
STEPS = 60
ROOT = Path(__file__).parents[1]
TINY = {
    "embed_dim": 12,
    "depths": [1, 1, 2],
    "num_heads": [1, 1, 2],
    "window_size": 3,
    "image_size": SIZE,
    "mask_patch_size": 8,
    "num_experts": 2,
}
PLAN = {
    "name": "easy",
    "model": TINY,
    "batch_sizes": {"aerial": 4, "pairs": 2},
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "warmup_steps": 5,
    "mixed_precision": "no",
    "logging_steps": 1,
    "eval_steps": 30,
    "save_steps": 20,
    "eval_max_crops": 4,
}


def field(number, size=30):
    """A level that differs from place to place, slightly tilted; 0..1."""
    row, column = np.mgrid[:size, :size] / size
    return 0.1 + 0.7 * ((0.37 + 0.618 * number) % 1) + 0.1 * (row - 0.5 * column)


def aerial_image(number):
    pixels = np.stack([60 + 150 * field(number), 200 - 100 * field(number), 40 + 90 * field(number + 1)])
    return ShardImage(pixels.astype(np.uint8), ["red", "green", "blue"], "dn", 1 / 255, gsd=0.6)


def write_aerial(folder, train=12, val=4):
    with ShardWriter(folder, "aerial", ["rgb"]) as writer:
        for split, rows in (("train", train), ("val", val)):
            for number in range(rows):
                images = {"rgb": aerial_image(number)}
                writer.write(ShardRow(f"{split}{number}", "aerial", split, f"{split} {number}", images))
    return folder / "aerial"


def write_pairs(folder, train=8, val=3):
    with ShardWriter(folder, "pairs", ["s1", "s2"], {"s2": "l2a"}) as writer:
        for split, rows in (("train", train), ("val", val)):
            for number in range(rows):
                wave = field(number)
                s1 = np.stack([-18 + 12 * wave, -25 + 12 * wave]).astype(np.float32)
                s2 = np.stack([1500 + 3000 * wave, 4500 - 2500 * wave]).astype(np.uint16)
                images = {
                    "s1": ShardImage(s1, ["VV", "VH"], "db", gsd=10.0),
                    "s2": ShardImage(s2, ["B04", "B08"], "dn", 1e-4, -0.1, gsd=10.0, nodata=0.0),
                }
                key = f"{split}{number}"
                writer.write(ShardRow(key, "pairs", split, f"{split} {number}", images, pair_id=key))
    return folder / "pairs"


def damage(folder, rows, split="train", how=lambda payload: payload[:-1]):
    """Change the stored bytes of some rows of a source behind the writer's back."""
    file = folder / f"{split}-00000.parquet"
    table = pq.read_table(file)
    stored = table.to_pylist()
    for row in rows:
        stored[row]["rgb"] = how(stored[row]["rgb"])
    pq.write_table(pa.Table.from_pylist(stored, schema=table.schema), file, row_group_size=16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_aerial(folder)
    write_pairs(folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A source without a validation split: its runs draw little and are quick."""
    return write_aerial(tmp_path_factory.mktemp("alone"), val=0)


def plan(data, out, **changes):
    return build_recipe(PLAN | {"data": [str(data)], "output_dir": str(out)} | changes)


def quick(alone, out, **changes):
    return plan(alone, out, **({"batch_sizes": {"aerial": 2}, "max_steps": 8, "save_steps": 4} | changes))


def run(recipe, resume=False):
    """The result of a run and what it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        result = pretrain(recipe, resume=resume)
    return result, said.getvalue()


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    result, said = run(plan(data, out))
    return out, result, said


def metrics(out):
    """The lines of a run without what a clock says."""
    clocks = ("images_per_second", "input_wait")
    return [{k: v for k, v in line.items() if k not in clocks} for line in read_metrics(out / "metrics.jsonl")]


def assert_same_run(out, other, step=STEPS):
    """Losses of every step, weights, the optimiser's moments and the best model, bit by bit."""
    ours, theirs = metrics(out), metrics(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, expected in zip(ours, theirs, strict=True):
        assert line == expected
    folder, expected = (path / "checkpoints" / f"step-{step:08d}" for path in (out, other))
    for left, right in ((folder, expected), (out, other)):
        left, right = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
        assert left.keys() == right.keys()
        assert [name for name in left if not torch.equal(left[name], right[name])] == []
    left, right = (torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (folder, expected))
    assert left.keys() == right.keys()
    for number, moments in left.items():
        assert all(torch.equal(value, right[number][name]) for name, value in moments.items())


# What a run starts from


@pytest.fixture(scope="module")
def relatives(tmp_path_factory):
    """Converted Swins with experts: a trunk, and a classifier whose biases are a network of the offset."""
    folder = tmp_path_factory.mktemp("relatives")
    options = {"embed_dim": 12, "depths": (1, 1, 2), "num_heads": (1, 1, 2), "window": 3, "image_size": 48}
    for kind, classes in (("v1", 0), ("v2", 3)):
        torch.save(make_source(kind, classes=classes, **options), folder / f"{kind}.pth")
        convert_checkpoint([folder / f"{kind}.pth"], folder / kind, num_experts=2, image_size=48)
    return folder


SMALL = {"image_size": SIZE, "mask_patch_size": 8}


def test_a_run_starts_from_a_converted_relative(relatives, data, tmp_path):
    start = str(relatives / "v1")
    recipe = plan(
        data, tmp_path / "run", init_from=start, model=SMALL, max_steps=1, learning_rate=1e-30, warmup_steps=0
    )
    _, said = run(recipe)
    assert f"Starts from {start}: its encoder; embeddings of rgb; decoders of none" in said
    assert "fresh: embeddings of s1, s2, decoders of rgb, s1, s2" in said
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", relatives / "v1"))
    for name, tensor in theirs.items():
        if name.startswith(("encoder.", "layernorm.", "embeddings.patch_embeddings.rgb.")):
            torch.testing.assert_close(ours[f"msgfm.{name}"], tensor, atol=1e-6, rtol=0)
    assert {name.split(".")[1] for name in ours if name.startswith("decoders.")} == {"rgb", "s1", "s2"}
    record = json.loads((tmp_path / "run/run.json").read_text())["start"]
    assert (record["checkpoint"], record["layout"], record["files"]) == (start, "swin", ["v1.pth"])
    # Who gets the model is told where it comes from.
    told = []
    push_to_hub(tmp_path / "run", "me/mine", dry_run=True, tell=told.append)
    assert f"it started from {start}" in told[0]
    (tmp_path / "staging").mkdir()
    prepare_checkpoint(tmp_path / "run", "me/mine", CardFacts(), tmp_path / "staging")
    card = (tmp_path / "staging/README.md").read_text()
    assert (
        "starting from weights of the layout `swin`, which others trained" in card and "converted from v1.pth" in card
    )


def test_a_run_goes_on_exactly_though_its_start_is_gone(relatives, alone, tmp_path):
    start = shutil.copytree(relatives / "v2", tmp_path / "start")
    changes = {"init_from": str(start), "model": SMALL}
    run(quick(alone, tmp_path / "whole", **changes))
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves/checkpoints/step-00000008")
    start.rename(tmp_path / "moved")
    run(quick(alone, tmp_path / "halves", **changes), resume=True)
    assert_same_run(tmp_path / "halves", tmp_path / "whole", step=8)
    # Elsewhere it is the same start; other weights are another run.
    shutil.rmtree(tmp_path / "halves/checkpoints/step-00000008")
    run(quick(alone, tmp_path / "halves", **changes | {"init_from": str(tmp_path / "moved")}), resume=True)
    with pytest.raises(CheckpointError, match="init_from"):
        run(quick(alone, tmp_path / "halves", **changes | {"init_from": str(relatives / "v1")}), resume=True)


def test_a_smaller_window_keeps_the_scale_of_the_offsets(relatives, alone):
    recipe = quick(alone, "none", init_from=str(relatives / "v2"), model={**SMALL, "window_size": 2})
    start = recipe.start_config()
    config = recipe.model_config(start.sensors, start.inputs, start)
    assert config.window_size == 2 and config.pretrained_window_sizes == [3, 3, 3]
    recipe = quick(alone, "none", init_from=str(relatives / "v2"))
    assert recipe.model_config(start.sensors, start.inputs, start).pretrained_window_sizes == [0, 0, 0]


@pytest.mark.parametrize("model", [{"depths": [1, 1, 3]}, {"patch_size": 8}], ids=["depths", "patches"])
def test_a_start_of_another_architecture_is_refused(relatives, alone, tmp_path, model):
    recipe = quick(alone, tmp_path / "run", init_from=str(relatives / "v1"), model={**SMALL, **model})
    with pytest.raises(ValueError, match="`model` must keep the architecture of `init_from`, got another for"):
        pretrain(recipe)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_a_start_that_is_no_checkpoint_is_refused(alone, tmp_path):
    with pytest.raises(ValueError, match="`init_from` must be a checkpoint, a folder or a repository .* got '.*none'"):
        pretrain(quick(alone, tmp_path / "run", init_from=str(tmp_path / "none")))
    SwinModel(SwinConfig(embed_dim=8, depths=[1], num_heads=[1])).save_pretrained(tmp_path / "swin")
    with pytest.raises(
        ValueError, match="`init_from` must be an msGFM checkpoint, got one of type 'swin' .*msgfm convert"
    ):
        pretrain(quick(alone, tmp_path / "run", init_from=str(tmp_path / "swin")))


# What a run leaves


def test_a_run_leaves_all_that_is_promised(whole):
    out, result, _ = whole
    assert {path.name for path in out.iterdir()} == {
        "run.json",
        "metrics.jsonl",
        "validation.json",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "reconstruction.png",
        "losses.png",
        "expert_load.png",
        "checkpoints",
        "reconstructions",
    }
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000040", "step-00000060"]
    assert (result["run_dir"], result["step"], result["finished"]) == (out, STEPS, True)
    assert json.loads((out / "validation.json").read_text()) == result["reconstruction"]
    for name in ("reconstruction.png", "losses.png", "expert_load.png"):
        with Image.open(out / name) as picture:
            picture.load()
            assert min(picture.size) > 150
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_the_model_and_its_processor_load(whole):
    out, _, _ = whole
    model, processor = AutoModel.from_pretrained(out), AutoImageProcessor.from_pretrained(out)
    assert sorted(model.config.sensors) == ["rgb", "s1", "s2"]
    inputs = processor(aerial_image(0).pixels.copy(), sensor="rgb")
    assert torch.isfinite(model(**inputs).pooler_output).all()
    processor.check_config(AutoModelForPreTraining.from_pretrained(out).config)


def test_the_last_lines_load_the_model(whole):
    _, _, said = whole
    lines = said.rstrip().splitlines()[-2:]
    assert lines[0].strip() == "import msgfm_hf; from transformers import AutoModel"
    scope = {}
    exec("\n".join(line.strip() for line in lines), scope)
    assert isinstance(scope["model"], msgfm_hf.MsGFMModel)


def test_what_is_said_has_sizes_ratios_and_pictures(whole):
    out, result, said = whole
    counts = msgfm_hf.count_parameters(AutoModelForPreTraining.from_pretrained(out))
    assert f"aerial 4, pairs 2 per step, 4 steps per epoch, {STEPS} steps in all; {counts.total:,} parameters" in said
    for row in result["reconstruction"]:
        told = re.search(rf"{row['source']} +{row['input']} -> {row['target']} +([\d.]+) +\(n = {row['crops']}\)", said)
        assert float(told[1]) == pytest.approx(row["l1"] / row["band_mean"], abs=0.005)
    for name in ("reconstruction.png", "losses.png", "expert_load.png"):
        assert str(out / name) in said


def test_metrics_have_a_line_per_step_and_evaluation(whole):
    out, result, _ = whole
    lines = read_metrics(out / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "validation" in line] == [30, 60]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    for line in training:
        assert line["grad_norm"] > 0 and line["images_per_second"] > 0 and line["bad"] == 0
        # The objective: each source's slices times its weight (1 and 2 / 4), plus a hundredth of the auxiliary loss.
        slices = sum(value * (1 if name.startswith("aerial") else 0.5) for name, value in line["losses"].items())
        assert line["loss"] == pytest.approx(slices + 0.01 * line["aux_loss"], rel=1e-5)
        assert set(line["routing"]) == {"rgb", "s1", "s2"}
    # 5e-7 at first, then linearly to the whole rate in 5 steps.
    rates = [line["learning_rate"] for line in training]
    assert rates[0] == 5e-7 and rates[1] == pytest.approx(5e-7 + (1e-2 - 5e-7) / 5) and rates[5:] == [1e-2] * 55
    ways = {tuple(sorted(name for name in line["losses"] if name.startswith("pairs"))) for line in training}
    assert ways == {("pairs s1->s1", "pairs s2->s2"), ("pairs s1->s2", "pairs s2->s1")}
    assert set(lines[-1]["validation"]) == {
        f"{row['source']} {row['input']}->{row['target']}" for row in result["reconstruction"]
    }


def test_the_time_spent_waiting_for_data_is_told(alone, tmp_path, monkeypatch):
    """By a clock that goes on by 3 s while a batch is made, and by 1 s while a learning rate is set."""
    seconds = [0.0]

    def takes(duration, function):
        def timed(*arguments):
            seconds[0] += duration
            return function(*arguments)

        return timed

    for name, duration in (("collate", 3), ("set_learning_rate", 1)):
        monkeypatch.setattr(pretrain_module, name, takes(duration, getattr(pretrain_module, name)))
    clock = SimpleNamespace(perf_counter=lambda: seconds[0], monotonic=time.monotonic)
    monkeypatch.setattr(pretrain_module, "time", clock)
    run(quick(alone, tmp_path / "run", max_steps=3, dataloader_num_workers=0))
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert [line["input_wait"] for line in lines] == [0.75] * 3
    # Two images in four seconds.
    assert [line["images_per_second"] for line in lines] == [0.5] * 3


def test_the_run_says_what_made_it(whole):
    out, _, _ = whole
    record = json.loads((out / "run.json").read_text())
    assert record["max_steps"] == STEPS and record["world_size"] == 1
    assert record["identity"]["mixed_precision"] == "no"
    assert record["identity"]["sources"]["pairs"] == {
        "rows": 8,
        "row_groups": zlib.crc32(b"[8]"),
        "bands": {"s1": ["VV", "VH"], "s2": ["B04", "B08"]},
        "units": {"s1": "db", "s2": "dn"},
        "dtypes": {"s1": "float32", "s2": "uint16"},
        "levels": {"s1": None, "s2": "l2a"},
    }
    assert record["recipe"]["output_dir"] == str(out)
    assert record["versions"]["torch"] == torch.__version__
    assert record["threads"] == 1
    assert re.fullmatch(r"[0-9a-f]{12}\+?", record["commit"])


def test_it_learns(data, tmp_path, monkeypatch):
    """Even fields are easily continued: in every direction errors fall well below those of the mean.

    At half the others' learning rate and twice their steps, so that it does not hang on the processor's rounding: with
    three seeds the worst direction came to 0.54 of the mean's error.
    """
    monkeypatch.setattr(pretrain_module, "draw_reconstruction", lambda *arguments: arguments[-1])
    result, _ = run(plan(data, tmp_path / "run", learning_rate=5e-3, max_steps=2 * STEPS))
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert np.mean(losses[-5:]) < 0.45 * np.mean(losses[:5])
    ratios = {(row["input"], row["target"]): row["l1"] / row["band_mean"] for row in result["reconstruction"]}
    assert max(ratios.values()) < 0.8, ratios


def test_the_best_model_is_the_one_that_stays(data, whole):
    out, _, _ = whole
    scores = {line["step"]: line["score"] for line in read_metrics(out / "metrics.jsonl") if "score" in line}
    best = min(scores, key=scores.get)
    state = json.loads((out / "checkpoints" / "step-00000060" / "state.json").read_text())
    assert state["best"] == {"score": scores[best], "step": best}
    # The validation during the run, again, with the model that was kept.
    model, processor = AutoModelForPreTraining.from_pretrained(out), AutoImageProcessor.from_pretrained(out)
    sources = [ShardSource(data / name, "val") for name in ("aerial", "pairs")]
    known = {source.name: training_statistics(ShardSource(source.path), processor, SIZE) for source in sources}
    rows = evaluate_reconstruction(model, processor, sources, known, max_crops=4)
    assert np.mean([row["l1"] / row["band_mean"] for row in rows]) == pytest.approx(scores[best], rel=1e-4)


def test_a_model_that_got_worse_does_not_replace_the_best(data, tmp_path, monkeypatch):
    calls = []

    def worse(*arguments, **options):
        calls.append(1)
        rows = evaluate_reconstruction(*arguments, **options)
        return rows if len(calls) == 1 else [row | {"l1": 10 * row["l1"]} for row in rows]

    monkeypatch.setattr(pretrain_module, "evaluate_reconstruction", worse)
    changes = {"batch_sizes": {"aerial": 2}, "max_steps": 4, "save_steps": 2, "eval_steps": 2}
    _, said = run(plan(data, tmp_path / "run", **changes))
    assert "band mean (step 2)" in said
    kept = load_file(tmp_path / "run" / "model.safetensors")
    first, last = (
        load_file(tmp_path / "run" / "checkpoints" / f"step-0000000{n}" / "model.safetensors") for n in (2, 4)
    )
    assert all(torch.equal(kept[name], first[name]) for name in kept)
    assert not all(torch.equal(kept[name], last[name]) for name in kept)


# Pictures


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, kept open to be looked into."""
    drawn = []
    monkeypatch.setattr("matplotlib.pyplot.close", drawn.append)
    yield drawn
    monkeypatch.undo()
    plt.close("all")


def test_a_reconstruction_shows_what_the_model_was_trained_for(whole, data, tmp_path, figures):
    out, _, _ = whole
    model, processor = AutoModelForPreTraining.from_pretrained(out), AutoImageProcessor.from_pretrained(out)
    source = ShardSource(data / "pairs", "val", ["s1", "s2"])
    crops = list(masked_crops(source, processor, model, 0.6, 0, None, 2))
    draw_reconstruction(model, processor, [source], {"pairs": crops}, "masked", tmp_path / "picture.png")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    (figure,) = figures
    panels = np.array([axes for axes in figure.axes if axes.get_title()]).reshape(4, 8)
    assert [axes.get_ylabel() for axes in panels[:, 0]] == [
        f"pairs\n{way}" for way in ("s1 → s1", "s2 → s2", "s1 → s2", "s2 → s1")
    ]
    for row, (sensor, target) in zip(panels, (("s1",) * 2, ("s2",) * 2, ("s1", "s2"), ("s2", "s1")), strict=True):
        errors = []
        for half in (row[:4], row[4:]):
            given, wanted, guess, error = (axes.get_images()[0] for axes in half)
            # The target sets the colours of its prediction, and where it is its own input, of that too.
            assert guess.get_clim() == wanted.get_clim() and error.get_clim() == (0, 2)
            assert (given.get_clim() == wanted.get_clim()) == (sensor == target)
            hidden, untrained = np.ma.getmaskarray(given.get_array()), np.ma.getmaskarray(guess.get_array())
            # 6 of 9 cells of 8 pixels.
            assert hidden.sum() == 6 * 64
            if sensor == target:
                assert not untrained.any()
                np.testing.assert_allclose(guess.get_array()[~hidden], given.get_array()[~hidden], atol=1e-4)
            else:
                assert np.array_equal(untrained, ~hidden)
            errors.append(float(re.search(r"([\d.]+) σ", half[3].get_title())[1]))
            assert np.ma.getmaskarray(error.get_array()).sum() == 9 * 64 - 6 * 64
            assert error.get_array().mean() == pytest.approx(errors[-1], abs=0.006)
        assert errors[0] <= errors[1]
    # A quarter of 24 pixels of 10 m is 60 m: the bar has a round length below it.
    assert "50 m" in [text.get_text() for axes in panels[:, 1] for text in axes.texts]


def test_a_crossing_trained_everywhere_is_shown_everywhere(whole, data, tmp_path, figures, monkeypatch):
    out, _, _ = whole
    model, processor = AutoModelForPreTraining.from_pretrained(out), AutoImageProcessor.from_pretrained(out)
    source = ShardSource(data / "pairs", "val")
    crops = list(masked_crops(source, processor, model, 0.6, 0, 1, 1))
    # What is drawn is looked into, so it need not be rendered.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: path.touch())
    draw_reconstruction(model, processor, [source], {"pairs": crops}, "all", tmp_path / "picture.png")
    for axes in figures[0].axes:
        if axes.get_title() == "prediction":
            assert not np.ma.getmaskarray(axes.get_images()[0].get_array()).any()


def test_red_green_and_blue_are_shown_where_a_sensor_has_them():
    assert display_bands(SENSORS["rgb"], ["red", "green", "blue"]) == [0, 1, 2]
    assert display_bands(SENSORS["s2"], ["B02", "B03", "B04", "B08"]) == [2, 1, 0]
    assert display_bands(SENSORS["s2"], ["B08", "B04"]) == [0]
    assert display_bands(SENSORS["s1"], ["VV", "VH"]) == [0]
    assert display_bands(SENSORS["dsm"], ["height"]) == [0]


def test_curves_are_those_of_the_metrics(whole, tmp_path, figures):
    out, _, _ = whole
    draw_losses(out / "metrics.jsonl", tmp_path / "losses.png")
    training, validation = figures[0].axes
    curves = {line.get_label(): line for line in validation.get_lines() if not line.get_label().startswith("_")}
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "validation" in line]
    for name, curve in curves.items():
        assert curve.get_xdata().tolist() == [30, 60]
        assert curve.get_ydata().tolist() == [line["validation"][name]["ratio_to_band_mean"] for line in lines]
        assert (curve.get_linestyle() == "--") == (name in ("pairs s1->s2", "pairs s2->s1"))
    assert len(curves) == 5 == len(training.get_lines())


def test_a_run_without_metrics_draws_empty_axes(tmp_path):
    assert draw_losses(tmp_path / "metrics.jsonl", tmp_path / "losses.png").is_file()


# Stopping and going on

CHILD = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from msgfm_hf.train import checkpoint, pretrain as room

moment, number = sys.argv.pop(1), int(sys.argv.pop(1))
calls = []
def die(function):
    def until(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return until
if moment == "step":
    room.set_learning_rate = die(room.set_learning_rate)
else:
    torch.save = die(torch.save)
room.main(sys.argv[1:])
"""


def killed(recipe, moment, number, out):
    """Run a recipe in a process of its own that is killed for good at its `number`th step or save."""
    file = out.parent / f"{out.name}.yaml"
    # JSON is YAML.
    file.write_text(json.dumps({name: getattr(recipe, name) for name in recipe.__dataclass_fields__}))
    process = subprocess.run(
        [sys.executable, "-c", CHILD, moment, str(number), "--recipe", str(file)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]
    return process


@pytest.mark.parametrize("workers, moment, number, last", [(0, "save", 2, 20), (2, "step", 34, 20)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    data, whole, tmp_path, monkeypatch, workers, moment, number, last
):
    # The picture takes longer than the training and is not what is compared.
    monkeypatch.setattr(pretrain_module, "draw_reconstruction", lambda *arguments: arguments[-1])
    out = tmp_path / "run"
    recipe = plan(data, out, dataloader_num_workers=workers)
    killed(recipe, moment, number, out)
    assert find_checkpoints(out)[0].step == last
    # It was killed beyond the checkpoint, in one case while it wrote the next.
    written = read_metrics(out / "metrics.jsonl")
    assert written[-1]["step"] > last + 10
    assert (out / "checkpoints" / ".step.tmp").exists() == (moment == "save")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 34, "loss": 0.4')
    result, _ = run(recipe, resume=True)
    assert result["finished"]
    assert_same_run(out, whole[0])
    assert not (out / "checkpoints" / ".step.tmp").exists()
    assert result["reconstruction"] == whole[1]["reconstruction"]


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Have this process receive a signal in the middle of a step."""
    setter, calls = pretrain_module.set_learning_rate, []

    def signalling(*args):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return setter(*args)

    monkeypatch.setattr(pretrain_module, "set_learning_rate", signalling)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_stops_and_loses_nothing(alone, tmp_path, monkeypatch, number):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(quick(alone, whole))
    with monkeypatch.context() as patch:
        stop_at(patch, 3, number)
        result, said = run(quick(alone, stopped))
    assert (result["step"], result["finished"]) == (3, False)
    assert find_checkpoints(stopped)[0].step == 3
    assert "Stopped at step 3. `--resume` goes on from there." in said
    # Even so there is a model to look at.
    AutoModel.from_pretrained(stopped)
    result, _ = run(quick(alone, stopped), resume=True)
    assert result["finished"]
    assert_same_run(stopped, whole, 8)


def test_a_signal_in_the_last_step_still_gives_a_finished_run(data, tmp_path, monkeypatch):
    small = {"batch_sizes": {"aerial": 2}, "max_steps": 4, "save_steps": 4, "eval_steps": 100}
    monkeypatch.setattr(pretrain_module, "draw_reconstruction", lambda *arguments: arguments[-1])
    recipe = plan(data, tmp_path / "run", **small)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        pretrain(recipe)
    result, said = run(recipe, resume=True)
    assert result["finished"] and [row["source"] for row in result["reconstruction"]] == ["aerial"]
    assert "band mean (step 4)" in said


def test_a_scheduler_may_signal_again_and_again(alone, tmp_path, monkeypatch):
    """Launcher and scheduler both send SIGTERM, a terminal and a launcher both send SIGINT."""
    setter, calls = pretrain_module.set_learning_rate, []

    def signalling(*args):
        calls.append(1)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT) if len(calls) == 3 else ():
            os.kill(os.getpid(), number)
        return setter(*args)

    monkeypatch.setattr(pretrain_module, "set_learning_rate", signalling)
    result, _ = run(quick(alone, tmp_path / "run"))
    assert result["step"] == 3 and find_checkpoints(tmp_path / "run")[0].step == 3


def test_a_signal_to_all_processes_of_a_run_with_workers_still_saves(alone, tmp_path):
    """A scheduler signals the processes that read data too; the run needs them to finish its step."""
    recipe = quick(alone, tmp_path / "run", dataloader_num_workers=2, max_steps=100_000, save_steps=100_000)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({name: getattr(recipe, name) for name in recipe.__dataclass_fields__}))
    process = subprocess.Popen(
        [sys.executable, "-m", "msgfm_hf.train.pretrain", "--recipe", str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics_file = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics_file.exists() and metrics_file.read_text().count("\n") > 3):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said[-2000:]
    assert find_checkpoints(tmp_path / "run")[0].step > 3


def test_a_second_signal_stops_at_once(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_module, "_IMPATIENT_SECONDS", 0)
    setter = pretrain_module.set_learning_rate

    def twice(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return setter(*args)

    monkeypatch.setattr(pretrain_module, "set_learning_rate", twice)
    with pytest.raises(KeyboardInterrupt):
        pretrain(quick(alone, tmp_path / "run"))


def test_the_callers_signals_are_given_back(alone, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(quick(alone, tmp_path / "run", max_steps=1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_two_runs_do_not_share_a_folder(alone, tmp_path):
    (tmp_path / "run").mkdir()
    # Another process in the place of another run: it would import for seconds.
    held = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(); sys.stdin.read()"
    )
    words = [sys.executable, "-c", held, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(CheckpointError, match="`output_dir` must be of one run at a time"):
            pretrain(quick(alone, tmp_path / "run"))
        other.communicate(b"\n")
    result, _ = run(quick(alone, tmp_path / "run", max_steps=2))
    assert result["finished"] and not (tmp_path / "run" / ".lock").exists()


def test_processes_that_see_other_things_are_refused(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_module, "gathered", lambda accelerator, members: [*members, (4, 8, 0)])
    with pytest.raises(ValueError, match="`output_dir`, `data` and the recipe must be the same for all processes, got"):
        pretrain(quick(alone, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_finished_run_stays_finished(alone, tmp_path):
    recipe = quick(alone, tmp_path / "run")
    run(recipe)
    before, weights = metrics(tmp_path / "run"), load_file(tmp_path / "run" / "model.safetensors")
    result, said = run(recipe, resume=True)
    assert result["finished"] and "Load the model with" in said
    assert metrics(tmp_path / "run") == before
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(weights[name], after[name]) for name in weights)


def test_a_finished_run_can_be_made_longer(data, tmp_path, monkeypatch):
    """With a constant learning rate it is the run that was planned so from the beginning."""

    def planned(name, steps):
        changes = {"batch_sizes": {"aerial": 2}, "lr_milestones": [], "save_steps": 4, "eval_steps": 8}
        return plan(data, tmp_path / name, max_steps=steps, **changes)

    monkeypatch.setattr(pretrain_module, "draw_reconstruction", lambda *arguments: arguments[-1])
    run(planned("whole", 8))
    run(planned("run", 4))
    with pytest.raises(CheckpointError, match="to its end, step 4, got another length: max_steps was 4, is 3; num"):
        pretrain(planned("run", 3), resume=True)
    with monkeypatch.context() as stopped:
        stop_at(stopped, 2)
        result, said = run(planned("run", 8), resume=True)
    assert not result["finished"] and "This run was of 4 steps and is of 8 now: the learning rate follows" in said
    # The evaluation of the shorter run does not say that the longer one is over.
    assert not (tmp_path / "run" / "validation.json").exists()
    for other in (4, 9):
        with pytest.raises(CheckpointError, match=f"step 8, got another length: max_steps was 8, is {other}"):
            pretrain(planned("run", other), resume=True)
    result, said = run(planned("run", 8), resume=True)
    assert result["finished"] and "This run was of" not in said and (tmp_path / "run" / "validation.json").exists()
    ours, theirs = (find_checkpoints(tmp_path / name)[0].path / "model.safetensors" for name in ("run", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()
    report = evaluate_models([tmp_path / "run"], [data / "aerial"], mask_seeds=1)
    assert report["trained"][0]["max_steps"] == 8


def test_resuming_where_there_is_nothing_begins(alone, tmp_path):
    result, _ = run(quick(alone, tmp_path / "run", max_steps=2), resume=True)
    assert result["step"] == 2


def test_a_run_is_not_overwritten(alone, tmp_path):
    recipe = quick(alone, tmp_path / "run")
    run(recipe)
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="`output_dir` must be new, got .*with a run at step 8. Add `--resume`"):
        pretrain(recipe)
    with pytest.raises(
        CheckpointError, match="`resume` must go on with the run.*mask_ratio was 0.6, is 0.5; seed was 0, is 1"
    ):
        pretrain(quick(alone, tmp_path / "run", seed=1, mask_ratio=0.5), resume=True)
    assert files == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_other_data_under_the_same_name_are_another_run(alone, tmp_path):
    run(quick(alone, tmp_path / "run"))
    other = write_aerial(tmp_path / "other", train=5, val=0)
    with pytest.raises(CheckpointError, match="sources was .*'rows': 12.*is .*'rows': 5"):
        pretrain(quick(other, tmp_path / "run"), resume=True)


def test_what_does_not_change_the_learning_may_differ(alone, tmp_path):
    moved = shutil.copytree(alone, tmp_path / "moved" / "aerial")
    run(quick(alone, tmp_path / "first"))
    (tmp_path / "again" / "checkpoints").mkdir(parents=True)
    shutil.copytree(
        tmp_path / "first" / "checkpoints" / "step-00000004", tmp_path / "again" / "checkpoints" / "step-00000004"
    )
    shutil.copy(tmp_path / "first" / "metrics.jsonl", tmp_path / "again")
    result, _ = run(quick(moved, tmp_path / "again", name="renamed", save_steps=3), resume=True)
    assert result["finished"]
    assert_same_run(tmp_path / "again", tmp_path / "first", 8)


# Bad data


# Row 5 is also one of the four from which the band means are taken.
@pytest.mark.parametrize("row", [3, 5])
def test_damaged_rows_are_skipped_and_counted(tmp_path, row):
    folder = write_aerial(tmp_path, train=16, val=0)
    damage(folder, [row])
    result, _ = run(quick(folder, tmp_path / "run"))
    assert result["finished"]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000008" / "state.json").read_text())
    ((where, reason),) = state["bad"]
    assert where == f"aerial[{row}]" and "`rgb` must hold 2700 bytes" in reason
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["bad"] == 1


def test_a_damaged_row_counts_once_however_often_it_comes(tmp_path):
    folder = write_aerial(tmp_path, train=16, val=0)
    damage(folder, [3])
    # Three passes.
    result, _ = run(quick(folder, tmp_path / "run", batch_sizes={"aerial": 8}, max_steps=6, max_bad=1))
    assert result["finished"]
    assert len(json.loads((find_checkpoints(tmp_path / "run")[0].path / "state.json").read_text())["bad"]) == 1


def test_damaged_rows_of_the_validation_are_left_out(tmp_path):
    folder = write_aerial(tmp_path, val=4)
    # The first is the one that pictures over time show, where it is sound.
    damage(folder, [0, 2], "val")
    changes = {"batch_sizes": {"aerial": 2}, "max_steps": 4, "save_steps": 4, "eval_steps": 2}
    result, _ = run(plan(folder, tmp_path / "run", **changes))
    assert result["finished"] and [row["crops"] for row in result["reconstruction"]] == [2]
    assert len(list((tmp_path / "run" / "reconstructions").iterdir())) == 2
    state = json.loads((find_checkpoints(tmp_path / "run")[0].path / "state.json").read_text())
    assert [where for where, _ in state["bad"]] == ["aerial val[0]", "aerial val[2]"]
    with pytest.raises(RuntimeError, match=r"`max_bad` allows 1 damaged rows, got 2; the last is aerial val\[2\]"):
        pretrain(plan(folder, tmp_path / "strict", max_bad=1, **changes))
    damage(folder, [1, 3], "val")
    result, _ = run(plan(folder, tmp_path / "none", **changes))
    assert result["finished"] and result["reconstruction"] == []


def test_a_damaged_row_is_told(tmp_path, capsys):
    folder = write_aerial(tmp_path, train=16, val=0)
    damage(folder, [3])
    pretrain(quick(folder, tmp_path / "run"))
    said = capsys.readouterr()
    assert "aerial[3]" in said.out + said.err


def test_flipped_bits_never_come_in(tmp_path, monkeypatch):
    """Three passes: what the first has found must not be used in the later ones, when nobody looks any more."""
    folder = write_aerial(tmp_path, train=32, val=0)
    file = folder / "train-00000.parquet"
    stored, payload = bytearray(file.read_bytes()), aerial_image(21).pixels.tobytes()
    stored[stored.index(payload) + 100] ^= 0x40
    file.write_bytes(stored)
    collate, used = pretrain_module.collate, []

    def watching(samples):
        used.append([sample["key"] for sample in samples])
        return collate(samples)

    monkeypatch.setattr(pretrain_module, "collate", watching)
    changes = {"batch_sizes": {"aerial": 8}, "max_steps": 12, "save_steps": 12, "max_bad": 60}
    run(quick(folder, tmp_path / "run", **changes))
    assert len(used) == 12
    for epoch in (used[:4], used[4:8], used[8:]):
        assert not {key for keys in epoch for key in keys} & {"train21"}


def test_too_much_damage_stops_the_run_and_leaves_the_checkpoint(tmp_path):
    folder = write_aerial(tmp_path, train=32, val=0)
    recipe = quick(folder, tmp_path / "run", max_bad=1)
    run(recipe)
    shutil.rmtree(find_checkpoints(tmp_path / "run")[0].path)
    (before,) = find_checkpoints(tmp_path / "run")
    assert before.step == 4
    # Rows that the first four steps did not need, and the band means do not.
    order = SourceOrder(ShardSource(folder).row_groups, "aerial", 0)
    damage(folder, [order[position] for position in (8, 10, 12)])
    with pytest.raises(
        RuntimeError, match="`max_bad` allows 1 damaged rows, got 2; the last is aerial.*Make these shards"
    ):
        pretrain(recipe, resume=True)
    assert find_checkpoints(tmp_path / "run") == [before]
    load_file(before.path / "model.safetensors")


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_in_succession_is_the_same_error(tmp_path, workers):
    folder = write_aerial(tmp_path, train=32, val=0)
    order = SourceOrder(ShardSource(folder).row_groups, "aerial", 0)
    damage(folder, [order[position] for position in (8, 9, 10)])
    recipe = quick(folder, tmp_path / "run", max_bad=1, dataloader_num_workers=workers)
    with pytest.raises(RuntimeError, match="`max_bad` allows 1 damaged rows, got [2-9]; the last is aerial") as stopped:
        pretrain(recipe)
    assert "Traceback" not in str(stopped.value)


def test_a_truncated_shard_is_one_clear_error(tmp_path):
    folder = write_aerial(tmp_path, val=0)
    file = folder / "train-00000.parquet"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match="train-00000.parquet` must be a whole Parquet file"):
        pretrain(quick(folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows(alone, tmp_path):
    recipe = quick(alone, tmp_path / "run", learning_rate=1e30, warmup_steps=0, max_grad_norm=1e30, max_steps=40)
    with pytest.raises(
        RuntimeError, match=r"`loss` must be finite, got (nan|inf) at step \d+. Look at the rows of .*train"
    ):
        pretrain(recipe)


def test_weights_that_are_not_finite_are_not_saved(alone, tmp_path, monkeypatch):
    """A finite loss can have gradients that are not; saving after such a step would leave nothing to go on from."""
    build = pretrain_module.build_optimizer

    def with_a_bad_gradient(model, *rest):
        steps = []

        def spoil(gradient):
            steps.append(1)
            return gradient * float("nan") if len(steps) == 6 else gradient

        model.decoders["rgb"].bias.register_hook(spoil)
        return build(model, *rest)

    monkeypatch.setattr(pretrain_module, "build_optimizer", with_a_bad_gradient)
    with pytest.raises(RuntimeError, match="must be finite, got nan at step 6"):
        pretrain(quick(alone, tmp_path / "run", save_steps=1))
    weights = load_file(find_checkpoints(tmp_path / "run")[0].path / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_spike_is_skipped_and_its_rows_are_named(alone, tmp_path, monkeypatch):
    """After enough usual steps a loss far above their median is not learnt from, and the run goes on."""
    monkeypatch.setattr(pretrain_module, "_USUAL_STEPS", 3)
    step = pretrain_module._Run._optimise

    def shocked(self, step_batches, inputs, *rest):
        if self.step == 6:
            inputs[0]["weights"] = [1000.0]
        return step(self, step_batches, inputs, *rest)

    monkeypatch.setattr(pretrain_module._Run, "_optimise", shocked)
    recipe = quick(alone, tmp_path / "run", max_loss_ratio=20, on_bad_loss="skip", log_samples=True)
    result, _ = run(recipe)
    assert result["finished"]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (event,) = [line for line in lines if "event" in line]
    assert (event["step"], event["event"]) == (6, "skipped")
    assert re.search(
        r"`loss` must be within `max_loss_ratio` \(20\) times the median of the last 3 steps", event["reason"]
    )
    logged = [json.loads(line) for line in (tmp_path / "run" / "samples" / "rank-00000.jsonl").read_text().splitlines()]
    assert event["keys"] == logged[5]["keys"]["aerial"]
    assert lines[-1]["skipped"] == 1 and all(line["loss"] < 2 for line in lines if "loss" in line)


def test_a_run_that_skips_too_often_stops(alone, tmp_path, monkeypatch):
    recipe = quick(alone, tmp_path / "run", on_bad_loss="skip", max_skipped_steps=2)
    monkeypatch.setattr(pretrain_module._Run, "_unusual", lambda *values: "`loss` must be liked, got none")
    with pytest.raises(RuntimeError, match="`loss` must be liked, got none at step 3. Look at the rows"):
        pretrain(recipe)


def test_a_stop_for_a_bad_loss_can_go_on_with_skipping(alone, tmp_path, monkeypatch):
    recipe = quick(alone, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_module._Run, "_unusual", lambda self, *values: "no" if self.step == 6 else None)
        with pytest.raises(RuntimeError, match="no at step 6"):
            pretrain(recipe)
        result, _ = run(quick(alone, tmp_path / "run", on_bad_loss="skip"), resume=True)
    assert result["finished"]
    # Why it stopped is still there, and what was changed for going on.
    events = [line["event"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "event" in line]
    assert events == ["stopped", "skipped"]
    (leg,) = json.loads((tmp_path / "run" / "run.json").read_text())["resumed"]
    assert leg["recipe"] == {"on_bad_loss": "skip"}


# Several batches a step, trackers, rehearsals


def test_less_memory_is_the_same_run(data, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_module, "draw_reconstruction", lambda *arguments: arguments[-1])
    run(plan(data, tmp_path / "run", gradient_checkpointing=True))
    assert_same_run(tmp_path / "run", whole[0])


def test_a_damaged_newest_checkpoint_is_passed_over(alone, tmp_path, caplog):
    recipe = quick(alone, tmp_path / "whole")
    run(recipe)
    run(quick(alone, tmp_path / "run"))
    newest, _ = find_checkpoints(tmp_path / "run")
    (newest.path / "model.safetensors").write_bytes(b"damage")
    result, _ = run(quick(alone, tmp_path / "run"), resume=True)
    assert result["finished"] and f"{newest.path} is damaged and passed over" in caplog.text
    assert_same_run(tmp_path / "run", tmp_path / "whole", 8)
    # Out of the way, so that it does not count among the checkpoints that stay.
    assert sorted(path.name for path in newest.path.parent.iterdir()) == [
        "step-00000004",
        "step-00000008",
        "step-00000008.damaged",
    ]


def test_trackers_are_told_what_the_metrics_say(alone, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = quick(alone, tmp_path / "run", report_to=["tensorboard"])
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        run(recipe)
    shutil.rmtree(find_checkpoints(tmp_path / "run")[0].path)
    run(recipe, resume=True)  # from step 4: what was told of steps 5 and 6 is told again
    events = EventAccumulator(str(tmp_path / "run" / "logs"))
    events.Reload()
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    for tag, values in (
        ("loss", [line["loss"] for line in lines]),
        ("losses/aerial rgb->rgb", [line["losses"]["aerial rgb->rgb"] for line in lines]),
        ("routing/rgb/histogram/0/1", [line["routing"]["rgb"]["histogram"][0][1] for line in lines]),
    ):
        told = events.Scalars(tag)
        assert [event.step for event in told] == list(range(1, 9))
        assert [event.value for event in told] == pytest.approx(values, rel=1e-6)


def test_a_tracker_that_is_not_there_is_refused(alone, tmp_path):
    with pytest.raises(ValueError, match="`report_to` must name trackers that are installed .*, got .*'wandb'"):
        pretrain(quick(alone, tmp_path / "run", report_to=["wandb"]))
    with pytest.raises(ValueError, match="carrier pigeon"):
        pretrain(quick(alone, tmp_path / "run", report_to=["carrier pigeon"]))
    assert not (tmp_path / "run").exists()


def test_a_rehearsal_says_what_a_run_takes_and_leaves_nothing(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    file = tmp_path / "plan.yaml"
    file.write_text(json.dumps(PLAN | {"data": [str(data)], "output_dir": str(tmp_path / "run")}))
    main(["--recipe", str(file), "--dry-run"])
    said = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    # 60 steps of 4 rows of 12, and of 2 pairs of 8.
    assert re.search(r"aerial +rgb +12 +4 +4 +20\.0\n", said) and re.search(r"pairs +s1\+s2 +8 +2 +2 +15\.0\n", said)
    assert re.search(r"steps +60, 4 per pass over the longest source", said)
    assert re.search(r"images +8 per step \(every sensor counts\), 480 in all", said)
    model = msgfm_hf.MsGFMForPreTraining(plan(data, tmp_path).model_config(*_sensors_of(data)))
    total = msgfm_hf.count_parameters(model).total
    assert f"parameters   {total:,}" in said
    # Weights, gradients and two moments, in float32.
    states, peak = map(
        float, re.search(r"memory +(\S+) GiB for weights.*; (\S+) GiB at most in this process", said).groups()
    )
    assert states == pytest.approx(total * 16 / 2**30, abs=0.005) and peak > states + 0.1
    seconds, hours = (float(re.search(pattern, said)[1]) for pattern in (r"one step +(\S+) s", r"whole run +(\S+) h"))
    assert hours == pytest.approx(seconds * 60 / 3600, rel=0.02)


def _sensors_of(data):
    mixture = Mixture(plan(data, data))
    return {sensor: SENSORS[sensor].to_dict() for sensor in mixture.sensors}, {"rgb": ["red", "green", "blue"]}


def test_pictures_over_time_show_the_same_crops(whole):
    out, _, _ = whole
    pictures = sorted((out / "reconstructions").iterdir())
    assert [path.name for path in pictures] == ["step-00000030.png", "step-00000060.png"]
    first, last = (np.asarray(Image.open(path).convert("L"), dtype=int) for path in pictures)
    assert first.shape == last.shape
    # Input and target stay, prediction and error change.
    changed = (first != last).mean(0)
    width = len(changed)
    assert changed[int(0.08 * width) : int(0.45 * width)].max() < 0.05 < changed[int(0.6 * width) :].max()


# Streams


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """Nine cells of Major-TOM Core, Sentinel-2 and -1."""
    folder = tmp_path_factory.mktemp("core")
    return {
        "s2": write_core(folder / "Core-S2L2A", [optical(number) for number in range(9)]),
        "s1": write_core(folder / "Core-S1RTC", [radar(number) for number in range(9)]),
    }


def streaming(core, out, **changes):
    stream = {"paths": core, "num_rows": 36, "tile_size": 54, "block_cells": 2, "val_share": 0.0}
    fields = {"data": [], "streams": {"majortom": stream}, "batch_sizes": {}, "max_steps": 8, "save_steps": 4}
    return build_recipe(PLAN | {"output_dir": str(out), "log_samples": True, "max_bad": 200} | fields | changes)


def keys_of(out):
    lines = (out / "samples" / "rank-00000.jsonl").read_text().splitlines()
    return [line["keys"] for line in map(json.loads, lines)]


def test_a_stream_trains_beside_shards_and_goes_on_exactly(core, alone, tmp_path, monkeypatch):
    changes = {"data": [str(alone)], "batch_sizes": {"aerial": 2, "majortom": 5}}
    run(streaming(core, tmp_path / "whole", **changes))
    recipe = streaming(core, tmp_path / "run", **changes)
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        run(recipe)
    # The state of the stream is small and in the checkpoint.
    state = json.loads((find_checkpoints(tmp_path / "run")[0].path / "state.json").read_text())
    assert len(json.dumps(state["streams"]["majortom"])) < 10_000
    run(recipe, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole", 8)
    assert keys_of(tmp_path / "run") == keys_of(tmp_path / "whole")
    # 40 rows are a pass over the 36 tiles and a little more.
    drawn = [key for keys in keys_of(tmp_path / "run") for key in keys["majortom"]]
    assert len(set(drawn[:36])) == 36 and set(drawn[36:]) <= set(drawn[:36])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataloader_num_workers": 2}, "`dataloader_num_workers` must be 0 with `streams`"),
        ({"sensors": ["s1"]}, "`sensors` must be left out with `streams`"),
        ({"streams": {}}, "`data` must name at least one folder of shards"),
        (
            {"streams": {"majortom": {"paths": {}}}},
            "`streams` must give 'majortom' `paths` and `num_rows`, .*got paths",
        ),
        (
            {"streams": {"m": {"paths": {}, "num_rows": 4, "tiles": 3}}},
            "`streams` must give 'm' .*tile_size.*, got .*tiles",
        ),
        ({"batch_sizes": {"other": 2}}, r"`batch_sizes` must name sources of `data` \(majortom\), got 'other'"),
    ],
)
def test_a_stream_that_makes_no_sense_is_refused(core, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(streaming(core, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_stream_has_a_name_of_its_own(core, alone, tmp_path):
    recipe = streaming(core, tmp_path / "run", data=[str(alone)])
    recipe = dataclasses.replace(recipe, streams={"aerial": recipe.streams["majortom"]})
    with pytest.raises(ValueError, match="`streams` must have names of their own, got 'aerial'"):
        pretrain(recipe)


# Mixtures


def test_a_run_may_read_some_sensors_alone(data, tmp_path):
    mixture = Mixture(plan(data, tmp_path, sensors=["s1"], batch_sizes={}))
    assert [(source.name, source.sensors) for source in mixture.sources] == [("pairs", ["s1"])]
    assert [(source.name, source.sensors) for source in mixture.validation] == [("pairs", ["s1"])]
    mixture = Mixture(plan(data, tmp_path, sensors=["s2", "rgb"]))
    assert [(source.name, source.sensors) for source in mixture.sources] == [("aerial", ["rgb"]), ("pairs", ["s2"])]
    assert mixture.batch_sizes == [4, 2]
    with pytest.raises(ValueError, match=r"`sensors` must be among those of the sources \(rgb, s1, s2\), got 'dsm'"):
        Mixture(plan(data, tmp_path, sensors=["dsm"]))


def test_a_run_without_a_validation_split(alone, tmp_path):
    result, said = run(quick(alone, tmp_path / "run", eval_steps=2))
    assert result["finished"] and result["reconstruction"] == []
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.safetensors", "losses.png", "metrics.jsonl"} <= names
    assert not names & {"reconstruction.png", "validation.json"}
    assert "Load the model with" in said and "validation split" not in said
    final = load_file(find_checkpoints(tmp_path / "run")[0].path / "model.safetensors")
    kept = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(final[name], kept[name]) for name in final)


def test_a_folder_of_sources_is_a_mixture(data, alone):
    mixture = Mixture(build_recipe({"data": [str(data)]}))
    assert [source.name for source in mixture.sources] == ["aerial", "pairs"]
    assert (mixture.batch_sizes, mixture.weights) == ([16, 16], [1.0, 1.0])
    assert mixture.sensors == ["rgb", "s1", "s2"]
    assert [source.split for source in mixture.validation] == ["val", "val"]
    assert mixture.fingerprint()["aerial"]["rows"] == 12
    one = Mixture(build_recipe({"data": [str(data / "pairs")], "batch_sizes": {"pairs": 3}}))
    assert ([source.name for source in one.sources], one.batch_sizes) == (["pairs"], [3])
    assert Mixture(build_recipe({"data": [str(alone)]})).validation == []


def test_a_source_for_tests_alone_does_not_train(data, tmp_path):
    with ShardWriter(tmp_path, "probe", ["rgb"]) as writer:
        writer.write(ShardRow("t", "probe", "test", "there", {"rgb": aerial_image(0)}))
    both = Mixture(build_recipe({"data": [str(data), str(tmp_path)]}))
    assert [source.name for source in both.sources] == ["aerial", "pairs"]
    with pytest.raises(ValueError, match="`data` must hold a training split, got probe without one"):
        Mixture(build_recipe({"data": [str(tmp_path)]}))


def test_a_sub_batch_of_a_source_that_is_not_there_is_refused(data):
    with pytest.raises(ValueError, match=r"`batch_sizes` must name sources of `data` \(aerial, pairs\), got 'areal'"):
        Mixture(build_recipe({"data": [str(data)], "batch_sizes": {"areal": 3}}))


def test_two_sources_of_one_name_are_refused(data, alone):
    with pytest.raises(ValueError, match="`data` must .*aerial.*"):
        Mixture(build_recipe({"data": [str(data), str(alone)]}))


def test_a_source_in_a_folder_of_another_name_is_refused(tmp_path):
    folder = write_aerial(tmp_path, val=0).rename(tmp_path / "photos")
    with pytest.raises(ValueError, match="sources in folders of their own name, got 'aerial' in .*photos"):
        Mixture(build_recipe({"data": [str(folder)]}))


def test_a_sensor_outside_the_catalogue_is_refused(tmp_path):
    with ShardWriter(tmp_path, "lidar", ["lidar"]) as writer:
        image = ShardImage(np.ones((1, SIZE, SIZE), np.float32), ["returns"], "metres")
        writer.write(ShardRow("a", "lidar", "train", "here", {"lidar": image}))
    with pytest.raises(ValueError, match="`sensor` must be one of dsm, .*got 'lidar'"):
        pretrain(quick(tmp_path / "lidar", tmp_path / "run", batch_sizes={}))


def test_a_folder_with_a_model_that_is_not_of_a_run_is_left_alone(alone, tmp_path):
    (tmp_path / "model.safetensors").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ValueError, match="`output_dir` must be new, got .* with a model that is not of a run"):
            pretrain(quick(alone, tmp_path), resume=resume)
    assert (tmp_path / "model.safetensors").read_text() == "mine"


def test_a_run_killed_before_its_first_checkpoint_is_not_overwritten_unasked(alone, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="`output_dir` must be new, got .* with a run at step 0. Add `--resume`"):
        pretrain(quick(alone, tmp_path))
    result, _ = run(quick(alone, tmp_path, max_steps=1), resume=True)
    assert result["finished"]


def test_pictures_that_cannot_be_written_are_one_clear_error(alone, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrain_module, "draw_losses", full)
    with pytest.raises(CheckpointError, match="`output_dir` must be writable, got .*the disk is full"):
        pretrain(quick(alone, tmp_path / "run", max_steps=1))


def test_data_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`data` must be a folder of shards such as train-00000.parquet"):
        pretrain(quick(tmp_path / "nowhere", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_missing_data_are_made_and_existing_ones_left(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("msgfm_hf.data.synthetic.make_synthetic_shards", lambda out: made.append(out))
    monkeypatch.setattr("msgfm_hf.data.sample.make_sample_shards", lambda root, out: made.append((root, out)))
    monkeypatch.setenv("MSGFM_SAMPLE_DATA", "/samples")
    out = tmp_path / "new"
    for kind in ("none", "synthetic", "sample"):
        make_missing_data(build_recipe({"data": [str(out)], "make_data": kind, "seed": 4}))
    assert made == [out, (Path("/samples"), out)]
    write_aerial(out)
    make_missing_data(build_recipe({"data": [str(out)], "make_data": "synthetic"}))
    assert len(made) == 2


def test_data_whose_making_was_interrupted_are_made_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("msgfm_hf.data.synthetic.make_synthetic_shards", lambda out: made.append(out))
    # What a killed process leaves: the folder, and a source that is not yet one.
    (tmp_path / "data" / ".synthetic_rgb-77.partial").mkdir(parents=True)
    make_missing_data(build_recipe({"data": [str(tmp_path / "data")], "make_data": "synthetic"}))
    assert made == [tmp_path / "data"]


def test_a_run_that_goes_on_keeps_its_record(alone, tmp_path, monkeypatch):
    recipe = quick(alone, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        run(recipe)
    first = json.loads((tmp_path / "run" / "run.json").read_text())
    monkeypatch.setattr(pretrain_module, "source_commit", lambda: "another")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    _, said = run(recipe, resume=True)
    assert "`threads` of this run was 1 and is 7 now" in said
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (leg,) = record.pop("resumed")
    assert record == first and record["commit"] != "another"
    assert (leg["step"], leg["commit"], leg["threads"]) == (5, "another", 7)
    # Looking at a run that is over changes nothing.
    run(recipe, resume=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == record | {"resumed": [leg]}


def test_other_data_of_the_same_size_are_another_run(data, tmp_path):
    run(quick(data / "aerial", tmp_path / "run", max_steps=4))
    folder = tmp_path / "aerial"
    with ShardWriter(tmp_path, "aerial", ["rgb"]) as writer:
        for number in range(12):
            pixels = aerial_image(number).pixels.astype(np.float32)
            image = ShardImage(pixels, ["red", "green", "blue"], "dn", 1 / 255)
            writer.write(ShardRow(f"{number}", "aerial", "train", "here", {"rgb": image}))
    with pytest.raises(CheckpointError, match="sources"):
        pretrain(quick(folder, tmp_path / "run", max_steps=4), resume=True)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ImportError("`rasterio` must be installed")])
def test_what_the_system_refuses_is_one_line(alone, tmp_path, monkeypatch, capsys, error):
    def refuse(recipe, resume):
        raise error

    monkeypatch.setattr(pretrain_module, "pretrain", refuse)
    with pytest.raises(SystemExit) as stopped:
        main(["--data", str(alone)])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and said.startswith("pretrain.py: ") and said.count("\n") == 1


def test_a_copy_in_somebody_elses_repository_has_no_commit(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(pretrain_module, "__file__", str(tmp_path / "pretrain.py"))
    (tmp_path / "pretrain.py").write_text("")
    assert pretrain_module.source_commit() is None


def test_the_samples_need_to_be_found(tmp_path, monkeypatch):
    monkeypatch.delenv("MSGFM_SAMPLE_DATA", raising=False)
    with pytest.raises(ValueError, match="`data` must exist or be made from MSGFM_SAMPLE_DATA, which is unset, got"):
        make_missing_data(build_recipe({"data": [str(tmp_path / "new")], "make_data": "sample"}))


def test_a_translation_without_masks_can_be_trained(data, tmp_path):
    """Nothing masked, every step a crossing, the loss everywhere: whole images to whole images."""
    changes = {"batch_sizes": {"pairs": 2}, "max_steps": 2, "save_steps": 2, "mask_ratio": 0.0}
    crossing = {"cross_sensor_ratio": 1.0, "cross_loss_region": "all"}
    result, _ = run(plan(data, tmp_path / "run", **changes, **crossing))
    assert result["finished"]


# The command line


def test_main_runs_and_ends_quietly_on_errors(alone, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--data", str(alone), "--output_dir", str(out), "--model", json.dumps(TINY), "--max_steps", "2"]
    options += ["--mixed_precision", "no", "--batch_sizes", "{aerial: 2}", "--logging-steps", "1"]
    main(options)
    assert "Load the model with" in capsys.readouterr().out
    assert find_checkpoints(out)[0].step == 2
    cases = {
        "`output_dir` must be new": options,
        "seed was 0, is 3": [*options, "--resume", "--seed", "3"],
        "`max_steps` must be a int, got 'two'": [*options, "--max_steps", "two"],
        "`data` must be a folder of shards": ["--data", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "b")],
    }
    for message, words in cases.items():
        with pytest.raises(SystemExit) as stopped:
            main(words)
        said = capsys.readouterr().err.strip()
        assert stopped.value.code == 1
        assert message in said and said.startswith("pretrain.py: ") and "Traceback" not in said


def test_a_folder_that_cannot_be_written_is_one_clear_error(alone, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "--data",
                str(alone),
                "--output_dir",
                str(tmp_path / "file"),
                "--max_steps",
                "1",
                "--mixed_precision",
                "no",
            ]
        )
    assert stopped.value.code == 1
    assert "`output_dir` must be writable" in capsys.readouterr().err


def test_a_disk_that_fills_between_checkpoints_is_one_clear_error(alone, tmp_path, monkeypatch):
    append = pretrain_module._append

    def full(path, line):
        if line["step"] == 6:
            raise OSError(28, "No space left on device")
        append(path, line)

    monkeypatch.setattr(pretrain_module, "_append", full)
    with pytest.raises(CheckpointError, match="`output_dir` must be writable"):
        pretrain(quick(alone, tmp_path / "run"))
