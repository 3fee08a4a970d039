"""Evaluation of pretrained models on held-out places: masked L1 of every sensor and crossing, beside the baselines."""

import json
import statistics as numbers
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from msgfm_hf.data.shards import ShardSource, find_sources, shard_splits
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.modeling_msgfm import MsGFMForPreTraining
from msgfm_hf.tasks.reconstruction import evaluate_reconstruction, masked_crops, training_statistics
from msgfm_hf.train.checkpoint import planned_steps, run_record, write_text
from msgfm_hf.train.pictures import draw_reconstruction, read_metrics
from msgfm_hf.train.pretrain import source_commit

# Values of a row that are not an error of some method.
_NOT_METHODS = ("source", "input", "target", "crops", "places", "by_place")


def evaluate_models(
    models: Sequence[str | Path],
    data: Sequence[str | Path],
    split: str = "val",
    mask_ratio: float = 0.6,
    mask_seeds: int = 8,
    max_crops: int | None = None,
    command: str | None = None,
) -> dict:
    """Evaluate several models (seeds of one recipe, say) on the same crops and masks.

    Args:
        models: folders that `from_pretrained` loads.
        data: folders of shards; sources without the split, or without a training split for the baselines, are left out.
        split: what to evaluate on.
        mask_ratio: share of masked cells.
        mask_seeds: every crop is masked this many times, differently, to take the chance out of few crops.
        max_crops: at most this many crops per source, evenly spread.
        command: what to write down as the command that made the report.

    Returns:
        a JSON-able report: `rows` with, per source and direction, `crops` (n), `places`, the median over models `l1`
        with its `spread` (lowest, highest), `l1_by_model`, the baselines, and `by_place`; and what made it.

    Raises:
        ValueError: if a folder is no model, no source can be evaluated, two sources have one name, a model lacks the
            sensors of one, or the models do not see the same pixels.
    """
    for name, value in (("mask_seeds", mask_seeds), ("max_crops", max_crops)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}. Leave it out for the default.")
    for path in models:
        if not (Path(path) / "config.json").is_file():
            raise ValueError(
                f"`model` must be the folder of a pretrained model, got {str(path)!r}. Pretraining writes one."
            )
    folders = _folders(data, split)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = None
    found: dict[tuple[str, str, str], list[list[dict]]] = {}
    progress = tqdm(total=len(models) * mask_seeds, desc="evaluating", unit="pass")
    for path in models:
        model = MsGFMForPreTraining.from_pretrained(path).to(device).eval()
        processor = MsGFMImageProcessor.from_pretrained(path)
        # Crops, masks and units: with others, errors cannot be compared.
        sees = (model.config.image_size, model.config.patch_size, model.config.mask_patch_size, processor.sensors)
        if (first := first or sees) != sees:
            raise ValueError(
                f"`model` must be models that see the same crops, masks and units, got {str(path)!r} with another "
                f"image, patch or masked cell size or other sensors than {str(models[0])!r}. Evaluate it by itself."
            )
        sources = [ShardSource(folder, split) for folder in folders]
        for source in sources:
            if not set(source.sensors) <= set(model.config.sensors):
                raise ValueError(
                    f"`data` must be of the sensors of the model ({', '.join(model.config.sensors)}), got "
                    f"{', '.join(source.sensors)} in {source.path}. Name the folders of its sources one by one."
                )
        known = {
            source.name: training_statistics(ShardSource(source.path, "train"), processor, model.config.image_size)
            for source in sources
        }
        for seed in range(mask_seeds):
            rows = evaluate_reconstruction(model, processor, sources, known, mask_ratio, seed, max_crops)
            for row in rows:
                per_model = found.setdefault((row["source"], row["input"], row["target"]), [])
                if seed == 0:
                    per_model.append([])
                per_model[-1].append(row)
            progress.update(1)
    progress.close()
    return {
        "measure": "masked L1 in normalised units (see msgfm_hf.tasks.reconstruction); pixels weigh equally",
        "command": command,
        "commit": source_commit(),
        "torch": torch.__version__,
        "device": device.type,
        "models": [str(path) for path in models],
        "trained": [_trained(Path(path)) for path in models],
        "split": split,
        "mask_ratio": mask_ratio,
        "mask_seeds": mask_seeds,
        "rows": [_row(per_model) for per_model in found.values()],
    }


def draw_model(
    model: str | Path, data: Sequence[str | Path], path: str | Path, split: str = "val", mask_ratio: float = 0.6
) -> Path:
    """Draw what a model makes of the crops it is evaluated on: the median and the worst of every direction.

    Args:
        model, data, split, mask_ratio: as of `evaluate_models`; masks are those of its first mask seed, crops at most
            64 per source.
        path: the picture, a PNG. A crossing is shown where the run's loss counted, which its `run.json` says.

    Raises:
        ValueError: if no source can be evaluated.
    """
    made_by, device = run_record(Path(model)), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    region = made_by["recipe"]["cross_loss_region"] if made_by else "masked"
    network = MsGFMForPreTraining.from_pretrained(model).to(device).eval()
    processor = MsGFMImageProcessor.from_pretrained(model)
    sources = [ShardSource(folder, split) for folder in _folders(data, split)]
    crops = {source.name: list(masked_crops(source, processor, network, mask_ratio, 0, 64, 16)) for source in sources}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return draw_reconstruction(network, processor, sources, crops, region, Path(path))


def _folders(data: Sequence[str | Path], split: str) -> list[str]:
    """The sources that can be evaluated on a split."""
    folders = [folder for path in data for folder in find_sources(path)]
    folders = [folder for folder in folders if {split, "train"} <= set(shard_splits(folder))]
    if not folders:
        raise ValueError(
            f"`data` must hold a source with the splits 'train' and {split!r}, got {[str(path) for path in data]}. "
            "Baselines are fitted on the training places. Look with `msgfm inspect`."
        )
    names = [Path(folder).name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"`data` must hold each source once, got {', '.join(sorted(names))}. Leave one out.")
    return folders


def _trained(folder: Path) -> dict | None:
    """What made a model, or the checkpoint of one, from the run's own record."""
    record, is_checkpoint = run_record(folder), (folder / "state.json").is_file()
    if record is None:
        return None
    identity = record["identity"]
    if is_checkpoint:
        step = json.loads((folder / "state.json").read_text())["step"]
    else:
        lines = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
        scores = {line["step"]: line["score"] for line in lines if "score" in line}
        step = min(scores, key=scores.get) if scores else None
    return {
        "seed": identity["seed"],
        "max_steps": planned_steps(record),
        "step": step,
        # A run keeps its best model by the validation split: on that split, its figures are a little too good.
        "chosen_by_validation": not is_checkpoint,
        **{name: record[name] for name in ("commit", "command", "versions", "threads")},
    }


def _row(per_model: list[list[dict]]) -> dict:
    """One direction: means over masks, then median and spread over models."""
    first = per_model[0][0]
    methods = [name for name in first if name not in _NOT_METHODS]

    def mean(rows, name):
        return numbers.fmean(row[name] for row in rows)

    def summary(lists: list[list[dict]]) -> dict:
        by_model = [mean(rows, "l1") for rows in lists]
        baselines = {name: mean(lists[0], name) for name in methods if name != "l1"}
        return {
            "l1": numbers.median(by_model),
            "spread": [min(by_model), max(by_model)],
            "l1_by_model": by_model,
            "baselines": baselines,
        }

    return {
        **{name: first[name] for name in ("source", "input", "target", "crops", "places")},
        **summary(per_model),
        "by_place": {
            place: {
                "crops": values["crops"],
                **summary([[row["by_place"][place] for row in rows] for rows in per_model]),
            }
            for place, values in first["by_place"].items()
        },
    }


def format_report(report: dict) -> str:
    """The report as a Markdown table: errors, and in brackets the model's over that baseline's."""
    baselines = list(dict.fromkeys(name for row in report["rows"] for name in row["baselines"]))
    head = ["source", "direction", "n", "places", "model (spread)", *(name.replace("_", " ") for name in baselines)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in report["rows"]:
        low, high = row["spread"]
        cells = [
            row["source"],
            f"{row['input']} → {row['target']}",
            str(row["crops"]),
            str(row["places"]),
            f"**{row['l1']:.3f}** ({low:.3f}-{high:.3f})",
        ]
        for name in baselines:
            value = row["baselines"].get(name)
            ratio = f" ({row['l1'] / value:.2f})" if value else ""
            cells.append("" if value is None else f"{value:.3f}{ratio}")
        lines.append("| " + " | ".join(cells) + " |")
    few = min(row["places"] for row in report["rows"]) < 3
    title = "Demonstration, not evidence: fewer than three places per source.\n\n" if few else ""
    return title + "\n".join(lines)


def write_report(report: dict, path: Path):
    """Write the report as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(report, indent=2) + "\n")
