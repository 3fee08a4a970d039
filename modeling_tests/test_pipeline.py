"""Our own pipelines: any sensor, arrays and files, batches; what comes out is compared with the processor and the model
called by hand, and with the stock pipelines on an ordinary picture.
"""

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY

import tiny_models
from msgfm_hf import (
    MsGFMForImageClassification,
    MsGFMForPreTraining,
    MsGFMForSemanticSegmentation,
    MsGFMImageProcessor,
    MsGFMModel,
)

FEATURES = "multisensor-image-feature-extraction"
CLASSES = "multisensor-image-classification"
MASKS = "multisensor-image-segmentation"
IMAGES = "multisensor-image-to-image"
MODELS = {FEATURES: MsGFMModel, CLASSES: MsGFMForImageClassification, MASKS: MsGFMForSemanticSegmentation}
S1 = {"inputs": {"s1": ["VV", "VH"]}}
BOTH = {"inputs": {"s1": ["VV", "VH"], "dsm": ["height"]}}
S2 = {"inputs": {"s2": ["B02", "B03", "B04", "B08"]}}
NAMES = {0: "water", 1: "forest", 2: "field", 3: "town"}


def make(task, fields=S1, **arguments):
    torch.manual_seed(0)
    labels = {} if task == FEATURES else {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
    model = tiny_models.tiny(MODELS[task], 0.1, **fields, **labels)
    if task == MASKS:
        torch.nn.init.zeros_(model.classifier.bias)  # so that several classes occur
    return pipeline(task, model=model, image_processor=MsGFMImageProcessor.from_config(model.config), **arguments)


def backscatter(seed=0, height=21, width=18):
    return np.random.default_rng(seed).normal(-12, 3, (2, height, width)).astype("float32")


def heights(seed=0, height=21, width=18):
    return np.random.default_rng(seed).normal(300, 20, (height, width)).astype("float32")


def write(path, pixels, descriptions=None):
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    profile = dict(zip(("count", "height", "width"), pixels.shape, strict=True), driver="GTiff", dtype=pixels.dtype)
    transform = rasterio.transform.from_origin(500000, 6200000, 10, 10)
    with rasterio.open(path, "w", **profile, crs="EPSG:32632", transform=transform) as file:
        file.write(pixels)
        file.descriptions = descriptions or (None,) * len(pixels)
    return path


def plain(results):
    """Results of any task as nested numbers and names, to be compared."""
    if isinstance(results, dict):
        return {name: plain(value) for name, value in results.items()}
    if isinstance(results, list):
        return [plain(value) for value in results]
    if isinstance(results, Image.Image):
        return np.asarray(results).tolist()
    return results.tolist() if isinstance(results, torch.Tensor) else results


def same(left, right):
    """Equal structure and names; numbers to rounding, as the size of a batch changes the order of sums."""
    left, right = plain(left), plain(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            same(left[name], right[name])
    elif isinstance(left, list) and left and not isinstance(left[0], float):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            same(one, other)
    else:
        assert left == (pytest.approx(right, rel=1e-4, abs=1e-5) if isinstance(left, (float, list)) else right)


def forwards(pipe, monkeypatch):
    """The sizes of the batches that reach the model."""
    sizes, forward = [], pipe.model.forward

    def counted(pixel_values, **arguments):
        sizes.append(len(next(iter(pixel_values.values()))))
        return forward(pixel_values, **arguments)

    monkeypatch.setattr(pipe.model, "forward", counted)
    return sizes


# --------------------------------------------------------------------------------------------------- what comes out


def by_hand(pipe, images, bands=None, **options):
    inputs = pipe.image_processor(images, bands=bands, **options)
    with torch.no_grad():
        return inputs, pipe.model(**inputs, bands=bands)


def test_features_are_those_of_the_model():
    pipe, place = make(FEATURES), {"s1": backscatter(), "dsm": heights()}
    _, outputs = by_hand(pipe, place)
    found = pipe(place)
    assert isinstance(found, list) and torch.equal(torch.tensor(found), outputs.last_hidden_state)
    assert torch.equal(pipe(place, return_tensors=True), outputs.last_hidden_state)
    pooled = pipe([place, place], pool=True, return_tensors=True)
    assert len(pooled) == 2 and torch.equal(pooled[0], outputs.pooler_output) and torch.equal(*pooled)
    assert pipe(place, pool=True) == outputs.pooler_output.tolist()


def test_classes_are_sorted_scores_with_names():
    pipe, place = make(CLASSES, BOTH), {"s1": backscatter(), "dsm": heights()}
    expected = by_hand(pipe, place)[1].logits.softmax(-1)[0]
    found = pipe(place)
    assert [entry["score"] for entry in found] == pytest.approx(expected.sort(descending=True).values.tolist())
    assert [entry["label"] for entry in found] == [NAMES[i] for i in expected.argsort(descending=True).tolist()]
    assert pipe(place, top_k=2) == found[:2] and pipe([place], top_k=1) == [found[:1]]


@pytest.mark.parametrize(
    "problem, function, expected",
    [
        ("multi_label_classification", None, torch.sigmoid),
        ("single_label_classification", None, lambda logits: logits.softmax(-1)),
        ("regression", None, lambda logits: logits),
        ("multi_label_classification", "none", lambda logits: logits),
        (None, "sigmoid", torch.sigmoid),
    ],
)
def test_scores_are_what_the_problem_type_says(problem, function, expected):
    pipe, place = make(CLASSES, {**S1, "problem_type": problem}), backscatter()
    scores = expected(by_hand(pipe, place)[1].logits)[0]
    found = {entry["label"]: entry["score"] for entry in pipe(place, function_to_apply=function)}
    assert found == pytest.approx({NAMES[i]: score.item() for i, score in enumerate(scores)}, rel=1e-5)


def test_masks_share_out_the_pixels_that_are_valid_in_some_sensor():
    pipe, radar, ground = make(MASKS, BOTH), backscatter(), heights()
    radar[0, :6], ground[:, :5] = np.nan, np.nan  # the corner has neither
    place = {"s1": radar, "dsm": ground}
    inputs, outputs = by_hand(pipe, place)
    classes = outputs.logits.argmax(1)[0].numpy()
    valid = (inputs["valid_mask"]["s1"] | inputs["valid_mask"]["dsm"])[0].numpy()
    assert valid.sum() == 21 * 18 - 6 * 5
    found = pipe(place)
    assert [entry["label"] for entry in found] == [NAMES[i] for i in np.unique(classes[valid]).tolist()]
    assert len(found) > 1
    for entry in found:
        mask = entry["mask"]
        assert (mask.mode, mask.size, entry["score"]) == ("L", (18, 21), None)
        label = {name: i for i, name in NAMES.items()}[entry["label"]]
        assert np.array_equal(np.asarray(mask), np.where(valid & (classes == label), 255, 0))
    assert pipe({"s1": np.full_like(radar, np.nan)}) == []


@pytest.mark.parametrize("task", MODELS)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_picture_gives_what_the_stock_pipelines_give(task, batch_size):
    pipe = make(task, {})
    stock = pipeline(task.removeprefix("multisensor-"), model=pipe.model, image_processor=pipe.image_processor)
    arrays = [np.random.default_rng(seed).integers(0, 255, (20, 26, 3), dtype=np.uint8) for seed in range(3)]
    pictures = [Image.fromarray(array) for array in arrays]
    expected = stock(pictures)
    same(pipe(arrays, batch_size=batch_size), expected)
    same(pipe(pictures, batch_size=batch_size), expected)
    same(pipe(pictures[0]), expected[0])


# --------------------------------------------------------------------------------------------------------- what goes in


@pytest.mark.parametrize("task", MODELS)
def test_arrays_tensors_and_files_are_one_image(task, tmp_path):
    pipe, radar, ground = make(task, BOTH), backscatter(), heights()
    path, other = write(tmp_path / "s1.tif", radar, ("VV", "VH")), write(tmp_path / "dsm.tif", ground)
    single, both = pipe(radar, sensor="s1"), pipe({"s1": radar, "dsm": ground})
    assert plain(single) != plain(both)
    for image in (torch.from_numpy(radar), radar.transpose(1, 2, 0), path, str(path)):
        same(pipe(image, sensor="s1"), single)
    same(pipe({"s1": str(path)}), single)
    # Files name their bands, in whichever order.
    same(pipe(write(tmp_path / "reversed.tif", radar[::-1], ("VH", "VV")), sensor="s1"), single)
    same(pipe({"s1": path, "dsm": other}), both)
    same(pipe({"dsm": ground, "s1": path}), both)


@pytest.mark.parametrize("task", MODELS)
def test_lists_generators_and_datasets_hold_places(task, tmp_path):
    class Scenes(Dataset):
        def __len__(self):
            return len(places)

        def __getitem__(self, index):
            return places[index]

    pipe = make(task)
    places = [write(tmp_path / f"{seed}.tif", backscatter(seed), ("VV", "VH")) for seed in range(3)]
    one_by_one = [pipe(place) for place in places]
    assert plain(one_by_one[0]) != plain(one_by_one[1])
    for held in (places, (place for place in places), Scenes()):
        same(list(pipe(held, batch_size=2)), one_by_one)


@pytest.mark.parametrize("task", MODELS)
def test_results_do_not_depend_on_the_batch(task, monkeypatch):
    pipe = make(task, BOTH)
    radars = [{"s1": backscatter(seed, height)} for seed, height in enumerate((21, 14, 21, 14, 21))]
    places = [
        radars[0],
        radars[1],
        {**radars[2], "dsm": heights(2)},
        radars[3],
        {"dsm": heights(4), **radars[4]},
    ]
    one_by_one = [pipe(place) for place in places]
    sizes = forwards(pipe, monkeypatch)
    for batch_size, expected in ((1, [1] * 5), (2, [1, 1, 1, 1, 1]), (4, [1, 2, 1, 1]), (5, [1, 2, 2]), (8, [1, 2, 2])):
        sizes.clear()
        same(pipe(places, batch_size=batch_size), one_by_one)
        assert sizes == expected
    sizes.clear()
    same(pipe([radars[0], radars[2], radars[4]], batch_size=3), [one_by_one[0], pipe(radars[2]), pipe(radars[4])])
    assert sizes == [3, 1, 1]


@pytest.mark.parametrize("task", MODELS)
def test_no_places_give_no_results(task):
    assert make(task)([]) == []


def test_what_the_model_expects_counts_whatever_processor_was_saved_with_it():
    model = tiny_models.tiny(MsGFMForImageClassification, **S2)
    processor = MsGFMImageProcessor()
    pipe, places = pipeline(CLASSES, model=model, image_processor=processor), np.random.default_rng(0).random((4, 9, 9))
    expected = pipeline(CLASSES, model=model, image_processor=MsGFMImageProcessor.from_config(model.config))
    assert pipe(places, unit="reflectance") == expected(places, unit="reflectance")
    assert processor.inputs == MsGFMImageProcessor().inputs


def test_bands_named_in_another_order_and_fewer_bands_reach_the_model():
    pipe = make(FEATURES, S2)
    image = np.random.default_rng(0).uniform(0, 0.4, (4, 16, 16)).astype("float32")
    expected = by_hand(pipe, image, unit="reflectance")[1].last_hidden_state
    found = pipe([image[::-1]], bands=["B08", "B04", "B03", "B02"], unit="reflectance", return_tensors=True)
    torch.testing.assert_close(found[0], expected)
    # A choice of bands keeps its order, and the model is told.
    two = {"s2": ["nir", "red"]}
    found = pipe([{"s2": image[[3, 2]]}] * 2, bands=two, unit="reflectance", return_tensors=True, batch_size=2)
    inputs = pipe.image_processor({"s2": image[[3, 2]]}, bands=two, unit="reflectance")
    with torch.no_grad():
        expected = pipe.model(**inputs, bands={"s2": ["B08", "B04"]}).last_hidden_state
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], expected)


@pytest.mark.parametrize("held", [False, True], ids=["in a call", "at construction"])
def test_options_of_the_processor_are_passed_on(held):
    stored = np.random.default_rng(0).integers(1000, 5000, (4, 16, 16)).astype("uint16")
    stored[:, 3, 3] = 0
    layout = np.moveaxis(stored, 0, -1)
    options = {"unit": "dn", "scale": 2e-4, "offset": -500, "level": "l1c", "nodata": 0}
    options |= {"input_data_format": "channels_last", "check": False}
    pipe = make(FEATURES, S2, **(options if held else {}))
    expected = by_hand(pipe, stored.astype("int32"), **{**options, "input_data_format": None})[1].last_hidden_state
    found = pipe(layout, return_tensors=True, **({} if held else options))
    torch.testing.assert_close(found, expected)
    for name, other in {"scale": 1e-4, "offset": 0, "level": "l2a", "nodata": 1}.items():
        changed = pipe(layout, return_tensors=True, **{**options, name: other})
        assert (changed - expected).abs().max() > 1e-3, name
    # Any sensor the checkpoint knows, by its name.
    found = pipe(heights(), return_tensors=True, sensor="dsm", reference=250.0, **dict.fromkeys(options))
    torch.testing.assert_close(found, by_hand(pipe, {"dsm": heights()}, reference=250.0)[1].last_hidden_state)


def test_options_for_a_sensor_that_a_place_lacks_are_left_out_there():
    pipe, radar = make(FEATURES, return_tensors=True), 10 ** (backscatter() / 10)
    options = {"unit": {"s1": "power", "dsm": "metres"}, "reference": {"dsm": 280.0}, "bands": {"s1": ["VV", "VH"]}}
    found = pipe([radar, {"dsm": heights()}, {"s1": radar}], batch_size=2, **options)
    torch.testing.assert_close(found[0], by_hand(pipe, radar, unit="power")[1].last_hidden_state)
    torch.testing.assert_close(found[2], found[0])
    only = by_hand(pipe, {"dsm": heights()}, reference={"dsm": 280.0})[1].last_hidden_state
    torch.testing.assert_close(found[1], only)


def test_real_scenes_of_two_sensors_in_a_batch(sample_data):
    folder, names = sample_data / "s1s2_terramesh", ("637U_59R_1_3", "38D_378R_2_3")
    places = [{"s2": folder / name / "S2L1C.tif", "s1": folder / name / "S1RTC.tif"} for name in names]
    pipe = make(CLASSES, {"inputs": {**S1["inputs"], **S2["inputs"]}})
    options = {"bands": {"s2": ["B04", "B03", "B02", "B08"]}, "offset": {"s2": 0}}
    found = pipe(places, batch_size=2, **options)
    same(found, [pipe(place, **options) for place in places])
    # Named in another order, the bands come out in the model's.
    logits = by_hand(pipe, places[1], bands=S2["inputs"], offset={"s2": 0})[1].logits
    expected = logits.softmax(-1).max().item()
    assert found[1][0]["score"] == pytest.approx(expected, rel=1e-4)


# ----------------------------------------------------------------------------------------------------- how it is loaded


@pytest.mark.parametrize("task", MODELS)
def test_a_saved_checkpoint_is_a_pipeline_by_its_tasks_name(task, tmp_path):
    pipe, place = make(task, BOTH), {"s1": backscatter(), "dsm": heights()}
    pipe.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    loaded = pipeline(task, model=str(tmp_path))
    assert type(loaded.model) is MODELS[task] and type(loaded) is type(pipe)
    assert plain(loaded(place)) == plain(pipe(place))


def test_tasks_are_registered_under_their_names():
    autos = {FEATURES: AutoModel, CLASSES: AutoModelForImageClassification, MASKS: AutoModelForSemanticSegmentation}
    for task, auto in autos.items():
        entry = PIPELINE_REGISTRY.check_task(task)[1]
        assert entry["pt"] == (auto,) and entry["type"] == "image"


@pytest.mark.parametrize("task", MODELS)
def test_half_precision(task):
    pipe, place = make(task, BOTH), {"s1": backscatter(), "dsm": heights()}
    exact = pipe(place)
    pipe.model.to(torch.bfloat16)
    for found in (pipe(place), pipe([place, place], batch_size=2)[1]):
        if task == CLASSES:
            exact_scores = {entry["label"]: entry["score"] for entry in exact}
            assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(exact_scores, abs=0.05)
        elif task == FEATURES:
            assert np.abs(np.array(found) - exact).mean() < 0.1
        else:
            assert sum(np.asarray(entry["mask"], bool).sum() for entry in found) == 21 * 18


def test_a_model_that_was_training_predicts():
    pipe = make(CLASSES, {**S1, "hidden_dropout_prob": 0.5, "drop_path_rate": 0.5})
    expected = pipe(backscatter())
    pipe.model.train()
    assert pipe(backscatter()) == expected


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("task", MODELS)
@pytest.mark.parametrize(
    "images, options, message",
    [
        (np.zeros((3, 2, 8, 8), "float32"), {}, r"`images` of a place must be one per sensor, got {'s1': 3}. Give a"),
        ({"s1": [backscatter()] * 2}, {}, r"`images` of a place must be one per sensor, got {'s1': 2}"),
        (np.zeros((3, 8, 8), "float32"), {}, r"`images` for sensor 's1' must have 2 bands \(VV, VH\)"),
        ({"s3": backscatter()}, {}, "'s3'"),
        ({}, {}, "`images` must name at least one sensor"),
        ({"s1": backscatter(), "dsm": heights(height=9)}, {}, "`images` of several sensors must share one pixel grid"),
        (backscatter(), {"units": "db"}, "Pipeline` has the arguments sensor, bands, unit, .* got units. Correct"),
        (backscatter(), {"unit": "metres"}, "`unit` of sensor 's1' must be one of"),
        ({"s1": backscatter()}, {"unit": {"S1": "db"}}, r"`unit` must be for the sensors given \(s1\), got S1"),
        (backscatter(), {"unit": {"S1": "db"}}, r"`unit` must be for the sensors given \(s1\), got S1"),
        ({"s1": backscatter()}, {"sensor": "s1"}, "`sensor` must not be given with {sensor: image}"),
        (backscatter() + 40, {}, "`pixels` for sensor 's1' must have a median of at most 0"),
        ("scene.tif", {}, "`path` must be an existing file, got 'scene.tif'"),
        ("https://example.org/scene.tif", {}, "`path` must be an existing file"),
    ],
)
@pytest.mark.parametrize("listed", [False, True], ids=["alone", "in a batch"])
def test_input_that_is_not_as_described_is_refused(task, images, options, message, listed):
    pipe = make(task)
    error = FileNotFoundError if isinstance(images, str) else ValueError
    with pytest.raises(error, match=message):
        pipe([images, images] if listed else images, batch_size=2, **options)


def test_a_model_without_the_tasks_output_is_refused():
    model = tiny_models.tiny(MsGFMModel, **S1)
    pipe = pipeline(CLASSES, model=model, image_processor=MsGFMImageProcessor.from_config(model.config))
    with pytest.raises(
        ValueError, match="`model` must give logits for .*classification.*, got MsGFMModel without logits"
    ):
        pipe(backscatter())


def test_unknown_arguments_are_refused_at_construction():
    with pytest.raises(ValueError, match="`MultisensorImageSegmentationPipeline` has the arguments .* got top_k"):
        make(MASKS, top_k=3)


def test_bands_that_come_out_are_told():
    processor = MsGFMImageProcessor(**S2)
    image = np.zeros((4, 8, 8))
    assert processor.output_bands(image) == S2["inputs"]
    assert processor.output_bands(image, bands=["nir", "red", "green", "blue"]) == S2["inputs"]
    assert processor.output_bands(image, bands=["nir", "red"]) == {"s2": ["B08", "B04"]}
    assert processor.output_bands(image, sensor="s1") == {"s1": ["VV", "VH"]}
    both = processor.output_bands({"s1": None, "s2": None}, bands={"s1": ["VH"]})
    assert both == {"s1": ["VH"], **S2["inputs"]}
    with pytest.raises(ValueError, match="`bands` must be for the sensors given"):
        processor.output_bands({"s1": None}, bands={"s2": ["B02"]})


# --------------------------------------------------------------------------------------------------- sensor to sensor


def translator(**fields):
    torch.manual_seed(0)
    model = tiny_models.tiny(MsGFMForPreTraining, 0.1, **fields)
    return pipeline(IMAGES, model=model, image_processor=MsGFMImageProcessor.from_config(model.config))


def test_a_translation_is_the_decoder_of_the_target_on_the_features_of_the_input():
    pipe, image = translator(**S1), backscatter()
    (found,) = pipe({"s1": image}, target="s2", target_bands=["B04", "blue"])
    assert (found["sensor"], found["target"], found["unit"]) == ("s1", "s2", "reflectance")
    assert found["bands"] == ["B04", "B02"] and found["image"].shape == (2, 21, 18)
    inputs = pipe.image_processor({"s1": image})
    optical = torch.zeros(1, 2, 21, 18)
    with torch.no_grad():
        expected = pipe.model(
            {**inputs["pixel_values"], "s2": optical}, bands={"s2": ["B04", "B02"]}, targets={"s1": "s2"}
        ).reconstruction["s1"]
    expected = pipe.image_processor.post_process_image_to_image(expected, sensor="s2", bands=["B04", "B02"])[0]
    np.testing.assert_allclose(found["image"], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_translations_of_a_batch_are_those_of_its_places(batch_size, tmp_path):
    pipe = translator(inputs={"s1": ["VV", "VH"], "dsm": ["height"]})
    invalid = backscatter(2)
    invalid[:, :5] = np.nan
    path = write(tmp_path / "s1.tif", backscatter(3), ["VV", "VH"])
    places = [{"s1": backscatter()}, {"s1": backscatter(1), "dsm": heights()}, {"s1": invalid}, {"s1": str(path)}]
    options = {"target": "rgb", "target_unit": "dn"}
    found = pipe(places, batch_size=batch_size, **options)
    assert [[image["sensor"] for image in place] for place in found] == [["s1"], ["s1", "dsm"], ["s1"], ["s1"]]
    for place, images in zip(places, found, strict=True):
        for one, other in zip(images, pipe(place, **options), strict=True):
            np.testing.assert_allclose(one["image"], other["image"], rtol=1e-4, atol=1e-3)
    assert np.isnan(found[2][0]["image"][:, :5]).all() and np.isfinite(found[2][0]["image"][:, 5:]).all()


def test_the_target_itself_is_passed_over_and_heights_are_relative():
    pipe = translator(**S1)
    assert [image["sensor"] for image in pipe({"s1": backscatter(), "dsm": heights()}, target="dsm")] == ["s1"]
    image = pipe({"s1": backscatter()}, target="dsm")[0]
    assert image["unit"] == "metres" and abs(image["image"]).mean() < 100


def test_numbers_of_a_product_need_its_offset():
    pipe = translator(**S1)
    reflectance = pipe({"s1": backscatter()}, target="s2", target_bands=["B04"], target_level="l2a")[0]["image"]
    options = {"target": "s2", "target_bands": ["B04"], "target_level": "l2a", "target_unit": "dn"}
    numbers = pipe({"s1": backscatter()}, **options, target_offset=-1000)[0]
    assert numbers["unit"] == "dn"
    np.testing.assert_allclose(numbers["image"], reflectance * 1e4 + 1000, rtol=1e-4)
    with pytest.raises(ValueError, match="`target_offset` must be given for digital numbers of 's2'"):
        pipe({"s1": backscatter()}, **options)


def test_decoders_that_nobody_trained_are_refused(tmp_path):
    make(CLASSES).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`model` must have trained decoders .*, got a MsGFMForImageClassification"):
        pipeline(IMAGES, model=str(tmp_path))({"s1": backscatter()}, target="s2")


def test_what_cannot_be_translated_is_refused():
    pipe = translator(**S1)
    with pytest.raises(ValueError, match="`target` must name the sensor to predict .*, got None"):
        pipe({"s1": backscatter()})
    with pytest.raises(ValueError, match="`sensor` must be one of dsm, rgb, s1, s2, got 'skysat'"):
        pipe({"s1": backscatter()}, target="skysat")
    with pytest.raises(ValueError, match="`images` must hold another sensor than the `target`, got s1"):
        pipe({"s1": backscatter()}, target="s1")
    model = tiny_models.tiny(MsGFMModel, **S1)
    with pytest.raises(
        ValueError, match="`model` must have trained decoders for 'multisensor-image-to-image', got a MsGFMModel"
    ):
        pipeline(IMAGES, model=model, image_processor=pipe.image_processor)({"s1": backscatter()}, target="s2")


# --------------------------------------------------------------------------------- stock pipelines and other sensors


@pytest.mark.parametrize("task", [CLASSES, MASKS, FEATURES])
@pytest.mark.parametrize("fields", [S1, BOTH, S2, {"inputs": {"dsm": ["height"]}}], ids=["s1", "both", "s2", "dsm"])
def test_a_stock_pipeline_refuses_a_picture_for_another_sensor_and_names_ours(task, fields):
    """A hosted widget sends pictures."""
    pipe = make(task, fields)
    stock = pipeline(task.removeprefix("multisensor-"), model=pipe.model, image_processor=pipe.image_processor)
    with pytest.raises(ValueError, match=r"pipeline\('multisensor-image-classification'\), '-segmentation'"):
        stock(Image.new("RGB", (20, 20)))
