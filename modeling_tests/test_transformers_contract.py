"""Every msGFM class passes the tests that Transformers has for its own models.

Those tests are not part of the installed package. pip fetches the source archive of the same version, once, into the
user's cache folder; nothing of it is kept in this repository. `transformers_contract.py` says what runs.
"""

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

import msgfm_hf

ROOT = Path(__file__).parent.parent
VERSION = importlib.metadata.version("transformers")
HEADING = "## Transformers' own tests"

MIXINS = ("test_modeling_common.py", "test_backbone_common.py", "test_configuration_common.py")
# Laid out as in Transformers' repository, since the mixins import each other from there. The archive lacks the modules
# that three of their imports name: tests of export and of generation, which no model here has, and a dictionary of
# values that every configuration must take.
LAYOUT = {
    "pytest.ini": "[pytest]\nfilterwarnings = ignore\n",
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/models/__init__.py": "",
    "tests/models/msgfm/__init__.py": "",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": textwrap.dedent(
        """
        config_common_kwargs = {
            "return_dict": False,
            "output_hidden_states": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "id2label": {0: "water", 1: "land", 2: "ice"},
            "label2id": {"water": 0, "land": 1, "ice": 2},
            "problem_type": "regression",
        }
        """
    ),
}


class Report(NamedTuple):
    """What became of each test, `Class.test_name`; one that was skipped for one model of several counts as skipped."""

    passed: list[str]
    failed: list[str]
    skipped: dict[str, list[str]]  # by reason
    log: str

    @property
    def summary(self) -> str:
        skipped = len({name for names in self.skipped.values() for name in names})
        ran = len(self.passed) + len(self.failed)
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return f"{ran + skipped} collected, {ran} ran, {len(self.passed)} passed{failed}, {skipped} skipped"

    @property
    def table(self) -> list[str]:
        """The skips as rows of CONTRIBUTING.md."""
        rows = ["| reason | n | tests |", "|---|---|---|"]
        for reason, names in sorted(self.skipped.items()):
            named = ", ".join(f"`{name.partition('.test_')[2]}`" for name in sorted(names))
            rows.append(f"| {reason} | {len(names)} | {named} |")
        return rows


def fetch_archive() -> Path:
    """The source archive of the installed Transformers, from the cache or else from the package index."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msgfm_hf"
    archive = folder / f"transformers-{VERSION}.tar.gz"
    if archive.is_file():
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    # pip builds the metadata of what it downloads, in an environment of its own: this one need not have setuptools.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "transformers", f"transformers=={VERSION}", "--dest"]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        run = subprocess.run([*command, temporary], capture_output=True, text=True)
        if run.returncode:
            pytest.fail(
                "Transformers' own tests must be fetched once from the package index, and that failed. Run this where "
                f"there is one: {shlex.join([*command, str(folder)])}\n{run.stdout}{run.stderr}",
                pytrace=False,
            )
        os.replace(Path(temporary) / archive.name, archive)
    return archive


def run_pytest(folder: Path, *arguments: str) -> Report:
    """Run pytest in a process and folder of its own: neither the options nor the plugins of this project apply."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(msgfm_hf.__file__).parents[1]),
        "PYTEST_ADDOPTS": "",
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_TEST_DEVICE": "cpu",
        "RUN_SLOW": "no",
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "--junitxml=report.xml"]
    run = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=900,
    )
    assert (folder / "report.xml").is_file(), run.stdout
    passed, failed, skipped = [], [], defaultdict(set)
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        name = f"{case.get('classname').rpartition('.')[2]}.{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif case.find("skipped") is not None:
            for skip in case.findall("skipped"):
                # One reason for all classes that it is said of.
                reason = re.sub(r"<class '[\w.]+'>|\bMsGFM\w+", "CLASS", skip.get("message"))
                skipped[reason].add(name)
        else:
            passed.append(name)
    assert bool(run.returncode) == bool(failed), run.stdout
    return Report(passed, failed, {reason: sorted(names) for reason, names in skipped.items()}, run.stdout)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Transformers' tests, run once."""
    folder = tmp_path_factory.mktemp("contract")
    for path, text in LAYOUT.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    with tarfile.open(fetch_archive()) as archive:
        for name in MIXINS:
            (folder / "tests" / name).write_bytes(archive.extractfile(f"transformers-{VERSION}/tests/{name}").read())
    contract = (ROOT / "modeling_tests" / "transformers_contract.py").read_bytes()
    (folder / "tests" / "models" / "msgfm" / "test_modeling_msgfm.py").write_bytes(contract)
    return run_pytest(folder, "tests/models")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_transformers_own_tests_pass_on_every_class(report, capsys):
    with capsys.disabled():
        print(f"\nTransformers {VERSION}, its own tests: {report.summary}")
    assert not report.failed, report.log
    # That every public class is there, and that the mixins were.
    assert {
        "MsGFMModelTest.test_every_public_model_is_tested",
        "MsGFMModelTest.test_config",
        "MsGFMModelTest.test_training",
        "MsGFMBackboneTest.test_backbone_outputs",
    } <= set(report.passed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_contributing_lists_what_is_skipped_and_why(report):
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split(f"{HEADING}\n")[1].split("\n## ")[0]
    listed = [line for line in section.splitlines() if line.startswith("|")]
    assert listed == report.table, "The table of CONTRIBUTING.md should be:\n" + "\n".join(report.table)
    assert report.summary in " ".join(section.split()), f"CONTRIBUTING.md should say: {report.summary}"


def test_a_failure_or_a_skip_for_one_class_of_several_is_seen(tmp_path):
    planted = """
        import unittest

        class Planted(unittest.TestCase):
            def each(self, act):
                for name in ("MsGFMOne", "MsGFMTwo"):
                    with self.subTest(name):
                        act(name)

            def test_sound(self):
                self.each(lambda name: None)

            def test_broken(self):
                self.each(lambda name: self.assertEqual(name, "MsGFMOne"))

            def test_left_out(self):
                self.each(lambda name: self.skipTest(f"{name} has none, <class 'a.b.MsGFMTwo'> neither"))

            def test_half_left_out(self):
                self.each(lambda name: name == "MsGFMOne" or self.skipTest(f"{name} is slow"))
    """
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_planted.py").write_text(textwrap.dedent(planted))
    report = run_pytest(tmp_path)
    assert (report.passed, report.failed) == (["Planted.test_sound"], ["Planted.test_broken"])
    assert report.table[2:] == [
        "| CLASS has none, CLASS neither | 1 | `left_out` |",
        "| CLASS is slow | 1 | `half_left_out` |",
    ]
    assert report.summary == "4 collected, 2 ran, 1 passed, 1 failed, 2 skipped"


def test_where_the_index_does_not_answer_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said = rf"-m pip download .*--no-binary transformers transformers=={re.escape(VERSION)} --dest \S+/msgfm_hf"
    with pytest.raises(pytest.fail.Exception, match=said):
        fetch_archive()
    assert list((tmp_path / "msgfm_hf").iterdir()) == []
