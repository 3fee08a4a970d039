"""Pretraining: `accelerate launch pretrain.py`, or `accelerate launch -m msgfm_hf.train.pretrain` from a wheel.

A run's folder holds the best model so far (loadable with `from_pretrained`), its processor, `metrics.jsonl`, pictures
and `checkpoints/`. How many batches were taken is the only state of the data, and the step that of chance: order,
crops, masks and crossings are functions of the seed and of these, and torch's generators are seeded anew at each step.
So a run that resumes goes on exactly as if it had never stopped, with another number of processes at the same sample.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import traceback
import zlib
from importlib import metadata
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from msgfm_hf import __version__
from msgfm_hf.data.batch import PreTrainingBatches, collate, count_loss_pixels
from msgfm_hf.data.majortom import MajorTomSource
from msgfm_hf.data.mixture import MixtureDataset, MixtureSampler, SourceOrder, steps_per_epoch
from msgfm_hf.data.shards import ShardSource, find_sources, shard_splits
from msgfm_hf.model.configuration_msgfm import MsGFMConfig
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.modeling_msgfm import MsGFMForPreTraining, count_parameters, routing_statistics
from msgfm_hf.model.sensors import get_sensor
from msgfm_hf.tasks.reconstruction import (
    evaluate_reconstruction,
    find_damaged,
    masked_crops,
    training_statistics,
)
from msgfm_hf.train.checkpoint import (
    CheckpointError,
    checkpoint_errors,
    find_checkpoints,
    load_checkpoint,
    only_writer,
    run_record,
    save_checkpoint,
    save_model,
    set_aside_later_checkpoints,
    write_text,
)
from msgfm_hf.train.optimisation import build_optimizer, set_learning_rate, source_weights
from msgfm_hf.train.pictures import draw_expert_load, draw_losses, draw_progress, draw_reconstruction
from msgfm_hf.train.processes import (
    clip_gradients,
    full_optimizer_state,
    full_weights,
    gathered,
    gradients_stay_local,
    load_optimizer_state,
    made_by_main,
    prepare_model,
    total,
)
from msgfm_hf.train.recipe import Recipe, add_recipe_arguments, learning_rate_factor, recipe_from_arguments

_DEFAULT_BATCH_SIZE = 16
# Steps whose median says what a usual loss is.
_USUAL_STEPS = 100
_REHEARSED_STEPS = 4
# The same Ctrl-C may reach a process twice, from the terminal and from the launcher.
_IMPATIENT_SECONDS = 2.0


def computes_in_bf16(device: torch.device) -> bool:
    """Whether bf16 is native to the machine, and so faster than float32: CUDA since Ampere, CPUs with AMX or AVX512."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def make_missing_data(recipe: Recipe):
    """Make the shards a recipe asks for, unless its folder has them; what is there is left as it is."""
    if recipe.make_data == "none":
        return
    out = Path(recipe.data[0])
    with contextlib.suppress(ValueError):
        found = {Path(folder).name for folder in find_sources(out)}
        if set(recipe.batch_sizes) <= found:
            return
    if recipe.make_data == "synthetic":
        from msgfm_hf.data.synthetic import make_synthetic_shards

        print(f"Making synthetic scenes in {out} (they are for learning the ropes, never a result).")
        # Whatever the run's seed: runs with several seeds are of the same data.
        make_synthetic_shards(out)
    else:
        from msgfm_hf.data.sample import make_sample_shards

        if "MSGFM_SAMPLE_DATA" not in os.environ:
            raise ValueError(
                f"`data` must exist or be made from MSGFM_SAMPLE_DATA, which is unset, got {recipe.data}. "
                "Set it to the folder of real samples, or give shards with `--data`."
            )
        print(f"Making shards of the real samples in {out}.")
        make_sample_shards(Path(os.environ["MSGFM_SAMPLE_DATA"]), out)


class Mixture:
    """The sources of a run: what trains, in which sub-batches and with which weights, and what validates.

    Raises:
        ValueError: for folders without a training split, two sources of one name, or sub-batches of a source that is
            not there.
    """

    def __init__(self, recipe: Recipe):
        folders: dict[str, str] = {}
        for folder in (folder for data in recipe.data for folder in find_sources(data)):
            name = Path(folder).name
            if name in folders:
                raise ValueError(
                    f"`data` must hold each source once, got {name!r} as {folders[name]} and {folder}. Leave one out."
                )
            folders[name] = folder
        shared = sorted(set(recipe.streams) & set(folders))
        if shared:
            raise ValueError(
                f"`streams` must have names of their own, got {shared[0]!r}, which is in `data` too. Rename it."
            )
        there = [*folders, *recipe.streams]
        unknown = sorted(set(recipe.batch_sizes) - set(there))
        if unknown:
            raise ValueError(
                f"`batch_sizes` must name sources of `data` ({', '.join(there)}), got {unknown[0]!r}. Correct the name."
            )
        # Folders with another split alone are there for tests.
        training = [name for name, folder in folders.items() if "train" in shard_splits(folder)]
        chosen = list(recipe.batch_sizes or [*training, *recipe.streams])
        if not chosen:
            raise ValueError(
                f"`data` must hold a training split, got {', '.join(folders)} without one. Look with `msgfm inspect`."
            )
        shards = [ShardSource(folders[name], "train") for name in chosen if name in folders]
        for source in shards:
            if source.name != Path(source.path).name:
                raise ValueError(
                    f"`data` must hold sources in folders of their own name, got {source.name!r} in {source.path}. "
                    "Rename the folder."
                )
        self.shards = _with_sensors(shards, recipe.sensors)
        self.streams = [_stream(name, recipe.streams[name], recipe.seed) for name in chosen if name in recipe.streams]
        self.sources = [*self.shards, *self.streams]
        self.batch_sizes = [recipe.batch_sizes.get(source.name, _DEFAULT_BATCH_SIZE) for source in self.sources]
        self.weights = source_weights(self.batch_sizes, [source.sensors for source in self.sources])
        self.validation = [
            ShardSource(source.path, "val", source.sensors)
            for source in self.shards
            if "val" in shard_splits(source.path)
        ]

    @property
    def sensors(self) -> list[str]:
        return sorted({sensor for source in self.sources for sensor in source.sensors})

    def fingerprint(self) -> dict:
        """What a resumed run must find again."""
        own = {
            # How rows are grouped decides the order in which they come.
            source.name: {"row_groups": zlib.crc32(repr([rows for _, _, _, rows in source.row_groups]).encode())}
            for source in self.shards
        }
        own |= {stream.name: stream.fingerprint() for stream in self.streams}
        return {
            source.name: {
                "rows": len(source),
                "bands": source.bands,
                "units": source.units,
                "dtypes": source.dtypes,
                "levels": source.levels,
                **own[source.name],
            }
            for source in self.sources
        }

    def orders(self, seed: int) -> list:
        """What `MixtureDataset` wants beside the sources."""
        orders = [SourceOrder(source.row_groups, source.name, seed) for source in self.shards]
        return [*orders, *(stream.order() for stream in self.streams)]


def _stream(name: str, options: dict, seed: int) -> MajorTomSource:
    known = [
        option for option in inspect.signature(MajorTomSource).parameters if option not in ("split", "name", "seed")
    ]
    missing = sorted({"paths", "num_rows"} - set(options))
    unknown = sorted(set(options) - set(known))
    if missing or unknown:
        raise ValueError(
            f"`streams` must give {name!r} `paths` and `num_rows`, and may give {', '.join(known[2:])}, got "
            f"{', '.join(options) or 'nothing'}. Correct the recipe."
        )
    return MajorTomSource(**options, name=name, seed=seed)


def _with_sensors(sources: list[ShardSource], sensors: list[str]) -> list[ShardSource]:
    """The sources with those of their sensors that are asked for; sources without any are left out."""
    there = sorted({sensor for source in sources for sensor in source.sensors})
    unknown = sorted(set(sensors) - set(there))
    if unknown:
        raise ValueError(
            f"`sensors` must be among those of the sources ({', '.join(there)}), got {unknown[0]!r}. Correct the name."
        )
    kept = [(source, [name for name in source.sensors if not sensors or name in sensors]) for source in sources]
    return [ShardSource(source.path, source.split, names) for source, names in kept if names]


def _leave_signals_to_the_run(worker: int):
    """In a process that reads data: a launcher signals the whole group, and without these the run could not save. A
    group of its own is out of that reach, and still ends when its run ends it."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def _describe_start(checkpoint: str) -> dict:
    """Which weights a run starts from, and where these are from if they were converted."""
    folder = Path(checkpoint)
    report = folder / "conversion_report.json"
    made_by = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    digest = hashlib.sha256()
    files = sorted(folder.glob("model*.safetensors"))
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return {
        "checkpoint": checkpoint,
        "sha256": digest.hexdigest() if files else None,
        "layout": made_by.get("layout"),
        "files": [file["name"] for file in made_by.get("files", ())],
    }


def _start_from(checkpoint: str, model: MsGFMForPreTraining) -> str:
    """Give a model the encoder of a checkpoint, and what that has for the model's sensors; returns what was taken.

    Raises:
        ValueError: if the model has another encoder, or others of the same sensors.
    """
    verbosity = transformers_logging.get_verbosity()
    # What it lacks is said below, once.
    transformers_logging.set_verbosity_error()
    try:
        start, info = MsGFMForPreTraining.from_pretrained(checkpoint, output_loading_info=True)
    finally:
        transformers_logging.set_verbosity(verbosity)
    given = {name: tensor for name, tensor in start.state_dict().items() if name not in info["missing_keys"]}
    own = model.state_dict()
    taken = {name: tensor for name, tensor in given.items() if name in own and own[name].shape == tensor.shape}
    lacking = [name for name in own if name not in taken]
    strange = [name for name in lacking if name in given or name.startswith(("msgfm.encoder.", "msgfm.layernorm."))]
    if strange:
        raise ValueError(
            f"`model` must keep the architecture of `init_from`, got another for {checkpoint!r}: {len(strange)} "
            f"tensors differ, such as {strange[0]}. Leave these fields out of `model`."
        )
    model.load_state_dict(taken, strict=False)

    def of(part: str, names) -> set[str]:
        return {name.removeprefix(part).split(".")[0] for name in names if name.startswith(part)}

    told = [f"Starts from {checkpoint}: its encoder"]
    for what, part in (("embeddings", "msgfm.embeddings.patch_embeddings."), ("decoders", "decoders.")):
        told.append(f"{what} of {', '.join(sorted(of(part, taken))) or 'none'}")
    fresh = [
        f"{what} of {', '.join(sorted(of(part, lacking)))}"
        for what, part in (("embeddings", "msgfm.embeddings.patch_embeddings."), ("decoders", "decoders."))
        if of(part, lacking)
    ]
    return "; ".join([*told, *([f"fresh: {', '.join(fresh)}"] if fresh else [])])


class Interrupt:
    """Ctrl-C and SIGTERM ask the run to save and stop; another Ctrl-C, two seconds later or more, stops at once.

    A scheduler and a launcher may each send SIGTERM, so it may come any number of times. A context manager.
    """

    def __enter__(self) -> "Interrupt":
        self.asked = False
        self._first = 0.0
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if not self.asked:
            self.asked, self._first = True, time.monotonic()
            print("\nSaving a checkpoint, then stopping (Ctrl-C once more to stop at once).", file=sys.stderr)
        elif number == signal.SIGINT and time.monotonic() - self._first >= _IMPATIENT_SECONDS:
            raise KeyboardInterrupt


def pretrain(recipe: Recipe, resume: bool = False) -> dict:
    """Run a recipe.

    Args:
        recipe: what to do.
        resume: whether to go on from the newest checkpoint of the run's folder, where there is one.

    Returns:
        {"run_dir", "step", "finished", "reconstruction": the rows of `evaluate_reconstruction`}.

    Raises:
        ValueError: for data, options or a folder that do not fit; the folder is left as it was.
        CheckpointError: if a checkpoint cannot be written or read, or belongs to another run.
        RuntimeError: if the loss or its gradient is not finite, or too many damaged rows are met.
    """
    run = _Run(recipe)
    run.check_folder(resume)
    run.prepare(resume)
    return run.run()


def dry_run(recipe: Recipe) -> str:
    """What a run would be: its mixture, length, parameters, memory and hours, from steps on its data and this device.

    Nothing is written but the shards that a recipe makes itself.

    Args:
        recipe: what to do.

    Returns:
        the text.

    Raises:
        ValueError, RuntimeError: as `pretrain`.
    """
    run = _Run(recipe)
    run.prepare(resume=False)
    return run.rehearse()


class _Run:
    """One run: what it was set up with, and how far it has come (`step`, `turn`, `best`, `bad`, `skipped`).

    A turn is one batch of one process, so a step has `turns_per_step` of them.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.run_dir = recipe, recipe.run_dir
        # Accelerate would go on without those that are not there.
        there = [tracker.value for tracker in get_available_trackers()]
        if not set(recipe.report_to) <= set(there):
            raise ValueError(
                f"`report_to` must name trackers that are installed ({', '.join(there)}), got {recipe.report_to}. "
                "Install the others, or leave them out."
            )
        self.accelerator = Accelerator(
            mixed_precision=_precision(recipe), log_with=recipe.report_to or None, project_dir=str(self.run_dir)
        )

    def prepare(self, resume: bool):
        """Data, model and optimiser, fresh or from the newest checkpoint."""
        recipe = self.recipe
        if self.accelerator.is_main_process:
            make_missing_data(recipe)
        self.accelerator.wait_for_everyone()

        self.mixture = mixture = Mixture(recipe)
        world = self.accelerator.num_processes
        self.turns_per_step = world * recipe.gradient_accumulation_steps
        self.epoch = self._epoch(self.turns_per_step)
        set_seed(recipe.seed)
        start_config, start = self._find_start(resume)
        specs = {} if start_config is None else start_config.sensors
        specs = {sensor: specs.get(sensor) or get_sensor(sensor).to_dict() for sensor in mixture.sensors}
        first = "rgb" if "rgb" in mixture.sensors else mixture.sensors[0]
        bands = [band["name"] for band in specs[first]["bands"]]
        self.config = recipe.model_config(specs, {first: bands}, start_config)
        self.processor = MsGFMImageProcessor.from_config(self.config)
        self.model = MsGFMForPreTraining(self.config)
        if recipe.gradient_checkpointing:
            self.model.activation_checkpointing_enable()
        self.made_by = _made_by(recipe, mixture, world, self.accelerator.mixed_precision, start)

        # `planned` is what the schedule of the learning rate means by a step, whatever the number of processes now.
        self.planned = self._plan(self.turns_per_step)
        self.step, self.turn, self.best, self.bad, self.skipped = 0, 0, None, [], 0
        self.losses: list[float] = []
        self.first_crops = None
        loaded = self._load() if resume else None
        if loaded is None and recipe.init_from:
            told = _start_from(recipe.init_from, self.model)
            if self.accelerator.is_main_process:
                print(told)
        if loaded is not None:
            places = loaded[0].pop("streams")
            for stream in mixture.streams:
                stream.load_state_dict(places[stream.name])
            for name, value in loaded[0].items():
                setattr(self, name, value)
            self._plan_again()
        left = math.ceil(max(self.planned["turns"] - self.turn, 0) / self.turns_per_step)
        self.max_steps = self.step + left
        identity = zlib.crc32(json.dumps(self.made_by["identity"], sort_keys=True).encode())
        if len(set(gathered(self.accelerator, [(self.step, self.turn, identity)]))) > 1:
            raise ValueError(
                f"`output_dir`, `data` and the recipe must be the same for all processes, got {str(self.run_dir)!r} at "
                f"step {self.step} and others elsewhere. Let all nodes see the same folders and files."
            )
        self.prepared = prepare_model(self.accelerator, self.model, recipe.fsdp)
        self.optimizer = build_optimizer(
            self.model, recipe, [source.sensors for source in mixture.sources], mixture.weights
        )
        if loaded is not None:
            load_optimizer_state(self.model, self.optimizer, loaded[1])
        self.statistics = made_by_main(self.accelerator, self._training_statistics)
        self.model.train()
        self._restart_clock()
        self.progress = tqdm(
            total=self.max_steps,
            initial=self.step,
            disable=not self.accelerator.is_main_process,
            desc=recipe.name,
            unit="step",
            # Every state of the bar stays in a log file.
            mininterval=0.1 if sys.stderr.isatty() else 10,
        )
        # All processes evaluate the same rows, in the same number of steps.
        self.sound_rows = self._sound_rows(recipe.eval_max_crops)

    def _epoch(self, turns_per_step: int) -> int:
        rows = [len(source) for source in self.mixture.sources]
        return steps_per_epoch(rows, self.mixture.batch_sizes, turns_per_step)

    def _plan(self, turns_per_step: int) -> dict:
        """How long the run is to be: in steps as it began, and in turns, which do not depend on the processes."""
        asked = {name: getattr(self.recipe, name) for name in ("max_steps", "num_train_epochs")}
        steps = asked["max_steps"]
        if steps <= 0:
            steps = max(1, round(asked["num_train_epochs"] * self._epoch(turns_per_step)))
        return {"asked": asked, "steps": steps, "turns": steps * turns_per_step}

    def _plan_again(self):
        """Keep to the plan of the run that goes on, or make one that is over longer."""
        was, now = self.planned, self._plan(self.planned["turns"] // self.planned["steps"])
        if was["asked"] == now["asked"]:
            return
        if self.turn < was["turns"] or now["turns"] <= was["turns"]:
            told = "; ".join(f"{name} was {was['asked'][name]}, is {now['asked'][name]}" for name in now["asked"])
            raise CheckpointError(
                f"`resume` must go on with the run in {str(self.run_dir)!r} to its end, step {was['steps']}, got "
                f"another length: {told}. Give the same; a run that is over can be made longer."
            )
        self.planned = now
        if self.accelerator.is_main_process:
            told = f"This run was of {was['steps']} steps and is of {now['steps']} now"
            print(f"{told}: the learning rate follows the new length.")

    def _find_start(self, resume: bool) -> tuple[MsGFMConfig | None, dict | None]:
        """The configuration of what the run starts from, and which weights those are. A run that goes on needs neither
        any more: its checkpoints tell."""
        recipe = self.recipe
        if not recipe.init_from:
            return None, None
        record = run_record(self.run_dir) if resume else None
        checkpoints = find_checkpoints(self.run_dir) if record and record.get("start") else []
        if checkpoints and not Path(recipe.init_from).exists():
            return MsGFMConfig.from_pretrained(checkpoints[0].path), record["start"]
        return recipe.start_config(), _describe_start(recipe.init_from)

    def _load(self) -> tuple[dict, dict] | None:
        """The newest whole checkpoint, as the main process finds it: what one process cannot read, none may use."""
        if self.accelerator.is_main_process:
            loaded = load_checkpoint(self.run_dir, self.model, self.made_by)
        step = made_by_main(self.accelerator, lambda: None if loaded is None else loaded[0]["step"])
        if not self.accelerator.is_main_process:
            loaded = None if step is None else load_checkpoint(self.run_dir, self.model, self.made_by, step)
        return loaded

    def _training_statistics(self) -> dict:
        """What validation is compared with."""
        validated = {source.name for source in self.mixture.validation}
        return {
            source.name: training_statistics(source, self.processor, self.config.image_size)
            for source in self.mixture.sources
            if source.name in validated
        }

    def check_folder(self, resume: bool):
        """Refuse a folder that something else is in, or a run that is not to go on."""
        files = {path.name for path in self.run_dir.iterdir()} if self.run_dir.is_dir() else set()
        if "run.json" not in files and "model.safetensors" in files:
            raise ValueError(
                f"`output_dir` must be new, got {str(self.run_dir)!r} with a model that is not of a run. "
                "Choose another `--output_dir`."
            )
        if "run.json" in files and not resume:
            step = max((checkpoint.step for checkpoint in find_checkpoints(self.run_dir)), default=0)
            raise ValueError(
                f"`output_dir` must be new, got {str(self.run_dir)!r} with a run at step {step}. "
                "Add `--resume` to go on with it, or choose another `--output_dir`."
            )

    def run(self) -> dict:
        with contextlib.ExitStack() as held:
            if self.accelerator.is_main_process:
                held.enter_context(self._open_folder())
            self.accelerator.wait_for_everyone()
            return self._run()

    def _run(self) -> dict:
        with Interrupt() as interrupt:
            self._train(interrupt)
        self.progress.close()
        # The others need not wait for pictures and the last evaluation: nothing is shared any more.
        self.accelerator.end_training()
        rows = self._finish() if self.accelerator.is_main_process else []
        return {"run_dir": self.run_dir, "step": self.step, "finished": self.finished, "reconstruction": rows}

    def rehearse(self) -> str:
        """A few steps, and what they say of the whole."""
        batches, loader, times = self._batches(), iter(self._loader()), []
        # What the workers fetch ahead would look faster than it is.
        ahead = math.ceil(2 * self.recipe.dataloader_num_workers / self.recipe.gradient_accumulation_steps)
        for _ in range(min(_REHEARSED_STEPS + ahead, self.max_steps)):
            before = time.perf_counter()
            step_batches = self._next_batches(loader)
            counts, inputs = self._agree(step_batches, batches)
            self.step, self.turn = self.step + 1, self.turn + self.turns_per_step
            # The loss's value is read inside, so a step is over when this returns.
            self._optimise(step_batches, inputs, counts)
            times.append(time.perf_counter() - before)
        self.progress.close()
        timed = times[1 + ahead :] or times
        seconds, world = statistics.median(timed), self.accelerator.num_processes
        device = self.accelerator.device
        lines = [f"{self.recipe.name}, a rehearsal of {len(times)} steps; nothing was trained or saved.", ""]
        lines.append(f"{'source':<16} {'sensors':<12} {'rows':>10} {'per batch':>10} {'per step':>10} {'passes':>8}")
        for source, size in zip(self.mixture.sources, self.mixture.batch_sizes, strict=True):
            step = size * self.turns_per_step
            passes = self.max_steps * step / len(source)
            names = "+".join(source.sensors)
            lines.append(f"{source.name:<16} {names:<12} {len(source):>10,} {size:>10} {step:>10} {passes:>8.1f}")
        images = sum(
            size * len(source.sensors) * self.turns_per_step
            for source, size in zip(self.mixture.sources, self.mixture.batch_sizes, strict=True)
        )
        counts = count_parameters(self.model)
        # Four bytes each: weights, gradients, and AdamW's two moments.
        states = 16 * counts.total / 2**30
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 2**30
        else:
            # Not on Windows. Kilobytes on Linux, bytes on macOS.
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        where = "on the device" if device.type == "cuda" else "in this process, libraries included"
        hours = seconds * self.max_steps / 3600
        lines += [
            "",
            f"steps        {self.max_steps:,}, {self.epoch:,} per pass over the longest source; one batch per "
            f"{self._batch_name().removeprefix('batch, ')}",
            f"images       {images:,} per step (every sensor counts), {images * self.max_steps:,} in all",
            f"parameters   {counts.total:,}",
            f"memory       {states:.2f} GiB for weights, gradients and AdamW's moments"
            f"{f', shared by {world} processes' if self.recipe.fsdp else ''}; "
            f"{peak:.2f} GiB at most {where}",
            f"one step     {seconds:.3g} s, {images / seconds:.3g} images/s (median of {len(timed)}, the "
            f"first {len(times) - len(timed)} left out; {device.type}, {self._precision_name})",
            f"whole run    {hours:.3g} h, {hours * world:.3g} device-hours on {world} x {device.type}; validation, "
            "checkpoints and pictures come on top",
        ]
        return "\n".join(lines)

    @property
    def _precision_name(self) -> str:
        return "float32" if self.accelerator.mixed_precision == "no" else self.accelerator.mixed_precision

    @property
    def finished(self) -> bool:
        return self.step >= self.max_steps

    def _open_folder(self) -> contextlib.AbstractContextManager:
        """Make the folder ready to go on from this step; what is returned keeps other runs out until it is left."""
        with contextlib.ExitStack() as held, checkpoint_errors(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(only_writer(self.run_dir))
            set_aside_later_checkpoints(self.run_dir, self.step)
            self._write_record()
            if not self.finished:
                # Of a run that was over before it was made longer.
                (self.run_dir / "validation.json").unlink(missing_ok=True)
            for path in (self.run_dir / "metrics.jsonl", *(self.run_dir / "samples").glob("*.jsonl")):
                _cut_lines(path, self.step)
            if self.recipe.report_to:
                self.accelerator.init_trackers(
                    "logs",
                    config={name: str(value) for name, value in self.made_by["recipe"].items()},
                    # What a killed run told after its last checkpoint does not stay.
                    init_kwargs={"tensorboard": {"purge_step": self.step + 1}},
                )
            kept = held.pop_all()
        self._say_what_begins()
        return kept

    def _say_what_begins(self):
        sensor = next(iter(self.config.inputs))
        counts = count_parameters(self.model, inputs=[sensor], targets=[sensor])
        parts = [f"{s.name} {size}" for s, size in zip(self.mixture.sources, self.mixture.batch_sizes, strict=True)]
        print(
            f"{self.recipe.name}: {', '.join(parts)} per {self._batch_name()}, {self.epoch} steps per epoch, "
            f"{self.max_steps} steps in all; {counts.total:,} parameters, {counts.active:,} of them for {sensor} -> "
            f"{sensor}; {self.accelerator.device.type}, {self._precision_name}; "
            f"learning rate {self.recipe.learning_rate:g}, {self.recipe.lr_scheduler_type}."
        )

    def _batch_name(self) -> str:
        world, micro = self.accelerator.num_processes, self.recipe.gradient_accumulation_steps
        shares = [f"{world} processes"] * (world > 1) + [f"{micro} batches each"] * (micro > 1)
        return f"batch, {' and '.join(shares)} per step" if shares else "step"

    def _write_record(self):
        """`run.json`: what made the run, and under `resumed` what went on with it from which step."""
        record, path = self.made_by | {"max_steps": self.max_steps}, self.run_dir / "run.json"
        if self.step and path.is_file():
            record = json.loads(path.read_text())
            if self.finished:
                return
            for name, result in (
                ("threads", "sums round differently, so it goes on exactly only up to their last digits"),
                ("world_size", f"it goes on at the same samples, {self.max_steps - self.step} steps are left"),
            ):
                if record[name] != self.made_by[name]:
                    print(f"`{name}` of this run was {record[name]} and is {self.made_by[name]} now: {result}.")
            again = {
                name: self.made_by[name]
                for name in ("versions", "commit", "command", "threads", "device", "world_size")
            }
            fields = self.made_by["recipe"]
            again["recipe"] = {name: fields[name] for name in fields if fields[name] != record["recipe"].get(name)}
            leg = {"step": self.step, "max_steps": self.max_steps, **again}
            record["resumed"] = [*record.get("resumed", []), leg]
        write_text(path, json.dumps(record, indent=2))

    def _loader(self) -> DataLoader:
        recipe, mixture = self.recipe, self.mixture
        return DataLoader(
            MixtureDataset(
                mixture.sources, mixture.orders(recipe.seed), self.config.image_size, recipe.seed, recipe.max_bad
            ),
            batch_sampler=MixtureSampler(
                mixture.batch_sizes,
                self.turn + (self.max_steps - self.step) * self.turns_per_step,
                self.turn,
                self.accelerator.process_index,
                self.accelerator.num_processes,
            ),
            num_workers=recipe.dataloader_num_workers,
            worker_init_fn=_leave_signals_to_the_run,
            collate_fn=collate,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _batches(self) -> PreTrainingBatches:
        recipe = self.recipe
        return PreTrainingBatches(
            self.mixture.sources,
            self.processor,
            self.config,
            recipe.seed,
            recipe.mask_ratio,
            recipe.cross_sensor_ratio,
            recipe.cross_loss_region,
            self.mixture.weights,
        )

    def _train(self, interrupt: Interrupt):
        recipe, batches = self.recipe, self._batches()
        loader = iter(self._loader())
        while self.step < self.max_steps:
            step_batches = self._next_batches(loader)
            counts, inputs = self._agree(step_batches, batches)
            self.step += 1
            self.turn += self.turns_per_step
            last = self.step == self.max_steps
            logging_now = self.step % recipe.logging_steps == 0 or last
            done = self._optimise(step_batches, inputs, counts, logging_now)
            stop = self._any(interrupt.asked)
            self.images += sum(
                len(part["keys"]) * len(part["images"]) for batch in step_batches for part in batch["sources"]
            )
            if recipe.log_samples:
                self._log_samples(step_batches)
            if logging_now and done is not None:
                self._log(done, inputs[-1])
            self.progress.update(1)
            if self.mixture.validation and (last or (self.step % recipe.eval_steps == 0 and not stop)):
                self._validate()
            if self.step % recipe.save_steps == 0 or last or stop:
                self._save()
            if stop:
                break

    def _next_batches(self, loader) -> list[dict]:
        """The batches of this process's next step, with the time spent waiting for them."""
        before = time.perf_counter()
        found = [next(loader) for _ in range(self.recipe.gradient_accumulation_steps)]
        self.waited += time.perf_counter() - before
        return found

    def _any(self, asked: bool) -> bool:
        """Whether any process was asked: a signal may reach one alone."""
        return total(self.accelerator, torch.tensor(float(asked))).item() > 0

    def _agree(self, step_batches: list[dict], batches: PreTrainingBatches):
        """What all processes must do alike: give up on damage or not, and divide each slice's loss by.

        Returns:
            per slice the mean count of pixels over all batches of the step (`None` for a single batch, which counts
            its own), and the arguments of the model for each batch of this process.
        """
        damage = [found for batch in step_batches for found in batch["bad"]]
        lost = any(not batch["sources"] for batch in step_batches)
        device = self.accelerator.device
        inputs = [] if lost else [batches(batch, self.step, device) for batch in step_batches]
        flags = torch.tensor([lost, len(damage)], dtype=torch.float64)
        slices = sum(len(source.sensors) for source in self.mixture.sources)
        counts = torch.zeros(slices, dtype=torch.float64)
        if self.turns_per_step > 1:
            for given in inputs:
                counts += count_loss_pixels(given, self.config.patch_size)
            flags, counts = total(self.accelerator, torch.cat([flags, counts])).split([2, slices])
        lost, damaged = flags.tolist()
        if damaged:
            self._note_damage(gathered(self.accelerator, damage), bool(lost))
        counts = iter((counts / self.turns_per_step).to(device, torch.float32))
        # Sources come in their order and sensors by name, as `count_loss_pixels` has them.
        nested = [{sensor: next(counts) for sensor in source.sensors} for source in self.mixture.sources]
        return nested if self.turns_per_step > 1 else None, inputs

    def _optimise(self, step_batches: list[dict], inputs: list[dict], counts, output_router_logits: bool = False):
        """One step of the optimiser; chance is a function of the seed, the step, the rank and the batch.

        Returns:
            the outputs of each batch, the norm of the gradient and the learning rate; `None` for a step left out.
        """
        recipe, rank, world = self.recipe, self.accelerator.process_index, self.accelerator.num_processes
        reached = (self.turn - self.turns_per_step) * self.planned["steps"] / self.planned["turns"]
        learning_rate = recipe.learning_rate * learning_rate_factor(recipe, reached, self.planned["steps"])
        set_learning_rate(self.optimizer, learning_rate)
        all_outputs = []
        for number, given in enumerate(inputs):
            turn = number * world + rank
            torch.manual_seed((recipe.seed * 1_000_003 + self.step) * self.turns_per_step + turn)
            with gradients_stay_local(self.accelerator, self.prepared, number < len(inputs) - 1):
                with self.accelerator.autocast():
                    outputs = self.prepared(**given, num_loss_pixels=counts, output_router_logits=output_router_logits)
                (outputs.loss / len(inputs)).backward()
            all_outputs.append(outputs)
        gradient_norm = clip_gradients(self.model, recipe.max_grad_norm)
        loss = torch.stack([outputs.loss.detach() for outputs in all_outputs]).cpu().double().sum()
        loss = total(self.accelerator, loss).item() / self.turns_per_step
        reason = self._unusual(loss, gradient_norm)
        if reason is not None:
            self._leave_out(reason, step_batches)
            return None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return all_outputs, loss, gradient_norm, learning_rate

    def _unusual(self, loss: float, gradient_norm: float) -> str | None:
        """Why a step must not be taken, if so."""
        for name, value in (("loss", loss), ("grad_norm", gradient_norm)):
            if not math.isfinite(value):
                return f"`{name}` must be finite, got {value}"
        if self.recipe.max_loss_ratio:
            usual = statistics.median(self.losses) if len(self.losses) == _USUAL_STEPS else math.inf
            if loss > self.recipe.max_loss_ratio * usual:
                return (
                    f"`loss` must be within `max_loss_ratio` ({self.recipe.max_loss_ratio:g}) times the median of the "
                    f"last {_USUAL_STEPS} steps, {usual:.4g}, got {loss:.4g}"
                )
            self.losses = [*self.losses, loss][-_USUAL_STEPS:]
        return None

    def _leave_out(self, reason: str, step_batches: list[dict]):
        """Log a step whose gradients are not to be used, with the keys of its rows; stop if the recipe says so."""
        keys = [key for batch in step_batches for part in batch["sources"] for key in part["keys"]]
        keys = gathered(self.accelerator, keys)
        self.skipped += 1
        stop = self.recipe.on_bad_loss == "stop" or self.skipped > self.recipe.max_skipped_steps
        if self.accelerator.is_main_process:
            event = "stopped" if stop else "skipped"
            self._append({"step": self.step, "event": event, "reason": reason, "keys": keys})
        if stop:
            raise RuntimeError(
                f"{reason} at step {self.step}. Look at the rows of this step ({', '.join(keys[:8])}, ..., all of them "
                "in metrics.jsonl), lower `learning_rate`, or go on with `--resume --on_bad_loss skip`; the last "
                "checkpoint is whole."
            )
        self._say(f"Step {self.step} left out ({self.skipped} so far): {reason}.")
        self.optimizer.zero_grad(set_to_none=True)

    def _say(self, text: str):
        if self.accelerator.is_main_process:
            self.progress.write(text)

    def _tell_damage(self, damage: list[tuple[str, str]]):
        """List each damaged row once."""
        for where, reason in damage:
            if where not in (known for known, _ in self.bad):
                self._say(f"Damaged row {where} left out: {reason}")
                self.bad.append((where, reason))

    def _note_damage(self, damage: list[tuple[str, str]], lost: bool = False):
        """List damaged rows; stop at too many, or where no row could be read in their place."""
        self._tell_damage(damage)
        if len(self.bad) > self.recipe.max_bad or lost:
            where, reason = self.bad[-1]
            raise RuntimeError(
                f"`max_bad` allows {self.recipe.max_bad} damaged rows, got {len(self.bad)}; the last is {where}: "
                f"{reason} Make these shards again, or raise `max_bad`."
            )

    def _restart_clock(self):
        self.clock, self.images, self.waited = time.perf_counter(), 0, 0.0

    def _append(self, line: dict):
        with checkpoint_errors(self.run_dir):
            _append(self.run_dir / "metrics.jsonl", line)

    def _log(self, done: tuple, inputs: dict):
        """A line of metrics.jsonl, the means over all batches of the step; routing is that of the last ones."""
        all_outputs, loss, gradient_norm, learning_rate = done
        each = [_losses_by_direction(outputs, inputs, self.mixture) for outputs in all_outputs]
        aux_losses = [outputs.aux_loss.item() for outputs in all_outputs if outputs.aux_loss is not None]
        elapsed = time.perf_counter() - self.clock
        line = {
            "losses": {name: sum(losses[name] for losses in each) / len(each) for name in each[0]},
            "aux_loss": sum(aux_losses) / len(aux_losses) if aux_losses else None,
            "routing": routing_statistics(all_outputs[-1], self.config),
            "images_per_second": self.images / elapsed,
            "input_wait": self.waited / elapsed,
        }
        line = _mean_over_processes(self.accelerator, line)
        line["images_per_second"] *= self.accelerator.num_processes
        line["routing"] = tree_map(lambda number: round(number, 4), line["routing"])
        if self.accelerator.is_main_process:
            head = {"step": self.step, "turn": self.turn, "loss": loss}
            rates = {"learning_rate": learning_rate, "grad_norm": gradient_norm}
            self._append({**head, **rates, **line, "bad": len(self.bad), "skipped": self.skipped})
            if self.recipe.report_to:
                self.accelerator.log(_scalars({**head, **rates, **line}), step=self.step)
            shown = {name: f"{value:.3f}" for name, value in _by_way(line["losses"]).items()}
            self.progress.set_postfix(shown, refresh=False)
        self._restart_clock()

    def _log_samples(self, step_batches: list[dict]):
        """What this process's step was made of, for those who must know which row was seen when."""
        folder = self.run_dir / "samples"
        with checkpoint_errors(self.run_dir):
            folder.mkdir(exist_ok=True)
            for batch in step_batches:
                keys = {self.mixture.sources[part["index"]].name: part["keys"] for part in batch["sources"]}
                line = {"step": self.step, "keys": keys}
                _append(folder / f"rank-{self.accelerator.process_index:05d}.jsonl", line)

    def _sound_rows(self, max_crops: int | None, alone: bool = False) -> dict[str, list[int]]:
        """The rows of the validation without those that this process, or without `alone` any, cannot read."""
        damage = [
            (source.name, row, reason)
            for source in self.mixture.validation
            for row, reason in find_damaged(source, self.config.image_size, max_crops).items()
        ]
        damage = damage if alone else gathered(self.accelerator, damage)
        named = [(f"{name} val[{row}]", reason) for name, row, reason in damage]
        if alone:
            self._tell_damage(named)
        else:
            self._note_damage(named)
        gone = {(name, row) for name, row, _ in damage}
        return {
            source.name: [row for row in range(len(source)) if (source.name, row) not in gone]
            for source in self.mixture.validation
            if any(name == source.name for name, _ in gone)
        }

    def _evaluate(self, model: MsGFMForPreTraining, max_crops: int | None) -> list[dict]:
        return evaluate_reconstruction(
            model,
            self.processor,
            self.mixture.validation,
            self.statistics,
            self.recipe.mask_ratio,
            self.recipe.seed,
            max_crops,
            with_baselines=False,
            autocast=self.accelerator.autocast,
            rows=self.sound_rows,
        )

    def _validate(self):
        """Evaluate, and keep the model if it is the best so far."""
        rows = self._evaluate(self.model, self.recipe.eval_max_crops)
        ratios = [ratio for ratio in map(_ratio, rows) if ratio is not None]
        # Where nothing can be compared, the newest model is the best.
        score = sum(ratios) / len(ratios) if ratios else -self.step
        # Every process has the same rows up to the rounding of its device: their mean is one score for all.
        score = (
            total(self.accelerator, torch.tensor(score, dtype=torch.float64)).item() / self.accelerator.num_processes
        )
        better = self.best is None or score < self.best["score"] or not math.isfinite(self.best["score"])
        # Where nothing can be compared any more, what was compared stays.
        better = better and (bool(ratios) or self.best is None or self.best["score"] < 0)
        if better:
            self.best = {"score": score, "step": self.step}
            weights = full_weights(self.model)
        if self.accelerator.is_main_process:
            summary = {_way(row): {"l1": row["l1"], "ratio_to_band_mean": _ratio(row)} for row in rows}
            self._append({"step": self.step, "validation": summary, "score": score})
            if self.recipe.report_to:
                self.accelerator.log(_scalars({"validation": summary, "score": score}), step=self.step)
            if better:
                save_model(self.run_dir, self.model, self.processor, weights)
        self._draw_progress()
        self._restart_clock()

    def _draw_progress(self):
        """The same crops at every evaluation; `msgfm report` shows them side by side."""
        if self.first_crops is None:
            self.first_crops = self._masked_crops(self.model, 1)
        sources = [source for source in self.mixture.validation if self.first_crops[source.name]]
        if not sources:
            return
        path = None
        if self.accelerator.is_main_process:
            path = self.run_dir / "reconstructions" / f"step-{self.step:08d}.png"
        with checkpoint_errors(self.run_dir), self.accelerator.autocast():
            if path is not None:
                path.parent.mkdir(exist_ok=True)
            draw_progress(
                self.model,
                self.processor,
                sources,
                self.first_crops,
                self.recipe.cross_loss_region,
                f"{self.recipe.name}, step {self.step}. Grey: hidden, invalid or not trained.",
                path,
            )
        self.model.train()

    def _masked_crops(self, model: MsGFMForPreTraining, max_crops: int) -> dict[str, list]:
        recipe = self.recipe
        return {
            source.name: list(
                masked_crops(
                    source,
                    self.processor,
                    model,
                    recipe.mask_ratio,
                    recipe.seed,
                    max_crops,
                    16,
                    self.sound_rows.get(source.name),
                )
            )
            for source in self.mixture.validation
        }

    def _save(self):
        weights, optimizer_state = full_weights(self.model), full_optimizer_state(self.model, self.optimizer)
        if self.accelerator.is_main_process:
            state = {name: getattr(self, name) for name in _STATE}
            # The main process reads the lowest positions, so its place serves all.
            state["streams"] = {stream.name: stream.state_dict() for stream in self.mixture.streams}
            # Without an evaluation so far, the newest model is the best.
            if self.best is None:
                save_model(self.run_dir, self.model, self.processor, weights)
            save_checkpoint(
                self.run_dir,
                self.model,
                self.processor,
                weights,
                optimizer_state,
                state,
                self.made_by,
                self.recipe.save_total_limit,
            )
        self.accelerator.wait_for_everyone()
        self._restart_clock()

    def _finish(self) -> list[dict]:
        """Leave a model in the folder, evaluate it if the run is over, draw the pictures, and say what was made."""
        rows = []
        model = MsGFMForPreTraining.from_pretrained(self.run_dir).to(self.accelerator.device)
        if self.mixture.validation and self.finished:
            self.sound_rows = self._sound_rows(None, alone=True)
            rows = self._evaluate(model, None)
            write_text(self.run_dir / "validation.json", json.dumps(rows, indent=2))
        with checkpoint_errors(self.run_dir):
            pictures = [draw_losses(self.run_dir / "metrics.jsonl", self.run_dir / "losses.png")]
            if self.mixture.validation:
                pictures += self._draw(model)
        if not self.finished:
            print(f"Stopped at step {self.step}. `--resume` goes on from there.")
        if rows:
            print(
                "\nMasked L1 on the validation split, over that of the training places' band mean "
                f"(step {self.best['step']}):"
            )
            for row in rows:
                way = f"{row['source']:<20} {row['input']:>4} -> {row['target']:<4}"
                ratio = _ratio(row)
                print(f"  {way} {'   -' if ratio is None else f'{ratio:.2f}'}   (n = {row['crops']})")
        print("\nPictures: " + "  ".join(str(path) for path in pictures))
        print("Load the model with:\n  import msgfm_hf; from transformers import AutoModel")
        print(f'  model = AutoModel.from_pretrained("{self.run_dir}")')
        return rows

    def _draw(self, model: MsGFMForPreTraining) -> list[Path]:
        recipe, crops = self.recipe, self._masked_crops(model, self.recipe.eval_max_crops)
        sources = [source for source in self.mixture.validation if crops[source.name]]
        if not sources:
            return []
        with self.accelerator.autocast():
            reconstruction = draw_reconstruction(
                model, self.processor, sources, crops, recipe.cross_loss_region, self.run_dir / "reconstruction.png"
            )
            load = draw_expert_load(model, sources, crops, self.run_dir / "expert_load.png")
        return [reconstruction] if load is None else [reconstruction, load]


def _precision(recipe: Recipe) -> str:
    if recipe.mixed_precision != "auto":
        return recipe.mixed_precision
    return "bf16" if computes_in_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")) else "no"


# What a checkpoint says of how far a run has come.
_STATE = ("step", "turn", "planned", "best", "bad", "skipped", "losses")
# What may differ between a checkpoint and the run that goes on from it, without changing what is learnt.
_FREE_FIELDS = (
    "init_from",
    "max_steps",
    "num_train_epochs",
    "name",
    "output_dir",
    "data",
    "make_data",
    "dataloader_num_workers",
    "max_bad",
    "logging_steps",
    "eval_steps",
    "eval_max_crops",
    "save_steps",
    "save_total_limit",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "fsdp",
    "on_bad_loss",
    "max_loss_ratio",
    "max_skipped_steps",
    "report_to",
    "log_samples",
)


def _made_by(recipe: Recipe, mixture: Mixture, world: int, precision: str, start: dict | None) -> dict:
    """What made a run: `identity` must be the same to resume it, the rest is for the record."""
    fields = dataclasses.asdict(recipe)
    identity = {name: value for name, value in fields.items() if name not in _FREE_FIELDS}
    # The weights, wherever they lie.
    start_is = None if start is None else start["sha256"] or start["checkpoint"]
    identity.update(mixed_precision=precision, sources=mixture.fingerprint(), init_from=start_is)
    packages = ("torch", "transformers", "accelerate")
    return {
        "identity": identity,
        "recipe": fields,
        "start": start,
        "versions": {"msgfm_hf": __version__, **{name: metadata.version(name) for name in packages}},
        "commit": source_commit(),
        "command": " ".join(sys.argv),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "world_size": world,
    }


def source_commit() -> str | None:
    """The commit of the checkout this code is in, with a + where it has uncommitted changes; `None` from a wheel."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's repository.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cut_lines(path: Path, step: int):
    """Drop what a killed run wrote after its last checkpoint, a torn last line included."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            break
        # Why a run stopped is worth knowing after it went on.
        if found["step"] <= step or found.get("event") == "stopped":
            kept.append(line)
    write_text(path, "".join(f"{line}\n" for line in kept))


def _append(path: Path, line: dict):
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _losses_by_direction(outputs, inputs: dict, mixture: Mixture) -> dict[str, float]:
    """{"source input->target": masked L1} of one step."""
    losses = {}
    for source, values, targets in zip(mixture.sources, outputs.slice_losses, inputs["targets"], strict=True):
        for sensor, value in values.items():
            losses[f"{source.name} {sensor}->{targets[sensor]}"] = value.item()
    return losses


def _by_way(losses: dict[str, float]) -> dict[str, float]:
    """Mean over sources, for the progress bar."""
    found: dict[str, list[float]] = {}
    for name, value in losses.items():
        found.setdefault(name.split(" ")[-1], []).append(value)
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}


def _mean_over_processes(accelerator: Accelerator, line: dict) -> dict:
    """Nested numbers and tensors -> their means over processes, as plain numbers; None stays."""
    leaves, structure = tree_flatten(line)
    tensors = [None if leaf is None else torch.as_tensor(leaf).detach().cpu().double() for leaf in leaves]
    known = [tensor for tensor in tensors if tensor is not None]
    if accelerator.num_processes > 1:
        joined = total(accelerator, torch.cat([tensor.flatten() for tensor in known])) / accelerator.num_processes
        parts = joined.split([tensor.numel() for tensor in known])
        known = [part.view(tensor.shape) for part, tensor in zip(parts, known, strict=True)]
    means = iter(known)
    return tree_unflatten([None if tensor is None else next(means).tolist() for tensor in tensors], structure)


def _scalars(values, name: str = "") -> dict[str, float]:
    """Nested numbers -> {"path/of/names": number}, which is what trackers take."""
    if isinstance(values, dict | list):
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        return {
            path: number
            for key, value in pairs
            for path, number in _scalars(value, f"{name}/{key}" if name else str(key)).items()
        }
    return {} if values is None else {name: values}


def _ratio(row: dict) -> float | None:
    """The model's error over the band mean's; `None` where that is 0 (nothing masked, or a flat place)."""
    return row["l1"] / row["band_mean"] if row["band_mean"] else None


def _way(row: dict) -> str:
    return f"{row['source']} {row['input']}->{row['target']}"


def main(argv: list[str] | None = None):
    """The command line of pretraining."""
    parser = argparse.ArgumentParser(
        prog="pretrain.py",
        description="Pretrain msGFM on a mixture of paired and unpaired sensors.",
        epilog="examples:\n"
        "  accelerate launch pretrain.py                               the quickstart: synthetic scenes, a tiny model\n"
        "  accelerate launch pretrain.py --recipe sample --seed 1      the real samples (MSGFM_SAMPLE_DATA)\n"
        "  accelerate launch pretrain.py --data shards/s1s2 --data shards/rgb --max_steps 2000\n"
        "  accelerate launch pretrain.py --resume                      go on after a stop or a crash\n"
        "  accelerate launch pretrain.py --recipe msgfm_base --dry-run what it would take: images, memory, hours\n"
        "  accelerate launch --num_processes 8 pretrain.py ...         eight GPUs; on CPU see docs/pretraining.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    transformers_logging.disable_progress_bar()
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, where there is one")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would take, from a few steps; stop")
    add_recipe_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        recipe = recipe_from_arguments(arguments)
        if arguments.dry_run:
            said = dry_run(recipe)
            if PartialState().is_main_process:
                print(said)
        else:
            pretrain(recipe, resume=arguments.resume)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        # Ends the line of a progress bar that is still open: the frames of the error hold it.
        traceback.clear_frames(error.__traceback__)
        parser.exit(1, f"pretrain.py: {error}\n")


if __name__ == "__main__":
    main()
