"""Pretraining: `accelerate launch pretrain.py`, or `accelerate launch -m msgfm_hf.train.pretrain` from a wheel.

A run's folder holds the best model so far (loadable with `from_pretrained`), its processor, `metrics.jsonl`, pictures
and `checkpoints/`. The step is the only state of the data and of chance: order, crops, masks and crossings are
functions of the seed and the step, and torch's generators are seeded anew at each step. So a run that resumes at a step
goes on exactly as if it had never stopped.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from importlib import metadata
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from msgfm_hf import __version__
from msgfm_hf.data.batch import PreTrainingBatches, collate
from msgfm_hf.data.mixture import MixtureDataset, MixtureSampler, SourceOrder, steps_per_epoch
from msgfm_hf.data.shards import ShardSource, find_sources, shard_splits
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.modeling_msgfm import MsGFMForPreTraining, count_parameters, routing_statistics
from msgfm_hf.model.sensors import get_sensor
from msgfm_hf.tasks.reconstruction import evaluate_reconstruction, masked_crops, training_statistics
from msgfm_hf.train.checkpoint import (
    checkpoint_errors,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    save_model,
    write_text,
)
from msgfm_hf.train.optimisation import build_optimizer, set_learning_rate, source_weights
from msgfm_hf.train.pictures import draw_expert_load, draw_losses, draw_reconstruction
from msgfm_hf.train.recipe import Recipe, add_recipe_arguments, learning_rate_factor, recipe_from_arguments

_DEFAULT_BATCH_SIZE = 16


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
        unknown = sorted(set(recipe.batch_sizes) - set(folders))
        if unknown:
            raise ValueError(
                f"`batch_sizes` must name sources of `data` ({', '.join(folders)}), got {unknown[0]!r}. "
                "Correct the name."
            )
        # Folders with another split alone are there for tests.
        chosen = recipe.batch_sizes or [name for name, folder in folders.items() if "train" in shard_splits(folder)]
        if not chosen:
            raise ValueError(
                f"`data` must hold a training split, got {', '.join(folders)} without one. Look with `msgfm inspect`."
            )
        self.sources = [ShardSource(folders[name], "train") for name in chosen]
        for source in self.sources:
            if source.name != Path(source.path).name:
                raise ValueError(
                    f"`data` must hold sources in folders of their own name, got {source.name!r} in {source.path}. "
                    "Rename the folder."
                )
        self.batch_sizes = [recipe.batch_sizes.get(name, _DEFAULT_BATCH_SIZE) for name in chosen]
        self.weights = source_weights(self.batch_sizes)
        self.validation = [ShardSource(s.path, "val") for s in self.sources if "val" in shard_splits(s.path)]

    @property
    def sensors(self) -> list[str]:
        return sorted({sensor for source in self.sources for sensor in source.sensors})

    def fingerprint(self) -> dict:
        """What a resumed run must find again."""
        return {
            source.name: {
                "rows": len(source),
                # How they are grouped decides the order in which they come.
                "row_groups": zlib.crc32(repr([rows for _, _, _, rows in source.row_groups]).encode()),
                "bands": source.bands,
                "units": source.units,
                "dtypes": source.dtypes,
                "levels": source.levels,
            }
            for source in self.sources
        }


class Interrupt:
    """Ctrl-C and SIGTERM ask the run to save and stop; a second one stops at once. A context manager."""

    def __enter__(self) -> "Interrupt":
        self.asked = False
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nSaving a checkpoint, then stopping (once more to stop at once).", file=sys.stderr)


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
    return _Run(recipe, resume).run()


class _Run:
    """One run: what it was set up with, and how far it has come (`step`, `best`, `bad`)."""

    def __init__(self, recipe: Recipe, resume: bool):
        self.recipe, self.run_dir = recipe, recipe.run_dir
        self.accelerator = Accelerator(mixed_precision=_precision(recipe))
        checkpoint = newest_checkpoint(self.run_dir)
        files = {path.name for path in self.run_dir.iterdir()} if self.run_dir.is_dir() else set()
        if "run.json" not in files and "model.safetensors" in files:
            raise ValueError(
                f"`output_dir` must be new, got {str(self.run_dir)!r} with a model that is not of a run. "
                "Choose another `--output_dir`."
            )
        if "run.json" in files and not resume:
            raise ValueError(
                f"`output_dir` must be new, got {str(self.run_dir)!r} with a run at step "
                f"{checkpoint.step if checkpoint else 0}. Add `--resume` to go on with it, or choose another "
                "`--output_dir`."
            )
        if self.accelerator.is_main_process:
            make_missing_data(recipe)
        self.accelerator.wait_for_everyone()

        self.mixture = mixture = Mixture(recipe)
        world = self.accelerator.num_processes
        self.epoch = steps_per_epoch([len(source) for source in mixture.sources], mixture.batch_sizes, world)
        self.max_steps = (
            recipe.max_steps if recipe.max_steps > 0 else max(1, round(recipe.num_train_epochs * self.epoch))
        )
        set_seed(recipe.seed)
        first = "rgb" if "rgb" in mixture.sensors else mixture.sensors[0]
        self.config = recipe.model_config(
            {sensor: get_sensor(sensor).to_dict() for sensor in mixture.sensors}, {first: get_sensor(first).band_names}
        )
        self.processor = MsGFMImageProcessor.from_config(self.config)
        self.model = MsGFMForPreTraining(self.config)
        self.optimizer = build_optimizer(
            self.model, recipe, [source.sensors for source in mixture.sources], mixture.weights
        )
        self.made_by = _made_by(recipe, mixture, world, self.max_steps, self.accelerator.mixed_precision)

        self.step, self.best, self.bad = 0, None, []
        if checkpoint is not None:
            state = load_checkpoint(checkpoint, self.model, self.optimizer, self.made_by)
            self.step, self.best, self.bad = state["step"], state["best"], state["bad"]
        self.prepared, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.statistics = {
            source.name: training_statistics(source, self.processor, self.config.image_size)
            for source in mixture.sources
        }
        self.progress = tqdm(
            total=self.max_steps,
            initial=self.step,
            disable=not self.accelerator.is_main_process,
            desc=recipe.name,
            unit="step",
            # Every state of the bar stays in a log file.
            mininterval=0.1 if sys.stderr.isatty() else 10,
        )

    def run(self) -> dict:
        if self.accelerator.is_main_process:
            self._open_folder()
        with Interrupt() as interrupt:
            self._train(interrupt)
        self.progress.close()
        rows = self._finish() if self.accelerator.is_main_process else []
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return {"run_dir": self.run_dir, "step": self.step, "finished": self.finished, "reconstruction": rows}

    @property
    def finished(self) -> bool:
        return self.step >= self.max_steps

    def _open_folder(self):
        with checkpoint_errors(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._write_record()
            _cut_metrics(self.run_dir / "metrics.jsonl", self.step)
        sensor = next(iter(self.config.inputs))
        counts = count_parameters(self.model, inputs=[sensor], targets=[sensor])
        parts = [f"{s.name} {size}" for s, size in zip(self.mixture.sources, self.mixture.batch_sizes, strict=True)]
        print(
            f"{self.recipe.name}: {', '.join(parts)} per step, {self.epoch} steps per epoch, {self.max_steps} steps in "
            f"all; {counts.total:,} parameters, {counts.active:,} of them for {sensor} -> {sensor}; "
            f"{self.accelerator.device.type}, {'float32' if self.accelerator.mixed_precision == 'no' else 'bf16'}; "
            f"learning rate {self.recipe.learning_rate:g}, {self.recipe.lr_scheduler_type}."
        )

    def _write_record(self):
        """`run.json`: what made the run, and under `resumed` what went on with it from which step."""
        record, path = self.made_by, self.run_dir / "run.json"
        if self.step and path.is_file():
            record = json.loads(path.read_text())
            if self.finished:
                return
            if record["threads"] != self.made_by["threads"]:
                print(
                    f"This run had {record['threads']} threads before and has {self.made_by['threads']} now: sums "
                    "round differently, so it goes on exactly only in their last digits."
                )
            again = {name: self.made_by[name] for name in ("versions", "commit", "command", "threads")}
            record["resumed"] = [*record.get("resumed", []), {"step": self.step, **again}]
        write_text(path, json.dumps(record, indent=2))

    def _loader(self) -> DataLoader:
        recipe, mixture = self.recipe, self.mixture
        orders = [SourceOrder(source.row_groups, source.name, recipe.seed) for source in mixture.sources]
        return DataLoader(
            MixtureDataset(mixture.sources, orders, self.config.image_size, recipe.seed, recipe.max_bad),
            batch_sampler=MixtureSampler(
                mixture.batch_sizes,
                self.max_steps,
                self.step,
                self.accelerator.process_index,
                self.accelerator.num_processes,
            ),
            num_workers=recipe.dataloader_num_workers,
            collate_fn=collate,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _train(self, interrupt: Interrupt):
        recipe = self.recipe
        batches = PreTrainingBatches(
            self.mixture.sources,
            self.processor,
            self.config,
            recipe.seed,
            recipe.mask_ratio,
            recipe.cross_sensor_ratio,
            recipe.cross_loss_region,
            self.mixture.weights,
        )
        self.model.train()
        self._restart_clock()
        for batch in self._loader():
            self._note_damage(batch)
            inputs = batches(batch, self.step, self.accelerator.device)
            self.step += 1
            last = self.step == self.max_steps
            logging_now = self.step % recipe.logging_steps == 0 or last
            outputs, gradient_norm, learning_rate = self._optimise(batch, inputs, logging_now)
            self.images += sum(len(part["keys"]) * len(part["images"]) for part in batch["sources"])
            if logging_now and self.accelerator.is_main_process:
                self._log(outputs, inputs, gradient_norm, learning_rate)
            self.progress.update(1)
            stop = interrupt.asked
            if self.mixture.validation and (last or (self.step % recipe.eval_steps == 0 and not stop)):
                self._validate()
            if self.step % recipe.save_steps == 0 or last or stop:
                self._save()
            if stop:
                break

    def _optimise(self, batch: dict, inputs: dict, output_router_logits: bool):
        """One step of the optimiser; chance is a function of the seed, the step and the rank."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed((self.recipe.seed * 1_000_003 + self.step) * world + rank)
        learning_rate = self.recipe.learning_rate * learning_rate_factor(self.recipe, self.step - 1, self.max_steps)
        set_learning_rate(self.optimizer, learning_rate)
        with self.accelerator.autocast():
            outputs = self.prepared(**inputs, output_router_logits=output_router_logits)
        self.accelerator.backward(outputs.loss)
        gradient_norm = self.accelerator.clip_grad_norm_(self.prepared.parameters(), self.recipe.max_grad_norm)
        for name, value in (("loss", outputs.loss), ("grad_norm", gradient_norm)):
            if not torch.isfinite(value):
                keys = [key for part in batch["sources"] for key in part["keys"]]
                raise RuntimeError(
                    f"`{name}` must be finite, got {value.item()} at step {self.step}. Look at the rows of this step "
                    f"({', '.join(keys[:8])}, ...) or lower `learning_rate`; the last checkpoint is whole."
                )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return outputs, float(gradient_norm), learning_rate

    def _note_damage(self, batch: dict):
        """List each damaged row once; stop at too many, or where no row could be read in their place."""
        for where, reason in batch["bad"]:
            if where not in (known for known, _ in self.bad):
                self.progress.write(f"Damaged row {where} left out: {reason}")
                self.bad.append((where, reason))
        if len(self.bad) > self.recipe.max_bad or not batch["sources"]:
            where, reason = self.bad[-1]
            raise RuntimeError(
                f"`max_bad` allows {self.recipe.max_bad} damaged rows, got {len(self.bad)}; the last is {where}: "
                f"{reason} Make these shards again, or raise `max_bad`."
            )

    def _restart_clock(self):
        self.clock, self.images = time.perf_counter(), 0

    def _append(self, line: dict):
        with checkpoint_errors(self.run_dir):
            _append(self.run_dir / "metrics.jsonl", line)

    def _log(self, outputs, inputs: dict, gradient_norm: float, learning_rate: float):
        losses = _losses_by_direction(outputs, inputs, self.mixture)
        self._append(
            {
                "step": self.step,
                "loss": outputs.loss.item(),
                "losses": losses,
                "aux_loss": None if outputs.aux_loss is None else outputs.aux_loss.item(),
                "learning_rate": learning_rate,
                "grad_norm": gradient_norm,
                "routing": _routing(outputs, self.config),
                "images_per_second": self.images / (time.perf_counter() - self.clock),
                "bad": len(self.bad),
            }
        )
        self._restart_clock()
        shown = {name: f"{value:.3f}" for name, value in _by_way(losses).items()}
        self.progress.set_postfix(shown, refresh=False)

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
        )

    def _validate(self):
        """Evaluate, and keep the model if it is the best so far."""
        rows = self._evaluate(self.model, self.recipe.eval_max_crops)
        ratios = [ratio for ratio in map(_ratio, rows) if ratio is not None]
        # Where nothing can be compared, the newest model is the best.
        score = sum(ratios) / len(ratios) if ratios else -self.step
        if self.accelerator.is_main_process:
            summary = {_way(row): {"l1": row["l1"], "ratio_to_band_mean": _ratio(row)} for row in rows}
            self._append({"step": self.step, "validation": summary, "score": score})
            if self.best is None or score < self.best["score"]:
                self.best = {"score": score, "step": self.step}
                save_model(self.run_dir, self.model, self.processor)
        self._restart_clock()

    def _save(self):
        if self.accelerator.is_main_process:
            state = {"step": self.step, "best": self.best, "bad": self.bad}
            save_checkpoint(
                self.run_dir,
                self.model,
                self.processor,
                self.optimizer,
                state,
                self.made_by,
                self.recipe.save_total_limit,
            )
        self.accelerator.wait_for_everyone()
        self._restart_clock()

    def _finish(self) -> list[dict]:
        """Leave a model in the folder, evaluate it if the run is over, draw the pictures, and say what was made."""
        if self.best is None:
            save_model(self.run_dir, self.model, self.processor)
        rows, model = [], self.model
        if self.mixture.validation and self.finished:
            model = MsGFMForPreTraining.from_pretrained(self.run_dir).to(self.accelerator.device)
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
        recipe, sources = self.recipe, self.mixture.validation
        crops = {
            source.name: list(
                masked_crops(source, self.processor, model, recipe.mask_ratio, recipe.seed, recipe.eval_max_crops, 16)
            )
            for source in sources
        }
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


# What may differ between a checkpoint and the run that goes on from it, without changing what is learnt.
_FREE_FIELDS = (
    "name",
    "output_dir",
    "data",
    "make_data",
    "dataloader_num_workers",
    "max_bad",
    "logging_steps",
    "save_steps",
    "save_total_limit",
)


def _made_by(recipe: Recipe, mixture: Mixture, world: int, max_steps: int, precision: str) -> dict:
    """What made a run: `identity` must be the same to resume it, the rest is for the record."""
    fields = dataclasses.asdict(recipe)
    identity = {name: value for name, value in fields.items() if name not in _FREE_FIELDS}
    identity.update(max_steps=max_steps, world_size=world, mixed_precision=precision, sources=mixture.fingerprint())
    packages = ("torch", "transformers", "accelerate")
    return {
        "identity": identity,
        "recipe": fields,
        "versions": {"msgfm_hf": __version__, **{name: metadata.version(name) for name in packages}},
        "commit": source_commit(),
        "command": " ".join(sys.argv),
        "threads": torch.get_num_threads(),
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


def _cut_metrics(path: Path, step: int):
    """Drop what a killed run wrote after its last checkpoint, a torn last line included."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            break
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


def _routing(outputs, config) -> dict:
    """Routing statistics per sensor as plain numbers, four digits each."""
    found = routing_statistics(outputs, config)
    return {
        sensor: {name: (value * 1e4).round().div(1e4).tolist() for name, value in values.items()}
        for sensor, values in found.items()
    }


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
        "  accelerate launch pretrain.py --resume                      go on after a stop or a crash",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    transformers_logging.disable_progress_bar()
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, where there is one")
    add_recipe_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        pretrain(recipe_from_arguments(arguments), resume=arguments.resume)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        parser.exit(1, f"pretrain.py: {error}\n")


if __name__ == "__main__":
    main()
