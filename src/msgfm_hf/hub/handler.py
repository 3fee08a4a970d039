"""Hosted inference of an msGFM checkpoint: the `EndpointHandler` that Hugging Face's Inference Endpoints look for.

It lies in the repository of the checkpoint and needs nothing but what `requirements.txt` there names.

A request is `{"inputs": ..., "parameters": {...}}`. `inputs` is a picture (bytes or base64; for checkpoints of RGB), a
GeoTIFF or an npz (base64) of the checkpoint's single sensor, or `{sensor: GeoTIFF or npz in base64}` on one pixel grid.
`parameters` are those of the image processor (`unit`, `scale`, `offset`, `level`, `bands`, `nodata`) and of the task:
`top_k` for classification, `pool` for features, `target`, `target_bands`, `target_unit` for an image of another sensor.

Answers are what the pipelines of the checkpoint give, as JSON; masks are PNG and images npz, in base64. Whatever goes
wrong is `{"error": message}`.
"""

import base64
import binascii
import io
import json
import math
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import pipeline

MAX_BYTES = 64 * 2**20
MAX_UNPACKED_BYTES = 256 * 2**20
MAX_PIXELS = 2048 * 2048

_TASKS = {
    "MsGFMForImageClassification": "multisensor-image-classification",
    "MsGFMForSemanticSegmentation": "multisensor-image-segmentation",
}
_FEATURES, _IMAGES = "multisensor-image-feature-extraction", "multisensor-image-to-image"


class EndpointHandler:
    """Answers requests with the model in a folder.

    Args:
        path: folder of the checkpoint, with its code.
    """

    def __init__(self, path: str = "", **kwargs):
        self.path = path
        config = json.loads(Path(path, "config.json").read_text())
        architecture = (config.get("architectures") or [""])[0]
        self.sensors = set(config["sensors"])
        self.task = _TASKS.get(architecture, _FEATURES)
        self.has_decoders = architecture == "MsGFMForPreTraining"
        self.pipelines = {self.task: self._load(self.task)}

    def _load(self, task: str):
        return pipeline(task, model=self.path, trust_remote_code=True)

    def __call__(self, data: dict) -> dict | list:
        """`{"inputs": ..., "parameters": ...}` -> the answer, or `{"error": message}`."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                return self._answer(data, Path(folder))
        except Exception as error:  # whatever it is, the one who asked shall read it, and the next request be answered
            return {"error": str(error) or type(error).__name__}

    def _answer(self, data: dict, folder: Path) -> dict | list:
        if not isinstance(data, dict) or data.get("inputs") in (None, "", {}, b""):
            raise ValueError("`inputs` must be an image or {sensor: image}, got nothing. Send {'inputs': ...}.")
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError(f"`parameters` must be an object, got {parameters!r}. Send {{'parameters': {{...}}}}.")
        task = self.task
        if "target" in parameters:
            if not self.has_decoders:
                raise ValueError("`target` must be left out for this checkpoint, got one. It has no decoders.")
            task = _IMAGES
        if task == _FEATURES:
            parameters = {"pool": True, "return_tensors": False, **parameters}
        if task not in self.pipelines:
            self.pipelines[task] = self._load(task)
        inputs = data["inputs"]
        unknown = sorted(set(inputs) - self.sensors) if isinstance(inputs, dict) else []
        if unknown:
            raise ValueError(
                f"`inputs` must be of the sensors of this checkpoint ({', '.join(sorted(self.sensors))}), got "
                f"{unknown[0]!r}. Correct the name."
            )
        return _as_json(self.pipelines[task](_read_inputs(inputs, folder), **parameters))


def _read_inputs(inputs, folder: Path):
    """What was sent -> a place for the pipelines. All images of a request share the limits."""
    several = inputs if isinstance(inputs, dict) else {"inputs": inputs}
    total = 0
    for name, value in several.items():
        size = len(value) * 3 // 4 if isinstance(value, str) else len(value) if isinstance(value, bytes) else 0
        total += size
        if total > MAX_BYTES:
            raise ValueError(
                f"`inputs` must be at most {MAX_BYTES // 2**20} MiB, got {total / 2**20:.0f} MiB with {name!r}. Send "
                "a smaller window."
            )
    images, unpacked = {}, [0]
    for name, value in several.items():
        images[name] = _read_image(name, value, folder, unpacked)
    return images if isinstance(inputs, dict) else images["inputs"]


def _read_image(name: str, value, folder: Path, unpacked: list[int]):
    """One image; `unpacked` holds the bytes of those before it."""
    if isinstance(value, Image.Image):
        return _picture(name, value)
    if isinstance(value, str):
        # Encoders break lines.
        value = "".join((value.partition("base64,")[2] or value).split())
        try:
            value = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"`{name}` must be in base64, got other characters ({error}). Encode the file.") from error
    if not isinstance(value, bytes):
        raise ValueError(f"`{name}` must be a file in base64, got {type(value).__name__}. Encode a GeoTIFF or an npz.")
    if value[:4] in (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"):
        path = folder / f"{len(list(folder.iterdir()))}.tif"
        path.write_bytes(value)
        try:
            with tifffile.TiffFile(path) as file:
                pages = [page.aspage() for page in file.pages]
                shapes, size = [(page.imagewidth, page.imagelength) for page in pages], sum(p.nbytes for p in pages)
        except Exception as error:  # tifffile raises types of its own
            raise ValueError(
                f"`{name}` must be a readable TIFF, got a damaged one ({error}). Send it again."
            ) from error
        for width, height in shapes:
            _check_pixels(name, width, height)
        _check_unpacked(name, size, unpacked)
        return str(path)
    if value[:4] == b"PK\x03\x04":
        return _read_npz(name, value, unpacked)
    try:
        return _picture(name, Image.open(io.BytesIO(value)))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(
            f"`{name}` must be a picture, a GeoTIFF or an npz, got something else ({error}). Send one of these."
        ) from error


def _picture(name: str, picture: Image.Image) -> Image.Image:
    _check_pixels(name, *picture.size)
    if picture.mode.startswith(("I", "F")):
        raise ValueError(
            f"`{name}` must be a picture of 8 bits, got one of mode {picture.mode!r}. Send other numbers as GeoTIFF or "
            "npz."
        )
    # As it was taken, not as the camera lay.
    return ImageOps.exif_transpose(picture).convert("RGB")


def _read_npz(name: str, value: bytes, unpacked: list[int]) -> np.ndarray:
    try:
        with zipfile.ZipFile(io.BytesIO(value)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        _check_unpacked(name, size, unpacked)
        with np.load(io.BytesIO(value), allow_pickle=False) as arrays:
            if len(arrays.files) != 1:
                raise ValueError(
                    f"`{name}` must hold one array, got {', '.join(arrays.files) or 'none'}. Send one each."
                )
            array = arrays[arrays.files[0]]
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"`{name}` must be a readable npz, got a damaged one ({error}). Send it again.") from error
    if array.ndim not in (2, 3):
        raise ValueError(f"`{name}` must be (bands, height, width), got shape {array.shape}. Send one image.")
    _check_pixels(name, *array.shape[-2:])
    return array


def _check_unpacked(name: str, size: int, before: list[int]):
    before[0] += size
    if before[0] > MAX_UNPACKED_BYTES:
        raise ValueError(
            f"`inputs` must be at most {MAX_UNPACKED_BYTES // 2**20} MiB unpacked, got {before[0] / 2**20:.0f} MiB "
            f"with {name!r}. Send a smaller window."
        )


def _check_pixels(name: str, width: int, height: int):
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"`{name}` must have at most {math.isqrt(MAX_PIXELS)} x {math.isqrt(MAX_PIXELS)} pixels, got {width} x "
            f"{height}. Send a smaller window."
        )


def _as_json(value):
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()
    if isinstance(value, np.ndarray):
        buffer = io.BytesIO()
        np.savez_compressed(buffer, image=value)
        return base64.b64encode(buffer.getvalue()).decode()
    if isinstance(value, dict):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    # Numbers of numpy, and tensors.
    return value.tolist() if hasattr(value, "tolist") else value
