"""The mixture: which rows of which source come at which step, and the crops that leave the workers.

The only state of the data is how many batches were taken. Step t of rank r takes from every source the positions
[(t W + r) B, +B) of an endless shuffled order, and every random draw is seeded by its position. So nothing depends on
the number of workers, and a run resumes at any step, with any number of ranks, without a row lost or repeated.
"""

import bisect
import hashlib
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset, Sampler

from msgfm_hf.data.shards import BLOCK_ROW_GROUPS, CorruptShardError, ShardImage, ShardSource, valid_pixels


class SourceOrder:
    """An endless order over the rows of a source: every row once per epoch, each epoch in another order.

    Row groups are permuted over the whole epoch and rows within blocks of a few row groups, so that reading stays
    sequential enough. Nothing but the current block is held in memory.

    Args:
        row_groups (`list[tuple]`): `(file, row group, first row, rows)`, as in `ShardSource.row_groups`.
        name (`str`): the source's name; part of the seed.
        seed (`int`): the run's seed.
        block (`int`): row groups per block.
    """

    def __init__(self, row_groups: list[tuple], name: str, seed: int, block: int = BLOCK_ROW_GROUPS):
        self.seed = [seed, zlib.crc32(name.encode())]
        self.block = block
        self._first = np.array([first for _, _, first, _ in row_groups])
        self._rows = np.array([rows for _, _, _, rows in row_groups])
        self._length = int(self._rows.sum())
        self._epochs: dict[int, tuple[np.ndarray, list[int]]] = {}
        self._blocks: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> int:
        """The row at a position; the epoch is `position // len(self)`."""
        epoch, place = divmod(position, self._length)
        if epoch not in self._epochs:
            groups = np.random.default_rng([*self.seed, epoch, 1]).permutation(len(self._rows))
            starts = np.concatenate([[0], np.cumsum(self._rows[groups])[:-1]])[:: self.block]
            _keep_two(self._epochs, epoch, (groups, starts.tolist()))
        groups, starts = self._epochs[epoch]
        block = bisect.bisect_right(starts, place) - 1
        if (epoch, block) not in self._blocks:
            members = groups[block * self.block : (block + 1) * self.block]
            rows = np.concatenate([np.arange(self._first[g], self._first[g] + self._rows[g]) for g in members])
            rows = np.random.default_rng([*self.seed, epoch, block + 2]).permutation(rows)
            _keep_two(self._blocks, (epoch, block), rows)
        return int(self._blocks[epoch, block][place - starts[block]])


def _keep_two(cache: dict, key, value):
    # A batch may straddle a border, so the one before stays.
    while len(cache) > 1:
        cache.pop(next(iter(cache)))
    cache[key] = value


class MixtureSampler(Sampler):
    """Yields, batch by batch, the `(source, position)` pairs of one rank: a batch sampler for a `DataLoader`.

    The ranks take turns. Turn n holds, for every source i in order, the positions n B_i .. (n + 1) B_i - 1; rank r has
    the turns r, r + W, r + 2 W, ... after the first. So step t of a run is the turns t W to (t + 1) W - 1, with k
    batches per step t k W to (t + 1) k W - 1, and a run goes on with any other number of ranks where it stopped.

    Args:
        batch_sizes (`list[int]`): B_i, samples of each source per turn.
        stop (`int`): the turn to stop before.
        start (`int`): the turn to begin with, where a run resumes.
        rank, world_size (`int`): r and W.

    Raises:
        ValueError: for batch sizes below 1 or a rank outside the world.
    """

    def __init__(self, batch_sizes: list[int], stop: int, start: int = 0, rank: int = 0, world_size: int = 1):
        if not batch_sizes or min(batch_sizes) < 1:
            raise ValueError(f"`batch_sizes` must be at least 1 each, got {batch_sizes}. Drop a source to skip it.")
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must be in [0, {world_size}), got {rank}. Ranks count from 0.")
        self.batch_sizes = list(batch_sizes)
        self.turns = range(start + rank, max(stop, start), world_size)

    def __len__(self) -> int:
        return len(self.turns)

    def __iter__(self):
        for turn in self.turns:
            yield [
                (source, position)
                for source, size in enumerate(self.batch_sizes)
                for position in range(turn * size, (turn + 1) * size)
            ]


def steps_per_epoch(rows: list[int], batch_sizes: list[int], turns_per_step: int = 1) -> int:
    """Steps until the longest source has been seen once; shorter ones go round."""
    return max(math.ceil(n / (size * turns_per_step)) for n, size in zip(rows, batch_sizes, strict=True))


class MixtureDataset(Dataset):
    """Cropped and flipped samples in the stored dtype, by `(source, position)`.

    A fixed-size window is cut at random and mirrored along each axis with probability one half, the same for all
    sensors of a row. Mirroring is a symmetry of nadir imagery; for SAR it exchanges the side of the shadows, which is
    what the other orbit direction does too. Images smaller than the window are padded at the right and the bottom with
    invalid zeros. The draws are seeded by (seed, source name, position).

    Args:
        sources (`list[ShardSource]`): the sources.
        orders (`list[SourceOrder]`): their orders.
        image_size (`int`): the side of the crops in pixels.
        seed (`int`): the run's seed.
        max_bad (`int`): after more damaged rows than this in succession a sample comes without images, for the
            trainer to stop.

    Raises:
        ValueError: if orders and sources disagree, or the images of a row differ in size.
    """

    def __init__(
        self, sources: list[ShardSource], orders: list[SourceOrder], image_size: int, seed: int, max_bad: int = 16
    ):
        if [len(source) for source in sources] != [len(order) for order in orders]:
            raise ValueError(
                f"`orders` must cover the rows of `sources`, {[len(source) for source in sources]}, "
                f"got {[len(order) for order in orders]}. Build each from its source's `row_groups`."
            )
        self.sources, self.orders = sources, orders
        self.image_size, self.seed, self.max_bad = image_size, seed, max_bad

    def __getitem__(self, item: tuple[int, int]) -> dict:
        """One sample.

        Returns:
            `dict`: `source` (int), `position` (int), `key` (str), `group_id` (str), `images`: per sensor `pixels`
            `(C, image_size, image_size)` in the stored dtype, `valid` bool `(image_size, image_size)`, `scale` and
            `offset_dn` (physical = (stored + offset_dn) * scale), or `None` where no row could be read; `bad`:
            `(row, reason)` of every damaged row that this one stands in for.
        """
        index, position = item
        source, order = self.sources[index], self.orders[index]
        row, bad = None, []
        while row is None:
            number = order[position + len(bad)]
            try:
                row = source.read(number, verify=True)
            except CorruptShardError as error:
                bad.append((f"{source.name}[{number}]", str(error)))
                if len(bad) > self.max_bad:
                    return {"source": index, "position": position, "images": None, "bad": bad}
        height, width = _shared_size(row, source.path)
        window = draw_window(height, width, self.image_size, self.seed, source.name, position)
        images = {sensor: crop(image, *window) for sensor, image in row["images"].items()}
        return {
            "source": index,
            "position": position,
            "key": row["key"],
            "group_id": row["group_id"],
            "images": images,
            "bad": bad,
        }

    def __getitems__(self, items: list[tuple[int, int]]) -> list[dict]:
        return [self[item] for item in items]


def draw_window(
    height: int, width: int, image_size: int, seed: int, name: str, position: int
) -> tuple[int, int, int, int, int]:
    """Where to cut and how to mirror the sample at a position of a source: the arguments of `crop` after the image.

    A hash of (seed, name, position) decides; seeding a generator would take several times as long, and a sample's whole
    bookkeeping must not be felt.
    """
    digest = hashlib.blake2b(f"{seed} {name} {position}".encode(), digest_size=32).digest()
    draws = struct.unpack("<4Q", digest)
    top, left = draws[0] % (max(height - image_size, 0) + 1), draws[1] % (max(width - image_size, 0) + 1)
    return top, left, image_size, -1 if draws[2] % 2 else 1, -1 if draws[3] % 2 else 1


class EvaluationCrops:
    """The same crops every time: a grid without overlap, centred in each image, without flips.

    Whole crops only, so up to one crop less a pixel of each axis stays unseen; a smaller image is padded with invalid
    zeros. A damaged row raises: numbers must not depend on what could be read.

    Args:
        source (`ShardSource`): the source.
        image_size (`int`): the side of the crops in pixels.
        max_crops (`int`, *optional*): at most this many, spread evenly over the source and not its first rows.
        rows (`Sequence[int]`, *optional*): ascending numbers of the rows to cut; default all.
    """

    def __init__(
        self, source: ShardSource, image_size: int, max_crops: int | None = None, rows: Sequence[int] | None = None
    ):
        self.source, self.image_size = source, image_size
        # A source of millions of rows is not read through for a few crops.
        rows = spread(range(len(source)) if rows is None else rows, max_crops)
        self.ids = spread(
            [
                (number, top, left)
                for number, row in zip(rows, source.read_metadata(rows), strict=True)
                for top, left in grid_crops(*row["images"][source.sensors[0]]["shape"][1:], image_size)
            ],
            max_crops,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        """As `MixtureDataset`, with `source` 0, `position` a number of this crop alone and `id` (row, top, left)."""
        number, top, left = self.ids[index]
        row = self.source.read(number, verify=True)
        _shared_size(row, self.source.path)
        return {
            "source": 0,
            "position": (number << 40) + (top << 20) + left,
            "id": (number, top, left),
            "key": row["key"],
            "group_id": row["group_id"],
            "images": {sensor: crop(image, top, left, self.image_size) for sensor, image in row["images"].items()},
            "bad": [],
        }


def spread(members: Sequence, count: int | None) -> Sequence:
    """At most so many members, evenly spaced, the first and the last among them."""
    if count is None or len(members) <= count:
        return members
    return [members[number] for number in np.linspace(0, len(members) - 1, count).round().astype(int)]


def grid_crops(height: int, width: int, image_size: int) -> list[tuple[int, int]]:
    """Top left corners of a centred grid of whole crops, row by row; (0, 0) along an axis that is too short."""
    corners = []
    for length in (height, width):
        count = length // image_size
        first = (length - count * image_size) // 2
        corners.append([first + i * image_size for i in range(count)] or [0])
    return [(top, left) for top in corners[0] for left in corners[1]]


def crop(image: ShardImage, top: int, left: int, image_size: int, down: int = 1, across: int = 1) -> dict:
    """A square window as a sample of one sensor: `pixels`, `valid`, `scale`, `offset_dn`.

    `down` and `across` are -1 to mirror the rows or the columns. Padding comes after that, right and bottom. Without it
    the pixels are a view of the image's: `batch.collate` copies them, once.
    """
    window = image.pixels[:, top : top + image_size, left : left + image_size][:, ::down, ::across]
    pixels = np.asarray(window, image.pixels.dtype.newbyteorder("="))
    valid = valid_pixels(window, image.nodata)
    if valid.shape != (image_size, image_size):
        missing = [(0, image_size - length) for length in valid.shape]
        pixels, valid = np.pad(pixels, [(0, 0), *missing]), np.pad(valid, missing)
    return {"pixels": pixels, "valid": valid, "scale": image.scale, "offset_dn": image.offset_dn}


def _shared_size(row: dict, path: str) -> tuple[int, int]:
    sizes = {sensor: image.pixels.shape[1:] for sensor, image in row["images"].items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(
            f"`images` of a row must share one pixel grid, got {sizes} in {path} (key {row['key']!r}). "
            "Warp them to one grid when the shards are made."
        )
    return next(iter(sizes.values()))
