"""Million-AID (Long et al. 2021): a million RGB JPEG pictures of 0.5 to 153 m and of all sizes.

Layout: `train/<l1>/<l2>[/<l3>]/<picture>.jpg`, 10,000 pictures whose folders are their classes, and `test/...`, about
990,000 without labels. Pictures have no place on the map.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from msgfm_hf.data.archive import Archive, Item, Listing, Reading, existing_folder, find_files
from msgfm_hf.data.geopile import PICTURES, VAL_SHARE, read_rgb_item
from msgfm_hf.data.splits import hashed_fraction

_PARTS = ("test", "train")


@dataclass(frozen=True)
class MillionAid(Archive):
    """Reader of Million-AID.

    Its splits are those of a benchmark of classes. For masked image modelling, which needs no labels, both parts
    train, but for 1 % of the pictures by a hash of their path, which validate (no places are known: see `GeoPile`).
    Pictures of `train` keep their classes, from the general to the special, as labels.

    Pictures become 8-bit RGB, reduced to at most 1024 pixels on a side (`read_picture`); the manifest counts them.

    Args:
        root (`Path`): the folder with `train` and `test`, or with one of them.
    """

    root: Path

    source = "millionaid"
    sensors = ("rgb",)

    def options(self) -> dict:
        return {}

    def list_items(self) -> Listing:
        existing_folder(self.root, "train/<l1>/<l2>/<picture>.jpg and test/<picture>.jpg")
        parts = [part for part in _PARTS if (self.root / part).is_dir()]
        items = []
        for path in find_files(self.root, parts, PICTURES):
            split = "val" if hashed_fraction(path) < VAL_SHARE else "train"
            items.append(Item(path, split, path, (path,)))
        counts = Counter(item.key.split("/")[0] for item in items)
        note = "pictures by official part, all for training without labels: " + ", ".join(
            f"{part} {counts[part]}" for part in _PARTS
        )
        return Listing(items, notes=[note])

    def read(self, item: Item) -> Reading:
        part, *classes, _ = item.key.split("/")
        return read_rgb_item(self, self.root, item, labels=classes if part == _PARTS[1] and classes else None)
