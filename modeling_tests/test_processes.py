"""Several processes are one run: the same samples, the same weights on all ranks, exact resuming, other numbers of
processes, replicas and shards."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from msgfm_hf.data.shards import ShardSource
from msgfm_hf.train.checkpoint import find_checkpoints
from msgfm_hf.train.pictures import read_metrics
from msgfm_hf.train.processes import prepare_model
from ranks import Ranks
from test_pretrain import PLAN, damage, write_aerial, write_pairs

STEPS = 12
# What the issue of equality asks for: no noise in the gate, no auxiliary loss, room for every token.
CALM = {"router_noise": 0.0, "router_aux_loss_coef": 0.0, "capacity_factor": None}
ROWS = {"aerial": 11, "pairs": 7}


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as started:
        yield started


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    # Odd numbers of rows: batches straddle the borders of epochs.
    write_aerial(folder, train=ROWS["aerial"], val=0)
    write_pairs(folder, train=ROWS["pairs"], val=0)
    return folder


def write_plan(data, out, calm=True, **changes):
    """A recipe's file; JSON is YAML."""
    model = PLAN["model"] | (CALM if calm else {})
    fields = PLAN | {"model": model, "data": [str(data)], "output_dir": str(out), "max_steps": STEPS}
    # AdamW divides a gradient by its own size, so a nearly zero one could turn round for a rounding error.
    fields |= {"adam_epsilon": 1e-2, "learning_rate": 2e-2}
    fields |= {"batch_sizes": {"aerial": 2, "pairs": 1}, "eval_steps": 100, "save_steps": 4, "log_samples": True}
    file = out.parent / f"{out.name}.yaml"
    file.write_text(json.dumps(fields | changes))
    return str(file)


def pretrain(ranks, data, out, *more, world=2, die=None, spoil=None, **changes):
    file = write_plan(data, out, **changes)
    log = out.parent / f"{out.name}-log"
    return ranks.run(log, "--recipe", file, *more, world=world, die=die, spoil=spoil)


def weights(out, step=STEPS):
    return load_file(out / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def losses(out):
    return {line["step"]: line for line in read_metrics(out / "metrics.jsonl") if "loss" in line}


def samples(out):
    """{(step, source): keys of all ranks}, in the order of ranks and batches."""
    found = {}
    for file in sorted((out / "samples").glob("*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            for source, keys in line["keys"].items():
                found.setdefault((line["step"], source), []).extend(keys)
    return found


def assert_same(out, other, step=STEPS):
    ours, theirs = weights(out, step), weights(other, step)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    ours, theirs = (
        torch.load(path / "checkpoints" / f"step-{step:08d}" / "optimizer.pt", weights_only=True)["state"]
        for path in (out, other)
    )
    assert all(torch.equal(ours[name][moment], theirs[name][moment]) for name in theirs for moment in theirs[name])
    assert samples(out) == samples(other)


@pytest.fixture(scope="module")
def undisturbed(ranks, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "run"
    results = pretrain(ranks, data, out)
    assert [result["code"] for result in results] == [0, 0], results[0]["said"] + results[1]["said"]
    return out, results


def test_two_processes_are_alike_and_look_for_no_unused_parameters(undisturbed):
    _, results = undisturbed
    assert results[0]["weights"] == results[1]["weights"]
    assert [result["unused"] for result in results] == [False, False]
    assert "2 processes per step" in results[0]["said"] and "parameters" not in results[1]["said"]


def test_ranks_take_the_samples_of_the_design(undisturbed, data):
    """Step t of rank r takes the positions [(t W + r) B, +B), so that every row comes once per pass."""
    out, _ = undisturbed
    found = samples(out)
    for source, size in (("aerial", 2), ("pairs", 1)):
        keys = [key for step in range(1, STEPS + 1) for key in found[step, source]]
        assert len(keys) == STEPS * 2 * size
        for epoch in range(len(keys) // ROWS[source]):
            seen = Counter(keys[epoch * ROWS[source] : (epoch + 1) * ROWS[source]])
            rows = {row["key"] for row in ShardSource(data / source).read_metadata()}
            assert seen == dict.fromkeys(rows, 1)


@pytest.mark.parametrize("how", ["batch", "accumulation"])
def test_two_processes_equal_one_with_the_same_global_batch(ranks, data, undisturbed, tmp_path, how):
    two, _ = undisturbed
    one = tmp_path / "one"
    changes = {"batch_sizes": {"aerial": 4, "pairs": 2}} if how == "batch" else {"gradient_accumulation_steps": 2}
    (result,) = pretrain(ranks, data, one, world=1, **changes)
    assert result["code"] == 0, result["said"]
    assert {step: set(keys) for step, keys in samples(one).items()} == {
        step: set(keys) for step, keys in samples(two).items()
    }
    ours, theirs = losses(two), losses(one)
    assert ours.keys() == theirs.keys() and len(ours) == STEPS
    for step, line in ours.items():
        assert line["loss"] == pytest.approx(theirs[step]["loss"], abs=1e-6)
        assert line["grad_norm"] == pytest.approx(theirs[step]["grad_norm"], rel=1e-5)
        assert line["losses"] == pytest.approx(theirs[step]["losses"], abs=1e-6)
    assert largest_difference(weights(two), weights(one)) < 1e-6


def test_valid_pixels_that_differ_between_ranks_weigh_as_in_one_batch(ranks, tmp_path):
    """A rank with few valid pixels must not count as much as one with many: denominators are summed over ranks."""
    folder = tmp_path / "data"
    write_pairs(folder, train=8, val=0)
    file = folder / "pairs" / "train-00000.parquet"
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    stored = table.to_pylist()
    for number, row in enumerate(stored):
        pixels = np.frombuffer(row["s2"], np.uint16).reshape(2, 30, 30).copy()
        pixels[:, 3 * number :] = 0  # nodata
        row["s2"] = pixels.tobytes()
    pq.write_table(pa.Table.from_pylist(stored, schema=table.schema), file, row_group_size=16)
    lines = {}
    for world, size in ((2, 2), (1, 4)):
        out = tmp_path / f"world-{world}"
        results = pretrain(ranks, folder, out, world=world, batch_sizes={"pairs": size}, max_steps=4)
        assert results[0]["code"] == 0, results[0]["said"]
        lines[world] = losses(out)
    for step, line in lines[2].items():
        assert line["losses"] == pytest.approx(lines[1][step]["losses"], abs=1e-6)
        assert line["loss"] == pytest.approx(lines[1][step]["loss"], abs=1e-6)


@pytest.mark.parametrize(
    "deaths, workers",
    [([(1, "step", 6)], 2), ([(0, "save", 2)], 0), ([(0, "step", 3), (1, "step", 5), (0, "step", 3)], 0)],
)
def test_two_processes_go_on_exactly_after_they_were_killed(ranks, data, undisturbed, tmp_path, deaths, workers):
    out = tmp_path / "run"
    for death in deaths:
        results = pretrain(ranks, data, out, "--resume", die=death, dataloader_num_workers=workers)
        assert results[death[0]]["code"] == -signal.SIGKILL, results[death[0]]["said"]
    results = pretrain(ranks, data, out, "--resume", dataloader_num_workers=workers)
    assert [result["code"] for result in results] == [0, 0], results[0]["said"]
    assert_same(out, undisturbed[0])


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (3, 2)])
def test_another_number_of_processes_goes_on_at_the_same_sample(ranks, data, tmp_path, before, after):
    out = tmp_path / "run"
    results = pretrain(ranks, data, out, world=before, die=(0, "step", 7))
    assert results[0]["code"] == -signal.SIGKILL
    results = pretrain(ranks, data, out, "--resume", world=after)
    assert results[0]["code"] == 0, results[0]["said"]
    assert (
        f"`world_size` of this run was {before} and is {after} now: it goes on at the same samples"
        in results[0]["said"]
    )
    found = samples(out)
    # Four steps of the first processes, then as many as the rest of the samples makes.
    rest = -(-(STEPS - 4) * before // after)
    assert find_checkpoints(out)[0].step == 4 + rest
    keys = [key for step in range(1, 5 + rest) for key in found[step, "aerial"]]
    assert len(keys) == 2 * (4 * before + rest * after)
    rows = {row["key"] for row in ShardSource(data / "aerial").read_metadata()}
    for epoch in range(len(keys) // ROWS["aerial"]):
        assert Counter(keys[epoch * ROWS["aerial"] : (epoch + 1) * ROWS["aerial"]]) == dict.fromkeys(rows, 1)


def test_the_same_global_batch_in_another_number_of_processes_is_the_same_run(ranks, data, undisturbed, tmp_path):
    out = tmp_path / "run"
    pretrain(ranks, data, out, die=(1, "step", 7))
    (result,) = pretrain(ranks, data, out, "--resume", world=1, gradient_accumulation_steps=2)
    assert result["code"] == 0, result["said"]
    ours, theirs = losses(out), losses(undisturbed[0])
    assert ours.keys() == theirs.keys()
    for step, line in ours.items():
        assert line["learning_rate"] == theirs[step]["learning_rate"]
        assert line["loss"] == pytest.approx(theirs[step]["loss"], abs=1e-5)


def test_shards_of_the_model_equal_replicas(ranks, data, undisturbed, tmp_path):
    """FSDP2 on a mesh of CPUs: the same losses and weights; its checkpoints are those of a whole model."""
    out = tmp_path / "run"
    results = pretrain(ranks, data, out, fsdp=True)
    assert [result["code"] for result in results] == [0, 0], results[0]["said"]
    assert results[0]["kinds"] == ["DTensor"] and undisturbed[1][0]["kinds"] == ["Parameter"]
    ours, theirs = losses(out), losses(undisturbed[0])
    for step, line in ours.items():
        assert line["loss"] == pytest.approx(theirs[step]["loss"], abs=1e-6)
    assert largest_difference(weights(out), weights(undisturbed[0])) < 1e-6
    assert samples(out) == samples(undisturbed[0])
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["MsGFMForPreTraining"]


@pytest.mark.parametrize("before", [True, False])
def test_shards_and_replicas_go_on_with_each_others_checkpoints(ranks, data, undisturbed, tmp_path, before):
    out = tmp_path / "run"
    pretrain(ranks, data, out, fsdp=before, die=(1, "step", 7))
    results = pretrain(ranks, data, out, "--resume", fsdp=not before)
    assert [result["code"] for result in results] == [0, 0], results[0]["said"]
    assert losses(out)[STEPS]["loss"] == pytest.approx(losses(undisturbed[0])[STEPS]["loss"], abs=1e-5)


@pytest.mark.parametrize("fsdp", [False, True])
def test_chance_capacity_experts_and_evaluation_agree_between_ranks(ranks, tmp_path, fsdp):
    """The paper's settings: noise, an auxiliary loss, limited room; in bf16. The ranks stay equal and go on exactly."""
    write_aerial(tmp_path / "data", train=9, val=2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = {"calm": False, "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "max_steps": 6}
    changes |= {"batch_sizes": {"aerial": 2}, "eval_steps": 3, "mixed_precision": "bf16", "fsdp": fsdp}
    results = pretrain(ranks, tmp_path / "data", whole, **changes)
    assert [result["code"] for result in results] == [0, 0], results[0]["said"]
    # Replicas are equal, shards are parts.
    assert (results[0]["weights"] == results[1]["weights"]) != fsdp
    assert results[0]["kinds"] == (["DTensor"] if fsdp else ["Parameter"])
    pretrain(ranks, tmp_path / "data", cut, die=(0, "step", 6), **changes)
    pretrain(ranks, tmp_path / "data", cut, "--resume", **changes)
    assert_same(cut, whole, 6)
    scores = [line["score"] for line in read_metrics(whole / "metrics.jsonl") if "score" in line]
    assert len(scores) == 2 and load_file(whole / "model.safetensors").keys() == weights(whole, 6).keys()


def test_a_gradient_that_is_no_number_is_skipped_on_all_ranks(ranks, data, tmp_path):
    out = tmp_path / "run"
    results = pretrain(ranks, data, out, spoil=(1, 5), on_bad_loss="skip")
    assert [result["code"] for result in results] == [0, 0], results[0]["said"]
    assert results[0]["weights"] == results[1]["weights"]
    (event,) = [line for line in read_metrics(out / "metrics.jsonl") if "event" in line]
    assert (event["step"], event["event"]) == (5, "skipped") and "`grad_norm` must be finite" in event["reason"]
    found = samples(out)
    assert sorted(event["keys"]) == sorted(found[5, "aerial"] + found[5, "pairs"])
    assert losses(out)[STEPS]["skipped"] == 1 and 5 not in losses(out)


def test_a_gradient_that_is_no_number_stops_all_ranks(ranks, data, tmp_path):
    results = pretrain(ranks, data, tmp_path / "run", spoil=(0, 5))
    assert [result["code"] for result in results] == [1, 1]
    for result in results:
        assert "`grad_norm` must be finite, got nan at step 5" in result["said"]
    (event,) = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "event" in line]
    assert event["event"] == "stopped" and len(event["keys"]) == 6


def test_damage_that_one_rank_meets_is_known_to_all(ranks, tmp_path):
    folder = tmp_path / "data"
    write_aerial(folder, train=9, val=0)
    damage(folder / "aerial", [3])
    results = pretrain(ranks, folder, tmp_path / "run", batch_sizes={"aerial": 1}, max_steps=8)
    assert [result["code"] for result in results] == [0, 0], results[0]["said"]
    state = json.loads((find_checkpoints(tmp_path / "run")[0].path / "state.json").read_text())
    assert [where for where, _ in state["bad"]] == ["aerial[3]"]
    results = pretrain(ranks, folder, tmp_path / "strict", batch_sizes={"aerial": 1}, max_steps=8, max_bad=0)
    for result in results:
        assert result["code"] == 1 and "`max_bad` allows 0 damaged rows, got 1" in result["said"]


@pytest.mark.slow
def test_the_launcher_passes_a_stop_on_and_all_ranks_save(data, tmp_path):
    """`accelerate launch` as the documentation has it, and the SIGTERM of a scheduler."""
    out = tmp_path / "run"
    file = write_plan(data, out, max_steps=100_000, save_steps=100_000, logging_steps=1)
    words = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no", "--main_process_port", "0", "-m", "msgfm_hf.train.pretrain", "--recipe", file]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (tmp_path / "said.txt").open("w") as said:
        launched = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *words], stdout=said, stderr=said, env=environment
        )
        while launched.poll() is None and len(losses_so_far(out)) < 3:
            time.sleep(0.2)
        launched.terminate()
        launched.wait(timeout=120)
    said = (tmp_path / "said.txt").read_text()
    (checkpoint,) = find_checkpoints(out)
    assert 3 <= checkpoint.step < 100_000 and f"Stopped at step {checkpoint.step}" in said, said
    assert {step for step, _ in samples(out)} == set(range(1, checkpoint.step + 1))
    assert len(samples(out)[checkpoint.step, "aerial"]) == 4


def losses_so_far(out):
    return losses(out) if (out / "metrics.jsonl").exists() else {}


@pytest.mark.parametrize("fsdp", [False, True])
def test_validation_rows_that_one_rank_cannot_read_are_left_out_by_all(ranks, tmp_path, fsdp):
    """Each node may have a copy of the shards of its own."""
    for rank in range(2):
        write_aerial(tmp_path / f"data-{rank}", train=9, val=3)
    damage(tmp_path / "data-1" / "aerial", [0, 2], "val")
    changes = {"batch_sizes": {"aerial": 2}, "max_steps": 4, "eval_steps": 2, "fsdp": fsdp}
    words = ["--data", str(tmp_path / "data-%RANK%")]
    results = pretrain(ranks, tmp_path, tmp_path / "run", *words, **changes)
    assert [result["code"] for result in results] == [0, 0], results[0]["said"]
    state = json.loads((find_checkpoints(tmp_path / "run")[0].path / "state.json").read_text())
    assert [where for where, _ in state["bad"]] == ["aerial val[0]", "aerial val[2]"]
    results = pretrain(ranks, tmp_path, tmp_path / "strict", *words, max_bad=0, **changes)
    for result in results:
        assert result["code"] == 1 and "`max_bad` allows 0 damaged rows, got 2" in result["said"]


def test_a_rehearsal_of_two_processes_is_told_once(ranks, data, tmp_path):
    first, second = pretrain(ranks, data, tmp_path / "run", "--dry-run")
    assert (first["code"], second["code"]) == (0, 0), first["said"]
    assert "one batch per 2 processes per step" in first["said"] and "device-hours on 2 x cpu" in first["said"]
    assert "device-hours" not in second["said"] and not (tmp_path / "run").exists()


def test_shards_need_two_processes():
    accelerator = SimpleNamespace(num_processes=1, distributed_type=DistributedType.NO)
    with pytest.raises(ValueError, match="`fsdp` must have two processes or more, got 1"):
        prepare_model(accelerator, None, fsdp=True)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharding_by_accelerate_itself_is_refused(kind):
    with pytest.raises(ValueError, match=f"`distributed_type` of Accelerate must be plain, got {kind.value}"):
        prepare_model(SimpleNamespace(distributed_type=kind), None, fsdp=False)
