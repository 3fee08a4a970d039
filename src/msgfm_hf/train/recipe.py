"""Recipes: what a run does, as flat YAML that is read strictly.

Field names are those of `transformers.TrainingArguments` where it has them.
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import yaml
from transformers import PreTrainedConfig

from msgfm_hf.data.batch import LOSS_REGIONS
from msgfm_hf.data.shards import find_sources
from msgfm_hf.model.configuration_msgfm import MsGFMConfig

# The three sizes of design: `base` is the paper's, `tiny` learns on a laptop's CPU in minutes.
MODEL_SIZES = {
    "tiny": {
        "embed_dim": 48,
        "depths": [2, 2, 6],
        "num_heads": [2, 4, 8],
        "num_experts": 4,
        "image_size": 96,
        "mask_patch_size": 16,
        # The paper's 0.02 suits its widths of 128 to 1024; here it would leave every branch silent for long.
        "initializer_range": 0.06,
    },
    "small": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "base": {},
}
DATA_MAKERS = ("none", "synthetic", "sample")
SCHEDULERS = ("multistep", "cosine")
PRECISIONS = ("auto", "no", "bf16")


def _option(default, text: str):
    factory = {"default_factory": default.copy} if isinstance(default, list | dict) else {"default": default}
    return field(**factory, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """One pretraining run. Every field can be given as `--field value`.

    Raises:
        ValueError: for values out of range, and for unknown fields (with the nearest known one).
    """

    name: str = _option("run", "name of the run; its default folder is runs/NAME")
    output_dir: str = _option("", "folder of the run (default runs/NAME)")
    model_size: str = _option("tiny", "tiny, small or base (the paper's)")
    init_from: str = _option(
        "", "checkpoint to start from, a folder or a repository: its architecture, not `model_size`"
    )
    model: dict = _option({}, "fields of MsGFMConfig that differ from the size, as YAML: '{num_experts: 8}'")
    make_data: str = _option("none", "make the shards in `data` where they are missing: synthetic, sample or none")
    data: list[str] = _option([], "folders of shards: a source, or a folder of sources")
    streams: dict[str, dict] = _option(
        {},
        "sources that stream from Major-TOM Core, as YAML: "
        "'{majortom: {paths: {s2: Major-TOM/Core-S2L2A, s1: Major-TOM/Core-S1RTC}, num_rows: 100000}}'",
    )
    sensors: list[str] = _option([], "read these sensors alone, where a source has them: '[s1, dsm]'; empty: all")
    batch_sizes: dict[str, int] = _option(
        {}, "samples per batch and process of each source: '{naip: 16}'; empty: 16 each"
    )
    gradient_accumulation_steps: int = _option(1, "batches per process and step, one after the other")
    max_steps: int = _option(-1, "steps of the optimiser; -1: as many as `num_train_epochs` has")
    num_train_epochs: float = _option(1.0, "passes over the longest source, where `max_steps` is -1")
    learning_rate: float = _option(1e-4, "learning rate of the largest sub-batch's sensors")
    warmup_steps: float = _option(0.1, "steps of linear warm-up; below 1 a share of all steps")
    warmup_learning_rate: float = _option(5e-7, "where the warm-up starts")
    lr_scheduler_type: str = _option("multistep", "after the warm-up: multistep or cosine")
    lr_milestones: list[float] = _option([], "multistep: shares of all steps at which the rate is multiplied by gamma")
    lr_gamma: float = _option(0.1, "multistep: what the rate is multiplied by")
    weight_decay: float = _option(0.05, "AdamW's weight decay, on matrices only")
    adam_beta1: float = _option(0.9, "AdamW's beta 1")
    adam_beta2: float = _option(0.999, "AdamW's beta 2")
    adam_epsilon: float = _option(1e-8, "AdamW's epsilon")
    max_grad_norm: float = _option(5.0, "gradients are clipped to this norm")
    mask_ratio: float = _option(0.6, "share of masked cells")
    cross_sensor_ratio: float = _option(0.5, "probability that a source's sensors predict each other in a step")
    cross_loss_region: str = _option("masked", "where a crossing's loss counts: masked (the paper) or all")
    mixed_precision: str = _option("auto", "bf16, no, or auto: bf16 where the machine computes in it")
    gradient_checkpointing: bool = _option(False, "compute activations twice instead of keeping them: less memory")
    fsdp: bool = _option(False, "share weights and the optimiser's state among the processes (FSDP2): less memory")
    seed: int = _option(0, "seed of weights, order, crops, masks and crossings")
    dataloader_num_workers: int = _option(0, "processes that read data")
    max_bad: int = _option(64, "damaged rows to skip and list before the run stops; a damaged page costs 16")
    on_bad_loss: str = _option("stop", "at a loss that is not finite, or a spike: stop, or skip the step")
    max_loss_ratio: float = _option(
        0.0, "a loss above this many times the median of the last 100 steps is a spike; 0: none is"
    )
    max_skipped_steps: int = _option(100, "steps to skip before the run stops after all")
    logging_steps: int = _option(10, "steps between lines of metrics.jsonl")
    eval_steps: int = _option(200, "steps between evaluations on the validation split")
    save_steps: int = _option(200, "steps between checkpoints")
    save_total_limit: int = _option(2, "checkpoints to keep")
    eval_max_crops: int = _option(64, "validation crops per source in evaluations during the run")
    report_to: list[str] = _option([], "trackers beside metrics.jsonl, as YAML: '[tensorboard]'; those of Accelerate")
    log_samples: bool = _option(False, "write the keys of every batch to samples/rank-N.jsonl")

    def __post_init__(self):
        def need(holds, name, rule):
            if not holds:
                raise ValueError(
                    f"`{name}` must {rule}, got {getattr(self, name)!r}. Correct the recipe or the option."
                )

        for name, choices in (
            ("model_size", MODEL_SIZES),
            ("make_data", DATA_MAKERS),
            ("lr_scheduler_type", SCHEDULERS),
            ("mixed_precision", PRECISIONS),
            ("cross_loss_region", LOSS_REGIONS),
            ("on_bad_loss", ("stop", "skip")),
        ):
            need(getattr(self, name) in choices, name, f"be one of {', '.join(choices)}")
        for name in ("mask_ratio", "cross_sensor_ratio"):
            need(0 <= getattr(self, name) <= 1, name, "be within 0..1")
        for name in (
            "logging_steps",
            "eval_steps",
            "save_steps",
            "save_total_limit",
            "eval_max_crops",
            "gradient_accumulation_steps",
            "learning_rate",
            "adam_epsilon",
            "max_grad_norm",
            "lr_gamma",
        ):
            need(0 < getattr(self, name) < math.inf, name, "be above 0 and finite")
        for name in ("adam_beta1", "adam_beta2"):
            need(0 <= getattr(self, name) < 1, name, "be at least 0 and below 1")
        for name in (
            "warmup_steps",
            "weight_decay",
            "dataloader_num_workers",
            "max_bad",
            "seed",
            "num_train_epochs",
            "max_loss_ratio",
            "max_skipped_steps",
        ):
            need(0 <= getattr(self, name) < math.inf, name, "be 0 or more, and finite")
        need(self.seed < 2**32, "seed", "be below 2 ** 32")
        need(self.name, "name", "not be empty")
        need(self.max_steps == -1 or self.max_steps > 0, "max_steps", "be above 0, or -1 for `num_train_epochs`")
        need(all(0 < share < 1 for share in self.lr_milestones), "lr_milestones", "be shares of the run, within 0..1")
        need(all(size > 0 for size in self.batch_sizes.values()), "batch_sizes", "be above 0 for every source")
        need(not {"sensors", "inputs"} & set(self.model), "model", "leave `sensors` and `inputs` to the data")
        fields = {entry.name for entry in dataclasses.fields(MsGFMConfig)}
        for name in self.model:
            near = difflib.get_close_matches(name, fields, n=1)
            need(name in fields, "model", f"name fields of MsGFMConfig{f' (`{near[0]}`?)' if near else ''}")
        need(self.data or self.streams, "data", "name at least one folder of shards")
        need(not (self.streams and self.sensors), "sensors", "be left out with `streams`, whose `paths` name theirs")
        need(
            not (self.streams and self.dataloader_num_workers),
            "dataloader_num_workers",
            "be 0 with `streams`, which this process reads itself",
        )

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir or f"runs/{self.name}")

    def start_config(self) -> MsGFMConfig | None:
        """The configuration of `init_from`; `None` for a run that starts afresh.

        Raises:
            ValueError: if there is no msGFM checkpoint.
        """
        if not self.init_from:
            return None
        try:
            entries = PreTrainedConfig.get_config_dict(self.init_from)[0]
        except OSError as error:
            raise ValueError(
                f"`init_from` must be a checkpoint, a folder or a repository of the Hub, got {self.init_from!r}, which "
                f"cannot be read ({str(error).splitlines()[0]}). Check the name."
            ) from error
        if entries.get("model_type") != MsGFMConfig.model_type:
            raise ValueError(
                f"`init_from` must be an msGFM checkpoint, got one of type {entries.get('model_type')!r} in "
                f"{self.init_from!r}. Turn it into one with `msgfm convert`."
            )
        return MsGFMConfig.from_pretrained(self.init_from)

    def model_config(
        self, sensors: dict[str, dict], inputs: dict[str, list[str]], start: MsGFMConfig | None = None
    ) -> MsGFMConfig:
        """The configuration of the model this recipe trains, with exactly these sensors.

        With `start` the architecture is that of this configuration, but for the fields of `model`.
        """
        if start is None:
            return MsGFMConfig(**{**MODEL_SIZES[self.model_size], **self.model}, sensors=sensors, inputs=inputs)
        everyones = {entry.name for entry in dataclasses.fields(PreTrainedConfig)}
        own = [entry.name for entry in dataclasses.fields(MsGFMConfig) if entry.name not in everyones]
        fields = {name: getattr(start, name) for name in own if not name.startswith("_")}
        # Networks of the offset keep the scale they were learned with.
        fields["pretrained_window_sizes"] = [
            0 if window == self.model.get("window_size", start.window_size) else window
            for window in (size or start.window_size for size in start.pretrained_window_sizes)
        ]
        return MsGFMConfig(**{**fields, **self.model, "sensors": sensors, "inputs": inputs})

    def warmup(self, max_steps: int) -> int:
        return round(self.warmup_steps * max_steps) if self.warmup_steps < 1 else round(self.warmup_steps)


def learning_rate_factor(recipe: Recipe, step: int, max_steps: int) -> float:
    """The learning rate at a step over `learning_rate`: linear warm-up, then Table 10's multistep, or a cosine to 0."""
    warmup = recipe.warmup(max_steps)
    if step < warmup:
        start = recipe.warmup_learning_rate / recipe.learning_rate
        return start + (1 - start) * step / warmup
    if recipe.lr_scheduler_type == "multistep":
        return recipe.lr_gamma ** sum(step >= share * max_steps for share in recipe.lr_milestones)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(max_steps - warmup, 1)))


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _recipe_folder().iterdir() if path.name.endswith(".yaml"))


def _recipe_folder():
    return resources.files("msgfm_hf").joinpath("recipes")


def load_recipe(name_or_file: str, overrides: dict | None = None) -> Recipe:
    """Read a recipe by name or from a YAML file, with some fields replaced.

    The line `extends: NAME` takes the fields of another recipe for those that a file leaves out.

    Raises:
        ValueError: if there is none of that name, the YAML is not a mapping, recipes extend each other in a circle, or
            a field is unknown or of a wrong type.
    """
    entries: dict = {}
    chain = [name_or_file]
    while True:
        found = _read_entries(chain[-1])
        parent = found.pop("extends", None)
        entries = found | entries
        if parent is None:
            return build_recipe({**entries, **(overrides or {})})
        if parent in chain:
            raise ValueError(
                f"`extends` must lead to a recipe that extends none, got {' -> '.join([*chain, parent])}. "
                "Leave one of them out."
            )
        chain.append(parent)


def _read_entries(name_or_file: str) -> dict:
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(
                f"`recipe` must be a file or a name ({', '.join(recipe_names())}), got {name_or_file!r}. "
                "There is no such file: correct the path."
            )
        text = path.read_text()
    elif name_or_file in recipe_names():
        text = _recipe_folder().joinpath(f"{name_or_file}.yaml").read_text()
    else:
        near = difflib.get_close_matches(name_or_file, recipe_names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else " A file of your own ends in .yaml."
        raise ValueError(f"`recipe` must be one of {', '.join(recipe_names())}, got {name_or_file!r}.{hint}")
    try:
        entries = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"`recipe` must be YAML, got {name_or_file!r}: {error}. Correct the file.") from None
    if not isinstance(entries, dict):
        raise ValueError(
            f"`recipe` must be lines of `field: value`, got {type(entries).__name__} in {name_or_file!r}. "
            "Look at the recipes that come with the package."
        )
    return entries


def build_recipe(entries: dict) -> Recipe:
    """A recipe from plain values, strictly.

    Raises:
        ValueError: for an unknown field (naming the nearest) or a value of the wrong type.
    """
    known = {entry.name: entry for entry in dataclasses.fields(Recipe)}
    types_of = typing.get_type_hints(Recipe)
    values = {}
    for name, value in entries.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ValueError(f"`{name}` must be a field of a recipe, got {value!r}.{hint} See `--help` for all.")
        wanted = typing.get_origin(types_of[name]) or types_of[name]
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if wanted is float and isinstance(value, str):
            # YAML 1.1 reads 1e-4 as a word.
            with contextlib.suppress(ValueError):
                value = float(value)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ValueError(f"`{name}` must be a {wanted.__name__}, got {value!r}. Correct the recipe or the option.")
        for kind, members in zip(typing.get_args(types_of[name]), _columns(value), strict=False):
            for member in members:
                if isinstance(member, bool) or not isinstance(member, (int, float) if kind is float else kind):
                    raise ValueError(
                        f"`{name}` must hold a {kind.__name__}, got {member!r} in {value!r}. Correct the recipe or the "
                        "option."
                    )
        values[name] = value
    return Recipe(**values)


def _columns(value) -> list[list]:
    """Keys and values of a mapping, members of a list."""
    return [list(value), list(value.values())] if isinstance(value, dict) else [value]


def add_recipe_arguments(parser: argparse.ArgumentParser):
    """`--recipe`, `--data` (repeatable) and one option per field; their help is the fields' own."""
    parser.add_argument("--recipe", default="quickstart", help="name of a recipe, or a YAML file (default quickstart)")
    group = parser.add_argument_group("fields of the recipe (see its YAML for the values it has)")
    for entry in dataclasses.fields(Recipe):
        option = {"help": entry.metadata["help"], "default": argparse.SUPPRESS, "metavar": "VALUE"}
        if entry.name == "data":
            group.add_argument("--data", action="append", **{**option, "metavar": "DIR"})
        else:
            names = dict.fromkeys((f"--{entry.name}", f"--{entry.name.replace('_', '-')}"))
            group.add_argument(*names, type=_value(entry), **option)


def _value(entry):
    """How the text of an option becomes a value: as YAML, except where the field is text."""

    def parse(text: str):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise argparse.ArgumentTypeError(f"`{entry.name}` must be YAML, got {text!r}: {error}") from None

    return str if typing.get_type_hints(Recipe)[entry.name] is str else parse


def recipe_from_arguments(arguments: argparse.Namespace) -> Recipe:
    """The recipe that `--recipe` names, with the fields given on the command line.

    Folders of `--data` are the mixture, and nothing is made. The quickstart lends its other fields to any data, as a
    run named `run`.

    Raises:
        ValueError: as `load_recipe`, for folders without shards, and where a source of the recipe's sub-batches is
            missing.
    """
    fields = {entry.name for entry in dataclasses.fields(Recipe)}
    given = {name: value for name, value in vars(arguments).items() if name in fields}
    if "data" not in given:
        return load_recipe(arguments.recipe, given)
    recipe = load_recipe(arguments.recipe, {"make_data": "none", **given})
    there = {Path(folder).name for data in recipe.data for folder in find_sources(data)}
    missing = sorted(set(recipe.batch_sizes) - there - set(recipe.streams))
    if not missing or ("batch_sizes" in given and arguments.recipe != "quickstart"):
        return recipe
    if arguments.recipe != "quickstart":
        raise ValueError(
            f"`data` must hold the sources of recipe {arguments.recipe!r}, {', '.join(recipe.batch_sizes)}, got no "
            f"{', '.join(missing)} beside {', '.join(sorted(there))}. Make it, or say what to train on, such as "
            f"--batch_sizes '{{{min(there)}: 32}}'."
        )
    return load_recipe(arguments.recipe, {"make_data": "none", "batch_sizes": {}, "name": "run", **given})
