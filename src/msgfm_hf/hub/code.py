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
    "AutoImageProcessor": "image_processing_msgfm.MsGFMImageProcessor",
}
CUSTOM_PIPELINES = {
    "multisensor-image-feature-extraction": {
        "impl": "pipeline_msgfm.MultisensorImageFeatureExtractionPipeline",
        "pt": ["AutoModel"],
        "type": "image",
    },
    "multisensor-image-classification": {
        "impl": "pipeline_msgfm.MultisensorImageClassificationPipeline",
        "pt": ["AutoModelForImageClassification"],
        "type": "image",
    },
    "multisensor-image-segmentation": {
        "impl": "pipeline_msgfm.MultisensorImageSegmentationPipeline",
        "pt": ["AutoModelForSemanticSegmentation"],
        "type": "image",
    },
    "multisensor-image-to-image": {
        "impl": "pipeline_msgfm.MultisensorImageToImagePipeline",
        "pt": ["AutoModelForPreTraining"],
        "type": "image",
    },
}


def write_model_code(folder: str | os.PathLike) -> list[Path]:
    """Copy the files of `model/` into a saved checkpoint and name their classes in its configuration.

    After this `AutoModel.from_pretrained(folder, trust_remote_code=True)` works without the package, and so do all
    other Auto classes of the model and `pipeline(task, model=folder, trust_remote_code=True)` of its own pipelines.

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
    # The configurations last: they name the files above. The processor's must not: where it names its class, nobody
    # looks into the model's, and where it names its code, pipelines expect code of a video processor beside it.
    named_by_processor = ("image_processor_type", "auto_map")
    for name, dropped, added in (
        ("config.json", (), {"auto_map": AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES}),
        ("preprocessor_config.json", named_by_processor, {}),
    ):
        path = folder / name
        if path.is_file():
            entries = {key: value for key, value in json.loads(path.read_text()).items() if key not in dropped}
            temporary = folder / f".{name}"
            temporary.write_text(json.dumps({**entries, **added}, indent=2, sort_keys=True) + "\n")
            os.replace(temporary, path)
            written.append(path)
    return written
