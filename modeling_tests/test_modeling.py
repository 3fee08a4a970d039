"""The trunk: parity with Transformers' Swin, any height and width, features, saving and loading."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from msgfm_hf import (
    SENSORS,
    MsGFMBackbone,
    MsGFMConfig,
    MsGFMForImageClassification,
    MsGFMForPreTraining,
    MsGFMModel,
    count_parameters,
)
from msgfm_hf.model import modeling_msgfm
from swin_weights import swin_with_our_weights
from tiny_models import CLASSES, TINY, lively, tiny

_S2 = SENSORS["s2"].to_dict()
PAPER_WITHOUT_B10 = {
    **{sensor: SENSORS[sensor].to_dict() for sensor in ("rgb", "s1", "dsm")},
    "s2": {**_S2, "bands": [band for band in _S2["bands"] if band["name"] != "B10"]},
}


def main_output(output):
    """The tensor a model is for."""
    for name in ("reconstruction", "logits", "last_hidden_state"):
        if name in output:
            return output[name]
    return output.feature_maps[-1]


# ----------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    "fields, total, active",
    [
        ({}, 239_020_344, 89_910_968),
        ({"moe_blocks": [[], [], [], []]}, 106_701_624, 89_874_104),
        ({"moe_blocks": [[], [], [], []], "sensors": {"rgb": SENSORS["rgb"].to_dict()}}, 89_874_104, 89_874_104),
        # docs/reference-model.md, table of counts: the placement of Swin-MoE, and Sentinel-2 without B10.
        ({"moe_blocks": [[], [], list(range(1, 18, 2)), [1]]}, 297_784_632, 89_919_160),
        ({"sensors": PAPER_WITHOUT_B10}, 237_968_696, 89_910_968),
    ],
)
def test_counts_are_those_of_the_design(fields, total, active):
    with torch.device("meta"):
        model = MsGFMForPreTraining(MsGFMConfig(**fields))
    assert count_parameters(model) == (total, active)


def test_active_parameters_follow_the_sensors_that_go_in_and_out():
    with torch.device("meta"):
        model = MsGFMForPreTraining(MsGFMConfig())
    # 2,048 parameters per band and 384 of a stem; 1,049,600 per band of a decoder (docs/reference-model.md).
    rgb = count_parameters(model).active
    assert count_parameters(model, ["rgb", "s1"], ["rgb"]).active == rgb + 2 * 2048 + 384
    assert count_parameters(model, ["rgb"], ["dsm"]).active == rgb - 2 * 1_049_600
    trunk = count_parameters(model.msgfm)
    assert trunk.total == 239_020_344 - 19 * 1_049_600 and trunk.active == rgb - 3 * 1_049_600


def test_counting_an_unknown_sensor_is_refused():
    with pytest.raises(ValueError, match="sensors of this model .dsm, rgb, s1, s2., got 'lidar'"):
        count_parameters(tiny(), inputs=["lidar"])


# ------------------------------------------------------------------------------------------------------ Swin parity


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "window, depths, size",
    [
        (4, [2, 2], (64, 64)),  # grids 16, 8: shifted in both stages
        (4, [2, 4], (32, 32)),  # grids 8, 4: a stage as large as the window is not shifted
        (4, [2, 2, 2], (128, 64)),  # 32 x 16, 16 x 8, 8 x 4
        (7, [2, 2], (112, 56)),  # 28 x 14, 14 x 7
        (3, [2, 2], (72, 48)),  # an odd window: shift 1
        (6, [2, 2, 2], (96, 192)),  # 24 x 48, 12 x 24, 6 x 12
    ],
)
def test_every_stage_equals_transformers_swin(window, depths, size, implementation):
    stages = len(depths)
    # Features of order 1: 1e-5 is then a few roundings.
    model = tiny(
        deviation=0.08, window_size=window, depths=depths, num_heads=[2, 4, 8][:stages], moe_blocks=[[]] * stages
    )
    model.set_attn_implementation(implementation)
    swin = swin_with_our_weights(model, size)
    assert all(table.abs().mean() > 0.05 for name, table in swin.named_parameters() if "bias_table" in name)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        ours = model(images, output_hidden_states=True)
        theirs = swin(images, output_hidden_states=True, output_hidden_states_before_downsampling=True)

    def same(left, right):
        assert left.shape == right.shape
        assert (left - right).abs().max() <= 1e-5

    assert len(ours.hidden_states) == len(ours.reshaped_hidden_states) == stages + 1
    for name in ("hidden_states", "reshaped_hidden_states"):
        for left, right in zip(ours[name], theirs[name], strict=True):
            same(left, right)
    same(ours.last_hidden_state, theirs.last_hidden_state)
    same(ours.pooler_output, theirs.pooler_output)


def test_eager_and_sdpa_give_the_same_gradients(monkeypatch):
    # With gradients a CPU takes the eager path instead of SDPA. Here it must not: this is what runs on a GPU.
    fused, functions = [], modeling_msgfm.ALL_ATTENTION_FUNCTIONS

    def as_configured(name, default):
        if model.config._attn_implementation == "eager":
            return default
        fused.append(name)
        return functions["sdpa"]

    monkeypatch.setattr(modeling_msgfm, "ALL_ATTENTION_FUNCTIONS", SimpleNamespace(get_interface=as_configured))
    images = torch.randn(1, 3, 44, 52)
    model = tiny(attention_probs_dropout_prob=0.0)
    gradients = []
    for implementation in ("eager", "sdpa"):
        assert not fused
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(images).last_hidden_state.square().mean().backward()
        gradients.append(model.encoder.layers[0].blocks[1].attention.relative_position_bias_table.grad.clone())
    assert fused
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


# ----------------------------------------------------------------------------------------------- any height and width


def plain_block(block, tokens, grid, window, shift):
    """A Swin block without windows to cut, pad or roll: every token against every other, and a rule of who sees whom.

    Along an axis the windows of a map shifted by s are [0, s), [s, s + window), ...
    """
    height, width = grid
    attention = block.attention
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))

    def windows(position):
        return torch.where(position < shift, 0, 1 + (position - shift).div(window, rounding_mode="floor"))

    sees = (windows(y)[:, None] == windows(y)) & (windows(x)[:, None] == windows(x))
    down, right = (y[:, None] - y).clamp(1 - window, window - 1), (x[:, None] - x).clamp(1 - window, window - 1)
    table = attention.relative_position_bias_table.view(2 * window - 1, 2 * window - 1, -1)
    bias = table[down + window - 1, right + window - 1].permute(2, 0, 1)
    heads = bias.shape[0]

    query, key, value = attention.qkv(block.layernorm_before(tokens)).chunk(3, -1)
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
    weights = logits.masked_fill(~sees, -math.inf).softmax(-1)
    tokens = tokens + attention.proj((weights @ value).transpose(1, 2).flatten(2))
    return tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(block.layernorm_after(tokens))))


def plain_merge(downsample, tokens, grid):
    """2 x 2 tokens joined in the order (even, even), (odd, even), (even, odd), (odd, odd); what is outside is zero."""
    height, width = grid
    merged = []
    for row in range(0, height, 2):
        for column in range(0, width, 2):
            corners = [
                tokens[:, r * width + c] if r < height and c < width else torch.zeros_like(tokens[:, 0])
                for r, c in ((row, column), (row + 1, column), (row, column + 1), (row + 1, column + 1))
            ]
            merged.append(torch.cat(corners, -1))
    return downsample.reduction(downsample.norm(torch.stack(merged, 1)))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(height=st.integers(1, 19), width=st.integers(1, 19), window=st.integers(1, 5), sdpa=st.booleans())
def test_any_grid_equals_attention_without_windows(height, width, window, sdpa):
    torch.manual_seed(height * 100 + width)
    model = tiny(window_size=window, moe_blocks=[[], []], embed_dim=8, num_heads=[2, 2])
    model.set_attn_implementation("sdpa" if sdpa else "eager")
    grid, tokens = (height, width), torch.randn(2, height * width, 8)
    with torch.no_grad():
        expected = tokens
        for stage in model.encoder.layers:
            shift = 0 if min(grid) <= window else window // 2
            for number, block in enumerate(stage.blocks):
                expected = plain_block(block, expected, grid, window, shift if number % 2 else 0)
            if stage.downsample is not None:
                expected = plain_merge(stage.downsample, expected, grid)
                grid = math.ceil(grid[0] / 2), math.ceil(grid[1] / 2)
        output = model.encoder(tokens, (height, width))
    torch.testing.assert_close(output.last_hidden_state, expected, atol=2e-5, rtol=1e-4)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(height=st.integers(1, 70), width=st.integers(1, 70), seed=st.integers(0, 1000), training=st.booleans())
def test_what_sits_in_the_padding_changes_nothing(height, width, seed, training):
    torch.manual_seed(seed)
    model = tiny(capacity_factor=0.75).train(training)
    images = torch.randn(2, 3, height, width)
    pad, planted = F.pad, []

    def pad_with_rubbish(tokens, amounts, **kwargs):
        padded = pad(tokens, amounts, **kwargs)
        if tokens.ndim == 3 and amounts == (0, 0, 0, 1):
            # The token that every place of the padding holds.
            planted.append(1000 * torch.randn_like(padded[:, -1:]))
            padded = torch.cat([tokens, planted[-1].to(tokens.dtype)], 1)
        return padded

    def run():
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(images, output_router_logits=True)

    # Every draw of the rubbish would move the generator of the router's noise.
    noise = torch.randn(2 * math.ceil(height / 8) * math.ceil(width / 8), 4)
    draw = torch.randn_like
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda like: noise if like.shape == noise.shape else draw(like))
        plain = run()
        patch.setattr(F, "pad", pad_with_rubbish)
        rubbish = run()
    whole = all(math.ceil(size / 4) % 4 == 0 and math.ceil(size / 8) % 4 == 0 for size in (height, width))
    assert bool(planted) is not whole
    torch.testing.assert_close(rubbish.last_hidden_state, plain.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert torch.equal(rubbish.selected_experts[0], plain.selected_experts[0])
    torch.testing.assert_close(rubbish.aux_loss, plain.aux_loss, atol=1e-5, rtol=1e-5)
    # The second stage's tokens, and no padding, are routed.
    assert plain.router_logits[0].shape == (2 * math.ceil(height / 8) * math.ceil(width / 8), 4)


@pytest.mark.parametrize("height, width", [(1, 1), (3, 2), (4, 37), (61, 37), (5, 64)])
def test_a_size_that_is_no_multiple_equals_the_image_padded_with_zeros_to_whole_patches(height, width):
    model = tiny()
    images = torch.randn(2, 3, height, width)
    whole = F.pad(images, (0, -width % 4, 0, -height % 4))
    assert torch.equal(model(images).last_hidden_state, model(whole).last_hidden_state)
    assert model(images).last_hidden_state.shape == (2, math.ceil(height / 8) * math.ceil(width / 8), 32)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("height, width", [(1, 1), (3, 2), (61, 37)])
def test_every_model_runs_and_trains_at_any_size(cls, height, width):
    model = tiny(cls, num_labels=3, out_features=["stage1", "stage2"] if cls is MsGFMBackbone else None).train()
    output = main_output(model(torch.randn(2, 3, height, width)))
    output.float().square().mean().backward()
    assert output.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("cls", [MsGFMModel, MsGFMForPreTraining])
def test_resolutions_alternate_without_state(cls):
    model = tiny(cls)
    first, other, small = torch.randn(1, 3, 32, 32), torch.randn(2, 3, 61, 37), torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        before = main_output(model(first))
        model(other)
        model(small)
        assert torch.equal(main_output(model(first)), before)


@pytest.mark.parametrize("size", [(32, 32), (29, 43)])
def test_an_image_does_not_see_its_batch_mates(size):
    model = tiny(num_experts_per_tok=2)
    images = {"rgb": torch.randn(5, 3, *size), "s1": torch.randn(5, 2, *size)}
    images["rgb"][3] *= 100
    valid = {"rgb": torch.ones(5, *size, dtype=torch.bool), "s1": torch.rand(5, *size) > 0.3}
    valid["rgb"][1], valid["rgb"][2, : size[0] // 2] = False, False
    with torch.no_grad():
        together = model(images, valid_mask=valid)
        for row in range(5):
            alone = model(
                {sensor: pixels[row : row + 1] for sensor, pixels in images.items()},
                valid_mask={sensor: mask[row : row + 1] for sensor, mask in valid.items()},
            )
            for name in ("last_hidden_state", "pooler_output"):
                torch.testing.assert_close(alone[name][0], together[name][row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 0, 0), (1, 3, 8, 0), (0, 3, 32, 32)])
def test_an_image_without_pixels_is_refused(shape):
    with pytest.raises(ValueError, match="`pixel_values`"):
        tiny()(torch.zeros(shape))


# ---------------------------------------------------------------------------------------------------------- outputs


def test_outputs_of_the_model():
    model = tiny()
    model.set_attn_implementation("eager")
    images = torch.randn(2, 3, 32, 40)
    output = model(images, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert output.last_hidden_state.shape == (2, 4 * 5, 32)
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state.mean(1))
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 80, 16), (2, 20, 32), (2, 20, 32)]
    assert [tuple(h.shape) for h in output.reshaped_hidden_states] == [(2, 16, 8, 10), (2, 16, 8, 10), (2, 32, 4, 5)]
    torch.testing.assert_close(output.last_hidden_state, model.layernorm(output.hidden_states[-1]))
    # Windows of 16 tokens: 2 images of 2 x 3 windows, then 2 of 1 x 2.
    assert [tuple(a.shape) for a in output.attentions] == [(12, 2, 16, 16), (4, 4, 16, 16)]
    assert all(torch.allclose(a.sum(-1), torch.ones(())) for a in output.attentions)
    assert [tuple(r.shape) for r in output.router_logits] == [(40, 4)]
    assert [tuple(s.shape) for s in output.selected_experts] == [(40, 1)]
    plain = model(images)
    assert plain.hidden_states is None and plain.attentions is None and plain.router_logits is None
    assert torch.equal(plain.last_hidden_state, output.last_hidden_state)
    assert MsGFMModel(model.config, add_pooling_layer=False)(images).pooler_output is None


def test_outputs_can_be_asked_for_in_the_configuration():
    output = tiny(output_hidden_states=True, output_router_logits=True)(torch.randn(1, 3, 32, 32))
    assert len(output.hidden_states) == 3 and len(output.router_logits) == 1
    assert len(output.reshaped_hidden_states) == 3


@pytest.mark.parametrize("cls", CLASSES)
def test_a_tuple_comes_out_where_it_is_asked_for(cls):
    model = tiny(cls, num_labels=3)
    images = torch.randn(1, 3, 32, 32)
    expected = model(images)
    output = model(images, return_dict=False)
    assert isinstance(output, tuple)
    first = output[0][0] if cls is MsGFMBackbone else output[0]
    assert torch.equal(first, main_output(expected))


def test_backbone_maps_have_strides_4_to_32():
    config = MsGFMConfig(
        embed_dim=8,
        depths=[1, 2, 2, 1],
        num_heads=[1, 2, 2, 2],
        window_size=3,
        out_features=["stem", "stage1", "stage2", "stage3", "stage4"],
    )
    backbone = lively(MsGFMBackbone(config))
    assert backbone.channels == [8, 8, 16, 32, 64]
    images = torch.randn(2, 3, 64, 96)
    output = backbone(images)
    for stride, channels, features in zip([4, 4, 8, 16, 32], backbone.channels, output.feature_maps, strict=True):
        assert features.shape == (2, channels, 64 // stride, 96 // stride)
    trunk = backbone.msgfm(images, output_hidden_states=True)
    norms = backbone.hidden_states_norms.values()
    for norm, features, raw in zip(norms, output.feature_maps, trunk.reshaped_hidden_states, strict=True):
        torch.testing.assert_close(features, norm(raw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    assert output.hidden_states is None
    assert len(backbone(images, output_hidden_states=True).hidden_states) == 5


def test_backbone_gives_the_last_stage_by_default_and_a_choice_on_request():
    images = torch.randn(1, 3, 33, 50)
    assert [tuple(f.shape) for f in tiny(MsGFMBackbone)(images).feature_maps] == [(1, 32, 5, 7)]
    some = tiny(MsGFMBackbone, out_indices=[1, 2])
    assert some.out_features == ["stage1", "stage2"]
    assert [tuple(f.shape) for f in some(images).feature_maps] == [(1, 16, 9, 13), (1, 32, 5, 7)]


def test_backbone_of_late_fusion_holds_all_sensors():
    fields = {"fusion": "late", "inputs": {"s2": ["B04", "B03"], "dsm": ["height"]}}
    backbone = tiny(MsGFMBackbone, **fields, out_features=["stage1", "stage2"])
    images = {"s2": torch.randn(1, 2, 32, 32), "dsm": torch.randn(1, 1, 32, 32)}
    assert backbone.channels == [32, 64]
    assert [f.shape[1] for f in backbone(images).feature_maps] == [32, 64]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_misspelt_argument_is_refused(cls):
    with pytest.raises(TypeError, match="`valid_maks` must be an argument of this model's forward, got valid_maks"):
        tiny(cls)(torch.randn(1, 3, 32, 32), valid_maks=torch.ones(1, 32, 32))


@pytest.mark.parametrize("cls", CLASSES)
def test_no_pixels_at_all_are_refused(cls):
    with pytest.raises(ValueError, match="`pixel_values` must be given, got None. Preprocess images with"):
        tiny(cls)()


@pytest.mark.parametrize("cls", CLASSES)
def test_the_reference_of_the_image_processor_is_taken_and_not_read(cls):
    model = tiny(cls)
    images = torch.randn(2, 3, 32, 32)
    output = model(images, reference=torch.tensor([3.0, 4.0]))
    assert torch.equal(main_output(output), main_output(model(images)))


@pytest.mark.parametrize("cls", CLASSES)
def test_implementations_can_be_chosen_on_every_model(cls):
    model = tiny(cls)
    assert model.config._experts_implementation == "eager"
    images = torch.randn(1, 3, 37, 29)
    expected = main_output(model(images))
    model.set_attn_implementation("eager")
    model.set_experts_implementation("grouped_mm")
    assert model.config._attn_implementation == "eager" and model.config._experts_implementation == "grouped_mm"
    torch.testing.assert_close(main_output(model(images)), expected, atol=2e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_loss_and_no_gradient(implementation, use_reentrant):
    images, mask = torch.randn(2, 3, 37, 45), torch.rand(2, 10 * 12) < 0.6
    model = tiny(MsGFMForPreTraining, moe_blocks=[[0], [1]], drop_path_rate=0.3).train()
    model.set_attn_implementation(implementation)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(images, mask).loss
        loss.backward()
        results.append((loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert model.is_activation_checkpointing
    torch.testing.assert_close(results[0][0], results[1][0])
    assert set(results[0][1]) == set(results[1][1])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, msg=lambda text, n=name: f"{n}: {text}")


def test_stochastic_depth_grows_and_drops_whole_samples():
    model = tiny(depths=[2, 3], moe_blocks=[[], []], drop_path_rate=0.4)
    rates = [block.drop_path.probability for stage in model.encoder.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    drop = model.encoder.layers[1].blocks[2].drop_path
    ones = torch.ones(2000, 3, 2)
    assert torch.equal(drop(ones), ones)
    dropped = drop.train()(ones)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert (dropped == dropped[:, :1, :1]).all()
    # 2000 draws: a standard error of 0.011.
    assert (dropped[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"])
def test_dropout_acts_in_training_only(field):
    # In eval the model is the one without it.
    torch.manual_seed(1)
    plain = tiny(moe_blocks=[[], []])
    torch.manual_seed(1)
    model = tiny(moe_blocks=[[], []], **{field: 0.5})
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images).last_hidden_state, plain(images).last_hidden_state)
    assert torch.equal(plain.train()(images).last_hidden_state, plain.eval()(images).last_hidden_state)
    assert not torch.allclose(model.train()(images).last_hidden_state, plain(images).last_hidden_state)


def test_fresh_weights_are_those_of_simmim():
    model = MsGFMForPreTraining(MsGFMConfig(**{**TINY, "embed_dim": 64}))
    parameters = dict(model.named_parameters())
    block = "msgfm.encoder.layers.1.blocks"
    for name in (f"{block}.0.mlp.fc1.weight", f"{block}.1.mlp.experts.up_proj", f"{block}.1.mlp.router.weight"):
        assert parameters[name].std().item() == pytest.approx(0.02, rel=0.15), name
        assert parameters[name].abs().max() < 0.1
    for name in (f"{block}.0.attention.relative_position_bias_table", "msgfm.embeddings.mask_token"):
        assert parameters[name].std().item() == pytest.approx(0.02, rel=0.35), name
    for name, parameter in parameters.items():
        if "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias") and not name.startswith(("decoders", "msgfm.embeddings")):
            assert (parameter == 0).all(), name
    # torch's own: uniform within 1 / sqrt(fan in), here 1 / sqrt(3 * 16).
    stem = parameters["msgfm.embeddings.patch_embeddings.rgb.projection.weight"]
    assert 0.9 / math.sqrt(48) < stem.abs().max() <= 1 / math.sqrt(48)
    assert stem.std().item() == pytest.approx(1 / math.sqrt(48) / math.sqrt(3), rel=0.1)


# ------------------------------------------------------------------------------------------------ saving and loading


@pytest.mark.parametrize("cls", CLASSES)
def test_saving_and_loading_gives_the_same_model(cls, tmp_path):
    model = tiny(cls, num_labels=3)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert not again.training
    images = torch.randn(2, 3, 37, 29)
    assert torch.equal(main_output(again(images)), main_output(model(images)))


@pytest.mark.parametrize("cls", CLASSES)
def test_bfloat16_runs_stays_close_and_is_kept(cls, tmp_path):
    model = tiny(cls, num_labels=3, moe_blocks=[[], []])
    images = torch.randn(2, 3, 37, 29)
    with torch.no_grad():
        expected = main_output(model(images))
        model.to(torch.bfloat16).save_pretrained(tmp_path)
        again = cls.from_pretrained(tmp_path)
        assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
        # The images may be of either type.
        output = main_output(again(images))
        assert torch.equal(output, main_output(again(images.bfloat16())))
    assert output.dtype == torch.bfloat16
    # Eight bits, a few dozen roundings in a row.
    assert (output.float() - expected).norm() < 0.05 * expected.norm()


def test_mixed_precision_trains_close_to_float32():
    model = tiny(MsGFMForPreTraining, deviation=0.05, router_noise=0.0, capacity_factor=None).train()
    sources = [{"rgb": torch.randn(2, 3, 37, 29)}, {"s1": torch.randn(2, 2, 37, 29), "dsm": torch.randn(2, 1, 37, 29)}]
    masks = [{sensor: torch.rand(2, 80) < 0.6 for sensor in images} for images in sources]
    losses = {}
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = model(sources, masks, targets=[{}, {"s1": "dsm", "dsm": "s1"}]).loss
        loss.backward()
        losses[enabled] = loss.item()
        assert all(p.grad is None or (p.grad.dtype == p.dtype and p.grad.isfinite().all()) for p in model.parameters())
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_bfloat16_trains_with_experts_invalid_pixels_and_padding(implementation):
    model = tiny(MsGFMForPreTraining).train().to(torch.bfloat16)
    model.set_attn_implementation(implementation)
    valid = torch.ones(2, 37, 29, dtype=torch.bool)
    valid[0], valid[1, :9] = False, False
    output = model(torch.randn(2, 3, 37, 29), torch.rand(2, 80) < 0.6, valid_mask=valid)
    output.loss.backward()
    assert output.loss.isfinite() and output.loss.dtype == torch.float32
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_trunk_moves_between_pretraining_heads_and_itself(tmp_path):
    pretrained = tiny(MsGFMForPreTraining)
    pretrained.save_pretrained(tmp_path / "pretrained")
    images = torch.randn(1, 3, 32, 32)
    expected = pretrained.msgfm(images).last_hidden_state
    trunk = MsGFMModel.from_pretrained(tmp_path / "pretrained")
    assert torch.equal(trunk(images).last_hidden_state, expected)
    trunk.save_pretrained(tmp_path / "trunk")
    for folder in ("pretrained", "trunk"):
        for cls in CLASSES[1:]:
            model, info = cls.from_pretrained(tmp_path / folder, output_loading_info=True)
            assert torch.equal(model.msgfm(images).last_hidden_state, expected)
            assert not any(key.startswith("msgfm.") for key in info["missing_keys"])
            assert main_output(model(images)).isfinite().all()


def without(folder, *ends):
    """Takes weights out of a checkpoint, by the ends of their names; returns the names."""
    weights = load_file(folder / "model.safetensors")
    gone = sorted(name for name in weights if name.endswith(ends))
    save_file({n: w for n, w in weights.items() if n not in gone}, folder / "model.safetensors", {"format": "pt"})
    return gone


@pytest.mark.parametrize("cls", [MsGFMModel, MsGFMForPreTraining, MsGFMForImageClassification])
def test_a_checkpoint_without_part_of_the_encoder_is_refused_by_name(cls, tmp_path):
    tiny(cls).save_pretrained(tmp_path)
    gone = without(tmp_path, "blocks.0.attention.qkv.weight", "mask_token")
    assert len(gone) == 3
    with pytest.raises(ValueError, match=r"must hold the whole encoder, got .*without .*mask_token.*qkv") as error:
        cls.from_pretrained(tmp_path)
    assert all(name in str(error.value) for name in gone)


def test_many_missing_weights_are_counted(tmp_path):
    tiny().save_pretrained(tmp_path)
    gone = without(tmp_path, "bias")
    with pytest.raises(ValueError, match=f"and {len(gone) - 8} more"):
        MsGFMModel.from_pretrained(tmp_path)


def test_a_dense_checkpoint_is_no_encoder_with_experts(tmp_path):
    tiny(moe_blocks=[[], []]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"without encoder.layers.1.blocks.1.mlp.experts.down_proj.*router.weight"):
        MsGFMModel.from_pretrained(tmp_path, moe_blocks=[[], [1]])


def test_an_encoder_with_more_than_the_configuration_is_refused_by_name(tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no more of the encoder than the configuration has, got .*blocks\.1"):
        MsGFMModel.from_pretrained(tmp_path, depths=[2, 1], moe_blocks=[[], []])


def test_decoders_left_behind_are_no_news(tmp_path, capfd):
    tiny(MsGFMForPreTraining).save_pretrained(tmp_path)
    _, info = MsGFMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and "UNEXPECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("name", ["inputs", "targets"])
def test_sensors_to_count_are_a_list(name):
    with pytest.raises(ValueError, match=f"`{name}` must be a list of sensors, got 'rgb'"):
        count_parameters(tiny(), **{name: "rgb"})


def test_bands_are_a_list():
    with pytest.raises(ValueError, match=r"`bands` of sensor 'rgb' must be a list of names, got 'red'"):
        tiny()({"rgb": torch.randn(1, 3, 32, 32)}, bands={"rgb": "red"})


def test_weights_of_another_shape_are_refused_by_name(tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"encoder\.layers\.0\.blocks\.0\.attention\.relative_position_bias_table"):
        MsGFMModel.from_pretrained(tmp_path, window_size=3)
    model = MsGFMModel.from_pretrained(tmp_path, window_size=3, ignore_mismatched_sizes=True)
    assert model(torch.randn(1, 3, 32, 32)).last_hidden_state.isfinite().all()


def test_what_is_missing_is_reported_where_a_report_is_asked_for(tmp_path):
    tiny(moe_blocks=[[], []]).save_pretrained(tmp_path)
    _, info = MsGFMModel.from_pretrained(tmp_path, moe_blocks=[[], [1]], output_loading_info=True)
    assert "encoder.layers.1.blocks.1.mlp.experts.up_proj" in info["missing_keys"]
    assert "encoder.layers.1.blocks.1.mlp.fc1.weight" in info["unexpected_keys"]


def test_decoders_and_heads_may_be_missing(tmp_path):
    tiny(MsGFMForPreTraining).save_pretrained(tmp_path)
    gone = without(tmp_path, "decoders.rgb.weight")
    model, info = MsGFMForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(gone) == {"decoders.rgb.weight"}
    assert model.decoders["rgb"].weight.abs().sum() > 0


def test_the_names_of_the_weights_are_the_contract():
    names = set(tiny(MsGFMForPreTraining).state_dict())
    block = "msgfm.encoder.layers"
    for name in (
        "msgfm.embeddings.mask_token",
        "msgfm.embeddings.patch_embeddings.s2.projection.weight",
        "msgfm.embeddings.patch_embeddings.s2.norm.bias",
        f"{block}.0.blocks.0.layernorm_before.weight",
        f"{block}.0.blocks.0.attention.qkv.weight",
        f"{block}.0.blocks.0.attention.proj.bias",
        f"{block}.0.blocks.0.attention.relative_position_bias_table",
        f"{block}.0.blocks.0.layernorm_after.weight",
        f"{block}.0.blocks.0.mlp.fc1.weight",
        f"{block}.0.blocks.0.mlp.fc2.bias",
        f"{block}.1.blocks.1.mlp.router.weight",
        f"{block}.1.blocks.1.mlp.experts.up_proj",
        f"{block}.1.blocks.1.mlp.experts.up_proj_bias",
        f"{block}.1.blocks.1.mlp.experts.down_proj",
        f"{block}.1.blocks.1.mlp.experts.down_proj_bias",
        f"{block}.0.downsample.norm.weight",
        f"{block}.0.downsample.reduction.weight",
        "msgfm.layernorm.weight",
        "decoders.s1.weight",
    ):
        assert name in names, name
    assert not any("relative_position_index" in name for name in names)


def test_stages_and_blocks_are_counted_from_zero_without_gaps():
    names = [name.split(".") for name in tiny().state_dict() if name.startswith("encoder")]
    stages = sorted({int(parts[2]) for parts in names})
    assert stages[0] == 0 and all(b - a == 1 for a, b in pairwise(stages))
