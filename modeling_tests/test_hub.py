"""A checkpoint and a folder of shards travel to a Hub and back: over HTTP, in processes of their own, with faults."""

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image

import tiny_models
from hub_server import TOKEN, running_hub
from msgfm_hf import (
    MsGFMForImageClassification,
    MsGFMForPreTraining,
    MsGFMForSemanticSegmentation,
    MsGFMImageProcessor,
)
from msgfm_hf.data.shards import ShardImage, ShardRow, ShardWriter
from msgfm_hf.hub.push import PushError, push_to_hub
from without_package import run_without_package

ROOT = Path(__file__).resolve().parents[1]
REPO = "tester/tiny-msgfm"
NAMES = {0: "water", 1: "forest", 2: "field"}


def environment(hub, home, token=TOKEN):
    """Of a process that knows this Hub only; nothing of another run is in its cache."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": token,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }


COMMANDS = """
    import contextlib, io, json, os, sys, time
    from msgfm_hf.cli import main
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # between attempts
    results = []
    for command, token in json.loads(sys.argv[1]):
        os.environ["HF_TOKEN"] = token
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(command)
            except SystemExit as stop:
                code = stop.code
        results.append([code, out.getvalue(), err.getvalue()])
    print(json.dumps(results))
"""


def with_package(folder, hub, script, *arguments):
    """The last line, JSON, of what a script says in a process that has the package, and no checkpoint in its cache."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment(hub, folder / "cache-with")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def push(folder, hub, *commands):
    """`msgfm push` with each of these arguments, in one process, whose waits are cut short.

    A command may be (arguments, token). Returns (status, what it printed, what it complained) of each.
    """
    given = [(command, TOKEN) if isinstance(command, list) else command for command in commands]
    calls = [(["push", *command], token) for command, token in given]
    return [tuple(result) for result in with_package(folder, hub, COMMANDS, json.dumps(calls))]


def save(folder, cls=MsGFMForPreTraining, seed=0, **fields):
    torch.manual_seed(seed)
    model = tiny_models.tiny(cls, 0.1, **fields)
    model.save_pretrained(folder)
    MsGFMImageProcessor.from_config(model.config).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def hub():
    with running_hub() as server:
        yield server


RESULT = {
    "task": "s1 → s1",
    "dataset": "terramesh",
    "split": "val",
    "metric": "masked L1 (normalised units)",
    "value": 0.458,
    "n": 4,
    "seed": "0, 1, 2",
    "commit": "ef446076561f",
    "command": "msgfm evaluate --model runs/sample-1",
    "origin": "run",
}
CARD = """
name: Tiny
summary: A model for tests.
license: apache-2.0
tags: [test]
datasets: [tester/shards]
training_data:
  - {name: Nothing, license: cc0-1.0, url: "https://example.org", note: random weights}
beware: ["It knows nothing."]
results:
  - report.json
  - {task: clouds, dataset: SEN12MS-CR, metric: "MAE, 0 to 1", value: 0.026, n: 7899, seed: not stated,
     commit: arXiv 2404.01260v1, command: Table 3, origin: copied, source: "https://arxiv.org/abs/2404.01260",
     dataset_id: tester/clouds, task_id: mae}
"""


STUMBLES = [
    ("POST /api/repos/create", 503),
    ("POST {repo}/preupload/", 503),
    ("POST /{name}.git/info/lfs/objects/batch", 503),
    ("PUT /lfs-objects/{weights}", 503),
    ("PUT /lfs-objects/{weights}", "close"),
    ("POST {repo}/commit/", 503),
    ("POST {repo}/commit/", "close"),
    ("POST {repo}/commit/", "after"),
]


@pytest.fixture(scope="module")
def pushed(hub, shards, tmp_path_factory):
    """Everything that is pushed in these tests, by one process: {name: (status, output, complaint)}, and the models."""
    folder = tmp_path_factory.mktemp("pushed")
    names = {"id2label": NAMES, "label2id": {name: number for number, name in NAMES.items()}}
    models = {
        "model": save(folder / "model", inputs={"s1": ["VV", "VH"]}),
        "classifier": save(folder / "classifier", MsGFMForImageClassification, **names),
        "segmenter": save(folder / "segmenter", MsGFMForSemanticSegmentation, **names),
        "small": save(folder / "small", sensors=tiny_models.RGB),
    }
    (folder / "model" / "card.yaml").write_text(CARD)
    (folder / "model" / "report.json").write_text(json.dumps([RESULT]))
    models["small"].save_pretrained(folder / "split", max_shard_size="60KB")
    MsGFMImageProcessor.from_config(models["small"].config).save_pretrained(folder / "split")
    calls = {name: [name, f"tester/{name}"] for name in ("classifier", "segmenter")}
    calls["model"] = ["model", REPO]
    calls["refused"] = (["small", "tester/refused"], "hf_stolen")
    calls["owner"] = ["small", "somebody/else"]
    calls["first branch"] = ["split", "tester/branches", "--revision", "v1"]
    calls["second branch"] = ["small", "tester/branches", "--revision", "v1"]
    calls["away"] = ["small", "tester/away"]
    calls["back"] = ["small", "tester/away"]
    calls["dry"] = ["small", "tester/dry", "--dry-run"]
    calls["private"] = ["small", "tester/private", "--private"]
    calls["public"] = ["small", "tester/away", "--private"]
    calls["broken upload"] = ["broken", "tester/broken"]
    calls["forbidden upload"] = ["forbidden", "tester/forbidden"]
    calls["slash"] = ["small", "tester/branches", "--revision", "feature/x"]
    calls["removal"] = ["split", "tester/removal"]
    calls["removal again"] = ["lost", "tester/removal"]
    calls["shards"] = [str(shards / "data"), "tester/shards", "--card", str(shards / "card.yaml")]
    calls["one source"] = [str(shards / "data/harbour"), "tester/shards"]
    # The first command that makes a repository meets the first fault.
    calls = {f"stumble {number}": [f"stumble{number}", f"tester/stumble{number}"] for number in range(8)} | calls
    for number, (pattern, fault) in enumerate(STUMBLES):
        save(folder / f"stumble{number}", seed=100 + number, sensors=tiny_models.RGB)
        content = (folder / f"stumble{number}/model.safetensors").read_bytes()
        values = {"repo": f"/api/models/tester/stumble{number}", "name": f"tester/stumble{number}"}
        # A commit that was made but not answered is not made again, so there is no second request.
        times = 1 if fault == "after" else 2
        hub.fail(pattern.format(**values, weights=hashlib.sha256(content).hexdigest()), fault, times)
    hub.fail("POST /api/models/tester/away/commit/", 503, times=5)
    for name, seed, fault in (("broken", 200, "close"), ("forbidden", 201, 403), ("lost", 202, None)):
        save(folder / name, seed=seed, sensors=tiny_models.RGB)
        content = (folder / name / "model.safetensors").read_bytes()
        if fault:
            hub.fail(f"PUT /lfs-objects/{hashlib.sha256(content).hexdigest()}", fault, times=500)
    # The second commit there removes files; its answer is lost.
    hub.fail("POST /api/models/tester/removal/commit/", None, 1)
    hub.fail("POST /api/models/tester/removal/commit/", "after", 1)
    results = dict(zip(calls, push(folder, hub, *calls.values()), strict=True))
    return folder, models, results


@pytest.fixture(scope="module")
def published(pushed):
    """The checkpoint of radar and all sensors: (its folder, its model, what the command said)."""
    folder, models, results = pushed
    code, said, complaint = results["model"]
    assert code == 0, complaint
    return folder / "model", models["model"], said


# --------------------------------------------------------------------------------------------------- there, in one go


def test_a_push_is_one_commit_with_all_that_a_stranger_needs(hub, published):
    files = hub.files(REPO)
    model_files = {path.name for path in (ROOT / "src/msgfm_hf/model").glob("*.py")} - {"__init__.py"}
    examples = {f"examples/{name}" for name in ("dsm.tif", "rgb.tif", "s1.tif", "s2.tif", "picture.png")}
    assert set(files) == model_files | examples | {
        "README.md",
        ".eval_results/msgfm_hf.yaml",
        "config.json",
        "handler.py",
        "model.safetensors",
        "preprocessor_config.json",
        "requirements.txt",
    }
    folder, _, said = published
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert len(hub.repositories["model", REPO].messages) == 1
    assert "Pushed: " in said and re.search(r"model\.safetensors +[\d,]+ bytes", said)
    assert "licence" not in said
    requirements = files["requirements.txt"].decode()
    assert re.search(r"^transformers==5", requirements, re.MULTILINE) and "tifffile" in requirements
    config = json.loads(files["config.json"])
    assert config["auto_map"]["AutoModelForImageClassification"] == "heads_msgfm.MsGFMForImageClassification"


STRANGER = """
    import json, sys
    import torch
    import transformers
    from huggingface_hub import hf_hub_download

    def look(repo, **trust):
        path = hf_hub_download(repo, "examples/s1.tif")
        processor = transformers.AutoImageProcessor.from_pretrained(repo, **trust)
        inputs = processor({"s1": path})
        out = {}
        with torch.no_grad():
            for name in ("AutoModel", "AutoModelForPreTraining"):
                model = getattr(transformers, name).from_pretrained(repo, **trust).eval()
                found = model(**inputs)
                found = found.last_hidden_state if name == "AutoModel" else found.reconstruction["s1"]
                out[name] = found.double().sum().item()
            classifier = transformers.AutoModelForImageClassification.from_pretrained(repo, **trust)
            out["classes"] = list(classifier(**inputs).logits.shape)
        pipe = transformers.pipeline("multisensor-image-feature-extraction", model=repo, **trust)
        out["features"] = pipe([{"s1": path}] * 2, pool=True, batch_size=2)[1]
        pipe = transformers.pipeline("multisensor-image-to-image", model=repo, **trust)
        out["translated"] = float(pipe({"s1": path}, target="s2")[0]["image"].sum(dtype="float64"))
        classifier = transformers.AutoModelForImageClassification.from_pretrained("tester/classifier", **trust).eval()
        with torch.no_grad():
            out["logits"] = classifier(torch.arange(3072.0).view(1, 3, 32, 32).sin()).logits.double().tolist()
        for task in ("image-classification", "image-segmentation"):
            repo = "tester/" + {"image-classification": "classifier", "image-segmentation": "segmenter"}[task]
            stock = transformers.pipeline(task, model=repo, **trust)
            found = stock(hf_hub_download(repo, "examples/picture.png"))
            out[task] = [[one["label"], one["score"]] for one in found]
        return out, type(pipe).__module__
"""
FAR = (
    STRANGER
    + """
    try:
        import msgfm_hf
    except ImportError:
        pass
    else:
        raise SystemExit("the package must be out of reach here")
    import contextlib, os
    out, module = look(sys.argv[1], trust_remote_code=True)
    assert module.startswith("transformers_modules")

    names = {}
    exec(open(sys.argv[2]).read(), names)  # the snippet of the card
    out["snippet"] = len(names["result"])

    from huggingface_hub import snapshot_download
    out["handler"] = {}
    for repo, (requests, limits) in json.loads(open(sys.argv[3]).read()).items():
        folder = snapshot_download(repo.split("#")[0])
        sys.path.insert(0, folder)
        sys.modules.pop("handler", None)
        import handler
        assert handler.__file__.startswith(folder)
        endpoint = handler.EndpointHandler(folder)
        for name, value in limits.items():
            setattr(handler, name, value)
        out["handler"][repo] = [endpoint(request) for request in requests]
        sys.path.remove(folder)
    print(json.dumps(out))
"""
)
NEAR = (
    STRANGER
    + """
    import msgfm_hf
    out, module = look(sys.argv[1])
    assert module.startswith("msgfm_hf.model")
    try:
        transformers.AutoModel.from_pretrained(sys.argv[1], revision="v9")
    except OSError as error:
        out["missing revision"] = str(error)

    import numpy as np
    from msgfm_hf.data.shards import ShardSource, find_sources
    there = ShardSource("hf://datasets/tester/shards/data/harbour", "train")
    here = ShardSource(sys.argv[3] + "/harbour", "train")
    out["found"] = find_sources("hf://datasets/tester/shards/data")
    out["own reader"] = all(
        (there.read(i)["images"]["rgb"].pixels == here.read(i)["images"]["rgb"].pixels).all() for i in range(len(here))
    )
    names = {}
    exec(open(sys.argv[2]).read(), names)  # the snippet of the card
    out["snippet"], out["rows"] = names["row"]["source"], {}
    for name in ("harbour", "meadow"):
        for split in ("train", "val"):
            rows = list(names["load_dataset"]("tester/shards", name, split=split, streaming=True))
            out["rows"][f"{name} {split}"] = len(rows)
            source = ShardSource(sys.argv[3] + f"/{name}", split)
            for index, row in enumerate(rows):
                meta = row["rgb_meta"]
                pixels = np.frombuffer(row["rgb"], meta["dtype"]).reshape(meta["shape"])
                assert (pixels == source.read(index)["images"]["rgb"].pixels).all()
    print(json.dumps(out))
"""
)


def snippet(hub, repo, kind="model"):
    """The code on the card of a repository."""
    return re.search(r"```python\n(.*?)```", hub.files(repo, kind)["README.md"].decode(), re.DOTALL)[1]


@pytest.fixture(scope="module")
def far(hub, pushed, tmp_path_factory):
    """What a process sees that cannot import the package."""
    folder = tmp_path_factory.mktemp("far")
    (folder / "snippet.py").write_text(snippet(hub, REPO))
    (folder / "requests.json").write_text(json.dumps(handler_requests(hub)))
    done = run_without_package(
        folder,
        FAR,
        REPO,
        str(folder / "snippet.py"),
        str(folder / "requests.json"),
        **environment(hub, folder / "cache"),
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def near(hub, pushed, shards, tmp_path_factory):
    """What a process sees that has the package, and no checkpoint in its cache."""
    folder = tmp_path_factory.mktemp("near")
    (folder / "snippet.py").write_text(snippet(hub, "tester/shards", "dataset"))
    return with_package(folder, hub, NEAR, REPO, str(folder / "snippet.py"), str(shards / "data"))


def test_it_loads_where_the_package_is_unknown_and_where_it_is_installed_with_equal_numbers(
    hub, published, far, near, tmp_path
):
    same = (
        "AutoModel",
        "AutoModelForPreTraining",
        "classes",
        "features",
        "translated",
        "logits",
        "image-classification",
    )
    assert {name: far[name] for name in same} == {name: near[name] for name in same}
    assert far["image-segmentation"] == near["image-segmentation"] and far["classes"] == [1, 2]
    folder, model, _ = published
    (tmp_path / "s1.tif").write_bytes(hub.files(REPO)["examples/s1.tif"])
    processor = MsGFMImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        here = model(**processor({"s1": str(tmp_path / "s1.tif")})).reconstruction["s1"].double().sum().item()
    assert here == far["AutoModelForPreTraining"]


def test_the_snippet_of_the_card_runs(hub, far):
    assert "trust_remote_code=True" in snippet(hub, REPO) and REPO in snippet(hub, REPO)
    assert far["snippet"] == 1


def test_a_missing_revision_is_told(near):
    assert "v9 is not a valid git identifier" in near["missing revision"]


def test_another_branch_and_a_smaller_checkpoint_leave_nothing_behind(hub, pushed):
    _, _, results = pushed
    assert results["first branch"][0] == results["second branch"][0] == 0
    assert not hub.files("tester/branches")
    _, before, after, _ = hub.repositories["model", "tester/branches"].commits.values()
    assert "model.safetensors.index.json" in before and sum("safetensors" in name for name in before) > 2
    assert [name for name in after if "safetensors" in name] == ["model.safetensors"]


def test_a_dry_run_lists_and_asks_the_hub_nothing(hub, pushed):
    code, said, _ = pushed[2]["dry"]
    assert code == 0 and "Nothing was pushed" in said
    assert re.search(r"model\.safetensors +[\d,]+ bytes", said) and "! no licence" in said
    assert not [request for request in hub.requests if "tester/dry" in request]


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("number", range(8), ids=[f"{pattern} {fault}" for pattern, fault in STUMBLES])
def test_a_hub_that_stumbles_gets_one_whole_commit(hub, pushed, number):
    folder, _, results = pushed
    assert results[f"stumble {number}"][0] == 0, results[f"stumble {number}"][2]
    repo = f"tester/stumble{number}"
    assert hub.files(repo)["model.safetensors"] == (folder / f"stumble{number}/model.safetensors").read_bytes()
    assert len(hub.repositories["model", repo].messages) == 1
    assert hub.faults[number][2] == 0


def test_a_hub_that_stays_away_is_told_and_nothing_is_half_pushed(hub, pushed):
    code, said, complaint = pushed[2]["away"]
    assert code == 1
    assert "msgfm push: `REPO_ID` must be reachable, got answer 503 after 5 attempts to commit" in complaint
    assert said.count("trying to commit again") == 4
    # What the next push found was a repository without a commit.
    assert pushed[2]["back"][0] == 0 and len(hub.repositories["model", "tester/away"].messages) == 1


def test_an_upload_that_never_gets_through_says_why(hub, pushed):
    """The client of the Hub wraps it in an error that names the file only."""
    code, said, complaint = pushed[2]["broken upload"]
    assert code == 1 and "`REPO_ID` must be reachable, got no connection" in complaint
    assert "Nothing was committed: push again later" in complaint and "trying to commit again" in said
    code, _, complaint = pushed[2]["forbidden upload"]
    assert code == 1 and "`REPO_ID` must be yours to write, got 'tester/forbidden', which is not (403)" in complaint
    assert hub.files("tester/broken") == hub.files("tester/forbidden") == {}


def test_a_lost_answer_to_a_commit_that_removes_makes_no_second_one(hub, pushed):
    code, said, complaint = pushed[2]["removal again"]
    assert code == 0, complaint
    assert "goes, as this push has none: model-00001-of-" in said
    assert len(hub.repositories["model", "tester/removal"].messages) == 2
    assert [name for name in hub.files("tester/removal") if "safetensors" in name] == ["model.safetensors"]


def test_private_is_private_or_nothing_is_pushed(hub, pushed):
    assert pushed[2]["private"][0] == 0 and hub.repositories["model", "tester/private"].private
    code, _, complaint = pushed[2]["public"]
    assert code == 1 and "`--private` must be left out for a repository that is public, got 'tester/away'" in complaint
    assert not hub.repositories["model", "tester/away"].private


def test_a_data_set_does_not_lose_its_other_sources(hub, pushed):
    code, _, complaint = pushed[2]["one source"]
    assert code == 1 and "got harbour where 'tester/shards' has meadow too. Push a folder of all of them" in complaint


def test_a_branch_may_have_a_slash_in_its_name(hub, pushed):
    assert pushed[2]["slash"][0] == 0, pushed[2]["slash"][2]
    assert "model.safetensors" in hub.files("tester/branches", revision="feature/x")


def test_tokens_and_owners_that_are_refused(hub, pushed):
    code, _, complaint = pushed[2]["refused"]
    assert code == 1 and "`token` must be valid and may write, got one that was refused (401)" in complaint
    code, _, complaint = pushed[2]["owner"]
    assert code == 1 and "`REPO_ID` must be yours to write, got 'somebody/else'" in complaint
    assert not {("model", "tester/refused"), ("model", "somebody/else")} & set(hub.repositories)


# --------------------------------------------------------------------------------------------- pictures, and a widget


@pytest.mark.parametrize("task, repo", [("image-classification", "classifier"), ("image-segmentation", "segmenter")])
def test_the_stock_pipeline_takes_the_picture_of_the_widget_and_says_what_the_card_says(hub, far, task, repo):
    files = hub.files(f"tester/{repo}")
    metadata = yaml.safe_load(files["README.md"].decode().split("---")[1])
    (example,) = metadata["widget"]
    assert metadata["pipeline_tag"] == task and metadata["library_name"] == "transformers"
    assert example["src"].endswith(f"tester/{repo}/resolve/main/examples/picture.png")
    if task == "image-classification":
        assert far[task] == [[one["label"], pytest.approx(one["score"], abs=1e-4)] for one in example["output"]]
    else:
        assert example["output"]["url"].endswith("examples/segmentation.png")
        picture = np.asarray(Image.open(io.BytesIO(files["examples/segmentation.png"])))
        assert picture.shape == (128, 128, 3)
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) == len(far[task]) > 0


def in_base64(content):
    return base64.b64encode(content).decode()


def npz(array, **more):
    """One array, and more of them."""
    buffer = io.BytesIO()
    np.savez(buffer, array, **more)
    return in_base64(buffer.getvalue())


def handler_requests(hub):
    """{repository: (requests, limits to set before)}; what follows a # only tells two of one repository apart."""
    requests = {}
    for repo, options in (("tester/classifier", {"parameters": {"top_k": 2}}), ("tester/segmenter", {})):
        files = hub.files(repo)
        picture = in_base64(files["examples/picture.png"])
        requests[repo] = (
            [
                {"inputs": picture, **options},
                {"inputs": f"data:image/png;base64,{picture}", **options},
                {"inputs": {"rgb": in_base64(files["examples/rgb.tif"])}, **options},
                {"inputs": picture, "parameters": {"target": "s2"}},
            ],
            {},
        )
    tiff, picture = (in_base64(hub.files(REPO)[f"examples/{name}"]) for name in ("s1.tif", "picture.png"))
    image = np.random.default_rng(0).normal(-12, 3, (2, 20, 24)).astype("float32")
    requests[REPO] = (
        [
            {"inputs": {"s1": tiff}},
            {"inputs": tiff},
            {"inputs": {"s1": npz(image)}, "parameters": {"target": "s2", "target_bands": ["B04"]}},
            {"inputs": {"s1": npz(10 ** (image / 10))}, "parameters": {"unit": {"s1": "power"}}},
            *({"inputs": {"s1": value}, "parameters": parameters} for value, parameters, _ in refused(tiff, image)),
            {},
            [],
        ],
        {},
    )
    requests[f"{REPO}#pixels"] = (
        [
            {"inputs": {"s1": tiff}},
            {"inputs": {"s1": npz(np.zeros((2, 40, 40), np.float32))}},
            {"inputs": picture},
        ],
        {"MAX_PIXELS": 900},
    )
    packed = io.BytesIO()
    np.savez_compressed(packed, np.zeros((2, 700, 700), np.float32))
    half = io.BytesIO()
    np.savez_compressed(half, np.zeros((2, 300, 300), np.float32))
    requests[f"{REPO}#bytes"] = (
        [
            {"inputs": {"s1": in_base64(b"x" * 2**20), "s2": in_base64(b"x" * 2**20)}},
            {"inputs": {"s1": in_base64(packed.getvalue())}},
            {"inputs": {"s1": in_base64(half.getvalue()), "s2": in_base64(half.getvalue())}},
            {"inputs": {"skysat": in_base64(packed.getvalue())}},
        ],
        {"MAX_BYTES": 2**20 + 5, "MAX_UNPACKED_BYTES": 2**20},
    )
    pages, deep = io.BytesIO(), io.BytesIO()
    with tifffile.TiffWriter(pages) as file:
        for _ in range(9):
            file.write(np.zeros((400, 400), np.uint8), compression="zlib", contiguous=False)
    Image.fromarray(np.full((40, 40), 40000, np.uint16)).save(deep, "PNG")
    picture = hub.files("tester/classifier")["examples/picture.png"]
    requests["tester/classifier#odd"] = (
        [
            {"inputs": {"rgb": in_base64(pages.getvalue())}},
            {"inputs": in_base64(deep.getvalue())},
            {"inputs": base64.encodebytes(picture).decode(), "parameters": {"top_k": 2}},
        ],
        {"MAX_UNPACKED_BYTES": 2**20},
    )
    requests[f"{REPO}#tensors"] = [{"inputs": tiff, "parameters": {"return_tensors": True}}], {}
    return requests


def refused(tiff="", image=0):
    """(what is sent for s1, parameters, what the error says)."""
    image = np.asarray(image, np.float32)
    return [
        (npz(-image), {}, "`pixels` for sensor 's1' must have a median of at most 0"),
        ("no base64!", {}, "`s1` must be in base64"),
        (in_base64(b"neither picture nor file"), {}, "`s1` must be a picture, a GeoTIFF or an npz"),
        (tiff[: len(tiff) // 8 * 4], {}, "TIFF"),
        (npz(image, more=image), {}, "`s1` must hold one array, got more, arr_0"),
        (npz(np.zeros(3)), {}, "`s1` must be (bands, height, width), got shape (3,)"),
        (npz(np.array([{}], dtype=object)), {}, "allow_pickle"),
        (in_base64(b"PK\x03\x04 and no more"), {}, "`s1` must be a readable npz"),
        (5, {}, "`s1` must be a file in base64, got int"),
        (tiff, [1], "`parameters` must be an object, got [1]"),
        (tiff, {"bogus": 1}, "has the arguments"),
    ]


@pytest.mark.parametrize("repo", ["tester/classifier", "tester/segmenter"])
def test_the_handler_answers_pictures(far, repo):
    one, two, again, wrong = far["handler"][repo]
    assert one == two == again and wrong["error"].startswith("`target` must be left out for this checkpoint")
    assert {entry["label"] for entry in one} <= set(NAMES.values())
    if repo == "tester/classifier":
        assert len(one) == 2
    else:
        masks = [np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["mask"])))) for entry in one]
        assert (sum(mask.astype(int) for mask in masks) == 255).all()


def test_the_handler_answers_sensors_and_errors_as_json(far):
    answers = far["handler"][REPO]
    assert answers[0] == answers[1] and np.shape(answers[0]) == (1, 32)
    translated = np.load(io.BytesIO(base64.b64decode(answers[2][0]["image"])))["image"]
    assert translated.shape == (1, 20, 24) and answers[2][0]["unit"] == "reflectance"
    assert np.shape(answers[3]) == (1, 32)
    nothing = "`inputs` must be an image or {sensor: image}, got nothing"
    for answer, said in zip(answers[4:], [*(entry[2] for entry in refused()), nothing, nothing], strict=True):
        assert set(answer) == {"error"} and said in answer["error"], (answer, said)


def test_the_handler_has_limits(far):
    pages, deep, lines = far["handler"]["tester/classifier#odd"]
    assert "`inputs` must be at most 1 MiB unpacked, got 1 MiB with 'rgb'" in pages["error"]
    assert "must be a picture of 8 bits, got one of mode 'I;16'" in deep["error"]
    assert [entry["label"] for entry in lines][:2] == [
        entry["label"] for entry in far["handler"]["tester/classifier"][0]
    ]
    assert far["handler"][f"{REPO}#tensors"] == far["handler"][REPO][:1]
    for answer, size in zip(far["handler"][f"{REPO}#pixels"], ("128 x 128", "40 x 40", "128 x 128"), strict=True):
        assert f"must have at most 30 x 30 pixels, got {size}" in answer["error"]
    several, packed, together, strange = far["handler"][f"{REPO}#bytes"]
    assert "`inputs` must be at most 1 MiB unpacked, got 1 MiB with 's2'" in together["error"]
    assert "`inputs` must be of the sensors of this checkpoint (dsm, rgb, s1, s2), got 'skysat'" in strange["error"]
    assert "`inputs` must be at most 1 MiB, got 2 MiB with 's2'" in several["error"]
    assert "`inputs` must be at most 1 MiB unpacked, got 4 MiB with 's1'" in packed["error"]


# ----------------------------------------------------------------------------------------------------------- data sets


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for source in ("harbour", "meadow"):
        with ShardWriter(folder / "data", source, ["rgb"]) as writer:
            for split, rows in (("train", 5), ("val", 2)):
                for number in range(rows):
                    pixels = rng.integers(0, 256, (3, 30, 30), dtype=np.uint8)
                    # Zeros at the end are what careless readers of binary columns lose.
                    pixels[:, -3:] = 0
                    image = ShardImage(pixels, ["red", "green", "blue"], "dn", 1 / 255, gsd=0.6)
                    writer.write(ShardRow(f"{split}{number}", source, split, f"{split}{number}", {"rgb": image}))
    (folder / "card.yaml").write_text("license: cc0-1.0\ntraining_data: [{name: Noise, license: cc0-1.0}]\n")
    return folder


def test_shards_are_pushed_with_their_card_and_streamed_back(hub, pushed, near):
    assert pushed[2]["shards"][0] == 0, pushed[2]["shards"][2]
    files = hub.files("tester/shards", "dataset")
    assert sorted(files) == [
        "README.md",
        *(f"data/{source}/{split}-00000.parquet" for source in ("harbour", "meadow") for split in ("train", "val")),
    ]
    card = files["README.md"].decode()
    assert "| harbour | train | 5 | 5 | rgb |" in card
    assert "| harbour | `rgb` | red, green, blue | dn | uint8 | 0.6 m |" in card and "license: cc0-1.0" in card
    assert near["rows"] == {"harbour train": 5, "harbour val": 2, "meadow train": 5, "meadow val": 2}
    assert near["snippet"] == "harbour" and near["own reader"]
    command = "msgfm pretrain --data hf://datasets/tester/shards/data"
    assert command in card and len(near["found"]) == 2


# ----------------------------------------------------------------------------------------------------------- bad input


def test_folders_that_cannot_be_pushed(tmp_path):
    """Found out before the Hub is asked anything, which this process could not."""

    def fails(folder, match, repo="tester/x", error=ValueError, **options):
        with pytest.raises(error, match=match):
            push_to_hub(tmp_path / folder, repo, tell=lambda line: None, **options)

    fails("none", "`DIR` must be an existing folder, got '.*none'", error=FileNotFoundError)
    (tmp_path / "empty").mkdir()
    fails("empty", "`DIR` must hold a checkpoint .config.json. or shards, got '.*empty' without")
    save(tmp_path / "model", sensors=tiny_models.RGB)
    fails("model", "`REPO_ID` must be owner/name, got 'x'", "x")
    fails("model", "`REPO_ID` must be owner/name as the Hub has it, got 'me/x y'", "me/x y")
    fails("model", "`nothing.yaml` must be an existing file", error=FileNotFoundError, card=tmp_path / "nothing.yaml")
    (tmp_path / "model/preprocessor_config.json").rename(tmp_path / "aside.json")
    fails("model", "`DIR` must hold a model and its image processor, got '.*model' without preprocessor_config.json")
    (tmp_path / "aside.json").rename(tmp_path / "model/preprocessor_config.json")
    (tmp_path / "model/card.yaml").write_text("results: [{task: a, dataset: b, metric: c, value: 0.5}]")
    fails("model", "`results` must state value, n, seed, commit, command, origin")
    (tmp_path / "model/card.yaml").unlink()
    fails("model", "`HF_HUB_OFFLINE` must be unset to push, got it set", error=PushError)
    config = json.loads((tmp_path / "model/config.json").read_text())
    processor = json.loads((tmp_path / "model/preprocessor_config.json").read_text())
    band = processor["sensors"]["rgb"]["bands"][0]
    (tmp_path / "model/preprocessor_config.json").write_text(
        json.dumps({**processor, "sensors": {"rgb": {**processor["sensors"]["rgb"], "bands": [
            {**band, "mean": 0.9}, *processor["sensors"]["rgb"]["bands"][1:]]}}})
    )  # fmt: skip
    fails("model", "`sensors` of the processor and of the model must be equal, got different rgb")
    (tmp_path / "model/preprocessor_config.json").write_text(json.dumps(processor))
    (tmp_path / "model/run.json").write_text("{")
    fails("model", "`DIR` must hold readable JSON, got .*run.json")
    (tmp_path / "model/run.json").write_text("[]")
    fails("model", "`DIR` must hold a JSON object in run.json, got a list")
    (tmp_path / "model/run.json").unlink()
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    fails("model", "`DIR` must hold an msGFM checkpoint, got a model of type 'vit'")
    weights = (tmp_path / "model/model.safetensors").read_bytes()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/model.safetensors").write_bytes(weights[: len(weights) // 2])
    fails("model", "`DIR` must hold whole weights, got damaged ones")
    (tmp_path / "model/model.safetensors").write_bytes(weights)
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "architectures": ["SwinModel"]}))
    fails("model", "`DIR` must hold a MsGFMModel, .*, got SwinModel")
    (tmp_path / "model/model.safetensors").unlink()
    fails("model", "without model.safetensors")


def test_an_answer_that_no_retry_mends(tmp_path, monkeypatch):
    """Where the Hub says no for a reason of its own, that reason is passed on, at once."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    for status, match in (
        (404, "`REPO_ID` must exist and be yours to see"),
        (400, "must take the push, got 400 when tr"),
    ):
        request = httpx2.Request("POST", "http://localhost/api")
        error = HfHubHTTPError("Too long a name", response=httpx2.Response(status, request=request))
        calls = []

        def refuse(*arguments, error=error, calls=calls, **options):
            calls.append(arguments)
            raise error

        monkeypatch.setattr("msgfm_hf.hub.push.HfApi.create_repo", refuse)
        save(tmp_path / "model", sensors=tiny_models.RGB)
        with pytest.raises(PushError, match=match):
            push_to_hub(tmp_path / "model", "tester/x", tell=lambda line: None)
        assert len(calls) == 1
