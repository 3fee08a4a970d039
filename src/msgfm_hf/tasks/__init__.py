"""Tasks on top of the model, one file each, and their metrics."""
