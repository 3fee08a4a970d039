"""What the loader costs: CPU time from raw shards to cropped samples, of checksums, and of mixing sources.

    python benchmarks/loader.py [--images 192] [--repeats 7]

First table: rows of 13 x 256 x 256 are read in the permuted order of training, cropped to 192 x 192, flipped and
stacked, in the stored uint16, without checksums, as after the first epoch. Beside it: copying as many crops from a
memory map, which is hard to beat; and what the first epoch pays besides, for the checksums of all pages.

Second table: what a sample costs because it is drawn from a mixture of three sources (sampler, permuted order, seeded
crops and flips, all that it carries), over reading the same rows and cutting the same crops in a plain loop. The
images are tiny, since that does not depend on their size and a difference of small times is sharper.

The only figures here that are times and not ratios; they are CPU times of one thread.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import paired
import torch

from msgfm_hf import SENSORS
from msgfm_hf.data.batch import collate
from msgfm_hf.data.mixture import MixtureDataset, MixtureSampler, SourceOrder, crop, draw_window
from msgfm_hf.data.shards import ShardImage, ShardRow, ShardSource, ShardWriter

SHAPE, CROP = (13, 256, 256), 192
SMALL, SMALL_CROP, SMALL_ROWS, SMALL_BATCHES = (3, 24, 24), 16, 512, [16, 8, 4]


def write_images(folder: Path, count: int) -> np.memmap:
    """Shards of random images, and the same images as one memory map."""
    generator = np.random.default_rng(0)
    flat = np.memmap(folder / "flat", dtype=np.uint16, mode="w+", shape=(count, *SHAPE))
    bands = SENSORS["s2"].band_names
    with ShardWriter(folder, "images", ["s2"], {"s2": "l1c"}) as writer:
        for number in range(count):
            flat[number] = generator.integers(0, 10_000, SHAPE, dtype=np.uint16)
            image = ShardImage(np.array(flat[number]), bands, "dn", 1e-4, 0.0, nodata=None)
            writer.write(ShardRow(f"{number:05d}", "images", "train", "place", {"s2": image}))
    flat.flush()
    return flat


def per_image(seconds: dict[str, list[float]], images: int, name: str, without: str | None = None) -> paired.Ratio:
    """CPU milliseconds per image of one function, or of what it takes longer than another in the same repeat."""
    less = seconds[without] if without else [0.0] * len(seconds[name])
    found = [1000 * (one - other) / images for one, other in zip(seconds[name], less, strict=True)]
    return paired.Ratio(statistics.median(found), min(found), max(found))


def loading(folder: Path, images: int, repeats: int):
    """Print what reading costs, and checksums beside it."""
    flat = write_images(folder, images)
    source = ShardSource(folder / "images")
    order = SourceOrder(source.row_groups, source.name, 0)
    dataset = MixtureDataset([source], [order], CROP, 0)
    passes = iter(range(1, 10**6))

    def load():
        start = next(passes) * images
        for first in range(start, start + images, 32):
            collate(dataset.__getitems__([(0, position) for position in range(first, first + 32)]))

    def copy():
        for first in range(0, images, 32):
            np.stack([flat[(first + n) % images, :, 32:-32, 32:-32] for n in range(32)])

    def read(verify: bool):
        # A source of its own: what was verified is not verified again.
        fresh = ShardSource(folder / "images")
        for position in range(images):
            fresh.read(order[position], verify=verify)

    # The first epoch verifies checksums; it is over after this.
    dataset.__getitems__([(0, position) for position in range(images)])
    functions = {"load": load, "copy": copy, "read": lambda: read(False), "verify": lambda: read(True)}
    seconds = paired.measure(functions, repeats)
    paired.heading("Loader, 13 x 256 x 256 uint16 from raw shards -> 13 x 192 x 192, batches of 32")
    paired.row("CPU milliseconds per image, without verification", per_image(seconds, images, "load"), 1.0, 0.4)
    print(f"| the same over a bare copy from a memory map | {paired.ratio(seconds, 'load', 'copy')} | | | |")
    print(f"| opening the source and reading whole rows, alone | {per_image(seconds, images, 'read')} | | | |")
    print(
        f"| checksums of all pages, in the first epoch besides | {per_image(seconds, images, 'verify', 'read')} | | | |"
    )


def mixing(folder: Path, repeats: int):
    """Print what mixing sources costs per sample."""
    generator = np.random.default_rng(0)
    names = [f"source{number}" for number in range(len(SMALL_BATCHES))]
    for name in names:
        with ShardWriter(folder, name, ["rgb"]) as writer:
            for number in range(SMALL_ROWS):
                pixels = generator.integers(0, 256, SMALL, dtype=np.uint8)
                image = ShardImage(pixels, SENSORS["rgb"].band_names, "dn", 1 / 255)
                writer.write(ShardRow(f"{number:05d}", name, "train", "place", {"rgb": image}))
    sources = [ShardSource(folder / name) for name in names]
    orders = [SourceOrder(source.row_groups, source.name, 0) for source in sources]
    dataset = MixtureDataset(sources, orders, SMALL_CROP, 0)
    # So that the longest source is seen once, and what is drawn is known beforehand.
    steps = SMALL_ROWS // max(SMALL_BATCHES)
    sampler = MixtureSampler(SMALL_BATCHES, steps)
    plan = []
    for batch in sampler:
        for index, position in batch:
            window = draw_window(*SMALL[1:], SMALL_CROP, 0, sources[index].name, position)
            plan.append((sources[index], orders[index][position], window))

    def mix():
        return [sample for batch in sampler for sample in dataset.__getitems__(batch)]

    def plain():
        return [crop(source.read(row)["images"]["rgb"], *window) for source, row, window in plan]

    for ours, theirs in zip(mix(), plain(), strict=True):
        np.testing.assert_array_equal(ours["images"]["rgb"]["pixels"], theirs["pixels"])
    seconds = paired.measure({"mix": mix, "plain": plain}, repeats)
    paired.heading(f"Mixing {len(sources)} sources, batches of {' + '.join(map(str, SMALL_BATCHES))}, tiny images")
    found = per_image(seconds, len(plan), "mix", "plain")
    print(f"| CPU milliseconds per sample over a plain loop | {found} | 0.05 | | ", end="")
    print("must |" if found.median <= 0.05 else "missed |")


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=192, help="images in the shards (default 192)")
    parser.add_argument("--repeats", type=int, default=7, help="passes over them (default 7)")
    arguments = parser.parse_args()
    paired.restart_with_settings()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        loading(Path(folder), arguments.images, arguments.repeats)
        mixing(Path(folder), 3 * arguments.repeats)


if __name__ == "__main__":
    main()
