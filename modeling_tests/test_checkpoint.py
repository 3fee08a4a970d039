"""Checkpoints: whole or absent, whatever happens while they are written, and refused where they do not belong."""

import errno
import json
import os
import resource

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModel

import msgfm_hf
from msgfm_hf.model.configuration_msgfm import MsGFMConfig
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.modeling_msgfm import MsGFMForPreTraining
from msgfm_hf.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    find_checkpoints,
    load_checkpoint,
    save_checkpoint,
    save_model,
    write_text,
)
from msgfm_hf.train.processes import full_optimizer_state, full_weights, load_optimizer_state

MADE_BY = {"identity": {"seed": 0, "learning_rate": 1e-4, "sources": {"rgb": {"rows": 12, "sensors": ["rgb"]}}}}
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Run:
    """A tiny model with an optimiser that has taken a few steps."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        sensors = {sensor: spec for sensor, spec in MsGFMConfig().sensors.items() if sensor == "rgb"}
        config = MsGFMConfig(
            embed_dim=12,
            depths=[1, 1, 2],
            num_heads=[1, 1, 2],
            window_size=3,
            image_size=24,
            mask_patch_size=8,
            num_experts=2,
            sensors=sensors,
        )
        self.model = MsGFMForPreTraining(config)
        self.processor = MsGFMImageProcessor.from_config(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def step(self):
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        return self

    def save(self, folder, step, limit=2):
        state = {"step": step, "best": {"score": 0.5, "step": step}, "bad": [["rgb[3]", "damage"]]}
        weights, optimizer_state = full_weights(self.model), full_optimizer_state(self.model, self.optimizer)
        return save_checkpoint(folder, self.model, self.processor, weights, optimizer_state, state, MADE_BY, limit)

    def load(self, folder, made_by=MADE_BY):
        state, optimizer_state = load_checkpoint(folder, self.model, made_by)
        load_optimizer_state(self.model, self.optimizer, optimizer_state)
        return state

    def weights(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}


@pytest.fixture
def run():
    return Run().step().step()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_equal(weights, others):
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []


@pytest.fixture
def no_room(monkeypatch):
    """Make a function fail as on a full disk, or undo that."""

    def fill(target, error=FULL):
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(target, fail)

    fill.undo = monkeypatch.undo
    return fill


# Saving and loading


def test_what_is_saved_comes_back_bit_by_bit(tmp_path, run):
    checkpoint = run.save(tmp_path, 40)
    assert checkpoint == Checkpoint(tmp_path / "checkpoints" / "step-00000040", 40)
    other = Run(seed=5)
    state = other.load(tmp_path)
    assert state == {"step": 40, "best": {"score": 0.5, "step": 40}, "bad": [["rgb[3]", "damage"]]}
    assert_equal(run.weights(), other.weights())
    # The moments too: the next steps are the same.
    for each in (run, other):
        torch.manual_seed(9)
        each.step().step()
    assert_equal(run.weights(), other.weights())


def test_a_checkpoint_is_a_folder_that_transformers_loads(tmp_path, run):
    folder = run.save(tmp_path, 1).path
    model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    assert isinstance(model, msgfm_hf.MsGFMModel) and isinstance(processor, MsGFMImageProcessor)
    assert_equal({k: v for k, v in run.model.msgfm.state_dict().items()}, dict(model.state_dict()))


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path, run):
    assert find_checkpoints(tmp_path) == [] and load_checkpoint(tmp_path, run.model, MADE_BY) is None
    for step in (9, 100, 20):
        run.save(tmp_path, step, limit=5)
    assert [checkpoint.step for checkpoint in find_checkpoints(tmp_path)] == [100, 20, 9]


def test_only_the_newest_stay(tmp_path, run):
    for step in (10, 20, 30):
        run.save(tmp_path, step, limit=2)
    assert names(tmp_path / "checkpoints") == ["step-00000020", "step-00000030"]
    run.save(tmp_path, 40, limit=1)
    assert names(tmp_path / "checkpoints") == ["step-00000040"]


def test_saving_a_step_again_replaces_it(tmp_path, run):
    run.save(tmp_path, 10)
    run.step().save(tmp_path, 10)
    other = Run(seed=5)
    other.load(tmp_path)
    assert_equal(run.weights(), other.weights())


def test_what_a_killed_process_left_half_written_is_no_checkpoint(tmp_path, run):
    run.save(tmp_path, 10)
    torn = tmp_path / "checkpoints" / ".step.tmp"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half of")
    (torn / "left over").write_text("x")
    assert find_checkpoints(tmp_path)[0].step == 10
    saved = run.save(tmp_path, 20)
    assert names(tmp_path / "checkpoints") == ["step-00000010", "step-00000020"]
    assert "left over" not in names(saved.path)


def test_a_folder_that_somebody_set_aside_is_no_checkpoint(tmp_path, run):
    run.save(tmp_path, 10)
    (tmp_path / "checkpoints" / "step-00000010").rename(tmp_path / "checkpoints" / "step-00000010.bak")
    run.save(tmp_path, 7)
    assert find_checkpoints(tmp_path)[0].step == 7


def test_the_model_of_a_run_is_replaced_file_by_file(tmp_path, run):
    save_model(tmp_path, run.model, run.processor)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    run.step()
    save_model(tmp_path, run.model, run.processor)
    assert_equal(run.weights(), MsGFMForPreTraining.from_pretrained(tmp_path).state_dict())
    assert names(tmp_path) == ["config.json", "metrics.jsonl", "model.safetensors", "preprocessor_config.json"]


# A full disk

FAILURES = {
    "flush": ("os.fsync", FULL),
    "weights": ("msgfm_hf.model.modeling_msgfm.MsGFMForPreTraining.save_pretrained", FULL),
    # What safetensors raises for errno 28.
    "safetensors": (
        "msgfm_hf.model.modeling_msgfm.MsGFMForPreTraining.save_pretrained",
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ),
    "processor": ("msgfm_hf.model.image_processing_msgfm.MsGFMImageProcessor.save_pretrained", FULL),
    "rename": ("os.replace", FULL),
}


@pytest.mark.parametrize(
    "failure",
    [
        *FAILURES,
        "optimizer",
        "optimizer archive",
    ],
)
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, run, no_room, failure):
    run.save(tmp_path, 10)
    before = run.weights()
    run.step()
    failures = FAILURES | {
        "optimizer": ("torch.save", FULL),
        # What torch's archive writer raises instead of an OSError.
        "optimizer archive": ("torch.save", RuntimeError("unexpected pos 64 vs 0, No space left on device")),
    }
    no_room(*failures[failure])
    with pytest.raises(
        CheckpointError, match="`output_dir` must be writable, got .*; [0-9,]+ MiB are free there.*make room and add"
    ) as e:
        run.save(tmp_path, 20)
    assert "disk is full" in str(e.value) or "No space left" in str(e.value)
    no_room.undo()
    assert names(tmp_path / "checkpoints") == ["step-00000010"]
    other = Run(seed=5)
    assert other.load(tmp_path)["step"] == 10
    assert_equal(before, other.weights())
    # With room again the run goes on.
    assert run.save(tmp_path, 30) == find_checkpoints(tmp_path)[0]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_full_disk_leaves_the_model_before(tmp_path, run, no_room, failure):
    save_model(tmp_path, run.model, run.processor)
    before, files = run.weights(), names(tmp_path)
    run.step()
    no_room(*FAILURES[failure])
    with pytest.raises(CheckpointError, match="`output_dir` must be writable, got .*: .*make room"):
        save_model(tmp_path, run.model, run.processor)
    no_room.undo()
    assert names(tmp_path) == files
    assert_equal(before, MsGFMForPreTraining.from_pretrained(tmp_path).state_dict())


@pytest.fixture
def small_files():
    """Make the kernel refuse to write a file beyond a size, as a disk does that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_writes_that_really_fail(tmp_path, run, small_files):
    run.save(tmp_path, 10)
    save_model(tmp_path, run.model, run.processor)
    before = run.weights()
    weights = (tmp_path / "model.safetensors").stat().st_size
    run.step()
    # First the weights do not fit, then they do but the optimiser's state, twice as large, does not.
    for room in (weights // 2, weights * 3 // 2):
        small_files(room)
        with pytest.raises(CheckpointError, match="`output_dir` must be writable"):
            run.save(tmp_path, 20)
    small_files(weights // 2)
    with pytest.raises(CheckpointError, match="`output_dir` must be writable"):
        save_model(tmp_path, run.model, run.processor)
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert names(tmp_path / "checkpoints") == ["step-00000010"]
    assert_equal(before, MsGFMForPreTraining.from_pretrained(tmp_path).state_dict())
    Run(seed=5).load(tmp_path)


def test_a_folder_that_cannot_be_made_is_the_same_error(tmp_path, run):
    (tmp_path / "checkpoints").write_text("a file, where the folder should be")
    with pytest.raises(CheckpointError, match="`output_dir` must be writable, got .*: .*(exists|directory)"):
        run.save(tmp_path, 10)


# Damage


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("keep", [0, 2, 30, 0.5, -1])
def test_a_truncated_file_is_an_error_that_says_what_to_do(tmp_path, run, file, keep):
    checkpoint = run.save(tmp_path, 10)
    path = checkpoint.path / file
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    before = run.weights()
    with pytest.raises(
        CheckpointError, match="`resume` must find a whole checkpoint, got .*step-00000010.*Bring its files back"
    ):
        run.load(tmp_path)
    assert_equal(before, run.weights())


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("content", [b"\0" * 4000, b"not what it was", b"{}"])
def test_a_file_with_other_bytes_is_an_error_that_says_what_to_do(tmp_path, run, file, content):
    checkpoint = run.save(tmp_path, 10)
    (checkpoint.path / file).write_bytes(content)
    with pytest.raises(
        CheckpointError, match="`resume` must find a whole checkpoint, got .*step-00000010.*Bring its files back"
    ):
        run.load(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
def test_a_single_flipped_bit_is_found(tmp_path, run, file, place):
    """Most flips in numbers would load, and the run would go on from something it never was."""
    checkpoint = run.save(tmp_path, 10)
    stored = bytearray((checkpoint.path / file).read_bytes())
    stored[int(place * len(stored))] ^= 0x10
    (checkpoint.path / file).write_bytes(stored)
    with pytest.raises(CheckpointError, match=f"`resume` must find a whole checkpoint, got .* whose {file} cannot be"):
        run.load(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json"])
def test_a_missing_file_is_an_error_that_says_what_to_do(tmp_path, run, file):
    checkpoint = run.save(tmp_path, 10)
    (checkpoint.path / file).unlink()
    with pytest.raises(CheckpointError, match="`resume` must find a whole checkpoint"):
        run.load(tmp_path)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, run, caplog):
    run.save(tmp_path, 10, limit=3)
    before = run.weights()
    for step, file in ((20, "model.safetensors"), (30, "optimizer.pt")):
        checkpoint = run.step().save(tmp_path, step, limit=3)
        (checkpoint.path / file).write_bytes(b"damage")
    other = Run(seed=5)
    assert other.load(tmp_path)["step"] == 10
    assert_equal(before, other.weights())
    assert [record.getMessage().count("is damaged and passed over") for record in caplog.records] == [1, 1]
    assert "step-00000030" in caplog.text and "step-00000020" in caplog.text


def test_a_checkpoint_of_another_run_is_not_passed_over(tmp_path, run):
    run.save(tmp_path, 10)
    with pytest.raises(CheckpointError, match="`resume` must go on with the run that made"):
        run.load(tmp_path, {"identity": {"seed": 1}})


# Another run


def test_a_foreign_checkpoint_is_refused_by_what_differs(tmp_path, run):
    run.save(tmp_path, 10)
    other = Run(seed=5)
    before = other.weights()
    theirs = {"seed": 1, "learning_rate": 1e-4, "sources": {"rgb": {"rows": 13, "sensors": ["rgb"]}}, "max_steps": 5}
    with pytest.raises(CheckpointError) as refused:
        other.load(tmp_path, {"identity": theirs})
    said = str(refused.value)
    assert said.startswith("`resume` must go on with the run that made")
    for part in ("seed was 0, is 1", "'rows': 12", "'rows': 13", "max_steps was None, is 5", "another `--output_dir`"):
        assert part in said
    assert "learning_rate" not in said
    assert_equal(before, other.weights())


def test_an_identity_is_compared_as_json_has_it(tmp_path, run):
    made_by = {"identity": {**MADE_BY["identity"], "lr_milestones": (0.5,)}}
    state = {"step": 3, "best": None, "bad": []}
    optimizer_state = full_optimizer_state(run.model, run.optimizer)
    save_checkpoint(tmp_path, run.model, run.processor, run.weights(), optimizer_state, state, made_by, 1)
    assert run.load(tmp_path, made_by) == state


# Small files


def test_text_is_replaced_at_once(tmp_path):
    write_text(tmp_path / "run.json", "old")
    write_text(tmp_path / "run.json", "new")
    assert (tmp_path / "run.json").read_text() == "new"
    assert names(tmp_path) == ["run.json"]


@pytest.mark.parametrize("target", ["os.fsync", "os.replace", "pathlib.Path.write_text"])
def test_text_that_finds_no_room_leaves_the_old_one(tmp_path, no_room, target):
    (tmp_path / "run.json").write_text("old")
    no_room(target)
    with pytest.raises(CheckpointError, match="`output_dir` must be writable, got .*: the disk is full"):
        write_text(tmp_path / "run.json", "new")
    no_room.undo()
    assert (tmp_path / "run.json").read_text() == "old"
    assert names(tmp_path) == ["run.json"]


def test_a_state_is_readable_by_a_person(tmp_path, run):
    state = json.loads((run.save(tmp_path, 10).path / "state.json").read_text())
    assert state["step"] == 10 and state["identity"] == MADE_BY["identity"]
