"""Reads the weights of other programs without running anything that is in their files."""

import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

# Where training scripts put the weights inside a pickled dictionary.
_WEIGHTS = ("model", "state_dict")
# Of several files in a folder the first kind that is there; safetensors cannot hold code at all.
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What a Swin checkpoint of its authors pickles besides tensors. It becomes a plain dictionary, so yacs is not needed.
_CONFIG_NODE = "yacs.config.CfgNode"
_RANK = re.compile(r"(?P<stem>.+\.pth)\.(?P<part>master|global|rank(?P<rank>\d+))")


@dataclass
class Source:
    """The weights of another program.

    Attributes:
        paths: the files they came from.
        tensors: {key: tensor}, as stored.
        config: the architecture as the source states it: `config.json` of a Transformers folder, or the pickled
            configuration of a training script; empty where there is none.
        processor: `preprocessor_config.json` of a Transformers folder; empty where there is none.
        entries: what else the files hold, such as an optimizer's state.
    """

    paths: list[Path]
    tensors: dict[str, torch.Tensor]
    config: Mapping = field(default_factory=dict)
    processor: Mapping = field(default_factory=dict)
    entries: list[str] = field(default_factory=list)


@dataclass
class RankFiles:
    """The files that the processes of one training run wrote for it: shared weights, and the experts of each rank."""

    master: Source | None
    ranks: list[Source]


def read_source(paths: Sequence[str | Path]) -> Source | RankFiles:
    """Read one file, one folder as Transformers writes it, or a `.master` file with all its `.rank*` files.

    Args:
        paths: `.pth`, `.pt`, `.bin`, `.safetensors`, `.pth.global`, or a folder; or `X.pth.master X.pth.rank0 ...` in
            any order, or `X.pth.rank0 ...` alone where each holds the whole state.

    Raises:
        FileNotFoundError: for a path that does not exist.
        ValueError: for files that cannot be read, do not belong together, or hold a class that is not known.
    """
    paths = [Path(path) for path in paths]
    if not paths:
        raise ValueError("`SRC` must be at least one file or folder, got none. Name it.")
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"`SRC` must be an existing file or folder, got {str(path)!r}. Check the name.")
    parts = {path: _RANK.fullmatch(path.name) for path in paths}
    if len(paths) == 1 and not (parts[paths[0]] and parts[paths[0]]["rank"]):
        if parts[paths[0]] and parts[paths[0]]["part"] == "master":
            raise ValueError(
                f"`SRC` must hold the experts too, got {paths[0].name!r} alone. Give the `.rank*` files after it: "
                f"{paths[0]} {str(paths[0]).removesuffix('master')}rank*"
            )
        return _read_folder(paths[0]) if paths[0].is_dir() else _read_file(paths[0])
    strange = [path.name for path in paths if not parts[path] or parts[path]["part"] == "global"]
    if strange:
        raise ValueError(
            f"`SRC` must be one file or folder, or a `.master` file and its `.rank*` files, got {', '.join(strange)} "
            "among several. Convert one checkpoint at a time."
        )
    runs = sorted({str(path.parent / parts[path]["stem"]) for path in paths})
    if len(runs) > 1:
        raise ValueError(f"`SRC` must be of one run, got files of {', '.join(runs)}. Leave the others out.")
    masters = [path for path in paths if parts[path]["part"] == "master"]
    ranks = {int(parts[path]["rank"]): path for path in paths if parts[path]["rank"]}
    missing = [rank for rank in range(max(ranks, default=0) + 1) if rank not in ranks]
    if missing:
        raise ValueError(
            f"`SRC` must hold the files of all ranks, got none of rank {', '.join(map(str, missing))} of "
            f"{runs[0]}. Every rank has experts of its own: fetch the missing files."
        )
    if len(masters) + len(ranks) < len(paths):
        raise ValueError(f"`SRC` must name each file once, got {len(paths)} names. Leave the repeated ones out.")
    return RankFiles(_read_file(masters[0]) if masters else None, [_read_file(ranks[rank]) for rank in sorted(ranks)])


def _read_folder(folder: Path) -> Source:
    name = next((name for name in _FOLDER_FILES if (folder / name).is_file()), None)
    if name is None or not (folder / "config.json").is_file():
        raise ValueError(
            f"`SRC` must be a file of weights, or a folder with config.json and model.safetensors, got {str(folder)!r} "
            "without them. Name the file inside it."
        )
    if name.endswith(".index.json"):
        index = _read_json(folder / name).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise ValueError(f"`SRC` must name its files in {name}, got {index!r}. Fetch it again.")
        files = sorted(set(index.values()))
        parts = [_read_file(folder / file) for file in files]
        source = Source([folder / file for file in files], {k: v for part in parts for k, v in part.tensors.items()})
    else:
        source = _read_file(folder / name)
    source.config = _read_json(folder / "config.json")
    if (folder / "preprocessor_config.json").is_file():
        source.processor = _read_json(folder / "preprocessor_config.json")
    return source


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"`SRC` must hold readable JSON, got {str(path)!r} ({error}). Fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"`SRC` must hold a JSON object in {path.name}, got {type(content).__name__}. Fetch it again.")
    return content


def _read_file(path: Path) -> Source:
    if not path.is_file():
        raise FileNotFoundError(f"`SRC` must be an existing file, got {str(path)!r}. Fetch what is missing.")
    if path.suffix == ".safetensors":
        try:
            return Source([path], load_file(path))
        except SafetensorError as error:
            raise ValueError(
                f"`SRC` must be a whole safetensors file, got {str(path)!r} ({error}). Fetch it again."
            ) from error
    content = _load_pickle(path)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"`SRC` must hold a dictionary of tensors, got a {type(content).__name__} in {str(path)!r}. Save the "
            "`state_dict()` of the model."
        )
    inside = next((name for name in _WEIGHTS if isinstance(content.get(name), Mapping)), None)
    tensors = content if inside is None else content[inside]
    others = sorted(str(key) for key, value in tensors.items() if not isinstance(value, torch.Tensor))
    if others or not tensors:
        raise ValueError(
            f"`SRC` must hold weights, alone or under {' or '.join(map(repr, _WEIGHTS))}, got {str(path)!r} with "
            f"{', '.join(others[:5]) or 'nothing'} in it. Save the `state_dict()` of the model."
        )
    config = content.get("config") if inside is not None else None
    return Source(
        [path],
        {str(key): value for key, value in tensors.items()},
        config if isinstance(config, Mapping) else {},
        entries=[] if inside is None else sorted(str(key) for key in content if key not in (inside, "config")),
    )


def _load_pickle(path: Path):
    """What `torch.save` wrote, by the unpickler of torch that builds tensors and containers and nothing else."""
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            inside = archive.namelist()
        # Swin-MoE's files are offered in archives; those of torch are archives too.
        if not any(name.endswith("data.pkl") for name in inside):
            raise ValueError(
                f"`SRC` must be a file of `torch.save`, got the archive {path.name} of {', '.join(inside[:3])}. Unpack "
                "it, and give the files that were in it."
            )
    try:
        with torch.serialization.safe_globals([(OrderedDict, _CONFIG_NODE)]):
            # Mapped, an optimizer's state is never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        foreign = _foreign_classes(path, zipped, str(error))
        if foreign:
            raise ValueError(
                f"`SRC` must pickle nothing but tensors, containers and {_CONFIG_NODE}, got {', '.join(foreign)} in "
                f"{str(path)!r}. It could run code, so it is not read: save the bare `state_dict()` where you trust it."
            ) from error
        raise ValueError(_damaged(path, error)) from error
    # A damaged file fails anywhere in torch or in the unpickler, with errors of many types.
    except Exception as error:
        raise ValueError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    why = str(error).split("\n")[0].split(". This file can still")[0][:200]
    return (
        f"`SRC` must be a whole file of `torch.save`, got {str(path)!r} of {path.stat().st_size:,} bytes "
        f"({type(error).__name__}: {why}). It is truncated or of another kind: fetch it again."
    )


def _foreign_classes(path: Path, zipped: bool, message: str) -> list[str]:
    """Names of the classes and functions that a file asks for and that are not built."""
    if zipped:
        try:
            found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # the pickle itself is damaged; the message is what there is
            found = []
        found = sorted(name for name in found if name != _CONFIG_NODE)
        if found:
            return found
    return re.findall(r"GLOBAL ([\w.]+)", message)
