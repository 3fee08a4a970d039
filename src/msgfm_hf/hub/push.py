"""Publishes a checkpoint or a folder of shards on the Hub: prepared as a whole, checked, and sent as one commit."""

import fnmatch
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import TypeVar

import numpy as np
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors import SafetensorError
from transformers import pipeline

from msgfm_hf.data.shards import find_sources
from msgfm_hf.model import heads_msgfm, modeling_msgfm
from msgfm_hf.model.configuration_msgfm import MsGFMConfig
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.modeling_msgfm import count_parameters
from msgfm_hf.model.sensors import SENSORS

from .card import (
    CLASSES,
    FACTS,
    NOT_STATED,
    CardFacts,
    hosted_widget,
    read_facts,
    render_dataset_card,
    render_eval_results,
    render_model_card,
    without_folders,
)
from .code import write_model_code
from .examples import write_examples

_T = TypeVar("_T")
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
_RECORDS = ("conversion_report.json",)
_BENCHMARKS = ".eval_results/msgfm_hf.yaml"
# What an earlier push may have left in the repository and this one does not replace. Other files are the user's.
_OURS = (
    *_WEIGHTS,
    *_RECORDS,
    _BENCHMARKS,
    "examples/picture.png",
    "examples/segmentation.png",
    *(f"examples/{sensor}.tif" for sensor in SENSORS),
)
ATTEMPTS = 5
_FIRST_WAIT = 1.0


class PushError(RuntimeError):
    """The Hub refused or could not be reached; no commit was made. A repository or branch may be there that is new and
    empty."""


@dataclass
class Publication:
    """What will be pushed.

    Attributes:
        repo_type: `model` or `dataset`.
        files: {path in the repository: local file}.
        remarks: what the publisher should know.
        obsolete: patterns of files of an earlier push, which go where they are not replaced.
        sources: names of the sources of a data set.
    """

    repo_type: str
    files: dict[str, Path]
    remarks: list[str] = field(default_factory=list)
    obsolete: tuple[str, ...] = ()
    sources: set[str] = field(default_factory=set)

    def __str__(self):
        sizes = {path: file.stat().st_size for path, file in self.files.items()}
        width = max(len(path) for path in sizes)
        lines = [f"{path:<{width}}  {size:>15,} bytes" for path, size in sorted(sizes.items())]
        lines.append(f"{f'{len(sizes)} files':<{width}}  {sum(sizes.values()):>15,} bytes")
        return "\n".join([*lines, *(f"! {remark}" for remark in self.remarks)])


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    dry_run: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    card: str | Path | None = None,
    token: str | None = None,
    tell: Callable[[str], None] = print,
) -> str | None:
    """Publish a checkpoint, or a folder of shards, as one commit.

    A checkpoint goes with its processor, the code of the model (all Auto classes and pipelines load with
    `trust_remote_code=True`), a card, `handler.py` and `requirements.txt` for hosted inference, and example images.
    Shards go with a card that lets `load_dataset` stream them, a configuration per source.

    Args:
        folder: of the checkpoint, or of shards.
        repo_id: `owner/name`.
        dry_run: only say what would be pushed, with sizes.
        private: whether a new repository is private.
        revision: branch to push to, made where there is none; default the main one.
        card: file of what the publisher states, default `card.yaml` in the folder; see `CardFacts`.
        token: default the one that `hf auth login` stored, or `HF_TOKEN`.
        tell: called with lines on the progress.

    Returns:
        the address of the commit; `None` for a dry run.

    Raises:
        FileNotFoundError: for a folder or card that does not exist.
        ValueError: for a folder that holds neither, or a card with a number that nothing made.
        PushError: if the Hub refuses or cannot be reached; nothing is half-pushed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"`DIR` must be an existing folder, got {str(folder)!r}. Check the name.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"`REPO_ID` must be owner/name as the Hub has it, got {repo_id!r}: {error}. Correct it."
        ) from error
    if repo_id.count("/") != 1:
        raise ValueError(f"`REPO_ID` must be owner/name, got {repo_id!r}. Put your name or organisation before it.")
    default = folder / FACTS
    facts = read_facts(card if card is not None else default if default.is_file() else None)
    with tempfile.TemporaryDirectory() as staging:
        prepare = prepare_checkpoint if (folder / "config.json").is_file() else prepare_shards
        publication = prepare(folder, repo_id, facts, Path(staging), revision or "main")
        tell(str(publication))
        if dry_run:
            tell("Nothing was pushed (--dry-run).")
            return None
        address = _commit(publication, repo_id, private, revision, HfApi(token=token), tell)
        tell(f"Pushed: {address}")
        return address


def prepare_checkpoint(
    folder: Path, repo_id: str, facts: CardFacts, staging: Path, revision: str = "main"
) -> Publication:
    """All files of the repository of a checkpoint; those that are made lie in `staging`.

    Raises:
        ValueError: if the folder holds no whole checkpoint.
    """
    # In one file where there is one: pieces beside it are of another time.
    whole = [folder / _WEIGHTS[0]] if (folder / _WEIGHTS[0]).is_file() else []
    weights = whole or sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    for name, found in (("model.safetensors", weights), ("preprocessor_config.json", ["preprocessor_config.json"])):
        if not found or (name.endswith(".json") and not (folder / name).is_file()):
            raise ValueError(
                f"`DIR` must hold a model and its image processor, got {str(folder)!r} without {name}. Save both there."
            )
    kind = _read_json(folder / "config.json").get("model_type")
    if kind != MsGFMConfig.model_type:
        raise ValueError(
            f"`DIR` must hold an msGFM checkpoint, got a model of type {kind!r} in {str(folder)!r}. `msgfm convert` "
            "turns relatives of Swin into one."
        )
    for name in ("config.json", "preprocessor_config.json"):
        (staging / name).write_text(json.dumps(_read_json(folder / name), indent=2), encoding="utf-8")
    write_model_code(staging)
    config = MsGFMConfig.from_pretrained(folder)
    # Refuses a processor of other sensors or statistics than the model's.
    MsGFMImageProcessor.from_pretrained(folder)
    architecture = (config.architectures or [""])[0]
    if architecture not in CLASSES:
        raise ValueError(
            f"`DIR` must hold a {', '.join(CLASSES)}, got {architecture or 'a model without `architectures`'}. Save it "
            "with `save_pretrained`."
        )
    (staging / "handler.py").write_bytes(resources.files("msgfm_hf").joinpath("hub", "handler.py").read_bytes())
    (staging / "requirements.txt").write_text(_requirements())
    (staging / "examples").mkdir()
    examples = write_examples(config, staging / "examples")
    # Loaded: a checkpoint that does not load is not published, and its outputs stand on its card.
    model_class = getattr(heads_msgfm, architecture, None) or getattr(modeling_msgfm, architecture)
    try:
        model = model_class.from_pretrained(folder)
    except SafetensorError as error:
        raise ValueError(
            f"`DIR` must hold whole weights, got damaged ones in {str(folder)!r} ({error}). Save or fetch them again."
        ) from error
    widget = _widget(folder, f"{repo_id}/resolve/{revision}", architecture, model, examples)
    record, conversion = (_without_folders(_read_json(folder / name)) for name in ("run.json", *_RECORDS))
    if conversion:
        (staging / _RECORDS[0]).write_text(json.dumps(conversion, indent=1, ensure_ascii=False), encoding="utf-8")
    first = next(iter(config.inputs))
    card = render_model_card(
        config,
        architecture,
        count_parameters(model)._asdict(),
        repo_id,
        facts,
        made=_how_made(record, conversion),
        origin=_origin(conversion) or _started(record),
        widget=widget,
        trained_on=_trained_on(record),
        example=f"examples/{first}.tif",
    )
    (staging / "README.md").write_text(str(card), encoding="utf-8")
    results = render_eval_results(facts)
    if results is not None:
        (staging / _BENCHMARKS).parent.mkdir()
        (staging / _BENCHMARKS).write_text(results, encoding="utf-8")
    files = {path.relative_to(staging).as_posix(): path for path in sorted(staging.rglob("*")) if path.is_file()}
    files |= {path.name: path for path in weights}
    remarks = _remarks(facts)
    if record.get("start"):
        remarks.append(
            f"it started from {record['start']['checkpoint']}: may you pass on what came of those weights? Name them "
            "in `base_model:` and `training_data:`"
        )
    if not facts.results:
        remarks.append("no results: `results:` names reports of `msgfm evaluate --out`, or numbers with what made them")
    return Publication("model", files, remarks, _OURS)


def prepare_shards(folder: Path, repo_id: str, facts: CardFacts, staging: Path, revision: str = "main") -> Publication:
    """All files of the repository of a folder of shards.

    Raises:
        ValueError: if the folder holds no shards.
    """
    files = {}
    try:
        sources = find_sources(folder)
    except ValueError as error:
        raise ValueError(
            f"`DIR` must hold a checkpoint (config.json) or shards, got {str(folder)!r} without. `msgfm shards` makes "
            "shards."
        ) from error
    for source in sources:
        for path in sorted(Path(source).iterdir()):
            if path.suffix == ".parquet" or path.name == "left_out.csv":
                files[f"data/{Path(source).name}/{path.name}"] = path
        manifest = Path(source, "manifest.json")
        if manifest.is_file():
            place = f"data/{Path(source).name}/manifest.json"
            files[place] = staging / f"{Path(source).name}.json"
            files[place].write_text(
                json.dumps(_without_folders(_read_json(manifest)), indent=2) + "\n", encoding="utf-8"
            )
    stray = [name for name in ("results", "gsd", "base_model") if getattr(facts, name)]
    if stray:
        raise ValueError(f"`{stray[0]}` must be left out of the card of a data set, got one. It is of checkpoints.")
    (staging / "README.md").write_text(str(render_dataset_card(folder, repo_id, facts)), encoding="utf-8")
    files = {"README.md": staging / "README.md", **files}
    names = {Path(source).name for source in sources}
    return Publication("dataset", files, _remarks(facts), tuple(f"data/{name}/*.parquet" for name in names), names)


def _remarks(facts: CardFacts) -> list[str]:
    remarks = []
    if facts.license is None:
        remarks.append(f"no licence: nobody knows whether they may use it. State `license:` in {FACTS}, or --card")
    if not all(data.get("license") for data in facts.training_data) or not facts.training_data:
        remarks.append(
            f"the licences of the data are {NOT_STATED} on the card: `training_data:` in {FACTS} states them"
        )
    return remarks


def _read_json(path: Path) -> dict:
    """An object; empty where there is no such file.

    Raises:
        ValueError: for a file that holds something else.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"`DIR` must hold readable JSON, got {str(path)!r} ({error}). Save it again.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"`DIR` must hold a JSON object in {path.name}, got a {type(content).__name__}. Save it again."
        )
    return content


def _without_folders(record: dict) -> dict:
    """What made a checkpoint, without the folders of the machine that did."""
    command = record.get("command")
    return record | {"command": without_folders(command)} if isinstance(command, str) else record


def _how_made(record: dict, conversion: dict) -> list[str]:
    lines = []
    if record:
        versions = ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())
        lines.append(f"Pretrained: `{record.get('command')}` at commit {record.get('commit')}, {versions}.")
        start = record.get("start") or {}
        if start:
            of = f", converted from {', '.join(start['files'])} ({start['layout']})" if start.get("layout") else ""
            lines.append(f"Started from `{start['checkpoint']}`{of}; its licence and its training data count here too.")
        if any(source.startswith("synthetic") for source in _trained_on(record)):
            lines.append("**On synthetic scenes: a demonstration, not a model of the earth.**")
    if conversion:
        names = ", ".join(file["name"] for file in conversion.get("files", ()))
        lines.append(f"Converted from {names} ({conversion.get('layout')}); `conversion_report.json` has every tensor.")
        lines += [f"{remark[0].upper()}{remark[1:]}." for remark in conversion.get("remarks", ())]
    return lines


def _trained_on(record: dict) -> list[str]:
    """Names of the sources of a run."""
    return sorted((record.get("identity") or {}).get("sources") or ())


def _origin(conversion: dict) -> str | None:
    if not conversion:
        return None
    return (
        f"Converted with `msgfm_hf` from weights of the layout `{conversion.get('layout')}`, which others trained. "
        "These are **not msGFM weights**: the paper's authors released none."
    )


def _started(record: dict) -> str | None:
    layout = (record.get("start") or {}).get("layout")
    if not layout:
        return None
    return (
        f"Pretrained with `msgfm_hf`, starting from weights of the layout `{layout}`, which others trained. It is not "
        "a checkpoint of the paper's authors, who released none."
    )


def _requirements() -> str:
    """What the code beside a checkpoint needs: Transformers as it was tested with, since its interfaces change."""
    stated = [line for line in metadata.requires("msgfm_hf") or () if "extra ==" not in line]
    lines = [line for line in stated if not line.startswith(("transformers", "pyyaml"))]
    return "\n".join(sorted([*lines, f"transformers=={metadata.version('transformers')}"])) + "\n"


def _widget(folder: Path, place: str, architecture: str, model, examples: dict[str, Path]) -> list[dict]:
    """Examples for the widget of the Hub with the outputs of the stock pipeline, where it takes a picture."""
    if not hosted_widget(model.config, architecture) or "picture" not in examples:
        return []
    address = f"https://huggingface.co/{place}/examples"
    task = CLASSES[architecture][1]
    picture = Image.open(examples["picture"])
    found = pipeline(task, model=model, image_processor=str(folder))(picture)
    entry = {"src": f"{address}/picture.png", "example_title": "A synthetic place"}
    if task == "image-classification":
        return [entry | {"output": [{"label": one["label"], "score": round(one["score"], 4)} for one in found]}]
    classes = np.zeros(picture.size[::-1], np.uint8)
    for number, one in enumerate(found, 1):
        classes[np.asarray(one["mask"]) > 0] = number
    colours = np.random.default_rng(0).integers(40, 256, (256, 3), np.uint8)
    path = examples["picture"].with_name("segmentation.png")
    Image.fromarray(colours[classes]).save(path)
    return [entry | {"output": {"url": f"{address}/{path.name}"}}]


def _commit(
    publication: Publication,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    api: HfApi,
    tell: Callable[[str], None],
) -> str:
    """One commit with everything, or none."""
    kind = publication.repo_type

    def attempt(what: str, call: Callable[[], _T]) -> _T:
        return _with_retries(what, call, repo_id, tell)

    attempt("make the repository", lambda: api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True))
    if private and not attempt("look at it", lambda: api.repo_info(repo_id, repo_type=kind)).private:
        raise PushError(
            f"`--private` must be left out for a repository that is public, got {repo_id!r}. Make it private in its "
            "settings first, or name another."
        )
    if revision is not None and revision != "main":
        attempt(
            f"make the branch {revision}",
            lambda: api.create_branch(repo_id, branch=revision, repo_type=kind, exist_ok=True),
        )

    def obsolete_files() -> list[str]:
        there = api.list_repo_files(repo_id, repo_type=kind, revision=revision)
        shards = [path.split("/") for path in there if fnmatch.fnmatch(path, "data/*/*.parquet")]
        others = sorted({parts[1] for parts in shards} - publication.sources)
        if publication.sources and others:
            raise ValueError(
                f"`DIR` must hold all sources of the data set, whose card names them, got "
                f"{', '.join(sorted(publication.sources))} where {repo_id!r} has {', '.join(others)} too. Push a "
                "folder of all of them, or to another repository."
            )
        return [
            path
            for path in there
            if path not in publication.files and any(fnmatch.fnmatch(path, pattern) for pattern in publication.obsolete)
        ]

    going = attempt("list its files", obsolete_files)
    if going:
        tell(f"  goes, as this push has none: {', '.join(going)}")

    def commit():
        # Asked anew: what a commit removed whose answer was lost is not removed again.
        obsolete = obsolete_files()
        # New operations each time: those of a failed attempt remember what they believe is uploaded.
        operations = [CommitOperationAdd(path, str(file)) for path, file in sorted(publication.files.items())]
        operations += [CommitOperationDelete(path) for path in obsolete]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=f"Push with msgfm_hf {metadata.version('msgfm_hf')}",
            repo_type=kind,
            revision=revision,
        )

    return str(attempt("commit", commit).commit_url)


def _with_retries(what: str, call: Callable[[], _T], repo_id: str, tell: Callable[[str], None]) -> _T:
    """Call, and again after a while where the Hub is at fault.

    Raises:
        PushError: where it still is, or the fault is not the Hub's.
    """
    number, wait = 1, _FIRST_WAIT
    while True:
        try:
            return call()
        except (HTTPError, OSError, RuntimeError) as error:
            fault = _fault_of_the_hub(error)
            if fault is None:
                raise
            status = getattr(getattr(fault, "response", None), "status_code", None)
            theirs = status is None or status >= 500 or status == 429
            if not theirs or number == ATTEMPTS or isinstance(fault, OfflineModeIsEnabled):
                raise PushError(_explain(what, fault, status, repo_id, number)) from error
            why = f"the Hub answered {status}" if status else f"no connection ({type(fault).__name__})"
            tell(f"  {why}; trying to {what} again in {wait:.0f} s")
            time.sleep(wait)
            number, wait = number + 1, 2 * wait


def _fault_of_the_hub(error: BaseException | None) -> Exception | None:
    """What the Hub answered or how the connection broke, which an upload wraps in an error that says neither."""
    while error is not None and not isinstance(error, HTTPError | ConnectionError | TimeoutError):
        error = error.__cause__ or error.__context__
    return error


def _explain(what: str, error: Exception, status: int | None, repo_id: str, number: int) -> str:
    if status == 401:
        return f"`token` must be valid and may write, got one that was refused (401). Run `hf auth login`. ({error})"
    if status == 403:
        return (
            f"`REPO_ID` must be yours to write, got {repo_id!r}, which is not (403). Check owner and token. ({error})"
        )
    if status == 404:
        return f"`REPO_ID` must exist and be yours to see, got {repo_id!r} (404). Check owner and token. ({error})"
    if status is not None and status < 500 and status != 429:
        return f"`REPO_ID` must take the push, got {status} when trying to {what} for {repo_id!r}. {error}"
    if isinstance(error, OfflineModeIsEnabled):
        return f"`HF_HUB_OFFLINE` must be unset to push, got it set. {error}"
    seen = f"answer {status}" if status else f"no connection ({type(error).__name__}: {error})"
    return (
        f"`REPO_ID` must be reachable, got {seen} after {number} attempts to {what} for {repo_id!r}. Nothing was "
        "committed: push again later."
    )
