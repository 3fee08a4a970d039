"""Checkpoints that are whole or absent: written to a temporary folder, flushed to the disk, and renamed."""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.modeling_msgfm import MsGFMForPreTraining

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read, or belongs to another run."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing or has other bytes than were written."""


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
        with suppress(OSError):
            why += f"; {shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there"
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


def save_model(
    folder: Path,
    model: MsGFMForPreTraining,
    processor: MsGFMImageProcessor,
    weights: dict[str, torch.Tensor] | None = None,
):
    """Save model and processor into a folder that may hold an earlier one, each file replaced at once.

    Args:
        folder: where to.
        model, processor: what to save.
        weights: the model's state dict, where several processes share it.

    Raises:
        CheckpointError: if they cannot be written.
    """
    temporary = folder / ".model.tmp"
    with checkpoint_errors(folder), _torch_errors():
        try:
            _save_into(temporary, model, processor, weights)
            # The weights last: the files before them are the same for every step of a run.
            for file in sorted(temporary.iterdir(), key=lambda file: file.suffix == ".safetensors"):
                os.replace(file, folder / file.name)
            _fsync(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _torch_errors() -> Iterator[None]:
    """Let a full disk be an OSError: torch and safetensors report it as errors of their own, torch without the word."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(str(error)) from error


def _save_into(folder: Path, model, processor, weights):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Transformers empties the dictionary it is given.
    model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
    processor.save_pretrained(folder)
    for file in folder.iterdir():
        _fsync(file)


def _checkpoint_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-" + 8 * "[0-9]"))


def find_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """The checkpoints in a run's folder, the newest first."""
    found = [Checkpoint(path, int(path.name[5:])) for path in _checkpoint_folders(run_dir / "checkpoints")]
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def set_aside_later_checkpoints(run_dir: Path, step: int):
    """Take what lies after the step that a run goes on from out of the way: it could not be read, and must neither be
    found again nor count among the checkpoints to keep."""
    for checkpoint in find_checkpoints(run_dir):
        if checkpoint.step > step:
            aside = checkpoint.path.with_name(f"{checkpoint.path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(checkpoint.path, aside)


@contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Keep a second run out of a folder; the system takes the lock back when this process ends, however it ends.

    Raises:
        CheckpointError: if another process has it.
    """
    path = run_dir / ".lock"
    with path.open("w") as file:
        try:
            # Not on Windows, where a run must take care of itself.
            import fcntl

            # Not flock, which data workers would inherit and hold for seconds after this process was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except BlockingIOError as error:
            raise CheckpointError(
                f"`output_dir` must be of one run at a time, got {str(run_dir)!r}, which another process trains in. "
                "Stop that one first."
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def run_record(folder: Path) -> dict | None:
    """`run.json` of the run that a model, or the checkpoint of one, is of; `None` where there is none."""
    run = folder.resolve().parents[1] if (folder / "state.json").is_file() else folder
    return json.loads((run / "run.json").read_text()) if (run / "run.json").is_file() else None


def planned_steps(record: dict) -> int:
    """The steps of the whole run, of `run.json`, as planned when it was last started; 0 where that does not say."""
    started = (record.get("resumed") or [record])[-1]
    return started.get("max_steps") or max(record["recipe"].get("max_steps", 0), 0)


def save_checkpoint(
    run_dir: Path,
    model: MsGFMForPreTraining,
    processor: MsGFMImageProcessor,
    weights: dict[str, torch.Tensor],
    optimizer_state: dict,
    state: dict,
    made_by: dict,
    save_total_limit: int,
) -> Checkpoint:
    """Save all that a run needs to go on, and drop the oldest checkpoints beyond the limit.

    Args:
        run_dir: the run's folder.
        model, processor: whose configurations are saved.
        weights, optimizer_state: at this step, of the whole model.
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
            _save_into(temporary, model, processor, weights)
            torch.save(optimizer_state, temporary / "optimizer.pt")
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
        raise DamagedCheckpointError(
            f"`resume` must find a whole checkpoint, got {str(path.parent)!r} whose {path.name} cannot be read "
            f"({why}). Bring its files back, or begin anew with another `--output_dir`."
        )
    return content


def _read_state(path: Path) -> dict:
    state = json.loads(path.read_text())
    if not {"step", "identity", "sha256"} <= state.keys():
        raise KeyError
    return state


def load_checkpoint(
    run_dir: Path, model: MsGFMForPreTraining, made_by: dict, step: int | None = None
) -> tuple[dict, dict] | None:
    """Put the weights of the newest whole checkpoint into a model. Damaged ones are told and passed over.

    Args:
        run_dir: the run's folder.
        model: to load into.
        made_by: of the run that is to go on.
        step: take this checkpoint and no other.

    Returns:
        its `state` and the state of its optimiser; `None` where the folder has no checkpoint.

    Raises:
        CheckpointError: if no checkpoint can be read, or another run made it; the message names what differs.
    """
    damage = None
    for checkpoint in find_checkpoints(run_dir):
        if step not in (None, checkpoint.step):
            continue
        try:
            return _load(checkpoint, model, made_by)
        except DamagedCheckpointError as error:
            damage = damage or error
            logger.warning("%s is damaged and passed over for the one before: %s", checkpoint.path, error)
    if damage is not None:
        raise damage
    return None


def _load(checkpoint: Checkpoint, model: MsGFMForPreTraining, made_by: dict) -> tuple[dict, dict]:
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
    return state, optimizer_state
