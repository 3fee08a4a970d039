"""Cards of checkpoints and of shards, rendered from what they hold and from what their publisher states."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path

import yaml
from huggingface_hub import (
    DatasetCard,
    DatasetCardData,
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from msgfm_hf.data.shards import ShardSource, find_sources, shard_splits
from msgfm_hf.model.configuration_msgfm import MsGFMConfig
from msgfm_hf.model.image_processing_msgfm import takes_pictures
from msgfm_hf.model.sensors import SensorSpec

FACTS = "card.yaml"
# An absolute path, of the machine or of a user's home; addresses of the net are not meant.
_PATH = re.compile(r"(?<![\w.:/~-])(?:file://|~\w*)?/(?:[^/\s,'\"]+/)*([^/\s,'\"]+)/?(?=[\s,'\"]|$)")
NOT_STATED = "not stated"
# Auto class, pipeline tag and our own pipeline of each class that can be published.
CLASSES = {
    "MsGFMModel": ("AutoModel", "image-feature-extraction", "multisensor-image-feature-extraction"),
    "MsGFMBackbone": ("AutoModel", "image-feature-extraction", "multisensor-image-feature-extraction"),
    "MsGFMForPreTraining": (
        "AutoModelForPreTraining",
        "image-feature-extraction",
        "multisensor-image-feature-extraction",
    ),
    "MsGFMForImageClassification": (
        "AutoModelForImageClassification",
        "image-classification",
        "multisensor-image-classification",
    ),
    "MsGFMForSemanticSegmentation": (
        "AutoModelForSemanticSegmentation",
        "image-segmentation",
        "multisensor-image-segmentation",
    ),
}
_TAGS = ["remote-sensing", "earth-observation", "geospatial", "multisensor", "msgfm"]
_ARTEFACT = ("value", "n", "seed", "commit", "command", "origin")
_ORIGINS = ("run", "copied")
_MODEL_USE = [
    "Features of satellite and aerial images for one's own classifiers, segmenters and regressions, frozen or "
    "fine-tuned, on the sensors below."
]
_MODEL_LIMITS = [
    "Trained on the sensors, bands, levels and ground sampling distances above; others are extrapolation.",
    "Not evaluated beyond what stands under Results.",
]
_MODEL_BEWARE = [
    "Bands go by name and units are stated: a wrong order or unit is not always noticed. `processor.explain(image)` "
    "prints what happened to each band.",
    "Sentinel-2 products since baseline 04.00 have an offset of -1000 in their numbers; levels 1C and 2A have other "
    "statistics.",
    "Places of one's own test set may have been in the training data.",
]
_DATA_USE = ["Pretraining and evaluation with `msgfm_hf`, or anything that reads Parquet."]
_DATA_LIMITS = ["As those of the data that it was made of."]
_DATA_BEWARE = [
    "Rows of one `group_id` show one place: split by it, never by row.",
    "Invalid pixels hold the `nodata` value of `<sensor>_meta`, or NaN.",
]


@dataclass(frozen=True)
class Result:
    """A number on a card, with what made it.

    Args:
        task (`str`): what was done, in words or as a task id of the Hub.
        dataset (`str`): the name of the data.
        metric (`str`): its name and definition.
        value (`float`): of the metric.
        n (`int`): what it is a mean of.
        seed (`str` or `int`), commit (`str`), command (`str`): what makes it again; of a copied number, the version of
            the publication and the place in it.
        origin (`str`): `run` or `copied`.
        split (`str`, *optional*): of the data.
        source (`str`, *optional*): address of the publication a number is copied from.
        dataset_id, task_id (`str`, *optional*): of a benchmark on the Hub, for `.eval_results`.

    Raises:
        ValueError: if something of these is missing.
    """

    task: str
    dataset: str
    metric: str
    value: float
    n: int
    seed: str | int
    commit: str
    command: str
    origin: str
    split: str | None = None
    source: str | None = None
    dataset_id: str | None = None
    task_id: str | None = None

    @classmethod
    def from_dict(cls, entry: Mapping) -> "Result":
        """A result of a mapping, as it stands in a file.

        Raises:
            ValueError: naming what is missing, unknown or of the wrong kind.
        """
        known = {item.name: item for item in fields(cls)}
        unknown = sorted(set(entry) - set(known))
        missing = [
            name
            for name in (*_ARTEFACT, "task", "dataset", "metric")
            if not isinstance(entry.get(name), str | int | float) or not re.search(r"\w", str(entry[name]))
        ]
        told = entry.get("metric") or entry.get("task") or dict(entry)
        if unknown or missing:
            what = f"without {', '.join(missing)}" if missing else f"with {', '.join(unknown)}"
            raise ValueError(
                f"`results` must state {', '.join(_ARTEFACT)}, task, dataset and metric of each number, got {told!r} "
                f"{what}. A number without what made it is not published."
            )
        value, n = entry["value"], entry["n"]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"`value` of {told!r} must be a finite number, got {value!r}. Correct it.")
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"`n` of {told!r} must be a whole number above 0, got {n!r}. Count what was averaged.")
        if entry["origin"] not in _ORIGINS:
            raise ValueError(f"`origin` of {told!r} must be run or copied, got {entry['origin']!r}. Say which.")
        if entry["origin"] == "copied" and not entry.get("source"):
            raise ValueError(f"`source` of {told!r} must be given for a copied number, got none. Add its address.")
        if bool(entry.get("dataset_id")) != bool(entry.get("task_id")):
            raise ValueError(
                f"`dataset_id` of {told!r} must come with a `task_id`, got one of them. Give both or none."
            )
        return cls(**{**entry, "command": without_folders(entry["command"])})


@dataclass(frozen=True)
class CardFacts:
    """What a publisher states, `card.yaml`; all of it optional.

    Args:
        name, summary (`str`): the title, and a sentence under it.
        license (`str`): an id of the Hub, such as `apache-2.0`; license_name and license_link for `other`.
        base_model (`str`): id of the model on the Hub that this was made of.
        tags, datasets (`list[str]`): of the Hub, besides the usual ones.
        gsd (`dict[str, str]`): {sensor: ground sampling distances of the training data, such as "0.6 to 1 m"}.
        training_data (`list[dict]`): `name`, `license`, and optionally `url`, `note`.
        intended_use, limits, beware (`list[str]`): lines that are added to the usual ones.
        results (`list`): entries of `Result`, or names of files beside `card.yaml`: JSON or YAML lists of such entries,
            or reports of `msgfm evaluate --out`.
    """

    name: str | None = None
    summary: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | None = None
    tags: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    gsd: dict[str, str] = field(default_factory=dict)
    training_data: list[dict] = field(default_factory=list)
    intended_use: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    beware: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)


def read_facts(path: str | Path | None) -> CardFacts:
    """The facts of a file; `None` states nothing.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for unknown entries, entries of the wrong kind, and numbers without what made them.
    """
    if path is None:
        return CardFacts()
    path = Path(path)
    entries = {name: value for name, value in _read_yaml(path).items() if value is not None}
    kinds = {
        item.name: item.default_factory if item.default_factory in (list, dict) else str for item in fields(CardFacts)
    }
    unknown = sorted(set(entries) - set(kinds))
    if unknown:
        raise ValueError(f"`{path.name}` has the entries {', '.join(kinds)}, got {', '.join(unknown)}. Remove them.")
    for name, value in entries.items():
        if not isinstance(value, kinds[name]):
            kind = {list: "a list", dict: "entries", str: "text"}[kinds[name]]
            raise ValueError(f"`{name}` of {path.name} must be {kind}, got {value!r}. Correct it.")
        strange = [one for one in (value.values() if kinds[name] is dict else value) if not isinstance(one, str)]
        if strange and kinds[name] is not str and name not in ("training_data", "results"):
            raise ValueError(f"`{name}` of {path.name} must hold text, got {strange[0]!r}. Put it in quotes.")
    for data in entries.get("training_data", ()):
        if not isinstance(data, dict) or not data.get("name") or set(data) - {"name", "license", "url", "note"}:
            raise ValueError(
                f"`training_data` of {path.name} must be entries of name, license, url and note, got {data!r}. Correct "
                "it."
            )
    results = []
    for entry in entries.pop("results", ()):
        found = _read_results(path.parent / entry) if isinstance(entry, str) else [entry]
        results += [Result.from_dict(one if isinstance(one, dict) else {"metric": one}) for one in found]
    return CardFacts(**entries, results=results)


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"`{path.name}` must be an existing file, got {str(path)!r}. Check the name.")
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"`{path.name}` must be readable YAML, got {error}. Correct it.") from error
    if not isinstance(entries, dict):
        raise ValueError(f"`{path.name}` must hold entries, got a {type(entries).__name__}. Write `license: ...`.")
    return entries


def _read_results(path: Path) -> list[dict]:
    """Entries of a file of results, or of a report of `msgfm evaluate`."""
    if not path.is_file():
        raise FileNotFoundError(f"`results` must name an existing file, got {str(path)!r}. Check the name.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"`results` must be a readable file, got {str(path)!r} ({error}). Correct it.") from error
    if isinstance(content, dict) and {"rows", "trained", "measure"} <= set(content):
        # What made the models is in the report; without it there is no seed to state.
        trained = [made or {} for made in content["trained"]]
        seeds = ", ".join(str(made["seed"]) for made in trained if made.get("seed") is not None)
        several = f", median of {len(trained)} models of one recipe" if len(trained) > 1 else ""
        return [
            {
                "task": f"{row['input']} → {row['target']}",
                "dataset": row["source"],
                "split": content.get("split"),
                "metric": f"{content['measure']}; {row['crops']} crops of n places{several}",
                "value": row["l1"],
                # Crops of one place are not repetitions.
                "n": row["places"],
                "seed": seeds,
                "commit": content.get("commit"),
                "command": content.get("command"),
                "origin": "run",
            }
            for row in content["rows"]
        ]
    if not isinstance(content, list):
        raise ValueError(
            f"`results` must be a list of entries or a report of `msgfm evaluate --out`, got {str(path)!r} with a "
            f"{type(content).__name__}. Correct it."
        )
    return content


def render_model_card(
    config: MsGFMConfig,
    architecture: str,
    parameters: Mapping[str, int],
    repo_id: str,
    facts: CardFacts,
    made: Sequence[str] = (),
    origin: str | None = None,
    widget: Sequence[dict] = (),
    trained_on: Sequence[str] = (),
    example: str | None = None,
) -> ModelCard:
    """The card of a checkpoint.

    Args:
        config: its configuration.
        architecture: its class.
        parameters: `total` and `active`.
        repo_id: where it will lie.
        facts: what the publisher states.
        made: lines on how it was made.
        origin: a paragraph on what it is, for a converted checkpoint.
        widget: examples for the widget of the Hub, with stored outputs.
        trained_on: names of data that are known from the run, for want of `facts.training_data`.
        example: path of an example image in the repository, for the snippet.

    Returns:
        `ModelCard`: its text and metadata, `model-index` among them.

    Raises:
        ValueError: for facts on sensors that the checkpoint does not have.
    """
    auto, tag, task = CLASSES[architecture]
    unknown = sorted(set(facts.gsd) - set(config.sensors))
    if unknown:
        raise ValueError(
            f"`gsd` must be of sensors of the checkpoint ({', '.join(config.sensors)}), got {', '.join(unknown)}. "
            "Correct it."
        )
    name = facts.name or repo_id.rsplit("/", 1)[-1]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=tag,
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        base_model=facts.base_model,
        datasets=facts.datasets or None,
        tags=[*_TAGS, *sorted(config.sensors), *facts.tags],
        widget=list(widget) or None,
        model_name=name if facts.results else None,
        eval_results=[_eval_result(result, tag) for result in facts.results] or None,
    )
    picture = hosted_widget(config, architecture)
    return ModelCard.from_template(
        data,
        template_str=_template("model_card.md"),
        name=name,
        summary=facts.summary
        or "An msGFM model: one shared Swin encoder for the sensors below, given any subset of them.",
        origin=origin
        or "Made with `msgfm_hf`, an open implementation of msGFM. It is not a checkpoint of the paper's authors, who "
        "released none.",
        snippet=_model_snippet(repo_id, auto, task, config, example),
        sensors=[_sensor_row(SensorSpec.from_dict(spec), config, facts) for spec in config.sensors.values()],
        statistics="; ".join(
            f"{sensor}: {spec['source'] or NOT_STATED}" for sensor, spec in sorted(config.sensors.items())
        ),
        parameters={key: f"{value:,}" for key, value in parameters.items()},
        intended_use=[*_MODEL_USE, *facts.intended_use],
        limits=[*_MODEL_LIMITS, *facts.limits],
        beware=[*facts.beware, *_MODEL_BEWARE],
        training_data=_training_data(facts, trained_on),
        results=[_cells(vars(result)) for result in facts.results],
        few_places=any(result.origin == "run" and result.n < 3 for result in facts.results),
        made=list(made),
        hosted=(
            "The widget of the Hub can send a picture to this checkpoint; whether it does is up to the providers, most "
            "of whom run no custom code. "
            if picture
            else "The widget of the Hub cannot run this checkpoint: it sends pictures and runs no custom code. "
        )
        + "`handler.py` serves it on a dedicated endpoint: a picture, or base64 GeoTIFF or npz per sensor.",
    )


def hosted_widget(config: MsGFMConfig, architecture: str) -> bool:
    """Whether the stock pipelines take an ordinary picture for this checkpoint, which is all that a widget sends."""
    tasks = ("image-classification", "image-segmentation")
    if CLASSES[architecture][1] not in tasks or len(config.inputs) != 1:
        return False
    ((sensor, bands),) = config.inputs.items()
    return takes_pictures(SensorSpec.from_dict(config.sensors[sensor]), bands)


def render_eval_results(facts: CardFacts) -> str | None:
    """The YAML of `.eval_results` for results on benchmarks of the Hub; `None` without any."""
    entries = [
        EvalResultEntry(
            dataset_id=result.dataset_id,
            task_id=result.task_id,
            value=result.value,
            source_url=result.source,
            notes=f"{result.metric}; n={result.n}; seed {result.seed}; {result.origin}; `{result.command}` at "
            f"{result.commit}",
        )
        for result in facts.results
        if result.dataset_id and result.task_id
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None


def render_dataset_card(path: str | Path, repo_id: str, facts: CardFacts) -> DatasetCard:
    """The card of a folder of shards, one configuration per source.

    Raises:
        ValueError: if there are no shards.
    """
    rows, sensors, configs = [], [], []
    for folder in find_sources(path):
        splits = shard_splits(folder)
        for split in splits:
            source = ShardSource(folder, split)
            places = {row["group_id"] for row in source.read_metadata()}
            rows.append(
                {
                    "source": source.name,
                    "split": split,
                    "rows": f"{len(source):,}",
                    "places": f"{len(places):,}",
                    "sensors": ", ".join(source.sensors),
                }
            )
        described = source.read_metadata()
        for sensor in source.sensors:
            known = [row["images"][sensor] for row in described if row["images"].get(sensor)]
            distances = sorted({image["gsd"] for image in known if image["gsd"] is not None})
            sensors.append(
                {
                    "source": source.name,
                    "id": sensor,
                    "bands": ", ".join(source.bands[sensor]),
                    "unit": source.units[sensor],
                    "dtype": source.dtypes[sensor],
                    "gsd": _range(distances),
                }
            )
        configs.append(
            {
                "config_name": source.name,
                "data_files": [{"split": split, "path": f"data/{source.name}/{split}-*.parquet"} for split in splits],
            }
        )
    total = sum(int(row["rows"].replace(",", "")) for row in rows)
    data = DatasetCardData(
        license=facts.license,
        pretty_name=facts.name or repo_id.rsplit("/", 1)[-1],
        size_categories=_size_category(total),
        tags=[*_TAGS, *facts.tags],
        license_name=facts.license_name,
        license_link=facts.license_link,
        configs=configs,
    )
    first = configs[0]
    return DatasetCard.from_template(
        data,
        template_str=_template("dataset_card.md"),
        repo_id=repo_id,
        name=facts.name or repo_id.rsplit("/", 1)[-1],
        summary=facts.summary or "Georeferenced satellite and aerial images, paired sensors in one row, as Parquet.",
        snippet=_dataset_snippet(repo_id, first["config_name"], first["data_files"][0]["split"]),
        rows=rows,
        sensors=sensors,
        intended_use=[*_DATA_USE, *facts.intended_use],
        limits=[*_DATA_LIMITS, *facts.limits],
        beware=[*facts.beware, *_DATA_BEWARE],
        training_data=_training_data(facts, [config["config_name"] for config in configs]),
    )


def _template(name: str) -> str:
    return resources.files("msgfm_hf").joinpath("hub", "templates", name).read_text(encoding="utf-8")


def without_folders(command: str) -> str:
    """A command without the folders of the machine it was given on: of absolute paths the last part stays."""
    return _PATH.sub(r"\1", command)


def _cells(row: Mapping) -> dict:
    """Values for a table, whose columns a | would break."""
    return {name: value.replace("|", "\\|") if isinstance(value, str) else value for name, value in row.items()}


def _training_data(facts: CardFacts, known: Sequence[str]) -> list[dict]:
    stated = facts.training_data or [{"name": name} for name in known] or [{"name": NOT_STATED}]
    usual = {"url": "", "note": ""}
    return [_cells({**usual, **entry, "license": entry.get("license") or NOT_STATED}) for entry in stated]


def _eval_result(result: Result, tag: str) -> EvalResult:
    return EvalResult(
        task_type=tag,
        task_name=result.task,
        dataset_type=result.dataset_id or result.dataset.lower().replace(" ", "-"),
        dataset_name=result.dataset,
        # Results of one data set and split are one entry otherwise, under the first one's task and source.
        dataset_config=", ".join(filter(None, (result.task, result.origin, result.source))),
        dataset_split=result.split,
        metric_type=result.metric.split(" (")[0].split(",")[0].lower().replace(" ", "_"),
        metric_name=f"{result.metric} ({result.origin}, n={result.n}, seed {result.seed})",
        metric_value=result.value,
        source_url=result.source,
        source_name="publication" if result.source else None,
    )


def _sensor_row(spec: SensorSpec, config: MsGFMConfig, facts: CardFacts) -> dict[str, str]:
    distances = sorted({band.gsd for band in spec.bands if band.gsd is not None})
    expected = config.inputs.get(spec.id)
    factors = f" (scale {spec.scale:.6g})" if spec.default_unit == "dn" else ""
    return {
        "id": spec.id,
        "bands": ", ".join(spec.band_names),
        "file_unit": spec.default_unit + factors,
        "unit": spec.unit,
        "gsd": _range(distances),
        "trained_gsd": facts.gsd.get(spec.id, NOT_STATED),
        "expected": ", ".join(expected) if expected else "",
    }


def _range(distances: Sequence[float]) -> str:
    if not distances:
        return NOT_STATED
    low, high = distances[0], distances[-1]
    return f"{low:g} m" if low == high else f"{low:g} to {high:g} m"


def _size_category(rows: int) -> str:
    for limit, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")):
        if rows < limit:
            return name
    return "1M<n<10M" if rows < 10_000_000 else "n>10M"


def _model_snippet(repo_id: str, auto: str, task: str, config: MsGFMConfig, example: str | None) -> str:
    sensor = next(iter(config.inputs))
    lines = [
        f"from transformers import {auto}, AutoImageProcessor, pipeline",
        "",
        f'model = {auto}.from_pretrained("{repo_id}", trust_remote_code=True)',
        f'processor = AutoImageProcessor.from_pretrained("{repo_id}", trust_remote_code=True)',
    ]
    if example:
        lines = [
            "from huggingface_hub import hf_hub_download",
            *lines,
            f'image = hf_hub_download("{repo_id}", "{example}")  # a GeoTIFF; {{sensor: array}} works too',
            f'inputs = processor({{"{sensor}": image}})',
            "outputs = model(**inputs)",
            "",
            f'pipe = pipeline("{task}", model="{repo_id}", trust_remote_code=True)',
            f'result = pipe({{"{sensor}": image}})',
        ]
    return "\n".join(lines)


def _dataset_snippet(repo_id: str, name: str, split: str) -> str:
    return "\n".join(
        [
            "from datasets import load_dataset",
            "",
            f'rows = load_dataset("{repo_id}", "{name}", split="{split}", streaming=True)',
            "row = next(iter(rows))",
        ]
    )
