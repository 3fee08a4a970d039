"""ben-ge (Mommert et al. 2023): BigEarthNet v1 with Sentinel-1 and heights, 590,326 patches of 1.2 km in Europe.

Layout: `BigEarthNet-v1.0/<patch>/<patch>_B02.tif` (Sentinel-2 L2A, a file per band, uint16 of 10, 20 or 60 m, without
offset) with `<patch>_labels_metadata.json`; `BigEarthNet-S1-v1.0/<s1>/<s1>_VV.tif` and `_VH.tif` (float32, decibels)
with a JSON that names the Sentinel-2 patch; `dem/<patch>_dem.tif` (Copernicus GLO-30 on the 10 m grid, int16, metres).
In ben-ge-8k the first folders are `sentinel-2` and `sentinel-1`. The name of the folder of heights is not documented.
"""

import csv
import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from msgfm_hf.data.archive import (
    Archive,
    Item,
    Listing,
    Reading,
    check_image,
    check_pair,
    existing_folder,
)
from msgfm_hf.data.geotiff import read_image, wgs84_bounds
from msgfm_hf.data.shards import ShardImage, ShardRow
from msgfm_hf.data.splits import hashed_fraction
from msgfm_hf.model.sensors import SENSORS

_FOLDERS = {
    "s2": ("BigEarthNet-v1.0", "sentinel-2"),
    "s1": ("BigEarthNet-S1-v1.0", "sentinel-1"),
}
_METADATA = "_labels_metadata.json"
_SIDE = 120
_GSD = 10
# Copernicus GLO-30 has no missing heights over land; this is what int16 products write where there is none.
_NO_HEIGHT = -32768
_SHARES = {"test": 0.1, "val": 0.1}
_STATISTICS_SOURCE = "BigEarthNet v1, whole (bigearthnet_common)"
_S2_STATISTICS = {
    "B01": (340.768, 554.813),
    "B02": (429.943, 572.416),
    "B03": (614.217, 582.879),
    "B04": (590.236, 675.887),
    "B05": (950.684, 729.898),
    "B06": (1792.463, 1096.015),
    "B07": (2075.468, 1273.454),
    "B08": (2218.946, 1365.456),
    "B8A": (2266.460, 1356.138),
    "B09": (2246.061, 1302.329),
    "B11": (1594.427, 1079.191),
    "B12": (1009.327, 818.867),
}

# The 19 classes of BigEarthNet-MM in the order of the nomenclature, and the CORINE classes they are made of.
CLASSES: dict[str, tuple[str, ...]] = {
    "Urban fabric": ("Continuous urban fabric", "Discontinuous urban fabric"),
    "Industrial or commercial units": ("Industrial or commercial units",),
    "Arable land": ("Non-irrigated arable land", "Permanently irrigated land", "Rice fields"),
    "Permanent crops": (
        "Vineyards",
        "Fruit trees and berry plantations",
        "Olive groves",
        "Annual crops associated with permanent crops",
    ),
    "Pastures": ("Pastures",),
    "Complex cultivation patterns": ("Complex cultivation patterns",),
    "Land principally occupied by agriculture, with significant areas of natural vegetation": (
        "Land principally occupied by agriculture, with significant areas of natural vegetation",
    ),
    "Agro-forestry areas": ("Agro-forestry areas",),
    "Broad-leaved forest": ("Broad-leaved forest",),
    "Coniferous forest": ("Coniferous forest",),
    "Mixed forest": ("Mixed forest",),
    "Natural grassland and sparsely vegetated areas": ("Natural grassland", "Sparsely vegetated areas"),
    "Moors, heathland and sclerophyllous vegetation": ("Moors and heathland", "Sclerophyllous vegetation"),
    "Transitional woodland, shrub": ("Transitional woodland/shrub",),
    "Beaches, dunes, sands": ("Beaches, dunes, sands",),
    "Inland wetlands": ("Inland marshes", "Peatbogs"),
    "Coastal wetlands": ("Salt marshes", "Salines"),
    "Inland waters": ("Water courses", "Water bodies"),
    "Marine waters": ("Coastal lagoons", "Estuaries", "Sea and ocean"),
}
_NO_CLASS = (
    "Road and rail networks and associated land",
    "Port areas",
    "Airports",
    "Mineral extraction sites",
    "Dump sites",
    "Construction sites",
    "Green urban areas",
    "Sport and leisure facilities",
    "Bare rock",
    "Burnt areas",
    "Intertidal flats",
)
_CLASS_OF = {corine: name for name, members in CLASSES.items() for corine in members}


@dataclass(frozen=True)
class BenGe(Archive):
    """Reader of ben-ge: Sentinel-1, 12 bands of Sentinel-2 L2A and heights on one grid of 120 x 120 pixels of 10 m.

    Bands of 20 and 60 m are repeated, pixel by pixel, to 10 m (nearest neighbour). Labels are the names of the 19
    classes of BigEarthNet-MM; a patch whose CORINE classes belong to none has an empty list.

    A place is a tile of the Sentinel-2 grid, named in the Sentinel-1 patch; all its dates have one `group_id`. Without
    lists 10 % of the tiles each, by a hash of their name, are val and test. Neighbouring tiles share a strip of up to
    10 km. The lists published with ben-ge deal patches at random: with them tiles are in several splits, which
    `msgfm inspect` says.

    Args:
        root (`Path`): the folder that holds those of the sensors.
        dem (`str`): the folder of heights, relative to `root`.
        splits (`dict[str, Path]`): by split, a list of Sentinel-2 patches, one per line or in the first column of a
            CSV. Patches in none of them are left out.
        without (`tuple[Path, ...]`): such lists of patches to leave out, for example with snow or clouds.

    Raises:
        ValueError: if a folder is missing, or a list is, or two lists have the same patch.
    """

    root: Path
    dem: str = "dem"
    splits: dict[str, Path] = dataclasses.field(default_factory=dict)
    without: tuple[Path, ...] = ()

    source = "ben_ge"
    sensors = ("dsm", "s1", "s2")
    levels = {"s2": "l2a"}
    published = {
        "s1": {"source": _STATISTICS_SOURCE, "bands": {"VV": (-12.61999, 5.11591), "VH": (-19.29045, 5.46443)}},
        "s2": {"source": _STATISTICS_SOURCE, "bands": _S2_STATISTICS},
    }

    def options(self) -> dict:
        return {"splits": sorted(self.splits), "without": [path.name for path in self.without]}

    def list_items(self) -> Listing:
        layout = f"{_FOLDERS['s2'][0]}, {_FOLDERS['s1'][0]} (or those of ben-ge-8k) and the folder --dem"
        folders = {"dem": self.dem}
        for part, names in _FOLDERS.items():
            folders[part] = next((name for name in names if (self.root / name).is_dir()), names[0])
        for folder in folders.values():
            existing_folder(self.root / folder, layout)
        listed = self._listed()
        unwanted = {patch: path.name for path in self.without for patch in _read_patches(path)}
        radar = self._radar(folders["s1"])
        optical = {path.name for path in (self.root / folders["s2"]).iterdir() if path.is_dir()}
        items, left_out = [], Counter()
        for patch in sorted(optical | set(radar)):
            if patch in unwanted:
                left_out[f"patches of the list {unwanted[patch]}"] += 1
            elif self.splits and patch not in listed:
                left_out[f"patches in none of the lists {', '.join(sorted(self.splits))}"] += 1
            else:
                # The tile is known from the radar image only; a patch without one is bad, and counted where it is read.
                s1 = radar.get(patch)
                tile = s1.rsplit("_", 3)[-3] if s1 else "unknown"
                paths = (f"{folders['s2']}/{patch}", f"{folders['s1']}/{s1}" if s1 else "")
                paths = (*paths, f"{folders['dem']}/{patch}_dem.tif")
                items.append(Item(patch, listed.get(patch) or _split_of(tile), tile, paths))
        return Listing(items, dict(left_out))

    def read(self, item: Item) -> Reading:
        if "" in item.paths:
            raise ValueError(
                f"`root` must hold a Sentinel-1 patch for {item.key}, got none whose JSON names it. Fetch it again."
            )
        s2, s1, dem = (self.root / path for path in item.paths)
        optical_facts, radar_facts = _read_facts(s2), _read_facts(s1)
        if radar_facts["corresponding_s2_patch"] != item.key:
            raise ValueError(
                f"`corresponding_s2_patch` of {s1.name} must be {item.key!r}, got "
                f"{radar_facts['corresponding_s2_patch']!r}. Fetch the radar images again."
            )
        optical = [_read_band(s2, "s2", band, "uint16") for band in _S2_STATISTICS]
        radar = [_read_band(s1, "s1", band, "float32") for band in SENSORS["s1"].band_names]
        height = SENSORS["dsm"]
        dsm = read_image(dem, height.id, names=height.band_names)
        dsm = dataclasses.replace(dsm, nodata=_NO_HEIGHT if dsm.nodata is None else dsm.nodata)
        check_image(dsm, height.id, dem, "int16", (_SIDE, _SIDE))
        images = {
            "s2": _stack(optical, optical_facts["acquisition_date"], item.key),
            "s1": _stack(radar, radar_facts["acquisition_time"], item.key),
            "dsm": dsm,
        }
        check_pair(images, item.key)
        labels = _classes(optical_facts["labels"], item.key)
        bounds = wgs84_bounds(images["s2"])
        return Reading(
            ShardRow(
                item.key,
                self.source,
                item.split,
                item.group_id,
                images,
                pair_id=item.key,
                bounds=bounds,
                labels=labels,
            )
        )

    def _listed(self) -> dict[str, str]:
        """`{patch: split}` of the lists."""
        listed: dict[str, str] = {}
        for split, path in self.splits.items():
            for patch in _read_patches(path):
                if listed.setdefault(patch, split) != split:
                    raise ValueError(
                        f"`splits` must name every patch once, got {patch} in {listed[patch]} and {split}. "
                        "Correct the lists."
                    )
        return listed

    def _radar(self, folder: str) -> dict[str, str]:
        """`{Sentinel-2 patch: Sentinel-1 patch}`; the names alone do not tell."""
        found = {}
        patches = sorted(path.name for path in (self.root / folder).iterdir() if path.is_dir())
        for s1 in tqdm(patches, desc="pairing", unit=" patches", leave=False):
            try:
                found[_read_facts(self.root / folder / s1)["corresponding_s2_patch"]] = s1
            except (ValueError, FileNotFoundError):
                # Its Sentinel-2 patch is left without radar, and will be counted as bad.
                continue
        return found


def _split_of(tile: str) -> str:
    fraction = hashed_fraction(tile)
    for split, share in _SHARES.items():
        if fraction < share:
            return split
        fraction -= share
    return "train"


def _read_patches(path: Path) -> list[str]:
    """The first column of a CSV with or without a header; patches have names that begin with the satellite."""
    if not Path(path).is_file():
        raise ValueError(f"`path` must be a list of patches, got no file {path}. Give one patch per line.")
    # Spreadsheets begin their files with a byte order mark.
    with open(path, newline="", encoding="utf-8-sig") as file:
        names = [row[0].strip() for row in csv.reader(file) if row]
    patches = [name for name in names if name.startswith("S2")]
    if not patches:
        raise ValueError(f"`path` must be a list of Sentinel-2 patches, got none in {path}. Give one patch per line.")
    return patches


def _read_facts(folder: Path) -> dict:
    path = folder / f"{folder.name}{_METADATA}"
    facts = json.loads(path.read_text(encoding="utf-8"))
    wanted = ("labels", "acquisition_time", "corresponding_s2_patch")
    if folder.name.startswith("S2"):
        wanted = ("labels", "acquisition_date")
    if not isinstance(facts, dict):
        raise ValueError(f"`{path.name}` must hold {', '.join(wanted)}, got {facts!r:.40}. Fetch it again.")
    missing = [name for name in wanted if name not in facts]
    if missing:
        raise ValueError(f"`{path.name}` must hold {', '.join(wanted)}, got no {', '.join(missing)}. Fetch it again.")
    return facts


def _read_band(folder: Path, sensor: str, band: str, dtype: str) -> ShardImage:
    """One band on the grid of 10 m."""
    spec = SENSORS[sensor]
    path = folder / f"{folder.name}_{band}.tif"
    image = read_image(path, sensor, names=[band], offset_dn=0)
    (native,) = (int(entry.gsd) for entry in spec.select([band]))
    check_image(image, f"{sensor} {band}", path, dtype, (_SIDE * _GSD // native,) * 2)
    factor = native // _GSD
    if factor == 1:
        return image
    x, dx, row_rotation, y, column_rotation, dy = image.transform or (0.0,) * 6
    return dataclasses.replace(
        image,
        pixels=image.pixels.repeat(factor, axis=1).repeat(factor, axis=2),
        transform=[x, dx / factor, row_rotation / factor, y, column_rotation / factor, dy / factor],
        gsd=_GSD,
    )


def _stack(bands: list[ShardImage], acquired: str, key: str) -> ShardImage:
    check_pair({image.bands[0]: image for image in bands}, key)
    first = bands[0]
    return dataclasses.replace(
        first,
        pixels=np.concatenate([image.pixels for image in bands]),
        bands=[image.bands[0] for image in bands],
        gsd=_GSD,
        datetime=acquired.replace(" ", "T"),
    )


def _classes(labels: list[str], key: str) -> list[str]:
    """The names among the 19 classes, in their order.

    Raises:
        ValueError: for a label that CORINE does not have.
    """
    unknown = [label for label in labels if label not in _CLASS_OF and label not in _NO_CLASS]
    if unknown:
        raise ValueError(f"`labels` of {key} must be CORINE classes, got {', '.join(unknown)}. Fetch the file again.")
    found = {_CLASS_OF[label] for label in labels if label in _CLASS_OF}
    return [name for name in CLASSES if name in found]
