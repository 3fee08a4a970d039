"""Sources that cannot be converted: one clear error each, and nothing is written."""

import json
import pickle
import sys
import zipfile

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import SwinConfig, SwinForMaskedImageModeling, SwinModel, ViTConfig, ViTModel

from msgfm_hf.convert.checkpoint import convert_checkpoint
from msgfm_hf.convert.windows import resize_table
from swin_reference import make_source
from test_convert import SMALL, moe_source, save, simmim_source, torchvision_names, with_config_node, write_ranks


def refuse(folder, sources, match, error=ValueError, **options):
    """The conversion fails as said, and leaves neither a folder nor a part of one."""
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(error, match=match):
        convert_checkpoint(sources, folder / "out", **options)
    assert sorted(path.name for path in folder.iterdir()) == before


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_truncated_files(legacy, tmp_path):
    path = tmp_path / "source.pth"
    torch.save({"model": make_source()}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    for share in (0, 0.01, 0.5, 0.99):
        path.write_bytes(content[: int(share * len(content))])
        refuse(
            tmp_path, [path], r"`SRC` must be a whole file of `torch.save`, got .* It is truncated or of another kind"
        )
    path.write_bytes(content)
    convert_checkpoint([path], tmp_path / "out")


def test_a_page_that_was_fetched_instead(tmp_path):
    (tmp_path / "source.pth").write_text("<html>You need to log in</html>")
    refuse(tmp_path, [tmp_path / "source.pth"], "`SRC` must be a whole file of `torch.save`, got .*source.pth")


def test_an_archive_is_to_be_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "moe.zip", "w") as archive:
        archive.writestr("moe.pth.master", b"x")
    refuse(
        tmp_path, [tmp_path / "moe.zip"], "`SRC` must be a file of `torch.save`, got the archive moe.zip of moe.pth.mas"
    )


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "source.safetensors"
    save_file(make_source(), path)
    path.write_bytes(path.read_bytes()[:5000])
    refuse(tmp_path, [path], "`SRC` must be a whole safetensors file, got .* Fetch it again")


class Danger:
    """Runs when it is unpickled."""

    ran = False

    def __reduce__(self):
        return _explode, ()


def _explode():
    Danger.ran = True


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_foreign_class_is_refused_by_name_and_nothing_is_run(legacy, tmp_path):
    path = tmp_path / "source.pth"
    content = {"model": make_source(), "args": Danger()}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    refuse(tmp_path, [path], r"got test_convert_refusals\._explode in .* It could run code, so it is not read")
    path.write_bytes(pickle.dumps(content))
    refuse(tmp_path, [path], "`SRC` must")
    with_config_node(lambda node: torch.save({"model": make_source(), "config": node({}), "x": Danger()}, path))
    refuse(tmp_path, [path], r"containers and yacs\.config\.CfgNode, got test_convert_refusals\._explode in")
    assert not Danger.ran and "yacs" not in sys.modules


@pytest.mark.parametrize(
    "content, match",
    [
        ([1, 2], "`SRC` must hold a dictionary of tensors, got a list"),
        ({"model": {}}, "`SRC` must hold weights, alone or under 'model' or 'state_dict', got .* with nothing in it"),
        ({"net": make_source()}, "`SRC` must hold weights, .* with net in it"),
    ],
)
def test_pickles_without_weights(content, match, tmp_path):
    refuse(tmp_path, save(tmp_path, content), match)


def test_folders_and_names(tmp_path):
    refuse(tmp_path, [tmp_path / "none.pth"], "`SRC` must be an existing file or folder", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refuse(
        tmp_path, [tmp_path / "empty"], "`SRC` must be a file of weights, or a folder with config.json and model.safe"
    )
    SwinModel(SwinConfig(**SMALL)).save_pretrained(tmp_path / "swin", max_shard_size="40KB")
    config = json.loads((tmp_path / "swin/config.json").read_text())
    for text, match in (("{", "`SRC` must hold readable JSON"), ("[]", "`SRC` must hold a JSON object in config.json")):
        (tmp_path / "swin/config.json").write_text(text)
        refuse(tmp_path, [tmp_path / "swin"], match)
    (tmp_path / "swin/config.json").write_text(json.dumps({**config, "use_absolute_embeddings": True}))
    refuse(tmp_path, [tmp_path / "swin"], "`SRC` must have no absolute position embeddings")
    (tmp_path / "swin/config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    refuse(tmp_path, [tmp_path / "swin"], "`SRC` must have a layer_norm_eps of 1e-05, got 0.001")
    (tmp_path / "swin/config.json").write_text(json.dumps({**config, "image_size": "large"}))
    refuse(
        tmp_path, [tmp_path / "swin"], "`SRC` must hold tensors of the shapes, and settings of the types, that its lay"
    )
    (tmp_path / "swin/config.json").write_text(json.dumps({**config, "window_size": 7}))
    refuse(
        tmp_path, [tmp_path / "swin"], "`SRC` must have windows that fit its own configuration, 7 tokens at 64 pixels"
    )
    (tmp_path / "swin/config.json").write_text(json.dumps(config))
    next((tmp_path / "swin").glob("model-*.safetensors")).unlink()
    index = tmp_path / "swin/model.safetensors.index.json"
    whole = index.read_text()
    index.write_text('{"weight_map": [1]}')
    refuse(tmp_path, [tmp_path / "swin"], r"`SRC` must name its files in model.safetensors.index.json, got \[1\]")
    index.write_text(whole)
    refuse(tmp_path, [], "`SRC` must be at least one file or folder, got none")
    refuse(tmp_path, [tmp_path / "swin"], "`SRC` must be an existing file, got", FileNotFoundError)
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)).save_pretrained(
        tmp_path / "vit"
    )
    refuse(tmp_path, [tmp_path / "vit"], "got a Transformers model of type 'vit'. Only relatives of Swin")


def test_the_folder_to_write_is_never_overwritten(tmp_path, monkeypatch):
    source = save(tmp_path, make_source())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    refuse(tmp_path, source, "`--out` must be a new or an empty folder, got .* Name another, or remove it")
    assert (tmp_path / "out/mine.txt").read_text() == "precious"
    (tmp_path / "out/mine.txt").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    convert_checkpoint(source, tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`--out` must be another folder than the current one"):
        convert_checkpoint(source, ".")
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize("error", [OSError("No space left on device"), SafetensorError("No space left on device")])
def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("msgfm_hf.convert.checkpoint.MsGFMImageProcessor.save_pretrained", fail)
    refuse(tmp_path, save(tmp_path, make_source()), "No space left on device", OSError)


# -------------------------------------------------------------------------------------------------------------- ranks


def test_ranks_that_do_not_belong_together(tmp_path):
    tensors = moe_source(fc2_bias=False)
    master, *ranks = write_ranks(tmp_path, tensors, 4)
    refuse(tmp_path, [master], "`SRC` must hold the experts too, got 'model.pth.master' alone. Give the `.rank")
    refuse(tmp_path, [master, *ranks[:-1]], "`SRC` must hold the files of all ranks, got none of rank 0 of .*model.pth")
    refuse(tmp_path, [master, ranks[0], *ranks[2:]], "got none of rank 2 of")
    # The last ones are missed by their experts.
    refuse(tmp_path, [master, *ranks[1:]], "`SRC` must hold the files of all ranks, got 3 with 1 of 4 experts each")
    refuse(tmp_path, [master, *ranks, ranks[0]], "`SRC` must name each file once")
    (other,) = save(tmp_path, torch.load(ranks[0]), "later.pth.rank3")
    refuse(tmp_path, [master, other, *ranks[1:]], "`SRC` must be of one run, got files of .*later.pth, .*model.pth")
    refuse(
        tmp_path, [master, *ranks, *save(tmp_path, tensors)], "or a `.master` file and its `.rank.*got source.pth among"
    )
    bias = {"model": {**torch.load(master)["model"]}}
    name = next(key for key in bias["model"] if key.endswith("fc2_bias"))
    bias["model"][name] = torch.ones_like(bias["model"][name])
    torch.save(bias, master)
    refuse(
        tmp_path, [master, *ranks], "`SRC` must hold batched_fc2_bias of every rank, got that of one rank in the `.mas"
    )
    mixed = torch.load(ranks[0])["model"]
    torch.save({"model": {key: value[..., :5] for key, value in mixed.items()}}, ranks[0])
    refuse(
        tmp_path, [master, *ranks], "`SRC` must hold the ranks of one run, got rank 3 with layers.* beside rank 0 with"
    )
    for rank in ranks:
        torch.save({"model": {"head.bias": torch.ones(9)}}, rank)
    refuse(tmp_path, [master, *ranks], "`SRC` must hold experts in its `.rank.*` files, got none in model.pth.rank0")


def test_half_of_the_ranks_of_spread_experts(tmp_path):
    """Eight ranks of sixteen are as many as there are pairs per expert, but their experts are half as wide."""
    master, *ranks = write_ranks(tmp_path, moe_source(fc2_bias=False), 16)
    refuse(
        tmp_path, [master, *ranks[8:]], "got 8, which make experts 2 times as wide as their input where other blocks"
    )


def test_ranks_of_two_steps_and_experts_that_no_rank_has(tmp_path):
    ranks = write_ranks(tmp_path, moe_source(), 2, whole=True)
    one = torch.load(ranks[0])["model"]
    torch.save({"model": {**one, "norm.bias": one["norm.bias"] + 1}}, ranks[0])
    refuse(tmp_path, ranks, "`SRC` must hold the ranks of one step of one run, got rank 1 with another norm.bias")
    master, *ranks = write_ranks(tmp_path, moe_source(), 2)
    shared = torch.load(master)["model"]
    torch.save({"model": {**shared, "layers.0.blocks.0.mlp._moe_layer.experts.batched_fc1_w": torch.ones(1)}}, master)
    refuse(
        tmp_path,
        [master, *ranks],
        "`SRC` must hold the experts of every rank, got layers.0.* in the `.master` file alone",
    )
    bare = {k: v for k, v in shared.items() if "gates" not in k and "_num_global" not in k}
    torch.save({"model": bare}, master)
    refuse(
        tmp_path, [master, *ranks], "`SRC` must tell the number of experts of layers.1.* by its router, got None rows"
    )


def test_one_rank_is_not_the_model(tmp_path):
    tensors = moe_source()
    part = {key: value[:2] if ".experts." in key else value for key, value in tensors.items()}
    refuse(tmp_path, save(tmp_path, {"model": part}), "`SRC` must hold all experts, got 2 of 4. Give the files of all")
    legacy = {key: value for key, value in part.items() if "_num_global_experts" not in key}
    refuse(tmp_path, save(tmp_path, {"model": legacy}), "`SRC` must agree on the number of experts, got 2 and 4")


# ------------------------------------------------------------------------------------------------ layouts and options


@pytest.mark.parametrize(
    "tensors, match",
    [
        ({"encoder.cls_token": torch.ones(1)}, "got a vision transformer of SimMIM. Only relatives of Swin"),
        ({"layers.0.blocks.0.spatial_mlp.weight": torch.ones(1)}, "got a Swin-MLP"),
        ({"backbone.resnet.conv1.weight": torch.ones(1)}, "got a ResNet of Satlas"),
        ({"conv.weight": torch.ones(1), "conv.bias": torch.ones(1)}, "got keys such as conv.bias, conv.weight"),
        (
            {**make_source(), "absolute_pos_embed": torch.ones(1)},
            "tensors that are known in the layout 'swin', got 1 oth",
        ),
        ({**make_source(), "head.fc.weight": torch.ones(1)}, "got 1 others: head.fc.weight"),
        ({**simmim_source(), "decoder.2.weight": torch.ones(1)}, "layout 'simmim', got 1 others: decoder.2.weight"),
        ({**torchvision_names(make_source()), "avgpool.x": torch.ones(1)}, "layout 'satlas', got 1 others: avgpool.x"),
    ],
)
def test_strangers_are_refused(tensors, match, tmp_path):
    refuse(tmp_path, save(tmp_path, tensors), match, image_size=64)


def test_the_wrong_layout(tmp_path):
    source = save(tmp_path, simmim_source())
    refuse(tmp_path, source, "`--layout` must be what the file is, 'simmim' by its keys, got 'satlas'", layout="satlas")
    refuse(tmp_path, source, "`--layout` must be auto or one of gfm, hf_swin, .*, got 'resnet'", layout="resnet")
    source = save(tmp_path, make_source())
    refuse(tmp_path, source, "must be what the file is, 'swin' by its keys, got 'swinv2'", layout="swinv2")


def without(tensors, *words):
    return {key: value for key, value in tensors.items() if not any(word in key for word in words)}


@pytest.mark.parametrize(
    "tensors, options, match",
    [
        (
            make_source(channels=5),
            {},
            r"`--bands` must name the 5 channels of the source in its order, got 3 \(red, gr",
        ),
        (make_source(), {"sensor": "s1"}, "`--bands` must name the 3 channels .* got 2"),
        (
            make_source(),
            {"sensor": "skysat"},
            "`--bands` must name the channels of the new sensor 'skysat', got nothing",
        ),
        (make_source(), {"bands": ["red", "green", "B08"]}, "`bands` of sensor 'rgb' must be among"),
        (make_source(), {"sensor": "Sky", "bands": ["a", "b", "c"]}, r"`id` of a sensor must match"),
        (make_source(), {"bands": ["red", "", "blue"]}, "`--bands` must be names, got an empty one in 'red,,blue'"),
        (make_source(), {"window_size": 0}, "`--window-size` must be at least 1, got 0"),
        (
            make_source(),
            {"num_experts": 2},
            "`--num-experts` must be left out for a source without a second block in its",
        ),
        (
            moe_source(),
            {"num_experts": 8},
            "`--num-experts` must be left out for a source with experts, which has 4, got 8",
        ),
        (
            make_source(image_size=32, window=4, depths=(1, 1)),
            {},
            "`--image-size` must say how large the images of the s",
        ),
        (
            without(make_source("v2"), "_table", "_index"),
            {},
            "`--window-size` must say how large the windows of the source",
        ),
        (
            make_source(window=2),
            {"window_size": 4},
            "`--window-size` must be that of the source where it is below 3, got 4",
        ),
    ],
)
def test_what_cannot_be_known_is_asked_for_by_name(tensors, options, match, tmp_path):
    refuse(tmp_path, save(tmp_path, tensors), match, **options)


def test_what_was_asked_for_is_enough(tmp_path):
    source = save(tmp_path, without(make_source("v2"), "_table", "_index", "_mask"))
    report = convert_checkpoint(source, tmp_path / "out", image_size=64, window_size=4)
    assert report["config"]["window_size"] == {"value": 4, "origin": "option"}
    assert report["config"]["image_size"] == {"value": 64, "origin": "option"}


# ------------------------------------------------------------------------------------------- tensors that do not fit


def changed(tensors, **changes):
    return {**tensors, **{key.replace("__", "."): value for key, value in changes.items()}}


SWIN = make_source(classes=11)
BLOCK = "layers.0.blocks.1."


@pytest.mark.parametrize(
    "tensors, match",
    [
        (
            {**SWIN, "head.bias": torch.zeros(12)},
            r"`SRC` must have a whole classifier, got weights of shape \(11, 32\) and 12",
        ),
        (
            {**SWIN, "head.weight": torch.zeros(11, 16)},
            r"a whole classifier, got .* \(11, 16\) and 11 biases for features of 32",
        ),
        (without(SWIN, "head.bias"), "`SRC` must hold what becomes classifier.bias, got no such tensor"),
        (
            without(SWIN, "patch_embed.norm"),
            "`SRC` must hold what becomes embeddings.patch_embeddings.<sensor>.norm.weight",
        ),
        (
            {**SWIN, "patch_embed.proj.weight": torch.zeros(16, 3, 4, 2)},
            "`SRC` must have a patch embedding of square patches",
        ),
        (without(SWIN, "layers.1.", "head"), "`SRC` must fit the architecture that its tensors tell, got"),
        (without(SWIN, "layers.0.blocks.0."), r"`SRC` must hold all blocks of stage 0, got only \[1\]"),
        (without(SWIN, "layers."), r"`SRC` must hold all stages, got only \[\]"),
        (
            without(SWIN, BLOCK + "norm2"),
            "`SRC` must hold the whole trunk, got nothing that becomes encoder.*layernorm_after",
        ),
        (without(SWIN, "mlp."), "`SRC` must hold the MLPs of its blocks, got none"),
        (
            without(SWIN, BLOCK + "attn.relative_position_bias"),
            "`SRC` must hold what becomes attention.relative_position_bia",
        ),
        (
            without(SWIN, "relative_position_bias_table"),
            "`SRC` must tell the number of attention heads by its position bias",
        ),
        (
            {**SWIN, BLOCK + "attn.proj.weight": torch.zeros(16, 8)},
            r"got 1 that do not: .*proj.weight \(16, 8\) for \(16, 16\)",
        ),
        (
            {**SWIN, BLOCK + "mlp.fc1.weight": torch.zeros(32, 16)},
            "`SRC` must agree on the width of its MLPs .* got 2.0 and 4",
        ),
        (
            {**SWIN, BLOCK + "attn.relative_position_bias_table": torch.zeros(48, 2)},
            r"position biases of \(2 w - 1\)\^2 rows, g",
        ),
        (
            {**SWIN, BLOCK + "attn.relative_position_bias_table": torch.zeros(169, 2)},
            "agree on the windows of stage 0, got 4 an",
        ),
        (
            {**SWIN, BLOCK + "attn.relative_position_bias_table": torch.zeros(49, 4)},
            "agree on the heads of stage 0, got 2 and 4",
        ),
        ({**SWIN, BLOCK + "attn_mask": torch.zeros(4, 16, 16)}, "`SRC` must agree on the size of its images, got 32"),
        (
            {**SWIN, "norm.bias": torch.full((32,), float("nan"))},
            "`SRC` must hold finite numbers, got NaN or infinity in what",
        ),
        (
            {**SWIN, "norm.bias": torch.zeros(32, dtype=torch.int64)},
            "`SRC` must hold finite numbers, got torch.int64 in what",
        ),
        (
            {**simmim_source(), "decoder.0.weight": torch.zeros(64, 32, 1, 1)},
            r"`SRC` must have a decoder of 8 x 8 pixels for 3 \(or 3\) bands per token, got 64 channels",
        ),
        (
            {
                **simmim_source("v2"),
                **{k.replace("cpb", "rpe"): v for k, v in simmim_source("v2").items() if "cpb" in k},
            },
            "`SRC` must hold each tensor once, got .*rpe_mlp.* and .*cpb_mlp.* for the same",
        ),
    ],
)
def test_tensors_that_do_not_fit(tensors, match, tmp_path):
    refuse(tmp_path, save(tmp_path, tensors), match)


@pytest.mark.parametrize("shape", [(), (0,), (7,), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize(
    "key",
    [
        "patch_embed.proj.weight",
        BLOCK + "attn.relative_position_bias_table",
        BLOCK + "attn_mask",
        BLOCK + "mlp.fc1.weight",
        "head.weight",
        "layers.0.downsample.norm.weight",
    ],
)
def test_any_shape_gives_one_clear_error(key, shape, tmp_path):
    refuse(tmp_path, save(tmp_path, {**SWIN, key: torch.zeros(shape)}), "`SRC` must ")


def test_a_decoder_of_another_stride(tmp_path):
    config = SwinConfig(**{**SMALL, "encoder_stride": 16})
    SwinForMaskedImageModeling(config).save_pretrained(tmp_path / "swin")
    refuse(
        tmp_path,
        [tmp_path / "swin"],
        "`SRC` must have a decoder of the 8 x 8 pixels that its stages make .* encoder_str",
    )


def test_numbers_too_large_for_float32(tmp_path):
    refuse(
        tmp_path,
        save(tmp_path, {**SWIN, "norm.bias": torch.full((32,), 1e300, dtype=torch.float64)}),
        "`SRC` must hold finite numbers, got NaN or infinity in what becomes layernorm.bias",
    )


def test_a_sensor_that_cannot_be_a_module(tmp_path):
    refuse(
        tmp_path,
        save(tmp_path, SWIN),
        "`sensors` must have ids that name no attribute of a module, got 'items'",
        sensor="items",
        bands=["a", "b", "c"],
    )


def test_maps_that_are_no_whole_windows_are_remarked_on(tmp_path):
    source = save(tmp_path, torchvision_names(make_source(classes=3)))
    report = convert_checkpoint(source, tmp_path / "out", image_size=72)
    assert any("no whole windows" in remark for remark in report["remarks"])
    report = convert_checkpoint(source, tmp_path / "fits", image_size=96)
    assert not any("no whole windows" in remark for remark in report["remarks"])


def test_a_window_that_does_not_fit_the_image(tmp_path):
    """All tables of stage 0 for smaller windows than those of stage 1, which is a smaller map."""
    tensors = dict(without(SWIN, "attn_mask", "position_index"))
    for key in tensors:
        if key.startswith("layers.0") and key.endswith("bias_table"):
            tensors[key] = torch.zeros(25, 2)
    refuse(tmp_path, save(tmp_path, tensors), "`SRC` must have windows that fit images of 64 pixels", image_size=64)


@pytest.mark.parametrize(
    "config, match",
    [
        (
            {"MODEL": {"TYPE": "swin", "NUM_CLASSES": 21841}},
            "the `num_labels` that its own configuration states, 21841, got",
        ),
        (
            {"MODEL": {"TYPE": "swin", "SWIN": {"WINDOW_SIZE": 7}}, "DATA": {"IMG_SIZE": 64}},
            "windows that fit its own configu",
        ),
        (
            {"MODEL": {"TYPE": "swin", "SWIN": {"NUM_HEADS": [1, 2]}}},
            "the `num_heads` that its own configuration states",
        ),
        ({"MODEL": {"TYPE": "swin", "SWIN": {"APE": True}}}, "`SRC` must be trained with APE False, got True"),
        ({"MODEL": {"TYPE": "swin", "SWIN": {"QK_SCALE": 0.1}}}, "`SRC` must be trained with QK_SCALE None, got 0.1"),
        (
            {"MODEL": {"TYPE": "swin", "SWIN": {"PATCH_NORM": False}}},
            "`SRC` must be trained with PATCH_NORM True, got False",
        ),
        ({"DATA": {"IMG_SIZE": 224}}, "`SRC` must agree on the size of its images, got 64 and 224"),
        (
            {"MODEL": {"TYPE": "swin", "SWIN": {"NORMALIZE_GATE": True, "TOP_VALUE": 2}}},
            "`SRC` must be trained without NORMALIZE_GATE",
        ),
    ],
)
def test_a_configuration_of_another_model(config, match, tmp_path):
    refuse(tmp_path, save(tmp_path, {"model": SWIN, "config": config}), match)


def test_a_head_of_22k_classes_with_another_count_of_labels(tmp_path):
    SwinModel(SwinConfig(**SMALL)).save_pretrained(tmp_path / "swin")
    config = json.loads((tmp_path / "swin/config.json").read_text())
    labels = {str(number): f"class {number}" for number in range(5)}
    (tmp_path / "swin/config.json").write_text(json.dumps({**config, "id2label": labels}))
    tensors = load_file(tmp_path / "swin/model.safetensors")
    head = {"classifier.weight": torch.zeros(6, 32), "classifier.bias": torch.zeros(6)}
    save_file({**{f"swin.{key}": value for key, value in tensors.items()}, **head}, tmp_path / "swin/model.safetensors")
    refuse(tmp_path, [tmp_path / "swin"], "the `num_labels` that its own configuration states, 5, got tensors with 6")


def test_resizing_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.interpolate", None)
    with pytest.raises(ImportError, match="`--window-size` needs SciPy to resize position biases, got no such package"):
        resize_table(torch.zeros(49, 2), 6)
