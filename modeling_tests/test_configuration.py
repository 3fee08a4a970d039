"""The configuration: the paper's values, what is refused and how, and what a round trip through JSON keeps."""

import logging

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from msgfm_hf import SENSORS, MsGFMConfig, MsGFMForPreTraining

TINY = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "num_experts": 4, "window_size": 4, "image_size": 32}


def sensors(*names):
    return {name: SENSORS[name].to_dict() for name in names}


def test_the_default_is_the_papers_model():
    config = MsGFMConfig()
    assert (config.image_size, config.patch_size, config.window_size, config.mask_patch_size) == (192, 4, 6, 32)
    assert (config.embed_dim, list(config.depths), list(config.num_heads)) == (128, [2, 2, 18, 2], [4, 8, 16, 32])
    assert config.moe_blocks == [[], [], [1, 3, 5, 7, 9, 11, 13, 15, 17], []]
    assert (config.num_experts, config.num_experts_per_tok, config.capacity_factor) == (8, 1, 1.25)
    assert config.eval_capacity_factor is None
    assert (config.router_aux_loss_coef, config.layer_norm_eps, config.mlp_ratio) == (0.01, 1e-5, 4.0)
    assert list(config.sensors) == ["dsm", "rgb", "s1", "s2"]
    assert config.inputs == {"rgb": ["red", "green", "blue"]}
    assert (config.encoder_stride, config.hidden_size, config.num_layers) == (32, 1024, 4)
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]


def test_names_of_transformers_reach_the_fields():
    config = MsGFMConfig(**TINY, moe_blocks=[[], [1]])
    assert (config.num_attention_heads, config.num_hidden_layers, config.num_local_experts) == ([2, 4], 2, 4)


@pytest.mark.parametrize("depths, expected", [([2, 2], [[], []]), ([2, 2, 6], [[], [], [1, 3, 5]])])
def test_experts_sit_in_every_other_block_of_the_third_stage(depths, expected):
    config = MsGFMConfig(embed_dim=16, depths=depths, num_heads=[2] * len(depths))
    assert config.moe_blocks == expected


def test_a_model_without_rgb_takes_its_first_sensor_as_input():
    assert MsGFMConfig(**TINY, sensors=sensors("s2", "s1")).inputs == {"s1": ["VV", "VH"]}


@pytest.mark.parametrize(
    "given, meant", [("num_expert", "num_experts"), ("router_nois", "router_noise"), ("windowsize", "window_size")]
)
def test_a_misspelt_field_is_refused_with_the_right_name(given, meant):
    with pytest.raises(ValueError, match=f"`{given}` must be a field of MsGFMConfig, got 3. Did you mean `{meant}`"):
        MsGFMConfig(**{given: 3})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sensors": {}}, r"`sensors` must name at least one sensor, got \{\}"),
        ({"sensors": {"radar": SENSORS["s1"].to_dict()}}, "`sensors` must be keyed by the id of each sensor, got 'rad"),
        ({"inputs": {}}, r"`inputs` must name at least one sensor and its bands, got \{\}"),
        ({"inputs": {"s9": ["B1"]}}, "sensors of this model .dsm, rgb, s1, s2., got 's9'"),
        ({"inputs": {"s1": ["HH"]}}, "`bands` of sensor 's1' must be among VV, VH, got 'HH'"),
        ({"fusion": "middle"}, "`fusion` must be 'early' or 'late', got 'middle'"),
        ({"attention_score": "l2"}, "`attention_score` must be 'dot' or 'cosine', got 'l2'. The default is 'dot'."),
        ({"position_bias": "none"}, "`position_bias` must be 'table' or 'log_cpb', got 'none'"),
        ({"norm_position": "mid"}, "`norm_position` must be 'pre' or 'post', got 'mid'"),
        ({"router_type": "hash"}, "`router_type` must be 'linear' or 'cosine', got 'hash'"),
        ({"router_aux_loss_type": "z"}, "`router_aux_loss_type` must be 'importance_load' or 'gshard', got 'z'"),
        ({"pretrained_window_sizes": [4]}, r"`pretrained_window_sizes` must have one entry per stage \[2, 2\]"),
        (
            {"pretrained_window_sizes": [-4, 4], "position_bias": "log_cpb"},
            r"`pretrained_window_sizes` must not be negative, got \[-4, 4\]",
        ),
        ({"pretrained_window_sizes": [4, 4]}, "`pretrained_window_sizes` must be zeros where .* Only 'log_cpb'"),
        ({"depths": [], "num_heads": []}, r"`depths` must name at least one stage, got \[\]"),
        ({"image_size": 0}, "`image_size` must be above 0, got 0"),
        ({"router_noise": float("inf")}, "`router_noise` must be finite, got inf"),
        ({"mlp_ratio": 0.01}, r"`mlp_ratio` must leave an MLP at least one of `embed_dim` \(16\) channels, got 0.01"),
        ({"patch_size": -4}, "`patch_size` must be above 0, got -4"),
        ({"embed_dim": 0}, "`embed_dim` must be above 0, got 0"),
        ({"window_size": 0}, "`window_size` must be above 0, got 0"),
        ({"num_experts": 0}, "`num_experts` must be above 0, got 0"),
        ({"num_experts_per_tok": 0}, "`num_experts_per_tok` must be above 0, got 0"),
        ({"num_heads": [2]}, r"`num_heads` must have one entry per stage \[2, 2\], got \[2\]"),
        ({"moe_blocks": [[], [1, 1]]}, r"`moe_blocks` must name each block once, got \[\[\], \[1, 1\]\]"),
        ({"moe_blocks": [[]]}, r"`moe_blocks` must have one entry per stage \[2, 2\], got \[\[\]\]"),
        ({"num_heads": [3, 4]}, r"`num_heads` must divide the stages' widths \(16\), got \[3, 4\]"),
        ({"num_heads": [2, 0]}, r"`num_heads` must divide the stages' widths \(32\), got \[2, 0\]"),
        ({"moe_blocks": [[], [2]]}, r"`moe_blocks` must count blocks inside their stage \(\[2, 2\]\)"),
        ({"moe_blocks": [[-1], []]}, r"`moe_blocks` must count blocks inside their stage"),
        ({"num_experts_per_tok": 5}, r"`num_experts_per_tok` must be at most `num_experts` \(4\), got 5"),
        ({"mask_patch_size": 6}, r"`mask_patch_size` must be a multiple of `patch_size` \(4\), got 6"),
        ({"mask_patch_size": 0}, r"`mask_patch_size` must be a multiple of `patch_size` \(4\), got 0"),
        ({"capacity_factor": 0}, "`capacity_factor` must be above 0, or None for no limit, got 0"),
        ({"eval_capacity_factor": -1.0}, "`eval_capacity_factor` must be above 0, or None for no limit, got -1.0"),
        ({"router_noise": -0.5}, "`router_noise` must not be negative, got -0.5"),
        ({"router_aux_loss_coef": -1}, "`router_aux_loss_coef` must not be negative, got -1"),
        # What would break or poison the model much later, far from its cause.
        ({"depths": [2, 0]}, "`depths`"),
        ({"depths": [2, -1]}, "`depths`"),
        ({"mlp_ratio": 0}, "`mlp_ratio`"),
        ({"hidden_act": "gelo"}, "`hidden_act`.*gelo"),
        ({"hidden_dropout_prob": 1.5}, "`hidden_dropout_prob`"),
        ({"attention_probs_dropout_prob": -0.1}, "`attention_probs_dropout_prob`"),
        ({"drop_path_rate": 1.0}, "`drop_path_rate`"),
        ({"layer_norm_eps": 0.0}, "`layer_norm_eps`"),
        ({"initializer_range": -0.02}, "`initializer_range`"),
        ({"num_local_experts": 0}, "`num_.*experts`"),
        ({"inputs": {"s1": []}}, "`inputs`"),
    ],
)
def test_values_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MsGFMConfig(**{**TINY, "moe_blocks": [[], []], **fields})


@pytest.mark.parametrize("fields", [{"embed_dim": "wide"}, {"depths": 2}, {"qkv_bias": "yes"}, {"inputs": ["rgb"]}])
def test_values_of_a_wrong_type_are_refused_with_their_field(fields):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"field '{next(iter(fields))}'"):
        MsGFMConfig(**fields)


def test_an_unknown_sensor_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"sensors of this model \(dsm, rgb, s1, s2\), got 'lidar'.*add_sensor"):
        MsGFMConfig().sensor("lidar")


def test_a_round_trip_keeps_fields_and_the_order_of_parameters(tmp_path):
    config = MsGFMConfig(
        **TINY,
        sensors=sensors("s2", "dsm", "naip"),
        inputs={"s2": ["B04", "B02"]},
        moe_blocks=[[0], [1]],
        eval_capacity_factor=2.0,
        out_features=["stage1"],
    )
    config.save_pretrained(tmp_path)
    again = MsGFMConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.out_features == ["stage1"]
    names = [name for name, _ in MsGFMForPreTraining(config).named_parameters()]
    assert names == [name for name, _ in MsGFMForPreTraining(again).named_parameters()]
    stems = list(dict.fromkeys(name.split(".")[3] for name in names if "patch_embeddings" in name))
    assert stems == ["dsm", "naip", "s2"]


def test_inputs_have_the_same_order_before_and_after_a_round_trip(tmp_path):
    """Late fusion lays features out in this order: another one would feed a head the wrong channels."""
    config = MsGFMConfig(**TINY, fusion="late", inputs={"s2": ["B04", "B02"], "dsm": ["height"]})
    config.save_pretrained(tmp_path)
    assert list(config.inputs) == list(MsGFMConfig.from_pretrained(tmp_path).inputs) == ["dsm", "s2"]
    assert config.inputs["s2"] == ["B04", "B02"]


def test_what_follows_from_other_fields_is_not_believed_from_a_file():
    stored = {**MsGFMConfig(**TINY).to_dict(), "hidden_size": 7, "num_layers": 9, "stage_names": ["wrong"]}
    config = MsGFMConfig.from_dict(stored)
    assert (config.hidden_size, config.num_layers, config.stage_names) == (32, 2, ["stem", "stage1", "stage2"])


def test_two_configurations_share_no_lists():
    first, second = MsGFMConfig(), MsGFMConfig()
    first.sensors["s2"]["bands"].clear()
    first.inputs["rgb"].clear()
    first.moe_blocks[2].clear()
    assert len(second.sensors["s2"]["bands"]) == 13
    assert len(second.inputs["rgb"]) == 3 and len(second.moe_blocks[2]) == 9
    assert len(SENSORS["s2"].bands) == 13


@pytest.mark.parametrize("name", ["window", "experts", "num_expert"])
def test_a_name_near_a_field_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be a field of MsGFMConfig, got 3. Did you mean"):
        MsGFMConfig(**{name: 3})


def test_a_name_near_a_field_in_a_file_is_pointed_out(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("msgfm_hf"), "propagate", True)
    stored = {**MsGFMConfig(**TINY).to_dict(), "transformers_version": "5.0.0", "num_expert": 7}
    assert MsGFMConfig.from_dict(stored).num_experts == 4
    assert "`num_expert` must be a field of MsGFMConfig, got 7. Did you mean `num_experts`?" in caplog.text


def test_inputs_are_kept_by_their_canonical_names():
    assert MsGFMConfig(inputs={"rgb": ["R", "blue", "g"]}).inputs == {"rgb": ["red", "blue", "green"]}
