"""The order of rows, the steps of a rank and the crops: exact, whatever the number of workers and of processes."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from msgfm_hf.data.mixture import (
    EvaluationCrops,
    MixtureDataset,
    MixtureSampler,
    SourceOrder,
    grid_crops,
    steps_per_epoch,
)
from msgfm_hf.data.shards import ShardImage, ShardRow, ShardSource, ShardWriter

SIZE = 8


def groups(sizes):
    firsts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return [("file", number, int(first), size) for number, (first, size) in enumerate(zip(firsts, sizes, strict=True))]


def coded(number, height=20, width=24):
    """A pair whose pixels tell their row, column and row number: elevations as floats, backscatter as its negative."""
    code = number * 1000.0 + np.arange(height * width, dtype=np.float32).reshape(1, height, width)
    dsm = ShardImage(code, ["height"], "metres", nodata=float("nan"))
    s1 = ShardImage(-np.concatenate([code, code + 0.5]), ["VV", "VH"], "db")
    return {"dsm": dsm, "s1": s1}


def make_source(folder, name="pairs", rows=40, images=coded, split="train"):
    with ShardWriter(folder, name, sorted(images(0)), check=False) as writer:
        for number in range(rows):
            writer.write(ShardRow(f"{name}{number}", name, split, f"place{number}", images(number)))
    return ShardSource(folder / name, split)


def photos(number):
    pixels = np.random.default_rng(number).integers(0, 255, (3, 16, 16), dtype=np.uint8)
    return {"rgb": ShardImage(pixels, ["red", "green", "blue"], "dn", 1 / 255)}


def make_dataset(sources, seed=0, image_size=SIZE, **options):
    orders = [SourceOrder(source.row_groups, source.name, seed) for source in sources]
    return MixtureDataset(sources, orders, image_size, seed, **options)


def flip_a_bit(source, row):
    """Damage one row; its whole row group becomes unreadable where checksums are verified."""
    file = Path(source.row_groups[0][0])
    content = bytearray(file.read_bytes())
    content[content.find(photos(row)["rgb"].pixels.tobytes())] ^= 1
    file.write_bytes(content)


# Order


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=12), st.integers(0, 2**32), st.integers(1, 5))
def test_every_row_comes_once_per_epoch(sizes, seed, block):
    order = SourceOrder(groups(sizes), "name", seed, block)
    n = sum(sizes)
    assert len(order) == n
    for epoch in range(3):
        assert sorted(order[position] for position in range(epoch * n, (epoch + 1) * n)) == list(range(n))


def test_positions_have_their_row_whatever_was_asked_before():
    sizes = [16] * 9 + [5]
    forwards = SourceOrder(groups(sizes), "name", 3)
    expected = [forwards[position] for position in range(500)]
    backwards = SourceOrder(groups(sizes), "name", 3)
    assert [backwards[position] for position in reversed(range(500))] == expected[::-1]


def test_orders_differ_between_epochs_seeds_and_sources():
    def epoch(number, name="a", seed=0):
        order = SourceOrder(groups([16] * 8), name, seed)
        return [order[position] for position in range(number * 128, (number + 1) * 128)]

    variants = [epoch(0), epoch(1), epoch(0, "b"), epoch(0, seed=1), list(range(128))]
    assert len({tuple(variant) for variant in variants}) == 5


def test_a_block_touches_few_row_groups():
    order = SourceOrder(groups([16] * 40), "name", 0, block=4)
    for start in range(0, 640, 64):
        touched = {order[position] // 16 for position in range(start, start + 64)}
        assert len(touched) == 4
    first = [order[position] // 16 for position in range(16)]
    assert len(set(first)) > 1  # within a block, rows of its groups are mixed


# Steps


def test_a_step_holds_a_run_of_positions_of_every_source():
    sampler = MixtureSampler([3, 1], stop=6, start=2, rank=1, world_size=2)
    assert len(sampler) == 2
    # Turn 1 * 2 + 1 = 3: positions 9, 10, 11 of the first source and 3 of the second; then turn 5.
    assert list(sampler) == [[(0, 9), (0, 10), (0, 11), (1, 3)], [(0, 15), (0, 16), (0, 17), (1, 5)]]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 6))
def test_ranks_share_the_positions_out_and_resume_anywhere(batch_size, world_size, start_step):
    turns = 6 * world_size
    ranks = [list(MixtureSampler([batch_size], turns, 0, rank, world_size)) for rank in range(world_size)]
    drawn = sorted(position for steps in ranks for step in steps for _, position in step)
    assert drawn == list(range(6 * world_size * batch_size))
    for rank, steps in enumerate(ranks):
        start = start_step * world_size
        assert list(MixtureSampler([batch_size], turns, start, rank, world_size)) == steps[start_step:]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 12))
def test_another_number_of_ranks_goes_on_at_the_same_position(batch_size, before, after, cut):
    """No position is lost or repeated, wherever the first ranks stopped."""
    cut *= before
    ranks = [MixtureSampler([batch_size], cut, 0, rank, before) for rank in range(before)]
    ranks += [MixtureSampler([batch_size], cut + 12, cut, rank, after) for rank in range(after)]
    drawn = sorted(position for batches in ranks for batch in batches for _, position in batch)
    assert drawn == list(range((cut + 12) * batch_size))


def test_the_epoch_is_that_of_the_longest_source():
    assert steps_per_epoch([100, 30, 5], [8, 1, 4]) == 30
    assert steps_per_epoch([100, 30, 5], [8, 1, 4], turns_per_step=4) == 8
    assert steps_per_epoch([101], [10], turns_per_step=2) == 6


def test_steps_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"`batch_sizes` must be at least 1 each, got \[4, 0\]"):
        MixtureSampler([4, 0], 10)
    with pytest.raises(ValueError, match=r"`rank` must be in \[0, 2\), got 2"):
        MixtureSampler([4], 10, rank=2, world_size=2)


# Samples


def test_samples_do_not_depend_on_workers(tmp_path):
    sources = [make_source(tmp_path), make_source(tmp_path, "photos", 10, photos)]

    def samples(workers):
        sampler = MixtureSampler([5, 3], stop=6, start=1)
        loader = DataLoader(
            make_dataset(sources), batch_sampler=sampler, num_workers=workers, collate_fn=lambda samples: samples
        )
        return list(loader)

    alone, helped = samples(0), samples(2)
    assert [len(step) for step in alone] == [8] * 5
    for step, other in zip(alone, helped, strict=True):
        for sample, twin in zip(step, other, strict=True):
            assert {k: v for k, v in sample.items() if k != "images"} == {
                k: v for k, v in twin.items() if k != "images"
            }
            for sensor, image in sample["images"].items():
                np.testing.assert_array_equal(image["pixels"], twin["images"][sensor]["pixels"])
                np.testing.assert_array_equal(image["valid"], twin["images"][sensor]["valid"])


def test_paired_sensors_share_crop_and_flips(tmp_path):
    dataset = make_dataset([make_source(tmp_path)])
    corners, flips = set(), set()
    for position in range(120):
        sample = dataset[0, position]
        height, (vv, vh) = sample["images"]["dsm"]["pixels"][0], sample["images"]["s1"]["pixels"]
        np.testing.assert_array_equal(vv, -height)
        np.testing.assert_array_equal(vh, -height - 0.5)
        number, code = divmod(height.astype(int), 1000)
        assert sample["key"] == f"pairs{number[0, 0]}" and sample["group_id"] == f"place{number[0, 0]}"
        rows, columns = divmod(code, 24)
        steps = rows[1, 0] - rows[0, 0], columns[0, 1] - columns[0, 0]
        assert np.abs(steps).tolist() == [1, 1]
        np.testing.assert_array_equal(rows - rows[0, 0], steps[0] * np.arange(SIZE)[:, None] * np.ones(SIZE))
        np.testing.assert_array_equal(columns - columns[0, 0], steps[1] * np.arange(SIZE) * np.ones((SIZE, 1)))
        assert sample["images"]["s1"]["valid"].all()
        corners.add((rows.min(), columns.min()))
        flips.add(steps)
    assert flips == {(1, 1), (1, -1), (-1, 1), (-1, -1)}
    tops, lefts = {top for top, _ in corners}, {left for _, left in corners}
    assert (min(tops), max(tops), min(lefts), max(lefts)) == (0, 12, 0, 16)


def test_crops_are_seeded_by_seed_source_and_position(tmp_path):
    source, other = make_source(tmp_path, rows=1), make_source(tmp_path, "others", rows=1)

    def pixels(source, position, seed=0):
        return make_dataset([source], seed)[0, position]["images"]["dsm"]["pixels"].tobytes()

    assert pixels(source, 3) == pixels(source, 3)
    # One row, so what differs is the crop: next epoch, other seed, other source.
    assert len({pixels(source, 3), pixels(source, 4), pixels(source, 3, 1), pixels(other, 3)}) == 4


def test_small_images_are_padded_right_and_below_with_invalid_zeros(tmp_path):
    dataset = make_dataset([make_source(tmp_path, images=lambda number: coded(number + 1, 5, 24))])
    for position in range(20):
        for image in dataset[0, position]["images"].values():
            assert image["pixels"].shape[1:] == image["valid"].shape == (SIZE, SIZE)
            assert image["valid"][:5].all() and not image["valid"][5:].any()
            assert image["pixels"][:, :5].all() and not image["pixels"][:, 5:].any()


def test_a_pixel_is_invalid_where_any_band_is(tmp_path):
    def images(number):
        stored = np.full((2, 8, 8), 500, np.uint16)
        stored[0, 2, 3], stored[1, 4, 5] = 65535, 65535
        s1 = ShardImage(stored, ["VV", "VH"], "amplitude", 2.0, -100.0, nodata=65535)
        heights = np.full((1, 8, 8), 3, np.float32)
        heights[0, 6, 6], heights[0, 0, 0] = np.nan, np.inf
        return {"s1": s1, "dsm": ShardImage(heights, ["height"], "metres")}

    crop = EvaluationCrops(make_source(tmp_path, rows=1, images=images), SIZE)[0]["images"]
    assert np.argwhere(~crop["s1"]["valid"]).tolist() == [[2, 3], [4, 5]]
    assert np.argwhere(~crop["dsm"]["valid"]).tolist() == [[0, 0], [6, 6]]
    # (500 - 50) * 2 = 500 * 2 - 100.
    assert (crop["s1"]["scale"], crop["s1"]["offset_dn"]) == (2.0, -50.0)
    assert crop["s1"]["pixels"].dtype == np.uint16


def test_damaged_rows_are_replaced_and_reported_in_the_first_epoch(tmp_path):
    source = make_source(tmp_path, "photos", 64, photos)
    whole = make_dataset([source])
    order = whole.orders[0]
    flip_a_bit(source, 20)  # rows 16 to 31
    source = ShardSource(source.path)
    dataset = make_dataset([source])
    replaced = 0
    for position in range(64):
        sample = dataset[0, position]
        skipped = [row for row, _ in sample["bad"]]
        following = [order[position + n] for n in range(len(skipped) + 1)]
        assert skipped == [f"photos[{row}]" for row in following[:-1]]
        assert all(16 <= row < 32 for row in following[:-1]) and not 16 <= following[-1] < 32
        assert sample["key"] == f"photos{following[-1]}"
        assert all("got damage at row" in reason for _, reason in sample["bad"])
        replaced += bool(skipped)
    assert replaced == 16
    # A later epoch neither forgets what it found nor checks again what was sound.
    assert sum(bool(dataset[0, position]["bad"]) for position in range(64, 128)) == replaced


def test_after_too_many_damaged_rows_in_succession_a_sample_has_no_images(tmp_path):
    source = make_source(tmp_path, "photos", 16, photos)
    flip_a_bit(source, 3)
    sample = make_dataset([ShardSource(source.path)], max_bad=4)[0, 0]
    assert sample["images"] is None and len(sample["bad"]) == 5
    assert all("got damage at row" in reason for _, reason in sample["bad"])


def test_what_cannot_be_mixed_is_refused(tmp_path):
    source = make_source(tmp_path, rows=3)
    with pytest.raises(ValueError, match=r"`orders` must cover the rows of `sources`, \[3\], got \[16\]"):
        MixtureDataset([source], [SourceOrder(groups([16]), "pairs", 0)], SIZE, 0)

    def images(number):
        return coded(number) | {"dsm": coded(number, 10, 12)["dsm"]}

    uneven = make_source(tmp_path, "uneven", 1, images)
    with pytest.raises(ValueError, match="`images` of a row must share one pixel grid"):
        make_dataset([uneven])[0, 0]
    with pytest.raises(ValueError, match="`images` of a row must share one pixel grid"):
        EvaluationCrops(uneven, SIZE)[0]


# Evaluation


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 20))
def test_the_grid_is_whole_apart_and_centred(height, width, size):
    corners = grid_crops(height, width, size)
    assert len(corners) == len(set(corners)) == max(height // size, 1) * max(width // size, 1)
    for axis, length in enumerate((height, width)):
        starts = sorted({corner[axis] for corner in corners})
        assert all(later - earlier == size for earlier, later in itertools.pairwise(starts))
        if length >= size:
            before, after = starts[0], length - (starts[-1] + size)
            assert 0 <= after - before <= 1
        else:
            assert starts == [0]


def test_evaluation_crops_are_fixed_and_say_where_they_are(tmp_path):
    source = make_source(tmp_path, rows=2, split="val")
    crops = EvaluationCrops(source, SIZE)
    # 20 x 24 pixels: two by three crops, 2 rows left over on both sides.
    assert len(crops) == 12
    assert crops.ids[:4] == [(0, 2, 0), (0, 2, 8), (0, 2, 16), (0, 10, 0)]
    for index in (0, 5, 6, 11):
        sample = crops[index]
        number, top, left = sample["id"]
        assert (sample["key"], sample["group_id"]) == (f"pairs{number}", f"place{number}")
        corner = number * 1000 + top * 24 + left
        assert sample["images"]["dsm"]["pixels"][0, 0, 0] == corner
        assert sample["images"]["dsm"]["pixels"][0, -1, -1] == corner + 7 * 24 + 7


def test_a_few_crops_are_spread_evenly_and_only_their_row_groups_are_read(tmp_path, monkeypatch):
    source = make_source(tmp_path, rows=100, split="val")
    read, calls = ShardSource._read, []

    def counting(self, file, group, *arguments, **options):
        calls.append(group)
        return read(self, file, group, *arguments, **options)

    monkeypatch.setattr(ShardSource, "_read", counting)
    few = EvaluationCrops(source, SIZE, max_crops=3)
    assert [number for number, _, _ in few.ids] == [0, 50, 99]
    assert len(set(calls)) == 3 < len(source.row_groups)
    # A crop has the number by which masks are drawn, however few others there are.
    every = EvaluationCrops(source, SIZE)
    position = {crop: every[index]["position"] for index, crop in enumerate(every.ids)}
    assert len(set(position.values())) == len(every)
    assert [few[index]["position"] for index in range(3)] == [position[crop] for crop in few.ids]
