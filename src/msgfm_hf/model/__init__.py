"""The ground floor: the files that travel with a checkpoint."""
