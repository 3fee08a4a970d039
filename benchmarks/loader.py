"""What the loader costs: CPU time per 13 x 256 x 256 image from raw shards to a cropped batch.

    python benchmarks/loader.py [--images 192] [--repeats 7]

Rows are read in the permuted order of training, cropped to 192 x 192, flipped and stacked, in the stored uint16,
without checksums, as after the first epoch. Beside it: copying as many crops from a memory map, which is hard to beat.
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
from msgfm_hf.data.mixture import MixtureDataset, SourceOrder
from msgfm_hf.data.shards import ShardImage, ShardRow, ShardSource, ShardWriter

SHAPE, CROP = (13, 256, 256), 192


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


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=192, help="images in the shards (default 192)")
    parser.add_argument("--repeats", type=int, default=7, help="passes over them (default 7)")
    arguments = parser.parse_args()
    paired.restart_with_settings()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        flat = write_images(Path(folder), arguments.images)
        source = ShardSource(Path(folder) / "images")
        order = SourceOrder(source.row_groups, source.name, 0)
        dataset = MixtureDataset([source], [order], CROP, 0)
        passes = iter(range(1, 10**6))

        def load():
            start = next(passes) * arguments.images
            for first in range(start, start + arguments.images, 32):
                collate(dataset.__getitems__([(0, position) for position in range(first, first + 32)]))

        def copy():
            for first in range(0, arguments.images, 32):
                np.stack([flat[(first + n) % arguments.images, :, 32:-32, 32:-32] for n in range(32)])

        # The first epoch verifies checksums; it is over after this.
        dataset.__getitems__([(0, position) for position in range(arguments.images)])
        seconds = paired.measure({"load": load, "copy": copy}, arguments.repeats)
        milliseconds = [1000 * value / arguments.images for value in seconds["load"]]
        found = paired.Ratio(statistics.median(milliseconds), min(milliseconds), max(milliseconds))
        paired.heading("Loader, 13 x 256 x 256 uint16 from raw shards -> 13 x 192 x 192, batches of 32")
        paired.row("CPU milliseconds per image, without verification", found, 1.0, 0.4)
        print(f"| the same over a bare copy from a memory map | {paired.ratio(seconds, 'load', 'copy')} | | | |")


if __name__ == "__main__":
    main()
