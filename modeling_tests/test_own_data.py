"""A stranger with folders of GeoTIFFs: the commands of the README's section on own data run as they stand there."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.merge import merge
from rasterio.windows import Window
from transformers import AutoModel

from msgfm_hf.data.shards import ShardSource

ROOT = Path(__file__).parent.parent
COMMANDS = re.findall(r"<!-- test: own data, (\w+) -->\n```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
CHIP = 112


def write_like(path, source, pixels, descriptions=None, **changes):
    profile = {name: value for name, value in source.profile.items() if not name.startswith("block")} | changes
    with rasterio.open(path, "w", **profile) as file:
        file.write(pixels)
        if descriptions:
            file.descriptions = descriptions


@pytest.fixture(scope="module")
def folder(sample_data, tmp_path_factory):
    """What the section describes: chips of Sentinel-1 and -2 with a table, an orthophoto and a surface model."""
    root = tmp_path_factory.mktemp("stranger")
    lines = []
    for sensor, layer in (("s1", "S1RTC"), ("s2", "S2L2A")):
        (root / "chips" / sensor).mkdir(parents=True)
        for number, place in enumerate(sorted((sample_data / "s1s2_terramesh").iterdir())):
            with rasterio.open(place / f"{layer}.tif") as source:
                for part in range(4):
                    key, window = f"{place.name}_{part}", Window(part % 2 * CHIP, part // 2 * CHIP, CHIP, CHIP)
                    placed = {"width": CHIP, "height": CHIP, "transform": source.window_transform(window)}
                    path = root / "chips" / sensor / f"{key}.tif"
                    write_like(path, source, source.read(window=window), source.descriptions, **placed)
                    lines.append((key, place.name, ("sea", "savanna", "snow", "fields")[number]))
    with open(root / "chips/chips.csv", "w", newline="") as file:
        csv.writer(file).writerows([("key", "region", "cover"), *dict.fromkeys(lines)])
    for kind, name, empty in (("rgb", "ortho.tif", 0), ("dsm", "dsm.tif", np.nan)):
        files = sorted((sample_data / "rgb_dsm_autzen").glob(f"*/*_{kind}.tif"))
        pixels, transform = merge(files, nodata=empty)
        options = {"width": pixels.shape[2], "height": pixels.shape[1], "transform": transform, "tiled": True}
        if kind == "rgb":
            pixels = np.concatenate([pixels, np.uint8(255) * pixels.any(axis=0, keepdims=True)])
            options |= {"count": 4, "photometric": "RGB", "alpha": "yes"}
        with rasterio.open(files[0]) as source:
            write_like(root / name, source, pixels, **options)
    return root


def test_the_section_is_there():
    assert [name for name, _ in COMMANDS] == ["chips", "scenes", "pretraining"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_run_as_they_stand_and_end_in_a_model(folder):
    bins = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": bins, "OMP_NUM_THREADS": "1"}
    said = {}
    for name, code in COMMANDS:
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{code}\n{ran.stdout}\n{ran.stderr}"
        said[name] = ran.stdout
    assert "16 keys have every sensor" in said["chips"] and "Next: msgfm inspect shards/fields" in said["chips"]
    assert "blocks: 4 x 4 tiles, 307.2 m, rounded up from 300 m" in said["scenes"]
    assert "places in more than one split: none" in said["pretraining"]

    # A place is in one split, with its label and its pixels.
    rows = [row for split in ("train", "val", "test") for row in _rows(folder / "shards/fields", split)]
    assert len(rows) == 16 and {tuple(row["labels"]) for row in rows} == {
        ("sea",),
        ("savanna",),
        ("snow",),
        ("fields",),
    }
    for row in rows:
        for sensor, image in row["images"].items():
            with rasterio.open(folder / f"chips/{sensor}/{row['key']}.tif") as file:
                assert np.array_equal(image.pixels, file.read())
    images = next(iter(_rows(folder / "shards/village", "train")))["images"]
    assert images["rgb"].transform == images["dsm"].transform and images["rgb"].gsd == 0.6

    model = AutoModel.from_pretrained(folder / "runs/mine")
    assert sorted(model.config.sensors) == ["dsm", "rgb", "s1", "s2"]


def _rows(path, split):
    source = ShardSource(path, split)
    return [source.read(number) for number in range(len(source))]
