"""The test world: one thread, no network, no GPU; real samples come from `MSGFM_SAMPLE_DATA`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

# Here and not in a fixture: a module's own fixtures run before it, and sums depend on the number of threads.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_world():
    """Tests share two cores, and a test's numbers must not depend on the one before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder of real imagery; the one skip this project allows."""
    if "MSGFM_SAMPLE_DATA" not in os.environ:
        pytest.skip("MSGFM_SAMPLE_DATA is unset: set it to the folder of real samples")
    return Path(os.environ["MSGFM_SAMPLE_DATA"]).resolve()


@pytest.fixture
def msgfm(capsys, monkeypatch):
    """Run a command as the shell does: the exit code, and what it wrote to both streams."""

    from msgfm_hf.cli import main

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["msgfm", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
