"""Puts the model's code beside a checkpoint, so that it loads where the package is not installed."""

import json
import os
import shutil
from importlib import resources
from pathlib import Path

AUTO_MAP = {
    "AutoConfig": "configuration_msgfm.MsGFMConfig",
    "AutoModel": "modeling_msgfm.MsGFMModel",
    "AutoBackbone": "modeling_msgfm.MsGFMBackbone",
    "AutoModelForPreTraining": "modeling_msgfm.MsGFMForPreTraining",
    "AutoModelForMaskedImageModeling": "modeling_msgfm.MsGFMForPreTraining",
    "AutoModelForImageClassification": "heads_msgfm.MsGFMForImageClassification",
    "AutoModelForSemanticSegmentation": "heads_msgfm.MsGFMForSemanticSegmentation",
}
PROCESSOR_AUTO_MAP = {"AutoImageProcessor": "image_processing_msgfm.MsGFMImageProcessor"}


def write_model_code(folder: str | os.PathLike) -> list[Path]:
    """Copy the files of `model/` into a saved checkpoint and name their classes in its configuration.

    After this `AutoModel.from_pretrained(folder, trust_remote_code=True)` works without the package, and so do all
    other Auto classes of the model.

    Args:
        folder: a folder that `save_pretrained` of a model wrote, and possibly of its image processor.

    Returns:
        the files written.

    Raises:
        ValueError: if the folder holds no msGFM checkpoint.
    """
    folder = Path(folder)
    config = folder / "config.json"
    if not config.is_file() or json.loads(config.read_text()).get("model_type") != "msgfm":
        raise ValueError(f"`folder` must hold an msGFM checkpoint, got {str(folder)!r}. Call `save_pretrained` first.")
    written = []
    for file in sorted(resources.files("msgfm_hf").joinpath("model").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".py") and file.name != "__init__.py":
            with resources.as_file(file) as path:
                temporary = folder / f".{file.name}"
                shutil.copyfile(path, temporary)
            os.replace(temporary, folder / file.name)
            written.append(folder / file.name)
    # The configurations last: they name the files above.
    for name, auto_map in (("config.json", AUTO_MAP), ("preprocessor_config.json", PROCESSOR_AUTO_MAP)):
        path = folder / name
        if path.is_file():
            entries = {**json.loads(path.read_text()), "auto_map": auto_map}
            temporary = folder / f".{name}"
            temporary.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
            os.replace(temporary, path)
            written.append(path)
    return written
