"""SEN12MS (Schmitt et al. 2019): 180,662 pairs of Sentinel-1 and Sentinel-2 L1C, 256 x 256 pixels of 10 m.

Layout: `ROIs1158_spring/s1_1/ROIs1158_spring_s1_1_p30.tif`, with `s2_1/...s2_1_p30.tif` beside it. Sentinel-1 is VV and
VH, float32, in decibels; Sentinel-2 has 13 bands, uint16, of products before baseline 04.00, so without offset. The
land cover (`lc_1`) is not read. Patches of a scene overlap by half: scenes are the smallest places that can be split.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from msgfm_hf.data.archive import (
    Archive,
    Item,
    Listing,
    Reading,
    check_image,
    check_pair,
    existing_folder,
    find_files,
)
from msgfm_hf.data.geotiff import read_image, wgs84_bounds
from msgfm_hf.data.shards import ShardRow
from msgfm_hf.data.splits import hashed_fraction
from msgfm_hf.model.sensors import SENSORS

_NAME = re.compile(r"(ROIs\d+_(spring|summer|fall|winter))/(s1|s2|lc)_(\d+)/\1_\3_\4_p(\d+)\.tif")
_SIZE = (256, 256)
_DTYPES = {"s1": "float32", "s2": "uint16"}
# Season and number: the hold-out of the authors, which their test list consists of
# (schmitt-muc/SEN12MS, splits/SEN12MS_holdOutScenes.txt).
_TEST_SCENES = {
    "spring": (15, 17, 63, 97, 124, 146),
    "summer": (15, 19, 43, 72, 79, 104, 131),
    "fall": (30, 35, 39, 47, 61, 120, 141, 144),
    "winter": (32, 64, 107, 135, 146),
}
# The test split of SEN12MS-CR, whose regions of interest are also here (UnCRtainTS).
_CR_TEST_SCENES = {"spring": (31, 44, 106, 123, 140), "summer": (73, 119), "fall": (139,), "winter": (63, 108)}
# Damaged radar image, left out of the authors' lists too.
_BAD_PATCHES = ("ROIs1868_summer_146_p202",)
_VAL_SHARE = 0.05
_PUBLISHED_SOURCE = "SEN12MS toolbox, training list (radar clipped to -25..0 dB)"


@dataclass(frozen=True)
class Sen12MS(Archive):
    """Reader of SEN12MS.

    The 26 hold-out scenes of the authors are `test`; `val` is 5 % of the other scenes, by a hash of their name, so that
    a scene is on the same side whatever else is unpacked. Pixels that are not finite stay NaN and count as invalid; a
    patch with less than half of its pixels valid is bad.

    Args:
        root (`Path`): the folder with `ROIs1158_spring` and so on.
        keep_cr_test (`bool`): keep the ten scenes that are the test split of SEN12MS-CR. By default they are left out,
            so that cloud removal can be tested on them.
    """

    root: Path
    keep_cr_test: bool = False

    source = "sen12ms"
    sensors = ("s1", "s2")
    levels = {"s2": "l1c"}
    published = {
        "s1": {"source": _PUBLISHED_SOURCE, "bands": {"VV": (-11.76858, 4.525339), "VH": (-18.294598, 4.3586307)}},
        "s2": {
            "source": _PUBLISHED_SOURCE,
            "bands": {
                "B02": (1226.4215, 741.6254),
                "B03": (1137.3799, 740.883),
                "B04": (1139.6792, 960.1045),
                "B05": (1350.9973, 946.76056),
                "B06": (1932.9058, 985.52747),
                "B07": (2211.1584, 1082.4341),
                "B08": (2154.9846, 1057.7628),
                "B8A": (2409.1128, 1136.1942),
                "B11": (2001.8622, 1132.7898),
                "B12": (1356.0801, 991.48016),
            },
        },
    }

    def options(self) -> dict:
        return {"keep_cr_test": self.keep_cr_test}

    def list_items(self) -> Listing:
        layout = "ROIs1158_spring/s1_1/ROIs1158_spring_s1_1_p30.tif and so on"
        seasons = [path.name for path in existing_folder(self.root, layout).glob("ROIs*_*") if path.is_dir()]
        left_out, patches = Counter(), {}
        for path in find_files(self.root, seasons, (".tif",)):
            found = _NAME.fullmatch(path)
            if found is None:
                left_out["files not named like an image of SEN12MS"] += 1
            elif found[3] in _DTYPES:
                region, season, _, scene, patch = found.groups()
                patches[f"{region}_{scene}_p{patch}"] = (region, season, scene, patch)
        items = []
        for key, (region, season, scene, patch) in patches.items():
            if key in _BAD_PATCHES:
                left_out["known bad patch (damaged radar image)"] += 1
                continue
            # Numbers are compared, not text: scene 1 is not scene 106.
            if int(scene) in _CR_TEST_SCENES[season] and not self.keep_cr_test:
                left_out["patches of the ten test scenes of SEN12MS-CR (--keep-cr-test keeps them)"] += 1
                continue
            group = f"{region}_{scene}"
            if int(scene) in _TEST_SCENES[season]:
                split = "test"
            else:
                split = "val" if hashed_fraction(group) < _VAL_SHARE else "train"
            paths = tuple(f"{region}/{sensor}_{scene}/{region}_{sensor}_{scene}_p{patch}.tif" for sensor in _DTYPES)
            items.append(Item(key, split, group, paths))
        return Listing(items, dict(left_out))

    def read(self, item: Item) -> Reading:
        images = {}
        for path, (sensor, dtype) in zip(item.paths, _DTYPES.items(), strict=True):
            spec = SENSORS[sensor]
            images[sensor] = read_image(self.root / path, sensor, names=spec.band_names, offset_dn=0)
            check_image(images[sensor], sensor, path, dtype, _SIZE)
        check_pair(images, item.key)
        bounds = wgs84_bounds(images["s2"])
        row = ShardRow(item.key, self.source, item.split, item.group_id, images, pair_id=item.key, bounds=bounds)
        return Reading(row)
