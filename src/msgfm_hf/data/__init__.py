"""Files to batches: georeferenced images, Parquet shards and the mixture of sources that training draws from."""
