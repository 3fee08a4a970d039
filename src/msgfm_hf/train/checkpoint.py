"""Checkpoints that are whole or absent: written to a temporary folder, flushed to the disk, and renamed."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


# Files whose bytes no format checks; their digests stand in state.json.
_WEIGHTY = ("model.safetensors", "optimizer.pt")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def checkpoint_errors(folder: Path) -> Iterator[None]:
    """Turn what goes wrong while writing into one clear error.

    Raises:
        CheckpointError: for any OSError inside.
    """
    try:
        yield
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise CheckpointError(
            f"`output_dir` must be writable, got {str(folder)!r}: {why}. What was saved before is whole; make room and "
            "add `--resume`."
        ) from error


def write_text(path: Path, text: str):
    """Write a file at once: it has the old text or the new, never a part.

    Raises:
        CheckpointError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with checkpoint_errors(path.parent):
        try:
            temporary.write_text(text)
            _fsync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def save_model(folder: Path, model: MsGFMForPreTraining, processor: MsGFMImageProcessor):
    """Save model and processor into a folder that may hold an earlier one, each file replaced at once.

    Raises:
        CheckpointError: if they cannot be written.
    """
    temporary = folder / ".model.tmp"
    with checkpoint_errors(folder), _torch_errors():
        try:
            _save_into(temporary, model, processor)
            # The weights last: the files before them are the same for every step of a run.
            for file in sorted(temporary.iterdir(), key=lambda file: file.suffix == ".safetensors"):
                os.replace(file, folder / file.name)
            _fsync(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _torch_errors() -> Iterator[None]:
    """Let a full disk be an OSError: torch and safetensors report a full disk as errors of their own."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(str(error)) from error


def _save_into(folder: Path, model, processor):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for file in folder.iterdir():
        _fsync(file)


def _checkpoint_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-" + 8 * "[0-9]"))


def newest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The whole checkpoint of the highest step in a run's folder, if any."""
    found = [Checkpoint(path, int(path.name[5:])) for path in _checkpoint_folders(run_dir / "checkpoints")]
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
    with checkpoint_errors(run_dir), _torch_errors():
        try:
            _save_into(temporary, model, processor)
            torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
            digests = {name: _digest(temporary / name) for name in _WEIGHTY}
            record = {**state, "identity": made_by["identity"], "sha256": digests}
            (temporary / "state.json").write_text(json.dumps(record))
            for name in ("optimizer.pt", "state.json"):
                _fsync(temporary / name)
            _fsync(temporary)
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
            _fsync(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in _checkpoint_folders(folder)[:-save_total_limit]:
            shutil.rmtree(old)
    return Checkpoint(final, state["step"])


def _read(path: Path, reader: Callable[[Path], dict], digest: str | None = None) -> dict:
    try:
        content = reader(path) if digest in (None, _digest(path)) else None
        why = "its bytes changed"
    except Exception as error:
        # A damaged file makes its library raise all sorts of things, some with advice that does not fit.
        content, why = None, type(error).__name__
    if content is None:
        raise CheckpointError(
            f"`resume` must find a whole checkpoint, got {str(path.parent)!r} whose {path.name} cannot be read "
            f"({why}). Remove this folder to go on from the one before."
        )
    return content


def _read_state(path: Path) -> dict:
    state = json.loads(path.read_text())
    return {name: state[name] for name in ("step", "best", "bad", "identity", "sha256")}


def load_checkpoint(
    checkpoint: Checkpoint, model: MsGFMForPreTraining, optimizer: torch.optim.Optimizer, made_by: dict
) -> dict:
    """Put a checkpoint's weights and optimiser state into the given ones and return its `state`.

    Raises:
        CheckpointError: if it cannot be read, or another run made it; the message names what differs.
    """
    state = _read(checkpoint.path / "state.json", _read_state)
    theirs, digests = state.pop("identity"), state.pop("sha256")
    weights = _read(checkpoint.path / "model.safetensors", load_file, digests["model.safetensors"])
    optimizer_state = _read(
        checkpoint.path / "optimizer.pt",
        lambda path: torch.load(path, map_location="cpu", weights_only=True),
        digests["optimizer.pt"],
    )
    ours = json.loads(json.dumps(made_by["identity"]))
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
