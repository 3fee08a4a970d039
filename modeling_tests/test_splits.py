"""Splits by place: groups are dealt whole, blocks are squares on the ground, overlaps are found."""

import collections
import math

import numpy as np
import pyproj
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msgfm_hf.data.shards import ShardImage, ShardRow
from msgfm_hf.data.splits import (
    Footprint,
    SplitBy,
    SplitCounts,
    block_groups,
    deal_groups,
    describe_counts,
    overlapping_footprints,
    parse_shares,
    parse_split_by,
    split_column,
)

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}
UTM31, UTM32 = "EPSG:32631", "EPSG:32632"


def test_what_to_split_by():
    assert parse_split_by("region") == SplitBy("region", None)
    assert parse_split_by("block:5km") == SplitBy(None, 5000.0)
    assert parse_split_by("block:2.5m") == SplitBy(None, 2.5)


@pytest.mark.parametrize("text", ["block:5", "block:km", "block:0m", "block:-5km", "block:5 km"])
def test_a_block_without_a_size(text):
    with pytest.raises(ValueError, match="`split_by` must be a column, block:500m or block:5km, got 'block:"):
        parse_split_by(text)


def test_shares():
    assert parse_shares("0.7,0.15,0.15") == SHARES
    assert parse_shares("1,0,0") == {"train": 1.0, "val": 0.0, "test": 0.0}


@pytest.mark.parametrize("text", ["0.7,0.3", "0.7,0.2,0.2", "0,0.5,0.5", "1.2,-0.1,-0.1", "a,b,c", ""])
def test_shares_that_are_none(text):
    with pytest.raises(ValueError, match="`shares` must be three numbers for train, val, test that sum to 1, got"):
        parse_shares(text)


def test_a_column_of_split_names_is_the_split():
    assert split_column(["train", "Validation", "dev", "TEST"]) == {
        "train": "train",
        "Validation": "val",
        "dev": "val",
        "TEST": "test",
    }
    assert split_column(["training", "eval", "testing"]) == {"training": "train", "eval": "val", "testing": "test"}
    assert split_column(["north", "south"]) is None


@pytest.mark.parametrize("other", ["unassigned", "holdout", "1"])
def test_a_column_of_splits_and_other_words_is_never_dealt(other):
    with pytest.raises(
        ValueError, match=f"of splits or of groups, got test, train, val and also {other}. Rename these"
    ):
        split_column(["train", "val", "test", other])
    with pytest.raises(ValueError, match="and also a0, a1, a2, a3, a4, .... Rename"):
        split_column(["train", *(f"a{number}" for number in range(9))])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=3, max_size=40), st.integers(0, 5))
def test_groups_are_dealt_whole_and_close_to_the_shares(sizes, seed):
    rows = {f"place{number}": size for number, size in enumerate(sizes)}
    dealt = deal_groups(rows, SHARES, seed)
    assert dealt == deal_groups(dict(reversed(rows.items())), SHARES, seed)
    assert set(dealt) == set(rows) and set(dealt.values()) == set(SHARES)
    total = sum(sizes)
    for split, share in SHARES.items():
        held = sum(size for group, size in rows.items() if dealt[group] == split)
        # What cannot be divided is a group; the last groups may have to fill empty splits.
        assert abs(held - share * total) <= 3 * max(sizes)


def test_many_equal_groups_meet_the_shares():
    dealt = deal_groups({f"place{number}": 5 for number in range(200)}, SHARES)
    counts = {split: list(dealt.values()).count(split) for split in SHARES}
    assert counts == {"train": 140, "val": 30, "test": 30}


def test_another_seed_is_another_deal_and_a_share_of_0_gets_nothing():
    rows = {f"place{number}": 1 for number in range(40)}
    assert deal_groups(rows, SHARES, 0) != deal_groups(rows, SHARES, 1)
    assert set(deal_groups(rows, parse_shares("0.8,0.2,0")).values()) == {"train", "val"}


def test_fewer_groups_than_splits():
    with pytest.raises(ValueError, match="`split_by` must make at least 3 groups for train, val, test, got 2"):
        deal_groups({"a": 5, "b": 5}, SHARES)


@pytest.mark.parametrize("latitude", [-78.0, -33.0, 0.4, 57.0, 69.0])
def test_blocks_are_squares_on_the_ground_everywhere(latitude):
    earth, near = pyproj.Geod(ellps="WGS84"), np.arange(-0.06, 0.06, 0.0004)
    columns = near / math.cos(math.radians(latitude))
    points = [("EPSG:4326", 20 + x, latitude + y) for y in near for x in columns]
    blocks = collections.defaultdict(list)
    for name, (_, x, y) in zip(block_groups(points, 5000), points, strict=True):
        blocks[name].append((x, y))
    x, y = np.array(max(blocks.values(), key=len)).T
    middle = (y.min() + y.max()) / 2
    # A step of the points is 45 m.
    assert earth.inv(x.min(), middle, x.max(), middle)[2] == pytest.approx(5000, abs=100)
    assert earth.inv(20, y.min(), 20, y.max())[2] == pytest.approx(5000, abs=100)


def test_blocks_count_from_the_equator_and_greenwich():
    # On a sphere of 6371008.8 m a degree is 111195.08 m.
    centres = [("EPSG:4326", part * 5000 / 111195.08, 0.001) for part in (0.5, 0.99, 1.01, -0.5)]
    assert block_groups(centres, 5000) == ["block_x0_y0", "block_x0_y0", "block_x1_y0", "block_x-1_y0"]
    # One place in two coordinate systems is in one block.
    assert len(set(block_groups([("EPSG:4326", 3.0, 51.0), (UTM31, 500_000, 5_649_824.6)], 5000))) == 1


def square(key, split, left, bottom, side=2240.0, crs=UTM32):
    return Footprint(key, split, crs, (left, bottom, left + side, bottom + side), 10.0)


def test_overlaps_are_found_between_splits_only():
    places = [
        square("a", "train", 0, 0),
        square("b", "train", 1000, 0),
        square("c", "val", 2240, 0),  # touches a, overlaps b by 1000 m
        square("d", "test", 9000, 0),
    ]
    assert [(one.key, other.key) for one, other in overlapping_footprints(places)] == [("b", "c")]


def test_half_a_pixel_is_no_overlap():
    def overlap(metres):
        return overlapping_footprints([square("a", "train", 0, 0), square("b", "val", 2240 - metres, 0)])

    assert overlap(4.9) == []
    assert len(overlap(5.1)) == 1


def test_overlaps_are_found_across_coordinate_systems():
    # 6 degrees east at 50 degrees north, where zones 31 and 32 meet: 715 km and 285 km easting (WGS 84 / UTM).
    west = Footprint("west", "train", UTM31, (714_000.0, 5_542_000.0, 716_240.0, 5_544_240.0), 10.0)
    east = Footprint("east", "val", UTM32, (284_000.0, 5_542_000.0, 286_240.0, 5_544_240.0), 10.0)
    far = Footprint("far", "test", UTM32, (600_000.0, 5_542_000.0, 602_240.0, 5_544_240.0), 10.0)
    assert [(one.key, other.key) for one, other in overlapping_footprints([west, east, far])] == [("west", "east")]


def test_footprints_at_the_antimeridian_do_not_reach_around_the_earth():
    # Taveuni lies across 180 degrees (UTM 60 and 1 south); 15 degrees east is in zone 33.
    fiji = square("fiji", "train", 818_900, 8_117_800, 4000, "EPSG:32760")
    east = square("east", "test", 182_000, 8_117_800, crs="EPSG:32701")
    africa = square("africa", "val", 500_000, 8_120_000, crs="EPSG:32733")
    assert [(one.key, other.key) for one, other in overlapping_footprints([fiji, east, africa])] == [("east", "fiji")]


def test_degrees_beyond_180_are_where_they_are():
    beyond = Footprint("beyond", "train", "EPSG:4326", (179.9, -17.1, 180.1, -16.9), 0.001)
    east = square("east", "val", 182_000, 8_117_800, crs="EPSG:32701")
    assert [(one.key, other.key) for one, other in overlapping_footprints([beyond, east])] == [("beyond", "east")]


def test_coordinates_that_are_no_place():
    with pytest.raises(ValueError, match="`centres` must lie on the map of their .*, got .* in EPSG:32631"):
        block_groups([(UTM31, 500_000, 5_649_824.6), (UTM31, 5e8, 5.7e8)], 5000)


def test_revisits_of_a_place_count_once():
    places = [square(f"a{date}", "train", 0, 0) for date in range(100)]
    places += [square(f"b{date}", "val", 0, 0) for date in range(100)]
    assert [(one.key, other.key) for one, other in overlapping_footprints(places)] == [("a0", "b0")]


def test_counts_of_labels():
    image = ShardImage(np.zeros((1, 2, 2), np.float32), ["height"], "metres")
    target = ShardImage(np.array([[[0, 2], [255, 2]]], np.uint8), ["class"], "class")
    blank = ShardImage(np.full((1, 2, 2), 255, np.uint8), ["class"], "class")
    counts = {"val": SplitCounts(), "train": SplitCounts()}
    counts["train"].add(ShardRow("a", "s", "train", "north", {"dsm": image}, target=target))
    counts["train"].add(ShardRow("b", "s", "train", "north", {"dsm": image}, target=blank))
    counts["val"].add(ShardRow("c", "s", "val", "south", {"dsm": image}))
    assert describe_counts(counts, "map", ["crop", "town", "water"]) == [
        "train  2 rows, 1 places",
        "       crop 1 px, water 2 px; 1 rows unlabelled",
        "val    1 rows, 1 places",
        "       no labels; 1 rows unlabelled",
        "! train has no town, which the file of labels has",
    ]
    counts["val"].add(ShardRow("d", "s", "val", "south", {"dsm": image}, labels=["lake"]))
    assert describe_counts(counts, "class")[-1] == "! train has no lake, which val has"
    assert describe_counts({"train": counts["train"]}) == ["train  2 rows, 1 places"]
