"""What the experts of a model see: which sensor's tokens each of them takes, the crops it takes most of, and a dense
model made of the experts that some sensors use."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from msgfm_hf.data.batch import collate, normalise
from msgfm_hf.data.mixture import EvaluationCrops
from msgfm_hf.data.shards import ShardSource, find_sources, shard_splits
from msgfm_hf.model.configuration_msgfm import MsGFMConfig
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.modeling_msgfm import MsGFMForPreTraining, count_parameters
from msgfm_hf.tasks.reconstruction import MaskedCrops, evaluate_reconstruction, masked_crops, training_statistics
from msgfm_hf.train.checkpoint import checkpoint_errors, run_record, save_model
from msgfm_hf.train.evaluate import write_report
from msgfm_hf.train.pictures import ExpertCrop, draw_expert_crops, draw_experts
from msgfm_hf.train.pretrain import source_commit

# Enough to choose experts by, of a training split that may have millions.
CHOOSING_CROPS = 512


class RoutedTokens(NamedTuple):
    """Where one block sent the tokens of one sensor's crops.

    Args:
        experts: int64 (B, h, w, K), from 0; E = dropped.
        gates: (B, h, w, K), 0..1: the router's probability of each, which multiplies what the expert returns.
        valid: bool (B, h, w): whether any of the pixels under a token is valid.
        stride: pixels per side of a token.
    """

    experts: torch.Tensor
    gates: torch.Tensor
    valid: torch.Tensor
    stride: int


@torch.no_grad()
def route_tokens(model: MsGFMForPreTraining, crops: MaskedCrops, source: ShardSource) -> dict[str, list[RoutedTokens]]:
    """Run crops through a model in evaluation mode, nothing masked, and follow their tokens.

    A token of stage s (from 0) lies over a square of `patch_size` * 2**s pixels. It is valid if any of them is: the
    same rule as for the patches of the embedding, which are its parts.

    Returns:
        {sensor: one entry per block with experts, in the order of the state dict}.
    """
    output = model(
        crops.pixel_values,
        bands={sensor: source.bands[sensor] for sensor in crops.pixel_values},
        valid_mask=crops.valid_mask,
        output_router_logits=True,
    )
    rows = [count for _, _, count in output.slices]
    routed: dict[str, list[RoutedTokens]] = {sensor: [] for _, sensor, _ in output.slices}
    blocks = zip(_expert_blocks(model.config), output.router_logits, output.selected_experts, strict=True)
    for (stage, _), logits, selected in blocks:
        # One column more: a dropped choice has the index E and no gate.
        gates = F.pad(logits.float().softmax(-1), (0, 1)).gather(1, selected)
        stride = model.config.patch_size * 2**stage
        parts = [values.unflatten(0, (sum(rows), -1)).split(rows) for values in (selected, gates)]
        for (_, sensor, _), experts, gate in zip(output.slices, *parts, strict=True):
            seen = crops.valid_mask[sensor].float().unsqueeze(1)
            valid = F.max_pool2d(seen, stride, ceil_mode=True).squeeze(1) > 0
            grid = valid.shape[1:]
            routed[sensor].append(RoutedTokens(experts.unflatten(1, grid), gate.unflatten(1, grid), valid, stride))
    return routed


def _expert_blocks(config: MsGFMConfig) -> list[tuple[int, int]]:
    """(stage, block) of every block with experts, both from 0, in the order of the state dict."""
    return [(stage, block) for stage, found in enumerate(config.moe_blocks) for block in sorted(found)]


class _Tally:
    """What one block did with the tokens of one sensor."""

    def __init__(self, num_experts: int):
        self.tokens = 0
        self.choices = torch.zeros(num_experts + 1, dtype=torch.float64)
        self.gates = torch.zeros(num_experts + 1, dtype=torch.float64)

    def add(self, tokens: RoutedTokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Count crops; returns their valid tokens (B,), and by expert how many it takes and with which summed gate."""
        chosen = F.one_hot(tokens.experts, len(self.choices)).double() * tokens.valid[..., None, None]
        valid = tokens.valid.sum((1, 2)).cpu()
        choices = chosen.sum((1, 2, 3)).cpu()
        gates = (chosen * tokens.gates.unsqueeze(-1)).sum((1, 2, 3)).cpu()
        self.tokens += int(valid.sum())
        self.choices += choices.sum(0)
        self.gates += gates.sum(0)
        return valid, choices[:, :-1], gates[:, :-1]

    def summary(self) -> dict:
        total = self.choices.sum().clamp(min=1)
        share, kept = self.choices[:-1] / total, self.choices[:-1].sum()
        gates = [
            gate / count if count else None
            for gate, count in zip(self.gates[:-1].tolist(), self.choices[:-1].tolist(), strict=True)
        ]
        return {
            "tokens": self.tokens,
            "share": share.tolist(),
            "dropped": (self.choices[-1] / total).item(),
            "gate": gates,
            "mean_gate": (self.gates.sum() / kept).item() if kept else None,
            "entropy_bits": _entropy(share),
        }


def _entropy(share: torch.Tensor) -> float:
    """Entropy in bits of what the shares are proportional to."""
    share = share[share > 0] / share.sum().clamp(min=1e-12)
    return abs(-(share * share.log2()).sum().item())


def analyse_experts(
    model: MsGFMForPreTraining,
    processor: MsGFMImageProcessor,
    sources: Sequence[ShardSource],
    max_crops: int | None = None,
    top_crops: int = 6,
    batch_size: int = 16,
) -> dict:
    """Which sensor's tokens each expert takes, how sure the router is, and the crops each expert takes most of.

    Crops are those of evaluation, whole images go in (nothing is masked), and tokens without a valid pixel do not
    count. A token makes K choices.

    Args:
        model: with experts; in evaluation mode for the time of the call.
        processor: its radiometry is the only arithmetic on pixels.
        sources: of sensors of the model.
        max_crops: at most this many crops of each source, spread evenly; `None` for all.
        top_crops: how many crops to list per expert.

    Returns:
        a JSON-able report: `num_experts` E, `num_experts_per_tok` K, `max_entropy_bits` (log2 E), `n`
        {sensor: {crops, places}}, and `blocks`, one per block with experts:

        - `name` ("layers.2.blocks.1", as in the state dict), `stage`, `block` (from 0), `stride` (pixels per token);
        - `sensors`: {sensor: {`tokens` (n), `share` [E] of the choices of the sensor's tokens that fall on each expert,
          `dropped` (share of those without room, 0 unless `eval_capacity_factor` is set), `gate` [E] mean router
          probability with which each takes them (`None` where none), `mean_gate`, `entropy_bits` of the shares: 0 where
          one expert takes all}};
        - `mutual_information_bits`: what knowing the sensor tells of the expert, all sensors weighing the same; 0 where
          sensors are spread alike, at most the smaller of log2 E and log2 of the number of sensors;
        - `experts`: one list per expert of its top crops, by tokens taken and then by gate: `source`, `sensor`, `key`,
          `group_id` (place), `row`, `top`, `left` (pixels), `tokens` (valid ones of the crop), `share` (0..1, of them),
          `gate` (mean of what it takes).

    Raises:
        ValueError: if the model has no experts, or not the sensors of a source, or there is nothing to look at.
    """
    _refuse_dense(model)
    if not sources:
        raise ValueError("`sources` must hold at least one source, got none. Give folders of shards.")
    if max_crops is not None and max_crops < 1:
        raise ValueError(f"`max_crops` must be at least 1, got {max_crops}. Leave it out for all.")
    for source in sources:
        if not set(source.sensors) <= set(model.config.sensors):
            raise ValueError(
                f"`sources` must be of the sensors of the model ({', '.join(model.config.sensors)}), got "
                f"{', '.join(source.sensors)} in {source.path}. Leave it out, or read fewer of its sensors."
            )
    config = model.config
    sensors = sorted({sensor for source in sources for sensor in source.sensors})
    places = _expert_blocks(config)
    tallies = [{sensor: _Tally(config.num_experts) for sensor in sensors} for _ in places]
    top: list[list[list[dict]]] = [[[] for _ in range(config.num_experts)] for _ in places]
    count = {sensor: 0 for sensor in sensors}
    groups: dict[str, set] = {sensor: set() for sensor in sensors}
    every_id = [EvaluationCrops(source, config.image_size, max_crops).ids for source in sources]
    with _evaluating(model), tqdm(total=sum(map(len, every_id)), desc="routing", unit="crop") as progress:
        for source, ids in zip(sources, every_id, strict=True):
            first = 0
            for crops in masked_crops(source, processor, model, 0.0, 0, max_crops, batch_size):
                ours = ids[first : first + len(crops.keys)]
                first += len(ours)
                for sensor, blocks in route_tokens(model, crops, source).items():
                    count[sensor] += len(ours)
                    groups[sensor] |= {(source.name, place) for place in crops.group_ids}
                    for tally, best, tokens in zip(tallies, top, blocks, strict=True):
                        found = _list_crops(source, sensor, crops, ours, *tally[sensor].add(tokens))
                        for expert, crops_of_expert in enumerate(found):
                            ranked = sorted(best[expert] + crops_of_expert, key=_taken, reverse=True)
                            best[expert] = ranked[:top_crops]
                progress.update(len(ours))
    return {
        "measure": "share of the choices of a sensor's valid tokens by expert, nothing masked; entropies in bits",
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "max_entropy_bits": math.log2(config.num_experts),
        "n": {sensor: {"crops": count[sensor], "places": len(groups[sensor])} for sensor in sensors},
        "blocks": [
            {
                "name": f"layers.{stage}.blocks.{block}",
                "stage": stage,
                "block": block,
                "stride": config.patch_size * 2**stage,
                "sensors": {sensor: found.summary() for sensor, found in tally.items()},
                "mutual_information_bits": _mutual_information([found.choices[:-1] for found in tally.values()]),
                "experts": best,
            }
            for (stage, block), tally, best in zip(places, tallies, top, strict=True)
        ],
    }


@contextmanager
def _evaluating(model: MsGFMForPreTraining) -> Iterator[None]:
    """Evaluation mode, and afterwards whatever mode the model was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _refuse_dense(model: MsGFMForPreTraining):
    if not any(model.config.moe_blocks):
        raise ValueError(
            f"`model` must have experts, got `moe_blocks` {model.config.moe_blocks}. Pretrain one with experts, as all "
            "recipes here do."
        )


def _list_crops(source, sensor, crops, ids, valid, taken, gates) -> list[list[dict]]:
    """Per expert, the crops of a batch of which it takes something."""
    return [
        [
            {
                "source": source.name,
                "sensor": sensor,
                "key": crops.keys[i],
                "group_id": crops.group_ids[i],
                **dict(zip(("row", "top", "left"), map(int, ids[i]), strict=True)),
                "tokens": int(valid[i]),
                "share": (taken[i, expert] / valid[i]).item(),
                "gate": (gates[i, expert] / taken[i, expert]).item(),
            }
            for i in taken[:, expert].nonzero().flatten().tolist()
        ]
        for expert in range(taken.shape[1])
    ]


def _taken(crop: dict) -> tuple[int, float]:
    # Many crops are taken whole: of these the router is surest of some.
    return round(crop["share"] * crop["tokens"]), crop["gate"]


def _mutual_information(choices: list[torch.Tensor]) -> float:
    shares = [found / found.sum() for found in choices if found.sum()]
    if not shares:
        return 0.0
    apart = sum(map(_entropy, shares)) / len(shares)
    return max(_entropy(torch.stack(shares).mean(0)) - apart, 0.0)


def prune_experts(
    model: MsGFMForPreTraining,
    processor: MsGFMImageProcessor,
    sources: Sequence[ShardSource],
    sensors: Sequence[str],
    max_crops: int | None = CHOOSING_CROPS,
    batch_size: int = 16,
) -> tuple[MsGFMForPreTraining, list[dict]]:
    """A dense model for some of the sensors of a model with experts.

    In each block the expert with the largest gate summed over the tokens of these sensors, all sensors weighing the
    same, becomes the MLP. An expert's output is multiplied by its gate before it joins the residual, so the second
    layer of the MLP is multiplied by the mean gate of the tokens that the expert takes: with the gate left out,
    updates would be 1 / gate too large. What other experts did for these sensors is lost; `pruning_cost` measures it.
    Embeddings and decoders of other sensors go with their experts.

    Args:
        model: with experts.
        processor, max_crops, batch_size: as of `analyse_experts`.
        sources: training splits, which choose the experts; those without one of the sensors are not read.
        sensors: those to keep.

    Returns:
        the dense model, on the device and in the type of `model`, and per block `name`, `expert`, `gate` (0..1) and
        `share` (0..1, of the choices of the sensors' tokens that fall on this expert).

    Raises:
        ValueError: if the model has no experts, or sensors are unknown, in none of the sources, or nowhere valid.
    """
    _refuse_dense(model)
    unknown = [sensors] if isinstance(sensors, str) else [s for s in sensors if s not in model.config.sensors]
    if unknown or not sensors:
        raise ValueError(
            f"`sensors` to keep must be a list of some of the model ({', '.join(model.config.sensors)}), got "
            f"{', '.join(map(repr, unknown)) or 'none'}. Correct or remove it."
        )
    shared = _with_sensors(sources, sensors)
    missing = sorted(set(sensors).difference(*(source.sensors for source in shared)))
    if missing:
        raise ValueError(
            f"`sensors` must be in the sources that choose the experts, got {', '.join(missing)} beside "
            f"{', '.join(source.name for source in sources) or 'no source'}. Add a source with it."
        )
    report = analyse_experts(model, processor, shared, max_crops, 0, batch_size)
    unseen = [sensor for sensor, row in report["blocks"][0]["sensors"].items() if not row["tokens"]]
    if unseen:
        raise ValueError(
            f"`sources` must have valid pixels of every sensor to keep, got none of {', '.join(unseen)}. Look with "
            "`msgfm inspect`."
        )
    chosen = [_choose(block, report["num_experts"]) for block in report["blocks"]]
    return _dense(model, sensors, {found["name"]: found for found in chosen}), chosen


def _with_sensors(sources: Sequence[ShardSource], sensors: Sequence[str]) -> list[ShardSource]:
    """The sources that have some of the sensors, without their others."""
    shared = [(source, sorted(set(source.sensors) & set(sensors))) for source in sources]
    return [ShardSource(source.path, source.split, found) for source, found in shared if found]


def _choose(block: dict, num_experts: int) -> dict:
    rows = list(block["sensors"].values())
    share = [sum(row["share"][e] for row in rows) / len(rows) for e in range(num_experts)]
    summed = [sum(row["share"][e] * (row["gate"][e] or 0) for row in rows) / len(rows) for e in range(num_experts)]
    expert = max(range(num_experts), key=summed.__getitem__)
    return {
        "name": block["name"],
        "expert": expert,
        "gate": summed[expert] / share[expert],
        "share": share[expert],
    }


def _dense(model: MsGFMForPreTraining, sensors: Sequence[str], chosen: dict[str, dict]) -> MsGFMForPreTraining:
    fields = model.config.to_dict()
    fields["sensors"] = {sensor: fields["sensors"][sensor] for sensor in sorted(sensors)}
    # Where no expected input is left, the first sensor becomes it, with all its bands.
    fields["inputs"] = {sensor: bands for sensor, bands in fields["inputs"].items() if sensor in sensors} or {
        min(sensors): model.config.sensor(min(sensors)).band_names
    }
    fields["moe_blocks"] = [[] for _ in fields["depths"]]
    # Every parameter is replaced: the caller's random numbers shall not notice that it had first values.
    with torch.random.fork_rng(devices=[]):
        dense = MsGFMForPreTraining(MsGFMConfig.from_dict(fields))
    theirs = model.state_dict()
    for name, choice in chosen.items():
        mlp = f"msgfm.encoder.{name}.mlp"
        for layer, stored, factor in (("fc1", "up_proj", 1.0), ("fc2", "down_proj", choice["gate"])):
            for kind, ending in (("weight", ""), ("bias", "_bias")):
                theirs[f"{mlp}.{layer}.{kind}"] = theirs[f"{mlp}.experts.{stored}{ending}"][choice["expert"]] * factor
    dense.load_state_dict({name: theirs[name] for name in dense.state_dict()})
    return dense.to(model.device, model.dtype).eval()


def pruning_cost(
    model: MsGFMForPreTraining,
    dense: MsGFMForPreTraining,
    processor: MsGFMImageProcessor,
    sources: Sequence[ShardSource],
    mask_ratio: float = 0.6,
    mask_seeds: int = 8,
    max_crops: int | None = None,
) -> list[dict]:
    """Masked L1 of a model with experts and of the dense one made of it, on the same crops and masks.

    Beside it, the dense model with the update of those blocks' MLPs left out: where this costs no more, it is not the
    choice of experts that keeps the error low, but that the experts do little.

    Args:
        model, dense: as of `prune_experts`.
        processor: of `model`.
        sources: held-out splits; of each, the sensors that `dense` has are read.
        mask_ratio: share of masked cells.
        mask_seeds: every crop is masked this many times, differently.
        max_crops: at most this many crops of each source, spread evenly; `None` for all.

    Returns:
        one dictionary per source and direction: `source, input, target, crops` (n), `places` (their number), `moe`,
        `dense` and `without` (masked L1 in normalised units, see `msgfm_hf.tasks.reconstruction`), `ratio` (dense /
        moe) and `band_mean`, the error of the training places' mean.
    """
    without = copy.deepcopy(dense)
    with torch.no_grad():
        for stage, block in _expert_blocks(model.config):
            for parameter in without.msgfm.encoder.layers[stage].blocks[block].mlp.fc2.parameters():
                parameter.zero_()
    shared = _with_sensors(sources, list(dense.config.sensors))
    known = {
        source.name: training_statistics(
            ShardSource(source.path, "train", source.sensors), processor, model.config.image_size
        )
        for source in shared
    }
    networks = {"moe": model, "dense": dense, "without": without}
    passes: dict[str, list[list[dict]]] = {name: [] for name in networks}
    with tqdm(total=len(networks) * mask_seeds, desc="comparing", unit="pass") as progress:
        for seed in range(mask_seeds):
            for name, network in networks.items():
                passes[name].append(
                    evaluate_reconstruction(
                        network, processor, shared, known, mask_ratio, seed, max_crops, with_baselines=False
                    )
                )
                progress.update(1)
    rows = []
    for number, row in enumerate(passes["moe"][0]):
        errors = {name: fmean(found[number]["l1"] for found in rows_by_seed) for name, rows_by_seed in passes.items()}
        rows.append(
            {
                **{name: row[name] for name in ("source", "input", "target", "crops", "places")},
                **errors,
                "ratio": errors["dense"] / errors["moe"] if errors["moe"] else None,
                "band_mean": fmean(found[number]["band_mean"] for found in passes["moe"]),
            }
        )
    return rows


def expert_crops(
    model: MsGFMForPreTraining,
    processor: MsGFMImageProcessor,
    sources: Sequence[ShardSource],
    report: dict,
    number: int,
) -> list[list[ExpertCrop]]:
    """The top crops of each expert of one block of a report, with the tokens that the expert takes.

    Args:
        model, processor, sources: as of `analyse_experts`.
        report: of `analyse_experts`.
        number: of the block in `report["blocks"]`.

    Returns:
        one list per expert.
    """
    by_name = {source.name: source for source in sources}
    rows = []
    with _evaluating(model):
        for expert, top in enumerate(report["blocks"][number]["experts"]):
            rows.append([])
            for found in top:
                source, sensor = by_name[found["source"]], found["sensor"]
                crops = EvaluationCrops(source, model.config.image_size)
                crops.ids = [(found["row"], found["top"], found["left"])]
                part = collate([crops[0]])["sources"][0]
                pixels, valid = normalise(part["images"], source, processor, model.device)
                batch = MaskedCrops(part["group_ids"], part["keys"], pixels, valid, {}, model.config.patch_size)
                tokens = route_tokens(model, batch, source)[sensor][number]
                taken = (tokens.experts[0] == expert).any(-1) & tokens.valid[0]
                rows[-1].append(ExpertCrop(source, sensor, batch, found, taken.cpu().numpy(), tokens.stride))
    return rows


def report_experts(
    run: str | Path,
    data: Sequence[str | Path] | None = None,
    out: str | Path | None = None,
    split: str = "val",
    max_crops: int | None = None,
    prune: Sequence[str] | None = None,
    command: str | None = None,
) -> dict:
    """Write what there is to say about the experts of a saved model: experts.json, experts.png and crops.png.

    Args:
        run: the folder of a run, of a checkpoint, or of any saved model.
        data: folders of shards; default those of the run that the model is of. Sources without the split are left out.
        out: folder to write into, default `experts` in `run`.
        split: whose crops are shown.
        max_crops: at most this many crops per source, evenly spread.
        prune: sensors for which to write a dense model into `out`/dense, chosen on the training split.
        command: what to write down as the command that made the report.

    Returns:
        the report of `analyse_experts`, with what made it and, where pruned, `dense`: `sensors`, `parameters` and
        `parameters_moe` (in all), `chosen` and `cost`, as of `prune_experts` and `pruning_cost`.

    Raises:
        ValueError: if the folder is no model, the model has no experts, or data or sensors do not fit.
        CheckpointError: if something cannot be written.
    """
    run, out = Path(run), Path(run) / "experts" if out is None else Path(out)
    for name in ("config.json", "preprocessor_config.json"):
        if not (run / name).is_file():
            raise ValueError(
                f"`run` must be the folder of a saved model and its image processor, got {str(run)!r} without {name}. "
                "Pretraining writes both."
            )
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out` must be a folder, got the file {str(out)!r}. Name another.")
    folders = _folders(run, data)
    sources = _with_split(folders, split)
    if not sources:
        raise ValueError(
            f"`data` must hold a source with the split {split!r}, got {', '.join(folders)}. Look with `msgfm inspect`."
        )
    if prune and split == "train":
        raise ValueError(
            "`split` must be held out to tell what pruning costs, got 'train', which chooses the experts. Leave it out."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MsGFMForPreTraining.from_pretrained(run).to(device).eval()
    processor = MsGFMImageProcessor.from_pretrained(run)
    _refuse_dense(model)
    saved_as = ", ".join(model.config.architectures or ["an unnamed model"])
    if prune and saved_as != type(model).__name__:
        raise ValueError(f"`run` must have decoders to be pruned, got {saved_as}. Prune it before you fine-tune it.")
    report = {
        "command": command,
        "commit": source_commit(),
        "torch": torch.__version__,
        "device": device.type,
        "model": str(run),
        "data": [source.path for source in sources],
        "split": split,
    }
    if prune:
        # First, so that a wrong sensor is refused before the long part.
        training = _with_split(folders, "train")
        dense, chosen = prune_experts(
            model, processor, training, prune, CHOOSING_CROPS if max_crops is None else max_crops
        )
        # The band mean is that of the training places.
        held_out = [source for source in sources if source.path in {found.path for found in training}]
        pruned = {
            "sensors": list(dense.config.sensors),
            "parameters": count_parameters(dense).total,
            "parameters_moe": count_parameters(model).total,
            "chosen": chosen,
            "cost": pruning_cost(model, dense, processor, held_out, max_crops=max_crops),
        }
    report |= analyse_experts(model, processor, sources, max_crops)
    told = [block["mutual_information_bits"] for block in report["blocks"]]
    number = told.index(max(told))
    rows = expert_crops(model, processor, sources, report, number)
    with checkpoint_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if prune:
            report["dense"] = pruned
            save_model(out / "dense", dense, MsGFMImageProcessor.from_config(dense.config))
        draw_experts(report, out / "experts.png")
        draw_expert_crops(processor, report["blocks"][number], rows, out / "crops.png")
        write_report(report, out / "experts.json")
    return report


def _with_split(folders: Sequence[str], split: str) -> list[ShardSource]:
    return [ShardSource(folder, split) for folder in folders if split in shard_splits(folder)]


def _folders(run: Path, data: Sequence[str | Path] | None) -> list[str]:
    """The sources of `data`, or those that the run of a model trained on."""
    if data is not None:
        folders = [folder for path in data for folder in find_sources(path)]
    else:
        made_by = run_record(run)
        if made_by is None:
            raise ValueError(
                f"`data` must be given for a model that is not of a run, got none and no run.json in {str(run)!r}. "
                "Name folders of shards with `--data`."
            )
        trained = made_by["identity"]["sources"]
        found = [folder for path in made_by["recipe"]["data"] for folder in find_sources(path)]
        folders = [folder for folder in found if Path(folder).name in trained]
    names = [Path(folder).name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"`data` must hold each source once, got {', '.join(sorted(names))}. Leave one out.")
    return folders


def format_experts(report: dict) -> str:
    """The report as text: per block a row per sensor, and what pruning costs."""
    most = report["max_entropy_bits"]
    lines = []
    for block in report["blocks"]:
        sensors = block["sensors"]
        limit = min(most, math.log2(len(sensors)))
        told = f"the sensor tells {block['mutual_information_bits']:.2f} of at most {limit:.2f} bits of the expert"
        lines.append(f"{block['name']} (tokens of {block['stride']} px): {told}")
        heads = "".join(f"{f'e{expert}':>7}" for expert in range(report["num_experts"]))
        lines.append(f"  {'sensor':<10}{'crops':>7}{'places':>8}{'tokens':>9}{heads}   entropy    gate")
        for sensor, row in sensors.items():
            n = report["n"][sensor]
            cells = "".join(f"{share:>7.0%}" for share in row["share"]) + f"{row['entropy_bits']:>10.2f}"
            gate = "      -" if row["mean_gate"] is None else f"{row['mean_gate']:>7.2f}"
            lines.append(f"  {sensor:<10}{n['crops']:>7}{n['places']:>8}{row['tokens']:>9}{cells} {gate}")
        lines.append("")
    lines.append(f"Entropy of a sensor's shares in bits, at most {most:.2f}; gate: mean probability of the chosen.")
    if "dense" in report:
        lines += ["", *_format_dense(report["dense"])]
    if min(n["places"] for n in report["n"].values()) < 3:
        lines = ["Demonstration, not evidence: fewer than three places for a sensor.", "", *lines]
    return "\n".join(lines)


def _format_dense(dense: dict) -> list[str]:
    lines = [
        f"Dense model for {', '.join(dense['sensors'])}: {dense['parameters']:,} parameters, from "
        f"{dense['parameters_moe']:,}."
    ]
    for found in dense["chosen"]:
        lines.append(
            f"  {found['name']} <- expert {found['expert']} x {found['gate']:.2f} (took {found['share']:.0%} of the "
            "choices)"
        )
    lines += ["", "Masked L1 in normalised units, lower is better; n counts crops. Without: these MLPs left out.", ""]
    lines.append("| source | direction | n | places | MoE | dense | dense / MoE | without | band mean |")
    lines.append("|---|---|---|---|---|---|---|---|---|")
    without = [row["without"] / row["moe"] for row in dense["cost"] if row["moe"]]
    if without and max(abs(ratio - 1) for ratio in without) < 0.02:
        lines.insert(1, "Leaving these MLPs out changes no error by 2 %: the experts do little here, pruned or not.")
    for row in dense["cost"]:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(
            f"| {row['source']} | {row['input']} → {row['target']} | {row['crops']} | {row['places']} | "
            f"{row['moe']:.3f} | {row['dense']:.3f} | {ratio} | {row['without']:.3f} | {row['band_mean']:.3f} |"
        )
    return lines
