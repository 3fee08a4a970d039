"""Checkpoints that are whole or absent: written to a temporary folder, flushed to the disk, and renamed."""

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.modeling_msgfm import MsGFMForPreTraining


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read, or belongs to another run."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk."""

    path: Path
    step: int


def _fsync(path: Path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _no_room(error: OSError, path: Path) -> CheckpointError:
    why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
    return CheckpointError(
        f"`output_dir` must be writable, got {str(path)!r}: {why}. What was saved before is whole; make room and add "
        "`--resume`."
    )


def write_text(path: Path, text: str):
    """Write a file at once: it has the old text or the new, never a part.

    Raises:
        CheckpointError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text)
        _fsync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _no_room(error, path.parent) from error


def save_model(folder: Path, model: MsGFMForPreTraining, processor: MsGFMImageProcessor):
    """Save model and processor into a folder that may hold an earlier one, each file replaced at once.

    Raises:
        CheckpointError: if they cannot be written.
    """
    temporary = folder / ".model.tmp"
    try:
        _save_into(temporary, model, processor)
        # The weights last: the files before them are the same for every step of a run.
        for file in sorted(temporary.iterdir(), key=lambda file: file.suffix == ".safetensors"):
            os.replace(file, folder / file.name)
        temporary.rmdir()
        _fsync(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _no_room(error, folder) from error


def _save_into(folder: Path, model, processor):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for file in folder.iterdir():
        _fsync(file)


def newest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The whole checkpoint of the highest step in a run's folder, if any."""
    found = [
        Checkpoint(path, int(path.name.removeprefix("step-"))) for path in (run_dir / "checkpoints").glob("step-*")
    ]
    return max(found, key=lambda checkpoint: checkpoint.step, default=None)


def save_checkpoint(
    run_dir: Path,
    model: MsGFMForPreTraining,
    processor: MsGFMImageProcessor,
    optimizer: torch.optim.Optimizer,
    state: dict,
    made_by: dict,
    save_total_limit: int,
) -> Checkpoint:
    """Save all that a run needs to go on, and drop the oldest checkpoints beyond the limit.

    Args:
        run_dir: the run's folder.
        model, processor, optimizer: at this step.
        state: JSON-able, with `step`.
        made_by: what made the run; `made_by["identity"]` is compared when it goes on.
        save_total_limit: how many checkpoints stay.

    Raises:
        CheckpointError: if it cannot be written; earlier checkpoints stay.
    """
    folder = run_dir / "checkpoints"
    temporary, final = folder / ".step.tmp", folder / f"step-{state['step']:08d}"
    try:
        _save_into(temporary, model, processor)
        torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        (temporary / "state.json").write_text(json.dumps({**state, "identity": made_by["identity"]}))
        for name in ("optimizer.pt", "state.json"):
            _fsync(temporary / name)
        _fsync(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _fsync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors report a full disk as errors of their own.
        shutil.rmtree(temporary, ignore_errors=True)
        error = error if isinstance(error, OSError) else OSError(str(error))
        raise _no_room(error, run_dir) from error
    for old in sorted(folder.glob("step-*"))[:-save_total_limit]:
        shutil.rmtree(old)
    return Checkpoint(final, state["step"])


def load_checkpoint(
    checkpoint: Checkpoint,
    model: MsGFMForPreTraining,
    optimizer: torch.optim.Optimizer,
    made_by: dict,
    device: torch.device,
) -> dict:
    """Put a checkpoint's weights and optimiser state into the given ones and return its `state`.

    Raises:
        CheckpointError: if it cannot be read, or another run made it; the message names what differs.
    """
    try:
        state = json.loads((checkpoint.path / "state.json").read_text())
        weights = load_file(checkpoint.path / "model.safetensors")
        optimizer_state = torch.load(checkpoint.path / "optimizer.pt", map_location=device, weights_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, EOFError) as error:
        raise CheckpointError(
            f"`resume` must find a whole checkpoint, got {str(checkpoint.path)!r}: {error}. Remove this folder to go "
            "on from the one before."
        ) from error
    theirs, ours = state.pop("identity"), json.loads(json.dumps(made_by["identity"]))
    different = [name for name in ours if theirs.get(name) != ours[name]]
    if different:
        told = "; ".join(f"{name} was {theirs.get(name)!r}, is {ours[name]!r}" for name in different)
        raise CheckpointError(
            f"`resume` must go on with the run that made {str(checkpoint.path)!r}, got another one: {told}. "
            "Give the same recipe and data, or another `--output_dir`."
        )
    model.load_state_dict(weights)
    optimizer.load_state_dict(optimizer_state)
    return state
