"""Pretraining: `accelerate launch pretrain.py`, or `accelerate launch -m msgfm_hf.train.pretrain` from a wheel.

A run's folder holds the best model so far (loadable with `from_pretrained`), its processor, `metrics.jsonl`, pictures
and `checkpoints/`. The step is the only state of the data and of chance: order, crops, masks and crossings are
functions of the seed and the step, and torch's generators are seeded anew at each step. So a run that resumes at a step
goes on exactly as if it had never stopped.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
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
from msgfm_hf.model.sensors import SENSORS
from msgfm_hf.tasks.reconstruction import evaluate_reconstruction, masked_crops, training_statistics
from msgfm_hf.train.checkpoint import (
    CheckpointError,
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
    """Make the shards a recipe asks for where they are missing."""
    if recipe.make_data == "none" or Path(recipe.data[0]).exists():
        return
    if recipe.make_data == "synthetic":
        from msgfm_hf.data.synthetic import make_synthetic_shards

        print(f"Making synthetic scenes in {recipe.data[0]} (they are for learning the ropes, never a result).")
        make_synthetic_shards(Path(recipe.data[0]), seed=recipe.seed)
    else:
        from msgfm_hf.data.sample import make_sample_shards

        if "MSGFM_SAMPLE_DATA" not in os.environ:
            raise ValueError(
                f"`data` must exist or be made from MSGFM_SAMPLE_DATA, which is unset, got {recipe.data}. "
                "Set it to the folder of real samples, or give shards with `--data`."
            )
        print(f"Making shards of the real samples in {recipe.data[0]}.")
        make_sample_shards(Path(os.environ["MSGFM_SAMPLE_DATA"]), Path(recipe.data[0]))


class Mixture:
    """The sources of a run, by name: what trains, in which sub-batches, and what validates."""

    def __init__(self, recipe: Recipe):
        folders = {Path(folder).name: folder for data in recipe.data for folder in find_sources(data)}
        unknown = sorted(set(recipe.batch_sizes) - set(folders))
        if unknown:
            raise ValueError(
                f"`batch_sizes` must name sources of `data` ({', '.join(folders)}), got {unknown[0]!r}. "
                "Correct the name."
            )
        # Folders with another split alone are there for tests.
        chosen = recipe.batch_sizes or [name for name, folder in folders.items() if "train" in shard_splits(folder)]
        self.sources = [ShardSource(folders[name], "train") for name in chosen]
        if not self.sources:
            raise ValueError(
                f"`data` must hold a training split, got {', '.join(folders)} without one. Look with `msgfm inspect`."
            )
        self.batch_sizes = [recipe.batch_sizes.get(name, _DEFAULT_BATCH_SIZE) for name in chosen]
        self.weights = source_weights(self.batch_sizes)
        self.validation = [ShardSource(s.path, "val") for s in self.sources if "val" in shard_splits(s.path)]

    @property
    def sensors(self) -> list[str]:
        return sorted({sensor for source in self.sources for sensor in source.sensors})

    def fingerprint(self) -> dict:
        """What a resumed run must find again."""
        return {source.name: {"rows": len(source), "sensors": sorted(source.sensors)} for source in self.sources}


class Interrupt:
    """Ctrl-C and SIGTERM ask the run to save and stop; a second one stops at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

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
        RuntimeError: if the loss is not finite, or too many damaged rows are met.
    """
    accelerator = Accelerator(mixed_precision=_precision(recipe))
    run_dir = recipe.run_dir
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is not None and not resume:
        raise ValueError(
            f"`output_dir` must be new, got {str(run_dir)!r} with a run at step {checkpoint.step}. "
            "Add `--resume` to go on with it, or choose another `--output_dir`."
        )
    if accelerator.is_main_process:
        make_missing_data(recipe)
    accelerator.wait_for_everyone()

    mixture = Mixture(recipe)
    world, rank = accelerator.num_processes, accelerator.process_index
    epoch = steps_per_epoch([len(source) for source in mixture.sources], mixture.batch_sizes, world)
    max_steps = recipe.max_steps if recipe.max_steps > 0 else max(1, round(recipe.num_train_epochs * epoch))

    set_seed(recipe.seed)
    first = "rgb" if "rgb" in mixture.sensors else mixture.sensors[0]
    config = recipe.model_config(
        {sensor: SENSORS[sensor].to_dict() for sensor in mixture.sensors}, {first: SENSORS[first].band_names}
    )
    processor = MsGFMImageProcessor.from_config(config)
    model = MsGFMForPreTraining(config)
    optimizer = build_optimizer(model, recipe, [source.sensors for source in mixture.sources], mixture.weights)
    made_by = _made_by(recipe, mixture, world, max_steps)

    start_step, best, bad = 0, None, []
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, model, optimizer, made_by, accelerator.device)
        start_step, best, bad = state["step"], state["best"], state["bad"]
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)

    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / "run.json", json.dumps(made_by, indent=2))
        _cut_metrics(run_dir / "metrics.jsonl", start_step)
        counts = count_parameters(bare, inputs=[first], targets=[first])
        parts = [f"{s.name} {size}" for s, size in zip(mixture.sources, mixture.batch_sizes, strict=True)]
        print(
            f"{recipe.name}: {', '.join(parts)} per step, {epoch} steps per epoch, {max_steps} steps in all; "
            f"{counts.total:,} parameters, {counts.active:,} of them for {first} -> {first}; "
            f"{accelerator.device.type}, {'float32' if accelerator.mixed_precision == 'no' else 'bf16'}."
        )

    batches = PreTrainingBatches(
        mixture.sources,
        processor,
        config,
        recipe.seed,
        recipe.mask_ratio,
        recipe.cross_sensor_ratio,
        recipe.cross_loss_region,
        mixture.weights,
    )
    orders = [SourceOrder(source.row_groups, source.name, recipe.seed) for source in mixture.sources]
    dataset = MixtureDataset(mixture.sources, orders, config.image_size, recipe.seed, recipe.max_bad)
    loader = DataLoader(
        dataset,
        batch_sampler=MixtureSampler(mixture.batch_sizes, max_steps, start_step, rank, world),
        num_workers=recipe.dataloader_num_workers,
        collate_fn=collate,
        pin_memory=accelerator.device.type == "cuda",
    )
    statistics = {
        source.name: training_statistics(source, processor, config.image_size, recipe.seed, recipe.eval_max_crops)
        for source in mixture.sources
    }

    def evaluate(step: int, crops: int | None) -> list[dict]:
        return evaluate_reconstruction(
            bare,
            processor,
            mixture.validation,
            statistics,
            recipe.mask_ratio,
            recipe.seed,
            crops,
            with_baselines=False,
            autocast=accelerator.autocast,
        )

    interrupt = Interrupt()
    progress = tqdm(
        total=max_steps, initial=start_step, disable=not accelerator.is_main_process, desc=recipe.name, unit="step"
    )
    step, clock, images = start_step, time.perf_counter(), 0
    model.train()
    for step, batch in enumerate(loader, start_step + 1):
        bad += batch["bad"]
        _stop_if_too_bad(bad, recipe.max_bad)
        learning_rate = recipe.learning_rate * learning_rate_factor(recipe, step - 1, max_steps)
        set_learning_rate(optimizer, learning_rate)
        torch.manual_seed((recipe.seed * 1_000_003 + step) * world + rank)
        inputs = batches(batch, step - 1, accelerator.device)
        logging_now = step % recipe.logging_steps == 0 or step == max_steps
        with accelerator.autocast():
            outputs = model(**inputs, output_router_logits=logging_now)
        if not torch.isfinite(outputs.loss):
            keys = [key for part in batch["sources"] for key in part["keys"]]
            raise RuntimeError(
                f"`loss` must be finite, got {outputs.loss.item()} at step {step}. Look at the rows of this step "
                f"({', '.join(keys[:8])}, ...) or lower `learning_rate`; the last checkpoint is whole."
            )
        accelerator.backward(outputs.loss)
        gradient_norm = accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        images += sum(len(part["keys"]) * len(part["images"]) for part in batch["sources"])

        if logging_now and accelerator.is_main_process:
            losses = _losses_by_direction(outputs, inputs, mixture)
            now = time.perf_counter()
            line = {
                "step": step,
                "loss": outputs.loss.item(),
                "losses": losses,
                "aux_loss": None if outputs.aux_loss is None else outputs.aux_loss.item(),
                "learning_rate": learning_rate,
                "grad_norm": float(gradient_norm),
                "routing": _routing(outputs, config),
                "images_per_second": images / (now - clock),
                "bad": len(bad),
            }
            clock, images = now, 0
            _append(run_dir / "metrics.jsonl", line)
            progress.set_postfix({name: f"{value:.3f}" for name, value in _by_sensor(losses).items()}, refresh=False)
        progress.update(1)

        stop = interrupt.asked
        if (step % recipe.eval_steps == 0 or step == max_steps) and mixture.validation and not stop:
            rows = evaluate(step, recipe.eval_max_crops)
            score = _score(rows)
            if accelerator.is_main_process:
                _append(run_dir / "metrics.jsonl", {"step": step, "validation": _summary(rows), "score": score})
                if best is None or score < best["score"]:
                    best = {"score": score, "step": step}
                    save_model(run_dir, bare, processor)
            clock, images = time.perf_counter(), 0
        if step % recipe.save_steps == 0 or step == max_steps or stop:
            if accelerator.is_main_process:
                state = {"step": step, "best": best, "bad": bad}
                save_checkpoint(run_dir, bare, processor, optimizer, state, made_by, recipe.save_total_limit)
            accelerator.wait_for_everyone()
            clock, images = time.perf_counter(), 0
        if stop:
            break
    progress.close()

    finished = step >= max_steps
    rows = []
    if accelerator.is_main_process:
        if best is None:
            save_model(run_dir, bare, processor)
        elif finished:
            bare = MsGFMForPreTraining.from_pretrained(run_dir).to(accelerator.device)
        rows = evaluate(step, None) if mixture.validation and finished else []
        if mixture.validation:
            write_text(run_dir / "validation.json", json.dumps(rows, indent=2))
        _finish(run_dir, recipe, bare, processor, mixture, statistics, rows, step, finished, best, accelerator)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return {"run_dir": run_dir, "step": step, "finished": finished, "reconstruction": rows}


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
    "eval_steps",
    "eval_max_crops",
    "save_steps",
    "save_total_limit",
)


def _made_by(recipe: Recipe, mixture: Mixture, world: int, max_steps: int) -> dict:
    """What made a run: `identity` must be the same to resume it, the rest is for the record."""
    fields = dataclasses.asdict(recipe)
    identity = {name: value for name, value in fields.items() if name not in _FREE_FIELDS}
    identity.update(max_steps=max_steps, world_size=world, sources=mixture.fingerprint())
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
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


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


def _stop_if_too_bad(bad: list, max_bad: int):
    if len(bad) > max_bad:
        where, reason = bad[-1]
        raise RuntimeError(
            f"`max_bad` allows {max_bad} damaged rows, got {len(bad)}; the last is {where}: {reason} "
            "Make these shards again, or raise `max_bad`."
        )


def _losses_by_direction(outputs, inputs: dict, mixture: Mixture) -> dict[str, float]:
    """{"source input->target": masked L1} of one step."""
    losses = {}
    for source, values, targets in zip(mixture.sources, outputs.slice_losses, inputs["targets"], strict=True):
        for sensor, value in values.items():
            losses[f"{source.name} {sensor}->{targets[sensor]}"] = value.item()
    return losses


def _by_sensor(losses: dict[str, float]) -> dict[str, float]:
    """Mean over sources, for the progress bar."""
    found: dict[str, list[float]] = {}
    for name, value in losses.items():
        found.setdefault(name.split(" ")[-1], []).append(value)
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}


def _routing(outputs, config) -> dict:
    """Routing statistics per sensor as plain numbers, rounded for the log."""
    found = routing_statistics(outputs, config.num_experts, config.router_noise)
    return {
        sensor: {
            name: [[round(v, 4) for v in row] if isinstance(row, list) else round(row, 4) for row in value.tolist()]
            for name, value in values.items()
        }
        for sensor, values in found.items()
    }


def _ratio(row: dict) -> float:
    return row["l1"] / row["band_mean"]


def _score(rows: list[dict]) -> float:
    """One number to keep the best model by: the mean over sources and directions of the ratio to the band mean."""
    return sum(_ratio(row) for row in rows) / len(rows)


def _summary(rows: list[dict]) -> dict[str, dict]:
    return {
        f"{row['source']} {row['input']}->{row['target']}": {"l1": row["l1"], "ratio_to_band_mean": _ratio(row)}
        for row in rows
    }


def _finish(run_dir, recipe, model, processor, mixture, statistics, rows, step, finished, best, accelerator):
    """Draw the pictures and say what was made."""
    pictures = [draw_losses(run_dir / "metrics.jsonl", run_dir / "losses.png")]
    if mixture.validation:
        crops = {
            source.name: list(
                masked_crops(source, processor, model, recipe.mask_ratio, recipe.seed, recipe.eval_max_crops, 16)
            )
            for source in mixture.validation
        }
        with accelerator.autocast():
            pictures.append(
                draw_reconstruction(
                    model,
                    processor,
                    mixture.validation,
                    crops,
                    recipe.cross_loss_region,
                    run_dir / "reconstruction.png",
                )
            )
            load = draw_expert_load(model, mixture.validation, crops, run_dir / "expert_load.png")
        pictures += [load] if load else []
    if not finished:
        print(f"Stopped at step {step}. `--resume` goes on from there.")
    if rows:
        print(
            f"\nMasked L1 on the validation split, over that of the training places' band mean (step {best['step']}):"
        )
        for row in rows:
            way = f"{row['source']:<20} {row['input']:>4} -> {row['target']:<4}"
            print(f"  {way} {_ratio(row):.2f}   (n = {row['crops']})")
    print("\nPictures: " + "  ".join(str(path) for path in pictures))
    print("Load the model with:\n  import msgfm_hf; from transformers import AutoModel")
    print(f'  model = AutoModel.from_pretrained("{run_dir}")')


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
    except (ValueError, CheckpointError, RuntimeError) as error:
        parser.exit(1, f"pretrain.py: {error}\n")


if __name__ == "__main__":
    main()
