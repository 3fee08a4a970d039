"""The doors of Transformers: Auto classes, saving and loading, and the same checkpoint without the package."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
    pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY

import msgfm_hf
from msgfm_hf.hub.code import AUTO_MAP, CUSTOM_PIPELINES, write_model_code
from without_package import run_without_package

TINY = {
    "embed_dim": 12,
    "depths": [1, 1, 2],
    "num_heads": [1, 2, 2],
    "window_size": 3,
    "num_experts": 2,
    "image_size": 32,
    "mask_patch_size": 16,
}
AUTO_CLASSES = {
    AutoModel: msgfm_hf.MsGFMModel,
    AutoBackbone: msgfm_hf.MsGFMBackbone,
    AutoModelForPreTraining: msgfm_hf.MsGFMForPreTraining,
    AutoModelForMaskedImageModeling: msgfm_hf.MsGFMForPreTraining,
    AutoModelForImageClassification: msgfm_hf.MsGFMForImageClassification,
    AutoModelForSemanticSegmentation: msgfm_hf.MsGFMForSemanticSegmentation,
}


@pytest.mark.parametrize("auto", AUTO_CLASSES, ids=lambda auto: auto.__name__)
def test_auto_classes_build_the_models_from_a_configuration(auto):
    assert type(auto.from_config(msgfm_hf.MsGFMConfig(**TINY))) is AUTO_CLASSES[auto]


@pytest.mark.parametrize("auto", [a for a in AUTO_CLASSES if a is not AutoBackbone], ids=lambda auto: auto.__name__)
def test_auto_classes_load_what_was_saved(auto, tmp_path):
    model = AUTO_CLASSES[auto](msgfm_hf.MsGFMConfig(**TINY)).eval()
    model.save_pretrained(tmp_path)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is AUTO_CLASSES[auto]
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    pixels = torch.randn(1, 3, 29, 37)
    with torch.no_grad():
        for ours, theirs in zip(model(pixels).to_tuple(), loaded.eval()(pixels).to_tuple(), strict=True):
            if isinstance(ours, torch.Tensor):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_configuration_and_processor_load_by_name(tmp_path):
    config = msgfm_hf.MsGFMConfig(**TINY, inputs={"s1": ["VV", "VH"]})
    config.save_pretrained(tmp_path)
    msgfm_hf.MsGFMImageProcessor.from_config(config).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is msgfm_hf.MsGFMConfig and loaded.inputs == {"s1": ["VV", "VH"]}
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is msgfm_hf.MsGFMImageProcessor and processor.sensors == loaded.sensors


def test_bf16_checkpoints_keep_their_dtype_and_stay_close(tmp_path):
    model = msgfm_hf.MsGFMModel(msgfm_hf.MsGFMConfig(**TINY)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        exact = model(pixels).pooler_output
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        rounded = loaded(pixels).pooler_output
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("task", ["image-classification", "image-segmentation", "image-feature-extraction"])
def test_stock_pipelines_take_an_ordinary_picture(task, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    cls = {
        "image-classification": msgfm_hf.MsGFMForImageClassification,
        "image-segmentation": msgfm_hf.MsGFMForSemanticSegmentation,
        "image-feature-extraction": msgfm_hf.MsGFMModel,
    }[task]
    model = cls(msgfm_hf.MsGFMConfig(**TINY, num_labels=3)).eval()
    model.save_pretrained(tmp_path)
    processor = msgfm_hf.MsGFMImageProcessor.from_config(model.config)
    processor.save_pretrained(tmp_path)
    arrays = [np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8) for seed in range(3)]
    with torch.no_grad():
        outputs = [model(**processor(array)) for array in arrays]
    pipe = pipeline(task, model=str(tmp_path))
    for batch_size in (1, 2):
        found = pipe([Image.fromarray(array) for array in arrays], batch_size=batch_size)
        assert len(found) == 3
        for result, output in zip(found, outputs, strict=True):
            if task == "image-classification":
                scores = [label["score"] for label in sorted(result, key=lambda label: label["label"])]
                assert scores == pytest.approx(output.logits.softmax(-1)[0].tolist(), rel=1e-4)
            elif task == "image-segmentation":
                masks = {label["label"]: np.asarray(label["mask"]) == 255 for label in result}
                for index in range(3):
                    empty = np.zeros((40, 50), bool)
                    classes = output.logits.argmax(1)[0].numpy()
                    assert np.array_equal(masks.get(f"LABEL_{index}", empty), classes == index)
            else:
                torch.testing.assert_close(torch.tensor(result), output.last_hidden_state, atol=1e-5, rtol=1e-4)
    assert "not supported" not in caplog.text


REMOTE = """
    import json, sys
    import torch
    try:
        import msgfm_hf
    except ImportError:
        pass
    else:
        raise SystemExit("the package must be out of reach here")
    import transformers
    folder, pixels = sys.argv[1], torch.load(sys.argv[2])
    out = {}
    for name in ("AutoModel", "AutoModelForPreTraining", "AutoModelForMaskedImageModeling"):
        model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            out[name] = model(pixels)[0 if name == "AutoModel" else "reconstruction"].sum().item()
    for name in ("AutoModelForImageClassification", "AutoModelForSemanticSegmentation"):
        model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
        model.set_experts_implementation("grouped_mm")
        model.set_attn_implementation("eager")
        out[name] = list(model(pixels).logits.shape)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    maps = transformers.AutoBackbone.from_config(config, trust_remote_code=True)(pixels).feature_maps
    out["AutoBackbone"] = list(maps[-1].shape)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    out["AutoImageProcessor"] = processor(pixels[0].abs().clamp(max=1).mul(255).byte())["pixel_values"].sum().item()
    options = {"unit": {"rgb": "reflectance"}}
    for task in ("feature-extraction", "classification", "segmentation"):
        pipe = transformers.pipeline(f"multisensor-image-{task}", model=folder, trust_remote_code=True)
        place = {"rgb": pixels[0].numpy().clip(0, 1)}
        if task == "feature-extraction":
            place["dsm"] = pixels[0, :1].numpy()
        found = pipe([place] * 3, batch_size=2, **options)
        out[task] = found[2] if task == "feature-extraction" else sorted(found[2][0])
        assert type(pipe).__module__.startswith("transformers_modules")
    print(json.dumps(out))
"""


def test_the_same_checkpoint_works_through_remote_code_alone(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    model = msgfm_hf.MsGFMForPreTraining(msgfm_hf.MsGFMConfig(**TINY)).eval()
    processor = msgfm_hf.MsGFMImageProcessor.from_config(model.config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_model_code(folder)
    pixels = torch.randn(1, 3, 29, 37)
    torch.save(pixels, tmp_path / "pixels.pt")
    done = run_without_package(tmp_path, REMOTE, str(folder), str(tmp_path / "pixels.pt"))
    assert "not supported" not in done.stderr
    remote = json.loads(done.stdout.splitlines()[-1])
    with torch.no_grad():
        trunk = AutoModel.from_pretrained(folder).eval()(pixels)
        assert remote["AutoModel"] == trunk[0].sum().item()
        assert remote["AutoModelForPreTraining"] == model(pixels).reconstruction.sum().item()
    assert remote["AutoModelForMaskedImageModeling"] == remote["AutoModelForPreTraining"]
    assert remote["AutoModelForImageClassification"] == [1, 2]
    assert remote["AutoModelForSemanticSegmentation"] == [1, 2, 29, 37]
    assert remote["AutoBackbone"] == [1, 48, 2, 3]
    local = processor(pixels[0].abs().clamp(max=1).mul(255).byte())["pixel_values"].sum().item()
    assert remote["AutoImageProcessor"] == pytest.approx(local)
    assert remote["classification"] == ["label", "score"] and remote["segmentation"] == ["label", "mask", "score"]
    # With the package, its own classes win, and nobody is asked to trust anything.
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    assert type(AutoModel.from_pretrained(folder)) is msgfm_hf.MsGFMModel
    assert type(AutoImageProcessor.from_pretrained(folder)) is msgfm_hf.MsGFMImageProcessor
    pipeline("image-feature-extraction", model=str(folder))
    for task in CUSTOM_PIPELINES:
        assert type(pipeline(task, model=str(folder))).__module__ == "msgfm_hf.model.pipeline_msgfm"
    pipe = pipeline("multisensor-image-feature-extraction", model=str(folder))
    place = {"rgb": pixels[0].numpy().clip(0, 1), "dsm": pixels[0, :1].numpy()}
    assert remote["feature-extraction"] == pipe(place, unit={"rgb": "reflectance"})
    # Saved by the package, it is a checkpoint like any other again: it names no code, for there is none beside it.
    pipe.save_pretrained(tmp_path / "again")
    assert type(pipeline(pipe.task, model=str(tmp_path / "again"))) is type(pipe)
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "auto_map" not in saved and "custom_pipelines" not in saved
    write_model_code(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["auto_map"] == AUTO_MAP and saved["custom_pipelines"] == CUSTOM_PIPELINES


def test_a_pipeline_of_ones_own_stays_in_the_configuration(tmp_path):
    mine = {"impl": "crops.CropPipeline", "pt": ["AutoModel"]}
    config = msgfm_hf.MsGFMConfig(**TINY, custom_pipelines={"crop-counting": mine, **CUSTOM_PIPELINES})
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).custom_pipelines == {"crop-counting": mine}


def test_everything_that_is_registered_is_named_for_remote_code():
    assert set(AUTO_MAP) == {"AutoConfig", "AutoImageProcessor", *(auto.__name__ for auto in AUTO_CLASSES)}
    registered = {
        task: {"impl": f"pipeline_msgfm.{entry['impl'].__name__}", "pt": [pt.__name__ for pt in entry["pt"]]}
        for task, entry in PIPELINE_REGISTRY.supported_tasks.items()
        if task.startswith("multisensor-")
    }
    assert {task: {**entry, "type": "image"} for task, entry in registered.items()} == CUSTOM_PIPELINES


def test_code_goes_only_beside_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="`folder` must hold an msGFM checkpoint, got .* Call `save_pretrained` first"):
        write_model_code(tmp_path)


def test_public_names_are_the_promised_ones():
    assert sorted(msgfm_hf.__all__) == [
        "BandSpec",
        "MsGFMBackbone",
        "MsGFMConfig",
        "MsGFMForImageClassification",
        "MsGFMForPreTraining",
        "MsGFMForSemanticSegmentation",
        "MsGFMImageProcessor",
        "MsGFMModel",
        "SENSORS",
        "SensorSpec",
        "count_parameters",
        "data_collator",
        "routing_statistics",
    ]
    for name in msgfm_hf.__all__:
        assert hasattr(msgfm_hf, name)
