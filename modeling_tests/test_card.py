"""Cards: rendered from what a checkpoint holds and its publisher states; no number without what made it."""

import json
from pathlib import Path

import pytest
import rasterio
import yaml
from PIL import Image

import tiny_models
from msgfm_hf import MsGFMConfig, MsGFMForPreTraining, MsGFMImageProcessor
from msgfm_hf.convert.checkpoint import convert_checkpoint
from msgfm_hf.data.synthetic import make_synthetic_shards
from msgfm_hf.hub.card import (
    CardFacts,
    Result,
    hosted_widget,
    read_facts,
    render_eval_results,
    render_model_card,
    without_folders,
)
from msgfm_hf.hub.examples import write_examples
from msgfm_hf.hub.push import prepare_checkpoint, push_to_hub
from msgfm_hf.model.image_processing_msgfm import read_geotiff
from swin_reference import make_source
from test_convert import save

ROOT = Path(__file__).resolve().parents[1]
RESULT = {
    "task": "s1 → s2",
    "dataset": "terramesh",
    "metric": "masked L1",
    "value": 0.368,
    "n": 4,
    "seed": 0,
    "commit": "ef446076561f",
    "command": "msgfm evaluate",
    "origin": "run",
}


def card(facts=None, architecture="MsGFMModel", **fields):
    facts = CardFacts() if facts is None else facts
    config = MsGFMConfig(**{**tiny_models.TINY, **fields})
    return render_model_card(config, architecture, {"total": 12345, "active": 678}, "me/mine", facts)


def facts_of(folder, text):
    (folder / "card.yaml").write_text(text)
    return read_facts(folder / "card.yaml")


def test_a_card_says_what_goes_in_and_how_large_it_is(tmp_path):
    text = str(card(facts_of(tmp_path, 'gsd: {s1: "10 m"}'), inputs={"s1": ["VH"]}))
    assert "| `s1` | VV, VH | db | db | 10 m | 10 m | VH |" in text
    assert "| `rgb` | red, green, blue | dn (scale 0.00392157) | reflectance | not stated | not stated |  |" in text
    assert "12,345 parameters, 678 active" in text and 'AutoModel.from_pretrained("me/mine"' in text
    for heading in ("Intended use", "Limits", "Beware", "Training data", "Results", "Hosted inference"):
        assert f"## {heading}" in text
    assert "It is not a checkpoint of the paper's authors" in text
    assert "None are stated: no number without the command that made it" in text


def test_metadata_says_how_to_load_and_what_was_measured(tmp_path):
    facts = CardFacts(
        name="Mine", license="apache-2.0", base_model="other/base", tags=["x"], results=[Result.from_dict(RESULT)]
    )
    data = yaml.safe_load(str(card(facts)).split("---")[1])
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "image-feature-extraction")
    assert (
        data["license"] == "apache-2.0"
        and data["base_model"] == "other/base"
        and {"x", "s2", "msgfm"} <= set(data["tags"])
    )
    (found,) = data["model-index"][0]["results"]
    assert found["dataset"]["name"] == "terramesh" and found["metrics"][0]["value"] == 0.368
    assert "run, n=4, seed 0" in found["metrics"][0]["name"]
    assert "| s1 → s2 | terramesh | masked L1 | 0.368 | 4 | 0 | run | `msgfm evaluate` at ef446076561f |" in str(
        card(facts)
    )
    assert "model-index" not in yaml.safe_load(str(card()).split("---")[1])


def test_results_of_one_data_set_keep_their_tasks_and_sources():
    """Entries of one task, data set and split are otherwise merged, under the first one's name."""
    copied = {"origin": "copied", "source": "https://arxiv.org/abs/1", "value": 0.9}
    entries = [RESULT, {**RESULT, "task": "s2 → s1", "value": 0.7}, {**RESULT, **copied}]
    facts = CardFacts(results=[Result.from_dict(entry) for entry in entries])
    found = yaml.safe_load(str(card(facts)).split("---")[1])["model-index"][0]["results"]
    assert [(one["task"]["name"], one["metrics"][0]["value"]) for one in found] == [
        ("s1 → s2", 0.368),
        ("s2 → s1", 0.7),
        ("s1 → s2", 0.9),
    ]
    assert [one.get("source", {}).get("url") for one in found] == [None, None, "https://arxiv.org/abs/1"]


@pytest.mark.parametrize("missing", ["value", "n", "seed", "commit", "command", "origin", "metric", "task", "dataset"])
def test_a_number_without_what_made_it_is_not_rendered(missing, tmp_path):
    entry = {name: value for name, value in RESULT.items() if name != missing}
    (tmp_path / "results.json").write_text(json.dumps([entry]))
    for text in (yaml.safe_dump({"results": [entry]}), "results: [results.json]"):
        with pytest.raises(ValueError, match=f"`results` must state value, n, .*without {missing}"):
            facts_of(tmp_path, text)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"value": "0.4"}, "`value` of 'masked L1' must be a finite number, got '0.4'"),
        ({"value": float("nan")}, "`value` of 'masked L1' must be a finite number, got nan"),
        ({"task_id": "c"}, "`dataset_id` of 'masked L1' must come with a `task_id`"),
        ({"seed": []}, "`results` must state .* without seed"),
        ({"commit": "?"}, "`results` must state .* without commit"),
        ({"command": " "}, "`results` must state .* without command"),
        ({"n": 0}, "`n` of 'masked L1' must be a whole number above 0, got 0"),
        ({"n": 2.5}, "`n` of 'masked L1' must be a whole number"),
        ({"origin": "remembered"}, "`origin` of 'masked L1' must be run or copied, got 'remembered'"),
        ({"origin": "copied"}, "`source` of 'masked L1' must be given for a copied number"),
        ({"colour": "red"}, "`results` must state .* with colour"),
    ],
)
def test_results_of_the_wrong_kind(change, match):
    with pytest.raises(ValueError, match=match):
        Result.from_dict({**RESULT, **change})


@pytest.mark.parametrize(
    "text, match",
    [
        ("licence: mit", "`card.yaml` has the entries name, .*, got licence. Remove them"),
        ("license: [mit]", "`license` of card.yaml must be text, got"),
        ("tags: x", "`tags` of card.yaml must be a list, got 'x'"),
        (
            "limits: [{Not for: floods}]",
            "`limits` of card.yaml must hold text, got {'Not for': 'floods'}. Put it",
        ),
        ("gsd: {s1: 10}", "`gsd` of card.yaml must hold text, got 10"),
        ("gsd: 10", "`gsd` of card.yaml must be entries, got 10"),
        (
            "training_data: [{license: mit}]",
            "`training_data` of card.yaml must be entries of name, license, url and note",
        ),
        ("results: [0.5]", "`results` must state value, n"),
        ("results: [none.json]", "`results` must name an existing file"),
        ("results: [card.yaml]", "`results` must be a list of entries or a report of `msgfm evaluate --out`, got"),
        ("results: [broken.json]", "`results` must be a readable file"),
        ("- a", "`card.yaml` must hold entries, got a list"),
        ("a: [", "`card.yaml` must be readable YAML"),
    ],
)
def test_facts_of_the_wrong_kind(text, match, tmp_path):
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        facts_of(tmp_path, text)


def test_facts_on_a_sensor_that_is_not_there():
    with pytest.raises(
        ValueError, match=r"`gsd` must be of sensors of the checkpoint \(dsm, rgb, s1, s2\), got skysat"
    ):
        card(CardFacts(gsd={"skysat": "1 m"}))


def test_a_report_of_evaluation_is_results(tmp_path):
    rows = [{"source": "autzen", "input": "dsm", "target": "rgb", "crops": 20, "places": 1, "l1": 0.536}]
    report = {
        "measure": "masked L1",
        "command": "msgfm evaluate --model a",
        "commit": "abc",
        "split": "val",
        "models": ["a", "b"],
        "trained": [{"seed": 0}, {"seed": 1}],
        "rows": rows,
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    (result,) = facts_of(tmp_path, "results: [report.json]").results
    assert (result.task, result.n, result.seed, result.origin) == ("dsm → rgb", 1, "0, 1", "run")
    assert result.metric == "masked L1; 20 crops of n places, median of 2 models of one recipe"
    assert "**Demonstration, not evidence: fewer than three places.**" in str(card(CardFacts(results=[result])))
    (tmp_path / "report.json").write_text(json.dumps({**report, "trained": [None, None]}))
    with pytest.raises(ValueError, match="without seed"):
        facts_of(tmp_path, "results: [report.json]")


def test_eval_results_are_written_for_benchmarks_of_the_hub_only():
    plain, benchmark = Result.from_dict(RESULT), Result.from_dict({**RESULT, "dataset_id": "a/b", "task_id": "c"})
    assert render_eval_results(CardFacts(results=[plain])) is None
    (entry,) = yaml.safe_load(render_eval_results(CardFacts(results=[plain, benchmark])))
    assert entry["dataset"] == {"id": "a/b", "task_id": "c"} and entry["value"] == 0.368
    assert "msgfm evaluate" in entry["notes"]


@pytest.mark.parametrize("path", sorted((ROOT / "hub_cards").glob("*.yaml")), ids=lambda path: path.name)
def test_our_own_cards_render(path):
    facts = read_facts(path)
    text = str(card(facts, "MsGFMForPreTraining"))
    assert facts.license in text and facts.beware[0] in text
    assert all(f"| {result.task} | {result.dataset} (val) |" in text for result in facts.results)


def test_a_widget_is_for_classes_and_masks_of_pictures():
    rgb = {"inputs": {"rgb": ["blue", "green", "red"]}}
    config = MsGFMConfig(**tiny_models.TINY, **rgb)
    assert hosted_widget(config, "MsGFMForImageClassification") and hosted_widget(
        config, "MsGFMForSemanticSegmentation"
    )
    assert not hosted_widget(config, "MsGFMForPreTraining")
    assert not hosted_widget(MsGFMConfig(**tiny_models.TINY, inputs={"s1": ["VV"]}), "MsGFMForImageClassification")
    both = MsGFMConfig(**tiny_models.TINY, inputs={"rgb": ["red", "green", "blue"], "s1": ["VV"]})
    assert not hosted_widget(both, "MsGFMForImageClassification")


def test_pictures_are_for_sensors_that_have_their_numbers():
    """Of a sensor of other numbers a picture would be nearly black."""
    planet = MsGFMConfig().sensors["rgb"] | {"id": "planet", "scale": 1e-4}
    config = MsGFMConfig(**tiny_models.TINY, sensors={"planet": planet}, inputs={"planet": ["red", "green", "blue"]})
    assert not hosted_widget(config, "MsGFMForImageClassification")
    with pytest.raises(ValueError, match=r"its bands \(red, green, blue\) in its own numbers, got a picture of"):
        MsGFMImageProcessor.from_config(config)(Image.new("RGB", (8, 8)))


def test_facts_of_a_checkpoint_on_the_card_of_a_data_set(tmp_path):
    make_synthetic_shards(tmp_path / "shards")
    (tmp_path / "card.yaml").write_text(yaml.safe_dump({"results": [RESULT]}))
    with pytest.raises(ValueError, match="`results` must be left out of the card of a data set"):
        push_to_hub(tmp_path / "shards", "me/data", dry_run=True, card=tmp_path / "card.yaml", tell=print)


def test_folders_of_a_machine_are_not_published(tmp_path):
    folder = tmp_path / "home" / "alice"
    folder.mkdir(parents=True)
    given = save(folder, make_source())
    convert_checkpoint(given, tmp_path / "model", command=f"msgfm convert {given[0]} --out={tmp_path}/model")
    record = {"command": f"pretrain.py --data {folder}/shards --hub https://example.org/a/b", "commit": "abc"}
    (tmp_path / "model/run.json").write_text(json.dumps(record))
    (tmp_path / "staging").mkdir()
    prepare_checkpoint(tmp_path / "model", "me/swin", CardFacts(), tmp_path / "staging")
    texts = [(tmp_path / "staging" / name).read_text() for name in ("README.md", "conversion_report.json")]
    assert not any("alice" in text or str(tmp_path) in text for text in texts)
    assert "`pretrain.py --data shards --hub https://example.org/a/b` at commit abc" in texts[0]
    assert json.loads(texts[1])["command"] == "msgfm convert source.pth --out=model"


HOME = "/" + "home/alice"


@pytest.mark.parametrize(
    "command, published",
    [
        (f"msgfm evaluate --model {HOME}/secret/runs/a --data x", "msgfm evaluate --model a --data x"),
        (f"pretrain --data {HOME}/shards/ --name x", "pretrain --data shards --name x"),
        (f"a --in=file://{HOME}/x ~alice/q/r ~/y s1={HOME}/b.tif,unit=db", "a --in=x r y s1=b.tif,unit=db"),
        ("a --data hf://datasets/a/b https://c.org/d runs/e", "a --data hf://datasets/a/b https://c.org/d runs/e"),
    ],
)
def test_commands_are_published_without_folders(command, published):
    assert Result.from_dict({**RESULT, "command": command}).command == without_folders(command) == published


def test_a_table_is_not_broken_by_what_stands_in_it():
    text = str(card(CardFacts(results=[Result.from_dict({**RESULT, "command": "a | b"})])))
    assert r"`a \| b` at ef446076561f" in text


def test_a_converted_checkpoint_is_not_called_msgfm_weights(tmp_path):
    convert_checkpoint(save(tmp_path, make_source()), tmp_path / "model")
    told = []
    push_to_hub(tmp_path / "model", "me/swin", dry_run=True, tell=told.append)
    assert "conversion_report.json" in told[0]
    (tmp_path / "staging").mkdir()
    prepare_checkpoint(tmp_path / "model", "me/swin", CardFacts(), tmp_path / "staging")
    text = (tmp_path / "staging/README.md").read_text()
    assert "**not msGFM weights**" in text and "Converted from source.pth (swin)" in text


def test_examples_are_georeferenced_images_that_the_processor_reads(tmp_path):
    """Also of a sensor that nobody renders."""
    model = tiny_models.tiny(MsGFMForPreTraining, inputs={"s2": ["B04", "B02"]})
    skysat = MsGFMConfig().sensors["rgb"] | {"id": "skysat"}
    config = model.config
    config.sensors = {**config.sensors, "skysat": skysat, "naip": MsGFMConfig().sensors["rgb"] | {"id": "naip"}}
    files = write_examples(config, tmp_path)
    assert set(files) == {"dsm", "rgb", "s1", "s2", "skysat", "naip", "picture"}
    processor = MsGFMImageProcessor.from_config(config)
    for sensor, path in files.items():
        if sensor == "picture":
            continue
        with rasterio.open(path) as file:
            assert file.crs.is_projected and file.res == (10, 10) and file.shape == (128, 128)
            assert list(file.descriptions) == read_geotiff(path).bands
        values = processor({sensor: str(path)})["pixel_values"][sensor]
        assert values.isfinite().all() and values.abs().mean() < 4
    assert read_geotiff(files["s2"]).bands == ["B04", "B02"]
