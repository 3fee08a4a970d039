"""GeoPile (Mendieta et al. 2023, GFM): about 588,000 RGB pictures of 0.1 to 30 m out of five collections.

Layout: `GeoPileV0/<collection>/<class>/<picture>`, each collection an image folder. Pictures are 8-bit, without a place
on the map. RESISC45 is one of the collections: a model that saw it cannot be evaluated on it.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from msgfm_hf.data.archive import (
    Archive,
    Item,
    Listing,
    Reading,
    existing_folder,
    find_files,
    read_picture,
)
from msgfm_hf.data.shards import ShardImage, ShardRow
from msgfm_hf.data.splits import hashed_fraction
from msgfm_hf.model.sensors import SENSORS

PICTURES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")
# Places are not known, so that a lasting 1 % of the pictures is all that can be held out.
VAL_SHARE = 0.01
_FOLDER = "GeoPileV0"
_RESISC45 = "resisc45"
# In units of 0-255.
_RESISC45_STATISTICS = {
    "rgb": {
        "source": "RESISC45, one of the collections, training split (torchgeo)",
        "bands": {"red": (93.894, 51.849), "green": (97.112, 47.237), "blue": (87.568, 47.063)},
    }
}


@dataclass(frozen=True)
class GeoPile(Archive):
    """Reader of GeoPile.

    Pictures become 8-bit RGB of their own size (`read_picture`). Validation is 1 % of the pictures by a hash of their
    path. Collections and classes tell no places, and pictures of one place may fall on both sides: read validation on
    GeoPile as a check that training works, not as a test. Every picture is a group of its own.

    Args:
        root (`Path`): the folder `GeoPileV0`, or the one that holds it.
        without (`tuple[str, ...]`): collections to leave out; part of the folder's name, without case.

    Raises:
        ValueError: if the root has no collections, or none of one that is to be left out.
    """

    root: Path
    without: tuple[str, ...] = ()

    source = "geopile"
    sensors = ("rgb",)
    published = _RESISC45_STATISTICS

    def options(self) -> dict:
        return {"without": sorted(name.lower() for name in self.without)}

    def list_items(self) -> Listing:
        root = existing_folder(self._folder(), f"{_FOLDER}/<collection>/<class>/<picture>")
        collections = sorted(folder.name for folder in root.iterdir() if folder.is_dir() and folder.name[0] != ".")
        for name in self.without:
            if not any(name.lower() in collection.lower() for collection in collections):
                raise ValueError(
                    f"`without` must name a collection in {root}, got {name!r} and {', '.join(collections) or 'none'}. "
                    "Correct the name; upper and lower case are the same."
                )
        items, left_out, notes = [], Counter(), []
        for path in find_files(root, collections, PICTURES):
            collection = path.split("/")[0]
            if any(name.lower() in collection.lower() for name in self.without):
                left_out[f"pictures of {collection}, as asked for"] += 1
                continue
            split = "val" if hashed_fraction(path) < VAL_SHARE else "train"
            items.append(Item(path, split, path, (path,)))
        kept = Counter(item.key.split("/")[0] for item in items)
        notes.append("pictures by collection: " + ", ".join(f"{name} {count}" for name, count in sorted(kept.items())))
        if any(_RESISC45 in collection.lower() for collection in kept):
            notes.append(
                "RESISC45 is among the pictures, so it is no clean downstream set for what is trained on them; "
                f"`--without {_RESISC45}` leaves it out"
            )
        return Listing(items, dict(left_out), notes)

    def read(self, item: Item) -> Reading:
        return read_rgb_item(self, self._folder(), item)

    def _folder(self) -> Path:
        return self.root / _FOLDER if (self.root / _FOLDER).is_dir() else self.root


def read_rgb_item(archive: Archive, folder: Path, item: Item, labels: list[str] | None = None) -> Reading:
    """An item that is one picture without a place on the map, as a row of sensor `rgb`.

    Raises:
        ValueError: as `read_picture`.
    """
    (path,) = item.paths
    spec = SENSORS["rgb"]
    pixels, remarks = read_picture(folder / path)
    image = ShardImage(pixels, spec.band_names, "dn", spec.scale)
    return Reading(
        ShardRow(item.key, archive.source, item.split, item.group_id, {spec.id: image}, labels=labels), remarks
    )
