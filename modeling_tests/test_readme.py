"""The README keeps its word: its snippets run, and what its map names exists."""

import ast
import re
from pathlib import Path

import pytest

import msgfm_hf
from msgfm_hf.model.sensors import SENSORS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"<!-- test: ([\w ]+) -->\n```python\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    """The state a reader has after the quickstart: a checkpoint of four sensors in runs/quickstart."""
    folder = tmp_path_factory.mktemp("reader")
    config = msgfm_hf.MsGFMConfig(
        sensors={sensor: SENSORS[sensor].to_dict() for sensor in ("rgb", "s2", "s1", "dsm")},
        **{"embed_dim": 48, "depths": [2, 2, 6], "num_heads": [2, 4, 8], "num_experts": 4, "mask_patch_size": 16},
    )
    msgfm_hf.MsGFMForPreTraining(config).save_pretrained(folder / "runs/quickstart")
    msgfm_hf.MsGFMImageProcessor.from_config(config).save_pretrained(folder / "runs/quickstart")
    return {"__folder__": folder}


def test_every_python_snippet_is_tested():
    assert README.count("```python") == len(SNIPPETS) > 0


@pytest.mark.parametrize("name, code", SNIPPETS, ids=[name for name, _ in SNIPPETS])
def test_snippets_run_one_after_the_other(name, code, namespace, monkeypatch, capsys):
    monkeypatch.chdir(namespace["__folder__"])
    exec(compile(code, f"README, {name}", "exec"), namespace)
    if name == "ten lines":
        assert namespace["features"].shape == (1, 192)
    if name == "explain":
        assert "VV" in capsys.readouterr().out
    if name == "heads":
        assert [tuple(m.shape[1:]) for m in namespace["maps"]] == [(48, 30, 34), (96, 15, 17), (192, 8, 9)]
        assert namespace["logits"].shape == (1, 5)
    if name == "pipelines":
        assert [v.shape for v in namespace["vectors"]] == [(1, 192)] * 2
        assert namespace["optical"].shape == (2, 120, 133)
    if name == "trainer":
        assert namespace["trainer"].state.global_step == 1 and namespace["best"]["label"] in ("field", "forest")
    if name == "sensor":
        assert "skysat nir <- s2 B08, 22 nm" in capsys.readouterr().out
        assert "skysat" in namespace["model"].config.sensors and "skysat" in namespace["processor"].sensors


def defined(file):
    """Names of the functions and classes at the top of a file."""
    tops = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, tops)}


def test_the_papers_map_names_code_and_tests_that_exist():
    """Equation, table or section -> function or recipe -> test, each where the row says it is."""
    rows = [line for line in README.splitlines() if line.startswith("|") and "::test_" in line]
    assert len(rows) >= 10
    for row in rows:
        _, _, code, tests, _ = row.split("|")
        for column, folder in ((code, "src/msgfm_hf"), (tests, "modeling_tests")):
            places = re.findall(r"`([\w./]+?)(?:::(\w+))?`", column)
            assert places, row
            for file, name in places:
                assert (ROOT / folder / file).is_file(), file
                assert not name or name in defined(ROOT / folder / file), f"{file}::{name}"
