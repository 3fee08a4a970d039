"""Random models on random batches: what any valid configuration must do, and how an invalid one is refused.

The cases are drawn by hypothesis, the same in every run. `CASES` says how many there are of each kind.
"""

import json
import math
import tempfile

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msgfm_hf import (
    SENSORS,
    MsGFMBackbone,
    MsGFMConfig,
    MsGFMForImageClassification,
    MsGFMForPreTraining,
    MsGFMForSemanticSegmentation,
    MsGFMImageProcessor,
    MsGFMModel,
)
from msgfm_hf.hub.code import write_model_code
from tiny_models import CLASSES
from without_package import run_without_package

CASES = {"runs": 200, "alone": 60, "heads": 60, "refused": 200, "bf16": 60, "saved": 60, "remote": 8}
CATALOGUE = ("rgb", "s2", "s1", "dsm")
HEADS = [cls for cls in CLASSES if cls is not MsGFMForPreTraining]


def cases(kind: str):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=CASES[kind], deadline=None, derandomize=True, suppress_health_check=checks)


@st.composite
def band_names(draw, sensor: str) -> list[str]:
    """Some bands of a sensor, in any order."""
    names = draw(st.permutations(SENSORS[sensor].band_names))
    return names[: draw(st.integers(1, len(names)))]


@st.composite
def fields(draw) -> dict:
    """Every field of a configuration that shapes the model, small enough to run in milliseconds."""
    stages = draw(st.integers(1, 3))
    depths = [draw(st.integers(1, 2)) for _ in range(stages)]
    embed_dim = draw(st.sampled_from([4, 6, 8, 10, 16]))
    widths = [embed_dim * 2**stage for stage in range(stages)]
    names = sorted(draw(st.sets(st.sampled_from(CATALOGUE), min_size=1)))
    inputs = sorted(draw(st.sets(st.sampled_from(names), min_size=1)))
    patch_size = draw(st.sampled_from([1, 2, 4, 5]))
    num_experts = draw(st.integers(1, 5))
    position_bias = draw(st.sampled_from(["table", "log_cpb"]))
    pretrained = st.integers(0, 6) if position_bias == "log_cpb" else st.just(0)
    return {
        "sensors": {name: SENSORS[name].to_dict() for name in names},
        "inputs": {name: draw(band_names(name)) for name in inputs},
        "fusion": draw(st.sampled_from(["early", "late"])),
        "image_size": draw(st.integers(1, 64)),
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": [draw(st.sampled_from([h for h in (1, 2, 4, 5) if width % h == 0])) for width in widths],
        "window_size": draw(st.integers(1, 5)),
        "pretrained_window_sizes": [draw(pretrained) for _ in depths],
        "mlp_ratio": draw(st.sampled_from([0.5, 1, 1.7, 4.0])),
        "qkv_bias": draw(st.booleans()),
        "attention_score": draw(st.sampled_from(["dot", "cosine"])),
        "position_bias": position_bias,
        "norm_position": draw(st.sampled_from(["pre", "post"])),
        "hidden_act": draw(st.sampled_from(["gelu", "relu", "silu"])),
        "hidden_dropout_prob": draw(st.sampled_from([0, 0.0, 0.3])),
        "attention_probs_dropout_prob": draw(st.sampled_from([0.0, 0.3])),
        "drop_path_rate": draw(st.sampled_from([0.0, 0.5])),
        "moe_blocks": [sorted(draw(st.sets(st.integers(0, depth - 1)))) for depth in depths],
        "num_experts": num_experts,
        "num_experts_per_tok": draw(st.integers(1, num_experts)),
        "router_type": draw(st.sampled_from(["linear", "cosine"])),
        "router_noise": draw(st.sampled_from([0, 0.5, 1.0])),
        "capacity_factor": draw(st.sampled_from([None, 0.1, 1, 1.25])),
        "eval_capacity_factor": draw(st.sampled_from([None, None, 0.5])),
        "router_aux_loss_type": draw(st.sampled_from(["importance_load", "gshard"])),
        "router_aux_loss_coef": draw(st.sampled_from([0, 0.01])),
        "mask_patch_size": patch_size * draw(st.integers(1, 4)),
    }


@st.composite
def images(draw, config: MsGFMConfig, names: list[str], rows: int, size: tuple[int, int], dtype: torch.dtype) -> dict:
    """Arguments of a forward for one place: pixels, the names of their bands, and perhaps where they are valid."""
    inputs: dict = {"pixel_values": {}, "bands": {}, "valid_mask": {}}
    for name in names:
        # Bands left unsaid are those of `config.inputs`, else all.
        said = draw(st.one_of(st.none(), band_names(name)))
        bands = said or config.inputs.get(name) or SENSORS[name].band_names
        if said:
            inputs["bands"][name] = said
        pixels = torch.randn(rows, len(bands), *size) * draw(st.sampled_from([0.0, 1.0, 10.0]))
        if draw(st.booleans()):
            valid = torch.rand(rows, *size) < draw(st.sampled_from([0.0, 0.5, 0.9]))
            # What is not valid may hold anything.
            pixels = torch.where(valid.unsqueeze(1), pixels, draw(st.sampled_from([-9999.0, math.nan, math.inf])))
            inputs["valid_mask"][name] = valid
        inputs["pixel_values"][name] = pixels.to(dtype)
    inputs["valid_mask"] = inputs["valid_mask"] or None
    return inputs


@st.composite
def batches(draw, config: MsGFMConfig, dtype: torch.dtype) -> dict:
    """Arguments of `MsGFMForPreTraining.forward`: sources of one or several sensors, masks, crossings, weights."""
    size = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    patches = math.ceil(size[0] / config.patch_size) * math.ceil(size[1] / config.patch_size)
    batch: dict = {name: [] for name in ("pixel_values", "bands", "valid_mask", "bool_masked_pos", "targets")}
    for _ in range(draw(st.integers(1, 3))):
        names = sorted(draw(st.sets(st.sampled_from(sorted(config.sensors)), min_size=1)))
        rows = draw(st.integers(1, 3))
        for name, values in draw(images(config, names, rows, size, dtype)).items():
            batch[name].append(values)
        ratio = draw(st.sampled_from([0.0, 0.6, 1.0]))
        kind = draw(st.sampled_from([torch.bool, torch.int64, torch.float32]))
        batch["bool_masked_pos"].append({name: (torch.rand(rows, patches) < ratio).to(kind) for name in names})
        batch["targets"].append({name: draw(st.sampled_from(names)) for name in names if draw(st.booleans())})
    batch["weights"] = [draw(st.sampled_from([0.25, 1.0])) for _ in batch["pixel_values"]]
    return batch


def make(cls, config_fields, seed=0, **more):
    """A model with parameters far from their first values, so that a part left out would show."""
    torch.manual_seed(seed)
    model = cls(MsGFMConfig(**{**config_fields, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tensors(value) -> list[torch.Tensor]:
    """All tensors of a nested output."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in values for tensor in tensors(item)]


def assert_finite_gradients(model):
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@cases("runs")
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_any_valid_configuration_pretrains_on_any_batch(data, seed):
    dtype, pixels, autocast = data.draw(
        st.sampled_from(
            [
                (torch.float32, torch.float32, None),
                (torch.float32, torch.float64, None),
                (torch.float32, torch.float16, torch.bfloat16),
                (torch.float32, torch.float32, torch.bfloat16),
                (torch.bfloat16, torch.float32, None),
                (torch.bfloat16, torch.bfloat16, None),
                (torch.float64, torch.float32, None),
                (torch.float16, torch.float32, None),
                (torch.float32, torch.float32, torch.float16),
            ]
        )
    )
    model = make(MsGFMForPreTraining, data.draw(fields()), seed).to(dtype)
    model.train(data.draw(st.booleans()))
    batch = data.draw(batches(model.config, pixels))
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        output = model(**batch, output_router_logits=True, output_hidden_states=True)
    output.loss.backward()
    assert output.loss.ndim == 0
    assert all(tensor.isfinite().all() for tensor in tensors(dict(output)) if tensor.is_floating_point())
    assert_finite_gradients(model)
    assert model.msgfm.embeddings.mask_token.grad is not None
    for source, images_of, targets in zip(output.reconstruction, batch["pixel_values"], batch["targets"], strict=True):
        assert set(source) == set(images_of)
        for name, prediction in source.items():
            assert prediction.shape == images_of[targets.get(name, name)].shape
    experts = model.config.num_experts
    for selected in output.selected_experts or ():
        assert ((selected >= 0) & (selected <= experts)).all()
        if model.config.num_experts_per_tok > 1:
            chosen = selected.sort(-1).values
            assert ((chosen.diff(dim=-1) > 0) | (chosen[:, 1:] == experts)).all()


@cases("alone")
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_a_source_is_predicted_as_if_it_came_alone(data, seed):
    model = make(MsGFMForPreTraining, data.draw(fields()), seed, eval_capacity_factor=None).double().eval()
    batch = data.draw(batches(model.config, torch.float64))
    with torch.no_grad():
        together = model(**batch)
        total = model.config.router_aux_loss_coef * (0 if together.aux_loss is None else together.aux_loss)
        for source, reconstruction in enumerate(together.reconstruction):
            alone = model(**{name: [values[source]] for name, values in batch.items()})
            for name, prediction in reconstruction.items():
                # The router computes in single precision.
                torch.testing.assert_close(prediction, alone.reconstruction[0][name], atol=1e-6, rtol=1e-4)
            total = total + batch["weights"][source] * sum(alone.slice_losses[0].values())
    torch.testing.assert_close(together.loss, total, atol=1e-6, rtol=1e-4, check_dtype=False)


@cases("heads")
@given(data=st.data(), seed=st.integers(0, 2**16), training=st.booleans())
def test_any_valid_configuration_serves_every_head(data, seed, training):
    cls = data.draw(st.sampled_from(HEADS))
    model = make(cls, data.draw(fields()), seed, num_labels=3).train(training)
    config = model.config
    names = data.draw(st.sets(st.sampled_from(sorted(config.inputs)), min_size=1))
    rows, size = data.draw(st.integers(1, 3)), (data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)))
    inputs = data.draw(images(config, sorted(names), rows, size, torch.float32))
    if cls is MsGFMForImageClassification:
        inputs["labels"] = torch.randint(0, 3, (rows,))
    if cls is MsGFMForSemanticSegmentation:
        inputs["labels"] = torch.randint(0, 3, (rows, *size))
    output = model(**inputs)
    if cls is MsGFMModel:
        main, shape = output.pooler_output, (rows, model.num_features)
    elif cls is MsGFMBackbone:
        main, shape = output.feature_maps[-1], (rows, model.channels[-1])
        shape += tuple(math.ceil(side / config.encoder_stride) for side in size)
    else:
        main, shape = output.logits, (rows, 3, *(size if cls is MsGFMForSemanticSegmentation else ()))
    assert main.shape == shape
    loss = output.get("loss")
    (main.float().square().mean() if loss is None else loss).backward()
    assert main.isfinite().all() and (loss is None or loss.isfinite())
    assert_finite_gradients(model)


NAN, INFINITE = math.nan, math.inf
# Per field, what no configuration may hold, whatever the others are.
WRONG = {
    "sensors": [{}],
    "inputs": [{}, {"radar": ["VV"]}, {"rgb": []}, {"s1": ["HH"]}, {"s1": ["VV", "VV"]}],
    "fusion": ["middle", ""],
    "image_size": [0, -32],
    "patch_size": [0, -4],
    "embed_dim": [0, -8],
    "depths": [[], [0], [2, -1]],
    "num_heads": [[], [0], [-1], [7]],
    "window_size": [0, -6],
    "pretrained_window_sizes": [[-1], []],
    "mlp_ratio": [0, -1.0, NAN, INFINITE, 0.001],
    "attention_score": ["l2"],
    "position_bias": ["none"],
    "norm_position": ["both"],
    "hidden_act": ["gelo"],
    "hidden_dropout_prob": [1, 1.5, -0.1, NAN],
    "attention_probs_dropout_prob": [1.0, -0.1, NAN],
    "drop_path_rate": [1.0, -0.1, INFINITE],
    "moe_blocks": [[], [[9]], [[-1]], [[0, 0]]],
    "num_experts": [0, -1],
    "num_experts_per_tok": [0, 9],
    "router_type": ["hash"],
    "router_noise": [-1, NAN, INFINITE],
    "capacity_factor": [0, -1.0, NAN, INFINITE],
    "eval_capacity_factor": [0, NAN, INFINITE],
    "router_aux_loss_type": ["z"],
    "router_aux_loss_coef": [-0.1, NAN, INFINITE],
    "mask_patch_size": [0, -4],
    "initializer_range": [-0.1, NAN, INFINITE],
    "layer_norm_eps": [0.0, -1e-5, NAN, INFINITE],
}


# What else may be named, where two fields do not fit together.
ALSO = {"inputs": ["bands", "pixel_values"]}


@cases("refused")
@given(config_fields=fields(), field=st.sampled_from(sorted(WRONG)), data=st.data())
def test_a_wrong_field_is_refused_by_name(config_fields, field, data):
    wrong = data.draw(st.sampled_from(WRONG[field]))
    if field in ("depths", "num_heads", "moe_blocks", "pretrained_window_sizes"):
        # One stage is wrong, or there is none at all.
        others = config_fields[field]
        wrong = [*others[: len(others) - len(wrong)], *wrong] if wrong else []
    if field == "num_heads" and wrong and wrong[-1] == 7:
        config_fields["embed_dim"] = 8
        config_fields["num_heads"] = wrong = [1] * (len(wrong) - 1) + [7]
    if field == "depths" and wrong and len(wrong) > len(config_fields["depths"]):
        wrong = wrong[-len(config_fields["depths"]) :]
    with pytest.raises(ValueError, match=rf"^`({'|'.join([field, *ALSO.get(field, [])])})` .*must .*, got "):
        MsGFMConfig(**{**config_fields, field: wrong})


@cases("refused")
@given(config_fields=fields(), field=st.sampled_from(sorted(WRONG)), wrong=st.sampled_from(["no", b"", object()]))
def test_a_field_of_another_type_is_refused_by_name(config_fields, field, wrong):
    choices = ("fusion", "attention_score", "position_bias", "norm_position", "hidden_act")
    if wrong == "no" and field in (*choices, "router_type", "router_aux_loss_type"):
        wrong = 3
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        MsGFMConfig(**{**config_fields, field: wrong})


# The highest and lowest that a sensor of the catalogue can show, in its default unit.
EXTREMES = {"rgb": (0, 255), "s2": (0, 30000), "s1": (-60.0, 20.0), "dsm": (-430.0, 8848.0)}


@cases("bf16")
@given(data=st.data(), seed=st.integers(0, 2**16), pure=st.booleans())
def test_gradients_stay_finite_in_bf16_on_extreme_pixels(data, seed, pure):
    model = make(MsGFMForPreTraining, data.draw(fields()), seed).train()
    model.to(torch.bfloat16 if pure else torch.float32)
    processor = MsGFMImageProcessor.from_config(model.config)
    generator = np.random.default_rng(seed)
    inputs: dict = {"pixel_values": {}, "bands": {}, "bool_masked_pos": {}}
    size = 24
    for name in model.config.sensors:
        low, high = EXTREMES[name]
        share = data.draw(st.sampled_from([0.0, 0.01, 0.5, 1.0]))
        bands = SENSORS[name].band_names
        image = np.where(generator.random((len(bands), size, size)) < share, high, low)
        image = image.astype({"rgb": np.uint8, "s2": np.uint16}.get(name, np.float32))
        options = {"s2": {"offset": 0}, "s1": {"unit": "db"}}.get(name, {})
        # A whole image of saturated pixels is valid, though hardly plausible.
        options["check"] = False
        inputs["pixel_values"][name] = processor(image, sensor=name, bands=bands, **options)["pixel_values"]
        inputs["bands"][name] = bands
        patches = math.ceil(size / model.config.patch_size) ** 2
        inputs["bool_masked_pos"][name] = torch.rand(1, patches) < 0.6
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not pure):
            output = model(**inputs)
        output.loss.backward()
        assert output.loss.isfinite()
        assert_finite_gradients(model)
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@cases("saved")
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_any_valid_configuration_comes_back_from_a_folder(data, seed):
    cls = data.draw(st.sampled_from(CLASSES))
    model = make(cls, data.draw(fields()), seed).eval()
    names = data.draw(st.sets(st.sampled_from(sorted(model.config.inputs)), min_size=1))
    size = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    inputs = data.draw(images(model.config, sorted(names), 2, size, torch.float32))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = cls.from_pretrained(folder).eval()
    ours, theirs = model.config.to_dict(), loaded.config.to_dict()
    assert {**theirs, "_name_or_path": ""} == ours
    with torch.no_grad():
        for before, after in zip(tensors(dict(model(**inputs))), tensors(dict(loaded(**inputs))), strict=True):
            assert torch.equal(before, after)


REMOTE = """
    import json, sys
    import torch
    from transformers import AutoModel
    assert "msgfm_hf" not in sys.modules
    sums = []
    for folder in sys.argv[1:]:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules")
        with torch.no_grad():
            sums.append(model(**torch.load(folder + "/inputs.pt")).last_hidden_state.double().sum().item())
    print(json.dumps(sums))
"""


def test_any_valid_configuration_runs_through_remote_code(tmp_path):
    expected = {}

    @cases("remote")
    @given(data=st.data(), seed=st.integers(0, 2**16))
    def save(data, seed):
        folder = tmp_path / f"model{len(expected)}"
        model = make(MsGFMModel, data.draw(fields()), seed).eval()
        inputs = data.draw(images(model.config, sorted(model.config.inputs), 2, (21, 13), torch.float32))
        model.save_pretrained(folder)
        write_model_code(folder)
        torch.save(inputs, folder / "inputs.pt")
        with torch.no_grad():
            expected[str(folder)] = model(**inputs).last_hidden_state.double().sum().item()

    save()
    done = run_without_package(tmp_path, REMOTE, *expected)
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(list(expected.values()), rel=1e-6)
    assert len(expected) == CASES["remote"]
