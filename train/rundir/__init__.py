"""Run directory: config, checkpoints, metrics."""
