"""The training loop's parts: objectives, data, history, checkpoints, averages."""
