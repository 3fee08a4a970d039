"""A foreign checkpoint -> a folder that `from_pretrained` loads, with an account of every tensor."""

import copy
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from msgfm_hf.model.configuration_msgfm import MsGFMConfig
from msgfm_hf.model.heads_msgfm import MsGFMForImageClassification
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.modeling_msgfm import (
    MsGFMForPreTraining,
    MsGFMModel,
    MsGFMPreTrainedModel,
    count_parameters,
)
from msgfm_hf.model.sensors import SENSORS, BandSpec, SensorSpec

from . import gfm, hf_swin, satlas, simmim, swin, swin_moe, swinv2
from .architecture import ASSUMED, Architecture, read_architecture
from .source import RankFiles, Source, read_source
from .translation import SENSOR, Translation
from .windows import centre_table, resize_table

# In the order in which they are looked for.
_LAYOUTS = {layout.NAME: layout for layout in (hf_swin, satlas, swin_moe, gfm, simmim, swinv2, swin)}
LAYOUTS = tuple(sorted(_LAYOUTS))
# A GFM file without its teacher is a SimMIM file.
_ALSO = {"gfm": "simmim"}
# What else is found under these roofs, by a key that only it has.
_STRANGERS = (
    ("encoder.cls_token", "a vision transformer of SimMIM"),
    ("cls_token", "a vision transformer"),
    ("layers.0.blocks.0.spatial_mlp.weight", "a Swin-MLP"),
    ("head.fc.weight", "a model of timm, which moves the merges between stages"),
    ("backbone.resnet.conv1.weight", "a ResNet of Satlas"),
)
REPORT = "conversion_report.json"
_SEED = 0


def convert_checkpoint(
    sources: Sequence[str | Path],
    out: str | Path,
    layout: str = "auto",
    image_size: int | None = None,
    sensor: str = "rgb",
    bands: Sequence[str] | None = None,
    num_experts: int | None = None,
    window_size: int | None = None,
    command: str | None = None,
) -> dict:
    """Turn the weights of another program into a model of this package and its image processor.

    The class is `MsGFMForPreTraining` where the source has a decoder, `MsGFMForImageClassification` where it has a
    classifier, else `MsGFMModel`. Numbers are those of the original for the same normalised pixels, in whole windows
    (torchvision lets tokens see the padding of incomplete ones, here they do not).

    With `num_experts` each MLP of the paper's blocks (every other one of stage 3) becomes that many copies of itself
    behind a fresh router. Before training the output of such a block's MLP is the top-1 gate times that of the source,
    so features are not those of the source until the routers have learned (but nearly, where a norm follows the MLP).

    Args:
        sources: as of `msgfm_hf.convert.source.read_source`.
        out: folder to write; it must not exist, or be empty.
        layout: one of `LAYOUTS`, or `auto`.
        image_size: height and width in pixels of the images of the source, where it does not tell; otherwise what the
            configuration shall say.
        sensor: id of the sensor that the channels are of; one that is not in `SENSORS` is made of `bands`.
        bands: names of the source's channels, in its order; default all bands of the sensor. Bands that the sensor
            has and the source lacks start at zero: they change nothing until they are trained.
        num_experts: experts per block with experts, for a source without.
        window_size: side of the windows of the result in tokens, default as of the source. Tables of biases are resized
            as SimMIM does it, networks of the offset are evaluated anew.
        command: what to write down as the command that made the report.

    Returns:
        the report, also written to `out`/conversion_report.json: `layout`, `model_class`, `files`, `config` ({field:
        {value, origin}}), `source_keys` ({key: {status: loaded, transformed or ignored, to, how}}), `target_keys`
        ({key: {status: loaded, transformed or fresh, from, how}}), `bands`, `parameters`, `remarks`, `command`.

    Raises:
        FileNotFoundError: for a source that does not exist.
        ValueError: for a source that is damaged, foreign or ambiguous, or options that do not fit it. Nothing is
            written then.
    """
    out = Path(out).resolve()
    if out == Path.cwd():
        raise ValueError(f"`--out` must be another folder than the current one, got {str(out)!r}. Name one in it.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"`--out` must be a new or an empty folder, got {str(out)!r}. Name another, or remove it.")
    for name, value in (("--image-size", image_size), ("--window-size", window_size), ("--num-experts", num_experts)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}. Correct it.")
    source = read_source(sources)
    with _foreign_shapes():
        model, report = _convert(source, layout, image_size, sensor, bands, num_experts, window_size)
    report["command"] = command
    _write(model, MsGFMImageProcessor.from_config(model.config), report, out)
    return report


@contextmanager
def _foreign_shapes() -> Iterator[None]:
    """Any tensor of a foreign file may have any shape, and any entry of its configuration any type.

    Raises:
        ValueError: for what goes wrong for that reason.
    """
    try:
        yield
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:
        raise ValueError(
            "`SRC` must hold tensors of the shapes, and settings of the types, that its layout has, got "
            f"{type(error).__name__}: {str(error)[:300]}. It is damaged, or of another program."
        ) from error


def _convert(
    source: Source | RankFiles,
    layout: str,
    image_size: int | None,
    sensor: str,
    bands: Sequence[str] | None,
    num_experts: int | None,
    window_size: int | None,
) -> tuple[MsGFMPreTrainedModel, dict]:
    """The model, and the report on it."""
    if isinstance(source, RankFiles):
        source = swin_moe.merge_ranks(source)
    found = _find_layout(source, layout)
    translation = found.translate(source)
    _check_left(translation, found.NAME)
    architecture = read_architecture(translation, found.stated(source), image_size, window_size)
    spec, names = _make_sensor(sensor, bands, architecture.num_bands, source.processor, translation)
    fields = dict(architecture.fields)
    if window_size is not None:
        fields["window_size"], architecture.origins["window_size"] = window_size, "option"
    _fit_windows(translation, architecture, fields)
    if num_experts is not None:
        _make_experts(translation, fields, architecture.origins, num_experts)
    num_labels = fields.pop("num_labels", None)
    if num_labels is not None:
        fields["id2label"] = architecture.labels or {number: f"LABEL_{number}" for number in range(num_labels)}
    config = MsGFMConfig(sensors={spec.id: spec.to_dict()}, inputs={spec.id: names}, **fields)
    _fit_bands(translation, architecture, config, spec)
    model = _build(translation, config, with_decoder=architecture.decoder_bands is not None)
    translation.finish()
    if not architecture.whole_windows:
        translation.remarks.append(
            f"at {config.image_size} pixels the maps are no whole windows: the source lets tokens see what fills them "
            "up, here they do not, so numbers differ; where maps are whole windows they are equal"
        )
    return model, {
        "layout": found.NAME,
        "model_class": type(model).__name__,
        "files": [{"name": path.name, "bytes": path.stat().st_size, "sha256": _digest(path)} for path in source.paths],
        "other_entries": source.entries,
        "config": {
            name: {"value": getattr(config, name), "origin": architecture.origins.get(name, "tensors")}
            for name in fields
            if name != "id2label"
        },
        "bands": {spec.id: names},
        "statistics": spec.source,
        "parameters": count_parameters(model)._asdict(),
        "source_keys": dict(sorted(translation.sources.items())),
        "target_keys": _target_keys(translation, model),
        "remarks": translation.remarks,
    }


def format_conversion(report: dict) -> str:
    """The report as text: what it is now, and what became of the tensors, alike ones together."""
    parameters = report["parameters"]
    bands = "; ".join(f"{sensor}: {', '.join(names)}" for sensor, names in report["bands"].items())
    lines = [
        f"{report['layout']} -> {report['model_class']}, {parameters['total']:,} parameters, {parameters['active']:,} "
        "active in one pass",
        f"channels  {bands}; normalised by: {report['statistics']}",
    ]
    lines += [f"  {name} = {entry['value']}  ({entry['origin']})" for name, entry in report["config"].items()]
    for title, keys, absent in (
        ("source", report["source_keys"], "loaded as they are"),
        ("model", report["target_keys"], "loaded as they are"),
    ):
        groups: dict[tuple[str, str], list[str]] = {}
        for key, entry in keys.items():
            groups.setdefault((entry["status"], entry.get("how") or absent), []).append(key)
        lines.append(f"{title}: {len(keys)} tensors")
        for (status, how), members in sorted(groups.items()):
            example = members[0] if len(members) == 1 else f"{len(members)}, such as {members[0]}"
            lines.append(f"  {status:<12}{how}: {example}" if status != "loaded" else f"  {status:<12}{len(members)}")
    lines += [f"! {remark}" for remark in report["remarks"]]
    return "\n".join(lines)


def _find_layout(source: Source, wanted: str):
    """The module of the layout that the keys have."""
    if wanted != "auto" and wanted not in _LAYOUTS:
        raise ValueError(f"`--layout` must be auto or one of {', '.join(LAYOUTS)}, got {wanted!r}. Correct it.")
    found = next((layout for layout in _LAYOUTS.values() if layout.matches(source)), None)
    if found is None:
        stranger = next((what for key, what in _STRANGERS if key in source.tensors), None)
        keys = sorted(source.tensors)
        seen = stranger or f"keys such as {', '.join(keys[:3])}"
        folder = source.config.get("model_type")
        seen = f"a Transformers model of type {folder!r}" if folder else seen
        raise ValueError(
            f"`SRC` must be of one of the layouts {', '.join(LAYOUTS)}, got {seen}. Only relatives of Swin have this "
            "architecture."
        )
    if wanted not in ("auto", found.NAME) and _ALSO.get(wanted) != found.NAME:
        raise ValueError(
            f"`--layout` must be what the file is, {found.NAME!r} by its keys, got {wanted!r}. Leave it out."
        )
    return found if wanted == "auto" else _LAYOUTS[wanted]


def _check_left(translation: Translation, layout: str):
    left = translation.left()
    if left:
        raise ValueError(
            f"`SRC` must hold only tensors that are known in the layout {layout!r}, got {len(left)} others: "
            f"{', '.join(left[:5])}. Another model or version wrote it; nothing was converted."
        )
    types = {str(tensor.dtype).removeprefix("torch.") for tensor in translation.tensors.values()} - {"float32"}
    for name, tensor in translation.tensors.items():
        translation.tensors[name] = tensor.float()
        if not tensor.is_floating_point() or not translation.tensors[name].isfinite().all():
            seen = "NaN or infinity" if tensor.is_floating_point() else tensor.dtype
            raise ValueError(
                f"`SRC` must hold finite numbers, got {seen} in what becomes {name}. It is damaged, or its training "
                "diverged: take an earlier one."
            )
    if types:
        translation.remarks.append(f"weights of {' and '.join(sorted(types))} are saved as float32")


def _make_sensor(
    sensor: str,
    bands: Sequence[str] | None,
    num_bands: int,
    processor: Mapping,
    translation: Translation,
) -> tuple[SensorSpec, list[str]]:
    """The sensor whose bands the channels are, and their names in the order of the channels."""
    spec = SENSORS.get(sensor)
    if bands and not all(bands):
        raise ValueError(f"`--bands` must be names, got an empty one in {','.join(bands)!r}. Correct it.")
    if spec is None:
        if not bands:
            raise ValueError(
                f"`--bands` must name the channels of the new sensor {sensor!r}, got nothing. Known sensors are "
                f"{', '.join(SENSORS)}."
            )
        spec = _new_sensor(sensor, bands)
    names = [band.name for band in spec.select(bands)]
    if len(names) != num_bands:
        raise ValueError(
            f"`--bands` must name the {num_bands} channels of the source in its order, got {len(names)} "
            f"({', '.join(names)}). Name them with `--bands`, and their sensor with `--sensor`."
        )
    rgb = SENSORS["rgb"]
    pictures = spec.unit == rgb.unit and spec.default_unit == rgb.default_unit and spec.scale == rgb.scale
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if processor.get("do_normalize") is False:
        mean, std = [0.0] * len(names), [1.0] * len(names)
    if processor.get("do_rescale") is False or not math.isclose(processor.get("rescale_factor", 1 / 255), 1 / 255):
        translation.remarks.append(
            "the source's processor multiplies pixels by something else than 1/255: here they are divided by 255"
        )
    if processor.get("do_resize") or processor.get("do_center_crop"):
        translation.remarks.append(
            f"the source's processor makes all images one size ({processor.get('size')}): here they keep theirs"
        )
    if pictures and translation.from_0_to_1:
        spec = _with_statistics(spec, dict.fromkeys(names, (0.0, 1.0)), "SatlasPretrain: pixels from 0 to 1")
    elif pictures and mean and std and len(mean) == len(std) == len(names):
        values = dict(zip(names, zip(mean, std, strict=True), strict=True))
        known = {band.name: (band.mean, band.std) for band in spec.bands}
        if any(values[name] != known[name] for name in names):
            spec = _with_statistics(spec, values, "preprocessor_config.json of the source")
    elif sensor not in SENSORS:
        translation.remarks.append(
            f"how the source normalised {sensor} is not in the file: its processor takes 8-bit numbers and the "
            "statistics of ImageNet. Set `mean`, `std`, `unit` and `scale` of its bands in config.json and "
            "preprocessor_config.json to those that it was trained with"
        )
    elif not pictures:
        translation.remarks.append(
            f"how the source normalised {sensor} is not in the file: its processor takes the statistics of the "
            f"catalogue ({spec.source})"
        )
    return spec, names


def _new_sensor(sensor: str, bands: Sequence[str]) -> SensorSpec:
    """A sensor of pictures with these bands; those that a picture does not have take the mean over those it has."""
    known = {band.name: band for band in SENSORS["naip"].bands}
    usual = SENSORS["rgb"].bands
    mean = sum(band.mean for band in usual) / len(usual)
    std = sum(band.std for band in usual) / len(usual)
    return SensorSpec(
        id=sensor,
        bands=tuple(known.get(name) or BandSpec(name, mean, std, (0.0, 1.0)) for name in bands),
        unit="reflectance",
        default_unit="dn",
        scale=SENSORS["rgb"].scale,
        source="ImageNet; bands that a picture does not have take the mean of red, green and blue",
    )


def _with_statistics(spec: SensorSpec, values: dict[str, tuple[float, float]], source: str) -> SensorSpec:
    entries = spec.to_dict()
    for band in entries["bands"]:
        if band["name"] in values:
            band["mean"], band["std"] = map(float, values[band["name"]])
    return SensorSpec.from_dict({**entries, "source": source})


def _fit_windows(translation: Translation, architecture: Architecture, fields: dict):
    """Bring position biases to the one window that all stages have here."""
    window, patch = fields["window_size"], fields["patch_size"]
    if fields["position_bias"] == "log_cpb":
        learned = architecture.pretrained_windows
        if architecture.origins["pretrained_window_sizes"] == ASSUMED:
            translation.remarks.append(
                "the source does not tell the windows of its pretraining, by which offsets are divided: its own, "
                f"{learned} tokens per stage, are assumed. Numbers differ from the original's if it was fine-tuned in "
                "larger ones; its `relative_coords_table` or its configuration would tell"
            )
        if window != max(architecture.windows):
            translation.remarks.append(
                f"position biases are networks of the offset, learned in windows of {learned} tokens per stage and "
                f"evaluated anew in windows of {window}"
            )
        fields["pretrained_window_sizes"] = [0 if size == window else size for size in learned]
        return
    for name, table in list(translation.tensors.items()):
        if not name.endswith(".relative_position_bias_table"):
            continue
        stage = int(name.split(".")[2])
        old = architecture.windows[stage]
        if window != max(architecture.windows):
            # Where the map is smaller than the window, the programs that resize build a window of the map's size.
            new = max(1, min(window, fields["image_size"] // patch // 2**stage))
            if new != old:
                table = resize_table(table, new)
                translation.change(name, table, f"table of windows of {old} resized to {new}, by a spline")
                old = new
        if old < window:
            table = centre_table(table, window)
            how = f"table of windows of {old} in the middle of one of {window}; beyond it, the rim"
            translation.change(name, table, how)


def _make_experts(translation: Translation, fields: dict, origins: dict, num_experts: int):
    """Copies of the MLPs of the paper's blocks as experts."""
    if any(fields["moe_blocks"]):
        if fields["num_experts"] != num_experts:
            raise ValueError(
                f"`--num-experts` must be left out for a source with experts, which has {fields['num_experts']}, got "
                f"{num_experts}. Leave it out."
            )
        return
    blocks = MsGFMConfig(
        depths=fields["depths"], num_heads=fields["num_heads"], embed_dim=fields["embed_dim"]
    ).moe_blocks
    if not any(blocks):
        raise ValueError(
            f"`--num-experts` must be left out for a source without a second block in its stage 3, got depths "
            f"{fields['depths']}. Experts go into every other block of that stage."
        )
    fields.update(moe_blocks=blocks, num_experts=num_experts)
    origins.update(moe_blocks="the paper's", num_experts="option")
    for stage, numbers in enumerate(blocks):
        for block in numbers:
            path = f"encoder.layers.{stage}.blocks.{block}.mlp."
            for old, new in (("fc1", "up_proj"), ("fc2", "down_proj")):
                for kind, ending in (("weight", ""), ("bias", "_bias")):
                    name, final = f"{path}{old}.{kind}", f"{path}experts.{new}{ending}"
                    copies = translation.tensors[name].unsqueeze(0).repeat(num_experts, *[1] * (2 - (kind == "bias")))
                    if name in translation.fresh:
                        translation.make(final, copies, translation.fresh.pop(name))
                        del translation.tensors[name]
                        continue
                    translation.rename(name, final)
                    translation.change(final, copies, f"{num_experts} copies, one per expert")
    translation.remarks.append(
        f"the {num_experts} experts of a block are copies of the source's MLP behind a fresh router: before training "
        "their output is the top-1 gate, about 1 / experts, times that of the source"
        + (", which the norm behind them nearly undoes" if fields["norm_position"] == "post" else "")
    )


def _fit_bands(translation: Translation, architecture: Architecture, config: MsGFMConfig, spec: SensorSpec):
    """Put channels where the sensor has their bands; bands that the source lacks are zero."""
    names = config.inputs[spec.id]
    index, total = spec.index(names), len(spec.bands)
    absent = [band.name for band in spec.bands if band.name not in names]
    how = f"bands {', '.join(names)} by name" + (f"; zero for {', '.join(absent)}" if absent else "")
    kernel = f"embeddings.patch_embeddings.{SENSOR}.projection.weight"
    if index != list(range(total)):
        old = translation.tensors[kernel]
        new = old.new_zeros(len(old), total, *old.shape[2:])
        new[:, index] = old
        translation.change(kernel, new, how)
    if absent:
        translation.remarks.append(
            f"{spec.id} has bands that the source does not know ({', '.join(absent)}): they count for nothing until "
            f"they are trained. `config.inputs` names the {len(names)} it knows"
        )
    if architecture.decoder_bands is None:
        return
    for kind in ("weight", "bias"):
        name = f"decoders.{SENSOR}.{kind}"
        if architecture.decoder_bands != architecture.num_bands:
            translation.drop(
                name, f"predicts {architecture.decoder_bands} bands of a picture, where the input has {len(names)}"
            )
        elif index != list(range(total)):
            old = translation.tensors[name]
            area = config.encoder_stride**2
            new = old.new_zeros(total * area, *old.shape[1:])
            new.view(total, area, -1)[index] = old.reshape(len(names), area, -1)
            translation.change(name, new, how)
    if architecture.decoder_bands != architecture.num_bands:
        translation.remarks.append("the decoder is fresh: that of the source predicts other bands than the input has")


def _build(translation: Translation, config: MsGFMConfig, with_decoder: bool) -> MsGFMPreTrainedModel:
    """The model of the tensors; what no source has is initialised, the same way each time."""
    sensor = next(iter(config.sensors))
    for name in list(translation.tensors):
        final = name.replace(SENSOR, sensor)
        if name in translation.fresh:
            translation.tensors[final] = translation.tensors.pop(name)
            translation.fresh[final] = translation.fresh.pop(name)
        else:
            translation.rename(name, final)
    if with_decoder:
        cls = MsGFMForPreTraining
    elif "classifier.weight" in translation.tensors:
        cls = MsGFMForImageClassification
    else:
        cls = MsGFMModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = cls(copy.deepcopy(config))
    wanted = {_bare(name): tensor for name, tensor in model.state_dict().items()}
    strange = sorted(set(translation.tensors) - set(wanted))
    wrong = [
        name for name, tensor in translation.tensors.items() if name in wanted and tensor.shape != wanted[name].shape
    ]
    if strange or wrong:
        what = [f"{name} without a place" for name in strange] + [
            f"{name} {tuple(translation.tensors[name].shape)} for {tuple(wanted[name].shape)}" for name in wrong
        ]
        raise ValueError(
            f"`SRC` must fit the architecture that its tensors tell, got {len(what)} that do not: "
            f"{', '.join(what[:4])}. It is damaged, or of another model; nothing was converted."
        )
    for name in wanted:
        if name in translation.tensors:
            continue
        if name == "embeddings.mask_token":
            translation.fresh[name] = "the source masks nothing"
        elif (
            ".mlp.router." in name
            and name.replace(name[name.index("router.") :], "experts.up_proj") in translation.tensors
        ):
            translation.fresh[name] = "the source has no experts"
        elif name.startswith("decoders."):
            translation.fresh[name] = "the source's predicts other bands"
        else:
            raise ValueError(
                f"`SRC` must hold the whole trunk, got nothing that becomes {name}. It is incomplete: fetch it again."
            )
    model.load_state_dict(
        {name: translation.tensors[_bare(name)] for name in model.state_dict() if _bare(name) in translation.tensors},
        strict=False,
    )
    return model.eval()


def _bare(name: str) -> str:
    return name.removeprefix(MsGFMPreTrainedModel.base_model_prefix + ".")


def _target_keys(translation: Translation, model: MsGFMPreTrainedModel) -> dict[str, dict]:
    keys = {}
    for name in model.state_dict():
        bare = _bare(name)
        if bare in translation.origins:
            how = "; ".join(translation.changes.get(bare, ()))
            keys[name] = {"status": "transformed" if how else "loaded", "from": translation.origins[bare]}
            keys[name] |= {"how": how} if how else {}
        else:
            keys[name] = {"status": "fresh", "from": [], "how": translation.fresh[bare]}
    return keys


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(model: MsGFMPreTrainedModel, processor: MsGFMImageProcessor, report: dict, out: Path):
    """All of the folder, or none of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        (temporary / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        os.replace(temporary, out)
    except SafetensorError as error:
        raise OSError(f"`--out` must be writable, got {str(out)!r} ({error}). Make room; nothing was kept.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
