"""Foreign checkpoints: after conversion the numbers are those of the original, and every tensor is accounted for."""

import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.interpolate import make_interp_spline
from scipy.optimize import brentq
from transformers import (
    AutoImageProcessor,
    AutoModel,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    SwinModel,
    Swinv2Config,
    Swinv2ForImageClassification,
    Swinv2ForMaskedImageModeling,
    ViTImageProcessor,
)
from transformers.utils import logging

import swin_reference
from msgfm_hf import SENSORS, MsGFMForImageClassification, MsGFMForPreTraining, MsGFMModel
from msgfm_hf.cli import main
from msgfm_hf.convert.checkpoint import convert_checkpoint, format_conversion
from msgfm_hf.convert.windows import centre_table, resize_table
from swin_reference import forward, make_source, simmim_loss

ROOT = Path(__file__).resolve().parents[1]
HEADS = (2, 4)
# Absolute tolerances of float32, by the program that is compared with.
FEATURES = {"v1": 1e-4, "v2": 5e-4}
LOSS = {"v1": 2e-5, "v2": 2e-4}
DEEP = {"depths": (2, 2, 2), "num_heads": (2, 4, 8), "image_size": 96}


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable_progress_bar()


def save(folder, content, name="source.pth"):
    torch.save(content, folder / name)
    return [folder / name]


def simmim_source(kind="v1", out_bands=3, seed=0, **options):
    """An encoder with a mask token and its decoder, as SimMIM names them."""
    encoder = make_source(kind, masked=True, seed=seed, **options)
    channels = len(encoder["norm.weight"])
    stride = 4 * 2 ** (len(options.get("depths", (2, 2))) - 1)
    generator = torch.Generator().manual_seed(seed + 1)
    return {
        **{f"encoder.{key}": value for key, value in encoder.items()},
        "decoder.0.weight": torch.randn(stride**2 * out_bands, channels, 1, 1, generator=generator) * 0.1,
        "decoder.0.bias": torch.randn(stride**2 * out_bands, generator=generator) * 0.1,
    }


def assert_accounted(report, tensors):
    """Each source key is explained, and each key of the model."""
    assert set(report["source_keys"]) == set(tensors)
    for entry in report["source_keys"].values():
        assert entry["status"] in ("loaded", "transformed", "ignored")
        assert ("how" in entry) == (entry["status"] != "loaded") and bool(entry["to"]) == (entry["status"] != "ignored")
    for entry in report["target_keys"].values():
        assert entry["status"] in ("loaded", "transformed", "fresh") and bool(entry["from"]) == (
            entry["status"] != "fresh"
        )


def assert_pretraining_equal(model, tensors, kind, heads, window, size, channels=3):
    images, patches = torch.randn(2, channels, size, size), size // 4
    mask = torch.rand(2, patches, patches) < 0.6
    with torch.no_grad():
        output = model(images, mask.flatten(1))
        pixels, loss = simmim_loss(tensors, images, heads, window, mask)
    torch.testing.assert_close(output.reconstruction, pixels, atol=FEATURES[kind], rtol=0)
    assert abs(output.slice_losses - loss) < LOSS[kind] and loss > 0.1


# ------------------------------------------------------------------------------------------------------------- SimMIM


@pytest.mark.parametrize("options", [{}, {"window": 6, **DEEP}, {"window": 12, **DEEP}], ids=["w4", "w6", "w12"])
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_simmim_reconstructs_and_has_the_loss_of_the_original(kind, options, tmp_path):
    """With window 12 the last map is smaller than a window, which then is of the map's size in the original."""
    tensors = simmim_source(kind, **options)
    if kind == "v2":
        tensors = {key.replace("cpb_mlp", "rpe_mlp"): value for key, value in tensors.items()}
    report = convert_checkpoint(
        save(tmp_path, {"model": tensors, "optimizer": {"state": {}}, "epoch": 7}), tmp_path / "out"
    )
    assert report["layout"] == "simmim" and report["model_class"] == "MsGFMForPreTraining"
    assert report["other_entries"] == ["epoch", "optimizer"]
    assert_accounted(report, tensors)
    assert not [key for key, entry in report["target_keys"].items() if entry["status"] == "fresh"]
    model = MsGFMForPreTraining.from_pretrained(tmp_path / "out")
    reference = {key.replace("rpe_mlp", "cpb_mlp"): value for key, value in tensors.items()}
    size = options.get("image_size", 64)
    assert_pretraining_equal(model, reference, kind, options.get("num_heads", HEADS), options.get("window", 4), size)
    assert model.config.image_size == size and model.config.window_size == options.get("window", 4)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.sensors == model.config.sensors == {"rgb": SENSORS["rgb"].to_dict()}


def test_a_configuration_pickled_by_yacs_is_read_without_yacs(tmp_path):
    tensors = simmim_source()
    config = {
        "DATA": {"IMG_SIZE": 64, "MASK_PATCH_SIZE": 16},
        "MODEL": {
            "TYPE": "swin",
            "DROP_PATH_RATE": 0.1,
            "SWIN": {"DEPTHS": [2, 2], "WINDOW_SIZE": 4, "APE": False, "PATCH_NORM": True, "QK_SCALE": None},
            "SIMMIM": {"NORM_TARGET": {"ENABLE": True, "PATCH_SIZE": 47}},
        },
    }
    path = tmp_path / "ckpt_epoch_99.pth"
    with_config_node(lambda node: torch.save({"model": tensors, "config": node(config)}, path))
    report = convert_checkpoint([path], tmp_path / "out")
    assert report["config"]["mask_patch_size"] == {"value": 16, "origin": "stored configuration"}
    assert report["config"]["drop_path_rate"]["value"] == 0.1
    assert report["config"]["window_size"] == {"value": 4, "origin": "tensors"}
    assert any("NORM_TARGET" in remark for remark in report["remarks"])
    config["MODEL"]["SWIN"]["DEPTHS"] = [2, 6]
    with_config_node(lambda node: torch.save({"model": tensors, "config": node(config)}, path))
    with pytest.raises(ValueError, match=r"`SRC` must have the `depths` that its own configuration states, \[2, 6\]"):
        convert_checkpoint([path], tmp_path / "other")


def with_config_node(write):
    """Call `write` in a world where `yacs.config.CfgNode` exists, a dictionary with attributes as that of yacs."""
    module = type(sys)("yacs.config")

    class CfgNode(dict):
        def __init__(self, values):
            super().__init__({k: CfgNode(v) if isinstance(v, dict) else v for k, v in values.items()})
            self.__dict__["__immutable__"] = True
            self.__dict__["__deprecated_keys__"] = set()

    CfgNode.__module__, CfgNode.__qualname__, module.CfgNode = "yacs.config", "CfgNode", CfgNode
    sys.modules["yacs"], sys.modules["yacs.config"] = type(sys)("yacs"), module
    try:
        write(CfgNode)
    finally:
        del sys.modules["yacs"], sys.modules["yacs.config"]


def test_gfm_leaves_its_teacher_behind(tmp_path):
    student = simmim_source(channels=4, out_bands=4)
    teacher = {f"teacher.{key}": value for key, value in make_source(channels=4, image_size=56, window=7).items()}
    tensors = {**student, **teacher, "projector.weight": torch.randn(32, 32), "projector.bias": torch.randn(32)}
    report = convert_checkpoint(
        save(tmp_path, {"model": tensors}), tmp_path / "out", sensor="naip", bands=["red", "green", "blue", "nir"]
    )
    assert report["layout"] == "gfm"
    assert_accounted(report, tensors)
    assert report["source_keys"]["teacher.norm.weight"]["how"].startswith("of the teacher")
    assert "distillation" in report["source_keys"]["projector.bias"]["how"]
    model = MsGFMForPreTraining.from_pretrained(tmp_path / "out")
    assert_pretraining_equal(model, student, "v1", HEADS, 4, 64, channels=4)


def test_a_gfm_file_without_its_teacher_may_be_called_gfm(tmp_path):
    assert convert_checkpoint(save(tmp_path, simmim_source()), tmp_path / "out", layout="gfm")["layout"] == "gfm"


# --------------------------------------------------------------------------------------------- Swin, SwinV2, Swin-MoE


@pytest.mark.parametrize("options", [{}, {"window": 6, **DEEP}, {"window": 12, **DEEP}], ids=["w4", "w6", "w12"])
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_classifiers_have_the_logits_of_the_original(kind, options, tmp_path):
    tensors = make_source(kind, classes=11, **options)
    report = convert_checkpoint(save(tmp_path, {"model": tensors}), tmp_path / "out")
    assert report["layout"] == {"v1": "swin", "v2": "swinv2"}[kind]
    assert_accounted(report, tensors)
    fresh = {key: entry["how"] for key, entry in report["target_keys"].items() if entry["status"] == "fresh"}
    assert fresh == {"msgfm.embeddings.mask_token": "the source masks nothing"}
    model = MsGFMForImageClassification.from_pretrained(tmp_path / "out")
    size = options.get("image_size", 64)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        tokens = forward(tensors, images, options.get("num_heads", HEADS), options.get("window", 4))["tokens"]
        torch.testing.assert_close(model.msgfm(images).last_hidden_state, tokens, atol=FEATURES[kind], rtol=0)
        logits = tokens.mean(1) @ tensors["head.weight"].T + tensors["head.bias"]
        torch.testing.assert_close(model(images).logits, logits, atol=FEATURES[kind], rtol=0)


def test_swinv2_sees_through_its_mask_where_its_scores_are_sharp(tmp_path, monkeypatch):
    """It adds -100 to the scores of tokens that the roll brought, which cosines times 100 can outweigh: here queries
    are opposed to the keys of their own half of the image, and like those of the other."""
    tensors = make_source("v2")
    for key, value in tensors.items():
        if key.endswith("logit_scale"):
            value.fill_(math.log(100))
        if key in ("patch_embed.proj.bias", "patch_embed.norm.bias") or key.startswith("layers.0.blocks.0.norm"):
            value.zero_()
    qkv = tensors["layers.0.blocks.1.attn.qkv.weight"]
    qkv[:16] = -qkv[16:32]
    tensors["layers.0.blocks.1.attn.q_bias"].zero_()
    images = torch.randn(2, 3, 1, 1).expand(2, 3, 64, 64).clone()
    images[:, :, 32:] *= -1
    convert_checkpoint(save(tmp_path, tensors), tmp_path / "out")
    model = MsGFMModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = forward(tensors, images, HEADS, 4)["tokens"]
        torch.testing.assert_close(model(images).last_hidden_state, expected, atol=FEATURES["v2"], rtol=0)
        # A size that needs padding still hides the padding altogether.
        assert model(images[..., :50, :58]).last_hidden_state.isfinite().all()
        mask = swin_reference.shift_mask
        monkeypatch.setattr(swin_reference, "shift_mask", lambda *arguments: mask(*arguments) * 1e6)
        assert (expected - forward(tensors, images, HEADS, 4)["tokens"]).abs().max() > 0.05


def test_a_trunk_alone_is_a_model_and_a_bare_state_dict_will_do(tmp_path):
    tensors = make_source("v1", channels=2)
    save_file(tensors, tmp_path / "source.safetensors")
    report = convert_checkpoint([tmp_path / "source.safetensors"], tmp_path / "out", sensor="s1", bands=["VH", "VV"])
    assert report["model_class"] == "MsGFMModel" and report["bands"] == {"s1": ["VH", "VV"]}
    model, images = AutoModel.from_pretrained(tmp_path / "out"), torch.randn(1, 2, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            model(images).last_hidden_state, forward(tensors, images, HEADS, 4)["tokens"], atol=1e-4, rtol=0
        )


def moe_source(**options):
    return make_source("moe", classes=9, moe_blocks=[[], [1]], **options)


@pytest.mark.parametrize("capacity_factor", [None, 1.25])
@pytest.mark.parametrize("cosine_router", [False, True], ids=["linear", "cosine"])
def test_swin_moe_routes_as_the_original_and_drops_what_it_drops(cosine_router, capacity_factor, tmp_path):
    tensors = moe_source(cosine_router=cosine_router)
    report = convert_checkpoint(save(tmp_path, {"model": tensors}, "model.pth.global"), tmp_path / "out")
    assert report["layout"] == "swin_moe"
    assert_accounted(report, tensors)
    assert any("assumed" in remark for remark in report["remarks"])
    model = MsGFMForImageClassification.from_pretrained(tmp_path / "out", eval_capacity_factor=capacity_factor)
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = forward(tensors, images, HEADS, 4, capacity_factor=capacity_factor)
        logits = expected["tokens"].mean(1) @ tensors["head.weight"].T + tensors["head.bias"]
        torch.testing.assert_close(model(images).logits, logits, atol=5e-5, rtol=0)
        selected = model.msgfm(images, output_router_logits=True).selected_experts[0].flatten()
    assert torch.equal(torch.where(selected == 4, -1, selected), expected["experts"][0])
    assert bool((selected == 4).any()) == (capacity_factor is not None)


def test_biases_of_older_tutel_are_matrices(tmp_path):
    tensors = moe_source()
    older = {k: v.unsqueeze(1) if k.endswith("_bias") and ".experts." in k else v for k, v in tensors.items()}
    convert_checkpoint(save(tmp_path, {"model": tensors}, "new.pth.global"), tmp_path / "new")
    convert_checkpoint(save(tmp_path, {"model": older}, "old.pth.global"), tmp_path / "old")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("new", "old"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def write_ranks(folder, tensors, world, whole=False, experts=4):
    """The files of `world` processes: a `.master` and experts alone per rank, or everything in each rank."""
    files, with_bias = [], not any(k.endswith("fc2_bias") and not v.any() for k, v in tensors.items())
    sharded = max(1, world // experts)
    for rank in range(world):
        part = {}
        for key, value in tensors.items():
            if ".experts." not in key:
                if whole:
                    part[key] = value
            elif world <= experts:
                part[key] = value.chunk(world)[rank].clone()
            else:
                width = -(-value.shape[1] // sharded)
                piece = value[rank // sharded, rank % sharded * width : (rank % sharded + 1) * width]
                part[key] = piece[None].clone()
        if not whole and not with_bias:
            part = {key: value for key, value in part.items() if not key.endswith("fc2_bias")}
        files.extend(save(folder, {"model": part}, f"model.pth.rank{rank}"))
    if not whole:
        shared = {key: value for key, value in tensors.items() if ".experts." not in key}
        if not with_bias:
            # Frozen, so it is saved with the rest, of the first rank.
            first = {k: v[: max(1, experts // world)] for k, v in tensors.items() if k.endswith("fc2_bias")}
            shared |= {key: value[:, : -(-value.shape[1] // sharded)] for key, value in first.items()}
        files.extend(save(folder, {"model": shared}, "model.pth.master"))
    return files[::-1]


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("fc2_bias", [True, False], ids=["bias", "frozen"])
def test_experts_of_several_ranks_are_one_model(world, fc2_bias, tmp_path):
    """Two or one experts per rank, and one expert over two or four."""
    tensors = moe_source(fc2_bias=fc2_bias)
    # Legacy files do not say how many experts there are.
    tensors = {key: value for key, value in tensors.items() if "_num_global_experts" not in key}
    whole = convert_checkpoint(save(tmp_path, {"model": tensors}, "whole.pth.global"), tmp_path / "whole")
    report = convert_checkpoint(write_ranks(tmp_path, tensors, world), tmp_path / "ranks")
    assert [file["name"] for file in report["files"]][:2] == ["model.pth.master", "model.pth.rank0"]
    assert report["target_keys"] == whole["target_keys"]
    one, many = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "ranks"))
    assert one.keys() == many.keys() and all(torch.equal(one[key], many[key]) for key in one)
    zero = [key for key, entry in report["target_keys"].items() if "no such bias" in entry.get("how", "")]
    assert bool(zero) != fc2_bias and all(not one[key].any() for key in zero)


def test_intermediate_files_hold_everything_per_rank(tmp_path):
    tensors = moe_source()
    convert_checkpoint(save(tmp_path, {"model": tensors}, "whole.pth.global"), tmp_path / "whole")
    convert_checkpoint(write_ranks(tmp_path, tensors, 2, whole=True), tmp_path / "ranks")
    one, many = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "ranks"))
    assert one.keys() == many.keys() and all(torch.equal(one[key], many[key]) for key in one)


def test_the_settings_of_swin_moe_are_taken_from_its_configuration(tmp_path):
    settings = {
        "TOP_VALUE": 2,
        "CAPACITY_FACTOR": 1.5,
        "IS_GSHARD_LOSS": True,
        "GATE_NOISE": 0.5,
        "AUX_LOSS_WEIGHT": 0.1,
    }
    config = {"MODEL": {"TYPE": "swin_moe", "SWIN_MOE": settings}, "DATA": {"IMG_SIZE": 64}}
    report = convert_checkpoint(save(tmp_path, {"model": moe_source(), "config": config}), tmp_path / "out")
    read = MsGFMForImageClassification.from_pretrained(tmp_path / "out").config
    assert (read.num_experts_per_tok, read.capacity_factor, read.router_aux_loss_type) == (2, 1.5, "gshard")
    assert (read.router_noise, read.router_aux_loss_coef) == (0.5, 0.1)
    assert not any("assumed" in remark for remark in report["remarks"])


# ------------------------------------------------------------------------------------------------------- Transformers

SMALL = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "encoder_stride": 8,
    "hidden_act": "gelu_new",
}


def lively(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


@pytest.mark.parametrize("names", ["written", "in memory"])
@pytest.mark.parametrize(
    "cls, config",
    [
        (SwinForMaskedImageModeling, SwinConfig(**SMALL)),
        (SwinForImageClassification, SwinConfig(**SMALL, id2label={0: "field", 1: "forest", 2: "sea"})),
        (SwinModel, SwinConfig(**SMALL, qkv_bias=False)),
        (Swinv2ForMaskedImageModeling, Swinv2Config(**SMALL)),
        (Swinv2ForImageClassification, Swinv2Config(**{**SMALL, "window_size": 16}, pretrained_window_sizes=[6, 6])),
    ],
    ids=["swin-mim", "swin-classes", "swin", "swinv2-mim", "swinv2-classes"],
)
def test_transformers_swin_gives_the_same_numbers(cls, config, names, tmp_path):
    original = lively(cls(config))
    original.save_pretrained(tmp_path / "source")
    if names == "in memory":
        save_file({k: v.contiguous() for k, v in original.state_dict().items()}, tmp_path / "source/model.safetensors")
    # Where both are there, nothing is unpickled.
    (tmp_path / "source/pytorch_model.bin").write_bytes(b"not a checkpoint")
    report = convert_checkpoint([tmp_path / "source"], tmp_path / "out")
    assert report["layout"] == "hf_swin"
    assert_accounted(report, load_file(tmp_path / "source/model.safetensors"))
    images, mask = torch.randn(2, 3, 64, 64), (torch.rand(2, 256) < 0.6).int()
    kind = "v2" if config.model_type == "swinv2" else "v1"
    with torch.no_grad():
        if "Masked" in cls.__name__:
            model = MsGFMForPreTraining.from_pretrained(tmp_path / "out")
            ours, theirs = model(images, mask), original(images, bool_masked_pos=mask)
            torch.testing.assert_close(ours.reconstruction, theirs.reconstruction, atol=FEATURES[kind], rtol=0)
            assert abs(ours.slice_losses - theirs.loss) < LOSS[kind]
        elif "Classification" in cls.__name__:
            model = MsGFMForImageClassification.from_pretrained(tmp_path / "out")
            torch.testing.assert_close(model(images).logits, original(images).logits, atol=FEATURES[kind], rtol=0)
            assert model.config.id2label == config.id2label
        else:
            model = MsGFMModel.from_pretrained(tmp_path / "out")
            expected = original(images)
            torch.testing.assert_close(model(images).last_hidden_state, expected.last_hidden_state, atol=1e-4, rtol=0)
            torch.testing.assert_close(model(images).pooler_output, expected.pooler_output, atol=1e-4, rtol=0)
    assert model.config.hidden_act == "gelu_new" and model.config.drop_path_rate == 0.1


def test_statistics_of_a_transformers_processor_are_kept_and_shards_are_joined(tmp_path):
    lively(SwinModel(SwinConfig(**SMALL))).save_pretrained(tmp_path / "source", max_shard_size="40KB")
    assert len(list((tmp_path / "source").glob("model-*.safetensors"))) > 1
    ViTImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.25, 0.2]).save_pretrained(tmp_path / "source")
    convert_checkpoint([tmp_path / "source"], tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(np.full((3, 8, 8), 255, np.uint8))["pixel_values"]
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([1.0, 2.4, 3.5])


@pytest.mark.parametrize(
    "settings, value, remark",
    [
        ({"do_normalize": False}, 1.0, None),
        ({"do_rescale": False}, (1 - 0.485) / 0.229, "multiplies pixels by something else than 1/255"),
        ({"do_resize": True, "size": {"height": 64, "width": 64}}, (1 - 0.485) / 0.229, "makes all images one size"),
    ],
)
def test_what_a_transformers_processor_does_is_kept_or_remarked_on(settings, value, remark, tmp_path):
    usual = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_resize": False}
    config = SwinConfig(**SMALL, num_labels=2, problem_type="multi_label_classification")
    SwinForImageClassification(config).save_pretrained(tmp_path / "source")
    ViTImageProcessor(**{**usual, **settings}).save_pretrained(tmp_path / "source")
    report = convert_checkpoint([tmp_path / "source"], tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(np.full((3, 8, 8), 255, np.uint8))["pixel_values"]
    assert pixels[0, 0, 0, 0].item() == pytest.approx(value)
    assert [remark for told in report["remarks"] if remark and remark in told] == ([remark] if remark else [])
    loaded = MsGFMForImageClassification.from_pretrained(tmp_path / "out").config
    assert loaded.problem_type == "multi_label_classification"


# -------------------------------------------------------------------------------------------- Satlas and torchvision


def torchvision_names(tensors, prefix=""):
    """A Swin state dict under the names of torchvision."""
    renamed = {}
    for key, value in tensors.items():
        parts = key.split(".")
        if key.startswith("patch_embed."):
            name = f"features.0.{0 if parts[1] == 'proj' else 2}.{parts[2]}"
        elif key.startswith("layers.") and parts[2] == "downsample":
            name = f"features.{2 * int(parts[1]) + 2}.{'.'.join(parts[3:])}"
        elif key.endswith("attn_mask"):
            continue
        elif key.startswith("layers."):
            inside = ".".join(parts[4:]).replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
            name = f"features.{2 * int(parts[1]) + 1}.{parts[3]}.{inside}"
            value = value.flatten() if inside.endswith("relative_position_index") else value
            if inside == "attn.q_bias":
                # The part of the keys holds anything: it is set to zero in a forward.
                both = tensors[key.replace("q_bias", "v_bias")]
                name, value = name.replace("q_bias", "qkv.bias"), torch.cat([value, torch.randn(len(value)), both])
            if inside == "attn.v_bias":
                continue
        else:
            name = key
        renamed[prefix + name] = value
    return renamed


@pytest.mark.parametrize("prefix", ["backbone.backbone.", "backbone.backbone.backbone."], ids=["one", "several"])
def test_satlas_backbones_have_the_features_of_torchvision(prefix, tmp_path):
    original = make_source("v2", classes=5, channels=3)
    tensors = torchvision_names(original, prefix)
    tensors["intermediates.0.fpn.inner_blocks.0.0.weight"] = torch.randn(8, 16, 1, 1)
    tensors["heads.0.layers.0.0.bias"] = torch.randn(3)
    report = convert_checkpoint(save(tmp_path, tensors), tmp_path / "out", sensor="s2", bands=["red", "B03", "blue"],
                                image_size=64)  # fmt: skip
    assert report["layout"] == "satlas" and report["model_class"] == "MsGFMModel"
    assert_accounted(report, tensors)
    ignored = {key for key, entry in report["source_keys"].items() if entry["status"] == "ignored"}
    assert {f"{prefix}head.weight", "heads.0.layers.0.0.bias", "intermediates.0.fpn.inner_blocks.0.0.weight"} < ignored
    model, images = MsGFMModel.from_pretrained(tmp_path / "out"), torch.randn(2, 3, 64, 64)
    assert model.config.inputs == {"s2": ["B04", "B03", "B02"]}
    with torch.no_grad():
        expected = forward(original, images, HEADS, 4)["tokens"]
        torch.testing.assert_close(model(images).last_hidden_state, expected, atol=5e-4, rtol=0)
        # Bands that the file does not know count for nothing yet.
        more = torch.cat([images, torch.randn(2, 1, 64, 64)], 1)
        names = {"s2": ["B04", "B03", "B02", "B08"]}
        torch.testing.assert_close(model({"s2": more}, bands=names).last_hidden_state, expected, atol=5e-4, rtol=0)
    assert any("B01" in remark and "count for nothing" in remark for remark in report["remarks"])
    assert any("statistics of the catalogue" in remark for remark in report["remarks"])


@pytest.mark.parametrize("prefix", ["backbone.backbone.", ""], ids=["Satlas", "torchgeo"])
def test_satlas_pictures_go_from_0_to_1(prefix, tmp_path):
    """Torchgeo passes on the bare backbones, with a classifier that nobody trained; nor was the norm before it."""
    original = {**make_source("v2", classes=5), "norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
    report = convert_checkpoint(save(tmp_path, torchvision_names(original, prefix)), tmp_path / "out", image_size=64)
    assert report["model_class"] == "MsGFMModel"
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor(np.full((3, 8, 8), 51, np.uint8))["pixel_values"].unique().tolist() == pytest.approx([0.2])


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_a_classifier_of_torchvision_keeps_its_head(kind, tmp_path):
    original = make_source(kind, classes=5)
    report = convert_checkpoint(save(tmp_path, torchvision_names(original)), tmp_path / "out", image_size=64)
    assert report["model_class"] == "MsGFMForImageClassification"
    model, images = MsGFMForImageClassification.from_pretrained(tmp_path / "out"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens = forward(original, images, HEADS, 4)["tokens"]
        logits = tokens.mean(1) @ original["head.weight"].T + original["head.bias"]
        torch.testing.assert_close(model(images).logits, logits, atol=FEATURES[kind], rtol=0)


# ------------------------------------------------------------------------------------------------------------ windows


def spline_table(table, window):
    """SimMIM's resizing by another road: the ratio from a root finder, the spline one direction after the other."""
    old, new = math.isqrt(len(table)), 2 * window - 1
    half, target = old // 2, new // 2

    def reach(ratio):
        return sum(ratio**step for step in range(half)) - target

    ratio = 1.01 if reach(1.01) > 0 else 1.5 if reach(1.5) < 0 else brentq(reach, 1.01, 1.5, xtol=1e-12)
    far = np.cumsum([ratio**step for step in range(half)])
    positions = np.concatenate([-far[::-1], [0], far])
    wanted = np.clip(np.arange(-target, target + 1), positions[0], positions[-1])
    grid = table.double().numpy().reshape(old, old, -1)
    down = make_interp_spline(positions, grid, k=3, axis=0)(wanted)
    both = make_interp_spline(positions, down, k=3, axis=1)(wanted)
    return torch.from_numpy(both.reshape(new * new, -1)).float()


@pytest.mark.parametrize("old, new", [(6, 12), (7, 12), (12, 7), (6, 8), (4, 3), (3, 12)])
def test_tables_are_resized_as_simmim_resizes_them(old, new):
    table = torch.randn((2 * old - 1) ** 2, 3)
    torch.testing.assert_close(resize_table(table, new), spline_table(table, new), atol=2e-4, rtol=0)


def test_a_resized_table_keeps_its_window_and_its_centre():
    table = torch.randn(121, 2)
    assert torch.equal(resize_table(table, 6), table)
    larger = resize_table(table, 12).view(23, 23, 2)
    # The zero offset, and its neighbours, one token away in both.
    torch.testing.assert_close(larger[10:13, 10:13], table.view(11, 11, 2)[4:7, 4:7], atol=1e-5, rtol=0)


def test_a_small_table_lies_in_the_middle_of_a_large_one():
    table = torch.arange(9.0).view(9, 1)
    larger = centre_table(table, 3).view(5, 5)
    assert torch.equal(larger[1:4, 1:4].flatten(), table.flatten())
    assert larger[0].tolist() == [0, 0, 1, 2, 2] and larger[4].tolist() == [6, 6, 7, 8, 8]


def test_another_window_is_the_source_with_resized_tables(tmp_path):
    tensors = simmim_source(window=4)
    report = convert_checkpoint(save(tmp_path, tensors), tmp_path / "out", window_size=8)
    model = MsGFMForPreTraining.from_pretrained(tmp_path / "out")
    assert model.config.window_size == 8
    resized = {}
    for key, value in tensors.items():
        if key.endswith("relative_position_bias_table"):
            value = spline_table(value, 8)
        if key.endswith("relative_position_index"):
            value = swin_reference.position_index(8)
        resized[key] = value
    images, mask = torch.randn(1, 3, 64, 64), torch.rand(1, 16, 16) < 0.6
    with torch.no_grad():
        pixels, loss = simmim_loss(resized, images, HEADS, 8, mask)
        output = model(images, mask.flatten(1))
    torch.testing.assert_close(output.reconstruction, pixels, atol=2e-3, rtol=0)
    assert abs(output.slice_losses - loss) < 2e-4
    entry = report["source_keys"]["encoder.layers.0.blocks.0.attn.relative_position_bias_table"]
    assert entry["status"] == "transformed" and "resized to 8" in entry["how"]


@pytest.mark.parametrize("pretrained", [0, 8])
def test_a_network_of_the_offset_is_evaluated_anew_for_another_window(pretrained, tmp_path):
    """Offsets keep the scale they were learned with, also where that is of an earlier pretraining."""
    tensors = make_source("v2", window=4, pretrained=pretrained)
    report = convert_checkpoint(save(tmp_path, tensors), tmp_path / "out", window_size=8)
    assert any("evaluated anew in windows of 8" in remark for remark in report["remarks"])
    model = MsGFMModel.from_pretrained(tmp_path / "out")
    assert model.config.pretrained_window_sizes == ([0, 0] if pretrained else [4, 4])
    anew = {}
    for key, value in tensors.items():
        if key.endswith("relative_coords_table"):
            value = swin_reference.coordinates(8, pretrained or 4)
        if key.endswith("relative_position_index"):
            value = swin_reference.position_index(8)
        anew[key] = value
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = forward(anew, images, HEADS, 8)["tokens"]
        torch.testing.assert_close(model(images).last_hidden_state, expected, atol=5e-4, rtol=0)


def test_a_source_without_its_coordinates_is_remarked_on(tmp_path):
    """What offsets were divided by is in no weight: with the buffer it is read, without it the source's own windows are
    assumed, and said to be."""
    tensors = make_source("v2", window=8, pretrained=4)
    whole = convert_checkpoint(save(tmp_path, tensors), tmp_path / "whole")
    assert not any("are assumed" in remark for remark in whole["remarks"])
    assert whole["config"]["pretrained_window_sizes"] == {"value": [4, 4], "origin": "tensors"}

    stripped = {key: value for key, value in tensors.items() if not key.endswith("relative_coords_table")}
    report = convert_checkpoint(save(tmp_path, stripped), tmp_path / "stripped")
    assert any("[8, 8] tokens per stage, are assumed" in remark for remark in report["remarks"])
    assert report["config"]["pretrained_window_sizes"] == {"value": [0, 0], "origin": "assumed"}


# ------------------------------------------------------------------------------------------------- bands, and experts


def test_bands_are_matched_by_name_in_kernel_and_decoder(tmp_path):
    """A file of blue, green, red is a picture whose bands are turned round."""
    tensors = simmim_source()
    report = convert_checkpoint(save(tmp_path, tensors), tmp_path / "out", bands=["b", "g", "r"])
    model = MsGFMForPreTraining.from_pretrained(tmp_path / "out")
    assert model.config.inputs == {"rgb": ["blue", "green", "red"]}
    images, mask = torch.randn(1, 3, 64, 64), torch.rand(1, 16, 16) < 0.6
    with torch.no_grad():
        pixels, _ = simmim_loss(tensors, images, HEADS, 4, mask)
        torch.testing.assert_close(model(images, mask.flatten(1)).reconstruction, pixels, atol=1e-4, rtol=0)
        turned = model({"rgb": images.flip(1)}, mask.flatten(1), bands={"rgb": ["red", "green", "blue"]})
        torch.testing.assert_close(turned.reconstruction["rgb"], pixels.flip(1), atol=1e-4, rtol=0)
    assert "bands blue, green, red by name" in report["source_keys"]["decoder.0.bias"]["how"]


def test_a_decoder_predicts_nothing_for_bands_it_does_not_know(tmp_path):
    tensors = simmim_source()
    convert_checkpoint(save(tmp_path, tensors), tmp_path / "out", sensor="naip", bands=["red", "green", "blue"])
    model, images = MsGFMForPreTraining.from_pretrained(tmp_path / "out"), torch.randn(1, 4, 64, 64)
    with torch.no_grad():
        pixels, _ = simmim_loss(tensors, images[:, :3], HEADS, 4, torch.zeros(1, 16, 16))
        predicted = model({"naip": images}, bands={"naip": ["red", "green", "blue", "nir"]}).reconstruction["naip"]
    torch.testing.assert_close(predicted[:, :3], pixels, atol=1e-4, rtol=0)
    assert not predicted[:, 3].any()


def test_a_new_sensor_is_made_of_its_bands(tmp_path):
    tensors = make_source(channels=4)
    report = convert_checkpoint(
        save(tmp_path, tensors), tmp_path / "out", sensor="skysat", bands=["blue", "green", "red", "edge"]
    )
    model = MsGFMModel.from_pretrained(tmp_path / "out")
    assert list(model.config.sensors) == ["skysat"] and model.config.inputs["skysat"][3] == "edge"
    assert report["source_keys"]["patch_embed.proj.weight"]["status"] == "loaded"
    assert any("how the source normalised skysat is not in the file" in remark for remark in report["remarks"])
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "out")(np.full((4, 8, 8), 255, np.uint8))["pixel_values"]
    assert pixels[0, :, 0, 0].tolist() == pytest.approx(
        [0.594 / 0.225, 0.544 / 0.224, 0.515 / 0.229, 0.551 / 0.226], 1e-3
    )


def test_a_decoder_of_pictures_is_left_behind_where_the_input_is_none(tmp_path):
    """SimMIM's decoder has three bands whatever goes in."""
    tensors = simmim_source(channels=2)
    report = convert_checkpoint(save(tmp_path, tensors), tmp_path / "out", sensor="s1")
    assert report["model_class"] == "MsGFMForPreTraining"
    assert report["source_keys"]["decoder.0.weight"]["how"] == "predicts 3 bands of a picture, where the input has 2"
    assert report["target_keys"]["decoders.s1.weight"]["status"] == "fresh"
    assert_accounted(report, tensors)
    again = convert_checkpoint(save(tmp_path, tensors), tmp_path / "again", sensor="s1")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(one[key], two[key]) for key in one) and again["target_keys"] == report["target_keys"]


def test_experts_are_copies_and_a_block_adds_the_gate_times_the_mlp(tmp_path):
    options = {"depths": (1, 1, 2), "num_heads": (2, 2, 4), "image_size": 96, "window": 6}
    tensors = make_source("v1", **options)
    report = convert_checkpoint(save(tmp_path, tensors), tmp_path / "out", num_experts=3, image_size=96)
    model = MsGFMModel.from_pretrained(tmp_path / "out")
    assert model.config.moe_blocks == [[], [], [1]] and model.config.num_experts == 3
    assert_accounted(report, tensors)
    mlp = model.encoder.layers[2].blocks[1].mlp
    assert torch.equal(mlp.experts.up_proj[2], tensors["layers.2.blocks.1.mlp.fc1.weight"])
    with torch.no_grad():
        # Sure enough to choose differently, which copies make no difference of.
        mlp.router.weight.mul_(20)
        gates = {"layers.2.blocks.1.": mlp.router.weight}
        images = torch.randn(2, 3, 96, 96)
        expected = forward(tensors, images, options["num_heads"], 6, mlp_gates=gates)["tokens"]
        output = model(images, output_router_logits=True)
    torch.testing.assert_close(output.last_hidden_state, expected, atol=1e-4, rtol=0)
    assert len(output.selected_experts[0].unique()) > 1
    fresh = {key for key, entry in report["target_keys"].items() if entry["status"] == "fresh"}
    assert fresh == {"embeddings.mask_token", "encoder.layers.2.blocks.1.mlp.router.weight"}


def test_a_dense_baseline_of_swin_moe_has_zero_biases(tmp_path):
    tensors = make_source("moe", fc2_bias=False, depths=(1, 1, 2), num_heads=(2, 2, 4), image_size=96, window=6)
    report = convert_checkpoint(save(tmp_path, tensors), tmp_path / "out", num_experts=2, image_size=96)
    assert report["layout"] == "swin_moe"
    bias = report["target_keys"]["encoder.layers.2.blocks.1.mlp.experts.down_proj_bias"]
    assert bias == {"status": "fresh", "from": [], "how": "zero: the source has no such bias"}
    convert_checkpoint(save(tmp_path, tensors), tmp_path / "dense", image_size=96)
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        ours = MsGFMModel.from_pretrained(tmp_path / "dense")(images).last_hidden_state
        torch.testing.assert_close(ours, forward(tensors, images, (2, 2, 4), 6)["tokens"], atol=1e-4, rtol=0)


def test_half_precision_is_widened_and_said(tmp_path):
    tensors = {key: value.half() if value.is_floating_point() else value for key, value in make_source().items()}
    report = convert_checkpoint(save(tmp_path, tensors), tmp_path / "out")
    assert any("float16 are saved as float32" in remark for remark in report["remarks"])
    assert MsGFMModel.from_pretrained(tmp_path / "out").dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- the doors


def test_the_command_prints_and_writes_the_report(tmp_path, capsys):
    save(tmp_path, {"model": simmim_source()})
    main(["convert", str(tmp_path / "source.pth"), "--out", str(tmp_path / "out"), "--bands", "blue, green, red"])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out/conversion_report.json").read_text())
    assert format_conversion(report) in printed and "MsGFMForPreTraining.from_pretrained(" in printed
    assert report["command"].startswith("msgfm convert ") and len(report["files"][0]["sha256"]) == 64
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "conversion_report.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert not list(tmp_path.glob(".out*"))


def test_the_script_is_a_door_to_the_command(tmp_path, monkeypatch, capsys):
    save(tmp_path, make_source())
    monkeypatch.setattr(
        "sys.argv", ["convert_checkpoint.py", str(tmp_path / "source.pth"), "--out", str(tmp_path / "out")]
    )
    runpy.run_path(str(ROOT / "conversion_scripts/convert_checkpoint.py"), run_name="__main__")
    assert "swin -> MsGFMModel" in capsys.readouterr().out
    monkeypatch.setattr(
        "sys.argv", ["convert_checkpoint.py", str(tmp_path / "none.pth"), "--out", str(tmp_path / "new")]
    )
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "conversion_scripts/convert_checkpoint.py"), run_name="__main__")
    assert stop.value.code == 1 and "`SRC` must be an existing file or folder" in capsys.readouterr().err
