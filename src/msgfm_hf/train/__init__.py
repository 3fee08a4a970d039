"""Training: where files are written, devices are used and time passes."""
