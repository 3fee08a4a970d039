"""Any subset of sensors and bands, invalid pixels, both kinds of fusion, and sensors added later."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from msgfm_hf import (
    SENSORS,
    BandSpec,
    MsGFMBackbone,
    MsGFMConfig,
    MsGFMForImageClassification,
    MsGFMForPreTraining,
    MsGFMForSemanticSegmentation,
    MsGFMModel,
    SensorSpec,
)
from tiny_models import BANDS, TINY, tiny

LATE_RGB_S1 = {"fusion": "late", "inputs": {"rgb": ["red", "green", "blue"], "s1": ["VV", "VH"]}}


def images(*sensors, size=(32, 32), batch=2):
    return {sensor: torch.randn(batch, BANDS[sensor], *size) for sensor in sensors}


def tokens(model, pixels, **kwargs):
    return model.embeddings(pixels, **kwargs).hidden_states


def own_stem(model, sensor, pixels):
    """A sensor's embedding by its parameters alone."""
    stem = model.embeddings.patch_embeddings[sensor]
    return stem.norm(stem.projection(pixels).flatten(2).transpose(1, 2))


# ------------------------------------------------------------------------------------------------------------ bands


@pytest.mark.parametrize("sensor", BANDS)
def test_one_sensor_alone_is_its_own_stem_exactly(sensor):
    model, pixels = tiny(), images(sensor)
    assert torch.equal(tokens(model, pixels), own_stem(model, sensor, pixels[sensor]))


def test_a_bare_tensor_is_the_single_input_of_the_configuration():
    pixels = images("rgb")
    model = tiny()
    assert torch.equal(model(pixels["rgb"]).last_hidden_state, model(pixels).last_hidden_state)
    model = tiny(inputs={"s2": ["B08", "B04"]})
    two = torch.randn(2, 2, 32, 32)
    assert torch.equal(model(two).last_hidden_state, model({"s2": two}, bands={"s2": ["B08", "B04"]}).last_hidden_state)


def test_a_subset_of_bands_slices_the_kernel():
    model, pixels = tiny(), torch.randn(2, 3, 32, 32)
    stem = model.embeddings.patch_embeddings["s2"]
    # Positions of B04, B8A and B12 in Sentinel-2's order B01 ... B08, B8A, B09, B10, B11, B12.
    convolved = F.conv2d(pixels, stem.projection.weight[:, [3, 8, 12]], stem.projection.bias, stride=4)
    expected = stem.norm(convolved.flatten(2).transpose(1, 2))
    assert torch.equal(tokens(model, {"s2": pixels}, bands={"s2": ["B04", "B8A", "B12"]}), expected)
    # The same as all bands with zeros in the place of the others.
    full = torch.zeros(2, 13, 32, 32)
    full[:, [3, 8, 12]] = pixels
    torch.testing.assert_close(tokens(model, {"s2": full}), expected)


def test_bands_come_in_any_order_and_under_their_other_names():
    model, pixels = tiny(), torch.randn(2, 3, 32, 32)
    expected = model(pixels).last_hidden_state
    for names in (["blue", "red", "green"], ["b", "R", "g"]):
        turned = pixels[:, [2, 0, 1]]
        torch.testing.assert_close(
            model({"rgb": turned}, bands={"rgb": names}).last_hidden_state, expected, atol=1e-5, rtol=1e-5
        )
    unnamed = model({"rgb": pixels[:, [2, 0, 1]]}).last_hidden_state
    assert not torch.allclose(unnamed, expected, atol=1e-2)


def test_bands_default_to_the_inputs_and_then_to_the_sensors_own():
    model = tiny(inputs={"s2": ["B04", "B03"]})
    assert model({"s2": torch.randn(1, 2, 32, 32)}).last_hidden_state.shape == (1, 16, 32)
    assert model({"s1": torch.randn(1, 2, 32, 32)}).last_hidden_state.shape == (1, 16, 32)
    with pytest.raises(ValueError, match=r"for sensor 's2' must have 2 bands \(B04, B03\), got shape \(1, 13,"):
        model(images("s2", batch=1))


@pytest.mark.parametrize(
    "pixels, bands, message",
    [
        ({"s1": (4, 3, 32, 32)}, None, r"for sensor 's1' must have 2 bands \(VV, VH\), got shape \(4, 3, 32, 32\)"),
        ({"s1": (4, 2, 32, 32)}, {"s1": ["VV"]}, r"must have 1 bands \(VV\).*Select bands by name with `bands=`"),
        ({"s1": (2, 32, 32)}, None, r"for sensor 's1' must be \(images, bands, height, width\).*\(2, 32, 32\)"),
        ({"s1": (1, 1, 2, 32, 32)}, None, r"for sensor 's1' must be \(images, bands, .*got shape \(1, 1, 2,"),
        ({"s1": (4, 1, 32, 32)}, {"s1": ["HH"]}, "`bands` of sensor 's1' must be among VV, VH, got 'HH'"),
        ({"s1": (4, 2, 32, 32)}, {"s1": ["VV", "vv"]}, "`bands` of sensor 's1' must name each band once"),
        ({"lidar": (4, 2, 32, 32)}, None, r"sensors of this model \(dsm, rgb, s1, s2\), got 'lidar'"),
        # A name nothing reads is a mistake that must not pass in silence.
        ({"s1": (4, 2, 32, 32)}, {"sl": ["VV"]}, "'sl'"),
        ({"s1": (4, 2, 32, 32)}, {"s1": []}, "`bands`.*'s1'"),
    ],
)
def test_bands_that_do_not_fit_are_refused(pixels, bands, message):
    with pytest.raises(ValueError, match=message):
        tiny()({sensor: torch.zeros(shape) for sensor, shape in pixels.items()}, bands=bands)


@pytest.mark.parametrize("values", [{}, {"rgb": [[1.0]]}, [torch.zeros(1, 3, 8, 8)], "s2.tif"])
def test_what_is_no_tensor_is_refused(values):
    with pytest.raises(ValueError, match=r"`pixel_values` must be a tensor or a dictionary \{sensor: tensor\}"):
        tiny()(values)


@pytest.mark.parametrize("argument", ["pixel_values", "valid_mask"])
def test_a_bare_tensor_needs_a_single_input(argument):
    model = tiny(inputs={"s1": ["VV", "VH"], "s2": ["B04"]})
    arguments = {"pixel_values": images("s1"), argument: torch.zeros(2, 2, 32, 32)}
    with pytest.raises(ValueError, match=rf"`{argument}` must name its sensor where .* \(s1, s2\), got a tensor"):
        model(**arguments)


# ----------------------------------------------------------------------------------------------------- early fusion


def test_several_sensors_are_one_convolution_over_their_stacked_channels():
    """Appendix C.2: stacking on the channel axis is the concatenated kernel; biases add up, the norm is the mean."""
    model, pixels = tiny(), images("s2", "rgb", "s1")
    stems = [model.embeddings.patch_embeddings[sensor] for sensor in pixels]
    stacked = F.conv2d(
        torch.cat(list(pixels.values()), 1),
        torch.cat([stem.projection.weight for stem in stems], 1),
        sum(stem.projection.bias for stem in stems),
        stride=4,
    )
    weight = sum(stem.norm.weight for stem in stems) / 3
    bias = sum(stem.norm.bias for stem in stems) / 3
    expected = F.layer_norm(stacked.flatten(2).transpose(1, 2), (16,), weight, bias, 1e-5)
    torch.testing.assert_close(tokens(model, pixels), expected, atol=1e-5, rtol=1e-5)
    backwards = dict(reversed(pixels.items()))
    torch.testing.assert_close(tokens(model, backwards), expected, atol=1e-5, rtol=1e-5)
    # A mask that hides nothing takes another path to the same tokens.
    valid = {sensor: torch.ones(2, 32, 32, dtype=torch.bool) for sensor in ("s2", "s1")}
    torch.testing.assert_close(tokens(model, pixels, valid_mask=valid), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("other_is_masked", [True, False])
def test_an_invalid_sensor_is_an_omitted_one(other_is_masked):
    model, pixels = tiny(), images("rgb", "s1")
    valid = {"s1": torch.zeros(2, 32, 32, dtype=torch.bool)}
    if other_is_masked:
        valid["rgb"] = torch.ones(2, 32, 32, dtype=torch.bool)
    pixels["s1"][:] = torch.nan
    together = model(pixels, valid_mask=valid)
    alone = model({"rgb": pixels["rgb"]})
    torch.testing.assert_close(together.last_hidden_state, alone.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.pooler_output, alone.pooler_output, atol=1e-5, rtol=1e-5)


def test_a_sensor_is_left_out_per_sample_and_patch():
    model, pixels = tiny(), images("rgb", "s1", size=(8, 12), batch=2)
    valid = {sensor: torch.ones(2, 8, 12, dtype=torch.bool) for sensor in pixels}
    valid["s1"][0, :4, 4:8] = False  # sample 0, patch 1: only rgb
    valid["rgb"][1, 4:, :4] = False  # sample 1, patch 3: only s1
    valid["rgb"][1, 4:, 8:] = valid["s1"][1, 4:, 8:] = False  # sample 1, patch 5: nothing
    fused = tokens(model, pixels, valid_mask=valid)
    both, rgb, s1 = (tokens(model, part) for part in (pixels, {"rgb": pixels["rgb"]}, {"s1": pixels["s1"]}))
    expected = both.clone()
    expected[0, 1], expected[1, 3], expected[1, 5] = rgb[0, 1], s1[1, 3], model.embeddings.mask_token[0, 0]
    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fusion", ["early", "late"])
@pytest.mark.parametrize("shape", [(2, 2, 32, 28), (2, 2, 64, 16), (3, 2, 32, 32)])
def test_inputs_of_different_grids_are_refused(shape, fusion):
    model = tiny(**{**LATE_RGB_S1, "fusion": fusion})
    with pytest.raises(
        ValueError, match=r"must share one pixel grid, .* = \(2, 32, 32\), got .* for sensor 's1'.*gdalwarp"
    ):
        model({"rgb": torch.randn(2, 3, 32, 32), "s1": torch.randn(shape)})


# --------------------------------------------------------------------------------------------------- invalid pixels


@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, -torch.inf, 1e9])
@pytest.mark.parametrize("fields", [{}, LATE_RGB_S1])
def test_what_an_invalid_pixel_holds_does_not_matter(rubbish, fields):
    model, pixels = tiny(**fields), images("rgb", "s1", size=(29, 32))
    valid = {sensor: torch.rand(2, 29, 32) > 0.4 for sensor in pixels}
    zeros = {s: torch.where(valid[s].unsqueeze(1), p, 0) for s, p in pixels.items()}
    spoilt = {s: torch.where(valid[s].unsqueeze(1), p, rubbish) for s, p in pixels.items()}
    assert torch.equal(
        model(spoilt, valid_mask=valid).last_hidden_state, model(zeros, valid_mask=valid).last_hidden_state
    )


@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, -torch.inf])
def test_a_pixel_that_is_no_number_is_zero(rubbish):
    model, pixels = tiny(), torch.randn(1, 3, 32, 32)
    spoilt, zero = pixels.clone(), pixels.clone()
    spoilt[0, 1, 3, 5], zero[0, 1, 3, 5] = rubbish, 0
    assert torch.equal(model(spoilt).last_hidden_state, model(zero).last_hidden_state)


def test_a_patch_is_the_mask_token_only_where_all_its_pixels_are_invalid():
    model, pixels = tiny(), images("rgb", size=(7, 9), batch=1)
    valid = torch.zeros(1, 7, 9, dtype=torch.bool)
    valid[0, 6, 8] = True  # one pixel of the last of 2 x 3 patches, which the image ends in
    found = tokens(model, pixels, valid_mask={"rgb": valid})
    token = model.embeddings.mask_token[0, 0]
    assert [torch.equal(patch, token) for patch in found[0]] == [True] * 5 + [False]
    # An integer mask says the same.
    assert torch.equal(tokens(model, pixels, valid_mask={"rgb": valid.int()}), found)


def test_masked_patches_are_the_mask_token_and_no_others():
    model, pixels = tiny(), images("rgb")
    mask = torch.rand(2, 64) < 0.6
    found, plain = tokens(model, pixels, bool_masked_pos=mask), tokens(model, pixels)
    assert torch.equal(found, torch.where(mask.unsqueeze(-1), model.embeddings.mask_token, plain))
    for other in (mask.int(), mask.float()):
        assert torch.equal(tokens(model, pixels, bool_masked_pos=other), found)
    # Invalid patches are hidden beside the masked ones.
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    valid[:, :8] = False
    mask[:, 0], mask[:, -1] = False, True
    hidden = mask.clone()
    hidden[:, :16] = True
    found = tokens(model, pixels, bool_masked_pos=mask, valid_mask={"rgb": valid})
    assert torch.equal(found, torch.where(hidden.unsqueeze(-1), model.embeddings.mask_token, plain))
    # Nothing of a masked patch gets through.
    found = tokens(model, pixels, bool_masked_pos=mask)
    changed = pixels["rgb"] + mask.view(2, 1, 8, 1, 8, 1).expand(2, 3, 8, 4, 8, 4).reshape(2, 3, 32, 32) * 7.0
    assert torch.equal(tokens(model, {"rgb": changed}, bool_masked_pos=mask), found)


@pytest.mark.parametrize("fields", [{}, {"fusion": "late"}])
def test_an_image_without_a_valid_pixel_has_features_of_zero(fields):
    model, pixels = tiny(**fields), images("rgb", size=(21, 32), batch=3)["rgb"]
    valid = torch.ones(3, 21, 32, dtype=torch.bool)
    valid[1] = False
    output = model(pixels, valid_mask=valid)
    for features in (output.last_hidden_state, output.pooler_output):
        assert (features[1] == 0).all()
        assert (features[[0, 2]] != 0).any(-1).all()


def test_the_pooled_average_leaves_out_tokens_without_a_valid_pixel():
    model, pixels = tiny(), torch.randn(2, 3, 24, 36)
    valid = torch.zeros(2, 24, 36, dtype=torch.bool)
    # A token of the second stage covers 8 x 8 pixels: 3 x 5 of them.
    valid[0, 0, 0] = True  # token (0, 0)
    valid[0, 23, 35] = True  # token (2, 4), cut by the rim
    valid[1, 8:16] = True  # tokens (1, 0) to (1, 4)
    output = model(pixels, valid_mask=valid)
    features = output.last_hidden_state.unflatten(1, (3, 5))
    torch.testing.assert_close(output.pooler_output[0], (features[0, 0, 0] + features[0, 2, 4]) / 2)
    torch.testing.assert_close(output.pooler_output[1], features[1, 1].mean(0))


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("valid_mask", {"rgb": torch.ones(2, 1, 32, 32)}, "`valid_mask` for sensor 'rgb' must have shape"),
        ("valid_mask", {"rgb": torch.ones(2, 8, 8)}, r"must have shape \(2, 32, 32\), got \(2, 8, 8\)"),
        ("valid_mask", {"rgb": torch.ones(1, 32, 32)}, r"must have shape \(2, 32, 32\), got \(1, 32, 32\)"),
        ("bool_masked_pos", torch.ones(2, 63), r"`bool_masked_pos` must have shape \(2, 64\).*got \(2, 63\)"),
        ("bool_masked_pos", torch.ones(2, 8, 8), r"`bool_masked_pos` must have shape \(2, 64\).*got \(2, 8, 8\)"),
        # A mask that belongs to no input would be a mask that hides nothing.
        ("valid_mask", {"s1": torch.ones(2, 32, 32)}, "`valid_mask`.*'s1'"),
        ("valid_mask", {"rbg": torch.ones(2, 32, 32)}, "`valid_mask`.*'rbg'"),
    ],
)
def test_masks_that_do_not_fit_are_refused(argument, value, message):
    with pytest.raises(ValueError, match=message):
        tiny()(images("rgb"), **{argument: value})


@pytest.mark.parametrize("cls", [MsGFMModel, MsGFMForPreTraining])
def test_a_bare_mask_belongs_to_the_input_or_is_refused(cls):
    """`config.inputs` is rgb: a bare mask beside {"s1": ...} must not be taken for a mask of rgb and forgotten."""
    valid = torch.zeros(2, 32, 32, dtype=torch.bool)
    with pytest.raises(ValueError, match="`valid_mask`"):
        tiny(cls)(images("s1"), valid_mask=valid)


# ------------------------------------------------------------------------------------------------------ late fusion


LATE = {"fusion": "late", "inputs": {"s2": ["B04", "B03", "B02"], "dsm": ["height"], "s1": ["VV", "VH"]}}


def test_late_fusion_lays_out_the_features_of_each_sensor_in_the_order_of_inputs():
    model = tiny(**LATE)
    early = MsGFMModel(MsGFMConfig(**TINY)).eval()
    early.load_state_dict(model.state_dict())
    pixels = {"s1": torch.randn(2, 2, 29, 32), "s2": torch.randn(2, 3, 29, 32)}
    valid = {"s1": torch.rand(2, 29, 32) > 0.5}
    output = model(pixels, valid_mask=valid, output_hidden_states=True)
    s2 = early({"s2": pixels["s2"]}, bands={"s2": LATE["inputs"]["s2"]}, output_hidden_states=True)
    s1 = early({"s1": pixels["s1"]}, valid_mask=valid, output_hidden_states=True)
    assert model.num_features == 96
    for name in ("last_hidden_state", "pooler_output"):
        whole, absent = output[name], torch.zeros_like(s1[name])
        torch.testing.assert_close(whole, torch.cat([absent, s1[name], s2[name]], -1), atol=1e-5, rtol=1e-5)
    for name, dim in (("hidden_states", -1), ("reshaped_hidden_states", 1)):
        for whole, second, third in zip(output[name], s1[name], s2[name], strict=True):
            expected = torch.cat([torch.zeros_like(second), second, third], dim)
            torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)


def test_late_fusion_refuses_a_sensor_outside_the_inputs():
    with pytest.raises(ValueError, match=r"must be of `config.inputs` \(dsm, s1, s2\), which .* got 'rgb'. For other"):
        tiny(**LATE)(images("rgb"))


def test_late_fusion_survives_saving_whatever_the_order_of_inputs(tmp_path):
    model = tiny(MsGFMForImageClassification, **LATE, num_labels=3)
    pixels = {"s2": torch.randn(1, 3, 32, 32), "dsm": torch.randn(1, 1, 32, 32)}
    expected = model(pixels).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(MsGFMForImageClassification.from_pretrained(tmp_path)(pixels).logits, expected)


# ------------------------------------------------------------------------------------------------------ new sensors


def band(name, wavelength):
    return BandSpec(name, 0.2, 0.1, (0.0, 1.0), wavelength)


# Nearest of Sentinel-2: B02 at 490 nm, B8A at 865 (B08 at 842 is farther), none within 60 nm of 3900, none of unknown
# wavelength but by name.
CAMERA = SensorSpec(
    id="camera",
    bands=(band("teal", 500.0), band("nir", 860.0), band("mwir", 3900.0), band("B12", None), band("thermal", None)),
    unit="reflectance",
    default_unit="reflectance",
)
EXPECTED = [
    ("teal", "B02", 10.0),
    ("nir", "B8A", 5.0),
    ("mwir", None, None),
    ("B12", "B12", None),
    ("thermal", None, None),
]


def test_a_new_sensor_starts_from_bands_of_near_wavelength(capsys):
    model = tiny(MsGFMForPreTraining)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.add_sensor(CAMERA, init_from="s2") == EXPECTED
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "camera teal <- s2 B02, 10 nm",
        "camera nir <- s2 B8A, 5 nm",
        "camera mwir <- fresh",
        "camera B12 <- s2 B12",
        "camera thermal <- fresh",
    ]

    after = model.state_dict()
    stem = "msgfm.embeddings.patch_embeddings.camera"
    added = {f"{stem}.projection", f"{stem}.norm", "decoders.camera"}
    assert set(after) - set(before) == {f"{name}.{kind}" for name in added for kind in ("weight", "bias")}
    for name, value in before.items():
        assert torch.equal(after[name], value), name

    def of(sensor):
        stem = model.msgfm.embeddings.patch_embeddings[sensor]
        decoder = model.decoders[sensor]
        bands = len(model.config.sensors[sensor]["bands"])
        return stem, decoder.weight.unflatten(0, (bands, 64)), decoder.bias.unflatten(0, (bands, 64))

    (new, weight, bias), (old, old_weight, old_bias) = of("camera"), of("s2")
    for row, position in {0: 1, 1: 8, 3: 12}.items():
        assert torch.equal(new.projection.weight[:, row], old.projection.weight[:, position])
        assert torch.equal(weight[row], old_weight[position]) and torch.equal(bias[row], old_bias[position])
    for row in (2, 4):
        assert new.projection.weight[:, row].abs().sum() > 0 and weight[row].abs().sum() > 0
        assert not any(torch.equal(new.projection.weight[:, row], old.projection.weight[:, p]) for p in range(13))
    assert torch.equal(new.projection.bias, old.projection.bias)
    assert torch.equal(new.norm.weight, old.norm.weight) and torch.equal(new.norm.bias, old.norm.bias)


def test_a_new_sensor_runs_trains_and_reloads(tmp_path):
    model = tiny(MsGFMForPreTraining)
    model.add_sensor(CAMERA, init_from="s2")
    pixels, mask = {"camera": torch.randn(2, 5, 32, 32)}, {"camera": torch.rand(2, 64) < 0.6}
    model.train()(pixels, mask).loss.backward()
    assert model.decoders["camera"].weight.grad.abs().sum() > 0
    assert model.msgfm.embeddings.patch_embeddings["camera"].projection.weight.grad.abs().sum() > 0
    model.eval().save_pretrained(tmp_path)
    again, info = MsGFMForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert list(again.config.sensors) == ["camera", "dsm", "rgb", "s1", "s2"]
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert torch.equal(again(pixels).reconstruction["camera"], model(pixels).reconstruction["camera"])


def test_a_copied_sensor_sees_as_its_source_does():
    model = tiny(MsGFMForPreTraining)
    twin = dataclasses.replace(SENSORS["s1"], id="alos")
    assert model.add_sensor(twin, init_from="s1") == [("VV", "VV", None), ("VH", "VH", None)]
    pixels = torch.randn(2, 2, 32, 32)
    assert torch.equal(model({"alos": pixels}).reconstruction["alos"], model({"s1": pixels}).reconstruction["s1"])


@pytest.mark.parametrize("cls", [MsGFMModel, MsGFMBackbone, MsGFMForImageClassification])
def test_a_new_sensor_needs_no_decoders_and_no_source(cls, capsys):
    model = tiny(cls).to(torch.bfloat16)
    assert model.add_sensor(CAMERA) == [(name, None, None) for name, _, _ in EXPECTED]
    assert capsys.readouterr().out.count("<- fresh") == 5
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in cls(MsGFMConfig(**model.config.to_dict())).named_parameters()]
    model.config.inputs = {"camera": [name for name, _, _ in EXPECTED]}
    output = model({"camera": torch.randn(1, 5, 32, 32)}, output_hidden_states=True)
    assert all(state.isfinite().all() for state in output.hidden_states)


def test_a_distance_of_more_than_60_nm_is_a_fresh_start():
    model = tiny()
    spec = SensorSpec("camera", (band("near", 2250.0), band("far", 2250.1)), "reflectance", "reflectance")
    assert model.add_sensor(spec, init_from="s2") == [("near", "B12", 60.0), ("far", None, None)]


def test_a_sensor_there_is_or_a_source_there_is_not_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match=r"`spec` must be of a sensor the model does not have .*, got 's1'"):
        model.add_sensor(SENSORS["s1"])
    with pytest.raises(ValueError, match="`init_from` must be a sensor of the model .*, got 'lidar'. Leave it out"):
        model.add_sensor(CAMERA, init_from="lidar")
    assert "camera" not in model.config.sensors


@pytest.mark.parametrize("cls", [MsGFMModel, MsGFMBackbone, MsGFMForSemanticSegmentation])
def test_an_invalid_sensor_is_an_omitted_one_in_late_fusion(cls):
    """Down to the maps of every stage, which dense heads read."""
    model = tiny(cls, **LATE_RGB_S1)
    both = images("rgb", "s1")
    valid = {"s1": torch.zeros(2, 32, 32, dtype=torch.bool)}
    left_out = model({"rgb": both["rgb"]}, output_hidden_states=True)
    invalid = model(both, valid_mask=valid, output_hidden_states=True)
    torch.testing.assert_close(invalid[0], left_out[0])
    torch.testing.assert_close(invalid.hidden_states, left_out.hidden_states)


def test_an_image_without_a_valid_pixel_has_maps_of_zeros():
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    valid[1] = False
    output = tiny()(images("rgb"), valid_mask={"rgb": valid}, output_hidden_states=True)
    for states in (*output.hidden_states, *output.reshaped_hidden_states, output.pooler_output):
        assert states[0].abs().sum() > 0 and not states[1].any()
