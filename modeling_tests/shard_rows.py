"""What is in the shards of a source, all at once: for sources as small as those of tests."""

from msgfm_hf.data.shards import ShardSource, shard_splits


def rows(folder):
    """{key: (split, row)} of every split, with page checksums."""
    found = {}
    for split in shard_splits(folder):
        source = ShardSource(folder, split)
        for index in range(len(source)):
            row = source.read(index, verify=True)
            found[row["key"]] = (split, row)
    return found
