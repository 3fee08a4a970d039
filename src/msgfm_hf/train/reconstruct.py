"""Figures 3 and 5 of the paper for any image: what a model predicts of masked sensors, from themselves and from each
other, and what that does to the statistics of radar backscatter."""

import json
import math
import os
import re
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from msgfm_hf import __version__
from msgfm_hf.data.batch import LOSS_REGIONS, rotations
from msgfm_hf.data.geotiff import check_grid, geo_module
from msgfm_hf.data.inputs import input_header, parse_inputs, read_input
from msgfm_hf.data.inspect import align
from msgfm_hf.data.shards import ShardImage, ShardSource, find_sources
from msgfm_hf.model.image_processing_msgfm import MsGFMImageProcessor
from msgfm_hf.model.masking import draw_mask, mask_to_pixels
from msgfm_hf.model.modeling_msgfm import MsGFMForPreTraining
from msgfm_hf.model.sensors import SensorSpec, get_sensor
from msgfm_hf.tasks.reconstruction import directions
from msgfm_hf.tasks.speckle import compare_backscatter, format_backscatter, is_backscatter
from msgfm_hf.train.checkpoint import run_record
from msgfm_hf.train.pictures import UNIT_NAMES, Backscatter, Reconstructed, draw_backscatter, draw_directions
from msgfm_hf.train.pretrain import source_commit

_PICTURES = ("reconstruction.png", "sar_statistics.png")


@dataclass
class Place:
    """The images of one footprint, on one pixel grid.

    Args:
        name: the folder of its results, where there are several places; also seeds the masks.
        title: what to call it.
        origin: where its images come from, for the record.
        images: {sensor: image as stored}.
        levels: {sensor: processing level, or `None` for the sensor's first}.
    """

    name: str
    title: str
    origin: dict
    images: dict[str, ShardImage]
    levels: dict[str, str | None]


@dataclass
class _Normalised:
    """A place as the model reads it: {sensor: tensor} each, of one image."""

    pixel_values: dict[str, torch.Tensor]  # (1, C, H, W)
    valid_mask: dict[str, torch.Tensor]  # bool (1, H, W)
    masks: dict[str, torch.Tensor]  # bool (1, L)
    decoding: dict[str, dict]  # bands, level and reference: what `inverse_radiometry` needs


@dataclass
class _Prediction:
    """One direction of a place.

    Args:
        sensor, target: ids of the input and of what is predicted from it.
        decoding: `bands`, `level` and `reference` of the target, for `inverse_radiometry`.
        values: (C, H, W), normalised: the prediction, and for a sensor's own the input where it was visible.
        shown: bool (H, W), where there is a reconstruction.
        wanted: (C, H, W), the target, normalised; `None` without an image of it.
        counted: {region: bool (H, W)}, where the two are compared; {} without an image of the target.
    """

    sensor: str
    target: str
    decoding: dict
    values: torch.Tensor
    shown: torch.Tensor
    wanted: torch.Tensor | None
    counted: dict[str, torch.Tensor]

    @property
    def name(self) -> str:
        return f"{self.sensor} → {self.target}"


def reconstruct(
    model: str | Path,
    out: str | Path,
    inputs: Sequence[str] | None = None,
    shards: str | Path | None = None,
    split: str = "val",
    rows: int = 1,
    mask_ratio: float = 0.6,
    seed: int = 0,
    size: int = 1024,
    region: str | None = None,
    command: str | None = None,
) -> dict:
    """Mask images, predict every sensor from itself and from every other, and write pictures, GeoTIFFs and numbers.

    A sensor that the model can predict but that has no image is predicted too, unless the record of the model's run
    says that the two never crossed; it has no errors.

    Args:
        model: folder of a pretrained model and its image processor.
        out: folder to write into: new, empty, or of a former reconstruction, whose files are replaced. For files:
            `reconstruction.png`, `IN_to_OUT.tif` per direction and, where a radar sensor is predicted,
            `sar_statistics.png`; for rows of shards the same in a folder per row. All numbers are in
            `reconstruction.json`.
        inputs: `SENSOR=PATH[,option=value]` (`data.inputs`), on one pixel grid. Give these or `shards`.
        shards: folder of a source, or of several.
        split, rows: at most so many rows of each source of the shards, evenly spread.
        mask_ratio: share of masked cells, 0..1. With 0 there are only crossings.
        seed: of the masks, which depend on it, the place and the sensor alone.
        size: of an image with more pixels along an axis only the centred window of this many is looked at, which
            bounds memory; in pixels, made whole masked cells.
        region: where a crossing is shown and counts: `masked`, under the input's mask, or `all`, every pixel. By
            default what the loss of the model's run counted, else `masked`. A sensor's own prediction always counts
            under the mask, and the rest of it is the input.
        command: what to write down as the command.

    Returns:
        what `reconstruction.json` holds: the settings and `places`, each with its `directions`: `input`, `target`,
        `trained` (whether the model's run had it; null where unknown), `file`, `bands`, `level`, `unit`, `reference`
        (metres added to heights; 0 without an image of the target, and they stay relative), `remarks` (bands, a level
        or heights that are not what they seem; they stand in the tags of the GeoTIFF too), `errors` {region: {`n`
        pixels, `error` (mean absolute, over pixels and bands) in `unit`, `error_std` the same in standard deviations of
        the sensor (15 m for elevation), `by_band` the same by band}} and, for radar, `backscatter` {region:
        `speckle.compare_backscatter`}.

    Raises:
        ValueError: if the model, the images or an argument cannot be used; then nothing is written.
    """
    model, out = Path(model), Path(out)
    if bool(inputs) == (shards is not None):
        raise ValueError(
            f"`input` or `shards` must be given, but not both, got {'both' if inputs else 'neither'}. Example: "
            "--input s1=s1.tif --input s2=s2.tif,offset=-1000"
        )
    if rows < 1:
        raise ValueError(f"`rows` must be at least 1, got {rows}. Leave it out for one row of each source.")
    if region not in (None, *LOSS_REGIONS):
        raise ValueError(f"`region` must be one of {', '.join(LOSS_REGIONS)}, got {region!r}. Leave it out.")
    former = _former_files(out)
    network, processor = _load(model)
    record = run_record(model)
    if region is None:
        region = record["recipe"]["cross_loss_region"] if record else "masked"
    if not 0 <= mask_ratio <= 1 or (mask_ratio == 0 and region == "masked"):
        raise ValueError(
            f"`mask_ratio` must be above 0 and at most 1, got {mask_ratio}. Nothing masked leaves only crossings of "
            "the region 'all' to predict."
        )
    cell = network.config.mask_patch_size
    if size < cell:
        raise ValueError(f"`size` must be at least one masked cell of {cell} pixels, got {size}. Raise it.")
    if inputs:
        places, total = iter([_read_place(inputs, network)]), 1
    else:
        sources = [ShardSource(folder, split) for folder in find_sources(shards)]
        _check_sensors({sensor for source in sources for sensor in source.sensors}, network)
        places, total = _row_places(sources, rows), sum(min(rows, len(source)) for source in sources)
    report = {
        "command": command,
        "commit": source_commit(),
        "torch": torch.__version__,
        "device": network.device.type,
        "model": str(model),
        "mask_ratio": mask_ratio,
        "seed": seed,
        "region_of_crossings": region,
        "places": [],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        for place in tqdm(places, total=total, desc="reconstructing", unit="place", disable=total == 1):
            folder = Path(temporary, "" if inputs else place.name)
            folder.mkdir(exist_ok=True)
            whole = next(iter(place.images.values())).pixels.shape[1:]
            place, window = _centre(place, size // cell * cell)
            normalised = _normalise(place, processor, network, mask_ratio, seed)
            predictions = _predict(network, processor, place, normalised, region, record)
            if not predictions:
                raise ValueError(
                    f"`mask_ratio` must be above 0 where there is nothing to cross to, got {mask_ratio} for sensor "
                    f"{', '.join(place.images)} alone. Mask something, or give a partner."
                )
            found = [_describe(prediction, processor, record, normalised.decoding) for prediction in predictions]
            for prediction, entry in zip(predictions, found, strict=True):
                file = folder / f"{prediction.sensor}_to_{prediction.target}.tif"
                entry["file"] = file.relative_to(temporary).as_posix()
                _write_geotiff(file, prediction, place, processor, report | entry)
            report["places"].append(
                {"title": place.title, **place.origin, "size": list(whole), "window": window, "directions": found}
            )
            _draw(place, normalised, predictions, found, processor, network.config.patch_size, folder)
        Path(temporary, "reconstruction.json").write_text(json.dumps(report, indent=2) + "\n")
        for path in former:
            path.unlink(missing_ok=True)
        for folder in sorted({path.parent for path in former if path.parent != out}):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        # The numbers last: where they are, so is what they speak of.
        for path in sorted(Path(temporary).rglob("*"), key=lambda path: path.suffix == ".json"):
            if path.is_file():
                goal = out / path.relative_to(temporary)
                goal.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, goal)
    return report


def _former_files(out: Path) -> list[Path]:
    """The files of the reconstruction that `out` holds; its numbers first, which say what the others are."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out` must be a folder, got the file {str(out)!r}. Name another.")
    if not out.exists() or not any(out.iterdir()):
        return []
    numbers = out / "reconstruction.json"
    try:
        places = json.loads(numbers.read_text())["places"]
        listed = [out / entry["file"] for place in places for entry in place["directions"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"`out` must be new, empty, or the folder of a former reconstruction, got {str(out)!r} with other files "
            f"({type(error).__name__}: {error}). Name another."
        ) from error
    listed += [folder / name for folder in {path.parent for path in listed} for name in _PICTURES]
    return [numbers, *(path for path in listed if path.resolve().is_relative_to(out.resolve()))]


def _load(folder: Path) -> tuple[MsGFMForPreTraining, MsGFMImageProcessor]:
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise ValueError(
                f"`model` must be the folder of a pretrained model and its image processor, got {str(folder)!r} "
                f"without {name}. Pretraining writes both."
            )
    model, info = MsGFMForPreTraining.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"`model` must be of {MsGFMForPreTraining.__name__}, whose decoders make images, got {str(folder)!r} of "
            f"{', '.join(model.config.architectures or ['an unnamed class'])} without {missing[0]} and "
            f"{len(missing) - 1} others. Give the pretrained model, not a head made from it."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), MsGFMImageProcessor.from_pretrained(folder)


def _sources(record: dict | None) -> list[dict[str, tuple[list[str], str | None]]] | None:
    """What the run of a model trained on: per source {sensor: (bands, level)}; `None` where nobody knows."""
    sources = []
    for found in (record or {"identity": {}})["identity"].get("sources", {}).values():
        sources.append({sensor: (bands, found["levels"][sensor]) for sensor, bands in found["bands"].items()})
    return sources or None


def _trained(record: dict | None, sensor: str, target: str) -> bool | None:
    """Whether the run had this direction; `None` where nobody knows."""
    sources = _sources(record)
    if sources is None:
        return None
    together = any({sensor, target} <= set(source) for source in sources)
    return together and (sensor == target or record["recipe"]["cross_sensor_ratio"] > 0)


def _read_place(texts: Sequence[str], model: MsGFMForPreTraining) -> Place:
    """The images of one `--input` each, of which the first says what the grid is."""
    given = parse_inputs(list(texts))
    _check_sensors(given, model)
    headers = {sensor: input_header(entry) for sensor, entry in given.items()}
    first, *others = headers
    for sensor in others:
        check_grid(headers[sensor], headers[first])
    return Place(
        "image",
        " and ".join(Path(entry.path).name for entry in given.values()),
        {"inputs": list(texts)},
        {sensor: read_input(entry) for sensor, entry in given.items()},
        {sensor: entry.level for sensor, entry in given.items()},
    )


def _row_places(sources: Sequence[ShardSource], rows: int) -> Iterator[Place]:
    for source in sources:
        for number in np.linspace(0, len(source) - 1, min(rows, len(source))).round().astype(int).tolist():
            row = source.read(number, verify=True)
            name = re.sub(r"[^\w.-]+", "_", f"{source.name}-{number}")
            origin = {"source": source.name, "split": source.split, "row": number, "key": row["key"]}
            title = f"{source.name}, row {number} of {source.split} ({row['key']})"
            yield Place(name, title, origin, row["images"], source.levels)


def _check_sensors(sensors: Iterable[str], model: MsGFMForPreTraining):
    missing = sorted(set(sensors) - set(model.config.sensors))
    if missing:
        raise ValueError(
            f"`model` must have the sensors of the images, got {', '.join(missing)} beside those of the model "
            f"({', '.join(model.config.sensors)}). Leave them out, or give another model."
        )


def _centre(place: Place, size: int) -> tuple[Place, dict | None]:
    """A place, or its centred window where it has more than `size` pixels along an axis; and what was cut."""
    height, width = next(iter(place.images.values())).pixels.shape[1:]
    rows, columns = min(height, size), min(width, size)
    if (rows, columns) == (height, width):
        return place, None
    top, left = (height - rows) // 2, (width - columns) // 2
    images = {sensor: image.window(top, left, rows, columns) for sensor, image in place.images.items()}
    return replace(place, images=images), {"top": top, "left": left, "height": rows, "width": columns}


def _normalise(
    place: Place, processor: MsGFMImageProcessor, model: MsGFMForPreTraining, mask_ratio: float, seed: int
) -> _Normalised:
    """Check and normalise the images of a place, and draw a mask for each."""
    normalised = _Normalised({}, {}, {}, {})
    for sensor, image in place.images.items():
        # A copy: torch takes neither read-only memory nor a foreign byte order.
        pixels = torch.from_numpy(np.array(image.pixels, dtype=image.pixels.dtype.newbyteorder("=")))[None]
        valid = torch.from_numpy(image.valid_mask())[None]
        options = {"bands": image.bands, "unit": image.units, "scale": image.scale, "offset": image.offset_dn}
        processor.check(pixels, valid, sensor, **options)
        pixels, valid = pixels.to(model.device), valid.to(model.device)
        level = get_sensor(sensor, processor.sensors).check_level(place.levels[sensor])
        found = processor.radiometry(pixels, valid, sensor, **options, level=level)
        if not found.valid_mask.any():
            raise ValueError(
                f"`input` must have valid pixels, got none for sensor {sensor!r} of {place.name}. Look at its nodata "
                "value and unit."
            )
        height, width = image.pixels.shape[1:]
        config = model.config
        generator = np.random.default_rng([seed, zlib.crc32(place.name.encode()), zlib.crc32(sensor.encode())])
        mask = draw_mask(height, width, config.patch_size, config.mask_patch_size, mask_ratio, generator)
        normalised.pixel_values[sensor] = found.values
        normalised.valid_mask[sensor] = found.valid_mask
        normalised.masks[sensor] = torch.from_numpy(mask)[None].to(model.device)
        reference = None if found.reference is None else found.reference.cpu()
        normalised.decoding[sensor] = {"bands": image.bands, "level": level, "reference": reference}
    return normalised


@torch.no_grad()
def _predict(
    model: MsGFMForPreTraining,
    processor: MsGFMImageProcessor,
    place: Place,
    normalised: _Normalised,
    region: str,
    record: dict | None,
) -> list[_Prediction]:
    """All directions between the sensors given, then from each of them to what the model can predict besides."""
    given = sorted(normalised.pixel_values)
    decoding, raw = dict(normalised.decoding), {}
    for targets in rotations(given):
        made = model(
            normalised.pixel_values,
            normalised.masks,
            bands={sensor: decoding[sensor]["bands"] for sensor in given},
            valid_mask=normalised.valid_mask,
            targets=targets,
        ).reconstruction
        raw |= {(sensor, target): made[sensor] for sensor, target in targets.items()}
    ways = directions(given)
    for target in sorted(set(model.config.sensors) - set(given)):
        inputs = [sensor for sensor in given if _trained(record, sensor, target) is not False]
        if not inputs:
            continue
        decoding[target] = _decoding_as_trained(get_sensor(target, processor.sensors), inputs, record)
        like = normalised.pixel_values[inputs[0]]
        # The decoder reads the bands and the size off an image of its sensor: one without a valid pixel.
        blank = like.new_zeros(1, len(decoding[target]["bands"]), *like.shape[2:])
        chosen = [*inputs, target]
        made = model(
            {sensor: normalised.pixel_values.get(sensor, blank) for sensor in chosen},
            {sensor: normalised.masks.get(sensor, normalised.masks[inputs[0]]) for sensor in chosen},
            bands={sensor: decoding[sensor]["bands"] for sensor in chosen},
            valid_mask={sensor: normalised.valid_mask.get(sensor, blank[:, 0] > 0) for sensor in chosen},
            targets=dict.fromkeys(chosen, target),
        ).reconstruction
        raw |= {(sensor, target): made[sensor] for sensor in inputs}
        ways += [(sensor, target) for sensor in inputs]

    predictions = []
    for sensor, target in ways:
        values = raw[sensor, target][0].float()
        masked = _masked(normalised, sensor, model.config.patch_size)
        if sensor == target and not masked.any():
            continue
        seen = normalised.valid_mask[sensor][0]
        everywhere = sensor != target and region == "all"
        wanted, counted = None, {}
        if target in given:
            wanted, both = normalised.pixel_values[target][0], seen & normalised.valid_mask[target][0]
            counted = {"all": both} if everywhere else {}
            if masked.any():
                counted["masked"] = both & masked
        predictions.append(
            _Prediction(
                sensor,
                target,
                decoding[target],
                torch.where(masked, values, wanted) if sensor == target else values,
                seen if everywhere or sensor == target else seen & masked,
                wanted,
                counted,
            )
        )
    return predictions


def _masked(normalised: _Normalised, sensor: str, patch_size: int) -> torch.Tensor:
    """Bool (H, W)."""
    height, width = normalised.pixel_values[sensor].shape[2:]
    return mask_to_pixels(normalised.masks[sensor], height, width, patch_size)[0]


def _decoding_as_trained(spec: SensorSpec, inputs: list[str], record: dict | None) -> dict:
    """For a target without an image: bands and level of the source that crossed it with an input; where nobody knows,
    all bands of the sensor's first level. Heights are relative to a reference nobody knows."""
    known = [source[spec.id] for source in _sources(record) or () if spec.id in source and set(inputs) & set(source)]
    level = spec.check_level(known[0][1] if known else None)
    every = [band.name for band in spec.bands if level is None or level in band.levels]
    reference = torch.zeros(1) if spec.reference else None
    return {"bands": known[0][0] if known else every, "level": level, "reference": reference}


def _decode(
    processor: MsGFMImageProcessor, sensor: str, decoding: dict, values: torch.Tensor, valid: torch.Tensor
) -> np.ndarray:
    """Normalised (C, H, W) -> the unit of the sensor's statistics, NaN where not valid."""
    unit = get_sensor(sensor, processor.sensors).unit
    return processor.inverse_radiometry(values[None].cpu(), valid[None].cpu(), sensor, unit=unit, **decoding)[0].numpy()


def _describe(found: _Prediction, processor: MsGFMImageProcessor, record: dict | None, given: dict[str, dict]) -> dict:
    """The numbers of one direction."""
    spec = get_sensor(found.target, processor.sensors)
    entry = {
        "input": found.sensor,
        "target": found.target,
        "trained": _trained(record, found.sensor, found.target),
        "bands": found.decoding["bands"],
        "level": found.decoding["level"],
        "reference": None if found.decoding["reference"] is None else found.decoding["reference"].item(),
        "unit": UNIT_NAMES[spec.unit],
        "remarks": _remarks(found, record, given),
        "errors": {},
    }
    for region, counted in found.counted.items():
        error = error_std = None
        by_band = {}
        if counted.any():
            ours, theirs = (
                _decode(processor, found.target, found.decoding, values, counted)
                for values in (found.values, found.wanted)
            )
            physical = np.nanmean(np.abs(ours - theirs), axis=(1, 2), dtype=np.float64).tolist()
            normalised = (found.values - found.wanted).abs()[:, counted].double().mean(1).tolist()
            error, error_std = float(np.mean(physical)), float(np.mean(normalised))
            by_band = {
                band: {"error": one, "error_std": other}
                for band, one, other in zip(entry["bands"], physical, normalised, strict=True)
            }
        entry["errors"][region] = {
            "n": int(counted.sum()),
            "error": error,
            "error_std": error_std,
            "by_band": by_band,
        }
    if is_backscatter(spec) and found.wanted is not None:
        entry["backscatter"] = {
            region: compare_backscatter(
                processor, found.target, entry["bands"], entry["level"], found.wanted, found.values, counted
            )
            for region, counted in found.counted.items()
        }
    return entry


def _remarks(found: _Prediction, record: dict | None, given: dict[str, dict]) -> list[str]:
    """What a reader of the numbers or the image must know beside them."""
    remarks = []
    if found.decoding["reference"] is not None and found.wanted is None:
        remarks.append("heights are relative to a level that is not known")
    sources = [source for source in _sources(record) or () if {found.sensor, found.target} <= set(source)]
    for sensor, here in {found.sensor: given[found.sensor], found.target: found.decoding}.items():
        trained = [source[sensor] for source in sources]
        absent = [band for band in here["bands"] if not any(band in bands for bands, _ in trained)]
        if trained and absent:
            remarks.append(f"the model's run had no {', '.join(absent)} of {sensor}")
        levels = sorted({level for _, level in trained if level})
        if levels and here["level"] not in levels:
            remarks.append(f"{sensor} is {here['level']}, the model's run had {' and '.join(levels)}")
    return remarks


def _write_geotiff(path: Path, found: _Prediction, place: Place, processor: MsGFMImageProcessor, facts: dict):
    """The reconstruction in physical units, on the grid of the place; what made it is in the tags."""
    rasterio = geo_module("rasterio")
    values = _decode(processor, found.target, found.decoding, found.values, found.shown)
    profile = {"driver": "GTiff", "dtype": "float32", "nodata": math.nan, "compress": "deflate", "predictor": 3}
    profile |= dict(zip(("count", "height", "width"), values.shape, strict=True))
    placed = next((image for image in place.images.values() if image.transform is not None), None)
    if placed is not None:
        profile |= {"crs": placed.crs, "transform": rasterio.Affine.from_gdal(*placed.transform)}
    with warnings.catch_warnings():
        # An image without a place on the map stays without one.
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", **profile) as file:
            file.write(values)
            file.descriptions = found.decoding["bands"]
            file.units = [UNIT_NAMES[get_sensor(found.target, processor.sensors).unit]] * len(values)
            told = (
                "model",
                "commit",
                "input",
                "target",
                "trained",
                "level",
                "reference",
                "mask_ratio",
                "seed",
                "remarks",
            )
            tags = {f"MSGFM_{name.upper()}": facts[name] for name in told if facts[name] not in (None, [])}
            file.update_tags(
                TIFFTAG_SOFTWARE=f"msgfm_hf {__version__}",
                TIFFTAG_IMAGEDESCRIPTION=f"{found.target} predicted from masked {found.sensor}, not measured"
                + (": masked pixels only" if found.sensor == found.target else ""),
                **{name: "; ".join(value) if isinstance(value, list) else value for name, value in tags.items()},
            )


def _draw(
    place: Place,
    normalised: _Normalised,
    predictions: list[_Prediction],
    found: list[dict],
    processor: MsGFMImageProcessor,
    patch_size: int,
    folder: Path,
):
    """`reconstruction.png`, and `sar_statistics.png` where a radar sensor is compared."""
    images = {
        sensor: _decode(processor, sensor, normalised.decoding[sensor], pixels[0], normalised.valid_mask[sensor][0])
        for sensor, pixels in normalised.pixel_values.items()
    }
    rows, radar = [], []
    for prediction, entry in zip(predictions, found, strict=True):
        sensor, target, decoding = prediction.sensor, prediction.target, prediction.decoding
        shown = _decode(processor, target, decoding, prediction.values, prediction.shown)
        # Of a crossing that counts everywhere, everywhere.
        region = next(iter(prediction.counted), None)
        error, text = None, f"no image of {target} given:\nstretched by the reconstruction"
        if region is None and decoding["reference"] is not None:
            text += "\nheights relative to their median"
        if region is not None:
            counted = prediction.counted[region].cpu().numpy()
            error = np.where(counted, np.abs(shown - images[target]).mean(0), np.nan)
            text = _error_text(entry, region)
        rows.append(
            Reconstructed(
                sensor,
                target,
                entry["trained"] is not False,
                {name: get_sensor(name, processor.sensors) for name in (sensor, target)},
                {sensor: normalised.decoding[sensor]["bands"], target: decoding["bands"]},
                images[sensor],
                _masked(normalised, sensor, patch_size).cpu().numpy(),
                shown,
                images.get(target),
                error,
                text,
                place.images[sensor].gsd,
            )
        )
        compared = entry.get("backscatter", {}).get(region)
        if compared:
            radar.append(
                [
                    Backscatter(
                        f"{prediction.name} ({region} pixels)",
                        band,
                        images[target][number][counted],
                        shown[number][counted],
                        compared[band],
                    )
                    for number, band in enumerate(decoding["bands"])
                ]
            )
    draw_directions(
        rows,
        f"{place.title}\nGrey: masked in the input, invalid, or not predicted. Where a sensor is its own target, "
        "visible pixels are the input's. Stretch limits come from the target; the error reaches to half of its range.",
        folder / _PICTURES[0],
    )
    if radar:
        draw_backscatter(
            radar,
            f"{place.title}\nBackscatter in the image (before) and in its reconstruction (after), same pixels.\n"
            "SSI = CV after / CV before, of linear power: 1 keeps the statistics, below 1 is smoother.",
            folder / _PICTURES[1],
        )


def _error_text(entry: dict, region: str) -> str:
    found = entry["errors"][region]
    if found["error"] is None:
        return "no pixel to compare"
    return f"mean |error| {found['error']:.3g} {entry['unit']} = {found['error_std']:.2f} σ, {region} pixels"


def format_reconstruction(report: dict) -> str:
    """The report as text: per place a line per direction and region, then backscatter before and after."""
    parts = []
    for place in report["places"]:
        width, height = place["size"][1], place["size"][0]
        title = f"{place['title']}, {width} x {height} pixels"
        if place["window"]:
            title += (
                f": only the centred {place['window']['width']} x {place['window']['height']} was looked at (`--size`; "
                "cut another with `gdal_translate -srcwin`)"
            )
        levels = {entry["target"]: entry["level"] for entry in place["directions"] if entry["level"]}
        title += "".join(f"; {sensor} as {level}" for sensor, level in levels.items())
        lines = [["direction", "trained", "file", "pixels", "n", "mean |error|", "in σ"]]
        radar, remarks = {}, []
        for entry in place["directions"]:
            name = f"{entry['input']} → {entry['target']}"
            trained = {True: "yes", False: "no", None: "?"}[entry["trained"]]
            first = [name, trained, entry["file"]]
            for region, found in entry["errors"].items() or [("no image", {"n": 0, "error": None})]:
                known = found["error"] is not None
                lines.append(
                    [
                        *first,
                        region,
                        f"{found['n']:,}",
                        f"{found['error']:.4g} {entry['unit']}" if known else "-",
                        f"{found['error_std']:.3f}" if known else "-",
                    ]
                )
                first = ["", "", ""]
            remarks += [f"  ! {name}: {remark}" for remark in entry["remarks"]]
            for region, compared in entry.get("backscatter", {}).items():
                radar[name, region] = compared
        parts.append("\n".join([title, align(lines, left=4), *remarks]))
        if any(radar.values()):
            parts.append(
                "Backscatter before and after, both clipped to the sensor's range; mean, std, CV and looks of linear "
                "power, SSI = CV after / CV before:\n" + format_backscatter(radar)
            )
    return "\n\n".join(parts)
