"""Run directory: lock, saved config, checkpoints, metrics."""
