"""The training loop, its objectives, data, checkpoints and record."""
