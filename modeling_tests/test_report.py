"""`msgfm report RUN`: a page that says what the run's files say, stands by itself, and runs nothing out of them."""

import base64
import io
import json
import os
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from msgfm_hf.data.shards import ShardImage, ShardRow, ShardWriter
from msgfm_hf.train.charts import thin
from msgfm_hf.train.pretrain import pretrain
from msgfm_hf.train.recipe import Recipe
from msgfm_hf.train.report import find_warnings, read_run, report_run

VOID = {"meta", "img", "input"}


class Page(HTMLParser):
    """What a browser makes of a page: its elements, text without scripts and styles, and whether tags are balanced."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.source = path.read_text(encoding="ascii")
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def charts(self):
        """(title, what the script reads) of each."""
        titles = [svg["aria-label"].partition(". ")[0] for svg in self.all("svg") if svg.get("class") == "plot"]
        made = [json.loads(figure["data-chart"]) for figure in self.all("figure") if "data-chart" in figure]
        return list(zip(titles, made, strict=True))

    def pictures(self):
        for image in self.all("img"):
            kind, _, content = image["src"].partition(";base64,")
            assert kind == "data:image/webp" and image["alt"]
            yield Image.open(io.BytesIO(base64.b64decode(content)))


RECORD = {
    "identity": {"sources": {"pairs": {"rows": 12, "bands": {"rgb": ["red", "green", "blue"], "dsm": ["height"]}}}},
    "recipe": {"name": "alps", "max_steps": 40, "logging_steps": 10, "max_bad": 64, "seed": 3},
    "versions": {"msgfm_hf": "0.1", "torch": "2.13.0"},
    "commit": "0123456789ab",
    "command": "pretrain.py --data shards",
    "threads": 2,
    "world_size": 1,
}


def routing(shares, dropped=0.0):
    """Two blocks of the same shares."""
    return {"histogram": [shares, shares], "load": [shares, shares], "dropped": [dropped] * 2, "aux_loss": [0.1] * 2}


def training(step, losses, **more):
    line = {"step": step, "loss": sum(losses.values()), "losses": losses, "aux_loss": 0.02, "learning_rate": 1e-3}
    line |= {"grad_norm": 0.5, "images_per_second": 100.0, "input_wait": 0.05, "bad": 0}
    return line | {"routing": {"rgb": routing([0.5, 0.5]), "dsm": routing([0.75, 0.25])}} | more


def validation(step, ratio):
    found = {"pairs rgb->rgb": {"l1": 0.5 * ratio, "ratio_to_band_mean": ratio}}
    return {"step": step, "validation": found, "score": ratio}


LINES = [
    training(10, {"pairs rgb->rgb": 0.8, "pairs dsm->dsm": 0.4}),
    training(20, {"pairs rgb->dsm": 0.6, "pairs dsm->rgb": 0.9}),
    validation(20, 0.75),
    training(30, {"pairs rgb->rgb": 0.5, "pairs dsm->dsm": 0.3}),
    validation(30, 0.875),
]


def make_run(folder, lines=LINES, **record):
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(RECORD | record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_picture(path, seed=0, size=(64, 48)):
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


# The page


def test_the_page_says_what_the_files_say(tmp_path):
    run = make_run(tmp_path / "run", resumed=[{"step": 10, "commit": "fedcba987654", "world_size": 2}])
    (run / "config.json").write_text(json.dumps({"moe_blocks": [[], [3, 1]]}))
    rows = [{"source": "pairs", "input": "rgb", "target": "rgb", "crops": 7, "places": 3, "l1": 0.25, "band_mean": 0.5}]
    (run / "checkpoints" / "step-00000030").mkdir(parents=True)
    report = report_run(run)
    assert report["page"] == run / "report.html"
    page = Page(report["page"])
    assert report["state"] == "At step 30 of 40." and report["state"] in page.text
    assert "Best score 0.7500 at step 20" in report["best"] and report["best"] in page.text
    assert report["warnings"] == [] and "Nothing to warn of." in page.text
    for told in ("alps", "pretrain.py --data shards", "0123456789ab", "fedcba987654", "torch version 2.13.0"):
        assert told in page.text
    for told in ("logging_steps 10", "pairs 12 rgb: red green blue; dsm: height", "Checkpoints of step 30 load"):
        assert told in page.text
    for told in ("stage 2, block 1 50% 50% 0% 1.00", "stage 2, block 3 75% 25% 0% 0.81"):
        assert told in page.text
    assert f"AutoModel.from_pretrained({str(run)!r})" in page.text
    (run / "validation.json").write_text(json.dumps(rows))
    report = report_run(run)
    page = Page(report["page"])
    assert report["state"] == "Finished: 30 steps."
    assert "pairs rgb → rgb 7 3 0.2500 0.5000 (0.50)" in page.text


def test_the_charts_hold_the_logged_values(tmp_path):
    page = Page(report_run(make_run(tmp_path / "run"))["page"])
    (first, losses), (second, ratios), *others = page.charts()
    assert first == second == "pairs"
    charts = dict(others)
    assert len(charts) == 8
    assert charts["Learning rate"]["curves"][0]["values"] == [1e-3] * 3
    assert charts["Waiting for data, %"]["curves"][0]["values"] == [5.0] * 3
    assert [curve["values"] for curve in charts["Dropped choices, %"]["curves"]] == [[0.0] * 3] * 2
    evenness = charts["Entropy of the experts' shares, bits"]["curves"]
    # -(3/4 log2 3/4 + 1/4 log2 1/4) = 0.81128
    assert [curve["values"] for curve in evenness] == [[1.0] * 3, [0.81128] * 3]
    assert [(curve["steps"], curve["values"]) for curve in losses["curves"]] == [
        ([10, 30], [0.4, 0.3]),
        ([20], [0.6]),
        ([10, 30], [0.8, 0.5]),
        ([20], [0.9]),
    ]
    assert "dsm → dsm 30 0.3 0.35 0.3 0.4 rgb → dsm 20 0.6 0.6 0.6 0.6 rgb → rgb 30 0.5 0.65 0.5 0.8" in page.text
    # The target is the colour.
    assert [curve["colour"] for curve in losses["curves"]] == [0, 0, 1, 1]
    assert [(curve["steps"], curve["values"]) for curve in ratios["curves"]] == [([20, 30], [0.75, 0.875])]


def test_the_page_stands_by_itself(tmp_path):
    run = make_run(tmp_path / "run")
    write_picture(run / "reconstructions" / "step-00000020.png")
    page = Page(report_run(run)["page"])
    assert len(page.all("script")) == 1 and "src" not in page.all("script")[0]
    assert page.all("link") == [] and "@import" not in page.source and "url(" not in page.source
    outside = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action") and not value.startswith(("#", "data:image/"))
    ]
    assert outside == []
    anchors = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {link["href"].removeprefix("#") for link in page.all("a")} == anchors
    # The namespace of the script's SVG elements is the one address in it.
    assert re.findall(r"https?://[^\"' ]+", page.source) == ["http://www.w3.org/2000/svg"]
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))


def test_nothing_that_a_file_says_runs(tmp_path):
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' onmouseover='alert(3)"
    lines = [
        training(10, {f"{bad} rgb->rgb": 0.5}, routing={bad: routing([0.5, 0.5])}),
        {"step": 15, "event": bad, "reason": bad, "keys": [bad]},
        {"step": 20, "validation": {f"{bad} rgb->{bad}": {"l1": 0.5, "ratio_to_band_mean": 0.5}}, "score": 0.5},
    ]
    sources = {bad: {"rows": 1, "bands": {bad: [bad]}}}
    run = make_run(
        tmp_path / "run",
        lines,
        identity={"sources": sources},
        recipe={"name": bad, bad: bad, "max_steps": 40},
        command=bad,
        commit=bad,
        versions={bad: bad},
        resumed=[{"step": 5, bad: bad}],
    )
    (run / "validation.json").write_text(
        json.dumps([{"source": bad, "input": bad, "target": bad, "crops": 1, "places": 1, "l1": 0.5, bad: 0.5}])
    )
    page = Page(report_run(run)["page"])
    assert len(page.all("script")) == 1 and page.all("img") == []
    assert [name for _, attributes in page.elements for name in attributes if name.startswith("on")] == []
    assert page.text.count("alert(1)") > 10
    assert json.dumps("alert(1)").strip('"') not in page.source.partition("<script>")[2].partition("<script>")[0]


def test_a_run_without_experts_validation_or_other_sensors(tmp_path):
    line = {"step": 10, "loss": 0.5, "losses": {"photos rgb->rgb": 0.5}, "aux_loss": None, "routing": {}, "bad": 0}
    page = Page(report_run(make_run(tmp_path / "run", [line]))["page"])
    assert [title for title, _ in page.charts()] == ["photos", "Loss of a step"]
    assert "No experts" in page.text and "No validation yet" in page.text and "No pictures yet" in page.text
    assert "No model yet" in page.text


def test_a_run_that_has_only_left_out_steps(tmp_path):
    run = make_run(tmp_path / "run", [{"step": 3, "event": "skipped", "reason": "`loss` is nan", "keys": []}])
    page = Page(report_run(run)["page"])
    assert page.charts() == []
    assert "No training line has losses yet." in page.text and "1 step skipped. The newest: step 3" in page.text


def test_a_score_without_a_comparison_is_not_called_one(tmp_path):
    lines = [*LINES[:1], {"step": 10, "validation": {"pairs rgb->rgb": {"l1": 0.1, "ratio_to_band_mean": None}}}]
    lines[1]["score"] = -10.0
    report = report_run(make_run(tmp_path / "run", lines))
    assert report["best"].startswith("Nothing to compare with in validation: the newest model") and "-10" not in str(
        report
    )


# State


def test_a_running_run_tells_its_pace(tmp_path):
    run = make_run(tmp_path / "run")
    now = time.time()
    os.utime(run / "run.json", (now - 120, now - 120))
    os.utime(run / "metrics.jsonl", (now, now))
    page = Page(report_run(run)["page"])
    # 30 steps in 120 s, and 10 to go.
    assert "Time per step 4 s" in page.text and "Time left, about 40 s" in page.text
    # A resumed run counts from where it resumed.
    make_run(run, resumed=[{"step": 10}, {"step": 26}])
    os.utime(run / "run.json", (now - 120, now - 120))
    os.utime(run / "metrics.jsonl", (now, now))
    page = Page(report_run(run)["page"])
    assert "Time per step 30 s" in page.text and "Time left, about 5 min" in page.text


def test_a_run_gone_quiet_has_probably_stopped(tmp_path):
    run = make_run(tmp_path / "run")
    now = time.time()
    os.utime(run / "run.json", (now - 7300, now - 7300))
    os.utime(run / "metrics.jsonl", (now - 7200, now - 7200))
    report = report_run(run)
    assert report["state"] == (
        "At step 30 of 40, and no line for 2 h: it has probably stopped. There is no checkpoint to resume from."
    )
    assert "Time left" not in Page(report["page"]).text
    (run / "checkpoints" / "step-00000020").mkdir(parents=True)
    assert report_run(run)["state"].endswith("`--resume` goes on from step 20.")


def test_a_run_that_stopped_itself_says_why(tmp_path):
    event = {"step": 33, "event": "stopped", "reason": "`loss` must be finite, got nan", "keys": ["a"]}
    report = report_run(make_run(tmp_path / "run", [*LINES, event]))
    assert report["state"].startswith("Stopped at step 33 of 40: `loss` must be finite, got nan.")


def test_the_length_of_a_run_is_that_of_its_last_start(tmp_path):
    epochs = RECORD["recipe"] | {"max_steps": -1}
    run = make_run(tmp_path / "run", recipe=epochs, max_steps=60)
    assert read_run(run).max_steps == 60
    make_run(run, recipe=epochs, max_steps=60, resumed=[{"step": 20, "max_steps": 50}])
    assert read_run(run).max_steps == 50
    make_run(run, recipe=epochs)
    assert report_run(run)["state"] == "At step 30."
    make_run(run, [*LINES, training(40, {"pairs rgb->rgb": 0.4})])
    assert report_run(run)["state"] == "Finished: 40 steps."


# Warnings


def steady(count, **more):
    return [training(10 * number, {"pairs rgb->rgb": 0.5}, **more) for number in range(1, count + 1)]


def test_a_healthy_run_has_no_warnings(tmp_path):
    assert find_warnings(read_run(make_run(tmp_path / "run", steady(50)))) == []


@pytest.mark.parametrize(
    "lines, said",
    [
        (
            [{"step": 5, "event": "skipped", "reason": "loss is nan", "keys": list("abcdefgh")}, *steady(1)],
            "1 step skipped. The newest: step 5: loss is nan (rows a, b, c, d, e, f, ...)",
        ),
        (steady(1) + steady(3, grad_norm=float("nan"))[1:], "Numbers that are not finite in 2 lines, first at step 20"),
        (
            [*steady(30)[:-1], training(300, {"pairs rgb->rgb": 2.0}), training(310, {"pairs rgb->rgb": 0.5})],
            "1 spike of the loss of pairs rgb → rgb; the worst, at step 300, is 4.0 times the mean of the 20 values",
        ),
        (steady(2, bad=3), "3 damaged rows left out, of 64 allowed."),
        (
            steady(2, routing={"rgb": routing([0.995, 0.005]), "dsm": routing([1.0, 0.0])}),
            "Expert 1 of block 2 of 2 with experts: under 1% of the choices of every sensor (newest 2 lines).",
        ),
        (
            steady(2, routing={"rgb": routing([0.3, 0.3], 0.4)}),
            "40% of the choices of rgb's tokens found no room in their expert",
        ),
        (steady(2, input_wait=0.3), "30% of the time goes by waiting for data"),
    ],
    ids=["skipped", "not finite", "spike", "damaged rows", "idle expert", "dropped", "waiting"],
)
def test_what_is_wrong_is_said(lines, said, tmp_path):
    run = make_run(tmp_path / "run", lines)
    report = report_run(run)
    assert any(warning.startswith(said) or said in warning for warning in report["warnings"])
    assert len(report["warnings"]) == (2 if "Expert" in said else 1)
    assert said.replace("`", "") in Page(report["page"]).text


def test_an_expert_that_one_sensor_uses_is_not_idle(tmp_path):
    lines = steady(2, routing={"rgb": routing([1.0, 0.0]), "dsm": routing([0.0, 1.0])})
    assert find_warnings(read_run(make_run(tmp_path / "run", lines))) == []


def test_a_torn_last_line_is_passed_over(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(training(40, {"pairs rgb->rgb": 0.1}))[:-20])
    report = report_run(run)
    assert report["state"] == "At step 30 of 40."
    assert report["warnings"] == [
        "The last line of metrics.jsonl is torn: the run was killed while writing, or is writing now."
    ]


# Long runs


def test_thinning_keeps_spikes_and_ends():
    values = np.random.default_rng(0).normal(size=100_000)
    values[[777, 60_001]] = 40.0, -40.0
    kept = thin(values, 300)
    assert len(kept) <= 602 and (np.diff(kept) > 0).all()
    assert {0, 777, 60_001, 99_999} <= set(kept.tolist())
    # Of every run the extremes, so the band that is drawn is that of all values.
    for start, end in ((0, 333), (50_000, 50_333)):
        assert {values[start:end].max(), values[start:end].min()} <= set(values[kept])
    assert thin(values[:600], 300).tolist() == list(range(600))


def test_a_long_run_gives_a_small_page_with_its_spikes(tmp_path):
    rng = np.random.default_rng(0)
    ways = [f"pairs {given}->{target}" for given in ("rgb", "dsm") for target in ("rgb", "dsm")]
    lines = []
    for step in range(1, 8001):
        line = {"step": step, "losses": {way: round(float(rng.uniform(0.4, 0.6)), 4) for way in ways}}
        lines.append(line | {"grad_norm": 1.0, "learning_rate": 1e-3})
    lines[4321]["losses"]["pairs rgb->dsm"] = 77.0
    run = make_run(tmp_path / "run", lines, recipe=RECORD["recipe"] | {"max_steps": 8000})
    report = report_run(run)
    page = Page(report["page"])
    losses = dict(page.charts())["pairs"]
    assert losses["log"] and losses["y"][1] > 77
    (curve,) = [curve for curve in losses["curves"] if max(curve["values"]) > 1]
    assert curve["steps"][curve["values"].index(77.0)] == 4322
    assert max(curve["medians"]) < 0.6
    assert all(len(curve["steps"]) <= 602 for curve in losses["curves"])
    assert len(page.source) < 600_000
    assert "the worst, at step 4,322" in report["warnings"][0]


def test_of_long_metrics_only_some_lines_tell_their_routing(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", steady(30))
    monkeypatch.setattr("msgfm_hf.train.report._ROUTING_BYTES", (run / "metrics.jsonl").stat().st_size // 2)
    history = read_run(run)
    assert history.routing_every == 3 and history.entropy["dsm"].steps == [10, *range(40, 310, 30)][:10]
    # The expert map is of the newest lines all the same.
    assert list(history.routing_steps) == list(range(210, 310, 10))


# Pictures


def test_pictures_are_spread_over_the_run_and_fit_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr("msgfm_hf.train.report._PICTURE_BYTES", 100_000)
    run = make_run(tmp_path / "run")
    for step in range(1, 21):
        write_picture(run / "reconstructions" / f"step-{step:08d}.png", step, (300, 200))
    write_picture(run / "reconstruction.png", 99, (300, 200))
    page = Page(report_run(run)["page"])
    pictures = list(page.pictures())
    # Noise hardly shrinks, so these had to be made smaller.
    assert len(pictures) == 9 and all(80 < picture.width < 250 for picture in pictures)
    assert 50_000 < sum(len(base64.b64decode(image["src"].partition(",")[2])) for image in page.all("img")) < 100_000
    assert "8 of 20 pictures" in page.text
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page.source)
    assert captions[0] == "step 1" and captions[-2:] == ["step 20", "The kept model"]
    (slider,) = page.all("input")
    assert (slider["type"], slider["min"], slider["max"]) == ("range", "0", "7")


def test_a_small_picture_stays_as_it_is(tmp_path):
    run = make_run(tmp_path / "run")
    path = run / "reconstructions" / "step-00000020.png"
    path.parent.mkdir()
    Image.new("RGB", (64, 48), (200, 30, 60)).save(path)
    page = Page(report_run(run)["page"])
    (picture,) = page.pictures()
    assert picture.size == (64, 48)
    assert np.abs(np.asarray(picture.convert("RGB"), int) - (200, 30, 60)).max() < 12
    # With one picture there is nothing to slide.
    assert page.all("input") == []


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    write_picture(run / "reconstructions" / "step-00000010.png")
    (run / "reconstructions" / "step-00000020.png").write_bytes(b"torn")
    page = Page(report_run(run)["page"])
    assert len(list(page.pictures())) == 1 and "Cannot be read: step-00000020.png." in page.text


# What cannot be reported


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="`run` must be the folder of a run, got .* without run.json"):
        report_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", '{"step": 1'])
def test_metrics_without_a_whole_line(text, tmp_path):
    run = make_run(tmp_path / "run", [])
    (run / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match="`run` must have whole lines in metrics.jsonl, got none in "):
        report_run(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="got none in .* The first is written after `logging_steps` steps"):
        report_run(run)


@pytest.mark.parametrize(
    "second",
    [
        "step,loss",
        "\x00",
        "[1, 2]",
        '{"loss": 1.0}',
        '{"step": "two"}',
        '{"step": 2, "losses": [1.0]}',
        '{"step": 2, "losses": {"a": "b"}}',
        '{"step": 2, "validation": {"a b->b": 1}}',
    ],
)
def test_metrics_that_are_something_else(second, tmp_path):
    run = make_run(tmp_path / "run")
    (run / "report.html").write_text("the page before")
    (run / "metrics.jsonl").write_text(f'{{"step": 1, "losses": {{}}}}\n{second}\n')
    with pytest.raises(ValueError, match="of JSON lines as pretraining writes them, got line 2 of "):
        report_run(run)
    # The page that was there stays, and nothing is left beside it.
    assert (run / "report.html").read_text() == "the page before"
    assert {path.name for path in run.iterdir()} == {"run.json", "metrics.jsonl", "report.html"}


@pytest.mark.parametrize("name, kind", [("run.json", "dict"), ("validation.json", "list"), ("config.json", "dict")])
@pytest.mark.parametrize("text", ["{", "3"])
def test_a_damaged_record_is_named(name, kind, text, tmp_path):
    run = make_run(tmp_path / "run")
    (run / name).write_text(text)
    with pytest.raises(ValueError, match=f"`run` must have a {name} that is a JSON {kind}, got .*Bring the file back"):
        report_run(run)


def test_out_must_be_a_file(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="`out` must be a file, got the folder"):
        report_run(run, tmp_path)
    page = report_run(run, tmp_path / "new" / "page.html")["page"]
    assert page == tmp_path / "new" / "page.html" and Page(page).text
    assert not (run / "report.html").exists()


# The command, and a real run


def test_the_command_writes_and_tells(msgfm, tmp_path):
    run = make_run(tmp_path / "run", steady(2, bad=3))
    code, said, _ = msgfm("report", run)
    assert code == 0
    assert said.splitlines()[0] == "At step 20 of 40."
    assert "  ! 3 damaged rows left out, of 64 allowed." in said
    assert said.endswith(f"Written: {run / 'report.html'}\n") and Page(run / "report.html").text
    code, said, _ = msgfm("report", run, "--out", tmp_path / "elsewhere.html")
    assert code == 0 and Page(tmp_path / "elsewhere.html").text


def test_the_command_fails_in_one_line(msgfm, tmp_path):
    code, _, said = msgfm("report", tmp_path)
    assert code == 1 and said.startswith("msgfm report: `run` must be the folder of a run")
    code, _, said = msgfm("report", make_run(tmp_path / "run"), "--prune", "rgb")
    assert code == 1 and said.startswith("msgfm report: `--prune` must come with `--experts`, got ['rgb'] without.")
    assert len(said.splitlines()) == 1


def test_the_page_of_a_real_run(tmp_path):
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "shards", "meadow", ["rgb"]) as writer:
        for split, rows in (("train", 4), ("val", 2)):
            for number in range(rows):
                pixels = rng.integers(0, 256, (3, 30, 30), dtype=np.uint8)
                image = ShardImage(pixels, ["red", "green", "blue"], "dn", 1 / 255, gsd=0.6)
                writer.write(ShardRow(f"{split}{number}", "meadow", split, f"{split}{number}", {"rgb": image}))
    model = {"embed_dim": 12, "depths": [1, 1, 2], "num_heads": [1, 1, 2], "window_size": 3, "num_experts": 2}
    recipe = Recipe(
        name="meadow",
        output_dir=str(tmp_path / "run"),
        data=[str(tmp_path / "shards")],
        model=model | {"image_size": 24, "mask_patch_size": 8},
        batch_sizes={"meadow": 2},
        max_steps=3,
        logging_steps=1,
        eval_steps=3,
        save_steps=3,
        mixed_precision="no",
    )
    pretrain(recipe)
    report = report_run(tmp_path / "run")
    page = Page(report["page"])
    assert report["state"] == "Finished: 3 steps." and report["best"].startswith("Best score ")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line["grad_norm"] for line in lines if "grad_norm" in line]
    (curve,) = dict(page.charts())["Gradient norm"]["curves"]
    assert curve["steps"] == [1, 2, 3] and curve["values"] == pytest.approx(logged, rel=1e-4)
    assert "stage 3, block 1" in page.text and "Checkpoints of step 3 load" in page.text
    assert len(list(page.pictures())) >= 1
    (row,) = json.loads((tmp_path / "run" / "validation.json").read_text())
    assert f"meadow rgb → rgb 2 2 {row['l1']:.4f}" in page.text
