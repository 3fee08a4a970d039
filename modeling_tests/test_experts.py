"""What experts see, against loops over tokens, and dense models made of them, against a router worked by pencil."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from msgfm_hf import (
    MsGFMConfig,
    MsGFMForImageClassification,
    MsGFMForPreTraining,
    MsGFMImageProcessor,
    count_parameters,
)
from msgfm_hf.data.shards import ShardImage, ShardRow, ShardSource, ShardWriter
from msgfm_hf.tasks.reconstruction import evaluate_reconstruction, training_statistics
from msgfm_hf.train.checkpoint import CheckpointError
from msgfm_hf.train.experts import (
    analyse_experts,
    expert_crops,
    format_experts,
    prune_experts,
    pruning_cost,
    report_experts,
)
from msgfm_hf.train.pictures import draw_expert_crops, draw_experts
from tiny_models import lively

SIZE, WIDTH = 24, 12
NAMES = ["layers.0.blocks.0", "layers.2.blocks.1"]
STRIDES = [4, 16]


def images(rng, height, width):
    """Colours, and heights with a hole that covers whole tokens of both sizes."""
    heights = rng.normal(200, 5, (1, height, width)).astype(np.float32)
    heights[:, : height // 2 + 7, : width // 2] = np.nan
    colours = rng.integers(0, 256, (3, height, width), dtype=np.uint8)
    return {
        "rgb": ShardImage(colours, ["red", "green", "blue"], "dn", 1 / 255, gsd=0.5),
        "dsm": ShardImage(heights, ["height"], "metres", gsd=0.5),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """`pairs`: two crops per image, (3, 1) and (3, 25); `photos`: colours alone, one crop per image."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(3)
    rows = {"pairs": {"train": 2, "val": 3}, "photos": {"train": 5, "val": 2}}
    for source, sensors, shape in (("pairs", ["dsm", "rgb"], (30, 50)), ("photos", ["rgb"], (24, 24))):
        with ShardWriter(folder, source, sensors) as writer:
            for split, count in rows[source].items():
                for number in range(count):
                    made = {sensor: image for sensor, image in images(rng, *shape).items() if sensor in sensors}
                    place = f"{split} {number // 2}"
                    writer.write(ShardRow(f"{source} {split} {number}", source, split, place, made))
    return folder


def make_config(**fields):
    sensors = {sensor: spec for sensor, spec in MsGFMConfig().sensors.items() if sensor in ("rgb", "dsm", "s1")}
    tiny = {"embed_dim": WIDTH, "depths": [1, 1, 2], "num_heads": [1, 1, 2], "window_size": 3, "image_size": SIZE}
    experts = {"moe_blocks": [[0], [], [1]], "num_experts": 3}
    return MsGFMConfig(**{**tiny, **experts, "mask_patch_size": 8, "sensors": sensors, **fields})


def make_model(**fields):
    torch.manual_seed(1)
    return lively(MsGFMForPreTraining(make_config(**fields)))


COLOURS = torch.tensor([1.0, -1.0] * (WIDTH // 2))
HEIGHTS = torch.tensor([1.0, 1.0, -1.0, -1.0] * (WIDTH // 4))


@pytest.fixture
def pencil():
    """Colours reach expert 0 of the first block with gate 0.75, heights expert 2 with gate 0.9; the second block has a
    router that does not look.

    Every token of a sensor is one vector of variance 1 and mean 0 at the first router, COLOURS or HEIGHTS, which are
    orthogonal; the expert that looks for it has the logit log(odds), the other one 0, the third none to speak of.
    """
    model = make_model()
    with torch.no_grad():
        embeddings = model.msgfm.embeddings
        for sensor, vector in (("rgb", COLOURS), ("dsm", HEIGHTS)):
            embeddings.patch_embeddings[sensor].norm.weight.zero_()
            embeddings.patch_embeddings[sensor].norm.bias.copy_(vector)
        embeddings.mask_token.copy_(COLOURS)
        first, second = model.msgfm.encoder.layers[0].blocks[0], model.msgfm.encoder.layers[2].blocks[1]
        first.attention.proj.weight.zero_()
        first.attention.proj.bias.zero_()
        first.layernorm_after.weight.fill_(1)
        first.layernorm_after.bias.zero_()
        weight = first.mlp.router.weight
        weight[0] = COLOURS * math.log(0.75 / 0.25) / WIDTH
        weight[2] = HEIGHTS * math.log(0.9 / 0.1) / WIDTH
        weight[1] = -50 * (COLOURS + HEIGHTS)
        second.mlp.router.weight.zero_()
    return model


def open_sources(data, split="val", names=("pairs", "photos")):
    return [ShardSource(data / name, split) for name in names]


def by_hand(model, processor, sources):
    """[block][sensor]: one list per crop of (row, top, left, key, [(expert, gate) per valid token and choice])."""
    found = [{}, {}]
    for source in sources:
        for number in range(len(source)):
            row = source.read(number)
            height, width = row["images"]["rgb"].pixels.shape[1:]
            top, lefts = (height - SIZE) // 2, [1, 25] if width == 50 else [0]
            for left in lefts:
                for sensor in source.sensors:
                    image = row["images"][sensor].pixels[:, top : top + SIZE, left : left + SIZE]
                    inputs = processor({sensor: np.array(image)}, unit={sensor: source.units[sensor]}, check=False)
                    valid = inputs["valid_mask"][sensor]
                    with torch.no_grad():
                        out = model(inputs["pixel_values"], valid_mask={sensor: valid}, output_router_logits=True)
                    for block, stride in enumerate(STRIDES):
                        side = math.ceil(SIZE / stride)
                        choices = []
                        for token in range(side * side):
                            y, x = stride * (token // side), stride * (token % side)
                            if valid[0, y : y + stride, x : x + stride].any():
                                odds = torch.exp(out.router_logits[block][token].double())
                                for expert in out.selected_experts[block][token].tolist():
                                    choices.append((expert, (odds[expert] / odds.sum()).item(), token))
                        entry = (source.name, number, top, left, row["key"], row["group_id"], choices)
                        found[block].setdefault(sensor, []).append(entry)
    return found


def bits(shares):
    return -sum(share * math.log2(share) for share in shares if share)


@pytest.mark.parametrize("choices", [1, 2])
def test_shares_gates_entropies_and_top_crops_are_those_of_a_loop(data, choices):
    model = make_model(num_experts_per_tok=choices)
    processor, sources = MsGFMImageProcessor.from_config(model.config), open_sources(data)
    report = analyse_experts(model, processor, sources, top_crops=3, batch_size=4)
    assert json.loads(json.dumps(report)) == report
    assert (report["num_experts"], report["num_experts_per_tok"]) == (3, choices)
    assert report["max_entropy_bits"] == pytest.approx(math.log2(3))
    assert report["n"] == {"dsm": {"crops": 6, "places": 2}, "rgb": {"crops": 8, "places": 3}}
    for block, expected in zip(report["blocks"], by_hand(model, processor, sources), strict=True):
        number = NAMES.index(block["name"])
        assert (block["stage"], block["block"], block["stride"]) == ((0, 0, 4), (2, 1, 16))[number]
        shares = {}
        for sensor, crops in expected.items():
            taken = [choice for *_, found in crops for choice in found]
            row = block["sensors"][sensor]
            assert row["tokens"] == len(taken) / choices
            shares[sensor] = [sum(expert == e for expert, *_ in taken) / len(taken) for e in range(3)]
            assert row["share"] == pytest.approx(shares[sensor])
            assert row["dropped"] == 0
            assert row["entropy_bits"] == pytest.approx(bits(shares[sensor]))
            assert row["mean_gate"] == pytest.approx(np.mean([gate for _, gate, _ in taken]), rel=1e-5)
            for expert in range(3):
                gates = [gate for e, gate, _ in taken if e == expert]
                assert row["gate"][expert] == (pytest.approx(np.mean(gates), rel=1e-5) if gates else None)
        together = [sum(share) / 2 for share in zip(*shares.values(), strict=True)]
        told = bits(together) - sum(map(bits, shares.values())) / 2
        assert block["mutual_information_bits"] == pytest.approx(told, abs=1e-9)
        for expert, top in enumerate(block["experts"]):
            ranked = []
            for sensor, crops in expected.items():
                for source, row, y, x, key, place, found in crops:
                    gates = [gate for e, gate, _ in found if e == expert]
                    if gates:
                        n = len(found) // choices
                        ranked.append((len(gates), np.mean(gates), source, sensor, row, y, x, key, place, n))
            ranked.sort(reverse=True)
            assert len(top) == min(3, len(ranked))
            for crop, (count, gate, source, sensor, row, y, x, key, place, n) in zip(top, ranked[:3], strict=True):
                assert (crop["source"], crop["sensor"], crop["key"], crop["group_id"]) == (source, sensor, key, place)
                assert (crop["row"], crop["top"], crop["left"], crop["tokens"]) == (row, y, x, n)
                assert crop["share"] == pytest.approx(count / n)
                assert crop["gate"] == pytest.approx(gate, rel=1e-5)
    # A hole in the heights: whole tokens of both sizes do not count.
    assert [block["sensors"]["dsm"]["tokens"] for block in report["blocks"]] < [6 * 36, 6 * 4]
    assert report["blocks"][1]["sensors"]["dsm"]["tokens"] < 6 * 4


def test_a_report_does_not_depend_on_the_batch_and_leaves_the_model_as_it_was(data):
    model = make_model().train()
    processor, sources = MsGFMImageProcessor.from_config(model.config), open_sources(data)
    one = analyse_experts(model, processor, sources, batch_size=1)
    assert model.training
    five = analyse_experts(model.eval(), processor, sources, batch_size=5)
    assert not model.training
    for a, b in zip(one["blocks"], five["blocks"], strict=True):
        assert [[(c["key"], c["left"]) for c in top] for top in a["experts"]] == [
            [(c["key"], c["left"]) for c in top] for top in b["experts"]
        ]
        for sensor, row in a["sensors"].items():
            assert row["share"] == b["sensors"][sensor]["share"]
    few = analyse_experts(model, processor, sources, max_crops=2, top_crops=0)
    assert few["n"] == {"dsm": {"crops": 2, "places": 2}, "rgb": {"crops": 4, "places": 3}}
    assert few["blocks"][0]["experts"] == [[], [], []]


def test_experts_that_look_at_the_sensor_tell_it(data, pencil):
    processor = MsGFMImageProcessor.from_config(pencil.config)
    report = analyse_experts(pencil, processor, open_sources(data))
    first, second = report["blocks"]
    assert first["sensors"]["rgb"]["share"] == [1, 0, 0]
    assert first["sensors"]["dsm"]["share"] == [0, 0, 1]
    assert first["sensors"]["rgb"]["gate"] == [pytest.approx(0.75, abs=1e-4), None, None]
    assert first["sensors"]["dsm"]["mean_gate"] == pytest.approx(0.9, abs=1e-4)
    assert first["mutual_information_bits"] == pytest.approx(1)
    assert first["sensors"]["rgb"]["entropy_bits"] == 0
    assert first["experts"][1] == []
    assert second["mutual_information_bits"] == 0
    assert second["sensors"]["rgb"]["mean_gate"] == pytest.approx(1 / 3)


def test_what_finds_no_room_is_said(data):
    model = make_model(eval_capacity_factor=0.5)
    report = analyse_experts(model, MsGFMImageProcessor.from_config(model.config), open_sources(data))
    for block in report["blocks"]:
        for row in block["sensors"].values():
            assert row["dropped"] > 0 and sum(row["share"]) + row["dropped"] == pytest.approx(1)
            assert row["mean_gate"] > 1 / 3
            assert row["entropy_bits"] == pytest.approx(bits([s / sum(row["share"]) for s in row["share"]]))


def test_the_tokens_shown_are_those_the_expert_takes(data, tmp_path):
    model = make_model()
    processor, sources = MsGFMImageProcessor.from_config(model.config), open_sources(data)
    report = analyse_experts(model, processor, sources, top_crops=4)
    hand = by_hand(model, processor, sources)
    for number, stride in enumerate(STRIDES):
        rows = expert_crops(model, processor, sources, report, number)
        assert [len(row) for row in rows] == [len(top) for top in report["blocks"][number]["experts"]]
        side = math.ceil(SIZE / stride)
        for expert, row in enumerate(rows):
            for crop in row:
                found = crop.found
                wanted = np.zeros(side * side, dtype=bool)
                entry = (found["source"], found["row"], found["top"], found["left"])
                (choices,) = [c for *where, c in hand[number][crop.sensor] if tuple(where[:4]) == entry]
                wanted[[token for e, _, token in choices if e == expert]] = True
                np.testing.assert_array_equal(crop.taken, wanted.reshape(side, side))
                assert crop.stride == stride and wanted.sum() == round(found["share"] * found["tokens"])
    picture = draw_expert_crops(processor, report["blocks"][1], rows, tmp_path / "crops.png")
    heatmap = draw_experts(report, tmp_path / "experts.png")
    for path, height in ((picture, 600), (heatmap, 200)):
        with Image.open(path) as drawn:
            drawn.load()
            assert drawn.format == "PNG" and drawn.height > height
            assert len(np.unique(np.asarray(drawn.convert("L")))) > 50
    assert sorted(file.name for file in tmp_path.iterdir()) == ["crops.png", "experts.png"]


def test_an_expert_without_tokens_is_drawn_as_such(data, pencil, tmp_path):
    processor, sources = MsGFMImageProcessor.from_config(pencil.config), open_sources(data)
    report = analyse_experts(pencil, processor, sources, top_crops=1)
    rows = expert_crops(pencil, processor, sources, report, 0)
    assert [len(row) for row in rows] == [1, 0, 1]
    with Image.open(draw_expert_crops(processor, report["blocks"][0], rows, tmp_path / "crops.png")) as drawn:
        drawn.load()


# Pruning


def test_a_dense_model_equals_the_experts_where_one_takes_all(data, pencil, tmp_path):
    processor = MsGFMImageProcessor.from_config(pencil.config)
    dense, chosen = prune_experts(pencil, processor, open_sources(data, "train"), ["rgb"])
    assert [found["name"] for found in chosen] == NAMES
    assert chosen[0] == {"name": NAMES[0], "expert": 0, "gate": pytest.approx(0.75, abs=1e-4), "share": 1}
    assert chosen[1]["gate"] == pytest.approx(1 / 3) and chosen[1]["share"] == 1
    assert dense.config.moe_blocks == [[], [], []]
    assert list(dense.config.sensors) == list(dense.config.inputs) == ["rgb"]
    before = {name: value for name, value in pencil.config.to_dict().items() if name not in ("sensors", "moe_blocks")}
    after = {name: value for name, value in dense.config.to_dict().items() if name not in ("sensors", "moe_blocks")}
    assert after == before

    experts = pencil.msgfm.encoder.layers[0].blocks[0].mlp.experts
    weights = dense.state_dict()
    mlp = "msgfm.encoder.layers.0.blocks.0.mlp"
    torch.testing.assert_close(weights[f"{mlp}.fc1.weight"], experts.up_proj[0])
    torch.testing.assert_close(weights[f"{mlp}.fc1.bias"], experts.up_proj_bias[0])
    torch.testing.assert_close(weights[f"{mlp}.fc2.weight"], 0.75 * experts.down_proj[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(weights[f"{mlp}.fc2.bias"], 0.75 * experts.down_proj_bias[0], rtol=1e-4, atol=0)

    pixels, mask = torch.randn(2, 3, SIZE, SIZE), torch.rand(2, 36) < 0.5
    with torch.no_grad():
        wanted = pencil({"rgb": pixels}, {"rgb": mask}).reconstruction["rgb"]
        torch.testing.assert_close(dense(pixels, mask).reconstruction, wanted, rtol=1e-4, atol=1e-4)
    assert count_parameters(dense).total == sum(
        weight.numel() for weight in weights.values() if weight.is_floating_point()
    )
    assert count_parameters(dense).total < count_parameters(pencil).total
    dense.save_pretrained(tmp_path)
    MsGFMImageProcessor.from_config(dense.config).save_pretrained(tmp_path)
    assert MsGFMImageProcessor.from_pretrained(tmp_path).sensors == {"rgb": processor.sensors["rgb"]}
    with torch.no_grad():
        again = MsGFMForPreTraining.from_pretrained(tmp_path).eval()
        assert torch.equal(again(pixels, mask).reconstruction, dense(pixels, mask).reconstruction)


def test_every_sensor_has_the_same_say_in_the_choice(data, pencil):
    """13 crops of colours and 4 of heights, with holes: by tokens alone colours would decide.

    Both experts take half of the tokens: it is the gate that tells them apart.
    """
    processor = MsGFMImageProcessor.from_config(pencil.config)
    dense, chosen = prune_experts(pencil, processor, open_sources(data, "train"), ["rgb", "dsm"])
    assert chosen[0] == {"name": NAMES[0], "expert": 2, "gate": pytest.approx(0.9, abs=1e-4), "share": 0.5}
    assert list(dense.config.sensors) == ["dsm", "rgb"]


def test_without_its_expected_input_a_dense_model_expects_what_it_has(data, pencil):
    processor = MsGFMImageProcessor.from_config(pencil.config)
    dense, _ = prune_experts(pencil, processor, open_sources(data, "train"), ["dsm"], max_crops=2)
    assert dense.config.inputs == {"dsm": ["height"]}
    assert set(dense.decoders) == set(dense.msgfm.embeddings.patch_embeddings) == {"dsm"}


def test_the_choice_is_the_largest_gate_summed_over_tokens(data):
    model = make_model(num_experts_per_tok=2)
    processor, training = MsGFMImageProcessor.from_config(model.config), open_sources(data, "train", ["pairs"])
    _, chosen = prune_experts(model, processor, training, ["dsm"])
    for found, hand in zip(chosen, by_hand(model, processor, training), strict=True):
        taken = [choice for *_, choices in hand["dsm"] for choice in choices]
        gates = [[gate for e, gate, _ in taken if e == expert] for expert in range(3)]
        assert found["expert"] == int(np.argmax([sum(each) for each in gates]))
        assert found["gate"] == pytest.approx(np.mean(gates[found["expert"]]), rel=1e-5)
        assert found["share"] == pytest.approx(len(gates[found["expert"]]) / len(taken))


def test_the_cost_is_the_masked_error_of_either_model(data):
    model = make_model()
    processor, held_out = MsGFMImageProcessor.from_config(model.config), open_sources(data)
    dense, _ = prune_experts(model, processor, open_sources(data, "train"), ["dsm", "rgb"])
    rows = pruning_cost(model, dense, processor, held_out, mask_seeds=2)
    ways = [("dsm", "dsm"), ("rgb", "rgb"), ("dsm", "rgb"), ("rgb", "dsm")]
    assert [(row["source"], row["input"], row["target"]) for row in rows] == [
        *[("pairs", *way) for way in ways],
        ("photos", "rgb", "rgb"),
    ]
    known = {name: training_statistics(ShardSource(data / name), processor, SIZE) for name in ("pairs", "photos")}
    silent = MsGFMForPreTraining(dense.config)
    silent.load_state_dict(
        {
            name: value * (0 if any(f"{found}.mlp.fc2" in name for found in NAMES) else 1)
            for name, value in dense.state_dict().items()
        }
    )
    for name, network in (("moe", model), ("dense", dense), ("without", silent)):
        passes = [evaluate_reconstruction(network, processor, held_out, known, seed=seed) for seed in (0, 1)]
        for row, first, second in zip(rows, *passes, strict=True):
            assert row[name] == pytest.approx((first["l1"] + second["l1"]) / 2, rel=1e-5)
            assert row["band_mean"] == pytest.approx((first["band_mean"] + second["band_mean"]) / 2, rel=1e-5)
            assert (row["crops"], row["places"]) == (first["crops"], first["places"])
    assert all(row["ratio"] == pytest.approx(row["dense"] / row["moe"]) for row in rows)
    assert len({row["moe"] for row in rows} | {row["dense"] for row in rows}) == 10


def test_the_cost_is_of_the_sensors_that_are_left(data, pencil):
    processor = MsGFMImageProcessor.from_config(pencil.config)
    dense, _ = prune_experts(pencil, processor, open_sources(data, "train"), ["rgb"])
    rows = pruning_cost(pencil, dense, processor, open_sources(data), mask_seeds=1, max_crops=2)
    assert [(row["source"], row["input"], row["target"], row["crops"]) for row in rows] == [
        ("pairs", "rgb", "rgb", 2),
        ("photos", "rgb", "rgb", 2),
    ]
    assert all(row["ratio"] == pytest.approx(1, abs=1e-4) for row in rows)
    assert all(abs(row["without"] / row["moe"] - 1) > 1e-3 for row in rows)


# Refusals


def test_a_dense_model_has_no_experts_to_report(data):
    model = MsGFMForPreTraining(make_config(moe_blocks=[[], [], []]))
    processor, sources = MsGFMImageProcessor.from_config(model.config), open_sources(data)
    for call in (analyse_experts, lambda *args: prune_experts(*args, ["rgb"])):
        with pytest.raises(ValueError, match=r"`model` must have experts, got `moe_blocks` \[\[\], \[\], \[\]\]"):
            call(model, processor, sources)


def test_sensors_that_the_model_or_the_data_lack_are_refused(data):
    model = make_model()
    processor, sources = MsGFMImageProcessor.from_config(model.config), open_sources(data, "train")
    for sensors in (["s2"], [], "rgb"):
        with pytest.raises(
            ValueError, match=r"`sensors` to keep must be a list of some of the model \(dsm, rgb, s1\), got"
        ):
            prune_experts(model, processor, sources, sensors)
    with pytest.raises(
        ValueError, match="`sensors` must be in the sources that choose .*, got s1 beside pairs, photos"
    ):
        prune_experts(model, processor, sources, ["rgb", "s1"])
    few = make_model(sensors={"rgb": MsGFMConfig().sensors["rgb"]})
    with pytest.raises(ValueError, match=r"`sources` must be of the sensors of the model \(rgb\), got dsm, rgb in"):
        analyse_experts(few, processor, sources)


# The report of a saved model


def test_a_sensor_without_a_valid_pixel_chooses_no_expert(tmp_path):
    nowhere = np.full((1, SIZE, SIZE), np.nan, np.float32)
    with ShardWriter(tmp_path, "holes", ["dsm"]) as writer:
        image = ShardImage(nowhere, ["height"], "metres", gsd=0.5)
        writer.write(ShardRow("a", "holes", "train", "place", {"dsm": image}))
    model = make_model()
    sources = [ShardSource(tmp_path / "holes", "train")]
    with pytest.raises(ValueError, match="`sources` must have valid pixels of every sensor to keep, got none of dsm"):
        prune_experts(model, MsGFMImageProcessor.from_config(model.config), sources, ["dsm"])


@pytest.fixture
def saved(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    MsGFMImageProcessor.from_config(model.config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_report_is_written_whole_with_what_made_it(data, saved, tmp_path):
    report = report_experts(saved, [data], tmp_path / "out", max_crops=2, prune=["rgb"], command="msgfm report")
    assert json.loads((tmp_path / "out" / "experts.json").read_text()) == report
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "crops.png",
        "dense",
        "experts.json",
        "experts.png",
    ]
    assert report["command"] == "msgfm report" and report["model"] == str(saved) and report["split"] == "val"
    assert report["data"] == [str(data / "pairs"), str(data / "photos")]
    dense = MsGFMForPreTraining.from_pretrained(tmp_path / "out" / "dense")
    assert report["dense"]["parameters"] == count_parameters(dense).total
    assert report["dense"]["parameters_moe"] == count_parameters(make_model()).total
    assert [row["crops"] for row in report["dense"]["cost"]] == [2, 2]
    assert sorted(file.name for file in (tmp_path / "out" / "dense").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


def test_data_are_those_of_the_run_unless_given(data, saved):
    record = {"recipe": {"data": [str(data)]}, "identity": {"sources": {"photos": {}}}}
    (saved / "run.json").write_text(json.dumps(record))
    checkpoint = saved / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (checkpoint / file).write_bytes((saved / file).read_bytes())
    for folder in (saved, checkpoint):
        report = report_experts(folder, max_crops=1)
        assert report["n"] == {"rgb": {"crops": 1, "places": 1}}
        assert (folder / "experts" / "experts.json").is_file()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"run": "nothing"}, "`run` must be the folder of a saved model and its image processor, got .*nothing"),
        ({"data": None}, "`data` must be given for a model that is not of a run, got none and no run.json"),
        ({"split": "night"}, "`data` must hold a source with the split 'night', got .*pairs, .*photos"),
        ({"data": "twice"}, "`data` must hold each source once, got pairs, pairs, photos"),
        ({"max_crops": 0}, "`max_crops` must be at least 1, got 0"),
        ({"prune": ["moon"]}, "`sensors` to keep must be a list of some of the model .* got 'moon'"),
        ({"prune": ["rgb"], "split": "train"}, "`split` must be held out to tell what pruning costs, got 'train'"),
    ],
)
def test_a_report_that_cannot_be_made_is_refused(data, saved, tmp_path, given, message):
    run = tmp_path / given.pop("run") if "run" in given else saved
    given = {"data": [data], **given}
    given["data"] = [data, data / "pairs"] if given["data"] == "twice" else given["data"]
    with pytest.raises(ValueError, match=message):
        report_experts(run, out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_report_is_not_begun_where_it_cannot_be_ended(data, saved, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="`out` must be a folder, got the file .*file"):
        report_experts(saved, [data], tmp_path / "file")
    with pytest.raises(CheckpointError, match="Not a directory"):
        report_experts(saved, [data], tmp_path / "file" / "below", max_crops=1)
    assert (tmp_path / "file").read_text() == "mine"
    (saved / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="`run` must be the folder of a saved model and its image processor, got .* w"):
        report_experts(saved, [data], tmp_path / "out")


def test_a_model_without_decoders_has_experts_but_is_not_pruned(data, saved, tmp_path):
    MsGFMForImageClassification.from_pretrained(saved, num_labels=3).save_pretrained(saved)
    report_experts(saved, [data], tmp_path / "out", max_crops=1)
    with pytest.raises(ValueError, match="`run` must have decoders to be pruned, got MsGFMForImageClassification. Pr"):
        report_experts(saved, [data], tmp_path / "out", max_crops=1, prune=["rgb"])


def test_a_failure_leaves_the_model_and_the_random_numbers_alone(data, monkeypatch):
    model = make_model().train()
    sources = [ShardSource(data / "photos", "val")]
    processor = MsGFMImageProcessor.from_config(model.config)
    state = torch.random.get_rng_state()
    prune_experts(model, processor, sources, ["rgb"], max_crops=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for given, message in (({"sources": []}, "`sources` must hold at least one source, got none"), ({}, "stop here")):
        monkeypatch.setattr(MsGFMForPreTraining, "forward", lambda *args, **kwargs: pytest.fail("stop here"))
        with pytest.raises((ValueError, pytest.fail.Exception), match=message):
            analyse_experts(model, processor, **{"sources": sources, **given})
        assert model.training


def test_the_text_of_a_report():
    row = {"tokens": 40, "share": [0.75, 0.25], "dropped": 0, "gate": [0.8, 0.6], "mean_gate": 0.75}
    report = {
        "num_experts": 2,
        "max_entropy_bits": 1.0,
        "n": {"dsm": {"crops": 10, "places": 3}, "rgb": {"crops": 12, "places": 4}},
        "blocks": [
            {
                "name": "layers.2.blocks.1",
                "stride": 16,
                "mutual_information_bits": 0.5,
                "sensors": {
                    "dsm": {**row, "entropy_bits": 0.81},
                    "rgb": {**row, "tokens": 0, "mean_gate": None, "entropy_bits": 0.0},
                },
            }
        ],
    }
    lines = format_experts(report).splitlines()
    assert lines[0] == ("layers.2.blocks.1 (tokens of 16 px): the sensor tells 0.50 of at most 1.00 bits of the expert")
    assert lines[1].split() == ["sensor", "crops", "places", "tokens", "e0", "e1", "entropy", "gate"]
    assert lines[2].split() == ["dsm", "10", "3", "40", "75%", "25%", "0.81", "0.75"]
    assert lines[3].split() == ["rgb", "12", "4", "0", "75%", "25%", "0.00", "-"]
    assert len({len(line) for line in lines[1:4]}) == 1
    report["dense"] = {
        "sensors": ["rgb"],
        "parameters": 1_000,
        "parameters_moe": 3_000,
        "chosen": [{"name": "layers.2.blocks.1", "expert": 1, "gate": 0.6, "share": 0.25}],
        "cost": [
            {"source": "photos", "input": "rgb", "target": "rgb", "crops": 2, "places": 2}
            | {"moe": 0.5, "dense": 0.55, "without": 0.6, "ratio": 1.1, "band_mean": 0.8}
        ],
    }
    said = format_experts(report)
    assert "the experts do little" not in said
    report["dense"]["cost"][0]["without"] = 0.495
    assert "Leaving these MLPs out changes no error by 2 %: the experts do little here" in format_experts(report)
    report["dense"]["cost"][0]["without"] = 0.6
    assert "Dense model for rgb: 1,000 parameters, from 3,000." in said
    assert "  layers.2.blocks.1 <- expert 1 x 0.60 (took 25% of the choices)" in said
    assert said.endswith("| photos | rgb → rgb | 2 | 2 | 0.500 | 0.550 | 1.10 | 0.600 | 0.800 |")
    assert "Demonstration" not in said
    report["n"]["rgb"]["places"] = 2
    assert format_experts(report).startswith("Demonstration, not evidence: fewer than three places")
