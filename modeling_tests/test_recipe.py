"""Recipes and what they steer: strict reading, the schedule of Table 10, and the groups of the optimiser."""

import argparse
import dataclasses
import math
import re

import pytest
import torch

from msgfm_hf.model.configuration_msgfm import MsGFMConfig
from msgfm_hf.model.modeling_msgfm import MsGFMForPreTraining
from msgfm_hf.model.sensors import SENSORS
from msgfm_hf.train.optimisation import (
    build_optimizer,
    decays,
    learning_rate_scales,
    set_learning_rate,
    source_weights,
)
from msgfm_hf.train.recipe import (
    Recipe,
    add_recipe_arguments,
    build_recipe,
    learning_rate_factor,
    load_recipe,
    recipe_from_arguments,
    recipe_names,
)

FIELDS = {entry.name: entry for entry in dataclasses.fields(Recipe)}


def recipe(**fields):
    return build_recipe({"data": ["shards"], **fields})


def parse(*words):
    parser = argparse.ArgumentParser(prog="pretrain.py")
    add_recipe_arguments(parser)
    return recipe_from_arguments(parser.parse_args(words))


# Reading


def test_the_recipes_of_the_package_are_there_and_load():
    assert {"msgfm_base", "quickstart", "sample"} < set(recipe_names())
    for name in recipe_names():
        loaded = load_recipe(name)
        assert loaded.name == name
        # A device holds a sub-batch of every source that the recipe names.
        assert set(loaded.batch_sizes) and min(loaded.batch_sizes.values()) > 0
        assert str(loaded.run_dir) == f"runs/{name}"


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_at_its_head_what_it_takes(name):
    from importlib import resources

    text = resources.files("msgfm_hf").joinpath(f"recipes/{name}.yaml").read_text()
    head = [line for line in text.splitlines() if line.startswith("#")]
    for entry in ("command:", "hardware:", "time:", "result:"):
        assert any(line.startswith(f"# {entry}") for line in head), entry


def test_the_papers_recipe_is_table_10():
    base = load_recipe("msgfm_base")
    assert base.batch_sizes == {"geopile": 48, "millionaid": 80, "sen12ms": 32, "mdas": 12}
    sensors = [["rgb"], ["rgb"], ["s1", "s2"], ["dsm", "rgb"]]
    geopile, millionaid, sen12ms, mdas = source_weights(list(base.batch_sizes.values()), sensors)
    # The two sources of RGB are its sub-batch of 128.
    rates = [base.learning_rate * weight for weight in (geopile + millionaid, sen12ms, mdas)]
    assert rates == pytest.approx([1e-4, 0.25e-4, 1e-5], rel=0.07)
    assert geopile / millionaid == 0.6
    assert (base.num_train_epochs, base.weight_decay, base.max_grad_norm) == (100, 0.05, 5.0)
    assert (base.adam_beta1, base.adam_beta2, base.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (base.warmup_steps, base.warmup_learning_rate, base.warmup(1000)) == (0.1, 5e-7, 100)
    assert (base.mask_ratio, base.cross_sensor_ratio, base.cross_loss_region) == (0.6, 0.5, "masked")
    config = base.model_config({"rgb": SENSORS["rgb"].to_dict()}, {"rgb": ["red", "green", "blue"]})
    assert (config.embed_dim, config.depths, config.image_size) == (128, (2, 2, 18, 2), 192)


ABLATIONS = {
    "ablation_dense_cross_0": (0, 0.0, None),
    "ablation_moe_cross_0": (9, 0.0, None),
    "ablation_dense_cross_50": (0, 0.5, None),
    "ablation_moe_cross_100": (9, 1.0, None),
    "ablation_dense_cross_100": (0, 1.0, None),
    "ablation_s1": (9, 0.5, ["s1"]),
    "ablation_s2": (9, 0.5, ["s2"]),
    "ablation_rgb": (9, 0.5, ["rgb"]),
    "ablation_without_rgb": (9, 0.5, ["dsm", "s1", "s2"]),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_differs_from_the_papers_recipe_in_what_it_is_for(name):
    blocks, crossing, sensors = ABLATIONS[name]
    base, found = load_recipe("msgfm_base"), load_recipe(name)
    config = found.model_config({"rgb": SENSORS["rgb"].to_dict()}, {"rgb": ["red"]})
    assert sum(map(len, config.moe_blocks)) == blocks
    assert (found.cross_sensor_ratio, found.sensors) == (crossing, sensors or [])
    changed = {entry for entry in FIELDS if getattr(found, entry) != getattr(base, entry)}
    assert changed <= {"name", "model", "cross_sensor_ratio", "sensors", "batch_sizes", "learning_rate"}
    if sensors is None:
        assert "batch_sizes" not in changed
    else:
        # Each source keeps the rate it has in table 10.
        assert found.batch_sizes.items() <= base.batch_sizes.items()
        reference = max(found.batch_sizes.values()) if "rgb" not in sensors else 128
        assert found.learning_rate == pytest.approx(1e-4 * reference / 128)


def test_the_long_run_of_the_paper_decays_at_epoch_700():
    long = load_recipe("msgfm_base_800")
    assert (long.num_train_epochs, long.warmup(8000)) == (800, 100)
    factors = [learning_rate_factor(long, step, 8000) for step in (100, 6999, 7000, 7999)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1])


def test_a_recipe_extends_another(tmp_path):
    (tmp_path / "base.yaml").write_text("data: [a]\nlearning_rate: 0.5\nmax_steps: 3\n")
    (tmp_path / "mine.yaml").write_text(f"extends: {tmp_path}/base.yaml\nmax_steps: 7\n")
    found = load_recipe(str(tmp_path / "mine.yaml"), {"seed": 4})
    assert (found.data, found.learning_rate, found.max_steps, found.seed) == (["a"], 0.5, 7, 4)
    (tmp_path / "base.yaml").write_text(f"extends: {tmp_path}/mine.yaml\n")
    with pytest.raises(
        ValueError, match="`extends` must lead to a recipe that extends none, got .*mine.yaml -> .*base"
    ):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_the_tiny_model_is_that_of_the_design():
    config = recipe(model_size="tiny").model_config(
        {sensor: SENSORS[sensor].to_dict() for sensor in ("s2", "s1")}, {"s1": ["VV", "VH"]}
    )
    assert list(config.sensors) == ["s1", "s2"]
    assert (config.embed_dim, config.depths, config.num_heads) == (48, [2, 2, 6], [2, 4, 8])
    assert (config.image_size, config.mask_patch_size, config.window_size) == (96, 16, 6)
    assert (config.num_experts, config.moe_blocks, config.encoder_stride) == (4, [[], [], [1, 3, 5]], 16)


def test_the_small_model_is_that_of_the_design():
    config = recipe(model_size="small").model_config({"rgb": SENSORS["rgb"].to_dict()}, {"rgb": ["red"]})
    assert (config.embed_dim, config.depths, config.num_heads) == (96, [2, 2, 6, 2], [3, 6, 12, 24])
    assert (config.image_size, config.mask_patch_size, config.num_experts) == (192, 32, 8)
    assert config.moe_blocks == [[], [], [1, 3, 5], []]


def test_fields_of_the_model_replace_those_of_its_size():
    wide = recipe(model_size="tiny", model={"num_experts": 8, "embed_dim": 96})
    config = wide.model_config({"rgb": SENSORS["rgb"].to_dict()}, {"rgb": ["red"]})
    assert (config.num_experts, config.embed_dim, config.depths) == (8, 96, [2, 2, 6])
    with pytest.raises(ValueError, match=r"`model` must name fields of MsGFMConfig \(`num_experts`\?\), got"):
        recipe(model={"num_expert": 8})


def test_a_file_of_ones_own(tmp_path):
    # YAML 1.1 takes 1e-4 for a word.
    (tmp_path / "mine.yaml").write_text("data: [a, b]\nlearning_rate: 1e-4\nmax_steps: 7\nlr_milestones: [0.5]\n")
    loaded = load_recipe(str(tmp_path / "mine.yaml"), {"max_steps": 9, "weight_decay": 0})
    assert (loaded.data, loaded.learning_rate, loaded.max_steps) == (["a", "b"], 1e-4, 9)
    assert isinstance(loaded.weight_decay, float)
    assert loaded.lr_milestones == [0.5]


def test_recipes_share_no_lists():
    first, second = recipe(), recipe()
    for name in ("model", "batch_sizes", "lr_milestones"):
        assert getattr(first, name) is not getattr(second, name)


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "quikstart",
            "`recipe` must be one of .*msgfm_base.*, quickstart, sample, got 'quikstart'. Did you mean 'quicks",
        ),
        ("zzz", "`recipe` must be one of .*, got 'zzz'. A file of your own ends in .yaml."),
        ("nowhere.yaml", r"`recipe` must be a file or a name \(.*quickstart, sample\), got 'nowhere.yaml'"),
    ],
)
def test_a_recipe_that_is_not_there_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(name)


@pytest.mark.parametrize(
    "text, message",
    [
        ("- 1\n- 2\n", "`recipe` must be lines of `field: value`, got list in .*mine.yaml.*Look at the recipes"),
        ("name: [1\n", "(?s)`recipe` must be YAML, got .*mine.yaml.*Correct the file"),
        ("data: [a]\nlearning_rat: 1\n", "`learning_rat` must be a field of a recipe, got 1. Did you mean `learning_r"),
        ("data: [a]\nzzzzz: 1\n", "`zzzzz` must be a field of a recipe, got 1. See `--help` for all."),
        ("", "`data` must name at least one folder of shards, got .*Correct the recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    "name, value, kind",
    [
        ("max_steps", "many", "int"),
        ("max_steps", 1.5, "int"),
        ("seed", True, "int"),
        ("learning_rate", "fast", "float"),
        ("learning_rate", True, "float"),
        ("data", "shards", "list"),
        ("model", "base", "dict"),
        ("batch_sizes", [8], "dict"),
        ("name", 3, "str"),
        ("lr_milestones", 0.5, "list"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(name, value, kind):
    with pytest.raises(ValueError, match=re.escape(f"`{name}` must be a {kind}, got {value!r}. Correct the recipe")):
        recipe(**{name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        ("batch_sizes", {"rgb": "eight"}),
        ("batch_sizes", {"rgb": 2.5}),
        ("batch_sizes", {"rgb": True}),
        ("lr_milestones", ["late"]),
        ("data", [3]),
    ],
)
def test_a_wrong_type_inside_a_list_or_a_mapping_is_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must "):
        recipe(**{name: value})


@pytest.mark.parametrize(
    "name, value, rule",
    [
        ("model", {"sensors": {}}, "leave `sensors` and `inputs` to the data"),
        ("model_size", "huge", "be one of tiny, small, base"),
        ("make_data", "real", "be one of none, synthetic, sample"),
        ("lr_scheduler_type", "linear", "be one of multistep, cosine"),
        ("mixed_precision", "fp16", "be one of auto, no, bf16"),
        ("cross_loss_region", "visible", "be one of masked, all"),
        ("mask_ratio", 1.1, "be within 0..1"),
        ("mask_ratio", float("nan"), "be within 0..1"),
        ("cross_sensor_ratio", -0.1, "be within 0..1"),
        ("logging_steps", 0, "be above 0 and finite"),
        ("eval_steps", 0, "be above 0 and finite"),
        ("save_steps", -1, "be above 0 and finite"),
        ("save_total_limit", 0, "be above 0 and finite"),
        ("eval_max_crops", 0, "be above 0 and finite"),
        ("learning_rate", 0.0, "be above 0 and finite"),
        ("learning_rate", float("inf"), "be above 0 and finite"),
        ("max_grad_norm", 0.0, "be above 0 and finite"),
        ("adam_epsilon", 0.0, "be above 0 and finite"),
        ("lr_gamma", -1.0, "be above 0 and finite"),
        ("adam_beta1", 1.0, "be at least 0 and below 1"),
        ("adam_beta2", -0.1, "be at least 0 and below 1"),
        ("seed", 2**32, "be below 2 ** 32"),
        ("name", "", "not be empty"),
        ("model", {"window": 7}, "name fields of MsGFMConfig (`window_size`?)"),
        ("model", {"zzzzz": 7}, "name fields of MsGFMConfig"),
        ("warmup_steps", -1.0, "be 0 or more, and finite"),
        ("weight_decay", -0.1, "be 0 or more, and finite"),
        ("dataloader_num_workers", -1, "be 0 or more, and finite"),
        ("max_bad", -1, "be 0 or more, and finite"),
        ("seed", -1, "be 0 or more, and finite"),
        ("num_train_epochs", -1.0, "be 0 or more, and finite"),
        ("max_steps", 0, "be above 0, or -1 for `num_train_epochs`"),
        ("lr_milestones", [700.0], "be shares of the run, within 0..1"),
        ("batch_sizes", {"rgb": 0}, "be above 0 for every source"),
        ("data", [], "name at least one folder of shards"),
    ],
)
def test_a_value_out_of_its_range_is_refused(name, value, rule):
    with pytest.raises(ValueError, match=re.escape(f"`{name}` must {rule}, got {value!r}. Correct the recipe or")):
        recipe(**{name: value})


# The command line


def test_options_replace_fields_with_their_types():
    got = parse(
        "--recipe",
        "sample",
        "--max_steps",
        "12",
        "--learning_rate",
        "1e-4",
        "--lr_milestones",
        "[0.5, 0.75]",
        "--model",
        "{num_experts: 8}",
        "--weight-decay",
        "0",
        "--name",
        "12",
        "--batch_sizes",
        "{naip: 3}",
        "--mixed_precision",
        "no",
    )
    assert (got.max_steps, got.learning_rate, got.lr_milestones) == (12, 1e-4, [0.5, 0.75])
    assert (got.model, got.weight_decay, got.name) == ({"num_experts": 8}, 0.0, "12")
    assert (got.batch_sizes, got.data, got.make_data) == ({"naip": 3}, ["runs/data/sample"], "sample")
    assert got.mixed_precision == "no"


def test_without_options_it_is_the_quickstart():
    assert parse() == load_recipe("quickstart")


def test_folders_given_by_hand_are_the_mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a/x", "b", "paper/geopile", "paper/millionaid", "paper/sen12ms", "paper/mdas"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "train-00000.parquet").touch()
    got = parse("--data", "a/x", "--data", "b")
    assert (got.data, got.make_data, got.batch_sizes, got.name) == (["a/x", "b"], "none", {}, "run")
    assert got.learning_rate == load_recipe("quickstart").learning_rate
    assert parse("--data", "a", "--batch_sizes", "{x: 3}").batch_sizes == {"x": 3}
    with pytest.raises(ValueError, match="`data` must be a folder of shards"):
        parse("--data", "nowhere")
    # The sources of a recipe, wherever they lie, keep their sub-batches.
    base = load_recipe("msgfm_base")
    got = parse("--recipe", "msgfm_base", "--data", "paper")
    assert (got.data, got.batch_sizes, got.name) == (["paper"], base.batch_sizes, "msgfm_base")
    with pytest.raises(ValueError, match="of recipe 'msgfm_base', .*, got no geopile, millionaid, sen12ms beside"):
        parse("--recipe", "msgfm_base", "--data", "paper/mdas")
    got = parse("--recipe", "msgfm_base", "--data", "paper/mdas", "--batch_sizes", "{mdas: 8}")
    assert (got.batch_sizes, got.learning_rate) == ({"mdas": 8}, base.learning_rate)
    assert parse("--recipe", "msgfm_base", "--data", "paper", "--batch_sizes", "{mdsa: 8}").batch_sizes == {"mdsa": 8}
    (tmp_path / "mine.yaml").write_text("name: mine\nmax_steps: 3\n")
    assert parse("--recipe", "mine.yaml", "--data", "a").name == "mine"


def test_options_are_read_as_strictly_as_a_file():
    with pytest.raises(ValueError, match="`max_steps` must be a int, got 'ten'"):
        parse("--max_steps", "ten")


def test_an_option_that_is_no_yaml_is_refused_by_name(capsys):
    with pytest.raises((SystemExit, ValueError)) as stopped:
        parse("--model", "{num_experts: 8")
    said = capsys.readouterr().err + str(stopped.value)
    assert "model" in said


def test_an_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse("--lerning_rate", "1")
    assert "unrecognized arguments: --lerning_rate" in capsys.readouterr().err


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for name, entry in FIELDS.items():
        assert f"--{name}" in said
        assert " ".join(entry.metadata["help"].split()) in said, name


# The schedule


def test_the_rate_warms_up_from_where_it_starts():
    plan = recipe(learning_rate=1e-4, warmup_learning_rate=5e-7, warmup_steps=100, lr_milestones=[])
    rates = [1e-4 * learning_rate_factor(plan, step, 800) for step in (0, 50, 99, 100, 799)]
    # 5e-7 + (1e-4 - 5e-7) step / 100.
    assert rates == pytest.approx([5e-7, 5.025e-5, 9.9005e-5, 1e-4, 1e-4])


def test_multistep_drops_at_its_milestones():
    plan = recipe(warmup_steps=0, lr_milestones=[700 / 800], lr_gamma=0.1)
    assert [learning_rate_factor(plan, step, 800) for step in (0, 699, 700, 799)] == pytest.approx([1, 1, 0.1, 0.1])
    twice = recipe(warmup_steps=0, lr_milestones=[0.5, 0.75], lr_gamma=0.5)
    assert [learning_rate_factor(twice, step, 8) for step in (3, 4, 5, 6)] == pytest.approx([1, 0.5, 0.5, 0.25])


def test_the_cosine_ends_at_zero():
    plan = recipe(warmup_steps=10, lr_scheduler_type="cosine")
    factors = [learning_rate_factor(plan, step, 110) for step in (10, 35, 60, 85, 110)]
    assert factors == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0])


@pytest.mark.parametrize("warmup, steps", [(0.1, 45), (0.0, 0), (1.0, 1), (30, 30)])
def test_a_warm_up_below_one_is_a_share_of_the_run(warmup, steps):
    assert recipe(warmup_steps=warmup).warmup(450) == steps


# The optimiser


@pytest.fixture(scope="module")
def model():
    config = MsGFMConfig(
        embed_dim=12, depths=[1, 1, 2], num_heads=[1, 1, 2], window_size=3, image_size=24, mask_patch_size=8
    )
    return MsGFMForPreTraining(config)


def groups_by_name(model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group for group in optimizer.param_groups for p in group["params"]}


def test_weights_are_table_10_read_as_one_step():
    sensors = [["rgb"], ["s1", "s2"], ["rgb", "dsm"]]
    assert source_weights([128, 32, 12], sensors) == [1, 0.25, 0.09375]
    assert source_weights([12, 6], [["s1"], ["s2"]]) == [1, 0.5]
    # Two halves of one sub-batch weigh as the whole.
    assert source_weights([32, 64, 64, 12], [["s2", "s1"], ["rgb"], ["rgb"], ["rgb", "dsm"]]) == [
        0.25,
        0.5,
        0.5,
        0.09375,
    ]


def test_a_sensor_of_one_source_learns_at_that_sources_pace():
    sensors = [["rgb"], ["s1", "s2"], ["rgb", "dsm"]]
    scales = learning_rate_scales(sensors, source_weights([128, 32, 12], sensors))
    assert scales == {"rgb": 1.0, "s1": 0.25, "s2": 0.25, "dsm": 0.09375}


def test_decay_is_for_matrices():
    decaying = [
        "msgfm.encoder.layers.0.blocks.0.attention.qkv.weight",
        "msgfm.encoder.layers.0.blocks.0.mlp.fc1.weight",
        "msgfm.encoder.layers.2.blocks.1.mlp.router.weight",
        "msgfm.encoder.layers.2.blocks.1.mlp.experts.up_proj",
        "msgfm.encoder.layers.2.blocks.1.mlp.experts.down_proj",
        "msgfm.encoder.layers.0.downsample.reduction.weight",
        "msgfm.embeddings.patch_embeddings.s2.projection.weight",
        "decoders.s2.weight",
    ]
    exempt = [
        "msgfm.embeddings.mask_token",
        "msgfm.embeddings.patch_embeddings.s2.projection.bias",
        "msgfm.embeddings.patch_embeddings.s2.norm.weight",
        "msgfm.encoder.layers.0.blocks.0.attention.qkv.bias",
        "msgfm.encoder.layers.0.blocks.0.attention.relative_position_bias_table",
        "msgfm.encoder.layers.0.blocks.0.layernorm_before.weight",
        "msgfm.encoder.layers.2.blocks.1.mlp.experts.up_proj_bias",
        "msgfm.encoder.layers.2.blocks.1.mlp.experts.down_proj_bias",
        "msgfm.encoder.layers.0.downsample.norm.weight",
        "msgfm.layernorm.weight",
        "decoders.s2.bias",
    ]
    found = {}
    swin_v2 = {"attention_score": "cosine", "position_bias": "log_cpb", "norm_position": "post"}
    config = MsGFMConfig(embed_dim=12, depths=[1], num_heads=[1], image_size=24, mask_patch_size=8, **swin_v2)
    for name, parameter in MsGFMForPreTraining(config).named_parameters():
        if "attention" in name:
            assert decays(name, parameter) is name.endswith(("qkv.weight", "proj.weight")), name
    config = MsGFMConfig(embed_dim=12, depths=[1, 1, 2], num_heads=[1, 1, 2], image_size=24, mask_patch_size=8)
    for name, parameter in MsGFMForPreTraining(config).named_parameters():
        found[name] = decays(name, parameter)
    assert [name for name in decaying if not found[name]] == []
    assert [name for name in exempt if found[name]] == []


def test_every_parameter_is_in_one_group_with_its_own_pace(model):
    plan = recipe(learning_rate=1e-4, weight_decay=0.05, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    sensors = [["rgb"], ["s1", "s2"], ["rgb", "dsm"]]
    optimizer = build_optimizer(model, plan, sensors, source_weights([128, 32, 12], sensors))
    groups = groups_by_name(model, optimizer)
    assert sorted(groups) == sorted(name for name, _ in model.named_parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups)
    for name, group in groups.items():
        owner = [part for part in name.split(".") if part in ("rgb", "s1", "s2", "dsm")]
        scale = {"s1": 0.25, "s2": 0.25, "dsm": 0.09375}.get(owner[0] if owner else "rgb", 1.0)
        assert group["lr_scale"] == scale, name
        parameter = dict(model.named_parameters())[name]
        assert group["weight_decay"] == (0.05 if decays(name, parameter) else 0.0)
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)
    set_learning_rate(optimizer, 2e-3)
    assert groups["decoders.dsm.weight"]["lr"] == pytest.approx(2e-3 * 0.09375)
    assert groups["decoders.rgb.weight"]["lr"] == groups["msgfm.layernorm.weight"]["lr"] == 2e-3


def test_the_groups_have_the_same_order_every_time(model):
    # A checkpoint's optimiser state is found again by place.
    plan, sensors = recipe(), [["rgb"], ["s1", "s2"], ["rgb", "dsm"]]

    def names():
        optimizer = build_optimizer(model, plan, sensors, [1.0, 0.25, 0.1])
        known = {parameter: name for name, parameter in model.named_parameters()}
        return [[known[p] for p in group["params"]] for group in optimizer.param_groups]

    assert names() == names()


def test_a_step_moves_a_slow_sensor_by_its_share():
    """AdamW's first step moves a parameter by its learning rate, whatever the size of the gradient."""
    torch.manual_seed(0)
    config = MsGFMConfig(
        embed_dim=12, depths=[1, 1, 2], num_heads=[1, 1, 2], window_size=3, image_size=24, mask_patch_size=8
    )
    model = MsGFMForPreTraining(config)
    plan = recipe(weight_decay=0.0)
    optimizer = build_optimizer(model, plan, [["rgb"], ["s1", "s2"], ["dsm"]], [1.0, 0.25, 0.09375])
    set_learning_rate(optimizer, 1e-3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.37)
    optimizer.step()
    for sensor, share in {"rgb": 1.0, "s1": 0.25, "dsm": 0.09375}.items():
        moved = before[f"decoders.{sensor}.bias"] - model.decoders[sensor].bias.detach()
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-3 * share), rtol=1e-3, atol=0)
